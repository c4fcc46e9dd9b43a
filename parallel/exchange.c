/* Reduce, scan and gather from groups of messages. */
#include "exchange.h"

#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------ messages */

static ls_status add(ls_exchange *x, void *data, size_t bytes, int peer, int receive, int host)
{
    if (bytes == 0) return LS_OK;
    if (x->listed == x->list_capacity) {
        const int capacity = x->list_capacity ? 2 * x->list_capacity : 16;
        ls_message *grown = realloc(x->list, (size_t)capacity * sizeof *grown);
        if (grown == NULL) {
            x->listed = 0; /* what was listed is not sent with the next group */
            LS_FAIL(LS_ERR_MEMORY, "exchange: no memory for %d messages", capacity);
        }
        x->list = grown;
        x->list_capacity = capacity;
    }
    x->list[x->listed++] = (ls_message){data, bytes, peer, receive, host};
    return LS_OK;
}

ls_status ls_exchange_add(ls_exchange *x, void *data, size_t bytes, int peer, int receive)
{
    return add(x, data, bytes, peer, receive, 0);
}

ls_status ls_exchange_add_host(ls_exchange *x, void *data, size_t bytes, int peer, int receive)
{
    return add(x, data, bytes, peer, receive, 1);
}

ls_status ls_exchange_begin(ls_exchange *x, ls_crossing kind, ls_pending *pending)
{
    const int n = x->listed;
    x->listed = 0;
    for (int i = 0; i < n; i++)
        if (!x->list[i].receive) {
            x->traffic.sent[kind] += x->list[i].bytes;
            x->traffic.messages[kind]++;
        }
    return x->comm.ops->begin(&x->comm, x->list, n, pending);
}

ls_status ls_exchange_end(ls_exchange *x, ls_pending *pending)
{
    ls_exchange_work(x);
    return x->comm.ops->end(&x->comm, pending);
}

void ls_exchange_work(ls_exchange *x)
{
    void (*work)(void *) = x->meanwhile;
    x->meanwhile = NULL;
    if (work != NULL) work(x->meanwhile_of);
}

void ls_exchange_plan_begin(ls_exchange *x)
{
    ls_arena_measure(&x->wire);
}

void ls_exchange_plan(ls_exchange *x, size_t out, size_t in)
{
    if (!x->wire.measuring) return;
    ls_arena_take(&x->wire, out), ls_arena_take(&x->wire, in);
    ls_arena_release(&x->wire, 0);
}

ls_status ls_exchange_reserve(ls_exchange *x)
{
    return ls_arena_reserve(&x->wire, "exchange: message buffers");
}

void ls_exchange_close(ls_exchange *x)
{
    x->comm.ops->forget(&x->pending);
    x->comm.ops->forget(&x->sums);
    x->comm.ops->close(&x->comm);
    free(x->list);
    ls_arena_free(&x->wire);
}

/* One round: send to one rank (-1: nobody), receive from another. */
static ls_status round_trip(ls_exchange *x, ls_crossing kind, const ls_real *out, int to, ls_real *in, int from,
                            int64_t n)
{
    const size_t bytes = (size_t)n * sizeof *in;
    if (from >= 0) LS_TRY(ls_exchange_add(x, in, bytes, from, 1));
    if (to >= 0) LS_TRY(ls_exchange_add(x, (void *)(uintptr_t)out, bytes, to, 0));
    LS_TRY(ls_exchange_begin(x, kind, &x->pending));
    return ls_exchange_end(x, &x->pending);
}

/* b NULL: one is enough. */
static ls_status wire_take(ls_exchange *x, int64_t n, ls_real **a, ls_real **b)
{
    ls_arena_measure(&x->wire);
    ls_take(&x->wire, n), ls_take(&x->wire, b != NULL ? n : 0);
    LS_TRY(ls_arena_reserve(&x->wire, "exchange: message buffers"));
    *a = ls_take(&x->wire, n);
    if (b != NULL) *b = ls_take(&x->wire, n);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ reduce */

/* The largest power of two <= size. */
static int power_below(int size)
{
    int p = 1;
    while (p <= size / 2) p *= 2;
    return p;
}

/* P = p2 + extra. The first 2·extra ranks form pairs: the odd one gives its summary to the even one before, and gets
 * the total after, the doubling over p2 ranks. Each step joins neighbouring runs of ranks, the lower on the left. */
static ls_status reduce(ls_exchange *x, ls_monoid m, const ls_real *mine, ls_real *total)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const int64_t n = ls_monoid_size(m);
    const ls_memory *memory = ls_memory_of(x);
    memory->copy(x->queue, total, mine, (size_t)n * sizeof *total);
    if (size == 1 || n == 0) return LS_OK;
    x->traffic.predicted[LS_REDUCE] += ls_predict_reduce(rank, size, (uint64_t)n * sizeof *mine);
    ls_real *in;
    LS_TRY(wire_take(x, n, &in, NULL));
    const int p2 = power_below(size), extra = size - p2;
    const int paired = rank < 2 * extra, odd = paired && rank % 2 == 1;
    if (odd) {
        LS_TRY(round_trip(x, LS_REDUCE, total, rank - 1, NULL, -1, n));
        return round_trip(x, LS_REDUCE, NULL, -1, total, rank - 1, n);
    }
    if (paired) {
        LS_TRY(round_trip(x, LS_REDUCE, NULL, -1, in, rank + 1, n));
        memory->combine(x->queue, m, total, in, total);
    }
    const int place = paired ? rank / 2 : rank - extra; /* among the p2 that double */
    for (int bit = 1; bit < p2; bit *= 2) {
        const int other = place ^ bit, peer = other < extra ? 2 * other : other + extra;
        LS_TRY(round_trip(x, LS_REDUCE, total, peer, in, peer, n));
        if (other < place)
            memory->combine(x->queue, m, in, total, total);
        else
            memory->combine(x->queue, m, total, in, total);
    }
    return paired ? round_trip(x, LS_REDUCE, total, rank + 1, NULL, -1, n) : LS_OK;
}

uint64_t ls_predict_reduce(int rank, int size, uint64_t bytes)
{
    const int p2 = power_below(size), extra = size - p2;
    if (size == 1) return 0;
    if (rank < 2 * extra && rank % 2 == 1) return bytes;
    uint64_t rounds = rank < 2 * extra ? 1 : 0;
    for (int p = p2; p > 1; p /= 2) rounds++;
    return rounds * bytes;
}

/* The total of ranks that all have what this one has: (m, s) + .. + (m, s) = (m, P s). */
static void sum_of_alike(ls_monoid m, int size, const ls_real *mine, ls_real *total)
{
    const int64_t stride = ls_monoid_stride(m);
    for (int64_t g = 0; g < m.groups; g++)
        for (int64_t i = 0; i < stride; i++)
            total[g * stride + i] = (i < m.has_max ? 1 : (ls_real)size) * mine[g * stride + i];
}

ls_status ls_reduce(ls_exchange *x, ls_monoid m, const ls_real *mine, ls_real *total)
{
    LS_TRY(reduce(x, m, mine, total));
    /* zeros would do, but for the numbers of keys: they say where windows are, and so what is asked for */
    if (ls_comm_is_dry(&x->comm)) sum_of_alike(m, x->comm.size, mine, total);
    return LS_OK;
}

ls_status ls_reduce_adjoint(ls_exchange *x, ls_monoid m, const ls_real *mine, const ls_real *total,
                            const ls_real *dtotal, ls_real *dmine)
{
    ls_memory_of(x)->vjp_begin(x->queue, m, total, dtotal, dmine);
    LS_TRY(reduce(x, m, dmine, dmine));
    ls_memory_of(x)->vjp_end(x->queue, m, mine, dmine, dmine);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ scan */

/* After round k, `window` covers the 2^(k+1) ranks up to this one, and `before` the same without this one.
 * mine is read before `before` is written, so they may be the same. */
ls_status ls_scan(ls_exchange *x, ls_monoid m, int reverse, const ls_real *mine, ls_real *before)
{
    const ls_crossing kind = reverse ? LS_REVERSE_SCAN : LS_SCAN;
    const int size = x->comm.size, place = reverse ? size - 1 - x->comm.rank : x->comm.rank;
    const int64_t n = ls_monoid_size(m);
    ls_real *window, *in;
    m.reversed = reverse;
    LS_TRY(wire_take(x, n, &window, &in));
    const ls_memory *memory = ls_memory_of(x);
    memory->copy(x->queue, window, mine, (size_t)n * sizeof *mine);
    memory->identity(x->queue, m, before);
    if (n == 0) return LS_OK;
    x->traffic.predicted[kind] += ls_predict_scan(x->comm.rank, size, reverse, (uint64_t)n * sizeof *mine);
    for (int hop = 1; hop < size; hop *= 2) {
        const int to = place + hop < size ? place + hop : -1, from = place - hop;
        LS_TRY(round_trip(x, kind, window,
                          to < 0    ? -1
                          : reverse ? size - 1 - to
                                    : to,
                          in,
                          from < 0  ? -1
                          : reverse ? size - 1 - from
                                    : from,
                          n));
        if (from < 0) continue;
        /* in rank order: what comes from earlier ranks stands on the left, in a reverse scan on the right */
        memory->combine(x->queue, m, reverse ? before : in, reverse ? in : before, before);
        memory->combine(x->queue, m, reverse ? window : in, reverse ? in : window, window);
    }
    return LS_OK;
}

uint64_t ls_predict_scan(int rank, int size, int reverse, uint64_t bytes)
{
    uint64_t sends = 0;
    const int after = reverse ? rank : size - 1 - rank;
    for (int hop = 1; hop <= after; hop *= 2) sends++;
    return sends * bytes;
}

ls_status ls_scan_adjoint(ls_exchange *x, ls_monoid m, int reverse, const ls_real *mine, const ls_real *before,
                          const ls_real *dbefore, ls_real *dmine)
{
    const ls_memory *memory = ls_memory_of(x);
    const int64_t last = ls_monoid_size(m) - 1;
    memory->vjp_begin(x->queue, m, before, dbefore, dmine);
    if (m.counts)
        memory->copy(x->queue, dmine + last, mine + last, sizeof *mine); /* gradients cross as many positions */
    m.conjugate = !m.conjugate;
    LS_TRY(ls_scan(x, m, !reverse, dmine, dmine));
    memory->vjp_end(x->queue, m, mine, dmine, dmine);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ gather */

static int64_t sum_before(const int64_t *count, int rank)
{
    int64_t s = 0;
    for (int p = 0; p < rank; p++) s += count[p];
    return s;
}

ls_status ls_gather(ls_exchange *x, const int64_t *count, const ls_real *mine, ls_real *all)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const size_t own = (size_t)count[rank] * sizeof *all;
    x->traffic.predicted[LS_GATHER] += (uint64_t)(size - 1) * own;
    for (int hop = 1; hop < size; hop++) { /* starting next door, so that not all send to rank 0 first */
        const int to = (rank + hop) % size, from = (rank + size - hop) % size;
        LS_TRY(ls_exchange_add(x, all + sum_before(count, from), (size_t)count[from] * sizeof *all, from, 1));
        LS_TRY(ls_exchange_add(x, (void *)(uintptr_t)mine, own, to, 0));
    }
    LS_TRY(ls_exchange_begin(x, LS_GATHER, &x->pending));
    ls_memory_of(x)->copy(x->queue, all + sum_before(count, rank), mine, own);
    return ls_exchange_end(x, &x->pending);
}

ls_status ls_gather_adjoint(ls_exchange *x, const int64_t *count, const ls_real *dall, ls_real *dmine)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const int64_t own = count[rank];
    ls_arena_measure(&x->wire);
    ls_take(&x->wire, own * size);
    LS_TRY(ls_arena_reserve(&x->wire, "exchange: message buffers"));
    ls_real *in = ls_take(&x->wire, own * size);
    for (int hop = 1; hop < size; hop++) {
        const int to = (rank + hop) % size, from = (rank + size - hop) % size;
        const size_t bytes = (size_t)count[to] * sizeof *dall;
        x->traffic.predicted[LS_GATHER] += bytes;
        LS_TRY(ls_exchange_add(x, in + own * from, (size_t)own * sizeof *in, from, 1));
        LS_TRY(ls_exchange_add(x, (void *)(uintptr_t)(dall + sum_before(count, to)), bytes, to, 0));
    }
    LS_TRY(ls_exchange_begin(x, LS_GATHER, &x->pending));
    LS_TRY(ls_exchange_end(x, &x->pending));
    const ls_memory *memory = ls_memory_of(x);
    const ls_rows sum = {(char *)dmine, own * (int64_t)sizeof *dmine, 1, 1, 0, 0, 0};
    memory->zero(x->queue, dmine, (size_t)own * sizeof *dmine);
    for (int p = 0; p < size; p++) {
        ls_rows from = sum;
        from.p = (char *)(uintptr_t)(p == rank ? dall + sum_before(count, rank) : in + own * p);
        memory->add_rows(x->queue, sum, from, 1);
    }
    return LS_OK;
}
