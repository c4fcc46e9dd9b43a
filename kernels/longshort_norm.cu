/* Longshort's LayerNorms on a GPU, in double; formulas in longshort_norm.c. Forward a warp has a row. Backward, first a
 * warp has a row and its gradient and makes their four averages; then each element of dx is on its own, and sums over
 * rows are made in slices, for 32 columns by 8 warps. */
#include "longshort_cuda.h"

enum { WARPS = LS_THREADS / LS_WARP };

namespace
{
typedef struct moments {
    double mean, inverse, g, gx; /* of a row; averages of dy w and of dy w x̂ */
} moments;
} // namespace

static __device__ ls_real element(const longshort_rows *x, ls_view v, int64_t row, int64_t e)
{
    return ls_row(v, row / x->n, e / x->d, row % x->n)[e % x->d];
}

/* In one pass: var = avg((x-c)²) - avg(x-c)², with c an element of the row so that the difference keeps its digits. */
static __device__ void moments_of(const longshort_rows *x, int64_t row, moments *m)
{
    const int64_t E = x->H * x->d;
    const double c = (double)element(x, x->v, row, 0);
    double s = 0, q = 0;
    for (int64_t e = threadIdx.x % LS_WARP; e < E; e += LS_WARP) {
        const double a = (double)element(x, x->v, row, e) - c;
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
    const int64_t E = x.H * x.d;
    const int lane = threadIdx.x % LS_WARP;
    for (int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / LS_WARP; row < x.groups * x.n;
         row += (int64_t)gridDim.x * WARPS) {
        const int padded = ls_is_padded(pad, row);
        moments m;
        if (!padded) moments_of(&x, row, &m);
        for (int64_t e = lane; e < E; e += LS_WARP) {
            ls_real *to = &ls_row(y, row / x.n, e / x.d, row % x.n)[e % x.d];
            *to =
                padded
                    ? 0
                    : (ls_real)(((double)element(&x, x.v, row, e) - m.mean) * m.inverse * (double)w[e] + (double)b[e]);
        }
    }
}

static __global__ void make_moments(longshort_rows x, const uint8_t *pad, const ls_real *w, ls_view dy, moments *to)
{
    const int64_t E = x.H * x.d;
    const int lane = threadIdx.x % LS_WARP;
    for (int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / LS_WARP; row < x.groups * x.n;
         row += (int64_t)gridDim.x * WARPS) {
        if (ls_is_padded(pad, row)) continue;
        moments m = {0, 0, 0, 0};
        moments_of(&x, row, &m);
        for (int64_t e = lane; e < E; e += LS_WARP) {
            const double g = (double)element(&x, dy, row, e) * (double)w[e];
            m.g += g;
            m.gx += g * (((double)element(&x, x.v, row, e) - m.mean) * m.inverse);
        }
        m.g = ls_warp_sum(m.g) / (double)E;
        m.gx = ls_warp_sum(m.gx) / (double)E;
        if (lane == 0) to[row] = m;
    }
}

/* partial (slices,2,E): dw, db of every slices-th run of 8 rows. */
static __global__ void sum_columns(longshort_rows x, const uint8_t *pad, ls_view dy, const moments *of, double *partial)
{
    __shared__ double sum[2][WARPS][LS_WARP];
    const int64_t E = x.H * x.d, rows = x.groups * x.n, e = (int64_t)blockIdx.x * LS_WARP + threadIdx.x % LS_WARP;
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP;
    double dw = 0, db = 0;
    for (int64_t row = (int64_t)blockIdx.y * WARPS + warp; row < rows && e < E; row += (int64_t)gridDim.y * WARPS) {
        if (ls_is_padded(pad, row)) continue;
        const double d = (double)element(&x, dy, row, e);
        dw += d * (((double)element(&x, x.v, row, e) - of[row].mean) * of[row].inverse);
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
    const int64_t E = x.H * x.d;
    LS_EACH(i, x.groups * x.n * E)
    {
        const int64_t row = i / E, e = i % E;
        ls_real *to = &ls_row(dx, row / x.n, e / x.d, row % x.n)[e % x.d], y = 0;
        if (!ls_is_padded(pad, row)) {
            const moments m = of[row];
            const double xhat = ((double)element(&x, x.v, row, e) - m.mean) * m.inverse;
            y = (ls_real)(m.inverse * ((double)element(&x, dy, row, e) * (double)w[e] - m.g - xhat * m.gx));
        }
        *to = add ? *to + y : y;
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
        LS_LAUNCH(p->queue, normalise, ls_blocks(rows, WARPS), LS_THREADS, 0, x, pad, parameter(p, weight),
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
    LS_LAUNCH(p->queue, make_moments, ls_blocks(rows, WARPS), LS_THREADS, 0, x, pad, parameter(p, weight), dy, m);
    LS_LAUNCH(p->queue, sum_columns, columns_and_slices, LS_THREADS, 0, x, pad, dy, m, partial);
    LS_LAUNCH(p->queue, add_slices, ls_blocks(2 * E, LS_THREADS), LS_THREADS, 0, E, slices, partial,
              norms + weight * E);
    LS_LAUNCH(p->queue, differentiate, ls_blocks(rows * E, LS_THREADS), LS_THREADS, 0, x, pad, parameter(p, weight), dy,
              m, dx, add);
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
