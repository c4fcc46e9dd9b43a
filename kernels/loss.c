/* Cross-entropy with label smoothing. With p = softmax(l), Z = Σ_v exp(l_v - max l):
 *     -log p_v = max l + log Z - l_v
 *     loss     = (1-s)·(-log p_target) + s·avg_v(-log p_v)
 *     dloss/dl = p - s/V - (1-s)·[v = target]
 * A row is read twice: for its maximum, and for the exps, which are kept where the gradient goes and scaled in place.
 */
#include "dense.h"

/* Lanes of its own: compilers do not split a maximum that must keep its place among NaN and signed zeros. NaN loses
 * every comparison here; the exps let it through. */
static ls_real maximum(int64_t n, const ls_real *x)
{
    enum { LANES = 32 };
    ls_real lane[LANES];
    for (int j = 0; j < LANES; j++) lane[j] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (; i < n; i++) lane[0] = x[i] > lane[0] ? x[i] : lane[0];
    for (int j = 1; j < LANES; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return lane[0];
}

static double sum_of(int64_t n, const ls_real *x)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)x[i];
    return sum;
}

/* Σ exp(x - shift); the terms go to y (may be x) unless that is NULL. The sum follows the exps block by block, since
 * one loop that mixes float and double makes worse vector code than two. */
static double exp_sum(int64_t n, const ls_real *x, ls_real shift, ls_real *y)
{
    enum { BLOCK = 512 };
    ls_real block[BLOCK];
    double sum = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t m = ls_min(BLOCK, n - i);
        ls_real *e = y ? y + i : block;
#pragma omp simd
        for (int64_t j = 0; j < m; j++) e[j] = ls_exp(x[i + j] - shift);
        sum += sum_of(m, e);
    }
    return sum;
}

void ls_cross_entropy_cpu(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                          double smoothing, double grad_scale, ls_real *dlogits, double *sums)
{
    (void)queue;
    double total = 0, total_nll = 0;
    for (int64_t r = 0; r < rows; r++) {
        const ls_real *l = logits + r * V;
        ls_real *dl = dlogits ? dlogits + r * V : NULL;
        if (target[r] < 0) {
            if (dl) ls_zero(dl, V);
            continue;
        }
        const ls_real m = maximum(V, l);
        const double at_target = (double)l[target[r]], mean = smoothing > 0 ? sum_of(V, l) / (double)V : 0;
        const double z = exp_sum(V, l, m, dl), log_z = (double)m + log(z);
        total_nll += log_z - at_target;
        total += (1 - smoothing) * (log_z - at_target) + (smoothing > 0 ? smoothing * (log_z - mean) : 0);
        if (dl == NULL) continue;
        const ls_real a = (ls_real)(grad_scale / z), c = (ls_real)(grad_scale * smoothing / (double)V);
#pragma omp simd
        for (int64_t v = 0; v < V; v++) dl[v] = a * dl[v] - c;
        dl[target[r]] -= (ls_real)(grad_scale * (1 - smoothing));
    }
    sums[0] += total;
    sums[1] += total_nll;
}
