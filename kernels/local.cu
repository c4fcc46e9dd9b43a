/* Local attention on a GPU; formulas in local.c.
 *
 * A block has a tile of up to 16 rows, and sees visitors 32 at a time: its threads are four warps, a warp has four of
 * the rows, a lane one visitor. Dot products run over features in pieces of 64, for which the visitors' rows lie in
 * shared memory; what visitors give is summed there too, for all features of the tile's rows.
 *
 *   attend           a tile of queries, visited by keys: online softmax; its maximum and sum are saved
 *   query_gradients  a tile of queries, visited by keys twice: first for δ and dp, then for dq
 *   key_gradients    a tile of keys, visited by the queries that see them: dk, dv
 *
 * Everything is said of queries in the order of their windows, their slots: so the queries that see a key are a run of
 * slots, whose ends a search finds. In local-p that order is made, see local_centres.cu. Every sum has one order,
 * whatever blocks do. */
#include "local_cuda.h"

extern "C" const ls_cuda_mechanism ls_local_cuda;

namespace ls_local
{

/* CENTRE (B,H,T): p in double, by query. By slot: ORDER the query, SORTED its centre, all_keys where it is padded, ROW
 * the first row of its window. TOP, INVERSE (B,H,T): of the softmax, by query. */
static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t rows = all_rows(p), guess = predictive(p) ? rows : 0, back = p->backward;
    const size_t one = sizeof(int64_t);
    p->saved[CENTRE] = (ls_real *)ls_arena_take(saved, (size_t)guess * sizeof(double));
    for (int i = ORDER; i <= ROW; i++) p->saved[i] = (ls_real *)ls_arena_take(saved, (size_t)guess * one);
    p->saved[TOP] = ls_take(saved, rows);
    p->saved[INVERSE] = ls_take(saved, rows);
    p->work[SORT] = (ls_real *)ls_arena_take(work, back ? 0 : 2 * (size_t)guess * one);
    p->work[GAPS] = (ls_real *)ls_arena_take(work, back ? 0 : (size_t)(p->B * p->H * scan_tiles(p)) * one);
    p->work[DELTA] = ls_take(work, back * rows);
    p->work[DCENTRE] = ls_take(work, back * guess);
    p->work[DHIDDEN] = ls_take(work, back * guess * p->d);
    p->work[CLEAN] = ls_take(work, back * guess * p->d);
    const int64_t partial = guess > 0 ? back * p->B * p->H * slices_of(p) * p->d : 0;
    p->work[DVECTOR] = (ls_real *)ls_arena_take(work, (size_t)partial * sizeof(double));
}

/* ------------------------------------------------------------------------------------------------ windows */

/* Keys, n rows for each (b,h) of which the first `held` are there, from position lo; or lists, where (b,h) has rows
 * from first[b H + h]. */
typedef struct keys {
    ls_view k, v;
    const uint8_t *pad;
    const int64_t *first;
    int64_t n, held, lo;
} keys;

static keys keys_of(const ls_block *b)
{
    const ls_span here = b->first == NULL ? b->span[0] : ls_span{0, 0, 0};
    return keys{b->k, b->v, b->pad, b->first, b->n, here.n, here.lo};
}

static __device__ int64_t rows_held(const keys *s, int64_t g)
{
    return s->first == NULL ? s->held : s->first[g + 1] - s->first[g];
}

static __device__ ls_real *key_row(const keys *s, ls_view v, int64_t g, int64_t H, int64_t r)
{
    return s->first == NULL ? ls_row(v, g / H, g % H, r) : ls_row(v, 0, 0, s->first[g] + r);
}

static __device__ int is_hidden(const keys *s, int64_t g, int64_t H, int64_t r)
{
    return ls_is_padded(s->pad, s->first == NULL ? g / H * s->n + r : s->first[g] + r);
}

/* A slot of (b,h) g = b H + h: the query, and its window as rows [from, to) of the keys; row r is at offset + r from p.
 */
typedef struct window {
    int64_t query, from, to;
    double offset;
} window;

static __device__ window window_of(const windows *x, const keys *s, int64_t g, int64_t slot)
{
    const ls_span k = positions_of(x, g, slot);
    const int64_t from = s->first != NULL ? x->row[g * x->T + slot] : k.lo - s->lo;
    window w = {slot, from, from + k.n, 0};
    if (s->first == NULL) w.from = ls_max(0, w.from), w.to = ls_min(w.to, s->held);
    if (x->order == NULL) return w;
    w.query = x->order[g * x->T + slot];
    w.offset = (double)(k.lo - from) - x->exact[g * x->T + w.query];
    return w;
}

static __device__ int is_blind(const windows *x, int64_t g, int64_t query)
{
    return ls_is_padded(x->pad, g / x->H * x->T + query);
}

/* The first slot whose window ends after row r, or begins after it. */
static __device__ int64_t find_slot(const windows *x, const keys *s, int64_t g, int64_t r, int begins)
{
    int64_t low = 0, high = x->T;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        const window w = window_of(x, s, g, middle);
        if ((begins ? w.from : w.to) > r)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* sum_r = shrink_r sum_r + Σ_visitors weight (rows,32) · visitor; the weights of a row were written by its warp. A lane
 * has K features of a piece. */
template <int K>
static __device__ void add_piece(const ls_real *const (&w)[EACH], int rows, int64_t e0, int64_t d, const ls_real *piece,
                                 const ls_real (&shrink)[EACH], ls_real *sum)
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    ls_real x[EACH][K] = {{0}};
    ls_weighted(w, piece + lane, PITCH, x);
    for (int u = 0; u < EACH; u++)
        for (int k = 0; k < K; k++) {
            const int64_t r = warp + u * WARPS, e = e0 + k * LS_WARP + lane;
            if (r >= rows || e >= d) continue;
            ls_real *to = sum + r * ls_fours(d) + e;
            *to = shrink[u] * *to + x[u][k];
        }
}

static __device__ void add_weighted(const ls_real *weight, int rows, const ls_real *const *visitor, int64_t d,
                                    ls_real *piece, const ls_real (&shrink)[EACH], ls_real *sum)
{
    const int warp = threadIdx.x / LS_WARP;
    const ls_real *w[EACH];
    for (int u = 0; u < EACH; u++) w[u] = weight + ls_min(warp + u * WARPS, rows - 1) * WIDE;
    for (int64_t e0 = 0; e0 < d; e0 += PIECE) {
        load_piece(visitor, e0, d, piece);
        if (d - e0 > LS_WARP)
            add_piece<2>(w, rows, e0, d, piece, shrink, sum);
        else
            add_piece<1>(w, rows, e0, d, piece, shrink, sum);
    }
}

/* The 32 keys that visit from row r on, of those before `end`. */
static __device__ void invite_keys(const keys *s, int64_t g, int64_t H, int64_t r, int64_t end, visitors *to)
{
    const int lane = threadIdx.x;
    if (lane >= LS_WARP) return;
    const int here = r + lane < end;
    to->hidden[lane] = !here || is_hidden(s, g, H, r + lane);
    to->k[lane] = here ? key_row(s, s->k, g, H, r + lane) : NULL;
    to->v[lane] = here ? key_row(s, s->v, g, H, r + lane) : NULL;
}

static __device__ ls_real gaussian(const windows *x, ls_real narrow, ls_real distance)
{
    return x->order == NULL ? 1 : ls_exp(narrow * distance * distance);
}

/* A tile of queries of one (b,h): slots [slot, slot + n). A warp has its rows' windows in registers. */
typedef struct query_tile {
    int64_t g, slot, from, to; /* the keys that any of them sees */
    int n;
    window w[EACH];
    int blind[EACH];
} query_tile;

static __device__ query_tile find_queries(const windows *x, const keys *s, int rows)
{
    const int64_t tiles = (x->T + rows - 1) / rows, slot = blockIdx.x % tiles * rows;
    query_tile t;
    t.g = blockIdx.x / tiles;
    t.slot = slot;
    t.n = (int)ls_min(rows, x->T - slot);
    t.from = window_of(x, s, t.g, slot).from;
    t.to = window_of(x, s, t.g, slot + t.n - 1).to;
    for (int u = 0; u < EACH; u++) {
        t.w[u] = window_of(x, s, t.g, slot + ls_min(threadIdx.x / LS_WARP + u * WARPS, t.n - 1));
        t.blind[u] = is_blind(x, t.g, t.w[u].query);
    }
    return t;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* out = Σ a g v. With sent (B,H,T; m, l, Σ e^(s-m) g v), what these keys are to a softmax over more of them. */
static __global__ void attend(windows x, keys s, ls_view q, int64_t d, int rows, ls_real scale, ls_real narrow,
                              ls_view out, ls_real *tops, ls_real *inverses, ls_real *sent)
{
    LS_SHARED(ls_real, memory);
    __shared__ visitors visit;
    const int64_t room = ls_fours(d), all = rows * room;
    ls_real *own = memory, *sum = own + all, *piece = sum + all, *weight = piece + PIECE_REALS;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const query_tile t = find_queries(&x, &s, rows);
    const int64_t b = t.g / x.H, h = t.g % x.H;
    ls_real top[EACH], total[EACH], shrink[EACH];
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS;
        top[u] = -INFINITY, total[u] = 0, shrink[u] = 1;
        if (r >= rows) continue;
        load_own(own, r, r < t.n && !t.blind[u] ? ls_row(q, b, h, t.w[u].query) : NULL, scale, d);
        load_own(sum, r, NULL, 0, d);
    }
    for (int64_t key = t.from; key < t.to; key += LS_WARP) {
        const int64_t mine = key + lane;
        ls_real score[EACH];
        invite_keys(&s, t.g, x.H, key, t.to, &visit);
        dots(own, rows, visit.k, d, piece, score);
        for (int u = 0; u < EACH; u++) {
            const int r = warp + u * WARPS;
            if (r >= rows) break;
            const int seen = r < t.n && !t.blind[u] && mine >= t.w[u].from && mine < t.w[u].to && !visit.hidden[lane];
            const ls_real a = seen ? score[u] : -INFINITY, most = ls_warp_max(a);
            const ls_real next = most > top[u] ? most : top[u], base = next == -INFINITY ? 0 : next;
            shrink[u] = ls_exp(top[u] - base);
            const ls_real e = ls_exp(a - base), distance = (ls_real)(t.w[u].offset + (double)mine);
            total[u] = total[u] * shrink[u] + e;
            top[u] = next;
            weight[r * WIDE + lane] = seen ? e * gaussian(&x, narrow, distance) : 0;
        }
        add_weighted(weight, rows, visit.v, d, piece, shrink, sum);
    }
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS;
        if (r >= t.n) break;
        const ls_real l = ls_warp_sum(total[u]), inverse = l > 0 ? 1 / l : 0;
        const int64_t row = t.g * x.T + t.w[u].query;
        ls_real *to = sent != NULL ? sent + row * (2 + d) + 2 : ls_row(out, b, h, t.w[u].query);
        for (int64_t e = lane; e < d; e += LS_WARP) to[e] = (sent != NULL ? 1 : inverse) * sum[r * room + e];
        if (lane > 0) continue;
        if (sent != NULL) {
            to[-2] = top[u];
            to[-1] = l;
        } else {
            tops[row] = top[u] == -INFINITY ? 0 : top[u];
            inverses[row] = inverse;
        }
    }
}

static ls_real narrowness(const ls_pass *p)
{
    return (ls_real)(-2 / (p->option[WINDOW] * p->option[WINDOW]));
}

static void attend_to(ls_pass *p, const ls_block *to, ls_real *sent)
{
    if (all_rows(p) > 0)
        LS_LAUNCH(p->queue, attend, (int)(p->B * p->H * tiles_of(p)), THREADS, tile_bytes(p, 2, 1), windows_of(p),
                  keys_of(to), p->q, p->d, tile_rows(p), (ls_real)p->scale, narrowness(p), p->out, p->saved[TOP],
                  p->saved[INVERSE], sent);
}

static ls_status forward(ls_pass *p, int phase)
{
    (void)phase;
    attend_to(p, &p->halo, NULL);
    return ls_launched(p->queue, "local: windows");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* By query: what the softmax was, and what its gradient needs. */
typedef struct softmax_rows {
    const ls_real *top, *inverse;
    ls_real *delta, *dcentre;
} softmax_rows;

/* a, weight = a g and distance = j - p of a visible pair of which `score` is the scaled product; 0 if it is not. */
typedef struct pair {
    ls_real a, weight, distance;
} pair;

static __device__ pair weigh(const windows *x, int seen, ls_real score, ls_real top, ls_real inverse, double distance,
                             ls_real narrow)
{
    pair p = {0, 0, 0};
    if (!seen) return p;
    p.a = ls_exp(score - top) * inverse;
    p.distance = (ls_real)distance;
    p.weight = p.a * gaussian(x, narrow, p.distance);
    return p;
}

static __global__ void __launch_bounds__(THREADS, 3)
    query_gradients(windows x, keys s, ls_view q, ls_view dout, ls_view dq, int64_t d, int rows, ls_real scale,
                    ls_real narrow, softmax_rows soft)
{
    LS_SHARED(ls_real, memory);
    __shared__ visitors visit;
    const int64_t room = ls_fours(d), all = rows * room;
    ls_real *own = memory, *down = own + all, *sum = down + all, *piece = sum + all;
    ls_real *weight = piece + PIECE_REALS;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const query_tile t = find_queries(&x, &s, rows);
    const int64_t b = t.g / x.H, h = t.g % x.H;
    ls_real delta[EACH], slope[EACH], top[EACH], inverse[EACH];
    const ls_real keep[EACH] = {1, 1, 1, 1};
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS, sees = r < t.n && !t.blind[u];
        const int64_t row = t.g * x.T + t.w[u].query;
        delta[u] = slope[u] = 0;
        top[u] = soft.top[row], inverse[u] = soft.inverse[row];
        if (r >= rows) continue;
        load_own(own, r, sees ? ls_row(q, b, h, t.w[u].query) : NULL, scale, d);
        load_own(down, r, sees ? ls_row(dout, b, h, t.w[u].query) : NULL, 1, d);
        load_own(sum, r, NULL, 0, d);
    }
    /* where the tile sees at most twice 32 keys, the first pass keeps what it finds of pairs for the second */
    const int keeps = t.to - t.from <= 2 * GUESTS;
    ls_real kept[2][2][EACH];              /* Σ terms of δ, and a, of the first and the last 32 */
    for (int pass = 0; pass < 2; pass++) { /* 0: δ and dp; 1: dq */
        for (int64_t key = t.from; key < t.to; key += GUESTS) {
            const int64_t mine = key + lane;
            const int last = key > t.from;
            ls_real given[EACH], share[EACH];
            invite_keys(&s, t.g, x.H, key, t.to, &visit);
            if (pass == 0 || !keeps) {
                ls_real score[EACH], gain[EACH];
                dots(own, rows, visit.k, d, piece, score);
                dots(down, rows, visit.v, d, piece, gain);
                for (int u = 0; u < EACH; u++) {
                    const int r = warp + u * WARPS;
                    const int seen =
                        r < t.n && !t.blind[u] && mine >= t.w[u].from && mine < t.w[u].to && !visit.hidden[lane];
                    const pair a = weigh(&x, seen, score[u], top[u], inverse[u], t.w[u].offset + (double)mine, narrow);
                    given[u] = a.weight * gain[u], share[u] = a.a;
                    if (pass > 0) continue;
                    delta[u] += given[u];
                    slope[u] += given[u] * a.distance;
                    if (last)
                        kept[1][0][u] = given[u], kept[1][1][u] = share[u];
                    else
                        kept[0][0][u] = given[u], kept[0][1][u] = share[u];
                }
            } else {
                for (int u = 0; u < EACH; u++) {
                    given[u] = last ? kept[1][0][u] : kept[0][0][u];
                    share[u] = last ? kept[1][1][u] : kept[0][1][u];
                }
            }
            if (pass == 0) {
                __syncthreads(); /* the visitors go */
                continue;
            }
            __syncthreads(); /* the weights before have been read, the last row's by all warps with too few of their own
                              */
            for (int u = 0; u < EACH; u++) {
                const int r = warp + u * WARPS;
                if (r < rows) weight[r * WIDE + lane] = given[u] - share[u] * delta[u];
            }
            add_weighted(weight, rows, visit.k, d, piece, keep, sum);
        }
        for (int u = 0; u < EACH && pass == 0; u++) delta[u] = ls_warp_sum(delta[u]), slope[u] = ls_warp_sum(slope[u]);
    }
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS;
        if (r >= t.n) break;
        ls_real *to = ls_row(dq, b, h, t.w[u].query);
        for (int64_t e = lane; e < d; e += LS_WARP) to[e] = scale * sum[r * room + e];
        if (lane > 0) continue;
        soft.delta[t.g * x.T + t.w[u].query] = delta[u];
        if (x.order != NULL) soft.dcentre[t.g * x.T + t.w[u].query] = -2 * narrow * slope[u]; /* 4 / w² */
    }
}

/* Keys [r, r + n) of (b,h) g. */
static __device__ void gradients_of_keys(const windows *x, const keys *s, int64_t g, int64_t r, int n, ls_view q,
                                         ls_view dout, ls_view dk, ls_view dv, int64_t d, int rows, ls_real scale,
                                         ls_real narrow, const softmax_rows *soft, ls_real *memory, visitors *visit)
{
    const int64_t room = ls_fours(d), all = rows * room;
    ls_real *own_k = memory, *own_v = own_k + all, *sum_k = own_v + all, *sum_v = sum_k + all;
    ls_real *piece = sum_v + all, *weight = piece + PIECE_REALS, *dscore = weight + rows * WIDE;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t b = g / x->H, h = g % x->H;
    const int64_t begin = find_slot(x, s, g, r, 0), end = find_slot(x, s, g, r + n - 1, 1);
    const ls_real keep[EACH] = {1, 1, 1, 1};
    int hidden[EACH];
    for (int u = 0; u < EACH; u++) {
        const int i = warp + u * WARPS;
        hidden[u] = i >= n || is_hidden(s, g, x->H, r + i);
        if (i >= rows) continue;
        load_own(own_k, i, i < n ? key_row(s, s->k, g, x->H, r + i) : NULL, 1, d);
        load_own(own_v, i, i < n ? key_row(s, s->v, g, x->H, r + i) : NULL, 1, d);
        load_own(sum_k, i, NULL, 0, d);
        load_own(sum_v, i, NULL, 0, d);
    }
    for (int64_t slot = begin; slot < end; slot += LS_WARP) {
        const window w = window_of(x, s, g, ls_min(slot + lane, end - 1));
        const int sees = slot + lane < end && !is_blind(x, g, w.query);
        const int64_t row = g * x->T + w.query;
        const ls_real top = soft->top[row], inverse = soft->inverse[row], delta = soft->delta[row];
        ls_real score[EACH], gain[EACH];
        if (warp == 0) {
            visit->k[lane] = sees ? ls_row(q, b, h, w.query) : NULL;
            visit->v[lane] = sees ? ls_row(dout, b, h, w.query) : NULL;
        }
        dots(own_k, rows, visit->k, d, piece, score, scale); /* (scale q)·k, rounded as in the forward pass */
        dots(own_v, rows, visit->v, d, piece, gain);
        for (int u = 0; u < EACH; u++) {
            const int i = warp + u * WARPS;
            if (i >= rows) break;
            const int seen = sees && !hidden[u] && r + i >= w.from && r + i < w.to;
            const pair a = weigh(x, seen, score[u], top, inverse, w.offset + (double)(r + i), narrow);
            weight[i * WIDE + lane] = a.weight;
            dscore[i * WIDE + lane] = a.weight * gain[u] - a.a * delta;
        }
        add_weighted(weight, rows, visit->v, d, piece, keep, sum_v);
        add_weighted(dscore, rows, visit->k, d, piece, keep, sum_k);
    }
    for (int i = warp; i < n; i += WARPS) {
        ls_real *to_k = key_row(s, dk, g, x->H, r + i), *to_v = key_row(s, dv, g, x->H, r + i);
        for (int64_t e = lane; e < d; e += LS_WARP) {
            to_k[e] = scale * sum_k[i * room + e];
            to_v[e] = sum_v[i * room + e];
        }
    }
    __syncthreads(); /* the visitors go */
}

/* A tile of rows, counted over all (b,h): where lists meet it is done in parts. */
static __global__ void key_gradients(windows x, keys s, int64_t groups, ls_view q, ls_view dout, ls_view dk, ls_view dv,
                                     int64_t d, int rows, ls_real scale, ls_real narrow, softmax_rows soft)
{
    LS_SHARED(ls_real, memory);
    __shared__ visitors visit;
    const int64_t begin = (int64_t)blockIdx.x * rows, all = s.first != NULL ? s.first[groups] : groups * s.n;
    const int64_t end = ls_min(begin + rows, all);
    for (int64_t row = begin; row < end;) {
        int64_t g = 0, high = groups; /* the last (b,h) whose rows begin at or before row */
        while (g + 1 < high) {
            const int64_t middle = (g + high) / 2;
            if ((s.first != NULL ? s.first[middle] : middle * s.n) <= row)
                g = middle;
            else
                high = middle;
        }
        const int64_t first = s.first != NULL ? s.first[g] : g * s.n, last = first + rows_held(&s, g);
        const int n = (int)(ls_min(end, last) - row);
        gradients_of_keys(&x, &s, g, row - first, n, q, dout, dk, dv, d, rows, scale, narrow, &soft, memory, &visit);
        row += n;
    }
}

static ls_status backward(ls_pass *p, int phase)
{
    (void)phase;
    const int rows = tile_rows(p);
    const ls_real scale = (ls_real)p->scale;
    const softmax_rows soft = {p->saved[TOP], p->saved[INVERSE], p->work[DELTA], p->work[DCENTRE]};
    const int64_t all_keys = p->halo.first != NULL ? p->halo.n : p->B * p->H * p->halo.n;
    if (all_rows(p) > 0)
        LS_LAUNCH(p->queue, query_gradients, (int)(p->B * p->H * tiles_of(p)), THREADS, tile_bytes(p, 3, 1),
                  windows_of(p), keys_of(&p->halo), p->q, p->dout, p->dq, p->d, rows, scale, narrowness(p), soft);
    if (all_keys > 0)
        LS_LAUNCH(p->queue, key_gradients, (int)((all_keys + rows - 1) / rows), THREADS, tile_bytes(p, 4, 2),
                  windows_of(p), keys_of(&p->halo), p->B * p->H, p->q, p->dout, p->halo.dk, p->halo.dv, p->d, rows,
                  scale, narrowness(p), soft);
    if (predictive(p)) centres_backward(p);
    return ls_launched(p->queue, "local: gradients of windows");
}

/* ------------------------------------------------------------------------------------------------ count */

static __global__ void count_keys(const uint8_t *pad, int64_t S, ls_real *sent)
{
    __shared__ int64_t scratch[LS_WARP];
    const int64_t b = blockIdx.x;
    int64_t n = 0;
    for (int64_t j = threadIdx.x; j < S; j += LS_THREADS) n += !ls_is_padded(pad, b * S + j);
    n = ls_block_sum(n, scratch);
    if (threadIdx.x > 0) return;
    sent[2 * b] = (ls_real)(n / 4096);
    sent[2 * b + 1] = (ls_real)(n % 4096);
}

static ls_status count(ls_pass *p, int phase)
{
    LS_LAUNCH(p->queue, count_keys, (int)p->B, LS_THREADS, 0, p->own.pad, p->S, p->summary[phase + 1].sent);
    return ls_launched(p->queue, "local: count");
}

/* ------------------------------------------------------------------------------------------------ step */

/* This rank's part of the cache, as a softmax over a part of the keys. */
static ls_status visit_cache(ls_pass *p, int phase)
{
    attend_to(p, &p->visit, p->summary[phase + 1].sent);
    return ls_launched(p->queue, "local: visit");
}

static __global__ void divide(int64_t H, int64_t T, int64_t d, int64_t all, const ls_real *got, ls_view out)
{
    LS_EACH(i, all)
    {
        const int64_t row = i / d, e = i % d;
        const ls_real *from = got + row * (2 + d);
        ls_row(out, row / T / H, row / T % H, row % T)[e] = from[1] > 0 ? from[2 + e] / from[1] : 0;
    }
}

static ls_status finish(ls_pass *p, int phase)
{
    const int64_t all = all_rows(p) * p->d;
    LS_LAUNCH(p->queue, divide, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->H, p->T, p->d, all, p->summary[phase].got,
              p->out);
    return ls_launched(p->queue, "local: finish");
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_cuda_kernel kernels[] = {
    {"windows", forward, backward},
    {"predicted windows", forward, backward},
    {"count", count, NULL},
    {"centres", centres, NULL},
    {"visit", visit_cache, NULL},
    {"finish", finish, NULL},
    {NULL, NULL, NULL},
};

} // namespace ls_local

extern "C" const ls_cuda_mechanism ls_local_cuda = {ls_local::plan, ls_local::kernels, ls_local::host_bytes, NULL};
