/* ProbSparse attention (Zhou et al., 2021, "Informer"): only the queries that tell keys apart look at them.
 *
 *   U = min(f ⌈ln S⌉, S) keys idx(i,·) are sampled for each query, u = min(f ⌈ln T⌉, T)
 *   M_i = max_s q_i·k_idx(i,s) - (1/S) Σ_s q_i·k_idx(i,s);  top = the u queries of largest M (ties: the smaller i)
 *   o_i = Σ_j softmax_j(scale q_i·k_j) v_j for i in top;  otherwise NS, NC: mean_j v_j, CS: Σ_{j<=i} v_j
 *
 * over unpadded j (CS: j <= i also in the softmax). S and T count the unpadded positions of a batch row, of all ranks:
 * padded keys are never sampled, padded queries never selected. ln 1 = 0: a lone query (u = 0) is not selected, and
 * with a lone key (U = 0) every M is 0. Selection is a constant to the gradient.
 *
 * Causal self attention masks the softmax and sums a prefix, but its selection looks at the whole sequence: which rows
 * are exact depends on later tokens, and on how many there are. So cutting the sequence changes earlier rows, and a row
 * is a function of its past only for a given `top`. There is no decoding step.
 *
 * What crosses: all keys visit every rank once in the forward pass, for the samples; everything else is O(B E u), the
 * candidates being 3 u reals per head from each rank.
 *
 *   counts → gather → totals → ring: scores → candidates → gather → the top, on every rank → their queries → reduce
 *   (sum) → partial softmaxes over own keys → reduce (softsum) → apply;  CS: and Σ v → scan (sum)
 *
 * The top must be the same on any number of ranks, so M may not depend on the order in which blocks visit. Every q·k is
 * made by one piece of code; max is exact; and each product is rounded to a multiple of one quantum, which the largest
 * |q| and |k| of the batch row give, so that the sum of all is exact in double: with 2^g >= U, 2^e >= |q·k| and
 * big = 3·2^(e+g), x + big - big rounds x to a multiple of 2^(e+g-51), and U of those stay below 2^51 quanta.
 *
 * The mean needs no code of its own: it is the softmax of a query that is 0, and joins the top as their row 0.
 *
 * Gradients, from e = e^(l - m) and a softsum (m, s, x), o = x/s: dx = do/s, ds = -do·o/s, then for each key
 *   dv = Σ_r e_r dx_r,  dl_r = e_r (dx_r·v + ds_r),  dk = scale Σ_r dl_r q_r,  dq_r = scale Σ_j dl_rj k_j
 * where the last is summed over ranks on its way back to the rank that owns the query. */
#include "gemm.h"
#include "probsparse.h"
#include "rng.h"
#include "tile.h"

extern const ls_cuda_mechanism ls_probsparse_cuda;

enum { ROWS, CHOSEN }; /* saved[] */
enum { NOTE, TOP, SUM, START, LIST, KEY_ROWS, HEAP, MARKS, SCALED, LOGITS, DLOGITS, KEYS, VALUES, PART, STATE };
enum { TK = 256 };                    /* keys worked on at a time */
enum { TQ = 4096, LISTED = 1 << 18 }; /* queries whose samples are listed at a time, and about how many samples */
enum { AHEAD = 4 };                   /* keys asked of memory before their turn */

static const ls_option_info options[] = {
    {"factor", "f", 5, 1, 1000, 1, "sampled keys per query and selected queries, times the log of their number"},
    {.name = NULL},
};

typedef struct candidate {
    ls_real score;
    int64_t index;
} candidate;

/* Whether the keys of a head may visit as they are, one row not right after the other: no other rank has any. */
static int has_gaps(const ls_pass *p)
{
    return p->S == p->all_keys && p->own.k.st != p->d;
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t R = ls_max(1, lead(p) + most_top(p)), d = p->d, U = count_of(p->option[FACTOR], p->all_keys);
    const int64_t scored = p->backward ? 0 : p->B * p->H * p->T; /* only forward scores */
    p->saved[ROWS] = ls_arena_take(saved, (size_t)p->B * sizeof(rows));
    p->saved[CHOSEN] = ls_arena_take(saved, (size_t)(p->B * p->H * most_top(p)) * sizeof(int64_t));
    p->work[NOTE] = ls_take(work, 2 * p->B);
    p->work[TOP] = ls_take(work, scored);
    p->work[SUM] = ls_arena_take(work, (size_t)scored * sizeof(double));
    p->work[START] = ls_arena_take(work, (TQ + 1) * sizeof(int64_t));
    p->work[LIST] = ls_arena_take(work, (size_t)(p->backward ? 0 : ls_max(LISTED, U) + AHEAD) * sizeof(int32_t));
    p->work[KEY_ROWS] =
        ls_arena_take(work, (size_t)(p->backward || p->own.pad == NULL ? 0 : p->visit.n) * sizeof(int32_t));
    p->work[HEAP] = ls_arena_take(work, (size_t)most_top(p) * sizeof(candidate));
    p->work[MARKS] = ls_arena_take(work, (size_t)p->T);
    p->work[SCALED] = ls_take(work, R * d);
    p->work[LOGITS] = ls_take(work, R * TK);
    p->work[DLOGITS] = ls_take(work, R * TK);
    p->work[KEYS] = ls_take(work, ls_max(TK * d, has_gaps(p) && !p->backward ? p->H * p->S * d : 0));
    p->work[VALUES] = ls_take(work, TK * d);
    p->work[PART] = ls_take(work, R * d);
    p->work[STATE] = ls_arena_take(work, (size_t)(R * (d + 2)) * sizeof(double));
}

static rows *rows_of(const ls_pass *p, int64_t b)
{
    return (rows *)(void *)p->saved[ROWS] + b;
}

/* The global positions (u) of the selected queries of (b,h), in rising order. */
static int64_t *chosen_of(const ls_pass *p, int64_t b, int64_t h)
{
    return (int64_t *)(void *)p->saved[CHOSEN] + (b * p->H + h) * most_top(p);
}

/* The row of a global position among this rank's queries, or -1. */
static int64_t own_row(const ls_pass *p, int64_t position)
{
    const int64_t t = position - p->query_span[0].lo;
    return t >= 0 && t < p->T ? t : -1;
}

/* ------------------------------------------------------------------------------------------------ counts */

/* Unpadded rows of a batch row, and the largest |x| in them. */
static int64_t count_rows(const ls_pass *p, ls_view x, const uint8_t *pad, int64_t b, int64_t n, ls_real *largest)
{
    int64_t count = 0;
    ls_real most = 0;
    for (int64_t t = 0; t < n; t++) {
        if (ls_is_padded(pad, b * n + t)) continue;
        count++;
        for (int64_t h = 0; h < p->H; h++) {
            const ls_real *row = ls_row(x, b, h, t);
#pragma omp simd reduction(max : most)
            for (int64_t e = 0; e < p->d; e++) {
                const ls_real size = row[e] < 0 ? -row[e] : row[e];
                most = size > most ? size : most;
            }
        }
    }
    *largest = most;
    return count;
}

static int64_t counts_piece(const ls_pass *p, int64_t lo, int64_t n)
{
    (void)lo, (void)n;
    return COUNTED * p->B + 1;
}

/* Given samples must be keys that exist, or -1. */
static int samples_exist(const ls_pass *p)
{
    const int64_t n = (p->samples_per_batch ? p->B : 1) * p->T * p->samples;
    int32_t most = -1, least = -1;
    for (int64_t i = 0; p->given_samples != NULL && i < n; i++) {
        const int32_t s = p->given_samples[i];
        most = s > most ? s : most;
        least = s < least ? s : least;
    }
    return least == -1 && most < p->all_keys;
}

/* Of each batch row: unpadded keys, unpadded queries (two reals each), largest |k|, largest |q|; at the end whether the
 * given samples are in order. */
static ls_status count(ls_pass *p, int phase)
{
    ls_real *to = p->gathered[phase + 1].mine;
    for (int64_t b = 0; b < p->B; b++, to += COUNTED) {
        put_integer(count_rows(p, p->own.k, p->own.pad, b, p->S, &to[4]), &to[0]);
        put_integer(count_rows(p, p->q, p->pad_q, b, p->T, &to[5]), &to[2]);
    }
    *to = samples_exist(p) ? 0 : 1;
    return LS_OK;
}

/* The pieces of all ranks become totals; what came before this rank's piece lies before its keys. */
static ls_status totals(ls_pass *p, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    const int64_t piece = counts_piece(p, 0, 0);
    int64_t needed = 0;
    double bad = 0;
    for (int64_t at = piece; at <= g->total; at += piece) bad += (double)g->all[at - 1];
    if (bad > 0)
        LS_FAIL(LS_ERR_ARGUMENT, "probsparse: samples must be keys from 0 to %lld, or -1 where there is none",
                (long long)p->all_keys - 1);
    for (int64_t b = 0; b < p->B; b++) {
        int64_t keys = 0, queries = 0, before = 0;
        double k = 0, q = 0;
        for (int64_t at = 0; at < g->total; at += piece) {
            const ls_real *from = g->all + at + b * COUNTED;
            if (at == g->before) before = keys;
            keys += integer_at(&from[0]);
            queries += integer_at(&from[2]);
            k = fmax(k, (double)from[4]);
            q = fmax(q, (double)from[5]);
        }
        rows r = {keys, count_of(p->option[FACTOR], keys), count_of(p->option[FACTOR], queries), 0};
        r.big = rounder((double)p->d * k * q, r.samples);
        *rows_of(p, b) = r;
        needed = ls_max(needed, r.samples);
        put_integer(before, p->work[NOTE] + 2 * b);
    }
    if (p->given_samples != NULL && p->samples < needed)
        LS_FAIL(LS_ERR_ARGUMENT,
                "probsparse: num_samples is %lld, but a batch row needs %lld: min(f ceil(ln n), n) of n keys",
                (long long)p->samples, (long long)needed);
    p->own.note = p->work[NOTE];
    for (int64_t i = 0; i < p->B * p->H * p->T; i++) {
        p->work[TOP][i] = -INFINITY;
        ((double *)(void *)p->work[SUM])[i] = 0;
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ scores */

static int64_t note_reals(const ls_pass *p)
{
    return 2 * p->B;
}

/* Lists the rows of the block's unpadded keys; returns how many there are. */
static int64_t list_keys(const ls_pass *p, int64_t b)
{
    const ls_block *v = &p->visit;
    int32_t *row = (int32_t *)(void *)p->work[KEY_ROWS];
    if (v->pad == NULL) return v->n;
    int64_t n = 0;
    for (int64_t j = 0; j < v->n; j++)
        if (!v->pad[b * v->n + j]) row[n++] = (int32_t)j;
    return n;
}

/* Which of a query's samples are in the visiting block: appends their rows, returns where the list goes on. Drawn by
 * (stream, draw; position, s): a 32-bit number w is the unpadded key ⌊w S / 2^32⌋ of the row, the same w for every b.
 */
static int32_t *list_samples(const ls_pass *p, int64_t b, int64_t t, int64_t first, int64_t n, int32_t *list)
{
    const rows *r = rows_of(p, b);
    const ls_block *v = &p->visit;
    if (p->given_samples != NULL) {
        const int32_t *given = p->given_samples + ((p->samples_per_batch ? b * p->T : 0) + t) * p->samples;
        for (int64_t s = 0; s < r->samples; s++) {
            const int64_t row = given[s] - v->span[0].lo;
            *list = (int32_t)row;
            list += given[s] >= 0 && row >= 0 && row < v->n;
        }
        return list;
    }
    const uint64_t position = (uint64_t)(p->query_span[0].lo + t);
    const int32_t *rows_there = v->pad == NULL ? NULL : (const int32_t *)(void *)p->work[KEY_ROWS];
    uint32_t word[4] = {0};
    for (int64_t s = 0; s < r->samples; s++) {
        if (s % 4 == 0)
            ls_random4(p->seed, p->stream * 65536u, (uint32_t)p->draw, position << 32 | (uint64_t)s / 4, word);
        const int64_t key = key_of(word[s % 4], r->keys) - first;
        if (key >= 0 && key < n) *list++ = rows_there == NULL ? (int32_t)key : rows_there[key];
    }
    return list;
}

/* The order of its additions is written out, so that a pair of rows gives the same bits wherever they meet. */
static ls_real product(int64_t d, const ls_real *x, const ls_real *y)
{
    ls_real sum[LANES] = {0};
    int64_t e = 0;
    for (; e + LANES <= d; e += LANES)
        for (int64_t l = 0; l < LANES; l++) sum[l] += x[e + l] * y[e + l];
    for (int64_t l = 0; e + l < d; l++) sum[l] += x[e + l] * y[e + l];
    for (int64_t n = LANES / 2; n > 0; n /= 2)
        for (int64_t l = 0; l < n; l++) sum[l] += sum[l + n];
    return sum[0];
}

/* Query t against n listed rows of keys. */
static void score(ls_pass *p, int64_t b, int64_t h, int64_t t, const ls_real *keys, const int32_t *row, int64_t n)
{
    const int64_t at = (b * p->H + h) * p->T + t, d = p->d;
    const ls_real *q = ls_row(p->q, b, h, t);
    const double big = rows_of(p, b)->big;
    ls_real top = p->work[TOP][at];
    double sum = ((double *)(void *)p->work[SUM])[at];
    for (int64_t i = 0; i < n; i++) {
        const ls_real *ahead = keys + row[i + AHEAD] * d;
        for (int64_t e = 0; e < d; e += (int64_t)(64 / sizeof *ahead)) __builtin_prefetch(ahead + e);
        const ls_real x = product(d, q, keys + row[i] * d);
        top = x > top ? x : top;
        sum += ((double)x + big) - big;
    }
    p->work[TOP][at] = top;
    ((double *)(void *)p->work[SUM])[at] = sum;
}

/* The visiting keys of a batch row, each head in one piece: rows met at random should not lie in a page each. */
static ls_view gapless_keys(ls_pass *p, int64_t b)
{
    const ls_block *v = &p->visit;
    if (v->k.st == p->d) return (ls_view){ls_row(v->k, b, 0, 0), 0, v->k.sh, p->d};
    const ls_view k = {p->work[KEYS], 0, v->n * p->d, p->d};
    for (int64_t h = 0; h < p->H; h++) ls_clean_rows(v->k, b, h, 0, v->n, p->d, v->pad, v->n, 1, ls_row(k, 0, h, 0));
    return k;
}

static ls_status scores(ls_pass *p, int phase)
{
    (void)phase;
    const ls_block *v = &p->visit;
    int64_t *start = (int64_t *)(void *)p->work[START];
    int32_t *list = (int32_t *)(void *)p->work[LIST];
    for (int64_t b = 0; b < p->B && v->n > 0; b++) {
        const int64_t U = rows_of(p, b)->samples;
        if (U == 0) continue;
        const int64_t first = integer_at(v->note + 2 * b), keys = list_keys(p, b);
        const int64_t at_once = ls_max(1, ls_min(TQ, LISTED / U));
        const ls_view k = gapless_keys(p, b);
        for (int64_t t = 0; t < p->T; t += at_once) {
            const int64_t n = ls_min(at_once, p->T - t);
            int32_t *end = list;
            for (int64_t i = 0; i < n; i++) {
                start[i] = end - list;
                if (!ls_is_padded(p->pad_q, b * p->T + t + i)) end = list_samples(p, b, t + i, first, keys, end);
            }
            start[n] = end - list;
            for (int64_t i = 0; i < AHEAD; i++) end[i] = 0;
            for (int64_t h = 0; h < p->H; h++)
                for (int64_t i = 0; i < n; i++)
                    score(p, b, h, t + i, ls_row(k, 0, h, 0), list + start[i], start[i + 1] - start[i]);
        }
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ selection */

/* The best `want` of the candidates offered so far, the worst of them on top of a heap. Candidates are offered by
 * rising index. */
typedef struct best {
    int64_t want, n;
    candidate *heap; /* (want) */
} best;

static int is_worse(candidate a, candidate b)
{
    return a.score < b.score || (a.score == b.score && a.index > b.index);
}

static void offer(best *x, candidate c)
{
    candidate *heap = x->heap;
    int64_t at = 0;
    if (x->n < x->want) { /* at the end, and up while it is worse */
        for (at = x->n++; at > 0 && is_worse(c, heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    } else { /* instead of the worst, and down while it is better */
        if (x->want == 0 || !is_worse(heap[0], c)) return;
        for (int64_t child = 1; child < x->n; child = 2 * at + 1) {
            if (child + 1 < x->n && is_worse(heap[child + 1], heap[child])) child++;
            if (!is_worse(heap[child], c)) break;
            heap[at] = heap[child];
            at = child;
        }
    }
    heap[at] = c;
}

static int is_among(const best *x, candidate c)
{
    return x->want > 0 && (x->n < x->want || !is_worse(c, x->heap[0]));
}

static int64_t offers_piece(const ls_pass *p, int64_t lo, int64_t n)
{
    (void)lo, (void)n;
    return most_top(p) * p->B * p->H * OFFERED;
}

/* M of query t; no number is worse than any. */
static candidate measured(const ls_pass *p, int64_t b, int64_t h, int64_t t)
{
    const rows *r = rows_of(p, b);
    const int64_t at = (b * p->H + h) * p->T + t;
    if (r->samples == 0) return (candidate){0, t};
    const double mean = ((double *)(void *)p->work[SUM])[at] / (double)r->keys;
    const ls_real M = (ls_real)((double)p->work[TOP][at] - mean);
    return (candidate){M == M ? M : -INFINITY, t};
}

/* This rank's candidates, by rising position: gathered as [slot][B][H] (M, position), -1 where a slot is not used. */
static ls_status offers(ls_pass *p, int phase)
{
    const int64_t BH = p->B * p->H;
    ls_real *mine = p->gathered[phase + 1].mine;
    ls_zero(mine, offers_piece(p, 0, 0));
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            best x = {.want = rows_of(p, b)->top, .heap = (candidate *)(void *)p->work[HEAP]};
            int64_t slot = 0;
            for (int64_t t = 0; t < p->T; t++)
                if (!ls_is_padded(p->pad_q, b * p->T + t)) offer(&x, measured(p, b, h, t));
            for (int64_t t = 0; t < p->T && slot < x.n; t++) {
                const candidate c = measured(p, b, h, t);
                if (ls_is_padded(p->pad_q, b * p->T + t) || !is_among(&x, c)) continue;
                ls_real *to = mine + (slot++ * BH + b * p->H + h) * OFFERED;
                to[0] = c.score;
                put_integer(p->query_span[0].lo + t, to + 1);
            }
            for (; slot < most_top(p); slot++) mine[(slot * BH + b * p->H + h) * OFFERED + 1] = -1;
        }
    return LS_OK;
}

/* The same candidates in the same order on every rank: ranks hold rising positions, so slots do too. */
static ls_status choice(ls_pass *p, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    const int64_t BH = p->B * p->H, slots = g->total / (BH * OFFERED);
    if (p->selected != NULL && BH * p->T > 0) memset(p->selected, 0, (size_t)(BH * p->T));
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            best x = {.want = rows_of(p, b)->top, .heap = (candidate *)(void *)p->work[HEAP]};
            int64_t *chosen = chosen_of(p, b, h), n = 0;
            const ls_real *from = g->all + (b * p->H + h) * OFFERED;
            for (int64_t s = 0; s < slots; s++)
                if (from[s * BH * OFFERED + 1] >= 0) offer(&x, (candidate){from[s * BH * OFFERED], s});
            for (int64_t s = 0; s < slots && n < x.want; s++) {
                const ls_real *c = from + s * BH * OFFERED;
                if (c[1] < 0 || !is_among(&x, (candidate){c[0], s})) continue;
                chosen[n++] = integer_at(c + 1);
                const int64_t t = own_row(p, chosen[n - 1]);
                if (p->selected != NULL && t >= 0) p->selected[(b * p->H + h) * p->T + t] = 1;
            }
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ queries */

static ls_monoid query_rows(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * most_top(p), .plain = p->d};
}

static ls_monoid value_sums(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H, .plain = p->d};
}

/* The owner of a selected query sends it, the others 0: the sum is the query. CS: and Σ v of this rank. */
static ls_status queries(ls_pass *p, int phase)
{
    const int64_t u = most_top(p), d = p->d;
    ls_real *sent = p->summary[PARTIAL].sent;
    (void)phase;
    ls_zero(sent, p->B * p->H * u * d);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            for (int64_t r = 0; r < rows_of(p, b)->top; r++) {
                const int64_t t = own_row(p, chosen_of(p, b, h)[r]);
                if (t >= 0)
                    memcpy(sent + ((b * p->H + h) * u + r) * d, ls_row(p->q, b, h, t), (size_t)d * sizeof *sent);
            }
            if (!is_causal(p)) continue;
            double *sum = (double *)(void *)p->work[STATE];
            for (int64_t e = 0; e < d; e++) sum[e] = 0;
            for (int64_t j = 0; j < p->S; j++) {
                if (ls_is_padded(p->own.pad, b * p->S + j)) continue;
                const ls_real *v = ls_row(p->own.v, b, h, j);
                for (int64_t e = 0; e < d; e++) sum[e] += (double)v[e];
            }
            ls_real *to = p->summary[PREFIX].sent + (b * p->H + h) * d;
            for (int64_t e = 0; e < d; e++) to[e] = (ls_real)sum[e];
        }
    return LS_OK;
}

static ls_status queries_backward(ls_pass *p, int phase)
{
    const int64_t u = most_top(p), d = p->d;
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            for (int64_t r = 0; r < rows_of(p, b)->top; r++) {
                const int64_t t = own_row(p, chosen_of(p, b, h)[r]);
                if (t >= 0)
                    ls_axpy(d, 1, p->summary[PARTIAL].dsent + ((b * p->H + h) * u + r) * d, ls_row(p->dq, b, h, t));
            }
            for (int64_t j = 0; is_causal(p) && j < p->S; j++)
                if (!ls_is_padded(p->own.pad, b * p->S + j))
                    ls_axpy(d, 1, p->summary[PREFIX].dsent + (b * p->H + h) * d, ls_row(p->own.dv, b, h, j));
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ partial softmax */

static ls_monoid softsums(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H * (lead(p) + most_top(p)), .has_max = 1, .scaled = 1 + p->d};
}

/* The softsum elements (m, s, x) of (b,h): the mean, where there is one, then the selected queries. */
static ls_real *elements(const ls_pass *p, ls_real *x, int64_t b, int64_t h)
{
    return x + (b * p->H + h) * (lead(p) + most_top(p)) * (p->d + 2);
}

/* SCALED (lead + u, d) = scale·q of the selected; 0 for the mean. Returns how many rows that is. */
static int64_t load_queries(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t d = p->d, first = lead(p), u = rows_of(p, b)->top;
    const ls_real *q = p->summary[PARTIAL].got + (b * p->H + h) * most_top(p) * d;
    ls_zero(p->work[SCALED], first * d);
    for (int64_t i = 0; i < u * d; i++) p->work[SCALED][first * d + i] = (ls_real)p->scale * q[i];
    return first + u;
}

/* Keys [t, t + n): clean rows in KEYS and VALUES, LOGITS (R,n) in rows of TK, -inf where a key may not be seen. */
static void load_keys(ls_pass *p, int64_t b, int64_t h, int64_t t, int64_t n, int64_t R)
{
    const int64_t d = p->d, lo = p->own.span[0].lo + t;
    ls_real *l = p->work[LOGITS];
    ls_clean_rows(p->own.k, b, h, t, n, d, p->own.pad, p->S, 1, p->work[KEYS]);
    ls_clean_rows(p->own.v, b, h, t, n, d, p->own.pad, p->S, 1, p->work[VALUES]);
    ls_gemm(0, 1, R, n, d, 1, p->work[SCALED], d, p->work[KEYS], d, 0, l, TK);
    for (int64_t r = 0; is_causal(p) && r < R; r++)
        for (int64_t j = ls_max(0, chosen_of(p, b, h)[r] + 1 - lo); j < n; j++) l[r * TK + j] = -INFINITY;
    for (int64_t j = 0; p->own.pad != NULL && j < n; j++)
        for (int64_t r = 0; p->own.pad[b * p->S + t + j] && r < R; r++) l[r * TK + j] = -INFINITY;
}

/* LOGITS and VALUES join the running sums; state (R, 2 + d) = m, s, x in double. */
static void join_keys(ls_pass *p, int64_t n, int64_t R, double *state)
{
    const int64_t d = p->d;
    for (int64_t r = 0; r < R; r++) {
        ls_real *l = p->work[LOGITS] + r * TK;
        double *to = state + r * (d + 2);
        const double here = (double)ls_row_max(n, l);
        if (here > to[0]) {
            const double shrink = to[0] == -INFINITY ? 0 : exp(to[0] - here);
            to[0] = here;
            for (int64_t i = 1; i < d + 2; i++) to[i] *= shrink;
        }
        to[1] += (double)ls_row_exp(n, (ls_real)to[0], l);
    }
    ls_gemm(0, 0, R, d, n, 1, p->work[LOGITS], TK, p->work[VALUES], d, 0, p->work[PART], d);
    for (int64_t r = 0; r < R; r++)
        for (int64_t e = 0; e < d; e++) state[r * (d + 2) + 2 + e] += (double)p->work[PART][r * d + e];
}

static ls_status partial(ls_pass *p, int phase)
{
    (void)phase;
    const int64_t d = p->d;
    double *state = (double *)(void *)p->work[STATE];
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const int64_t R = load_queries(p, b, h), reals = R * (d + 2);
            for (int64_t i = 0; i < reals; i++) state[i] = i % (d + 2) == 0 ? -INFINITY : 0;
            for (int64_t t = 0; t < p->S; t += TK) {
                const int64_t n = ls_min(TK, p->S - t);
                load_keys(p, b, h, t, n, R);
                join_keys(p, n, R, state);
            }
            ls_real *to = elements(p, p->summary[SUMS].sent, b, h);
            for (int64_t i = 0; i < reals; i++) to[i] = (ls_real)state[i];
            for (int64_t i = reals; i < (lead(p) + most_top(p)) * (d + 2); i++)
                to[i] = i % (d + 2) == 0 ? -INFINITY : 0;
        }
    return LS_OK;
}

/* LOGITS become e, DLOGITS e (dx·v + ds) of the chunk, from what was sent and its gradient. */
static void weigh_keys(ls_pass *p, int64_t n, int64_t R, const ls_real *sent, const ls_real *dsent)
{
    const int64_t d = p->d;
    ls_gemm(0, 1, R, n, d, 1, dsent + 2, d + 2, p->work[VALUES], d, 0, p->work[DLOGITS], TK);
    for (int64_t r = 0; r < R; r++, sent += d + 2, dsent += d + 2) {
        ls_real *l = p->work[LOGITS] + r * TK, *dl = p->work[DLOGITS] + r * TK;
        const ls_real m = sent[0] == -INFINITY ? 0 : sent[0], ds = dsent[1];
        for (int64_t j = 0; j < n; j++) {
            l[j] = ls_exp(l[j] - m);
            dl[j] = l[j] * (dl[j] + ds);
        }
    }
}

static ls_status partial_backward(ls_pass *p, int phase)
{
    const int64_t d = p->d, u = most_top(p), first = lead(p);
    double *dq = (double *)(void *)p->work[STATE];
    ls_zero(p->summary[phase].dgot, p->B * p->H * u * d);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            const int64_t R = load_queries(p, b, h);
            const ls_real *sent = elements(p, p->summary[SUMS].sent, b, h);
            const ls_real *dsent = elements(p, p->summary[SUMS].dsent, b, h);
            for (int64_t i = 0; i < R * d; i++) dq[i] = 0;
            for (int64_t t = 0; t < p->S; t += TK) {
                const int64_t n = ls_min(TK, p->S - t);
                const ls_view dk = p->own.dk, dv = p->own.dv;
                load_keys(p, b, h, t, n, R);
                weigh_keys(p, n, R, sent, dsent);
                ls_gemm(1, 0, n, d, R, 1, p->work[LOGITS], TK, dsent + 2, d + 2, 1, ls_row(dv, b, h, t), dv.st);
                ls_gemm(1, 0, n, d, R, 1, p->work[DLOGITS], TK, p->work[SCALED], d, 1, ls_row(dk, b, h, t), dk.st);
                ls_gemm(0, 0, R, d, n, p->scale, p->work[DLOGITS], TK, p->work[KEYS], d, 0, p->work[PART], d);
                for (int64_t i = 0; i < R * d; i++) dq[i] += (double)p->work[PART][i];
            }
            ls_real *to = p->summary[phase].dgot + (b * p->H + h) * u * d;
            for (int64_t i = first * d; i < R * d; i++) to[i - first * d] = (ls_real)dq[i];
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ apply */

/* o = x / s, 0 where there was no key. */
static void write_output(int64_t d, const ls_real *element, ls_real *out)
{
    for (int64_t e = 0; e < d; e++) out[e] = element[1] > 0 ? element[2 + e] / element[1] : 0;
}

/* dx = do / s, ds = -do·o / s */
static void give_back(int64_t d, const ls_real *element, const ls_real *dout, ls_real *delement)
{
    const double s = (double)element[1];
    double dot = 0;
    if (!(s > 0)) return;
    for (int64_t e = 0; e < d; e++) {
        delement[2 + e] = (ls_real)((double)dout[e] / s);
        dot += (double)dout[e] * (double)element[2 + e] / s;
    }
    delement[1] = (ls_real)(-dot / s);
}

/* Rows of the selected queries that are this rank's: over what stands there for the others. */
static void apply_selected(ls_pass *p, int64_t b, int64_t h)
{
    const ls_real *element = elements(p, p->summary[SUMS].got, b, h) + lead(p) * (p->d + 2);
    for (int64_t r = 0; r < rows_of(p, b)->top; r++, element += p->d + 2) {
        const int64_t t = own_row(p, chosen_of(p, b, h)[r]);
        if (t >= 0) write_output(p->d, element, ls_row(p->out, b, h, t));
    }
}

static void apply_mean(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t d = p->d;
    write_output(d, elements(p, p->summary[SUMS].got, b, h), p->work[PART]);
    for (int64_t t = 0; t < p->T; t++) {
        ls_real *out = ls_row(p->out, b, h, t);
        if (ls_is_padded(p->pad_q, b * p->T + t))
            ls_zero(out, d);
        else
            memcpy(out, p->work[PART], (size_t)d * sizeof *out);
    }
}

static void apply_prefix(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t d = p->d;
    const ls_real *before = p->summary[PREFIX].got + (b * p->H + h) * d;
    double *sum = (double *)(void *)p->work[STATE];
    for (int64_t e = 0; e < d; e++) sum[e] = (double)before[e];
    for (int64_t t = 0; t < p->T; t++) {
        const ls_real *v = ls_row(p->own.v, b, h, t);
        ls_real *out = ls_row(p->out, b, h, t);
        const int dead = ls_is_padded(p->pad_q, b * p->T + t);
        for (int64_t e = 0; !ls_is_padded(p->own.pad, b * p->S + t) && e < d; e++) sum[e] += (double)v[e];
        for (int64_t e = 0; e < d; e++) out[e] = dead ? 0 : (ls_real)sum[e];
    }
}

static ls_status apply(ls_pass *p, int phase)
{
    (void)phase;
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            if (is_causal(p))
                apply_prefix(p, b, h);
            else
                apply_mean(p, b, h);
            apply_selected(p, b, h);
        }
    return LS_OK;
}

/* The selected rows of this rank give their gradients to their elements. MARKS (T): 1 at rows that are selected or
 * padded, which owe nothing to the mean or the prefix. */
static void selected_backward(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t stride = p->d + 2;
    const ls_real *got = elements(p, p->summary[SUMS].got, b, h) + lead(p) * stride;
    ls_real *dgot = elements(p, p->summary[SUMS].dgot, b, h) + lead(p) * stride;
    uint8_t *mark = (uint8_t *)p->work[MARKS];
    for (int64_t t = 0; t < p->T; t++) mark[t] = (uint8_t)ls_is_padded(p->pad_q, b * p->T + t);
    for (int64_t r = 0; r < rows_of(p, b)->top; r++) {
        const int64_t t = own_row(p, chosen_of(p, b, h)[r]);
        if (t < 0) continue;
        mark[t] = 1;
        give_back(p->d, got + r * stride, ls_row(p->dout, b, h, t), dgot + r * stride);
    }
}

static void mean_backward(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t d = p->d;
    const uint8_t *mark = (const uint8_t *)p->work[MARKS];
    double *sum = (double *)(void *)p->work[STATE];
    for (int64_t e = 0; e < d; e++) sum[e] = 0;
    for (int64_t t = 0; t < p->T; t++) {
        const ls_real *dout = ls_row(p->dout, b, h, t);
        for (int64_t e = 0; !mark[t] && e < d; e++) sum[e] += (double)dout[e];
    }
    for (int64_t e = 0; e < d; e++) p->work[PART][e] = (ls_real)sum[e];
    give_back(d, elements(p, p->summary[SUMS].got, b, h), p->work[PART], elements(p, p->summary[SUMS].dgot, b, h));
}

/* A value has its gradient from the rows that are not before it; those of later ranks come back through the scan. */
static void prefix_backward(ls_pass *p, int64_t b, int64_t h)
{
    const int64_t d = p->d;
    const uint8_t *mark = (const uint8_t *)p->work[MARKS];
    double *sum = (double *)(void *)p->work[STATE];
    for (int64_t e = 0; e < d; e++) sum[e] = 0;
    for (int64_t t = p->T - 1; t >= 0; t--) {
        const ls_real *dout = ls_row(p->dout, b, h, t);
        ls_real *dv = ls_row(p->own.dv, b, h, t);
        for (int64_t e = 0; !mark[t] && e < d; e++) sum[e] += (double)dout[e];
        for (int64_t e = 0; !ls_is_padded(p->own.pad, b * p->S + t) && e < d; e++) dv[e] = (ls_real)sum[e];
    }
    ls_real *to = p->summary[PREFIX].dgot + (b * p->H + h) * d;
    for (int64_t e = 0; e < d; e++) to[e] = (ls_real)sum[e];
}

static ls_status apply_backward(ls_pass *p, int phase)
{
    ls_zero(p->summary[phase].dgot, ls_monoid_size(softsums(p)));
    ls_zero_view(p->dq, p->B, p->H, p->T, p->d);
    ls_zero_view(p->own.dk, p->B, p->H, p->S, p->d);
    ls_zero_view(p->own.dv, p->B, p->H, p->S, p->d);
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++) {
            selected_backward(p, b, h);
            if (is_causal(p))
                prefix_backward(p, b, h);
            else
                mean_backward(p, b, h);
        }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ table */

static const ls_phase phases[] = {
    [COUNT] = {.name = "count", .forward = count, .constant = 1},
    [TOTALS] = {.name = "totals", .crossing = LS_GATHER, .piece = counts_piece, .forward = totals, .constant = 1},
    [SCORES] =
        {.name = "scores", .crossing = LS_RING, .keys_only = 1, .notes = note_reals, .forward = scores, .constant = 1},
    [OFFERS] = {.name = "offers", .forward = offers, .constant = 1},
    [CHOICE] = {.name = "choice", .crossing = LS_GATHER, .piece = offers_piece, .forward = choice, .constant = 1},
    [QUERIES] = {.name = "queries", .forward = queries, .backward = queries_backward},
    [PARTIAL] = {.name = "partial",
                 .crossing = LS_REDUCE,
                 .monoid = query_rows,
                 .forward = partial,
                 .backward = partial_backward},
    [PREFIX] = {.name = "prefix", .crossing = LS_SCAN, .monoid = value_sums, .needed = is_causal},
    [SUMS] = {.name = "apply", .crossing = LS_REDUCE, .monoid = softsums, .forward = apply, .backward = apply_backward},
    {.name = NULL},
};

/* Scores are compared: queries and keys have the same bits however the rows are spread. */
static void layer(const ls_attention_options *o, ls_layer_form *form)
{
    (void)o;
    form->input[0].made = form->input[1].made = LS_ALIKE;
}

const ls_mechanism ls_probsparse_mechanism = {
    .name = "probsparse",
    .option = options,
    .layer = layer,
    .plan = plan,
    .phases = {[LS_NS] = phases, [LS_CS] = phases, [LS_NC] = phases},
    .cuda = LS_IF_CUDA(&ls_probsparse_cuda),
    .draws = LS_GIVEN_SAMPLES,
};
