/* The tests keep their tensors in host memory. Where a context is on a GPU, these stand before the calls of the same
 * names: they copy what goes in to the device, call, wait, and copy back what came out. */
#ifndef DEVICE_SHIM_H
#define DEVICE_SHIM_H

#include "longspan.h"

/* From the environment: LONGSPAN_TEST_DEVICE=cuda, or the CPU. */
ls_device test_device(void);
/* From the environment: LONGSPAN_TEST_PRECISION=tf32 or bf16, or float32. */
ls_precision test_precision(void);

ls_status shim_forward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                       const ls_real *params, ls_real *out, ls_saved *saved);
ls_status shim_backward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                        const ls_real *params, const ls_real *out, const ls_real *dout, ls_saved *saved,
                        const ls_attention_grads *grads);
ls_status shim_state_create(ls_attention *a, int64_t batch, int64_t max_length, ls_state **state);
ls_status shim_state_source(ls_attention *a, ls_state *s, const ls_attention_shape *shape, const ls_attention_io *io,
                            const ls_real *params);
ls_status shim_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params, ls_real *out);
ls_status shim_all_reduce_sum(ls_context *ctx, ls_real *x, int64_t n);

#ifndef DEVICE_SHIM_INSIDE
#define ls_attention_forward shim_forward
#define ls_attention_backward shim_backward
#define ls_state_create shim_state_create
#define ls_state_source shim_state_source
#define ls_attention_step shim_step
#define ls_all_reduce_sum shim_all_reduce_sum
#endif

#endif
