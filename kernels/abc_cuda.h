/* What abc.cu, for all keys, and abc_causal.cu share: work memory, chunks of rows, and products within a block. */
#ifndef LS_ABC_CUDA_H
#define LS_ABC_CUDA_H

#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

namespace ls_abc /* other files have types of these names, too */
{

enum { SLOTS };        /* option[] */
enum { PHI_K, PHI_V }; /* param[] */
/* work[]: logits and maxima, later e and gradients (reals of (B,H,rows,R)); w (reals), logit, dp, u (doubles), alike;
 * sums of chunks and their gradients (doubles of (B,H,2,chunks,R,d+2)), maxima of chunks; sums over rows, in pieces;
 * slots (B,H,2,R,d), centres (B,H,2,d), constants (B,H,2,R) */
enum { A_K, A_V, M_K, M_V, W, LOGIT, DP, U, STATES, DSTATES, TOPS, PIECES, CENTRED, CENTRES, CONSTANTS };
enum { TILE = 64, CHUNK = TILE }; /* rows and columns of products in a block */
enum { AHEAD = 8 };               /* chunks whose sums are read before their turn */

static inline int64_t slots(const ls_pass *p)
{
    return (int64_t)p->option[SLOTS];
}

static inline int64_t ceil_of(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

/* Rows [length c, length (c + 1)) of each (b,h) are chunk c. */
struct chunking {
    int64_t H, rows, length, count;
};

static inline chunking short_chunks(const ls_pass *p, int64_t rows)
{
    return {p->H, rows, CHUNK, ceil_of(rows, CHUNK)};
}

static inline double *doubles(const ls_pass *p, int which)
{
    return (double *)(void *)p->work[which];
}

/* A_K, A_V (B,H,S,R): the keys' logits, -inf where they are padded. */
void make_logits(ls_pass *p);
/* STATES, TOPS: (m; s, x) of each chunk of the keys, from their logits. */
void sum_chunks(ls_pass *p, chunking c);
/* A_K, A_V hold da, db: dk += da φ_kᵀ, dφ_k += (k - c)ᵀ da, and the same for the values; centres NULL: c = 0. */
void map_backward(ls_pass *p, const ls_real *centres);

ls_status apply_causal(ls_pass *p, int phase);
ls_status apply_causal_backward(ls_pass *p, int phase);

/* ------------------------------------------------------------------------------------------------ in a block */

/* Rows of a tensor, n of each b, that are read as 0 where they are padded. */
struct rows {
    ls_view v;
    const uint8_t *pad;
    int64_t n;
};

/* The rows of a block: [t, t + n) of (b,h). */
struct place {
    int64_t b, h, bh, chunk, t;
    int n;
};

__device__ static inline place place_of(chunking c)
{
    const int64_t bh = blockIdx.x / c.count, chunk = blockIdx.x % c.count, t = chunk * c.length;
    return {bh / c.H, bh % c.H, bh, chunk, t, (int)ls_min(c.length, c.rows - t)};
}

__device__ static inline int is_padded(const rows &x, const place &at, int i)
{
    return ls_is_padded(x.pad, at.b * x.n + at.t + i);
}

__device__ static inline double entry(const rows &x, const place &at, int i, int e)
{
    return is_padded(x, at, i) ? 0 : (double)ls_row(x.v, at.b, at.h, at.t + i)[e];
}

/* e^(from - to), 0 where there was nothing. */
__device__ static inline double weight(double from, double to)
{
    return from == -INFINITY ? 0 : (double)ls_exp((ls_real)(from - to));
}

/* done(i, j, Σ_k a(i,k) b(k,j)), i < m, j < n, k < depth > 0, by 256 threads, each with 4x4 of every 64x64. Thread x, y
 * has rows y + 16 u and columns x + 16 v. x: shared memory for `deep` k at a time; across: of an operand's numbers,
 * those of one k lie side by side in memory. */
template <class Desk, class A, class B, class Done>
__device__ static void product(Desk *x, int m, int n, int depth, A a, B b, Done done)
{
    constexpr int deep = Desk::deep, ld = Desk::ld;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int i0 = 0; i0 < m; i0 += TILE)
        for (int j0 = 0; j0 < n; j0 += TILE) {
            const int tall = (m - i0 + 15) / 16, wide = (n - j0 + 15) / 16;
            double sum[4][4] = {};
            for (int k0 = 0; k0 < depth; k0 += deep) {
                __syncthreads();
                for (int at = threadIdx.x; at < TILE * deep; at += blockDim.x) {
                    const int i = Desk::across ? at % TILE : at / deep, k = Desk::across ? at / TILE : at % deep;
                    x->a[i * ld + k] = i0 + i < m && k0 + k < depth ? a(i0 + i, k0 + k) : 0;
                    x->b[i * ld + k] = j0 + i < n && k0 + k < depth ? b(k0 + k, j0 + i) : 0;
                }
                __syncthreads();
                for (int k = 0; k < deep; k++)
#pragma unroll
                    for (int u = 0; u < 4; u++)
#pragma unroll
                        for (int v = 0; v < 4; v++)
                            if (u < tall && v < wide)
                                sum[u][v] += x->a[(ty + 16 * u) * ld + k] * x->b[(tx + 16 * v) * ld + k];
            }
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int v = 0; v < 4; v++)
                    if (i0 + ty + 16 * u < m && j0 + tx + 16 * v < n)
                        done(i0 + ty + 16 * u, j0 + tx + 16 * v, sum[u][v]);
        }
}

} // namespace ls_abc

#endif
