/* The passes over rows are those of slots.cu, the landmarks' sums those of segments.cu; here is what is made of
 * landmarks, elementwise or one warp to a slot, for all (b,h) at once. The learned maps are products in double of all
 * landmarks at once, their gradients sums over all of them. */
#include "cuda.h"
#include "rng_inline.h"
#include "segments_cuda.h"
#include "slots_cuda.h"

extern "C" {
#include "dense.h"
#include "lara.h"
extern const ls_cuda_mechanism ls_lara_cuda;
}

enum { MU, OMEGA }; /* saved[], doubles: μ (B*H,c',d), ω (B*H,C,d) */
enum {              /* work[] */
       /* δ ω_r, or a_r less their mean (B*H,C,d); N - c (B*H,C,d); c (B*H,d); constants (B*H,C) */
       KEYS,
       VALUES,
       CENTRE,
       CONSTANT,
       ROWS, /* of each query, backward */
       /* doubles: q̄, k̄ (2,B*H,c',d); a mean of rows (B*H,d); constants before they are centred (B*H,C); a_r (B*H,C,d)
        */
       MEANS,
       MEAN,
       WHOLE,
       SLOT_KEYS,
       /* doubles, backward: dN (B*H,C,d); da or dω (B*H,C,d) and g (B*H,C); dμ + dω, from read to write, and what it is
        * before each map (3,B*H,c',d); maps, and their gradients (2,d,d) */
       DVALUES,
       DKEYS,
       DMU,
       MAPS,
       DMAPS,
       ROOM /* parts of sums; N (B*H,C,d) */
};

/* ------------------------------------------------------------------------------------------------ sizes */

static ls_slot_sizes sizes(const ls_pass *p)
{
    return ls_slot_sizes{p->B, p->H, count(p), p->d};
}

static int is_adaptive(const ls_pass *p)
{
    return p->option[ADAPTIVE] != 0;
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t d = p->d, G = p->B * p->H, R = count(p), c = landmarks(p), back = p->backward;
    const int64_t sums = ls_slots_room(sizes(p), ls_max(p->T, p->S), p->backward);
    const int64_t parts = ls_max(ls_landmark_room(p, landmarks_of(p)), sums);
    p->saved[MU] = ls_take_doubles(saved, G * c * d);
    p->saved[OMEGA] = ls_take_doubles(saved, G * R * d);
    p->work[KEYS] = ls_take(work, G * R * d);
    p->work[VALUES] = ls_take(work, G * R * d);
    p->work[CENTRE] = ls_take(work, G * d);
    p->work[CONSTANT] = ls_take(work, G * R);
    p->work[ROWS] = ls_take(work, back * p->T * ls_slots_row_reals(sizes(p)));
    p->work[MEANS] = ls_take_doubles(work, 2 * G * c * d);
    p->work[MEAN] = ls_take_doubles(work, ls_max(1, G) * d);
    p->work[WHOLE] = ls_take_doubles(work, G * R);
    p->work[SLOT_KEYS] = ls_take_doubles(work, G * R * d);
    p->work[DVALUES] = ls_take_doubles(work, back * G * R * d);
    p->work[DKEYS] = ls_take_doubles(work, back * G * R * (d + 1));
    p->work[DMU] = ls_take_doubles(work, back * (1 + 2 * is_adaptive(p)) * G * c * d);
    p->work[MAPS] = ls_take_doubles(work, is_adaptive(p) * 2 * d * d);
    p->work[DMAPS] = ls_take_doubles(work, back * is_adaptive(p) * 2 * d * d);
    p->work[ROOM] = ls_take_doubles(work, ls_max(parts, G * R * d));
}

static ls_slot_rows rows_of(ls_view x, const uint8_t *pad, int64_t n, const ls_real *centre)
{
    return ls_slot_rows{x, pad, n, centre};
}

/* ------------------------------------------------------------------------------------------------ nothing to meet */

/* Without queries or without keys there are no landmarks: no slots, and kernels of no blocks. */
static int is_empty(const ls_pass *p)
{
    return landmarks(p) == 0;
}

static __global__ void clear(int64_t B, int64_t H, int64_t n, int64_t d, ls_view x)
{
    LS_EACH(i, B * H * n * d)
    {
        const int64_t row = i / d, head = row / n;
        ls_row(x, head / H, head % H, row % n)[i % d] = 0;
    }
}

static ls_status clear_rows(const ls_pass *p, ls_view x, int64_t n)
{
    const int64_t reals = p->B * p->H * n * p->d;
    if (reals > 0) LS_LAUNCH(p->queue, clear, ls_blocks(reals, LS_THREADS), LS_THREADS, 0, p->B, p->H, n, p->d, x);
    return ls_launched(p->queue, "lara: nothing to meet");
}

/* Sums of segments, or their gradients: they cross ranks all the same. */
static ls_status clear_sums(const ls_pass *p, ls_real *sums)
{
    const int64_t reals = p->B * p->H * ls_landmark_reals(p, landmarks_of(p));
    ls_dense_cuda.zero(p->queue, (size_t)reals * sizeof *sums, sums);
    return ls_launched(p->queue, "lara: nothing to meet");
}

/* ------------------------------------------------------------------------------------------------ segments */

static ls_status segments(ls_pass *p, int phase)
{
    if (is_empty(p)) return clear_sums(p, p->summary[phase + 1].sent);
    ls_landmark_sums_cuda(p, landmarks_of(p), ls_doubles(p->work[ROOM]), p->summary[phase + 1].sent);
    return ls_launched(p->queue, "lara: segments");
}

static ls_status segments_backward(ls_pass *p, int phase)
{
    if (is_empty(p)) return LS_OK;
    ls_landmark_spread_cuda(p, landmarks_of(p), p->summary[phase + 1].dsent);
    return ls_launched(p->queue, "lara: backward of segments");
}

/* ------------------------------------------------------------------------------------------------ landmarks */

/* MEANS: q̄ (which = 0), k̄ (1), before their maps. */
static double *mean_of(const ls_pass *p, int which)
{
    return ls_doubles(p->work[MEANS]) + which * p->B * p->H * landmarks(p) * p->d;
}

/* MEANS, and CENTRE = the values' reference. `phase`: the one before which the sums were reduced. */
static void load_sums(const ls_pass *p, int phase)
{
    ls_landmark_means_cuda(p, landmarks_of(p), p->summary[phase].got, mean_of(p, 0), p->work[CENTRE]);
}

/* y (2,n): both, in double. */
static __global__ void widen(int64_t n, const ls_real *x0, const ls_real *x1, double *y)
{
    LS_EACH(i, 2 * n) y[i] = (double)(i < n ? x0[i] : x1[i - n]);
}

/* MAPS: the weights of both maps. */
static double *load_maps(const ls_pass *p)
{
    const int64_t n = p->d * p->d;
    double *maps = ls_doubles(p->work[MAPS]);
    LS_LAUNCH(p->queue, widen, ls_blocks(2 * n, LS_THREADS), LS_THREADS, 0, n, p->params + p->param[Q_WEIGHT].offset,
              p->params + p->param[K_WEIGHT].offset, maps);
    return maps;
}

/* How ω comes from μ; biases NULL: μ = q̄ + k̄, otherwise they are added to what the maps have made. */
typedef struct noise {
    const ls_real *q_bias, *k_bias, *given;
    int drawn;
    uint64_t seed, sample;
    uint32_t stream;
} noise;

static __global__ void make_omega(ls_slot_sizes s, int64_t c, noise x, const double *q, const double *k, double *mu,
                                  double *omega)
{
    const int64_t n = c * s.d;
    LS_EACH(i, s.B * s.H * n)
    {
        const int64_t g = i / n, at = i % n, e = i % s.d, b = g / s.H, index = g % s.H * n + at;
        const double u = x.q_bias == NULL ? q[i] + k[i] : mu[i] + (double)x.q_bias[e] + (double)x.k_bias[e];
        double *to = omega + g * s.R * s.d + at, y = 0;
        if (x.given != NULL)
            y = (double)x.given[b * s.H * n + index];
        else if (x.drawn)
            y = ls_normal_inline(x.seed, x.stream, (uint32_t)(x.sample + (uint64_t)b), (uint64_t)index);
        mu[i] = u;
        to[0] = u + y;
        if (s.R > c) to[n] = u - y;
    }
}

/* From MEANS, μ and ω of every (b,h), the same on all ranks. */
static void make_landmarks(const ls_pass *p)
{
    const int64_t c = landmarks(p), d = p->d, rows = p->B * p->H * c;
    double *mu = ls_doubles(p->saved[MU]);
    noise x = {NULL, NULL, p->given_noise, is_noisy(p), p->seed, p->sample, p->stream * 65536u};
    if (is_adaptive(p)) {
        const double *maps = load_maps(p);
        for (int which = 0; which < 2; which++)
            ls_gemm_batch_double(p->queue, 0, 1, rows, d, d, 1, mean_of(p, which), d, 0, maps + which * d * d, d, 0,
                                 which, mu, d, 0, 1);
        x.q_bias = p->params + p->param[Q_BIAS].offset;
        x.k_bias = p->params + p->param[K_BIAS].offset;
    }
    LS_LAUNCH(p->queue, make_omega, ls_blocks(rows * d, LS_THREADS), LS_THREADS, 0, sizes(p), c, x,
              (const double *)mean_of(p, 0), (const double *)mean_of(p, 1), mu, ls_doubles(p->saved[OMEGA]));
}

/* KEYS = δ ω. */
static void load_omega(const ls_pass *p)
{
    ls_slots_round_cuda(p->queue, p->B * p->H * count(p) * p->d, p->scale, ls_doubles(p->saved[OMEGA]), p->work[KEYS]);
}

namespace
{
typedef struct gradients {
    ls_real *q_weight, *k_weight, *q_bias, *k_bias;
} gradients;
} // namespace

/* dmaps (2,d,d), and rows times a mean of them (d) to both biases. */
static __global__ void add_gradients(int64_t d, double rows, const double *dmaps, const double *mean, gradients to)
{
    const int64_t n = d * d;
    LS_EACH(i, 2 * (n + d))
    {
        const int which = i >= n + d;
        const int64_t at = i - which * (n + d);
        if (at < n)
            (which ? to.k_weight : to.q_weight)[at] += (ls_real)dmaps[which * n + at];
        else
            (which ? to.k_bias : to.q_bias)[at - n] += (ls_real)(rows * mean[at - n]);
    }
}

/* Of y = x Wᵀ + bias, for both maps, whose y add up: dx = dy W; dW = dyᵀ x, dbias = Σ dy, over the landmarks of all
 * (b,h). Returns dx (2,rows,d). */
static const double *maps_backward(const ls_pass *p, const double *dy)
{
    const int64_t d = p->d, rows = p->B * p->H * landmarks(p);
    double *dx = ls_doubles(p->work[DMU]) + rows * d, *dmaps = ls_doubles(p->work[DMAPS]);
    const double *maps = load_maps(p);
    double *bias = ls_doubles(p->work[MEAN]);
    const ls_param_info *of = p->param;
    const gradients to = {p->dparams + of[Q_WEIGHT].offset, p->dparams + of[K_WEIGHT].offset,
                          p->dparams + of[Q_BIAS].offset, p->dparams + of[K_BIAS].offset};
    ls_gemm_batch_double(p->queue, 1, 0, d, d, rows, 1, dy, d, 0, mean_of(p, 0), d, rows * d, 0, dmaps, d, d * d, 2);
    ls_slots_mean_cuda(p->queue, ls_slot_sizes{1, 1, rows, d}, dy, bias);
    LS_LAUNCH(p->queue, add_gradients, ls_blocks(2 * (d + 1) * d, LS_THREADS), LS_THREADS, 0, d, (double)rows,
              (const double *)dmaps, (const double *)bias, to);
    ls_gemm_batch_double(p->queue, 0, 0, rows, d, d, 1, dy, d, 0, maps, d, d * d, 0, dx, d, rows * d, 2);
    return dx;
}

/* DMU becomes the gradient of the sums of segments; the maps get theirs. */
static void landmarks_backward(const ls_pass *p, int phase)
{
    const double *dmean = ls_doubles(p->work[DMU]);
    if (is_adaptive(p)) dmean = maps_backward(p, dmean);
    ls_landmark_means_backward_cuda(p, landmarks_of(p), dmean, is_adaptive(p) ? p->B * p->H * landmarks(p) * p->d : 0,
                                    p->summary[phase].dgot);
}

/* ------------------------------------------------------------------------------------------------ keys write */

static ls_slot_rows keys_of(const ls_pass *p)
{
    return rows_of(p->own.k, p->own.pad, p->S, NULL);
}

static ls_slot_rows values_of(const ls_pass *p)
{
    return rows_of(p->own.v, p->own.pad, p->S, p->work[CENTRE]);
}

static ls_status write(ls_pass *p, int phase)
{
    if (is_empty(p)) return LS_OK;
    load_sums(p, phase);
    make_landmarks(p);
    load_omega(p);
    ls_slots_write_cuda(p->queue, sizes(p), keys_of(p), p->work[KEYS], p->scale / 2, values_of(p),
                        ls_doubles(p->work[ROOM]), p->summary[phase + 1].sent);
    return ls_launched(p->queue, "lara: write");
}

/* DMU += δ dω of the rows of ω that came from it. */
static __global__ void add_domega(ls_slot_sizes s, int64_t c, double scale, const double *domega, double *dmu)
{
    const int64_t n = c * s.d;
    LS_EACH(i, s.B * s.H * n)
    {
        double sum = dmu[i];
        for (int64_t r = i % n; r < s.R * s.d; r += n) sum += scale * domega[i / n * s.R * s.d + r];
        dmu[i] = sum;
    }
}

static ls_status write_backward(ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    const ls_slot_sizes s = sizes(p);
    const int64_t G = p->B * p->H, d = p->d, c = landmarks(p);
    const ls_summary *out = &p->summary[phase + 1];
    if (is_empty(p)) {
        LS_TRY(clear_rows(p, p->own.dk, p->S));
        LS_TRY(clear_rows(p, p->own.dv, p->S));
        return clear_sums(p, p->summary[phase].dgot);
    }
    double *domega = ls_doubles(p->work[DKEYS]), *room = ls_doubles(p->work[ROOM]);
    load_omega(p);
    load_sums(p, phase);
    ls_slots_constants_cuda(q, s, out->got, out->dsent, room, ls_doubles(p->work[MEAN]), p->work[CENTRE],
                            p->work[CONSTANT]);
    ls_slots_write_backward_cuda(q, s, keys_of(p), p->work[KEYS], p->scale / 2, values_of(p), out->sent, out->got,
                                 out->dsent, p->work[CONSTANT], room, p->own.dk, p->own.dv, domega);
    LS_LAUNCH(q, add_domega, ls_blocks(G * c * d, LS_THREADS), LS_THREADS, 0, s, c, p->scale, (const double *)domega,
              ls_doubles(p->work[DMU]));
    landmarks_backward(p, phase);
    return ls_launched(q, "lara: backward of write");
}

/* ------------------------------------------------------------------------------------------------ queries read */

/* a = δ(μ + ω) */
static __global__ void make_keys(ls_slot_sizes s, int64_t c, double scale, const double *mu, const double *omega,
                                 double *a)
{
    const int64_t each = s.R * s.d, n = c * s.d;
    LS_EACH(i, s.B * s.H * each) a[i] = scale * (mu[i / each * n + i % each % n] + omega[i]);
}

/* One warp to a slot: its constant, ℓ - δ(ω - μ/2)·μ. */
static __global__ void make_constants(ls_slot_sizes s, int64_t c, double scale, const double *mu, const double *omega,
                                      const ls_real *element, double *constant)
{
    const int64_t slots = s.B * s.H * s.R, warps = (int64_t)gridDim.x * blockDim.x / LS_WARP;
    const int lane = threadIdx.x % LS_WARP;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LS_WARP; i < slots; i += warps) {
        const double *u = mu + (i / s.R * c + i % s.R % c) * s.d, *w = omega + i * s.d;
        const ls_real *x = element + i * (s.d + 2);
        double dot = 0;
        for (int64_t e = lane; e < s.d; e += LS_WARP) dot += (w[e] - u[e] / 2) * u[e];
        dot = ls_warp_sum(dot);
        if (lane == 0) constant[i] = (x[1] > 0 ? (double)x[0] + log((double)x[1]) : 0) - scale * dot;
    }
}

/* KEYS = a less its mean over the slots, VALUES = N - c, CENTRE = c, CONSTANT less its mean. */
static void load_slots(const ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    const ls_slot_sizes s = sizes(p), scalars = {s.B, s.H, s.R, 1};
    const int64_t slots = s.B * s.H * s.R, c = landmarks(p);
    const double *mu = ls_doubles(p->saved[MU]), *omega = ls_doubles(p->saved[OMEGA]);
    double *a = ls_doubles(p->work[SLOT_KEYS]);
    double *values = ls_doubles(p->work[ROOM]), *whole = ls_doubles(p->work[WHOLE]);
    load_sums(p, phase - 1);
    LS_LAUNCH(q, make_keys, ls_blocks(slots * s.d, LS_THREADS), LS_THREADS, 0, s, c, p->scale, mu, omega, a);
    ls_slots_centre_cuda(q, s, 1, a, p->work[KEYS], NULL, 0);
    ls_slots_values_cuda(q, s, p->summary[phase].got, NULL, values);
    ls_slots_centre_cuda(q, s, 1, values, p->work[VALUES], p->work[CENTRE], 1);
    LS_LAUNCH(q, make_constants, ls_blocks(slots * LS_WARP, LS_THREADS), LS_THREADS, 0, s, c, p->scale, mu, omega,
              (const ls_real *)p->summary[phase].got, whole);
    ls_slots_centre_cuda(q, scalars, 1, whole, p->work[CONSTANT], NULL, 0);
}

static ls_slot_rows queries_of(const ls_pass *p)
{
    return rows_of(p->q, p->pad_q, p->T, NULL);
}

static ls_status read(ls_pass *p, int phase)
{
    if (is_empty(p)) return clear_rows(p, p->out, p->T);
    load_slots(p, phase);
    ls_slots_read_cuda(p->queue, sizes(p), queries_of(p), p->work[KEYS], p->work[CONSTANT], p->work[VALUES],
                       p->work[CENTRE], p->out);
    return ls_launched(p->queue, "lara: read");
}

/* The gradient of (m; s, x), element by element: 0, g / s, dN / s. */
static __global__ void share_slots(int64_t slots, int64_t d, const double *dvalues, const double *g,
                                   const ls_real *element, ls_real *to)
{
    const int64_t stride = d + 2;
    LS_EACH(i, slots * stride)
    {
        const int64_t slot = i / stride, e = i % stride;
        const double s = (double)element[slot * stride + 1], inverse = s > 0 ? 1 / s : 0;
        to[i] = e == 0 ? 0 : (ls_real)(inverse * (e == 1 ? g[slot] : dvalues[slot * d + e - 2]));
    }
}

/* dμ + dω = δ Σ (2 da_r - g_r ω_r) over the slots of a landmark */
static __global__ void begin_dmu(ls_slot_sizes s, int64_t c, double scale, const double *da, const double *g,
                                 const double *omega, double *dmu)
{
    LS_EACH(i, s.B * s.H * c * s.d)
    {
        const int64_t head = i / s.d / c, e = i % s.d;
        double sum = 0;
        for (int64_t r = i / s.d % c; r < s.R; r += c) {
            const int64_t slot = head * s.R + r;
            sum += 2 * da[slot * s.d + e] - g[slot] * omega[slot * s.d + e];
        }
        dmu[i] = scale * sum;
    }
}

static ls_status read_backward(ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    if (is_empty(p)) return clear_rows(p, p->dq, p->T);
    const ls_slot_sizes s = sizes(p);
    const int64_t R = s.R, d = p->d, c = landmarks(p), G = p->B * p->H;
    double *dvalues = ls_doubles(p->work[DVALUES]), *da = ls_doubles(p->work[DKEYS]), *sum = da + G * R * d;
    load_slots(p, phase);
    ls_slots_read_backward_cuda(q, s, queries_of(p), p->work[KEYS], p->work[CONSTANT], p->work[VALUES],
                                rows_of(p->dout, p->pad_q, p->T, NULL), p->work[ROWS], ls_doubles(p->work[ROOM]), p->dq,
                                dvalues, da, sum);
    LS_LAUNCH(q, share_slots, ls_blocks(G * R * (d + 2), LS_THREADS), LS_THREADS, 0, G * R, d, (const double *)dvalues,
              (const double *)sum, (const ls_real *)p->summary[phase].got, p->summary[phase].dgot);
    LS_LAUNCH(q, begin_dmu, ls_blocks(G * c * d, LS_THREADS), LS_THREADS, 0, s, c, p->scale, (const double *)da,
              (const double *)sum, (const double *)ls_doubles(p->saved[OMEGA]), ls_doubles(p->work[DMU]));
    return ls_launched(q, "lara: backward of read");
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_cuda_kernel kernels[] = {
    {"segments", segments, segments_backward},
    {"write", write, write_backward},
    {"read", read, read_backward},
    {NULL, NULL, NULL},
};

const ls_cuda_mechanism ls_lara_cuda = {.plan = plan, .kernel = kernels, .host_bytes = NULL, .takes_narrow = NULL};
