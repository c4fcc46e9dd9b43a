#include "context.h"
#include "gemm.h"
#include "packed.h"

#include <stdlib.h>

ls_status ls_context_create(const ls_context_options *options, ls_context **ctx)
{
    *ctx = NULL;
    if (options->device != LS_CPU)
        LS_FAIL(LS_ERR_UNSUPPORTED, "context: this build has no CUDA backend: use the CPU device");
    if (options->dry_size < 0 || (options->dry_size > 0 && (unsigned)options->dry_rank >= (unsigned)options->dry_size))
        LS_FAIL(LS_ERR_ARGUMENT, "context: there is no rank %d of %d", options->dry_rank, options->dry_size);
    ls_context *c = calloc(1, sizeof *c);
    const int alone = options->comm == MPI_COMM_NULL || options->comm == (MPI_Comm)0;
    if (c == NULL) LS_FAIL(LS_ERR_MEMORY, "context: no memory");
    c->seed = options->seed;
    ls_status status = LS_OK;
    if (options->dry_size > 0)
        ls_comm_dry(options->dry_rank, options->dry_size, &c->exchange.comm);
    else if (alone)
        ls_comm_self(&c->exchange.comm);
    else
        status = ls_comm_mpi(options->comm, &c->exchange.comm);
    if (status != LS_OK) {
        free(c);
        return status;
    }
    c->alone = calloc(1, sizeof *c->alone);
    if (c->alone != NULL) {
        c->alone->seed = options->seed;
        ls_comm_self(&c->alone->exchange.comm);
    }
    c->documents = calloc(1, sizeof *c->documents);
    status =
        ls_agree(c, c->alone == NULL || c->documents == NULL ? ls_fail(LS_ERR_MEMORY, "context: no memory") : LS_OK);
    if (status != LS_OK) {
        ls_context_free(c);
        return status;
    }
    ls_gemm_single_thread();
    *ctx = c;
    return LS_OK;
}

void ls_context_free(ls_context *ctx)
{
    if (ctx == NULL) return;
    ls_context_free(ctx->alone);
    if (ctx->documents != NULL) ls_documents_free(ctx->documents);
    free(ctx->documents);
    ls_exchange_close(&ctx->exchange);
    ls_arena_free(&ctx->work);
    ls_arena_free(&ctx->unsaved);
    ls_requests_free(&ctx->requests);
    free(ctx);
}

int ls_context_rank(const ls_context *ctx)
{
    return ctx->exchange.comm.rank;
}

size_t ls_context_bytes(const ls_context *ctx)
{
    return ctx->work.capacity + ctx->unsaved.capacity + ctx->exchange.wire.capacity;
}

int ls_context_size(const ls_context *ctx)
{
    return ctx->exchange.comm.size;
}

uint64_t ls_sign(uint64_t signature, const void *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        signature = (signature ^ ((const unsigned char *)bytes)[i]) * UINT64_C(1099511628211);
    return signature;
}

/* The slow path: all are well, but not all the same. */
static ls_status name_who_differs(ls_comm *comm, const char *what, int64_t signature)
{
    int64_t *all = malloc((size_t)comm->size * sizeof *all);
    int64_t short_of_memory = all == NULL ? -1 : 0;
    ls_status status = comm->ops->min(comm, &short_of_memory, 1);
    if (status == LS_OK && short_of_memory < 0) status = ls_fail(LS_ERR_MEMORY, "%s: no memory to compare ranks", what);
    if (status == LS_OK) status = comm->ops->gather(comm, signature, all);
    if (status == LS_OK) {
        int odd = 0;
        while (odd + 1 < comm->size && all[odd] == all[0]) odd++;
        status =
            ls_fail(LS_ERR_ARGUMENT,
                    "%s: rank %d has another batch, other shards, options or optional inputs than rank 0: they must "
                    "be the same on every rank",
                    what, odd);
    }
    free(all);
    return status;
}

/* One all-reduce of three numbers does both: the lowest failing rank, whose code and sentence follow only then, and the
 * least and the greatest signature. */
ls_status ls_agree_alike(ls_context *ctx, ls_status mine, const char *what, uint64_t signature)
{
    ls_comm *comm = &ctx->exchange.comm;
    if (comm->size == 1) return mine;
    const int64_t sign = (int64_t)(signature >> 1); /* not negative, so that its negative exists */
    int64_t least[3] = {mine == LS_OK ? comm->size : comm->rank, sign, -sign};
    LS_TRY(comm->ops->min(comm, least, 3));
    const int first = (int)least[0];
    if (first == comm->size) return least[1] == -least[2] ? LS_OK : name_who_differs(comm, what, sign);
    struct {
        int64_t code;
        char text[1000];
    } message = {mine, ""};
    if (comm->rank == first) strncpy(message.text, ls_last_error(), sizeof message.text - 1);
    LS_TRY(comm->ops->broadcast(comm, &message, (int)sizeof message, first));
    return ls_fail((ls_status)message.code, "rank %d: %s", first, message.text);
}

ls_status ls_agree(ls_context *ctx, ls_status mine)
{
    return ls_agree_alike(ctx, mine, "", 0);
}

ls_status ls_all_reduce_sum(ls_context *ctx, ls_real *x, int64_t n)
{
    return ctx->exchange.comm.ops->sum(&ctx->exchange.comm, x, n);
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

ls_status ls_shard_even(const ls_context *ctx, int64_t length, ls_shard *shard)
{
    return ls_shard_even_of(length, ls_context_rank(ctx), ls_context_size(ctx), shard);
}

ls_status ls_shard_local(ls_context *ctx, int64_t n, ls_shard *shard)
{
    const int size = ls_context_size(ctx);
    *shard = (ls_shard){0};
    int64_t *bounds = malloc(((size_t)size + 1) * sizeof *bounds);
    ls_status status = LS_OK;
    if (n < 0) status = ls_fail(LS_ERR_ARGUMENT, "shard: %lld positions is negative", (long long)n);
    if (bounds == NULL) status = ls_fail(LS_ERR_MEMORY, "shard: no memory for the bounds of %d ranks", size);
    status = ls_agree(ctx, status);
    if (status == LS_OK) status = ctx->exchange.comm.ops->gather(&ctx->exchange.comm, n, bounds + 1);
    if (status != LS_OK) {
        free(bounds);
        return status;
    }
    bounds[0] = 0;
    for (int p = 0; p < size; p++) bounds[p + 1] += bounds[p];
    const int rank = ls_context_rank(ctx);
    *shard =
        (ls_shard){.length = bounds[size], .lo = bounds[rank], .n = n, .rank = rank, .size = size, .bounds = bounds};
    return LS_OK;
}
