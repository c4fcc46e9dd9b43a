/* What probsparse's kernels of both sides share: who is what, and the small arithmetic that must stand once. */
#ifndef LS_PROBSPARSE_H
#define LS_PROBSPARSE_H

#include "mechanism.h"

enum { FACTOR };                                                                /* option[] */
enum { COUNT, TOTALS, SCORES, OFFERS, CHOICE, QUERIES, PARTIAL, PREFIX, SUMS }; /* phases */
enum { LANES = 16 };                                                            /* partial sums of a dot product */
enum { COUNTED = 6, OFFERED = 3 }; /* reals of a batch row's counts, of a candidate */
enum { HALF = 4096 };              /* integers travel as two reals, high * HALF + low: exact beyond 2^24 */

/* What all ranks know of a batch row once counts have met. */
typedef struct rows {
    int64_t keys, samples, top; /* unpadded keys S, U, u */
    double big;                 /* see rounder() */
} rows;

/* min(f ⌈ln n⌉, n) */
LS_BOTH_SIDES int64_t count_of(double factor, int64_t n)
{
    return n < 1 ? 0 : ls_min((int64_t)factor * (int64_t)ceil(log((double)n)), n);
}

/* The most that a batch row can select: u without padding. */
static inline int64_t most_top(const ls_pass *p)
{
    return count_of(p->option[FACTOR], p->all_queries);
}

static inline int is_causal(const ls_pass *p)
{
    return p->pattern == LS_CS;
}

/* Rows of a softsum before the selected ones: that of the mean, in NS and NC. */
static inline int64_t lead(const ls_pass *p)
{
    return is_causal(p) ? 0 : 1;
}

/* ⌊w n / 2^32⌋: which of n keys a random number w is. */
LS_BOTH_SIDES int64_t key_of(uint32_t w, int64_t n)
{
    const uint64_t high = (uint64_t)n >> 32, low = (uint64_t)n & 0xffffffff;
    return (int64_t)(w * high + (w * low >> 32));
}

LS_BOTH_SIDES void put_integer(int64_t n, ls_real *to)
{
    to[0] = (ls_real)(n / HALF);
    to[1] = (ls_real)(n % HALF);
}

LS_BOTH_SIDES int64_t integer_at(const ls_real *from)
{
    return (int64_t)from[0] * HALF + (int64_t)from[1];
}

/* 3·2^(e+g), see the top of probsparse.c; 0 where every product is 0. */
LS_BOTH_SIDES double rounder(double largest_product, int64_t samples)
{
    int e, g;
    if (!(largest_product > 0)) return 0;
    frexp(2 * largest_product, &e); /* twice: the products themselves are rounded */
    frexp((double)samples, &g);
    return ldexp(3.0, e + g);
}

#endif
