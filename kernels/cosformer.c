/* cosFormer: linear attention whose weights fall with distance as a cosine (Qin et al., 2022).
 *
 *   a = act(q), b = act(k), act relu or 1 + elu;  θ_i = π (i + 1) / 2M,  M = max_len, or where that is 0 max(T, S)
 *   w_ij = (a_i·b_j) cos(θ_i - θ_j),   o_i = Σ_j w_ij v_j / max(Σ_j w_ij, ε)     over unpadded j; CS: over j <= i
 *
 * which is linear attention with A_i = [a_i sin θ_i, a_i cos θ_i] and B_j likewise: the phases are those of linear.c,
 * with ω = π / 2M. CS, CC and steps need max_len: otherwise an output would depend on how long the sequence gets. */
#include "cosformer.h"
#include "tile.h"

static const ls_option_info options[] = {
    {"act", "act", 0, 0, 1, 1, "what makes features positive: 0 relu, 1 1 + elu"},
    {"max_len", "max_len", 0, 0, 1099511627776.0, 1,
     "length at which two positions are a right angle apart; 0: that of the sequence (NS, NC; CS, CC need it)"},
    {"eps", "eps", 1e-6, 0, 1, 0, "the least denominator"},
    {.name = NULL},
};

static ls_status check(const ls_attention_options *o)
{
    if ((o->pattern == LS_CS || o->pattern == LS_CC) && o->value[MAX_LEN] == 0)
        return ls_fail_of(NULL, "max_len", LS_ERR_ARGUMENT,
                          "cosformer: %s attention needs max_len: no output may depend on the final length",
                          ls_pattern_name(o->pattern));
    return LS_OK;
}

static ls_status check_step(const ls_attention_options *o)
{
    if (o->value[MAX_LEN] == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "cosformer: a step needs max_len: no output may depend on the final length");
    return LS_OK;
}

/* M counts all positions. */
static int counts_padding(const ls_attention_options *o)
{
    return o->value[MAX_LEN] == 0;
}

/* ------------------------------------------------------------------------------------------------ features */

static int64_t features(const ls_pass *p)
{
    return p->d;
}

static double turn(const ls_pass *p)
{
    const int64_t longest = ls_max(ls_max(p->all_queries, p->all_keys), 1);
    return 1.5707963267948966 / (p->option[MAX_LEN] > 0 ? p->option[MAX_LEN] : (double)longest);
}

static double least(const ls_pass *p)
{
    return p->option[EPS];
}

static void activate(const ls_pass *p, int64_t n, const ls_real *x, ls_real *y)
{
    if (act_of(p) == LS_LINEAR_RELU) /* each loop for itself, so that it becomes one of vectors */
        for (int64_t i = 0; i < n; i++) y[i] = ls_linear_act(LS_LINEAR_RELU, x[i]);
    else
        for (int64_t i = 0; i < n; i++) y[i] = ls_linear_act(LS_LINEAR_ONE_PLUS_ELU, x[i]);
}

static void activate_backward(const ls_pass *p, int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx)
{
    if (act_of(p) == LS_LINEAR_RELU)
        for (int64_t i = 0; i < n; i++) dx[i] = ls_linear_act_backward(LS_LINEAR_RELU, x[i], dy[i]);
    else
        for (int64_t i = 0; i < n; i++) dx[i] = ls_linear_act_backward(LS_LINEAR_ONE_PLUS_ELU, x[i], dy[i]);
}

static void queries(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, ls_real *a)
{
    (void)h;
    activate(p, n * p->d, rows, a);
}

static void keys(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, ls_real *b, ls_real *top)
{
    (void)h, (void)top;
    activate(p, n * p->d, rows, b);
}

static void backward(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, const ls_real *dy, ls_real *drows)
{
    (void)h;
    activate_backward(p, n * p->d, rows, dy, drows);
}

/* relu's gradient jumps where a feature is 0, all gradients where a denominator meets its floor. */
static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    if (o->value[ACT] == 0 || ls_linear_jumps(o->value[EPS])) form->input[0].made = form->input[1].made = LS_EXACT;
}

static const ls_feature_map map = {.features = features,
                                   .turn = turn,
                                   .floor = least,
                                   .queries = queries,
                                   .keys = keys,
                                   .queries_backward = backward,
                                   .keys_backward = backward,
                                   .cuda = LS_IF_CUDA(&ls_cosformer_map_cuda)};

/* ------------------------------------------------------------------------------------------------ table */

const ls_mechanism ls_cosformer_mechanism = {
    .name = "cosformer",
    .option = options,
    .check = check,
    .check_step = check_step,
    .counts_padding = counts_padding,
    .unscaled = 1,
    .longest = "max_len", /* beyond it weights are negative */
    .layer = layer,
    .plan = ls_linear_plan,
    .phases = {[LS_NS] = ls_linear_all_keys,
               [LS_CS] = ls_linear_causal,
               [LS_NC] = ls_linear_all_keys,
               [LS_CC] = ls_linear_all_keys},
    .step = {[LS_CS] = ls_linear_step_causal, [LS_NC] = ls_linear_step_across, [LS_CC] = ls_linear_step_across},
    .cuda = LS_IF_CUDA(&ls_cosformer_cuda),
    .kit = &map,
};
