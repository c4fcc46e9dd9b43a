/* AdamW on a GPU: a row of blocks for each run of the parameters, a few runs a launch; the sum of squares in two steps,
 * by blocks and over them. */
#include "cuda.h"

extern "C" {
#include "adam.h"
}

constexpr int MOST_PARTS = LS_SQUARES - 1, RUNS = 100, EACH = 8;

__global__ static void square_parts(int64_t n, const ls_real *g, double *part)
{
    __shared__ double scratch[LS_WARP];
    double sum = 0;
    LS_EACH(i, n)
    sum += (double)g[i] * (double)g[i];
    sum = ls_block_sum(sum, scratch);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

__global__ static void add_parts(int parts, double *squares)
{
    __shared__ double scratch[LS_WARP];
    double sum = 0;
    for (int i = (int)threadIdx.x; i < parts; i += (int)blockDim.x) sum += squares[1 + i];
    sum = ls_block_sum(sum, scratch);
    if (threadIdx.x == 0) squares[0] = sum;
}

static void squares(ls_queue *queue, int64_t n, const ls_real *g, double *result)
{
    const int parts = (int)ls_min(ls_blocks(n, LS_THREADS * EACH), MOST_PARTS);
    LS_LAUNCH(queue, square_parts, parts, LS_THREADS, 0, n, g, result + 1);
    LS_LAUNCH(queue, add_parts, 1, LS_THREADS, 0, parts, result);
}

struct run_list {
    ls_adam_run run[RUNS];
};

__device__ static inline void put_four(ls_real *x, ls_four value)
{
    *reinterpret_cast<ls_four *>(x) = value;
}

/* By fours where the run begins on a boundary of four in all vectors, else, and what is left, one by one. */
__global__ static void update_runs(run_list list, ls_adam_numbers numbers, double clip_norm, const double *squares,
                                   const ls_real *loss, const ls_real *g, ls_real *params, ls_real *mean,
                                   ls_real *square)
{
    const ls_adam_run run = list.run[blockIdx.y];
    const ls_real scale = ls_adam_clip(clip_norm, squares[0], loss), decay = run.decays ? numbers.decay : 0;
    if (scale < 0) return;
    g += run.offset, params += run.offset, mean += run.offset, square += run.offset;
    const int wide = ls_is_four(g) && ls_is_four(params) && ls_is_four(mean) && ls_is_four(square);
    const int64_t fours = wide ? run.count / 4 : 0;
    LS_EACH(i, fours)
    {
        const ls_four slope = ls_four_at(g + 4 * i);
        ls_four p = ls_four_at(params + 4 * i), m = ls_four_at(mean + 4 * i), s = ls_four_at(square + 4 * i);
#pragma unroll
        for (int k = 0; k < 4; k++) ls_adam_element(&numbers, decay, scale * slope.v[k], p.v + k, m.v + k, s.v + k);
        put_four(params + 4 * i, p), put_four(mean + 4 * i, m), put_four(square + 4 * i, s);
    }
    LS_EACH(i, run.count - 4 * fours)
    {
        const int64_t at = 4 * fours + i;
        ls_adam_element(&numbers, decay, scale * g[at], params + at, mean + at, square + at);
    }
}

static void update(ls_queue *queue, const ls_adam_rule *rule, int runs, const ls_adam_run *run, const double *sum,
                   const ls_real *loss, const ls_real *g, ls_real *params, ls_real *mean, ls_real *square)
{
    const ls_adam_numbers numbers = ls_adam_prepare(rule);
    for (int first = 0; first < runs; first += RUNS) {
        const int n = (int)ls_min(RUNS, runs - first);
        run_list list = {};
        int64_t longest = 0;
        for (int i = 0; i < n; i++) {
            list.run[i] = run[first + i];
            longest = ls_max(longest, run[first + i].count);
        }
        const dim3 blocks((unsigned)ls_min(ls_blocks(longest, LS_THREADS * EACH), 256), (unsigned)n);
        LS_LAUNCH(queue, update_runs, blocks, LS_THREADS, 0, list, numbers, rule->clip_norm, sum, loss, g, params, mean,
                  square);
    }
}

extern "C" const ls_adam_ops ls_adam_cuda = {.squares = squares, .update = update};
