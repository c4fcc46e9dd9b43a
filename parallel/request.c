/* Requests: a fetch of positions that only the rank that wants them knows. Every group, a head (b,h), has a list of its
 * own. So owners must be told what to send:
 *
 *   1. each rank cuts its lists at the bounds of the shard, and sorts the pieces by owner
 *   2. it tells every other rank how many intervals and rows it wants of it       (2 numbers to each)
 *   3. all ranks agree that they have memory for what others want, and for the messages of rows
 *   4. the intervals go to their owners                                            (3 numbers for each interval)
 *   5. rows go from owners to wanters, or their gradients back: as often as is asked, and nothing but those rows
 *
 * A message of rows is, tensor by tensor and interval by interval, packed; pads come last, as in a fetch. */
#include "context.h"

#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------ lists */

static void plan(ls_requests *r, int size, int64_t intervals)
{
    ls_arena *a = &r->asked;
    const size_t pieces = (size_t)(intervals + (intervals > 0 ? r->groups * (size - 1) : 0)), one = sizeof(int64_t);
    r->first = ls_arena_take(a, (size_t)(r->groups + 1) * one);
    r->list_at = ls_arena_take(a, (size_t)(r->groups + 1) * one);
    r->list = ls_arena_take(a, (size_t)intervals * sizeof *r->list);
    r->want = ls_arena_take(a, pieces * sizeof *r->want);
    r->row = ls_arena_take(a, pieces * one);
    r->want_at = ls_arena_take(a, (size_t)(size + 1) * one);
    r->give_at = ls_arena_take(a, (size_t)(size + 1) * one);
    r->wanted = ls_arena_take(a, 2 * (size_t)size * one);
    r->given = ls_arena_take(a, 2 * (size_t)size * one);
}

ls_status ls_requests_begin(ls_requests *r, int size, int64_t groups, int64_t heads, int64_t intervals)
{
    r->groups = groups;
    r->heads = heads;
    r->rows = 0;
    ls_arena_measure(&r->asked);
    plan(r, size, intervals);
    LS_TRY(ls_arena_reserve(&r->asked, "exchange: lists of requests"));
    plan(r, size, intervals);
    r->list_at[0] = 0;
    return LS_OK;
}

/* Walks over the pieces that owners hold. Pass 1 counts them, pass 2 writes them down, each owner's from want_at on. */
static void walk(const ls_shard *shard, ls_requests *r, int write)
{
    int64_t row = 0;
    for (int64_t g = 0; g < r->groups; g++) {
        int owner = 0;
        r->first[g] = row;
        for (int64_t i = r->list_at[g]; i < r->list_at[g + 1]; i++) {
            const int64_t end = r->list[i].lo + r->list[i].n;
            for (int64_t lo = r->list[i].lo, n; lo < end; lo += n, row += n) {
                while (shard->bounds[owner + 1] <= lo) owner++;
                n = ls_min(end, shard->bounds[owner + 1]) - lo;
                if (write) {
                    const int64_t at = r->want_at[owner]++;
                    r->want[at] = (ls_interval){g, lo, n};
                    r->row[at] = row;
                } else {
                    r->wanted[2 * owner]++;
                    r->wanted[2 * owner + 1] += n;
                }
            }
        }
    }
    r->first[r->groups] = r->rows = row;
}

/* at (P+1) = where each rank's intervals begin, from numbers (P, 2): intervals, rows. */
static void add_up(int size, const int64_t *numbers, int64_t *at)
{
    at[0] = 0;
    for (int p = 0; p < size; p++) at[p + 1] = at[p] + numbers[2 * p];
}

void ls_requests_cut(const ls_shard *shard, ls_requests *r)
{
    memset(r->wanted, 0, 2 * (size_t)shard->size * sizeof *r->wanted);
    walk(shard, r, 0);
    add_up(shard->size, r->wanted, r->want_at);
    walk(shard, r, 1);
    add_up(shard->size, r->wanted, r->want_at); /* writing has moved them */
}

void ls_requests_free(ls_requests *r)
{
    ls_arena_free(&r->asked);
    ls_arena_free(&r->accepted);
    ls_arena_free(&r->brought);
    free(r->host);
    *r = (ls_requests){0};
}

size_t ls_requests_bytes(const ls_requests *r)
{
    return r->asked.capacity + r->accepted.capacity + r->brought.capacity + r->host_bytes;
}

/* ------------------------------------------------------------------------------------------------ to the owners */

/* Nobody tells a dry rank what others want of it, and it cannot be known: their data decide. Their queries are taken to
 * be like its own, so that each of them wants what this rank wants of itself. */
static void guess_numbers(const ls_exchange *x, ls_requests *r)
{
    for (int p = 0; p < x->comm.size; p++)
        if (p != x->comm.rank) memcpy(r->given + 2 * p, r->wanted + 2 * x->comm.rank, 2 * sizeof *r->given);
}
static void guess_intervals(const ls_exchange *x, ls_requests *r)
{
    const int rank = x->comm.rank;
    const size_t bytes = (size_t)r->wanted[2 * rank] * sizeof *r->give;
    for (int p = 0; p < x->comm.size; p++)
        if (p != rank && bytes > 0) memcpy(r->give + r->give_at[p], r->want + r->want_at[rank], bytes);
}

/* Step 2. What a rank wants of itself is nobody else's business: given is 0 there. */
static ls_status tell_numbers(ls_exchange *x, ls_requests *r)
{
    const size_t bytes = 2 * sizeof *r->wanted;
    memset(r->given, 0, (size_t)x->comm.size * bytes);
    for (int p = 0; p < x->comm.size; p++) {
        if (p == x->comm.rank) continue;
        x->traffic.predicted[LS_FETCH] += bytes;
        LS_TRY(ls_exchange_add_host(x, r->given + 2 * p, bytes, p, 1));
        LS_TRY(ls_exchange_add_host(x, r->wanted + 2 * p, bytes, p, 0));
    }
    LS_TRY(ls_exchange_begin(x, LS_FETCH, &x->pending));
    LS_TRY(ls_exchange_end(x, &x->pending));
    if (ls_comm_is_dry(&x->comm)) guess_numbers(x, r);
    add_up(x->comm.size, r->given, r->give_at);
    return LS_OK;
}

static size_t bytes_of_others(const ls_exchange *x, const int64_t *numbers, size_t row_bytes)
{
    size_t bytes = 0;
    for (int p = 0; p < x->comm.size; p++)
        bytes += p == x->comm.rank ? 0 : ls_wire_bytes((size_t)numbers[2 * p + 1] * row_bytes);
    return bytes;
}

static ls_status take_wire(ls_exchange *x, const ls_requests *r, size_t row_bytes, int adjoint, char **out, char **in)
{
    const size_t give = bytes_of_others(x, r->given, row_bytes), want = bytes_of_others(x, r->wanted, row_bytes);
    ls_arena_measure(&x->wire);
    ls_arena_take(&x->wire, give), ls_arena_take(&x->wire, want);
    LS_TRY(ls_arena_reserve(&x->wire, "exchange: message buffers"));
    *out = ls_arena_take(&x->wire, adjoint ? want : give);
    *in = ls_arena_take(&x->wire, adjoint ? give : want);
    return LS_OK;
}

/* Step 3. The buffers are not used yet, but from now on they can be had. */
static ls_status accept(ls_exchange *x, ls_requests *r, size_t row_bytes)
{
    char *out, *in;
    const size_t bytes = (size_t)r->give_at[x->comm.size] * sizeof *r->give;
    ls_arena_measure(&r->accepted);
    ls_arena_take(&r->accepted, bytes);
    LS_TRY(ls_arena_reserve(&r->accepted, "exchange: requests of other ranks"));
    r->give = ls_arena_take(&r->accepted, bytes);
    return take_wire(x, r, row_bytes, 0, &out, &in);
}

/* Step 4. */
static ls_status tell_intervals(ls_exchange *x, ls_requests *r)
{
    const size_t one = sizeof *r->want;
    for (int p = 0; p < x->comm.size; p++) {
        if (p == x->comm.rank) continue;
        const size_t out = (size_t)r->wanted[2 * p] * one, in = (size_t)r->given[2 * p] * one;
        x->traffic.predicted[LS_FETCH] += out;
        LS_TRY(ls_exchange_add_host(x, r->give + r->give_at[p], in, p, 1));
        LS_TRY(ls_exchange_add_host(x, r->want + r->want_at[p], out, p, 0));
    }
    LS_TRY(ls_exchange_begin(x, LS_FETCH, &x->pending));
    LS_TRY(ls_exchange_end(x, &x->pending));
    if (ls_comm_is_dry(&x->comm)) guess_intervals(x, r);
    return LS_OK;
}

ls_status ls_requests_exchange(ls_context *ctx, ls_requests *r, size_t row_bytes, ls_status mine)
{
    ls_exchange *x = &ctx->exchange;
    LS_TRY(ls_agree(ctx, mine));
    LS_TRY(tell_numbers(x, r));
    LS_TRY(ls_agree(ctx, accept(x, r, row_bytes)));
    return tell_intervals(x, r);
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Rows from row `row` of group g in the owner's tensor (nb,nh,n), and from row `row` of the wanter's, where all groups'
 * are in one. */
static ls_rows owned(const ls_requests *r, const ls_rows *t, int64_t g, int64_t row)
{
    ls_rows x = ls_rows_from(*t, row);
    x.p += g / r->heads * t->sb + g % r->heads * t->sh;
    x.nb = x.nh = 1;
    return x;
}
static ls_rows brought(const ls_rows *t, int64_t row)
{
    ls_rows x = ls_rows_from(*t, row);
    x.nb = x.nh = 1;
    return x;
}

/* Packs the rows that leave for rank p: those it wants, or the gradients of those that it owns. */
static void pack(const ls_exchange *x, const ls_shard *shard, const ls_requests *r, int p, const ls_rows *t,
                 int tensors, int adjoint, char *wire)
{
    const int64_t *at = adjoint ? r->want_at : r->give_at;
    for (int j = 0; j < tensors; j++)
        for (int64_t i = at[p]; i < at[p + 1]; i++) {
            const ls_interval k = adjoint ? r->want[i] : r->give[i];
            const ls_rows rows = adjoint ? brought(&t[j], r->row[i]) : owned(r, &t[j], k.group, k.lo - shard->lo);
            ls_memory_of(x)->copy_rows(x->queue, ls_rows_packed(&rows, k.n, wire), rows, k.n);
            wire += k.n * rows.row_bytes;
        }
}

/* The rows that came from rank p: put where they were wanted, or added where they are owned. */
static void unpack(const ls_exchange *x, const ls_shard *shard, const ls_requests *r, int p, const ls_rows *t,
                   int tensors, int adjoint, char *wire)
{
    const int64_t *at = adjoint ? r->give_at : r->want_at;
    for (int j = 0; j < tensors; j++)
        for (int64_t i = at[p]; i < at[p + 1]; i++) {
            const ls_interval k = adjoint ? r->give[i] : r->want[i];
            const ls_rows rows = adjoint ? owned(r, &t[j], k.group, k.lo - shard->lo) : brought(&t[j], r->row[i]);
            const ls_rows packed = ls_rows_packed(&rows, k.n, wire);
            if (adjoint)
                ls_memory_of(x)->add_rows(x->queue, rows, packed, k.n);
            else
                ls_memory_of(x)->copy_rows(x->queue, rows, packed, k.n);
            wire += k.n * rows.row_bytes;
        }
}

/* What this rank wants of itself. */
static void move_own(const ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                     const ls_rows *to, int tensors, int adjoint)
{
    for (int64_t i = r->want_at[shard->rank]; i < r->want_at[shard->rank + 1]; i++) {
        const ls_interval k = r->want[i];
        for (int j = 0; j < tensors; j++) {
            const ls_rows mine = owned(r, &from[j], k.group, k.lo - shard->lo), there = brought(&to[j], r->row[i]);
            if (adjoint)
                ls_memory_of(x)->add_rows(x->queue, mine, there, k.n);
            else
                ls_memory_of(x)->copy_rows(x->queue, there, mine, k.n);
        }
    }
}

/* Step 5, either way. */
static ls_status travel(ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                        const ls_rows *to, int tensors, int adjoint)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const int64_t *leaving = adjoint ? r->wanted : r->given, *coming = adjoint ? r->given : r->wanted;
    size_t bytes = 0;
    char *out, *in;
    for (int j = 0; j < tensors; j++) bytes += (size_t)to[j].row_bytes;
    LS_TRY(take_wire(x, r, bytes, adjoint, &out, &in));
    char *arrived = in;
    for (int p = 0; p < size; p++) {
        if (p == rank) continue;
        const size_t n_out = (size_t)leaving[2 * p + 1] * bytes, n_in = (size_t)coming[2 * p + 1] * bytes;
        pack(x, shard, r, p, adjoint ? to : from, tensors, adjoint, out);
        x->traffic.predicted[LS_FETCH] += n_out;
        LS_TRY(ls_exchange_add(x, in, n_in, p, 1));
        LS_TRY(ls_exchange_add(x, out, n_out, p, 0));
        out += ls_wire_bytes(n_out), in += ls_wire_bytes(n_in);
    }
    LS_TRY(ls_exchange_begin(x, LS_FETCH, &x->pending));
    if (!adjoint) move_own(x, shard, r, from, to, tensors, 0); /* while the others' travel */
    LS_TRY(ls_exchange_end(x, &x->pending));
    for (int p = 0; p < size; p++) { /* in rank order */
        if (p == rank) {
            if (adjoint) move_own(x, shard, r, from, to, tensors, 1);
            continue;
        }
        unpack(x, shard, r, p, adjoint ? from : to, tensors, adjoint, arrived);
        arrived += ls_wire_bytes((size_t)coming[2 * p + 1] * bytes);
    }
    return LS_OK;
}

ls_status ls_request(ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                     const ls_rows *to, int tensors)
{
    return travel(x, shard, r, from, to, tensors, 0);
}

ls_status ls_request_adjoint(ls_exchange *x, const ls_shard *shard, const ls_requests *r, const ls_rows *from,
                             const ls_rows *to, int tensors)
{
    return travel(x, shard, r, from, to, tensors, 1);
}
