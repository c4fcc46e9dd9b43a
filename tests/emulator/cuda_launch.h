/* How a kernel is started under the emulator: see core/cuda_launch.h, which this header stands before. */
#ifndef LS_CUDA_LAUNCH_H
#define LS_CUDA_LAUNCH_H

#include <cuda_runtime.h>

/* The arguments are converted to the kernel's parameters where they stand, as by <<<>>>, once for all threads. A kernel
 * that is a template is named with its template arguments. */
#define LS_START(queue, kernel, blocks, threads, shared, ...)                                                          \
    emulator::launch_of(#kernel, kernel, blocks, threads, shared, (queue)->stream)(__VA_ARGS__)
#define LS_SHARED(type, name) type *name = reinterpret_cast<type *>(emulator::shared_memory())

#endif
