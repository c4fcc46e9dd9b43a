/* What local.cu, where windows are attended to, and local_centres.cu, where those of local-p are found, share. */
#ifndef LS_LOCAL_CUDA_H
#define LS_LOCAL_CUDA_H

#include "dots_cuda.h"

extern "C" {
#include "local.h"
}

namespace ls_local /* other files have types of these names, too */
{

/* Four warps make a tile. Features come in pieces of 64. */
enum { WARPS = 4, THREADS = WARPS * LS_WARP, PIECE = 64 };
/* In local-p, of tiles that rows of W visit 32 at a time; a row in shared memory has four numbers more: reading by
 * fours meets no bank twice. */
enum { ROWS = 16, EACH = ROWS / WARPS, GUESTS = LS_WARP, PITCH = PIECE + 4, PIECE_REALS = (int)GUESTS * (int)PITCH };
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

/* Rows of a tile of queries whose centres are made: fewer where rows are wide, of which predictor_gradients has more
 * than these in a block. */
static inline int tile_rows(const ls_pass *p)
{
    const int64_t most = (47 << 10) / (int64_t)sizeof(ls_real) - PIECE_REALS;
    return (int)ls_max(1, ls_min(ROWS, most / (4 * ls_fours(p->d))));
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

} // namespace ls_local

#endif
