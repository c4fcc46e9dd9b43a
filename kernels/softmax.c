/* Exact softmax attention (Vaswani et al., 2017), in tiles with running statistics (Milakov & Gimelshein, 2018; Dao et
 * al., 2022), over key/value blocks that visit in a ring (Liu et al., 2023).
 *
 *   s_ij = scale q_i·k_j + mask_ij (-inf where j is padded, or j > i in CS),  p = softmax_j(s),  o_i = Σ_j D_ij p_ij
 * v_j
 *
 * D: dropout. A block's tile updates, for each query, m = max s, l = Σ e^(s-m) and out = Σ D e^(s-m) v. Nothing of size
 * T·S is kept unless weights are asked for.
 *
 * Backward, from m_i, l_i and δ_i = do_i·o_i:
 *   p = e^(s - m) / l,  dv_j += Σ_i D p do_i,  ds = p (D do_i·v_j - δ_i),  dq_i += scale Σ_j ds k_j,  dk_j += scale
 * Σ_i ds q_i
 * m + ln l in one number would lose l where logits are large, and the p of a row would not sum to 1.
 *
 * saved: m (B,H,T), then 1 / l. State of a step: keys and values so far, spread over ranks; (m, l, out) are then summed
 * by softsum. */
#include "softmax.h"
#include "gemm.h"
#include "rng.h"
#include "statistics.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_softmax_cuda;

enum { TQ = 128, TK = 256 }; /* tile of queries, of keys */
/* So many tiles are summed up aside, and then added to what is there: one by one, a sum over a million keys would round
 * each of them to what it can hold itself. */
enum { TILES_TOGETHER = 16 };
enum { TOP }; /* saved[] */
/* work[]; PART.. are of a tile of queries: out or dq, m, l */
enum { MAXIMUM, SUM, DELTA, SCORES, DSCORES, QUERIES, DOUT, DROP, PART, PART_MAXIMUM, PART_SUM };

void ls_softmax_plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t rows = p->B * p->H * p->T;
    p->saved[TOP] = ls_take(saved, 2 * rows);
    p->work[MAXIMUM] = ls_take(work, rows);
    p->work[SUM] = ls_take(work, rows);
    p->work[DELTA] = ls_take(work, rows);
    p->work[SCORES] = ls_take(work, TQ * TK);
    p->work[DSCORES] = ls_take(work, TQ * TK);
    p->work[QUERIES] = ls_take(work, TQ * p->d);
    p->work[DOUT] = ls_take(work, TQ * p->d);
    p->work[DROP] = ls_take(work, TK);
    p->work[PART] = ls_take(work, TQ * p->d);
    p->work[PART_MAXIMUM] = ls_take(work, TQ);
    p->work[PART_SUM] = ls_take(work, TQ);
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* Where a tile stands: rows q0.. of the queries, k0.. of the block, and the global positions of both. */
typedef struct tile {
    int64_t b, h, q0, nq, i0, k0, nk, j0;
} tile;

/* Nothing is summed up aside. */
static void begin_part(ls_pass *p, const tile *t)
{
    ls_zero(p->work[PART], t->nq * p->d);
    ls_zero(p->work[PART_SUM], t->nq);
    for (int64_t i = 0; i < t->nq; i++) p->work[PART_MAXIMUM][i] = -INFINITY;
}

/* Calls work for every tile of the visiting block that is not wholly in the future; of each tile of queries begin comes
 * first, and join after some tiles and at the end. */
static void each_tile(ls_pass *p, void (*begin)(ls_pass *, const tile *), void (*work)(ls_pass *, const tile *),
                      void (*join)(ls_pass *, const tile *))
{
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int qs = 0; qs < p->query_spans; qs++) {
                const ls_span q = p->query_span[qs];
                for (int64_t i = 0; i < q.n; i += TQ) {
                    tile t = {.b = b, .h = h, .q0 = q.row + i, .nq = ls_min(TQ, q.n - i), .i0 = q.lo + i};
                    int64_t met = 0;
                    begin(p, &t);
                    for (int ks = 0; ks < p->visit.spans; ks++) {
                        const ls_span k = p->visit.span[ks];
                        for (int64_t j = 0; j < k.n; j += TK) {
                            if (p->pattern == LS_CS && k.lo + j > t.i0 + t.nq - 1) break;
                            t.k0 = k.row + j, t.nk = ls_min(TK, k.n - j), t.j0 = k.lo + j;
                            if (met++ % TILES_TOGETHER == 0) begin_part(p, &t);
                            work(p, &t);
                            if (met % TILES_TOGETHER == 0) join(p, &t);
                        }
                    }
                    if (met % TILES_TOGETHER != 0) join(p, &t);
                }
            }
}

/* SCORES (nq,nk) = scale q·k + mask, -inf at keys that may not be seen. QUERIES holds scale·q. */
static void scores(ls_pass *p, const tile *t)
{
    ls_real *s = p->work[SCORES];
    const ls_block *v = &p->visit;
    ls_gemm(0, 1, t->nq, t->nk, p->d, 1, p->work[QUERIES], p->d, ls_row(v->k, t->b, t->h, t->k0), v->k.st, 0, s, TK);
    if (p->attn_mask != NULL)
        for (int64_t i = 0; i < t->nq; i++) {
            const int64_t head = p->attn_mask_per_head ? t->b * p->H + t->h : 0;
            const ls_real *mask = p->attn_mask + (head * p->T + t->q0 + i) * p->all_keys + t->j0;
            for (int64_t j = 0; j < t->nk; j++) s[i * TK + j] += mask[j];
        }
    if (p->pattern == LS_CS && t->j0 + t->nk - 1 > t->i0)
        for (int64_t i = 0; i < t->nq; i++)
            for (int64_t j = ls_max(0, t->i0 + i + 1 - t->j0); j < t->nk; j++) s[i * TK + j] = -INFINITY;
    if (v->pad != NULL) {
        const uint8_t *pad = v->pad + t->b * v->n + t->k0;
        for (int64_t j = 0; j < t->nk; j++)
            if (pad[j])
                for (int64_t i = 0; i < t->nq; i++) s[i * TK + j] = -INFINITY;
    }
}

/* The dropout factors D of one row of a tile, or NULL. Drawn by (stream, head; sample; i, j): 32-bit words of Philox.
 */
static const ls_real *dropout_row(ls_pass *p, const tile *t, int64_t i)
{
    if (p->dropout_mask != NULL)
        return p->dropout_mask + ((t->b * p->H + t->h) * p->T + t->q0 + i) * p->all_keys + t->j0;
    if (!p->training || p->dropout <= 0 || p->step) return NULL;
    const double threshold = p->dropout * 4294967296.0;
    const ls_real keep = (ls_real)(1 / (1 - p->dropout));
    const uint32_t stream = p->stream * 65536u + (uint32_t)t->h, sample = (uint32_t)(p->sample + (uint64_t)t->b);
    uint32_t word[4] = {0};
    for (int64_t j = 0; j < t->nk; j++) {
        const uint64_t column = (uint64_t)(t->j0 + j);
        if (j == 0 || column % 4 == 0)
            ls_random4(p->seed, stream, sample, (uint64_t)(t->i0 + i) << 32 | column / 4, word);
        p->work[DROP][j] = (double)word[column % 4] >= threshold ? keep : 0;
    }
    return p->work[DROP];
}

/* ------------------------------------------------------------------------------------------------ forward */

ls_status ls_softmax_begin(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t r = 0; r < p->B * p->H * p->T; r++) p->work[MAXIMUM][r] = -INFINITY;
    ls_zero(p->work[SUM], p->B * p->H * p->T);
    ls_zero_view(p->out, p->B, p->H, p->T, p->d);
    if (p->weights != NULL)
        for (int64_t i = 0; i < p->B * p->H * p->T * p->all_keys; i++) p->weights[i] = -INFINITY;
    return LS_OK;
}

static void load_queries(ls_pass *p, const tile *t)
{
    ls_clean_rows(p->q, t->b, t->h, t->q0, t->nq, p->d, p->pad_q, p->T, (ls_real)p->scale, p->work[QUERIES]);
}

static void forward_tile(ls_pass *p, const tile *t)
{
    scores(p, t);
    const int64_t row = (t->b * p->H + t->h) * p->T + t->q0;
    for (int64_t i = 0; i < t->nq; i++) {
        ls_real *s = p->work[SCORES] + i * TK, *out = p->work[PART] + i * p->d;
        ls_real *m = p->work[PART_MAXIMUM] + i, *l = p->work[PART_SUM] + i;
        if (p->weights != NULL) memcpy(p->weights + (row + i) * p->all_keys + t->j0, s, (size_t)t->nk * sizeof *s);
        const ls_real here = ls_row_max(t->nk, s);
        if (here > *m) {
            const ls_real shrink = ls_statistics_weight(*m, here);
            *l *= shrink;
            for (int64_t e = 0; e < p->d; e++) out[e] *= shrink;
            *m = here;
        }
        *l += ls_row_exp(t->nk, *m, s);
        const ls_real *D = dropout_row(p, t, i);
        for (int64_t j = 0; D != NULL && j < t->nk; j++) s[j] = s[j] > 0 ? s[j] * D[j] : 0;
    }
    const ls_view v = p->visit.v;
    ls_gemm(0, 0, t->nq, p->d, t->nk, 1, p->work[SCORES], TK, ls_row(v, t->b, t->h, t->k0), v.st, 1, p->work[PART],
            p->d);
}

/* (m, l, out) ⊕= the part's. */
static void join_queries(ls_pass *p, const tile *t)
{
    const int64_t row = (t->b * p->H + t->h) * p->T + t->q0;
    for (int64_t i = 0; i < t->nq; i++) {
        ls_real *m = p->work[MAXIMUM] + row + i, *l = p->work[SUM] + row + i;
        ls_real *out = ls_row(p->out, t->b, t->h, t->q0 + i);
        const ls_real *part = p->work[PART] + i * p->d;
        const ls_statistics_joined x = ls_statistics_join(*m, *l, p->work[PART_MAXIMUM][i], p->work[PART_SUM][i]);
        *m = x.m, *l = x.l;
        for (int64_t e = 0; e < p->d; e++) out[e] = x.weight[0] * out[e] + x.weight[1] * part[e];
    }
}

ls_status ls_softmax_visit(ls_pass *p, int phase)
{
    (void)phase;
    each_tile(p, load_queries, forward_tile, join_queries);
    return LS_OK;
}

/* Of row r: m, and 1 / l. Of one that saw no key, or is padded, m is +inf, so that p = 0 in backward. */
static ls_real *top_of(const ls_pass *p, int64_t r)
{
    return p->saved[TOP] + r;
}
static ls_real *inverse_of(const ls_pass *p, int64_t r)
{
    return p->saved[TOP] + p->B * p->H * p->T + r;
}

/* out /= l. A row that saw no key, or is padded, gives 0. */
ls_status ls_softmax_finish(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t t = 0; t < p->T; t++) {
                const int64_t row = (b * p->H + h) * p->T + t;
                const ls_real l = p->work[SUM][row];
                ls_real *out = ls_row(p->out, b, h, t);
                const int dead = l == 0 || ls_is_padded(p->pad_q, b * p->T + t);
                const ls_real top = dead ? INFINITY : p->work[MAXIMUM][row], inverse = dead ? 0 : 1 / l;
                *top_of(p, row) = top, *inverse_of(p, row) = inverse;
                for (int64_t e = 0; e < p->d; e++) out[e] = dead ? 0 : out[e] / l;
                if (p->weights == NULL) continue;
                ls_real *w = p->weights + row * p->all_keys;
                for (int64_t j = 0; j < p->all_keys; j++) w[j] = dead ? 0 : inverse * ls_exp(w[j] - top);
            }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ backward */

ls_status ls_softmax_finish_backward(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t t = 0; t < p->T; t++) {
                const int64_t row = (b * p->H + h) * p->T + t;
                const int dead = ls_is_padded(p->pad_q, b * p->T + t);
                p->work[DELTA][row] = dead ? 0 : ls_dot(p->d, ls_row(p->dout, b, h, t), ls_row(p->out, b, h, t));
            }
    ls_zero_view(p->dq, p->B, p->H, p->T, p->d);
    return LS_OK;
}

static void load_gradients(ls_pass *p, const tile *t)
{
    load_queries(p, t);
    ls_clean_rows(p->dout, t->b, t->h, t->q0, t->nq, p->d, p->pad_q, p->T, 1, p->work[DOUT]);
}

/* A row of scores s and of do·v becomes D p and ds. */
static void row_backward(int64_t n, ls_real top, ls_real inverse, ls_real delta, const ls_real *D, ls_real *restrict s,
                         ls_real *restrict ds)
{
    ls_real mass = 0, flow = 0, size = 0;
    for (int64_t j = 0; j < n; j++) s[j] = inverse * ls_exp(s[j] - top);
    for (int64_t j = 0; D != NULL && j < n; j++) ds[j] *= s[j] > 0 ? D[j] : 0;
#pragma omp simd reduction(+ : mass, flow, size)
    for (int64_t j = 0; j < n; j++) {
        const ls_real of_j = s[j] * ds[j];
        mass += s[j], flow += of_j, size += of_j < 0 ? -of_j : of_j;
    }
    delta = ls_statistics_delta(mass, flow, size, delta);
    for (int64_t j = 0; j < n; j++) ds[j] = s[j] * (ds[j] - delta);
    for (int64_t j = 0; D != NULL && j < n; j++) s[j] *= s[j] > 0 ? D[j] : 0;
}

static void backward_tile(ls_pass *p, const tile *t)
{
    const ls_block *v = &p->visit;
    const int64_t row = (t->b * p->H + t->h) * p->T + t->q0, d = p->d;
    ls_real *s = p->work[SCORES], *ds = p->work[DSCORES];
    scores(p, t);
    ls_gemm(0, 1, t->nq, t->nk, d, 1, p->work[DOUT], d, ls_row(v->v, t->b, t->h, t->k0), v->v.st, 0, ds, TK);
    for (int64_t i = 0; i < t->nq; i++) {
        const ls_real top = *top_of(p, row + i), inverse = *inverse_of(p, row + i), delta = p->work[DELTA][row + i];
        const ls_real *D = dropout_row(p, t, i);
        ls_real *si = s + i * TK, *di = ds + i * TK;
        if (top == INFINITY) /* whatever the masks hold */
            ls_zero(si, t->nk), ls_zero(di, t->nk);
        else
            row_backward(t->nk, top, inverse, delta, D, si, di);
    }
    ls_gemm(1, 0, t->nk, d, t->nq, 1, s, TK, p->work[DOUT], d, 1, ls_row(v->dv, t->b, t->h, t->k0), v->dv.st);
    ls_gemm(1, 0, t->nk, d, t->nq, 1, ds, TK, p->work[QUERIES], d, 1, ls_row(v->dk, t->b, t->h, t->k0), v->dk.st);
    ls_gemm(0, 0, t->nq, d, t->nk, p->scale, ds, TK, ls_row(v->k, t->b, t->h, t->k0), v->k.st, 1, p->work[PART], d);
}

static void join_gradients(ls_pass *p, const tile *t)
{
    for (int64_t i = 0; i < t->nq; i++)
        ls_axpy(p->d, 1, p->work[PART] + i * p->d, ls_row(p->dq, t->b, t->h, t->q0 + i));
}

ls_status ls_softmax_visit_backward(ls_pass *p, int phase)
{
    (void)phase;
    each_tile(p, load_gradients, backward_tile, join_gradients);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ step */

/* What this rank's part of the cache gave, (m; l, out) for each query row, is a softsum element. */
ls_monoid ls_softmax_statistics(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * p->T, .has_max = 1, .scaled = 1 + p->d};
}

ls_status ls_softmax_send(ls_pass *p, int phase)
{
    ls_real *x = p->summary[phase + 1].sent;
    for (int64_t row = 0; row < p->B * p->H * p->T; row++, x += 2 + p->d) {
        x[0] = p->work[MAXIMUM][row];
        x[1] = p->work[SUM][row];
        memcpy(x + 2, ls_row(p->out, row / p->T / p->H, row / p->T % p->H, row % p->T), (size_t)p->d * sizeof *x);
    }
    return LS_OK;
}

ls_status ls_softmax_take(ls_pass *p, int phase)
{
    const ls_real *x = p->summary[phase].got;
    for (int64_t row = 0; row < p->B * p->H * p->T; row++, x += 2 + p->d) {
        p->work[MAXIMUM][row] = x[0];
        p->work[SUM][row] = x[1];
        memcpy(ls_row(p->out, row / p->T / p->H, row / p->T % p->H, row % p->T), x + 2, (size_t)p->d * sizeof *x);
    }
    return ls_softmax_finish(p, phase);
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase phases[] = {
    {.name = "begin", .forward = ls_softmax_begin},
    {.name = "tiles", .crossing = LS_RING, .forward = ls_softmax_visit, .backward = ls_softmax_visit_backward},
    {.name = "finish", .forward = ls_softmax_finish, .backward = ls_softmax_finish_backward},
    {.name = NULL},
};
static const ls_phase step[] = {
    {.name = "begin", .forward = ls_softmax_begin},
    {.name = "tiles", .crossing = LS_RING, .forward = ls_softmax_visit},
    {.name = "send", .forward = ls_softmax_send},
    {.name = "finish", .crossing = LS_REDUCE, .monoid = ls_softmax_statistics, .forward = ls_softmax_take},
    {.name = NULL},
};

/* Its core reads bfloat16. */
static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    (void)o;
    for (int i = 0; i < form->inputs; i++) form->input[i].made = LS_AS_ASKED;
}

const ls_mechanism ls_softmax_mechanism = {
    .name = "softmax",
    .plan = ls_softmax_plan,
    .phases = {phases, phases, phases, phases},
    .step = {[LS_CS] = step, [LS_NC] = step, [LS_CC] = step},
    .layer = layer,
    .cuda = LS_IF_CUDA(&ls_softmax_cuda),
    .balance_causal = 1,
    .has_weights = 1,
};
