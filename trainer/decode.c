/* One token at a time: what the blocks of the decoder have seen so far is in the states of their attentions, the source
 * was summarised when decoding began. The new rows are few, and every rank computes all of them. */
#include "model_internal.h"

#include <math.h>
#include <stdlib.h>

struct decoder {
    model *m;
    int64_t B /* targets */, beams, position, max_length;
    ls_state **state; /* by block of the decoder; NULL for ffn */
    ls_arena arena;
    workspace w; /* its own: the model may be used between steps */
    ls_real *x;  /* (B,E) */
    int32_t *token;
};

static void plan_step(decoder *d)
{
    const int64_t rows = d->B, E = d->m->E;
    d->w = (workspace){0};
    d->x = ls_take(&d->arena, rows * E);
    d->w.normed = ls_take(&d->arena, rows * E);
    d->w.branch = ls_take(&d->arena, rows * E);
    d->w.mean = ls_take(&d->arena, rows);
    d->w.rstd = ls_take(&d->arena, rows);
    d->w.logits = ls_take(&d->arena, rows * d->m->V);
    d->token = ls_arena_take(&d->arena, (size_t)rows * sizeof *d->token);
    take_weights(d->m, &d->arena, &d->w);
    d->w.ready = take_ready(d->m, &d->arena, d->w.normed, rows * E);
    d->w.hidden = ls_take_operand(d->m->sequence, &d->arena, ls_min(wide_rows(d->m), rows) * d->m->F);
}

static ls_status allocate(decoder *d)
{
    d->state = calloc((size_t)d->m->decoder.blocks, sizeof(ls_state *));
    if (d->state == NULL) LS_FAIL(LS_ERR_MEMORY, "decoder: no memory for the list of %d states", d->m->decoder.blocks);
    d->arena.device = d->m->sequence->ops;
    ls_arena_measure(&d->arena);
    plan_step(d);
    LS_TRY(ls_arena_reserve(&d->arena, "decoder"));
    plan_step(d);
    return ls_arena_check(&d->arena, "decoder");
}

/* The encoder's output and its padding, of each source `beams` times. */
typedef struct sources {
    ls_arena arena;
    ls_real *memory; /* (B beams,n,E) */
    uint8_t *pad;    /* (B beams,n) */
} sources;

static void plan_sources(const decoder *d, int64_t n, sources *s)
{
    s->memory = ls_take(&s->arena, ls_max(1, d->B * n * d->m->E)); /* something, where a rank has no rows, too */
    s->pad = ls_arena_take(&s->arena, (size_t)(d->B * n) + 1);
}

static ls_status copy_sources(const decoder *d, const batch *b, sources *s)
{
    const model *m = d->m;
    const int64_t n = b->source.n, reals = n * m->E;
    s->arena.device = m->sequence->ops;
    ls_arena_measure(&s->arena);
    plan_sources(d, n, s);
    LS_TRY(ls_arena_reserve(&s->arena, "decoder: sources of beams"));
    plan_sources(d, n, s);
    for (int64_t r = 0; n > 0 && r < d->B; r++) {
        const int64_t of = r / d->beams;
        m->dense->copy(m->queue, reals, ls_reals(m->w.memory + of * reals), ls_reals(s->memory + r * reals));
        LS_TRY(ls_device_write(m->sequence, s->pad + r * n, b->source_pad + of * n, (size_t)n));
    }
    return ls_arena_check(&s->arena, "decoder: sources of beams");
}

/* Collective: the encoder's output becomes a summary in each cross attention's state. */
static ls_status take_source(decoder *d, const batch *b, sources *s, const ls_real *params)
{
    model *m = d->m;
    pass p = {.b = b, .params = params, .keep = KEEP_NOTHING};
    LS_TRY(pass_begin(m, &p, 0));
    LS_TRY(encoder_forward(m, &p));
    if (d->beams > 1) LS_TRY(ls_agree(m->sequence, copy_sources(d, b, s)));
    const ls_attention_shape shape = {.batch = d->B, .queries = NULL, .keys = &b->source};
    const ls_attention_io io = {.key = d->beams > 1 ? s->memory : m->w.memory,
                                .key_padding_mask = d->beams > 1 ? s->pad : p.source_pad};
    for (int k = 0; k < m->decoder.blocks; k++) {
        const block *bl = &m->decoder.block[k];
        if (bl->kind == BLOCK_FFN) continue;
        LS_TRY(ls_state_create(bl->attention, d->B, d->max_length, &d->state[k]));
        if (bl->kind == BLOCK_CROSS)
            LS_TRY(ls_state_source(bl->attention, d->state[k], &shape, &io, params + bl->params));
    }
    return LS_OK;
}

ls_status decoder_create(model *m, const batch *source, int64_t beams, int64_t max_length, const ls_real *params,
                         decoder **out)
{
    sources copies = {0};
    *out = NULL;
    ls_status status = LS_OK;
    decoder *d = calloc(1, sizeof *d);
    if (source->B < 1 || beams < 1 || max_length < 1)
        status = ls_fail(LS_ERR_ARGUMENT,
                         "decoder: %lld sources, %lld beams of at most %lld tokens: give at least one of each",
                         (long long)source->B, (long long)beams, (long long)max_length);
    else if (d == NULL)
        status = ls_fail(LS_ERR_MEMORY, "decoder: no memory for %zu bytes", sizeof *d);
    else {
        *d = (decoder){.m = m, .B = source->B * beams, .beams = beams, .max_length = max_length};
        status = allocate(d);
    }
    LS_TRY_GOTO(ls_agree(m->sequence, status));
    LS_TRY_GOTO(take_source(d, source, &copies, params));
    *out = d;
done:
    ls_arena_free(&copies.arena);
    if (*out == NULL) decoder_free(d);
    return status;
}

void decoder_free(decoder *d)
{
    if (d == NULL) return;
    for (int k = 0; d->state != NULL && k < d->m->decoder.blocks; k++) ls_state_free(d->state[k]);
    free(d->state);
    ls_arena_free(&d->arena);
    free(d);
}

/* The same on every rank, since all pass the same: nothing to agree on. */
static ls_status check_step(const decoder *d, const int32_t *token)
{
    if (d->position >= d->max_length)
        LS_FAIL(LS_ERR_ARGUMENT, "decoder: all %lld positions are used: create it with a larger max_length",
                (long long)d->max_length);
    for (int64_t b = 0; b < d->B; b++)
        if (token[b] < 0 || token[b] >= d->m->V)
            LS_FAIL(LS_ERR_ARGUMENT, "decoder: token %d of sequence %lld is outside [0, %lld)", (int)token[b],
                    (long long)b, (long long)d->m->V);
    return LS_OK;
}

ls_status decoder_step(decoder *d, const int32_t *token, const ls_real *params, ls_real *logits)
{
    const model *m = d->m;
    const stack *s = &m->decoder;
    const workspace *w = &d->w;
    const int64_t B = d->B, E = m->E;
    LS_TRY(check_step(d, token));
    LS_TRY(ls_device_write(m->sequence, d->token, token, (size_t)B * sizeof *token));
    m->dense->embedding(m->queue, B, E, d->token, params + s->embedding, sqrt((double)E), d->x);
    m->dense->add_positions(m->queue, B, 1, E, d->position, d->x);
    for (int k = 0; k < s->blocks; k++) {
        const block *bl = &s->block[k];
        norm_forward(m, w, bl->norm, params, B, d->x, bl->kind == BLOCK_FFN ? w->ready : ls_reals(w->normed));
        if (bl->kind == BLOCK_FFN) {
            ffn_forward(m, w, &bl->ffn, params, B);
        } else {
            const ls_attention_io io = {.query = w->normed};
            LS_TRY(ls_attention_step(bl->attention, d->state[k], &io, params + bl->params, w->branch));
        }
        m->dense->residual(m->queue, B, 1, E, (ls_drop){0}, w->branch, branch_bias(bl, params), d->x, d->x);
    }
    output_logits(m, w, params, B, d->x, output_weights(m, w, params), w->logits);
    d->position++;
    LS_TRY(ls_device_read(m->sequence, logits, w->logits, (size_t)(B * m->V) * sizeof *logits));
    return ls_context_wait(m->sequence);
}

ls_status decoder_check(const ls_real *logits)
{
    for (int v = 0; v < MODEL_VOCABULARY; v++)
        if (v != TOKEN_BOS && !isfinite(logits[v]))
            LS_FAIL(LS_ERR_NONFINITE,
                    "decoder: the logit of token %d is not finite: the checkpoint's weights are damaged", v);
    return LS_OK;
}

ls_status decoder_reorder(decoder *d, const int64_t *from)
{
    int moves = 0;
    for (int64_t r = 0; r < d->B; r++) {
        if (from[r] < 0 || from[r] >= d->B || from[r] / d->beams != r / d->beams)
            LS_FAIL(LS_ERR_ARGUMENT, "decoder: row %lld cannot go on from row %lld, which is of another source or none",
                    (long long)r, (long long)from[r]);
        moves |= from[r] != r;
    }
    for (int k = 0; moves && k < d->m->decoder.blocks; k++) /* of the source, the targets know the same */
        if (d->m->decoder.block[k].kind == BLOCK_SELF) LS_TRY(ls_state_reorder(d->state[k], from));
    return LS_OK;
}
