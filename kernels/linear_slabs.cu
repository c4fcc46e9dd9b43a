/* Slabs of linear attention on a GPU: memory, who makes features, and the maxima of exponents. Theory: linear_slabs.h.
 */
#include "linear_slabs.h"

#ifndef LS_LINEAR_SLAB /* most rows of a slab; a test may make it so small that there are several slabs */
#define LS_LINEAR_SLAB 262144
#endif

/* ------------------------------------------------------------------------------------------------ slabs */

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

static int has_pairs(const ls_pass *p)
{
    return p->all_keys <= SHORT && !p->step;
}

/* Are features made, to lie in memory? */
static int are_made(const ls_pass *p)
{
    return map_of(p)->act == NULL || has_pairs(p);
}

/* Rows of a slab of chunks of C rows: of numbers that are kept for each, features and what a state is to each row of
 * its chunk, 24 LS_LINEAR_SLAB (25 MB) stay in the second cache until they are read again: it has 40 MB on an A100. */
static int64_t slab_rows(const ls_pass *p, int64_t C)
{
    const int64_t each = are_made(p) * features_of(p) + turned(p) * (p->d + 1) / C;
    return ls_max(LS_LINEAR_SLAB / 4, ls_min(LS_LINEAR_SLAB, 24 * LS_LINEAR_SLAB / ls_max(each, 1)));
}

/* Slabs are about as long as one another: a short one at the end would not fill a GPU. */
cut ls_linear_cut_rows(const ls_pass *p, int64_t rows, int64_t most)
{
    cut c;
    c.C = ls_max(1, ls_min(rows, most));
    c.N = (rows + c.C - 1) / c.C;
    const int64_t fit = ls_max(1, slab_rows(p, c.C) / (p->B * p->H * c.C)), slabs = ls_max(1, (c.N + fit - 1) / fit);
    c.K = ls_max(1, (c.N + slabs - 1) / slabs);
    return c;
}

static int64_t most_rows(const ls_pass *p, int64_t rows)
{
    const cut c = ls_linear_cut_rows(p, rows, ROWS), causal = ls_linear_cut_rows(p, rows, CAUSAL_ROWS);
    return p->B * p->H * ls_max(c.K * c.C, causal.K * causal.C);
}

int64_t ls_linear_most_chunks(const ls_pass *p, int64_t rows)
{
    return p->B * p->H * ls_max(ls_linear_cut_rows(p, rows, ROWS).K, ls_linear_cut_rows(p, rows, CAUSAL_ROWS).K);
}

int64_t ls_linear_cuda_rows(const ls_pass *p)
{
    return ls_max(most_rows(p, p->T), most_rows(p, p->S));
}

/* ------------------------------------------------------------------------------------------------ memory */

/* The sizes of ls_linear_cuda_plan and of what ls_linear_begin hands out. */
namespace
{
typedef struct sizes {
    int64_t G, R, P, n; /* R rows and P chunks of a slab, n few keys */
    int64_t traced;     /* rows of c, inverse, delta */
    int64_t starts;     /* N + 1 */
    int64_t beside;     /* numbers of a row of dA */
    int back, made, near;
    int waits; /* da, which is made in two parts where keys are seen one by one */
} sizes;
} // namespace

static sizes sizes_of(const ls_pass *p)
{
    const int sweeps = p->pattern == LS_CS && p->backward;
    const cut queries = ls_linear_cut_rows(p, p->T, CAUSAL_ROWS), keys = ls_linear_cut_rows(p, p->S, ROWS);
    sizes s;
    s.G = p->B * p->H;
    s.R = ls_linear_cuda_rows(p);
    s.P = ls_max(ls_linear_most_chunks(p, p->T), ls_linear_most_chunks(p, p->S));
    s.n = has_pairs(p) ? p->all_keys : 0;
    s.traced = ls_max(s.R, sweeps ? s.G * queries.N * queries.C : 0);
    s.starts = ls_max(p->pattern == LS_CS ? queries.N : 0, keys.N) + 1;
    s.back = p->backward != 0;
    s.made = are_made(p);
    s.near = s.n > 0 && exponentials_of(p) > 0;
    s.waits = s.back && (s.made || p->pattern == LS_CS);
    s.beside = s.back ? ls_linear_beside(p, turned(p)) : 0;
    return s;
}

void ls_linear_cuda_plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    (void)saved;
    const sizes s = sizes_of(p);
    const int64_t r = features_of(p), F = turned(p), d = p->d;
    const int64_t keys = has_pairs(p) ? s.G * p->all_keys : 0;
    const int64_t turns = CAUSAL_ROWS + angles_of(p, p->T) + angles_of(p, p->S);
    const int64_t doubles = ls_max(s.G * F * (d + 1), keys * (r + d)) + 2 * turns;
    p->work[QUERIES] = ls_take(work, (s.made + s.near + s.waits) * s.R * r);
    p->work[KEYS] = ls_take(work, (1 + s.back) * s.made * s.R * r);
    p->work[BESIDE] = ls_take(work, s.beside * s.R);
    p->work[STAGE] = ls_take(work, (s.n > 0 ? 2 + s.back : 0) * s.R * d);
    p->work[WEIGHTS] = ls_take(work, (1 + s.back) * s.R * s.n);
    p->work[STATES] = ls_take(work, (s.P + s.G) * F * (d + 1));
    p->work[DOUBLES] = (ls_real *)ls_arena_take(work, (size_t)doubles * sizeof(double));
    p->work[TRACE] = ls_take(work, 2 * s.R + 3 * s.traced + s.G * s.starts);
    p->work[ALL_KEYS] = ls_take(work, keys * (2 * r + d + 1) + (s.back && keys > 0 ? s.P * p->all_keys * (r + d) : 0));
}

/* sin and cos once for all heads: of steps, of the positions of queries, and of keys. */
__global__ static void fill_angles(double turn, ls_span queries, ls_span keys, double *to)
{
    LS_EACH(i, CAUSAL_ROWS + queries.n + keys.n)
    {
        const int64_t q = i - CAUSAL_ROWS, k = q - queries.n;
        const double at = turn * (double)(q < 0 ? i : k < 0 ? queries.lo + q : keys.lo + k);
        to[2 * i] = sin(at);
        to[2 * i + 1] = cos(at);
    }
}

static void make_angles(ls_pass *p, double turn, double *to)
{
    const ls_span queries = {0, p->query_span[0].lo, angles_of(p, p->T)};
    const ls_span keys = {0, p->own.span[0].lo, angles_of(p, p->S)};
    LS_LAUNCH(p->queue, fill_angles, ls_blocks(CAUSAL_ROWS + queries.n + keys.n, LS_THREADS), LS_THREADS, 0, turn,
              queries, keys, to);
}

linear ls_linear_begin(ls_pass *p)
{
    const ls_feature_map *map = (const ls_feature_map *)p->kit;
    const sizes s = sizes_of(p);
    linear x = {};
    const int64_t F = turned(p), r = features_of(p), d = p->d, R = s.R;
    x.r = (int)r, x.F = (int)F, x.d = (int)d;
    x.exponentials = (int)exponentials_of(p);
    x.turns = map->turn != NULL;
    x.floor = map->floor(p);
    purse w = {p->work[QUERIES]};
    x.a = s.made ? give(&w, R * r) : NULL;
    x.a_near = s.near ? give(&w, R * r) : x.a;
    x.da = s.waits ? give(&w, R * r) : NULL;
    w.at = p->work[KEYS];
    x.x = s.made ? give(&w, R * r) : NULL;
    x.db = s.made && s.back ? give(&w, R * r) : NULL;
    x.dA = s.beside > 0 ? p->work[BESIDE] : NULL;
    w.at = p->work[STAGE];
    x.v = give(&w, R * d);
    x.out = give(&w, R * d);
    x.dout = s.back ? give(&w, R * d) : NULL;
    w.at = p->work[WEIGHTS];
    x.w = give(&w, R * s.n);
    x.dw = s.back ? give(&w, R * s.n) : NULL;
    w.at = p->work[STATES];
    x.S = give(&w, s.P * F * d);
    x.all_S = give(&w, s.G * F * d);
    x.z = give(&w, s.P * F);
    x.all_z = give(&w, s.G * F);
    x.step = (double *)(void *)p->work[DOUBLES];
    x.running = x.step + 2 * (CAUSAL_ROWS + angles_of(p, p->T) + angles_of(p, p->S));
    w.at = p->work[TRACE];
    x.top = give(&w, R);
    x.flows = give(&w, R);
    x.c = x.all_c = give(&w, s.traced);
    x.inverse = x.all_inverse = give(&w, s.traced);
    x.delta = x.all_delta = give(&w, s.traced);
    x.start = give(&w, s.G * s.starts);
    x.each_start = s.starts;
    if (x.turns) make_angles(p, map->turn(p), x.step);
    return x;
}

void ls_linear_go_to(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k)
{
    x->s.B = p->B;
    x->s.H = p->H;
    x->s.K = ls_min(c.K, c.N - k);
    x->s.C = c.C;
    x->s.first = k * c.C;
    x->s.rows = rows;
}

/* ------------------------------------------------------------------------------------------------ features */

void ls_linear_make_queries(ls_pass *p, const linear *x)
{
    if (are_made(p)) map_of(p)->queries(p, x->s, x->a);
}

void ls_linear_make_keys(ls_pass *p, const linear *x)
{
    if (are_made(p)) map_of(p)->keys(p, x->s, x->x, x->top);
}

void ls_linear_queries_backward(ls_pass *p, const linear *x)
{
    if (are_made(p)) map_of(p)->queries_backward(p, x->s, x->da);
}

void ls_linear_keys_backward(ls_pass *p, const linear *x, int add)
{
    if (are_made(p)) map_of(p)->keys_backward(p, x->s, x->db, add);
}

/* ------------------------------------------------------------------------------------------------ maxima */

/* The maximum over the lanes up to this one. */
__device__ static inline ls_real most_so_far(ls_real c)
{
    const int lane = threadIdx.x % LS_WARP;
    for (int step = 1; step < LS_WARP; step *= 2) {
        const ls_real other = __shfl_sync(0xffffffffu, c, lane < step ? lane : lane - step);
        if (other > c) c = other;
    }
    return c;
}

/* Of each chunk alone: c (R), the maximum so far, and in start[g + k + 1] that of chunk k. A warp for each chunk. */
__global__ static void find_maxima(linear x, side k, int64_t chunks, ls_real *start)
{
    LS_EACH_ROW(P, chunks)
    {
        const int lane = threadIdx.x % LS_WARP;
        ls_real most = -INFINITY;
        for (int64_t i = 0; i < x.s.C; i += LS_WARP) {
            const int64_t R = P * x.s.C + i + lane;
            ls_real c = most;
            if (i + lane < x.s.C && is_there(x.s, k.pad, place_of(x.s, R)) && x.top[R] > c) c = x.top[R];
            c = most_so_far(c);
            if (i + lane < x.s.C) x.c[R] = c;
            most = __shfl_sync(0xffffffffu, c, LS_WARP - 1);
        }
        if (lane == 0) start[P / x.s.K * x.each_start + P % x.s.K + 1] = most;
    }
}

/* start[g + 1..] := the maximum from start[g] on. A warp for each g. */
__global__ static void follow_maxima(int64_t G, int64_t K, ls_real *start, int64_t each)
{
    LS_EACH_ROW(g, G)
    {
        const int lane = threadIdx.x % LS_WARP;
        ls_real *level = start + g * each, most = level[0];
        for (int64_t k = 1; k <= K; k += LS_WARP) {
            ls_real c = k + lane <= K && level[k + lane] > most ? level[k + lane] : most;
            c = most_so_far(c);
            if (k + lane <= K) level[k + lane] = c;
            most = __shfl_sync(0xffffffffu, c, LS_WARP - 1);
        }
    }
}

/* c of rows, from that within their chunks. */
__global__ static void raise_maxima(linear x, level before)
{
    LS_EACH(R, rows_of(x.s))
    {
        const ls_real c = level_of(before, x.s, place_of(x.s, R));
        if (c > x.c[R]) x.c[R] = c;
    }
}

void ls_linear_follow_maxima(ls_pass *p, const linear *x)
{
    if (x->exponentials == 0) return;
    const int64_t chunks = chunks_of(x), G = x->s.H * x->s.B;
    ls_real *start = x->start + x->s.first / x->s.C;
    LS_LAUNCH(p->queue, find_maxima, ls_row_blocks(chunks), LS_THREADS, 0, *x, keys_of(p), chunks, start);
    LS_LAUNCH(p->queue, follow_maxima, ls_row_blocks(G), LS_THREADS, 0, G, x->s.K, start, x->each_start);
    if (x->causal)
        LS_LAUNCH(p->queue, raise_maxima, ls_blocks(chunks * x->s.C, LS_THREADS), LS_THREADS, 0, *x, before_chunks(x));
}
