/* The dense layers. All but the linear ones are bound by memory, so each touches its rows as few times as it can and
 * its loops are written to become vector code.
 *
 * Sums. Statistics over a row are taken in double. Sums over rows (gradients of biases and norms) run over a tile of
 * columns small enough for the first cache, and in pieces, so that their rounding errors grow with the square root of
 * the number of pieces and not with the number of rows. */
#include "dense.h"

#include "erf.h"
#include "gemm.h"

enum { TILE_COLUMNS = 256, TILE_ROWS = 32 };

/* ------------------------------------------------------------------------------------------------ linear */

static void linear_in(ls_queue *queue, ls_precision precision, int64_t rows, int64_t in, int64_t out, const ls_real *x,
                      const ls_real *w, const ls_real *b, ls_real *y)
{
    (void)queue, (void)precision;
    /* BLAS clears C before it adds to it: writing the bias instead costs the same and saves a pass */
    if (b)
        for (int64_t r = 0; r < rows; r++) memcpy(y + r * out, b, (size_t)out * sizeof *y);
    ls_gemm(0, 1, rows, out, in, 1, x, in, w, in, b ? 1 : 0, y, out);
}

static void linear(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w, const ls_real *b,
                   ls_operand y)
{
    linear_in(queue, LS_FLOAT32, rows, in, out, x.p, w.p, b, y.p);
}

/* sum (4,2) = four rows of x times two of w. Every sum is made by the same instructions in the same order. */
static void dots(int64_t in, const ls_real *const x[4], const ls_real *const w[2], ls_real sum[8])
{
    const ls_real *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *w0 = w[0], *w1 = w[1];
    ls_real a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
    for (int64_t i = 0; i < in; i++) {
        a += x0[i] * w0[i], b += x0[i] * w1[i];
        c += x1[i] * w0[i], d += x1[i] * w1[i];
        e += x2[i] * w0[i], f += x2[i] * w1[i];
        g += x3[i] * w0[i], h += x3[i] * w1[i];
    }
    sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d, sum[4] = e, sum[5] = f, sum[6] = g, sum[7] = h;
}

/* Rows [r, r + n) of y, n <= 4, columns [o, end). */
static void few_rows(int64_t r, int64_t n, int64_t o, int64_t end, int64_t in, int64_t out, const ls_real *x,
                     const ls_real *w, const ls_real *b, ls_real *y)
{
    for (; o < end; o += 2) {
        const ls_real *xs[4], *ws[2];
        ls_real sum[8];
        for (int64_t i = 0; i < 4; i++) xs[i] = x + (r + ls_min(i, n - 1)) * in; /* the last ones over again */
        for (int64_t j = 0; j < 2; j++) ws[j] = w + ls_min(o + j, end - 1) * in;
        dots(in, xs, ws, sum);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < ls_min(2, end - o); j++)
                y[(r + i) * out + o + j] = sum[2 * i + j] + (b ? b[o + j] : 0);
    }
}

/* Tiles of 64 rows stay in the second cache, 8 rows of w in the first. */
static void linear_alike(ls_queue *queue, int64_t rows, int64_t in, int64_t out, const ls_real *x, const ls_real *w,
                         const ls_real *b, ls_real *y)
{
    (void)queue;
    for (int64_t tile = 0; tile < rows; tile += 64)
        for (int64_t o = 0; o < out; o += 8)
            for (int64_t r = tile; r < ls_min(tile + 64, rows); r += 4)
                few_rows(r, ls_min(4, rows - r), o, ls_min(o + 8, out), in, out, x, w, b, y);
}

/* sum (n) += Σ_rows x (rows,n) */
static void column_sums(ls_queue *queue, int64_t rows, int64_t n, ls_operand of, ls_real *sum)
{
    (void)queue;
    const ls_real *x = of.p;
    for (int64_t j0 = 0; j0 < n; j0 += TILE_COLUMNS) {
        const int64_t columns = ls_min(TILE_COLUMNS, n - j0);
        double acc[TILE_COLUMNS] = {0};
        for (int64_t r = 0; r < rows; r++) {
            const ls_real *xr = x + r * n + j0;
#pragma omp simd
            for (int64_t j = 0; j < columns; j++) acc[j] += (double)xr[j];
        }
        for (int64_t j = 0; j < columns; j++) sum[j0 + j] += (ls_real)acc[j];
    }
}

static void sum_and_copy(ls_queue *queue, int64_t rows, int64_t n, const ls_real *x, ls_real *sum, ls_operand y)
{
    column_sums(queue, rows, n, ls_reals(x), sum);
    if (rows > 0) memcpy(y.p, x, (size_t)(rows * n) * sizeof *x);
}

static void linear_backward(ls_queue *queue, int64_t rows, int64_t in, int64_t out, ls_operand x, ls_operand w,
                            ls_operand dy, ls_operand dx, int accumulate_dx, ls_real *dw)
{
    (void)queue;
    if (dw) ls_gemm(1, 0, out, in, rows, 1, dy.p, out, x.p, in, 1, dw, in);
    if (dx.p) ls_gemm(0, 0, rows, in, out, 1, dy.p, out, w.p, in, accumulate_dx ? 1 : 0, dx.p, in);
}

/* ------------------------------------------------------------------------------------------------ layer norm */

/* One pass: var = E[(x-c)²] - E[x-c]². With c an element of the row, (c - mean)² <= E·var, so the difference loses no
 * more than a factor E of double's precision, however far the row is from 0. */
static void moments(int64_t n, const ls_real *x, double *mean, double *var)
{
    const double c = (double)x[0];
    double s = 0, q = 0;
#pragma omp simd reduction(+ : s, q)
    for (int64_t i = 0; i < n; i++) {
        const double d = (double)x[i] - c;
        s += d;
        q += d * d;
    }
    s /= (double)n;
    q = q / (double)n - s * s;
    *mean = c + s;
    *var = q < 0 ? 0 : q; /* NaN stays */
}

static void layer_norm(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w, const ls_real *b,
                       ls_operand y, ls_real *mean, ls_real *rstd)
{
    (void)queue;
    for (int64_t r = 0; r < rows; r++) {
        const ls_real *xr = x + r * E;
        ls_real *yr = (ls_real *)y.p + r * E;
        double m, var;
        moments(E, xr, &m, &var);
        const ls_real mu = mean[r] = (ls_real)m;
        const ls_real rs = rstd[r] = (ls_real)(1 / sqrt(var + 1e-5));
#pragma omp simd
        for (int64_t j = 0; j < E; j++) yr[j] = (xr[j] - mu) * rs * w[j] + b[j];
    }
}

/* With g = dy·w and x̂ = (x - mean)·rstd: dx = rstd·(g - avg(g) - x̂·avg(g·x̂)), dw += Σ dy·x̂, db += Σ dy. The averages
 * of a tile of rows come first; then, column by column tile, everything else while the rows are still in the cache. */
static void layer_norm_backward(ls_queue *queue, int64_t rows, int64_t E, const ls_real *x, const ls_real *w,
                                const ls_real *mean, const ls_real *rstd, const ls_real *dy, ls_real *dx,
                                int accumulate_dx, ls_real *dw, ls_real *db)
{
    (void)queue;
    for (int64_t r0 = 0; r0 < rows; r0 += TILE_ROWS) {
        const int64_t r1 = ls_min(r0 + TILE_ROWS, rows);
        ls_real avg_g[TILE_ROWS], avg_gx[TILE_ROWS];
        for (int64_t r = r0; r < r1; r++) {
            const ls_real *xr = x + r * E, *dyr = dy + r * E, mu = mean[r], rs = rstd[r];
            double sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
            for (int64_t j = 0; j < E; j++) {
                const ls_real g = dyr[j] * w[j];
                sum_g += (double)g;
                sum_gx += (double)(g * ((xr[j] - mu) * rs));
            }
            avg_g[r - r0] = (ls_real)(sum_g / (double)E);
            avg_gx[r - r0] = (ls_real)(sum_gx / (double)E);
        }
        for (int64_t j0 = 0; j0 < E; j0 += TILE_COLUMNS) {
            const int64_t columns = ls_min(TILE_COLUMNS, E - j0);
            ls_real sum_w[TILE_COLUMNS] = {0}, sum_b[TILE_COLUMNS] = {0};
            for (int64_t r = r0; r < r1; r++) {
                const ls_real *xr = x + r * E + j0, *dyr = dy + r * E + j0, *wr = w + j0;
                ls_real *dxr = dx + r * E + j0;
                const ls_real mu = mean[r], rs = rstd[r], ag = avg_g[r - r0], agx = avg_gx[r - r0];
#pragma omp simd
                for (int64_t j = 0; j < columns; j++) {
                    const ls_real d = dyr[j], xhat = (xr[j] - mu) * rs, old = accumulate_dx ? dxr[j] : 0;
                    sum_w[j] += d * xhat;
                    sum_b[j] += d;
                    dxr[j] = old + rs * (d * wr[j] - ag - xhat * agx);
                }
            }
            for (int64_t j = 0; j < columns; j++) {
                dw[j0 + j] += sum_w[j];
                db[j0 + j] += sum_b[j];
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------ activations */

/* f of n numbers: y = f(x), or y = dy f'(x). */
typedef void activation(int64_t n, const ls_real *x, const ls_real *dy, ls_real *y);

static inline void gelu_of(int64_t n, const ls_real *x, const ls_real *dy, ls_real *y)
{
    (void)dy;
    LS_ERF_LOOP
    for (int64_t i = 0; i < n; i++) {
        ls_real density;
        y[i] = x[i] * ls_normal_cdf(x[i], &density);
    }
}

/* (x Φ(x))' = Φ(x) + x φ(x) */
static inline void gelu_gradient(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx)
{
    LS_ERF_LOOP
    for (int64_t i = 0; i < n; i++) {
        ls_real density;
        const ls_real cdf = ls_normal_cdf(x[i], &density);
        dx[i] = dy[i] * (cdf + x[i] * density);
    }
}

/* Written so that NaN goes through and is seen. */
static inline void relu_of(int64_t n, const ls_real *x, const ls_real *dy, ls_real *y)
{
    (void)dy;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = x[i] < 0 ? 0 : x[i];
}

static inline void relu_gradient(int64_t n, const ls_real *x, const ls_real *dy, ls_real *dx)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) dx[i] = x[i] > 0 ? dy[i] : 0;
}

/* y (rows,n) = f(x + b), by pieces of a row where there is a bias. dy NULL where f does not ask for it. */
static inline void through(activation f, int64_t rows, int64_t n, const ls_real *x, const ls_real *b, const ls_real *dy,
                           ls_real *y)
{
    if (b == NULL) {
        f(rows * n, x, dy, y);
        return;
    }
    for (int64_t i = 0; i < rows * n; i += n)
        for (int64_t j0 = 0; j0 < n; j0 += TILE_COLUMNS) {
            const int64_t columns = ls_min(TILE_COLUMNS, n - j0);
            const ls_real *xr = x + i + j0, *br = b + j0;
            ls_real z[TILE_COLUMNS];
#pragma omp simd
            for (int64_t j = 0; j < columns; j++) z[j] = xr[j] + br[j];
            f(columns, z, dy == NULL ? NULL : dy + i + j0, y + i + j0);
        }
}

static void gelu(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y)
{
    (void)queue;
    through(gelu_of, rows, n, x.p, b, NULL, y.p);
}

static void gelu_backward(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx)
{
    (void)queue;
    through(gelu_gradient, rows, n, x.p, b, dy.p, dx.p);
}

static void relu(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand y)
{
    (void)queue;
    through(relu_of, rows, n, x.p, b, NULL, y.p);
}

static void relu_backward(ls_queue *queue, int64_t rows, int64_t n, ls_operand x, const ls_real *b, ls_operand dy,
                          ls_operand dx)
{
    (void)queue;
    through(relu_gradient, rows, n, x.p, b, dy.p, dx.p);
}

/* ------------------------------------------------------------------------------------------------ embedding */

static void embedding(ls_queue *queue, int64_t rows, int64_t E, const int32_t *token, const ls_real *table,
                      double scale, ls_real *y)
{
    (void)queue;
    const ls_real a = (ls_real)scale;
    for (int64_t r = 0; r < rows; r++) {
        ls_real *yr = y + r * E;
        if (token[r] < 0) {
            ls_zero(yr, E);
            continue;
        }
        const ls_real *from = table + token[r] * E;
#pragma omp simd
        for (int64_t j = 0; j < E; j++) yr[j] = a * from[j];
    }
}

static void embedding_backward(ls_queue *queue, int64_t rows, int64_t V, int64_t E, const int32_t *token, double scale,
                               const ls_real *dy, ls_real *dtable)
{
    (void)queue, (void)V;
    const ls_real a = (ls_real)scale;
    for (int64_t r = 0; r < rows; r++) {
        if (token[r] < 0) continue;
        const ls_real *dyr = dy + r * E;
        ls_real *to = dtable + token[r] * E;
#pragma omp simd
        for (int64_t j = 0; j < E; j++) to[j] += a * dyr[j];
    }
}

/* ------------------------------------------------------------------------------------------------ positions */

enum { ANCHOR = 64, TILE_FREQUENCIES = 128 };

/* sin and cos of p f from the position before by the rotation through f, in double, and anew from libm at every global
 * multiple of ANCHOR. A row's value is thus the same wherever the piece that holds it begins: its walk always starts at
 * its own anchor. The walk adds 1e-14; what remains is the rounding of p f, at most 5e-7 at p = 2^31. */
static void add_positions(ls_queue *queue, int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x)
{
    (void)queue;
    const int64_t half = E / 2;
    for (int64_t i0 = 0; i0 < half; i0 += TILE_FREQUENCIES) {
        const int64_t n = ls_min(TILE_FREQUENCIES, half - i0);
        double f[TILE_FREQUENCIES], sin_f[TILE_FREQUENCIES], cos_f[TILE_FREQUENCIES];
        double s[TILE_FREQUENCIES], c[TILE_FREQUENCIES];
        for (int64_t i = 0; i < n; i++) {
            f[i] = pow(10000, -2 * (double)(i0 + i) / (double)E);
            sin_f[i] = sin(f[i]);
            cos_f[i] = cos(f[i]);
        }
        for (int64_t p = lo - lo % ANCHOR; p < lo + T; p++) {
            for (int64_t i = 0; i < n && p % ANCHOR == 0; i++) {
                s[i] = sin((double)p * f[i]);
                c[i] = cos((double)p * f[i]);
            }
            for (int64_t b = 0; b < B && p >= lo; b++) {
                ls_real *row = x + (b * T + p - lo) * E + i0;
#pragma omp simd
                for (int64_t i = 0; i < n; i++) {
                    row[i] += (ls_real)s[i];
                    row[half + i] += (ls_real)c[i];
                }
            }
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const double old = s[i];
                s[i] = old * cos_f[i] + c[i] * sin_f[i];
                c[i] = c[i] * cos_f[i] - old * sin_f[i];
            }
        }
    }
}

/* ------------------------------------------------------------------------------------------------ dropout */

enum { BLOCK = 64, PER_BLOCK = 8 * BLOCK };

/* The words of ls_random4 for BLOCK indices in a row: Philox4x32-10 written out once more, with a counter per lane,
 * since no compiler makes vector code of a function in another file. */
static void random_block(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index, uint32_t word[4 * BLOCK])
{
#pragma omp simd
    for (int j = 0; j < BLOCK; j++) {
        const uint64_t i = index + (uint64_t)j;
        uint32_t a = (uint32_t)i, b = (uint32_t)(i >> 32), c = step, d = stream;
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++) {
            const uint64_t p = (uint64_t)a * 0xD2511F53U, q = (uint64_t)c * 0xCD9E8D57U;
            a = (uint32_t)(q >> 32) ^ b ^ key0;
            b = (uint32_t)q;
            c = (uint32_t)(p >> 32) ^ d ^ key1;
            d = (uint32_t)p;
            key0 += 0x9E3779B9U;
            key1 += 0xBB67AE85U;
        }
        word[4 * j] = a;
        word[4 * j + 1] = b;
        word[4 * j + 2] = c;
        word[4 * j + 3] = d;
    }
}

/* Element e of row `position` has 16 bits of its own: half e%8 of the four words of ls_random4 for step sample + b,
 * index position·⌈E/8⌉ + e/8 (as they lie in memory: little-endian machines have the low half of a word first). It is
 * kept if they are >= drop, the rate rounded to 1/65536; kept elements are divided by the true probability 1 -
 * drop/65536, so the expected value is exact for any rate. */
typedef union random_halves {
    uint32_t word[4 * BLOCK];
    uint16_t half[PER_BLOCK];
} random_halves;

/* z (n) = x + b, where x begins with element e of a row. */
static void add_bias(int64_t n, int64_t e, int64_t E, const ls_real *x, const ls_real *b, ls_real *z)
{
    for (int64_t i = 0; i < n; e = 0) {
        const int64_t m = ls_min(E - e, n - i);
#pragma omp simd
        for (int64_t j = 0; j < m; j++) z[i + j] = x[i + j] + b[e + j];
        i += m;
    }
}

/* y = onto + drop(x + b); b, onto NULL: 0 */
static void drop_rows(int64_t B, int64_t T, int64_t E, ls_drop d, const ls_real *x, const ls_real *b,
                      const ls_real *onto, ls_real *y)
{
    const uint32_t drop = (uint32_t)(d.rate * 65536 + 0.5);
    const ls_real scale = drop < 65536 ? (ls_real)(65536.0 / (65536.0 - drop)) : 0;
    const int64_t counters = (E + 7) / 8;
    /* without a remainder the counters of one row continue those of the row before: all T are as one row */
    const int64_t rows = E % 8 ? T : 1, n = E % 8 ? E : T * E;
    random_halves random = {{0}};
    for (int64_t s = 0; s < B; s++) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t row = (s * rows + r) * n;
            for (int64_t i = 0; i < n; i += PER_BLOCK) {
                const int64_t m = ls_min(PER_BLOCK, n - i);
                const ls_real *xr = x + row + i, *over = onto == NULL ? NULL : onto + row + i;
                ls_real z[PER_BLOCK], *yr = y + row + i;
                if (drop > 0)
                    random_block(d.seed, d.stream, (uint32_t)(d.sample + (uint64_t)s),
                                 (uint64_t)((d.lo + r) * counters + i / 8), random.word);
                if (b != NULL) {
                    add_bias(m, i % E, E, xr, b, z);
                    xr = z;
                }
                if (over == NULL) {
#pragma omp simd
                    for (int64_t j = 0; j < m; j++) yr[j] = random.half[j] < drop ? 0 : xr[j] * scale;
                } else {
#pragma omp simd
                    for (int64_t j = 0; j < m; j++) yr[j] = over[j] + (random.half[j] < drop ? 0 : xr[j] * scale);
                }
            }
        }
    }
}

static void dropout(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *x, ls_operand y)
{
    (void)queue;
    if (drop.rate > 0 || y.p != x) drop_rows(B, T, E, drop, x, NULL, NULL, y.p);
}

static void residual(ls_queue *queue, int64_t B, int64_t T, int64_t E, ls_drop drop, const ls_real *branch,
                     const ls_real *b, const ls_real *x, ls_real *y)
{
    (void)queue;
    drop_rows(B, T, E, drop, branch, b, x, y);
}

/* ------------------------------------------------------------------------------------------------ rows */

static void zero_rows(ls_queue *queue, int64_t B, int64_t T, int64_t E, int batch_first, const uint8_t *pad,
                      const ls_real *x, ls_operand to)
{
    (void)queue;
    ls_real *y = to.p;
    for (int64_t r = 0; r < B * T; r++) {
        const int64_t b = batch_first ? r / T : r % B, t = batch_first ? r % T : r / B;
        if (pad && pad[b * T + t])
            ls_zero(y + r * E, E);
        else if (y != x)
            memcpy(y + r * E, x + r * E, (size_t)E * sizeof *y);
    }
}

static void add(ls_queue *queue, int64_t n, const ls_real *x, ls_real *y)
{
    (void)queue;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

static void copy(ls_queue *queue, int64_t n, ls_operand x, ls_operand y)
{
    (void)queue;
    if (n > 0) memcpy(y.p, x.p, (size_t)(n * x.size));
}

static void divide(ls_queue *queue, int64_t n, const double *sums, double by, ls_real *y)
{
    (void)queue;
    for (int64_t i = 0; i < n; i++) y[i] = (ls_real)(sums[i] / by);
}

static void zero(ls_queue *queue, size_t bytes, void *x)
{
    (void)queue;
    if (bytes > 0) memset(x, 0, bytes);
}

const ls_dense_ops ls_dense_cpu = {.linear = linear,
                                   .linear_alike = linear_alike,
                                   .linear_in = linear_in,
                                   .linear_backward = linear_backward,
                                   .column_sums = column_sums,
                                   .sum_and_copy = sum_and_copy,
                                   .layer_norm = layer_norm,
                                   .layer_norm_backward = layer_norm_backward,
                                   .gelu = gelu,
                                   .gelu_backward = gelu_backward,
                                   .relu = relu,
                                   .relu_backward = relu_backward,
                                   .embedding = embedding,
                                   .embedding_backward = embedding_backward,
                                   .add_positions = add_positions,
                                   .dropout = dropout,
                                   .residual = residual,
                                   .cross_entropy = ls_cross_entropy_cpu,
                                   .zero_rows = zero_rows,
                                   .add = add,
                                   .copy = copy,
                                   .divide = divide,
                                   .zero = zero};
