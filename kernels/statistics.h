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

/* The δ of a row in backward: where a tile has all that the row sees, what the tile gives, flow / mass, of mass = Σ p,
 * flow = Σ p D do·v, size = Σ p |D do·v|. The δ of the output is the same but for rounding, of which nothing else is
 * left where one p is 1. But where the key of that p is dropped, δ is what others give: so they must be near. */
LS_BOTH_SIDES ls_real ls_statistics_delta(ls_real mass, ls_real flow, ls_real size, ls_real delta)
{
    const ls_real most = sizeof(ls_real) == sizeof(float) ? (ls_real)4e-7 : (ls_real)1e-15;
    const ls_real off = mass - 1, apart = flow / mass - delta, near = 10 * most * size;
    return off < most && off > -most && apart <= near && apart >= -near ? flow / mass : delta;
}

#endif
