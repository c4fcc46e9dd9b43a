/* Longshort's LayerNorms on a GPU, in double; formulas in longshort_norm.c. A warp has a row, backward first to make
 * the four averages of it and its gradient, then for dx; sums over rows are made in slices, for 32 columns by 8 warps.
 */
#include "longshort_cuda.h"

enum { WARPS = LS_THREADS / LS_WARP };

namespace
{
typedef struct moments {
    double mean, inverse, g, gx; /* of a row; averages of dy w and of dy w x̂ */
} moments;
} // namespace

/* Row t of group g, and column e = h d + f of it: found once for all views, and without dividing for each element. */
namespace
{
typedef struct place {
    int64_t g, t;
} place;
typedef struct column {
    int64_t e, h, f;
} column;
} // namespace

static __device__ place place_of(const longshort_rows *x, int64_t row)
{
    const int64_t g = row / x->n;
    return place{g, row - g * x->n};
}

static __device__ column column_of(const longshort_rows *x, int64_t e)
{
    const int64_t h = e / x->d;
    return column{e, h, e - h * x->d};
}

static __device__ void next(const longshort_rows *x, column *c)
{
    c->e += LS_WARP;
    for (c->f += LS_WARP; c->f >= x->d; c->f -= x->d) c->h++;
}

static __device__ ls_real *element(ls_view v, place at, column c)
{
    return ls_row(v, at.g, c.h, at.t) + c.f;
}

#define EACH_COLUMN(c, of)                                                                                             \
    for (column c = column_of(&(of), threadIdx.x % LS_WARP); c.e < (of).H * (of).d; next(&(of), &c))

/* In one pass: var = avg((x-c)²) - avg(x-c)², with c an element of the row so that the difference keeps its digits. */
static __device__ void moments_of(const longshort_rows *x, place at, moments *m)
{
    const int64_t E = x->H * x->d;
    const double c = (double)*element(x->v, at, column{0, 0, 0});
    double s = 0, q = 0;
    EACH_COLUMN(i, *x)
    {
        const double a = (double)*element(x->v, at, i) - c;
        s += a;
        q += a * a;
    }
    s = ls_warp_sum(s) / (double)E;
    q = ls_warp_sum(q) / (double)E - s * s;
    m->mean = c + s;
    m->inverse = 1 / sqrt((q < 0 ? 0 : q) + 1e-5);
}

static __global__ void normalise(longshort_rows x, const uint8_t *pad, const ls_real *w, const ls_real *b, ls_view y)
{
    LS_EACH_ROW(row, x.groups * x.n)
    {
        const int padded = ls_is_padded(pad, row);
        const place at = place_of(&x, row);
        moments m = {0, 0, 0, 0};
        if (!padded) moments_of(&x, at, &m);
        EACH_COLUMN(c, x)
        {
            ls_real z = 0;
            if (!padded) {
                const double xhat = ((double)*element(x.v, at, c) - m.mean) * m.inverse;
                z = (ls_real)(xhat * (double)w[c.e] + (double)b[c.e]);
            }
            *element(y, at, c) = z;
        }
    }
}

static __global__ void make_moments(longshort_rows x, const uint8_t *pad, const ls_real *w, ls_view dy, moments *to)
{
    const int64_t E = x.H * x.d;
    LS_EACH_ROW(row, x.groups * x.n)
    {
        if (ls_is_padded(pad, row)) continue;
        const place at = place_of(&x, row);
        moments m = {0, 0, 0, 0};
        moments_of(&x, at, &m);
        EACH_COLUMN(c, x)
        {
            const double g = (double)*element(dy, at, c) * (double)w[c.e];
            m.g += g;
            m.gx += g * (((double)*element(x.v, at, c) - m.mean) * m.inverse);
        }
        m.g = ls_warp_sum(m.g) / (double)E;
        m.gx = ls_warp_sum(m.gx) / (double)E;
        if (threadIdx.x % LS_WARP == 0) to[row] = m;
    }
}

/* partial (slices,2,E): dw, db of every slices-th run of 8 rows. */
static __global__ void sum_columns(longshort_rows x, const uint8_t *pad, ls_view dy, const moments *of, double *partial)
{
    __shared__ double sum[2][WARPS][LS_WARP];
    const int64_t E = x.H * x.d, rows = x.groups * x.n, e = (int64_t)blockIdx.x * LS_WARP + threadIdx.x % LS_WARP;
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP;
    const column c = column_of(&x, e);
    double dw = 0, db = 0;
    for (int64_t row = (int64_t)blockIdx.y * WARPS + warp; row < rows && e < E; row += (int64_t)gridDim.y * WARPS) {
        if (ls_is_padded(pad, row)) continue;
        const place at = place_of(&x, row);
        const double d = (double)*element(dy, at, c);
        dw += d * (((double)*element(x.v, at, c) - of[row].mean) * of[row].inverse);
        db += d;
    }
    sum[0][warp][lane] = dw;
    sum[1][warp][lane] = db;
    __syncthreads();
    if (warp > 1 || e >= E) return;
    double all = 0;
    for (int i = 0; i < WARPS; i++) all += sum[warp][i][lane];
    partial[(blockIdx.y * 2 + warp) * E + e] = all;
}

/* sums (2,E) += the slices. */
static __global__ void add_slices(int64_t E, int64_t slices, const double *partial, double *sums)
{
    LS_EACH(i, 2 * E)
    {
        double all = 0;
        for (int64_t s = 0; s < slices; s++) all += partial[s * 2 * E + i];
        sums[i] += all;
    }
}

static __global__ void differentiate(longshort_rows x, const uint8_t *pad, const ls_real *w, ls_view dy,
                                     const moments *of, ls_view dx, int add)
{
    LS_EACH_ROW(row, x.groups * x.n)
    {
        const int padded = ls_is_padded(pad, row);
        const place at = place_of(&x, row);
        moments m = {0, 0, 0, 0};
        if (!padded) m = of[row];
        EACH_COLUMN(c, x)
        {
            ls_real *to = element(dx, at, c), y = 0;
            if (!padded) {
                const double xhat = ((double)*element(x.v, at, c) - m.mean) * m.inverse;
                y = (ls_real)(m.inverse * ((double)*element(dy, at, c) * (double)w[c.e] - m.g - xhat * m.gx));
            }
            *to = add ? *to + y : y;
        }
    }
}

static __global__ void clear(int64_t n, double *x)
{
    LS_EACH(i, n)
    x[i] = 0;
}

static __global__ void add_rounded(int64_t n, const double *x, ls_real *y)
{
    LS_EACH(i, n)
    y[i] += (ls_real)x[i];
}

void ls_longshort_cuda_norm(ls_pass *p, int weight, longshort_rows x, const uint8_t *pad, ls_view y)
{
    const int64_t rows = x.groups * x.n;
    if (rows > 0)
        LS_LAUNCH(p->queue, normalise, ls_row_blocks(rows), LS_THREADS, 0, x, pad, parameter(p, weight),
                  parameter(p, weight + 1), y);
}

void ls_longshort_cuda_norm_backward(ls_pass *p, int weight, longshort_rows x, const uint8_t *pad, ls_view dy,
                                     ls_view dx, int add)
{
    const int64_t rows = x.groups * x.n, E = x.H * x.d, slices = ls_min(NORM_SLICES, (rows + 63) / 64);
    moments *m = (moments *)(void *)p->work[MOMENTS];
    double *norms = (double *)(void *)p->work[NORMS], *partial = norms + 4 * E;
    if (rows == 0) return;
    const dim3 columns_and_slices((unsigned)((E + LS_WARP - 1) / LS_WARP), (unsigned)slices);
    LS_LAUNCH(p->queue, make_moments, ls_row_blocks(rows), LS_THREADS, 0, x, pad, parameter(p, weight), dy, m);
    LS_LAUNCH(p->queue, sum_columns, columns_and_slices, LS_THREADS, 0, x, pad, dy, m, partial);
    LS_LAUNCH(p->queue, add_slices, ls_blocks(2 * E, LS_THREADS), LS_THREADS, 0, E, slices, partial,
              norms + weight * E);
    LS_LAUNCH(p->queue, differentiate, ls_row_blocks(rows), LS_THREADS, 0, x, pad, parameter(p, weight), dy, m, dx,
              add);
}

void ls_longshort_cuda_begin_norms(ls_pass *p)
{
    const int64_t n = 4 * p->H * p->d;
    LS_LAUNCH(p->queue, clear, ls_blocks(n, LS_THREADS), LS_THREADS, 0, n, (double *)(void *)p->work[NORMS]);
}

/* (4,E): in the order of the parameters NEAR_WEIGHT .. FAR_BIAS. */
void ls_longshort_cuda_end_norms(ls_pass *p)
{
    const int64_t E = p->H * p->d;
    const double *norms = (const double *)(const void *)p->work[NORMS];
    for (int which = NEAR_WEIGHT; which <= FAR_BIAS; which++)
        LS_LAUNCH(p->queue, add_rounded, ls_blocks(E, LS_THREADS), LS_THREADS, 0, E, norms + which * E,
                  parameter_gradient(p, which));
}
