/* Linear attention on a GPU: what queries take from states and, causal, from the keys of their chunk, and what keys get
 * from the gradients of states. A block has a strip of rows at a time. Theory: linear_slabs.h. */
#include "linear_tiles.h"

/* The state that a strip sees: its chunk's, or that of its (b,h). */
__device__ static inline int64_t state_of(const strip &s, int of_chunks)
{
    return of_chunks ? s.P : s.at.g;
}

/* The four threads that share row threadIdx.x / 4 of a strip: of n numbers each has every fourth piece of four. Pieces
 * of two rows lie in different banks where rows are rows_pitch() apart. f: where one begins. */
enum { SHARE = (int)LS_THREADS / (int)SIDE };
static_assert(SHARE == 4, "of 32 numbers a thread has the pieces at 4 (t % 2) + 16 (t / 2), and 8 after them");
#define EACH_PIECE(f, n)                                                                                               \
    for (int f0 = threadIdx.x % 2 * 4 + threadIdx.x / 2 % 2 * 16; f0 < (n); f0 += 32)                                  \
    _Pragma("unroll") for (int f = f0; f < f0 + 16; f += 8) if (f < (n))
LS_BOTH_SIDES int rows_pitch(int n)
{
    return (n + 23) / 32 * 32 + 8;
}

/* The row's features, but for those that were made elsewhere, which may be exponents; it must be there. */
__device__ static inline ls_four read_features(const linear &x, const features &y, const strip &s, int f)
{
    const int row = threadIdx.x / SHARE;
    const ls_real *from = y.act == LS_LINEAR_MADE ? y.made + (s.R + row) * x.r : row_in(s, y.rows, row);
    ls_four z = ls_read_some<4>(from + f, x.r - f, y.fours);
    if (y.act == LS_LINEAR_RELU)
        for (int k = 0; k < 4; k++) z.v[k] = ls_linear_act(LS_LINEAR_RELU, z.v[k]);
    else if (y.act == LS_LINEAR_ONE_PLUS_ELU)
        for (int k = 0; k < 4; k++) z.v[k] = f + k < x.r ? ls_linear_act(LS_LINEAR_ONE_PLUS_ELU, z.v[k]) : 0;
    return z;
}

/* Products of rows that the strip has, of columns [f, n), to rows of `pitch` numbers, which have room for whole pairs;
 * add: +=. */
template <class M>
__device__ static inline void put_products(const strip &s, sums<M, ROWS_ROWS> &sum, int f, int n, int add, ls_real *to,
                                           int pitch)
{
    enum { TOGETHER = M::IN_PLACE ? 1 : M::TOGETHER };
    to += f;
#pragma unroll
    for (int u = 0; u < sum.U; u++)
#pragma unroll
        for (int v = 0; v < sum.V; v += TOGETHER) {
            if (sum.row(u) >= s.count || f + sum.column(v) >= n) continue;
            ls_real *at = to + sum.row(u) * pitch + sum.column(v);
            ls_few<TOGETHER> y = {};
            if (add) y = ls_few_at<TOGETHER>(at);
            for (int k = 0; k < TOGETHER; k++) y.v[k] += sum.at(u, v + k);
            ls_put_few<TOGETHER>(at, y);
        }
}

/* cos ω(i - j), 0 where query i does not see key j. */
__device__ static inline ls_real apart(const linear &x, int i, int j, int count)
{
    return j > i || i >= count ? 0 : x.turns ? (ls_real)x.step[2 * (i - j) + 1] : 1;
}

/* Sums of a strip's rows, as `made` (row, sum) has them, to numbers [e0, e0 + SIDE) of rows that exist; add: +=. All is
 * made, and read, before the first is written. fours: rows have a multiple of 4 numbers, and can be written by fours.
 */
template <class M, int FORM, typename F>
__device__ static inline void put_rows(const linear &x, const strip &s, sums<M, FORM> &sum, ls_view v, int e0,
                                       int fours, int add, F made)
{
    constexpr int TOGETHER = M::TOGETHER;
    const auto row = [&](int u) { return s.at.t + sum.row(u) < x.s.rows && sum.row(u) < s.count; };
    const auto left = [&](int c) { return x.d - e0 - sum.column(c); };
#pragma unroll
    for (int u = 0; u < sum.U; u++) {
        const int i = sum.row(u);
        if (!row(u)) continue;
        const ls_real *from = row_in(s, v, i) + e0;
#pragma unroll
        for (int c = 0; c < sum.V; c += TOGETHER) {
            ls_few<TOGETHER> y = {};
            if (add) y = ls_read_some<TOGETHER>(from + sum.column(c), left(c), fours);
            for (int k = 0; k < TOGETHER; k++) sum.at(u, c + k) = (typename M::sum)(y.v[k] + made(i, sum.at(u, c + k)));
        }
    }
#pragma unroll
    for (int u = 0; u < sum.U; u++) {
        if (!row(u)) continue;
        ls_real *to = row_in(s, v, sum.row(u)) + e0;
#pragma unroll
        for (int c = 0; c < sum.V; c += TOGETHER) {
            ls_few<TOGETHER> y;
            for (int k = 0; k < TOGETHER; k++) y.v[k] = sum.at(u, c + k);
            ls_write_some<TOGETHER>(y, to + sum.column(c), left(c), fours);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ within a chunk */

/* Queries and keys of a chunk, with what their rows make of features: near. */
namespace
{
typedef struct pairs {
    features q, k;
    const facts *of_q, *of_k;
    int steep; /* exponentials are to be seen pair by pair */
} pairs;
} // namespace

/* Feature f of query i and of key j, as they see each other in a steep chunk. */
__device__ static inline ls_real steep_query(const linear &x, const pairs &p, const strip &s, int i, int f)
{
    return p.of_q->by[i] == 0 ? 0 : p.q.made[(s.R + i) * x.r + f];
}
__device__ static inline ls_real steep_key(const linear &x, const pairs &p, const strip &s, int i, int j, int f)
{
    return p.of_k->by[j] == 0 ? 0 : seen_from(x, s.R + j, f, x.c[s.R + i]);
}

/* w (SIDE,PITCH) = (a·b) cos ω(i - j) of the pairs of a chunk; rest: what rounding takes from it, or NULL. a, b: tiles.
 * Steep chunks are rare: what is done for them is short, not fast. */
template <class M>
__device__ static void multiply_pairs(const linear &x, const pairs &p, const strip &s, typename M::number *a,
                                      typename M::number *b, typename M::number *w, typename M::number *rest)
{
    const auto put = [&](int i, int j, ls_real y) {
        write_both(y * apart(x, i, j, s.count), w, rest, i * M::PITCH + j);
    };
    __syncthreads();
    if (p.steep) {
        const int i = threadIdx.x / SHARE;
        for (int j = threadIdx.x % SHARE; j < SIDE; j += SHARE) {
            typename M::sum y = 0;
            for (int f = 0; f < x.r && j <= i && i < s.count; f++)
                y += (typename M::sum)(steep_query(x, p, s, i, f) * steep_key(x, p, s, i, j, f));
            put(i, j, y);
        }
        return;
    }
    sums<M, ROWS_ROWS> sum;
    sum.clear();
    for (int f = 0; f < x.r; f += SIDE) {
        __syncthreads();
        load_features<M, OF_QUERIES>(x, p.q, s, *p.of_q, f, 0, a);
        load_features<M, OF_KEYS>(x, p.k, s, *p.of_k, f, 0, b);
        __syncthreads();
        sum.add(whole<M>(x.r - f), a, b);
    }
#pragma unroll
    for (int u = 0; u < sum.U; u++)
#pragma unroll
        for (int v = 0; v < sum.V; v++) put(sum.row(u), sum.column(v), sum.at(u, v));
}

/* The gradient of a_near: dw b, or pair by pair. It waits in x.da. rest: see multiply_pairs. */
template <class M>
__device__ static void pairs_to_queries(const linear &x, const pairs &p, const strip &s, const typename M::number *dw,
                                        const typename M::number *rest, typename M::number *tile)
{
    if (p.steep) {
        const int i = threadIdx.x / SHARE;
        __syncthreads();
        for (int f = threadIdx.x % SHARE; f < x.r && i < s.count; f += SHARE) {
            ls_real g = 0;
            for (int j = 0; j <= i; j++) g += read_both(dw, rest, i * M::PITCH + j) * steep_key(x, p, s, i, j, f);
            x.da[(s.R + i) * x.r + f] = g;
        }
        return;
    }
    for (int f0 = 0; f0 < x.r; f0 += SIDE) {
        sums<M, ROWS_COLUMNS> sum;
        sum.clear();
        __syncthreads();
        load_features<M, OF_KEYS>(x, p.k, s, *p.of_k, f0, 0, tile);
        __syncthreads();
        sum.add(SIDE, dw, tile);
        if (rest != NULL) sum.add(SIDE, rest, tile);
#pragma unroll
        for (int u = 0; u < sum.U; u++)
#pragma unroll
            for (int v = 0; v < sum.V; v += M::TOGETHER) {
                const int i = sum.row(u), f = f0 + sum.column(v);
                if (i >= s.count || f >= x.r) continue;
                ls_few<M::TOGETHER> g;
                for (int k = 0; k < M::TOGETHER; k++) g.v[k] = sum.at(u, v + k);
                ls_write_some<M::TOGETHER>(g, x.da + (s.R + i) * x.r + f, x.r - f, x.r % 4 == 0);
            }
    }
}

/* db of what keys' features are made of: dwᵀ a_near, times b where that is an exponential, or pair by pair. */
template <class M>
__device__ static void pairs_to_keys(const linear &x, const pairs &p, const strip &s, const typename M::number *dw,
                                     const typename M::number *rest, typename M::number *tile)
{
    if (p.steep) {
        const int j = threadIdx.x / SHARE;
        __syncthreads();
        for (int f = threadIdx.x % SHARE; f < x.r && j < s.count; f += SHARE) {
            ls_few<1> g = {};
            for (int i = j; i < s.count && p.of_k->by[j] != 0; i++)
                g.v[0] += read_both(dw, rest, i * M::PITCH + j) * steep_query(x, p, s, i, f) *
                          (f < x.exponentials ? steep_key(x, p, s, i, j, f) : 1);
            put_gradients(x, p.k, s, *p.of_k, j, f, 0, g);
        }
        return;
    }
    for (int f0 = 0; f0 < x.r; f0 += SIDE) {
        sums<M, COLUMNS_COLUMNS> sum;
        sum.clear();
        __syncthreads();
        load_features<M, OF_QUERIES>(x, p.q, s, *p.of_q, f0, 0, tile);
        __syncthreads();
        sum.add(SIDE, dw, tile);
        if (rest != NULL) sum.add(SIDE, rest, tile);
#pragma unroll
        for (int u = 0; u < sum.U; u++)
#pragma unroll
            for (int v = 0; v < sum.V; v += M::TOGETHER) {
                const int j = sum.row(u), f = f0 + sum.column(v);
                if (j >= s.count || f >= x.r) continue;
                ls_few<M::TOGETHER> g;
                for (int k = 0; k < M::TOGETHER; k++) {
                    g.v[k] = sum.at(u, v + k);
                    if (f + k < x.exponentials && p.of_k->by[j] != 0)
                        g.v[k] *= exponential_of(*p.of_k, j, p.k.made[(s.R + j) * x.r + f + k]);
                }
                put_gradients(x, p.k, s, *p.of_k, j, f, 0, g);
            }
    }
}

/* ------------------------------------------------------------------------------------------------ forward */

/* D += Σ_e row_e z_e over n numbers, z NULL: 1. Each thread that shares the row adds its part. */
template <class M>
__device__ static inline void add_row_times(const typename M::number *row, const ls_real *z, int n,
                                            typename M::exact &D)
{
    for (int e = threadIdx.x % SHARE; e < n; e += SHARE)
        D += (typename M::exact)read_number(row[e]) * (typename M::exact)(z == NULL ? 1 : z[e]);
}

/* out = (w v + A S) / D: w, where NEAR, within the chunk, S before it, or of all keys. k_near: keys as they are seen
 * within the chunk; q_near: queries as they see them. */
template <class M, int NEAR>
__global__ static void __launch_bounds__(LS_THREADS, NEAR ? 2 : 3)
    attend(linear x, features q, features q_near, features k_near, const ls_real *S, const ls_real *z, int64_t strips,
           ls_view v, int fours, ls_view out, int out_fours)
{
    LS_SHARED(ls_real, memory);
    __shared__ facts of_q, near_q, near_k;
    __shared__ ls_real inverse[SIDE];
    typename M::number *a = tile_number<M>(memory, 0), *b = tile_number<M>(memory, 1), *w = tile_number<M>(memory, 2);
    const int row = threadIdx.x / SHARE;
    for (int64_t n = blockIdx.x; n < strips; n += gridDim.x) {
        const strip s = strip_number(x, n);
        const int64_t state = state_of(s, NEAR);
        const ls_real *mine = S + state * x.F * x.d;
        typename M::exact D = 0;
        __syncthreads();
        find_facts<OF_QUERIES>(x, q, s, PAST, &of_q);
        if (NEAR) {
            const pairs p = {q_near, k_near, &near_q, &near_k, is_steep(x, s.P, k_near.from)};
            find_facts<OF_QUERIES>(x, q_near, s, p.steep ? ALONE : NEAR_BY, &near_q);
            find_facts<OF_KEYS>(x, k_near, s, PAST, &near_k);
            multiply_pairs<M>(x, p, s, a, b, w, NULL);
            __syncthreads();
            add_row_times<M>(w + row * M::PITCH, NULL, SIDE, D);
        }
        for (int e0 = 0; e0 < x.d; e0 += SIDE) {
            sums<M, ROWS_COLUMNS> sum;
            sum.clear();
            if (NEAR) {
                __syncthreads();
                load_rows<M>(x, s, e0, v, k_near.at.pad, fours, b);
                __syncthreads();
                sum.add(SIDE, w, b);
            }
            for (int f = 0; f < x.F; f += SIDE) {
                __syncthreads();
                load_features<M, OF_QUERIES>(x, q, s, of_q, f, 1, a);
                load_state<M>(x, mine, f, e0, b, NULL);
                __syncthreads();
                sum.add(whole<M>(x.F - f), a, b);
                if (e0 == 0) add_row_times<M>(a + row * M::PITCH, z + state * x.F + f, least(SIDE, x.F - f), D);
            }
            if (e0 == 0) {
                int flows;
                const ls_real by = ls_linear_inverse((double)ls_warp_sum(D, SHARE), x.floor, &flows);
                if (threadIdx.x % SHARE == 0) inverse[row] = by;
                __syncthreads();
            }
            put_rows<M>(x, s, sum, out, e0, out_fours, 0,
                        [&](int i, ls_real y) { return of_q.by[i] != 0 ? inverse[i] * y : 0; });
        }
    }
}

/* ------------------------------------------------------------------------------------------------ backward */

/* What a row's gradients are taken by: 1 / D and δ. */
namespace
{
typedef struct taken {
    ls_real by, delta;
    int flows;
} taken;
} // namespace

/* The denominator of a query, and δ, from dA, which is its row of do Sᵀ, z and, where NEAR, the row of w and that of
 * the gains do·v: w becomes w / D, dw the gradient of a·b. By the threads that share the row. Where numbers of tiles
 * are rounded, dw holds what w is short of before, and rest what dw is short of after. */
template <class M, int NEAR>
__device__ static inline taken weigh_row(const linear &x, const features &q, const strip &s, const facts &of_q,
                                         const ls_real *z, const ls_real *dA, typename M::number *w,
                                         typename M::number *dw, typename M::number *rest, const ls_real *gains)
{
    typedef typename M::exact exact;
    const int row = threadIdx.x / SHARE, first = threadIdx.x % SHARE;
    const int n = row < s.count && of_q.by[row] != 0 ? x.r : 0, fours = x.r % 4 == 0;
    const int some = x.turns ? x.r : x.exponentials; /* of the features have a factor */
    const ls_real factor = x.turns ? of_q.sine[row] : of_q.past[row], cosine = of_q.cosine[row];
    const typename M::number *less = M::IN_PLACE ? NULL : dw;
    exact D = 0, dot = 0;
    EACH_PIECE(f, n)
    {
        const ls_four a = read_features(x, q, s, f);
        const auto add = [&](int from, auto seen) {
            const ls_four of_z = ls_read_some<4>(z + from + f, n - f, fours),
                          of_dA = ls_read_some<4>(dA + from + f, n - f, fours);
            for (int k = 0; k < 4; k++) {
                const exact A = (exact)seen(f + k, a.v[k]);
                D += A * (exact)of_z.v[k];
                dot += A * (exact)of_dA.v[k];
            }
        };
        add(0, [&](int g, ls_real y) { return g < some ? factor * y : y; });
        if (x.turns) add(x.r, [&](int, ls_real y) { return cosine * y; });
    }
    for (int j = first; NEAR && j < SIDE; j += SHARE) {
        const exact weight = (exact)read_both(w, less, j);
        D += weight;
        dot += weight * (exact)gains[j];
    }
    D = ls_warp_sum(D, SHARE), dot = ls_warp_sum(dot, SHARE);
    taken y;
    y.by = ls_linear_inverse((double)D, x.floor, &y.flows);
    y.delta = y.flows ? (ls_real)(dot / D) : 0;
    if (first == 0 && row < s.count) x.inverse[s.R + row] = y.by, x.delta[s.R + row] = y.delta;
    for (int j = first; NEAR && j < SIDE; j += SHARE) {
        const ls_real gain = gains[j]; /* which dw may take the place of */
        write_number(y.by * read_both(w, less, j), w + j);
        write_both(y.by * (gain - y.delta) * apart(x, row, j, s.count), dw, rest, j);
    }
    return y;
}

/* da of a query, straightened (see straighten() of linear_rows.h), and on its way: from dA, where NEAR and x.da. It
 * takes the place of the first r of dA. */
template <class M, int NEAR>
__device__ static inline void finish_row(const linear &x, const features &q, const strip &s, const facts &of_q,
                                         const facts &near_q, const ls_real *z, const taken &y, ls_real *dA)
{
    typedef typename M::exact exact;
    const int row = threadIdx.x / SHARE, rows = row < s.count ? x.r : 0, here = rows > 0 && of_q.by[row] != 0;
    const int n = here ? x.r : 0, fours = x.r % 4 == 0;
    const ls_real past = of_q.past[row], near_past = NEAR ? near_q.past[row] : 0;
    const ls_real sine = x.turns ? y.by * of_q.sine[row] : y.by, cosine = y.by * of_q.cosine[row];
    exact square = 0, along = 0;
    EACH_PIECE(f, n)
    {
        const ls_four a = read_features(x, q, s, f);
        ls_four g = {};
        const auto add = [&](int from, ls_real by) {
            const ls_four of_z = ls_read_some<4>(z + from + f, n - f, fours),
                          of_dA = ls_read_some<4>(dA + from + f, n - f, fours);
            for (int k = 0; k < 4; k++) g.v[k] += by * (of_dA.v[k] - y.delta * of_z.v[k]);
        };
        add(0, sine);
        if (x.turns) add(x.r, cosine);
        for (int k = 0; k < 4; k++)
            if (f + k < x.exponentials) g.v[k] *= past;
        if (NEAR) {
            const ls_four more = ls_read_some<4>(x.da + (s.R + row) * n + f, n - f, fours);
            for (int k = 0; k < 4; k++) g.v[k] += (f + k < x.exponentials ? near_past : 1) * more.v[k];
        }
        for (int k = 0; k < 4; k++) {
            square += (exact)a.v[k] * (exact)a.v[k];
            along += (exact)a.v[k] * (exact)g.v[k];
        }
        if (fours && f < n)
            ls_put_few<4>(dA + f, g);
        else
            for (int k = 0; k < 4 && f + k < n; k++) dA[f + k] = g.v[k];
    }
    square = ls_warp_sum(square, SHARE), along = ls_warp_sum(along, SHARE);
    const exact back = y.flows && square > 0 ? along / square : 0;
    EACH_PIECE(f, rows)
    {
        ls_four a = {}, g = {};
        if (here) a = read_features(x, q, s, f), g = ls_read_some<4>(dA + f, n - f, fours);
        for (int k = 0; k < 4; k++) g.v[k] = (ls_real)((exact)g.v[k] - back * (exact)a.v[k]);
        put_features(x, q, s, row, f, 0, a, g);
    }
}

/* Gradients of rows are differences, dA - δ z of queries and v dSᵀ + dz of keys, of which little is left where values
 * have a mean, or few features are not 0. So what they are made of, S, dw and, until D and δ are summed, w, is not
 * rounded to bfloat16 but to two of them: a tile, and what that is short of in another, `rest`. dv takes the first.
 *
 * The tiles: a, b, near w and dw, but for a dw that takes the place of gains, and rest; of keys three, and rest. */
template <class M> LS_BOTH_SIDES int backward_tiles(int near)
{
    return (near ? 4 - M::IN_PLACE : 2) + !M::IN_PLACE;
}
template <class M> LS_BOTH_SIDES int pay_tiles()
{
    return 3 + !M::IN_PLACE;
}

/* What queries get from the state and, where NEAR, from keys of their chunk, and these from them: dq or da, and, NEAR,
 * dk or db of x, and dv. Rows keep inverse and delta. In shared memory: tiles, where NEAR the gains dout·v as (SIDE,
 * SIDE + 4) floats, and where it fits dA; otherwise that is in x.dA. */
template <class M, int NEAR>
__global__ static void __launch_bounds__(LS_THREADS, NEAR ? 2 : 3)
    attend_backward(linear x, features q, features q_near, features k_near, const ls_real *S, const ls_real *z,
                    int64_t strips, ls_view v, ls_view dout, int fours, ls_view dv, int dv_fours, int fits)
{
    enum { GAINS = SIDE + 4 };
    LS_SHARED(ls_real, memory);
    __shared__ facts of_q, near_q, near_k;
    const int pitch = rows_pitch(x.F);
    const int row = threadIdx.x / SHARE;
    typename M::number *a = tile_number<M>(memory, 0), *b = tile_number<M>(memory, 1);
    typename M::number *w = tile_number<M>(memory, 2), *dw = tile_number<M>(memory, 3);
    typename M::number *rest = M::IN_PLACE ? NULL : tile_number<M>(memory, NEAR ? 4 : 2);
    ls_real *gains = (ls_real *)tile_number<M>(memory, backward_tiles<M>(NEAR)); /* dw, where that is as exact */
    ls_real *beside = gains + (NEAR ? SIDE * GAINS : 0);
    for (int64_t n = blockIdx.x; n < strips; n += gridDim.x) {
        const strip s = strip_number(x, n);
        const int64_t state = state_of(s, NEAR);
        ls_real *dA = fits ? beside : x.dA + s.R * pitch;
        const pairs p = {q_near, k_near, &near_q, &near_k, NEAR && is_steep(x, s.P, k_near.from)};
        __syncthreads();
        find_facts<OF_QUERIES>(x, q, s, PAST, &of_q);
        if (NEAR) {
            find_facts<OF_QUERIES>(x, q_near, s, p.steep ? ALONE : NEAR_BY, &near_q);
            find_facts<OF_KEYS>(x, k_near, s, PAST, &near_k);
            multiply_pairs<M>(x, p, s, a, b, w, M::IN_PLACE ? NULL : dw);
            sums<M, ROWS_ROWS> gain;
            gain.clear();
            for (int e0 = 0; e0 < x.d; e0 += SIDE) {
                __syncthreads();
                load_rows<M>(x, s, e0, dout, q.at.pad, fours, a);
                load_rows<M>(x, s, e0, v, k_near.at.pad, fours, b);
                __syncthreads();
                gain.add(whole<M>(x.d - e0), a, b);
            }
#pragma unroll
            for (int u = 0; u < gain.U; u++)
#pragma unroll
                for (int c = 0; c < gain.V; c++) gains[gain.row(u) * GAINS + gain.column(c)] = gain.at(u, c);
        }
        /* dA = do Sᵀ */
        for (int f = 0; f < x.F; f += SIDE) {
            sums<M, ROWS_ROWS> sum;
            sum.clear();
            for (int e0 = 0; e0 < x.d; e0 += SIDE) {
                __syncthreads();
                if (f == 0 || x.d > SIDE) load_rows<M>(x, s, e0, dout, q.at.pad, fours, a);
                load_state<M>(x, S + state * x.F * x.d, f, e0, b, rest);
                __syncthreads();
                sum.add(whole<M>(x.d - e0), a, b);
                if (rest != NULL) sum.add(whole<M>(x.d - e0), a, rest);
            }
            put_products(s, sum, f, x.F, 0, dA, pitch);
        }
        __syncthreads(); /* dA of a row is there */
        ls_real *mine = dA + row * pitch;
        const ls_real *of_z = z + state * x.F;
        const taken by = weigh_row<M, NEAR>(x, q, s, of_q, of_z, mine, w + row * M::PITCH, dw + row * M::PITCH,
                                            M::IN_PLACE ? NULL : rest + row * M::PITCH, gains + row * GAINS);
        if (NEAR) {
            pairs_to_queries<M>(x, p, s, dw, rest, b);
            pairs_to_keys<M>(x, p, s, dw, rest, b);
            for (int e0 = 0; e0 < x.d; e0 += SIDE) {
                sums<M, COLUMNS_COLUMNS> sum;
                sum.clear();
                __syncthreads();
                if (x.d > SIDE) load_rows<M>(x, s, e0, dout, q.at.pad, fours, a);
                __syncthreads();
                sum.add(SIDE, w, a);
                put_rows<M>(x, s, sum, dv, e0, dv_fours, 0, [](int, ls_real y) { return y; });
            }
            __syncthreads(); /* x.da of a row is there */
        }
        finish_row<M, NEAR>(x, q, s, of_q, near_q, of_z, by, mine);
    }
}

/* What a key's features get, on its way: from dB, which is its row of v dSᵀ. */
__device__ static inline void pay_row(const linear &x, const features &k, const strip &s, const facts &of_k,
                                      const ls_real *z, const ls_real *dB, int add)
{
    const int row = threadIdx.x / SHARE, here = row < s.count && of_k.by[row] != 0, fours = x.r % 4 == 0;
    const ls_real sine = x.turns ? of_k.sine[row] : 1, cosine = of_k.cosine[row];
    EACH_PIECE(f, row < s.count ? x.r : 0)
    {
        ls_four y = {}, g = {};
        const auto add_both = [&](int from, ls_real by) {
            const ls_four of_z = ls_read_some<4>(z + from + f, x.r - f, fours),
                          of_dB = ls_read_some<4>(dB + from + f, x.r - f, fours);
            for (int e = 0; e < 4; e++) g.v[e] += by * (of_dB.v[e] + of_z.v[e]);
        };
        if (here) {
            y = read_features(x, k, s, f);
            add_both(0, sine);
            if (x.turns) add_both(x.r, cosine);
            for (int e = 0; e < 4; e++)
                if (f + e < x.exponentials) g.v[e] *= exponential_of(of_k, row, y.v[e]);
        }
        put_features(x, k, s, row, f, add, y, g);
    }
}

/* What keys get from the gradient of a state, that after their chunk or of all queries: dk or db of x, and dv, which
 * are added to where `add` is not 0. */
template <class M>
__global__ static void __launch_bounds__(LS_THREADS, 2)
    pay_keys(linear x, features k, const ls_real *S, const ls_real *z, int of_chunks, int64_t strips, ls_view v,
             int fours, ls_view dv, int dv_fours, int add, int fits)
{
    LS_SHARED(ls_real, memory);
    __shared__ facts of_k;
    const int pitch = rows_pitch(x.F);
    const int row = threadIdx.x / SHARE;
    typename M::number *rows = tile_number<M>(memory, 0), *B = tile_number<M>(memory, 1),
                       *tile = tile_number<M>(memory, 2);
    typename M::number *rest = M::IN_PLACE ? NULL : tile_number<M>(memory, 3);
    ls_real *beside = (ls_real *)tile_number<M>(memory, pay_tiles<M>());
    for (int64_t n = blockIdx.x; n < strips; n += gridDim.x) {
        const strip s = strip_number(x, n);
        const int64_t state = state_of(s, of_chunks);
        ls_real *dB = fits ? beside : x.dA + s.R * pitch;
        __syncthreads();
        find_facts<OF_KEYS>(x, k, s, PAST, &of_k);
        for (int e0 = 0; e0 < x.d; e0 += SIDE) {
            sums<M, ROWS_COLUMNS> sum;
            sum.clear();
            for (int f = 0; f < x.F; f += SIDE) {
                sums<M, ROWS_ROWS> gain;
                gain.clear();
                __syncthreads();
                if (f == 0) load_rows<M>(x, s, e0, v, k.at.pad, fours, rows);
                load_features<M, OF_KEYS>(x, k, s, of_k, f, 1, B);
                load_state<M>(x, S + state * x.F * x.d, f, e0, tile, rest);
                __syncthreads();
                sum.add(whole<M>(x.F - f), B, tile);
                gain.add(whole<M>(x.d - e0), rows, tile);
                if (rest != NULL) gain.add(whole<M>(x.d - e0), rows, rest);
                put_products(s, gain, f, x.F, e0 > 0, dB, pitch);
            }
            put_rows<M>(x, s, sum, dv, e0, dv_fours, add, [](int, ls_real y) { return y; });
        }
        __syncthreads(); /* dB of a row is there */
        pay_row(x, k, s, of_k, z + state * x.F, dB + row * pitch, add);
    }
}

/* ------------------------------------------------------------------------------------------------ launches */

/* What tiles, and gains where there are some, need of shared memory; and with dA. */
template <class M> static size_t shared_bytes(const linear *x, int tiles, int gains, int with_dA)
{
    const size_t floats = (size_t)(gains * SIDE * (SIDE + 4) + with_dA * SIDE * rows_pitch(x->F));
    return tiles_bytes<M>(tiles) + floats * sizeof(ls_real);
}

/* The most of backward. */
template <class M> static size_t most_bytes(const linear *x, int near)
{
    return ls_max(shared_bytes<M>(x, backward_tiles<M>(near), near, 1), shared_bytes<M>(x, pay_tiles<M>(), 0, 1));
}

int64_t ls_linear_beside(const ls_pass *p, int64_t F)
{
    linear x = {};
    x.F = (int)F;
    const int near = p->pattern == LS_CS;
    const size_t bytes = takes_tensor_cores(p) ? most_bytes<tensor>(&x, near) : most_bytes<plain>(&x, near);
    return ls_has_shared(p->queue, bytes) ? 0 : rows_pitch((int)F);
}

template <class M, int NEAR> static void launch_attend(ls_pass *p, const linear *x)
{
    const features q = queries_as_seen(p, x, NEAR ? before_chunks(x) : nowhere, NULL);
    const features q_near = queries_as_seen(p, x, after_chunks(x), NULL);
    const features k_near = keys_as_seen(p, x, after_chunks(x));
    LS_LAUNCH(p->queue, (attend<M, NEAR>), ls_blocks(strips_of(x), 1), LS_THREADS, tiles_bytes<M>(NEAR ? 3 : 2), *x, q,
              q_near, k_near, NEAR ? x->S : x->all_S, NEAR ? x->z : x->all_z, strips_of(x), p->own.v,
              ls_rows_are_fours(p->own.v, x->d), p->out, ls_rows_are_fours(p->out, x->d));
}

void ls_linear_attend(ls_pass *p, const linear *x)
{
    const auto launch = takes_tensor_cores(p) ? (x->causal ? launch_attend<tensor, 1> : launch_attend<tensor, 0>)
                                              : (x->causal ? launch_attend<plain, 1> : launch_attend<plain, 0>);
    launch(p, x);
}

template <class M, int NEAR> static void launch_attend_backward(ls_pass *p, const linear *x)
{
    const int fits = x->dA == NULL;
    const features q = queries_as_seen(p, x, NEAR ? before_chunks(x) : nowhere, NULL);
    const features q_near = queries_as_seen(p, x, after_chunks(x), NULL);
    const features k_near = keys_as_seen(p, x, after_chunks(x));
    const int fours = ls_rows_are_fours(p->dout, x->d) && (!NEAR || ls_rows_are_fours(p->own.v, x->d));
    LS_LAUNCH(p->queue, (attend_backward<M, NEAR>), ls_blocks(strips_of(x), 1), LS_THREADS,
              shared_bytes<M>(x, backward_tiles<M>(NEAR), NEAR, fits), *x, q, q_near, k_near, NEAR ? x->S : x->all_S,
              NEAR ? x->z : x->all_z, strips_of(x), p->own.v, p->dout, fours, p->own.dv,
              ls_rows_are_fours(p->own.dv, x->d), fits);
    ls_linear_queries_backward(p, x);
    if (NEAR) ls_linear_keys_backward(p, x, 0);
}

void ls_linear_attend_backward(ls_pass *p, const linear *x)
{
    const auto launch = takes_tensor_cores(p)
                            ? (x->causal ? launch_attend_backward<tensor, 1> : launch_attend_backward<tensor, 0>)
                            : (x->causal ? launch_attend_backward<plain, 1> : launch_attend_backward<plain, 0>);
    launch(p, x);
}

template <class M> static void launch_pay_keys(ls_pass *p, const linear *x, level from, int add)
{
    const int fits = x->dA == NULL;
    const features k = keys_as_seen(p, x, from);
    LS_LAUNCH(p->queue, pay_keys<M>, ls_blocks(strips_of(x), 1), LS_THREADS,
              shared_bytes<M>(x, pay_tiles<M>(), 0, fits), *x, k, x->causal ? x->S : x->all_S,
              x->causal ? x->z : x->all_z, x->causal, strips_of(x), p->own.v, ls_rows_are_fours(p->own.v, x->d),
              p->own.dv, ls_rows_are_fours(p->own.dv, x->d), add, fits);
    ls_linear_keys_backward(p, x, add);
}

void ls_linear_pay_keys(ls_pass *p, const linear *x, level from, int add)
{
    const auto launch = takes_tensor_cores(p) ? launch_pay_keys<tensor> : launch_pay_keys<plain>;
    launch(p, x, from, add);
}
