/* Keys write slots and queries read them; backward is slots_back.cu, tiles are those of slots_tiles.h. What needs all
 * slots (reading) goes on over their tiles with running maxima; what needs all keys (writing) sums a tile in ls_real
 * and tiles in double. */
#include "slots_tiles.h"

using namespace ls_slot_tiles;

enum {
    CHUNK = 32,        /* features of a product that makes logits; rows or slots of one that makes features */
    PITCH = CHUNK + 4, /* of its matrices, so that rows that are read by fours lie in different banks */
};

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

int64_t ls_slots_room(ls_slot_sizes s, int64_t rows, int backward)
{
    return splits_of(s, rows) * s.B * s.H * s.R * (backward ? 2 * s.d + 1 : s.d + 2);
}

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
        product_of_rows(CHUNK, a + ROW * PITCH, 16 * PITCH, b + SLOT * PITCH, 8 * PITCH, sum);
        for (int i = 0; norm != NULL && me < TILE && i < CHUNK; i += 4) {
            const ls_four x = ls_four_at(a + me * PITCH + i);
            for (int c = 0; c < 4; c++) square += x.v[c] * x.v[c];
        }
    }
    if (norm != NULL && me < TILE) norm[me] = square;
    __syncthreads();
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
                                                                   : l[i][j] - ls_multiply(half, norm[row]);
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
            product_of_columns(CHUNK, weight + k * PITCH_W + MINE * EACH, PITCH_W, a + COLUMN, WIDTH, sum);
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
    const int64_t slot_tiles = parts_of(s.R, 64), feature_tiles = parts_of(s.d, WIDTH);
    if (G == 0) return;
    LAUNCH_SLOTS(q, write_slots, s.R, G * splits * slot_tiles * feature_tiles, s, keys, slots, (ls_real)half, values,
                 splits, slot_tiles, feature_tiles, room);
    LS_LAUNCH(q, combine, (int)(G * s.R), LS_THREADS, 0, s, splits, (const double *)room, sent);
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
        complete_logits<SLOTS>(s, at, constant, slot, l);
        join_maxima<SLOTS>(l, m, shrink);
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
            product(STEP, weight + ROW * PITCH_W + k, 16 * PITCH_W, a + 4 * SLOT, WIDTH, x);
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
