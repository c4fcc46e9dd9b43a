/* The crossings and their adjoints, over any transport. Nothing here knows of attention. All are collective, all work
 * with ranks that have nothing, all combine in an order fixed by ranks and never by arrival, and all count their bytes
 * in the ledger twice: as sent, and as the closed formula of the crossing predicts. */
#ifndef LS_EXCHANGE_H
#define LS_EXCHANGE_H

#include "arena.h"
#include "comm.h"
#include "memory.h"

typedef struct ls_exchange {
    ls_comm comm;
    const ls_memory *memory; /* of the device where the tensors are; NULL: the CPU */
    ls_queue *queue;
    ls_traffic traffic;
    ls_arena wire;            /* message buffers; only grows */
    ls_pending pending, sums; /* sums: of the ring's gradients, which travel beside its blocks */
    ls_message *list;         /* of one group of messages */
    int listed, list_capacity;
    void (*meanwhile)(void *of); /* local work for the next time that messages travel; NULL: none */
    void *meanwhile_of;
} ls_exchange;

void ls_exchange_close(ls_exchange *x);

static inline const ls_memory *ls_memory_of(const ls_exchange *x)
{
    return x->memory != NULL ? x->memory : &ls_cpu_memory;
}

/* Messages under construction: add any number, then begin, work, end. Every byte that leaves goes through here. */
ls_status ls_exchange_add(ls_exchange *x, void *data, size_t bytes, int peer, int receive);
/* The same for what is in host memory: counts and lists. */
ls_status ls_exchange_add_host(ls_exchange *x, void *data, size_t bytes, int peer, int receive);
ls_status ls_exchange_begin(ls_exchange *x, ls_crossing kind, ls_pending *pending);
ls_status ls_exchange_end(ls_exchange *x, ls_pending *pending);
/* What a message takes of the wire: numbers of the next one begin where a GPU reads 16 bytes at once. */
static inline size_t ls_wire_bytes(size_t bytes)
{
    return (bytes + 15) / 16 * 16;
}
/* The wire is reserved before a call is agreed on, so that no rank lacks memory while others wait for its messages:
 * ls_exchange_plan_begin, plan (of one group after the other; between other times it does nothing), then _reserve. */
void ls_exchange_plan_begin(ls_exchange *x);
void ls_exchange_plan(ls_exchange *x, size_t out, size_t in);
ls_status ls_exchange_reserve(ls_exchange *x);
/* Does what was left to be done meanwhile, unless it was done already: end does so first of all. */
void ls_exchange_work(ls_exchange *x);

/* total = mine_0 ⊕ .. ⊕ mine_{P-1}, the same bits on every rank: recursive doubling, ceil(log2 P) rounds (two more
 * where P is no power of two). mine and total may not overlap. A dry rank takes the others' for like its own. */
ls_status ls_reduce(ls_exchange *x, ls_monoid m, const ls_real *mine, ls_real *total);
/* dmine from dtotal (each rank's own; total on ranks is used by their own outputs). dmine may be dtotal. */
ls_status ls_reduce_adjoint(ls_exchange *x, ls_monoid m, const ls_real *mine, const ls_real *total,
                            const ls_real *dtotal, ls_real *dmine);
/* before = mine_0 ⊕ .. ⊕ mine_{r-1} (reverse: mine_{r+1} ⊕ .. ⊕ mine_{P-1}), ceil(log2 P) rounds (Hillis & Steele). */
ls_status ls_scan(ls_exchange *x, ls_monoid m, int reverse, const ls_real *mine, ls_real *before);
ls_status ls_scan_adjoint(ls_exchange *x, ls_monoid m, int reverse, const ls_real *mine, const ls_real *before,
                          const ls_real *dbefore, ls_real *dmine);

/* all = every rank's piece in rank order; count (P): reals of each. Adjoint: dmine = Σ_r dall_r's piece of mine. */
ls_status ls_gather(ls_exchange *x, const int64_t *count, const ls_real *mine, ls_real *all);
ls_status ls_gather_adjoint(ls_exchange *x, const int64_t *count, const ls_real *dall, ls_real *dmine);

/* Fetch: this rank's `to` rows become the global positions of its spans, one span after the other; want (2 per rank)
 * says what every rank wants, [lo, lo + n), n = 0: nothing. `from` holds this rank's shard. n tensors in one go; those
 * of bytes come after those of numbers. */
ls_status ls_fetch(ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from, const ls_rows *to,
                   int tensors);
/* What it takes of the wire, and its adjoint takes as much: a row of all tensors has row_bytes. */
void ls_fetch_plan(ls_exchange *x, const ls_shard *shard, const ls_span *want, size_t row_bytes);
/* Adjoint: the rows of `to` are added to those of `from` at their owners, in rank order. Tensors of ls_real only. */
ls_status ls_fetch_adjoint(ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from,
                           const ls_rows *to, int tensors);

/* Requests: a fetch where only the rank that wants positions knows which. Every group (one head of one batch row) has a
 * list of its own. Reusable: memory only grows. */
typedef struct ls_interval {
    int64_t group, lo, n;
} ls_interval;
typedef struct ls_requests {
    int64_t groups, heads;    /* groups = batch * heads, the heads of a batch row side by side */
    int64_t *list_at;         /* (groups + 1): list_at[g+1] is where list[] of group g ends; its writer fills it */
    ls_span *list;            /* the intervals of each group: in order, not overlapping, within the sequence; no rows */
    int64_t rows, *first;     /* (groups + 1): group g gets rows [first[g], first[g+1]) of `rows` */
    ls_interval *want, *give; /* cut at the bounds, by owner; what others want of this rank, by wanter */
    int64_t *row;             /* the first row of each of want[] */
    int64_t *want_at, *give_at; /* (P+1): each rank's begin */
    int64_t *wanted, *given;    /* (P,2): how many intervals and rows */
    ls_arena asked, accepted;   /* memory of the above */
    ls_arena brought;           /* the caller's, for the rows: it lives as long */
    void *host;                 /* likewise, see ls_cuda_mechanism.host_bytes */
    size_t host_bytes;
} ls_requests;
/* Local: memory for lists of so many intervals in all, then, once they are filled in, what they mean on this shard. */
ls_status ls_requests_begin(ls_requests *r, int size, int64_t groups, int64_t heads, int64_t intervals);
void ls_requests_cut(const ls_shard *shard, ls_requests *r);
/* Collective: the lists go to the owners. A row takes row_bytes in all its tensors. mine: this rank's status so far;
 * all ranks get the same back. */
ls_status ls_requests_exchange(ls_context *ctx, ls_requests *r, size_t row_bytes, ls_status mine);
/* Collective: from (nb,nh,n) is this rank's shard, to (rows) the rows of its groups, one after the other. */
ls_status ls_request(ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                     const ls_rows *to, int tensors);
/* Adjoint: to is added to from at the owners, in rank order. */
ls_status ls_request_adjoint(ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                             const ls_rows *to, int tensors);
void ls_requests_free(ls_requests *r);
size_t ls_requests_bytes(const ls_requests *r); /* that they hold, here and on the device */

/* What the formulas say one rank sends. */
uint64_t ls_predict_reduce(int rank, int size, uint64_t bytes);
uint64_t ls_predict_scan(int rank, int size, int reverse, uint64_t bytes);

#endif
