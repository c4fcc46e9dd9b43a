/* AdamW (Loshchilov & Hutter, 2019) and learning-rate schedules: the same arithmetic on every rank. */
#ifndef LS_OPTIM_H
#define LS_OPTIM_H

#include "model.h"

/* Learning rate of step (1-based): linear warm-up, then cosine to min_learning_rate at `steps`, or ~ 1/sqrt(step). */
double schedule_rate(const config *c, int64_t step);
/* Sequence length warm-up (Li et al., 2021): what documents are cut to at a step (1-based), `full` being their cut or
 * longest length otherwise. train.short_length for train.short_steps steps, then growing by the same factor each step over
 * train.lengthen_steps, then full. */
int64_t schedule_length(const config *c, int64_t step, int64_t full);
/* sqrt(Σ g²), summed in double in a fixed order. */
double gradient_norm(const ls_real *g, int64_t n);
/* One update with bias correction for step (1-based); g is scaled by clip first; decay on tensors that want it. */
void adamw_update(const config *c, const model *m, int64_t step, double rate, double clip, ls_real *params,
                  const ls_real *g, ls_real *adam_m, ls_real *adam_v);

#endif
