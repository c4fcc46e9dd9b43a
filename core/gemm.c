#include "gemm.h"

#include "products.h"

#include <cblas.h>
#include <strings.h>

#ifdef LS_REAL_DOUBLE
#define GEMM cblas_dgemm
#define TRANSPOSE cblas_domatcopy
#else
#define GEMM cblas_sgemm
#define TRANSPOSE cblas_somatcopy
#endif

/* OpenBLAS's kernels for AVX-512 take small products as they lie; above SMALL multiplications they copy operands first,
 * which for an inner matrix that stays in cache anyway is a third slower, and so is B transposed at any size. Such
 * products go in pieces of rows, and B is transposed before: at most INNER reals, where enough rows use it, more if it
 * does not lie together. */
enum { SMALL = 1000000, INNER = 16384, FEWEST = 16, MANY = 64, APART = 16 };

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

static int takes_small_products(void)
{
    static _Atomic int known = -1; /* of all threads: they find the same */
    if (known < 0) {
        const char *kernels = ls_blas_kernels();
        known = strcasecmp(kernels, "SkylakeX") == 0 || strcasecmp(kernels, "Cooperlake") == 0 ||
                strcasecmp(kernels, "SapphireRapids") == 0;
    }
    return known;
}

/* Pieces of m rows, of about the same size, a multiple of 16 if that fits, of no more than `most` >= 61. */
static int64_t piece_of_rows(int64_t m, int64_t most)
{
    const int64_t pieces = (m + most - 1) / most, rows = (m + pieces - 1) / pieces, even = (rows + 15) / 16 * 16;
    return even <= most ? even : rows;
}

void ls_transpose(int64_t m, int64_t n, const ls_real *from, int64_t ld, ls_real *to, int64_t ld_to)
{
    if (m <= 0 || n <= 0) return;
    TRANSPOSE(CblasRowMajor, CblasTrans, (blasint)m, (blasint)n, 1, from, (blasint)ld, to, (blasint)ld_to);
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
    int64_t rows = m;
    if (n * k <= INNER && takes_small_products()) {
        if (transpose_b && !transpose_a && n >= FEWEST && m >= (ldb == k ? FEWEST : MANY) && 4 * m >= k) {
            static _Thread_local ls_real turned[INNER + APART * INNER / FEWEST];
            ls_transpose(n, k, b, ldb, turned, n + APART); /* rows a power of two apart meet in one place of a cache */
            b = turned, ldb = n + APART, transpose_b = 0;
        }
        if (!transpose_b && m * n * k > SMALL) rows = piece_of_rows(m, SMALL / (n * k));
    }
    for (int64_t i = 0; i < m; i += rows)
        GEMM(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
             (blasint)(m - i < rows ? m - i : rows), (blasint)n, (blasint)k, (ls_real)alpha,
             a + i * (transpose_a ? 1 : lda), (blasint)lda, b, (blasint)ldb, (ls_real)beta, c + i * ldc, (blasint)ldc);
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
