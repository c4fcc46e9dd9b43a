/* Rows that meet rows in a block of a kernel, where tiles of 64 (tiles_cuda.h) would be mostly empty: a tile of up to
 * 16 rows, each with 32 guests at a time. A block is four warps; a warp has rows warp, warp + 4, .. of the tile, a lane
 * one guest of each.
 *
 * A group is where rows come from: the tile's own, or guests, which all its rows share. They come in pieces of 32
 * features into shared memory, as row + more. */
#ifndef LS_PAIRS_H
#define LS_PAIRS_H

#include "dots_cuda.h"

enum {
    LS_PAIR_ROWS = 16,
    LS_PAIR_WARPS = 4,
    LS_PAIR_EACH = 4, /* rows of a warp */
    LS_PAIR_THREADS = 128,
    LS_PAIR_GUESTS = 32,
    LS_PAIR_PIECE = 32,
    LS_PAIR_PITCH = LS_PAIR_PIECE + 4,              /* four more: lanes that read by fours meet no bank twice */
    LS_PAIR_REALS = LS_PAIR_GUESTS * LS_PAIR_PITCH, /* of a piece */
    LS_PAIR_WIDE = LS_PAIR_GUESTS + 4,              /* from the weights of a row to those of the next */
    LS_PAIR_WEIGHTS = LS_PAIR_ROWS * LS_PAIR_WIDE,
    LS_PAIR_ALL = 2 * LS_PAIR_REALS + LS_PAIR_WEIGHTS
};

typedef struct ls_group {
    const ls_real *row[LS_PAIR_GUESTS], *more[LS_PAIR_GUESTS]; /* row NULL: zeros; more NULL: none */
} ls_group;

/* What a block has at the start of its dynamic shared memory, LS_PAIR_ALL reals; `sums` more numbers follow. */
typedef struct ls_pair_memory {
    ls_real *a, *b, *weight; /* pieces; weights (16,36), of a pair at r · 36 + j */
} ls_pair_memory;
static inline size_t ls_pair_bytes(int64_t sums)
{
    return (size_t)(LS_PAIR_ALL + ls_fours(sums)) * sizeof(ls_real);
}
static __device__ inline ls_pair_memory ls_pair_memory_at(ls_real *x)
{
    return ls_pair_memory{x, x + LS_PAIR_REALS, x + 2 * LS_PAIR_REALS};
}

/* Rows of a tile, so that two arrays of (rows,d) numbers of `size` bytes are there, too. 6 KiB are left for groups. */
static inline int ls_pair_rows(int64_t d, int64_t size)
{
    const int64_t room = (42 << 10) - (int64_t)ls_pair_bytes(0);
    return (int)ls_max(1, ls_min((int64_t)LS_PAIR_ROWS, room / (2 * d * size)));
}

/* Features [e0, e0 + 32) of a group's n rows, 0 from d on; each thread has four side by side. */
static __device__ inline void ls_load_piece(const ls_group *g, int n, int64_t e0, int64_t d, ls_real *piece)
{
    enum { ACROSS = LS_PAIR_PIECE / 4 };
    const int e = threadIdx.x % ACROSS * 4, left = (int)ls_min(4, d - e0 - e);
    for (int i = threadIdx.x / ACROSS; i < n; i += LS_PAIR_THREADS / ACROSS) {
        const ls_real *row = g->row[i], *more = g->more[i];
        ls_four x = {};
        if (row != NULL && left > 0) {
            row += e0 + e;
            if (left == 4 && ls_is_four(row)) x = ls_four_at(row);
            const int one_by_one = left < 4 || !ls_is_four(row);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (one_by_one && k < left) x.v[k] = row[k];
                if (more != NULL && k < left) x.v[k] += more[e0 + e + k];
            }
        }
        *(ls_four *)(piece + i * LS_PAIR_PITCH + e) = x;
    }
}

/* s_r += own · guest over d features, for this thread's pairs. Groups are read between two barriers, and not after. */
static __device__ inline void ls_pair_dots(const ls_group *own, const ls_group *guests, int64_t d, ls_pair_memory m,
                                           ls_real (&s)[LS_PAIR_EACH])
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const ls_real *x[LS_PAIR_EACH], *const y = m.b + lane * LS_PAIR_PITCH;
    for (int u = 0; u < LS_PAIR_EACH; u++) x[u] = m.a + (warp + u * LS_PAIR_WARPS) * LS_PAIR_PITCH;
    for (int64_t e0 = 0; e0 < d; e0 += LS_PAIR_PIECE) {
        __syncthreads();
        ls_load_piece(own, LS_PAIR_ROWS, e0, d, m.a);
        ls_load_piece(guests, LS_PAIR_GUESTS, e0, d, m.b);
        __syncthreads();
        ls_dots(x, y, (int)ls_fours(ls_min(LS_PAIR_PIECE, d - e0)), s);
    }
}

/* sum_r (d) = shrink_r sum_r + Σ_guests weight · guest, for the tile's first `rows`; the weights of a row were written
 * by its warp. */
template <typename T>
static __device__ void ls_pair_sums(const ls_real *weight, const ls_group *guests, int rows, int64_t d,
                                    ls_pair_memory m, const ls_real (&shrink)[LS_PAIR_EACH], T *sum)
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const ls_real *w[LS_PAIR_EACH];
    for (int u = 0; u < LS_PAIR_EACH; u++) w[u] = weight + (warp + u * LS_PAIR_WARPS) * LS_PAIR_WIDE;
    for (int64_t e0 = 0; e0 < d; e0 += LS_PAIR_PIECE) {
        ls_real x[LS_PAIR_EACH] = {0};
        __syncthreads();
        ls_load_piece(guests, LS_PAIR_GUESTS, e0, d, m.b);
        __syncthreads();
        if (e0 + lane >= d) continue;
        ls_weighted(w, m.b + lane, LS_PAIR_PITCH, x);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            if (r >= rows) continue;
            T *to = sum + r * d + e0 + lane;
            *to = T(shrink[u]) * *to + T(x[u]);
        }
    }
}

#endif
