/* What local.c and local.cu share: options, phases, and where windows are. */
#ifndef LS_LOCAL_H
#define LS_LOCAL_H

#include "mechanism.h"

enum { WINDOW, ALIGN };  /* option[] */
enum { MAP, VECTOR };    /* param[]: W, u */
enum { COUNT, CENTRES }; /* phases of cross attention */

static inline int ls_local_predicts(ls_pattern pattern, const double *option)
{
    return pattern == LS_CC || (pattern == LS_NC && option[ALIGN] > 0);
}

__extension__ typedef unsigned __int128 ls_local_wide;

/* The centres of query i, in local-m, whose product outgrows 64 bits where both sides are longer than 2^31; in local-p
 * from p >= 0; where parameters are not numbers, nor is p: its window is somewhere, and the Gaussian keeps the NaN. */
LS_BOTH_SIDES int64_t ls_local_monotonic(int64_t i, int64_t queries, int64_t keys)
{
    if (queries <= 0) return 0;
    if ((queries | keys) >> 31 == 0) return (2 * i + 1) * keys / (2 * queries);
    return (int64_t)((ls_local_wide)(2 * i + 1) * (ls_local_wide)keys / (ls_local_wide)(2 * queries));
}
LS_BOTH_SIDES int64_t ls_local_predicted(double p)
{
    return p > 0 ? (int64_t)rint(p) : 0;
}

/* Positions [lo, lo + n) of those that exist. */
LS_BOTH_SIDES ls_span ls_local_clip(int64_t lo, int64_t n, int64_t keys)
{
    const int64_t from = ls_max(0, lo);
    const ls_span s = {0, from, ls_max(0, ls_min(lo + n, keys) - from)};
    return s;
}

/* Unpadded keys cross as two numbers that a float holds exactly, n = 4096 high + low. S', the last of them: */
LS_BOTH_SIDES double ls_local_last_key(const ls_real *got)
{
    const double n = 4096 * (double)got[0] + (double)got[1];
    return n > 1 ? n - 1 : 0;
}

#endif
