/* Causal attention with bounded-memory control on a GPU. The formulas and the names are those of abc.c.
 *
 * Rows go in chunks of 64. Sums of chunks in parallel, a scan over chunks from what the ranks before sent, then all
 * chunks in parallel, a block each. In a chunk no state is walked along. With (m; s, x) the state that enters, any
 * n_ir, c_ir = e^(m_r - n_ir) and E_ijr = e^(a_jr - n_ir) for keys j <= i of the chunk,
 *
 *   s_ir = c_ir s_r + Σ_j E_ijr,  q_i·x_ir = c_ir q_i·x_r + Σ_j E_ijr q_i·k_j,   logit_ir = scale q_i·x_ir / s_ir
 *   o_i = Σ_r w_ir c_ir x_r + Σ_j W_ij v_j,  W_ij = Σ_r w_ir E_ijr,  w = p / s    (E, c, s, x of the values)
 *
 * Backward, with dp_ir = do_i·Ṽ_ir, u_ir = p_ir (dp_ir - Σ p dp) / s_ir of the keys, and the gradient (ds, dx) of the
 * state that leaves the chunk,
 *
 *   dq_i = scale (Σ_r u_ir c_ir x_r + Σ_j U_ij k_j),  U_ij = Σ_r u_ir E_ijr
 *   da_jr = Σ_{i>=j} E_ijr u_ir (scale q_i·k_j - logit_ir) + e_jr (ds_r + k_j·dx_r)
 *   dk_j = scale Σ_{i>=j} U_ij q_i + Σ_r e_jr dx_r + da_j φ_kᵀ,   e_jr = e^(a_jr - m_r at the chunk's end)
 *   what the state that enters gets: Σ_i c_ir u_ir scale q_i of x, -Σ_i c_ir u_ir logit_ir of s, and what the state
 *   that leaves has, times e^(m_r before - m_r after): a scan over chunks, backward
 *
 * and for the values the same with u := w, scale q := do, logit := dp.
 *
 * n_ir is m_r, or without a state the first key's logit, as long as the chunk's logits stay below n_r + 40: then E_ijr
 * is F_jr = e^(a_jr - n_r), c is 1, s_ir >= 1, and all is products of small matrices, of which one is 0 above its
 * diagonal. In a chunk that is steeper n_ir is the running maximum, no e^ is above 1, and what has E in it is summed
 * term by term. Products are in double throughout, also differences before they are weighed: that is what keeps
 * gradients of nearly equal slots. Tables of (row, slot) lie in memory, (L, R) of each head. */
#include "abc_cuda.h"

namespace ls_abc
{

constexpr ls_real STEEP = 40;

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
                const int rises = m_own[c] > m;
                const double shrink = rises ? weight(m, m_own[c]) : weight(m_own[c], m);
                x[(c0 + c) * R * stride + in] = y;
                if (in == 1) x[(c0 + c) * R * stride] = m;
                y = rises ? shrink * y + own[c] : y + shrink * own[c];
                if (rises) m = m_own[c];
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
    const ls_real *phi[2];
    ls_real *w;
    double *logit, *dp, *u, *states, *dstates;
};

/* Keys or values of a chunk: its rows, and the rows that look at them; its tables, its states. */
struct side {
    strip looks, row;
    uint64_t looks_shown, row_shown;   /* a bit for each row */
    int n, R, d, stride, steep, first; /* first: that is not padded */
    double scale;                      /* of looks */
    ls_real *a, *m;
    double *state, *dstate;
    const double *next; /* the state of the next chunk, or NULL */
    double *seen;       /* logit or dp */
    double *u_k;        /* u of keys, of values */
    ls_real *u_v;
};

/* What a block of 256 threads has in shared memory: a product over pairs of rows, operands. */
struct desk {
    double g[TILE * (TILE + 4)];
    double a[2 * TILE * (DEPTH + 4)], x[FEW * (DEPTH + 4)];
    place at; /* in registers this and mine would leave no room for what is computed */
    side mine;

    __device__ double *b() /* the other half of a, which as a whole has a TILE x TILE, too */
    {
        return a + TILE * (DEPTH + 4);
    }
};

/* x->at is there, and remains. */
__device__ static const side &side_of(desk *x, const causal &s, int which, int steep)
{
    const place at = x->at;
    side y;
    const int64_t first = (at.bh * s.c.rows + at.t) * s.R, element = (at.bh * 2 + which) * s.c.count + at.chunk;
    y.n = at.n, y.R = s.R, y.d = s.d, y.stride = s.d + 2;
    y.looks = which ? strip_of(s.dout, at, s.d) : strip_of(s.q, at, s.d);
    y.row = which ? strip_of(s.v, at, s.d) : strip_of(s.k, at, s.d);
    y.looks_shown = shown_tile(y.looks), y.row_shown = shown_tile(y.row);
    y.scale = which ? 1 : s.scale;
    const int low = (int)(unsigned)y.row_shown, high = (int)(y.row_shown >> LS_WARP);
    y.first = low != 0 ? __ffs(low) - 1 : high != 0 ? LS_WARP + __ffs(high) - 1 : 0;
    y.a = s.a[which] + first, y.m = s.m[which] + first;
    y.state = s.states + element * s.R * y.stride, y.dstate = s.dstates + element * s.R * y.stride;
    y.next = at.chunk + 1 < s.c.count ? y.state + s.R * y.stride : NULL;
    y.seen = (which ? s.dp : s.logit) + first, y.u_k = s.u + first, y.u_v = s.w + first;
    __syncthreads();
    if (threadIdx.x == 0) x->mine = y, x->mine.steep = steep;
    __syncthreads();
    return x->mine;
}

/* n_r; of a chunk before whose end there is no key 0. */
__device__ static ls_real level(const side &y, int r)
{
    const double m = y.state[r * y.stride];
    if (m > -INFINITY) return (ls_real)m;
    const ls_real a = y.a[y.first * y.R + r];
    return a > -INFINITY ? a : 0;
}

/* m_ir, 0 where there still is no key: e^(-inf - 0) is 0. A warp for each slot, lanes are rows. */
__device__ static void make_maxima(const side &y)
{
    const int lane = threadIdx.x % LS_WARP;
#pragma unroll 1
    for (int r = threadIdx.x / LS_WARP; r < y.R; r += LS_THREADS / LS_WARP) {
        ls_real top = (ls_real)y.state[r * y.stride];
#pragma unroll 1
        for (int i0 = 0; i0 < y.n; i0 += LS_WARP) {
            const int i = (i0 + lane) * y.R + r;
            ls_real x = i0 + lane < y.n ? y.a[i] : -INFINITY;
            for (int step = 1; step < LS_WARP; step *= 2) {
                const ls_real before = __shfl_sync(0xffffffffu, x, lane >= step ? lane - step : lane);
                x = before > x ? before : x;
            }
            x = top > x ? top : x;
            if (i0 + lane < y.n) y.m[i] = x == -INFINITY ? 0 : x;
            top = __shfl_sync(0xffffffffu, x, LS_WARP - 1);
        }
    }
    __syncthreads();
}

/* Finds out whether the chunk is steep, and, with `make`, F: where maxima would be. */
__device__ static void find_steep(desk *x, int make)
{
    const side &y = x->mine;
    int steep = 0;
#pragma unroll 1
    for (int r = threadIdx.x % FEW; r < y.R; r += FEW) {
        const ls_real n = level(y, r);
#pragma unroll 4
        for (int j = threadIdx.x / FEW; j < y.n; j += LS_THREADS / FEW) {
            const ls_real above = y.a[j * y.R + r] - n;
            steep |= above > STEEP;
            if (make) y.m[j * y.R + r] = ls_exp(above);
        }
    }
    steep = __syncthreads_or(steep);
    if (threadIdx.x == 0) x->mine.steep = steep;
    __syncthreads();
}

/* With what it takes to know of E. */
__device__ static const side &open_side(desk *x, const causal &s, int which)
{
    const side &y = side_of(x, s, which, 0);
    find_steep(x, 1);
    if (y.steep) make_maxima(y);
    return y;
}

__device__ static double steep_weight(const side &y, int i, int j, int r)
{
    return (double)ls_exp(y.a[j * y.R + r] - y.m[i * y.R + r]);
}

/* c_ir */
__device__ static double entering(const side &y, int i, int r)
{
    return y.steep ? weight(y.state[r * y.stride], (double)y.m[i * y.R + r]) : 1;
}

/* m_r at the chunk's end as weights e_jr want it: 0 of all keys where nothing follows. */
__device__ static double leaving(const side &y, int j, int r)
{
    const double last = y.next == NULL ? -INFINITY : y.next[r * y.stride];
    return last == -INFINITY ? 0 : (double)ls_exp(y.a[j * y.R + r] - (ls_real)last);
}

/* f of rows that are taken as they are */
struct same {
    __device__ double operator()(double x) const
    {
        return x;
    }
};

/* done(i, r) for the rows of the chunk and slots [r0, r0 + FEW), each by one thread */
template <class Done> __device__ static void for_table(const side &y, int r0, Done done)
{
    const int r = r0 + (int)threadIdx.x % FEW;
#pragma unroll 1
    for (int i = threadIdx.x / FEW; r < y.R && i < y.n; i += LS_THREADS / FEW) done(i, r);
}

/* to (TILE,FEW) = a table, of slots from r0 on */
template <class Table> __device__ static void stage_table(double *to, const side &y, int r0, Table table)
{
    stage<TILE, FEW>(to, [&](int i, int r) { return i < y.n && r0 + r < y.R ? (double)table(i, r0 + r) : 0; });
}

/* to (FEW,DEPTH) = x of states, or dx, of the same slots, from feature e0 on */
__device__ static void stage_states(double *to, const side &y, const double *state, int r0, int e0)
{
    stage<FEW, DEPTH>(
        to, [&](int r, int e) { return r0 + r < y.R && e0 + e < y.d ? state[(r0 + r) * y.stride + 2 + e0 + e] : 0; });
}

/* g_ij = look_i·row_j for j <= i, else 0, once for all slots, with the first of them; dot_ir = i·x_r for slots from r0
 * on, x the states or their gradients, i the rows that look, or those that are looked at. */
__device__ static void meet(desk *x, const side &y, const double *state, int looks, int r0, division<TILE, FEW> &dot)
{
    division<TILE, TILE> g;
    const double *of = looks ? x->a : x->b();
#pragma unroll 1
    for (int e0 = 0; e0 < y.d; e0 += DEPTH) {
        __syncthreads();
        if (r0 == 0 || looks) stage_rows<TILE, DEPTH>(x->a, y.looks, y.looks_shown, 0, e0, same());
        if (r0 == 0 || !looks) stage_rows<TILE, DEPTH>(x->b(), y.row, y.row_shown, 0, e0, same());
        stage_states(x->x, y, state, r0, e0);
        __syncthreads();
        if (r0 == 0)
            g.add(
                0, depth_of(y.d - e0), (int)ls_min(y.n, g.row() + 16 * g.I),
                [&](int i, int e) { return cell<DEPTH>(x->a, i, e); },
                [&](int e, int j) { return cell<DEPTH>(x->b(), j, e); });
        dot.add(
            0, depth_of(y.d - e0), y.R - r0, [&](int i, int e) { return of[i * (DEPTH + 4) + e]; },
            [&](int e, int r) { return cell<DEPTH>(x->x, r, e); });
    }
    if (r0 == 0) g.each(TILE, TILE, [&](int i, int j, double sum) { cell<TILE>(x->g, i, j) = j <= i ? sum : 0; });
    __syncthreads();
}

/* done(i, r, s_ir, Σ_{j<=i} E_ijr g_ij + c_ir before_ir) for slots from r0 on; all wait before. */
template <class Done> __device__ static void see(desk *x, const side &y, int r0, division<TILE, FEW> &before, Done done)
{
    if (y.steep) {
        before.each(y.n, FEW, [&](int i, int r, double dot) { cell<FEW>(x->a, i, r) = dot; });
        __syncthreads();
        for_table(y, r0, [&](int i, int r) {
            const double c = entering(y, i, r);
            double sum = c * y.state[r * y.stride + 1], dot = c * cell<FEW>(x->a, i, r - r0);
#pragma unroll 1
            for (int j = 0; j <= i; j++) {
                const double e = steep_weight(y, i, j, r);
                sum += e;
                dot += e * cell<TILE>(x->g, i, j);
            }
            done(i, r, sum, dot);
        });
        return;
    }
    division<TILE, FEW> sum;
    const int last = (int)ls_min((y.n + 7) / 8 * 8, sum.row() + 16);
    const auto weights = [&](int j, int r) { return cell<FEW>(x->b(), j, r); };
    stage_table(x->b(), y, r0, [&](int j, int r) { return y.m[j * y.R + r]; });
    __syncthreads();
    before.add(
        0, last, y.R - r0, [&](int i, int j) { return cell<TILE>(x->g, i, j); }, weights);
    sum.add(
        0, last, y.R - r0, [&](int i, int j) { return j <= i ? 1.0 : 0.0; }, weights);
    sum.both(before, y.n, y.R - r0, [&](int i, int r, double all, double dot) {
        done(i, r0 + r, all + y.state[(r0 + r) * y.stride + 1], dot);
    });
}

/* done(i, r, s_ir, look_i·x_ir) */
template <class Done> __device__ static void look(desk *x, const side &y, Done done)
{
#pragma unroll 1
    for (int r0 = 0; r0 < y.R; r0 += FEW) {
        division<TILE, FEW> dot;
        meet(x, y, y.state, 1, r0, dot);
        see(x, y, r0, dot, done);
    }
    __syncthreads();
}

/* g_ij = Σ_r u(i,r) E_ijr for j <= i, else 0. */
template <class Share> __device__ static void mix(desk *x, const side &y, Share u)
{
    if (y.steep) {
        __syncthreads();
#pragma unroll 1
        for (int at = threadIdx.x; at < TILE * TILE; at += LS_THREADS) {
            const int i = at / TILE, j = at % TILE;
            double sum = 0;
#pragma unroll 1
            for (int r = 0; j <= i && i < y.n && r < y.R; r++) sum += (double)u(i, r) * steep_weight(y, i, j, r);
            cell<TILE>(x->g, i, j) = sum;
        }
        __syncthreads();
        return;
    }
    division<TILE, TILE> g;
#pragma unroll 1
    for (int r0 = 0; r0 < y.R; r0 += FEW) {
        __syncthreads();
        stage_table(x->a, y, r0, u);
        stage_table(x->b(), y, r0, [&](int j, int r) { return y.m[j * y.R + r]; });
        __syncthreads();
        g.add(
            0, (int)ls_min(FEW, depth_of(y.R - r0)), (int)ls_min(y.n, g.row() + 16 * g.I),
            [&](int i, int r) { return cell<FEW>(x->a, i, r); }, [&](int r, int j) { return cell<FEW>(x->b(), j, r); });
    }
    g.each(TILE, TILE, [&](int i, int j, double sum) { cell<TILE>(x->g, i, j) = j <= i ? sum : 0; });
    __syncthreads();
}

/* sum += Σ_r share(i,r) x_r of states, or of their gradients, for features from e0 on */
template <class Share>
__device__ static void add_states(desk *x, const side &y, const double *state, int e0, Share share,
                                  division<TILE, TILE> &sum)
{
    spread(
        x->a, x->b(), y.n, y.R, y.d, e0, share, [&](int r, int e) { return state[r * y.stride + 2 + e]; }, sum);
}

/* done(at, i, e, Σ_r u_ir x_ir): states as they are at i, summed with weights u; at: where e is of row i of `to`. */
template <class Share, class Done>
__device__ static void gather(desk *x, const side &y, const strip &to, Share u, Done done)
{
    mix(x, y, u);
    for (int e0 = 0; e0 < y.d; e0 += TILE) {
        division<TILE, TILE> sum;
        add_states(
            x, y, y.state, e0, [&](int i, int r) { return (double)u(i, r) * entering(y, i, r); }, sum);
        __syncthreads();
        stage_rows<TILE, TILE>(x->a, y.row, y.row_shown, 0, e0, same());
        __syncthreads();
        sum.add(
            0, (int)ls_min((y.n + 7) / 8 * 8, sum.row() + 16 * sum.I), y.d - e0,
            [&](int i, int j) { return cell<TILE>(x->g, i, j); }, [&](int j, int e) { return cell<TILE>(x->a, j, e); });
        sum.put(to, y.n, e0, done);
    }
    __syncthreads();
}

/* top and 1 / the sum of e^(logit - top) of a row. */
struct partition {
    double top, inverse;
};

__device__ static partition partition_of(quarter at, int R, const double *logit)
{
    double top = -INFINITY, sum = 0;
    for (int r = at.lane; r < R; r += 4) top = logit[r] > top ? logit[r] : top;
    top = at.max(top);
    for (int r = at.lane; r < R; r += 4) sum += (double)ls_exp((ls_real)(logit[r] - top));
    return {top, 1 / at.sum(sum)};
}

__device__ static double probability(partition z, double logit)
{
    return (double)ls_exp((ls_real)(logit - z.top)) * z.inverse;
}

__device__ static void begin(desk *x, const causal &s)
{
    if (threadIdx.x == 0) x->at = place_of(s.c);
    __syncthreads();
}

/* ------------------------------------------------------------------------------------------------ apply */

__global__ static void __launch_bounds__(LS_THREADS, 3) apply_chunk(causal s, ls_view out)
{
    LS_SHARED(desk, x);
    begin(x, s);
    const side &y = open_side(x, s, 0); /* until it is of the values */
    look(x, y, [&](int i, int r, double sum, double dot) { y.seen[i * y.R + r] = sum > 0 ? y.scale * dot / sum : 0; });
    open_side(x, s, 1);
#pragma unroll 1
    for (int r0 = 0; r0 < y.R; r0 += FEW) { /* what stands in g is of no use to it */
        division<TILE, FEW> nothing;
        see(x, y, r0, nothing,
            [&](int i, int r, double sum, double) { y.u_v[i * y.R + r] = sum > 0 ? (ls_real)(1 / sum) : 0; });
        __syncthreads();
    }
    {
        const quarter mine;
        const int row = mine.row * y.R, n = mine.row < y.n ? y.R : 0;
        const double *logit = s.logit + (y.u_v - s.w) + row;
        const partition z = partition_of(mine, n, logit);
        for (int r = mine.lane; r < n; r += 4)
            y.u_v[row + r] = (ls_real)(probability(z, logit[r]) * (double)y.u_v[row + r]);
        __syncthreads();
    }
    gather(
        x, y, strip_of({out, NULL, 0}, x->at, s.d), [&](int i, int r) { return y.u_v[i * y.R + r]; },
        [&](ls_real *o, int i, int, double sum) { *o = y.looks_shown >> i & 1 ? (ls_real)sum : 0; });
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
                      .phi = {phi(p, PHI_K, p->params), phi(p, PHI_V, p->params)},
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
    LS_LAUNCH(p->queue, apply_chunk, (int)blocks, LS_THREADS, sizeof(desk), s, p->out);
    return ls_launched(p->queue, "abc: apply");
}

/* ------------------------------------------------------------------------------------------------ apply, backward */

/* The share of the state that enters in u: of x Σ_i c_ir u_ir scale look_i, of s -Σ_i c_ir u_ir seen_ir; where there is
 * none 0. */
template <class Share> __device__ static void enter_backward(desk *x, const side &y, Share u)
{
    const auto live = [&](int r) { return y.state[r * y.stride] > -INFINITY; };
    const int deep = (y.n + 7) / 8 * 8;
#pragma unroll 1
    for (int r0 = 0; r0 < y.R; r0 += FEW) {
        __syncthreads();
        stage_table(x->a, y, r0, u);
        if (y.steep) /* the thread that put a number there takes it up again, here and below */
            for_table(y, r0, [&](int i, int r) { cell<FEW>(x->a, i, r - r0) *= entering(y, i, r); });
        stage_table(x->b(), y, r0, [&](int i, int r) { return cell<FEW>(x->a, i, r - r0) * y.seen[i * y.R + r]; });
#pragma unroll 1
        for (int e0 = 0; e0 < y.d; e0 += TILE) {
            division<FEW, TILE> sum, known;
            if (e0 > 0) __syncthreads();
            stage_rows<TILE, TILE>(x->g, y.looks, y.looks_shown, 0, e0, [&](double z) { return y.scale * z; });
            __syncthreads();
            sum.add(
                0, deep, y.d - e0, [&](int r, int i) { return cell<FEW>(x->a, i, r); },
                [&](int i, int e) { return cell<TILE>(x->g, i, e); });
            sum.each(y.R - r0, y.d - e0, [&](int r, int e, double z) {
                y.dstate[(r0 + r) * y.stride + 2 + e0 + e] = live(r0 + r) ? z : 0;
            });
            if (e0 > 0) continue;
            known.add(
                0, deep, 1, [&](int r, int i) { return cell<FEW>(x->b(), i, r); }, [](int, int) { return 1.0; });
            known.each(y.R - r0, 1,
                       [&](int r, int, double z) { y.dstate[(r0 + r) * y.stride + 1] = live(r0 + r) ? -z : 0; });
        }
    }
}

/* Pass 1: logit, u, dp, w; dq; what the states that enter get of these queries. */
__global__ static void __launch_bounds__(LS_THREADS, 3) queries_backward(causal s, ls_view dq)
{
    LS_SHARED(desk, x);
    begin(x, s);
    const side &y = x->mine; /* keys or values in turn */
    int steep = 0;           /* bit 0: of the keys, bit 1: of the values */
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        open_side(x, s, which);
        steep |= y.steep << which;
        look(x, y, [&](int i, int r, double sum, double dot) {
            const int at = i * y.R + r;
            const double inverse = sum > 0 ? 1 / sum : 0;
            y.seen[at] = y.scale * dot * inverse;
            if (which)
                y.u_v[at] = (ls_real)inverse;
            else
                y.u_k[at] = inverse;
        });
    }
    {
        const quarter mine;
        const int row = mine.row * y.R, n = mine.row < y.n ? y.R : 0, is_shown = y.looks_shown >> mine.row & 1;
        double *u = y.u_k + row;
        const double *dp = y.seen + row, *logit = s.logit + (u - s.u);
        ls_real *w = y.u_v + row;
        const partition z = partition_of(mine, n, logit);
        double mean = 0;
        for (int r = mine.lane; r < n; r += 4) mean += probability(z, logit[r]) * dp[r];
        mean = mine.sum(mean);
        for (int r = mine.lane; r < n; r += 4) {
            const double p = is_shown ? probability(z, logit[r]) : 0;
            u[r] *= p * (dp[r] - mean);
            w[r] = (ls_real)(p * (double)w[r]);
        }
    }
    side_of(x, s, 0, steep & 1);
    gather(
        x, y, strip_of({dq, NULL, 0}, x->at, s.d), [&](int i, int r) { return y.u_k[i * y.R + r]; },
        [&](ls_real *o, int i, int, double sum) { *o = y.looks_shown >> i & 1 ? (ls_real)(s.scale * sum) : 0; });
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        side_of(x, s, which, steep >> which & 1);
        enter_backward(x, y, [&](int i, int r) { return which ? (double)y.u_v[i * y.R + r] : y.u_k[i * y.R + r]; });
    }
}

/* Pass 2, when the gradients of the states that leave are known: dk or dv, and logits become da, db.
 * blockIdx.y: keys or values. */
__global__ static void __launch_bounds__(LS_THREADS, 3) keys_backward(causal s, ls_view dk, ls_view dv)
{
    LS_SHARED(desk, x);
    begin(x, s);
    const int which = blockIdx.y, R = s.R;
    const side &y = side_of(x, s, which, 0);
    find_steep(x, 0);
    const strip to = which ? strip_of({dv, NULL, 0}, x->at, s.d) : strip_of({dk, NULL, 0}, x->at, s.d);
    const int n = y.n, deep = (n + 7) / 8 * 8;
    const double *after = y.dstate;
    const auto u = [&](int i, int r) { return which ? (double)y.u_v[i * R + r] : y.u_k[i * R + r]; };
    mix(x, y, u);
#pragma unroll 1
    for (int e0 = 0; e0 < y.d; e0 += TILE) {
        division<TILE, TILE> sum;
        __syncthreads();
        stage_rows<TILE, TILE>(x->a, y.looks, y.looks_shown, 0, e0, [&](double z) { return y.scale * z; });
        __syncthreads();
        sum.add(
            sum.row(), deep, y.d - e0, [&](int j, int i) { return cell<TILE>(x->g, i, j); }, /* i >= j */
            [&](int i, int e) { return cell<TILE>(x->a, i, e); });
        add_states(
            x, y, after, e0, [&](int j, int r) { return leaving(y, j, r); }, sum);
        sum.put(to, n, e0, [](ls_real *o, int, int, double z) { *o = (ls_real)z; });
    }
#pragma unroll 1
    for (int r0 = 0; r0 < R; r0 += FEW) {
        division<TILE, FEW> leave, inside, known;
        meet(x, y, after, 0, r0, leave);
        if (y.steep) {
            leave.each(n, FEW, [&](int j, int r, double from_state) { cell<FEW>(x->a, j, r) = from_state; });
            __syncthreads();
            for_table(y, r0, [&](int j, int r) {
                double da = leaving(y, j, r) * (after[r * y.stride + 1] + cell<FEW>(x->a, j, r - r0));
#pragma unroll 1
                for (int i = j; i < n; i++)
                    da += steep_weight(y, i, j, r) * u(i, r) * (y.scale * cell<TILE>(x->g, i, j) - y.seen[i * R + r]);
                y.a[j * R + r] = (ls_real)da;
            });
            continue;
        }
        stage_table(x->a, y, r0, u);
        stage_table(x->b(), y, r0, [&](int i, int r) { return u(i, r) * y.seen[i * R + r]; });
        __syncthreads();
        inside.add(
            inside.row(), deep, R - r0, [&](int j, int i) { return cell<TILE>(x->g, i, j); },
            [&](int i, int r) { return cell<FEW>(x->a, i, r); });
        known.add(
            known.row(), deep, R - r0, [&](int j, int i) { return i >= j ? 1.0 : 0.0; },
            [&](int i, int r) { return cell<FEW>(x->b(), i, r); });
        known.both(inside, TILE, FEW, [&](int, int, double &sum, double z) { sum = y.scale * z - sum; });
        leave.both(known, n, R - r0, [&](int j, int r, double from_state, double difference) {
            const double da = (double)y.m[j * R + r0 + r] * difference +
                              leaving(y, j, r0 + r) * (after[(r0 + r) * y.stride + 1] + from_state);
            y.a[j * R + r0 + r] = (ls_real)da;
        });
    }
    __syncthreads();
    const ls_real *map = s.phi[which];
#pragma unroll 1
    for (int e0 = 0; e0 < y.d; e0 += TILE) { /* logits were needed above */
        division<TILE, TILE> sum;
        spread(
            x->a, x->b(), n, R, y.d, e0, [&](int j, int r) { return y.a[j * R + r]; },
            [&](int r, int e) { return map[e * R + r]; }, sum);
        sum.put(to, n, e0, [](ls_real *o, int, int, double z) { *o += (ls_real)z; });
    }
}

ls_status apply_causal_backward(ls_pass *p, int phase)
{
    const ls_summary *got = &p->summary[phase];
    const int64_t blocks = p->B * p->H * short_chunks(p, p->T).count;
    causal s = {};
    if (blocks > 0) {
        s = open_causal(p, phase);
        LS_LAUNCH(p->queue, queries_backward, (int)blocks, LS_THREADS, sizeof(desk), s, p->dq);
    }
    LS_LAUNCH(p->queue, scan_gradients, ls_blocks(got->monoid.groups * (p->d + 1), 128), 128, 0, got->monoid.groups,
              s.c.count, slots(p), p->d + 2, doubles(p, STATES), doubles(p, DSTATES), got->dgot);
    if (blocks > 0) {
        LS_LAUNCH(p->queue, keys_backward, dim3((unsigned)blocks, 2), LS_THREADS, sizeof(desk), s, p->own.dk,
                  p->own.dv);
        map_backward(p, NULL);
    }
    return ls_launched(p->queue, "abc: apply backward");
}

} // namespace ls_abc
