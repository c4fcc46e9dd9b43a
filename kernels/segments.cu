/* Sums of segments. A segment may be most of a rank's rows, or a few of them: the rows of each are cut into parts, one
 * block each, which sums in double along the rows, neighbouring threads on neighbouring features; a second kernel adds
 * the parts in their order. The adjoint is one warp per row. */
#include "segments_cuda.h"

enum { BLOCKS = 1024, ROWS = 32 }; /* blocks wanted for a sequence, rows that make a part worthwhile */

/* ------------------------------------------------------------------------------------------------ what is summed */

namespace
{
/* n: one or two sequences, and the values. */
typedef struct sources {
    int n;
    int64_t G, count, d;
    ls_segmented of[3];
    int64_t parts[3]; /* of a segment's rows */
} sources;
} // namespace

static int64_t parts_of(int64_t G, int64_t n, ls_segments s)
{
    const int64_t longest = ls_min(n, (s.length + s.count - 1) / s.count), most = (longest + ROWS - 1) / ROWS;
    return ls_max(1, ls_min(most, BLOCKS / ls_max(1, G * s.count)));
}

static sources sources_of(const ls_pass *p, ls_landmarks l, int gradients)
{
    sources s = {3 - l.first, p->B * p->H, l.count, p->d, {}, {}};
    for (int i = 0; i < s.n; i++) {
        const int which = i + l.first;
        s.of[i] = ls_segmented_rows(p, which < 2 ? l.count : 1, which, gradients);
        s.parts[i] = parts_of(s.G, s.of[i].n, s.of[i].segments);
    }
    return s;
}

/* Segments of source i that are summed, each a block to a part. */
LS_BOTH_SIDES int64_t blocks_of(const sources &s, int i)
{
    return s.G * s.of[i].segments.count * s.parts[i];
}

int64_t ls_landmark_room(const ls_pass *p, ls_landmarks l)
{
    const int64_t G = p->B * p->H, n = ls_max(p->T, p->S);
    /* no segment has more than n rows here */
    const ls_segments rows = {ls_max(n, 1) * l.count, l.count}, values = {ls_max(p->S, 1), 1};
    return G * (2 * l.count * parts_of(G, n, rows) + parts_of(G, p->S, values)) * p->d;
}

/* ------------------------------------------------------------------------------------------------ sums */

/* to (parts, G, count, d): this block sums one part of the rows of segment c of (b,h) g. */
__device__ static inline void sum_part(const ls_segmented &s, int64_t parts, int64_t block, double *to)
{
    __shared__ double sums[LS_THREADS];
    const int64_t G = s.B * s.H, count = s.segments.count;
    const int64_t part = block % parts, c = block / parts % count, g = block / parts / count;
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
static __global__ void sum_parts(sources s, double *to, ls_real *keys, int64_t stride)
{
    int64_t block = blockIdx.x;
    for (int i = 0; i < s.n; i++) {
        const int64_t blocks = blocks_of(s, i);
        if (block >= 0 && block < blocks) sum_part(s.of[i], s.parts[i], block, to);
        block -= blocks;
        to += blocks * s.d;
    }
    if (block >= 0) count_keys(s.of[s.n - 1], block, keys, stride);
}

static __global__ void add_parts(sources s, const double *from, ls_real *sums, int64_t stride)
{
    const int64_t each = s.count * s.d;
    LS_EACH(i, s.G * (stride - 1))
    {
        const int64_t g = i / (stride - 1), at = i % (stride - 1);
        const int which = (int)(at / each < s.n - 1 ? at / each : s.n - 1);
        const int64_t width = which < s.n - 1 ? each : s.d;
        const double *parts = from + g * width + at - which * each;
        for (int j = 0; j < which; j++) parts += blocks_of(s, j) * s.d;
        double sum = 0;
        for (int64_t part = 0; part < s.parts[which]; part++) sum += parts[part * s.G * width];
        sums[g * stride + at] = (ls_real)sum;
    }
}

void ls_landmark_sums_cuda(const ls_pass *p, ls_landmarks l, double *room, ls_real *sums)
{
    const sources s = sources_of(p, l, 0);
    const int64_t stride = ls_landmark_reals(p, l);
    int64_t blocks = p->B;
    if (s.G == 0) return;
    for (int i = 0; i < s.n; i++) blocks += blocks_of(s, i);
    LS_LAUNCH(p->queue, sum_parts, (int)blocks, LS_THREADS, 0, s, room, sums + stride - 1, stride);
    LS_LAUNCH(p->queue, add_parts, ls_blocks(s.G * (stride - 1), LS_THREADS), LS_THREADS, 0, s, (const double *)room,
              sums, stride);
}

/* ------------------------------------------------------------------------------------------------ adjoint */

static __global__ void spread(sources s, const ls_real *dsums, int64_t stride)
{
    const int64_t firsts = s.G * s.of[0].n, all = s.n > 2 ? firsts + s.G * s.of[1].n : firsts;
    LS_EACH_ROW(R, all)
    {
        const int which = R >= firsts;
        const ls_segmented &x = s.of[which];
        const int64_t row = R - which * firsts, g = row / x.n, i = row % x.n, b = g / x.H, h = g % x.H;
        if (ls_is_padded(x.pad, b * x.n + i)) continue;
        const ls_real *from = dsums + g * stride + (which * s.count + ls_segment_of(x.segments, x.lo + i)) * s.d;
        ls_real *to = ls_row(x.x, b, h, i);
        LS_EACH_LANE(e, s.d) to[e] += from[e];
    }
}

void ls_landmark_spread_cuda(const ls_pass *p, ls_landmarks l, const ls_real *dsums)
{
    const sources s = sources_of(p, l, 1);
    const int64_t rows = s.G * (s.of[0].n + (l.first == 0 ? s.of[1].n : 0));
    if (rows > 0) LS_LAUNCH(p->queue, spread, ls_row_blocks(rows), LS_THREADS, 0, s, dsums, ls_landmark_reals(p, l));
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
