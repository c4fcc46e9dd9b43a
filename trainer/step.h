/* One optimizer step over all ranks, apart from where its documents come from: what `train` takes and `bench` times.
 *
 * Groups of ranks take contiguous runs of the global batch, and work through them in train.accumulation micro-batches;
 * loss and gradient are scaled by the labels of the whole batch, so that one all-reduce of the gradients, with a few
 * scalars at their end, makes the sums of a single rank. All ranks then make the same update. */
#ifndef LS_STEP_H
#define LS_STEP_H

#include "trainer.h"

typedef struct stepper {
    ranks *r;
    const config *c;
    model *m;
    int64_t count; /* of parameters */
    /* where the tensors are, like the arrays of s: */
    ls_real *grads;  /* (count), and what travels behind them */
    double *squares; /* (LS_SQUARES): the first is Σ gradient² */
    training_state s;
} stepper;

/* Of the whole global batch, per label, the same on every rank. */
typedef struct step_sums {
    double loss, nll;
    double tokens;  /* labels that were seen, of those that there are: 1 */
    int stop;       /* some rank passed one */
    double squares; /* Σ gradient² */
} step_sums;

/* Collective, after ranks_split: the model and room for its parameters, gradients and optimizer, all 0. */
ls_status stepper_create(ranks *r, const config *c, stepper *t);
void stepper_free(stepper *t);
/* The parameters' first values, of train.seed. Local. */
ls_status stepper_init(stepper *t);
/* The sequences [lo, hi) of the global batch that are micro-batch a of this rank's group; there may be none. */
void stepper_piece(const stepper *t, int64_t a, int64_t *lo, int64_t *hi);
/* A step: begin; then for each micro-batch that is not empty stepper_add, collective over the sequence; then
 * stepper_sum, collective over all ranks; then, where all is finite, stepper_update with the learning rate. labels: of
 * the whole global batch. */
void stepper_begin(stepper *t);
ls_status stepper_add(stepper *t, const batch *b, int64_t labels, model_loss *mine);
ls_status stepper_sum(stepper *t, int64_t labels, const model_loss *mine, int stop, step_sums *out);
void stepper_update(stepper *t, double rate);

#endif
