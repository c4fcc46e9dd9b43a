/* Every access of kernels to memory is looked at, with EMULATOR_CHECKS (longspan_checked of tests.cmake): the .cu files
 * are compiled with -fsanitize=thread, and the calls that this puts before each access are answered by checks.cpp. It
 * keeps of each byte of device and shared memory who wrote it last and who has read it since, and stops the program at
 * the first of
 *
 *   - a race. Two accesses of a kernel to a byte, one of which writes, have an order only in one thread; in one block
 *     with a __syncthreads between; in one warp with a __syncwarp of all its lanes between: lanes meet at a shuffle, a
 *     vote or a matrix instruction as well, but CUDA does not say that one sees then what another has written. A copy
 *     to shared memory that goes on meanwhile (cuda_copy.h) writes at any time until its thread has waited for it;
 *   - a read of device memory that nobody has written since it was allocated or, with LONGSPAN_POISON, taken; by cuBLAS
 *     or a copy to the host, too;
 *   - an access to device memory that is not allocated, or that is on no boundary of what it reads or writes at once;
 *   - an access to anything but device and shared memory, the thread's own variables and arguments, and what belongs to
 *     the program: a pointer to memory of the host, say, which all kernels could follow here.
 *
 * Those are the errors that compute-sanitizer looks for on a GPU. Atomic operations are not looked at, nor is the order
 * between streams. */
#ifndef EMULATOR_CHECKS_H
#define EMULATOR_CHECKS_H

#include <stddef.h>

namespace emulator
{
#ifdef EMULATOR_CHECKS
/* All device memory there may be; a part of it is allocated, freed, written by something else than a kernel, copied,
 * read by something else. */
void check_memory(const void *region, const void *end);
void check_allocated(const void *p, size_t bytes);
void check_freed(const void *p, size_t bytes);
void check_filled(const void *p, size_t bytes);
void check_copied(const void *to, const void *from, size_t bytes);
void check_taken(const char *who, const void *from, size_t bytes);
/* A kernel begins, whose arguments lie there, a block of it; all threads of the block are past a barrier, those of a
 * warp past a __syncwarp; the kernel has ended. */
void check_kernel(const char *name, const void *shared, const void *shared_end, const void *arguments, size_t bytes);
void check_block();
void check_barrier(const char *file, int line);
void check_warp(int warp, const char *file, int line);
void check_end();
extern int checked_thread;                            /* who runs */
extern const void *checked_stack, *checked_stack_end; /* and where its variables are */
/* A thread reads where the compiler sees nothing; its copy to `to` begins, ends. */
void check_read(const void *from, size_t bytes);
void check_copy(const void *to, const void *from, size_t bytes);
void check_copy_end(const void *to, size_t bytes);
#define EMULATOR_UNCHECKED __attribute__((no_sanitize_thread))
#else
static inline void check_memory(const void *, const void *) {}
static inline void check_allocated(const void *, size_t) {}
static inline void check_freed(const void *, size_t) {}
static inline void check_filled(const void *, size_t) {}
static inline void check_copied(const void *, const void *, size_t) {}
static inline void check_taken(const char *, const void *, size_t) {}
static inline void check_kernel(const char *, const void *, const void *, const void *, size_t) {}
static inline void check_block() {}
static inline void check_barrier(const char *, int) {}
static inline void check_warp(int, const char *, int) {}
static inline void check_end() {}
[[maybe_unused]] static int checked_thread;
[[maybe_unused]] static const void *checked_stack, *checked_stack_end;
static inline void check_read(const void *, size_t) {}
static inline void check_copy(const void *, const void *, size_t) {}
static inline void check_copy_end(const void *, size_t) {}
#define EMULATOR_UNCHECKED
#endif
} // namespace emulator

#endif
