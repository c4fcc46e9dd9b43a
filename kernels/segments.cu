/* Sums of segments. A segment may be most of a rank's rows, or a few of them: the rows of each are cut into parts, and
 * a part has as many threads as it has work for, from a few lanes to a block. They sum in double along the rows,
 * neighbouring threads on neighbouring features; where there are several parts a second kernel adds them in their
 * order. The adjoint walks along the rows. */
#include "segments_cuda.h"

/* Parts of blocks wanted for a sequence, rows that make a part worthwhile, and rows for each of its groups of lanes. */
enum { BLOCKS = 512, ROWS = 32, ROWS_EACH = 8 };

/* ------------------------------------------------------------------------------------------------ what is summed */

namespace
{
/* n: one or two sequences, and the values. */
typedef struct sources {
    int n;
    int64_t G, count, d;
    ls_segmented of[3];
    int64_t parts[3]; /* of a segment's rows */
    int bits;         /* 2^bits lanes have a row */
    int groups[3];    /* such groups of lanes have a part, a power of 2 */
    int wide;         /* rows are read by fours */
} sources;
} // namespace

static int64_t parts_of(int64_t G, int64_t n, ls_segments s)
{
    const int64_t longest = s.count == 0 ? 0 : ls_min(n, (s.length + s.count - 1) / s.count),
                  most = (longest + ROWS - 1) / ROWS;
    return ls_max(1, ls_min(most, BLOCKS / ls_max(1, G * s.count)));
}

static sources sources_of(const ls_pass *p, ls_landmarks l, int gradients)
{
    sources s = {};
    s.n = 3 - l.first, s.G = p->B * p->H, s.count = l.count, s.d = p->d, s.wide = 1;
    for (int i = 0; i < s.n; i++) {
        const int which = i + l.first;
        s.of[i] = ls_segmented_rows(p, which < 2 ? l.count : 1, which, gradients);
        s.parts[i] = parts_of(s.G, s.of[i].n, s.of[i].segments);
        s.wide = s.wide && ((gradients && which == 2) || ls_rows_are_fours(s.of[i].x, p->d));
    }
    s.bits = ls_lane_bits(s.wide ? s.d / 4 : s.d);
    for (int i = 0; i < s.n; i++) {
        const ls_segmented &x = s.of[i];
        const int64_t longest = ls_min(x.n, (x.segments.length + x.segments.count - 1) / x.segments.count);
        s.groups[i] = 1;
        while (s.groups[i] << s.bits < LS_THREADS && s.groups[i] * s.parts[i] * ROWS_EACH < longest) s.groups[i] *= 2;
    }
    return s;
}

/* Parts of all segments of source i, and how many of them a block sums. */
LS_BOTH_SIDES int64_t items_of(const sources &s, int i)
{
    return s.G * s.of[i].segments.count * s.parts[i];
}
LS_BOTH_SIDES int items_together(const sources &s, int i)
{
    return (LS_THREADS >> s.bits) / s.groups[i];
}
LS_BOTH_SIDES int64_t blocks_of(const sources &s, int i)
{
    return (items_of(s, i) + items_together(s, i) - 1) / items_together(s, i);
}

int64_t ls_landmark_room(const ls_pass *p, ls_landmarks l)
{
    const int64_t G = p->B * p->H, n = ls_max(p->T, p->S);
    /* no segment has more than n rows here */
    const ls_segments rows = {ls_max(n, 1) * l.count, l.count}, values = {ls_max(p->S, 1), 1};
    return G * (2 * l.count * parts_of(G, n, rows) + parts_of(G, p->S, values)) * p->d;
}

/* ------------------------------------------------------------------------------------------------ sums */

/* This block sums some parts of source i: to (parts, G, count, d), or to sums where a segment is one part. */
template <int W>
__device__ static inline void sum_items(const sources &s, int i, int64_t block, double *to, ls_real *sums,
                                        int64_t stride)
{
    __shared__ double part[LS_THREADS * W];
    const ls_segmented &x = s.of[i];
    const int lanes = 1 << s.bits, lane = (int)threadIdx.x & (lanes - 1), groups = s.groups[i];
    const int group = ((int)threadIdx.x >> s.bits) & (groups - 1), d = (int)s.d;
    const uint32_t count = (uint32_t)x.segments.count, parts = (uint32_t)s.parts[i];
    const uint32_t item =
        (uint32_t)(block * items_together(s, i)) + ((uint32_t)threadIdx.x >> s.bits) / (uint32_t)groups;
    const bool exists = item < items_of(s, i);
    const uint32_t which = item % parts, c = item / parts % count, g = exists ? item / parts / count : 0;
    const int64_t b = g / (uint32_t)x.H, h = g % (uint32_t)x.H;
    const ls_span span = ls_segment_rows(&x, c);
    const int64_t from = span.row + (parts == 1 ? 0 : span.n * which / parts);
    const int64_t end = !exists ? 0 : span.row + (parts == 1 ? span.n : span.n * (which + 1) / parts);
    for (int e = W * lane; e - W * lane < d; e += W * lanes) { /* all threads stay together */
        double sum[W] = {0};
        const ls_real *row = ls_row(x.x, b, h, from + group) + e;
#pragma unroll 4
        for (int64_t r = from + group; r < end; r += groups, row += groups * x.x.st) {
            const ls_few<W> y = e < d ? ls_few_at<W>(row) : ls_few<W>();
            const int padded = ls_is_padded(x.pad, b * x.n + r);
            for (int k = 0; k < W; k++) sum[k] += padded ? 0 : (double)y.v[k];
        }
        if (groups > 1) {
            for (int k = 0; k < W; k++) part[(int)threadIdx.x * W + k] = sum[k];
            __syncthreads();
            for (int j = 1; group == 0 && j < groups; j++)
                for (int k = 0; k < W; k++) sum[k] += part[((int)threadIdx.x + (j << s.bits)) * W + k];
            __syncthreads();
        }
        for (int k = 0; k < W && exists && group == 0 && e + k < d; k++) {
            if (parts == 1)
                sums[g * stride + (i * s.count + c) * d + e + k] = (ls_real)sum[k];
            else
                to[((which * s.G + g) * count + c) * d + e + k] = sum[k];
        }
    }
}

/* How many keys of b are not padded, to each of its heads. */
__device__ static inline void count_keys(const ls_segmented &values, int64_t b, ls_real *to, int64_t stride)
{
    __shared__ int64_t scratch[LS_WARP];
    int64_t keys = 0;
    for (int64_t j = threadIdx.x; j < values.n; j += blockDim.x) keys += !ls_is_padded(values.pad, b * values.n + j);
    keys = ls_block_sum(keys, scratch);
    for (int64_t h = threadIdx.x; h < values.H; h += blockDim.x) to[(b * values.H + h) * stride] = (ls_real)keys;
}

/* to: the parts of each source; behind their blocks one for each b counts its keys. */
template <int W> static __global__ void sum_parts(sources s, double *to, ls_real *sums, int64_t stride)
{
    int64_t block = blockIdx.x;
    for (int i = 0; i < s.n; i++) {
        const int64_t blocks = blocks_of(s, i);
        if (block >= 0 && block < blocks) sum_items<W>(s, i, block, to, sums, stride);
        block -= blocks;
        to += items_of(s, i) * s.d;
    }
    if (block >= 0) count_keys(s.of[s.n - 1], block, sums + stride - 1, stride);
}

/* Of the segments that have several parts; blocks (sums of a (b,h), B*H). */
static __global__ void add_parts(sources s, const double *from, ls_real *sums, int64_t stride)
{
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, each = s.count * s.d;
    int64_t first = 0, width = each;
    for (int i = 0; i < s.n; i++, first += each) {
        width = i < s.n - 1 ? each : s.d;
        for (int64_t g = blockIdx.y; s.parts[i] > 1 && at >= first && at < first + width && g < s.G; g += gridDim.y) {
            const double *parts = from + g * width + at - first;
            double sum = 0;
            for (int64_t part = 0; part < s.parts[i]; part++) sum += parts[part * s.G * width];
            sums[g * stride + at] = (ls_real)sum;
        }
        from += items_of(s, i) * s.d;
    }
}

void ls_landmark_sums_cuda(const ls_pass *p, ls_landmarks l, double *room, ls_real *sums)
{
    const sources s = sources_of(p, l, 0);
    const int64_t stride = ls_landmark_reals(p, l);
    int64_t blocks = p->B;
    if (s.G == 0) return;
    for (int i = 0; i < s.n; i++) blocks += blocks_of(s, i);
    const auto kernel = s.wide ? sum_parts<4> : sum_parts<1>;
    LS_LAUNCH(p->queue, kernel, (int)blocks, LS_THREADS, 0, s, room, sums, stride);
    int64_t most = 1;
    for (int i = 0; i < s.n; i++) most = ls_max(most, s.parts[i]);
    const dim3 adders((unsigned)((stride - 1 + LS_THREADS - 1) / LS_THREADS), (unsigned)ls_min(s.G, 65535));
    if (most > 1) LS_LAUNCH(p->queue, add_parts, adders, LS_THREADS, 0, s, (const double *)room, sums, stride);
}

/* ------------------------------------------------------------------------------------------------ adjoint */

/* A thread's rows come in order, and so do their segments, so that it looks for one by division only in a tile's
 * beginning. */
template <int W> static __global__ void spread(sources s, const ls_real *dsums, int64_t stride)
{
    const int lanes = 1 << s.bits, lane = (int)threadIdx.x & (lanes - 1), d = (int)s.d;
    for (int i = 0; i < s.n - 1; i++) {
        const ls_segmented &x = s.of[i];
        const int64_t least = x.segments.length / x.segments.count;
        const int64_t few = (least + 1) * x.segments.count - x.segments.length; /* segments of so many rows */
        ls_walk_tiles(x.B, x.n, s.bits, [&](const ls_tile_rows &mine) {
            if (mine.first >= mine.end) return;
            int64_t c = ls_segment_of(x.segments, x.lo + mine.first), next = (c + 1) * least + ls_max(0, c + 1 - few);
            const ls_real *from = dsums + (mine.b * x.H + mine.h) * stride + i * s.count * d;
            ls_real *to = ls_row(x.x, mine.b, mine.h, mine.first);
            for (int64_t t = mine.first; t < mine.end; t += mine.step, to += mine.step * x.x.st) {
                for (; x.lo + t >= next; c++) next += least + (c + 1 >= few);
                if (ls_is_padded(x.pad, mine.b * x.n + t)) continue;
                for (int e = W * lane; e < d; e += W * lanes) {
                    ls_few<W> y = ls_few_at<W>(to + e);
                    for (int k = 0; k < W; k++) y.v[k] += from[c * d + e + k]; /* which lie anyhow */
                    ls_put_few(to + e, y);
                }
            }
        });
    }
}

void ls_landmark_spread_cuda(const ls_pass *p, ls_landmarks l, const ls_real *dsums)
{
    const sources s = sources_of(p, l, 1);
    const int64_t most = ls_max(s.of[0].n, l.first == 0 ? s.of[1].n : 0);
    const auto kernel = s.wide ? spread<4> : spread<1>;
    if (s.G > 0 && most > 0)
        LS_LAUNCH(p->queue, kernel, ls_tile_blocks(p->B, p->H, most), LS_THREADS, 0, s, dsums, ls_landmark_reals(p, l));
}

/* ------------------------------------------------------------------------------------------------ means */

namespace
{
/* Of the sequences that are summed, one or two. */
typedef struct lengths {
    int sequences;
    int64_t G, d;
    ls_segments of[2];
} lengths;
} // namespace

static lengths lengths_of(const ls_pass *p, ls_landmarks l)
{
    return lengths{
        2 - l.first, p->B * p->H, p->d, {ls_landmark_segments(p, l, l.first), ls_landmark_segments(p, l, 1)}};
}

static __global__ void make_means(lengths s, const ls_real *sums, int64_t stride, double *mean, ls_real *reference)
{
    const int64_t each = s.of[0].count * s.d, all = 2 * each + s.d;
    LS_EACH(i, s.G * all)
    {
        const int64_t g = i / all, at = i % all;
        const ls_real *from = sums + g * stride;
        if (at < 2 * each) {
            const int which = at >= each;
            const int64_t e = at - which * each;
            mean[(which * s.G + g) * each + e] =
                (double)from[s.sequences > 1 ? at : e] / (double)ls_segment_tokens(which ? s.of[1] : s.of[0], e / s.d);
        } else {
            const int64_t e = at - 2 * each;
            from += s.sequences * each;
            reference[g * s.d + e] = from[s.d] > 0 ? from[e] / from[s.d] : 0;
        }
    }
}

void ls_landmark_means_cuda(const ls_pass *p, ls_landmarks l, const ls_real *sums, double *mean, ls_real *reference)
{
    const lengths s = lengths_of(p, l);
    LS_LAUNCH(p->queue, make_means, ls_blocks(s.G * (2 * l.count + 1) * s.d, LS_THREADS), LS_THREADS, 0, s, sums,
              ls_landmark_reals(p, l), mean, reference);
}

static __global__ void share_means(lengths s, const double *dmean, int64_t apart, ls_real *dsums, int64_t stride)
{
    const int64_t each = s.of[0].count * s.d;
    LS_EACH(i, s.G * stride)
    {
        const int64_t g = i / stride, at = i % stride;
        const int which = at >= each;
        const int64_t e = at - which * each;
        dsums[i] = at >= s.sequences * each ? 0
                                            : (ls_real)(dmean[which * apart + g * each + e] /
                                                        (double)ls_segment_tokens(which ? s.of[1] : s.of[0], e / s.d));
    }
}

void ls_landmark_means_backward_cuda(const ls_pass *p, ls_landmarks l, const double *dmean, int64_t apart,
                                     ls_real *dsums)
{
    const lengths s = lengths_of(p, l);
    const int64_t stride = ls_landmark_reals(p, l);
    LS_LAUNCH(p->queue, share_means, ls_blocks(s.G * stride, LS_THREADS), LS_THREADS, 0, s, dmean, apart, dsums,
              stride);
}
