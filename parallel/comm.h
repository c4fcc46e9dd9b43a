/* The only door to the transport. Everything that crosses ranks is a group of messages: begun together, ended together
 * (the shape of MPI's non-blocking calls and of NCCL's groups), plus the few collectives that set-up needs. Messages
 * between two ranks arrive in the order they were begun. Messages of 0 bytes are not sent: both sides know.
 *
 * Between GPUs both transports look alike. begin takes what was given to the queue before as done, and returns at once:
 * work that is given to the queue now runs while the messages travel, on a queue beside it. What is given after end
 * sees what has come, and may write over what was sent. In end the host may wait for the other ranks (by way of host
 * memory it is MPI that sends), but never for work that was given since begin. */
#ifndef LS_COMM_H
#define LS_COMM_H

#include "device.h"

typedef struct ls_message {
    void *data;
    size_t bytes;
    int peer;
    int receive; /* 1: into data, 0: from data */
    int host;    /* 1: data is host memory, 0: where the tensors are */
} ls_message;

/* What is under way; zero-initialise once, reuse, release with ops->forget. */
typedef struct ls_pending {
    void *requests;
    int count, capacity;
} ls_pending;

typedef struct ls_comm ls_comm;
typedef struct ls_comm_ops {
    const char *name;
    ls_status (*begin)(ls_comm *, const ls_message *, int count, ls_pending *);
    ls_status (*end)(ls_comm *, ls_pending *);
    void (*forget)(ls_pending *);
    /* all-reduce, in place, in order with the queue's work; by way of host memory the host waits for it meanwhile */
    ls_status (*sum)(ls_comm *, ls_real *x, int64_t n);
    void (*close)(ls_comm *);
    /* of what is in host memory: NULL in a table of a transport between devices, whose host has them */
    ls_status (*next)(ls_comm *, ls_pending *, int *which); /* waits until one more message is through: its number among
                                                             * those begun since the last end; -1: all were */
    ls_status (*min)(ls_comm *, int64_t *x, int n);         /* all-reduce of a few numbers, in place */
    ls_status (*broadcast)(ls_comm *, void *data, int bytes, int root);
    ls_status (*gather)(ls_comm *, int64_t mine, int64_t *all); /* one number from each rank, to every rank */
} ls_comm_ops;
struct ls_comm {
    const ls_comm_ops *ops;
    int rank, size;
    void *own;
    ls_comm *host; /* NULL: this one is for host memory itself */
};

static inline ls_comm *ls_comm_host(ls_comm *c)
{
    return c->host != NULL ? c->host : c;
}
static inline ls_status ls_comm_min(ls_comm *c, int64_t *x, int n)
{
    return ls_comm_host(c)->ops->min(ls_comm_host(c), x, n);
}
static inline ls_status ls_comm_broadcast(ls_comm *c, void *data, int bytes, int root)
{
    return ls_comm_host(c)->ops->broadcast(ls_comm_host(c), data, bytes, root);
}
static inline ls_status ls_comm_gather(ls_comm *c, int64_t mine, int64_t *all)
{
    return ls_comm_host(c)->ops->gather(ls_comm_host(c), mine, all);
}

void ls_comm_self(ls_comm *comm);
void ls_comm_dry(int rank, int size, ls_comm *comm); /* a rank without the others: see ls_context_options.dry_size */
int ls_comm_is_dry(const ls_comm *comm);
/* Collective; duplicates mpi. Takes no memory of its own, so that no rank fails before there is a way to say so. */
ls_status ls_comm_mpi(MPI_Comm mpi, ls_comm *comm);
/* Tensors in the memory of a device that MPI cannot see: messages pass through host memory. Takes over *comm, an MPI
 * communicator, which goes on to serve what is in host memory. */
ls_status ls_comm_staged(const ls_device_ops *ops, ls_queue *queue, ls_comm *comm);
/* Collective: messages between GPUs by NCCL, in order with the work of this rank's queue; MPI, duplicated, for what is
 * in host memory. Needs a GPU for each rank. All ranks get the same status; not there in a build without NCCL. */
ls_status ls_comm_nccl(MPI_Comm mpi, const ls_device_ops *ops, ls_queue *queue, ls_comm *comm);

#ifdef LS_NCCL_BACKEND
#define LS_IF_NCCL(x) (x)
#else
#define LS_IF_NCCL(x) ls_comm_no_nccl
#endif
static inline ls_status ls_comm_no_nccl(MPI_Comm mpi, const ls_device_ops *ops, ls_queue *queue, ls_comm *comm)
{
    (void)mpi, (void)ops, (void)queue, (void)comm;
    LS_FAIL(LS_ERR_UNSUPPORTED, "nccl: this build does not have it");
}
/* 1: this build has the NCCL transport. */
static inline int ls_has_nccl(void)
{
#ifdef LS_NCCL_BACKEND
    return 1;
#else
    return 0;
#endif
}

#endif
