/* What segments.h and the landmarks of slots.h do, on a GPU, for all that landmarks are made of at once. */
#ifndef LS_SEGMENTS_CUDA_H
#define LS_SEGMENTS_CUDA_H

#include "cuda.h"

extern "C" {
#include "slots.h"
}

/* Doubles of room to sum in. */
int64_t ls_landmark_room(const ls_pass *p, ls_landmarks l);

/* sums (B*H, ..) of what is here. */
void ls_landmark_sums_cuda(const ls_pass *p, ls_landmarks l, double *room, ls_real *sums);
/* The adjoint: what rows of queries and keys get is added to their gradients. */
void ls_landmark_spread_cuda(const ls_pass *p, ls_landmarks l, const ls_real *dsums);
/* From what was reduced: mean (2,B*H,count,d), of queries and of keys, or twice of keys; reference (B*H,d). */
void ls_landmark_means_cuda(const ls_pass *p, ls_landmarks l, const ls_real *sums, double *mean, ls_real *reference);
/* The adjoint, from dmean (B*H,count,d) of the first sequence, and of the second `apart` doubles behind it. No gradient
 * flows through the reference: zeros. */
void ls_landmark_means_backward_cuda(const ls_pass *p, ls_landmarks l, const double *dmean, int64_t apart,
                                     ls_real *dsums);

#endif
