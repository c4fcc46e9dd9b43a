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
} ls_feature_map;

enum { LS_LINEAR_ROWS = 128 }; /* the most rows of such a call */
enum { LS_LINEAR_WORK = 10 };  /* pass.work[] from here on is the mechanism's own */

void ls_linear_plan(ls_pass *p, const ls_feature_map *map, ls_arena *work);

/* Phases. A short sequence of keys: share → gather → pairs. Otherwise sums → reduce → apply; CS: sums → scan → causal.
 * A step always goes the second way. */
int ls_linear_is_short(const ls_pass *p);
int ls_linear_is_long(const ls_pass *p);
int64_t ls_linear_shared(const ls_pass *p, const ls_feature_map *map, int64_t n); /* the piece of n keys */
ls_monoid ls_linear_summary(const ls_pass *p, const ls_feature_map *map);

/* Kernels, each with its backward. */
ls_status ls_linear_share(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_share_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_pairs(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_pairs_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_sums(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_sums_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_apply(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_apply_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_causal(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_causal_backward(ls_pass *p, const ls_feature_map *map, int phase);

#endif
