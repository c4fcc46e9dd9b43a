/* Sums of segments. A segment may be most of a rank's rows, or a few of them: the rows of each are cut into parts, one
 * block each, which sums in double along the rows, neighbouring threads on neighbouring features; a second kernel adds
 * the parts in their order. The adjoint is one warp per row. */
#include "segments_cuda.h"

enum { BLOCKS = 1024, ROWS = 32 }; /* blocks wanted, rows that make a part worthwhile */

/* ------------------------------------------------------------------------------------------------ sums */

static int64_t parts_of(int64_t G, int64_t n, ls_segments s)
{
    const int64_t longest = ls_min(n, (s.length + s.count - 1) / s.count), most = (longest + ROWS - 1) / ROWS;
    return ls_max(1, ls_min(most, BLOCKS / ls_max(1, G * s.count)));
}

int64_t ls_segment_room(int64_t G, int64_t n, int64_t count, int64_t d)
{
    const ls_segments s = {ls_max(n, 1) * count, count}; /* no segment has more than n rows here */
    return parts_of(G, n, s) * G * count * d;
}

int64_t ls_segment_room_of_pass(const ls_pass *p, int64_t count)
{
    const int64_t G = p->B * p->H, n = ls_max(p->T, p->S);
    return ls_max(ls_segment_room(G, n, count, p->d), ls_segment_room(G, p->S, 1, p->d));
}

/* parts (parts, G, count, d): one block sums one part of the rows of segment c of (b,h) g. */
static __global__ void sum_parts(ls_segmented s, int64_t parts, double *to)
{
    __shared__ double sums[LS_THREADS];
    const int64_t G = s.B * s.H, count = s.segments.count;
    const int64_t part = blockIdx.x % parts, c = blockIdx.x / parts % count, g = blockIdx.x / parts / count;
    const int64_t b = g / s.H, h = g % s.H;
    const ls_span span = ls_segment_rows(&s, c);
    const int64_t from = span.row + span.n * part / parts, end = span.row + span.n * (part + 1) / parts;
    const int width = (int)ls_min((s.d + LS_WARP - 1) / LS_WARP * LS_WARP, LS_THREADS), groups = LS_THREADS / width;
    const int lane = (int)threadIdx.x % width, group = (int)threadIdx.x / width;
    for (int64_t e = lane; e - lane < s.d; e += width) { /* all threads stay together */
        double sum = 0;
        if (e < s.d && group < groups)
            for (int64_t i = from + group; i < end; i += groups)
                sum += ls_is_padded(s.pad, b * s.n + i) ? 0 : (double)ls_row(s.x, b, h, i)[e];
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (group == 0 && e < s.d) {
            for (int i = 1; i < groups; i++) sum += sums[i * width + lane];
            to[((part * G + g) * count + c) * s.d + e] = sum;
        }
        __syncthreads();
    }
}

/* each: count d reals of every (b,h). */
static __global__ void add_parts(int64_t G, int64_t each, int64_t parts, const double *from, ls_real *sums,
                                 int64_t stride)
{
    LS_EACH(i, G * each)
    {
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += from[part * G * each + i];
        sums[i / each * stride + i % each] = (ls_real)sum;
    }
}

void ls_segment_sums_cuda(ls_queue *q, const ls_segmented *s, double *room, ls_real *sums, int64_t stride)
{
    const int64_t G = s->B * s->H, count = s->segments.count, parts = parts_of(G, s->n, s->segments);
    if (G == 0) return;
    LS_LAUNCH(q, sum_parts, (int)(G * count * parts), LS_THREADS, 0, *s, parts, room);
    LS_LAUNCH(q, add_parts, ls_blocks(G * count * s->d, LS_THREADS), LS_THREADS, 0, G, count * s->d, parts,
              (const double *)room, sums, stride);
}

/* ------------------------------------------------------------------------------------------------ adjoint */

static __global__ void spread(ls_segmented s, const ls_real *dsums, int64_t stride)
{
    const int64_t warps = (int64_t)gridDim.x * blockDim.x / LS_WARP, rows = s.B * s.H * s.n;
    const int lane = (int)threadIdx.x % LS_WARP;
    for (int64_t row = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LS_WARP; row < rows; row += warps) {
        const int64_t g = row / s.n, i = row % s.n, b = g / s.H, h = g % s.H;
        if (ls_is_padded(s.pad, b * s.n + i)) continue;
        const ls_real *from = dsums + g * stride + ls_segment_of(s.segments, s.lo + i) * s.d;
        ls_real *x = ls_row(s.x, b, h, i);
        for (int64_t e = lane; e < s.d; e += LS_WARP) x[e] += from[e];
    }
}

void ls_segment_spread_cuda(ls_queue *q, const ls_segmented *s, const ls_real *dsums, int64_t stride)
{
    if (s->B * s->H * s->n == 0) return;
    LS_LAUNCH(q, spread, ls_blocks(s->B * s->H * s->n * LS_WARP, LS_THREADS), LS_THREADS, 0, *s, dsums, stride);
}

/* ------------------------------------------------------------------------------------------------ reference */

/* One block for each b: how many keys are not padded. */
static __global__ void count_keys(int64_t H, int64_t S, const uint8_t *pad, ls_real *to, int64_t stride)
{
    __shared__ int64_t scratch[LS_WARP];
    int64_t keys = 0;
    for (int64_t j = threadIdx.x; j < S; j += blockDim.x) keys += !ls_is_padded(pad, blockIdx.x * S + j);
    keys = ls_block_sum(keys, scratch);
    for (int64_t h = threadIdx.x; h < H; h += blockDim.x) to[(blockIdx.x * H + h) * stride] = (ls_real)keys;
}

void ls_reference_sums_cuda(const ls_pass *p, double *room, ls_real *sums, int64_t stride)
{
    const ls_segmented v = ls_segmented_rows(p, 1, 2, 0);
    ls_segment_sums_cuda(p->queue, &v, room, sums, stride);
    if (p->B == 0) return;
    LS_LAUNCH(p->queue, count_keys, (int)p->B, LS_THREADS, 0, p->H, p->S, p->own.pad, sums + p->d, stride);
}

static __global__ void make_reference(int64_t G, int64_t d, const ls_real *sums, int64_t stride, ls_real *reference)
{
    LS_EACH(i, G * d)
    {
        const ls_real *sum = sums + i / d * stride;
        reference[i] = sum[d] > 0 ? sum[i % d] / sum[d] : 0;
    }
}

void ls_reference_cuda(ls_queue *q, int64_t G, int64_t d, const ls_real *sums, int64_t stride, ls_real *reference)
{
    LS_LAUNCH(q, make_reference, ls_blocks(G * d, LS_THREADS), LS_THREADS, 0, G, d, sums, stride, reference);
}

static __global__ void clear(int64_t G, int64_t n, ls_real *x, int64_t stride)
{
    LS_EACH(i, G * n) x[i / n * stride + i % n] = 0;
}

void ls_reference_clear_cuda(ls_queue *q, int64_t G, int64_t d, ls_real *dsums, int64_t stride)
{
    LS_LAUNCH(q, clear, ls_blocks(G * (d + 1), LS_THREADS), LS_THREADS, 0, G, d + 1, dsums, stride);
}

/* ------------------------------------------------------------------------------------------------ means */

static __global__ void make_means(ls_segments s, int64_t G, int64_t d, const ls_real *sums, int64_t stride,
                                  double *mean)
{
    const int64_t each = s.count * d;
    LS_EACH(i, G * each)
    {
        const int64_t at = i % each;
        mean[i] = (double)sums[i / each * stride + at] / (double)ls_segment_tokens(s, at / d);
    }
}

void ls_segment_means_cuda(ls_queue *q, ls_segments s, int64_t G, int64_t d, const ls_real *sums, int64_t stride,
                           double *mean)
{
    LS_LAUNCH(q, make_means, ls_blocks(G * s.count * d, LS_THREADS), LS_THREADS, 0, s, G, d, sums, stride, mean);
}

static __global__ void share_means(ls_segments s, int64_t G, int64_t d, const double *dmean, ls_real *dsums,
                                   int64_t stride)
{
    const int64_t each = s.count * d;
    LS_EACH(i, G * each)
    {
        const int64_t at = i % each;
        dsums[i / each * stride + at] = (ls_real)(dmean[i] / (double)ls_segment_tokens(s, at / d));
    }
}

void ls_segment_means_backward_cuda(ls_queue *q, ls_segments s, int64_t G, int64_t d, const double *dmean,
                                    ls_real *dsums, int64_t stride)
{
    LS_LAUNCH(q, share_means, ls_blocks(G * s.count * d, LS_THREADS), LS_THREADS, 0, s, G, d, dmean, dsums, stride);
}
