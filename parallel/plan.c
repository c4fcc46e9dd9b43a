/* Which rows each rank holds in a call, and the memory that the call takes: run twice, see arena.h, and once more in
 * backward over what forward saved. */
#include "run_parts.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------ who holds what */

static ls_span zigzag(int64_t length, int size, int rank, int half)
{
    const int64_t chunks = 2 * (int64_t)size, c = half ? chunks - 1 - rank : rank;
    const int64_t lo = length / chunks * c + ls_min(c, length % chunks);
    return (ls_span){0, lo, length / chunks + (c < length % chunks)};
}

void ls_describe_block(const ls_call *c, int rank, ls_block *block)
{
    const ls_shard *s = c->keys;
    if (c->placement.on) {
        const ls_span *want = c->placement.want + 2 * rank;
        block->spans = 2;
        block->span[0] = want[0];
        block->span[1] = want[1];
        block->span[0].row = 0;
        block->span[1].row = want[0].n;
        block->n = want[0].n + want[1].n;
    } else {
        block->spans = 1;
        block->n = s->bounds[rank + 1] - s->bounds[rank];
        block->span[0] = (ls_span){0, s->bounds[rank], block->n};
    }
}

static int64_t largest_block(const ls_call *c)
{
    int64_t n = 0;
    for (int p = 0; p < c->keys->size; p++)
        n = ls_max(n, c->placement.on ? zigzag(c->keys->length, c->keys->size, p, 0).n +
                                            zigzag(c->keys->length, c->keys->size, p, 1).n
                                      : c->keys->bounds[p + 1] - c->keys->bounds[p]);
    return n;
}

int64_t ls_block_reals(const ls_pass *p, const ls_phase *ring, int64_t n)
{
    return (ring->keys_only ? 1 : 2) * p->B * p->H * n * p->d + (ring->notes != NULL ? ring->notes(p) : 0);
}

size_t ls_block_bytes(const ls_pass *p, const ls_phase *ring, int64_t n)
{
    if (n == 0) return 0;
    return (size_t)ls_block_reals(p, ring, n) * sizeof(ls_real) + (p->own.pad != NULL ? (size_t)(p->B * n) : 0);
}

/* The phase of this call with such a crossing, or NULL. */
static const ls_phase *find_crossing(const ls_pass *p, const ls_phase *phases, ls_crossing kind)
{
    for (; phases->name != NULL; phases++)
        if (phases->crossing == kind && ls_is_needed(p, phases)) return phases;
    return NULL;
}

/* ------------------------------------------------------------------------------------------------ plan */

static void plan_placement(ls_call *c, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    ls_placement *z = &c->placement;
    const int size = c->keys->size, rank = c->keys->rank;
    z->on = c->mechanism->balance_causal && p->pattern == LS_CS && size > 1 && !c->in_place;
    if (!z->on) return;
    z->want = c->ctx->spans;
    for (int r = 0; r < 2 * size; r++) z->want[r] = zigzag(c->keys->length, size, r / 2, r % 2);
    const int64_t n = zigzag(c->keys->length, size, rank, 0).n + zigzag(c->keys->length, size, rank, 1).n;
    const int64_t reals = p->B * p->H * n * p->d;
    ls_view *keep[] = {&z->q, &z->k, &z->v, &z->out}, *pass[] = {&z->dq, &z->dk, &z->dv, &z->dout};
    for (int i = 0; i < 4; i++) *keep[i] = ls_heads_apart(ls_take(saved, reals), p->H, n, p->d);
    for (int i = 0; i < 4; i++) *pass[i] = ls_heads_apart(ls_take(work, p->backward ? reals : 0), p->H, n, p->d);
    z->pad_q = p->pad_q == NULL ? NULL : ls_arena_take(saved, (size_t)(p->B * n));
    z->pad_k = p->own.pad == NULL ? NULL : ls_arena_take(saved, (size_t)(p->B * n));
}

static ls_view from_row(ls_view v, int64_t row)
{
    if (v.p != NULL) v.p += row * v.st;
    return v;
}

static void stay_at_home(const ls_reach *r, ls_pass *p)
{
    const ls_block *own = &p->own;
    ls_block *halo = &p->halo;
    const int64_t row = halo->span[0].lo;
    if (r->keys_at_home) {
        halo->k = from_row(own->k, row);
        halo->v = from_row(own->v, row);
        halo->extra = from_row(own->extra, row);
    }
    if (r->gradients_at_home) halo->dk = own->dk, halo->dv = own->dv, halo->dextra = own->dextra;
}

ls_pass ls_placed(const ls_call *c)
{
    ls_pass p = c->pass;
    const ls_placement *z = &c->placement;
    ls_describe_block(c, c->keys->rank, &p.own);
    stay_at_home(&c->reach, &p);
    if (!z->on) {
        p.query_spans = 1;
        p.query_span[0] = (ls_span){0, c->queries->lo, p.T};
        return p;
    }
    p.T = p.S = p.own.n;
    p.q = z->q, p.own.k = z->k, p.own.v = z->v, p.out = z->out;
    p.dq = z->dq, p.own.dk = z->dk, p.own.dv = z->dv, p.dout = z->dout;
    p.pad_q = p.pad_q != NULL ? z->pad_q : NULL;
    p.own.pad = p.own.pad != NULL ? z->pad_k : NULL;
    p.query_spans = p.own.spans;
    memcpy(p.query_span, p.own.span, sizeof p.query_span);
    return p;
}

static void plan_ring(ls_call *c, const ls_phase *ring, ls_arena *work)
{
    const ls_pass *p = &c->pass;
    const int64_t n = largest_block(c), reals = 2 * p->B * p->H * n * p->d;
    const int alone = c->keys->size == 1, as_it_is = alone && (p->own.pad == NULL || p->narrow);
    for (int i = 0; i < 2; i++)
        c->ring.block[i] = ls_arena_take(work, as_it_is || (alone && i == 1) ? 0 : ls_block_bytes(p, ring, n));
    const int back = p->backward && !alone && ring->backward != NULL;
    for (int i = 0; i < 3; i++) c->ring.gradient[i] = ls_take(work, back ? reals : 0);
}

/* The keys that the queries of `rank` look at, those that exist. */
static ls_span reach_of(const ls_call *c, const ls_phase *phase, int rank)
{
    const int64_t *bounds = c->queries->bounds;
    if (bounds[rank + 1] == bounds[rank]) return (ls_span){0, 0, 0};
    const ls_span s = phase->reach(&c->pass, bounds[rank], bounds[rank + 1] - bounds[rank]);
    const int64_t lo = ls_min(ls_max(s.lo, 0), c->keys->length);
    return (ls_span){0, lo, ls_max(0, ls_min(s.lo + s.n, c->keys->length) - lo)};
}

/* The halo lives as long as saved: backward looks at it again. */
static void plan_fetch(ls_call *c, const ls_phase *phase, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    const int size = c->keys->size;
    const ls_span mine = reach_of(c, phase, c->keys->rank);
    const int64_t n = mine.n, W = p->extra_width, reals = p->B * p->H * n * p->d;
    const int64_t k = phase->fetches & LS_KEYS ? reals : 0, v = phase->fetches & LS_VALUES ? reals : 0;
    const int64_t e = phase->fetches & LS_EXTRA ? p->B * n * W : 0;
    ls_reach *r = &c->reach;
    r->want = c->ctx->spans + 2 * size;
    r->n = n;
    r->keys_at_home = size == 1 && p->own.pad == NULL;
    r->gradients_at_home = r->keys_at_home && n == p->S && !phase->adds;
    const int64_t away = !r->keys_at_home, back = p->backward && !r->gradients_at_home;
    for (int i = 0; i < size; i++) {
        r->want[2 * i] = reach_of(c, phase, i);
        r->want[2 * i + 1] = (ls_span){0, 0, 0};
    }
    ls_block *h = &p->halo;
    *h = (ls_block){.n = n, .spans = 1, .span = {mine}};
    h->k = ls_heads_apart(ls_take(saved, away * k), p->H, n, p->d);
    h->v = ls_heads_apart(ls_take(saved, away * v), p->H, n, p->d);
    h->extra = (ls_view){ls_take(saved, away * e), n * W, 0, W};
    h->dk = ls_heads_apart(ls_take(work, back * k), p->H, n, p->d);
    h->dv = ls_heads_apart(ls_take(work, back * v), p->H, n, p->d);
    h->dextra = (ls_view){ls_take(work, back * e), n * W, 0, W};
    h->pad = p->own.pad == NULL ? NULL : ls_arena_take(saved, (size_t)(p->B * n));
}

void ls_plan_brought(const ls_pass *p, ls_requests *r, ls_block *halo)
{
    const int64_t n = r->rows;
    *halo = (ls_block){.n = n, .first = r->first};
    if (p->queue != NULL) halo->first = ls_arena_take(&r->brought, (size_t)(r->groups + 1) * sizeof *halo->first);
    halo->k = (ls_view){ls_take(&r->brought, n * p->d), 0, 0, p->d};
    halo->v = (ls_view){ls_take(&r->brought, n * p->d), 0, 0, p->d};
    halo->pad = p->own.pad == NULL ? NULL : ls_arena_take(&r->brought, (size_t)n);
}

/* In backward they are there already. */
static void plan_lists(ls_call *c, ls_arena *work)
{
    ls_pass *p = &c->pass;
    p->halo = (ls_block){.n = 0};
    if (!p->backward) return;
    ls_arena_replay(&c->requests->brought);
    ls_plan_brought(p, c->requests, &p->halo);
    p->halo.dk = (ls_view){ls_take(work, p->halo.n * p->d), 0, 0, p->d};
    p->halo.dv = (ls_view){ls_take(work, p->halo.n * p->d), 0, 0, p->d};
}

static void plan_gather(ls_call *c, int i, const ls_phase *phase, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    ls_collection *g = &p->gathered[i];
    const int size = c->keys->size;
    c->piece[i] = c->ctx->pieces + i * size;
    *g = (ls_collection){.every = 1};
    for (int r = 0; r < size; r++) {
        const int64_t lo = c->keys->bounds[r], n = phase->piece(p, lo, c->keys->bounds[r + 1] - lo);
        c->piece[i][r] = n;
        if (r < c->keys->rank) g->before += n;
        if (r == c->keys->rank) g->count = n;
        g->total += n;
    }
    const int64_t back = p->backward && !phase->constant;
    g->mine = ls_take(saved, g->count);
    g->all = ls_take(saved, g->total);
    g->dmine = ls_take(work, back * g->count);
    g->dall = ls_take(work, back * g->total);
}

/* Of what crosses in this call, lists apart: their wire is agreed on when they are known. */
static void plan_wire(const ls_call *c)
{
    const ls_pass *p = &c->pass;
    const ls_phase *phases = c->mechanism->phases[p->pattern];
    ls_exchange *x = &c->ctx->exchange;
    const size_t one = sizeof(ls_real), row = (size_t)(p->B * p->H * p->d) * one;
    if (c->placement.on) /* q, k, v and two masks */
        ls_fetch_plan(x, c->keys, c->placement.want, 3 * row + 2 * (size_t)p->B);
    for (int i = 0; phases[i].name != NULL; i++) {
        if (!ls_is_needed(p, &phases[i])) continue;
        const size_t extra = phases[i].fetches & LS_EXTRA ? (size_t)(p->B * p->extra_width) * one : 0;
        if (phases[i].crossing == LS_FETCH && phases[i].wanted == NULL)
            ls_fetch_plan(x, c->keys, c->reach.want, 2 * row + extra + (size_t)p->B);
        if (phases[i].crossing == LS_GATHER && p->backward && !phases[i].constant)
            ls_exchange_plan(x, (size_t)(p->gathered[i].count * c->keys->size) * one, 0);
        if (phases[i].monoid != NULL) {
            const size_t bytes = (size_t)ls_monoid_size(p->summary[i].monoid) * one;
            ls_exchange_plan(x, bytes, bytes);
        }
    }
}

void ls_run_plan(ls_call *c, ls_arena *saved, ls_arena *work)
{
    ls_pass *user = &c->pass;
    const ls_phase *phases = c->mechanism->phases[user->pattern];
    plan_placement(c, saved, work);
    const ls_phase *ring = find_crossing(user, phases, LS_RING), *fetch = find_crossing(user, phases, LS_FETCH);
    if (ring != NULL && !(user->backward && ring->constant)) plan_ring(c, ring, work);
    if (fetch != NULL && fetch->wanted == NULL) plan_fetch(c, fetch, saved, work);
    if (fetch != NULL && fetch->wanted != NULL) plan_lists(c, work);
    for (int i = 0; phases[i].name != NULL; i++)
        if (phases[i].crossing == LS_GATHER && ls_is_needed(user, &phases[i]))
            plan_gather(c, i, &phases[i], saved, work);
    for (int i = 0; phases[i].name != NULL; i++) {
        if (phases[i].monoid == NULL || !ls_is_needed(user, &phases[i])) continue;
        ls_summary *s = &user->summary[i];
        s->monoid = phases[i].monoid(user);
        const int64_t n = ls_monoid_size(s->monoid), back = user->backward && !phases[i].constant;
        s->sent = ls_take(saved, n);
        s->got = ls_take(saved, n);
        s->dsent = ls_take(work, back * n);
        s->dgot = ls_take(work, back * n);
    }
    plan_wire(c);
    ls_pass p = ls_placed(c);
    if (ring != NULL) p.visit.n = largest_block(c);
    ls_plan_mechanism(c->mechanism, &p, saved, work);
    memcpy(user->saved, p.saved, sizeof p.saved);
    memcpy(user->work, p.work, sizeof p.work);
    if (user->queue == NULL || c->mechanism->cuda->host_bytes == NULL || c->requests == NULL) return;
    if (!user->backward) {
        const size_t bytes = c->mechanism->cuda->host_bytes(&p);
        if (work->measuring && bytes > c->requests->host_bytes) {
            free(c->requests->host);
            c->requests->host = malloc(bytes);
            c->requests->host_bytes = c->requests->host == NULL ? 0 : bytes;
            if (c->requests->host == NULL) work->lacking = bytes;
        }
        if (bytes > c->requests->host_bytes) work->overrun = 1;
    }
    user->host = c->requests->host;
}
