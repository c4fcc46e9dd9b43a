/* AdamW (Loshchilov & Hutter, 2019) where the parameters live: nothing that a step decides by its gradients comes to
 * the host, so it need not wait for them. */
#ifndef LS_ADAM_H
#define LS_ADAM_H

#include "device.h"
#include "real.h"

typedef struct ls_adam_rule {
    int64_t step; /* 1-based, for the correction of the bias */
    double rate, beta1, beta2, epsilon, weight_decay;
    double clip_norm; /* 0: none */
} ls_adam_rule;

/* A part of the flat vectors. */
typedef struct ls_adam_run {
    int64_t offset, count;
    int decays;
} ls_adam_run;

/* Doubles that squares() works in; the first one is the sum. */
enum { LS_SQUARES = 1 + 512 };

typedef struct ls_adam_ops {
    /* squares[0] = Σ g², in double, in a fixed order */
    void (*squares)(ls_queue *queue, int64_t n, const ls_real *g, double *squares);
    /* One update of the runs. g is first scaled so that its norm, sqrt(squares[0]), is at most clip_norm; where that,
     * or *loss (NULL: there is none to ask), is not finite, nothing changes. rule and run are the host's. mean, square:
     * the moments. */
    void (*update)(ls_queue *queue, const ls_adam_rule *rule, int runs, const ls_adam_run *run, const double *squares,
                   const ls_real *loss, const ls_real *g, ls_real *params, ls_real *mean, ls_real *square);
} ls_adam_ops;

extern const ls_adam_ops ls_adam_cpu, ls_adam_cuda;

/* NULL: this build has no such backend. */
static inline const ls_adam_ops *ls_adam_of(ls_device device)
{
    return device == LS_CPU ? &ls_adam_cpu : device == LS_CUDA ? LS_IF_CUDA(&ls_adam_cuda) : NULL;
}

/* ------------------------------------------------------------------------------------------------ arithmetic */

/* A rule in the precision of the parameters. */
typedef struct ls_adam_numbers {
    ls_real b1, a1, b2, a2, unbias1, unbias2, epsilon, rate, decay;
} ls_adam_numbers;

static inline ls_adam_numbers ls_adam_prepare(const ls_adam_rule *r)
{
    const double t = (double)r->step;
    ls_adam_numbers n;
    n.b1 = (ls_real)r->beta1, n.a1 = (ls_real)(1 - r->beta1);
    n.b2 = (ls_real)r->beta2, n.a2 = (ls_real)(1 - r->beta2);
    n.unbias1 = (ls_real)(1 / (1 - pow(r->beta1, t)));
    n.unbias2 = (ls_real)(1 / (1 - pow(r->beta2, t)));
    n.epsilon = (ls_real)r->epsilon, n.rate = (ls_real)r->rate;
    n.decay = (ls_real)(r->rate * r->weight_decay);
    return n;
}

/* What g is scaled by; less than 0: the norm or the loss is not finite. */
LS_BOTH_SIDES ls_real ls_adam_clip(double clip_norm, double squares, const ls_real *loss)
{
    const double norm = sqrt(squares), size = loss != NULL ? fabs((double)*loss) : 0, most = 1.7976931348623157e308;
    if (!(norm <= most) || !(size <= most)) return -1; /* neither inf nor NaN is */
    return (ls_real)(clip_norm > 0 && norm > clip_norm ? clip_norm / norm : 1);
}

/* g: scaled. decay: 0 where there is none. */
LS_BOTH_SIDES void ls_adam_element(const ls_adam_numbers *n, ls_real decay, ls_real g, ls_real *p, ls_real *mean,
                                   ls_real *square)
{
    *mean = n->b1 * *mean + n->a1 * g;
    *square = n->b2 * *square + n->a2 * g * g;
#ifdef LS_REAL_DOUBLE
    const double root = sqrt(n->unbias2 * *square);
#else
    const float root = sqrtf(n->unbias2 * *square);
#endif
    *p -= decay * *p + n->rate * (n->unbias1 * *mean) / (root + n->epsilon);
}

#endif
