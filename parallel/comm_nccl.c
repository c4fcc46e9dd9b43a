/* NCCL: messages from GPU to GPU, in order with the work of the ranks' queues; no host waits for one. What is in host
 * memory, and all that the ranks agree on, goes over MPI.
 *
 *   compute   ... kernels | ready            | kernels meanwhile         | waits for done | kernels ...
 *   exchange              | waits for ready  | a group of sends, receives | done
 *
 * Groups run one after the other on the exchange stream, so all ranks must begin them in the same order: they do, since
 * all run the same list of phases.
 *
 * NCCL is told never to block (blocking = 0), so a rank that is gone cannot hang the others in a call: each is asked
 * for until it is through, up to LONGSPAN_NCCL_TIMEOUT seconds (300). What fails later, while messages are under way,
 * comes to light in the next begin, end or sum, or where the host waits for the GPU meanwhile; the communicator is then
 * given up, which ends what waits on the GPU. */
#include "comm.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef struct nccl {
    ls_comm host;     /* MPI */
    ncclComm_t ranks; /* NULL: not there yet, or given up */
    int device;
    const ls_device_ops *ops;
    ls_queue *compute, *exchange;
    cudaStream_t stream; /* of exchange */
    ls_mark *ready;      /* what is sent is there, and nobody reads what is received into */
    double limit;        /* seconds */
    ls_watch watch;      /* over what is under way */
} nccl;

/* What is under way, in ls_pending.requests. */
typedef struct flight {
    const nccl *owner;
    ls_pending host;
    ls_mark *done;
    int begun;
} flight;

/* ------------------------------------------------------------------------------------------------ failures */

static const char *advice(ncclResult_t r)
{
    switch (r) {
    case ncclRemoteError:
        return "another rank or the network is gone: what the other ranks say comes first";
    case ncclSystemError:
        return "NCCL_DEBUG=INFO tells which call of the system; NCCL_SOCKET_IFNAME chooses the network interface";
    case ncclUnhandledCudaError:
        return "see nvidia-smi; NCCL_DEBUG=INFO tells more";
    default:
        return "NCCL_DEBUG=INFO tells more; parallel.transport: mpi does without NCCL";
    }
}

static ls_status check_cuda(const ls_comm *c, cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return LS_OK;
    cudaGetLastError();
    LS_FAIL(LS_ERR_COMM, "nccl: %s failed on rank %d of %d: %s: see nvidia-smi", what, c->rank, c->size,
            cudaGetErrorString(error));
}

static void give_up(nccl *n)
{
    if (n->ranks != NULL) ncclCommAbort(n->ranks);
    n->ranks = NULL;
}

static ls_status failed(ls_comm *c, ncclResult_t r, const char *what)
{
    nccl *n = c->own;
    const char *last = ncclGetLastError(n->ranks);
    const int known = last != NULL && last[0] != '\0';
    const ls_status status = ls_fail(LS_ERR_COMM, "nccl: %s failed on rank %d of %d: %s%s%.160s: %s", what, c->rank,
                                     c->size, ncclGetErrorString(r), known ? ": " : "", known ? last : "", advice(r));
    give_up(n);
    return status;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A call that has returned r is through, or has failed, or takes too long. */
static ls_status settle(ls_comm *c, ncclResult_t r, const char *what)
{
    nccl *n = c->own;
    const double start = now();
    while (r == ncclInProgress) {
        const double waited = now() - start;
        if (waited > n->limit) {
            give_up(n);
            LS_FAIL(LS_ERR_COMM,
                    "nccl: %s took more than %g s on rank %d of %d: see whether another rank is gone; "
                    "NCCL_DEBUG=INFO tells more, LONGSPAN_NCCL_TIMEOUT sets the seconds",
                    what, n->limit, c->rank, c->size);
        }
        if (waited < 1e-3)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
        const ncclResult_t asked = ncclCommGetAsyncError(n->ranks, &r);
        if (asked != ncclSuccess) r = asked;
    }
    return r == ncclSuccess ? LS_OK : failed(c, r, what);
}

/* Whether what was given before has failed meanwhile. */
static ls_status check_alive(ls_comm *c, const char *what)
{
    const nccl *n = c->own;
    if (n->ranks == NULL)
        LS_FAIL(LS_ERR_COMM, "nccl: %s on rank %d of %d: the connection was given up after a failure: start again",
                what, c->rank, c->size);
    ncclResult_t r = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(n->ranks, &r);
    return settle(c, asked != ncclSuccess ? asked : r, what);
}

/* Asked while the host waits for a queue, which may wait for messages. */
static ls_status look(void *of)
{
    nccl *n = of;
    if (n->ranks == NULL) return LS_OK; /* was given up: nothing waits for it any more */
    ncclResult_t r = ncclSuccess;
    const ncclResult_t asked = ncclCommGetAsyncError(n->ranks, &r);
    if (asked != ncclSuccess) r = asked;
    if (r == ncclSuccess || r == ncclInProgress) return LS_OK;
    ls_comm c = {NULL, n->host.rank, n->host.size, n, &n->host};
    return failed(&c, r, "what was under way");
}

/* ------------------------------------------------------------------------------------------------ messages */

/* The exchange stream goes on where the compute stream is now. */
static ls_status start_stream(ls_comm *c, const char *what)
{
    nccl *n = c->own;
    LS_TRY(check_alive(c, what));
    LS_TRY(check_cuda(c, cudaSetDevice(n->device), what));
    LS_TRY(n->ops->mark(n->compute, &n->ready));
    return n->ops->follow(n->exchange, n->ready);
}

static flight *flight_of(const nccl *n, ls_pending *p)
{
    flight *f = p->requests;
    if (f == NULL) f = p->requests = calloc(1, sizeof *f);
    if (f != NULL) f->owner = n;
    return f;
}

/* A group: NCCL starts its messages together, so none waits for another's turn. */
static ls_status begin_group(ls_comm *c, const ls_message *m, int count)
{
    const nccl *n = c->own;
    ncclResult_t r = ncclGroupStart();
    for (int i = 0; i < count && (r == ncclSuccess || r == ncclInProgress); i++) {
        if (m[i].host || m[i].bytes == 0) continue;
        r = m[i].receive ? ncclRecv(m[i].data, m[i].bytes, ncclUint8, m[i].peer, n->ranks, n->stream)
                         : ncclSend(m[i].data, m[i].bytes, ncclUint8, m[i].peer, n->ranks, n->stream);
    }
    const ncclResult_t end = ncclGroupEnd(); /* also of a group that is not whole */
    return settle(c, r == ncclSuccess || r == ncclInProgress ? end : r, "beginning messages");
}

static ls_status begin(ls_comm *c, const ls_message *m, int count, ls_pending *p)
{
    nccl *n = c->own;
    flight *f = flight_of(n, p);
    int groups = 0;
    if (f == NULL) LS_FAIL(LS_ERR_MEMORY, "nccl: no memory for messages");
    for (int i = 0; i < count; i++) {
        groups |= !m[i].host && m[i].bytes > 0;
        if (m[i].host) LS_TRY(n->host.ops->begin(&n->host, &m[i], 1, &f->host));
    }
    if (!groups) return LS_OK;
    LS_TRY(start_stream(c, "beginning messages"));
    LS_TRY(begin_group(c, m, count));
    LS_TRY(n->ops->mark(n->exchange, &f->done));
    f->begun = 1;
    return LS_OK;
}

static ls_status end(ls_comm *c, ls_pending *p)
{
    nccl *n = c->own;
    flight *f = p->requests;
    if (f == NULL) return LS_OK;
    const int begun = f->begun;
    f->begun = 0;
    LS_TRY(n->host.ops->end(&n->host, &f->host));
    if (!begun) return LS_OK;
    LS_TRY(n->ops->follow(n->compute, f->done));
    return check_alive(c, "waiting for messages");
}

static void forget(ls_pending *p)
{
    flight *f = p->requests;
    if (f == NULL) return;
    f->owner->host.ops->forget(&f->host);
    f->owner->ops->unmark(f->done);
    free(f);
    *p = (ls_pending){0};
}

/* All ranks get the same bits, but NCCL does not promise the order of its additions: the last digits may depend on the
 * number of ranks and on which algorithm it takes. */
static ls_status sum(ls_comm *c, ls_real *x, int64_t count)
{
    nccl *n = c->own;
    const ncclDataType_t type = sizeof *x == sizeof(float) ? ncclFloat : ncclDouble;
    if (count == 0) return LS_OK;
    LS_TRY(start_stream(c, "all-reduce"));
    LS_TRY(settle(c, ncclAllReduce(x, x, (size_t)count, type, ncclSum, n->ranks, n->stream), "all-reduce"));
    LS_TRY(n->ops->mark(n->exchange, &n->ready));
    return n->ops->follow(n->compute, n->ready);
}

/* ------------------------------------------------------------------------------------------------ set-up */

/* Every rank gets the status, and the sentence, of the lowest rank that has failed. */
static ls_status agree(ls_comm *host, ls_status mine)
{
    char sentence[512] = "";
    int64_t first[1] = {mine == LS_OK ? host->size : host->rank}, status = mine;
    LS_TRY(ls_comm_min(host, first, 1));
    if (first[0] == host->size) return LS_OK;
    if (first[0] == host->rank) snprintf(sentence, sizeof sentence, "%s", ls_last_error());
    LS_TRY(ls_comm_broadcast(host, &status, sizeof status, (int)first[0]));
    LS_TRY(ls_comm_broadcast(host, sentence, sizeof sentence, (int)first[0]));
    return ls_fail((ls_status)status, "%s", sentence);
}

static ls_status read_limit(double *limit)
{
    const char *text = getenv("LONGSPAN_NCCL_TIMEOUT");
    char *end = NULL;
    *limit = 300;
    if (text == NULL) return LS_OK;
    *limit = strtod(text, &end);
    if (end == text || *end != '\0' || !(*limit > 0))
        LS_FAIL(LS_ERR_ARGUMENT, "nccl: LONGSPAN_NCCL_TIMEOUT is \"%s\": give seconds, e.g. 300", text);
    return LS_OK;
}

static ls_status open_streams(ls_comm *c, ls_queue *queue)
{
    nccl *n = c->own;
    n->compute = queue;
    LS_TRY(read_limit(&n->limit));
    LS_TRY(n->ops->open_beside(queue, &n->exchange));
    n->stream = ls_cuda_stream(n->exchange, &n->device);
    return LS_OK;
}

/* A number that two ranks share where they share a GPU: of this start of the machine (containers may have names of
 * their own) and of the GPU's place in it. */
static int64_t gpu_number(const char *bus)
{
    char name[320] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file == NULL || fgets(name, 64, file) == NULL) gethostname(name, 255);
    if (file != NULL) fclose(file);
    name[255] = '\0';
    strncat(name, bus, sizeof name - strlen(name) - 1);
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (const char *at = name; *at != '\0'; at++) hash = (hash ^ (unsigned char)*at) * 1099511628211u;
    return (int64_t)hash;
}

/* Said here, before NCCL says it less clearly. */
static ls_status refuse_shared_gpu(ls_comm *c)
{
    nccl *n = c->own;
    char bus[32] = "";
    int64_t *number = malloc((size_t)c->size * sizeof *number);
    ls_status status =
        number == NULL ? ls_fail(LS_ERR_MEMORY, "nccl: no memory for %d ranks", c->size)
                       : check_cuda(c, cudaDeviceGetPCIBusId(bus, sizeof bus, n->device), "asking for the GPU's place");
    LS_TRY_GOTO(agree(&n->host, status));
    LS_TRY_GOTO(ls_comm_gather(c, gpu_number(bus), number));
    for (int j = 1; j < c->size; j++)
        for (int i = 0; i < j; i++) {
            if (number[i] != number[j]) continue;
            LS_TRY_GOTO(ls_comm_broadcast(c, bus, sizeof bus, i));
            status = ls_fail(LS_ERR_ARGUMENT,
                             "nccl: two ranks share GPU %s, ranks %d and %d: NCCL needs one GPU per rank: use "
                             "parallel.transport: mpi, or fewer ranks on each machine",
                             bus, i, j);
            goto done;
        }
done:
    free(number);
    return status;
}

static ls_status connect_ranks(ls_comm *c)
{
    nccl *n = c->own;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    const ncclResult_t made = c->rank == 0 ? ncclGetUniqueId(&id) : ncclSuccess;
    LS_TRY(agree(&n->host, made == ncclSuccess ? LS_OK : failed(c, made, "making an address")));
    LS_TRY(ls_comm_broadcast(c, &id, sizeof id, 0));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const ncclResult_t r = ncclCommInitRankConfig(&n->ranks, c->size, id, c->rank, &config);
    return agree(&n->host, settle(c, r, "connecting the ranks"));
}

static void close_nccl(ls_comm *c)
{
    nccl *n = c->own;
    cudaSetDevice(n->device);
    n->ops->unwatch(&n->watch);
    if (n->ranks != NULL && settle(c, ncclCommFinalize(n->ranks), "closing") == LS_OK) {
        ncclCommDestroy(n->ranks);
        n->ranks = NULL;
    }
    give_up(n);
    n->ops->unmark(n->ready);
    n->ops->close(n->exchange);
    n->host.ops->close(&n->host);
    free(n);
    c->own = NULL;
}

ls_status ls_comm_nccl(MPI_Comm mpi, const ls_device_ops *ops, ls_queue *queue, ls_comm *comm)
{
    static const ls_comm_ops table = {
        .name = "nccl", .begin = begin, .end = end, .forget = forget, .sum = sum, .close = close_nccl};
    ls_comm host;
    LS_TRY(ls_comm_mpi(mpi, &host));
    nccl *n = calloc(1, sizeof *n);
    ls_status status = agree(&host, n == NULL ? ls_fail(LS_ERR_MEMORY, "nccl: no memory for a communicator") : LS_OK);
    if (status != LS_OK) {
        free(n);
        host.ops->close(&host);
        return status;
    }
    n->host = host;
    n->ops = ops;
    *comm = (ls_comm){&table, host.rank, host.size, n, &n->host};
    LS_TRY_GOTO(agree(&n->host, open_streams(comm, queue)));
    LS_TRY_GOTO(refuse_shared_gpu(comm));
    LS_TRY_GOTO(connect_ranks(comm));
    n->watch = (ls_watch){.look = look, .of = n};
    n->ops->watch(&n->watch);
    return LS_OK;
done:
    give_up(n); /* without waiting for the others, who have failed, too */
    close_nccl(comm);
    *comm = (ls_comm){0}; /* there is nothing to close any more */
    return status;
}
