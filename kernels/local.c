/* Local attention (Luong et al., 2015): a query sees the keys of a window.
 *
 *   NS: j in [i-w, i+w]    CS: j in [i-w+1, i]    NC, CC: j in [c_i-w, c_i+w] around a centre
 *   monotonic alignment (local-m): c_i = floor((2i+1) S / 2T)
 *   predictive alignment (local-p): c_i = round(p_i),  p_i = S' σ(u·tanh(W q_i)),  S' = unpadded keys - 1
 *
 *   a_ij = softmax_j(scale q_i·k_j) over the unpadded keys of the window,  o_i = Σ_j a_ij g_ij v_j
 *   g_ij = 1, but in local-p the Gaussian e^(-2 (j - p_i)² / w²), of deviation w/2
 *
 * Keys and values within reach are fetched: one interval of them, or in local-p a list for each head, since the data
 * say where: at most min(S, (2w+1) T) keys for the T queries of a rank, few where neighbours look at the same place. A
 * tile is a few queries, in the order of their windows, against the run of keys that these cover together; most of its
 * products lie in somebody's window, and whole windows are in it, so nothing is kept for backward but p and the order.
 *
 * Backward, with b_ij = do_i·v_j and δ_i = Σ_j a_ij g_ij b_ij:
 *   dv_j = Σ_i a g do_i,  ds = a (g b - δ),  dq_i = scale Σ_j ds k_j,  dk_j = scale Σ_i ds q_i
 *   dp_i = Σ_j a g b · 4 (j - p_i) / w²;  the window itself is a constant. With h = tanh(W q), z = u·h:
 *   dz = dp p (1 - p/S'),  du = Σ_i dz h,  d(W q) = dz u (1 - h²)
 *
 * A centre must be the same however the rows are spread over ranks: p is made in double, sum by sum in one order.
 *
 * saved (local-p): p (B,H,T) in double, the order (B,H,T). State of a step: CS the last w keys and values; CC the cache
 * of the source, spread over ranks, each of which gives (m, l, out) of its part of the window, summed by softsum. */
#include "local.h"

#include "gemm.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_local_cuda;

enum { TQ = 16, BLOCK = 64 };                       /* queries of a tile, of a block */
enum { SIDE_BY_SIDE = 256, WIDE = 1024 };           /* reals of the heads that a block brings; rows of a wide band */
enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS }; /* of the sort */
enum {
    LANES = 16,
    APART = 16
};                      /* rows of scores are whole vectors; rows that long meet in one place
                           of a cache, so transposed ones are this much longer */
enum { CENTRE, ORDER }; /* saved[]: doubles, int64_t */
enum { QUERIES, DOUT, ROWS, SCORES, DSCORES, GAUSS, HIDDEN, DCENTRE, PREDICT, SORT, BAND }; /* work[] */

static const ls_option_info options[] = {
    {"window", "w", 15, 1, 1 << 30, 1, "keys on each side of the centre; in causal self attention, keys in all"},
    {"align", "align", 0, 0, 1, 1,
     "noncausal cross attention: 0 monotonic, 1 predictive; causal cross: always predictive"},
    {.name = NULL},
};

static int predictive(const ls_pass *p)
{
    return ls_local_predicts(p->pattern, p->option);
}

static int monotonic(const ls_pass *p)
{
    return !predictive(p);
}

static int params(const ls_attention_options *o, ls_param_info *list)
{
    const int64_t H = o->num_heads, d = o->embed_dim / H;
    const double scale = 1 / sqrt((double)d);
    if (!ls_local_predicts(o->pattern, o->value)) return 0;
    list[MAP] = (ls_param_info){"W", 3, {H, d, d}, 0, 0, LS_INIT_NORMAL, scale};
    list[VECTOR] = (ls_param_info){"u", 2, {H, d}, 0, 0, LS_INIT_NORMAL, scale};
    return 2;
}

static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    if (ls_local_predicts(o->pattern, o->value)) form->input[0].made = LS_ALIKE;
}

static int64_t whole_vectors(int64_t n)
{
    return (n + LANES - 1) / LANES * LANES;
}

/* Keys that a tile may cover: the windows of TQ neighbours, or all that there are. */
static int64_t tile_width(const ls_pass *p)
{
    return whole_vectors(ls_min(2 * (int64_t)p->option[WINDOW] + TQ, p->all_keys));
}

/* See band. */
static int brings_rows(const ls_pass *p)
{
    return monotonic(p) && p->T > TQ;
}

/* Rows of the keys of a block, at most. */
static int64_t band_rows(const ls_pass *p)
{
    return ls_min(2 * (int64_t)p->option[WINDOW] + BLOCK, p->all_keys);
}

/* Heads that a block brings at a time: less of them where windows are so wide that no cache would hold the rows. */
static int64_t band_heads(const ls_pass *p)
{
    const int64_t heads = ls_min(SIDE_BY_SIDE / p->d, WIDE / ls_max(band_rows(p), 1));
    return ls_min(ls_max(heads, 1), p->H);
}

/* k, v, the turned k; backward v becomes dv when it is turned, and there is dk. */
static int64_t band_reals(const ls_pass *p)
{
    const int64_t rows = band_rows(p) * p->d;
    const int64_t turned = (whole_vectors(band_rows(p)) + APART) * p->d;
    return p->backward ? 3 * rows + 2 * turned : 2 * rows + turned;
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t width = tile_width(p), d = p->d, back = p->backward, guess = predictive(p);
    const int64_t rows = guess ? p->B * p->H * p->T : 0;
    p->saved[CENTRE] = ls_arena_take(saved, (size_t)rows * sizeof(double));
    p->saved[ORDER] = ls_arena_take(saved, (size_t)rows * sizeof(int64_t));
    p->work[QUERIES] = ls_take(work, TQ * d);
    p->work[DOUT] = ls_take(work, back * TQ * d);
    p->work[ROWS] = ls_take(work, TQ * d);
    p->work[SCORES] = ls_take(work, TQ * width);
    p->work[DSCORES] = ls_take(work, back * TQ * width);
    p->work[GAUSS] = ls_take(work, guess * width);
    p->work[HIDDEN] = ls_take(work, width);
    p->work[DCENTRE] = ls_take(work, back * rows);
    p->work[PREDICT] = ls_arena_take(work, (size_t)(guess * (d + 3) * d) * sizeof(double));
    p->work[SORT] = ls_arena_take(work, (size_t)(guess * (p->T + DIGITS + 1)) * sizeof(int64_t));
    p->work[BAND] = ls_take(work, brings_rows(p) ? band_heads(p) * band_reals(p) : 0);
}

/* ------------------------------------------------------------------------------------------------ windows */

static double *centres_of(const ls_pass *p, int64_t b, int64_t h)
{
    return (double *)(void *)p->saved[CENTRE] + (b * p->H + h) * p->T;
}

static int64_t *order_of(const ls_pass *p, int64_t b, int64_t h)
{
    return (int64_t *)(void *)p->saved[ORDER] + (b * p->H + h) * p->T;
}

static int64_t monotonic_centre(const ls_pass *p, int64_t i)
{
    return ls_local_monotonic(i, p->all_queries, p->all_keys);
}

/* Monotonic windows only grow in i, so those of [i, i + n) reach from that of the first to that of the last. */
static ls_span reach(const ls_pass *p, int64_t i, int64_t n)
{
    const int64_t w = (int64_t)p->option[WINDOW];
    if (p->pattern == LS_CS) return (ls_span){0, i - w + 1, n + w - 1};
    const int64_t first = p->pattern == LS_NS ? i : monotonic_centre(p, i);
    const int64_t last = p->pattern == LS_NS ? i + n - 1 : monotonic_centre(p, i + n - 1);
    return (ls_span){0, first - w, last - first + 2 * w + 1};
}

/* The keys that row t sees, of those that exist; a padded row sees none. */
static ls_span window(const ls_pass *p, int64_t b, int64_t h, int64_t t)
{
    const int64_t w = (int64_t)p->option[WINDOW];
    if (ls_is_padded(p->pad_q, b * p->T + t)) return (ls_span){0, 0, 0};
    ls_span s = {0, 0, 2 * w + 1};
    if (predictive(p))
        s.lo = ls_local_predicted(centres_of(p, b, h)[t]) - w;
    else
        s = reach(p, p->query_span[0].lo + t, 1);
    return ls_local_clip(s.lo, s.n, p->all_keys);
}

/* The window of the query that is number s in the order of windows. The GPU left a copy of the centres in that order,
 * those of padded queries at the end as all_keys. */
static ls_span ordered_window(const ls_pass *p, int64_t b, int64_t h, int64_t s)
{
    if (p->queue == NULL) return window(p, b, h, order_of(p, b, h)[s]);
    const int64_t w = (int64_t)p->option[WINDOW], c = ((const int64_t *)p->host)[(b * p->H + h) * p->T + s];
    return c < p->all_keys ? ls_local_clip(c - w, 2 * w + 1, p->all_keys) : (ls_span){0, 0, 0};
}

/* Rows of the halo, one window after the other: in a list, those that no window before had are new ones. */
typedef struct cursor {
    int64_t rows, end; /* rows so far, the position where they end */
} cursor;

static int64_t locate(const ls_pass *p, cursor *c, ls_span k)
{
    if (p->halo.first == NULL) return k.lo - p->halo.span[0].lo;
    if (k.lo > c->end) c->end = k.lo;
    const int64_t row = c->rows - (c->end - k.lo);
    c->rows += k.lo + k.n - c->end;
    c->end = k.lo + k.n;
    return row;
}

/* The list of (b,h): its windows in order, with those that meet made one. */
static int64_t wanted(const ls_pass *p, int64_t b, int64_t h, ls_span *list)
{
    int64_t n = 0, end = -1;
    for (int64_t s = 0; s < p->T; s++) {
        const ls_span k = ordered_window(p, b, h, s);
        if (k.n == 0) continue;
        if (k.lo > end) {
            if (list != NULL) list[n] = k;
            n++;
        } else if (list != NULL)
            list[n - 1].n = k.lo + k.n - list[n - 1].lo;
        end = k.lo + k.n;
    }
    return n;
}

/* ------------------------------------------------------------------------------------------------ centres */

/* Unpadded keys of each batch row, see ls_local_last_key. */
static ls_monoid counts(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B, .plain = 2};
}

static ls_status count(ls_pass *p, int phase)
{
    ls_real *sent = p->summary[phase + 1].sent;
    for (int64_t b = 0; b < p->B; b++) {
        int64_t n = 0;
        for (int64_t j = 0; j < p->S; j++) n += !ls_is_padded(p->own.pad, b * p->S + j);
        sent[2 * b] = (ls_real)(n / 4096);
        sent[2 * b + 1] = (ls_real)(n % 4096);
    }
    return LS_OK;
}

/* Where there is no other rank to count its keys, their number is a guess: there are no more than positions. */
static double last_key(const ls_pass *p, int64_t b)
{
    return fmin(ls_local_last_key(p->summary[CENTRES].got + 2 * b), (double)ls_max(0, p->all_keys - 1));
}

/* Of one head: Wᵀ (d,d), u (d), and room for h (d) and du (d), in double. */
typedef struct predictor {
    double *map, *vector, *hidden, *dvector;
} predictor;

static predictor load_predictor(const ls_pass *p, int64_t h)
{
    const int64_t d = p->d;
    const ls_real *W = p->params + p->param[MAP].offset + h * d * d, *u = p->params + p->param[VECTOR].offset + h * d;
    double *x = (double *)(void *)p->work[PREDICT];
    const predictor f = {x, x + d * d, x + d * d + d, x + d * d + 2 * d};
    for (int64_t c = 0; c < d; c++)
        for (int64_t e = 0; e < d; e++) f.map[e * d + c] = (double)W[c * d + e];
    for (int64_t c = 0; c < d; c++) f.vector[c] = (double)u[c];
    return f;
}

/* tanh x = 1 - 2 / (e^2x + 1) to double's absolute precision. e^y = 2^n e^r, n = rint(y / ln 2): n is in the low bits
 * of a sum with 1.5·2^52. Without branches, so that the loop around it becomes vector code; NaN stays NaN. */
static inline double smooth_tanh(double x)
{
    const double y = x > 20 ? 40 : x < -20 ? -40 : 2 * x;
    union {
        double x;
        uint64_t bits;
    } n = {y * 1.4426950408889634 + 6755399441055744.0}, scale = {0};
    const double whole = n.x - 6755399441055744.0;
    const double r = (y - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
    double e = 1.0 / 479001600;
    e = e * r + 1.0 / 39916800;
    e = e * r + 1.0 / 3628800;
    e = e * r + 1.0 / 362880;
    e = e * r + 1.0 / 40320;
    e = e * r + 1.0 / 5040;
    e = e * r + 1.0 / 720;
    e = e * r + 1.0 / 120;
    e = e * r + 1.0 / 24;
    e = e * r + 1.0 / 6;
    e = e * r + 0.5;
    e = e * r + 1;
    e = e * r + 1;
    scale.bits = (n.bits + 1023) << 52;
    return 1 - 2 / (e * scale.x + 1);
}

/* h = tanh(W q) */
static void predict(const predictor *f, int64_t d, const ls_real *q)
{
    double *restrict x = f->hidden;
    const double *m = f->map;
    int64_t e = 0;
    for (int64_t c = 0; c < d; c++) x[c] = 0;
    for (; e + 4 <= d; e += 4, m += 4 * d) {
        const double q0 = (double)q[e], q1 = (double)q[e + 1], q2 = (double)q[e + 2], q3 = (double)q[e + 3];
        for (int64_t c = 0; c < d; c++) x[c] += q0 * m[c] + q1 * m[d + c] + q2 * m[2 * d + c] + q3 * m[3 * d + c];
    }
    for (; e < d; e++, m += d)
        for (int64_t c = 0; c < d; c++) x[c] += (double)q[e] * m[c];
#pragma omp simd
    for (int64_t c = 0; c < d; c++) x[c] = smooth_tanh(x[c]);
}

/* The order of queries by centre, padded ones last: a radix sort, which keeps the order of equals. */
static int64_t sort_key(const ls_pass *p, int64_t b, const double *centre, int64_t t)
{
    return ls_is_padded(p->pad_q, b * p->T + t) ? p->all_keys : ls_local_predicted(centre[t]);
}

static void sort_queries(ls_pass *p, int64_t b, int64_t h)
{
    const double *centre = centres_of(p, b, h);
    int64_t *from = order_of(p, b, h), *to = (int64_t *)(void *)p->work[SORT], *begin = to + p->T;
    for (int64_t t = 0; t < p->T; t++) from[t] = t;
    for (int shift = 0; p->all_keys >> shift > 0; shift += DIGIT_BITS) {
        memset(begin, 0, (DIGITS + 1) * sizeof *begin);
        for (int64_t t = 0; t < p->T; t++) begin[1 + (sort_key(p, b, centre, t) >> shift) % DIGITS]++;
        for (int64_t i = 0; i < DIGITS; i++) begin[i + 1] += begin[i];
        for (int64_t s = 0; s < p->T; s++) to[begin[(sort_key(p, b, centre, from[s]) >> shift) % DIGITS]++] = from[s];
        int64_t *swap = from;
        from = to, to = swap;
    }
    if (from != order_of(p, b, h)) memcpy(order_of(p, b, h), from, (size_t)p->T * sizeof *from);
}

static ls_status centres(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const predictor f = load_predictor(p, h);
            for (int64_t t = 0; t < p->T; t++) {
                double z = 0;
                centres_of(p, b, h)[t] = 0;
                if (ls_is_padded(p->pad_q, b * p->T + t)) continue;
                predict(&f, p->d, ls_row(p->q, b, h, t));
                for (int64_t c = 0; c < p->d; c++) z += f.vector[c] * f.hidden[c];
                centres_of(p, b, h)[t] = last_key(p, b) / (1 + exp(-z));
            }
            sort_queries(p, b, h);
        }
    return LS_OK;
}

/* Queries [t, t + n), which QUERIES holds: d(W q) goes to ROWS, and du grows. */
static void predictor_backward(ls_pass *p, const predictor *f, int64_t b, int64_t h, int64_t t, int64_t n)
{
    const double last = last_key(p, b);
    for (int64_t r = 0; r < n; r++) {
        const double centre = centres_of(p, b, h)[t + r], dp = (double)p->work[DCENTRE][(b * p->H + h) * p->T + t + r];
        const double dz = last > 0 ? dp * centre * (1 - centre / last) : 0;
        predict(f, p->d, p->work[QUERIES] + r * p->d);
        for (int64_t c = 0; c < p->d; c++) {
            const double x = f->hidden[c];
            f->dvector[c] += dz * x;
            p->work[ROWS][r * p->d + c] = (ls_real)(dz * f->vector[c] * (1 - x * x));
        }
    }
}

static void centres_backward(ls_pass *p)
{
    const int64_t d = p->d;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const predictor f = load_predictor(p, h);
            const ls_real *W = p->params + p->param[MAP].offset + h * d * d;
            ls_real *dW = p->dparams + p->param[MAP].offset + h * d * d;
            ls_real *du = p->dparams + p->param[VECTOR].offset + h * d;
            for (int64_t c = 0; c < d; c++) f.dvector[c] = 0;
            for (int64_t t = 0; t < p->T; t += TQ) {
                const int64_t n = ls_min(TQ, p->T - t);
                ls_real *q = p->work[QUERIES], *dh = p->work[ROWS], *dq = p->work[DOUT];
                ls_clean_rows(p->q, b, h, t, n, d, p->pad_q, p->T, 1, q);
                predictor_backward(p, &f, b, h, t, n);
                ls_gemm(1, 0, d, d, n, 1, dh, d, q, d, 1, dW, d);
                ls_gemm(0, 0, n, d, d, 1, dh, d, W, d, 0, dq, d);
                for (int64_t r = 0; r < n; r++) ls_axpy(d, 1, dq + r * d, ls_row(p->dq, b, h, t + r));
            }
            for (int64_t c = 0; c < d; c++) du[c] += (ls_real)f.dvector[c];
        }
}

/* ------------------------------------------------------------------------------------------------ bands */

/* Keys of one head where tiles find them: n rows, of the halo those from `row` on. Tiles of neighbours have most of
 * their keys in common, so a block of monotonic windows brings its rows together, also as columns, and adds up
 * their gradients there. In local-p, and for a few queries, they are where the halo has them. */
typedef struct band {
    int64_t row, n, st, dst, ld;
    ls_real *k, *v, *dk, *dv;     /* (n,d): k, v rows st apart, dk, dv rows dst */
    ls_real *turned_k, *turned_v; /* (d,ld); NULL: not made */
} band;

/* Of head number i of those that a block brings. */
static band band_of(const ls_pass *p, int64_t i, ls_span keys)
{
    const int64_t rows = band_rows(p) * p->d, ld = whole_vectors(band_rows(p)) + APART;
    ls_real *at = p->work[BAND] + i * band_reals(p);
    band x = {
        .row = keys.lo - p->halo.span[0].lo, .n = keys.n, .st = p->d, .dst = p->d, .ld = ld, .k = at, .v = at + rows};
    x.turned_k = at + 2 * rows;
    if (p->backward) x.turned_v = x.turned_k + ld * p->d, x.dk = x.turned_v + ld * p->d, x.dv = x.v;
    return x;
}

static band halo_of(const ls_pass *p, int64_t b, int64_t h)
{
    const ls_block *x = &p->halo;
    band whole = {.n = x->n, .st = x->k.st, .dst = x->dk.st, .k = ls_row(x->k, b, h, 0), .v = ls_row(x->v, b, h, 0)};
    if (p->backward) whole.dk = ls_row(x->dk, b, h, 0), whole.dv = ls_row(x->dv, b, h, 0);
    return whole;
}

/* The rows of heads [first, last), which lie side by side. */
static void bring(const ls_pass *p, int64_t b, int64_t first, int64_t last, ls_span keys)
{
    const size_t bytes = (size_t)p->d * sizeof(ls_real);
    const band x = band_of(p, 0, keys);
    for (int64_t j = 0; j < keys.n; j++)
        for (int64_t h = first; h < last; h++) {
            const int64_t at = (h - first) * band_reals(p) + j * p->d;
            memcpy(x.k + at, ls_row(p->halo.k, b, h, x.row + j), bytes);
            memcpy(x.v + at, ls_row(p->halo.v, b, h, x.row + j), bytes);
        }
    for (int64_t i = 0; i < last - first; i++) {
        const band one = band_of(p, i, keys);
        ls_transpose(one.n, p->d, one.k, p->d, one.turned_k, one.ld);
        if (!p->backward) continue;
        ls_transpose(one.n, p->d, one.v, p->d, one.turned_v, one.ld);
        ls_zero(one.dk, one.n * p->d);
        ls_zero(one.dv, one.n * p->d);
    }
}

/* Gradients go to the halo's: those of rows before `seen` have some from the blocks before. */
static void give_back(const ls_pass *p, int64_t b, int64_t first, int64_t last, ls_span keys, int64_t seen)
{
    const size_t bytes = (size_t)p->d * sizeof(ls_real);
    const band x = band_of(p, 0, keys);
    for (int64_t j = 0; j < keys.n; j++)
        for (int64_t h = first; h < last; h++) {
            const int64_t at = (h - first) * band_reals(p) + j * p->d;
            ls_real *dk = ls_row(p->halo.dk, b, h, x.row + j), *dv = ls_row(p->halo.dv, b, h, x.row + j);
            if (x.row + j < seen) {
                ls_axpy(p->d, 1, x.dk + at, dk);
                ls_axpy(p->d, 1, x.dv + at, dv);
            } else {
                memcpy(dk, x.dk + at, bytes);
                memcpy(dv, x.dv + at, bytes);
            }
        }
}

/* Rows [from, to) of the halo that nobody sees. */
static void give_nothing(const ls_pass *p, int64_t b, int64_t from, int64_t to)
{
    for (int64_t j = from; j < to; j++)
        for (int64_t h = 0; h < p->H; h++) {
            ls_zero(ls_row(p->halo.dk, b, h, j), p->d);
            ls_zero(ls_row(p->halo.dv, b, h, j), p->d);
        }
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* n queries against keys [row, row + keys) of the halo, of which query r sees [from, to). */
typedef struct tile {
    const band *x;
    int64_t b, h, n, row, keys, query[TQ];
    int32_t from[TQ], to[TQ];
    ls_real offset[TQ]; /* local-p: the first key of the window less p */
} tile;

typedef void tile_work(ls_pass *, const tile *);

/* Adds a query whose window is rows [row, row + k.n) of the halo. */
static void join(const ls_pass *p, tile *t, int64_t query, int64_t row, ls_span k)
{
    if (k.n > 0 && t->keys == 0) t->row = row;
    if (k.n > 0) t->keys = row + k.n - t->row;
    t->query[t->n] = query;
    t->from[t->n] = k.n > 0 ? (int32_t)(row - t->row) : 0;
    t->to[t->n] = t->from[t->n] + (int32_t)k.n;
    if (predictive(p)) t->offset[t->n] = (ls_real)((double)k.lo - centres_of(p, t->b, t->h)[query]);
    t->n++;
}

/* Queries [begin, end) of (b,h), in local-p in the order of their centres. */
static void tiles_of(ls_pass *p, const band *x, int64_t b, int64_t h, int64_t begin, int64_t end, tile_work *work)
{
    const int64_t width = tile_width(p), base = p->halo.first != NULL ? p->halo.first[b * p->H + h] : 0;
    tile t = {.x = x, .b = b, .h = h};
    cursor c = {0, 0};
    for (int64_t s = begin; s < end; s++) {
        const int64_t query = predictive(p) ? order_of(p, b, h)[s] : s;
        const ls_span k = window(p, b, h, query);
        const int64_t row = k.n > 0 ? base + locate(p, &c, k) : 0;
        if (t.n == TQ || (k.n > 0 && t.keys > 0 && row + k.n - t.row > width)) {
            work(p, &t);
            t.n = t.keys = 0;
        }
        join(p, &t, query, row, k);
    }
    if (t.n > 0) work(p, &t);
}

/* The keys of queries [begin, begin + *n), which are so few that a band holds them. */
static ls_span keys_of_block(const ls_pass *p, int64_t begin, int64_t *n)
{
    for (*n = ls_min(BLOCK, p->T - begin);; --*n) {
        const ls_span s = reach(p, p->query_span[0].lo + begin, *n), keys = ls_local_clip(s.lo, s.n, p->all_keys);
        if (keys.n <= band_rows(p) || *n == 1) return keys;
    }
}

static void blocks_of(ls_pass *p, int64_t b, tile_work *work)
{
    const int64_t heads = band_heads(p);
    int64_t seen = 0;
    for (int64_t begin = 0, n; begin < p->T; begin += n) {
        const ls_span keys = keys_of_block(p, begin, &n);
        const int64_t row = keys.lo - p->halo.span[0].lo;
        for (int64_t first = 0; first < p->H; first += heads) {
            const int64_t last = ls_min(first + heads, p->H);
            bring(p, b, first, last, keys);
            for (int64_t h = first; h < last; h++) {
                const band x = band_of(p, h - first, keys);
                tiles_of(p, &x, b, h, begin, begin + n, work);
            }
            if (p->backward) give_back(p, b, first, last, keys, seen);
        }
        if (p->backward) give_nothing(p, b, seen, row);
        seen = ls_max(seen, row + keys.n);
    }
    if (p->backward) give_nothing(p, b, seen, p->halo.n);
}

/* Calls work for tiles that hold every query of this rank once. */
static void each_tile(ls_pass *p, tile_work *work)
{
    for (int64_t b = 0; b < p->B; b++)
        if (brings_rows(p))
            blocks_of(p, b, work);
        else
            for (int64_t h = 0; h < p->H; h++) {
                const band x = halo_of(p, b, h);
                tiles_of(p, &x, b, h, 0, p->T, work);
            }
}

/* to (n,d) = scale · the tile's rows of v, 0 for queries that see nothing. */
static void load(const ls_pass *p, const tile *t, ls_view v, ls_real scale, ls_real *to)
{
    for (int64_t r = 0; r < t->n; r++, to += p->d) {
        const ls_real *from = ls_row(v, t->b, t->h, t->query[r]);
        if (t->to[r] == t->from[r])
            ls_zero(to, p->d);
        else
            for (int64_t e = 0; e < p->d; e++) to[e] = scale * from[e];
    }
}

static void store(const ls_pass *p, const tile *t, const ls_real *rows, ls_view v)
{
    for (int64_t r = 0; r < t->n; r++)
        memcpy(ls_row(v, t->b, t->h, t->query[r]), rows + r * p->d, (size_t)p->d * sizeof *rows);
}

/* The tile's first key in a band's k, v, dk or dv. */
static ls_real *first_row(const tile *t, ls_real *rows, int64_t st)
{
    return rows + (t->row - t->x->row) * st;
}

/* to (n,keys) = x (n,d) against the tile's keys or values. */
static void against_rows(const ls_pass *p, const tile *t, const ls_real *x, ls_real *rows, const ls_real *turned,
                         ls_real *to)
{
    const int64_t width = tile_width(p), d = p->d;
    if (turned != NULL)
        ls_gemm(0, 0, t->n, t->keys, d, 1, x, d, turned + t->row - t->x->row, t->x->ld, 0, to, width);
    else
        ls_gemm(0, 1, t->n, t->keys, d, 1, x, d, first_row(t, rows, t->x->st), t->x->st, 0, to, width);
}

/* SCORES (n,keys) = a, 0 outside of the windows and at padded keys, up to a whole vector. QUERIES holds scale·q. */
static void probabilities(ls_pass *p, const tile *t)
{
    const int64_t width = tile_width(p);
    ls_real *hidden = p->work[HIDDEN];
    const uint8_t *pad = p->halo.pad;
    if (pad != NULL) pad += t->row + (p->halo.first == NULL ? t->b * p->halo.n : 0);
    for (int64_t j = 0; j < t->keys; j++) hidden[j] = pad != NULL && pad[j] ? -INFINITY : 0;
    against_rows(p, t, p->work[QUERIES], t->x->k, t->x->turned_k, p->work[SCORES]);
    for (int64_t r = 0; r < t->n; r++) {
        ls_real *s = p->work[SCORES] + r * width, top = -INFINITY;
        const int32_t from = t->from[r], to = t->to[r], keys = (int32_t)whole_vectors(t->keys);
#pragma omp simd reduction(max : top)
        for (int32_t j = 0; j < keys; j++) {
            const ls_real x = j >= from && j < to ? s[j] + hidden[j] : -INFINITY;
            s[j] = x;
            top = x > top ? x : top;
        }
        const ls_real sum = ls_row_exp(keys, top, s), inverse = sum > 0 ? 1 / sum : 0;
        for (int32_t j = 0; j < keys; j++) s[j] *= inverse;
    }
}

/* g (keys) of query r of the tile. */
static void gaussian(const ls_pass *p, const tile *t, int64_t r, ls_real *g)
{
    const ls_real offset = t->offset[r], narrow = (ls_real)(-2 / (p->option[WINDOW] * p->option[WINDOW]));
    const int32_t from = t->from[r], keys = (int32_t)t->keys;
    for (int32_t j = 0; j < keys; j++) {
        const ls_real x = offset + (ls_real)(j - from);
        g[j] = ls_exp(narrow * x * x);
    }
}

/* ------------------------------------------------------------------------------------------------ forward */

static void forward_tile(ls_pass *p, const tile *t)
{
    const int64_t width = tile_width(p), d = p->d;
    load(p, t, p->q, (ls_real)p->scale, p->work[QUERIES]);
    probabilities(p, t);
    for (int64_t r = 0; predictive(p) && r < t->n; r++) {
        ls_real *a = p->work[SCORES] + r * width, *g = p->work[GAUSS];
        gaussian(p, t, r, g);
        for (int64_t j = 0; j < t->keys; j++) a[j] *= g[j];
    }
    ls_gemm(0, 0, t->n, d, t->keys, 1, p->work[SCORES], width, first_row(t, t->x->v, t->x->st), t->x->st, 0,
            p->work[ROWS], d);
    store(p, t, p->work[ROWS], p->out);
}

static ls_status windows(ls_pass *p, int phase)
{
    (void)phase;
    each_tile(p, forward_tile);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ backward */

/* a, b of one query become a g and ds. */
static void softmax_backward(int64_t keys, ls_real *a, ls_real *b)
{
    const ls_real delta = ls_dot(keys, a, b);
    for (int64_t j = 0; j < keys; j++) b[j] = a[j] * (b[j] - delta);
}

/* The same with g; returns dp. */
static ls_real gaussian_backward(const ls_pass *p, const tile *t, int64_t r, ls_real *a, ls_real *b)
{
    ls_real *g = p->work[GAUSS], delta = 0, slope = 0;
    const ls_real offset = t->offset[r];
    const int32_t from = t->from[r], keys = (int32_t)t->keys;
    gaussian(p, t, r, g);
#pragma omp simd reduction(+ : delta, slope)
    for (int32_t j = 0; j < keys; j++) {
        const ls_real weight = a[j] * g[j], gain = weight * b[j];
        g[j] = weight;
        b[j] = gain;
        delta += gain;
        slope += gain * (offset + (ls_real)(j - from));
    }
    for (int32_t j = 0; j < keys; j++) {
        b[j] -= a[j] * delta;
        a[j] = g[j];
    }
    return slope * (ls_real)(4 / (p->option[WINDOW] * p->option[WINDOW]));
}

static void backward_tile(ls_pass *p, const tile *t)
{
    const int64_t width = tile_width(p), d = p->d, st = t->x->st, dst = t->x->dst, vectors = whole_vectors(t->keys);
    ls_real *a = p->work[SCORES], *b = p->work[DSCORES], *q = p->work[QUERIES], *dout = p->work[DOUT];
    load(p, t, p->q, (ls_real)p->scale, q);
    load(p, t, p->dout, 1, dout);
    probabilities(p, t);
    against_rows(p, t, dout, t->x->v, t->x->turned_v, b);
    for (int64_t r = 0; r < t->n; r++) {
        ls_zero(b + r * width + t->keys, vectors - t->keys);
        if (predictive(p))
            p->work[DCENTRE][(t->b * p->H + t->h) * p->T + t->query[r]] =
                gaussian_backward(p, t, r, a + r * width, b + r * width);
        else
            softmax_backward(vectors, a + r * width, b + r * width);
    }
    ls_gemm(1, 0, t->keys, d, t->n, 1, a, width, dout, d, 1, first_row(t, t->x->dv, dst), dst);
    ls_gemm(1, 0, t->keys, d, t->n, 1, b, width, q, d, 1, first_row(t, t->x->dk, dst), dst);
    ls_gemm(0, 0, t->n, d, t->keys, p->scale, b, width, first_row(t, t->x->k, st), st, 0, p->work[ROWS], d);
    store(p, t, p->work[ROWS], p->dq);
}

static ls_status windows_backward(ls_pass *p, int phase)
{
    (void)phase;
    const int64_t B = p->halo.first == NULL ? p->B : 1, H = p->halo.first == NULL ? p->H : 1;
    if (!brings_rows(p)) {
        ls_zero_view(p->halo.dk, B, H, p->halo.n, p->d); /* tiles overlap: they add */
        ls_zero_view(p->halo.dv, B, H, p->halo.n, p->d);
    }
    each_tile(p, backward_tile);
    if (predictive(p)) centres_backward(p);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ step */

/* What this rank's part of the cache gives for each query row, (m; l, out), is a softsum element. */
static ls_monoid statistics(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * p->T, .has_max = 1, .scaled = 1 + p->d};
}

static void visit_row(ls_pass *p, int64_t b, int64_t h, int64_t t, ls_real *sent)
{
    const ls_block *v = &p->visit;
    const ls_span k = window(p, b, h, t), here = v->span[0];
    const int64_t lo = ls_max(k.lo, here.lo), n = ls_min(k.lo + k.n, here.lo + here.n) - lo,
                  row = here.row + lo - here.lo;
    ls_real *s = p->work[SCORES], *g = p->work[GAUSS], *q = p->work[QUERIES];
    ls_clean_rows(p->q, b, h, t, 1, p->d, p->pad_q, p->T, (ls_real)p->scale, q);
    for (int64_t j = 0; j < n; j++)
        s[j] = ls_is_padded(v->pad, b * v->n + row + j) ? -INFINITY : ls_dot(p->d, q, ls_row(v->k, b, h, row + j));
    const tile one = {.keys = n, .offset = {(ls_real)((double)lo - centres_of(p, b, h)[t])}};
    sent[0] = ls_row_max(n, s);
    sent[1] = ls_row_exp(n, sent[0], s);
    ls_zero(sent + 2, p->d);
    gaussian(p, &one, 0, g);
    for (int64_t j = 0; j < n; j++) ls_axpy(p->d, s[j] * g[j], ls_row(v->v, b, h, row + j), sent + 2);
}

static ls_status visit(ls_pass *p, int phase)
{
    ls_real *sent = p->summary[phase + 1].sent;
    for (int64_t row = 0; row < p->B * p->H * p->T; row++, sent += 2 + p->d)
        visit_row(p, row / p->T / p->H, row / p->T % p->H, row % p->T, sent);
    return LS_OK;
}

static ls_status finish(ls_pass *p, int phase)
{
    const ls_real *got = p->summary[phase].got;
    for (int64_t row = 0; row < p->B * p->H * p->T; row++, got += 2 + p->d) {
        ls_real *out = ls_row(p->out, row / p->T / p->H, row / p->T % p->H, row % p->T);
        for (int64_t e = 0; e < p->d; e++) out[e] = got[1] > 0 ? got[2 + e] / got[1] : 0;
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase self[] = {
    {.name = "windows",
     .crossing = LS_FETCH,
     .reach = reach,
     .fetches = LS_KEYS | LS_VALUES,
     .forward = windows,
     .backward = windows_backward},
    {.name = NULL},
};
static const ls_phase cross[] = {
    [COUNT] = {.name = "count", .needed = predictive, .forward = count, .constant = 1},
    [CENTRES] = {.name = "centres",
                 .crossing = LS_REDUCE,
                 .needed = predictive,
                 .monoid = counts,
                 .forward = centres,
                 .constant = 1},
    {.name = "windows",
     .crossing = LS_FETCH,
     .needed = monotonic,
     .reach = reach,
     .fetches = LS_KEYS | LS_VALUES,
     .forward = windows,
     .backward = windows_backward},
    {.name = "predicted windows",
     .crossing = LS_FETCH,
     .needed = predictive,
     .wanted = wanted,
     .fetches = LS_KEYS | LS_VALUES,
     .forward = windows,
     .backward = windows_backward},
    {.name = NULL},
};
static const ls_phase cross_step[] = {
    [COUNT] = {.name = "count", .forward = count, .of_source = 1},
    [CENTRES] = {.name = "centres", .crossing = LS_REDUCE, .monoid = counts, .forward = centres},
    {.name = "visit", .crossing = LS_RING, .forward = visit},
    {.name = "finish", .crossing = LS_REDUCE, .monoid = statistics, .forward = finish},
    {.name = NULL},
};

/* Monotonic centres divide the length of the keys. */
static int counts_padding(const ls_attention_options *o)
{
    return o->pattern == LS_NC && o->value[ALIGN] == 0;
}

static const char *idle(const ls_attention_options *o, const char *option)
{
    return o->pattern != LS_NC && strcmp(option, options[ALIGN].name) == 0 ? "it is for noncausal cross attention"
                                                                           : NULL;
}

const ls_mechanism ls_local_mechanism = {
    .name = "local",
    .option = options,
    .params = params,
    .counts_padding = counts_padding,
    .idle = idle,
    .layer = layer,
    .plan = plan,
    .phases = {self, self, cross, cross},
    .step = {[LS_CS] = self, [LS_CC] = cross_step},
    .cuda = LS_IF_CUDA(&ls_local_cuda),
};
