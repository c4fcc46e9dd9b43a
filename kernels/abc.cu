/* Attention with bounded-memory control on a GPU, over all keys; abc_causal.cu has what is seen of a prefix. The
 * formulas and the names are those of abc.c.
 *
 * Logits by products; a block for each piece of the rows of a (b,h) makes its softsum, a fold over the pieces makes the
 * rank's. Queries and gradients are products of tall matrices; sums over rows are made in pieces, in double. */
#include "abc_cuda.h"

namespace ls_abc
{

enum { MOST_PIECES = 512 }; /* see pieces */

/* ------------------------------------------------------------------------------------------------ sizes */

/* For sums over all rows: as many as keep a GPU busy, of all heads together, for each has its own sum. */
static chunking pieces(const ls_pass *p, int64_t rows)
{
    const int64_t most = ls_max(1, MOST_PIECES / ls_max(1, p->B * p->H));
    const int64_t length = CHUNK * ls_max(1, ceil_of(rows, CHUNK * most));
    return {p->H, rows, length, ceil_of(rows, length)};
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    const int64_t R = slots(p), d = p->d, BH = p->B * p->H, back = p->backward, causal = p->pattern == LS_CS;
    const int64_t rows = ls_max(p->T, p->S), table = BH * rows * R, state = BH * 2 * R * (d + 2);
    const int64_t folded = ls_max(pieces(p, p->S).count, causal ? short_chunks(p, p->T).count : 0);
    const int64_t pieced = ls_max(pieces(p, p->T).count, pieces(p, p->S).count);
    const size_t z = sizeof(double);
    p->work[A_K] = ls_take(work, table);
    p->work[A_V] = ls_take(work, table);
    p->work[M_K] = ls_take(work, causal || back ? table : 0);
    p->work[M_V] = ls_take(work, causal || back ? table : 0);
    p->work[W] = ls_take(work, causal * table);
    p->work[LOGIT] = (ls_real *)ls_arena_take(work, (size_t)(causal * table) * z);
    p->work[DP] = (ls_real *)ls_arena_take(work, (size_t)(causal * back * table) * z);
    p->work[U] = (ls_real *)ls_arena_take(work, (size_t)(causal * back * table) * z);
    p->work[STATES] = (ls_real *)ls_arena_take(work, (size_t)(folded * state) * z);
    p->work[DSTATES] = (ls_real *)ls_arena_take(work, (size_t)(causal * back * folded * state) * z);
    p->work[TOPS] = (ls_real *)ls_arena_take(work, (size_t)(folded * BH * 2 * R) * z);
    p->work[PIECES] = (ls_real *)ls_arena_take(work, (size_t)(back * pieced * BH * 2 * R * d) * z);
    p->work[CENTRED] = ls_take(work, BH * 2 * R * d);
    p->work[CENTRES] = ls_take(work, BH * 2 * d);
    p->work[CONSTANTS] = ls_take(work, back * BH * 2 * R);
}

static ls_real *phi(const ls_pass *p, int which, const ls_real *base)
{
    return (ls_real *)(uintptr_t)base + p->param[which].offset;
}

/* What sum_rows has in shared memory. */
struct bench {
    double a[DEPTH * (FEW + 4)], b[DEPTH * (TILE + 4)];
};

/* ------------------------------------------------------------------------------------------------ sums of chunks */

__global__ static void hide(int64_t H, int64_t n, int64_t R, int64_t all, const uint8_t *pad, ls_real *a, ls_real *b)
{
    LS_EACH(i, all)
    {
        const int64_t row = i / R;
        if (pad[row / n / H * n + row % n]) a[i] = b[i] = -INFINITY;
    }
}

/* A_K, A_V (B,H,S,R): the keys' logits, -inf where they are padded. Logits may be large: they are not rounded, here and
 * in make_probabilities. */
void make_logits(ls_pass *p)
{
    const int64_t R = slots(p), all = p->B * p->H * p->S * R;
    if (all == 0) return;
    for (int which = 0; which < 2; which++) {
        const ls_view to = {p->work[which ? A_V : A_K], p->H * p->S * R, p->S * R, R};
        const ls_view map = {phi(p, which ? PHI_V : PHI_K, p->params), 0, 0, R};
        ls_gemm_heads_exact(p->queue, 0, 0, p->S, R, p->d, 1, which ? p->own.v : p->own.k, map, 0, to, p->B, p->H);
    }
    if (p->own.pad != NULL)
        LS_LAUNCH(p->queue, hide, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->H, p->S, R, all, p->own.pad,
                  p->work[A_K], p->work[A_V]);
}

/* blockIdx.y: keys or values. (m; s, x) of a chunk alone; tops: m once more, for the scan goes over m. For m and s a
 * thread takes every 16th row of a slot. */
__global__ static void __launch_bounds__(LS_THREADS, 4)
    sum_chunk(chunking c, int R, int d, rows k, rows v, const ls_real *a_k, const ls_real *a_v, double *states,
              double *tops)
{
    __shared__ bench x;
    const int which = blockIdx.y, stride = d + 2, group = threadIdx.x / FEW, column = threadIdx.x % FEW;
    const place at = place_of(c);
    const strip from = which ? strip_of(v, at, d) : strip_of(k, at, d);
    const ls_real *a = (which ? a_v : a_k) + (at.bh * c.rows + at.t) * R;
    const int64_t element = (at.bh * 2 + which) * c.count + at.chunk;
    double *state = states + element * R * stride, *top = tops + element * R;
    for (int r = column; r - column < R; r += FEW) {
        const int there = r < R;
        ls_real m = -INFINITY;
#pragma unroll 4
        for (int j = group; there && j < at.n; j += LS_THREADS / FEW) m = a[j * R + r] > m ? a[j * R + r] : m;
        x.a[threadIdx.x] = (double)m;
        __syncthreads();
        for (int i = 0; i < LS_THREADS / FEW; i++)
            m = (ls_real)x.a[i * FEW + column] > m ? (ls_real)x.a[i * FEW + column] : m;
        const ls_real shift = m == -INFINITY ? 0 : m;
        double s = 0;
#pragma unroll 4
        for (int j = group; there && j < at.n; j += LS_THREADS / FEW) s += (double)ls_exp(a[j * R + r] - shift);
        x.b[threadIdx.x] = s;
        __syncthreads();
        if (group > 0 || !there) continue;
        for (int i = 1; i < LS_THREADS / FEW; i++) s += x.b[i * FEW + column];
        top[r] = state[r * stride] = (double)m;
        state[r * stride + 1] = s;
    }
    __syncthreads();
    sum_rows(
        x.a, x.b, from, R,
        [&](int j, int r) { return top[r] == -INFINITY ? 0 : (double)ls_exp(a[j * R + r] - (ls_real)top[r]); },
        [](int, double y) { return y; }, [&](int r, int e, double sum) { state[r * stride + 2 + e] = sum; });
}

void sum_chunks(ls_pass *p, chunking c)
{
    if (p->B * p->H * c.count == 0) return;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    LS_LAUNCH(p->queue, sum_chunk, dim3((unsigned)(p->B * p->H * c.count), 2), LS_THREADS, 0, c, (int)slots(p),
              (int)p->d, k, v, p->work[A_K], p->work[A_V], doubles(p, STATES), doubles(p, TOPS));
}

/* A thread for each s and each entry of x: all chunks' become one. */
__global__ static void fold(int64_t groups, int64_t count, int64_t R, int64_t stride, const double *states,
                            ls_real *sent)
{
    LS_EACH(i, groups * (stride - 1))
    {
        const int64_t g = i / (stride - 1), in = i % (stride - 1) + 1;
        const double *x = states + (g / R * count * R + g % R) * stride;
        double top = -INFINITY, sum = 0;
        for (int64_t c = 0; c < count; c++) top = x[c * R * stride] > top ? x[c * R * stride] : top;
        for (int64_t c = 0; c < count; c++) sum += weight(x[c * R * stride], top) * x[c * R * stride + in];
        sent[g * stride + in] = (ls_real)sum;
        if (in == 1) sent[g * stride] = (ls_real)top;
    }
}

static ls_status sums(ls_pass *p, int phase)
{
    const ls_summary *out = &p->summary[phase + 1];
    const chunking c = pieces(p, p->S);
    make_logits(p);
    sum_chunks(p, c);
    LS_LAUNCH(p->queue, fold, ls_blocks(out->monoid.groups * (p->d + 1), LS_THREADS), LS_THREADS, 0, out->monoid.groups,
              c.count, slots(p), p->d + 2, doubles(p, STATES), out->sent);
    return ls_launched(p->queue, "abc: sums");
}

/* ------------------------------------------------------------------------------------------------ slots */

/* A block for each (b,h) and of keys, values: slots = x / s - c, c their mean, to which they sum exactly as rounded. */
__global__ static void centre_slots(int R, int d, const ls_real *got, ls_real *centred, ls_real *centres)
{
    got += (int64_t)blockIdx.x * R * (d + 2);
    centred += (int64_t)blockIdx.x * R * d;
    for (int e = threadIdx.x; e < d; e += blockDim.x) {
        double mean = 0;
        for (int r = 0; r < R; r++) {
            const ls_real *x = got + (int64_t)r * (d + 2);
            mean += x[1] > 0 ? (double)x[2 + e] / (double)x[1] : 0;
        }
        const ls_real c = (ls_real)(mean / R);
        centres[(int64_t)blockIdx.x * d + e] = c;
        for (int r = 0; r < R; r++) {
            const ls_real *x = got + (int64_t)r * (d + 2);
            centred[(int64_t)r * d + e] = (ls_real)((x[1] > 0 ? (double)x[2 + e] / (double)x[1] : 0) - (double)c);
        }
    }
}

static void make_slots(ls_pass *p, const ls_real *got)
{
    if (p->B * p->H == 0) return;
    LS_LAUNCH(p->queue, centre_slots, (int)(p->B * p->H * 2), 128, 0, (int)slots(p), (int)p->d, got, p->work[CENTRED],
              p->work[CENTRES]);
}

static ls_view slots_of(const ls_pass *p, int which)
{
    const int64_t n = slots(p) * p->d;
    return {p->work[CENTRED] + which * n, p->H * 2 * n, 2 * n, p->d};
}

static ls_view table_of(const ls_pass *p, int which, int64_t n)
{
    const int64_t R = slots(p);
    return {p->work[which], p->H * n * R, n * R, R};
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

/* Rows of a table of `rows` x R, each by a few neighbours among the lanes of a warp: by all where they are long. */
template <int LANES> struct neighbours {
    int64_t row, step;
    int lane;
    __device__ neighbours()
        : row(((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES), step((int64_t)gridDim.x * blockDim.x / LANES),
          lane(threadIdx.x % LANES)
    {
    }
    template <typename T> __device__ static T sum(T x)
    {
#pragma unroll
        for (int by = LANES / 2; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
        return x;
    }
    template <typename T> __device__ static T max(T x)
    {
#pragma unroll
        for (int by = LANES / 2; by > 0; by /= 2) {
            const T y = __shfl_xor_sync(0xffffffffu, x, by);
            x = y > x ? y : x;
        }
        return x;
    }
};

/* Starts kernel<lanes of a row> on a table of `rows` x R. */
#define LAUNCH_ROWS(queue, kernel, rows, R, ...)                                                                       \
    do {                                                                                                               \
        if ((R) <= 64)                                                                                                 \
            LS_LAUNCH(queue, kernel<4>, ls_blocks((rows)*4, LS_THREADS), LS_THREADS, 0, rows, (int)(R), __VA_ARGS__);  \
        else                                                                                                           \
            LS_LAUNCH(queue, kernel<LS_WARP>, ls_row_blocks(rows), LS_THREADS, 0, rows, (int)(R), __VA_ARGS__);        \
    } while (0)

/* p = softmax_r. All lanes of a warp stay to the end. */
template <int LANES> __global__ static void softmax_rows(int64_t rows, int R, ls_real *x)
{
    const neighbours<LANES> at;
    for (int64_t i = at.row; i - at.row < rows; i += at.step) {
        ls_real *y = x + i * R, top = -INFINITY, sum = 0;
        const int n = i < rows ? R : 0;
        for (int r = at.lane; r < n; r += LANES) top = y[r] > top ? y[r] : top;
        top = at.max(top);
        for (int r = at.lane; r < n; r += LANES) sum += y[r] = ls_exp(y[r] - top);
        sum = at.sum(sum);
        for (int r = at.lane; r < n; r += LANES) y[r] /= sum;
    }
}

/* A_K (B,H,T,R) = softmax_r(scale q·(K̃_r - c)). */
static void make_probabilities(ls_pass *p)
{
    const int64_t R = slots(p), rows = p->B * p->H * p->T;
    ls_gemm_heads_exact(p->queue, 0, 1, p->T, R, p->d, p->scale, p->q, slots_of(p, 0), 0, table_of(p, A_K, p->T), p->B,
                        p->H);
    LAUNCH_ROWS(p->queue, softmax_rows, rows, R, p->work[A_K]);
}

/* out = centre, on which the product is laid. A block for each chunk. */
__global__ static void put_centres(chunking c, int d, const ls_real *centres, ls_view out)
{
    const place at = place_of(c);
    const ls_real *from = centres + (at.bh * 2 + 1) * d;
    ls_real *to = ls_row(out, at.b, at.h, at.t);
    for (int e = threadIdx.x % LS_WARP; e < d; e += LS_WARP) {
        const ls_real x = from[e];
        for (int i = threadIdx.x / LS_WARP; i < at.n; i += LS_THREADS / LS_WARP) to[i * out.st + e] = x;
    }
}

/* A warp for each row. */
__global__ static void blank(int64_t rows, int64_t H, int64_t T, int64_t d, const uint8_t *pad, ls_view out)
{
    LS_EACH_ROW(i, rows)
    {
        const int64_t bh = i / T, b = bh / H, t = i % T;
        if (!pad[b * T + t]) continue;
        ls_real *to = ls_row(out, b, bh % H, t);
        LS_EACH_LANE(e, d) to[e] = 0;
    }
}

static ls_status apply(ls_pass *p, int phase)
{
    const int64_t rows = p->B * p->H * p->T;
    const int blocks = ls_row_blocks(rows);
    if (rows == 0) return LS_OK;
    make_slots(p, p->summary[phase].got);
    make_probabilities(p);
    const chunking c = short_chunks(p, p->T);
    LS_LAUNCH(p->queue, put_centres, (int)(p->B * p->H * c.count), LS_THREADS, 0, c, (int)p->d, p->work[CENTRES],
              p->out);
    ls_gemm_heads(p->queue, 0, 0, p->T, p->d, slots(p), 1, table_of(p, A_K, p->T), slots_of(p, 1), 1, p->out, p->B,
                  p->H);
    if (p->pad_q != NULL) LS_LAUNCH(p->queue, blank, blocks, LS_THREADS, 0, rows, p->H, p->T, p->d, p->pad_q, p->out);
    return ls_launched(p->queue, "abc: apply");
}

/* dl, which comes as do·(Ṽ_r - c), := p (dl - Σ p dl); padded rows of both become 0. */
template <int LANES>
__global__ static void softmax_rows_backward(int64_t rows, int R, int64_t H, int64_t T, const uint8_t *pad, ls_real *p,
                                             ls_real *dl)
{
    const neighbours<LANES> at;
    for (int64_t i = at.row; i - at.row < rows; i += at.step) {
        ls_real *y = p + i * R, *dy = dl + i * R;
        const int n = i < rows ? R : 0, padded = pad != NULL && n > 0 && pad[i / T / H * T + i % T];
        double mean = 0;
        for (int r = at.lane; r < n; r += LANES) mean += (double)y[r] * (double)dy[r];
        mean = at.sum(mean);
        for (int r = at.lane; r < n; r += LANES) {
            const ls_real d = (ls_real)((double)y[r] * ((double)dy[r] - mean));
            dy[r] = padded ? 0 : d;
            if (padded) y[r] = 0;
        }
    }
}

/* A block for each piece of rows, blockIdx.y 0 for keys: Σ_t dl_tr q_t, 1 for values: Σ_t p_tr do_t, (R,d). */
__global__ static void __launch_bounds__(LS_THREADS, 4)
    sum_slot_gradients(chunking c, int R, int d, rows q, rows dout, const ls_real *dl, const ls_real *p, double *piece)
{
    __shared__ bench x;
    const int which = blockIdx.y;
    const place at = place_of(c);
    const strip from = which ? strip_of(dout, at, d) : strip_of(q, at, d);
    const ls_real *share = (which ? p : dl) + (at.bh * c.rows + at.t) * R;
    double *to = piece + ((at.bh * 2 + which) * c.count + at.chunk) * R * d;
    sum_rows(
        x.a, x.b, from, R, [&](int t, int r) { return (double)share[t * R + r]; }, [](int, double y) { return y; },
        [&](int r, int e, double sum) { to[r * d + e] = sum; });
}

/* dx of the elements, what s is owed is paid where the keys take theirs. */
__global__ static void fold_slot_gradients(int64_t groups, int64_t count, int64_t R, int64_t d, double scale,
                                           const double *piece, const ls_real *got, ls_real *dgot)
{
    LS_EACH(i, groups * (d + 2))
    {
        const int64_t g = i / (d + 2), e = i % (d + 2) - 2;
        const double *x = piece + (g / R * count * R + g % R) * d + e, s = (double)got[g * (d + 2) + 1];
        double sum = 0;
        for (int64_t c = 0; e >= 0 && c < count; c++) sum += x[c * R * d];
        dgot[i] = e >= 0 && s > 0 ? (ls_real)(sum * (g / R % 2 ? 1 : scale) / s) : 0;
    }
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    const ls_summary *s = &p->summary[phase];
    const int64_t R = slots(p), d = p->d, BH = p->B * p->H, rows_all = BH * p->T, groups = s->monoid.groups;
    const chunking c = pieces(p, p->T);
    if (rows_all > 0) {
        const rows q = {p->q, p->pad_q, p->T}, dout = {p->dout, p->pad_q, p->T};
        make_slots(p, s->got);
        make_probabilities(p);
        ls_gemm_heads(p->queue, 0, 1, p->T, R, d, 1, p->dout, slots_of(p, 1), 0, table_of(p, A_V, p->T), p->B, p->H);
        LAUNCH_ROWS(p->queue, softmax_rows_backward, rows_all, R, p->H, p->T, p->pad_q, p->work[A_K], p->work[A_V]);
        ls_gemm_heads(p->queue, 0, 0, p->T, d, R, p->scale, table_of(p, A_V, p->T), slots_of(p, 0), 0, p->dq, p->B,
                      p->H);
        LS_LAUNCH(p->queue, sum_slot_gradients, dim3((unsigned)(BH * c.count), 2), LS_THREADS, 0, c, (int)R, (int)d, q,
                  dout, p->work[A_V], p->work[A_K], doubles(p, PIECES));
    }
    LS_LAUNCH(p->queue, fold_slot_gradients, ls_blocks(groups * (d + 2), LS_THREADS), LS_THREADS, 0, groups, c.count, R,
              d, p->scale, doubles(p, PIECES), s->got, s->dgot);
    return ls_launched(p->queue, "abc: apply backward");
}

/* ------------------------------------------------------------------------------------------------ φ */

/* Σ_t (x_t - c) da_tᵀ (d,R) over a piece of rows; centres NULL: c = 0. */
__global__ static void __launch_bounds__(LS_THREADS, 4)
    sum_map_gradients(chunking c, int R, int d, rows k, rows v, const ls_real *da, const ls_real *db,
                      const ls_real *centres, double *piece)
{
    __shared__ bench x;
    const int which = blockIdx.y;
    const place at = place_of(c);
    const strip from = which ? strip_of(v, at, d) : strip_of(k, at, d);
    const ls_real *dl = (which ? db : da) + (at.bh * c.rows + at.t) * R;
    const ls_real *centre = centres == NULL ? NULL : centres + (at.bh * 2 + which) * d;
    double *to = piece + ((int64_t)which * gridDim.x + blockIdx.x) * R * d;
    sum_rows(
        x.a, x.b, from, R, [&](int t, int r) { return (double)dl[t * R + r]; },
        [&](int e, double y) { return y - (centre == NULL ? 0 : (double)centre[e]); },
        [&](int r, int e, double sum) { to[e * R + r] = sum; });
}

/* to += the sum of count pieces of n numbers each; blockIdx.y: keys or values. A block has 32 numbers, of which each
 * warp takes every 8th piece. */
__global__ static void add_pieces(int64_t n, int64_t count, const double *piece, ls_real *to_k, ls_real *to_v)
{
    __shared__ double part[LS_THREADS];
    constexpr int WARPS = LS_THREADS / LS_WARP;
    const int64_t i = (int64_t)blockIdx.x * LS_WARP + threadIdx.x % LS_WARP;
    double sum = 0;
    piece += blockIdx.y * count * n + i;
    for (int64_t c0 = threadIdx.x / LS_WARP; i < n && c0 < count; c0 += WARPS * AHEAD) {
        double x[AHEAD];
#pragma unroll
        for (int c = 0; c < AHEAD; c++) x[c] = c0 + WARPS * c < count ? piece[(c0 + WARPS * c) * n] : 0;
#pragma unroll
        for (int c = 0; c < AHEAD; c++) sum += x[c];
    }
    part[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= LS_WARP || i >= n) return;
    for (int w = 1; w < WARPS; w++) sum += part[w * LS_WARP + threadIdx.x];
    (blockIdx.y ? to_v : to_k)[i] += (ls_real)sum;
}

/* A_K, A_V hold da, db: dk += da φ_kᵀ, dφ_k += (k - c)ᵀ da, and the same for the values. */
void map_backward(ls_pass *p, const ls_real *centres)
{
    const int64_t R = slots(p), d = p->d, n = R * d;
    const chunking c = pieces(p, p->S);
    const int64_t blocks = p->B * p->H * c.count;
    if (blocks == 0) return;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    LS_LAUNCH(p->queue, sum_map_gradients, dim3((unsigned)blocks, 2), LS_THREADS, 0, c, (int)R, (int)d, k, v,
              p->work[A_K], p->work[A_V], centres, doubles(p, PIECES));
    LS_LAUNCH(p->queue, add_pieces, dim3((unsigned)ceil_of(n, LS_WARP), 2), LS_THREADS, 0, n, blocks,
              doubles(p, PIECES), phi(p, PHI_K, p->dparams), phi(p, PHI_V, p->dparams));
    for (int which = 0; which < 2; which++) {
        const ls_view map = {phi(p, which ? PHI_V : PHI_K, p->params), 0, 0, R};
        ls_gemm_heads(p->queue, 0, 1, p->S, d, R, 1, table_of(p, which ? A_V : A_K, p->S), map, 1,
                      which ? p->own.dv : p->own.dk, p->B, p->H);
    }
}

/* ------------------------------------------------------------------------------------------------ sums, backward */

/* A warp for each element: what is the same for all keys in de. Over all keys (c - K̃_r)·dx_r, in CS ds_r. */
__global__ static void make_constants(int64_t groups, int d, const ls_real *centred, const ls_real *dsent,
                                      ls_real *constants)
{
    const int lane = threadIdx.x % LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t g = (int64_t)blockIdx.x * warps + threadIdx.x / LS_WARP; g < groups; g += (int64_t)gridDim.x * warps) {
        const ls_real *dx = dsent + g * (d + 2) + 2;
        double sum = 0;
        for (int e = lane; centred != NULL && e < d; e += LS_WARP) sum -= (double)centred[g * d + e] * (double)dx[e];
        sum = ls_warp_sum(sum);
        if (lane == 0) constants[g] = centred != NULL ? (ls_real)sum : dx[-1];
    }
}

/* A block for each chunk: logits become da = e (constant + (k - c)·dx), e goes to another table. */
__global__ static void __launch_bounds__(LS_THREADS, 4)
    take_shares(chunking c, int R, int d, rows k, rows v, const ls_real *sent, const ls_real *dsent,
                const ls_real *constants, const ls_real *centres, ls_real *a_k, ls_real *a_v, ls_real *e_k,
                ls_real *e_v)
{
    __shared__ double x[TILE * (DEPTH + 4)], y[FEW * (DEPTH + 4)];
    const int which = blockIdx.y, stride = d + 2;
    const place at = place_of(c);
    const strip from = which ? strip_of(v, at, d) : strip_of(k, at, d);
    const uint64_t here = shown_tile(from);
    const int64_t first = (at.bh * c.rows + at.t) * R, element = (at.bh * 2 + which) * R;
    ls_real *a = (which ? a_v : a_k) + first, *share = (which ? e_v : e_k) + first;
    const ls_real *m = sent + element * stride, *dx = dsent + element * stride + 2, *constant = constants + element;
    const ls_real *centre = centres == NULL ? NULL : centres + (at.bh * 2 + which) * d;
    for (int r0 = 0; r0 < R; r0 += FEW) {
        division<TILE, FEW> de;
        for (int e0 = 0; e0 < d; e0 += DEPTH) {
            const int mine = e0 + (int)threadIdx.x % DEPTH;
            const double c_e = centre == NULL || mine >= d ? 0 : (double)centre[mine];
            __syncthreads();
            stage_rows<TILE, DEPTH>(x, from, here, 0, e0, [&](double z) { return z - c_e; });
            stage<FEW, DEPTH>(
                y, [&](int r, int e) { return r0 + r < R && e0 + e < d ? (double)dx[(r0 + r) * stride + e0 + e] : 0; });
            __syncthreads();
            de.add(
                0, depth_of(d - e0), R - r0, [&](int j, int e) { return cell<DEPTH>(x, j, e); },
                [&](int e, int r) { return cell<DEPTH>(y, r, e); });
        }
        de.each(at.n, R - r0, [&](int j, int r, double sum) {
            const int i = j * R + r0 + r;
            const ls_real top = m[(r0 + r) * stride];
            const ls_real weight = top == -INFINITY ? 0 : ls_exp(a[i] - top);
            a[i] = (ls_real)((double)weight * ((double)constant[r0 + r] + sum));
            share[i] = weight;
        });
    }
}

static ls_status sums_backward(ls_pass *p, int phase)
{
    const ls_summary *s = &p->summary[phase + 1];
    const int64_t R = slots(p), d = p->d, stride = d + 2, groups = s->monoid.groups;
    const int causal = p->pattern == LS_CS;
    const chunking c = short_chunks(p, p->S);
    if (p->B * p->H * p->S == 0) return LS_OK;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    const ls_real *centred = NULL, *centres = NULL;
    make_logits(p);
    if (!causal) {
        make_slots(p, s->got);
        centred = p->work[CENTRED], centres = p->work[CENTRES];
    }
    LS_LAUNCH(p->queue, make_constants, ls_blocks(groups * LS_WARP, LS_THREADS), LS_THREADS, 0, groups, (int)d, centred,
              s->dsent, p->work[CONSTANTS]);
    LS_LAUNCH(p->queue, take_shares, dim3((unsigned)(p->B * p->H * c.count), 2), LS_THREADS, 0, c, (int)R, (int)d, k, v,
              s->sent, s->dsent, p->work[CONSTANTS], centres, p->work[A_K], p->work[A_V], p->work[M_K], p->work[M_V]);
    for (int which = 0; which < 2; which++) {
        const ls_view dx = {s->dsent + which * R * stride + 2, p->H * 2 * R * stride, 2 * R * stride, stride};
        ls_gemm_heads(p->queue, 0, 0, p->S, d, R, 1, table_of(p, which ? M_V : M_K, p->S), dx, causal,
                      which ? p->own.dv : p->own.dk, p->B, p->H);
    }
    map_backward(p, centres);
    return ls_launched(p->queue, "abc: sums backward");
}

/* ------------------------------------------------------------------------------------------------ table */

static ls_status apply_any(ls_pass *p, int phase)
{
    return p->pattern == LS_CS ? apply_causal(p, phase) : apply(p, phase);
}

static ls_status apply_any_backward(ls_pass *p, int phase)
{
    return p->pattern == LS_CS ? apply_causal_backward(p, phase) : apply_backward(p, phase);
}

static const ls_cuda_kernel kernels[] = {
    {"sums", sums, sums_backward},
    {"apply", apply_any, apply_any_backward},
    {NULL, NULL, NULL},
};

} // namespace ls_abc

extern "C" const ls_cuda_mechanism ls_abc_cuda = {ls_abc::plan, ls_abc::kernels, NULL, NULL};
