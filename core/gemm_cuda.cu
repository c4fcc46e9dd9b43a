/* The only door to cuBLAS. It stores matrices by columns, so that our C = op(A) op(B) by rows is its C^T = op(B)^T
 * op(A)^T: the operands change places, and each is transposed for it as it is for us.
 *
 * On a queue of precision bf16 the operands of products of floats are first copied to bfloat16, into memory that the
 * queue has from the beginning: half of it for A, half for B. What is too large for that is done in blocks. Operands
 * that lie in bfloat16 already are taken as they lie. */
#include "cuda.h"

extern "C" {
#include "products.h"
}

#include <cuda_bf16.h>
#include <limits.h>
#include <stdio.h>

/* Matrix i of a batch is at p + i * stride; rows are ld apart. narrow: of floats that lie in bfloat16. */
template <typename T> struct operand {
    const T *p;
    int transpose;
    int64_t ld, stride;
    int narrow;
};
/* C_i (m,n) = alpha op(A_i) op(B_i) + beta C_i */
template <typename T> struct batch {
    int64_t m, n, k, count;
    double alpha, beta;
    operand<T> a, b;
    T *c;
    int64_t ldc, stride_c;
    int narrow_c;
};

/* Number i of what lies at p: T, or bfloat16 under its name. */
template <typename T> static T *at_of(T *p, int64_t i, int is_narrow)
{
    return reinterpret_cast<T *>((uintptr_t)p + (size_t)i * (is_narrow ? sizeof(__nv_bfloat16) : sizeof *p));
}

static cublasOperation_t operation(int transpose)
{
    return transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
}

/* A product alone goes by a call of its own, for which cuBLAS may share a long k among blocks, as gradients of weights
 * need: few rows and columns, and k as long as the sequence. */
static cublasStatus_t product(ls_queue *q, const batch<double> &x, ls_precision)
{
    if (x.count == 1)
        return cublasDgemm(q->blas, operation(x.b.transpose), operation(x.a.transpose), (int)x.n, (int)x.m, (int)x.k,
                           &x.alpha, x.b.p, (int)x.b.ld, x.a.p, (int)x.a.ld, &x.beta, x.c, (int)x.ldc);
    return cublasDgemmStridedBatched(q->blas, operation(x.b.transpose), operation(x.a.transpose), (int)x.n, (int)x.m,
                                     (int)x.k, &x.alpha, x.b.p, (int)x.b.ld, x.b.stride, x.a.p, (int)x.a.ld, x.a.stride,
                                     &x.beta, x.c, (int)x.ldc, x.stride_c, (int)x.count);
}

#ifndef LS_REAL_DOUBLE
/* Sums of products in float32, of operands of another type or rounding. */
template <typename T>
static cublasStatus_t product_of(ls_queue *q, const operand<T> &a, const operand<T> &b, cudaDataType type,
                                 cublasComputeType_t compute, const batch<float> &x)
{
    const float alpha = (float)x.alpha, beta = (float)x.beta;
    const cudaDataType c_type = x.narrow_c ? CUDA_R_16BF : CUDA_R_32F;
    if (x.count == 1)
        return cublasGemmEx(q->blas, operation(b.transpose), operation(a.transpose), (int)x.n, (int)x.m, (int)x.k,
                            &alpha, b.p, type, (int)b.ld, a.p, type, (int)a.ld, &beta, x.c, c_type, (int)x.ldc, compute,
                            CUBLAS_GEMM_DEFAULT);
    return cublasGemmStridedBatchedEx(q->blas, operation(b.transpose), operation(a.transpose), (int)x.n, (int)x.m,
                                      (int)x.k, &alpha, b.p, type, (int)b.ld, b.stride, a.p, type, (int)a.ld, a.stride,
                                      &beta, x.c, c_type, (int)x.ldc, x.stride_c, (int)x.count, compute,
                                      CUBLAS_GEMM_DEFAULT);
}

/* ------------------------------------------------------------------------------------------------ bfloat16 */

enum { GROUP = 8 }; /* numbers in 16 bytes; rows of copies are whole groups */

static int64_t whole(int64_t columns)
{
    return (columns + GROUP - 1) / GROUP * GROUP;
}

/* to = rows of floats in bfloat16, 0 behind the end of a row. W floats are read at a time. There are fewer groups than
 * a queue's memory has, which 32 bits can count. */
template <int W>
__global__ static void narrow_rows(unsigned items, unsigned rows, unsigned columns, const float *from, int64_t ld,
                                   int64_t stride, uint4 *to)
{
    const unsigned groups = (columns + GROUP - 1) / GROUP;
    LS_EACH(i, items * rows * groups)
    {
        const unsigned g = (unsigned)i % groups, row = (unsigned)i / groups % rows, item = (unsigned)i / groups / rows;
        const float *x = from + item * stride + row * ld + g * GROUP;
        alignas(16) float y[GROUP] = {};
#pragma unroll
        for (unsigned c = 0; c < GROUP; c += W) {
            if (g * GROUP + c >= columns) continue;
            if (W == 4)
                *(float4 *)(y + c) = *(const float4 *)(x + c);
            else
                y[c] = x[c];
        }
        unsigned word[GROUP / 2];
#pragma unroll
        for (int c = 0; c < GROUP / 2; c++) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(y[2 * c], y[2 * c + 1]);
            memcpy(word + c, &pair, sizeof pair);
        }
        to[i] = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

/* A block of an operand's matrices, as they lie in memory. */
struct block {
    int64_t item, row, column, items, rows, columns;
};

/* A block where it lies, or its copy, which is there already where it is that of the call before. */
static operand<__nv_bfloat16> narrow(ls_queue *q, const operand<float> &x, block want, block *there, __nv_bfloat16 *to)
{
    const float *from = at_of(x.p, want.item * x.stride + want.row * x.ld + want.column, x.narrow);
    if (x.narrow) return {reinterpret_cast<const __nv_bfloat16 *>(from), x.transpose, x.ld, x.stride, 1};
    if (x.stride == 0) want.item = 0, want.items = 1;
    const int64_t ld = whole(want.columns);
    const operand<__nv_bfloat16> copy = {to, x.transpose, ld, x.stride == 0 ? 0 : want.rows * ld, 1};
    if (memcmp(&want, there, sizeof want) == 0) return copy;
    *there = want;
    const int wide = want.columns % 4 == 0 && x.ld % 4 == 0 && x.stride % 4 == 0 && (uintptr_t)from % 16 == 0;
    const auto kernel = wide ? narrow_rows<4> : narrow_rows<1>;
    LS_LAUNCH(q, kernel, ls_blocks(want.items * want.rows * ld / GROUP, LS_THREADS), LS_THREADS, 0,
              (unsigned)want.items, (unsigned)want.rows, (unsigned)want.columns, from, x.ld, x.stride, (uint4 *)to);
    return copy;
}

/* The sides of blocks: what is copied of A, (m,k), and of B, (k,n), fits in its half of the memory. Where one operand
 * fits as a whole, or is not copied, only the other is cut, along the side that is its own: each is copied once. Else,
 * and where not even a few rows of such a side fit, k is cut too, and C is added to, in pieces that leave the other
 * sides no shorter than they must be for a product to be worth its copies. */
struct sides {
    int64_t m, n, k, count;
};
static sides cut(const batch<float> &x)
{
    const int64_t half = (int64_t)LS_NARROW_SIDE * LS_NARROW_SIDE, m = whole(x.m), n = whole(x.n), k = whole(x.k);
    const bool large_a = !x.a.narrow && m * k > half, large_b = !x.b.narrow && k * n > half;
    sides s = {m, n, k, x.count};
    if (large_a && large_b)
        s.k = ls_min(k, ls_max(LS_NARROW_SIDE, half / ls_max(m, n) / GROUP * GROUP));
    else if (large_a || large_b)
        s.k = ls_min(k, half / GROUP);
    if (large_a) s.m = ls_min(m, half / s.k / GROUP * GROUP);
    if (large_b) s.n = ls_min(n, half / s.k / GROUP * GROUP);
    if (x.a.stride != 0 && !x.a.narrow) s.count = ls_min(s.count, half / (s.m * s.k));
    if (x.b.stride != 0 && !x.b.narrow) s.count = ls_min(s.count, half / (s.k * s.n));
    return s;
}

static block block_of(const operand<float> &x, int64_t item, int64_t row, int64_t column, int64_t items, int64_t rows,
                      int64_t columns)
{
    if (x.transpose) return {item, column, row, items, columns, rows};
    return {item, row, column, items, rows, columns};
}

static cublasStatus_t product_narrow(ls_queue *q, const batch<float> &x)
{
    const sides s = cut(x);
    __nv_bfloat16 *to = static_cast<__nv_bfloat16 *>(q->narrow);
    block a_there = {}, b_there = {};
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (int64_t i = 0; i < x.count; i += s.count)
        for (int64_t j = 0; j < x.n; j += s.n)
            for (int64_t l = 0; l < x.k; l += s.k)
                for (int64_t r = 0; r < x.m && status == CUBLAS_STATUS_SUCCESS; r += s.m) {
                    batch<float> part = x;
                    part.m = ls_min(s.m, x.m - r), part.n = ls_min(s.n, x.n - j), part.k = ls_min(s.k, x.k - l);
                    part.count = ls_min(s.count, x.count - i);
                    part.c = at_of(x.c, i * x.stride_c + r * x.ldc + j, x.narrow_c);
                    if (l > 0) part.beta = 1;
                    const auto b = narrow(q, x.b, block_of(x.b, i, l, j, part.count, part.k, part.n), &b_there,
                                          to + (int64_t)LS_NARROW_SIDE * LS_NARROW_SIDE);
                    const auto a = narrow(q, x.a, block_of(x.a, i, r, l, part.count, part.m, part.k), &a_there, to);
                    status = product_of(q, a, b, CUDA_R_16BF, CUBLAS_COMPUTE_32F, part);
                }
    return status;
}

static cublasStatus_t product(ls_queue *q, const batch<float> &x, ls_precision precision)
{
    const float alpha = (float)x.alpha, beta = (float)x.beta;
    if (precision == LS_BF16) return product_narrow(q, x);
    if (precision == LS_TF32) return product_of(q, x.a, x.b, CUDA_R_32F, CUBLAS_COMPUTE_32F_FAST_TF32, x);
    if (x.count == 1)
        return cublasSgemm(q->blas, operation(x.b.transpose), operation(x.a.transpose), (int)x.n, (int)x.m, (int)x.k,
                           &alpha, x.b.p, (int)x.b.ld, x.a.p, (int)x.a.ld, &beta, x.c, (int)x.ldc);
    return cublasSgemmStridedBatched(q->blas, operation(x.b.transpose), operation(x.a.transpose), (int)x.n, (int)x.m,
                                     (int)x.k, &alpha, x.b.p, (int)x.b.ld, x.b.stride, x.a.p, (int)x.a.ld, x.a.stride,
                                     &beta, x.c, (int)x.ldc, x.stride_c, (int)x.count);
}
#endif

/* ------------------------------------------------------------------------------------------------ any precision */

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

template <typename T> static void list(const batch<T> &x, ls_precision precision)
{
    ls_product p = {};
    p.m = x.m, p.n = x.n, p.k = x.k, p.batch = x.count;
    p.lda = x.a.ld, p.ldb = x.b.ld, p.ldc = x.ldc;
    p.stride_a = x.a.stride, p.stride_b = x.b.stride, p.stride_c = x.stride_c;
    p.transpose_a = x.a.transpose, p.transpose_b = x.b.transpose;
    p.adds = x.beta != 0, p.precision = precision, p.in_double = sizeof(T) > sizeof(ls_real);
    p.narrow_a = x.a.narrow, p.narrow_b = x.b.narrow, p.narrow_c = x.narrow_c;
    ls_product_list(&p);
}

/* Blocks of a grid have the matrices of a batch as their last number, of which there are no more than 65535. */
enum { MOST_MATRICES = 65535 };
template <typename T> static cublasStatus_t products(ls_queue *q, const batch<T> &x, ls_precision precision)
{
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (int64_t i = 0; i < x.count && status == CUBLAS_STATUS_SUCCESS; i += MOST_MATRICES) {
        batch<T> part = x;
        part.count = ls_min(MOST_MATRICES, x.count - i);
        part.a.p = at_of(x.a.p, i * x.a.stride, x.a.narrow);
        part.b.p = at_of(x.b.p, i * x.b.stride, x.b.narrow);
        part.c = at_of(x.c, i * x.stride_c, x.narrow_c);
        status = product(q, part, precision);
    }
    return status;
}

template <typename T> static void multiply(ls_queue *q, const batch<T> &x, ls_precision precision)
{
    if (x.m <= 0 || x.n <= 0 || x.count <= 0) return;
    const int narrow = x.a.narrow || x.b.narrow || x.narrow_c;
    if (precision > q->precision || (narrow && (precision != LS_BF16 || x.k <= 0))) {
        keep(q, CUBLAS_STATUS_NOT_SUPPORTED, x.m, x.n, x.k, x.count);
        return;
    }
    if (x.k <= 0) { /* cuBLAS need not touch C then */
        LS_LAUNCH(q, scale<T>, ls_blocks(x.count * x.m * x.n, LS_THREADS), LS_THREADS, 0, x.m, x.n, (T)x.beta, x.c,
                  x.ldc, x.stride_c, x.count);
        return;
    }
    const int64_t sizes[] = {x.m, x.n, x.k, x.a.ld, x.b.ld, x.ldc, x.count};
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    for (int64_t size : sizes)
        if (size > INT_MAX) status = CUBLAS_STATUS_INVALID_VALUE;
    if (status == CUBLAS_STATUS_SUCCESS) {
        if (ls_products_count(x.m, x.n, x.k, x.count)) list(x, precision);
        status = products(q, x, precision);
    }
    if (status != CUBLAS_STATUS_SUCCESS) keep(q, status, x.m, x.n, x.k, x.count);
}

static void batch_of(ls_queue *q, ls_precision precision, int transpose_a, int transpose_b, int64_t m, int64_t n,
                     int64_t k, double alpha, const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b,
                     int64_t ldb, int64_t stride_b, double beta, ls_real *c, int64_t ldc, int64_t stride_c,
                     int64_t count)
{
    const operand<ls_real> A = {a, transpose_a, lda, stride_a, 0}, B = {b, transpose_b, ldb, stride_b, 0};
    multiply<ls_real>(q, {m, n, k, count, alpha, beta, A, B, c, ldc, stride_c, 0}, precision);
}

void ls_gemm_batch(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b, int64_t ldb, int64_t stride_b,
                   double beta, ls_real *c, int64_t ldc, int64_t stride_c, int64_t count)
{
    batch_of(q, q->precision, transpose_a, transpose_b, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c,
             ldc, stride_c, count);
}

void ls_gemm_batch_in(ls_queue *q, ls_precision precision, int transpose_a, int transpose_b, int64_t m, int64_t n,
                      int64_t k, double alpha, const ls_real *a, int64_t lda, int64_t stride_a, const ls_real *b,
                      int64_t ldb, int64_t stride_b, double beta, ls_real *c, int64_t ldc, int64_t stride_c,
                      int64_t count)
{
    batch_of(q, precision, transpose_a, transpose_b, m, n, k, alpha, a, lda, stride_a, b, ldb, stride_b, beta, c, ldc,
             stride_c, count);
}

void ls_gemm_batch_double(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                          const double *a, int64_t lda, int64_t stride_a, const double *b, int64_t ldb,
                          int64_t stride_b, double beta, double *c, int64_t ldc, int64_t stride_c, int64_t count)
{
    const operand<double> A = {a, transpose_a, lda, stride_a, 0}, B = {b, transpose_b, ldb, stride_b, 0};
    multiply<double>(q, {m, n, k, count, alpha, beta, A, B, c, ldc, stride_c, 0}, LS_FLOAT32);
}

static operand<ls_real> matrix_of(ls_operand x, int transpose, int64_t ld)
{
    return {static_cast<const ls_real *>(x.p), transpose, ld, 0, ls_is_narrow(x)};
}

void ls_gemm_operands(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, ls_operand a,
                      int64_t lda, ls_operand b, int64_t ldb, double beta, ls_operand c, int64_t ldc)
{
    multiply<ls_real>(q,
                      {m, n, k, 1, 1, beta, matrix_of(a, transpose_a, lda), matrix_of(b, transpose_b, ldb),
                       static_cast<ls_real *>(c.p), ldc, 0, ls_is_narrow(c)},
                      q->precision);
}

template <typename T> static void repeat(ls_queue *q, const ls_product *p, const void *a, const void *b, void *c)
{
    const operand<T> A = {static_cast<const T *>(a), (int)p->transpose_a, p->lda, p->stride_a, (int)p->narrow_a};
    const operand<T> B = {static_cast<const T *>(b), (int)p->transpose_b, p->ldb, p->stride_b, (int)p->narrow_b};
    multiply<T>(q,
                {p->m, p->n, p->k, p->batch, 1, p->adds ? 1.0 : 0.0, A, B, static_cast<T *>(c), p->ldc, p->stride_c,
                 (int)p->narrow_c},
                (ls_precision)p->precision);
}

extern "C" void ls_product_repeat_cuda(ls_queue *q, const ls_product *p, const void *a, const void *b, void *c)
{
    if (p->in_double)
        repeat<double>(q, p, a, b, c);
    else
        repeat<ls_real>(q, p, a, b, c);
}

/* (b,h) is number b * H + h of a batch where the strides allow it: one call instead of B or H. */
static int in_a_row(ls_view v, int64_t H)
{
    return v.sb == v.sh * H;
}

void ls_gemm_heads(ls_queue *q, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
                   ls_view a, ls_view b, double beta, ls_view c, int64_t B, int64_t H)
{
    const int all = (in_a_row(a, H) && in_a_row(b, H) && in_a_row(c, H)) || B == 1; /* numbers b * H + h */
    const int by_row = !all && H > 1 && B <= H;                                     /* else by head: H calls */
    const int64_t calls = all ? 1 : by_row ? B : H, count = all ? B * H : by_row ? H : B;
    for (int64_t i = 0; i < calls; i++)
        batch_of(q, q->precision, transpose_a, transpose_b, m, n, k, alpha, a.p + i * (by_row ? a.sb : a.sh), a.st,
                 all || by_row ? a.sh : a.sb, b.p + i * (by_row ? b.sb : b.sh), b.st, all || by_row ? b.sh : b.sb, beta,
                 c.p + i * (by_row ? c.sb : c.sh), c.st, all || by_row ? c.sh : c.sb, count);
}
