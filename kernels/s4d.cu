/* S4D on a GPU. The formulas, γ and the "gradient form" are those of s4d.c, and so is what is in double: powers, and
 * what goes from chunk to chunk. Within a chunk of positions the recurrences simply run: a thread has one feature, its
 * modes in registers, and neighbouring threads neighbouring features. Chunks are independent once the states between
 * them are known:
 *
 *   ends      of every chunk alone, the state it makes from nothing
 *   scan      over chunks, from what came of other ranks: the states that enter chunks; at its end, what leaves
 *   apply     every chunk goes on from its state
 *
 * and backward, against the states, the same with γ: what a chunk's outputs want of the state that enters, a scan, then
 * du. A chunk has 64 positions. A state x, s from the left or r from the right, meets them in its own order, and g, its
 * gradient, against it. s takes the step of a position before it is seen there, r after. With V = a W for s and V = W
 * for r, both are seen before:
 *
 *   y += Re V x,  x = a x + u        and in reverse    du += Re g,  g = a g + V dy
 *
 * if K_0 = Re Σ W of s goes to D. What is wanted of a state is V times the end of dy, walked along in reverse.
 *
 * Parameters. In a chunk, z = ∂x/∂a runs along with x from 0, z = a z + x before the step, and
 *
 *   γ_W = Σ dy x,   γ_λ = a (W Σ dy z + γ' z at the end),  γ' of the state that leaves the chunk
 *
 * of x and z as they are seen, which of s is a x + u and a z + x; so nothing of the way back is needed but γ'. A thread
 * adds up a strip, a few chunks in a row, and strips are summed in order. More modes than fit registers, and more
 * channels than one, are passes of the same thread one after the other. */
#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

namespace
{

enum { STATE_SIZE, CHANNELS, SETS };         /* option[] */
enum { LOG_DT, LOG_W_RE, W_IM, C_, D_ };     /* param[] */
enum { CHUNK = 64, AHEAD = 8, LEAP = 4 };    /* positions; read at a time; that an end takes in one step */
enum { FEATURES = 128, MODES = 8 };          /* of a block; of a pass */
enum { SEGMENTS = 16, SLICES = 8 };          /* of the chunks in a scan, of the strips in a sum: threads */
enum { MOST_STRIPS = 64 };                   /* about, of all batch rows together */
enum { FROM_LEFT, FROM_RIGHT };              /* directions */
enum { LAMBDA, BETA, POWERS, WEIGHT };       /* saved[]: (E,N/2) λ, β; (POWERS_KEPT,N/2,E); W, see read_modes */
enum { LOST = LEAP, POWERS_KEPT };           /* a^1 .. a^LEAP; what AHEAD steps with the first, rounded, lose */
enum { STATES, GRADS, DLAMBDA, DW, STRIPS }; /* work[]: states, see state_row; (E,N/2), twice; (1 + strips,sums) */
enum { ENDS_LEFT = 1, ENDS_RIGHT };          /* phases, see summary_of */

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

/* What kernels know of a call. Rows are 0 where they are padded. */
struct layer {
    int64_t B, T, E, chunks, strips, sums;
    int modes, channels, sets, directions;
    const ls_real *log_dt, *log_w_re, *w_im, *C, *D;
    number *lambda, *beta, *dlambda, *dw, *strip;
    small *powers, *weight, *states, *grads;
    ls_view u, out, dy, du;
    ls_summary carried[2]; /* by direction */
    const uint8_t *pad;
};

template <typename T> static T *as(ls_real *x)
{
    return (T *)(void *)x;
}

static const ls_real *param(const ls_pass *p, int which)
{
    return p->params + p->param[which].offset;
}

static ls_real *dparam(const ls_pass *p, int which)
{
    return p->dparams + p->param[which].offset;
}

static int64_t count_chunks(const ls_pass *p)
{
    return (p->T + CHUNK - 1) / CHUNK;
}

static int directions(const ls_pass *p)
{
    return p->pattern == LS_NS ? 2 : 1;
}

/* Chunks of a strip, and strips of a batch row. */
static int64_t strip_chunks(const ls_pass *p)
{
    const int64_t most = ls_max(1, MOST_STRIPS / ls_max(1, p->B));
    return ls_max(1, (count_chunks(p) + most - 1) / most);
}

static int64_t count_strips(const ls_pass *p)
{
    return (count_chunks(p) + strip_chunks(p) - 1) / strip_chunks(p);
}

/* Sums of a strip: a table of Σ dy x, Σ dy z (directions,channels,2), of γ' z (directions), then Σ dy u (channels,E).
 */
static int64_t count_sums(const ls_pass *p)
{
    const int64_t modes = (int64_t)p->option[STATE_SIZE] / 2, channels = (int64_t)p->option[CHANNELS];
    return directions(p) * (2 * channels + 1) * modes + channels;
}

static int direction_of(int phase)
{
    return phase == ENDS_RIGHT ? FROM_RIGHT : FROM_LEFT;
}

static const ls_summary *summary_of(const ls_pass *p, int direction)
{
    return &p->summary[directions(p) == 2 ? ENDS_RIGHT + 1 + direction : ENDS_LEFT + 1];
}

static layer layer_of(const ls_pass *p)
{
    return {.B = p->B,
            .T = p->T,
            .E = p->d,
            .chunks = count_chunks(p),
            .strips = count_strips(p),
            .sums = count_sums(p),
            .modes = (int)p->option[STATE_SIZE] / 2,
            .channels = (int)p->option[CHANNELS],
            .sets = (int)p->option[SETS],
            .directions = directions(p),
            .log_dt = param(p, LOG_DT),
            .log_w_re = param(p, LOG_W_RE),
            .w_im = param(p, W_IM),
            .C = param(p, C_),
            .D = param(p, D_),
            .lambda = as<number>(p->saved[LAMBDA]),
            .beta = as<number>(p->saved[BETA]),
            .dlambda = as<number>(p->work[DLAMBDA]),
            .dw = as<number>(p->work[DW]),
            .strip = as<number>(p->work[STRIPS]),
            .powers = as<small>(p->saved[POWERS]),
            .weight = as<small>(p->saved[WEIGHT]),
            .states = as<small>(p->work[STATES]),
            .grads = as<small>(p->work[GRADS]),
            .u = p->q,
            .out = p->out,
            .dy = p->dout,
            .du = p->dq,
            .carried = {*summary_of(p, FROM_LEFT), *summary_of(p, directions(p) - 1)},
            .pad = p->pad_q};
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t E = p->d, modes = (int64_t)p->option[STATE_SIZE] / 2, back = p->backward, all = E * modes;
    const int64_t states = directions(p) * p->B * count_chunks(p) * all, strips = 1 + p->B * count_strips(p);
    const int64_t weights = directions(p) * (int64_t)p->option[CHANNELS] * all;
    p->saved[LAMBDA] = (ls_real *)ls_arena_take(saved, (size_t)all * sizeof(number));
    p->saved[BETA] = (ls_real *)ls_arena_take(saved, (size_t)all * sizeof(number));
    p->saved[POWERS] = (ls_real *)ls_arena_take(saved, (size_t)(POWERS_KEPT * all) * sizeof(small));
    p->saved[WEIGHT] = (ls_real *)ls_arena_take(saved, (size_t)weights * sizeof(small));
    p->work[STATES] = (ls_real *)ls_arena_take(work, (size_t)states * sizeof(small));
    p->work[GRADS] = (ls_real *)ls_arena_take(work, (size_t)(back * states) * sizeof(small));
    p->work[DLAMBDA] = (ls_real *)ls_arena_take(work, (size_t)(back * all) * sizeof(number));
    p->work[DW] = (ls_real *)ls_arena_take(work, (size_t)(back * all) * sizeof(number));
    p->work[STRIPS] = (ls_real *)ls_arena_take(work, (size_t)(back * strips * count_sums(p) * E) * sizeof(number));
}

/* Blocks of (B, parts, features). */
static int count_blocks(const layer &y, int64_t parts)
{
    return (int)(y.B * parts * ((y.E + FEATURES - 1) / FEATURES));
}

/* ------------------------------------------------------------------------------------------------ parameters */

__device__ static number frequency(const layer &y, int64_t h, int m)
{
    const int64_t i = h % y.sets * y.modes + m;
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

/* Where mode m is in tables (rows,N/2,E); and the row of states (directions,B,chunks). */
__device__ static int64_t in_table(const layer &y, int64_t row, int m, int64_t h)
{
    return (row * y.modes + m) * y.E + h;
}

__device__ static int64_t state_row(const layer &y, int direction, int64_t b, int64_t chunk)
{
    return (direction * y.B + b) * y.chunks + chunk;
}

/* Of a strip's sums: the row of γ' z, and where Σ dy u begins. */
__device__ static int64_t row_of_owed(const layer &y, int direction)
{
    return 2 * y.directions * y.channels + direction;
}

__device__ static int64_t row_of_skips(const layer &y)
{
    return in_table(y, row_of_owed(y, y.directions), 0, 0);
}

/* Modes m .. of a row; 0 for those that are not. */
__device__ static void read_modes(const layer &y, const small *table, int64_t row, int m, int64_t h, small *to)
{
    const small *from = table + in_table(y, row, m, h);
#pragma unroll
    for (int i = 0; i < MODES; i++) to[i] = m + i < y.modes ? from[(int64_t)i * (int)y.E] : small{0, 0};
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
        const number a = {1 + a1.re, a1.im};
        y.lambda[h * y.modes + m] = lambda;
        y.beta[h * y.modes + m] = beta;
        number power = a;
        for (int e = 0; e < LEAP; e++, power = times(a, power)) y.powers[in_table(y, e, m, h)] = narrow(power);
        const number rounded = wide(narrow(a)), lost = over(plus(a, times(-1, rounded)), rounded);
        const int lasts = exp(lambda.re) > 0.5; /* what fades sooner loses nothing, and may be rounded to 0 */
        y.powers[in_table(y, LOST, m, h)] = lasts ? narrow(times(AHEAD, lost)) : small{0, 0};
        for (int d = 0; d < y.directions; d++)
            for (int c = 0; c < y.channels; c++)
                y.weight[in_table(y, d * y.channels + c, m, h)] = narrow(times(2, times(beta, c_of(y, d, c, h, m))));
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
__global__ static void step_gradients(layer y, ls_real *dlog_dt)
{
    LS_EACH(h, y.E)
    {
        double sum = 0;
        for (int64_t i = h * y.modes; i < (h + 1) * y.modes; i++) sum += times(y.dlambda[i], y.lambda[i]).re;
        dlog_dt[h] += (ls_real)sum;
    }
}

/* A block for each mode of a set, which sums over the set's features. */
__global__ static void frequency_gradients(layer y, ls_real *dlog_w_re, ls_real *dw_im)
{
    __shared__ double scratch[LS_WARP];
    for (int64_t i = blockIdx.x; i < (int64_t)y.sets * y.modes; i += gridDim.x) {
        number sum = {0, 0};
        for (int64_t h = i / y.modes + (int64_t)threadIdx.x * y.sets; h < y.E; h += (int64_t)blockDim.x * y.sets) {
            const int64_t at = h * y.modes + i % y.modes;
            sum = plus(sum, plus(y.dw[at], times(exp((double)y.log_dt[h]), y.dlambda[at])));
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
    LS_LAUNCH(p->queue, step_gradients, ls_blocks(y.E, 128), 128, 0, y, dparam(p, LOG_DT));
    LS_LAUNCH(p->queue, frequency_gradients, ls_blocks((int64_t)y.sets * y.modes, 1), LS_THREADS, 0, y,
              dparam(p, LOG_W_RE), dparam(p, W_IM));
    return ls_launched(p->queue, "s4d: decays backward");
}

/* ------------------------------------------------------------------------------------------------ in a thread */

/* A thread's feature, and its chunk or strip of b. */
struct place {
    int64_t b, part, h;
};

/* Blocks are (b, part, features). */
__device__ static place place_of(const layer &y, int64_t parts, unsigned block)
{
    const unsigned blocks = (unsigned)((y.E + FEATURES - 1) / FEATURES), i = block / blocks;
    return {i / (unsigned)parts, i % (unsigned)parts, (int64_t)(block % blocks) * FEATURES + threadIdx.x};
}

/* A chunk's positions in the order in which a state meets them; back: against it. */
struct walk {
    int64_t b, first;
    int n, step;
    const uint8_t *pad; /* of the first, NULL: none is padded */
};

__device__ static walk along(const layer &y, const place &at, int direction, int back)
{
    const int descends = (direction == FROM_RIGHT) != back, n = (int)ls_min(CHUNK, y.T - at.part * CHUNK);
    const int64_t first = at.part * CHUNK + (descends ? n - 1 : 0);
    return {at.b, first, n, descends ? -1 : 1, y.pad == NULL ? NULL : y.pad + at.b * y.T + first};
}

/* A column's number at the first position of a walk; they are `step` apart. */
struct column {
    ls_real *p;
    int step;
};

__device__ static column column_of(const ls_view &v, const walk &w, int64_t i)
{
    return {ls_row(v, w.b, 0, w.first) + i, w.step * (int)v.st};
}

template <int n> struct some {
    enum { count = n };
};

/* What is shown when nothing is padded: a type of its own, so that loops are compiled without the question as well. */
struct everything {
    __device__ operator unsigned() const
    {
        return ~0u;
    }
};

/* Bit i: position k + i is not padded. */
template <int n> __device__ static unsigned shown(const walk &w, int k)
{
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < n; i++) bits |= (unsigned)(w.pad == NULL || w.pad[(k + i) * w.step] == 0) << i;
    return bits;
}

/* f(some<n>, shown) for the positions of a walk, n after n: AHEAD, and 1 for what is left, so that f need not ask. */
template <typename F> __device__ static void each_some(const walk &w, F f)
{
    int k = 0;
    for (; w.pad == NULL && k + AHEAD <= w.n; k += AHEAD) f(some<AHEAD>(), everything());
    for (; k + AHEAD <= w.n; k += AHEAD) f(some<AHEAD>(), shown<AHEAD>(w, k));
    for (; k < w.n; k++) f(some<1>(), shown<1>(w, k));
}

/* The next n numbers, 0 where they are padded. Padded ones are read as well: so that all reads start before one is
 * waited for. */
template <int n> __device__ static void load(column *x, unsigned shown, ls_real *to)
{
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = x->p[(int64_t)i * x->step];
#pragma unroll
    for (int i = 0; i < n; i++) to[i] = shown >> i & 1 ? to[i] : 0;
    x->p += (int64_t)n * x->step;
}

template <int n> __device__ static void store(column *x, unsigned shown, const ls_real *from)
{
#pragma unroll
    for (int i = 0; i < n; i++) x->p[(int64_t)i * x->step] = shown >> i & 1 ? from[i] : 0;
    x->p += (int64_t)n * x->step;
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

/* sum + Re w x. */
__device__ static ls_real seen(ls_real sum, small w, small x)
{
    return sum + w.re * x.re - w.im * x.im;
}

/* y = a x; returns Re Σ x. */
__device__ static ls_real times_all(const small *a, const small *x, small *y)
{
    ls_real sum = 0;
#pragma unroll
    for (int i = 0; i < MODES; i++) {
        sum += x[i].re;
        y[i] = step(a[i], x[i], {0, 0});
    }
    return sum;
}

/* v = V of these modes; returns their K_0, which is 0 from the right. */
__device__ static ls_real seen_with(const layer &y, int direction, int channel, int m, int64_t h, const small *a,
                                    small *v)
{
    read_modes(y, y.weight, direction * y.channels + channel, m, h, v);
    return direction == FROM_LEFT ? times_all(a, v, v) : 0;
}

/* The states that chunks of u make from nothing; back: what chunks of dy want of the state that enters. Directions are
 * first .. end. LEAP positions at a time: x = a⁴ x + a³ u_0 + a² u_1 + a u_2 + u_3. */
__global__ static void __launch_bounds__(FEATURES, 4) make_ends(layer y, int first, int end, int back)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
    if (at.h >= y.E) return;
    small *ends = back ? y.grads : y.states;
    for (int m = 0; m < y.modes; m += MODES) {
        small a[LEAP][MODES];
        for (int e = 0; e < LEAP; e++) read_modes(y, y.powers, e, m, at.h, a[e]);
        for (int d = first; d < end; d++) {
            const walk w = along(y, at, d, back);
            small sum[MODES] = {};
            for (int channel = 0; channel < (back ? y.channels : 1); channel++) {
                column from = column_of(back ? y.dy : y.u, w, channel * y.E + at.h);
                small x[MODES] = {}, v[MODES];
                each_some(w, [&](auto part, auto shown) {
                    constexpr int n = decltype(part)::count, leap = n < LEAP ? 1 : LEAP;
                    ls_real put[n];
                    load<n>(&from, shown, put);
#pragma unroll
                    for (int k = 0; k < n; k += leap)
#pragma unroll
                        for (int i = 0; i < MODES; i++) {
                            small own = {put[k + leap - 1], 0};
                            for (int e = 0; e < leap - 1; e++) own = add(own, put[k + leap - 2 - e], a[e][i]);
                            x[i] = step(a[leap - 1][i], x[i], own);
                        }
                });
                if (back) seen_with(y, d, channel, m, at.h, a[0], v);
#pragma unroll
                for (int i = 0; i < MODES; i++) sum[i] = back ? step(v[i], x[i], sum[i]) : x[i];
            }
            for (int i = 0; i < MODES && m + i < y.modes; i++)
                ends[in_table(y, state_row(y, d, at.b, at.part), m + i, at.h)] = sum[i];
        }
    }
}

/* What chunks make alone becomes what enters them. `whole`: for apply, with what came of other ranks; 0: for ends,
 * which begin with nothing, and backward with what later ranks want, when chunks make nothing. count, where not NULL:
 * the positions. Blocks are 32 features of a mode; a thread has a segment of their chunks and passes it twice: from
 * nothing, and again when what the segments before it make, in order, has come to what enters it. */
__global__ static void __launch_bounds__((int)SEGMENTS *LS_WARP, 2)
    scan_states(layer y, int first, int back, int whole, ls_real *count)
{
    __shared__ number powers[2][LS_WARP], fades[SEGMENTS][LS_WARP], ends[SEGMENTS][LS_WARP];
    const int lane = threadIdx.x % LS_WARP, mine = threadIdx.x / LS_WARP, m = (int)blockIdx.y;
    const int direction = first + (int)blockIdx.z, descends = (direction == FROM_RIGHT) != back, sign = back ? -1 : 1;
    const int64_t blocks = (y.E + LS_WARP - 1) / LS_WARP, b = blockIdx.x / blocks;
    const int64_t feature = blockIdx.x % blocks * LS_WARP + lane, h = ls_min(feature, y.E - 1); /* spare ones wait */
    const int64_t length = (y.chunks + SEGMENTS - 1) / SEGMENTS, last = y.T - (y.chunks - 1) * CHUNK;
    const int64_t lo = mine * length, hi = feature < y.E ? ls_min(lo + length, y.chunks) : 0;
    const int64_t stride = (descends ? -1 : 1) * y.modes * y.E, short_one = descends ? 0 : y.chunks - 1;
    const int64_t outside = 2 * ((b * y.E + h) * y.modes + m);
    const ls_summary &carried = y.carried[direction];
    const ls_real *enters = back == whole ? NULL : back ? carried.dsent : carried.got;
    ls_real *leaves = back != whole ? NULL : back ? carried.dgot : carried.sent;
    small *chunk =
        (back ? y.grads : y.states) + in_table(y, state_row(y, direction, b, descends ? y.chunks - 1 : 0), m, h);
    if (mine < 2) powers[mine][lane] = power_of(y.lambda[h * y.modes + m], mine == 0 ? (double)CHUNK : (double)last);
    __syncthreads();
    const number a = powers[0][lane], rest = powers[1][lane];
    number x = {0, 0}, fade = {1, 0};
    const auto follow = [&](int again) {
        for (int64_t c0 = lo; c0 < hi; c0 += AHEAD) {
            small own[AHEAD];
#pragma unroll
            for (int c = 0; c < AHEAD; c++)
                own[c] = c0 + c < hi && (whole || !back) ? chunk[(c0 + c) * stride] : small{0, 0};
#pragma unroll
            for (int c = 0; c < AHEAD; c++) {
                if (c0 + c >= hi) break;
                const number over_it = c0 + c == short_one ? rest : a;
                if (again) chunk[(c0 + c) * stride] = narrow(x);
                if (!again) fade = times(over_it, fade);
                x = plus(times(over_it, x), wide(own[c]));
            }
        }
    };
    follow(0);
    fades[mine][lane] = fade;
    ends[mine][lane] = x;
    __syncthreads();
    x = {0, 0};
    if (enters != NULL) x = {(double)enters[outside], sign * (double)enters[outside + 1]};
    for (int i = 0; i < mine; i++) x = plus(times(fades[i][lane], x), ends[i][lane]);
    follow(1);
    if (mine < SEGMENTS - 1 || feature >= y.E) return;
    if (leaves != NULL) leaves[outside] = (ls_real)x.re, leaves[outside + 1] = (ls_real)(sign * x.im);
    if (count != NULL && blockIdx.x == 0 && m == 0 && lane == 0) *count = (ls_real)y.T;
}

/* The states that enter chunks, of directions first .. end; back: what is wanted of those that leave. */
static void make_states(ls_pass *p, int first, int end, int back, int whole)
{
    const layer y = layer_of(p);
    const ls_summary *s = summary_of(p, first);
    const dim3 blocks((unsigned)(y.B * ((y.E + LS_WARP - 1) / LS_WARP)), (unsigned)y.modes, (unsigned)(end - first));
    if ((whole || !back) && count_blocks(y, y.chunks) > 0)
        LS_LAUNCH(p->queue, make_ends, count_blocks(y, y.chunks), FEATURES, 0, y, first, end, back);
    if (y.B > 0)
        LS_LAUNCH(p->queue, scan_states, blocks, (int)SEGMENTS * LS_WARP, 0, y, first, back, whole,
                  back || whole ? (ls_real *)NULL : s->sent + ls_monoid_size(s->monoid) - 1);
}

static ls_status ends(ls_pass *p, int phase)
{
    make_states(p, direction_of(phase), direction_of(phase) + 1, 0, 0);
    return ls_launched(p->queue, "s4d: ends");
}

/* ------------------------------------------------------------------------------------------------ apply */

/* Two positions at a time, K_1 = Re Σ V:
 * y_0 = Re Σ V x + K_0 u_0,  y_1 = Re Σ a V x + K_1 u_0 + K_0 u_1,  x = a² x + a u_0 + u_1. */
__global__ static void __launch_bounds__(FEATURES, 4) make_outputs(layer y)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
    if (at.h >= y.E) return;
    for (int m = 0; m < y.modes; m += MODES) {
        small a[MODES], a2[MODES], v[MODES], av[MODES], x[MODES];
        read_modes(y, y.powers, 0, m, at.h, a);
        read_modes(y, y.powers, 1, m, at.h, a2);
        for (int pass = 0; pass < y.channels * y.directions; pass++) {
            const int d = pass % y.directions, channel = pass / y.directions, first = m == 0 && d == 0;
            const int64_t i_out = channel * y.E + at.h;
            const walk w = along(y, at, d, 0);
            column in = column_of(y.u, w, at.h), was = column_of(y.out, w, i_out), to = was;
            const ls_real k0 = seen_with(y, d, channel, m, at.h, a, v) + (first ? y.D[i_out] : 0);
            const ls_real k1 = times_all(a, v, av);
            read_modes(y, y.states, state_row(y, d, at.b, at.part), m, at.h, x);
            each_some(w, [&](auto part, auto shown) {
                constexpr int n = decltype(part)::count, pair = n < 2 ? 1 : 2;
                ls_real put[n], sum[n] = {};
                load<n>(&in, shown, put);
                if (!first) load<n>(&was, shown, sum);
#pragma unroll
                for (int i = 0; i < n; i += pair) {
                    const ls_real one = put[i], other = put[i + pair - 1];
                    sum[i] += k0 * one;
                    if (pair == 2) sum[i + pair - 1] += k1 * one + k0 * other;
#pragma unroll
                    for (int j = 0; j < MODES; j++) {
                        sum[i] = seen(sum[i], v[j], x[j]);
                        if (pair == 2) sum[i + pair - 1] = seen(sum[i + pair - 1], av[j], x[j]);
                        x[j] = pair == 2 ? step(a2[j], x[j], add({other, 0}, one, a[j])) : step(a[j], x[j], {one, 0});
                    }
                }
                store<n>(&to, shown, sum);
            });
        }
    }
}

static ls_status apply(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    if (count_blocks(y, y.chunks) == 0) return LS_OK;
    make_states(p, 0, y.directions, 0, 1);
    LS_LAUNCH(p->queue, make_outputs, count_blocks(y, y.chunks), FEATURES, 0, y);
    return ls_launched(p->queue, "s4d: apply");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* Two positions at a time: du_0 = Re Σ g + K_0 dy_0,  du_1 = Re Σ a g + K_1 dy_0 + K_0 dy_1,  g = a² g + a V dy_0 +
 * V dy_1. What leaves the chunk does so once, with the first channel. with_outputs 0: du += what later ranks want; its
 * channel is -1. */
__global__ static void __launch_bounds__(FEATURES, 4)
    make_input_gradients(layer y, int start, int end, int with_outputs)
{
    const place at = place_of(y, y.chunks, blockIdx.x);
    if (at.h >= y.E) return;
    for (int m = 0; m < y.modes; m += MODES) {
        small a[MODES], a2[MODES];
        read_modes(y, y.powers, 0, m, at.h, a);
        read_modes(y, y.powers, 1, m, at.h, a2);
        for (int pass = 0; pass < (with_outputs ? y.channels : 1) * (end - start); pass++) {
            const int d = start + pass % (end - start), channel = with_outputs ? pass / (end - start) : -1;
            const int skips = with_outputs && m == 0 && d == 0, first = skips && channel == 0;
            const walk w = along(y, at, d, 1);
            column from = column_of(y.dy, w, channel * y.E + at.h), was = column_of(y.du, w, at.h), to = was;
            small v[MODES] = {}, av[MODES], g[MODES] = {};
            ls_real k0 = skips ? y.D[channel * y.E + at.h] : 0;
            if (channel >= 0) k0 += seen_with(y, d, channel, m, at.h, a, v);
            if (channel <= 0) read_modes(y, y.grads, state_row(y, d, at.b, at.part), m, at.h, g);
            const ls_real k1 = times_all(a, v, av);
            each_some(w, [&](auto part, auto shown) {
                constexpr int n = decltype(part)::count, pair = n < 2 ? 1 : 2;
                ls_real want[n] = {}, sum[n] = {};
                if (channel >= 0) load<n>(&from, shown, want);
                if (!first) load<n>(&was, shown, sum);
#pragma unroll
                for (int i = 0; i < n; i += pair) {
                    const ls_real one = want[i], other = want[i + pair - 1];
                    sum[i] += k0 * one;
                    if (pair == 2) sum[i + pair - 1] += k1 * one + k0 * other;
#pragma unroll
                    for (int j = 0; j < MODES; j++) {
                        sum[i] += g[j].re;
                        if (pair == 2) sum[i + pair - 1] = seen(sum[i + pair - 1], a[j], g[j]);
                        g[j] = pair == 2 ? step(a2[j], g[j], add(add({0, 0}, one, av[j]), other, v[j]))
                                         : step(a[j], g[j], add({0, 0}, one, v[j]));
                    }
                }
                store<n>(&to, shown, sum);
            });
        }
    }
}

/* Chunks at .. hi, and one channel of their outputs (-1: no outputs) for modes m ..: Σ dy x, Σ dy z and Σ dy u go to
 * sums, γ' z is added to owed. a and W meet them where all are double: what is left of it all may be a small part. */
__device__ static void pass_strip(const layer &y, place at, int64_t hi, int direction, int channel, int m, number *owed,
                                  number *sums)
{
    small a[MODES];
    number all_x[MODES] = {}, all_z[MODES] = {};
    double dskip = 0;
    read_modes(y, y.powers, 0, m, at.h, a);
    for (; at.part < hi; at.part++) {
        const walk w = along(y, at, direction, 0);
        const int64_t row = state_row(y, direction, at.b, at.part);
        column in = column_of(y.u, w, at.h), out = column_of(y.dy, w, channel * y.E + at.h);
        small x[MODES], z[MODES] = {}, met_x[MODES] = {}, met_z[MODES] = {}, after[MODES] = {};
        read_modes(y, y.states, row, m, at.h, x);
        each_some(w, [&](auto part, auto shown) {
            constexpr int n = decltype(part)::count;
            ls_real put[n], want[n] = {}, product = 0;
            load<n>(&in, shown, put);
            if (channel >= 0) load<n>(&out, shown, want);
#pragma unroll
            for (int i = 0; i < n; i++) {
                product += want[i] * put[i];
#pragma unroll
                for (int j = 0; j < MODES; j++) {
                    met_x[j] = add(met_x[j], want[i], x[j]);
                    met_z[j] = add(met_z[j], want[i], z[j]);
                    z[j] = step(a[j], z[j], x[j]);
                    x[j] = step(a[j], x[j], {put[i], 0});
                }
            }
            dskip += (double)product;
            if (n < AHEAD) return;
            small lost[MODES];
            read_modes(y, y.powers, LOST, m, at.h, lost);
#pragma unroll
            for (int j = 0; j < MODES; j++) {
                z[j] = step(lost[j], z[j], z[j]);
                x[j] = step(lost[j], x[j], x[j]);
            }
        });
        if (channel <= 0) read_modes(y, y.grads, row, m, at.h, after); /* it leaves once */
#pragma unroll
        for (int i = 0; i < MODES; i++) {
            all_x[i] = plus(all_x[i], wide(met_x[i]));
            all_z[i] = plus(all_z[i], wide(met_z[i]));
            owed[i] = plus(owed[i], wide(step(after[i], z[i], {0, 0})));
        }
    }
    if (channel < 0) return;
    const int64_t row = 2 * (direction * y.channels + channel);
    for (int i = 0; i < MODES && m + i < y.modes; i++) {
        sums[in_table(y, row, m + i, at.h)] = all_x[i];
        sums[in_table(y, row + 1, m + i, at.h)] = all_z[i];
    }
    if (m == 0 && direction == FROM_LEFT) sums[row_of_skips(y) + channel * y.E + at.h] = {dskip, 0};
}

/* A thread for each strip of some chunks, feature, and MODES modes of a direction; those of a strip are neighbouring
 * blocks, since they read the same. */
__global__ static void __launch_bounds__(FEATURES, 3)
    sum_strips(layer y, int first, int end, int with_outputs, int64_t chunks)
{
    const unsigned passes = (unsigned)((y.modes + MODES - 1) / MODES), all = passes * (unsigned)(end - first);
    const int direction = first + (int)(blockIdx.x % all / passes), m = (int)(blockIdx.x % passes) * MODES;
    const place strip = place_of(y, y.strips, blockIdx.x / all), at = {strip.b, strip.part * chunks, strip.h};
    if (strip.h >= y.E) return;
    const int64_t hi = ls_min(at.part + chunks, y.chunks);
    number owed[MODES] = {}, *sums = y.strip + (1 + strip.b * y.strips + strip.part) * y.sums * y.E;
    for (int c = with_outputs ? 0 : -1; c < (with_outputs ? y.channels : 0); c++)
        pass_strip(y, at, hi, direction, c, m, owed, sums);
#pragma unroll
    for (int j = 0; j < MODES; j++)
        if (m + j < y.modes) sums[in_table(y, row_of_owed(y, direction), m + j, at.h)] = owed[j];
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
__global__ static void settle(layer y, ls_real *dC, ls_real *dD)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i % y.E;
        const int m = (int)(i / y.E);
        const int64_t at = h * y.modes + m;
        const number beta = y.beta[at], w = frequency(y, h, m), a = power_of(y.lambda[at], 1);
        number dbeta = {0, 0}, slope = {0, 0};
        for (int d = 0; d < y.directions; d++) {
            slope = plus(slope, y.strip[in_table(y, row_of_owed(y, d), m, h)]);
            for (int c = 0; c < y.channels; c++) {
                const number of_c = times(2, c_of(y, d, c, h, m)), *skip = y.strip + row_of_skips(y) + c * y.E + h;
                number x = y.strip[in_table(y, 2 * (d * y.channels + c), m, h)];
                number z = y.strip[in_table(y, 2 * (d * y.channels + c) + 1, m, h)];
                if (d == FROM_LEFT) z = plus(times(a, z), x), x = plus(times(a, x), *skip); /* as they are seen */
                const number dc = times(2, times(beta, x));
                dbeta = plus(dbeta, times(of_c, x));
                slope = plus(slope, times(times(beta, of_c), z));
                dC[in_c(y, d, c, h, m)] += (ls_real)dc.re;
                dC[in_c(y, d, c, h, m) + 1] -= (ls_real)dc.im;
            }
        }
        const number through = over(dbeta, w);
        y.dlambda[at] = times(a, plus(slope, through));
        y.dw[at] = times(-1, times(through, beta));
        for (int c = 0; m == 0 && c < y.channels; c++)
            dD[c * y.E + h] += (ls_real)y.strip[row_of_skips(y) + c * y.E + h].re;
    }
}

/* Of a state that goes on to other ranks. */
__global__ static void add_slopes(layer y, int direction)
{
    LS_EACH(i, y.E * y.modes)
    {
        const int64_t h = i / y.modes, m = i % y.modes;
        const number slope = y.strip[in_table(y, row_of_owed(y, direction), (int)m, h)];
        y.dlambda[i] = plus(y.dlambda[i], times(power_of(y.lambda[i], 1), slope));
    }
}

/* du, and the sums of all strips, of directions first .. end. */
static void turn_back(ls_pass *p, int first, int end, int with_outputs)
{
    const layer y = layer_of(p);
    const int blocks = count_blocks(y, y.strips) * (end - first) * ((y.modes + MODES - 1) / MODES);
    if (blocks > 0) {
        LS_LAUNCH(p->queue, make_input_gradients, count_blocks(y, y.chunks), FEATURES, 0, y, first, end, with_outputs);
        LS_LAUNCH(p->queue, sum_strips, blocks, FEATURES, 0, y, first, end, with_outputs, strip_chunks(p));
    }
    LS_LAUNCH(p->queue, add_strips, (int)((y.sums * y.E + LS_WARP - 1) / LS_WARP), (int)SLICES * LS_WARP, 0,
              y.B * y.strips, y.sums * y.E, y.strip);
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    (void)phase;
    const layer y = layer_of(p);
    for (int back = 0; back < 2; back++) make_states(p, 0, y.directions, back, 1);
    turn_back(p, 0, y.directions, 1);
    LS_LAUNCH(p->queue, settle, ls_blocks(y.E * y.modes, 128), 128, 0, y, dparam(p, C_), dparam(p, D_));
    return ls_launched(p->queue, "s4d: apply backward");
}

/* The states that entered the chunks are there, from apply's backward. */
static ls_status ends_backward(ls_pass *p, int phase)
{
    const layer y = layer_of(p);
    const int d = direction_of(phase);
    if (count_blocks(y, y.chunks) == 0) return LS_OK;
    make_states(p, d, d + 1, 1, 0);
    turn_back(p, d, d + 1, 0);
    LS_LAUNCH(p->queue, add_slopes, ls_blocks(y.E * y.modes, 128), 128, 0, y, d);
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
