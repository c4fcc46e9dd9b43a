/* Longshort's LayerNorms, y = (x - mean)/σ w + b, σ² = var + 1e-5, in double. A gradient through two of them, landmarks
 * or summaries after keys, is a small difference of large numbers, above all where there are few features:
 *
 *   g = dy w,  x̂ = (x - mean)/σ,  dx = (g - avg(g) - x̂ avg(g x̂))/σ,  dw += Σ_rows dy x̂,  db += Σ_rows dy */
#include "longshort.h"

/* In one pass: var = avg((x-c)²) - avg(x-c)², with c an element of the row so that the difference keeps its digits. */
static void moments(int64_t E, const ls_real *x, double *mean, double *inverse)
{
    const double c = (double)x[0];
    double s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (int64_t i = 0; i < E; i++) {
        const double a = (double)x[i] - c;
        s += a;
        q += a * a;
    }
    s /= (double)E;
    q = q / (double)E - s * s;
    *mean = c + s;
    *inverse = 1 / sqrt((q < 0 ? 0 : q) + 1e-5);
}

void ls_longshort_norm(const ls_pass *p, int weight, int64_t rows, const ls_real *x, ls_real *y)
{
    const int64_t E = p->H * p->d;
    const ls_real *w = parameter(p, weight), *b = parameter(p, weight + 1);
    for (int64_t i = 0; i < rows; i++, x += E, y += E) {
        double mean, inverse;
        moments(E, x, &mean, &inverse);
#pragma omp simd
        for (int64_t e = 0; e < E; e++) y[e] = (ls_real)(((double)x[e] - mean) * inverse * (double)w[e] + (double)b[e]);
    }
}

void ls_longshort_norm_backward(const ls_pass *p, int weight, int64_t rows, const ls_real *x, const ls_real *dy,
                                ls_real *dx)
{
    const int64_t E = p->H * p->d;
    const ls_real *w = parameter(p, weight);
    double *dw = memory_of(p)->dnorm + weight * E, *db = dw + E;
    for (int64_t i = 0; i < rows; i++, x += E, dy += E, dx += E) {
        double mean, inverse, g = 0, gx = 0;
        moments(E, x, &mean, &inverse);
#pragma omp simd reduction(+ : g, gx)
        for (int64_t e = 0; e < E; e++) {
            const double d = (double)dy[e] * (double)w[e];
            g += d;
            gx += d * (((double)x[e] - mean) * inverse);
        }
        g /= (double)E;
        gx /= (double)E;
#pragma omp simd
        for (int64_t e = 0; e < E; e++) {
            const double d = (double)dy[e], xhat = ((double)x[e] - mean) * inverse;
            dw[e] += d * xhat;
            db[e] += d;
            dx[e] = (ls_real)(inverse * (d * (double)w[e] - g - xhat * gx));
        }
    }
}

/* dnorm (4,E): in the order of the parameters NEAR_WEIGHT .. FAR_BIAS. */
void ls_longshort_begin_norms(const ls_pass *p)
{
    memset(memory_of(p)->dnorm, 0, (size_t)(4 * p->H * p->d) * sizeof(double));
}

void ls_longshort_end_norms(const ls_pass *p)
{
    const int64_t E = p->H * p->d;
    for (int which = NEAR_WEIGHT; which <= FAR_BIAS; which++)
        for (int64_t e = 0; e < E; e++) parameter_gradient(p, which)[e] += (ls_real)memory_of(p)->dnorm[which * E + e];
}
