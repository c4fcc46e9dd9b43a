/* Arithmetic of summaries (see ls_monoid in kernels/mechanism.h): n elements of `stride` reals, one after the other. */
#ifndef LS_MONOID_H
#define LS_MONOID_H

#include "mechanism.h"

void ls_monoid_identity(ls_monoid m, ls_real *x);
/* out = left ⊕ right; out may be left or right. Commutative in exact arithmetic; the order is kept all the same, so
 * that every rank rounds alike. */
void ls_monoid_combine(ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out);

/* The vector-Jacobian product, for any crossing that combines `sent` of some ranks into `got` of others.
 * got.s = Σ_p sent_p.s e^(m_p - M), so d sent_p.s = Σ_r e^(m_p - M_r) d got_r.s = e^(m_p + m) s of the combination of
 * (−M_r, d got_r.s): again a softsum, with the maxima negated, crossing the opposite way. All exponents are <= 0.
 * _begin makes what crosses back from got and dgot; _end turns what arrived into dsent (maxima get 0). */
void ls_monoid_vjp_begin(ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back);
void ls_monoid_vjp_end(ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent);

/* ------------------------------------------------------------------------------------------------ of one element,
 * the same on the CPU and in CUDA kernels */

/* out = far carried over n positions + near, complex; lambda: re, im; sign -1: the conjugate. out may be far or near.
 */
LS_BOTH_SIDES void ls_decay_combine(const double *lambda, double n, double sign, const ls_real *far,
                                    const ls_real *near, ls_real *out)
{
    const double size = exp(lambda[0] * n), re = size * cos(lambda[1] * n), im = sign * size * sin(lambda[1] * n);
    const double x = (double)far[0], y = (double)far[1];
    const ls_real near_re = near[0], near_im = near[1];
    out[0] = (ls_real)(re * x - im * y + (double)near_re);
    out[1] = (ls_real)(re * y + im * x + (double)near_im);
}

#endif
