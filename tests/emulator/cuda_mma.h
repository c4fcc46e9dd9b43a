/* Tensor cores under the emulator: see core/cuda_mma.h, which this header stands before. What a lane has of a matrix is
 * written here once more, from the PTX ISA's figures of ldmatrix and mma.m16n8k16, as what the number at a row and a
 * column is called. A GPU rounds the sum of an instruction towards 0 (Fasi et al., 2021), and so does this. */
#ifndef LS_CUDA_MMA_H
#define LS_CUDA_MMA_H

#include <cmath>
#include <cuda_bf16.h>
#include <stdio.h>
#include <stdlib.h>

namespace emulator
{
/* What the lanes of a warp bring to one instruction. One block runs at a time. Two tables take turns, so that lanes
 * meet once an instruction: who writes a table again has met the others at the instruction between, and they have read
 * it. */
struct mma_table {
    int line[32];
    __nv_bfloat16 row[32][8]; /* as it was when its lane came: what others write needs a barrier before */
    uint32_t a[32][4], b[32][2];
    double a8[16][8], b8[8][8]; /* of products in double */
};
static mma_table mma_tables[32][2]; /* of the warps of a block */
static bool mma_turn[32][32];       /* of the lanes of the warps */

EMULATOR_UNCHECKED static inline mma_table &mma_next_table()
{
    const unsigned warp = threadIdx.x / 32;
    return mma_tables[warp][mma_turn[warp][threadIdx.x % 32] ^= true];
}

/* All have written their part of the table when this returns. */
EMULATOR_UNCHECKED static inline void mma_meet(const mma_table &table)
{
    emulator::collect(MEET, 0xffffffffu, 0, 0, 32, __FILE__, __LINE__);
    const int mine = table.line[threadIdx.x % 32];
    if (mine != table.line[0]) {
        fprintf(stderr, "emulator: lanes of a warp are at matrix instructions of lines %d and %d\n", table.line[0],
                mine);
        abort();
    }
}

EMULATOR_UNCHECKED static inline float mma_number(uint32_t two, int which)
{
    return __bfloat162float({(uint16_t)(which == 0 ? two & 0xffff : two >> 16)});
}
/* The float next to x on the side of 0. */
EMULATOR_UNCHECKED static inline float mma_towards_0(double x)
{
    const float near = (float)x;
    return std::fabs((double)near) > std::fabs(x) ? std::nextafterf(near, 0) : near;
}
EMULATOR_UNCHECKED static inline float mma_a(const mma_table &table, int row, int column)
{
    return mma_number(table.a[row % 8 * 4 + column % 8 / 2][row / 8 + column / 8 * 2], column % 2);
}
EMULATOR_UNCHECKED static inline float mma_b(const mma_table &table, int row, int column)
{
    return mma_number(table.b[column * 4 + row % 8 / 2][row / 8], row % 2);
}

EMULATOR_UNCHECKED static inline void mma_load(uint32_t x[4], const __nv_bfloat16 *row, bool transposed, int line)
{
    const int lane = (int)threadIdx.x % 32;
    mma_table &table = mma_next_table();
    if ((uintptr_t)row % 16 != 0) {
        fprintf(stderr, "emulator: a row of a matrix instruction is not aligned\n");
        abort();
    }
    check_read(row, sizeof table.row[lane]);
    memcpy(table.row[lane], row, sizeof table.row[lane]);
    table.line[lane] = line;
    mma_meet(table);
    for (int i = 0; i < 4; i++) {
        const __nv_bfloat16(*const matrix)[8] = table.row + 8 * i;
        const int g = lane / 4, t = lane % 4 * 2;
        const __nv_bfloat16 low = transposed ? matrix[t][g] : matrix[g][t];
        const __nv_bfloat16 high = transposed ? matrix[t + 1][g] : matrix[g][t + 1];
        x[i] = low.bits | (uint32_t)high.bits << 16;
    }
}
} // namespace emulator

EMULATOR_UNCHECKED static inline void ls_mma_load(uint32_t x[4], const __nv_bfloat16 *row, int line = __builtin_LINE())
{
    emulator::mma_load(x, row, false, line);
}

EMULATOR_UNCHECKED static inline void ls_mma_load_transposed(uint32_t x[4], const __nv_bfloat16 *row,
                                                             int line = __builtin_LINE())
{
    emulator::mma_load(x, row, true, line);
}

EMULATOR_UNCHECKED static inline void ls_mma(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                                             int line = __builtin_LINE())
{
    const int lane = (int)threadIdx.x % 32;
    emulator::mma_table &table = emulator::mma_next_table();
    memcpy(table.a[lane], a, sizeof table.a[lane]);
    table.b[lane][0] = b0, table.b[lane][1] = b1, table.line[lane] = line;
    emulator::mma_meet(table);
    for (int e = 0; e < 4; e++) {
        double sum = c[e];
        for (int k = 0; k < 16; k++)
            sum += (double)emulator::mma_a(table, lane / 4 + e / 2 * 8, k) *
                   (double)emulator::mma_b(table, k, lane % 4 * 2 + e % 2);
        c[e] = emulator::mma_towards_0(sum);
    }
}

/* In double a lane names its numbers by where they stand: PTX ISA, mma.m16n8k8 with .f64. */
EMULATOR_UNCHECKED static inline void ls_mma_double(double (&c)[4], const double (&a)[4], const double (&b)[2],
                                                    int line = __builtin_LINE())
{
    const int lane = (int)threadIdx.x % 32, group = lane >> 2, in_group = lane % 4;
    emulator::mma_table &table = emulator::mma_next_table();
    for (int i = 0; i < 4; i++) table.a8[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4] = a[i];
    for (int i = 0; i < 2; i++) table.b8[i == 0 ? in_group : in_group + 4][group] = b[i];
    table.line[lane] = line;
    emulator::mma_meet(table);
    for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
        for (int k = 0; k < 8; k++) c[i] = std::fma(table.a8[row][k], table.b8[k][column], c[i]);
    }
}

static inline float ls_inverse(float x)
{
    const float y = 1 / x;
    return std::fabs(y) < 1.1754944e-38f ? 0 : y;
}

static inline float ls_exp2(float x)
{
    const float y = std::exp2(x);
    return y < 1.1754944e-38f ? 0 : y;
}

#endif
