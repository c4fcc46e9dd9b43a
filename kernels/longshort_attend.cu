/* Longshort on a GPU: one softmax over far vectors and near keys; formulas in longshort_attend.c, tiles of queries and
 * their guests in longshort_meeting.h.
 *
 * Forward the softmax is made as guests come; its maximum and sum are saved. Backward each gradient has a kernel, which
 * makes the probabilities it needs anew:
 *   find_delta        δ = Σ P dP
 *   query_gradients   dq
 *   guest_gradients   a tile of keys and values, near, or far by slices of the queries; of near ones a share of dr_w
 *   table_gradients   rows of a table, by slices of the queries, each with the guests at those distances; and of dr_r
 */
#include "longshort_meeting.h"

static int64_t far_of(const ls_pass *p)
{
    return p->step ? 0 : p->pattern == LS_CS ? ls_longshort_seen(p) : vectors(p);
}

/* TABLES: pe, R_chunk, R_win, r_r·R_win, and gradients of the tables. */
namespace
{
typedef struct tables {
    ls_real *positions, *far, *near, *near_terms, *dfar, *dnear;
} tables;
} // namespace

static tables tables_of(const ls_pass *p)
{
    const int64_t E = p->H * p->d, D = ls_longshort_distances(p), N = far_of(p);
    tables t;
    t.positions = p->work[TABLES];
    t.far = t.positions + ls_max(ls_longshort_seen(p), D) * E;
    t.near = t.far + N * E;
    t.near_terms = t.near + D * E;
    t.dfar = t.near_terms + D * p->H;
    t.dnear = t.dfar + N * E;
    return t;
}

static scene scene_of(const ls_pass *p, int phase)
{
    const int causal = p->pattern == LS_CS;
    const int64_t near = p->B * p->halo.n * p->H * p->d;
    scene x = {};
    x.causal = causal;
    x.B = p->B, x.H = p->H, x.T = p->T, x.d = (int)p->d;
    x.first = p->query_span[0].lo;
    x.w = (int64_t)p->option[WINDOW];
    x.c = chunk_length(p), x.r = vectors(p), x.N = far_of(p);
    /* how far apart the newest vectors lie that queries of a tile see; where that is much, products are two */
    const int64_t apart = causal ? tiles_in(SIDE - 1, x.c) * x.r : 0;
    x.vectors = apart <= SIDE / 2 ? (int)(SIDE - apart) : SIDE;
    x.D = ls_longshort_distances(p);
    x.n = p->halo.n, x.lo = p->halo.span[0].lo;
    x.item = ls_longshort_item(p);
    x.scale = (ls_real)p->scale;
    x.q = p->q, x.dout = p->dout;
    x.pad_q = p->pad_q, x.pad = p->halo.pad;
    x.near_k = p->work[NEAR], x.near_v = p->work[NEAR] + near;
    x.items = causal ? p->gathered[phase].all : p->work[ITEMS];
    x.top = p->saved[TOP], x.inverse = p->saved[INVERSE], x.delta = p->work[DELTA];
    if (p->step) x.start = p->summary[phase].got;
    if (!causal) return x;
    const tables t = tables_of(p);
    x.far_table = t.far, x.near_table = t.near, x.near_terms = t.near_terms;
    x.r_w = parameter(p, R_W), x.r_r = parameter(p, R_R);
    return x;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* A block: a tile of queries of a (b,h), and 64 columns of what comes out: wider heads make their scores again for each
 * 64. */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2) attend(const __grid_constant__ scene x, ls_view out)
{
    typedef sums<M, ROWS_COLUMNS> rows;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t tiles = tiles_in(x.T, SIDE), g = blockIdx.x / tiles, row = blockIdx.x % tiles * SIDE;
    const int mine = y.row_shared(), part = y.part_shared(), e1 = blockIdx.y * SIDE;
    y.seat_queries(g, row, (int)ls_min(SIDE, x.T - row), PLAIN);
    const ls_real *start = x.start != NULL ? x.start + g * (2 + x.d) : NULL;
    ls_real top = start != NULL ? start[0] : -INFINITY, total = start != NULL ? start[1] : 0;
    rows z;
    z.clear();
    for (int u = 0; u < rows::U && start != NULL; u++)
        for (int v = 0; v < rows::V; v++)
            if (e1 + rows::column(v) < x.d) z.at(u, v) = (typename M::sum)start[2 + e1 + rows::column(v)];
    for (int kind = FAR; kind <= NEARBY; kind++)
        y.meet(kind, [&]() {
            typename meeting<M>::pairs score;
            ls_real a[SIDE / SHARERS], most = -INFINITY, sum = 0;
            y.score(score);
            y.hand_over(score);
            for (int k = 0; k < SIDE / SHARERS; k++) {
                const int j = part + k * SHARERS;
                a[k] = y.sees(mine, j) ? y.handed()[mine * y.PITCH + j] : -INFINITY;
                most = a[k] > most ? a[k] : most;
            }
            most = ls_warp_max(most, SHARERS);
            const ls_real next = most > top ? most : top, base = next == -INFINITY ? 0 : next;
            const ls_real shrink = ls_exp(top - base);
            __syncthreads();
            for (int k = 0; k < SIDE / SHARERS; k++) {
                const ls_real e = ls_exp(a[k] - base);
                write_number(e, y.tile(TILES) + mine * M::PITCH + part + k * SHARERS);
                sum += e;
            }
            total = total * shrink + ls_warp_sum(sum, SHARERS);
            top = next;
            if (part == 0) s.delta[mine] = shrink;
            __syncthreads();
            for (int u = 0; u < rows::U; u++)
                for (int v = 0; v < rows::V; v++) z.at(u, v) *= (typename M::sum)s.delta[rows::row(u)];
            y.gather(z, VALUE, 0, e1);
        });
    __syncthreads();
    if (part == 0) {
        const ls_real inverse = total > 0 && s.q[mine] != NULL ? 1 / total : 0;
        s.inverse[mine] = inverse;
        if (mine < y.n && blockIdx.y == 0) {
            x.top[g * x.T + row + mine] = top == -INFINITY ? 0 : top;
            x.inverse[g * x.T + row + mine] = inverse;
        }
    }
    __syncthreads();
    for (int u = 0; u < rows::U; u++) {
        const int r = rows::row(u);
        for (int v = 0; v < rows::V; v++) z.at(u, v) = s.q[r] != NULL ? (typename M::sum)s.inverse[r] * z.at(u, v) : 0;
    }
    write_sums(z, y.n, e1, x.d, [&](int r) { return ls_row(out, y.b, y.h, row + r); });
}

static void normalise_window(ls_pass *p)
{
    const int64_t E = p->H * p->d, n = p->halo.n, half = p->B * n * E;
    const longshort_rows k = {p->halo.k, p->B, n, p->H, p->d}, v = {p->halo.v, p->B, n, p->H, p->d};
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, k, p->halo.pad, longshort_side_by_side(p->work[NEAR], n * E, E, p->d));
    ls_longshort_cuda_norm(p, NEAR_WEIGHT, v, p->halo.pad,
                           longshort_side_by_side(p->work[NEAR] + half, n * E, E, p->d));
}

static __global__ void repeat_bias(int64_t n, int64_t H, int64_t d, const ls_real *bias, ls_real *table)
{
    LS_EACH(i, H * n * d)
    table[i] = bias[i / d / n * d + i % d];
}

/* table (H,n,d): rows 0 .. n-1 of W pe(δ) + bias, heads apart. */
static void make_table(ls_pass *p, int64_t n, const ls_real *positions, const ls_real *weight, const ls_real *bias,
                       ls_real *table)
{
    const int64_t H = p->H, d = p->d, E = H * d;
    if (n == 0) return;
    if (bias != NULL)
        LS_LAUNCH(p->queue, repeat_bias, ls_blocks(n * E, LS_THREADS), LS_THREADS, 0, n, H, d, bias, table);
    ls_gemm_batch_in(p->queue, LS_FLOAT32, 0, 1, n, d, E, 1, positions, E, 0, weight, E, d * E, bias != NULL, table, d,
                     n * d, H);
}

/* y (H,n) = r (H,d) · rows of table (H,n,d). */
static __global__ void multiply_rows(int64_t H, int64_t n, int64_t d, const ls_real *r, const ls_real *table,
                                     ls_real *y)
{
    LS_EACH(i, H * n)
    {
        ls_real sum = 0;
        for (int64_t e = 0; e < d; e++) sum += r[i / n * d + e] * table[i * d + e];
        y[i] = sum;
    }
}

static void make_tables(ls_pass *p)
{
    const tables t = tables_of(p);
    const int64_t D = ls_longshort_distances(p), N = far_of(p);
    ls_longshort_cuda_positions(p, ls_max(N, D), t.positions);
    make_table(p, N, t.positions, parameter(p, R_CHUNK), parameter(p, R_CHUNK_BIAS), t.far);
    make_table(p, D, t.positions, parameter(p, R_WIN), NULL, t.near);
    if (D > 0)
        LS_LAUNCH(p->queue, multiply_rows, ls_blocks(p->H * D, LS_THREADS), LS_THREADS, 0, p->H, D, p->d,
                  parameter(p, R_R), t.near, t.near_terms);
}

/* What both directions begin with. */
static void set_scene(ls_pass *p, int phase)
{
    normalise_window(p);
    if (p->pattern == LS_CS)
        make_tables(p);
    else
        ls_longshort_cuda_load_landmarks(p, &p->summary[phase]);
}

/* Columns of heads, 64 at a time. */
static unsigned column_tiles(const ls_pass *p)
{
    return (unsigned)tiles_in(p->d, SIDE);
}

template <class M> static void launch_attend(ls_pass *p, const scene *x)
{
    const int64_t blocks = p->B * p->H * tiles_in(p->T, SIDE);
    if (blocks > 0)
        LS_LAUNCH(p->queue, attend<M>, dim3((unsigned)blocks, column_tiles(p)), LS_THREADS, bytes_of<M>(), *x, p->out);
}

ls_status ls_longshort_cuda_attend(ls_pass *p, int phase)
{
    const scene x = scene_of(p, phase);
    set_scene(p, phase);
    if (on_tensor_cores(p))
        launch_attend<tensor>(p, &x);
    else
        launch_attend<plain>(p, &x);
    return ls_launched(p->queue, "longshort: attend");
}

/* ------------------------------------------------------------------------------------------------ dq */

/* A block: δ = Σ P dP of a tile of queries. */
template <class M> static __global__ void __launch_bounds__(LS_THREADS, 2) find_delta(const __grid_constant__ scene x)
{
    typedef typename meeting<M>::pairs pairs;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t tiles = tiles_in(x.T, SIDE), g = blockIdx.x / tiles, row = blockIdx.x % tiles * SIDE;
    const int mine = y.row_shared(), part = y.part_shared();
    pairs all; /* of all guests that have a place */
    ls_real delta = 0;
    y.seat_queries(g, row, (int)ls_min(SIDE, x.T - row), WITH_STATISTICS);
    all.clear();
    for (int kind = FAR; kind <= NEARBY; kind++)
        y.meet(kind, [&]() {
            pairs score, gain;
            y.score(score);
            y.weigh(score, gain);
            for (int u = 0; u < pairs::U; u++)
                for (int v = 0; v < pairs::V; v++) all.at(u, v) += score.at(u, v) * gain.at(u, v);
        });
    y.hand_over(all);
    for (int k = 0; k < SIDE / SHARERS; k++) delta += y.handed()[mine * y.PITCH + part + k * SHARERS];
    delta = ls_warp_sum(delta, SHARERS);
    if (part == 0 && mine < y.n) x.delta[g * x.T + row + mine] = delta;
}

/* A block: a tile of queries, and 64 columns. */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2) query_gradients(const __grid_constant__ scene x, ls_view dq)
{
    typedef sums<M, ROWS_COLUMNS> rows;
    typedef typename meeting<M>::pairs pairs;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t tiles = tiles_in(x.T, SIDE), g = blockIdx.x / tiles, row = blockIdx.x % tiles * SIDE;
    const int e1 = blockIdx.y * SIDE;
    rows z;
    y.seat_queries(g, row, (int)ls_min(SIDE, x.T - row), WITH_DELTA);
    z.clear();
    for (int kind = FAR; kind <= NEARBY; kind++)
        y.meet(kind, [&]() {
            pairs score, gain;
            y.score(score);
            y.weigh(score, gain);
            y.differentiate(score, gain);
            y.set_weights(score);
            y.gather(z, KEY, 0, e1);
            for (int half = 0; x.causal && half <= y.reach; half += SIDE) {
                if (!y.has_rows(half)) continue;
                y.set_table_weights(score, half);
                y.gather(z, TABLE, half, e1);
            }
        });
    for (int u = 0; u < rows::U; u++)
        for (int v = 0; v < rows::V; v++) z.at(u, v) *= (typename M::sum)x.scale;
    write_sums(z, y.n, e1, x.d, [&](int r) { return ls_row(dq, y.b, y.h, row + r); });
}

/* ------------------------------------------------------------------------------------------------ dk, dv; tables */

/* A tile of guests of a (b,h), by slices of the queries, 64 columns. NEARBY, where there is one slice: gradients of
 * what rows of the halo are after their norm, and in CS shares of dr_w, partial (H,B,tiles,d). FAR: partial
 * (slices,B,H,N,2,d). */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2)
    guest_gradients(const __grid_constant__ scene x, int kind, int64_t length, ls_view dk, ls_view dv, ls_real *partial)
{
    typedef typename meeting<M>::pairs pairs;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t all = kind == FAR ? x.N : x.n, step = y.step_of(kind), tiles = tiles_in(all, step);
    const int64_t g = blockIdx.x / tiles, first = blockIdx.x % tiles * step, e = ls_max(x.w / 2, 1);
    const int count = (int)ls_min(step, all - first), e1 = blockIdx.z * SIDE, shares = x.causal && kind == NEARBY;
    /* queries: CS those after; NS of the blocks from (j - e) / w of the first key to (j + e) / w of the last */
    const int64_t j = x.lo + first, last = j + count - 1;
    int64_t t = blockIdx.y * length, end = ls_min(x.T, t + length);
    if (kind == FAR && x.causal) t = ls_max(t, (first / x.r + 1) * x.c - x.first);
    if (kind == NEARBY) {
        t = ls_max(t, (x.causal ? j : ls_max(0, j - e) / x.w * x.w) - x.first);
        end = ls_min(end, (x.causal ? last + x.w : ((last + e) / x.w + 1) * x.w) - x.first);
    }
    sums<M, COLUMNS_COLUMNS> sum_k, sum_v;
    typename M::sum part = 0; /* of what shares */
    sum_k.clear();
    sum_v.clear();
    for (; t < end; t += SIDE) {
        pairs score, gain;
        __syncthreads();
        y.seat_queries(g, t, (int)ls_min(SIDE, end - t), WITH_DELTA);
        y.seat_guests(kind, first, count);
        y.score(score);
        y.weigh(score, gain);
        y.set_weights(score);
        y.give(sum_v, OUT, DOUT, e1);
        y.differentiate(score, gain);
        if (shares) part += y.guest_sum(score);
        y.set_weights(score);
        y.give(sum_k, QUERY, Q, e1);
    }
    const int64_t b = g / x.H, h = g % x.H;
    if (shares)
        y.add_shared(
            sum_k, part, x.r_w + h * x.d, count,
            [&](int i) { return x.near_k + ((b * x.n + first + i) * x.H + h) * x.d; }, e1,
            partial + ((h * x.B + b) * tiles + first / SIDE) * x.d);
    if (kind == NEARBY) {
        write_sums(sum_k, count, e1, x.d, [&](int i) { return ls_row(dk, b, h, first + i); });
        write_sums(sum_v, count, e1, x.d, [&](int i) { return ls_row(dv, b, h, first + i); });
    } else {
        ls_real *to = partial + ((blockIdx.y * x.B * x.H + g) * x.N + first) * 2 * x.d;
        write_sums(sum_k, count, e1, x.d, [&](int i) { return to + 2 * i * x.d; });
        write_sums(sum_v, count, e1, x.d, [&](int i) { return to + (2 * i + 1) * x.d; });
    }
}

/* CS: a tile of rows of a kind's table, by slices of the queries, 64 columns: each query with the guests at those
 * distances. partial (slices,B,H,rows,d). NEARBY: shares of dr_r, share (H,slices,B,tiles,d). */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2)
    table_gradients(const __grid_constant__ scene x, int kind, int64_t length, ls_real *partial, ls_real *share)
{
    typedef typename meeting<M>::pairs pairs;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t all = kind == FAR ? x.N : x.D, step = y.step_of(kind), tiles = tiles_in(all, step);
    const int64_t g = blockIdx.x / tiles, first = blockIdx.x % tiles * step;
    const int count = (int)ls_min(step, all - first), e1 = blockIdx.z * SIDE;
    const int64_t end = ls_min(x.T, (blockIdx.y + 1) * length);
    sums<M, COLUMNS_COLUMNS> sum;
    typename M::sum part = 0; /* of what shares */
    sum.clear();
    for (int64_t t = blockIdx.y * length; t < end; t += SIDE) {
        __syncthreads();
        y.seat_queries(g, t, (int)ls_min(SIDE, end - t), WITH_DELTA);
        const ls_span guests = y.guests_at(kind, first, count);
        for (int64_t i = 0; i < guests.n; i += SIDE) {
            pairs score, gain;
            y.seat_guests_at(kind, guests.lo + i, (int)ls_min(SIDE, guests.n - i), first, count);
            y.score(score);
            y.weigh(score, gain);
            y.differentiate(score, gain);
            if (kind == NEARBY) part += y.distance_sum(score);
            y.set_table_weights(score, 0);
            y.give(sum, QUERY, Q, e1);
        }
    }
    const int64_t b = g / x.H, h = g % x.H;
    if (kind == NEARBY)
        y.add_shared(
            sum, part, x.r_r + h * x.d, count, [&](int i) { return x.near_table + (h * all + first + i) * x.d; }, e1,
            share + (((h * gridDim.y + blockIdx.y) * x.B + b) * tiles + first / step) * x.d);
    ls_real *to = partial + ((blockIdx.y * x.B * x.H + g) * all + first) * x.d;
    write_sums(sum, count, e1, x.d, [&](int i) { return to + i * x.d; });
}

/* ditems (chunks,B,item) = the slices' sums; 0 for the flag, and for chunks that are too new for the queries here. */
static __global__ void sum_vectors(scene x, int64_t chunks, int64_t slices, const ls_real *partial, ls_real *ditems)
{
    LS_EACH(i, chunks * x.B * x.item)
    {
        const int64_t E = x.H * x.d, at = i % x.item, b = i / x.item % x.B, chunk = i / x.item / x.B;
        const int64_t part = at / E / x.r, n = chunk * x.r + at / E % x.r, h = at % E / x.d, e = at % x.d;
        double sum = 0;
        for (int64_t s = 0; s < slices && at < x.item - 1 && n < x.N; s++)
            sum += (double)partial[((((s * x.B + b) * x.H + h) * x.N + n) * 2 + part) * x.d + e];
        ditems[i] = (ls_real)sum;
    }
}

/* dtable (H,n,d) = Σ over slices and batch rows. */
static __global__ void sum_table(int64_t parts, int64_t reals, const ls_real *partial, ls_real *dtable)
{
    LS_EACH(i, reals)
    {
        double sum = 0;
        for (int64_t s = 0; s < parts; s++) sum += (double)partial[s * reals + i];
        dtable[i] = (ls_real)sum;
    }
}

/* y (H,d) += Σ rows of x (H,n,d): a block has 32 columns of a head. */
static __global__ void add_rows(int64_t n, int64_t d, const ls_real *x, ls_real *y)
{
    __shared__ double sums[LS_THREADS];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = LS_THREADS / LS_WARP;
    const int64_t h = blockIdx.y, e = (int64_t)blockIdx.x * LS_WARP + lane;
    double sum = 0;
    for (int64_t i = warp; i < n && e < d; i += warps) sum += (double)x[(h * n + i) * d + e];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || e >= d) return;
    for (int i = 1; i < warps; i++) sum += sums[i * LS_WARP + lane];
    y[h * d + e] += (ls_real)sum;
}

/* ------------------------------------------------------------------------------------------------ backward */

/* Slices of the queries, where so many rows of every (b,h) are to be summed over them: enough to fill a GPU several
 * times over, since in CS the first rows meet many queries and the last hardly any. */
static int64_t slices_for(const ls_pass *p, int64_t rows)
{
    const int64_t tiles = tiles_in(rows, SIDE) * p->B * p->H;
    return ls_max(1, ls_min(ls_min(2048 / ls_max(tiles, 1), tiles_in(p->T, 4 * SIDE)), 256));
}

size_t ls_longshort_cuda_slices(const ls_pass *p)
{
    const int64_t causal = p->pattern == LS_CS, N = far_of(p), D = causal ? ls_longshort_distances(p) : 0;
    const int64_t far = slices_for(p, N) * N * 2, near = slices_for(p, D) * (D + tiles_in(D, SIDE));
    const int64_t window = causal * tiles_in(ls_longshort_halo_rows(p), SIDE);
    return (size_t)(p->B * p->H * p->d * ls_max(window, ls_max(far, near))) * sizeof(ls_real);
}

static void add_all_rows(ls_pass *p, int64_t n, const ls_real *x, ls_real *y)
{
    LS_LAUNCH(p->queue, add_rows, dim3((unsigned)tiles_in(p->d, LS_WARP), (unsigned)p->H), LS_THREADS, 0, n, p->d, x,
              y);
}

template <class M> static void backward_of_queries(ls_pass *p, const scene *x)
{
    const int64_t blocks = p->B * p->H * tiles_in(p->T, SIDE);
    if (blocks == 0) return;
    LS_LAUNCH(p->queue, find_delta<M>, (int)blocks, LS_THREADS, bytes_of<M>(), *x);
    LS_LAUNCH(p->queue, query_gradients<M>, dim3((unsigned)blocks, column_tiles(p)), LS_THREADS, bytes_of<M>(), *x,
              p->dq);
}

/* The grid of a kernel that sums so many rows, `step` in a tile, over slices of the queries. */
static dim3 sliced(const ls_pass *p, int64_t rows, int64_t step, int64_t slices)
{
    return dim3((unsigned)(p->B * p->H * tiles_in(rows, step)), (unsigned)slices, column_tiles(p));
}

template <class M> static void backward_of_window(ls_pass *p, const scene *x)
{
    const int64_t n = p->halo.n;
    const longshort_rows k = {p->halo.k, p->B, n, p->H, p->d}, v = {p->halo.v, p->B, n, p->H, p->d};
    if (p->B * p->H * n == 0) return;
    LS_LAUNCH(p->queue, guest_gradients<M>, sliced(p, n, SIDE, 1), LS_THREADS, bytes_of<M>(), *x, NEARBY, p->T,
              p->halo.dk, p->halo.dv, p->work[SLICES]);
    if (x->causal) add_all_rows(p, p->B * tiles_in(n, SIDE), p->work[SLICES], parameter_gradient(p, R_W));
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, k, p->halo.pad, p->halo.dk, p->halo.dk, 0);
    ls_longshort_cuda_norm_backward(p, NEAR_WEIGHT, v, p->halo.pad, p->halo.dv, p->halo.dv, 0);
}

/* ditems (chunks,B,item) of the far vectors. */
template <class M> static void backward_of_far(ls_pass *p, const scene *x, int64_t chunks, ls_real *ditems)
{
    const int64_t slices = slices_for(p, x->N), all = chunks * p->B * x->item;
    if (x->N > 0)
        LS_LAUNCH(p->queue, guest_gradients<M>, sliced(p, x->N, x->vectors, slices), LS_THREADS, bytes_of<M>(), *x, FAR,
                  tiles_in(p->T, slices), p->dq, p->dq, p->work[SLICES]);
    LS_LAUNCH(p->queue, sum_vectors, ls_blocks(all, LS_THREADS), LS_THREADS, 0, *x, chunks, slices, p->work[SLICES],
              ditems);
}

/* Gradient of a kind's table, and of what it is made of; NEARBY: of r_r. */
template <class M> static void backward_of_table(ls_pass *p, const scene *x, int kind)
{
    const tables t = tables_of(p);
    const int near = kind == NEARBY;
    const int64_t rows = near ? x->D : x->N, d = p->d, E = p->H * d, parts = slices_for(p, rows) * p->B;
    ls_real *partial = p->work[SLICES], *share = partial + parts * rows * E, *dtable = near ? t.dnear : t.dfar;
    if (rows == 0 || p->T == 0) return;
    LS_LAUNCH(p->queue, table_gradients<M>, sliced(p, rows, near ? SIDE : x->vectors, slices_for(p, rows)), LS_THREADS,
              bytes_of<M>(), *x, kind, tiles_in(p->T, slices_for(p, rows)), partial, share);
    LS_LAUNCH(p->queue, sum_table, ls_blocks(rows * E, LS_THREADS), LS_THREADS, 0, parts, rows * E, partial, dtable);
    ls_gemm_batch(p->queue, 1, 0, d, E, rows, 1, dtable, d, rows * d, t.positions, E, 0, 1,
                  parameter_gradient(p, near ? R_WIN : R_CHUNK), E, d * E, p->H);
    if (near)
        add_all_rows(p, parts * tiles_in(rows, SIDE), share, parameter_gradient(p, R_R));
    else
        add_all_rows(p, rows, dtable, parameter_gradient(p, R_CHUNK_BIAS));
}

template <class M> static void backward(ls_pass *p, const scene *x, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    backward_of_queries<M>(p, x);
    backward_of_window<M>(p, x);
    if (x->causal) {
        backward_of_far<M>(p, x, g->total / x->item / p->B, g->dall);
        backward_of_table<M>(p, x, FAR);
        backward_of_table<M>(p, x, NEARBY);
    } else {
        backward_of_far<M>(p, x, 1, p->work[DITEMS]);
        ls_longshort_cuda_return_landmarks(p, &p->summary[phase]);
    }
}

ls_status ls_longshort_cuda_attend_backward(ls_pass *p, int phase)
{
    const scene x = scene_of(p, phase);
    ls_longshort_cuda_begin_norms(p);
    set_scene(p, phase);
    if (on_tensor_cores(p))
        backward<tensor>(p, &x, phase);
    else
        backward<plain>(p, &x, phase);
    ls_longshort_cuda_end_norms(p);
    return ls_launched(p->queue, "longshort: gradients");
}
