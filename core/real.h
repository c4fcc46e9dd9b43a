/* The number type, and the small arithmetic that everything shares. */
#ifndef LS_REAL_H
#define LS_REAL_H

#include "longspan.h"

#include <math.h>
#include <string.h>

/* Arithmetic that is the same on the CPU and in CUDA kernels. */
#ifdef __CUDACC__
#define LS_BOTH_SIDES static inline __host__ __device__
#else
#define LS_BOTH_SIDES static inline
#endif

#ifdef LS_REAL_DOUBLE
#define LS_REAL_EPS 2.220446049250313e-16
#define LS_REAL_MIN 2.2250738585072014e-308
#else
#define LS_REAL_EPS 1.1920929e-7f
#define LS_REAL_MIN 1.17549435e-38f
#endif
#if defined LS_REAL_DOUBLE || defined __CUDACC__
/* A GPU's own, of float likewise within 2 ulp, is a third of the instructions below. */
LS_BOTH_SIDES ls_real ls_exp(ls_real x)
{
    return exp(x);
}
#else
/* exp(x) = 2^n exp(r), n = rint(x / ln 2), |r| <= ln 2 / 2. Without branches or tables, so that the compiler makes
 * vector code of the loops around it; within 2 ulp; below -87.3 it is exactly 0 (also at -inf), above 88.7 inf.
 * NaN stays NaN. */
LS_BOTH_SIDES float ls_exp(float x)
{
    const float c = x > -88.0f ? (x < 89.0f ? x : 89.0f) : -88.0f; /* also NaN, which comes back at the end */
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    const float n = (c * 1.44269504f + shift) - shift;
    const float r = (c - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    /* 2^n in two factors, since n = 128 alone overflows the exponent field */
    const int32_t i = (int32_t)n, half = i >> 1;
    union {
        int32_t i;
        float f;
    } a = {(half + 127) << 23}, b = {(i - half + 127) << 23};
    const float y = p * a.f * b.f;
    return x > -87.3f ? y : x == x ? 0.0f : x;
}
#endif

LS_BOTH_SIDES int64_t ls_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}
LS_BOTH_SIDES int64_t ls_max(int64_t a, int64_t b)
{
    return a > b ? a : b;
}
static inline void ls_zero(ls_real *x, int64_t n)
{
    if (n > 0) memset(x, 0, (size_t)n * sizeof *x);
}

/* Numbers that a product reads or gives, `size` bytes each: ls_real, or, where a GPU rounds operands to it, bfloat16.
 */
typedef struct ls_operand {
    void *p;
    int64_t size;
} ls_operand;

LS_BOTH_SIDES ls_operand ls_reals(const ls_real *x)
{
    const ls_operand y = {(void *)(uintptr_t)x, sizeof *x}; /* inputs and outputs alike */
    return y;
}
LS_BOTH_SIDES int ls_is_narrow(ls_operand x)
{
    return x.size != sizeof(ls_real);
}
LS_BOTH_SIDES ls_operand ls_operand_at(ls_operand x, int64_t i)
{
    const ls_operand y = {(char *)x.p + i * x.size, x.size};
    return y;
}

/* Rows of a tensor (B,H,T,d): element (b,h,t,i) is p[b*sb + h*sh + t*st + i]. Any layout is a choice of strides. */
typedef struct ls_view {
    ls_real *p;
    int64_t sb, sh, st;
} ls_view;

/* p (B,H,n,d): one head after the other. */
static inline ls_view ls_heads_apart(ls_real *p, int64_t H, int64_t n, int64_t d)
{
    const ls_view v = {p, H * n * d, n * d, d};
    return v;
}

LS_BOTH_SIDES ls_real *ls_row(ls_view v, int64_t b, int64_t h, int64_t t)
{
    return v.p + b * v.sb + h * v.sh + t * v.st;
}

#endif
