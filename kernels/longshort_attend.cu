/* Longshort on a GPU: one softmax over far vectors and near keys; formulas in longshort_attend.c.
 *
 * A tile of queries of one head is visited, 32 at a time, by
 *   FAR     vectors; in CS all its queries are of one chunk, so they see the same ones at the same distances, and the
 * term of the distance is added to the key as it is loaded: q·(K + R_chunk(δ)) AROUND  NS: keys of the window's block
 *   BAND    CS: for distances δ .. δ + 31, each query's own keys i - δ: (q + r_w)·k + (q + r_r)·R_win(δ)
 * Forward the softmax is made as they come; its maximum and sum are saved. Backward each gradient has a kernel whose
 * tiles it belongs to, and that makes the scores it needs anew:
 *   query_gradients     dq, Σ P dP; sums for r_w, r_r
 *   key_gradients       near keys and values, visited by queries (CS: a band of them)
 *   vector_gradients    far keys and values, visited by queries in slices; or R_chunk(δ), for which a row of the tile
 * is a distance instead of a vector distance_gradients  R_win(δ), visited by queries with a band of keys, in slices */
#include "longshort_cuda.h"

enum { FAR, AROUND, BAND };
enum { WIDE = LS_PAIR_WIDE, LAST_ROW = LS_PAIR_ROWS - 1, LAST_GUEST = LS_PAIR_GUESTS - 1 };

/* What kernels know of a call. Queries: T rows of each (b,h), from position first. Near keys: n rows from position lo.
 * N: far vectors that the last query sees; 0 where there are none, as in a step, which has `start`: the softmax over
 * all that is far. */
namespace
{
typedef struct scene {
    int causal;
    int64_t B, H, T, d, first, w, c, r, N, D, n, lo, item;
    ls_real scale;
    ls_view q, dout;
    const uint8_t *pad_q, *pad;                        /* (B,T), (B,n) */
    const ls_real *near_k, *near_v;                    /* (B,n,H,d) */
    const ls_real *items, *start;                      /* (N / r,B,item); (B,H,2+d) */
    const ls_real *far_table, *near_table, *r_w, *r_r; /* (H,N,d), (H,D,d), (H,d) */
    ls_real *top, *inverse, *delta;                    /* by query */
    /* Tiles of up to `rows` queries: in CS they end where a chunk does. `head` queries are in the first chunk. */
    int rows;
    int64_t head, head_tiles, chunk_tiles, tiles;
} scene;
} // namespace

LS_BOTH_SIDES int64_t tiles_in(int64_t n, int64_t rows)
{
    return (n + rows - 1) / rows;
}

static void cut(scene *x, int rows)
{
    x->rows = rows;
    x->head = x->causal ? ls_min(x->T, x->c - x->first % x->c) : x->T;
    x->head_tiles = tiles_in(x->head, rows);
    x->chunk_tiles = tiles_in(x->c, rows);
    const int64_t rest = x->T - x->head;
    x->tiles = x->head_tiles + rest / x->c * x->chunk_tiles + tiles_in(rest % x->c, rows);
}

static int64_t far_of(const ls_pass *p)
{
    return p->step ? 0 : p->pattern == LS_CS ? ls_longshort_seen(p) : vectors(p);
}

/* TABLES: pe, R_chunk, R_win, and gradients of the two. */
namespace
{
typedef struct tables {
    ls_real *positions, *far, *near, *dfar, *dnear;
} tables;
} // namespace

static tables tables_of(const ls_pass *p)
{
    const int64_t E = p->H * p->d, D = ls_longshort_distances(p), N = far_of(p);
    tables t;
    t.positions = p->work[TABLES];
    t.far = t.positions + ls_max(ls_longshort_seen(p), D) * E;
    t.near = t.far + N * E;
    t.dfar = t.near + D * E;
    t.dnear = t.dfar + N * E;
    return t;
}

static scene scene_of(const ls_pass *p, int phase)
{
    const int causal = p->pattern == LS_CS;
    const int64_t near = p->B * p->halo.n * p->H * p->d;
    scene x = {};
    x.causal = causal;
    x.B = p->B, x.H = p->H, x.T = p->T, x.d = p->d;
    x.first = p->query_span[0].lo;
    x.w = (int64_t)p->option[WINDOW];
    x.c = chunk_length(p), x.r = vectors(p), x.N = far_of(p);
    x.D = ls_longshort_distances(p);
    x.n = p->halo.n, x.lo = p->halo.span[0].lo;
    x.item = ls_longshort_item(p);
    x.scale = (ls_real)p->scale;
    x.q = p->q, x.dout = p->dout;
    x.pad_q = p->pad_q, x.pad = p->halo.pad;
    x.near_k = p->work[NEAR], x.near_v = p->work[NEAR] + near;
    x.items = causal ? p->gathered[phase].all : p->work[ITEMS];
    x.top = p->saved[TOP], x.inverse = p->saved[INVERSE], x.delta = p->work[DELTA];
    if (p->step) x.start = p->summary[phase].got;
    if (!causal) return x;
    const tables t = tables_of(p);
    x.far_table = t.far, x.near_table = t.near;
    x.r_w = parameter(p, R_W), x.r_r = parameter(p, R_R);
    return x;
}

/* ------------------------------------------------------------------------------------------------ rows */

static __device__ int64_t far_seen(const scene *x, int64_t i)
{
    return x->causal && x->N > 0 ? i / x->c * x->r : x->N;
}

/* Vector n's key; its value is r E reals behind. NULL: its tokens are all padded. */
static __device__ const ls_real *far_key(const scene *x, int64_t b, int64_t h, int64_t n)
{
    const ls_real *item = x->items + (n / x->r * x->B + b) * x->item;
    return item[x->item - 1] != 0 ? item + (n % x->r * x->H + h) * x->d : NULL;
}

static __device__ const ls_real *far_value(const scene *x, const ls_real *key)
{
    return key != NULL ? key + x->r * x->H * x->d : NULL;
}

/* R_chunk(δ) of a key that is `newer` vectors behind the newest; NULL in NS. */
static __device__ const ls_real *chunk_distance(const scene *x, int64_t h, int64_t newer)
{
    return x->causal ? x->far_table + (h * x->N + newer) * x->d : NULL;
}

static __device__ const ls_real *window_distance(const scene *x, int64_t h, int64_t delta)
{
    return delta < x->D ? x->near_table + (h * x->D + delta) * x->d : NULL;
}

/* Row j of the halo, if it is there and not padded. */
static __device__ int is_near(const scene *x, int64_t b, int64_t j)
{
    return j >= 0 && j < x->n && !ls_is_padded(x->pad, b * x->n + j);
}

static __device__ const ls_real *near_row(const scene *x, const ls_real *rows, int64_t b, int64_t h, int64_t j)
{
    return rows + ((b * x->n + j) * x->H + h) * x->d;
}

static __device__ int is_query(const scene *x, int64_t b, int64_t t)
{
    return t >= 0 && t < x->T && !ls_is_padded(x->pad_q, b * x->T + t);
}

/* One row of a group; absent rows are zeros. */
static __device__ void put(ls_group *g, int at, const ls_real *row, const ls_real *more)
{
    g->row[at] = row;
    g->more[at] = more;
}

static __device__ void put_query(const scene *x, ls_group *g, int at, int64_t b, int64_t h, int64_t t, ls_view v,
                                 const ls_real *more)
{
    put(g, at, is_query(x, b, t) ? ls_row(v, b, h, t) : NULL, more != NULL ? more + h * x->d : NULL);
}

/* ------------------------------------------------------------------------------------------------ a tile's guests */

namespace
{
typedef struct tile {
    int64_t b, h, row, far; /* queries [row, row + n); the vectors they see */
    int64_t from, to;       /* NS: rows of the halo that any of them sees */
    int n;
} tile;
} // namespace

static __device__ tile find_tile(const scene *x, int64_t g, int64_t i)
{
    tile t;
    t.b = g / x->H, t.h = g % x->H;
    const int64_t k = i - x->head_tiles, chunk = k < 0 ? 0 : x->head + k / x->chunk_tiles * x->c;
    t.row = k < 0 ? i * x->rows : chunk + k % x->chunk_tiles * x->rows;
    const int64_t end = k < 0 ? x->head : ls_min(chunk + x->c, x->T);
    t.n = (int)ls_max(0, ls_min(x->rows, end - t.row));
    t.far = far_seen(x, x->first + t.row);
    const ls_span a = ls_longshort_window(x->causal, x->w, x->first + t.row);
    const ls_span z = ls_longshort_window(x->causal, x->w, x->first + t.row + t.n - 1);
    t.from = ls_max(0, a.lo - x->lo);
    t.to = ls_min(z.lo + z.n - x->lo, x->n);
    return t;
}

/* The far blocks come first, then the near ones. */
static __device__ int64_t far_blocks(const tile *t)
{
    return (t->far + LAST_GUEST) / LS_PAIR_GUESTS;
}

static __device__ int64_t all_blocks(const scene *x, const tile *t)
{
    const int64_t near = x->causal ? x->D : ls_max(0, t->to - t->from);
    return far_blocks(t) + (near + LAST_GUEST) / LS_PAIR_GUESTS;
}

/* The tile's queries, plain, with r_w and with r_r; and who visits. */
namespace
{
typedef struct guests {
    ls_group own, own_w, own_r, dout, key, value, distance;
    int hidden[LS_PAIR_MOST];
} guests;
} // namespace

static __device__ void seat_queries(const scene *x, const tile *t, guests *g)
{
    const int r = threadIdx.x;
    ls_group_own(&g->own, x->scale);
    ls_group_own(&g->own_w, x->scale);
    ls_group_own(&g->own_r, x->scale);
    ls_group_own(&g->dout, 1);
    ls_group_guests(&g->distance, 1);
    if (r >= LS_PAIR_ROWS) return;
    const int64_t row = r < t->n ? t->row + r : -1;
    put_query(x, &g->own, r, t->b, t->h, row, x->q, NULL);
    put_query(x, &g->own_w, r, t->b, t->h, row, x->q, x->r_w);
    put_query(x, &g->own_r, r, t->b, t->h, row, x->q, x->r_r);
    put_query(x, &g->dout, r, t->b, t->h, row, x->dout, NULL);
}

/* Block `block` of the tile's guests: what they are; `start` is the first vector, row of the halo, or distance. */
static __device__ int invite(const scene *x, const tile *t, int64_t block, guests *g, int64_t *start)
{
    const int64_t far = far_blocks(t);
    const int i = threadIdx.x, kind = block < far ? FAR : x->causal ? BAND : AROUND;
    const int count = kind == BAND ? LS_PAIR_BAND : LS_PAIR_GUESTS;
    const int64_t s = (block - (kind == FAR ? 0 : far)) * LS_PAIR_GUESTS + (kind == AROUND ? t->from : 0);
    *start = s;
    ls_group_is(&g->key, count, kind == BAND ? LAST_GUEST : 0, kind == BAND, kind == BAND ? -1 : 1, 1);
    ls_group_is(&g->value, count, kind == BAND ? LAST_GUEST : 0, kind == BAND, kind == BAND ? -1 : 1, 1);
    if (i >= count) return kind;
    const ls_real *key = NULL, *value = NULL, *more = NULL;
    if (kind == FAR && s + i < t->far) {
        key = far_key(x, t->b, t->h, s + i);
        value = far_value(x, key);
        more = chunk_distance(x, t->h, t->far - 1 - s - i);
    }
    if (kind != FAR) {
        const int64_t j = kind == AROUND ? s + i : x->first + t->row - x->lo - s + i - LAST_GUEST;
        if (is_near(x, t->b, j)) {
            key = near_row(x, x->near_k, t->b, t->h, j);
            value = near_row(x, x->near_v, t->b, t->h, j);
        }
    }
    put(&g->key, i, key, more);
    put(&g->value, i, value, NULL);
    g->hidden[i] = key == NULL;
    if (kind == BAND && i < LS_PAIR_GUESTS) put(&g->distance, i, window_distance(x, t->h, s + i), NULL);
    return kind;
}

static __device__ void guest_scores(const scene *x, int kind, const guests *g, ls_pair_memory m,
                                    ls_real (&score)[LS_PAIR_EACH])
{
    for (int u = 0; u < LS_PAIR_EACH; u++) score[u] = 0;
    ls_pair_dots(kind == BAND ? &g->own_w : &g->own, &g->key, x->d, m, score);
    if (kind == BAND) ls_pair_dots(&g->own_r, &g->distance, x->d, m, score);
}

/* Whether row r sees this lane's guest. */
static __device__ int sees(const scene *x, const tile *t, int kind, int64_t start, const guests *g, int r)
{
    const int lane = threadIdx.x % LS_WARP;
    if (r >= t->n || g->own.row[r] == NULL) return 0;
    if (kind == FAR) return !g->hidden[lane];
    if (kind == BAND) return start + lane < x->D && !g->hidden[LAST_GUEST + r - lane];
    const ls_span s = ls_longshort_window(0, x->w, x->first + t->row + r);
    const int64_t j = x->lo + start + lane;
    return !g->hidden[lane] && j >= s.lo && j < s.lo + s.n;
}

/* ------------------------------------------------------------------------------------------------ forward */

static __global__ void attend(scene x, ls_view out)
{
    LS_SHARED(ls_real, memory);
    __shared__ guests g;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    ls_real *sum = memory + LS_PAIR_ALL;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const tile t = find_tile(&x, blockIdx.x / x.tiles, blockIdx.x % x.tiles);
    ls_real top[LS_PAIR_EACH], total[LS_PAIR_EACH], shrink[LS_PAIR_EACH];
    if (t.n == 0) return;
    const ls_real *start = x.start != NULL ? x.start + (t.b * x.H + t.h) * (2 + x.d) : NULL;
    seat_queries(&x, &t, &g);
    for (int u = 0; u < LS_PAIR_EACH; u++) {
        const int r = warp + u * LS_PAIR_WARPS;
        top[u] = start != NULL ? start[0] : -INFINITY;
        total[u] = start != NULL && lane == 0 ? start[1] : 0;
        for (int64_t e = lane; e < x.d && r < x.rows; e += LS_WARP) sum[r * x.d + e] = start != NULL ? start[2 + e] : 0;
    }
    for (int64_t block = 0; block < all_blocks(&x, &t); block++) {
        ls_real score[LS_PAIR_EACH];
        int64_t first;
        const int kind = invite(&x, &t, block, &g, &first);
        guest_scores(&x, kind, &g, m, score);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            const ls_real a = sees(&x, &t, kind, first, &g, r) ? score[u] : -INFINITY, most = ls_warp_max(a);
            const ls_real next = most > top[u] ? most : top[u], base = next == -INFINITY ? 0 : next;
            const ls_real e = ls_exp(a - base);
            shrink[u] = ls_exp(top[u] - base);
            total[u] = total[u] * shrink[u] + e;
            top[u] = next;
            m.weight[r * WIDE + lane] = e;
        }
        ls_pair_sums(m.weight, &g.value, x.rows, x.d, m, shrink, sum);
    }
    for (int u = 0; u < LS_PAIR_EACH; u++) {
        const int r = warp + u * LS_PAIR_WARPS;
        if (r >= t.n) break;
        const int blind = !is_query(&x, t.b, t.row + r);
        const ls_real all = ls_warp_sum(total[u]), inverse = all > 0 && !blind ? 1 / all : 0;
        const int64_t row = (t.b * x.H + t.h) * x.T + t.row + r;
        ls_real *to = ls_row(out, t.b, t.h, t.row + r);
        for (int64_t e = lane; e < x.d; e += LS_WARP) to[e] = blind ? 0 : inverse * sum[r * x.d + e];
        if (lane == 0) {
            x.top[row] = top[u] == -INFINITY ? 0 : top[u];
            x.inverse[row] = inverse;
        }
    }
}

static void normalise_window(ls_pass *p)
{
    const int64_t E = p->H * p->d, n = p->halo.n, half = p->B * n * E;
    const longshort_rows k = {p->halo.k, p->B, n, p->H, p->d}, v = {p->halo.v, p->B, n, p->H, p->d};
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, k, p->halo.pad, longshort_side_by_side(p->work[NEAR], n * E, E, p->d));
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, v, p->halo.pad,
                           longshort_side_by_side(p->work[NEAR] + half, n * E, E, p->d));
}

static __global__ void repeat_bias(int64_t n, int64_t H, int64_t d, const ls_real *bias, ls_real *table)
{
    LS_EACH(i, H * n * d)
    table[i] = bias[i / d / n * d + i % d];
}

/* table (H,n,d): rows 0 .. n-1 of W pe(δ) + bias, heads apart. */
static void make_table(ls_pass *p, int64_t n, const ls_real *positions, const ls_real *weight, const ls_real *bias,
                       ls_real *table)
{
    const int64_t H = p->H, d = p->d, E = H * d;
    if (n == 0) return;
    if (bias != NULL)
        LS_LAUNCH(p->queue, repeat_bias, ls_blocks(n * E, LS_THREADS), LS_THREADS, 0, n, H, d, bias, table);
    ls_gemm_batch_exact(p->queue, 0, 1, n, d, E, 1, positions, E, 0, weight, E, d * E, bias != NULL, table, d, n * d,
                        H);
}

static void make_tables(ls_pass *p)
{
    const tables t = tables_of(p);
    const int64_t D = ls_longshort_distances(p), N = far_of(p);
    ls_longshort_cuda_positions(p, ls_max(N, D), t.positions);
    make_table(p, N, t.positions, parameter(p, R_CHUNK), parameter(p, R_CHUNK_BIAS), t.far);
    make_table(p, D, t.positions, parameter(p, R_WIN), NULL, t.near);
}

/* What both directions begin with. */
static void set_scene(ls_pass *p, int phase)
{
    normalise_window(p);
    if (p->pattern == LS_CS)
        make_tables(p);
    else
        ls_longshort_cuda_load_landmarks(p, &p->summary[phase]);
}

static size_t bytes_of(const ls_pass *p, int rows, int64_t sums)
{
    return ls_pair_bytes(sums * rows * p->d);
}

ls_status ls_longshort_cuda_attend(ls_pass *p, int phase)
{
    scene x = scene_of(p, phase);
    set_scene(p, phase);
    cut(&x, ls_pair_rows(p->d, 1, sizeof(ls_real), 0));
    const int64_t blocks = p->B * p->H * x.tiles;
    if (blocks > 0) LS_LAUNCH(p->queue, attend, (int)blocks, LS_PAIR_THREADS, bytes_of(p, x.rows, 1), x, p->out);
    return ls_launched(p->queue, "longshort: attend");
}

/* ------------------------------------------------------------------------------------------------ dq */

/* P of a query from its score. */
static __device__ ls_real probability(const scene *x, int64_t row, ls_real score)
{
    return ls_exp(score - x->top[row]) * x->inverse[row];
}

/* A block has every slices-th tile of a (b,h). partial (B,H,slices,2,d), CS: Σ of dq by way of q + r_w, of q + r_r. */
static __global__ void query_gradients(scene x, int64_t slices, ls_view dq, double *partial)
{
    LS_SHARED(ls_real, memory);
    __shared__ guests g;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    double *dr = (double *)(memory + LS_PAIR_ALL); /* (2,d) */
    ls_real *sum = (ls_real *)(dr + 2 * x.d), *sum_w = sum + x.rows * x.d, *sum_r = sum_w + x.rows * x.d;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const ls_real keep[LS_PAIR_EACH] = {1, 1, 1, 1};
    for (int64_t e = threadIdx.x; e < 2 * x.d; e += LS_PAIR_THREADS) dr[e] = 0;
    for (int64_t i = blockIdx.x % slices; i < x.tiles; i += slices) {
        const tile t = find_tile(&x, blockIdx.x / slices, i);
        const int64_t rows = (t.b * x.H + t.h) * x.T + t.row;
        ls_real delta[LS_PAIR_EACH] = {0};
        if (t.n == 0) continue;
        __syncthreads();
        seat_queries(&x, &t, &g);
        for (int64_t e = threadIdx.x; e < 3 * x.rows * x.d; e += LS_PAIR_THREADS) sum[e] = 0;
        for (int pass = 0; pass < 2; pass++) { /* 0: Σ P dP; 1: dq */
            for (int64_t block = 0; block < all_blocks(&x, &t); block++) {
                ls_real score[LS_PAIR_EACH], gain[LS_PAIR_EACH] = {0};
                int64_t first;
                const int kind = invite(&x, &t, block, &g, &first);
                guest_scores(&x, kind, &g, m, score);
                ls_pair_dots(&g.dout, &g.value, x.d, m, gain);
                for (int u = 0; u < LS_PAIR_EACH; u++) {
                    const int r = warp + u * LS_PAIR_WARPS;
                    const ls_real prob = sees(&x, &t, kind, first, &g, r) ? probability(&x, rows + r, score[u]) : 0;
                    m.weight[r * WIDE + lane] = prob * (gain[u] - delta[u]);
                    if (pass == 0) delta[u] += prob * gain[u];
                }
                if (pass == 0) {
                    __syncthreads(); /* the guests go */
                    continue;
                }
                ls_pair_sums(m.weight, &g.key, x.rows, x.d, m, keep, kind == BAND ? sum_w : sum);
                if (kind == BAND) ls_pair_sums(m.weight, &g.distance, x.rows, x.d, m, keep, sum_r);
            }
            for (int u = 0; u < LS_PAIR_EACH && pass == 0; u++) delta[u] = ls_warp_sum(delta[u]);
        }
        __syncthreads();
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            if (r >= t.n) break;
            ls_real *to = ls_row(dq, t.b, t.h, t.row + r);
            for (int64_t e = lane; e < x.d; e += LS_WARP) {
                const int64_t at = r * x.d + e;
                to[e] = x.scale * (sum[at] + sum_w[at] + sum_r[at]);
            }
            if (lane == 0) x.delta[rows + r] = delta[u];
        }
        for (int64_t e = threadIdx.x; e < 2 * x.d; e += LS_PAIR_THREADS) {
            const ls_real *column = e < x.d ? sum_w + e : sum_r + (e - x.d);
            for (int r = 0; r < t.n; r++) dr[e] += (double)column[r * x.d];
        }
    }
    __syncthreads();
    for (int64_t e = threadIdx.x; e < 2 * x.d && partial != NULL; e += LS_PAIR_THREADS)
        partial[blockIdx.x * 2 * x.d + e] = dr[e];
}

/* gradient (H,d) of r_w (which 0) and of r_r += the slices. */
static __global__ void add_shared(int64_t B, int64_t H, int64_t slices, int64_t d, int which, const double *partial,
                                  ls_real *gradient)
{
    LS_EACH(i, H * d)
    {
        double sum = 0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t s = 0; s < slices; s++)
                sum += partial[(((b * H + i / d) * slices + s) * 2 + which) * d + i % d];
        gradient[i] += (ls_real)sum;
    }
}

/* ------------------------------------------------------------------------------------------------ dk, dv near */

/* Weights of pairs whose query is row t of (b,h) rows `rows`: P, and its gradient. */
static __device__ void give(const scene *x, int seen, int64_t row, ls_real score, ls_real gain, ls_real *prob,
                            ls_real *dscore)
{
    const ls_real a = seen ? probability(x, row, score) : 0;
    *prob = a;
    *dscore = seen ? a * (gain - x->delta[row]) : 0;
}

/* A tile of the halo's rows of one (b,h), gradients of what they are after their norm. NS: the queries of the blocks
 * that see them; CS: for each distance a band of queries. */
static __global__ void key_gradients(scene x, ls_view dk, ls_view dv)
{
    LS_SHARED(ls_real, memory);
    __shared__ ls_group key, value, query, query_r, dout, distance;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    ls_real *sum_k = memory + LS_PAIR_ALL, *sum_v = sum_k + x.rows * x.d;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP, thread = threadIdx.x;
    const int64_t tiles = (x.n + x.rows - 1) / x.rows, g = blockIdx.x / tiles, row = blockIdx.x % tiles * x.rows;
    const int64_t b = g / x.H, h = g % x.H, e = ls_max(x.w / 2, 1);
    const int n = (int)ls_min(x.rows, x.n - row);
    const ls_real keep[LS_PAIR_EACH] = {1, 1, 1, 1};
    const int count = x.causal ? LS_PAIR_BAND : LS_PAIR_GUESTS;
    ls_group_own(&key, 1);
    ls_group_own(&value, 1);
    ls_group_is(&query, count, 0, x.causal, 1, x.scale);
    ls_group_is(&query_r, count, 0, x.causal, 1, x.scale);
    ls_group_is(&dout, count, 0, x.causal, 1, 1);
    ls_group_guests(&distance, 1);
    if (thread < LS_PAIR_ROWS) {
        const int there = thread < n && is_near(&x, b, row + thread);
        put(&key, thread, there ? near_row(&x, x.near_k, b, h, row + thread) : NULL, NULL);
        put(&value, thread, there ? near_row(&x, x.near_v, b, h, row + thread) : NULL, NULL);
    }
    for (int64_t i = thread; i < 2 * x.rows * x.d; i += LS_PAIR_THREADS) sum_k[i] = 0;
    /* NS: queries of the blocks from (j - e) / w of the first key to (j + e) / w of the last; CS: distances */
    const int64_t j = x.lo + row, shift = x.causal ? j - x.first : 0;
    const int64_t begin = x.causal ? 0 : ls_max(0, ls_max(0, j - e) / x.w * x.w - x.first);
    const int64_t end = x.causal ? x.D : ls_min(x.T, ((j + n - 1 + e) / x.w + 1) * x.w - x.first);
    for (int64_t s = begin; s < end; s += LS_PAIR_GUESTS) {
        ls_real score[LS_PAIR_EACH] = {0}, gain[LS_PAIR_EACH] = {0};
        if (thread < count) {
            const int64_t t = shift + s + thread;
            put_query(&x, &query, thread, b, h, t, x.q, x.r_w);
            put_query(&x, &query_r, thread, b, h, t, x.q, x.r_r);
            put_query(&x, &dout, thread, b, h, t, x.dout, NULL);
        }
        if (x.causal && thread < LS_PAIR_GUESTS) put(&distance, thread, window_distance(&x, h, s + thread), NULL);
        ls_pair_dots(&key, &query, x.d, m, score);
        if (x.causal) ls_pair_dots(&query_r, &distance, x.d, m, score);
        ls_pair_dots(&value, &dout, x.d, m, gain);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS, guest = x.causal ? r + lane : lane;
            const int64_t t = shift + s + guest;
            int seen = r < n && key.row[r] != NULL && query.row[guest] != NULL && s + lane < end;
            if (seen && !x.causal) {
                const ls_span window = ls_longshort_window(0, x.w, x.first + t);
                seen = j + r >= window.lo && j + r < window.lo + window.n;
            }
            give(&x, seen, g * x.T + t, score[u], gain[u], &m.weight[r * WIDE + lane], &m.weight2[r * WIDE + lane]);
        }
        ls_pair_sums(m.weight, &dout, x.rows, x.d, m, keep, sum_v);
        ls_pair_sums(m.weight2, &query, x.rows, x.d, m, keep, sum_k);
    }
    __syncthreads();
    for (int i = warp; i < n; i += LS_PAIR_WARPS) {
        ls_real *to_k = ls_row(dk, b, h, row + i), *to_v = ls_row(dv, b, h, row + i);
        for (int64_t f = lane; f < x.d; f += LS_WARP) to_k[f] = sum_k[i * x.d + f], to_v[f] = sum_v[i * x.d + f];
    }
}

/* ------------------------------------------------------------------------------------------------ far, tables */

/* Block (b,h) and tile of rows, by slice: a slice has `length` of the queries. partial (slices,B,H,N,1 or 2,d). Row n
 * of the tile is vector n; by distance, the vector that is n behind the newest which a query sees. */
static __global__ void vector_gradients(scene x, int64_t length, int by_distance, ls_real *partial)
{
    LS_SHARED(ls_real, memory);
    __shared__ ls_group key, value, query, dout;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    ls_real *sum_k = memory + LS_PAIR_ALL, *sum_v = sum_k + x.rows * x.d;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP, thread = threadIdx.x;
    const int64_t tiles = tiles_in(x.N, x.rows), g = blockIdx.x / tiles, b = g / x.H, h = g % x.H;
    const int64_t row = blockIdx.x % tiles * x.rows, end = ls_min(x.T, (blockIdx.y + 1) * length);
    const ls_real keep[LS_PAIR_EACH] = {1, 1, 1, 1};
    int64_t t = blockIdx.y * length;
    ls_group_own(&key, 1);
    ls_group_own(&value, 1);
    ls_group_guests(&query, x.scale);
    ls_group_guests(&dout, 1);
    for (int64_t i = thread; i < 2 * x.rows * x.d; i += LS_PAIR_THREADS) sum_k[i] = 0;
    if (x.causal) t = ls_max(t, (row / x.r + 1) * x.c - x.first); /* who sees the first of them */
    while (t < end) {
        /* CS: guests are of one chunk */
        const int64_t far = far_seen(&x, x.first + t), position = x.first + t;
        const int64_t stop = x.causal ? ls_min(end, (position / x.c + 1) * x.c - x.first) : end;
        const int n = (int)ls_min(LS_PAIR_GUESTS, stop - t);
        ls_real score[LS_PAIR_EACH] = {0}, gain[LS_PAIR_EACH] = {0};
        if (thread < LS_PAIR_ROWS) {
            const int64_t vector = by_distance ? far - 1 - row - thread : row + thread;
            const ls_real *k = NULL, *more = NULL;
            if (thread < x.rows && vector >= 0 && vector < far) {
                k = far_key(&x, b, h, vector);
                more = chunk_distance(&x, h, far - 1 - vector);
            }
            put(&key, thread, k, more);
            put(&value, thread, far_value(&x, k), NULL);
        }
        if (thread < LS_PAIR_GUESTS) {
            put_query(&x, &query, thread, b, h, thread < n ? t + thread : -1, x.q, NULL);
            put_query(&x, &dout, thread, b, h, thread < n ? t + thread : -1, x.dout, NULL);
        }
        ls_pair_dots(&key, &query, x.d, m, score);
        ls_pair_dots(&value, &dout, x.d, m, gain);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            const int seen = key.row[r] != NULL && query.row[lane] != NULL;
            give(&x, seen, g * x.T + t + lane, score[u], gain[u], &m.weight[r * WIDE + lane],
                 &m.weight2[r * WIDE + lane]);
        }
        if (!by_distance) ls_pair_sums(m.weight, &dout, x.rows, x.d, m, keep, sum_v);
        ls_pair_sums(m.weight2, &query, x.rows, x.d, m, keep, sum_k);
        t += n;
    }
    __syncthreads();
    const int64_t parts = by_distance ? 1 : 2, all = ((int64_t)blockIdx.y * x.B * x.H + g) * x.N;
    for (int i = warp; i < x.rows && row + i < x.N; i += LS_PAIR_WARPS)
        for (int64_t e = lane; e < parts * x.d; e += LS_WARP) {
            const ls_real *column = e < x.d ? sum_k + e : sum_v + (e - x.d);
            partial[(all + row + i) * parts * x.d + e] = column[i * x.d];
        }
}

/* CS: R_win of a tile of distances: the queries of a slice, each with the keys at those distances. partial
 * (slices,B,H,D,d). */
static __global__ void distance_gradients(scene x, int64_t length, ls_real *partial)
{
    LS_SHARED(ls_real, memory);
    __shared__ ls_group key, value, query_w, query_r, dout, distance;
    const ls_pair_memory m = ls_pair_memory_at(memory);
    ls_real *sum = memory + LS_PAIR_ALL;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP, thread = threadIdx.x;
    const int64_t tiles = tiles_in(x.D, x.rows), g = blockIdx.x / tiles, b = g / x.H, h = g % x.H;
    const int64_t row = blockIdx.x % tiles * x.rows, begin = ls_max(blockIdx.y * length, row - x.first);
    const int64_t end = ls_min(x.T, (blockIdx.y + 1) * length);
    const ls_real keep[LS_PAIR_EACH] = {1, 1, 1, 1};
    const int count = LS_PAIR_BAND;
    ls_group_is(&key, count, LAST_ROW, -1, 1, 1);
    ls_group_is(&value, count, LAST_ROW, -1, 1, 1);
    ls_group_guests(&query_w, x.scale);
    ls_group_guests(&query_r, x.scale);
    ls_group_guests(&dout, 1);
    ls_group_own(&distance, 1);
    if (thread < LS_PAIR_ROWS)
        put(&distance, thread, thread < x.rows ? window_distance(&x, h, row + thread) : NULL, NULL);
    for (int64_t i = thread; i < x.rows * x.d; i += LS_PAIR_THREADS) sum[i] = 0;
    for (int64_t t = begin; t < end; t += LS_PAIR_GUESTS) {
        ls_real score[LS_PAIR_EACH] = {0}, gain[LS_PAIR_EACH] = {0};
        if (thread < count) {
            const int64_t j = x.first + t - row - LAST_ROW + thread - x.lo;
            const int there = is_near(&x, b, j);
            put(&key, thread, there ? near_row(&x, x.near_k, b, h, j) : NULL, NULL);
            put(&value, thread, there ? near_row(&x, x.near_v, b, h, j) : NULL, NULL);
        }
        if (thread < LS_PAIR_GUESTS) {
            const int64_t i = t + thread < end ? t + thread : -1;
            put_query(&x, &query_w, thread, b, h, i, x.q, x.r_w);
            put_query(&x, &query_r, thread, b, h, i, x.q, x.r_r);
            put_query(&x, &dout, thread, b, h, i, x.dout, NULL);
        }
        ls_pair_dots(&key, &query_w, x.d, m, score);
        ls_pair_dots(&distance, &query_r, x.d, m, score);
        ls_pair_dots(&value, &dout, x.d, m, gain);
        for (int u = 0; u < LS_PAIR_EACH; u++) {
            const int r = warp + u * LS_PAIR_WARPS;
            const int seen =
                distance.row[r] != NULL && query_w.row[lane] != NULL && key.row[LAST_ROW - r + lane] != NULL;
            give(&x, seen, g * x.T + t + lane, score[u], gain[u], &m.weight2[r * WIDE + lane],
                 &m.weight[r * WIDE + lane]);
        }
        ls_pair_sums(m.weight, &query_r, x.rows, x.d, m, keep, sum);
    }
    __syncthreads();
    for (int i = warp; i < x.rows && row + i < x.D; i += LS_PAIR_WARPS)
        for (int64_t e = lane; e < x.d; e += LS_WARP)
            partial[((((int64_t)blockIdx.y * x.B * x.H + g) * x.D) + row + i) * x.d + e] = sum[i * x.d + e];
}

/* ditems (chunks,B,item) = the slices' sums; 0 for the flag, and for chunks that are too new for the queries here. */
static __global__ void sum_vectors(scene x, int64_t chunks, int64_t slices, const ls_real *partial, ls_real *ditems)
{
    LS_EACH(i, chunks * x.B * x.item)
    {
        const int64_t E = x.H * x.d, at = i % x.item, b = i / x.item % x.B, chunk = i / x.item / x.B;
        const int64_t part = at / E / x.r, n = chunk * x.r + at / E % x.r, h = at % E / x.d, e = at % x.d;
        double sum = 0;
        for (int64_t s = 0; s < slices && at < x.item - 1 && n < x.N; s++)
            sum += (double)partial[((((s * x.B + b) * x.H + h) * x.N + n) * 2 + part) * x.d + e];
        ditems[i] = (ls_real)sum;
    }
}

/* dtable (H,n,d) = Σ over slices and batch rows. */
static __global__ void sum_table(int64_t parts, int64_t reals, const ls_real *partial, ls_real *dtable)
{
    LS_EACH(i, reals)
    {
        double sum = 0;
        for (int64_t s = 0; s < parts; s++) sum += (double)partial[s * reals + i];
        dtable[i] = (ls_real)sum;
    }
}

/* dbias (H,d) += Σ rows of dtable (H,n,d): a block has 32 columns of a head. */
static __global__ void add_rows(int64_t n, int64_t d, const ls_real *dtable, ls_real *dbias)
{
    __shared__ double sums[LS_THREADS];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = LS_THREADS / LS_WARP;
    const int64_t h = blockIdx.y, e = (int64_t)blockIdx.x * LS_WARP + lane;
    double sum = 0;
    for (int64_t i = warp; i < n && e < d; i += warps) sum += (double)dtable[(h * n + i) * d + e];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || e >= d) return;
    for (int i = 1; i < warps; i++) sum += sums[i * LS_WARP + lane];
    dbias[h * d + e] += (ls_real)sum;
}

/* ------------------------------------------------------------------------------------------------ backward */

static int two_sums(const ls_pass *p)
{
    return ls_pair_rows(p->d, 2, sizeof(ls_real), 0);
}

static int64_t query_slices(const ls_pass *p)
{
    return ls_min(QUERY_SLICES, p->T);
}

/* Slices of the queries, where `rows` rows of every (b,h) are to be summed over them: enough to fill a GPU several
 * times over, since in CS the first rows meet many queries and the last hardly any. */
static int64_t slices_for(const ls_pass *p, int64_t rows)
{
    const int64_t tiles = tiles_in(rows, two_sums(p)) * p->B * p->H;
    return ls_max(1, ls_min(ls_min(4096 / ls_max(tiles, 1), (p->T + 255) / 256), 256));
}

size_t ls_longshort_cuda_slices(const ls_pass *p)
{
    const int64_t N = far_of(p), D = p->pattern == LS_CS ? ls_longshort_distances(p) : 0, E = p->H * p->d;
    const int64_t far = slices_for(p, N) * p->B * N * 2 * E, near = slices_for(p, D) * p->B * D * E;
    const int64_t shared = p->B * query_slices(p) * 2 * E * (int64_t)sizeof(double);
    return (size_t)ls_max(shared, ls_max(far, near) * (int64_t)sizeof(ls_real));
}

static void backward_of_queries(ls_pass *p, scene x)
{
    cut(&x, ls_pair_rows(p->d, 3, sizeof(ls_real), 2 * p->d * (int64_t)sizeof(double)));
    const int64_t slices = x.causal ? ls_min(query_slices(p), x.tiles) : x.tiles, all = p->H * p->d;
    double *partial = x.causal ? (double *)(void *)p->work[SLICES] : NULL;
    const size_t bytes = bytes_of(p, x.rows, 3) + (size_t)ls_fours(2 * p->d) * sizeof(double);
    if (p->B * p->H * slices == 0) return;
    LS_LAUNCH(p->queue, query_gradients, (int)(p->B * p->H * slices), LS_PAIR_THREADS, bytes, x, slices, p->dq,
              partial);
    for (int i = 0; i < 2 && x.causal; i++)
        LS_LAUNCH(p->queue, add_shared, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->B, p->H, slices, p->d, i, partial,
                  parameter_gradient(p, i == 0 ? R_W : R_R));
}

static void backward_of_window(ls_pass *p, scene x)
{
    const int64_t n = p->halo.n, blocks = p->B * p->H * tiles_in(n, two_sums(p));
    const longshort_rows k = {p->halo.k, p->B, n, p->H, p->d}, v = {p->halo.v, p->B, n, p->H, p->d};
    x.rows = two_sums(p);
    if (blocks == 0) return;
    LS_LAUNCH(p->queue, key_gradients, (int)blocks, LS_PAIR_THREADS, bytes_of(p, x.rows, 2), x, p->halo.dk, p->halo.dv);
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, k, p->halo.pad, p->halo.dk, p->halo.dk, 0);
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, v, p->halo.pad, p->halo.dv, p->halo.dv, 0);
}

/* The grid of a kernel that sums `rows` rows over slices of the queries. */
static dim3 sliced(const ls_pass *p, int64_t rows, int64_t slices)
{
    return dim3((unsigned)(p->B * p->H * tiles_in(rows, two_sums(p))), (unsigned)slices);
}

/* ditems (chunks,B,item) of the far vectors. */
static void backward_of_far(ls_pass *p, scene x, int64_t chunks, ls_real *ditems)
{
    const int64_t slices = slices_for(p, x.N), length = (p->T + slices - 1) / slices, all = chunks * p->B * x.item;
    x.rows = two_sums(p);
    if (x.N > 0)
        LS_LAUNCH(p->queue, vector_gradients, sliced(p, x.N, slices), LS_PAIR_THREADS, bytes_of(p, x.rows, 2), x,
                  length, 0, p->work[SLICES]);
    LS_LAUNCH(p->queue, sum_vectors, ls_blocks(all, LS_THREADS), LS_THREADS, 0, x, chunks, slices, p->work[SLICES],
              ditems);
}

static void table_backward(ls_pass *p, int64_t n, const ls_real *positions, const ls_real *dtable, ls_real *dweight,
                           ls_real *dbias)
{
    const int64_t H = p->H, d = p->d, E = H * d;
    if (n == 0) return;
    ls_gemm_batch(p->queue, 1, 0, d, E, n, 1, dtable, d, n * d, positions, E, 0, 1, dweight, E, d * E, H);
    const dim3 blocks((unsigned)((d + LS_WARP - 1) / LS_WARP), (unsigned)H);
    if (dbias != NULL) LS_LAUNCH(p->queue, add_rows, blocks, LS_THREADS, 0, n, d, dtable, dbias);
}

static void backward_of_tables(ls_pass *p, scene x)
{
    const tables t = tables_of(p);
    const int64_t E = p->H * p->d;
    const int64_t far = slices_for(p, x.N), near = slices_for(p, x.D);
    x.rows = two_sums(p);
    if (x.N > 0 && p->T > 0) {
        LS_LAUNCH(p->queue, vector_gradients, sliced(p, x.N, far), LS_PAIR_THREADS, bytes_of(p, x.rows, 2), x,
                  (p->T + far - 1) / far, 1, p->work[SLICES]);
        LS_LAUNCH(p->queue, sum_table, ls_blocks(x.N * E, LS_THREADS), LS_THREADS, 0, far * p->B, x.N * E,
                  p->work[SLICES], t.dfar);
        table_backward(p, x.N, t.positions, t.dfar, parameter_gradient(p, R_CHUNK),
                       parameter_gradient(p, R_CHUNK_BIAS));
    }
    if (x.D > 0 && p->T > 0) {
        LS_LAUNCH(p->queue, distance_gradients, sliced(p, x.D, near), LS_PAIR_THREADS, bytes_of(p, x.rows, 1), x,
                  (p->T + near - 1) / near, p->work[SLICES]);
        LS_LAUNCH(p->queue, sum_table, ls_blocks(x.D * E, LS_THREADS), LS_THREADS, 0, near * p->B, x.D * E,
                  p->work[SLICES], t.dnear);
        table_backward(p, x.D, t.positions, t.dnear, parameter_gradient(p, R_WIN), NULL);
    }
}

ls_status ls_longshort_cuda_attend_backward(ls_pass *p, int phase)
{
    const scene x = scene_of(p, phase);
    const ls_collection *g = &p->gathered[phase];
    ls_longshort_cuda_begin_norms(p);
    set_scene(p, phase);
    backward_of_queries(p, x);
    backward_of_window(p, x);
    if (x.causal) {
        backward_of_far(p, x, g->total / x.item / p->B, g->dall);
        backward_of_tables(p, x);
    } else {
        backward_of_far(p, x, 1, p->work[DITEMS]);
        ls_longshort_cuda_return_landmarks(p, &p->summary[phase]);
    }
    ls_longshort_cuda_end_norms(p);
    return ls_launched(p->queue, "longshort: gradients");
}
