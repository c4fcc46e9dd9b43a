/* Causal linear attention on a GPU: within a chunk by pairs, to what was before by its state; backward in two sweeps.
 * Theory: linear_slabs.h. */
#include "linear_slabs.h"

/* What is kept of rows from slab to slab lies slab after slab. */
static void go_to_traced(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k)
{
    ls_linear_go_to(p, x, c, rows, k);
    const int64_t at = p->B * p->H * k * c.C;
    x->c = x->all_c + at;
    x->inverse = x->all_inverse + at;
    x->delta = x->all_delta + at;
}

static void go_to_causal(ls_pass *p, linear *x, cut c, int64_t k)
{
    go_to_traced(p, x, c, p->T, k);
    x->M = x->n = c.C;
    x->relative = 0;
    x->causal = 1;
}

/* Chunks made ready, their c found; w = a·b. */
static void load_causal(ls_pass *p, linear *x)
{
    ls_linear_load_queries(p, x);
    ls_linear_load_keys(p, x);
    ls_linear_stage(p, x, p->own.v, p->own.pad, x->v);
    ls_linear_follow_maxima(p, x);
    ls_linear_ready_keys(p, x, keys_of(p), after_chunks(x), 0);
    ls_linear_ready_queries(p, x, before_chunks(x), after_chunks(x), NULL, x->A);
    ls_linear_multiply_near(p, x, after_chunks(x), chunks_of(x));
}

/* S, z of each chunk := the state before it. */
static void find_prefixes(ls_pass *p, const linear *x)
{
    ls_linear_gather_keys(p, x);
    ls_linear_scan_states(p, x, before_chunks(x), KEEPS);
}

ls_status ls_linear_cuda_causal(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    ls_linear_unpack(p, &x, p->summary[phase].got, p->summary[phase].got, x.running);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->T, k);
        x.M = x.n = c.C;
        x.causal = 1;
        load_causal(p, &x);
        find_prefixes(p, &x);
        const int64_t chunks = chunks_of(&x);
        ls_linear_weigh(p, &x, x.z, 0);
        ls_linear_multiply(p, 0, 0, c.C, x.d, c.C, x.w, x.v, 0, x.out, chunks);
        ls_linear_multiply(p, 0, 0, c.C, x.d, x.F, x.A, x.S, 1, x.out, chunks);
        ls_linear_put_rows(p, &x, x.out, x.inverse, p->out, p->pad_q, 0);
    }
    return ls_launched(p->queue, "linear attention: causal");
}

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. c, inverse, delta and start stay. */
static void sweep_past(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_causal(p, x, c, k);
        load_causal(p, x);
        find_prefixes(p, x);
        ls_linear_stage(p, x, p->dout, p->pad_q, x->dout);
        const int64_t chunks = chunks_of(x);
        ls_linear_multiply(p, 0, 1, c.C, c.C, x->d, x->dout, x->v, 0, x->dw, chunks);
        ls_linear_multiply(p, 0, 1, c.C, x->F, x->d, x->dout, x->S, 0, x->dA, chunks);
        ls_linear_weigh_backward(p, x, x->z, 0);
        ls_linear_near_gradients(p, x, after_chunks(x), chunks, 1, x->db, x->out);
        ls_linear_finish_queries(p, x, before_chunks(x), after_chunks(x), 1, 1);
        ls_linear_clean_rows(p, x);
        map_of(p)->queries_backward(p, x->s, x->da);
        ls_linear_write_keys(p, x, 0);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = c.N == 0 ? -1 : (c.N - 1) / c.K * c.K; k >= 0; k -= c.K) {
        go_to_causal(p, x, c, k);
        ls_linear_load_queries(p, x);
        ls_linear_load_keys(p, x);
        ls_linear_stage(p, x, p->own.v, p->own.pad, x->v);
        ls_linear_ready_keys(p, x, keys_of(p), after_chunks(x), 1);
        ls_linear_ready_queries(p, x, before_chunks(x), after_chunks(x), x->inverse, x->A);
        ls_linear_gather_gradients(p, x);
        ls_linear_scan_states(p, x, before_chunks(x), KEEPS | REVERSED);
        ls_linear_multiply(p, 0, 1, c.C, x->F, x->d, x->v, x->S, 0, x->dB, chunks_of(x));
        ls_linear_finish_keys(p, x, x->z);
        ls_linear_multiply(p, 0, 0, c.C, x->d, x->F, x->B, x->S, 0, x->out, chunks_of(x));
        ls_linear_write_keys(p, x, 1);
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
