/* Tiles of a GPU's kernels: (SIDE,SIDE) numbers in shared memory, their products by a block of LS_THREADS, and how rows
 * come to them.
 *
 * There are two kinds of numbers in tiles. `plain`: floats, multiplied as such. `tensor`, on a queue of precision bf16:
 * bfloat16, multiplied by tensor cores, see cuda_mma.h. Sums are floats. What a kernel does with sums it says for
 * number (u, v) of a thread, which is that of row(u) and column(v), so that it need not know the kind. */
#ifndef LS_TILES_CUDA_H
#define LS_TILES_CUDA_H

#include "cuda.h"

extern "C" {
#include "mechanism.h"
}

#include <cuda_mma.h>

enum { SIDE = 64 };
/* Products of tiles a and b: a bᵀ, a b, aᵀ b. */
enum { ROWS_ROWS, ROWS_COLUMNS, COLUMNS_COLUMNS };

namespace ls_tiles
{
struct plain {
    typedef ls_real number, sum;
    typedef double exact;
    /* sums go over multiples of STEP; a thread has TOGETHER columns side by side; numbers of a tile are as exact as
     * sums */
    enum { PITCH = SIDE + 4, STEP = 4, TOGETHER = 4, IN_PLACE = 1 };
};
struct tensor {
    typedef __nv_bfloat16 number;
    typedef float sum, exact;
    enum { PITCH = SIDE + 8, STEP = 16, TOGETHER = 2, IN_PLACE = 0 };
};

__device__ static inline ls_real read_number(ls_real x)
{
    return x;
}
__device__ static inline float read_number(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}
__device__ static inline void write_number(ls_real y, ls_real *to)
{
    *to = y;
}
__device__ static inline void write_number(ls_real y, __nv_bfloat16 *to)
{
    *to = __float2bfloat16((float)y);
}
__device__ static inline void write_numbers(const ls_four &y, ls_real *to)
{
    *(ls_four *)to = y;
}
__device__ static inline void write_numbers(const ls_four &y, __nv_bfloat16 *to)
{
    const __nv_bfloat162 two[2] = {__floats2bfloat162_rn((float)y.v[0], (float)y.v[1]),
                                   __floats2bfloat162_rn((float)y.v[2], (float)y.v[3])};
    uint2 bits;
    memcpy(&bits, two, sizeof bits);
    *(uint2 *)to = bits;
}

/* What rounding takes from a number of a tile. */
__device__ static inline ls_real rest_of(ls_real, const ls_real *)
{
    return 0;
}
__device__ static inline ls_real rest_of(ls_real y, const __nv_bfloat16 *)
{
    return y - read_number(__float2bfloat16((float)y));
}
/* Number i of a tile, and what it is short of in another. rest NULL: that is lost. */
template <typename N> __device__ static inline void write_both(ls_real y, N *to, N *rest, int i)
{
    write_number(y, to + i);
    if (rest != NULL) write_number(rest_of(y, to), rest + i);
}
template <typename N> __device__ static inline ls_real read_both(const N *x, const N *rest, int i)
{
    return read_number(x[i]) + (rest == NULL ? 0 : read_number(rest[i]));
}

/* Number i of tiles that lie one after the other. */
template <class M> __device__ static inline typename M::number *tile_number(void *memory, int i)
{
    return (typename M::number *)memory + i * SIDE * M::PITCH;
}
template <class M> static inline size_t tiles_bytes(int count)
{
    return (size_t)(count * SIDE * M::PITCH) * sizeof(typename M::number);
}

__device__ static inline int least(int a, int b)
{
    return a < b ? a : b;
}
__device__ static inline int most(int a, int b)
{
    return a > b ? a : b;
}

static inline int on_tensor_cores(const ls_pass *p)
{
    return sizeof(ls_real) == sizeof(float) && p->queue->precision == LS_BF16;
}

/* ------------------------------------------------------------------------------------------------ sums */

template <class M, int FORM> struct sums;

/* Threads are 16 x 16: rows of each 16 apart, as columns either side by side, or 16 apart, too; of aᵀ b both side by
 * side. So the threads of a warp, two rows of 16, read different banks. */
typedef ls_warp_grid<2> grid;
enum { ACROSS = grid::COLUMNS };
static_assert(ACROSS * ACROSS == LS_THREADS && ACROSS * 4 == SIDE, "each thread has 4 x 4 numbers of a product");
template <int FORM> struct sums<plain, FORM> {
    enum { U = 4, V = 4 };
    ls_real x[U][V];

    __device__ static inline int row(int u)
    {
        const int r = grid::row_of_block();
        return FORM == COLUMNS_COLUMNS ? 4 * r + u : r + ACROSS * u;
    }
    __device__ static inline int column(int v)
    {
        const int c = grid::column();
        return FORM == ROWS_ROWS ? c + ACROSS * v : 4 * c + v;
    }
    __device__ inline ls_real &at(int u, int v)
    {
        return x[u][v];
    }
    __device__ inline void clear()
    {
        for (int u = 0; u < U; u++)
            for (int v = 0; v < V; v++) x[u][v] = 0;
    }
    /* += over the first n of what rows, or columns, hold. */
    __device__ inline void add(int n, const ls_real *a, const ls_real *b)
    {
        if constexpr (FORM == COLUMNS_COLUMNS) {
#pragma unroll 4
            for (int k = 0; k < n; k++) outer(ls_four_at(a + k * plain::PITCH + row(0)), b + k * plain::PITCH);
        } else {
            for (int k = 0; k < n; k += 4) {
                ls_four z[U];
#pragma unroll
                for (int u = 0; u < U; u++) z[u] = ls_four_at(a + row(u) * plain::PITCH + k);
                if constexpr (FORM == ROWS_ROWS) {
                    inner(z, b + k);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const ls_four of_a = {{z[0].v[j], z[1].v[j], z[2].v[j], z[3].v[j]}};
                        outer(of_a, b + (k + j) * plain::PITCH);
                    }
                }
            }
        }
    }

  private:
    __device__ inline void inner(const ls_four (&z)[U], const ls_real *b)
    {
#pragma unroll
        for (int v = 0; v < V; v++) {
            const ls_four y = ls_four_at(b + column(v) * plain::PITCH);
#pragma unroll
            for (int u = 0; u < U; u++)
#pragma unroll
                for (int j = 0; j < 4; j++) x[u][v] += z[u].v[j] * y.v[j];
        }
    }
    __device__ inline void outer(const ls_four &z, const ls_real *b)
    {
        const ls_four y = ls_four_at(b + column(0));
#pragma unroll
        for (int u = 0; u < U; u++)
#pragma unroll
            for (int v = 0; v < V; v++) x[u][v] += z.v[u] * y.v[v];
    }
};

/* A warp has 16 rows and 32 columns, a thread of these what cuda_mma.h says. */
template <int FORM> struct sums<tensor, FORM> {
    enum { U = 2, V = 8, PITCH = tensor::PITCH };
    float c[V / 2][4];

    __device__ static inline int first_row()
    {
        return threadIdx.x / LS_WARP % 4 * 16;
    }
    __device__ static inline int first_column()
    {
        return threadIdx.x / LS_WARP / 4 * 32;
    }
    __device__ static inline int row(int u)
    {
        return first_row() + threadIdx.x % LS_WARP / 4 + 8 * u;
    }
    __device__ static inline int column(int v)
    {
        return first_column() + 8 * (v / 2) + threadIdx.x % 4 * 2 + v % 2;
    }
    __device__ inline float &at(int u, int v)
    {
        return c[v / 2][2 * u + v % 2];
    }
    __device__ inline void clear()
    {
        for (int v = 0; v < V / 2; v++) c[v][0] = c[v][1] = c[v][2] = c[v][3] = 0;
    }
    __device__ inline void add(int n, const __nv_bfloat16 *a, const __nv_bfloat16 *b)
    {
        const int lane = threadIdx.x % LS_WARP, low = lane % 8, matrix = lane / 8;
        if (FORM == COLUMNS_COLUMNS) /* rows of aᵀ: transposed, 8 rows before 8 numbers of a row */
            a += (matrix / 2 * 8 + low) * PITCH + first_row() + matrix % 2 * 8;
        else
            a += (first_row() + lane % 16) * PITCH + lane / 16 * 8;
        if (FORM == ROWS_ROWS) /* columns of bᵀ lie as they are to be read */
            b += (first_column() + matrix / 2 * 8 + low) * PITCH + matrix % 2 * 8;
        else
            b += lane % 16 * PITCH + first_column() + lane / 16 * 8;
        for (int k = 0; k < n; k += 16) {
            uint32_t x[4];
            if (FORM == COLUMNS_COLUMNS)
                ls_mma_load_transposed(x, a + k * PITCH);
            else
                ls_mma_load(x, a + k);
#pragma unroll
            for (int v = 0; v < V / 2; v += 2) {
                uint32_t y[4];
                if (FORM == ROWS_ROWS)
                    ls_mma_load(y, b + 8 * v * PITCH + k);
                else
                    ls_mma_load_transposed(y, b + k * PITCH + 8 * v);
                ls_mma(c[v], x, y[0], y[1]);
                ls_mma(c[v + 1], x, y[2], y[3]);
            }
        }
    }
};

/* As many numbers as sums are taken over. */
template <class M> __device__ static inline int whole(int n)
{
    return (least(n, SIDE) + M::STEP - 1) / M::STEP * M::STEP;
}

/* ------------------------------------------------------------------------------------------------ rows */

/* N times four numbers, from(n) on, of which left(n) exist; the others are 0. from(n) is memory of the tensor's even
 * where none exists: so all are on their way before the first is waited for. */
template <int N, typename P, typename L>
__device__ static inline void read_fours(int fours, P from, L left, ls_four (&z)[N])
{
    if (fours) {
#pragma unroll
        for (int n = 0; n < N; n++) z[n] = ls_four_at(from(n));
#pragma unroll
        for (int n = 0; n < N; n++)
            if (left(n) <= 0) z[n] = {};
        return;
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) z[n].v[k] = k < left(n) ? from(n)[k] : 0;
}

/* Of a tile W columns wide that is being filled, each thread has four columns, in EACH rows. */
template <int W> struct filling {
    enum { FILLERS = W / 4, EACH = SIDE * FILLERS / LS_THREADS };
    __device__ static inline int row(int n)
    {
        return threadIdx.x / FILLERS + n * (LS_THREADS / FILLERS);
    }
    __device__ static inline int column()
    {
        return threadIdx.x % FILLERS * 4;
    }
    template <class M> __device__ static inline void tile(const ls_four (&z)[EACH], int width, typename M::number *to)
    {
        if (column() >= width) return;
#pragma unroll
        for (int n = 0; n < EACH; n++) write_numbers(z[n], to + row(n) * M::PITCH + column());
    }
    /* The same, and what rounding takes from its numbers as a tile of its own. rest NULL: that is lost. */
    template <class M>
    __device__ static inline void tile_and_rest(ls_four (&z)[EACH], int width, typename M::number *to,
                                                typename M::number *rest)
    {
        tile<M>(z, width, to);
        if (rest == NULL) return;
#pragma unroll
        for (int n = 0; n < EACH; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) z[n].v[k] = rest_of(z[n].v[k], to);
        tile<M>(z, width, rest);
    }
};

/* A tile = numbers [e, e + SIDE) of rows of d, scale · row + more; row(i) NULL: 0. more NULL: none. */
template <class M, typename P>
__device__ static inline void load_tile(P row, int d, int e, ls_real scale, typename M::number *to)
{
    typedef filling<SIDE> fill;
    const int at = e + fill::column(), left = d - at;
    ls_four z[fill::EACH];
#pragma unroll
    for (int n = 0; n < fill::EACH; n++) {
        const ls_real *from = row(fill::row(n));
        z[n] = {};
        if (from == NULL || left <= 0) continue;
        z[n] = ls_read_some<4>(from + at, left, ls_is_four(from + at));
#pragma unroll
        for (int k = 0; k < 4; k++) z[n].v[k] *= scale;
    }
    fill::template tile<M>(z, whole<M>(d - e), to);
}
} // namespace ls_tiles

#endif
