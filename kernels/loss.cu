/* Cross-entropy on a GPU: a warp for each row. See loss.c for the formula. */
#include "dense_cuda.h"

namespace ls_dense
{

constexpr int MOST_PARTS = (LS_LOSS_SUMS - 2) / 2;

/* part (blocks, 2): the sums of each block's rows. dlogits may be logits. */
__global__ static void loss_rows(int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                                 double smoothing, double grad_scale, ls_real *dlogits, double *part)
{
    __shared__ double scratch[LS_WARP];
    double total = 0, total_nll = 0; /* of lane 0's rows */
    LS_EACH_ROW(r, rows)
    {
        const ls_real *l = logits + r * V;
        ls_real *dl = dlogits ? dlogits + r * V : NULL;
        const int64_t label = target[r];
        if (label < 0) {
            LS_EACH_LANE(v, dl ? V : 0)
            dl[v] = 0;
            continue;
        }
        const double at_label = (double)l[label];
        ls_real m = -INFINITY;
        double all = 0, z = 0;
        LS_EACH_LANE(v, V)
        {
            m = l[v] > m ? l[v] : m; /* NaN loses every comparison; the exps let it through */
            all += (double)l[v];
        }
        m = ls_warp_max(m);
        const double mean = ls_warp_sum(all) / (double)V;
        __syncwarp(); /* every lane has read the label's logit before it is overwritten */
        LS_EACH_LANE(v, V)
        {
            const ls_real e = ls_exp(l[v] - m);
            if (dl) dl[v] = e;
            z += (double)e;
        }
        z = ls_warp_sum(z);
        const double log_z = (double)m + log(z);
        if (threadIdx.x % LS_WARP == 0) {
            total_nll += log_z - at_label;
            total += (1 - smoothing) * (log_z - at_label) + (smoothing > 0 ? smoothing * (log_z - mean) : 0);
        }
        const ls_real a = (ls_real)(grad_scale / z), c = (ls_real)(grad_scale * smoothing / (double)V);
        LS_EACH_LANE(v, dl ? V : 0)
        dl[v] = a * dl[v] - c - (v == label ? (ls_real)(grad_scale * (1 - smoothing)) : 0);
    }
    total = ls_block_sum(total, scratch);
    total_nll = ls_block_sum(total_nll, scratch);
    if (threadIdx.x == 0) part[2 * blockIdx.x] = total, part[2 * blockIdx.x + 1] = total_nll;
}

__global__ static void add_losses(int parts, double *sums)
{
    __shared__ double scratch[LS_WARP];
    double total = 0, total_nll = 0;
    for (int i = (int)threadIdx.x; i < parts; i += (int)blockDim.x)
        total += sums[2 + 2 * i], total_nll += sums[3 + 2 * i];
    total = ls_block_sum(total, scratch);
    total_nll = ls_block_sum(total_nll, scratch);
    if (threadIdx.x == 0) sums[0] += total, sums[1] += total_nll;
}

void cross_entropy(ls_queue *queue, int64_t rows, int64_t V, const ls_real *logits, const int32_t *target,
                   double smoothing, double grad_scale, ls_real *dlogits, double *sums)
{
    if (rows <= 0) return;
    const int parts = (int)ls_min(ls_row_blocks(rows), MOST_PARTS);
    LS_LAUNCH(queue, loss_rows, parts, LS_THREADS, 0, rows, V, logits, target, smoothing, grad_scale, dlogits,
              sums + 2);
    LS_LAUNCH(queue, add_losses, 1, LS_THREADS, 0, parts, sums);
}

} // namespace ls_dense
