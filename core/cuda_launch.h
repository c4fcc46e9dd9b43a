/* How a kernel is started. The tests put a header of this name before this one: it runs the kernel on the CPU. */
#ifndef LS_CUDA_LAUNCH_H
#define LS_CUDA_LAUNCH_H

/* See LS_LAUNCH in core/cuda.h, which alone uses it. */
#define LS_START(queue, kernel, blocks, threads, shared, ...)                                                          \
    kernel<<<(blocks), (threads), (shared), (queue)->stream>>>(__VA_ARGS__)
/* In a kernel: `name` is the block's dynamic shared memory, as an array of type. */
#define LS_SHARED(type, name)                                                                                          \
    extern __shared__ __align__(16) unsigned char ls_shared_memory[];                                                  \
    type *name = reinterpret_cast<type *>(ls_shared_memory)

#endif
