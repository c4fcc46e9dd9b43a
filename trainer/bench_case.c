/* One attention, as a core and as a layer, beside the layer's projections alone, a square product and a copy of memory:
 * measured in turns, so that a machine that is busy for a while slows all of them alike. */
#include "bench.h"

#include "real.h"
#include "rng.h"

#include <math.h>
#include <stdlib.h>

/* One attention with everything a call needs, and what was measured of it. */
typedef struct subject {
    ls_context *ctx;
    ls_attention *attention;
    ls_saved *saved;
    ls_shard shard;
    ls_attention_shape shape;
    ls_attention_io io;
    ls_attention_grads grads;
    int64_t rows, width, out_width, reals, inputs;
    ls_real *memory, *params, *out, *dout;
    ls_real *widest; /* three matrices of the layer's rows, as wide as its widest projection */
    int64_t wide;
    int64_t calls;  /* at a time: on a GPU several, so that it and not its queue is measured */
    int64_t rounds; /* calls so far */
    ls_traffic before;
} subject;

static void subject_free(subject *s)
{
    ls_saved_free(s->saved);
    ls_attention_free(s->attention);
    ls_shard_free(&s->shard);
    if (s->memory != NULL) ls_device_free(s->ctx, s->memory);
    if (s->widest != NULL) ls_device_free(s->ctx, s->widest);
    ls_context_free(s->ctx);
    *s = (subject){0};
}

double bench_option(const ls_attention_options *o, const char *name)
{
    int count = 0;
    const ls_option_info *info = ls_mechanism_options(o->mechanism, &count);
    for (int i = 0; i < count; i++)
        if (strcmp(info[i].name, name) == 0) return o->value[i];
    return NAN;
}

/* ------------------------------------------------------------------------------------------------ make */

/* Uniform numbers of unit variance, those from `small` on times `factor`. */
static ls_status draw(ls_context *ctx, ls_real *to, int64_t n, int64_t small, double factor)
{
    enum { PIECE = 8192 };
    ls_real some[PIECE];
    for (int64_t i = 0; i < n; i += PIECE) {
        const int64_t m = ls_min(PIECE, n - i);
        for (int64_t k = 0; k < m; k++)
            some[k] = (ls_real)(3.4 * (ls_uniform(1, 2, 3, (uint64_t)(i + k)) - 0.5) * (i + k < small ? 1 : factor));
        LS_TRY(ls_device_write(ctx, to + i, some, (size_t)m * sizeof *some));
    }
    return LS_OK;
}

/* Inputs of unit variance, and parameters as they are initialised. */
static ls_status fill(subject *s, const ls_attention_options *o)
{
    s->reals = ls_attention_param_count(s->attention);
    const double channels = bench_option(o, "channels");
    s->rows = o->embed_dim * s->shape.batch * s->shard.n; /* in reals */
    s->out_width = o->level == LS_LEVEL_CORE && !isnan(channels) ? (int64_t)channels : 1;
    const int64_t n = s->rows, wide = n * s->out_width, all = 6 * n + 2 * wide + 2 * s->reals + 1;
    void *memory;
    LS_TRY(ls_device_alloc(s->ctx, (size_t)all * sizeof *s->memory, &memory));
    s->memory = memory;
    ls_real *at = s->memory;
    ls_real *x[6];
    for (int i = 0; i < 6; i++, at += n) x[i] = at;
    s->out = at, s->dout = at + wide, s->params = at + 2 * wide;
    LS_TRY(draw(s->ctx, s->memory, all, s->params - s->memory, 1 / sqrt((double)o->embed_dim)));
    const int self = o->pattern == LS_NS || o->pattern == LS_CS;
    s->io = (ls_attention_io){.query = x[0], .training = 1};
    s->grads = (ls_attention_grads){.query = x[3], .params = s->params + s->reals};
    s->inputs = self ? 1 : 2;
    if (!self || (o->level == LS_LEVEL_CORE && isnan(channels))) {
        s->io.key = x[1], s->grads.key = x[4];
        if (o->level == LS_LEVEL_CORE) s->io.value = x[2], s->grads.value = x[5], s->inputs = 3;
    }
    return LS_OK;
}

/* Room for what goes into the layer's projections and comes out. */
static ls_status make_room(subject *s, int64_t E)
{
    void *room;
    s->wide = E;
    for (int i = 0; i < ls_attention_num_params(s->attention); i++)
        if (ls_attention_is_projection(s->attention, i))
            for (int k = 0; k < 2; k++) s->wide = ls_max(s->wide, ls_attention_param(s->attention, i)->dim[k]);
    const int64_t reals = 3 * s->rows / E * s->wide + 1;
    LS_TRY(ls_device_alloc(s->ctx, (size_t)reals * sizeof *s->widest, &room));
    s->widest = room;
    return bench_fill(s->ctx, s->widest, reals);
}

ls_context_options bench_context(const bench *b)
{
    return (ls_context_options){.comm = b->r->comm,
                                .device = b->device,
                                .device_number = b->device_number,
                                .precision = b->precision,
                                .seed = 1};
}

static ls_status subject_make(const bench *b, const ls_attention_options *o, int64_t length, subject *s)
{
    *s = (subject){.calls = 1};
    ls_context_options options = bench_context(b);
    options.dry_size = (int)b->dry, options.dry_rank = (int)b->dry / 2;
    LS_TRY(ls_context_create(&options, &s->ctx));
    LS_TRY(ls_attention_create(s->ctx, o, &s->attention));
    ls_status status = ls_saved_create(s->attention, &s->saved);
    if (status == LS_OK) status = ls_shard_even(s->ctx, length, &s->shard);
    s->shape = (ls_attention_shape){.batch = b->batch, .queries = &s->shard, .keys = &s->shard};
    if (status == LS_OK) status = fill(s, o);
    if (status == LS_OK && o->level == LS_LEVEL_LAYER) status = make_room(s, o->embed_dim);
    LS_TRY(ls_agree(s->ctx, status));
    ls_context_traffic(s->ctx, &s->before);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ time */

static ls_status time_subject(const bench *b, subject *s, double *forward, double *backward)
{
    double begin;
    LS_TRY(bench_begin(b, s->ctx, &begin));
    for (int64_t i = 0; i < s->calls; i++)
        LS_TRY(ls_attention_forward(s->attention, &s->shape, &s->io, s->params, s->out, s->saved));
    LS_TRY(bench_lap(b, s->ctx, begin, forward));
    LS_TRY(bench_begin(b, s->ctx, &begin));
    for (int64_t i = 0; i < s->calls; i++)
        LS_TRY(ls_attention_backward(s->attention, &s->shape, &s->io, s->params, s->out, s->dout, s->saved, &s->grads));
    LS_TRY(bench_lap(b, s->ctx, begin, backward));
    *forward /= (double)s->calls, *backward /= (double)s->calls;
    s->rounds += s->calls;
    return LS_OK;
}

/* The products of a layer's projections, forward and backward, with the same shapes and biases, each by itself: in bf16
 * it rounds its own operands, which a layer does once for all that have the same. */
static ls_status time_projections(const bench *b, const subject *s, double *seconds)
{
    const int64_t rows = s->rows / b->embed_dim;
    const ls_dense_ops *dense = s->ctx->dense;
    ls_queue *queue = s->ctx->queue;
    ls_real *x = s->widest, *y = x + rows * s->wide, *dx = y + rows * s->wide;
    const int count = ls_attention_num_params(s->attention);
    double begin;
    LS_TRY(bench_begin(b, s->ctx, &begin));
    for (int64_t call = 0; call < s->calls; call++)
        for (int i = 0; i < count; i++) {
            const ls_param_info *w = ls_attention_param(s->attention, i);
            if (!ls_attention_is_projection(s->attention, i)) continue;
            const int bias = i + 1 < count && ls_attention_param(s->attention, i + 1)->ndim == 1;
            const ls_real *weight = s->params + w->offset;
            ls_real *dweight = s->grads.params + w->offset;
            dense->linear(queue, rows, w->dim[1], w->dim[0], ls_reals(x), ls_reals(weight),
                          bias ? weight + w->count : NULL, ls_reals(y));
            dense->linear_backward(queue, rows, w->dim[1], w->dim[0], ls_reals(x), ls_reals(weight), ls_reals(y),
                                   ls_reals(dx), 0, dweight);
            if (bias) dense->column_sums(queue, rows, w->dim[0], ls_reals(y), dweight + w->count);
        }
    LS_TRY(bench_lap(b, s->ctx, begin, seconds));
    *seconds /= (double)s->calls;
    return LS_OK;
}

static ls_status measure_traffic(const bench *b, const subject *s, bench_figures *f)
{
    ls_traffic now;
    ls_context_traffic(s->ctx, &now);
    double mine[3] = {0, 0, 0}, all[3];
    for (int k = 0; k < LS_CROSSINGS; k++) {
        mine[0] += (double)(now.sent[k] - s->before.sent[k]) / (double)s->rounds;
        mine[1] += (double)(now.messages[k] - s->before.messages[k]) / (double)s->rounds;
    }
    /* inputs with their gradients, output with its, parameters with theirs, what is saved, scratch */
    mine[2] = (double)(2 * s->inputs * s->rows + 2 * s->rows * s->out_width + 2 * s->reals) * sizeof(ls_real) +
              (double)ls_saved_bytes(s->saved) + (double)ls_context_bytes(s->ctx);
    if (MPI_Allreduce(mine, all, 3, MPI_DOUBLE, MPI_SUM, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: adding up bytes failed");
    f->bytes_sent = all[0], f->messages = all[1], f->peak_memory = all[2];
    return LS_OK;
}

/* What no core can do without: forward reads its inputs (q, k, v) and writes out; backward reads the inputs and dout,
 * and writes the inputs' gradients. All ranks together. */
static ls_status count_bytes(const bench *b, const subject *s, bench_figures *f)
{
    double mine[2] = {(double)(s->rows * (s->inputs + s->out_width)) * sizeof(ls_real),
                      (double)(s->rows * (2 * s->inputs + s->out_width)) * sizeof(ls_real)};
    double all[2];
    if (MPI_Allreduce(mine, all, 2, MPI_DOUBLE, MPI_SUM, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: adding up bytes failed");
    f->bytes_forward = all[0], f->bytes_backward = all[1];
    return LS_OK;
}

static ls_status one_round(const bench *b, const ceilings *top, subject *core, subject *layer, double *t[BENCH_PARTS])
{
    if (core->ctx != NULL) LS_TRY(time_subject(b, core, t[CORE_FORWARD], t[CORE_BACKWARD]));
    LS_TRY(time_subject(b, layer, t[LAYER_FORWARD], t[LAYER_BACKWARD]));
    LS_TRY(time_projections(b, layer, t[PROJECTIONS]));
    LS_TRY(ceilings_product(b, top, t[SGEMM]));
    return ceilings_copy(b, top, t[COPY]);
}

/* The median over turns of (parts above[0] to above[1]) / (parts below[0] to below[1]); 0 where there are none. */
static double median_ratio(const bench *b, double t[BENCH_PARTS][BENCH_REPEAT], const int above[2], const int below[2])
{
    double ratio[BENCH_REPEAT];
    for (int64_t i = 0; i < b->repeat; i++) {
        double side[2] = {0, 0};
        for (int k = above[0]; k <= above[1]; k++) side[0] += t[k][i];
        for (int k = below[0]; k <= below[1]; k++) side[1] += t[k][i];
        ratio[i] = side[1] > 0 ? side[0] / side[1] : 0;
    }
    return bench_median(ratio, b->repeat);
}

static void summarise(const bench *b, double t[BENCH_PARTS][BENCH_REPEAT], bench_figures *f)
{
    static const int layer[] = {LAYER_FORWARD, LAYER_BACKWARD}, core[] = {CORE_FORWARD, CORE_BACKWARD};
    static const int forward[] = {CORE_FORWARD, CORE_FORWARD}, backward[] = {CORE_BACKWARD, CORE_BACKWARD};
    static const int projections[] = {PROJECTIONS, PROJECTIONS}, sgemm[] = {SGEMM, SGEMM}, copy[] = {COPY, COPY};
    f->layer_over_projections = median_ratio(b, t, layer, projections);
    f->sgemm_over_core = median_ratio(b, t, sgemm, core);
    f->copy_over_core = median_ratio(b, t, copy, core);
    f->copy_over_forward = median_ratio(b, t, copy, forward);
    f->copy_over_backward = median_ratio(b, t, copy, backward);
    for (int k = 0; k < BENCH_PARTS; k++) f->seconds[k] = bench_median(t[k], b->repeat);
}

static ls_status measure_both(const bench *b, const ceilings *top, subject *core, subject *layer, bench_figures *f)
{
    double t[BENCH_PARTS][BENCH_REPEAT] = {0};
    double *at[BENCH_PARTS], warm[BENCH_PARTS] = {0};
    for (int k = 0; k < BENCH_PARTS; k++) at[k] = &warm[k];
    LS_TRY(one_round(b, top, core, layer, at)); /* warms up: memory is taken, pages are touched */
    if (b->device != LS_CPU) {
        LS_TRY(one_round(b, top, core, layer, at));
        core->calls = bench_calls(warm[CORE_FORWARD] + warm[CORE_BACKWARD]);
        layer->calls = bench_calls(warm[LAYER_FORWARD] + warm[LAYER_BACKWARD]);
    }
    for (int64_t i = 0; i < b->repeat; i++) {
        for (int k = 0; k < BENCH_PARTS; k++) at[k] = &t[k][i];
        LS_TRY(one_round(b, top, core, layer, at));
    }
    summarise(b, t, f);
    if (core->ctx != NULL) LS_TRY(count_bytes(b, core, f));
    return measure_traffic(b, layer, f);
}

ls_status bench_measure(const bench *b, const ceilings *top, ls_attention_options *o, int64_t length, bench_figures *f)
{
    subject core = {0}, layer = {0};
    ls_attention_options as_core = *o;
    as_core.level = LS_LEVEL_CORE;
    o->level = LS_LEVEL_LAYER;
    ls_status status = subject_make(b, o, length, &layer);
    /* a mechanism without a core level is measured as a layer alone */
    if (status == LS_OK && ls_attention_check(&as_core) == LS_OK) status = subject_make(b, &as_core, length, &core);
    if (status == LS_OK) status = measure_both(b, top, &core, &layer, f);
    subject_free(&core);
    subject_free(&layer);
    return status;
}
