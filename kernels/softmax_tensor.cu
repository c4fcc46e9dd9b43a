/* Exact softmax attention with bfloat16 operands on tensor cores: what softmax.cu's three kernels of tiles do, for
 * calls with 32, 64, 96 or 128 features and no mask, dropout or weights, on a queue of precision bf16.
 *
 * How the work is divided. First q, k, v (and do) are copied to bfloat16, head by head: they are read many times. A
 * block then has 128 rows of the side that stays, each of its eight warps 16 of them; tiles of 64 rows of the other
 * side pass, the next on its way to shared memory while one is worked on. Sums, m, l, δ, exponentials and everything
 * else in device memory are floats.
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
#include <cuda_copy.h>
#include <cuda_mma.h>

typedef __nv_bfloat16 bf16;

/* SIDE: rows that stay. */
enum {
    PART = 16,
    SIDE = 128,
    WORKERS = SIDE / PART * LS_WARP,
    EIGHTS = TILE / 8,
    HALF = TILE / 2,
    HALF_EIGHTS = HALF / 8
};
enum { PIECE = 8 }; /* numbers that are copied at a time, 16 bytes */

/* Rows of tiles in shared memory: 16 bytes more than the features, so that rows begin in different banks. */
template <int D> struct of_width {
    static const int ROW = D + 8, STAYS = SIDE * ROW, PASSES = TILE * ROW;
};

/* A call, and its rows in bfloat16: (B,H,T,d) and (B,H,n,d), 0 where a query is padded. */
struct tensor_call : softmax_call {
    bf16 *q16, *dout16, *k16, *v16;
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
/* Whether any of the warp's rows exist. */
__device__ static inline bool has_rows(const spot &at, const tile &t)
{
    return at.first < t.last && at.first + PART > t.first;
}

/* Two factors as cuda_mma.h takes them. */
__device__ static inline uint32_t rounded(float x, float y)
{
    const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    uint32_t bits;
    memcpy(&bits, &two, sizeof bits);
    return bits;
}

/* ------------------------------------------------------------------------------------------------ copies */

struct copy_list {
    struct {
        ls_view from;
        const uint8_t *pad;
        int64_t n;
        bf16 *to;
    } x[4];
};

/* to (B,H,n,d) = from, rounded; rows that are padded are 0, and may have held anything. blockIdx.y: which. */
__global__ static void narrow_kernel(copy_list list, int64_t B, int64_t H, int64_t d)
{
    const auto x = list.x[blockIdx.y];
    const int64_t pieces = d / PIECE;
    LS_EACH(i, B * H * x.n * pieces)
    {
        const int64_t row = i / pieces % x.n, head = i / pieces / x.n, b = head / H;
        float4 y[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
        if (!ls_is_padded(x.pad, b * x.n + row)) {
            const float4 *from = (const float4 *)(ls_row(x.from, b, head % H, row) + i % pieces * PIECE);
            y[0] = from[0], y[1] = from[1];
        }
        ((uint4 *)x.to)[i] = make_uint4(rounded(y[0].x, y[0].y), rounded(y[0].z, y[0].w), rounded(y[1].x, y[1].y),
                                        rounded(y[1].z, y[1].w));
    }
}

/* The first row of a head, in one of the copies of n rows. */
template <int D> __device__ static inline const bf16 *head_of(const bf16 *copy, const place &x, int64_t n)
{
    return copy + x.head * n * D;
}

/* Asks for ROWS rows of a tile, those that exist; the others become 0. */
template <int D, int ROWS> __device__ static inline void ask(bf16 *to, const bf16 *head, const tile &t)
{
    const int pieces = D / PIECE;
#pragma unroll
    for (int i = (int)threadIdx.x; i < ROWS * pieces; i += WORKERS) {
        const int r = i / pieces, f = i % pieces * PIECE;
        const bool exists = r >= t.first && r < t.last;
        ls_copy<16>(to + r * of_width<D>::ROW + f, exists ? head + (t.row + r) * D + f : head, exists);
    }
}

/* s (16, 8 N) = 16 rows of a times the transpose of 8 N rows of b. A row of b is a column of its transpose, and is read
 * as it lies: rows 0..7 and 8..15 of two eights, features 0..7 and 8..15 of each. */
template <int D, int N> __device__ static inline void multiply_features(const bf16 *a, const bf16 *b, float s[N][4])
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
__device__ static inline void multiply_rows(const float s[N][4], const bf16 *b, float o[D / 8][4])
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

/* Which keys of a tile exist and are not padded: a bit for each, 32 in a word. The first two warps ask; they tell when
 * there is time to wait for the answer. */
__device__ static inline bool is_seen(const tile &t, const uint8_t *pad)
{
    const int r = threadIdx.x;
    return r < TILE && r >= t.first && r < t.last && !ls_is_padded(pad, t.row + r);
}
__device__ static inline void tell_seen(uint32_t seen[], bool mine, int keys)
{
    if ((int)threadIdx.x >= keys) return; /* a whole warp */
    const uint32_t bits = __ballot_sync(0xffffffffu, mine);
    if (threadIdx.x % LS_WARP == 0) seen[threadIdx.x / LS_WARP] = bits;
}

/* Key j of one tile is not after query i of another where j <= i + this. */
__device__ static inline int ahead_of(const softmax_call &p, const tile &queries, const tile &keys)
{
    return p.causal ? (int)ls_max(-SIDE, ls_min(SIDE, queries.at - keys.at)) : SIDE;
}

__device__ static inline const uint8_t *pads_of(const uint8_t *pad, int64_t b, int64_t n)
{
    return pad != NULL ? pad + b * n : NULL;
}

/* The tiles that pass, span after span: `first` of a span up to `end`. */
typedef struct walk {
    int span;
    int64_t number, end;
} walk;

/* The next tile of keys that queries see; false: there is none. */
__device__ static inline bool next_keys(const softmax_call &p, const tile &queries, walk *w, tile *t)
{
    while (w->span < p.keys && w->number >= w->end) {
        w->span++, w->number = 0;
        w->end = w->span < p.keys ? tiles_before(p, p.key[w->span], queries) : 0;
    }
    if (w->span >= p.keys) return false;
    *t = tile_in(p.key[w->span], w->number++);
    return true;
}
__device__ static inline walk first_keys(const softmax_call &p, const tile &queries)
{
    return {0, 0, tiles_before(p, p.key[0], queries)};
}

/* The next tile of queries that see keys. */
__device__ static inline bool next_queries(const softmax_call &p, const tile &keys, walk *w, tile *t)
{
    while (w->span < p.queries && w->number >= w->end) {
        w->span++;
        w->number = w->span < p.queries ? tiles_from(p, p.query[w->span], keys) : 0;
        w->end = w->span < p.queries ? tiles_in(p.query[w->span]) : 0;
    }
    if (w->span >= p.queries) return false;
    *t = tile_in(p.query[w->span], w->number++);
    return true;
}
__device__ static inline walk first_queries(const softmax_call &p, const tile &keys)
{
    return {0, tiles_from(p, p.query[0], keys), tiles_in(p.query[0])};
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

/* A warp's rows meet 64 keys: m, l, o of what was seen before become those of all. */
template <int D>
__device__ static inline void meet_keys(const softmax_call &p, const bf16 *q, const bf16 *k, const bf16 *v,
                                        const uint32_t seen[2], int ahead, const spot &at, float m[2], float l[2],
                                        float o[D / 8][4])
{
    float s[EIGHTS][4];
    multiply_features<D, EIGHTS>(q + at.first * of_width<D>::ROW, k, s);
    mask_scores(seen, ahead, at, s);
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

template <int D> __global__ static void __launch_bounds__(WORKERS, D <= 64 ? 2 : 1) forward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[2][2];
    bf16 *q = memory, *k = q + of_width<D>::STAYS, *v = k + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.query, p.queries, 1);
    const spot at = spot_of();
    const bool busy = has_rows(at, x.t);
    const uint8_t *pad_k = pads_of(p.pad_k, x.b, p.n);
    const bf16 *all_k = head_of<D>(p.k16, x, p.n), *all_v = head_of<D>(p.v16, x, p.n);
    walk w = first_keys(p, x.t);
    tile next, now;
    bool more = next_keys(p, x.t, &w, &next);
    ask<D, SIDE>(q, head_of<D>(p.q16, x, p.T), x.t);
    if (more) {
        ask<D, TILE>(k, all_k, next), ask<D, TILE>(v, all_v, next);
        tell_seen(seen[0], is_seen(next, pad_k), TILE);
    }
    ls_copy_close();
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
    for (int stage = 0; more; stage ^= 1) {
        now = next;
        more = next_keys(p, x.t, &w, &next);
        bool mine = false;
        if (more) {
            const int to = (stage ^ 1) * of_width<D>::PASSES;
            ask<D, TILE>(k + to, all_k, next), ask<D, TILE>(v + to, all_v, next);
            mine = is_seen(next, pad_k);
        }
        ls_copy_close();
        ls_copy_wait<1>(); /* for all but the next tile */
        __syncthreads();
        const int ahead = ahead_of(p, x.t, now), from = stage * of_width<D>::PASSES;
        if (busy && at.first + PART - 1 + ahead >= 0)
            meet_keys<D>(p, q, k + from, v + from, seen[stage], ahead, at, m, l, o);
        if (more) tell_seen(seen[stage ^ 1], mine, TILE);
        __syncthreads(); /* the next copies go where these keys are */
    }
    ls_copy_wait<0>();
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

/* dq += ds k of 64 keys, but for 1 / l and the scale. */
template <int D>
__device__ static inline void meet_keys_backward(const softmax_call &p, const bf16 *q, const bf16 *dout, const bf16 *k,
                                                 const bf16 *v, const uint32_t seen[2], int ahead, const spot &at,
                                                 const float top[2], const float delta[2], float dq[D / 8][4])
{
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

/* dq += scale Σ_j ds k. As in the twin, 1 / l comes last, and what is rounded is ds l. */
template <int D>
__global__ static void __launch_bounds__(WORKERS, D <= 64 ? 2 : 1) queries_backward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[2][2];
    bf16 *q = memory, *dout = q + of_width<D>::STAYS, *k = dout + of_width<D>::STAYS;
    bf16 *v = k + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.query, p.queries, 1);
    const spot at = spot_of();
    const bool busy = has_rows(at, x.t);
    const uint8_t *pad_k = pads_of(p.pad_k, x.b, p.n);
    const bf16 *all_k = head_of<D>(p.k16, x, p.n), *all_v = head_of<D>(p.v16, x, p.n);
    walk w = first_keys(p, x.t);
    tile next, now;
    bool more = next_keys(p, x.t, &w, &next);
    ask<D, SIDE>(q, head_of<D>(p.q16, x, p.T), x.t), ask<D, SIDE>(dout, head_of<D>(p.dout16, x, p.T), x.t);
    if (more) {
        ask<D, TILE>(k, all_k, next), ask<D, TILE>(v, all_v, next);
        tell_seen(seen[0], is_seen(next, pad_k), TILE);
    }
    ls_copy_close();
    float top[2], delta[2], dq[D / 8][4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half, exists = r >= x.t.first && r < x.t.last;
        const int64_t row = x.head * p.T + x.t.row + r;
        top[half] = exists ? p.top[row] : INFINITY;
        delta[half] = exists ? p.delta[row] : 0;
    }
    for (int stage = 0; more; stage ^= 1) {
        now = next;
        more = next_keys(p, x.t, &w, &next);
        bool mine = false;
        if (more) {
            const int to = (stage ^ 1) * of_width<D>::PASSES;
            ask<D, TILE>(k + to, all_k, next), ask<D, TILE>(v + to, all_v, next);
            mine = is_seen(next, pad_k);
        }
        ls_copy_close();
        ls_copy_wait<1>();
        __syncthreads();
        const int ahead = ahead_of(p, x.t, now), from = stage * of_width<D>::PASSES;
        if (busy && at.first + PART - 1 + ahead >= 0)
            meet_keys_backward<D>(p, q, dout, k + from, v + from, seen[stage], ahead, at, top, delta, dq);
        if (more) tell_seen(seen[stage ^ 1], mine, TILE);
        __syncthreads();
    }
    ls_copy_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = at.row + 8 * half;
        const float inverse = r >= x.t.first && r < x.t.last ? p.inverse[x.head * p.T + x.t.row + r] : 0;
#pragma unroll
        for (int n = 0; n < D / 8; n++) dq[n][2 * half] *= inverse, dq[n][2 * half + 1] *= inverse;
    }
    add_rows<D>(p.dq, x, at, p.scale, dq);
}

/* m, 1 / l and δ of the queries of a tile; 0 where there are none, so that p = 0. */
struct alignas(8) statistics {
    float top[TILE], inverse[TILE], delta[TILE];
};
__device__ static inline void ask_statistics(statistics &to, const softmax_call &p, const place &x, const tile &t)
{
    const int r = threadIdx.x;
    if (r >= TILE) return;
    const bool exists = r >= t.first && r < t.last;
    const int64_t row = exists ? x.head * p.T + t.row + r : 0;
    ls_copy<4>(to.top + r, p.top + row, exists);
    ls_copy<4>(to.inverse + r, p.inverse + row, exists);
    ls_copy<4>(to.delta + r, p.delta + row, exists);
}

/* dk += ds q and dv += p do of 64 queries, but for the scale. Rows of a tile are keys here, its columns queries. */
template <int D>
__device__ static inline void meet_queries(const softmax_call &p, const bf16 *k, const bf16 *v, const bf16 *q,
                                           const bf16 *dout, const statistics &of, const uint32_t seen[], int ahead,
                                           const spot &at, float dk[D / 8][4], float dv[D / 8][4])
{
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

template <int D> __global__ static void __launch_bounds__(WORKERS, D <= 64 ? 2 : 1) keys_backward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[SIDE / LS_WARP];
    __shared__ statistics of[2];
    bf16 *k = memory, *v = k + of_width<D>::STAYS, *q = v + of_width<D>::STAYS;
    bf16 *dout = q + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.key, p.keys, 0);
    const spot at = spot_of();
    const bool busy = has_rows(at, x.t);
    const bf16 *all_q = head_of<D>(p.q16, x, p.T), *all_dout = head_of<D>(p.dout16, x, p.T);
    walk w = first_queries(p, x.t);
    tile next, now;
    bool more = next_queries(p, x.t, &w, &next);
    ask<D, SIDE>(k, head_of<D>(p.k16, x, p.n), x.t), ask<D, SIDE>(v, head_of<D>(p.v16, x, p.n), x.t);
    if (more) {
        ask<D, TILE>(q, all_q, next), ask<D, TILE>(dout, all_dout, next);
        ask_statistics(of[0], p, x, next);
    }
    ls_copy_close();
    const uint8_t *pad_k = pads_of(p.pad_k, x.b, p.n);
    const int mine = threadIdx.x;
    tell_seen(seen, mine >= x.t.first && mine < x.t.last && !ls_is_padded(pad_k, x.t.row + mine), SIDE);
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    for (int stage = 0; more; stage ^= 1) {
        now = next;
        more = next_queries(p, x.t, &w, &next);
        if (more) {
            const int to = (stage ^ 1) * of_width<D>::PASSES;
            ask<D, TILE>(q + to, all_q, next), ask<D, TILE>(dout + to, all_dout, next);
            ask_statistics(of[stage ^ 1], p, x, next);
        }
        ls_copy_close();
        ls_copy_wait<1>();
        __syncthreads();
        const int ahead = ahead_of(p, now, x.t), from = stage * of_width<D>::PASSES;
        if (busy && at.first <= TILE - 1 + ahead)
            meet_queries<D>(p, k, v, q + from, dout + from, of[stage], seen, ahead, at, dk, dv);
        __syncthreads();
    }
    ls_copy_wait<0>();
    add_rows<D>(p.dk, x, at, p.scale, dk);
    add_rows<D>(p.dv, x, at, 1, dv);
}

/* ------------------------------------------------------------------------------------------------ host */

static int suits_width(const ls_pass *p)
{
    return p->queue->precision == LS_BF16 && !p->step && p->d > 0 && p->d <= 128 && p->d % 32 == 0;
}

static int suits(const ls_pass *p, const softmax_call &x)
{
    return suits_width(p) && x.wide && x.attn_mask == NULL && x.dropout_mask == NULL && x.weights == NULL && !x.draws;
}

int64_t ls_softmax_tensor_reals(const ls_pass *p)
{
    const int64_t rows = p->T * (p->backward ? 2 : 1) + 2 * p->visit.n;
    return suits_width(p) ? p->B * p->H * rows * p->d / 2 : 0; /* two to a real */
}

/* Fills `copies`, and tells the kernels where what lies. */
static tensor_call copy_rows(ls_pass *p, const softmax_call &call, ls_real *copies)
{
    tensor_call x;
    static_cast<softmax_call &>(x) = call;
    const int64_t heads = p->B * p->H, of_queries = heads * x.T * x.d, of_keys = heads * x.n * x.d;
    x.k16 = reinterpret_cast<bf16 *>(copies), x.v16 = x.k16 + of_keys;
    x.q16 = x.v16 + of_keys, x.dout16 = x.q16 + of_queries;
    copy_list list = {};
    list.x[0] = {x.k, NULL, x.n, x.k16}; /* padded keys are 0 since they visit */
    list.x[1] = {x.v, NULL, x.n, x.v16};
    list.x[2] = {x.q, x.pad_q, x.T, x.q16};
    list.x[3] = {x.dout, x.pad_q, x.T, x.dout16};
    const dim3 blocks((unsigned)ls_blocks(ls_max(of_queries, of_keys) / PIECE, LS_THREADS), p->backward ? 4 : 3);
    LS_LAUNCH(p->queue, narrow_kernel, blocks, LS_THREADS, 0, list, x.B, x.H, x.d);
    return x;
}

static int blocks_of(const ls_pass *p, const ls_span *span, int spans)
{
    return (int)(tiles_of<SIDE>(span, spans) * p->B * p->H);
}

template <int D> static void forward(ls_pass *p, const tensor_call &x)
{
    const size_t shared = (of_width<D>::STAYS + 4u * of_width<D>::PASSES) * sizeof(bf16);
    LS_LAUNCH(p->queue, forward_kernel<D>, blocks_of(p, x.query, x.queries), WORKERS, shared, x);
}

template <int D> static void backward(ls_pass *p, const tensor_call &x)
{
    const size_t shared = (2u * of_width<D>::STAYS + 4u * of_width<D>::PASSES) * sizeof(bf16);
    LS_LAUNCH(p->queue, queries_backward_kernel<D>, blocks_of(p, x.query, x.queries), WORKERS, shared, x);
    LS_LAUNCH(p->queue, keys_backward_kernel<D>, blocks_of(p, x.key, x.keys), WORKERS, shared, x);
}

int ls_softmax_tensor_forward(ls_pass *p, const softmax_call *x, ls_real *copies)
{
    if (!suits(p, *x)) return 0;
    void (*const by_width[])(ls_pass *, const tensor_call &) = {forward<32>, forward<64>, forward<96>, forward<128>};
    by_width[p->d / 32 - 1](p, copy_rows(p, *x, copies));
    return 1;
}

int ls_softmax_tensor_backward(ls_pass *p, const softmax_call *x, ls_real *copies)
{
    if (!suits(p, *x)) return 0;
    void (*const by_width[])(ls_pass *, const tensor_call &) = {backward<32>, backward<64>, backward<96>,
                                                                backward<128>};
    by_width[p->d / 32 - 1](p, copy_rows(p, *x, copies));
    return 1;
}
