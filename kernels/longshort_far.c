/* Longshort: the vectors that stand for what is far. NS: r landmarks for the whole sequence, a softsum over the ranks.
 * CS: r summaries for each chunk, a gather. A step: what this rank's part of the list gives, a softsum again. */
#include "longshort.h"

/* ------------------------------------------------------------------------------------------------ NS: sums */

/* Of each batch row and column (head h, landmark t): m, s = Σ_j e^(a_j - m), Σ_j e^(a_j - m) K_j, the same with V_j. */
ls_monoid ls_longshort_landmark_sums(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * columns(p), .has_max = 1, .scaled = 1 + 2 * p->d};
}

static int64_t element_reals(const ls_pass *p)
{
    return 2 + 2 * p->d;
}

/* The elements of a batch row, one for each column. */
static ls_real *elements(const ls_pass *p, ls_real *x, int64_t b)
{
    return x + b * columns(p) * element_reals(p);
}

/* logits (n,C), -inf at padded rows; block[0], block[2]: rows of k, v; block[1], block[3]: the same after LN_l. */
static void load_block(const ls_pass *p, int64_t b, int64_t t, int64_t n)
{
    const longshort_memory *m = memory_of(p);
    const int64_t E = p->H * p->d, C = columns(p);
    ls_clean_rows(p->own.k, b, 0, t, n, E, p->own.pad, p->S, 1, m->block[0]);
    ls_clean_rows(p->own.v, b, 0, t, n, E, p->own.pad, p->S, 1, m->block[2]);
    for (int i = 0; i < 2; i++) ls_longshort_norm(p, NEAR_WEIGHT, n, m->block[2 * i], m->block[2 * i + 1]);
    for (int64_t j = 0; j < n; j++) {
        ls_real *row = m->logits + j * C;
        if (ls_is_padded(p->own.pad, b * p->S + t + j))
            for (int64_t c = 0; c < C; c++) row[c] = -INFINITY;
        else
            memcpy(row, ls_row(p->own.extra, b, 0, t + j), (size_t)C * sizeof *row);
    }
}

/* logits := e^(logit - top); -inf for top is a column that saw nothing: zeros. */
static void exponentials(int64_t n, int64_t C, const ls_real *top, ls_real *logits)
{
    for (int64_t j = 0; j < n; j++, logits += C)
        for (int64_t c = 0; c < C; c++) logits[c] = ls_exp(logits[c] - (top[c] == -INFINITY ? 0 : top[c]));
}

/* A loaded block joins the sums of its batch row, which are kept in double. */
static void join_block(const ls_pass *p, int64_t n)
{
    const longshort_memory *m = memory_of(p);
    const int64_t C = columns(p), d = p->d, r = vectors(p);
    memcpy(m->next_top, m->top, (size_t)C * sizeof *m->top);
    for (int64_t j = 0; j < n; j++)
        for (int64_t c = 0; c < C; c++) {
            const ls_real a = m->logits[j * C + c];
            m->next_top[c] = a > m->next_top[c] ? a : m->next_top[c];
        }
    exponentials(n, C, m->next_top, m->logits);
    for (int64_t c = 0; c < C; c++) {
        m->shrink[c] = m->top[c] == -INFINITY ? 0 : (double)ls_exp(m->top[c] - m->next_top[c]);
        m->sum[c] *= m->shrink[c];
        m->top[c] = m->next_top[c];
    }
    for (int64_t j = 0; j < n; j++)
        for (int64_t c = 0; c < C; c++) m->sum[c] += (double)m->logits[j * C + c];
    for (int i = 0; i < 2; i++) {
        for (int64_t h = 0; h < p->H; h++)
            ls_gemm(1, 0, r, d, n, 1, m->logits + h * r, C, m->block[2 * i + 1] + h * d, p->H * d, 0,
                    m->product + h * r * d, d);
        for (int64_t c = 0; c < C; c++) {
            double *x = m->weighted[i] + c * d;
            for (int64_t e = 0; e < d; e++) x[e] = x[e] * m->shrink[c] + (double)m->product[c * d + e];
        }
    }
}

ls_status ls_longshort_landmarks(ls_pass *p, int phase)
{
    (void)phase;
    const longshort_memory *m = memory_of(p);
    const int64_t C = columns(p), d = p->d;
    for (int64_t b = 0; b < p->B; b++) {
        for (int64_t c = 0; c < C; c++) m->top[c] = -INFINITY, m->sum[c] = 0;
        for (int64_t i = 0; i < C * d; i++) m->weighted[KEYS][i] = m->weighted[VALUES][i] = 0;
        for (int64_t t = 0; t < p->S; t += BLOCK) {
            const int64_t n = ls_min(BLOCK, p->S - t);
            load_block(p, b, t, n);
            join_block(p, n);
        }
        ls_real *x = elements(p, p->summary[NS_ATTEND].sent, b);
        for (int64_t c = 0; c < C; c++, x += element_reals(p)) {
            x[0] = m->top[c];
            x[1] = (ls_real)m->sum[c];
            for (int64_t e = 0; e < d; e++) {
                x[2 + e] = (ls_real)m->weighted[KEYS][c * d + e];
                x[2 + d + e] = (ls_real)m->weighted[VALUES][c * d + e];
            }
        }
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ NS: gradients */

/* raw (r,E) = x / s of an element, heads side by side; 0 where nothing was summed. */
static void raw_landmarks(const ls_pass *p, const ls_real *element)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), d = p->d, E = p->H * d;
    for (int64_t c = 0; c < columns(p); c++, element += element_reals(p)) {
        const ls_real inverse = element[1] > 0 ? 1 / element[1] : 0;
        for (int i = 0; i < 2; i++) {
            ls_real *to = m->raw[i] + c % r * E + c / r * d;
            for (int64_t e = 0; e < d; e++) to[e] = inverse * element[2 + i * d + e];
        }
    }
}

/* What a score is owed, e_jt (ds_t + K_j·dK_t + V_j·dV_t) with ds_t = -K̃_t·dK_t - Ṽ_t·dV_t, is a small difference of
 * large numbers where few keys are left. So K_j, V_j, K̃_t, Ṽ_t are all taken from the mean over t of K̃_t, Ṽ_t. */
static void centre_landmarks(const ls_pass *p, const ls_real *got, const ls_real *dsent)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), d = p->d, E = p->H * d, stride = element_reals(p);
    raw_landmarks(p, got);
    for (int i = 0; i < 2; i++) {
        ls_zero(m->centre[i], E);
        for (int64_t t = 0; t < r; t++) ls_axpy(E, 1 / (ls_real)r, m->raw[i] + t * E, m->centre[i]);
        for (int64_t t = 0; t < r; t++) ls_axpy(E, -1, m->centre[i], m->raw[i] + t * E);
    }
    for (int64_t c = 0; c < columns(p); c++) {
        const int64_t at = c % r * E + c / r * d;
        const ls_real *dx = dsent + c * stride + 2;
        m->constant[c] = -ls_dot(d, m->raw[KEYS] + at, dx) - ls_dot(d, m->raw[VALUES] + at, dx + d);
    }
}

/* Rows [t, t + n): dextra; dk and dv, by way of LN_l, are added to what the window gave. */
static void landmarks_block_backward(const ls_pass *p, int64_t b, int64_t t, int64_t n, const ls_real *dsent)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), C = columns(p), d = p->d, E = p->H * d, stride = element_reals(p);
    for (int i = 0; i < 2; i++) {
        const ls_view grad = i == KEYS ? p->own.dk : p->own.dv;
        ls_real *rows = m->block[2 * i + 1], *drows = m->block[4 + i];
        for (int64_t j = 0; j < n; j++) ls_axpy(E, -1, m->centre[i], rows + j * E);
        for (int64_t h = 0; h < p->H; h++) {
            const ls_real *dx = dsent + h * r * stride + 2 + i * d;
            ls_gemm(0, 1, n, r, d, 1, rows + h * d, E, dx, stride, i, m->dlogits + h * r, C);
            ls_gemm(0, 0, n, d, r, 1, m->logits + h * r, C, dx, stride, 0, drows + h * d, E);
        }
        ls_longshort_norm_backward(p, NEAR_WEIGHT, n, m->block[2 * i], drows, drows);
        for (int64_t j = 0; j < n; j++) ls_axpy(E, 1, drows + j * E, ls_row(grad, b, 0, t + j));
    }
    for (int64_t j = 0; j < n; j++) {
        const ls_real *e = m->logits + j * C, *de = m->dlogits + j * C;
        ls_real *to = ls_row(p->own.dextra, b, 0, t + j);
        for (int64_t c = 0; c < C; c++) to[c] = e[c] * (m->constant[c] + de[c]);
    }
}

ls_status ls_longshort_landmarks_backward(ls_pass *p, int phase)
{
    (void)phase;
    const longshort_memory *m = memory_of(p);
    const ls_summary *s = &p->summary[NS_ATTEND];
    ls_longshort_begin_norms(p);
    for (int64_t b = 0; b < p->B; b++) {
        const ls_real *sent = elements(p, s->sent, b), *dsent = elements(p, s->dsent, b);
        centre_landmarks(p, elements(p, s->got, b), dsent);
        for (int64_t c = 0; c < columns(p); c++) m->top[c] = sent[c * element_reals(p)];
        for (int64_t t = 0; t < p->S; t += BLOCK) {
            const int64_t n = ls_min(BLOCK, p->S - t);
            load_block(p, b, t, n);
            exponentials(n, columns(p), m->top, m->logits);
            landmarks_block_backward(p, b, t, n, dsent);
        }
    }
    ls_longshort_end_norms(p);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ NS: landmarks */

int ls_longshort_load_landmarks(ls_pass *p, const ls_summary *s, int64_t b)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p);
    const ls_real *got = elements(p, s->got, b);
    raw_landmarks(p, got);
    for (int i = 0; i < 2; i++) {
        ls_longshort_norm(p, FAR_WEIGHT, r, m->raw[i], m->vectors);
        scatter_rows(m->vectors, 0, r, p->H, p->d, ls_heads_apart(m->far[i], p->H, r, p->d), 0);
    }
    return got[1] > 0; /* all columns of a batch row are over the same tokens */
}

/* dfar → LN_s → dgot: dx = dK̃ / s. What s is owed is paid where the scores take theirs. */
void ls_longshort_return_landmarks(ls_pass *p, const ls_summary *s, int64_t b)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), d = p->d, E = p->H * d, stride = element_reals(p);
    const ls_real *got = elements(p, s->got, b);
    ls_real *dgot = elements(p, s->dgot, b);
    for (int i = 0; i < 2; i++) {
        gather_rows(ls_heads_apart(m->dfar[i], p->H, r, d), 0, 0, r, p->H, d, m->vectors);
        ls_longshort_norm_backward(p, FAR_WEIGHT, r, m->raw[i], m->vectors, m->vectors);
        for (int64_t c = 0; c < columns(p); c++) {
            const ls_real total = got[c * stride + 1], inverse = total > 0 ? 1 / total : 0;
            const ls_real *from = m->vectors + c % r * E + c / r * d;
            ls_real *to = dgot + c * stride;
            to[0] = to[1] = 0;
            for (int64_t e = 0; e < d; e++) to[2 + i * d + e] = inverse * from[e];
        }
    }
}

/* ------------------------------------------------------------------------------------------------ CS: summaries */

/* A chunk is of the rank that has its last token. */
int64_t ls_longshort_piece(const ls_pass *p, int64_t lo, int64_t n)
{
    const int64_t c = chunk_length(p);
    return ((lo + n) / c - lo / c) * p->B * ls_longshort_item(p);
}

/* logits (C,c) = softmax of each column of scores over the chunk's unpadded tokens; raw = what it makes of keys and
 * values. The chunk begins at row t of the halo. 0: all its tokens are padded. */
static int summarise(const ls_pass *p, int64_t b, int64_t t)
{
    const longshort_memory *m = memory_of(p);
    const int64_t c = chunk_length(p), r = vectors(p), C = columns(p), d = p->d, E = p->H * d;
    int tokens = 0;
    for (int64_t j = 0; j < c; j++) {
        const int padded = ls_is_padded(p->halo.pad, b * p->halo.n + t + j);
        const ls_real *score = ls_row(p->halo.extra, b, 0, t + j);
        for (int64_t k = 0; k < C; k++) m->logits[k * c + j] = padded ? -INFINITY : score[k];
        tokens |= !padded;
    }
    if (!tokens) return 0;
    for (int64_t k = 0; k < C; k++) ls_row_softmax(c, m->logits + k * c);
    for (int64_t h = 0; h < p->H; h++) {
        const ls_real *prob = m->logits + h * r * c;
        ls_gemm(0, 0, r, d, c, 1, prob, c, ls_row(p->halo.k, b, h, t), p->halo.k.st, 0, m->raw[KEYS] + h * d, E);
        ls_gemm(0, 0, r, d, c, 1, prob, c, ls_row(p->halo.v, b, h, t), p->halo.v.st, 0, m->raw[VALUES] + h * d, E);
    }
    return 1;
}

ls_status ls_longshort_summaries(ls_pass *p, int phase)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), E = p->H * p->d, item = ls_longshort_item(p);
    int64_t first;
    const int64_t chunks = ls_longshort_chunks(p, &first);
    ls_real *to = p->gathered[phase + 1].mine;
    for (int64_t i = 0; i < chunks; i++)
        for (int64_t b = 0; b < p->B; b++, to += item) {
            const int tokens = summarise(p, b, (first + i) * chunk_length(p) - p->halo.span[0].lo);
            to[item - 1] = (ls_real)tokens;
            if (!tokens) ls_zero(to, item - 1);
            for (int w = 0; tokens && w < 2; w++) ls_longshort_norm(p, FAR_WEIGHT, r, m->raw[w], to + w * r * E);
        }
    return LS_OK;
}

/* One summary whose gradient is ditem; the chunk begins at row t of the halo. */
static void summary_backward(const ls_pass *p, int64_t b, int64_t t, const ls_real *ditem)
{
    const longshort_memory *m = memory_of(p);
    const int64_t c = chunk_length(p), r = vectors(p), C = columns(p), d = p->d, E = p->H * d;
    if (!summarise(p, b, t)) return;
    for (int w = 0; w < 2; w++) {
        const ls_view rows = w == KEYS ? p->halo.k : p->halo.v, drows = w == KEYS ? p->halo.dk : p->halo.dv;
        ls_longshort_norm_backward(p, FAR_WEIGHT, r, m->raw[w], ditem + w * r * E, m->vectors);
        for (int64_t h = 0; h < p->H; h++) {
            const ls_real *dvector = m->vectors + h * d, *prob = m->logits + h * r * c;
            ls_gemm(0, 1, r, c, d, 1, dvector, E, ls_row(rows, b, h, t), rows.st, w, m->dlogits + h * r * c, c);
            ls_gemm(1, 0, c, d, r, 1, prob, c, dvector, E, 1, ls_row(drows, b, h, t), drows.st);
        }
    }
    for (int64_t k = 0; k < C; k++) {
        const ls_real *prob = m->logits + k * c, *dprob = m->dlogits + k * c, mean = ls_dot(c, prob, dprob);
        for (int64_t j = 0; j < c; j++) ls_row(p->halo.dextra, b, 0, t + j)[k] = prob[j] * (dprob[j] - mean);
    }
}

/* Adds to the halo's dk, dv, which the window wrote, and writes dextra. */
ls_status ls_longshort_summaries_backward(ls_pass *p, int phase)
{
    int64_t first;
    const int64_t chunks = ls_longshort_chunks(p, &first);
    const ls_real *dmine = p->gathered[phase + 1].dmine;
    ls_zero_view(p->halo.dextra, p->B, 1, p->halo.n, p->extra_width);
    ls_longshort_begin_norms(p);
    for (int64_t i = 0; i < chunks; i++)
        for (int64_t b = 0; b < p->B; b++, dmine += ls_longshort_item(p))
            summary_backward(p, b, (first + i) * chunk_length(p) - p->halo.span[0].lo, dmine);
    ls_longshort_end_norms(p);
    return LS_OK;
}

/* The summaries of batch row b that anybody here sees, heads apart. */
void ls_longshort_load_summaries(ls_pass *p, const ls_collection *g, int64_t b)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), E = p->H * p->d, item = ls_longshort_item(p);
    for (int64_t chunk = 0; chunk < m->N / r; chunk++) {
        const ls_real *from = g->all + (chunk * p->B + b) * item;
        for (int w = 0; w < 2; w++)
            scatter_rows(from + w * r * E, chunk * r, r, p->H, p->d, ls_heads_apart(m->far[w], p->H, m->N, p->d), 0);
        for (int64_t t = 0; t < r; t++) m->far_mask[chunk * r + t] = from[item - 1] != 0 ? 0 : -INFINITY;
    }
}

void ls_longshort_return_summaries(ls_pass *p, const ls_collection *g, int64_t b)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), E = p->H * p->d, item = ls_longshort_item(p);
    for (int64_t chunk = 0; chunk < g->total / item / p->B; chunk++) {
        ls_real *to = g->dall + (chunk * p->B + b) * item;
        if (chunk >= m->N / r) ls_zero(to, item); /* too new for the queries here */
        for (int w = 0; w < 2 && chunk < m->N / r; w++)
            gather_rows(ls_heads_apart(m->dfar[w], p->H, m->N, p->d), 0, chunk * r, r, p->H, p->d, to + w * r * E);
        to[item - 1] = 0;
    }
}

/* ------------------------------------------------------------------------------------------------ a step */

ls_monoid ls_longshort_statistics(const ls_pass *p)
{
    return (ls_monoid){.groups = p->B * p->H, .has_max = 1, .scaled = 1 + p->d};
}

/* distance_term (H,seen): what R_chunk(δ) adds to the logit at each distance, q·(W_rc pe(δ) + b_rc) = u·pe(δ) + q·b_rc
 * with u = W_rcᵀ q: a single query need not make R_chunk. q (H,d), scaled. */
static void distance_terms(const ls_pass *p, const ls_real *q, int64_t seen)
{
    const longshort_memory *m = memory_of(p);
    const int64_t H = p->H, d = p->d, E = H * d;
    for (int64_t h = 0; h < H; h++) {
        const ls_real constant = ls_dot(d, q + h * d, parameter(p, R_CHUNK_BIAS) + h * d);
        ls_gemm(0, 0, 1, E, d, 1, q + h * d, d, parameter(p, R_CHUNK) + h * d * E, E, 0, m->u + h * E, E);
        for (int64_t i = 0; i < seen; i++) m->distance_term[h * seen + i] = constant;
    }
    ls_gemm(0, 1, H, seen, E, 1, m->u, E, m->positions, E, 1, m->distance_term, seen);
}

/* Head h of batch row b looks at the summaries that this rank has of the list. */
static void look(const ls_pass *p, const ls_collection *g, int64_t b, int64_t h, const ls_real *q, int64_t seen,
                 ls_real *statistics)
{
    const longshort_memory *m = memory_of(p);
    const int64_t r = vectors(p), d = p->d, E = p->H * d, item = ls_longshort_item(p), items = g->total / item / p->B;
    double sum = 0;
    ls_real top = -INFINITY;
    ls_zero(statistics, 2 + d);
    for (int64_t i = 0; i < items; i++) {
        const int64_t chunk = g->first + i * g->every;
        const ls_real *from = g->all + (i * p->B + b) * item;
        if (chunk * r >= seen || from[item - 1] == 0) continue;
        for (int64_t t = 0; t < r; t++) {
            const ls_real *key = from + t * E + h * d, *value = key + r * E;
            const ls_real logit = ls_dot(d, q, key) + m->distance_term[(h + 1) * seen - 1 - (chunk * r + t)];
            if (logit > top) {
                const ls_real shrink = ls_exp(top - logit);
                sum *= (double)shrink;
                for (int64_t e = 0; e < d; e++) statistics[2 + e] *= shrink;
                top = logit;
            }
            const ls_real weight = ls_exp(logit - top);
            sum += (double)weight;
            ls_axpy(d, weight, value, statistics + 2);
        }
    }
    statistics[0] = top;
    statistics[1] = (ls_real)sum;
}

ls_status ls_longshort_look_far(ls_pass *p, int phase)
{
    const longshort_memory *m = memory_of(p);
    const int64_t seen = p->query_span[0].lo / chunk_length(p) * vectors(p), d = p->d, E = p->H * d;
    ls_real *to = p->summary[phase + 1].sent;
    ls_zero(m->positions, seen * E);
    ls_dense_cpu.add_positions(NULL, 1, seen, E, 0, m->positions);
    for (int64_t b = 0; b < p->B; b++) {
        ls_clean_rows(p->q, b, 0, 0, 1, E, p->pad_q, p->T, (ls_real)p->scale, m->block[0]);
        distance_terms(p, m->block[0], seen);
        for (int64_t h = 0; h < p->H; h++, to += 2 + d)
            look(p, &p->gathered[phase], b, h, m->block[0] + h * d, seen, to);
    }
    return LS_OK;
}

/* All that is far becomes one vector, (Σ e^(logit - m) v) / s, whose logit, m + ln s, stands in far_mask by head. */
void ls_longshort_load_statistics(ls_pass *p, const ls_summary *s, int64_t b)
{
    const longshort_memory *m = memory_of(p);
    const int64_t d = p->d;
    for (int64_t h = 0; h < p->H; h++) {
        const ls_real *got = s->got + (b * p->H + h) * (2 + d), inverse = got[1] > 0 ? 1 / got[1] : 0;
        m->far_mask[h] = got[1] > 0 ? got[0] + (ls_real)log((double)got[1]) : -INFINITY;
        for (int64_t e = 0; e < d; e++) m->far[VALUES][h * d + e] = inverse * got[2 + e];
    }
}
