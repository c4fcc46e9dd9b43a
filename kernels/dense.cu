/* The dense layers on a GPU. Three ways to divide the work:
 *
 *   elements     a thread for each, or for four or eight that lie side by side where n and the pointers allow
 *   rows         a warp for each: norms, loss, embedding; sums over a row are a warp's
 *   columns      gradients of biases, norms and embeddings are sums over rows: a block owns some columns of a part of
 *                the rows, its threads take these in turn, in double, and add up in shared memory in one order. The
 *                parts go through memory of the queue and are added in their order by a second kernel, so that results
 *                do not depend on the order of blocks.
 *
 * The linear layers are products of cuBLAS, but linear_alike, whose rows must not know how many they are. */
#include "cuda.h"

#include <cuda_mma.h>

/* An instruction for each, where the exact ones take twenty. What the exponent loses by its second rounding is what it
 * has lost by that of x². */
#define LS_NORMAL_SIDES __device__ static inline
#define LS_NORMAL_EXP(s) ls_exp2(-0.72134752f * (s))
#define LS_NORMAL_INVERSE(x) ls_inverse(x)

extern "C" {
#include "dense.h"
#include "erf.h"
}

#include "rng_inline.h"

/* Item i of rows that are read W numbers at once; T is ls_real or bfloat16. */
template <int W, typename T> __device__ static inline ls_few<W> load(const T *x, int64_t i)
{
    return ls_few_at<W>(x + i * W);
}
template <int W, typename T> __device__ static inline void store(T *x, int64_t i, const ls_few<W> &value)
{
    ls_put_few<W>(x + i * W, value);
}

/* The same of rows that may lie in bfloat16, and do where W is 8: all threads of a launch go the same way. */
template <int W> __device__ static inline ls_few<W> load(const ls_operand &x, int64_t i)
{
    return W == 8 || ls_is_narrow(x) ? load<W>(static_cast<const __nv_bfloat16 *>(x.p), i)
                                     : load<W>(static_cast<const ls_real *>(x.p), i);
}
template <int W> __device__ static inline void store(const ls_operand &x, int64_t i, const ls_few<W> &value)
{
    if (W == 8 || ls_is_narrow(x))
        store<W>(static_cast<__nv_bfloat16 *>(x.p), i, value);
    else
        store<W>(static_cast<ls_real *>(x.p), i, value);
}

/* Whether rows of n numbers there can be read by fours. */
static bool is_wide(const ls_real *p)
{
    return ls_is_four(p);
}
static bool is_wide(const ls_operand &x)
{
    return uintptr_t(x.p) % (size_t)(4 * x.size) == 0;
}
template <typename... P> static bool wide(int64_t n, const P &...p)
{
    return n % 4 == 0 && (is_wide(p) && ...);
}

/* Whether all that may lie in bfloat16 does, and can be read by eights. */
static bool is_eight(const ls_real *p)
{
    return ls_is_four(p);
}
static bool is_eight(const ls_operand &x)
{
    return ls_is_narrow(x) && uintptr_t(x.p) % sizeof(ls_narrow_word<8>::type) == 0;
}
template <typename... P> static int width(int64_t n, const P &...p)
{
    return n % 8 == 0 && (is_eight(p) && ...) ? 8 : wide(n, p...) ? 4 : 1;
}

/* How rows of items are shared: neighbouring threads (x) have neighbouring items, as many rows (y) as a block can hold
 * are walked along at once, in `step`s of all blocks; no thread divides to know where it stands. */
static dim3 threads_over(int64_t items)
{
    const int64_t across = ls_max(1, ls_min(LS_THREADS, items));
    return dim3((unsigned)across, (unsigned)(LS_THREADS / across));
}
/* each: rows that a thread has; B: batches of so many rows, in z. */
static dim3 blocks_over(int64_t rows, int64_t items, int64_t each, int64_t B)
{
    const dim3 threads = threads_over(items);
    const int64_t x = (items + threads.x - 1) / threads.x, y = (rows + threads.y * each - 1) / (threads.y * each);
    return dim3((unsigned)x, (unsigned)ls_min(y, 65535), (unsigned)ls_min(B, 65535));
}
__device__ static inline int64_t my_item()
{
    return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ static inline int64_t my_row()
{
    return (int64_t)blockIdx.y * blockDim.y + threadIdx.y;
}
__device__ static inline int64_t row_step()
{
    return (int64_t)gridDim.y * blockDim.y;
}
enum { ROWS_EACH = 4 };

/* ------------------------------------------------------------------------------------------------ elements */

/* y = f(a, b), or f(a) where f has one input; y may be either. */
template <typename F, int W> __global__ static void map(int64_t n, F f, ls_operand a, ls_operand b, ls_operand y)
{
    LS_EACH(i, n)
    {
        const ls_few<W> x = load<W>(a, i), z = F::inputs == 2 ? load<W>(b, i) : x;
        ls_few<W> out;
        for (int k = 0; k < W; k++) out.v[k] = f(x.v[k], z.v[k]);
        store<W>(y, i, out);
    }
}

template <typename F>
static void map_all(ls_queue *queue, int64_t n, F f, const ls_operand &a, const ls_operand &b, const ls_operand &y)
{
    if (n <= 0) return;
    const int w = width(n, a, b, y);
    const auto kernel = w == 8 ? map<F, 8> : w == 4 ? map<F, 4> : map<F, 1>;
    LS_LAUNCH(queue, kernel, ls_blocks(n / w, LS_THREADS), LS_THREADS, 0, n / w, f, a, b, y);
}

/* y = f(a + bias, b) for rows (rows, W columns) */
template <typename F, int W>
__global__ static void map_rows(int64_t rows, int64_t columns, F f, ls_operand a, const ls_real *bias, ls_operand b,
                                ls_operand y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    const ls_few<W> added = load<W>(bias, j);
    for (int64_t r = my_row(); r < rows; r += row_step()) {
        const int64_t i = r * columns + j;
        const ls_few<W> x = load<W>(a, i), z = F::inputs == 2 ? load<W>(b, i) : x;
        ls_few<W> out;
        for (int k = 0; k < W; k++) out.v[k] = f(x.v[k] + added.v[k], z.v[k]);
        store<W>(y, i, out);
    }
}

template <typename F>
static void map_biased(ls_queue *queue, int64_t rows, int64_t n, F f, const ls_operand &a, const ls_real *bias,
                       const ls_operand &b, const ls_operand &y)
{
    if (bias == NULL) {
        map_all(queue, rows * n, f, a, b, y);
        return;
    }
    if (rows <= 0) return;
    const int w = width(n, a, bias, b, y);
    const auto kernel = w == 8 ? map_rows<F, 8> : w == 4 ? map_rows<F, 4> : map_rows<F, 1>;
    LS_LAUNCH(queue, kernel, blocks_over(rows, n / w, 2, 1), threads_over(n / w), 0, rows, n / w, f, a, bias, b, y);
}

struct gelu_of {
    enum { inputs = 1 };
    __device__ ls_real operator()(ls_real x, ls_real) const
    {
        ls_real density;
        return x * ls_normal_cdf(x, &density);
    }
};
/* (x Φ(x))' = Φ(x) + x φ(x) */
struct gelu_gradient {
    enum { inputs = 2 };
    __device__ ls_real operator()(ls_real x, ls_real dy) const
    {
        ls_real density;
        const ls_real cdf = ls_normal_cdf(x, &density);
        return dy * fma(x, density, cdf); /* so, that all kernels round alike */
    }
};
struct relu_of {
    enum { inputs = 1 };
    __device__ ls_real operator()(ls_real x, ls_real) const
    {
        return x < 0 ? 0 : x; /* NaN goes through and is seen */
    }
};
struct relu_gradient {
    enum { inputs = 2 };
    __device__ ls_real operator()(ls_real x, ls_real dy) const
    {
        return x > 0 ? dy : 0;
    }
};
struct sum_of {
    enum { inputs = 2 };
    __device__ ls_real operator()(ls_real a, ls_real b) const
    {
        return a + b;
    }
};
struct same_as {
    enum { inputs = 1 };
    __device__ ls_real operator()(ls_real x, ls_real) const
    {
        return x;
    }
};

static void gelu(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y)
{
    map_biased(queue, rows, n, gelu_of(), x, b, x, y);
}

static void gelu_backward(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx)
{
    map_biased(queue, rows, n, gelu_gradient(), x, b, dy, dx);
}

static void relu(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y)
{
    map_biased(queue, rows, n, relu_of(), x, b, x, y);
}

static void relu_backward(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx)
{
    map_biased(queue, rows, n, relu_gradient(), x, b, dy, dx);
}

static void add(ls_queue *queue, int64_t n, const ls_real *x, ls_real *y)
{
    map_all(queue, n, sum_of(), ls_reals(y), ls_reals(x), ls_reals(y));
}

static void copy(ls_queue *queue, int64_t n, ls_operand x, ls_operand y)
{
    map_all(queue, n, same_as(), x, x, y);
}

__global__ static void divide_each(int64_t n, const double *sums, double by, ls_real *y)
{
    LS_EACH(i, n)
    y[i] = (ls_real)(sums[i] / by);
}

static void divide(ls_queue *queue, int64_t n, const double *sums, double by, ls_real *y)
{
    if (n > 0) LS_LAUNCH(queue, divide_each, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, sums, by, y);
}

template <typename T> __global__ static void clear(int64_t n, T *x)
{
    LS_EACH(i, n)
    x[i] = T();
}

struct alignas(16) sixteen_bytes {
    uint32_t word[4];
};

static void zero(ls_queue *queue, size_t bytes, void *x)
{
    if (bytes == 0) return;
    if (uintptr_t(x) % sizeof(sixteen_bytes) == 0 && bytes % sizeof(sixteen_bytes) == 0) {
        const int64_t n = (int64_t)(bytes / sizeof(sixteen_bytes));
        LS_LAUNCH(queue, clear<sixteen_bytes>, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n,
                  static_cast<sixteen_bytes *>(x));
    } else {
        LS_LAUNCH(queue, clear<unsigned char>, ls_blocks((int64_t)bytes, LS_THREADS), LS_THREADS, 0, (int64_t)bytes,
                  static_cast<unsigned char *>(x));
    }
}

/* ------------------------------------------------------------------------------------------------ sums over rows */

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

static void column_sums(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, ls_real *sum)
{
    sum_all(queue, rows, n, x, sum, ls_reals(NULL));
}

static void sum_and_copy(ls_queue *queue, int64_t rows, int64_t n, const ls_real *x, ls_real *sum, ls_operand y)
{
    sum_all(queue, rows, n, ls_reals(x), sum, y);
}

/* ------------------------------------------------------------------------------------------------ linear */

/* y (rows, W columns) = b in every row */
template <int W> __global__ static void fill_rows(int64_t rows, int64_t columns, const ls_real *b, ls_real *y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    const ls_few<W> value = load<W>(b, j);
    for (int64_t r = my_row(); r < rows; r += row_step()) store<W>(y, r * columns + j, value);
}

static void start_with(ls_queue *queue, int64_t rows, int64_t n, const ls_real *b, ls_real *y)
{
    if (b == NULL) return;
    const int w = wide(n, b, y) ? 4 : 1;
    const auto kernel = w == 4 ? fill_rows<4> : fill_rows<1>;
    LS_LAUNCH(queue, kernel, blocks_over(rows, n / w, ROWS_EACH, 1), threads_over(n / w), 0, rows, n / w, b, y);
}

static void linear(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w, const ls_real *b,
                   ls_operand y)
{
    if (rows <= 0) return;
    start_with(queue, rows, out, b, static_cast<ls_real *>(y.p));
    ls_gemm_operands(queue, 0, 1, rows, out, in, x, in, w, in, b ? 1 : 0, y, out);
}

static void linear_exact(ls_queue *queue, int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w,
                         const ls_real *b, ls_real *y)
{
    if (rows <= 0) return;
    start_with(queue, rows, out, b, y);
    ls_gemm_batch_exact(queue, 0, 1, rows, out, in, 1, x, in, 0, w, in, 0, b ? 1 : 0, y, out, 0, 1);
}

/* A block makes 64 × 64 of y, a thread 4 × 4 of those. Whatever stands in the other rows, an element is the sum of its
 * products in the order of `in`, one by one. */
constexpr int SIDE = 64, DEPTH = 16, PADDED_SIDE = SIDE + 4;

__device__ static void fetch_tile(int64_t first, int64_t rows, int64_t at, int64_t in, const ls_real *from,
                                  ls_real (*to)[PADDED_SIDE])
{
    for (int i = (int)threadIdx.x; i < SIDE * DEPTH; i += LS_THREADS) {
        const int64_t r = first + i / DEPTH, k = at + i % DEPTH;
        to[i % DEPTH][i / DEPTH] = r < rows && k < in ? from[r * in + k] : 0;
    }
}

__global__ static void product_alike(int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w,
                                     const ls_real *b, ls_real *y)
{
    __shared__ __align__(32) ls_real xs[DEPTH][PADDED_SIDE], ws[DEPTH][PADDED_SIDE];
    const int64_t first = (int64_t)blockIdx.x * SIDE, begin = (int64_t)blockIdx.y * SIDE;
    const int row = (int)threadIdx.x / 16 * 4, column = (int)threadIdx.x % 16 * 4;
    ls_real sum[4][4] = {{0}};
    for (int64_t at = 0; at < in; at += DEPTH) {
        fetch_tile(first, rows, at, in, x, xs);
        fetch_tile(begin, out, at, in, w, ws);
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
            const ls_four a = load<4>(xs[k] + row, 0), c = load<4>(ws[k] + column, 0);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sum[i][j] += a.v[i] * c.v[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const int64_t r = first + row + i, o = begin + column + j;
            if (r < rows && o < out) y[r * out + o] = sum[i][j] + (b ? b[o] : 0);
        }
}

static void linear_alike(ls_queue *queue, int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w,
                         const ls_real *b, ls_real *y)
{
    if (rows <= 0) return;
    const dim3 blocks((unsigned)((rows + SIDE - 1) / SIDE), (unsigned)((out + SIDE - 1) / SIDE));
    LS_LAUNCH(queue, product_alike, blocks, LS_THREADS, 0, rows, in, out, x, w, b, y);
}

static void linear_backward(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w,
                            ls_operand dy, ls_operand dx, int accumulate_dx, ls_real *dw)
{
    if (rows <= 0) return;
    if (dw) ls_gemm_operands(queue, 1, 0, out, in, rows, dy, out, x, in, 1, ls_reals(dw), in);
    if (dx.p) ls_gemm_operands(queue, 0, 0, rows, in, out, dy, out, w, in, accumulate_dx ? 1 : 0, dx, in);
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

static void layer_norm(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b,
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

static void layer_norm_backward(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                                const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx,
                                int accumulate_dx, ls_real *dw, ls_real *db)
{
    if (rows <= 0) return;
    const int few = wide(E, x, w, dy, dx) ? 4 : 1;
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

/* ------------------------------------------------------------------------------------------------ embedding */

template <int W>
__global__ static void embed(int64_t rows, int64_t E, const int32_t *token, const ls_real *table, ls_real a, ls_real *y)
{
    LS_EACH_ROW(r, rows)
    {
        const int64_t v = token[r];
        LS_EACH_LANE(j, E / W)
        {
            ls_few<W> out = v < 0 ? ls_few<W>() : load<W>(table + v * E, j);
            for (int k = 0; k < W; k++) out.v[k] *= a;
            store<W>(y + r * E, j, out);
        }
    }
}

static void embedding(ls_queue *queue, int64_t rows, int64_t E, const int32_t *token, const ls_real *table,
                      double scale, ls_real *y)
{
    if (rows <= 0) return;
    const auto kernel = wide(E, table, y) ? embed<4> : embed<1>;
    LS_LAUNCH(queue, kernel, ls_row_blocks(rows), LS_THREADS, 0, rows, E, token, table, (ls_real)scale, y);
}

constexpr int TOKENS = 4096, WARPS = LS_THREADS / LS_WARP;

/* The place of this thread's first item in a list to which every thread of the block gives n, and the length of it. */
__device__ static int place_of(int n, int *scratch, int *length)
{
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    int before = n; /* of this warp, this thread included */
    for (int step = 1; step < LS_WARP; step *= 2) {
        const int other = __shfl_sync(0xffffffffu, before, lane >= step ? lane - step : lane);
        if (lane >= step) before += other;
    }
    if (lane == LS_WARP - 1) scratch[warp] = before;
    __syncthreads();
    int place = before - n;
    *length = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) place += scratch[i];
        *length += scratch[i];
    }
    return place;
}

/* Block (v, c) has 32 W columns of row v of the table. It looks through all tokens, a few thousand at a time, and its
 * warps take the rows that it found in turn. */
template <int W>
__global__ static void embed_backward(int64_t rows, int64_t E, const int32_t *token, ls_real a, const ls_real *dy,
                                      ls_real *dtable)
{
    __shared__ uint16_t found[TOKENS];
    __shared__ int scratch[WARPS];
    __shared__ double part[WARPS][LS_WARP * W];
    constexpr int DEEP = 4, EACH = TOKENS / LS_THREADS;
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    const int64_t v = blockIdx.x, column = ((int64_t)blockIdx.y * LS_WARP + lane) * W;
    double acc[W] = {0};
    for (int64_t first = 0; first < rows; first += TOKENS) {
        int mine = 0, length;
        unsigned hits = 0;
        for (int k = 0; k < EACH; k++) {
            const int64_t r = first + k * LS_THREADS + threadIdx.x;
            const int hit = r < rows && token[r] == v;
            hits |= (unsigned)hit << k;
            mine += hit;
        }
        int place = place_of(mine, scratch, &length);
        for (int k = 0; k < EACH; k++)
            if (hits >> k & 1) found[place++] = (uint16_t)(k * LS_THREADS + (int)threadIdx.x);
        __syncthreads();
        for (int i = warp; i < length && column < E; i += DEEP * WARPS) {
            ls_few<W> at[DEEP];
            for (int u = 0; u < DEEP; u++) {
                const int item = i + u * WARPS;
                at[u] = item < length ? load<W>(dy, ((first + found[item]) * E + column) / W) : ls_few<W>();
            }
            for (int u = 0; u < DEEP; u++)
                for (int k = 0; k < W; k++) acc[k] += (double)at[u].v[k];
        }
        __syncthreads(); /* before the list and scratch are written again */
    }
    for (int k = 0; k < W; k++) part[warp][lane * W + k] = acc[k];
    __syncthreads();
    if (warp > 0 || column >= E) return;
    for (int k = 0; k < W; k++) {
        double total = 0;
        for (int i = 0; i < WARPS; i++) total += part[i][lane * W + k];
        dtable[v * E + column + k] += (ls_real)((double)a * total);
    }
}

static void embedding_backward(ls_queue *queue, int64_t rows, int64_t V, int64_t E, const int32_t *token, double scale,
                               const ls_real *dy, ls_real *dtable)
{
    if (rows <= 0) return;
    const int w = wide(E, dy) ? 4 : 1;
    const dim3 blocks((unsigned)V, (unsigned)((E + LS_WARP * w - 1) / (LS_WARP * w)));
    const auto kernel = w == 4 ? embed_backward<4> : embed_backward<1>;
    LS_LAUNCH(queue, kernel, blocks, LS_THREADS, 0, rows, E, token, (ls_real)scale, dy, dtable);
}

/* ------------------------------------------------------------------------------------------------ positions */

constexpr int ANCHOR = 64;

/* As on the CPU: a thread walks from a global multiple of ANCHOR to the next, with one frequency, by rotations in
 * double. So a row's value is the same wherever the piece that holds it begins. Each sequence is walked along by its
 * own threads: the rotations are few beside what they wait for memory. */
__global__ static void positions(int64_t B, int64_t T, int64_t E, int64_t lo, int64_t anchor, int64_t walks, ls_real *x)
{
    const int64_t half = E / 2;
    LS_EACH(k, walks * half)
    {
        const int64_t i = k % half, from = anchor + k / half * ANCHOR, end = ls_min(from + ANCHOR, lo + T);
        const double f = pow(10000.0, -2 * (double)i / (double)E), sin_f = sin(f), cos_f = cos(f);
        double s = sin((double)from * f), c = cos((double)from * f);
        for (int64_t p = from; p < end; p++) {
            for (int64_t b = blockIdx.y; b < B && p >= lo; b += gridDim.y) {
                ls_real *row = x + (b * T + p - lo) * E;
                row[i] += (ls_real)s;
                row[half + i] += (ls_real)c;
            }
            const double old = s;
            s = old * cos_f + c * sin_f;
            c = c * cos_f - old * sin_f;
        }
    }
}

static void add_positions(ls_queue *queue, int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x)
{
    const int64_t anchor = lo - lo % ANCHOR, walks = (lo + T - anchor + ANCHOR - 1) / ANCHOR;
    if (B <= 0 || T <= 0 || E < 2) return;
    const dim3 blocks((unsigned)ls_blocks(walks * (E / 2), LS_THREADS), (unsigned)ls_min(B, 65535));
    LS_LAUNCH(queue, positions, blocks, LS_THREADS, 0, B, T, E, lo, anchor, walks, x);
}

/* ------------------------------------------------------------------------------------------------ dropout */

/* y = onto + drop(x + b); b, onto NULL: 0. A thread has the eight elements of one counter: see dense.c for which bits
 * are whose. */
template <int W>
__global__ static void drop_some(int64_t B, int64_t T, int64_t E, uint32_t drop, ls_real kept, ls_drop d,
                                 const ls_real *x, const ls_real *b, const ls_real *onto, ls_operand y)
{
    const int64_t counters = (E + 7) / 8, counter = my_item();
    if (counter >= counters) return;
    for (int64_t s = blockIdx.z; s < B; s += gridDim.z)
        for (int64_t t = my_row(); t < T; t += row_step()) {
            uint32_t word[4] = {0};
            if (drop > 0)
                ls_random4_inline(d.seed, d.stream, (uint32_t)(d.sample + (uint64_t)s),
                                  (uint64_t)((d.lo + t) * counters + counter), word);
            for (int j = 0; j < 8; j += W) {
                const int64_t e = counter * 8 + j;
                if (e >= E) break;
                const int64_t item = ((s * T + t) * E + e) / W;
                const ls_few<W> at = load<W>(x, item), added = b ? load<W>(b, e / W) : ls_few<W>();
                ls_few<W> out = onto ? load<W>(onto, item) : ls_few<W>();
                for (int k = 0; k < W; k++) {
                    const uint32_t bits = word[(j + k) / 2] >> (j + k) % 2 * 16 & 0xffff;
                    out.v[k] += bits < drop ? 0 : (at.v[k] + added.v[k]) * kept;
                }
                store<W>(y, item, out);
            }
        }
}

static void drop_rows(ls_queue *queue, int64_t B, int64_t T, int64_t E, const ls_drop &d, const ls_real *x,
                      const ls_real *b, const ls_real *onto, const ls_operand &y)
{
    const uint32_t drop = (uint32_t)(d.rate * 65536 + 0.5);
    if (B <= 0 || T <= 0) return;
    const ls_real kept = drop < 65536 ? (ls_real)(65536.0 / (65536.0 - drop)) : 0;
    const auto kernel = wide(E, x, b, onto, y) ? drop_some<4> : drop_some<1>; /* NULL lies well, too */
    const int64_t counters = (E + 7) / 8;
    LS_LAUNCH(queue, kernel, blocks_over(T, counters, 1, B), threads_over(counters), 0, B, T, E, drop, kept, d, x, b,
              onto, y);
}

static void dropout(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *x, ls_operand y)
{
    if (drop.rate > 0 || y.p != x) drop_rows(queue, B, T, E, drop, x, NULL, NULL, y);
}

static void residual(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *branch,
                     const ls_real *b, const ls_real *x, ls_real *y)
{
    drop_rows(queue, B, T, E, drop, branch, b, x, ls_reals(y));
}

/* ------------------------------------------------------------------------------------------------ cross-entropy */

constexpr int MOST_PARTS = (LS_LOSS_SUMS - 2) / 2;

/* See loss.c for the formula. part (blocks, 2): the sums of each block's rows. dlogits may be logits. */
__global__ static void loss_rows(int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                                 double smoothing, double grad_scale, ls_real *dlogits, double *part)
{
    __shared__ double scratch[LS_WARP];
    double total = 0, total_nll = 0; /* of lane 0's rows */
    LS_EACH_ROW(r, rows)
    {
        const ls_real *l = logits + r * V;
        ls_real *dl = dlogits ? dlogits + r * V : NULL;
        const int64_t label = target[r];
        if (label < 0) {
            LS_EACH_LANE(v, dl ? V : 0)
            dl[v] = 0;
            continue;
        }
        const double at_label = (double)l[label];
        ls_real m = -INFINITY;
        double all = 0, z = 0;
        LS_EACH_LANE(v, V)
        {
            m = l[v] > m ? l[v] : m; /* NaN loses every comparison; the exps let it through */
            all += (double)l[v];
        }
        m = ls_warp_max(m);
        const double mean = ls_warp_sum(all) / (double)V;
        __syncwarp(); /* every lane has read the label's logit before it is overwritten */
        LS_EACH_LANE(v, V)
        {
            const ls_real e = ls_exp(l[v] - m);
            if (dl) dl[v] = e;
            z += (double)e;
        }
        z = ls_warp_sum(z);
        const double log_z = (double)m + log(z);
        if (threadIdx.x % LS_WARP == 0) {
            total_nll += log_z - at_label;
            total += (1 - smoothing) * (log_z - at_label) + (smoothing > 0 ? smoothing * (log_z - mean) : 0);
        }
        const ls_real a = (ls_real)(grad_scale / z), c = (ls_real)(grad_scale * smoothing / (double)V);
        LS_EACH_LANE(v, dl ? V : 0)
        dl[v] = a * dl[v] - c - (v == label ? (ls_real)(grad_scale * (1 - smoothing)) : 0);
    }
    total = ls_block_sum(total, scratch);
    total_nll = ls_block_sum(total_nll, scratch);
    if (threadIdx.x == 0) part[2 * blockIdx.x] = total, part[2 * blockIdx.x + 1] = total_nll;
}

__global__ static void add_losses(int parts, double *sums)
{
    __shared__ double scratch[LS_WARP];
    double total = 0, total_nll = 0;
    for (int i = (int)threadIdx.x; i < parts; i += (int)blockDim.x)
        total += sums[2 + 2 * i], total_nll += sums[3 + 2 * i];
    total = ls_block_sum(total, scratch);
    total_nll = ls_block_sum(total_nll, scratch);
    if (threadIdx.x == 0) sums[0] += total, sums[1] += total_nll;
}

static void cross_entropy(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                          double smoothing, double grad_scale, ls_real *dlogits, double *sums)
{
    if (rows <= 0) return;
    const int parts = (int)ls_min(ls_row_blocks(rows), MOST_PARTS);
    LS_LAUNCH(queue, loss_rows, parts, LS_THREADS, 0, rows, V, logits, target, smoothing, grad_scale, dlogits,
              sums + 2);
    LS_LAUNCH(queue, add_losses, 1, LS_THREADS, 0, parts, sums);
}

/* ------------------------------------------------------------------------------------------------ rows */

/* What nothing is added to is copied bit for bit. */
template <int W>
__global__ static void zero_some(int64_t B, int64_t T, int64_t columns, int batch_first, const uint8_t *pad,
                                 const ls_real *x, const ls_real *bias, ls_operand y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    const ls_few<W> more = bias == NULL ? ls_few<W>() : load<W>(bias, j);
    for (int64_t b = blockIdx.z; b < B; b += gridDim.z)
        for (int64_t t = my_row(); t < T; t += row_step()) {
            const bool padded = pad != NULL && pad[b * T + t];
            if (!padded && x == y.p && bias == NULL) continue;
            const int64_t i = (batch_first ? b * T + t : t * B + b) * columns + j;
            ls_few<W> at = padded ? ls_few<W>() : load<W>(x, i);
            if (!padded && bias != NULL)
                for (int k = 0; k < W; k++) at.v[k] += more.v[k];
            store<W>(y, i, at);
        }
}

static void zero_rows(ls_queue *queue, int64_t B, int64_t T, int64_t E, int batch_first, const uint8_t *pad,
                      const ls_real *x, const ls_real *bias, ls_operand y)
{
    if (B <= 0 || T <= 0) return;
    const int w = wide(E, x, bias, y) ? 4 : 1;
    const auto kernel = w == 4 ? zero_some<4> : zero_some<1>;
    LS_LAUNCH(queue, kernel, blocks_over(T, E / w, ROWS_EACH, B), threads_over(E / w), 0, B, T, E / w, batch_first, pad,
              x, bias, y);
}

template <int W>
__global__ static void round_some(int64_t rows, int64_t columns, const ls_real *b, ls_real *x, ls_operand y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    const ls_few<W> added = b ? load<W>(b, j) : ls_few<W>();
    for (int64_t r = my_row(); r < rows; r += row_step()) {
        const int64_t i = r * columns + j;
        ls_few<W> at = load<W>(x, i);
        for (int k = 0; k < W; k++) at.v[k] = __bfloat162float(__float2bfloat16((float)(at.v[k] + added.v[k])));
        store<W>(y, i, at);
        store<W>(x, i, at);
    }
}

static void add_and_round(ls_queue *queue, int64_t rows, int64_t n, const ls_real *b, ls_real *x, ls_operand y)
{
    if (rows <= 0) return;
    const int w = wide(n, b, x, y) ? 4 : 1;
    const auto kernel = w == 4 ? round_some<4> : round_some<1>;
    LS_LAUNCH(queue, kernel, blocks_over(rows, n / w, ROWS_EACH, 1), threads_over(n / w), 0, rows, n / w, b, x, y);
}

extern "C" const ls_dense_ops ls_dense_cuda = {.linear = linear,
                                               .linear_alike = linear_alike,
                                               .linear_exact = linear_exact,
                                               .linear_backward = linear_backward,
                                               .column_sums = column_sums,
                                               .sum_and_copy = sum_and_copy,
                                               .layer_norm = layer_norm,
                                               .layer_norm_backward = layer_norm_backward,
                                               .gelu = gelu,
                                               .gelu_backward = gelu_backward,
                                               .relu = relu,
                                               .relu_backward = relu_backward,
                                               .embedding = embedding,
                                               .embedding_backward = embedding_backward,
                                               .add_positions = add_positions,
                                               .dropout = dropout,
                                               .residual = residual,
                                               .cross_entropy = cross_entropy,
                                               .zero_rows = zero_rows,
                                               .add_and_round = add_and_round,
                                               .add = add,
                                               .copy = copy,
                                               .divide = divide,
                                               .zero = zero};
