/* What the CPU's and the GPU's files of longshort share: options, parameters, sizes, and what queries see. */
#ifndef LS_LONGSHORT_FORM_H
#define LS_LONGSHORT_FORM_H

#include "mechanism.h"

enum { LANDMARKS, WINDOW, CHUNK }; /* option[] */
/* param[]: the norms of the window's rows (ln_l, ln_w) and of what is far (ln_s, ln_d); the rest is CS's alone */
enum { NEAR_WEIGHT, NEAR_BIAS, FAR_WEIGHT, FAR_BIAS, R_WIN, R_CHUNK, R_CHUNK_BIAS, R_W, R_R };
enum { KEYS, VALUES };
enum { NS_ATTEND = 2 }; /* the phase whose reduce brings the landmarks' sums */

/* r: 0 stands for the pattern's own default. */
static inline int64_t vectors_of(ls_pattern pattern, const double *option)
{
    return option[LANDMARKS] > 0 ? (int64_t)option[LANDMARKS] : pattern == LS_CS ? 1 : 16;
}
static inline int64_t vectors(const ls_pass *p)
{
    return vectors_of(p->pattern, p->option);
}
static inline int64_t columns(const ls_pass *p)
{
    return p->H * vectors(p);
}
static inline int64_t chunk_length(const ls_pass *p)
{
    return (int64_t)p->option[CHUNK];
}
static inline const ls_real *parameter(const ls_pass *p, int which)
{
    return p->params + p->param[which].offset;
}
static inline ls_real *parameter_gradient(const ls_pass *p, int which)
{
    return p->dparams + p->param[which].offset;
}

/* The keys that query i may look at nearby, also where there are none. */
LS_BOTH_SIDES ls_span ls_longshort_window(int causal, int64_t w, int64_t i)
{
    const int64_t e = ls_max(w / 2, 1);
    const ls_span before = {0, i - w + 1, w}, around = {0, i / w * w - e, w + 2 * e};
    return causal ? before : around;
}
static inline ls_span ls_longshort_sight(const ls_pass *p, int64_t i)
{
    return ls_longshort_window(p->pattern == LS_CS, (int64_t)p->option[WINDOW], i);
}

/* Rows of the halo: known from the reach, since in a step there is no halo yet. */
int64_t ls_longshort_halo_rows(const ls_pass *p);

/* CS: chunks that end here, the first and how many; a chunk is of the rank that has its last token. The vectors of
 * those before the last query's are seen by somebody here. */
static inline int64_t ls_longshort_chunks(const ls_pass *p, int64_t *first)
{
    const int64_t c = chunk_length(p), lo = p->own.span[0].lo, n = p->own.span[0].n;
    *first = lo / c;
    return (lo + n) / c - lo / c;
}
static inline int64_t ls_longshort_seen(const ls_pass *p)
{
    if (p->pattern != LS_CS || p->T == 0) return 0;
    return (p->query_span[0].lo + p->T - 1) / chunk_length(p) * vectors(p);
}
static inline int64_t ls_longshort_distances(const ls_pass *p)
{
    return ls_min((int64_t)p->option[WINDOW], p->all_keys);
}

/* CS: an item of the collection of summaries is K (r,E), V (r,E), and 1 where there is an unpadded token. */
static inline int64_t ls_longshort_item(const ls_pass *p)
{
    return 2 * vectors(p) * p->H * p->d + 1;
}

#endif
