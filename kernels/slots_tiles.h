/* Tiles of slots on a GPU, and their products; slots.cu has the passes forward, slots_back.cu those backward.
 *
 * How the work is divided: a block of 128 threads takes 64 rows of one (b,h) against a tile of 16, 32 or 64 slots. Of
 * their logits each thread holds 4 rows x 2, 4 or 8 slots in registers; features come through shared memory and are
 * read there by fours. What needs all keys (writing, sums) is split over blocks, each of which goes over several tiles
 * of rows and leaves its part in `room`, from where a second kernel combines the parts in their order.
 *
 * Rows of features wider than 64 are made 64 features to a block; the logits are then made by each of these blocks. */
#ifndef LS_SLOTS_TILES_H
#define LS_SLOTS_TILES_H

#include "slots_cuda.h"

/* Blocks that are wanted where rows are split. The tests make it small, so that blocks have many tiles of rows. */
#ifndef LS_SLOT_BLOCKS
#define LS_SLOT_BLOCKS 1024
#endif

namespace ls_slot_tiles
{
constexpr int TILE = 64;     /* rows */
constexpr int THREADS = 128; /* of which 8 neighbours have the same rows */
constexpr int WIDTH = 64;    /* features that a block makes */
constexpr int MOST_SPLITS = 256;
constexpr int WARPS = LS_THREADS / LS_WARP; /* of blocks that go by features, or add parts */

LS_BOTH_SIDES int64_t parts_of(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

/* Into how many parts rows are split. */
static inline int64_t splits_of(ls_slot_sizes s, int64_t rows)
{
    const int64_t blocks = ls_max(1, s.B * s.H * parts_of(s.R, 64) * parts_of(s.d, WIDTH));
    return ls_max(1, ls_min(ls_min(parts_of(rows, TILE), MOST_SPLITS), LS_SLOT_BLOCKS / blocks));
}

/* Where a block stands: its (b,h) = g, its first slot, feature and, of n parts of the rows, which. */
typedef struct place {
    int g, b, h, slot, feature, part;
} place;

/* Blocks are numbered [g][part][tile of slots][tile of features]. */
__device__ static place place_of(ls_slot_sizes s, int64_t parts, int64_t slot_tiles, int slots, int64_t feature_tiles)
{
    const int i = blockIdx.x, j = i / (int)feature_tiles, k = j / (int)slot_tiles, g = k / (int)parts, H = (int)s.H;
    return place{g, g / H, g % H, j % (int)slot_tiles * slots, i % (int)feature_tiles * WIDTH, k % (int)parts};
}

/* sum[i][j] += Σ_k a_i[k] b_j[k], k < n, a multiple of 4: rows a_i lie a_each numbers apart, b_j b_each. */
template <int I, int J>
__device__ static inline void product_of_rows(int n, const ls_real *a, int a_each, const ls_real *b, int b_each,
                                              ls_real (&sum)[I][J])
{
#pragma unroll 1
    for (int k = 0; k < n; k += 4) {
        ls_four x[I];
#pragma unroll
        for (int i = 0; i < I; i++) x[i] = ls_four_at(a + i * a_each + k);
#pragma unroll
        for (int j = 0; j < J; j++) {
            const ls_four y = ls_four_at(b + j * b_each + k);
#pragma unroll
            for (int i = 0; i < I; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][j] += x[i].v[c] * y.v[c];
        }
    }
}

/* sum[i][j] += Σ_k a_k[i] b_k[j], k < n: rows a_k lie a_next numbers apart, b_k b_next. */
template <int I>
__device__ static inline void product_of_columns(int n, const ls_real *a, int a_next, const ls_real *b, int b_next,
                                                 ls_real (&sum)[I][4])
{
#pragma unroll 2
    for (int k = 0; k < n; k++, a += a_next, b += b_next) {
        const ls_few<I> x = ls_few_at<I>(a);
        const ls_four y = ls_four_at(b);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] += x.v[i] * y.v[j];
    }
}

/* sum[i][j] += Σ_k a_i[k] b_k[j], k < n, a multiple of 4: rows a_i lie a_each numbers apart, b_k b_next; numbers 4 to 7
 * of a row b_k lie WIDTH / 2 behind the others. */
template <int I>
__device__ static inline void product(int n, const ls_real *a, int a_each, const ls_real *b, int b_next,
                                      ls_real (&sum)[I][8])
{
    for (int k = 0; k < n; k += 4) {
        ls_four x[I];
#pragma unroll
        for (int i = 0; i < I; i++) x[i] = ls_four_at(a + i * a_each + k);
#pragma unroll
        for (int c = 0; c < 4; c++, b += b_next) {
            const ls_four y[2] = {ls_four_at(b), ls_four_at(b + WIDTH / 2)};
#pragma unroll
            for (int i = 0; i < I; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] += x[i].v[c] * y[j / 4].v[j % 4];
        }
    }
}

template <typename T, int I, int J> __device__ static inline void clear(T (&x)[I][J])
{
#pragma unroll
    for (int i = 0; i < I; i++)
#pragma unroll
        for (int j = 0; j < J; j++) x[i][j] = 0;
}

/* Which part of a tile (ROWS,COLUMNS) a thread loads: four features of rows `first` + APART i. */
template <int ROWS, int COLUMNS> struct share_of {
    static const int GROUPS = COLUMNS / 4, APART = THREADS / GROUPS, EACH = ROWS / APART;
    int first, column;
    __device__ share_of() : first((int)threadIdx.x / GROUPS), column(4 * ((int)threadIdx.x % GROUPS)) {}
};

/* y[i] = the four at from + i step, of which `left` exist; 0 where there are none, or row i does not exist. All are
 * asked for before the first is waited for. */
template <int EACH>
__device__ static inline void load_fours(const ls_real *from, int64_t step, int64_t left, bool wide,
                                         const bool (&exists)[EACH], ls_four (&y)[EACH])
{
    if (wide) {
#pragma unroll
        for (int i = 0; i < EACH; i++) y[i] = exists[i] && left > 0 ? ls_four_at(from + i * step) : ls_four{};
    } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) y[i].v[c] = exists[i] && c < left ? from[i * step + c] : 0;
    }
}

template <int ROWS, int COLUMNS>
__device__ static inline void store_fours(const share_of<ROWS, COLUMNS> &me, int pitch,
                                          const ls_four (&y)[share_of<ROWS, COLUMNS>::EACH], ls_real *to)
{
    to += me.first * pitch + me.column;
#pragma unroll
    for (int i = 0; i < me.EACH; i++, to += me.APART * pitch) *(ls_four *)to = y[i];
}

/* to (ROWS, pitch): rows [t, t + ROWS) before `end`, features [e0, e0 + COLUMNS); 0 where there is none, or a pad. */
template <int ROWS, int COLUMNS>
__device__ static inline void load_rows(ls_slot_sizes s, const ls_slot_rows &x, const place &at, int64_t t, int64_t end,
                                        int64_t e0, int pitch, ls_real *to)
{
    const share_of<ROWS, COLUMNS> me;
    const int64_t e = e0 + me.column, row = t + me.first;
    const bool whole = s.d % 4 == 0;
    const bool wide = whole && ls_is_four(x.x.p) && x.x.sb % 4 == 0 && x.x.sh % 4 == 0 && x.x.st % 4 == 0;
    bool exists[me.EACH];
    ls_four y[me.EACH], centre[1] = {};
#pragma unroll
    for (int i = 0; i < me.EACH; i++) exists[i] = row + i * me.APART < end;
    if (x.pad != NULL)
#pragma unroll
        for (int i = 0; i < me.EACH; i++) exists[i] = exists[i] && x.pad[at.b * x.n + row + i * me.APART] == 0;
    load_fours(ls_row(x.x, at.b, at.h, row) + e, me.APART * x.x.st, s.d - e, wide, exists, y);
    if (x.centre != NULL)
        load_fours(x.centre + at.g * s.d + e, 0, s.d - e, whole && ls_is_four(x.centre), {true}, centre);
#pragma unroll
    for (int i = 0; i < me.EACH; i++)
        for (int c = 0; c < 4; c++) y[i].v[c] = exists[i] ? y[i].v[c] - centre[0].v[c] : 0;
    store_fours(me, pitch, y, to);
}

/* to (ROWS, pitch): the same of slots [r, r + ROWS), rows of a matrix x (R, stride). */
template <int ROWS, int COLUMNS>
__device__ static inline void load_slots(ls_slot_sizes s, const ls_real *x, int64_t stride, int64_t r, int64_t e0,
                                         int pitch, ls_real *to)
{
    const share_of<ROWS, COLUMNS> me;
    const int64_t e = e0 + me.column, slot = r + me.first;
    bool exists[me.EACH];
    ls_four y[me.EACH];
#pragma unroll
    for (int i = 0; i < me.EACH; i++) exists[i] = slot + i * me.APART < s.R;
    load_fours(x + slot * stride + e, me.APART * stride, s.d - e, s.d % 4 == 0 && stride % 4 == 0 && ls_is_four(x),
               exists, y);
    store_fours(me, pitch, y, to);
}

/* Which rows and slots of a tile a thread holds: rows ROW + 16 i, slots SLOT + 8 j. */
typedef ls_warp_grid<4> grid;
#define ROW grid::row_of_block()
#define SLOT grid::column()
/* Where features are made for slots: its slots, a few side by side, and the first of its four columns. */
#define MINE ls_warp_grid<2>::row_of_block()
#define COLUMN (4 * ls_warp_grid<2>::column())

/* Sum and maximum over the 8 threads that hold the same rows. */
__device__ static inline ls_real row_sum(ls_real x)
{
    return ls_warp_sum(x, grid::COLUMNS, grid::APART);
}
__device__ static inline ls_real row_max(ls_real x)
{
    return ls_warp_max(x, grid::COLUMNS, grid::APART);
}

/* The logits of a tile: constants are added, and beyond the last slot they are -inf. */
template <int SLOTS>
__device__ static inline void complete_logits(ls_slot_sizes s, const place &at, const ls_real *constant, int64_t slot,
                                              ls_real (&l)[4][SLOTS / 8])
{
    const int left = (int)(s.R - slot) - SLOT;
    constant += constant == NULL ? 0 : at.g * s.R + slot + SLOT;
#pragma unroll
    for (int j = 0; j < SLOTS / 8; j++) {
        const ls_real more = constant != NULL && 8 * j < left ? constant[8 * j] : 0;
#pragma unroll
        for (int i = 0; i < 4; i++) l[i][j] = 8 * j < left ? l[i][j] + more : -(ls_real)INFINITY;
    }
}

/* Their maxima join m, of the thread's rows; shrink: what e^m before is worth now. */
template <int SLOTS>
__device__ static inline void join_maxima(const ls_real (&l)[4][SLOTS / 8], ls_real (&m)[4], ls_real (&shrink)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ls_real top = m[i];
#pragma unroll
        for (int j = 0; j < SLOTS / 8; j++) top = l[i][j] > top ? l[i][j] : top;
        top = row_max(top); /* finite: there is at least one slot in every tile */
        shrink[i] = m[i] == top ? 1 : ls_exp(m[i] - top);
        m[i] = top;
    }
}
} // namespace ls_slot_tiles

#endif
