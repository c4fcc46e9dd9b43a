/* Learning rates at known points, the norm, and AdamW against the textbook in double: on the CPU, or with
 * LONGSPAN_TEST_DEVICE=cuda on a GPU. */
#include "optim.h"
#include "where.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static config with(const char *const *set, int n)
{
    config c;
    if (config_parse("configuration", "", 0, set, n, &c) != LS_OK) fail_msg("%s", ls_last_error());
    return c;
}
#define WITH(...)                                                                                                      \
    with((const char *const[]){__VA_ARGS__}, (int)(sizeof((const char *const[]){__VA_ARGS__}) / sizeof(char *)))

/* ------------------------------------------------------------------------------------------------ schedules */

static void near(double a, double b)
{
    if (!(fabs(a - b) <= 1e-12 * fmax(fabs(a), fabs(b)))) fail_msg("%.17g is not %.17g", a, b);
}

static void lengths(void **state)
{
    (void)state;
    const config c = WITH("train.short_length=100", "train.short_steps=10", "train.lengthen_steps=3");
    assert_int_equal(schedule_length(&c, 1, 1600), 100);
    assert_int_equal(schedule_length(&c, 10, 1600), 100);
    assert_int_equal(schedule_length(&c, 11, 1600), 200); /* 16 fold in 4 equal factors */
    assert_int_equal(schedule_length(&c, 12, 1600), 400);
    assert_int_equal(schedule_length(&c, 13, 1600), 800);
    assert_int_equal(schedule_length(&c, 14, 1600), 1600);
    assert_int_equal(schedule_length(&c, 1, 50), 50); /* shorter than short */
    const config never = WITH("train.short_length=0", "train.short_steps=10");
    assert_int_equal(schedule_length(&never, 1, 1600), 1600);
}

static void cosine(void **state)
{
    (void)state;
    const config c = WITH("train.steps=110", "train.warmup_steps=10", "train.learning_rate=1e-3",
                          "train.min_learning_rate=1e-4", "train.schedule=cosine");
    near(schedule_rate(&c, 1), 1e-4); /* a tenth of the way */
    near(schedule_rate(&c, 5), 5e-4);
    near(schedule_rate(&c, 10), 1e-3);
    near(schedule_rate(&c, 35), 1e-4 + 9e-4 * (1 + sqrt(0.5)) / 2); /* a quarter of the fall: cos(π/4) */
    near(schedule_rate(&c, 60), 5.5e-4);                            /* half of it */
    near(schedule_rate(&c, 110), 1e-4);
    near(schedule_rate(&c, 500), 1e-4); /* stays there */
    for (int64_t i = 11; i <= 110; i++) assert_true(schedule_rate(&c, i) < schedule_rate(&c, i - 1));
}

static void inverse_square_root(void **state)
{
    (void)state;
    const config c = WITH("train.steps=10000", "train.warmup_steps=100", "train.learning_rate=2e-3",
                          "train.schedule=inverse_sqrt", "train.min_learning_rate=3e-4");
    near(schedule_rate(&c, 50), 1e-3);
    near(schedule_rate(&c, 100), 2e-3);
    near(schedule_rate(&c, 400), 1e-3);
    near(schedule_rate(&c, 2500), 4e-4);
    near(schedule_rate(&c, 10000), 3e-4);
}

static void constant_and_corners(void **state)
{
    (void)state;
    const config c = WITH("train.schedule=constant", "train.warmup_steps=0", "train.learning_rate=0.25");
    near(schedule_rate(&c, 1), 0.25);
    near(schedule_rate(&c, 1000000), 0.25);
    const config d = WITH("train.schedule=inverse_sqrt", "train.warmup_steps=0", "train.learning_rate=0.25");
    near(schedule_rate(&d, 1), 0.25);
    near(schedule_rate(&d, 4), 0.125);
    /* a run that ends while it warms up, and one that ends as it has warmed up */
    const config e = WITH("train.warmup_steps=100", "train.steps=20", "train.learning_rate=1");
    near(schedule_rate(&e, 20), 0.2);
    const config f = WITH("train.warmup_steps=20", "train.steps=20", "train.learning_rate=1");
    near(schedule_rate(&f, 20), 1);
    const config g = WITH("train.warmup_steps=0", "train.steps=1", "train.learning_rate=1");
    near(schedule_rate(&g, 1), 0);
}

/* ------------------------------------------------------------------------------------------------ norm */

/* Pseudo-random in [-1, 1), good enough for numbers to be unlike each other. */
static double noise(uint32_t *x)
{
    *x = *x * 1664525u + 1013904223u;
    return (double)*x / 2147483648.0 - 1;
}

static const ls_adam_ops *ops;
static const ls_device_ops *device;
static ls_queue *queue;

/* Memory of the device with what lies at p; back: what is there now, and the memory is gone. */
static void *on(const void *p, size_t bytes)
{
    void *there = device->alloc(bytes);
    assert_non_null(there);
    assert_int_equal(device->to_device(queue, there, p, bytes), LS_OK);
    return there;
}

static void back(void *p, void *there, size_t bytes)
{
    assert_int_equal(device->to_host(queue, p, there, bytes), LS_OK);
    assert_int_equal(device->wait(queue), LS_OK);
    device->release(there);
}

static double norm_of(const ls_real *g, int64_t n)
{
    double squares[LS_SQUARES];
    void *there = on(g, (size_t)n * sizeof *g), *sum = on(squares, sizeof squares);
    ops->squares(queue, n, there, sum);
    back(squares, sum, sizeof squares);
    device->release(there);
    return sqrt(squares[0]);
}

static void norm(void **state)
{
    (void)state;
    uint32_t seed = 1;
    enum { N = 10007 };
    static ls_real g[N];
    for (int64_t n = 0; n < N; n += n < 40 ? 1 : 997) {
        long double sum = 0;
        for (int64_t i = 0; i < n; i++) {
            g[i] = (ls_real)(noise(&seed) * pow(10, 8 * noise(&seed)));
            sum += (long double)g[i] * (long double)g[i];
        }
        const double wanted = (double)sqrtl(sum);
        assert_true(fabs(norm_of(g, n) - wanted) <= 1e-14 * wanted);
    }
    g[17] = (ls_real)INFINITY;
    assert_true(isinf(norm_of(g, 100)));
    g[17] = (ls_real)NAN;
    assert_true(isnan(norm_of(g, 100)));
    for (int i = 0; i < 4; i++) g[i] = (ls_real)1e30; /* the squares are beyond float */
    assert_true(fabs(norm_of(g, 4) - 2e30) < 1e24);
}

/* ------------------------------------------------------------------------------------------------ AdamW */

typedef struct world {
    ls_context *ctx;
    model *m;
    config c;
    int64_t n;
    ls_real *p, *g, *m1, *m2;
    double *rp, *r1, *r2; /* the reference */
} world;

static world make(double weight_decay)
{
    char decay[64];
    snprintf(decay, sizeof decay, "train.weight_decay=%.17g", weight_decay);
    world w = {.c = WITH("model.embed_dim=8", "model.num_heads=2", "model.ffn_dim=16", "model.encoder_layers=1",
                         "model.decoder_layers=1", "train.beta1=0.9", "train.beta2=0.98", "train.epsilon=1e-8", decay)};
    const ls_context_options alone = {.comm = MPI_COMM_NULL};
    assert_int_equal(ls_context_create(&alone, &w.ctx), LS_OK);
    assert_int_equal(model_create(w.ctx, &w.c, &w.m), LS_OK);
    w.n = model_count(w.m);
    const size_t n = (size_t)w.n;
    w.p = malloc(n * sizeof *w.p);
    w.g = malloc(n * sizeof *w.g);
    w.m1 = calloc(n, sizeof *w.m1);
    w.m2 = calloc(n, sizeof *w.m2);
    w.rp = malloc(n * sizeof *w.rp);
    w.r1 = calloc(n, sizeof *w.r1);
    w.r2 = calloc(n, sizeof *w.r2);
    model_init(w.m, 3, w.p);
    for (int64_t i = 0; i < w.n; i++) w.rp[i] = (double)w.p[i];
    return w;
}

static void release(world *w)
{
    model_free(w->m);
    ls_context_free(w->ctx);
    free(w->p);
    free(w->g);
    free(w->m1);
    free(w->m2);
    free(w->rp);
    free(w->r1);
    free(w->r2);
}

/* One step, in which the clipping of w->g makes the factor `clip` of it (1: there is none). */
static void update(world *w, int64_t step, double rate, double clip)
{
    double squares[LS_SQUARES];
    const size_t bytes = (size_t)w->n * sizeof *w->p;
    w->c.train.clip_norm = clip < 1 ? clip * norm_of(w->g, w->n) : 0;
    void *g = on(w->g, bytes), *p = on(w->p, bytes), *m1 = on(w->m1, bytes), *m2 = on(w->m2, bytes);
    void *sum = on(squares, sizeof squares);
    ops->squares(queue, w->n, g, sum);
    adamw_step(ops, queue, &w->c, w->m, step, rate, sum, NULL, g, p, m1, m2);
    back(w->g, g, bytes);
    back(w->p, p, bytes);
    back(w->m1, m1, bytes);
    back(w->m2, m2, bytes);
    back(squares, sum, sizeof squares);
}

/* Algorithm 2 of the paper, element by element, with the decay scaled by the learning rate. */
static void reference(world *w, int64_t step, double rate, double clip)
{
    const double b1 = w->c.train.beta1, b2 = w->c.train.beta2, t = (double)step;
    for (int k = 0; k < model_num_tensors(w->m); k++) {
        const model_tensor *tensor = model_tensor_at(w->m, k);
        for (int64_t i = tensor->offset; i < tensor->offset + tensor->count; i++) {
            const double g = clip * (double)w->g[i];
            w->r1[i] = b1 * w->r1[i] + (1 - b1) * g;
            w->r2[i] = b2 * w->r2[i] + (1 - b2) * g * g;
            const double mean = w->r1[i] / (1 - pow(b1, t)), square = w->r2[i] / (1 - pow(b2, t));
            const double decay = tensor->decay ? w->c.train.weight_decay * w->rp[i] : 0;
            w->rp[i] -= rate * (mean / (sqrt(square) + w->c.train.epsilon) + decay);
        }
    }
}

static void adamw(void **state)
{
    (void)state;
    world w = make(0.1);
    uint32_t seed = 7;
    double largest = 0, moved = 0;
    for (int64_t step = 1; step <= 50; step++) {
        const double rate = 1e-2 / (double)step, clip = step % 3 == 0 ? 0.25 : 1;
        for (int64_t i = 0; i < w.n; i++) w.g[i] = (ls_real)(noise(&seed) * pow(10, 3 * noise(&seed)));
        update(&w, step, rate, clip);
        reference(&w, step, rate, clip);
    }
    for (int64_t i = 0; i < w.n; i++) {
        largest = fmax(largest, fabs((double)w.p[i] - w.rp[i]));
        moved = fmax(moved, fabs(w.rp[i]));
        assert_true(fabs((double)w.m1[i] - w.r1[i]) <= 1e-5 * sqrt(w.r2[i]));
        assert_true(fabs((double)w.m2[i] - w.r2[i]) <= 1e-5 * w.r2[i]);
    }
    if (!(largest < 2e-6)) fail_msg("parameters differ by %g", largest);
    assert_true(moved > 0.01);
    release(&w);
}

static void first_step_is_the_sign(void **state)
{
    (void)state;
    world w = make(0);
    uint32_t seed = 9;
    for (int64_t i = 0; i < w.n; i++) w.g[i] = (ls_real)noise(&seed);
    update(&w, 1, 1e-3, 1);
    for (int64_t i = 0; i < w.n; i++) {
        const double wanted = w.rp[i] - (w.g[i] > 0 ? 1e-3 : -1e-3);
        assert_true(fabs((double)w.p[i] - wanted) < 1e-6 || fabs((double)w.g[i]) < 1e-4);
    }
    release(&w);
}

static void decay_spares_vectors(void **state)
{
    (void)state;
    world w = make(0.5);
    int matrices = 0, vectors = 0;
    memset(w.g, 0, (size_t)w.n * sizeof *w.g);
    update(&w, 1, 0.1, 1);
    for (int k = 0; k < model_num_tensors(w.m); k++) {
        const model_tensor *t = model_tensor_at(w.m, k);
        const double factor = t->decay ? 1 - 0.1 * 0.5 : 1;
        for (int64_t i = t->offset; i < t->offset + t->count; i++) {
            assert_true(fabs((double)w.p[i] - factor * w.rp[i]) <= 1e-6 * fabs(w.rp[i]));
        }
        if (t->decay)
            matrices++;
        else
            vectors++;
    }
    assert_true(matrices > 0 && vectors > 0);
    release(&w);
}

static void same_bits_every_time(void **state)
{
    (void)state;
    world a = make(0.1), b = make(0.1);
    uint32_t seed = 11;
    for (int64_t step = 1; step <= 5; step++) {
        for (int64_t i = 0; i < a.n; i++) b.g[i] = a.g[i] = (ls_real)noise(&seed);
        assert_true(norm_of(a.g, a.n) == norm_of(b.g, b.n));
        update(&a, step, 1e-3, 0.5);
        update(&b, step, 1e-3, 0.5);
    }
    assert_memory_equal(a.p, b.p, (size_t)a.n * sizeof *a.p);
    release(&a);
    release(&b);
}

/* Not a number anywhere, or a norm beyond all: the step is as if it had not been. */
static void nothing_of_what_is_not_finite(void **state)
{
    (void)state;
    for (int k = 0; k < 2; k++) {
        world w = make(0.1), old = make(0.1);
        for (int64_t i = 0; i < w.n; i++) w.g[i] = 1;
        w.g[w.n / 2] = (ls_real)(k ? NAN : -INFINITY);
        update(&w, 1, 1e-3, 1);
        assert_memory_equal(w.p, old.p, (size_t)w.n * sizeof *w.p);
        assert_memory_equal(w.m1, old.m1, (size_t)w.n * sizeof *w.p);
        assert_memory_equal(w.m2, old.m2, (size_t)w.n * sizeof *w.p);
        w.g[w.n / 2] = 1;
        update(&w, 1, 1e-3, 1);
        assert_memory_not_equal(w.p, old.p, (size_t)w.n * sizeof *w.p);
        release(&w);
        release(&old);
    }
}

/* Wherever runs begin and end, the vectors are what one run makes of them. */
static void runs_at_any_place(void **state)
{
    (void)state;
    enum { N = 1000 };
    const ls_adam_rule rule = {.step = 3, .rate = 1e-2, .beta1 = 0.9, .beta2 = 0.98, .epsilon = 1e-8, .clip_norm = 1};
    ls_adam_run run[64];
    int runs = 0;
    for (int64_t at = 0; at < N; at += run[runs++].count)
        run[runs] = (ls_adam_run){.offset = at, .count = ls_min(1 + runs * 5 % 37, N - at)};
    ls_real x[2][4][N]; /* g, params, mean, square */
    for (int k = 0; k < 2; k++) {
        uint32_t seed = 17;
        double squares[LS_SQUARES];
        void *there[4], *sum = on(squares, sizeof squares);
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < N; j++) x[k][i][j] = (ls_real)(i < 3 ? noise(&seed) : fabs(noise(&seed)));
            there[i] = on(x[k][i], sizeof x[k][i]);
        }
        ops->squares(queue, N, there[0], sum);
        const ls_adam_run whole = {.count = N};
        ops->update(queue, &rule, k ? runs : 1, k ? run : &whole, sum, NULL, there[0], there[1], there[2], there[3]);
        for (int i = 0; i < 4; i++) back(x[k][i], there[i], sizeof x[k][i]);
        back(squares, sum, sizeof squares);
    }
    assert_memory_equal(x[0], x[1], sizeof x[0]);
}

/* A gradient whose norm is above the bound is scaled by bound / norm: as one of norm 1 by a bound of that. */
static void clipping_scales(void **state)
{
    (void)state;
    if (queue != NULL) skip();
    world a = make(0.1), b = make(0.1);
    uint32_t seed = 13;
    for (int64_t step = 1; step <= 6; step++) {
        for (int64_t i = 0; i < a.n; i++) b.g[i] = a.g[i] = (ls_real)noise(&seed);
        double squares[LS_SQUARES];
        ops->squares(NULL, a.n, a.g, squares);
        const double norm = sqrt(squares[0]), one = 1;
        a.c.train.clip_norm = step % 2 == 0 ? 0.3 * norm : 2 * norm;
        b.c.train.clip_norm = norm > a.c.train.clip_norm ? a.c.train.clip_norm / norm : 1;
        adamw_step(ops, NULL, &a.c, a.m, step, 1e-3, squares, NULL, a.g, a.p, a.m1, a.m2);
        adamw_step(ops, NULL, &b.c, b.m, step, 1e-3, &one, NULL, b.g, b.p, b.m1, b.m2);
    }
    assert_memory_equal(a.p, b.p, (size_t)a.n * sizeof *a.p);
    release(&a);
    release(&b);
}

int main(void)
{
    const ls_device where = test_where();
    if (!test_has_device(1)) return TEST_SKIPPED;
    ops = ls_adam_of(where);
    device = ls_device_find(where);
    if (device->open(0, LS_FLOAT32, &queue) != LS_OK) {
        fprintf(stderr, "test_optim: no device: %s\n", ls_last_error());
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lengths),
        cmocka_unit_test(cosine),
        cmocka_unit_test(inverse_square_root),
        cmocka_unit_test(constant_and_corners),
        cmocka_unit_test(norm),
        cmocka_unit_test(adamw),
        cmocka_unit_test(first_step_is_the_sign),
        cmocka_unit_test(decay_spares_vectors),
        cmocka_unit_test(same_bits_every_time),
        cmocka_unit_test(nothing_of_what_is_not_finite),
        cmocka_unit_test(runs_at_any_place),
        cmocka_unit_test(clipping_scales),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    device->close(queue);
    return failed;
}
