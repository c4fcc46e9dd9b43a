/* The iterative pseudo-inverse: on the CPU against the inverse and central differences, on a GPU against the CPU. The
 * matrices are softmax of rows in which the diagonal leads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <math.h>

#include <cmocka.h>

#include "pinv_cuda.h"
#include "real.h"
#include "rng.h"
#include "where.h"

static const ls_device_ops *device;
static ls_queue *queue;

/* What a GPU has room for in a block of threads, at the edges of its tiles, and what it has not. */
static const int64_t sizes[] = {1, 2, 5, 15, 16, 17, 31, 32, 33, 64, 65, 100};
static const int iterations_of[] = {0, 1, 2, 6};
enum { SIZES = sizeof sizes / sizeof *sizes, RUNS = sizeof iterations_of / sizeof *iterations_of, MATRICES = 3 };

static double *numbers(int64_t n)
{
    double *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    return x;
}

static double *noise(int64_t n, uint32_t stream)
{
    double *x = numbers(n);
    for (int64_t i = 0; i < n; i++) x[i] = ls_normal(11, stream, 0, (uint64_t)i);
    return x;
}

/* (n,m,m) */
static double *matrices(int64_t n, int64_t m)
{
    double *A = noise(n * m * m, 0);
    for (int64_t row = 0; row < n * m; row++) {
        double *x = A + row * m, sum = 0;
        x[row % m] += 2 + log((double)m);
        for (int64_t c = 0; c < m; c++) sum += x[c] = exp(x[c]);
        for (int64_t c = 0; c < m; c++) x[c] /= sum;
    }
    return A;
}

static double peak_of(int64_t m, const double *A)
{
    double peak = 0;
    for (int64_t c = 0; c < m; c++) peak = fmax(peak, ls_column_sum(m, A, c));
    return peak;
}

static void assert_alike(const char *what, int64_t m, int iterations, int64_t n, const double *got,
                         const double *expected, double tolerance)
{
    double error = 0, most = 0;
    for (int64_t i = 0; i < n; i++) {
        assert_true(isfinite(got[i]) && isfinite(expected[i]));
        error = fmax(error, fabs(got[i] - expected[i]));
        most = fmax(most, fabs(expected[i]));
    }
    if (error <= tolerance * most) return;
    print_error("%s of %d rows after %d iterations: error %g of %g\n", what, (int)m, iterations, error, most);
    fail();
}

/* ------------------------------------------------------------------------------------------------ on the CPU */

static void test_inverse(void **state)
{
    (void)state;
    enum { ITERATIONS = 20 };
    for (int at = 0; at < SIZES; at++) {
        const int64_t m = sizes[at];
        double *A = matrices(1, m), *Z = numbers((ITERATIONS + 1) * m * m), *scratch = numbers(ls_pinv_scratch(m));
        double *product = numbers(m * m), *unit = numbers(m * m);
        ls_pinv(m, ITERATIONS, A, peak_of(m, A), Z, scratch);
        const double *last = Z + ITERATIONS * m * m;
        for (int64_t i = 0; i < m * m; i++) {
            unit[i] = i % (m + 1) == 0;
            product[i] = 0;
            for (int64_t k = 0; k < m; k++) product[i] += A[i / m * m + k] * last[k * m + i % m];
        }
        assert_alike("A Z", m, ITERATIONS, m * m, product, unit, 1e-12);
        free(A), free(Z), free(scratch), free(product), free(unit);
    }
}

/* Σ dZ Z of the last iteration. */
static double value_at(int64_t m, int iterations, const double *A, double peak, const double *dZ)
{
    double *Z = numbers((iterations + 1) * m * m), *scratch = numbers(ls_pinv_scratch(m)), sum = 0;
    ls_pinv(m, iterations, A, peak, Z, scratch);
    for (int64_t i = 0; i < m * m; i++) sum += dZ[i] * Z[iterations * m * m + i];
    free(Z), free(scratch);
    return sum;
}

/* Along a direction of A alone, and of the peak alone. */
static void test_gradients(void **state)
{
    (void)state;
    const double step = 1e-5;
    for (int at = 0; at < SIZES * RUNS; at++) {
        const int64_t m = sizes[at / RUNS];
        const int iterations = iterations_of[at % RUNS];
        double *A = matrices(1, m), *Z = numbers((iterations + 1) * m * m), *scratch = numbers(ls_pinv_scratch(m));
        double *dZ = noise(m * m, 1), *used = noise(m * m, 1), *dA = numbers(m * m), *along = noise(m * m, 2);
        const double peak = peak_of(m, A);
        double got = 0, size = 0, of_peak = 0, values[2];
        ls_pinv(m, iterations, A, peak, Z, scratch);
        const double dpeak = ls_pinv_backward(m, iterations, A, peak, Z, used, dA, scratch);
        for (int64_t i = 0; i < m * m; i++) {
            along[i] /= (double)m;
            got += dA[i] * along[i];
            size += fabs(dA[i] * along[i]);
            of_peak += fabs(dZ[i] * Z[iterations * m * m + i]) / peak;
        }
        for (int sign = 0; sign < 2; sign++) {
            double *moved = numbers(m * m);
            for (int64_t i = 0; i < m * m; i++) moved[i] = A[i] + (sign ? step : -step) * along[i];
            values[sign] = value_at(m, iterations, moved, peak, dZ);
            free(moved);
        }
        assert_true(fabs(got - (values[1] - values[0]) / (2 * step)) <= 1e-7 * size);
        for (int sign = 0; sign < 2; sign++)
            values[sign] = value_at(m, iterations, A, peak + (sign ? step : -step), dZ);
        assert_true(fabs(dpeak - (values[1] - values[0]) / (2 * step)) <= 1e-7 * of_peak);
        free(A), free(Z), free(scratch), free(dZ), free(used), free(dA), free(along);
    }
}

/* ------------------------------------------------------------------------------------------------ on a GPU */

/* n numbers there; from NULL: NaN. */
static double *on_device(int64_t n, const double *from)
{
    const size_t bytes = (size_t)n * sizeof *from;
    double *there = device->alloc(bytes);
    assert_non_null(there);
    if (from == NULL)
        device->poison(there, bytes);
    else
        assert_int_equal(device->to_device(queue, there, from, bytes), LS_OK);
    return there;
}

static double *from_device(int64_t n, double *there)
{
    double *x = numbers(n);
    assert_int_equal(device->to_host(queue, x, there, (size_t)n * sizeof *x), LS_OK);
    device->release(there);
    return x;
}

static void compare(int64_t m, int iterations,
                    void (*forward)(ls_queue *, int64_t, int64_t, int, const double *, const double *, double *,
                                    double *),
                    void (*backward)(ls_queue *, int64_t, int64_t, int, const double *, const double *, const double *,
                                     double *, double *, double *, double *))
{
    const int64_t each = m * m, all = MATRICES * each, kept = iterations + 1;
    double *A = matrices(MATRICES, m), *dZ = noise(all, 1), peak[MATRICES], dpeak[MATRICES], size[MATRICES] = {0};
    double *Z = numbers(kept * all), *dA = numbers(all), *scratch = numbers(ls_pinv_scratch(m));
    /* one peak is not of its matrix, as where all matrices share one */
    for (int64_t g = 0; g < MATRICES; g++) peak[g] = peak_of(m, A + ls_min(g, 1) * each) + (g == 2);
    double *A_there = on_device(all, A), *peak_there = on_device(MATRICES, peak), *dZ_there = on_device(all, dZ);
    double *Z_there = on_device(kept * all, NULL), *dA_there = on_device(all, NULL);
    double *dpeak_there = on_device(MATRICES, NULL), *room = on_device(MATRICES * ls_pinv_scratch_cuda(m) + 1, NULL);
    forward(queue, MATRICES, m, iterations, A_there, peak_there, Z_there, room);
    backward(queue, MATRICES, m, iterations, A_there, peak_there, Z_there, dZ_there, dA_there, dpeak_there, room);
    for (int64_t g = 0; g < MATRICES; g++) {
        double *own = numbers(kept * each);
        ls_pinv(m, iterations, A + g * each, peak[g], own, scratch);
        for (int64_t i = 0; i < each; i++) size[g] += fabs(dZ[g * each + i] * own[iterations * each + i]) / peak[g];
        dpeak[g] = ls_pinv_backward(m, iterations, A + g * each, peak[g], own, dZ + g * each, dA + g * each, scratch);
        for (int64_t t = 0; t < kept; t++)
            memcpy(Z + (t * MATRICES + g) * each, own + t * each, (size_t)each * sizeof *own);
        free(own);
    }
    double *Z_got = from_device(kept * all, Z_there), *dA_got = from_device(all, dA_there);
    double *dpeak_got = from_device(MATRICES, dpeak_there);
    for (int64_t t = 0; t < kept; t++) assert_alike("Z", m, (int)t, all, Z_got + t * all, Z + t * all, 1e-12);
    assert_alike("dA", m, iterations, all, dA_got, dA, 1e-11);
    for (int64_t g = 0; g < MATRICES; g++) assert_true(fabs(dpeak_got[g] - dpeak[g]) <= 1e-12 * size[g]);
    device->release(A_there), device->release(peak_there), device->release(dZ_there), device->release(room);
    free(A), free(dZ), free(Z), free(dA), free(scratch), free(Z_got), free(dA_got), free(dpeak_got);
}

static void test_device(void **state)
{
    (void)state;
    for (int at = 0; at < SIZES * RUNS; at++)
        compare(sizes[at / RUNS], iterations_of[at % RUNS], LS_IF_CUDA(ls_pinv_cuda),
                LS_IF_CUDA(ls_pinv_backward_cuda));
    assert_int_equal(device->wait(queue), LS_OK);
}

int main(void)
{
    const ls_device where = test_where();
    if (!test_has_device(1)) return TEST_SKIPPED;
    device = ls_device_find(where);
    if (device->open(0, LS_FLOAT32, &queue) != LS_OK) {
        fprintf(stderr, "test_pinv: no device: %s\n", ls_last_error());
        return 1;
    }
    const struct CMUnitTest on_cpu[] = {cmocka_unit_test(test_inverse), cmocka_unit_test(test_gradients)};
    const struct CMUnitTest on_gpu[] = {cmocka_unit_test(test_device)};
    const int failed =
        where == LS_CPU ? cmocka_run_group_tests(on_cpu, NULL, NULL) : cmocka_run_group_tests(on_gpu, NULL, NULL);
    device->close(queue);
    return failed;
}
