/* What segments.h and the values' reference of slots.h do, on a GPU, for all that landmarks are made of at once. Of
 * each (b,h) there stand one behind the other: `count` segments of the queries, unless `sequences` is 1, `count` of the
 * keys, and the values' reference: their sum, and the number of keys. */
#ifndef LS_SEGMENTS_CUDA_H
#define LS_SEGMENTS_CUDA_H

#include "cuda.h"

extern "C" {
#include "segments.h"
}

/* Reals of a (b,h). */
static inline int64_t ls_landmark_sums(int64_t count, int sequences, int64_t d)
{
    return (sequences * count + 1) * d + 1;
}
/* Doubles of room to sum in. */
int64_t ls_landmark_room(const ls_pass *p, int64_t count);

/* sums (B*H, ..) of what is here. */
void ls_landmark_sums_cuda(const ls_pass *p, int64_t count, int sequences, double *room, ls_real *sums);
/* The adjoint: what rows of queries and keys get is added to their gradients. */
void ls_landmark_spread_cuda(const ls_pass *p, int64_t count, int sequences, const ls_real *dsums);
/* From what was reduced: mean (2,B*H,count,d), of queries and of keys, or twice of keys; reference (B*H,d). */
void ls_landmark_means_cuda(const ls_pass *p, int64_t count, int sequences, const ls_real *sums, double *mean,
                            ls_real *reference);
/* The adjoint, from dmean (B*H,count,d) of the first sequence, and of the second `apart` doubles behind it. No gradient
 * flows through the reference: zeros. */
void ls_landmark_means_backward_cuda(const ls_pass *p, int64_t count, int sequences, const double *dmean, int64_t apart,
                                     ls_real *dsums);

#endif
