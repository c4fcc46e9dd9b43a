/* Linear attention by feature maps (Katharopoulos et al., 2020), chunk by chunk. Formulas: linear.h.
 *
 * With ω ≠ 0 features turn: A_i = [a_i sin ω(i+1), a_i cos ω(i+1)], B_j likewise, F = 2r of them; with ω = 0 A = a, F =
 * r. So w_ij = A_i·B_j, and the state of a set of keys is, for each (b,h), S = Σ_j B_j v_jᵀ (F,d) and z = Σ_j B_j (F):
 *
 *   o_i = Sᵀ A_i / D_i,   D_i = max(A_i·z, floor)
 *
 * CS: within a chunk w_ij are taken as they are, earlier chunks by their state, which then grows by the chunk.
 * On its way a state is [c][S_f, z_f for each f], c only where features are exponentials.
 *
 * Backward, with δ_i = do_i·o_i (0 where the floor is taken, since nothing flows to D_i then):
 *
 *   dw_ij = (do_i·v_j - δ_i) / D_i,   dA_i = (S do_i - δ_i z) / D_i,   dS = Σ_i A_i do_iᵀ / D_i,   dz = -Σ_i A_i δ_i /
 * D_i dB_j = dS v_j + dz,   dv_j = dSᵀ B_j
 *
 * CS: forward keeps the state at the start of each block of rows. Backward goes from the last block to the first, and
 * through each twice: forward in time, all that is within chunks and what queries take from the past (the states are
 * made again from that at the start); backward in time, what keys owe to the future. So rows are read once.
 *
 * Where a query sees few keys, do_i·v_j - δ_i is a small difference of large numbers, and 1 / D_i may be large.
 * Therefore δ_i is summed in double from those products do_i·v_j that it is taken from: with one key the difference is
 * 0, as it has to be. Sums cannot do that once they were rounded, so a short sequence of keys goes to all ranks as it
 * is.
 *
 * Exponentials: c_i, the maximum so far, rises along the rows. A chunk is cut into pieces in which it hardly does. In a
 * piece keys are taken from c at its end, and a query's features make up for it by the factor ρ_i = e^(c_end - c_i). */
#include "linear.h"

#include "gemm.h"
#include "tile.h"

enum { ROWS = LS_LINEAR_ROWS, CAUSAL_ROWS = LS_LINEAR_CAUSAL_ROWS, BLOCK = 256 };
enum { SHORT = LS_LINEAR_SHORT, RISE = LS_LINEAR_RISE };
enum { QUERIES, KEYS, TURNED, STAGE, WEIGHTS, STATE, DOUBLES, SMALL, TRACE, ALL_WORK }; /* work[] */
enum { STATES, ALL_SAVED };                                                             /* saved[] */
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
    ls_real *stage[STAGED];                    /* (H,block,d) */
    int64_t block;                             /* rows of the stage */
    ls_real *q, *k, *v, *dout, *out, *dq, *dk; /* (n,d) the present chunk on the stage */
    ls_real *w, *dw;                           /* (n,n) */
    ls_real *S, *z, *change, *sum;             /* (F,d), (F): the state as products want it; what a chunk adds to it */
    double *running, *all_running;             /* (F,d) then (F), of each head: the state as it is summed. CS backward:
                                                * the gradients of states, and last the state of the head under way */
    int rounded;                               /* S, z are the running state */
    double *step;                              /* (n,2) sin kω, cos kω */
    ls_real *top, *c, *inverse, *delta;        /* (n) */
    ls_real *flows;                            /* (n) 0 where the floor is taken */
    ls_real *sine, *cosine;                    /* (n) */
    ls_real *apart;                            /* (2n) cos (n-1)ω, .., cos 0, then zeros: what is later is not seen */
    ls_real *seen_from;                        /* (H + 1) c that a running state is seen from */
    ls_real *all_c, *all_inverse, *all_delta;  /* (block) of the head under way, from sweep to sweep; and (block,r): */
    ls_real *all_db;
} linear;

static const ls_feature_map *map_of(const ls_pass *p)
{
    return p->kit;
}

static int64_t exponentials_of(const ls_pass *p)
{
    const ls_feature_map *map = map_of(p);
    return map->exponentials == NULL ? 0 : map->exponentials(p);
}

static int64_t turned(const ls_pass *p)
{
    const ls_feature_map *map = map_of(p);
    return (map->turn != NULL ? 2 : 1) * map->features(p);
}

enum { SMALLS = 8 };

/* Rows of a block. CS: so many that the states at their starts are never more than half of the values. */
static int64_t stage_rows(const ls_pass *p)
{
    const int64_t blocks = p->pattern == LS_CS ? (2 * turned(p) + BLOCK - 1) / BLOCK : 1;
    return ls_min(ls_max(blocks, 1) * BLOCK, ls_max(p->T, p->S));
}

/* CS: a state as it is kept, [c][S (F,d)][z (F)]. */
static int64_t kept_reals(const ls_pass *p)
{
    return 1 + turned(p) * (p->d + 1);
}

static int64_t blocks_of(const ls_pass *p)
{
    return p->T == 0 ? 0 : (p->T - 1) / stage_rows(p) + 1;
}

void ls_linear_plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t r = map_of(p)->features(p), F = turned(p), d = p->d;
    const int causal = p->pattern == LS_CS && p->all_keys > SHORT && !p->step, sweeps = causal && p->backward;
    p->saved[STATES] = ls_take(saved, causal ? p->B * blocks_of(p) * p->H * kept_reals(p) : 0);
    p->work[QUERIES] = ls_take(work, 2 * ROWS * r);
    p->work[KEYS] = ls_take(work, 2 * ROWS * r);
    p->work[TURNED] = ls_take(work, F > r ? 3 * ROWS * F : 0);
    p->work[STAGE] = ls_take(work, (p->backward ? STAGED : OUT + 1) * p->H * stage_rows(p) * d);
    p->work[WEIGHTS] = ls_take(work, 2 * CAUSAL_ROWS * CAUSAL_ROWS);
    p->work[STATE] = ls_take(work, 2 * F * (d + 1));
    p->work[DOUBLES] = ls_arena_take(work, (size_t)((p->H + sweeps) * F * (d + 1) + 2 * ROWS) * sizeof(double));
    p->work[SMALL] = ls_take(work, (SMALLS + 1) * ROWS + p->H + 1);
    p->work[TRACE] = ls_take(work, sweeps ? stage_rows(p) * (3 + r) : 0);
}

static linear begin(ls_pass *p)
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
    x.block = stage_rows(p);
    for (int i = 0; i < (p->backward ? STAGED : OUT + 1); i++) x.stage[i] = p->work[STAGE] + i * p->H * x.block * x.d;
    x.w = p->work[WEIGHTS], x.dw = x.w + CAUSAL_ROWS * CAUSAL_ROWS;
    x.S = p->work[STATE], x.z = x.S + x.F * x.d, x.change = x.z + x.F, x.sum = x.change + x.F * x.d;
    x.step = (double *)(void *)p->work[DOUBLES], x.all_running = x.step + 2 * ROWS;
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

/* A kernel walks through the rows of one batch row: blocks of rows, in each all heads, of each chunk by chunk. So
 * tensors are read and written row by row, as they lie in memory, and products find the rows of a head side by side. */
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

/* Rows [t, t + n) of (b,h), in the block [lo, hi). */
typedef struct chunk {
    int64_t b, h, t, n, lo, hi;
} chunk;

static int of_keys(int tensor)
{
    return tensor == K || tensor == V || tensor == DK;
}

static ls_view view_of(const ls_pass *p, int tensor)
{
    const ls_view out = p->backward ? p->own.dv : p->out;
    const ls_view view[STAGED] = {p->q, p->own.k, p->own.v, p->dout, out, p->dq, p->own.dk};
    return view[tensor];
}

/* A block of a tensor to the stage, 0 where padded. */
static void read_block(const linear *x, const chunk *k, int tensor)
{
    const ls_pass *p = x->p;
    const ls_view v = view_of(p, tensor);
    const uint8_t *pad = of_keys(tensor) ? p->own.pad : p->pad_q;
    const int64_t rows = of_keys(tensor) ? p->S : p->T;
    for (int64_t t = k->lo; t < k->hi; t++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_real *to = x->stage[tensor] + (h * x->block + t - k->lo) * x->d;
            if (ls_is_padded(pad, k->b * rows + t))
                ls_zero(to, x->d);
            else
                memcpy(to, ls_row(v, k->b, h, t), (size_t)x->d * sizeof *to);
        }
}

static void write_block(const linear *x, const chunk *k, int tensor, int add)
{
    const ls_view v = view_of(x->p, tensor);
    for (int64_t t = k->lo; t < k->hi; t++)
        for (int64_t h = 0; h < x->p->H; h++) {
            const ls_real *from = x->stage[tensor] + (h * x->block + t - k->lo) * x->d;
            ls_real *to = ls_row(v, k->b, h, t);
            if (add)
                ls_axpy(x->d, 1, from, to);
            else
                memcpy(to, from, (size_t)x->d * sizeof *to);
        }
}

/* From one block to the next; 0 after the last. */
static int next_block(const linear *x, const walk *w, chunk *k)
{
    for (int i = 0; i < STAGED && k->hi > k->lo; i++)
        if (w->writes >> i & 1) write_block(x, k, i, w->adds);
    if (w->backward ? k->lo == 0 : k->hi == w->rows) return 0;
    if (w->backward) {
        k->hi = k->lo;
        k->lo = (k->hi - 1) / x->block * x->block;
    } else {
        k->lo = k->hi;
        k->hi = ls_min(k->lo + x->block, w->rows);
    }
    for (int i = 0; i < STAGED; i++)
        if (w->reads >> i & 1) read_block(x, k, i);
    return 1;
}

static chunk before_all(const linear *x, const walk *w, int64_t b)
{
    const int64_t at = w->backward ? w->rows : 0;
    return (chunk){.b = b, .h = x->p->H, .lo = at, .hi = at};
}

/* Is it the first of its head in the block? */
static int begins(const chunk *k)
{
    return k->t == k->lo;
}

/* The chunk's rows on the stage. */
static void stand_at(linear *x, const chunk *k)
{
    ls_real **const rows[STAGED] = {&x->q, &x->k, &x->v, &x->dout, &x->out, &x->dq, &x->dk};
    for (int i = 0; i < STAGED && x->stage[i] != NULL; i++)
        *rows[i] = x->stage[i] + (k->h * x->block + k->t - k->lo) * x->d;
}

/* The running state is that of head h. */
static void turn_to(linear *x, int64_t h)
{
    x->running = x->all_running + h * x->F * (x->d + 1);
    x->rounded = 0;
}

/* To the next chunk; 0 after the last. */
static int go_on(linear *x, const walk *w, chunk *k)
{
    if (k->h < x->p->H && k->t + k->n != k->hi) {
        k->t += w->step;
    } else {
        if (++k->h >= x->p->H) {
            if (!next_block(x, w, k)) return 0;
            k->h = 0;
        }
        k->t = k->lo;
        turn_to(x, k->h);
    }
    k->n = ls_min(w->step, k->hi - k->t);
    stand_at(x, k);
    return 1;
}

/* ------------------------------------------------------------------------------------------------ rows */

/* a; nothing where padded. */
static void load_queries(const linear *x, chunk k)
{
    ls_pass *p = x->p;
    x->map->queries(p, k.h, k.n, x->q, x->a);
    for (int64_t i = 0; p->pad_q != NULL && i < k.n; i++)
        if (p->pad_q[k.b * p->T + k.t + i]) ls_zero(x->a + i * x->r, x->r);
}

/* b (where features are exponentials x, not yet e^(x - c)); nothing where padded. */
static void load_keys(const linear *x, chunk k)
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
static double dot(int64_t n, const ls_real *x, const ls_real *y)
{
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)y[i];
    return s;
}

/* Row i of what a denominator was found for: its inverse, and whether anything flows to it. */
static void set_inverse(const linear *x, int64_t i, double D)
{
    int flows;
    x->inverse[i] = ls_linear_inverse(D, x->floor, &flows);
    x->flows[i] = (ls_real)flows;
}

/* A query's features may all grow alike and nothing happens: da_i is at right angles to a_i, unless the floor is taken.
 * What rounding has put along a_i is taken out, since short a_i make it large. */
static void straighten(const linear *x, int64_t i, int64_t n)
{
    for (; n > 0; i++, n--) {
        const ls_real *a = x->a + i * x->r;
        ls_real *da = x->da + i * x->r;
        const double square = dot(x->r, a, a);
        if (x->flows[i] == 0 || !(square > 0)) continue;
        const double along = dot(x->r, a, da) / square;
        for (int64_t f = 0; f < x->r; f++) da[f] = (ls_real)((double)da[f] - along * (double)a[f]);
    }
}

/* dq from da. */
static void finish_queries(const linear *x, chunk k)
{
    x->map->queries_backward(x->p, k.h, k.n, x->q, x->da, x->dq);
}

/* dk from db. */
static void finish_keys(const linear *x, chunk k)
{
    const uint8_t *pad = x->p->own.pad;
    for (int64_t j = 0; pad != NULL && j < k.n; j++)
        if (pad[k.b * x->p->S + k.t + j]) ls_zero(x->db + j * x->r, x->r);
    x->map->keys_backward(x->p, k.h, k.n, x->k, x->db, x->dk);
}

/* ------------------------------------------------------------------------------------------------ features */

/* Rows [i, i + n) of b, from x to e^(x - c). Above c are only keys that nobody sees: they must not overflow. */
static void exponentiate(const linear *x, int64_t i, int64_t n, ls_real c)
{
    const ls_real from = c == -INFINITY ? 0 : c; /* no key yet: every x is -inf */
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        ls_real *b = x->b + k * x->r;
        for (int64_t f = 0; f < x->exponentials; f++) b[f] = ls_exp(b[f] - from > 0 ? 0 : b[f] - from);
    }
}

/* db of e^(x - c) becomes db of x. */
static void exponentiate_backward(const linear *x, int64_t i, int64_t n)
{
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        ls_real *db = x->db + k * x->r;
        const ls_real *b = x->b + k * x->r;
        for (int64_t f = 0; f < x->exponentials; f++) db[f] *= b[f];
    }
}

/* Multiplies the features of exponentials of rows [i, i + n) by ρ. */
static void make_up(const linear *x, int64_t i, int64_t n, ls_real *rows)
{
    const ls_real last = x->c[i + n - 1];
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        if (x->c[k] == last || x->c[k] == -INFINITY) continue; /* ρ = 1, or no key yet and all is 0 */
        const ls_real rho = ls_exp(last - x->c[k]);
        for (int64_t f = 0; f < x->exponentials; f++) rows[k * x->r + f] *= rho;
    }
}

/* The angles of the n positions from lo on, each from the first by the sine and cosine of a sum. */
static void set_angles(const linear *x, int64_t lo, int64_t n)
{
    if (x->F == x->r) return;
    const double s = sin(x->turn * (double)(lo + 1)), c = cos(x->turn * (double)(lo + 1));
    for (int64_t k = 0; k < n; k++) {
        x->sine[k] = (ls_real)(s * x->step[2 * k + 1] + c * x->step[2 * k]);
        x->cosine[k] = (ls_real)(c * x->step[2 * k + 1] - s * x->step[2 * k]);
    }
}

/* Rows [i, i + n): features (n,r) to turned features (n,F). */
static void turn(const linear *x, int64_t i, int64_t n, const ls_real *from, ls_real *to)
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
static void turn_backward(const linear *x, int64_t i, int64_t n, const ls_real *dto, int kept, ls_real *dfrom)
{
    const int64_t r = x->r;
    for (int64_t k = i; k < i + n && dfrom != dto; k++) {
        const ls_real s = x->sine[k], c = x->cosine[k], *sines = dto + k * x->F, *cosines = sines + r;
        ls_real *to = dfrom + k * r;
        for (int64_t f = 0; f < r; f++) to[f] = (kept ? to[f] : 0) + s * sines[f] + c * cosines[f];
    }
}

/* ------------------------------------------------------------------------------------------------ states */

static ls_monoid summary(const ls_pass *p)
{
    const int64_t F = turned(p), e = exponentials_of(p), row = p->d + 1;
    return (ls_monoid){.groups = p->B * p->H, .has_max = e > 0, .scaled = e * row, .plain = (F - e) * row};
}

/* The state of (b,h) on its way. */
static ls_real *element(const linear *x, ls_real *summaries, int64_t b, int64_t h)
{
    return summaries + (b * x->p->H + h) * ((x->exponentials > 0) + x->F * (x->d + 1));
}

/* S, z := what arrived. Returns its c. */
static ls_real unpack(const linear *x, const ls_real *element)
{
    const ls_real *row = element + (x->exponentials > 0);
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        memcpy(x->S + f * x->d, row, (size_t)x->d * sizeof *row);
        x->z[f] = row[x->d];
    }
    return x->exponentials > 0 ? element[0] : 0;
}

/* The running state of head h goes on its way, with c. */
static void pack(const linear *x, int64_t h, ls_real c, ls_real *element)
{
    const double *running = x->all_running + h * x->F * (x->d + 1);
    ls_real *row = element + (x->exponentials > 0);
    if (x->exponentials > 0) element[0] = c;
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        for (int64_t i = 0; i < x->d; i++) row[i] = (ls_real)running[f * x->d + i];
        row[x->d] = (ls_real)running[x->F * x->d + f];
    }
}

/* Of all heads. */
static void clear_running(const linear *x)
{
    for (int64_t i = 0; i < x->p->H * x->F * (x->d + 1); i++) x->all_running[i] = 0;
    for (int64_t h = 0; h < x->p->H; h++) x->seen_from[h] = -INFINITY;
}

static void round_running(linear *x) /* to S, z */
{
    for (int64_t i = 0; i < x->F * (x->d + 1) && !x->rounded; i++) x->S[i] = (ls_real)x->running[i];
    x->rounded = 1;
}

static void scale_running(linear *x, double factor)
{
    x->rounded = 0;
    double *z = x->running + x->F * x->d;
    for (int64_t i = 0; i < x->exponentials * x->d; i++) x->running[i] *= factor;
    for (int64_t f = 0; f < x->exponentials; f++) z[f] *= factor;
}

/* The running state of a head, seen from c = `to` from now on. */
static void see_from(linear *x, int64_t h, ls_real to)
{
    if (x->exponentials > 0 && x->seen_from[h] != to) scale_running(x, ls_linear_change(x->seen_from[h], to));
    x->seen_from[h] = to;
}

/* The same for the gradient of a state, which goes the other way. */
static void see_gradient_from(linear *x, int64_t h, ls_real to)
{
    if (x->exponentials > 0 && x->seen_from[h] != to) scale_running(x, ls_linear_change(to, x->seen_from[h]));
    x->seen_from[h] = to;
}

/* The running S += Σ_i rows_i matrix_iᵀ, z += Σ_i weight_i rows_i; rows (n,F), matrix (n,d). weight NULL: 1. round: S,
 * z are then what is running, too. */
static void gather(linear *x, int64_t n, const ls_real *rows, const ls_real *matrix, const ls_real *weight, int round)
{
    const int64_t F = x->F, d = x->d;
    ls_gemm(1, 0, F, d, n, 1, rows, F, matrix, d, 0, x->change, d);
    ls_zero(x->sum, F);
    for (int64_t i = 0; i < n; i++) ls_axpy(F, weight == NULL ? 1 : weight[i], rows + i * F, x->sum);
    for (int64_t i = 0; i < F * (d + 1) && !round; i++) x->running[i] += (double)x->change[i];
    for (int64_t i = 0; i < F * (d + 1) && round; i++) x->S[i] = (ls_real)(x->running[i] += (double)x->change[i]);
    x->rounded = round;
}

/* ------------------------------------------------------------------------------------------------ sums */

static ls_real highest(ls_real c, int64_t n, const ls_real *top)
{
    const ls_real here = ls_row_max(n, top);
    return here > c ? here : c;
}

/* A chunk of keys, turned; c: what exponentials are taken from. */
static void load_all(const linear *x, chunk k, ls_real c)
{
    exponentiate(x, 0, k.n, c);
    set_angles(x, x->p->own.span[0].lo + k.t, k.n);
    turn(x, 0, k.n, x->b, x->B);
}

static ls_status kernel_sums(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = ROWS, .reads = HAS_K | HAS_V};
    for (int64_t b = 0; b < p->B; b++) {
        clear_running(&x);
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            if (x.exponentials > 0) see_from(&x, k.h, highest(x.seen_from[k.h], k.n, x.top));
            load_all(&x, k, x.seen_from[k.h]);
            gather(&x, k.n, x.B, x.v, NULL, 0);
        }
        for (int64_t h = 0; h < p->H; h++) pack(&x, h, x.seen_from[h], element(&x, p->summary[phase + 1].sent, b, h));
    }
    return LS_OK;
}

/* What the keys of rows [i, i + n) get from S, z, which are gradients here: db, and dv. kept: 0, or 1 to add. */
static void take_gradients(const linear *x, int64_t i, int64_t n, int kept)
{
    const int64_t F = x->F, d = x->d;
    ls_gemm(0, 0, n, d, F, 1, x->B + i * F, F, x->S, d, kept, x->out + i * d, d);
    ls_gemm(0, 1, n, F, d, 1, x->v + i * d, d, x->S, d, x->dB == x->db ? kept : 0, x->dB + i * F, F);
    for (int64_t j = i; j < i + n; j++) ls_axpy(F, 1, x->z, x->dB + j * F);
    turn_backward(x, i, n, x->dB, kept, x->db);
    exponentiate_backward(x, i, n);
}

/* CS: the causal kernel wrote dk and dv before, so this adds. */
static ls_status kernel_sums_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase + 1];
    const walk w = {
        .rows = p->S, .step = ROWS, .reads = HAS_K | HAS_V, .writes = HAS_DK | HAS_OUT, .adds = p->pattern == LS_CS};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) unpack(&x, element(&x, s->dsent, b, k.h));
            load_keys(&x, k);
            load_all(&x, k, element(&x, s->sent, b, k.h)[0]); /* c, where there is one */
            take_gradients(&x, 0, k.n, 0);
            finish_keys(&x, k);
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static void load_turned_queries(const linear *x, chunk k)
{
    load_queries(x, k);
    set_angles(x, x->p->query_span[0].lo + k.t, k.n);
    turn(x, 0, k.n, x->a, x->A);
}

static void scale_rows(int64_t n, int64_t width, const ls_real *by, ls_real *rows)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = 0; e < width; e++) rows[i * width + e] *= by[i];
}

static ls_status kernel_apply(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = ROWS, .reads = HAS_Q, .writes = HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) unpack(&x, element(&x, p->summary[phase].got, b, k.h));
            load_turned_queries(&x, k);
            ls_gemm(0, 0, k.n, x.d, x.F, 1, x.A, x.F, x.S, x.d, 0, x.out, x.d);
            for (int64_t i = 0; i < k.n; i++) set_inverse(&x, i, dot(x.F, x.A + i * x.F, x.z));
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    return LS_OK;
}

/* dA (n,F), which holds S do, becomes (S do - δ z) / D, and A becomes A / D. */
static void divide(const linear *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        ls_real *A = x->A + i * x->F, *dA = x->dA + i * x->F;
        const double D = dot(x->F, A, x->z);
        set_inverse(x, i, D);
        const ls_real by = x->inverse[i], delta = x->flows[i] > 0 ? (ls_real)(dot(x->F, A, dA) / D) : 0;
        for (int64_t f = 0; f < x->F; f++) {
            dA[f] = by * (dA[f] - delta * x->z[f]);
            A[f] *= by;
        }
        x->delta[i] = delta;
    }
}

/* The running state, a gradient, gets what queries owe it: rows of A were divided by D. */
static void give_gradients(linear *x, int64_t i, int64_t n, int round)
{
    for (int64_t k = i; k < i + n; k++) x->delta[k] = -x->delta[k];
    gather(x, n, x->A + i * x->F, x->dout + i * x->d, x->delta + i, round);
}

static ls_status kernel_apply_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const walk w = {.rows = p->T, .step = ROWS, .reads = HAS_Q | HAS_DOUT, .writes = HAS_DQ};
    for (int64_t b = 0; b < p->B; b++) {
        clear_running(&x);
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) unpack(&x, element(&x, s->got, b, k.h));
            load_turned_queries(&x, k);
            ls_gemm(0, 1, k.n, x.F, x.d, 1, x.dout, x.d, x.S, x.d, 0, x.dA, x.F);
            divide(&x, k.n);
            give_gradients(&x, 0, k.n, 0);
            turn_backward(&x, 0, k.n, x.dA, 0, x.da);
            straighten(&x, 0, k.n);
            finish_queries(&x, k);
        }
        for (int64_t h = 0; h < p->H; h++) pack(&x, h, 0, element(&x, s->dgot, b, h));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ pairs */

/* A row of w, which holds a·b: w_ij = a_i·b_j apart_j, 0 for keys that are not seen. Returns their sum. */
static double weigh(int64_t n, const ls_real *apart, ls_real *w)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += (double)(w[j] *= apart[j]);
    return sum;
}

/* Rows of w and dw, which hold w and do·v: w := w / D, dw := the gradient of a·b. */
static void weigh_backward(int64_t n, const ls_real *apart, ls_real inverse, ls_real delta, ls_real *restrict w,
                           ls_real *restrict dw)
{
    for (int64_t j = 0; j < n; j++) {
        dw[j] = inverse * (dw[j] - delta) * apart[j];
        w[j] *= inverse;
    }
}

/* Pieces are the rows whose c lies between the same multiples of RISE: found alike from either end. */
static int in_one_piece(ls_real c, ls_real later)
{
    return c == later || floor((double)c / RISE) == floor((double)later / RISE);
}

static int64_t end_of_piece(const linear *x, int64_t i, int64_t n)
{
    int64_t end = i + 1;
    while (end < n && in_one_piece(x->c[end - 1], x->c[end])) end++;
    return end;
}

static int64_t start_of_piece(const linear *x, int64_t end)
{
    int64_t i = end - 1;
    while (i > 0 && in_one_piece(x->c[i - 1], x->c[i])) i--;
    return i;
}

/* ------------------------------------------------------------------------------------------------ short sequences */

static int is_short(const ls_pass *p)
{
    return p->all_keys <= SHORT;
}

static int is_long(const ls_pass *p)
{
    return !is_short(p);
}

/* A key on its way is [b][v] and, where there are exponentials, [top]; keys go (n,B,H) one after the other, so that the
 * ranks' pieces make the sequence. */
static int64_t shared_width(const ls_pass *p)
{
    return map_of(p)->features(p) + p->d + (exponentials_of(p) > 0);
}

static int64_t shared_piece(const ls_pass *p, int64_t lo, int64_t n)
{
    (void)lo;
    return n * p->B * p->H * shared_width(p);
}

static ls_real *shared(const linear *x, ls_real *keys, int64_t b, int64_t h, int64_t j)
{
    return keys + ((j * x->p->B + b) * x->p->H + h) * shared_width(x->p);
}

static ls_status kernel_share(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = SHORT, .reads = HAS_K | HAS_V};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            for (int64_t j = 0; j < k.n; j++) {
                ls_real *to = shared(&x, p->gathered[phase + 1].mine, b, k.h, k.t + j);
                memcpy(to, x.b + j * x.r, (size_t)x.r * sizeof *to);
                memcpy(to + x.r, x.v + j * x.d, (size_t)x.d * sizeof *to);
                if (x.exponentials > 0) to[x.r + x.d] = x.top[j];
            }
        }
    return LS_OK;
}

static ls_status kernel_share_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->S, .step = SHORT, .reads = HAS_K, .writes = HAS_DK | HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_keys(&x, k);
            for (int64_t j = 0; j < k.n; j++) {
                const ls_real *from = shared(&x, p->gathered[phase + 1].dmine, b, k.h, k.t + j);
                memcpy(x.db + j * x.r, from, (size_t)x.r * sizeof *from);
                memcpy(x.out + j * x.d, from + x.r, (size_t)x.d * sizeof *from);
            }
            finish_keys(&x, k);
        }
    return LS_OK;
}

/* All keys of (b,h): b seen from c. */
static void load_shared(const linear *x, int phase, chunk k, ls_real c)
{
    for (int64_t j = 0; j < x->p->all_keys; j++)
        memcpy(x->b + j * x->r, shared(x, x->p->gathered[phase].all, k.b, k.h, j), (size_t)x->r * sizeof *x->b);
    exponentiate(x, 0, x->p->all_keys, c);
}

/* Their values (S,d), and the distance between two rows. */
static const ls_real *shared_values(const linear *x, int phase, chunk k)
{
    return shared(x, x->p->gathered[phase].all, k.b, k.h, 0) + x->r;
}

static int64_t shared_stride(const linear *x)
{
    return shared_piece(x->p, 0, 1);
}

/* How many keys row t of the queries sees. */
static int64_t seen(const linear *x, int64_t t)
{
    const ls_pass *p = x->p;
    return p->pattern == LS_CS ? p->query_span[0].lo + t + 1 : p->all_keys;
}

/* cos ω(i - j) of all keys j that row t of the queries sees, 0 of the others. */
static const ls_real *apart_from_all(const linear *x, int64_t t)
{
    const double angle = x->turn * (double)(x->p->query_span[0].lo + t), s = sin(angle), c = cos(angle);
    const int64_t sees = seen(x, t);
    for (int64_t j = 0; j < x->p->all_keys; j++) {
        const double apart = x->F == x->r ? 1 : c * x->step[2 * j + 1] + s * x->step[2 * j];
        x->apart[j] = j < sees ? (ls_real)apart : 0;
    }
    return x->apart;
}

/* Queries of a chunk, and their c. */
static void load_short(const linear *x, int phase, chunk k)
{
    load_queries(x, k);
    for (int64_t i = 0; i < k.n; i++) x->c[i] = 0;
    for (int64_t i = 0; i < k.n && x->exponentials > 0; i++) {
        const int64_t n = seen(x, k.t + i);
        for (int64_t j = 0; j < n; j++) x->top[j] = shared(x, x->p->gathered[phase].all, k.b, k.h, j)[x->r + x->d];
        x->c[i] = ls_row_max(n, x->top);
    }
}

/* The piece of a chunk's queries that begins at row i is made ready: keys seen from c at its end, w = a·b. Returns its
 * length. */
static int64_t load_short_piece(const linear *x, int phase, chunk k, int64_t i)
{
    const int64_t end = end_of_piece(x, i, k.n), n = end - i, S = x->p->all_keys;
    load_shared(x, phase, k, x->c[end - 1]);
    make_up(x, i, n, x->a);
    ls_gemm(0, 1, n, S, x->r, 1, x->a + i * x->r, x->r, x->b, x->r, 0, x->w, S);
    return n;
}

static ls_status kernel_pairs(ls_pass *p, int phase)
{
    linear x = begin(p);
    const int64_t S = p->all_keys, ld = shared_stride(&x);
    const walk w = {.rows = p->T, .step = CAUSAL_ROWS, .reads = HAS_Q, .writes = HAS_OUT};
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            const ls_real *v = shared_values(&x, phase, k);
            load_short(&x, phase, k);
            for (int64_t i = 0, n; i < k.n; i += n) {
                n = load_short_piece(&x, phase, k, i);
                for (int64_t j = 0; j < n; j++) {
                    const int64_t t = k.t + i + j;
                    set_inverse(&x, i + j, weigh(S, apart_from_all(&x, t), x.w + j * S));
                }
                ls_gemm(0, 0, n, x.d, S, 1, x.w, S, v, ld, 0, x.out + i * x.d, x.d);
            }
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    return LS_OK;
}

/* A piece of queries that is ready: da, and what its keys get is added to what goes back to them. */
static void pairs_backward(const linear *x, int phase, chunk k, int64_t i, int64_t n)
{
    const int64_t S = x->p->all_keys, r = x->r, d = x->d, ld = shared_stride(x);
    ls_real *back = shared(x, x->p->gathered[phase].dall, k.b, k.h, 0);
    ls_gemm(0, 1, n, S, d, 1, x->dout + i * d, d, shared_values(x, phase, k), ld, 0, x->dw, S);
    for (int64_t j = 0; j < n; j++) {
        const ls_real *apart = apart_from_all(x, k.t + i + j);
        ls_real *w = x->w + j * S, *dw = x->dw + j * S;
        const double D = weigh(S, apart, w);
        set_inverse(x, i + j, D);
        const ls_real delta = x->flows[i + j] > 0 ? (ls_real)(dot(S, w, dw) / D) : 0;
        weigh_backward(S, apart, x->inverse[i + j], delta, w, dw);
    }
    ls_gemm(0, 0, n, r, S, 1, x->dw, S, x->b, r, 0, x->da + i * r, r);
    ls_gemm(1, 0, S, r, n, 1, x->dw, S, x->a + i * r, r, 0, x->db, r);
    ls_gemm(1, 0, S, d, n, 1, x->w, S, x->dout + i * d, d, 1, back + r, ld);
    exponentiate_backward(x, 0, S);
    for (int64_t j = 0; j < S; j++) ls_axpy(r, 1, x->db + j * r, back + j * ld);
    straighten(x, i, n);
    make_up(x, i, n, x->da);
}

static ls_status kernel_pairs_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = CAUSAL_ROWS, .reads = HAS_Q | HAS_DOUT, .writes = HAS_DQ};
    ls_zero(p->gathered[phase].dall, p->gathered[phase].total);
    for (int64_t b = 0; b < p->B; b++)
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            load_short(&x, phase, k);
            for (int64_t i = 0, n; i < k.n; i += n) {
                n = load_short_piece(&x, phase, k, i);
                pairs_backward(&x, phase, k, i, n);
            }
            finish_queries(&x, k);
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, causal */

/* a and b of a chunk, not yet turned, b not yet exponentiated. */
static void load_causal(const linear *x, chunk k)
{
    load_queries(x, k);
    load_keys(x, k);
    set_angles(x, x->p->query_span[0].lo + k.t, k.n);
}

/* c of each row, the maximum so far, from `before` on. */
static void find_maxima(const linear *x, int64_t n, ls_real before)
{
    for (int64_t i = 0; i < n; i++) {
        if (x->exponentials > 0 && x->top[i] > before) before = x->top[i];
        x->c[i] = before;
    }
}

/* Rows [i, i + n) made ready: a and b seen from c at their end, A and B, and S, z from the running state, which was
 * seen from c until now. */
static void load_piece(linear *x, int64_t i, int64_t n)
{
    exponentiate(x, i, n, x->c[i + n - 1]);
    make_up(x, i, n, x->a);
    turn(x, i, n, x->a, x->A);
    turn(x, i, n, x->b, x->B);
    round_running(x);
}

/* w (n,n) = a·b of a piece, whole. */
static void multiply(const linear *x, int64_t i, int64_t n)
{
    ls_gemm(0, 1, n, n, x->r, 1, x->a + i * x->r, x->r, x->b + i * x->r, x->r, 0, x->w, n);
}

/* cos ω(i - j) of row i of a piece, from j = 0 on. */
static const ls_real *apart_within(const linear *x, int64_t i)
{
    return x->apart + ROWS - 1 - i;
}

/* The running states := the prefixes. */
static void load_prefixes(const linear *x, int phase, int64_t b)
{
    const int64_t reals = x->F * (x->d + 1);
    for (int64_t h = 0; h < x->p->H; h++) {
        x->seen_from[h] = unpack(x, element(x, x->p->summary[phase].got, b, h));
        for (int64_t i = 0; i < reals; i++) x->all_running[h * reals + i] = (double)x->S[i];
    }
}

/* Where the state at the start of a block is kept for backward; NULL in a step. */
static ls_real *kept_state(const linear *x, chunk k)
{
    const ls_pass *p = x->p;
    return p->step ? NULL : p->saved[STATES] + ((k.b * blocks_of(p) + k.lo / x->block) * p->H + k.h) * kept_reals(p);
}

static void keep_state(linear *x, chunk k)
{
    ls_real *to = kept_state(x, k);
    if (to == NULL) return;
    round_running(x);
    to[0] = x->seen_from[k.h];
    memcpy(to + 1, x->S, (size_t)(x->F * (x->d + 1)) * sizeof *to); /* z lies behind S */
}

/* The running state of number H := what was kept. */
static void recall_state(linear *x, chunk k)
{
    const ls_real *from = kept_state(x, k);
    turn_to(x, x->p->H);
    x->seen_from[x->p->H] = from[0];
    for (int64_t i = 0; i < x->F * (x->d + 1); i++) x->running[i] = (double)from[1 + i];
}

/* Piece [i, i + n) of a chunk: out, not yet divided. */
static void apply_piece(const linear *x, int64_t i, int64_t n)
{
    const int64_t d = x->d, F = x->F;
    multiply(x, i, n);
    for (int64_t j = 0; j < n; j++) {
        const double past = dot(F, x->A + (i + j) * F, x->z);
        set_inverse(x, i + j, past + weigh(n, apart_within(x, j), x->w + j * n));
    }
    ls_gemm(0, 0, n, d, n, 1, x->w, n, x->v + i * d, d, 0, x->out + i * d, d);
    ls_gemm(0, 0, n, d, F, 1, x->A + i * F, F, x->S, d, 1, x->out + i * d, d);
}

static ls_status kernel_causal(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = CAUSAL_ROWS, .reads = HAS_Q | HAS_K | HAS_V, .writes = HAS_OUT};
    for (int64_t b = 0; b < p->B; b++) {
        load_prefixes(&x, phase, b);
        for (chunk k = before_all(&x, &w, b); go_on(&x, &w, &k);) {
            if (begins(&k)) keep_state(&x, k);
            load_causal(&x, k);
            find_maxima(&x, k.n, x.seen_from[k.h]);
            for (int64_t i = 0, end; i < k.n; i = end) {
                end = end_of_piece(&x, i, k.n);
                see_from(&x, k.h, x.c[end - 1]);
                load_piece(&x, i, end - i);
                apply_piece(&x, i, end - i);
                gather(&x, end - i, x.B + i * x.F, x.v + i * x.d, NULL, 1);
            }
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    }
    return LS_OK;
}

/* Row j of a piece that starts at row i of its chunk. w, dw, dA hold a·b, do·v, S do: they become w / D, the gradient
 * of a·b, and what A gets from the past. */
static void row_backward(const linear *x, int64_t i, int64_t n, int64_t j)
{
    const int64_t F = x->F, at = i + j;
    ls_real *w = x->w + j * n, *dw = x->dw + j * n, *A = x->A + at * F, *dA = x->dA + at * F;
    const double D = weigh(n, apart_within(x, j), w) + dot(F, A, x->z);
    set_inverse(x, at, D);
    const ls_real by = x->inverse[at];
    const ls_real delta = x->flows[at] > 0 ? (ls_real)((dot(n, w, dw) + dot(F, A, dA)) / D) : 0;
    weigh_backward(n, apart_within(x, j), by, delta, w, dw);
    for (int64_t f = 0; f < F; f++) dA[f] = by * (dA[f] - delta * x->z[f]);
    x->delta[at] = delta;
}

static void piece_backward(const linear *x, int64_t i, int64_t n)
{
    const int64_t r = x->r, F = x->F, d = x->d;
    const ls_real *dout = x->dout + i * d;
    multiply(x, i, n);
    ls_gemm(0, 1, n, n, d, 1, dout, d, x->v + i * d, d, 0, x->dw, n);
    ls_gemm(0, 1, n, F, d, 1, dout, d, x->S, d, 0, x->dA + i * F, F);
    for (int64_t j = 0; j < n; j++) row_backward(x, i, n, j);
    turn_backward(x, i, n, x->dA, 0, x->da);
    ls_gemm(0, 0, n, r, n, 1, x->dw, n, x->b + i * r, r, 1, x->da + i * r, r);
    ls_gemm(1, 0, n, r, n, 1, x->dw, n, x->a + i * r, r, 0, x->db + i * r, r);
    ls_gemm(1, 0, n, d, n, 1, x->w, n, dout, d, 0, x->out + i * d, d);
    straighten(x, i, n);
    make_up(x, i, n, x->da);
}

/* What sweep 1 leaves for sweep 2, of a chunk. */
static void keep_rows(const linear *x, chunk k)
{
    const int64_t at = k.t - k.lo;
    memcpy(x->all_c + at, x->c, (size_t)k.n * sizeof *x->c);
    memcpy(x->all_inverse + at, x->inverse, (size_t)k.n * sizeof *x->c);
    memcpy(x->all_delta + at, x->delta, (size_t)k.n * sizeof *x->c);
}

static void recall_rows(const linear *x, chunk k)
{
    const int64_t at = k.t - k.lo;
    memcpy(x->c, x->all_c + at, (size_t)k.n * sizeof *x->c);
    memcpy(x->inverse, x->all_inverse + at, (size_t)k.n * sizeof *x->c);
    memcpy(x->delta, x->all_delta + at, (size_t)k.n * sizeof *x->c);
}

/* Chunk t of a block made ready; its db is kept from sweep to sweep. */
static void stand_at_chunk(linear *x, chunk *k)
{
    k->n = ls_min(CAUSAL_ROWS, k->hi - k->t);
    stand_at(x, k);
    x->db = x->all_db + (k->t - k->lo) * x->r;
    if (x->F == x->r) x->dB = x->db;
    load_causal(x, *k);
}

/* Sweep 1 through a block of one head, forward in time: dq, and of db and dv what comes from within chunks. */
static void sweep_past(linear *x, chunk k)
{
    const int64_t state = x->p->H;
    recall_state(x, k);
    for (k.t = k.lo; k.t < k.hi; k.t += k.n) {
        stand_at_chunk(x, &k);
        find_maxima(x, k.n, x->seen_from[state]);
        for (int64_t i = 0, end; i < k.n; i = end) {
            end = end_of_piece(x, i, k.n);
            see_from(x, state, x->c[end - 1]);
            load_piece(x, i, end - i);
            piece_backward(x, i, end - i);
            if (k.t + end < k.hi) gather(x, end - i, x->B + i * x->F, x->v + i * x->d, NULL, 1);
        }
        finish_queries(x, k);
        keep_rows(x, k);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them get theirs.
 */
static void sweep_future(linear *x, chunk k)
{
    turn_to(x, k.h);
    for (k.t = k.lo + (k.hi - k.lo - 1) / CAUSAL_ROWS * CAUSAL_ROWS; k.t >= k.lo; k.t -= CAUSAL_ROWS) {
        stand_at_chunk(x, &k);
        recall_rows(x, k);
        for (int64_t end = k.n, i; end > 0; end = i) {
            i = start_of_piece(x, end);
            see_gradient_from(x, k.h, x->c[end - 1]);
            load_piece(x, i, end - i);
            take_gradients(x, i, end - i, 1);
            scale_rows(end - i, x->F, x->inverse + i, x->A + i * x->F);
            give_gradients(x, i, end - i, 1);
        }
        finish_keys(x, k);
    }
}

static ls_status kernel_causal_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const walk w = {
        .rows = p->T, .reads = HAS_Q | HAS_K | HAS_V | HAS_DOUT, .writes = HAS_DQ | HAS_DK | HAS_OUT, .backward = 1};
    for (int64_t b = 0; b < p->B; b++) {
        clear_running(&x);
        for (chunk k = before_all(&x, &w, b); next_block(&x, &w, &k);)
            for (k.h = 0; k.h < p->H; k.h++) {
                sweep_past(&x, k);
                sweep_future(&x, k);
            }
        for (int64_t h = 0; h < p->H; h++) {
            turn_to(&x, h);
            if (x.exponentials > 0) see_gradient_from(&x, h, element(&x, s->got, b, h)[0]);
            pack(&x, h, 0, element(&x, s->dgot, b, h));
        }
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static int is_prepared(const ls_pass *p)
{
    return map_of(p)->prepare != NULL;
}

static ls_status kernel_prepare(ls_pass *p, int phase)
{
    (void)phase;
    return map_of(p)->prepare(p);
}

/* A source is summarised apart from the steps that follow, so what they need is prepared for it too. */
static ls_status kernel_sums_of_source(ls_pass *p, int phase)
{
    if (is_prepared(p)) LS_TRY(kernel_prepare(p, phase));
    return kernel_sums(p, phase);
}

#define PREPARE                                                                                                        \
    {                                                                                                                  \
        .name = "prepare", .needed = is_prepared, .forward = kernel_prepare                                            \
    }
#define SHORT_SEQUENCES                                                                                                \
    {.name = "share", .needed = is_short, .forward = kernel_share, .backward = kernel_share_backward},                 \
    {                                                                                                                  \
        .name = "pairs", .crossing = LS_GATHER, .needed = is_short, .piece = shared_piece, .forward = kernel_pairs,    \
        .backward = kernel_pairs_backward                                                                              \
    }
const ls_phase ls_linear_all_keys[] = {
    PREPARE,
    SHORT_SEQUENCES,
    {.name = "sums", .needed = is_long, .forward = kernel_sums, .backward = kernel_sums_backward},
    {.name = "apply",
     .crossing = LS_REDUCE,
     .needed = is_long,
     .monoid = summary,
     .forward = kernel_apply,
     .backward = kernel_apply_backward},
    {.name = NULL},
};
const ls_phase ls_linear_causal[] = {
    PREPARE,
    SHORT_SEQUENCES,
    {.name = "sums", .needed = is_long, .forward = kernel_sums, .backward = kernel_sums_backward, .feeds_scan = 1},
    {.name = "causal",
     .crossing = LS_SCAN,
     .needed = is_long,
     .monoid = summary,
     .forward = kernel_causal,
     .backward = kernel_causal_backward},
    {.name = NULL},
};
const ls_phase ls_linear_step_across[] = {
    PREPARE,
    {.name = "source", .forward = kernel_sums_of_source, .of_source = 1},
    {.name = "apply", .crossing = LS_REDUCE, .monoid = summary, .forward = kernel_apply},
    {.name = NULL},
};
const ls_phase ls_linear_step_causal[] = {
    PREPARE,
    {.name = "sums", .forward = kernel_sums},
    {.name = "causal", .crossing = LS_SCAN, .monoid = summary, .forward = kernel_causal},
    {.name = NULL},
};
#undef PREPARE
#undef SHORT_SEQUENCES
