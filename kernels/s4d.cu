/* S4D on a GPU. The formulas, γ and the "gradient form" are those of s4d.c; here everything is in double but what is
 * stored, and within a chunk of positions the recurrences simply run: a thread has one feature, its modes in registers,
 * and neighbouring threads neighbouring features. Chunks are independent once the states between them are known:
 *
 *   ends      of every chunk alone, the state it makes from nothing
 *   scan      over chunks, from what came of other ranks: the states that enter chunks; at its end, what leaves
 *   apply     every chunk goes on from its state
 *
 * and backward, against the states, the same with γ: what a chunk's outputs want of the state that enters, a scan, then
 * du. A chunk has 64 positions. A state x, s from the left or r from the right, meets them in its own order, and g, its
 * gradient, against it. s takes the step of a position before it is seen there, r after:
 *
 *   step: x = a x + u    seen: y += Re W x    and of g, in reverse    seen: g += W dy    step: du += Re g, g = a g
 *
 * Parameters. In a strip, a few chunks in a row, z = ∂x/∂λ runs along with x from 0, z = a (z + x before the step), and
 *
 *   γ_W = Σ dy x,   γ_λ = Σ W dy z + γ' z at the end,  γ' of the state that leaves the strip
 *
 * so that nothing of the way back is needed but γ'. Strips are summed in order. More modes than fit registers, and more
 * channels than one, are passes of the same thread one after the other. */
#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

namespace
{

enum { STATE_SIZE, CHANNELS, SETS };               /* option[] */
enum { LOG_DT, LOG_W_RE, W_IM, C_, D_ };           /* param[] */
enum { CHUNK = 64, AHEAD = 8, FEATURES = 128 };    /* positions; read at a time; features of a block */
enum { MODES = 8, SLOPES = 4 };                    /* of a pass; where z runs along */
enum { MOST_STRIPS = 128 };                        /* about, of all batch rows together */
enum { FROM_LEFT, FROM_RIGHT };                    /* directions */
enum { LAMBDA, POWER, BETA };                      /* saved[]: complex doubles (E,N/2) of λ, a, β */
enum { STATES, STATES_RIGHT, GRADS, GRADS_RIGHT }; /* work[]: complex doubles (B,chunks,N/2,E) */
enum { DLAMBDA = GRADS_RIGHT + 1, DW, STRIPS };    /* complex doubles (E,N/2), twice; (strips,sums,E) */
enum { ENDS_LEFT = 1, ENDS_RIGHT };                /* phases, see summary_of */

/* ------------------------------------------------------------------------------------------------ complex numbers */

struct __align__(16) number
{
    double re, im;
};

__device__ static number times(number x, number y)
{
    return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

__device__ static number times(double x, number y)
{
    return {x * y.re, x * y.im};
}

__device__ static number plus(number x, number y)
{
    return {x.re + y.re, x.im + y.im};
}

__device__ static number over(number x, number y)
{
    return times(1 / (y.re * y.re + y.im * y.im), times(x, number{y.re, -y.im}));
}

__device__ static number power_of(number lambda, double n)
{
    const double size = exp(lambda.re * n);
    return {size * cos(lambda.im * n), size * sin(lambda.im * n)};
}

/* ------------------------------------------------------------------------------------------------ sizes, memory */

/* Rows (B,1,T,·) that are 0 where they are padded. */
struct rows {
    ls_view v;
    const uint8_t *pad;
    int64_t T;
};

/* What kernels know of a call. */
struct layer {
    int64_t B, T, E, chunks;
    int modes, channels, sets, directions;
    const ls_real *log_dt, *log_w_re, *w_im, *C, *D;
    number *lambda, *power, *beta;
};

static number *numbers(ls_real *x)
{
    return (number *)(void *)x;
}

static const ls_real *param(const ls_pass *p, int which)
{
    return p->params + p->param[which].offset;
}

static ls_real *dparam(const ls_pass *p, int which)
{
    return p->dparams + p->param[which].offset;
}

static layer layer_of(const ls_pass *p)
{
    return {.B = p->B,
            .T = p->T,
            .E = p->d,
            .chunks = (p->T + CHUNK - 1) / CHUNK,
            .modes = (int)p->option[STATE_SIZE] / 2,
            .channels = (int)p->option[CHANNELS],
            .sets = (int)p->option[SETS],
            .directions = p->pattern == LS_NS ? 2 : 1,
            .log_dt = param(p, LOG_DT),
            .log_w_re = param(p, LOG_W_RE),
            .w_im = param(p, W_IM),
            .C = param(p, C_),
            .D = param(p, D_),
            .lambda = numbers(p->saved[LAMBDA]),
            .power = numbers(p->saved[POWER]),
            .beta = numbers(p->saved[BETA])};
}

static int directions(const ls_pass *p)
{
    return p->pattern == LS_NS ? 2 : 1;
}

/* Chunks of a strip, and strips of a batch row. */
static int64_t strip_chunks(const ls_pass *p)
{
    const int64_t chunks = (p->T + CHUNK - 1) / CHUNK, most = ls_max(1, MOST_STRIPS / ls_max(1, p->B));
    return ls_max(1, (chunks + most - 1) / most);
}

static int64_t count_strips(const ls_pass *p)
{
    const int64_t chunks = (p->T + CHUNK - 1) / CHUNK, long_ = strip_chunks(p);
    return (chunks + long_ - 1) / long_;
}

/* Sums of a strip: γ_W of every direction, channel and mode, γ_λ of every mode, Σ dy u of every channel. */
static int64_t count_sums(const ls_pass *p)
{
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2, channels = (int64_t)p->option[CHANNELS];
    return directions(p) * channels * modes + modes + channels;
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t E = p->d, modes = (int64_t)p->option[STATE_SIZE] / 2, back = p->backward, both = directions(p) == 2;
    const int64_t states = p->B * ((p->T + CHUNK - 1) / CHUNK) * modes * E;
    const size_t z = sizeof(number);
    for (int i = LAMBDA; i <= BETA; i++) p->saved[i] = (ls_real *)ls_arena_take(saved, (size_t)(E * modes) * z);
    p->work[STATES] = (ls_real *)ls_arena_take(work, (size_t)states * z);
    p->work[STATES_RIGHT] = (ls_real *)ls_arena_take(work, (size_t)(both * states) * z);
    p->work[GRADS] = (ls_real *)ls_arena_take(work, (size_t)(back * states) * z);
    p->work[GRADS_RIGHT] = (ls_real *)ls_arena_take(work, (size_t)(back * both * states) * z);
    p->work[DLAMBDA] = (ls_real *)ls_arena_take(work, (size_t)(back * E * modes) * z);
    p->work[DW] = (ls_real *)ls_arena_take(work, (size_t)(back * E * modes) * z);
    p->work[STRIPS] = (ls_real *)ls_arena_take(work, (size_t)(back * p->B * count_strips(p) * count_sums(p) * E) * z);
}

static number *states_of(const ls_pass *p, int direction)
{
    return numbers(p->work[STATES + direction]);
}

static number *grads_of(const ls_pass *p, int direction)
{
    return numbers(p->work[GRADS + direction]);
}

static rows inputs_of(const ls_pass *p)
{
    return {p->q, p->pad_q, p->T};
}

static int feature_blocks(const layer &y)
{
    return (int)((y.E + FEATURES - 1) / FEATURES);
}

/* ------------------------------------------------------------------------------------------------ parameters */

__device__ static int64_t in_set(const layer &y, int64_t h, int m)
{
    return h % y.sets * y.modes + m;
}

__device__ static number frequency(const layer &y, int64_t h, int m)
{
    const int64_t i = in_set(y, h, m);
    return {-exp((double)y.log_w_re[i]), (double)y.w_im[i]};
}

/* C of direction and channel: entry of the flat tensor. */
__device__ static int64_t in_c(const layer &y, int direction, int channel, int64_t h, int m)
{
    return 2 * (((direction * y.channels + channel) * y.E + h) * y.modes + m);
}

__device__ static number c_of(const layer &y, int direction, int channel, int64_t h, int m)
{
    const ls_real *c = y.C + in_c(y, direction, channel, h, m);
    return {(double)c[0], (double)c[1]};
}

/* W, and a; 0 for modes that are not. */
__device__ static number weight_of(const layer &y, int direction, int channel, int64_t h, int m)
{
    if (m >= y.modes) return {0, 0};
    return times(2, times(y.beta[h * y.modes + m], c_of(y, direction, channel, h, m)));
}

__device__ static number entry(const layer &y, const number *x, int64_t h, int m)
{
    return m < y.modes ? x[h * y.modes + m] : number{0, 0};
}

/* λ, which the scans of the ranks need as well; a - 1 is made so that no digits are lost where λ is small. */
__global__ static void make_decays(layer y)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i / y.modes;
        const number w = frequency(y, h, (int)(i % y.modes)), lambda = times(exp((double)y.log_dt[h]), w);
        const double half = sin(lambda.im / 2), grown = expm1(lambda.re);
        const number a1 = {grown * cos(lambda.im) - 2 * half * half, (grown + 1) * sin(lambda.im)};
        y.lambda[i] = lambda;
        y.power[i] = {1 + a1.re, a1.im};
        y.beta[i] = over(a1, w);
    }
}

static ls_status decays(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    LS_LAUNCH(p->queue, make_decays, ls_blocks(y.E * y.modes, 128), 128, 0, y);
    return ls_launched(p->queue, "s4d: decays");
}

/* A thread for each feature. */
__global__ static void step_gradients(layer y, const number *dlambda, ls_real *dlog_dt)
{
    LS_EACH(h, y.E)
    {
        double sum = 0;
        for (int64_t i = h * y.modes; i < (h + 1) * y.modes; i++) sum += times(dlambda[i], y.lambda[i]).re;
        dlog_dt[h] += (ls_real)sum;
    }
}

/* A warp for each mode of a set, which sums over the set's features. */
__global__ static void frequency_gradients(layer y, const number *dlambda, const number *dw, ls_real *dlog_w_re,
                                           ls_real *dw_im)
{
    const int lane = threadIdx.x % LS_WARP, warps = blockDim.x / LS_WARP;
    for (int64_t i = (int64_t)blockIdx.x * warps + threadIdx.x / LS_WARP; i < (int64_t)y.sets * y.modes;
         i += (int64_t)gridDim.x * warps) {
        number sum = {0, 0};
        for (int64_t h = i / y.modes + (int64_t)lane * y.sets; h < y.E; h += (int64_t)LS_WARP * y.sets) {
            const int64_t at = h * y.modes + i % y.modes;
            sum = plus(sum, plus(dw[at], times(exp((double)y.log_dt[h]), dlambda[at])));
        }
        sum = {ls_warp_sum(sum.re), ls_warp_sum(sum.im)};
        if (lane > 0) continue;
        dlog_w_re[i] -= (ls_real)(sum.re * exp((double)y.log_w_re[i]));
        dw_im[i] -= (ls_real)sum.im;
    }
}

static ls_status decays_backward(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    LS_LAUNCH(p->queue, step_gradients, ls_blocks(y.E, 128), 128, 0, y, numbers(p->work[DLAMBDA]), dparam(p, LOG_DT));
    LS_LAUNCH(p->queue, frequency_gradients, ls_blocks((int64_t)y.sets * y.modes * LS_WARP, 128), 128, 0, y,
              numbers(p->work[DLAMBDA]), numbers(p->work[DW]), dparam(p, LOG_W_RE), dparam(p, W_IM));
    return ls_launched(p->queue, "s4d: decays backward");
}

/* ------------------------------------------------------------------------------------------------ in a thread */

/* A thread's feature, and the positions of its block: [t, t + n) of b. */
struct place {
    int64_t b, part, h, t, n;
};

/* Blocks are (b, part, features); parts of `length` positions. */
__device__ static place place_of(const layer &y, int64_t parts, int64_t length)
{
    const int64_t blocks = (y.E + FEATURES - 1) / FEATURES, i = blockIdx.x / blocks, t = i % parts * length;
    return {i / parts, i % parts, blockIdx.x % blocks * FEATURES + threadIdx.x, t, ls_min(length, y.T - t)};
}

/* Positions in the order in which a state meets them; back: against it. */
struct walk {
    int64_t first, n;
    int step;
};

__device__ static walk along(const place &at, int direction, int back)
{
    const int descends = (direction == FROM_RIGHT) != back;
    return {descends ? at.t + at.n - 1 : at.t, at.n, descends ? -1 : 1};
}

__device__ static int64_t position(const walk &w, int64_t k)
{
    return w.first + k * w.step;
}

__device__ static int is_padded(const rows &x, int64_t b, int64_t t)
{
    return ls_is_padded(x.pad, b * x.T + t);
}

/* to = the walk's entries k .. k + AHEAD of a feature, 0 where padded and after its end. */
__device__ static void load(const rows &x, int64_t b, int64_t h, const walk &w, int64_t k, ls_real *to)
{
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        const int64_t t = position(w, k + i);
        to[i] = k + i < w.n && !is_padded(x, b, t) ? ls_row(x.v, b, 0, t)[h] : 0;
    }
}

/* Where mode m of feature h is in states. */
__device__ static int64_t in_states(const layer &y, int64_t b, int64_t chunk, int m, int64_t h)
{
    return ((b * y.chunks + chunk) * y.modes + m) * y.E + h;
}

template <int n>
__device__ static void read_modes(const layer &y, const number *from, int64_t b, int64_t chunk, int m, int64_t h,
                                  number *to)
{
#pragma unroll
    for (int i = 0; i < n; i++)
        to[i] = from != NULL && m + i < y.modes ? from[in_states(y, b, chunk, m + i, h)] : number{0, 0};
}

template <int n>
__device__ static void write_modes(const layer &y, const number *from, int64_t b, int64_t chunk, int m, int64_t h,
                                   number *to)
{
    for (int i = 0; i < n && m + i < y.modes; i++) to[in_states(y, b, chunk, m + i, h)] = from[i];
}

/* The step of a state, and of γ against it. */
template <int n> __device__ static void advance(const number *a, double u, number *x)
{
#pragma unroll
    for (int i = 0; i < n; i++)
        x[i] = {a[i].re * x[i].re - a[i].im * x[i].im + u, a[i].re * x[i].im + a[i].im * x[i].re};
}

template <int n> __device__ static double real_sum(const number *x)
{
    double sum = 0;
#pragma unroll
    for (int i = 0; i < n; i++) sum += x[i].re;
    return sum;
}

template <int n> __device__ static double seen(const number *w, const number *x)
{
    double sum = 0;
#pragma unroll
    for (int i = 0; i < n; i++) sum += w[i].re * x[i].re - w[i].im * x[i].im;
    return sum;
}

/* ------------------------------------------------------------------------------------------------ states */

/* The states that chunks make from nothing. */
__global__ static void make_ends(layer y, int direction, rows u, number *states)
{
    const place at = place_of(y, y.chunks, CHUNK);
    if (at.h >= y.E) return;
    const walk w = along(at, direction, 0);
    for (int m = 0; m < y.modes; m += MODES) {
        number a[MODES], x[MODES] = {};
        for (int i = 0; i < MODES; i++) a[i] = entry(y, y.power, at.h, m + i);
        for (int64_t k = 0; k < w.n; k += AHEAD) {
            ls_real in[AHEAD];
            load(u, at.b, at.h, w, k, in);
#pragma unroll
            for (int i = 0; i < AHEAD; i++)
                if (k + i < w.n) advance<MODES>(a, (double)in[i], x);
        }
        write_modes<MODES>(y, x, at.b, at.part, m, at.h, states);
    }
}

/* One end of a scan: a summary's states, as they are (sign 1) or in gradient form (-1). NULL: nothing there. */
struct border {
    ls_real *at;
    int sign;
};

/* A thread for each state passes the chunks: what they make alone becomes what enters them. `empty`: they make nothing.
 * count, where not NULL: the positions. */
__global__ static void scan_states(layer y, int descending, int empty, border from, border to, ls_real *count,
                                   number *states)
{
    LS_EACH(i, y.B * y.modes * y.E)
    {
        const int64_t h = i % y.E, b = i / y.E / y.modes, last = y.T - (y.chunks - 1) * CHUNK;
        const int m = (int)(i / y.E % y.modes);
        const int64_t outside = 2 * ((b * y.E + h) * y.modes + m);
        const number lambda = y.lambda[h * y.modes + m], a = power_of(lambda, CHUNK),
                     rest = power_of(lambda, (double)last);
        number x = {0, 0};
        if (from.at != NULL) x = {(double)from.at[outside], from.sign * (double)from.at[outside + 1]};
        for (int64_t c0 = 0; c0 < y.chunks; c0 += AHEAD) {
            number own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                const int64_t at = descending ? y.chunks - 1 - c0 - c : c0 + c;
                own[c] = c0 + c < y.chunks && !empty ? states[in_states(y, b, at, m, h)] : number{0, 0};
            }
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                const int64_t at = descending ? y.chunks - 1 - c0 - c : c0 + c;
                if (c0 + c >= y.chunks) break;
                states[in_states(y, b, at, m, h)] = x;
                x = plus(times(at == y.chunks - 1 ? rest : a, x), own[c]);
            }
        }
        if (to.at != NULL) to.at[outside] = (ls_real)x.re, to.at[outside + 1] = (ls_real)(to.sign * x.im);
        if (count != NULL && i == 0) *count = (ls_real)y.T;
    }
}

static int count_blocks(const layer &y, int64_t parts)
{
    return (int)(y.B * parts * feature_blocks(y));
}

static void scan(ls_pass *p, int descending, int empty, border from, border to, ls_real *count, number *states)
{
    const layer y = layer_of(p);
    LS_LAUNCH(p->queue, scan_states, ls_blocks(y.B * y.modes * y.E, 128), 128, 0, y, descending, empty, from, to, count,
              states);
}

/* The states that enter the chunks when the shard begins with `from`; what leaves it goes to `to`. */
static void make_states(ls_pass *p, int direction, ls_real *from, ls_real *to, ls_real *count)
{
    const layer y = layer_of(p);
    if (count_blocks(y, y.chunks) > 0)
        LS_LAUNCH(p->queue, make_ends, count_blocks(y, y.chunks), FEATURES, 0, y, direction, inputs_of(p),
                  states_of(p, direction));
    scan(p, direction == FROM_RIGHT, 0, {from, 1}, {to, 1}, count, states_of(p, direction));
}

static int direction_of(int phase)
{
    return phase == ENDS_RIGHT ? FROM_RIGHT : FROM_LEFT;
}

static ls_summary *summary_of(ls_pass *p, int direction)
{
    return &p->summary[directions(p) == 2 ? ENDS_RIGHT + 1 + direction : ENDS_LEFT + 1];
}

static ls_status ends(ls_pass *p, int phase)
{
    const ls_summary *s = summary_of(p, direction_of(phase));
    make_states(p, direction_of(phase), NULL, s->sent, s->sent + ls_monoid_size(s->monoid) - 1);
    return ls_launched(p->queue, "s4d: ends");
}

/* ------------------------------------------------------------------------------------------------ apply */

/* Adds to what stands in out, or, with `first`, to D u. */
template <int direction>
__device__ static void pass_outputs(const layer &y, const place &at, int channel, int m, int first, const rows &u,
                                    const number *states, const rows &out)
{
    const walk w = along(at, direction, 0);
    const int64_t column = channel * y.E + at.h;
    const double skip = (double)y.D[column];
    number a[MODES], c[MODES], x[MODES];
    read_modes<MODES>(y, states, at.b, at.part, m, at.h, x);
    for (int i = 0; i < MODES; i++) {
        a[i] = entry(y, y.power, at.h, m + i);
        c[i] = weight_of(y, direction, channel, at.h, m + i);
    }
    for (int64_t k = 0; k < w.n; k += AHEAD) {
        ls_real in[AHEAD], was[AHEAD] = {};
        load(u, at.b, at.h, w, k, in);
        if (!first) load(out, at.b, column, w, k, was);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (k + i >= w.n) break;
            const int64_t t = position(w, k + i);
            double sum = first ? skip * (double)in[i] : (double)was[i];
            if (direction == FROM_RIGHT) sum += seen<MODES>(c, x);
            advance<MODES>(a, (double)in[i], x);
            if (direction == FROM_LEFT) sum += seen<MODES>(c, x);
            ls_row(out.v, at.b, 0, t)[column] = is_padded(out, at.b, t) ? 0 : (ls_real)sum;
        }
    }
}

__global__ static void make_outputs(layer y, rows u, const number *left, const number *right, rows out)
{
    const place at = place_of(y, y.chunks, CHUNK);
    if (at.h >= y.E) return;
    for (int c = 0; c < y.channels; c++)
        for (int m = 0; m < y.modes; m += MODES) {
            pass_outputs<FROM_LEFT>(y, at, c, m, m == 0, u, left, out);
            if (right != NULL) pass_outputs<FROM_RIGHT>(y, at, c, m, 0, u, right, out);
        }
}

static ls_status apply(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    const rows out = {p->out, p->pad_q, p->T};
    if (count_blocks(y, y.chunks) == 0) return LS_OK;
    for (int d = 0; d < directions(p); d++) make_states(p, d, summary_of(p, d)->got, NULL, NULL);
    LS_LAUNCH(p->queue, make_outputs, count_blocks(y, y.chunks), FEATURES, 0, y, inputs_of(p), states_of(p, FROM_LEFT),
              directions(p) == 2 ? states_of(p, FROM_RIGHT) : (number *)NULL, out);
    return ls_launched(p->queue, "s4d: apply");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* What the outputs of a chunk want of the state that enters it. */
__global__ static void make_wants(layer y, int direction, rows dy, number *grads)
{
    const place at = place_of(y, y.chunks, CHUNK);
    if (at.h >= y.E) return;
    const walk w = along(at, direction, 1);
    for (int m = 0; m < y.modes; m += MODES) {
        number a[MODES], sum[MODES] = {};
        for (int i = 0; i < MODES; i++) a[i] = entry(y, y.power, at.h, m + i);
        for (int channel = 0; channel < y.channels; channel++) {
            number c[MODES], g[MODES] = {};
            for (int i = 0; i < MODES; i++) c[i] = weight_of(y, direction, channel, at.h, m + i);
            for (int64_t k = 0; k < w.n; k += AHEAD) {
                ls_real want[AHEAD];
                load(dy, at.b, channel * y.E + at.h, w, k, want);
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (k + i >= w.n) break;
#pragma unroll
                    for (int j = 0; j < MODES; j++) {
                        const number wanted = times((double)want[i], c[j]);
                        g[j] =
                            direction == FROM_LEFT ? times(a[j], plus(g[j], wanted)) : plus(times(a[j], g[j]), wanted);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < MODES; j++) sum[j] = plus(sum[j], g[j]);
        }
        write_modes<MODES>(y, sum, at.b, at.part, m, at.h, grads);
    }
}

/* du of one channel and some modes, with g from what leaves the chunk. channel < 0: no outputs. Adds, or, with `first`,
 * overwrites; `skips`: D dy is not there yet. */
template <int direction>
__device__ static void pass_inputs(const layer &y, const place &at, int channel, int m, int first, int skips,
                                   const rows &dy, const number *grads, const rows &du)
{
    const walk w = along(at, direction, 1);
    const int64_t column = channel * y.E + at.h;
    const double skip = skips ? (double)y.D[column] : 0;
    number a[MODES], c[MODES] = {}, g[MODES];
    read_modes<MODES>(y, grads, at.b, at.part, m, at.h, g);
    for (int i = 0; i < MODES; i++) {
        a[i] = entry(y, y.power, at.h, m + i);
        if (channel >= 0) c[i] = weight_of(y, direction, channel, at.h, m + i);
    }
    for (int64_t k = 0; k < w.n; k += AHEAD) {
        ls_real want[AHEAD] = {}, was[AHEAD] = {};
        if (channel >= 0) load(dy, at.b, column, w, k, want);
        if (!first) load(du, at.b, at.h, w, k, was);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (k + i >= w.n) break;
            const int64_t t = position(w, k + i);
            double sum = (double)was[i] + skip * (double)want[i];
            if (direction == FROM_LEFT)
                for (int j = 0; j < MODES; j++) g[j] = plus(g[j], times((double)want[i], c[j]));
            sum += real_sum<MODES>(g);
            advance<MODES>(a, 0, g);
            if (direction == FROM_RIGHT)
                for (int j = 0; j < MODES; j++) g[j] = plus(g[j], times((double)want[i], c[j]));
            ls_row(du.v, at.b, 0, t)[at.h] = is_padded(du, at.b, t) ? 0 : (ls_real)sum;
        }
    }
}

/* left, right: γ' of what leaves the chunks. with_outputs 0: du += what later ranks want, of the direction that is not
 * NULL. */
__global__ static void make_input_gradients(layer y, int with_outputs, rows dy, const number *left, const number *right,
                                            rows du)
{
    const place at = place_of(y, y.chunks, CHUNK);
    if (at.h >= y.E) return;
    for (int c = with_outputs ? 0 : -1; c < (with_outputs ? y.channels : 0); c++)
        for (int m = 0; m < y.modes; m += MODES) {
            const int skips = with_outputs && m == 0;
            const number *from_left = c > 0 ? NULL : left, *from_right = c > 0 ? NULL : right; /* they enter once */
            if (left != NULL) pass_inputs<FROM_LEFT>(y, at, c, m, skips && c == 0, skips, dy, from_left, du);
            if (right != NULL) pass_inputs<FROM_RIGHT>(y, at, c, m, 0, 0, dy, from_right, du);
        }
}

/* Where a strip's sums of a feature are, `E` numbers from one to the next: γ_W, γ_λ, Σ dy u. */
__device__ static int weight_sum(const layer &y, int direction, int channel, int m)
{
    return (direction * y.channels + channel) * y.modes + m;
}

__device__ static int lambda_sum(const layer &y, int m)
{
    return y.directions * y.channels * y.modes + m;
}

__device__ static int skip_sum(const layer &y, int channel)
{
    return y.directions * y.channels * y.modes + y.modes + channel;
}

/* A strip, and one channel of its outputs (-1: no outputs) for modes m ..: γ_W and Σ dy u go to sums, γ_λ is added to
 * dlambda. It is entered with states of chunk `in`, and left with γ' of chunk `out`. */
template <int direction>
__device__ static void pass_strip(const layer &y, const place &at, int64_t in, int64_t out, int channel, int m,
                                  const rows &u, const rows &dy, const number *states, const number *grads,
                                  number *dlambda, number *sums)
{
    const walk w = along(at, direction, 0);
    number a[SLOPES], x[SLOPES], z[SLOPES] = {}, dweight[SLOPES] = {}, slope[SLOPES] = {};
    double dskip = 0;
    read_modes<SLOPES>(y, states, at.b, in, m, at.h, x);
    for (int i = 0; i < SLOPES; i++) a[i] = entry(y, y.power, at.h, m + i);
    for (int64_t k = 0; k < w.n; k += AHEAD) {
        ls_real put[AHEAD], want[AHEAD] = {};
        load(u, at.b, at.h, w, k, put);
        if (channel >= 0) load(dy, at.b, channel * y.E + at.h, w, k, want);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (k + i >= w.n) break;
            dskip += (double)want[i] * (double)put[i];
#pragma unroll
            for (int j = 0; j < SLOPES; j++) {
                const number x_before = x[j], z_before = z[j];
                x[j] = plus(times(a[j], x[j]), {(double)put[i], 0});
                z[j] = times(a[j], plus(z[j], x_before));
                dweight[j] = plus(dweight[j], times((double)want[i], direction == FROM_LEFT ? x[j] : x_before));
                slope[j] = plus(slope[j], times((double)want[i], direction == FROM_LEFT ? z[j] : z_before));
            }
        }
    }
    number after[SLOPES];
    read_modes<SLOPES>(y, channel > 0 ? NULL : grads, at.b, out, m, at.h, after); /* it leaves once */
#pragma unroll
    for (int i = 0; i < SLOPES; i++) {
        dlambda[i] = plus(dlambda[i], times(after[i], z[i]));
        if (channel < 0 || m + i >= y.modes) continue;
        dlambda[i] = plus(dlambda[i], times(weight_of(y, direction, channel, at.h, m + i), slope[i]));
        sums[weight_sum(y, direction, channel, m + i) * y.E + at.h] = dweight[i];
    }
    if (channel >= 0 && m == 0 && direction == FROM_LEFT) sums[skip_sum(y, channel) * y.E + at.h] = {dskip, 0};
}

/* A state that enters and γ' of what leaves, of all chunks. states NULL: this direction has no part. */
struct meeting {
    const number *states, *grads;
};

/* A thread for each strip, feature and SLOPES modes (blockIdx.y). */
__global__ static void sum_strips(layer y, int with_outputs, int64_t strips, int64_t chunks, int64_t count, rows u,
                                  rows dy, meeting left, meeting right, number *sums)
{
    const place at = place_of(y, strips, chunks * CHUNK);
    if (at.h >= y.E) return;
    const int64_t lo = at.part * chunks, hi = ls_min(lo + chunks, y.chunks) - 1;
    const int m = (int)blockIdx.y * SLOPES;
    number dlambda[SLOPES] = {};
    sums += (at.b * strips + at.part) * count * y.E;
    for (int c = with_outputs ? 0 : -1; c < (with_outputs ? y.channels : 0); c++) {
        if (left.states != NULL)
            pass_strip<FROM_LEFT>(y, at, lo, hi, c, m, u, dy, left.states, left.grads, dlambda, sums);
        if (right.states != NULL)
            pass_strip<FROM_RIGHT>(y, at, hi, lo, c, m, u, dy, right.states, right.grads, dlambda, sums);
    }
#pragma unroll
    for (int i = 0; i < SLOPES; i++)
        if (m + i < y.modes) sums[lambda_sum(y, m + i) * y.E + at.h] = dlambda[i];
}

__device__ static number sum_of(const layer &y, int64_t strips, int64_t count, const number *sums, int which, int64_t h)
{
    number sum = {0, 0};
    for (int64_t i = 0; i < strips; i++) sum = plus(sum, sums[(i * count + which) * y.E + h]);
    return sum;
}

/* A thread for each mode: the strips' sums become gradients of C, and of λ and w as far as they are known. */
__global__ static void settle(layer y, int64_t strips, int64_t count, const number *sums, number *dlambda, number *dw,
                              ls_real *dC)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i % y.E;
        const int m = (int)(i / y.E);
        const int64_t at = h * y.modes + m;
        const number beta = y.beta[at], w = frequency(y, h, m);
        number dbeta = {0, 0};
        for (int d = 0; d < y.directions; d++)
            for (int c = 0; c < y.channels; c++) {
                const number dweight = sum_of(y, strips, count, sums, weight_sum(y, d, c, m), h);
                const number dc = times(2, times(beta, dweight));
                dbeta = plus(dbeta, times(2, times(c_of(y, d, c, h, m), dweight)));
                dC[in_c(y, d, c, h, m)] += (ls_real)dc.re;
                dC[in_c(y, d, c, h, m) + 1] -= (ls_real)dc.im;
            }
        const number through = over(dbeta, w);
        dlambda[at] = plus(sum_of(y, strips, count, sums, lambda_sum(y, m), h), times(through, y.power[at]));
        dw[at] = times(-1, times(through, beta));
    }
}

__global__ static void settle_skips(layer y, int64_t strips, int64_t count, const number *sums, ls_real *dD)
{
    LS_EACH(i, y.channels * y.E)
    {
        dD[i] += (ls_real)sum_of(y, strips, count, sums, skip_sum(y, (int)(i / y.E)), i % y.E).re;
    }
}

__global__ static void add_slopes(layer y, int64_t strips, int64_t count, const number *sums, number *dlambda)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i % y.E, at = h * y.modes + i / y.E;
        dlambda[at] = plus(dlambda[at], sum_of(y, strips, count, sums, lambda_sum(y, (int)(i / y.E)), h));
    }
}

static void make_strips(ls_pass *p, int with_outputs, meeting left, meeting right)
{
    const layer y = layer_of(p);
    const rows dy = {p->dout, p->pad_q, p->T};
    const int blocks = count_blocks(y, count_strips(p));
    if (blocks > 0)
        LS_LAUNCH(p->queue, sum_strips, dim3((unsigned)blocks, (unsigned)((y.modes + SLOPES - 1) / SLOPES)), FEATURES,
                  0, y, with_outputs, count_strips(p), strip_chunks(p), count_sums(p), inputs_of(p), dy, left, right,
                  numbers(p->work[STRIPS]));
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    const int blocks = count_blocks(y, y.chunks), both = directions(p) == 2;
    const int64_t strips = y.B * count_strips(p), count = count_sums(p);
    const rows dy = {p->dout, p->pad_q, p->T}, du = {p->dq, p->pad_q, p->T};
    for (int d = 0; d < directions(p); d++) {
        make_states(p, d, summary_of(p, d)->got, NULL, NULL);
        if (blocks > 0) LS_LAUNCH(p->queue, make_wants, blocks, FEATURES, 0, y, d, dy, grads_of(p, d));
        scan(p, d == FROM_LEFT, 0, {NULL, 0}, {summary_of(p, d)->dgot, -1}, NULL, grads_of(p, d));
    }
    const meeting left = {states_of(p, FROM_LEFT), grads_of(p, FROM_LEFT)};
    meeting right = {NULL, NULL};
    if (both) right = {states_of(p, FROM_RIGHT), grads_of(p, FROM_RIGHT)};
    if (blocks > 0)
        LS_LAUNCH(p->queue, make_input_gradients, blocks, FEATURES, 0, y, 1, dy, left.grads, right.grads, du);
    make_strips(p, 1, left, right);
    LS_LAUNCH(p->queue, settle, ls_blocks(y.E * y.modes, 128), 128, 0, y, strips, count, numbers(p->work[STRIPS]),
              numbers(p->work[DLAMBDA]), numbers(p->work[DW]), dparam(p, C_));
    LS_LAUNCH(p->queue, settle_skips, ls_blocks(y.channels * y.E, 128), 128, 0, y, strips, count,
              numbers(p->work[STRIPS]), dparam(p, D_));
    return ls_launched(p->queue, "s4d: apply backward");
}

/* The states that entered the chunks are there, from apply's backward. */
static ls_status ends_backward(ls_pass *p, int phase)
{
    const layer y = layer_of(p);
    const int blocks = count_blocks(y, y.chunks), d = direction_of(phase);
    const rows dy = {p->dout, p->pad_q, p->T}, du = {p->dq, p->pad_q, p->T};
    const meeting none = {NULL, NULL}, mine = {states_of(p, d), grads_of(p, d)};
    if (blocks == 0) return LS_OK;
    scan(p, d == FROM_LEFT, 1, {summary_of(p, d)->dsent, -1}, {NULL, 0}, NULL, grads_of(p, d));
    LS_LAUNCH(p->queue, make_input_gradients, blocks, FEATURES, 0, y, 0, dy, d == FROM_LEFT ? mine.grads : none.grads,
              d == FROM_LEFT ? none.grads : mine.grads, du);
    make_strips(p, 0, d == FROM_LEFT ? mine : none, d == FROM_LEFT ? none : mine);
    LS_LAUNCH(p->queue, add_slopes, ls_blocks(y.E * y.modes, 128), 128, 0, y, y.B * count_strips(p), count_sums(p),
              numbers(p->work[STRIPS]), numbers(p->work[DLAMBDA]));
    return ls_launched(p->queue, "s4d: ends backward");
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_cuda_kernel kernels[] = {
    {"decays", decays, decays_backward},
    {"ends", ends, ends_backward},
    {"ends from the left", ends, ends_backward},
    {"ends from the right", ends, ends_backward},
    {"apply", apply, apply_backward},
    {NULL, NULL, NULL},
};

} // namespace

extern "C" const ls_cuda_mechanism ls_s4d_cuda = {plan, kernels, NULL, NULL};
