/* Learning-rate schedules and AdamW on the tensors of a model: the same arithmetic on every rank. */
#ifndef LS_OPTIM_H
#define LS_OPTIM_H

#include "adam.h"
#include "model.h"

/* Learning rate of step (1-based): linear warm-up, then cosine to min_learning_rate at `steps`, or ~ 1/sqrt(step). */
double schedule_rate(const config *c, int64_t step);
/* Sequence length warm-up (Li et al., 2021): what documents are cut to at a step (1-based), `full` being their cut or
 * longest length otherwise. train.short_length for train.short_steps steps, then growing by the same factor each step
 * over train.lengthen_steps, then full. */
int64_t schedule_length(const config *c, int64_t step, int64_t full);
/* One update with bias correction for step (1-based), decay on tensors that want it. squares: what ops->squares made of
 * g, for clipping by train.clip_norm; where it, or *loss (may be NULL), is not finite, nothing changes. All vectors are
 * where ops works. */
void adamw_step(const ls_adam_ops *ops, ls_queue *queue, const config *c, const model *m, int64_t step, double rate,
                const double *squares, const ls_real *loss, const ls_real *g, ls_real *params, ls_real *adam_m,
                ls_real *adam_v);

#endif
