/* What the files of linear attention share, linear.c, linear_pairs.c, linear_causal.c, and nobody else: how rows are
 * walked through, features and states. The theory and the letters are linear.c's. */
#ifndef LS_LINEAR_ROWS_H
#define LS_LINEAR_ROWS_H

#include "linear.h"

#include "gemm.h"
#include "tile.h"

enum { ROWS = LS_LINEAR_ROWS, CAUSAL_ROWS = LS_LINEAR_CAUSAL_ROWS, BLOCK = 256 };
enum { SHORT = LS_LINEAR_SHORT, RISE = LS_LINEAR_RISE };
enum { PART = 2048 }; /* reals of a state that grow at a time, in a core's first cache */
enum { QUERIES, KEYS, TURNED, STAGE, WEIGHTS, STATE, RUNNING, DOUBLES, SMALL, TRACE, ALL_WORK }; /* work[] */
enum { STATES, ALL_SAVED };                                                                      /* saved[] */
_Static_assert((int)ALL_WORK <= (int)LS_LINEAR_WORK, "work[] of linear attention overlaps that of its mechanism");
_Static_assert((int)ALL_SAVED <= (int)LS_LINEAR_SAVED, "saved[] of linear attention overlaps that of its mechanism");
_Static_assert((int)SHORT <= (int)CAUSAL_ROWS, "a short sequence of keys is one chunk");
_Static_assert(BLOCK % ROWS == 0 && BLOCK % CAUSAL_ROWS == 0, "a block is whole chunks");

/* Tensors whose rows are staged; OUT is the output, or in backward dv. */
enum { Q, K, V, DOUT, OUT, DQ, DK, STAGED };

/* Everything a kernel works with. Where ω = 0 the turned features are the features themselves. */
typedef struct linear {
    ls_pass *p;
    const ls_feature_map *map;
    int64_t r, F, d, exponentials;
    double turn, floor;
    ls_real *a, *da, *b, *db;                  /* (n,r) */
    ls_real *A, *dA, *B, *dB;                  /* (n,F); dA and dB are the same memory where ω ≠ 0 */
    ls_real *stage[STAGED];                    /* (heads,block,d) */
    int64_t heads, block;                      /* heads and rows of the stage */
    ls_real *q, *k, *v, *dout, *out, *dq, *dk; /* (n,d) the present chunk on the stage */
    ls_real *w, *dw;                           /* (n,n) */
    /* States are (F,d), then (F). One that grows from chunk to chunk is a pair: what is rounded off is kept beside it,
     * and taken into account next time (Kahan's sum). */
    ls_real *S, *z;                           /* what products use: `own`, or one that grows */
    ls_real *sum, *rest;                      /* what grows; the amount by which it is too large, or NULL: it grows
                                               * within a block alone, and lies as (d,F) */
    ls_real *own, *turned_z;                  /* a state that is not a head's; (r) */
    ls_real *all_sums, *part;                 /* (H,2) pairs of all heads; what a state grows by, PART or (F) */
    double *step;                             /* (n,2) sin kω, cos kω */
    ls_real *top, *c, *inverse, *delta;       /* (n) */
    ls_real *flows;                           /* (n) 0 where the floor is taken */
    ls_real *sine, *cosine;                   /* (n) */
    ls_real *apart;                           /* (2n) cos (n-1)ω, .., cos 0, then zeros: what is later is not seen */
    ls_real *seen_from;                       /* (H + 1) c that a running state is seen from */
    ls_real *all_c, *all_inverse, *all_delta; /* (block) of the head under way, from sweep to sweep; and (block,r): */
    ls_real *all_db;
} linear;

static const ls_feature_map *map_of(const ls_pass *p)
{
    return p->kit;
}

static inline int64_t exponentials_of(const ls_pass *p)
{
    const ls_feature_map *map = map_of(p);
    return map->exponentials == NULL ? 0 : map->exponentials(p);
}

static inline int64_t turned(const ls_pass *p)
{
    const ls_feature_map *map = map_of(p);
    return (map->turn != NULL ? 2 : 1) * map->features(p);
}

enum { SMALLS = 8 };

/* Rows of a block. CS: so many that the states at their starts are never more than half of the values. */
static inline int64_t stage_rows(const ls_pass *p)
{
    const int64_t blocks = p->pattern == LS_CS ? (2 * turned(p) + BLOCK - 1) / BLOCK : 1;
    return ls_min(ls_max(blocks, 1) * BLOCK, ls_max(p->T, p->S));
}

/* Heads of a block, side by side in memory: a stretch of SIDE_BY_SIDE reals is read about as fast as a whole row, and
 * the stage stays in a core's own cache. */
enum { SIDE_BY_SIDE = 256 };
static inline int64_t stage_heads(const ls_pass *p)
{
    return ls_min(ls_max(SIDE_BY_SIDE / p->d, 1), p->H);
}

static inline int64_t stage_reals(const ls_pass *p)
{
    return stage_heads(p) * stage_rows(p) * p->d;
}

/* CS: a state as it is kept, [c][S (F,d)][z (F)]. */
static inline int64_t kept_reals(const ls_pass *p)
{
    return 1 + turned(p) * (p->d + 1);
}

static inline int64_t blocks_of(const ls_pass *p)
{
    return p->T == 0 ? 0 : (p->T - 1) / stage_rows(p) + 1;
}

static inline int64_t part_reals(int64_t F, int64_t d)
{
    return ls_max(PART, ls_max(F, d));
}

static inline int64_t state_reals(const linear *x)
{
    return x->F * (x->d + 1);
}

static inline linear begin(ls_pass *p)
{
    const ls_feature_map *map = map_of(p);
    linear x = {.p = p, .map = map, .r = map->features(p), .F = turned(p), .d = p->d};
    const int turns = map->turn != NULL;
    x.exponentials = exponentials_of(p);
    x.turn = turns ? map->turn(p) : 0, x.floor = map->floor(p);
    x.a = p->work[QUERIES], x.da = x.a + ROWS * x.r;
    x.b = p->work[KEYS], x.db = x.b + ROWS * x.r;
    x.A = turns ? p->work[TURNED] : x.a;
    x.B = turns ? x.A + ROWS * x.F : x.b;
    x.dA = turns ? x.B + ROWS * x.F : x.da;
    x.dB = turns ? x.dA : x.db;
    x.heads = stage_heads(p), x.block = stage_rows(p);
    for (int i = 0; i < (p->backward ? STAGED : OUT + 1); i++) x.stage[i] = p->work[STAGE] + i * stage_reals(p);
    x.w = p->work[WEIGHTS], x.dw = x.w + CAUSAL_ROWS * CAUSAL_ROWS;
    x.own = p->work[STATE], x.turned_z = x.own + state_reals(&x);
    x.part = p->work[RUNNING], x.all_sums = x.part + part_reals(x.F, x.d);
    x.step = (double *)(void *)p->work[DOUBLES];
    ls_real **const small[SMALLS] = {&x.top, &x.c, &x.inverse, &x.delta, &x.flows, &x.sine, &x.cosine, &x.apart};
    for (int i = 0; i < SMALLS; i++) *small[i] = p->work[SMALL] + i * ROWS;
    x.seen_from = p->work[SMALL] + (SMALLS + 1) * ROWS; /* apart, the last, has twice the room */
    x.all_c = p->work[TRACE], x.all_inverse = x.all_c + x.block, x.all_delta = x.all_inverse + x.block;
    x.all_db = x.all_delta + x.block;
    for (int64_t k = 0; turns && k < ROWS; k++) {
        x.step[2 * k] = sin(x.turn * (double)k), x.step[2 * k + 1] = cos(x.turn * (double)k);
    }
    for (int64_t k = 0; k < ROWS; k++) {
        x.apart[ROWS - 1 - k] = turns ? (ls_real)x.step[2 * k + 1] : 1;
        x.apart[ROWS + k] = 0;
    }
    return x;
}

/* ------------------------------------------------------------------------------------------------ walking */

/* A kernel walks through the rows of one batch row: blocks of rows, in each some heads after others, of each chunk by
 * chunk. So tensors are read and written row by row, as they lie in memory, and products find the rows of a head side
 * by side. */
typedef struct walk {
    int64_t rows, step;     /* all of them, of a chunk */
    unsigned reads, writes; /* sets of staged tensors */
    int adds, backward;     /* writes add; from the last block to the first */
} walk;
enum {
    HAS_Q = 1 << Q,
    HAS_K = 1 << K,
    HAS_V = 1 << V,
    HAS_DOUT = 1 << DOUT,
    HAS_OUT = 1 << OUT,
    HAS_DQ = 1 << DQ,
    HAS_DK = 1 << DK
};

/* Rows [t, t + n) of (b,h), in the block of rows [lo, hi) of heads [first, last). */
typedef struct chunk {
    int64_t b, h, t, n, lo, hi, first, last;
} chunk;

/* A block's row of head h on the stage. */
static inline ls_real *staged(const linear *x, const chunk *k, int tensor, int64_t h, int64_t t)
{
    return x->stage[tensor] + ((h - k->first) * x->block + t - k->lo) * x->d;
}

static inline int of_keys(int tensor)
{
    return tensor == K || tensor == V || tensor == DK;
}

static inline ls_view view_of(const ls_pass *p, int tensor)
{
    const ls_view out = p->backward ? p->own.dv : p->out;
    const ls_view view[STAGED] = {p->q, p->own.k, p->own.v, p->dout, out, p->dq, p->own.dk};
    return view[tensor];
}

/* A block of a tensor to the stage, 0 where padded. */
static inline void read_block(const linear *x, const chunk *k, int tensor)
{
    const ls_pass *p = x->p;
    const ls_view v = view_of(p, tensor);
    const uint8_t *pad = of_keys(tensor) ? p->own.pad : p->pad_q;
    const int64_t rows = of_keys(tensor) ? p->S : p->T;
    for (int64_t t = k->lo; t < k->hi; t++)
        for (int64_t h = k->first; h < k->last; h++) {
            ls_real *to = staged(x, k, tensor, h, t);
            if (ls_is_padded(pad, k->b * rows + t))
                ls_zero(to, x->d);
            else
                memcpy(to, ls_row(v, k->b, h, t), (size_t)x->d * sizeof *to);
        }
}

static inline void write_block(const linear *x, const chunk *k, int tensor, int add)
{
    const ls_view v = view_of(x->p, tensor);
    for (int64_t t = k->lo; t < k->hi; t++)
        for (int64_t h = k->first; h < k->last; h++) {
            const ls_real *from = staged(x, k, tensor, h, t);
            ls_real *to = ls_row(v, k->b, h, t);
            if (add)
                ls_axpy(x->d, 1, from, to);
            else
                memcpy(to, from, (size_t)x->d * sizeof *to);
        }
}

/* From one block to the next; 0 after the last. */
static inline int next_block(const linear *x, const walk *w, chunk *k)
{
    for (int i = 0; i < STAGED && k->hi > k->lo; i++)
        if (w->writes >> i & 1) write_block(x, k, i, w->adds);
    if (k->last < x->p->H) {
        k->first = k->last;
    } else {
        if (w->backward ? k->lo == 0 : k->hi == w->rows) return 0;
        k->first = 0;
        if (w->backward) {
            k->hi = k->lo;
            k->lo = (k->hi - 1) / x->block * x->block;
        } else {
            k->lo = k->hi;
            k->hi = ls_min(k->lo + x->block, w->rows);
        }
    }
    k->h = k->first, k->last = ls_min(k->first + x->heads, x->p->H);
    for (int i = 0; i < STAGED; i++)
        if (w->reads >> i & 1) read_block(x, k, i);
    return 1;
}

static inline chunk before_all(const linear *x, const walk *w, int64_t b)
{
    const int64_t at = w->backward ? w->rows : 0;
    return (chunk){.b = b, .h = x->p->H, .lo = at, .hi = at, .first = x->p->H, .last = x->p->H};
}

/* Is it the first of its head in the block? */
static inline int begins(const chunk *k)
{
    return k->t == k->lo;
}

/* The chunk's rows on the stage. */
static inline void stand_at(linear *x, const chunk *k)
{
    ls_real **const rows[STAGED] = {&x->q, &x->k, &x->v, &x->dout, &x->out, &x->dq, &x->dk};
    for (int i = 0; i < STAGED && x->stage[i] != NULL; i++) *rows[i] = staged(x, k, i, k->h, k->t);
}

/* What grows is the state of head h. */
static inline void turn_to(linear *x, int64_t h)
{
    x->sum = x->all_sums + 2 * h * state_reals(x);
    x->rest = x->sum + state_reals(x);
}

/* Products use this state. */
static inline void use(linear *x, ls_real *state)
{
    x->S = state, x->z = state + x->F * x->d;
}

/* To the next chunk; 0 after the last. */
static inline int go_on(linear *x, const walk *w, chunk *k)
{
    if (k->h < x->p->H && k->t + k->n != k->hi) {
        k->t += w->step;
    } else {
        if (++k->h >= k->last && !next_block(x, w, k)) return 0;
        k->t = k->lo;
        turn_to(x, k->h);
    }
    k->n = ls_min(w->step, k->hi - k->t);
    stand_at(x, k);
    return 1;
}

/* ------------------------------------------------------------------------------------------------ rows */

/* a; nothing where padded. */
static inline void load_queries(const linear *x, chunk k)
{
    ls_pass *p = x->p;
    x->map->queries(p, k.h, k.n, x->q, x->a);
    for (int64_t i = 0; p->pad_q != NULL && i < k.n; i++)
        if (p->pad_q[k.b * p->T + k.t + i]) ls_zero(x->a + i * x->r, x->r);
}

/* b (where features are exponentials x, not yet e^(x - c)); nothing where padded. */
static inline void load_keys(const linear *x, chunk k)
{
    ls_pass *p = x->p;
    x->map->keys(p, k.h, k.n, x->k, x->b, x->top);
    for (int64_t j = 0; p->own.pad != NULL && j < k.n; j++) {
        if (!p->own.pad[k.b * p->S + k.t + j]) continue;
        x->top[j] = -INFINITY;
        for (int64_t f = 0; f < x->r; f++) x->b[j * x->r + f] = f < x->exponentials ? -INFINITY : 0;
    }
}

/* Σ x y, exact but for the rounding of double. */
static inline double dot(int64_t n, const ls_real *x, const ls_real *y)
{
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)y[i];
    return s;
}

/* Σ x y and Σ x z in one pass: a row has a few such sums, and each alone would wait for its own additions. */
static inline void two_dots(int64_t n, const ls_real *x, const ls_real *y, const ls_real *z, double *xy, double *xz)
{
    double s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int64_t i = 0; i < n; i++) {
        s += (double)x[i] * (double)y[i];
        t += (double)x[i] * (double)z[i];
    }
    *xy = s, *xz = t;
}

/* Row i of what a denominator was found for: its inverse, and whether anything flows to it. */
static inline void set_inverse(const linear *x, int64_t i, double D)
{
    int flows;
    x->inverse[i] = ls_linear_inverse(D, x->floor, &flows);
    x->flows[i] = (ls_real)flows;
}

/* A query's features may all grow alike and nothing happens: da_i is at right angles to a_i, unless the floor is taken.
 * What rounding has put along a_i is taken out, since short a_i make it large. */
static inline void straighten(const linear *x, int64_t i, int64_t n)
{
    for (; n > 0; i++, n--) {
        const ls_real *a = x->a + i * x->r;
        ls_real *da = x->da + i * x->r;
        double square, along;
        if (x->flows[i] == 0) continue;
        two_dots(x->r, a, a, da, &square, &along);
        if (!(square > 0)) continue;
        const ls_real by = (ls_real)(along / square);
        for (int64_t f = 0; f < x->r; f++) da[f] -= by * a[f];
    }
}

/* dq from da. */
static inline void finish_queries(const linear *x, chunk k)
{
    x->map->queries_backward(x->p, k.h, k.n, x->q, x->da, x->dq);
}

/* dk from db. */
static inline void finish_keys(const linear *x, chunk k)
{
    const uint8_t *pad = x->p->own.pad;
    for (int64_t j = 0; pad != NULL && j < k.n; j++)
        if (pad[k.b * x->p->S + k.t + j]) ls_zero(x->db + j * x->r, x->r);
    x->map->keys_backward(x->p, k.h, k.n, x->k, x->db, x->dk);
}

/* ------------------------------------------------------------------------------------------------ features */

/* Rows [i, i + n) of b, from x to e^(x - c). Above c are only keys that nobody sees: they must not overflow. */
static inline void exponentiate(const linear *x, int64_t i, int64_t n, ls_real c)
{
    const ls_real from = c == -INFINITY ? 0 : c; /* no key yet: every x is -inf */
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        ls_real *b = x->b + k * x->r;
        for (int64_t f = 0; f < x->exponentials; f++) b[f] = ls_exp(b[f] - from > 0 ? 0 : b[f] - from);
    }
}

/* db of e^(x - c) becomes db of x. */
static inline void exponentiate_backward(const linear *x, int64_t i, int64_t n)
{
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        ls_real *db = x->db + k * x->r;
        const ls_real *b = x->b + k * x->r;
        for (int64_t f = 0; f < x->exponentials; f++) db[f] *= b[f];
    }
}

/* Multiplies the features of exponentials of rows [i, i + n) by ρ. */
static inline void make_up(const linear *x, int64_t i, int64_t n, ls_real *rows)
{
    const ls_real last = x->c[i + n - 1];
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        if (x->c[k] == last || x->c[k] == -INFINITY) continue; /* ρ = 1, or no key yet and all is 0 */
        const ls_real rho = ls_exp(last - x->c[k]);
        for (int64_t f = 0; f < x->exponentials; f++) rows[k * x->r + f] *= rho;
    }
}

/* The angles of the n positions from lo on, each from the first by the sine and cosine of a sum. */
static inline void set_angles(const linear *x, int64_t lo, int64_t n)
{
    if (x->F == x->r) return;
    const double s = sin(x->turn * (double)(lo + 1)), c = cos(x->turn * (double)(lo + 1));
    for (int64_t k = 0; k < n; k++) {
        x->sine[k] = (ls_real)(s * x->step[2 * k + 1] + c * x->step[2 * k]);
        x->cosine[k] = (ls_real)(c * x->step[2 * k + 1] - s * x->step[2 * k]);
    }
}

/* Rows [i, i + n): features (n,r) to turned features (n,F). */
static inline void turn(const linear *x, int64_t i, int64_t n, const ls_real *from, ls_real *to)
{
    const int64_t r = x->r;
    for (int64_t k = i; k < i + n && from != to; k++) {
        const ls_real s = x->sine[k], c = x->cosine[k], *row = from + k * r;
        ls_real *sines = to + k * x->F, *cosines = sines + r;
        for (int64_t f = 0; f < r; f++) sines[f] = s * row[f];
        for (int64_t f = 0; f < r; f++) cosines[f] = c * row[f];
    }
}

/* kept: what dfrom is multiplied by before it gets its share, 0 or 1. */
static inline void turn_backward(const linear *x, int64_t i, int64_t n, const ls_real *dto, int kept, ls_real *dfrom)
{
    const int64_t r = x->r;
    for (int64_t k = i; k < i + n && dfrom != dto; k++) {
        const ls_real s = x->sine[k], c = x->cosine[k], *sines = dto + k * x->F, *cosines = sines + r;
        ls_real *to = dfrom + k * r;
        for (int64_t f = 0; f < r; f++) to[f] = (kept ? to[f] : 0) + s * sines[f] + c * cosines[f];
    }
}

/* ------------------------------------------------------------------------------------------------ states */

static inline ls_monoid summary(const ls_pass *p)
{
    const int64_t F = turned(p), e = exponentials_of(p), row = p->d + 1;
    return (ls_monoid){.groups = p->B * p->H, .has_max = e > 0, .scaled = e * row, .plain = (F - e) * row};
}

/* The state of (b,h) on its way. */
static inline ls_real *element(const linear *x, ls_real *summaries, int64_t b, int64_t h)
{
    return summaries + (b * x->p->H + h) * ((x->exponentials > 0) + x->F * (x->d + 1));
}

/* state := what arrived. Returns its c. */
static inline ls_real unpack(const linear *x, const ls_real *element, ls_real *state)
{
    const ls_real *row = element + (x->exponentials > 0);
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        memcpy(state + f * x->d, row, (size_t)x->d * sizeof *row);
        state[x->F * x->d + f] = row[x->d];
    }
    return x->exponentials > 0 ? element[0] : 0;
}

/* The sum of head h goes on its way, with c. */
static inline void pack(linear *x, int64_t h, ls_real c, ls_real *element)
{
    ls_real *row = element + (x->exponentials > 0);
    turn_to(x, h);
    if (x->exponentials > 0) element[0] = c;
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        memcpy(row, x->sum + f * x->d, (size_t)x->d * sizeof *row);
        row[x->d] = x->sum[x->F * x->d + f];
    }
}

/* Of all heads. */
static inline void clear_sums(const linear *x)
{
    ls_zero(x->all_sums, 2 * x->p->H * state_reals(x));
    for (int64_t h = 0; h < x->p->H; h++) x->seen_from[h] = -INFINITY;
}

/* n neighbours of a sum, x - rest in truth, times a factor. */
static inline void scale_sums(int64_t n, double factor, ls_real *x, ls_real *rest)
{
    for (int64_t i = 0; i < n; i++) {
        const double y = ((double)x[i] - (rest != NULL ? (double)rest[i] : 0)) * factor;
        x[i] = (ls_real)y;
        if (rest != NULL) rest[i] = (ls_real)((double)x[i] - y);
    }
}

/* What features of exponentials have in the sum. */
static inline void scale_sum(const linear *x, double factor)
{
    const int64_t e = x->exponentials, F = x->F, d = x->d;
    ls_real *z = x->sum + F * d, *rest_z = x->rest != NULL ? x->rest + F * d : NULL;
    if (x->rest != NULL) scale_sums(e * d, factor, x->sum, x->rest);
    for (int64_t i = 0; i < d && x->rest == NULL; i++) scale_sums(e, factor, x->sum + i * F, NULL);
    scale_sums(e, factor, z, rest_z);
}

/* The sum of a head, seen from c = `to` from now on. */
static inline void see_from(linear *x, int64_t h, ls_real to)
{
    if (x->exponentials > 0 && x->seen_from[h] != to) scale_sum(x, ls_linear_change(x->seen_from[h], to));
    x->seen_from[h] = to;
}

/* The same for the gradient of a state, which goes the other way. */
static inline void see_gradient_from(linear *x, int64_t h, ls_real to)
{
    if (x->exponentials > 0 && x->seen_from[h] != to) scale_sum(x, ls_linear_change(to, x->seen_from[h]));
    x->seen_from[h] = to;
}

/* n neighbours of a sum grow by `by`. */
static inline void add_to_sum(int64_t n, const ls_real *restrict by, ls_real *restrict x, ls_real *restrict rest)
{
    for (int64_t i = 0; i < n; i++) {
        const ls_real more = by[i] - rest[i], grown = x[i] + more;
        rest[i] = (grown - x[i]) - more;
        x[i] = grown;
    }
}

/* The sum's S += Σ_i rows_i matrix_iᵀ, z += Σ_i weight_i rows_i; rows (n,F), matrix (n,d). weight NULL: 1. */
static inline void gather(const linear *x, int64_t n, const ls_real *rows, const ls_real *matrix, const ls_real *weight)
{
    const int64_t F = x->F, d = x->d, most = ls_max(PART / d, 1);
    ls_real *z = x->sum + F * d, *more = x->rest != NULL ? x->part : z;
    if (x->rest == NULL) ls_gemm(1, 0, d, F, n, 1, matrix, d, rows, F, 1, x->sum, F);
    for (int64_t f = 0; f < F && x->rest != NULL; f += most) {
        const int64_t some = ls_min(most, F - f);
        ls_gemm(1, 0, some, d, n, 1, rows + f, F, matrix, d, 0, x->part, d);
        add_to_sum(some * d, x->part, x->sum + f * d, x->rest + f * d);
    }
    if (x->rest != NULL) ls_zero(more, F);
    for (int64_t i = 0; i < n; i++) ls_axpy(F, weight == NULL ? 1 : weight[i], rows + i * F, more);
    if (x->rest != NULL) add_to_sum(F, more, z, x->rest + F * d);
}

/* What the keys of rows [i, i + n) get from S, z, which are gradients here: db, and dv. kept: 0, or 1 to add. */
static inline void take_gradients(const linear *x, int64_t i, int64_t n, int kept)
{
    const int64_t F = x->F, d = x->d;
    ls_gemm(0, 0, n, d, F, 1, x->B + i * F, F, x->S, d, kept, x->out + i * d, d);
    ls_gemm(0, 1, n, F, d, 1, x->v + i * d, d, x->S, d, x->dB == x->db ? kept : 0, x->dB + i * F, F);
    for (int64_t j = i; j < i + n; j++) ls_axpy(F, 1, x->z, x->dB + j * F);
    turn_backward(x, i, n, x->dB, kept, x->db);
    exponentiate_backward(x, i, n);
}

static inline void scale_rows(int64_t n, int64_t width, const ls_real *by, ls_real *rows)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = 0; e < width; e++) rows[i * width + e] *= by[i];
}

/* The sum, a gradient, gets what queries owe it: rows of A were divided by D. */
static inline void give_gradients(const linear *x, int64_t i, int64_t n)
{
    for (int64_t k = i; k < i + n; k++) x->delta[k] = -x->delta[k];
    gather(x, n, x->A + i * x->F, x->dout + i * x->d, x->delta + i);
}

/* ------------------------------------------------------------------------------------------------ pairs */

/* A row of w, which holds a·b: w_ij = a_i·b_j apart_j, 0 for keys that are not seen. Returns their sum. */
static inline double weigh(int64_t n, const ls_real *apart, ls_real *w)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += (double)(w[j] *= apart[j]);
    return sum;
}

/* The same, and Σ w dw. */
static inline double weigh_and_dot(int64_t n, const ls_real *apart, ls_real *restrict w, const ls_real *restrict dw,
                                   double *cross)
{
    double sum = 0, s = 0;
#pragma omp simd reduction(+ : sum, s)
    for (int64_t j = 0; j < n; j++) {
        w[j] *= apart[j];
        sum += (double)w[j];
        s += (double)w[j] * (double)dw[j];
    }
    *cross = s;
    return sum;
}

/* Rows of w and dw, which hold w and do·v: w := w / D, dw := the gradient of a·b. */
static inline void weigh_backward(int64_t n, const ls_real *apart, ls_real inverse, ls_real delta, ls_real *restrict w,
                                  ls_real *restrict dw)
{
    for (int64_t j = 0; j < n; j++) {
        dw[j] = inverse * (dw[j] - delta) * apart[j];
        w[j] *= inverse;
    }
}

/* Pieces are the rows whose c lies between the same multiples of RISE: found alike from either end. */
static inline int in_one_piece(ls_real c, ls_real later)
{
    return c == later || floor((double)c / RISE) == floor((double)later / RISE);
}

static inline int64_t end_of_piece(const linear *x, int64_t i, int64_t n)
{
    int64_t end = i + 1;
    while (end < n && in_one_piece(x->c[end - 1], x->c[end])) end++;
    return end;
}

static inline int64_t start_of_piece(const linear *x, int64_t end)
{
    int64_t i = end - 1;
    while (i > 0 && in_one_piece(x->c[i - 1], x->c[i])) i--;
    return i;
}

/* ------------------------------------------------------------------------------------------------ kernels */

/* Short sequences of keys, in linear_pairs.c. */
int64_t ls_linear_shared_piece(const ls_pass *p, int64_t lo, int64_t n);
ls_status ls_linear_share(ls_pass *p, int phase);
ls_status ls_linear_share_backward(ls_pass *p, int phase);
ls_status ls_linear_pairs(ls_pass *p, int phase);
ls_status ls_linear_pairs_backward(ls_pass *p, int phase);

/* Causal, in linear_causal.c. */
ls_status ls_linear_causal_forward(ls_pass *p, int phase);
ls_status ls_linear_causal_backward(ls_pass *p, int phase);

#endif
