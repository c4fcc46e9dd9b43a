/* What stands between attentions in an encoder-decoder model: local to a rank, row by row. Rows are (B,T), batch first;
 * `rows` = B*T. Parameter gradients accumulate (+=), activation gradients overwrite (=) unless said otherwise.
 * None of these allocates or fails. Where in and out may be the same pointer, it is said. */
#ifndef LS_DENSE_H
#define LS_DENSE_H

#include "real.h"

/* y (rows,out) = x (rows,in) wᵀ + b, w (out,in), b (out) or NULL. */
void ls_linear(int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w, const ls_real *b, ls_real *y);
/* The same, but the bits of a row of y depend on its row of x alone, and not on how many rows there are: for what is
 * rounded or compared afterwards, which must not come out otherwise where the rows are spread over other ranks. Slower:
 * BLAS sums the rows at the edge of its tiles in another order. */
void ls_linear_alike(int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w, const ls_real *b,
                     ls_real *y);
/* dx = dy w (NULL: not wanted; accumulate_dx: +=), dw += dyᵀ x, db += Σ_rows dy (NULL where there is none). */
void ls_linear_backward(int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w, const ls_real *dy,
                        ls_real *dx, int accumulate_dx, ls_real *dw, ls_real *db);

/* y = (x - mean) * rstd * w + b over the last axis E (Ba et al., 2016), eps 1e-5. mean, rstd (rows) are kept. */
void ls_layer_norm(int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b, ls_real *y,
                   ls_real *mean, ls_real *rstd);
/* dx (=, or += with accumulate_dx; may be dy itself without it). */
void ls_layer_norm_backward(int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *mean,
                            const ls_real *rstd, const ls_real *dy, ls_real *dx, int accumulate_dx, ls_real *dw,
                            ls_real *db);

/* Exact (erf) gelu and relu; y may be x. dx may be dy. */
void ls_gelu(int64_t n, const ls_real *x, ls_real *y);
void ls_gelu_backward(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx);
void ls_relu(int64_t n, const ls_real *x, ls_real *y);
void ls_relu_backward(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx);

/* y (rows,E) = table[token] * scale; a token < 0 (padding) gives a row of 0. Tokens were checked against V when read. */
void ls_embedding(int64_t rows, int64_t E, const int32_t *token, const ls_real *table, double scale, ls_real *y);
void ls_embedding_backward(int64_t rows, int64_t E, const int32_t *token, double scale, const ls_real *dy,
                           ls_real *dtable);

/* x (B,T,E) += pe(position), position = lo + t: pe = [sin(p f_0) .. sin(p f_{E/2-1}), cos(p f_0) ..],
 * f_i = 10000^(-2i/E) (Vaswani et al., 2017). E odd: the last column gets nothing. Accurate for positions to 2^31. */
void ls_add_positions(int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x);

/* x (B,T,E) *= mask / (1 - rate) in place; the mask is a pure function of (seed, stream, sample + b, lo + t, e), so
 * the backward pass is the same call on the gradient. rate 0: nothing happens. */
void ls_dropout(int64_t B, int64_t T, int64_t E, double rate, uint64_t seed, uint32_t stream, uint64_t sample,
                int64_t lo, ls_real *x);

/* Cross-entropy with label smoothing: per row (1-s)·(-log p_target) + s·mean_v(-log p_v). Rows with target < 0 are
 * ignored (their gradient is 0). Returns the sum over rows, in double. dlogits = grad_scale · d sum / d logits, may be
 * logits itself, NULL: not wanted. nll: receives Σ -log p_target without smoothing; may be NULL. */
double ls_cross_entropy(int64_t rows, int64_t V, const ls_real *logits, const int32_t *target, double smoothing,
                        double grad_scale, ls_real *dlogits, double *nll);

/* Rows of x (B,T,E), or (T,B,E) with batch_first 0, whose pad (B,T) is 1 become 0 in y (may be x). pad NULL: copies. */
void ls_zero_rows(int64_t B, int64_t T, int64_t E, int batch_first, const uint8_t *pad, const ls_real *x, ls_real *y);

/* y += x */
void ls_add(int64_t n, const ls_real *x, ls_real *y);

#endif
