/* The model from inside: what model.c lays out, layers.c walks forward and backward, and decode.c steps through.
 *
 * Both stacks are chains of residual blocks y = x + drop(branch(norm x)); a branch is an attention or a feed-forward
 * net. A layer is 2 blocks of the encoder (attention, ffn) or 3 of the decoder (self, cross, ffn). Between the blocks
 * flows the residual stream, and it is all that this model keeps of a forward pass besides what attentions save:
 * normalised rows, hidden units and logits are cheaper to compute again than to keep. */
#ifndef LS_MODEL_INTERNAL_H
#define LS_MODEL_INTERNAL_H

#include "arena.h"
#include "context.h"
#include "dense.h"
#include "model.h"

/* Rows at a time through what is wider than the model: hidden units (F) and logits (V). On a CPU enough for a matrix
 * product to be efficient, few enough to stay in a cache: with E = 128, F = 512, chunks of 256 to 512 rows are 15 %
 * faster than all rows at once, which about pays for computing the hidden units twice. On a GPU the hidden units of a
 * chunk take a third of its second cache (40 MiB or more), so that the product, the activation and the next product
 * find them there; but products have as many rows as it takes to keep all of it busy. */
enum { CPU_ROWS = 512, LEAST_GPU_ROWS = 4096, MOST_GPU_ROWS = 16384, GPU_HIDDEN = 16 << 20 /* bytes */ };

/* Offsets in the flat vector of parameters. */
typedef struct norm_params {
    int64_t weight, bias;
} norm_params;
typedef struct ffn_params {
    int64_t weight0, bias0, weight1, bias1;
} ffn_params;

typedef enum { BLOCK_SELF, BLOCK_CROSS, BLOCK_FFN } block_kind;
typedef struct block {
    block_kind kind;
    norm_params norm;
    ffn_params ffn;
    ls_attention *attention; /* NULL for ffn */
    int64_t params;          /* of the attention: one contiguous run */
    ls_saved *saved;         /* under recompute that of the same block of layer 0 */
    uint32_t stream;         /* of the dropout on the branch */
} block;

typedef struct stack {
    int blocks, per_layer;
    block *block; /* (blocks) */
    norm_params norm;
    int64_t embedding;
    uint32_t stream; /* of the dropout on the embeddings */
    ls_real **x;     /* (blocks + 1): x[k] goes into block k; which of them share memory is decided by the plan */
} stack;

typedef enum { KEEP_NOTHING, KEEP_LAYERS, KEEP_BLOCKS } keeping;

/* Scratch rows (rows, E) and what is narrower or wider than them. */
typedef struct workspace {
    ls_real *normed, *branch, *mean, *rstd;
    ls_operand ready, dbranch; /* normed and the gradient of branch as products of a feed-forward net take them */
    ls_operand hidden, active, dhidden; /* (wide_rows, F) */
    ls_operand weight[2];               /* bf16: of the net, or the output's, as the products of all chunks take them */
    ls_real *logits;                    /* (wide_rows, V) */
    ls_real *dnormed, *dkey;
    ls_real *memory, *dmemory, *dtarget; /* encoder output, its gradient; the running gradient of the decoder */
    double *sums;                        /* (LS_LOSS_SUMS): of an evaluation */
    int32_t *token[3];                   /* GPU: the batch's source_token, input_token, label, */
    uint8_t *pad[2];                     /* source_pad and target_pad */
} workspace;

/* As in ls_param_info. */
typedef struct tensor_init {
    int kind;
    double scale;
} tensor_init;

struct model {
    ls_context *sequence;
    const ls_dense_ops *dense; /* of its device, and the queue that it works on */
    ls_queue *queue;
    config c;
    int64_t E, F, V;
    stack encoder, decoder;
    int64_t output; /* (V,E): the embedding table where tied */
    int num_tensors, max_tensors;
    model_tensor *tensor;
    tensor_init *init;
    int64_t count;
    ls_arena arena; /* activations and scratch of one call, as large as the largest call so far */
    workspace w;
};

static inline int64_t wide_rows(const model *m)
{
    const int64_t row = m->F * ls_operand_size(m->sequence);
    const int64_t fit = GPU_HIDDEN / row / 128 * 128; /* whole tiles of products */
    return m->queue == NULL ? CPU_ROWS : ls_max(LEAST_GPU_ROWS, ls_min(fit, MOST_GPU_ROWS));
}

/* One call: what every block of both stacks sees. */
typedef struct pass {
    const batch *b;                                    /* on the host */
    const int32_t *source_token, *input_token, *label; /* where the tensors are, from pass_begin on */
    const uint8_t *source_pad, *target_pad; /* never NULL: a rank without rows passes a mask where others do */
    const ls_real *params;
    ls_real *dparams;
    int training;
    keeping keep;
} pass;

/* Collective: sizes and places all memory of a pass, and brings the batch to the device; m->w and the x of both stacks
 * point into it until the next. */
ls_status pass_begin(model *m, pass *p, int with_target);
/* Collective: embeddings, blocks, final norm: fills m->w.memory. */
ls_status encoder_forward(model *m, const pass *p);
/* Collective: embeddings and blocks; the last x waits for its norm and the logits, which go by in chunks. */
ls_status decoder_forward(model *m, const pass *p);
/* W of the output as its products take it, until the next net. */
ls_operand output_weights(const model *m, const workspace *w, const ls_real *params);
/* rows <= wide_rows: w->ready (rows,E) = norm x, logits (rows,V) = ready Wᵀ. */
void output_logits(const model *m, const workspace *w, const ls_real *params, int64_t rows, const ls_real *x,
                   ls_operand output, ls_real *logits);
/* y = norm x; mean and rstd stay in w. */
void norm_forward(const model *m, const workspace *w, norm_params n, const ls_real *params, int64_t rows,
                  const ls_real *x, ls_operand y);
/* What comes behind a feed-forward net's product, as it does behind an attention, whose bias is in it: NULL. */
static inline const ls_real *branch_bias(const block *bl, const ls_real *params)
{
    return bl->kind == BLOCK_FFN ? params + bl->ffn.bias1 : NULL;
}
/* For what lies in x (n) as products take it: x itself, or in bf16 room of its own. */
ls_operand take_ready(const model *m, ls_arena *arena, const ls_real *x, int64_t n);
/* Room for the weights that chunks of rows meet; none where they are taken as they are. */
void take_weights(const model *m, ls_arena *arena, workspace *w);
/* branch (rows,E) = W1 act(W0 ready + b0). The bias b1 comes as the branch is added to its x. */
void ffn_forward(const model *m, const workspace *w, const ffn_params *f, const ls_real *params, int64_t rows);

#endif
