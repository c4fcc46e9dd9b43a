/* S4D on a GPU. The formulas, γ and the "gradient form" are those of s4d.c, as is what is in double: powers, and what
 * goes from chunk to chunk. Within a chunk of positions the recurrences simply run: a thread has one feature, its modes
 * in registers, and neighbouring threads neighbouring features. Chunks are independent once the states between them are
 * known:
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
 * so that what is wanted is W times the end of dy, walked along in reverse, and of s once more a.
 *
 * Parameters. In a chunk, z = ∂x/∂a runs along with x from 0, z = a z + x before the step, and
 *
 *   γ_W = Σ dy x,   γ_λ = a (W Σ dy z + γ' z at the end),  γ' of the state that leaves the chunk
 *
 * so that nothing of the way back is needed but γ'. A thread adds up a strip, a few chunks in a row, and strips are
 * summed in order. More modes than fit registers, and more channels than one, are passes of the same thread one after
 * the other. */
#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

namespace
{

enum { STATE_SIZE, CHANNELS, SETS };            /* option[] */
enum { LOG_DT, LOG_W_RE, W_IM, C_, D_ };        /* param[] */
enum { CHUNK = 64, AHEAD = 8, FEATURES = 128 }; /* positions; read at a time; features of a block */
enum { MODES = 8, SLOPES = 4 };                 /* of a pass; where z runs along */
enum { SEGMENTS = 16, SLICES = 8 };             /* of the chunks in a scan, of the strips in a sum: threads */
enum { MOST_STRIPS = 64 };                      /* about, of all batch rows together */
enum { FROM_LEFT, FROM_RIGHT };                 /* directions */
enum { LAMBDA, BETA, POWER, WEIGHT };           /* saved[]: (E,N/2) λ, β in double; (N/2,E) a; (rows of C,N/2,E) W */
enum { STATES, STATES_RIGHT, GRADS, GRADS_RIGHT }; /* work[]: complex (B,chunks,N/2,E) */
enum { DLAMBDA = GRADS_RIGHT + 1, DW, STRIPS };    /* complex doubles (E,N/2), twice; (1 + strips,sums,E) */
enum { ENDS_LEFT = 1, ENDS_RIGHT };                /* phases, see summary_of */

/* ------------------------------------------------------------------------------------------------ complex numbers */

template <typename T> struct __align__(2 * sizeof(T)) complex
{
    T re, im;
};
typedef complex<double> number;
typedef complex<ls_real> small; /* what is stored, and runs within a chunk */

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

__device__ static number wide(small x)
{
    return {(double)x.re, (double)x.im};
}

__device__ static small narrow(number x)
{
    return {(ls_real)x.re, (ls_real)x.im};
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
    number *lambda, *beta;
    small *power, *weight;
};

static number *numbers(ls_real *x)
{
    return (number *)(void *)x;
}

static small *smalls(ls_real *x)
{
    return (small *)(void *)x;
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
            .beta = numbers(p->saved[BETA]),
            .power = smalls(p->saved[POWER]),
            .weight = smalls(p->saved[WEIGHT])};
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

/* Sums of a strip: γ_W of every direction, channel and mode, γ_λ of every direction and mode, Σ dy u of every channel.
 */
static int64_t count_sums(const ls_pass *p)
{
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2, channels = (int64_t)p->option[CHANNELS];
    return directions(p) * (channels + 1) * modes + channels;
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t E = p->d, modes = (int64_t)p->option[STATE_SIZE] / 2, back = p->backward, both = directions(p) == 2;
    const int64_t states = p->B * ((p->T + CHUNK - 1) / CHUNK) * modes * E;
    const size_t z = sizeof(number), stored = sizeof(small), rows = (size_t)(directions(p) * p->option[CHANNELS]);
    p->saved[LAMBDA] = (ls_real *)ls_arena_take(saved, (size_t)(E * modes) * z);
    p->saved[BETA] = (ls_real *)ls_arena_take(saved, (size_t)(E * modes) * z);
    p->saved[POWER] = (ls_real *)ls_arena_take(saved, (size_t)(E * modes) * stored);
    p->saved[WEIGHT] = (ls_real *)ls_arena_take(saved, rows * (size_t)(E * modes) * stored);
    p->work[STATES] = (ls_real *)ls_arena_take(work, (size_t)states * stored);
    p->work[STATES_RIGHT] = (ls_real *)ls_arena_take(work, (size_t)(both * states) * stored);
    p->work[GRADS] = (ls_real *)ls_arena_take(work, (size_t)(back * states) * stored);
    p->work[GRADS_RIGHT] = (ls_real *)ls_arena_take(work, (size_t)(back * both * states) * stored);
    p->work[DLAMBDA] = (ls_real *)ls_arena_take(work, (size_t)(back * E * modes) * z);
    p->work[DW] = (ls_real *)ls_arena_take(work, (size_t)(back * E * modes) * z);
    p->work[STRIPS] =
        (ls_real *)ls_arena_take(work, (size_t)(back * (1 + p->B * count_strips(p)) * count_sums(p) * E) * z);
}

static small *states_of(const ls_pass *p, int direction)
{
    return smalls(p->work[STATES + direction]);
}

static small *grads_of(const ls_pass *p, int direction)
{
    return smalls(p->work[GRADS + direction]);
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
__device__ static small weight_of(const layer &y, int direction, int channel, int64_t h, int m)
{
    const int64_t row = direction * y.channels + channel;
    return m < y.modes ? y.weight[(row * y.modes + m) * y.E + h] : small{0, 0};
}

__device__ static small power_at(const layer &y, int64_t h, int m)
{
    return m < y.modes ? y.power[m * y.E + h] : small{0, 0};
}

/* λ, which the scans of the ranks need as well; a - 1 is made so that no digits are lost where λ is small. */
__global__ static void make_decays(layer y)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i % y.E;
        const int m = (int)(i / y.E);
        const number w = frequency(y, h, m), lambda = times(exp((double)y.log_dt[h]), w);
        const double half = sin(lambda.im / 2), grown = expm1(lambda.re);
        const number a1 = {grown * cos(lambda.im) - 2 * half * half, (grown + 1) * sin(lambda.im)}, beta = over(a1, w);
        y.lambda[h * y.modes + m] = lambda;
        y.beta[h * y.modes + m] = beta;
        y.power[i] = narrow({1 + a1.re, a1.im});
        for (int d = 0; d < y.directions; d++)
            for (int c = 0; c < y.channels; c++)
                y.weight[(d * y.channels + c) * y.E * y.modes + i] = narrow(times(2, times(beta, c_of(y, d, c, h, m))));
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

/* A block for each mode of a set, which sums over the set's features. */
__global__ static void frequency_gradients(layer y, const number *dlambda, const number *dw, ls_real *dlog_w_re,
                                           ls_real *dw_im)
{
    __shared__ double scratch[LS_WARP];
    for (int64_t i = blockIdx.x; i < (int64_t)y.sets * y.modes; i += gridDim.x) {
        number sum = {0, 0};
        for (int64_t h = i / y.modes + (int64_t)threadIdx.x * y.sets; h < y.E; h += (int64_t)blockDim.x * y.sets) {
            const int64_t at = h * y.modes + i % y.modes;
            sum = plus(sum, plus(dw[at], times(exp((double)y.log_dt[h]), dlambda[at])));
        }
        sum.re = ls_block_sum(sum.re, scratch);
        sum.im = ls_block_sum(sum.im, scratch);
        if (threadIdx.x > 0) continue;
        dlog_w_re[i] -= (ls_real)(sum.re * exp((double)y.log_w_re[i]));
        dw_im[i] -= (ls_real)sum.im;
    }
}

static ls_status decays_backward(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    LS_LAUNCH(p->queue, step_gradients, ls_blocks(y.E, 128), 128, 0, y, numbers(p->work[DLAMBDA]), dparam(p, LOG_DT));
    LS_LAUNCH(p->queue, frequency_gradients, ls_blocks((int64_t)y.sets * y.modes, 1), LS_THREADS, 0, y,
              numbers(p->work[DLAMBDA]), numbers(p->work[DW]), dparam(p, LOG_W_RE), dparam(p, W_IM));
    return ls_launched(p->queue, "s4d: decays backward");
}

/* ------------------------------------------------------------------------------------------------ in a thread */

/* A thread's feature, and the positions of its block: [t, t + n) of b. */
struct place {
    int64_t b, part, h, t;
    int n;
};

/* Chunk `part` of b. */
__device__ static place chunk_at(const layer &y, int64_t b, int64_t part, int64_t h)
{
    return {b, part, h, part * CHUNK, (int)ls_min(CHUNK, y.T - part * CHUNK)};
}

/* Blocks are (b, part, features). */
__device__ static place place_of(const layer &y, int64_t parts, unsigned block)
{
    const unsigned blocks = (unsigned)((y.E + FEATURES - 1) / FEATURES), i = block / blocks;
    return chunk_at(y, i / (unsigned)parts, i % (unsigned)parts, (int64_t)(block % blocks) * FEATURES + threadIdx.x);
}

/* Positions in the order in which a state meets them; back: against it. */
struct walk {
    int64_t b, first;
    int n, step;
    const uint8_t *pad; /* of the first, NULL: none is padded */
};

__device__ static walk along(const place &at, const rows &x, int direction, int back)
{
    const int descends = (direction == FROM_RIGHT) != back;
    const int64_t first = descends ? at.t + at.n - 1 : at.t;
    return {at.b, first, at.n, descends ? -1 : 1, x.pad == NULL ? NULL : x.pad + at.b * x.T + first};
}

/* A column's number at the first position of a walk; they are `step` apart. */
struct column {
    ls_real *p;
    int step;
};

__device__ static column column_of(const rows &x, const walk &w, int64_t i)
{
    return {ls_row(x.v, w.b, 0, w.first) + i, w.step * (int)x.v.st};
}

template <int n> struct some {
    enum { count = n };
};

/* f(k, some<n>) for positions k .. k + n of a walk: n is AHEAD, and 1 for what is left, so that f need not ask. */
template <typename F> __device__ static void each_some(int n, F f)
{
    int k = 0;
    for (; k + AHEAD <= n; k += AHEAD) f(k, some<AHEAD>());
    for (; k < n; k++) f(k, some<1>());
}

/* Bit i: position k + i is not padded. */
template <int n> __device__ static unsigned shown(const walk &w, int k)
{
    if (w.pad == NULL) return ~0u;
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < n; i++) bits |= (unsigned)(w.pad[(k + i) * w.step] == 0) << i;
    return bits;
}

/* The next n numbers, 0 where they are padded. Padded ones are read as well: so that all reads start before one is
 * waited for. */
template <int n> __device__ static void load(const column &x, unsigned shown, ls_real *to)
{
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = x.p[(int64_t)i * x.step];
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = shown >> i & 1 ? to[i] : 0;
}

template <int n> __device__ static void store(const column &x, unsigned shown, const ls_real *from)
{
#pragma unroll
    for (int i = 0; i < n; i++) x.p[(int64_t)i * x.step] = shown >> i & 1 ? from[i] : 0;
}

template <int n> __device__ static void pass(column *x)
{
    x->p += (int64_t)n * x->step;
}

/* Where mode m of feature h is in states. */
__device__ static int64_t in_states(const layer &y, int64_t b, int64_t chunk, int m, int64_t h)
{
    return ((b * y.chunks + chunk) * y.modes + m) * y.E + h;
}

template <int n> __device__ static void read_modes(const layer &y, const small *from, const place &at, int m, small *to)
{
#pragma unroll
    for (int i = 0; i < n; i++)
        to[i] = from != NULL && m + i < y.modes ? from[in_states(y, at.b, at.part, m + i, at.h)] : small{0, 0};
}

/* a x + u, and x + u c. */
__device__ static small step(small a, small x, small u)
{
    return {a.re * x.re + u.re - a.im * x.im, a.re * x.im + u.im + a.im * x.re};
}

__device__ static small add(small x, ls_real u, small c)
{
    return {x.re + u * c.re, x.im + u * c.im};
}

template <int n> __device__ static void advance(const small *a, ls_real u, small *x)
{
#pragma unroll
    for (int i = 0; i < n; i++) x[i] = step(a[i], x[i], {u, 0});
}

/* sum + Re Σ w x, in two halves that do not wait for each other. */
template <int n> __device__ static ls_real seen(ls_real sum, const small *w, const small *x)
{
    ls_real rest = 0;
#pragma unroll
    for (int i = 0; i < n; i++) {
        sum += w[i].re * x[i].re;
        rest += w[i].im * x[i].im;
    }
    return sum - rest;
}

__device__ static void pass_ends(const layer &y, const place &at, int direction, int back, const rows &from,
                                 small *ends)
{
    const walk w = along(at, from, direction, back);
    for (int m = 0; m < y.modes; m += MODES) {
        small a[MODES], sum[MODES] = {};
        for (int i = 0; i < MODES; i++) a[i] = power_at(y, at.h, m + i);
        for (int channel = 0; channel < (back ? y.channels : 1); channel++) {
            column in = column_of(from, w, channel * y.E + at.h);
            small x[MODES] = {};
            each_some(w.n, [&](int k, auto part) {
                constexpr int n = decltype(part)::count;
                ls_real put[n];
                load<n>(in, shown<n>(w, k), put);
                pass<n>(&in);
#pragma unroll
                for (int i = 0; i < n; i++) advance<MODES>(a, put[i], x);
            });
#pragma unroll
            for (int i = 0; i < MODES; i++) {
                if (back && direction == FROM_LEFT) x[i] = step(a[i], x[i], {0, 0});
                if (back) x[i] = step(weight_of(y, direction, channel, at.h, m + i), x[i], {0, 0});
                sum[i] = add(sum[i], 1, x[i]);
            }
        }
        for (int i = 0; i < MODES && m + i < y.modes; i++) ends[in_states(y, at.b, at.part, m + i, at.h)] = sum[i];
    }
}

/* The states that chunks of u make from nothing; back: what chunks of dy want of the state that enters. NULL: not of
 * this direction. */
__global__ static void __launch_bounds__(FEATURES, 5) make_ends(layer y, int back, rows from, small *left, small *right)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
    if (at.h >= y.E) return;
    if (left != NULL) pass_ends(y, at, FROM_LEFT, back, from, left);
    if (right != NULL) pass_ends(y, at, FROM_RIGHT, back, from, right);
}

/* One end of a scan: a summary's states, as they are (sign 1) or in gradient form (-1). NULL: nothing there. */
struct border {
    ls_real *at;
    int sign;
};

/* What chunks make alone becomes what enters them. `empty`: they make nothing. count, where not NULL: the positions.
 * Blocks are 32 features of a mode; a thread has a segment of their chunks and passes it twice: from nothing, and again
 * when what the segments before it make, in order, has come to what enters it. */
__global__ static void __launch_bounds__(SEGMENTS *LS_WARP, 2)
    scan_states(layer y, int descending, int empty, border from, border to, ls_real *count, small *states)
{
    __shared__ number powers[2][LS_WARP], fades[SEGMENTS][LS_WARP], ends[SEGMENTS][LS_WARP];
    const int lane = threadIdx.x % LS_WARP, mine = threadIdx.x / LS_WARP, m = (int)blockIdx.y;
    const int64_t blocks = (y.E + LS_WARP - 1) / LS_WARP, b = blockIdx.x / blocks;
    const int64_t feature = blockIdx.x % blocks * LS_WARP + lane,
                  h = ls_min(feature, y.E - 1); /* spare threads only wait */
    const int64_t length = (y.chunks + SEGMENTS - 1) / SEGMENTS, last = y.T - (y.chunks - 1) * CHUNK;
    const int64_t lo = mine * length, hi = feature < y.E ? ls_min(lo + length, y.chunks) : 0;
    if (mine < 2) powers[mine][lane] = power_of(y.lambda[h * y.modes + m], mine == 0 ? CHUNK : (double)last);
    __syncthreads();
    const number a = powers[0][lane], rest = powers[1][lane];
    number x = {0, 0}, fade = {1, 0};
    const auto follow = [&](int enters) {
        for (int64_t c0 = lo; c0 < hi; c0 += AHEAD) {
            small own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                const int64_t at = descending ? y.chunks - 1 - c0 - c : c0 + c;
                own[c] = c0 + c < hi && !empty ? states[in_states(y, b, at, m, h)] : small{0, 0};
            }
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                const int64_t at = descending ? y.chunks - 1 - c0 - c : c0 + c;
                if (c0 + c >= hi) break;
                const number over_it = at == y.chunks - 1 ? rest : a;
                if (enters) states[in_states(y, b, at, m, h)] = narrow(x);
                if (!enters) fade = times(over_it, fade);
                x = plus(times(over_it, x), wide(own[c]));
            }
        }
    };
    follow(0);
    fades[mine][lane] = fade;
    ends[mine][lane] = x;
    __syncthreads();
    const int64_t outside = 2 * ((b * y.E + h) * y.modes + m);
    x = {0, 0};
    if (from.at != NULL) x = {(double)from.at[outside], from.sign * (double)from.at[outside + 1]};
    for (int i = 0; i < mine; i++) x = plus(times(fades[i][lane], x), ends[i][lane]);
    follow(1);
    if (mine < SEGMENTS - 1 || feature >= y.E) return;
    if (to.at != NULL) to.at[outside] = (ls_real)x.re, to.at[outside + 1] = (ls_real)(to.sign * x.im);
    if (count != NULL && blockIdx.x == 0 && m == 0 && lane == 0) *count = (ls_real)y.T;
}

static int count_blocks(const layer &y, int64_t parts)
{
    return (int)(y.B * parts * feature_blocks(y));
}

static void scan(ls_pass *p, int descending, int empty, border from, border to, ls_real *count, small *states)
{
    const layer y = layer_of(p);
    const dim3 blocks((unsigned)(y.B * ((y.E + LS_WARP - 1) / LS_WARP)), (unsigned)y.modes);
    if (y.B > 0)
        LS_LAUNCH(p->queue, scan_states, blocks, SEGMENTS * LS_WARP, 0, y, descending, empty, from, to, count, states);
}

/* Of the directions `which`, bits: the ends of chunks, or what they want. */
static void launch_ends(ls_pass *p, int which, int back, rows from, int buffer)
{
    const layer y = layer_of(p);
    small *left = which & 1 << FROM_LEFT ? smalls(p->work[buffer]) : NULL,
          *right = which & 1 << FROM_RIGHT ? smalls(p->work[buffer + FROM_RIGHT]) : NULL;
    if (count_blocks(y, y.chunks) > 0)
        LS_LAUNCH(p->queue, make_ends, count_blocks(y, y.chunks), FEATURES, 0, y, back, from, left, right);
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
    const int d = direction_of(phase);
    const ls_summary *s = summary_of(p, d);
    launch_ends(p, 1 << d, 0, inputs_of(p), STATES);
    scan(p, d == FROM_RIGHT, 0, {NULL, 0}, {s->sent, 1}, s->sent + ls_monoid_size(s->monoid) - 1, states_of(p, d));
    return ls_launched(p->queue, "s4d: ends");
}

/* The states that enter chunks, with what came of other ranks. */
static void make_states(ls_pass *p)
{
    launch_ends(p, directions(p) == 2 ? 3 : 1, 0, inputs_of(p), STATES);
    for (int d = 0; d < directions(p); d++)
        scan(p, d == FROM_RIGHT, 0, {summary_of(p, d)->got, 1}, {NULL, 0}, NULL, states_of(p, d));
}

/* ------------------------------------------------------------------------------------------------ apply */

/* Adds to what stands in out, or, with `first`, to D u. */
template <int direction>
__device__ static void pass_outputs(const layer &y, const place &at, int channel, int m, int first, const rows &u,
                                    const small *states, const rows &out)
{
    const walk w = along(at, u, direction, 0);
    column in = column_of(u, w, at.h), to = column_of(out, w, channel * y.E + at.h);
    const ls_real skip = y.D[channel * y.E + at.h];
    small a[MODES], c[MODES], x[MODES];
    read_modes<MODES>(y, states, at, m, x);
    for (int i = 0; i < MODES; i++) {
        a[i] = power_at(y, at.h, m + i);
        c[i] = weight_of(y, direction, channel, at.h, m + i);
    }
    each_some(w.n, [&](int k, auto part) {
        constexpr int n = decltype(part)::count;
        const unsigned live = shown<n>(w, k);
        ls_real put[n], sum[n];
        load<n>(in, live, put);
        if (!first) load<n>(to, live, sum);
#pragma unroll
        for (int i = 0; i < n; i++) {
            if (first) sum[i] = skip * put[i];
            if (direction == FROM_RIGHT) sum[i] = seen<MODES>(sum[i], c, x);
            advance<MODES>(a, put[i], x);
            if (direction == FROM_LEFT) sum[i] = seen<MODES>(sum[i], c, x);
        }
        store<n>(to, live, sum);
        pass<n>(&in);
        pass<n>(&to);
    });
}

__global__ static void __launch_bounds__(FEATURES, 4)
    make_outputs(layer y, rows u, const small *left, const small *right, rows out)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
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
    make_states(p);
    LS_LAUNCH(p->queue, make_outputs, count_blocks(y, y.chunks), FEATURES, 0, y, inputs_of(p), states_of(p, FROM_LEFT),
              directions(p) == 2 ? states_of(p, FROM_RIGHT) : (small *)NULL, out);
    return ls_launched(p->queue, "s4d: apply");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* du of one channel and some modes, with g from what leaves the chunk. channel < 0: no outputs. Adds, or, with `first`,
 * overwrites; `skips`: D dy is not there yet. */
template <int direction>
__device__ static void pass_inputs(const layer &y, const place &at, int channel, int m, int first, int skips,
                                   const rows &dy, const small *grads, const rows &du)
{
    const walk w = along(at, dy, direction, 1);
    column from = column_of(dy, w, channel * y.E + at.h), to = column_of(du, w, at.h);
    const ls_real skip = skips ? y.D[channel * y.E + at.h] : 0;
    small a[MODES], c[MODES] = {}, g[MODES];
    read_modes<MODES>(y, grads, at, m, g);
    for (int i = 0; i < MODES; i++) {
        a[i] = power_at(y, at.h, m + i);
        if (channel >= 0) c[i] = weight_of(y, direction, channel, at.h, m + i);
    }
    each_some(w.n, [&](int k, auto part) {
        constexpr int n = decltype(part)::count;
        const unsigned live = shown<n>(w, k);
        ls_real want[n] = {}, sum[n] = {};
        if (channel >= 0) load<n>(from, live, want);
        if (!first) load<n>(to, live, sum);
#pragma unroll
        for (int i = 0; i < n; i++) {
            sum[i] += skip * want[i];
#pragma unroll
            for (int j = 0; j < MODES; j++) {
                if (direction == FROM_LEFT) g[j] = add(g[j], want[i], c[j]);
                sum[i] += g[j].re;
                g[j] = step(a[j], g[j], {0, 0});
                if (direction == FROM_RIGHT) g[j] = add(g[j], want[i], c[j]);
            }
        }
        store<n>(to, live, sum);
        pass<n>(&from);
        pass<n>(&to);
    });
}

/* left, right: γ' of what leaves the chunks. with_outputs 0: du += what later ranks want, of the direction that is not
 * NULL. */
__global__ static void __launch_bounds__(FEATURES, 4)
    make_input_gradients(layer y, int with_outputs, rows dy, const small *left, const small *right, rows du)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
    if (at.h >= y.E) return;
    for (int c = with_outputs ? 0 : -1; c < (with_outputs ? y.channels : 0); c++)
        for (int m = 0; m < y.modes; m += MODES) {
            const int skips = with_outputs && m == 0;
            const small *from_left = c > 0 ? NULL : left, *from_right = c > 0 ? NULL : right; /* they enter once */
            if (left != NULL) pass_inputs<FROM_LEFT>(y, at, c, m, skips && c == 0, skips, dy, from_left, du);
            if (right != NULL) pass_inputs<FROM_RIGHT>(y, at, c, m, 0, 0, dy, from_right, du);
        }
}

/* Where a strip's sums of a feature are, `E` numbers from one to the next: γ_W, γ_λ, Σ dy u. */
__device__ static int weight_sum(const layer &y, int direction, int channel, int m)
{
    return (direction * y.channels + channel) * y.modes + m;
}

__device__ static int lambda_sum(const layer &y, int direction, int m)
{
    return (y.directions * y.channels + direction) * y.modes + m;
}

__device__ static int skip_sum(const layer &y, int channel)
{
    return y.directions * (y.channels + 1) * y.modes + channel;
}

/* Chunks lo .. hi, and one channel of their outputs (-1: no outputs) for modes m ..: γ_W and Σ dy u go to sums, γ_λ is
 * added to dlambda. */
template <int direction>
__device__ static void pass_strip(const layer &y, place at, int64_t hi, int channel, int m, const rows &u,
                                  const rows &dy, const small *states, const small *grads, number *dlambda,
                                  number *sums)
{
    small a[SLOPES];
    number dweight[SLOPES] = {};
    double dskip = 0;
    for (int i = 0; i < SLOPES; i++) a[i] = power_at(y, at.h, m + i);
    for (; at.part < hi; at = chunk_at(y, at.b, at.part + 1, at.h)) {
        const walk w = along(at, u, direction, 0);
        column in = column_of(u, w, at.h), out = column_of(dy, w, channel * y.E + at.h);
        small x[SLOPES], z[SLOPES] = {}, seen_x[SLOPES] = {}, seen_z[SLOPES] = {}, after[SLOPES];
        ls_real product = 0;
        read_modes<SLOPES>(y, states, at, m, x);
        each_some(w.n, [&](int k, auto part) {
            constexpr int n = decltype(part)::count;
            const unsigned live = shown<n>(w, k);
            ls_real put[n], want[n] = {};
            load<n>(in, live, put);
            if (channel >= 0) load<n>(out, live, want);
            pass<n>(&in);
            pass<n>(&out);
#pragma unroll
            for (int i = 0; i < n; i++) {
                product += want[i] * put[i];
#pragma unroll
                for (int j = 0; j < SLOPES; j++) {
                    const small x_before = x[j], z_before = z[j];
                    x[j] = step(a[j], x[j], {put[i], 0});
                    z[j] = step(a[j], z[j], x_before);
                    seen_x[j] = add(seen_x[j], want[i], direction == FROM_LEFT ? x[j] : x_before);
                    seen_z[j] = add(seen_z[j], want[i], direction == FROM_LEFT ? z[j] : z_before);
                }
            }
        });
        read_modes<SLOPES>(y, channel > 0 ? NULL : grads, at, m, after); /* it leaves once */
        dskip += (double)product;
#pragma unroll
        for (int i = 0; i < SLOPES; i++) {
            const small c = channel < 0 ? small{0, 0} : weight_of(y, direction, channel, at.h, m + i);
            const number slope = plus(times(wide(c), wide(seen_z[i])), times(wide(after[i]), wide(z[i])));
            dlambda[i] = plus(dlambda[i], times(wide(a[i]), slope));
            dweight[i] = plus(dweight[i], wide(seen_x[i]));
        }
    }
    if (channel < 0) return;
    for (int i = 0; i < SLOPES && m + i < y.modes; i++)
        sums[weight_sum(y, direction, channel, m + i) * y.E + at.h] = dweight[i];
    if (m == 0 && direction == FROM_LEFT) sums[skip_sum(y, channel) * y.E + at.h] = {dskip, 0};
}

/* A state that enters and γ' of what leaves, of all chunks. */
struct meeting {
    const small *states, *grads;
};

/* A thread for each strip, feature, and SLOPES modes of a direction; those of a strip are neighbouring blocks, since
 * they read the same. Directions are first and, of two, its successor. */
__global__ static void __launch_bounds__(FEATURES, 4)
    sum_strips(layer y, int with_outputs, int first, int directions, int64_t strips, int64_t chunks, int64_t count,
               rows u, rows dy, meeting left, meeting right, number *sums)
{
    const int passes = (y.modes + SLOPES - 1) / SLOPES, i = (int)(blockIdx.x % (unsigned)(passes * directions));
    const int direction = first + i / passes, m = i % passes * SLOPES;
    const place strip = place_of(y, strips, blockIdx.x / (unsigned)(passes * directions));
    if (strip.h >= y.E) return;
    const place at = chunk_at(y, strip.b, strip.part * chunks, strip.h);
    const int64_t hi = ls_min(at.part + chunks, y.chunks);
    number dlambda[SLOPES] = {};
    sums += (1 + strip.b * strips + strip.part) * count * y.E;
    for (int c = with_outputs ? 0 : -1; c < (with_outputs ? y.channels : 0); c++)
        if (direction == FROM_LEFT)
            pass_strip<FROM_LEFT>(y, at, hi, c, m, u, dy, left.states, left.grads, dlambda, sums);
        else
            pass_strip<FROM_RIGHT>(y, at, hi, c, m, u, dy, right.states, right.grads, dlambda, sums);
#pragma unroll
    for (int j = 0; j < SLOPES; j++)
        if (m + j < y.modes) sums[lambda_sum(y, direction, m + j) * y.E + at.h] = dlambda[j];
}

/* sums (1 + strips,n): the sum over strips, in order, to the first row. Blocks are 32 columns, of which SLICES threads
 * have every SLICES-th strip. */
__global__ static void add_strips(int64_t strips, int64_t n, number *sums)
{
    __shared__ number part[SLICES][LS_WARP];
    const int lane = threadIdx.x % LS_WARP, slice = threadIdx.x / LS_WARP;
    const int64_t i = (int64_t)blockIdx.x * LS_WARP + lane;
    number sum = {0, 0};
    if (i < n)
        for (int64_t j = 1 + slice; j <= strips; j += SLICES) sum = plus(sum, sums[j * n + i]);
    part[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || i >= n) return;
    for (int j = 1; j < SLICES; j++) sum = plus(sum, part[j][lane]);
    sums[i] = sum;
}

/* A thread for each mode, of the first as well for D: sums become gradients of C, and of λ and w as far as they are
 * known. */
__global__ static void settle(layer y, const number *sums, number *dlambda, number *dw, ls_real *dC, ls_real *dD)
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
                const number dweight = sums[weight_sum(y, d, c, m) * y.E + h], dc = times(2, times(beta, dweight));
                dbeta = plus(dbeta, times(2, times(c_of(y, d, c, h, m), dweight)));
                dC[in_c(y, d, c, h, m)] += (ls_real)dc.re;
                dC[in_c(y, d, c, h, m) + 1] -= (ls_real)dc.im;
            }
        const number through = over(dbeta, w);
        dlambda[at] = times(through, power_of(y.lambda[at], 1));
        for (int d = 0; d < y.directions; d++) dlambda[at] = plus(dlambda[at], sums[lambda_sum(y, d, m) * y.E + h]);
        dw[at] = times(-1, times(through, beta));
        for (int c = 0; m == 0 && c < y.channels; c++) dD[c * y.E + h] += (ls_real)sums[skip_sum(y, c) * y.E + h].re;
    }
}

__global__ static void add_slopes(layer y, int direction, const number *sums, number *dlambda)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i % y.E, at = h * y.modes + i / y.E;
        dlambda[at] = plus(dlambda[at], sums[lambda_sum(y, direction, (int)(i / y.E)) * y.E + h]);
    }
}

/* Of so many directions, from `first` on. */
static void make_strips(ls_pass *p, int with_outputs, int first, int some)
{
    const layer y = layer_of(p);
    const rows dy = {p->dout, p->pad_q, p->T};
    const int blocks = count_blocks(y, count_strips(p)) * some * ((y.modes + SLOPES - 1) / SLOPES);
    if (blocks > 0)
        LS_LAUNCH(p->queue, sum_strips, blocks, FEATURES, 0, y, with_outputs, first, some, count_strips(p),
                  strip_chunks(p), count_sums(p), inputs_of(p), dy,
                  meeting{states_of(p, FROM_LEFT), grads_of(p, FROM_LEFT)},
                  meeting{states_of(p, FROM_RIGHT), grads_of(p, FROM_RIGHT)}, numbers(p->work[STRIPS]));
    LS_LAUNCH(p->queue, add_strips, (int)((count_sums(p) * y.E + LS_WARP - 1) / LS_WARP), SLICES * LS_WARP, 0,
              y.B * count_strips(p), count_sums(p) * y.E, numbers(p->work[STRIPS]));
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    const int blocks = count_blocks(y, y.chunks), both = directions(p) == 2;
    const rows dy = {p->dout, p->pad_q, p->T}, du = {p->dq, p->pad_q, p->T};
    make_states(p);
    launch_ends(p, both ? 3 : 1, 1, dy, GRADS);
    for (int d = 0; d < directions(p); d++)
        scan(p, d == FROM_LEFT, 0, {NULL, 0}, {summary_of(p, d)->dgot, -1}, NULL, grads_of(p, d));
    if (blocks > 0)
        LS_LAUNCH(p->queue, make_input_gradients, blocks, FEATURES, 0, y, 1, dy, grads_of(p, FROM_LEFT),
                  both ? grads_of(p, FROM_RIGHT) : (small *)NULL, du);
    make_strips(p, 1, FROM_LEFT, directions(p));
    LS_LAUNCH(p->queue, settle, ls_blocks(y.E * y.modes, 128), 128, 0, y, numbers(p->work[STRIPS]),
              numbers(p->work[DLAMBDA]), numbers(p->work[DW]), dparam(p, C_), dparam(p, D_));
    return ls_launched(p->queue, "s4d: apply backward");
}

/* The states that entered the chunks are there, from apply's backward. */
static ls_status ends_backward(ls_pass *p, int phase)
{
    const layer y = layer_of(p);
    const int blocks = count_blocks(y, y.chunks), d = direction_of(phase);
    const rows dy = {p->dout, p->pad_q, p->T}, du = {p->dq, p->pad_q, p->T};
    if (blocks == 0) return LS_OK;
    scan(p, d == FROM_LEFT, 1, {summary_of(p, d)->dsent, -1}, {NULL, 0}, NULL, grads_of(p, d));
    LS_LAUNCH(p->queue, make_input_gradients, blocks, FEATURES, 0, y, 0, dy,
              d == FROM_LEFT ? grads_of(p, d) : (small *)NULL, d == FROM_RIGHT ? grads_of(p, d) : (small *)NULL, du);
    make_strips(p, 0, d, 1);
    LS_LAUNCH(p->queue, add_slopes, ls_blocks(y.E * y.modes, 128), 128, 0, y, d, numbers(p->work[STRIPS]),
              numbers(p->work[DLAMBDA]));
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
