/* The only door to cuBLAS. It stores matrices by columns, so that our C = op(A) op(B) by rows is its C^T = op(B)^T
 * op(A)^T: the operands change places, and each is transposed for it as it is for us. */
#include "cuda.h"

extern "C" {
#include "products.h"
}

#include <limits.h>
#include <stdio.h>

/* The one place where the numbers of a product are told: operands rounded to bfloat16 (q->bf16) would be converted
 * before, and given to cublasGemmStridedBatchedEx here. */
static cublasStatus_t product(ls_queue *q, cublasOperation_t op_b, cublasOperation_t op_a, int n, int m, int k,
                              double alpha, const double *b, int ldb, int64_t stride_b, const double *a, int lda,
                              int64_t stride_a, double beta, double *c, int ldc, int64_t stride_c, int batch)
{
    return cublasDgemmStridedBatched(q->blas, op_b, op_a, n, m, k, &alpha, b, ldb, stride_b, a, lda, stride_a, &beta, c,
                                     ldc, stride_c, batch);
}

#ifndef LS_REAL_DOUBLE
static cublasStatus_t product(ls_queue *q, cublasOperation_t op_b, cublasOperation_t op_a, int n, int m, int k,
                              double alpha, const float *b, int ldb, int64_t stride_b, const float *a, int lda,
                              int64_t stride_a, double beta, float *c, int ldc, int64_t stride_c, int batch)
{
    const float alpha_f = (float)alpha, beta_f = (float)beta;
    return cublasSgemmStridedBatched(q->blas, op_b, op_a, n, m, k, &alpha_f, b, ldb, stride_b, a, lda, stride_a,
                                     &beta_f, c, ldc, stride_c, batch);
}
#endif

template <typename T>
__global__ static void scale(int64_t m, int64_t n, T beta, T *c, int64_t ldc, int64_t stride_c, int64_t batch)
{
    LS_EACH(i, batch * m * n)
    {
        T *at = c + i / (m * n) * stride_c + i / n % m * ldc + i % n;
        *at = beta == 0 ? T(0) : beta * *at;
    }
}

/* for ls_launched to tell: the first failure stays */
static void keep(ls_queue *q, cublasStatus_t status, int64_t m, int64_t n, int64_t k, int64_t batch)
{
    if (q->status != LS_OK) return;
    q->status = status == CUBLAS_STATUS_ALLOC_FAILED ? LS_ERR_MEMORY : LS_ERR_INTERNAL;
    snprintf(q->message, sizeof q->message,
             "cuBLAS refused a batch of %lld products (%lld,%lld)(%lld,%lld): %s: please report this", (long long)batch,
             (long long)m, (long long)k, (long long)k, (long long)n, cublasGetStatusString(status));
}

static void list(int in_double, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, int64_t lda,
                 int64_t stride_a, int64_t ldb, int64_t stride_b, double beta, int64_t ldc, int64_t stride_c,
                 int64_t batch)
{
    ls_product p = {};
    p.m = m, p.n = n, p.k = k, p.batch = batch;
    p.lda = lda, p.ldb = ldb, p.ldc = ldc;
    p.stride_a = stride_a, p.stride_b = stride_b, p.stride_c = stride_c;
    p.transpose_a = transpose_a, p.transpose_b = transpose_b;
    p.adds = beta != 0, p.in_double = in_double;
    ls_product_list(&p);
}

template <typename T>
static void batch_of(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                     const T *a, int64_t lda, int64_t stride_a, const T *b, int64_t ldb, int64_t stride_b, double beta,
                     T *c, int64_t ldc, int64_t stride_c, int64_t batch)
{
    if (m <= 0 || n <= 0 || batch <= 0) return;
    if (k <= 0) { /* cuBLAS need not touch C then */
        LS_LAUNCH(q, scale<T>, ls_blocks(batch * m * n, LS_THREADS), LS_THREADS, 0, m, n, (T)beta, c, ldc, stride_c,
                  batch);
        return;
    }
    const int64_t sizes[] = {m, n, k, lda, ldb, ldc, batch};
    for (int64_t size : sizes)
        if (size > INT_MAX) {
            keep(q, CUBLAS_STATUS_INVALID_VALUE, m, n, k, batch);
            return;
        }
    if (ls_products_count(m, n, k, batch))
        list(sizeof(T) > sizeof(ls_real), transpose_a, transpose_b, m, n, k, lda, stride_a, ldb, stride_b, beta, ldc,
             stride_c, batch);
    const cublasStatus_t status =
        product(q, transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N, transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, (int)n, (int)m,
                (int)k, alpha, b, (int)ldb, stride_b, a, (int)lda, stride_a, beta, c, (int)ldc, stride_c, (int)batch);
    if (status != CUBLAS_STATUS_SUCCESS) keep(q, status, m, n, k, batch);
}

void ls_gemm_batch(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b, int64_t ldb, int64_t stride_b,
                   double beta, ls_real *c, int64_t ldc, int64_t stride_c, int64_t batch)
{
    batch_of(q, transpose_a, transpose_b, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c, ldc, stride_c,
             batch);
}

void ls_gemm_batch_double(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                          const double *a, int64_t lda, int64_t stride_a, const double *b, int64_t ldb,
                          int64_t stride_b, double beta, double *c, int64_t ldc, int64_t stride_c, int64_t batch)
{
    batch_of(q, transpose_a, transpose_b, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c, ldc, stride_c,
             batch);
}

extern "C" void ls_product_repeat_cuda(ls_queue *q, const ls_product *p, const void *a, const void *b, void *c)
{
    const int transpose_a = (int)p->transpose_a, transpose_b = (int)p->transpose_b;
    const double beta = p->adds ? 1 : 0;
    if (p->in_double)
        ls_gemm_batch_double(q, transpose_a, transpose_b, p->m, p->n, p->k, 1, static_cast<const double *>(a), p->lda,
                             p->stride_a, static_cast<const double *>(b), p->ldb, p->stride_b, beta,
                             static_cast<double *>(c), p->ldc, p->stride_c, p->batch);
    else
        ls_gemm_batch(q, transpose_a, transpose_b, p->m, p->n, p->k, 1, static_cast<const ls_real *>(a), p->lda,
                      p->stride_a, static_cast<const ls_real *>(b), p->ldb, p->stride_b, beta,
                      static_cast<ls_real *>(c), p->ldc, p->stride_c, p->batch);
}

/* (b,h) is number b * H + h of a batch where the strides allow it: one call instead of B or H. */
static int in_a_row(ls_view v, int64_t H)
{
    return v.sb == v.sh * H;
}

void ls_gemm_heads(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   ls_view a, ls_view b, double beta, ls_view c, int64_t B, int64_t H)
{
    if (H > 1 && B > 1 && !(in_a_row(a, H) && in_a_row(b, H) && in_a_row(c, H))) {
        if (B <= H)
            for (int64_t i = 0; i < B; i++)
                ls_gemm_batch(q, transpose_a, transpose_b, m, n, k, alpha, a.p + i * a.sb, a.st, a.sh, b.p + i * b.sb,
                              b.st, b.sh, beta, c.p + i * c.sb, c.st, c.sh, H);
        else
            for (int64_t i = 0; i < H; i++)
                ls_gemm_batch(q, transpose_a, transpose_b, m, n, k, alpha, a.p + i * a.sh, a.st, a.sb, b.p + i * b.sh,
                              b.st, b.sb, beta, c.p + i * c.sh, c.st, c.sb, B);
    } else if (H == 1)
        ls_gemm_batch(q, transpose_a, transpose_b, m, n, k, alpha, a.p, a.st, a.sb, b.p, b.st, b.sb, beta, c.p, c.st,
                      c.sb, B);
    else
        ls_gemm_batch(q, transpose_a, transpose_b, m, n, k, alpha, a.p, a.st, a.sh, b.p, b.st, b.sh, beta, c.p, c.st,
                      c.sh, B * H);
}
