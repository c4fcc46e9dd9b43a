/* Performer on a GPU: the feature map of performer.c; the phases are those of linear.cu.
 *
 * How the work is divided. A block takes a tile of rows and makes their features, or from the gradient of these that of
 * the rows, in one pass over memory: W x goes by pieces of shared memory, what follows row by row, a warp for each. So
 * rows are read where they lie, and nothing wider than features is written in between. W is drawn number by number, in
 * double; each block of d rows that is to be orthogonal belongs to one block of threads, in which a warp has a row: row
 * k is taken out of all rows after it at once, so that a step for each row is all that has to wait. Meanwhile the rows
 * lie in shared memory, if they fit there. */
#include "linear_cuda.h"

extern "C" {
#include "performer.h"
}
#include "rng_inline.h"
using namespace ls_linear;

enum { EXPONENTIALS = LS_LINEAR_WORK, DRAW }; /* work[]; DRAW holds doubles */

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
    const int fits = ls_has_shared(p->queue, bytes);
    if (orthogonal)
        LS_LAUNCH(p->queue, orthogonalise, ls_blocks(p->H * ((m + d - 1) / d), 1), LS_THREADS, fits ? bytes : 0, p->H,
                  m, d, fits, w);
    LS_LAUNCH(p->queue, scale_projection, ls_row_blocks(p->H * m), LS_THREADS, 0, p->H, m, d, root, orthogonal, s, w,
              to);
}

/* ------------------------------------------------------------------------------------------------ rows */

/* A block has TILE rows of one head at a time: thread (group, column) the rows group, group + GROUPS, ... */
enum { TILE = 128, COLUMNS = 8, GROUPS = LS_THREADS / COLUMNS, EACH = TILE / GROUPS };
enum { WIDE = 16, SHORT = WIDE + 4 }; /* features that meet at a time; see PITCH */

namespace
{
typedef struct shape {
    int64_t m, d;
    ls_real scale, eps;
    int any; /* any_will_do() */
} shape;

typedef struct tile {
    int64_t h, first, count; /* rows [first, first + count) of all that head h has in the slab */
} tile;
} // namespace

static shape shape_of(const ls_pass *p)
{
    const shape s = {num_features(p), p->d, (ls_real)p->scale, (ls_real)p->option[EPS], any_will_do(p)};
    return s;
}

LS_BOTH_SIDES int64_t tiles_of(const slab &s)
{
    return s.H * ((rows_per_head(s) + TILE - 1) / TILE);
}

__device__ static inline tile tile_of(const slab &s, int64_t i)
{
    const int64_t n = rows_per_head(s), each = (n + TILE - 1) / TILE;
    tile t;
    t.h = i / each;
    t.first = i % each * TILE;
    t.count = ls_min(TILE, n - t.first);
    return t;
}

/* W (m,d) of a head: features [f0, f0 + WIDE), numbers [e0, e0 + DEEP), 0 where there are none. */
__device__ static void load_projection(shape x, const ls_real *W, int64_t f0, int64_t e0, ls_real *to)
{
    for (int i = threadIdx.x; i < WIDE * DEEP; i += LS_THREADS) {
        const int f = i / DEEP, e = i % DEEP;
        to[f * PITCH + e] = f0 + f < x.m && e0 + e < x.d ? W[(f0 + f) * x.d + e0 + e] : 0;
    }
}

/* ------------------------------------------------------------------------------------------------ features */

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

/* A row a (m+1) of logits becomes features; e (m) their exponentials, NULL: not wanted. */
__device__ static void finish_query(shape x, const ls_real *row, ls_real *a, ls_real *e)
{
    ls_real sum = 0;
    const ls_real half = x.any ? 0 : half_of(x, row), top = highest(x.m, a) + half;
    LS_EACH_LANE(r, x.m)
    {
        const ls_real y = ls_exp(a[r] - top);
        if (e != NULL) e[r] = y;
        a[r] = y + x.eps;
        sum += y;
    }
    sum = ls_warp_sum(sum);
    if (threadIdx.x % LS_WARP == 0) a[x.m] = x.eps * (sum + (ls_real)x.m * x.eps);
}

/* A row b (m+1) of logits becomes exponents, and a 1. */
__device__ static void finish_key(shape x, const ls_real *row, ls_real *b, ls_real *top)
{
    const ls_real half = half_of(x, row), most = highest(x.m, b);
    LS_EACH_LANE(r, x.m) b[r] -= half;
    if (threadIdx.x % LS_WARP != 0) return;
    b[x.m] = 1;
    *top = most - (x.any ? half : 0);
}

/* y (R,m+1) = the features of rows. Products are those of floats, whatever the precision: they become exponents. Keys
 * have top, queries not. */
__global__ static void make_features(slab s, shape x, ls_view rows, const uint8_t *pad, int fours, const ls_real *W,
                                     ls_real *y, ls_real *e, ls_real *top)
{
    __shared__ __align__(32) ls_real of_rows[TILE * PITCH];
    __shared__ __align__(32) ls_real of_w[WIDE * PITCH];
    const int group = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    for (int64_t i = blockIdx.x; i < tiles_of(s); i += gridDim.x) {
        const tile t = tile_of(s, i);
        const int64_t R = t.h * rows_per_head(s) + t.first;
        for (int64_t f0 = 0; f0 < x.m; f0 += WIDE) {
            ls_real sum[EACH][2] = {{0}};
            for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
                __syncthreads();
                if (f0 == 0 || x.d > DEEP) load_rows<TILE>(s, R, t.count, x.d, e0, rows, pad, fours, of_rows);
                load_projection(x, W + t.h * x.m * x.d, f0, e0, of_w);
                __syncthreads();
                for (int k = 0; k < DEEP; k += 4) {
                    const ls_four w[2] = {ls_four_at(of_w + column * PITCH + k),
                                          ls_four_at(of_w + (column + COLUMNS) * PITCH + k)};
#pragma unroll
                    for (int u = 0; u < EACH; u++) {
                        const ls_four z = ls_four_at(of_rows + (group + u * GROUPS) * PITCH + k);
#pragma unroll
                        for (int j = 0; j < 4; j++) sum[u][0] += z.v[j] * w[0].v[j], sum[u][1] += z.v[j] * w[1].v[j];
                    }
                }
            }
            for (int u = 0; u < EACH; u++)
                for (int v = 0; v < 2; v++) {
                    const int64_t r = group + u * GROUPS, f = f0 + column + v * COLUMNS;
                    if (r < t.count && f < x.m) y[(R + r) * (x.m + 1) + f] = sum[u][v];
                }
        }
        __syncthreads(); /* the logits of a row are there */
        for (int64_t r = R + threadIdx.x / LS_WARP; r < R + t.count; r += LS_THREADS / LS_WARP) {
            const place at = place_of(s, r);
            if (!is_there(s, pad, at)) continue;
            const ls_real *row = ls_row(rows, at.b, at.h, at.t);
            ls_real *to = y + r * (x.m + 1);
            if (top == NULL)
                finish_query(x, row, to, e == NULL ? NULL : e + r * x.m);
            else
                finish_key(x, row, to, top + r);
        }
    }
}

static void features(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, ls_real *y, ls_real *e, ls_real *top)
{
    LS_LAUNCH(p->queue, make_features, ls_blocks(tiles_of(s), 1), LS_THREADS, 0, s, shape_of(p), rows, pad,
              reads_fours(rows, p->d), p->saved[PROJECTION], y, e, top);
}

static void queries(ls_pass *p, slab s, ls_real *a)
{
    features(p, s, p->q, p->pad_q, a, p->backward ? p->work[EXPONENTIALS] : NULL, NULL);
}

static void keys(ls_pass *p, slab s, ls_real *b, ls_real *top)
{
    features(p, s, p->own.k, p->own.pad, b, NULL, top);
}

/* ------------------------------------------------------------------------------------------------ gradients */

/* The gradient of logits [f0, f0 + WIDE) of the tile's rows, from dy (R,m+1), that of features: queries have e. */
__device__ static void load_gradients(shape x, int64_t R, int64_t count, int64_t f0, const ls_real *e,
                                      const ls_real *dy, ls_real *to)
{
    for (int i = threadIdx.x; i < TILE * WIDE; i += LS_THREADS) {
        const int64_t r = i / WIDE, f = f0 + i % WIDE;
        const ls_real *from = dy + (R + r) * (x.m + 1);
        ls_real g = 0;
        if (r < count && f < x.m) g = e == NULL ? from[f] : e[(R + r) * x.m + f] * (from[f] + x.eps * from[x.m]);
        to[r * SHORT + i % WIDE] = g;
    }
}

/* drows = scale^½ Wᵀ dx - scale row Σ_m dx, dx the gradient of logits; W is scaled already. */
__global__ static void features_backward(slab s, shape x, ls_view rows, const uint8_t *pad, int fours, const ls_real *W,
                                         const ls_real *e, const ls_real *dy, ls_view drows, int add)
{
    __shared__ __align__(32) ls_real of_x[TILE * SHORT];
    __shared__ __align__(32) ls_real of_w[WIDE * PITCH];
    const int group = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    const int64_t pieces = (x.d + DEEP - 1) / DEEP;
    for (int64_t i = blockIdx.x; i < tiles_of(s) * pieces; i += gridDim.x) {
        const tile t = tile_of(s, i / pieces);
        const int64_t R = t.h * rows_per_head(s) + t.first, e0 = i % pieces * DEEP;
        ls_real sum[EACH][2][4] = {{{0}}}, all[EACH] = {0};
        for (int64_t f0 = 0; f0 < x.m; f0 += WIDE) {
            __syncthreads();
            load_gradients(x, R, t.count, f0, e, dy, of_x);
            load_projection(x, W + t.h * x.m * x.d, f0, e0, of_w);
            __syncthreads();
            for (int k = 0; k < WIDE; k++) {
                const ls_four w[2] = {ls_four_at(of_w + k * PITCH + column * 4),
                                      ls_four_at(of_w + k * PITCH + DEEP / 2 + column * 4)};
#pragma unroll
                for (int u = 0; u < EACH; u++) {
                    const ls_real z = of_x[(group + u * GROUPS) * SHORT + k];
                    all[u] += z;
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[u][0][j] += z * w[0].v[j], sum[u][1][j] += z * w[1].v[j];
                }
            }
        }
        for (int u = 0; u < EACH; u++)
            for (int v = 0; v < 2; v++) {
                const int64_t r = group + u * GROUPS, from = e0 + v * (DEEP / 2) + column * 4;
                if (r >= t.count) continue;
                const place at = place_of(s, R + r);
                if (at.t >= s.rows) continue;
                const int there = is_there(s, pad, at);
                const ls_real *row = ls_row(rows, at.b, at.h, at.t);
                ls_real *to = ls_row(drows, at.b, at.h, at.t);
                if (from < x.d && fours) {
                    const ls_four z = there ? ls_four_at(row + from) : ls_four{};
                    ls_four y = add ? ls_four_at(to + from) : ls_four{};
                    for (int j = 0; j < 4 && there; j++) y.v[j] += sum[u][v][j] - x.scale * all[u] * z.v[j];
                    *(ls_four *)(to + from) = y;
                }
                for (int j = 0; j < 4 && from + j < x.d && !fours; j++) {
                    const ls_real y = there ? sum[u][v][j] - x.scale * all[u] * row[from + j] : 0;
                    to[from + j] = add ? to[from + j] + y : y;
                }
            }
    }
}

static void backward(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, const ls_real *e, const ls_real *dy,
                     ls_view drows, int add)
{
    const int64_t pieces = (p->d + DEEP - 1) / DEEP;
    LS_LAUNCH(p->queue, features_backward, ls_blocks(tiles_of(s) * pieces, 1), LS_THREADS, 0, s, shape_of(p), rows, pad,
              reads_fours(rows, p->d) && reads_fours(drows, p->d), p->saved[PROJECTION], e, dy, drows, add);
}

static void queries_backward(ls_pass *p, slab s, const ls_real *da)
{
    backward(p, s, p->q, p->pad_q, p->work[EXPONENTIALS], da, p->dq, 0); /* exponentials as queries() left them */
}

static void keys_backward(ls_pass *p, slab s, const ls_real *db, int add)
{
    backward(p, s, p->own.k, p->own.pad, NULL, db, p->own.dk, add);
}

/* ------------------------------------------------------------------------------------------------ table */

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t m = num_features(p), n = p->H * m * p->d;
    p->saved[PROJECTION] = ls_take(saved, n);
    ls_linear_cuda_plan(p, saved, work);
    p->work[EXPONENTIALS] = ls_take(work, p->backward ? ls_linear_cuda_rows(p) * m : 0);
    p->work[DRAW] = (ls_real *)ls_arena_take(work, p->backward ? 0 : (size_t)n * sizeof(double));
}

extern "C" {
const ls_feature_map_cuda ls_performer_map_cuda = {.prepare = project,
                                                   .act = NULL,
                                                   .queries = queries,
                                                   .keys = keys,
                                                   .queries_backward = queries_backward,
                                                   .keys_backward = keys_backward};
const ls_cuda_mechanism ls_performer_cuda = {
    .plan = plan, .kernel = ls_linear_cuda_kernels, .host_bytes = NULL, .takes_narrow = NULL};
}
