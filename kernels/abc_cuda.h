/* What abc.cu, for all keys, and abc_causal.cu share: work memory, chunks of rows, and products within a block. */
#ifndef LS_ABC_CUDA_H
#define LS_ABC_CUDA_H

#include "cuda.h"

#include <cuda_mma.h>

extern "C" {
#include "mechanism.h"
}

namespace ls_abc /* other files have types of these names, too */
{

enum { SLOTS };        /* option[] */
enum { PHI_K, PHI_V }; /* param[] */
/* work[]: logits and maxima, later e and gradients (reals of (B,H,rows,R)); w (reals), logit, dp, u (doubles), alike;
 * sums of chunks and their gradients (doubles of (B,H,2,chunks,R,d+2)), maxima of chunks; sums over rows, in pieces;
 * slots (B,H,2,R,d), centres (B,H,2,d), constants (B,H,2,R) */
enum { A_K, A_V, M_K, M_V, W, LOGIT, DP, U, STATES, DSTATES, TOPS, PIECES, CENTRED, CENTRES, CONSTANTS };
enum { TILE = 64, CHUNK = TILE }; /* rows and columns of products in a block */
enum { DEPTH = 32, FEW = 16 };    /* of a product what is in shared memory at a time; slots in a tile */
enum { AHEAD = 16 };              /* chunks whose sums are read before their turn */

static inline int64_t slots(const ls_pass *p)
{
    return (int64_t)p->option[SLOTS];
}

static inline int64_t ceil_of(int64_t n, int64_t by)
{
    return (n + by - 1) / by;
}

/* Rows [length c, length (c + 1)) of each (b,h) are chunk c. */
struct chunking {
    int64_t H, rows, length, count;
};

static inline chunking short_chunks(const ls_pass *p, int64_t rows)
{
    return {p->H, rows, CHUNK, ceil_of(rows, CHUNK)};
}

static inline ls_real *phi(const ls_pass *p, int which, const ls_real *base)
{
    return (ls_real *)(uintptr_t)base + p->param[which].offset;
}

static inline double *doubles(const ls_pass *p, int which)
{
    return (double *)(void *)p->work[which];
}

/* A_K, A_V (B,H,S,R): the keys' logits, -inf where they are padded. */
void make_logits(ls_pass *p);
/* STATES, TOPS: (m; s, x) of each chunk of the keys, from their logits. */
void sum_chunks(ls_pass *p, chunking c);
/* A_K, A_V hold da, db: dφ_k += (k - c)ᵀ da, and the same for the values; centres NULL: c = 0. */
void map_backward(ls_pass *p, const ls_real *centres);

ls_status apply_causal(ls_pass *p, int phase);
ls_status apply_causal_backward(ls_pass *p, int phase);

/* ------------------------------------------------------------------------------------------------ in a block */

/* Rows of a tensor, n of each b, that are read as 0 where they are padded. */
struct rows {
    ls_view v;
    const uint8_t *pad;
    int64_t n;
};

/* The rows of a block: [t, t + n) of (b,h). */
struct place {
    int64_t b, h, bh, chunk, t;
    int n;
};

__device__ static inline place place_of(chunking c)
{
    const unsigned count = (unsigned)c.count, heads = (unsigned)c.H, bh = blockIdx.x / count;
    const int64_t chunk = blockIdx.x % count, t = chunk * c.length;
    return {bh / heads, bh % heads, bh, chunk, t, (int)ls_min(c.length, c.rows - t)};
}

/* The same rows for the threads of the block: row i, of n, begins at x + i step. */
struct strip {
    ls_real *x;
    const uint8_t *pad; /* of row 0, or NULL */
    int step, n, d;
};

__device__ static inline strip strip_of(const rows &x, const place &at, int d)
{
    return {ls_row(x.v, at.b, at.h, at.t), x.pad == NULL ? NULL : x.pad + at.b * x.n + at.t, (int)x.v.st, at.n, d};
}

/* Bit i: row t + i is there, and not padded. For all lanes of the warp, which call together. */
__device__ static inline unsigned shown(const strip &x, int t)
{
    const int i = t + (int)threadIdx.x % LS_WARP;
    return __ballot_sync(0xffffffffu, i < x.n && (x.pad == NULL || !x.pad[i]));
}

__device__ static inline uint64_t shown_tile(const strip &x)
{
    return shown(x, 0) | (uint64_t)shown(x, LS_WARP) << 32;
}

/* e^(from - to), 0 where there was nothing. */
__device__ static inline double weight(double from, double to)
{
    return from == -INFINITY ? 0 : (double)ls_exp((ls_real)(from - to));
}

/* Matrices in shared memory have rows of COLUMNS + 4 doubles: where the 32 lanes read 8 rows x 4 columns, or 4 x 8,
 * they meet different banks. */
template <int COLUMNS> __device__ static inline double &cell(double *x, int row, int column)
{
    return x[row * (COLUMNS + 4) + column];
}

/* to (ROWS,COLUMNS) = x(row, column), by all threads: each has one column, of which it asks for all rows at once. */
template <int ROWS, int COLUMNS, class X> __device__ static inline void stage(double *to, X x)
{
    constexpr int STEP = LS_THREADS / COLUMNS;
    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    double y[ROWS / STEP];
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) y[i] = x(row + STEP * i, column);
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) cell<COLUMNS>(to, row + STEP * i, column) = y[i];
}

/* The same of rows i0 + row, features e0 + column of x: f(number), or f(0) where bit i0 + row of `shown` is not set. */
template <int ROWS, int COLUMNS, class F>
__device__ static inline void stage_rows(double *to, const strip &x, uint64_t shown, int i0, int e0, F f)
{
    constexpr int STEP = LS_THREADS / COLUMNS;
    const int row = threadIdx.x / COLUMNS, e = e0 + (int)threadIdx.x % COLUMNS;
    const uint64_t mine = e < x.d ? shown >> (i0 + row) : 0;
    const ls_real *from = x.x + (int64_t)(i0 + row) * x.step + e;
    const int64_t next = (int64_t)STEP * x.step;
    ls_real y[ROWS / STEP];
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++, from += next) y[i] = mine >> STEP * i & 1 ? *from : 0;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) cell<COLUMNS>(to, row + STEP * i, e - e0) = f((double)y[i]);
}

/* How 8 warps divide a product (M,N): `across` of them stand side by side, each has I x J blocks of 16 x 8. */
template <int M, int N> struct division {
    enum { ACROSS = M == N ? 4 : N / 8, I = M * ACROSS / (8 * 16), J = N / (8 * ACROSS) };
    double c[I][J][4]; /* of a lane: rows g and g + 8, columns 2 t and 2 t + 1, g = lane / 4, t = lane % 4 */

    __device__ division() : c() {}
    __device__ static int row() /* the warp's first */
    {
        return (int)threadIdx.x / LS_WARP / ACROSS * 16 * I;
    }
    __device__ static int column()
    {
        return (int)threadIdx.x / LS_WARP % ACROSS * 8 * J;
    }

    /* c_ij += Σ_k a(i,k) b(k,j), first <= k < last; one step takes 8 k, which must be there. On tensor cores, in
     * double; columns from `wide` on are not wanted. */
    template <class A, class B> __device__ void add(int first, int last, int wide, A a, B b)
    {
        const int g = threadIdx.x % LS_WARP / 4, t = threadIdx.x % 4;
        if (column() >= wide) return;
#pragma unroll(I *J > 1 ? 1 : 2)
        for (int k = first; k < last; k += 8) {
            double x[I][4], y[J][2];
#pragma unroll
            for (int i = 0; i < I; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) x[i][e] = a(row() + 16 * i + g + e % 2 * 8, k + t + e / 2 * 4);
#pragma unroll
            for (int j = 0; j < J; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) y[j][e] = b(k + t + e * 4, column() + 8 * j + g);
#pragma unroll
            for (int i = 0; i < I; i++)
#pragma unroll
                for (int j = 0; j < J; j++) ls_mma_double(c[i][j], x[i], y[j]);
        }
    }

    /* done(i, j, c_ij) for i < m, j < n */
    template <class Done> __device__ void each(int m, int n, Done done)
    {
        both(*this, m, n, [&](int i, int j, double &y, double) { done(i, j, y); });
    }
    /* done(at, i, e, c_ij), at that of row i of n of `to`, at feature e = e0 + j */
    template <class Done> __device__ void put(const strip &to, int n, int e0, Done done)
    {
        const int g = threadIdx.x % LS_WARP / 4, first = e0 + column() + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2 * I; i++) {
            const int y = row() + 8 * i + g;
            ls_real *at = to.x + (int64_t)y * to.step + first;
            if (y >= n) return;
#pragma unroll
            for (int j = 0; j < 2 * J; j++) {
                const int e = j / 2 * 8 + j % 2;
                if (first + e < to.d) done(at + e, y, first + e, c[i / 2][j / 2][i % 2 * 2 + j % 2]);
            }
        }
    }
    /* done(i, j, c_ij, other's c_ij) */
    template <class Done> __device__ void both(const division &other, int m, int n, Done done)
    {
        const int g = threadIdx.x % LS_WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < I; i++)
#pragma unroll
            for (int j = 0; j < J; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int y = row() + 16 * i + g + e / 2 * 8, x = column() + 8 * j + 2 * t + e % 2;
                    if (y < m && x < n) done(y, x, c[i][j][e], other.c[i][j][e]);
                }
    }
};

/* What there is to do of a depth that goes on for `rest`, in steps of 8. */
__device__ static inline int depth_of(int rest)
{
    return rest < DEPTH ? (rest + 7) / 8 * 8 : DEPTH;
}

/* sum_ir += Σ_e f(e, row_i[e]) of(r,e), r from r0 on; rows that are not shown are 0. a: TILE x DEPTH, b: FEW x
 * DEPTH, in shared memory. */
template <class F, class Of>
__device__ static inline void score(double *a, double *b, const strip &x, uint64_t shown, int R, int r0, F f, Of of,
                                    division<TILE, FEW> &sum)
{
#pragma unroll 1
    for (int e0 = 0; e0 < x.d; e0 += DEPTH) {
        const int column = e0 + (int)threadIdx.x % DEPTH;
        __syncthreads();
        stage_rows<TILE, DEPTH>(a, x, shown, 0, e0, [&](double y) { return f(column, y); });
        stage<FEW, DEPTH>(b, [&](int r, int e) { return r0 + r < R && e0 + e < x.d ? (double)of(r0 + r, e0 + e) : 0; });
        __syncthreads();
        sum.add(
            0, depth_of(x.d - e0), R - r0, [&](int i, int e) { return cell<DEPTH>(a, i, e); },
            [&](int e, int r) { return cell<DEPTH>(b, r, e); });
    }
}

/* sum_ie += Σ_r table(i,r) of(r,e), i < n, e from e0 on. a: TILE x FEW, b: FEW x TILE. */
template <class Table, class Of>
__device__ static inline void spread(double *a, double *b, int n, int R, int d, int e0, Table table, Of of,
                                     division<TILE, TILE> &sum)
{
#pragma unroll 1
    for (int r0 = 0; r0 < R; r0 += FEW) {
        __syncthreads();
        stage<TILE, FEW>(a, [&](int i, int r) { return i < n && r0 + r < R ? (double)table(i, r0 + r) : 0; });
        stage<FEW, TILE>(b, [&](int r, int e) { return r0 + r < R && e0 + e < d ? (double)of(r0 + r, e0 + e) : 0; });
        __syncthreads();
        sum.add(
            0, (int)ls_min(FEW, depth_of(R - r0)), d - e0, [&](int i, int r) { return cell<FEW>(a, i, r); },
            [&](int r, int e) { return cell<TILE>(b, r, e); });
    }
}

/* Four neighbours have a row of a table: which, every fourth of its numbers, and sums over all. */
struct quarter {
    int row, lane;
    __device__ quarter() : row(threadIdx.x / 4), lane(threadIdx.x % 4) {}
    template <typename T> __device__ static T sum(T x)
    {
        x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x + __shfl_xor_sync(0xffffffffu, x, 2);
    }
    template <typename T> __device__ static T max(T x)
    {
        T y = __shfl_xor_sync(0xffffffffu, x, 1);
        x = y > x ? y : x;
        y = __shfl_xor_sync(0xffffffffu, x, 2);
        return y > x ? y : x;
    }
};

/* done(r, e, Σ_i share(i,r) f(e, row_i[e])), r < R, over the rows of x, but those that are padded. a: DEPTH x FEW, b:
 * DEPTH x TILE, in shared memory. */
template <class Share, class F, class Done>
__device__ static inline void sum_rows(double *a, double *b, strip x, int R, Share share, F f, Done done)
{
    ls_real *const rows = x.x;
    for (int r0 = 0; r0 < R; r0 += FEW)
        for (int e0 = 0; e0 < x.d; e0 += TILE) {
            const int column = e0 + (int)threadIdx.x % TILE;
            division<FEW, TILE> sum;
            x.x = rows;
            for (int i0 = 0; i0 < x.n; i0 += DEPTH, x.x += (int64_t)DEPTH * x.step) {
                const unsigned here = shown(x, i0);
                __syncthreads();
                stage<DEPTH, FEW>(
                    a, [&](int i, int r) { return here >> i & 1 && r0 + r < R ? share(i0 + i, r0 + r) : 0; });
                stage_rows<DEPTH, TILE>(b, x, here, 0, e0, [&](double y) { return f(column, y); });
                __syncthreads();
                sum.add(
                    0, depth_of(x.n - i0), x.d - e0, [&](int r, int i) { return cell<FEW>(a, i, r); },
                    [&](int i, int e) { return cell<TILE>(b, i, e); });
            }
            sum.each(R - r0, x.d - e0, [&](int r, int e, double y) { done(r0 + r, e0 + e, y); });
        }
}

} // namespace ls_abc

#endif
