/* Running softmax statistics: a sum Σ e^x is kept as (m, l), m the greatest x so far and l = Σ e^(x-m); of nothing,
 * m = -inf and l = 0. */
#ifndef LS_STATISTICS_H
#define LS_STATISTICS_H

#include "real.h"

/* e^(m-M): what sums relative to m are worth relative to M >= m. Sums of nothing (m = -inf) are worth 0 whatever M is.
 */
LS_BOTH_SIDES ls_real ls_statistics_weight(ls_real m, ls_real M)
{
    return m == -INFINITY ? 0 : ls_exp(m - M);
}

/* What is subtracted from x before e^x where m is the maximum: of nothing, so that e^(-inf) is 0 and not NaN. */
LS_BOTH_SIDES ls_real ls_statistics_top(ls_real m)
{
    return m == -INFINITY ? 0 : m;
}

/* (m, l) ⊕ (m', l'). The weights of both sides also apply to whatever else is relative to m: Σ e^(x-m) v. */
typedef struct ls_statistics_joined {
    ls_real m, l, weight[2];
} ls_statistics_joined;
LS_BOTH_SIDES ls_statistics_joined ls_statistics_join(ls_real m, ls_real l, ls_real m2, ls_real l2)
{
    ls_statistics_joined x;
    x.m = m2 > m ? m2 : m;
    x.weight[0] = ls_statistics_weight(m, x.m);
    x.weight[1] = ls_statistics_weight(m2, x.m);
    x.l = x.weight[0] * l + x.weight[1] * l2;
    return x;
}

/* Are probabilities that sum to `mass` all of a row's, but for the rounding of the sum? */
LS_BOTH_SIDES int ls_statistics_whole(ls_real mass)
{
    const ls_real off = mass - 1, most = sizeof(ls_real) == sizeof(float) ? (ls_real)4e-7 : (ls_real)1e-15;
    return off < most && off > -most;
}

#endif
