/* Local-p on a GPU: where its windows are, and how p gets its gradient; formulas in local.c.
 *
 * Centres are made by tiles of queries, visited by rows of W. A stable merge sort makes the order of the windows, their
 * slots, and a scan the row of each window in the list of keys that it shares with the others: row = lo - Σ gaps
 * between windows so far. */
#include "local_cuda.h"

namespace ls_local
{

enum { RUN = 256 }; /* of the sort */

/* ------------------------------------------------------------------------------------------------ tiles */

/* Rows of a tile in shared memory are `room` reals, d to the next four. own_r = row, one for each; 0 for NULL and from
 * d on. Seen by all threads after the next barrier. */
static __device__ void load_own(ls_real *own, int r, const ls_real *row, int64_t d)
{
    const int64_t room = ls_fours(d);
    for (int64_t e = threadIdx.x % LS_WARP; e < room; e += LS_WARP)
        own[r * room + e] = row != NULL && e < d ? row[e] : 0;
}

/* piece (32,64) = features [e0, e0 + 64) of the visitors; 0 for NULL and from d on. */
static __device__ void load_piece(const ls_real *const *visitor, int64_t e0, int64_t d, ls_real *piece)
{
    __syncthreads();
    for (int i = threadIdx.x; i < GUESTS * PIECE / 4; i += THREADS) {
        const int e = i % (PIECE / 4) * 4;
        const ls_real *row = visitor[i / (PIECE / 4)];
        ls_four x = {};
        if (row != NULL && d % 4 == 0 && ls_is_four(row)) {
            if (e0 + e < d) x = ls_four_at(row + e0 + e);
        } else if (row != NULL) {
            for (int k = 0; k < 4; k++)
                if (e0 + e + k < d) x.v[k] = row[e0 + e + k];
        }
        *(ls_four *)(piece + i / (PIECE / 4) * PITCH + e) = x;
    }
    __syncthreads();
}

/* Of the tile's rows r = warp, warp + 4, ..: own_r · this lane's visitor. */
static __device__ void dots(const ls_real *own, int rows, const ls_real *const *visitor, int64_t d, ls_real *piece,
                            double (&s)[EACH])
{
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    for (int u = 0; u < EACH; u++) s[u] = 0;
    for (int64_t e0 = 0; e0 < d; e0 += PIECE) {
        const ls_real *mine[EACH];
        for (int u = 0; u < EACH; u++) mine[u] = own + ls_min(warp + u * WARPS, rows - 1) * ls_fours(d) + e0;
        load_piece(visitor, e0, d, piece);
        ls_dots(mine, piece + lane * PITCH, (int)ls_fours(ls_min(PIECE, d - e0)), s);
    }
}

static size_t tile_bytes(const ls_pass *p)
{
    return (size_t)(ls_fours(p->d) * tile_rows(p) + PIECE_REALS) * sizeof(ls_real);
}

/* ------------------------------------------------------------------------------------------------ centres */

/* Of head h: W (d,d), u (d), as they stand in the parameters. */
typedef struct predictor {
    const ls_real *map, *vector;
} predictor;

static predictor predictor_of(const ls_pass *p)
{
    return predictor{p->params + p->param[MAP].offset, p->params + p->param[VECTOR].offset};
}

/* Rows [c, c + 32) of W visit the tile. */
static __device__ void invite_map(const ls_real *map, int64_t c, int64_t d, const ls_real **to)
{
    const int lane = threadIdx.x;
    if (lane < LS_WARP) to[lane] = c + lane < d ? map + (c + lane) * d : NULL;
}

/* p of a tile of queries, in double; by slot, before they are sorted: the queries, and their centres. */
static __global__ void make_centres(int64_t H, int64_t T, int64_t keys_in_all, ls_view q, const uint8_t *pad, int64_t d,
                                    int rows, predictor f, const ls_real *counts, double *exact, int64_t *order,
                                    int64_t *centre)
{
    LS_SHARED(ls_real, memory);
    __shared__ const ls_real *visit[GUESTS];
    ls_real *own = memory, *piece = own + rows * ls_fours(d);
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t tiles = (T + rows - 1) / rows, g = blockIdx.x / tiles, t = blockIdx.x % tiles * rows;
    const int64_t b = g / H, h = g % H;
    const ls_real *map = f.map + h * d * d, *vector = f.vector + h * d;
    const double last = ls_local_last_key(counts + 2 * b);
    double z[EACH] = {0};
    int blind[EACH];
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS;
        blind[u] = r >= rows || t + r >= T || ls_is_padded(pad, b * T + t + r);
        if (r < rows) load_own(own, r, blind[u] ? NULL : ls_row(q, b, h, t + r), d);
    }
    for (int64_t c = 0; c < d; c += LS_WARP) {
        double x[EACH];
        __syncthreads();
        invite_map(map, c, d, visit);
        dots(own, rows, visit, d, piece, x);
        for (int u = 0; u < EACH; u++)
            if (c + lane < d) z[u] += (double)vector[c + lane] * tanh(x[u]);
    }
    for (int u = 0; u < EACH; u++) {
        const int r = warp + u * WARPS;
        const double sum = ls_warp_sum(z[u]), at = blind[u] ? 0 : last / (1 + exp(-sum));
        if (r >= rows || t + r >= T || lane > 0) continue;
        exact[g * T + t + r] = at;
        order[g * T + t + r] = t + r;
        centre[g * T + t + r] = blind[u] ? keys_in_all : ls_local_predicted(at);
    }
}

/* ------------------------------------------------------------------------------------------------ order */

/* Runs of 256 in order: each element's place is the number of those that come before it. */
static __global__ void sort_runs(int64_t T, int64_t runs, int64_t *centre, int64_t *order)
{
    __shared__ int64_t c[RUN];
    const int64_t base = blockIdx.x / runs * T, first = blockIdx.x % runs * RUN;
    const int n = (int)ls_min(RUN, T - first), i = threadIdx.x;
    int64_t mine = 0, query = 0;
    if (i < n) c[i] = mine = centre[base + first + i], query = order[base + first + i];
    __syncthreads();
    if (i >= n) return;
    int place = 0;
    for (int j = 0; j < n; j++) place += c[j] < mine || (c[j] == mine && j < i);
    centre[base + first + place] = mine;
    order[base + first + place] = query;
}

/* Two neighbouring runs of `length` become one: an element goes as far as it stands in its own, and as many elements of
 * the other come before it; of equals, those of the left. */
static __global__ void merge_runs(int64_t T, int64_t all, int64_t length, const int64_t *centre, const int64_t *order,
                                  int64_t *to_centre, int64_t *to_order)
{
    LS_EACH(i, all)
    {
        const int64_t base = i / T * T, at = i - base, both = at / (2 * length) * (2 * length), half = both + length;
        const int right = at >= half;
        const int64_t mine = centre[i];
        int64_t low = ls_min(right ? both : half, T), high = ls_min(low + length, T);
        const int64_t begin = low;
        while (low < high) {
            const int64_t middle = (low + high) / 2, c = centre[base + middle];
            if (c < mine || (right && c == mine))
                low = middle + 1;
            else
                high = middle;
        }
        const int64_t place = base + (right ? at - length : at) + low - begin;
        to_centre[place] = mine;
        to_order[place] = order[i];
    }
}

/* Keys between the window of a slot and that before, which nobody sees. */
static __device__ int64_t gap_before(const windows *x, int64_t g, int64_t slot)
{
    const ls_span k = positions_of(x, g, slot);
    if (slot == 0) return k.lo;
    const ls_span before = positions_of(x, g, slot - 1);
    return ls_max(0, k.lo - before.lo - before.n);
}

/* sums (B,H,tiles): gaps of 1024 slots. */
static __global__ void sum_gaps(windows x, int64_t tiles, int64_t *sums)
{
    __shared__ int64_t scratch[LS_WARP];
    const int64_t g = blockIdx.x / tiles, slot = blockIdx.x % tiles * SCAN;
    int64_t n = 0;
    for (int64_t i = slot + threadIdx.x; i < ls_min(slot + SCAN, x.T); i += LS_THREADS) n += gap_before(&x, g, i);
    n = ls_block_sum(n, scratch);
    if (threadIdx.x == 0) sums[blockIdx.x] = n;
}

/* row = lo less the gaps so far: those of the tiles before, of the threads before, of this thread's four. */
static __global__ void place_windows(windows x, int64_t tiles, const int64_t *sums, int64_t *row)
{
    __shared__ int64_t scratch[LS_WARP], scan[LS_THREADS];
    const int64_t g = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const int64_t slot = tile * SCAN + 4 * threadIdx.x, end = ls_min(slot + 4, x.T);
    int64_t before = 0, mine = 0;
    for (int64_t i = threadIdx.x; i < tile; i += LS_THREADS) before += sums[g * tiles + i];
    before = ls_block_sum(before, scratch);
    for (int64_t i = slot; i < end; i++) mine += gap_before(&x, g, i);
    scan[threadIdx.x] = mine;
    for (int step = 1; step < LS_THREADS; step *= 2) {
        __syncthreads();
        const int64_t more = (int)threadIdx.x >= step ? scan[threadIdx.x - step] : 0;
        __syncthreads();
        scan[threadIdx.x] += more;
    }
    int64_t gaps = before + scan[threadIdx.x] - mine;
    for (int64_t i = slot; i < end; i++) {
        gaps += gap_before(&x, g, i);
        row[g * x.T + i] = positions_of(&x, g, i).lo - gaps;
    }
}

/* Merges go to and fro between `saved` and `work`, and begin where they end in `saved`. */
static void order_queries(ls_pass *p, int64_t *centre[2], int64_t *order[2])
{
    const int64_t groups = p->B * p->H, all = all_rows(p), tiles = scan_tiles(p), runs = (p->T + RUN - 1) / RUN;
    int from = 0;
    for (int64_t length = RUN; length < p->T; length *= 2) from = !from;
    LS_LAUNCH(p->queue, sort_runs, (int)(groups * runs), RUN, 0, p->T, runs, centre[from], order[from]);
    for (int64_t length = RUN; length < p->T; length *= 2, from = !from)
        LS_LAUNCH(p->queue, merge_runs, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->T, all, length, centre[from],
                  order[from], centre[!from], order[!from]);
    int64_t *gaps = (int64_t *)(void *)p->work[GAPS];
    LS_LAUNCH(p->queue, sum_gaps, (int)(groups * tiles), LS_THREADS, 0, windows_of(p), tiles, gaps);
    LS_LAUNCH(p->queue, place_windows, (int)(groups * tiles), LS_THREADS, 0, windows_of(p), tiles, gaps,
              (int64_t *)(void *)p->saved[ROW]);
}

/* In a step each (b,h) has one query, which is in order; and fetches nothing. Otherwise the host must know which keys
 * to ask of other ranks: it waits here for the centres, the one time in a call. */
ls_status centres(ls_pass *p, int phase)
{
    int64_t *temporary = (int64_t *)(void *)p->work[SORT];
    int64_t *centre[2] = {(int64_t *)(void *)p->saved[SORTED], temporary};
    int64_t *order[2] = {(int64_t *)(void *)p->saved[ORDER], temporary + all_rows(p)};
    int first = 0;
    if (all_rows(p) == 0) return LS_OK;
    for (int64_t length = RUN; length < p->T; length *= 2) first = !first;
    LS_LAUNCH(p->queue, make_centres, (int)(p->B * p->H * tiles_of(p)), THREADS, tile_bytes(p), p->H, p->T, p->all_keys,
              p->q, p->pad_q, p->d, tile_rows(p), predictor_of(p), p->summary[phase].got,
              (double *)(void *)p->saved[CENTRE], order[first], centre[first]);
    if (p->step) return ls_launched(p->queue, "local: centres");
    order_queries(p, centre, order);
    LS_TRY(ls_launched(p->queue, "local: centres"));
    return ls_cuda_device.to_host(p->queue, p->host, centre[0], host_bytes(p));
}

/* ------------------------------------------------------------------------------------------------ their gradients */

/* dp becomes d(W q), in `dhidden` (B,H,T,d), and du, of which each block sums a slice of the tiles; `clean` (B,H,T,d):
 * q, with 0 where it is padded. */
static __global__ void predictor_gradients(int64_t H, int64_t T, int64_t slices, ls_view q, const uint8_t *pad,
                                           int64_t d, int rows, predictor f, const ls_real *counts, const double *exact,
                                           const ls_real *dcentre, ls_real *dhidden, ls_real *clean, double *dvector)
{
    LS_SHARED(double, sums); /* (4,d) */
    __shared__ const ls_real *visit[GUESTS];
    const int64_t room = ls_fours(d);
    ls_real *own = (ls_real *)(sums + WARPS * d), *piece = own + rows * room;
    const int warp = threadIdx.x / LS_WARP, lane = threadIdx.x % LS_WARP;
    const int64_t g = blockIdx.x / slices, b = g / H, h = g % H;
    const ls_real *map = f.map + h * d * d, *vector = f.vector + h * d;
    const double last = ls_local_last_key(counts + 2 * b);
    for (int64_t c = lane; c < d; c += LS_WARP) sums[warp * d + c] = 0;
    for (int64_t t = blockIdx.x % slices * rows; t < T; t += slices * rows) {
        double dz[EACH];
        __syncthreads();
        for (int u = 0; u < EACH; u++) {
            const int r = warp + u * WARPS, here = r < rows && t + r < T;
            const int64_t row = g * T + t + r;
            dz[u] = 0;
            if (r < rows)
                load_own(own, r, here && !ls_is_padded(pad, b * T + t + r) ? ls_row(q, b, h, t + r) : NULL, d);
            if (here && last > 0) dz[u] = (double)dcentre[row] * exact[row] * (1 - exact[row] / last);
            for (int64_t e = lane; e < d && here; e += LS_WARP) clean[row * d + e] = own[r * room + e];
        }
        for (int64_t c = 0; c < d; c += LS_WARP) {
            double x[EACH];
            __syncthreads();
            invite_map(map, c, d, visit);
            dots(own, rows, visit, d, piece, x);
            for (int u = 0; u < EACH; u++) {
                const int r = warp + u * WARPS;
                if (r >= rows || t + r >= T || c + lane >= d) continue;
                const double y = tanh(x[u]);
                sums[warp * d + c + lane] += dz[u] * y;
                dhidden[(g * T + t + r) * d + c + lane] = (ls_real)(dz[u] * (double)vector[c + lane] * (1 - y * y));
            }
        }
    }
    __syncthreads();
    for (int64_t c = threadIdx.x; c < d; c += THREADS) {
        double sum = 0;
        for (int i = 0; i < WARPS; i++) sum += sums[i * d + c];
        dvector[blockIdx.x * d + c] = sum;
    }
}

/* du (H,d) += the slices of all batch rows. */
static __global__ void sum_slices(int64_t B, int64_t H, int64_t d, int64_t slices, const double *dvector, ls_real *du)
{
    LS_EACH(i, H * d)
    {
        double sum = 0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t s = 0; s < slices; s++) sum += dvector[((b * H + i / d) * slices + s) * d + i % d];
        du[i] += (ls_real)sum;
    }
}

void centres_backward(ls_pass *p)
{
    const int64_t B = p->B, H = p->H, T = p->T, d = p->d, slices = slices_of(p), head = T * d;
    const predictor f = predictor_of(p);
    ls_real *dhidden = p->work[DHIDDEN], *clean = p->work[CLEAN], *dW = p->dparams + p->param[MAP].offset;
    double *dvector = (double *)(void *)p->work[DVECTOR];
    if (all_rows(p) == 0) return;
    const size_t bytes = tile_bytes(p) + (size_t)(WARPS * d) * sizeof(double);
    LS_LAUNCH(p->queue, predictor_gradients, (int)(B * H * slices), THREADS, bytes, H, T, slices, p->q, p->pad_q, d,
              tile_rows(p), f, p->summary[CENTRES].got, (const double *)(const void *)p->saved[CENTRE],
              p->work[DCENTRE], dhidden, clean, dvector);
    LS_LAUNCH(p->queue, sum_slices, ls_blocks(H * d, LS_THREADS), LS_THREADS, 0, B, H, d, slices, dvector,
              p->dparams + p->param[VECTOR].offset);
    for (int64_t b = 0; b < B; b++)
        ls_gemm_batch(p->queue, 1, 0, d, d, T, 1, dhidden + b * H * head, d, head, clean + b * H * head, d, head, 1, dW,
                      d, d * d, H);
    const ls_view rows = {dhidden, H * head, head, d}, maps = {(ls_real *)(uintptr_t)f.map, 0, d * d, d};
    ls_gemm_heads(p->queue, 0, 0, T, d, d, 1, rows, maps, 1, p->dq, B, H);
}

} // namespace ls_local
