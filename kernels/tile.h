/* Small things that mechanisms share: clean copies of rows, and reductions over short vectors. */
#ifndef LS_TILE_H
#define LS_TILE_H

#include "mechanism.h"
#include "statistics.h"

/* to (n,d) = scale · rows [t, t + n) of (b,h), with 0 where pad is 1, whatever stands there. */
static inline void ls_clean_rows(ls_view v, int64_t b, int64_t h, int64_t t, int64_t n, int64_t d, const uint8_t *pad,
                                 int64_t pad_stride, ls_real scale, ls_real *to)
{
    for (int64_t i = 0; i < n; i++, to += d) {
        if (pad != NULL && pad[b * pad_stride + t + i]) {
            ls_zero(to, d);
            continue;
        }
        const ls_real *from = ls_row(v, b, h, t + i);
        if (i + 8 < n) /* rows of a head lie far apart: those that come soon are asked for */
            for (int64_t e = 0; e < d; e += 64 / (int64_t)sizeof *from) __builtin_prefetch(from + 8 * v.st + e);
        for (int64_t e = 0; e < d; e++) to[e] = scale * from[e];
    }
}

static inline void ls_zero_view(ls_view v, int64_t B, int64_t H, int64_t n, int64_t d)
{
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < n; t++) ls_zero(ls_row(v, b, h, t), d);
}

static inline ls_real ls_dot(int64_t n, const ls_real *x, const ls_real *y)
{
    ls_real s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += x[i] * y[i];
    return s;
}

static inline void ls_axpy(int64_t n, ls_real a, const ls_real *x, ls_real *y)
{
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

static inline ls_real ls_row_max(int64_t n, const ls_real *x)
{
    ls_real m = -INFINITY;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* x := e^(x - m), returns the sum. m = -inf (nothing to see) gives zeros. */
static inline ls_real ls_row_exp(int64_t n, ls_real m, ls_real *x)
{
    ls_real s = 0;
    const ls_real top = ls_statistics_top(m);
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) {
        const ls_real e = ls_exp(x[i] - top);
        x[i] = e;
        s += e;
    }
    return s;
}

/* Softmax of a short row in place. */
static inline void ls_row_softmax(int64_t n, ls_real *x)
{
    const ls_real r = 1 / ls_row_exp(n, ls_row_max(n, x), x);
    for (int64_t i = 0; i < n; i++) x[i] *= r;
}

#endif
