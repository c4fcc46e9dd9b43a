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

__device__ static inline place place_of(const slab &s, int64_t R)
{
    place at;
    at.g = R / (s.K * s.C);
    at.u = R - at.g * (s.K * s.C);
    at.h = at.g / s.B;
    at.b = at.g - at.h * s.B;
    at.t = s.first + at.u;
    return at;
}

/* Neither past the end nor padded. */
__device__ static inline int is_there(const slab &s, const uint8_t *pad, place at)
{
    return at.t < s.rows && !ls_is_padded(pad, at.b * s.rows + at.t);
}

/* Whether d numbers of any row of a view can be read by fours. */
static inline int reads_fours(ls_view v, int64_t d)
{
    return (d | v.sb | v.sh | v.st) % 4 == 0 && ls_is_four(v.p);
}

/* Pieces of rows in shared memory: numbers of a row that are there at a time, and from one row to the next, so that
 * rows side by side begin in other banks. */
enum { DEEP = 64, PITCH = DEEP + 4 };

/* `to` (N,PITCH) = numbers [e0, e0 + DEEP) of rows [R, R + count) of a slab, 0 where there are none. By a block. */
template <int N>
__device__ static void load_rows(const slab &s, int64_t R, int64_t count, int64_t d, int64_t e0, ls_view rows,
                                 const uint8_t *pad, int fours, ls_real *to)
{
    for (int i = threadIdx.x; i < N * DEEP / 4; i += LS_THREADS) {
        const int r = i / (DEEP / 4), e = i % (DEEP / 4) * 4;
        ls_four x = {};
        if (r < count && e0 + e < d) {
            const place at = place_of(s, R + r);
            const ls_real *from = ls_row(rows, at.b, at.h, at.t) + e0 + e;
            const int there = is_there(s, pad, at);
            if (there && fours) x = ls_four_at(from);
            for (int k = 0; k < 4 && there && !fours; k++)
                if (e0 + e + k < d) x.v[k] = from[k];
        }
        *(ls_four *)(to + r * PITCH + e) = x;
    }
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
