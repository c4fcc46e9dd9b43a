/* The emulator: enough of CUDA to compile the .cu files as C++ and run them on the CPU, for tests where there is no
 * GPU. It stands before the real header (-I tests/emulator); what it runs is as the hardware would, only in one fixed
 * order: blocks one after the other, and each thread of a block until it waits. That order is one of those a GPU may
 * choose, so what passes here may still have a race, unless it was looked for (checks.h); what waits for what never
 * comes is found, and stops the program.
 *
 *   - Each CUDA thread is a fiber with a stack of its own. A kernel whose threads never wait runs on one stack.
 *   - Device memory is one region of addresses that nobody may touch but while a kernel, a copy or a cuBLAS call runs:
 *     host code that reads or writes it is killed by SIGSEGV, where it does so. A kernel that leaves the region is,
 * too. Fresh memory is NaN in every number; what a kernel wrote behind the end of an allocation is found by cudaFree.
 *   - Dynamic shared memory is NaN before each block, and its end is the end of a page: beyond lies SIGSEGV.
 *     __shared__ arrays keep what the block before has left. What they take nobody knows here: of what a block has, 48
 *     KiB, or 227 (LONGSPAN_EMULATOR_SHARED=KiB) of a kernel that has asked, 8 are left for them.
 *   - __syncthreads waits for all threads that have not returned, which must stand at the same line. Shuffles and votes
 *     wait for the lanes of their mask that have not returned; what they read of any other lane is all ones: NaN, -1.
 *   - Streams are queues: work is done as late as may be, when somebody waits for it, so that who does not wait sees
 *     what was there before. A stream that waits for an event has the other stream run up to it, and no further; memory
 *     of the device is freed, and copies to pageable host memory return, after all that was given before. With
 *     LONGSPAN_EMULATOR_ORDER=NUMBER streams run at any time by random numbers from that seed: what is right in every
 *     order that events allow comes out the same. One host thread at a time.
 *   - Copies to shared memory that go on meanwhile (cuda_copy.h) are made likewise: when their thread waits for them,
 *     or by chance at once. */
#ifndef EMULATOR_CUDA_RUNTIME_H
#define EMULATOR_CUDA_RUNTIME_H

#include "cuda_runtime_api.h"
#include "checks.h"

#include <math.h>
#include <string.h>

#include <tuple>

/* ---- the language */
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_VERSION 13000

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned X = 1, unsigned Y = 1, unsigned Z = 1) : x(X), y(Y), z(Z) {}
};
#define EMULATOR_VECTOR(type, of, alignment)                                                                           \
    struct alignas(alignment) type##2                                                                                  \
    {                                                                                                                  \
        of x, y;                                                                                                       \
    };                                                                                                                 \
    struct type##3                                                                                                     \
    {                                                                                                                  \
        of x, y, z;                                                                                                    \
    };                                                                                                                 \
    struct alignas(16) type##4                                                                                         \
    {                                                                                                                  \
        of x, y, z, w;                                                                                                 \
    };                                                                                                                 \
    static inline type##2 make_##type##2(of x, of y)                                                                   \
    {                                                                                                                  \
        return {x, y};                                                                                                 \
    }                                                                                                                  \
    static inline type##3 make_##type##3(of x, of y, of z)                                                             \
    {                                                                                                                  \
        return {x, y, z};                                                                                              \
    }                                                                                                                  \
    static inline type##4 make_##type##4(of x, of y, of z, of w)                                                       \
    {                                                                                                                  \
        return {x, y, z, w};                                                                                           \
    }
EMULATOR_VECTOR(float, float, 8)
EMULATOR_VECTOR(double, double, 16)
EMULATOR_VECTOR(int, int, 8)
#undef EMULATOR_VECTOR
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

/* ---- what threads of a block say to each other */
namespace emulator
{
[[noreturn]] void die(const char *what);
enum collective { SYNC, MEET, SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, BALLOT, ANY, ALL };
/* The calling thread waits for the lanes of mask, and gets what it is to know: 8 bytes of value, or a vote. */
uint64_t collect(collective, unsigned mask, uint64_t value, int argument, int width, const char *file, int line);
int barrier(const char *file, int line, int vote);
unsigned char *shared_memory();

template <typename T>
static inline T shuffle(collective what, unsigned mask, T x, int argument, int width, const char *file, int line)
{
    static_assert(sizeof x <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = collect(what, mask, bits, argument, width, file, line);
    memcpy(&x, &bits, sizeof x);
    return x;
}
} // namespace emulator

/* where a call stands, for messages and for divergent barriers */
#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
static inline void __syncthreads(EMULATOR_HERE)
{
    emulator::barrier(file, line, 0);
}
static inline int __syncthreads_or(int predicate, EMULATOR_HERE)
{
    return emulator::barrier(file, line, predicate != 0);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE)
{
    emulator::collect(emulator::SYNC, mask, 0, 0, 32, file, line);
}
template <typename T> static inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32, EMULATOR_HERE)
{
    return emulator::shuffle(emulator::SHUFFLE, mask, x, lane, width, file, line);
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, EMULATOR_HERE)
{
    return emulator::shuffle(emulator::SHUFFLE_XOR, mask, x, lanes, width, file, line);
}
template <typename T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATOR_HERE)
{
    return emulator::shuffle(emulator::SHUFFLE_UP, mask, x, (int)by, width, file, line);
}
template <typename T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, EMULATOR_HERE)
{
    return emulator::shuffle(emulator::SHUFFLE_DOWN, mask, x, (int)by, width, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE)
{
    return (unsigned)emulator::collect(emulator::BALLOT, mask, predicate != 0, 0, 32, file, line);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE)
{
    return (int)emulator::collect(emulator::ANY, mask, predicate != 0, 0, 32, file, line);
}
static inline int __all_sync(unsigned mask, int predicate, EMULATOR_HERE)
{
    return (int)emulator::collect(emulator::ALL, mask, predicate != 0, 0, 32, file, line);
}
#undef EMULATOR_HERE

/* ---- arithmetic; no atomics on floating numbers, whose sums would depend on an order */
EMULATOR_UNCHECKED static inline int atomicAdd(int *at, int x)
{
    const int old = *at;
    *at = old + x;
    return old;
}

#define EMULATOR_MINMAX(T)                                                                                             \
    static inline T min(T a, T b)                                                                                      \
    {                                                                                                                  \
        return a < b ? a : b;                                                                                          \
    }                                                                                                                  \
    static inline T max(T a, T b)                                                                                      \
    {                                                                                                                  \
        return a > b ? a : b;                                                                                          \
    }
EMULATOR_MINMAX(int)
EMULATOR_MINMAX(unsigned)
EMULATOR_MINMAX(long)
EMULATOR_MINMAX(unsigned long)
EMULATOR_MINMAX(long long)
EMULATOR_MINMAX(unsigned long long)
#undef EMULATOR_MINMAX
static inline float min(float a, float b)
{
    return fminf(a, b);
}
static inline float max(float a, float b)
{
    return fmaxf(a, b);
}
static inline double min(double a, double b)
{
    return fmin(a, b);
}
static inline double max(double a, double b)
{
    return fmax(a, b);
}
template <typename T> static inline T __ldg(const T *x)
{
    return *x;
}
template <typename T> static inline void __stwb(T *to, T x)
{
    *to = x;
}
/* rounded before anything is added to it: what went through memory takes no part in a fused multiply-add */
static inline float __fmul_rn(float x, float y)
{
    const volatile float z = x * y;
    return z;
}
static inline double __dmul_rn(double x, double y)
{
    const volatile double z = x * y;
    return z;
}
static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

/* ---- the runtime */
template <typename T> static inline cudaError_t cudaMalloc(T **p, size_t bytes)
{
    void *got = NULL;
    const cudaError_t error = cudaMalloc(&got, bytes);
    *p = static_cast<T *>(got);
    return error;
}
template <typename T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes)
{
    void *got = NULL;
    const cudaError_t error = cudaMallocHost(&got, bytes);
    *p = static_cast<T *>(got);
    return error;
}

/* ---- launches */
namespace emulator
{
/* Takes over `arguments`, so many bytes, which go with `forget` when the kernel has run. */
void run(const char *name, const void *kernel, void (*thread)(void *), void *arguments, size_t bytes,
         void (*forget)(void *), dim3 grid, dim3 block, size_t shared, cudaStream_t stream);

/* A kernel with its launch configuration; called with the arguments, which its type converts. Of each file alone: two
 * files may call different structs by the same name, and the linker must not take the one's code for the other's. */
namespace
{
template <typename... P> struct launch {
    const char *name;
    void (*kernel)(P...);
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
    void operator()(P... p) const
    {
        struct call {
            void (*kernel)(P...);
            std::tuple<P...> arguments;
        };
        run(
            name, reinterpret_cast<const void *>(kernel),
            [](void *x) {
                const call *one = static_cast<const call *>(x);
                std::apply(one->kernel, one->arguments);
            },
            new call{kernel, std::tuple<P...>(p...)}, sizeof(call), [](void *x) { delete static_cast<call *>(x); },
            grid, block, shared, stream);
    }
};
template <typename... P>
static inline launch<P...> launch_of(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                     cudaStream_t stream)
{
    return {name, kernel, grid, block, shared, stream};
}
} // namespace

/* Device memory may be touched while one of these exists: what the emulated runtime and cuBLAS stand in. */
struct device_access {
    device_access();
    ~device_access();
    device_access(const device_access &) = delete;
    device_access &operator=(const device_access &) = delete;
};
/* 1: [p, p + bytes) lies in one live allocation; 0: it is host memory, or a device address that is not */
int is_device(const void *p);
int is_allocated(const void *p, size_t bytes);
/* See cuda_copy.h: all but so many groups are waited for. */
void copy_late(void *to, const void *from, size_t bytes, bool exists);
void close_copies();
void wait_for_copies(size_t but);
} // namespace emulator

#endif
