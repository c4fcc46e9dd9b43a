/* The only door to BLAS. Row-major: C (m,n) = alpha op(A) (m,k) op(B) (k,n) + beta C; ld* are distances between rows.
 * beta = 0 overwrites, whatever stood in C. Sizes of 0 are fine. */
#ifndef LS_GEMM_H
#define LS_GEMM_H

#include "longspan.h"

void ls_gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const ls_real *a,
             int64_t lda, const ls_real *b, int64_t ldb, double beta, ls_real *c, int64_t ldc);

/* The same in double, whatever ls_real is: for small matrices whose products would amplify the rounding of floats. */
void ls_gemm_double(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const double *a,
                    int64_t lda, const double *b, int64_t ldb, double beta, double *c, int64_t ldc);

/* C (m,n) = op(L) B + beta C, L (m,m) lower triangular, with zeros above its diagonal: three quarters of the product.
 */
void ls_gemm_lower(int transpose, int64_t m, int64_t n, const ls_real *l, int64_t ldl, const ls_real *b, int64_t ldb,
                   double beta, ls_real *c, int64_t ldc);

/* to (n,m) = from (m,n) transposed. */
void ls_transpose(int64_t m, int64_t n, const ls_real *from, int64_t ld, ls_real *to, int64_t ld_to);

/* One thread per rank: called once when a context is made, since a rank is the unit of parallelism. */
void ls_gemm_single_thread(void);

#endif
