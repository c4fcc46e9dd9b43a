/* Linear attention on a GPU: what a mechanism's .cu file lends to it, and what it gets. */
#ifndef LS_LINEAR_CUDA_H
#define LS_LINEAR_CUDA_H

#include "cuda.h"

extern "C" {
#include "linear.h"

/* ls_feature_map on a GPU: launches of kernels for n rows of each head, rows (H,n,d), features (H,n,r), top (H,n). */
typedef struct ls_feature_map_cuda {
    void (*prepare)(ls_pass *);
    void (*queries)(ls_pass *, int64_t n, const ls_real *rows, ls_real *a);
    void (*keys)(ls_pass *, int64_t n, const ls_real *rows, ls_real *b, ls_real *top);
    void (*queries_backward)(ls_pass *, int64_t n, const ls_real *rows, const ls_real *da, ls_real *drows);
    void (*keys_backward)(ls_pass *, int64_t n, const ls_real *rows, const ls_real *db, ls_real *drows);
} ls_feature_map_cuda;

void ls_linear_cuda_plan(ls_pass *p, ls_arena *saved, ls_arena *work);
int64_t ls_linear_cuda_rows(const ls_pass *p); /* the most rows of a call, of all heads together */
extern const ls_cuda_kernel ls_linear_cuda_kernels[];
}

#endif
