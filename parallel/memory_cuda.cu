/* What the driver does to device memory. Copies and sums of rows: one warp to a row. Monoids: one warp to a group. */
#include "cuda.h"

extern "C" {
#include "memory.h"
#include "statistics.h"
}

static void copy(ls_queue *q, void *to, const void *from, size_t bytes)
{
    if (bytes > 0 && to != from) cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, q->stream);
}

static void zero(ls_queue *q, void *p, size_t bytes)
{
    if (bytes > 0) cudaMemsetAsync(p, 0, bytes, q->stream);
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Which row this warp works on, of nb * nh * n. */
struct place {
    int64_t b, h, t;
};
__device__ static place place_of(const ls_rows &x, int64_t n, int64_t row)
{
    return place{row / n / x.nh, row / n % x.nh, row % n};
}
__device__ static char *row_of(const ls_rows &x, place at)
{
    return x.p + at.b * x.sb + at.h * x.sh + at.t * x.st;
}

/* T: what is moved at a time; bytes is a multiple of its size, rows lie on its boundary. See width_of. */
template <typename T> __global__ static void copy_kernel(ls_rows to, ls_rows from, int64_t n)
{
    LS_EACH_ROW(row, to.nb * to.nh * n)
    {
        const place at = place_of(to, n, row);
        T *x = reinterpret_cast<T *>(row_of(to, at));
        const T *y = reinterpret_cast<const T *>(row_of(from, at));
        LS_EACH_LANE(i, to.row_bytes / (int64_t)sizeof(T)) x[i] = y[i];
    }
}

/* W numbers at a time, alike. */
template <int W> __global__ static void add_kernel(ls_rows to, ls_rows from, int64_t n)
{
    LS_EACH_ROW(row, to.nb * to.nh * n)
    {
        const place at = place_of(to, n, row);
        ls_few<W> *x = reinterpret_cast<ls_few<W> *>(row_of(to, at));
        const ls_few<W> *y = reinterpret_cast<const ls_few<W> *>(row_of(from, at));
        LS_EACH_LANE(i, to.row_bytes / (int64_t)sizeof *x)
        {
            ls_few<W> a = x[i];
            const ls_few<W> b = y[i];
            for (int k = 0; k < W; k++) a.v[k] += b.v[k];
            x[i] = a;
        }
    }
}

template <typename T> __global__ static void clear_kernel(ls_rows x, int64_t n, const uint8_t *pad)
{
    LS_EACH_ROW(row, x.nb * x.nh * n)
    {
        const place at = place_of(x, n, row);
        if (pad != NULL && !pad[at.b * n + at.t]) continue;
        T *y = reinterpret_cast<T *>(row_of(x, at));
        LS_EACH_LANE(i, x.row_bytes / (int64_t)sizeof(T)) y[i] = T();
    }
}

static int is_aligned(const ls_rows &x, int64_t bytes)
{
    return (int64_t)(uintptr_t)x.p % bytes == 0 && x.row_bytes % bytes == 0 && x.sb % bytes == 0 && x.sh % bytes == 0 &&
           x.st % bytes == 0;
}

/* Bytes that can be moved at a time. */
static int width_of(const ls_rows &x)
{
    return is_aligned(x, 16) ? 16 : is_aligned(x, 4) ? 4 : 1;
}

static int blocks_of(const ls_rows &x, int64_t n)
{
    return ls_row_blocks(x.nb * x.nh * n);
}

enum { PIECE = 2048 };

/* f(to, from, n). A single row may be long: it is cut into many, and a rest. */
template <typename F> static void by_pieces(ls_rows to, ls_rows from, int64_t n, F f)
{
    if (n == 1 && to.nb * to.nh == 1 && to.row_bytes > PIECE) {
        const int64_t pieces = to.row_bytes / PIECE, rest = to.row_bytes % PIECE;
        to.row_bytes = from.row_bytes = to.st = from.st = PIECE;
        f(to, from, pieces);
        to.p += pieces * PIECE, from.p += pieces * PIECE;
        to.row_bytes = from.row_bytes = rest;
    }
    if (to.nb * to.nh * n * to.row_bytes > 0) f(to, from, n);
}

static void copy_rows(ls_queue *q, ls_rows to, ls_rows from, int64_t n)
{
    by_pieces(to, from, n, [q](const ls_rows &y, const ls_rows &x, int64_t rows) {
        const int64_t width = ls_min(width_of(y), width_of(x));
        const auto kernel = width == 16 ? copy_kernel<float4> : width == 4 ? copy_kernel<float> : copy_kernel<char>;
        LS_LAUNCH(q, kernel, blocks_of(y, rows), LS_THREADS, 0, y, x, rows);
    });
}

static void add_rows(ls_queue *q, ls_rows to, ls_rows from, int64_t n)
{
    by_pieces(to, from, n, [q](const ls_rows &y, const ls_rows &x, int64_t rows) {
        const int by_fours = is_aligned(y, sizeof(ls_four)) && is_aligned(x, sizeof(ls_four));
        const auto kernel = by_fours ? add_kernel<4> : add_kernel<1>;
        LS_LAUNCH(q, kernel, blocks_of(y, rows), LS_THREADS, 0, y, x, rows);
    });
}

static void clear_rows(ls_queue *q, ls_rows x, int64_t n, const uint8_t *pad)
{
    if (x.nb * x.nh * n * x.row_bytes <= 0) return;
    const int width = width_of(x);
    const auto kernel = width == 16 ? clear_kernel<float4> : width == 4 ? clear_kernel<float> : clear_kernel<char>;
    LS_LAUNCH(q, kernel, blocks_of(x, n), LS_THREADS, 0, x, n, pad);
}

__global__ static void mean_kernel(int64_t B, int64_t H, int64_t n, const ls_real *heads, ls_real *mean)
{
    LS_EACH(i, B * n)
    {
        double s = 0;
        for (int64_t h = 0; h < H; h++) s += (double)heads[(i / n * H + h) * n + i % n];
        mean[i] = (ls_real)(s / (double)H);
    }
}

static void mean_heads(ls_queue *q, int64_t B, int64_t H, int64_t n, const ls_real *heads, ls_real *mean)
{
    if (B * n > 0) LS_LAUNCH(q, mean_kernel, ls_blocks(B * n, LS_THREADS), LS_THREADS, 0, B, H, n, heads, mean);
}

/* ------------------------------------------------------------------------------------------------ monoids */

__global__ static void identity_kernel(ls_monoid m, ls_real *x)
{
    const int64_t stride = ls_monoid_stride(m);
    LS_EACH(i, ls_monoid_size(m)) x[i] = m.has_max && i % stride == 0 ? -INFINITY : 0;
}

static void identity(ls_queue *q, ls_monoid m, ls_real *x)
{
    const int64_t n = ls_monoid_size(m);
    if (n > 0) LS_LAUNCH(q, identity_kernel, ls_blocks(n, LS_THREADS), LS_THREADS, 0, m, x);
}

/* out may be left or right: every lane has read the maxima before one writes. */
__global__ static void combine_kernel(ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    const int64_t stride = ls_monoid_stride(m), first = m.has_max, tail = first + m.scaled;
    LS_EACH_ROW(g, m.groups)
    {
        const ls_real *l = left + g * stride, *r = right + g * stride;
        ls_real *o = out + g * stride, a = 1, b = 1, top = 0;
        if (m.has_max) {
            top = l[0] > r[0] ? l[0] : r[0];
            a = ls_statistics_weight(l[0], top), b = ls_statistics_weight(r[0], top);
        }
        __syncwarp();
        if (m.has_max && threadIdx.x % LS_WARP == 0) o[0] = top;
        LS_EACH_LANE(i, stride)
        {
            if (i >= tail)
                o[i] = l[i] + r[i];
            else if (i >= first)
                o[i] = a * l[i] + b * r[i];
        }
    }
}

__global__ static void decay_kernel(ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    const int64_t reals = 2 * m.groups;
    const ls_real *far = m.reversed ? right : left, *near = m.reversed ? left : right;
    const double n = (double)near[reals], sign = m.conjugate ? -1 : 1;
    LS_EACH(g, m.groups)
    ls_decay_combine(m.decay + 2 * (g % m.decays), n, sign, far + 2 * g, near + 2 * g, out + 2 * g);
}

/* After the elements, which all need the count of one side. */
__global__ static void count_kernel(const ls_real *left, const ls_real *right, ls_real *out)
{
    *out = *left + *right;
}

static void combine(ls_queue *q, ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    if (m.decay != NULL) {
        const int64_t reals = 2 * m.groups;
        LS_LAUNCH(q, decay_kernel, ls_blocks(m.groups, LS_THREADS), LS_THREADS, 0, m, left, right, out);
        LS_LAUNCH(q, count_kernel, 1, 1, 0, left + reals, right + reals, out + reals);
    } else if (m.groups > 0) {
        LS_LAUNCH(q, combine_kernel, ls_row_blocks(m.groups), LS_THREADS, 0, m, left, right, out);
    }
}

/* Maxima are negated; an element that nothing arrived in gives nothing back. back may be dgot. */
__global__ static void begin_kernel(ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back)
{
    const int64_t stride = ls_monoid_stride(m);
    LS_EACH_ROW(g, m.groups)
    {
        const ls_real top = got[g * stride];
        const int empty = top == -INFINITY;
        LS_EACH_LANE(i, stride)
        {
            const ls_real x = i > 0 ? dgot[g * stride + i] : empty ? -INFINITY : -top;
            back[g * stride + i] = i > 0 && i <= m.scaled && empty ? 0 : x;
        }
    }
}

static void vjp_begin(ls_queue *q, ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back)
{
    if (!m.has_max)
        copy(q, back, dgot, (size_t)ls_monoid_size(m) * sizeof *back);
    else if (m.groups > 0)
        LS_LAUNCH(q, begin_kernel, ls_row_blocks(m.groups), LS_THREADS, 0, m, got, dgot, back);
}

/* dsent may be arrived. */
__global__ static void end_kernel(ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent)
{
    const int64_t stride = ls_monoid_stride(m);
    LS_EACH_ROW(g, m.groups)
    {
        const ls_real back = arrived[g * stride];
        const ls_real w = back == -INFINITY ? 0 : ls_statistics_weight(sent[g * stride], -back);
        __syncwarp();
        LS_EACH_LANE(i, stride)
        {
            const ls_real x = arrived[g * stride + i];
            dsent[g * stride + i] = i == 0 ? 0 : i <= m.scaled ? x * w : x;
        }
    }
}

static void vjp_end(ls_queue *q, ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent)
{
    if (!m.has_max)
        copy(q, dsent, arrived, (size_t)ls_monoid_size(m) * sizeof *dsent);
    else if (m.groups > 0)
        LS_LAUNCH(q, end_kernel, ls_row_blocks(m.groups), LS_THREADS, 0, m, sent, arrived, dsent);
}

extern "C" const ls_memory ls_cuda_memory = {copy,       zero,     copy_rows, add_rows,  clear_rows,
                                             mean_heads, identity, combine,   vjp_begin, vjp_end};
