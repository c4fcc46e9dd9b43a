/* What a context holds: this rank's place, its exchange, and the scratch memory that all its attentions share. */
#ifndef LS_CONTEXT_H
#define LS_CONTEXT_H

#include "dense.h"
#include "exchange.h"
#include "shard.h"

struct ls_context {
    ls_exchange exchange;
    ls_arena work;        /* of the call that is running; contents do not outlive it */
    ls_arena unsaved;     /* stands in for `saved` where no backward will follow */
    ls_requests requests; /* likewise, and the documents of packed sequences */
    struct ls_documents *documents;
    ls_context *alone; /* this rank by itself, for what crosses nothing */
    uint64_t seed;
    ls_device device;
    ls_precision precision;
    const ls_device_ops *ops;
    const ls_dense_ops *dense;
    ls_queue *queue; /* NULL on the CPU; alone has the same */
    ls_span *spans;  /* (4 P): of the placement and of the fetch of the call that is running */
    int64_t *pieces; /* (LS_MAX_PHASES, P): of its gathers */
};

/* Bytes of a number as products take it in the context's precision, and room for n of them. */
static inline int64_t ls_operand_size(const ls_context *ctx)
{
    return ctx->precision == LS_BF16 ? 2 : (int64_t)sizeof(ls_real);
}
static inline ls_operand ls_take_operand(const ls_context *ctx, ls_arena *arena, int64_t n)
{
    return (ls_operand){ls_arena_take(arena, (size_t)(n * ls_operand_size(ctx))), ls_operand_size(ctx)};
}

/* Collective: ls_agree, and LS_ERR_ARGUMENT where all are well but their signatures (of whatever must be the same on
 * every rank) are not; `what` begins the message, which names the first rank that differs from rank 0, and `alike` says
 * of what the signature is: two kinds of calls never match. */
ls_status ls_agree_alike(ls_context *ctx, ls_status mine, const char *what, const char *alike, uint64_t signature);

/* Not collective: the end of a call in which messages travel. Memory that could not be had, or a kernel that did not
 * run, on this rank alone leaves the others waiting for it, so it becomes LS_ERR_COMM, after which a job has to be
 * ended. What ls_agree returned to all stays as it is. */
ls_status ls_alone(ls_context *ctx, ls_status mine);

/* A signature in the making: FNV-1a over any bytes. Begin with LS_SIGNATURE. */
#define LS_SIGNATURE UINT64_C(14695981039346656037)
uint64_t ls_sign(uint64_t signature, const void *bytes, size_t n);

#endif
