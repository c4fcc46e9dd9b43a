/* Exact softmax attention with bfloat16 operands on tensor cores: what softmax.cu's three kernels of tiles do, for
 * calls with 32, 64, 96 or 128 features and no mask, dropout or weights, on a queue of precision bf16.
 *
 * How the work is divided. A block has 64 rows of the side that stays, each of its four warps 16 of them; tiles of 64
 * rows of the other side pass. Operands are rounded to bfloat16 where they enter shared memory; sums, m, l, δ,
 * exponentials and everything in device memory are floats.
 *
 * Which element of a matrix a thread holds of a fragment is found out with a matrix whose elements are their own
 * numbers, see spots: so masks and exponentials are applied where the sums are.
 *
 * Tensor cores for bfloat16 exist from compute capability 8.0 on, and not in the emulator of the tests: there the plain
 * twin in softmax.cu runs in every case, and is what the emulated tests cover. On a GPU a test compares the two. */
#include "cuda.h"
#include "softmax_tiles.h"

#include <cuda_bf16.h>
#include <mma.h>

namespace wmma = nvcuda::wmma;
typedef __nv_bfloat16 narrow;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums;
typedef wmma::fragment<wmma::matrix_a, 16, 16, 16, narrow, wmma::row_major> left;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, narrow, wmma::row_major> right;
typedef wmma::fragment<wmma::matrix_b, 16, 16, 16, narrow, wmma::col_major> right_transposed;

static const int PART = 16, PARTS = TILE / PART, SPOTS = 8, FACTOR_ROW = TILE + 8, SCORE_ROW = TILE + 8;

/* Rows of tiles in shared memory: 16 bytes more than the features, so that rows begin in different banks. */
template <int D> struct of_width {
    static const int ROW = D + 8, TILE_SIZE = TILE * ROW, PARTS_WIDE = D / PART;
};

extern __shared__ __align__(128) unsigned char tensor_memory[];

/* The row and the column of each element that this thread has of any 16×16 fragment of sums. room: 256 floats. */
typedef struct spots {
    int row[SPOTS], column[SPOTS];
} spots;
__device__ static inline spots find_spots(float *room)
{
    for (int i = threadIdx.x; i < PART * PART; i += THREADS) room[i] = (float)i;
    __syncthreads();
    sums numbers;
    static_assert(sums::num_elements == SPOTS, "a warp holds 256 sums");
    wmma::load_matrix_sync(numbers, room, PART, wmma::mem_row_major);
    spots s;
    for (int e = 0; e < SPOTS; e++) s.row[e] = (int)numbers.x[e] / PART, s.column[e] = (int)numbers.x[e] % PART;
    __syncthreads();
    return s;
}

/* to (64,ROW) = the rows of a tile; 0 where there are none, or a row is padded. */
template <int D>
__device__ static inline void load(narrow *to, const softmax_call &p, ls_view v, const place &x, const tile &t,
                                   const uint8_t *pad)
{
    for (int i = threadIdx.x; i < TILE * D / 4; i += THREADS) {
        const int r = i / (D / 4), f = 4 * (i % (D / 4));
        float4 y = make_float4(0, 0, 0, 0);
        if (r >= t.first && r < t.last && !ls_is_padded(pad, t.row + r))
            y = *(const float4 *)(ls_row(v, x.b, x.h, t.row + r) + f);
        __nv_bfloat162 *at = (__nv_bfloat162 *)(to + r * of_width<D>::ROW + f);
        at[0] = __floats2bfloat162_rn(y.x, y.y), at[1] = __floats2bfloat162_rn(y.z, y.w);
    }
}

/* s[n] = 16 rows of a times the transpose of 16 rows of b, for the four parts of a tile b. */
template <int D> __device__ static inline void multiply_features(const narrow *a, const narrow *b, sums s[PARTS])
{
    for (int n = 0; n < PARTS; n++) wmma::fill_fragment(s[n], 0);
#pragma unroll
    for (int f = 0; f < D; f += PART) {
        left x;
        wmma::load_matrix_sync(x, a + f, of_width<D>::ROW);
#pragma unroll
        for (int n = 0; n < PARTS; n++) {
            right_transposed y;
            wmma::load_matrix_sync(y, b + n * PART * of_width<D>::ROW + f, of_width<D>::ROW);
            wmma::mma_sync(s[n], x, y, s[n]);
        }
    }
}

/* o[n] += 16 rows of factors (16,64) times a tile b, for each 16 of its features. */
template <int D>
__device__ static inline void multiply_rows(const narrow *factors, int row, const narrow *b,
                                            sums o[of_width<D>::PARTS_WIDE])
{
#pragma unroll
    for (int j = 0; j < PARTS; j++) {
        left x;
        wmma::load_matrix_sync(x, factors + j * PART, row);
#pragma unroll
        for (int n = 0; n < of_width<D>::PARTS_WIDE; n++) {
            right y;
            wmma::load_matrix_sync(y, b + j * PART * of_width<D>::ROW + n * PART, of_width<D>::ROW);
            wmma::mma_sync(o[n], x, y, o[n]);
        }
    }
}

/* Rows r0 .. r0 + 15 of a block's tile: v += scale · o. */
template <int D>
__device__ static inline void add_rows(ls_view v, const place &x, const spots &at, int r0, float scale,
                                       const sums o[of_width<D>::PARTS_WIDE])
{
#pragma unroll
    for (int n = 0; n < of_width<D>::PARTS_WIDE; n++)
#pragma unroll
        for (int e = 0; e < SPOTS; e++) {
            const int r = r0 + at.row[e];
            if (r >= x.t.first && r < x.t.last)
                ls_row(v, x.b, x.h, x.t.row + r)[n * PART + at.column[e]] += scale * o[n].x[e];
        }
}

/* Which keys of a tile exist and are not padded, one for each. */
__device__ static inline void load_seen(uint8_t *seen, const tile &t, const uint8_t *pad)
{
    const int r = threadIdx.x;
    if (r < TILE) seen[r] = r >= t.first && r < t.last && !ls_is_padded(pad, t.row + r);
}

struct statistics {
    float top[TILE], inverse[TILE], delta[TILE];
};

/* m, 1 / l and δ of the queries of a tile; +inf and 0 where there are none, so that p = 0. */
__device__ static inline void load_statistics(statistics &to, const softmax_call &p, const place &x, const tile &t)
{
    const int r = threadIdx.x;
    if (r >= TILE) return;
    const int exists = r >= t.first && r < t.last;
    const int64_t row = x.head * p.T + t.row + r;
    to.top[r] = exists ? p.top[row] : INFINITY;
    to.inverse[r] = exists ? p.inverse[row] : 0;
    to.delta[r] = exists ? p.delta[row] : 0;
}

__device__ static inline const uint8_t *pads_of(const uint8_t *pad, int64_t b, int64_t n)
{
    return pad != NULL ? pad + b * n : NULL;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* Two lanes have a row: of every eight columns, four each. */
template <int D> __global__ static void __launch_bounds__(THREADS) forward_kernel(softmax_call p)
{
    __shared__ uint8_t seen[TILE];
    __shared__ float shrinks[TILE];
    narrow *q = (narrow *)tensor_memory, *k = q + of_width<D>::TILE_SIZE, *v = k + of_width<D>::TILE_SIZE;
    float *scores = (float *)(v + of_width<D>::TILE_SIZE); /* (64,SCORE_ROW); then p, in the first half of each row */
    const place x = place_of(p, p.query, p.queries, 1);
    const int lane = threadIdx.x % LS_WARP, r0 = PART * (threadIdx.x / LS_WARP), r = r0 + lane / 2, half = lane % 2;
    const int exists = r >= x.t.first && r < x.t.last;
    const int64_t row = x.head * p.T + x.t.row + r;
    const uint8_t *pad_k = pads_of(p.pad_k, x.b, p.n);
    const spots at = find_spots(scores);
    float m = exists ? p.m[row] : -INFINITY, l = exists ? p.l[row] : 0;
    sums o[of_width<D>::PARTS_WIDE];
#pragma unroll
    for (int n = 0; n < of_width<D>::PARTS_WIDE; n++)
#pragma unroll
        for (int e = 0; e < SPOTS; e++) {
            const int i = r0 + at.row[e];
            const int there = i >= x.t.first && i < x.t.last;
            o[n].x[e] = there ? ls_row(p.out, x.b, x.h, x.t.row + i)[n * PART + at.column[e]] : 0;
        }
    load<D>(q, p, p.q, x, x.t, pads_of(p.pad_q, x.b, p.T));
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t number = 0; number < tiles; number++) {
            const tile t = tile_in(p.key[span], number);
            __syncthreads();
            load<D>(k, p, p.k, x, t, NULL);
            load<D>(v, p, p.v, x, t, NULL);
            load_seen(seen, t, pad_k);
            __syncthreads();
            sums s[PARTS];
            multiply_features<D>(q + r0 * of_width<D>::ROW, k, s);
            for (int n = 0; n < PARTS; n++)
                wmma::store_matrix_sync(scores + r0 * SCORE_ROW + n * PART, s[n], SCORE_ROW, wmma::mem_row_major);
            __syncwarp();
            float y[TILE / 2], here = -INFINITY, more = 0;
#pragma unroll
            for (int c = 0; c < TILE / 2; c++) {
                const int j = c / 4 * 8 + 4 * half + c % 4;
                const int visible = seen[j] && (!p.causal || t.at + j <= x.t.at + r);
                y[c] = visible ? p.scale * scores[r * SCORE_ROW + j] : -INFINITY;
                here = fmaxf(here, y[c]);
            }
            here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
            const float top = fmaxf(here, m), shrink = ls_statistics_weight(m, top);
            __syncwarp(); /* both lanes have read the row */
            narrow *factors = (narrow *)(scores + r * SCORE_ROW);
#pragma unroll
            for (int c = 0; c < TILE / 2; c += 2) {
                const float a = __expf(y[c] - ls_statistics_top(top)), b = __expf(y[c + 1] - ls_statistics_top(top));
                *(__nv_bfloat162 *)(factors + c / 4 * 8 + 4 * half + c % 4) = __floats2bfloat162_rn(a, b);
                more += a + b;
            }
            more += __shfl_xor_sync(0xffffffffu, more, 1);
            l = l * shrink + more;
            m = top;
            if (half == 0) shrinks[r] = shrink;
            __syncwarp();
#pragma unroll
            for (int n = 0; n < of_width<D>::PARTS_WIDE; n++)
#pragma unroll
                for (int e = 0; e < SPOTS; e++) o[n].x[e] *= shrinks[r0 + at.row[e]];
            multiply_rows<D>((const narrow *)(scores + r0 * SCORE_ROW), 2 * SCORE_ROW, v, o);
        }
    }
    if (exists && half == 0) p.m[row] = m, p.l[row] = l;
#pragma unroll
    for (int n = 0; n < of_width<D>::PARTS_WIDE; n++)
#pragma unroll
        for (int e = 0; e < SPOTS; e++) {
            const int i = r0 + at.row[e];
            if (i >= x.t.first && i < x.t.last)
                ls_row(p.out, x.b, x.h, x.t.row + i)[n * PART + at.column[e]] = o[n].x[e];
        }
}

/* ------------------------------------------------------------------------------------------------ backward */

/* dq += scale Σ_j ds k */
template <int D> __global__ static void __launch_bounds__(THREADS) queries_backward_kernel(softmax_call p)
{
    __shared__ uint8_t seen[TILE];
    __shared__ statistics of;
    narrow *q = (narrow *)tensor_memory, *dout = q + of_width<D>::TILE_SIZE, *k = dout + of_width<D>::TILE_SIZE;
    narrow *v = k + of_width<D>::TILE_SIZE, *gradients = v + of_width<D>::TILE_SIZE; /* (64,FACTOR_ROW) */
    const place x = place_of(p, p.query, p.queries, 1);
    const int r0 = PART * (threadIdx.x / LS_WARP);
    const uint8_t *pad_q = pads_of(p.pad_q, x.b, p.T), *pad_k = pads_of(p.pad_k, x.b, p.n);
    const spots at = find_spots((float *)gradients);
    load<D>(q, p, p.q, x, x.t, pad_q);
    load<D>(dout, p, p.dout, x, x.t, pad_q);
    load_statistics(of, p, x, x.t);
    sums dq[of_width<D>::PARTS_WIDE];
    for (int n = 0; n < of_width<D>::PARTS_WIDE; n++) wmma::fill_fragment(dq[n], 0);
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t number = 0; number < tiles; number++) {
            const tile t = tile_in(p.key[span], number);
            __syncthreads();
            load<D>(k, p, p.k, x, t, NULL);
            load<D>(v, p, p.v, x, t, NULL);
            load_seen(seen, t, pad_k);
            __syncthreads();
            sums s[PARTS], dp[PARTS];
            multiply_features<D>(q + r0 * of_width<D>::ROW, k, s);
            multiply_features<D>(dout + r0 * of_width<D>::ROW, v, dp);
#pragma unroll
            for (int n = 0; n < PARTS; n++)
#pragma unroll
                for (int e = 0; e < SPOTS; e++) {
                    const int i = r0 + at.row[e], j = n * PART + at.column[e];
                    const int visible = seen[j] && (!p.causal || t.at + j <= x.t.at + i);
                    const float prob = visible ? of.inverse[i] * __expf(p.scale * s[n].x[e] - of.top[i]) : 0;
                    gradients[i * FACTOR_ROW + j] = __float2bfloat16(prob * (dp[n].x[e] - of.delta[i]));
                }
            __syncwarp();
            multiply_rows<D>(gradients + r0 * FACTOR_ROW, FACTOR_ROW, k, dq);
        }
    }
    add_rows<D>(p.dq, x, at, r0, p.scale, dq);
}

/* dk += scale Σ_i ds q, dv += Σ_i p do. Rows of a tile are keys here, its columns queries. */
template <int D> __global__ static void __launch_bounds__(THREADS) keys_backward_kernel(softmax_call p)
{
    __shared__ uint8_t seen[TILE];
    __shared__ statistics of;
    narrow *k = (narrow *)tensor_memory, *v = k + of_width<D>::TILE_SIZE, *q = v + of_width<D>::TILE_SIZE;
    narrow *dout = q + of_width<D>::TILE_SIZE, *factors = dout + of_width<D>::TILE_SIZE; /* (64,FACTOR_ROW) */
    const place x = place_of(p, p.key, p.keys, 0);
    const int r0 = PART * (threadIdx.x / LS_WARP);
    const uint8_t *pad_q = pads_of(p.pad_q, x.b, p.T);
    const spots at = find_spots((float *)factors);
    load<D>(k, p, p.k, x, x.t, NULL);
    load<D>(v, p, p.v, x, x.t, NULL);
    load_seen(seen, x.t, pads_of(p.pad_k, x.b, p.n));
    sums dk[of_width<D>::PARTS_WIDE], dv[of_width<D>::PARTS_WIDE];
    for (int n = 0; n < of_width<D>::PARTS_WIDE; n++) wmma::fill_fragment(dk[n], 0), wmma::fill_fragment(dv[n], 0);
    for (int span = 0; span < p.queries; span++) {
        const int64_t tiles = tiles_in(p.query[span]);
        for (int64_t number = tiles_from(p, p.query[span], x.t); number < tiles; number++) {
            const tile t = tile_in(p.query[span], number);
            __syncthreads();
            load<D>(q, p, p.q, x, t, pad_q);
            load<D>(dout, p, p.dout, x, t, pad_q);
            load_statistics(of, p, x, t);
            __syncthreads();
            sums s[PARTS], dp[PARTS];
            multiply_features<D>(k + r0 * of_width<D>::ROW, q, s);
            multiply_features<D>(v + r0 * of_width<D>::ROW, dout, dp);
#pragma unroll
            for (int n = 0; n < PARTS; n++)
#pragma unroll
                for (int e = 0; e < SPOTS; e++) {
                    const int j = r0 + at.row[e], i = n * PART + at.column[e];
                    const int visible = seen[j] && (!p.causal || x.t.at + j <= t.at + i);
                    const float prob = visible ? of.inverse[i] * __expf(p.scale * s[n].x[e] - of.top[i]) : 0;
                    dp[n].x[e] = prob * (dp[n].x[e] - of.delta[i]);
                    factors[j * FACTOR_ROW + i] = __float2bfloat16(prob);
                }
            __syncwarp();
            multiply_rows<D>(factors + r0 * FACTOR_ROW, FACTOR_ROW, dout, dv);
            __syncwarp(); /* all have read p; ds takes its place */
#pragma unroll
            for (int n = 0; n < PARTS; n++)
#pragma unroll
                for (int e = 0; e < SPOTS; e++)
                    factors[(r0 + at.row[e]) * FACTOR_ROW + n * PART + at.column[e]] = __float2bfloat16(dp[n].x[e]);
            __syncwarp();
            multiply_rows<D>(factors + r0 * FACTOR_ROW, FACTOR_ROW, q, dk);
        }
    }
    add_rows<D>(p.dk, x, at, r0, p.scale, dk);
    add_rows<D>(p.dv, x, at, r0, 1, dv);
}

/* ------------------------------------------------------------------------------------------------ host */

static int suits(const ls_pass *p, const softmax_call &x)
{
    return p->queue->precision == LS_BF16 && !p->step && x.wide && p->d > 0 && p->d <= 128 && p->d % 32 == 0 &&
           x.attn_mask == NULL && x.dropout_mask == NULL && x.weights == NULL && !x.draws;
}

template <int D> static void forward(ls_pass *p, const softmax_call &x, int blocks)
{
    const size_t shared = 3u * of_width<D>::TILE_SIZE * sizeof(narrow) + TILE * SCORE_ROW * sizeof(float);
    LS_LAUNCH(p->queue, forward_kernel<D>, blocks, THREADS, shared, x);
}

template <int D> static void backward(ls_pass *p, const softmax_call &x, int query_blocks, int key_blocks)
{
    const size_t shared = (4 * of_width<D>::TILE_SIZE + TILE * FACTOR_ROW) * sizeof(narrow);
    LS_LAUNCH(p->queue, queries_backward_kernel<D>, query_blocks, THREADS, shared, x);
    LS_LAUNCH(p->queue, keys_backward_kernel<D>, key_blocks, THREADS, shared, x);
}

int ls_softmax_tensor_forward(ls_pass *p, const softmax_call *x, int blocks)
{
    if (!suits(p, *x)) return 0;
    void (*const by_width[])(ls_pass *, const softmax_call &, int) = {forward<32>, forward<64>, forward<96>,
                                                                      forward<128>};
    by_width[p->d / 32 - 1](p, *x, blocks);
    return 1;
}

int ls_softmax_tensor_backward(ls_pass *p, const softmax_call *x, int query_blocks, int key_blocks)
{
    if (!suits(p, *x)) return 0;
    void (*const by_width[])(ls_pass *, const softmax_call &, int, int) = {backward<32>, backward<64>, backward<96>,
                                                                           backward<128>};
    by_width[p->d / 32 - 1](p, *x, query_blocks, key_blocks);
    return 1;
}
