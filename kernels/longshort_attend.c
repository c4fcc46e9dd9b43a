/* Longshort: one softmax over far vectors and near keys, a tile of queries at a time.
 *
 *   scores of a tile (queries, far + near) = [q·(K̃ + R_chunk(δ)), (q + r_w)·k + (q + r_r)·R_win(i - j)]   (NS: no R, r)
 *   P = softmax of each row over what its query sees,  o = P [Ṽ; v]
 *
 * In CS the queries of a tile are of one chunk index: so they all see the same vectors, at the same distances, and the
 * term of the distance is added to the keys once for all of them. In a step, far is one vector: see look_far. Nothing
 * is saved but the halo: the backward pass makes the probabilities anew. */
#include "longshort.h"

typedef struct tile {
    int64_t b, h, row, n, first; /* queries: rows [row, row + n), at global positions from first */
    int64_t far;                 /* far vectors they see */
    int64_t key, keys;           /* near keys, for any of them: rows [key, key + keys) of the halo */
} tile;

static int is_causal(const ls_pass *p)
{
    return p->pattern == LS_CS;
}

static tile next_tile(const ls_pass *p, int64_t b, int64_t h, int64_t row, int far)
{
    const longshort_memory *m = memory_of(p);
    const ls_span q = p->query_span[0], halo = p->halo.span[0];
    const int64_t w = (int64_t)p->option[WINDOW], r = vectors(p), first = q.lo + row;
    const int64_t unit = is_causal(p) ? chunk_length(p) : w > TILE ? w : TILE / w * w;
    const int64_t end = ls_min(ls_min((first / unit + 1) * unit, first + TILE), q.lo + q.n);
    const ls_span a = ls_longshort_sight(p, first), z = ls_longshort_sight(p, end - 1);
    const int64_t from = ls_max(a.lo, halo.lo), to = ls_min(z.lo + z.n, halo.lo + halo.n);
    const int64_t vectors_seen = !far ? 0 : is_causal(p) && !p->step ? first / chunk_length(p) * r : m->N;
    return (tile){b, h, row, end - first, first, vectors_seen, from - halo.lo, ls_max(0, to - from)};
}

/* ------------------------------------------------------------------------------------------------ window */

static ls_real *near_rows(const ls_pass *p, int which, const tile *t)
{
    return memory_of(p)->near[which] + ((t->b * p->H + t->h) * p->halo.n + t->key) * p->d;
}

static void normalise_window(const ls_pass *p)
{
    const longshort_memory *m = memory_of(p);
    const int64_t n = p->halo.n;
    for (int i = 0; i < 2; i++)
        for (int64_t b = 0; b < p->B; b++)
            for (int64_t t = 0; t < n; t += BLOCK) {
                const int64_t rows = ls_min(BLOCK, n - t);
                gather_rows(i == KEYS ? p->halo.k : p->halo.v, b, t, rows, p->H, p->d, m->block[0]);
                ls_longshort_norm(p, NEAR_WEIGHT, rows, m->block[0], m->block[1]);
                scatter_rows(m->block[1], t, rows, p->H, p->d, ls_heads_apart(m->near[i], p->H, n, p->d), b);
            }
}

/* Gradients of normalised rows become, in their place, gradients of the halo's rows. */
static void normalise_window_backward(const ls_pass *p)
{
    const longshort_memory *m = memory_of(p);
    const int64_t n = p->halo.n;
    for (int i = 0; i < 2; i++) {
        const ls_view grad = i == KEYS ? p->halo.dk : p->halo.dv;
        for (int64_t b = 0; b < p->B; b++)
            for (int64_t t = 0; t < n; t += BLOCK) {
                const int64_t rows = ls_min(BLOCK, n - t);
                gather_rows(i == KEYS ? p->halo.k : p->halo.v, b, t, rows, p->H, p->d, m->block[0]);
                gather_rows(grad, b, t, rows, p->H, p->d, m->block[1]);
                ls_longshort_norm_backward(p, NEAR_WEIGHT, rows, m->block[0], m->block[1], m->block[1]);
                scatter_rows(m->block[1], t, rows, p->H, p->d, grad, b);
            }
    }
}

/* ------------------------------------------------------------------------------------------------ tables */

/* table (H,n,d): rows 0 .. n-1 of W pe(δ) + bias, heads apart. */
static void make_table(const ls_pass *p, int64_t n, const ls_real *weight, const ls_real *bias, ls_real *table)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, E = p->H * d;
    for (int64_t h = 0; h < p->H; h++, table += n * d) {
        for (int64_t i = 0; bias != NULL && i < n; i++) memcpy(table + i * d, bias + h * d, (size_t)d * sizeof *table);
        ls_gemm(0, 1, n, d, E, 1, m->positions, E, weight + h * d * E, E, bias != NULL, table, d);
    }
}

static void make_table_backward(const ls_pass *p, int64_t n, const ls_real *dtable, ls_real *dweight, ls_real *dbias)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, E = p->H * d;
    for (int64_t h = 0; h < p->H; h++, dtable += n * d) {
        ls_gemm(1, 0, d, E, n, 1, dtable, d, m->positions, E, 1, dweight + h * d * E, E);
        for (int64_t i = 0; dbias != NULL && i < n; i++) ls_axpy(d, 1, dtable + i * d, dbias + h * d);
    }
}

static void make_tables(const ls_pass *p)
{
    const longshort_memory *m = memory_of(p);
    const int64_t E = p->H * p->d, far = p->step ? 0 : m->N, n = ls_max(far, m->D);
    ls_zero(m->positions, n * E);
    ls_dense_cpu.add_positions(NULL, 1, n, E, 0, m->positions);
    make_table(p, far, parameter(p, R_CHUNK), parameter(p, R_CHUNK_BIAS), m->far_table);
    make_table(p, m->D, parameter(p, R_WIN), NULL, m->near_table);
}

/* ------------------------------------------------------------------------------------------------ far */

/* What the batch row's queries see far away; 0: nothing. */
static int load_far(ls_pass *p, int phase, int64_t b)
{
    if (!is_causal(p)) return ls_longshort_load_landmarks(p, &p->summary[phase], b);
    if (p->step)
        ls_longshort_load_statistics(p, &p->summary[phase], b);
    else
        ls_longshort_load_summaries(p, &p->gathered[phase], b);
    return 1;
}

/* The far keys (far,d) of a tile: in CS each with R_chunk of its distance, 0 for the newest. */
static const ls_real *far_keys(const ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const ls_real *keys = m->far[KEYS] + t->h * m->N * p->d, *table = m->far_table + t->h * m->N * p->d;
    if (!is_causal(p)) return keys;
    for (int64_t n = 0; n < t->far; n++) {
        const ls_real *key = keys + n * p->d, *distance = table + (t->far - 1 - n) * p->d;
        ls_real *to = m->merged + n * p->d;
#pragma omp simd
        for (int64_t e = 0; e < p->d; e++) to[e] = key[e] + distance[e];
    }
    return m->merged;
}

/* dscores·q goes to the far keys and, in CS, to R_chunk of their distances alike. */
static void far_keys_backward(const ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, at = t->h * m->N * d;
    ls_real *dkeys = m->dfar[KEYS] + at;
    if (!is_causal(p)) {
        ls_gemm(1, 0, t->far, d, t->n, 1, m->dscores, m->width, m->q, d, 1, dkeys, d);
        return;
    }
    ls_gemm(1, 0, t->far, d, t->n, 1, m->dscores, m->width, m->q, d, 0, m->dmerged, d);
    for (int64_t n = 0; n < t->far; n++) {
        const ls_real *from = m->dmerged + n * d;
        ls_real *key = dkeys + n * d, *distance = m->dfar_table + at + (t->far - 1 - n) * d;
#pragma omp simd
        for (int64_t e = 0; e < d; e++) {
            key[e] += from[e];
            distance[e] += from[e];
        }
    }
}

/* ------------------------------------------------------------------------------------------------ probabilities */

/* to = q + r, a vector that all queries of a head share. */
static void add_to_rows(int64_t n, int64_t d, const ls_real *q, const ls_real *r, ls_real *to)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = 0; e < d; e++) to[i * d + e] = q[i * d + e] + r[e];
}

/* Row i of the scores becomes the softmax over what query i sees; 0 where it is padded or sees nothing. */
static void row_probabilities(const ls_pass *p, const tile *t, int64_t i)
{
    const longshort_memory *m = memory_of(p);
    ls_real *s = m->scores + i * m->width, *near = s + t->far;
    const int64_t columns_used = t->far + t->keys, position = t->first + i;
    if (ls_is_padded(p->pad_q, t->b * p->T + t->row + i)) {
        ls_zero(s, columns_used);
        return;
    }
    const ls_span sight = ls_longshort_sight(p, position);
    const int64_t key = p->halo.span[0].lo + t->key, from = ls_max(0, sight.lo - key);
    const int64_t to = ls_min(t->keys, sight.lo + sight.n - key);
    for (int64_t x = 0; x < from; x++) near[x] = -INFINITY;
    for (int64_t x = to; x < t->keys; x++) near[x] = -INFINITY;
    if (is_causal(p)) {
        const ls_real *distance = m->relative + i * m->D + position - key;
        for (int64_t x = from; x < to; x++) near[x] += distance[-x];
        if (!p->step && p->own.pad != NULL)
            for (int64_t n = 0; n < t->far; n++) s[n] += m->far_mask[n];
    }
    if (p->halo.pad != NULL)
        for (int64_t x = from; x < to; x++) near[x] += m->near_mask[x];
    const ls_real sum = ls_row_exp(columns_used, ls_row_max(columns_used, s), s);
    const ls_real inverse = sum > 0 ? 1 / sum : 0;
    for (int64_t x = 0; x < columns_used; x++) s[x] *= inverse;
}

/* scores (n, far + near) = the probabilities of a tile; q, q_w, q_r are left for the backward pass. Returns the far
 * keys as the queries see them. */
static const ls_real *probabilities(const ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d;
    const ls_real *keys = NULL, *q = m->q;
    ls_clean_rows(p->q, t->b, t->h, t->row, t->n, d, p->pad_q, p->T, (ls_real)p->scale, m->q);
    if (p->step) {
        for (int64_t i = 0; i < t->n; i++) m->scores[i * m->width] = m->far_mask[t->h];
    } else {
        keys = far_keys(p, t);
        ls_gemm(0, 1, t->n, t->far, d, 1, m->q, d, keys, d, 0, m->scores, m->width);
    }
    if (is_causal(p)) {
        add_to_rows(t->n, d, m->q, parameter(p, R_W) + t->h * d, m->q_w);
        add_to_rows(t->n, d, m->q, parameter(p, R_R) + t->h * d, m->q_r);
        ls_gemm(0, 1, t->n, m->D, d, 1, m->q_r, d, m->near_table + t->h * m->D * d, d, 0, m->relative, m->D);
        q = m->q_w;
    }
    ls_gemm(0, 1, t->n, t->keys, d, 1, q, d, near_rows(p, KEYS, t), d, 0, m->scores + t->far, m->width);
    for (int64_t x = 0; p->halo.pad != NULL && x < t->keys; x++)
        m->near_mask[x] = p->halo.pad[t->b * p->halo.n + t->key + x] ? -INFINITY : 0;
    for (int64_t i = 0; i < t->n; i++) row_probabilities(p, t, i);
    return keys;
}

/* ------------------------------------------------------------------------------------------------ forward */

static void attend_tile(ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d;
    ls_real *out = ls_row(p->out, t->b, t->h, t->row);
    probabilities(p, t);
    ls_gemm(0, 0, t->n, d, t->far, 1, m->scores, m->width, m->far[VALUES] + t->h * m->N * d, d, 0, out, p->out.st);
    ls_gemm(0, 0, t->n, d, t->keys, 1, m->scores + t->far, m->width, near_rows(p, VALUES, t), d, 1, out, p->out.st);
}

ls_status ls_longshort_attend(ls_pass *p, int phase)
{
    normalise_window(p);
    if (is_causal(p)) make_tables(p);
    for (int64_t b = 0; b < p->B; b++) {
        const int far = load_far(p, phase, b);
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t row = 0; row < p->T;) {
                const tile t = next_tile(p, b, h, row, far);
                attend_tile(p, &t);
                row += t.n;
            }
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ backward */

/* dscores = P (dP - Σ P dP), dP = dout·values. */
static void scores_backward(const ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, n = t->far + t->keys;
    ls_gemm(0, 1, t->n, t->far, d, 1, m->dout, d, m->far[VALUES] + t->h * m->N * d, d, 0, m->dscores, m->width);
    ls_gemm(0, 1, t->n, t->keys, d, 1, m->dout, d, near_rows(p, VALUES, t), d, 0, m->dscores + t->far, m->width);
    for (int64_t i = 0; i < t->n; i++) {
        const ls_real *prob = m->scores + i * m->width;
        ls_real *ds = m->dscores + i * m->width;
        const ls_real mean = ls_dot(n, prob, ds);
        for (int64_t x = 0; x < n; x++) ds[x] = prob[x] * (ds[x] - mean);
    }
}

static void add_column_sums(int64_t n, int64_t d, const ls_real *x, double *sum)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = 0; e < d; e++) sum[e] += (double)x[i * d + e];
}

/* CS: from the gradients of near scores to R_win, r_w, r_r and, by way of q + r_r, to dq, which holds what came by way
 * of q + r_w. */
static void distances_backward(const ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, at = t->h * m->D * d, key = p->halo.span[0].lo + t->key;
    for (int64_t i = 0; i < t->n; i++) {
        const ls_real *ds = m->dscores + i * m->width + t->far;
        ls_real *to = m->drelative + i * m->D;
        const int64_t newest = t->first + i - key; /* its own key */
        for (int64_t delta = 0; delta < m->D; delta++) to[delta] = delta <= newest ? ds[newest - delta] : 0;
    }
    ls_gemm(1, 0, m->D, d, t->n, 1, m->drelative, m->D, m->q_r, d, 1, m->dnear_table + at, d);
    ls_gemm(0, 0, t->n, d, m->D, 1, m->drelative, m->D, m->near_table + at, d, 0, m->dq_r, d);
    add_column_sums(t->n, d, m->dq, m->dr + t->h * d);
    add_column_sums(t->n, d, m->dq_r, m->dr + (p->H + t->h) * d);
    ls_axpy(t->n * d, 1, m->dq_r, m->dq);
}

static void attend_tile_backward(ls_pass *p, const tile *t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d, width = m->width;
    const ls_real *keys = probabilities(p, t), *near = m->scores + t->far, *dnear = m->dscores + t->far;
    const ls_view dk = p->halo.dk, dv = p->halo.dv;
    ls_clean_rows(p->dout, t->b, t->h, t->row, t->n, d, p->pad_q, p->T, 1, m->dout);
    scores_backward(p, t);
    ls_gemm(1, 0, t->far, d, t->n, 1, m->scores, width, m->dout, d, 1, m->dfar[VALUES] + t->h * m->N * d, d);
    ls_gemm(1, 0, t->keys, d, t->n, 1, near, width, m->dout, d, 1, ls_row(dv, t->b, t->h, t->key), dv.st);
    ls_gemm(1, 0, t->keys, d, t->n, 1, dnear, width, is_causal(p) ? m->q_w : m->q, d, 1, ls_row(dk, t->b, t->h, t->key),
            dk.st);
    far_keys_backward(p, t);
    ls_gemm(0, 0, t->n, d, t->keys, 1, dnear, width, near_rows(p, KEYS, t), d, 0, m->dq, d);
    if (is_causal(p)) distances_backward(p, t);
    ls_gemm(0, 0, t->n, d, t->far, 1, m->dscores, width, keys, d, 1, m->dq, d);
    for (int64_t i = 0; i < t->n; i++) {
        ls_real *dq = ls_row(p->dq, t->b, t->h, t->row + i);
        for (int64_t e = 0; e < d; e++) dq[e] = (ls_real)p->scale * m->dq[i * d + e];
    }
}

static void begin_backward(ls_pass *p)
{
    const longshort_memory *m = memory_of(p);
    const int64_t E = p->H * p->d;
    ls_longshort_begin_norms(p);
    normalise_window(p);
    ls_zero_view(p->halo.dk, p->B, p->H, p->halo.n, p->d);
    ls_zero_view(p->halo.dv, p->B, p->H, p->halo.n, p->d);
    if (!is_causal(p)) return;
    make_tables(p);
    ls_zero(m->dfar_table, m->N * E);
    ls_zero(m->dnear_table, m->D * E);
    memset(m->dr, 0, (size_t)(2 * E) * sizeof *m->dr);
}

static void return_tables(ls_pass *p)
{
    const longshort_memory *m = memory_of(p);
    const int64_t E = p->H * p->d;
    make_table_backward(p, m->N, m->dfar_table, parameter_gradient(p, R_CHUNK), parameter_gradient(p, R_CHUNK_BIAS));
    make_table_backward(p, m->D, m->dnear_table, parameter_gradient(p, R_WIN), NULL);
    for (int64_t i = 0; i < E; i++) {
        parameter_gradient(p, R_W)[i] += (ls_real)m->dr[i];
        parameter_gradient(p, R_R)[i] += (ls_real)m->dr[E + i];
    }
}

ls_status ls_longshort_attend_backward(ls_pass *p, int phase)
{
    const longshort_memory *m = memory_of(p);
    begin_backward(p);
    for (int64_t b = 0; b < p->B; b++) {
        const int far = load_far(p, phase, b);
        for (int i = 0; i < 2; i++) ls_zero(m->dfar[i], m->N * p->H * p->d);
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t row = 0; row < p->T;) {
                const tile t = next_tile(p, b, h, row, far);
                attend_tile_backward(p, &t);
                row += t.n;
            }
        if (is_causal(p))
            ls_longshort_return_summaries(p, &p->gathered[phase], b);
        else
            ls_longshort_return_landmarks(p, &p->summary[phase], b);
    }
    normalise_window_backward(p);
    ls_longshort_end_norms(p);
    if (is_causal(p)) return_tables(p);
    return LS_OK;
}
