/* The door to BLAS: every way that a product may take, by its size and by how operands lie, against the sum as it is
 * written. Runs with the kernels that the library has chosen, and then with those that fit the processor better. */
#include "gemm.h"
#include "real.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { GAP = 3 }; /* reals between rows that belong to nobody */

typedef struct matrix {
    int64_t rows, cols, ld;
    ls_real *p;
} matrix;

static ls_real noise(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (ls_real)((double)(*state >> 40) / 8388608.0 - 1);
}

static matrix make(int64_t rows, int64_t cols, int64_t gap, uint64_t *state)
{
    matrix m = {rows, cols, cols + gap, NULL};
    m.p = malloc((size_t)(rows * m.ld) * sizeof *m.p);
    assert_non_null(m.p);
    for (int64_t i = 0; i < rows * m.ld; i++) m.p[i] = i % m.ld < cols ? noise(state) : NAN;
    return m;
}

/* Entry (i,j) of op(m). */
static double entry(const matrix *m, int transposed, int64_t i, int64_t j)
{
    return (double)(transposed ? m->p[j * m->ld + i] : m->p[i * m->ld + j]);
}

/* c = alpha op(a) op(b) + beta was. The bound holds for any order of additions: (k + 3) ε Σ |a b|, and as much of what
 * was there. */
static void check(int ta, int tb, double alpha, const matrix *a, const matrix *b, double beta, const matrix *was,
                  const matrix *c)
{
    const int64_t m = c->rows, n = c->cols, k = ta ? a->rows : a->cols;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            const double old = beta == 0 ? 0 : beta * entry(was, 0, i, j);
            double sum = old, size = fabs(old);
            for (int64_t l = 0; l < k; l++) {
                const double x = alpha * entry(a, ta, i, l) * entry(b, tb, l, j);
                sum += x, size += fabs(x);
            }
            const double error = fabs(entry(c, 0, i, j) - sum);
            if (!(error <= (double)(k + 3) * (double)LS_REAL_EPS * size))
                fail_msg("%s %s, m %lld n %lld k %lld, ld %lld, beta %g: entry (%lld,%lld) is off by %.2e",
                         ta ? "transposed" : "as it is", tb ? "transposed" : "as it is", (long long)m, (long long)n,
                         (long long)k, (long long)c->ld, beta, (long long)i, (long long)j, error);
        }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = n; j < c->ld; j++)
            assert_memory_equal(&c->p[i * c->ld + j], &was->p[i * c->ld + j], sizeof *c->p);
}

static void compare(int ta, int tb, int64_t m, int64_t n, int64_t k, int64_t gap, double alpha, double beta)
{
    uint64_t state = (uint64_t)(m * 7919 + n * 104729 + k * 1299709 + ta + 2 * tb);
    matrix a = ta ? make(k, m, gap, &state) : make(m, k, gap, &state);
    matrix b = tb ? make(n, k, gap, &state) : make(k, n, gap, &state), c = make(m, n, gap, &state);
    matrix was = c;
    was.p = malloc((size_t)(m * c.ld) * sizeof *was.p);
    assert_non_null(was.p);
    for (int64_t i = 0; i < m * c.ld; i++) {
        if (beta == 0) c.p[i] = NAN; /* is overwritten, not multiplied */
        was.p[i] = c.p[i];
    }
    ls_gemm(ta, tb, m, n, k, alpha, a.p, a.ld, b.p, b.ld, beta, c.p, c.ld);
    check(ta, tb, alpha, &a, &b, beta, &was, &c);
    free(a.p), free(b.p), free(c.p), free(was.p);
}

/* Around every size at which the way changes: 16 and 64 rows, 16 columns, a million multiplications, an inner matrix of
 * 16,384 reals. */
static void products_are_sums(void **unused)
{
    (void)unused;
    static const int64_t size[][3] = {{1, 1, 1},     {15, 16, 16},   {16, 15, 64},   {16, 16, 64},   {17, 33, 65},
                                      {63, 64, 64},  {64, 64, 64},   {64, 65, 1024}, {61, 128, 128}, {62, 128, 128},
                                      {250, 64, 64}, {259, 256, 64}, {300, 64, 256}, {70, 257, 64},  {1000, 129, 128},
                                      {33, 16, 133}, {48, 100, 200}, {513, 100, 90}, {20, 1024, 16}, {300, 16, 1024}};
    for (size_t s = 0; s < sizeof size / sizeof *size; s++)
        for (int way = 0; way < 8; way++)
            compare(way & 1, way >> 1 & 1, size[s][0], size[s][1], size[s][2], way & 4 ? GAP : 0, way & 1 ? 1 : 0.5,
                    way & 2   ? 0
                    : way & 4 ? -1.5
                              : 1);
}

static void nothing_to_add_up(void **unused)
{
    (void)unused;
    ls_real c[4] = {1, 2, NAN, 4};
    ls_gemm(0, 0, 2, 2, 0, 1, NULL, 1, NULL, 2, 0, c, 2);
    for (int i = 0; i < 4; i++) assert_true(c[i] == 0);
    c[0] = 1;
    ls_gemm(0, 1, 1, 1, 0, 1, NULL, 1, NULL, 1, 2, c, 1);
    assert_true(c[0] == 2);
    ls_gemm(0, 0, 0, 5, 3, 1, NULL, 3, NULL, 5, 0, NULL, 5);
}

/* L lies in a matrix whose entries above the diagonal are 0. */
static void lower_triangles_are_products(void **unused)
{
    (void)unused;
    static const int64_t size[][2] = {{1, 3}, {31, 64}, {32, 64}, {33, 5}, {64, 64}};
    for (size_t s = 0; s < sizeof size / sizeof *size; s++)
        for (int way = 0; way < 8; way++) {
            const int64_t m = size[s][0], n = size[s][1], gap = way & 4 ? GAP : 0;
            const int transpose = way & 1, adds = way >> 1 & 1;
            uint64_t state = (uint64_t)(m * n + way);
            matrix l = make(m, m, gap, &state), b = make(m, n, gap, &state), c = make(m, n, gap, &state), was = c;
            for (int64_t i = 0; i < m; i++)
                for (int64_t j = i + 1; j < m; j++) l.p[i * l.ld + j] = 0;
            was.p = malloc((size_t)(m * c.ld) * sizeof *was.p);
            assert_non_null(was.p);
            memcpy(was.p, c.p, (size_t)(m * c.ld) * sizeof *was.p);
            ls_gemm_lower(transpose, m, n, l.p, l.ld, b.p, b.ld, adds, c.p, c.ld);
            check(transpose, 0, 1, &l, &b, adds, &was, &c);
            free(l.p), free(b.p), free(c.p), free(was.p);
        }
}

int main(int argc, char **argv)
{
    (void)argc;
    ls_gemm_single_thread();
    printf("OpenBLAS kernels for %s\n", ls_blas_kernels());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(products_are_sums),
        cmocka_unit_test(nothing_to_add_up),
        cmocka_unit_test(lower_triangles_are_products),
    };
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    const char *better = ls_blas_better_kernels();
    if (failed != 0 || better == NULL || getenv("OPENBLAS_CORETYPE") != NULL) return failed;
    if (setenv("OPENBLAS_CORETYPE", better, 1) == 0) execv("/proc/self/exe", argv);
    return 1;
}
