#include "optim.h"

#include <math.h>

double schedule_rate(const config *c, int64_t step)
{
    const double highest = c->train.learning_rate, lowest = c->train.min_learning_rate;
    const double t = (double)step, warmup = (double)c->train.warmup_steps, end = (double)c->train.steps;
    if (t < warmup) return highest * t / warmup;
    switch (c->train.schedule) {
    case SCHEDULE_COSINE: {
        const double pi = 3.14159265358979323846;
        const double done = end > warmup ? fmin((t - warmup) / (end - warmup), 1) : 1;
        return t <= warmup ? highest : lowest + (highest - lowest) * 0.5 * (1 + cos(pi * done));
    }
    case SCHEDULE_INVERSE_SQRT:
        return fmax(lowest, highest * sqrt(fmax(warmup, 1) / t));
    default:
        return highest;
    }
}

int64_t schedule_length(const config *c, int64_t step, int64_t full)
{
    const int64_t low = c->train.short_length, after = step - c->train.short_steps;
    if (low == 0 || low >= full || after > c->train.lengthen_steps) return full;
    if (after <= 0) return low;
    const double part = (double)after / (double)(c->train.lengthen_steps + 1);
    return (int64_t)((double)low * pow((double)full / (double)low, part));
}

void adamw_step(const ls_adam_ops *ops, ls_queue *queue, const config *c, const model *m, int64_t step, double rate,
                const double *squares, const ls_real *loss, const ls_real *g, ls_real *params, ls_real *adam_m,
                ls_real *adam_v)
{
    enum { RUNS = 100 }; /* at a time */
    const ls_adam_rule rule = {.step = step,
                               .rate = rate,
                               .beta1 = c->train.beta1,
                               .beta2 = c->train.beta2,
                               .epsilon = c->train.epsilon,
                               .weight_decay = c->train.weight_decay,
                               .clip_norm = c->train.clip_norm};
    const int tensors = model_num_tensors(m);
    for (int first = 0; first < tensors; first += RUNS) {
        ls_adam_run run[RUNS];
        int n = 0;
        for (; n < RUNS && first + n < tensors; n++) {
            const model_tensor *t = model_tensor_at(m, first + n);
            run[n] = (ls_adam_run){.offset = t->offset, .count = t->count, .decays = t->decay};
        }
        ops->update(queue, &rule, n, run, squares, loss, g, params, adam_m, adam_v);
    }
}
