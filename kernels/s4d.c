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
#include "s4d_desk.h"

extern const ls_cuda_mechanism ls_s4d_cuda;

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

/* ------------------------------------------------------------------------------------------------ memory */

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

static ls_monoid carried(const ls_pass *p)
{
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2;
    return (ls_monoid){.groups = p->B * p->d * modes,
                       .plain = 2,
                       .decay = (const double *)(const void *)p->saved[LAMBDA],
                       .decays = p->d * modes,
                       .counts = 1};
}

/* ------------------------------------------------------------------------------------------------ steps of states */

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

/* ------------------------------------------------------------------------------------------------ forward */

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

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase causal[] = {
    {.name = "decays", .forward = decays, .backward = decays_backward},
    {.name = "ends", .forward = ends, .backward = ls_s4d_ends_backward, .feeds_scan = 1},
    {.name = "apply", .crossing = LS_SCAN, .monoid = carried, .forward = apply, .backward = ls_s4d_apply_backward},
    {.name = NULL},
};
static const ls_phase bidirectional[] = {
    {.name = "decays", .forward = decays, .backward = decays_backward},
    {.name = "ends from the left", .forward = ends, .backward = ls_s4d_ends_backward, .feeds_scan = 2},
    {.name = "ends from the right", .forward = ends, .backward = ls_s4d_ends_backward, .feeds_scan = 2},
    {.name = "carry", .crossing = LS_SCAN, .monoid = carried},
    {.name = "apply",
     .crossing = LS_REVERSE_SCAN,
     .monoid = carried,
     .forward = apply,
     .backward = ls_s4d_apply_backward},
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
