/* What both of cosformer's files say alike. */
#ifndef LS_COSFORMER_H
#define LS_COSFORMER_H

#include "linear.h"

enum ls_cosformer_option { ACT, MAX_LEN, EPS }; /* option[] */
enum ls_cosformer_act { RELU, ONE_PLUS_ELU };

LS_BOTH_SIDES ls_real ls_relu(ls_real x)
{
    return x > 0 ? x : 0;
}

LS_BOTH_SIDES ls_real ls_one_plus_elu(ls_real x)
{
    const ls_real e = ls_exp(x < 0 ? x : 0);
    return x > 0 ? 1 + x : e;
}

/* dx, from that of the one or the other. */
LS_BOTH_SIDES ls_real ls_relu_backward(ls_real x, ls_real dy)
{
    return x > 0 ? dy : 0;
}

LS_BOTH_SIDES ls_real ls_one_plus_elu_backward(ls_real x, ls_real dy)
{
    return dy * ls_exp(x < 0 ? x : 0);
}

extern const struct ls_feature_map_cuda ls_cosformer_map_cuda;
extern const ls_cuda_mechanism ls_cosformer_cuda;

#endif
