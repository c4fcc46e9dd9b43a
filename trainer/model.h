/* A pre-norm encoder-decoder (Vaswani et al., 2017; pre-norm: Xiong et al., 2020) over sharded sequences.
 *
 *   encoder layer: x += drop(attention(norm x)); x += drop(ffn(norm x)); a last norm
 *   decoder layer: x += drop(self(norm x)); x += drop(cross(norm x, encoder)); x += drop(ffn(norm x)); a last norm
 *   logits = x Wᵀ, W the embedding table where tied
 *
 * The model owns no parameters: they are one flat vector of model_count reals, tensors listed by name. Parameters and
 * their gradients live on the device of the model's context; batches, losses of an evaluation and logits on the host.
 */
#ifndef LS_MODEL_H
#define LS_MODEL_H

#include "config.h"
#include "data.h"

typedef struct model model;

typedef struct model_tensor {
    char name[96]; /* "encoder.0.attention.q_proj.weight", ... */
    int ndim;
    int64_t dim[4];
    int64_t offset, count;
    int decay; /* weight decay applies: matrices, not biases, norms and vectors */
} model_tensor;

/* Collective over `sequence`, the context of the ranks that share each sequence. */
ls_status model_create(ls_context *sequence, const config *c, model **m);
void model_free(model *m);
int model_num_tensors(const model *m);
const model_tensor *model_tensor_at(const model *m, int i);
int64_t model_count(const model *m);
/* Initial values, to host memory: a pure function of (seed, tensor index, element). */
void model_init(const model *m, uint64_t seed, ls_real *params);

typedef struct model_loss {
    double loss;    /* Σ over this rank's labels, smoothed */
    double nll;     /* Σ -ln p, without smoothing */
    int64_t tokens; /* labels of this rank */
} model_loss;

/* Collective over `sequence`. Forward only, no dropout. */
ls_status model_evaluate(model *m, const batch *b, const ls_real *params, model_loss *out);
/* Collective. Forward and backward: dparams += this rank's share of d (Σ loss) · grad_scale. Dropout on. sums
 * (LS_LOSS_SUMS), where the parameters are, gets what model_loss is made of: sums[0] += loss, sums[1] += nll. On a GPU
 * all this is queued and not waited for; b may be changed at once. */
ls_status model_gradient(model *m, const batch *b, const ls_real *params, double grad_scale, ls_real *dparams,
                         double *sums);
/* Bytes reserved so far on this rank for activations and scratch. */
size_t model_bytes(const model *m);

/* Incremental decoding against B sources (b->source_*), which are encoded once, of `beams` targets each: rows b beams
 * .. of them. Collective over `sequence`; every rank passes the same tokens and gets the same logits. */
typedef struct decoder decoder;
ls_status decoder_create(model *m, const batch *source, int64_t beams, int64_t max_length, const ls_real *params,
                         decoder **d);
void decoder_free(decoder *d);
/* token (B beams) at the next position -> logits (B beams, MODEL_VOCABULARY) for the one after it. */
ls_status decoder_step(decoder *d, const int32_t *token, const ls_real *params, ls_real *logits);
/* LS_ERR_NONFINITE where logits (MODEL_VOCABULARY) of what may follow are no numbers to choose by. Not collective. */
ls_status decoder_check(const ls_real *logits);
/* Row r (of B beams) goes on from what row from[r], of the same source, was. The same on every rank. */
ls_status decoder_reorder(decoder *d, const int64_t *from);

#endif
