/* What a model is made of: its attentions, its tensors by name, and their first values. */
#include "model_internal.h"

#include "rng.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ------------------------------------------------------------------------------------------------ tensors */

/* Sets initial values apart from whatever else is drawn from the same seed and stream. */
enum { STEP_INIT = 0x494e4954 };

/* Appends a tensor of the given shape (dim1 0: a vector) and returns its offset. */
static int64_t add_tensor(model *m, tensor_init init, int64_t dim0, int64_t dim1, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
static int64_t add_tensor(model *m, tensor_init init, int64_t dim0, int64_t dim1, const char *format, ...)
{
    model_tensor *t = &m->tensor[m->num_tensors];
    m->init[m->num_tensors++] = init;
    *t = (model_tensor){.ndim = dim1 > 0 ? 2 : 1, .dim = {dim0, dim1}, .offset = m->count, .decay = dim1 > 0};
    t->count = dim1 > 0 ? dim0 * dim1 : dim0;
    va_list list;
    va_start(list, format);
    vsnprintf(t->name, sizeof t->name, format, list);
    va_end(list);
    m->count += t->count;
    return t->offset;
}

static norm_params add_norm(model *m, const char *prefix, double gain)
{
    const int64_t weight = add_tensor(m, (tensor_init){LS_INIT_CONSTANT, gain}, m->E, 0, "%snorm.weight", prefix);
    return (norm_params){weight, add_tensor(m, (tensor_init){LS_INIT_ZERO, 0}, m->E, 0, "%snorm.bias", prefix)};
}

static int64_t add_linear(model *m, const char *prefix, int i, int64_t out, int64_t in, double gain, int64_t *bias)
{
    /* Glorot & Bengio, 2010: uniform of variance 2 / (in + out) */
    const tensor_init xavier = {LS_INIT_UNIFORM, gain * sqrt(6.0 / (double)(in + out))};
    const int64_t weight = add_tensor(m, xavier, out, in, "%s.ffn.%d.weight", prefix, i);
    *bias = add_tensor(m, (tensor_init){LS_INIT_ZERO, 0}, out, 0, "%s.ffn.%d.bias", prefix, i);
    return weight;
}

static int64_t add_attention(model *m, const char *prefix, const ls_attention *attention)
{
    const int64_t first = m->count;
    for (int i = 0; i < ls_attention_num_params(attention); i++) {
        const ls_param_info *info = ls_attention_param(attention, i);
        model_tensor *t = &m->tensor[m->num_tensors];
        *t = (model_tensor){.ndim = info->ndim, .offset = first + info->offset, .count = info->count};
        for (int d = 0; d < info->ndim; d++) t->dim[d] = info->dim[d];
        /* decay draws to 0, which means nothing to gains, logarithms and frequencies */
        t->decay = info->ndim > 1 && (info->init == LS_INIT_ZERO || info->init == LS_INIT_NORMAL ||
                                      info->init == LS_INIT_UNIFORM || info->init == LS_INIT_IDENTITY);
        snprintf(t->name, sizeof t->name, "%s.%s", prefix, info->name);
        m->init[m->num_tensors++] = (tensor_init){info->init, info->init_scale};
    }
    m->count += ls_attention_param_count(attention);
    return first;
}

static void list_stack(model *m, stack *s, const char *name)
{
    static const char *const encoder_names[] = {"attention"};
    static const char *const decoder_names[] = {"self_attention", "cross_attention"};
    const char *const *names = s == &m->encoder ? encoder_names : decoder_names;
    for (int k = 0; k < s->blocks; k++) {
        block *bl = &s->block[k];
        const int layer = k / s->per_layer;
        char prefix[64];
        if (bl->kind == BLOCK_FFN) {
            snprintf(prefix, sizeof prefix, "%s.%d.ffn_", name, layer);
            bl->norm = add_norm(m, prefix, 1);
            snprintf(prefix, sizeof prefix, "%s.%d", name, layer);
            bl->ffn.weight0 = add_linear(m, prefix, 0, m->F, m->E, 1.0, &bl->ffn.bias0);
            /* What is added to the residual stream shrinks with depth, so that its variance does not grow (Radford et
             * al., 2019). */
            bl->ffn.weight1 = add_linear(m, prefix, 1, m->E, m->F, 1.0 / sqrt((double)s->blocks), &bl->ffn.bias1);
        } else {
            const char *which = names[k % s->per_layer];
            snprintf(prefix, sizeof prefix, "%s.%d.%s_", name, layer, which);
            bl->norm = add_norm(m, prefix, 1);
            snprintf(prefix, sizeof prefix, "%s.%d.%s", name, layer, which);
            bl->params = add_attention(m, prefix, bl->attention);
        }
    }
    char prefix[64];
    snprintf(prefix, sizeof prefix, "%s.", name);
    /* The decoder's last norm starts small: logits near 0, so that the first loss is ln V and not a bet on the input
     * byte, which a tied table would make. */
    s->norm = add_norm(m, prefix, s == &m->decoder ? 0.4 : 1);
}

/* Fills the list in the order of the flat vector. Room was made for the largest number of tensors. */
static void list_tensors(model *m)
{
    /* rows of length about 1: times sqrt(E) they have unit variance as inputs, and as outputs they give logits of unit
     * variance for normalised rows */
    const tensor_init table = {LS_INIT_NORMAL, 1.0 / sqrt((double)m->E)};
    if (m->c.model.tie_embeddings) {
        m->output = add_tensor(m, table, m->V, m->E, "embedding");
        m->encoder.embedding = m->decoder.embedding = m->output;
    } else {
        m->encoder.embedding = add_tensor(m, table, m->V, m->E, "source_embedding");
        m->decoder.embedding = add_tensor(m, table, m->V, m->E, "target_embedding");
        m->output = add_tensor(m, table, m->V, m->E, "output");
    }
    list_stack(m, &m->encoder, "encoder");
    list_stack(m, &m->decoder, "decoder");
}

void model_init(const model *m, uint64_t seed, ls_real *params)
{
    for (int i = 0; i < m->num_tensors; i++) {
        const tensor_init init = m->init[i];
        ls_real *p = params + m->tensor[i].offset;
        for (int64_t j = 0; j < m->tensor[i].count; j++) {
            const uint32_t stream = (uint32_t)i;
            switch (init.kind) {
            case LS_INIT_ZERO:
                p[j] = 0;
                break;
            case LS_INIT_ONE:
                p[j] = 1;
                break;
            case LS_INIT_CONSTANT:
                p[j] = (ls_real)init.scale;
                break;
            case LS_INIT_IDENTITY: /* the element numbers of a square matrix's diagonal are multiples of its width + 1
                                    */
                p[j] = (ls_real)(init.scale * ls_normal(seed, stream, STEP_INIT, (uint64_t)j)) +
                       (j % (m->tensor[i].dim[1] + 1) == 0 ? 1 : 0);
                break;
            case LS_INIT_NORMAL:
                p[j] = (ls_real)(init.scale * ls_normal(seed, stream, STEP_INIT, (uint64_t)j));
                break;
            case LS_INIT_UNIFORM:
                p[j] = (ls_real)(init.scale * (2 * ls_uniform(seed, stream, STEP_INIT, (uint64_t)j) - 1));
                break;
            case LS_INIT_LOG_STEP:
                p[j] = (ls_real)(log(0.001) + log(100.0) * ls_uniform(seed, stream, STEP_INIT, (uint64_t)j));
                break;
            case LS_INIT_INVERSE: {
                const int64_t modes = m->tensor[i].dim[m->tensor[i].ndim - 1], n = j % modes;
                const double N = 2 * (double)modes;
                p[j] = (ls_real)(N / 3.14159265358979323846 * (N / (double)(2 * n + 1) - 1));
                break;
            }
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------ create */

/* Memory of a stack and the kinds of its blocks. Local. */
static ls_status stack_allocate(stack *s, int64_t layers, int per_layer)
{
    static const block_kind kinds[2][3] = {{BLOCK_SELF, BLOCK_FFN}, {BLOCK_SELF, BLOCK_CROSS, BLOCK_FFN}};
    if (layers < 1 || layers > 1000)
        LS_FAIL(LS_ERR_ARGUMENT, "model: %lld layers in a stack; choose 1 to 1000", (long long)layers);
    s->per_layer = per_layer;
    s->blocks = (int)layers * per_layer;
    s->block = calloc((size_t)s->blocks, sizeof *s->block);
    s->x = calloc((size_t)s->blocks + 1, sizeof(ls_real *));
    if (s->block == NULL || s->x == NULL)
        LS_FAIL(LS_ERR_MEMORY, "model: no memory for the list of %d blocks", s->blocks);
    for (int k = 0; k < s->blocks; k++) s->block[k].kind = kinds[per_layer - 2][k % per_layer];
    return LS_OK;
}

static ls_status allocate(model *m)
{
    if (m->E < 1 || m->F < 1)
        LS_FAIL(LS_ERR_ARGUMENT, "model: embed_dim %lld and ffn_dim %lld must be at least 1", (long long)m->E,
                (long long)m->F);
    LS_TRY(stack_allocate(&m->encoder, m->c.model.encoder_layers, 2));
    LS_TRY(stack_allocate(&m->decoder, m->c.model.decoder_layers, 3));
    /* tables, final norms, and for each block a norm and an attention or ffn */
    m->max_tensors = 3 + 4 + (m->encoder.blocks + m->decoder.blocks) * (2 + LS_MAX_PARAMS);
    m->tensor = calloc((size_t)m->max_tensors, sizeof *m->tensor);
    m->init = calloc((size_t)m->max_tensors, sizeof *m->init);
    if (m->tensor == NULL || m->init == NULL)
        LS_FAIL(LS_ERR_MEMORY, "model: no memory for the list of %d tensors", m->max_tensors);
    return LS_OK;
}

/* Collective. Every place that draws random numbers gets a stream of its own, counted by *stream. */
static ls_status stack_create(model *m, stack *s, uint32_t *stream)
{
    s->stream = (*stream)++;
    for (int k = 0; k < s->blocks; k++) {
        block *bl = &s->block[k];
        bl->stream = (*stream)++;
        if (bl->kind == BLOCK_FFN) continue;
        ls_attention_options o;
        LS_TRY(config_attention_options(&m->c,
                                        bl->kind == BLOCK_CROSS ? PLACE_CROSS
                                        : s == &m->encoder      ? PLACE_ENCODER
                                                                : PLACE_DECODER,
                                        &o));
        o.layout = LS_BTHD;
        o.stream = (*stream)++;
        LS_TRY(ls_attention_create(m->sequence, &o, &bl->attention));
        /* Run again one after the other, the layers can share what attentions save. */
        if (m->c.train.recompute && k >= s->per_layer)
            bl->saved = s->block[k - s->per_layer].saved;
        else
            LS_TRY(ls_agree(m->sequence, ls_saved_create(bl->attention, &bl->saved)));
    }
    return LS_OK;
}

ls_status model_create(ls_context *sequence, const config *c, model **out)
{
    *out = NULL;
    model *m = calloc(1, sizeof *m);
    ls_status status = m == NULL ? ls_fail(LS_ERR_MEMORY, "model: no memory for %zu bytes", sizeof *m) : LS_OK;
    if (m != NULL) {
        m->sequence = sequence;
        m->dense = sequence->dense;
        m->queue = sequence->queue;
        m->arena.device = sequence->ops;
        m->c = *c;
        m->E = c->model.embed_dim;
        m->F = c->model.ffn_dim;
        m->V = MODEL_VOCABULARY;
        status = allocate(m);
    }
    LS_TRY_GOTO(ls_agree(sequence, status));
    uint32_t stream = 1;
    LS_TRY_GOTO(stack_create(m, &m->encoder, &stream));
    LS_TRY_GOTO(stack_create(m, &m->decoder, &stream));
    list_tensors(m);
    *out = m;
    return LS_OK;
done:
    model_free(m);
    return status;
}

static void stack_free(const model *m, stack *s)
{
    for (int k = 0; s->block != NULL && k < s->blocks; k++) {
        if (!m->c.train.recompute || k < s->per_layer) ls_saved_free(s->block[k].saved);
        ls_attention_free(s->block[k].attention);
    }
    free(s->block);
    free(s->x);
}

void model_free(model *m)
{
    if (m == NULL) return;
    stack_free(m, &m->encoder);
    stack_free(m, &m->decoder);
    free(m->tensor);
    free(m->init);
    ls_arena_free(&m->arena);
    free(m);
}

/* ------------------------------------------------------------------------------------------------ questions */

int model_num_tensors(const model *m)
{
    return m->num_tensors;
}

const model_tensor *model_tensor_at(const model *m, int i)
{
    return i >= 0 && i < m->num_tensors ? &m->tensor[i] : NULL;
}

int64_t model_count(const model *m)
{
    return m->count;
}

static size_t stack_bytes(const model *m, const stack *s)
{
    size_t bytes = 0;
    const int own = m->c.train.recompute ? s->per_layer : s->blocks;
    for (int k = 0; k < own; k++)
        if (s->block[k].saved != NULL) bytes += ls_saved_bytes(s->block[k].saved);
    return bytes;
}

size_t model_bytes(const model *m)
{
    return m->arena.capacity + stack_bytes(m, &m->encoder) + stack_bytes(m, &m->decoder);
}
