/* Copies from device memory to shared memory that go on while the threads that asked for them compute: cp.async of PTX,
 * for compute capability 8.0 and later. The tests put a header of this name before this one: there a copy is made as
 * late as may be.
 *
 * A thread's copies since the last ls_copy_close are a group; ls_copy_wait<N> waits for all of the thread's groups but
 * the N last. Other threads see what was copied after a barrier that follows. */
#ifndef LS_CUDA_COPY_H
#define LS_CUDA_COPY_H

#include <stdint.h>

/* BYTES: 4, 8 or 16, on such a boundary on both sides. Where nothing `exists`, they become 0; from must be device
 * memory all the same. */
template <int BYTES> __device__ static inline void ls_copy(void *to, const void *from, bool exists)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(to), there = exists ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(from), "r"(there) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(at), "l"(from), "n"(BYTES), "r"(there)
                     : "memory");
}

__device__ static inline void ls_copy_close()
{
    asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int N> __device__ static inline void ls_copy_wait()
{
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
}

#endif
