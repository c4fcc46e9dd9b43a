/* S4D, the diagonal state space layer (Gu et al., 2022, "On the Parameterization and Initialization of Diagonal State
 * Space Models"). Every feature h is a filter of its own, of N/2 complex modes; it uses set h mod n_ssm of w.
 *
 *   λ = dt w,  a = e^λ,  β = (a - 1)/w,  W = 2 C β;   u := 0 where padded
 *   s_t = a s_{t-1} + u_t            the state of a mode, all that a step need keep
 *   CS: y_t = D u_t + Re Σ W s_t     summed over the modes
 *   NS: C has two halves, W and W¹;  y_t += Re Σ W¹ r_t,  r_t = a r_{t+1} + u_{t+1}
 *
 * Chunks. Positions go in chunks of n. A state enters a chunk (s on the left, r on the right), its successor leaves:
 *
 *   s' = a^n s + Σ_k a^(n-1-k) u_k
 *   r' = a^n r + Σ_k a^k u_k
 *   y_k = Re Σ W a^(k+1) s + Σ_{j<=k} K_{k-j} u_j        K_l = Re Σ W a^l, and D in K_0
 *         + Re Σ W¹ a^(n-1-k) r + Σ_{j>k} K¹_{j-k-1} u_j  K¹_l = Re Σ W¹ a^l
 *
 * With chunks as rows, all of it is products of small matrices, for each feature its own: inputs with powers of a
 * make what joins the states, states with powers make outputs, inputs with a Toeplitz matrix of the taps K make the
 * rest of the outputs. Features are the lanes of these products (lanes.h). The powers, and the chain of states from
 * chunk to chunk, are made in double and rounded once: |a| is close to 1, and float powers would drift.
 *
 * Gradients. Of a complex x we keep γ_x with dL = Re(γ_x dx): holomorphic steps then need no conjugates, x' = f(x)
 * gives γ_x = γ_x' f'(x), and a real input gets Re γ. With γ of the state that enters a chunk, γ' of what leaves:
 *
 *   γ = a^n γ' + W V,  V = Σ_k dy_k a^(k+1)
 *   du_k = Re Σ γ' a^(n-1-k) + Σ_j K_{j-k} dy_j
 *   γ_W += s V
 *   γ_λ += γ' (n a^n s + Σ_k (n-1-k) a^(n-1-k) u_k) + W s Σ_k (k+1) a^(k+1) dy_k
 *   taps: dK_l = Σ_j dy_{j+l} u_j,  γ_W += dK_l a^l,  γ_λ += dK_l W l a^l
 *
 * and likewise for r, W¹, K¹. For γ_λ this is Σ_t γ_{s_t} a s_{t-1}, over the steps of the state to every t, sorted
 * by chunks. Lastly
 *
 *   γ_C = 2β γ_W,  γ_β = Σ 2C γ_W,  γ_λ += γ_β a/w,  γ_w = dt γ_λ - γ_β β/w,  d log_dt = Re Σ γ_λ λ
 *
 * A pair of real derivatives (d/dRe, d/dIm) is (Re γ, -Im γ). This "gradient form" is what crosses ranks.
 *
 * Ranks. The summary of a shard is the state that it makes from nothing: ends → scan → apply, and r is scanned in
 * reverse. The scan takes λ for a constant: who owns position t answers for the step of the state to t, whatever the
 * state held, also for the first position of a shard. There γ_{s_t} has two parts, and γ_λ is linear in it:
 *
 *   apply backward: what the shard's own outputs want. Nothing leaves the shard (γ' = 0 after its last chunk);
 *                   s begins with what came from others, got. γ at the first chunk is d got.
 *   ends backward:  what later ranks want. d sent leaves the shard, outputs have no part; s again begins with got,
 *                   for the scan carried got, too, over this shard. d got is left alone: that is the scan's adjoint.
 *
 * So every pair (γ', s) is met once, by the owner of the position. In ends backward γ' only fades from chunk to chunk,
 * so γ_λ = γ' S with γ' at the shard's end and S = ∂(state there)/∂λ, which apply backward makes by the way; du is to
 * be made no further than γ' is seen. */
#include "lanes.h"
#include "tile.h"

#include <complex.h>

#ifndef CMPLX /* glibc has it for GCC alone */
#define CMPLX(x, y) __builtin_complex((double)(x), (double)(y))
#endif

extern const ls_cuda_mechanism ls_s4d_cuda;

enum { STATE_SIZE, CHANNELS, SETS };                  /* option[] */
enum { LOG_DT, LOG_W_RE, W_IM, C_, D_ };              /* param[] */
enum { CHUNK = 16, PIECE = 8, ROWS = PIECE * CHUNK }; /* positions, and chunks, worked on at a time */
enum { STRIDE = ROWS + 4 };                           /* of rows of lanes, apart from powers of two */
enum { BLOCK = 512 };                                 /* features worked on at a time: rows are read in long runs */
enum { FROM_LEFT, FROM_RIGHT };                       /* directions: of s, of r */
enum { ENTERING, LEAVING };                           /* the states of a sweep: s or r, and γ' of one */
enum { LAMBDA, POWER, BETA };                         /* saved[]: complex doubles (E,N/2) of λ, a, β */
enum { DESK, DLAMBDA, DW, SLOPES };                   /* work[]: complex doubles (E,N/2), (n_ssm,N/2); reals */
enum { ENDS_LEFT = 1, ENDS_RIGHT };                   /* phases, see scan_of */

static const ls_option_info options[] = {
    {"state_size", "N", 16, 2, 1024, 1, "reals of state for each feature: N/2 complex modes"},
    {"channels", "channels", 1, 1, 256, 1, "outputs for each feature"},
    {"n_ssm", "n_ssm", 1, 1, 65536, 1, "sets of w: feature h uses set h mod n_ssm"},
    {.name = NULL},
};

static ls_status check(const ls_attention_options *o)
{
    if ((int64_t)o->value[STATE_SIZE] % 2 != 0)
        return ls_fail_of("state_size", NULL, LS_ERR_ARGUMENT,
                          "s4d: state_size %g is odd: the modes are complex, use an even number", o->value[STATE_SIZE]);
    return LS_OK;
}

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t E = o->embed_dim, modes = (int64_t)o->value[STATE_SIZE] / 2, sets = (int64_t)o->value[SETS];
    const int64_t channels = (int64_t)o->value[CHANNELS], directions = o->pattern == LS_NS ? 2 : 1;
    list[LOG_DT] = (ls_param_info){"log_dt", 1, {E}, 0, 0, LS_INIT_LOG_STEP, 0};
    list[LOG_W_RE] = (ls_param_info){"log_w_re", 2, {sets, modes}, 0, 0, LS_INIT_CONSTANT, log(0.5)};
    list[W_IM] = (ls_param_info){"w_im", 2, {sets, modes}, 0, 0, LS_INIT_INVERSE, 1};
    list[C_] = (ls_param_info){"C", 4, {directions * channels, E, modes, 2}, 0, 0, LS_INIT_NORMAL, sqrt(0.5)};
    list[D_] = (ls_param_info){"D", 2, {channels, E}, 0, 0, LS_INIT_NORMAL, 1};
    return 5;
}

static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    form->inputs = 0;
    form->core_width = (int64_t)o->value[CHANNELS] * o->embed_dim;
    form->gelu = 1;
}

/* ------------------------------------------------------------------------------------------------ sizes, memory */

/* LS_LANES neighbouring features: tables, running states, sums of gradients. N: re and im by turns. */
typedef struct group {
    int64_t first, width;             /* features [first, first + width) */
    ls_lanes *power, *slope;          /* (n + 1, N) a^e, e a^e */
    ls_lanes *taps;                   /* (channels, 2n - 1) by distance 1-n .. n-1 of the output from the input */
    ls_lanes *weight;                 /* (directions, channels, N) W */
    double *decay;                    /* (2, N, LANES) a^n, and a^(what is left after the last whole chunk) */
    double *state;                    /* (2, directions, N, LANES) the states of a sweep */
    double *border[2];                /* (pieces, N, LANES) states at the pieces, of the sweep that goes first */
    double *slopes[2];                /* by direction, (N, LANES) S of a batch row, where ends backward finds it */
    double *fade;                     /* (N, LANES) a^(positions to the end), from the left */
    double *dlambda, *dweight, *dtap; /* (N, LANES), (directions, channels, N, LANES), (channels, 2n - 1, LANES) */
} group;

/* All memory for a block of features. Buffers without group are used by one after the other. */
typedef struct desk {
    int64_t N, n, channels, directions;
    int several;                        /* 1: states leave for other ranks */
    int64_t places, groups;             /* groups there is room for, groups in use */
    group *group;                       /* (places) */
    ls_lanes *u, *du;                   /* (places, STRIDE) rows of a piece */
    ls_lanes *y;                        /* (channels, places, STRIDE) out or dout */
    ls_lanes *entering[2], *leaving[2]; /* by direction, (PIECE, N): states that enter chunks, γ' in gradient form */
    ls_lanes *local, *mixed;            /* (PIECE, N) */
    ls_lanes *seen;                     /* (channels, PIECE, N) V */
    ls_lanes *products;                 /* (n, n) */
} desk;

static desk *desk_of(const ls_pass *p)
{
    return (desk *)(void *)p->work[DESK];
}

static double complex *complex_of(ls_real *x)
{
    return (double complex *)(void *)x;
}

/* Positions [t, t + chunks·length) of a shard. What is left after the last whole chunk is a piece of one short chunk.
 */
typedef struct piece {
    int64_t t, chunks, length;
} piece;

static int64_t chunk_length(const ls_pass *p)
{
    return ls_max(1, ls_min(CHUNK, p->T));
}

static int64_t count_pieces(const ls_pass *p)
{
    const int64_t n = chunk_length(p), whole = p->T / n;
    return (whole + PIECE - 1) / PIECE + (p->T % n > 0);
}

static piece piece_at(const ls_pass *p, int64_t i)
{
    const int64_t n = chunk_length(p), whole = p->T / n, first = i * PIECE;
    if (first < whole) return (piece){first * n, ls_min(PIECE, whole - first), n};
    return (piece){whole * n, 1, p->T % n};
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t E = p->d, N = (int64_t)p->option[STATE_SIZE], channels = (int64_t)p->option[CHANNELS];
    const int64_t n = chunk_length(p), directions = p->pattern == LS_NS ? 2 : 1, taps = channels * (2 * n - 1);
    const int64_t back = p->backward, both = directions == 2, pieces = count_pieces(p);
    const int64_t places = (ls_min(BLOCK, E) + LS_LANES - 1) / LS_LANES;
    const size_t lanes = sizeof(ls_lanes), doubles = LS_LANES * sizeof(double), z = sizeof(double complex);
    for (int i = LAMBDA; i <= BETA; i++) p->saved[i] = ls_arena_take(saved, (size_t)(E * N / 2) * z);
    p->work[DLAMBDA] = ls_arena_take(work, (size_t)(back * E * N / 2) * z);
    const int several = p->T < p->all_queries;
    const int64_t rows = (E + LS_LANES - 1) / LS_LANES * LS_LANES;
    p->work[SLOPES] = ls_arena_take(work, (size_t)(back * several * directions * p->B * rows * N) * sizeof(double));
    p->work[DW] = ls_arena_take(work, (size_t)(back * (int64_t)p->option[SETS] * N / 2) * z);
    desk *place = ls_arena_take(work, sizeof *place);
    desk k = {.N = N, .n = n, .channels = channels, .directions = directions, .several = several, .places = places};
    k.group = ls_arena_take(work, (size_t)places * sizeof *k.group);
    for (int64_t i = 0; i < places; i++) {
        group g = {0};
        g.power = ls_arena_take(work, (size_t)((n + 1) * N) * lanes);
        g.slope = ls_arena_take(work, (size_t)(back * (n + 1) * N) * lanes);
        g.taps = ls_arena_take(work, (size_t)taps * lanes);
        g.weight = ls_arena_take(work, (size_t)(directions * channels * N) * lanes);
        g.decay = ls_arena_take(work, (size_t)(2 * N) * doubles);
        g.state = ls_arena_take(work, (size_t)(2 * directions * N) * doubles);
        g.dlambda = ls_arena_take(work, (size_t)(back * N) * doubles);
        g.dweight = ls_arena_take(work, (size_t)(back * directions * channels * N) * doubles);
        g.dtap = ls_arena_take(work, (size_t)(back * taps) * doubles);
        g.border[0] = ls_arena_take(work, (size_t)((back || both) * pieces * N) * doubles);
        g.fade = ls_arena_take(work, (size_t)(back * several * N) * doubles);
        g.border[1] = ls_arena_take(work, (size_t)(back * both * pieces * N) * doubles);
        if (k.group != NULL) k.group[i] = g;
    }
    k.u = ls_arena_take(work, (size_t)(places * STRIDE) * lanes);
    k.du = ls_arena_take(work, (size_t)(back * places * STRIDE) * lanes);
    k.y = ls_arena_take(work, (size_t)(channels * places * STRIDE) * lanes);
    for (int64_t d = 0; d < directions; d++) {
        k.entering[d] = ls_arena_take(work, (size_t)(PIECE * N) * lanes);
        k.leaving[d] = ls_arena_take(work, (size_t)(back * PIECE * N) * lanes);
    }
    k.local = ls_arena_take(work, (size_t)(PIECE * N) * lanes);
    k.mixed = ls_arena_take(work, (size_t)(PIECE * N) * lanes);
    k.seen = ls_arena_take(work, (size_t)(back * channels * PIECE * N) * lanes);
    k.products = ls_arena_take(work, (size_t)(back * n * n) * lanes);
    if (place != NULL) *place = k;
    p->work[DESK] = (ls_real *)(void *)place;
}

/* The phase before which a direction's states cross. */
static int scan_of(const ls_pass *p, int direction)
{
    return p->pattern == LS_NS ? ENDS_RIGHT + 1 + direction : ENDS_LEFT + 1;
}

static ls_monoid carried(const ls_pass *p)
{
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2;
    return (ls_monoid){.groups = p->B * p->d * modes,
                       .plain = 2,
                       .decay = (const double *)(const void *)p->saved[LAMBDA],
                       .decays = p->d * modes,
                       .counts = 1};
}

/* ------------------------------------------------------------------------------------------------ parameters */

static const ls_real *param(const ls_pass *p, int which)
{
    return p->params + p->param[which].offset;
}

static ls_real *dparam(const ls_pass *p, int which)
{
    return p->dparams + p->param[which].offset;
}

/* Where mode m of feature h stands in log_w_re and w_im. */
static int64_t in_set(const ls_pass *p, int64_t h, int64_t m)
{
    return h % (int64_t)p->option[SETS] * ((int64_t)p->option[STATE_SIZE] / 2) + m;
}

static double complex frequency(const ls_pass *p, int64_t h, int64_t m)
{
    const int64_t i = in_set(p, h, m);
    return CMPLX(-exp((double)param(p, LOG_W_RE)[i]), (double)param(p, W_IM)[i]);
}

static double complex saved_of(const ls_pass *p, int which, int64_t h, int64_t m)
{
    return complex_of(p->saved[which])[h * ((int64_t)p->option[STATE_SIZE] / 2) + m];
}

/* C of direction and channel: entry of the flat tensor. */
static int64_t in_c(const ls_pass *p, int direction, int64_t channel, int64_t h, int64_t m)
{
    const int64_t row = direction * (int64_t)p->option[CHANNELS] + channel;
    return 2 * ((row * p->d + h) * ((int64_t)p->option[STATE_SIZE] / 2) + m);
}

static double complex c_of(const ls_pass *p, int direction, int64_t channel, int64_t h, int64_t m)
{
    const ls_real *c = param(p, C_) + in_c(p, direction, channel, h, m);
    return CMPLX((double)c[0], (double)c[1]);
}

/* Phase 0: λ, which the scans need as well; a - 1 is made so that no digits are lost where λ is small. */
static ls_status decays(ls_pass *p, int phase)
{
    (void)phase;
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2;
    for (int64_t h = 0; h < p->d; h++) {
        const double dt = exp((double)param(p, LOG_DT)[h]);
        for (int64_t m = 0; m < modes; m++) {
            const double complex w = frequency(p, h, m), lambda = dt * w;
            const double y = cimag(lambda), half = sin(y / 2), grown = expm1(creal(lambda));
            const double complex a1 = CMPLX(grown * cos(y) - 2 * half * half, (grown + 1) * sin(y));
            complex_of(p->saved[LAMBDA])[h * modes + m] = lambda;
            complex_of(p->saved[POWER])[h * modes + m] = 1 + a1;
            complex_of(p->saved[BETA])[h * modes + m] = a1 / w;
        }
    }
    return LS_OK;
}

static ls_status decays_backward(ls_pass *p, int phase)
{
    (void)phase;
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2, all = (int64_t)p->option[SETS] * modes;
    double complex *dw = complex_of(p->work[DW]);
    for (int64_t h = 0; h < p->d; h++) {
        const double dt = exp((double)param(p, LOG_DT)[h]);
        double sum = 0;
        for (int64_t m = 0; m < modes; m++) {
            const double complex dlambda = complex_of(p->work[DLAMBDA])[h * modes + m];
            dw[in_set(p, h, m)] += dt * dlambda;
            sum += creal(dlambda * saved_of(p, LAMBDA, h, m));
        }
        dparam(p, LOG_DT)[h] += (ls_real)sum;
    }
    for (int64_t i = 0; i < all; i++) {
        dparam(p, LOG_W_RE)[i] -= (ls_real)(creal(dw[i]) * exp((double)param(p, LOG_W_RE)[i]));
        dparam(p, W_IM)[i] -= (ls_real)cimag(dw[i]);
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ tables */

static void put(ls_lanes *x, int64_t lane, double complex z)
{
    x[0][lane] = (ls_real)creal(z);
    x[1][lane] = (ls_real)cimag(z);
}

static double complex get(const double *x, int64_t lane)
{
    return CMPLX(x[lane], x[LS_LANES + lane]);
}

static void fill_powers(const ls_pass *p, const desk *k, group *g, int64_t lane)
{
    const int64_t rest = p->T % k->n;
    for (int64_t m = 0; m < k->N; m += 2) {
        const double complex a = saved_of(p, POWER, g->first + lane, m / 2);
        double complex power = 1;
        for (int64_t e = 0; e <= k->n; e++, power *= a) {
            put(g->power + e * k->N + m, lane, power);
            if (p->backward) put(g->slope + e * k->N + m, lane, (double)e * power);
            for (int i = 0; i < 2; i++) {
                if (e != (i == 0 ? k->n : rest)) continue;
                double *to = g->decay + (i * k->N + m) * LS_LANES + lane;
                to[0] = creal(power);
                to[LS_LANES] = cimag(power);
            }
        }
    }
}

/* W, and the taps: K on the right of the middle, K¹ on the left. */
static void fill_taps(const ls_pass *p, const desk *k, group *g, int64_t lane, int64_t channel)
{
    const int64_t h = g->first + lane, middle = k->n - 1;
    double tap[2 * CHUNK - 1] = {0};
    tap[middle] = (double)param(p, D_)[channel * p->d + h];
    for (int64_t m = 0; m < k->N; m += 2) {
        const double complex a = saved_of(p, POWER, h, m / 2), beta = saved_of(p, BETA, h, m / 2);
        for (int d = 0; d < k->directions; d++) {
            const double complex weight = 2 * beta * c_of(p, d, channel, h, m / 2);
            put(g->weight + (d * k->channels + channel) * k->N + m, lane, weight);
            double complex x = weight;
            for (int64_t l = 0; l < k->n - d; l++, x *= a) tap[d ? middle - 1 - l : middle + l] += creal(x);
        }
    }
    for (int64_t i = 0; i < 2 * k->n - 1; i++) g->taps[channel * (2 * k->n - 1) + i][lane] = (ls_real)tap[i];
}

static void zero_lanes(ls_lanes *x, int64_t n)
{
    if (n > 0) memset(x, 0, (size_t)n * sizeof *x);
}

static void zero_doubles(double *x, int64_t n)
{
    memset(x, 0, (size_t)n * LS_LANES * sizeof *x);
}

/* Features [first, first + BLOCK) come to the desk, taps and weights only where there are outputs. Lanes without a
 * feature are 0 throughout. */
static void open_block(const ls_pass *p, desk *k, int64_t first, int with_outputs)
{
    const int64_t N = k->N, taps = k->channels * (2 * k->n - 1), rows = k->directions * k->channels * N;
    k->groups = 0;
    for (int64_t i = 0; i < k->places && first + i * LS_LANES < p->d; i++) {
        group *g = &k->group[k->groups++];
        g->first = first + i * LS_LANES;
        g->width = ls_min(LS_LANES, p->d - g->first);
        if (g->width < LS_LANES) {
            zero_lanes(g->power, (k->n + 1) * N);
            if (p->backward) zero_lanes(g->slope, (k->n + 1) * N);
            zero_lanes(g->taps, taps);
            zero_lanes(g->weight, rows);
            zero_doubles(g->decay, 2 * N);
        }
        for (int64_t lane = 0; lane < g->width; lane++) {
            fill_powers(p, k, g, lane);
            for (int64_t c = 0; with_outputs && c < k->channels; c++) fill_taps(p, k, g, lane, c);
        }
        if (!p->backward) continue;
        zero_doubles(g->dlambda, N);
        zero_doubles(g->dweight, rows);
        zero_doubles(g->dtap, taps);
    }
}

/* ------------------------------------------------------------------------------------------------ rows, summaries */

/* to (groups, STRIDE) = rows of a piece, 0 where padded. v begins at the block's first feature. */
static void load(const ls_pass *p, const desk *k, ls_view v, int64_t b, const piece *x, ls_lanes *to)
{
    const group *last = &k->group[k->groups - 1];
    const int64_t whole = k->groups - (last->width < LS_LANES);
    for (int64_t i = 0; i < x->chunks * x->length; i++, to++) {
        const ls_real *from = ls_row(v, b, 0, x->t + i);
        if (ls_is_padded(p->pad_q, b * p->T + x->t + i)) {
            for (int64_t g = 0; g < k->groups; g++) to[g * STRIDE] = (ls_lanes){0};
            continue;
        }
        for (int64_t g = 0; g < whole; g++) memcpy(&to[g * STRIDE], from + g * LS_LANES, sizeof *to);
        if (whole == k->groups) continue;
        to[whole * STRIDE] = (ls_lanes){0};
        memcpy(&to[whole * STRIDE], from + whole * LS_LANES, (size_t)last->width * sizeof *from);
    }
}

/* The way back: padded rows become 0. */
static void store(const ls_pass *p, const desk *k, const ls_lanes *from, int64_t b, const piece *x, ls_view v)
{
    const group *last = &k->group[k->groups - 1];
    const int64_t whole = k->groups - (last->width < LS_LANES);
    for (int64_t i = 0; i < x->chunks * x->length; i++, from++) {
        ls_real *to = ls_row(v, b, 0, x->t + i);
        if (ls_is_padded(p->pad_q, b * p->T + x->t + i)) {
            ls_zero(to, last->first + last->width - k->group[0].first);
            continue;
        }
        for (int64_t g = 0; g < whole; g++) memcpy(to + g * LS_LANES, &from[g * STRIDE], sizeof *from);
        if (whole < k->groups) memcpy(to + whole * LS_LANES, &from[whole * STRIDE], (size_t)last->width * sizeof *to);
    }
}

static ls_view features(ls_view v, int64_t first)
{
    v.p += first;
    return v;
}

static double *state_of(const desk *k, const group *g, int kind, int direction)
{
    return g->state + (kind * k->directions + direction) * k->N * LS_LANES;
}

/* The state of a sweep as it comes to piece j, kept from the first pass for the second. */
static void keep(const desk *k, const group *g, int which, int64_t j, const double *state)
{
    memcpy(g->border[which] + j * k->N * LS_LANES, state, (size_t)(k->N * LS_LANES) * sizeof *state);
}

static void recall(const desk *k, const group *g, int which, int64_t j, double *state)
{
    memcpy(state, g->border[which] + j * k->N * LS_LANES, (size_t)(k->N * LS_LANES) * sizeof *state);
}

/* A state and its place in a summary. sign -1: gradient form there, γ here. */
static ls_real *in_summary(const ls_pass *p, const desk *k, const group *g, int64_t b, int64_t lane, ls_real *summary)
{
    return summary + (b * p->d + g->first + lane) * k->N;
}

static void read_state(const ls_pass *p, const desk *k, const group *g, int64_t b, ls_real *from, double sign,
                       double *state)
{
    zero_doubles(state, k->N);
    for (int64_t lane = 0; lane < g->width; lane++)
        for (int64_t m = 0; m < k->N; m++)
            state[m * LS_LANES + lane] = (m % 2 ? sign : 1) * (double)in_summary(p, k, g, b, lane, from)[m];
}

static void write_state(const ls_pass *p, const desk *k, const group *g, int64_t b, const double *state, double sign,
                        ls_real *to)
{
    for (int64_t lane = 0; lane < g->width; lane++)
        for (int64_t m = 0; m < k->N; m++)
            in_summary(p, k, g, b, lane, to)[m] = (ls_real)((m % 2 ? sign : 1) * state[m * LS_LANES + lane]);
}

/* ------------------------------------------------------------------------------------------------ arithmetic */

static ls_entries matrix(ls_lanes *x, int64_t cols)
{
    return (ls_entries){x, cols, 1};
}

/* (positions, N): the power of a (or slope) between an entering state and the output at position k, and between the
 * input at k and the state that leaves. From the left: k + 1 and n-1-k; from the right: n-1-k and k. */
static ls_entries on_entering(const desk *k, ls_lanes *table, int direction, int64_t n)
{
    return direction == FROM_LEFT ? (ls_entries){table + k->N, k->N, 1}
                                  : (ls_entries){table + (n - 1) * k->N, -k->N, 1};
}

static ls_entries on_leaving(const desk *k, ls_lanes *table, int direction, int64_t n)
{
    return direction == FROM_LEFT ? (ls_entries){table + (n - 1) * k->N, -k->N, 1} : (ls_entries){table, k->N, 1};
}

/* (inputs, outputs) of a chunk: entry (j,i) is the tap at distance i - j. */
static ls_entries toeplitz(const desk *k, const group *g, int64_t channel)
{
    return (ls_entries){g->taps + channel * (2 * k->n - 1) + k->n - 1, -1, 1};
}

/* States fade, where nothing comes in, until they are denormal numbers, with which arithmetic is a hundred times as
 * slow. They become 0 before, and so early that products with a part of them are normal numbers. */
static double seen_or_zero(double x)
{
    return fabs(x) < (double)LS_REAL_MIN / (double)LS_REAL_EPS ? 0 : x;
}

/* a^(positions of the piece's chunks). */
static const double *decay_of(const desk *k, const group *g, const piece *x)
{
    return g->decay + (x->length == k->n ? 0 : k->N * LS_LANES);
}

/* The state passes the chunks of a piece: before (chunks, N) = state as it comes, im times sign;
 * state := a^n state + local. */
static void chain(const desk *k, const group *g, const piece *x, int descending, double *state, const ls_lanes *local,
                  ls_real sign, ls_lanes *before)
{
    const double *decay = decay_of(k, g, x);
    for (int64_t i = 0; i < x->chunks; i++) {
        const int64_t c = (descending ? x->chunks - 1 - i : i) * k->N;
        const ls_real *in = (const ls_real *)(const void *)(local + c);
        ls_real *out = (ls_real *)(void *)(before + c);
        for (int64_t m = 0; m < k->N * LS_LANES; m += 2 * LS_LANES) {
#pragma omp simd
            for (int64_t re = m; re < m + LS_LANES; re++) {
                const int64_t im = re + LS_LANES;
                const double s = seen_or_zero(state[re]), t = seen_or_zero(state[im]);
                out[re] = (ls_real)s;
                out[im] = sign * (ls_real)t;
                state[re] = decay[re] * s - decay[im] * t + (double)in[re];
                state[im] = decay[re] * t + decay[im] * s + (double)in[im];
            }
        }
    }
}

/* out (chunks, N) = weight (N) · x, im times sign; or += with add. */
static void weigh(const desk *k, int64_t chunks, const ls_lanes *weight, const ls_lanes *x, ls_real sign, int add,
                  ls_lanes *out)
{
    for (int64_t m = 0; m < k->N; m += 2) {
        const ls_lanes re = weight[m], im = weight[m + 1];
        for (int64_t i = m; i < chunks * k->N; i += k->N) {
            ls_lanes a = re * x[i] - im * x[i + 1], b = (re * x[i + 1] + im * x[i]) * sign;
            if (add) a += out[i], b += out[i + 1];
            out[i] = a, out[i + 1] = b;
        }
    }
}

static void add_doubles(ls_lanes x, double *sum)
{
    for (int64_t i = 0; i < LS_LANES; i++) sum[i] += (double)x[i];
}

/* sum (N) += Σ_chunks x · y; x with its im times sign. */
static void correlate(const desk *k, int64_t chunks, const ls_lanes *x, ls_real sign, const ls_lanes *y, double *sum)
{
    for (int64_t m = 0; m < k->N; m += 2) {
        ls_lanes re = {0}, im = {0};
        for (int64_t i = m; i < chunks * k->N; i += k->N) {
            const ls_lanes t = x[i + 1] * sign;
            re += x[i] * y[i] - t * y[i + 1];
            im += x[i] * y[i + 1] + t * y[i];
        }
        add_doubles(re, sum + m * LS_LANES);
        add_doubles(im, sum + (m + 1) * LS_LANES);
    }
}

/* ------------------------------------------------------------------------------------------------ forward */

/* The state of a direction passes a piece; k->entering = the states that enter its chunks. */
static void enter(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    ls_lanes_product(x->chunks, k->N, x->length, matrix(k->u + i * STRIDE, x->length),
                     on_leaving(k, g->power, direction, x->length), 0, matrix(k->local, k->N));
    chain(k, g, x, direction == FROM_RIGHT, state_of(k, g, ENTERING, direction), k->local, 1, k->entering[direction]);
}

/* y of one channel from inputs and entering states. */
static void outputs(const desk *k, int64_t i, const piece *x, int64_t channel)
{
    const group *g = &k->group[i];
    const ls_entries y = matrix(k->y + (channel * k->places + i) * STRIDE, x->length);
    ls_lanes_product(x->chunks, x->length, x->length, matrix(k->u + i * STRIDE, x->length), toeplitz(k, g, channel), 0,
                     y);
    for (int d = 0; d < k->directions; d++) {
        weigh(k, x->chunks, g->weight + (d * k->channels + channel) * k->N, k->entering[d], -1, 0, k->mixed);
        ls_lanes_product(x->chunks, x->length, k->N, matrix(k->mixed, k->N),
                         ls_transposed(on_entering(k, g->power, d, x->length)), 1, y);
    }
}

/* Pass 1, NS: from right to left, the states r at the pieces.
 * Pass 2: from left to right, the states s, within each piece also r, and the outputs. */
static void apply_block(const ls_pass *p, const desk *k, int64_t b)
{
    const int64_t pieces = count_pieces(p), first = k->group[0].first;
    const int both = k->directions == 2;
    for (int d = 0; d < k->directions; d++)
        for (int64_t i = 0; i < k->groups; i++)
            read_state(p, k, &k->group[i], b, p->summary[scan_of(p, d)].got, 1, state_of(k, &k->group[i], ENTERING, d));
    for (int64_t j = pieces - 1; both && j >= 0; j--) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        for (int64_t i = 0; i < k->groups; i++) {
            keep(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_RIGHT));
            enter(k, i, &x, FROM_RIGHT);
        }
    }
    for (int64_t j = 0; j < pieces; j++) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        for (int64_t i = 0; i < k->groups; i++) {
            enter(k, i, &x, FROM_LEFT);
            if (both) recall(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_RIGHT));
            if (both) enter(k, i, &x, FROM_RIGHT);
            for (int64_t c = 0; c < k->channels; c++) outputs(k, i, &x, c);
        }
        for (int64_t c = 0; c < k->channels; c++)
            store(p, k, k->y + c * k->places * STRIDE, b, &x, features(p->out, c * p->d + first));
    }
}

static ls_status apply(ls_pass *p, int phase)
{
    (void)phase;
    desk *k = desk_of(p);
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 1);
        for (int64_t b = 0; b < p->B; b++) apply_block(p, k, b);
    }
    return LS_OK;
}

/* The state that this shard alone would leave behind. */
static ls_status ends(ls_pass *p, int phase)
{
    const int direction = phase == ENDS_RIGHT ? FROM_RIGHT : FROM_LEFT;
    const int64_t pieces = count_pieces(p);
    const ls_summary *s = &p->summary[scan_of(p, direction)];
    desk *k = desk_of(p);
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 0);
        for (int64_t b = 0; b < p->B; b++) {
            for (int64_t i = 0; i < k->groups; i++) zero_doubles(state_of(k, &k->group[i], ENTERING, direction), k->N);
            for (int64_t j = 0; j < pieces; j++) {
                const piece x = piece_at(p, direction == FROM_LEFT ? j : pieces - 1 - j);
                load(p, k, features(p->q, first), b, &x, k->u);
                for (int64_t i = 0; i < k->groups; i++) enter(k, i, &x, direction);
            }
            for (int64_t i = 0; i < k->groups; i++)
                write_state(p, k, &k->group[i], b, state_of(k, &k->group[i], ENTERING, direction), 1, s->sent);
        }
    }
    s->sent[ls_monoid_size(s->monoid) - 1] = (ls_real)p->T;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ backward */

/* V of a channel: what the outputs of the chunks want from the states that enter. */
static void look_back(const desk *k, int64_t i, const piece *x, int direction, int64_t channel, ls_lanes *table,
                      ls_lanes *seen)
{
    ls_lanes_product(x->chunks, k->N, x->length, matrix(k->y + (channel * k->places + i) * STRIDE, x->length),
                     on_entering(k, table, direction, x->length), 0, matrix(seen, k->N));
}

static void look_back_all(const desk *k, int64_t i, const piece *x, int direction)
{
    for (int64_t c = 0; c < k->channels; c++)
        look_back(k, i, x, direction, c, k->group[i].power, k->seen + c * PIECE * k->N);
}

/* γ of a direction passes a piece against it and grows by V, in k->seen; k->leaving = γ' of the states that leave its
 * chunks, in gradient form. */
static void leave(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    for (int64_t c = 0; c < k->channels; c++)
        weigh(k, x->chunks, g->weight + (direction * k->channels + c) * k->N, k->seen + c * PIECE * k->N, 1, c > 0,
              k->local);
    chain(k, g, x, direction == FROM_LEFT, state_of(k, g, LEAVING, direction), k->local, -1, k->leaving[direction]);
}

/* du of what states that leave a piece's chunks are wanted for. */
static void leaving_inputs(const desk *k, int64_t i, const piece *x, int direction)
{
    ls_lanes_product(x->chunks, x->length, k->N, matrix(k->leaving[direction], k->N),
                     ls_transposed(on_leaving(k, k->group[i].power, direction, x->length)), 1,
                     matrix(k->du + i * STRIDE, x->length));
}

/* S goes over a piece, from its last chunk to its first, k->mixed = what the chunks add to it where they are left. From
 * the right that is the way of the state, S := a^n S + mixed; from the left S += a^(positions after the chunk) mixed.
 */
static void add_slopes(const desk *k, const group *g, const piece *x, int direction)
{
    const double *decay = decay_of(k, g, x);
    double *sum = g->slopes[direction], *faded = direction == FROM_LEFT ? g->fade : sum;
    for (int64_t c = x->chunks - 1; c >= 0; c--) {
        const ls_real *in = (const ls_real *)(const void *)(k->mixed + c * k->N);
        for (int64_t m = 0; m < k->N * LS_LANES; m += 2 * LS_LANES) {
#pragma omp simd
            for (int64_t re = m; re < m + LS_LANES; re++) {
                const int64_t im = re + LS_LANES;
                const double s = seen_or_zero(faded[re]), t = seen_or_zero(faded[im]);
                const double x_re = (double)in[re], x_im = (double)in[im];
                faded[re] = decay[re] * s - decay[im] * t;
                faded[im] = decay[re] * t + decay[im] * s;
                sum[re] += direction == FROM_LEFT ? s * x_re - t * x_im : x_re;
                sum[im] += direction == FROM_LEFT ? s * x_im + t * x_re : x_im;
            }
        }
    }
}

/* What meets where states leave: du, and γ_λ of the steps up to there. */
static void leaving_gradients(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    const int64_t n = x->length;
    leaving_inputs(k, i, x, direction);
    ls_lanes_product(x->chunks, k->N, n, matrix(k->u + i * STRIDE, n), on_leaving(k, g->slope, direction, n), 0,
                     matrix(k->mixed, k->N));
    weigh(k, x->chunks, g->slope + n * k->N, k->entering[direction], 1, 1, k->mixed);
    correlate(k, x->chunks, k->leaving[direction], -1, k->mixed, g->dlambda);
    if (k->several) add_slopes(k, g, x, direction);
}

/* What meets where outputs look at entering states: γ_W, and γ_λ of the steps from there. */
static void entering_gradients(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    for (int64_t c = 0; c < k->channels; c++) {
        const int64_t row = (direction * k->channels + c) * k->N;
        correlate(k, x->chunks, k->entering[direction], 1, k->seen + c * PIECE * k->N, g->dweight + row * LS_LANES);
        look_back(k, i, x, direction, c, g->slope, k->local);
        weigh(k, x->chunks, g->weight + row, k->local, 1, c > 0, k->mixed);
    }
    correlate(k, x->chunks, k->entering[direction], 1, k->mixed, g->dlambda);
}

/* The taps: du = dy Tᵀ, and dK from uᵀ dy summed along its diagonals. */
static void tap_gradients(const desk *k, int64_t i, const piece *x)
{
    const group *g = &k->group[i];
    const int64_t n = x->length;
    const ls_entries u = matrix(k->u + i * STRIDE, n), du = matrix(k->du + i * STRIDE, n);
    for (int64_t c = 0; c < k->channels; c++) {
        const ls_entries dy = matrix(k->y + (c * k->places + i) * STRIDE, n);
        ls_lanes_product(x->chunks, n, n, dy, ls_transposed(toeplitz(k, g, c)), c > 0, du);
        ls_lanes_product(n, n, x->chunks, ls_transposed(u), dy, 0, matrix(k->products, n));
        for (int64_t distance = 1 - n; distance < n; distance++) {
            ls_lanes sum = {0};
            for (int64_t j = ls_max(0, -distance); j < n - ls_max(0, distance); j++)
                sum += k->products[j * n + j + distance];
            add_doubles(sum, g->dtap + (c * (2 * k->n - 1) + k->n - 1 + distance) * LS_LANES);
        }
    }
}

static void load_dout(const ls_pass *p, const desk *k, int64_t b, const piece *x)
{
    for (int64_t c = 0; c < k->channels; c++)
        load(p, k, features(p->dout, c * p->d + k->group[0].first), b, x, k->y + c * k->places * STRIDE);
}

/* γ has passed all pieces: it is the gradient of what came from other ranks. */
static void write_gradients(const ls_pass *p, const desk *k, int64_t b, int direction)
{
    for (int64_t i = 0; i < k->groups; i++)
        write_state(p, k, &k->group[i], b, state_of(k, &k->group[i], LEAVING, direction), -1,
                    p->summary[scan_of(p, direction)].dgot);
}

/* S of a batch row and direction, (N, LANES), for ends backward. */
static double *slopes_of(const ls_pass *p, const desk *k, const group *g, int64_t b, int direction)
{
    const int64_t lanes = (p->d + LS_LANES - 1) / LS_LANES * LS_LANES;
    return (double *)(void *)p->work[SLOPES] + ((direction * p->B + b) * lanes + g->first) * k->N;
}

/* Before a batch row: nothing after its last chunk. */
static void open_slopes(const ls_pass *p, const desk *k, group *g, int64_t b)
{
    for (int d = 0; d < k->directions; d++) {
        g->slopes[d] = slopes_of(p, k, g, b, d);
        zero_doubles(g->slopes[d], k->N);
    }
    for (int64_t i = 0; i < k->N * LS_LANES; i++) g->fade[i] = i / LS_LANES % 2 == 0;
}

/* One piece of pass 2, all its states known at the borders. */
static void piece_backward(const desk *k, int64_t i, const piece *x)
{
    tap_gradients(k, i, x);
    for (int d = 0; d < k->directions; d++) {
        look_back_all(k, i, x, d);
        enter(k, i, x, d);
        leave(k, i, x, d);
        entering_gradients(k, i, x, d);
        leaving_gradients(k, i, x, d);
    }
}

/* Pass 1, from left to right: at the pieces the states s, and in NS γ' of the states r, which go to the right.
 * Pass 2, from right to left: γ' of the states s, in NS the states r; what pass 1 kept comes back piece by piece. */
static void apply_block_backward(const ls_pass *p, const desk *k, int64_t b)
{
    const int64_t pieces = count_pieces(p), first = k->group[0].first;
    const int both = k->directions == 2;
    for (int d = 0; d < k->directions; d++)
        for (int64_t i = 0; i < k->groups; i++) {
            read_state(p, k, &k->group[i], b, p->summary[scan_of(p, d)].got, 1, state_of(k, &k->group[i], ENTERING, d));
            zero_doubles(state_of(k, &k->group[i], LEAVING, d), k->N);
        }
    for (int64_t i = 0; k->several && i < k->groups; i++) open_slopes(p, k, &k->group[i], b);
    for (int64_t j = 0; j < pieces; j++) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        if (both) load_dout(p, k, b, &x);
        for (int64_t i = 0; i < k->groups; i++) {
            keep(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_LEFT));
            enter(k, i, &x, FROM_LEFT);
            if (!both) continue;
            keep(k, &k->group[i], 1, j, state_of(k, &k->group[i], LEAVING, FROM_RIGHT));
            look_back_all(k, i, &x, FROM_RIGHT);
            leave(k, i, &x, FROM_RIGHT);
        }
    }
    if (both) write_gradients(p, k, b, FROM_RIGHT);
    for (int64_t j = pieces - 1; j >= 0; j--) {
        const piece x = piece_at(p, j);
        load(p, k, features(p->q, first), b, &x, k->u);
        load_dout(p, k, b, &x);
        for (int64_t i = 0; i < k->groups; i++) {
            recall(k, &k->group[i], 0, j, state_of(k, &k->group[i], ENTERING, FROM_LEFT));
            if (both) recall(k, &k->group[i], 1, j, state_of(k, &k->group[i], LEAVING, FROM_RIGHT));
            piece_backward(k, i, &x);
        }
        store(p, k, k->du, b, &x, features(p->dq, first));
    }
    write_gradients(p, k, b, FROM_LEFT);
}

/* The sums of one feature become gradients of C and D, and of λ and w as far as they are known. */
static void settle(const ls_pass *p, const desk *k, const group *g, int64_t lane)
{
    const int64_t h = g->first + lane, taps = 2 * k->n - 1, middle = k->n - 1;
    for (int64_t c = 0; c < k->channels; c++)
        dparam(p, D_)[c * p->d + h] += (ls_real)g->dtap[(c * taps + middle) * LS_LANES + lane];
    for (int64_t m = 0; m < k->N; m += 2) {
        const double complex a = saved_of(p, POWER, h, m / 2), w = frequency(p, h, m / 2),
                             beta = saved_of(p, BETA, h, m / 2);
        double complex dlambda = get(g->dlambda + m * LS_LANES, lane), dbeta = 0;
        for (int d = 0; d < k->directions; d++)
            for (int64_t c = 0; c < k->channels; c++) {
                const double *dtap = g->dtap + c * taps * LS_LANES + lane;
                const double complex coefficient = c_of(p, d, c, h, m / 2);
                double complex dweight = get(g->dweight + ((d * k->channels + c) * k->N + m) * LS_LANES, lane);
                double complex power = 1, slopes = 0;
                for (int64_t l = 0; l < k->n - d; l++, power *= a) {
                    const double complex x = dtap[(d ? middle - 1 - l : middle + l) * LS_LANES] * power;
                    dweight += x;
                    slopes += (double)l * x;
                }
                dlambda += 2 * beta * coefficient * slopes;
                dbeta += 2 * coefficient * dweight;
                ls_real *dc = dparam(p, C_) + in_c(p, d, c, h, m / 2);
                dc[0] += (ls_real)creal(2 * beta * dweight);
                dc[1] -= (ls_real)cimag(2 * beta * dweight);
            }
        complex_of(p->work[DLAMBDA])[h * k->N / 2 + m / 2] = dlambda + dbeta * a / w;
        complex_of(p->work[DW])[in_set(p, h, m / 2)] -= dbeta * beta / w;
    }
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    (void)phase;
    desk *k = desk_of(p);
    for (int64_t i = 0; i < (int64_t)p->option[SETS] * k->N / 2; i++) complex_of(p->work[DW])[i] = 0;
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 1);
        for (int64_t b = 0; b < p->B; b++) apply_block_backward(p, k, b);
        for (const group *g = k->group; g < k->group + k->groups; g++)
            for (int64_t lane = 0; lane < g->width; lane++) settle(p, k, g, lane);
    }
    return LS_OK;
}

/* γ' fades away from the end where the state leaves; du gets its part. 0: nothing is left of it. */
static int fade(const desk *k, const piece *x, int direction)
{
    int left = 0;
    zero_lanes(k->local, x->chunks * k->N);
    for (int64_t i = 0; i < k->groups; i++) {
        const group *g = &k->group[i];
        double *state = state_of(k, g, LEAVING, direction);
        chain(k, g, x, direction == FROM_LEFT, state, k->local, -1, k->leaving[direction]);
        leaving_inputs(k, i, x, direction);
        for (int64_t m = 0; m < k->N * LS_LANES; m++) left |= seen_or_zero(state[m]) != 0;
    }
    return left;
}

static void ends_block_backward(const ls_pass *p, const desk *k, int64_t b, int direction)
{
    const int64_t pieces = count_pieces(p), first = k->group[0].first;
    for (int64_t i = 0; i < k->groups; i++) {
        const group *g = &k->group[i];
        double *state = state_of(k, g, LEAVING, direction);
        read_state(p, k, g, b, p->summary[scan_of(p, direction)].dsent, -1, state);
        const double *slopes = slopes_of(p, k, g, b, direction);
        for (int64_t lane = 0; lane < g->width; lane++)
            for (int64_t m = 0; m < k->N; m += 2)
                complex_of(p->work[DLAMBDA])[((g->first + lane) * k->N + m) / 2] +=
                    get(state + m * LS_LANES, lane) * get(slopes + m * LS_LANES, lane);
    }
    for (int64_t j = 0, left = 1; left && j < pieces; j++) {
        const piece x = piece_at(p, direction == FROM_LEFT ? pieces - 1 - j : j);
        load(p, k, features(p->dq, first), b, &x, k->du);
        left = fade(k, &x, direction);
        store(p, k, k->du, b, &x, features(p->dq, first));
    }
}

static ls_status ends_backward(ls_pass *p, int phase)
{
    desk *k = desk_of(p);
    if (!k->several) return LS_OK; /* all others have no rows */
    for (int64_t first = 0; first < p->d; first += BLOCK) {
        open_block(p, k, first, 0);
        for (int64_t b = 0; b < p->B; b++) ends_block_backward(p, k, b, phase == ENDS_RIGHT ? FROM_RIGHT : FROM_LEFT);
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase causal[] = {
    {.name = "decays", .forward = decays, .backward = decays_backward},
    {.name = "ends", .forward = ends, .backward = ends_backward, .feeds_scan = 1},
    {.name = "apply", .crossing = LS_SCAN, .monoid = carried, .forward = apply, .backward = apply_backward},
    {.name = NULL},
};
static const ls_phase bidirectional[] = {
    {.name = "decays", .forward = decays, .backward = decays_backward},
    {.name = "ends from the left", .forward = ends, .backward = ends_backward, .feeds_scan = 2},
    {.name = "ends from the right", .forward = ends, .backward = ends_backward, .feeds_scan = 2},
    {.name = "carry", .crossing = LS_SCAN, .monoid = carried},
    {.name = "apply", .crossing = LS_REVERSE_SCAN, .monoid = carried, .forward = apply, .backward = apply_backward},
    {.name = NULL},
};

const ls_mechanism ls_s4d_mechanism = {
    .name = "s4d",
    .option = options,
    .params = params,
    .check = check,
    .unscaled = 1,
    .layer = layer,
    .plan = plan,
    .phases = {[LS_NS] = bidirectional, [LS_CS] = causal},
    .step = {[LS_CS] = causal},
    .cuda = LS_IF_CUDA(&ls_s4d_cuda),
    .one_input = 1,
};
