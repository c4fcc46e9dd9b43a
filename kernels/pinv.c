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

/* Makes Y, S and W (3,m,m) from A and Z_t. */
static void look_inside(int64_t m, const double *A, const double *Z, double *Y)
{
    double *S = Y + m * m, *W = S + m * m;
    multiply(m, 1, 0, A, 0, Z, 0, Y);
    multiply(m, 1, 0, Y, 0, Y, 0, S);
    for (int64_t i = 0; i < m * m; i++) W[i] = (i % (m + 1) == 0 ? 13 : 0) - 15 * Y[i] + 7 * S[i];
    multiply(m, -1, 0, Y, 0, S, 1, W);
}

void ls_pinv(int64_t m, int iterations, const double *A, double peak, double *Z, double *scratch)
{
    for (int64_t r = 0; r < m; r++)
        for (int64_t c = 0; c < m; c++) Z[c * m + r] = A[r * m + c] / peak;
    for (int t = 0; t < iterations; t++, Z += m * m) {
        look_inside(m, A, Z, scratch);
        multiply(m, 0.25, 0, Z, 0, scratch + 2 * m * m, 0, Z + m * m);
    }
}

/* to = a to + b X + c Xᵀ; a = 0 overwrites. */
static void mix(int64_t m, double a, double b, double c, const double *X, double *to)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < m; j++)
            to[i * m + j] = (a == 0 ? 0 : a * to[i * m + j]) + b * X[i * m + j] + c * X[j * m + i];
}

/* dZ (m,m), the gradient of Z_{t+1}, becomes that of Z_t; dA grows. */
static void iteration_backward(int64_t m, const double *A, const double *Z, double *dZ, double *dA, double *scratch)
{
    double *Y = scratch, *S = Y + m * m, *W = S + m * m, *E = W + m * m, *R = E + m * m, *H = S, *X = R, *next = R;
    look_inside(m, A, Z, scratch);
    multiply(m, 0.25, 1, Z, 0, dZ, 0, R);
    mix(m, 0, 0.5, 0.5, R, E); /* G */
    multiply(m, 1, 0, E, 0, Y, 0, R);
    mix(m, -15, 7, 7, R, E);
    mix(m, 0, 1, 0.5, R, H);
    multiply(m, 1, 0, H, 0, Y, 0, X);
    mix(m, 1, -1, -1, X, E);
    multiply(m, 0.25, 0, dZ, 0, W, 0, next);
    multiply(m, 1, 1, A, 0, E, 1, next);
    multiply(m, 1, 0, E, 1, Z, 1, dA);
    for (int64_t i = 0; i < m * m; i++) dZ[i] = next[i];
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
