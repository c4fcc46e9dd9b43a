/* What both of performer's files say alike. */
#ifndef LS_PERFORMER_H
#define LS_PERFORMER_H

#include "linear.h"

enum ls_performer_option { NUM_FEATURES, EPS, DENOM_MIN, ORTHOGONAL }; /* option[] */
enum ls_performer_saved { PROJECTION = LS_LINEAR_SAVED };              /* saved[] */

static inline int64_t num_features(const ls_pass *p)
{
    return (int64_t)p->option[NUM_FEATURES];
}

/* The stabilisers cancel. */
static inline int any_will_do(const ls_pass *p)
{
    return p->option[EPS] == 0 && p->option[DENOM_MIN] == 0;
}

extern const struct ls_feature_map_cuda ls_performer_map_cuda;
extern const ls_cuda_mechanism ls_performer_cuda;

#endif
