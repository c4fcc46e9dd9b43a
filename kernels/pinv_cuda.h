/* The pseudo-inverses of pinv.h on a GPU, of `batch` matrices at a time. Everything is in device memory. */
#ifndef LS_PINV_CUDA_H
#define LS_PINV_CUDA_H

#ifdef __cplusplus
extern "C" {
#endif

#include "device.h"
#include "pinv.h"

enum { LS_PINV_IN_BLOCK = 64 }; /* rows of a matrix that a block of threads has room for */

/* Doubles of scratch that both functions below need for each matrix. */
static inline int64_t ls_pinv_scratch_cuda(int64_t m)
{
    return m <= LS_PINV_IN_BLOCK ? 0 : ls_pinv_scratch(m);
}

/* A (batch,m,m), peak (batch). Z (iterations + 1, batch, m, m): the last are the results. */
void ls_pinv_cuda(ls_queue *q, int64_t batch, int64_t m, int iterations, const double *A, const double *peak, double *Z,
                  double *scratch);
/* dZ (batch,m,m) is used up; dA (batch,m,m) and dpeak (batch) are overwritten. */
void ls_pinv_backward_cuda(ls_queue *q, int64_t batch, int64_t m, int iterations, const double *A, const double *peak,
                           const double *Z, double *dZ, double *dA, double *dpeak, double *scratch);

#ifdef __cplusplus
}
#endif

#endif
