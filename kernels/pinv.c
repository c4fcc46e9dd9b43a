#include "pinv.h"
#include "gemm.h"

double ls_column_sum(int64_t m, const double *A, int64_t c)
{
    double sum = 0;
    for (int64_t r = 0; r < m; r++) sum += A[r * m + c];
    return sum;
}

/* C = alpha op(A) op(B) + beta C, all (m,m). */
static void multiply(int64_t m, double alpha, int transpose_a, const double *A, int transpose_b, const double *B,
                     double beta, double *C)
{
    ls_gemm_double(transpose_a, transpose_b, m, m, m, alpha, A, m, B, m, beta, C, m);
}

/* X = a I - A B */
static void unit_minus(int64_t m, double a, const double *A, const double *B, double *X)
{
    for (int64_t i = 0; i < m * m; i++) X[i] = i % (m + 1) == 0 ? a : 0;
    multiply(m, -1, 0, A, 0, B, 1, X);
}

/* One iteration from the inside out: Y = A Z, U = 7 I - Y, V = 15 I - Y U, W = 13 I - Y V; then Z' = ¼ Z W. */
typedef struct inner {
    double *Y, *U, *V, *W;
} inner;

static inner look_inside(int64_t m, const double *A, const double *Z, double *scratch)
{
    const inner x = {scratch, scratch + m * m, scratch + 2 * m * m, scratch + 3 * m * m};
    multiply(m, 1, 0, A, 0, Z, 0, x.Y);
    for (int64_t i = 0; i < m * m; i++) x.U[i] = (i % (m + 1) == 0 ? 7 : 0) - x.Y[i];
    unit_minus(m, 15, x.Y, x.U, x.V);
    unit_minus(m, 13, x.Y, x.V, x.W);
    return x;
}

void ls_pinv(int64_t m, int iterations, const double *A, double peak, double *Z, double *scratch)
{
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < m; c++) Z[c * m + r] = A[r * m + c] / peak;
    for (int t = 0; t < iterations; t++, Z += m * m) {
        const inner x = look_inside(m, A, Z, scratch);
        multiply(m, 0.25, 0, Z, 0, x.W, 0, Z + m * m);
    }
}

/* dZ (m,m), the gradient of Z', becomes that of Z; dA grows. */
static void iteration_backward(int64_t m, const double *A, const double *Z, double *dZ, double *dA, double *scratch)
{
    const inner x = look_inside(m, A, Z, scratch);
    double *dW = scratch + 4 * m * m, *dV = scratch + 5 * m * m, *dY = scratch + 6 * m * m, *dU = dW;
    multiply(m, 0.25, 1, Z, 0, dZ, 0, dW);
    multiply(m, -1, 0, dW, 1, x.V, 0, dY);
    multiply(m, -1, 1, x.Y, 0, dW, 0, dV);
    multiply(m, -1, 0, dV, 1, x.U, 1, dY);
    multiply(m, -1, 1, x.Y, 0, dV, 0, dU);
    for (int64_t i = 0; i < m * m; i++) dY[i] -= dU[i];
    multiply(m, 0.25, 0, dZ, 1, x.W, 0, dV);
    multiply(m, 1, 1, A, 0, dY, 1, dV);
    multiply(m, 1, 0, dY, 1, Z, 1, dA);
    for (int64_t i = 0; i < m * m; i++) dZ[i] = dV[i];
}

double ls_pinv_backward(int64_t m, int iterations, const double *A, double peak, const double *Z, double *dZ,
                        double *dA, double *scratch)
{
    for (int64_t i = 0; i < m * m; i++) dA[i] = 0;
    for (int t = iterations - 1; t >= 0; t--) iteration_backward(m, A, Z + t * m * m, dZ, dA, scratch);
    double dpeak = 0;
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < m; c++) {
            dA[r * m + c] += dZ[c * m + r] / peak;
            dpeak -= dZ[c * m + r] * Z[c * m + r] / peak;
        }
    return dpeak;
}
