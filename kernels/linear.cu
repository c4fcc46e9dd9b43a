/* Linear attention on a GPU: the phases for all keys, and the table of phases. Theory: linear_slabs.h. */
#include "linear_slabs.h"

/* ------------------------------------------------------------------------------------------------ sums */

static ls_status kernel_sums(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->S, ROWS);
    ls_linear_clear(p, &x, x.F * (x.d + 1), x.start);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->S, k);
        ls_linear_make_keys(p, &x);
        ls_linear_follow_maxima(p, &x);
        ls_linear_gather_keys(p, &x);
        ls_linear_scan_states(p, &x, before_chunks(&x), 0);
    }
    ls_linear_pack(p, &x, x.start + c.N, p->summary[phase + 1].sent);
    return ls_launched(p->queue, "linear attention: sums");
}

/* CS: the causal kernel wrote dk and dv before, so this adds. */
static ls_status kernel_sums_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const ls_summary *s = &p->summary[phase + 1];
    const cut c = ls_linear_cut_rows(p, p->S, ROWS);
    const level all = {x.start, x.each_start, 0};
    ls_linear_unpack(p, &x, s->dsent, s->sent, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->S, k);
        ls_linear_make_keys(p, &x);
        ls_linear_pay_keys(p, &x, all, p->pattern == LS_CS);
    }
    return ls_launched(p->queue, "linear attention: gradient of sums");
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static ls_status kernel_apply(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->T, ROWS);
    ls_linear_unpack(p, &x, p->summary[phase].got, p->summary[phase].got, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->T, k);
        ls_linear_make_queries(p, &x);
        ls_linear_attend(p, &x);
    }
    return ls_launched(p->queue, "linear attention: apply");
}

static ls_status kernel_apply_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const ls_summary *s = &p->summary[phase];
    const cut c = ls_linear_cut_rows(p, p->T, ROWS);
    ls_linear_unpack(p, &x, s->got, s->got, NULL);
    ls_linear_clear(p, &x, x.F * (x.d + 1), NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->T, k);
        ls_linear_make_queries(p, &x);
        ls_linear_attend_backward(p, &x);
        ls_linear_gather_gradients(p, &x);
        ls_linear_scan_states(p, &x, nowhere, 0);
    }
    ls_linear_pack(p, &x, NULL, s->dgot);
    return ls_launched(p->queue, "linear attention: gradient of apply");
}

/* ------------------------------------------------------------------------------------------------ table */

static ls_status kernel_prepare(ls_pass *p, int phase)
{
    (void)phase;
    map_of(p)->prepare(p);
    return ls_launched(p->queue, "linear attention: prepare");
}

/* A source is summarised apart from the steps that follow, so what they need is prepared for it too. */
static ls_status kernel_source(ls_pass *p, int phase)
{
    if (map_of(p)->prepare != NULL) map_of(p)->prepare(p);
    return kernel_sums(p, phase);
}

extern "C" const ls_cuda_kernel ls_linear_cuda_kernels[] = {
    {"prepare", kernel_prepare, NULL},
    {"share", ls_linear_cuda_share, ls_linear_cuda_share_backward},
    {"pairs", ls_linear_cuda_pairs, ls_linear_cuda_pairs_backward},
    {"sums", kernel_sums, kernel_sums_backward},
    {"source", kernel_source, NULL},
    {"apply", kernel_apply, kernel_apply_backward},
    {"causal", ls_linear_cuda_causal, ls_linear_cuda_causal_backward},
    {NULL, NULL, NULL},
};
