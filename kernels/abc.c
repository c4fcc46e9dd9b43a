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
 * Nothing is saved but the summaries, and in CS the state at the start of each block of rows: the backward pass makes
 * a, b and the probabilities anew. In CS it goes from the last block to the first, and in each forward for what queries
 * see, then backward for what keys get.
 *
 * Where few keys are left the slots are nearly alike, and the gradients are small differences of large numbers. So what
 * a softmax cannot see is taken out before it can round: over all keys, slots and rows are taken from their common
 * centre c = mean_r K̃_r (Σ_r dlogit_r = 0, Σ_j da_j = 0, and ds + c·dx = Σ (c - K̃)·dx); the causal recurrences run in
 * double. */
#include "gemm.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_abc_cuda;

enum { SLOTS };                                                                 /* option[] */
enum { PHI_K, PHI_V };                                                          /* param[] */
enum { CHUNK = 256 };                                                           /* rows worked on at a time */
enum { SUMS = 0, APPLY = 1 };                                                   /* phases */
enum { STATES };                                                                /* saved[]: doubles */
enum { ROWS_A, ROWS_B, LOGITS, DLOGITS, SLOT_KEYS, SLOT_VALUES, TRACE, STATE }; /* work[]; STATE holds doubles */

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

/* CS: rows of a block, whose start is a state that is kept, of so many doubles: they are no more than the trace. */
static int64_t block_rows(const ls_pass *p)
{
    return CHUNK * ls_max(1, (p->d + CHUNK - 1) / CHUNK);
}
static int64_t blocks_of(const ls_pass *p)
{
    return (p->T + block_rows(p) - 1) / block_rows(p);
}
static int64_t state_doubles(const ls_pass *p)
{
    return 2 * slots(p) * (p->d + 2);
}

/* Per position, what the second pass of the causal backward needs of the first: R doubles of each, then R reals. */
enum { DLOGIT, DS_K, P_V, DS_V, DOUBLES };
enum { A, B, M_K, M_V, REALS };
enum { AHEAD = 6 }; /* rows that are asked for before their turn */

static size_t trace_bytes(int64_t R)
{
    return (size_t)R * (DOUBLES * sizeof(double) + REALS * sizeof(ls_real));
}

static int64_t traced_rows(const ls_pass *p)
{
    return ls_min(p->T, block_rows(p));
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t R = slots(p), d = p->d;
    const int causal = p->pattern == LS_CS && !p->step, traced = causal && p->backward;
    const size_t state = (size_t)state_doubles(p) * sizeof(double);
    p->saved[STATES] = ls_arena_take(saved, causal ? (size_t)(p->B * p->H * blocks_of(p)) * state : 0);
    p->work[ROWS_A] = ls_take(work, CHUNK * d);
    p->work[ROWS_B] = ls_take(work, CHUNK * d);
    p->work[LOGITS] = ls_take(work, CHUNK * R);
    p->work[DLOGITS] = ls_take(work, CHUNK * R);
    p->work[SLOT_KEYS] = ls_take(work, R * (d + 2) + 8 * R + 6 * d); /* or short rows of doubles, see scratch */
    p->work[SLOT_VALUES] = ls_take(work, R * (d + 2) + R + d);
    p->work[STATE] = ls_arena_take(work, (traced ? 2 : 1) * state);
    p->work[TRACE] = ls_arena_take(work, traced ? (size_t)(traced_rows(p) + 1) * trace_bytes(R) : 0);
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

/* slot (R,d) = x / s, 0 where no key was left, less their mean, which goes to centre (d). */
static void centred_slots(int64_t R, int64_t d, const ls_real *element, ls_real *slot, ls_real *centre)
{
    ls_zero(centre, d);
    for (int64_t r = 0; r < R; r++, element += d + 2)
        for (int64_t i = 0; i < d; i++) {
            slot[r * d + i] = element[1] > 0 ? element[2 + i] / element[1] : 0;
            centre[i] += slot[r * d + i] / (ls_real)R;
        }
    for (int64_t r = 0; r < R; r++)
        for (int64_t i = 0; i < d; i++) slot[r * d + i] -= centre[i];
}

/* Rows [t, t + n) get their gradient from that of the summary: de_jr = constant_r + (k_j - c)·dx_r. Over all keys c is
 * the centre of the slots and constant_r = (c - K̃_r)·dx_r; in CS c = 0, constant_r = ds_r, and the prefix form wrote
 * dk, dv before: add. */
static void sum_chunk_backward(ls_pass *p, int which, int64_t b, int64_t h, int64_t t, int64_t n,
                               const ls_real *element, const ls_real *delement, const ls_real *centre,
                               const ls_real *constant)
{
    const int64_t R = slots(p), d = p->d, stride = d + 2;
    const int causal = p->pattern == LS_CS;
    ls_real *rows = p->work[ROWS_A], *e = p->work[LOGITS], *de = p->work[DLOGITS], *drows = p->work[ROWS_B];
    const ls_view grad = which ? p->own.dv : p->own.dk;
    ls_clean_rows(which ? p->own.v : p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, rows);
    write_logits(p, which, b, t, n, rows, e);
    for (int64_t j = 0; !causal && j < n; j++) ls_axpy(d, -1, centre, rows + j * d);
    ls_gemm(0, 1, n, R, d, 1, rows, d, delement + 2, stride, 0, de, R);
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) {
            const ls_real m = element[r * stride];
            const ls_real weight = m == -INFINITY ? 0 : ls_exp(e[j * R + r] - m);
            de[j * R + r] = weight * (constant[r] + de[j * R + r]);
            e[j * R + r] = weight;
        }
    ls_gemm(0, 0, n, d, R, 1, e, R, delement + 2, stride, 0, drows, d);
    ls_gemm(0, 1, n, d, R, 1, de, R, phi(p, which, p->params), R, 1, drows, d);
    ls_gemm(1, 0, d, R, n, 1, rows, d, de, R, 1, phi(p, which, p->dparams), R);
    for (int64_t j = 0; j < n; j++) {
        ls_real *to = ls_row(grad, b, h, t + j);
        if (!causal) ls_zero(to, d);
        ls_axpy(d, 1, drows + j * d, to);
    }
}

static ls_status sums_backward(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d;
    const ls_summary *s = &p->summary[phase + 1];
    ls_real *slot = p->work[SLOT_KEYS], *centre = p->work[SLOT_VALUES], *constant = centre + d;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int which = 0; which < 2; which++) {
                const ls_real *sent = elements(p, s->sent, b, h, which), *dsent = elements(p, s->dsent, b, h, which);
                centred_slots(R, d, elements(p, s->got, b, h, which), slot, centre);
                for (int64_t r = 0; r < R; r++)
                    constant[r] = p->pattern == LS_CS ? dsent[r * (d + 2) + 1]
                                                      : -ls_dot(d, slot + r * d, dsent + r * (d + 2) + 2);
                for (int64_t t = 0; t < p->S; t += CHUNK)
                    sum_chunk_backward(p, which, b, h, t, ls_min(CHUNK, p->S - t), sent, dsent, centre, constant);
            }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

/* dx of the elements from the gradient of the slots. What s is owed, -dx·K̃, is paid where the keys take theirs. */
static void slots_backward(int64_t R, int64_t d, const ls_real *element, const ls_real *dslot, ls_real *delement)
{
    for (int64_t r = 0; r < R; r++) {
        const ls_real s = element[r * (d + 2) + 1], inverse = s > 0 ? 1 / s : 0;
        ls_real *to = delement + r * (d + 2);
        to[0] = to[1] = 0;
        for (int64_t i = 0; i < d; i++) to[2 + i] = inverse * dslot[r * d + i];
    }
}

/* LOGITS (n,R) = softmax_r(scale q·(K̃_r - c)); ROWS_A keeps scale·q. */
static void probabilities(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n, const ls_real *keys)
{
    const int64_t R = slots(p), d = p->d;
    ls_clean_rows(p->q, b, h, t, n, d, p->pad_q, p->T, (ls_real)p->scale, p->work[ROWS_A]);
    ls_gemm(0, 1, n, R, d, 1, p->work[ROWS_A], d, keys, d, 0, p->work[LOGITS], R);
    for (int64_t i = 0; i < n; i++) ls_row_softmax(R, p->work[LOGITS] + i * R);
}

/* o = c_V + Σ_r p_r (Ṽ_r - c_V), since Σ_r p_r = 1. */
static ls_status apply(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d;
    ls_real *keys = p->work[SLOT_KEYS], *values = p->work[SLOT_VALUES], *centre = values + R * d;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            centred_slots(R, d, elements(p, p->summary[phase].got, b, h, 0), keys, centre);
            centred_slots(R, d, elements(p, p->summary[phase].got, b, h, 1), values, centre);
            for (int64_t t = 0; t < p->T; t += CHUNK) {
                const int64_t n = ls_min(CHUNK, p->T - t);
                probabilities(p, b, h, t, n, keys);
                for (int64_t i = t; i < t + n; i++) memcpy(ls_row(p->out, b, h, i), centre, (size_t)d * sizeof *centre);
                ls_gemm(0, 0, n, d, R, 1, p->work[LOGITS], R, values, d, 1, ls_row(p->out, b, h, t), p->out.st);
                for (int64_t i = t; i < t + n; i++)
                    if (ls_is_padded(p->pad_q, b * p->T + i)) ls_zero(ls_row(p->out, b, h, i), d);
            }
        }
    return LS_OK;
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    const int64_t R = slots(p), d = p->d;
    const ls_summary *s = &p->summary[phase];
    ls_real *keys = p->work[SLOT_KEYS], *values = p->work[SLOT_VALUES], *centre = values + R * d;
    ls_real *dkeys = p->work[STATE], *dvalues = dkeys + R * d, *dout = p->work[ROWS_B], *dl = p->work[DLOGITS];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_real *got_k = elements(p, s->got, b, h, 0), *got_v = elements(p, s->got, b, h, 1);
            centred_slots(R, d, got_k, keys, centre);
            centred_slots(R, d, got_v, values, centre);
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
                    if (ls_is_padded(p->pad_q, b * p->T + i)) ls_zero(ls_row(p->dq, b, h, i), d);
            }
            slots_backward(R, d, got_k, dkeys, elements(p, s->dgot, b, h, 0));
            slots_backward(R, d, got_v, dvalues, elements(p, s->dgot, b, h, 1));
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, causal */

/* The recurrences are written for any R and d, and compiled once more for USUAL_SLOTS and USUAL_WIDTH, where the short
 * loops become a few instructions: for that all of it has to be inline. */
#define SIZED static inline __attribute__((always_inline))
enum { USUAL_SLOTS = 16, USUAL_WIDTH = 64 };

/* The running elements of one (b,h), apart by kind so that the loops over slots become vector code. */
typedef struct running {
    double *m, *s, *x; /* (R), (R), (R,d) */
} running;

static running state_of(const ls_pass *p, int which)
{
    double *at = (double *)(void *)p->work[STATE] + which * slots(p) * (p->d + 2);
    return (running){at, at + slots(p), at + 2 * slots(p)};
}

/* Backward: the gradient of that state. */
static running gradient_of(const ls_pass *p, int which)
{
    return state_of(p, 2 + which);
}

/* Where the state at the start of the block of row t is kept. */
static double *kept_state(const ls_pass *p, int64_t b, int64_t h, int64_t t)
{
    const int64_t block = (b * p->H + h) * blocks_of(p) + t / block_rows(p);
    return (double *)(void *)p->saved[STATES] + block * state_doubles(p);
}

/* One pass over the rows of a state, x (R,d): x_r += give_r row, and of what they are then dot_r = x_r·q and
 * sum = Σ_r take_r x_r; take NULL, which is known where this is inlined: no sum. Four slots at a time share the loads
 * of row and q. */
SIZED void give_dot_and_take(int64_t R, int64_t d, const double *give, const double *row, double *restrict x,
                             const double *q, double *dot, const double *take, double *restrict sum)
{
    int64_t r = 0;
    for (int64_t i = 0; take != NULL && i < d; i++) sum[i] = 0;
    for (; r + 4 <= R; r += 4, x += 4 * d) {
        const double g0 = give[r], g1 = give[r + 1], g2 = give[r + 2], g3 = give[r + 3];
        double t0 = 0, t1 = 0, t2 = 0, t3 = 0, s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        if (take != NULL) t0 = take[r], t1 = take[r + 1], t2 = take[r + 2], t3 = take[r + 3];
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t i = 0; i < d; i++) {
            const double x0 = x[i] + g0 * row[i], x1 = x[d + i] + g1 * row[i];
            const double x2 = x[2 * d + i] + g2 * row[i], x3 = x[3 * d + i] + g3 * row[i];
            x[i] = x0, x[d + i] = x1, x[2 * d + i] = x2, x[3 * d + i] = x3;
            s0 += q[i] * x0, s1 += q[i] * x1, s2 += q[i] * x2, s3 += q[i] * x3;
            if (take != NULL) sum[i] += (t0 * x0 + t1 * x1) + (t2 * x2 + t3 * x3);
        }
        dot[r] = s0, dot[r + 1] = s1, dot[r + 2] = s2, dot[r + 3] = s3;
    }
    for (; r < R; r++, x += d) {
        double s = 0;
#pragma omp simd reduction(+ : s)
        for (int64_t i = 0; i < d; i++) {
            x[i] += give[r] * row[i];
            s += q[i] * x[i];
            if (take != NULL) sum[i] += take[r] * x[i];
        }
        dot[r] = s;
    }
}

/* sum (d) = Σ_r w_r x_r */
SIZED void combine(int64_t R, int64_t d, const double *w, const double *x, double *restrict sum)
{
    int64_t r = 0;
    for (int64_t i = 0; i < d; i++) sum[i] = 0;
    for (; r + 4 <= R; r += 4, x += 4 * d) {
#pragma omp simd
        for (int64_t i = 0; i < d; i++)
            sum[i] += (w[r] * x[i] + w[r + 1] * x[d + i]) + (w[r + 2] * x[2 * d + i] + w[r + 3] * x[3 * d + i]);
    }
    for (; r < R; r++, x += d)
        for (int64_t i = 0; i < d; i++) sum[i] += w[r] * x[i];
}

SIZED void widen(int64_t n, const ls_real *x, double *y)
{
    for (int64_t i = 0; i < n; i++) y[i] = (double)x[i];
}

SIZED void narrow(int64_t n, const double *x, ls_real *y)
{
    for (int64_t i = 0; i < n; i++) y[i] = (ls_real)x[i];
}

/* Where a logit is above the maximum so far, the sums shrink to the new one. Rare: maxima of n keys change ln n times.
 */
static void raise_maxima(int64_t R, int64_t d, const ls_real *logit, running y)
{
    for (int64_t r = 0; r < R; r++) {
        if (!((double)logit[r] > y.m[r])) continue;
        const double shrink = y.m[r] == -INFINITY ? 0 : (double)ls_exp((ls_real)y.m[r] - logit[r]);
        y.m[r] = (double)logit[r];
        y.s[r] *= shrink;
        for (int64_t i = 0; i < d; i++) y.x[r * d + i] *= shrink;
    }
}

/* One key, its logits (R), is about to join: e (R) is what its row counts in each slot, 0 where it is padded. */
SIZED void weigh(int64_t R, int64_t d, const ls_real *logit, int is_padded, running y, double *e)
{
    int higher = 0;
    for (int64_t r = 0; r < R; r++) higher |= (double)logit[r] > y.m[r];
    if (higher && !is_padded) raise_maxima(R, d, logit, y);
    if (is_padded) {
        for (int64_t r = 0; r < R; r++) e[r] = 0;
        return;
    }
#pragma omp simd
    for (int64_t r = 0; r < R; r++) {
        e[r] = (double)ls_exp(logit[r] - (ls_real)y.m[r]);
        y.s[r] += e[r];
    }
}

/* Rows of a head lie far apart: asked for a few rows ahead, they are there when their turn comes. */
static void ask_for(ls_view v, int64_t b, int64_t h, int64_t t, int64_t n, int64_t d)
{
    const int64_t line = 64 / (int64_t)sizeof(ls_real);
    if (t < 0 || t >= n) return;
    for (int64_t i = 0; i < d; i += line) __builtin_prefetch(ls_row(v, b, h, t) + i);
}

static void load_state(ls_pass *p, int phase, int64_t b, int64_t h)
{
    const int64_t R = slots(p), d = p->d;
    for (int which = 0; which < 2; which++) {
        const ls_real *from = elements(p, p->summary[phase].got, b, h, which);
        const running y = state_of(p, which);
        for (int64_t r = 0; r < R; r++, from += d + 2) {
            y.m[r] = (double)from[0];
            y.s[r] = (double)from[1];
            widen(d, from + 2, y.x + r * d);
        }
    }
}

/* Chunk [t, t + n) made ready: clean keys in ROWS_A, clean values in ROWS_B, their logits. */
static void load_keys(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n)
{
    ls_clean_rows(p->own.k, b, h, t, n, p->d, p->own.pad, p->S, 1, p->work[ROWS_A]);
    ls_clean_rows(p->own.v, b, h, t, n, p->d, p->own.pad, p->S, 1, p->work[ROWS_B]);
    write_logits(p, PHI_K, b, t, n, p->work[ROWS_A], p->work[LOGITS]);
    write_logits(p, PHI_V, b, t, n, p->work[ROWS_B], p->work[DLOGITS]);
}

/* Short rows of doubles for the row under way. */
typedef struct scratch {
    double *row, *q, *sum, *prob, *logit, *e, *take; /* (d) three times, (R) four times */
} scratch;
enum { SCRATCH_ROWS = 3, SCRATCH_SLOTS = 4 };

static scratch scratch_of(const ls_pass *p)
{
    const int64_t R = slots(p), d = p->d;
    double *at = (double *)(void *)p->work[SLOT_KEYS], *slot = at + SCRATCH_ROWS * d;
    return (scratch){at, at + d, at + 2 * d, slot, slot + R, slot + 2 * R, slot + 3 * R};
}

/* A row of the queries' side, 0 where it is padded. */
SIZED void widen_query(const ls_pass *p, int64_t d, ls_view v, int64_t b, int64_t h, int64_t t, double *row)
{
    if (ls_is_padded(p->pad_q, b * p->T + t))
        for (int64_t i = 0; i < d; i++) row[i] = 0;
    else
        widen(d, ls_row(v, b, h, t), row);
}

/* prob (R) = softmax_r(logit), logit (R) = scale q·K̃_r at the present state, from the dot products q·x_r; both are
 * exact to double's rounding but for the exponential, whose relative error does no harm. */
SIZED void look(int64_t R, double scale, running y, double *logit, double *prob)
{
    double top = -INFINITY, sum = 0;
    for (int64_t r = 0; r < R; r++) {
        logit[r] = y.s[r] > 0 ? scale * logit[r] / y.s[r] : 0;
        top = logit[r] > top ? logit[r] : top;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t r = 0; r < R; r++) sum += prob[r] = (double)ls_exp((ls_real)(logit[r] - top));
    for (int64_t r = 0; r < R; r++) prob[r] /= sum;
}

/* Row i of the chunk joins the state of the keys, which its query then sees: w.logit, w.prob. */
SIZED void join_keys(ls_pass *p, int64_t R, int64_t d, int64_t b, int64_t h, int64_t t, int64_t i, scratch w)
{
    const running keys = state_of(p, 0);
    weigh(R, d, p->work[LOGITS] + i * R, ls_is_padded(p->own.pad, b * p->S + t + i), keys, w.e);
    widen(d, p->work[ROWS_A] + i * d, w.row);
    widen_query(p, d, p->q, b, h, t + i, w.q);
    give_dot_and_take(R, d, w.e, w.row, keys.x, w.q, w.logit, NULL, NULL);
    look(R, p->scale, keys, w.logit, w.prob);
}

/* Its value is about to join: w.e, w.row. */
SIZED void weigh_values(ls_pass *p, int64_t R, int64_t d, int64_t b, int64_t t, int64_t i, scratch w)
{
    weigh(R, d, p->work[DLOGITS] + i * R, ls_is_padded(p->own.pad, b * p->S + t + i), state_of(p, 1), w.e);
    widen(d, p->work[ROWS_B] + i * d, w.row);
}

SIZED void apply_causal_sized(ls_pass *p, int64_t R, int64_t d, int phase)
{
    const running values = state_of(p, 1);
    const scratch w = scratch_of(p);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            load_state(p, phase, b, h);
            for (int64_t t = 0; t < p->T; t += CHUNK) {
                const int64_t n = ls_min(CHUNK, p->T - t);
                if (!p->step && t % block_rows(p) == 0)
                    memcpy(kept_state(p, b, h, t), p->work[STATE], (size_t)state_doubles(p) * sizeof(double));
                load_keys(p, b, h, t, n);
                for (int64_t i = 0; i < n; i++) {
                    ask_for(p->q, b, h, t + i + AHEAD, p->T, d);
                    ask_for(p->out, b, h, t + i + AHEAD, p->T, d);
                    join_keys(p, R, d, b, h, t, i, w);
                    weigh_values(p, R, d, b, t, i, w);
                    for (int64_t r = 0; r < R; r++) w.take[r] = values.s[r] > 0 ? w.prob[r] / values.s[r] : 0;
                    give_dot_and_take(R, d, w.e, w.row, values.x, w.row, w.logit, w.take, w.sum);
                    if (ls_is_padded(p->pad_q, b * p->T + t + i))
                        ls_zero(ls_row(p->out, b, h, t + i), d);
                    else
                        narrow(d, w.sum, ls_row(p->out, b, h, t + i));
                }
            }
        }
}

static int is_usual(const ls_pass *p)
{
    return slots(p) == USUAL_SLOTS && p->d == USUAL_WIDTH;
}

static ls_status apply_causal(ls_pass *p, int phase)
{
    if (is_usual(p))
        apply_causal_sized(p, USUAL_SLOTS, USUAL_WIDTH, phase);
    else
        apply_causal_sized(p, slots(p), p->d, phase);
    return LS_OK;
}

/* Of row i of the block under way; there is one more, for what is kept of the block after it. */
static double *trace_of(const ls_pass *p, int64_t i)
{
    return (double *)(void *)((char *)p->work[TRACE] + (size_t)i * trace_bytes(slots(p)));
}

static ls_real *reals_of(const ls_pass *p, int64_t i)
{
    return (ls_real *)(void *)(trace_of(p, i) + DOUBLES * slots(p));
}

/* The trace of a query, and dq: with dp_r = do·Ṽ_r and dlogit = p (dp - Σ p dp),
 *   the gradient of x_r of K̃ is g q, g = scale dlogit / s, and that of s is -dlogit logit / s, since dK̃·K̃ = dlogit
 * logit; the gradient of x_r of Ṽ is do p / s, and that of s is -dp p / s. */
SIZED void trace_query(ls_pass *p, int64_t R, int64_t d, const scratch w, double *trace, double *dq)
{
    const running keys = state_of(p, 0), values = state_of(p, 1);
    double mean = 0, *dp = trace + DS_V * R; /* do·x_r, made when the value joined */
    for (int64_t r = 0; r < R; r++) {
        dp[r] = values.s[r] > 0 ? dp[r] / values.s[r] : 0;
        mean += w.prob[r] * dp[r];
    }
    for (int64_t r = 0; r < R; r++) {
        const double rk = keys.s[r] > 0 ? 1 / keys.s[r] : 0, rv = values.s[r] > 0 ? 1 / values.s[r] : 0;
        const double dl = w.prob[r] * (dp[r] - mean), g = p->scale * dl * rk;
        trace[DLOGIT * R + r] = g;
        trace[DS_K * R + r] = -dl * w.logit[r] * rk;
        trace[P_V * R + r] = w.prob[r] * rv;
        dp[r] = -w.prob[r] * rv * dp[r];
    }
    combine(R, d, trace + DLOGIT * R, keys.x, dq);
}

/* Pass 1 through the block [lo, hi), forward in time: the states again; dq, and of each query what its slots' gradients
 * are made of. */
SIZED void causal_queries(ls_pass *p, int64_t R, int64_t d, int64_t b, int64_t h, int64_t lo, int64_t hi)
{
    const running keys = state_of(p, 0), values = state_of(p, 1);
    const scratch w = scratch_of(p);
    memcpy(p->work[STATE], kept_state(p, b, h, lo), (size_t)state_doubles(p) * sizeof(double));
    for (int64_t t = lo; t < hi; t += CHUNK) {
        const int64_t n = ls_min(CHUNK, hi - t);
        load_keys(p, b, h, t, n);
        for (int64_t i = 0; i < n; i++) {
            double *trace = trace_of(p, t - lo + i);
            ask_for(p->q, b, h, t + i + AHEAD, p->T, d);
            ask_for(p->dout, b, h, t + i + AHEAD, p->T, d);
            ask_for(p->dq, b, h, t + i + AHEAD, p->T, d);
            join_keys(p, R, d, b, h, t, i, w);
            weigh_values(p, R, d, b, t, i, w);
            widen_query(p, d, p->dout, b, h, t + i, w.q);
            give_dot_and_take(R, d, w.e, w.row, values.x, w.q, trace + DS_V * R, NULL, NULL);
            ls_real *reals = reals_of(p, t - lo + i);
            memcpy(reals + A * R, p->work[LOGITS] + i * R, (size_t)R * sizeof *reals);
            memcpy(reals + B * R, p->work[DLOGITS] + i * R, (size_t)R * sizeof *reals);
            narrow(R, keys.m, reals + M_K * R);
            narrow(R, values.m, reals + M_V * R);
            if (ls_is_padded(p->pad_q, b * p->T + t + i)) {
                for (int64_t r = 0; r < R; r++)
                    trace[DLOGIT * R + r] = trace[DS_K * R + r] = trace[P_V * R + r] = trace[DS_V * R + r] = 0;
                ls_zero(ls_row(p->dq, b, h, t + i), d);
                continue;
            }
            trace_query(p, R, d, w, trace, w.sum);
            narrow(d, w.sum, ls_row(p->dq, b, h, t + i));
        }
    }
}

/* One position of a state's gradient y, time running backward: its query gives `give` (R) of s and give_row (R) times
 * row of x. Then its key takes, with e = e^(logit - m), m the state's maximum there: w.sum (d), and da (R) of the
 * logits. */
SIZED void exchange_row(int64_t R, int64_t d, const double *give, const double *give_row, const ls_real *logit,
                        const ls_real *m, int is_padded, running y, const scratch w, ls_real *da)
{
#pragma omp simd
    for (int64_t r = 0; r < R; r++) w.e[r] = is_padded ? 0 : (double)ls_exp(logit[r] - m[r]);
    give_dot_and_take(R, d, give_row, w.q, y.x, w.row, w.prob, w.e, w.sum);
    for (int64_t r = 0; r < R; r++) {
        y.s[r] += give[r];
        da[r] = (ls_real)(w.e[r] * (y.s[r] + w.prob[r]));
    }
}

/* The running gradient of a state, whose maxima fall from `later` to `now` as time runs backward. */
static void rescale(int64_t R, int64_t d, const ls_real *later, const ls_real *now, running y)
{
    if (memcmp(later, now, (size_t)R * sizeof *now) == 0) return;
    for (int64_t r = 0; r < R; r++) {
        if (!(now[r] < later[r])) continue;
        const double shrink = now[r] == -INFINITY ? 0 : (double)ls_exp(now[r] - later[r]);
        y.s[r] *= shrink;
        for (int64_t i = 0; i < d; i++) y.x[r * d + i] *= shrink;
    }
}

/* The gradient of the prefix, which entered the first state scaled by e^(m_prefix - m_first); first NULL: no position.
 */
static void prefix_backward(ls_pass *p, int phase, int64_t b, int64_t h, const ls_real *first)
{
    const int64_t R = slots(p), d = p->d;
    for (int which = 0; which < 2; which++) {
        const ls_real *got = elements(p, p->summary[phase].got, b, h, which);
        ls_real *to = elements(p, p->summary[phase].dgot, b, h, which);
        const running y = gradient_of(p, which);
        for (int64_t r = 0; r < R; r++, got += d + 2, to += d + 2) {
            const double weight =
                first == NULL || got[0] == -INFINITY ? 0 : (double)ls_exp(got[0] - first[(which ? M_V : M_K) * R + r]);
            to[0] = 0;
            to[1] = (ls_real)(weight * y.s[r]);
            for (int64_t i = 0; i < d; i++) to[2 + i] = (ls_real)(weight * y.x[r * d + i]);
        }
    }
}

/* Pass 2 through the block [lo, hi), backward in time: the gradient of the state is gathered from the queries, and each
 * key takes its share. later: reals of the row after it, or NULL; returns those of its first row. */
SIZED const ls_real *causal_keys(ls_pass *p, int64_t R, int64_t d, int64_t b, int64_t h, int64_t lo, int64_t hi,
                                 const ls_real *later)
{
    const running keys = gradient_of(p, 0), values = gradient_of(p, 1);
    const scratch w = scratch_of(p);
    ls_real *k = p->work[ROWS_A], *v = p->work[ROWS_B], *da = p->work[LOGITS], *db = p->work[DLOGITS];
    for (int64_t end = hi; end > lo;) {
        const int64_t n = (end - lo - 1) % CHUNK + 1, t = end - n;
        ls_clean_rows(p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, k);
        ls_clean_rows(p->own.v, b, h, t, n, d, p->own.pad, p->S, 1, v);
        for (int64_t i = n - 1; i >= 0; i--) {
            const double *trace = trace_of(p, t - lo + i);
            const ls_real *reals = reals_of(p, t - lo + i);
            ask_for(p->q, b, h, t + i - AHEAD, p->T, d);
            ask_for(p->dout, b, h, t + i - AHEAD, p->T, d);
            ask_for(p->own.dk, b, h, t + i - AHEAD, p->T, d);
            ask_for(p->own.dv, b, h, t + i - AHEAD, p->T, d);
            if (later != NULL) {
                rescale(R, d, later + M_K * R, reals + M_K * R, keys);
                rescale(R, d, later + M_V * R, reals + M_V * R, values);
            }
            later = reals;
            const int nothing = ls_is_padded(p->own.pad, b * p->S + t + i);
            widen_query(p, d, p->q, b, h, t + i, w.q);
            widen(d, k + i * d, w.row);
            exchange_row(R, d, trace + DS_K * R, trace + DLOGIT * R, reals + A * R, reals + M_K * R, nothing, keys, w,
                         da + i * R);
            narrow(d, w.sum, ls_row(p->own.dk, b, h, t + i));
            widen_query(p, d, p->dout, b, h, t + i, w.q);
            widen(d, v + i * d, w.row);
            exchange_row(R, d, trace + DS_V * R, trace + P_V * R, reals + B * R, reals + M_V * R, nothing, values, w,
                         db + i * R);
            narrow(d, w.sum, ls_row(p->own.dv, b, h, t + i));
        }
        ls_gemm(0, 1, n, d, R, 1, da, R, phi(p, PHI_K, p->params), R, 1, ls_row(p->own.dk, b, h, t), p->own.dk.st);
        ls_gemm(0, 1, n, d, R, 1, db, R, phi(p, PHI_V, p->params), R, 1, ls_row(p->own.dv, b, h, t), p->own.dv.st);
        ls_gemm(1, 0, d, R, n, 1, k, d, da, R, 1, phi(p, PHI_K, p->dparams), R);
        ls_gemm(1, 0, d, R, n, 1, v, d, db, R, 1, phi(p, PHI_V, p->dparams), R);
        end = t;
    }
    return later;
}

SIZED void causal_backward(ls_pass *p, int64_t R, int64_t d, int phase)
{
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const ls_real *later = NULL;
            for (int64_t i = 0; i < state_doubles(p); i++) gradient_of(p, 0).m[i] = 0; /* all of both lies together */
            for (int64_t hi = p->T, lo; hi > 0; hi = lo) {
                lo = (hi - 1) / block_rows(p) * block_rows(p);
                causal_queries(p, R, d, b, h, lo, hi);
                later = causal_keys(p, R, d, b, h, lo, hi, later);
                ls_real *kept = reals_of(p, traced_rows(p));
                later = memcpy(kept, later, (size_t)(REALS * R) * sizeof *kept);
            }
            prefix_backward(p, phase, b, h, later);
        }
}

static ls_status apply_causal_backward(ls_pass *p, int phase)
{
    if (is_usual(p))
        causal_backward(p, USUAL_SLOTS, USUAL_WIDTH, phase);
    else
        causal_backward(p, slots(p), p->d, phase);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase all_keys[] = {
    {.name = "sums", .forward = sums, .backward = sums_backward, .of_source = 1, .keys_alone = 1},
    {.name = "apply", .crossing = LS_REDUCE, .monoid = summary, .forward = apply, .backward = apply_backward},
    {.name = NULL},
};
static const ls_phase causal[] = {
    {.name = "sums", .forward = sums, .backward = sums_backward, .feeds_scan = 1, .keys_alone = 1},
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
    .cuda = LS_IF_CUDA(&ls_abc_cuda),
};
