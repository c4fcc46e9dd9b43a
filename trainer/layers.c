/* One pass through the model: the plan of its memory, blocks forward and backward, the loss in chunks of rows.
 *
 * A block is y = x + drop(branch(norm x)). Backward, dy is the running gradient d: first the branch is undone,
 *   dbranch = drop(d), dnormed = branchᵀ(dbranch), then d += normᵀ(dnormed),
 * where normed is computed again from x. Only attentions keep more than x. */
#include "model_internal.h"

#include <math.h>

/* ------------------------------------------------------------------------------------------------ memory */

static int64_t rows_of(const batch *b, const ls_shard *shard)
{
    return b->B * shard->n;
}

/* Where the residual stream is kept. KEEP_NOTHING: one buffer, blocks work in place. KEEP_LAYERS: the inputs of layers,
 * and one more set for the blocks within whichever layer is being run. KEEP_BLOCKS: all of it. */
static void plan_stack(const model *m, stack *s, ls_arena *arena, keeping keep, int64_t rows)
{
    for (int k = 0; k <= s->blocks; k++) {
        const int boundary = k % s->per_layer == 0;
        if (keep == KEEP_NOTHING && k > 0)
            s->x[k] = s->x[0];
        else if (keep == KEEP_LAYERS && k > s->per_layer && !boundary)
            s->x[k] = s->x[k - s->per_layer];
        else
            s->x[k] = ls_take(arena, rows * m->E);
    }
}

ls_operand take_ready(const model *m, ls_arena *arena, const ls_real *x, int64_t n)
{
    return m->sequence->precision == LS_BF16 ? ls_take_operand(m->sequence, arena, n) : ls_reals(x);
}

void take_weights(const model *m, ls_arena *arena, workspace *w)
{
    const int rounds = m->sequence->precision == LS_BF16;
    w->weight[0] = ls_take_operand(m->sequence, arena, rounds ? m->E * ls_max(m->F, m->V) : 0);
    w->weight[1] = ls_take_operand(m->sequence, arena, rounds ? m->E * m->F : 0);
}

/* n weights as products take them: themselves, or a copy in `room`. */
static ls_operand ready_weights(const model *m, const ls_real *weights, int64_t n, ls_operand room)
{
    if (!ls_is_narrow(room)) return ls_reals(weights);
    m->dense->copy(m->queue, n, ls_reals(weights), room);
    return room;
}

static void plan(model *m, const pass *p, int64_t source, int64_t target)
{
    ls_arena *a = &m->arena;
    workspace *w = &m->w;
    const int64_t rows = ls_max(source, target), E = m->E, gradient = p->keep != KEEP_NOTHING;
    const int64_t wide = ls_min(wide_rows(m), ls_max(rows, 1));
    *w = (workspace){0};
    w->sums = ls_arena_take(a, LS_LOSS_SUMS * sizeof *w->sums);
    const int64_t on_device = m->queue != NULL;
    w->token[0] = ls_arena_take(a, (size_t)(on_device * source) * sizeof **w->token);
    for (int i = 1; i < 3; i++) w->token[i] = ls_arena_take(a, (size_t)(on_device * target) * sizeof **w->token);
    w->pad[0] = ls_arena_take(a, (size_t)(on_device * source));
    w->pad[1] = ls_arena_take(a, (size_t)(on_device * target));
    /* The narrow ones first, so that a rank without rows has pointers that are not NULL. */
    w->hidden = ls_take_operand(m->sequence, a, wide * m->F);
    w->active = ls_take_operand(m->sequence, a, wide * m->F);
    w->logits = ls_take(a, wide * m->V);
    take_weights(m, a, w);
    w->mean = ls_take(a, rows);
    w->rstd = ls_take(a, rows);
    w->normed = ls_take(a, rows * E);
    w->branch = ls_take(a, rows * E);
    w->ready = take_ready(m, a, w->normed, rows * E);
    w->memory = ls_take(a, source * E);
    plan_stack(m, &m->encoder, a, p->keep, source);
    plan_stack(m, &m->decoder, a, p->keep, target);
    if (gradient) {
        w->dhidden = ls_take_operand(m->sequence, a, wide * m->F);
        w->dbranch = take_ready(m, a, w->branch, rows * E);
        w->dnormed = ls_take(a, rows * E);
        w->dkey = ls_take(a, source * E);
        w->dmemory = ls_take(a, source * E);
        w->dtarget = ls_take(a, target * E);
    }
}

static ls_status check_side(const model *m, const char *name, const ls_shard *s, const int32_t *token,
                            const uint8_t *pad)
{
    if (s->size != ls_context_size(m->sequence) || s->rank != ls_context_rank(m->sequence))
        LS_FAIL(LS_ERR_ARGUMENT,
                "model: the batch's %s is sharded for rank %d of %d, but the model runs as rank %d of %d: read the "
                "batch with the ranks of the model's context",
                name, s->rank, s->size, ls_context_rank(m->sequence), ls_context_size(m->sequence));
    if (s->length < 1) LS_FAIL(LS_ERR_ARGUMENT, "model: the batch's %s has no positions: give at least one", name);
    if (s->n > 0 && (token == NULL || pad == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "model: the batch's %s lacks tokens or its padding mask", name);
    return LS_OK;
}

/* Tokens and masks as the kernels see them: the batch's own, or copies on the device, which the queue makes after the
 * pass before has read those before. From when ls_device_write returns, the batch's own may change. */
static ls_status bring(const model *m, pass *p, int with_target)
{
    static const uint8_t none[1] = {0};
    const batch *b = p->b;
    const workspace *w = &m->w;
    const size_t source = (size_t)rows_of(b, &b->source), target = with_target ? (size_t)rows_of(b, &b->target) : 0;
    p->source_token = b->source_token, p->input_token = b->input_token, p->label = b->label;
    p->source_pad = b->source_pad != NULL ? b->source_pad : none;
    p->target_pad = b->target_pad != NULL ? b->target_pad : none;
    if (m->queue == NULL) return LS_OK;
    ls_context *c = m->sequence;
    if (source > 0) {
        LS_TRY(ls_device_write(c, w->token[0], b->source_token, source * sizeof *b->source_token));
        LS_TRY(ls_device_write(c, w->pad[0], b->source_pad, source));
    }
    if (target > 0) {
        LS_TRY(ls_device_write(c, w->token[1], b->input_token, target * sizeof *b->input_token));
        LS_TRY(ls_device_write(c, w->token[2], b->label, target * sizeof *b->label));
        LS_TRY(ls_device_write(c, w->pad[1], b->target_pad, target));
    }
    p->source_token = w->token[0], p->input_token = w->token[1], p->label = w->token[2];
    p->source_pad = w->pad[0], p->target_pad = w->pad[1];
    return LS_OK;
}

static ls_status begin(model *m, pass *p, int with_target)
{
    const batch *b = p->b;
    if (b->B < 1) LS_FAIL(LS_ERR_ARGUMENT, "model: a batch of %lld sequences: give at least one", (long long)b->B);
    LS_TRY(check_side(m, "source", &b->source, b->source_token, b->source_pad));
    if (with_target) {
        LS_TRY(check_side(m, "target", &b->target, b->input_token, b->target_pad));
        if (b->target.n > 0 && b->label == NULL) LS_FAIL(LS_ERR_ARGUMENT, "model: the batch has no labels");
    }
    const int64_t source = rows_of(b, &b->source), target = with_target ? rows_of(b, &b->target) : 0;
    ls_arena_measure(&m->arena);
    plan(m, p, source, target);
    LS_TRY(ls_arena_reserve(&m->arena, "model activations"));
    plan(m, p, source, target);
    LS_TRY(ls_arena_check(&m->arena, "model activations"));
    return bring(m, p, with_target);
}

ls_status pass_begin(model *m, pass *p, int with_target)
{
    return ls_agree(m->sequence, begin(m, p, with_target));
}

/* ------------------------------------------------------------------------------------------------ branches */

void norm_forward(const model *m, const workspace *w, norm_params n, const ls_real *params, int64_t rows,
                  const ls_real *x, ls_operand y)
{
    m->dense->layer_norm(m->queue, rows, m->E, x, params + n.weight, params + n.bias, y, w->mean, w->rstd);
}

/* From mean and rstd that norm_forward left in w for the same rows. */
static void norm_backward(const model *m, const pass *p, norm_params n, int64_t rows, const ls_real *x,
                          const ls_real *dy, ls_real *dx, int accumulate)
{
    m->dense->layer_norm_backward(m->queue, rows, m->E, x, p->params + n.weight, m->w.mean, m->w.rstd, dy, dx,
                                  accumulate, p->dparams + n.weight, p->dparams + n.bias);
}

void ffn_forward(const model *m, const workspace *w, const ffn_params *f, const ls_real *params, int64_t rows)
{
    const int64_t E = m->E, F = m->F;
    const ls_operand w0 = ready_weights(m, params + f->weight0, E * F, w->weight[0]);
    const ls_operand w1 = ready_weights(m, params + f->weight1, E * F, w->weight[1]);
    for (int64_t row = 0; row < rows; row += wide_rows(m)) {
        const int64_t n = ls_min(wide_rows(m), rows - row);
        const int relu = m->c.model.activation == ACTIVATION_RELU;
        m->dense->linear(m->queue, n, E, F, ls_operand_at(w->ready, row * E), w0, NULL, w->hidden);
        (relu ? m->dense->relu : m->dense->gelu)(m->queue, n, F, w->hidden, params + f->bias0, w->hidden);
        m->dense->linear(m->queue, n, F, E, w->hidden, w1, NULL, ls_reals(w->branch + row * E));
    }
}

/* dnormed from dbranch; hidden units are computed again. */
static void ffn_backward(const model *m, const pass *p, const ffn_params *f, int64_t rows, ls_operand dbranch)
{
    const workspace *w = &m->w;
    const ls_real *params = p->params;
    const int64_t E = m->E, F = m->F;
    const ls_operand w0 = ready_weights(m, params + f->weight0, E * F, w->weight[0]);
    const ls_operand w1 = ready_weights(m, params + f->weight1, E * F, w->weight[1]);
    for (int64_t row = 0; row < rows; row += wide_rows(m)) {
        const int64_t n = ls_min(wide_rows(m), rows - row), relu = m->c.model.activation == ACTIVATION_RELU;
        const ls_operand normed = ls_operand_at(w->ready, row * E), dy = ls_operand_at(dbranch, row * E);
        m->dense->linear(m->queue, n, E, F, normed, w0, NULL, w->hidden);
        (relu ? m->dense->relu : m->dense->gelu)(m->queue, n, F, w->hidden, params + f->bias0, w->active);
        m->dense->linear_backward(m->queue, n, F, E, w->active, w1, dy, w->dhidden, 0, p->dparams + f->weight1);
        m->dense->column_sums(m->queue, n, E, dy, p->dparams + f->bias1);
        (relu ? m->dense->relu_backward : m->dense->gelu_backward)(m->queue, n, F, w->hidden, params + f->bias0,
                                                                   w->dhidden, w->dhidden);
        m->dense->linear_backward(m->queue, n, E, F, normed, w0, w->dhidden, ls_reals(w->dnormed + row * E), 0,
                                  p->dparams + f->weight0);
        m->dense->column_sums(m->queue, n, F, w->dhidden, p->dparams + f->bias0);
    }
}

/* One side of the batch, as the blocks of its stack see it. */
typedef struct side {
    const ls_shard *shard;
    const uint8_t *pad;
    const int32_t *token;
    int64_t rows;
} side;

static side side_of(const model *m, const pass *p, const stack *s)
{
    const batch *b = p->b;
    if (s == &m->encoder) return (side){&b->source, p->source_pad, p->source_token, rows_of(b, &b->source)};
    return (side){&b->target, p->target_pad, p->input_token, rows_of(b, &b->target)};
}

static ls_drop drop_of(const model *m, const pass *p, const side *at, uint32_t stream)
{
    return (ls_drop){.rate = p->training ? m->c.model.dropout : 0,
                     .seed = m->c.train.seed,
                     .stream = stream,
                     .sample = p->b->sample,
                     .lo = at->shard->lo};
}

static void dropout(const model *m, const pass *p, const side *at, uint32_t stream, const ls_real *x, ls_operand y)
{
    m->dense->dropout(m->queue, p->b->B, at->shard->n, m->E, drop_of(m, p, at, stream), x, y);
}

/* x where nothing is to be done to it, else its copy in `room`. */
static ls_operand dropped(const model *m, const pass *p, const side *at, uint32_t stream, ls_real *x, ls_operand room)
{
    if (drop_of(m, p, at, stream).rate == 0 && !ls_is_narrow(room)) return ls_reals(x);
    dropout(m, p, at, stream, x, room);
    return room;
}

static ls_attention_io attention_io(const model *m, const pass *p, const side *at, const block *bl)
{
    const int cross = bl->kind == BLOCK_CROSS;
    return (ls_attention_io){.query = m->w.normed,
                             .key = cross ? m->w.memory : NULL,
                             .query_padding_mask = at->pad,
                             .key_padding_mask = cross ? p->source_pad : NULL,
                             .training = p->training,
                             .sample = p->b->sample,
                             .draw = p->b->draw};
}

static ls_attention_shape attention_shape(const pass *p, const side *at, const block *bl)
{
    return (ls_attention_shape){
        .batch = p->b->B, .queries = at->shard, .keys = bl->kind == BLOCK_CROSS ? &p->b->source : at->shard};
}

/* ------------------------------------------------------------------------------------------------ stacks */

/* The normed rows of a block, as it takes them. */
static void norm_block(const model *m, const pass *p, const block *bl, int64_t rows, const ls_real *x)
{
    norm_forward(m, &m->w, bl->norm, p->params, rows, x, bl->kind == BLOCK_FFN ? m->w.ready : ls_reals(m->w.normed));
}

/* Blocks first .. last - 1. save: their attentions keep what backward wants. */
static ls_status blocks_forward(model *m, const pass *p, stack *s, int first, int last, int save)
{
    const workspace *w = &m->w;
    const side at = side_of(m, p, s);
    for (int k = first; k < last; k++) {
        const block *bl = &s->block[k];
        norm_block(m, p, bl, at.rows, s->x[k]);
        if (bl->kind == BLOCK_FFN) {
            ffn_forward(m, w, &bl->ffn, p->params, at.rows);
        } else {
            const ls_attention_io io = attention_io(m, p, &at, bl);
            const ls_attention_shape shape = attention_shape(p, &at, bl);
            LS_TRY(ls_attention_forward(bl->attention, &shape, &io, p->params + bl->params, w->branch,
                                        save ? bl->saved : NULL));
        }
        m->dense->residual(m->queue, p->b->B, at.shard->n, m->E, drop_of(m, p, &at, bl->stream), w->branch,
                           branch_bias(bl, p->params), s->x[k], s->x[k + 1]);
    }
    return LS_OK;
}

static ls_status stack_forward(model *m, const pass *p, stack *s)
{
    const side at = side_of(m, p, s);
    m->dense->embedding(m->queue, at.rows, m->E, at.token, p->params + s->embedding, sqrt((double)m->E), s->x[0]);
    m->dense->add_positions(m->queue, p->b->B, at.shard->n, m->E, at.shard->lo, s->x[0]);
    dropout(m, p, &at, s->stream, s->x[0], ls_reals(s->x[0]));
    return blocks_forward(m, p, s, 0, s->blocks, p->keep == KEEP_BLOCKS);
}

/* d: the gradient of x[k + 1], becomes that of x[k]. */
static ls_status block_backward(model *m, const pass *p, stack *s, int k, ls_real *d)
{
    const workspace *w = &m->w;
    const block *bl = &s->block[k];
    const side at = side_of(m, p, s);
    const ls_operand dbranch =
        dropped(m, p, &at, bl->stream, d, bl->kind == BLOCK_FFN ? w->dbranch : ls_reals(w->branch));
    norm_block(m, p, bl, at.rows, s->x[k]);
    if (bl->kind == BLOCK_FFN) {
        ffn_backward(m, p, &bl->ffn, at.rows, dbranch);
    } else {
        const ls_attention_io io = attention_io(m, p, &at, bl);
        const ls_attention_shape shape = attention_shape(p, &at, bl);
        const int cross = bl->kind == BLOCK_CROSS;
        const ls_attention_grads grads = {
            .query = w->dnormed, .key = cross ? w->dkey : NULL, .params = p->dparams + bl->params};
        /* out: a layer keeps its core's output itself and does not read what came after it, which is gone by now */
        LS_TRY(ls_attention_backward(bl->attention, &shape, &io, p->params + bl->params, w->branch, dbranch.p,
                                     bl->saved, &grads));
        if (cross) m->dense->add(m->queue, rows_of(p->b, &p->b->source) * m->E, w->dkey, w->dmemory);
    }
    norm_backward(m, p, bl->norm, at.rows, s->x[k], w->dnormed, d, 1);
    return LS_OK;
}

/* d: the gradient of the last x. */
static ls_status stack_backward(model *m, const pass *p, stack *s, ls_real *d)
{
    for (int last = s->blocks; last > 0; last -= s->per_layer) {
        const int first = last - s->per_layer;
        /* The inputs of the layer's blocks again; what the last block gives is not needed. */
        if (p->keep == KEEP_LAYERS) LS_TRY(blocks_forward(m, p, s, first, last - 1, 1));
        for (int k = last - 1; k >= first; k--) LS_TRY(block_backward(m, p, s, k, d));
    }
    const side at = side_of(m, p, s);
    dropout(m, p, &at, s->stream, d, ls_reals(d));
    m->dense->embedding_backward(m->queue, at.rows, m->V, m->E, at.token, sqrt((double)m->E), d,
                                 p->dparams + s->embedding);
    return LS_OK;
}

ls_status encoder_forward(model *m, const pass *p)
{
    LS_TRY(stack_forward(m, p, &m->encoder));
    norm_forward(m, &m->w, m->encoder.norm, p->params, rows_of(p->b, &p->b->source), m->encoder.x[m->encoder.blocks],
                 ls_reals(m->w.memory));
    return LS_OK;
}

ls_status decoder_forward(model *m, const pass *p)
{
    return stack_forward(m, p, &m->decoder);
}

static ls_status backward(model *m, const pass *p)
{
    const int64_t source = rows_of(p->b, &p->b->source);
    const ls_real *x = m->encoder.x[m->encoder.blocks];
    ls_real *d = m->w.dmemory;
    m->dense->zero(m->queue, (size_t)(source * m->E) * sizeof *d, d);
    LS_TRY(stack_backward(m, p, &m->decoder, m->w.dtarget));
    norm_forward(m, &m->w, m->encoder.norm, p->params, source, x, m->w.ready);
    norm_backward(m, p, m->encoder.norm, source, x, d, d, 0);
    return stack_backward(m, p, &m->encoder, d);
}

/* ------------------------------------------------------------------------------------------------ loss */

ls_operand output_weights(const model *m, const workspace *w, const ls_real *params)
{
    return ready_weights(m, params + m->output, m->V * m->E, w->weight[0]);
}

void output_logits(const model *m, const workspace *w, const ls_real *params, int64_t rows, const ls_real *x,
                   ls_operand output, ls_real *logits)
{
    norm_forward(m, w, m->decoder.norm, params, rows, x, w->ready);
    m->dense->linear(m->queue, rows, m->E, m->V, w->ready, output, NULL, ls_reals(logits));
}

/* The loss of this rank's labels, added to sums, and, with p->dparams, the gradient of the last x of the decoder: each
 * chunk of logits is differentiated as soon as it is there, so (B,T,V) never is. */
static void output_loss(model *m, const pass *p, double grad_scale, double *sums)
{
    const workspace *w = &m->w;
    const int64_t rows = rows_of(p->b, &p->b->target), E = m->E;
    const int gradient = p->dparams != NULL;
    const ls_operand output = output_weights(m, w, p->params);
    for (int64_t row = 0; row < rows; row += wide_rows(m)) {
        const int64_t n = ls_min(wide_rows(m), rows - row);
        const ls_real *x = m->decoder.x[m->decoder.blocks] + row * E;
        output_logits(m, w, p->params, n, x, output, w->logits);
        m->dense->cross_entropy(m->queue, n, m->V, w->logits, p->label + row, m->c.train.label_smoothing, grad_scale,
                                gradient ? w->logits : NULL, sums);
        if (!gradient) continue;
        m->dense->linear_backward(m->queue, n, E, m->V, w->ready, output, ls_reals(w->logits), ls_reals(w->dnormed), 0,
                                  p->dparams + m->output);
        norm_backward(m, p, m->decoder.norm, n, x, w->dnormed, w->dtarget + row * E, 0);
    }
}

ls_status model_evaluate(model *m, const batch *b, const ls_real *params, model_loss *out)
{
    pass p = {.b = b, .params = params, .keep = KEEP_NOTHING};
    LS_TRY(pass_begin(m, &p, 1));
    LS_TRY(encoder_forward(m, &p));
    LS_TRY(decoder_forward(m, &p));
    double sums[2];
    *out = (model_loss){0};
    m->dense->zero(m->queue, LS_LOSS_SUMS * sizeof *m->w.sums, m->w.sums);
    output_loss(m, &p, 0, m->w.sums);
    LS_TRY(ls_device_read(m->sequence, sums, m->w.sums, sizeof sums));
    LS_TRY(ls_context_wait(m->sequence));
    *out = (model_loss){.loss = sums[0], .nll = sums[1], .tokens = batch_labels(b)};
    return LS_OK;
}

ls_status model_gradient(model *m, const batch *b, const ls_real *params, double grad_scale, ls_real *dparams,
                         double *sums)
{
    pass p = {.b = b,
              .params = params,
              .dparams = dparams,
              .training = 1,
              .keep = m->c.train.recompute ? KEEP_LAYERS : KEEP_BLOCKS};
    LS_TRY(pass_begin(m, &p, 1));
    LS_TRY(encoder_forward(m, &p));
    LS_TRY(decoder_forward(m, &p));
    output_loss(m, &p, grad_scale, sums);
    return backward(m, &p);
}
