/* Products of rows in shared memory by a warp, for .cu files where rows meet rows in tiles. */
#ifndef LS_DOTS_CUDA_H
#define LS_DOTS_CUDA_H

#include "cuda.h"

/* s_u += x_u · y_u over n numbers, a multiple of 4, of rows in shared memory that begin on such boundaries; in order.
 * `alike`: all y are y_0, read once for all x. */
template <int N, typename T>
__device__ static inline void ls_dots(const ls_real *const (&x)[N], const ls_real *const (&y)[N], int alike, int n,
                                      T (&s)[N])
{
    for (int e = 0; e < n; e += 4) {
        ls_four b = ls_four_at(y[0] + e);
#pragma unroll
        for (int u = 0; u < N; u++) {
            const ls_four a = ls_four_at(x[u] + e);
            if (u > 0 && !alike) b = ls_four_at(y[u] + e);
#pragma unroll
            for (int k = 0; k < 4; k++) s[u] += T(a.v[k]) * T(b.v[k]);
        }
    }
}

/* sum_u,k += Σ_j w_u[j] y_j[32 k], j < 32: y_j lie `pitch` numbers apart in shared memory, the weights w_u on
 * boundaries of four. */
template <int N, int K>
__device__ static inline void ls_weighted(const ls_real *const (&w)[N], const ls_real *y, int pitch,
                                          ls_real (&sum)[N][K])
{
    for (int j = 0; j < LS_WARP; j += 4) {
        ls_four a[N];
#pragma unroll
        for (int u = 0; u < N; u++) a[u] = ls_four_at(w[u] + j);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < K; k++) {
                const ls_real z = y[(j + i) * pitch + k * LS_WARP];
#pragma unroll
                for (int u = 0; u < N; u++) sum[u][k] += a[u].v[i] * z;
            }
    }
}

/* The same of a band, sum_u += Σ_j w_u[j] y_(4u+j): what one sum reads the next has read before. */
template <int N>
__device__ static inline void ls_weighted_band(const ls_real *const (&w)[N], const ls_real *y, int pitch,
                                               ls_real (&sum)[N][1])
{
    ls_real z[4 * N];
#pragma unroll
    for (int t = 0; t < 4 * N; t++) z[t] = y[t * pitch];
#pragma unroll
    for (int j = 0; j < LS_WARP; j += 4) {
#pragma unroll
        for (int u = 0; u < N; u++) {
            const ls_four a = ls_four_at(w[u] + j);
#pragma unroll
            for (int i = 0; i < 4; i++) sum[u][0] += a.v[i] * z[4 * u + i];
        }
#pragma unroll
        for (int t = 0; t < 4 * N - 4; t++) z[t] = z[t + 4];
#pragma unroll
        for (int i = 0; i < 4 && j + 4 < LS_WARP; i++) z[4 * N - 4 + i] = y[(j + 4 * N + i) * pitch];
    }
}

#endif
