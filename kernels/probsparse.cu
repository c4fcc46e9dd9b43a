/* ProbSparse attention on a GPU: which queries are selected; probsparse_attend.cu has what they see. What is computed,
 * and why the top is the same on any ranks, stands in probsparse.c.
 *
 *   counts      one warp per row of q, k; the ranks' counts become totals in one block
 *   scores      one warp per query: its lanes draw the samples, list those that are here, and half a warp makes a
 *               product, in the CPU's order of additions
 *   selection   one block per (b,h): a radix search for the u-th best key, then what is not worse, by rising index */
#include "probsparse_cuda.h"
#include "rng_inline.h"

#include <type_traits>

namespace ls_probsparse
{

enum { TILES = 128 }; /* blocks that count the rows of a batch row */
enum { DRAWN = 128 }; /* samples drawn at a time by a warp: four for each lane */

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
    double largest; /* of ls_real: nothing pads a tally, which is read whole */
} tally;

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

/* to (B,TILES): unpadded rows, and the largest |x| in them. The warps of blocks (b,i) share the rows of b, of which a
 * warp has DEEP on their way at a time. */
__global__ static void tally_rows(ls_view x, const uint8_t *pad, int64_t H, int64_t n, int64_t d, tally *to)
{
    __shared__ ls_real largest[LS_WARP];
    __shared__ int64_t counted[LS_WARP];
    constexpr int DEEP = 8;
    const int64_t b = blockIdx.x, warps = blockDim.x / LS_WARP, step = gridDim.y * warps;
    int64_t i = blockIdx.y * warps + threadIdx.x / LS_WARP, t = i / H, h = i % H, count = 0;
    const int64_t step_t = step / H, step_h = step % H;
    ls_real most = 0;
    while (i < n * H) {
        const ls_real *row[DEEP];
#pragma unroll
        for (int u = 0; u < DEEP; u++) {
            const bool there = i < n * H && !ls_is_padded(pad, b * n + t);
            row[u] = there ? ls_row(x, b, h, t) : NULL;
            count += there && h == 0;
            i += step, t += step_t, h += step_h;
            if (h >= H) h -= H, t++;
        }
        LS_EACH_LANE(e, d)
        {
            ls_real size[DEEP];
#pragma unroll
            for (int u = 0; u < DEEP; u++) size[u] = row[u] == NULL ? 0 : row[u][e];
#pragma unroll
            for (int u = 0; u < DEEP; u++) {
                const ls_real positive = size[u] < 0 ? -size[u] : size[u];
                most = positive > most ? positive : most;
            }
        }
    }
    most = ls_block_max(most, largest);
    count = ls_block_sum(threadIdx.x % LS_WARP == 0 ? count : 0, counted);
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
    const ls_real most_k = ls_block_max((ls_real)k.largest, largest);
    const ls_real most_q = ls_block_max((ls_real)q.largest, largest);
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
        const int64_t key = key_of(word[i], r.keys) - first;
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

} // namespace ls_probsparse

extern "C" const ls_cuda_mechanism ls_probsparse_cuda = {ls_probsparse::plan, ls_probsparse::kernels, NULL, NULL};
