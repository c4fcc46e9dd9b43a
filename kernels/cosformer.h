/* What both of cosformer's files say alike. */
#ifndef LS_COSFORMER_H
#define LS_COSFORMER_H

#include "linear.h"

enum ls_cosformer_option { ACT, MAX_LEN, EPS }; /* option[] */

static inline int act_of(const ls_pass *p)
{
    return p->option[ACT] == 0 ? LS_LINEAR_RELU : LS_LINEAR_ONE_PLUS_ELU;
}

extern const struct ls_feature_map_cuda ls_cosformer_map_cuda;
extern const ls_cuda_mechanism ls_cosformer_cuda;

#endif
