#include "slots.h"
#include "gemm.h"
#include "tile.h"

/* ------------------------------------------------------------------------------------------------ chunks */

void ls_each_chunk(ls_pass *p, int phase, int64_t rows, void (*work)(ls_pass *, int phase, const ls_chunk *))
{
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t t = 0; t < rows; t += LS_CHUNK)
            for (int64_t h = 0; h < p->H; h++) {
                const ls_chunk c = {b, h, b * p->H + h, t, ls_min(LS_CHUNK, rows - t)};
                work(p, phase, &c);
            }
}

const ls_real *ls_chunk_rows(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows, ls_real *copy,
                             int64_t *ld)
{
    *ld = pad == NULL ? v.st : d;
    if (pad == NULL) return ls_row(v, c->b, c->h, c->t);
    ls_clean_rows(v, c->b, c->h, c->t, c->n, d, pad, rows, 1, copy);
    return copy;
}

void ls_chunk_centred(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows, const ls_real *centre,
                      ls_real *copy)
{
    for (int64_t i = 0; i < c->n; i++, copy += d) {
        const ls_real *x = ls_row(v, c->b, c->h, c->t + i);
        if (ls_is_padded(pad, c->b * rows + c->t + i))
            for (int64_t e = 0; e < d; e++) copy[e] = -centre[e];
        else
            for (int64_t e = 0; e < d; e++) copy[e] = x[e] - centre[e];
    }
}

void ls_chunk_hide(const ls_chunk *c, int64_t R, const uint8_t *pad, int64_t rows, ls_real *logits)
{
    for (int64_t i = 0; pad != NULL && i < c->n; i++)
        for (int64_t r = 0; pad[c->b * rows + c->t + i] && r < R; r++) logits[i * R + r] = -INFINITY;
}

void ls_chunk_blank(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows)
{
    for (int64_t i = c->t; i < c->t + c->n; i++)
        if (ls_is_padded(pad, c->b * rows + i)) ls_zero(ls_row(v, c->b, c->h, i), d);
}

/* ------------------------------------------------------------------------------------------------ landmarks */

static void reference_sums(const ls_pass *p, double *row, ls_real *sums, int64_t stride)
{
    const ls_segmented v = ls_segmented_rows(p, 1, 2, 0);
    ls_segment_sums(&v, row, sums, stride);
    for (int64_t b = 0; b < p->B; b++) {
        int64_t keys = 0;
        for (int64_t j = 0; j < p->S; j++) keys += !ls_is_padded(p->own.pad, b * p->S + j);
        for (int64_t h = 0; h < p->H; h++) sums[(b * p->H + h) * stride + p->d] = (ls_real)keys;
    }
}

void ls_landmark_sums(const ls_pass *p, ls_landmarks l, double *row, ls_real *sums)
{
    const int64_t stride = ls_landmark_reals(p, l);
    for (int which = l.first; which < 2; which++) {
        const ls_segmented s = ls_segmented_rows(p, l.count, which, 0);
        ls_segment_sums(&s, row, sums + ls_landmark_place(p, l, which), stride);
    }
    reference_sums(p, row, sums + ls_landmark_place(p, l, 2), stride);
}

void ls_landmark_spread(const ls_pass *p, ls_landmarks l, const ls_real *dsums)
{
    for (int which = l.first; which < 2; which++) {
        const ls_segmented s = ls_segmented_rows(p, l.count, which, 1);
        ls_segment_spread(&s, dsums + ls_landmark_place(p, l, which), ls_landmark_reals(p, l));
    }
}

void ls_landmark_reference(const ls_pass *p, ls_landmarks l, const ls_real *sums, ls_real *reference)
{
    const int64_t d = p->d;
    for (int64_t g = 0; g < p->B * p->H; g++) {
        const ls_real *sum = sums + g * ls_landmark_reals(p, l) + ls_landmark_place(p, l, 2);
        for (int64_t e = 0; e < d; e++) reference[g * d + e] = sum[d] > 0 ? sum[e] / sum[d] : 0;
    }
}

/* ------------------------------------------------------------------------------------------------ writing */

void ls_slots_sum(ls_slots s, int64_t n, const ls_real *a, const ls_real *b, int64_t ldb, double *total)
{
    ls_gemm(1, 0, s.R, s.d, n, 1, a, s.R, b, ldb, 0, s.scratch, s.d);
    for (int64_t i = 0; i < s.R * s.d; i++) total[i] += (double)s.scratch[i];
}

void ls_slots_begin(ls_slots s, int64_t G, double *state)
{
    for (int64_t r = 0; r < G * s.R; r++, state += s.d + 2) {
        state[0] = -INFINITY;
        for (int64_t i = 1; i < s.d + 2; i++) state[i] = 0;
    }
}

void ls_slots_send(ls_slots s, int64_t G, const double *state, ls_real *sent)
{
    for (int64_t i = 0; i < G * s.R * (s.d + 2); i++) sent[i] = (ls_real)state[i];
}

/* top (R): the maxima after these rows, to which the state is brought; 0 where there still is no key, since e^(-inf -
 * 0) is 0. */
static void raise_maxima(ls_slots s, int64_t n, const ls_real *logits, double *state, ls_real *top)
{
    for (int64_t r = 0; r < s.R; r++) top[r] = (ls_real)state[r * (s.d + 2)];
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < s.R; r++) top[r] = logits[j * s.R + r] > top[r] ? logits[j * s.R + r] : top[r];
    for (int64_t r = 0; r < s.R; r++, state += s.d + 2) {
        if ((double)top[r] > state[0]) {
            const double shrink = state[0] == -INFINITY ? 0 : exp(state[0] - (double)top[r]);
            for (int64_t i = 1; i < s.d + 2; i++) state[i] *= shrink;
            state[0] = (double)top[r];
        }
        if (top[r] == -INFINITY) top[r] = 0;
    }
}

void ls_slots_write(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, double *state)
{
    ls_real *top = s.scratch, *sum = top + s.R, *x = sum + s.R;
    raise_maxima(s, n, logits, state, top);
    ls_zero(sum, s.R);
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < s.R; r++) {
            const ls_real e = ls_exp(logits[j * s.R + r] - top[r]);
            logits[j * s.R + r] = e;
            sum[r] += e;
        }
    ls_gemm(1, 0, s.R, s.d, n, 1, logits, s.R, values, s.d, 0, x, s.d);
    for (int64_t r = 0; r < s.R; r++, state += s.d + 2) {
        state[1] += (double)sum[r];
        for (int64_t e = 0; e < s.d; e++) state[2 + e] += (double)x[r * s.d + e];
    }
}

void ls_slots_values(ls_slots s, const ls_real *element, double *values, double *centre)
{
    for (int64_t e = 0; e < s.d; e++) centre[e] = 0;
    for (int64_t r = 0; r < s.R; r++, element += s.d + 2)
        for (int64_t e = 0; e < s.d; e++) {
            values[r * s.d + e] = element[1] > 0 ? (double)element[2 + e] / (double)element[1] : 0;
            centre[e] += values[r * s.d + e] / (double)s.R;
        }
}

void ls_slots_constants(ls_slots s, int64_t G, const ls_real *got, const ls_real *dsent, double *room, ls_real *c,
                        ls_real *constant)
{
    double *values = room, *centre = room + s.R * s.d;
    for (int64_t g = 0; g < G; g++, got += s.R * (s.d + 2), c += s.d) {
        ls_slots_values(s, got, values, centre);
        for (int64_t e = 0; e < s.d; e++) {
            const ls_real reference = c[e];
            c[e] = (ls_real)((double)reference + centre[e]);
            centre[e] = (double)c[e] - (double)reference; /* as rounded */
        }
        for (int64_t r = 0; r < s.R; r++, dsent += s.d + 2) {
            double sum = (double)dsent[1];
            for (int64_t e = 0; e < s.d; e++) sum += (double)dsent[2 + e] * (centre[e] - values[r * s.d + e]);
            *constant++ = (ls_real)sum;
        }
    }
}

void ls_slots_write_backward(ls_slots s, int64_t n, const ls_real *sent, const ls_real *got, const ls_real *dsent,
                             const ls_real *constant, const ls_real *values, ls_real *logits, ls_real *dlogits,
                             ls_real *dv, int64_t ld)
{
    const int64_t stride = s.d + 2, R = s.R;
    ls_real *top = s.scratch; /* where this rank has no key its rows, all padded, have logits of -inf */
    for (int64_t r = 0; r < R; r++) top[r] = sent[r * stride] == -INFINITY ? 0 : sent[r * stride];
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) logits[j * R + r] = ls_exp(logits[j * R + r] - top[r]);
    ls_gemm(0, 1, n, R, s.d, 1, values, s.d, dsent + 2, stride, 0, dlogits, R);
    int few = 0;
    for (int64_t r = 0; r < R; r++) few |= got[r * stride + 1] <= (ls_real)n;
    ls_real *mass = s.scratch, *flow = mass + R, *size = flow + R;
    if (few) {
        ls_zero(mass, 3 * R);
        for (int64_t j = 0; j < n; j++)
            for (int64_t r = 0; r < R; r++) {
                const ls_real e = logits[j * R + r], of_j = e * dlogits[j * R + r];
                mass[r] += e, flow[r] += of_j, size[r] += of_j < 0 ? -of_j : of_j;
            }
        for (int64_t r = 0; r < R; r++)
            mass[r] = ls_slots_constant_of(sent + r * stride, got + r * stride, dsent + r * stride, constant[r],
                                           mass[r], flow[r], size[r]);
        constant = mass;
    }
    for (int64_t j = 0; j < n; j++)
        for (int64_t r = 0; r < R; r++) dlogits[j * R + r] = logits[j * R + r] * (constant[r] + dlogits[j * R + r]);
    ls_gemm(0, 0, n, s.d, R, 1, logits, R, dsent + 2, stride, 0, dv, ld);
}

/* ------------------------------------------------------------------------------------------------ reading */

void ls_slots_read(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, const ls_real *centre, ls_real *out,
                   int64_t ld)
{
    for (int64_t i = 0; i < n; i++) {
        ls_row_softmax(s.R, logits + i * s.R);
        memcpy(out + i * ld, centre, (size_t)s.d * sizeof *centre);
    }
    ls_gemm(0, 0, n, s.d, s.R, 1, logits, s.R, values, s.d, 1, out, ld);
}

void ls_slots_read_backward(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, const ls_real *dout,
                            int64_t ld, ls_real *dlogits, double *dvalues)
{
    for (int64_t i = 0; i < n; i++) ls_row_softmax(s.R, logits + i * s.R);
    ls_slots_sum(s, n, logits, dout, ld, dvalues);
    ls_gemm(0, 1, n, s.R, s.d, 1, dout, ld, values, s.d, 0, dlogits, s.R);
    for (int64_t i = 0; i < n; i++) {
        ls_real *p = logits + i * s.R, *dl = dlogits + i * s.R;
        const ls_real mean = ls_dot(s.R, p, dl);
        for (int64_t r = 0; r < s.R; r++) dl[r] = p[r] * (dl[r] - mean);
    }
}
