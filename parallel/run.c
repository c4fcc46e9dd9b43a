#include "run.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------ who holds what */

static ls_span zigzag(int64_t length, int size, int rank, int half)
{
    const int64_t chunks = 2 * (int64_t)size, c = half ? chunks - 1 - rank : rank;
    const int64_t lo = length / chunks * c + ls_min(c, length % chunks);
    return (ls_span){0, lo, length / chunks + (c < length % chunks)};
}

/* The block of keys that `rank` owns: its rows, and their global positions. */
static void describe_block(const ls_call *c, int rank, ls_block *block)
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

/* A block on the wire: k, v (unless only keys visit), notes, pads. */
static int64_t block_reals(const ls_pass *p, const ls_phase *ring, int64_t n)
{
    return (ring->keys_only ? 1 : 2) * p->B * p->H * n * p->d + (ring->notes != NULL ? ring->notes(p) : 0);
}

static size_t block_bytes(const ls_pass *p, const ls_phase *ring, int64_t n)
{
    if (n == 0) return 0;
    return (size_t)block_reals(p, ring, n) * sizeof(ls_real) + (p->own.pad != NULL ? (size_t)(p->B * n) : 0);
}

/* The phase of this call with such a crossing, or NULL. */
static const ls_phase *find_crossing(const ls_pass *p, const ls_phase *phases, ls_crossing kind)
{
    for (; phases->name != NULL; phases++)
        if (phases->crossing == kind && ls_is_needed(p, phases)) return phases;
    return NULL;
}

static int is_scan(ls_crossing c)
{
    return c == LS_SCAN || c == LS_REVERSE_SCAN;
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

/* The pass as the kernels see it: in its zigzag place, where that is on. */
static ls_pass placed(const ls_call *c)
{
    ls_pass p = c->pass;
    const ls_placement *z = &c->placement;
    describe_block(c, c->keys->rank, &p.own);
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
        c->ring.block[i] = ls_arena_take(work, as_it_is || (alone && i == 1) ? 0 : block_bytes(p, ring, n));
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

/* The rows that lists brought, in memory of their own: how many is not known before the phases before have run. */
static void plan_brought(const ls_pass *p, ls_requests *r, ls_block *halo)
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
    plan_brought(p, c->requests, &p->halo);
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
    ls_pass p = placed(c);
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

/* ------------------------------------------------------------------------------------------------ kernels */

void ls_plan_mechanism(const ls_mechanism *m, ls_pass *p, ls_arena *saved, ls_arena *work)
{
    void (*plan)(ls_pass *, ls_arena *, ls_arena *) = p->queue == NULL ? m->plan : m->cuda->plan;
    if (plan != NULL) plan(p, saved, work);
}

ls_status ls_run_kernel(const ls_mechanism *m, ls_pass *p, const ls_phase *phases, int i, int backward)
{
    const ls_phase *phase = &phases[i];
    ls_status (*kernel)(ls_pass *, int) = backward ? phase->backward : phase->forward;
    if (kernel == NULL || p->queue == NULL) return kernel == NULL ? LS_OK : kernel(p, i);
    for (const ls_cuda_kernel *k = m->cuda->kernel; k->phase != NULL; k++)
        if (strcmp(k->phase, phase->name) == 0 && (backward ? k->backward : k->forward) != NULL) {
            const ls_status status = (backward ? k->backward : k->forward)(p, i);
            if (status != LS_ERR_UNSUPPORTED) return status;
            LS_FAIL(
                status,
                "%s: a head dimension of %lld with these options is too large for this GPU: make them smaller, or use "
                "the CPU: %s",
                m->name, (long long)p->d, ls_last_error());
        }
    LS_FAIL(LS_ERR_INTERNAL, "%s: phase '%s' has no CUDA kernel: please report this", m->name, phase->name);
}

/* ------------------------------------------------------------------------------------------------ ring */

void ls_clear_view(ls_context *ctx, ls_view v, int64_t B, int64_t H, int64_t n, int64_t d)
{
    ls_memory_of(&ctx->exchange)->clear_rows(ctx->queue, ls_rows_of_view(v, B, H, d), n, NULL);
}

void ls_clean_block(ls_context *ctx, ls_view from, int64_t B, int64_t H, int64_t n, int64_t d, const uint8_t *pad,
                    ls_real *to)
{
    const ls_memory *memory = ls_memory_of(&ctx->exchange);
    const ls_rows rows = ls_rows_of_view(ls_heads_apart(to, H, n, d), B, H, d);
    memory->copy_rows(ctx->queue, rows, ls_rows_of_view(from, B, H, d), n);
    if (pad != NULL) memory->clear_rows(ctx->queue, rows, n, pad);
}

/* The block of `rank` as it lies in a buffer. */
static void see_block(const ls_call *c, const ls_pass *p, const ls_phase *ring, int rank, char *buffer, ls_block *block)
{
    describe_block(c, rank, block);
    const int64_t reals = p->B * p->H * block->n * p->d;
    ls_real *k = (ls_real *)(void *)buffer, *v = k + reals;
    block->k = ls_heads_apart(k, p->H, block->n, p->d);
    block->v = ls_heads_apart(ring->keys_only ? NULL : v, p->H, block->n, p->d);
    block->note = ring->keys_only ? v : v + reals;
    block->pad = p->own.pad == NULL ? NULL : (const uint8_t *)(k + block_reals(p, ring, block->n));
}

/* This rank's block, with zeros where it is padded, in block[0]; where nobody else is and nothing is padded, or
 * rows are 0 there already, as it is. */
static void start_ring(const ls_call *c, ls_pass *p, const ls_phase *ring)
{
    p->visit = p->own;
    if (c->keys->size == 1 && (p->own.pad == NULL || p->narrow)) return;
    see_block(c, p, ring, c->keys->rank, c->ring.block[0], &p->visit);
    if (p->own.n == 0) return;
    const ls_memory *memory = ls_memory_of(&c->ctx->exchange);
    ls_clean_block(c->ctx, p->own.k, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.k.p);
    if (!ring->keys_only) ls_clean_block(c->ctx, p->own.v, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.v.p);
    if (ring->notes != NULL)
        memory->copy(c->ctx->queue, p->visit.note, p->own.note, (size_t)ring->notes(p) * sizeof *p->own.note);
    if (p->own.pad != NULL)
        memory->copy(c->ctx->queue, (void *)(uintptr_t)p->visit.pad, p->own.pad, (size_t)(p->B * p->own.n));
}

/* Sends the visiting block on and asks for the one before it. `left`: steps after this one. */
static ls_status pass_block(ls_call *c, const ls_pass *p, const ls_phase *ring, int owner, char *here, char *next,
                            ls_pending *pending)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, before = (owner + size - 1) % size;
    ls_block mine, coming;
    describe_block(c, owner, &mine);
    describe_block(c, before, &coming);
    x->traffic.predicted[LS_RING] += block_bytes(p, ring, mine.n);
    LS_TRY(ls_exchange_add(x, next, block_bytes(p, ring, coming.n), (rank + size - 1) % size, 1));
    LS_TRY(ls_exchange_add(x, here, block_bytes(p, ring, mine.n), (rank + 1) % size, 0));
    return ls_exchange_begin(x, LS_RING, pending);
}

static ls_status ring_forward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    start_ring(c, p, phase);
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, phase, owner, here, &p->visit);
        if (more) LS_TRY(pass_block(c, p, phase, owner, here, next, &x->pending));
        const ls_status status = ls_run_kernel(c->mechanism, p, phase - i, i, 0); /* while the next block travels */
        if (more) LS_TRY(ls_exchange_end(x, &x->pending));
        LS_TRY(status);
        char *swap = here;
        here = next, next = swap;
    }
    return LS_OK;
}

/* dk and dv travel one step behind their block: what this rank adds is made while the sum so far is on its way here. */
static ls_status ring_backward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, right = (rank + 1) % size, left = (rank + size - 1) % size;
    const int64_t per_row = 2 * p->B * p->H * p->d;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    ls_real *making = c->ring.gradient[0], *arriving = c->ring.gradient[1], *leaving = c->ring.gradient[2];
    const ls_memory *memory = ls_memory_of(x);
    start_ring(c, p, phase);
    if (size == 1) {
        p->visit.dk = p->own.dk, p->visit.dv = p->own.dv;
        if (!p->narrow) ls_clear_view(c->ctx, p->own.dk, p->B, p->H, p->own.n, p->d);
        if (!p->narrow) ls_clear_view(c->ctx, p->own.dv, p->B, p->H, p->own.n, p->d);
        return ls_run_kernel(c->mechanism, p, phase - i, i, 1);
    }
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, phase, owner, here, &p->visit);
        if (more) LS_TRY(pass_block(c, p, phase, owner, here, next, &x->pending));
        const int64_t n = p->visit.n, reals = per_row * n;
        p->visit.dk = ls_heads_apart(making, p->H, n, p->d);
        p->visit.dv = ls_heads_apart(making + reals / 2, p->H, n, p->d);
        memory->zero(c->ctx->queue, making, (size_t)reals * sizeof *making);
        const ls_status status = ls_run_kernel(c->mechanism, p, phase - i, i, 1);
        if (step > 0) { /* the sum so far, from the rank that had this block before */
            LS_TRY(ls_exchange_end(x, &x->sums));
            const ls_rows sum = {(char *)making, reals * (int64_t)sizeof *making, 1, 1, 0, 0, 0};
            ls_rows other = sum;
            other.p = (char *)arriving;
            memory->add_rows(c->ctx->queue, sum, other, 1);
        }
        if (more) LS_TRY(ls_exchange_end(x, &x->pending));
        LS_TRY(status);  /* with no message left open */
        ls_block coming; /* the gradient that the left rank has just made: of the block that comes here next */
        describe_block(c, (owner + size - 1) % size, &coming);
        ls_real *swap = leaving;
        leaving = making, making = swap;
        x->traffic.predicted[LS_RING] += (uint64_t)reals * sizeof *leaving;
        LS_TRY(ls_exchange_add(x, arriving, (size_t)(per_row * coming.n) * sizeof *arriving, left, 1));
        LS_TRY(ls_exchange_add(x, leaving, (size_t)reals * sizeof *leaving, right, 0));
        LS_TRY(ls_exchange_begin(x, LS_RING, &x->sums));
        char *swap_block = here;
        here = next, next = swap_block;
    }
    LS_TRY(ls_exchange_end(x, &x->sums)); /* home again: this rank's own block has been everywhere */
    const ls_real *const home[] = {arriving, arriving + per_row / 2 * p->own.n};
    const ls_view to[] = {p->own.dk, p->own.dv};
    for (int t = 0; t < 2; t++)
        memory->copy_rows(
            c->ctx->queue, ls_rows_of_view(to[t], p->B, p->H, p->d),
            ls_rows_of_view(ls_heads_apart((ls_real *)(uintptr_t)home[t], p->H, p->own.n, p->d), p->B, p->H, p->d),
            p->own.n);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ placement */

static ls_status place(ls_call *c, int tensors, const ls_view *from, const ls_view *to, int with_pads)
{
    const ls_pass *p = &c->pass;
    const ls_placement *z = &c->placement;
    const int64_t n = c->placement.want[2 * c->keys->rank].n + c->placement.want[2 * c->keys->rank + 1].n;
    ls_rows a[6], b[6];
    int count = 0;
    for (int i = 0; i < tensors; i++, count++) {
        a[count] = ls_rows_of_view(from[i], p->B, p->H, p->d);
        b[count] = ls_rows_of_view(to[i], p->B, p->H, p->d);
    }
    if (with_pads && p->pad_q != NULL) {
        a[count] = ls_rows_of_pad(p->pad_q, p->B, p->T);
        b[count++] = ls_rows_of_pad(z->pad_q, p->B, n);
    }
    if (with_pads && p->own.pad != NULL) {
        a[count] = ls_rows_of_pad(p->own.pad, p->B, p->S);
        b[count++] = ls_rows_of_pad(z->pad_k, p->B, n);
    }
    return ls_fetch(&c->ctx->exchange, c->keys, z->want, a, b, count);
}

static ls_status put_back(ls_call *c, int tensors, const ls_view *home, const ls_view *away)
{
    const ls_pass *p = &c->pass;
    ls_rows a[4], b[4];
    for (int i = 0; i < tensors; i++) {
        ls_clear_view(c->ctx, home[i], p->B, p->H, p->T, p->d); /* each row comes back once: adding to 0 is moving */
        a[i] = ls_rows_of_view(home[i], p->B, p->H, p->d);
        b[i] = ls_rows_of_view(away[i], p->B, p->H, p->d);
    }
    return ls_fetch_adjoint(&c->ctx->exchange, c->keys, c->placement.want, a, b, tensors);
}

/* ------------------------------------------------------------------------------------------------ fetch, gather */

/* The tensors of a fetch: own rows and halo rows, or their gradients. */
static int fetched(const ls_pass *p, const ls_phase *phase, int gradients, ls_rows *own, ls_rows *halo)
{
    const ls_block *a = &p->own, *b = &p->halo;
    int n = 0;
    if (phase->fetches & LS_KEYS) {
        own[n] = ls_rows_of_view(gradients ? a->dk : a->k, p->B, p->H, p->d);
        halo[n++] = ls_rows_of_view(gradients ? b->dk : b->k, p->B, p->H, p->d);
    }
    if (phase->fetches & LS_VALUES) {
        own[n] = ls_rows_of_view(gradients ? a->dv : a->v, p->B, p->H, p->d);
        halo[n++] = ls_rows_of_view(gradients ? b->dv : b->v, p->B, p->H, p->d);
    }
    if (phase->fetches & LS_EXTRA) {
        own[n] = ls_rows_of_view(gradients ? a->dextra : a->extra, p->B, 1, p->extra_width);
        halo[n++] = ls_rows_of_view(gradients ? b->dextra : b->extra, p->B, 1, p->extra_width);
    }
    if (!gradients && a->pad != NULL) {
        own[n] = ls_rows_of_pad(a->pad, p->B, p->S);
        halo[n++] = ls_rows_of_pad(b->pad, p->B, b->n);
    }
    return n;
}

void ls_clean_halo(ls_context *ctx, const ls_pass *p, const ls_phase *phase)
{
    const ls_memory *memory = ls_memory_of(&ctx->exchange);
    const ls_block *x = &p->halo;
    if (x->pad == NULL) return;
    if (phase->fetches & LS_KEYS) memory->clear_rows(ctx->queue, ls_rows_of_view(x->k, p->B, p->H, p->d), x->n, x->pad);
    if (phase->fetches & LS_VALUES)
        memory->clear_rows(ctx->queue, ls_rows_of_view(x->v, p->B, p->H, p->d), x->n, x->pad);
    if (phase->fetches & LS_EXTRA)
        memory->clear_rows(ctx->queue, ls_rows_of_view(x->extra, p->B, 1, p->extra_width), x->n, x->pad);
}

static ls_status fetch(ls_call *c, const ls_pass *p, const ls_phase *phase)
{
    ls_rows own[4], halo[4];
    const int n = fetched(p, phase, 0, own, halo);
    if (c->reach.keys_at_home) return LS_OK;
    LS_TRY(ls_fetch(&c->ctx->exchange, c->keys, c->reach.want, own, halo, n));
    ls_clean_halo(c->ctx, p, phase);
    return LS_OK;
}

static ls_status fetch_adjoint(ls_call *c, const ls_pass *p, const ls_phase *phase)
{
    ls_rows own[4], halo[4];
    const int n = fetched(p, phase, 1, own, halo), overwrite = !phase->adds;
    if (c->reach.gradients_at_home) return LS_OK;
    if (overwrite && phase->fetches & LS_KEYS) ls_clear_view(c->ctx, p->own.dk, p->B, p->H, p->S, p->d);
    if (overwrite && phase->fetches & LS_VALUES) ls_clear_view(c->ctx, p->own.dv, p->B, p->H, p->S, p->d);
    if (overwrite && phase->fetches & LS_EXTRA) ls_clear_view(c->ctx, p->own.dextra, p->B, 1, p->S, p->extra_width);
    return ls_fetch_adjoint(&c->ctx->exchange, c->keys, c->reach.want, own, halo, n);
}

/* ------------------------------------------------------------------------------------------------ fetch of lists */

/* Keys, values and pads, or the gradients of keys and values: this rank's rows, and those that the lists bring. */
static int listed(const ls_pass *p, int gradients, ls_rows *own, ls_rows *brought)
{
    const ls_block *a = &p->own, *b = &p->halo;
    own[0] = ls_rows_of_view(gradients ? a->dk : a->k, p->B, p->H, p->d);
    own[1] = ls_rows_of_view(gradients ? a->dv : a->v, p->B, p->H, p->d);
    brought[0] = ls_rows_of_view(gradients ? b->dk : b->k, 1, 1, p->d);
    brought[1] = ls_rows_of_view(gradients ? b->dv : b->v, 1, 1, p->d);
    if (gradients || a->pad == NULL) return 2;
    own[2] = ls_rows_of_pad(a->pad, p->B, p->S);
    brought[2] = ls_rows_of_pad(b->pad, 1, b->n);
    return 3;
}

/* Local: what this rank wants, and memory for it. */
static ls_status ask(ls_call *c, ls_pass *p, const ls_phase *phase)
{
    ls_requests *r = c->requests;
    int64_t intervals = 0;
    for (int64_t g = 0; g < p->B * p->H; g++) intervals += phase->wanted(p, g / p->H, g % p->H, NULL);
    LS_TRY(ls_requests_begin(r, c->keys->size, p->B * p->H, p->H, intervals));
    for (int64_t g = 0; g < p->B * p->H; g++)
        r->list_at[g + 1] = r->list_at[g] + phase->wanted(p, g / p->H, g % p->H, r->list + r->list_at[g]);
    ls_requests_cut(c->keys, r);
    r->brought.device = c->ctx->ops;
    ls_arena_measure(&r->brought);
    plan_brought(p, r, &p->halo);
    LS_TRY(ls_arena_reserve(&r->brought, c->mechanism->name));
    plan_brought(p, r, &p->halo);
    if (p->queue == NULL) return LS_OK;
    return c->ctx->ops->to_device(p->queue, (void *)(uintptr_t)p->halo.first, r->first,
                                  (size_t)(r->groups + 1) * sizeof *r->first);
}

static ls_status fetch_lists(ls_call *c, ls_pass *p, const ls_phase *phase)
{
    ls_rows own[3], brought[3];
    const size_t row = 2 * (size_t)p->d * sizeof(ls_real) + (p->own.pad != NULL);
    LS_TRY(ls_requests_exchange(c->ctx, c->requests, row, ask(c, p, phase)));
    const int n = listed(p, 0, own, brought);
    LS_TRY(ls_request(&c->ctx->exchange, c->keys, c->requests, own, brought, n));
    for (int i = 0; p->halo.pad != NULL && i < 2; i++)
        ls_memory_of(&c->ctx->exchange)
            ->clear_rows(c->ctx->queue, ls_rows_of_view(i ? p->halo.v : p->halo.k, 1, 1, p->d), p->halo.n, p->halo.pad);
    return LS_OK;
}

static ls_status fetch_lists_adjoint(ls_call *c, const ls_pass *p, const ls_phase *phase)
{
    ls_rows own[3], brought[3];
    const int n = listed(p, 1, own, brought);
    if (!phase->adds) ls_clear_view(c->ctx, p->own.dk, p->B, p->H, p->S, p->d);
    if (!phase->adds) ls_clear_view(c->ctx, p->own.dv, p->B, p->H, p->S, p->d);
    return ls_request_adjoint(&c->ctx->exchange, c->keys, c->requests, own, brought, n);
}

/* ------------------------------------------------------------------------------------------------ walk */

/* What a phase makes for the ranks after this one is not made where there are none. */
static int is_needless(const ls_call *c, const ls_phase *phase)
{
    return phase->feeds_scan > 0 &&
           (phase[phase->feeds_scan].crossing == LS_SCAN ? c->keys->rank == c->keys->size - 1 : c->keys->rank == 0);
}

static ls_status cross(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    ls_summary *s = &p->summary[i];
    ls_collection *g = &p->gathered[i];
    if (phase->monoid != NULL) s->monoid = phase->monoid(p); /* its decays are known by now */
    if (phase->crossing == LS_REDUCE) return ls_reduce(x, s->monoid, s->sent, s->got);
    if (is_scan(phase->crossing)) return ls_scan(x, s->monoid, phase->crossing == LS_REVERSE_SCAN, s->sent, s->got);
    if (phase->crossing == LS_FETCH) return phase->wanted != NULL ? fetch_lists(c, p, phase) : fetch(c, p, phase);
    if (phase->crossing == LS_GATHER) return ls_gather(x, c->piece[i], g->mine, g->all);
    return LS_OK;
}

static ls_status cross_adjoint(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    ls_summary *s = &p->summary[i];
    ls_collection *g = &p->gathered[i];
    if (phase->monoid != NULL) s->monoid = phase->monoid(p);
    if (phase->crossing == LS_REDUCE) return ls_reduce_adjoint(x, s->monoid, s->sent, s->got, s->dgot, s->dsent);
    if (is_scan(phase->crossing))
        return ls_scan_adjoint(x, s->monoid, phase->crossing == LS_REVERSE_SCAN, s->sent, s->got, s->dgot, s->dsent);
    if (phase->crossing == LS_FETCH)
        return phase->wanted != NULL ? fetch_lists_adjoint(c, p, phase) : fetch_adjoint(c, p, phase);
    if (phase->crossing == LS_GATHER) return ls_gather_adjoint(x, c->piece[i], g->dall, g->dmine);
    return LS_OK;
}

static int sees_queries(const ls_phase *phase, int backward)
{
    return (backward ? phase->backward : phase->forward) != NULL && !phase->keys_alone;
}

static void leave_for_later(ls_call *c)
{
    c->ctx->exchange.meanwhile = c->meanwhile;
    c->ctx->exchange.meanwhile_of = c->meanwhile_of;
}

static ls_status walk_forward(ls_call *c)
{
    const ls_phase *phases = c->mechanism->phases[c->pass.pattern];
    const ls_placement *z = &c->placement;
    leave_for_later(c);
    if (z->on) {
        ls_exchange_work(&c->ctx->exchange);
        const ls_view from[] = {c->pass.q, c->pass.own.k, c->pass.own.v}, to[] = {z->q, z->k, z->v};
        LS_TRY(place(c, 3, from, to, 1));
    }
    ls_pass p = placed(c);
    for (int i = 0; phases[i].name != NULL; i++) {
        const ls_phase *phase = &phases[i];
        if (!ls_is_needed(&p, phase)) continue;
        if (is_needless(c, phase)) {
            const ls_summary *s = &p.summary[i + phase->feeds_scan];
            ls_memory_of(&c->ctx->exchange)->identity(p.queue, s->monoid, s->sent);
            continue;
        }
        LS_TRY(cross(c, &p, phase, i));
        if (sees_queries(phase, 0)) ls_exchange_work(&c->ctx->exchange);
        if (phase->crossing == LS_RING)
            LS_TRY(ring_forward(c, &p, phase, i));
        else
            LS_TRY(ls_run_kernel(c->mechanism, &p, phases, i, 0));
    }
    return z->on ? put_back(c, 1, &c->pass.out, &z->out) : LS_OK;
}

/* dq is whole once phase i has run: those before do nothing to it. In a zigzag placement it is not at home yet. */
static int is_dq_whole(const ls_call *c, const ls_pass *p, const ls_phase *phases, int i)
{
    while (--i >= 0) {
        const ls_phase *phase = &phases[i];
        if (ls_is_needed(p, phase) && !phase->constant && !is_needless(c, phase) && sees_queries(phase, 1)) return 0;
    }
    return !c->placement.on;
}

static ls_status walk_backward(ls_call *c)
{
    const ls_phase *phases = c->mechanism->phases[c->pass.pattern];
    const ls_placement *z = &c->placement;
    if (z->on) LS_TRY(place(c, 1, &c->pass.dout, &z->dout, 0));
    ls_pass p = placed(c);
    int last = 0, whole = 0;
    while (phases[last].name != NULL) last++;
    for (int i = last - 1; i >= 0; i--) {
        const ls_phase *phase = &phases[i];
        if (!ls_is_needed(&p, phase) || phase->constant || is_needless(c, phase)) continue;
        if (phase->crossing == LS_RING)
            LS_TRY(ring_backward(c, &p, phase, i));
        else
            LS_TRY(ls_run_kernel(c->mechanism, &p, phases, i, 1));
        if (!whole && is_dq_whole(c, &p, phases, i)) {
            whole = 1;
            leave_for_later(c);
        }
        LS_TRY(cross_adjoint(c, &p, phase, i));
    }
    if (z->on) {
        const ls_view home[] = {c->pass.dq, c->pass.own.dk, c->pass.own.dv}, away[] = {z->dq, z->dk, z->dv};
        LS_TRY(put_back(c, 3, home, away));
    }
    if (!whole) leave_for_later(c);
    return LS_OK;
}

/* What is left is done now, or never if the walk has failed: it belongs to the caller. */
static ls_status end_walk(ls_call *c, ls_status status)
{
    if (status != LS_OK) c->ctx->exchange.meanwhile = NULL;
    ls_exchange_work(&c->ctx->exchange);
    return status;
}

ls_status ls_run_forward(ls_call *c)
{
    return end_walk(c, walk_forward(c));
}

ls_status ls_run_backward(ls_call *c)
{
    return end_walk(c, walk_backward(c));
}
