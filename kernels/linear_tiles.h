/* Linear attention on a GPU: how rows and features come to the tiles of tiles_cuda.h. Denominators and δ are summed in
 * double, in bf16 as floats. Theory: linear_slabs.h. */
#ifndef LS_LINEAR_TILES_H
#define LS_LINEAR_TILES_H

#include "linear_slabs.h"
#include "tiles_cuda.h"

namespace ls_linear
{
using namespace ls_tiles;

/* Where a denominator may meet its floor nothing is rounded. */
static inline int takes_tensor_cores(const ls_pass *p)
{
    return on_tensor_cores(p) && !ls_linear_jumps(((const ls_feature_map *)p->kit)->floor(p));
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Rows [R, R + count) of the slab, at most SIDE of one chunk P, of which the first `exist` are the shard's. */
typedef struct strip {
    int64_t P, R;
    place at; /* of the first */
    int count, exist;
} strip;

static inline int64_t strips_of(const linear *x)
{
    return chunks_of(x) * ((x->s.C + SIDE - 1) / SIDE);
}

__device__ static inline strip strip_of(const linear &x, int64_t P, int u)
{
    strip y;
    y.P = P;
    y.R = P * x.s.C + u;
    y.at = place_of(x.s, y.R);
    y.count = least(SIDE, (int)x.s.C - u);
    y.exist = (int)ls_max(0, ls_min(y.count, x.s.rows - y.at.t));
    return y;
}

/* Strip number i of all. */
__device__ static inline strip strip_number(const linear &x, int64_t i)
{
    const int64_t each = (x.s.C + SIDE - 1) / SIDE, P = quotient(i, each);
    return strip_of(x, P, (int)(i - P * each) * SIDE);
}

__device__ static inline place place_in(const strip &y, int r)
{
    place at = y.at;
    at.u += r, at.t += r;
    return at;
}

__device__ static inline ls_real *row_in(const strip &y, ls_view v, int r)
{
    return ls_row(v, y.at.b, y.at.h, y.at.t + r);
}

/* Row r of the strip, or its last one that exists, or, where none does, the shard's last: its memory may be read. */
__device__ static inline const ls_real *row_to_read(const linear &x, const strip &y, ls_view v, int r)
{
    return ls_row(v, y.at.b, y.at.h, ls_min(y.at.t, x.s.rows - 1)) + most(0, least(r, y.exist - 1)) * v.st;
}

/* A tile = numbers [e0, e0 + SIDE) of the strip's rows; 0 where there are none. */
template <class M>
__device__ static void load_rows(const linear &x, const strip &y, int e0, ls_view rows, const uint8_t *pad, int fours,
                                 typename M::number *to)
{
    typedef filling<SIDE> fill;
    const int left = x.d - e0 - fill::column(), e = left > 0 ? e0 + fill::column() : 0;
    const uint8_t *pads = pad == NULL ? NULL : pad + y.at.b * x.s.rows + y.at.t;
    ls_four z[fill::EACH];
    int there[fill::EACH];
#pragma unroll
    for (int n = 0; n < fill::EACH; n++) there[n] = fill::row(n) < y.exist && (pads == NULL || pads[fill::row(n)] == 0);
    read_fours<fill::EACH>(
        fours, [&](int n) { return row_to_read(x, y, rows, fill::row(n)) + e; },
        [&](int n) { return there[n] ? left : 0; }, z);
    fill::template tile<M>(z, whole<M>(x.d - e0), to);
}

/* A tile = features [f0, f0 + SIDE), numbers [e0, e0 + SIDE) of a state S (F,d); 0 where there are none. rest: what
 * rounding takes from it, NULL: that is lost. */
template <class M>
__device__ static void load_state(const linear &x, const ls_real *S, int f0, int e0, typename M::number *to,
                                  typename M::number *rest)
{
    typedef filling<SIDE> fill;
    const int left = x.d - e0 - fill::column(), all = least(SIDE, x.F - f0);
    const ls_real *first = S + (int64_t)f0 * x.d + (left > 0 ? e0 + fill::column() : 0);
    ls_four z[fill::EACH];
    read_fours<fill::EACH>(
        x.d % 4 == 0, [&](int n) { return first + least(fill::row(n), all - 1) * x.d; },
        [&](int n) { return fill::row(n) < all ? left : 0; }, z);
    fill::template tile_and_rest<M>(z, whole<M>(x.d - e0), to, rest);
}

/* ------------------------------------------------------------------------------------------------ features */

enum { OF_QUERIES, OF_KEYS };

/* Features of queries, or of keys, and how those that nobody has made are: by `act` of the rows. */
typedef struct features {
    const ls_real *made; /* (R,r), NULL: not made; those of keys may be exponents */
    ls_view rows, drows;
    ls_real *gradient; /* (R,r), of made ones */
    side at;
    int act;
    int fours, dfours;    /* those of a row can be read, their gradients written by fours */
    level from;           /* keys: c that exponentials are seen from; queries: c of the state that they see */
    const ls_real *scale; /* (R) that features are multiplied by, NULL: 1 */
} features;

static inline int act_of_map(const ls_pass *p)
{
    return map_of(p)->act == NULL ? LS_LINEAR_MADE : map_of(p)->act(p);
}
/* from, scale: see features. */
static inline features queries_as_seen(const ls_pass *p, const linear *x, level from, const ls_real *scale)
{
    features y = {};
    y.act = act_of_map(p);
    y.made = x->a, y.gradient = x->da;
    y.rows = p->q, y.drows = p->dq;
    y.at = queries_of(p);
    y.fours = y.act == LS_LINEAR_MADE ? x->r % 4 == 0 : ls_rows_are_fours(p->q, x->d);
    y.dfours = ls_rows_are_fours(p->dq, x->d);
    y.from = from;
    y.scale = scale;
    return y;
}
static inline features keys_as_seen(const ls_pass *p, const linear *x, level from)
{
    features y = {};
    y.act = act_of_map(p);
    y.made = x->x, y.gradient = x->db;
    y.rows = p->own.k, y.drows = p->own.dk;
    y.at = keys_of(p);
    y.fours = y.act == LS_LINEAR_MADE ? x->r % 4 == 0 : ls_rows_are_fours(p->own.k, x->d);
    y.dfours = ls_rows_are_fours(p->own.dk, x->d);
    y.from = from;
    return y;
}

/* What each of the strip's rows makes of its features, in shared memory. */
typedef struct facts {
    ls_real by[SIDE];   /* scale; 0: the row is not there */
    ls_real past[SIDE]; /* queries: what exponentials are multiplied by; keys: what is taken from exponents */
    ls_real sine[SIDE], cosine[SIDE];
} facts;

/* To be waited for. What queries see: a state before them, keys of their own chunk from c at its end, or from their own
 * c. */
enum { PAST, NEAR_BY, ALONE };
template <int SEEN>
__device__ static void find_facts(const linear &x, const features &f, const strip &y, int sees, facts *to)
{
    const int r = threadIdx.x;
    if (r >= SIDE) return;
    const place at = place_in(y, r);
    const int there = r < y.count && is_there(x.s, f.at.pad, at);
    angle turn = {0, 1};
    ls_real past = SEEN == OF_KEYS ? 0 : 1;
    if (there) {
        turn = angle_of(x, f.at, at.t);
        if (x.exponentials > 0 && f.from.p != NULL) {
            const ls_real c = level_of(f.from, x.s, at);
            if (SEEN == OF_KEYS)
                past = c == -INFINITY ? 0 : c;
            else if (sees == NEAR_BY)
                past = x.c[y.R + r] == -INFINITY ? 1 : ls_exp(c - x.c[y.R + r]);
            else if (sees == PAST)
                past = (ls_real)ls_linear_change(c, x.c[y.R + r]);
        }
    }
    to->by[r] = !there ? 0 : f.scale == NULL ? 1 : f.scale[y.R + r];
    to->past[r] = past;
    to->sine[r] = turn.sine;
    to->cosine[r] = turn.cosine;
}

/* What the exponent of a key's feature is worth. Above c are only keys that nobody sees. */
__device__ static inline ls_real exponential_of(const facts &of, int i, ls_real exponent)
{
    return ls_exp(exponent - of.past[i] > 0 ? 0 : exponent - of.past[i]);
}

/* N times four numbers that features are made of, from f on, of the strip's rows fill::row(n); 0 where there are none:
 * of r, or, where all = F, of those and then the same ones again. */
template <int W>
__device__ static inline void read_raw(const linear &x, const features &y, const strip &s, const facts &of, int f,
                                       int all, ls_four (&z)[filling<W>::EACH])
{
    typedef filling<W> fill;
    const int made = y.act == LS_LINEAR_MADE, last = most(0, s.exist - 1);
    const ls_real *first = made ? y.made + s.R * x.r : row_to_read(x, s, y.rows, 0);
    const int64_t step = made ? x.r : y.rows.st;
    const auto column = [&](int g) { return g < x.r ? g : g - x.r; };
    if (y.fours && (all == x.r || x.r % 4 == 0)) {
#pragma unroll
        for (int n = 0; n < fill::EACH; n++)
            z[n] = ls_four_at(first + least(fill::row(n), last) * step + (f < all ? column(f) : 0));
#pragma unroll
        for (int n = 0; n < fill::EACH; n++)
            if (f >= all || of.by[fill::row(n)] == 0) z[n] = {};
        return;
    }
#pragma unroll
    for (int n = 0; n < fill::EACH; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
            z[n].v[k] =
                f + k < all && of.by[fill::row(n)] != 0 ? first[least(fill::row(n), last) * step + column(f + k)] : 0;
}

/* The features of load_features, which has a choice of widths: of what is narrow threads would find nothing. */
template <class M, int SEEN, int W>
__device__ static inline void load_some_features(const linear &x, const features &y, const strip &s, const facts &of,
                                                 int f0, int turned, typename M::number *to)
{
    typedef filling<W> fill;
    const int turns = turned && x.turns, all = turned ? x.F : x.r, f = f0 + fill::column();
    const int elu = y.act == LS_LINEAR_ONE_PLUS_ELU;
    const int exponentials = x.exponentials - f; /* of the four; what turns has none */
    ls_four z[fill::EACH];
    read_raw<W>(x, y, s, of, f, all, z);
    const auto each = [&](auto made) {
#pragma unroll
        for (int n = 0; n < fill::EACH; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) z[n].v[k] = made(z[n].v[k], fill::row(n), k);
    };
    if (elu || (SEEN == OF_KEYS && x.exponentials > 0))
        each([&](ls_real raw, int r, int k) {
            const int exponent = SEEN == OF_KEYS && k < exponentials;
            const ls_real shifted = exponent ? raw - of.past[r] : raw;
            const ls_real e = ls_exp(shifted > 0 ? 0 : shifted); /* above c are only keys that nobody sees */
            return exponent ? e : !elu ? raw : f + k >= all ? 0 : raw > 0 ? 1 + raw : e;
        });
    else if (y.act == LS_LINEAR_RELU)
        each([](ls_real raw, int, int) { return raw > 0 ? raw : 0; });
    if (SEEN == OF_QUERIES && x.exponentials > 0)
        each([&](ls_real a, int r, int k) { return k < exponentials ? of.past[r] * a : a; });
    if (turns) each([&](ls_real a, int r, int k) { return a * (f + k < x.r ? of.sine[r] : of.cosine[r]); });
    each([&](ls_real a, int r, int) { return a * of.by[r]; });
    fill::template tile<M>(z, whole<M>(all - f0), to);
}

/* A tile = features [f0, f0 + SIDE) of the strip's rows, which SEEN says are queries' or keys'; turned: of F, otherwise
 * of r. */
template <class M, int SEEN>
__device__ static void load_features(const linear &x, const features &y, const strip &s, const facts &of, int f0,
                                     int turned, typename M::number *to)
{
    if ((turned ? x.F : x.r) - f0 > SIDE / 2)
        load_some_features<M, SEEN, SIDE>(x, y, s, of, f0, turned, to);
    else
        load_some_features<M, SEEN, SIDE / 2>(x, y, s, of, f0, turned, to);
}

/* Gradients g of features z, those [f, f + N) of row i, which the strip has: to `gradient`; those that nobody has made
 * go on to the row, and are added to it where `add` is not 0. */
template <int N>
__device__ static inline void put_features(const linear &x, const features &y, const strip &s, int i, int f, int add,
                                           const ls_few<N> &z, ls_few<N> g)
{
    if (y.act == LS_LINEAR_MADE) {
        ls_write_some<N>(g, y.gradient + (s.R + i) * x.r + f, x.r - f, y.fours);
        return;
    }
    if (s.at.t + i >= x.s.rows) return;
    ls_real *to = row_in(s, y.drows, i) + f;
    ls_few<N> before = {};
    if (add) before = ls_read_some<N>(to, x.r - f, y.dfours);
    for (int k = 0; k < N; k++) g.v[k] = before.v[k] + ls_linear_act_back_from(y.act, z.v[k], g.v[k]);
    ls_write_some<N>(g, to, x.r - f, y.dfours);
}

/* The same where features are not at hand, 0 where the row is not there. */
template <int N>
__device__ static inline void put_gradients(const linear &x, const features &y, const strip &s, const facts &of, int i,
                                            int f, int add, ls_few<N> g)
{
    if (f >= x.r || i >= s.count) return;
    const int there = of.by[i] != 0;
    ls_few<N> z = {};
    if (!there) g = {};
    if (there && y.act != LS_LINEAR_MADE) {
        z = ls_read_some<N>(row_in(s, y.rows, i) + f, x.r - f, y.fours);
        for (int k = 0; k < N; k++) z.v[k] = ls_linear_act(y.act, z.v[k]);
    }
    put_features(x, y, s, i, f, add, z, g);
}
} // namespace ls_linear

#endif
