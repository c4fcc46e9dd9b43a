/* Longshort on a GPU: one softmax over far vectors and near keys; formulas in longshort_attend.c, tiles of queries and
 * their guests in longshort_meeting.h.
 *
 * Forward the softmax is made as guests come; its maximum and sum are saved. Backward each gradient has a kernel, which
 * makes the probabilities it needs anew:
 *   find_delta        δ = Σ P dP
 *   query_gradients   dq; sums for r_w, r_r
 *   guest_gradients   a tile of keys and values, near, or far by slices of the queries
 *   table_gradients   rows of a table, by slices of the queries, each with the guests at those distances */
#include "longshort_meeting.h"

static int64_t far_of(const ls_pass *p)
{
    return p->step ? 0 : p->pattern == LS_CS ? ls_longshort_seen(p) : vectors(p);
}

/* TABLES: pe, R_chunk, R_win, and gradients of the two. */
namespace
{
typedef struct tables {
    ls_real *positions, *far, *near, *dfar, *dnear;
} tables;
} // namespace

static tables tables_of(const ls_pass *p)
{
    const int64_t E = p->H * p->d, D = ls_longshort_distances(p), N = far_of(p);
    tables t;
    t.positions = p->work[TABLES];
    t.far = t.positions + ls_max(ls_longshort_seen(p), D) * E;
    t.near = t.far + N * E;
    t.dfar = t.near + D * E;
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
    x.far_table = t.far, x.near_table = t.near;
    x.r_w = parameter(p, R_W), x.r_r = parameter(p, R_R);
    return x;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* Four threads have a row of pairs. */
enum { SHARERS = (int)LS_THREADS / SIDE };

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
    const int mine = threadIdx.x / SHARERS, part = threadIdx.x % SHARERS, e1 = blockIdx.y * SIDE;
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

static void make_tables(ls_pass *p)
{
    const tables t = tables_of(p);
    const int64_t D = ls_longshort_distances(p), N = far_of(p);
    ls_longshort_cuda_positions(p, ls_max(N, D), t.positions);
    make_table(p, N, t.positions, parameter(p, R_CHUNK), parameter(p, R_CHUNK_BIAS), t.far);
    make_table(p, D, t.positions, parameter(p, R_WIN), NULL, t.near);
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
    const int mine = threadIdx.x / SHARERS, part = threadIdx.x % SHARERS;
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

/* A block has every slices-th tile of a (b,h), and 64 columns. partial (B,H,slices,2,d), CS: Σ of dq by way of q + r_w,
 * of q + r_r. */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2)
    query_gradients(const __grid_constant__ scene x, int64_t slices, ls_view dq, double *partial)
{
    typedef sums<M, ROWS_COLUMNS> rows;
    typedef typename meeting<M>::pairs pairs;
    LS_SHARED(ls_real, memory);
    __shared__ seats s;
    meeting<M> y(x, s, memory);
    const int64_t tiles = tiles_in(x.T, SIDE), g = blockIdx.x / slices;
    const int e1 = blockIdx.y * SIDE, e = e1 + threadIdx.x;
    double near_w = 0, near_r = 0; /* of column e */
    for (int64_t tile = blockIdx.x % slices; tile < tiles; tile += slices) {
        const int64_t row = tile * SIDE;
        rows z, z_table; /* dq by way of guests, of the table */
        __syncthreads();
        y.seat_queries(g, row, (int)ls_min(SIDE, x.T - row), WITH_DELTA);
        z.clear();
        z_table.clear();
        for (int kind = NEARBY; kind >= FAR; kind--) { /* vectors last: their queries lack r_w, r_r */
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
                    y.gather(z_table, TABLE, half, e1);
                }
            });
            if (kind == FAR || !x.causal) continue;
            near_w += y.column_sum(z);
            near_r += y.column_sum(z_table);
        }
        for (int u = 0; u < rows::U; u++)
            for (int v = 0; v < rows::V; v++) z.at(u, v) = (typename M::sum)x.scale * (z.at(u, v) + z_table.at(u, v));
        write_sums(z, y.n, e1, x.d, [&](int r) { return ls_row(dq, y.b, y.h, row + r); });
    }
    if (partial == NULL || threadIdx.x >= SIDE || e >= x.d) return;
    partial[blockIdx.x * (int64_t)2 * x.d + e] = near_w;
    partial[(blockIdx.x * (int64_t)2 + 1) * x.d + e] = near_r;
}

/* gradient (H,d) of r_w (which 0) and of r_r += the slices. */
static __global__ void add_shared(int64_t B, int64_t H, int64_t slices, int64_t d, int which, const double *partial,
                                  ls_real *gradient)
{
    LS_EACH(i, H * d)
    {
        double sum = 0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t s = 0; s < slices; s++)
                sum += partial[(((b * H + i / d) * slices + s) * 2 + which) * d + i % d];
        gradient[i] += (ls_real)sum;
    }
}

/* ------------------------------------------------------------------------------------------------ dk, dv; tables */

/* A tile of guests of a (b,h), by slices of the queries, 64 columns. NEARBY, where there is one slice: gradients of
 * what rows of the halo are after their norm. FAR: partial (slices,B,H,N,2,d). */
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
    const int count = (int)ls_min(step, all - first), e1 = blockIdx.z * SIDE;
    /* queries: CS those after; NS of the blocks from (j - e) / w of the first key to (j + e) / w of the last */
    const int64_t j = x.lo + first, last = j + count - 1;
    int64_t t = blockIdx.y * length, end = ls_min(x.T, t + length);
    if (kind == FAR && x.causal) t = ls_max(t, (first / x.r + 1) * x.c - x.first);
    if (kind == NEARBY) {
        t = ls_max(t, (x.causal ? j : ls_max(0, j - e) / x.w * x.w) - x.first);
        end = ls_min(end, (x.causal ? last + x.w : ((last + e) / x.w + 1) * x.w) - x.first);
    }
    sums<M, COLUMNS_COLUMNS> sum_k, sum_v;
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
        y.set_weights(score);
        y.give_queries(sum_k, 0, e1);
    }
    const int64_t b = g / x.H, h = g % x.H;
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
 * distances. partial (slices,B,H,rows,d). */
template <class M>
static __global__ void __launch_bounds__(LS_THREADS, 2)
    table_gradients(const __grid_constant__ scene x, int kind, int64_t length, ls_real *partial)
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
            y.set_table_weights(score, 0);
            y.give_queries(sum, 1, e1);
        }
    }
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

/* dbias (H,d) += Σ rows of dtable (H,n,d): a block has 32 columns of a head. */
static __global__ void add_rows(int64_t n, int64_t d, const ls_real *dtable, ls_real *dbias)
{
    __shared__ double sums[LS_THREADS];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = LS_THREADS / LS_WARP;
    const int64_t h = blockIdx.y, e = (int64_t)blockIdx.x * LS_WARP + lane;
    double sum = 0;
    for (int64_t i = warp; i < n && e < d; i += warps) sum += (double)dtable[(h * n + i) * d + e];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp > 0 || e >= d) return;
    for (int i = 1; i < warps; i++) sum += sums[i * LS_WARP + lane];
    dbias[h * d + e] += (ls_real)sum;
}

/* ------------------------------------------------------------------------------------------------ backward */

static int64_t query_slices(const ls_pass *p)
{
    return ls_min(QUERY_SLICES, tiles_in(p->T, SIDE));
}

/* Slices of the queries, where so many rows of every (b,h) are to be summed over them: enough to fill a GPU several
 * times over, since in CS the first rows meet many queries and the last hardly any. */
static int64_t slices_for(const ls_pass *p, int64_t rows)
{
    const int64_t tiles = tiles_in(rows, SIDE) * p->B * p->H;
    return ls_max(1, ls_min(ls_min(2048 / ls_max(tiles, 1), tiles_in(p->T, 4 * SIDE)), 256));
}

size_t ls_longshort_cuda_slices(const ls_pass *p)
{
    const int64_t N = far_of(p), D = p->pattern == LS_CS ? ls_longshort_distances(p) : 0, E = p->H * p->d;
    const int64_t far = slices_for(p, N) * p->B * N * 2 * E, near = slices_for(p, D) * p->B * D * E;
    const int64_t shared = p->B * query_slices(p) * 2 * E * (int64_t)sizeof(double);
    return (size_t)ls_max(shared, ls_max(far, near) * (int64_t)sizeof(ls_real));
}

template <class M> static void backward_of_queries(ls_pass *p, const scene *x)
{
    const int64_t slices = x->causal ? query_slices(p) : tiles_in(p->T, SIDE), all = p->H * p->d;
    double *partial = x->causal ? (double *)(void *)p->work[SLICES] : NULL;
    if (p->B * p->H * slices == 0) return;
    LS_LAUNCH(p->queue, find_delta<M>, (int)(p->B * p->H * tiles_in(p->T, SIDE)), LS_THREADS, bytes_of<M>(), *x);
    LS_LAUNCH(p->queue, query_gradients<M>, dim3((unsigned)(p->B * p->H * slices), column_tiles(p)), LS_THREADS,
              bytes_of<M>(), *x, slices, p->dq, partial);
    for (int i = 0; i < 2 && x->causal; i++)
        LS_LAUNCH(p->queue, add_shared, ls_blocks(all, LS_THREADS), LS_THREADS, 0, p->B, p->H, slices, p->d, i, partial,
                  parameter_gradient(p, i == 0 ? R_W : R_R));
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
              p->halo.dk, p->halo.dv, NULL);
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

/* Gradient of a kind's table, of so many rows, and of what it is made of. */
template <class M>
static void backward_of_table(ls_pass *p, const scene *x, int kind, ls_real *dtable, ls_real *dweight, ls_real *dbias)
{
    const tables t = tables_of(p);
    const int64_t rows = kind == FAR ? x->N : x->D, d = p->d, E = p->H * d, slices = slices_for(p, rows);
    if (rows == 0 || p->T == 0) return;
    LS_LAUNCH(p->queue, table_gradients<M>, sliced(p, rows, kind == FAR ? x->vectors : SIDE, slices), LS_THREADS,
              bytes_of<M>(), *x, kind, tiles_in(p->T, slices), p->work[SLICES]);
    LS_LAUNCH(p->queue, sum_table, ls_blocks(rows * E, LS_THREADS), LS_THREADS, 0, slices * p->B, rows * E,
              p->work[SLICES], dtable);
    ls_gemm_batch(p->queue, 1, 0, d, E, rows, 1, dtable, d, rows * d, t.positions, E, 0, 1, dweight, E, d * E, p->H);
    const dim3 blocks((unsigned)tiles_in(d, LS_WARP), (unsigned)p->H);
    if (dbias != NULL) LS_LAUNCH(p->queue, add_rows, blocks, LS_THREADS, 0, rows, d, dtable, dbias);
}

template <class M> static void backward(ls_pass *p, const scene *x, int phase)
{
    const ls_collection *g = &p->gathered[phase];
    backward_of_queries<M>(p, x);
    backward_of_window<M>(p, x);
    if (x->causal) {
        const tables t = tables_of(p);
        backward_of_far<M>(p, x, g->total / x->item / p->B, g->dall);
        backward_of_table<M>(p, x, FAR, t.dfar, parameter_gradient(p, R_CHUNK), parameter_gradient(p, R_CHUNK_BIAS));
        backward_of_table<M>(p, x, NEARBY, t.dnear, parameter_gradient(p, R_WIN), NULL);
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
