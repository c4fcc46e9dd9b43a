/* The dense layers against naive code in double: forwards by value, backwards by central differences of the naive
 * forward. Errors are max |got - expected| / max |expected|. Buffers are allocated at their exact size, so that the
 * sanitizer build sees every access beyond; sizes lie on both sides of the tiles inside. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "dense.h"
#include "erf.h"
#include "products.h"
#include "rng.h"
#include "where.h"

#ifdef LS_REAL_DOUBLE
static const double forward_tolerance = 1e-12, backward_tolerance = 1e-6, cdf_tolerance = 1e-15, tail_tolerance = 1e-13;
#else
static const double forward_tolerance = 1e-5, backward_tolerance = 1e-5, cdf_tolerance = 3e-7, tail_tolerance = 1e-5;
#endif

/* ------------------------------------------------------------------------------------------------ tools */

static struct {
    char *host, *device; /* device: while an operation runs on it */
    size_t size;
} owned[256];
static int owned_count;

static void *fresh(int64_t n, size_t size)
{
    assert_true(owned_count < 256);
    owned[owned_count].size = (size_t)n * size;
    return owned[owned_count++].host = malloc((size_t)n * size);
}

static int free_all(void **state)
{
    (void)state;
    while (owned_count > 0) free(owned[--owned_count].host);
    return 0;
}

/* What is tested: on the CPU, or with LONGSPAN_TEST_DEVICE=cuda on a GPU. */
static const ls_dense_ops *dense;
static const ls_device_ops *device;
static ls_queue *queue;

/* Where the operation that is about to run finds what lies at p, in memory from fresh(). */
static void *on(const void *p)
{
    const char *at = p;
    for (int i = 0; i < owned_count && queue != NULL; i++) {
        if (at != owned[i].host && !(at > owned[i].host && at < owned[i].host + owned[i].size)) continue;
        if (owned[i].device == NULL) {
            assert_non_null(owned[i].device = device->alloc(owned[i].size));
            assert_int_equal(device->to_device(queue, owned[i].device, owned[i].host, owned[i].size), LS_OK);
        }
        return owned[i].device + (at - owned[i].host);
    }
    assert_null(queue);
    return (void *)p;
}

static void back(void)
{
    for (int i = 0; i < owned_count; i++) {
        if (owned[i].device == NULL) continue;
        assert_int_equal(device->to_host(queue, owned[i].host, owned[i].device, owned[i].size), LS_OK);
        device->release(owned[i].device);
        owned[i].device = NULL;
    }
    assert_int_equal(device->wait(queue), LS_OK);
}

static ls_operand of(const ls_real *p)
{
    return ls_reals(on(p));
}
static const ls_operand nothing = {NULL, sizeof(ls_real)};

#define RUN(what, ...) (dense->what(queue, __VA_ARGS__), back())

static ls_real *fill(int64_t n, double value)
{
    ls_real *x = fresh(n, sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (ls_real)value;
    return x;
}

/* Normal numbers, others at each call of a test. */
static ls_real *noise(int64_t n)
{
    ls_real *x = fresh(n, sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = (ls_real)ls_normal(7, (uint32_t)owned_count, 0, (uint64_t)i);
    return x;
}

static ls_real *copy(int64_t n, const ls_real *x)
{
    ls_real *y = fresh(n, sizeof *y);
    for (int64_t i = 0; i < n; i++) y[i] = x[i];
    return y;
}

static double *widen(int64_t n, const ls_real *x)
{
    double *y = fresh(n, sizeof *y);
    for (int64_t i = 0; i < n; i++) y[i] = (double)x[i];
    return y;
}

static int32_t *tokens(int64_t n, const int32_t *from)
{
    int32_t *x = fresh(n, sizeof *x);
    memcpy(x, from, (size_t)n * sizeof *x);
    return x;
}

static double *wide(int64_t n)
{
    return fresh(n, sizeof(double));
}

/* NaN anywhere in got fails too. */
static void assert_close(int64_t n, const ls_real *got, const double *expected, double tolerance)
{
    double max = 0, error = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = fabs((double)got[i] - expected[i]);
        if (!(e <= error)) error = e;
        if (fabs(expected[i]) > max) max = fabs(expected[i]);
    }
    if (!(error <= tolerance * max)) print_error("error %g of %g, relative %g\n", error, max, error / max);
    assert_true(error <= tolerance * max);
}

static void assert_same(int64_t n, const ls_real *a, const ls_real *b)
{
    for (int64_t i = 0; i < n; i++) assert_memory_equal(a + i, b + i, sizeof *a);
}

/* A scalar function of some arrays, by the naive code: Σ dy·f(x, w, b), or a loss. */
typedef struct problem {
    int64_t rows, in, out;
    double *x, *w, *b, *dy, smoothing;
    const int32_t *target;
} problem;
typedef double (*objective)(const problem *);

/* got = before (NULL: 0) + factor · d objective / d at, at up to 150 elements that are spread over the n of `at`. */
static void check_gradient(objective f, const problem *p, int64_t n, double *at, const ls_real *before, double factor,
                           const ls_real *got)
{
    const double h = 1e-5;
    const int64_t step = n / 150 + 1, count = (n + step - 1) / step;
    ls_real *picked = fill(count, 0);
    double *expected = wide(count);
    for (int64_t k = 0; k < count; k++) {
        const double keep = at[k * step];
        at[k * step] = keep + h;
        const double up = f(p);
        at[k * step] = keep - h;
        const double down = f(p);
        at[k * step] = keep;
        expected[k] = factor * (up - down) / (2 * h) + (before ? (double)before[k * step] : 0);
        picked[k] = got[k * step];
    }
    assert_close(count, picked, expected, backward_tolerance);
}

/* ------------------------------------------------------------------------------------------------ linear */

static void naive_linear(const problem *p, double *y)
{
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t o = 0; o < p->out; o++) {
            double sum = p->b ? p->b[o] : 0;
            for (int64_t i = 0; i < p->in; i++) sum += p->x[r * p->in + i] * p->w[o * p->in + i];
            y[r * p->out + o] = sum;
        }
}

static double linear_objective(const problem *p)
{
    double sum = 0, *y = malloc((size_t)(p->rows * p->out) * sizeof *y);
    naive_linear(p, y);
    for (int64_t i = 0; i < p->rows * p->out; i++) sum += p->dy[i] * y[i];
    free(y);
    return sum;
}

static const int64_t linear_sizes[][3] = {{1, 1, 1}, {3, 5, 2}, {40, 7, 9}, {2, 3, 300}, {5, 270, 4}, {1500, 4, 12}};

/* Operands of size k, of noise, and what the naive code reads. */
typedef struct linear_case {
    const ls_real *x, *w, *b;
    problem p;
} linear_case;
static linear_case linear_case_of(size_t k)
{
    const int64_t rows = linear_sizes[k][0], in = linear_sizes[k][1], out = linear_sizes[k][2];
    linear_case c = {.p = {.rows = rows, .in = in, .out = out}};
    c.x = noise(rows * in), c.w = noise(out * in), c.b = noise(out);
    c.p.x = widen(rows * in, c.x), c.p.w = widen(out * in, c.w), c.p.b = widen(out, c.b);
    return c;
}

static void test_linear(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof linear_sizes / sizeof *linear_sizes; k++) {
        const linear_case c = linear_case_of(k);
        const ls_real *x = c.x, *w = c.w, *b = c.b;
        problem p = c.p;
        const int64_t rows = p.rows, in = p.in, out = p.out;
        ls_real *y = fill(rows * out, NAN); /* overwritten, whatever stood there */
        double *expected = wide(rows * out);
        naive_linear(&p, expected);
        RUN(linear, rows, in, out, of(x), of(w), on(b), of(y));
        assert_close(rows * out, y, expected, forward_tolerance);
        p.b = NULL;
        y = fill(rows * out, NAN);
        naive_linear(&p, expected);
        RUN(linear, rows, in, out, of(x), of(w), NULL, of(y));
        assert_close(rows * out, y, expected, forward_tolerance);
    }
}

/* The products of linear layers are counted, and listed by shape while someone wants to know; done again they give the
 * same bits and are not counted. */
static void test_products(void **state)
{
    (void)state;
    const int64_t rows = 37, in = 5, out = 9;
    const ls_real *x = noise(rows * in), *w = noise(out * in), *dy = noise(rows * out);
    ls_real *y = fill(rows * out, NAN), *again = fill(rows * out, NAN), *dx = fill(rows * in, 0);
    ls_real *dw = fill(out * in, 0);
    ls_products list = {0};
    const double before = ls_products_operations(), one = 2.0 * 37 * 5 * 9;
    RUN(linear, rows, in, out, of(x), of(w), NULL, of(y));
    assert_true(ls_products_operations() - before == one);
    ls_products_keep(&list);
    for (int i = 0; i < 3; i++) RUN(linear, rows, in, out, of(x), of(w), NULL, of(y));
    RUN(linear_backward, rows, in, out, of(x), of(w), of(dy), of(dx), 1, on(dw));
    ls_products_keep(NULL);
    RUN(linear, rows, in, out, of(x), of(w), NULL, of(y));
    assert_true(ls_products_operations() - before == 7 * one);
    assert_int_equal(list.kinds, 3);
    assert_false(list.short_of_memory);
    const ls_product *p = &list.kind[0].product;
    assert_int_equal(list.kind[0].times, 3);
    assert_int_equal(list.kind[1].times + list.kind[2].times, 2);
    assert_true(p->m == rows && p->n == out && p->k == in && p->batch == 1);
    assert_true(!p->transpose_a && p->transpose_b && !p->adds && !p->in_double);
    for (int i = 1; i < 3; i++) {
        const ls_product *other = &list.kind[i].product;
        assert_true(other->m * other->n * other->k == rows * in * out && other->adds && !other->transpose_b);
    }
    int64_t a, b, c;
    ls_product_spans(p, &a, &b, &c);
    assert_true(a == rows * in && b == out * in && c == rows * out);
    ls_product_repeat(queue, p, on(x), on(w), on(again));
    back();
    assert_same(rows * out, again, y);
    assert_true(ls_products_operations() - before == 7 * one);
    ls_products_free(&list);
    assert_int_equal(list.kinds, 0);
}

/* By value, and each row's bits again when it stands among fewer rows. */
static void test_linear_alike(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof linear_sizes / sizeof *linear_sizes; k++) {
        const linear_case c = linear_case_of(k);
        const ls_real *x = c.x, *w = c.w, *b = c.b;
        problem p = c.p;
        const int64_t rows = p.rows, in = p.in, out = p.out;
        ls_real *y = fill(rows * out, NAN);
        double *expected = wide(rows * out);
        naive_linear(&p, expected);
        RUN(linear_alike, rows, in, out, on(x), on(w), on(b), on(y));
        assert_close(rows * out, y, expected, forward_tolerance);
        for (int64_t n = 1; n < 7; n++)
            for (int64_t r = 0; r + n <= rows; r += 3 + rows / 20) {
                ls_real *piece = fill(n * out, NAN);
                RUN(linear_alike, n, in, out, on(x + r * in), on(w), on(b), on(piece));
                assert_memory_equal(piece, y + r * out, (size_t)(n * out) * sizeof *piece);
            }
    }
}

static void test_linear_backward(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof linear_sizes / sizeof *linear_sizes; k++) {
        const linear_case c = linear_case_of(k);
        problem p = c.p;
        const int64_t rows = p.rows, in = p.in, out = p.out;
        const ls_real *x = c.x, *w = c.w, *dy = noise(rows * out);
        p.dy = widen(rows * out, dy);
        const ls_real *dx0 = noise(rows * in), *dw0 = noise(out * in), *db0 = noise(out);
        ls_real *dx = fill(rows * in, NAN), *dw = copy(out * in, dw0), *db = copy(out, db0);
        RUN(linear_backward, rows, in, out, of(x), of(w), of(dy), of(dx), 0, on(dw));
        RUN(column_sums, rows, out, of(dy), on(db));
        check_gradient(linear_objective, &p, rows * in, p.x, NULL, 1, dx);
        check_gradient(linear_objective, &p, out * in, p.w, dw0, 1, dw);
        check_gradient(linear_objective, &p, out, p.b, db0, 1, db);
        ls_real *db_again = copy(out, db0), *dy_again = fill(rows * out, NAN);
        RUN(sum_and_copy, rows, out, on(dy), on(db_again), of(dy_again));
        assert_same(out, db_again, db);
        assert_same(rows * out, dy_again, dy);
        dx = copy(rows * in, dx0);
        ls_real *dw_again = copy(out * in, dw0);
        RUN(linear_backward, rows, in, out, of(x), of(w), of(dy), of(dx), 1, on(dw_again));
        check_gradient(linear_objective, &p, rows * in, p.x, dx0, 1, dx);
        assert_same(out * in, dw_again, dw);
        dw_again = copy(out * in, dw0);
        RUN(linear_backward, rows, in, out, of(x), of(w), of(dy), nothing, 0, on(dw_again));
        assert_same(out * in, dw_again, dw);
    }
}

/* ------------------------------------------------------------------------------------------------ layer norm */

static void naive_layer_norm(const problem *p, double *y, double *mean, double *rstd)
{
    const int64_t E = p->in;
    for (int64_t r = 0; r < p->rows; r++) {
        const double *x = p->x + r * E;
        double m = 0, v = 0;
        for (int64_t j = 0; j < E; j++) m += x[j] / (double)E;
        for (int64_t j = 0; j < E; j++) v += (x[j] - m) * (x[j] - m) / (double)E;
        mean[r] = m;
        rstd[r] = 1 / sqrt(v + 1e-5);
        for (int64_t j = 0; j < E; j++) y[r * E + j] = (x[j] - m) * rstd[r] * p->w[j] + p->b[j];
    }
}

static double layer_norm_objective(const problem *p)
{
    const int64_t n = p->rows * p->in;
    double sum = 0, *y = malloc((size_t)(n + 2 * p->rows) * sizeof *y);
    naive_layer_norm(p, y, y + n, y + n + p->rows);
    for (int64_t i = 0; i < n; i++) sum += p->dy[i] * y[i];
    free(y);
    return sum;
}

static const int64_t norm_sizes[][2] = {{1, 3}, {3, 5}, {32, 16}, {33, 64}, {70, 24}, {35, 300}, {2, 513}, {2100, 12}};

static void test_layer_norm(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof norm_sizes / sizeof *norm_sizes; k++) {
        const int64_t rows = norm_sizes[k][0], E = norm_sizes[k][1];
        ls_real *x = noise(rows * E);
        const ls_real *w = noise(E), *b = noise(E);
        for (int64_t j = 0; j < E; j++) x[j] += 100; /* one row far from 0 */
        problem p = {.rows = rows, .in = E};
        p.x = widen(rows * E, x), p.w = widen(E, w), p.b = widen(E, b);
        ls_real *y = fill(rows * E, NAN), *mean = fill(rows, NAN), *rstd = fill(rows, NAN);
        double *expected = wide(rows * E), *expected_mean = wide(rows), *expected_rstd = wide(rows);
        naive_layer_norm(&p, expected, expected_mean, expected_rstd);
        RUN(layer_norm, rows, E, on(x), on(w), on(b), of(y), on(mean), on(rstd));
        assert_close(rows * E, y, expected, forward_tolerance);
        assert_close(rows, mean, expected_mean, forward_tolerance);
        assert_close(rows, rstd, expected_rstd, forward_tolerance);
    }
}

/* Variance 0, also where the first element is the outlier that the shifted sums are taken around. */
static void test_layer_norm_special_rows(void **state)
{
    (void)state;
    enum { E = 48 };
    const ls_real *w = noise(E), *b = noise(E);
    ls_real *x = fill(2 * E, 12345.678), *y = fill(2 * E, NAN), *mean = fill(2, NAN), *rstd = fill(2, NAN);
    for (int64_t j = 1; j < E; j++) x[E + j] = (ls_real)(0.25 * (double)(j % 3));
    RUN(layer_norm, 1, E, on(x), on(w), on(b), of(y), on(mean), on(rstd));
    assert_same(E, y, b);
    assert_same(1, mean, x);
    problem p = {.rows = 1, .in = E, .x = widen(E, x + E), .w = widen(E, w), .b = widen(E, b)};
    double *expected = wide(E), expected_mean, expected_rstd;
    naive_layer_norm(&p, expected, &expected_mean, &expected_rstd);
    RUN(layer_norm, 2, E, on(x), on(w), on(b), of(y), on(mean), on(rstd));
    assert_close(E, y + E, expected, forward_tolerance);
    assert_close(1, rstd + 1, &expected_rstd, forward_tolerance);
    x[3] = (ls_real)NAN; /* is seen, in its own row only */
    RUN(layer_norm, 2, E, on(x), on(w), on(b), of(y), on(mean), on(rstd));
    assert_true(isnan(y[0]));
    assert_close(E, y + E, expected, forward_tolerance);
}

static void test_layer_norm_backward(void **state)
{
    (void)state;
    for (size_t k = 0; k < sizeof norm_sizes / sizeof *norm_sizes; k++) {
        const int64_t rows = norm_sizes[k][0], E = norm_sizes[k][1];
        const ls_real *x = noise(rows * E), *w = noise(E), *b = noise(E), *dy = noise(rows * E);
        problem p = {.rows = rows, .in = E};
        p.x = widen(rows * E, x), p.w = widen(E, w), p.b = widen(E, b), p.dy = widen(rows * E, dy);
        const ls_real *dx0 = noise(rows * E), *dw0 = noise(E), *db0 = noise(E);
        ls_real *y = fill(rows * E, 0), *mean = fill(rows, 0), *rstd = fill(rows, 0);
        RUN(layer_norm, rows, E, on(x), on(w), on(b), of(y), on(mean), on(rstd));
        ls_real *dx = fill(rows * E, NAN), *dw = copy(E, dw0), *db = copy(E, db0);
        RUN(layer_norm_backward, rows, E, on(x), on(w), on(mean), on(rstd), on(dy), on(dx), 0, on(dw), on(db));
        check_gradient(layer_norm_objective, &p, rows * E, p.x, NULL, 1, dx);
        check_gradient(layer_norm_objective, &p, E, p.w, dw0, 1, dw);
        check_gradient(layer_norm_objective, &p, E, p.b, db0, 1, db);
        ls_real *sum = copy(rows * E, dx0), *dw_again = copy(E, dw0), *db_again = copy(E, db0);
        RUN(layer_norm_backward, rows, E, on(x), on(w), on(mean), on(rstd), on(dy), on(sum), 1, on(dw_again),
            on(db_again));
        check_gradient(layer_norm_objective, &p, rows * E, p.x, dx0, 1, sum);
        assert_same(E, dw_again, dw);
        ls_real *both = copy(rows * E, dy);
        dw_again = copy(E, dw0), db_again = copy(E, db0);
        RUN(layer_norm_backward, rows, E, on(x), on(w), on(mean), on(rstd), on(both), on(both), 0, on(dw_again),
            on(db_again));
        assert_same(rows * E, both, dx);
        assert_same(E, dw_again, dw);
        assert_same(E, db_again, db);
    }
}

/* ------------------------------------------------------------------------------------------------ activations */

static void test_normal_cdf(void **state)
{
    (void)state;
    double worst = 0, worst_tail = 0, worst_density = 0;
    for (int i = -80000; i <= 80000; i++) {
        ls_real density;
        const double x = (double)(ls_real)(i * 1e-4), cdf = (double)ls_normal_cdf((ls_real)x, &density);
        worst = fmax(worst, fabs(2 * cdf - 1 - erf(x / sqrt(2))));
        worst_density = fmax(worst_density, fabs((double)density - exp(-x * x / 2) / sqrt(2 * acos(-1))));
        const double tail = erfc(-x / sqrt(2)) / 2;
        worst_tail = fmax(worst_tail, fabs(cdf - tail) / tail); /* relative: negative numbers keep their digits */
    }
    assert_true(worst <= cdf_tolerance);
    assert_true(worst_density <= cdf_tolerance);
    assert_true(worst_tail <= tail_tolerance);
    ls_real density;
    assert_true(ls_normal_cdf(-100, &density) == 0 && density == 0);
    assert_true(ls_normal_cdf(100, &density) == 1 && density == 0);
}

static double gelu_objective(const problem *p)
{
    double sum = 0;
    for (int64_t i = 0; i < p->in; i++) sum += p->dy[i] * p->x[i] * (1 + erf(p->x[i] / sqrt(2))) / 2;
    return sum;
}

static void test_gelu(void **state)
{
    (void)state;
    for (int64_t n = 1; n < 140; n += 23) {
        ls_real *x = noise(n);
        const ls_real *dy = noise(n);
        for (int64_t i = 0; i < n; i++) x[i] *= 3;
        problem p = {.in = n, .x = widen(n, x), .dy = widen(n, dy)};
        double *expected = wide(n);
        for (int64_t i = 0; i < n; i++) expected[i] = p.x[i] * (1 + erf(p.x[i] / sqrt(2))) / 2;
        ls_real *y = fill(n, NAN), *dx = fill(n, NAN), *in_place = copy(n, x), *d_in_place = copy(n, dy);
        RUN(gelu, 1, n, of(x), NULL, of(y));
        assert_close(n, y, expected, forward_tolerance);
        RUN(gelu, 1, n, of(in_place), NULL, of(in_place));
        assert_same(n, in_place, y);
        RUN(gelu_backward, 1, n, of(x), NULL, of(dy), of(dx));
        check_gradient(gelu_objective, &p, n, p.x, NULL, 1, dx);
        RUN(gelu_backward, 1, n, of(x), NULL, of(d_in_place), of(d_in_place));
        assert_same(n, d_in_place, dx);
    }
}

static void test_relu(void **state)
{
    (void)state;
    enum { N = 77 };
    ls_real *x = noise(N), *y = fill(N, NAN), *dx = fill(N, NAN);
    const ls_real *dy = noise(N);
    x[5] = 0;
    RUN(relu, 1, N, of(x), NULL, of(y));
    RUN(relu_backward, 1, N, of(x), NULL, of(dy), of(dx));
    for (int i = 0; i < N; i++) {
        assert_true(y[i] == (x[i] > 0 ? x[i] : 0));
        assert_true(dx[i] == (x[i] > 0 ? dy[i] : 0));
    }
    ls_real *in_place = copy(N, x), *d_in_place = copy(N, dy);
    RUN(relu, 1, N, of(in_place), NULL, of(in_place));
    assert_same(N, in_place, y);
    RUN(relu_backward, 1, N, of(x), NULL, of(d_in_place), of(d_in_place));
    assert_same(N, d_in_place, dx);
    x[70] = x[3] = (ls_real)NAN;
    RUN(relu, 1, N, of(x), NULL, of(y));
    assert_true(isnan(y[70]) && isnan(y[3]) && !isnan(y[4]));
}

/* A bias is added before, and only there: the same as of rows to which it was added. */
static void test_biased(void **state)
{
    (void)state;
    const int64_t sizes[][2] = {{1, 1}, {3, 5}, {7, 64}, {2, 700}};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const int64_t rows = sizes[k][0], n = sizes[k][1], all = rows * n;
        const ls_real *x = noise(all), *b = noise(n), *dy = noise(all);
        ls_real *sum = fill(all, 0), *got = fill(all, NAN), *want = fill(all, NAN);
        for (int64_t i = 0; i < all; i++) sum[i] = x[i] + b[i % n];
        RUN(gelu, rows, n, of(x), on(b), of(got));
        RUN(gelu, rows, n, of(sum), NULL, of(want));
        assert_same(all, got, want);
        RUN(relu, rows, n, of(x), on(b), of(got));
        RUN(relu, rows, n, of(sum), NULL, of(want));
        assert_same(all, got, want);
        RUN(gelu_backward, rows, n, of(x), on(b), of(dy), of(got));
        RUN(gelu_backward, rows, n, of(sum), NULL, of(dy), of(want));
        assert_same(all, got, want);
        RUN(relu_backward, rows, n, of(x), on(b), of(dy), of(got));
        RUN(relu_backward, rows, n, of(sum), NULL, of(dy), of(want));
        assert_same(all, got, want);
    }
}

/* ------------------------------------------------------------------------------------------------ embedding */

static void test_embedding(void **state)
{
    (void)state;
    enum { V = 5, ROWS = 7, E = 19 };
    const int32_t *token =
        tokens(ROWS, (const int32_t[]){3, -1, 0, 3, 4, -1, 3}); /* 3 occurs three times: its gradients add up */
    const double scale = 4.5;
    const ls_real *table = noise((int64_t)V * E);
    ls_real *y = fill((int64_t)ROWS * E, NAN), *dy = noise((int64_t)ROWS * E);
    RUN(embedding, ROWS, E, on(token), on(table), scale, on(y));
    double *expected = widen((int64_t)ROWS * E, y);
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < E; j++) expected[r * E + j] = token[r] < 0 ? 0 : scale * (double)table[token[r] * E + j];
    assert_close((int64_t)ROWS * E, y, expected, forward_tolerance);
    for (int j = 0; j < E; j++) assert_true(y[E + j] == 0);

    ls_real *dtable = noise((int64_t)V * E);
    expected = widen((int64_t)V * E, dtable);
    for (int j = 0; j < E; j++) dy[E + j] = (ls_real)NAN;
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < E && token[r] >= 0; j++) expected[token[r] * E + j] += scale * (double)dy[r * E + j];
    RUN(embedding_backward, ROWS, V, E, on(token), scale, on(dy), on(dtable));
    assert_close((int64_t)V * E, dtable, expected, forward_tolerance);
}

/* More rows than are looked at in one go, most of them of one token. */
static void test_embedding_of_many(void **state)
{
    (void)state;
    enum { V = 4, ROWS = 9001 };
    int32_t token[ROWS];
    for (int r = 0; r < ROWS; r++) token[r] = r % 11 == 0 ? r % 3 - 1 : 3;
    const int32_t *kept = tokens(ROWS, token);
    for (int64_t E = 36; E < 38; E++) {
        const ls_real *dy = noise(ROWS * E), *before = noise(V * E);
        ls_real *dtable = copy(V * E, before);
        double *expected = widen(V * E, before);
        for (int64_t r = 0; r < ROWS; r++)
            for (int64_t j = 0; j < E && token[r] >= 0; j++) expected[token[r] * E + j] += 0.5 * (double)dy[r * E + j];
        RUN(embedding_backward, ROWS, V, E, on(kept), 0.5, on(dy), on(dtable));
        assert_close(V * E, dtable, expected, forward_tolerance);
        assert_same(E, dtable + 2 * E, before + 2 * E); /* of no row */
    }
}

/* ------------------------------------------------------------------------------------------------ positions */

static void test_positions(void **state)
{
    (void)state;
    const int64_t starts[] = {0, 63, 64, 1000, 1000003, ((int64_t)1 << 31) - 150}, widths[] = {1, 2, 7, 64, 300};
    const int64_t B = 2, T = 140;
    for (size_t k = 0; k < sizeof starts / sizeof *starts; k++)
        for (size_t m = 0; m < sizeof widths / sizeof *widths; m++) {
            const int64_t E = widths[m], half = E / 2, lo = starts[k];
            ls_real *x = fill(B * T * E, 2);
            RUN(add_positions, B, T, E, lo, on(x));
            double worst = 0;
            for (int64_t i = 0; i < B * T * E; i++) {
                const int64_t j = i % E, t = i / E % T;
                const long double f = powl(10000, -2 * (long double)(j % (half > 0 ? half : 1)) / (long double)E);
                const long double angle = (long double)(lo + t) * f;
                const double pe = j >= 2 * half ? 0 : (double)(j < half ? sinl(angle) : cosl(angle));
                worst = fmax(worst, fabs((double)x[i] - 2 - pe));
            }
            assert_true(worst < 1e-6);
        }
}

/* A position has the same row bit for bit, wherever the piece that holds it begins. */
static void test_positions_in_pieces(void **state)
{
    (void)state;
    const int64_t cut[] = {0, 1, 2, 60, 60, 66, 130, 300}, T = 300, E = 301, lo = 123456;
    ls_real *whole = fill(T * E, 0);
    RUN(add_positions, 1, T, E, lo, on(whole));
    for (size_t k = 0; k + 1 < sizeof cut / sizeof *cut; k++) {
        const int64_t n = cut[k + 1] - cut[k];
        ls_real *piece = fill(2 * n * E, 0);
        RUN(add_positions, 2, n, E, lo + cut[k], on(piece));
        assert_same(n * E, piece, whole + cut[k] * E);
        assert_same(n * E, piece + n * E, whole + cut[k] * E);
    }
}

/* ------------------------------------------------------------------------------------------------ dropout */

static const int64_t dropout_widths[] = {1, 5, 8, 13, 64, 520, 1001};

/* The mask by its definition, from ls_random4. */
static void test_dropout_mask(void **state)
{
    (void)state;
    const int64_t B = 2, T = 21, lo = ((int64_t)1 << 31) - 5;
    const uint64_t seed = 0x123456789abcdefU, sample = 41;
    const uint32_t stream = 17;
    const double rate = 0.3, keep = 1 - round(rate * 65536) / 65536;
    for (size_t k = 0; k < sizeof dropout_widths / sizeof *dropout_widths; k++) {
        const int64_t E = dropout_widths[k];
        const ls_real *x = noise(B * T * E);
        ls_real *y = copy(B * T * E, x);
        RUN(dropout, B, T, E, (ls_drop){rate, seed, stream, sample, lo}, on(y), of(y));
        double *expected = wide(B * T * E);
        for (int64_t i = 0; i < B * T * E; i++) {
            const int64_t e = i % E, t = i / E % T, b = i / E / T;
            uint32_t word[4];
            uint16_t half[8];
            ls_random4(seed, stream, (uint32_t)(sample + (uint64_t)b), (uint64_t)((lo + t) * ((E + 7) / 8) + e / 8),
                       word);
            memcpy(half, word, sizeof half);
            expected[i] = half[e % 8] / 65536.0 >= 1 - keep ? (double)x[i] / keep : 0;
            assert_true((y[i] == 0) == (expected[i] == 0));
        }
        assert_close(B * T * E, y, expected, forward_tolerance);
    }
}

/* Neither the cut between ranks, nor the number of batch rows in a call, nor what x holds matters to the mask. */
static void test_dropout_in_pieces(void **state)
{
    (void)state;
    const int64_t cut[] = {0, 1, 6, 6, 20}, B = 3, T = 20;
    for (size_t k = 0; k < sizeof dropout_widths / sizeof *dropout_widths; k++) {
        const int64_t E = dropout_widths[k], lo = 77;
        ls_real *whole = fill(B * T * E, 1), *gradient = fill(B * T * E, -3);
        RUN(dropout, B, T, E, (ls_drop){0.25, 5, 6, 7, lo}, on(whole), of(whole));
        RUN(dropout, B, T, E, (ls_drop){0.25, 5, 6, 7, lo}, on(gradient),
            of(gradient)); /* the backward pass: the same mask */
        for (int64_t i = 0; i < B * T * E; i++) assert_true(gradient[i] == -3 * whole[i]);
        for (size_t c = 0; c + 1 < sizeof cut / sizeof *cut; c++)
            for (int64_t b = 0; b < B; b++) {
                const int64_t n = cut[c + 1] - cut[c];
                ls_real *piece = fill(n * E, 1);
                RUN(dropout, 1, n, E, (ls_drop){0.25, 5, 6, 7 + (uint64_t)b, lo + cut[c]}, on(piece), of(piece));
                assert_same(n * E, piece, whole + (b * T + cut[c]) * E);
            }
        ls_real *bad = fill(B * T * E, NAN); /* dropped is 0, whatever stood there */
        RUN(dropout, B, T, E, (ls_drop){0.25, 5, 6, 7, lo}, on(bad), of(bad));
        for (int64_t i = 0; i < B * T * E; i++)
            assert_true(isnan(bad[i]) ? whole[i] != 0 : whole[i] == 0 && bad[i] == 0);
    }
}

/* y = x + drop(branch + b): the same mask, in place or not, with a bias or without. */
static void test_residual(void **state)
{
    (void)state;
    const int64_t B = 2, T = 11;
    for (size_t k = 0; k < sizeof dropout_widths / sizeof *dropout_widths; k++)
        for (int rate = 0; rate < 2; rate++) {
            const int64_t E = dropout_widths[k], n = B * T * E;
            const ls_drop drop = {0.3 * rate, 5, 6, 7, 90};
            const ls_real *x = noise(n), *branch = noise(n), *b = noise(E);
            ls_real *dropped = fill(n, NAN), *y = fill(n, NAN), *in_place = copy(n, x), *biased = copy(n, branch);
            double *expected = wide(n);
            for (int64_t i = 0; i < n; i++) biased[i] += b[i % E];
            RUN(dropout, B, T, E, drop, on(branch), of(dropped));
            for (int64_t i = 0; i < n; i++) expected[i] = (double)x[i] + (double)dropped[i];
            RUN(residual, B, T, E, drop, on(branch), NULL, on(x), on(y));
            assert_close(n, y, expected, forward_tolerance);
            RUN(dropout, B, T, E, drop, on(biased), of(dropped));
            for (int64_t i = 0; i < n; i++) expected[i] = (double)x[i] + (double)dropped[i];
            RUN(residual, B, T, E, drop, on(branch), on(b), on(x), on(y));
            assert_close(n, y, expected, forward_tolerance);
            RUN(residual, B, T, E, drop, on(branch), on(b), on(in_place), on(in_place));
            assert_same(n, in_place, y);
        }
}

static int64_t kept(int64_t n, const ls_real *x)
{
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) count += x[i] != 0;
    return count;
}

static void test_dropout_rate(void **state)
{
    (void)state;
    const int64_t B = 4, T = 100, E = 200, n = B * T * E;
    const double rates[] = {0.1, 0.5, 0.9, 0.001};
    for (size_t k = 0; k < sizeof rates / sizeof *rates; k++) {
        ls_real *x = fill(n, 1);
        RUN(dropout, B, T, E, (ls_drop){rates[k], 1, 2, 3, 0}, on(x), of(x));
        const double sigma = sqrt(rates[k] * (1 - rates[k]) * (double)n);
        assert_true(fabs((double)kept(n, x) - (1 - rates[k]) * (double)n) <= 5 * sigma);
        const double keep = 1 - round(rates[k] * 65536) / 65536;
        for (int64_t i = 0; i < n; i++) assert_true(x[i] == 0 || fabs((double)x[i] * keep - 1) < 1e-6);
    }
    ls_real *x = noise(n), *same = copy(n, x);
    RUN(dropout, B, T, E, (ls_drop){0, 1, 2, 3, 0}, on(x), of(x));
    assert_same(n, x, same);
    RUN(dropout, B, T, E, (ls_drop){1, 1, 2, 3, 0}, on(x), of(x));
    assert_int_equal(kept(n, x), 0);

    /* another seed, stream or sample: another mask, which agrees where two independent ones would */
    ls_real *base = fill(n, 1);
    RUN(dropout, B, T, E, (ls_drop){0.5, 1, 2, 3, 0}, on(base), of(base));
    for (int k = 0; k < 3; k++) {
        ls_real *other = fill(n, 1);
        RUN(dropout, B, T, E, (ls_drop){0.5, 1 + (k == 0), 2 + (k == 1), 3 + 4 * (k == 2), 0}, on(other), of(other));
        int64_t agree = 0;
        for (int64_t i = 0; i < n; i++) agree += base[i] == other[i];
        assert_true(fabs((double)agree - 0.5 * (double)n) <= 5 * sqrt(0.25 * (double)n));
    }
}

/* ------------------------------------------------------------------------------------------------ cross-entropy */

static double cross_entropy(const problem *p, double *nll)
{
    const int64_t V = p->in;
    double loss = 0;
    for (int64_t r = 0; r < p->rows; r++) {
        if (p->target[r] < 0) continue;
        const double *l = p->x + r * V;
        double max = l[0], z = 0, all = 0;
        for (int64_t v = 0; v < V; v++) max = fmax(max, l[v]);
        for (int64_t v = 0; v < V; v++) z += exp(l[v] - max);
        for (int64_t v = 0; v < V; v++) all += max + log(z) - l[v];
        const double mine = max + log(z) - l[p->target[r]];
        *nll += mine;
        loss += (1 - p->smoothing) * mine + p->smoothing * all / (double)V;
    }
    return loss;
}

static double loss_of(int64_t rows, int64_t V, const ls_real *logits, const int32_t *target, double smoothing,
                      double grad_scale, ls_real *d, double *nll)
{
    double *sums = wide(LS_LOSS_SUMS);
    sums[0] = 3, sums[1] = 4; /* is added to */
    RUN(cross_entropy, rows, V, logits ? on(logits) : NULL, target ? on(target) : NULL, smoothing, grad_scale,
        d ? on(d) : NULL, on(sums));
    if (nll) *nll = sums[1] - 4;
    return sums[0] - 3;
}

static double cross_entropy_objective(const problem *p)
{
    double nll = 0;
    return cross_entropy(p, &nll);
}

static void test_cross_entropy(void **state)
{
    (void)state;
    const int64_t rows = 6, sizes[] = {2, 7, 32, 33, 512, 700};
    const double smoothings[] = {0, 0.1, 1};
    for (size_t k = 0; k < 3 * (sizeof sizes / sizeof *sizes); k++) {
        const int64_t V = sizes[k / 3];
        const int32_t *target = tokens(rows, (const int32_t[]){1, -1, 0, (int32_t)V - 1, (int32_t)V / 2, -7});
        ls_real *logits = noise(rows * V);
        for (int64_t v = 0; v < V; v++) logits[3 * V + v] = 10 * logits[3 * V + v] - 500;
        problem p = {.rows = rows, .in = V, .x = widen(rows * V, logits), .smoothing = smoothings[k % 3]};
        p.target = target;
        double nll = -1, naive_nll = 0;
        const double naive = cross_entropy(&p, &naive_nll), tolerance = forward_tolerance * naive;
        for (int64_t v = 0; v < V; v++) logits[V + v] = logits[5 * V + v] = (ls_real)NAN; /* ignored rows */

        double loss = loss_of(rows, V, logits, target, p.smoothing, 1, NULL, &nll);
        assert_true(fabs(loss - naive) <= tolerance && fabs(nll - naive_nll) <= forward_tolerance * naive_nll);
        ls_real *d = fill(rows * V, NAN);
        assert_true(loss_of(rows, V, logits, target, p.smoothing, 0.125, d, NULL) == loss);
        for (int64_t v = 0; v < V; v++) assert_true(d[V + v] == 0 && d[5 * V + v] == 0);
        check_gradient(cross_entropy_objective, &p, rows * V, p.x, NULL, 0.125, d);
        for (int64_t r = 0; r < rows; r++) { /* also where check_gradient did not look: each row's gradients sum to 0 */
            double sum = 0;
            for (int64_t v = 0; v < V; v++) sum += (double)d[r * V + v];
            assert_true(fabs(sum) < 1e-6);
        }
        ls_real *in_place = copy(rows * V, logits);
        loss = loss_of(rows, V, in_place, target, p.smoothing, 0.125, in_place, &nll);
        assert_true(fabs(loss - naive) <= tolerance);
        assert_same(rows * V, in_place, d);
    }
}

static void test_cross_entropy_of_many(void **state)
{
    (void)state;
    enum { ROWS = 5003, V = 7 };
    int32_t target[ROWS];
    for (int r = 0; r < ROWS; r++) target[r] = r % 5 == 0 ? -1 : r % V;
    const int32_t *kept = tokens(ROWS, target);
    ls_real *logits = noise(ROWS * V), *d = fill(ROWS * V, NAN);
    const problem p = {.rows = ROWS, .in = V, .x = widen(ROWS * V, logits), .smoothing = 0.1, .target = target};
    double nll, naive_nll = 0;
    const double naive = cross_entropy(&p, &naive_nll), loss = loss_of(ROWS, V, logits, kept, 0.1, 1, d, &nll);
    assert_true(fabs(loss - naive) <= forward_tolerance * naive);
    assert_true(fabs(nll - naive_nll) <= forward_tolerance * naive_nll);
    check_gradient(cross_entropy_objective, &p, ROWS * V, p.x, NULL, 1, d);
    assert_true(loss_of(ROWS, V, logits, kept, 0.1, 1, logits, &nll) == loss); /* the same bits every time */
    assert_same(ROWS * V, logits, d);
}

/* Logits that overflow exp; a class that is masked by -inf; a NaN that must not be swallowed. */
static void test_cross_entropy_extremes(void **state)
{
    (void)state;
    enum { V = 40 };
    const int32_t *target = tokens(1, (const int32_t[]){2});
    ls_real *logits = fill(V, -30000), *d = fill(V, NAN);
    logits[2] = 30000, logits[7] = 30000, logits[9] = (ls_real)-INFINITY;
    const double loss = loss_of(1, V, logits, target, 0, 1, d, NULL);
    assert_true(fabs(loss - log(2)) < 1e-6);
    for (int v = 0; v < V; v++) assert_true(fabs((double)d[v] - (v == 2 ? -0.5 : v == 7 ? 0.5 : 0)) < 1e-6);
    for (int v = 0; v < V; v += V - 1) { /* within the lanes of the maximum, and in the rest after them */
        const ls_real keep = logits[v];
        logits[v] = (ls_real)NAN;
        assert_true(isnan(loss_of(1, V, logits, target, 0, 1, d, NULL)));
        logits[v] = keep;
    }
}

/* ------------------------------------------------------------------------------------------------ rows */

static void test_zero_rows(void **state)
{
    (void)state;
    const int64_t B = 3, T = 4, E = 9, n = B * T * E;
    uint8_t *pad = fresh(B * T, 1);
    memcpy(pad, (const uint8_t[]){0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1}, (size_t)(B * T));
    for (int batch_first = 0; batch_first < 2; batch_first++) {
        ls_real *x = noise(n), *y = fill(n, NAN);
        x[0] = -(ls_real)0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t t = 0; t < T; t++)
                for (int64_t e = 0; e < E && pad[b * T + t]; e++)
                    x[(batch_first ? b * T + t : t * B + b) * E + e] = (ls_real)NAN;
        RUN(zero_rows, B, T, E, batch_first, on(pad), on(x), of(y));
        for (int64_t i = 0; i < n; i++) assert_true(isnan(x[i]) ? y[i] == 0 : y[i] == x[i]);
        ls_real *all = fill(n, 1);
        RUN(zero_rows, B, T, E, batch_first, NULL, on(x), of(all));
        assert_same(n, all, x); /* also NaN, and the sign of 0 */
        RUN(zero_rows, B, T, E, batch_first, NULL, on(all), of(all));
        assert_same(n, all, x);
        RUN(zero_rows, B, T, E, batch_first, on(pad), on(x), of(x));
        assert_same(n, x, y);
    }
}

static void test_add(void **state)
{
    (void)state;
    const int64_t n = 1003;
    const ls_real *x = noise(n), *y0 = noise(n);
    ls_real *y = copy(n, y0);
    RUN(add, n, on(x), on(y));
    for (int64_t i = 0; i < n; i++) assert_true(y[i] == (ls_real)(y0[i] + x[i]));
}

static void test_elements(void **state)
{
    (void)state;
    for (int64_t n = 1000; n < 1004; n++) {
        const ls_real *a = noise(n);
        ls_real *x = fill(n, NAN);
        RUN(copy, n, of(a), of(x));
        assert_same(n, x, a);
        const double *wide_a = widen(n, a);
        RUN(divide, n, on(wide_a), 0.7, on(x));
        for (int64_t i = 0; i < n; i++) assert_true(x[i] == (ls_real)(wide_a[i] / 0.7));
        RUN(zero, (size_t)(n - 1) * sizeof *x, on(x + 1));
        for (int64_t i = 1; i < n; i++) assert_true(x[i] == 0);
        assert_true(x[0] != 0);
        RUN(zero, (size_t)n * sizeof *x, on(x));
        for (int64_t i = 0; i < n; i++) assert_true(x[i] == 0);
    }
}

/* ------------------------------------------------------------------------------------------------ bfloat16 */

/* x as bfloat16, to nearest, ties to even; and back. */
static uint16_t *narrowed(int64_t n, const ls_real *x)
{
    uint16_t *y = fresh(n, sizeof *y);
    for (int64_t i = 0; i < n; i++) {
        const float value = (float)x[i];
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        y[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    return y;
}
static ls_real *widened(int64_t n, const uint16_t *x)
{
    ls_real *y = fresh(n, sizeof *y);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)x[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        y[i] = (ls_real)value;
    }
    return y;
}
static ls_real *rounded(int64_t n, const ls_real *x)
{
    return widened(n, narrowed(n, x));
}
static ls_operand half(const uint16_t *p)
{
    return (ls_operand){on(p), sizeof *p};
}

/* got is what `want` becomes when it is rounded: to one of the two neighbours, since sums may have come in another
 * order. */
static void assert_rounds_to(int64_t n, const uint16_t *got, const ls_real *want)
{
    const ls_real *x = widened(n, got);
    for (int64_t i = 0; i < n; i++) assert_true(fabs((double)x[i] - (double)want[i]) <= fabs((double)want[i]) / 250);
}

static ls_queue *open_rounding(void)
{
    ls_queue *before = queue;
    queue = NULL;
    assert_int_equal(device->open(0, LS_BF16, &queue), LS_OK);
    return before;
}

/* What lies in bfloat16 gives what the same numbers give as they are; what is written so is what is written as it is,
 * rounded. */
static void test_narrow_elements(void **state)
{
    (void)state;
    if (queue == NULL || sizeof(ls_real) > sizeof(float)) skip();
    ls_queue *before = open_rounding();
    for (int64_t E = 7; E < 260; E += 57) { /* 64: by fours */
        const int64_t B = 2, T = 9, rows = B * T, n = rows * E;
        const ls_drop drop = {0.3, 5, 6, 7, 90};
        const ls_real *x = rounded(n, noise(n)), *b = noise(E), *w = noise(E), *dy = rounded(n, noise(n));
        const uint16_t *x_half = narrowed(n, x), *dy_half = narrowed(n, dy);
        uint16_t *got = fresh(n, sizeof *got);
        ls_real *want = fill(n, NAN), *mean = fill(rows, 0), *rstd = fill(rows, 0);
        uint8_t *pad = fresh(rows, 1);
        for (int64_t r = 0; r < rows; r++) pad[r] = r % 3 == 0;
        RUN(layer_norm, rows, E, on(x), on(w), on(b), half(got), on(mean), on(rstd));
        RUN(layer_norm, rows, E, on(x), on(w), on(b), of(want), on(mean), on(rstd));
        assert_rounds_to(n, got, want);
        for (int biased = 0; biased < 2; biased++) {
            const ls_real *bias = biased ? b : NULL;
            RUN(gelu, rows, E, half(x_half), bias ? on(bias) : NULL, half(got));
            RUN(gelu, rows, E, of(x), bias ? on(bias) : NULL, of(want));
            assert_rounds_to(n, got, want);
            RUN(gelu_backward, rows, E, half(x_half), bias ? on(bias) : NULL, half(dy_half), half(got));
            RUN(gelu_backward, rows, E, of(x), bias ? on(bias) : NULL, of(dy), of(want));
            assert_rounds_to(n, got, want);
        }
        RUN(dropout, B, T, E, drop, on(x), half(got));
        RUN(dropout, B, T, E, drop, on(x), of(want));
        assert_rounds_to(n, got, want);
        RUN(zero_rows, B, T, E, 1, on(pad), on(x), half(got));
        RUN(zero_rows, B, T, E, 1, on(pad), on(x), of(want));
        assert_memory_equal(got, narrowed(n, want), (size_t)n * sizeof *got);
        RUN(copy, n, of(want), half(got));
        assert_memory_equal(got, narrowed(n, want), (size_t)n * sizeof *got);
        RUN(copy, n, half(x_half), of(want));
        assert_same(n, want, x);
    }
    device->close(queue);
    queue = before;
}

static void test_narrow_linear(void **state)
{
    (void)state;
    if (queue == NULL || sizeof(ls_real) > sizeof(float)) skip();
    ls_queue *before = open_rounding();
    for (size_t k = 0; k < sizeof linear_sizes / sizeof *linear_sizes; k++) {
        const linear_case c = linear_case_of(k);
        problem p = c.p;
        const int64_t rows = p.rows, in = p.in, out = p.out;
        const ls_real *x = rounded(rows * in, c.x), *w = rounded(out * in, c.w),
                      *dy = rounded(rows * out, noise(rows * out));
        const uint16_t *x_half = narrowed(rows * in, x), *dy_half = narrowed(rows * out, dy);
        uint16_t *y_half = fresh(rows * out, sizeof *y_half), *dx_half = fresh(rows * in, sizeof *dx_half);
        ls_real *y = fill(rows * out, NAN), *want_y = fill(rows * out, NAN);
        ls_real *dx = fill(rows * in, NAN), *want_dx = fill(rows * in, NAN);
        ls_real *dw = fill(out * in, 1), *want_dw = fill(out * in, 1), *db = fill(out, 1), *want_db = fill(out, 1);
        RUN(linear, rows, in, out, half(x_half), of(w), on(c.b), of(y));
        RUN(linear, rows, in, out, of(x), of(w), on(c.b), of(want_y));
        assert_close(rows * out, y, widen(rows * out, want_y), forward_tolerance);
        const ls_real *b = rounded(out, c.b);
        for (int biased = 0; biased < 2; biased++) {
            RUN(linear, rows, in, out, half(x_half), of(w), biased ? on(b) : NULL, half(y_half));
            RUN(linear, rows, in, out, of(x), of(w), biased ? on(b) : NULL, of(want_y));
            assert_close(rows * out, widened(rows * out, y_half), widen(rows * out, want_y), 1.0 / 256);
        }
        RUN(linear_backward, rows, in, out, of(x), of(w), of(dy), of(want_dx), 0, on(want_dw));
        RUN(column_sums, rows, out, of(dy), on(want_db));
        RUN(linear_backward, rows, in, out, half(x_half), of(w), half(dy_half), of(dx), 0, on(dw));
        RUN(column_sums, rows, out, half(dy_half), on(db));
        assert_close(rows * in, dx, widen(rows * in, want_dx), forward_tolerance);
        assert_close(out * in, dw, widen(out * in, want_dw), forward_tolerance);
        assert_same(out, db, want_db);
        ls_real *db_again = fill(out, 1);
        RUN(sum_and_copy, rows, out, on(dy), on(db_again), half(y_half));
        assert_same(out, db_again, want_db);
        assert_memory_equal(y_half, dy_half, (size_t)(rows * out) * sizeof *y_half);
        RUN(linear_backward, rows, in, out, half(x_half), of(w), half(dy_half), half(dx_half), 0, NULL);
        assert_close(rows * in, widened(rows * in, dx_half), widen(rows * in, want_dx), 1.0 / 256);
    }
    device->close(queue);
    queue = before;
}

/* Sums over rows, of few columns and many, of which a GPU makes one part or several: they are what naive sums are, and
 * come out the same each time. */
static void test_sums_over_rows(void **state)
{
    (void)state;
    const int64_t sizes[][2] = {{1, 4}, {2100, 12}, {1500, 13}, {600, 1}, {700, 200}, {90, 300}, {300, 512}, {70, 516}};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const int64_t rows = sizes[k][0], E = sizes[k][1];
        const ls_real *x = noise(rows * E), *w = noise(E), *dy = noise(rows * E), *mean = noise(rows);
        const ls_real *rstd = noise(rows), *start = noise(E);
        ls_real *dx = fill(rows * E, NAN), *dw[2], *db[2], *sum[2];
        double *want_dw = widen(E, start), *want_db = widen(E, start), *want_sum = widen(E, start);
        for (int64_t i = 0; i < rows * E; i++) {
            want_dw[i % E] += (double)dy[i] * ((double)x[i] - (double)mean[i / E]) * (double)rstd[i / E];
            want_db[i % E] += (double)dy[i];
            want_sum[i % E] += (double)x[i];
        }
        for (int i = 0; i < 2; i++) {
            dw[i] = copy(E, start), db[i] = copy(E, start), sum[i] = copy(E, start);
            RUN(layer_norm_backward, rows, E, on(x), on(w), on(mean), on(rstd), on(dy), on(dx), 0, on(dw[i]),
                on(db[i]));
            RUN(column_sums, rows, E, of(x), on(sum[i]));
        }
        assert_close(E, dw[0], want_dw, forward_tolerance);
        assert_close(E, db[0], want_db, forward_tolerance);
        assert_close(E, sum[0], want_sum, forward_tolerance);
        assert_same(E, dw[1], dw[0]);
        assert_same(E, db[1], db[0]);
        assert_same(E, sum[1], sum[0]);
    }
}

/* Products of what lies in bfloat16 are for a queue that rounds to it. */
static void test_narrow_refused(void **state)
{
    (void)state;
    if (queue == NULL || sizeof(ls_real) > sizeof(float)) skip();
    const uint16_t *x = narrowed(6, noise(6));
    ls_real *y = fill(4, 0);
    const ls_real *w = noise(6);
    dense->linear(queue, 2, 3, 2, half(x), of(w), NULL, of(y));
    assert_int_equal(device->wait(queue), LS_ERR_INTERNAL);
    back();
}

/* A rank may own nothing: then there need not even be memory. */
static void test_no_rows(void **state)
{
    (void)state;
    enum { E = 16 };
    ls_real *dw = noise((int64_t)E * E), *db = noise(E);
    const ls_real *w = copy((int64_t)E * E, dw), *b = copy(E, db);
    double nll = 1;
    RUN(linear, 0, E, E, nothing, of(w), on(b), nothing);
    RUN(linear_backward, 0, E, E, nothing, of(w), nothing, nothing, 0, on(dw));
    RUN(column_sums, 0, E, nothing, on(db));
    RUN(sum_and_copy, 0, E, NULL, on(db), nothing);
    RUN(layer_norm, 0, E, NULL, on(w), on(b), nothing, NULL, NULL);
    RUN(layer_norm_backward, 0, E, NULL, on(w), NULL, NULL, NULL, NULL, 0, on(dw), on(db));
    RUN(gelu, 1, 0, nothing, NULL, nothing);
    RUN(gelu_backward, 1, 0, nothing, NULL, nothing, nothing);
    RUN(relu, 1, 0, nothing, NULL, nothing);
    RUN(relu_backward, 1, 0, nothing, NULL, nothing, nothing);
    RUN(embedding, 0, E, NULL, on(w), 1, NULL);
    RUN(embedding_backward, 0, E, E, NULL, 1, NULL, on(dw));
    RUN(add_positions, 2, 0, E, 70, NULL);
    RUN(dropout, 2, 0, E, (ls_drop){0.5, 1, 2, 3, 70}, NULL, nothing);
    RUN(residual, 2, 0, E, (ls_drop){0.5, 1, 2, 3, 70}, NULL, on(b), NULL, NULL);
    RUN(zero_rows, 2, 0, E, 1, NULL, NULL, nothing);
    RUN(zero_rows, 2, 0, E, 0, NULL, NULL, nothing);
    RUN(add, 0, NULL, NULL);
    RUN(copy, 0, nothing, nothing);
    RUN(divide, 0, NULL, 2, NULL);
    RUN(zero, 0, NULL);
    assert_true(loss_of(0, E, NULL, NULL, 0.1, 1, NULL, &nll) == 0 && nll == 0);
    assert_same((int64_t)E * E, dw, w);
    assert_same(E, db, b);
}

int main(void)
{
    const ls_device where = test_where();
    if (!test_has_device(1)) return TEST_SKIPPED;
    dense = ls_dense_of(where);
    device = ls_device_find(where);
    if (device->open(0, LS_FLOAT32, &queue) != LS_OK) {
        fprintf(stderr, "test_dense: no device: %s\n", ls_last_error());
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_linear, free_all),
        cmocka_unit_test_teardown(test_products, free_all),
        cmocka_unit_test_teardown(test_linear_alike, free_all),
        cmocka_unit_test_teardown(test_linear_backward, free_all),
        cmocka_unit_test_teardown(test_layer_norm, free_all),
        cmocka_unit_test_teardown(test_layer_norm_special_rows, free_all),
        cmocka_unit_test_teardown(test_layer_norm_backward, free_all),
        cmocka_unit_test_teardown(test_normal_cdf, free_all),
        cmocka_unit_test_teardown(test_gelu, free_all),
        cmocka_unit_test_teardown(test_relu, free_all),
        cmocka_unit_test_teardown(test_biased, free_all),
        cmocka_unit_test_teardown(test_embedding, free_all),
        cmocka_unit_test_teardown(test_embedding_of_many, free_all),
        cmocka_unit_test_teardown(test_positions, free_all),
        cmocka_unit_test_teardown(test_positions_in_pieces, free_all),
        cmocka_unit_test_teardown(test_dropout_mask, free_all),
        cmocka_unit_test_teardown(test_dropout_in_pieces, free_all),
        cmocka_unit_test_teardown(test_dropout_rate, free_all),
        cmocka_unit_test_teardown(test_residual, free_all),
        cmocka_unit_test_teardown(test_cross_entropy, free_all),
        cmocka_unit_test_teardown(test_cross_entropy_of_many, free_all),
        cmocka_unit_test_teardown(test_cross_entropy_extremes, free_all),
        cmocka_unit_test_teardown(test_zero_rows, free_all),
        cmocka_unit_test_teardown(test_add, free_all),
        cmocka_unit_test_teardown(test_elements, free_all),
        cmocka_unit_test_teardown(test_narrow_elements, free_all),
        cmocka_unit_test_teardown(test_narrow_linear, free_all),
        cmocka_unit_test_teardown(test_sums_over_rows, free_all),
        cmocka_unit_test_teardown(test_narrow_refused, free_all),
        cmocka_unit_test_teardown(test_no_rows, free_all),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    device->close(queue);
    return failed;
}
