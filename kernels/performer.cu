/* Performer on a GPU: the feature map of performer.c; the phases are those of linear.cu.
 *
 * How the work is divided. A block takes a tile of rows and makes their features, or from the gradient of these that of
 * the rows, in one pass over memory: W x goes by pieces of shared memory, what follows by the threads that share a row.
 * So rows are read where they lie, and nothing wider than features is written in between. W is drawn number by number,
 * in double; each block of d rows that is to be orthogonal belongs to one block of threads, in which a warp has a row:
 * row k is taken out of all rows after it at once, so that a step for each row is all that has to wait. Meanwhile the
 * rows lie in shared memory, if they fit there. */
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

/* A block has TILE rows of one (b,h) at a time: thread (group, column) the rows group, group + GROUPS, ... The threads
 * of a row are in one warp. */
typedef ls_warp_grid<4> grid;
enum { TILE = 128, COLUMNS = grid::COLUMNS, GROUPS = LS_THREADS / COLUMNS, EACH = TILE / GROUPS };
/* Numbers of a row, and features, that are in shared memory at a time, and from one row to the next, so that rows side
 * by side begin in other banks. */
enum { DEEP = 64, PITCH = DEEP + 4, WIDE = 16, NARROW = WIDE + 4 };

namespace
{
typedef struct shape {
    int64_t m, d;
    ls_real scale, eps;
    int any; /* any_will_do() */
} shape;

/* Rows [R, R + count) of the slab, those that the shard has, of which the first is at `at`. */
typedef struct tile {
    place at;
    int64_t R;
    int count;
} tile;

/* Those of a tile, and in memory. */
typedef struct rows_of_tile {
    const ls_real *first;
    int64_t step;
    const uint8_t *pad; /* NULL: none is padded */
    int count, fours;
} rows_of_tile;
} // namespace

static shape shape_of(const ls_pass *p)
{
    const shape s = {num_features(p), p->d, (ls_real)p->scale, (ls_real)p->option[EPS], any_will_do(p)};
    return s;
}

LS_BOTH_SIDES int64_t tiles_of_each(const slab &s)
{
    return (s.K * s.C + TILE - 1) / TILE;
}

__device__ static inline tile tile_of(const slab &s, int64_t i)
{
    const int64_t each = quotient(s.K * s.C + TILE - 1, TILE), g = quotient(i, each), u = (i - g * each) * TILE;
    tile t;
    t.R = g * s.K * s.C + u;
    t.at = place_of(s, t.R);
    t.count = (int)ls_max(0, ls_min(ls_min(TILE, s.K * s.C - u), s.rows - t.at.t));
    return t;
}

__device__ static inline rows_of_tile rows_there(const slab &s, const tile &t, ls_view v, const uint8_t *pad, int fours)
{
    rows_of_tile y;
    y.first = ls_row(v, t.at.b, t.at.h, t.at.t);
    y.step = v.st;
    y.pad = pad == NULL ? NULL : pad + t.at.b * s.rows + t.at.t;
    y.count = t.count;
    y.fours = fours;
    return y;
}

__device__ static inline int is_there(const rows_of_tile &x, int r)
{
    return r < x.count && (x.pad == NULL || x.pad[r] == 0);
}

/* `to` (TILE,PITCH) = numbers [e0, e0 + DEEP) of the rows, 0 where there are none. */
__device__ static void load_rows(const rows_of_tile &x, int64_t d, int64_t e0, ls_real *to)
{
    enum { FILLERS = DEEP / 4, TIMES = TILE * FILLERS / LS_THREADS };
    const int e = threadIdx.x % FILLERS * 4;
    const int64_t left = d - e0 - e;
    const ls_real *from = x.first + e0 + e;
    ls_four z[TIMES];
#pragma unroll
    for (int n = 0; n < TIMES; n++) {
        const int r = threadIdx.x / FILLERS + n * (LS_THREADS / FILLERS);
        z[n] = {};
        if (left > 0 && is_there(x, r)) z[n] = ls_read_some<4>(from + r * x.step, (int)left, x.fours);
    }
#pragma unroll
    for (int n = 0; n < TIMES; n++)
        *(ls_four *)(to + (threadIdx.x / FILLERS + n * (LS_THREADS / FILLERS)) * PITCH + e) = z[n];
}

/* W (m,d) of a head: features [f0, f0 + WIDE), numbers [e0, e0 + DEEP), 0 where there are none; to each thread four. */
__device__ static void load_projection(shape x, const ls_real *W, int64_t f0, int64_t e0, ls_real *to)
{
    static_assert(WIDE * DEEP == 4 * LS_THREADS, "a thread has four");
    const int f = threadIdx.x / (DEEP / 4), e = threadIdx.x % (DEEP / 4) * 4;
    const ls_real *from = W + (f0 + f) * x.d + e0 + e;
    ls_four z = {};
    for (int k = 0; k < 4; k++)
        if (f0 + f < x.m && e0 + e + k < x.d) z.v[k] = from[k];
    *(ls_four *)(to + f * PITCH + e) = z;
}

/* ------------------------------------------------------------------------------------------------ features */

/* act(i, f) for the features f = column + i COLUMNS of a thread: N of them, 0: as many as there are. */
template <int N, typename F> __device__ static inline void each_of_mine(shape x, F act)
{
    const int column = grid::column();
    if constexpr (N > 0) {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (column + i * COLUMNS < x.m) act(i, column + i * COLUMNS);
    } else {
        for (int i = 0; column + (int64_t)i * COLUMNS < x.m; i++) act(i, column + i * COLUMNS);
    }
}

template <int N, typename L> __device__ static inline ls_real highest_logit(shape x, int there, L logit)
{
    ls_real top = -INFINITY;
    each_of_mine<N>(x, [&](int i, int) { top = there && logit(i) > top ? logit(i) : top; });
    return ls_warp_max(top, COLUMNS, grid::APART);
}

/* What the threads of a row make of its logits, each of its own, logit(i). a (m+1), 0 where the row is not there; e
 * (m): exponentials, NULL: not wanted. half: |row|²/2 of the scaled row. in_tile: 0: there is no memory for the row. */
template <int N, typename L>
__device__ static inline void finish_query(shape x, ls_real half, int in_tile, int there, L logit, ls_real *a,
                                           ls_real *e)
{
    const ls_real top = highest_logit<N>(x, there, logit) + (x.any ? 0 : half);
    ls_real sum = 0;
    each_of_mine<N>(x, [&](int i, int f) {
        const ls_real y = there ? ls_exp(logit(i) - top) : 0;
        if (e != NULL && in_tile) e[f] = y;
        if (in_tile) a[f] = there ? y + x.eps : 0;
        sum += y;
    });
    sum = ls_warp_sum(sum, COLUMNS, grid::APART);
    if (in_tile && grid::column() == 0) a[x.m] = there ? x.eps * (sum + (ls_real)x.m * x.eps) : 0;
}

/* b (m+1): exponents, and a 1. */
template <int N, typename L>
__device__ static inline void finish_key(shape x, ls_real half, int in_tile, int there, L logit, ls_real *b,
                                         ls_real *top)
{
    const ls_real most = highest_logit<N>(x, there, logit);
    each_of_mine<N>(x, [&](int i, int f) {
        if (in_tile) b[f] = there ? logit(i) - half : 0;
    });
    if (!in_tile || grid::column() != 0) return;
    b[x.m] = (ls_real)there;
    if (there) *top = most - (x.any ? half : 0);
}

/* y (R,m+1) = the features of rows. Products are those of floats, whatever the precision: they become exponents. Keys
 * have top, queries not. PIECES times WIDE logits of a row, and no more, stay in its threads' registers; 0: they wait
 * in memory. */
template <int PIECES>
__global__ static void __launch_bounds__(LS_THREADS, PIECES > 1 ? 2 : 3)
    make_features(slab s, shape x, ls_view rows, const uint8_t *pad, int fours, const ls_real *W, int64_t tiles,
                  ls_real *y, ls_real *e, ls_real *top)
{
    enum { HELD = PIECES > 0 ? PIECES : 1, MINE = 2 * PIECES };
    static_assert(WIDE == 2 * COLUMNS, "a thread has two logits of a piece");
    __shared__ __align__(32) ls_real of_rows[TILE * PITCH];
    __shared__ __align__(32) ls_real of_w[WIDE * PITCH];
    const int group = grid::row_of_block(), column = grid::column();
    for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
        const tile t = tile_of(s, i);
        const rows_of_tile from = rows_there(s, t, rows, pad, fours);
        ls_real *to = y + t.R * (x.m + 1);
        ls_real half[EACH] = {0}, logits[EACH][2 * HELD] = {{0}};
        const auto multiply = [&](int64_t f0, int piece) {
            for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
                __syncthreads();
                if (f0 == 0 || x.d > DEEP) load_rows(from, x.d, e0, of_rows);
                load_projection(x, W + t.at.h * x.m * x.d, f0, e0, of_w);
                __syncthreads();
                for (int k = 0; k < DEEP; k += 4) {
                    const ls_four w[2] = {ls_four_at(of_w + column * PITCH + k),
                                          ls_four_at(of_w + (column + COLUMNS) * PITCH + k)};
#pragma unroll
                    for (int u = 0; u < EACH; u++) {
                        const ls_four z = ls_four_at(of_rows + (group + u * GROUPS) * PITCH + k);
#pragma unroll
                        for (int v = 0; v < 2; v++)
#pragma unroll
                            for (int j = 0; j < 4; j++) logits[u][2 * piece + v] += z.v[j] * w[v].v[j];
                    }
                }
                for (int u = 0; u < EACH && f0 == 0; u++) /* each thread of a row has two fours of it */
                    for (int k = column * 4; k < DEEP; k += COLUMNS * 4) {
                        const ls_four z = ls_four_at(of_rows + (group + u * GROUPS) * PITCH + k);
                        for (int j = 0; j < 4; j++) half[u] += z.v[j] * z.v[j];
                    }
            }
        };
        if constexpr (PIECES > 0) {
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++)
                if (piece * WIDE < x.m) multiply(piece * WIDE, piece);
        } else {
            for (int64_t f0 = 0; f0 < x.m; f0 += WIDE) {
                multiply(f0, 0);
#pragma unroll
                for (int u = 0; u < EACH; u++)
#pragma unroll
                    for (int v = 0; v < 2; v++) {
                        const int64_t r = group + u * GROUPS, f = f0 + column + v * COLUMNS;
                        if (r < t.count && f < x.m) to[r * (x.m + 1) + f] = logits[u][v];
                        logits[u][v] = 0;
                    }
            }
        }
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const int r = group + u * GROUPS, in_tile = r < t.count, there = is_there(from, r);
            ls_real *row = to + r * (x.m + 1);
            ls_real *of_e = e == NULL ? NULL : e + (t.R + r) * x.m;
            const auto logit = [&](int n) {
                if constexpr (PIECES > 0)
                    return logits[u][n];
                else
                    return row[column + n * COLUMNS];
            };
            half[u] = x.scale / 2 * ls_warp_sum(half[u], COLUMNS, grid::APART);
            if (top == NULL)
                finish_query<MINE>(x, half[u], in_tile, there, logit, row, of_e);
            else
                finish_key<MINE>(x, half[u], in_tile, there, logit, row, top + t.R + r);
        }
    }
}

static void features(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, ls_real *y, ls_real *e, ls_real *top)
{
    const shape x = shape_of(p);
    const int64_t tiles = s.H * s.B * tiles_of_each(s);
    const auto kernel = x.m <= WIDE       ? make_features<1>
                        : x.m <= 2 * WIDE ? make_features<2>
                        : x.m <= 4 * WIDE ? make_features<4>
                                          : make_features<0>;
    LS_LAUNCH(p->queue, kernel, ls_blocks(tiles, 1), LS_THREADS, 0, s, x, rows, pad, ls_rows_are_fours(rows, p->d),
              p->saved[PROJECTION], tiles, y, e, top);
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
__device__ static void load_gradients(shape x, const tile &t, const rows_of_tile &rows, int64_t f0, const ls_real *e,
                                      const ls_real *dy, ls_real *to)
{
    enum { TIMES = TILE * WIDE / LS_THREADS };
    const int f = threadIdx.x % WIDE;
    dy += t.R * (x.m + 1);
#pragma unroll
    for (int n = 0; n < TIMES; n++) {
        const int r = threadIdx.x / WIDE + n * (LS_THREADS / WIDE);
        ls_real g = 0;
        if (f0 + f < x.m && is_there(rows, r)) { /* others have no exponentials */
            g = dy[r * (x.m + 1) + f0 + f];
            if (e != NULL) g = e[(t.R + r) * x.m + f0 + f] * (g + x.eps * dy[r * (x.m + 1) + x.m]);
        }
        to[r * NARROW + f] = g;
    }
}

/* drows = scale^½ Wᵀ dx - scale row Σ_m dx, dx the gradient of logits; W is scaled already. */
__global__ static void __launch_bounds__(LS_THREADS, 3)
    features_backward(slab s, shape x, ls_view rows, const uint8_t *pad, int fours, const ls_real *W, const ls_real *e,
                      const ls_real *dy, int64_t tiles, int pieces, ls_view drows, int add)
{
    __shared__ __align__(32) ls_real of_x[TILE * NARROW];
    __shared__ __align__(32) ls_real of_w[WIDE * PITCH];
    const int group = grid::row_of_block(), column = grid::column();
    for (int64_t i = blockIdx.x; i < tiles * pieces; i += gridDim.x) {
        const int64_t n = quotient(i, pieces), e0 = (i - n * pieces) * DEEP;
        const tile t = tile_of(s, n);
        const rows_of_tile from = rows_there(s, t, rows, pad, fours);
        ls_real *to = ls_row(drows, t.at.b, t.at.h, t.at.t);
        ls_real sum[EACH][2][4] = {{{0}}}, all[EACH] = {0};
        for (int64_t f0 = 0; f0 < x.m; f0 += WIDE) {
            __syncthreads();
            load_gradients(x, t, from, f0, e, dy, of_x);
            load_projection(x, W + t.at.h * x.m * x.d, f0, e0, of_w);
            __syncthreads();
#pragma unroll 4
            for (int k = 0; k < WIDE; k++) {
                const ls_four w[2] = {ls_four_at(of_w + k * PITCH + column * 4),
                                      ls_four_at(of_w + k * PITCH + DEEP / 2 + column * 4)};
#pragma unroll
                for (int u = 0; u < EACH; u++) {
                    const ls_real z = of_x[(group + u * GROUPS) * NARROW + k];
                    all[u] += z;
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[u][0][j] += z * w[0].v[j], sum[u][1][j] += z * w[1].v[j];
                }
            }
        }
#pragma unroll
        for (int u = 0; u < EACH; u++) {
            const int r = group + u * GROUPS, there = is_there(from, r);
            if (r >= t.count) continue;
            const ls_real by = x.scale * all[u];
            const ls_real *row = from.first + r * from.step;
            ls_real *drow = to + r * drows.st;
#pragma unroll
            for (int v = 0; v < 2; v++) {
                const int64_t at = e0 + v * (DEEP / 2) + column * 4;
                if (at < x.d && fours) {
                    const ls_four z = ls_four_at(row + at);
                    ls_four g = {};
                    if (add) g = ls_four_at(drow + at);
#pragma unroll
                    for (int j = 0; j < 4; j++) g.v[j] += there ? sum[u][v][j] - by * z.v[j] : 0;
                    *(ls_four *)(drow + at) = g;
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (at + j >= x.d || fours) continue;
                    const ls_real g = there ? sum[u][v][j] - by * row[at + j] : 0;
                    drow[at + j] = add ? drow[at + j] + g : g;
                }
            }
        }
    }
}

static void backward(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, const ls_real *e, const ls_real *dy,
                     ls_view drows, int add)
{
    const int64_t pieces = (p->d + DEEP - 1) / DEEP, tiles = s.H * s.B * tiles_of_each(s);
    LS_LAUNCH(p->queue, features_backward, ls_blocks(tiles * pieces, 1), LS_THREADS, 0, s, shape_of(p), rows, pad,
              ls_rows_are_fours(rows, p->d) && ls_rows_are_fours(drows, p->d), p->saved[PROJECTION], e, dy, tiles,
              (int)pieces, drows, add);
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
