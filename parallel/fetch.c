/* Fetch: intervals of global positions move from their owners to whoever wants them, and their gradients move back.
 * Every rank knows the shard and what every rank wants, so nobody asks: owner and wanter list the same messages. A
 * message from one rank to another is, span by span and tensor by tensor, the rows of their intersection, packed. */
#include "exchange.h"

ls_rows ls_rows_of_view(ls_view v, int64_t B, int64_t H, int64_t d)
{
    const int64_t e = (int64_t)sizeof(ls_real);
    return (ls_rows){(char *)v.p, d * e, B, H, v.sb * e, v.sh * e, v.st * e};
}

ls_rows ls_rows_of_pad(const uint8_t *pad, int64_t B, int64_t n)
{
    return (ls_rows){(char *)(uintptr_t)pad, 1, B, 1, n, 0, 1};
}

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

void ls_copy_rows(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t bytes, int64_t n)
{
    if (to_stride == bytes && from_stride == bytes) bytes *= n, n = bytes > 0; /* all of it is one row */
    for (int64_t i = 0; i < n; i++, to += to_stride, from += from_stride) memcpy(to, from, (size_t)bytes);
}

void ls_add_rows(char *to, int64_t to_stride, const char *from, int64_t from_stride, int64_t bytes, int64_t n)
{
    const int64_t reals = bytes / (int64_t)sizeof(ls_real);
    for (int64_t i = 0; i < n; i++, to += to_stride, from += from_stride) {
        ls_real *restrict x = (ls_real *)(void *)to;
        const ls_real *restrict y = (const ls_real *)(const void *)from;
        for (int64_t e = 0; e < reals; e++) x[e] += y[e];
    }
}

static char *row_of(const ls_rows *t, int64_t b, int64_t h, int64_t row)
{
    return t->p + b * t->sb + h * t->sh + row * t->st;
}

enum action { PACK, UNPACK, ADD };

/* Rows [first, first + n) of a tensor to or from a packed buffer; returns where the buffer goes on. */
static char *move(enum action action, const ls_rows *t, int64_t first, int64_t n, char *wire)
{
    for (int64_t b = 0; b < t->nb; b++)
        for (int64_t h = 0; n > 0 && h < t->nh; h++, wire += n * t->row_bytes) {
            char *row = row_of(t, b, h, first);
            if (action == PACK)
                ls_copy_rows(wire, t->row_bytes, row, t->st, t->row_bytes, n);
            else if (action == UNPACK)
                ls_copy_rows(row, t->st, wire, t->row_bytes, t->row_bytes, n);
            else
                ls_add_rows(row, t->st, wire, t->row_bytes, t->row_bytes, n);
        }
    return wire;
}

/* The rows that `owner` holds and `wanter` wants: in the owner's shard (at_owner) or in the wanter's spans. */
static void move_all(enum action action, const ls_shard *shard, const ls_span *want, int owner, int wanter,
                     int at_owner, const ls_rows *t, int tensors, char *wire)
{
    int64_t start = 0;
    for (int s = 0; s < 2; s++) {
        const ls_span span = want[2 * wanter + s];
        const part p = intersect(shard, owner, span);
        for (int i = 0; i < tensors; i++) wire = move(action, &t[i], at_owner ? p.first : start + p.at, p.n, wire);
        start += span.n;
    }
}

/* What this rank wants of itself takes no buffer: from its shard into its spans, or in the adjoint added back. */
static void move_own(const ls_shard *shard, const ls_span *want, int rank, const ls_rows *from, const ls_rows *to,
                     int tensors, int adjoint)
{
    int64_t start = 0;
    for (int s = 0; s < 2; s++) {
        const part p = intersect(shard, rank, want[2 * rank + s]);
        for (int i = 0; p.n > 0 && i < tensors; i++)
            for (int64_t b = 0; b < from[i].nb; b++)
                for (int64_t h = 0; h < from[i].nh; h++) {
                    char *mine = row_of(&from[i], b, h, p.first), *there = row_of(&to[i], b, h, start + p.at);
                    if (adjoint)
                        ls_add_rows(mine, from[i].st, there, to[i].st, from[i].row_bytes, p.n);
                    else
                        ls_copy_rows(there, to[i].st, mine, from[i].st, from[i].row_bytes, p.n);
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
        out += bytes * (size_t)(adjoint ? rows_between(shard, want, p, rank) : rows_between(shard, want, rank, p));
        in += bytes * (size_t)(adjoint ? rows_between(shard, want, rank, p) : rows_between(shard, want, p, rank));
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
        if (leaving > 0) move_all(PACK, shard, want, owner, wanter, !adjoint, source, tensors, s);
        x->traffic.predicted[LS_FETCH] += n_out;
        LS_TRY(ls_exchange_add(x, r, n_in, p, 1));
        LS_TRY(ls_exchange_add(x, s, n_out, p, 0));
        s += n_out, r += n_in;
    }
    LS_TRY(ls_exchange_begin(x, LS_FETCH, &x->pending));
    if (!adjoint) move_own(shard, want, rank, from, to, tensors, 0); /* while the others' travel */
    LS_TRY(ls_exchange_end(x, &x->pending));

    /* pass 2: unpack in rank order */
    r = receive;
    for (int p = 0; p < size; p++) {
        if (p == rank) {
            if (adjoint) move_own(shard, want, rank, from, to, tensors, 1);
            continue;
        }
        const int64_t coming = adjoint ? rows_between(shard, want, rank, p) : rows_between(shard, want, p, rank);
        if (coming == 0) continue;
        move_all(adjoint ? ADD : UNPACK, shard, want, adjoint ? rank : p, adjoint ? p : rank, adjoint, target, tensors,
                 r);
        r += bytes * (size_t)coming;
    }
    return LS_OK;
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
