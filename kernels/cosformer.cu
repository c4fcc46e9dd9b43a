/* cosFormer on a GPU: the feature map of cosformer.c; the phases are those of linear.cu, whose kernels make features by
 * themselves, but for short sequences of keys: those take them row by row, a warp for each. */
#include "linear_cuda.h"

extern "C" {
#include "cosformer.h"
}

using namespace ls_linear;

/* y (R,d): rows that are there, activated. */
__global__ static void activate_rows(slab s, int64_t d, int act, ls_view rows, const uint8_t *pad, ls_real *y)
{
    LS_EACH_ROW(R, rows_of(s))
    {
        const place at = place_of(s, R);
        if (!is_there(s, pad, at)) continue;
        const ls_real *x = ls_row(rows, at.b, at.h, at.t);
        LS_EACH_LANE(e, d) y[R * d + e] = ls_linear_act(act, x[e]);
    }
}

__global__ static void activate_rows_backward(slab s, int64_t d, int act, ls_view rows, const uint8_t *pad,
                                              const ls_real *dy, ls_view drows, int add)
{
    LS_EACH_ROW(R, rows_of(s))
    {
        const place at = place_of(s, R);
        if (at.t >= s.rows) continue;
        const int there = is_there(s, pad, at);
        const ls_real *x = ls_row(rows, at.b, at.h, at.t);
        ls_real *to = ls_row(drows, at.b, at.h, at.t);
        LS_EACH_LANE(e, d)
        {
            const ls_real g = there ? dy[R * d + e] : 0;
            const ls_real dx = there ? ls_linear_act_backward(act, x[e], g) : 0;
            to[e] = add ? to[e] + dx : dx;
        }
    }
}

static void activate(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, ls_real *y)
{
    LS_LAUNCH(p->queue, activate_rows, ls_row_blocks(rows_of(s)), LS_THREADS, 0, s, p->d, act_of(p), rows, pad, y);
}

static void backward(ls_pass *p, slab s, ls_view rows, const uint8_t *pad, const ls_real *dy, ls_view drows, int add)
{
    LS_LAUNCH(p->queue, activate_rows_backward, ls_row_blocks(rows_of(s)), LS_THREADS, 0, s, p->d, act_of(p), rows, pad,
              dy, drows, add);
}

static void queries(ls_pass *p, slab s, ls_real *a)
{
    activate(p, s, p->q, p->pad_q, a);
}

static void keys(ls_pass *p, slab s, ls_real *b, ls_real *top)
{
    (void)top;
    activate(p, s, p->own.k, p->own.pad, b);
}

static void queries_backward(ls_pass *p, slab s, const ls_real *da)
{
    backward(p, s, p->q, p->pad_q, da, p->dq, 0);
}

static void keys_backward(ls_pass *p, slab s, const ls_real *db, int add)
{
    backward(p, s, p->own.k, p->own.pad, db, p->own.dk, add);
}

extern "C" {
const ls_feature_map_cuda ls_cosformer_map_cuda = {.prepare = NULL,
                                                   .act = act_of,
                                                   .queries = queries,
                                                   .keys = keys,
                                                   .queries_backward = queries_backward,
                                                   .keys_backward = keys_backward};
const ls_cuda_mechanism ls_cosformer_cuda = {
    .plan = ls_linear_cuda_plan, .kernel = ls_linear_cuda_kernels, .host_bytes = NULL, .takes_narrow = NULL};
}
