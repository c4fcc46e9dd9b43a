/* The phases of exact softmax attention on a GPU, as softmax.h has them on the CPU: for mechanisms that fall back on it
 * where a sequence is short. Same phases, same order, same rules.
 *
 * They use saved[0] and work[0..3] as ls_softmax_plan_cuda filled them. Places from 4 on are free. */
#ifndef LS_SOFTMAX_CUDA_H
#define LS_SOFTMAX_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif
#include "softmax.h"

void ls_softmax_plan_cuda(ls_pass *p, ls_arena *saved, ls_arena *work);
ls_status ls_softmax_begin_cuda(ls_pass *p, int phase);
ls_status ls_softmax_visit_cuda(ls_pass *p, int phase);
ls_status ls_softmax_visit_backward_cuda(ls_pass *p, int phase);
ls_status ls_softmax_finish_cuda(ls_pass *p, int phase);
ls_status ls_softmax_finish_backward_cuda(ls_pass *p, int phase);
ls_status ls_softmax_send_cuda(ls_pass *p, int phase);
ls_status ls_softmax_take_cuda(ls_pass *p, int phase);

#ifdef __cplusplus
}
#endif

#endif
