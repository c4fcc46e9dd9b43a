/* Iterative pseudo-inverse of a small matrix (Razavi et al., 2014, as used by Xiong et al., 2021), in double since it
 * inverts small singular values:
 *
 *   Z_0 = Aᵀ / peak,   Z_{t+1} = ¼ Z_t W,   W = 13 I - 15 Y + 7 S - Y S,   S = Y Y,   Y = A Z_t
 *
 * peak = max_c Σ_r A[r,c] of this matrix, or of all that are inverted together, is the caller's: its gradient may
 * belong to several matrices.
 *
 * Backward. Z_t is Aᵀ times a polynomial of A Aᵀ, hence Y and all that is made of it are symmetric and commute: of
 * their gradients only the symmetric part can matter. From dZ' = dZ_{t+1}, with G the gradient of W and E that of Y:
 *
 *   G = ⅛ (Zᵀ dZ' + dZ'ᵀ Z)
 *   E = -15 G + 7 (R + Rᵀ) - (X + Xᵀ),   R = G Y,   X = (R + ½ Rᵀ) Y
 *   dZ = ¼ dZ' W + Aᵀ E,   dA += E Zᵀ
 *
 * since Y Y G + Y G Y + G Y Y, what -dW of Y S gives, is X + Xᵀ. */
#ifndef LS_PINV_H
#define LS_PINV_H

#include <stdint.h>

/* Σ_r A[r,c]: bit for bit the same whenever it is asked for. */
double ls_column_sum(int64_t m, const double *A, int64_t c);

/* Doubles of scratch that both functions below need. */
static inline int64_t ls_pinv_scratch(int64_t m)
{
    return 5 * m * m;
}

/* Z holds Z_0 .. Z_iterations, (iterations + 1, m, m): the last is the result. */
void ls_pinv(int64_t m, int iterations, const double *A, double peak, double *Z, double *scratch);
/* From Z as it was left and dZ (m,m), which is used up: dA is overwritten, and d peak returned. */
double ls_pinv_backward(int64_t m, int iterations, const double *A, double peak, const double *Z, double *dZ,
                        double *dA, double *scratch);

#endif
