/* In place of kernels/softmax_tensor.cu where numbers are double, which bfloat16 is never made of: every call is for
 * softmax.cu's own kernels. */
#include "softmax_tiles.h"

int64_t ls_softmax_tensor_reals(const ls_pass *)
{
    return 0;
}

int ls_softmax_tensor_takes_narrow(const ls_pass *)
{
    return 0;
}

int ls_softmax_tensor_forward(ls_pass *, const softmax_call *, ls_real *)
{
    return 0;
}

int ls_softmax_tensor_backward(ls_pass *, const softmax_call *, ls_real *)
{
    return 0;
}
