/* Causal linear attention on a GPU: its phases, backward in two sweeps. Theory: linear_slabs.h. */
#include "linear_slabs.h"

static void go_to_causal(const ls_pass *p, linear *x, cut c, int64_t k)
{
    ls_linear_go_to(p, x, c, p->T, k);
    x->M = c.C;
    x->causal = 1;
}

/* In backward: what is kept of rows from sweep to sweep lies slab after slab. */
static void go_to_traced(const ls_pass *p, linear *x, cut c, int64_t k)
{
    const int64_t at = p->B * p->H * k * c.C;
    go_to_causal(p, x, c, k);
    x->c = x->all_c + at;
    x->inverse = x->all_inverse + at;
    x->delta = x->all_delta + at;
}

/* Features and c of chunks; then S, z of each := the state before it. */
static void load_causal(ls_pass *p, const linear *x)
{
    ls_linear_make_queries(p, x);
    ls_linear_make_keys(p, x);
    ls_linear_follow_maxima(p, x);
    ls_linear_gather_keys(p, x);
    ls_linear_scan_states(p, x, before_chunks(x), KEEPS);
}

ls_status ls_linear_cuda_causal(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    ls_linear_unpack(p, &x, p->summary[phase].got, p->summary[phase].got, x.running);
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_causal(p, &x, c, k);
        load_causal(p, &x);
        ls_linear_attend(p, &x);
    }
    return ls_launched(p->queue, "linear attention: causal");
}

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. c, inverse, delta and start stay. */
static void sweep_past(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_traced(p, x, c, k);
        load_causal(p, x);
        ls_linear_attend_backward(p, x);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = c.N == 0 ? -1 : (c.N - 1) / c.K * c.K; k >= 0; k -= c.K) {
        go_to_traced(p, x, c, k);
        ls_linear_make_queries(p, x);
        ls_linear_make_keys(p, x);
        ls_linear_gather_gradients(p, x);
        ls_linear_scan_states(p, x, before_chunks(x), KEEPS | REVERSED);
        ls_linear_pay_keys(p, x, after_chunks(x), 1);
    }
}

ls_status ls_linear_cuda_causal_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const ls_summary *s = &p->summary[phase];
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    ls_linear_unpack(p, &x, s->got, s->got, x.running);
    sweep_past(p, &x, c);
    ls_linear_clear(p, &x, x.F * (x.d + 1), NULL);
    sweep_future(p, &x, c);
    ls_linear_pack(p, &x, NULL, s->dgot);
    return ls_launched(p->queue, "linear attention: gradient of causal");
}
