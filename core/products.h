/* Which matrix products were asked for at the doors to BLAS and cuBLAS, by the calling thread: how many operations they
 * were, always; and, while someone keeps a list, how often each shape came. So that a program can tell what share of
 * its time its products need, and do them again by themselves. What kernels multiply on their own, without BLAS, is not
 * here. */
#ifndef LS_PRODUCTS_H
#define LS_PRODUCTS_H

#include "device.h"

/* C_i (m,n) = op(A_i) op(B_i), i < batch, `adds`: to what C held; row-major, ld* between rows, stride_* between
 * matrices. `precision`: an ls_precision, what operands were rounded to. `narrow_*`: lies in bfloat16. */
typedef struct ls_product {
    int64_t m, n, k, lda, ldb, ldc, batch, stride_a, stride_b, stride_c;
    int64_t transpose_a, transpose_b, adds, precision, in_double, narrow_a, narrow_b, narrow_c;
} ls_product;

typedef struct ls_products {
    int64_t kinds, room;
    struct {
        ls_product product;
        int64_t times;
    } * kind;
    int64_t last; /* kind that came last: the next is likely to be it, or the one after */
    int short_of_memory;
} ls_products;

/* Σ 2 m n k batch of the calling thread so far. A whole number while below 2^53. */
double ls_products_operations(void);
/* From now on the calling thread's products are put on this list; NULL: on none. The list begins as zeros; its memory
 * is given back by ls_products_free. */
void ls_products_keep(ls_products *list);
void ls_products_free(ls_products *list);
/* The largest reals (of a float's or double's size) that A, B, C of a product span. */
void ls_product_spans(const ls_product *p, int64_t *a, int64_t *b, int64_t *c);
/* The product through the door it came by, on other matrices: where the queue works, or of the host where that is NULL.
 * It is neither counted nor listed. */
void ls_product_repeat(ls_queue *queue, const ls_product *p, const void *a, const void *b, void *c);

/* ---- for the doors */

/* Counts 2 m n k batch operations; 1: someone keeps a list, and wants to be told of the product by ls_product_list. */
int ls_products_count(int64_t m, int64_t n, int64_t k, int64_t batch);
void ls_product_list(const ls_product *p);
/* In gemm_cuda.cu. */
void ls_product_repeat_cuda(ls_queue *queue, const ls_product *p, const void *a, const void *b, void *c);

#endif
