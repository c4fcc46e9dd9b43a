#include "adam.h"

static void squares(ls_queue *queue, int64_t n, const ls_real *g, double *result)
{
    (void)queue;
    enum { LANES = 16 }; /* separate sums, added in this order whatever the compiler does with the loop */
    double lane[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int k = 0; k < LANES; k++) lane[k] += (double)g[i + k] * (double)g[i + k];
    }
    for (; i < n; i++) lane[0] += (double)g[i] * (double)g[i];
    for (int k = 0; k < LANES; k++) sum += lane[k];
    result[0] = sum;
}

static void update_run(int64_t n, const ls_adam_numbers *numbers, ls_real decay, ls_real scale,
                       const ls_real *restrict g, ls_real *restrict params, ls_real *restrict mean,
                       ls_real *restrict square)
{
    const ls_adam_numbers own = *numbers; /* which no pointer can reach */
#pragma omp simd
    for (int64_t i = 0; i < n; i++) ls_adam_element(&own, decay, scale * g[i], params + i, mean + i, square + i);
}

static void update(ls_queue *queue, const ls_adam_rule *rule, int runs, const ls_adam_run *run, const double *sum,
                   const ls_real *loss, const ls_real *g, ls_real *params, ls_real *mean, ls_real *square)
{
    (void)queue;
    const ls_adam_numbers numbers = ls_adam_prepare(rule);
    const ls_real scale = ls_adam_clip(rule->clip_norm, sum[0], loss);
    for (int k = 0; k < runs && scale >= 0; k++) {
        const int64_t at = run[k].offset;
        update_run(run[k].count, &numbers, run[k].decays ? numbers.decay : 0, scale, g + at, params + at, mean + at,
                   square + at);
    }
}

const ls_adam_ops ls_adam_cpu = {.squares = squares, .update = update};
