/* The driver: the kernels of a mechanism's phases one after the other, with what must cross ranks before each; backward
 * the other way round, with the adjoint after each. */
#include "run_parts.h"

#include <string.h>

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

/* ------------------------------------------------------------------------------------------------ memory */

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
    ls_plan_brought(p, r, &p->halo);
    LS_TRY(ls_arena_reserve(&r->brought, c->mechanism->name));
    ls_plan_brought(p, r, &p->halo);
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

static int is_scan(ls_crossing c)
{
    return c == LS_SCAN || c == LS_REVERSE_SCAN;
}

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
        LS_TRY(ls_place(c, 3, from, to, 1));
    }
    ls_pass p = ls_placed(c);
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
            LS_TRY(ls_ring_forward(c, &p, phase, i));
        else
            LS_TRY(ls_run_kernel(c->mechanism, &p, phases, i, 0));
    }
    return z->on ? ls_put_back(c, 1, &c->pass.out, &z->out) : LS_OK;
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
    if (z->on) LS_TRY(ls_place(c, 1, &c->pass.dout, &z->dout, 0));
    ls_pass p = ls_placed(c);
    int last = 0, whole = 0;
    while (phases[last].name != NULL) last++;
    for (int i = last - 1; i >= 0; i--) {
        const ls_phase *phase = &phases[i];
        if (!ls_is_needed(&p, phase) || phase->constant || is_needless(c, phase)) continue;
        if (phase->crossing == LS_RING)
            LS_TRY(ls_ring_backward(c, &p, phase, i));
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
        LS_TRY(ls_put_back(c, 3, home, away));
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
