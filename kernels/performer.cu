/* Performer on a GPU: the feature map of performer.c; the phases are those of linear.cu.
 *
 * How the work is divided. Logits W x are one product for each head, over all rows of a slab; what follows goes row by
 * row, a warp for each. W is drawn number by number, in double; each block of d rows that is to be orthogonal belongs
 * to one block of threads, in which a warp has a row: row k is taken out of all rows after it at once, so that a step
 * for each row is all that has to wait. Meanwhile the rows lie in shared memory, if they fit there. */
#include "linear_cuda.h"

extern "C" {
#include "performer.h"
}
#include "rng_inline.h"

enum { EXPONENTIALS = LS_LINEAR_WORK, DRAW }; /* work[]; DRAW holds doubles */
enum { ROOM = 96 << 10 };                     /* of shared memory in a block, what all GPUs have that this is for */

/* ------------------------------------------------------------------------------------------------ projection */

/* Where the normals of a head come from. */
namespace
{
typedef struct source {
    uint64_t seed;
    uint32_t stream, draw; /* stream: of head 0 */
} source;
} // namespace

/* w (H,m,d), `each` numbers of a head. */
__global__ static void draw_normals(int64_t H, int64_t each, source s, double *w)
{
    LS_EACH(i, H * each)
    w[i] = ls_normal_inline(s.seed, s.stream + (uint32_t)(i / each), s.draw, (uint64_t)(i % each));
}

/* Blocks of d rows of w (H,m,d) become orthogonal, by Gram-Schmidt: twice, since once is not enough for its rounding.
 */
__global__ static void orthogonalise(int64_t H, int64_t m, int64_t d, int fits, double *w)
{
    LS_SHARED(double, memory);
    const int64_t blocks = (m + d - 1) / d;
    const int warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t at = blockIdx.x; at < H * blocks; at += gridDim.x) {
        const int64_t h = at / blocks, first = at % blocks * d, n = ls_min(d, m - first);
        double *all = w + (h * m + first) * d, *rows = fits ? memory : all;
        for (int64_t e = threadIdx.x; fits && e < n * d; e += blockDim.x) rows[e] = all[e];
        __syncthreads();
        for (int64_t k = 0; k < 2 * n; k++) {
            const double *y = rows + k % n * d;
            double square = 0;
            LS_EACH_LANE(e, d) square += y[e] * y[e];
            square = ls_warp_sum(square);
            for (int64_t i = k % n + 1 + warp; i < n; i += warps) {
                double *x = rows + i * d, along = 0;
                LS_EACH_LANE(e, d) along += x[e] * y[e];
                along = ls_warp_sum(along) / square;
                LS_EACH_LANE(e, d) x[e] -= along * y[e];
            }
            __syncthreads();
        }
        for (int64_t e = threadIdx.x; fits && e < n * d; e += blockDim.x) all[e] = rows[e];
        __syncthreads(); /* all have written theirs when others are read */
    }
}

/* to (H,m,d) = root w; where rows are orthogonal, each becomes as long as a fresh row of normals. */
__global__ static void scale_projection(int64_t H, int64_t m, int64_t d, double root, int orthogonal, source s,
                                        const double *w, ls_real *to)
{
    LS_EACH_ROW(R, H * m)
    {
        const int64_t h = R / m, r = R - h * m;
        double square = 0, wanted = 0;
        LS_EACH_LANE(e, orthogonal ? d : 0)
        {
            const double x = ls_normal_inline(s.seed, s.stream + (uint32_t)h, s.draw, (uint64_t)((m + r) * d + e));
            wanted += x * x;
            square += w[R * d + e] * w[R * d + e];
        }
        square = ls_warp_sum(square);
        wanted = ls_warp_sum(wanted);
        const double by = orthogonal ? root * sqrt(wanted) / sqrt(square) : root;
        LS_EACH_LANE(e, d) to[R * d + e] = (ls_real)(by * w[R * d + e]);
    }
}

__global__ static void scale_given(int64_t n, double root, const ls_real *given, ls_real *to)
{
    LS_EACH(i, n) to[i] = (ls_real)(root * (double)given[i]);
}

static void project(ls_pass *p)
{
    const int64_t m = num_features(p), d = p->d, n = p->H * m * d;
    const double root = sqrt(p->scale);
    ls_real *to = p->saved[PROJECTION];
    if (p->given_features != NULL) {
        LS_LAUNCH(p->queue, scale_given, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, root, p->given_features, to);
        return;
    }
    double *w = (double *)(void *)p->work[DRAW];
    const source s = {p->seed, p->stream * 65536u, (uint32_t)p->draw};
    const int orthogonal = p->option[ORTHOGONAL] != 0;
    LS_LAUNCH(p->queue, draw_normals, ls_blocks(n, LS_THREADS), LS_THREADS, 0, p->H, m * d, s, w);
    const size_t bytes = (size_t)(ls_min(m, d) * d) * sizeof *w;
    const int fits = bytes <= ROOM;
    if (orthogonal)
        LS_LAUNCH(p->queue, orthogonalise, ls_blocks(p->H * ((m + d - 1) / d), 1), LS_THREADS, fits ? bytes : 0, p->H,
                  m, d, fits, w);
    LS_LAUNCH(p->queue, scale_projection, ls_row_blocks(p->H * m), LS_THREADS, 0, p->H, m, d, root, orthogonal, s, w,
              to);
}

/* ------------------------------------------------------------------------------------------------ features */

namespace
{
typedef struct shape {
    int64_t m, d;
    ls_real scale, eps;
    int any; /* any_will_do() */
} shape;
} // namespace

static shape shape_of(const ls_pass *p)
{
    const shape s = {num_features(p), p->d, (ls_real)p->scale, (ls_real)p->option[EPS], any_will_do(p)};
    return s;
}

/* |row|²/2 of the scaled row, for all lanes. */
__device__ static inline ls_real half_of(shape s, const ls_real *row)
{
    ls_real sum = 0;
    LS_EACH_LANE(e, s.d) sum += row[e] * row[e];
    return s.scale / 2 * ls_warp_sum(sum);
}

__device__ static inline ls_real highest(int64_t n, const ls_real *x)
{
    ls_real top = -INFINITY;
    LS_EACH_LANE(i, n) top = x[i] > top ? x[i] : top;
    return ls_warp_max(top);
}

/* e (n,m) holds logits and becomes exponentials; a (n,m+1). */
__global__ static void finish_queries(int64_t n, shape s, const ls_real *rows, ls_real *e, ls_real *a)
{
    LS_EACH_ROW(R, n)
    {
        ls_real *x = e + R * s.m, *to = a + R * (s.m + 1), sum = 0;
        const ls_real half = s.any ? 0 : half_of(s, rows + R * s.d), top = highest(s.m, x) + half;
        LS_EACH_LANE(r, s.m)
        {
            const ls_real y = ls_exp(x[r] - top);
            x[r] = y;
            to[r] = y + s.eps;
            sum += y;
        }
        sum = ls_warp_sum(sum);
        if (threadIdx.x % LS_WARP == 0) to[s.m] = s.eps * (sum + (ls_real)s.m * s.eps);
    }
}

/* b (n,m+1) holds logits and becomes exponents, and a 1. */
__global__ static void finish_keys(int64_t n, shape s, const ls_real *rows, ls_real *b, ls_real *top)
{
    LS_EACH_ROW(R, n)
    {
        ls_real *x = b + R * (s.m + 1);
        const ls_real half = half_of(s, rows + R * s.d), most = highest(s.m, x);
        LS_EACH_LANE(r, s.m) x[r] -= half;
        if (threadIdx.x % LS_WARP != 0) continue;
        x[s.m] = 1;
        top[R] = most - (s.any ? half : 0);
    }
}

/* x (n,ld) of each head = W rows. They become exponents: not rounded. */
static void logits(ls_pass *p, int64_t n, const ls_real *rows, ls_real *x, int64_t ld)
{
    const int64_t m = num_features(p), d = p->d;
    ls_gemm_batch_exact(p->queue, 0, 1, n, m, d, 1, rows, d, n * d, p->saved[PROJECTION], d, m * d, 0, x, ld, n * ld,
                        p->H);
}

static void queries(ls_pass *p, int64_t n, const ls_real *rows, ls_real *a)
{
    ls_real *e = p->work[EXPONENTIALS];
    logits(p, n, rows, e, num_features(p));
    LS_LAUNCH(p->queue, finish_queries, ls_row_blocks(p->H * n), LS_THREADS, 0, p->H * n, shape_of(p), rows, e, a);
}

static void keys(ls_pass *p, int64_t n, const ls_real *rows, ls_real *b, ls_real *top)
{
    logits(p, n, rows, b, num_features(p) + 1);
    LS_LAUNCH(p->queue, finish_keys, ls_row_blocks(p->H * n), LS_THREADS, 0, p->H * n, shape_of(p), rows, b, top);
}

/* e, the exponentials, becomes the gradient of exponents; da (n,m+1). */
__global__ static void queries_to_exponents(int64_t n, shape s, const ls_real *da, ls_real *e)
{
    LS_EACH_ROW(R, n)
    {
        const ls_real *from = da + R * (s.m + 1), both = s.eps * from[s.m];
        LS_EACH_LANE(r, s.m) e[R * s.m + r] *= from[r] + both;
    }
}

/* drows -= scale row Σ dx; dx (n,ld). */
__global__ static void subtract_halves(int64_t n, shape s, const ls_real *rows, const ls_real *dx, int64_t ld,
                                       ls_real *drows)
{
    LS_EACH_ROW(R, n)
    {
        ls_real sum = 0;
        LS_EACH_LANE(r, s.m) sum += dx[R * ld + r];
        sum = s.scale * ls_warp_sum(sum);
        LS_EACH_LANE(e, s.d) drows[R * s.d + e] -= sum * rows[R * s.d + e];
    }
}

/* drows = scale^½ Wᵀ dx - scale row Σ_m dx; dx (n,ld). */
static void logits_backward(ls_pass *p, int64_t n, const ls_real *rows, const ls_real *dx, int64_t ld, ls_real *drows)
{
    const int64_t m = num_features(p), d = p->d;
    ls_gemm_batch(p->queue, 0, 0, n, d, m, 1, dx, ld, n * ld, p->saved[PROJECTION], d, m * d, 0, drows, d, n * d, p->H);
    LS_LAUNCH(p->queue, subtract_halves, ls_row_blocks(p->H * n), LS_THREADS, 0, p->H * n, shape_of(p), rows, dx, ld,
              drows);
}

static void queries_backward(ls_pass *p, int64_t n, const ls_real *rows, const ls_real *da, ls_real *drows)
{
    ls_real *e = p->work[EXPONENTIALS]; /* as queries() left them */
    LS_LAUNCH(p->queue, queries_to_exponents, ls_row_blocks(p->H * n), LS_THREADS, 0, p->H * n, shape_of(p), da, e);
    logits_backward(p, n, rows, e, num_features(p), drows);
}

static void keys_backward(ls_pass *p, int64_t n, const ls_real *rows, const ls_real *db, ls_real *drows)
{
    logits_backward(p, n, rows, db, num_features(p) + 1, drows);
}

/* ------------------------------------------------------------------------------------------------ table */

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t m = num_features(p), n = p->H * m * p->d;
    p->saved[PROJECTION] = ls_take(saved, n);
    ls_linear_cuda_plan(p, saved, work);
    p->work[EXPONENTIALS] = ls_take(work, ls_linear_cuda_rows(p) * m);
    p->work[DRAW] = (ls_real *)ls_arena_take(work, p->backward ? 0 : (size_t)n * sizeof(double));
}

extern "C" {
const ls_feature_map_cuda ls_performer_map_cuda = {.prepare = project,
                                                   .queries = queries,
                                                   .keys = keys,
                                                   .queries_backward = queries_backward,
                                                   .keys_backward = keys_backward};
const ls_cuda_mechanism ls_performer_cuda = {.plan = plan, .kernel = ls_linear_cuda_kernels, .host_bytes = NULL};
}
