/* Products of whole batches through the door to cuBLAS, in double; what stands between them is elementwise. The steps
 * are those of pinv.c. */
#include "pinv_cuda.h"

typedef struct batch {
    ls_queue *queue;
    int64_t n, m;
} batch;

/* C = alpha op(A) op(B) + beta C, for every matrix. */
static void multiply(batch b, double alpha, int transpose_a, const double *A, int transpose_b, const double *B,
                     double beta, double *C)
{
    const int64_t m = b.m, each = m * m;
    ls_gemm_batch_double(b.queue, transpose_a, transpose_b, m, m, m, alpha, A, m, each, B, m, each, beta, C, m, each,
                         b.n);
}

/* X = a I - Y; Y NULL: a I. */
static __global__ void unit_less(int64_t n, int64_t m, double a, const double *Y, double *X)
{
    LS_EACH(i, n * m * m)
    {
        const double unit = i % (m * m) % (m + 1) == 0 ? a : 0;
        X[i] = Y == NULL ? unit : unit - Y[i];
    }
}

static void make_unit_less(batch b, double a, const double *Y, double *X)
{
    LS_LAUNCH(b.queue, unit_less, ls_blocks(b.n * b.m * b.m, LS_THREADS), LS_THREADS, 0, b.n, b.m, a, Y, X);
}

/* X = a I - A B */
static void unit_minus(batch b, double a, const double *A, const double *B, double *X)
{
    make_unit_less(b, a, NULL, X);
    multiply(b, -1, 0, A, 0, B, 1, X);
}

/* One iteration from the inside out, as in pinv.c: Y = A Z, U = 7 I - Y, V = 15 I - Y U, W = 13 I - Y V. */
typedef struct inner {
    double *Y, *U, *V, *W;
} inner;

static inner look_inside(batch b, const double *A, const double *Z, double *scratch)
{
    const int64_t all = b.n * b.m * b.m;
    const inner x = {scratch, scratch + all, scratch + 2 * all, scratch + 3 * all};
    multiply(b, 1, 0, A, 0, Z, 0, x.Y);
    make_unit_less(b, 7, x.Y, x.U);
    unit_minus(b, 15, x.Y, x.U, x.V);
    unit_minus(b, 13, x.Y, x.V, x.W);
    return x;
}

static __global__ void begin(int64_t n, int64_t m, const double *A, const double *peak, double *Z)
{
    LS_EACH(i, n * m * m)
    {
        const int64_t g = i / (m * m), r = i % (m * m) / m, c = i % m;
        Z[i] = A[g * m * m + c * m + r] / peak[g];
    }
}

void ls_pinv_cuda(ls_queue *q, int64_t n, int64_t m, int iterations, const double *A, const double *peak, double *Z,
                  double *scratch)
{
    const batch b = {q, n, m};
    const int64_t all = n * m * m;
    LS_LAUNCH(q, begin, ls_blocks(all, LS_THREADS), LS_THREADS, 0, n, m, A, peak, Z);
    for (int t = 0; t < iterations; t++, Z += all) {
        const inner x = look_inside(b, A, Z, scratch);
        multiply(b, 0.25, 0, Z, 0, x.W, 0, Z + all);
    }
}

static __global__ void subtract(int64_t n, const double *from, double *x)
{
    LS_EACH(i, n) x[i] -= from[i];
}

/* dA += dZᵀ / peak, and for each matrix, one block: dpeak = - Σ dZ Z_0 / peak */
static __global__ void begin_backward(int64_t m, const double *peak, const double *Z, const double *dZ, double *dA,
                                      double *dpeak)
{
    __shared__ double scratch[LS_WARP];
    const int64_t g = blockIdx.x, at = g * m * m;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < m * m; i += blockDim.x) {
        dA[at + i] += dZ[at + i % m * m + i / m] / peak[g];
        sum -= dZ[at + i] * Z[at + i] / peak[g];
    }
    sum = ls_block_sum(sum, scratch);
    if (threadIdx.x == 0) dpeak[g] = sum;
}

void ls_pinv_backward_cuda(ls_queue *q, int64_t n, int64_t m, int iterations, const double *A, const double *peak,
                           const double *Z, double *dZ, double *dA, double *dpeak, double *scratch)
{
    const batch b = {q, n, m};
    const int64_t all = n * m * m;
    double *dW = scratch + 4 * all, *dV = scratch + 5 * all, *dY = scratch + 6 * all, *dU = dW;
    make_unit_less(b, 0, NULL, dA);
    for (int t = iterations - 1; t >= 0; t--) {
        const inner x = look_inside(b, A, Z + t * all, scratch);
        multiply(b, 0.25, 1, Z + t * all, 0, dZ, 0, dW);
        multiply(b, -1, 0, dW, 1, x.V, 0, dY);
        multiply(b, -1, 1, x.Y, 0, dW, 0, dV);
        multiply(b, -1, 0, dV, 1, x.U, 1, dY);
        multiply(b, -1, 1, x.Y, 0, dV, 0, dU);
        LS_LAUNCH(q, subtract, ls_blocks(all, LS_THREADS), LS_THREADS, 0, all, (const double *)dU, dY);
        multiply(b, 0.25, 0, dZ, 1, x.W, 0, dV);
        multiply(b, 1, 1, A, 0, dY, 1, dV);
        multiply(b, 1, 0, dY, 1, Z + t * all, 1, dA);
        double *next = dV; /* the gradient of Z_t */
        dV = dZ, dZ = next;
    }
    LS_LAUNCH(q, begin_backward, (int)n, LS_THREADS, 0, m, peak, Z, (const double *)dZ, dA, dpeak);
}
