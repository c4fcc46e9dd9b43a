/* Linear attention by feature maps (Katharopoulos et al., 2020), chunk by chunk. Formulas: linear.h.
 *
 * With ω ≠ 0 features turn: A_i = [a_i sin ω(i+1), a_i cos ω(i+1)], B_j likewise, F = 2r of them; with ω = 0 A = a, F =
 * r. So w_ij = A_i·B_j, and the state of a set of keys is, for each (b,h), S = Σ_j B_j v_jᵀ (F,d) and z = Σ_j B_j (F):
 *
 *   o_i = Sᵀ A_i / D_i,   D_i = max(A_i·z, floor)
 *
 * CS: within a chunk w_ij are taken as they are, earlier chunks by their state, which then grows by the chunk.
 * On its way a state is [c][S_f, z_f for each f], c only where features are exponentials.
 *
 * Backward, with δ_i = do_i·o_i (0 where the floor is taken, since nothing flows to D_i then):
 *
 *   dw_ij = (do_i·v_j - δ_i) / D_i,   dA_i = (S do_i - δ_i z) / D_i,   dS = Σ_i A_i do_iᵀ / D_i,   dz = -Σ_i A_i δ_i /
 * D_i dB_j = dS v_j + dz,   dv_j = dSᵀ B_j
 *
 * CS: forward keeps the state at the start of each block of rows. Backward goes from the last block to the first, and
 * through each twice: forward in time, all that is within chunks and what queries take from the past (the states are
 * made again from that at the start); backward in time, what keys owe to the future. So rows are read once.
 *
 * Where a query sees few keys, do_i·v_j - δ_i is a small difference of large numbers, and 1 / D_i may be large.
 * Therefore δ_i is summed in double from those products do_i·v_j that it is taken from: with one key the difference is
 * 0, as it has to be. Sums cannot do that once they were rounded, so a short sequence of keys goes to all ranks as it
 * is.
 *
 * Exponentials: c_i, the maximum so far, rises along the rows. A chunk is cut into pieces in which it hardly does. In a
 * piece keys are taken from c at its end, and a query's features make up for it by the factor ρ_i = e^(c_end - c_i). */
#include "linear_rows.h"

void ls_linear_plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t r = map_of(p)->features(p), F = turned(p), d = p->d;
    const int causal = p->pattern == LS_CS && p->all_keys > SHORT && !p->step, sweeps = causal && p->backward;
    p->saved[STATES] = ls_take(saved, causal ? p->B * blocks_of(p) * p->H * kept_reals(p) : 0);
    p->work[QUERIES] = ls_take(work, 2 * ROWS * r);
    p->work[KEYS] = ls_take(work, 2 * ROWS * r);
    p->work[TURNED] = ls_take(work, F > r ? 3 * ROWS * F : 0);
    p->work[STAGE] = ls_take(work, (p->backward ? STAGED : OUT + 1) * stage_reals(p));
    p->work[WEIGHTS] = ls_take(work, 2 * CAUSAL_ROWS * CAUSAL_ROWS);
    p->work[STATE] = ls_take(work, F * (d + 1) + r);
    p->work[RUNNING] = ls_take(work, part_reals(F, d) + 2 * p->H * F * (d + 1));
    p->work[DOUBLES] = ls_arena_take(work, (size_t)(2 * ROWS) * sizeof(double));
    p->work[SMALL] = ls_take(work, (SMALLS + 1) * ROWS + p->H + 1);
    p->work[TRACE] = ls_take(work, sweeps ? stage_rows(p) * (3 + r) : 0);
}

/* ------------------------------------------------------------------------------------------------ sums */

static ls_real highest(ls_real c, int64_t n, const ls_real *top)
{
    const ls_real here = ls_row_max(n, top);
    return here > c ? here : c;
}

/* A chunk of keys, turned; c: what exponentials are taken from. */
static void load_all(const linear *x, chunk k, ls_real c)
{
    exponentiate(x, 0, k.n, c);
    set_angles(x, x->p->own.span[0].lo + k.t, k.n);
    turn(x, 0, k.n, x->b, x->B);
}

static ls_status kernel_sums(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = ROWS, .reads = HAS_K | HAS_V};
    for (int64_t b = 0; b < p->B; b++) {
        clear_sums(&x);
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            if (x.exponentials > 0) see_from(&x, k.h, highest(x.seen_from[k.h], k.n, x.top));
            load_all(&x, k, x.seen_from[k.h]);
            gather(&x, k.n, x.B, x.v, NULL);
        }
        for (int64_t h = 0; h < p->H; h++) pack(&x, h, x.seen_from[h], element(&x, p->summary[phase + 1].sent, b, h));
    }
    return LS_OK;
}

/* Products use what arrived. */
static void read_state(linear *x, const ls_real *element)
{
    unpack(x, element, x->own);
    use(x, x->own);
}

/* CS: the causal kernel wrote dk and dv before, so this adds. */
static ls_status kernel_sums_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase + 1];
    const walk w = {
        .rows = p->S, .step = ROWS, .reads = HAS_K | HAS_V, .writes = HAS_DK | HAS_OUT, .adds = p->pattern == LS_CS};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) read_state(&x, element(&x, s->dsent, b, k.h));
            load_keys(&x, k);
            load_all(&x, k, element(&x, s->sent, b, k.h)[0]); /* c, where there is one */
            take_gradients(&x, 0, k.n, 0);
            finish_keys(&x, k);
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static void load_turned_queries(const linear *x, chunk k)
{
    load_queries(x, k);
    set_angles(x, x->p->query_span[0].lo + k.t, k.n);
    turn(x, 0, k.n, x->a, x->A);
}

static ls_status kernel_apply(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = ROWS, .reads = HAS_Q, .writes = HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) read_state(&x, element(&x, p->summary[phase].got, b, k.h));
            load_turned_queries(&x, k);
            ls_gemm(0, 0, k.n, x.d, x.F, 1, x.A, x.F, x.S, x.d, 0, x.out, x.d);
            for (int64_t i = 0; i < k.n; i++) set_inverse(&x, i, dot(x.F, x.A + i * x.F, x.z));
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    return LS_OK;
}

/* dA (n,F), which holds S do, becomes (S do - δ z) / D, and A becomes A / D. */
static void divide(const linear *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        ls_real *A = x->A + i * x->F, *dA = x->dA + i * x->F;
        double D, cross;
        two_dots(x->F, A, x->z, dA, &D, &cross);
        set_inverse(x, i, D);
        const ls_real by = x->inverse[i], delta = x->flows[i] > 0 ? (ls_real)(cross / D) : 0;
        for (int64_t f = 0; f < x->F; f++) {
            dA[f] = by * (dA[f] - delta * x->z[f]);
            A[f] *= by;
        }
        x->delta[i] = delta;
    }
}

static ls_status kernel_apply_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const walk w = {.rows = p->T, .step = ROWS, .reads = HAS_Q | HAS_DOUT, .writes = HAS_DQ};
    for (int64_t b = 0; b < p->B; b++) {
        clear_sums(&x);
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) read_state(&x, element(&x, s->got, b, k.h));
            load_turned_queries(&x, k);
            ls_gemm(0, 1, k.n, x.F, x.d, 1, x.dout, x.d, x.S, x.d, 0, x.dA, x.F);
            divide(&x, k.n);
            give_gradients(&x, 0, k.n);
            turn_backward(&x, 0, k.n, x.dA, 0, x.da);
            straighten(&x, 0, k.n);
            finish_queries(&x, k);
        }
        for (int64_t h = 0; h < p->H; h++) pack(&x, h, 0, element(&x, s->dgot, b, h));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static int is_short(const ls_pass *p)
{
    return p->all_keys <= SHORT;
}

static int is_long(const ls_pass *p)
{
    return !is_short(p);
}

static int is_prepared(const ls_pass *p)
{
    return map_of(p)->prepare != NULL;
}

static ls_status kernel_prepare(ls_pass *p, int phase)
{
    (void)phase;
    return map_of(p)->prepare(p);
}

/* A source is summarised apart from the steps that follow, so what they need is prepared for it too. */
static ls_status kernel_sums_of_source(ls_pass *p, int phase)
{
    if (is_prepared(p)) LS_TRY(kernel_prepare(p, phase));
    return kernel_sums(p, phase);
}

#define PREPARE                                                                                                        \
    {                                                                                                                  \
        .name = "prepare", .needed = is_prepared, .forward = kernel_prepare, .keys_alone = 1                           \
    }
#define SHORT_SEQUENCES                                                                                                \
    {.name = "share",                                                                                                  \
     .needed = is_short,                                                                                               \
     .forward = ls_linear_share,                                                                                       \
     .backward = ls_linear_share_backward,                                                                             \
     .keys_alone = 1},                                                                                                 \
    {                                                                                                                  \
        .name = "pairs", .crossing = LS_GATHER, .needed = is_short, .piece = ls_linear_shared_piece,                   \
        .forward = ls_linear_pairs, .backward = ls_linear_pairs_backward                                               \
    }
const ls_phase ls_linear_all_keys[] = {
    PREPARE,
    SHORT_SEQUENCES,
    {.name = "sums", .needed = is_long, .forward = kernel_sums, .backward = kernel_sums_backward, .keys_alone = 1},
    {.name = "apply",
     .crossing = LS_REDUCE,
     .needed = is_long,
     .monoid = summary,
     .forward = kernel_apply,
     .backward = kernel_apply_backward},
    {.name = NULL},
};
const ls_phase ls_linear_causal[] = {
    PREPARE,
    SHORT_SEQUENCES,
    {.name = "sums",
     .needed = is_long,
     .forward = kernel_sums,
     .backward = kernel_sums_backward,
     .feeds_scan = 1,
     .keys_alone = 1},
    {.name = "causal",
     .crossing = LS_SCAN,
     .needed = is_long,
     .monoid = summary,
     .forward = ls_linear_causal_forward,
     .backward = ls_linear_causal_backward},
    {.name = NULL},
};
const ls_phase ls_linear_step_across[] = {
    PREPARE,
    {.name = "source", .forward = kernel_sums_of_source, .of_source = 1},
    {.name = "apply", .crossing = LS_REDUCE, .monoid = summary, .forward = kernel_apply},
    {.name = NULL},
};
const ls_phase ls_linear_step_causal[] = {
    PREPARE,
    {.name = "sums", .forward = kernel_sums},
    {.name = "causal", .crossing = LS_SCAN, .monoid = summary, .forward = ls_linear_causal_forward},
    {.name = NULL},
};
#undef PREPARE
#undef SHORT_SEQUENCES
