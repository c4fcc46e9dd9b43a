/* Products of rows in shared memory by a warp, for .cu files where rows meet rows in tiles. */
#ifndef LS_DOTS_CUDA_H
#define LS_DOTS_CUDA_H

#include "cuda.h"

/* s_u += x_u · y over n numbers, a multiple of 4, of rows in shared memory that begin on such boundaries; in order. */
template <int N, typename T>
__device__ static inline void ls_dots(const ls_real *const (&x)[N], const ls_real *y, int n, T (&s)[N])
{
    for (int e = 0; e < n; e += 4) {
        const ls_four b = ls_four_at(y + e);
#pragma unroll
        for (int u = 0; u < N; u++) {
            const ls_four a = ls_four_at(x[u] + e);
#pragma unroll
            for (int k = 0; k < 4; k++) s[u] += T(a.v[k]) * T(b.v[k]);
        }
    }
}

/* sum_u += Σ_j w_u[j] y_j, j < 32: y_j lie `pitch` numbers apart in shared memory, the weights w_u on boundaries of
 * four. */
template <int N>
__device__ static inline void ls_weighted(const ls_real *const (&w)[N], const ls_real *y, int pitch, ls_real (&sum)[N])
{
    for (int j = 0; j < LS_WARP; j += 4) {
        ls_four a[N];
#pragma unroll
        for (int u = 0; u < N; u++) a[u] = ls_four_at(w[u] + j);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const ls_real z = y[(j + i) * pitch];
#pragma unroll
            for (int u = 0; u < N; u++) sum[u] += a[u].v[i] * z;
        }
    }
}

#endif
