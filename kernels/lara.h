/* Sizes of LARA, for lara.c and lara.cu. */
#ifndef LS_LARA_H
#define LS_LARA_H

#include "segments.h"

enum { LANDMARKS, ANTITHETIC, ADAPTIVE };    /* option[] */
enum { Q_WEIGHT, Q_BIAS, K_WEIGHT, K_BIAS }; /* param[], if adaptive */

static inline int is_noisy(const ls_pass *p)
{
    return p->training || p->given_noise != NULL;
}

static inline int64_t landmarks(const ls_pass *p)
{
    return ls_min((int64_t)p->option[LANDMARKS], ls_min(p->all_queries, p->all_keys));
}

static inline int64_t count(const ls_pass *p)
{
    return landmarks(p) * (is_noisy(p) && p->option[ANTITHETIC] != 0 ? 2 : 1);
}

/* Reals of a (b,h) that are summed first: segments of queries, of keys, then the values' reference. */
static inline int64_t sums(const ls_pass *p)
{
    return (2 * landmarks(p) + 1) * p->d + 1;
}

/* The segments of the queries (which = 0) or of the keys. */
static inline ls_segments segments_of(const ls_pass *p, int which)
{
    const ls_segments s = {which ? p->all_keys : p->all_queries, landmarks(p)};
    return s;
}

#endif
