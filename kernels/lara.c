/* Linear randomized attention, LARA (Zheng et al., 2022): C = c' landmarks (2 c' with antithetic noise), δ = scale.
 *
 *   q̄, k̄ = means over c' = min(c, T, S) segments of the sequences (adaptive: through a learned d x d map each)
 *   μ = q̄ + k̄;  ω = μ + noise in training, ω = μ in evaluation;  λ(x; ω) = δ ω·x - δ|x|²/2
 *   N_r = Σ_j softmax_j(λ(k_j; ω_r)) v_j,  ℓ_r = log Σ_j e^λ(k_j; ω_r)               over unpadded j
 *   o_i = Σ_r softmax_r(δ μ_r·q_i + λ(q_i; ω_r) + ℓ_r - λ(μ_r; ω_r)) N_r
 *
 * sums of segments → reduce → every rank makes μ and ω, and its keys write the slots (kernels/slots.h) → reduce → its
 * queries read them, with logits a_r·q_i + constant_r: what the slots have in common, δ|q|²/2 and the means of
 *   a_r = δ(μ_r + ω_r),   constant_r = ℓ_r - δ(ω_r·μ_r - |μ_r|²/2),
 * is left out, the softmax does not see it.
 *
 * Backward. Queries: dN, da, and dℓ_r = Σ_i dlogit_ir =: g_r; with ℓ = m + ln s the slot's sum gets ds' = g/s, and
 *   dω_r = δ(da_r - g_r μ_r),   dμ_r = δ(da_r - g_r (ω_r - μ_r))
 * Keys: dλ_jr from the slots, dk_j = δ Σ_r dλ_jr (ω_r - k_j), dω_r += δ Σ_j dλ_jr k_j. Then d mean = dμ + dω, whose
 * sums over ranks go back to the rows of their segments. read writes dq, write dk and dv; segments add to dq and dk.
 *
 * What is made of landmarks is in double: they are few. saved: μ (B,H,c',d), ω (B,H,C,d), doubles. */
#include "lara.h"
#include "gemm.h"
#include "rng.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_lara_cuda;

enum { MU, OMEGA }; /* saved[], doubles */
/* work[]. Of a chunk: */
enum {
    ROWS_A,
    ROWS_B,
    LOGITS,
    DLOGITS,
    SCRATCH,
    /* of all (b,h): a_r or δ ω_r (C,d), N - c (C,d), c (d), constant (C) */
    KEYS,
    VALUES,
    CENTRE,
    CONSTANT,
    /* doubles: the slots' sums (C,d+2) or their gradients, da and g (C,d+1), dμ + dω (c',d); a room, the gradients of
     * the maps */
    STATE,
    DKEYS,
    DMU,
    ROOM,
    DMAPS
};

static const ls_option_info options[] = {
    {"num_landmarks", "c", 16, 1, 4096, 1, "landmarks: means of segments of queries and keys"},
    {"antithetic", "antithetic", 0, 0, 1, 1, "noise in pairs, added and subtracted: twice the slots in training"},
    {"adaptive", "adaptive", 0, 0, 1, 1, "the means pass through learned maps"},
    {.name = NULL},
};

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t d = o->embed_dim / o->num_heads;
    if (o->value[ADAPTIVE] == 0) return 0;
    list[Q_WEIGHT] = (ls_param_info){"q_bar_proj.weight", 2, {d, d}, 0, 0, LS_INIT_IDENTITY, 0.02};
    list[Q_BIAS] = (ls_param_info){"q_bar_proj.bias", 1, {d}, 0, 0, LS_INIT_ZERO, 0};
    list[K_WEIGHT] = (ls_param_info){"k_bar_proj.weight", 2, {d, d}, 0, 0, LS_INIT_IDENTITY, 0.02};
    list[K_BIAS] = (ls_param_info){"k_bar_proj.bias", 1, {d}, 0, 0, LS_INIT_ZERO, 0};
    return 4;
}

/* ------------------------------------------------------------------------------------------------ sizes */

static ls_slots slots(const ls_pass *p)
{
    return (ls_slots){count(p), p->d, p->work[SCRATCH]};
}

static ls_monoid segment_sums(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H, .plain = sums(p)};
}

static ls_monoid summary(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * count(p), .has_max = 1, .scaled = 1 + p->d};
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t d = p->d, G = p->B * p->H, R = count(p), c = landmarks(p), back = p->backward;
    p->saved[MU] = ls_take_doubles(saved, G * c * d);
    p->saved[OMEGA] = ls_take_doubles(saved, G * R * d);
    p->work[ROWS_A] = ls_take(work, LS_CHUNK * d);
    p->work[ROWS_B] = ls_take(work, LS_CHUNK * d);
    p->work[LOGITS] = ls_take(work, LS_CHUNK * R);
    p->work[DLOGITS] = ls_take(work, LS_CHUNK * R);
    p->work[SCRATCH] = ls_take(work, R * (d + 2));
    p->work[KEYS] = ls_take(work, G * R * d);
    p->work[VALUES] = ls_take(work, G * R * d);
    p->work[CENTRE] = ls_take(work, G * d);
    p->work[CONSTANT] = ls_take(work, G * R);
    p->work[STATE] = ls_take_doubles(work, G * R * (d + 2));
    p->work[DKEYS] = ls_take_doubles(work, back * G * R * (d + 1));
    p->work[DMU] = ls_take_doubles(work, back * G * c * d);
    p->work[ROOM] = ls_take_doubles(work, ls_max(p->H * d, R * d + d + R));
    p->work[DMAPS] = ls_take_doubles(work, back * 2 * (d * d + d));
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

/* ------------------------------------------------------------------------------------------------ landmarks */

/* μ_c (d) += the mean of segment c, through the map if there is one. */
static void add_mean(const ls_pass *p, int which, int64_t c, const ls_real *sum, double *mu)
{
    const double n = ls_landmark_tokens(p, landmarks_of(p), which, c);
    if (p->option[ADAPTIVE] == 0) {
        for (int64_t e = 0; e < p->d; e++) mu[e] += (double)sum[e] / n;
        return;
    }
    const ls_real *weight = p->params + p->param[which ? K_WEIGHT : Q_WEIGHT].offset;
    const ls_real *bias = p->params + p->param[which ? K_BIAS : Q_BIAS].offset;
    for (int64_t i = 0; i < p->d; i++) {
        double x = 0;
        for (int64_t e = 0; e < p->d; e++) x += (double)weight[i * p->d + e] * (double)sum[e];
        mu[i] += x / n + (double)bias[i];
    }
}

static void add_noise(const ls_pass *p, int64_t b, int64_t h, const double *mu, double *omega)
{
    const int64_t c = landmarks(p), n = c * p->d, R = count(p);
    for (int64_t i = 0; i < n; i++) {
        const int64_t index = h * n + i;
        double noise = 0;
        if (p->given_noise != NULL)
            noise = (double)p->given_noise[b * p->H * n + index];
        else if (is_noisy(p))
            noise = ls_normal(p->seed, p->stream * 65536u, (uint32_t)(p->sample + (uint64_t)b), (uint64_t)index);
        omega[i] = mu[i] + noise;
        if (R > c) omega[n + i] = mu[i] - noise;
    }
}

/* μ and ω of every (b,h), the same on all ranks. */
static void make_landmarks(ls_pass *p, int phase)
{
    const int64_t c = landmarks(p), d = p->d, R = count(p);
    for (int64_t g = 0; g < p->B * p->H; g++) {
        double *mu = ls_doubles(p->saved[MU]) + g * c * d, *omega = ls_doubles(p->saved[OMEGA]) + g * R * d;
        const ls_real *sum = p->summary[phase].got + g * sums(p);
        for (int64_t i = 0; i < c * d; i++) mu[i] = 0;
        for (int64_t i = 0; i < 2 * c; i++) add_mean(p, i >= c, i % c, sum + i * d, mu + i % c * d);
        add_noise(p, g / p->H, g % p->H, mu, omega);
    }
}

/* KEYS = δ ω. */
static void load_omega(ls_pass *p)
{
    const int64_t n = p->B * p->H * count(p) * p->d;
    for (int64_t i = 0; i < n; i++) p->work[KEYS][i] = (ls_real)(p->scale * ls_doubles(p->saved[OMEGA])[i]);
}

/* CENTRE = the values' reference; `phase`: the one before which the sums were reduced. */
static void load_reference(ls_pass *p, int phase)
{
    ls_landmark_reference(p, landmarks_of(p), p->summary[phase].got, p->work[CENTRE]);
}

/* dmu (c',d) of (b,h) becomes the gradient of the sums of segments; the maps get theirs. */
static void landmarks_backward(const ls_pass *p, int64_t g, const ls_real *sums, ls_real *dsums)
{
    const int64_t c = landmarks(p), d = p->d;
    const double *dmu = ls_doubles(p->work[DMU]) + g * c * d;
    for (int which = 0; which < 2; which++)
        for (int64_t r = 0; r < c; r++) {
            const double n = ls_landmark_tokens(p, landmarks_of(p), which, r), *dy = dmu + r * d;
            const ls_real *sum = sums + (which * c + r) * d;
            ls_real *dsum = dsums + (which * c + r) * d;
            if (p->option[ADAPTIVE] == 0) {
                for (int64_t e = 0; e < d; e++) dsum[e] = (ls_real)(dy[e] / n);
                continue;
            }
            const ls_real *weight = p->params + p->param[which ? K_WEIGHT : Q_WEIGHT].offset;
            double *dweight = ls_doubles(p->work[DMAPS]) + which * (d * d + d), *dbias = dweight + d * d;
            for (int64_t e = 0; e < d; e++) {
                double x = 0;
                for (int64_t i = 0; i < d; i++) {
                    x += (double)weight[i * d + e] * dy[i];
                    dweight[i * d + e] += dy[i] * (double)sum[e] / n;
                }
                dsum[e] = (ls_real)(x / n);
                dbias[e] += dy[e];
            }
        }
}

static void add_map_gradients(const ls_pass *p)
{
    const int64_t d = p->d;
    const double *from = ls_doubles(p->work[DMAPS]);
    for (int i = Q_WEIGHT; i <= K_BIAS; i++) {
        const int64_t n = i == Q_BIAS || i == K_BIAS ? d : d * d;
        for (int64_t e = 0; e < n; e++) p->dparams[p->param[i].offset + e] += (ls_real)from[e];
        from += n;
    }
}

/* ------------------------------------------------------------------------------------------------ keys write */

/* LOGITS (n,C) = λ(k_j; ω_r), -inf at padded rows. Returns the rows of keys, clean. */
static const ls_real *key_logits(ls_pass *p, const ls_chunk *c, int64_t *ld)
{
    const int64_t R = count(p), d = p->d;
    ls_real *logits = p->work[LOGITS];
    const ls_real *k = ls_chunk_rows(c, p->own.k, d, p->own.pad, p->S, p->work[ROWS_A], ld);
    ls_gemm(0, 1, c->n, R, d, 1, k, *ld, p->work[KEYS] + c->g * R * d, d, 0, logits, R);
    for (int64_t j = 0; j < c->n; j++) {
        const ls_real half = (ls_real)(p->scale / 2) * ls_dot(d, k + j * *ld, k + j * *ld);
        for (int64_t r = 0; r < R; r++) logits[j * R + r] -= half;
    }
    ls_chunk_hide(c, R, p->own.pad, p->S, logits);
    return k;
}

static void write_chunk(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    const ls_slots s = slots(p);
    int64_t ld;
    key_logits(p, c, &ld);
    ls_chunk_centred(c, p->own.v, p->d, p->own.pad, p->S, p->work[CENTRE] + c->g * p->d, p->work[ROWS_B]);
    ls_slots_write(s, c->n, p->work[LOGITS], p->work[ROWS_B], ls_doubles(p->work[STATE]) + c->g * s.R * (p->d + 2));
}

static ls_status write(ls_pass *p, int phase)
{
    double *state = ls_doubles(p->work[STATE]);
    make_landmarks(p, phase);
    load_omega(p);
    load_reference(p, phase);
    ls_slots_begin(slots(p), p->B * p->H, state);
    ls_each_chunk(p, phase, p->S, write_chunk);
    ls_slots_send(slots(p), p->B * p->H, state, p->summary[phase + 1].sent);
    return LS_OK;
}

static void write_chunk_backward(ls_pass *p, int phase, const ls_chunk *c)
{
    const ls_slots s = slots(p);
    const int64_t R = s.R, d = p->d, at = c->g * R * (d + 2);
    const ls_summary *sum = &p->summary[phase + 1];
    ls_real *v = p->work[ROWS_B], *dl = p->work[DLOGITS];
    int64_t ld;
    const ls_real *k = key_logits(p, c, &ld);
    ls_chunk_centred(c, p->own.v, d, p->own.pad, p->S, p->work[CENTRE] + c->g * d, v);
    ls_slots_write_backward(s, c->n, sum->sent + at, sum->got + at, sum->dsent + at, p->work[CONSTANT] + c->g * R, v,
                            p->work[LOGITS], dl, ls_row(p->own.dv, c->b, c->h, c->t), p->own.dv.st);
    ls_slots_sum(s, c->n, dl, k, ld, ls_doubles(p->work[DKEYS]) + c->g * R * d);
    ls_real *dk = ls_row(p->own.dk, c->b, c->h, c->t);
    ls_gemm(0, 0, c->n, d, R, 1, dl, R, p->work[KEYS] + c->g * R * d, d, 0, dk, p->own.dk.st);
    for (int64_t j = 0; j < c->n; j++) {
        ls_real all = 0;
        for (int64_t r = 0; r < R; r++) all += dl[j * R + r];
        ls_axpy(d, -(ls_real)p->scale * all, k + j * ld, dk + j * p->own.dk.st);
    }
}

static ls_status write_backward(ls_pass *p, int phase)
{
    const int64_t R = count(p), d = p->d, c = landmarks(p), G = p->B * p->H;
    ls_summary *in = &p->summary[phase];
    double *domega = ls_doubles(p->work[DKEYS]);
    load_omega(p);
    load_reference(p, phase);
    ls_slots_constants(slots(p), G, p->summary[phase + 1].got, p->summary[phase + 1].dsent, ls_doubles(p->work[ROOM]),
                       p->work[CENTRE], p->work[CONSTANT]);
    for (int64_t i = 0; i < G * R * d; i++) domega[i] = 0;
    ls_each_chunk(p, phase, p->S, write_chunk_backward);
    for (int64_t i = 0; i < 2 * (d * d + d); i++) ls_doubles(p->work[DMAPS])[i] = 0;
    for (int64_t g = 0; g < G; g++) {
        double *dmu = ls_doubles(p->work[DMU]) + g * c * d;
        for (int64_t i = 0; i < R * d; i++) dmu[i % (c * d)] += p->scale * domega[g * R * d + i];
        landmarks_backward(p, g, in->got + g * sums(p), in->dgot + g * sums(p));
        ls_zero(in->dgot + g * sums(p) + ls_landmark_place(p, landmarks_of(p), 2), d + 1);
    }
    if (p->option[ADAPTIVE] != 0) add_map_gradients(p);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ queries read */

/* constant (R) less its mean. */
static void constants(const ls_pass *p, const double *mu, const double *omega, const ls_real *element, double *room,
                      ls_real *constant)
{
    const int64_t R = count(p), c = landmarks(p), d = p->d;
    double mean = 0;
    for (int64_t r = 0; r < R; r++, element += d + 2) {
        const double *u = mu + r % c * d, *w = omega + r * d;
        double dot = 0;
        for (int64_t e = 0; e < d; e++) dot += (w[e] - u[e] / 2) * u[e];
        room[r] = (element[1] > 0 ? (double)element[0] + log((double)element[1]) : 0) - p->scale * dot;
        mean += room[r] / (double)R;
    }
    for (int64_t r = 0; r < R; r++) constant[r] = (ls_real)(room[r] - mean);
}

/* KEYS (C,d) = a less its mean over the slots; VALUES, CENTRE, CONSTANT: for every (b,h). */
static void load_slots(ls_pass *p, int phase)
{
    const ls_slots s = slots(p);
    const int64_t R = s.R, c = landmarks(p), d = p->d;
    double *values = ls_doubles(p->work[ROOM]), *centre = values + R * d, *room = centre + d;
    load_reference(p, phase - 1);
    for (int64_t g = 0; g < p->B * p->H; g++) {
        const double *mu = ls_doubles(p->saved[MU]) + g * c * d, *omega = ls_doubles(p->saved[OMEGA]) + g * R * d;
        const ls_real *element = p->summary[phase].got + g * R * (d + 2);
        for (int64_t e = 0; e < d; e++) centre[e] = 0;
        for (int64_t i = 0; i < R * d; i++) centre[i % d] += p->scale * (mu[i % (c * d)] + omega[i]) / (double)R;
        for (int64_t i = 0; i < R * d; i++)
            p->work[KEYS][g * R * d + i] = (ls_real)(p->scale * (mu[i % (c * d)] + omega[i]) - centre[i % d]);
        ls_slots_values(s, element, values, centre);
        for (int64_t i = 0; i < R * d; i++) p->work[VALUES][g * R * d + i] = (ls_real)(values[i] - centre[i % d]);
        for (int64_t e = 0; e < d; e++) p->work[CENTRE][g * d + e] += (ls_real)centre[e];
        constants(p, mu, omega, element, room, p->work[CONSTANT] + g * R);
    }
}

/* LOGITS (n,C) of a chunk of queries, whose clean rows are returned. */
static const ls_real *query_logits(ls_pass *p, const ls_chunk *c, int64_t *ld)
{
    const int64_t R = count(p), d = p->d;
    ls_real *logits = p->work[LOGITS];
    const ls_real *q = ls_chunk_rows(c, p->q, d, p->pad_q, p->T, p->work[ROWS_A], ld);
    for (int64_t i = 0; i < c->n; i++) memcpy(logits + i * R, p->work[CONSTANT] + c->g * R, (size_t)R * sizeof *logits);
    ls_gemm(0, 1, c->n, R, d, 1, q, *ld, p->work[KEYS] + c->g * R * d, d, 1, logits, R);
    return q;
}

static void read_chunk(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    const ls_slots s = slots(p);
    int64_t ld;
    query_logits(p, c, &ld);
    ls_slots_read(s, c->n, p->work[LOGITS], p->work[VALUES] + c->g * s.R * p->d, p->work[CENTRE] + c->g * p->d,
                  ls_row(p->out, c->b, c->h, c->t), p->out.st);
    ls_chunk_blank(c, p->out, p->d, p->pad_q, p->T);
}

static ls_status read(ls_pass *p, int phase)
{
    load_slots(p, phase);
    ls_each_chunk(p, phase, p->T, read_chunk);
    return LS_OK;
}

/* STATE gathers dN (C,d); DKEYS da (C,d) of all (b,h), then g (C) of all. */
static void read_chunk_backward(ls_pass *p, int phase, const ls_chunk *c)
{
    (void)phase;
    const ls_slots s = slots(p);
    const int64_t R = s.R, d = p->d, at = c->g * R * d;
    ls_real *dl = p->work[DLOGITS];
    double *da = ls_doubles(p->work[DKEYS]) + at, *sum = ls_doubles(p->work[DKEYS]) + p->B * p->H * R * d + c->g * R;
    int64_t ld, ldo;
    const ls_real *q = query_logits(p, c, &ld);
    const ls_real *dout = ls_chunk_rows(c, p->dout, d, p->pad_q, p->T, p->work[ROWS_B], &ldo);
    ls_slots_read_backward(s, c->n, p->work[LOGITS], p->work[VALUES] + at, dout, ldo, dl,
                           ls_doubles(p->work[STATE]) + at);
    ls_slots_sum(s, c->n, dl, q, ld, da);
    for (int64_t i = 0; i < c->n; i++)
        for (int64_t r = 0; r < R; r++) sum[r] += (double)dl[i * R + r];
    ls_gemm(0, 0, c->n, d, R, 1, dl, R, p->work[KEYS] + at, d, 0, ls_row(p->dq, c->b, c->h, c->t), p->dq.st);
}

static ls_status read_backward(ls_pass *p, int phase)
{
    const int64_t R = count(p), c = landmarks(p), d = p->d, G = p->B * p->H;
    double *dvalues = ls_doubles(p->work[STATE]), *da = ls_doubles(p->work[DKEYS]), *sum = da + G * R * d;
    load_slots(p, phase);
    for (int64_t i = 0; i < G * R * d; i++) dvalues[i] = da[i] = 0;
    for (int64_t i = 0; i < G * R; i++) sum[i] = 0;
    ls_each_chunk(p, phase, p->T, read_chunk_backward);
    for (int64_t i = 0; i < G * c * d; i++) ls_doubles(p->work[DMU])[i] = 0;
    for (int64_t i = 0; i < G * R; i++) { /* slot r of (b,h) g */
        const int64_t g = i / R, r = i % R;
        const double *omega = ls_doubles(p->saved[OMEGA]) + i * d;
        double *dmu = ls_doubles(p->work[DMU]) + (g * c + r % c) * d;
        const double s = (double)p->summary[phase].got[i * (d + 2) + 1], inverse = s > 0 ? 1 / s : 0;
        ls_real *to = p->summary[phase].dgot + i * (d + 2);
        to[0] = 0;
        to[1] = (ls_real)(inverse * sum[i]);
        for (int64_t e = 0; e < d; e++) {
            to[2 + e] = (ls_real)(inverse * dvalues[i * d + e]);
            dmu[e] += p->scale * (2 * da[i * d + e] - sum[i] * omega[e]); /* dμ + dω */
        }
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase phases[] = {
    {.name = "segments", .forward = segments, .backward = segments_backward},
    {.name = "write", .crossing = LS_REDUCE, .monoid = segment_sums, .forward = write, .backward = write_backward},
    {.name = "read", .crossing = LS_REDUCE, .monoid = summary, .forward = read, .backward = read_backward},
    {.name = NULL},
};

const ls_mechanism ls_lara_mechanism = {
    .name = "lara",
    .option = options,
    .params = params,
    .counts_padding = ls_segments_count_padding,
    .plan = plan,
    .phases = {[LS_NS] = phases, [LS_NC] = phases},
    .cuda = LS_IF_CUDA(&ls_lara_cuda),
    .draws = LS_GIVEN_NOISE,
};
