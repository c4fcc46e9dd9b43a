/* Linear attention by feature maps: what cosformer and performer share.
 *
 *   w_ij = (a_i·b_j) cos ω(i - j),   o_i = Σ_j w_ij v_j / max(Σ_j w_ij, floor)
 *
 * a (T,r), b (S,r): features of queries and keys, given by the mechanism; i, j: global positions. With ω ≠ 0 features
 * turn: A_i = [a_i sin ω(i+1), a_i cos ω(i+1)], B_j likewise, F = 2r of them, so that w_ij = A_i·B_j; with ω = 0 A = a,
 * F = r. */
#ifndef LS_LINEAR_H
#define LS_LINEAR_H

#include "mechanism.h"

/* Rows [t, t + n) of (b,h). */
typedef struct ls_chunk {
    int64_t b, h, t, n;
} ls_chunk;

typedef struct ls_feature_map {
    int64_t (*features)(const ls_pass *); /* r */
    /* NULL: 0. The first so many features of a key are e^(x - c): keys() gives x and, in top (n), what c is the maximum
     * of, over all unpadded keys that a query sees. c is a constant to the gradient. */
    int64_t (*exponentials)(const ls_pass *);
    double (*turn)(const ls_pass *); /* ω; NULL: 0 */
    double (*floor)(const ls_pass *);
    /* Features (n,r) of rows, 0 where padded (x and top: -inf). */
    void (*queries)(ls_pass *, ls_chunk, ls_real *a);
    void (*keys)(ls_pass *, ls_chunk, ls_real *b, ls_real *top);
    /* Gradients of the features that the last call of queries() or keys() gave go to dq (=, 0 where padded), and to dk
     * (=, or
     * += with `add`). db of exponentials is that of x. */
    void (*queries_backward)(ls_pass *, ls_chunk, const ls_real *da);
    void (*keys_backward)(ls_pass *, ls_chunk, const ls_real *db, int add);
} ls_feature_map;

enum { LS_LINEAR_ROWS = 128 }; /* the most rows of a chunk */
enum { LS_LINEAR_WORK = 10 };  /* pass.work[] from here on is the mechanism's own */

void ls_linear_plan(ls_pass *p, const ls_feature_map *map, ls_arena *work);
ls_monoid ls_linear_summary(const ls_pass *p, const ls_feature_map *map);

/* Kernels. The summary goes out before phase + 1 and has arrived before `phase` of apply. */
ls_status ls_linear_sums(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_sums_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_apply(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_apply_backward(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_causal(ls_pass *p, const ls_feature_map *map, int phase);
ls_status ls_linear_causal_backward(ls_pass *p, const ls_feature_map *map, int phase);

#endif
