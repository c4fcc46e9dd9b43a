/* ProbSparse attention on a GPU. What is computed, and why the top is the same on any ranks, stands in probsparse.c.
 *
 *   counts      one warp per row of q, k; the ranks' counts become totals in one block
 *   scores      one warp per query: its lanes draw the samples, list those that are here, and half a warp makes a
 * product, in the CPU's order of additions selection   one block per (b,h): a radix search for the u-th best key, then
 * what is not worse, by rising index partial     keys in chunks of CHUNK, all chunks at once: products of the u queries
 * with all keys, a softmax per chunk, x of each chunk by a batch of products, and the chunks joined in double. At most
 * TOGETHER queries at a time, so that their logits are never more than a few times the keys Σ_{j<=i} v  sums of chunks,
 * a scan over the chunks, then all chunks at once
 *
 * Matrices of logits lie with a key in each row, (B,H,n,R), n = S rounded up to whole chunks: so the chunks of all
 * heads are one batch. */
#include "cuda.h"

extern "C" {
#include "probsparse.h"
}
#include "rng_inline.h"

#include <type_traits>

enum { ROWS, CHOSEN, SLOT }; /* saved[] */
enum {
    NOTE,
    TALLY,
    TOP,
    SUM,
    KEY_ROWS,
    SCORE,
    PICKED,
    REST,
    CHUNK_SUMS,
    SCALED,
    LOGITS,
    DLOGITS,
    KEYS,
    VALUES,
    PART,
    STATE
};
enum { CHUNK = 128 };    /* rows that are summed together */
enum { TOGETHER = 128 }; /* queries */
enum { TILES = 128 };    /* blocks that count the rows of a batch row */
enum { DRAWN = 128 };    /* samples drawn at a time by a warp: four for each lane */
enum { WARPS = LS_THREADS / LS_WARP };
enum { AHEAD = 8 }; /* chunks whose sums a scan reads before their turn */

/* What most kernels want to know. */
typedef struct shape {
    int64_t B, H, T, S, d;
    int64_t u, lead, R; /* slots for selected queries, rows of a softsum before them, both */
    int64_t query_lo, key_lo;
    int causal;
} shape;

static shape shape_of(const ls_pass *p)
{
    shape z;
    z.B = p->B, z.H = p->H, z.T = p->T, z.S = p->S, z.d = p->d;
    z.u = most_top(p), z.lead = lead(p), z.R = z.lead + z.u;
    z.query_lo = p->query_span[0].lo, z.key_lo = p->own.span[0].lo;
    z.causal = is_causal(p);
    return z;
}

/* Numbers of which the greater is that of the better score; 0 is that of none. */
typedef std::conditional<sizeof(ls_real) == sizeof(uint32_t), uint32_t, uint64_t>::type order;
LS_BOTH_SIDES order ordered(ls_real x)
{
    const order sign = (order)1 << (8 * sizeof sign - 1);
    order bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & sign ? ~bits : bits | sign;
}

/* Rows of one batch row that one block has counted. */
typedef struct tally {
    int64_t rows;
    ls_real largest;
} tally;

LS_BOTH_SIDES int64_t chunks_of(int64_t n)
{
    return (n + CHUNK - 1) / CHUNK;
}

static int64_t together(const shape *z)
{
    return ls_min(z->R, TOGETHER);
}

static int64_t tiles_of(int64_t n)
{
    return ls_max(1, ls_min(TILES, n / 32));
}

template <typename T> static T *take(ls_arena *arena, int64_t n)
{
    return static_cast<T *>(ls_arena_take(arena, (size_t)n * sizeof(T)));
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H, d = p->d, forward = !p->backward, backward = p->backward;
    const int64_t scored = forward * BH * p->T, chunks = chunks_of(p->S), n = chunks * CHUNK, some = together(&z);
    const int64_t offered = p->gathered[CHOICE].total / OFFERED, causal = z.causal;
    p->saved[ROWS] = (ls_real *)take<rows>(saved, p->B);
    p->saved[CHOSEN] = (ls_real *)take<int64_t>(saved, BH * z.u);
    p->saved[SLOT] = (ls_real *)take<int32_t>(saved, BH * p->T);
    p->work[NOTE] = ls_take(work, 2 * p->B);
    p->work[TALLY] = (ls_real *)take<tally>(work, forward * (2 * p->B + 1) * TILES);
    p->work[TOP] = ls_take(work, scored);
    p->work[SUM] = (ls_real *)take<double>(work, scored);
    p->work[KEY_ROWS] = (ls_real *)take<int32_t>(work, p->own.pad == NULL ? 0 : forward * p->B * (1 + p->all_keys));
    p->work[SCORE] = (ls_real *)take<order>(work, forward * ls_max(BH * p->T, offered));
    p->work[PICKED] = (ls_real *)take<int32_t>(work, forward * BH * z.u);
    p->work[REST] = ls_take(work, backward * BH * d);
    p->work[CHUNK_SUMS] = (ls_real *)take<double>(work, (causal || backward) ? BH * chunks_of(p->T) * d : 0);
    p->work[SCALED] = ls_take(work, BH * z.R * d);
    p->work[LOGITS] = ls_take(work, BH * n * some);
    p->work[DLOGITS] = ls_take(work, backward * BH * n * some);
    p->work[KEYS] = ls_take(work, backward * BH * n * d);
    p->work[VALUES] = ls_take(work, forward * BH * n * d);
    p->work[PART] = ls_take(work, BH * chunks * some * d);
    p->work[STATE] = (ls_real *)take<double>(work, 2 * BH * chunks * some);
}

static rows *rows_of(const ls_pass *p)
{
    return (rows *)p->saved[ROWS]; /* (B) */
}
static int64_t *chosen_of(const ls_pass *p)
{
    return (int64_t *)p->saved[CHOSEN]; /* (B,H,u): global positions of the selected queries, rising */
}
static int32_t *slots_of(const ls_pass *p)
{
    return (int32_t *)p->saved[SLOT]; /* (B,H,T): which of the selected this rank's query is, or -1 */
}

/* The row of a global position among this rank's queries, or -1. */
__device__ static inline int64_t own_row(const shape *z, int64_t position)
{
    const int64_t t = position - z->query_lo;
    return t >= 0 && t < z->T ? t : -1;
}

/* A block for n things to be shared out: up to LS_THREADS, whole warps. */
static int threads_for(int64_t n)
{
    return (int)ls_max(1, ls_min(WARPS, (n + LS_WARP - 1) / LS_WARP)) * LS_WARP;
}

/* What all threads before this one of the block have; *all: what the whole block has. scratch (WARPS). */
__device__ static int count_before(int mine, int *scratch, int *all)
{
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP;
    int upto = mine, before = 0;
    for (int step = 1; step < LS_WARP; step *= 2) {
        const int other = __shfl_sync(0xffffffffu, upto, lane >= step ? lane - step : lane);
        if (lane >= step) upto += other;
    }
    if (lane == LS_WARP - 1) scratch[warp] = upto;
    __syncthreads();
    *all = 0;
    for (int w = 0; w < (int)blockDim.x / LS_WARP; w++) {
        if (w == warp) before = *all;
        *all += scratch[w];
    }
    __syncthreads();
    return before + upto - mine;
}

/* ------------------------------------------------------------------------------------------------ counts */

/* to (B,TILES): unpadded rows, and the largest |x| in them. The warps of blocks (b,i) share the rows of b. */
__global__ static void tally_rows(ls_view x, const uint8_t *pad, int64_t H, int64_t n, int64_t d, tally *to)
{
    __shared__ ls_real largest[LS_WARP];
    __shared__ int64_t counted[LS_WARP];
    const int64_t b = blockIdx.x, warps = blockDim.x / LS_WARP, first = blockIdx.y * warps + threadIdx.x / LS_WARP;
    int64_t count = 0;
    ls_real most = 0;
    for (int64_t i = first; i < n * H; i += gridDim.y * warps) {
        const int64_t t = i / H, h = i % H;
        if (ls_is_padded(pad, b * n + t)) continue;
        const ls_real *row = ls_row(x, b, h, t);
        LS_EACH_LANE(e, d)
        {
            const ls_real size = row[e] < 0 ? -row[e] : row[e];
            most = size > most ? size : most;
        }
        count += h == 0 && threadIdx.x % LS_WARP == 0;
    }
    most = ls_block_max(most, largest);
    count = ls_block_sum(count, counted);
    if (threadIdx.x == 0) to[b * TILES + blockIdx.y] = {count, most};
}

/* Given samples must be keys that exist, or -1. */
__global__ static void tally_samples(const int32_t *given, int64_t n, int64_t keys, tally *to)
{
    __shared__ int64_t counted[LS_WARP];
    int64_t bad = 0;
    LS_EACH(i, n) bad += given[i] < -1 || given[i] >= keys;
    bad = ls_block_sum(bad, counted);
    if (threadIdx.x == 0) to[blockIdx.x] = {bad, 0};
}

/* The piece of a batch row: unpadded keys, unpadded queries (two reals each), largest |k|, largest |q|; at the end of
 * all whether the given samples are in order. Block b adds up tiles, one of each kind in a thread. */
__global__ static void add_tallies(const tally *of_keys, int64_t key_tiles, const tally *of_queries,
                                   int64_t query_tiles, const tally *of_samples, int64_t sample_tiles, ls_real *piece)
{
    __shared__ ls_real largest[LS_WARP];
    __shared__ int64_t counted[LS_WARP];
    const int64_t b = blockIdx.x, i = threadIdx.x;
    const tally none = {0, 0};
    const tally k = i < key_tiles ? of_keys[b * TILES + i] : none;
    const tally q = i < query_tiles ? of_queries[b * TILES + i] : none;
    const tally s = i < sample_tiles ? of_samples[i] : none;
    const int64_t keys = ls_block_sum(k.rows, counted), queries = ls_block_sum(q.rows, counted);
    const int64_t bad = ls_block_sum(s.rows, counted);
    const ls_real most_k = ls_block_max(k.largest, largest), most_q = ls_block_max(q.largest, largest);
    if (i != 0) return;
    ls_real *to = piece + b * COUNTED;
    put_integer(keys, &to[0]);
    put_integer(queries, &to[2]);
    to[4] = most_k;
    to[5] = most_q;
    if (b == 0) piece[(int64_t)gridDim.x * COUNTED] = bad > 0 ? 1 : 0;
}

static ls_status count(ls_pass *p, int phase)
{
    tally *k = (tally *)p->work[TALLY], *q = k + p->B * TILES, *s = q + p->B * TILES;
    const int key_tiles = (int)tiles_of(p->S), query_tiles = (int)tiles_of(p->T);
    const int64_t n = p->given_samples == NULL ? 0 : (p->samples_per_batch ? p->B : 1) * p->T * p->samples;
    const int sample_tiles = (int)ls_min(TILES, ls_blocks(n, LS_THREADS));
    LS_LAUNCH(p->queue, tally_rows, dim3((unsigned)p->B, (unsigned)key_tiles), threads_for(8 * p->S), 0, p->own.k,
              p->own.pad, p->H, p->S, p->d, k);
    LS_LAUNCH(p->queue, tally_rows, dim3((unsigned)p->B, (unsigned)query_tiles), threads_for(8 * p->T), 0, p->q,
              p->pad_q, p->H, p->T, p->d, q);
    LS_LAUNCH(p->queue, tally_samples, sample_tiles, threads_for(n), 0, p->given_samples, n, p->all_keys, s);
    LS_LAUNCH(p->queue, add_tallies, (int)p->B, threads_for(ls_max(sample_tiles, ls_max(key_tiles, query_tiles))), 0, k,
              key_tiles, q, query_tiles, s, sample_tiles, p->gathered[phase + 1].mine);
    return ls_launched(p->queue, "probsparse: counts");
}

/* verdict (2): how many ranks have samples that are no keys, the most samples that a batch row needs. One block. */
__global__ static void add_counts(int64_t B, int64_t d, double factor, const ls_real *all, int64_t before_us,
                                  int64_t total, rows *row, ls_real *note, int64_t *verdict)
{
    __shared__ int64_t scratch[LS_WARP];
    const int64_t piece = COUNTED * B + 1;
    int64_t needed = 0, bad = 0;
    for (int64_t b = threadIdx.x; b < B; b += blockDim.x) {
        int64_t keys = 0, queries = 0, before = 0;
        double k = 0, q = 0;
        for (int64_t at = 0; at < total; at += piece) {
            const ls_real *from = all + at + b * COUNTED;
            if (at == before_us) before = keys;
            keys += integer_at(&from[0]);
            queries += integer_at(&from[2]);
            k = fmax(k, (double)from[4]);
            q = fmax(q, (double)from[5]);
            if (b == 0) bad += all[at + piece - 1] > 0;
        }
        rows r = {keys, count_of(factor, keys), count_of(factor, queries), 0};
        r.big = rounder((double)d * k * q, r.samples);
        row[b] = r;
        needed = ls_max(needed, r.samples);
        put_integer(before, note + 2 * b);
    }
    needed = ls_block_max(needed, scratch);
    bad = ls_block_sum(bad, scratch);
    if (threadIdx.x == 0) verdict[0] = bad, verdict[1] = needed;
}

__global__ static void start_scores(int64_t n, ls_real *top, double *sum)
{
    LS_EACH(i, n)
    {
        top[i] = -INFINITY;
        sum[i] = 0;
    }
}

/* Given samples that are wrong are the caller's mistake and must be told now, on all ranks: only where samples are
 * given does the host wait. */
static ls_status check_samples(const ls_pass *p, const int64_t *verdict)
{
    int64_t found[2] = {0, 0};
    LS_TRY(ls_cuda_device.to_host(p->queue, found, verdict, sizeof found));
    if (found[0] > 0)
        LS_FAIL(LS_ERR_ARGUMENT, "probsparse: samples must be keys from 0 to %lld, or -1 where there is none",
                (long long)p->all_keys - 1);
    if (p->samples < found[1])
        LS_FAIL(LS_ERR_ARGUMENT,
                "probsparse: num_samples is %lld, but a batch row needs %lld: min(f ceil(ln n), n) of n keys",
                (long long)p->samples, (long long)found[1]);
    return LS_OK;
}

static ls_status totals(ls_pass *p, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    const int64_t n = p->B * p->H * p->T;
    int64_t *verdict = (int64_t *)p->work[TALLY];
    LS_LAUNCH(p->queue, add_counts, 1, threads_for(p->B), 0, p->B, p->d, p->option[FACTOR], g->all, g->before, g->total,
              rows_of(p), p->work[NOTE], verdict);
    LS_LAUNCH(p->queue, start_scores, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, p->work[TOP], (double *)p->work[SUM]);
    p->own.note = p->work[NOTE];
    LS_TRY(ls_launched(p->queue, "probsparse: totals"));
    return p->given_samples != NULL ? check_samples(p, verdict) : LS_OK;
}

/* ------------------------------------------------------------------------------------------------ scores */

/* Block b lists the unpadded rows of the visiting keys: to (B, 1 + most) begins with how many there are. */
__global__ static void list_keys(const uint8_t *pad, int64_t n, int64_t most, int32_t *to)
{
    enum { EACH = 8 };
    __shared__ int scratch[WARPS];
    const int threads = blockDim.x;
    pad += blockIdx.x * n;
    to += blockIdx.x * (1 + most);
    int64_t listed = 0;
    for (int64_t t = 0; t < n; t += EACH * threads) {
        const int64_t lo = t + EACH * (int64_t)threadIdx.x, hi = ls_min(n, lo + EACH);
        int mine = 0, all;
        for (int64_t i = lo; i < hi; i++) mine += !pad[i];
        int64_t at = 1 + listed + count_before(mine, scratch, &all);
        for (int64_t i = lo; i < hi; i++)
            if (!pad[i]) to[at++] = (int32_t)i;
        listed += all;
    }
    if (threadIdx.x == 0) to[0] = (int32_t)listed;
}

/* Queries against the samples that are among the visiting keys. */
typedef struct scoring {
    shape z;
    ls_view q, k;
    const uint8_t *pad_q;
    const rows *row;
    int64_t n, lo;           /* visiting keys: [lo, lo + n) of all */
    const ls_real *note;     /* of their owner: unpadded keys before them */
    const int32_t *key_rows; /* from list_keys; NULL: no key is padded */
    int64_t most;
    const int32_t *given;
    int64_t samples, samples_per_batch;
    uint64_t seed;
    uint32_t stream, draw;
    ls_real *top; /* (B,H,T) */
    double *sum;
} scoring;

/* The rows of samples [s, s + 4) of query t among the visiting keys, -1 for those that are not there. By the rule of
 * list_samples in probsparse.c. */
__device__ static void place_samples(const scoring *a, int64_t b, int64_t t, int64_t s, int32_t place[4])
{
    const rows r = a->row[b];
    uint32_t word[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; i++) place[i] = -1;
    if (s >= r.samples) return;
    if (a->given != NULL) {
        const int32_t *given = a->given + ((a->samples_per_batch ? b * a->z.T : 0) + t) * a->samples;
        for (int i = 0; i < 4 && s + i < r.samples; i++) {
            const int64_t at = given[s + i] - a->lo;
            if (given[s + i] >= 0 && at >= 0 && at < a->n) place[i] = (int32_t)at;
        }
        return;
    }
    const uint64_t position = (uint64_t)(a->z.query_lo + t);
    const int64_t first = integer_at(a->note + 2 * b);
    const int32_t *listed = a->key_rows == NULL ? NULL : a->key_rows + b * (1 + a->most);
    const int64_t n = listed == NULL ? a->n : listed[0];
    ls_random4_inline(a->seed, a->stream, a->draw, position << 32 | (uint64_t)s / 4, word);
    for (int i = 0; i < 4 && s + i < r.samples; i++) {
        const int64_t key = (int64_t)(((uint64_t)word[i] * (uint64_t)r.keys) >> 32) - first;
        if (key >= 0 && key < n) place[i] = listed == NULL ? (int32_t)key : listed[1 + key];
    }
}

/* The product of two rows by LANES lanes, each of which gets it: the additions of product() in probsparse.c. */
__device__ static ls_real product(int64_t d, const ls_real *x, const ls_real *y)
{
    ls_real sum = 0;
    for (int64_t e = threadIdx.x % LANES; e < d; e += LANES) sum += x[e] * y[e];
    for (int n = LANES / 2; n > 0; n /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, n);
    return sum;
}

/* One warp per query. What is exact in any order, max and sum, is shared out as it comes. */
__global__ static void score_samples(scoring a)
{
    __shared__ int32_t lists[WARPS][DRAWN];
    const int lane = threadIdx.x % LS_WARP, half = lane / LANES;
    int32_t *list = lists[threadIdx.x / LS_WARP];
    LS_EACH_ROW(at, a.z.B * a.z.H * a.z.T)
    {
        const int64_t t = at % a.z.T, h = at / a.z.T % a.z.H, b = at / a.z.T / a.z.H;
        if (ls_is_padded(a.pad_q, b * a.z.T + t)) continue;
        const ls_real *q = ls_row(a.q, b, h, t);
        const int64_t samples = a.row[b].samples;
        const double big = a.row[b].big;
        ls_real top = -INFINITY;
        double sum = 0;
        for (int64_t s = 0; s < samples; s += DRAWN) {
            int32_t place[4];
            place_samples(&a, b, t, s + 4 * lane, place);
            int n = 0;
            for (int i = 0; i < 4; i++) n += place[i] >= 0;
            const int mine = n;
            for (int step = 1; step < LS_WARP; step *= 2) {
                const int other = __shfl_sync(0xffffffffu, n, lane >= step ? lane - step : lane);
                if (lane >= step) n += other;
            }
            int to = n - mine;
            for (int i = 0; i < 4; i++)
                if (place[i] >= 0) list[to++] = place[i];
            n = __shfl_sync(0xffffffffu, n, LS_WARP - 1);
            __syncwarp();
            for (int i = 0; i < n; i += 2) { /* one for each half of the warp; of an odd number the last for both */
                const int alive = i + half < n;
                const ls_real x = product(a.z.d, q, ls_row(a.k, b, h, list[alive ? i + half : i]));
                top = alive && x > top ? x : top;
                sum += alive ? ((double)x + big) - big : 0;
            }
            __syncwarp();
        }
        const ls_real other = __shfl_xor_sync(0xffffffffu, top, LANES);
        sum += __shfl_xor_sync(0xffffffffu, sum, LANES);
        top = other > top ? other : top;
        if (lane != 0) continue;
        a.top[at] = top > a.top[at] ? top : a.top[at];
        a.sum[at] += sum;
    }
}

static ls_status scores(ls_pass *p, int phase)
{
    const ls_block *v = &p->visit;
    (void)phase;
    if (v->n == 0) return LS_OK;
    int32_t *listed = v->pad == NULL ? NULL : (int32_t *)p->work[KEY_ROWS];
    if (listed != NULL)
        LS_LAUNCH(p->queue, list_keys, (int)p->B, threads_for(v->n / 8), 0, v->pad, v->n, p->all_keys, listed);
    scoring a;
    a.z = shape_of(p);
    a.q = p->q, a.k = v->k, a.pad_q = p->pad_q, a.row = rows_of(p);
    a.n = v->n, a.lo = v->span[0].lo, a.note = v->note, a.key_rows = listed, a.most = p->all_keys;
    a.given = p->given_samples, a.samples = p->samples, a.samples_per_batch = p->samples_per_batch;
    a.seed = p->seed, a.stream = p->stream * 65536u, a.draw = (uint32_t)p->draw;
    a.top = p->work[TOP], a.sum = (double *)p->work[SUM];
    LS_LAUNCH(p->queue, score_samples, ls_blocks(p->B * p->H * p->T, WARPS), LS_THREADS, 0, a);
    return ls_launched(p->queue, "probsparse: scores");
}

/* ------------------------------------------------------------------------------------------------ selection */

/* score (B,H,T) of this rank's queries: M, no number being worse than any; 0 where padded. */
__global__ static void measure(shape z, const uint8_t *pad, const rows *row, const ls_real *top, const double *sum,
                               order *score)
{
    LS_EACH(at, z.B * z.H * z.T)
    {
        const int64_t b = at / z.T / z.H;
        const rows r = row[b];
        const double mean = r.samples == 0 ? 0 : sum[at] / (double)r.keys;
        ls_real M = r.samples == 0 ? 0 : (ls_real)((double)top[at] - mean);
        M = M == 0 ? 0 : M == M ? M : -INFINITY; /* -0 is 0 */
        score[at] = ls_is_padded(pad, b * z.T + at % z.T) ? 0 : ordered(M);
    }
}

/* picked (B,H,most): the indices of the u best of score (B,H,n), rising, then -1; of equals the first are better. One
 * block for each (b,h): four bits of the u-th best score at a time, counted by each thread for itself. */
__global__ static void select_best(const order *score, int64_t n, const rows *row, int64_t H, int64_t most,
                                   int32_t *picked)
{
    enum { BITS = 4, DIGITS = 1 << BITS, EACH = 8 };
    __shared__ int counts[DIGITS][LS_THREADS], warps[WARPS][DIGITS], digits[DIGITS], scratch[WARPS];
    const int me = threadIdx.x, lane = me % LS_WARP, warp = me / LS_WARP, threads = blockDim.x;
    const int64_t g = blockIdx.x;
    int64_t want = row[g / H].top;
    order worst = 0, known = 0; /* the u-th best as far as it is known, the mask of that part */
    score += g * n;
    picked += g * most;
    for (int shift = 8 * (int)sizeof worst - BITS; shift >= 0; shift -= BITS) {
        for (int digit = 0; digit < DIGITS; digit++) counts[digit][me] = 0;
        for (int64_t i = me; i < n; i += threads)
            if (((score[i] ^ worst) & known) == 0) counts[score[i] >> shift & (DIGITS - 1)][me]++;
        __syncwarp();
        /* a lane adds up one digit for half a warp, each lane starting at another thread: in another bank */
        int sum = 0;
        const int mine = lane % DIGITS, half = warp * LS_WARP + lane / DIGITS * DIGITS;
        for (int i = 0; i < DIGITS; i++) sum += counts[mine][half + (i + mine) % DIGITS];
        sum += __shfl_xor_sync(0xffffffffu, sum, DIGITS);
        if (lane < DIGITS) warps[warp][mine] = sum;
        __syncthreads();
        if (me < DIGITS) {
            digits[me] = 0;
            for (int w = 0; w < threads / LS_WARP; w++) digits[me] += warps[w][me];
        }
        __syncthreads();
        int digit = DIGITS - 1;
        for (; digit > 0 && digits[digit] < want; digit--) want -= digits[digit];
        worst |= (order)digit << shift;
        known |= (order)(DIGITS - 1) << shift;
    }
    /* all that are better, and the first `want` of those that equal it; counted together, in two halves of an int */
    int64_t better = 0, equal = 0;
    for (int64_t base = 0; base < n; base += EACH * threads) {
        const int64_t lo = base + EACH * (int64_t)me, hi = ls_min(n, lo + EACH);
        int mine = 0, all;
        for (int64_t i = lo; i < hi; i++) mine += score[i] > worst ? 1 : score[i] == worst && worst > 0 ? 1 << 16 : 0;
        const int before = count_before(mine, scratch, &all);
        int64_t greater = better + (before & 0xffff), same = equal + (before >> 16);
        for (int64_t i = lo; i < hi; i++) {
            const int is_greater = score[i] > worst, is_same = score[i] == worst && worst > 0;
            if (is_greater || (is_same && same < want)) picked[greater + ls_min(same, want)] = (int32_t)i;
            greater += is_greater;
            same += is_same;
        }
        better += all & 0xffff;
        equal += all >> 16;
    }
    for (int64_t i = better + ls_min(equal, want) + me; i < most; i += threads) picked[i] = -1;
}

/* mine [slot][B][H] (M, position), -1 where a slot is not used. */
__global__ static void offer(shape z, const rows *row, const int32_t *picked, const ls_real *top, const double *sum,
                             ls_real *mine)
{
    LS_EACH(i, z.B * z.H * z.u)
    {
        const int64_t g = i / z.u, slot = i % z.u, t = picked[i], at = g * z.T + t;
        const rows r = row[g / z.H];
        ls_real *to = mine + (slot * z.B * z.H + g) * OFFERED;
        to[0] = 0, to[1] = -1, to[2] = 0;
        if (t < 0) continue;
        const double mean = r.samples == 0 ? 0 : sum[at] / (double)r.keys;
        const ls_real M = r.samples == 0 ? 0 : (ls_real)((double)top[at] - mean);
        to[0] = M == M ? M : -INFINITY;
        put_integer(z.query_lo + t, to + 1);
    }
}

static ls_status offers(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H;
    order *score = (order *)p->work[SCORE];
    int32_t *picked = (int32_t *)p->work[PICKED];
    const double *sum = (const double *)p->work[SUM];
    LS_LAUNCH(p->queue, measure, ls_blocks(BH * p->T, LS_THREADS), LS_THREADS, 0, z, p->pad_q, rows_of(p), p->work[TOP],
              sum, score);
    LS_LAUNCH(p->queue, select_best, (int)BH, threads_for(p->T / 4), 0, score, p->T, rows_of(p), p->H, z.u, picked);
    LS_LAUNCH(p->queue, offer, ls_blocks(BH * z.u, LS_THREADS), LS_THREADS, 0, z, rows_of(p), picked, p->work[TOP], sum,
              p->gathered[phase + 1].mine);
    return ls_launched(p->queue, "probsparse: offers");
}

/* score (B,H,slots) of all [slot][B][H] (M, position). */
__global__ static void measure_offers(int64_t BH, int64_t slots, const ls_real *all, order *score)
{
    LS_EACH(i, BH * slots)
    {
        const ls_real *from = all + (i % slots * BH + i / slots) * OFFERED;
        score[i] = from[1] < 0 ? 0 : ordered(from[0] == 0 ? ls_real(0) : from[0]);
    }
}

__global__ static void clear_choice(int64_t n, int32_t *slot, uint8_t *selected)
{
    LS_EACH(i, n)
    {
        slot[i] = -1;
        if (selected != NULL) selected[i] = 0;
    }
}

__global__ static void choose(shape z, const int32_t *picked, const ls_real *all, int64_t *chosen, int32_t *slot,
                              uint8_t *selected)
{
    LS_EACH(i, z.B * z.H * z.u)
    {
        const int64_t g = i / z.u;
        chosen[i] = picked[i] < 0 ? -1 : integer_at(all + (picked[i] * z.B * z.H + g) * OFFERED + 1);
        const int64_t t = own_row(&z, chosen[i]);
        if (chosen[i] < 0 || t < 0) continue;
        slot[g * z.T + t] = (int32_t)(i % z.u);
        if (selected != NULL) selected[g * z.T + t] = 1;
    }
}

/* The same candidates in the same order on every rank: ranks hold rising positions, so slots do too. */
static ls_status choice(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const ls_collection *g = &p->gathered[phase];
    const int64_t BH = p->B * p->H, slots = g->total / (BH * OFFERED);
    order *score = (order *)p->work[SCORE];
    int32_t *picked = (int32_t *)p->work[PICKED];
    LS_LAUNCH(p->queue, clear_choice, ls_blocks(BH * p->T, LS_THREADS), LS_THREADS, 0, BH * p->T, slots_of(p),
              p->selected);
    LS_LAUNCH(p->queue, measure_offers, ls_blocks(BH * slots, LS_THREADS), LS_THREADS, 0, BH, slots, g->all, score);
    LS_LAUNCH(p->queue, select_best, (int)BH, threads_for(slots / 4), 0, score, slots, rows_of(p), p->H, z.u, picked);
    LS_LAUNCH(p->queue, choose, ls_blocks(BH * z.u, LS_THREADS), LS_THREADS, 0, z, picked, g->all, chosen_of(p),
              slots_of(p), p->selected);
    return ls_launched(p->queue, "probsparse: choice");
}

/* ------------------------------------------------------------------------------------------------ sums of rows */

/* sum (B,H,chunks,d): rows of x that are neither padded nor selected (slot NULL: whether selected or not). */
__global__ static void sum_chunks(ls_view x, const uint8_t *pad, const int32_t *slot, int64_t B, int64_t H, int64_t n,
                                  int64_t d, double *sum)
{
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    LS_EACH(i, B * H * chunks * d)
    {
        const int64_t e = i % d, c = i / d % chunks, g = i / d / chunks, b = g / H, h = g % H;
        double total = 0;
        for (int64_t t = c * CHUNK; t < ls_min(n, (c + 1) * CHUNK); t++) {
            const int left_out = ls_is_padded(pad, b * n + t) || (slot != NULL && slot[g * n + t] >= 0);
            total += left_out ? 0 : (double)ls_row(x, b, h, t)[e];
        }
        sum[i] = total;
    }
}

/* sum (B,H,chunks,d) := the sum of the chunks before (reverse: after) each; total (B,H,d): of all. */
__global__ static void scan_chunks(int64_t BH, int64_t chunks, int64_t d, int reverse, double *sum, ls_real *total)
{
    LS_EACH(i, BH * d)
    {
        const int64_t step = reverse ? -d : d;
        double *at = sum + (i / d * chunks + (reverse ? chunks - 1 : 0)) * d + i % d, so_far = 0;
        for (int64_t c0 = 0; c0 < chunks; c0 += AHEAD) {
            double own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) own[c] = c0 + c < chunks ? at[(c0 + c) * step] : 0;
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 + c < chunks) at[(c0 + c) * step] = so_far;
                so_far += own[c];
            }
        }
        total[i] = (ls_real)so_far;
    }
}

static void sum_rows(ls_pass *p, ls_view x, const uint8_t *pad, const int32_t *slot, int64_t n, int reverse,
                     ls_real *total)
{
    const int64_t BH = p->B * p->H, chunks = chunks_of(n);
    double *sum = (double *)p->work[CHUNK_SUMS];
    LS_LAUNCH(p->queue, sum_chunks, ls_blocks(BH * chunks * p->d, LS_THREADS), LS_THREADS, 0, x, pad, slot, p->B, p->H,
              n, p->d, sum);
    LS_LAUNCH(p->queue, scan_chunks, ls_blocks(BH * p->d, LS_THREADS), LS_THREADS, 0, BH, chunks, p->d, reverse, sum,
              total);
}

/* ------------------------------------------------------------------------------------------------ queries */

/* sent (B,H,u,d): the owner of a selected query sends it, the others 0. */
__global__ static void send_queries(shape z, ls_view q, const rows *row, const int64_t *chosen, ls_real *sent)
{
    LS_EACH_ROW(i, z.B * z.H * z.u)
    {
        const int64_t g = i / z.u, b = g / z.H;
        const int64_t t = i % z.u < row[b].top ? own_row(&z, chosen[i]) : -1;
        LS_EACH_LANE(e, z.d) sent[i * z.d + e] = t >= 0 ? ls_row(q, b, g % z.H, t)[e] : 0;
    }
}

static ls_status queries(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    (void)phase;
    LS_LAUNCH(p->queue, send_queries, ls_blocks(p->B * p->H * z.u, WARPS), LS_THREADS, 0, z, p->q, rows_of(p),
              chosen_of(p), p->summary[PARTIAL].sent);
    if (z.causal) sum_rows(p, p->own.v, p->own.pad, NULL, p->S, 0, p->summary[PREFIX].sent);
    return ls_launched(p->queue, "probsparse: queries");
}

__global__ static void return_queries(shape z, const rows *row, const int64_t *chosen, const ls_real *dsent, ls_view dq)
{
    LS_EACH_ROW(i, z.B * z.H * z.u)
    {
        const int64_t g = i / z.u, b = g / z.H;
        const int64_t t = i % z.u < row[b].top ? own_row(&z, chosen[i]) : -1;
        LS_EACH_LANE(e, t >= 0 ? z.d : 0) ls_row(dq, b, g % z.H, t)[e] += dsent[i * z.d + e];
    }
}

/* dv += what the rows of later ranks owe to all values of this one, more (B,H,d). */
__global__ static void add_to_values(shape z, const uint8_t *pad, const ls_real *more, ls_view dv)
{
    LS_EACH_ROW(i, z.B * z.H * z.S)
    {
        const int64_t t = i % z.S, g = i / z.S, b = g / z.H;
        LS_EACH_LANE(e, ls_is_padded(pad, b * z.S + t) ? 0 : z.d) ls_row(dv, b, g % z.H, t)[e] += more[g * z.d + e];
    }
}

static ls_status queries_backward(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    (void)phase;
    LS_LAUNCH(p->queue, return_queries, ls_blocks(p->B * p->H * z.u, WARPS), LS_THREADS, 0, z, rows_of(p), chosen_of(p),
              p->summary[PARTIAL].dsent, p->dq);
    if (z.causal)
        LS_LAUNCH(p->queue, add_to_values, ls_blocks(p->B * p->H * p->S, WARPS), LS_THREADS, 0, z, p->own.pad,
                  p->summary[PREFIX].dsent, p->own.dv);
    return ls_launched(p->queue, "probsparse: queries, backward");
}

/* ------------------------------------------------------------------------------------------------ partial softmax */

/* scaled (B,H,R,d) = scale·q of the selected, got (B,H,u,d); 0 for the mean. */
__global__ static void scale_queries(shape z, ls_real scale, const ls_real *got, ls_real *scaled)
{
    LS_EACH_ROW(i, z.B * z.H * z.R)
    {
        const int64_t g = i / z.R, r = i % z.R - z.lead;
        LS_EACH_LANE(e, z.d) scaled[i * z.d + e] = r < 0 ? 0 : scale * got[(g * z.u + r) * z.d + e];
    }
}

/* to (B,H,n,d) = the S rows of x, 0 where padded and after them. */
__global__ static void copy_rows(shape z, ls_view x, const uint8_t *pad, int64_t n, ls_real *to)
{
    LS_EACH_ROW(i, z.B * z.H * n)
    {
        const int64_t t = i % n, g = i / n, b = g / z.H;
        const int dead = t >= z.S || ls_is_padded(pad, b * z.S + t);
        LS_EACH_LANE(e, z.d) to[i * z.d + e] = dead ? 0 : ls_row(x, b, g % z.H, t)[e];
    }
}

/* The keys that row r of a softsum may see, pads aside: this rank's [0, seen). */
__device__ static int64_t keys_seen(const shape *z, const rows *row, const int64_t *chosen, int64_t g, int64_t r)
{
    if (r >= z->lead + row[g / z->H].top) return 0;
    if (!z->causal) return z->S;
    return ls_min(z->S, ls_max(0, chosen[g * z->u + r] + 1 - z->key_lo));
}

/* logits (B,H,n,R') of rows [first, first + R') become e^(l - m), m the chunk's maximum; 0 where a key is not seen.
 * most, sum (B,H,chunks,R'): m and Σ e. A block has chunk c of g; warps share the keys, lanes the rows. */
__global__ static void weigh_chunks(shape z, int64_t first, int64_t R, const uint8_t *pad, const rows *row,
                                    const int64_t *chosen, ls_real *logits, double *most, double *sum)
{
    __shared__ ls_real tops[WARPS][TOGETHER];
    __shared__ double sums[WARPS][TOGETHER];
    const int warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    const int64_t chunks = chunks_of(z.S), c = blockIdx.x % chunks, g = blockIdx.x / chunks, state = blockIdx.x * R;
    const uint8_t *dead = pad == NULL ? NULL : pad + g / z.H * z.S;
    ls_real *l = logits + state * CHUNK;
    const int64_t lo = c * CHUNK, hi = ls_min(z.S, lo + CHUNK);
    LS_EACH_LANE(r, R)
    {
        const int64_t seen = ls_min(hi, keys_seen(&z, row, chosen, g, first + r));
        ls_real top = -INFINITY;
        for (int64_t j = lo + warp; j < seen; j += warps)
            if (!ls_is_padded(dead, j)) top = l[(j - lo) * R + r] > top ? l[(j - lo) * R + r] : top;
        tops[warp][r] = top;
    }
    __syncthreads();
    LS_EACH_LANE(r, R)
    {
        const int64_t seen = ls_min(hi, keys_seen(&z, row, chosen, g, first + r));
        ls_real top = tops[0][r];
        double total = 0;
        for (int w = 1; w < warps; w++) top = tops[w][r] > top ? tops[w][r] : top;
        for (int64_t j = lo + warp; j < lo + CHUNK; j += warps) {
            const int alive = j < seen && !ls_is_padded(dead, j);
            const ls_real e = alive ? ls_exp(l[(j - lo) * R + r] - (top == -INFINITY ? 0 : top)) : 0;
            l[(j - lo) * R + r] = e;
            total += (double)e;
        }
        sums[warp][r] = total;
        if (warp == 0) most[state + r] = (double)top;
    }
    __syncthreads();
    for (int64_t r = threadIdx.x; r < R; r += blockDim.x) {
        double total = 0;
        for (int w = 0; w < warps; w++) total += sums[w][r];
        sum[state + r] = total;
    }
}

/* to = Σ_c weight_c x_c in double, for one row of part (chunks,R',d): weight_c = e^(most_c - top), or 1. A block; warps
 * share the chunks. */
__device__ static void join_rows(int64_t chunks, int64_t R, int64_t d, const ls_real *part, const double *most,
                                 double top, ls_real *to)
{
    __shared__ double sums[WARPS][LS_WARP];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t at = 0; at < d; at += LS_WARP) {
        const int64_t e = at + lane;
        double total = 0;
        for (int64_t c = warp; c < chunks && e < d; c += warps) {
            const double weight = most == NULL ? 1 : exp(most[c * R] - top);
            total += weight * (double)part[c * R * d + e];
        }
        sums[warp][lane] = total;
        __syncthreads();
        if (warp == 0 && e < d) {
            for (int w = 1; w < warps; w++) total += sums[w][lane];
            to[e] = (ls_real)total;
        }
        __syncthreads();
    }
}

/* The chunks' softsums become this rank's, sent (B,H,R,2+d). Block g·R' + r. */
__global__ static void join_chunks(shape z, int64_t first, int64_t R, int64_t chunks, const double *most,
                                   const double *sum, const ls_real *part, ls_real *sent)
{
    __shared__ double scratch[LS_WARP];
    const int64_t g = blockIdx.x / R, r = blockIdx.x % R;
    ls_real *to = sent + (g * z.R + first + r) * (z.d + 2);
    double top = -INFINITY, total = 0;
    most += g * chunks * R + r;
    sum += g * chunks * R + r;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) top = most[c * R] > top ? most[c * R] : top;
    top = ls_block_max(top, scratch);
    const double shift = top == -INFINITY ? 0 : top;
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) total += exp(most[c * R] - shift) * sum[c * R];
    total = ls_block_sum(total, scratch);
    if (threadIdx.x == 0) to[0] = (ls_real)top, to[1] = (ls_real)total;
    join_rows(chunks, R, z.d, part + (g * chunks * R + r) * z.d, most, shift, to + 2);
}

static ls_view matrices(ls_real *x, int64_t H, int64_t n, int64_t width)
{
    ls_view v;
    v.p = x, v.sb = H * n * width, v.sh = n * width, v.st = width;
    return v;
}

/* rows (S,R') = rows of x times the rows [first, first + R') of y (R, ...), in the layout of logits. */
static void multiply_rows(ls_pass *p, ls_view x, ls_view y, int64_t first, int64_t R, ls_real *to)
{
    y.p += first * y.st;
    ls_gemm_heads(p->queue, 0, 1, p->S, R, p->d, 1, x, y, 0, matrices(to, p->H, chunks_of(p->S) * CHUNK, R), p->B,
                  p->H);
}

/* The sum over the keys of a chunk of its logits times rows x (B,H,n,d), for all chunks: PART (B,H,chunks,R',d). */
static void multiply_chunks(ls_pass *p, double scale, const ls_real *logits, const ls_real *x, int64_t R)
{
    ls_gemm_batch(p->queue, 1, 0, R, p->d, CHUNK, scale, logits, R, CHUNK * R, x, p->d, CHUNK * p->d, 0, p->work[PART],
                  p->d, R * p->d, p->B * p->H * chunks_of(p->S));
}

static void start_partial(ls_pass *p, const shape *z)
{
    LS_LAUNCH(p->queue, scale_queries, ls_blocks(p->B * p->H * z->R, WARPS), LS_THREADS, 0, *z, (ls_real)p->scale,
              p->summary[PARTIAL].got, p->work[SCALED]);
}

static ls_status partial(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H, chunks = chunks_of(p->S), n = chunks * CHUNK, some = together(&z);
    double *most = (double *)p->work[STATE], *sum = most + BH * chunks * some;
    (void)phase;
    start_partial(p, &z);
    LS_LAUNCH(p->queue, copy_rows, ls_blocks(BH * n, WARPS), LS_THREADS, 0, z, p->own.v, p->own.pad, n,
              p->work[VALUES]);
    for (int64_t first = 0; first < z.R; first += some) {
        const int64_t R = ls_min(some, z.R - first);
        if (chunks > 0) {
            multiply_rows(p, p->own.k, matrices(p->work[SCALED], p->H, z.R, p->d), first, R, p->work[LOGITS]);
            LS_LAUNCH(p->queue, weigh_chunks, (int)(BH * chunks), threads_for(4 * p->S), 0, z, first, R, p->own.pad,
                      rows_of(p), chosen_of(p), p->work[LOGITS], most, sum);
            multiply_chunks(p, 1, p->work[LOGITS], p->work[VALUES], R);
        }
        LS_LAUNCH(p->queue, join_chunks, (int)(BH * R), threads_for(4 * chunks), 0, z, first, R, chunks, most, sum,
                  p->work[PART], p->summary[SUMS].sent);
    }
    return ls_launched(p->queue, "probsparse: partial");
}

/* logits become e, dlogits e (dx·v + ds), from what was sent and its gradient; 0 where a key is not seen. */
__global__ static void weigh_chunks_backward(shape z, int64_t first, int64_t R, const uint8_t *pad, const rows *row,
                                             const int64_t *chosen, const ls_real *sent, const ls_real *dsent,
                                             ls_real *logits, ls_real *dlogits)
{
    const int warp = threadIdx.x / LS_WARP;
    const int64_t chunks = chunks_of(z.S), g = blockIdx.x / chunks, lo = blockIdx.x % chunks * CHUNK;
    const int64_t at = blockIdx.x * CHUNK * R;
    const uint8_t *dead = pad == NULL ? NULL : pad + g / z.H * z.S;
    LS_EACH_LANE(r, R)
    {
        const int64_t seen = keys_seen(&z, row, chosen, g, first + r), element = (g * z.R + first + r) * (z.d + 2);
        const ls_real m = sent[element] == -INFINITY ? 0 : sent[element], ds = dsent[element + 1];
        for (int64_t j = lo + warp; j < lo + CHUNK; j += WARPS) {
            const int64_t i = at + (j - lo) * R + r;
            const int alive = j < seen && !ls_is_padded(dead, j);
            const ls_real e = alive ? ls_exp(logits[i] - m) : 0;
            dlogits[i] = alive ? e * (dlogits[i] + ds) : 0;
            logits[i] = e;
        }
    }
}

/* dgot (B,H,u,d) = Σ over chunks of part (B,H,chunks,R',d), for the rows that are queries. Block g·R' + r. */
__global__ static void join_gradients(shape z, int64_t first, int64_t R, int64_t chunks, const ls_real *part,
                                      ls_real *dgot)
{
    const int64_t g = blockIdx.x / R, r = blockIdx.x % R, slot = first + r - z.lead;
    if (slot < 0) return;
    join_rows(chunks, R, z.d, part + (g * chunks * R + r) * z.d, NULL, 0, dgot + (g * z.u + slot) * z.d);
}

static ls_status partial_backward(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H, d = p->d, chunks = chunks_of(p->S), n = chunks * CHUNK, some = together(&z);
    const ls_real *sent = p->summary[SUMS].sent;
    ls_real *dsent = p->summary[SUMS].dsent;
    const ls_view scaled = matrices(p->work[SCALED], p->H, z.R, d), dx = matrices(dsent, p->H, z.R, d + 2);
    start_partial(p, &z);
    LS_LAUNCH(p->queue, copy_rows, ls_blocks(BH * n, WARPS), LS_THREADS, 0, z, p->own.k, p->own.pad, n, p->work[KEYS]);
    for (int64_t first = 0; first < z.R; first += some) {
        const int64_t R = ls_min(some, z.R - first);
        ls_view this_q = scaled, this_dx = dx;
        this_q.p += first * this_q.st, this_dx.p += first * this_dx.st + 2;
        if (chunks > 0) {
            const ls_view e = matrices(p->work[LOGITS], p->H, n, R), de = matrices(p->work[DLOGITS], p->H, n, R);
            multiply_rows(p, p->own.k, scaled, first, R, p->work[LOGITS]);
            multiply_rows(p, p->own.v, this_dx, 0, R, p->work[DLOGITS]);
            LS_LAUNCH(p->queue, weigh_chunks_backward, (int)(BH * chunks), LS_THREADS, 0, z, first, R, p->own.pad,
                      rows_of(p), chosen_of(p), sent, dsent, p->work[LOGITS], p->work[DLOGITS]);
            ls_gemm_heads(p->queue, 0, 0, p->S, d, R, 1, e, this_dx, 1, p->own.dv, p->B, p->H);
            ls_gemm_heads(p->queue, 0, 0, p->S, d, R, 1, de, this_q, 1, p->own.dk, p->B, p->H);
            multiply_chunks(p, p->scale, p->work[DLOGITS], p->work[KEYS], R);
        }
        LS_LAUNCH(p->queue, join_gradients, (int)(BH * R), threads_for(4 * chunks), 0, z, first, R, chunks,
                  p->work[PART], p->summary[phase].dgot);
    }
    return ls_launched(p->queue, "probsparse: partial, backward");
}

/* ------------------------------------------------------------------------------------------------ apply */

/* Feature e of o = x / s, 0 where there was no key. */
__device__ static inline ls_real output_of(const ls_real *element, int64_t e)
{
    return element[1] > 0 ? element[2 + e] / element[1] : 0;
}

/* NS, NC: the selected queries have their softmax, the others the mean. */
__global__ static void write_rows(shape z, const uint8_t *pad, const int32_t *slot, const ls_real *got, ls_view out)
{
    LS_EACH_ROW(i, z.B * z.H * z.T)
    {
        const int64_t t = i % z.T, g = i / z.T, b = g / z.H;
        const int dead = ls_is_padded(pad, b * z.T + t);
        const ls_real *element = got + (g * z.R + (slot[i] < 0 ? 0 : z.lead + slot[i])) * (z.d + 2);
        LS_EACH_LANE(e, z.d) ls_row(out, b, g % z.H, t)[e] = dead ? 0 : output_of(element, e);
    }
}

/* CS: the others have the sum so far. sum (B,H,chunks,d): of this rank's chunks before; before (B,H,d): of the ranks.
 */
__global__ static void write_prefixes(shape z, ls_view v, const uint8_t *pad, const uint8_t *pad_q, const int32_t *slot,
                                      const ls_real *got, const double *sum, const ls_real *before, ls_view out)
{
    const int64_t chunks = (z.T + CHUNK - 1) / CHUNK, d = z.d;
    LS_EACH(i, z.B * z.H * chunks * d)
    {
        const int64_t e = i % d, c = i / d % chunks, g = i / d / chunks, b = g / z.H, h = g % z.H;
        double so_far = (double)before[g * d + e] + sum[i];
        for (int64_t t = c * CHUNK; t < ls_min(z.T, (c + 1) * CHUNK); t++) {
            const int32_t r = slot[g * z.T + t];
            so_far += ls_is_padded(pad, b * z.T + t) ? 0 : (double)ls_row(v, b, h, t)[e];
            const ls_real o = r < 0 ? (ls_real)so_far : output_of(got + (g * z.R + r) * (d + 2), e);
            ls_row(out, b, h, t)[e] = ls_is_padded(pad_q, b * z.T + t) ? 0 : o;
        }
    }
}

static ls_status apply(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H;
    const ls_real *got = p->summary[phase].got;
    if (z.causal)
        LS_LAUNCH(p->queue, write_prefixes, ls_blocks(BH * chunks_of(p->T) * p->d, LS_THREADS), LS_THREADS, 0, z,
                  p->own.v, p->own.pad, p->pad_q, slots_of(p), got, (const double *)p->work[CHUNK_SUMS],
                  p->summary[PREFIX].got, p->out);
    else
        LS_LAUNCH(p->queue, write_rows, ls_blocks(BH * p->T, WARPS), LS_THREADS, 0, z, p->pad_q, slots_of(p), got,
                  p->out);
    return ls_launched(p->queue, "probsparse: apply");
}

/* dgot (B,H,R,2+d): dx = do/s, ds = -do·o/s of the selected rows of this rank, and of the mean, to which its other rows
 * gave rest (B,H,d). */
__global__ static void give_back(shape z, const rows *row, const int64_t *chosen, const ls_real *got, ls_view dout,
                                 const ls_real *rest, ls_real *dgot)
{
    LS_EACH_ROW(i, z.B * z.H * z.R)
    {
        const int64_t g = i / z.R, b = g / z.H, r = i % z.R - z.lead;
        const int64_t t = r >= 0 && r < row[b].top ? own_row(&z, chosen[g * z.u + r]) : -1;
        const ls_real *from = r < 0 ? rest + g * z.d : t >= 0 ? ls_row(dout, b, g % z.H, t) : NULL;
        const ls_real *element = got + i * (z.d + 2);
        ls_real *to = dgot + i * (z.d + 2);
        const double s = (double)element[1];
        const int alive = from != NULL && s > 0;
        double dot = 0;
        LS_EACH_LANE(e, z.d)
        {
            const double share = alive ? (double)from[e] / s : 0;
            to[2 + e] = (ls_real)share;
            dot += alive ? share * (double)element[2 + e] : 0;
        }
        dot = ls_warp_sum(dot);
        if (threadIdx.x % LS_WARP == 0) to[0] = 0, to[1] = alive ? (ls_real)(-dot / s) : 0;
    }
}

__global__ static void clear_rows(int64_t B, int64_t H, int64_t n, int64_t d, ls_view x)
{
    LS_EACH_ROW(i, B * H * n)
    {
        LS_EACH_LANE(e, d) ls_row(x, i / n / H, i / n % H, i % n)[e] = 0;
    }
}

/* CS: a value has its gradient from the rows that are not before it. sum (B,H,chunks,d): of the chunks after. */
__global__ static void write_suffixes(shape z, ls_view dout, const uint8_t *pad, const uint8_t *pad_q,
                                      const int32_t *slot, const double *sum, ls_view dv)
{
    const int64_t chunks = (z.T + CHUNK - 1) / CHUNK, d = z.d;
    LS_EACH(i, z.B * z.H * chunks * d)
    {
        const int64_t e = i % d, c = i / d % chunks, g = i / d / chunks, b = g / z.H, h = g % z.H;
        double so_far = sum[i];
        for (int64_t t = ls_min(z.T, (c + 1) * CHUNK) - 1; t >= c * CHUNK; t--) {
            const int left_out = ls_is_padded(pad_q, b * z.T + t) || slot[g * z.T + t] >= 0;
            so_far += left_out ? 0 : (double)ls_row(dout, b, h, t)[e];
            ls_row(dv, b, h, t)[e] = ls_is_padded(pad, b * z.T + t) ? 0 : (ls_real)so_far;
        }
    }
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    const shape z = shape_of(p);
    const int64_t BH = p->B * p->H, d = p->d;
    ls_real *rest = z.causal ? p->summary[PREFIX].dgot : p->work[REST];
    sum_rows(p, p->dout, p->pad_q, slots_of(p), p->T, 1, rest);
    LS_LAUNCH(p->queue, give_back, ls_blocks(BH * z.R, WARPS), LS_THREADS, 0, z, rows_of(p), chosen_of(p),
              p->summary[phase].got, p->dout, rest, p->summary[phase].dgot);
    LS_LAUNCH(p->queue, clear_rows, ls_blocks(BH * p->T, WARPS), LS_THREADS, 0, p->B, p->H, p->T, d, p->dq);
    LS_LAUNCH(p->queue, clear_rows, ls_blocks(BH * p->S, WARPS), LS_THREADS, 0, p->B, p->H, p->S, d, p->own.dk);
    if (z.causal)
        LS_LAUNCH(p->queue, write_suffixes, ls_blocks(BH * chunks_of(p->T) * d, LS_THREADS), LS_THREADS, 0, z, p->dout,
                  p->own.pad, p->pad_q, slots_of(p), (const double *)p->work[CHUNK_SUMS], p->own.dv);
    else
        LS_LAUNCH(p->queue, clear_rows, ls_blocks(BH * p->S, WARPS), LS_THREADS, 0, p->B, p->H, p->S, d, p->own.dv);
    return ls_launched(p->queue, "probsparse: apply, backward");
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_cuda_kernel kernels[] = {
    {"count", count, NULL},
    {"totals", totals, NULL},
    {"scores", scores, NULL},
    {"offers", offers, NULL},
    {"choice", choice, NULL},
    {"queries", queries, queries_backward},
    {"partial", partial, partial_backward},
    {"apply", apply, apply_backward},
    {NULL, NULL, NULL},
};

extern "C" const ls_cuda_mechanism ls_probsparse_cuda = {plan, kernels, NULL};
