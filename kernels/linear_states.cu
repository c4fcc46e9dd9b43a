/* States of linear attention on a GPU: the sums of chunks, how they are handed on, and their way to other ranks.
 * Theory: linear_slabs.h. */
#include "linear_slabs.h"

/* ------------------------------------------------------------------------------------------------ sums of chunks */

enum { ACROSS = 16 }; /* threads side by side: each has four columns of a piece of the matrix */
enum { SOME = 64 };   /* rows that are in shared memory at a time: four threads load the features of one */
static_assert(SOME * 4 == LS_THREADS && ACROSS * 4 == DEEP, "each thread has its part of a piece");

/* `to` (SOME, WIDE + 4) = turned features [f0, f0 + WIDE) of rows [R, R + count): `made` (R,F), or NULL: those of keys,
 * seen from c. 0 where there are none. */
template <int WIDE>
__device__ static void load_features(const linear &x, const side &k, level c, const ls_real *made, int64_t R,
                                     int64_t count, int64_t f0, ls_real *to)
{
    const int64_t r = threadIdx.x / 4, row = R + r;
    int there = r < count;
    ls_real from = 0;
    angle y = {0, 1};
    if (there && made == NULL) {
        const place at = place_of(x.s, row);
        there = is_there(x.s, k.pad, at);
        if (there) y = angle_of(x, k, at.t);
        if (there && x.exponentials > 0) from = level_of(c, x.s, at);
    }
    for (int i = threadIdx.x % 4; i < WIDE; i += 4) {
        const int64_t F = f0 + i, f = F < x.r ? F : F - x.r;
        ls_real b = 0;
        if (there && F < x.F && made != NULL)
            b = made[row * x.F + F];
        else if (there && F < x.F) {
            b = x.x[row * x.r + f];
            if (f < x.exponentials) b = ls_exp(b - from > 0 ? 0 : b - from);
            if (x.turns) b *= F < x.r ? y.sine : y.cosine;
        }
        to[r * (WIDE + 4) + i] = b;
    }
}

/* Σ over the threads of a block that have the same number modulo n, for the first n of them; in one order. */
__device__ static inline double sum_alike(double mine, int n, double *scratch)
{
    scratch[threadIdx.x] = mine;
    __syncthreads();
    double sum = 0;
    for (int i = threadIdx.x; (int)threadIdx.x < n && i < LS_THREADS; i += n) sum += scratch[i];
    __syncthreads();
    return sum;
}

/* S, z of each chunk: a block for each piece of DEEP columns, which goes through its features, and for these through
 * its rows. A thread has EACH features of four columns. */
template <int EACH>
__global__ static void gather(linear x, side k, level c, const ls_real *made, ls_view matrix, int fours,
                              const ls_real *weight)
{
    constexpr int WIDE = ACROSS * EACH, WIDE_PITCH = WIDE + 4;
    __shared__ __align__(32) ls_real of_rows[SOME * WIDE_PITCH];
    __shared__ __align__(32) ls_real of_matrix[SOME * PITCH];
    __shared__ double scratch[LS_THREADS];
    const int64_t pieces = (x.d + DEEP - 1) / DEEP, chunks = rows_of(x.s) / x.s.C;
    const int column = threadIdx.x % ACROSS * 4, mine = threadIdx.x / ACROSS * EACH;
    for (int64_t i = blockIdx.x; i < chunks * pieces; i += gridDim.x) {
        const int64_t P = i / pieces, e0 = i % pieces * DEEP;
        for (int64_t f0 = 0; f0 < x.F; f0 += WIDE) {
            ls_real sum[EACH][4] = {{0}};
            double z = 0;
            for (int64_t u = 0; u < x.s.C; u += SOME) {
                const int64_t R = P * x.s.C + u;
                const int count = (int)ls_min(SOME, x.s.C - u);
                __syncthreads();
                if (f0 == 0 || x.s.C > SOME) load_rows<SOME>(x.s, R, count, x.d, e0, matrix, k.pad, fours, of_matrix);
                load_features<WIDE>(x, k, c, made, R, count, f0, of_rows);
                __syncthreads();
#pragma unroll 4
                for (int r = 0; r < count; r++) {
                    const ls_few<EACH> b = ls_few_at<EACH>(of_rows + r * WIDE_PITCH + mine);
                    const ls_four v = ls_four_at(of_matrix + r * PITCH + column);
#pragma unroll
                    for (int a = 0; a < EACH; a++)
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[a][j] += b.v[a] * v.v[j];
                }
                for (int r = threadIdx.x / WIDE; r < count && e0 == 0; r += LS_THREADS / WIDE)
                    z += (weight == NULL ? 1 : -(double)weight[R + r]) *
                         (double)of_rows[r * WIDE_PITCH + threadIdx.x % WIDE];
            }
            for (int a = 0; a < EACH; a++)
                for (int j = 0; j < 4; j++)
                    if (f0 + mine + a < x.F && e0 + column + j < x.d)
                        x.S[(P * x.F + f0 + mine + a) * x.d + e0 + column + j] = sum[a][j];
            if (e0 > 0) continue;
            z = sum_alike(z, WIDE, scratch);
            if (threadIdx.x < WIDE && f0 + threadIdx.x < x.F) x.z[P * x.F + f0 + threadIdx.x] = (ls_real)z;
        }
    }
}

static void launch_gather(ls_pass *p, const linear *x, side k, level c, const ls_real *made, ls_view matrix,
                          const ls_real *weight)
{
    const auto kernel = x->F <= 2 * ACROSS ? gather<2> : gather<4>;
    const int64_t blocks = chunks_of(x) * ((x->d + DEEP - 1) / DEEP);
    LS_LAUNCH(p->queue, kernel, ls_blocks(blocks, 1), LS_THREADS, 0, *x, k, c, made, matrix, reads_fours(matrix, x->d),
              weight);
}

void ls_linear_gather_keys(ls_pass *p, const linear *x)
{
    launch_gather(p, x, keys_of(p), after_chunks(x), NULL, p->own.v, NULL);
}

void ls_linear_gather_gradients(ls_pass *p, const linear *x)
{
    launch_gather(p, x, queries_of(p), nowhere, x->A, p->dout, x->delta);
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
    const numbers S = {x->S, x->F * x->d, x->exponentials * x->d}, z = {x->z, x->F, x->exponentials};
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
