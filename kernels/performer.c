/* Performer: softmax attention's kernel by positive random features, FAVOR+ (Choromanski et al., 2021).
 *
 *   x̂ = scale^½ x,  W (m,d) for each head
 *   φ_q(q_i) = e^(W q̂_i - |q̂_i|²/2 - max_m W q̂_i) + ε,   φ_k(k_j) = e^(W k̂_j - |k̂_j|²/2 - c) + ε
 *   c = max over m and unpadded j of W k̂_j (CS: over j <= i)
 *   o_i = Σ_j φ_q(q_i)·φ_k(k_j) v_j / max(Σ_j φ_q(q_i)·φ_k(k_j), m denom_min)
 *
 * (the paper's m^(-½) in φ is left out, and so m stands at denom_min). The phases are those of linear.c, with r = m + 1
 * features: the exponentials of a key, which are taken anew when c rises, and a 1 for their common ε:
 *   a = [φ_q, ε Σ_m φ_q],  b = [e^(W k̂ - |k̂|²/2 - c), 1]
 * c and the maximum in φ_q are constants to the gradient: with x = W q̂ - |q̂|²/2, dq = scale^½ Wᵀ dx - scale q Σ_m dx.
 * With ε = 0 and denom_min = 0 they cancel, and so does e^(-|q̂|²/2): then they are maxima of the whole exponents
 * instead, so that long vectors do not underflow.
 *
 * W is drawn in double from (seed, stream, draw) alone, so it is the same on every rank: rows N(0, I), or orthogonal in
 * blocks of d rows, each as long as a fresh row of N(0, I).
 *
 * saved: scale^½ W (H,m,d). */
#include "gemm.h"
#include "performer.h"
#include "rng.h"
#include "tile.h"

enum { EXPONENTIALS = LS_LINEAR_WORK, HALVES, DRAW }; /* work[]; DRAW holds doubles */

static const ls_option_info options[] = {
    {"num_features", "m", 16, 1, 4096, 1, "random features"},
    {"eps", "eps", 1e-4, 0, 1, 0, "added to every feature"},
    {"denom_min", "denom_min", 0, 0, 1e30, 0, "the least denominator"},
    {"orthogonal", "orthogonal", 1, 0, 1, 1,
     "1: projections orthogonal in blocks of the head dimension, 0: independent"},
    {.name = NULL},
};

/* ------------------------------------------------------------------------------------------------ projection */

/* rows (n,d) become orthonormal, by Gram-Schmidt: twice, since once is not enough for its rounding. */
static void orthonormalise(int64_t n, int64_t d, double *rows)
{
    for (int64_t i = 0; i < n; i++) {
        double *x = rows + i * d, square = 0;
        for (int64_t k = 0; k < 2 * i; k++) {
            const double *y = rows + k % i * d;
            double s = 0;
            for (int64_t e = 0; e < d; e++) s += x[e] * y[e];
            for (int64_t e = 0; e < d; e++) x[e] -= s * y[e];
        }
        for (int64_t e = 0; e < d; e++) square += x[e] * x[e];
        for (int64_t e = 0; e < d; e++) x[e] /= sqrt(square);
    }
}

/* w (m,d) for head h. Each head has a stream of its own: m d normals, and as many again for the lengths of the rows. */
static void draw_projection(const ls_pass *p, int64_t h, double *w)
{
    const int64_t m = num_features(p), d = p->d;
    const uint32_t stream = p->stream * 65536u + (uint32_t)h, draw = (uint32_t)p->draw;
    for (int64_t i = 0; i < m * d; i++) w[i] = ls_normal(p->seed, stream, draw, (uint64_t)i);
    if (p->option[ORTHOGONAL] == 0) return;
    for (int64_t r = 0; r < m; r += d) orthonormalise(ls_min(d, m - r), d, w + r * d);
    for (int64_t r = 0; r < m; r++) {
        double square = 0;
        for (int64_t e = 0; e < d; e++) {
            const double x = ls_normal(p->seed, stream, draw, (uint64_t)((m + r) * d + e));
            square += x * x;
        }
        for (int64_t e = 0; e < d; e++) w[r * d + e] *= sqrt(square);
    }
}

static ls_status project(ls_pass *p)
{
    const int64_t n = num_features(p) * p->d;
    const double root = sqrt(p->scale);
    double *w = (double *)(void *)p->work[DRAW];
    for (int64_t h = 0; h < p->H; h++) {
        const ls_real *given = p->given_features == NULL ? NULL : p->given_features + h * n;
        if (given == NULL) draw_projection(p, h, w);
        for (int64_t i = 0; i < n; i++)
            p->saved[PROJECTION][h * n + i] = (ls_real)(root * (given == NULL ? w[i] : (double)given[i]));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ features */

static const ls_real *projection(const ls_pass *p, int64_t h)
{
    return p->saved[PROJECTION] + h * num_features(p) * p->d;
}

static int64_t features(const ls_pass *p)
{
    return num_features(p) + 1;
}

static int64_t exponentials(const ls_pass *p)
{
    return num_features(p);
}

static double floor_of(const double *option)
{
    return option[NUM_FEATURES] * option[DENOM_MIN];
}

static double least(const ls_pass *p)
{
    return floor_of(p->option);
}

/* x (n,ld) = W rows; half (n) = |row|²/2; both of scaled rows. */
static void logits(const ls_pass *p, int64_t h, int64_t n, const ls_real *rows, ls_real *x, int64_t ld, ls_real *half)
{
    ls_gemm(0, 1, n, num_features(p), p->d, 1, rows, p->d, projection(p, h), p->d, 0, x, ld);
    for (int64_t i = 0; i < n; i++, rows += p->d) half[i] = (ls_real)(p->scale / 2) * ls_dot(p->d, rows, rows);
}

static void queries(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, ls_real *a)
{
    const int64_t m = num_features(p);
    const ls_real eps = (ls_real)p->option[EPS];
    ls_real *e = p->work[EXPONENTIALS], *half = p->work[HALVES];
    logits(p, h, n, rows, e, m, half);
    for (int64_t i = 0; i < n; i++, e += m, a += m + 1) {
        const ls_real top = ls_row_max(m, e) + (any_will_do(p) ? 0 : half[i]), sum = ls_row_exp(m, top, e);
        for (int64_t r = 0; r < m; r++) a[r] = e[r] + eps;
        a[m] = eps * (sum + (ls_real)m * eps);
    }
}

static void keys(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, ls_real *b, ls_real *top)
{
    const int64_t m = num_features(p);
    const ls_real *half = p->work[HALVES];
    logits(p, h, n, rows, b, m + 1, p->work[HALVES]);
    for (int64_t j = 0; j < n; j++, b += m + 1) {
        top[j] = ls_row_max(m, b) - (any_will_do(p) ? half[j] : 0);
        for (int64_t r = 0; r < m; r++) b[r] -= half[j];
        b[m] = 1;
    }
}

/* drows = scale^½ Wᵀ dx - scale row Σ_m dx; dx (n,ld). */
static void logits_backward(const ls_pass *p, int64_t h, int64_t n, const ls_real *rows, const ls_real *dx, int64_t ld,
                            ls_real *drows)
{
    const int64_t m = num_features(p);
    ls_gemm(0, 0, n, p->d, m, 1, dx, ld, projection(p, h), p->d, 0, drows, p->d);
    for (int64_t i = 0; i < n; i++) {
        ls_real sum = 0;
        for (int64_t r = 0; r < m; r++) sum += dx[i * ld + r];
        ls_axpy(p->d, -(ls_real)p->scale * sum, rows + i * p->d, drows + i * p->d);
    }
}

static void queries_backward(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, const ls_real *da, ls_real *drows)
{
    const int64_t m = num_features(p);
    const ls_real eps = (ls_real)p->option[EPS];
    ls_real *e = p->work[EXPONENTIALS]; /* as queries() left them; they become dx */
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < m; r++) e[i * m + r] *= da[i * (m + 1) + r] + eps * da[i * (m + 1) + m];
    logits_backward(p, h, n, rows, e, m, drows);
}

static void keys_backward(ls_pass *p, int64_t h, int64_t n, const ls_real *rows, const ls_real *db, ls_real *drows)
{
    logits_backward(p, h, n, rows, db, num_features(p) + 1, drows);
}

static const ls_feature_map map = {.prepare = project,
                                   .features = features,
                                   .exponentials = exponentials,
                                   .floor = least,
                                   .queries = queries,
                                   .keys = keys,
                                   .queries_backward = queries_backward,
                                   .keys_backward = keys_backward,
                                   .cuda = LS_IF_CUDA(&ls_performer_map_cuda)};

/* ------------------------------------------------------------------------------------------------ table */

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t m = num_features(p);
    p->saved[PROJECTION] = ls_take(saved, p->H * m * p->d);
    ls_linear_plan(p, saved, work);
    p->work[EXPONENTIALS] = ls_take(work, LS_LINEAR_ROWS * m);
    p->work[HALVES] = ls_take(work, LS_LINEAR_ROWS);
    p->work[DRAW] = ls_arena_take(work, (size_t)(m * p->d) * sizeof(double));
}

static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    if (ls_linear_jumps(floor_of(o->value))) form->input[0].made = form->input[1].made = LS_EXACT;
}

const ls_mechanism ls_performer_mechanism = {
    .name = "performer",
    .option = options,
    .plan = plan,
    .phases = {[LS_NS] = ls_linear_all_keys,
               [LS_CS] = ls_linear_causal,
               [LS_NC] = ls_linear_all_keys,
               [LS_CC] = ls_linear_all_keys},
    .step = {[LS_CS] = ls_linear_step_causal, [LS_NC] = ls_linear_step_across, [LS_CC] = ls_linear_step_across},
    .layer = layer,
    .cuda = LS_IF_CUDA(&ls_performer_cuda),
    .kit = &map,
    .draws = LS_GIVEN_FEATURES,
};
