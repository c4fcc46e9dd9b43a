#include "segments.h"

ls_segmented ls_segmented_rows(const ls_pass *p, int64_t count, int which, int gradients)
{
    const ls_block *k = &p->own;
    if (which == 0)
        return (ls_segmented){
            {p->all_queries, count}, gradients ? p->dq : p->q, p->B, p->H, p->T, p->d, p->query_span[0].lo, p->pad_q};
    const ls_view keys = gradients ? k->dk : k->k, values = gradients ? k->dv : k->v;
    return (ls_segmented){
        {p->all_keys, count}, which == 1 ? keys : values, p->B, p->H, p->S, p->d, k->span[0].lo, k->pad};
}

enum { ROWS = 32 }; /* of all heads: neighbours in memory where a row is model-wide */

static void add_rows(const ls_segmented *s, int64_t b, int64_t h, int64_t t, int64_t n, double *row)
{
    for (int64_t i = t; i < t + n; i++) {
        if (ls_is_padded(s->pad, b * s->n + i)) continue;
        const ls_real *x = ls_row(s->x, b, h, i);
#pragma omp simd
        for (int64_t e = 0; e < s->d; e++) row[e] += (double)x[e];
    }
}

void ls_segment_sums(const ls_segmented *s, double *row, ls_real *sums, int64_t stride)
{
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t c = 0; c < s->segments.count; c++) {
            const ls_span span = ls_segment_rows(s, c);
            for (int64_t i = 0; i < s->H * s->d; i++) row[i] = 0;
            for (int64_t t = 0; t < span.n; t += ROWS)
                for (int64_t h = 0; h < s->H; h++)
                    add_rows(s, b, h, span.row + t, ls_min(ROWS, span.n - t), row + h * s->d);
            for (int64_t h = 0; h < s->H; h++)
                for (int64_t e = 0; e < s->d; e++)
                    sums[(b * s->H + h) * stride + c * s->d + e] = (ls_real)row[h * s->d + e];
        }
}

void ls_segment_spread(const ls_segmented *s, const ls_real *dsums, int64_t stride)
{
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t c = 0; c < s->segments.count; c++) {
            const ls_span span = ls_segment_rows(s, c);
            for (int64_t i = span.row; i < span.row + span.n; i++) {
                if (ls_is_padded(s->pad, b * s->n + i)) continue;
                for (int64_t h = 0; h < s->H; h++) {
                    ls_real *x = ls_row(s->x, b, h, i);
                    const ls_real *g = dsums + (b * s->H + h) * stride + c * s->d;
#pragma omp simd
                    for (int64_t e = 0; e < s->d; e++) x[e] += g[e];
                }
            }
        }
}
