/* Attention with bounded-memory control on a GPU. The formulas and the names are those of abc.c.
 *
 * All keys. Logits by products; a block for each piece of the rows of a (b,h) makes its softsum, a fold over the pieces
 * makes the rank's. Queries and gradients are products of tall matrices; sums over rows are made in pieces, in double.
 *
 * Causal. Rows go in chunks of 64. Sums of chunks in parallel, a scan over chunks from what the ranks before sent, then
 * all chunks in parallel, a block each. In a chunk no state is walked along. With m_ir the running maximum, (m; s, x)
 * the state that enters, c_ir = e^(m_r - m_ir) and E_ijr = e^(a_jr - m_ir) for keys j <= i of the chunk,
 *
 *   s_ir = c_ir s_r + Σ_j E_ijr,  q_i·x_ir = c_ir q_i·x_r + Σ_j E_ijr q_i·k_j,   logit_ir = scale q_i·x_ir / s_ir
 *   o_i = Σ_r w_ir c_ir x_r + Σ_j W_ij v_j,  W_ij = Σ_r w_ir E_ijr,  w = p / s    (E, c, s, x of the values)
 *
 * so that the work is small matrix products, and no e^ is above 1. Backward, with dp_ir = do_i·Ṽ_ir,
 * u_ir = p_ir (dp_ir - Σ p dp) / s_ir of the keys, and the gradient (ds, dx) of the state that leaves the chunk,
 *
 *   dq_i = scale (Σ_r u_ir c_ir x_r + Σ_j U_ij k_j),  U_ij = Σ_r u_ir E_ijr
 *   da_jr = Σ_{i>=j} E_ijr u_ir (scale q_i·k_j - logit_ir) + e_jr (ds_r + k_j·dx_r)
 *   dk_j = scale Σ_{i>=j} U_ij q_i + Σ_r e_jr dx_r + da_j φ_kᵀ,   e_jr = e^(a_jr - m_r at the chunk's end)
 *   what the state that enters gets: Σ_i c_ir u_ir scale q_i of x, -Σ_i c_ir u_ir logit_ir of s, and what the state
 *   that leaves has, times e^(m_r before - m_r after): a scan over chunks, backward
 *
 * and for the values the same with u := w, scale q := do, logit := dp. Differences are taken in double, before they are
 * weighed: that is what keeps gradients of nearly equal slots. Tables of (row, slot) lie in memory, (L, R) of each
 * head.
 */
#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

namespace
{

enum { SLOTS };        /* option[] */
enum { PHI_K, PHI_V }; /* param[] */
/* work[]: logits and maxima, later e and gradients (reals of (B,H,rows,R)); w (reals), logit, dp, u (doubles), alike;
 * sums of chunks and their gradients (doubles of (B,H,2,chunks,R,d+2)), maxima of chunks; sums over rows, in pieces;
 * slots (B,H,2,R,d), centres (B,H,2,d), constants (B,H,2,R) */
enum { A_K, A_V, M_K, M_V, W, LOGIT, DP, U, STATES, DSTATES, TOPS, PIECES, CENTRED, CENTRES, CONSTANTS };
enum { TILE = 64, DEEP = 8, LD = DEEP + 1 }; /* of products in a block: rows and columns, depth at a time */
enum { DEEPER = 32 };                        /* where there is room for more between two barriers */
enum { CHUNK = TILE, MOST_PIECES = 512 };
enum { AHEAD = 8 }; /* chunks whose sums are read before their turn */

/* ------------------------------------------------------------------------------------------------ sizes */

static int64_t slots(const ls_pass *p)
{
    return (int64_t)p->option[SLOTS];
}

static int64_t ceil_of(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

/* Rows [length c, length (c + 1)) of each (b,h) are chunk c. */
struct chunking {
    int64_t H, rows, length, count;
};

static chunking short_chunks(const ls_pass *p, int64_t rows)
{
    return {p->H, rows, CHUNK, ceil_of(rows, CHUNK)};
}

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

static double *doubles(const ls_pass *p, int which)
{
    return (double *)(void *)p->work[which];
}

static ls_real *phi(const ls_pass *p, int which, const ls_real *base)
{
    return (ls_real *)(uintptr_t)base + p->param[which].offset;
}

/* ------------------------------------------------------------------------------------------------ in a block */

/* Rows of a tensor, n of each b, that are read as 0 where they are padded. */
struct rows {
    ls_view v;
    const uint8_t *pad;
    int64_t n;
};

/* The rows of a block: [t, t + n) of (b,h). */
struct place {
    int64_t b, h, bh, chunk, t;
    int n;
};

__device__ static place place_of(chunking c)
{
    const int64_t bh = blockIdx.x / c.count, chunk = blockIdx.x % c.count, t = chunk * c.length;
    return {bh / c.H, bh % c.H, bh, chunk, t, (int)ls_min(c.length, c.rows - t)};
}

__device__ static int is_padded(const rows &x, const place &at, int i)
{
    return ls_is_padded(x.pad, at.b * x.n + at.t + i);
}

__device__ static double entry(const rows &x, const place &at, int i, int e)
{
    return is_padded(x, at, i) ? 0 : (double)ls_row(x.v, at.b, at.h, at.t + i)[e];
}

/* e^(from - to), 0 where there was nothing. */
__device__ static double weight(double from, double to)
{
    return from == -INFINITY ? 0 : (double)ls_exp((ls_real)(from - to));
}

/* What a block of 256 threads has in shared memory. */
struct desk {
    enum { deep = DEEP, ld = LD, across = 0 };
    double g[TILE * TILE];
    double a[TILE * LD], b[TILE * LD], m[TILE * LD];
};

/* The same where it is products alone. across: of an operand's numbers, those of one k lie side by side in memory. */
template <int Across> struct bench {
    enum { deep = DEEPER, ld = DEEPER + 1, across = Across };
    double a[TILE * ld], b[TILE * ld];
};

/* done(i, j, Σ_k a(i,k) b(k,j)), i < m, j < n, k < depth > 0, by 256 threads, each with 4x4 of every 64x64. Thread x, y
 * has rows y + 16 u and columns x + 16 v. */
template <class Desk, class A, class B, class Done>
__device__ static void product(Desk *x, int m, int n, int depth, A a, B b, Done done)
{
    constexpr int deep = Desk::deep, ld = Desk::ld;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int i0 = 0; i0 < m; i0 += TILE)
        for (int j0 = 0; j0 < n; j0 += TILE) {
            const int tall = (m - i0 + 15) / 16, wide = (n - j0 + 15) / 16;
            double sum[4][4] = {};
            for (int k0 = 0; k0 < depth; k0 += deep) {
                __syncthreads();
                for (int at = threadIdx.x; at < TILE * deep; at += blockDim.x) {
                    const int i = Desk::across ? at % TILE : at / deep, k = Desk::across ? at / TILE : at % deep;
                    x->a[i * ld + k] = i0 + i < m && k0 + k < depth ? a(i0 + i, k0 + k) : 0;
                    x->b[i * ld + k] = j0 + i < n && k0 + k < depth ? b(k0 + k, j0 + i) : 0;
                }
                __syncthreads();
                for (int k = 0; k < deep; k++)
#pragma unroll
                    for (int u = 0; u < 4; u++)
#pragma unroll
                        for (int v = 0; v < 4; v++)
                            if (u < tall && v < wide)
                                sum[u][v] += x->a[(ty + 16 * u) * ld + k] * x->b[(tx + 16 * v) * ld + k];
            }
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int v = 0; v < 4; v++)
                    if (i0 + ty + 16 * u < m && j0 + tx + 16 * v < n)
                        done(i0 + ty + 16 * u, j0 + tx + 16 * v, sum[u][v]);
        }
}

/* g_ij = Σ_r u(i,r) e^(a_jr - m_ir) for j <= i < n, else 0. */
template <class Share> __device__ static void mix(desk *x, int n, int R, Share u, const ls_real *a, const ls_real *m)
{
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    double sum[4][4] = {};
    for (int r0 = 0; r0 < R; r0 += DEEP) {
        __syncthreads();
        for (int at = threadIdx.x; at < TILE * DEEP; at += blockDim.x) {
            const int i = at / DEEP, k = at % DEEP, there = i < n && r0 + k < R;
            const int64_t from = (int64_t)i * R + r0 + k;
            x->a[i * LD + k] = there ? u(i, r0 + k) : 0;
            x->b[i * LD + k] = there ? (double)a[from] : 0;
            x->m[i * LD + k] = there ? (double)m[from] : 0;
        }
        __syncthreads();
        for (int k = 0; k < DEEP; k++)
#pragma unroll
            for (int s = 0; s < 4; s++)
#pragma unroll
                for (int v = 0; v < 4; v++) {
                    const int i = ty + 16 * s, j = tx + 16 * v;
                    if (j <= i)
                        sum[s][v] += x->a[i * LD + k] * (double)ls_exp((ls_real)(x->b[j * LD + k] - x->m[i * LD + k]));
                }
    }
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
        for (int v = 0; v < 4; v++) x->g[(ty + 16 * s) * TILE + tx + 16 * v] = sum[s][v];
    __syncthreads();
}

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
static void make_logits(ls_pass *p)
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

/* blockIdx.y: keys or values. (m; s, x) of a chunk alone; tops: m once more, for the scan goes over m. */
__global__ static void sum_chunk(chunking c, int R, int d, rows k, rows v, const ls_real *a_k, const ls_real *a_v,
                                 double *states, double *tops)
{
    __shared__ bench<1> x;
    const int which = blockIdx.y, lane = threadIdx.x % LS_WARP, stride = d + 2;
    const place at = place_of(c);
    const rows from = which ? v : k;
    const ls_real *a = (which ? a_v : a_k) + (at.bh * c.rows + at.t) * R;
    const int64_t element = (at.bh * 2 + which) * c.count + at.chunk;
    double *state = states + element * R * stride, *top = tops + element * R;
    for (int r = threadIdx.x / LS_WARP; r < R; r += blockDim.x / LS_WARP) {
        ls_real m = -INFINITY;
        for (int j = lane; j < at.n; j += LS_WARP) m = a[(int64_t)j * R + r] > m ? a[(int64_t)j * R + r] : m;
        m = ls_warp_max(m);
        double s = 0;
        for (int j = lane; j < at.n; j += LS_WARP) s += m == -INFINITY ? 0 : (double)ls_exp(a[(int64_t)j * R + r] - m);
        s = ls_warp_sum(s);
        if (lane > 0) continue;
        top[r] = state[(int64_t)r * stride] = (double)m;
        state[(int64_t)r * stride + 1] = s;
    }
    __syncthreads();
    product(
        &x, R, d, at.n,
        [&](int r, int j) { return top[r] == -INFINITY ? 0 : (double)ls_exp(a[(int64_t)j * R + r] - (ls_real)top[r]); },
        [&](int j, int e) { return entry(from, at, j, e); },
        [&](int r, int e, double sum) { state[(int64_t)r * stride + 2 + e] = sum; });
}

static void sum_chunks(ls_pass *p, chunking c)
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

/* A warp for each row of the table: p = softmax_r. */
__global__ static void softmax_rows(int64_t rows, int R, ls_real *x)
{
    const int lane = threadIdx.x % LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t i = (int64_t)blockIdx.x * warps + threadIdx.x / LS_WARP; i < rows; i += (int64_t)gridDim.x * warps) {
        ls_real *y = x + i * R, top = -INFINITY, sum = 0;
        for (int r = lane; r < R; r += LS_WARP) top = y[r] > top ? y[r] : top;
        top = ls_warp_max(top);
        for (int r = lane; r < R; r += LS_WARP) sum += y[r] = ls_exp(y[r] - top);
        sum = ls_warp_sum(sum);
        for (int r = lane; r < R; r += LS_WARP) y[r] /= sum;
    }
}

/* A_K (B,H,T,R) = softmax_r(scale q·(K̃_r - c)). */
static void make_probabilities(ls_pass *p)
{
    const int64_t R = slots(p), rows = p->B * p->H * p->T;
    ls_gemm_heads_exact(p->queue, 0, 1, p->T, R, p->d, p->scale, p->q, slots_of(p, 0), 0, table_of(p, A_K, p->T), p->B,
                        p->H);
    LS_LAUNCH(p->queue, softmax_rows, ls_blocks(rows * LS_WARP, LS_THREADS), LS_THREADS, 0, rows, (int)R, p->work[A_K]);
}

/* out = centre, on which the product is laid. A warp for each row, here and in blank. */
__global__ static void put_centres(int64_t rows, int64_t H, int64_t T, int64_t d, const ls_real *centres, ls_view out)
{
    LS_EACH_ROW(i, rows)
    {
        const int64_t bh = i / T;
        const ls_real *from = centres + (bh * 2 + 1) * d;
        ls_real *to = ls_row(out, bh / H, bh % H, i % T);
        LS_EACH_LANE(e, d) to[e] = from[e];
    }
}

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
    LS_LAUNCH(p->queue, put_centres, blocks, LS_THREADS, 0, rows, p->H, p->T, p->d, p->work[CENTRES], p->out);
    ls_gemm_heads(p->queue, 0, 0, p->T, p->d, slots(p), 1, table_of(p, A_K, p->T), slots_of(p, 1), 1, p->out, p->B,
                  p->H);
    if (p->pad_q != NULL) LS_LAUNCH(p->queue, blank, blocks, LS_THREADS, 0, rows, p->H, p->T, p->d, p->pad_q, p->out);
    return ls_launched(p->queue, "abc: apply");
}

/* dl, which comes as do·(Ṽ_r - c), := p (dl - Σ p dl); padded rows of both become 0. A warp for each row. */
__global__ static void softmax_rows_backward(int64_t rows, int64_t H, int64_t T, int R, const uint8_t *pad, ls_real *p,
                                             ls_real *dl)
{
    const int lane = threadIdx.x % LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t i = (int64_t)blockIdx.x * warps + threadIdx.x / LS_WARP; i < rows; i += (int64_t)gridDim.x * warps) {
        const int padded = ls_is_padded(pad, i / T / H * T + i % T);
        double mean = 0;
        for (int r = lane; r < R; r += LS_WARP) mean += (double)p[i * R + r] * (double)dl[i * R + r];
        mean = ls_warp_sum(mean);
        for (int r = lane; r < R; r += LS_WARP) {
            const ls_real d = (ls_real)((double)p[i * R + r] * ((double)dl[i * R + r] - mean));
            dl[i * R + r] = padded ? 0 : d;
            if (padded) p[i * R + r] = 0;
        }
    }
}

/* A block for each piece of rows, blockIdx.y 0 for keys: Σ_t dl_tr q_t, 1 for values: Σ_t p_tr do_t, (R,d). */
__global__ static void sum_slot_gradients(chunking c, int R, int d, rows q, rows dout, const ls_real *dl,
                                          const ls_real *p, double *piece)
{
    __shared__ bench<1> x;
    const int which = blockIdx.y;
    const place at = place_of(c);
    const rows from = which ? dout : q;
    const ls_real *share = (which ? p : dl) + (at.bh * c.rows + at.t) * R;
    double *to = piece + ((at.bh * 2 + which) * c.count + at.chunk) * R * d;
    product(
        &x, R, d, at.n, [&](int r, int t) { return (double)share[(int64_t)t * R + r]; },
        [&](int t, int e) { return entry(from, at, t, e); },
        [&](int r, int e, double sum) { to[(int64_t)r * d + e] = sum; });
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
        LS_LAUNCH(p->queue, softmax_rows_backward, ls_blocks(rows_all * LS_WARP, LS_THREADS), LS_THREADS, 0, rows_all,
                  p->H, p->T, (int)R, p->pad_q, p->work[A_K], p->work[A_V]);
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
__global__ static void sum_map_gradients(chunking c, int R, int d, rows k, rows v, const ls_real *da, const ls_real *db,
                                         const ls_real *centres, double *piece)
{
    __shared__ bench<1> x;
    const int which = blockIdx.y;
    const place at = place_of(c);
    const rows from = which ? v : k;
    const ls_real *dl = (which ? db : da) + (at.bh * c.rows + at.t) * R;
    const ls_real *centre = centres == NULL ? NULL : centres + (at.bh * 2 + which) * d;
    double *to = piece + ((int64_t)which * gridDim.x + blockIdx.x) * R * d;
    product(
        &x, d, R, at.n, [&](int e, int t) { return entry(from, at, t, e) - (centre == NULL ? 0 : (double)centre[e]); },
        [&](int t, int r) { return (double)dl[(int64_t)t * R + r]; },
        [&](int e, int r, double sum) { to[(int64_t)e * R + r] = sum; });
}

__global__ static void add_pieces(int64_t n, int64_t count, const double *piece, ls_real *to)
{
    LS_EACH(i, n)
    {
        double sum = 0;
        for (int64_t c0 = 0; c0 < count; c0 += AHEAD) {
            double x[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) x[c] = c0 + c < count ? piece[(c0 + c) * n + i] : 0;
#pragma unroll
            for (int c = 0; c < AHEAD; c++) sum += x[c];
        }
        to[i] += (ls_real)sum;
    }
}

/* A_K, A_V hold da, db: dk += da φ_kᵀ, dφ_k += (k - c)ᵀ da, and the same for the values. */
static void map_backward(ls_pass *p, const ls_real *centres)
{
    const int64_t R = slots(p), d = p->d, n = R * d;
    const chunking c = pieces(p, p->S);
    const int64_t blocks = p->B * p->H * c.count;
    if (blocks == 0) return;
    const rows k = {p->own.k, p->own.pad, p->S}, v = {p->own.v, p->own.pad, p->S};
    LS_LAUNCH(p->queue, sum_map_gradients, dim3((unsigned)blocks, 2), LS_THREADS, 0, c, (int)R, (int)d, k, v,
              p->work[A_K], p->work[A_V], centres, doubles(p, PIECES));
    for (int which = 0; which < 2; which++) {
        const int name = which ? PHI_V : PHI_K;
        LS_LAUNCH(p->queue, add_pieces, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, blocks,
                  doubles(p, PIECES) + which * blocks * n, phi(p, name, p->dparams));
        const ls_view map = {phi(p, name, p->params), 0, 0, R};
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
__global__ static void take_shares(chunking c, int R, int d, rows k, rows v, const ls_real *sent, const ls_real *dsent,
                                   const ls_real *constants, const ls_real *centres, ls_real *a_k, ls_real *a_v,
                                   ls_real *e_k, ls_real *e_v)
{
    __shared__ bench<0> x;
    const int which = blockIdx.y;
    const place at = place_of(c);
    const rows from = which ? v : k;
    const int64_t first = (at.bh * c.rows + at.t) * R, element = (at.bh * 2 + which) * R;
    ls_real *a = (which ? a_v : a_k) + first, *share = (which ? e_v : e_k) + first;
    const ls_real *m = sent + element * (d + 2), *dx = dsent + element * (d + 2) + 2, *constant = constants + element;
    const ls_real *centre = centres == NULL ? NULL : centres + (at.bh * 2 + which) * d;
    product(
        &x, at.n, R, d, [&](int j, int e) { return entry(from, at, j, e) - (centre == NULL ? 0 : (double)centre[e]); },
        [&](int e, int r) { return (double)dx[(int64_t)r * (d + 2) + e]; },
        [&](int j, int r, double sum) {
            const int64_t i = (int64_t)j * R + r;
            const ls_real top = m[(int64_t)r * (d + 2)];
            const ls_real weight = top == -INFINITY ? 0 : ls_exp(a[i] - top);
            a[i] = (ls_real)((double)weight * ((double)constant[r] + sum));
            share[i] = weight;
        });
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

/* ------------------------------------------------------------------------------------------------ apply, causal */

/* A thread for each s and each entry of x passes the chunks: their sums become the states that enter. m is made of
 * tops, for threads that share it do not go in step. */
__global__ static void scan_states(int64_t groups, int64_t count, int64_t R, int64_t stride, const ls_real *got,
                                   const double *tops, double *states)
{
    LS_EACH(i, groups * (stride - 1))
    {
        const int64_t g = i / (stride - 1), in = i % (stride - 1) + 1;
        const double *top = tops + g / R * count * R + g % R;
        double *x = states + (g / R * count * R + g % R) * stride;
        double m = (double)got[g * stride], y = (double)got[g * stride + in];
        for (int64_t c0 = 0; c0 < count; c0 += AHEAD) {
            double m_own[AHEAD], own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 + c >= count) break;
                m_own[c] = top[(c0 + c) * R], own[c] = x[(c0 + c) * R * stride + in];
            }
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 + c >= count) break;
                const double next = m_own[c] > m ? m_own[c] : m;
                x[(c0 + c) * R * stride + in] = y;
                if (in == 1) x[(c0 + c) * R * stride] = m;
                y = weight(m, next) * y + weight(m_own[c], next) * own[c];
                m = next;
            }
        }
    }
}

/* The same backward in time: what the states that enter chunks get of these becomes the gradients of the states that
 * leave; what is left is dgot. */
__global__ static void scan_gradients(int64_t groups, int64_t count, int64_t R, int64_t stride, const double *states,
                                      double *dstates, ls_real *dgot)
{
    LS_EACH(i, groups * (stride - 1))
    {
        const int64_t g = i / (stride - 1), in = i % (stride - 1) + 1, first = (g / R * count * R + g % R) * stride;
        const double *top = states + first;
        double *x = dstates + first + in, after = 0, y = 0;
        for (int64_t c0 = count; c0 > 0; c0 -= AHEAD) {
            double m[AHEAD], own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 - 1 - c < 0) break;
                m[c] = top[(c0 - 1 - c) * R * stride], own[c] = x[(c0 - 1 - c) * R * stride];
            }
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 - 1 - c < 0) break;
                x[(c0 - 1 - c) * R * stride] = y;
                y = own[c] + (y == 0 ? 0 : weight(m[c], after) * y);
                after = m[c];
            }
        }
        dgot[g * stride + in] = (ls_real)y;
        if (in == 1) dgot[g * stride] = 0;
    }
}

/* What all chunks of a causal pass work with. */
struct causal {
    chunking c;
    int R, d;
    double scale;
    rows q, k, v, dout;
    ls_real *a[2], *m[2]; /* of keys, of values */
    ls_real *w;
    double *logit, *dp, *u, *states, *dstates;
};

/* One chunk: its rows of the tables, its states. */
struct chunk {
    place at;
    ls_real *a[2], *m[2], *w;
    double *logit, *dp, *u, *state[2], *dstate[2];
};

__device__ static chunk chunk_of(const causal &s)
{
    chunk y;
    y.at = place_of(s.c);
    const int64_t first = (y.at.bh * s.c.rows + y.at.t) * s.R;
    y.w = s.w + first, y.logit = s.logit + first, y.dp = s.dp + first, y.u = s.u + first;
    for (int which = 0; which < 2; which++) {
        const int64_t element = ((y.at.bh * 2 + which) * s.c.count + y.at.chunk) * s.R * (s.d + 2);
        y.a[which] = s.a[which] + first, y.m[which] = s.m[which] + first;
        y.state[which] = s.states + element, y.dstate[which] = s.dstates + element;
    }
    return y;
}

/* m_ir of keys and values, 0 where there still is no key: e^(-inf - 0) is 0. A warp for each slot, lanes are rows. */
__device__ static void make_maxima(const causal &s, const chunk &y)
{
    const int lane = threadIdx.x % LS_WARP;
    for (int at = threadIdx.x / LS_WARP; at < 2 * s.R; at += blockDim.x / LS_WARP) {
        const int which = at / s.R, r = at % s.R;
        ls_real top = (ls_real)y.state[which][(int64_t)r * (s.d + 2)];
        for (int i0 = 0; i0 < y.at.n; i0 += LS_WARP) {
            const int64_t i = (int64_t)(i0 + lane) * s.R + r;
            ls_real x = i0 + lane < y.at.n ? y.a[which][i] : -INFINITY;
            for (int step = 1; step < LS_WARP; step *= 2) {
                const ls_real before = __shfl_sync(0xffffffffu, x, lane >= step ? lane - step : lane);
                x = before > x ? before : x;
            }
            x = top > x ? top : x;
            if (i0 + lane < y.at.n) y.m[which][i] = x == -INFINITY ? 0 : x;
            top = __shfl_sync(0xffffffffu, x, LS_WARP - 1);
        }
    }
    __syncthreads();
}

/* done(i, r, s_ir, Σ_{j<=i} E_ijr g_ij + c_ir before): of what is seen of a state through s and through x. */
template <class Done>
__device__ static void see(const desk *x, const causal &s, const chunk &y, int which, int i, int r, double before,
                           Done done)
{
    const double *state = y.state[which] + (int64_t)r * (s.d + 2);
    const ls_real m = y.m[which][(int64_t)i * s.R + r], *a = y.a[which] + r;
    const double c = weight(state[0], (double)m);
    double sum = c * state[1], dot = c * before;
    for (int j = 0; j <= i; j++) {
        const double e = (double)ls_exp(a[(int64_t)j * s.R] - m);
        sum += e;
        dot += e * x->g[i * TILE + j];
    }
    done(i, r, sum, dot);
}

/* done(i, r, s_ir, look_i·x_ir) for the states of which; g_ij = look_i·row_j is left behind. */
template <class Done>
__device__ static void look(desk *x, const causal &s, const chunk &y, int which, const rows &looks, const rows &row,
                            Done done)
{
    const double *state = y.state[which];
    product(
        x, y.at.n, y.at.n, s.d, [&](int i, int e) { return entry(looks, y.at, i, e); },
        [&](int e, int j) { return entry(row, y.at, j, e); },
        [&](int i, int j, double sum) { x->g[i * TILE + j] = sum; });
    product(
        x, y.at.n, s.R, s.d, [&](int i, int e) { return entry(looks, y.at, i, e); },
        [&](int e, int r) { return state[(int64_t)r * (s.d + 2) + 2 + e]; },
        [&](int i, int r, double sum) { see(x, s, y, which, i, r, sum, done); });
    __syncthreads();
}

/* done(i, e, Σ_r u_ir x_ir): states as they are at i, summed with weights u. */
template <class Share, class Done>
__device__ static void gather(desk *x, const causal &s, const chunk &y, int which, const rows &row, Share u, Done done)
{
    const double *state = y.state[which];
    const ls_real *m = y.m[which];
    mix(x, y.at.n, s.R, u, y.a[which], m);
    product(
        x, y.at.n, s.d, s.R + y.at.n,
        [&](int i, int k) {
            if (k >= s.R) return x->g[i * TILE + k - s.R];
            return u(i, k) * weight(state[(int64_t)k * (s.d + 2)], (double)m[(int64_t)i * s.R + k]);
        },
        [&](int k, int e) { return k >= s.R ? entry(row, y.at, k - s.R, e) : state[(int64_t)k * (s.d + 2) + 2 + e]; },
        done);
    __syncthreads();
}

/* top and the sum of e^(logit - top) of a row, for all lanes of the warp that calls. */
struct partition {
    double top, sum;
};

__device__ static partition partition_of(int R, const double *logit)
{
    double top = -INFINITY, sum = 0;
    for (int r = threadIdx.x % LS_WARP; r < R; r += LS_WARP) top = logit[r] > top ? logit[r] : top;
    top = ls_warp_max(top);
    for (int r = threadIdx.x % LS_WARP; r < R; r += LS_WARP) sum += (double)ls_exp((ls_real)(logit[r] - top));
    return {top, ls_warp_sum(sum)};
}

__device__ static double probability(partition z, double logit)
{
    return (double)ls_exp((ls_real)(logit - z.top)) / z.sum;
}

__global__ static void __launch_bounds__(LS_THREADS, 2) apply_chunk(causal s, ls_view out)
{
    __shared__ desk x;
    const chunk y = chunk_of(s);
    const int R = s.R;
    make_maxima(s, y);
    look(&x, s, y, 0, s.q, s.k, [&](int i, int r, double sum, double dot) {
        y.logit[(int64_t)i * R + r] = sum > 0 ? s.scale * dot / sum : 0;
    });
    for (int at = threadIdx.x; at < y.at.n * R; at += blockDim.x) /* what stands in g is of no use to it */
        see(&x, s, y, 1, at / R, at % R, 0,
            [&](int, int, double sum, double) { y.w[at] = sum > 0 ? (ls_real)(1 / sum) : 0; });
    __syncthreads();
    for (int i = threadIdx.x / LS_WARP; i < y.at.n; i += blockDim.x / LS_WARP) {
        const double *logit = y.logit + (int64_t)i * R;
        const partition z = partition_of(R, logit);
        for (int r = threadIdx.x % LS_WARP; r < R; r += LS_WARP)
            y.w[(int64_t)i * R + r] = (ls_real)(probability(z, logit[r]) * (double)y.w[(int64_t)i * R + r]);
    }
    __syncthreads();
    gather(
        &x, s, y, 1, s.v, [&](int i, int r) { return (double)y.w[(int64_t)i * R + r]; },
        [&](int i, int e, double sum) {
            ls_row(out, y.at.b, y.at.h, y.at.t + i)[e] = is_padded(s.q, y.at, i) ? 0 : (ls_real)sum;
        });
}

/* The sums of the chunks become the states that enter them. */
static causal open_causal(ls_pass *p, int phase)
{
    const ls_summary *got = &p->summary[phase];
    const chunking c = short_chunks(p, p->T);
    const causal s = {.c = c,
                      .R = (int)slots(p),
                      .d = (int)p->d,
                      .scale = p->scale,
                      .q = {p->q, p->pad_q, p->T},
                      .k = {p->own.k, p->own.pad, p->S},
                      .v = {p->own.v, p->own.pad, p->S},
                      .dout = {p->dout, p->pad_q, p->T},
                      .a = {p->work[A_K], p->work[A_V]},
                      .m = {p->work[M_K], p->work[M_V]},
                      .w = p->work[W],
                      .logit = doubles(p, LOGIT),
                      .dp = doubles(p, DP),
                      .u = doubles(p, U),
                      .states = doubles(p, STATES),
                      .dstates = doubles(p, DSTATES)};
    make_logits(p);
    sum_chunks(p, c);
    LS_LAUNCH(p->queue, scan_states, ls_blocks(got->monoid.groups * (p->d + 1), 128), 128, 0, got->monoid.groups,
              c.count, slots(p), p->d + 2, got->got, doubles(p, TOPS), s.states);
    return s;
}

static ls_status apply_causal(ls_pass *p, int phase)
{
    const int64_t blocks = p->B * p->H * short_chunks(p, p->T).count;
    if (blocks == 0) return LS_OK;
    const causal s = open_causal(p, phase);
    LS_LAUNCH(p->queue, apply_chunk, (int)blocks, LS_THREADS, 0, s, p->out);
    return ls_launched(p->queue, "abc: apply");
}

/* The share of the state that enters in u: of x Σ_i c_ir u_ir scale look_i, of s -Σ_i c_ir u_ir seen_ir. */
template <class Share>
__device__ static void enter_backward(desk *x, const causal &s, const chunk &y, int which, const rows &looks,
                                      double scale, Share u, const double *seen)
{
    const int lane = threadIdx.x % LS_WARP, stride = s.d + 2;
    const double *state = y.state[which];
    double *to = y.dstate[which];
    const auto share = [&](int r, int i) {
        return u(i, r) * weight(state[(int64_t)r * stride], (double)y.m[which][(int64_t)i * s.R + r]);
    };
    product(
        x, s.R, s.d, y.at.n, share, [&](int i, int e) { return scale * entry(looks, y.at, i, e); },
        [&](int r, int e, double sum) { to[(int64_t)r * stride + 2 + e] = sum; });
    for (int r = threadIdx.x / LS_WARP; r < s.R; r += blockDim.x / LS_WARP) {
        double sum = 0;
        for (int i = lane; i < y.at.n; i += LS_WARP) sum -= share(r, i) * seen[(int64_t)i * s.R + r];
        sum = ls_warp_sum(sum);
        if (lane == 0) to[(int64_t)r * stride + 1] = sum;
    }
}

/* Pass 1: logit, u, dp, w; dq; what the states that enter get of these queries. */
__global__ static void __launch_bounds__(LS_THREADS, 2) queries_backward(causal s, ls_view dq)
{
    __shared__ desk x;
    const chunk y = chunk_of(s);
    const int R = s.R;
    make_maxima(s, y);
    look(&x, s, y, 0, s.q, s.k, [&](int i, int r, double sum, double dot) {
        y.logit[(int64_t)i * R + r] = sum > 0 ? s.scale * dot / sum : 0;
        y.u[(int64_t)i * R + r] = sum > 0 ? 1 / sum : 0;
    });
    look(&x, s, y, 1, s.dout, s.v, [&](int i, int r, double sum, double dot) {
        y.dp[(int64_t)i * R + r] = sum > 0 ? dot / sum : 0;
        y.w[(int64_t)i * R + r] = sum > 0 ? (ls_real)(1 / sum) : 0;
    });
    for (int i = threadIdx.x / LS_WARP; i < y.at.n; i += blockDim.x / LS_WARP) {
        const int64_t row = (int64_t)i * R, padded = is_padded(s.q, y.at, i);
        const partition z = partition_of(R, y.logit + row);
        double mean = 0;
        for (int r = threadIdx.x % LS_WARP; r < R; r += LS_WARP)
            mean += probability(z, y.logit[row + r]) * y.dp[row + r];
        mean = ls_warp_sum(mean);
        for (int r = threadIdx.x % LS_WARP; r < R; r += LS_WARP) {
            const double p = padded ? 0 : probability(z, y.logit[row + r]);
            y.u[row + r] *= p * (y.dp[row + r] - mean);
            y.w[row + r] = (ls_real)(p * (double)y.w[row + r]);
        }
    }
    __syncthreads();
    const auto u = [&](int i, int r) { return y.u[(int64_t)i * R + r]; };
    const auto w = [&](int i, int r) { return (double)y.w[(int64_t)i * R + r]; };
    gather(&x, s, y, 0, s.k, u, [&](int i, int e, double sum) {
        ls_row(dq, y.at.b, y.at.h, y.at.t + i)[e] = is_padded(s.q, y.at, i) ? 0 : (ls_real)(s.scale * sum);
    });
    enter_backward(&x, s, y, 0, s.q, s.scale, u, y.logit);
    enter_backward(&x, s, y, 1, s.dout, 1, w, y.dp);
}

/* Pass 2, when the gradients of the states that leave are known: dk or dv but for φ's part, and logits become da, db.
 * blockIdx.y: keys or values. */
__global__ static void __launch_bounds__(LS_THREADS, 2) keys_backward(causal s, ls_view dk, ls_view dv)
{
    __shared__ desk x;
    const chunk y = chunk_of(s);
    const int which = blockIdx.y, R = s.R, n = y.at.n, stride = s.d + 2;
    const rows &looks = which ? s.dout : s.q, &row = which ? s.v : s.k;
    const ls_view to = which ? dv : dk;
    const double scale = which ? 1 : s.scale, *seen = which ? y.dp : y.logit, *after = y.dstate[which];
    ls_real *a = y.a[which];
    const ls_real *m = y.m[which], *last = m + (int64_t)(n - 1) * R;
    const auto u = [&](int i, int r) { return which ? (double)y.w[(int64_t)i * R + r] : y.u[(int64_t)i * R + r]; };
    mix(&x, n, R, u, a, m);
    product(
        &x, n, s.d, R + n,
        [&](int j, int k) {
            return k >= R ? scale * x.g[(k - R) * TILE + j] : (double)ls_exp(a[(int64_t)j * R + k] - last[k]);
        },
        [&](int k, int e) { return k >= R ? entry(looks, y.at, k - R, e) : after[(int64_t)k * stride + 2 + e]; },
        [&](int j, int e, double sum) { ls_row(to, y.at.b, y.at.h, y.at.t + j)[e] = (ls_real)sum; });
    __syncthreads();
    product(
        &x, n, n, s.d, [&](int i, int e) { return entry(looks, y.at, i, e); },
        [&](int e, int j) { return entry(row, y.at, j, e); },
        [&](int i, int j, double sum) { x.g[i * TILE + j] = sum; });
    product(
        &x, n, R, s.d, [&](int j, int e) { return entry(row, y.at, j, e); },
        [&](int e, int r) { return after[(int64_t)r * stride + 2 + e]; },
        [&](int j, int r, double sum) {
            const int64_t own = (int64_t)j * R + r;
            double da = (double)ls_exp(a[own] - last[r]) * (after[(int64_t)r * stride + 1] + sum);
            for (int i = j; i < n; i++) {
                const int64_t at = (int64_t)i * R + r;
                da += (double)ls_exp(a[own] - m[at]) * u(i, r) * (scale * x.g[i * TILE + j] - seen[at]);
            }
            a[own] = (ls_real)da;
        });
}

static ls_status apply_causal_backward(ls_pass *p, int phase)
{
    const ls_summary *got = &p->summary[phase];
    const int64_t blocks = p->B * p->H * short_chunks(p, p->T).count;
    causal s = {};
    if (blocks > 0) {
        s = open_causal(p, phase);
        LS_LAUNCH(p->queue, queries_backward, (int)blocks, LS_THREADS, 0, s, p->dq);
    }
    LS_LAUNCH(p->queue, scan_gradients, ls_blocks(got->monoid.groups * (p->d + 1), 128), 128, 0, got->monoid.groups,
              s.c.count, slots(p), p->d + 2, doubles(p, STATES), doubles(p, DSTATES), got->dgot);
    if (blocks > 0) {
        LS_LAUNCH(p->queue, keys_backward, dim3((unsigned)blocks, 2), LS_THREADS, 0, s, p->own.dk, p->own.dv);
        map_backward(p, NULL);
    }
    return ls_launched(p->queue, "abc: apply backward");
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

} // namespace

extern "C" const ls_cuda_mechanism ls_abc_cuda = {plan, kernels, NULL};
