/* What the GPU's files of dense layers share. dense.cu has the linear layers and what is done to each element,
 * dense_sums.cu the sums over rows and the layer norm, dense_embedding.cu the embedding and positions, loss.cu the
 * cross-entropy. Three ways to divide the work:
 *
 *   elements     a thread for each, or for four or eight that lie side by side where n and the pointers allow
 *   rows         a warp for each: norms, loss, embedding; sums over a row are a warp's
 *   columns      a block has some of them, and a part of the rows or all: sums over rows, see dense_sums.cu, and the
 *                embedding's gradient */
#ifndef LS_DENSE_CUDA_H
#define LS_DENSE_CUDA_H

#include "cuda.h"

extern "C" {
#include "dense.h"
}

namespace ls_dense /* other files have types of these names, too */
{

/* Item i of rows that are read W numbers at once; T is ls_real or bfloat16. */
template <int W, typename T> __device__ static inline ls_few<W> load(const T *x, int64_t i)
{
    return ls_few_at<W>(x + i * W);
}
template <int W, typename T> __device__ static inline void store(T *x, int64_t i, const ls_few<W> &value)
{
    ls_put_few<W>(x + i * W, value);
}

/* The same of rows that may lie in bfloat16, and do where W is 8: all threads of a launch go the same way. */
template <int W> __device__ static inline ls_few<W> load(const ls_operand &x, int64_t i)
{
    return W == 8 || ls_is_narrow(x) ? load<W>(static_cast<const __nv_bfloat16 *>(x.p), i)
                                     : load<W>(static_cast<const ls_real *>(x.p), i);
}
template <int W> __device__ static inline void store(const ls_operand &x, int64_t i, const ls_few<W> &value)
{
    if (W == 8 || ls_is_narrow(x))
        store<W>(static_cast<__nv_bfloat16 *>(x.p), i, value);
    else
        store<W>(static_cast<ls_real *>(x.p), i, value);
}

/* Whether rows of n numbers there can be read by fours. */
static inline bool is_wide(const ls_real *p)
{
    return ls_is_four(p);
}
static inline bool is_wide(const ls_operand &x)
{
    return uintptr_t(x.p) % (size_t)(4 * x.size) == 0;
}
template <typename... P> static inline bool wide(int64_t n, const P &...p)
{
    return n % 4 == 0 && (is_wide(p) && ...);
}

/* Parts of ls_dense_cuda that dense.cu has not, see dense.h. dense_sums.cu: */
void column_sums(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, ls_real *sum);
void sum_and_copy(ls_queue *queue, int64_t rows, int64_t n, const ls_real *x, ls_real *sum, ls_operand y);
void layer_norm(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b,
                ls_operand y, ls_real *mean, ls_real *rstd);
void layer_norm_backward(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                         const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate_dx,
                         ls_real *dw, ls_real *db);
/* dense_embedding.cu */
void embedding(ls_queue *queue, int64_t rows, int64_t E, const int32_t *token, const ls_real *table, double scale,
               ls_real *y);
void embedding_backward(ls_queue *queue, int64_t rows, int64_t V, int64_t E, const int32_t *token, double scale,
                        const ls_real *dy, ls_real *dtable);
void add_positions(ls_queue *queue, int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x);
/* loss.cu */
void cross_entropy(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                   double smoothing, double grad_scale, ls_real *dlogits, double *sums);

} // namespace ls_dense

#endif
