/* The dense layers on a GPU: the linear layers, which are products of cuBLAS, but linear_alike, whose rows must not
 * know how many they are; and what is done to each element, or to each row, alone. The rest is in files of its own, see
 * dense_cuda.h. */
#include "dense_cuda.h"

#include <cuda_mma.h>

/* An instruction for each, where the exact ones take twenty. What the exponent loses by its second rounding is what it
 * has lost by that of x². */
#define LS_NORMAL_SIDES __device__ static inline
#define LS_NORMAL_EXP(s) ls_exp2(-0.72134752f * (s))
#define LS_NORMAL_INVERSE(x) ls_inverse(x)

extern "C" {
#include "erf.h"
}

#include "rng_inline.h"

using namespace ls_dense;

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

/* ------------------------------------------------------------------------------------------------ linear */

/* y (rows, W columns) = b in every row */
template <int W> __global__ static void fill_rows(int64_t rows, int64_t columns, const ls_real *b, ls_operand y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    const ls_few<W> value = load<W>(b, j);
    for (int64_t r = my_row(); r < rows; r += row_step()) store<W>(y, r * columns + j, value);
}

static void start_with(ls_queue *queue, int64_t rows, int64_t n, const ls_real *b, ls_operand y)
{
    if (b == NULL) return;
    const int w = width(n, b, y);
    const auto kernel = w == 8 ? fill_rows<8> : w == 4 ? fill_rows<4> : fill_rows<1>;
    LS_LAUNCH(queue, kernel, blocks_over(rows, n / w, ROWS_EACH, 1), threads_over(n / w), 0, rows, n / w, b, y);
}

static void linear(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w, const ls_real *b,
                   ls_operand y)
{
    if (rows <= 0) return;
    start_with(queue, rows, out, b, y);
    ls_gemm_operands(queue, 0, 1, rows, out, in, x, in, w, in, b ? 1 : 0, y, out);
}

static void linear_in(ls_queue *queue, ls_precision precision, int64_t rows, int64_t in, int64_t out, const ls_real *x,
                      const ls_real *w, const ls_real *b, ls_real *y)
{
    if (rows <= 0) return;
    start_with(queue, rows, out, b, ls_reals(y));
    ls_gemm_batch_in(queue, precision, 0, 1, rows, out, in, 1, x, in, 0, w, in, 0, b ? 1 : 0, y, out, 0, 1);
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
    typedef ls_warp_grid<2> grid;
    const int row = grid::row_of_block() * 4, column = grid::column() * 4;
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

/* ------------------------------------------------------------------------------------------------ rows */

template <int W>
__global__ static void zero_some(int64_t B, int64_t T, int64_t columns, int batch_first, const uint8_t *pad,
                                 const ls_real *x, ls_operand y)
{
    const int64_t j = my_item();
    if (j >= columns) return;
    for (int64_t b = blockIdx.z; b < B; b += gridDim.z)
        for (int64_t t = my_row(); t < T; t += row_step()) {
            const bool padded = pad != NULL && pad[b * T + t];
            if (!padded && x == y.p) continue;
            const int64_t i = (batch_first ? b * T + t : t * B + b) * columns + j;
            store<W>(y, i, padded ? ls_few<W>() : load<W>(x, i));
        }
}

static void zero_rows(ls_queue *queue, int64_t B, int64_t T, int64_t E, int batch_first, const uint8_t *pad,
                      const ls_real *x, ls_operand y)
{
    if (B <= 0 || T <= 0) return;
    const int w = wide(E, x, y) ? 4 : 1;
    const auto kernel = w == 4 ? zero_some<4> : zero_some<1>;
    LS_LAUNCH(queue, kernel, blocks_over(T, E / w, ROWS_EACH, B), threads_over(E / w), 0, B, T, E / w, batch_first, pad,
              x, y);
}

extern "C" const ls_dense_ops ls_dense_cuda = {.linear = linear,
                                               .linear_alike = linear_alike,
                                               .linear_in = linear_in,
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
                                               .add = add,
                                               .copy = copy,
                                               .divide = divide,
                                               .zero = zero};
