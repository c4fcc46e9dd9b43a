/* The normal distribution function, for gelu: Phi(x) = (1 + erf(x / sqrt 2)) / 2, with its density phi(x) as a
 * by-product.
 *
 * In float the tail is Phi(-|x|) = exp(-x^2/2) G(|x|), where G(a) = erfcx(a / sqrt 2) / 2 falls smoothly from 1/2 like
 * 1/a. With t = 1 / (a + k) and u = 1 - 2kt, which maps 0..infinity to -1..1, G = t Q(u), Q a polynomial: the minimax
 * fit for the relative error (Lawson's iteration, k = 3.8, 0 <= a <= 13.3) has 1.3e-8. So there are no branches and one
 * exp serves both results; the tail, hence gelu of negative numbers, is accurate relatively and not only absolutely. */
#ifndef LS_ERF_H
#define LS_ERF_H

#include "real.h"

/* Before a loop that calls ls_normal_cdf: no compiler makes vector code of libm's erfc, and clang warns of being asked.
 */
#ifdef LS_REAL_DOUBLE
#define LS_ERF_LOOP
static inline double ls_normal_cdf(double x, double *density)
{
    *density = 0.3989422804014327 * exp(-0.5 * x * x);
    return 0.5 * erfc(-0.7071067811865476 * x);
}
#else
#define LS_ERF_LOOP _Pragma("omp simd")
static inline float ls_normal_cdf(float x, float *density)
{
    const float e = ls_exp(-0.5f * x * x);
    const float t = 1.0f / (fabsf(x) + 3.8f), u = 1.0f - 7.6f * t;
    float q = 4.61215532e-4f;
    q = q * u + 7.35569221e-4f;
    q = q * u - 4.21596505e-3f;
    q = q * u - 2.85025249e-4f;
    q = q * u + 4.18838841e-2f;
    q = q * u - 1.58577919e-1f;
    q = q * u + 3.60038042e-1f;
    q = q * u - 5.92348099e-1f;
    q = q * u + 7.51357377e-1f;
    const float tail = e * q * t;
    *density = 0.39894228f * e;
    return x < 0.0f ? tail : 1.0f - tail;
}
#endif

#endif
