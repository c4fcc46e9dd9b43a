/* Attention with bounded-memory control on a GPU, over all keys; abc_causal.cu has what is seen of a prefix. The
 * formulas and the names are those of abc.c.
 *
 * A block for each piece of the rows of a (b,h) makes its softsum, a fold over the pieces makes the rank's. What each
 * row gets is made by a block for each chunk of 64 rows, from tables (row, slot) that it leaves for the sums over rows,
 * which are made in pieces. Sums and products are in double. */
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

/* What sum_rows has in shared memory. */
struct bench {
    double a[DEPTH * (FEW + 4)], b[DEPTH * (TILE + 4)];
};

/* What score and spread have. */
struct desk {
    double a[TILE * (DEPTH + 4)], b[FEW * (TILE + 4)];
};

/* f of rows that are taken as they are */
struct same {
    __device__ double operator()(int, double x) const
    {
        return x;
    }
};

/* ------------------------------------------------------------------------------------------------ sums of chunks */

/* blockIdx.y: keys or values; a block for each chunk. a = k φ, -inf where the key is padded. */
__global__ static void __launch_bounds__(LS_THREADS, 4)
    find_logits(chunking c, int R, int d, rows k, rows v, const ls_real *phi_k, const ls_real *phi_v, ls_real *a_k,
                ls_real *a_v)
{
    __shared__ desk x;
    const place at = place_of(c);
    const strip from = blockIdx.y ? strip_of(v, at, d) : strip_of(k, at, d);
    const uint64_t here = shown_tile(from);
    const ls_real *map = blockIdx.y ? phi_v : phi_k;
    ls_real *a = (blockIdx.y ? a_v : a_k) + (at.bh * c.rows + at.t) * R;
#pragma unroll 1
    for (int r0 = 0; r0 < R; r0 += FEW) {
        division<TILE, FEW> sum;
        score(
            x.a, x.b, from, here, R, r0, same(), [&](int r, int e) { return map[e * R + r]; }, sum);
        sum.each(at.n, R - r0,
                 [&](int j, int r, double l) { a[j * R + r0 + r] = here >> j & 1 ? (ls_real)l : -INFINITY; });
    }
}

void make_logits(ls_pass *p)
{
    const chunking c = short_chunks(p, p->S);
    const int64_t blocks = p->B * p->H * c.count;
    if (blocks == 0) return;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    LS_LAUNCH(p->queue, find_logits, dim3((unsigned)blocks, 2), LS_THREADS, 0, c, (int)slots(p), (int)p->d, k, v,
              phi(p, PHI_K, p->params), phi(p, PHI_V, p->params), p->work[A_K], p->work[A_V]);
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
        [&](int j, int r) { return top[r] == -INFINITY ? 0 : (double)ls_exp(a[j * R + r] - (ls_real)top[r]); }, same(),
        [&](int r, int e, double sum) { state[r * stride + 2 + e] = sum; });
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

/* A block for each (b,h), of keys and of values, and for 32 features (blockIdx.y): slots = x / s - c, c their mean, to
 * which they sum exactly as rounded. A warp takes every 8th slot. */
__global__ static void centre_slots(int R, int d, const ls_real *got, ls_real *centred, ls_real *centres)
{
    __shared__ double part[LS_THREADS];
    constexpr int WARPS = LS_THREADS / LS_WARP;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP, e = (int)blockIdx.y * LS_WARP + lane;
    const auto slot = [&](int r) {
        const ls_real *x = got + ((int64_t)blockIdx.x * R + r) * (d + 2);
        return e < d && x[1] > 0 ? (double)x[2 + e] / (double)x[1] : 0;
    };
    double mean = 0;
    for (int r = warp; r < R; r += WARPS) mean += slot(r);
    part[threadIdx.x] = mean;
    __syncthreads();
    mean = 0;
    for (int i = 0; i < WARPS; i++) mean += part[i * LS_WARP + lane];
    if (e >= d) return;
    const ls_real c = (ls_real)(mean / R);
    if (warp == 0) centres[(int64_t)blockIdx.x * d + e] = c;
    for (int r = warp; r < R; r += WARPS)
        centred[((int64_t)blockIdx.x * R + r) * d + e] = (ls_real)(slot(r) - (double)c);
}

static void make_slots(ls_pass *p, const ls_real *got)
{
    if (p->B * p->H == 0) return;
    LS_LAUNCH(p->queue, centre_slots, dim3((unsigned)(p->B * p->H * 2), (unsigned)ceil_of(p->d, LS_WARP)), LS_THREADS,
              0, (int)slots(p), (int)p->d, got, p->work[CENTRED], p->work[CENTRES]);
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

/* Slots as queries see them: x - c of a (b,h), keys then values. */
struct memory {
    const ls_real *slot, *centre;
    int R, d;
};

__device__ static inline const ls_real *slots_of(const memory &m, const place &at, int which)
{
    return m.slot + (at.bh * 2 + which) * m.R * m.d;
}

/* table_ir = scale x_i·slot_r */
__device__ static void score_slots(desk *x, const memory &m, const strip &from, uint64_t here, const ls_real *slot,
                                   double scale, ls_real *table)
{
#pragma unroll 1
    for (int r0 = 0; r0 < m.R; r0 += FEW) {
        division<TILE, FEW> sum;
        score(
            x->a, x->b, from, here, m.R, r0, same(), [&](int r, int e) { return slot[r * m.d + e]; }, sum);
        sum.each(from.n, m.R - r0, [&](int i, int r, double l) { table[i * m.R + r0 + r] = (ls_real)(scale * l); });
    }
}

/* y := softmax of R logits, by four neighbours. */
__device__ static void softmax_row(quarter at, int R, ls_real *y)
{
    ls_real top = -INFINITY, sum = 0;
#pragma unroll 4
    for (int r = at.lane; r < R; r += 4) top = y[r] > top ? y[r] : top;
    top = at.max(top);
#pragma unroll 4
    for (int r = at.lane; r < R; r += 4) sum += y[r] = ls_exp(y[r] - top);
    sum = at.sum(sum);
#pragma unroll 4
    for (int r = at.lane; r < R; r += 4) y[r] /= sum;
}

/* A block for each chunk of queries: p, then o = c + Σ_r p_r (Ṽ_r - c). */
__global__ static void __launch_bounds__(LS_THREADS, 3)
    attend(chunking c, memory m, double scale, rows q, ls_real *p, ls_view out)
{
    __shared__ desk x;
    const place at = place_of(c);
    const strip from = strip_of(q, at, m.d), to = strip_of({out, NULL, 0}, at, m.d);
    const uint64_t here = shown_tile(from);
    const ls_real *value = slots_of(m, at, 1), *centre = m.centre + (at.bh * 2 + 1) * m.d;
    const quarter mine;
    p += (at.bh * c.rows + at.t) * m.R;
    score_slots(&x, m, from, here, slots_of(m, at, 0), scale, p);
    __syncthreads();
    softmax_row(mine, mine.row < at.n ? m.R : 0, p + mine.row * m.R);
    __syncthreads();
#pragma unroll 1
    for (int e0 = 0; e0 < m.d; e0 += TILE) {
        division<TILE, TILE> sum;
        spread(
            x.a, x.b, at.n, m.R, m.d, e0, [&](int i, int r) { return p[i * m.R + r]; },
            [&](int r, int e) { return value[r * m.d + e]; }, sum);
        sum.put(to, at.n, e0, [&](ls_real *z, int i, int e, double y) {
            *z = here >> i & 1 ? (ls_real)((double)__ldg(centre + e) + y) : 0;
        });
    }
}

/* The same backward: p and dl = p (dp - Σ p dp), dp = do·(Ṽ_r - c), both 0 in padded rows, and dq. */
__global__ static void __launch_bounds__(LS_THREADS, 3)
    attend_backward(chunking c, memory m, double scale, rows q, rows dout, ls_real *p, ls_real *dl, ls_view dq)
{
    __shared__ desk x;
    const place at = place_of(c);
    const int64_t first = (at.bh * c.rows + at.t) * m.R;
    const ls_real *key = slots_of(m, at, 0);
    const quarter mine;
    const strip to = strip_of(q, at, m.d);
    const uint64_t here = shown_tile(to);
    p += first, dl += first;
    score_slots(&x, m, to, here, key, scale, p);
    score_slots(&x, m, strip_of(dout, at, m.d), here, slots_of(m, at, 1), 1, dl);
    __syncthreads();
    const int n = mine.row < at.n ? m.R : 0, is_shown = here >> mine.row & 1;
    ls_real *y = p + mine.row * m.R, *dy = dl + mine.row * m.R;
    softmax_row(mine, n, y);
    double mean = 0;
#pragma unroll 4
    for (int r = mine.lane; r < n; r += 4) mean += (double)y[r] * (double)dy[r];
    mean = mine.sum(mean);
#pragma unroll 4
    for (int r = mine.lane; r < n; r += 4) {
        dy[r] = is_shown ? (ls_real)((double)y[r] * ((double)dy[r] - mean)) : 0;
        if (!is_shown) y[r] = 0;
    }
    __syncthreads();
    const strip grad = strip_of({dq, NULL, 0}, at, m.d);
#pragma unroll 1
    for (int e0 = 0; e0 < m.d; e0 += TILE) {
        division<TILE, TILE> sum;
        spread(
            x.a, x.b, at.n, m.R, m.d, e0, [&](int i, int r) { return dl[i * m.R + r]; },
            [&](int r, int e) { return key[r * m.d + e]; }, sum);
        sum.put(grad, at.n, e0, [&](ls_real *z, int, int, double x_r) { *z = (ls_real)(scale * x_r); });
    }
}

static memory memory_of(const ls_pass *p)
{
    return {p->work[CENTRED], p->work[CENTRES], (int)slots(p), (int)p->d};
}

static ls_status apply(ls_pass *p, int phase)
{
    const chunking c = short_chunks(p, p->T);
    const int64_t blocks = p->B * p->H * c.count;
    if (blocks == 0) return LS_OK;
    const rows q = {p->q, p->pad_q, p->T};
    make_slots(p, p->summary[phase].got);
    LS_LAUNCH(p->queue, attend, (int)blocks, LS_THREADS, 0, c, memory_of(p), p->scale, q, p->work[A_K], p->out);
    return ls_launched(p->queue, "abc: apply");
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
        x.a, x.b, from, R, [&](int t, int r) { return (double)share[t * R + r]; }, same(),
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
    const int64_t R = slots(p), d = p->d, BH = p->B * p->H, groups = s->monoid.groups;
    const chunking c = pieces(p, p->T), chunks = short_chunks(p, p->T);
    if (BH * p->T > 0) {
        const rows q = {p->q, p->pad_q, p->T}, dout = {p->dout, p->pad_q, p->T};
        make_slots(p, s->got);
        LS_LAUNCH(p->queue, attend_backward, (int)(BH * chunks.count), LS_THREADS, 0, chunks, memory_of(p), p->scale, q,
                  dout, p->work[A_K], p->work[A_V], p->dq);
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
        [&](int e, double y) { return y - (centre == NULL || e >= d ? 0 : (double)centre[e]); },
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

/* A_K, A_V hold da, db: dφ_k += (k - c)ᵀ da, and the same for the values. */
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

/* What keys, or values, get of their sums. */
struct shares {
    int R, d, add;               /* to what is in dk */
    const ls_real *sent, *dsent; /* (m; s, x) of all keys, its gradient */
    const ls_real *constants, *centres;
    const ls_real *phi[2];
    ls_real *e[2], *da[2]; /* tables */
    ls_view to[2];
};

/* A block for each chunk, blockIdx.y: keys or values. da = e (constant + (k - c)·dx), dk = Σ_r e_r dx_r + da φᵀ. */
__global__ static void __launch_bounds__(LS_THREADS, 3) take_shares(chunking c, shares s, rows k, rows v)
{
    __shared__ desk x;
    const int which = blockIdx.y, R = s.R, stride = s.d + 2;
    const place at = place_of(c);
    const strip from = which ? strip_of(v, at, s.d) : strip_of(k, at, s.d);
    const uint64_t here = shown_tile(from);
    const int64_t first = (at.bh * c.rows + at.t) * R, element = (at.bh * 2 + which) * R;
    const ls_real *m = s.sent + element * stride, *dx = s.dsent + element * stride + 2;
    const ls_real *constant = s.constants + element, *map = s.phi[which];
    const ls_real *centre = s.centres == NULL ? NULL : s.centres + (at.bh * 2 + which) * s.d;
    ls_real *da = s.da[which] + first, *share = s.e[which] + first;
#pragma unroll 1
    for (int r0 = 0; r0 < R; r0 += FEW) {
        division<TILE, FEW> logit, de;
        score(
            x.a, x.b, from, here, R, r0, same(), [&](int r, int e) { return map[e * R + r]; }, logit);
        score(
            x.a, x.b, from, here, R, r0,
            [&](int e, double y) { return y - (centre == NULL || e >= s.d ? 0 : (double)centre[e]); },
            [&](int r, int e) { return dx[r * stride + e]; }, de);
        logit.both(de, at.n, R - r0, [&](int j, int r, double l, double sum) {
            const int i = j * R + r0 + r, counts = here >> j & 1;
            const ls_real weight = counts ? ls_exp((ls_real)l - m[(r0 + r) * stride]) : 0;
            da[i] = (ls_real)((double)weight * ((double)constant[r0 + r] + sum));
            share[i] = weight;
        });
    }
    __syncthreads();
    const strip to = which ? strip_of({s.to[1], NULL, 0}, at, s.d) : strip_of({s.to[0], NULL, 0}, at, s.d);
#pragma unroll 1
    for (int e0 = 0; e0 < s.d; e0 += TILE) {
        division<TILE, TILE> sum;
        spread(
            x.a, x.b, at.n, R, s.d, e0, [&](int j, int r) { return share[j * R + r]; },
            [&](int r, int e) { return dx[r * stride + e]; }, sum);
        spread(
            x.a, x.b, at.n, R, s.d, e0, [&](int j, int r) { return da[j * R + r]; },
            [&](int r, int e) { return map[e * R + r]; }, sum);
        sum.put(to, at.n, e0, [&](ls_real *z, int, int, double y) { *z = s.add ? *z + (ls_real)y : (ls_real)y; });
    }
}

static ls_status sums_backward(ls_pass *p, int phase)
{
    const ls_summary *s = &p->summary[phase + 1];
    const int64_t d = p->d, groups = s->monoid.groups;
    const int causal = p->pattern == LS_CS;
    const chunking c = short_chunks(p, p->S);
    if (p->B * p->H * p->S == 0) return LS_OK;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    const ls_real *centred = NULL, *centres = NULL;
    if (!causal) {
        make_slots(p, s->got);
        centred = p->work[CENTRED], centres = p->work[CENTRES];
    }
    LS_LAUNCH(p->queue, make_constants, ls_blocks(groups * LS_WARP, LS_THREADS), LS_THREADS, 0, groups, (int)d, centred,
              s->dsent, p->work[CONSTANTS]);
    const shares gets = {.R = (int)slots(p),
                         .d = (int)d,
                         .add = causal,
                         .sent = s->sent,
                         .dsent = s->dsent,
                         .constants = p->work[CONSTANTS],
                         .centres = centres,
                         .phi = {phi(p, PHI_K, p->params), phi(p, PHI_V, p->params)},
                         .e = {p->work[M_K], p->work[M_V]},
                         .da = {p->work[A_K], p->work[A_V]},
                         .to = {p->own.dk, p->own.dv}};
    LS_LAUNCH(p->queue, take_shares, dim3((unsigned)(p->B * p->H * c.count), 2), LS_THREADS, 0, c, gets, k, v);
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
