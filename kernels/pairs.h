/* Rows that meet rows in a block of a kernel, for .cu files: a tile of up to 16 rows, each with 32 guests at a time.
 * A block is four warps; a warp has rows warp, warp + 4, .. of the tile, a lane one guest of each.
 *
 * A group is where rows come from: any of up to 48 in memory, of which pair (row r, lane j) takes number
 * base + by_row r + by_lane j. So the tile's own rows are by_row = 1, by_lane = 0, guests that all rows share the
 * opposite, and a band, guests at a fixed distance from their row, has both. Rows come in pieces of 32 features into
 * shared memory: as scale · row + more. */
#ifndef LS_PAIRS_H
#define LS_PAIRS_H

#include "dots_cuda.h"

enum {
    LS_PAIR_ROWS = 16,
    LS_PAIR_WARPS = 4,
    LS_PAIR_EACH = 4, /* rows of a warp */
    LS_PAIR_THREADS = 128,
    LS_PAIR_GUESTS = 32,
    LS_PAIR_MOST = LS_PAIR_ROWS + LS_PAIR_GUESTS,
    LS_PAIR_BAND = LS_PAIR_MOST - 1, /* rows of a band */
    LS_PAIR_PIECE = 32,
    LS_PAIR_PITCH = LS_PAIR_PIECE + 4,            /* four more: lanes that read by fours meet no bank twice */
    LS_PAIR_REALS = LS_PAIR_MOST * LS_PAIR_PITCH, /* of a piece */
    LS_PAIR_WIDE = LS_PAIR_GUESTS + 4,            /* from the weights of a row to those of the next */
    LS_PAIR_WEIGHTS = LS_PAIR_ROWS * LS_PAIR_WIDE,
    LS_PAIR_ALL = 2 * LS_PAIR_REALS + 2 * LS_PAIR_WEIGHTS
};

typedef struct ls_group {
    const ls_real *row[LS_PAIR_MOST], *more[LS_PAIR_MOST]; /* row NULL: zeros; more NULL: none */
    ls_real scale;
    int n, base, by_row, by_lane;
} ls_group;

/* What a block has at the start of its dynamic shared memory, LS_PAIR_ALL reals; `sums` more numbers follow. */
typedef struct ls_pair_memory {
    ls_real *a, *b, *weight, *weight2; /* pieces; weights (16,36), of a pair at r · 36 + j */
} ls_pair_memory;
static inline size_t ls_pair_bytes(int64_t sums)
{
    return (size_t)(LS_PAIR_ALL + ls_fours(sums)) * sizeof(ls_real);
}
static __device__ inline ls_pair_memory ls_pair_memory_at(ls_real *x)
{
    ls_pair_memory m = {x, x + LS_PAIR_REALS, x + 2 * LS_PAIR_REALS, x + 2 * LS_PAIR_REALS + LS_PAIR_WEIGHTS};
    return m;
}

/* Rows of a tile, so that `sums` arrays of (rows,d) numbers of `size` bytes and `more` bytes are there, too. 6 KiB are
 * left for groups. */
static inline int ls_pair_rows(int64_t d, int64_t sums, int64_t size, int64_t more)
{
    const int64_t room = (42 << 10) - (int64_t)ls_pair_bytes(0) - more;
    return (int)ls_max(1, ls_min((int64_t)LS_PAIR_ROWS, room / (sums * d * size)));
}

/* One thread of a block says how pairs find their rows. */
static __device__ inline void ls_group_is(ls_group *g, int n, int base, int by_row, int by_lane, ls_real scale)
{
    if (threadIdx.x > 0) return;
    g->n = n, g->base = base, g->by_row = by_row, g->by_lane = by_lane, g->scale = scale;
}
static __device__ inline void ls_group_own(ls_group *g, ls_real scale)
{
    ls_group_is(g, LS_PAIR_ROWS, 0, 1, 0, scale);
}
static __device__ inline void ls_group_guests(ls_group *g, ls_real scale)
{
    ls_group_is(g, LS_PAIR_GUESTS, 0, 0, 1, scale);
}

/* Features [e0, e0 + 32) of a group, 0 from d on; each thread has four side by side. */
static __device__ inline void ls_load_piece(const ls_group *g, int64_t e0, int64_t d, ls_real *piece)
{
    enum { ACROSS = LS_PAIR_PIECE / 4 };
    const int e = threadIdx.x % ACROSS * 4, left = (int)ls_min(4, d - e0 - e);
    for (int i = threadIdx.x / ACROSS; i < g->n; i += LS_PAIR_THREADS / ACROSS) {
        const ls_real *row = g->row[i], *more = g->more[i];
        ls_four x = {};
        if (row != NULL && left > 0) {
            row += e0 + e;
            if (left == 4 && ls_is_four(row)) x = ls_four_at(row);
            const int one_by_one = left < 4 || !ls_is_four(row);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (one_by_one && k < left) x.v[k] = row[k];
                x.v[k] *= g->scale;
                if (more != NULL && k < left) x.v[k] += more[e0 + e + k];
            }
        }
        *(ls_four *)(piece + i * LS_PAIR_PITCH + e) = x;
    }
}

/* s_r += a · b over d features, for this thread's pairs. Groups are read between two barriers, and not after them. */
static __device__ inline void ls_pair_dots(const ls_group *a, const ls_group *b, int64_t d, ls_pair_memory m,
                                           ls_real (&s)[LS_PAIR_EACH])
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    for (int64_t e0 = 0; e0 < d; e0 += LS_PAIR_PIECE) {
        const int n = (int)ls_fours(ls_min(LS_PAIR_PIECE, d - e0));
        const ls_real *x[LS_PAIR_EACH], *y[LS_PAIR_EACH];
        __syncthreads();
        ls_load_piece(a, e0, d, m.a);
        ls_load_piece(b, e0, d, m.b);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            x[u] = m.a + (a->base + a->by_row * r + a->by_lane * lane) * LS_PAIR_PITCH;
            y[u] = m.b + (b->base + b->by_row * r + b->by_lane * lane) * LS_PAIR_PITCH;
        }
        const int alike = b->by_row == 0; /* all rows have the same guests */
        __syncthreads();
        if (alike)
            ls_dots(x, y, 1, n, s);
        else
            ls_dots(x, y, 0, n, s);
    }
}

static_assert((int)LS_PAIR_WARPS == 4, "rows of a band are as far apart as ls_weighted_band says");

/* sum_r (d) = shrink_r sum_r + Σ_guests weight · guest, for the tile's first `rows`; the weights of a row were written
 * by its warp. */
template <typename T>
static __device__ void ls_pair_sums(const ls_real *weight, const ls_group *g, int rows, int64_t d, ls_pair_memory m,
                                    const ls_real (&shrink)[LS_PAIR_EACH], T *sum)
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    for (int64_t e0 = 0; e0 < d; e0 += LS_PAIR_PIECE) {
        __syncthreads();
        ls_load_piece(g, e0, d, m.b);
        const int base = g->base, by_row = g->by_row, by_lane = g->by_lane;
        __syncthreads();
        if (e0 + lane >= d) continue;
        /* a band is taken in the order of its guests: where rows and lanes run apart, from the last row to the first */
        const int back = by_row * by_lane < 0;
        const ls_real *w[LS_PAIR_EACH];
        ls_real x[LS_PAIR_EACH][1] = {{0}};
        for (int u = 0; u < LS_PAIR_EACH; u++)
            w[u] = weight + (warp + (back ? LS_PAIR_EACH - 1 - u : u) * LS_PAIR_WARPS) * LS_PAIR_WIDE;
        const int first = base + by_row * (warp + (back ? (LS_PAIR_EACH - 1) * LS_PAIR_WARPS : 0));
        const ls_real *y = m.b + first * LS_PAIR_PITCH + lane;
        if (by_row == 0)
            ls_weighted(w, y, by_lane * LS_PAIR_PITCH, x);
        else
            ls_weighted_band(w, y, by_lane * LS_PAIR_PITCH, x);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int v = back ? LS_PAIR_EACH - 1 - u : u, r = warp + v * LS_PAIR_WARPS;
            if (r >= rows) continue;
            T *to = sum + r * d + e0 + lane;
            *to = T(shrink[v]) * *to + T(x[u][0]);
        }
    }
}

#endif
