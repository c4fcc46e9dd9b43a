/* A training step: the same from one micro-batch and from four, nothing where the loss is not finite, and on a GPU one
 * wait of the host, however many micro-batches there are. With LONGSPAN_TEST_DEVICE=cuda on a GPU; the waits are
 * counted by the one that is emulated, whose streams do everything as late as may be: who does not wait there when he
 * should sees what was before, and who waits is seen. The batch is overwritten as soon as a step has taken it.
 *
 * And the models that come of it, token by token: the logits of the whole forward pass, for each mechanism that
 * decodes, where test_model.c looks at few and on the CPU. LONGSPAN_TEST_PRECISION as in the other tests: there a step,
 * whose rows are not kept and so not rounded, and the pass are within what rounding does. */
#include "model_internal.h"
#include "step.h"
#include "where.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { B = 8, S = 13, T = 9, STEPS = 3 };

/* There with the emulator alone. */
uint64_t emulator_host_waits(void) __attribute__((weak));

static ranks here;

#define assert_ok(call)                                                                                                \
    do {                                                                                                               \
        if ((call) != LS_OK) fail_msg("%s: %s", #call, ls_last_error());                                               \
    } while (0)

/* ------------------------------------------------------------------------------------------------ a run */

typedef struct run {
    config c;
    stepper t;
    batch b;
} run;

/* Mechanisms of encoder, decoder and cross attention. */
typedef struct trio {
    int width;
    const char *encoder, *decoder, *cross;
} trio;
static const trio plain = {8, "abc", "softmax", "softmax"};

/* sharing: ranks for each sequence, as parallel.sequence. */
static void begin_run(run *x, trio of, int accumulation, int sharing)
{
    char micro[64], share[64], precision[64], width[64], encodes[64], steps_by[64], crosses[64];
    const char *const set[] = {width,
                               "model.ffn_dim=16",
                               "model.num_heads=2",
                               "model.encoder_layers=1",
                               "model.decoder_layers=1",
                               "model.dropout=0.1",
                               encodes,
                               steps_by,
                               crosses,
                               precision,
                               "train.label_smoothing=0.1",
                               "train.warmup_steps=0",
                               "train.schedule=constant",
                               "train.clip_norm=0.5",
                               "train.batch=8",
                               test_where() == LS_CUDA ? "device=cuda" : "device=cpu",
                               test_transport() == LS_TRANSPORT_NCCL ? "parallel.transport=nccl"
                                                                     : "parallel.transport=auto",
                               micro,
                               share};
    snprintf(width, sizeof width, "model.embed_dim=%d", of.width);
    snprintf(encodes, sizeof encodes, "model.encoder.mechanism=%s", of.encoder);
    snprintf(steps_by, sizeof steps_by, "model.decoder.mechanism=%s", of.decoder);
    snprintf(crosses, sizeof crosses, "model.cross.mechanism=%s", of.cross);
    snprintf(precision, sizeof precision, "train.precision=%s", ls_precision_name(test_rounding()));
    snprintf(micro, sizeof micro, "train.accumulation=%d", accumulation);
    snprintf(share, sizeof share, "parallel.sequence=%d", sharing);
    memset(x, 0, sizeof *x);
    assert_ok(config_parse("configuration", "", 0, set, (int)(sizeof set / sizeof *set), &x->c));
    assert_ok(ranks_split(&here, &x->c, sharing));
    assert_ok(stepper_create(&here, &x->c, &x->t));
    assert_ok(stepper_init(&x->t));
    x->b.source_token = malloc(B * S * sizeof(int32_t));
    x->b.input_token = malloc(B * T * sizeof(int32_t));
    x->b.label = malloc(B * T * sizeof(int32_t));
    x->b.source_pad = malloc(B * S);
    x->b.target_pad = malloc(B * T);
    assert_true(x->b.source_token != NULL && x->b.input_token != NULL && x->b.label != NULL);
    assert_true(x->b.source_pad != NULL && x->b.target_pad != NULL);
}

static void end_run(run *x)
{
    batch_free(&x->b);
    stepper_free(&x->t);
    ranks_close(&here);
}

static int32_t token_at(int64_t row, int64_t position, int side)
{
    return (int32_t)((uint64_t)(row * 131 + position * 17 + side * 7 + row * position) % 256);
}

/* Rows [lo, hi) of the global batch of a step; row r lacks its last r % 3 tokens. */
static void fill(run *x, int64_t step, int64_t lo, int64_t hi)
{
    batch *b = &x->b;
    ls_shard_free(&b->source);
    ls_shard_free(&b->target);
    assert_ok(ls_shard_even(here.sequence, S, &b->source));
    assert_ok(ls_shard_even(here.sequence, T, &b->target));
    b->B = hi - lo, b->sample = (uint64_t)(step * B + lo), b->draw = (uint64_t)step + 1;
    for (int64_t row = lo; row < hi; row++) {
        for (int64_t i = 0; i < b->source.n; i++) {
            const int64_t t = b->source.lo + i, at = (row - lo) * b->source.n + i, pad = t >= S - row % 3;
            b->source_token[at] = pad ? TOKEN_PAD : token_at(row, t, 0);
            b->source_pad[at] = (uint8_t)pad;
        }
        for (int64_t i = 0; i < b->target.n; i++) {
            const int64_t t = b->target.lo + i, at = (row - lo) * b->target.n + i, pad = t >= T - row % 3;
            b->label[at] = pad ? TOKEN_PAD : token_at(row, t, 1);
            b->input_token[at] = pad ? TOKEN_PAD : t == 0 ? TOKEN_BOS : token_at(row, t - 1, 1);
            b->target_pad[at] = (uint8_t)pad;
        }
    }
}

static void forget(const batch *b)
{
    for (int64_t i = 0; i < b->B * b->source.n; i++) b->source_token[i] = 255, b->source_pad[i] = 0;
    for (int64_t i = 0; i < b->B * b->target.n; i++)
        b->input_token[i] = b->label[i] = 254, b->target_pad[i] = (uint8_t)(i % 2);
}

static int64_t all_labels(void)
{
    int64_t labels = 0;
    for (int64_t row = 0; row < B; row++) labels += T - row % 3;
    return labels;
}

/* loss: NULL, or what is added to this rank's sum. */
static step_sums take_step(run *x, const double *loss)
{
    step_sums sums;
    const int64_t step = x->t.s.step;
    stepper_begin(&x->t);
    for (int64_t a = 0; a < x->c.train.accumulation; a++) {
        int64_t lo, hi;
        stepper_piece(&x->t, a, &lo, &hi);
        if (lo == hi) continue;
        fill(x, step, lo, hi);
        assert_ok(stepper_add(&x->t, &x->b, all_labels()));
        forget(&x->b);
    }
    if (loss != NULL) assert_ok(ls_device_write(here.sequence, x->t.sums, loss, sizeof *loss));
    assert_ok(stepper_end(&x->t, all_labels(), here.rank == here.size - 1 && step == 1, 1e-2, &sums));
    return sums;
}

static ls_real *parameters(const run *x)
{
    const size_t bytes = (size_t)x->t.count * sizeof(ls_real);
    ls_real *p = malloc(bytes);
    assert_non_null(p);
    assert_ok(ls_device_read(here.sequence, p, x->t.s.params, bytes));
    return p;
}

/* ------------------------------------------------------------------------------------------------ tests */

static void near(const char *what, double a, double b, double tolerance)
{
    if (!(fabs(a - b) <= tolerance * fabs(b))) fail_msg("%s: %.10g and %.10g", what, a, b);
}

/* Losses of STEPS steps fall, and are those of the first run. */
static void same_steps(void **state)
{
    (void)state;
    step_sums first[STEPS] = {{0}};
    for (int sharing = 1; sharing <= here.size; sharing += here.size > 1 ? here.size - 1 : 1)
        for (int accumulation = 1; accumulation <= 4; accumulation += 3) {
            run x;
            begin_run(&x, plain, accumulation, sharing);
            for (int i = 0; i < STEPS; i++) {
                const step_sums sums = take_step(&x, NULL);
                if (sharing == 1 && accumulation == 1) first[i] = sums;
                near("loss", sums.loss, first[i].loss, test_rounding() == LS_FLOAT32 ? 1e-5 : 1e-3);
                near("nll", sums.nll, first[i].nll, test_rounding() == LS_FLOAT32 ? 1e-5 : 1e-3);
                near("squares", sums.squares, first[i].squares, test_rounding() == LS_FLOAT32 ? 1e-4 : 2e-2);
                near("labels seen", sums.tokens, 1, 1e-6);
                assert_int_equal(sums.stop, i == 1);
                assert_int_equal(sums.updated, 1);
                assert_int_equal(x.t.s.step, i + 1);
                assert_int_equal(x.t.s.samples, (i + 1) * B);
            }
            end_run(&x);
        }
    assert_true(first[0].loss > 5 && first[0].loss < 8); /* ln 258 = 5.6 */
    assert_true(first[STEPS - 1].loss < first[0].loss);
}

/* The update was queued before the host knew: it must have been without effect, on every rank. */
static void no_step_without_a_loss(void **state)
{
    (void)state;
    const double broken[] = {NAN, INFINITY, -INFINITY};
    run x;
    begin_run(&x, plain, 2, 1);
    take_step(&x, NULL);
    ls_real *before = parameters(&x);
    for (int i = 0; i < 3; i++) {
        const step_sums sums = take_step(&x, here.rank == 0 ? &broken[i] : NULL);
        ls_real *after = parameters(&x);
        assert_true(!isfinite(sums.loss));
        assert_true(isfinite(sums.squares));
        assert_int_equal(sums.updated, 0);
        assert_int_equal(x.t.s.step, 1);
        assert_memory_equal(before, after, (size_t)x.t.count * sizeof *before);
        free(after);
    }
    assert_int_equal(take_step(&x, NULL).updated, 1);
    ls_real *after = parameters(&x);
    assert_memory_not_equal(before, after, (size_t)x.t.count * sizeof *before);
    free(before);
    free(after);
    end_run(&x);
}

/* Once for the numbers; and where MPI adds up the gradients, once for their one part. */
static void one_wait(void **state)
{
    (void)state;
#ifdef NDEBUG
    const char *usual = "0";
#else
    const char *usual = "1";
#endif
    const char *poison = getenv("LONGSPAN_POISON"); /* which waits until nobody uses the memory, see core/arena.c */
    if (emulator_host_waits == NULL || getenv("LONGSPAN_EMULATOR_ORDER") != NULL ||
        strcmp(poison != NULL ? poison : usual, "0") != 0)
        skip();
    for (int accumulation = 1; accumulation <= 8; accumulation *= 8) {
        run x;
        begin_run(&x, plain, accumulation, 1);
        for (int i = 0; i < 2; i++) take_step(&x, NULL); /* memory is as large as it will be */
        for (int i = 0; i < 2; i++) {
            const uint64_t before = emulator_host_waits();
            take_step(&x, NULL);
            const uint64_t waits = emulator_host_waits() - before;
            if (waits != (uint64_t)(here.size > 1 && test_transport() != LS_TRANSPORT_NCCL ? 2 : 1))
                fail_msg("a step of %d micro-batches on %d ranks waits %llu times", accumulation, here.size,
                         (unsigned long long)waits);
        }
        end_run(&x);
    }
}

/* The logits of every position of x->b at once, (B,T,V) on every rank. */
static float *logits_of(run *x)
{
    model *m = x->t.m;
    pass p = {.b = &x->b, .params = x->t.s.params, .keep = KEEP_NOTHING};
    const int64_t n = x->b.target.n, lo = x->b.target.lo;
    const size_t bytes = (size_t)(n * m->V) * sizeof(ls_real);
    float *all = calloc((size_t)(x->b.B * T * m->V), sizeof *all);
    void *row = NULL;
    assert_non_null(all);
    assert_ok(ls_device_alloc(m->sequence, bytes + 1, &row));
    assert_ok(pass_begin(m, &p, 1));
    assert_ok(encoder_forward(m, &p));
    assert_ok(decoder_forward(m, &p));
    for (int64_t b = 0; b < x->b.B; b++) {
        output_logits(m, &m->w, p.params, n, m->decoder.x[m->decoder.blocks] + b * n * m->E,
                      output_weights(m, &m->w, p.params), row);
        assert_ok(ls_device_read(m->sequence, all + (b * T + lo) * m->V, row, bytes));
    }
    ls_device_free(m->sequence, row);
    MPI_Allreduce(MPI_IN_PLACE, all, (int)(x->b.B * T * m->V), MPI_FLOAT, MPI_SUM, here.comm);
    return all;
}

static void decodes(trio of, double *worst)
{
    const double allowed[] = {[LS_FLOAT32] = 1e-5, [LS_TF32] = 2.5e-3, [LS_BF16] = 2e-2};
    run x;
    decoder *d = NULL;
    double most = 0, gap = 0;
    begin_run(&x, of, 1, here.size);
    take_step(&x, NULL);
    fill(&x, 5, 0, B);
    const int64_t V = x.t.m->V;
    float *want = logits_of(&x);
    ls_real *got = calloc((size_t)(B * V), sizeof *got);
    assert_non_null(got);
    assert_ok(decoder_create(x.t.m, &x.b, 1, T, x.t.s.params, &d));
    for (int64_t t = 0; t < T; t++) {
        int32_t token[B];
        for (int64_t b = 0; b < B; b++) token[b] = t == 0 ? TOKEN_BOS : token_at(b, t - 1, 1);
        assert_ok(decoder_step(d, token, x.t.s.params, got));
        for (int64_t b = 0; b < B; b++)
            for (int64_t v = 0; v < V && t < T - b % 3; v++) { /* what is not padding, see fill */
                most = fmax(most, fabs((double)want[(b * T + t) * V + v]));
                gap = fmax(gap, fabs((double)got[b * V + v] - (double)want[(b * T + t) * V + v]));
            }
    }
    if (!(gap <= allowed[test_rounding()] * most))
        fail_msg("%s, %s, %s: a step's logits are %.3g off, of %.3g", of.encoder, of.decoder, of.cross, gap, most);
    *worst = fmax(*worst, gap / most);
    decoder_free(d);
    free(want);
    free(got);
    end_run(&x);
}

static void steps_are_rows(void **state)
{
    (void)state;
    /* of 64 features in two heads exact softmax in bf16 is on tensor cores, and its step is not */
    const trio models[] = {{8, "abc", "softmax", "softmax"},    {64, "softmax", "softmax", "softmax"},
                           {8, "nystrom", "abc", "abc"},        {8, "performer", "performer", "softmax"},
                           {8, "local", "local", "abc"},        {8, "cosformer", "abc", "softmax"},
                           {8, "s4d", "s4d", "softmax"},        {8, "longshort", "longshort", "abc"},
                           {8, "probsparse", "softmax", "abc"}, {8, "lara", "abc", "softmax"}};
    double worst = 0;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) decodes(models[i], &worst);
    if (here.rank == 0) printf("decoding: largest relative error %.1e\n", worst);
    assert_true(test_rounding() == LS_FLOAT32 || worst > 1e-5); /* or nothing was rounded */
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_steps),
        cmocka_unit_test(no_step_without_a_loss),
        cmocka_unit_test(one_wait),
        cmocka_unit_test(steps_are_rows),
    };
    MPI_Init(&argc, &argv);
    here = (ranks){.groups = 1, .comm = MPI_COMM_WORLD};
    MPI_Comm_rank(here.comm, &here.rank);
    MPI_Comm_size(here.comm, &here.size);
    if (!test_has_device(here.size)) {
        MPI_Finalize();
        return TEST_SKIPPED;
    }
    const ls_context_options options = {.comm = here.comm, .device = LS_CPU};
    if (ls_context_create(&options, &here.world) != LS_OK) MPI_Abort(here.comm, 1);
    here.gradients = here.world;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    if (failed) MPI_Abort(here.comm, 1); /* the others may be in the midst of a step */
    ls_context_free(here.world);
    MPI_Finalize();
    return failed;
}
