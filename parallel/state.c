/* Incremental decoding. A step is the forward pass of a one-token shard whose left neighbour is the saved state:
 *
 *   scan    the summary of all tokens before is the state; it grows by what the token sends
 *   reduce  of the source alone: done once by ls_state_source; otherwise as usual (it is small)
 *   ring    keys and values so far are a cache, spread over ranks: token t lies on rank t mod P, a source on its
 * owners. Each rank looks at its own part; the mechanism's next phases combine what they saw
 *
 * So no mechanism writes a step of its own beyond its list of phases. */
#include "attention.h"

#include <stdlib.h>

struct ls_state {
    ls_attention *attention;
    int64_t batch, max_length, tokens; /* tokens fed so far */
    int sourced;
    ls_arena arena;                  /* summaries and, for self attention, the cache */
    ls_real *summary[LS_MAX_PHASES]; /* by phase; NULL: none is kept */
    ls_monoid monoid[LS_MAX_PHASES];
    ls_arena source;    /* cross attention: the cache, of the source's length */
    ls_real *k, *v;     /* (B,H,rows,d) */
    uint8_t *pad;       /* (B,rows) */
    int64_t rows, used; /* of this rank */
};

static int is_cross(const ls_attention *a)
{
    return a->options.pattern == LS_NC || a->options.pattern == LS_CC;
}

/* The summary that arrives before phase i is kept from call to call. */
static int keeps(const ls_attention *a, const ls_phase *phases, int i)
{
    if (phases[i].crossing == LS_SCAN) return 1;
    return is_cross(a) && phases[i].crossing == LS_REDUCE && i > 0 && phases[i - 1].of_source;
}

static int rings(const ls_phase *phases)
{
    for (; phases->name != NULL; phases++)
        if (phases->crossing == LS_RING) return 1;
    return 0;
}

static void plan_cache(ls_state *s, ls_arena *arena)
{
    const int64_t E = s->attention->options.embed_dim;
    s->k = ls_take(arena, s->batch * s->rows * E);
    s->v = ls_take(arena, s->batch * s->rows * E);
    s->pad = ls_arena_take(arena, (size_t)(s->batch * s->rows));
}

static void plan_state(ls_state *s, ls_arena *arena)
{
    const ls_attention *a = s->attention;
    const ls_phase *phases = a->mechanism->step[a->options.pattern];
    ls_pass p;
    ls_pass_begin(a, s->batch, 1, 1, NULL, &p);
    for (int i = 0; phases[i].name != NULL; i++) {
        if (!keeps(a, phases, i)) continue;
        s->monoid[i] = phases[i].monoid(&p);
        s->summary[i] = ls_take(arena, ls_monoid_size(s->monoid[i]));
    }
    if (!is_cross(a) && rings(phases)) plan_cache(s, arena);
}

static ls_status create(ls_attention *a, int64_t batch, int64_t max_length, ls_state **state)
{
    const ls_comm *comm = &a->ctx->exchange.comm;
    const char *name = a->mechanism->name;
    if (a->mechanism->step[a->options.pattern] == NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: step of %s attention is not supported", name,
                ls_pattern_name(a->options.pattern));
    if (batch <= 0 || max_length < 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a state needs a positive batch (%lld) and a length (%lld) of 0 or more", name,
                (long long)batch, (long long)max_length);
    ls_state *s = *state = calloc(1, sizeof *s);
    if (s == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for a state", name);
    s->attention = a;
    s->batch = batch;
    s->max_length = max_length;
    const int cached = !is_cross(a) && rings(a->mechanism->step[a->options.pattern]);
    s->rows = cached ? (max_length + comm->size - 1) / comm->size : 0;
    ls_arena_measure(&s->arena);
    plan_state(s, &s->arena);
    LS_TRY(ls_arena_reserve(&s->arena, name));
    plan_state(s, &s->arena);
    LS_TRY(ls_arena_check(&s->arena, name));
    for (int i = 0; i < LS_MAX_PHASES; i++)
        if (s->summary[i] != NULL) ls_monoid_identity(s->monoid[i], s->summary[i]);
    return LS_OK;
}

ls_status ls_state_create(ls_attention *attention, int64_t batch, int64_t max_length, ls_state **state)
{
    *state = NULL;
    const ls_status status = ls_agree(attention->ctx, create(attention, batch, max_length, state));
    if (status != LS_OK) {
        ls_state_free(*state);
        *state = NULL;
    }
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
    ls_real *q, *k, *v, *o;
} buffers;

/* Work memory of a step or of the source: projected rows, summaries on their way, the mechanism's own. */
static void plan_call(const ls_attention *a, ls_pass *p, buffers *m, ls_arena *arena)
{
    const int64_t E = a->options.embed_dim;
    const ls_phase *phases = a->mechanism->step[a->options.pattern];
    if (a->options.level == LS_LEVEL_LAYER) {
        m->q = ls_take(arena, p->B * p->T * E);
        m->k = ls_take(arena, p->B * p->S * E);
        m->v = ls_take(arena, p->B * p->S * E);
        m->o = ls_take(arena, p->B * p->T * E);
        p->q = ls_view_of(a, m->q, p->B, p->T);
        p->own.k = ls_view_of(a, m->k, p->B, p->S);
        p->own.v = ls_view_of(a, m->v, p->B, p->S);
        p->out = ls_view_of(a, m->o, p->B, p->T);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (phases[i].monoid == NULL) continue;
        ls_summary *s = &p->summary[i];
        s->monoid = phases[i].monoid(p);
        s->sent = ls_take(arena, ls_monoid_size(s->monoid));
        s->got = ls_take(arena, ls_monoid_size(s->monoid));
    }
    if (a->mechanism->plan != NULL) a->mechanism->plan(p, arena, arena);
}

static ls_status reserve_call(const ls_attention *a, ls_pass *p, buffers *m)
{
    ls_arena *work = &a->ctx->work;
    ls_arena_measure(work);
    plan_call(a, p, m, work);
    LS_TRY(ls_arena_reserve(work, a->mechanism->name));
    plan_call(a, p, m, work);
    return ls_arena_check(work, a->mechanism->name);
}

/* ------------------------------------------------------------------------------------------------ source */

static ls_status reserve_source(ls_attention *a, ls_state *s, const ls_attention_shape *shape,
                                const ls_attention_io *io, const ls_real *params, ls_pass *p, buffers *m)
{
    const char *name = a->mechanism->name;
    if (!is_cross(a)) LS_FAIL(LS_ERR_ARGUMENT, "%s: only cross attention has a source", name);
    if (shape->keys == NULL || shape->keys->size != a->ctx->exchange.comm.size ||
        shape->keys->rank != a->ctx->exchange.comm.rank)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the shard of the source is missing or is not this rank's", name);
    if (shape->batch != s->batch)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the source has batch %lld, the state %lld", name, (long long)shape->batch,
                (long long)s->batch);
    const int64_t n = shape->keys->n;
    if (n > 0 && (io->key == NULL || (a->options.level == LS_LEVEL_CORE && io->value == NULL)))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key or value of the source is NULL", name);
    if (a->reals > 0 && params == NULL) LS_FAIL(LS_ERR_ARGUMENT, "%s: params is NULL", name);
    ls_pass_begin(a, s->batch, 0, n, params, p);
    p->all_keys = shape->keys->length;
    p->own.pad = io->key_padding_mask;
    p->own.spans = 1;
    p->own.span[0] = (ls_span){0, shape->keys->lo, n};
    p->own.k = ls_view_of(a, io->key, p->B, n);
    p->own.v = ls_view_of(a, io->value != NULL ? io->value : io->key, p->B, n);
    LS_TRY(reserve_call(a, p, m));
    s->rows = s->used = rings(a->mechanism->step[a->options.pattern]) ? n : 0;
    ls_arena_measure(&s->source);
    plan_cache(s, &s->source);
    LS_TRY(ls_arena_reserve(&s->source, name));
    plan_cache(s, &s->source);
    return ls_arena_check(&s->source, name);
}

ls_status ls_state_source(ls_attention *a, ls_state *s, const ls_attention_shape *shape, const ls_attention_io *io,
                          const ls_real *params)
{
    ls_pass p;
    buffers m = {0};
    LS_TRY(ls_agree(a->ctx, reserve_source(a, s, shape, io, params, &p, &m)));
    const ls_phase *phases = a->mechanism->step[a->options.pattern];
    if (a->options.level == LS_LEVEL_LAYER) {
        ls_project(a, K_PROJ, p.B * p.S, io->key, params, m.k);
        ls_project(a, V_PROJ, p.B * p.S, io->value != NULL ? io->value : io->key, params, m.v);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (keeps(a, phases, i)) LS_TRY(ls_reduce(&a->ctx->exchange, s->monoid[i], p.summary[i].sent, s->summary[i]));
        if (phases[i].of_source) {
            if (i > 0 && keeps(a, phases, i)) p.summary[i].got = s->summary[i];
            LS_TRY(phases[i].forward(&p, i));
        }
    }
    if (rings(phases)) {
        ls_clean_block(p.own.k, p.B, p.H, p.S, p.d, p.own.pad, s->k);
        ls_clean_block(p.own.v, p.B, p.H, p.S, p.d, p.own.pad, s->v);
        if (p.B * p.S > 0) memset(s->pad, 0, (size_t)(p.B * p.S));
        if (p.own.pad != NULL && p.S > 0) memcpy(s->pad, p.own.pad, (size_t)(p.B * p.S));
    }
    s->sourced = 1;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ step */

static ls_status reserve_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params,
                              const ls_real *out, ls_pass *p, buffers *m)
{
    const char *name = a->mechanism->name;
    const int core = a->options.level == LS_LEVEL_CORE;
    if (s->attention != a) LS_FAIL(LS_ERR_ARGUMENT, "%s: the state belongs to another attention", name);
    if (io->query == NULL || out == NULL || (a->reals > 0 && params == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: query, params or out of a step is NULL", name);
    if (core && !is_cross(a) && (io->key == NULL || io->value == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key or value of a step is NULL", name);
    if (is_cross(a) && !s->sourced)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a step of cross attention needs ls_state_source first", name);
    if (!is_cross(a) && s->tokens >= s->max_length)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the state was made for %lld tokens, this is one more", name,
                (long long)s->max_length);
    if (io->attn_mask != NULL || io->dropout_mask != NULL || io->need_weights || io->need_head_weights)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: attn_mask, dropout_mask and need_weights are not supported in a step", name);
    ls_pass_begin(a, s->batch, 1, is_cross(a) ? 0 : 1, params, p);
    p->step = 1;
    p->pad_q = io->query_padding_mask;
    p->own.pad = is_cross(a) ? NULL : io->key_padding_mask;
    if (!is_cross(a)) {
        if (p->pad_q == NULL) p->pad_q = io->key_padding_mask;
        if (p->own.pad == NULL) p->own.pad = io->query_padding_mask;
    }
    p->all_queries = p->all_keys = s->tokens + 1;
    p->query_spans = p->own.spans = 1;
    p->query_span[0] = p->own.span[0] = (ls_span){0, s->tokens, 1};
    p->q = ls_view_of(a, io->query, p->B, 1);
    p->out = ls_view_of(a, out, p->B, 1);
    p->own.k = ls_view_of(a, io->key != NULL ? io->key : io->query, p->B, p->S);
    p->own.v = ls_view_of(a, io->value != NULL ? io->value : io->key != NULL ? io->key : io->query, p->B, p->S);
    return reserve_call(a, p, m);
}

static ls_view cache_view(const ls_state *s, ls_real *p, int64_t H, int64_t d)
{
    return (ls_view){p, H * s->rows * d, s->rows * d, d};
}

/* The token's key and value go to the cache of the rank whose turn it is. */
static void cache_token(ls_state *s, const ls_pass *p)
{
    const ls_comm *comm = &s->attention->ctx->exchange.comm;
    if (s->tokens % comm->size != comm->rank) return;
    const ls_view k = cache_view(s, s->k, p->H, p->d), v = cache_view(s, s->v, p->H, p->d);
    for (int64_t b = 0; b < p->B; b++) {
        const int padded = p->own.pad != NULL && p->own.pad[b];
        s->pad[b * s->rows + s->used] = (uint8_t)padded;
        for (int64_t h = 0; h < p->H; h++) {
            ls_real *to_k = ls_row(k, b, h, s->used), *to_v = ls_row(v, b, h, s->used);
            ls_zero(to_k, p->d);
            ls_zero(to_v, p->d);
            if (padded) continue;
            memcpy(to_k, ls_row(p->own.k, b, h, 0), (size_t)p->d * sizeof *to_k);
            memcpy(to_v, ls_row(p->own.v, b, h, 0), (size_t)p->d * sizeof *to_v);
        }
    }
    s->used++;
}

/* The cache as the visiting block. All of it is in the past, so its rows may be called positions 0 .. used - 1. */
static void visit_cache(const ls_state *s, ls_pass *p)
{
    p->visit = (ls_block){.k = cache_view(s, s->k, p->H, p->d),
                          .v = cache_view(s, s->v, p->H, p->d),
                          .pad = s->pad,
                          .n = s->rows,
                          .spans = 1,
                          .span = {{0, 0, s->used}}};
}

ls_status ls_attention_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params,
                            ls_real *out)
{
    ls_pass p;
    buffers m = {0};
    LS_TRY(ls_agree(a->ctx, reserve_step(a, s, io, params, out, &p, &m)));
    const ls_phase *phases = a->mechanism->step[a->options.pattern];
    const int layer = a->options.level == LS_LEVEL_LAYER;
    if (layer) {
        ls_project(a, Q_PROJ, p.B, io->query, params, m.q);
        const ls_real *x_k = io->key != NULL ? io->key : io->query, *x_v = io->value != NULL ? io->value : x_k;
        if (!is_cross(a)) ls_project(a, K_PROJ, p.B, x_k, params, m.k);
        if (!is_cross(a)) ls_project(a, V_PROJ, p.B, x_v, params, m.v);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        const ls_phase *phase = &phases[i];
        if (is_cross(a) && phase->of_source) continue;
        if (keeps(a, phases, i))
            p.summary[i].got = s->summary[i];
        else if (phase->crossing == LS_REDUCE)
            LS_TRY(ls_reduce(&a->ctx->exchange, p.summary[i].monoid, p.summary[i].sent, p.summary[i].got));
        if (phase->crossing == LS_RING) {
            if (!is_cross(a)) cache_token(s, &p);
            visit_cache(s, &p);
        }
        LS_TRY(phase->forward(&p, i));
    }
    for (int i = 0; phases[i].name != NULL; i++)
        if (phases[i].crossing == LS_SCAN)
            ls_monoid_combine(s->monoid[i], s->summary[i], p.summary[i].sent, s->summary[i]);
    s->tokens++;
    if (layer) {
        ls_project(a, OUT_PROJ, p.B, m.o, params, out);
        for (int64_t b = 0; p.pad_q != NULL && b < p.B; b++)
            if (p.pad_q[b]) ls_zero(out + b * a->options.embed_dim, a->options.embed_dim);
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ reorder */

/* x (batch, bytes) in the order index, through a copy. */
static void reorder(char *x, const int64_t *index, int64_t batch, size_t bytes, char *copy)
{
    if (bytes == 0) return;
    memcpy(copy, x, (size_t)batch * bytes);
    for (int64_t b = 0; b < batch; b++) memcpy(x + (size_t)b * bytes, copy + (size_t)index[b] * bytes, bytes);
}

ls_status ls_state_reorder(ls_state *s, const int64_t *index)
{
    const char *name = s->attention->mechanism->name;
    const size_t batch = (size_t)s->batch, E = (size_t)s->attention->options.embed_dim;
    for (int64_t b = 0; b < s->batch; b++)
        if (index[b] < 0 || index[b] >= s->batch)
            LS_FAIL(LS_ERR_ARGUMENT, "%s: reorder: row %lld is not in a batch of %lld", name, (long long)index[b],
                    (long long)s->batch);
    const size_t cache = (size_t)s->rows * E * sizeof(ls_real);
    size_t most = cache;
    for (int i = 0; i < LS_MAX_PHASES; i++) {
        const size_t bytes = s->summary[i] == NULL ? 0 : (size_t)ls_monoid_size(s->monoid[i]) * sizeof(ls_real) / batch;
        if (bytes > most) most = bytes;
    }
    char *copy = malloc(batch * most + 1);
    if (copy == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory to reorder a state", name);
    for (int i = 0; i < LS_MAX_PHASES; i++) /* groups of a monoid run over (B,H,..): a batch row is one run of them */
        if (s->summary[i] != NULL)
            reorder((char *)s->summary[i], index, s->batch,
                    (size_t)ls_monoid_size(s->monoid[i]) * sizeof(ls_real) / batch, copy);
    if (s->rows > 0) {
        reorder((char *)s->k, index, s->batch, cache, copy);
        reorder((char *)s->v, index, s->batch, cache, copy);
        reorder((char *)s->pad, index, s->batch, (size_t)s->rows, copy);
    }
    free(copy);
    return LS_OK;
}
