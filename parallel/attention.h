/* Inside of the public attention objects, shared by attention.c, check.c and state.c. */
#ifndef LS_ATTENTION_H
#define LS_ATTENTION_H

#include "run.h"

/* The projections of a layer, in the order of its inputs; OUT_PROJ is the last of a->form. */
enum { Q_PROJ = 0, K_PROJ, V_PROJ, EXTRA_PROJ, OUT_PROJ, PROJECTIONS };

struct ls_attention {
    ls_context *ctx;
    const ls_mechanism *mechanism;
    ls_attention_options options;
    ls_layer_form form;
    int64_t H, d;                               /* as the core sees them */
    int count, own;                             /* parameters in all; the first that is the mechanism's own */
    int weight[PROJECTIONS], bias[PROJECTIONS]; /* places in param[], -1: there is none */
    int64_t reals;
    uint64_t signature; /* of the options */
    ls_param_info param[LS_MAX_PARAMS];
};

/* How far apart two rows of a call are, in numbers. */
int64_t ls_rows_apart(const ls_attention *a, int64_t batch);
static inline int ls_is_layer(const ls_attention *a)
{
    return a->options.level == LS_LEVEL_LAYER;
}

/* Widths of what projection `which` takes and gives. */
static inline int64_t ls_projection_in(const ls_attention *a, int which)
{
    return which == OUT_PROJ ? a->form.core_width : a->options.embed_dim;
}
static inline int64_t ls_projection_out(const ls_attention *a, int which)
{
    return which == OUT_PROJ ? a->options.embed_dim : a->form.input[which].width;
}
static inline int ls_has_projection(const ls_attention *a, int which)
{
    return a->weight[which] >= 0;
}

/* A (B,H,n,d) view of memory in a layout; rows of a layer, of any width, are one head. */
ls_view ls_view_of(const ls_attention *a, const ls_real *p, int64_t B, int64_t n);
ls_view ls_view_rows(const ls_attention *a, const ls_real *p, int64_t B, int64_t n, int64_t width);
/* What a core gives: like ls_view_of, or rows of form.core_width. */
ls_view ls_view_out(const ls_attention *a, const ls_real *p, int64_t B, int64_t n);

static inline int ls_is_self(ls_pattern p)
{
    return p == LS_NS || p == LS_CS;
}
static inline int ls_is_packed(const ls_attention_io *io)
{
    return io != NULL && (io->query_segments != NULL || io->key_segments != NULL);
}

/* Inputs where NULL stands for another, see ls_attention_io; and masks, of which one may serve for both. */
typedef struct ls_inputs {
    const ls_real *q, *k, *v;
} ls_inputs;
static inline ls_inputs ls_inputs_of(const ls_attention_io *io)
{
    const ls_real *k = io->key != NULL ? io->key : io->query;
    return (ls_inputs){io->query, k, io->value != NULL ? io->value : k};
}
static inline void ls_take_masks(const ls_attention_io *io, ls_pass *p)
{
    const uint8_t *q = io->query_padding_mask, *k = io->key_padding_mask;
    p->pad_q = q == NULL && ls_is_self(p->pattern) ? k : q;
    p->own.pad = k == NULL && ls_is_self(p->pattern) ? q : k;
}

/* What is refused before anything is allocated or written, see check.c. Options: *mechanism is the one that they name.
 */
ls_status ls_check_options(const ls_attention_options *options, const ls_mechanism **mechanism);
/* What a call of forward or backward was given; out is its output, or the output's gradient. */
ls_status ls_check_call(const ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                        const ls_real *params, const ls_real *out);
/* Refuses a shard that is missing, another rank's or wrong in itself. `what` it is of. */
ls_status ls_check_shard(const ls_attention *a, const ls_shard *s, const char *what);
uint64_t ls_sign_shard(uint64_t signature, const ls_shard *s);

/* Refuses random numbers that the mechanism does not take. */
ls_status ls_check_given(const ls_attention *a, const ls_attention_io *io);

/* The pass of a call without its tensors: problem, options, streams. */
void ls_pass_begin(const ls_attention *a, int64_t B, int64_t T, int64_t S, const ls_real *params, ls_pass *pass);

/* y = projection `which` of x (rows, ls_projection_in), of which only OUT_PROJ's may lie in bfloat16. */
void ls_project(const ls_attention *a, int which, int64_t rows, ls_operand x, const ls_real *params, ls_real *y);
/* The layer's output from the core's rows `o`; `active` (same size) is used where there is a gelu between. */
void ls_project_out(const ls_attention *a, int64_t rows, ls_operand o, ls_operand active, const ls_real *params,
                    ls_real *y);

#endif
