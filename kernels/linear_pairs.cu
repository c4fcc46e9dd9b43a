/* Linear attention by pairs of queries and keys on a GPU: weights and their gradients, and attention to few keys, which
 * go to all ranks as they are. Theory: linear_slabs.h. */
#include "linear_slabs.h"

/* ------------------------------------------------------------------------------------------------ rows, products */

__global__ static void stage_rows(slab s, int64_t d, ls_view v, const uint8_t *pad, ls_real *to)
{
    LS_EACH_ROW(R, rows_of(s))
    {
        const place at = place_of(s, R);
        const int there = is_there(s, pad, at);
        const ls_real *from = ls_row(v, at.b, at.h, at.t);
        LS_EACH_LANE(e, d) to[R * d + e] = there ? from[e] : 0;
    }
}

__global__ static void write_rows(slab s, int64_t d, const ls_real *from, const ls_real *scale, ls_view v,
                                  const uint8_t *pad)
{
    LS_EACH_ROW(R, rows_of(s))
    {
        const place at = place_of(s, R);
        if (at.t >= s.rows) continue;
        const int there = is_there(s, pad, at);
        const ls_real by = scale == NULL ? 1 : scale[R];
        ls_real *to = ls_row(v, at.b, at.h, at.t);
        LS_EACH_LANE(e, d) to[e] = there ? by * from[R * d + e] : 0;
    }
}

/* Rows of a slab from a tensor; and to it, times scale (R), NULL: 1. Padded ones are 0. */
static void copy_rows(ls_pass *p, const linear *x, ls_view v, const uint8_t *pad, ls_real *to)
{
    LS_LAUNCH(p->queue, stage_rows, ls_row_blocks(rows_of(x->s)), LS_THREADS, 0, x->s, x->d, v, pad, to);
}

static void put_rows(ls_pass *p, const linear *x, const ls_real *from, const ls_real *scale, ls_view v,
                     const uint8_t *pad)
{
    LS_LAUNCH(p->queue, write_rows, ls_row_blocks(rows_of(x->s)), LS_THREADS, 0, x->s, x->d, from, scale, v, pad);
}

/* C_i (m,n) = op(A_i) op(B_i), a batch of matrices that lie one after the other. Never rounded: the gradient of a query
 * is a difference of few numbers, of which little may be left. */
static void multiply(ls_pass *p, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, const ls_real *a,
                     const ls_real *b, ls_real *c, int64_t batch)
{
    ls_gemm_batch_in(p->queue, LS_FLOAT32, transpose_a, transpose_b, m, n, k, 1, a, transpose_a ? m : k, m * k, b,
                     transpose_b ? k : n, k * n, 0, c, n, m * n, batch);
}

/* ------------------------------------------------------------------------------------------------ within */

/* Query number i of a problem: where it stands among its keys, and how many of them it sees. */
namespace
{
typedef struct outlook {
    int64_t at, sees;
    double sine, cosine; /* of ω at */
} outlook;
} // namespace

__device__ static inline outlook outlook_of(const linear &x, int64_t i)
{
    outlook y;
    y.at = x.relative + i;
    y.sees = !x.causal || y.at + 1 > x.n ? x.n : y.at + 1;
    const int turns = x.turns && x.n > 0;
    y.sine = turns ? x.stand[2 * i] : 0;
    y.cosine = turns ? x.stand[2 * i + 1] : 1;
    return y;
}

/* cos ω(i - j) of key j, 0 where it is not seen. */
__device__ static inline ls_real apart(const linear &x, const outlook &y, int64_t j)
{
    if (j >= y.sees) return 0;
    return x.turns ? (ls_real)(y.cosine * x.step[2 * j + 1] + y.sine * x.step[2 * j]) : 1;
}

/* w, which holds a·b of the pairs of row R, becomes their weights, of which this is the sum. A lane writes what it will
 * read. */
__device__ static double weigh_row(const linear &x, const outlook &y, ls_real *w)
{
    double sum = 0;
    LS_EACH_LANE(j, x.n)
    {
        w[j] = j < y.sees ? w[j] * apart(x, y, j) : 0;
        sum += (double)w[j];
    }
    return ls_warp_sum(sum);
}

__global__ static void weigh(linear x)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        int flows;
        const double D = weigh_row(x, outlook_of(x, R % x.M), x.w + R * x.n);
        const ls_real inverse = ls_linear_inverse(D, x.floor, &flows);
        if (threadIdx.x % LS_WARP == 0) x.inverse[R] = inverse;
    }
}

/* w, dw hold a·b, do·v: they become w / D, the gradient of a·b. δ is the sum of what it is taken from, in double. */
__global__ static void weigh_backward(linear x)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const outlook y = outlook_of(x, R % x.M);
        ls_real *w = x.w + R * x.n, *dw = x.dw + R * x.n;
        const double D = weigh_row(x, y, w);
        double dot = 0;
        LS_EACH_LANE(j, x.n) dot += (double)w[j] * (double)dw[j];
        dot = ls_warp_sum(dot);
        int flows;
        const ls_real by = ls_linear_inverse(D, x.floor, &flows), delta = flows ? (ls_real)(dot / D) : 0;
        LS_EACH_LANE(j, x.n)
        {
            dw[j] = by * (dw[j] - delta) * apart(x, y, j);
            w[j] *= by;
        }
        if (threadIdx.x % LS_WARP == 0) x.flows[R] = (ls_real)flows;
    }
}

/* Steep problems pair by pair, a block for each: w, da, and db, which is that of x. */
#define EACH_STEEP(i, x, end, problems)                                                                                \
    for (int64_t i = blockIdx.x; i < (problems); i += gridDim.x)                                                       \
        if (is_steep(x, i, end))

__global__ static void steep_weights(linear x, level end, int64_t problems)
{
    const int warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    EACH_STEEP(i, x, end, problems)
    for (int64_t pair = warp; pair < x.M * x.n; pair += warps) {
        const int64_t q = pair / x.n, j = pair % x.n, R = i * x.M + q;
        if (j > x.relative + q) continue; /* not seen */
        ls_real sum = 0;
        LS_EACH_LANE(f, x.r) sum += x.a[R * x.r + f] * seen_from(x, i * x.n + j, f, x.c[R]);
        sum = ls_warp_sum(sum);
        if (threadIdx.x % LS_WARP == 0) x.w[R * x.n + j] = sum;
    }
}

__global__ static void steep_gradients(linear x, level end, int64_t problems)
{
    EACH_STEEP(i, x, end, problems)
    {
        for (int64_t e = threadIdx.x; e < x.M * x.r; e += blockDim.x) {
            const int64_t q = e / x.r, f = e % x.r, R = i * x.M + q;
            ls_real sum = 0;
            for (int64_t j = 0; j < x.n && j <= x.relative + q; j++)
                sum += x.dw[R * x.n + j] * seen_from(x, i * x.n + j, f, x.c[R]);
            x.da[R * x.r + f] = sum;
        }
        for (int64_t e = threadIdx.x; e < x.n * x.r; e += blockDim.x) {
            const int64_t j = e / x.r, f = e % x.r, row = i * x.n + j;
            ls_real sum = 0;
            for (int64_t q = ls_max(0, j - x.relative); q < x.M; q++) {
                const int64_t R = i * x.M + q;
                const ls_real b = f < x.exponentials ? seen_from(x, row, f, x.c[R]) : 1;
                sum += x.dw[R * x.n + j] * x.a[R * x.r + f] * b;
            }
            x.db[row * x.r + f] = sum;
        }
    }
}

/* w (M,n) of each problem = a·b. */
static void multiply_near(ls_pass *p, const linear *x, level end, int64_t problems)
{
    multiply(p, 0, 1, x->M, x->n, x->r, x->a_near, x->b, x->w, problems);
    if (x->causal && x->exponentials > 0)
        LS_LAUNCH(p->queue, steep_weights, ls_blocks(problems, 1), LS_THREADS, 0, *x, end, problems);
}

/* db (rows,r) of b becomes that of x; problem i has n of them, and `repeats` problems one after the other the same b.
 * Those of steep problems are gradients of x already. */
__global__ static void finish_near_keys(linear x, level end, int64_t rows, int64_t repeats, ls_real *db)
{
    LS_EACH_ROW(R, rows)
    {
        const int64_t i = R / (x.n * repeats), row = i * x.n + R % x.n;
        if (is_steep(x, i, end)) continue;
        LS_EACH_LANE(f, x.exponentials) db[R * x.r + f] *= x.b[row * x.r + f];
    }
}

/* What pairs get that are ready, w and dw made by weigh_backward: da of a_near, db of x, and dv. Keys are the same for
 * `repeats` chunks of C queries one after the other. */
static void near_gradients(ls_pass *p, linear *x, level end, int64_t problems, int64_t repeats, ls_real *db,
                           ls_real *dv)
{
    const int64_t chunks = problems * repeats, C = x->s.C;
    multiply(p, 0, 0, x->M, x->r, x->n, x->dw, x->b, x->da, problems);
    multiply(p, 1, 0, x->n, x->r, C, x->dw, x->a_near, db, chunks);
    multiply(p, 1, 0, x->n, x->d, C, x->w, x->dout, dv, chunks);
    if (x->exponentials == 0) return;
    x->db = db;
    if (x->causal) LS_LAUNCH(p->queue, steep_gradients, ls_blocks(problems, 1), LS_THREADS, 0, *x, end, problems);
    LS_LAUNCH(p->queue, finish_near_keys, ls_row_blocks(chunks * x->n), LS_THREADS, 0, *x, end, chunks * x->n, repeats,
              db);
}

/* ------------------------------------------------------------------------------------------------ short sequences */

/* A key on its way is [b][v] and, where there are exponentials, [top]; keys go (n,B,H) one after the other. */
namespace
{
typedef struct message {
    int64_t B, H, S, r, d, width;
} message;
} // namespace

static message message_of(const ls_pass *p, const linear *x, int64_t keys)
{
    const message m = {p->B, p->H, keys, x->r, x->d, x->r + x->d + (x->exponentials > 0)};
    return m;
}

/* Row R of keys (H,B,S). */
__device__ static inline int64_t in_message(const message &m, int64_t R)
{
    const int64_t g = R / m.S, j = R - g * m.S, h = g / m.B, b = g - h * m.B;
    return ((j * m.B + b) * m.H + h) * m.width;
}

__global__ static void send_keys(linear x, side k, message m, ls_real *keys)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const int there = is_there(x.s, k.pad, place_of(x.s, R));
        ls_real *to = keys + in_message(m, R);
        LS_EACH_LANE(e, m.width)
        {
            const ls_real nothing = e < x.exponentials || e == m.r + m.d ? -INFINITY : 0;
            const ls_real *from = e < m.r ? x.x + R * m.r + e : e < m.r + m.d ? x.v + R * m.d + e - m.r : x.top + R;
            to[e] = there ? *from : nothing;
        }
    }
}

ls_status ls_linear_cuda_share(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->S, SHORT);
    if (c.N > 0) {
        ls_linear_go_to(p, &x, c, p->S, 0);
        ls_linear_make_keys(p, &x);
        copy_rows(p, &x, p->own.v, p->own.pad, x.v);
        LAUNCH_ROWS(p, send_keys, x, keys_of(p), message_of(p, &x, p->S), p->gathered[phase + 1].mine);
    }
    return ls_launched(p->queue, "linear attention: share");
}

/* db, 0 where no key is, and, in out, dv. */
__global__ static void receive_gradients(linear x, side k, message m, const ls_real *dkeys)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real *from = dkeys + in_message(m, R);
        const int there = is_there(x.s, k.pad, place_of(x.s, R));
        LS_EACH_LANE(f, m.r) x.db[R * m.r + f] = there ? from[f] : 0;
        LS_EACH_LANE(e, m.d) x.out[R * m.d + e] = from[m.r + e];
    }
}

ls_status ls_linear_cuda_share_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const cut c = ls_linear_cut_rows(p, p->S, SHORT);
    if (c.N > 0) {
        ls_linear_go_to(p, &x, c, p->S, 0);
        ls_linear_make_keys(p, &x);
        LAUNCH_ROWS(p, receive_gradients, x, keys_of(p), message_of(p, &x, p->S), p->gathered[phase + 1].dmine);
        ls_linear_keys_backward(p, &x, 0);
        put_rows(p, &x, x.out, NULL, p->own.dv, p->own.pad);
    }
    return ls_launched(p->queue, "linear attention: gradient of share");
}

/* Keys that were sent, seen from c: b = e^(x - c). Those that were not there are -inf, or 0. */
__global__ static void see_from(linear x, level c)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real top = level_of(c, x.s, place_of(x.s, R)), from = top == -INFINITY ? 0 : top;
        LS_EACH_LANE(f, x.r)
        {
            const ls_real y = x.x[R * x.r + f], above = y - from; /* above 0 are only keys that nobody sees */
            x.b[R * x.r + f] = f < x.exponentials ? ls_exp(above > 0 ? 0 : above) : y;
        }
    }
}

/* By what a query's exponentials make up for keys that are seen from c at the end. */
__device__ static inline ls_real near_by(const linear &x, int64_t R, level end)
{
    if (x.exponentials == 0) return 1;
    return x.c[R] == -INFINITY || is_steep(x, R / x.M, end) ? 1 : ls_exp(end_of(x, R / x.M, end) - x.c[R]);
}

/* a is 0 where no query is; a_near. */
__global__ static void see_near(linear x, side q, level end)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const int there = is_there(x.s, q.pad, place_of(x.s, R));
        const ls_real by = near_by(x, R, end);
        LS_EACH_LANE(f, x.r)
        {
            const ls_real a = there ? x.a[R * x.r + f] : 0;
            if (!there) x.a[R * x.r + f] = a;
            if (x.a_near != x.a) x.a_near[R * x.r + f] = f < x.exponentials ? by * a : a;
        }
    }
}

/* da, which is that of a_near, becomes that of a, straightened: see straighten() of linear_rows.h. */
__global__ static void straighten(linear x, level end)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real by = near_by(x, R, end), *a = x.a + R * x.r;
        ls_real *da = x.da + R * x.r;
        double square = 0, along = 0;
        LS_EACH_LANE(f, x.r)
        {
            if (f < x.exponentials) da[f] *= by;
            square += (double)a[f] * (double)a[f];
            along += (double)a[f] * (double)da[f];
        }
        square = ls_warp_sum(square);
        along = ls_warp_sum(along);
        if (x.flows[R] == 0 || !(square > 0)) continue;
        LS_EACH_LANE(f, x.r) da[f] = (ls_real)((double)da[f] - along / square * (double)a[f]);
    }
}

/* All keys, as they were sent: a slab of its own, of one chunk. */
namespace
{
typedef struct all_keys {
    slab s;
    ls_real *x, *b, *v, *top; /* (G,S,r), (G,S,d), (G,S) */
    ls_real *db, *dv;         /* (P,S,r), (P,S,d) what chunks of queries owe to them */
} all_keys;
} // namespace

__global__ static void receive_keys(message m, int64_t rows, const ls_real *keys, all_keys k)
{
    LS_EACH_ROW(R, rows)
    {
        const ls_real *from = keys + in_message(m, R);
        LS_EACH_LANE(f, m.r) k.x[R * m.r + f] = from[f];
        LS_EACH_LANE(e, m.d) k.v[R * m.d + e] = from[m.r + e];
        if (m.width > m.r + m.d && threadIdx.x % LS_WARP == 0) k.top[R] = from[m.r + m.d];
    }
}

__global__ static void send_gradients(message m, int64_t rows, const double *running, ls_real *dkeys)
{
    LS_EACH_ROW(R, rows)
    {
        const int64_t g = R / m.S, j = R - g * m.S;
        const double *from = running + g * m.S * (m.r + m.d);
        ls_real *to = dkeys + in_message(m, R);
        LS_EACH_LANE(e, m.width)
        {
            const int64_t at = e < m.r ? j * m.r + e : m.S * m.r + j * m.d + e - m.r;
            to[e] = e < m.r + m.d ? (ls_real)from[at] : 0;
        }
    }
}

/* c of each query: the maximum of the keys that it sees. */
__global__ static void see_keys(linear x, const ls_real *top)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const place at = place_of(x.s, R);
        const int64_t last = ls_min(at.t, x.s.rows - 1) - x.s.first; /* past the end c rises no more */
        const int64_t position = x.relative + last, sees = x.causal ? ls_min(position + 1, x.n) : x.n;
        ls_real c = -INFINITY;
        LS_EACH_LANE(j, sees) c = top[at.g * x.n + j] > c ? top[at.g * x.n + j] : c;
        c = ls_warp_max(c);
        if (threadIdx.x % LS_WARP == 0) x.c[R] = c;
    }
}

static all_keys load_all_keys(ls_pass *p, linear *x, int phase)
{
    const int64_t S = p->all_keys, rows = p->B * p->H * S, chunks = ls_linear_most_chunks(p, p->T);
    purse w = {p->work[ALL_KEYS]};
    all_keys k = {};
    k.s.B = p->B, k.s.H = p->H, k.s.K = 1, k.s.C = k.s.rows = S;
    k.x = give(&w, rows * x->r);
    k.b = x->exponentials > 0 ? give(&w, rows * x->r) : k.x;
    k.v = give(&w, rows * x->d);
    k.top = give(&w, rows);
    if (p->backward) {
        k.db = give(&w, chunks * S * x->r);
        k.dv = give(&w, chunks * S * x->d);
    }
    LS_LAUNCH(p->queue, receive_keys, ls_row_blocks(rows), LS_THREADS, 0, message_of(p, x, S), rows,
              p->gathered[phase].all, k);
    x->causal = p->pattern == LS_CS;
    x->n = S;
    x->x = k.x;
    x->b = k.b;
    return k;
}

/* Queries of a slab and, seen from their c at the end, which this returns, the keys; w = a·b. */
static level load_pairs(ls_pass *p, linear *x, const all_keys *k, cut c, int64_t at)
{
    ls_linear_go_to(p, x, c, p->T, at);
    x->M = x->s.K * x->s.C;
    x->relative = p->query_span[0].lo + x->s.first;
    x->stand = queries_of(p).angle + 2 * x->s.first;
    ls_linear_make_queries(p, x);
    const level end = {x->c + x->M - 1, x->M, 0};
    if (x->exponentials > 0) LAUNCH_ROWS(p, see_keys, *x, k->top);
    linear of_keys = *x;
    of_keys.s = k->s;
    if (x->exponentials > 0) LAUNCH_ROWS(p, see_from, of_keys, end);
    LAUNCH_ROWS(p, see_near, *x, queries_of(p), end);
    multiply_near(p, x, end, p->B * p->H);
    return end;
}

ls_status ls_linear_cuda_pairs(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const all_keys keys = load_all_keys(p, &x, phase);
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    for (int64_t k = 0; k < c.N; k += c.K) {
        load_pairs(p, &x, &keys, c, k);
        LAUNCH_ROWS(p, weigh, x);
        multiply(p, 0, 0, x.M, x.d, x.n, x.w, keys.v, x.out, p->B * p->H);
        put_rows(p, &x, x.out, x.inverse, p->out, p->pad_q);
    }
    return ls_launched(p->queue, "linear attention: pairs");
}

ls_status ls_linear_cuda_pairs_backward(ls_pass *p, int phase)
{
    linear x = ls_linear_begin(p);
    const all_keys keys = load_all_keys(p, &x, phase);
    const cut c = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS);
    const int64_t G = p->B * p->H, S = x.n;
    ls_linear_clear(p, &x, S * (x.r + x.d), NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        const level end = load_pairs(p, &x, &keys, c, k);
        copy_rows(p, &x, p->dout, p->pad_q, x.dout);
        multiply(p, 0, 1, x.M, S, x.d, x.dout, keys.v, x.dw, G);
        LAUNCH_ROWS(p, weigh_backward, x);
        near_gradients(p, &x, end, G, x.s.K, keys.db, keys.dv);
        const numbers db = {keys.db, S * x.r, 0}, dv = {keys.dv, S * x.d, 0};
        ls_linear_scan(p, &x, db, dv, nowhere, 0);
        LAUNCH_ROWS(p, straighten, x, end);
        ls_linear_queries_backward(p, &x);
    }
    LS_LAUNCH(p->queue, send_gradients, ls_row_blocks(G * S), LS_THREADS, 0, message_of(p, &x, S), G * S, x.running,
              p->gathered[phase].dall);
    return ls_launched(p->queue, "linear attention: gradient of pairs");
}
