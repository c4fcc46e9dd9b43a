/* Incremental decoding. A step is the forward pass of a one-token shard whose left neighbour is the saved state:
 *
 *   scan    the summary of all tokens before is the state; it grows by what the token sends
 *   reduce  of the source alone: done once by ls_state_source; otherwise as usual (it is small)
 *   ring    keys and values so far are a cache, spread over ranks: token t lies on rank t mod P, a source on its
 *           owners. Each rank looks at its own part; the mechanism's next phases combine what they saw
 *   fetch   the last keys and values within reach are kept, on every rank
 *   gather  what tokens gave so far is a list, which grows by what this one gives; item i lies on rank i mod P
 *
 * A phase that is not needed in a call is left out as in the forward pass; summaries are kept for all that might be.
 * So no mechanism writes a step of its own beyond its list of phases. */
#include "attention.h"

#include <stdlib.h>

/* The last rows that were fed, (B,capacity) of each: they move to the front when the end is reached. */
typedef struct window {
    int64_t reach, capacity; /* the most rows a token looks at; 0: no phase fetches */
    int64_t held, first;     /* rows held, the position of the first */
    int fetches;
    ls_real *k, *v, *extra; /* (B,capacity,E or extra_width) */
    uint8_t *pad;           /* (B,capacity) */
} window;

/* What a phase keeps from token to token: a summary, or a list of what was gathered. */
typedef struct kept {
    ls_monoid monoid;
    ls_real *summary;     /* NULL: none */
    ls_real *list;        /* [items][B][item], those of this rank */
    int64_t item, listed; /* reals of one item of one batch row, reals in the list */
    int64_t given;        /* items that tokens gave, on all ranks */
} kept;

struct ls_state {
    ls_attention *attention;
    int64_t batch, max_length, tokens; /* tokens fed so far */
    uint64_t order;                    /* the signature of all reorders: ranks whose rows differ are found by a step */
    int sourced;
    ls_arena arena;           /* summaries and, for self attention, cache, window and lists */
    kept kept[LS_MAX_PHASES]; /* by phase */
    window recent;
    ls_arena source;    /* cross attention: the cache, of the source's length */
    ls_real *k, *v;     /* (B,H,rows,d) */
    uint8_t *pad;       /* (B,rows) */
    int64_t rows, used; /* of this rank */
    int64_t source_lo, source_length;
};

static int is_cross(const ls_attention *a)
{
    return a->options.pattern == LS_NC || a->options.pattern == LS_CC;
}

static const ls_phase *phases_of(const ls_attention *a)
{
    return a->mechanism->step[a->options.pattern];
}

/* The summary that arrives before phase i is kept from call to call. */
static int keeps(const ls_attention *a, const ls_phase *phases, int i)
{
    if (phases[i].crossing == LS_SCAN) return 1;
    return is_cross(a) && phases[i].crossing == LS_REDUCE && i > 0 && phases[i - 1].of_source;
}

/* In this call; p NULL: in any. */
static int rings(const ls_pass *p, const ls_phase *phases)
{
    for (; phases->name != NULL; phases++)
        if (phases->crossing == LS_RING && (p == NULL || ls_is_needed(p, phases))) return 1;
    return 0;
}

static void plan_cache(ls_state *s, ls_arena *arena)
{
    const int64_t E = s->attention->options.embed_dim;
    s->k = ls_take(arena, s->batch * s->rows * E);
    s->v = ls_take(arena, s->batch * s->rows * E);
    s->pad = ls_arena_take(arena, (size_t)(s->batch * s->rows));
}

static void plan_window(ls_state *s, const ls_pass *p, const ls_phase *phase, ls_arena *arena)
{
    window *w = &s->recent;
    const int64_t E = s->attention->options.embed_dim;
    w->fetches = phase->fetches;
    if (w->reach == 0) /* every token's reach is asked for: it need not be the same for all */
        for (int64_t t = 0; t < s->max_length; t++)
            w->reach = ls_max(w->reach, t + 1 - ls_max(0, phase->reach(p, t, 1).lo));
    w->capacity = ls_min(2 * w->reach, s->max_length);
    const int64_t rows = s->batch * w->capacity;
    w->k = ls_take(arena, phase->fetches & LS_KEYS ? rows * E : 0);
    w->v = ls_take(arena, phase->fetches & LS_VALUES ? rows * E : 0);
    w->extra = ls_take(arena, phase->fetches & LS_EXTRA ? rows * p->extra_width : 0);
    w->pad = ls_arena_take(arena, 2 * (size_t)rows); /* and once more: those of the halo */
}

static void plan_state(ls_state *s, ls_arena *arena)
{
    const ls_attention *a = s->attention;
    const ls_phase *phases = phases_of(a);
    ls_pass p;
    ls_pass_begin(a, s->batch, 1, 1, NULL, &p);
    p.all_queries = p.all_keys = s->max_length;
    for (int i = 0; phases[i].name != NULL; i++) {
        if (keeps(a, phases, i)) {
            s->kept[i].monoid = phases[i].monoid(&p);
            s->kept[i].summary = ls_take(arena, ls_monoid_size(s->kept[i].monoid));
        }
        if (phases[i].crossing == LS_FETCH) plan_window(s, &p, &phases[i], arena);
        if (phases[i].crossing != LS_GATHER) continue;
        s->kept[i].item = phases[i].item(&p);
        const int64_t reals = s->batch * s->kept[i].item, items = phases[i].piece(&p, 0, s->max_length) / reals;
        const int64_t ranks = a->ctx->exchange.comm.size;
        s->kept[i].list = ls_take(arena, (items + ranks - 1) / ranks * reals);
    }
    if (!is_cross(a) && rings(NULL, phases)) plan_cache(s, arena);
}

static ls_status create(ls_attention *a, int64_t batch, int64_t max_length, ls_state **state)
{
    const ls_comm *comm = &a->ctx->exchange.comm;
    const char *name = a->mechanism->name;
    if (a->mechanism->step[a->options.pattern] == NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: step of %s attention is not supported", name,
                ls_pattern_name(a->options.pattern));
    if (a->mechanism->check_step != NULL) LS_TRY(a->mechanism->check_step(&a->options));
    if (batch <= 0 || max_length < 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a state needs a positive batch (%lld) and a length (%lld) of 0 or more", name,
                (long long)batch, (long long)max_length);
    if (max_length > INT32_MAX)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a state of %lld tokens: at most %d", name, (long long)max_length, INT32_MAX);
    LS_TRY(ls_check_size(name, batch, max_length, a->options.embed_dim));
    LS_TRY(ls_check_rows(name, batch, 1, ls_rows_apart(a, batch)));
    ls_state *s = *state = calloc(1, sizeof *s);
    if (s == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for a state", name);
    s->attention = a;
    s->batch = batch;
    s->max_length = max_length;
    s->order = LS_SIGNATURE;
    const int cached = !is_cross(a) && rings(NULL, phases_of(a));
    s->arena.device = s->source.device = a->ctx->ops;
    s->rows = cached ? (max_length + comm->size - 1) / comm->size : 0;
    ls_arena_measure(&s->arena);
    plan_state(s, &s->arena);
    LS_TRY(ls_arena_reserve(&s->arena, name));
    plan_state(s, &s->arena);
    LS_TRY(ls_arena_check(&s->arena, name));
    for (int i = 0; i < LS_MAX_PHASES; i++)
        if (s->kept[i].summary != NULL)
            ls_memory_of(&a->ctx->exchange)->identity(a->ctx->queue, s->kept[i].monoid, s->kept[i].summary);
    return LS_OK;
}

ls_status ls_state_create(ls_attention *attention, int64_t batch, int64_t max_length, ls_state **state)
{
    if (state != NULL) *state = NULL;
    LS_NEED(attention, "state: attention is NULL");
    const int64_t sizes[] = {batch, max_length};
    ls_state *made = NULL;
    ls_status status = state != NULL ? create(attention, batch, max_length, &made)
                                     : ls_fail(LS_ERR_ARGUMENT, "state: the place for it is NULL");
    status =
        ls_agree_alike(attention->ctx, status, attention->mechanism->name, "options, batch and max_length of a state",
                       ls_sign(attention->signature, sizes, sizeof sizes));
    if (status != LS_OK) {
        ls_state_free(made);
        made = NULL;
    }
    if (state != NULL) *state = made;
    return status;
}

void ls_state_free(ls_state *state)
{
    if (state == NULL) return;
    ls_arena_free(&state->arena);
    ls_arena_free(&state->source);
    free(state);
}

size_t ls_state_bytes(const ls_state *state)
{
    return sizeof *state + state->arena.capacity + state->source.capacity;
}

/* ------------------------------------------------------------------------------------------------ memory of a call */

typedef struct buffers {
    ls_real *in[4], *o, *active;
} buffers;

/* Work memory of a step or of the source: projected rows, what is on its way, the mechanism's own. */
static void plan_call(const ls_attention *a, ls_pass *p, buffers *m, ls_arena *arena)
{
    const ls_phase *phases = phases_of(a);
    if (ls_is_layer(a)) {
        for (int i = 0; i < a->form.inputs; i++)
            m->in[i] = ls_take(arena, p->B * (i == Q_PROJ || i == EXTRA_PROJ ? p->T : p->S) * a->form.input[i].width);
        m->o = ls_take(arena, p->B * p->T * a->form.core_width);
        m->active = ls_take(arena, a->form.gelu ? p->B * p->T * a->form.core_width : 0);
        p->out = ls_view_out(a, m->o, p->B, p->T);
        if (a->form.inputs > 0) {
            p->q = ls_view_of(a, m->in[Q_PROJ], p->B, p->T);
            p->own.k = ls_view_of(a, m->in[K_PROJ], p->B, p->S);
            p->own.v = ls_view_of(a, m->in[V_PROJ], p->B, p->S);
        }
        if (ls_has_projection(a, EXTRA_PROJ))
            p->own.extra = ls_view_rows(a, m->in[EXTRA_PROJ], p->B, p->T, p->extra_width);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (phases[i].crossing != LS_GATHER || !ls_is_needed(p, &phases[i])) continue;
        p->gathered[i].count = p->own.spans ? phases[i].piece(p, p->own.span[0].lo, p->own.span[0].n) : 0;
        p->gathered[i].mine = ls_take(arena, p->gathered[i].count);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (phases[i].monoid == NULL || !ls_is_needed(p, &phases[i])) continue;
        ls_summary *s = &p->summary[i];
        s->monoid = phases[i].monoid(p);
        const size_t bytes = (size_t)ls_monoid_size(s->monoid) * sizeof *s->sent;
        ls_exchange_plan(&a->ctx->exchange, bytes, bytes);
        s->sent = ls_take(arena, ls_monoid_size(s->monoid));
        s->got = ls_take(arena, ls_monoid_size(s->monoid));
    }
    ls_plan_mechanism(a->mechanism, p, arena, arena);
}

static ls_status reserve_call(const ls_attention *a, ls_pass *p, buffers *m)
{
    ls_arena *work = &a->ctx->work;
    ls_arena_measure(work);
    ls_exchange_plan_begin(&a->ctx->exchange);
    plan_call(a, p, m, work);
    LS_TRY(ls_exchange_reserve(&a->ctx->exchange));
    LS_TRY(ls_arena_reserve(work, a->mechanism->name));
    plan_call(a, p, m, work);
    return ls_arena_check(work, a->mechanism->name);
}

/* ------------------------------------------------------------------------------------------------ source */

static ls_status check_whose(const ls_attention *a, const ls_state *s)
{
    LS_NEED(s, "%s: the state is NULL", a->mechanism->name);
    if (s->attention != a) LS_FAIL(LS_ERR_ARGUMENT, "%s: the state belongs to another attention", a->mechanism->name);
    return LS_OK;
}

/* The state stays as it is: what is refused here is refused on all ranks, and they go on with the source they have. */
static ls_status check_source(ls_attention *a, const ls_state *s, const ls_attention_shape *shape,
                              const ls_attention_io *io, const ls_real *params, ls_pass *p, buffers *m)
{
    const char *name = a->mechanism->name;
    LS_TRY(check_whose(a, s));
    LS_NEED(shape, "%s: shape is NULL", name);
    LS_NEED(io, "%s: io is NULL", name);
    LS_TRY(a->ctx->ops->enter(a->ctx->queue));
    if (!is_cross(a)) LS_FAIL(LS_ERR_ARGUMENT, "%s: only cross attention has a source", name);
    LS_TRY(ls_check_shard(a, shape->keys, "source"));
    if (shape->batch != s->batch)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the source has batch %lld, the state %lld", name, (long long)shape->batch,
                (long long)s->batch);
    LS_TRY(ls_check_size(name, s->batch, shape->keys->length, a->options.embed_dim));
    LS_TRY(ls_check_rows(name, s->batch, shape->keys->n, ls_rows_apart(a, s->batch)));
    const int64_t n = shape->keys->n;
    if (n > 0 && (io->key == NULL || (a->options.level == LS_LEVEL_CORE && io->value == NULL)))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key or value of the source is NULL", name);
    if (a->reals > 0 && params == NULL) LS_FAIL(LS_ERR_ARGUMENT, "%s: params is NULL", name);
    if (io->query_segments != NULL || io->key_segments != NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: segments are not supported in a source: give each document a state", name);
    LS_TRY(ls_check_given(a, io));
    ls_pass_begin(a, s->batch, 0, n, params, p);
    p->given_features = io->features;
    p->all_keys = shape->keys->length;
    p->own.pad = io->key_padding_mask;
    p->own.spans = 1;
    p->own.span[0] = (ls_span){0, shape->keys->lo, n};
    p->own.k = ls_view_of(a, io->key, p->B, n);
    p->own.v = ls_view_of(a, io->value != NULL ? io->value : io->key, p->B, n);
    return reserve_call(a, p, m);
}

/* The old source is gone from here on, so that the longer of the two is all the memory that is needed. Where a rank
 * lacks it no rank has a source. */
static ls_status replace_source(ls_state *s, const ls_pass *p, const ls_shard *keys)
{
    const char *name = s->attention->mechanism->name;
    s->sourced = 0;
    s->rows = s->used = rings(p, phases_of(s->attention)) ? keys->n : 0;
    s->source_lo = keys->lo;
    s->source_length = keys->length;
    ls_arena_measure(&s->source);
    plan_cache(s, &s->source);
    ls_status status = ls_arena_reserve(&s->source, name);
    if (status == LS_OK) plan_cache(s, &s->source);
    if (status == LS_OK) status = ls_arena_check(&s->source, name);
    status = ls_agree(s->attention->ctx, status);
    if (status != LS_OK) s->rows = s->used = 0; /* nothing that could be reordered */
    return status;
}

/* What must be the same on every rank, of calls that were found well. */
static uint64_t sign_source(const ls_state *s, const ls_pass *p, const ls_shard *keys)
{
    const int64_t numbers[] = {s->batch, p->own.pad != NULL, p->given_features != NULL};
    return ls_sign_shard(ls_sign(s->attention->signature, numbers, sizeof numbers), keys);
}

ls_status ls_state_source(ls_attention *a, ls_state *s, const ls_attention_shape *shape, const ls_attention_io *io,
                          const ls_real *params)
{
    LS_NEED(a, "source: attention is NULL");
    ls_pass p;
    buffers m = {0};
    const ls_status status = check_source(a, s, shape, io, params, &p, &m);
    LS_TRY(ls_agree_alike(a->ctx, status, a->mechanism->name,
                          "options, batch, shard and which optional inputs a source has",
                          status == LS_OK ? sign_source(s, &p, shape->keys) : 0));
    LS_TRY(replace_source(s, &p, shape->keys));
    const ls_phase *phases = phases_of(a);
    if (ls_is_layer(a)) {
        ls_project(a, K_PROJ, p.B * p.S, ls_reals(io->key), params, m.in[K_PROJ]);
        ls_project(a, V_PROJ, p.B * p.S, ls_reals(io->value != NULL ? io->value : io->key), params, m.in[V_PROJ]);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (!ls_is_needed(&p, &phases[i])) continue;
        if (keeps(a, phases, i)) {
            s->kept[i].monoid = phases[i].monoid(&p);
            LS_TRY(ls_alone(a->ctx,
                            ls_reduce(&a->ctx->exchange, s->kept[i].monoid, p.summary[i].sent, s->kept[i].summary)));
            p.summary[i].got = s->kept[i].summary;
        }
        if (phases[i].of_source) LS_TRY(ls_alone(a->ctx, ls_run_kernel(a->mechanism, &p, phases, i, 0)));
    }
    if (rings(&p, phases)) {
        const ls_memory *memory = ls_memory_of(&a->ctx->exchange);
        ls_clean_block(a->ctx, p.own.k, p.B, p.H, p.S, p.d, p.own.pad, s->k);
        ls_clean_block(a->ctx, p.own.v, p.B, p.H, p.S, p.d, p.own.pad, s->v);
        memory->zero(p.queue, s->pad, (size_t)(p.B * p.S));
        if (p.own.pad != NULL) memory->copy(p.queue, s->pad, p.own.pad, (size_t)(p.B * p.S));
    }
    s->sourced = 1;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ cache */

static ls_status reserve_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params,
                              const ls_real *out, ls_pass *p, buffers *m)
{
    const char *name = a->mechanism->name;
    const int core = a->options.level == LS_LEVEL_CORE;
    LS_TRY(check_whose(a, s));
    LS_NEED(io, "%s: io is NULL", name);
    LS_TRY(a->ctx->ops->enter(a->ctx->queue));
    if (io->query == NULL || out == NULL || (a->reals > 0 && params == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: query, params or out of a step is NULL", name);
    if (core && !is_cross(a) && !a->mechanism->one_input && (io->key == NULL || io->value == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key or value of a step is NULL", name);
    if (is_cross(a) && !s->sourced)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a step of cross attention needs ls_state_source first", name);
    if (!is_cross(a) && s->tokens >= s->max_length)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the state was made for %lld tokens, this is one more", name,
                (long long)s->max_length);
    if (io->query_segments != NULL || io->key_segments != NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: segments are not supported in a step: give each document a state", name);
    if (io->attn_mask != NULL || io->dropout_mask != NULL || io->need_weights || io->need_head_weights)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: attn_mask, dropout_mask and need_weights are not supported in a step", name);
    LS_TRY(ls_check_given(a, io));
    ls_pass_begin(a, s->batch, 1, is_cross(a) ? 0 : 1, params, p);
    p->step = 1;
    p->given_features = io->features;
    ls_take_masks(io, p);
    if (is_cross(a)) p->own.pad = NULL; /* it has no keys */
    p->all_queries = s->tokens + 1;
    p->all_keys = is_cross(a) ? s->source_length : s->tokens + 1;
    p->query_spans = p->own.spans = 1;
    p->query_span[0] = p->own.span[0] = (ls_span){0, s->tokens, 1};
    const ls_inputs x = ls_inputs_of(io);
    p->q = ls_view_of(a, x.q, p->B, 1);
    p->out = ls_view_out(a, out, p->B, 1);
    p->own.k = ls_view_of(a, x.k, p->B, p->S);
    p->own.v = ls_view_of(a, x.v, p->B, p->S);
    return reserve_call(a, p, m);
}

/* The token's row becomes row `at` of a view, 0 where it is padded. */
static void put_token(const ls_state *s, ls_view to, int64_t at, ls_view token, int64_t H, int64_t d,
                      const uint8_t *pad)
{
    const ls_memory *memory = ls_memory_of(&s->attention->ctx->exchange);
    ls_queue *queue = s->attention->ctx->queue;
    const ls_rows rows = ls_rows_from(ls_rows_of_view(to, s->batch, H, d), at);
    memory->copy_rows(queue, rows, ls_rows_of_view(token, s->batch, H, d), 1);
    if (pad != NULL) memory->clear_rows(queue, rows, 1, pad);
}

/* Its mask goes to pads that lie `stride` apart from one batch row to the next. */
static void put_pad(const ls_state *s, uint8_t *to, int64_t stride, const uint8_t *pad)
{
    const ls_memory *memory = ls_memory_of(&s->attention->ctx->exchange);
    ls_rows rows = ls_rows_of_pad(to, s->batch, stride);
    if (pad != NULL)
        memory->copy_rows(s->attention->ctx->queue, rows, ls_rows_of_pad(pad, s->batch, 1), 1);
    else
        memory->clear_rows(s->attention->ctx->queue, rows, 1, NULL);
}

/* The token's key and value go to the cache of the rank whose turn it is. */
static void cache_token(ls_state *s, const ls_pass *p)
{
    const ls_comm *comm = &s->attention->ctx->exchange.comm;
    if (s->tokens % comm->size != comm->rank) return;
    put_token(s, ls_heads_apart(s->k, p->H, s->rows, p->d), s->used, p->own.k, p->H, p->d, p->own.pad);
    put_token(s, ls_heads_apart(s->v, p->H, s->rows, p->d), s->used, p->own.v, p->H, p->d, p->own.pad);
    put_pad(s, s->pad + s->used, s->rows, p->own.pad);
    s->used++;
}

/* The cache as the visiting block: a source at its positions; of self attention all is in the past, so its rows may be
 * called positions 0 .. used - 1. */
static void visit_cache(const ls_state *s, ls_pass *p)
{
    p->visit = (ls_block){.k = ls_heads_apart(s->k, p->H, s->rows, p->d),
                          .v = ls_heads_apart(s->v, p->H, s->rows, p->d),
                          .pad = s->pad,
                          .n = s->rows,
                          .spans = 1,
                          .span = {{0, is_cross(s->attention) ? s->source_lo : 0, s->used}}};
}

/* ------------------------------------------------------------------------------------------------ window */

static ls_view window_view(const window *w, ls_real *rows, int64_t at, int64_t width, int64_t d)
{
    return (ls_view){rows + at * width, w->capacity * width, d, width};
}

/* Keeps the last reach - 1 rows: the one that comes makes them enough. */
static void make_room(const ls_state *s, window *w)
{
    const int64_t E = s->attention->options.embed_dim, keep = w->reach - 1, drop = w->held - keep;
    const int64_t X = ls_has_projection(s->attention, EXTRA_PROJ) ? s->attention->form.input[EXTRA_PROJ].width : 0;
    const struct {
        void *p;
        int64_t bytes; /* of a row */
    } all[] = {{w->fetches & LS_KEYS ? w->k : NULL, E * (int64_t)sizeof *w->k},
               {w->fetches & LS_VALUES ? w->v : NULL, E * (int64_t)sizeof *w->v},
               {w->fetches & LS_EXTRA ? w->extra : NULL, X * (int64_t)sizeof *w->extra},
               {w->pad, 1}};
    for (int i = 0; i < 4; i++) {
        if (all[i].p == NULL) continue;
        const int64_t bytes = all[i].bytes;
        const ls_rows rows = {all[i].p, bytes, s->batch, 1, w->capacity * bytes, 0, bytes};
        /* the window has room for twice what is kept: from and to do not overlap */
        ls_memory_of(&s->attention->ctx->exchange)
            ->copy_rows(s->attention->ctx->queue, rows, ls_rows_from(rows, drop), keep);
    }
    w->held = keep;
    w->first += drop;
}

/* The token joins the window, and what it may look at becomes the halo. */
static void fetch_recent(ls_state *s, ls_pass *p, const ls_phase *phase)
{
    window *w = &s->recent;
    const int64_t E = s->attention->options.embed_dim, X = p->extra_width;
    if (w->held == w->capacity) make_room(s, w);
    if (w->fetches & LS_KEYS) put_token(s, window_view(w, w->k, 0, E, p->d), w->held, p->own.k, p->H, p->d, NULL);
    if (w->fetches & LS_VALUES) put_token(s, window_view(w, w->v, 0, E, p->d), w->held, p->own.v, p->H, p->d, NULL);
    if (w->fetches & LS_EXTRA) put_token(s, window_view(w, w->extra, 0, X, 0), w->held, p->own.extra, 1, X, NULL);
    put_pad(s, w->pad + w->held, w->capacity, p->own.pad);
    w->held++;
    const int64_t lo = ls_max(0, phase->reach(p, s->tokens, 1).lo), at = lo - w->first, n = s->tokens + 1 - lo;
    p->halo = (ls_block){.k = window_view(w, w->k, at, E, p->d),
                         .v = window_view(w, w->v, at, E, p->d),
                         .extra = window_view(w, w->extra, at, X, 0),
                         .n = n,
                         .spans = 1,
                         .span = {{0, lo, n}}};
    /* the mask of a block is (B,n): one of its own, at the end of the pads */
    uint8_t *pad = w->pad + p->B * w->capacity;
    const ls_memory *memory = ls_memory_of(&s->attention->ctx->exchange);
    memory->copy_rows(p->queue, ls_rows_of_pad(pad, p->B, n), ls_rows_of_pad(w->pad + at, p->B, w->capacity), n);
    p->halo.pad = pad;
    ls_clean_halo(s->attention->ctx, p, phase);
}

/* ------------------------------------------------------------------------------------------------ list */

/* What the token gives joins the list, item by item on the rank whose turn it is. */
static void list_items(ls_state *s, int i, ls_collection *g)
{
    const ls_comm *comm = &s->attention->ctx->exchange.comm;
    const int64_t reals = s->batch * s->kept[i].item;
    for (int64_t at = 0; at < g->count; at += reals) {
        if (s->kept[i].given++ % comm->size != comm->rank) continue;
        ls_memory_of(&s->attention->ctx->exchange)
            ->copy(s->attention->ctx->queue, s->kept[i].list + s->kept[i].listed, g->mine + at,
                   (size_t)reals * sizeof *g->mine);
        s->kept[i].listed += reals;
    }
    g->first = comm->rank;
    g->every = comm->size;
    g->before = 0;
    g->total = s->kept[i].listed;
    g->all = s->kept[i].list;
}

/* ------------------------------------------------------------------------------------------------ step */

static ls_status cross_step(ls_attention *a, ls_state *s, ls_pass *p, const ls_phase *phases, int i)
{
    const ls_phase *phase = &phases[i];
    ls_summary *sum = &p->summary[i];
    if (phase->monoid != NULL) sum->monoid = phase->monoid(p);
    if (keeps(a, phases, i))
        sum->got = s->kept[i].summary;
    else if (phase->crossing == LS_REDUCE)
        LS_TRY(ls_reduce(&a->ctx->exchange, sum->monoid, sum->sent, sum->got));
    if (phase->crossing == LS_RING) {
        if (!is_cross(a)) cache_token(s, p);
        visit_cache(s, p);
    }
    if (phase->crossing == LS_FETCH) fetch_recent(s, p, phase);
    if (phase->crossing == LS_GATHER) list_items(s, i, &p->gathered[i]);
    return LS_OK;
}

static uint64_t sign_step(const ls_state *s, const ls_pass *p)
{
    const int64_t numbers[] = {s->batch,         s->max_length,      s->tokens,         s->source_length,
                               p->pad_q != NULL, p->own.pad != NULL, (int64_t)s->order, p->given_features != NULL};
    return ls_sign(s->attention->signature, numbers, sizeof numbers);
}

ls_status ls_attention_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params,
                            ls_real *out)
{
    LS_NEED(a, "step: attention is NULL");
    ls_pass p;
    buffers m = {0};
    const ls_status status = reserve_step(a, s, io, params, out, &p, &m);
    LS_TRY(ls_agree_alike(a->ctx, status, a->mechanism->name,
                          "options, the state (batch, tokens, source, its rows reordered alike) and which optional "
                          "inputs a step has",
                          status == LS_OK ? sign_step(s, &p) : 0));
    const ls_phase *phases = phases_of(a);
    const ls_inputs given = ls_inputs_of(io);
    const ls_real *const x[] = {given.q, given.k, given.v, given.q};
    for (int i = 0; i <= EXTRA_PROJ; i++)
        if (ls_has_projection(a, i) && !(is_cross(a) && (i == K_PROJ || i == V_PROJ)))
            ls_project(a, i, p.B, ls_reals(x[i]), params, m.in[i]);
    for (int i = 0; phases[i].name != NULL; i++) {
        if (!ls_is_needed(&p, &phases[i])) continue;
        if (is_cross(a) && phases[i].of_source) {
            if (keeps(a, phases, i)) p.summary[i].got = s->kept[i].summary;
            continue;
        }
        LS_TRY(ls_alone(a->ctx, cross_step(a, s, &p, phases, i)));
        LS_TRY(ls_alone(a->ctx, ls_run_kernel(a->mechanism, &p, phases, i, 0)));
    }
    for (int i = 0; phases[i].name != NULL; i++)
        if (phases[i].crossing == LS_SCAN && ls_is_needed(&p, &phases[i]))
            ls_memory_of(&a->ctx->exchange)
                ->combine(p.queue, p.summary[i].monoid, s->kept[i].summary, p.summary[i].sent, s->kept[i].summary);
    s->tokens++;
    if (ls_is_layer(a)) {
        ls_project_out(a, p.B, ls_reals(m.o), ls_reals(m.active), params, out);
        if (p.pad_q != NULL)
            a->ctx->dense->zero_rows(p.queue, p.B, 1, a->options.embed_dim, 1, p.pad_q, out, ls_reals(out));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ reorder */

/* x (batch, bytes) in the order index, through a copy. */
static void reorder(const ls_state *s, void *x, const int64_t *index, size_t bytes, char *copy)
{
    const ls_memory *memory = ls_memory_of(&s->attention->ctx->exchange);
    ls_queue *queue = s->attention->ctx->queue;
    if (bytes == 0) return;
    memory->copy(queue, copy, x, (size_t)s->batch * bytes);
    for (int64_t b = 0; b < s->batch; b++)
        memory->copy(queue, (char *)x + (size_t)b * bytes, copy + (size_t)index[b] * bytes, bytes);
}

/* Groups of a monoid run over (B,H,..): a batch row is one run of them, whatever is counted stands after all. */
static size_t summary_bytes(const ls_state *s, int i)
{
    const ls_monoid m = s->kept[i].monoid;
    return (size_t)((ls_monoid_size(m) - m.counts) / s->batch) * sizeof(ls_real);
}

ls_status ls_state_reorder(ls_state *s, const int64_t *index)
{
    LS_NEED(s, "reorder: the state is NULL");
    const char *name = s->attention->mechanism->name;
    LS_NEED(index, "%s: reorder: index is NULL", name);
    const size_t batch = (size_t)s->batch, E = (size_t)s->attention->options.embed_dim;
    for (int64_t b = 0; b < s->batch; b++)
        if (index[b] < 0 || index[b] >= s->batch)
            LS_FAIL(LS_ERR_ARGUMENT, "%s: reorder: row %lld is not in a batch of %lld", name, (long long)index[b],
                    (long long)s->batch);
    const window *w = &s->recent;
    const size_t real = sizeof(ls_real), cache = (size_t)s->rows * E * real, rows = (size_t)w->capacity;
    const size_t extra =
        ls_has_projection(s->attention, EXTRA_PROJ) ? (size_t)s->attention->form.input[EXTRA_PROJ].width : 0;
    size_t most = cache > rows * E * real ? cache : rows * E * real;
    if (rows * extra * real > most) most = rows * extra * real;
    for (int i = 0; i < LS_MAX_PHASES; i++) {
        const size_t bytes = s->kept[i].summary == NULL ? 0 : summary_bytes(s, i);
        if (bytes > most) most = bytes;
        if ((size_t)s->kept[i].item * real > most) most = (size_t)s->kept[i].item * real;
    }
    void *copy;
    LS_TRY(ls_reserve(s->attention->ctx->ops, name, batch * most + 1, &copy));
    for (int i = 0; i < LS_MAX_PHASES; i++) {
        if (s->kept[i].summary != NULL) reorder(s, s->kept[i].summary, index, summary_bytes(s, i), copy);
        for (int64_t at = 0; at < s->kept[i].listed; at += s->batch * s->kept[i].item)
            reorder(s, s->kept[i].list + at, index, (size_t)s->kept[i].item * real, copy);
    }
    if (s->rows > 0) {
        reorder(s, s->k, index, cache, copy);
        reorder(s, s->v, index, cache, copy);
        reorder(s, s->pad, index, (size_t)s->rows, copy);
    }
    if (rows > 0) {
        if (w->fetches & LS_KEYS) reorder(s, w->k, index, rows * E * real, copy);
        if (w->fetches & LS_VALUES) reorder(s, w->v, index, rows * E * real, copy);
        if (w->fetches & LS_EXTRA) reorder(s, w->extra, index, rows * extra * real, copy);
        reorder(s, w->pad, index, rows, copy);
    }
    const ls_status status = ls_context_wait(s->attention->ctx); /* the copy is in use until then */
    s->attention->ctx->ops->release(copy);
    s->order = ls_sign(s->order, index, batch * sizeof *index);
    return status;
}
