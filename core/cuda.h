/* What .cu files share: the queue, the door to cuBLAS, and small device functions. Included first by every .cu file.
 *
 * Rules for kernels.
 *   - The host never reads or writes device memory: not in plan(), not between launches. What a kernel needs of the
 *     host's structs (views, spans, monoids) it gets by value, as arguments.
 *   - Results must not depend on the order in which blocks run: no atomics on numbers that are sums.
 *   - Work is queued on q->stream and not waited for. Errors of launches come to light in ls_launched, at the end of
 * each phase.
 *   - Sums over more than a few terms of which small differences matter are kept in double, as on the CPU. */
#ifndef LS_CUDA_H
#define LS_CUDA_H

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_launch.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

extern "C" {
#include "device.h"
#include "real.h"
}

struct ls_queue {
    cudaStream_t stream;
    cublasHandle_t blas;
    int device;
    ls_precision precision; /* what operands of products are rounded to */
    size_t most_shared;     /* of shared memory that a block may ask for, in bytes */
    void *narrow;           /* LS_BF16: LS_NARROW_BYTES for their copies in bfloat16, of the product under way */
    void *parts;            /* LS_PARTS_BYTES for the parts of a sum over rows under way, see kernels/dense_sums.cu */
    ls_status status;       /* what failed first, since it was last asked; its sentence is `message` */
    char message[256];
    cudaEvent_t end;          /* of what was given, for a wait that is watched */
    struct ls_bounce *bounce; /* host memory that copies to the device pass through, see core/device_cuda.cu */
};

/* Starts a kernel. blocks, threads: int or dim3; shared: bytes of dynamic shared memory, which the kernel sees through
 * LS_SHARED. What a block of this device cannot have is not started, and ls_launched tells. */
#define LS_LAUNCH(queue, kernel, blocks, threads, shared, ...)                                                         \
    do {                                                                                                               \
        if (ls_may_share((queue), (kernel), #kernel, (size_t)(shared)))                                                \
            LS_START(queue, kernel, blocks, threads, shared, __VA_ARGS__);                                             \
    } while (0)

/* A block has up to 48 KiB of shared memory unasked, of which 8 are left for what is static in a kernel. */
enum { LS_SHARED_UNASKED = 40 << 10 };
/* Whether a block of this device may have so much, beside 8 KiB. */
static inline int ls_has_shared(const ls_queue *q, size_t bytes)
{
    return bytes + ((size_t)8 << 10) <= q->most_shared;
}
/* Asks that a block of the kernel may have so much. 0: the device has not so much, which the queue keeps. */
int ls_ask_shared(ls_queue *q, const void *kernel, const char *name, size_t bytes);
template <typename... P>
static inline int ls_may_share(ls_queue *q, void (*kernel)(P...), const char *name, size_t bytes)
{
    return bytes <= LS_SHARED_UNASKED || ls_ask_shared(q, reinterpret_cast<const void *>(kernel), name, bytes);
}

/* To be returned by whatever launched kernels or products: LS_OK, or what failed. `what`: e.g. "abc: sums". */
ls_status ls_launched(ls_queue *q, const char *what);

/* A block of this many rows and columns of each operand fits in a queue's memory for bfloat16. A multiple of 8; the
 * tests make it small, so that their products are cut as large ones are. */
#ifndef LS_NARROW_SIDE
#define LS_NARROW_SIDE 4096
#endif
#define LS_NARROW_BYTES ((size_t)2 * LS_NARROW_SIDE * LS_NARROW_SIDE * 2)

/* Sums over rows: so many blocks make parts of them at a time, which fills a large GPU, each of two sums for each of up
 * to so many columns. */
enum { LS_SUM_BLOCKS = 512, LS_SUM_COLUMNS = 128 };
#define LS_PARTS_BYTES (sizeof(double) * 2 * LS_SUM_BLOCKS * LS_SUM_COLUMNS)

/* A batch of products on row-major matrices: C_i (m,n) = alpha op(A_i) op(B_i) + beta C_i, matrix i at x + i *
 * stride_x. A stride of 0 shares the matrix (not of C). beta = 0 overwrites. Sizes of 0 are fine. Operands are rounded
 * as the queue's precision says. */
void ls_gemm_batch(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b, int64_t ldb, int64_t stride_b,
                   double beta, ls_real *c, int64_t ldc, int64_t stride_c, int64_t batch);
/* One product, C (m,n) = op(A) op(B) + beta C, of matrices that may lie in bfloat16, on a queue that rounds to it. */
void ls_gemm_operands(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, ls_operand a,
                      int64_t lda, ls_operand b, int64_t ldb, double beta, ls_operand c, int64_t ldc);
/* One for each (b,h): the matrices are the rows of views, of which [0, m) or so are used. */
void ls_gemm_heads(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   ls_view a, ls_view b, double beta, ls_view c, int64_t B, int64_t H);
/* The same in another precision than the queue's, and no coarser: for products that are exponents, or of which
 * differences remain. */
void ls_gemm_batch_in(ls_queue *q, ls_precision precision, int transpose_a, int transpose_b, int64_t m, int64_t n,
                      int64_t k, double alpha, const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b,
                      int64_t ldb, int64_t stride_b, double beta, ls_real *c, int64_t ldc, int64_t stride_c,
                      int64_t batch);
/* The same as ls_gemm_batch in double, for small matrices whose products would amplify the rounding of floats. */
void ls_gemm_batch_double(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                          const double *a, int64_t lda, int64_t stride_a, const double *b, int64_t ldb,
                          int64_t stride_b, double beta, double *c, int64_t ldc, int64_t stride_c, int64_t batch);

/* Blocks of `threads` that cover n things, and the loop of one thread over its things. */
static inline int ls_blocks(int64_t n, int threads)
{
    const int64_t blocks = (n + threads - 1) / threads;
    return blocks < 1 ? 1 : blocks > 65535 ? 65535 : (int)blocks;
}
#define LS_EACH(i, n)                                                                                                  \
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (int64_t)gridDim.x * blockDim.x)
enum { LS_THREADS = 256, LS_WARP = 32 };

/* Rows R < n, one for each warp of the grid, and the numbers e < n of a row, by the lanes of the warp. */
#define LS_EACH_ROW(R, n)                                                                                              \
    for (int64_t R = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LS_WARP; R < (n);                              \
         R += (int64_t)gridDim.x * blockDim.x / LS_WARP)
#define LS_EACH_LANE(e, n) for (int64_t e = threadIdx.x % LS_WARP; e < (n); e += LS_WARP)

static inline int ls_row_blocks(int64_t rows)
{
    return ls_blocks(rows * LS_WARP, LS_THREADS);
}

/* How rows of views are walked along: blocks of LS_THREADS (heads, tiles of rows, B), and 2^bits neighbouring threads,
 * the lanes of a row, have a row: a warp has several short ones, and no thread divides to know where it stands. */
enum { LS_TILE_ROWS = 128 };
static inline dim3 ls_tile_blocks(int64_t B, int64_t H, int64_t rows)
{
    const int64_t tiles = (rows + LS_TILE_ROWS - 1) / LS_TILE_ROWS;
    return dim3((unsigned)ls_max(1, H), (unsigned)ls_max(1, ls_min(tiles, 65535)),
                (unsigned)ls_max(1, ls_min(B, 65535)));
}
/* For rows of so many items, of each of which a thread reads all at once: it gets two, since what it computes to find a
 * row is more than what it does there. */
static inline int ls_lane_bits(int64_t items)
{
    int bits = 0;
    while (1 << bits < LS_WARP && 2 << bits < items) bits++;
    return bits;
}
/* A thread's rows first, first + step, .. of a tile of (b,h), of which those before `end` exist; `times` is the same
 * for all threads of a warp. */
typedef struct ls_tile_rows {
    int64_t b, h, first, end;
    int step, times;
} ls_tile_rows;
template <typename F> __device__ static inline void ls_walk_tiles(int64_t B, int64_t rows, int bits, F f)
{
    const int mine = (int)threadIdx.x >> bits, step = LS_THREADS >> bits;
    const int times = mine < LS_TILE_ROWS ? (LS_TILE_ROWS + step - 1) >> (8 - bits) : 0;
    for (int64_t b = blockIdx.z; b < B; b += gridDim.z)
        for (int64_t t = (int64_t)blockIdx.y * LS_TILE_ROWS; t < rows; t += (int64_t)gridDim.y * LS_TILE_ROWS)
            f(ls_tile_rows{b, blockIdx.x, t + mine, ls_min(rows, t + LS_TILE_ROWS), step, times});
}

/* N numbers side by side, of which up to four are read at once, on a boundary of as many. */
template <int N> struct alignas((N < 4 ? N : 4) * sizeof(ls_real)) ls_few {
    ls_real v[N];
};
typedef ls_few<4> ls_four;
template <int N> __device__ static inline ls_few<N> ls_few_at(const ls_real *x)
{
    return *reinterpret_cast<const ls_few<N> *>(x);
}
template <int N> __device__ static inline void ls_put_few(ls_real *x, const ls_few<N> &value)
{
    *reinterpret_cast<ls_few<N> *>(x) = value;
}
/* The same in bfloat16, N = 1, 2, 4 or 8: as one word of memory, which structs of bfloat16 are not copied by. */
template <int N> struct ls_narrow_word {
    typedef uint4 type;
};
template <> struct ls_narrow_word<4> {
    typedef uint64_t type;
};
template <> struct ls_narrow_word<2> {
    typedef uint32_t type;
};
template <> struct ls_narrow_word<1> {
    typedef uint16_t type;
};
template <int N> __device__ static inline ls_few<N> ls_few_at(const __nv_bfloat16 *x)
{
    const auto word = *reinterpret_cast<const typename ls_narrow_word<N>::type *>(x);
    __nv_bfloat16 from[N];
    static_assert(sizeof from == sizeof word, "a word has all");
    memcpy(from, &word, sizeof word);
    ls_few<N> y;
    for (int k = 0; k < N; k++) y.v[k] = __bfloat162float(from[k]);
    return y;
}
template <int N> __device__ static inline void ls_put_few(__nv_bfloat16 *x, const ls_few<N> &value)
{
    typename ls_narrow_word<N>::type word;
    __nv_bfloat16 to[N];
    for (int k = 0; k + 1 < N; k += 2) { /* one instruction rounds two */
        const __nv_bfloat162 two = __floats2bfloat162_rn((float)value.v[k], (float)value.v[k + 1]);
        memcpy(to + k, &two, sizeof two);
    }
    if (N == 1) to[0] = __float2bfloat16((float)value.v[0]);
    memcpy(&word, to, sizeof word);
    *reinterpret_cast<typename ls_narrow_word<N>::type *>(x) = word;
}
__device__ static inline ls_four ls_four_at(const ls_real *x)
{
    return ls_few_at<4>(x);
}
LS_BOTH_SIDES int64_t ls_fours(int64_t n) /* n, so that what follows is on such a boundary */
{
    return (n + 3) / 4 * 4;
}
LS_BOTH_SIDES int ls_is_four(const ls_real *x)
{
    return (uintptr_t)x % sizeof(ls_four) == 0;
}

/* N numbers of a row of which only n are left; aligned: all can be read at once. What is not there is 0. */
template <int N> __device__ static inline ls_few<N> ls_read_some(const ls_real *from, int n, int aligned)
{
    ls_few<N> y = {};
    if (n >= N && aligned) return ls_few_at<N>(from);
    for (int k = 0; k < N && k < n; k++) y.v[k] = from[k];
    return y;
}
/* In one instruction, to memory of the device: the compiler would take the store of a struct apart where another way
 * writes its numbers one by one. */
__device__ static inline void ls_write_few(float *to, const float (&y)[4])
{
    __stwb(reinterpret_cast<float4 *>(to), make_float4(y[0], y[1], y[2], y[3]));
}
__device__ static inline void ls_write_few(float *to, const float (&y)[2])
{
    __stwb(reinterpret_cast<float2 *>(to), make_float2(y[0], y[1]));
}
template <typename T, int N> __device__ static inline void ls_write_few(T *to, const T (&y)[N])
{
    for (int k = 0; k < N; k++) to[k] = y[k];
}
/* N numbers of a row in memory of the device of which only n are left. */
template <int N> __device__ static inline void ls_write_some(const ls_few<N> &y, ls_real *to, int n, int aligned)
{
    if (n >= N && aligned)
        ls_write_few(to, y.v);
    else
        for (int k = 0; k < N && k < n; k++) to[k] = y.v[k];
}

/* Whether rows of a view, d numbers each, can be read by fours. */
static inline int ls_rows_are_fours(ls_view v, int64_t d)
{
    return ls_is_four(v.p) && (v.sb | v.sh | v.st | d) % 4 == 0;
}

/* x y, rounded before anything is added to it: for a product that two kernels must have alike. */
__device__ static inline float ls_multiply(float x, float y)
{
    return __fmul_rn(x, y);
}
__device__ static inline double ls_multiply(double x, double y)
{
    return __dmul_rn(x, y);
}

/* A warp as ROWS (2 or 4) rows of COLUMNS. Shared memory serves 16 lanes at once that read 16 bytes each, where all
 * lanes one apart, or all two apart, read the same, and 8 otherwise: so lanes one apart are of one column, and those
 * two apart of one row. Columns of a row are 2 lanes apart. */
template <int ROWS> struct ls_warp_grid {
    static constexpr int COLUMNS = LS_WARP / ROWS, APART = 2;
    static_assert(ROWS == 2 || ROWS == 4, "the first bit of a row is the lane's first, its second the lane's last");
    __device__ static inline int row()
    {
        return threadIdx.x % 2 + threadIdx.x / (LS_WARP / 2) % (ROWS / 2) * 2;
    }
    /* The rows of a block's warps one after another. */
    __device__ static inline int row_of_block()
    {
        return (int)threadIdx.x / LS_WARP * ROWS + row();
    }
    __device__ static inline int column()
    {
        return threadIdx.x / 2 % COLUMNS;
    }
};

/* The sum, the maximum over the 32 threads of a warp, or over `lanes` of them, a power of 2, that are `apart` from one
 * another; all of the warp call, and every thread gets it. */
template <typename T> __device__ static inline T ls_warp_sum(T x, int lanes = LS_WARP, int apart = 1)
{
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step * apart);
    return x;
}
template <typename T> __device__ static inline T ls_warp_max(T x, int lanes = LS_WARP, int apart = 1)
{
    for (int step = lanes / 2; step > 0; step /= 2) {
        const T y = __shfl_xor_sync(0xffffffffu, x, step * apart);
        x = y > x ? y : x;
    }
    return x;
}
/* The same over a block of at most 1024 threads, a multiple of 32; scratch: 32 numbers of shared memory, which may be
 * used again after the call. */
template <typename T> __device__ static inline T ls_block_sum(T x, T *scratch)
{
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    x = ls_warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = ls_warp_sum(lane < warps ? scratch[lane] : T(0));
    __syncthreads();
    return x;
}
template <typename T> __device__ static inline T ls_block_max(T x, T *scratch)
{
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    x = ls_warp_max(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = ls_warp_max(lane < warps ? scratch[lane] : scratch[0]);
    __syncthreads();
    return x;
}

#endif
