/* Causal linear attention on a GPU: within a chunk by pairs, to what was before by its state; backward in two sweeps.
 * Theory: linear_slabs.h. */
#include "linear_slabs.h"

/* What is kept of rows from slab to slab lies slab after slab. */
static void go_to_traced(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k)
{
    ls_linear_go_to(p, x, c, rows, k);
    const int64_t at = p->B * p->H * k * c.C;
    x->c = x->all_c + at;
    x->inverse = x->all_inverse + at;
    x->delta = x->all_delta + at;
}

static void go_to_causal(ls_pass *p, linear *x, cut c, int64_t k)
{
    go_to_traced(p, x, c, p->T, k);
    x->M = x->n = c.C;
    x->relative = 0;
    x->causal = 1;
}

/* Chunks made ready, their c found. */
static void load_causal(ls_pass *p, linear *x)
{
    ls_linear_load_queries(p, x);
    ls_linear_load_keys(p, x);
    ls_linear_follow_maxima(p, x);
    ls_linear_ready_keys(p, x, keys_of(p), after_chunks(x), 0);
    ls_linear_ready_queries(p, x, before_chunks(x), after_chunks(x), NULL, x->A);
}

/* S, z of each chunk := the state before it. */
static void find_prefixes(ls_pass *p, const linear *x)
{
    ls_linear_gather_keys(p, x);
    ls_linear_scan_states(p, x, before_chunks(x), KEEPS);
}

/* ------------------------------------------------------------------------------------------------ forward */

/* A block makes what a chunk gives out, 64 columns at a time: thread (row, column) of 16 x 16 has four rows, 16 apart,
 * of w and of the output, and of w the keys column, column + 16, .., of the output four columns side by side. */
enum { ACROSS = 16, ROWS_EACH = 4, WIDE = 16, SHORT_PITCH = WIDE + 4 }; /* WIDE features meet at a time */
static_assert(ACROSS * ROWS_EACH == CAUSAL_ROWS && ACROSS * ACROSS == LS_THREADS && ACROSS * 4 == DEEP,
              "a chunk's weights are shared among the threads of a block");
#define ROW ((int)threadIdx.x / ACROSS)
#define COLUMN ((int)threadIdx.x % ACROSS)

/* to (64,WIDE) = numbers [f0, f0 + WIDE) of `count` rows (.,width), 0 where there are none. */
__device__ static void load_features(const ls_real *rows, int64_t count, int64_t width, int64_t f0, ls_real *to)
{
    for (int i = threadIdx.x; i < CAUSAL_ROWS * WIDE; i += LS_THREADS) {
        const int64_t r = i / WIDE, f = i % WIDE;
        to[r * SHORT_PITCH + f] = r < count && f0 + f < width ? rows[r * width + f0 + f] : 0;
    }
}

/* to (WIDE,64) = numbers [e0, e0 + 64) of rows [f0, f0 + WIDE) of a state. */
__device__ static void load_state(const linear &x, const ls_real *S, int64_t f0, int64_t e0, ls_real *to)
{
    for (int i = threadIdx.x; i < WIDE * DEEP; i += LS_THREADS) {
        const int64_t f = i / DEEP, e = i % DEEP;
        to[f * PITCH + e] = f0 + f < x.F && e0 + e < x.d ? S[(f0 + f) * x.d + e0 + e] : 0;
    }
}

/* sum += a bᵀ over WIDE features. */
__device__ static void multiply_rows(const ls_real *a, const ls_real *b, ls_real (&sum)[4][4])
{
    for (int k = 0; k < WIDE; k += 4) {
        ls_four y[4];
#pragma unroll
        for (int v = 0; v < 4; v++) y[v] = ls_four_at(b + (COLUMN + v * ACROSS) * SHORT_PITCH + k);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const ls_four z = ls_four_at(a + (ROW + u * ACROSS) * SHORT_PITCH + k);
#pragma unroll
            for (int v = 0; v < 4; v++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[u][v] += z.v[j] * y[v].v[j];
        }
    }
}

/* sum += a b over n, a multiple of 4: rows of a lie `pitch` apart, those of b PITCH. */
__device__ static void multiply_columns(int n, const ls_real *a, int pitch, const ls_real *b, ls_real (&sum)[4][4])
{
    for (int k = 0; k < n; k += 4) {
        ls_four z[4];
#pragma unroll
        for (int u = 0; u < 4; u++) z[u] = ls_four_at(a + (ROW + u * ACROSS) * pitch + k);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const ls_four y = ls_four_at(b + (k + j) * PITCH + COLUMN * 4);
#pragma unroll
            for (int u = 0; u < 4; u++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[u][c] += z[u].v[j] * y.v[c];
        }
    }
}

/* Over the 16 threads that have the same rows. */
__device__ static inline double row_sum(double x)
{
    for (int step = ACROSS / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* sum = a·b of the pairs of a chunk, which begins with row R. a, b: shared memory of (64,WIDE). */
__device__ static void multiply_near(const linear &x, int64_t P, int64_t R, ls_real last, ls_real *a, ls_real *b,
                                     ls_real (&sum)[4][4])
{
    if (is_steep(x, P, last)) { /* pair by pair, exponentials seen from where the query sees them */
        for (int u = 0; u < 4; u++)
            for (int v = 0; v < 4; v++) {
                const int64_t q = ROW + u * ACROSS, j = COLUMN + v * ACROSS;
                for (int64_t f = 0; f < x.r && j <= q && q < x.s.C; f++)
                    sum[u][v] += x.a[(R + q) * x.r + f] * seen_from(x, R + j, f, x.c[R + q]);
            }
        return;
    }
    for (int64_t f = 0; f < x.r; f += WIDE) {
        __syncthreads();
        load_features(x.a_near + R * x.r, x.s.C, x.r, f, a);
        load_features(x.b + R * x.r, x.s.C, x.r, f, b);
        __syncthreads();
        multiply_rows(a, b, sum);
    }
}

/* out = (w v + A S) / D of each chunk: w within it, S before it. */
__global__ static void __launch_bounds__(LS_THREADS, 2)
    attend(linear x, side q, level end, ls_view v, const uint8_t *pad, int fours, ls_view out, int writes_fours)
{
    __shared__ __align__(32) ls_real w[CAUSAL_ROWS * PITCH], rows[CAUSAL_ROWS * PITCH];
    __shared__ __align__(32) ls_real a[CAUSAL_ROWS * SHORT_PITCH], b[CAUSAL_ROWS * SHORT_PITCH];
    static_assert((int)(WIDE * PITCH) <= (int)(CAUSAL_ROWS * SHORT_PITCH), "a piece of a state lies in b");
    const int64_t chunks = rows_of(x.s) / x.s.C;
    for (int64_t P = blockIdx.x; P < chunks; P += gridDim.x) {
        const int64_t R = P * x.s.C;
        const ls_real *A = x.A + R * x.F, *z = x.z + P * x.F, *S = x.S + P * x.F * x.d;
        ls_real weight[4][4] = {{0}}, inverse[4];
        multiply_near(x, P, R, end_of(x, P, end), a, b, weight);
        __syncthreads(); /* w may be written */
        for (int u = 0; u < 4; u++) {
            const int64_t i = ROW + u * ACROSS;
            double D = 0;
            int flows;
            for (int k = 0; k < 4; k++) {
                const int64_t j = COLUMN + k * ACROSS;
                const ls_real apart = x.turns && j <= i ? (ls_real)x.step[2 * (i - j) + 1] : 1; /* cos ω(i - j) */
                const ls_real y = j <= i && i < x.s.C ? weight[u][k] * apart : 0;
                w[i * PITCH + j] = y;
                D += (double)y;
            }
            for (int64_t f = COLUMN; f < x.F && i < x.s.C; f += ACROSS) D += (double)A[i * x.F + f] * (double)z[f];
            inverse[u] = ls_linear_inverse(row_sum(D), x.floor, &flows);
        }
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            ls_real sum[4][4] = {{0}};
            __syncthreads();
            load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, v, pad, fours, rows);
            __syncthreads();
            multiply_columns(CAUSAL_ROWS, w, PITCH, rows, sum);
            for (int64_t f = 0; f < x.F; f += WIDE) {
                __syncthreads();
                load_features(A, x.s.C, x.F, f, a);
                load_state(x, S, f, e0, b);
                __syncthreads();
                multiply_columns(WIDE, a, SHORT_PITCH, b, sum);
            }
            for (int u = 0; u < 4; u++) {
                const int64_t i = ROW + u * ACROSS;
                const place at = place_of(x.s, R + i);
                if (i >= x.s.C || at.t >= x.s.rows) continue;
                const int there = is_there(x.s, q.pad, at);
                ls_real *to = ls_row(out, at.b, at.h, at.t) + e0 + COLUMN * 4;
                ls_four y;
                for (int c = 0; c < 4; c++) y.v[c] = there ? inverse[u] * sum[u][c] : 0;
                if (writes_fours && e0 + COLUMN * 4 < x.d) *(ls_four *)to = y;
                for (int c = 0; c < 4 && e0 + COLUMN * 4 + c < x.d && !writes_fours; c++) to[c] = y.v[c];
            }
        }
    }
}

ls_status ls_linear_cuda_causal(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    ls_linear_unpack(p, &x, p->summary[phase].got, p->summary[phase].got, x.running);
    for (int64_t k = 0; k < c.N; k += c.K) {
        ls_linear_go_to(p, &x, c, p->T, k);
        x.M = x.n = c.C;
        x.causal = 1;
        load_causal(p, &x);
        find_prefixes(p, &x);
        LS_LAUNCH(p->queue, attend, ls_blocks(chunks_of(&x), 1), LS_THREADS, 0, x, queries_of(p), after_chunks(&x),
                  p->own.v, p->own.pad, reads_fours(p->own.v, p->d), p->out, reads_fours(p->out, p->d));
    }
    return ls_launched(p->queue, "linear attention: causal");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. c, inverse, delta and start stay. */
static void sweep_past(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_causal(p, x, c, k);
        load_causal(p, x);
        find_prefixes(p, x);
        ls_linear_multiply_near(p, x, after_chunks(x), chunks_of(x));
        ls_linear_stage(p, x, p->own.v, p->own.pad, x->v);
        ls_linear_stage(p, x, p->dout, p->pad_q, x->dout);
        const int64_t chunks = chunks_of(x);
        ls_linear_multiply(p, 0, 1, c.C, c.C, x->d, x->dout, x->v, 0, x->dw, chunks);
        ls_linear_multiply(p, 0, 1, c.C, x->F, x->d, x->dout, x->S, 0, x->dA, chunks);
        ls_linear_weigh_backward(p, x, x->z, 0);
        ls_linear_near_gradients(p, x, after_chunks(x), chunks, 1, x->db, x->out);
        ls_linear_finish_queries(p, x, before_chunks(x), after_chunks(x), 1, 1);
        ls_linear_clean_rows(p, x);
        map_of(p)->queries_backward(p, x->s, x->da);
        ls_linear_write_keys(p, x, 0);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = c.N == 0 ? -1 : (c.N - 1) / c.K * c.K; k >= 0; k -= c.K) {
        go_to_causal(p, x, c, k);
        ls_linear_load_queries(p, x);
        ls_linear_load_keys(p, x);
        ls_linear_stage(p, x, p->own.v, p->own.pad, x->v);
        ls_linear_ready_keys(p, x, keys_of(p), after_chunks(x), 1);
        ls_linear_ready_queries(p, x, before_chunks(x), after_chunks(x), x->inverse, x->A);
        ls_linear_gather_gradients(p, x);
        ls_linear_scan_states(p, x, before_chunks(x), KEEPS | REVERSED);
        ls_linear_multiply(p, 0, 1, c.C, x->F, x->d, x->v, x->S, 0, x->dB, chunks_of(x));
        ls_linear_finish_keys(p, x, x->z);
        ls_linear_multiply(p, 0, 0, c.C, x->d, x->F, x->B, x->S, 0, x->out, chunks_of(x));
        ls_linear_write_keys(p, x, 1);
    }
}

ls_status ls_linear_cuda_causal_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const ls_summary *s = &p->summary[phase];
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    ls_linear_unpack(p, &x, s->got, s->got, x.running);
    sweep_past(p, &x, c);
    ls_linear_clear(p, &x, x.F * (x.d + 1), NULL);
    sweep_future(p, &x, c);
    ls_linear_pack(p, &x, NULL, s->dgot);
    return ls_launched(p->queue, "linear attention: gradient of causal");
}
