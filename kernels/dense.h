/* What stands between attentions in an encoder-decoder model: local to a rank, row by row. Rows are (B,T), batch first;
 * `rows` = B*T. Parameter gradients accumulate (+=), activation gradients overwrite (=) unless said otherwise.
 * None of these allocates, waits or fails; on a GPU what went wrong comes to light where the queue is asked. All
 * pointers are to memory of the device; `queue` is NULL on the CPU. Where in and out may be the same pointer, it is
 * said.
 *
 * An ls_operand is ls_real, or bfloat16 on a GPU whose queue rounds operands to it. Who makes rows for a product gives
 * it them so: half the memory goes by, and the product need not copy them. */
#ifndef LS_DENSE_H
#define LS_DENSE_H

#include "device.h"
#include "real.h"

/* Dropout: element e of row (b, lo + t) is kept or not by (seed, stream, sample + b, lo + t, e) alone, so that the
 * backward pass is the same call on the gradient. What is kept is divided by 1 - rate; rate 0: all is kept. */
typedef struct ls_drop {
    double rate;
    uint64_t seed;
    uint32_t stream;
    uint64_t sample;
    int64_t lo;
} ls_drop;

/* What cross_entropy adds to, in doubles: the first two numbers are the sums, the others its own to work in. */
enum { LS_LOSS_SUMS = 2 + 2 * 512 };

typedef struct ls_dense_ops {
    /* y (rows,out) = x (rows,in) wᵀ + b, w (out,in), b (out) or NULL. Where y is bfloat16, b is rounded, too. */
    void (*linear)(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w, const ls_real *b,
                   ls_operand y);
    /* The same, but the bits of a row of y depend on its row of x alone, and not on how many rows there are: for what
     * is rounded or compared afterwards, which must not come out otherwise where the rows are spread over other ranks.
     * Slower: BLAS sums the rows at the edge of its tiles in another order. */
    void (*linear_alike)(ls_queue *queue, int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w,
                         const ls_real *b, ls_real *y);
    /* The same as linear in another precision than the queue's, and no coarser. */
    void (*linear_in)(ls_queue *queue, ls_precision precision, int64_t rows, int64_t in, int64_t out, const ls_real *x,
                      const ls_real *w, const ls_real *b, ls_real *y);
    /* dx = dy w (dx.p NULL: not wanted; accumulate_dx: +=, of ls_real), dw += dyᵀ x. The bias's gradient is a sum of
     * dy, below. */
    void (*linear_backward)(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w,
                            ls_operand dy, ls_operand dx, int accumulate_dx, ls_real *dw);
    /* sum (n) += Σ_rows x (rows,n) */
    void (*column_sums)(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, ls_real *sum);
    /* The same, and y = x on the way. */
    void (*sum_and_copy)(ls_queue *queue, int64_t rows, int64_t n, const ls_real *x, ls_real *sum, ls_operand y);

    /* y = (x - mean) * rstd * w + b over the last axis E (Ba et al., 2016), eps 1e-5. mean, rstd (rows) are kept. */
    void (*layer_norm)(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b,
                       ls_operand y, ls_real *mean, ls_real *rstd);
    /* dx (=, or += with accumulate_dx; may be dy itself without it). */
    void (*layer_norm_backward)(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                                const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx,
                                int accumulate_dx, ls_real *dw, ls_real *db);

    /* y (rows,n) = f(x + b), f exact (erf) gelu or relu, b (n) or NULL; y may be x. dx = dy f'(x + b); may be dy. */
    void (*gelu)(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y);
    void (*gelu_backward)(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx);
    void (*relu)(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y);
    void (*relu_backward)(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx);

    /* y (rows,E) = table (V,E)[token] * scale; a token < 0 (padding) gives a row of 0. Tokens were checked against V
     * when read. */
    void (*embedding)(ls_queue *queue, int64_t rows, int64_t E, const int32_t *token, const ls_real *table,
                      double scale, ls_real *y);
    void (*embedding_backward)(ls_queue *queue, int64_t rows, int64_t V, int64_t E, const int32_t *token, double scale,
                               const ls_real *dy, ls_real *dtable);

    /* x (B,T,E) += pe(position), position = lo + t: pe = [sin(p f_0) .. sin(p f_{E/2-1}), cos(p f_0) ..],
     * f_i = 10000^(-2i/E) (Vaswani et al., 2017). E odd: the last column gets nothing. Accurate for positions to 2^31.
     */
    void (*add_positions)(ls_queue *queue, int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x);

    /* y (B,T,E) = x, dropped; y may be x. */
    void (*dropout)(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *x, ls_operand y);
    /* y (B,T,E) = x + (branch + b), the latter dropped; b (E) or NULL, y may be x. */
    void (*residual)(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *branch,
                     const ls_real *b, const ls_real *x, ls_real *y);

    /* Cross-entropy with label smoothing: per row (1-s)·(-log p_target) + s·mean_v(-log p_v). Rows with target < 0 are
     * ignored (their gradient is 0). dlogits = grad_scale · d sum / d logits, may be logits itself, NULL: not wanted.
     * sums (LS_LOSS_SUMS): sums[0] += the sum over rows, sums[1] += Σ -log p_target without smoothing. */
    void (*cross_entropy)(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                          double smoothing, double grad_scale, ls_real *dlogits, double *sums);

    /* y = x, rows of x (B,T,E), or (T,B,E) with batch_first 0, whose pad (B,T) is 1 become 0 (y may be x). pad NULL:
     * none is. */
    void (*zero_rows)(ls_queue *queue, int64_t B, int64_t T, int64_t E, int batch_first, const uint8_t *pad,
                      const ls_real *x, ls_operand y);

    void (*add)(ls_queue *queue, int64_t n, const ls_real *x, ls_real *y);                 /* y += x */
    void (*copy)(ls_queue *queue, int64_t n, ls_operand x, ls_operand y);                  /* y = x */
    void (*divide)(ls_queue *queue, int64_t n, const double *sums, double by, ls_real *y); /* y = sums / by */
    void (*zero)(ls_queue *queue, size_t bytes, void *x);
} ls_dense_ops;

extern const ls_dense_ops ls_dense_cpu, ls_dense_cuda;

/* NULL: this build has no such backend. */
static inline const ls_dense_ops *ls_dense_of(ls_device device)
{
    return device == LS_CPU ? &ls_dense_cpu : device == LS_CUDA ? LS_IF_CUDA(&ls_dense_cuda) : NULL;
}

/* Part of ls_dense_cpu, in loss.c. */
void ls_cross_entropy_cpu(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                          double smoothing, double grad_scale, ls_real *dlogits, double *sums);

#endif
