/* RUN/metrics.jsonl: one JSON object a line, appended and flushed by rank 0 after every step and every evaluation.
 *
 * step:        step, samples, tokens (labels of this step), loss (objective, nats per token), nll (without smoothing),
 *              grad_norm (before clipping), lr, seconds (wall clock of rank 0), tokens_per_second,
 *              bytes_exchanged (this step, sent by all ranks for attention; not the sum of gradients, which MPI or NCCL
 *              moves in ways of its own),
 *              peak_memory_bytes (of the processes so far, summed over ranks), peak_device_memory_bytes (the same of
 *              what they had of their GPUs; 0 on the CPU), order (digest of the batch's documents)
 * evaluation:  step, valid_nll (nats per token), valid_bits_per_byte, valid_tokens, valid_documents, valid_seconds,
 * best
 */
#ifndef LS_METRICS_H
#define LS_METRICS_H

#include "status.h"

typedef struct step_metrics {
    int64_t step, steps, samples, tokens;
    double loss, nll, grad_norm, rate, seconds;
    uint64_t bytes_exchanged, peak_memory, peak_device_memory, order;
} step_metrics;

typedef struct evaluation_metrics {
    int64_t step, tokens, documents;
    double nll, bits_per_byte, seconds;
    int best;
} evaluation_metrics;

typedef struct metrics metrics;

/* Keeps the lines up to and including step `resumed` and goes on after them, so that no step is told twice; 0: a new
 * run, or one from another directory: lines that are there are put aside, under another name. *evaluated: the last step
 * among them of which there is an evaluation, or -1. Rank 0 only, like everything here. */
ls_status metrics_open(const char *directory, int64_t resumed, int64_t *evaluated, metrics **m);
void metrics_close(metrics *m);
/* *owed: the step is told of, and no evaluation of it. Changes nothing. */
ls_status metrics_owe(const char *directory, int64_t step, int *owed);
/* Also shows the step to who is watching: a line redrawn on a terminal, a new line every few seconds elsewhere. */
ls_status metrics_step(metrics *m, const step_metrics *s);
ls_status metrics_evaluation(metrics *m, const evaluation_metrics *e);

#endif
