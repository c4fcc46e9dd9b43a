/* Causal linear attention on a GPU: within a chunk by pairs, to what was before by its state; backward in two sweeps.
 * Theory: linear_slabs.h. */
#include "linear_slabs.h"

static void go_to_causal(const ls_pass *p, linear *x, cut c, int64_t k)
{
    ls_linear_go_to(p, x, c, p->T, k);
    x->M = c.C;
    x->causal = 1;
}

/* In backward: what is kept of rows from sweep to sweep lies slab after slab. */
static void go_to_traced(const ls_pass *p, linear *x, cut c, int64_t k)
{
    const int64_t at = p->B * p->H * k * c.C;
    go_to_causal(p, x, c, k);
    x->c = x->all_c + at;
    x->inverse = x->all_inverse + at;
    x->delta = x->all_delta + at;
}

/* Chunks made ready, their c found. */
static void load_causal(ls_pass *p, linear *x)
{
    map_of(p)->queries(p, x->s, x->a);
    map_of(p)->keys(p, x->s, x->x, x->top);
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

/* A block has a chunk; its threads are 16 x 16, thread (row, column). Of products (64,64) a thread has the rows row,
 * row + 16, .. and as columns either column, column + 16, .. or four side by side. */
enum { ACROSS = 16, WIDE = 16, SHORT_PITCH = WIDE + 4 }; /* WIDE features meet at a time */
enum { TILE = (int)CAUSAL_ROWS * (int)PITCH };
static_assert(ACROSS * 4 == CAUSAL_ROWS && ACROSS * ACROSS == LS_THREADS && ACROSS * 4 == DEEP,
              "a chunk's weights are shared among the threads of a block");
#define ROW ((int)threadIdx.x / ACROSS)
#define COLUMN ((int)threadIdx.x % ACROSS)

/* to (M,N) = `rows` (.,width) from first on, numbers [f0, f0 + N), 0 from `count` rows or width on. */
template <int M, int N>
__device__ static void load_numbers(const ls_real *rows, int64_t first, int64_t count, int64_t width, int64_t f0,
                                    ls_real *to)
{
    for (int i = threadIdx.x; i < M * N; i += LS_THREADS) {
        const int64_t r = first + i / N, f = f0 + i % N;
        to[i / N * (N + 4) + i % N] = r < count && f < width ? rows[r * width + f] : 0;
    }
}

/* sum += a bᵀ over n numbers, a multiple of 4; rows lie `pitch` apart. */
__device__ static void multiply_rows(int n, const ls_real *a, const ls_real *b, int pitch, ls_real (&sum)[4][4])
{
    for (int k = 0; k < n; k += 4) {
        ls_four y[4];
#pragma unroll
        for (int v = 0; v < 4; v++) y[v] = ls_four_at(b + (COLUMN + v * ACROSS) * pitch + k);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const ls_four z = ls_four_at(a + (ROW + u * ACROSS) * pitch + k);
#pragma unroll
            for (int v = 0; v < 4; v++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[u][v] += z.v[j] * y[v].v[j];
        }
    }
}

/* sum += a b over n rows of b, a multiple of 4, columns side by side; rows of a lie `pitch` apart, those of b PITCH. */
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

/* sum += aᵀ b over the rows of a chunk: rows 4 row, 4 row + 1, .. of the product, columns side by side. */
__device__ static void multiply_across(const ls_real *a, const ls_real *b, ls_real (&sum)[4][4])
{
#pragma unroll 4
    for (int k = 0; k < CAUSAL_ROWS; k++, a += PITCH, b += PITCH) {
        const ls_four z = ls_four_at(a + ROW * 4), y = ls_four_at(b + COLUMN * 4);
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int c = 0; c < 4; c++) sum[u][c] += z.v[u] * y.v[c];
    }
}

/* Over the 16 threads that have the same rows. */
__device__ static inline double row_sum(double x)
{
    for (int step = ACROSS / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* This thread's four numbers of a row, from e on: +=, or =. */
__device__ static inline void put_four(ls_real *row, int64_t e, int64_t d, int add, const ls_real (&sum)[4])
{
    for (int c = 0; c < 4 && e + c < d; c++) row[e + c] = (add ? row[e + c] : 0) + sum[c];
}

/* cos ω(i - j), 0 where query i does not see key j. */
__device__ static inline ls_real apart(const linear &x, int64_t i, int64_t j)
{
    return j > i || i >= x.s.C ? 0 : x.turns ? (ls_real)x.step[2 * (i - j) + 1] : 1;
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
        load_numbers<CAUSAL_ROWS, WIDE>(x.a_near + R * x.r, 0, x.s.C, x.r, f, a);
        load_numbers<CAUSAL_ROWS, WIDE>(x.b + R * x.r, 0, x.s.C, x.r, f, b);
        __syncthreads();
        multiply_rows(WIDE, a, b, SHORT_PITCH, sum);
    }
}

/* sum += A S for the rows A (.,F) of a chunk and numbers [e0, e0 + 64) of S. a: shared memory of (64,WIDE), b:
 * (WIDE,64). */
__device__ static void add_state(const linear &x, const ls_real *A, const ls_real *S, int64_t e0, ls_real *a,
                                 ls_real *b, ls_real (&sum)[4][4])
{
    for (int64_t f = 0; f < x.F; f += WIDE) {
        __syncthreads();
        load_numbers<CAUSAL_ROWS, WIDE>(A, 0, x.s.C, x.F, f, a);
        load_numbers<WIDE, DEEP>(S, f, x.F, x.d, e0, b);
        __syncthreads();
        multiply_columns(WIDE, a, SHORT_PITCH, b, sum);
    }
}

/* out = (w v + A S) / D of each chunk: w within it, S before it. */
__global__ static void __launch_bounds__(LS_THREADS, 2)
    attend(linear x, side q, side k, level end, ls_view v, int fours, ls_view out)
{
    __shared__ __align__(32) ls_real w[TILE], rows[TILE], a[CAUSAL_ROWS * SHORT_PITCH], b[CAUSAL_ROWS * SHORT_PITCH];
    static_assert((int)(WIDE * PITCH) <= (int)(CAUSAL_ROWS * SHORT_PITCH), "a piece of a state lies in b");
    const int64_t chunks = rows_of(x.s) / x.s.C;
    for (int64_t P = blockIdx.x; P < chunks; P += gridDim.x) {
        const int64_t R = P * x.s.C;
        const ls_real *A = x.A + R * x.F, *z = x.z + P * x.F, *S = x.S + P * x.F * x.d;
        ls_real weight[4][4] = {{0}}, inverse[4];
        multiply_near(x, P, R, end_of(x, P, end), a, b, weight);
        __syncthreads(); /* w may be written */
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t i = ROW + u * ACROSS;
            double D = 0;
            int flows;
            for (int v4 = 0; v4 < 4; v4++) {
                const int64_t j = COLUMN + v4 * ACROSS;
                const ls_real y = weight[u][v4] * apart(x, i, j);
                w[i * PITCH + j] = y;
                D += (double)y;
            }
            for (int64_t f = COLUMN; f < x.F && i < x.s.C; f += ACROSS) D += (double)A[i * x.F + f] * (double)z[f];
            inverse[u] = ls_linear_inverse(row_sum(D), x.floor, &flows);
        }
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            ls_real sum[4][4] = {{0}};
            __syncthreads();
            load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, v, k.pad, fours, rows);
            __syncthreads();
            multiply_columns(CAUSAL_ROWS, w, PITCH, rows, sum);
            add_state(x, A, S, e0, a, b, sum);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int64_t i = ROW + u * ACROSS;
                const place at = place_of(x.s, R + i);
                if (i >= x.s.C || at.t >= x.s.rows) continue;
                const int there = is_there(x.s, q.pad, at);
                for (int c = 0; c < 4; c++) sum[u][c] = there ? inverse[u] * sum[u][c] : 0;
                put_four(ls_row(out, at.b, at.h, at.t), e0 + COLUMN * 4, x.d, 0, sum[u]);
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
        go_to_causal(p, &x, c, k);
        load_causal(p, &x);
        find_prefixes(p, &x);
        LS_LAUNCH(p->queue, attend, ls_blocks(chunks_of(&x), 1), LS_THREADS, 0, x, queries_of(p), keys_of(p),
                  after_chunks(&x), p->own.v, reads_fours(p->own.v, p->d), p->out);
    }
    return ls_launched(p->queue, "linear attention: causal");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* (R,F) of a chunk = its rows of a view times Sᵀ. rows, others: shared memory of (64,64); where the view's rows are not
 * wider, they stay in rows. */
__device__ static void take_state(const linear &x, int64_t R, ls_view v, const uint8_t *pad, int fours,
                                  const ls_real *S, ls_real *rows, ls_real *others, ls_real *to)
{
    for (int64_t f = 0; f < x.F; f += CAUSAL_ROWS) {
        ls_real sum[4][4] = {{0}};
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            __syncthreads();
            if (f == 0 || x.d > DEEP) load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, v, pad, fours, rows);
            load_numbers<CAUSAL_ROWS, DEEP>(S, f, x.F, x.d, e0, others);
            __syncthreads();
            multiply_rows(DEEP, rows, others, PITCH, sum);
        }
#pragma unroll
        for (int u = 0; u < 4; u++)
#pragma unroll
            for (int v4 = 0; v4 < 4; v4++) {
                const int64_t i = ROW + u * ACROSS, F = f + COLUMN + v4 * ACROSS;
                if (i < x.s.C && F < x.F) to[(R + i) * x.F + F] = sum[u][v4];
            }
    }
}

/* The gradient of a_near: dw b, or pair by pair. */
__device__ static void near_queries(const linear &x, int64_t R, int steep, const ls_real *dw, ls_real *rows)
{
    for (int64_t f = 0; f < x.r; f += DEEP) {
        ls_real sum[4][4] = {{0}};
        __syncthreads();
        if (!steep) load_numbers<CAUSAL_ROWS, DEEP>(x.b + R * x.r, 0, x.s.C, x.r, f, rows);
        __syncthreads();
        if (!steep) multiply_columns(CAUSAL_ROWS, dw, PITCH, rows, sum);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t i = ROW + u * ACROSS;
            for (int c = 0; c < 4 && steep; c++)
                for (int64_t j = 0; j <= i && i < x.s.C && f + COLUMN * 4 + c < x.r; j++)
                    sum[u][c] += dw[i * PITCH + j] * seen_from(x, R + j, f + COLUMN * 4 + c, x.c[R + i]);
            if (i < x.s.C) put_four(x.da + (R + i) * x.r, f + COLUMN * 4, x.r, 0, sum[u]);
        }
    }
}

/* db of x: dwᵀ a_near, times b where that is an exponential, or pair by pair; 0 where no key is. */
__device__ static void near_keys(const linear &x, const side &k, int64_t R, int steep, const ls_real *dw, ls_real *rows)
{
    for (int64_t f = 0; f < x.r; f += DEEP) {
        ls_real sum[4][4] = {{0}};
        __syncthreads();
        if (!steep) load_numbers<CAUSAL_ROWS, DEEP>(x.a_near + R * x.r, 0, x.s.C, x.r, f, rows);
        __syncthreads();
        if (!steep) multiply_across(dw, rows, sum);
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t j = ROW * 4 + u;
            const int there = j < x.s.C && is_there(x.s, k.pad, place_of(x.s, R + j));
            for (int c = 0; c < 4; c++) {
                const int64_t F = f + COLUMN * 4 + c;
                const int exists = there && F < x.r, e = F < x.exponentials;
                for (int64_t i = j; steep && exists && i < x.s.C; i++)
                    sum[u][c] +=
                        dw[i * PITCH + j] * x.a[(R + i) * x.r + F] * (e ? seen_from(x, R + j, F, x.c[R + i]) : 1);
                if (!exists) sum[u][c] = 0;
                if (!steep && exists && e) sum[u][c] *= x.b[(R + j) * x.r + F];
            }
            if (j < x.s.C) put_four(x.db + (R + j) * x.r, f + COLUMN * 4, x.r, 0, sum[u]);
        }
    }
}

/* What queries and keys of a chunk get from each other, and queries from the state before it: dA, da of a_near, db of
 * x, dv; c, inverse, delta and flows of its rows. */
__global__ static void __launch_bounds__(LS_THREADS, 2)
    attend_backward(linear x, side q, side k, level end, ls_view v, ls_view dout, int fours, ls_view dv)
{
    LS_SHARED(ls_real, w);
    ls_real *dw = w + TILE, *rows = dw + TILE, *others = rows + TILE;
    const int64_t chunks = rows_of(x.s) / x.s.C;
    for (int64_t P = blockIdx.x; P < chunks; P += gridDim.x) {
        const int64_t R = P * x.s.C;
        const ls_real last = end_of(x, P, end), *A = x.A + R * x.F, *z = x.z + P * x.F;
        const int steep = is_steep(x, P, last);
        ls_real weight[4][4] = {{0}}, gain[4][4] = {{0}}, *dA = x.dA + R * x.F;
        multiply_near(x, P, R, last, rows, others, weight);
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            __syncthreads();
            load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, dout, q.pad, fours, rows);
            load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, v, k.pad, fours, others);
            __syncthreads();
            multiply_rows(DEEP, rows, others, PITCH, gain);
        }
        take_state(x, R, dout, q.pad, fours, x.S + P * x.F * x.d, rows, others, x.dA);
        __syncthreads(); /* dA of a row is there */
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int64_t i = ROW + u * ACROSS;
            double D = 0, dot = 0;
            int flows;
            for (int j = 0; j < 4; j++) {
                weight[u][j] *= apart(x, i, COLUMN + j * ACROSS);
                D += (double)weight[u][j];
                dot += (double)weight[u][j] * (double)gain[u][j];
            }
            for (int64_t f = COLUMN; f < x.F && i < x.s.C; f += ACROSS) {
                D += (double)A[i * x.F + f] * (double)z[f];
                dot += (double)A[i * x.F + f] * (double)dA[i * x.F + f];
            }
            D = row_sum(D), dot = row_sum(dot);
            const ls_real by = ls_linear_inverse(D, x.floor, &flows), delta = flows ? (ls_real)(dot / D) : 0;
            for (int j = 0; j < 4; j++) {
                const int64_t at = i * PITCH + COLUMN + j * ACROSS;
                w[at] = by * weight[u][j];
                dw[at] = by * (gain[u][j] - delta) * apart(x, i, COLUMN + j * ACROSS);
            }
            if (i >= x.s.C) continue;
            for (int64_t f = COLUMN; f < x.F; f += ACROSS) dA[i * x.F + f] = by * (dA[i * x.F + f] - delta * z[f]);
            if (COLUMN == 0) x.inverse[R + i] = by, x.delta[R + i] = delta, x.flows[R + i] = (ls_real)flows;
        }
        near_queries(x, R, steep, dw, others);
        near_keys(x, k, R, steep, dw, others);
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            ls_real sum[4][4] = {{0}};
            __syncthreads();
            if (x.d > DEEP) load_rows<CAUSAL_ROWS>(x.s, R, x.s.C, x.d, e0, dout, q.pad, fours, rows);
            __syncthreads();
            multiply_across(w, rows, sum);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int64_t j = ROW * 4 + u;
                const place at = place_of(x.s, R + j);
                if (j >= x.s.C || at.t >= x.s.rows) continue;
                put_four(ls_row(dv, at.b, at.h, at.t), e0 + COLUMN * 4, x.d, 0, sum[u]);
            }
        }
    }
}

/* What keys of a chunk get from the state after it, a gradient: dB = v Sᵀ; dv += B S. */
__global__ static void __launch_bounds__(LS_THREADS, 2) take_future(linear x, side k, ls_view v, int fours, ls_view dv)
{
    __shared__ __align__(32) ls_real rows[TILE], others[TILE];
    const int64_t chunks = rows_of(x.s) / x.s.C;
    for (int64_t P = blockIdx.x; P < chunks; P += gridDim.x) {
        const int64_t R = P * x.s.C;
        const ls_real *S = x.S + P * x.F * x.d;
        take_state(x, R, v, k.pad, fours, S, rows, others, x.dB);
        for (int64_t e0 = 0; e0 < x.d; e0 += DEEP) {
            ls_real sum[4][4] = {{0}};
            add_state(x, x.B + R * x.F, S, e0, rows, others, sum);
#pragma unroll
            for (int u = 0; u < 4; u++) {
                const int64_t j = ROW + u * ACROSS;
                const place at = place_of(x.s, R + j);
                if (j < x.s.C && is_there(x.s, k.pad, at))
                    put_four(ls_row(dv, at.b, at.h, at.t), e0 + COLUMN * 4, x.d, 1, sum[u]);
            }
        }
    }
}

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. c, inverse, delta and start stay. */
static void sweep_past(ls_pass *p, linear *x, cut c)
{
    const int fours = reads_fours(p->own.v, p->d) && reads_fours(p->dout, p->d);
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_traced(p, x, c, k);
        load_causal(p, x);
        find_prefixes(p, x);
        LS_LAUNCH(p->queue, attend_backward, ls_blocks(chunks_of(x), 1), LS_THREADS, 4 * TILE * sizeof(ls_real), *x,
                  queries_of(p), keys_of(p), after_chunks(x), p->own.v, p->dout, fours, p->own.dv);
        ls_linear_finish_queries(p, x, before_chunks(x), after_chunks(x), 1, 1);
        map_of(p)->queries_backward(p, x->s, x->da);
        map_of(p)->keys_backward(p, x->s, x->db, 0);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = c.N == 0 ? -1 : (c.N - 1) / c.K * c.K; k >= 0; k -= c.K) {
        go_to_traced(p, x, c, k);
        map_of(p)->queries(p, x->s, x->a);
        map_of(p)->keys(p, x->s, x->x, x->top);
        ls_linear_ready_keys(p, x, keys_of(p), after_chunks(x), 1);
        ls_linear_ready_queries(p, x, before_chunks(x), after_chunks(x), x->inverse, x->A);
        ls_linear_gather_gradients(p, x);
        ls_linear_scan_states(p, x, before_chunks(x), KEEPS | REVERSED);
        LS_LAUNCH(p->queue, take_future, ls_blocks(chunks_of(x), 1), LS_THREADS, 0, *x, keys_of(p), p->own.v,
                  reads_fours(p->own.v, p->d), p->own.dv);
        ls_linear_finish_keys(p, x, x->z);
        map_of(p)->keys_backward(p, x->s, x->db, 1);
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
