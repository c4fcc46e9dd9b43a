/* Sums over rows on a GPU: the gradients of biases, and of the layer norm's parameters, with which that is here as a
 * whole. A block owns some columns of a part of the rows (of the norm all, where a row fits the registers of a warp),
 * its threads take these in turn, in double, and add up in shared memory in one order. The parts go through memory of
 * the queue and are added in their order by a second kernel, so that results do not depend on the order of blocks. */
#include "dense_cuda.h"

namespace ls_dense
{

enum { SUM_THREADS = 256, SUM_BLOCKS_EACH = 4 }; /* of which a multiprocessor has so many blocks at a time */
static_assert(4 * LS_WARP <= LS_SUM_COLUMNS, "a queue's memory has the parts of as many columns as a block has");

/* How columns are shared: `across` threads side by side have W of them each, those of a block the `each` rows of its
 * part in turn. Numbers of threads are powers of 2. */
struct cut {
    int across, parts;
    int64_t each;
    double *room; /* (parts, sums), where there are several */
};
template <int W> struct share {
    int64_t column, first, end, step;
};
template <int W> __device__ static inline share<W> my_share(const cut &c, int64_t rows)
{
    share<W> s;
    s.column = ((int64_t)blockIdx.x * c.across + (int)threadIdx.x % c.across) * W;
    s.first = blockIdx.y * c.each + (int)threadIdx.x / c.across;
    s.end = ls_min(rows, (blockIdx.y + 1) * c.each);
    s.step = (int)blockDim.x / c.across;
    return s;
}

/* to (columns) += what the threads have; all call. Where there are parts they go to room instead, sums [at, at +
 * columns) of `sums`. part: W × threads doubles of shared memory. */
template <int W>
__device__ static void add_columns(const cut &c, const double *mine, int64_t columns, double *part, ls_real *to,
                                   int64_t at, int64_t sums)
{
    const int width = c.across * W;
    for (int k = 0; k < W; k++) part[(int)threadIdx.x * W + k] = mine[k];
    __syncthreads();
    for (int half = (int)blockDim.x * W / 2; half >= width; half /= 2) {
        for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) part[i] += part[i + half];
        __syncthreads();
    }
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        const int64_t column = (int64_t)blockIdx.x * width + i;
        if (column >= columns) continue;
        if (c.parts > 1)
            c.room[blockIdx.y * sums + at + column] = part[i];
        else
            to[column] += (ls_real)part[i];
    }
    __syncthreads();
}

/* first (n), and second (n) where there are 2 n sums, += the sums of their parts: the lanes of a warp have neighbouring
 * columns, the warps of a block the parts in turn. */
__global__ static void add_cuts(int parts, int64_t n, int64_t sums, const double *room, ls_real *first, ls_real *second)
{
    __shared__ double part[LS_THREADS];
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    const int64_t column = (int64_t)blockIdx.x * LS_WARP + lane;
    double sum = 0;
#pragma unroll 8
    for (int i = warp; i < parts; i += LS_THREADS / LS_WARP) sum += column < sums ? room[i * sums + column] : 0;
    part[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || column >= sums) return;
    for (int i = 1; i < LS_THREADS / LS_WARP; i++) sum += part[i * LS_WARP + lane];
    ls_real *to = column < n ? first + column : second + (column - n);
    *to += (ls_real)sum;
}

/* The cut for sums of rows (rows,n), up to two of each column, and its blocks: so many parts that they fill a GPU at
 * once, but each with enough rows that sums of parts are few. */
static cut cut_of(const ls_queue *queue, int64_t rows, int64_t n, int w, dim3 *blocks, int *threads)
{
    const int64_t items = n / w;
    cut c = {LS_WARP, 1, rows, static_cast<double *>(queue->parts)};
    while (c.across / 2 >= items) c.across /= 2;
    *threads = SUM_THREADS;
    const int64_t x = (items + c.across - 1) / c.across, least = 8 * (*threads / c.across); /* rows, 8 of each thread */
    const int64_t parts = ls_max(1, ls_min(rows / least, LS_SUM_BLOCKS / x));
    c.each = (rows + parts - 1) / parts;
    c.parts = (int)((rows + c.each - 1) / c.each);
    while (*threads > ls_max(LS_WARP, c.across) && *threads / c.across * 2 > c.each) *threads /= 2;
    *blocks = dim3((unsigned)x, (unsigned)c.parts);
    return c;
}
static void add_parts(ls_queue *queue, const cut &c, int64_t n, int64_t sums, ls_real *first, ls_real *second)
{
    if (c.parts > 1)
        LS_LAUNCH(queue, add_cuts, (int)((sums + LS_WARP - 1) / LS_WARP), LS_THREADS, 0, c.parts, n, sums,
                  (const double *)c.room, first, second);
}

/* sum (n) += Σ_rows x (rows,n), and y = x where it is not NULL. T: of x */
template <int W, typename T>
__global__ static void __launch_bounds__(SUM_THREADS, SUM_BLOCKS_EACH)
    sum_columns(int64_t rows, int64_t n, cut c, const T *x, ls_real *sum, ls_operand y)
{
    LS_SHARED(double, part);
    constexpr int DEEP = 8; /* reads on their way at a time */
    const share<W> s = my_share<W>(c, rows);
    const int64_t step = s.step * n / W;
    int64_t at = (s.first * n + s.column) / W;
    double acc[W] = {0};
    for (int64_t r = s.first; r < s.end && s.column < n; r += DEEP * s.step, at += DEEP * step) {
        ls_few<W> v[DEEP];
        for (int u = 0; u < DEEP; u++) v[u] = r + u * s.step < s.end ? load<W>(x, at + u * step) : ls_few<W>();
        for (int u = 0; u < DEEP; u++)
            for (int k = 0; k < W; k++) acc[k] += (double)v[u].v[k];
        for (int u = 0; u < DEEP && y.p != NULL; u++)
            if (r + u * s.step < s.end) store<W>(y, at + u * step, v[u]);
    }
    add_columns<W>(c, acc, n, part, sum, 0, n);
}

template <typename T>
static void launch_sums(ls_queue *queue, int64_t rows, int64_t n, const T *x, int w, ls_real *sum, ls_operand y)
{
    int threads;
    dim3 blocks;
    const cut c = cut_of(queue, rows, n, w, &blocks, &threads);
    const auto kernel = w == 4 ? sum_columns<4, T> : sum_columns<1, T>;
    LS_LAUNCH(queue, kernel, blocks, threads, (size_t)(threads * w) * sizeof(double), rows, n, c, x, sum, y);
    add_parts(queue, c, n, n, sum, NULL);
}
static void sum_all(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, ls_real *sum, ls_operand y)
{
    if (rows <= 0 || n <= 0) return;
    const int w = wide(n, x, y) ? 4 : 1;
    if (ls_is_narrow(x))
        launch_sums(queue, rows, n, static_cast<const __nv_bfloat16 *>(x.p), w, sum, y);
    else
        launch_sums(queue, rows, n, static_cast<const ls_real *>(x.p), w, sum, y);
}

void column_sums(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, ls_real *sum)
{
    sum_all(queue, rows, n, x, sum, ls_reals(NULL));
}

void sum_and_copy(ls_queue *queue, int64_t rows, int64_t n, const ls_real *x, ls_real *sum, ls_operand y)
{
    sum_all(queue, rows, n, ls_reals(x), sum, y);
}

/* ------------------------------------------------------------------------------------------------ layer norm */

/* One pass for the moments: var = E[(x-c)²] - E[x-c]², c an element of the row, in double. */
template <int W>
__global__ static void norm(int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b, ls_operand y,
                            ls_real *mean, ls_real *rstd)
{
    LS_EACH_ROW(r, rows)
    {
        const ls_real *xr = x + r * E;
        const double c = (double)xr[0];
        double s = 0, q = 0;
        LS_EACH_LANE(j, E / W)
        {
            const ls_few<W> at = load<W>(xr, j);
            for (int k = 0; k < W; k++) {
                const double d = (double)at.v[k] - c;
                s += d;
                q += d * d;
            }
        }
        s = ls_warp_sum(s) / (double)E;
        q = ls_warp_sum(q) / (double)E - s * s;
        const ls_real mu = (ls_real)(c + s), rs = (ls_real)(1 / sqrt((q < 0 ? 0 : q) + 1e-5)); /* NaN stays */
        if (threadIdx.x % LS_WARP == 0) mean[r] = mu, rstd[r] = rs;
        LS_EACH_LANE(j, E / W)
        {
            const ls_few<W> at = load<W>(xr, j), wj = load<W>(w, j), bj = load<W>(b, j);
            ls_few<W> out;
            for (int k = 0; k < W; k++) out.v[k] = (at.v[k] - mu) * rs * wj.v[k] + bj.v[k];
            store<W>(y, r * (E / W) + j, out);
        }
    }
}

void layer_norm(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b,
                ls_operand y, ls_real *mean, ls_real *rstd)
{
    if (rows <= 0) return;
    const auto kernel = wide(E, x, w, b, y) ? norm<4> : norm<1>;
    LS_LAUNCH(queue, kernel, ls_row_blocks(rows), LS_THREADS, 0, rows, E, x, w, b, y, mean, rstd);
}

/* dw += Σ dy·x̂, db += Σ dy, x̂ = (x - mean)·rstd */
template <int W>
__global__ static void __launch_bounds__(SUM_THREADS, SUM_BLOCKS_EACH)
    norm_columns(int64_t rows, int64_t E, cut c, const ls_real *x, const ls_real *mean, const ls_real *rstd,
                 const ls_real *dy, ls_real *dw, ls_real *db)
{
    LS_SHARED(double, part);
    constexpr int DEEP = 4;
    const share<W> s = my_share<W>(c, rows);
    const int64_t step = s.step * E / W;
    int64_t at = (s.first * E + s.column) / W;
    double acc_w[W] = {0}, acc_b[W] = {0};
    for (int64_t r = s.first; r < s.end && s.column < E; r += DEEP * s.step, at += DEEP * step) {
        ls_few<W> xs[DEEP], ds[DEEP];
        ls_real mu[DEEP], rs[DEEP];
        for (int u = 0; u < DEEP; u++) {
            const bool there = r + u * s.step < s.end;
            xs[u] = there ? load<W>(x, at + u * step) : ls_few<W>();
            ds[u] = there ? load<W>(dy, at + u * step) : ls_few<W>();
            mu[u] = there ? mean[r + u * s.step] : 0;
            rs[u] = there ? rstd[r + u * s.step] : 0;
        }
        for (int u = 0; u < DEEP; u++)
            for (int k = 0; k < W; k++) {
                acc_w[k] += (double)(ds[u].v[k] * ((xs[u].v[k] - mu[u]) * rs[u]));
                acc_b[k] += (double)ds[u].v[k];
            }
    }
    add_columns<W>(c, acc_w, E, part, dw, 0, 2 * E);
    add_columns<W>(c, acc_b, E, part, db, E, 2 * E);
}

/* With g = dy·w: dx = rstd·(g - avg(g) - x̂·avg(g·x̂)). dx may be dy: a lane writes what only it has read. */
template <int W>
__global__ static void norm_rows(int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *mean,
                                 const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate)
{
    LS_EACH_ROW(r, rows)
    {
        const ls_real *xr = x + r * E, *dyr = dy + r * E, mu = mean[r], rs = rstd[r];
        ls_real *dxr = dx + r * E;
        double sum_g = 0, sum_gx = 0;
        LS_EACH_LANE(j, E / W)
        {
            const ls_few<W> at = load<W>(xr, j), d = load<W>(dyr, j), wj = load<W>(w, j);
            for (int k = 0; k < W; k++) {
                const ls_real g = d.v[k] * wj.v[k];
                sum_g += (double)g;
                sum_gx += (double)(g * ((at.v[k] - mu) * rs));
            }
        }
        const ls_real avg_g = (ls_real)(ls_warp_sum(sum_g) / (double)E);
        const ls_real avg_gx = (ls_real)(ls_warp_sum(sum_gx) / (double)E);
        LS_EACH_LANE(j, E / W)
        {
            const ls_few<W> at = load<W>(xr, j), d = load<W>(dyr, j), wj = load<W>(w, j);
            ls_few<W> out = accumulate ? load<W>(dxr, j) : ls_few<W>();
            for (int k = 0; k < W; k++) out.v[k] += rs * (d.v[k] * wj.v[k] - avg_g - (at.v[k] - mu) * rs * avg_gx);
            store<W>(dxr, j, out);
        }
    }
}

/* The same in one pass, for rows of up to 128 N numbers, which a warp holds in its registers: x and dy are read once.
 * The warps of a block have the `each` rows of its part in turn, and add up their sums in their order. */
enum { WHOLE_THREADS = 512 };
template <int N>
__global__ static void __launch_bounds__(WHOLE_THREADS, 1)
    norm_whole(int64_t rows, int64_t E, cut c, const ls_real *x, const ls_real *w, const ls_real *mean,
               const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate, ls_real *dw, ls_real *db)
{
    LS_SHARED(double, part); /* (2,E) */
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP, items = (int)(E / 4);
    const int64_t end = ls_min(rows, (blockIdx.x + 1) * c.each);
    double acc_w[N][4] = {{0}}, acc_b[N][4] = {{0}};
    for (int64_t r = blockIdx.x * c.each + warp; r < end; r += WHOLE_THREADS / LS_WARP) {
        const ls_real mu = mean[r], rs = rstd[r];
        const ls_real *xr = x + r * E, *dyr = dy + r * E;
        ls_real *dxr = dx + r * E;
        ls_four xs[N], g[N];
        double sum_g = 0, sum_gx = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int j = lane + i * LS_WARP;
            xs[i] = j < items ? load<4>(xr, j) : ls_four();
            g[i] = j < items ? load<4>(dyr, j) : ls_four();
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int j = lane + i * LS_WARP;
            const ls_four wj = j < items ? load<4>(w, j) : ls_four();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                xs[i].v[k] = (xs[i].v[k] - mu) * rs;
                acc_w[i][k] += (double)(g[i].v[k] * xs[i].v[k]);
                acc_b[i][k] += (double)g[i].v[k];
                g[i].v[k] *= wj.v[k];
                sum_g += (double)g[i].v[k];
                sum_gx += (double)(g[i].v[k] * xs[i].v[k]);
            }
        }
        const ls_real avg_g = (ls_real)(ls_warp_sum(sum_g) / (double)E);
        const ls_real avg_gx = (ls_real)(ls_warp_sum(sum_gx) / (double)E);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int j = lane + i * LS_WARP;
            if (j >= items) break;
            ls_four out = accumulate ? load<4>(dxr, j) : ls_four();
#pragma unroll
            for (int k = 0; k < 4; k++) out.v[k] += rs * (g[i].v[k] - avg_g - xs[i].v[k] * avg_gx);
            store<4>(dxr, j, out);
        }
    }
    for (int u = 0; u < WHOLE_THREADS / LS_WARP; u++) {
        for (int i = 0; i < N && warp == u; i++)
            for (int k = 0; k < 4; k++) {
                const int j = 4 * (lane + i * LS_WARP) + k;
                if (j >= E) break;
                part[j] = (u > 0 ? part[j] : 0) + acc_w[i][k];
                part[E + j] = (u > 0 ? part[E + j] : 0) + acc_b[i][k];
            }
        __syncthreads();
    }
    for (int i = (int)threadIdx.x; i < 2 * E; i += WHOLE_THREADS) {
        if (c.parts > 1)
            c.room[blockIdx.x * 2 * E + i] = part[i];
        else
            (i < E ? dw[i] : db[i - E]) += (ls_real)part[i];
    }
}

static void norm_in_one(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                        const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate,
                        ls_real *dw, ls_real *db)
{
    const int64_t fit = (int64_t)LS_SUM_BLOCKS * LS_SUM_COLUMNS / E, parts = ls_min(rows / (WHOLE_THREADS / 8), fit);
    cut c = {0, 1, rows, static_cast<double *>(queue->parts)};
    if (parts > 1) c.each = (rows + parts - 1) / parts;
    c.parts = (int)((rows + c.each - 1) / c.each);
    const auto kernel = E <= 128 ? norm_whole<1> : E <= 256 ? norm_whole<2> : norm_whole<4>;
    LS_LAUNCH(queue, kernel, c.parts, WHOLE_THREADS, (size_t)(2 * E) * sizeof(double), rows, E, c, x, w, mean, rstd, dy,
              dx, accumulate, dw, db);
    add_parts(queue, c, E, 2 * E, dw, db);
}

void layer_norm_backward(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                         const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate_dx,
                         ls_real *dw, ls_real *db)
{
    if (rows <= 0) return;
    const int few = wide(E, x, w, dy, dx) ? 4 : 1;
    if (few == 4 && E <= 512) {
        norm_in_one(queue, rows, E, x, w, mean, rstd, dy, dx, accumulate_dx, dw, db);
        return;
    }
    const auto columns = few == 4 ? norm_columns<4> : norm_columns<1>;
    const auto along = few == 4 ? norm_rows<4> : norm_rows<1>;
    int threads;
    dim3 blocks;
    const cut c = cut_of(queue, rows, E, few, &blocks, &threads);
    /* columns first: dx may be dy */
    LS_LAUNCH(queue, columns, blocks, threads, (size_t)(threads * few) * sizeof(double), rows, E, c, x, mean, rstd, dy,
              dw, db);
    add_parts(queue, c, E, 2 * E, dw, db);
    LS_LAUNCH(queue, along, ls_row_blocks(rows), LS_THREADS, 0, rows, E, x, w, mean, rstd, dy, dx, accumulate_dx);
}

} // namespace ls_dense
