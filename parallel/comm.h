/* The only door to the transport. Everything that crosses ranks is a group of messages: posted together, waited for
 * together (the shape of MPI's non-blocking calls and of NCCL's groups), plus the few collectives that set-up needs.
 * Messages between two ranks arrive in the order they were posted. Messages of 0 bytes are not sent: both sides know.
 */
#ifndef LS_COMM_H
#define LS_COMM_H

#include "status.h"

typedef struct ls_message {
    void *data;
    size_t bytes;
    int peer;
    int receive; /* 1: into data, 0: from data */
} ls_message;

/* What is under way; zero-initialise once, reuse, release with ops->forget. */
typedef struct ls_pending {
    void *requests;
    int count, capacity;
} ls_pending;

typedef struct ls_comm ls_comm;
typedef struct ls_comm_ops {
    const char *name;
    ls_status (*post)(ls_comm *, const ls_message *, int count, ls_pending *);
    ls_status (*wait)(ls_comm *, ls_pending *);
    void (*forget)(ls_pending *);
    ls_status (*sum)(ls_comm *, ls_real *x, int64_t n); /* all-reduce, in place */
    ls_status (*min)(ls_comm *, int64_t *x, int n);     /* all-reduce of a few numbers, in place */
    ls_status (*broadcast)(ls_comm *, void *data, int bytes, int root);
    ls_status (*gather)(ls_comm *, int64_t mine, int64_t *all); /* one number from each rank, to every rank */
    void (*close)(ls_comm *);
} ls_comm_ops;
struct ls_comm {
    const ls_comm_ops *ops;
    int rank, size;
    void *own;
};

void ls_comm_self(ls_comm *comm);
void ls_comm_dry(int rank, int size, ls_comm *comm); /* a rank without the others: see ls_context_options.dry_size */
ls_status ls_comm_mpi(MPI_Comm mpi, ls_comm *comm); /* collective; duplicates mpi */

#endif
