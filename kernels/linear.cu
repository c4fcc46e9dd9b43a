/* Linear attention on a GPU: the sums of keys, what a query takes from all of them, and the table of phases. Theory:
 * linear_slabs.h. */
#include "linear_slabs.h"

/* ------------------------------------------------------------------------------------------------ products */

/* Rows (R,F) of a slab, and states (G,F,d), as views. */
static ls_view view_of_rows(const linear *x, const ls_real *rows)
{
    const int64_t g = x->s.K * x->s.C * x->F;
    const ls_view v = {const_cast<ls_real *>(rows), g, x->s.B * g, x->F};
    return v;
}

static ls_view view_of_states(const linear *x, const ls_real *S)
{
    const int64_t g = x->F * x->d;
    const ls_view v = {const_cast<ls_real *>(S), g, x->s.B * g, x->d};
    return v;
}

/* Rows of the slab that the shard has, of each (b,h). */
static int64_t existing(const linear *x)
{
    return ls_min(x->s.K * x->s.C, x->s.rows - x->s.first);
}

static ls_view from_first(const linear *x, ls_view v)
{
    v.p += x->s.first * v.st;
    return v;
}

/* Rows of (b,h) in `to` = (beta 0) or += (beta 1) those in rows (R,F) times its S (F,d). */
static void put_products(ls_pass *p, const linear *x, const ls_real *rows, const ls_real *S, double beta, ls_view to)
{
    ls_gemm_heads(p->queue, 0, 0, existing(x), x->d, x->F, 1, view_of_rows(x, rows), view_of_states(x, S), beta,
                  from_first(x, to), x->s.B, x->s.H);
}

/* rows (R,F) = rows of (b,h) in `from` times its Sᵀ. Those of padded rows may be anything. */
static void take_products(ls_pass *p, const linear *x, ls_view from, const ls_real *S, ls_real *rows)
{
    ls_gemm_heads(p->queue, 0, 1, existing(x), x->F, x->d, 1, from_first(x, from), view_of_states(x, S), 0,
                  view_of_rows(x, rows), x->s.B, x->s.H);
}

/* ------------------------------------------------------------------------------------------------ sums */

static ls_status kernel_sums(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->S, ROWS);
    ls_linear_clear(p, &x, x.F * (x.d + 1), x.start);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->S, k);
        map_of(p)->keys(p, x.s, x.x, x.top);
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
    ls_linear_unpack(p, &x, s->dsent, s->sent, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->S, k);
        x.M = x.s.K * x.s.C;
        map_of(p)->keys(p, x.s, x.x, x.top);
        const level all = {x.start, x.each_start, 0};
        ls_linear_ready_keys(p, &x, keys_of(p), all, 1);
        take_products(p, &x, p->own.v, x.all_S, x.dB);
        ls_linear_finish_keys(p, &x, x.all_z);
        map_of(p)->keys_backward(p, x.s, x.db, p->pattern == LS_CS);
        put_products(p, &x, x.B, x.all_S, p->pattern == LS_CS, p->own.dv);
    }
    return ls_launched(p->queue, "linear attention: gradient of sums");
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static void load_turned_queries(ls_pass *p, linear *x, cut c, int64_t k)
{
    ls_linear_go_to(p, x, c, p->T, k);
    x->M = x->s.K * x->s.C;
    map_of(p)->queries(p, x->s, x->a);
    ls_linear_ready_queries(p, x, nowhere, nowhere, NULL, x->A);
}

/* A becomes A / D, by the z (F) of its (b,h). */
__global__ static void divide(linear x)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real *z = x.all_z + R / x.M * x.F;
        ls_real *A = x.A + R * x.F;
        double D = 0;
        int flows;
        LS_EACH_LANE(f, x.F) D += (double)A[f] * (double)z[f];
        const ls_real inverse = ls_linear_inverse(ls_warp_sum(D), x.floor, &flows);
        LS_EACH_LANE(f, x.F) A[f] *= inverse;
    }
}

/* The same; dA, which holds S do, becomes the gradient of A. δ is the sum of what it is taken from, in double. */
__global__ static void divide_backward(linear x)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real *z = x.all_z + R / x.M * x.F;
        ls_real *A = x.A + R * x.F, *dA = x.dA + R * x.F;
        double D = 0, dot = 0;
        int flows;
        LS_EACH_LANE(f, x.F)
        {
            D += (double)A[f] * (double)z[f];
            dot += (double)A[f] * (double)dA[f];
        }
        D = ls_warp_sum(D), dot = ls_warp_sum(dot);
        const ls_real by = ls_linear_inverse(D, x.floor, &flows), delta = flows ? (ls_real)(dot / D) : 0;
        LS_EACH_LANE(f, x.F)
        {
            dA[f] = by * (dA[f] - delta * z[f]);
            A[f] *= by;
        }
        if (threadIdx.x % LS_WARP == 0) x.delta[R] = delta, x.flows[R] = (ls_real)flows;
    }
}

static ls_status kernel_apply(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->T, ROWS);
    ls_linear_unpack(p, &x, p->summary[phase].got, p->summary[phase].got, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        load_turned_queries(p, &x, c, k);
        LAUNCH_ROWS(p, divide, x);
        put_products(p, &x, x.A, x.all_S, 0, p->out);
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
        load_turned_queries(p, &x, c, k);
        take_products(p, &x, p->dout, x.all_S, x.dA);
        LAUNCH_ROWS(p, divide_backward, x);
        ls_linear_gather_gradients(p, &x);
        ls_linear_scan_states(p, &x, nowhere, 0);
        ls_linear_finish_queries(p, &x, nowhere, nowhere, 1, 0);
        map_of(p)->queries_backward(p, x.s, x.da);
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
