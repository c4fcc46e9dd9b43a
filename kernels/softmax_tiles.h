/* What the kernels of exact softmax attention share: the call as they see it, and tiles of 64 positions, or SIDE. */
#ifndef LS_SOFTMAX_TILES_H
#define LS_SOFTMAX_TILES_H

#include "cuda.h"

extern "C" {
#include "mechanism.h"
}
#include "rng_inline.h"
#include "statistics.h"

/* A tile, and what of it each of a block's threads has, see softmax.cu. */
enum { TILE = 64, THREADS = 128, ROWS = 8, COLUMNS = 4, ACROSS = TILE / COLUMNS };

/* So many tiles are summed up in registers, and then added to what is in memory: a sum over a million positions, one by
 * one, would round each of them to what it can hold itself, and tensor cores always towards 0. */
enum { TILES_TOGETHER = 32 };

/* A call as its kernels see it. */
typedef struct softmax_call {
    ls_view q, k, v, out, dout, dq, dk, dv;
    const void *narrow_q, *narrow_k, *narrow_v, *narrow_dout; /* see ls_pass */
    void *narrow_out;
    const uint8_t *pad_q, *pad_k;
    int64_t B, H, T, n /* rows of the visiting block */, d, all_keys;
    ls_real scale;
    int causal;
    int wide;          /* rows may be read and written in fours */
    int narrow;        /* operands of products are rounded to bfloat16 */
    int fresh;         /* nobody has cleared out, dq, dk, dv: all are of this call alone */
    int queries, keys; /* spans */
    ls_span query[2], key[2];
    ls_real *m, *l;                 /* (slices,B,H,T) */
    ls_real *top, *inverse, *delta; /* of queries: m, 1 / l, δ; m = +inf and 0 where p shall be 0 */
    ls_real *taken;                 /* backward: δ as queries_backward_kernel of softmax.cu leaves it for the keys */
    const ls_real *attn_mask, *dropout_mask;
    int mask_per_head, draws;
    ls_real *weights;
    uint64_t limit; /* words from it on are kept */
    ls_real keep;
    uint64_t seed, sample;
    uint32_t stream;
} softmax_call;

/* SIDE consecutive global positions from `at` on; the first stands for row `row` of the tensors, which may be before
 * its beginning: rows [first, last) of the tile exist. */
typedef struct tile {
    int64_t at, row;
    int first, last;
} tile;

template <int SIDE = TILE> LS_BOTH_SIDES int64_t tiles_in(ls_span s)
{
    return s.n > 0 ? (s.lo % 4 + s.n + SIDE - 1) / SIDE : 0;
}

template <int SIDE = TILE> LS_BOTH_SIDES int64_t tiles_of(const ls_span *span, int spans)
{
    int64_t n = 0;
    for (int i = 0; i < spans; i++) n += tiles_in<SIDE>(span[i]);
    return n;
}

template <int SIDE = TILE> __device__ static inline tile tile_in(ls_span s, int64_t number)
{
    tile t;
    t.at = s.lo - s.lo % 4 + number * SIDE;
    t.row = s.row + t.at - s.lo;
    t.first = (int)ls_max(0, s.lo - t.at);
    t.last = (int)ls_min(SIDE, s.lo + s.n - t.at);
    return t;
}

/* The next one. */
__device__ static inline tile tile_after(ls_span s, const tile &t)
{
    return {t.at + TILE, t.row + TILE, 0, (int)ls_min(TILE, s.lo + s.n - (t.at + TILE))};
}

/* Who a block is: a head, a tile of the side that stays, the features of its results. */
typedef struct place {
    int64_t b, h, head, slice;
    tile t;
} place;

/* Blocks of one head follow one another, since they read the same rows; the last positions come first: where tiles
 * differ in work (the causal triangle), those of the queries are the longest. */
template <int SIDE = TILE>
__device__ static inline place place_of(const softmax_call &p, const ls_span *span, int spans, int backwards)
{
    const int64_t tiles = tiles_of<SIDE>(span, spans), block = blockIdx.x, number = block % tiles;
    int64_t t = backwards ? tiles - 1 - number : number;
    place x;
    x.head = block / tiles % (p.B * p.H);
    x.slice = block / tiles / (p.B * p.H);
    x.b = x.head / p.H, x.h = x.head % p.H;
    const int second = spans > 1 && t >= tiles_in<SIDE>(span[0]);
    x.t = second ? tile_in<SIDE>(span[1], t - tiles_in<SIDE>(span[0])) : tile_in<SIDE>(span[0], t);
    return x;
}

/* The m of a row that has seen scores up to `most` besides. It follows them only where they are more than SLACK beyond
 * it, or sums would be rescaled again and again for little: e^(s - m) may be e^SLACK = 2^8 then, which rounds as 1. */
constexpr ls_real SLACK = (ls_real)5.54517744;
__device__ static inline ls_real raised(ls_real m, ls_real most)
{
    return most > m + SLACK ? most : m;
}

/* The tiles (of 64) of a span of keys that are not wholly after the queries of a tile; the first tile of a span of
 * queries that is not wholly before the keys of a tile. */
__device__ static inline int64_t tiles_before(const softmax_call &p, ls_span keys, const tile &queries)
{
    const int64_t all = tiles_in(keys), end = queries.at + queries.last; /* keys from here on are in the future */
    if (!p.causal) return all;
    return end <= keys.lo ? 0 : ls_min(all, (end - (keys.lo - keys.lo % 4) + TILE - 1) / TILE);
}
__device__ static inline int64_t tiles_from(const softmax_call &p, ls_span queries, const tile &keys)
{
    const int64_t start = queries.lo - queries.lo % 4, first = keys.at + keys.first;
    return p.causal && first > start ? (first - start) / TILE : 0;
}

/* What dropout keeps of query i and the keys at j .. j + 3, j a multiple of 4, which is what one call of the generator
 * tells, see dropout_row in softmax.c: a bit for each. */
__device__ static inline uint32_t kept_of(const softmax_call &p, const place &x, int64_t i, int64_t j)
{
    uint32_t word[4], kept = 0;
    ls_random4_inline(p.seed, p.stream * 65536u + (uint32_t)x.h, (uint32_t)(p.sample + (uint64_t)x.b),
                      (uint64_t)i << 32 | (uint64_t)(j / 4), word);
    for (int c = 0; c < 4; c++) kept |= (uint32_t)(word[c] >= p.limit) << c;
    return kept;
}

/* The same phases with bfloat16 operands on tensor cores, for calls without masks and weights whose heads they know:
 * see softmax_tensor.cu. 0: this call is not for them, nothing was done. copies: ls_softmax_tensor_reals of
 * memory. */
int64_t ls_softmax_tensor_reals(const ls_pass *p);
/* Rows that lie in bfloat16: only they know what to do with them. */
int ls_softmax_tensor_takes_narrow(const ls_pass *p);
int ls_softmax_tensor_forward(ls_pass *p, const softmax_call *x, ls_real *copies);
int ls_softmax_tensor_backward(ls_pass *p, const softmax_call *x, ls_real *copies);

#endif
