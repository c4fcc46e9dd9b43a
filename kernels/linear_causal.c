/* Causal linear attention: chunk by chunk, within a chunk by pairs, to what was before by the running state. Formulas
 * and the sweeps of backward: linear.c. */
#include "linear_rows.h"

/* Rows of a chunk: twice as many make states half as often, and pairs twice as many. */
enum { CHUNK = 32 };
_Static_assert(BLOCK % CHUNK == 0 && (int)CHUNK <= (int)CAUSAL_ROWS,
               "a block is whole chunks, for which there is room");

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

/* Rows [i, i + n) made ready: a and b seen from c at their end, B, and S, z, which are the sum so far. */
static void load_piece(linear *x, int64_t i, int64_t n)
{
    exponentiate(x, i, n, x->c[i + n - 1]);
    make_up(x, i, n, x->a);
    turn(x, i, n, x->b, x->B);
    use(x, x->sum);
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

/* The sums begin with the prefixes. */
static void load_prefixes(linear *x, int phase, int64_t b)
{
    clear_sums(x);
    for (int64_t h = 0; h < x->p->H; h++) {
        turn_to(x, h);
        x->seen_from[h] = unpack(x, element(x, x->p->summary[phase].got, b, h), x->sum);
    }
}

/* Where the state at the start of a block is kept for backward; NULL in a step. */
static ls_real *kept_state(const linear *x, chunk k)
{
    const ls_pass *p = x->p;
    return p->step ? NULL : p->saved[STATES] + ((k.b * blocks_of(p) + k.lo / x->block) * p->H + k.h) * kept_reals(p);
}

static void keep_state(const linear *x, chunk k)
{
    ls_real *to = kept_state(x, k);
    if (to == NULL) return;
    to[0] = x->seen_from[k.h];
    memcpy(to + 1, x->sum, (size_t)state_reals(x) * sizeof *to);
}

/* The sum is what was kept, as (d,F), and grows within the block alone. Returns its c. */
static ls_real recall_state(linear *x, chunk k)
{
    const int64_t F = x->F, d = x->d;
    const ls_real *from = kept_state(x, k), *S = from + 1, *z = S + F * d;
    x->sum = x->own, x->rest = NULL;
    ls_transpose(F, d, S, d, x->own, F);
    memcpy(x->own + F * d, z, (size_t)F * sizeof *z);
    return from[0];
}

/* Piece [i, i + n) of a chunk: out, not yet divided. */
static void apply_piece(const linear *x, int64_t i, int64_t n)
{
    const int64_t d = x->d, F = x->F;
    turn(x, i, n, x->a, x->A);
    multiply(x, i, n);
    for (int64_t j = 0; j < n; j++) {
        const double past = dot(F, x->A + (i + j) * F, x->z);
        set_inverse(x, i + j, past + weigh(n, apart_within(x, j), x->w + j * n));
    }
    ls_gemm_lower(0, n, d, x->w, n, x->v + i * d, d, 0, x->out + i * d, d);
    ls_gemm(0, 0, n, d, F, 1, x->A + i * F, F, x->S, d, 1, x->out + i * d, d);
}

ls_status ls_linear_causal_forward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const walk w = {.rows = p->T, .step = CHUNK, .reads = HAS_Q | HAS_K | HAS_V, .writes = HAS_OUT};
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
                gather(&x, end - i, x.B + i * x.F, x.v + i * x.d, NULL);
            }
            scale_rows(k.n, x.d, x.inverse, x.out);
        }
    }
    return LS_OK;
}

/* to (r) = s sines + c cosines of a row (F) of turned features at position `at`; or itself, where none are. */
static const ls_real *turn_back(const linear *x, int64_t at, const ls_real *turned, ls_real *to)
{
    const int64_t r = x->r;
    const ls_real s = x->sine[at], c = x->cosine[at];
    if (x->F == r) return turned;
    for (int64_t f = 0; f < r; f++) to[f] = s * turned[f] + c * turned[r + f];
    return to;
}

/* Row j of a piece that starts at row i of its chunk. w, dw, dA hold a·b, do·v, S do: w and dw become w / D and the
 * gradient of a·b, and da what a gets from the past. With A·z = a·z', z' being z turned back, the rest needs no A. */
static void row_backward(const linear *x, int64_t i, int64_t n, int64_t j)
{
    const int64_t r = x->r, at = i + j;
    ls_real *w = x->w + j * n, *dw = x->dw + j * n, *a = x->a + at * r, *da = x->da + at * r;
    const ls_real *z = turn_back(x, at, x->z, x->turned_z), *past = turn_back(x, at, x->dA + at * x->F, da);
    double here, before, from_before;
    two_dots(r, a, z, past, &before, &from_before);
    const double D = weigh_and_dot(n, apart_within(x, j), w, dw, &here) + before;
    set_inverse(x, at, D);
    const ls_real by = x->inverse[at];
    const ls_real delta = x->flows[at] > 0 ? (ls_real)((here + from_before) / D) : 0;
    weigh_backward(n, apart_within(x, j), by, delta, w, dw);
    for (int64_t f = 0; f < r; f++) da[f] = by * (past[f] - delta * z[f]);
    x->delta[at] = delta;
}

static void piece_backward(const linear *x, int64_t i, int64_t n)
{
    const int64_t r = x->r, F = x->F, d = x->d;
    const ls_real *dout = x->dout + i * d;
    multiply(x, i, n);
    ls_gemm(0, 1, n, n, d, 1, dout, d, x->v + i * d, d, 0, x->dw, n);
    ls_gemm(0, 0, n, F, d, 1, dout, d, x->S, F, 0, x->dA + i * F, F);
    for (int64_t j = 0; j < n; j++) row_backward(x, i, n, j);
    ls_gemm_lower(0, n, r, x->dw, n, x->b + i * r, r, 1, x->da + i * r, r);
    ls_gemm_lower(1, n, r, x->dw, n, x->a + i * r, r, 0, x->db + i * r, r);
    ls_gemm_lower(1, n, d, x->w, n, dout, d, 0, x->out + i * d, d);
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
    k->n = ls_min(CHUNK, k->hi - k->t);
    stand_at(x, k);
    x->db = x->all_db + (k->t - k->lo) * x->r;
    if (x->F == x->r) x->dB = x->db;
    load_causal(x, *k);
}

/* Sweep 1 through a block of one head, forward in time: dq, and of db and dv what comes from within chunks. */
static void sweep_past(linear *x, chunk k)
{
    ls_real *seen_from = x->seen_from + x->p->H;
    *seen_from = recall_state(x, k);
    for (k.t = k.lo; k.t < k.hi; k.t += k.n) {
        stand_at_chunk(x, &k);
        find_maxima(x, k.n, *seen_from);
        for (int64_t i = 0, end; i < k.n; i = end) {
            end = end_of_piece(x, i, k.n);
            see_from(x, x->p->H, x->c[end - 1]);
            load_piece(x, i, end - i);
            piece_backward(x, i, end - i);
            if (k.t + end < k.hi) gather(x, end - i, x->B + i * x->F, x->v + i * x->d, NULL);
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
    for (k.t = k.lo + (k.hi - k.lo - 1) / CHUNK * CHUNK; k.t >= k.lo; k.t -= CHUNK) {
        stand_at_chunk(x, &k);
        recall_rows(x, k);
        for (int64_t end = k.n, i; end > 0; end = i) {
            i = start_of_piece(x, end);
            see_gradient_from(x, k.h, x->c[end - 1]);
            load_piece(x, i, end - i);
            turn(x, i, end - i, x->a, x->A);
            take_gradients(x, i, end - i, 1);
            scale_rows(end - i, x->F, x->inverse + i, x->A + i * x->F);
            give_gradients(x, i, end - i);
        }
        finish_keys(x, k);
    }
}

ls_status ls_linear_causal_backward(ls_pass *p, int phase)
{
    linear x = begin(p);
    const ls_summary *s = &p->summary[phase];
    const walk w = {
        .rows = p->T, .reads = HAS_Q | HAS_K | HAS_V | HAS_DOUT, .writes = HAS_DQ | HAS_DK | HAS_OUT, .backward = 1};
    for (int64_t b = 0; b < p->B; b++) {
        clear_sums(&x);
        for (chunk k = before_all(&x, &w, b); next_block(&x, &w, &k);)
            for (; k.h < k.last; k.h++) {
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
