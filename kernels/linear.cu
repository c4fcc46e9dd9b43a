/* Linear attention by feature maps on a GPU: the phases of linear.c, its formulas and what it sums in double.
 *
 * How the work is divided. Rows are cut into chunks of C (128; where queries see keys one by one 64), and some chunks
 * of all heads and batch rows, about 65536 rows together, make a slab: memory does not grow with the sequence, and a
 * slab is work enough for all of the GPU. Slabs go one after the other and hand on the state in double. In a slab rows
 * lie as (H,B,K,C,width): the chunks of one (b,h) side by side, all rows of a head side by side, rows past the end and
 * padded ones 0. So every product of a slab is one batch of equal matrices:
 *
 *   features   one product for each head                      keys, states   one for each chunk
 *   states of chunks: sums S = Bᵀ v, z = Σ B in parallel, then a scan over the K chunks, in double, a thread for each
 *   number: a chunk finds the sum of the chunks before it (in backward: after it) where its own sum was
 *
 * What stands between products is done row by row, a warp for each row.
 *
 * Exponentials, c_i the maximum so far. A chunk's sum is seen from c at its end, and the scan takes it from c to c. A
 * query sees the state before its chunk through e^(c_before - c_i) <= 1. Within a chunk it sees keys from c at the end,
 * and makes up for it by e^(c_end - c_i), as long as c rises by at most RISE. Where it rises more (often the first
 * chunk of a sequence, hardly any later) products are done again pair by pair, with e^(x_j - c_i) as it is: by kernels
 * that run over all chunks and leave the others alone. */
#include "linear_cuda.h"

#ifndef LS_LINEAR_SLAB /* a test may make it so small that there are several slabs */
#define LS_LINEAR_SLAB 65536
#endif

enum { ROWS = LS_LINEAR_ROWS, CAUSAL_ROWS = LS_LINEAR_CAUSAL_ROWS, SHORT = LS_LINEAR_SHORT };
enum { QUERIES, KEYS, TURNED, STAGE, WEIGHTS, STATES, DOUBLES, TRACE, ALL_KEYS, ALL_WORK }; /* work[] */
static_assert((int)ALL_WORK <= (int)LS_LINEAR_WORK, "work[] of linear attention overlaps that of its mechanism");
static_assert((int)SHORT <= (int)CAUSAL_ROWS, "a short sequence of keys is one chunk");

/* ------------------------------------------------------------------------------------------------ slabs */

namespace /* types of this file alone, as kernels are: other files may have theirs of these names */
{
/* Rows of a shard: N chunks of C rows, K of them in a slab. */
typedef struct cut {
    int64_t C, N, K;
} cut;

/* Rows (H,B,K,C), of which those of one (b,h) begin with row `first` of the shard's `rows`. */
typedef struct slab {
    int64_t B, H, K, C, first, rows;
} slab;

/* Queries or keys: pad (B,rows) or NULL, and the global position of the first row. */
typedef struct side {
    const uint8_t *pad;
    int64_t lo;
} side;

typedef struct place {
    int64_t g, b, h, u, t; /* g = h B + b; row u of g in the slab is row t of the shard */
} place;

/* c of chunks: that of chunk k of g is p[g each_g + k each_k]; p NULL: none. */
typedef struct level {
    const ls_real *p;
    int64_t each_g, each_k;
} level;

/* All that kernels need, by value. P chunks in the slab, R = P C rows. */
typedef struct linear {
    slab s;
    int64_t r, F, d, exponentials;
    double turn, floor;
    int turns;
    /* within: of each problem's M queries the first has its n keys at `relative`, - relative + 1, ... from itself */
    int64_t M, n, relative;
    int causal;
    ls_real *q, *k, *v, *dout, *out, *dq, *dk; /* (R,d); in backward out holds dv */
    ls_real *a, *da, *x, *b, *db;              /* (R,r); b = x where there are no exponentials */
    ls_real *a_near;                /* (R,r) a as it sees keys that are seen from c at the end; a or its own */
    ls_real *A, *dA, *B, *dB;       /* (R,F); dA and dB are the same memory, B = b where nothing turns */
    ls_real *w, *dw;                /* (R,n) */
    ls_real *S, *z, *all_S, *all_z; /* (P,F,d), (P,F); (G,F,d), (G,F) */
    double *running, *step;         /* (G, F (d+1)); (CAUSAL_ROWS,2) sin jω, cos jω */
    ls_real *top, *flows;           /* (R) */
    ls_real *c, *inverse, *delta;   /* (R) of this slab, in backward of all slabs one after the other */
    ls_real *all_c, *all_inverse, *all_delta;
    ls_real *start; /* (G,N+1) c before each chunk, and at the end */
    int64_t each_start;
} linear;
} // namespace

static int64_t exponentials_of(const ls_pass *p)
{
    const ls_feature_map *map = (const ls_feature_map *)p->kit;
    return map->exponentials == NULL ? 0 : map->exponentials(p);
}

static int64_t features_of(const ls_pass *p)
{
    return ((const ls_feature_map *)p->kit)->features(p);
}

static int64_t turned(const ls_pass *p)
{
    return (((const ls_feature_map *)p->kit)->turn != NULL ? 2 : 1) * features_of(p);
}

static const ls_feature_map_cuda *map_of(const ls_pass *p)
{
    return ((const ls_feature_map *)p->kit)->cuda;
}

static cut cut_rows(const ls_pass *p, int64_t rows, int64_t most)
{
    cut c;
    c.C = ls_max(1, ls_min(rows, most));
    c.N = (rows + c.C - 1) / c.C;
    c.K = ls_max(1, ls_min(c.N, LS_LINEAR_SLAB / (p->B * p->H * c.C)));
    return c;
}

static int64_t most_rows(const ls_pass *p, int64_t rows)
{
    const cut c = cut_rows(p, rows, ROWS), causal = cut_rows(p, rows, CAUSAL_ROWS);
    return p->B * p->H * ls_max(c.K * c.C, causal.K * causal.C);
}

static int64_t most_chunks(const ls_pass *p, int64_t rows)
{
    return p->B * p->H * ls_max(cut_rows(p, rows, ROWS).K, cut_rows(p, rows, CAUSAL_ROWS).K);
}

int64_t ls_linear_cuda_rows(const ls_pass *p)
{
    return ls_max(most_rows(p, p->T), most_rows(p, p->S));
}

static int has_pairs(const ls_pass *p)
{
    return p->all_keys <= SHORT && !p->step;
}

/* ------------------------------------------------------------------------------------------------ memory */

/* Hands out a buffer of work[]. */
typedef struct purse {
    ls_real *at;
} purse;

static ls_real *give(purse *from, int64_t reals)
{
    ls_real *x = from->at;
    from->at += reals;
    return x;
}

/* The sizes of plan() and the pointers of begin(). */
typedef struct sizes {
    int64_t G, R, P, n; /* R rows and P chunks of a slab, n keys within */
    int64_t traced;     /* rows of c, inverse, delta */
    int64_t starts;     /* N + 1 */
    int back, near, turns;
} sizes;

static sizes sizes_of(const ls_pass *p)
{
    const int sweeps = p->pattern == LS_CS && p->backward;
    const cut queries = cut_rows(p, p->T, CAUSAL_ROWS), keys = cut_rows(p, p->S, ROWS);
    sizes s;
    s.G = p->B * p->H;
    s.R = ls_linear_cuda_rows(p);
    s.P = ls_max(most_chunks(p, p->T), most_chunks(p, p->S));
    s.n = ls_max(p->pattern == LS_CS ? queries.C : 0, has_pairs(p) ? p->all_keys : 0);
    s.traced = ls_max(s.R, sweeps ? s.G * queries.N * queries.C : 0);
    s.starts = ls_max(p->pattern == LS_CS ? queries.N : 0, keys.N) + 1;
    s.back = p->backward != 0;
    s.near = exponentials_of(p) > 0;
    s.turns = ((const ls_feature_map *)p->kit)->turn != NULL;
    return s;
}

void ls_linear_cuda_plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    const sizes s = sizes_of(p);
    const int64_t r = features_of(p), F = turned(p), d = p->d;
    const int64_t keys = has_pairs(p) ? s.G * p->all_keys : 0;
    const int64_t doubles = ls_max(s.G * F * (d + 1), keys * (r + d)) + 2 * CAUSAL_ROWS;
    p->work[QUERIES] = ls_take(work, (1 + s.back + s.near) * s.R * r);
    p->work[KEYS] = ls_take(work, (1 + s.back + s.near) * s.R * r);
    p->work[TURNED] = ls_take(work, (1 + s.back + s.turns) * s.R * F);
    p->work[STAGE] = ls_take(work, (s.back ? 7 : 4) * s.R * d);
    p->work[WEIGHTS] = ls_take(work, (1 + s.back) * s.R * s.n);
    p->work[STATES] = ls_take(work, (s.P + s.G) * F * (d + 1));
    p->work[DOUBLES] = (ls_real *)ls_arena_take(work, (size_t)doubles * sizeof(double));
    p->work[TRACE] = ls_take(work, 2 * s.R + 3 * s.traced + s.G * s.starts);
    p->work[ALL_KEYS] = ls_take(work, keys * (2 * r + d + 1) + (s.back && keys > 0 ? s.P * p->all_keys * (r + d) : 0));
}

__global__ static void fill_steps(double turn, double *step)
{
    LS_EACH(j, CAUSAL_ROWS)
    {
        step[2 * j] = sin(turn * (double)j);
        step[2 * j + 1] = cos(turn * (double)j);
    }
}

static linear begin(ls_pass *p)
{
    const ls_feature_map *map = (const ls_feature_map *)p->kit;
    const sizes s = sizes_of(p);
    linear x = {};
    const int64_t F = x.F = turned(p), r = x.r = features_of(p), d = x.d = p->d, R = s.R;
    x.exponentials = exponentials_of(p);
    x.turns = s.turns;
    x.turn = x.turns ? map->turn(p) : 0;
    x.floor = map->floor(p);
    purse w = {p->work[QUERIES]};
    x.a = give(&w, R * r);
    x.a_near = s.near ? give(&w, R * r) : x.a;
    x.da = s.back ? give(&w, R * r) : NULL;
    w.at = p->work[KEYS];
    x.x = give(&w, R * r);
    x.b = s.near ? give(&w, R * r) : x.x;
    x.db = s.back ? give(&w, R * r) : NULL;
    w.at = p->work[TURNED];
    x.A = give(&w, R * F);
    x.B = x.turns ? give(&w, R * F) : x.b;
    x.dA = x.dB = s.back ? give(&w, R * F) : NULL;
    w.at = p->work[STAGE];
    ls_real **const staged[] = {&x.q, &x.k, &x.v, &x.out, &x.dout, &x.dq, &x.dk};
    for (int i = 0; i < (s.back ? 7 : 4); i++) *staged[i] = give(&w, R * d);
    w.at = p->work[WEIGHTS];
    x.w = give(&w, R * s.n);
    x.dw = s.back ? give(&w, R * s.n) : NULL;
    w.at = p->work[STATES];
    x.S = give(&w, s.P * F * d);
    x.all_S = give(&w, s.G * F * d);
    x.z = give(&w, s.P * F);
    x.all_z = give(&w, s.G * F);
    x.step = (double *)(void *)p->work[DOUBLES];
    x.running = x.step + 2 * CAUSAL_ROWS;
    w.at = p->work[TRACE];
    x.top = give(&w, R);
    x.flows = give(&w, R);
    x.c = x.all_c = give(&w, s.traced);
    x.inverse = x.all_inverse = give(&w, s.traced);
    x.delta = x.all_delta = give(&w, s.traced);
    x.start = give(&w, s.G * s.starts);
    x.each_start = s.starts;
    if (x.turns) LS_LAUNCH(p->queue, fill_steps, 1, CAUSAL_ROWS, 0, x.turn, x.step);
    return x;
}

/* The slab that begins with chunk k. */
static void go_to(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k)
{
    x->s.B = p->B;
    x->s.H = p->H;
    x->s.K = ls_min(c.K, c.N - k);
    x->s.C = c.C;
    x->s.first = k * c.C;
    x->s.rows = rows;
}

/* What is kept of rows from slab to slab lies slab after slab. */
static void go_to_traced(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k)
{
    go_to(p, x, c, rows, k);
    const int64_t at = p->B * p->H * k * c.C;
    x->c = x->all_c + at;
    x->inverse = x->all_inverse + at;
    x->delta = x->all_delta + at;
}

static int64_t chunks_of(const linear *x)
{
    return x->s.H * x->s.B * x->s.K;
}

static int64_t rows_per_head(const linear *x)
{
    return x->s.B * x->s.K * x->s.C;
}

static side queries_of(const ls_pass *p)
{
    side q = {p->pad_q, p->query_span[0].lo};
    return q;
}

static side keys_of(const ls_pass *p)
{
    side k = {p->own.pad, p->own.span[0].lo};
    return k;
}

/* ------------------------------------------------------------------------------------------------ rows */

__device__ static inline int64_t rows_of(const slab &s)
{
    return s.H * s.B * s.K * s.C;
}

__device__ static inline place place_of(const slab &s, int64_t R)
{
    place at;
    at.g = R / (s.K * s.C);
    at.u = R - at.g * (s.K * s.C);
    at.h = at.g / s.B;
    at.b = at.g - at.h * s.B;
    at.t = s.first + at.u;
    return at;
}

/* Neither past the end nor padded. */
__device__ static inline int is_there(const slab &s, const uint8_t *pad, place at)
{
    return at.t < s.rows && !ls_is_padded(pad, at.b * s.rows + at.t);
}

__device__ static inline ls_real level_of(level c, const slab &s, place at)
{
    return c.p[at.g * c.each_g + at.u / s.C * c.each_k];
}

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

/* scale (R), NULL: 1. */
__global__ static void write_rows(slab s, int64_t d, const ls_real *from, const ls_real *scale, ls_view v,
                                  const uint8_t *pad, int add)
{
    LS_EACH_ROW(R, rows_of(s))
    {
        const place at = place_of(s, R);
        if (at.t >= s.rows) continue;
        const int there = is_there(s, pad, at);
        const ls_real by = scale == NULL ? 1 : scale[R];
        ls_real *to = ls_row(v, at.b, at.h, at.t);
        LS_EACH_LANE(e, d)
        {
            const ls_real y = there ? by * from[R * d + e] : 0;
            to[e] = add ? to[e] + y : y;
        }
    }
}

static void stage(ls_pass *p, const linear *x, ls_view v, const uint8_t *pad, ls_real *to)
{
    LS_LAUNCH(p->queue, stage_rows, ls_row_blocks(chunks_of(x) * x->s.C), LS_THREADS, 0, x->s, x->d, v, pad, to);
}

static void put_rows(ls_pass *p, const linear *x, const ls_real *from, const ls_real *scale, ls_view v,
                     const uint8_t *pad, int add)
{
    LS_LAUNCH(p->queue, write_rows, ls_row_blocks(chunks_of(x) * x->s.C), LS_THREADS, 0, x->s, x->d, from, scale, v,
              pad, add);
}

/* A kernel that takes x and goes by rows of the slab. */
#define LAUNCH_ROWS(p, kernel, x, ...)                                                                                 \
    LS_LAUNCH((p)->queue, kernel, ls_row_blocks(chunks_of(&(x)) * (x).s.C), LS_THREADS, 0, x, __VA_ARGS__)

/* C_i (m,n) = op(A_i) op(B_i) + beta C_i, a batch of matrices that lie one after the other. */
static void multiply(ls_pass *p, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k, const ls_real *a,
                     const ls_real *b, double beta, ls_real *c, int64_t batch)
{
    ls_gemm_batch(p->queue, transpose_a, transpose_b, m, n, k, 1, a, transpose_a ? m : k, m * k, b, transpose_b ? k : n,
                  k * n, beta, c, n, m * n, batch);
}

/* ------------------------------------------------------------------------------------------------ features */

/* c of each row of keys, the maximum so far, from start[g] on; start[g + 1..] := c after each chunk. A block for each
 * (b,h): blockDim rows at a time. */
__global__ static void find_maxima(linear x, side k, ls_real *start)
{
    __shared__ ls_real highest[LS_THREADS / LS_WARP];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    const int64_t rows = x.s.K * x.s.C;
    for (int64_t g = blockIdx.x; g < x.s.H * x.s.B; g += gridDim.x) {
        ls_real *level = start + g * x.each_start, before = level[0];
        for (int64_t first = 0; first < rows; first += blockDim.x) {
            const int64_t u = first + threadIdx.x, R = g * rows + u;
            ls_real c = before;
            if (u < rows && is_there(x.s, k.pad, place_of(x.s, R)) && x.top[R] > c) c = x.top[R];
            for (int step = 1; step < LS_WARP; step *= 2) {
                const ls_real other = __shfl_sync(0xffffffffu, c, lane < step ? lane : lane - step);
                if (other > c) c = other;
            }
            if (lane == LS_WARP - 1) highest[warp] = c;
            __syncthreads();
            for (int i = 0; i < warps; i++) {
                if (i < warp && highest[i] > c) c = highest[i];
                if (highest[i] > before) before = highest[i];
            }
            __syncthreads();
            if (u >= rows) continue;
            x.c[R] = c;
            if ((u + 1) % x.s.C == 0) level[(u + 1) / x.s.C] = c;
        }
    }
}

/* sin ω(i+1), cos ω(i+1) of global position i. */
typedef struct angle {
    ls_real sine, cosine;
} angle;

__device__ static inline angle angle_of(const linear &x, int64_t i)
{
    angle y = {0, 1};
    if (!x.turns) return y;
    const double at = x.turn * (double)(i + 1);
    y.sine = (ls_real)sin(at);
    y.cosine = (ls_real)cos(at);
    return y;
}

/* Keys made ready: x is -inf, or 0, where no key is; b = e^(x - c), and B. turned 0: no B. */
__global__ static void ready_keys(linear x, side k, level c, int turned)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const place at = place_of(x.s, R);
        const int there = is_there(x.s, k.pad, at), turns = x.turns && turned;
        const angle y = turns ? angle_of(x, k.lo + at.t) : angle{0, 1};
        const ls_real top = x.exponentials > 0 ? level_of(c, x.s, at) : 0, from = top == -INFINITY ? 0 : top;
        LS_EACH_LANE(f, x.r)
        {
            const int e = f < x.exponentials;
            const ls_real raw = there ? x.x[R * x.r + f] : e ? -INFINITY : 0;
            /* above 0 are only keys that nobody sees */
            const ls_real b = e ? ls_exp(raw - from > 0 ? 0 : raw - from) : raw;
            if (!there) x.x[R * x.r + f] = raw;
            x.b[R * x.r + f] = b;
            if (!turns) continue;
            x.B[R * x.F + f] = y.sine * b;
            x.B[R * x.F + x.r + f] = y.cosine * b;
        }
    }
}

/* Does c rise too much in problem number i for its keys to be seen from c at its end? */
__device__ static inline int is_steep(const linear &x, int64_t i, ls_real end)
{
    return x.exponentials > 0 &&
           end - x.c[i * x.M] > (ls_real)LS_LINEAR_RISE; /* also from -inf on, not if all is -inf */
}

__device__ static inline ls_real end_of(const linear &x, int64_t i, level end)
{
    return level_of(end, x.s, place_of(x.s, i * x.M + x.M - 1));
}

/* What a query's exponentials are multiplied by, to see what is seen from c before its chunk, or at its end. */
typedef struct views {
    ls_real past, near;
} views;

__device__ static inline views views_of(const linear &x, int64_t R, place at, level before, level end)
{
    views v = {1, 1};
    if (x.exponentials == 0) return v;
    if (before.p != NULL) v.past = (ls_real)ls_linear_change(level_of(before, x.s, at), x.c[R]);
    if (end.p != NULL) {
        const ls_real last = level_of(end, x.s, at);
        v.near = x.c[R] == -INFINITY || is_steep(x, R / x.M, last) ? 1 : ls_exp(last - x.c[R]);
    }
    return v;
}

/* Queries made ready: a is 0 where none is; a_near, and A, which is multiplied by scale (R), NULL: 1. A NULL: no A. */
__global__ static void ready_queries(linear x, side q, level before, level end, const ls_real *scale, ls_real *A)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const place at = place_of(x.s, R);
        const int there = is_there(x.s, q.pad, at);
        const angle y = A != NULL ? angle_of(x, q.lo + at.t) : angle{0, 1};
        const views v = views_of(x, R, at, before, end);
        const ls_real by = scale == NULL ? 1 : scale[R];
        LS_EACH_LANE(f, x.r)
        {
            const int e = f < x.exponentials;
            const ls_real a = there ? x.a[R * x.r + f] : 0, past = by * (e ? v.past * a : a);
            x.a[R * x.r + f] = a;
            if (x.a_near != x.a) x.a_near[R * x.r + f] = e ? v.near * a : a;
            if (A == NULL) continue;
            A[R * x.F + f] = x.turns ? y.sine * past : past;
            if (x.turns) A[R * x.F + x.r + f] = y.cosine * past;
        }
    }
}

static const level nowhere = {NULL, 0, 0};

/* c before the chunks of the slab, and at their ends. */
static level before_chunks(const linear *x)
{
    level c = {x->start + x->s.first / x->s.C, x->each_start, 1};
    return c;
}

static level after_chunks(const linear *x)
{
    level c = before_chunks(x);
    c.p++;
    return c;
}

static void load_queries(ls_pass *p, const linear *x)
{
    stage(p, x, p->q, p->pad_q, x->q);
    map_of(p)->queries(p, rows_per_head(x), x->q, x->a);
}

/* k, v, and x, top, not yet ready. */
static void load_keys(ls_pass *p, const linear *x)
{
    stage(p, x, p->own.k, p->own.pad, x->k);
    stage(p, x, p->own.v, p->own.pad, x->v);
    map_of(p)->keys(p, rows_per_head(x), x->k, x->x, x->top);
}

static void follow_maxima(ls_pass *p, const linear *x)
{
    if (x->exponentials == 0) return;
    LS_LAUNCH(p->queue, find_maxima, ls_blocks(x->s.H * x->s.B, 1), LS_THREADS, 0, *x, keys_of(p),
              x->start + x->s.first / x->s.C);
}

/* ------------------------------------------------------------------------------------------------ gradients of rows */

/* da of a, from dA (past) and from what a_near got, which is in da (near), straightened: see straighten() of linear.c.
 */
__global__ static void finish_queries(linear x, side q, level before, level end, int past, int near)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const place at = place_of(x.s, R);
        const angle y = past ? angle_of(x, q.lo + at.t) : angle{0, 1};
        const views v = views_of(x, R, at, before, end);
        const ls_real *a = x.a + R * x.r, *dA = x.dA + R * x.F;
        ls_real *da = x.da + R * x.r;
        double square = 0, along = 0;
        LS_EACH_LANE(f, x.r)
        {
            const int e = f < x.exponentials;
            ls_real g = near ? (e ? v.near : 1) * da[f] : 0;
            if (past) g += (e ? v.past : 1) * (x.turns ? y.sine * dA[f] + y.cosine * dA[x.r + f] : dA[f]);
            da[f] = g;
            square += (double)a[f] * (double)a[f];
            along += (double)a[f] * (double)g;
        }
        square = ls_warp_sum(square);
        along = ls_warp_sum(along);
        if (x.flows[R] == 0 || !(square > 0)) continue;
        LS_EACH_LANE(f, x.r) da[f] = (ls_real)((double)da[f] - along / square * (double)a[f]);
    }
}

/* db of x, from dB, to which z (F) of each problem is added, and nothing where no key is. */
__global__ static void finish_keys(linear x, side k, const ls_real *z)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const place at = place_of(x.s, R);
        const int there = is_there(x.s, k.pad, at);
        const angle y = angle_of(x, k.lo + at.t);
        const ls_real *dB = x.dB + R * x.F, *sum = z + R / x.M * x.F;
        LS_EACH_LANE(f, x.r)
        {
            const ls_real sines = dB[f] + sum[f];
            const ls_real g = x.turns ? y.sine * sines + y.cosine * (dB[x.r + f] + sum[x.r + f]) : sines;
            x.db[R * x.r + f] = !there ? 0 : f < x.exponentials ? g * x.b[R * x.r + f] : g;
        }
    }
}

/* db (rows,r) of b becomes that of x; problem i has n of them, and `repeats` problems one after the other the same b.
 * Those of steep problems are gradients of x already. */
__global__ static void finish_near_keys(linear x, level end, int64_t rows, int64_t repeats, ls_real *db)
{
    LS_EACH_ROW(R, rows)
    {
        const int64_t i = R / (x.n * repeats), row = i * x.n + R % x.n;
        if (is_steep(x, i, end_of(x, i, end))) continue;
        LS_EACH_LANE(f, x.exponentials) db[R * x.r + f] *= x.b[row * x.r + f];
    }
}

/* 0 where no key is. */
__global__ static void clean_rows(linear x, side k, int64_t width, ls_real *rows)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        if (is_there(x.s, k.pad, place_of(x.s, R))) continue;
        LS_EACH_LANE(f, width) rows[R * width + f] = 0;
    }
}

/* dq from da, dk from db, and dv. */
static void write_queries(ls_pass *p, const linear *x)
{
    map_of(p)->queries_backward(p, rows_per_head(x), x->q, x->da, x->dq);
    put_rows(p, x, x->dq, NULL, p->dq, p->pad_q, 0);
}

static void write_keys(ls_pass *p, const linear *x, int add)
{
    map_of(p)->keys_backward(p, rows_per_head(x), x->k, x->db, x->dk);
    put_rows(p, x, x->dk, NULL, p->own.dk, p->own.pad, add);
    put_rows(p, x, x->out, NULL, p->own.dv, p->own.pad, add);
}

/* ------------------------------------------------------------------------------------------------ within */

/* Query number i of a problem: where it stands among its keys, and how many of them it sees. */
typedef struct outlook {
    int64_t at, sees;
    double sine, cosine; /* of ω at */
} outlook;

__device__ static inline outlook outlook_of(const linear &x, int64_t i)
{
    outlook y;
    y.at = x.relative + i;
    y.sees = !x.causal || y.at + 1 > x.n ? x.n : y.at + 1;
    const int turns = x.turns && x.n > 0;
    y.sine = turns ? sin(x.turn * (double)y.at) : 0;
    y.cosine = turns ? cos(x.turn * (double)y.at) : 1;
    return y;
}

/* cos ω(i - j) of key j, 0 where it is not seen. */
__device__ static inline ls_real apart(const linear &x, const outlook &y, int64_t j)
{
    if (j >= y.sees) return 0;
    return x.turns ? (ls_real)(y.cosine * x.step[2 * j + 1] + y.sine * x.step[2 * j]) : 1;
}

/* The denominator of row R: w, which holds a·b, becomes the weights of what is within; z (F) of its problem or NULL: of
 * what came before. A lane writes what it will read. */
__device__ static double weigh_row(const linear &x, const outlook &y, int64_t R, const ls_real *z)
{
    double sum = 0;
    ls_real *w = x.w + R * x.n;
    LS_EACH_LANE(j, x.n)
    {
        w[j] = j < y.sees ? w[j] * apart(x, y, j) : 0;
        sum += (double)w[j];
    }
    const ls_real *A = x.A + R * x.F;
    LS_EACH_LANE(f, z == NULL ? 0 : x.F) sum += (double)A[f] * (double)z[f];
    return ls_warp_sum(sum);
}

__global__ static void weigh(linear x, const ls_real *z)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        int flows;
        const double D = weigh_row(x, outlook_of(x, R % x.M), R, z == NULL ? NULL : z + R / x.M * x.F);
        const ls_real inverse = ls_linear_inverse(D, x.floor, &flows);
        if (threadIdx.x % LS_WARP == 0) x.inverse[R] = inverse;
    }
}

/* w, dw, dA hold a·b, do·v, S do: they become w / D, the gradient of a·b, and that of A, which, with `divides`, becomes
 * A / D. δ is the sum of what it is taken from, in double. */
__global__ static void weigh_backward(linear x, const ls_real *z, int divides)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const outlook y = outlook_of(x, R % x.M);
        const ls_real *sum = z == NULL ? NULL : z + R / x.M * x.F;
        const int64_t F = z == NULL ? 0 : x.F;
        ls_real *w = x.w + R * x.n, *dw = x.dw + R * x.n, *A = x.A + R * x.F, *dA = x.dA + R * x.F;
        const double D = weigh_row(x, y, R, sum);
        double dot = 0;
        LS_EACH_LANE(j, x.n) dot += (double)w[j] * (double)dw[j];
        LS_EACH_LANE(f, F) dot += (double)A[f] * (double)dA[f];
        dot = ls_warp_sum(dot);
        int flows;
        const ls_real by = ls_linear_inverse(D, x.floor, &flows), delta = flows ? (ls_real)(dot / D) : 0;
        LS_EACH_LANE(j, x.n)
        {
            dw[j] = by * (dw[j] - delta) * apart(x, y, j);
            w[j] *= by;
        }
        LS_EACH_LANE(f, F)
        {
            dA[f] = by * (dA[f] - delta * sum[f]);
            if (divides) A[f] *= by;
        }
        if (threadIdx.x % LS_WARP != 0) continue;
        x.inverse[R] = by;
        x.delta[R] = delta;
        x.flows[R] = (ls_real)flows;
    }
}

/* The exponentials of key row j seen from c, or its other features. */
__device__ static inline ls_real seen_from(const linear &x, int64_t row, int64_t f, ls_real c)
{
    const ls_real from = c == -INFINITY ? 0 : c;
    return f < x.exponentials ? ls_exp(x.x[row * x.r + f] - from) : x.x[row * x.r + f];
}

/* Steep problems pair by pair, a block for each: w, da, and db, which is that of x. */
#define EACH_STEEP(i, x, end, problems)                                                                                \
    for (int64_t i = blockIdx.x; i < (problems); i += gridDim.x)                                                       \
        if (is_steep(x, i, end_of(x, i, end)))

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
    multiply(p, 0, 1, x->M, x->n, x->r, x->a_near, x->b, 0, x->w, problems);
    if (x->causal && x->exponentials > 0)
        LS_LAUNCH(p->queue, steep_weights, ls_blocks(problems, 1), LS_THREADS, 0, *x, end, problems);
}

/* ------------------------------------------------------------------------------------------------ states */

/* z (chunks,F) := Σ weight_i rows_i over the C rows of each chunk; weight (R) is taken negative, NULL: 1. */
__global__ static void sum_rows(int64_t chunks, int64_t C, int64_t F, const ls_real *rows, const ls_real *weight,
                                ls_real *z)
{
    LS_EACH(at, chunks * F)
    {
        const int64_t chunk = at / F, f = at - chunk * F;
        double sum = 0;
        for (int64_t i = chunk * C; i < (chunk + 1) * C; i++)
            sum += (weight == NULL ? 1 : -(double)weight[i]) * (double)rows[i * F + f];
        z[at] = (ls_real)sum;
    }
}

/* S, z of each chunk := Σ rows_i matrix_iᵀ, Σ weight_i rows_i. */
static void gather(ls_pass *p, const linear *x, const ls_real *rows, const ls_real *matrix, const ls_real *weight)
{
    const int64_t chunks = chunks_of(x);
    multiply(p, 1, 0, x->F, x->d, x->s.C, rows, matrix, 0, x->S, chunks);
    LS_LAUNCH(p->queue, sum_rows, ls_blocks(chunks * x->F, LS_THREADS), LS_THREADS, 0, chunks, x->s.C, x->F, rows,
              weight, x->z);
}

/* Numbers of chunks (G,K,n), the first `scaled` of each seen from c. */
namespace
{
typedef struct numbers {
    ls_real *x;
    int64_t n, scaled;
} numbers;
} // namespace
enum { KEEPS = 1, REVERSED = 2 };

/* running (G,a.n+b.n) grows by all chunks, from the first to the last or REVERSED; KEEPS: chunks get what it was before
 * them. start: c before the first chunk and after each; p NULL: there is no c. What is after a chunk's keys is seen
 * from c after it, and on the other side of it from c before it. */
__global__ static void scan(int64_t G, int64_t K, numbers a, numbers b, level start, int how, double *running)
{
    LS_EACH(at, G * (a.n + b.n))
    {
        const int64_t g = at / (a.n + b.n), i = at - g * (a.n + b.n), e = i < a.n ? i : i - a.n;
        const numbers y = i < a.n ? a : b;
        const ls_real *c = start.p != NULL && e < y.scaled ? start.p + g * start.each_g : NULL;
        double sum = running[at];
        for (int64_t n = 0; n < K; n++) {
            const int64_t k = how & REVERSED ? K - 1 - n : n;
            ls_real *x = y.x + (g * K + k) * y.n + e;
            const double change = (double)*x;
            if (how & KEEPS) *x = (ls_real)sum;
            sum = (c == NULL ? sum : sum * ls_linear_change(c[k], c[k + 1])) + change;
        }
        running[at] = sum;
    }
}

static void scan_states(ls_pass *p, const linear *x, level start, int how)
{
    const int64_t G = x->s.H * x->s.B;
    const numbers S = {x->S, x->F * x->d, x->exponentials * x->d}, z = {x->z, x->F, x->exponentials};
    LS_LAUNCH(p->queue, scan, ls_blocks(G * x->F * (x->d + 1), LS_THREADS), LS_THREADS, 0, G, x->s.K, S, z,
              x->exponentials > 0 ? start : nowhere, how, x->running);
}

/* States on their way: (B,H) of [c] and F rows [S_f, z_f]. */
namespace
{
typedef struct parcel {
    int64_t B, H, F, d;
    int has_c;
} parcel;
} // namespace

static parcel parcel_of(const ls_pass *p, const linear *x)
{
    const parcel s = {p->B, p->H, x->F, x->d, x->exponentials > 0};
    return s;
}

/* Where number i of G F (d+1) is on its way; *g, *e: in running (G), [S][z]. */
__device__ static inline int64_t on_its_way(const parcel &s, int64_t i, int64_t *g, int64_t *e)
{
    const int64_t each = s.F * (s.d + 1), at = i % each, f = at / (s.d + 1), column = at % (s.d + 1);
    const int64_t b = i / each / s.H, h = i / each % s.H;
    *g = h * s.B + b;
    *e = column < s.d ? f * s.d + column : s.F * s.d + f;
    return (i / each) * (s.has_c + each) + s.has_c + at;
}

/* c: that of g is c[g each], NULL: 0. */
__global__ static void pack_states(parcel s, const double *running, const ls_real *c, int64_t each, ls_real *elements)
{
    LS_EACH(i, s.B * s.H * s.F * (s.d + 1))
    {
        int64_t g, e;
        const int64_t to = on_its_way(s, i, &g, &e);
        elements[to] = (ls_real)running[g * s.F * (s.d + 1) + e];
        if (s.has_c && i % (s.F * (s.d + 1)) == 0) elements[to - 1] = c == NULL ? 0 : c[g * each];
    }
}

/* To S, z, or where running is not NULL to it. c_of: where c is from, if not from elements. */
__global__ static void unpack_states(parcel s, const ls_real *elements, const ls_real *c_of, ls_real *S, ls_real *z,
                                     double *running, ls_real *c, int64_t each)
{
    LS_EACH(i, s.B * s.H * s.F * (s.d + 1))
    {
        int64_t g, e;
        const int64_t from = on_its_way(s, i, &g, &e), SS = s.F * s.d;
        const ls_real y = elements[from];
        if (running != NULL)
            running[g * (SS + s.F) + e] = (double)y;
        else if (e < SS)
            S[g * SS + e] = y;
        else
            z[g * s.F + e - SS] = y;
        if (s.has_c && i % (SS + s.F) == 0) c[g * each] = c_of[from - 1];
    }
}

/* n numbers of each g and, where c is not NULL, its c. */
__global__ static void clear_states(int64_t G, int64_t n, double *running, ls_real *c, int64_t each)
{
    LS_EACH(i, G * n)
    {
        running[i] = 0;
        if (c != NULL && i % n == 0) c[i / n * each] = -INFINITY;
    }
}

static void clear(ls_pass *p, const linear *x, int64_t n, ls_real *c)
{
    const int64_t G = p->B * p->H;
    LS_LAUNCH(p->queue, clear_states, ls_blocks(G * n, LS_THREADS), LS_THREADS, 0, G, n, x->running, c, x->each_start);
}

static void pack(ls_pass *p, const linear *x, const ls_real *c, ls_real *elements)
{
    const parcel s = parcel_of(p, x);
    LS_LAUNCH(p->queue, pack_states, ls_blocks(s.B * s.H * s.F * (s.d + 1), LS_THREADS), LS_THREADS, 0, s, x->running,
              c, x->each_start, elements);
}

/* To all_S, all_z, or to running; c to start. */
static void unpack(ls_pass *p, const linear *x, const ls_real *elements, const ls_real *c_of, double *running)
{
    const parcel s = parcel_of(p, x);
    LS_LAUNCH(p->queue, unpack_states, ls_blocks(s.B * s.H * s.F * (s.d + 1), LS_THREADS), LS_THREADS, 0, s, elements,
              c_of, x->all_S, x->all_z, running, x->start, x->each_start);
}

/* ------------------------------------------------------------------------------------------------ sums */

static ls_status kernel_sums(ls_pass *p, int phase)
{
    linear x = begin(p);
    const cut c = cut_rows(p, p->S, ROWS);
    clear(p, &x, x.F * (x.d + 1), x.start);
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to(p, &x, c, p->S, k);
        load_keys(p, &x);
        follow_maxima(p, &x);
        LAUNCH_ROWS(p, ready_keys, x, keys_of(p), after_chunks(&x), 1);
        gather(p, &x, x.B, x.v, NULL);
        scan_states(p, &x, before_chunks(&x), 0);
    }
    pack(p, &x, x.start + c.N, p->summary[phase + 1].sent);
    return ls_launched(p->queue, "linear attention: sums");
}

/* What keys that are ready get from S, z, which are gradients here: of M rows each. dk and dv are written. */
static void take_gradients(ls_pass *p, const linear *x, const ls_real *S, const ls_real *z, int add)
{
    const int64_t problems = chunks_of(x) * x->s.C / x->M;
    multiply(p, 0, 0, x->M, x->d, x->F, x->B, S, 0, x->out, problems);
    multiply(p, 0, 1, x->M, x->F, x->d, x->v, S, 0, x->dB, problems);
    LAUNCH_ROWS(p, finish_keys, *x, keys_of(p), z);
    write_keys(p, x, add);
}

/* CS: the causal kernel wrote dk and dv before, so this adds. */
static ls_status kernel_sums_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase + 1];
    const cut c = cut_rows(p, p->S, ROWS);
    unpack(p, &x, s->dsent, s->sent, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to(p, &x, c, p->S, k);
        x.M = x.s.K * x.s.C;
        load_keys(p, &x);
        const level all = {x.start, x.each_start, 0};
        LAUNCH_ROWS(p, ready_keys, x, keys_of(p), all, 1);
        take_gradients(p, &x, x.all_S, x.all_z, p->pattern == LS_CS);
    }
    return ls_launched(p->queue, "linear attention: gradient of sums");
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static void load_turned_queries(ls_pass *p, linear *x, cut c, int64_t k)
{
    go_to(p, x, c, p->T, k);
    x->M = x->s.K * x->s.C;
    load_queries(p, x);
    LAUNCH_ROWS(p, ready_queries, *x, queries_of(p), nowhere, nowhere, (const ls_real *)NULL, x->A);
}

static ls_status kernel_apply(ls_pass *p, int phase)
{
    linear x = begin(p);
    const cut c = cut_rows(p, p->T, ROWS);
    unpack(p, &x, p->summary[phase].got, p->summary[phase].got, NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        load_turned_queries(p, &x, c, k);
        LAUNCH_ROWS(p, weigh, x, x.all_z);
        multiply(p, 0, 0, x.M, x.d, x.F, x.A, x.all_S, 0, x.out, p->B * p->H);
        put_rows(p, &x, x.out, x.inverse, p->out, p->pad_q, 0);
    }
    return ls_launched(p->queue, "linear attention: apply");
}

static ls_status kernel_apply_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const cut c = cut_rows(p, p->T, ROWS);
    unpack(p, &x, s->got, s->got, NULL);
    clear(p, &x, x.F * (x.d + 1), NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        load_turned_queries(p, &x, c, k);
        stage(p, &x, p->dout, p->pad_q, x.dout);
        multiply(p, 0, 1, x.M, x.F, x.d, x.dout, x.all_S, 0, x.dA, p->B * p->H);
        LAUNCH_ROWS(p, weigh_backward, x, x.all_z, 1);
        gather(p, &x, x.A, x.dout, x.delta);
        scan_states(p, &x, nowhere, 0);
        LAUNCH_ROWS(p, finish_queries, x, queries_of(p), nowhere, nowhere, 1, 0);
        write_queries(p, &x);
    }
    pack(p, &x, NULL, s->dgot);
    return ls_launched(p->queue, "linear attention: gradient of apply");
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

static ls_status kernel_share(ls_pass *p, int phase)
{
    linear x = begin(p);
    const cut c = cut_rows(p, p->S, SHORT);
    if (c.N > 0) {
        go_to(p, &x, c, p->S, 0);
        load_keys(p, &x);
        LAUNCH_ROWS(p, send_keys, x, keys_of(p), message_of(p, &x, p->S), p->gathered[phase + 1].mine);
    }
    return ls_launched(p->queue, "linear attention: share");
}

/* db and, in out, dv. */
__global__ static void receive_gradients(linear x, message m, const ls_real *dkeys)
{
    LS_EACH_ROW(R, rows_of(x.s))
    {
        const ls_real *from = dkeys + in_message(m, R);
        LS_EACH_LANE(f, m.r) x.db[R * m.r + f] = from[f];
        LS_EACH_LANE(e, m.d) x.out[R * m.d + e] = from[m.r + e];
    }
}

static ls_status kernel_share_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const cut c = cut_rows(p, p->S, SHORT);
    if (c.N > 0) {
        go_to(p, &x, c, p->S, 0);
        load_keys(p, &x);
        LAUNCH_ROWS(p, receive_gradients, x, message_of(p, &x, p->S), p->gathered[phase + 1].dmine);
        LAUNCH_ROWS(p, clean_rows, x, keys_of(p), x.r, x.db);
        write_keys(p, &x, 0);
    }
    return ls_launched(p->queue, "linear attention: gradient of share");
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
    const int64_t S = p->all_keys, rows = p->B * p->H * S, chunks = most_chunks(p, p->T);
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
    go_to(p, x, c, p->T, at);
    x->M = x->s.K * x->s.C;
    x->relative = p->query_span[0].lo + x->s.first;
    load_queries(p, x);
    const level end = {x->c + x->M - 1, x->M, 0};
    const side keys = {NULL, 0};
    if (x->exponentials > 0) LAUNCH_ROWS(p, see_keys, *x, k->top);
    linear of_keys = *x;
    of_keys.s = k->s;
    LAUNCH_ROWS(p, ready_keys, of_keys, keys, end, 0);
    LAUNCH_ROWS(p, ready_queries, *x, queries_of(p), nowhere, end, (const ls_real *)NULL, (ls_real *)NULL);
    multiply_near(p, x, end, p->B * p->H);
    return end;
}

static ls_status kernel_pairs(ls_pass *p, int phase)
{
    linear x = begin(p);
    const all_keys keys = load_all_keys(p, &x, phase);
    const cut c = cut_rows(p, p->T, CAUSAL_ROWS);
    for (int64_t k = 0; k < c.N; k += c.K) {
        load_pairs(p, &x, &keys, c, k);
        LAUNCH_ROWS(p, weigh, x, (const ls_real *)NULL);
        multiply(p, 0, 0, x.M, x.d, x.n, x.w, keys.v, 0, x.out, p->B * p->H);
        put_rows(p, &x, x.out, x.inverse, p->out, p->pad_q, 0);
    }
    return ls_launched(p->queue, "linear attention: pairs");
}

/* What pairs get that are ready, w and dw made by weigh_backward: da of a_near, db of x, and dv. Keys are the same for
 * `repeats` chunks of C queries one after the other. */
static void near_gradients(ls_pass *p, linear *x, level end, int64_t problems, int64_t repeats, ls_real *db,
                           ls_real *dv)
{
    const int64_t chunks = problems * repeats, C = x->s.C;
    multiply(p, 0, 0, x->M, x->r, x->n, x->dw, x->b, 0, x->da, problems);
    multiply(p, 1, 0, x->n, x->r, C, x->dw, x->a_near, 0, db, chunks);
    multiply(p, 1, 0, x->n, x->d, C, x->w, x->dout, 0, dv, chunks);
    if (x->exponentials == 0) return;
    x->db = db;
    if (x->causal) LS_LAUNCH(p->queue, steep_gradients, ls_blocks(problems, 1), LS_THREADS, 0, *x, end, problems);
    LS_LAUNCH(p->queue, finish_near_keys, ls_row_blocks(chunks * x->n), LS_THREADS, 0, *x, end, chunks * x->n, repeats,
              db);
}

static ls_status kernel_pairs_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const all_keys keys = load_all_keys(p, &x, phase);
    const cut c = cut_rows(p, p->T, CAUSAL_ROWS);
    const int64_t G = p->B * p->H, S = x.n;
    clear(p, &x, S * (x.r + x.d), NULL);
    for (int64_t k = 0; k < c.N; k += c.K) {
        const level end = load_pairs(p, &x, &keys, c, k);
        stage(p, &x, p->dout, p->pad_q, x.dout);
        multiply(p, 0, 1, x.M, S, x.d, x.dout, keys.v, 0, x.dw, G);
        LAUNCH_ROWS(p, weigh_backward, x, (const ls_real *)NULL, 0);
        near_gradients(p, &x, end, G, x.s.K, keys.db, keys.dv);
        const numbers db = {keys.db, S * x.r, 0}, dv = {keys.dv, S * x.d, 0};
        LS_LAUNCH(p->queue, scan, ls_blocks(G * S * (x.r + x.d), LS_THREADS), LS_THREADS, 0, G, x.s.K, db, dv, nowhere,
                  0, x.running);
        LAUNCH_ROWS(p, finish_queries, x, queries_of(p), nowhere, end, 0, 1);
        write_queries(p, &x);
    }
    LS_LAUNCH(p->queue, send_gradients, ls_row_blocks(G * S), LS_THREADS, 0, message_of(p, &x, S), G * S, x.running,
              p->gathered[phase].dall);
    return ls_launched(p->queue, "linear attention: gradient of pairs");
}

/* ------------------------------------------------------------------------------------------------ apply, causal */

static void go_to_causal(ls_pass *p, linear *x, cut c, int64_t k)
{
    go_to_traced(p, x, c, p->T, k);
    x->M = x->n = c.C;
    x->relative = 0;
    x->causal = 1;
}

/* Chunks made ready, their c found; w = a·b. */
static void load_causal(ls_pass *p, linear *x)
{
    load_queries(p, x);
    load_keys(p, x);
    follow_maxima(p, x);
    LAUNCH_ROWS(p, ready_keys, *x, keys_of(p), after_chunks(x), 1);
    LAUNCH_ROWS(p, ready_queries, *x, queries_of(p), before_chunks(x), after_chunks(x), (const ls_real *)NULL, x->A);
    multiply_near(p, x, after_chunks(x), chunks_of(x));
}

/* S, z of each chunk := the state before it. */
static void find_prefixes(ls_pass *p, const linear *x)
{
    gather(p, x, x->B, x->v, NULL);
    scan_states(p, x, before_chunks(x), KEEPS);
}

static ls_status kernel_causal(ls_pass *p, int phase)
{
    linear x = begin(p);
    const cut c = cut_rows(p, p->T, CAUSAL_ROWS);
    unpack(p, &x, p->summary[phase].got, p->summary[phase].got, x.running);
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to(p, &x, c, p->T, k);
        x.M = x.n = c.C;
        x.causal = 1;
        load_causal(p, &x);
        find_prefixes(p, &x);
        const int64_t chunks = chunks_of(&x);
        LAUNCH_ROWS(p, weigh, x, x.z);
        multiply(p, 0, 0, c.C, x.d, c.C, x.w, x.v, 0, x.out, chunks);
        multiply(p, 0, 0, c.C, x.d, x.F, x.A, x.S, 1, x.out, chunks);
        put_rows(p, &x, x.out, x.inverse, p->out, p->pad_q, 0);
    }
    return ls_launched(p->queue, "linear attention: causal");
}

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. c, inverse, delta and start stay. */
static void sweep_past(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = 0; k < c.N; k += c.K) {
        go_to_causal(p, x, c, k);
        load_causal(p, x);
        find_prefixes(p, x);
        stage(p, x, p->dout, p->pad_q, x->dout);
        const int64_t chunks = chunks_of(x);
        multiply(p, 0, 1, c.C, c.C, x->d, x->dout, x->v, 0, x->dw, chunks);
        multiply(p, 0, 1, c.C, x->F, x->d, x->dout, x->S, 0, x->dA, chunks);
        LAUNCH_ROWS(p, weigh_backward, *x, x->z, 0);
        near_gradients(p, x, after_chunks(x), chunks, 1, x->db, x->out);
        LAUNCH_ROWS(p, finish_queries, *x, queries_of(p), before_chunks(x), after_chunks(x), 1, 1);
        LAUNCH_ROWS(p, clean_rows, *x, keys_of(p), x->r, x->db);
        write_queries(p, x);
        write_keys(p, x, 0);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(ls_pass *p, linear *x, cut c)
{
    for (int64_t k = c.N == 0 ? -1 : (c.N - 1) / c.K * c.K; k >= 0; k -= c.K) {
        go_to_causal(p, x, c, k);
        load_queries(p, x);
        load_keys(p, x);
        stage(p, x, p->dout, p->pad_q, x->dout);
        LAUNCH_ROWS(p, ready_keys, *x, keys_of(p), after_chunks(x), 1);
        LAUNCH_ROWS(p, ready_queries, *x, queries_of(p), before_chunks(x), after_chunks(x), (const ls_real *)x->inverse,
                    x->A);
        gather(p, x, x->A, x->dout, x->delta);
        scan_states(p, x, before_chunks(x), KEEPS | REVERSED);
        take_gradients(p, x, x->S, x->z, 1);
    }
}

static ls_status kernel_causal_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const cut c = cut_rows(p, p->T, CAUSAL_ROWS);
    unpack(p, &x, s->got, s->got, x.running);
    sweep_past(p, &x, c);
    clear(p, &x, x.F * (x.d + 1), NULL);
    sweep_future(p, &x, c);
    pack(p, &x, NULL, s->dgot);
    return ls_launched(p->queue, "linear attention: gradient of causal");
}

/* ------------------------------------------------------------------------------------------------ table */

static ls_status kernel_prepare(ls_pass *p, int phase)
{
    (void)phase;
    map_of(p)->prepare(p);
    return ls_launched(p->queue, "linear attention: prepare");
}

/* A source is summarised apart from the steps that follow, so what they need is prepared for it too. */
static ls_status kernel_source(ls_pass *p, int phase)
{
    if (map_of(p)->prepare != NULL) map_of(p)->prepare(p);
    return kernel_sums(p, phase);
}

extern "C" const ls_cuda_kernel ls_linear_cuda_kernels[] = {
    {"prepare", kernel_prepare, NULL},
    {"share", kernel_share, kernel_share_backward},
    {"pairs", kernel_pairs, kernel_pairs_backward},
    {"sums", kernel_sums, kernel_sums_backward},
    {"source", kernel_source, NULL},
    {"apply", kernel_apply, kernel_apply_backward},
    {"causal", kernel_causal, kernel_causal_backward},
    {NULL, NULL, NULL},
};
