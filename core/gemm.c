#include "gemm.h"

#include "products.h"

#include <cblas.h>
#include <strings.h>

#ifdef LS_REAL_DOUBLE
#define GEMM cblas_dgemm
#else
#define GEMM cblas_sgemm
#endif

static void count(int in_double, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, int64_t lda,
                  int64_t ldb, double beta, int64_t ldc)
{
    if (!ls_products_count(m, n, k, 1)) return;
    ls_product_list(&(ls_product){.m = m,
                                  .n = n,
                                  .k = k,
                                  .lda = lda,
                                  .ldb = ldb,
                                  .ldc = ldc,
                                  .batch = 1,
                                  .transpose_a = transpose_a,
                                  .transpose_b = transpose_b,
                                  .adds = beta != 0,
                                  .in_double = in_double});
}

void ls_gemm(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const ls_real *a,
             int64_t lda, const ls_real *b, int64_t ldb, double beta, ls_real *c, int64_t ldc)
{
    if (m <= 0 || n <= 0) return;
    if (k <= 0) { /* BLAS need not touch C then */
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0 ? 0 : (ls_real)beta * c[i * ldc + j];
        return;
    }
    count(0, transpose_a, transpose_b, m, n, k, lda, ldb, beta, ldc);
    GEMM(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans, (blasint)m,
         (blasint)n, (blasint)k, (ls_real)alpha, a, (blasint)lda, b, (blasint)ldb, (ls_real)beta, c, (blasint)ldc);
}

void ls_gemm_double(int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const double *a,
                    int64_t lda, const double *b, int64_t ldb, double beta, double *c, int64_t ldc)
{
    if (m <= 0 || n <= 0) return;
    if (k <= 0) {
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] = beta == 0 ? 0 : beta * c[i * ldc + j];
        return;
    }
    count(1, transpose_a, transpose_b, m, n, k, lda, ldb, beta, ldc);
    cblas_dgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
                (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
}

/* Of four quarters the one above the diagonal is left out. For the small matrices that come here BLAS's own triangular
 * product is slower on some processors: it has to copy operands, and works in place. */
void ls_gemm_lower(int transpose, int64_t m, int64_t n, const ls_real *l, int64_t ldl, const ls_real *b, int64_t ldb,
                   double beta, ls_real *c, int64_t ldc)
{
    const int64_t half = m < 32 ? m : m / 2, rest = m - half;
    const ls_real *low = l + half * ldl;
    if (transpose) {
        ls_gemm(1, 0, half, n, m, 1, l, ldl, b, ldb, beta, c, ldc);
        ls_gemm(1, 0, rest, n, rest, 1, low + half, ldl, b + half * ldb, ldb, beta, c + half * ldc, ldc);
    } else {
        ls_gemm(0, 0, half, n, half, 1, l, ldl, b, ldb, beta, c, ldc);
        ls_gemm(0, 0, rest, n, m, 1, low, ldl, b, ldb, beta, c + half * ldc, ldc);
    }
}

void ls_gemm_single_thread(void)
{
    openblas_set_num_threads(1);
}

const char *ls_blas_kernels(void)
{
    return openblas_get_corename();
}

const char *ls_blas_better_kernels(void)
{
#if defined __GNUC__ && defined __x86_64__
    static const char *const with_avx2[] = {"Haswell", "Excavator", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids"};
    const char *chosen = ls_blas_kernels();
    for (size_t i = 0; i < sizeof with_avx2 / sizeof *with_avx2; i++)
        if (strcasecmp(chosen, with_avx2[i]) == 0) return NULL;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return NULL;
    const int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl");
    return avx512 ? "SkylakeX" : "Haswell";
#else
    return NULL;
#endif
}
