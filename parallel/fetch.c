/* Fetch: intervals of global positions move from their owners to whoever wants them, and their gradients move back.
 * Every rank knows the shard and what every rank wants, so nobody asks: owner and wanter list the same messages. A
 * message from one rank to another is, tensor by tensor and span by span, the rows of their intersection, packed. Pads
 * are the last of the tensors, so that numbers lie where a GPU reads 16 bytes at once. */
#include "exchange.h"

/* What `owner` holds of span: rows from `first` of its shard, n of them, at row `at` of the span. */
typedef struct part {
    int64_t first, at, n;
} part;

static part intersect(const ls_shard *shard, int owner, ls_span span)
{
    const int64_t lo = ls_max(shard->bounds[owner], span.lo);
    const int64_t hi = ls_min(shard->bounds[owner + 1], span.lo + span.n);
    return hi > lo ? (part){lo - shard->bounds[owner], lo - span.lo, hi - lo} : (part){0, 0, 0};
}

static size_t row_bytes(const ls_rows *t, int tensors)
{
    size_t bytes = 0;
    for (int i = 0; i < tensors; i++) bytes += (size_t)(t[i].row_bytes * t[i].nb * t[i].nh);
    return bytes;
}

static int64_t rows_between(const ls_shard *shard, const ls_span *want, int owner, int wanter)
{
    return intersect(shard, owner, want[2 * wanter]).n + intersect(shard, owner, want[2 * wanter + 1]).n;
}

enum action { PACK, UNPACK, ADD };

/* Rows [first, first + n) of a tensor to or from a packed buffer; returns where the buffer goes on. */
static char *move(const ls_exchange *x, enum action action, const ls_rows *t, int64_t first, int64_t n, char *wire)
{
    const ls_rows rows = ls_rows_from(*t, first), packed = ls_rows_packed(t, n, wire);
    if (n == 0) return wire;
    if (action == ADD)
        ls_memory_of(x)->add_rows(x->queue, rows, packed, n);
    else
        ls_memory_of(x)->copy_rows(x->queue, action == PACK ? packed : rows, action == PACK ? rows : packed, n);
    return wire + t->nb * packed.sb;
}

/* The rows that `owner` holds and `wanter` wants: in the owner's shard (at_owner) or in the wanter's spans. */
static void move_all(const ls_exchange *x, enum action action, const ls_shard *shard, const ls_span *want, int owner,
                     int wanter, int at_owner, const ls_rows *t, int tensors, char *wire)
{
    for (int i = 0; i < tensors; i++)
        for (int s = 0; s < 2; s++) {
            const part p = intersect(shard, owner, want[2 * wanter + s]);
            const int64_t before = s == 0 ? 0 : want[2 * wanter].n;
            wire = move(x, action, &t[i], at_owner ? p.first : before + p.at, p.n, wire);
        }
}

/* What this rank wants of itself takes no buffer: from its shard into its spans, or in the adjoint added back. */
static void move_own(const ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from,
                     const ls_rows *to, int tensors, int adjoint)
{
    const int rank = x->comm.rank;
    int64_t start = 0;
    for (int s = 0; s < 2; s++) {
        const part p = intersect(shard, rank, want[2 * rank + s]);
        for (int i = 0; p.n > 0 && i < tensors; i++) {
            const ls_rows mine = ls_rows_from(from[i], p.first), there = ls_rows_from(to[i], start + p.at);
            if (adjoint)
                ls_memory_of(x)->add_rows(x->queue, mine, there, p.n);
            else
                ls_memory_of(x)->copy_rows(x->queue, there, mine, p.n);
        }
        start += want[2 * rank + s].n;
    }
}

/* Both directions are one: forward, owners send and wanters receive; in the adjoint the other way about. */
static ls_status travel(ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from,
                        const ls_rows *to, int tensors, int adjoint)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const size_t bytes = row_bytes(from, tensors);
    const ls_rows *source = adjoint ? to : from, *target = adjoint ? from : to;
    size_t out = 0, in = 0;
    for (int p = 0; p < size; p++) {
        if (p == rank) continue;
        out += ls_wire_bytes(bytes * (size_t)rows_between(shard, want, adjoint ? p : rank, adjoint ? rank : p));
        in += ls_wire_bytes(bytes * (size_t)rows_between(shard, want, adjoint ? rank : p, adjoint ? p : rank));
    }
    ls_arena_measure(&x->wire);
    ls_arena_take(&x->wire, out), ls_arena_take(&x->wire, in);
    LS_TRY(ls_arena_reserve(&x->wire, "exchange: message buffers"));
    char *s = ls_arena_take(&x->wire, out), *receive = ls_arena_take(&x->wire, in), *r = receive;

    /* pass 1: pack what leaves, list all messages */
    for (int p = 0; p < size; p++) {
        if (p == rank) continue;
        const int64_t leaving = adjoint ? rows_between(shard, want, p, rank) : rows_between(shard, want, rank, p);
        const int64_t coming = adjoint ? rows_between(shard, want, rank, p) : rows_between(shard, want, p, rank);
        const int owner = adjoint ? p : rank, wanter = adjoint ? rank : p;
        const size_t n_out = bytes * (size_t)leaving, n_in = bytes * (size_t)coming;
        if (leaving > 0) move_all(x, PACK, shard, want, owner, wanter, !adjoint, source, tensors, s);
        x->traffic.predicted[LS_FETCH] += n_out;
        LS_TRY(ls_exchange_add(x, r, n_in, p, 1));
        LS_TRY(ls_exchange_add(x, s, n_out, p, 0));
        s += ls_wire_bytes(n_out), r += ls_wire_bytes(n_in);
    }
    LS_TRY(ls_exchange_begin(x, LS_FETCH, &x->pending));
    if (!adjoint) move_own(x, shard, want, from, to, tensors, 0); /* while the others' travel */
    LS_TRY(ls_exchange_end(x, &x->pending));

    /* pass 2: unpack in rank order */
    r = receive;
    for (int p = 0; p < size; p++) {
        if (p == rank) {
            if (adjoint) move_own(x, shard, want, from, to, tensors, 1);
            continue;
        }
        const int64_t coming = adjoint ? rows_between(shard, want, rank, p) : rows_between(shard, want, p, rank);
        if (coming == 0) continue;
        move_all(x, adjoint ? ADD : UNPACK, shard, want, adjoint ? rank : p, adjoint ? p : rank, adjoint, target,
                 tensors, r);
        r += ls_wire_bytes(bytes * (size_t)coming);
    }
    return LS_OK;
}

void ls_fetch_plan(ls_exchange *x, const ls_shard *shard, const ls_span *want, size_t bytes)
{
    const int rank = x->comm.rank;
    size_t out = 0, in = 0;
    for (int p = 0; p < x->comm.size; p++) {
        if (p == rank) continue;
        out += ls_wire_bytes(bytes * (size_t)rows_between(shard, want, rank, p));
        in += ls_wire_bytes(bytes * (size_t)rows_between(shard, want, p, rank));
    }
    ls_exchange_plan(x, out, in);
}

ls_status ls_fetch(ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from, const ls_rows *to,
                   int tensors)
{
    return travel(x, shard, want, from, to, tensors, 0);
}

ls_status ls_fetch_adjoint(ls_exchange *x, const ls_shard *shard, const ls_span *want, const ls_rows *from,
                           const ls_rows *to, int tensors)
{
    return travel(x, shard, want, from, to, tensors, 1);
}
