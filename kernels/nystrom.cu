/* The passes over rows are those of slots.cu, the landmarks' sums those of segments.cu, the inverses those of pinv.cu;
 * here is what stands between them, elementwise or one block to a matrix, for all (b,h) at once. Inverses are made for
 * as many (b,h) at a time as MATRICES holds. A convolution is made 8 rows and a feature to a thread.
 *
 * Nothing of work[] but what is said passes from one phase to another: a step reads what its source has written. */
#include "cuda.h"
#include "pinv_cuda.h"
#include "segments_cuda.h"
#include "slots_cuda.h"
#include "softmax_cuda.h"

extern "C" {
#include "nystrom.h"
extern const ls_cuda_mechanism ls_nystrom_cuda;
}

enum { VALUES_OUT }; /* saved[]: W (B*H,m,d), doubles */
enum {               /* work[]; a short sequence has softmax's and ROOM */
       /* σ q̄_r, or σ k̄_r less their mean (B*H,m,d); W - c (B*H,m,d); c (B*H,d); the mean of k̄ (B*H,d); constants
          (B*H,m) */
       KEYS,
       VALUES,
       CENTRE,
       KEY_CENTRE,
       CONSTANT,
       ROWS, /* of each query, backward */
       /* doubles: q̄, k̄ (2,B*H,m,d); a mean of rows (B*H,d); dW or d(σ q̄) (B*H,m,d); gradients of q̄, k̄, from read to
        * write (2,B*H,m,d); F2 and its gradient (B*H,m,m); column sums of F2 (B*H,m), then peaks, then dpeaks */
       MEANS,
       MEAN,
       STATE,
       DMEANS,
       F2,
       DF2,
       PEAKS,
       MATRICES, /* of the inverses: scratch, Z_0 .. Z_iterations, dZ */
       ROOM      /* parts of sums; V and dV (2,B*H,m,d) */
};
enum { FILTER_ROWS = 64, TAPS = 32 };                /* of a block that makes the filter's gradient */
static const int64_t MATRIX_ROOM = (int64_t)1 << 24; /* doubles of MATRICES, if that is enough for one (b,h) */

/* ------------------------------------------------------------------------------------------------ sizes */

static ls_slot_sizes sizes(const ls_pass *p)
{
    return ls_slot_sizes{p->B, p->H, landmarks(p), p->d};
}

static int iterations(const ls_pass *p)
{
    return (int)p->option[PINV_ITERS];
}

static int64_t matrix_room(const ls_pass *p)
{
    return ls_pinv_scratch_cuda(landmarks(p)) + (iterations(p) + 2) * landmarks(p) * landmarks(p);
}

/* (b,h) whose inverses are made at a time. */
static int64_t inverses_at_once(const ls_pass *p)
{
    return ls_max(1, ls_min(p->B * p->H, MATRIX_ROOM / matrix_room(p)));
}

/* Parts of the rows of a (b,h), each of which gives a gradient of the filter. */
static int64_t filter_parts(const ls_pass *p)
{
    const int64_t blocks = ls_max(1, p->B * p->H * ((kernel(p) + TAPS - 1) / TAPS));
    return ls_max(1, ls_min((p->T + FILTER_ROWS - 1) / FILTER_ROWS, 1024 / blocks));
}

static int64_t room_of_filter(const ls_pass *p)
{
    return p->backward * p->B * filter_parts(p) * p->H * kernel(p);
}

static void plan_long(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t d = p->d, G = p->B * p->H, m = landmarks(p), back = p->backward, rows = ls_max(p->T, p->S);
    p->saved[VALUES_OUT] = ls_take_doubles(saved, G * m * d);
    p->work[KEYS] = ls_take(work, G * m * d);
    p->work[VALUES] = ls_take(work, G * m * d);
    p->work[CENTRE] = ls_take(work, G * d);
    p->work[KEY_CENTRE] = ls_take(work, G * d);
    p->work[CONSTANT] = ls_take(work, G * m);
    p->work[ROWS] = ls_take(work, back * p->T * ls_slots_row_reals(sizes(p)));
    p->work[MEANS] = ls_take_doubles(work, 2 * G * m * d);
    p->work[MEAN] = ls_take_doubles(work, G * d);
    p->work[STATE] = ls_take_doubles(work, back * G * m * d);
    p->work[DMEANS] = ls_take_doubles(work, back * 2 * G * m * d);
    p->work[F2] = ls_take_doubles(work, G * m * m);
    p->work[DF2] = ls_take_doubles(work, back * G * m * m);
    p->work[PEAKS] = ls_take_doubles(work, G * m + 2 * G);
    p->work[MATRICES] = ls_take_doubles(work, inverses_at_once(p) * matrix_room(p));
    const int64_t sums = ls_max(ls_landmark_room(p, landmarks_of(p)), ls_slots_room(sizes(p), rows, p->backward));
    p->work[ROOM] = ls_take_doubles(work, ls_max(ls_max(sums, 2 * G * m * d), room_of_filter(p)));
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    if (is_long(p)) {
        plan_long(p, saved, work);
        return;
    }
    ls_softmax_plan_cuda(p, saved, work);
    p->saved[ALONE] = ls_take(saved, alone_reals(p));
    p->work[ROOM] = ls_take_doubles(work, room_of_filter(p));
}

static ls_slot_rows rows_of(ls_view x, const uint8_t *pad, int64_t n, const ls_real *centre)
{
    return ls_slot_rows{x, pad, n, centre};
}

/* ------------------------------------------------------------------------------------------------ convolution */

/* to_i = Σ_k w_k from_{i + first + k} over the rows that exist, with `reversed` w_{K-1-k}; w (H,K). */
typedef struct filter {
    int64_t H, d, K;
    const ls_real *w;
    int reversed;
    int64_t first;
} filter;

enum { WINDOW = 8, FEATURES = 32, GROUPS = 4 }; /* rows of a thread; features, groups of rows of a block */

/* A thread makes WINDOW rows of one feature: each row of `from` is read once for all of them, while the filter moves
 * along in registers. add: what stands in unpadded rows of `to` grows; or all of it is overwritten, padded rows with 0.
 */
static __global__ void convolve(filter f, ls_slot_rows from, ls_slot_rows to, int add)
{
    const int64_t tiles = (f.d + FEATURES - 1) / FEATURES, parts = (to.n + WINDOW * GROUPS - 1) / (WINDOW * GROUPS);
    const int64_t g = blockIdx.x / tiles / parts, b = g / f.H, h = g % f.H;
    const int64_t e = blockIdx.x % tiles * FEATURES + threadIdx.x % FEATURES;
    const int64_t t = (blockIdx.x / tiles % parts * GROUPS + threadIdx.x / FEATURES) * WINDOW;
    ls_real sum[WINDOW], w[WINDOW];
    if (e >= f.d) return;
#pragma unroll
    for (int i = 0; i < WINDOW; i++) sum[i] = w[i] = 0;
    for (int64_t k = 0; k < f.K + WINDOW - 1; k++) {
        const int64_t row = t + f.first + k;
#pragma unroll
        for (int i = WINDOW - 1; i > 0; i--) w[i] = w[i - 1];
        w[0] = k < f.K ? f.w[h * f.K + (f.reversed ? f.K - 1 - k : k)] : 0;
        if (row < 0 || row >= from.n || ls_is_padded(from.pad, b * from.n + row)) continue;
        const ls_real x = ls_row(from.x, b, h, row)[e];
#pragma unroll
        for (int i = 0; i < WINDOW; i++) sum[i] += w[i] * x;
    }
#pragma unroll
    for (int i = 0; i < WINDOW; i++) {
        if (t + i >= to.n) continue;
        const int padded = ls_is_padded(to.pad, b * to.n + t + i);
        ls_real *y = ls_row(to.x, b, h, t + i) + e;
        if (!add)
            *y = padded ? 0 : sum[i];
        else if (!padded)
            *y += sum[i];
    }
}

static filter filter_of(const ls_pass *p)
{
    return filter{p->H,      p->d,
                  kernel(p), p->params + p->param[CONV_WEIGHT].offset,
                  0,         p->query_span[0].lo - kernel(p) / 2 - p->halo.span[0].lo};
}

static void start_convolve(const ls_pass *p, filter f, ls_slot_rows from, ls_slot_rows to, int add)
{
    const int64_t tiles = (p->d + FEATURES - 1) / FEATURES, parts = (to.n + WINDOW * GROUPS - 1) / (WINDOW * GROUPS);
    if (p->B * p->H * parts > 0)
        LS_LAUNCH(p->queue, convolve, (int)(p->B * p->H * parts * tiles), FEATURES * GROUPS, 0, f, from, to, add);
}

/* out += conv(v) */
static void add_conv(const ls_pass *p)
{
    start_convolve(p, filter_of(p), rows_of(p->halo.v, NULL, p->halo.n, NULL), rows_of(p->out, p->pad_q, p->T, NULL),
                   1);
}

/* parts (B, parts, H, K): dw_k = Σ do_t·v_{t + first + k} over some rows of one b, for TAPS values of k; 4 threads to a
 * k, each for a quarter of the rows that are in shared memory. */
static __global__ void filter_gradients(filter f, ls_slot_rows dout, ls_slot_rows v, int64_t parts, double *to)
{
    constexpr int QUARTER = FILTER_ROWS / 4, PITCH = FEATURES + 1;
    __shared__ ls_real y[FILTER_ROWS * PITCH], x[(FILTER_ROWS + TAPS - 1) * PITCH];
    __shared__ double quarter[4 * TAPS];
    const int64_t taps = (f.K + TAPS - 1) / TAPS, k = blockIdx.x % taps * TAPS, part = blockIdx.x / taps % parts;
    const int64_t g = blockIdx.x / taps / parts, b = g / f.H, h = g % f.H;
    const int64_t tiles = (dout.n + FILTER_ROWS - 1) / FILTER_ROWS, last = tiles * (part + 1) / parts;
    const int tap = threadIdx.x % TAPS, first = threadIdx.x / TAPS * QUARTER;
    double sum = 0;
    for (int64_t tile = tiles * part / parts; tile < last; tile++)
        for (int64_t e0 = 0; e0 < f.d; e0 += FEATURES) {
            const int64_t t = tile * FILTER_ROWS, from = t + f.first + k, e = e0 + threadIdx.x % FEATURES;
            __syncthreads();
            for (int i = threadIdx.x / FEATURES; i < FILTER_ROWS; i += 4) {
                const int there = e < f.d && t + i < dout.n && !ls_is_padded(dout.pad, b * dout.n + t + i);
                y[i * PITCH + threadIdx.x % FEATURES] = there ? ls_row(dout.x, b, h, t + i)[e] : 0;
            }
            for (int i = threadIdx.x / FEATURES; i < FILTER_ROWS + TAPS - 1; i += 4) {
                const int there = e < f.d && from + i >= 0 && from + i < v.n;
                x[i * PITCH + threadIdx.x % FEATURES] = there ? ls_row(v.x, b, h, from + i)[e] : 0;
            }
            __syncthreads();
            for (int i = first; i < first + QUARTER; i++) {
                ls_real dot = 0;
                for (int j = 0; j < FEATURES; j++) dot += y[i * PITCH + j] * x[(i + tap) * PITCH + j];
                sum += (double)dot;
            }
        }
    quarter[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= TAPS || k + tap >= f.K) return;
    for (int i = 1; i < 4; i++) sum += quarter[i * TAPS + tap];
    to[((b * parts + part) * f.H + h) * f.K + k + tap] = sum;
}

static __global__ void add_filter_gradients(int64_t n, int64_t parts, const double *from, ls_real *dw)
{
    LS_EACH(i, n)
    {
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += from[part * n + i];
        dw[i] += (ls_real)sum;
    }
}

/* Fills the halo's dv; the driver adds it to the owners' dv, which the other phases have written by then. */
static ls_status conv_backward(ls_pass *p, int phase)
{
    (void)phase;
    const int64_t K = kernel(p), parts = filter_parts(p), blocks = p->B * p->H * parts * ((K + TAPS - 1) / TAPS);
    const ls_slot_rows dout = rows_of(p->dout, p->pad_q, p->T, NULL), v = rows_of(p->halo.v, NULL, p->halo.n, NULL);
    const filter f = filter_of(p);
    filter adjoint = f; /* dv_j = Σ_k w_k do_{j - first - k} */
    adjoint.reversed = 1;
    adjoint.first = 1 - K - f.first;
    start_convolve(p, adjoint, dout, rows_of(p->halo.dv, p->halo.pad, p->halo.n, NULL), 0);
    if (blocks == 0) return LS_OK;
    LS_LAUNCH(p->queue, filter_gradients, (int)blocks, 4 * TAPS, 0, f, dout, v, parts, ls_doubles(p->work[ROOM]));
    LS_LAUNCH(p->queue, add_filter_gradients, ls_blocks(p->H * K, LS_THREADS), LS_THREADS, 0, p->H * K, p->B * parts,
              (const double *)ls_doubles(p->work[ROOM]), p->dparams + p->param[CONV_WEIGHT].offset);
    return ls_launched(p->queue, "nystrom: backward of the convolution");
}

/* ------------------------------------------------------------------------------------------------ short sequences */

static __global__ void keep_rows(int64_t n, int64_t H, int64_t T, int64_t d, ls_view out, ls_real *alone)
{
    LS_EACH(i, n)
    {
        const int64_t row = i / d, g = row / T;
        alone[i] = ls_row(out, g / H, g % H, row % T)[i % d];
    }
}

static ls_status finish_short(ls_pass *p, int phase)
{
    if (p->step) return ls_softmax_take_cuda(p, phase);
    LS_TRY(ls_softmax_finish_cuda(p, phase));
    const int64_t n = alone_reals(p);
    if (n > 0)
        LS_LAUNCH(p->queue, keep_rows, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, p->H, p->T, p->d, p->out,
                  p->saved[ALONE]);
    if (has_conv(p)) add_conv(p);
    return ls_launched(p->queue, "nystrom: convolution");
}

static ls_status finish_short_backward(ls_pass *p, int phase)
{
    const ls_view out = p->out;
    p->out = output_alone(p);
    const ls_status status = ls_softmax_finish_backward_cuda(p, phase);
    p->out = out;
    return status;
}

/* ------------------------------------------------------------------------------------------------ segments */

static ls_status segments(ls_pass *p, int phase)
{
    ls_landmark_sums_cuda(p, landmarks_of(p), ls_doubles(p->work[ROOM]), p->summary[phase + 1].sent);
    return ls_launched(p->queue, "nystrom: segments");
}

static ls_status segments_backward(ls_pass *p, int phase)
{
    ls_landmark_spread_cuda(p, landmarks_of(p), p->summary[phase + 1].dsent);
    return ls_launched(p->queue, "nystrom: backward of segments");
}

/* MEANS: q̄ (which = 0), k̄ (1). */
static double *mean_of(const ls_pass *p, int which)
{
    return ls_doubles(p->work[MEANS]) + which * p->B * p->H * landmarks(p) * p->d;
}

/* MEANS, and CENTRE = the values' reference. `phase`: the one before which the sums were reduced. */
static void load_sums(const ls_pass *p, int phase)
{
    ls_landmark_means_cuda(p, landmarks_of(p), p->summary[phase].got, mean_of(p, 0), p->work[CENTRE]);
}

/* ------------------------------------------------------------------------------------------------ keys write */

/* KEYS = σ q̄, KEY_CENTRE = the mean of k̄, CENTRE = the values' reference. */
static void load_queries(const ls_pass *p, int phase)
{
    const ls_slot_sizes s = sizes(p);
    const int64_t features = s.B * s.H * s.d;
    load_sums(p, phase);
    ls_slots_round_cuda(p->queue, features * s.R, p->scale, mean_of(p, 0), p->work[KEYS]);
    ls_slots_centre_cuda(p->queue, s, 1, mean_of(p, 1), NULL, p->work[KEY_CENTRE], 0);
}

static ls_slot_rows keys_of(const ls_pass *p)
{
    return rows_of(p->own.k, p->own.pad, p->S, p->work[KEY_CENTRE]);
}

static ls_slot_rows values_of(const ls_pass *p)
{
    return rows_of(p->own.v, p->own.pad, p->S, p->work[CENTRE]);
}

static ls_status write(ls_pass *p, int phase)
{
    load_queries(p, phase);
    ls_slots_write_cuda(p->queue, sizes(p), keys_of(p), p->work[KEYS], 0, values_of(p), ls_doubles(p->work[ROOM]),
                        p->summary[phase + 1].sent);
    return ls_launched(p->queue, "nystrom: write");
}

/* dmean += scale dkeys; with one sequence k̄ gets what q̄ has. dmean (2,n): q̄, k̄ */
static __global__ void complete_means(int64_t n, double scale, const double *dkeys, int one_sequence, double *dmean)
{
    LS_EACH(i, n)
    {
        dmean[i] += scale * dkeys[i];
        if (one_sequence) dmean[n + i] += dmean[i];
    }
}

/* Completes DMEANS and sends it to the sums of segments. */
static ls_status write_backward(ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    const ls_landmarks l = landmarks_of(p);
    const ls_slot_sizes s = sizes(p);
    const int64_t n = p->B * p->H * s.R * p->d;
    const ls_summary *out = &p->summary[phase + 1];
    double *dkeys = ls_doubles(p->work[STATE]), *dmean = ls_doubles(p->work[DMEANS]), *room = ls_doubles(p->work[ROOM]);
    load_queries(p, phase);
    ls_slots_constants_cuda(q, s, out->got, out->dsent, room, ls_doubles(p->work[MEAN]), p->work[CENTRE],
                            p->work[CONSTANT]);
    ls_slots_write_backward_cuda(q, s, keys_of(p), p->work[KEYS], 0, values_of(p), out->sent, out->got, out->dsent,
                                 p->work[CONSTANT], room, p->own.dk, p->own.dv, dkeys);
    LS_LAUNCH(q, complete_means, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, p->scale, (const double *)dkeys,
              l.first == 1, dmean);
    ls_landmark_means_backward_cuda(p, l, l.first == 1 ? dmean + n : dmean, n, p->summary[phase].dgot);
    return ls_launched(q, "nystrom: backward of write");
}

/* ------------------------------------------------------------------------------------------------ landmarks */

/* PEAKS: the column sums of each matrix; peaks, one of each matrix; their gradients. */
static double *column_sums(const ls_pass *p)
{
    return ls_doubles(p->work[PEAKS]);
}
static double *peaks(const ls_pass *p)
{
    return column_sums(p) + p->B * p->H * landmarks(p);
}
static double *dpeaks(const ls_pass *p)
{
    return peaks(p) + p->B * p->H;
}

/* One block to a matrix, (m,m) of F: its rows become their softmax. sums: of its columns; peak: the greatest of them.
 */
static __global__ void softmax_rows(int64_t m, double *F, double *sums, double *peak)
{
    __shared__ double scratch[LS_WARP];
    const int64_t g = blockIdx.x;
    double greatest = 0;
    F += g * m * m;
    for (int64_t r = threadIdx.x / LS_WARP; r < m; r += blockDim.x / LS_WARP) {
        double *row = F + r * m, top = -INFINITY, sum = 0;
        LS_EACH_LANE(c, m) top = row[c] > top ? row[c] : top;
        top = ls_warp_max(top);
        LS_EACH_LANE(c, m) sum += row[c] = exp(row[c] - top);
        sum = ls_warp_sum(sum);
        LS_EACH_LANE(c, m) row[c] /= sum;
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < m; c += blockDim.x) {
        double sum = 0;
        for (int64_t r = 0; r < m; r++) sum += F[r * m + c];
        sums[g * m + c] = sum;
        greatest = sum > greatest ? sum : greatest;
    }
    greatest = ls_block_max(greatest, scratch);
    if (threadIdx.x == 0) peak[g] = greatest;
}

/* One block: the greatest of n peaks is everyone's. */
static __global__ void share_peak(int64_t n, double *peak)
{
    __shared__ double scratch[LS_WARP];
    double top = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) top = peak[i] > top ? peak[i] : top;
    top = ls_block_max(top, scratch);
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) peak[i] = top;
}

/* One block to a matrix. Its columns that reach the peak take their share of its gradient, which with `all` is the sum
 * of everyone's; then dF, the gradient of F, becomes that of what F is the softmax of: F (dF - Σ F dF) in each row. */
static __global__ void softmax_rows_backward(int64_t G, int64_t m, int all, const double *F, const double *sums,
                                             const double *peak, const double *dpeak, double *dF)
{
    __shared__ double scratch[LS_WARP];
    const int64_t g = blockIdx.x, from = all ? 0 : g * m, end = all ? G * m : from + m;
    double reaching = 0, gradient = all ? 0 : dpeak[g];
    for (int64_t i = from + threadIdx.x; i < end; i += blockDim.x) reaching += sums[i] >= peak[g];
    reaching = ls_block_sum(reaching, scratch);
    for (int64_t i = 0; all && i < G; i++) gradient += dpeak[i];
    gradient /= reaching;
    sums += g * m;
    for (int64_t r = threadIdx.x / LS_WARP; r < m; r += blockDim.x / LS_WARP) {
        const double *row = F + (g * m + r) * m;
        double *drow = dF + (g * m + r) * m, mean = 0;
        LS_EACH_LANE(c, m)
        {
            if (sums[c] >= peak[g]) drow[c] += gradient;
            mean += row[c] * drow[c];
        }
        mean = ls_warp_sum(mean);
        LS_EACH_LANE(c, m) drow[c] = row[c] * (drow[c] - mean);
    }
}

/* F2 and its peaks, from MEANS. */
static void make_F2(const ls_pass *p)
{
    const int64_t m = landmarks(p), d = p->d, G = p->B * p->H;
    double *F = ls_doubles(p->work[F2]);
    ls_gemm_batch_double(p->queue, 0, 1, m, m, d, p->scale, mean_of(p, 0), d, m * d, mean_of(p, 1), d, m * d, 0, F, m,
                         m * m, G);
    LS_LAUNCH(p->queue, softmax_rows, (int)G, LS_THREADS, 0, m, F, column_sums(p), peaks(p));
    if (p->option[INIT] != 0) LS_LAUNCH(p->queue, share_peak, 1, LS_THREADS, 0, G, peaks(p));
}

/* The inverses of the n matrices from g on, in MATRICES: Z_0 .. are behind the scratch, dZ behind them. */
static double *make_inverses(const ls_pass *p, int64_t g, int64_t n)
{
    const int64_t m = landmarks(p);
    double *scratch = ls_doubles(p->work[MATRICES]), *Z = scratch + n * ls_pinv_scratch_cuda(m);
    ls_pinv_cuda(p->queue, n, m, iterations(p), ls_doubles(p->work[F2]) + g * m * m, peaks(p) + g, Z, scratch);
    return Z;
}

/* V (B*H,m,d), what the slots hold, in ROOM. */
static double *slot_values(const ls_pass *p, int phase)
{
    double *V = ls_doubles(p->work[ROOM]);
    ls_slots_values_cuda(p->queue, sizes(p), p->summary[phase].got, p->work[CENTRE], V);
    return V;
}

/* W = Z V of every (b,h). */
static void solve(const ls_pass *p, int phase)
{
    const int64_t m = landmarks(p), d = p->d, G = p->B * p->H, most = inverses_at_once(p);
    const double *V = slot_values(p, phase);
    make_F2(p);
    for (int64_t g = 0; g < G; g += most) {
        const int64_t n = ls_min(most, G - g);
        const double *Z = make_inverses(p, g, n) + iterations(p) * n * m * m;
        ls_gemm_batch_double(p->queue, 0, 0, m, d, m, 1, Z, m, m * m, V + g * m * d, d, m * d, 0,
                             ls_doubles(p->saved[VALUES_OUT]) + g * m * d, d, m * d, n);
    }
}

/* The gradient of (m; s, x) from dV, V = reference + x / s: s is not asked, what it owes is paid by the keys. */
static __global__ void share_values(int64_t slots, int64_t d, const double *dV, const ls_real *element, ls_real *to)
{
    const int64_t stride = d + 2;
    LS_EACH(i, slots * stride)
    {
        const int64_t slot = i / stride, e = i % stride - 2;
        const double s = (double)element[slot * stride + 1];
        to[i] = e < 0 || s <= 0 ? 0 : (ls_real)(1 / s * dV[slot * d + e]);
    }
}

/* DF2 = the gradient of σ q̄ k̄ᵀ, and that of the slots, from dW (STATE). */
static void solve_backward(const ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    const int64_t m = landmarks(p), d = p->d, G = p->B * p->H, most = inverses_at_once(p), slots = G * m;
    const double *V = slot_values(p, phase), *all_dW = ls_doubles(p->work[STATE]);
    double *all_dV = ls_doubles(p->work[ROOM]) + G * m * d, *dF = ls_doubles(p->work[DF2]);
    make_F2(p);
    for (int64_t g = 0; g < G; g += most) {
        const int64_t n = ls_min(most, G - g);
        const double *dW = all_dW + g * m * d;
        double *Z = make_inverses(p, g, n), *last = Z + iterations(p) * n * m * m, *dZ = last + n * m * m;
        ls_gemm_batch_double(q, 1, 0, m, d, m, 1, last, m, m * m, dW, d, m * d, 0, all_dV + g * m * d, d, m * d, n);
        ls_gemm_batch_double(q, 0, 1, m, m, d, 1, dW, d, m * d, V + g * m * d, d, m * d, 0, dZ, m, m * m, n);
        ls_pinv_backward_cuda(q, n, m, iterations(p), ls_doubles(p->work[F2]) + g * m * m, peaks(p) + g, Z, dZ,
                              dF + g * m * m, dpeaks(p) + g, ls_doubles(p->work[MATRICES]));
    }
    LS_LAUNCH(q, share_values, ls_blocks(slots * (d + 2), LS_THREADS), LS_THREADS, 0, slots, d, (const double *)all_dV,
              p->summary[phase].got, p->summary[phase].dgot);
    LS_LAUNCH(q, softmax_rows_backward, (int)G, LS_THREADS, 0, G, m, p->option[INIT] != 0,
              (const double *)ls_doubles(p->work[F2]), (const double *)column_sums(p), (const double *)peaks(p),
              (const double *)dpeaks(p), dF);
}

/* DMEANS = the gradients of q̄ and k̄ from DF2 and from d(σ k̄), which is where that of k̄ will be. */
static void means_backward(const ls_pass *p)
{
    const int64_t m = landmarks(p), d = p->d, G = p->B * p->H;
    const double *dF = ls_doubles(p->work[DF2]);
    double *dq = ls_doubles(p->work[DMEANS]), *dk = dq + G * m * d;
    ls_gemm_batch_double(p->queue, 0, 0, m, d, m, p->scale, dF, m, m * m, mean_of(p, 1), d, m * d, 0, dq, d, m * d, G);
    ls_gemm_batch_double(p->queue, 1, 0, m, d, m, p->scale, dF, m, m * m, mean_of(p, 0), d, m * d, p->scale, dk, d,
                         m * d, G);
}

/* ------------------------------------------------------------------------------------------------ queries read */

/* KEYS = σ k̄ less their mean, VALUES = W - c, CENTRE = c. */
static void load_slots(const ls_pass *p)
{
    const ls_slot_sizes s = sizes(p);
    ls_slots_centre_cuda(p->queue, s, p->scale, mean_of(p, 1), p->work[KEYS], NULL, 0);
    ls_slots_centre_cuda(p->queue, s, 1, ls_doubles(p->saved[VALUES_OUT]), p->work[VALUES], p->work[CENTRE], 0);
}

static ls_slot_rows queries_of(const ls_pass *p)
{
    return rows_of(p->q, p->pad_q, p->T, NULL);
}

static ls_status read(ls_pass *p, int phase)
{
    load_sums(p, phase - 1);
    solve(p, phase);
    load_slots(p);
    ls_slots_read_cuda(p->queue, sizes(p), queries_of(p), p->work[KEYS], NULL, p->work[VALUES], p->work[CENTRE],
                       p->out);
    if (has_conv(p)) add_conv(p);
    return ls_launched(p->queue, "nystrom: read");
}

static ls_status read_backward(ls_pass *p, int phase)
{
    ls_queue *q = p->queue;
    const ls_slot_sizes s = sizes(p);
    double *dmean = ls_doubles(p->work[DMEANS]);
    load_sums(p, phase - 1);
    load_slots(p);
    ls_slots_read_backward_cuda(q, s, queries_of(p), p->work[KEYS], NULL, p->work[VALUES],
                                rows_of(p->dout, p->pad_q, p->T, NULL), p->work[ROWS], ls_doubles(p->work[ROOM]), p->dq,
                                ls_doubles(p->work[STATE]), dmean + p->B * p->H * s.R * p->d, NULL);
    load_sums(p, phase - 1); /* the reference again, where c was */
    solve_backward(p, phase);
    means_backward(p);
    return ls_launched(q, "nystrom: backward of read");
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_cuda_kernel kernels[] = {
    {"convolution", NULL, conv_backward},
    {"segments", segments, segments_backward},
    {"write", write, write_backward},
    {"read", read, read_backward},
    {"short: begin", ls_softmax_begin_cuda, NULL},
    {"short: tiles", ls_softmax_visit_cuda, ls_softmax_visit_backward_cuda},
    {"short: send", ls_softmax_send_cuda, NULL},
    {"short: finish", finish_short, finish_short_backward},
    {NULL, NULL, NULL},
};

const ls_cuda_mechanism ls_nystrom_cuda = {.plan = plan, .kernel = kernels, .host_bytes = NULL, .takes_narrow = NULL};
