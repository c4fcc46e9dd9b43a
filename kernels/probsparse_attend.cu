/* ProbSparse attention on a GPU, once the queries are selected (probsparse.cu). The formulas are those of probsparse.c.
 *
 *   partial     keys in chunks of CHUNK, all chunks at once: products of the u queries with all keys, a softmax per
 *               chunk, x of each chunk by a batch of products, and the chunks joined in double. At most TOGETHER
 *               queries at a time, so that their logits are never more than a few times the keys
 *   Σ_{j<=i} v  sums of chunks, a scan over the chunks, then all chunks at once
 *
 * Matrices of logits lie with a key in each row, (B,H,n,R), n = S rounded up to whole chunks: so the chunks of all
 * heads are one batch. */
#include "probsparse_cuda.h"

namespace ls_probsparse
{

enum { AHEAD = 8 }; /* chunks whose sums a scan reads before their turn */

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

ls_status queries(ls_pass *p, int phase)
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

ls_status queries_backward(ls_pass *p, int phase)
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

ls_status partial(ls_pass *p, int phase)
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
    const int64_t at = (int64_t)blockIdx.x * CHUNK * R;
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

ls_status partial_backward(ls_pass *p, int phase)
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

ls_status apply(ls_pass *p, int phase)
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

ls_status apply_backward(ls_pass *p, int phase)
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

} // namespace ls_probsparse
