/* Embedding and positions on a GPU. */
#include "dense_cuda.h"

namespace ls_dense
{

template <int W>
__global__ static void embed(int64_t rows, int64_t E, const int32_t *token, const ls_real *table, ls_real a, ls_real *y)
{
    LS_EACH_ROW(r, rows)
    {
        const int64_t v = token[r];
        LS_EACH_LANE(j, E / W)
        {
            ls_few<W> out = v < 0 ? ls_few<W>() : load<W>(table + v * E, j);
            for (int k = 0; k < W; k++) out.v[k] *= a;
            store<W>(y + r * E, j, out);
        }
    }
}

void embedding(ls_queue *queue, int64_t rows, int64_t E, const int32_t *token, const ls_real *table, double scale,
               ls_real *y)
{
    if (rows <= 0) return;
    const auto kernel = wide(E, table, y) ? embed<4> : embed<1>;
    LS_LAUNCH(queue, kernel, ls_row_blocks(rows), LS_THREADS, 0, rows, E, token, table, (ls_real)scale, y);
}

constexpr int TOKENS = 4096, WARPS = LS_THREADS / LS_WARP;

/* The place of this thread's first item in a list to which every thread of the block gives n, and the length of it. */
__device__ static int place_of(int n, int *scratch, int *length)
{
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    int before = n; /* of this warp, this thread included */
    for (int step = 1; step < LS_WARP; step *= 2) {
        const int other = __shfl_sync(0xffffffffu, before, lane >= step ? lane - step : lane);
        if (lane >= step) before += other;
    }
    if (lane == LS_WARP - 1) scratch[warp] = before;
    __syncthreads();
    int place = before - n;
    *length = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) place += scratch[i];
        *length += scratch[i];
    }
    return place;
}

/* Block (v, c) has 32 W columns of row v of the table. It looks through all tokens, a few thousand at a time, and its
 * warps take the rows that it found in turn. */
template <int W>
__global__ static void embed_backward(int64_t rows, int64_t E, const int32_t *token, ls_real a, const ls_real *dy,
                                      ls_real *dtable)
{
    __shared__ uint16_t found[TOKENS];
    __shared__ int scratch[WARPS];
    __shared__ double part[WARPS][LS_WARP * W];
    constexpr int DEEP = 4, EACH = TOKENS / LS_THREADS;
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    const int64_t v = blockIdx.x, column = ((int64_t)blockIdx.y * LS_WARP + lane) * W;
    double acc[W] = {0};
    for (int64_t first = 0; first < rows; first += TOKENS) {
        int mine = 0, length;
        unsigned hits = 0;
        for (int k = 0; k < EACH; k++) {
            const int64_t r = first + k * LS_THREADS + threadIdx.x;
            const int hit = r < rows && token[r] == v;
            hits |= (unsigned)hit << k;
            mine += hit;
        }
        int place = place_of(mine, scratch, &length);
        for (int k = 0; k < EACH; k++)
            if (hits >> k & 1) found[place++] = (uint16_t)(k * LS_THREADS + (int)threadIdx.x);
        __syncthreads();
        for (int i = warp; i < length && column < E; i += DEEP * WARPS) {
            ls_few<W> at[DEEP];
            for (int u = 0; u < DEEP; u++) {
                const int item = i + u * WARPS;
                at[u] = item < length ? load<W>(dy, ((first + found[item]) * E + column) / W) : ls_few<W>();
            }
            for (int u = 0; u < DEEP; u++)
                for (int k = 0; k < W; k++) acc[k] += (double)at[u].v[k];
        }
        __syncthreads(); /* before the list and scratch are written again */
    }
    for (int k = 0; k < W; k++) part[warp][lane * W + k] = acc[k];
    __syncthreads();
    if (warp > 0 || column >= E) return;
    for (int k = 0; k < W; k++) {
        double total = 0;
        for (int i = 0; i < WARPS; i++) total += part[i][lane * W + k];
        dtable[v * E + column + k] += (ls_real)((double)a * total);
    }
}

void embedding_backward(ls_queue *queue, int64_t rows, int64_t V, int64_t E, const int32_t *token, double scale,
                        const ls_real *dy, ls_real *dtable)
{
    if (rows <= 0) return;
    const int w = wide(E, dy) ? 4 : 1;
    const dim3 blocks((unsigned)V, (unsigned)((E + LS_WARP * w - 1) / (LS_WARP * w)));
    const auto kernel = w == 4 ? embed_backward<4> : embed_backward<1>;
    LS_LAUNCH(queue, kernel, blocks, LS_THREADS, 0, rows, E, token, (ls_real)scale, dy, dtable);
}

/* ------------------------------------------------------------------------------------------------ positions */

constexpr int ANCHOR = 64;

/* As on the CPU: a thread walks from a global multiple of ANCHOR to the next, with one frequency, by rotations in
 * double. So a row's value is the same wherever the piece that holds it begins. Each sequence is walked along by its
 * own threads: the rotations are few beside what they wait for memory. */
__global__ static void positions(int64_t B, int64_t T, int64_t E, int64_t lo, int64_t anchor, int64_t walks, ls_real *x)
{
    const int64_t half = E / 2;
    LS_EACH(k, walks * half)
    {
        const int64_t i = k % half, from = anchor + k / half * ANCHOR, end = ls_min(from + ANCHOR, lo + T);
        const double f = pow(10000.0, -2 * (double)i / (double)E), sin_f = sin(f), cos_f = cos(f);
        double s = sin((double)from * f), c = cos((double)from * f);
        for (int64_t p = from; p < end; p++) {
            for (int64_t b = blockIdx.y; b < B && p >= lo; b += gridDim.y) {
                ls_real *row = x + (b * T + p - lo) * E;
                row[i] += (ls_real)s;
                row[half + i] += (ls_real)c;
            }
            const double old = s;
            s = old * cos_f + c * sin_f;
            c = c * cos_f - old * sin_f;
        }
    }
}

void add_positions(ls_queue *queue, int64_t B, int64_t T, int64_t E, int64_t lo, ls_real *x)
{
    const int64_t anchor = lo - lo % ANCHOR, walks = (lo + T - anchor + ANCHOR - 1) / ANCHOR;
    if (B <= 0 || T <= 0 || E < 2) return;
    const dim3 blocks((unsigned)ls_blocks(walks * (E / 2), LS_THREADS), (unsigned)ls_min(B, 65535));
    LS_LAUNCH(queue, positions, blocks, LS_THREADS, 0, B, T, E, lo, anchor, walks, x);
}

} // namespace ls_dense
