/* Nyström attention (Xiong et al., 2021) from m landmarks; σ = scale, padded rows are 0.
 *
 *   q̄, k̄ = means over m segments of the sequences (CC: q̄ := k̄, so that an output knows its own query alone)
 *   F1 = softmax_r(σ q_i·k̄_r) (T,m),  F2 = softmax_c(σ q̄_r·k̄_c) (m,m),  F3 = softmax_j(σ q̄_r·k_j) (m,S) over unpadded j
 *   o = F1 W + conv(v),  W = Z G,  G = F3 v,  Z = iterative pseudo-inverse of F2 (kernels/pinv.h)
 *   conv (NS): o_t += Σ_x w[h,x] v_{t + x - half}, w (H,conv_kernel), half = floor(conv_kernel / 2), 0 beyond the ends
 *
 * fetch of values within half → sums of segments → reduce → keys write G as m slots (kernels/slots.h) → reduce → every
 * rank makes W (m is small), queries read it: F1 are their probabilities, since they sum to 1 over r.
 * What a softmax cannot see is left out of its logits: the mean of σ k̄_r in F1, the mean of k̄ in the keys of F3.
 *
 * Backward. Queries: dW = F1ᵀ do, d(σ k̄), dq. Then dZ = dW Gᵀ, dG = Zᵀ dW, dF2 from dZ and from the peak that scaled
 * Z_0 (of a matrix, or with init = 1 of all of them; equal peaks share its gradient). Keys: dv, dk and d(σ q̄) from dG.
 * Each rank does this with the part of dW that its queries gave: all of it is linear in dW, so sums over ranks are
 * right. read writes dq, write dk and dv; segments add to dq and dk, the convolution to dv.
 *
 * Short sequences (S <= m, or T <= m but for CC) are exact softmax attention: other phases of the same list.
 *
 * What is made of landmarks alone is in double. saved: W (B,H,m,d), doubles; or softmax's, and its output where the
 * convolution is added to it. */
#include "nystrom.h"
#include "gemm.h"
#include "pinv.h"
#include "softmax.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_nystrom_cuda;

enum { VALUES_OUT }; /* saved[]: W. Of a short sequence: softmax's, and ALONE of nystrom.h */
/* work[]; a short sequence has softmax's and ROOM. Of a chunk: */
enum {
    ROWS_A,
    ROWS_B,
    LOGITS,
    DLOGITS,
    SCRATCH,
    /* of all (b,h): σ k̄_r less their mean, or σ q̄_r (m,d); W - c (m,d); c (d); the mean of k̄ (d); constants (m) */
    KEYS,
    VALUES,
    CENTRE,
    KEY_CENTRE,
    CONSTANT,
    /* doubles of all (b,h): what rows are summed to (m, 2d + 2); gradients of q̄ and k̄ (2,m,d); F2 and its gradient */
    STATE,
    DMEANS,
    F2,
    DF2,
    /* doubles: scratch of the inverse, then Z_0, Z_1 ..; room for three (m,d), or (H,d), or a filter */
    MATRICES,
    ROOM
};

static const ls_option_info options[] = {
    {"num_landmarks", "m", 16, 1, 4096, 1, "landmarks: means of segments; shorter sequences are exact softmax"},
    {"pinv_iters", "pinv_iters", 6, 0, 100, 1, "iterations of the pseudo-inverse"},
    {"conv_kernel", "conv_kernel", 0, 0, 4095, 1, "width of a convolution of the values, odd; 0: none (NS)"},
    {"init", "init", 0, 0, 1, 1, "first inverse scaled by the peak of 0: its matrix, 1: all batch rows and heads"},
    {.name = NULL},
};

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t k = (int64_t)o->value[CONV_KERNEL];
    if (k == 0) return 0;
    list[CONV_WEIGHT] = (ls_param_info){"conv_weight", 2, {o->num_heads, k}, 0, 0, LS_INIT_NORMAL, 1 / sqrt((double)k)};
    return 1;
}

static ls_status check(const ls_attention_options *o)
{
    const int k = (int)o->value[CONV_KERNEL];
    if (k > 0 && k % 2 == 0)
        return ls_fail_of("conv_kernel", NULL, LS_ERR_ARGUMENT,
                          "nystrom: conv_kernel %d is even: use an odd number, or 0 for no convolution", k);
    if (k > 0 && o->pattern != LS_NS)
        return ls_fail_of("conv_kernel", NULL, LS_ERR_UNSUPPORTED,
                          "nystrom: conv_kernel %d: %s attention has no convolution: use 0", k,
                          ls_pattern_name(o->pattern));
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ sizes */

static ls_slots slots(const ls_pass *p)
{
    return (ls_slots){landmarks(p), p->d, p->work[SCRATCH]};
}

static ls_monoid segment_sums(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H, .plain = sums(p)};
}

static ls_monoid summary(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * landmarks(p), .has_max = 1, .scaled = 1 + p->d};
}

static void plan_long(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t d = p->d, G = p->B * p->H, m = landmarks(p), back = p->backward;
    p->saved[VALUES_OUT] = ls_take_doubles(saved, G * m * d);
    p->work[ROWS_A] = ls_take(work, LS_CHUNK * d);
    p->work[ROWS_B] = ls_take(work, LS_CHUNK * d);
    p->work[LOGITS] = ls_take(work, LS_CHUNK * m);
    p->work[DLOGITS] = ls_take(work, LS_CHUNK * m);
    p->work[SCRATCH] = ls_take(work, m * (d + 2));
    p->work[KEYS] = ls_take(work, G * m * d);
    p->work[VALUES] = ls_take(work, G * m * d);
    p->work[CENTRE] = ls_take(work, G * d);
    p->work[KEY_CENTRE] = ls_take(work, G * d);
    p->work[CONSTANT] = ls_take(work, G * m);
    p->work[STATE] = ls_take_doubles(work, G * m * (2 * d + 2));
    p->work[DMEANS] = ls_take_doubles(work, back * G * 2 * m * d);
    p->work[F2] = ls_take_doubles(work, G * m * m);
    p->work[DF2] = ls_take_doubles(work, back * G * m * m);
    p->work[MATRICES] = ls_take_doubles(work, ((int64_t)p->option[PINV_ITERS] + 2) * m * m + ls_pinv_scratch(m));
    p->work[ROOM] = ls_take_doubles(work, ls_max(ls_max(3 * m * d, p->H * d), kernel(p)));
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    if (is_long(p)) {
        plan_long(p, saved, work);
        return;
    }
    ls_softmax_plan(p, saved, work);
    p->saved[ALONE] = ls_take(saved, alone_reals(p));
    p->work[ROOM] = ls_take_doubles(work, kernel(p));
}

/* ------------------------------------------------------------------------------------------------ convolution */

static ls_span conv_reach(const ls_pass *p, int64_t lo, int64_t n)
{
    return (ls_span){0, lo - kernel(p) / 2, n + kernel(p) - 1};
}

/* The elements x of the filter whose values exist for the query at row t, and where the first of them is in the halo.
 */
typedef struct taps {
    int64_t from, to, row;
} taps;

static taps taps_of(const ls_pass *p, int64_t t)
{
    const int64_t first = p->query_span[0].lo + t - kernel(p) / 2;
    const int64_t from = ls_max(0, -first), to = ls_min(kernel(p), p->all_keys - first);
    return (taps){from, to, first + from - p->halo.span[0].lo};
}

/* Rows [t, t + n) of out += conv(v). */
static void add_conv(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n)
{
    const ls_real *w = p->params + p->param[CONV_WEIGHT].offset + h * kernel(p);
    for (int64_t i = t; i < t + n; i++) {
        if (ls_is_padded(p->pad_q, b * p->T + i)) continue;
        const taps x = taps_of(p, i);
        for (int64_t k = x.from; k < x.to; k++)
            ls_axpy(p->d, w[k], ls_row(p->halo.v, b, h, x.row + k - x.from), ls_row(p->out, b, h, i));
    }
}

/* Fills the halo's dv; the driver adds it to the owners' dv, which the other phases have written by then. */
static ls_status conv_backward(ls_pass *p, int phase)
{
    (void)phase;
    const ls_block *halo = &p->halo;
    const int64_t K = kernel(p), at = p->param[CONV_WEIGHT].offset;
    double *dw = ls_doubles(p->work[ROOM]);
    ls_zero_view(halo->dv, p->B, p->H, halo->n, p->d);
    for (int64_t h = 0; h < p->H; h++) {
        const ls_real *w = p->params + at + h * K;
        for (int64_t k = 0; k < K; k++) dw[k] = 0;
        for (int64_t b = 0; b < p->B; b++)
            for (int64_t i = 0; i < p->T; i++) {
                if (ls_is_padded(p->pad_q, b * p->T + i)) continue;
                const taps x = taps_of(p, i);
                const ls_real *dout = ls_row(p->dout, b, h, i);
                for (int64_t k = x.from; k < x.to; k++) {
                    const int64_t j = x.row + k - x.from;
                    if (ls_is_padded(halo->pad, b * halo->n + j)) continue;
                    dw[k] += (double)ls_dot(p->d, dout, ls_row(halo->v, b, h, j));
                    ls_axpy(p->d, w[k], dout, ls_row(halo->dv, b, h, j));
                }
            }
        for (int64_t k = 0; k < K; k++) p->dparams[at + h * K + k] += (ls_real)dw[k];
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ short sequences */

static ls_status finish_short(ls_pass *p, int phase)
{
    LS_TRY(ls_softmax_finish(p, phase));
    const ls_view alone = output_alone(p);
    for (int64_t b = 0; has_conv(p) && b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            for (int64_t t = 0; t < p->T; t++)
                memcpy(ls_row(alone, b, h, t), ls_row(p->out, b, h, t), (size_t)p->d * sizeof *p->out.p);
            add_conv(p, b, h, 0, p->T);
        }
    return LS_OK;
}

static ls_status finish_short_backward(ls_pass *p, int phase)
{
    const ls_view out = p->out;
    p->out = output_alone(p);
    const ls_status status = ls_softmax_finish_backward(p, phase);
    p->out = out;
    return status;
}

/* ------------------------------------------------------------------------------------------------ segments */

static ls_status segments(ls_pass *p, int phase)
{
    ls_landmark_sums(p, landmarks_of(p), ls_doubles(p->work[ROOM]), p->summary[phase + 1].sent);
    return LS_OK;
}

static ls_status segments_backward(ls_pass *p, int phase)
{
    ls_landmark_spread(p, landmarks_of(p), p->summary[phase + 1].dsent);
    return LS_OK;
}

/* mean (m,d) = q̄ (which = 0) or k̄ (1) of (b,h) g. `phase`: the one before which the sums were reduced. */
static void means(const ls_pass *p, int phase, int64_t g, int which, double *mean)
{
    const ls_landmarks l = landmarks_of(p);
    const int64_t d = p->d;
    const int of = which < l.first ? l.first : which;
    const ls_real *sum = p->summary[phase].got + g * sums(p) + ls_landmark_place(p, l, of);
    for (int64_t r = 0; r < l.count; r++)
        for (int64_t e = 0; e < d; e++) mean[r * d + e] = (double)sum[r * d + e] / ls_landmark_tokens(p, l, of, r);
}

/* centre (d) = the mean of the rows of x (m,d). */
static void mean_of_rows(int64_t m, int64_t d, const double *x, double *centre)
{
    for (int64_t e = 0; e < d; e++) centre[e] = 0;
    for (int64_t i = 0; i < m * d; i++) centre[i % d] += x[i] / (double)m;
}

/* CENTRE = the values' reference. */
static void load_reference(ls_pass *p, int phase)
{
    ls_landmark_reference(p, landmarks_of(p), p->summary[phase].got, p->work[CENTRE]);
}

/* ------------------------------------------------------------------------------------------------ keys write */

/* KEYS = σ q̄, KEY_CENTRE = the mean of k̄. */
static void load_queries(ls_pass *p, int phase)
{
    const int64_t m = landmarks(p), d = p->d;
    double *mean = ls_doubles(p->work[ROOM]), *centre = mean + m * d;
    for (int64_t g = 0; g < p->B * p->H; g++) {
        means(p, phase, g, 0, mean);
        for (int64_t i = 0; i < m * d; i++) p->work[KEYS][g * m * d + i] = (ls_real)(p->scale * mean[i]);
        means(p, phase, g, 1, mean);
        mean_of_rows(m, d, mean, centre);
        for (int64_t e = 0; e < d; e++) p->work[KEY_CENTRE][g * d + e] = (ls_real)centre[e];
    }
}

/* LOGITS (n,m) of a chunk of keys, ROWS_A (n,d) its rows less KEY_CENTRE. */
static void key_logits(ls_pass *p, const ls_chunk *c)
{
    const int64_t m = landmarks(p), d = p->d;
    ls_chunk_centred(c, p->own.k, d, p->own.pad, p->S, p->work[KEY_CENTRE] + c->g * d, p->work[ROWS_A]);
    ls_gemm(0, 1, c->n, m, d, 1, p->work[ROWS_A], d, p->work[KEYS] + c->g * m * d, d, 0, p->work[LOGITS], m);
    ls_chunk_hide(c, m, p->own.pad, p->S, p->work[LOGITS]);
}

static void write_chunk(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    key_logits(p, c);
    ls_chunk_centred(c, p->own.v, p->d, p->own.pad, p->S, p->work[CENTRE] + c->g * p->d, p->work[ROWS_B]);
    ls_slots_write(slots(p), c->n, p->work[LOGITS], p->work[ROWS_B],
                   ls_doubles(p->work[STATE]) + c->g * landmarks(p) * (p->d + 2));
}

static ls_status write(ls_pass *p, int phase)
{
    double *state = ls_doubles(p->work[STATE]);
    load_queries(p, phase);
    load_reference(p, phase);
    ls_slots_begin(slots(p), p->B * p->H, state);
    ls_each_chunk(p, phase, p->S, write_chunk);
    ls_slots_send(slots(p), p->B * p->H, state, p->summary[phase + 1].sent);
    return LS_OK;
}

/* STATE gathers d(σ q̄) (m,d). */
static void write_chunk_backward(ls_pass *p, int phase, const ls_chunk *c)
{
    const int64_t m = landmarks(p), d = p->d, at = c->g * m * (d + 2);
    const ls_summary *s = &p->summary[phase + 1];
    key_logits(p, c);
    ls_chunk_centred(c, p->own.v, d, p->own.pad, p->S, p->work[CENTRE] + c->g * d, p->work[ROWS_B]);
    ls_slots_write_backward(slots(p), c->n, s->sent + at, s->got + at, s->dsent + at, p->work[CONSTANT] + c->g * m,
                            p->work[ROWS_B], p->work[LOGITS], p->work[DLOGITS], ls_row(p->own.dv, c->b, c->h, c->t),
                            p->own.dv.st);
    ls_slots_sum(slots(p), c->n, p->work[DLOGITS], p->work[ROWS_A], d, ls_doubles(p->work[STATE]) + c->g * m * d);
    ls_gemm(0, 0, c->n, d, m, 1, p->work[DLOGITS], m, p->work[KEYS] + c->g * m * d, d, 0,
            ls_row(p->own.dk, c->b, c->h, c->t), p->own.dk.st);
}

/* Completes DMEANS and sends it to the sums of segments. */
static ls_status write_backward(ls_pass *p, int phase)
{
    const ls_landmarks l = landmarks_of(p);
    const int64_t m = l.count, d = p->d, G = p->B * p->H;
    double *dq = ls_doubles(p->work[STATE]);
    load_queries(p, phase);
    load_reference(p, phase);
    ls_slots_constants(slots(p), G, p->summary[phase + 1].got, p->summary[phase + 1].dsent, ls_doubles(p->work[ROOM]),
                       p->work[CENTRE], p->work[CONSTANT]);
    for (int64_t i = 0; i < G * m * d; i++) dq[i] = 0;
    ls_each_chunk(p, phase, p->S, write_chunk_backward);
    for (int64_t g = 0; g < G; g++) {
        double *dmean = ls_doubles(p->work[DMEANS]) + g * 2 * m * d;
        ls_real *dsums = p->summary[phase].dgot + g * sums(p);
        for (int64_t i = 0; i < m * d; i++) dmean[i] += p->scale * dq[g * m * d + i];
        for (int64_t i = 0; l.first == 1 && i < m * d; i++) dmean[m * d + i] += dmean[i];
        for (int which = l.first; which < 2; which++)
            for (int64_t i = 0; i < m * d; i++)
                dsums[ls_landmark_place(p, l, which) + i] =
                    (ls_real)(dmean[which * m * d + i] / ls_landmark_tokens(p, l, which, i / d));
        ls_zero(dsums + ls_landmark_place(p, l, 2), d + 1);
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ landmarks */

/* F2 (m,m) = softmax over columns of σ q̄ k̄ᵀ, for every (b,h); `sums`: the phase of the segments' reduce. */
static void make_F2(ls_pass *p, int sums)
{
    const int64_t m = landmarks(p), d = p->d;
    double *q = ls_doubles(p->work[ROOM]), *k = q + m * d;
    for (int64_t g = 0; g < p->B * p->H; g++) {
        double *F = ls_doubles(p->work[F2]) + g * m * m;
        means(p, sums, g, 0, q);
        means(p, sums, g, 1, k);
        ls_gemm_double(0, 1, m, m, d, p->scale, q, d, k, d, 0, F, m);
        for (int64_t r = 0; r < m; r++, F += m) {
            double top = -INFINITY, sum = 0;
            for (int64_t c = 0; c < m; c++) top = F[c] > top ? F[c] : top;
            for (int64_t c = 0; c < m; c++) sum += F[c] = exp(F[c] - top);
            for (int64_t c = 0; c < m; c++) F[c] /= sum;
        }
    }
}

/* The matrices [first, first + n) whose columns a peak is taken over: that of g, or all. */
static ls_span matrices_of(const ls_pass *p, int64_t g)
{
    return p->option[INIT] != 0 ? (ls_span){0, 0, p->B * p->H} : (ls_span){0, g, 1};
}

static double peak_of(const ls_pass *p, int64_t g)
{
    const int64_t m = landmarks(p);
    const ls_span s = matrices_of(p, g);
    double peak = 0;
    for (int64_t i = s.lo * m; i < (s.lo + s.n) * m; i++) {
        const double sum = ls_column_sum(m, ls_doubles(p->work[F2]) + i / m * m * m, i % m);
        peak = sum > peak ? sum : peak;
    }
    return peak;
}

/* The columns that reach the peak of g share its gradient. */
static void peak_backward(ls_pass *p, int64_t g, double peak, double dpeak)
{
    const int64_t m = landmarks(p);
    const ls_span s = matrices_of(p, g);
    int64_t reaching = 0;
    for (int count = 1; count >= 0; count--)
        for (int64_t i = s.lo * m; i < (s.lo + s.n) * m; i++) {
            const int64_t matrix = i / m * m * m, column = i % m;
            if (ls_column_sum(m, ls_doubles(p->work[F2]) + matrix, column) < peak) continue;
            if (count)
                reaching++;
            else
                for (int64_t r = 0; r < m; r++)
                    ls_doubles(p->work[DF2])[matrix + r * m + column] += dpeak / (double)reaching;
        }
}

static void inverse(ls_pass *p, int64_t g, double peak)
{
    const int64_t m = landmarks(p);
    double *scratch = ls_doubles(p->work[MATRICES]), *Z = scratch + ls_pinv_scratch(m);
    ls_pinv(m, (int)p->option[PINV_ITERS], ls_doubles(p->work[F2]) + g * m * m, peak, Z, scratch);
}

/* Z_t as `inverse` left it; one after the last is a spare matrix. */
static double *inverse_at(const ls_pass *p, int t)
{
    const int64_t m = landmarks(p);
    return ls_doubles(p->work[MATRICES]) + ls_pinv_scratch(m) + t * m * m;
}

/* G (m,d) of (b,h) g, from the reference in CENTRE. A third of ROOM is used beside. */
static void slot_values(const ls_pass *p, int phase, int64_t g, double *G)
{
    const int64_t m = landmarks(p), d = p->d;
    double *centre = ls_doubles(p->work[ROOM]) + 2 * m * d;
    ls_slots_values(slots(p), p->summary[phase].got + g * m * (d + 2), G, centre);
    for (int64_t i = 0; i < m * d; i++) G[i] += (double)p->work[CENTRE][g * d + i % d];
}

/* W = Z G of every (b,h). */
static void solve(ls_pass *p, int phase)
{
    const int64_t m = landmarks(p), d = p->d;
    double *G = ls_doubles(p->work[ROOM]), peak = 0;
    make_F2(p, phase - 1);
    load_reference(p, phase - 1);
    for (int64_t g = 0; g < p->B * p->H; g++) {
        if (g == 0 || p->option[INIT] == 0) peak = peak_of(p, g);
        inverse(p, g, peak);
        slot_values(p, phase, g, G);
        ls_gemm_double(0, 0, m, d, m, 1, inverse_at(p, (int)p->option[PINV_ITERS]), m, G, d, 0,
                       ls_doubles(p->saved[VALUES_OUT]) + g * m * d, d);
    }
}

/* DF2 and the gradient of the slots from dW (STATE). */
static void solve_backward(ls_pass *p, int phase)
{
    const int64_t m = landmarks(p), d = p->d;
    const int iterations = (int)p->option[PINV_ITERS];
    double *G = ls_doubles(p->work[ROOM]), *dG = G + m * d, peak = 0, dpeak = 0;
    make_F2(p, phase - 1);
    load_reference(p, phase - 1);
    for (int64_t g = 0; g < p->B * p->H; g++) {
        const double *dW = ls_doubles(p->work[STATE]) + g * m * d;
        double *dZ = inverse_at(p, iterations + 1);
        const ls_real *element = p->summary[phase].got + g * m * (d + 2);
        ls_real *delement = p->summary[phase].dgot + g * m * (d + 2);
        if (g == 0 || p->option[INIT] == 0) peak = peak_of(p, g);
        inverse(p, g, peak);
        slot_values(p, phase, g, G);
        ls_gemm_double(1, 0, m, d, m, 1, inverse_at(p, iterations), m, dW, d, 0, dG, d);
        for (int64_t i = 0; i < m; i++, element += d + 2, delement += d + 2) {
            const double s = element[1] > 0 ? 1 / (double)element[1] : 0;
            delement[0] = delement[1] = 0;
            for (int64_t e = 0; e < d; e++) delement[2 + e] = (ls_real)(s * dG[i * d + e]);
        }
        ls_gemm_double(0, 1, m, m, d, 1, dW, d, G, d, 0, dZ, m);
        dpeak += ls_pinv_backward(m, iterations, ls_doubles(p->work[F2]) + g * m * m, peak, inverse_at(p, 0), dZ,
                                  ls_doubles(p->work[DF2]) + g * m * m, ls_doubles(p->work[MATRICES]));
        if (p->option[INIT] != 0) continue;
        peak_backward(p, g, peak, dpeak);
        dpeak = 0;
    }
    if (p->option[INIT] != 0) peak_backward(p, 0, peak, dpeak);
}

/* DMEANS = the gradients of q̄ and k̄ from DF2 and from d(σ k̄) (dkeys, of all (b,h)). */
static void means_backward(ls_pass *p, int phase, const double *dkeys)
{
    const int64_t m = landmarks(p), d = p->d;
    double *q = ls_doubles(p->work[ROOM]), *k = q + m * d;
    for (int64_t g = 0; g < p->B * p->H; g++) {
        double *F = ls_doubles(p->work[F2]) + g * m * m, *dF = ls_doubles(p->work[DF2]) + g * m * m;
        double *dq = ls_doubles(p->work[DMEANS]) + g * 2 * m * d, *dk = dq + m * d;
        means(p, phase - 1, g, 0, q);
        means(p, phase - 1, g, 1, k);
        for (int64_t r = 0; r < m; r++) {
            double mean = 0;
            for (int64_t c = 0; c < m; c++) mean += F[r * m + c] * dF[r * m + c];
            for (int64_t c = 0; c < m; c++) dF[r * m + c] = F[r * m + c] * (dF[r * m + c] - mean);
        }
        for (int64_t i = 0; i < m * d; i++) dk[i] = p->scale * dkeys[g * m * d + i];
        ls_gemm_double(0, 0, m, d, m, p->scale, dF, m, k, d, 0, dq, d);
        ls_gemm_double(1, 0, m, d, m, p->scale, dF, m, q, d, 1, dk, d);
    }
}

/* ------------------------------------------------------------------------------------------------ queries read */

/* KEYS = σ k̄ less their mean, VALUES = W - c, CENTRE = c. */
static void load_slots(ls_pass *p, int phase)
{
    const int64_t m = landmarks(p), d = p->d;
    double *mean = ls_doubles(p->work[ROOM]), *centre = mean + m * d;
    for (int64_t g = 0; g < p->B * p->H; g++) {
        const double *W = ls_doubles(p->saved[VALUES_OUT]) + g * m * d;
        means(p, phase - 1, g, 1, mean);
        mean_of_rows(m, d, mean, centre);
        for (int64_t i = 0; i < m * d; i++)
            p->work[KEYS][g * m * d + i] = (ls_real)(p->scale * (mean[i] - centre[i % d]));
        mean_of_rows(m, d, W, centre);
        for (int64_t i = 0; i < m * d; i++) p->work[VALUES][g * m * d + i] = (ls_real)(W[i] - centre[i % d]);
        for (int64_t e = 0; e < d; e++) p->work[CENTRE][g * d + e] = (ls_real)centre[e];
    }
}

/* LOGITS (n,m) of a chunk of queries, whose clean rows are returned. */
static const ls_real *query_logits(ls_pass *p, const ls_chunk *c, int64_t *ld)
{
    const int64_t m = landmarks(p), d = p->d;
    const ls_real *q = ls_chunk_rows(c, p->q, d, p->pad_q, p->T, p->work[ROWS_A], ld);
    ls_gemm(0, 1, c->n, m, d, 1, q, *ld, p->work[KEYS] + c->g * m * d, d, 0, p->work[LOGITS], m);
    return q;
}

static void read_chunk(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    int64_t ld;
    query_logits(p, c, &ld);
    ls_slots_read(slots(p), c->n, p->work[LOGITS], p->work[VALUES] + c->g * landmarks(p) * p->d,
                  p->work[CENTRE] + c->g * p->d, ls_row(p->out, c->b, c->h, c->t), p->out.st);
    ls_chunk_blank(c, p->out, p->d, p->pad_q, p->T);
    if (has_conv(p)) add_conv(p, c->b, c->h, c->t, c->n);
}

static ls_status read(ls_pass *p, int phase)
{
    solve(p, phase);
    load_slots(p, phase);
    ls_each_chunk(p, phase, p->T, read_chunk);
    return LS_OK;
}

/* STATE gathers dW (m,d) of all (b,h), then d(σ k̄) (m,d) of all. */
static void read_chunk_backward(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    const int64_t m = landmarks(p), d = p->d, at = c->g * m * d;
    double *dW = ls_doubles(p->work[STATE]) + at, *dkeys = dW + p->B * p->H * m * d;
    int64_t ld, ldo;
    const ls_real *q = query_logits(p, c, &ld);
    const ls_real *dout = ls_chunk_rows(c, p->dout, d, p->pad_q, p->T, p->work[ROWS_B], &ldo);
    ls_slots_read_backward(slots(p), c->n, p->work[LOGITS], p->work[VALUES] + at, dout, ldo, p->work[DLOGITS], dW);
    ls_slots_sum(slots(p), c->n, p->work[DLOGITS], q, ld, dkeys);
    ls_gemm(0, 0, c->n, d, m, 1, p->work[DLOGITS], m, p->work[KEYS] + at, d, 0, ls_row(p->dq, c->b, c->h, c->t),
            p->dq.st);
}

static ls_status read_backward(ls_pass *p, int phase)
{
    const int64_t all = p->B * p->H * landmarks(p) * p->d;
    double *sums = ls_doubles(p->work[STATE]);
    load_slots(p, phase);
    for (int64_t i = 0; i < 2 * all; i++) sums[i] = 0;
    ls_each_chunk(p, phase, p->T, read_chunk_backward);
    solve_backward(p, phase);
    means_backward(p, phase, sums + all);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

#define LONG_PHASES                                                                                                    \
    {.name = "segments", .needed = is_long, .forward = segments, .backward = segments_backward, .of_source = 1},       \
        {.name = "write",                                                                                              \
         .crossing = LS_REDUCE,                                                                                        \
         .needed = is_long,                                                                                            \
         .monoid = segment_sums,                                                                                       \
         .forward = write,                                                                                             \
         .backward = write_backward,                                                                                   \
         .of_source = 1},                                                                                              \
    {                                                                                                                  \
        .name = "read", .crossing = LS_REDUCE, .needed = is_long, .monoid = summary, .forward = read,                  \
        .backward = read_backward                                                                                      \
    }

static const ls_phase phases[] = {
    {.name = "convolution",
     .crossing = LS_FETCH,
     .needed = has_conv,
     .reach = conv_reach,
     .fetches = LS_VALUES,
     .adds = 1,
     .backward = conv_backward},
    LONG_PHASES,
    {.name = "short: begin", .needed = is_short, .forward = ls_softmax_begin},
    {.name = "short: tiles",
     .crossing = LS_RING,
     .needed = is_short,
     .forward = ls_softmax_visit,
     .backward = ls_softmax_visit_backward},
    {.name = "short: finish", .needed = is_short, .forward = finish_short, .backward = finish_short_backward},
    {.name = NULL},
};
static const ls_phase step[] = {
    LONG_PHASES,
    {.name = "short: begin", .needed = is_short, .forward = ls_softmax_begin},
    {.name = "short: tiles", .crossing = LS_RING, .needed = is_short, .forward = ls_softmax_visit},
    {.name = "short: send", .needed = is_short, .forward = ls_softmax_send},
    {.name = "short: finish",
     .crossing = LS_REDUCE,
     .needed = is_short,
     .monoid = ls_softmax_statistics,
     .forward = ls_softmax_take},
    {.name = NULL},
};

static int mixes_rows(const ls_attention_options *o)
{
    return o->value[INIT] != 0;
}

const ls_mechanism ls_nystrom_mechanism = {
    .name = "nystrom",
    .option = options,
    .params = params,
    .check = check,
    .counts_padding = ls_segments_count_padding,
    .mixes_rows = mixes_rows,
    .plan = plan,
    .phases = {[LS_NS] = phases, [LS_NC] = phases, [LS_CC] = phases},
    .step = {[LS_CC] = step},
    .cuda = LS_IF_CUDA(&ls_nystrom_cuda),
};
