/* Linear attention on a GPU: what queries take from states and, causal, from the keys of their chunk, and what keys get
 * from the gradients of states. A block has a strip of rows at a time. Theory: linear_slabs.h. */
#include "linear_tiles.h"

/* The state that a strip sees: its chunk's, or that of its (b,h). */
__device__ static inline int64_t state_of(const strip &s, int of_chunks)
{
    return of_chunks ? s.P : s.at.g;
}

/* The four threads that share row threadIdx.x / 4 of a strip. */
enum { SHARE = (int)LS_THREADS / (int)SIDE };

/* Of every SIDE numbers of a row each of these threads has PIECES times four. */
enum { PIECES = SIDE / 4 / SHARE };
__device__ static inline int of_share(int i)
{
    return 4 * (threadIdx.x % SHARE + i * SHARE);
}
#define EACH_OF_SHARE(i, k, f, n)                                                                                      \
    _Pragma("unroll") for (int i = 0; i < PIECES; i++)                                                                 \
        _Pragma("unroll") for (int k = 0; k < 4; k++) if (const int f = f0 + of_share(i) + k; f < (n))
/* Features of the row, from f0 on, as they were made. */
__device__ static inline void read_share(const linear &x, const features &y, const strip &s, const facts &of, int f0,
                                         ls_four (&z)[PIECES])
{
    read_features<PIECES>(
        x, y, s, of, [](int) { return (int)threadIdx.x / SHARE; }, [&](int i) { return f0 + of_share(i); }, z);
}

/* cos ω(i - j), 0 where query i does not see key j. */
__device__ static inline ls_real apart(const linear &x, int i, int j, int count)
{
    return j > i || i >= count ? 0 : x.turns ? (ls_real)x.step[2 * (i - j) + 1] : 1;
}

/* Sums of a strip's rows, as `made` (row, sum) has them, to numbers [e0, e0 + SIDE) of rows that exist; add: +=. */
template <class M, int FORM, typename F>
__device__ static inline void put_rows(const linear &x, const strip &s, sums<M, FORM> &sum, ls_view v, int e0,
                                       int fours, int add, F made)
{
#pragma unroll
    for (int u = 0; u < sum.U; u++) {
        const int i = sum.row(u);
        if (i >= s.count || s.at.t + i >= x.s.rows) continue;
        ls_real *to = row_in(s, v, i) + e0;
#pragma unroll
        for (int c = 0; c < sum.V; c += M::TOGETHER) {
            const int left = x.d - e0 - sum.column(c);
            ls_few<M::TOGETHER> y = {};
            if (add) y = ls_read_some<M::TOGETHER>(to + sum.column(c), left, fours);
            for (int k = 0; k < M::TOGETHER; k++) y.v[k] += made(i, sum.at(u, c + k));
            ls_write_some<M::TOGETHER>(y, to + sum.column(c), left, fours);
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

/* w (SIDE,PITCH) = (a·b) cos ω(i - j) of the pairs of a chunk. a, b: tiles. Steep chunks are rare: what is done for
 * them is short, not fast. */
template <class M>
__device__ static void multiply_pairs(const linear &x, const pairs &p, const strip &s, typename M::number *a,
                                      typename M::number *b, typename M::number *w)
{
    __syncthreads();
    if (p.steep) {
        const int i = threadIdx.x / SHARE;
        for (int j = threadIdx.x % SHARE; j < SIDE; j += SHARE) {
            typename M::sum y = 0;
            for (int f = 0; f < x.r && j <= i && i < s.count; f++)
                y += (typename M::sum)(steep_query(x, p, s, i, f) * steep_key(x, p, s, i, j, f));
            write_number(y * apart(x, i, j, s.count), w + i * M::PITCH + j);
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
        for (int v = 0; v < sum.V; v++) {
            const int i = sum.row(u), j = sum.column(v);
            write_number(sum.at(u, v) * apart(x, i, j, s.count), w + i * M::PITCH + j);
        }
}

/* The gradient of a_near: dw b, or pair by pair. It waits in x.da. */
template <class M>
__device__ static void pairs_to_queries(const linear &x, const pairs &p, const strip &s, const typename M::number *dw,
                                        typename M::number *tile)
{
    if (p.steep) {
        const int i = threadIdx.x / SHARE;
        __syncthreads();
        for (int f = threadIdx.x % SHARE; f < x.r && i < s.count; f += SHARE) {
            ls_real g = 0;
            for (int j = 0; j <= i; j++) g += read_number(dw[i * M::PITCH + j]) * steep_key(x, p, s, i, j, f);
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
                                     typename M::number *tile)
{
    if (p.steep) {
        const int j = threadIdx.x / SHARE;
        __syncthreads();
        for (int f = threadIdx.x % SHARE; f < x.r && j < s.count; f += SHARE) {
            ls_few<1> g = {};
            for (int i = j; i < s.count && p.of_k->by[j] != 0; i++)
                g.v[0] += read_number(dw[i * M::PITCH + j]) * steep_query(x, p, s, i, f) *
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
            multiply_pairs<M>(x, p, s, a, b, w);
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
                load_state<M>(x, mine, f, e0, b);
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

/* Numbers from one row of dA to the next. */
LS_BOTH_SIDES int pitch_of(int F)
{
    return (int)ls_fours(F) + 4;
}

/* What a row's gradients are taken by: 1 / D and δ. */
namespace
{
typedef struct taken {
    ls_real by, delta;
    int flows;
} taken;
} // namespace

/* The denominator of a query, and δ, from dA, which is its row of do Sᵀ, z and, where NEAR, the row of w and that of
 * the gains do·v: w becomes w / D, dw the gradient of a·b. By the threads that share the row. */
template <class M, int NEAR>
__device__ static inline taken weigh_row(const linear &x, const features &q, const strip &s, const facts &of_q,
                                         const ls_real *z, const ls_real *dA, typename M::number *w,
                                         typename M::number *dw, const ls_real *gains)
{
    typedef typename M::exact exact;
    const int row = threadIdx.x / SHARE, share = threadIdx.x % SHARE, here = row < s.count && of_q.by[row] != 0;
    exact D = 0, dot = 0;
    for (int f0 = 0; f0 < x.r; f0 += SIDE) {
        ls_four a[PIECES];
        read_share(x, q, s, of_q, f0, a);
        EACH_OF_SHARE(i, k, f, x.r)
        {
            if (!here) continue;
            ls_real A = f < x.exponentials ? of_q.past[row] * a[i].v[k] : a[i].v[k];
            if (x.turns) {
                const ls_real other = of_q.cosine[row] * A;
                D += (exact)other * (exact)z[f + x.r];
                dot += (exact)other * (exact)dA[f + x.r];
                A *= of_q.sine[row];
            }
            D += (exact)A * (exact)z[f];
            dot += (exact)A * (exact)dA[f];
        }
    }
    for (int j = share; NEAR && j < SIDE; j += SHARE) {
        const exact weight = (exact)read_number(w[j]);
        D += weight;
        dot += weight * (exact)gains[j];
    }
    D = ls_warp_sum(D, SHARE), dot = ls_warp_sum(dot, SHARE);
    taken y;
    y.by = ls_linear_inverse((double)D, x.floor, &y.flows);
    y.delta = y.flows ? (ls_real)(dot / D) : 0;
    if (share == 0 && row < s.count) x.inverse[s.R + row] = y.by, x.delta[s.R + row] = y.delta;
    for (int j = share; NEAR && j < SIDE; j += SHARE) {
        const ls_real gain = gains[j]; /* which dw may take the place of */
        write_number(y.by * read_number(w[j]), w + j);
        write_number(y.by * (gain - y.delta) * apart(x, row, j, s.count), dw + j);
    }
    return y;
}

/* da of a query, straightened (see straighten() of linear_rows.h), and on its way: from dA, where NEAR and x.da. It
 * takes the place of the first r of dA. */
template <int NEAR>
__device__ static inline void finish_row(const linear &x, const features &q, const strip &s, const facts &of_q,
                                         const facts &near_q, const ls_real *z, const taken &y, ls_real *dA)
{
    const int row = threadIdx.x / SHARE, here = row < s.count && of_q.by[row] != 0;
    double square = 0, along = 0;
    for (int f0 = 0; f0 < x.r; f0 += SIDE) {
        ls_four a[PIECES];
        read_share(x, q, s, of_q, f0, a);
        EACH_OF_SHARE(i, k, f, x.r)
        {
            if (!here) continue;
            const int e = f < x.exponentials;
            ls_real g = y.by * (dA[f] - y.delta * z[f]);
            if (x.turns) g = of_q.sine[row] * g + of_q.cosine[row] * y.by * (dA[x.r + f] - y.delta * z[x.r + f]);
            if (e) g *= of_q.past[row];
            if (NEAR) g += (e ? near_q.past[row] : 1) * x.da[(s.R + row) * x.r + f];
            dA[f] = g;
            square += (double)a[i].v[k] * (double)a[i].v[k];
            along += (double)a[i].v[k] * (double)g;
        }
    }
    square = ls_warp_sum(square, SHARE), along = ls_warp_sum(along, SHARE);
    const double back = y.flows && square > 0 ? along / square : 0;
    for (int f0 = 0; f0 < x.r; f0 += SIDE) {
        ls_four a[PIECES];
        read_share(x, q, s, of_q, f0, a);
        EACH_OF_SHARE(i, k, f, x.r) a[i].v[k] = here ? (ls_real)((double)dA[f] - back * (double)a[i].v[k]) : 0;
        for (int i = 0; i < PIECES; i++) put_gradients(x, q, s, of_q, row, f0 + of_share(i), 0, a[i]);
    }
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
    const int pitch = pitch_of(x.F);
    const int row = threadIdx.x / SHARE;
    typename M::number *a = tile_number<M>(memory, 0), *b = tile_number<M>(memory, 1);
    typename M::number *w = tile_number<M>(memory, 2), *dw = tile_number<M>(memory, 3);
    ls_real *gains = (ls_real *)tile_number<M>(memory, NEAR ? 4 - M::IN_PLACE : 2); /* dw, where that is as exact */
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
            multiply_pairs<M>(x, p, s, a, b, w);
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
                load_state<M>(x, S + state * x.F * x.d, f, e0, b);
                __syncthreads();
                sum.add(whole<M>(x.d - e0), a, b);
            }
            for (int u = 0; u < sum.U; u++)
                for (int c = 0; c < sum.V; c++) {
                    const int i = sum.row(u);
                    if (i < s.count && f + sum.column(c) < x.F) dA[i * pitch + f + sum.column(c)] = sum.at(u, c);
                }
        }
        __syncthreads(); /* dA of a row is there */
        ls_real *mine = dA + row * pitch;
        const ls_real *of_z = z + state * x.F;
        const taken by =
            weigh_row<M, NEAR>(x, q, s, of_q, of_z, mine, w + row * M::PITCH, dw + row * M::PITCH, gains + row * GAINS);
        if (NEAR) {
            pairs_to_queries<M>(x, p, s, dw, b);
            pairs_to_keys<M>(x, p, s, dw, b);
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
        finish_row<NEAR>(x, q, s, of_q, near_q, of_z, by, mine);
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
    const int pitch = pitch_of(x.F);
    const int row = threadIdx.x / SHARE;
    typename M::number *rows = tile_number<M>(memory, 0), *B = tile_number<M>(memory, 1),
                       *tile = tile_number<M>(memory, 2);
    ls_real *beside = (ls_real *)tile_number<M>(memory, 3);
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
                load_state<M>(x, S + state * x.F * x.d, f, e0, tile);
                __syncthreads();
                sum.add(whole<M>(x.F - f), B, tile);
                gain.add(whole<M>(x.d - e0), rows, tile);
                for (int u = 0; u < gain.U; u++)
                    for (int c = 0; c < gain.V; c++) {
                        const int F = f + gain.column(c);
                        ls_real *to = dB + gain.row(u) * pitch + F;
                        if (gain.row(u) < s.count && F < x.F) *to = (e0 == 0 ? 0 : *to) + gain.at(u, c);
                    }
            }
            put_rows<M>(x, s, sum, dv, e0, dv_fours, add, [](int, ls_real y) { return y; });
        }
        __syncthreads(); /* dB of a row is there */
        const int here = row < s.count && of_k.by[row] != 0;
        const ls_real *of_z = z + state * x.F;
        for (int f0 = 0; f0 < x.r; f0 += SIDE) {
            ls_four g[PIECES] = {}, raw[PIECES] = {};
            if (x.exponentials > 0) read_share(x, k, s, of_k, f0, raw);
            EACH_OF_SHARE(i, e, f, x.r)
            {
                if (!here) continue;
                const ls_real *from = dB + row * pitch + f;
                ls_real y = from[0] + of_z[f];
                if (x.turns) y = of_k.sine[row] * y + of_k.cosine[row] * (from[x.r] + of_z[x.r + f]);
                if (f < x.exponentials) y *= exponential_of(of_k, row, raw[i].v[e]);
                g[i].v[e] = y;
            }
            for (int i = 0; i < PIECES; i++) put_gradients(x, k, s, of_k, row, f0 + of_share(i), add, g[i]);
        }
    }
}

/* ------------------------------------------------------------------------------------------------ launches */

/* What tiles, and gains where there are some, need of shared memory; and with dA. */
template <class M> static size_t shared_bytes(const linear *x, int tiles, int gains, int with_dA)
{
    const size_t floats = (size_t)(gains * SIDE * (SIDE + 4) + with_dA * SIDE * pitch_of(x->F));
    return tiles_bytes<M>(tiles) + floats * sizeof(ls_real);
}

int64_t ls_linear_beside(const ls_pass *p, int64_t F)
{
    linear x = {};
    x.F = (int)F;
    const int near = p->pattern == LS_CS;
    const size_t bytes =
        on_tensor_cores(p) ? shared_bytes<tensor>(&x, near ? 4 : 3, near, 1) : shared_bytes<plain>(&x, 3, near, 1);
    return ls_has_shared(p->queue, bytes) ? 0 : pitch_of((int)F);
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
    const auto launch = on_tensor_cores(p) ? (x->causal ? launch_attend<tensor, 1> : launch_attend<tensor, 0>)
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
              shared_bytes<M>(x, NEAR ? 4 - M::IN_PLACE : 2, NEAR, fits), *x, q, q_near, k_near, NEAR ? x->S : x->all_S,
              NEAR ? x->z : x->all_z, strips_of(x), p->own.v, p->dout, fours, p->own.dv,
              ls_rows_are_fours(p->own.dv, x->d), fits);
    ls_linear_queries_backward(p, x);
    if (NEAR) ls_linear_keys_backward(p, x, 0);
}

void ls_linear_attend_backward(ls_pass *p, const linear *x)
{
    const auto launch = on_tensor_cores(p)
                            ? (x->causal ? launch_attend_backward<tensor, 1> : launch_attend_backward<tensor, 0>)
                            : (x->causal ? launch_attend_backward<plain, 1> : launch_attend_backward<plain, 0>);
    launch(p, x);
}

template <class M> static void launch_pay_keys(ls_pass *p, const linear *x, level from, int add)
{
    const int fits = x->dA == NULL;
    const features k = keys_as_seen(p, x, from);
    LS_LAUNCH(p->queue, pay_keys<M>, ls_blocks(strips_of(x), 1), LS_THREADS, shared_bytes<M>(x, 3, 0, fits), *x, k,
              x->causal ? x->S : x->all_S, x->causal ? x->z : x->all_z, x->causal, strips_of(x), p->own.v,
              ls_rows_are_fours(p->own.v, x->d), p->own.dv, ls_rows_are_fours(p->own.dv, x->d), add, fits);
    ls_linear_keys_backward(p, x, add);
}

void ls_linear_pay_keys(ls_pass *p, const linear *x, level from, int add)
{
    const auto launch = on_tensor_cores(p) ? launch_pay_keys<tensor> : launch_pay_keys<plain>;
    launch(p, x, from, add);
}
