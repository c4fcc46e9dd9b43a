/* Asynchronous copies under the emulator: see core/cuda_copy.h, which this header stands before. A copy is made when
 * its thread waits for it, so that who does not wait is seen; with LONGSPAN_EMULATOR_ORDER some are made at once, so
 * that who still reads what they overwrite is. A block that ends with copies under way stops the program. */
#ifndef LS_CUDA_COPY_H
#define LS_CUDA_COPY_H

#include <cuda_runtime.h>

template <int BYTES> static inline void ls_copy(void *to, const void *from, bool exists)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can copy");
    emulator::copy_late(to, from, BYTES, exists);
}

static inline void ls_copy_close()
{
    emulator::close_copies();
}

template <int N> static inline void ls_copy_wait()
{
    emulator::wait_for_copies(N);
}

#endif
