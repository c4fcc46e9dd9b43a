/* The pseudo-inverses of pinv.h on a GPU, of `batch` matrices at a time. Everything is in device memory. */
#ifndef LS_PINV_CUDA_H
#define LS_PINV_CUDA_H

#include "cuda.h"

extern "C" {
#include "pinv.h"
}

/* A (batch,m,m), peak (batch). Z (iterations + 1, batch, m, m): the last are the results.
 * scratch: batch ls_pinv_scratch(m) doubles. */
void ls_pinv_cuda(ls_queue *q, int64_t batch, int64_t m, int iterations, const double *A, const double *peak, double *Z,
                  double *scratch);
/* dZ (batch,m,m) is used up; dA (batch,m,m) and dpeak (batch) are overwritten. */
void ls_pinv_backward_cuda(ls_queue *q, int64_t batch, int64_t m, int iterations, const double *A, const double *peak,
                           const double *Z, double *dZ, double *dA, double *dpeak, double *scratch);

#endif
