/* The steps are those of pinv.h, in two ways.
 *
 * A matrix of few rows belongs to one block of threads, which makes all iterations in one kernel: three matrices lie in
 * shared memory, filled up with zeros to 16 T rows and columns, and each of 16 x 16 threads makes T x T elements of a
 * product in registers. Zeros stay zeros in all products that have Z or a gradient for a factor, so that no step asks
 * for m.
 *
 * Larger ones are products of the whole batch through the door to cuBLAS; what stands between them is elementwise. */
#include "cuda.h"
#include "pinv_cuda.h"

/* ------------------------------------------------------------------------------------------------ in a block */

/* Threads along a side of a matrix; matrices in shared memory. */
enum { SIDE = 16, HELD = 3, THREADS = SIDE * SIDE };

/* A thread's elements are (ROW + 16 i, COLUMN + 16 j). */
typedef ls_warp_grid<2> grid;
#define ROW grid::row_of_block()
#define COLUMN grid::column()
#define EACH_OWN(i, j, T)                                                                                              \
    _Pragma("unroll") for (int i = 0; i < (T); i++) _Pragma("unroll") for (int j = 0; j < (T); j++)

/* In shared memory (r,c) stands at r 16 T + (c xor r mod 16): neither a row nor a column of 16 meets a bank twice.
 * Here: an element of the thread, and that across the diagonal. */
template <int T> __device__ static inline double &own(double *M, int i, int j)
{
    return M[(ROW + SIDE * i) * T * SIDE + SIDE * j + (COLUMN ^ ROW)];
}
template <int T> __device__ static inline double across(const double *M, int i, int j)
{
    return M[(COLUMN + SIDE * j) * T * SIDE + SIDE * i + (COLUMN ^ ROW)];
}

/* x += A B, or Aᵀ B. */
template <int T, bool TRANSPOSE>
__device__ static inline void multiply_add(const double *A, const double *B, double (&x)[T][T])
{
    constexpr int N = T * SIDE;
    for (int k = 0; k < N; k += SIDE)
#pragma unroll
        for (int l = 0; l < SIDE; l++) {
            const double *left = A + (TRANSPOSE ? (k + l) * N : ROW * N + k) + (ROW ^ l);
            const double *right = B + (k + l) * N + (COLUMN ^ l);
            double a[T], b[T];
#pragma unroll
            for (int i = 0; i < T; i++) a[i] = left[(TRANSPOSE ? SIDE : SIDE * N) * i];
#pragma unroll
            for (int j = 0; j < T; j++) b[j] = right[SIDE * j];
            EACH_OWN(i, j, T) x[i][j] += a[i] * b[j];
        }
}
template <int T, bool TRANSPOSE>
__device__ static inline void multiply(const double *A, const double *B, double (&x)[T][T])
{
    EACH_OWN(i, j, T) x[i][j] = 0;
    multiply_add<T, TRANSPOSE>(A, B, x);
}

template <int T> __device__ static inline void put(const double (&x)[T][T], double *M)
{
    EACH_OWN(i, j, T) own<T>(M, i, j) = x[i][j];
}

/* The thread's elements of a matrix (m,m) in global memory, and back. */
template <int T> __device__ static inline void take(int m, const double *from, double (&x)[T][T])
{
    EACH_OWN(i, j, T)
    {
        const int r = ROW + SIDE * i, c = COLUMN + SIDE * j;
        x[i][j] = r < m && c < m ? from[r * m + c] : 0;
    }
}
template <int T> __device__ static inline void load(int m, const double *from, double *M)
{
    double x[T][T];
    take<T>(m, from, x);
    put<T>(x, M);
}
template <int T> __device__ static inline void store(int m, const double (&x)[T][T], double *to)
{
    EACH_OWN(i, j, T)
    {
        const int r = ROW + SIDE * i, c = COLUMN + SIDE * j;
        if (r < m && c < m) to[r * m + c] = x[i][j];
    }
}

/* Y becomes A Z; S, where A is, W. All threads call, and must wait before any reads W or writes Z. */
template <int T> __device__ static inline void look_inside(double *A, const double *Z, double *Y)
{
    double *const S = A, *const W = A;
    double x[T][T];
    multiply<T, false>(A, Z, x);
    put<T>(x, Y);
    __syncthreads();
    multiply<T, false>(Y, Y, x);
    put<T>(x, S);
    __syncthreads();
    multiply<T, false>(Y, S, x);
    EACH_OWN(i, j, T)
    {
        const double unit = ROW + SIDE * i == COLUMN + SIDE * j ? 13 : 0;
        x[i][j] = unit - 15 * own<T>(Y, i, j) + 7 * own<T>(S, i, j) - x[i][j];
    }
    __syncthreads();
    put<T>(x, W);
}

/* One block to a matrix. */
template <int T>
static __global__ void __launch_bounds__(THREADS, 2)
    invert(int m, int iterations, const double *A, const double *peak, double *Z)
{
    LS_SHARED(double, memory);
    constexpr int ALL = T * SIDE * T * SIDE;
    double *const inverse = memory, *const Y = memory + ALL, *const W = memory + 2 * ALL;
    const int64_t step = (int64_t)gridDim.x * m * m;
    const double scale = 1 / peak[blockIdx.x];
    double x[T][T];
    A += (int64_t)blockIdx.x * m * m;
    Z += (int64_t)blockIdx.x * m * m;
    load<T>(m, A, W);
    __syncthreads();
    EACH_OWN(i, j, T) x[i][j] = scale * across<T>(W, i, j);
    put<T>(x, inverse);
    store<T>(m, x, Z);
    for (int t = 0; t < iterations; t++) {
        if (t > 0) load<T>(m, A, W);
        __syncthreads();
        look_inside<T>(W, inverse, Y);
        __syncthreads();
        multiply<T, false>(inverse, W, x);
        EACH_OWN(i, j, T) x[i][j] /= 4;
        __syncthreads();
        put<T>(x, inverse);
        store<T>(m, x, Z += step);
    }
}

/* The same. Since E is symmetric, Z E is dAᵀ, of which no factor has to be transposed. */
template <int T>
static __global__ void __launch_bounds__(THREADS)
    invert_backward(int m, int iterations, const double *A, const double *peak, const double *Z, const double *dZ,
                    double *dA, double *dpeak)
{
    LS_SHARED(double, memory);
    __shared__ double scratch[LS_WARP];
    constexpr int ALL = T * SIDE * T * SIDE;
    double *const first = memory, *const second = memory + ALL, *const Y = memory + 2 * ALL;
    const int64_t at = (int64_t)blockIdx.x * m * m, step = (int64_t)gridDim.x * m * m;
    double x[T][T], e[T][T], dz[T][T], da[T][T];
    A += at;
    Z += at + iterations * step;
    take<T>(m, dZ + at, dz);
    EACH_OWN(i, j, T) da[i][j] = 0;
    for (int t = 0; t < iterations; t++) {
        Z -= step;
        /* G in e; W in `first`; dz = ¼ dZ' W */
        load<T>(m, Z, second);
        put<T>(dz, first);
        __syncthreads();
        multiply<T, true>(second, first, e);
        __syncthreads();
        load<T>(m, A, first);
        __syncthreads();
        look_inside<T>(first, second, Y);
        put<T>(dz, second);
        __syncthreads();
        multiply<T, false>(second, first, dz);
        EACH_OWN(i, j, T) dz[i][j] /= 4;
        __syncthreads();
        put<T>(e, second);
        __syncthreads();
        EACH_OWN(i, j, T) e[i][j] = (e[i][j] + across<T>(second, i, j)) / 8;
        put<T>(e, first);
        __syncthreads();
        /* R from G in `first`, X from R + ½ Rᵀ there; E in e */
        multiply<T, false>(first, Y, x);
        put<T>(x, second);
        __syncthreads();
        EACH_OWN(i, j, T)
        {
            const double y = across<T>(second, i, j);
            e[i][j] = -15 * e[i][j] + 7 * (x[i][j] + y);
            own<T>(first, i, j) = x[i][j] + y / 2;
        }
        __syncthreads();
        multiply<T, false>(first, Y, x);
        put<T>(x, second);
        __syncthreads();
        EACH_OWN(i, j, T) e[i][j] -= x[i][j] + across<T>(second, i, j);
        /* dz += Aᵀ E, dAᵀ += Z E */
        load<T>(m, A, first);
        put<T>(e, Y);
        __syncthreads();
        load<T>(m, Z, second);
        multiply_add<T, true>(first, Y, dz);
        __syncthreads();
        multiply_add<T, false>(second, Y, da);
        __syncthreads();
    }
    /* from Z_0 */
    const double scale = 1 / peak[blockIdx.x];
    double sum = 0;
    take<T>(m, Z, x);
    EACH_OWN(i, j, T)
    {
        da[i][j] += scale * dz[i][j];
        sum -= scale * dz[i][j] * x[i][j];
    }
    put<T>(da, first);
    sum = ls_block_sum(sum, scratch); /* all have put theirs, too */
    EACH_OWN(i, j, T) da[i][j] = across<T>(first, i, j);
    store<T>(m, da, dA + at);
    if (threadIdx.x == 0) dpeak[blockIdx.x] = sum;
}

/* Starts kernel<T> with the least T that there is for m rows. */
#define LAUNCH_BLOCKS(q, kernel, n, m, ...)                                                                            \
    do {                                                                                                               \
        if ((m) <= SIDE)                                                                                               \
            LS_LAUNCH(q, kernel<1>, (int)(n), THREADS, room_of(1), (int)(m), __VA_ARGS__);                             \
        else if ((m) <= 2 * SIDE)                                                                                      \
            LS_LAUNCH(q, kernel<2>, (int)(n), THREADS, room_of(2), (int)(m), __VA_ARGS__);                             \
        else                                                                                                           \
            LS_LAUNCH(q, kernel<4>, (int)(n), THREADS, room_of(4), (int)(m), __VA_ARGS__);                             \
    } while (0)

static size_t room_of(int T)
{
    return (size_t)(HELD * T * SIDE * T * SIDE) * sizeof(double);
}
static_assert(LS_PINV_IN_BLOCK == 4 * SIDE, "the greatest T");

/* ------------------------------------------------------------------------------------------------ by products */

typedef struct batch {
    ls_queue *queue;
    int64_t n, m;
} batch;

/* C = alpha op(A) op(B) + beta C, for every matrix. */
static void multiply_all(batch b, double alpha, int transpose_a, const double *A, int transpose_b, const double *B,
                         double beta, double *C)
{
    const int64_t m = b.m, each = m * m;
    ls_gemm_batch_double(b.queue, transpose_a, transpose_b, m, m, m, alpha, A, m, each, B, m, each, beta, C, m, each,
                         b.n);
}

static __global__ void begin_W(int64_t n, int64_t m, const double *Y, const double *S, double *W)
{
    LS_EACH(i, n * m * m)
    {
        const double unit = i % (m * m) % (m + 1) == 0 ? 13 : 0;
        W[i] = unit - 15 * Y[i] + 7 * S[i];
    }
}

/* Makes Y, S and W, one behind the other, from A and Z_t. */
static void look_inside_all(batch b, const double *A, const double *Z, double *Y)
{
    const int64_t all = b.n * b.m * b.m;
    double *S = Y + all, *W = S + all;
    multiply_all(b, 1, 0, A, 0, Z, 0, Y);
    multiply_all(b, 1, 0, Y, 0, Y, 0, S);
    LS_LAUNCH(b.queue, begin_W, ls_blocks(all, LS_THREADS), LS_THREADS, 0, b.n, b.m, (const double *)Y,
              (const double *)S, W);
    multiply_all(b, -1, 0, Y, 0, S, 1, W);
}

static __global__ void begin(int64_t n, int64_t m, const double *A, const double *peak, double *Z)
{
    LS_EACH(i, n * m * m)
    {
        const int64_t g = i / (m * m), r = i % (m * m) / m, c = i % m;
        Z[i] = A[g * m * m + c * m + r] / peak[g];
    }
}

/* to = a to + b X + c Xᵀ; a = 0 overwrites. */
static __global__ void mix(int64_t n, int64_t m, double a, double b, double c, const double *X, double *to)
{
    LS_EACH(i, n * m * m)
    {
        const int64_t at = i % (m * m);
        to[i] = (a == 0 ? 0 : a * to[i]) + b * X[i] + c * X[i - at + at % m * m + at / m];
    }
}

static void mix_all(batch b, double of_to, double of_X, double of_transpose, const double *X, double *to)
{
    LS_LAUNCH(b.queue, mix, ls_blocks(b.n * b.m * b.m, LS_THREADS), LS_THREADS, 0, b.n, b.m, of_to, of_X, of_transpose,
              X, to);
}

/* dZ, the gradient of Z_{t+1}, becomes that of Z_t, in scratch; dA grows, or with `first` begins. */
static double *iteration_backward(batch b, const double *A, const double *Z, const double *dZ, int first, double *dA,
                                  double *scratch, double *next)
{
    const int64_t all = b.n * b.m * b.m;
    double *Y = scratch, *S = Y + all, *W = S + all, *E = W + all, *H = S, *R = next, *X = R;
    look_inside_all(b, A, Z, scratch);
    multiply_all(b, 0.25, 1, Z, 0, dZ, 0, R);
    mix_all(b, 0, 0.5, 0.5, R, E); /* G */
    multiply_all(b, 1, 0, E, 0, Y, 0, R);
    mix_all(b, -15, 7, 7, R, E);
    mix_all(b, 0, 1, 0.5, R, H);
    multiply_all(b, 1, 0, H, 0, Y, 0, X);
    mix_all(b, 1, -1, -1, X, E);
    multiply_all(b, 0.25, 0, dZ, 0, W, 0, next);
    multiply_all(b, 1, 1, A, 0, E, 1, next);
    multiply_all(b, 1, 0, E, 1, Z, !first, dA);
    return next;
}

/* dA += dZᵀ / peak, or with `fresh` =, and for each matrix, one block: dpeak = - Σ dZ Z_0 / peak */
static __global__ void finish_backward(int64_t m, const double *peak, const double *Z, const double *dZ, int fresh,
                                       double *dA, double *dpeak)
{
    __shared__ double scratch[LS_WARP];
    const int64_t g = blockIdx.x, at = g * m * m;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < m * m; i += blockDim.x) {
        dA[at + i] = (fresh ? 0 : dA[at + i]) + dZ[at + i % m * m + i / m] / peak[g];
        sum -= dZ[at + i] * Z[at + i] / peak[g];
    }
    sum = ls_block_sum(sum, scratch);
    if (threadIdx.x == 0) dpeak[g] = sum;
}

/* ------------------------------------------------------------------------------------------------ both */

void ls_pinv_cuda(ls_queue *q, int64_t n, int64_t m, int iterations, const double *A, const double *peak, double *Z,
                  double *scratch)
{
    const batch b = {q, n, m};
    const int64_t all = n * m * m;
    if (n == 0) return;
    if (m <= LS_PINV_IN_BLOCK) {
        LAUNCH_BLOCKS(q, invert, n, m, iterations, A, peak, Z);
        return;
    }
    LS_LAUNCH(q, begin, ls_blocks(all, LS_THREADS), LS_THREADS, 0, n, m, A, peak, Z);
    for (int t = 0; t < iterations; t++, Z += all) {
        look_inside_all(b, A, Z, scratch);
        multiply_all(b, 0.25, 0, Z, 0, scratch + 2 * all, 0, Z + all);
    }
}

void ls_pinv_backward_cuda(ls_queue *q, int64_t n, int64_t m, int iterations, const double *A, const double *peak,
                           const double *Z, double *dZ, double *dA, double *dpeak, double *scratch)
{
    const batch b = {q, n, m};
    const int64_t all = n * m * m;
    if (n == 0) return;
    if (m <= LS_PINV_IN_BLOCK) {
        LAUNCH_BLOCKS(q, invert_backward, n, m, iterations, A, peak, Z, (const double *)dZ, dA, dpeak);
        return;
    }
    double *spare = scratch + 4 * all; /* what Y, S, W and E leave */
    for (int t = iterations - 1; t >= 0; t--) {
        double *next = iteration_backward(b, A, Z + t * all, dZ, t == iterations - 1, dA, scratch, spare);
        spare = dZ, dZ = next;
    }
    LS_LAUNCH(q, finish_backward, (int)n, LS_THREADS, 0, m, peak, Z, (const double *)dZ, iterations == 0, dA, dpeak);
}
