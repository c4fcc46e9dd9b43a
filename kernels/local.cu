/* Local attention on a GPU; formulas in local.c.
 *
 * A block has a tile of 64 rows, see local_tiles.h, and visitors come into its shared memory: in one visit all whom the
 * tile meets, if they are so few that each warp's are a band of 8 K of them, otherwise 8 K in each. Where there are
 * more visits, the sums wait in the output itself.
 *
 *   attend           a tile of queries, visited by keys: online softmax; its maximum and sum are saved
 *   query_gradients  a tile of queries, visited by keys twice: first for δ and dp, then for dq
 *   key_gradients    a tile of keys, visited by the queries that see them: dk, dv
 *
 * Everything is said of queries in the order of their windows, their slots: so the queries that see a key are a run of
 * slots, whose ends a search finds where they are not known. In local-p that order is made, see local_centres.cu. Every
 * sum has one order, whatever blocks do. */
#include "local_tiles.h"

extern "C" const ls_cuda_mechanism ls_local_cuda;

namespace ls_local
{

/* CENTRE (B,H,T): p in double, by query. By slot: ORDER the query, SORTED its centre, all_keys where it is padded, ROW
 * the first row of its window. TOP, INVERSE (B,H,T): of the softmax, by query. */
static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t all = all_rows(p), guess = predictive(p) ? all : 0, back = p->backward;
    const size_t one = sizeof(int64_t);
    p->saved[CENTRE] = (ls_real *)ls_arena_take(saved, (size_t)guess * sizeof(double));
    for (int i = ORDER; i <= ROW; i++) p->saved[i] = (ls_real *)ls_arena_take(saved, (size_t)guess * one);
    p->saved[TOP] = ls_take(saved, all);
    p->saved[INVERSE] = ls_take(saved, all);
    p->work[SORT] = (ls_real *)ls_arena_take(work, back ? 0 : 2 * (size_t)guess * one);
    p->work[GAPS] = (ls_real *)ls_arena_take(work, back ? 0 : (size_t)(p->B * p->H * scan_tiles(p)) * one);
    p->work[DELTA] = ls_take(work, back * all);
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

/* Which (b,h), g = b H + h. */
typedef struct group {
    int64_t g, b, h;
} group;

static __device__ group group_of(int g, int64_t H)
{
    const int b = g / (int)H;
    return group{g, b, g - b * (int)H};
}

/* Row r of its keys in v; the others follow by v.st. */
static __device__ ls_real *key_row(const keys *s, ls_view v, group at, int64_t r)
{
    return s->first == NULL ? ls_row(v, at.b, at.h, r) : ls_row(v, 0, 0, s->first[at.g] + r);
}

static __device__ int is_hidden(const keys *s, group at, int64_t r)
{
    return ls_is_padded(s->pad, s->first == NULL ? at.b * s->n + r : s->first[at.g] + r);
}

/* A slot: the query, and its window as rows [from, to) of the keys; row r is at offset + r from p. */
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

static __device__ int is_blind(const windows *x, group at, int64_t query)
{
    return ls_is_padded(x->pad, at.b * x->T + query);
}

/* The slots [lo, lo + n) whose windows have any of the rows [r, end). In self attention a window's ends are as far from
 * every query; else half a warp seeks where windows first end after r, the other where they begin at `end` or after,
 * each among 16 parts at a time. */
static __device__ ls_span find_slots(const windows *x, const keys *s, int64_t g, int64_t r, int64_t end)
{
    enum { PARTS = LS_WARP / 2 };
    const int part = threadIdx.x % PARTS, begins = threadIdx.x % LS_WARP / PARTS;
    int64_t low = 0, high = x->T;
    if (x->pattern == LS_NS || x->pattern == LS_CS) {
        const int64_t shift = s->lo - x->first, ahead = x->pattern == LS_NS ? x->w : 0;
        low = ls_max(0, ls_min(r + shift - ahead, x->T));
        high = ls_max(low, ls_min(end + shift + (x->pattern == LS_NS ? x->w : x->w - 1), x->T));
        return ls_span{0, low, high - low};
    }
    while (__any_sync(0xffffffffu, low < high)) {
        const int64_t apart = (high - low + PARTS - 1) / PARTS;
        const window w = window_of(x, s, g, ls_max(0, ls_min(low + (part + 1) * apart, high) - 1));
        const unsigned vote = __ballot_sync(0xffffffffu, begins ? w.from < end : w.to <= r);
        const int before = __popc(vote >> (begins * PARTS) & 0xffff);
        if (low == high) continue;
        if (before < PARTS) high = ls_min(low + (before + 1) * apart, high) - 1;
        low = before < PARTS ? low + before * apart : high;
    }
    const int64_t first = __shfl_sync(0xffffffffu, low, 0), last = __shfl_sync(0xffffffffu, low, PARTS);
    return ls_span{0, first, last - first};
}

/* ------------------------------------------------------------------------------------------------ visits */

/* K = 4 where 16 queries side by side see no more than 32 keys; otherwise 6, which the default windows need. */
static int few_keys(const ls_pass *p)
{
    const int64_t w = (int64_t)p->option[WINDOW];
    return (p->pattern == LS_CS ? w : 2 * w + 1) + OF_WARP - 1 <= 4 * 8;
}

/* Visits: `all` visitors come `step` at a time, a warp's band begins at `start`. */
typedef struct visits {
    int all, step, start;
} visits;

/* Visitors [first, last), of which warp w's are [begin[w], end[w]). */
template <int K> static __device__ visits plan_visits(const int *begin, const int *end, int first, int last)
{
    const int mine = begin[threadIdx.x / LS_WARP] - first, latest = guests<K> - 8 * K;
    int few = last - first <= guests<K>;
    for (int w = 0; w < WARPS; w++) few = few && end[w] - begin[w] <= 8 * K;
    return visits{last - first, few ? guests<K> : 8 * K, few ? (mine < latest ? mine : latest) : 0};
}

/* Whether this warp's rows meet anybody in the visit from `from` on. */
static __device__ int is_met(const visits *v, const int *begin, const int *end, int from)
{
    const int w = threadIdx.x / LS_WARP;
    return end[w] > from && begin[w] < from + v->step;
}

/* j - p of row `key`. */
static __device__ ls_real distance(double offset, int key)
{
    return (ls_real)(offset + (double)key);
}

/* What a weight is multiplied by so far away from p; 0 where it is 0 and nothing is seen. */
static __device__ ls_real narrowing(ls_real w, ls_real narrow, ls_real away)
{
    return w != 0 ? ls_exp(narrow * away * away) : 0;
}

/* A tile of queries of one (b,h), by slot: the query, or -1 - query where it sees nothing; its window of rows from
 * `first`; p is `offset` before that. And of each warp, where its windows begin and end; the keys of a visit, -1 where
 * they are hidden. */
typedef struct query_tile {
    double offset[OWN];
    int query[OWN], from[OWN], to[OWN], begin[WARPS], end[WARPS], key[guests<6>];
} query_tile;

/* Where it is: (b,h), its first slot, slots, its first key. */
typedef struct tile_place {
    group at;
    int64_t slot, first;
    int n;
} tile_place;

static __device__ tile_place find_queries(const windows *x, const keys *s, query_tile *t)
{
    const int tiles = (int)((x->T + OWN - 1) / OWN), g = (int)blockIdx.x / tiles, i = threadIdx.x;
    tile_place p = {group_of(g, x->H), (int64_t)((int)blockIdx.x - g * tiles) * OWN, 0, 0};
    p.n = (int)ls_min(OWN, x->T - p.slot);
    p.first = window_of(x, s, g, p.slot).from;
    if (i < OWN) {
        const window w = window_of(x, s, g, ls_min(p.slot + i, x->T - 1));
        const int sees = i < p.n && !is_blind(x, p.at, w.query), from = (int)(w.from - p.first);
        const int to = (int)(w.to - p.first);
        t->query[i] = sees ? (int)w.query : -1 - (int)w.query;
        t->offset[i] = w.offset + (double)p.first;
        t->from[i] = from, t->to[i] = to;
        if (i % OF_WARP == 0) t->begin[i / OF_WARP] = from;
        if (i % OF_WARP == OF_WARP - 1) t->end[i / OF_WARP] = to;
    }
    __syncthreads();
    return p;
}

static __device__ int query_of(const query_tile *t, int row)
{
    return t->query[row] < 0 ? -1 - t->query[row] : t->query[row];
}

/* Those of the keys that come in the visit from `from` on. */
template <int K>
static __device__ void invite_keys(const keys *s, const tile_place *p, const visits *v, int from, query_tile *t)
{
    const int i = threadIdx.x, n = v->all - from < v->step ? v->all - from : v->step;
    __syncthreads(); /* those before have gone */
    if (i < guests<K>) t->key[i] = i < n && !is_hidden(s, p->at, p->first + from + i) ? i : -1;
    __syncthreads();
}

/* Which keys [lo, lo + width) of the visit a row of the tile sees. */
typedef struct sight {
    int lo;
    unsigned width;
} sight;

static __device__ sight sight_of(const query_tile *t, int row, int from)
{
    const int lo = t->from[row] > from ? t->from[row] - from : 0, hi = t->query[row] < 0 ? 0 : t->to[row] - from;
    return sight{lo, hi > lo ? (unsigned)(hi - lo) : 0};
}

static __device__ int sees(sight x, int i)
{
    return (unsigned)(i - x.lo) < x.width;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* out = Σ a g v. With sent (B,H,T; m, l, Σ e^(s-m) g v), what these keys are to a softmax over more of them. */
template <class M, int K>
static __global__ void __launch_bounds__(THREADS, 5)
    attend(windows x, keys s, ls_view q, int d, ls_real scale, ls_real narrow, ls_view out, ls_real *tops,
           ls_real *inverses, ls_real *sent)
{
    typedef layout<M> my;
    LS_SHARED(typename M::number, memory);
    __shared__ query_tile t;
    typename M::number *own = memory, *visitor = own + OWN * M::PITCH;
    const tile_place p = find_queries(&x, &s, &t);
    const visits v = plan_visits<K>(t.begin, t.end, 0, t.end[WARPS - 1]);
    ls_real top[my::ROWS], total[my::ROWS], shrink[my::ROWS];
    for (int i = 0; i < my::ROWS; i++) top[i] = -INFINITY, total[i] = 0;
    for (int from = 0; from == 0 || from < v.all; from += v.step) {
        const int met = is_met(&v, t.begin, t.end, from), last = v.all - from <= v.step;
        of_pairs<M, K> w;
        int key[pairs<M, K>];
        invite_keys<K>(&s, &p, &v, from, &t);
        const rows keys_here = {t.key, key_row(&s, s.k, p.at, p.first + from), s.k.st, guests<K>};
        const rows values = {t.key, key_row(&s, s.v, p.at, p.first + from), s.v.st, guests<K>};
        multiply<M, K>(rows{t.query, ls_row(q, p.at.b, p.at.h, 0), q.st, x.T}, keys_here, d, met, v.start, own, visitor,
                       w);
#pragma unroll
        for (int k = 0; k < pairs<M, K>; k++) key[k] = t.key[v.start + my::guest(k)];
#pragma unroll
        for (int i = 0; i < my::ROWS; i++) {
            const sight seen = sight_of(&t, my::row(i), from);
            ls_real most = -INFINITY;
#pragma unroll
            for (int k = 0; k < pairs<M, K>; k++) {
                w[i][k] = sees(seen, key[k]) ? ls_multiply(scale, w[i][k]) : -INFINITY;
                most = w[i][k] > most ? w[i][k] : most;
            }
            most = row_max<M>(most);
            const ls_real next = most > top[i] ? most : top[i], base = next == -INFINITY ? 0 : next;
            shrink[i] = ls_exp(top[i] - base);
            total[i] *= shrink[i];
            top[i] = next;
#pragma unroll
            for (int k = 0; k < pairs<M, K>; k++) {
                w[i][k] = ls_exp(w[i][k] - base);
                total[i] += w[i][k];
            }
        }
        if (x.order != NULL) {
#pragma unroll
            for (int i = 0; i < my::ROWS; i++)
#pragma unroll
                for (int k = 0; k < pairs<M, K>; k++)
                    w[i][k] *= narrowing(w[i][k], narrow, distance(t.offset[my::row(i)], from + key[k]));
        }
        weights<M, K> made;
        made.put(w, own);
#pragma unroll
        for (int i = 0; i < my::ROWS && last; i++) total[i] = row_sum<M>(total[i]);
        for (int e0 = 0; e0 < d; e0 += PIECE) {
            of_features<M> sum;
            __syncthreads(); /* what was there has been read */
            load_rows<M, guests<K>>(values, e0, d, visitor);
            wait_for_rows();
            if (from > 0 && !met && !last) continue;
            made.weigh(visitor, v.start, sum);
#pragma unroll
            for (int i = 0; i < my::ROWS; i++) {
                const int r = my::row(i);
                if (r >= p.n) break;
                const int query = query_of(&t, r);
                ls_real *to =
                    sent != NULL ? sent + (p.at.g * x.T + query) * (2 + d) + 2 : ls_row(out, p.at.b, p.at.h, query);
                const ls_real factor = !last || sent != NULL ? 1 : total[i] > 0 ? 1 / total[i] : 0;
                put_sums<M>(to, e0, d, from > 0, factor * shrink[i], factor, sum[i]);
            }
        }
    }
    for (int i = 0; i < my::ROWS; i++) {
        const int r = my::row(i);
        if (r >= p.n || my::guest(0) > 0) break;
        const int64_t row = p.at.g * x.T + query_of(&t, r);
        if (sent != NULL) {
            sent[row * (2 + d)] = top[i];
            sent[row * (2 + d) + 1] = total[i];
        } else {
            tops[row] = top[i] == -INFINITY ? 0 : top[i];
            inverses[row] = total[i] > 0 ? 1 / total[i] : 0;
        }
    }
}

static ls_real narrowness(const ls_pass *p)
{
    return (ls_real)(-2 / (p->option[WINDOW] * p->option[WINDOW]));
}

static int query_tiles(const ls_pass *p)
{
    return (int)(p->B * p->H * ((p->T + OWN - 1) / OWN));
}

template <class M, int K> static void attend_to(ls_pass *p, const ls_block *to, ls_real *sent)
{
    if (all_rows(p) > 0)
        LS_LAUNCH(p->queue, (attend<M, K>), query_tiles(p), THREADS, (tile_bytes<M, K>()), windows_of(p), keys_of(to),
                  p->q, (int)p->d, (ls_real)p->scale, narrowness(p), p->out, p->saved[TOP], p->saved[INVERSE], sent);
}

/* The function of a width, for the numbers that this call's products have. */
#define OF_KIND(p, function, K) (ls_tiles::on_tensor_cores(p) ? function<tensor, K> : function<plain, K>)

static ls_status forward(ls_pass *p, int phase)
{
    (void)phase;
    (few_keys(p) ? OF_KIND(p, attend_to, 4) : OF_KIND(p, attend_to, 6))(p, &p->halo, NULL);
    return ls_launched(p->queue, "local: windows");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* By query: what the softmax was, and what its gradient needs. */
typedef struct softmax_rows {
    const ls_real *top, *inverse;
    ls_real *delta, *dcentre;
} softmax_rows;

template <class M, int K>
static __global__ void __launch_bounds__(THREADS, 4)
    query_gradients(windows x, keys s, ls_view q, ls_view dout, ls_view dq, int d, ls_real scale, ls_real narrow,
                    softmax_rows soft)
{
    typedef layout<M> my;
    LS_SHARED(typename M::number, memory);
    __shared__ query_tile t;
    typename M::number *own = memory, *visitor = own + OWN * M::PITCH;
    const tile_place p = find_queries(&x, &s, &t);
    const visits v = plan_visits<K>(t.begin, t.end, 0, t.end[WARPS - 1]);
    ls_real delta[my::ROWS] = {0}, slope[my::ROWS] = {0}, top[my::ROWS], inverse[my::ROWS];
    for (int i = 0; i < my::ROWS; i++) {
        const int64_t row = p.at.g * x.T + query_of(&t, my::row(i));
        top[i] = soft.top[row], inverse[i] = soft.inverse[row];
    }
    const rows queries = {t.query, ls_row(q, p.at.b, p.at.h, 0), q.st, x.T};
    const rows down = {t.query, ls_row(dout, p.at.b, p.at.h, 0), dout.st, x.T};
    of_pairs<M, K> given, share;           /* dp, and a; of a single visit, found once */
    for (int pass = 0; pass < 2; pass++) { /* 0: δ and dp; 1: dq */
        for (int from = 0; from == 0 || from < v.all; from += v.step) {
            const int met = is_met(&v, t.begin, t.end, from);
            const rows keys_here = {t.key, key_row(&s, s.k, p.at, p.first + from), s.k.st, guests<K>};
            const rows values = {t.key, key_row(&s, s.v, p.at, p.first + from), s.v.st, guests<K>};
            if (pass == 0 || v.all > v.step) {
                int key[pairs<M, K>];
                invite_keys<K>(&s, &p, &v, from, &t);
                multiply<M, K>(down, values, d, met, v.start, own, visitor, given);
                multiply<M, K>(queries, keys_here, d, met, v.start, own, visitor, share);
#pragma unroll
                for (int k = 0; k < pairs<M, K>; k++) key[k] = t.key[v.start + my::guest(k)];
#pragma unroll
                for (int i = 0; i < my::ROWS; i++) {
                    const sight seen = sight_of(&t, my::row(i), from);
#pragma unroll
                    for (int k = 0; k < pairs<M, K>; k++) {
                        const ls_real a = ls_exp(ls_multiply(scale, share[i][k]) - top[i]) * inverse[i];
                        share[i][k] = sees(seen, key[k]) ? a : 0;
                    }
                }
#pragma unroll
                for (int i = 0; i < my::ROWS && x.order != NULL; i++)
#pragma unroll
                    for (int k = 0; k < pairs<M, K>; k++) {
                        const ls_real away = distance(t.offset[my::row(i)], from + key[k]);
                        given[i][k] = ls_multiply(given[i][k], narrowing(share[i][k], narrow, away));
                        if (pass == 0) slope[i] += share[i][k] * given[i][k] * away;
                    }
            }
            if (pass == 0) {
#pragma unroll
                for (int i = 0; i < my::ROWS; i++)
#pragma unroll
                    for (int k = 0; k < pairs<M, K>; k++) delta[i] += share[i][k] * given[i][k];
                continue;
            }
#pragma unroll
            for (int i = 0; i < my::ROWS; i++)
#pragma unroll
                for (int k = 0; k < pairs<M, K>; k++) given[i][k] = share[i][k] * (given[i][k] - delta[i]);
            weights<M, K> made;
            made.put(given, own);
            for (int e0 = 0; e0 < d; e0 += PIECE) {
                of_features<M> sum;
                if (d > PIECE) { /* otherwise they are still there */
                    __syncthreads();
                    load_rows<M, guests<K>>(keys_here, e0, d, visitor);
                    wait_for_rows();
                }
                if (from > 0 && !met) continue;
                made.weigh(visitor, v.start, sum);
#pragma unroll
                for (int i = 0; i < my::ROWS; i++) {
                    const int r = my::row(i);
                    if (r >= p.n) break;
                    put_sums<M>(ls_row(dq, p.at.b, p.at.h, query_of(&t, r)), e0, d, from > 0, 1, scale, sum[i]);
                }
            }
        }
        for (int i = 0; i < my::ROWS && pass == 0; i++)
            delta[i] = row_sum<M>(delta[i]), slope[i] = row_sum<M>(slope[i]);
    }
    for (int i = 0; i < my::ROWS; i++) {
        const int r = my::row(i);
        if (r >= p.n || my::guest(0) > 0) break;
        const int64_t row = p.at.g * x.T + query_of(&t, r);
        soft.delta[row] = delta[i];
        if (x.order != NULL) soft.dcentre[row] = -2 * narrow * slope[i]; /* 4 / w² */
    }
}

/* A tile of keys: 0 <= i < n for those that are seen, -1 for the others. Of the slots that visit: the query, or -1
 * where it sees nothing; the keys of the tile that it sees; what its softmax was. And of each warp, where its visitors
 * begin and end. */
typedef struct key_tile {
    double offset[guests<6>];
    sight seen[guests<6>];
    ls_real top[guests<6>], inverse[guests<6>], delta[guests<6>];
    int query[guests<6>], key[OWN], begin[WARPS], end[WARPS];
} key_tile;

/* Where the visitors of keys [r, r + n) begin and end, by warp, and which keys are seen. */
static __device__ void find_visitors(const windows *x, const keys *s, group at, int64_t r, int n, key_tile *t)
{
    const int i = threadIdx.x, warp = i / LS_WARP, low = (int)ls_min(warp * OF_WARP, n - 1);
    const ls_span mine = find_slots(x, s, at.g, r + low, r + ls_max(low + 1, ls_min((warp + 1) * OF_WARP, n)));
    if (i < OWN) t->key[i] = i < n && !is_hidden(s, at, r + i) ? i : -1;
    if (i % LS_WARP == 0) t->begin[warp] = (int)mine.lo, t->end[warp] = (int)(mine.lo + mine.n);
    __syncthreads();
}

/* Those of slots [begin, begin + n) who come first. */
template <int K>
static __device__ void invite_queries(const windows *x, const keys *s, group at, int64_t r, int64_t begin, int n,
                                      const softmax_rows *soft, key_tile *t)
{
    const int i = threadIdx.x;
    __syncthreads(); /* those before have gone */
    if (i < guests<K>) {
        t->query[i] = -1, t->seen[i] = sight{0, 0};
        t->top[i] = t->inverse[i] = t->delta[i] = 0, t->offset[i] = 0;
        const window w = i < n ? window_of(x, s, at.g, begin + i) : window{0, 0, 0, 0};
        if (i < n && !is_blind(x, at, w.query)) {
            const int64_t row = at.g * x->T + w.query;
            const int lo = (int)ls_min(ls_max(w.from - r, 0), OWN), hi = (int)ls_min(w.to - r, OWN);
            t->query[i] = (int)w.query, t->seen[i] = sight{lo, hi > lo ? (unsigned)(hi - lo) : 0};
            t->top[i] = soft->top[row], t->inverse[i] = soft->inverse[row], t->delta[i] = soft->delta[row];
            t->offset[i] = w.offset + (double)r;
        }
    }
    __syncthreads();
}

/* Keys [r, r + n) of (b,h). */
template <class M, int K>
static __device__ void gradients_of_keys(const windows *x, const keys *s, group at, int64_t r, int n, ls_view q,
                                         ls_view dout, ls_view dk, ls_view dv, int d, ls_real scale, ls_real narrow,
                                         const softmax_rows *soft, key_tile *t, typename M::number *own)
{
    typedef layout<M> my;
    typename M::number *visitor = own + OWN * M::PITCH;
    find_visitors(x, s, at, r, n, t);
    const int first = t->begin[0];
    const rows mine = {t->key, key_row(s, s->k, at, r), s->k.st, OWN},
               values = {t->key, key_row(s, s->v, at, r), s->v.st, OWN};
    const rows queries = {t->query, ls_row(q, at.b, at.h, 0), q.st, x->T};
    const rows down = {t->query, ls_row(dout, at.b, at.h, 0), dout.st, x->T};
    const visits v = plan_visits<K>(t->begin, t->end, first, t->end[WARPS - 1]);
    for (int from = 0; from == 0 || from < v.all; from += v.step) {
        const int met = is_met(&v, t->begin, t->end, first + from), to = v.all - from < v.step ? v.all - from : v.step;
        of_pairs<M, K> weight, dscore;
        int key[my::ROWS];
        invite_queries<K>(x, s, at, r, first + from, to, soft, t);
        multiply<M, K>(values, down, d, met, v.start, own, visitor, dscore);
        multiply<M, K>(mine, queries, d, met, v.start, own, visitor, weight);
#pragma unroll
        for (int i = 0; i < my::ROWS; i++) key[i] = t->key[my::row(i)];
#pragma unroll
        for (int k = 0; k < pairs<M, K>; k++) {
            const int j = v.start + my::guest(k);
            const sight seen = t->seen[j];
            const ls_real top = t->top[j], inverse = t->inverse[j], delta = t->delta[j];
#pragma unroll
            for (int i = 0; i < my::ROWS; i++) {
                const ls_real a = sees(seen, key[i]) ? ls_exp(ls_multiply(scale, weight[i][k]) - top) * inverse : 0;
                const ls_real gauss = x->order == NULL ? 1 : narrowing(a, narrow, distance(t->offset[j], key[i]));
                weight[i][k] = a * gauss;
                dscore[i][k] = a * (ls_multiply(gauss, dscore[i][k]) - delta);
            }
        }
        for (int side = 0; side < 2; side++) { /* 0: dk, 1: dv */
            weights<M, K> made;
            if (side == 0)
                made.put(dscore, own);
            else
                made.put(weight, own);
            for (int e0 = 0; e0 < d; e0 += PIECE) {
                of_features<M> sum;
                if (side > 0 || d > PIECE) { /* otherwise they are still there */
                    __syncthreads();
                    load_rows<M, guests<K>>(side > 0 ? down : queries, e0, d, visitor);
                    wait_for_rows();
                }
                if (from > 0 && !met) continue;
                made.weigh(visitor, v.start, sum);
#pragma unroll
                for (int i = 0; i < my::ROWS; i++) {
                    const int row = my::row(i);
                    if (row >= n) break;
                    put_sums<M>(key_row(s, side > 0 ? dv : dk, at, r + row), e0, d, from > 0, 1, side > 0 ? 1 : scale,
                                sum[i]);
                }
            }
        }
    }
    __syncthreads(); /* the tile goes */
}

/* A tile of rows, counted over all (b,h): where lists meet it is done in parts. */
template <class M, int K>
static __global__ void __launch_bounds__(THREADS, 4)
    key_gradients(windows x, keys s, int groups, ls_view q, ls_view dout, ls_view dk, ls_view dv, int d, ls_real scale,
                  ls_real narrow, softmax_rows soft)
{
    LS_SHARED(typename M::number, memory);
    __shared__ key_tile t;
    const int64_t begin = (int64_t)blockIdx.x * OWN, all = s.first != NULL ? s.first[groups] : groups * s.n;
    const int64_t end = ls_min(begin + OWN, all);
    for (int64_t row = begin; row < end;) {
        int g = 0, high = groups; /* the last (b,h) whose rows begin at or before row */
        while (g + 1 < high) {
            const int middle = (g + high) / 2;
            if ((s.first != NULL ? s.first[middle] : middle * s.n) <= row)
                g = middle;
            else
                high = middle;
        }
        const int64_t first = s.first != NULL ? s.first[g] : g * s.n, last = first + rows_held(&s, g);
        const int n = (int)(ls_min(end, last) - row);
        gradients_of_keys<M, K>(&x, &s, group_of(g, x.H), row - first, n, q, dout, dk, dv, d, scale, narrow, &soft, &t,
                                memory);
        row += n;
    }
}

template <class M, int K> static void find_gradients(ls_pass *p)
{
    const ls_real scale = (ls_real)p->scale;
    const softmax_rows soft = {p->saved[TOP], p->saved[INVERSE], p->work[DELTA], p->work[DCENTRE]};
    const int64_t all_keys = p->halo.first != NULL ? p->halo.n : p->B * p->H * p->halo.n;
    if (all_rows(p) > 0)
        LS_LAUNCH(p->queue, (query_gradients<M, K>), query_tiles(p), THREADS, (tile_bytes<M, K>()), windows_of(p),
                  keys_of(&p->halo), p->q, p->dout, p->dq, (int)p->d, scale, narrowness(p), soft);
    if (all_keys > 0)
        LS_LAUNCH(p->queue, (key_gradients<M, K>), (int)((all_keys + OWN - 1) / OWN), THREADS, (tile_bytes<M, K>()),
                  windows_of(p), keys_of(&p->halo), (int)(p->B * p->H), p->q, p->dout, p->halo.dk, p->halo.dv,
                  (int)p->d, scale, narrowness(p), soft);
}

static ls_status backward(ls_pass *p, int phase)
{
    (void)phase;
    (few_keys(p) ? OF_KIND(p, find_gradients, 4) : OF_KIND(p, find_gradients, 6))(p);
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
    OF_KIND(p, attend_to, 6)(p, &p->visit, p->summary[phase + 1].sent);
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
