#include "packed.h"
#include "tile.h"

#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------ find */

/* Equal ids side by side; as numbers of one kind, so that a list of them is a message. */
typedef struct segment {
    int64_t side, row, id, lo, n; /* side 0: queries, 1: keys */
} segment;

static int64_t find_runs(int64_t side, int64_t B, const ls_shard *shard, const int32_t *id, segment *list)
{
    int64_t count = 0;
    for (int64_t b = 0; b < B; b++)
        for (int64_t t = 0; t < shard->n; t++) {
            const int32_t here = id[b * shard->n + t];
            if (here < 0) continue;
            if (t > 0 && id[b * shard->n + t - 1] == here) {
                if (list != NULL) list[count - 1].n++;
                continue;
            }
            if (list != NULL) list[count] = (segment){side, b, here, shard->lo + t, 1};
            count++;
        }
    return count;
}

static int compare(int64_t a, int64_t b)
{
    return (a > b) - (a < b);
}

static int by_place(const void *x, const void *y)
{
    const segment *a = x, *b = y;
    const int row = compare(a->row, b->row), side = compare(a->side, b->side);
    return side ? side : row ? row : compare(a->lo, b->lo);
}

static int by_name(const void *x, const void *y)
{
    const segment *a = x, *b = y;
    const int row = compare(a->row, b->row), id = compare(a->id, b->id), side = compare(a->side, b->side);
    return row ? row : id ? id : side ? side : compare(a->lo, b->lo);
}

static int document_order(const void *x, const void *y)
{
    const ls_document *a = x, *b = y;
    const int row = compare(a->row, b->row), q = compare(a->q_lo, b->q_lo);
    return row ? row : q ? q : compare(a->k_lo, b->k_lo);
}

/* Every rank's segments on every rank, in rank order: count (P) of each. */
static ls_status share_segments(ls_exchange *x, const int64_t *count, const segment *mine, segment *all)
{
    const int rank = x->comm.rank, size = x->comm.size;
    const size_t own = (size_t)count[rank] * sizeof *mine;
    segment *at = all;
    x->traffic.predicted[LS_GATHER] += (uint64_t)(size - 1) * own;
    for (int p = 0; p < size; at += count[p++]) {
        if (p == rank) {
            if (own > 0) memcpy(at, mine, own);
            continue;
        }
        LS_TRY(ls_exchange_add_host(x, at, (size_t)count[p] * sizeof *at, p, 1));
        LS_TRY(ls_exchange_add_host(x, (void *)(uintptr_t)mine, own, p, 0));
    }
    LS_TRY(ls_exchange_begin(x, LS_GATHER, &x->pending));
    return ls_exchange_end(x, &x->pending);
}

/* Runs that go on over the bounds of shards become one; returns how many are left. */
static int64_t join_runs(segment *list, int64_t count)
{
    int64_t n = 0;
    qsort(list, (size_t)count, sizeof *list, by_place);
    for (int64_t i = 0; i < count; i++) {
        segment *last = n > 0 ? &list[n - 1] : NULL;
        if (last != NULL && last->side == list[i].side && last->row == list[i].row && last->id == list[i].id &&
            last->lo + last->n == list[i].lo)
            last->n += list[i].n;
        else
            list[n++] = list[i];
    }
    return n;
}

/* The rank that owns positions [lo, lo + n), n > 0, or -1. */
static int owner_of(const ls_shard *s, int64_t lo, int64_t n)
{
    int p = 0;
    while (s->bounds[p + 1] <= lo) p++;
    return lo + n <= s->bounds[p + 1] ? p : -1;
}

/* Queries and keys of the same name become a document. list is sorted by name. */
static ls_status match(const char *name, const segment *list, int64_t count, int self, const ls_shard *queries,
                       const ls_shard *keys, ls_documents *docs)
{
    static const char *const sides[] = {"query_segments", "key_segments"};
    docs->count = 0;
    for (int64_t i = 0; i < count; i++) {
        const segment *s = &list[i], *before = i > 0 ? &list[i - 1] : NULL;
        const int known = before != NULL && before->row == s->row && before->id == s->id;
        if (known && before->side == s->side)
            LS_FAIL(LS_ERR_ARGUMENT,
                    "%s: %s: id %lld stands in two places of row %lld, from positions %lld and %lld: a document is one "
                    "run of equal ids",
                    name, sides[s->side], (long long)s->id, (long long)s->row, (long long)before->lo, (long long)s->lo);
        if (!known) docs->list[docs->count++] = (ls_document){.row = s->row, .id = s->id};
        ls_document *d = &docs->list[docs->count - 1];
        if (s->side == 0 || self) d->q_lo = s->lo, d->q_n = s->n;
        if (s->side == 1 || self) d->k_lo = s->lo, d->k_n = s->n;
    }
    for (int64_t i = 0; i < docs->count; i++) {
        ls_document *d = &docs->list[i];
        const int q = d->q_n > 0 ? owner_of(queries, d->q_lo, d->q_n) : -2;
        const int k = d->k_n > 0 ? owner_of(keys, d->k_lo, d->k_n) : -2;
        d->owner = q == -2 ? k : k == -2 ? q : q == k ? q : -1;
    }
    if (docs->count > 0) qsort(docs->list, (size_t)docs->count, sizeof *docs->list, document_order);
    return LS_OK;
}

static void *grown(void *old, int64_t from, int64_t to, size_t size)
{
    char *x = realloc(old, (size_t)to * size);
    if (x != NULL) memset(x + (size_t)from * size, 0, (size_t)(to - from) * size);
    return x;
}

static ls_status make_room(ls_documents *docs, int size, int64_t count)
{
    const size_t bounds = ((size_t)size + 1) * sizeof *docs->queries.bounds;
    int failed = 0;
    if (count > docs->capacity) {
        ls_document *list = grown(docs->list, docs->capacity, count, sizeof *list);
        if (list != NULL) docs->list = list;
        ls_requests *requests = grown(docs->requests, docs->capacity, count, sizeof *requests);
        if (requests != NULL) docs->requests = requests;
        failed = list == NULL || requests == NULL;
        if (!failed) docs->capacity = count;
    }
    for (int i = 0; i < 2; i++) {
        ls_shard *s = i ? &docs->keys : &docs->queries;
        int64_t *x = realloc(s->bounds, bounds);
        if (x != NULL) s->bounds = x;
        failed |= x == NULL;
    }
    if (failed) LS_FAIL(LS_ERR_MEMORY, "packed: no memory for a list of %lld documents", (long long)count);
    return LS_OK;
}

ls_status ls_documents_find(ls_context *ctx, const char *name, int64_t B, const ls_shard *queries, const ls_shard *keys,
                            const int32_t *query_id, const int32_t *key_id, ls_documents *docs)
{
    ls_exchange *x = &ctx->exchange;
    const int size = x->comm.size, self = keys == NULL;
    int64_t total = 0, mine = find_runs(0, B, queries, query_id, NULL);
    if (!self) mine += find_runs(1, B, keys, key_id, NULL);
    segment *own = malloc(((size_t)mine + 1) * sizeof *own), *all = NULL;
    int64_t *count = malloc((size_t)size * sizeof *count);
    ls_status status = LS_OK;
    if (own == NULL || count == NULL)
        status = ls_fail(LS_ERR_MEMORY, "packed: no memory for %lld runs", (long long)mine);
    LS_TRY_GOTO(ls_agree(ctx, status));
    const int64_t of_queries = find_runs(0, B, queries, query_id, own);
    if (!self) find_runs(1, B, keys, key_id, own + of_queries);
    LS_TRY_GOTO(ls_comm_gather(&x->comm, mine, count));
    for (int p = 0; p < size; p++) total += count[p];
    all = malloc(((size_t)total + 1) * sizeof *all);
    if (all == NULL) status = ls_fail(LS_ERR_MEMORY, "packed: no memory for %lld runs", (long long)total);
    if (status == LS_OK) status = make_room(docs, size, total);
    LS_TRY_GOTO(ls_agree(ctx, status));
    LS_TRY_GOTO(ls_alone(ctx, share_segments(x, count, own, all)));
    total = join_runs(all, total);
    qsort(all, (size_t)total, sizeof *all, by_name);
    status = match(name, all, total, self, queries, self ? queries : keys, docs); /* the same on all ranks */
done:
    free(own), free(all), free(count);
    return status;
}

void ls_documents_free(ls_documents *docs)
{
    for (int64_t i = 0; i < docs->capacity; i++) ls_requests_free(&docs->requests[i]);
    free(docs->list), free(docs->requests);
    ls_shard_free(&docs->queries), ls_shard_free(&docs->keys);
    *docs = (ls_documents){0};
}

size_t ls_documents_bytes(const ls_documents *docs)
{
    size_t bytes = (size_t)docs->capacity * (sizeof *docs->list + sizeof *docs->requests);
    for (int64_t i = 0; i < docs->capacity; i++) bytes += ls_requests_bytes(&docs->requests[i]);
    return bytes;
}

/* ------------------------------------------------------------------------------------------------ one document */

static int64_t clamp(int64_t x, int64_t lo, int64_t n)
{
    return ls_min(ls_max(x, lo), lo + n) - lo;
}

/* What every rank owns of [lo, lo + n), or, alone, all of it on this one. */
static void cut_shard(const ls_shard *whole, int alone, int64_t lo, int64_t n, ls_shard *s)
{
    s->length = n;
    s->size = alone ? 1 : whole->size;
    s->rank = alone ? 0 : whole->rank;
    for (int p = 0; p <= s->size; p++) s->bounds[p] = alone ? p * n : clamp(whole->bounds[p], lo, n);
    s->lo = s->bounds[s->rank];
    s->n = s->bounds[s->rank + 1] - s->lo;
}

static ls_view shift(ls_view v, int64_t row, int64_t t)
{
    if (v.p != NULL) v.p += row * v.sb + t * v.st;
    return v;
}

/* The call of document i: the whole call's views from its first row on. */
static void make_call(const ls_call *whole, int64_t i, ls_call *c)
{
    ls_documents *docs = whole->documents;
    const ls_document *d = &docs->list[i];
    const int alone = d->owner >= 0;
    cut_shard(whole->queries, alone, d->q_lo, d->q_n, &docs->queries);
    cut_shard(whole->keys, alone, d->k_lo, d->k_n, &docs->keys);
    *c = (ls_call){.ctx = alone ? whole->ctx->alone : whole->ctx,
                   .mechanism = whole->mechanism,
                   .queries = &docs->queries,
                   .keys = &docs->keys,
                   .requests = &docs->requests[i],
                   .pass = whole->pass};
    ls_pass *p = &c->pass;
    const int64_t q = docs->queries.n > 0 ? ls_max(d->q_lo, whole->queries->lo) - whole->queries->lo : 0;
    const int64_t k = docs->keys.n > 0 ? ls_max(d->k_lo, whole->keys->lo) - whole->keys->lo : 0;
    p->q = shift(p->q, d->row, q), p->dq = shift(p->dq, d->row, q);
    p->out = shift(p->out, d->row, q), p->dout = shift(p->dout, d->row, q);
    ls_view *of_keys[] = {&p->own.k, &p->own.v, &p->own.dk, &p->own.dv, &p->own.extra, &p->own.dextra};
    for (int v = 0; v < 6; v++) *of_keys[v] = shift(*of_keys[v], d->row, k);
    if (p->pad_q != NULL) p->pad_q += d->row * p->T + q;
    if (p->own.pad != NULL) p->own.pad += d->row * p->S + k;
    p->B = 1;
    p->T = docs->queries.n;
    p->S = p->own.n = docs->keys.n;
    p->all_queries = d->q_n;
    p->all_keys = d->k_n;
    /* documents of a row have the same positions but their own random numbers, on any rank */
    p->sample = (p->sample + (uint64_t)d->row) ^ ((uint64_t)(d->q_n > 0 ? d->q_lo : d->k_lo) * UINT64_C(2654435761));
}

/* ------------------------------------------------------------------------------------------------ all documents */

/* First those of this rank alone, then those of several. Queries without a key have output and gradients 0 already,
 * keys without a query as well. */
static int takes_part(const ls_call *whole, int64_t i, int together)
{
    const ls_document *d = &whole->documents->list[i];
    if (d->q_n == 0 || d->k_n == 0) return 0;
    return together ? d->owner < 0 : d->owner == whole->ctx->exchange.comm.rank;
}

void ls_packed_plan(ls_call *whole, ls_arena *saved, ls_arena *work)
{
    ls_documents *docs = whole->documents;
    docs->saved_mark = saved->used;
    docs->work_mark = work->used;
    if (!work->measuring) return;
    for (int together = 0; together < 2; together++)
        for (int64_t i = 0; i < docs->count; i++) {
            ls_call c;
            if (!takes_part(whole, i, together)) continue;
            make_call(whole, i, &c);
            ls_run_plan(&c, saved, work);
            ls_arena_release(work, docs->work_mark); /* one after the other, they share it */
        }
}

static ls_status walk(ls_call *whole, ls_arena *saved, ls_arena *work, ls_status (*run)(ls_call *))
{
    ls_documents *docs = whole->documents;
    saved->used = docs->saved_mark;
    for (int together = 0; together < 2; together++)
        for (int64_t i = 0; i < docs->count; i++) {
            ls_call c;
            if (!takes_part(whole, i, together)) continue;
            make_call(whole, i, &c);
            work->used = docs->work_mark;
            ls_run_plan(&c, saved, work);
            LS_TRY(ls_arena_check(saved, whole->mechanism->name));
            LS_TRY(ls_arena_check(work, whole->mechanism->name));
            LS_TRY(run(&c));
        }
    return LS_OK;
}

ls_status ls_packed_forward(ls_call *whole, ls_arena *saved, ls_arena *work)
{
    const ls_pass *p = &whole->pass;
    ls_clear_view(whole->ctx, p->out, p->B, p->H, p->T, p->out_width); /* rows of no document */
    return walk(whole, saved, work, ls_run_forward);
}

ls_status ls_packed_backward(ls_call *whole, ls_arena *saved, ls_arena *work)
{
    const ls_pass *p = &whole->pass;
    ls_clear_view(whole->ctx, p->dq, p->B, p->H, p->T, p->d);
    if (!whole->mechanism->one_input) {
        ls_clear_view(whole->ctx, p->own.dk, p->B, p->H, p->S, p->d);
        ls_clear_view(whole->ctx, p->own.dv, p->B, p->H, p->S, p->d);
    }
    if (p->extra_width > 0) ls_clear_view(whole->ctx, p->own.dextra, p->B, 1, p->S, p->extra_width);
    return walk(whole, saved, work, ls_run_backward);
}
