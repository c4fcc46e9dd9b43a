/* Linear attention on a GPU: what a mechanism's .cu file lends to it, and what it gets. */
#ifndef LS_LINEAR_CUDA_H
#define LS_LINEAR_CUDA_H

#include "cuda.h"

extern "C" {
#include "linear.h"
}

namespace ls_linear /* other files have types of these names, too */
{
/* Rows (H,B,K,C), of which those of one (b,h) begin with row `first` of the shard's `rows`. */
typedef struct slab {
    int64_t B, H, K, C, first, rows;
} slab;

typedef struct place {
    int64_t g, b, h, u, t; /* g = h B + b; row u of g in the slab is row t of the shard */
} place;

LS_BOTH_SIDES int64_t rows_per_head(const slab &s)
{
    return s.B * s.K * s.C;
}

LS_BOTH_SIDES int64_t rows_of(const slab &s)
{
    return s.H * rows_per_head(s);
}

/* n / by of numbers of a slab, whose rows are fewer than 2^32, as memory has it: a GPU takes 64 bits apart to divide.
 */
LS_BOTH_SIDES int64_t quotient(int64_t n, int64_t by)
{
    return (int64_t)((uint32_t)n / (uint32_t)by);
}

__device__ static inline place place_of(const slab &s, int64_t R)
{
    place at;
    at.g = quotient(R, s.K * s.C);
    at.u = R - at.g * (s.K * s.C);
    at.h = quotient(at.g, s.B);
    at.b = at.g - at.h * s.B;
    at.t = s.first + at.u;
    return at;
}

/* Neither past the end nor padded. */
__device__ static inline int is_there(const slab &s, const uint8_t *pad, place at)
{
    return at.t < s.rows && !ls_is_padded(pad, at.b * s.rows + at.t);
}

} // namespace ls_linear

extern "C" {
/* ls_feature_map on a GPU: launches of kernels for the rows (R) of a slab, which lie in p->q or p->own.k and whose
 * gradients go to p->dq or p->own.dk. Features (R,r), top (R); of rows that are not there they stay as they are. */
typedef struct ls_feature_map_cuda {
    void (*prepare)(ls_pass *);
    int (*act)(const ls_pass *); /* number by number: an ls_linear_act. NULL: they are made */
    void (*queries)(ls_pass *, ls_linear::slab s, ls_real *a);
    void (*keys)(ls_pass *, ls_linear::slab s, ls_real *b, ls_real *top);
    void (*queries_backward)(ls_pass *, ls_linear::slab s, const ls_real *da);
    void (*keys_backward)(ls_pass *, ls_linear::slab s, const ls_real *db, int add); /* add: += */
} ls_feature_map_cuda;

void ls_linear_cuda_plan(ls_pass *p, ls_arena *saved, ls_arena *work);
int64_t ls_linear_cuda_rows(const ls_pass *p); /* the most rows of a call, of all heads together */
extern const ls_cuda_kernel ls_linear_cuda_kernels[];
}

#endif
