/* The public attention object: its parameters, and the layer around the core. What it refuses: check.c.
 *
 *   layer: q = x_q W_qᵀ + b_q, k, v likewise;  out = core(q, k, v) W_oᵀ + b_o;  padded rows are 0 at the very end too
 *
 * The projections are local to a rank: only the core crosses ranks. */
#include "attention.h"
#include "dense.h"
#include "packed.h"

#include <stdio.h>
#include <stdlib.h>

struct ls_saved {
    const ls_context *ctx; /* whose device its memory is on */
    ls_attention *attention;
    ls_arena arena;
    ls_requests requests; /* and what they brought */
    ls_documents documents;
    int filled;         /* a forward call succeeded */
    uint64_t signature; /* its: see sign_call */
};

/* ------------------------------------------------------------------------------------------------ create */

static void add_projection(ls_attention *a, int which, const char *weight, const char *bias)
{
    const int64_t in = ls_projection_in(a, which), out = ls_projection_out(a, which);
    a->weight[which] = a->count;
    /* Glorot & Bengio (2010): uniform with half width sqrt(6 / (in + out)) */
    a->param[a->count++] = (ls_param_info){weight, 2, {out, in}, 0, 0, LS_INIT_UNIFORM, sqrt(6.0 / (double)(in + out))};
    if (bias == NULL) return;
    a->bias[which] = a->count;
    a->param[a->count++] = (ls_param_info){bias, 1, {out}, 0, 0, LS_INIT_ZERO, 0};
}

static void list_params(ls_attention *a)
{
    const int64_t E = a->options.embed_dim;
    a->form = (ls_layer_form){.inputs = 3,
                              .input = {{"q_proj.weight", "q_proj.bias", E, .made = LS_FINER},
                                        {"k_proj.weight", "k_proj.bias", E, .made = LS_FINER},
                                        {"v_proj.weight", "v_proj.bias", E, .made = LS_FINER}},
                              .core_width = E,
                              .out_weight = "out_proj.weight",
                              .out_bias = "out_proj.bias"};
    if (a->mechanism->layer != NULL) a->mechanism->layer(&a->options, &a->form);
    for (int i = 0; i < PROJECTIONS; i++) a->weight[i] = a->bias[i] = -1;
    if (ls_is_layer(a)) {
        for (int i = 0; i < a->form.inputs; i++) add_projection(a, i, a->form.input[i].weight, a->form.input[i].bias);
        add_projection(a, OUT_PROJ, a->form.out_weight, a->form.out_bias);
    }
    a->own = a->count;
    if (a->mechanism->params != NULL) a->count += a->mechanism->params(&a->options, a->param + a->own);
    for (int i = 0; i < a->count; i++) {
        ls_param_info *p = &a->param[i];
        p->offset = a->reals;
        p->count = 1;
        for (int k = 0; k < p->ndim; k++) p->count *= p->dim[k];
        a->reals += p->count;
    }
}

static uint64_t sign_options(const ls_attention_options *o)
{
    const uint64_t s = ls_sign(LS_SIGNATURE, o->mechanism, strlen(o->mechanism));
    const int64_t numbers[] = {o->pattern, o->level, o->embed_dim, o->num_heads, o->stream};
    const double reals[] = {o->scale, o->dropout};
    return ls_sign(ls_sign(ls_sign(s, numbers, sizeof numbers), reals, sizeof reals), o->value, sizeof o->value);
}

static ls_status create(ls_context *ctx, const ls_attention_options *options, ls_attention **attention)
{
    const ls_mechanism *mechanism;
    LS_TRY(ls_check_options(options, &mechanism));
    ls_attention *a = calloc(1, sizeof *a);
    if (a == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for an attention", mechanism->name);
    a->ctx = ctx;
    a->mechanism = mechanism;
    a->options = *options;
    a->options.mechanism = mechanism->name;
    a->signature = sign_options(&a->options);
    if (ctx->device == LS_CUDA && mechanism->cuda == NULL) {
        free(a);
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: it has no CUDA kernels in this version: use the CPU device", mechanism->name);
    }
    a->H = mechanism->one_input ? 1 : options->num_heads;
    a->d = options->embed_dim / a->H;
    list_params(a);
    *attention = a;
    return LS_OK;
}

ls_status ls_attention_create(ls_context *ctx, const ls_attention_options *options, ls_attention **attention)
{
    if (attention != NULL) *attention = NULL;
    LS_NEED(ctx, "attention: the context is NULL");
    ls_attention *made = NULL;
    ls_status status = attention != NULL ? create(ctx, options, &made)
                                         : ls_fail(LS_ERR_ARGUMENT, "attention: the place for it is NULL");
    status = ls_agree_alike(ctx, status, "attention", "options", made != NULL ? made->signature : 0);
    if (status != LS_OK) {
        free(made);
        made = NULL;
    }
    if (attention != NULL) *attention = made;
    return status;
}

void ls_attention_free(ls_attention *attention)
{
    free(attention);
}

int ls_attention_num_params(const ls_attention *attention)
{
    return attention->count;
}

const ls_param_info *ls_attention_param(const ls_attention *attention, int index)
{
    return index >= 0 && index < attention->count ? &attention->param[index] : NULL;
}

int ls_attention_is_projection(const ls_attention *attention, int index)
{
    return index >= 0 && index < attention->own && attention->param[index].ndim == 2;
}

int64_t ls_attention_param_count(const ls_attention *attention)
{
    return attention->reals;
}

ls_status ls_saved_create(ls_attention *attention, ls_saved **saved)
{
    LS_NEED(saved, "saved: saved is NULL");
    *saved = NULL;
    LS_NEED(attention, "saved: attention is NULL");
    *saved = calloc(1, sizeof **saved);
    if (*saved == NULL) LS_FAIL(LS_ERR_MEMORY, "attention: no memory for what backward needs");
    (*saved)->ctx = attention->ctx;
    (*saved)->attention = attention;
    (*saved)->arena.device = attention->ctx->ops;
    return LS_OK;
}

void ls_saved_free(ls_saved *saved)
{
    if (saved == NULL) return;
    ls_arena_free(&saved->arena);
    ls_requests_free(&saved->requests);
    ls_documents_free(&saved->documents);
    free(saved);
}

size_t ls_saved_bytes(const ls_saved *saved)
{
    return saved->arena.capacity + ls_requests_bytes(&saved->requests) + ls_documents_bytes(&saved->documents);
}

/* ------------------------------------------------------------------------------------------------ a call */

/* The rows of an input as products take them: those of x, n of a sequence, padded ones 0. */
typedef struct ready_rows {
    ls_operand rows;
    const ls_real *x;
    const uint8_t *pad;
    int64_t n;
} ready_rows;

/* What the layer adds to a call of the core: projected rows, their gradients, and both as products take them. */
typedef struct layer {
    ls_inputs x;
    int key_is_query, value_is_query, value_is_key; /* the same rows, and as many */
    ls_real *in[4], *o;                             /* projected rows, the core's output */
    ls_operand kept[5];                             /* what is saved of in[] and o: themselves, or in LS_BF16 copies */
    int narrow;                                     /* the core sees kept[], and there are no in[] */
    ls_operand active;                              /* gelu of o */
    ls_real *din[4], *no_grad;                      /* gradients of in[], and of parameters where nobody wants them */
    ls_operand do_;                                 /* gradient of o */
    ls_operand dy;    /* a gradient as its product takes it, where that is not as it lies */
    ready_rows ready; /* likewise for inputs */
    ls_real *dk, *dv; /* core: key is query, value is one of them: made aside and added */
    ls_real *heads;   /* weights per head, where the mean over heads was asked for */
} layer;

ls_view ls_view_rows(const ls_attention *a, const ls_real *p, int64_t B, int64_t n, int64_t width)
{
    ls_real *x = (ls_real *)(uintptr_t)p; /* views serve inputs and outputs alike */
    return a->options.layout == LS_TBHD ? (ls_view){x, width, 0, B * width} : (ls_view){x, n * width, 0, width};
}

ls_view ls_view_of(const ls_attention *a, const ls_real *p, int64_t B, int64_t n)
{
    const int64_t E = a->options.embed_dim;
    /* rows of a layer are model-wide: (B,T,E) is (B,T,H,d) */
    if (a->options.layout == LS_BHTD && !ls_is_layer(a))
        return (ls_view){(ls_real *)(uintptr_t)p, n * E, n * a->d, a->d};
    ls_view v = ls_view_rows(a, p, B, n, E);
    v.sh = a->d;
    return v;
}

ls_view ls_view_out(const ls_attention *a, const ls_real *p, int64_t B, int64_t n)
{
    return a->mechanism->one_input ? ls_view_rows(a, p, B, n, a->form.core_width) : ls_view_of(a, p, B, n);
}

uint64_t ls_sign_shard(uint64_t signature, const ls_shard *s)
{
    return ls_sign(signature, s->bounds, ((size_t)s->size + 1) * sizeof *s->bounds);
}

/* What must be the same on every rank of a call, and in backward as in forward. Called with shape and shards that were
 * found whole. */
static uint64_t sign_call(const ls_attention *a, const ls_call *c, int wants_weights)
{
    const ls_pass *p = &c->pass;
    const int64_t numbers[] = {wants_weights,
                               p->B,
                               p->training,
                               p->pad_q != NULL,
                               p->own.pad != NULL,
                               p->attn_mask != NULL,
                               p->attn_mask_per_head,
                               p->dropout_mask != NULL,
                               c->documents != NULL,
                               p->given_features != NULL,
                               p->given_noise != NULL,
                               p->given_samples != NULL,
                               p->samples,
                               p->samples_per_batch,
                               (int64_t)p->draw,
                               (int64_t)p->sample};
    return ls_sign_shard(ls_sign_shard(ls_sign(a->signature, numbers, sizeof numbers), c->queries), c->keys);
}

/* ls_agree_alike for a call, whose tensors c has where the status is LS_OK. */
static ls_status agree_call(const ls_attention *a, ls_status status, const ls_call *c, int backward, int wants_weights)
{
    return ls_agree_alike(
        a->ctx, status, a->mechanism->name,
        "forward or backward, options, batch, sample, draw, training, shards, weights and which optional "
        "inputs there are",
        status == LS_OK ? ls_sign(sign_call(a, c, wants_weights), &backward, sizeof backward) : 0);
}

int64_t ls_rows_apart(const ls_attention *a, int64_t batch)
{
    return a->options.layout == LS_TBHD ? batch * a->options.embed_dim : a->options.embed_dim;
}

void ls_pass_begin(const ls_attention *a, int64_t B, int64_t T, int64_t S, const ls_real *params, ls_pass *pass)
{
    *pass = (ls_pass){.pattern = a->options.pattern,
                      .B = B,
                      .H = a->H,
                      .T = T,
                      .S = S,
                      .d = a->d,
                      .out_width = a->mechanism->one_input ? a->form.core_width : a->d,
                      .extra_width = ls_has_projection(a, EXTRA_PROJ) ? a->form.input[EXTRA_PROJ].width : 0,
                      .scale = a->options.scale > 0 ? a->options.scale : 1 / sqrt((double)a->d),
                      .option = a->options.value,
                      .kit = a->mechanism->kit,
                      .queue = a->ctx->queue,
                      .params = params,
                      .param = a->param + a->own,
                      .dropout = a->options.dropout,
                      .seed = a->ctx->seed,
                      .stream = a->options.stream};
    pass->own.n = S;
}

static int wants_weights(const ls_attention_io *io)
{
    return io != NULL && (io->need_weights || io->need_head_weights);
}

/* The tensors of a call that are there before any memory is taken. */
static void begin_call(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                       const ls_real *params, const ls_real *out, int backward, ls_call *c, layer *l)
{
    *c = (ls_call){.ctx = a->ctx, .mechanism = a->mechanism, .queries = shape->queries};
    *l = (layer){0};
    c->keys = shape->keys == NULL ? shape->queries : shape->keys;
    ls_pass *p = &c->pass;
    ls_pass_begin(a, shape->batch, c->queries->n, c->keys->n, params, p);
    p->all_queries = c->queries->length;
    p->all_keys = c->keys->length;
    ls_take_masks(io, p);
    p->attn_mask = io->attn_mask;
    p->attn_mask_per_head = io->attn_mask_per_head;
    p->dropout_mask = io->dropout_mask;
    p->training = io->training;
    p->sample = io->sample;
    p->draw = io->training ? io->draw : 0;
    p->given_features = io->features;
    p->given_noise = io->noise;
    p->given_samples = io->samples;
    p->samples = io->samples == NULL ? 0 : io->num_samples;
    p->samples_per_batch = io->samples != NULL && io->samples_per_batch;
    p->selected = io->selected;
    p->backward = backward;
    if (wants_weights(io)) p->weights = io->weights;
    c->in_place = io->attn_mask != NULL || io->dropout_mask != NULL || wants_weights(io);
    l->x = ls_inputs_of(io);
    l->key_is_query = l->x.k == l->x.q && p->S == p->T;
    l->value_is_query = l->x.v == l->x.q && p->S == p->T;
    l->value_is_key = l->x.v == l->x.k;
    p->q = ls_view_of(a, l->x.q, p->B, p->T);
    p->own.k = ls_view_of(a, l->x.k, p->B, p->S);
    p->own.v = ls_view_of(a, l->x.v, p->B, p->S);
    p->out = ls_view_out(a, out, p->B, p->T);
}

static int64_t length_of(const ls_pass *p, int which)
{
    return which == K_PROJ || which == V_PROJ ? p->S : p->T;
}

static int64_t rows_of(const ls_pass *p, int which)
{
    return p->B * length_of(p, which);
}

enum { OUTPUT = 4 }; /* in layer.kept */

/* Rows that are made in forward and needed again in backward. In bf16 they are saved so, unless `exact`. */
static ls_real *plan_saved(const ls_attention *a, int64_t reals, int exact, ls_operand *kept, ls_arena *saved,
                           ls_arena *work)
{
    if (a->ctx->precision == LS_BF16 && !exact) {
        *kept = ls_take_operand(a->ctx, saved, reals);
        return ls_take(work, reals);
    }
    ls_real *x = ls_take(saved, reals);
    *kept = ls_reals(x);
    return x;
}

static void recall_rows(const ls_attention *a, int64_t reals, ls_real *x, ls_operand kept)
{
    if (ls_is_narrow(kept)) a->ctx->dense->copy(a->ctx->queue, reals, kept, ls_reals(x));
}

/* Whether the rows of an input of the core are kept as floats, whatever the precision. */
static int keeps_floats(const ls_attention *a, int which)
{
    return a->form.input[which].made != LS_AS_ASKED;
}

static ls_precision precision_of(const ls_attention *a, int which)
{
    return a->form.input[which].made == LS_FINER && a->ctx->precision != LS_FLOAT32 ? LS_TF32 : LS_FLOAT32;
}

/* Whether the core takes and gives rows as they are kept: one rank alone has them, and all of them are rounded. */
static int takes_narrow(ls_attention *a, const ls_call *c)
{
    const ls_cuda_mechanism *cuda = a->mechanism->cuda;
    if (a->ctx->precision != LS_BF16 || a->ctx->queue == NULL || cuda == NULL || cuda->takes_narrow == NULL) return 0;
    if (c->documents != NULL || c->keys->size > 1 || a->form.inputs < 3 || a->form.gelu) return 0;
    if (c->pass.B * c->pass.T == 0 || c->pass.S == 0) return 0;
    for (int i = 0; i < a->form.inputs; i++)
        if (keeps_floats(a, i)) return 0;
    ls_pass p = c->pass;
    p.q = ls_view_of(a, NULL, p.B, p.T);
    p.own.k = p.own.v = ls_view_of(a, NULL, p.B, p.S);
    return cuda->takes_narrow(&p);
}

/* Rows that the layer projects, its core's output, and what is kept of them. */
static void plan_rows(ls_attention *a, const ls_pass *p, layer *l, ls_arena *saved, ls_arena *work)
{
    const int64_t out = p->B * p->T * a->form.core_width;
    for (int i = 0; i < a->form.inputs; i++) {
        const int64_t reals = rows_of(p, i) * a->form.input[i].width;
        if (l->narrow)
            l->kept[i] = ls_take_operand(a->ctx, saved, reals);
        else
            l->in[i] = plan_saved(a, reals, keeps_floats(a, i), &l->kept[i], saved, work);
    }
    if (l->narrow) {
        l->kept[OUTPUT] = ls_take_operand(a->ctx, saved, out);
        l->o = ls_take(work, p->backward ? 0 : out);
    } else {
        l->o = plan_saved(a, out, 0, &l->kept[OUTPUT], saved, work);
    }
}

/* Rows, and gradients of rows, as products take them. */
static void plan_operands(ls_attention *a, const ls_pass *p, layer *l, ls_arena *work)
{
    const int64_t E = a->options.embed_dim, T = p->B * p->T, out = T * a->form.core_width, back = p->backward;
    const int rounds = a->ctx->precision == LS_BF16, cleans = back && (p->pad_q != NULL || p->own.pad != NULL);
    int64_t widest = T * E;       /* of the gradients that are made ready */
    int reads_narrow = back != 0; /* whether a product takes the rows that come in: backward, or LS_AS_ASKED */
    for (int i = 0; i < a->form.inputs; i++) {
        if (rounds) widest = ls_max(widest, rows_of(p, i) * a->form.input[i].width);
        reads_narrow |= !keeps_floats(a, i);
    }
    const int readies = a->form.inputs > 0 && ((rounds && reads_narrow) || cleans);
    l->active = ls_take_operand(a->ctx, work, a->form.gelu ? out : 0);
    l->do_ = l->narrow ? ls_take_operand(a->ctx, work, back * out) : ls_reals(ls_take(work, back * out));
    l->dy = ls_take_operand(a->ctx, work, back && (rounds || p->pad_q != NULL) ? widest : 0);
    l->ready.rows = ls_take_operand(a->ctx, work, readies ? p->B * ls_max(p->T, p->S) * E : 0);
}

/* The core sees what the layer projects; without input projections the rows that come in. */
static void show_layer(const ls_attention *a, const layer *l, ls_pass *p)
{
    p->out = ls_view_out(a, l->o, p->B, p->T);
    p->dout = ls_view_out(a, l->narrow ? NULL : l->do_.p, p->B, p->T);
    if (a->form.inputs == 0) {
        if (p->dq.p == NULL) p->dq = ls_view_of(a, l->din[Q_PROJ], p->B, p->T);
        return;
    }
    p->q = ls_view_of(a, l->in[Q_PROJ], p->B, p->T);
    p->own.k = ls_view_of(a, l->in[K_PROJ], p->B, p->S);
    p->own.v = ls_view_of(a, l->in[V_PROJ], p->B, p->S);
    p->narrow = l->narrow;
    p->narrow_q = l->kept[Q_PROJ].p, p->own.narrow_k = l->kept[K_PROJ].p, p->own.narrow_v = l->kept[V_PROJ].p;
    p->narrow_out = l->kept[OUTPUT].p, p->narrow_dout = l->do_.p;
    p->dq = ls_view_of(a, l->din[Q_PROJ], p->B, p->T);
    p->own.dk = ls_view_of(a, l->din[K_PROJ], p->B, p->S);
    p->own.dv = ls_view_of(a, l->din[V_PROJ], p->B, p->S);
    if (!ls_has_projection(a, EXTRA_PROJ)) return;
    p->own.extra = ls_view_rows(a, l->in[EXTRA_PROJ], p->B, p->T, p->extra_width);
    p->own.dextra = ls_view_rows(a, l->din[EXTRA_PROJ], p->B, p->T, p->extra_width);
}

static void plan_layer(ls_attention *a, ls_call *c, layer *l, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    l->narrow = takes_narrow(a, c);
    plan_rows(a, p, l, saved, work);
    plan_operands(a, p, l, work);
    for (int i = 0; i < a->form.inputs; i++)
        l->din[i] = ls_take(work, p->backward * rows_of(p, i) * a->form.input[i].width);
    if (a->form.inputs == 0) l->din[Q_PROJ] = ls_take(work, p->backward * p->B * p->T * a->options.embed_dim);
    l->no_grad = ls_take(work, p->backward * a->reals); /* where parameter gradients go that nobody wants */
    show_layer(a, l, p);
}

static void plan(ls_attention *a, const ls_attention_io *io, ls_call *c, layer *l, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    const int64_t E = a->options.embed_dim, rows_k = p->B * p->S, back = p->backward;
    if (ls_is_layer(a)) {
        plan_layer(a, c, l, saved, work);
    } else if (back && !a->mechanism->one_input) {
        const int aside = l->value_is_query || l->value_is_key;
        l->dk = ls_take(work, l->key_is_query ? rows_k * E : 0);
        l->dv = ls_take(work, aside ? rows_k * E : 0);
        if (l->key_is_query) p->own.dk = ls_view_of(a, l->dk, p->B, p->S);
        if (aside) p->own.dv = ls_view_of(a, l->dv, p->B, p->S);
    }
    const int mean = io->need_weights && !io->need_head_weights && !back;
    l->heads = ls_take(work, mean ? p->B * p->H * p->T * p->all_keys : 0);
    if (mean) p->weights = l->heads;
    if (c->documents != NULL)
        ls_packed_plan(c, saved, work);
    else
        ls_run_plan(c, saved, work);
}

/* ------------------------------------------------------------------------------------------------ forward */

static const ls_real *weight_of(const ls_attention *a, int which, const ls_real *params)
{
    return params + a->param[a->weight[which]].offset;
}

static const ls_real *bias_of(const ls_attention *a, int which, const ls_real *params)
{
    return a->bias[which] < 0 ? NULL : params + a->param[a->bias[which]].offset;
}

void ls_project(const ls_attention *a, int which, int64_t rows, ls_operand x, const ls_real *params, ls_real *y)
{
    const ls_real *w = weight_of(a, which, params), *b = bias_of(a, which, params);
    const int64_t in = ls_projection_in(a, which), out = ls_projection_out(a, which);
    const ls_dense_ops *dense = a->ctx->dense;
    if (which != OUT_PROJ && a->form.input[which].made == LS_ALIKE)
        dense->linear_alike(a->ctx->queue, rows, in, out, x.p, w, b, y);
    else if (which != OUT_PROJ && keeps_floats(a, which))
        dense->linear_in(a->ctx->queue, precision_of(a, which), rows, in, out, x.p, w, b, y);
    else
        dense->linear(a->ctx->queue, rows, in, out, x, ls_reals(w), b, ls_reals(y));
}

void ls_project_out(const ls_attention *a, int64_t rows, ls_operand o, ls_operand active, const ls_real *params,
                    ls_real *y)
{
    if (a->form.gelu) a->ctx->dense->gelu(a->ctx->queue, rows, a->form.core_width, o, NULL, active);
    ls_project(a, OUT_PROJ, rows, a->form.gelu ? active : o, params, y);
}

static int batch_first(const ls_attention *a)
{
    return a->options.layout != LS_TBHD;
}

/* Collective. The documents of a packed call; it agrees beforehand that all ranks mean the same call. */
static ls_status find_documents(ls_attention *a, const ls_attention_io *io, const ls_call *c, ls_status status)
{
    const ls_pass *p = &c->pass;
    const int self = ls_is_self(p->pattern);
    const int32_t *q = self && io->query_segments == NULL ? io->key_segments : io->query_segments;
    LS_TRY(agree_call(a, status, c, 0, 0));
    return ls_documents_find(a->ctx, a->mechanism->name, p->B, c->queries, self ? NULL : c->keys, q, io->key_segments,
                             c->documents);
}

/* Of all ranks' exchange and, for documents that lie on one rank, of its own. */
static void measure_wires(ls_context *ctx)
{
    ls_exchange_plan_begin(&ctx->exchange);
    ls_exchange_plan_begin(&ctx->alone->exchange);
}
static ls_status reserve_wires(ls_context *ctx)
{
    LS_TRY(ls_exchange_reserve(&ctx->exchange));
    return ls_exchange_reserve(&ctx->alone->exchange);
}

static ls_status reserve_forward(ls_attention *a, const ls_attention_io *io, ls_arena *keep, ls_call *c, layer *l)
{
    ls_arena *work = &a->ctx->work;
    ls_arena_measure(keep);
    ls_arena_measure(work);
    measure_wires(a->ctx);
    plan(a, io, c, l, keep, work);
    LS_TRY(reserve_wires(a->ctx));
    LS_TRY(ls_arena_reserve(keep, a->mechanism->name));
    LS_TRY(ls_arena_reserve(work, a->mechanism->name));
    plan(a, io, c, l, keep, work);
    LS_TRY(ls_arena_check(keep, a->mechanism->name));
    return ls_arena_check(work, a->mechanism->name);
}

/* The input x of projection `which` as products take it; what is padded becomes 0, since 0 · NaN is not 0. Where
 * several projections take the same input, the first one makes it ready. */
static ls_operand input_rows(const ls_attention *a, const ls_pass *p, layer *l, int which, const ls_real *x,
                             const uint8_t *pad)
{
    ready_rows *r = &l->ready;
    const int64_t n = length_of(p, which);
    if (pad == NULL && !ls_is_narrow(r->rows)) return ls_reals(x);
    if (r->x != x || r->pad != pad || r->n != n)
        a->ctx->dense->zero_rows(a->ctx->queue, p->B, n, a->options.embed_dim, batch_first(a), pad, x, r->rows);
    r->x = x, r->pad = pad, r->n = n;
    return r->rows;
}

static void make_input(const ls_attention *a, const ls_pass *p, layer *l, int which, const ls_real *x)
{
    const int64_t rows = rows_of(p, which), in = ls_projection_in(a, which), out = ls_projection_out(a, which);
    const ls_operand kept = l->kept[which];
    if (!ls_is_narrow(kept)) {
        ls_project(a, which, rows, ls_reals(x), p->params, l->in[which]);
        return;
    }
    const uint8_t *pad = which == Q_PROJ ? p->pad_q : p->own.pad; /* what is extra is of keys */
    a->ctx->dense->linear(a->ctx->queue, rows, in, out, input_rows(a, p, l, which, x, pad),
                          ls_reals(weight_of(a, which, p->params)), bias_of(a, which, p->params), kept);
    if (!l->narrow) recall_rows(a, rows * out, l->in[which], kept); /* the core sees what backward will see */
}

/* What is done to the queries' rows alone, so that it need not be done before something crosses. */
typedef struct query_rows {
    ls_attention *a;
    const ls_pass *p;
    layer *l;
    ls_real *dx;
    int *begun;
} query_rows;

static void make_queries(void *of)
{
    const query_rows *x = of;
    make_input(x->a, x->p, x->l, Q_PROJ, x->l->x.q);
}

ls_status ls_attention_forward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                               const ls_real *params, ls_real *out, ls_saved *saved)
{
    LS_NEED(a, "forward: attention is NULL");
    ls_call c;
    layer l;
    ls_arena *keep = saved != NULL ? &saved->arena : &a->ctx->unsaved;
    if (saved != NULL && saved->ctx == a->ctx) {
        saved->filled = 0;
        saved->attention = a; /* attentions that never need theirs at the same time may share one */
    }
    ls_status status = ls_check_call(a, shape, io, params, out);
    if (status == LS_OK && saved != NULL && saved->ctx != a->ctx)
        status = ls_fail(LS_ERR_ARGUMENT, "%s: saved belongs to another context: make one of an attention of this one",
                         a->mechanism->name);
    if (status == LS_OK) begin_call(a, shape, io, params, out, 0, &c, &l);
    if (status == LS_OK) c.requests = saved != NULL ? &saved->requests : &a->ctx->requests;
    if (ls_is_packed(io)) {
        if (status == LS_OK) c.documents = saved != NULL ? &saved->documents : a->ctx->documents;
        LS_TRY(find_documents(a, io, &c, status));
    }
    if (status == LS_OK) status = reserve_forward(a, io, keep, &c, &l);
    LS_TRY(agree_call(a, status, &c, 0, wants_weights(io)));
    const ls_pass *p = &c.pass;
    const int64_t rows = p->B * p->T;
    const ls_real *const x[] = {l.x.q, l.x.k, l.x.v, l.x.q};
    for (int i = Q_PROJ + 1; i < EXTRA_PROJ + 1; i++)
        if (ls_has_projection(a, i)) make_input(a, p, &l, i, x[i]);
    query_rows queries = {.a = a, .p = p, .l = &l};
    if (c.documents != NULL && ls_has_projection(a, Q_PROJ)) make_queries(&queries); /* they cross one by one */
    if (c.documents == NULL && ls_has_projection(a, Q_PROJ)) c.meanwhile = make_queries, c.meanwhile_of = &queries;
    LS_TRY(ls_alone(a->ctx, c.documents != NULL ? ls_packed_forward(&c, keep, &a->ctx->work) : ls_run_forward(&c)));
    if (ls_is_layer(a)) {
        if (ls_is_narrow(l.kept[OUTPUT]) && !l.narrow)
            a->ctx->dense->copy(a->ctx->queue, rows * a->form.core_width, ls_reals(l.o), l.kept[OUTPUT]);
        ls_project_out(a, rows, l.kept[OUTPUT], l.active, params, out);
        if (p->pad_q != NULL)
            a->ctx->dense->zero_rows(a->ctx->queue, p->B, p->T, a->options.embed_dim, batch_first(a), p->pad_q, out,
                                     ls_reals(out));
    }
    if (l.heads != NULL && p->weights == l.heads)
        ls_memory_of(&a->ctx->exchange)->mean_heads(p->queue, p->B, p->H, p->T * p->all_keys, l.heads, io->weights);
    if (saved != NULL) {
        saved->filled = 1;
        saved->signature = sign_call(a, &c, wants_weights(io));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ backward */

static ls_status reserve_backward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                                  const ls_real *params, const ls_real *out, const ls_real *dout, ls_saved *saved,
                                  const ls_attention_grads *grads, ls_call *c, layer *l)
{
    const char *name = a->mechanism->name;
    LS_TRY(ls_check_call(a, shape, io, params, out));
    begin_call(a, shape, io, params, out, 1, c, l);
    const ls_pass *p = &c->pass;
    if (saved == NULL || saved->attention != a || !saved->filled)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: backward needs the saved of a forward call of the same attention", name);
    c->documents = ls_is_packed(io) ? &saved->documents : NULL;
    if (saved->signature != sign_call(a, c, wants_weights(io)))
        LS_FAIL(LS_ERR_ARGUMENT,
                "%s: backward needs the shape and io of the forward call that saved: batch, shards, training, sample, "
                "draw, weights and which optional inputs there are",
                name);
    LS_NEED(grads, "%s: grads is NULL", name);
    if (p->T > 0 && dout == NULL) LS_FAIL(LS_ERR_ARGUMENT, "%s: dout is NULL", name);
    if (!ls_is_layer(a) &&
        ((p->T > 0 && grads->query == NULL) || (p->S > 0 && grads->key == NULL && !l->key_is_query) ||
         (p->S > 0 && grads->value == NULL && !l->value_is_query && !l->value_is_key) ||
         (a->reals > 0 && grads->params == NULL)))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a gradient is NULL: at core level all of them are needed", name);
    c->pass.dq = ls_view_of(a, grads->query, p->B, p->T);
    c->pass.own.dk = ls_view_of(a, grads->key, p->B, p->S);
    c->pass.own.dv = ls_view_of(a, grads->value, p->B, p->S);
    c->pass.dout = ls_view_out(a, dout, p->B, p->T);
    c->pass.dparams = grads->params;
    c->requests = &saved->requests;
    ls_arena nothing = {0}, *work = &a->ctx->work; /* saved is as forward left it: only work is measured */
    ls_arena_measure(&nothing);
    ls_arena_measure(work);
    measure_wires(a->ctx);
    plan(a, io, c, l, &nothing, work);
    LS_TRY(reserve_wires(a->ctx));
    LS_TRY(ls_arena_reserve(work, name));
    ls_arena_replay(&saved->arena);
    plan(a, io, c, l, &saved->arena, work);
    LS_TRY(ls_arena_check(&saved->arena, name));
    LS_TRY(ls_arena_check(work, name));
    if (ls_is_layer(a) && grads->params == NULL) {
        ls_memory_of(&a->ctx->exchange)->zero(a->ctx->queue, l->no_grad, (size_t)a->reals * sizeof *l->no_grad);
        c->pass.dparams = l->no_grad;
    }
    return LS_OK;
}

/* += the sum of dy, of what projection `which` gave, if it has a bias. */
static void bias_backward(ls_attention *a, int which, const ls_pass *p, ls_operand dy)
{
    if (a->bias[which] >= 0)
        a->ctx->dense->column_sums(a->ctx->queue, rows_of(p, which), ls_projection_out(a, which), dy,
                                   p->dparams + a->param[a->bias[which]].offset);
}

/* Its weights' gradient, from what it took and the gradient of what it gave, as products take them; and dx into `to`,
 * which it adds to if it holds something. */
static void project_backward(ls_attention *a, int which, const ls_pass *p, ls_operand x, ls_operand dy, ls_operand to,
                             int adds)
{
    a->ctx->dense->linear_backward(a->ctx->queue, rows_of(p, which), ls_projection_in(a, which),
                                   ls_projection_out(a, which), x, ls_reals(weight_of(a, which, p->params)), dy, to,
                                   adds, p->dparams + a->param[a->weight[which]].offset);
}

static void input_backward(ls_attention *a, int which, const ls_pass *p, layer *l, const uint8_t *pad, const ls_real *x,
                           ls_real *to, int *begun)
{
    const ls_dense_ops *dense = a->ctx->dense;
    const int64_t rows = rows_of(p, which), out = ls_projection_out(a, which);
    ls_operand dy = ls_reals(l->din[which]);
    /* The bias gets the sum of rows that are not rounded: what keys get from a softmax sums up to nearly 0. */
    if (!ls_is_narrow(l->dy)) {
        bias_backward(a, which, p, dy);
    } else if (a->bias[which] < 0) {
        dense->copy(a->ctx->queue, rows * out, dy, l->dy);
        dy = l->dy;
    } else {
        ls_real *sum = p->dparams + a->param[a->bias[which]].offset;
        dense->sum_and_copy(a->ctx->queue, rows, out, l->din[which], sum, l->dy);
        dy = l->dy;
    }
    project_backward(a, which, p, input_rows(a, p, l, which, x, pad), dy, ls_reals(to), to != NULL && *begun);
    *begun = 1;
}

static void finish_queries(void *of)
{
    const query_rows *x = of;
    input_backward(x->a, Q_PROJ, x->p, x->l, x->p->pad_q, x->l->x.q, x->dx, x->begun);
}

static ls_status run_core_backward(ls_call *c, ls_saved *saved)
{
    return ls_alone(c->ctx,
                    c->documents != NULL ? ls_packed_backward(c, &saved->arena, &c->ctx->work) : ls_run_backward(c));
}

ls_status ls_attention_backward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                                const ls_real *params, const ls_real *out, const ls_real *dout, ls_saved *saved,
                                const ls_attention_grads *grads)
{
    LS_NEED(a, "backward: attention is NULL");
    ls_call c;
    layer l;
    const ls_status status = reserve_backward(a, shape, io, params, out, dout, saved, grads, &c, &l);
    LS_TRY(agree_call(a, status, &c, 1, 0));
    const ls_pass *p = &c.pass;
    const ls_dense_ops *dense = a->ctx->dense;
    const int64_t E = a->options.embed_dim;
    if (!ls_is_layer(a)) {
        LS_TRY(run_core_backward(&c, saved));
        const int has_keys = !a->mechanism->one_input;
        if (has_keys && l.key_is_query) dense->add(a->ctx->queue, p->B * p->S * E, l.dk, grads->query);
        if (has_keys && (l.value_is_query || l.value_is_key))
            dense->add(a->ctx->queue, p->B * p->S * E, l.dv, l.value_is_query ? grads->query : grads->key);
        return LS_OK;
    }
    ls_operand dy = ls_reals(dout);
    if (p->pad_q != NULL || ls_is_narrow(l.dy)) {
        dense->zero_rows(a->ctx->queue, p->B, p->T, E, batch_first(a), p->pad_q, dout, l.dy);
        dy = l.dy;
    }
    const int64_t rows = p->B * p->T, W = a->form.core_width;
    for (int i = 0; i < a->form.inputs && !l.narrow; i++)
        recall_rows(a, rows_of(p, i) * a->form.input[i].width, l.in[i], l.kept[i]);
    if (!l.narrow) recall_rows(a, rows * W, l.o, l.kept[OUTPUT]);
    if (a->form.gelu) dense->gelu(a->ctx->queue, rows, W, l.kept[OUTPUT], NULL, l.active);
    project_backward(a, OUT_PROJ, p, a->form.gelu ? l.active : l.kept[OUTPUT], dy, l.do_, 0);
    bias_backward(a, OUT_PROJ, p, dy);
    if (a->form.gelu) dense->gelu_backward(a->ctx->queue, rows, W, l.kept[OUTPUT], NULL, l.do_, l.do_);
    /* the gradient of an input arrives in the first of query, key, value that is this input */
    ls_real *dx_q = grads->query, *dx_k = l.key_is_query ? dx_q : grads->key;
    ls_real *dx_v = l.value_is_query ? dx_q : l.value_is_key ? dx_k : grads->value;
    int begun_q = 0, begun_k = 0, begun_v = 0;
    int *k = l.key_is_query ? &begun_q : &begun_k, *v = l.value_is_query ? &begun_q : l.value_is_key ? k : &begun_v;
    query_rows queries = {.a = a, .p = p, .l = &l, .dx = dx_q, .begun = &begun_q};
    if (c.documents == NULL && ls_has_projection(a, Q_PROJ)) c.meanwhile = finish_queries, c.meanwhile_of = &queries;
    LS_TRY(run_core_backward(&c, saved));
    if (c.documents != NULL && ls_has_projection(a, Q_PROJ)) finish_queries(&queries);
    if (ls_has_projection(a, K_PROJ)) input_backward(a, K_PROJ, p, &l, p->own.pad, l.x.k, dx_k, k);
    if (ls_has_projection(a, V_PROJ)) input_backward(a, V_PROJ, p, &l, p->own.pad, l.x.v, dx_v, v);
    if (ls_has_projection(a, EXTRA_PROJ)) input_backward(a, EXTRA_PROJ, p, &l, p->own.pad, l.x.q, dx_q, &begun_q);
    return LS_OK;
}
