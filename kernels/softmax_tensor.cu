/* Exact softmax attention with bfloat16 operands on tensor cores: what softmax.cu's three kernels of tiles do, for
 * calls with 32, 64, 96 or 128 features and no mask, dropout or weights, on a queue of precision bf16.
 *
 * How the work is divided. A block has 64 rows of the side that stays, each of its four warps 16 of them; tiles of 64
 * rows of the other side pass. Operands are rounded to bfloat16 where they enter shared memory; sums, m, l, δ,
 * exponentials and everything in device memory are floats.
 *
 * Scores never leave registers: what a thread has of the sums s = q kᵀ is, rounded, what it has to have of s as the
 * left factor of the next product, see cuda_mma.h. Backward it makes 32 columns of s and dp at a time, for which there
 * are registers beside the sums of the results.
 *
 * The emulator of the tests does what tensor cores do: there, as on a GPU, a test compares these kernels with their
 * plain twins in softmax.cu. */
#include "cuda.h"
#include "softmax_tiles.h"

#include <cuda_bf16.h>
#include <cuda_mma.h>

typedef __nv_bfloat16 narrow;

enum { PART = 16, EIGHTS = TILE / 8, HALF = TILE / 2, HALF_EIGHTS = HALF / 8 };

/* Rows of tiles in shared memory: 16 bytes more than the features, so that rows begin in different banks. */
template <int D> struct of_width {
    static const int ROW = D + 8, TILE_SIZE = TILE * ROW;
};

/* What a thread has of its warp's 16 rows, which begin at `first` of the tile: rows `row` and row + 8, and of every
 * eight columns the two from `column` on. Its four numbers of eight columns: two of the one row, two of the other. */
typedef struct spot {
    int first, row, column;
} spot;
__device__ static inline spot spot_of()
{
    const int lane = threadIdx.x % LS_WARP, first = PART * (threadIdx.x / LS_WARP);
    return {first, first + lane / 4, 2 * (lane % 4)};
}

/* Two factors as cuda_mma.h takes them. */
__device__ static inline uint32_t rounded(float x, float y)
{
    const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &two, sizeof bits);
    return bits;
}

/* to (64,ROW) = the rows of a tile; 0 where there are none, or a row is padded. A thread asks for up to eight pieces of
 * rows before it waits for the first of them; for more there are no registers. */
template <int D>
__device__ static inline void load(narrow *to, ls_view v, const place &x, const tile &t, const uint8_t *pad)
{
    const int fours = D / 4, each = TILE * fours / THREADS; /* of a row, of a thread */
    const int at_once = each <= 8 ? each : each / 2;
    const int64_t first = x.b * v.sb + x.h * v.sh + t.row * v.st;
#pragma unroll 1
    for (int from = (int)threadIdx.x; from < TILE * fours; from += at_once * THREADS) {
        float4 y[at_once];
        int exists[at_once];
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            const int r = (from + i * THREADS) / fours;
            exists[i] = r >= t.first && r < t.last;
        }
        if (pad != NULL)
#pragma unroll
            for (int i = 0; i < at_once; i++)
                exists[i] = exists[i] ? pad[t.row + (from + i * THREADS) / fours] == 0 : 0;
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            const int at = from + i * THREADS, r = at / fours, f = 4 * (at % fours);
            y[i] = exists[i] ? *(const float4 *)(v.p + (first + r * v.st + f)) : make_float4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < at_once; i++) {
            const int at = from + i * THREADS, r = at / fours, f = 4 * (at % fours);
            *(uint2 *)(to + r * of_width<D>::ROW + f) = make_uint2(rounded(y[i].x, y[i].y), rounded(y[i].z, y[i].w));
        }
    }
}

/* s (16, 8 N) = 16 rows of a times the transpose of 8 N rows of b. A row of b is a column of its transpose, and is read
 * as it lies: rows 0..7 and 8..15 of two eights, features 0..7 and 8..15 of each. */
template <int D, int N> __device__ static inline void multiply_features(const narrow *a, const narrow *b, float s[N][4])
{
    const int lane = threadIdx.x % LS_WARP;
    a += lane % 16 * of_width<D>::ROW + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * of_width<D>::ROW + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < N; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
    for (int f = 0; f < D; f += PART) {
        uint32_t x[4];
        ls_mma_load(x, a + f);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t y[4];
            ls_mma_load(y, b + 8 * n * of_width<D>::ROW + f);
            ls_mma(s[n], x, y[0], y[1]);
            ls_mma(s[n + 1], x, y[2], y[3]);
        }
    }
}

/* o (16,D) += s (16, 8 N), rounded, times 8 N rows of b: rows 0..7 and 8..15 of 16, two eights of features of each,
 * transposed. */
template <int D, int N>
__device__ static inline void multiply_rows(const float s[N][4], const narrow *b, float o[D / 8][4])
{
    const int lane = threadIdx.x % LS_WARP;
    b += lane % 16 * of_width<D>::ROW + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        const uint32_t x[4] = {rounded(s[j][0], s[j][1]), rounded(s[j][2], s[j][3]), rounded(s[j + 1][0], s[j + 1][1]),
                               rounded(s[j + 1][2], s[j + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t y[4];
            ls_mma_load_transposed(y, b + 8 * j * of_width<D>::ROW + 8 * n);
            ls_mma(o[n], x, y[0], y[1]);
            ls_mma(o[n + 1], x, y[2], y[3]);
        }
    }
}

/* A warp's 16 rows: v += scale · o. */
template <int D>
__device__ static inline void add_rows(ls_view v, const place &x, const spot &at, float scale, const float o[D / 8][4])
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half;
        if (r < x.t.first || r >= x.t.last) continue;
        float *to = ls_row(v, x.b, x.h, x.t.row + r) + at.column;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            float2 y = *(float2 *)(to + 8 * n);
            y.x += scale * o[n][2 * half], y.y += scale * o[n][2 * half + 1];
            *(float2 *)(to + 8 * n) = y;
        }
    }
}

/* Which keys of a tile exist and are not padded: a bit for each, 32 in a word. */
__device__ static inline void load_seen(uint32_t seen[2], const tile &t, const uint8_t *pad)
{
    const int r = threadIdx.x;
    if (r >= TILE) return; /* a whole warp */
    const uint32_t bits = __ballot_sync(0xffffffffu, r >= t.first && r < t.last && !ls_is_padded(pad, t.row + r));
    if (r % LS_WARP == 0) seen[r / LS_WARP] = bits;
}

/* The next tile of keys, with its values, when all are done with the last. */
template <int D>
__device__ static inline void load_keys(narrow *k, narrow *v, uint32_t seen[2], const softmax_call &p, const place &x,
                                        const tile &t, const uint8_t *pad)
{
    __syncthreads();
    load<D>(k, p.k, x, t, NULL);
    load<D>(v, p.v, x, t, NULL);
    load_seen(seen, t, pad);
    __syncthreads();
}

/* Key j of one tile is not after query i of another where j <= i + this. */
__device__ static inline int ahead_of(const softmax_call &p, const tile &queries, const tile &keys)
{
    return p.causal ? (int)ls_max(-TILE, ls_min(TILE, queries.at - keys.at)) : TILE;
}

/* m, 1 / l and δ of the queries of a tile; +inf and 0 where there are none, so that p = 0. */
struct alignas(8) statistics {
    float top[TILE], inverse[TILE], delta[TILE];
};
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

/* Scores of a tile become -inf where a key may not be seen. */
__device__ static inline void mask_scores(const uint32_t seen[2], int ahead, const spot &at, float s[EIGHTS][4])
{
    if ((seen[0] & seen[1]) == 0xffffffffu && TILE - 1 <= at.first + ahead) return; /* the warp's rows see all */
    const uint32_t bits[2] = {seen[0] >> at.column, seen[1] >> at.column};
#pragma unroll
    for (int n = 0; n < EIGHTS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int there = bits[8 * n / LS_WARP] >> (8 * n % LS_WARP + e % 2) & 1;
            const int past = 8 * n + at.column + e % 2 <= at.row + 8 * (e / 2) + ahead;
            s[n][e] = there && past ? s[n][e] : -INFINITY;
        }
}

template <int D> __global__ static void __launch_bounds__(THREADS) forward_kernel(softmax_call p)
{
    LS_SHARED(narrow, memory);
    __shared__ uint32_t seen[2];
    narrow *q = memory, *k = q + of_width<D>::TILE_SIZE, *v = k + of_width<D>::TILE_SIZE;
    const place x = place_of(p, p.query, p.queries, 1);
    const spot at = spot_of();
    const uint8_t *pad_k = pads_of(p.pad_k, x.b, p.n);
    float m[2], l[2], o[D / 8][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half, exists = r >= x.t.first && r < x.t.last;
        const int64_t row = x.head * p.T + x.t.row + r;
        m[half] = exists ? p.m[row] : -INFINITY;
        l[half] = exists && at.column == 0 ? p.l[row] : 0; /* the four threads of a row have parts of the sum */
        const float *from = exists ? ls_row(p.out, x.b, x.h, x.t.row + r) + at.column : NULL;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float2 y = exists ? *(const float2 *)(from + 8 * n) : make_float2(0, 0);
            o[n][2 * half] = y.x, o[n][2 * half + 1] = y.y;
        }
    }
    load<D>(q, p.q, x, x.t, pads_of(p.pad_q, x.b, p.T));
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t number = 0; number < tiles; number++) {
            const tile t = tile_in(p.key[span], number);
            load_keys<D>(k, v, seen, p, x, t, pad_k);
            float s[EIGHTS][4];
            multiply_features<D, EIGHTS>(q + at.first * of_width<D>::ROW, k, s);
            mask_scores(seen, ahead_of(p, x.t, t), at, s);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float here = -INFINITY, more = 0;
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) here = fmaxf(here, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
                here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 2));
                const float top = fmaxf(p.scale * here, m[half]), shrink = ls_statistics_weight(m[half], top);
#pragma unroll
                for (int n = 0; n < EIGHTS; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) {
                        s[n][e] = __expf(p.scale * s[n][e] - ls_statistics_top(top));
                        more += s[n][e];
                    }
                l[half] = l[half] * shrink + more;
                m[half] = top;
#pragma unroll
                for (int n = 0; n < D / 8; n++) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
            }
            multiply_rows<D, EIGHTS>(s, v, o);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half;
        const int64_t row = x.head * p.T + x.t.row + r;
        float sum = l[half] + __shfl_xor_sync(0xffffffffu, l[half], 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (r < x.t.first || r >= x.t.last) continue;
        if (at.column == 0) p.m[row] = m[half], p.l[row] = sum;
        float *to = ls_row(p.out, x.b, x.h, x.t.row + r) + at.column;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(float2 *)(to + 8 * n) = make_float2(o[n][2 * half], o[n][2 * half + 1]);
    }
}

/* ------------------------------------------------------------------------------------------------ backward */

/* dq += scale Σ_j ds k. As in the twin, 1 / l comes last, and what is rounded is ds l. */
template <int D> __global__ static void __launch_bounds__(THREADS) queries_backward_kernel(softmax_call p)
{
    LS_SHARED(narrow, memory);
    __shared__ uint32_t seen[2];
    narrow *q = memory, *dout = q + of_width<D>::TILE_SIZE, *k = dout + of_width<D>::TILE_SIZE;
    narrow *v = k + of_width<D>::TILE_SIZE;
    const place x = place_of(p, p.query, p.queries, 1);
    const spot at = spot_of();
    const uint8_t *pad_q = pads_of(p.pad_q, x.b, p.T), *pad_k = pads_of(p.pad_k, x.b, p.n);
    float top[2], delta[2], dq[D / 8][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half, exists = r >= x.t.first && r < x.t.last;
        const int64_t row = x.head * p.T + x.t.row + r;
        top[half] = exists ? p.top[row] : INFINITY;
        delta[half] = exists ? p.delta[row] : 0;
    }
    load<D>(q, p.q, x, x.t, pad_q);
    load<D>(dout, p.dout, x, x.t, pad_q);
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t number = 0; number < tiles; number++) {
            const tile t = tile_in(p.key[span], number);
            load_keys<D>(k, v, seen, p, x, t, pad_k);
            const int ahead = ahead_of(p, x.t, t);
#pragma unroll 1
            for (int j = 0; j < TILE; j += HALF) {
                float s[HALF_EIGHTS][4], dp[HALF_EIGHTS][4];
                multiply_features<D, HALF_EIGHTS>(q + at.first * of_width<D>::ROW, k + j * of_width<D>::ROW, s);
                multiply_features<D, HALF_EIGHTS>(dout + at.first * of_width<D>::ROW, v + j * of_width<D>::ROW, dp);
                const uint32_t bits = seen[j / HALF] >> at.column;
#pragma unroll
                for (int n = 0; n < HALF_EIGHTS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int there = bits >> (8 * n + e % 2) & 1;
                        const int past = j + 8 * n + at.column + e % 2 <= at.row + 8 * (e / 2) + ahead;
                        const float weight = __expf(p.scale * s[n][e] - top[e / 2]);
                        s[n][e] = there && past ? weight * (dp[n][e] - delta[e / 2]) : 0;
                    }
                multiply_rows<D, HALF_EIGHTS>(s, k + j * of_width<D>::ROW, dq);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half;
        const float inverse = r >= x.t.first && r < x.t.last ? p.inverse[x.head * p.T + x.t.row + r] : 0;
#pragma unroll
        for (int n = 0; n < D / 8; n++) dq[n][2 * half] *= inverse, dq[n][2 * half + 1] *= inverse;
    }
    add_rows<D>(p.dq, x, at, p.scale, dq);
}

/* dk += scale Σ_i ds q, dv += Σ_i p do. Rows of a tile are keys here, its columns queries. */
template <int D> __global__ static void __launch_bounds__(THREADS) keys_backward_kernel(softmax_call p)
{
    LS_SHARED(narrow, memory);
    __shared__ uint32_t seen[2];
    __shared__ statistics of;
    narrow *k = memory, *v = k + of_width<D>::TILE_SIZE, *q = v + of_width<D>::TILE_SIZE;
    narrow *dout = q + of_width<D>::TILE_SIZE;
    const place x = place_of(p, p.key, p.keys, 0);
    const spot at = spot_of();
    const uint8_t *pad_q = pads_of(p.pad_q, x.b, p.T);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    load<D>(k, p.k, x, x.t, NULL);
    load<D>(v, p.v, x, x.t, NULL);
    load_seen(seen, x.t, pads_of(p.pad_k, x.b, p.n));
    for (int span = 0; span < p.queries; span++) {
        const int64_t tiles = tiles_in(p.query[span]);
        for (int64_t number = tiles_from(p, p.query[span], x.t); number < tiles; number++) {
            const tile t = tile_in(p.query[span], number);
            __syncthreads();
            load<D>(q, p.q, x, t, pad_q);
            load<D>(dout, p.dout, x, t, pad_q);
            load_statistics(of, p, x, t);
            __syncthreads();
            const int ahead = ahead_of(p, t, x.t);
            const uint32_t bits = seen[at.row / LS_WARP] >> at.row % LS_WARP;
#pragma unroll 1
            for (int i = 0; i < TILE; i += HALF) {
                float s[HALF_EIGHTS][4], dp[HALF_EIGHTS][4];
                multiply_features<D, HALF_EIGHTS>(k + at.first * of_width<D>::ROW, q + i * of_width<D>::ROW, s);
                multiply_features<D, HALF_EIGHTS>(v + at.first * of_width<D>::ROW, dout + i * of_width<D>::ROW, dp);
#pragma unroll
                for (int n = 0; n < HALF_EIGHTS; n++) {
                    const int c = i + 8 * n + at.column;
                    const float2 top = *(const float2 *)(of.top + c), inverse = *(const float2 *)(of.inverse + c);
                    const float2 delta = *(const float2 *)(of.delta + c);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int there = bits >> 8 * (e / 2) & 1;
                        const int past = at.row + 8 * (e / 2) <= c + e % 2 + ahead;
                        const float weight = __expf(p.scale * s[n][e] - (e % 2 == 0 ? top.x : top.y));
                        s[n][e] = there && past ? (e % 2 == 0 ? inverse.x : inverse.y) * weight : 0;
                        dp[n][e] = s[n][e] * (dp[n][e] - (e % 2 == 0 ? delta.x : delta.y));
                    }
                }
                multiply_rows<D, HALF_EIGHTS>(s, dout + i * of_width<D>::ROW, dv);
                multiply_rows<D, HALF_EIGHTS>(dp, q + i * of_width<D>::ROW, dk);
            }
        }
    }
    add_rows<D>(p.dk, x, at, p.scale, dk);
    add_rows<D>(p.dv, x, at, 1, dv);
}

/* ------------------------------------------------------------------------------------------------ host */

static int suits(const ls_pass *p, const softmax_call &x)
{
    return p->queue->precision == LS_BF16 && !p->step && x.wide && p->d > 0 && p->d <= 128 && p->d % 32 == 0 &&
           x.attn_mask == NULL && x.dropout_mask == NULL && x.weights == NULL && !x.draws;
}

template <int D> static void forward(ls_pass *p, const softmax_call &x, int blocks)
{
    const size_t shared = 3u * of_width<D>::TILE_SIZE * sizeof(narrow);
    LS_LAUNCH(p->queue, forward_kernel<D>, blocks, THREADS, shared, x);
}

template <int D> static void backward(ls_pass *p, const softmax_call &x, int query_blocks, int key_blocks)
{
    const size_t shared = 4u * of_width<D>::TILE_SIZE * sizeof(narrow);
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
