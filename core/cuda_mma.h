/* Products of small matrices on tensor cores: ldmatrix and mma.m16n8k16 of PTX for bfloat16, mma.m16n8k8 for double,
 * for compute capability 8.0 and later; and the power that goes with them. The tests put a header of this name before
 * this one: it does the same on the CPU.
 *
 * The lanes of a warp call together. With g = lane / 4 and t = 2 (lane % 4), a lane has
 *
 *   of c (16,8)   c[0], c[1]: row g, columns t and t + 1; c[2], c[3]: the same of row g + 8
 *   of a (16,16)  a[0]: row g, columns t and t + 1; a[1]: row g + 8; a[2], a[3]: columns 8 further right
 *   of b (16,8)   b0: column g, rows t and t + 1; b1: 8 further down
 *
 * Two numbers of a or b are 32 bits, the first the lower half. So two c side by side, rounded, are one a. */
#ifndef LS_CUDA_MMA_H
#define LS_CUDA_MMA_H

#include <cuda_bf16.h>
#include <stdint.h>

/* Four matrices (8,8) in shared memory, of which lane l names row l % 8 of matrix l / 8: 8 numbers, 16 bytes aligned.
 * x[i]: of matrix i, row g, columns t and t + 1. */
__device__ static inline void ls_mma_load(uint32_t x[4], const __nv_bfloat16 *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

/* The same of what is there, transposed: x[i] is column g, rows t and t + 1. */
__device__ static inline void ls_mma_load_transposed(uint32_t x[4], const __nv_bfloat16 *row)
{
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

/* c += a b */
__device__ static inline void ls_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* c (16,8) += a (16,8) b (8,8) in double. With g = lane / 4 and t = lane %
 * 4 a lane has of c what is said above; of a a[0]: row g, column t, a[1]: row g + 8, a[2], a[3]: column t + 4; of b
 * b[0]: row t, column g, b[1]: row t + 4. */
__device__ static inline void ls_mma_double(double (&c)[4], const double (&a)[4], const double (&b)[2])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
                 : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else /* the same by quarters: rows 0..7 and 8..15, columns of a 0..3 and 4..7 */
    for (int e = 0; e < 4; e++)
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(c[e % 2 * 2]), "+d"(c[e % 2 * 2 + 1])
                     : "d"(a[e]), "d"(b[e / 2]));
#endif
}

/* 1/x to 1 ulp, 0 beyond 2^126. */
__device__ static inline float ls_inverse(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 2^x to 22 bits, 0 below 2^-126: one instruction, where e^x, which bothers about what is below, takes five. */
__device__ static inline float ls_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
