/* What local.cu, where windows are attended to, and local_centres.cu, where those of local-p are found, share. */
#ifndef LS_LOCAL_CUDA_H
#define LS_LOCAL_CUDA_H

#include "dots_cuda.h"

extern "C" {
#include "local.h"
}

namespace ls_local /* other files have types of these names, too */
{

enum { ROWS = 16, WARPS = 4, EACH = ROWS / WARPS, THREADS = WARPS * LS_WARP }; /* of a tile, of a warp */
enum {
    GUESTS = LS_WARP,
    WIDE = GUESTS + 4,
    PIECE = 64,
    PITCH = PIECE + 4,
    PIECE_REALS = GUESTS * PITCH
};                                                            /* four more: reading by fours meets no bank twice */
enum { SCAN = 4 * LS_THREADS };                               /* slots whose gaps are summed */
enum { SLICES = 64 };                                         /* partial sums of du */
enum { CENTRE, ORDER, SORTED, ROW, TOP, INVERSE };            /* saved[] */
enum { SORT, GAPS, DELTA, DCENTRE, DHIDDEN, CLEAN, DVECTOR }; /* work[] */

static inline int predictive(const ls_pass *p)
{
    return ls_local_predicts(p->pattern, p->option);
}

static inline int64_t all_rows(const ls_pass *p)
{
    return p->B * p->H * p->T;
}

/* Rows of a tile: as many as fit into 47 KiB of shared memory with four arrays of them, see key_gradients. */
static inline int tile_rows(const ls_pass *p)
{
    const int64_t most = (47 << 10) / (int64_t)sizeof(ls_real) - PIECE_REALS;
    return (int)ls_max(1, ls_min(ROWS, most / (4 * ls_fours(p->d) + 2 * WIDE)));
}

static inline int64_t tiles_of(const ls_pass *p)
{
    return (p->T + tile_rows(p) - 1) / tile_rows(p);
}

static inline int64_t slices_of(const ls_pass *p)
{
    return ls_min(SLICES, tiles_of(p));
}

static inline int64_t scan_tiles(const ls_pass *p)
{
    return (p->T + SCAN - 1) / SCAN;
}

/* The centres by slot, which `wanted` reads. A step fetches nothing. */
static inline size_t host_bytes(const ls_pass *p)
{
    return predictive(p) && !p->step ? (size_t)all_rows(p) * sizeof(int64_t) : 0;
}

/* The phase that finds the centres, and puts the queries in their order. */
ls_status centres(ls_pass *p, int phase);
/* dp, which query_gradients left, goes to W, u and the queries. */
void centres_backward(ls_pass *p);

/* ------------------------------------------------------------------------------------------------ windows */

/* This rank's queries: T for each (b,h), from position `first`. centre, order, row, by slot, and exact, by query, are
 * of local-p, and NULL otherwise. */
typedef struct windows {
    ls_pattern pattern;
    int64_t H, T, first, queries, keys, w;
    const uint8_t *pad;
    const int64_t *centre, *order, *row;
    const double *exact;
} windows;

static inline windows windows_of(const ls_pass *p)
{
    windows x = {p->pattern,
                 p->H,
                 p->T,
                 p->query_span[0].lo,
                 p->all_queries,
                 p->all_keys,
                 (int64_t)p->option[WINDOW],
                 p->pad_q,
                 NULL,
                 NULL,
                 NULL,
                 NULL};
    if (!predictive(p)) return x;
    x.centre = (const int64_t *)(const void *)p->saved[SORTED];
    x.order = (const int64_t *)(const void *)p->saved[ORDER];
    x.row = (const int64_t *)(const void *)p->saved[ROW];
    x.exact = (const double *)(const void *)p->saved[CENTRE];
    return x;
}

__device__ static inline ls_span positions_of(const windows *x, int64_t g, int64_t slot)
{
    if (x->centre != NULL) { /* a padded query sees nothing, at the end */
        const int64_t c = x->centre[g * x->T + slot];
        return c < x->keys ? ls_local_clip(c - x->w, 2 * x->w + 1, x->keys) : ls_span{0, x->keys, 0};
    }
    const int64_t i = x->first + slot;
    if (x->pattern == LS_CS) return ls_local_clip(i - x->w + 1, x->w, x->keys);
    const int64_t c = x->pattern == LS_NS ? i : ls_local_monotonic(i, x->queries, x->keys);
    return ls_local_clip(c - x->w, 2 * x->w + 1, x->keys);
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* Rows of a tile in shared memory are `room` reals, d to the next four. own_r = scale · row, one for each; 0 for NULL
 * and from d on. Seen by all threads after the next barrier. */
__device__ static inline void load_own(ls_real *own, int r, const ls_real *row, ls_real scale, int64_t d)
{
    const int64_t room = ls_fours(d);
    for (int64_t e = threadIdx.x % LS_WARP; e < room; e += LS_WARP)
        own[r * room + e] = row != NULL && e < d ? scale * row[e] : 0;
}

/* piece (32,64) = scale · features [e0, e0 + 64) of the visitors; 0 for NULL and from d on. */
__device__ static inline void load_piece(const ls_real *const *visitor, int64_t e0, int64_t d, ls_real *piece,
                                         ls_real scale = 1)
{
    __syncthreads();
    for (int i = threadIdx.x; i < GUESTS * PIECE / 4; i += THREADS) {
        const int e = i % (PIECE / 4) * 4;
        const ls_real *row = visitor[i / (PIECE / 4)];
        ls_four x = {};
        if (row != NULL && d % 4 == 0 && ls_is_four(row)) {
            if (e0 + e < d) x = ls_four_at(row + e0 + e);
        } else if (row != NULL) {
            for (int k = 0; k < 4; k++)
                if (e0 + e + k < d) x.v[k] = row[e0 + e + k];
        }
        for (int k = 0; k < 4; k++) x.v[k] *= scale;
        *(ls_four *)(piece + i / (PIECE / 4) * PITCH + e) = x;
    }
    __syncthreads();
}

/* Of the tile's rows r = warp, warp + 4, ..: own_r · (scale · this lane's visitor), summed in T. */
template <typename T>
__device__ static inline void dots(const ls_real *own, int rows, const ls_real *const *visitor, int64_t d,
                                   ls_real *piece, T (&s)[EACH], ls_real scale = 1)
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    for (int u = 0; u < EACH; u++) s[u] = 0;
    for (int64_t e0 = 0; e0 < d; e0 += PIECE) {
        const ls_real *mine[EACH], *theirs[EACH];
        for (int u = 0; u < EACH; u++) {
            mine[u] = own + ls_min(warp + u * WARPS, rows - 1) * ls_fours(d) + e0;
            theirs[u] = piece + lane * PITCH;
        }
        load_piece(visitor, e0, d, piece, scale);
        ls_dots(mine, theirs, 1, (int)ls_fours(ls_min(PIECE, d - e0)), s);
    }
}

/* Rows that visit a tile, keys and values. */
typedef struct visitors {
    const ls_real *k[LS_WARP], *v[LS_WARP];
    int hidden[LS_WARP];
} visitors;

static inline size_t tile_bytes(const ls_pass *p, int arrays, int weights)
{
    const int64_t rows = tile_rows(p);
    return (size_t)((arrays * ls_fours(p->d) + weights * WIDE) * rows + PIECE_REALS) * sizeof(ls_real);
}

} // namespace ls_local

#endif
