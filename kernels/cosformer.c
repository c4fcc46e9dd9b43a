/* cosFormer: linear attention whose weights fall with distance as a cosine (Qin et al., 2022).
 *
 *   a = act(q), b = act(k), act relu or 1 + elu;  θ_i = π (i + 1) / 2M,  M = max_len, or where that is 0 max(T, S)
 *   w_ij = (a_i·b_j) cos(θ_i - θ_j),   o_i = Σ_j w_ij v_j / max(Σ_j w_ij, ε)     over unpadded j; CS: over j <= i
 *
 * which is linear attention with A_i = [a_i sin θ_i, a_i cos θ_i] and B_j likewise: the phases are those of linear.c,
 * with ω = π / 2M. CS, CC and steps need max_len: otherwise an output would depend on how long the sequence gets. */
#include "linear.h"
#include "tile.h"

enum { ACT, MAX_LEN, EPS }; /* option[] */
enum { RELU, ONE_PLUS_ELU };

static const ls_option_info options[] = {
    {"act", "act", RELU, RELU, ONE_PLUS_ELU, 1, "what makes features positive: 0 relu, 1 1 + elu"},
    {"max_len", "max_len", 0, 0, 1099511627776.0, 1,
     "length at which two positions are a right angle apart; 0: that of the sequence"},
    {"eps", "eps", 1e-6, 0, 1, 0, "the least denominator"},
    {.name = NULL},
};

static ls_status check(const ls_attention_options *o)
{
    if ((o->pattern == LS_CS || o->pattern == LS_CC) && o->value[MAX_LEN] == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "cosformer: %s attention needs max_len: no output may depend on the final length",
                ls_pattern_name(o->pattern));
    return LS_OK;
}

static ls_status check_step(const ls_attention_options *o)
{
    if (o->value[MAX_LEN] == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "cosformer: a step needs max_len: no output may depend on the final length");
    return LS_OK;
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

/* to (n,d) = act(rows), 0 where padded. */
static void activate(const ls_pass *p, ls_chunk k, ls_view v, const uint8_t *pad, int64_t pads, ls_real *to)
{
    const int elu = p->option[ACT] == ONE_PLUS_ELU;
    for (int64_t i = 0; i < k.n; i++, to += p->d) {
        if (ls_is_padded(pad, k.b * pads + k.t + i)) {
            ls_zero(to, p->d);
            continue;
        }
        const ls_real *x = ls_row(v, k.b, k.h, k.t + i);
        if (elu)
            for (int64_t e = 0; e < p->d; e++) {
                const ls_real low = ls_exp(x[e] < 0 ? x[e] : 0);
                to[e] = x[e] > 0 ? 1 + x[e] : low;
            }
        else
            for (int64_t e = 0; e < p->d; e++) to[e] = x[e] > 0 ? x[e] : 0;
    }
}

/* One row: dx (=, or += with `add`) act'(x) dy. */
static void activate_backward(int elu, int64_t d, const ls_real *x, const ls_real *dy, int add, ls_real *dx)
{
    for (int64_t e = 0; e < d; e++) {
        const ls_real slope = x[e] > 0 ? 1 : elu ? ls_exp(x[e] < 0 ? x[e] : 0) : 0;
        dx[e] = (add ? dx[e] : 0) + slope * dy[e];
    }
}

static void all_backward(const ls_pass *p, ls_chunk k, ls_view v, const uint8_t *pad, int64_t pads, const ls_real *dy,
                         int add, ls_view dv)
{
    const int elu = p->option[ACT] == ONE_PLUS_ELU;
    for (int64_t i = 0; i < k.n; i++) {
        ls_real *to = ls_row(dv, k.b, k.h, k.t + i);
        if (!ls_is_padded(pad, k.b * pads + k.t + i))
            activate_backward(elu, p->d, ls_row(v, k.b, k.h, k.t + i), dy + i * p->d, add, to);
        else if (!add)
            ls_zero(to, p->d);
    }
}

static void queries(ls_pass *p, ls_chunk k, ls_real *a)
{
    activate(p, k, p->q, p->pad_q, p->T, a);
}

static void keys(ls_pass *p, ls_chunk k, ls_real *b, ls_real *top)
{
    (void)top;
    activate(p, k, p->own.k, p->own.pad, p->S, b);
}

static void queries_backward(ls_pass *p, ls_chunk k, const ls_real *da)
{
    all_backward(p, k, p->q, p->pad_q, p->T, da, 0, p->dq);
}

static void keys_backward(ls_pass *p, ls_chunk k, const ls_real *db, int add)
{
    all_backward(p, k, p->own.k, p->own.pad, p->S, db, add, p->own.dk);
}

static const ls_feature_map map = {.features = features,
                                   .turn = turn,
                                   .floor = least,
                                   .queries = queries,
                                   .keys = keys,
                                   .queries_backward = queries_backward,
                                   .keys_backward = keys_backward};

/* ------------------------------------------------------------------------------------------------ table */

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    ls_linear_plan(p, &map, work);
}

static ls_monoid summary(const ls_pass *p)
{
    return ls_linear_summary(p, &map);
}

static ls_status sums(ls_pass *p, int phase)
{
    return ls_linear_sums(p, &map, phase);
}

static ls_status sums_backward(ls_pass *p, int phase)
{
    return ls_linear_sums_backward(p, &map, phase);
}

static ls_status apply(ls_pass *p, int phase)
{
    return ls_linear_apply(p, &map, phase);
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    return ls_linear_apply_backward(p, &map, phase);
}

static ls_status apply_causal(ls_pass *p, int phase)
{
    return ls_linear_causal(p, &map, phase);
}

static ls_status apply_causal_backward(ls_pass *p, int phase)
{
    return ls_linear_causal_backward(p, &map, phase);
}

static const ls_phase all_keys[] = {
    {.name = "sums", .forward = sums, .backward = sums_backward, .of_source = 1},
    {.name = "apply", .crossing = LS_REDUCE, .monoid = summary, .forward = apply, .backward = apply_backward},
    {.name = NULL},
};
static const ls_phase causal[] = {
    {.name = "sums", .forward = sums, .backward = sums_backward, .feeds_scan = 1},
    {.name = "apply",
     .crossing = LS_SCAN,
     .monoid = summary,
     .forward = apply_causal,
     .backward = apply_causal_backward},
    {.name = NULL},
};

const ls_mechanism ls_cosformer_mechanism = {
    .name = "cosformer",
    .option = options,
    .check = check,
    .check_step = check_step,
    .plan = plan,
    .phases = {[LS_NS] = all_keys, [LS_CS] = causal, [LS_NC] = all_keys, [LS_CC] = all_keys},
    .step = {[LS_CS] = causal, [LS_NC] = all_keys, [LS_CC] = all_keys},
};
