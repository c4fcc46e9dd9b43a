/* Inside of the public attention objects, shared by attention.c and state.c. */
#ifndef LS_ATTENTION_H
#define LS_ATTENTION_H

#include "run.h"

struct ls_attention {
    ls_context *ctx;
    const ls_mechanism *mechanism;
    ls_attention_options options;
    int count, projections; /* parameters in all; the first ones are the layer's projections */
    int64_t reals;
    ls_param_info param[LS_MAX_PARAMS];
};

/* The projections' places in param[], weight then bias. */
enum { Q_PROJ = 0, K_PROJ = 2, V_PROJ = 4, OUT_PROJ = 6, PROJECTIONS = 8 };

static inline const ls_real *ls_param_of(const ls_attention *a, const ls_real *params, int i)
{
    return params + a->param[i].offset;
}

/* A (B,H,n,d) view of memory in a layout. */
ls_view ls_view_of(const ls_attention *a, const ls_real *p, int64_t B, int64_t n);

/* The pass of a call without its tensors: problem, options, streams. */
void ls_pass_begin(const ls_attention *a, int64_t B, int64_t T, int64_t S, const ls_real *params, ls_pass *pass);

/* y (rows,E) = projection `which` of x, rows where pad is 1 set to 0 afterwards if zero_rows. */
void ls_project(const ls_attention *a, int which, int64_t rows, const ls_real *x, const ls_real *params, ls_real *y);

#endif
