/* What the GPU's files of longshort share: memory, and functions of one that others call. As on the CPU,
 * longshort_norm.cu has the LayerNorms, longshort_far.cu the vectors of what is far, longshort_attend.cu the softmax.
 */
#ifndef LS_LONGSHORT_CUDA_H
#define LS_LONGSHORT_CUDA_H

#include "cuda.h"

extern "C" {
#include "longshort_form.h"
}

enum { TOP, INVERSE }; /* saved[]: of each query's softmax, (B,H,T) */

/* work[], see plan. What starts with D is there in backward only. An element of sums is, for each range of tokens,
 * batch row and column (head h, vector t: h r + t), (m; s, Σ e^(a-m) k, Σ e^(a-m) v), 2 + 2 d reals; a step's are of
 * (b,h), (m; s, Σ e^(logit-m) v). Vectors lie as (K (r,E), V (r,E)) for each range and batch row; as items, with a
 * flag. */
enum {
    OWN,     /* NS: this rank's keys and values normalised (2,B,S,E) */
    SUMS,    /* elements: NS by slices of the tokens, CS by chunks, a step by slices of the list */
    NEAR,    /* the halo's keys and values normalised (2,B,n,E) */
    RAW,     /* vectors before their norm */
    ITEMS,   /* NS: one item for each batch row. A step: u (B,H,E), then the terms of distances (B,H,seen) */
    TABLES,  /* CS: pe (max(N, D),E), R_chunk (H,N,d), R_win (H,D,d), r_r·R_win (H,D), gradients of the two tables */
    DOWN,    /* NS: gradients of OWN */
    DRAW,    /* of RAW */
    DSUMS,   /* CS: of SUMS */
    CENTRE,  /* for each range and batch row less the mean of its vectors (2,E); then for each column what s is owed */
    DITEMS,  /* NS: of ITEMS */
    MOMENTS, /* doubles: of a row and its gradient, 4 each */
    NORMS,   /* doubles: gradients of the norms' parameters (4,E); partial sums of one (64,2,E) */
    DELTA,   /* (B,H,T) Σ P dP */
    SLICES   /* partial sums over queries */
};
enum { NORM_SLICES = 64, SUM_SLICES = 64 };

/* Rows of all heads: n for each of `groups`, head h of row t of group g at ls_row(v, g, h, t). */
typedef struct longshort_rows {
    ls_view v;
    int64_t groups, n, H, d;
} longshort_rows;

static inline ls_view longshort_side_by_side(ls_real *x, int64_t stride, int64_t E, int64_t d)
{
    return ls_view{x, stride, d, E};
}

/* y = LayerNorm of x, 0 where padded (pad (groups,n), or NULL), with the parameters `weight` and the next. */
void ls_longshort_cuda_norm(ls_pass *p, int weight, longshort_rows x, const uint8_t *pad, ls_view y);
/* dx (=, or += with add; may be dy without it); parameter gradients are summed from begin to end. */
void ls_longshort_cuda_norm_backward(ls_pass *p, int weight, longshort_rows x, const uint8_t *pad, ls_view dy,
                                     ls_view dx, int add);
void ls_longshort_cuda_begin_norms(ls_pass *p);
void ls_longshort_cuda_end_norms(ls_pass *p);

/* longshort_far.cu: the phases that make what is far, NS's landmarks as items, and the way back from their gradients.
 */
ls_status ls_longshort_cuda_landmarks(ls_pass *p, int phase);
ls_status ls_longshort_cuda_landmarks_backward(ls_pass *p, int phase);
ls_status ls_longshort_cuda_summaries(ls_pass *p, int phase);
ls_status ls_longshort_cuda_summaries_backward(ls_pass *p, int phase);
ls_status ls_longshort_cuda_look_far(ls_pass *p, int phase);
void ls_longshort_cuda_load_landmarks(ls_pass *p, const ls_summary *s);
void ls_longshort_cuda_return_landmarks(ls_pass *p, const ls_summary *s);

/* pe(0) .. pe(n-1), (n,E) */
void ls_longshort_cuda_positions(ls_pass *p, int64_t n, ls_real *positions);

/* longshort_attend.cu */
size_t ls_longshort_cuda_slices(const ls_pass *p); /* bytes of SLICES */
ls_status ls_longshort_cuda_attend(ls_pass *p, int phase);
ls_status ls_longshort_cuda_attend_backward(ls_pass *p, int phase);

#endif
