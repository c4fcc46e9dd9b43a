/* Attention with bounded-memory control (Peng et al., 2022): R slots, written by softmaxes over the keys.
 *
 *   a = k φ_k, b = v φ_v (S,R);  K̃_r = Σ_j softmax_j(a_jr) k_j,  Ṽ_r = Σ_j softmax_j(b_jr) v_j  over unpadded j
 *   o_i = Σ_r softmax_r(scale q_i·K̃_r) Ṽ_r;  CS: K̃, Ṽ over j <= i
 *
 * The summary of a set of keys is, for each (b,h), 2R elements of a softsum (first the R of K̃, then those of Ṽ):
 *   m_r = max_j a_jr,  s_r = Σ_j e^(a_jr - m_r),  x_r = Σ_j e^(a_jr - m_r) k_j;   K̃_r = x_r / s_r
 * NS, NC, CC: local sums → reduce → apply. CS: local sums → scan → apply, which goes on from the prefix key by key.
 *
 * Gradients treat m as a constant: K̃ = x/s gives dx = dK̃/s, ds = -dK̃·K̃/s, and a key gets, with e = e^(a - m),
 *   de = ds + k·dx,  da = e de,  dk = Σ_r e dx_r + da φ_kᵀ,  dφ_k += kᵀ da   (and the same for v, b, φ_v)
 * Nothing is saved but the summaries: the backward pass makes a, b and the probabilities anew. */
#include "gemm.h"
#include "tile.h"

enum { SLOTS };                                                                 /* option[] */
enum { PHI_K, PHI_V };                                                          /* param[] */
enum { CHUNK = 256 };                                                           /* rows worked on at a time */
enum { SUMS = 0, APPLY = 1 };                                                   /* phases */
enum { ROWS_A, ROWS_B, LOGITS, DLOGITS, SLOT_KEYS, SLOT_VALUES, TRACE, STATE }; /* work[] */

static const ls_option_info options[] = {
    {"num_slots", "R", 16, 1, 4096, 1, "memory slots that the keys are written to"},
    {.name = NULL},
};

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t d = o->embed_dim / o->num_heads, R = (int64_t)o->value[SLOTS];
    const double scale = 1 / sqrt((double)d);
    list[PHI_K] = (ls_param_info){"phi_k", 2, {d, R}, 0, 0, LS_INIT_NORMAL, scale};
    list[PHI_V] = (ls_param_info){"phi_v", 2, {d, R}, 0, 0, LS_INIT_NORMAL, scale};
    return 2;
}

static int64_t slots(const ls_pass *p)
{
    return (int64_t)p->option[SLOTS];
}

static ls_monoid summary(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * 2 * slots(p), .has_max = 1, .scaled = 1 + p->d};
}

/* Per key and head, what the second pass of the causal backward needs of the first: R reals of each. */
enum { A, B, DLOGIT, DS_K, P_V, DS_V, M_K, M_V, TRACES };

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    const int64_t R = slots(p), d = p->d;
    p->work[ROWS_A] = ls_take(work, CHUNK * d);
    p->work[ROWS_B] = ls_take(work, CHUNK * d);
    p->work[LOGITS] = ls_take(work, CHUNK * R);
    p->work[DLOGITS] = ls_take(work, CHUNK * R);
    p->work[SLOT_KEYS] = ls_take(work, R * (d + 2));
    p->work[SLOT_VALUES] = ls_take(work, R * (d + 2));
    p->work[STATE] = ls_take(work, 2 * R * (d + 2));
    p->work[TRACE] = ls_take(work, p->pattern == LS_CS && p->backward ? TRACES * R * p->T : 0);
}

/* The elements of (b,h): which = 0 for keys, 1 for values. */
static ls_real *elements(const ls_pass *p, ls_real *x, int64_t b, int64_t h, int which)
{
    return x + ((b * p->H + h) * 2 + which) * slots(p) * (p->d + 2);
}

static ls_real *phi(const ls_pass *p, int which, const ls_real *base)
{
    return (ls_real *)(uintptr_t)base + p->param[which].offset;
}

static int padded(const uint8_t *pad, int64_t row)
{
    return pad != NULL && pad[row];
}

/* ------------------------------------------------------------------------------------------------ sums */

/* logits (n,R) = rows φ, -inf at padded rows; rows is a clean copy (n,d). */
static void write_logits(const ls_pass *p, int which, int64_t b, int64_t t, int64_t n, const ls_real *rows,
                         ls_real *logits)
{
    const int64_t R = slots(p);
    ls_gemm(0, 0, n, R, p->d, 1, rows, p->d, phi(p, which, p->params), R, 0, logits, R);
    for (int64_t j = 0; p->own.pad != NULL && j < n; j++)
        for (int64_t r = 0; p->own.pad[b * p->S + t + j] && r < R; r++) logits[j * R + r] = -INFINITY;
}

/* Adds rows [t, t + n) to the elements of (b,h): chunk by chunk with a running maximum. */
static void sum_chunk(ls_pass *p, int which, int64_t b, int64_t h, int64_t t, int64_t n, ls_real *element)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    ls_real *rows = p->work[ROWS_A], *e = p->work[LOGITS], *top = p->work[SLOT_KEYS];
    ls_clean_rows(which ? p->own.v : p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, rows);
    write_logits(p, which, b, t, n, rows, e);
    for (int64_t r = 0; r < R; r++) top[r] = element[r * stride];
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) top[r] = e[j * R + r] > top[r] ? e[j * R + r] : top[r];
    for (int64_t r = 0; r < R; r++) {
        ls_real *x = element + r * stride;
        if (top[r] > x[0]) {
            const ls_real shrink = x[0] == -INFINITY ? 0 : ls_exp(x[0] - top[r]);
            for (int64_t i = 1; i < stride; i++) x[i] *= shrink;
            x[0] = top[r];
        }
        if (top[r] == -INFINITY) top[r] = 0; /* no key yet: every e below is e^-inf = 0 */
    }
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) e[j * R + r] = ls_exp(e[j * R + r] - top[r]);
    for (int64_t r = 0; r < R; r++) {
        ls_real s = 0;
        for (int64_t j = 0; j < n; j++) s += e[j * R + r];
        element[r * stride + 1] += s;
    }
    ls_gemm(1, 0, R, d, n, 1, e, R, rows, d, 1, element + 2, stride);
}

static ls_status sums(ls_pass *p, int phase)
{
    ls_summary *out = &p->summary[phase + 1];
    for (int64_t g = 0; g < out->monoid.groups; g++) {
        ls_real *x = out->sent + g * (p->d + 2);
        x[0] = -INFINITY;
        ls_zero(x + 1, p->d + 1);
    }
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t t = 0; t < p->S; t += CHUNK)
                for (int which = 0; which < 2; which++)
                    sum_chunk(p, which, b, h, t, ls_min(CHUNK, p->S - t), elements(p, out->sent, b, h, which));
    return LS_OK;
}

/* Rows [t, t + n) get their gradient from that of the summary. In CS the prefix form wrote dk, dv before: add. */
static void sum_chunk_backward(ls_pass *p, int which, int64_t b, int64_t h, int64_t t, int64_t n,
                               const ls_real *element, const ls_real *delement)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    const int add = p->pattern == LS_CS;
    ls_real *rows = p->work[ROWS_A], *e = p->work[LOGITS], *de = p->work[DLOGITS], *drows = p->work[ROWS_B];
    const ls_view grad = which ? p->own.dv : p->own.dk;
    ls_clean_rows(which ? p->own.v : p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, rows);
    write_logits(p, which, b, t, n, rows, e);
    ls_gemm(0, 1, n, R, d, 1, rows, d, delement + 2, stride, 0, de, R);
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) {
            const ls_real m = element[r * stride];
            const ls_real weight = m == -INFINITY ? 0 : ls_exp(e[j * R + r] - m);
            de[j * R + r] = weight * (delement[r * stride + 1] + de[j * R + r]);
            e[j * R + r] = weight;
        }
    ls_gemm(0, 0, n, d, R, 1, e, R, delement + 2, stride, 0, drows, d);
    ls_gemm(0, 1, n, d, R, 1, de, R, phi(p, which, p->params), R, 1, drows, d);
    ls_gemm(1, 0, d, R, n, 1, rows, d, de, R, 1, phi(p, which, p->dparams), R);
    for (int64_t j = 0; j < n; j++) {
        ls_real *to = ls_row(grad, b, h, t + j);
        if (!add) ls_zero(to, d);
        ls_axpy(d, 1, drows + j * d, to);
    }
}

static ls_status sums_backward(ls_pass *p, int phase)
{
    const ls_summary *s = &p->summary[phase + 1];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t t = 0; t < p->S; t += CHUNK)
                for (int which = 0; which < 2; which++)
                    sum_chunk_backward(p, which, b, h, t, ls_min(CHUNK, p->S - t), elements(p, s->sent, b, h, which),
                                       elements(p, s->dsent, b, h, which));
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

/* slot (R,d) = x / s; 0 where no key was left. */
static void normalise(int64_t R, int64_t d, const ls_real *element, ls_real *slot)
{
    for (int64_t r = 0; r < R; r++, element += d + 2)
        for (int64_t i = 0; i < d; i++) slot[r * d + i] = element[1] > 0 ? element[2 + i] / element[1] : 0;
}

/* d(s, x) of the elements from the gradient of the slots. */
static void normalise_backward(int64_t R, int64_t d, const ls_real *element, const ls_real *slot, const ls_real *dslot,
                               ls_real *delement)
{
    for (int64_t r = 0; r < R; r++) {
        const ls_real s = element[r * (d + 2) + 1], inverse = s > 0 ? 1 / s : 0;
        ls_real *to = delement + r * (d + 2);
        to[0] = 0;
        to[1] = -inverse * ls_dot(d, dslot + r * d, slot + r * d);
        for (int64_t i = 0; i < d; i++) to[2 + i] = inverse * dslot[r * d + i];
    }
}

static void probabilities(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n, const ls_real *keys)
{
    const int64_t R = slots(p), d = p->d;
    ls_clean_rows(p->q, b, h, t, n, d, p->pad_q, p->T, (ls_real)p->scale, p->work[ROWS_A]);
    ls_gemm(0, 1, n, R, d, 1, p->work[ROWS_A], d, keys, d, 0, p->work[LOGITS], R);
    for (int64_t i = 0; i < n; i++) ls_row_softmax(R, p->work[LOGITS] + i * R);
}

static ls_status apply(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d;
    ls_real *keys = p->work[SLOT_KEYS], *values = p->work[SLOT_VALUES];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            normalise(R, d, elements(p, p->summary[phase].got, b, h, 0), keys);
            normalise(R, d, elements(p, p->summary[phase].got, b, h, 1), values);
            for (int64_t t = 0; t < p->T; t += CHUNK) {
                const int64_t n = ls_min(CHUNK, p->T - t);
                probabilities(p, b, h, t, n, keys);
                ls_gemm(0, 0, n, d, R, 1, p->work[LOGITS], R, values, d, 0, ls_row(p->out, b, h, t), p->out.st);
                for (int64_t i = t; i < t + n; i++)
                    if (padded(p->pad_q, b * p->T + i)) ls_zero(ls_row(p->out, b, h, i), d);
            }
        }
    return LS_OK;
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d;
    const ls_summary *s = &p->summary[phase];
    ls_real *keys = p->work[SLOT_KEYS], *values = p->work[SLOT_VALUES];
    ls_real *dkeys = p->work[STATE], *dvalues = dkeys + R * d, *dout = p->work[ROWS_B], *dl = p->work[DLOGITS];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_real *got_k = elements(p, s->got, b, h, 0), *got_v = elements(p, s->got, b, h, 1);
            normalise(R, d, got_k, keys);
            normalise(R, d, got_v, values);
            ls_zero(dkeys, 2 * R * d);
            for (int64_t t = 0; t < p->T; t += CHUNK) {
                const int64_t n = ls_min(CHUNK, p->T - t);
                probabilities(p, b, h, t, n, keys);
                ls_clean_rows(p->dout, b, h, t, n, d, p->pad_q, p->T, 1, dout);
                const ls_real *prob = p->work[LOGITS];
                ls_gemm(0, 1, n, R, d, 1, dout, d, values, d, 0, dl, R);
                ls_gemm(1, 0, R, d, n, 1, prob, R, dout, d, 1, dvalues, d);
                for (int64_t i = 0; i < n; i++) {
                    const ls_real mean = ls_dot(R, prob + i * R, dl + i * R);
                    for (int64_t r = 0; r < R; r++) dl[i * R + r] = prob[i * R + r] * (dl[i * R + r] - mean);
                }
                ls_gemm(1, 0, R, d, n, 1, dl, R, p->work[ROWS_A], d, 1, dkeys, d); /* rows hold scale·q */
                ls_gemm(0, 0, n, d, R, p->scale, dl, R, keys, d, 0, ls_row(p->dq, b, h, t), p->dq.st);
                for (int64_t i = t; i < t + n; i++)
                    if (padded(p->pad_q, b * p->T + i)) ls_zero(ls_row(p->dq, b, h, i), d);
            }
            normalise_backward(R, d, got_k, keys, dkeys, elements(p, s->dgot, b, h, 0));
            normalise_backward(R, d, got_v, values, dvalues, elements(p, s->dgot, b, h, 1));
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, causal */

/* One key joins the R elements at `state`: m, s, x. */
static void join(int64_t R, int64_t d, const ls_real *logit, const ls_real *row, ls_real *state)
{
    for (int64_t r = 0; r < R; r++, state += d + 2) {
        ls_real shrink = 1, e = 1;
        if (logit[r] > state[0]) {
            shrink = state[0] == -INFINITY ? 0 : ls_exp(state[0] - logit[r]);
            state[0] = logit[r];
        } else
            e = ls_exp(logit[r] - state[0]);
        state[1] = state[1] * shrink + e;
        for (int64_t i = 2; i < d + 2; i++) state[i] = state[i] * shrink + e * row[i - 2];
    }
}

static void load_state(ls_pass *p, int phase, int64_t b, int64_t h)
{
    const size_t bytes = (size_t)(slots(p) * (p->d + 2)) * sizeof(ls_real);
    for (int which = 0; which < 2; which++)
        memcpy(p->work[STATE] + which * slots(p) * (p->d + 2), elements(p, p->summary[phase].got, b, h, which), bytes);
}

/* Chunk [t, t + n) made ready: clean keys in ROWS_A, clean values in ROWS_B, their logits. */
static void load_keys(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n)
{
    ls_clean_rows(p->own.k, b, h, t, n, p->d, p->own.pad, p->S, 1, p->work[ROWS_A]);
    ls_clean_rows(p->own.v, b, h, t, n, p->d, p->own.pad, p->S, 1, p->work[ROWS_B]);
    write_logits(p, PHI_K, b, t, n, p->work[ROWS_A], p->work[LOGITS]);
    write_logits(p, PHI_V, b, t, n, p->work[ROWS_B], p->work[DLOGITS]);
}

/* prob (R) = softmax_r(scale q·K̃_r) at the present state; logit, when asked for, keeps what the softmax saw. */
static void look(int64_t R, int64_t d, ls_real scale, const ls_real *q, const ls_real *state, ls_real *logit,
                 ls_real *prob)
{
    for (int64_t r = 0; r < R; r++, state += d + 2)
        prob[r] = state[1] > 0 ? scale * ls_dot(d, q, state + 2) / state[1] : 0;
    if (logit != NULL) memcpy(logit, prob, (size_t)R * sizeof *prob);
    ls_row_softmax(R, prob);
}

static ls_status apply_causal(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    ls_real *state_k = p->work[STATE], *state_v = state_k + R * stride, *prob = p->work[SLOT_KEYS];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            load_state(p, phase, b, h);
            for (int64_t t = 0; t < p->T; t += CHUNK) {
                const int64_t n = ls_min(CHUNK, p->T - t);
                load_keys(p, b, h, t, n);
                for (int64_t i = 0; i < n; i++) {
                    if (!padded(p->own.pad, b * p->S + t + i)) {
                        join(R, d, p->work[LOGITS] + i * R, p->work[ROWS_A] + i * d, state_k);
                        join(R, d, p->work[DLOGITS] + i * R, p->work[ROWS_B] + i * d, state_v);
                    }
                    ls_real *out = ls_row(p->out, b, h, t + i);
                    ls_zero(out, d);
                    if (padded(p->pad_q, b * p->T + t + i)) continue;
                    look(R, d, (ls_real)p->scale, ls_row(p->q, b, h, t + i), state_k, NULL, prob);
                    for (int64_t r = 0; r < R; r++) {
                        const ls_real *v = state_v + r * stride;
                        if (v[1] > 0) ls_axpy(d, prob[r] / v[1], v + 2, out);
                    }
                }
            }
        }
    return LS_OK;
}

/* Pass 1, forward in time: the states again; dq, and of each query what its slots' gradients are made of. */
static void causal_queries(ls_pass *p, int phase, int64_t b, int64_t h)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    ls_real *state_k = p->work[STATE], *state_v = state_k + R * stride;
    ls_real *prob = p->work[SLOT_KEYS], *logit = p->work[SLOT_VALUES];
    load_state(p, phase, b, h);
    for (int64_t t = 0; t < p->T; t += CHUNK) {
        const int64_t n = ls_min(CHUNK, p->T - t);
        load_keys(p, b, h, t, n);
        for (int64_t i = 0; i < n; i++) {
            ls_real *trace = p->work[TRACE] + (t + i) * TRACES * R, *dq = ls_row(p->dq, b, h, t + i);
            const ls_real *a = p->work[LOGITS] + i * R, *bb = p->work[DLOGITS] + i * R;
            if (!padded(p->own.pad, b * p->S + t + i)) {
                join(R, d, a, p->work[ROWS_A] + i * d, state_k);
                join(R, d, bb, p->work[ROWS_B] + i * d, state_v);
            }
            ls_zero(trace, TRACES * R);
            memcpy(trace + A * R, a, (size_t)R * sizeof *a);
            memcpy(trace + B * R, bb, (size_t)R * sizeof *bb);
            for (int64_t r = 0; r < R; r++) {
                trace[M_K * R + r] = state_k[r * stride];
                trace[M_V * R + r] = state_v[r * stride];
            }
            ls_zero(dq, d);
            if (padded(p->pad_q, b * p->T + t + i)) continue;
            const ls_real *dout = ls_row(p->dout, b, h, t + i);
            look(R, d, (ls_real)p->scale, ls_row(p->q, b, h, t + i), state_k, logit, prob);
            ls_real mean = 0, *dp = trace + DS_V * R;
            for (int64_t r = 0; r < R; r++) {
                const ls_real *v = state_v + r * stride;
                dp[r] = v[1] > 0 ? ls_dot(d, dout, v + 2) / v[1] : 0;
                mean += prob[r] * dp[r];
            }
            for (int64_t r = 0; r < R; r++) {
                const ls_real sk = state_k[r * stride + 1], sv = state_v[r * stride + 1];
                const ls_real rk = sk > 0 ? 1 / sk : 0, rv = sv > 0 ? 1 / sv : 0;
                const ls_real dl = prob[r] * (dp[r] - mean), g = (ls_real)p->scale * dl * rk;
                trace[DLOGIT * R + r] = g;                 /* dx_r of K̃ is g q */
                trace[DS_K * R + r] = -dl * logit[r] * rk; /* ds = -dK̃·K̃/s, and dK̃·K̃ = dl logit */
                trace[P_V * R + r] = prob[r] * rv;         /* dx_r of Ṽ is this times do */
                ls_axpy(d, g, state_k + r * stride + 2, dq);
                dp[r] = -prob[r] * rv * dp[r];
            }
        }
    }
}

/* One key leaves its gradient: with e = e^(logit - m), m the state's maximum at this key, to (d) and da (R). */
static void leave(int64_t R, int64_t d, const ls_real *logit, const ls_real *m, const ls_real *row,
                  const ls_real *dstate, ls_real *to, ls_real *da)
{
    for (int64_t r = 0; r < R; r++, dstate += d + 2) {
        const ls_real e = ls_exp(logit[r] - m[r]);
        da[r] = e * (dstate[1] + ls_dot(d, row, dstate + 2));
        ls_axpy(d, e, dstate + 2, to);
    }
}

/* The running gradient of a state, whose maxima fall from `later` to `now` as time runs backward. */
static void rescale(int64_t R, int64_t d, const ls_real *later, const ls_real *now, ls_real *dstate)
{
    for (int64_t r = 0; r < R; r++, dstate += d + 2) {
        if (now[r] == later[r]) continue;
        const ls_real shrink = now[r] == -INFINITY ? 0 : ls_exp(now[r] - later[r]);
        for (int64_t i = 1; i < d + 2; i++) dstate[i] *= shrink;
    }
}

/* Pass 2, backward in time: the gradient of the state is gathered from the queries, and each key takes its share. */
static void causal_keys(ls_pass *p, int phase, int64_t b, int64_t h)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    ls_real *dk_state = p->work[STATE], *dv_state = dk_state + R * stride;
    ls_real *k = p->work[ROWS_A], *v = p->work[ROWS_B], *da = p->work[LOGITS], *db = p->work[DLOGITS];
    ls_zero(dk_state, 2 * R * stride);
    const ls_real *later = NULL;
    for (int64_t end = p->T; end > 0;) {
        const int64_t n = (end - 1) % CHUNK + 1, t = end - n;
        ls_clean_rows(p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, k);
        ls_clean_rows(p->own.v, b, h, t, n, d, p->own.pad, p->S, 1, v);
        ls_zero(da, n * R);
        ls_zero(db, n * R);
        for (int64_t i = n - 1; i >= 0; i--) {
            const ls_real *trace = p->work[TRACE] + (t + i) * TRACES * R;
            if (later != NULL) {
                rescale(R, d, later + M_K * R, trace + M_K * R, dk_state);
                rescale(R, d, later + M_V * R, trace + M_V * R, dv_state);
            }
            later = trace;
            if (!padded(p->pad_q, b * p->T + t + i)) {
                const ls_real *q = ls_row(p->q, b, h, t + i), *dout = ls_row(p->dout, b, h, t + i);
                for (int64_t r = 0; r < R; r++) {
                    dk_state[r * stride + 1] += trace[DS_K * R + r];
                    dv_state[r * stride + 1] += trace[DS_V * R + r];
                    ls_axpy(d, trace[DLOGIT * R + r], q, dk_state + r * stride + 2);
                    ls_axpy(d, trace[P_V * R + r], dout, dv_state + r * stride + 2);
                }
            }
            ls_real *dk = ls_row(p->own.dk, b, h, t + i), *dv = ls_row(p->own.dv, b, h, t + i);
            ls_zero(dk, d);
            ls_zero(dv, d);
            if (padded(p->own.pad, b * p->S + t + i)) continue;
            leave(R, d, trace + A * R, trace + M_K * R, k + i * d, dk_state, dk, da + i * R);
            leave(R, d, trace + B * R, trace + M_V * R, v + i * d, dv_state, dv, db + i * R);
        }
        ls_gemm(0, 1, n, d, R, 1, da, R, phi(p, PHI_K, p->params), R, 1, ls_row(p->own.dk, b, h, t), p->own.dk.st);
        ls_gemm(0, 1, n, d, R, 1, db, R, phi(p, PHI_V, p->params), R, 1, ls_row(p->own.dv, b, h, t), p->own.dv.st);
        ls_gemm(1, 0, d, R, n, 1, k, d, da, R, 1, phi(p, PHI_K, p->dparams), R);
        ls_gemm(1, 0, d, R, n, 1, v, d, db, R, 1, phi(p, PHI_V, p->dparams), R);
        end = t;
    }
    for (int which = 0; which < 2; which++) { /* the prefix entered the first state scaled by e^(m_prefix - m_first) */
        const ls_real *got = elements(p, p->summary[phase].got, b, h, which);
        ls_real *to = elements(p, p->summary[phase].dgot, b, h, which);
        for (int64_t r = 0; r < R; r++) {
            const ls_real *from = (which ? dv_state : dk_state) + r * stride;
            const ls_real m = got[r * stride];
            const ls_real w = later == NULL || m == -INFINITY ? 0 : ls_exp(m - later[(which ? M_V : M_K) * R + r]);
            to[r * stride] = 0;
            for (int64_t i = 1; i < stride; i++) to[r * stride + i] = w * from[i];
        }
    }
}

static ls_status apply_causal_backward(ls_pass *p, int phase)
{
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            causal_queries(p, phase, b, h);
            causal_keys(p, phase, b, h);
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

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

const ls_mechanism ls_abc_mechanism = {
    .name = "abc",
    .option = options,
    .params = params,
    .plan = plan,
    .phases = {[LS_NS] = all_keys, [LS_CS] = causal, [LS_NC] = all_keys, [LS_CC] = all_keys},
    .step = {[LS_CS] = causal, [LS_NC] = all_keys, [LS_CC] = all_keys},
};
