/* Exact softmax attention with bfloat16 operands on tensor cores: what softmax.cu's three kernels of tiles do, for
 * calls without masks or weights whose heads have 8, 16, ... or 128 features, on a queue of precision bf16.
 * Kernels are made for 32, 64, 96 and 128 (D): other heads are as if zeros followed.
 *
 * How the work is divided. First q, k, v (and do) are copied to bfloat16, head by head: they are read many times. A
 * block then has 128 rows of the side that stays, each of its warps 16 of them or, where it has registers for their
 * sums, 32: then what it reads of shared memory serves twice as many products. Tiles of 64 rows of the other side pass,
 * the next on its way to shared memory while one is worked on. Sums, m, l, δ, exponentials and everything else in
 * device memory are floats.
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

/* SIDE: rows that stay; PART: rows of one matrix instruction. */
enum { PART = 16, SIDE = 128, EIGHTS = TILE / 8, HALF = TILE / 2, HALF_EIGHTS = HALF / 8 };
enum { PIECE = 8 };                   /* numbers that are copied at a time, 16 bytes */
constexpr float LOG2_E = 1.44269504f; /* e^x = 2^(x log2 e), of which logits are taken as they leave the product */

/* Threads of a block whose warps have PARTS times 16 rows, and how many such blocks there shall be at a time. */
template <int PARTS> struct of_parts {
    static const int WORKERS = SIDE / PART / PARTS * LS_WARP;
};
#define BOUNDS(D, PARTS) __launch_bounds__(of_parts<PARTS>::WORKERS, (PARTS) == 2 || (D) <= 64 ? 2 : 1)

/* Rows of tiles in shared memory: 16 bytes more than the features, so that rows begin in different banks. */
template <int D> struct of_width {
    static const int ROW = D + 8, STAYS = SIDE * ROW, PASSES = TILE * ROW;
};

/* Rows in bfloat16, of which those that are padded queries are 0: copies, (B,H,T,D) and (B,H,n,D), or the layer's. */
struct narrow_view {
    const bf16 *p;
    int64_t sb, sh;
    int st, width;
};
struct tensor_call : softmax_call {
    narrow_view q16, dout16, k16, v16;
};

/* What a thread has of its warp's rows, which begin at `first` of the tile: of each 16 rows `row` and row + 8, and of
 * every eight columns the two from `column` on. Its four numbers of eight columns: two of the one row, two of the
 * other. */
typedef struct spot {
    int first, row, column;
} spot;
template <int PARTS> __device__ static inline spot spot_of()
{
    const int lane = threadIdx.x % LS_WARP, first = PARTS * PART * (threadIdx.x / LS_WARP);
    return {first, first + lane / 4, 2 * (lane % 4)};
}
/* Whether any of the warp's rows exist. */
template <int PARTS> __device__ static inline bool has_rows(const spot &at, const tile &t)
{
    return at.first < t.last && at.first + PARTS * PART > t.first;
}
/* The row of a thread's numbers 2 half and 2 half + 1 of a part. */
__device__ static inline int row_of(const spot &at, int part, int half)
{
    return at.row + PART * part + 8 * half;
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

/* to (B,H,n,D) = from (B,H,n,d), rounded; rows that are padded are 0, and may have held anything. blockIdx.y: which,
 * z: heads. */
template <int D> __global__ static void narrow_kernel(copy_list list, int64_t B, int64_t H, int d)
{
    const auto x = list.x[blockIdx.y];
    const int pieces = D / PIECE;
    for (int64_t head = blockIdx.z; head < B * H; head += gridDim.z) LS_EACH(i, x.n * pieces)
        {
            const int64_t row = i / pieces, b = head / H;
            const int f = (int)(i % pieces) * PIECE;
            float4 y[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
            if (f < d && !ls_is_padded(x.pad, b * x.n + row)) {
                const float4 *from = (const float4 *)(ls_row(x.from, b, head % H, row) + f);
                y[0] = from[0], y[1] = from[1];
            }
            ((uint4 *)x.to)[head * x.n * pieces + i] = make_uint4(rounded(y[0].x, y[0].y), rounded(y[0].z, y[0].w),
                                                                  rounded(y[1].x, y[1].y), rounded(y[1].z, y[1].w));
        }
}

/* Asks for ROWS rows of a tile, those that exist, and as many features as there are; others become 0. */
template <int D, int PARTS, int ROWS>
__device__ static inline void ask_rows(bf16 *to, const narrow_view &from, const place &x, const tile &t)
{
    constexpr int pieces = D / PIECE, workers = of_parts<PARTS>::WORKERS, together = workers / pieces;
    const bf16 *head = from.p + x.b * from.sb + x.h * from.sh, *first = head + t.row * from.st;
    if constexpr (workers % pieces == 0) { /* a thread's rows are equally far apart, its pieces the same of each */
        const int f = (int)threadIdx.x % pieces * PIECE, r = (int)threadIdx.x / pieces;
        const bool wanted = f < from.width;
        const bf16 *row = wanted ? first + (int64_t)r * from.st + f : head;
        const int64_t apart = wanted ? (int64_t)together * from.st : 0;
        to += r * of_width<D>::ROW + f;
        if (t.first == 0 && t.last == ROWS) { /* most tiles: nothing to ask of each row */
#pragma unroll
            for (int n = 0; n < ROWS / together; n++, row += apart)
                ls_copy<16>(to + n * together * of_width<D>::ROW, row, wanted);
        } else
            for (int n = 0; n < ROWS / together; n++, row += apart) {
                const bool exists = wanted && r + n * together >= t.first && r + n * together < t.last;
                ls_copy<16>(to + n * together * of_width<D>::ROW, exists ? row : head, exists);
            }
    } else {
#pragma unroll
        for (int n = 0; n < ROWS * pieces / workers; n++) {
            const int i = (int)threadIdx.x + n * workers, r = i / pieces, f = i % pieces * PIECE;
            const bool exists = r >= t.first && r < t.last && f < from.width;
            ls_copy<16>(to + r * of_width<D>::ROW + f, exists ? first + (int64_t)r * from.st + f : head, exists);
        }
    }
}

/* Tiles pass, the first one `t`: next tells of the next one, if there is one, ask has a tile brought to stage 0 or 1,
 * with whatever was asked for before, meet works on it, and after some of them join adds up, told whether it is the
 * first time. All threads of a block call. */
template <typename N, typename A, typename M, typename J>
__device__ static inline void pass_by(tile t, N next, A ask, M meet, J join)
{
    int stage = 0;
    bool first = true;
    ask(t, stage);
    ls_copy_close();
    for (bool more = true; more; join(first), first = false)
        for (int i = 0; more && i < TILES_TOGETHER; i++, stage ^= 1) {
            tile coming = t;
            more = next(&coming);
            if (more) ask(coming, stage ^ 1);
            ls_copy_close();
            ls_copy_wait<1>(); /* for all but the next tile */
            __syncthreads();
            meet(t, stage);
            t = coming;
            __syncthreads(); /* the next copies go where this tile was */
        }
    ls_copy_wait<0>();
}

/* ------------------------------------------------------------------------------------------------ products */

/* s (16 PARTS, 8 N) = rows of a times the transpose of 8 N rows of b. A row of b is a column of its transpose, and is
 * read as it lies: rows 0..7 and 8..15 of two eights, features 0..7 and 8..15 of each. */
template <int D, int PARTS, int N>
__device__ static inline void multiply_features(const bf16 *a, const bf16 *b, float (&s)[PARTS][N][4])
{
    const int lane = threadIdx.x % LS_WARP;
    a += lane % 16 * of_width<D>::ROW + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * of_width<D>::ROW + lane / 8 % 2 * 8;
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int n = 0; n < N; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0;
#pragma unroll
    for (int f = 0; f < D; f += PART) {
        uint32_t x[PARTS][4];
#pragma unroll
        for (int i = 0; i < PARTS; i++) ls_mma_load(x[i], a + i * PART * of_width<D>::ROW + f);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t y[4];
            ls_mma_load(y, b + 8 * n * of_width<D>::ROW + f);
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                ls_mma(s[i][n], x[i], y[0], y[1]);
                ls_mma(s[i][n + 1], x[i], y[2], y[3]);
            }
        }
    }
}

/* o (16 PARTS, D) += s (16 PARTS, 8 N), rounded, times 8 N rows of b: rows 0..7 and 8..15 of 16, two eights of features
 * of each, transposed. */
template <int D, int PARTS, int N>
__device__ static inline void multiply_rows(const float (&s)[PARTS][N][4], const bf16 *b, float (&o)[PARTS][D / 8][4])
{
    const int lane = threadIdx.x % LS_WARP;
    b += lane % 16 * of_width<D>::ROW + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        uint32_t x[PARTS][4];
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            x[i][0] = rounded(s[i][j][0], s[i][j][1]), x[i][1] = rounded(s[i][j][2], s[i][j][3]);
            x[i][2] = rounded(s[i][j + 1][0], s[i][j + 1][1]), x[i][3] = rounded(s[i][j + 1][2], s[i][j + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            uint32_t y[4];
            ls_mma_load_transposed(y, b + 8 * j * of_width<D>::ROW + 8 * n);
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                ls_mma(o[i][n], x[i], y[0], y[1]);
                ls_mma(o[i][n + 1], x[i], y[2], y[3]);
            }
        }
    }
}

/* A warp's rows, d features: v = keep(part, half) v + times(part, half) o, of which nothing is left. fresh: v holds
 * nothing yet. */
template <int D, int PARTS, typename K, typename F>
__device__ static inline void add_rows(ls_view v, int64_t d, const place &x, const spot &at, bool fresh, K keep,
                                       F times, float (&o)[PARTS][D / 8][4])
{
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row_of(at, i, half);
            if (r >= x.t.first && r < x.t.last) {
                float *to = ls_row(v, x.b, x.h, x.t.row + r) + at.column;
                const float before = keep(i, half), more = times(i, half);
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    if (8 * n >= d) continue;
                    float2 y = make_float2(0, 0);
                    if (!fresh) y = *(float2 *)(to + 8 * n);
                    y.x = before * y.x + more * o[i][n][2 * half], y.y = before * y.y + more * o[i][n][2 * half + 1];
                    *(float2 *)(to + 8 * n) = y;
                }
            }
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[i][n][2 * half] = o[i][n][2 * half + 1] = 0;
        }
}
/* v += times o, or v = times o. */
template <int D, int PARTS>
__device__ static inline void add_rows(ls_view v, int64_t d, const place &x, const spot &at, bool fresh, float times,
                                       float (&o)[PARTS][D / 8][4])
{
    add_rows<D>(
        v, d, x, at, fresh, [](int, int) { return 1.0f; }, [&](int, int) { return times; }, o);
}

/* ------------------------------------------------------------------------------------------------ tiles that pass */

/* Which of `keys` keys of a tile exist and are not padded: a bit for each, 32 in a word. */
__device__ static inline void load_seen(uint32_t seen[], const tile &t, const uint8_t *pad, int keys)
{
    const int r = threadIdx.x;
    if (r >= keys) return; /* a whole warp */
    const uint32_t bits = __ballot_sync(0xffffffffu, r >= t.first && r < t.last && !ls_is_padded(pad, t.row + r));
    if (r % LS_WARP == 0) seen[r / LS_WARP] = bits;
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

/* The tiles that pass, span after span: of `span` so many are still to come. */
typedef struct walk {
    int span;
    int64_t left;
} walk;
__device__ static inline walk walk_of()
{
    return {-1, 0};
}

/* The next tile of keys that queries see, after t, if that was one; false: there is none. */
__device__ static inline bool next_keys(const softmax_call &p, const tile &queries, walk *w, tile *t)
{
    const bool goes_on = w->left > 0;
    while (w->left == 0) {
        if (++w->span >= p.keys) return false;
        w->left = tiles_before(p, p.key[w->span], queries);
    }
    *t = goes_on ? tile_after(p.key[w->span], *t) : tile_in(p.key[w->span], 0);
    w->left--;
    return true;
}

/* They are brought to a stage: k, v (2,PASSES). */
template <int D, int PARTS>
__device__ static inline void ask_keys(const tensor_call &p, const place &x, const tile &keys, int stage, bf16 *k,
                                       bf16 *v, uint32_t (*seen)[2])
{
    ask_rows<D, PARTS, TILE>(k + stage * of_width<D>::PASSES, p.k16, x, keys);
    ask_rows<D, PARTS, TILE>(v + stage * of_width<D>::PASSES, p.v16, x, keys);
    load_seen(seen[stage], keys, pads_of(p.pad_k, x.b, p.n), TILE);
}

/* The next tile of queries that see keys, likewise. */
__device__ static inline bool next_queries(const softmax_call &p, const tile &keys, walk *w, tile *t)
{
    const bool goes_on = w->left > 0;
    int64_t number = 0;
    while (w->left <= 0) {
        if (++w->span >= p.queries) return false;
        number = tiles_from(p, p.query[w->span], keys), w->left = tiles_in(p.query[w->span]) - number;
    }
    *t = goes_on ? tile_after(p.query[w->span], *t) : tile_in(p.query[w->span], number);
    w->left--;
    return true;
}

/* ------------------------------------------------------------------------------------------------ dropout */

/* What is kept of the probabilities that a thread has of its warp's rows and 8 N columns, from positions on. One call
 * of the generator is for four keys, which lie with several threads: each makes as many calls as there are fours among
 * its own numbers, and tells the others. DROPS: false where all is kept. */
template <bool DROPS, int PARTS, int N> struct kept_keys { /* rows are queries */
    static const int CALLS = PARTS * N, WORDS = (4 * CALLS + 31) / 32;
    uint32_t bits[2][WORDS]; /* of even and of odd eights: the two columns of each row, part and pair of eights */
    __device__ inline kept_keys(const softmax_call &p, const place &x, const spot &at, int64_t keys)
    {
        if (!DROPS) return;
        const int lane = threadIdx.x % LS_WARP, odd = lane % 2; /* two threads have a four: one each of two eights */
        const int64_t query = x.t.at + at.row;
#pragma unroll
        for (int w = 0; w < WORDS; w++) {
            uint32_t mine = 0;
#pragma unroll 2
            for (int k = 0; k < ls_min(8, CALLS); k++) {
                const int call = 8 * w + k, row = call / (N / 2), n = 2 * (call % (N / 2)) + odd;
                mine |= kept_of(p, x, query + 8 * row, keys + 8 * n + lane % 4 / 2 * 4) << 4 * k;
            }
            const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, 1);
            bits[0][w] = (odd ? other : mine) >> 2 * odd, bits[1][w] = (odd ? mine : other) >> 2 * odd;
        }
    }
    /* D times number e of an eight of a part */
    __device__ inline float times(const softmax_call &p, int i, int n, int e, float y) const
    {
        const int call = (2 * i + e / 2) * (N / 2) + n / 2;
        return !DROPS ? y : bits[n % 2][call / 8] >> (4 * (call % 8) + e % 2) & 1 ? p.keep * y : 0;
    }
};
template <bool DROPS, int PARTS> struct kept_queries { /* rows are keys; of four eights of queries */
    uint32_t bits[4];                                  /* by eight: each part, row and column, and three more rows */
    __device__ inline kept_queries(const softmax_call &p, const place &x, const spot &at, int64_t queries)
    {
        if (!DROPS) return;
        const int lane = threadIdx.x % LS_WARP, mate = lane / 4 % 4; /* four threads have a four: an eight for each */
        const int64_t key = x.t.at + at.row - mate, query = queries + 8 * mate + at.column;
        uint32_t mine = 0;
#pragma unroll 2
        for (int call = 0; call < 4 * PARTS; call++)
            mine |= kept_of(p, x, query + call % 2, key + 8 * (call / 2)) << 4 * call;
#pragma unroll
        for (int n = 0; n < 4; n++) bits[n] = __shfl_sync(0xffffffffu, mine, (lane & ~12) | 4 * n) >> mate;
    }
    __device__ inline float times(const softmax_call &p, int i, int n, int e, float y) const
    {
        return !DROPS ? y : bits[n] >> 4 * (4 * i + e) & 1 ? p.keep * y : 0;
    }
};

/* ------------------------------------------------------------------------------------------------ forward */

/* Scores of 16 rows and N eights of keys become -inf where a key may not be seen; `row`: the thread's first one. */
template <int N>
__device__ static inline void mask_scores(const uint32_t *seen, int ahead, int row, int column, float (&s)[N][4])
{
    uint32_t all = seen[0];
#pragma unroll
    for (int w = 1; w < N * 8 / LS_WARP; w++) all &= seen[w];
    if (all == 0xffffffffu && 8 * N - 1 <= row + ahead) return; /* the rows see all */
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int there = seen[8 * n / LS_WARP] >> (8 * n % LS_WARP + column + e % 2) & 1;
            const int past = 8 * n + column + e % 2 <= row + 8 * (e / 2) + ahead;
            s[n][e] = there && past ? s[n][e] : -INFINITY;
        }
}

/* What the queries of a warp have seen since they last joined: m, l (each thread of a row a part of the sum), o. */
template <int D, int PARTS> struct outlook {
    float m[PARTS][2], l[PARTS][2], o[PARTS][D / 8][4];
};

/* (m, l, out) of a warp's rows in memory ⊕= what they have seen, of which nothing is left. */
template <int D, int PARTS>
__device__ static inline void join_rows(const softmax_call &p, const place &x, const spot &at, bool fresh,
                                        outlook<D, PARTS> &y)
{
    float before[PARTS][2], more[PARTS][2]; /* weights of what is there and of what comes */
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row_of(at, i, half);
            const bool exists = r >= x.t.first && r < x.t.last;
            const int64_t row = x.head * p.T + x.t.row + r;
            float sum = y.l[i][half] + __shfl_xor_sync(0xffffffffu, y.l[i][half], 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const ls_statistics_joined s =
                ls_statistics_join(exists ? p.m[row] : -INFINITY, exists ? p.l[row] : 0, y.m[i][half], sum);
            __syncwarp(); /* all threads of the row have read */
            if (exists && at.column == 0) p.m[row] = s.m, p.l[row] = s.l;
            before[i][half] = s.weight[0], more[i][half] = s.weight[1];
            y.m[i][half] = -INFINITY, y.l[i][half] = 0;
        }
    add_rows<D>(
        p.out, p.d, x, at, fresh, [&](int i, int half) { return before[i][half]; },
        [&](int i, int half) { return more[i][half]; }, y.o);
}

/* A warp's rows meet 64 keys. */
template <bool DROPS, int D, int PARTS>
__device__ static inline void meet_keys(const softmax_call &p, const place &x, const bf16 *q, const bf16 *k,
                                        const bf16 *v, const tile &keys, const uint32_t seen[2], int ahead,
                                        const spot &at, outlook<D, PARTS> &y)
{
    const float scale = LOG2_E * p.scale;
    float s[PARTS][EIGHTS][4], top[PARTS][2];
    bool rises = false;
    multiply_features<D>(q + at.first * of_width<D>::ROW, k, s);
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        mask_scores(seen, ahead, row_of(at, i, 0), at.column, s[i]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float here = -INFINITY;
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) here = fmaxf(here, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
            here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 1));
            here = fmaxf(here, __shfl_xor_sync(0xffffffffu, here, 2));
            top[i][half] = raised(y.m[i][half], p.scale * here);
            rises = rises || top[i][half] > y.m[i][half];
        }
    }
    if (__any_sync(0xffffffffu, rises))
#pragma unroll
        for (int i = 0; i < PARTS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shrink = ls_statistics_weight(y.m[i][half], top[i][half]);
                y.m[i][half] = top[i][half], y.l[i][half] *= shrink;
#pragma unroll
                for (int n = 0; n < D / 8; n++) y.o[i][n][2 * half] *= shrink, y.o[i][n][2 * half + 1] *= shrink;
            }
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float base = LOG2_E * ls_statistics_top(y.m[i][half]);
#pragma unroll
            for (int n = 0; n < EIGHTS; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[i][n][e] = ls_exp2(scale * s[i][n][e] - base);
                    y.l[i][half] += s[i][n][e];
                }
        }
    const kept_keys<DROPS, PARTS, EIGHTS> kept(p, x, at, keys.at);
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[i][n][e] = kept.times(p, i, n, e, s[i][n][e]);
    multiply_rows<D>(s, v, y.o);
}

template <int D, int PARTS, bool DROPS> __global__ static void BOUNDS(D, PARTS) forward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[2][2];
    bf16 *q = memory, *k = q + of_width<D>::STAYS, *v = k + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.query, p.queries, 1);
    const spot at = spot_of<PARTS>();
    const bool busy = has_rows<PARTS>(at, x.t);
    walk w = walk_of();
    tile t;
    if (!next_keys(p, x.t, &w, &t)) return; /* what was seen before is all */
    ask_rows<D, PARTS, SIDE>(q, p.q16, x, x.t);
    outlook<D, PARTS> y = {};
#pragma unroll
    for (int i = 0; i < PARTS; i++) y.m[i][0] = y.m[i][1] = -INFINITY;
    pass_by(
        t, [&](tile *next) { return next_keys(p, x.t, &w, next); },
        [&](const tile &keys, int stage) { ask_keys<D, PARTS>(p, x, keys, stage, k, v, seen); },
        [&](const tile &keys, int stage) {
            const int ahead = ahead_of(p, x.t, keys), from = stage * of_width<D>::PASSES;
            if (busy && at.first + PARTS * PART - 1 + ahead >= 0)
                meet_keys<DROPS>(p, x, q, k + from, v + from, keys, seen[stage], ahead, at, y);
        },
        [&](bool first) { join_rows(p, x, at, p.fresh && first, y); });
}

/* ------------------------------------------------------------------------------------------------ backward */

/* dq += ds k of 64 keys, but for 1 / l and the scale. base: m log2 e. */
template <bool DROPS, int D, int PARTS>
__device__ static inline void meet_keys_backward(const softmax_call &p, const place &x, const bf16 *q, const bf16 *dout,
                                                 const bf16 *k, const bf16 *v, const tile &keys, const uint32_t seen[2],
                                                 int ahead, const spot &at, const float (&base)[PARTS][2],
                                                 const float (&delta)[PARTS][2], float (&dq)[PARTS][D / 8][4])
{
    const float scale = LOG2_E * p.scale;
#pragma unroll 1
    for (int j = 0; j < TILE; j += HALF) {
        float s[PARTS][HALF_EIGHTS][4], dp[PARTS][HALF_EIGHTS][4];
        const kept_keys<DROPS, PARTS, HALF_EIGHTS> kept(p, x, at, keys.at + j);
        multiply_features<D>(q + at.first * of_width<D>::ROW, k + j * of_width<D>::ROW, s);
        multiply_features<D>(dout + at.first * of_width<D>::ROW, v + j * of_width<D>::ROW, dp);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            mask_scores(seen + j / HALF, ahead - j, row_of(at, i, 0), at.column, s[i]);
#pragma unroll
            for (int n = 0; n < HALF_EIGHTS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float flow = kept.times(p, i, n, e, dp[i][n][e]);
                    s[i][n][e] = ls_exp2(scale * s[i][n][e] - base[i][e / 2]) * (flow - delta[i][e / 2]);
                }
        }
        multiply_rows<D>(s, k + j * of_width<D>::ROW, dq);
    }
}

/* dq += scale Σ_j ds k. As in the twin, 1 / l comes last, and what is rounded is ds l. */
template <int D, int PARTS, bool DROPS> __global__ static void BOUNDS(D, PARTS) queries_backward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[2][2];
    bf16 *q = memory, *dout = q + of_width<D>::STAYS, *k = dout + of_width<D>::STAYS;
    bf16 *v = k + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.query, p.queries, 1);
    const spot at = spot_of<PARTS>();
    const bool busy = has_rows<PARTS>(at, x.t);
    walk w = walk_of();
    tile t;
    if (!next_keys(p, x.t, &w, &t)) return;
    ask_rows<D, PARTS, SIDE>(q, p.q16, x, x.t);
    ask_rows<D, PARTS, SIDE>(dout, p.dout16, x, x.t);
    float base[PARTS][2], delta[PARTS][2], dq[PARTS][D / 8][4] = {};
#pragma unroll
    for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row_of(at, i, half), exists = r >= x.t.first && r < x.t.last;
            const int64_t row = x.head * p.T + x.t.row + r;
            base[i][half] = exists ? LOG2_E * p.top[row] : INFINITY;
            delta[i][half] = exists ? p.delta[row] : 0;
        }
    pass_by(
        t, [&](tile *next) { return next_keys(p, x.t, &w, next); },
        [&](const tile &keys, int stage) { ask_keys<D, PARTS>(p, x, keys, stage, k, v, seen); },
        [&](const tile &keys, int stage) {
            const int ahead = ahead_of(p, x.t, keys), from = stage * of_width<D>::PASSES;
            if (busy && at.first + PARTS * PART - 1 + ahead >= 0)
                meet_keys_backward<DROPS, D>(p, x, q, dout, k + from, v + from, keys, seen[stage], ahead, at, base,
                                             delta, dq);
        },
        [&](bool first) {
            add_rows<D>(
                p.dq, p.d, x, at, p.fresh && first, [](int, int) { return 1.0f; },
                [&](int i, int half) { return p.scale * p.inverse[x.head * p.T + x.t.row + row_of(at, i, half)]; }, dq);
        });
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

/* dk += ds q and dv += D p do of 64 queries, but for the scale. Rows of a tile are keys here, its columns queries. */
template <bool DROPS, int D, int PARTS>
__device__ static inline void meet_queries(const softmax_call &p, const place &x, const bf16 *k, const bf16 *v,
                                           const bf16 *q, const bf16 *dout, const tile &queries, const statistics &of,
                                           const uint32_t seen[], int ahead, const spot &at,
                                           float (&dk)[PARTS][D / 8][4], float (&dv)[PARTS][D / 8][4])
{
    const float scale = LOG2_E * p.scale;
    const uint32_t others = PARTS * PART < LS_WARP ? ~(((1u << PART) - 1) << at.first % LS_WARP) : 0;
    const bool all = (seen[at.first / LS_WARP] | others) == 0xffffffffu;
#pragma unroll 1
    for (int c0 = 0; c0 < TILE; c0 += HALF) {
        float s[PARTS][HALF_EIGHTS][4], dp[PARTS][HALF_EIGHTS][4];
        const kept_queries<DROPS, PARTS> kept(p, x, at, queries.at + c0);
        multiply_features<D>(k + at.first * of_width<D>::ROW, q + c0 * of_width<D>::ROW, s);
        multiply_features<D>(v + at.first * of_width<D>::ROW, dout + c0 * of_width<D>::ROW, dp);
#pragma unroll
        for (int n = 0; n < HALF_EIGHTS; n++) {
            const int c = c0 + 8 * n + at.column;
            const float2 top = *(const float2 *)(of.top + c), inverse = *(const float2 *)(of.inverse + c);
#pragma unroll
            for (int i = 0; i < PARTS; i++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[i][n][e] = (e % 2 == 0 ? inverse.x : inverse.y) *
                                 ls_exp2(scale * s[i][n][e] - LOG2_E * (e % 2 == 0 ? top.x : top.y));
        }
        if (!all || at.first + PARTS * PART - 1 > c0 + ahead) /* not all queries see all of the warp's keys */
#pragma unroll
            for (int i = 0; i < PARTS; i++)
#pragma unroll
                for (int n = 0; n < HALF_EIGHTS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int r = row_of(at, i, e / 2), c = c0 + 8 * n + at.column + e % 2;
                        const int there = seen[r / LS_WARP] >> r % LS_WARP & 1, past = r <= c + ahead;
                        s[i][n][e] = there && past ? s[i][n][e] : 0;
                    }
#pragma unroll
        for (int n = 0; n < HALF_EIGHTS; n++) {
            const float2 delta = *(const float2 *)(of.delta + c0 + 8 * n + at.column);
#pragma unroll
            for (int i = 0; i < PARTS; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float share = s[i][n][e], flow = kept.times(p, i, n, e, dp[i][n][e]);
                    s[i][n][e] = kept.times(p, i, n, e, share);
                    dp[i][n][e] = share * (flow - (e % 2 == 0 ? delta.x : delta.y));
                }
        }
        multiply_rows<D>(s, dout + c0 * of_width<D>::ROW, dv);
        multiply_rows<D>(dp, q + c0 * of_width<D>::ROW, dk);
    }
}

template <int D, int PARTS, bool DROPS> __global__ static void BOUNDS(D, PARTS) keys_backward_kernel(tensor_call p)
{
    LS_SHARED(bf16, memory);
    __shared__ uint32_t seen[SIDE / LS_WARP];
    __shared__ statistics known[2];
    bf16 *k = memory, *v = k + of_width<D>::STAYS, *q = v + of_width<D>::STAYS;
    bf16 *dout = q + 2 * of_width<D>::PASSES;
    const place x = place_of<SIDE>(p, p.key, p.keys, 0);
    const spot at = spot_of<PARTS>();
    const bool busy = has_rows<PARTS>(at, x.t);
    walk w = walk_of();
    tile t;
    if (!next_queries(p, x.t, &w, &t)) return;
    ask_rows<D, PARTS, SIDE>(k, p.k16, x, x.t);
    ask_rows<D, PARTS, SIDE>(v, p.v16, x, x.t);
    load_seen(seen, x.t, pads_of(p.pad_k, x.b, p.n), SIDE);
    float dk[PARTS][D / 8][4] = {}, dv[PARTS][D / 8][4] = {};
    pass_by(
        t, [&](tile *next) { return next_queries(p, x.t, &w, next); },
        [&](const tile &queries, int stage) {
            ask_rows<D, PARTS, TILE>(q + stage * of_width<D>::PASSES, p.q16, x, queries);
            ask_rows<D, PARTS, TILE>(dout + stage * of_width<D>::PASSES, p.dout16, x, queries);
            ask_statistics(known[stage], p, x, queries);
        },
        [&](const tile &queries, int stage) {
            const int ahead = ahead_of(p, queries, x.t), from = stage * of_width<D>::PASSES;
            if (busy && at.first <= TILE - 1 + ahead)
                meet_queries<DROPS, D>(p, x, k, v, q + from, dout + from, queries, known[stage], seen, ahead, at, dk,
                                       dv);
        },
        [&](bool first) {
            add_rows<D>(p.dk, p.d, x, at, p.fresh && first, p.scale, dk);
            add_rows<D>(p.dv, p.d, x, at, p.fresh && first, 1, dv);
        });
}

/* ------------------------------------------------------------------------------------------------ host */

/* Shared memory of a block: rows of `stay` tensors stay, those of two pass by. */
template <int D> constexpr size_t shared_bytes(int stay)
{
    return (size_t)(stay * of_width<D>::STAYS + 4 * of_width<D>::PASSES) * sizeof(bf16);
}

/* By width, 32 .. 128. Where it has registers for the sums a warp has 32 rows. */
struct tensor_variant {
    int width;
    size_t shared;
    void (*narrow)(ls_queue *, const copy_list &, int tensors, int64_t B, int64_t H, int64_t d);
    void (*forward)(ls_queue *, const tensor_call &, int query_blocks);
    void (*backward)(ls_queue *, const tensor_call &, int query_blocks, int key_blocks);
};

template <int D> static void forward(ls_queue *queue, const tensor_call &x, int query_blocks)
{
    constexpr int parts = D <= 64 ? 2 : 1;
    const auto kernel = x.draws ? forward_kernel<D, parts, true> : forward_kernel<D, parts, false>;
    LS_LAUNCH(queue, kernel, query_blocks, of_parts<parts>::WORKERS, shared_bytes<D>(1), x);
}

template <int D> static void backward(ls_queue *queue, const tensor_call &x, int query_blocks, int key_blocks)
{
    constexpr int parts = D <= 64 ? 2 : 1;
    const auto of_queries =
        x.draws ? queries_backward_kernel<D, parts, true> : queries_backward_kernel<D, parts, false>;
    const auto of_keys = x.draws ? keys_backward_kernel<D, parts, true> : keys_backward_kernel<D, parts, false>;
    LS_LAUNCH(queue, of_queries, query_blocks, of_parts<parts>::WORKERS, shared_bytes<D>(2), x);
    LS_LAUNCH(queue, of_keys, key_blocks, of_parts<parts>::WORKERS, shared_bytes<D>(2), x);
}

template <int D>
static void narrow_rows(ls_queue *queue, const copy_list &list, int tensors, int64_t B, int64_t H, int64_t d)
{
    int64_t n = 0;
    for (int i = 0; i < tensors; i++) n = ls_max(n, list.x[i].n);
    const dim3 blocks((unsigned)ls_blocks(n * D / PIECE, LS_THREADS), (unsigned)tensors,
                      (unsigned)ls_min(B * H, 65535));
    LS_LAUNCH(queue, narrow_kernel<D>, blocks, LS_THREADS, 0, list, B, H, (int)d);
}

template <int D> constexpr tensor_variant variant_of()
{
    return {D, shared_bytes<D>(2), narrow_rows<D>, forward<D>, backward<D>};
}

/* NULL: not for such heads, or not on this GPU, some of which have less shared memory. */
static const tensor_variant *variant_for(const ls_pass *p)
{
    static const tensor_variant by_width[] = {variant_of<32>(), variant_of<64>(), variant_of<96>(), variant_of<128>()};
    if (p->queue->precision != LS_BF16 || p->step || p->d <= 0 || p->d > 128 || p->d % PIECE != 0) return NULL;
    const tensor_variant *x = &by_width[(p->d + 31) / 32 - 1];
    return ls_has_shared(p->queue, x->shared) ? x : NULL;
}

int64_t ls_softmax_tensor_reals(const ls_pass *p)
{
    const int64_t rows = p->T * (p->backward ? 2 : 1) + 2 * p->visit.n;
    const tensor_variant *x = variant_for(p);
    return x != NULL && !p->narrow ? p->B * p->H * rows * x->width / 2 : 0; /* two to a real */
}

/* Rows of values lie as those of keys do. */
int ls_softmax_tensor_takes_narrow(const ls_pass *p)
{
    const int64_t strides = p->q.sb | p->q.sh | p->q.st | p->own.k.sb | p->own.k.sh | p->own.k.st;
    return variant_for(p) != NULL && strides % PIECE == 0 && ls_max(p->q.st, p->own.k.st) <= INT32_MAX;
}

/* Fills `copies`, and tells the kernels where what lies. */
static tensor_call copy_rows(ls_pass *p, const tensor_variant *variant, const softmax_call &call, ls_real *copies)
{
    tensor_call x;
    static_cast<softmax_call &>(x) = call;
    copy_list list = {};
    int tensors = 0;
    bf16 *to = reinterpret_cast<bf16 *>(copies);
    const int D = variant->width;
    const auto rows_of = [&](const void *narrow, ls_view v, const uint8_t *pad, int64_t n) {
        const narrow_view there = {static_cast<const bf16 *>(narrow), v.sb, v.sh, (int)v.st, (int)x.d};
        const narrow_view copy = {to, x.H * n * D, n * D, D, D};
        if (narrow != NULL) return there;
        list.x[tensors++] = {v, pad, n, to};
        to += x.B * x.H * n * D;
        return copy;
    };
    x.k16 = rows_of(x.narrow_k, x.k, NULL, x.n); /* padded keys are 0 since they visit */
    x.v16 = rows_of(x.narrow_v, x.v, NULL, x.n);
    x.q16 = rows_of(x.narrow_q, x.q, x.pad_q, x.T);
    if (p->backward) x.dout16 = rows_of(x.narrow_dout, x.dout, x.pad_q, x.T);
    if (tensors > 0) variant->narrow(p->queue, list, tensors, x.B, x.H, x.d);
    return x;
}

static int blocks_of(const ls_pass *p, const ls_span *span, int spans)
{
    return (int)(tiles_of<SIDE>(span, spans) * p->B * p->H);
}

int ls_softmax_tensor_forward(ls_pass *p, const softmax_call *x, ls_real *copies)
{
    const tensor_variant *variant = x->wide ? variant_for(p) : NULL;
    if (variant == NULL) return 0;
    variant->forward(p->queue, copy_rows(p, variant, *x, copies), blocks_of(p, x->query, x->queries));
    return 1;
}

int ls_softmax_tensor_backward(ls_pass *p, const softmax_call *x, ls_real *copies)
{
    const tensor_variant *variant = x->wide ? variant_for(p) : NULL;
    if (variant == NULL) return 0;
    variant->backward(p->queue, copy_rows(p, variant, *x, copies), blocks_of(p, x->query, x->queries),
                      blocks_of(p, x->key, x->keys));
    return 1;
}
