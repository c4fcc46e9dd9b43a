/* How the work is divided: a block of 128 threads takes 64 rows of one (b,h) against a tile of 16, 32 or 64 slots. Of
 * their logits each thread holds 4 rows x 2, 4 or 8 slots in registers; features come through shared memory, 32 at a
 * time, and are read there by fours. What needs all slots (reading) goes on over their tiles with running maxima; what
 * needs all keys (writing, sums) is split over blocks, each of which goes over several tiles of rows, sums a tile in
 * ls_real and tiles in double, and leaves its part in `room`, from where a second kernel combines the parts in their
 * order.
 *
 * Rows of features wider than 64 are made 64 features to a block; the logits are then made by each of these blocks. */
#include "slots_cuda.h"

enum {
    TILE = 64,         /* rows */
    THREADS = 128,     /* of which 8 neighbours have the same rows */
    CHUNK = 32,        /* features of a product that makes logits; rows or slots of one that makes features */
    PITCH = CHUNK + 4, /* of its matrices, so that rows that are read by fours lie in different banks */
    WIDTH = 64,        /* features that a block makes */
    BLOCKS = 1024,     /* wanted where rows are split */
    MOST_SPLITS = 256,
};
static const int64_t AT_ONCE = (int64_t)1 << 25; /* reals of probabilities */

/* Starts kernel<SLOTS> for R slots. */
#define LAUNCH_SLOTS(q, kernel, R, blocks, ...)                                                                        \
    do {                                                                                                               \
        if ((R) <= 16)                                                                                                 \
            LS_LAUNCH(q, kernel<16>, (int)(blocks), THREADS, 0, __VA_ARGS__);                                          \
        else if ((R) <= 32)                                                                                            \
            LS_LAUNCH(q, kernel<32>, (int)(blocks), THREADS, 0, __VA_ARGS__);                                          \
        else                                                                                                           \
            LS_LAUNCH(q, kernel<64>, (int)(blocks), THREADS, 0, __VA_ARGS__);                                          \
    } while (0)

LS_BOTH_SIDES int64_t parts_of(int64_t n, int64_t size)
{
    return (n + size - 1) / size;
}

static int64_t tiles_of_slots(int64_t R)
{
    return R <= 16 ? 1 : R <= 32 ? 1 : parts_of(R, 64);
}

/* Into how many parts rows are split. */
static int64_t splits_of(ls_slot_sizes s, int64_t rows)
{
    const int64_t blocks = ls_max(1, s.B * s.H * tiles_of_slots(s.R) * parts_of(s.d, WIDTH));
    return ls_max(1, ls_min(ls_min(parts_of(rows, TILE), MOST_SPLITS), BLOCKS / blocks));
}

int64_t ls_slots_rows_at_once(ls_slot_sizes s, int64_t rows)
{
    const int64_t n = AT_ONCE / ls_max(1, s.B * s.H * s.R) / TILE * TILE;
    return ls_min(rows, ls_max(TILE, n));
}

int64_t ls_slots_room(ls_slot_sizes s, int64_t rows)
{
    return splits_of(s, rows) * s.B * s.H * s.R * (s.d + 2);
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* Where a block stands: its (b,h) = g, its first slot, feature and, of n parts of the rows, which. */
typedef struct place {
    int64_t g, b, h, slot, feature, part;
} place;

/* Blocks are numbered [g][part][tile of slots][tile of features]. */
__device__ static place place_of(ls_slot_sizes s, int64_t parts, int64_t slot_tiles, int slots, int64_t feature_tiles)
{
    const int64_t i = blockIdx.x, j = i / feature_tiles, k = j / slot_tiles, g = k / parts;
    return place{g, g / s.H, g % s.H, j % slot_tiles * slots, i % feature_tiles * WIDTH, k % parts};
}

/* sum[i][j] += Σ_k a_i[k] b_j[k], k < CHUNK: rows a_i lie a_each numbers apart, b_j b_each. */
template <int I, int J>
__device__ static inline void product_of_rows(const ls_real *a, int a_each, const ls_real *b, int b_each,
                                              ls_real (&sum)[I][J])
{
#pragma unroll 1
    for (int k = 0; k < CHUNK; k += 4) {
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

/* sum[i][j] += Σ_k a_k[i] b_k[j], k < n: rows a_k lie a_next numbers apart, b_k WIDTH. */
template <int I>
__device__ static inline void product_of_columns(int n, const ls_real *a, int a_next, const ls_real *b,
                                                 ls_real (&sum)[I][4])
{
#pragma unroll 2
    for (int k = 0; k < n; k++, a += a_next, b += WIDTH) {
        const ls_few<I> x = ls_few_at<I>(a);
        const ls_four y = ls_four_at(b);
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j] += x.v[i] * y.v[j];
    }
}

/* sum[i][j] += Σ_k a_i[k] b_k[j], k < n, a multiple of 4: rows a_i lie a_each numbers apart, b_k WIDTH; numbers 4 to 7
 * of a row b_k lie WIDTH / 2 behind the others. */
template <int I>
__device__ static inline void product(int n, const ls_real *a, int a_each, const ls_real *b, ls_real (&sum)[I][8])
{
    for (int k = 0; k < n; k += 4) {
        ls_four x[I];
#pragma unroll
        for (int i = 0; i < I; i++) x[i] = ls_four_at(a + i * a_each + k);
#pragma unroll
        for (int c = 0; c < 4; c++, b += WIDTH) {
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

/* sum = the products of 64 rows from t with a tile of slots. a (TILE,PITCH), b (SLOTS,PITCH): shared memory, which
 * nobody uses when the block comes here together. norm (TILE) gets |row|², NULL: not wanted. */
template <int SLOTS>
__device__ static void scores(ls_slot_sizes s, const ls_slot_rows &rows, const place &at, int64_t t, int64_t end,
                              const ls_real *slots, int64_t stride, int64_t slot, ls_real *a, ls_real *b, ls_real *norm,
                              ls_real (&sum)[4][SLOTS / 8])
{
    const int me = threadIdx.x;
    ls_real square = 0;
    clear(sum);
    for (int64_t e = 0; e < s.d; e += CHUNK) {
        __syncthreads();
        load_rows<TILE, CHUNK>(s, rows, at, t, end, e, PITCH, a);
        load_slots<SLOTS, CHUNK>(s, slots, stride, slot, e, PITCH, b);
        __syncthreads();
        product_of_rows(a + ROW * PITCH, 16 * PITCH, b + SLOT * PITCH, 8 * PITCH, sum);
        for (int i = 0; norm != NULL && me < TILE && i < CHUNK; i += 4) {
            const ls_four x = ls_four_at(a + me * PITCH + i);
            for (int c = 0; c < 4; c++) square += x.v[c] * x.v[c];
        }
    }
    if (norm != NULL && me < TILE) norm[me] = square;
    __syncthreads();
}

/* Sum and maximum over the 8 threads that hold the same rows. */
__device__ static inline ls_real row_sum(ls_real x)
{
    return ls_warp_sum(x, grid::COLUMNS, grid::APART);
}
__device__ static inline ls_real row_max(ls_real x)
{
    return ls_warp_max(x, grid::COLUMNS, grid::APART);
}

/* ------------------------------------------------------------------------------------------------ writing */

/* parts (B*H, splits, R, d+2): (m; s, x) of each part of the keys. */
template <int SLOTS>
static __global__ void write_slots(ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, ls_real half,
                                   ls_slot_rows values, int64_t splits, int64_t slot_tiles, int64_t feature_tiles,
                                   double *parts)
{
    constexpr int EACH = SLOTS / 8, SHARE = THREADS / SLOTS, PITCH_W = SLOTS + 4;
    __shared__ __align__(sizeof(ls_four)) ls_real a[TILE * PITCH], b[SLOTS * PITCH], weight[TILE * PITCH_W], norm[TILE],
        share[THREADS], top[SLOTS];
    __shared__ double maximum[SLOTS], total[SLOTS], shrink[SLOTS];
    const place at = place_of(s, splits, slot_tiles, SLOTS, feature_tiles);
    const int64_t tiles = parts_of(keys.n, TILE), last = tiles * (at.part + 1) / splits;
    const int me = threadIdx.x, column = me % SLOTS, first = me / SLOTS * (TILE / SHARE);
    double x[EACH][4];
    clear(x);
    if (me < SLOTS) maximum[me] = -INFINITY, total[me] = 0;
    for (int64_t tile = tiles * at.part / splits; tile < last; tile++) {
        const int64_t t = tile * TILE;
        ls_real l[4][EACH], sum[EACH][4], y = -INFINITY;
        scores<SLOTS>(s, keys, at, t, keys.n, slots + at.g * s.R * s.d, s.d, at.slot, a, b, half == 0 ? NULL : norm, l);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = ROW + 16 * i;
            const int hidden = t + row >= keys.n || ls_is_padded(keys.pad, at.b * keys.n + t + row);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                weight[row * PITCH_W + SLOT + 8 * j] = hidden      ? -(ls_real)INFINITY
                                                       : half == 0 ? l[i][j]
                                                                   : l[i][j] - half * norm[row];
        }
        __syncthreads();
        /* the maxima after these rows; 0 where there still is no key, since e^(-inf - 0) is 0 */
        for (int i = first; i < first + TILE / SHARE; i++) {
            const ls_real z = weight[i * PITCH_W + column];
            y = z > y ? z : y;
        }
        share[me] = y;
        __syncthreads();
        if (me < SLOTS) {
            double m = maximum[me];
            for (int i = 0; i < SHARE; i++) m = (double)share[i * SLOTS + me] > m ? (double)share[i * SLOTS + me] : m;
            shrink[me] = m == maximum[me] ? 1 : exp(maximum[me] - m);
            maximum[me] = m;
            top[me] = m == -INFINITY ? 0 : (ls_real)m;
        }
        __syncthreads();
        y = 0;
        for (int i = first; i < first + TILE / SHARE; i++) {
            const ls_real e = ls_exp(weight[i * PITCH_W + column] - top[column]);
            weight[i * PITCH_W + column] = e;
            y += e;
        }
        share[me] = y;
        clear(sum);
        for (int k = 0; k < TILE; k += CHUNK) {
            __syncthreads();
            load_rows<CHUNK, WIDTH>(s, values, at, t + k, values.n, at.feature, WIDTH, a);
            __syncthreads();
            product_of_columns(CHUNK, weight + k * PITCH_W + MINE * EACH, PITCH_W, a + COLUMN, sum);
        }
        if (me < SLOTS) {
            double z = 0;
            for (int i = 0; i < SHARE; i++) z += (double)share[i * SLOTS + me];
            total[me] = total[me] * shrink[me] + z;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] = x[i][j] * shrink[MINE * EACH + i] + (double)sum[i][j];
    }
    double *to = parts + (at.g * splits + at.part) * s.R * (s.d + 2);
    if (me < SLOTS && at.slot + me < s.R && at.feature == 0) {
        to[(at.slot + me) * (s.d + 2)] = maximum[me];
        to[(at.slot + me) * (s.d + 2) + 1] = total[me];
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t slot = at.slot + MINE * EACH + i, e = at.feature + COLUMN + j;
            if (slot < s.R && e < s.d) to[slot * (s.d + 2) + 2 + e] = x[i][j];
        }
}

/* One block for each slot of each (b,h): its parts, brought to their common maximum. A part's weight is made once, and
 * its numbers are added by groups of WIDTH threads, each of which has some of the parts. */
static __global__ void combine(ls_slot_sizes s, int64_t splits, const double *parts, ls_real *sent)
{
    __shared__ double weight[MOST_SPLITS], share[LS_THREADS], scratch[LS_WARP];
    const int me = (int)threadIdx.x, group = me / WIDTH, lane = me % WIDTH, n = (int)splits;
    const int64_t g = blockIdx.x / s.R, r = blockIdx.x % s.R, stride = s.d + 2, next = s.R * stride;
    const double *from = parts + (g * splits * s.R + r) * stride;
    double m = -INFINITY, total = 0;
    for (int i = me; i < n; i += LS_THREADS) m = from[i * next] > m ? from[i * next] : m;
    m = ls_block_max(m, scratch);
    for (int i = me; i < n; i += LS_THREADS) {
        weight[i] = from[i * next] == -INFINITY ? 0 : exp(from[i * next] - m);
        total += weight[i] * from[i * next + 1];
    }
    total = ls_block_sum(total, scratch); /* all weights are there, too */
    if (me == 0) sent[blockIdx.x * stride] = (ls_real)m, sent[blockIdx.x * stride + 1] = (ls_real)total;
    for (int64_t e = lane; e - lane < s.d; e += WIDTH) {
        double sum = 0;
#pragma unroll 4
        for (int i = group; i < n; i += LS_THREADS / WIDTH) sum += e < s.d ? weight[i] * from[i * next + 2 + e] : 0;
        share[me] = sum;
        __syncthreads();
        for (int i = 1; group == 0 && i < LS_THREADS / WIDTH; i++) sum += share[me + i * WIDTH];
        if (group == 0 && e < s.d) sent[blockIdx.x * stride + 2 + e] = (ls_real)sum;
        __syncthreads();
    }
}

void ls_slots_write_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                         ls_slot_rows values, double *room, ls_real *sent)
{
    const int64_t G = s.B * s.H, splits = splits_of(s, keys.n);
    const int64_t slot_tiles = tiles_of_slots(s.R), feature_tiles = parts_of(s.d, WIDTH);
    if (G == 0) return;
    LAUNCH_SLOTS(q, write_slots, s.R, G * splits * slot_tiles * feature_tiles, s, keys, slots, (ls_real)half, values,
                 splits, slot_tiles, feature_tiles, room);
    LS_LAUNCH(q, combine, (int)(G * s.R), LS_THREADS, 0, s, splits, (const double *)room, sent);
}

/* For keys [t, t + n), a tile of rows and a tile of slots to a block:
 * e = e^(l - m), dlogits = e (constant_r + (v - c)·dx_r) */
template <int SLOTS>
static __global__ void write_gradients(ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, ls_real half,
                                       ls_slot_rows values, const ls_real *sent, const ls_real *dsent,
                                       const ls_real *constant, int64_t t0, int64_t n, int64_t slot_tiles, ls_real *e,
                                       ls_real *dlogits)
{
    constexpr int EACH = SLOTS / 8;
    __shared__ __align__(sizeof(ls_four)) ls_real a[TILE * PITCH], b[SLOTS * PITCH], norm[TILE];
    const place at = place_of(s, parts_of(n, TILE), slot_tiles, SLOTS, 1);
    const int64_t first = at.part * TILE, t = t0 + first, stride = s.d + 2, elements = at.g * s.R * stride;
    ls_real l[4][EACH], de[4][EACH];
    scores<SLOTS>(s, keys, at, t, t0 + n, slots + at.g * s.R * s.d, s.d, at.slot, a, b, half == 0 ? NULL : norm, l);
    scores<SLOTS>(s, values, at, t, t0 + n, dsent + elements + 2, stride, at.slot, a, b, NULL, de);
    const int slots_left = (int)(s.R - at.slot) - SLOT;
    ls_real m[EACH], owed[EACH]; /* of the thread's slots; m: -inf only where all keys here are padded */
    sent += elements + (at.slot + SLOT) * stride, constant += at.g * s.R + at.slot + SLOT;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        m[j] = 8 * j < slots_left ? sent[8 * j * stride] : 0;
        owed[j] = 8 * j < slots_left ? constant[8 * j] : 0;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = ROW + 16 * i;
        if (first + row >= n) continue;
        const int hidden = ls_is_padded(keys.pad, at.b * keys.n + t + row);
        const ls_real length = half == 0 ? 0 : half * norm[row];
        const int64_t to = (at.g * n + first + row) * s.R + at.slot + SLOT;
        ls_real *of_e = e + to, *of_dlogits = dlogits + to;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            if (8 * j >= slots_left) continue;
            const ls_real y = hidden ? 0 : ls_exp(l[i][j] - length - m[j]);
            of_e[8 * j] = y;
            of_dlogits[8 * j] = y * (owed[j] + de[i][j]);
        }
    }
}

void ls_slots_write_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                                  ls_slot_rows values, const ls_real *sent, const ls_real *dsent,
                                  const ls_real *constant, int64_t t, int64_t n, ls_real *e, ls_real *dlogits)
{
    const int64_t slot_tiles = tiles_of_slots(s.R), blocks = s.B * s.H * parts_of(n, TILE) * slot_tiles;
    if (blocks == 0) return;
    LAUNCH_SLOTS(q, write_gradients, s.R, blocks, s, keys, slots, (ls_real)half, values, sent, dsent, constant, t, n,
                 slot_tiles, e, dlogits);
}

/* ------------------------------------------------------------------------------------------------ what was written */

static __global__ void make_values(ls_slot_sizes s, const ls_real *element, const ls_real *reference, double *values)
{
    LS_EACH(i, s.B * s.H * s.R * s.d)
    {
        const int64_t slot = i / s.d, e = i % s.d;
        const ls_real *x = element + slot * (s.d + 2);
        const double y = x[1] > 0 ? (double)x[2 + e] / (double)x[1] : 0;
        values[i] = reference == NULL ? y : y + (double)reference[slot / s.R * s.d + e];
    }
}

void ls_slots_values_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *element, const ls_real *reference,
                          double *values)
{
    const int64_t n = s.B * s.H * s.R * s.d;
    LS_LAUNCH(q, make_values, ls_blocks(n, LS_THREADS), LS_THREADS, 0, s, element, reference, values);
}

/* A block has 32 features of a (b,h), its warps take rows in turn: what it begins with, and the mean of a feature. */
typedef struct strip {
    int64_t g, e;
    int warp;
} strip;
__device__ static inline strip strip_of(int64_t d)
{
    const int64_t tiles = parts_of(d, LS_WARP);
    return strip{blockIdx.x / tiles, blockIdx.x % tiles * LS_WARP + threadIdx.x % LS_WARP, (int)threadIdx.x / LS_WARP};
}
enum { WARPS = LS_THREADS / LS_WARP };
__device__ static inline double mean_of(ls_slot_sizes s, strip at, const double *x)
{
    __shared__ double part[LS_THREADS];
    double sum = 0;
    for (int64_t r = at.warp; at.e < s.d && r < s.R; r += WARPS) sum += x[(at.g * s.R + r) * s.d + at.e];
    part[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < WARPS; i++) sum += part[i * LS_WARP + threadIdx.x % LS_WARP];
    return sum / (double)s.R;
}

static __global__ void make_mean(ls_slot_sizes s, const double *x, double *mean)
{
    const strip at = strip_of(s.d);
    const double y = mean_of(s, at, x);
    if (at.warp == 0 && at.e < s.d) mean[at.g * s.d + at.e] = y;
}

void ls_slots_mean_cuda(ls_queue *q, ls_slot_sizes s, const double *x, double *mean)
{
    if (s.B * s.H == 0) return;
    LS_LAUNCH(q, make_mean, (int)(s.B * s.H * parts_of(s.d, LS_WARP)), LS_THREADS, 0, s, x, mean);
}

static __global__ void centre_rows(ls_slot_sizes s, double scale, const double *x, ls_real *centred, ls_real *rounded,
                                   int add)
{
    const strip at = strip_of(s.d);
    const double mean = mean_of(s, at, x);
    if (at.e >= s.d) return;
    for (int64_t r = at.warp; centred != NULL && r < s.R; r += WARPS) {
        const int64_t i = (at.g * s.R + r) * s.d + at.e;
        centred[i] = (ls_real)(scale * (x[i] - mean));
    }
    ls_real *to = rounded + at.g * s.d + at.e;
    if (rounded != NULL && at.warp == 0) *to = (add ? *to : 0) + (ls_real)mean;
}

void ls_slots_centre_cuda(ls_queue *q, ls_slot_sizes s, double scale, const double *x, ls_real *centred,
                          ls_real *rounded, int add)
{
    if (s.B * s.H == 0) return;
    LS_LAUNCH(q, centre_rows, (int)(s.B * s.H * parts_of(s.d, LS_WARP)), LS_THREADS, 0, s, scale, x, centred, rounded,
              add);
}

static __global__ void scale_and_round(int64_t n, double scale, const double *x, ls_real *y)
{
    LS_EACH(i, n) y[i] = (ls_real)(scale * x[i]);
}

void ls_slots_round_cuda(ls_queue *q, int64_t n, double scale, const double *x, ls_real *y)
{
    LS_LAUNCH(q, scale_and_round, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, scale, x, y);
}

/* c, which comes as the reference, moves by the mean of values; by: how much it did, as rounded. */
static __global__ void move_centre(ls_slot_sizes s, const double *values, double *by, ls_real *c)
{
    const strip at = strip_of(s.d);
    const double mean = mean_of(s, at, values);
    if (at.warp > 0 || at.e >= s.d) return;
    const int64_t i = at.g * s.d + at.e;
    const ls_real reference = c[i];
    c[i] = (ls_real)((double)reference + mean);
    by[i] = (double)c[i] - (double)reference;
}

/* One warp for each slot of each (b,h): constant = ds' + dx·(c - V) */
static __global__ void make_constants(ls_slot_sizes s, const ls_real *dsent, const double *values, const double *mean,
                                      ls_real *constant)
{
    const int64_t slots = s.B * s.H * s.R, warps = (int64_t)gridDim.x * blockDim.x / LS_WARP;
    const int lane = threadIdx.x % LS_WARP;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LS_WARP; i < slots; i += warps) {
        const ls_real *from = dsent + i * (s.d + 2);
        double sum = 0;
        for (int64_t e = lane; e < s.d; e += LS_WARP)
            sum += (double)from[2 + e] * (mean[i / s.R * s.d + e] - values[i * s.d + e]);
        sum = ls_warp_sum(sum);
        if (lane == 0) constant[i] = (ls_real)((double)from[1] + sum);
    }
}

void ls_slots_constants_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *got, const ls_real *dsent, double *values,
                             double *mean, ls_real *c, ls_real *constant)
{
    const int64_t G = s.B * s.H;
    if (G == 0) return;
    ls_slots_values_cuda(q, s, got, NULL, values);
    LS_LAUNCH(q, move_centre, (int)(G * parts_of(s.d, LS_WARP)), LS_THREADS, 0, s, (const double *)values, mean, c);
    LS_LAUNCH(q, make_constants, ls_blocks(G * s.R * LS_WARP, LS_THREADS), LS_THREADS, 0, s, dsent,
              (const double *)values, (const double *)mean, constant);
}

/* ------------------------------------------------------------------------------------------------ reading */

/* The logits of a tile, -inf beyond the last slot, with their maxima joined to m: returns in shrink what e^m before is
 * worth now. */
template <int SLOTS>
__device__ static void read_logits(ls_slot_sizes s, const place &at, const ls_real *constant, int64_t slot,
                                   ls_real (&l)[4][SLOTS / 8], ls_real (&m)[4], ls_real (&shrink)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ls_real top = m[i];
#pragma unroll
        for (int j = 0; j < SLOTS / 8; j++) {
            const int64_t r = slot + SLOT + 8 * j;
            if (r >= s.R)
                l[i][j] = -INFINITY;
            else if (constant != NULL)
                l[i][j] += constant[at.g * s.R + r];
            top = l[i][j] > top ? l[i][j] : top;
        }
        top = row_max(top); /* finite: there is at least one slot in every tile */
        shrink[i] = m[i] == top ? 1 : ls_exp(m[i] - top);
        m[i] = top;
    }
}

template <int SLOTS>
static __global__ void read_slots(ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots, const ls_real *constant,
                                  const ls_real *values, const ls_real *centre, ls_view out, int fours,
                                  int64_t feature_tiles)
{
    constexpr int EACH = SLOTS / 8, PITCH_W = SLOTS + 4, STEP = SLOTS < CHUNK ? SLOTS : CHUNK;
    __shared__ __align__(sizeof(ls_four)) ls_real a[TILE * PITCH], b[SLOTS * PITCH], weight[TILE * PITCH_W];
    const place at = place_of(s, parts_of(queries.n, TILE), 1, SLOTS, feature_tiles);
    const int64_t t = at.part * TILE;
    ls_real l[4][EACH], x[4][8], m[4], sum[4], shrink[4];
    clear(x);
#pragma unroll
    for (int i = 0; i < 4; i++) m[i] = -INFINITY, sum[i] = 0;
    for (int64_t slot = 0; slot < s.R; slot += SLOTS) {
        scores<SLOTS>(s, queries, at, t, queries.n, slots + at.g * s.R * s.d, s.d, slot, a, b, NULL, l);
        read_logits<SLOTS>(s, at, constant, slot, l, m, shrink);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            ls_real here = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const ls_real e = ls_exp(l[i][j] - m[i]);
                weight[(ROW + 16 * i) * PITCH_W + SLOT + 8 * j] = e;
                here += e;
            }
            sum[i] = sum[i] * shrink[i] + row_sum(here);
#pragma unroll
            for (int j = 0; j < 8; j++) x[i][j] *= shrink[i];
        }
        for (int k = 0; k < SLOTS; k += STEP) {
            __syncthreads();
            load_slots<STEP, WIDTH>(s, values + at.g * s.R * s.d, s.d, slot + k, at.feature, WIDTH, a);
            __syncthreads();
            product(STEP, weight + ROW * PITCH_W + k, 16 * PITCH_W, a + 4 * SLOT, x);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) { /* of the thread's columns: four side by side */
        const int64_t e = at.feature + half * (WIDTH / 2) + 4 * SLOT;
        const int left = (int)(s.d - e);
        const ls_four middle = ls_read_some<4>(centre + at.g * s.d + e, left, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t row = t + ROW + 16 * i;
            if (row >= queries.n || left <= 0) continue;
            const int padded = ls_is_padded(queries.pad, at.b * queries.n + row);
            const ls_real inverse = 1 / sum[i];
            ls_real *to = ls_row(out, at.b, at.h, row) + e;
            ls_four y;
#pragma unroll
            for (int k = 0; k < 4; k++) y.v[k] = padded ? 0 : middle.v[k] + x[i][4 * half + k] * inverse;
            ls_write_some<4>(y, to, left, fours);
        }
    }
}

void ls_slots_read_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                        const ls_real *constant, const ls_real *values, const ls_real *centre, ls_view out)
{
    const int64_t feature_tiles = parts_of(s.d, WIDTH), blocks = s.B * s.H * parts_of(queries.n, TILE) * feature_tiles;
    if (blocks == 0) return;
    LAUNCH_SLOTS(q, read_slots, s.R, blocks, s, queries, slots, constant, values, centre, out,
                 ls_rows_are_fours(out, s.d), feature_tiles);
}

/* For queries [t, t + n), 64 to a block: first the logits and dp = do·(V - c) of all tiles of slots, with the sums of
 * e^(l - m) and of e^(l - m) dp, then, each thread from what it wrote itself, p and p (dp - Σ p dp). */
template <int SLOTS>
static __global__ void read_gradients(ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                                      const ls_real *constant, const ls_real *values, ls_slot_rows dout, int64_t t0,
                                      int64_t n, ls_real *p, ls_real *dlogits)
{
    constexpr int EACH = SLOTS / 8;
    __shared__ __align__(sizeof(ls_four)) ls_real a[TILE * PITCH], b[SLOTS * PITCH];
    const place at = place_of(s, parts_of(n, TILE), 1, SLOTS, 1);
    const int64_t first = at.part * TILE, t = t0 + first, matrix = at.g * s.R * s.d;
    ls_real l[4][EACH], dp[4][EACH], m[4], sum[4], mean[4], shrink[4];
#pragma unroll
    for (int i = 0; i < 4; i++) m[i] = -INFINITY, sum[i] = mean[i] = 0;
    for (int64_t slot = 0; slot < s.R; slot += SLOTS) {
        scores<SLOTS>(s, queries, at, t, t0 + n, slots + matrix, s.d, slot, a, b, NULL, l);
        scores<SLOTS>(s, dout, at, t, t0 + n, values + matrix, s.d, slot, a, b, NULL, dp);
        read_logits<SLOTS>(s, at, constant, slot, l, m, shrink);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            ls_real here = 0, product_here = 0;
            const int64_t row = first + ROW + 16 * i, to = (at.g * n + row) * s.R + slot + SLOT;
            const int left = row < n ? (int)(s.R - slot) - SLOT : 0;
            ls_real *of_p = p + to, *of_dlogits = dlogits + to;
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                const ls_real e = ls_exp(l[i][j] - m[i]);
                here += e;
                product_here += e * dp[i][j];
                if (8 * j < left) of_p[8 * j] = l[i][j], of_dlogits[8 * j] = dp[i][j];
            }
            sum[i] = sum[i] * shrink[i] + row_sum(here);
            mean[i] = mean[i] * shrink[i] + row_sum(product_here);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t row = first + ROW + 16 * i, to = (at.g * n + row) * s.R;
        const ls_real inverse = 1 / sum[i], delta = mean[i] * inverse;
        for (int64_t r = SLOT; row < n && r < s.R; r += 8) {
            const ls_real y = ls_exp(p[to + r] - m[i]) * inverse;
            p[to + r] = y;
            dlogits[to + r] = y * (dlogits[to + r] - delta);
        }
    }
}

void ls_slots_read_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                                 const ls_real *constant, const ls_real *values, ls_slot_rows dout, int64_t t,
                                 int64_t n, ls_real *p, ls_real *dlogits)
{
    const int64_t blocks = s.B * s.H * parts_of(n, TILE);
    if (blocks == 0) return;
    LAUNCH_SLOTS(q, read_gradients, s.R, blocks, s, queries, slots, constant, values, dout, t, n, p, dlogits);
}

/* ------------------------------------------------------------------------------------------------ sums over rows */

/* parts (splits, B*H, R, d), then columns (splits, B*H, R). */
template <int SLOTS>
static __global__ void sum_rows(ls_slot_sizes s, const ls_real *matrix, ls_slot_rows rows, int64_t t0, int64_t n,
                                int64_t splits, int64_t slot_tiles, int64_t feature_tiles, double *parts,
                                double *columns)
{
    constexpr int EACH = SLOTS / 8, PITCH_W = SLOTS + 4;
    __shared__ __align__(sizeof(ls_four)) ls_real a[CHUNK * WIDTH], weight[TILE * PITCH_W];
    const place at = place_of(s, splits, slot_tiles, SLOTS, feature_tiles);
    const int64_t tiles = parts_of(n, TILE), last = tiles * (at.part + 1) / splits, G = s.B * s.H;
    const int me = threadIdx.x;
    double x[EACH][4], column = 0;
    clear(x);
    for (int64_t tile = tiles * at.part / splits; tile < last; tile++) {
        const int64_t t = tile * TILE;
        ls_real sum[EACH][4];
        clear(sum);
        for (int k = 0; k < TILE; k += CHUNK) {
            __syncthreads();
            for (int i = me; i < CHUNK * SLOTS; i += THREADS) {
                const int64_t row = t + k + i / SLOTS, slot = at.slot + i % SLOTS;
                weight[(k + i / SLOTS) * PITCH_W + i % SLOTS] =
                    row < n && slot < s.R ? matrix[(at.g * n + row) * s.R + slot] : 0;
            }
            load_rows<CHUNK, WIDTH>(s, rows, at, t0 + t + k, t0 + n, at.feature, WIDTH, a);
            __syncthreads();
            product_of_columns(CHUNK, weight + k * PITCH_W + MINE * EACH, PITCH_W, a + COLUMN, sum);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) x[i][j] += (double)sum[i][j];
        for (int i = 0; columns != NULL && me < SLOTS && i < TILE; i++) column += (double)weight[i * PITCH_W + me];
    }
    const int64_t to = (at.part * G + at.g) * s.R + at.slot;
    if (columns != NULL && me < SLOTS && at.slot + me < s.R && at.feature == 0) columns[to + me] = column;
#pragma unroll
    for (int i = 0; i < EACH; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t slot = MINE * EACH + i, e = at.feature + COLUMN + j;
            if (at.slot + slot < s.R && e < s.d) parts[(to + slot) * s.d + e] = x[i][j];
        }
}

/* A warp's lanes have neighbouring numbers, the warps of a block the parts in turn. */
static __global__ void add_parts(int64_t n, int64_t splits, const double *parts, double *total, int add)
{
    __shared__ double share[LS_THREADS];
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    for (int64_t first = (int64_t)blockIdx.x * LS_WARP; first < n; first += (int64_t)gridDim.x * LS_WARP) {
        const int64_t i = first + lane;
        double sum = 0;
#pragma unroll 4
        for (int64_t part = warp; part < splits; part += WARPS) sum += i < n ? parts[part * n + i] : 0;
        share[threadIdx.x] = sum;
        __syncthreads();
        if (warp == 0 && i < n) {
            for (int j = 1; j < WARPS; j++) sum += share[j * LS_WARP + lane];
            total[i] = add ? total[i] + sum : sum;
        }
        __syncthreads();
    }
}

void ls_slots_sum_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *a, ls_slot_rows x, int64_t t, int64_t n,
                       double *room, double *total, double *columns, int add)
{
    const int64_t G = s.B * s.H, splits = splits_of(s, n), slots = G * s.R;
    const int64_t slot_tiles = tiles_of_slots(s.R), feature_tiles = parts_of(s.d, WIDTH);
    double *sums = room + splits * slots * s.d;
    if (G == 0) return;
    LAUNCH_SLOTS(q, sum_rows, s.R, G * splits * slot_tiles * feature_tiles, s, a, x, t, n, splits, slot_tiles,
                 feature_tiles, room, columns == NULL ? NULL : sums);
    LS_LAUNCH(q, add_parts, ls_blocks(slots * s.d, LS_WARP), LS_THREADS, 0, slots * s.d, splits, (const double *)room,
              total, add);
    if (columns == NULL) return;
    LS_LAUNCH(q, add_parts, ls_blocks(slots, LS_WARP), LS_THREADS, 0, slots, splits, (const double *)sums, columns,
              add);
}
