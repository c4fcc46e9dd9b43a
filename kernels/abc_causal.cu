/* Causal attention with bounded-memory control on a GPU. The formulas and the names are those of abc.c.
 *
 * Rows go in chunks of 64. Sums of chunks in parallel, a scan over chunks from what the ranks before sent, then all
 * chunks in parallel, a block each. In a chunk no state is walked along. With m_ir the running maximum, (m; s, x) the
 * state that enters, c_ir = e^(m_r - m_ir) and E_ijr = e^(a_jr - m_ir) for keys j <= i of the chunk,
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
 * head. */
#include "abc_cuda.h"

namespace ls_abc
{

constexpr int DEEP = 8, LD = DEEP + 1; /* of products in a block: depth at a time */

/* What a block of 256 threads has in shared memory. */
struct desk {
    enum { deep = DEEP, ld = LD, across = 0 };
    double g[TILE * TILE];
    double a[TILE * LD], b[TILE * LD], m[TILE * LD];
};

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

/* ------------------------------------------------------------------------------------------------ scans */

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

/* ------------------------------------------------------------------------------------------------ in a chunk */

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

/* ------------------------------------------------------------------------------------------------ apply */

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

ls_status apply_causal(ls_pass *p, int phase)
{
    const int64_t blocks = p->B * p->H * short_chunks(p, p->T).count;
    if (blocks == 0) return LS_OK;
    const causal s = open_causal(p, phase);
    LS_LAUNCH(p->queue, apply_chunk, (int)blocks, LS_THREADS, 0, s, p->out);
    return ls_launched(p->queue, "abc: apply");
}

/* ------------------------------------------------------------------------------------------------ apply, backward */

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

ls_status apply_causal_backward(ls_pass *p, int phase)
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

} // namespace ls_abc
