#include "optim.h"

#include <math.h>
#include <tgmath.h> /* sqrt of ls_real in its own precision, so that the loop below is vector code */

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

double gradient_norm(const ls_real *g, int64_t n)
{
    enum { LANES = 16 }; /* separate sums, added in this order whatever the compiler does with the loop */
    double lane[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; k++) lane[k] += (double)g[i + k] * (double)g[i + k];
    }
    for (; i < n; i++) lane[0] += (double)g[i] * (double)g[i];
    for (int k = 0; k < LANES; k++) sum += lane[k];
    return sqrt(sum);
}

void adamw_update(const config *c, const model *m, int64_t step, double rate, double clip, ls_real *params,
                  const ls_real *g, ls_real *adam_m, ls_real *adam_v)
{
    const double t = (double)step;
    const ls_real b1 = (ls_real)c->train.beta1, a1 = (ls_real)(1 - c->train.beta1);
    const ls_real b2 = (ls_real)c->train.beta2, a2 = (ls_real)(1 - c->train.beta2);
    const ls_real unbias1 = (ls_real)(1 / (1 - pow(c->train.beta1, t)));
    const ls_real unbias2 = (ls_real)(1 / (1 - pow(c->train.beta2, t)));
    const ls_real epsilon = (ls_real)c->train.epsilon, r = (ls_real)rate, s = (ls_real)clip;
    for (int k = 0; k < model_num_tensors(m); k++) {
        const model_tensor *tensor = model_tensor_at(m, k);
        const ls_real decay = tensor->decay ? (ls_real)(rate * c->train.weight_decay) : 0;
        ls_real *restrict p = params + tensor->offset;
        ls_real *restrict mean = adam_m + tensor->offset;
        ls_real *restrict square = adam_v + tensor->offset;
        const ls_real *restrict grad = g + tensor->offset;
        for (int64_t i = 0; i < tensor->count; i++) {
            const ls_real x = s * grad[i];
            mean[i] = b1 * mean[i] + a1 * x;
            square[i] = b2 * square[i] + a2 * x * x;
            p[i] -= decay * p[i] + r * (unbias1 * mean[i]) / (sqrt(unbias2 * square[i]) + epsilon);
        }
    }
}
