/* States of linear attention on a GPU: the sums of chunks, how they are handed on, and their way to other ranks.
 * Theory: linear_slabs.h. */
#include "linear_tiles.h"

/* ------------------------------------------------------------------------------------------------ sums of chunks */

/* S, z of each chunk: a block for each piece of SIDE columns, which goes through its features, PIECES times SIDE at a
 * time, and for these through its rows. weight (R): of features in z, NULL: 1. */
template <class M, int SEEN, int PIECES>
__global__ static void __launch_bounds__(LS_THREADS, 2)
    gather(linear x, features of, ls_view matrix, int fours, const ls_real *weight)
{
    enum { SETS = LS_THREADS / SIDE }; /* of threads that share the rows of z */
    LS_SHARED(ls_real, memory);
    __shared__ facts rows;
    __shared__ double scratch[LS_THREADS];
    const int columns = (x.d + SIDE - 1) / SIDE, rows_each = (int)x.s.C;
    const int64_t chunks = quotient(rows_of(x.s), x.s.C);
    const int mine = threadIdx.x % SIDE, set = threadIdx.x / SIDE;
    typename M::number *of_matrix = tile_number<M>(memory, 0);
    for (int64_t i = blockIdx.x; i < chunks * columns; i += gridDim.x) {
        const int64_t P = quotient(i, columns);
        const int e0 = (int)(i - P * columns) * SIDE;
        for (int f0 = 0; f0 < x.F; f0 += PIECES * SIDE) {
            sums<M, COLUMNS_COLUMNS> sum[PIECES]; /* where sums are to be exact, by strips */
            double z[PIECES] = {0};
#pragma unroll
            for (int q = 0; q < PIECES; q++) sum[q].clear();
            for (int u = 0; u < rows_each; u += SIDE) {
                const strip s = strip_of(x, P, u);
                __syncthreads();
                find_facts<SEEN>(x, of, s, PAST, &rows);
                load_rows<M>(x, s, e0, matrix, of.at.pad, fours, of_matrix);
                __syncthreads();
#pragma unroll 1
                for (int q = 0; q < PIECES; q++)
                    if (f0 + q * SIDE < x.F)
                        load_features<M, SEEN>(x, of, s, rows, f0 + q * SIDE, 1, tile_number<M>(memory, 1 + q));
                __syncthreads();
#pragma unroll
                for (int q = 0; q < PIECES; q++) {
                    if (f0 + q * SIDE >= x.F) continue;
                    const typename M::number *of_rows = tile_number<M>(memory, 1 + q);
                    if constexpr (M::IN_PLACE) {
                        sums<M, COLUMNS_COLUMNS> more;
                        more.clear();
                        if (f0 + q * SIDE + more.row(0) < x.F) more.add(whole<M>(s.count), of_rows, of_matrix);
#pragma unroll
                        for (int a = 0; a < more.U; a++)
#pragma unroll
                            for (int c = 0; c < more.V; c++) sum[q].at(a, c) += more.at(a, c);
                    } else {
                        sum[q].add(whole<M>(s.count), of_rows, of_matrix);
                    }
                    for (int r = set; r < s.count && e0 == 0 && f0 + q * SIDE + mine < x.F; r += SETS)
                        z[q] += (weight == NULL ? 1 : -(double)weight[s.R + r]) *
                                (double)read_number(of_rows[r * M::PITCH + mine]);
                }
            }
#pragma unroll
            for (int q = 0; q < PIECES; q++) {
                for (int a = 0; a < sum[q].U; a++)
                    for (int c = 0; c < sum[q].V; c += M::TOGETHER) {
                        const int f = f0 + q * SIDE + sum[q].row(a), e = e0 + sum[q].column(c);
                        ls_few<M::TOGETHER> y;
                        for (int k = 0; k < M::TOGETHER; k++) y.v[k] = sum[q].at(a, c + k);
                        if (f < x.F && e < x.d)
                            ls_write_some<M::TOGETHER>(y, x.S + (P * x.F + f) * x.d + e, x.d - e, x.d % 4 == 0);
                    }
                if (e0 > 0 || f0 + q * SIDE >= x.F) continue;
                __syncthreads();
                scratch[threadIdx.x] = z[q];
                __syncthreads();
                if (set > 0 || f0 + q * SIDE + mine >= x.F) continue;
                double all = 0;
                for (int k = 0; k < SETS; k++) all += scratch[k * SIDE + mine];
                x.z[P * x.F + f0 + q * SIDE + mine] = (ls_real)all;
            }
        }
    }
}

template <class M, int SEEN>
static void launch_gather(ls_pass *p, const linear *x, const features &of, ls_view matrix, const ls_real *weight)
{
    const int pieces = x->F <= SIDE ? 1 : 2;
    const auto kernel = pieces == 1 ? gather<M, SEEN, 1> : gather<M, SEEN, 2>;
    const int64_t blocks = chunks_of(x) * ((x->d + SIDE - 1) / SIDE);
    LS_LAUNCH(p->queue, kernel, ls_blocks(blocks, 1), LS_THREADS, tiles_bytes<M>(1 + pieces), *x, of, matrix,
              ls_rows_are_fours(matrix, x->d), weight);
}

template <int SEEN>
static void gather_either(ls_pass *p, const linear *x, const features &of, ls_view matrix, const ls_real *weight)
{
    /* Exponentials let few keys outweigh the others, the same ones in many features: what a query gets from S is then a
     * small difference of numbers that must be exact. */
    const auto launch =
        takes_tensor_cores(p) && x->exponentials == 0 ? launch_gather<tensor, SEEN> : launch_gather<plain, SEEN>;
    launch(p, x, of, matrix, weight);
}

void ls_linear_gather_keys(ls_pass *p, const linear *x)
{
    gather_either<OF_KEYS>(p, x, keys_as_seen(p, x, after_chunks(x)), p->own.v, NULL);
}

void ls_linear_gather_gradients(ls_pass *p, const linear *x)
{
    const level before = x->causal ? before_chunks(x) : nowhere;
    gather_either<OF_QUERIES>(p, x, queries_as_seen(p, x, before, x->inverse), p->dout, x->delta);
}

/* ------------------------------------------------------------------------------------------------ scan */

__global__ static void scan(int64_t G, int64_t K, numbers a, numbers b, level start, int how, double *running)
{
    LS_EACH(at, G * (a.n + b.n))
    {
        const int64_t g = at / (a.n + b.n), i = at - g * (a.n + b.n), e = i < a.n ? i : i - a.n;
        const numbers y = i < a.n ? a : b;
        const ls_real *c = start.p != NULL && e < y.scaled ? start.p + g * start.each_g : NULL;
        constexpr int DEEP = 8; /* numbers on their way at a time */
        ls_real *x = y.x + g * K * y.n + e;
        double sum = running[at];
        for (int64_t n = 0; n < K; n += DEEP) {
            ls_real change[DEEP];
            for (int u = 0; u < DEEP; u++)
                change[u] = n + u < K ? x[(how & REVERSED ? K - 1 - n - u : n + u) * y.n] : 0;
            for (int u = 0; u < DEEP && n + u < K; u++) {
                const int64_t k = how & REVERSED ? K - 1 - n - u : n + u;
                if (how & KEEPS) x[k * y.n] = (ls_real)sum;
                sum = (c == NULL ? sum : sum * ls_linear_change(c[k], c[k + 1])) + (double)change[u];
            }
        }
        running[at] = sum;
    }
}

void ls_linear_scan(ls_pass *p, const linear *x, numbers a, numbers b, level start, int how)
{
    const int64_t G = x->s.H * x->s.B;
    LS_LAUNCH(p->queue, scan, ls_blocks(G * (a.n + b.n), LS_THREADS), LS_THREADS, 0, G, x->s.K, a, b, start, how,
              x->running);
}

void ls_linear_scan_states(ls_pass *p, const linear *x, level start, int how)
{
    const numbers S = {x->S, (int64_t)x->F * x->d, (int64_t)x->exponentials * x->d}, z = {x->z, x->F, x->exponentials};
    ls_linear_scan(p, x, S, z, x->exponentials > 0 ? start : nowhere, how);
}

/* ------------------------------------------------------------------------------------------------ ranks */

/* States on their way: (B,H) of [c] and F rows [S_f, z_f]. */
namespace
{
typedef struct parcel {
    int64_t B, H, F, d;
    int has_c;
} parcel;
} // namespace

static parcel parcel_of(const ls_pass *p, const linear *x)
{
    const parcel s = {p->B, p->H, x->F, x->d, x->exponentials > 0};
    return s;
}

/* Where number i of G F (d+1) is on its way; *g, *e: in running (G), [S][z]. */
__device__ static inline int64_t on_its_way(const parcel &s, int64_t i, int64_t *g, int64_t *e)
{
    const int64_t each = s.F * (s.d + 1), at = i % each, f = at / (s.d + 1), column = at % (s.d + 1);
    const int64_t b = i / each / s.H, h = i / each % s.H;
    *g = h * s.B + b;
    *e = column < s.d ? f * s.d + column : s.F * s.d + f;
    return (i / each) * (s.has_c + each) + s.has_c + at;
}

/* c: that of g is c[g each], NULL: 0. */
__global__ static void pack_states(parcel s, const double *running, const ls_real *c, int64_t each, ls_real *elements)
{
    LS_EACH(i, s.B * s.H * s.F * (s.d + 1))
    {
        int64_t g, e;
        const int64_t to = on_its_way(s, i, &g, &e);
        elements[to] = (ls_real)running[g * s.F * (s.d + 1) + e];
        if (s.has_c && i % (s.F * (s.d + 1)) == 0) elements[to - 1] = c == NULL ? 0 : c[g * each];
    }
}

/* To S, z, or where running is not NULL to it. c_of: where c is from, if not from elements. */
__global__ static void unpack_states(parcel s, const ls_real *elements, const ls_real *c_of, ls_real *S, ls_real *z,
                                     double *running, ls_real *c, int64_t each)
{
    LS_EACH(i, s.B * s.H * s.F * (s.d + 1))
    {
        int64_t g, e;
        const int64_t from = on_its_way(s, i, &g, &e), SS = s.F * s.d;
        const ls_real y = elements[from];
        if (running != NULL)
            running[g * (SS + s.F) + e] = (double)y;
        else if (e < SS)
            S[g * SS + e] = y;
        else
            z[g * s.F + e - SS] = y;
        if (s.has_c && i % (SS + s.F) == 0) c[g * each] = c_of[from - 1];
    }
}

__global__ static void clear_states(int64_t G, int64_t n, double *running, ls_real *c, int64_t each)
{
    LS_EACH(i, G * n)
    {
        running[i] = 0;
        if (c != NULL && i % n == 0) c[i / n * each] = -INFINITY;
    }
}

void ls_linear_clear(ls_pass *p, const linear *x, int64_t n, ls_real *c)
{
    const int64_t G = p->B * p->H;
    LS_LAUNCH(p->queue, clear_states, ls_blocks(G * n, LS_THREADS), LS_THREADS, 0, G, n, x->running, c, x->each_start);
}

void ls_linear_pack(ls_pass *p, const linear *x, const ls_real *c, ls_real *elements)
{
    const parcel s = parcel_of(p, x);
    LS_LAUNCH(p->queue, pack_states, ls_blocks(s.B * s.H * s.F * (s.d + 1), LS_THREADS), LS_THREADS, 0, s, x->running,
              c, x->each_start, elements);
}

void ls_linear_unpack(ls_pass *p, const linear *x, const ls_real *elements, const ls_real *c_of, double *running)
{
    const parcel s = parcel_of(p, x);
    LS_LAUNCH(p->queue, unpack_states, ls_blocks(s.B * s.H * s.F * (s.d + 1), LS_THREADS), LS_THREADS, 0, s, elements,
              c_of, x->all_S, x->all_z, running, x->start, x->each_start);
}
