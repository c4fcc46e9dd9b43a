/* The normal distribution function, for gelu: Φ(x) = (1 + erf(x / √2)) / 2, with its density φ(x) as a by-product.
 *
 * In float, without branches, so that the loops around it become vector code. One exp serves the density and the tail:
 *     |x| < 1:  Φ(x) = 1/2 + x P(x²), erf's odd series as a polynomial (relative error 4.1e-8)
 *     else:     Φ(-|x|) = exp(-x²/2) G(|x|), G(a) = erfcx(a / √2) / 2, which falls smoothly like 1/a. With t = 1/(a +
 * k) and u = 1 - 2kt, which maps 0..∞ to -1..1, G = t Q(u), Q a polynomial (k = 3.6, relative error 5.5e-8) P and Q are
 * minimax fits of the relative error (Lawson's iteration). The tail, hence gelu of negative numbers, keeps its relative
 * accuracy. Both are summed by Estrin's scheme, whose chain of dependent operations is shorter than Horner's: these
 * loops wait for latency. */
#ifndef LS_ERF_H
#define LS_ERF_H

#include "real.h"

/* LS_ERF_LOOP stands before loops that call ls_normal_cdf: libm's erfc makes no vector code, and clang warns if asked.
 */
#ifdef LS_REAL_DOUBLE
#define LS_ERF_LOOP
LS_BOTH_SIDES double ls_normal_cdf(double x, double *density)
{
    *density = 0.3989422804014327 * exp(-0.5 * x * x);
    return 0.5 * erfc(-0.7071067811865476 * x);
}
#else
#define LS_ERF_LOOP _Pragma("omp simd")
/* exp(-s/2) and 1/x for LS_NORMAL_SIDES, the functions that are made here: a file may have faster ones. */
#ifndef LS_NORMAL_SIDES
#define LS_NORMAL_SIDES LS_BOTH_SIDES
#define LS_NORMAL_EXP(s) ls_exp(-0.5f * (s))
#define LS_NORMAL_INVERSE(x) (1.0f / (x))
#endif
LS_NORMAL_SIDES float ls_normal_cdf(float x, float *density)
{
    const float s = x * x, s2 = s * s;
    const float p23 = 9.96719673e-3f - 1.16935372e-3f * s, p01 = 3.98942262e-1f - 6.64895847e-2f * s;
    const float inner = 0.5f + x * ((9.42352417e-5f * s2 + p23) * s2 + p01);

    const float a = fabsf(x), t = LS_NORMAL_INVERSE(a + 3.6f), u = 1.0f - 7.2f * t, u2 = u * u;
    const float q45 = 2.49807350e-2f + 4.74176742e-3f * u, q23 = 3.30843926e-1f - 1.30242690e-1f * u;
    const float q01 = 7.46886075e-1f - 5.74994683e-1f * u;
    const float q = ((q45 - 3.43092391e-3f * u2) * u2 + q23) * u2 + q01;

    const float e = LS_NORMAL_EXP(s), tail = e * q * t;
    *density = 0.39894228f * e;
    const float above = 1.0f - tail, outer = x < 0.0f ? tail : above;
    return a < 1.0f ? inner : outer;
}
#endif

#endif
