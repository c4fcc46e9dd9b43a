/* What segments.h and the values' reference of slots.h do, on a GPU. `room`: ls_segment_room doubles. */
#ifndef LS_SEGMENTS_CUDA_H
#define LS_SEGMENTS_CUDA_H

#include "cuda.h"

extern "C" {
#include "segments.h"
}

/* For rows of `n` of each of G (b,h), in `count` segments. */
int64_t ls_segment_room(int64_t G, int64_t n, int64_t count, int64_t d);
/* For queries, keys and the values' reference of a pass. */
int64_t ls_segment_room_of_pass(const ls_pass *p, int64_t count);

void ls_segment_sums_cuda(ls_queue *q, const ls_segmented *s, double *room, ls_real *sums, int64_t stride);
void ls_segment_spread_cuda(ls_queue *q, const ls_segmented *s, const ls_real *dsums, int64_t stride);
void ls_reference_sums_cuda(const ls_pass *p, double *room, ls_real *sums, int64_t stride);
/* reference (G,d) from what was reduced: element g of `sums` is at g stride. */
void ls_reference_cuda(ls_queue *q, int64_t G, int64_t d, const ls_real *sums, int64_t stride, ls_real *reference);
/* No gradient flows through the reference: zeros where that of its sums would be, from dsums + g stride on. */
void ls_reference_clear_cuda(ls_queue *q, int64_t G, int64_t d, ls_real *dsums, int64_t stride);
/* mean (G,m,d) = the sums of segments of (b,h) g, at sums + g stride, over their tokens. */
void ls_segment_means_cuda(ls_queue *q, ls_segments s, int64_t G, int64_t d, const ls_real *sums, int64_t stride,
                           double *mean);
/* The adjoint: dsums = dmean / tokens. */
void ls_segment_means_backward_cuda(ls_queue *q, ls_segments s, int64_t G, int64_t d, const double *dmean,
                                    ls_real *dsums, int64_t stride);

#endif
