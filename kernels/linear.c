/* Linear attention by feature maps (Katharopoulos et al., 2020), chunk by chunk. Formulas: linear.h.
 *
 * The state of a set of keys is, for each (b,h), S = Σ_j B_j v_jᵀ (F,d) and z = Σ_j B_j (F):
 *   o_i = S ᵀA_i / max(A_i·z, floor)
 * NS, NC, CC: sums over this rank's keys → reduce → apply. CS: sums → scan → causal, which goes on from the prefix:
 * within a chunk of n rows it takes w_ij as they are, from earlier chunks the state, which then grows by the chunk: o_i
 * = (Σ_{j<=i in the chunk} w_ij v_j + Sᵀ A_i) / max(Σ_{j<=i in the chunk} w_ij + A_i·z, floor) In memory an element is
 * [c][S_f, z_f for each f], c only where features are exponentials.
 *
 * Backward, with D_i the denominator and δ_i = do_i·o_i (0 where the floor is taken, since nothing flows to D_i then):
 *   dw_ij = (do_i·v_j - δ_i) / D_i,  dA_i = (S do_i - δ_i z) / D_i,  dS = Σ_i A_i do_iᵀ / D_i,  dz = -Σ_i A_i δ_i / D_i
 *   dB_j = dS v_j + dz,  dv_j = dSᵀ B_j
 * CS in two sweeps: forward in time, what is within chunks and what queries take from the past (the states are made
 * again); backward in time, what keys owe to the future. δ_i is summed from the same products do_i·v_j that it is taken
 * from, in double: where a query sees one key alone their difference is 0, as it has to be.
 *
 * Exponentials: c_i, the maximum so far, rises along the rows. A chunk is cut into pieces in which it hardly does; in a
 * piece keys are taken from c at its end, and a row's features of exponentials make up for it by the factor ρ_i =
 * e^(c_end - c_i).
 */
#include "linear.h"

#include "gemm.h"
#include "tile.h"

enum { ROWS = LS_LINEAR_ROWS, CAUSAL_ROWS = 64, RISE = 8 };
enum { QUERIES, KEYS, TURNED, VALUES, WEIGHTS, STATE, DOUBLES, SMALL, TRACE, ALL_WORK }; /* work[] */
_Static_assert((int)ALL_WORK <= (int)LS_LINEAR_WORK, "work[] of linear attention overlaps that of its mechanism");

/* Everything a kernel works with. Where ω = 0 the turned features are the features themselves. */
typedef struct linear {
    ls_pass *p;
    const ls_feature_map *map;
    int64_t r, F, d, exponentials;
    double turn, floor;
    ls_real *a, *da, *b, *db;           /* (n,r) */
    ls_real *A, *dA, *B, *dB;           /* (n,F); dA and dB may be the same memory */
    ls_real *clean_v, *clean_do;        /* (n,d) */
    ls_real *w, *dw;                    /* (n,n) */
    ls_real *S, *z, *change, *sum;      /* (F,d), (F): the state as the products want it; what a chunk adds to it */
    double *running, *step;             /* (F,d) then (F): the state as it is summed; sin kω, cos kω for k < n */
    ls_real *top, *c, *inverse, *delta; /* (n) */
    ls_real *sine, *cosine, *apart;     /* (n); apart: cos (n-1)ω, .., cos 0 */
    ls_real *all_c, *all_inverse, *all_delta; /* (T) of one (b,h), from sweep to sweep */
} linear;

static int64_t exponentials_of(const ls_pass *p, const ls_feature_map *map)
{
    return map->exponentials == NULL ? 0 : map->exponentials(p);
}

static double turn_of(const ls_pass *p, const ls_feature_map *map)
{
    return map->turn == NULL ? 0 : map->turn(p);
}

void ls_linear_plan(ls_pass *p, const ls_feature_map *map, ls_arena *work)
{
    const int turns = map->turn != NULL;
    const int64_t r = map->features(p), F = turns ? 2 * r : r, d = p->d;
    p->work[QUERIES] = ls_take(work, 2 * ROWS * r);
    p->work[KEYS] = ls_take(work, 2 * ROWS * r);
    p->work[TURNED] = ls_take(work, turns ? 3 * ROWS * F : 0);
    p->work[VALUES] = ls_take(work, 2 * ROWS * d);
    p->work[WEIGHTS] = ls_take(work, p->pattern == LS_CS ? 2 * CAUSAL_ROWS * CAUSAL_ROWS : 0);
    p->work[STATE] = ls_take(work, 2 * F * (d + 1));
    p->work[DOUBLES] = ls_arena_take(work, (size_t)(F * (d + 1) + 2 * ROWS) * sizeof(double));
    p->work[SMALL] = ls_take(work, 7 * ROWS);
    p->work[TRACE] = ls_take(work, p->pattern == LS_CS && p->backward ? 3 * p->T : 0);
}

ls_monoid ls_linear_summary(const ls_pass *p, const ls_feature_map *map)
{
    const int64_t r = map->features(p), F = map->turn != NULL ? 2 * r : r, e = exponentials_of(p, map);
    return (ls_monoid){
        .groups = p->B * p->H, .has_max = e > 0, .scaled = e * (p->d + 1), .plain = (F - e) * (p->d + 1)};
}

static linear begin(ls_pass *p, const ls_feature_map *map)
{
    const int turns = map->turn != NULL;
    linear x = {.p = p, .map = map, .r = map->features(p), .d = p->d, .exponentials = exponentials_of(p, map)};
    x.F = turns ? 2 * x.r : x.r;
    x.turn = turn_of(p, map), x.floor = map->floor(p);
    x.a = p->work[QUERIES], x.da = x.a + ROWS * x.r;
    x.b = p->work[KEYS], x.db = x.b + ROWS * x.r;
    x.A = turns ? p->work[TURNED] : x.a;
    x.B = turns ? x.A + ROWS * x.F : x.b;
    x.dA = turns ? x.B + ROWS * x.F : x.da;
    x.dB = turns ? x.dA : x.db;
    x.clean_v = p->work[VALUES], x.clean_do = x.clean_v + ROWS * x.d;
    x.w = p->work[WEIGHTS], x.dw = x.w + CAUSAL_ROWS * CAUSAL_ROWS;
    x.S = p->work[STATE], x.z = x.S + x.F * x.d, x.change = x.z + x.F, x.sum = x.change + x.F * x.d;
    x.running = (double *)(void *)p->work[DOUBLES], x.step = x.running + x.F * (x.d + 1);
    ls_real **const small[] = {&x.top, &x.c, &x.inverse, &x.delta, &x.sine, &x.cosine, &x.apart};
    for (int i = 0; i < 7; i++) *small[i] = p->work[SMALL] + i * ROWS;
    x.all_c = p->work[TRACE], x.all_inverse = x.all_c + p->T, x.all_delta = x.all_inverse + p->T;
    for (int64_t k = 0; turns && k < ROWS; k++) {
        x.step[2 * k] = sin(x.turn * (double)k), x.step[2 * k + 1] = cos(x.turn * (double)k);
        x.apart[ROWS - 1 - k] = (ls_real)x.step[2 * k + 1];
    }
    return x;
}

/* ------------------------------------------------------------------------------------------------ turning */

/* The angles of the n positions from lo on, each from the first by the sine and cosine of a sum. */
static void set_angles(const linear *x, int64_t lo, int64_t n)
{
    if (x->turn == 0) return;
    const double s = sin(x->turn * (double)(lo + 1)), c = cos(x->turn * (double)(lo + 1));
    for (int64_t k = 0; k < n; k++) {
        x->sine[k] = (ls_real)(s * x->step[2 * k + 1] + c * x->step[2 * k]);
        x->cosine[k] = (ls_real)(c * x->step[2 * k + 1] - s * x->step[2 * k]);
    }
}

/* Rows [i, i + n) of the chunk: features to turned features. */
static void turn(const linear *x, int64_t i, int64_t n, const ls_real *from, ls_real *to)
{
    const int64_t r = x->r;
    if (from == to) return;
    for (int64_t k = i; k < i + n; k++)
        for (int64_t f = 0; f < r; f++) {
            to[k * x->F + f] = x->sine[k] * from[k * r + f];
            to[k * x->F + r + f] = x->cosine[k] * from[k * r + f];
        }
}

static void turn_backward(const linear *x, int64_t i, int64_t n, const ls_real *dto, ls_real *dfrom)
{
    const int64_t r = x->r;
    if (dfrom == dto) return;
    for (int64_t k = i; k < i + n; k++)
        for (int64_t f = 0; f < r; f++)
            dfrom[k * r + f] = x->sine[k] * dto[k * x->F + f] + x->cosine[k] * dto[k * x->F + r + f];
}

/* ------------------------------------------------------------------------------------------------ states */

static ls_real *element(const linear *x, ls_real *summaries, int64_t b, int64_t h)
{
    return summaries + (b * x->p->H + h) * ((x->exponentials > 0) + x->F * (x->d + 1));
}

static ls_real *rows_of_element(const linear *x, ls_real *e)
{
    return e + (x->exponentials > 0);
}

static void clear_running(const linear *x)
{
    memset(x->running, 0, (size_t)(x->F * (x->d + 1)) * sizeof *x->running);
}

/* S, z := the running state, rounded. */
static void round_running(const linear *x)
{
    for (int64_t i = 0; i < x->F * (x->d + 1); i++) x->S[i] = (ls_real)x->running[i];
}

/* S, z := what arrived. */
static void unpack(const linear *x, ls_real *e)
{
    const ls_real *row = rows_of_element(x, e);
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        memcpy(x->S + f * x->d, row, (size_t)x->d * sizeof *row);
        x->z[f] = row[x->d];
    }
}

/* The running state goes on its way, with c. */
static void pack(const linear *x, ls_real c, ls_real *e)
{
    ls_real *row = rows_of_element(x, e);
    if (x->exponentials > 0) e[0] = c;
    for (int64_t f = 0; f < x->F; f++, row += x->d + 1) {
        for (int64_t i = 0; i < x->d; i++) row[i] = (ls_real)x->running[f * x->d + i];
        row[x->d] = (ls_real)x->running[x->F * x->d + f];
    }
}

/* The running state times e^(from - to): seen from c = `to` instead of `from`, or as a gradient the other way round. */
static void rescale(const linear *x, ls_real from, ls_real to)
{
    if (from == to || x->exponentials == 0) return;
    const double factor = from == -INFINITY || to == -INFINITY ? 0 : exp((double)from - (double)to);
    double *z = x->running + x->F * x->d;
    for (int64_t i = 0; i < x->exponentials * x->d; i++) x->running[i] *= factor;
    for (int64_t f = 0; f < x->exponentials; f++) z[f] *= factor;
}

/* The running state += Σ_i rows_i matrix_iᵀ and Σ_i weight_i rows_i; rows (n,F), matrix (n,d); weight NULL: 1. */
static void gather(const linear *x, int64_t n, const ls_real *rows, const ls_real *matrix, int64_t ld,
                   const ls_real *weight)
{
    const int64_t F = x->F, d = x->d;
    ls_gemm(1, 0, F, d, n, 1, rows, F, matrix, ld, 0, x->change, d);
    ls_zero(x->sum, F);
    for (int64_t i = 0; i < n; i++) ls_axpy(F, weight == NULL ? 1 : weight[i], rows + i * F, x->sum);
    for (int64_t i = 0; i < F * (d + 1); i++) x->running[i] += (double)x->change[i];
}

/* ------------------------------------------------------------------------------------------------ rows */

/* Rows of a tensor that products may read: where they stand, or a copy that is clean of what padding holds. */
typedef struct matrix {
    const ls_real *p;
    int64_t ld;
} matrix;

static matrix rows_of(const linear *x, ls_view v, const uint8_t *pad, int64_t pads, ls_chunk k, ls_real *copy)
{
    if (pad == NULL) return (matrix){ls_row(v, k.b, k.h, k.t), v.st};
    ls_clean_rows(v, k.b, k.h, k.t, k.n, x->d, pad, pads, 1, copy);
    return (matrix){copy, x->d};
}

static matrix values(const linear *x, ls_chunk k)
{
    return rows_of(x, x->p->own.v, x->p->own.pad, x->p->S, k, x->clean_v);
}

static matrix gradients(const linear *x, ls_chunk k)
{
    return rows_of(x, x->p->dout, x->p->pad_q, x->p->T, k, x->clean_do);
}

/* Σ x y, exact but for the rounding of double. */
static double dot(int64_t n, const ls_real *x, const ls_real *y)
{
    double s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < n; i++) s += (double)x[i] * (double)y[i];
    return s;
}

static ls_real inverse(const linear *x, double denominator)
{
    const double least = 4 * (sizeof(ls_real) == 4 ? 1.2e-38 : 2.3e-308); /* its inverse is finite */
    if (denominator > x->floor) return denominator > least ? (ls_real)(1 / denominator) : 0;
    return x->floor > least ? (ls_real)(1 / x->floor) : 0;
}

/* Rows [i, i + n) of b, from x to e^(x - c). */
static void exponentiate(const linear *x, int64_t i, int64_t n, ls_real c)
{
    const ls_real from = c == -INFINITY ? 0 : c; /* no key yet: every x is -inf */
    if (x->exponentials == 0) return;
    for (int64_t k = i; k < i + n; k++)
        for (int64_t f = 0; f < x->exponentials; f++) x->b[k * x->r + f] = ls_exp(x->b[k * x->r + f] - from);
}

/* db of e^(x - c) becomes db of x. */
static void exponentiate_backward(const linear *x, int64_t i, int64_t n)
{
    if (x->exponentials == 0) return;
    for (int64_t k = i; k < i + n; k++)
        for (int64_t f = 0; f < x->exponentials; f++) x->db[k * x->r + f] *= x->b[k * x->r + f];
}

/* ------------------------------------------------------------------------------------------------ sums */

ls_status ls_linear_sums(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_real c = -INFINITY;
            clear_running(&x);
            for (int64_t t = 0; t < p->S; t += ROWS) {
                const ls_chunk k = {b, h, t, ls_min(ROWS, p->S - t)};
                const matrix v = values(&x, k);
                map->keys(p, k, x.b, x.top);
                if (x.exponentials > 0) {
                    const ls_real top = ls_row_max(k.n, x.top);
                    if (top > c) rescale(&x, c, top), c = top;
                }
                exponentiate(&x, 0, k.n, c);
                set_angles(&x, p->own.span[0].lo + t, k.n);
                turn(&x, 0, k.n, x.b, x.B);
                gather(&x, k.n, x.B, v.p, v.ld, NULL);
            }
            pack(&x, c, element(&x, p->summary[phase + 1].sent, b, h));
        }
    return LS_OK;
}

/* What the keys of rows [i, i + n) of a chunk get from S, z, now gradients: dv (=, or += with `add`) and db. */
static void take_gradients(const linear *x, ls_chunk k, int64_t i, int64_t n, matrix v, int add)
{
    const ls_view dv = x->p->own.dv;
    const int64_t F = x->F, d = x->d;
    ls_gemm(0, 0, n, d, F, 1, x->B + i * F, F, x->S, d, add, ls_row(dv, k.b, k.h, k.t + i), dv.st);
    ls_gemm(0, 1, n, F, d, 1, v.p + i * v.ld, v.ld, x->S, d, 0, x->dB + i * F, F);
    for (int64_t j = i; j < i + n; j++) ls_axpy(F, 1, x->z, x->dB + j * F);
    turn_backward(x, i, n, x->dB, x->db);
    exponentiate_backward(x, i, n);
}

/* CS: the causal kernel wrote dk and dv before, so this adds. */
ls_status ls_linear_sums_backward(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    const ls_summary *s = &p->summary[phase + 1];
    const int add = p->pattern == LS_CS;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const ls_real c = element(&x, s->sent, b, h)[0]; /* means something only where exponentials are */
            unpack(&x, element(&x, s->dsent, b, h));
            for (int64_t t = 0; t < p->S; t += ROWS) {
                const ls_chunk k = {b, h, t, ls_min(ROWS, p->S - t)};
                const matrix v = values(&x, k);
                map->keys(p, k, x.b, x.top);
                exponentiate(&x, 0, k.n, c);
                set_angles(&x, p->own.span[0].lo + t, k.n);
                turn(&x, 0, k.n, x.b, x.B);
                take_gradients(&x, k, 0, k.n, v, add);
                map->keys_backward(p, k, x.db, add);
            }
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, all keys */

static void load_queries(const linear *x, ls_chunk k)
{
    x->map->queries(x->p, k, x->a);
    set_angles(x, x->p->query_span[0].lo + k.t, k.n);
    turn(x, 0, k.n, x->a, x->A);
}

ls_status ls_linear_apply(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            unpack(&x, element(&x, p->summary[phase].got, b, h));
            for (int64_t t = 0; t < p->T; t += ROWS) {
                const ls_chunk k = {b, h, t, ls_min(ROWS, p->T - t)};
                load_queries(&x, k);
                ls_gemm(0, 0, k.n, x.d, x.F, 1, x.A, x.F, x.S, x.d, 0, ls_row(p->out, b, h, t), p->out.st);
                for (int64_t i = 0; i < k.n; i++) {
                    const ls_real by = inverse(&x, dot(x.F, x.A + i * x.F, x.z));
                    ls_real *out = ls_row(p->out, b, h, t + i);
                    for (int64_t e = 0; e < x.d; e++) out[e] *= by;
                }
            }
        }
    return LS_OK;
}

/* A row whose dA holds S do and whose A holds A: dA := (S do - δ z) / D, A := A / D. */
static void divide(const linear *x, int64_t i, ls_real by, ls_real delta)
{
    ls_real *A = x->A + i * x->F, *dA = x->dA + i * x->F;
    for (int64_t f = 0; f < x->F; f++) {
        dA[f] = by * (dA[f] - delta * x->z[f]);
        A[f] *= by;
    }
}

ls_status ls_linear_apply_backward(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    const ls_summary *s = &p->summary[phase];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            unpack(&x, element(&x, s->got, b, h));
            clear_running(&x);
            for (int64_t t = 0; t < p->T; t += ROWS) {
                const ls_chunk k = {b, h, t, ls_min(ROWS, p->T - t)};
                const matrix dout = gradients(&x, k);
                load_queries(&x, k);
                ls_gemm(0, 1, k.n, x.F, x.d, 1, dout.p, dout.ld, x.S, x.d, 0, x.dA, x.F);
                for (int64_t i = 0; i < k.n; i++) {
                    const double D = dot(x.F, x.A + i * x.F, x.z);
                    const ls_real by = inverse(&x, D);
                    const int flows = D > x.floor && by > 0;
                    const ls_real delta = flows ? (ls_real)(dot(x.F, x.A + i * x.F, x.dA + i * x.F) / D) : 0;
                    divide(&x, i, by, delta);
                    x.delta[i] = -delta;
                }
                gather(&x, k.n, x.A, dout.p, dout.ld, x.delta);
                turn_backward(&x, 0, k.n, x.dA, x.da);
                map->queries_backward(p, k, x.da);
            }
            pack(&x, 0, element(&x, s->dgot, b, h));
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply, causal */

static ls_chunk causal_chunk(const linear *x, int64_t b, int64_t h, int64_t t)
{
    return (ls_chunk){b, h, t, ls_min(CAUSAL_ROWS, x->p->T - t)};
}

/* a and b of a chunk, not yet turned, b not yet exponentiated. */
static void load_features(const linear *x, ls_chunk k)
{
    x->map->queries(x->p, k, x->a);
    x->map->keys(x->p, k, x->b, x->top);
    set_angles(x, x->p->query_span[0].lo + k.t, k.n);
}

/* c of each row, the maximum so far, going on from `before`. */
static void find_maxima(const linear *x, int64_t n, ls_real before)
{
    for (int64_t i = 0; i < n; i++) {
        if (x->exponentials > 0 && x->top[i] > before) before = x->top[i];
        x->c[i] = before;
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

/* Multiplies the features of exponentials of rows (n,r) by ρ. */
static void make_up(const linear *x, int64_t i, int64_t n, ls_real *rows)
{
    const ls_real last = x->c[i + n - 1];
    for (int64_t k = i; k < i + n && x->exponentials > 0; k++) {
        if (x->c[k] == last || x->c[k] == -INFINITY) continue; /* ρ = 1, or no key yet and all is 0 */
        const ls_real rho = ls_exp(last - x->c[k]);
        for (int64_t f = 0; f < x->exponentials; f++) rows[k * x->r + f] *= rho;
    }
}

/* Piece [i, i + n) of a chunk made ready: a and b seen from c at its end, A and B. */
static void load_piece(const linear *x, int64_t i, int64_t n)
{
    exponentiate(x, i, n, x->c[i + n - 1]);
    make_up(x, i, n, x->a);
    turn(x, i, n, x->a, x->A);
    turn(x, i, n, x->b, x->B);
}

/* w (n,n) = a·b of the piece, whole. */
static void multiply(const linear *x, int64_t i, int64_t n)
{
    ls_gemm(0, 1, n, n, x->r, 1, x->a + i * x->r, x->r, x->b + i * x->r, x->r, 0, x->w, n);
}

/* The factors cos ω(i - j), j = 0 .., of row i; NULL: 1. */
static const ls_real *apart(const linear *x, int64_t i)
{
    return x->turn == 0 ? NULL : x->apart + ROWS - 1 - i;
}

/* Row i of w becomes w_ij, 0 in the future; returns its sum. */
static double finish_weights(const linear *x, int64_t n, int64_t i)
{
    ls_real *w = x->w + i * n;
    const ls_real *by = apart(x, i);
    double sum = 0;
    for (int64_t j = 0; by != NULL && j <= i; j++) w[j] *= by[j];
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j <= i; j++) sum += (double)w[j];
    ls_zero(w + i + 1, n - i - 1);
    return sum;
}

/* The running state := the prefix. Returns its c. */
static ls_real load_prefix(const linear *x, ls_real *e)
{
    unpack(x, e);
    for (int64_t i = 0; i < x->F * (x->d + 1); i++) x->running[i] = (double)x->S[i];
    return x->exponentials > 0 ? e[0] : 0;
}

static void apply_piece(const linear *x, ls_chunk k, int64_t i, int64_t n, matrix v)
{
    const ls_view out = x->p->out;
    multiply(x, i, n);
    for (int64_t j = 0; j < n; j++)
        x->inverse[j] = inverse(x, finish_weights(x, n, j) + dot(x->F, x->A + (i + j) * x->F, x->z));
    ls_real *to = ls_row(out, k.b, k.h, k.t + i);
    ls_gemm(0, 0, n, x->d, n, 1, x->w, n, v.p, v.ld, 0, to, out.st);
    ls_gemm(0, 0, n, x->d, x->F, 1, x->A + i * x->F, x->F, x->S, x->d, 1, to, out.st);
    for (int64_t j = 0; j < n; j++, to += out.st)
        for (int64_t e = 0; e < x->d; e++) to[e] *= x->inverse[j];
}

ls_status ls_linear_causal(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_real c = load_prefix(&x, element(&x, p->summary[phase].got, b, h));
            for (int64_t t = 0; t < p->T; t += CAUSAL_ROWS) {
                const ls_chunk k = causal_chunk(&x, b, h, t);
                const matrix v = values(&x, k);
                load_features(&x, k);
                find_maxima(&x, k.n, c);
                for (int64_t i = 0, end; i < k.n; i = end) {
                    end = end_of_piece(&x, i, k.n);
                    rescale(&x, c, x.c[end - 1]);
                    c = x.c[end - 1];
                    load_piece(&x, i, end - i);
                    round_running(&x);
                    apply_piece(&x, k, i, end - i, (matrix){v.p + i * v.ld, v.ld});
                    gather(&x, end - i, x.B + i * x.F, v.p + i * v.ld, v.ld, NULL);
                }
            }
        }
    return LS_OK;
}

/* Row i of a piece, whose w, dw and dA hold a·b, do·v and S do: w := w / D, dw := dw/da·b, dA. A row of dA belongs to
 * row `at` of the chunk. */
static void row_backward(const linear *x, int64_t n, int64_t i, int64_t at)
{
    ls_real *w = x->w + i * n, *dw = x->dw + i * n, *A = x->A + at * x->F, *dA = x->dA + at * x->F;
    const double D = finish_weights(x, n, i) + dot(x->F, A, x->z);
    const ls_real by = inverse(x, D), *by_angle = apart(x, i);
    const int flows = D > x->floor && by > 0;
    const ls_real delta = flows ? (ls_real)((dot(i + 1, w, dw) + dot(x->F, A, dA)) / D) : 0;
    for (int64_t j = 0; j <= i; j++) {
        dw[j] = by * (dw[j] - delta);
        w[j] *= by;
    }
    for (int64_t j = 0; by_angle != NULL && j <= i; j++) dw[j] *= by_angle[j];
    ls_zero(dw + i + 1, n - i - 1);
    for (int64_t f = 0; f < x->F; f++) dA[f] = by * (dA[f] - delta * x->z[f]);
    x->inverse[at] = by;
    x->delta[at] = delta;
}

static void piece_backward(const linear *x, ls_chunk k, int64_t i, int64_t n, matrix v, matrix dout)
{
    const int64_t r = x->r, F = x->F, d = x->d;
    const ls_view dv = x->p->own.dv;
    multiply(x, i, n);
    ls_gemm(0, 1, n, n, d, 1, dout.p, dout.ld, v.p, v.ld, 0, x->dw, n);
    ls_gemm(0, 1, n, F, d, 1, dout.p, dout.ld, x->S, d, 0, x->dA + i * F, F);
    for (int64_t j = 0; j < n; j++) row_backward(x, n, j, i + j);
    turn_backward(x, i, n, x->dA, x->da);
    ls_gemm(0, 0, n, r, n, 1, x->dw, n, x->b + i * r, r, 1, x->da + i * r, r);
    ls_gemm(1, 0, n, r, n, 1, x->dw, n, x->a + i * r, r, 0, x->db + i * r, r);
    ls_gemm(1, 0, n, d, n, 1, x->w, n, dout.p, dout.ld, 0, ls_row(dv, k.b, k.h, k.t + i), dv.st);
    make_up(x, i, n, x->da);
    exponentiate_backward(x, i, n);
}

/* Sweep 1, forward in time: dq, and of dk and dv what comes from within chunks. */
static void sweep_past(const linear *x, int phase, int64_t b, int64_t h)
{
    ls_pass *p = x->p;
    ls_real c = load_prefix(x, element(x, p->summary[phase].got, b, h));
    for (int64_t t = 0; t < p->T; t += CAUSAL_ROWS) {
        const ls_chunk k = causal_chunk(x, b, h, t);
        const matrix v = values(x, k), dout = gradients(x, k);
        load_features(x, k);
        find_maxima(x, k.n, c);
        for (int64_t i = 0, end; i < k.n; i = end) {
            end = end_of_piece(x, i, k.n);
            rescale(x, c, x->c[end - 1]);
            c = x->c[end - 1];
            load_piece(x, i, end - i);
            round_running(x);
            piece_backward(x, k, i, end - i, (matrix){v.p + i * v.ld, v.ld}, (matrix){dout.p + i * dout.ld, dout.ld});
            gather(x, end - i, x->B + i * x->F, v.p + i * v.ld, v.ld, NULL);
        }
        x->map->queries_backward(p, k, x->da);
        x->map->keys_backward(p, k, x->db, 0);
        memcpy(x->all_c + t, x->c, (size_t)k.n * sizeof *x->c);
        memcpy(x->all_inverse + t, x->inverse, (size_t)k.n * sizeof *x->inverse);
        memcpy(x->all_delta + t, x->delta, (size_t)k.n * sizeof *x->delta);
    }
}

/* Sweep 2, backward in time: the gradient of the state is gathered from the queries, and keys before them take theirs.
 */
static void sweep_future(const linear *x, int phase, int64_t b, int64_t h)
{
    ls_pass *p = x->p;
    ls_real later = p->T > 0 ? x->all_c[p->T - 1] : 0;
    clear_running(x);
    for (int64_t t = (p->T - 1) / CAUSAL_ROWS * CAUSAL_ROWS; t >= 0 && p->T > 0; t -= CAUSAL_ROWS) {
        const ls_chunk k = causal_chunk(x, b, h, t);
        const matrix v = values(x, k), dout = gradients(x, k);
        load_features(x, k);
        memcpy(x->c, x->all_c + t, (size_t)k.n * sizeof *x->c);
        for (int64_t end = k.n, i; end > 0; end = i) {
            i = start_of_piece(x, end);
            rescale(x, x->c[end - 1], later);
            later = x->c[end - 1];
            load_piece(x, i, end - i);
            round_running(x);
            take_gradients(x, k, i, end - i, v, 1);
            for (int64_t j = i; j < end; j++) {
                const ls_real by = x->all_inverse[t + j];
                for (int64_t f = 0; f < x->F; f++) x->A[j * x->F + f] *= by;
                x->delta[j] = -x->all_delta[t + j];
            }
            gather(x, end - i, x->A + i * x->F, dout.p + i * dout.ld, dout.ld, x->delta + i);
        }
        x->map->keys_backward(p, k, x->db, 1);
    }
    if (x->exponentials > 0) rescale(x, element(x, p->summary[phase].got, b, h)[0], later);
    pack(x, 0, element(x, p->summary[phase].dgot, b, h));
}

ls_status ls_linear_causal_backward(ls_pass *p, const ls_feature_map *map, int phase)
{
    const linear x = begin(p, map);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            sweep_past(&x, phase, b, h);
            sweep_future(&x, phase, b, h);
        }
    return LS_OK;
}
