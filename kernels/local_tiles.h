/* Tiles of local attention on a GPU: 64 rows, whom visitors meet, and what each thread has of that; formulas in
 * local.c, the kernels in local.cu. There are two kinds of numbers in tiles, see tiles_cuda.h.
 *
 * A warp has 16 of the rows, and of the visitors a band of 8 K: its threads keep the products of these pairs in
 * registers while features pass by in pieces of 64. What visitors give to rows, 64 features at a time, is a product
 * again, of weights that the pairs have become. */
#ifndef LS_LOCAL_TILES_H
#define LS_LOCAL_TILES_H

#include "local_cuda.h"
#include "tiles_cuda.h"

#include <cuda_copy.h>

namespace ls_local
{
using ls_tiles::plain;
using ls_tiles::tensor;

/* Rows of a tile, of a warp. */
enum { OWN = 64, OF_WARP = OWN / WARPS };

/* What comes in one visit: the warps' bands, 16 apart, where windows are those of neighbours. */
template <int K> constexpr int guests = OWN - OF_WARP + 8 * K;

template <class M, int K> static size_t tile_bytes()
{
    return (size_t)((OWN + guests<K>)*M::PITCH) * sizeof(typename M::number);
}

/* Of the warp's rows a thread has row(u); of a row's pairs that with visitor guest(v) of the band, of 64 features
 * feature(v), TOGETHER of them side by side. LANES threads, APART from one another, share a row. */
template <class M> struct layout;
template <> struct layout<plain> {
    typedef ls_warp_grid<4> grid;
    static constexpr int ROWS = 4, TOGETHER = 4, LANES = grid::COLUMNS, APART = grid::APART;
    __device__ static inline int row(int u)
    {
        return (int)threadIdx.x / LS_WARP * OF_WARP + grid::row() + 4 * u;
    }
    __device__ static inline int guest(int v)
    {
        return grid::column() + 8 * v;
    }
    __device__ static inline int feature(int v)
    {
        return grid::column() * 4 + v % 4 + v / 4 * (PIECE / 2);
    }
};
template <> struct layout<tensor> { /* c of cuda_mma.h */
    static constexpr int ROWS = 2, TOGETHER = 2, LANES = 4, APART = 1;
    __device__ static inline int row(int u)
    {
        return (int)threadIdx.x / LS_WARP * OF_WARP + (int)threadIdx.x % LS_WARP / 4 + 8 * u;
    }
    __device__ static inline int guest(int v)
    {
        return v / 2 * 8 + (int)threadIdx.x % 4 * 2 + v % 2;
    }
    __device__ static inline int feature(int v)
    {
        return guest(v);
    }
};
/* By thread, row by row: pairs with a band of 8 K visitors, 64 features. */
template <class M, int K> constexpr int pairs = 4 * K / layout<M>::ROWS;
template <class M, int K> using of_pairs = ls_real[layout<M>::ROWS][pairs<M, K>];
template <class M> constexpr int sums = 32 / layout<M>::ROWS;
template <class M> using of_features = ls_real[layout<M>::ROWS][sums<M>];

template <class M> __device__ static inline ls_real row_sum(ls_real x)
{
    return ls_warp_sum(x, layout<M>::LANES, layout<M>::APART);
}
template <class M> __device__ static inline ls_real row_max(ls_real x)
{
    return ls_warp_max(x, layout<M>::LANES, layout<M>::APART);
}

/* ------------------------------------------------------------------------------------------------ loading */

/* Rows at[i] < all from `base`; where that is negative there is none. */
typedef struct rows {
    const int *at;
    const ls_real *base;
    int64_t st, all;
} rows;

__device__ static inline void fetch(const ls_four *from, int there, ls_real *to)
{
    if (!there) *(ls_four *)to = ls_four{};
    for (int byte = 0; byte < (int)sizeof(ls_four) && there; byte += 16)
        ls_copy<16>((char *)to + byte, (const char *)from + byte, true);
}

/* to (N,64) = features [e0, e0 + 64) of the rows; 0 where there is none, and from d on. To be waited for. */
template <class M, int N> __device__ static void load_rows(rows x, int e0, int d, typename M::number *to)
{
    enum { FOURS = PIECE / 4, STEP = THREADS / FOURS, PITCH = M::PITCH };
    const int e = threadIdx.x % FOURS * 4, left = d - e0 - e;
    /* they can be copied by fours, which 32 bits count */
    const int fours = d % 4 == 0 && x.st % 4 == 0 && ls_is_four(x.base) && x.all * x.st < (int64_t)1 << 33;
    x.at += threadIdx.x / FOURS, x.base += e0 + e, to += threadIdx.x / FOURS * PITCH + e;
    if (!fours) {
#pragma unroll 1
        for (int i = 0; i < N; i += STEP) {
            ls_four y = {};
            for (int c = 0; c < 4; c++)
                if (left > c && x.at[i] >= 0) y.v[c] = x.base[x.at[i] * x.st + c];
            ls_tiles::write_numbers(y, to + i * PITCH);
        }
        return;
    }
    const unsigned apart = (unsigned)(x.st / 4);
    const ls_four *base = (const ls_four *)x.base;
    if constexpr (M::IN_PLACE) {
#pragma unroll
        for (int i = 0; i < N; i += STEP)
            fetch(base + (unsigned)x.at[i] * apart, left > 0 && x.at[i] >= 0, to + i * PITCH);
    } else {
        ls_four y[N / STEP]; /* all are on their way before the first is waited for */
#pragma unroll
        for (int i = 0; i < N; i += STEP)
            y[i / STEP] = left > 0 && x.at[i] >= 0 ? base[(unsigned)x.at[i] * apart] : ls_four{};
#pragma unroll
        for (int i = 0; i < N; i += STEP) ls_tiles::write_numbers(y[i / STEP], to + i * PITCH);
    }
}

static __device__ void wait_for_rows()
{
    ls_copy_close();
    ls_copy_wait<0>();
    __syncthreads();
}

/* ------------------------------------------------------------------------------------------------ pairs */

/* s += own_row · visitor_(start + guest), n features. */
template <int K>
__device__ static inline void add_dots(const ls_real *own, const ls_real *visitor, int start, int n,
                                       of_pairs<plain, K> &s)
{
    typedef layout<plain> my;
    enum { PITCH = plain::PITCH };
    own += my::row(0) * PITCH, visitor += (start + my::guest(0)) * PITCH;
#pragma unroll 2
    for (int e = 0; e < n; e += 4) {
        ls_four a[my::ROWS];
#pragma unroll
        for (int i = 0; i < my::ROWS; i++) a[i] = ls_four_at(own + i * 4 * PITCH + e);
#pragma unroll
        for (int k = 0; k < K; k++) {
            const ls_four b = ls_four_at(visitor + k * 8 * PITCH + e);
#pragma unroll
            for (int i = 0; i < my::ROWS; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) s[i][k] += a[i].v[c] * b.v[c];
        }
    }
}

/* Numbers of x that are two columns of eight side by side, as an instruction takes them: += a b. */
template <int N>
__device__ static inline void multiply_add(ls_real (&x)[2][N], int v, const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    float c[4] = {(float)x[0][v], (float)x[0][v + 1], (float)x[1][v], (float)x[1][v + 1]};
    ls_mma(c, a, b0, b1);
    x[0][v] = c[0], x[0][v + 1] = c[1], x[1][v] = c[2], x[1][v + 1] = c[3];
}

template <int K>
__device__ static inline void add_dots(const __nv_bfloat16 *own, const __nv_bfloat16 *visitor, int start, int n,
                                       of_pairs<tensor, K> &s)
{
    enum { PITCH = tensor::PITCH };
    const int lane = threadIdx.x % LS_WARP, low = lane % 8, matrix = lane / 8;
    own += ((int)threadIdx.x / LS_WARP * OF_WARP + lane % 16) * PITCH + lane / 16 * 8;
    visitor += (start + matrix / 2 * 8 + low) * PITCH + matrix % 2 * 8;
    for (int e = 0; e < n; e += 16) {
        uint32_t a[4];
        ls_mma_load(a, own + e);
#pragma unroll
        for (int k = 0; k < K; k += 2) {
            uint32_t b[4];
            ls_mma_load(b, visitor + k * 8 * PITCH + e);
            multiply_add(s, 2 * k, a, b[0], b[1]);
            multiply_add(s, 2 * k + 2, a, b[2], b[3]);
        }
    }
}

/* s = rows of the tile · rows of the visit; 0 where the warp's rows have not `met` them. */
template <class M, int K>
__device__ static void multiply(rows x, rows y, int d, int met, int start, typename M::number *own,
                                typename M::number *visitor, of_pairs<M, K> &s)
{
#pragma unroll
    for (int i = 0; i < layout<M>::ROWS; i++)
#pragma unroll
        for (int k = 0; k < pairs<M, K>; k++) s[i][k] = 0;
    for (int e0 = 0; e0 < d; e0 += PIECE) {
        __syncthreads(); /* what was there has been read */
        load_rows<M, OWN>(x, e0, d, own);
        load_rows<M, guests<K>>(y, e0, d, visitor);
        wait_for_rows();
        const int n = ls_tiles::least(d - e0, PIECE);
        if (met) add_dots<K>(own, visitor, start, M::IN_PLACE ? (n + 7) / 8 * 8 : (n + 15) / 16 * 16, s);
    }
}

/* ------------------------------------------------------------------------------------------------ weights */

/* Weights of a warp's pairs, and x = Σ_band weight · visitor, 64 features. */
template <class M, int K> struct weights;

/* By visitor, in that part of `own` that only this warp reads: its dots have been made. */
template <int K> struct weights<plain, K> {
    typedef layout<plain> my;
    ls_real *mine;

    __device__ inline void put(const of_pairs<plain, K> &w, ls_real *own)
    {
        mine = own + (int)threadIdx.x / LS_WARP * OF_WARP * plain::PITCH + my::grid::row() * 4;
        ls_real *to = mine + my::guest(0) * OF_WARP;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < K; k++) {
            ls_four x;
#pragma unroll
            for (int i = 0; i < 4; i++) x.v[i] = w[i][k];
            *(ls_four *)(to + k * 8 * OF_WARP) = x;
        }
        __syncwarp();
    }
    __device__ inline void weigh(const ls_real *visitor, int start, of_features<plain> &x) const
    {
        visitor += start * plain::PITCH + my::feature(0);
#pragma unroll
        for (int i = 0; i < my::ROWS; i++)
#pragma unroll
            for (int c = 0; c < sums<plain>; c++) x[i][c] = 0;
#pragma unroll 8
        for (int j = 0; j < 8 * K; j++) {
            const ls_four w = ls_four_at(mine + j * OF_WARP),
                          y[2] = {ls_four_at(visitor + j * plain::PITCH),
                                  ls_four_at(visitor + j * plain::PITCH + PIECE / 2)};
#pragma unroll
            for (int i = 0; i < my::ROWS; i++)
#pragma unroll
                for (int c = 0; c < sums<plain>; c++) x[i][c] += w.v[i] * y[c / 4].v[c % 4];
        }
    }
};

/* As an instruction takes them. */
template <int K> struct weights<tensor, K> {
    uint32_t a[K / 2][4];

    __device__ inline void put(const of_pairs<tensor, K> &w, const __nv_bfloat16 *)
    {
#pragma unroll
        for (int j = 0; j < K / 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const __nv_bfloat162 two =
                    __floats2bfloat162_rn((float)w[i % 2][4 * j + i / 2 * 2], (float)w[i % 2][4 * j + i / 2 * 2 + 1]);
                memcpy(&a[j][i], &two, sizeof two);
            }
    }
    __device__ inline void weigh(const __nv_bfloat16 *visitor, int start, of_features<tensor> &x) const
    {
        enum { PITCH = tensor::PITCH };
        const int lane = threadIdx.x % LS_WARP;
        visitor += (start + lane % 16) * PITCH + lane / 16 * 8;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int v = 0; v < sums<tensor>; v++) x[i][v] = 0;
#pragma unroll
        for (int j = 0; j < K / 2; j++)
#pragma unroll
            for (int v = 0; v < sums<tensor>; v += 4) {
                uint32_t b[4];
                ls_mma_load_transposed(b, visitor + 16 * j * PITCH + 4 * v);
                multiply_add(x, v, a[j], b[0], b[1]);
                multiply_add(x, v + 2, a[j], b[2], b[3]);
            }
    }
};

/* to = keep to + give x for these features of a row; where there is `more`, something is there. */
template <class M>
__device__ static inline void put_sums(ls_real *to, int e0, int d, int more, ls_real keep, ls_real give,
                                       const ls_real (&x)[sums<M>])
{
    constexpr int TOGETHER = layout<M>::TOGETHER;
    const int fours = d % 4 == 0 && ls_is_four(to);
#pragma unroll
    for (int v = 0; v < sums<M>; v += TOGETHER) {
        const int e = e0 + layout<M>::feature(v), left = d - e;
        if (left <= 0) break;
        ls_few<TOGETHER> y = {};
        if (more) y = ls_read_some<TOGETHER>(to + e, left, fours);
#pragma unroll
        for (int c = 0; c < TOGETHER; c++) y.v[c] = keep * y.v[c] + give * x[v + c];
        ls_write_some<TOGETHER>(y, to + e, left, fours);
    }
}

} // namespace ls_local

#endif
