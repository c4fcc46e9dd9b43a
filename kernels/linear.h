/* Linear attention by feature maps: what cosformer and performer share.
 *
 *   w_ij = (a_i·b_j) cos ω(i - j),   o_i = Σ_j w_ij v_j / max(Σ_j w_ij, floor)     over unpadded j; CS: over j <= i
 *
 * a (T,r), b (S,r): features of queries and keys, which the mechanism makes; i, j: global positions. */
#ifndef LS_LINEAR_H
#define LS_LINEAR_H

#include "mechanism.h"

/* The mechanism's part. Rows (n,d) are those of one head, side by side, 0 where padded; what becomes of the features of
 * padded rows is not its business. */
typedef struct ls_feature_map {
    ls_status (*prepare)(ls_pass *);      /* once a call, before anything else. NULL: nothing to prepare */
    int64_t (*features)(const ls_pass *); /* r */
    /* The first so many features of a key are e^(x - c): keys() gives x and, for each key, a number of which c is the
     * maximum over all the keys that a query sees; the others are 1. c is a constant to the gradient. NULL: none is. */
    int64_t (*exponentials)(const ls_pass *);
    double (*turn)(const ls_pass *); /* ω. NULL: 0 */
    double (*floor)(const ls_pass *);
    void (*queries)(ls_pass *, int64_t h, int64_t n, const ls_real *rows, ls_real *a);
    void (*keys)(ls_pass *, int64_t h, int64_t n, const ls_real *rows, ls_real *b, ls_real *top);
    /* drows = the gradient of rows, from that of the features (of x, where it is x) that the last call of queries() or
     * keys() made of the same rows. */
    void (*queries_backward)(ls_pass *, int64_t h, int64_t n, const ls_real *rows, const ls_real *da, ls_real *drows);
    void (*keys_backward)(ls_pass *, int64_t h, int64_t n, const ls_real *rows, const ls_real *db, ls_real *drows);
    const struct ls_feature_map_cuda *cuda; /* LS_IF_CUDA(&..), or NULL */
} ls_feature_map;

enum { LS_LINEAR_ROWS = 128, LS_LINEAR_CAUSAL_ROWS = 64 }; /* the most rows of a chunk; of a call for one head */
enum { LS_LINEAR_SHORT = 64 };                             /* the most keys that go to all ranks as they are */
enum { LS_LINEAR_RISE = 8 }; /* how far c may rise among rows that see their keys from one c */
/* pass.work[] and pass.saved[] from here on are the mechanism's own */
enum { LS_LINEAR_WORK = 10, LS_LINEAR_SAVED = 1 };

/* Features that are made of a row number by number. MADE: otherwise, by the mechanism. */
enum ls_linear_act { LS_LINEAR_MADE, LS_LINEAR_RELU, LS_LINEAR_ONE_PLUS_ELU };
LS_BOTH_SIDES ls_real ls_linear_act(int act, ls_real x)
{
    if (act == LS_LINEAR_RELU) return x > 0 ? x : 0;
    const ls_real e = ls_exp(x < 0 ? x : 0);
    return x > 0 ? 1 + x : e;
}
/* dx, from the feature y that x became, and its gradient. */
LS_BOTH_SIDES ls_real ls_linear_act_back_from(int act, ls_real y, ls_real dy)
{
    if (act == LS_LINEAR_RELU) return y > 0 ? dy : 0;
    return y < 1 ? dy * y : dy;
}
LS_BOTH_SIDES ls_real ls_linear_act_backward(int act, ls_real x, ls_real dy)
{
    return ls_linear_act_back_from(act, ls_linear_act(act, x), dy);
}

/* The inverse of a denominator D, and whether anything flows to it. */
LS_BOTH_SIDES ls_real ls_linear_inverse(double D, double floor, int *flows)
{
    const double least = 4 * (sizeof(ls_real) == 4 ? 1.2e-38 : 2.3e-308); /* its inverse is finite */
    const double taken = D > floor ? D : floor;
    *flows = D > floor && D > least;
    return taken > least ? (ls_real)(1 / taken) : 0;
}

/* Whether denominators may well meet their floor: gradients jump there, and what they are made of is not rounded. */
static inline int ls_linear_jumps(double floor)
{
    return floor > 1e-4;
}

/* e^(from - to), 0 where there is nothing on the one side or the other. */
LS_BOTH_SIDES double ls_linear_change(ls_real from, ls_real to)
{
    return from == -INFINITY || to == -INFINITY ? 0 : from == to ? 1 : exp((double)from - (double)to);
}

void ls_linear_plan(ls_pass *p, ls_arena *saved, ls_arena *work);

/* Phases of any mechanism whose kit is a feature map. A short sequence of keys: share → gather → pairs. Otherwise sums
 * → reduce → apply; CS: sums → scan → causal. A step always goes the second way. */
extern const ls_phase ls_linear_all_keys[], ls_linear_causal[], ls_linear_step_across[], ls_linear_step_causal[];

#endif
