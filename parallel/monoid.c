#include "monoid.h"
#include "statistics.h"

void ls_monoid_identity(ls_monoid m, ls_real *x)
{
    ls_zero(x, ls_monoid_size(m));
    if (m.has_max)
        for (int64_t g = 0; g < m.groups; g++) x[g * ls_monoid_stride(m)] = -INFINITY;
}

/* One side is carried over the positions of the other. */
static void combine_decay(ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    const int64_t reals = 2 * m.groups;
    const ls_real *far = m.reversed ? right : left, *near = m.reversed ? left : right;
    const double n = (double)near[reals], sign = m.conjugate ? -1 : 1;
    out[reals] = left[reals] + right[reals];
    for (int64_t g = 0; g < m.groups; g++)
        ls_decay_combine(m.decay + 2 * (g % m.decays), n, sign, far + 2 * g, near + 2 * g, out + 2 * g);
}

void ls_monoid_combine(ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    if (m.decay != NULL) {
        combine_decay(m, left, right, out);
        return;
    }
    const int64_t stride = ls_monoid_stride(m);
    for (int64_t g = 0; g < m.groups; g++, left += stride, right += stride, out += stride) {
        ls_real a = 1, b = 1;
        if (m.has_max) {
            const ls_real l = left[0], r = right[0], top = l > r ? l : r;
            a = ls_statistics_weight(l, top), b = ls_statistics_weight(r, top);
            out[0] = top;
        }
        const int64_t first = m.has_max, tail = first + m.scaled;
        for (int64_t i = first; i < tail; i++) out[i] = a * left[i] + b * right[i];
        for (int64_t i = tail; i < stride; i++) out[i] = left[i] + right[i];
    }
}

void ls_monoid_vjp_begin(ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back)
{
    const int64_t stride = ls_monoid_stride(m);
    memmove(back, dgot, (size_t)ls_monoid_size(m) * sizeof *back);
    if (!m.has_max) return;
    for (int64_t g = 0; g < m.groups; g++) {
        const int empty = got[g * stride] == -INFINITY; /* nothing arrived: its gradient has nowhere to go */
        back[g * stride] = empty ? -INFINITY : -got[g * stride];
        if (empty) ls_zero(back + g * stride + 1, m.scaled);
    }
}

void ls_monoid_vjp_end(ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent)
{
    const int64_t stride = ls_monoid_stride(m);
    memmove(dsent, arrived, (size_t)ls_monoid_size(m) * sizeof *dsent);
    if (!m.has_max) return;
    for (int64_t g = 0; g < m.groups; g++) {
        const ls_real from = sent[g * stride], back = dsent[g * stride];
        const ls_real w = back == -INFINITY ? 0 : ls_statistics_weight(from, -back);
        dsent[g * stride] = 0;
        for (int64_t i = 1; i <= m.scaled; i++) dsent[g * stride + i] *= w;
    }
}
