/* cosFormer on a GPU: the feature map of cosformer.c, number by number; the phases are those of linear.cu. */
#include "linear_cuda.h"

extern "C" {
#include "cosformer.h"
}

__global__ static void relu(int64_t n, const ls_real *x, ls_real *y)
{
    LS_EACH(i, n) y[i] = ls_relu(x[i]);
}

__global__ static void one_plus_elu(int64_t n, const ls_real *x, ls_real *y)
{
    LS_EACH(i, n) y[i] = ls_one_plus_elu(x[i]);
}

__global__ static void relu_backward(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx)
{
    LS_EACH(i, n) dx[i] = ls_relu_backward(x[i], dy[i]);
}

__global__ static void one_plus_elu_backward(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx)
{
    LS_EACH(i, n) dx[i] = ls_one_plus_elu_backward(x[i], dy[i]);
}

static void activate(ls_pass *p, int64_t n, const ls_real *rows, ls_real *a)
{
    const int64_t all = p->H * n * p->d;
    const int blocks = ls_blocks(all, LS_THREADS);
    if ((int)p->option[ACT] == RELU)
        LS_LAUNCH(p->queue, relu, blocks, LS_THREADS, 0, all, rows, a);
    else
        LS_LAUNCH(p->queue, one_plus_elu, blocks, LS_THREADS, 0, all, rows, a);
}

static void keys(ls_pass *p, int64_t n, const ls_real *rows, ls_real *b, ls_real *top)
{
    (void)top;
    activate(p, n, rows, b);
}

static void backward(ls_pass *p, int64_t n, const ls_real *rows, const ls_real *dy, ls_real *drows)
{
    const int64_t all = p->H * n * p->d;
    const int blocks = ls_blocks(all, LS_THREADS);
    if ((int)p->option[ACT] == RELU)
        LS_LAUNCH(p->queue, relu_backward, blocks, LS_THREADS, 0, all, rows, dy, drows);
    else
        LS_LAUNCH(p->queue, one_plus_elu_backward, blocks, LS_THREADS, 0, all, rows, dy, drows);
}

extern "C" {
const ls_feature_map_cuda ls_cosformer_map_cuda = {
    .prepare = NULL, .queries = activate, .keys = keys, .queries_backward = backward, .keys_backward = backward};
const ls_cuda_mechanism ls_cosformer_cuda = {
    .plan = ls_linear_cuda_plan, .kernel = ls_linear_cuda_kernels, .host_bytes = NULL};
}
