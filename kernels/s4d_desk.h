/* What the files of S4D share, s4d.c and s4d_backward.c, and nobody else: memory for a block of features, tables, rows,
 * and what states and outputs are made with. The theory and the letters are s4d.c's. */
#ifndef LS_S4D_DESK_H
#define LS_S4D_DESK_H

#include "lanes.h"
#include "tile.h"

#include <complex.h>

#ifndef CMPLX /* glibc has it for GCC alone */
#define CMPLX(x, y) __builtin_complex((double)(x), (double)(y))
#endif

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

static inline desk *desk_of(const ls_pass *p)
{
    return (desk *)(void *)p->work[DESK];
}

static inline double complex *complex_of(ls_real *x)
{
    return (double complex *)(void *)x;
}

/* Positions [t, t + chunks·length) of a shard. What is left after the last whole chunk is a piece of one short chunk.
 */
typedef struct piece {
    int64_t t, chunks, length;
} piece;

static inline int64_t chunk_length(const ls_pass *p)
{
    return ls_max(1, ls_min(CHUNK, p->T));
}

static inline int64_t count_pieces(const ls_pass *p)
{
    const int64_t n = chunk_length(p), whole = p->T / n;
    return (whole + PIECE - 1) / PIECE + (p->T % n > 0);
}

static inline piece piece_at(const ls_pass *p, int64_t i)
{
    const int64_t n = chunk_length(p), whole = p->T / n, first = i * PIECE;
    if (first < whole) return (piece){first * n, ls_min(PIECE, whole - first), n};
    return (piece){whole * n, 1, p->T % n};
}

/* The phase before which a direction's states cross. */
static inline int scan_of(const ls_pass *p, int direction)
{
    return p->pattern == LS_NS ? ENDS_RIGHT + 1 + direction : ENDS_LEFT + 1;
}

/* ------------------------------------------------------------------------------------------------ parameters */

static inline const ls_real *param(const ls_pass *p, int which)
{
    return p->params + p->param[which].offset;
}

static inline ls_real *dparam(const ls_pass *p, int which)
{
    return p->dparams + p->param[which].offset;
}

/* Where mode m of feature h stands in log_w_re and w_im. */
static inline int64_t in_set(const ls_pass *p, int64_t h, int64_t m)
{
    return h % (int64_t)p->option[SETS] * ((int64_t)p->option[STATE_SIZE] / 2) + m;
}

static inline double complex frequency(const ls_pass *p, int64_t h, int64_t m)
{
    const int64_t i = in_set(p, h, m);
    return CMPLX(-exp((double)param(p, LOG_W_RE)[i]), (double)param(p, W_IM)[i]);
}

static inline double complex saved_of(const ls_pass *p, int which, int64_t h, int64_t m)
{
    return complex_of(p->saved[which])[h * ((int64_t)p->option[STATE_SIZE] / 2) + m];
}

/* C of direction and channel: entry of the flat tensor. */
static inline int64_t in_c(const ls_pass *p, int direction, int64_t channel, int64_t h, int64_t m)
{
    const int64_t row = direction * (int64_t)p->option[CHANNELS] + channel;
    return 2 * ((row * p->d + h) * ((int64_t)p->option[STATE_SIZE] / 2) + m);
}

static inline double complex c_of(const ls_pass *p, int direction, int64_t channel, int64_t h, int64_t m)
{
    const ls_real *c = param(p, C_) + in_c(p, direction, channel, h, m);
    return CMPLX((double)c[0], (double)c[1]);
}

/* ------------------------------------------------------------------------------------------------ tables */

static inline void put(ls_lanes *x, int64_t lane, double complex z)
{
    x[0][lane] = (ls_real)creal(z);
    x[1][lane] = (ls_real)cimag(z);
}

static inline void fill_powers(const ls_pass *p, const desk *k, group *g, int64_t lane)
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
static inline void fill_taps(const ls_pass *p, const desk *k, group *g, int64_t lane, int64_t channel)
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

static inline void zero_lanes(ls_lanes *x, int64_t n)
{
    if (n > 0) memset(x, 0, (size_t)n * sizeof *x);
}

static inline void zero_doubles(double *x, int64_t n)
{
    memset(x, 0, (size_t)n * LS_LANES * sizeof *x);
}

/* Features [first, first + BLOCK) come to the desk, taps and weights only where there are outputs. Lanes without a
 * feature are 0 throughout. */
static inline void open_block(const ls_pass *p, desk *k, int64_t first, int with_outputs)
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
static inline void load(const ls_pass *p, const desk *k, ls_view v, int64_t b, const piece *x, ls_lanes *to)
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
static inline void store(const ls_pass *p, const desk *k, const ls_lanes *from, int64_t b, const piece *x, ls_view v)
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

static inline ls_view features(ls_view v, int64_t first)
{
    v.p += first;
    return v;
}

static inline double *state_of(const desk *k, const group *g, int kind, int direction)
{
    return g->state + (kind * k->directions + direction) * k->N * LS_LANES;
}

/* The state of a sweep as it comes to piece j, kept from the first pass for the second. */
static inline void keep(const desk *k, const group *g, int which, int64_t j, const double *state)
{
    memcpy(g->border[which] + j * k->N * LS_LANES, state, (size_t)(k->N * LS_LANES) * sizeof *state);
}

static inline void recall(const desk *k, const group *g, int which, int64_t j, double *state)
{
    memcpy(state, g->border[which] + j * k->N * LS_LANES, (size_t)(k->N * LS_LANES) * sizeof *state);
}

/* A state and its place in a summary. sign -1: gradient form there, γ here. */
static inline ls_real *in_summary(const ls_pass *p, const desk *k, const group *g, int64_t b, int64_t lane,
                                  ls_real *summary)
{
    return summary + (b * p->d + g->first + lane) * k->N;
}

static inline void read_state(const ls_pass *p, const desk *k, const group *g, int64_t b, ls_real *from, double sign,
                              double *state)
{
    zero_doubles(state, k->N);
    for (int64_t lane = 0; lane < g->width; lane++)
        for (int64_t m = 0; m < k->N; m++)
            state[m * LS_LANES + lane] = (m % 2 ? sign : 1) * (double)in_summary(p, k, g, b, lane, from)[m];
}

static inline void write_state(const ls_pass *p, const desk *k, const group *g, int64_t b, const double *state,
                               double sign, ls_real *to)
{
    for (int64_t lane = 0; lane < g->width; lane++)
        for (int64_t m = 0; m < k->N; m++)
            in_summary(p, k, g, b, lane, to)[m] = (ls_real)((m % 2 ? sign : 1) * state[m * LS_LANES + lane]);
}

/* ------------------------------------------------------------------------------------------------ arithmetic */

static inline ls_entries matrix(ls_lanes *x, int64_t cols)
{
    return (ls_entries){x, cols, 1};
}

/* (positions, N): the power of a (or slope) between an entering state and the output at position k, and between the
 * input at k and the state that leaves. From the left: k + 1 and n-1-k; from the right: n-1-k and k. */
static inline ls_entries on_entering(const desk *k, ls_lanes *table, int direction, int64_t n)
{
    return direction == FROM_LEFT ? (ls_entries){table + k->N, k->N, 1}
                                  : (ls_entries){table + (n - 1) * k->N, -k->N, 1};
}

static inline ls_entries on_leaving(const desk *k, ls_lanes *table, int direction, int64_t n)
{
    return direction == FROM_LEFT ? (ls_entries){table + (n - 1) * k->N, -k->N, 1} : (ls_entries){table, k->N, 1};
}

/* (inputs, outputs) of a chunk: entry (j,i) is the tap at distance i - j. */
static inline ls_entries toeplitz(const desk *k, const group *g, int64_t channel)
{
    return (ls_entries){g->taps + channel * (2 * k->n - 1) + k->n - 1, -1, 1};
}

/* States fade, where nothing comes in, until they are denormal numbers, with which arithmetic is a hundred times as
 * slow. They become 0 before, and so early that products with a part of them are normal numbers. */
static inline double seen_or_zero(double x)
{
    return fabs(x) < (double)LS_REAL_MIN / (double)LS_REAL_EPS ? 0 : x;
}

/* a^(positions of the piece's chunks). */
static inline const double *decay_of(const desk *k, const group *g, const piece *x)
{
    return g->decay + (x->length == k->n ? 0 : k->N * LS_LANES);
}

/* The state passes the chunks of a piece: before (chunks, N) = state as it comes, im times sign;
 * state := a^n state + local. */
static inline void chain(const desk *k, const group *g, const piece *x, int descending, double *state,
                         const ls_lanes *local, ls_real sign, ls_lanes *before)
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
static inline void weigh(const desk *k, int64_t chunks, const ls_lanes *weight, const ls_lanes *x, ls_real sign,
                         int add, ls_lanes *out)
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

/* ------------------------------------------------------------------------------------------------ states */

/* The state of a direction passes a piece; k->entering = the states that enter its chunks. */
static inline void enter(const desk *k, int64_t i, const piece *x, int direction)
{
    const group *g = &k->group[i];
    ls_lanes_product(x->chunks, k->N, x->length, matrix(k->u + i * STRIDE, x->length),
                     on_leaving(k, g->power, direction, x->length), 0, matrix(k->local, k->N));
    chain(k, g, x, direction == FROM_RIGHT, state_of(k, g, ENTERING, direction), k->local, 1, k->entering[direction]);
}

/* ------------------------------------------------------------------------------------------------ kernels */

/* s4d_backward.c: what the shard's own outputs want, and what later ranks want. */
ls_status ls_s4d_apply_backward(ls_pass *p, int phase);
ls_status ls_s4d_ends_backward(ls_pass *p, int phase);

#endif
