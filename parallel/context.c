#include "context.h"
#include "gemm.h"
#include "packed.h"

#include <stdlib.h>

uint64_t ls_sign(uint64_t signature, const void *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        signature = (signature ^ ((const unsigned char *)bytes)[i]) * UINT64_C(1099511628211);
    return signature;
}

/* The slow path: all are well, but not all the same. */
static ls_status name_who_differs(ls_comm *comm, const char *what, const char *alike, int64_t signature)
{
    int64_t *all = malloc((size_t)comm->size * sizeof *all);
    int64_t short_of_memory = all == NULL ? -1 : 0;
    ls_status status = ls_comm_min(comm, &short_of_memory, 1);
    if (status == LS_OK && short_of_memory < 0) status = ls_fail(LS_ERR_MEMORY, "%s: no memory to compare ranks", what);
    if (status == LS_OK) status = ls_comm_gather(comm, signature, all);
    if (status == LS_OK) {
        int odd = 0;
        while (odd + 1 < comm->size && all[odd] == all[0]) odd++;
        status = ls_fail(LS_ERR_ARGUMENT,
                         "%s: rank %d differs from rank 0: %s must be the same on every rank, and the calls in the "
                         "same order",
                         what, odd, alike);
    }
    free(all);
    return ls_share_failure(status);
}

/* One all-reduce of three numbers does both: the lowest failing rank, whose code and sentence follow only then, and the
 * least and the greatest signature. */
static ls_status agree_over(ls_comm *comm, ls_status mine, const char *what, const char *alike, uint64_t signature)
{
    mine = ls_explained(mine);
    if (comm->size == 1) return mine;
    /* calls of another kind differ too; not negative, so that its negative exists */
    const int64_t sign = (int64_t)(ls_sign(signature, alike, strlen(alike)) >> 1);
    int64_t least[3] = {mine == LS_OK ? comm->size : comm->rank, sign, -sign};
    LS_TRY(ls_comm_min(comm, least, 3));
    const int first = (int)least[0];
    if (first == comm->size) return least[1] == -least[2] ? LS_OK : name_who_differs(comm, what, alike, sign);
    struct {
        int32_t code, shared; /* shared: the sentence tells already whose it is */
        char text[1000];
    } message = {(int32_t)mine, ls_is_shared(mine), ""};
    if (comm->rank == first) strncpy(message.text, ls_last_error(), sizeof message.text - 1);
    LS_TRY(ls_comm_broadcast(comm, &message, (int)sizeof message, first));
    const ls_status status = (ls_status)message.code;
    return ls_share_failure(message.shared ? ls_fail(status, "%s", message.text)
                                           : ls_fail(status, "rank %d: %s", first, message.text));
}

ls_status ls_agree_alike(ls_context *ctx, ls_status mine, const char *what, const char *alike, uint64_t signature)
{
    return agree_over(&ctx->exchange.comm, mine, what, alike, signature);
}

/* What does not depend on the other ranks: the device and memory for the driver. */
static ls_status prepare(const ls_context_options *o, ls_context *c, ls_queue *queue)
{
    const int size = c->exchange.comm.size;
    c->seed = o->seed;
    c->device = o->device;
    c->precision = o->precision;
    c->ops = ls_device_find(o->device);
    c->dense = ls_dense_of(o->device);
    c->queue = queue;
    c->exchange.memory = o->device == LS_CUDA ? LS_IF_CUDA(&ls_cuda_memory) : &ls_cpu_memory;
    c->exchange.queue = queue;
    c->work.device = c->unsaved.device = c->exchange.wire.device = c->ops;
    c->spans = calloc(4 * (size_t)size, sizeof *c->spans);
    c->pieces = calloc(LS_MAX_PHASES * (size_t)size, sizeof *c->pieces);
    if (c->spans == NULL || c->pieces == NULL) LS_FAIL(LS_ERR_MEMORY, "context: no memory");
    return LS_OK;
}

static ls_status open_queue(const ls_context_options *o, ls_context *c)
{
    int devices = 0, number = o->device_number;
    c->ops = ls_device_find(o->device);
    if (o->device != LS_CUDA) return LS_OK;
    LS_TRY(c->ops->count(&devices));
    if (devices == 0)
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: device cuda: no GPU is visible on this machine: use the CPU device");
    if (number < 0 || number >= devices)
        LS_FAIL(LS_ERR_ARGUMENT, "context: there is no device %d among %d", number, devices);
    return c->ops->open(number, o->precision, &c->queue);
}

static ls_status open_rest(const ls_context_options *o, ls_context *c)
{
    c->alone = calloc(1, sizeof *c->alone);
    if (c->alone == NULL) LS_FAIL(LS_ERR_MEMORY, "context: no memory");
    ls_comm_self(&c->alone->exchange.comm); /* at once: what there is of a context can be freed */
    c->documents = calloc(1, sizeof *c->documents);
    if (c->documents == NULL) LS_FAIL(LS_ERR_MEMORY, "context: no memory");
    LS_TRY(open_queue(o, c));
    LS_TRY(prepare(o, c, c->queue));
    return prepare(o, c->alone, c->queue);
}

/* Local: what no communicator is needed to refuse, and what the other ranks may find otherwise. */
static ls_status check_options(const ls_context_options *o)
{
    if (ls_device_find(o->device) == NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: this build has no CUDA backend: use the CPU device, or build with CUDA");
    if ((unsigned)o->precision > LS_BF16)
        LS_FAIL(LS_ERR_ARGUMENT, "context: there is no precision %d", (int)o->precision);
    if (o->precision != LS_FLOAT32 && sizeof(ls_real) != sizeof(float))
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: precision %s: this build computes in double: use float32, its default",
                ls_precision_name(o->precision));
    if (o->precision != LS_FLOAT32 && o->device != LS_CUDA)
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: precision %s is for GPUs: use the CUDA device, or float32",
                ls_precision_name(o->precision));
    if (o->dry_size < 0 || (o->dry_size > 0 && (unsigned)o->dry_rank >= (unsigned)o->dry_size))
        LS_FAIL(LS_ERR_ARGUMENT, "context: there is no rank %d of %d", o->dry_rank, o->dry_size);
    if ((unsigned)o->transport > LS_TRANSPORT_NCCL)
        LS_FAIL(LS_ERR_ARGUMENT, "context: there is no transport %d", (int)o->transport);
    if (o->transport == LS_TRANSPORT_NCCL && !ls_has_nccl())
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: this build has no NCCL transport: use MPI");
    if (o->transport == LS_TRANSPORT_NCCL && o->device != LS_CUDA)
        LS_FAIL(LS_ERR_ARGUMENT, "context: NCCL carries tensors of GPUs: use the CUDA device, or MPI");
    if (o->dry_size > 0 && o->device != LS_CPU)
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: a rank without the others is planned on the CPU device");
    return LS_OK;
}

/* Collective. Between GPUs: NCCL where it was asked for, or where it is there and works; else MPI by host memory. */
static ls_status open_transport(const ls_context_options *o, ls_context *c)
{
    ls_comm nccl = {0};
    ls_status status = ls_has_nccl() ? LS_OK : LS_ERR_UNSUPPORTED;
    if (ls_has_nccl() && o->transport != LS_TRANSPORT_MPI)
        status = ls_agree(c, LS_IF_NCCL(ls_comm_nccl)(o->comm, c->ops, c->queue, &nccl));
    if (o->transport == LS_TRANSPORT_NCCL) LS_TRY(status);
    if (o->transport != LS_TRANSPORT_MPI && status == LS_OK) {
        c->exchange.comm.ops->close(&c->exchange.comm);
        c->exchange.comm = nccl;
        return LS_OK;
    }
    if (nccl.ops != NULL) nccl.ops->close(&nccl);
    return ls_agree(c, ls_comm_staged(c->ops, c->queue, &c->exchange.comm));
}

/* What must be the same on every rank. */
static uint64_t signature_of(const ls_context_options *o)
{
    const uint64_t device = ls_sign(LS_SIGNATURE, &o->device, sizeof o->device);
    const uint64_t transport = ls_sign(device, &o->transport, sizeof o->transport);
    return ls_sign(ls_sign(transport, &o->precision, sizeof o->precision), &o->seed, sizeof o->seed);
}

/* Collective. The communicator comes first, since a rank that has no memory for a context has to tell the others. */
static ls_status open_comm(const ls_context_options *o, int alone, ls_comm *comm)
{
    if (!alone) return ls_comm_mpi(o->comm, comm);
    if (o->dry_size > 0)
        ls_comm_dry(o->dry_rank, o->dry_size, comm);
    else
        ls_comm_self(comm);
    return LS_OK;
}

/* Local. *c has the communicator if it is there at all. */
static ls_status open_local(const ls_context_options *o, ls_status possible, const ls_comm *comm, ls_context **c)
{
    *c = calloc(1, sizeof **c);
    if (*c == NULL) return possible != LS_OK ? possible : ls_fail(LS_ERR_MEMORY, "context: no memory");
    (*c)->exchange.comm = *comm;
    return possible != LS_OK ? possible : open_rest(o, *c);
}

ls_status ls_context_create(const ls_context_options *options, ls_context **ctx)
{
    if (ctx != NULL) *ctx = NULL;
    LS_NEED(options, "context: options is NULL");
    const int alone = options->dry_size != 0 || options->comm == MPI_COMM_NULL || options->comm == (MPI_Comm)0;
    const ls_status possible = ctx != NULL ? check_options(options) : ls_fail(LS_ERR_ARGUMENT, "context: ctx is NULL");
    if (alone && possible != LS_OK) return possible;
    ls_comm comm;
    LS_TRY(open_comm(options, alone, &comm));
    ls_context *c;
    ls_status status = agree_over(&comm, open_local(options, possible, &comm, &c), "context",
                                  "device, transport, precision and seed", signature_of(options));
    if (status == LS_OK && c->queue != NULL && comm.size > 1) status = open_transport(options, c);
    if (status != LS_OK && c == NULL) comm.ops->close(&comm);
    if (status != LS_OK) {
        ls_context_free(c);
        return status;
    }
    ls_gemm_single_thread();
    *ctx = c;
    return LS_OK;
}

static void free_one(ls_context *ctx)
{
    if (ctx == NULL) return;
    if (ctx->documents != NULL) ls_documents_free(ctx->documents);
    free(ctx->documents);
    ls_exchange_close(&ctx->exchange);
    ls_arena_free(&ctx->work);
    ls_arena_free(&ctx->unsaved);
    ls_requests_free(&ctx->requests);
    free(ctx->spans);
    free(ctx->pieces);
    free(ctx);
}

void ls_context_free(ls_context *ctx)
{
    if (ctx == NULL) return;
    ls_queue *queue = ctx->queue;
    const ls_device_ops *ops = ctx->ops;
    free_one(ctx->alone);
    free_one(ctx);
    if (queue != NULL) ops->close(queue);
}

ls_status ls_context_wait(ls_context *ctx)
{
    LS_NEED(ctx, "wait: the context is NULL");
    return ctx->ops->wait(ctx->queue);
}

ls_status ls_device_alloc(ls_context *ctx, size_t bytes, void **p)
{
    LS_NEED(ctx, "device: the context is NULL");
    LS_NEED(p, "device: p is NULL");
    return ls_reserve(ctx->ops, ctx->ops->name, bytes > 0 ? bytes : 1, p);
}

void ls_device_free(ls_context *ctx, void *p)
{
    if (p != NULL) ctx->ops->release(p);
}

static ls_status check_copy(const ls_context *ctx, const void *to, const void *from, size_t bytes)
{
    LS_NEED(ctx, "device: the context is NULL");
    if (bytes > 0 && (to == NULL || from == NULL)) LS_FAIL(LS_ERR_ARGUMENT, "device: a copy to or from NULL");
    return LS_OK;
}

ls_status ls_device_write(ls_context *ctx, void *to, const void *from, size_t bytes)
{
    LS_TRY(check_copy(ctx, to, from, bytes));
    return ctx->ops->to_device(ctx->queue, to, from, bytes);
}

ls_status ls_device_read(ls_context *ctx, void *to, const void *from, size_t bytes)
{
    LS_TRY(check_copy(ctx, to, from, bytes));
    return ctx->ops->to_host(ctx->queue, to, from, bytes);
}

int ls_context_rank(const ls_context *ctx)
{
    return ctx->exchange.comm.rank;
}

static size_t bytes_of(const ls_context *c)
{
    return c->work.capacity + c->unsaved.capacity + c->exchange.wire.capacity + ls_requests_bytes(&c->requests);
}

size_t ls_context_bytes(const ls_context *ctx)
{
    return bytes_of(ctx) + bytes_of(ctx->alone) + ls_documents_bytes(ctx->documents);
}

int ls_context_size(const ls_context *ctx)
{
    return ctx->exchange.comm.size;
}

ls_status ls_agree(ls_context *ctx, ls_status mine)
{
    LS_NEED(ctx, "agree: the context is NULL");
    return ls_agree_alike(ctx, mine, "agree", "the status", 0);
}

ls_status ls_alone(ls_context *ctx, ls_status mine)
{
    const ls_comm *comm = &ctx->exchange.comm;
    char text[800] = "";
    if (ls_is_shared(mine) || comm->size == 1 || (mine != LS_ERR_MEMORY && mine != LS_ERR_INTERNAL)) return mine;
    strncpy(text, ls_last_error(), sizeof text - 1);
    return ls_fail(LS_ERR_COMM, "rank %d of %d: %s: the others are left waiting, end the job", comm->rank, comm->size,
                   text);
}

ls_status ls_all_reduce_sum(ls_context *ctx, ls_real *x, int64_t n)
{
    LS_NEED(ctx, "all-reduce: the context is NULL");
    ls_status status = LS_OK;
    if (n < 0) status = ls_fail(LS_ERR_ARGUMENT, "all-reduce: n %lld is negative", (long long)n);
    if (n > 0 && x == NULL) status = ls_fail(LS_ERR_ARGUMENT, "all-reduce: x is NULL");
    LS_TRY(ls_agree_alike(ctx, status, "all-reduce", "n", ls_sign(LS_SIGNATURE, &n, sizeof n)));
    return ls_alone(ctx, ctx->exchange.comm.ops->sum(&ctx->exchange.comm, x, n));
}

void ls_context_traffic(const ls_context *ctx, ls_traffic *traffic)
{
    *traffic = ctx->exchange.traffic;
}

const char *ls_crossing_name(ls_crossing crossing)
{
    static const char *const names[] = {"none", "fetch", "gather", "reduce", "scan", "reverse scan", "ring"};
    return (unsigned)crossing < LS_CROSSINGS ? names[crossing] : "unknown";
}

const char *ls_precision_name(ls_precision precision)
{
    static const char *const names[] = {"float32", "tf32", "bf16"};
    return (unsigned)precision <= LS_BF16 ? names[precision] : "unknown";
}

ls_status ls_shard_even(const ls_context *ctx, int64_t length, ls_shard *shard)
{
    LS_NEED(ctx, "shard: the context is NULL");
    return ls_shard_even_of(length, ls_context_rank(ctx), ls_context_size(ctx), shard);
}

/* Where the pieces of all ranks begin; they must not be too many together either. */
static ls_status add_up(int size, int64_t *bounds)
{
    bounds[0] = 0;
    for (int p = 0; p < size; p++) {
        bounds[p + 1] += bounds[p];
        const ls_status status = ls_check_length(bounds[p + 1]);
        if (status != LS_OK) return ls_share_failure(status); /* as all ranks find */
    }
    return LS_OK;
}

ls_status ls_shard_local(ls_context *ctx, int64_t n, ls_shard *shard)
{
    LS_NEED(ctx, "shard: the context is NULL");
    const int rank = ls_context_rank(ctx), size = ls_context_size(ctx);
    int64_t *bounds = malloc(((size_t)size + 1) * sizeof *bounds);
    ls_status status = ls_check_length(n);
    if (bounds == NULL) status = ls_fail(LS_ERR_MEMORY, "shard: no memory for the bounds of %d ranks", size);
    if (shard == NULL) status = ls_fail(LS_ERR_ARGUMENT, "shard: shard is NULL");
    if (shard != NULL) *shard = (ls_shard){0};
    status = ls_agree_alike(ctx, status, "shard", "the call", 0);
    if (status == LS_OK) status = ls_comm_gather(&ctx->exchange.comm, n, bounds + 1);
    if (status == LS_OK) status = add_up(size, bounds);
    if (status != LS_OK) {
        free(bounds);
        return status;
    }
    *shard =
        (ls_shard){.length = bounds[size], .lo = bounds[rank], .n = n, .rank = rank, .size = size, .bounds = bounds};
    return LS_OK;
}
