/* One optimizer step over all ranks, apart from where its documents come from: what `train` takes and `bench` times.
 *
 * Groups of ranks take contiguous runs of the global batch, and work through them in train.accumulation micro-batches;
 * loss and gradient are scaled by the labels of the whole batch, so that one all-reduce of the gradients, with a few
 * scalars at their end, makes the sums of a single rank. All ranks then make the same update.
 *
 * On a GPU a step is queued from its first micro-batch to its update, and the host waits once, for the few numbers that
 * it tells of. (By way of host memory, without NCCL, it is MPI that carries what crosses ranks: then the host also
 * waits for each message and for each part of the gradients. And local as cross attention waits for the keys that it
 * has chosen.)
 *
 *   sequence   zero | micro-batch ... | tail | mine              | waits for summed | squares | numbers, read | update
 *   gradients                                | waits for mine, all-reduce, summed
 *   host                                                                              waits for read
 *
 * What the host gives to the device is copied before it is used again: batches and the tail's numbers through pinned
 * memory of the queue (to_device). What it gets, `numbers`, is read after the mark, and written again by the next step.
 */
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
    double *sums;    /* (LS_LOSS_SUMS): of the micro-batches so far, see model_gradient */
    training_state s;
    int64_t seen; /* labels of this rank's micro-batches so far */
    struct step_numbers *numbers;
    ls_mark *mine, *summed, *read; /* this rank's gradients are there; those of all; numbers are on the host */
} stepper;

/* Of the whole global batch, per label, the same on every rank. */
typedef struct step_sums {
    double loss, nll;
    double tokens;  /* labels that were seen, of those that there are: 1 */
    int stop;       /* some rank passed one */
    double squares; /* Σ gradient² */
    int updated;    /* 0: loss or squares are not finite, and nothing changes */
} step_sums;

/* Collective, after ranks_split: the model and room for its parameters, gradients and optimizer, all 0. */
ls_status stepper_create(ranks *r, const config *c, stepper *t);
void stepper_free(stepper *t);
/* The parameters' first values, of train.seed. Local. */
ls_status stepper_init(stepper *t);
/* The sequences [lo, hi) of the global batch that are micro-batch a of this rank's group; there may be none. */
void stepper_piece(const stepper *t, int64_t a, int64_t *lo, int64_t *hi);
/* A step: begin; then for each micro-batch that is not empty stepper_add, collective over the sequence; then
 * stepper_end, collective over all ranks, which updates with the learning rate where all is finite. labels: of the
 * whole global batch. b may be changed as soon as stepper_add returns. */
void stepper_begin(stepper *t);
ls_status stepper_add(stepper *t, const batch *b, int64_t labels);
ls_status stepper_end(stepper *t, int64_t labels, int stop, double rate, step_sums *out);

#endif
