/* Exact softmax attention on a GPU: the phases of softmax.c, its formulas and its order.
 *
 * How the work is divided. Matrices are made in tiles of 64×64 by a block of 128 threads: thread (y, x), y < 8, x < 16,
 * makes rows 8y..8y+7 and columns 4x..4x+3. What is summed over keys (or queries) stays in registers while the other
 * side streams past:
 *
 *   forward        a block has 64 queries, and m, l, out of its rows; keys and values pass.  s = q kᵀ, out += p v
 *   backward, dq   a block has 64 queries; keys and values pass.        dp = do vᵀ, s = q kᵀ, dq += ds k
 *   backward, dkv  a block has 64 keys and values; queries pass.        dp = v doᵀ, s = k qᵀ, dk += ds q, dv += p do
 *
 * A row of s lies with 16 threads of one warp, so that statistics of rows are made by shuffles. In shared memory are
 * one tile of the side that stays, one of the side that passes (64 features at a time, any d), and p or ds on its way
 * from columns to factors of the next product. A block makes at most 128 features of its results; where d is greater
 * there are several blocks for the same rows, each with its own statistics.
 *
 * Tiles start at global positions that are a multiple of 4: four random numbers of dropout come from one call, and
 * belong to four keys of one thread.
 *
 * On a queue of precision bf16 the calls that softmax_tensor.cu knows run there, on tensor cores. The kernels here are
 * then their plain twins, for all other calls, with the same operands rounded to bfloat16: q, k, v, do, and p and ds as
 * factors. m, l and δ are made of what is not rounded, but for δ's output, where a layer has kept it as bfloat16.
 *
 * In a decoding step there is one query: blocks share its keys by chunks, and their statistics are joined. */
#include "cuda.h"
#include "softmax_cuda.h"
#include "softmax_tiles.h"

enum { STEP_CHUNKS = 64, STEP_KEYS = 256 };            /* of a step: at most, and keys at a time */
enum { TOP };                                          /* saved[] */
enum { MAXIMUM, SUM, DELTA, CHUNKS, COPIES = CHUNKS }; /* work[]; only a step has chunks */

/* Features of the results that a block makes, how many such slices there are. */
static int64_t slice_width(const ls_pass *p)
{
    return p->d <= TILE ? TILE : 2 * TILE;
}
static int64_t slices_of(const ls_pass *p)
{
    return ls_max(1, (p->d + slice_width(p) - 1) / slice_width(p));
}

static int draws(const ls_pass *p)
{
    return p->dropout_mask == NULL && p->training && p->dropout > 0 && !p->step;
}

/* What only the kernels here know of. */
static int has_masks(const ls_pass *p)
{
    return p->attn_mask != NULL || p->weights != NULL || p->dropout_mask != NULL;
}

static int takes_narrow(const ls_pass *p)
{
    return !has_masks(p) && ls_softmax_tensor_takes_narrow(p);
}

static ls_status refuse_narrow(void)
{
    LS_FAIL(LS_ERR_INTERNAL, "softmax: rows in bfloat16 beside gradients that are not aligned: please report this");
}

static softmax_call call_of(const ls_pass *p)
{
    softmax_call x = {};
    x.q = p->q, x.k = p->visit.k, x.v = p->visit.v, x.out = p->out;
    x.dout = p->dout, x.dq = p->dq, x.dk = p->visit.dk, x.dv = p->visit.dv;
    x.pad_q = p->pad_q, x.pad_k = p->visit.pad;
    x.B = p->B, x.H = p->H, x.T = p->T, x.n = p->visit.n, x.d = p->d, x.all_keys = p->all_keys;
    x.scale = (ls_real)p->scale;
    x.causal = p->pattern == LS_CS;
    if (p->narrow) {
        x.narrow_q = p->narrow_q, x.narrow_k = p->visit.narrow_k, x.narrow_v = p->visit.narrow_v;
        x.narrow_dout = p->narrow_dout, x.narrow_out = p->narrow_out;
    }
    const auto is_wide = [&](ls_view v) { return ls_rows_are_fours(v, p->d); };
    x.wide = is_wide(x.q) && is_wide(x.k) && is_wide(x.v) && is_wide(x.out);
    x.narrow = p->queue->precision == LS_BF16;
    x.fresh = p->narrow;
    if (p->backward) x.wide = x.wide && is_wide(x.dout) && is_wide(x.dq) && is_wide(x.dk) && is_wide(x.dv);
    x.queries = p->query_spans, x.keys = p->visit.spans;
    for (int i = 0; i < x.queries; i++) x.query[i] = p->query_span[i];
    for (int i = 0; i < x.keys; i++) x.key[i] = p->visit.span[i];
    x.m = p->work[MAXIMUM], x.l = p->work[SUM], x.delta = p->work[DELTA];
    x.taken = p->work[SUM]; /* which nobody else uses backward */
    x.top = p->saved[TOP], x.inverse = x.top + p->B * p->H * p->T;
    x.attn_mask = p->attn_mask, x.mask_per_head = p->attn_mask_per_head;
    x.dropout_mask = p->dropout_mask;
    x.weights = p->weights;
    x.draws = draws(p);
    if (x.draws) x.limit = (uint64_t)ceil(p->dropout * 4294967296.0), x.keep = (ls_real)(1 / (1 - p->dropout));
    x.seed = p->seed, x.sample = p->sample, x.stream = p->stream;
    return x;
}

void ls_softmax_plan_cuda(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t rows = p->B * p->H * p->T;
    p->saved[TOP] = ls_take(saved, 2 * rows);
    p->work[MAXIMUM] = ls_take(work, slices_of(p) * rows);
    p->work[SUM] = ls_take(work, slices_of(p) * rows);
    p->work[DELTA] = ls_take(work, rows);
    if (p->step)
        p->work[CHUNKS] = ls_take(work, rows * STEP_CHUNKS * (2 + p->d));
    else
        p->work[COPIES] = ls_take(work, has_masks(p) ? 0 : ls_softmax_tensor_reals(p));
}

/* ------------------------------------------------------------------------------------------------ tiles */

/* A tile of the side that passes is read by rows 4x + j of the threads at a time. So that their numbers lie in
 * different banks, groups of four features change places with the row. One of the side that stays is read by all
 * threads of a half warp alike. */
__device__ static inline int passing(int row, int group)
{
    return row * ACROSS + (group ^ ((row ^ row >> 3) & 7));
}
__device__ static inline int staying(int row, int group)
{
    return row * ACROSS + group;
}

/* Operands of the products: as they are, or as the tensor cores take them. */
template <bool EXTRAS> __device__ static inline ls_four narrowed(const softmax_call &p, ls_four x)
{
    if (EXTRAS && p.narrow)
        for (int c = 0; c < 4; c++) x.v[c] = __bfloat162float(__float2bfloat16((float)x.v[c]));
    return x;
}

/* to = scale · features [f, f + 64) of the rows of a tile; 0 where there are none, or a row is padded. */
template <int (*place_in)(int, int), bool EXTRAS>
__device__ static inline void load(ls_four *to, const softmax_call &p, ls_view v, const place &x, const tile &t,
                                   int64_t f, const uint8_t *pad, ls_real scale)
{
    const int group = threadIdx.x % ACROSS;
    const int64_t left = p.d - f - 4 * group;
#pragma unroll 4
    for (int i = 0; i < ROWS; i++) {
        const int r = i * (THREADS / ACROSS) + threadIdx.x / ACROSS;
        ls_four y = {{0, 0, 0, 0}};
        if (r >= t.first && r < t.last && left > 0 && !ls_is_padded(pad, t.row + r)) {
            const ls_real *from = ls_row(v, x.b, x.h, t.row + r) + f + 4 * group;
            if (p.wide)
                y = *(const ls_four *)from;
            else
                for (int c = 0; c < 4; c++) y.v[c] = c < left ? from[c] : 0;
            y = narrowed<EXTRAS>(p, y);
            for (int c = 0; c < 4; c++) y.v[c] *= scale;
        }
        to[place_in(r, group)] = y;
    }
}

/* s_ij += Σ_f a_if b_jf over `groups` of four features: rows 8y + i of a tile that stays, 4x + j of one that passes, of
 * which `rows` and `columns` are wanted. */
__device__ static inline void multiply_features(const ls_four *a, const ls_four *b, int rows, int columns, int groups,
                                                ls_real s[ROWS][COLUMNS])
{
    const int y = threadIdx.x / ACROSS, x = threadIdx.x % ACROSS;
    if (ROWS * y >= rows || COLUMNS * x >= columns) return;
#pragma unroll 2
    for (int g = 0; g < groups; g++) {
        ls_four v[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) v[j] = b[passing(COLUMNS * x + j, g)];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const ls_four u = a[staying(ROWS * y + i, g)];
#pragma unroll
            for (int j = 0; j < COLUMNS; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) s[i][j] += u.v[c] * v[j].v[c];
        }
    }
}

/* o_ic += Σ_j s_ij b_jc over the rows of a tile that passes, `columns` of them: rows 8y + i, columns 4x + c. */
__device__ static inline void multiply_rows(const ls_four *s, const ls_four *b, int rows, int columns,
                                            ls_real o[ROWS][COLUMNS])
{
    const int y = threadIdx.x / ACROSS, x = threadIdx.x % ACROSS, groups = (columns + 3) / 4;
    if (ROWS * y >= rows) return;
#pragma unroll 2
    for (int g = 0; g < groups; g++) {
        ls_four v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = b[passing(4 * g + j, x)];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const ls_four u = s[staying(ROWS * y + i, g)];
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) o[i][c] += u.v[j] * v[j].v[c];
        }
    }
}

/* s = a bᵀ over all features: rows of the tile that stays, which is there already if `kept`, and of one that passes.
 * The last slice of the latter is still there afterwards. */
template <bool EXTRAS>
__device__ static inline void scores(const softmax_call &p, const place &x, const tile &t, ls_four *stays,
                                     ls_four *passes, ls_view a, const uint8_t *pad_a, ls_real scale_a, int kept,
                                     ls_view b, const uint8_t *pad_b, ls_real scale_b, ls_real s[ROWS][COLUMNS])
{
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) s[i][j] = 0;
    for (int64_t f = 0; f < p.d; f += TILE) {
        __syncthreads(); /* all have read what was there */
        if (!kept) load<staying, EXTRAS>(stays, p, a, x, x.t, f, pad_a, scale_a);
        load<passing, EXTRAS>(passes, p, b, x, t, f, pad_b, scale_b);
        __syncthreads();
        multiply_features(stays, passes, x.t.last, t.last, (int)(ls_min(TILE, p.d - f) + 3) / 4, s);
    }
}

/* o_n += factors b, slice n of the features of b: TILE from f0 + n TILE on. loaded: it is one slice, which passes has.
 */
template <int N, bool EXTRAS>
__device__ static inline void
multiply_slices(const softmax_call &p, const place &x, const tile &t, const ls_four *factors, ls_four *passes,
                int loaded, ls_view b, const uint8_t *pad_b, ls_real scale_b, int64_t f0, ls_real o[N][ROWS][COLUMNS])
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (!loaded) {
            __syncthreads();
            load<passing, EXTRAS>(passes, p, b, x, t, f0 + n * TILE, pad_b, scale_b);
            __syncthreads();
        }
        multiply_rows(factors, passes, x.t.last, t.last, o[n]);
    }
}

/* A thread's rows of a block, COLUMNS features from f on: v = keep(i) v + times(i) o, of which nothing is left. */
template <typename K, typename F>
__device__ static inline void add_rows(const softmax_call &p, ls_view v, const place &x, int64_t f, K keep, F times,
                                       ls_real o[ROWS][COLUMNS])
{
    const int y = threadIdx.x / ACROSS;
    f += COLUMNS * (threadIdx.x % ACROSS);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = ROWS * y + i;
        if (r >= x.t.first && r < x.t.last && f < p.d) {
            ls_real *to = ls_row(v, x.b, x.h, x.t.row + r) + f;
            if (p.wide) {
                ls_four old = *(ls_four *)to;
                for (int c = 0; c < COLUMNS; c++) old.v[c] = keep(i) * old.v[c] + times(i) * o[i][c];
                *(ls_four *)to = old;
            } else
                for (int c = 0; c < COLUMNS && f + c < p.d; c++) to[c] = keep(i) * to[c] + times(i) * o[i][c];
        }
        for (int c = 0; c < COLUMNS; c++) o[i][c] = 0;
    }
}
__device__ static inline void add_rows(const softmax_call &p, ls_view v, const place &x, int64_t f,
                                       ls_real o[ROWS][COLUMNS])
{
    add_rows(
        p, v, x, f, [](int) { return (ls_real)1; }, [](int) { return (ls_real)1; }, o);
}

/* The dropout factors D of query (row, position i) and the keys at j .. j + 3, j a multiple of 4. Only keys of the bits
 * `seen` are looked up. */
__device__ static inline ls_four dropout(const softmax_call &p, const place &x, int64_t row, int64_t i, int64_t j,
                                         int seen)
{
    ls_four D = {{1, 1, 1, 1}};
    if (p.draws) {
        const uint32_t kept = kept_of(p, x, i, j);
        for (int c = 0; c < 4; c++) D.v[c] = kept >> c & 1 ? p.keep : 0;
    } else if (p.dropout_mask != NULL)
        for (int c = 0; c < 4; c++)
            if (seen >> c & 1) D.v[c] = p.dropout_mask[(x.head * p.T + row) * p.all_keys + j + c];
    return D;
}

/* Which of the rows r .. r + n - 1 of a tile of keys exist and are not padded: one bit for each. */
__device__ static inline int keys_seen(const tile &t, int r, int n, const uint8_t *pad)
{
    int seen = 0;
    for (int c = 0; c < n; c++) seen |= (r + c >= t.first && r + c < t.last && !ls_is_padded(pad, t.row + r + c)) << c;
    return seen;
}

__device__ static inline const ls_real *mask_row(const softmax_call &p, const place &x, int64_t row)
{
    return p.attn_mask + ((p.mask_per_head ? x.head : 0) * p.T + row) * p.all_keys;
}

/* ------------------------------------------------------------------------------------------------ forward */

/* Where a row begins. */
__device__ static inline int64_t row_at(ls_view v, int64_t b, int64_t h, int64_t t)
{
    return b * v.sb + h * v.sh + t * v.st;
}

/* W numbers are read at once where rows are walked along. */
template <int W> __global__ static void begin_kernel(softmax_call p, int64_t slices, int bits)
{
    const int lanes = 1 << bits, lane = (int)threadIdx.x & (lanes - 1), d = p.fresh ? 0 : (int)p.d; /* of out */
    const int64_t rows = p.B * p.H * p.T;
    ls_walk_tiles(p.B, p.T, bits, [&](const ls_tile_rows &mine) {
        int64_t row = (mine.b * p.H + mine.h) * p.T + mine.first;
        ls_real *out = p.out.p + row_at(p.out, mine.b, mine.h, mine.first);
        for (int64_t t = mine.first; t < mine.end; t += mine.step, row += mine.step, out += mine.step * p.out.st) {
            for (int64_t i = lane; i < slices; i += lanes) p.m[i * rows + row] = -INFINITY, p.l[i * rows + row] = 0;
            for (int e = W * lane; e < d; e += W * lanes) ls_put_few(out + e, ls_few<W>());
            for (int64_t j = lane; p.weights != NULL && j < p.all_keys; j += lanes)
                p.weights[row * p.all_keys + j] = -INFINITY;
        }
    });
}

static int reads_fours(const softmax_call &x)
{
    const uintptr_t narrow = (uintptr_t)x.narrow_out | (uintptr_t)x.narrow_dout;
    return x.wide && narrow % sizeof(ls_narrow_word<4>::type) == 0;
}

static int bits_of(const softmax_call &x)
{
    return ls_lane_bits(reads_fours(x) ? (x.d + 3) / 4 : x.d);
}

ls_status ls_softmax_begin_cuda(ls_pass *p, int phase)
{
    (void)phase;
    const softmax_call x = call_of(p);
    const auto kernel = reads_fours(x) ? begin_kernel<4> : begin_kernel<1>;
    LS_LAUNCH(p->queue, kernel, ls_tile_blocks(x.B, x.H, x.T), LS_THREADS, 0, x, slices_of(p), bits_of(x));
    return ls_launched(p->queue, "softmax: begin");
}

/* s of one tile of queries × keys becomes the logits: + mask, -inf where a key may not be seen. */
template <bool EXTRAS>
__device__ static inline void mask_scores(const softmax_call &p, const place &x, const tile &t, int seen,
                                          ls_real s[ROWS][COLUMNS])
{
    const int r0 = ROWS * (threadIdx.x / ACROSS), c0 = COLUMNS * (threadIdx.x % ACROSS);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i;
        const int exists = r >= x.t.first && r < x.t.last;
        const ls_real *mask = EXTRAS && p.attn_mask != NULL && exists ? mask_row(p, x, x.t.row + r) + t.at + c0 : NULL;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const int visible = (seen >> j & 1) && (!p.causal || t.at + c0 + j <= x.t.at + r);
            if (mask != NULL && visible) s[i][j] += mask[j];
            s[i][j] = visible ? s[i][j] : -INFINITY;
        }
    }
}

template <typename F> __device__ static inline ls_real across(ls_real x, F join)
{
    for (int step = ACROSS / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
struct larger {
    __device__ ls_real operator()(ls_real a, ls_real b) const
    {
        return b > a ? b : a;
    }
};
struct sum {
    __device__ ls_real operator()(ls_real a, ls_real b) const
    {
        return a + b;
    }
};

/* Logits s of a tile: m, l and out of a thread's rows take them in, and factors becomes D e^(s - m).
 * N: column groups of 64 features that the block makes. EXTRAS: there may be a mask, dropout, weights,
 * or operands in bfloat16. */
template <int N, bool EXTRAS>
__device__ static inline void update_rows(const softmax_call &p, const place &x, const tile &t, int seen,
                                          const ls_real s[ROWS][COLUMNS], ls_real m[ROWS], ls_real l[ROWS],
                                          ls_real o[N][ROWS][COLUMNS], ls_four *factors)
{
    const int r0 = ROWS * (threadIdx.x / ACROSS), c0 = COLUMNS * (threadIdx.x % ACROSS);
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i;
        if (EXTRAS && p.weights != NULL && x.slice == 0 && r >= x.t.first && r < x.t.last)
            for (int j = 0; j < COLUMNS; j++)
                if (seen >> j & 1) p.weights[(x.head * p.T + x.t.row + r) * p.all_keys + t.at + c0 + j] = s[i][j];
        ls_real here = s[i][0];
        for (int j = 1; j < COLUMNS; j++) here = s[i][j] > here ? s[i][j] : here;
        here = across(here, larger());
        const ls_real top = raised(m[i], here), shrink = ls_statistics_weight(m[i], top);
        m[i] = top, l[i] *= shrink;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) o[n][i][c] *= shrink;
        ls_four e;
        for (int j = 0; j < COLUMNS; j++) {
            e.v[j] = ls_exp(s[i][j] - ls_statistics_top(top));
            l[i] += e.v[j];
        }
        if (EXTRAS && (p.draws || (p.dropout_mask != NULL && r >= x.t.first && r < x.t.last))) {
            const ls_four D = dropout(p, x, x.t.row + r, x.t.at + r, t.at + c0, seen);
            for (int j = 0; j < COLUMNS; j++) e.v[j] *= D.v[j];
        }
        factors[staying(r, c0 / COLUMNS)] = narrowed<EXTRAS>(p, e);
    }
}

/* (m, l, out) of a thread's rows in memory ⊕= what the block has of them, of which nothing is left. */
template <int N>
__device__ static inline void join_rows(const softmax_call &p, const place &x, int64_t f0, ls_real m[ROWS],
                                        ls_real l[ROWS], ls_real o[N][ROWS][COLUMNS])
{
    const int64_t state = (x.slice * p.B * p.H + x.head) * p.T + x.t.row;
    const int r0 = ROWS * (threadIdx.x / ACROSS), first = threadIdx.x % ACROSS == 0;
    ls_real before[ROWS], more[ROWS]; /* weights of what is there and of what comes */
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i, exists = r >= x.t.first && r < x.t.last;
        const ls_real total = across(l[i], sum()); /* threads of a row have parts */
        const ls_statistics_joined s =
            ls_statistics_join(exists ? p.m[state + r] : -INFINITY, exists ? p.l[state + r] : 0, m[i], total);
        __syncwarp(); /* all threads of the row have read */
        if (exists && first) p.m[state + r] = s.m, p.l[state + r] = s.l;
        before[i] = s.weight[0], more[i] = s.weight[1];
        m[i] = -INFINITY, l[i] = 0;
    }
#pragma unroll
    for (int n = 0; n < N; n++)
        add_rows(
            p, p.out, x, f0 + n * TILE, [&](int i) { return before[i]; }, [&](int i) { return more[i]; }, o[n]);
}

template <int N, bool EXTRAS>
__global__ static void __launch_bounds__(THREADS, N == 1 ? 3 : 2) forward_kernel(softmax_call p)
{
    __shared__ ls_four stays[TILE * ACROSS], passes[TILE * ACROSS], probabilities[TILE * ACROSS];
    const place x = place_of(p, p.query, p.queries, 1);
    const int64_t f0 = x.slice * N * TILE;
    const int c0 = COLUMNS * (threadIdx.x % ACROSS);
    ls_real o[N][ROWS][COLUMNS] = {}, m[ROWS], l[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) m[i] = -INFINITY, l[i] = 0;
    /* the warp has rows that exist */
    const int busy = (int)threadIdx.x / LS_WARP * 2 * ROWS < x.t.last;
    const uint8_t *pad_q = p.pad_q != NULL ? p.pad_q + x.b * p.T : NULL;
    const uint8_t *pad_k = p.pad_k != NULL ? p.pad_k + x.b * p.n : NULL;
    int kept = 0;
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t from = 0; from < tiles; from += TILES_TOGETHER) {
            for (int64_t number = from; number < ls_min(tiles, from + TILES_TOGETHER); number++) {
                const tile t = tile_in(p.key[span], number);
                ls_real s[ROWS][COLUMNS];
                scores<EXTRAS>(p, x, t, stays, passes, p.q, pad_q, p.scale, kept, p.k, NULL, 1, s);
                kept = p.d <= TILE;
                const int seen = keys_seen(t, c0, COLUMNS, pad_k);
                mask_scores<EXTRAS>(p, x, t, seen, s);
                if (busy) update_rows<N, EXTRAS>(p, x, t, seen, s, m, l, o, probabilities);
                multiply_slices<N, EXTRAS>(p, x, t, probabilities, passes, 0, p.v, NULL, 1, f0, o);
            }
            join_rows<N>(p, x, f0, m, l, o);
        }
    }
}

/* A kernel's variants by N - 1 and EXTRAS. */
typedef void (*kernel_table[2][2])(softmax_call);
#define TABLE_OF(kernel)                                                                                               \
    {                                                                                                                  \
        {kernel<1, false>, kernel<1, true>}, {kernel<2, false>, kernel<2, true>},                                      \
    }
static auto kernel_for(const ls_pass *p, const kernel_table &table)
{
    return table[slice_width(p) == TILE ? 0 : 1][has_masks(p) || draws(p) || p->queue->precision == LS_BF16];
}

static int blocks_of(const ls_pass *p, const ls_span *span, int spans)
{
    return (int)(tiles_of(span, spans) * p->B * p->H * slices_of(p));
}

/* Numbers from i on of floats, or of what is there in their place. */
template <int W> __device__ static inline ls_few<W> numbers_at(const ls_real *x, const void *narrow, int64_t i)
{
    return narrow == NULL ? ls_few_at<W>(x + i) : ls_few_at<W>(static_cast<const __nv_bfloat16 *>(narrow) + i);
}

/* out /= l; m and 1 / l are kept. A row that saw no key, or is padded, gives 0; its m is +inf, so that p = 0 in
 * backward. */
template <int W> __global__ static void finish_kernel(softmax_call p, int bits)
{
    const int lanes = 1 << bits, lane = (int)threadIdx.x & (lanes - 1), d = (int)p.d;
    __nv_bfloat16 *narrow = static_cast<__nv_bfloat16 *>(p.narrow_out);
    ls_walk_tiles(p.B, p.T, bits, [&](const ls_tile_rows &mine) {
        int64_t row = (mine.b * p.H + mine.h) * p.T + mine.first;
        int64_t at = row_at(p.out, mine.b, mine.h, mine.first);
        for (int64_t t = mine.first; t < mine.end; t += mine.step, row += mine.step, at += mine.step * p.out.st) {
            const ls_real l = p.l[row], m = p.m[row];
            const int dead = l == 0 || ls_is_padded(p.pad_q, mine.b * p.T + t);
            const ls_real top = dead ? INFINITY : m, inverse = dead ? 0 : 1 / l;
            if (lane == 0) p.top[row] = top, p.inverse[row] = inverse;
            for (int e = W * lane; e < d; e += W * lanes) {
                const int64_t i = at + e;
                ls_few<W> o = ls_few_at<W>(p.out.p + i);
                for (int c = 0; c < W; c++) o.v[c] = dead ? 0 : inverse * o.v[c];
                if (narrow != NULL)
                    ls_put_few(narrow + i, o);
                else
                    ls_put_few(p.out.p + i, o);
            }
            for (int64_t j = lane; p.weights != NULL && j < p.all_keys; j += lanes) {
                ls_real *w = p.weights + row * p.all_keys + j;
                *w = dead ? 0 : inverse * ls_exp(*w - top);
            }
        }
    });
}

/* Kernels of a warp for each row. */
static int row_blocks(const ls_pass *p)
{
    return ls_blocks(p->B * p->H * p->T * LS_WARP, LS_THREADS);
}

ls_status ls_softmax_finish_cuda(ls_pass *p, int phase)
{
    (void)phase;
    const softmax_call x = call_of(p);
    const auto kernel = reads_fours(x) ? finish_kernel<4> : finish_kernel<1>;
    LS_LAUNCH(p->queue, kernel, ls_tile_blocks(x.B, x.H, x.T), LS_THREADS, 0, x, bits_of(x));
    return ls_launched(p->queue, "softmax: finish");
}

/* ------------------------------------------------------------------------------------------------ backward */

/* δ_i = do_i·o_i; dq = 0. */
template <int W> __global__ static void finish_backward_kernel(softmax_call p, int bits)
{
    const int lanes = 1 << bits, lane = (int)threadIdx.x & (lanes - 1), d = (int)p.d;
    ls_walk_tiles(p.B, p.T, bits, [&](const ls_tile_rows &mine) {
        const int64_t t = mine.first, row = (mine.b * p.H + mine.h) * p.T;
        int64_t from = row_at(p.dout, mine.b, mine.h, t), at = row_at(p.out, mine.b, mine.h, t);
        ls_real *dq = ls_row(p.dq, mine.b, mine.h, t);
        for (int i = 0; i < mine.times; i++) {
            const int64_t here = t + i * mine.step;
            const bool exists = here < mine.end;
            ls_real delta = 0;
            for (int e = W * lane; exists && e < d; e += W * lanes) {
                const ls_few<W> dout = numbers_at<W>(p.dout.p, p.narrow_dout, from + e);
                const ls_few<W> out = numbers_at<W>(p.out.p, p.narrow_out, at + e);
                for (int c = 0; c < W; c++) delta += dout.v[c] * out.v[c];
                if (!p.fresh) ls_put_few(dq + e, ls_few<W>());
            }
            delta = ls_warp_sum(delta, lanes);
            if (lane == 0 && exists) /* what padded rows hold may be NaN */
                p.delta[row + here] = ls_is_padded(p.pad_q, mine.b * p.T + here) ? 0 : delta;
            from += mine.step * p.dout.st, at += mine.step * p.out.st, dq += mine.step * p.dq.st;
        }
    });
}

ls_status ls_softmax_finish_backward_cuda(ls_pass *p, int phase)
{
    (void)phase;
    const softmax_call x = call_of(p);
    const auto kernel = reads_fours(x) ? finish_backward_kernel<4> : finish_backward_kernel<1>;
    LS_LAUNCH(p->queue, kernel, ls_tile_blocks(x.B, x.H, x.T), LS_THREADS, 0, x, bits_of(x));
    return ls_launched(p->queue, "softmax: finish backward");
}

/* Where a tile has all the keys that a row sees, δ is taken from it, as in row_backward of softmax.c, and left for
 * keys_backward_kernel: not in p.delta, which blocks of other slices may still read. Not in bf16: the tensor cores'
 * twin does not. dq_i += scale Σ_j ds_ij k_j, ds = p (D do_i·v_j - δ_i), p = e^(s - m) / l. */
template <int N, bool EXTRAS>
__global__ static void __launch_bounds__(THREADS, N == 1 ? 3 : 2) queries_backward_kernel(softmax_call p)
{
    __shared__ ls_four stays[TILE * ACROSS], passes[TILE * ACROSS], gradients[TILE * ACROSS];
    const place x = place_of(p, p.query, p.queries, 1);
    const int64_t row = x.head * p.T + x.t.row, f0 = x.slice * N * TILE;
    const int r0 = ROWS * (threadIdx.x / ACROSS), c0 = COLUMNS * (threadIdx.x % ACROSS);
    const uint8_t *pad_q = p.pad_q != NULL ? p.pad_q + x.b * p.T : NULL;
    const uint8_t *pad_k = p.pad_k != NULL ? p.pad_k + x.b * p.n : NULL;
    ls_real dq[N][ROWS][COLUMNS] = {};
    ls_real top[ROWS], delta[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i, exists = r >= x.t.first && r < x.t.last;
        top[i] = exists ? p.top[row + r] : INFINITY;
        delta[i] = exists ? p.delta[row + r] : 0;
    }
    for (int span = 0; span < p.keys; span++) {
        const int64_t tiles = tiles_before(p, p.key[span], x.t);
        for (int64_t from = 0; from < tiles; from += TILES_TOGETHER) {
            for (int64_t number = from; number < ls_min(tiles, from + TILES_TOGETHER); number++) {
                const tile t = tile_in(p.key[span], number);
                ls_real dp[ROWS][COLUMNS], s[ROWS][COLUMNS];
                scores<EXTRAS>(p, x, t, stays, passes, p.dout, pad_q, 1, 0, p.v, NULL, 1, dp);
                scores<EXTRAS>(p, x, t, stays, passes, p.q, pad_q, p.scale, 0, p.k, NULL, 1, s);
                const int seen = keys_seen(t, c0, COLUMNS, pad_k);
                mask_scores<EXTRAS>(p, x, t, seen, s);
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    const int r = r0 + i;
                    if (EXTRAS && (p.draws || (p.dropout_mask != NULL && top[i] != INFINITY))) {
                        const ls_four D = dropout(p, x, x.t.row + r, x.t.at + r, t.at + c0, seen);
                        for (int j = 0; j < COLUMNS; j++) dp[i][j] = ls_multiply(dp[i][j], D.v[j]);
                    }
                    const int lives = top[i] != INFINITY; /* else masks may hold anything */
                    ls_four e, ds;                        /* e: p l */
                    ls_real mass = 0, flow = 0, size = 0;
                    for (int j = 0; j < COLUMNS; j++) {
                        e.v[j] = lives ? ls_exp(s[i][j] - top[i]) : 0;
                        if (EXTRAS && !lives) dp[i][j] = 0;
                        const ls_real of_j = e.v[j] * dp[i][j];
                        mass += e.v[j], flow += of_j, size += of_j < 0 ? -of_j : of_j;
                    }
                    mass = across(mass, sum()), flow = across(flow, sum()), size = across(size, sum());
                    if (lives && !p.narrow) {
                        const ls_real inverse = p.inverse[row + r];
                        delta[i] = ls_statistics_delta(inverse * mass, inverse * flow, inverse * size, delta[i]);
                    }
                    for (int j = 0; j < COLUMNS; j++) ds.v[j] = e.v[j] * (dp[i][j] - delta[i]);
                    gradients[staying(r, c0 / COLUMNS)] = narrowed<EXTRAS>(p, ds);
                }
                __syncwarp(); /* rows are written and read by the same warp */
                multiply_slices<N, EXTRAS>(p, x, t, gradients, passes, p.d <= TILE, p.k, NULL, 1, f0, dq);
            }
#pragma unroll
            for (int n = 0; n < N; n++)
                add_rows(
                    p, p.dq, x, f0 + n * TILE, [](int) { return (ls_real)1; },
                    [&](int i) { return p.scale * p.inverse[row + r0 + i]; }, dq[n]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int r = r0 + i, exists = r >= x.t.first && r < x.t.last;
        if (exists && c0 == 0 && x.slice == 0) p.taken[row + r] = delta[i];
    }
}

/* dk_j += Σ_i ds_ij (scale q_i), dv_j += Σ_i D p do_i. Rows of a tile are keys here, its columns queries. */
template <int N, bool EXTRAS> __global__ static void __launch_bounds__(THREADS, 2) keys_backward_kernel(softmax_call p)
{
    __shared__ ls_four stays[TILE * ACROSS], passes[TILE * ACROSS], factors[TILE * ACROSS];
    const place x = place_of(p, p.key, p.keys, 0);
    const int64_t f0 = x.slice * N * TILE;
    const int r0 = ROWS * (threadIdx.x / ACROSS), c0 = COLUMNS * (threadIdx.x % ACROSS);
    const uint8_t *pad_q = p.pad_q != NULL ? p.pad_q + x.b * p.T : NULL;
    const int seen = keys_seen(x.t, r0, ROWS, p.pad_k != NULL ? p.pad_k + x.b * p.n : NULL);
    ls_real dk[N][ROWS][COLUMNS] = {}, dv[N][ROWS][COLUMNS] = {};
    for (int span = 0; span < p.queries; span++) {
        const ls_span q = p.query[span];
        const int64_t tiles = tiles_in(q);
        for (int64_t from = tiles_from(p, q, x.t); from < tiles; from += TILES_TOGETHER) {
            for (int64_t number = from; number < ls_min(tiles, from + TILES_TOGETHER); number++) {
                const tile t = tile_in(q, number);
                ls_real dp[ROWS][COLUMNS], s[ROWS][COLUMNS];
                scores<EXTRAS>(p, x, t, stays, passes, p.v, NULL, 1, 0, p.dout, pad_q, 1, dp);
                scores<EXTRAS>(p, x, t, stays, passes, p.k, NULL, 1, 0, p.q, pad_q, p.scale, s);
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    const int c = c0 + j, exists = c >= t.first && c < t.last;
                    const int64_t row = x.head * p.T + t.row + c;
                    const ls_real top = exists ? p.top[row] : INFINITY, inverse = exists ? p.inverse[row] : 0;
                    const ls_real delta = exists ? p.taken[row] : 0;
                    const int lives = top != INFINITY; /* else masks may hold anything */
                    const ls_real *mask = EXTRAS && p.attn_mask != NULL && lives ? mask_row(p, x, t.row + c) : NULL;
#pragma unroll
                    for (int half = 0; half < ROWS; half += 4) {
                        ls_four D = {{1, 1, 1, 1}};
                        if (EXTRAS && (p.draws || (p.dropout_mask != NULL && lives)))
                            D = dropout(p, x, t.row + c, t.at + c, x.t.at + r0 + half, seen >> half);
#pragma unroll
                        for (int i = half; i < half + 4; i++) {
                            const int64_t key = x.t.at + r0 + i;
                            const int visible = (seen >> i & 1) && (!p.causal || key <= t.at + c);
                            if (mask != NULL && visible) s[i][j] += mask[key];
                            const ls_real prob = visible ? inverse * ls_exp(s[i][j] - top) : 0;
                            dp[i][j] = prob * (ls_multiply(dp[i][j], D.v[i - half]) - delta);
                            s[i][j] = prob * D.v[i - half];
                        }
                    }
                }
                /* in two parts through the same shared memory: ds to dk, then D p to dv */
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    factors[staying(r0 + i, c0 / COLUMNS)] =
                        narrowed<EXTRAS>(p, {{dp[i][0], dp[i][1], dp[i][2], dp[i][3]}});
                __syncwarp();
                multiply_slices<N, EXTRAS>(p, x, t, factors, passes, p.d <= TILE, p.q, pad_q, p.scale, f0, dk);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < ROWS; i++)
                    factors[staying(r0 + i, c0 / COLUMNS)] =
                        narrowed<EXTRAS>(p, {{s[i][0], s[i][1], s[i][2], s[i][3]}});
                multiply_slices<N, EXTRAS>(p, x, t, factors, passes, 0, p.dout, pad_q, 1, f0, dv);
            }
#pragma unroll
            for (int n = 0; n < N; n++) {
                add_rows(p, p.dk, x, f0 + n * TILE, dk[n]);
                add_rows(p, p.dv, x, f0 + n * TILE, dv[n]);
            }
        }
    }
}

ls_status ls_softmax_visit_backward_cuda(ls_pass *p, int phase)
{
    (void)phase;
    const softmax_call x = call_of(p);
    const int queries = blocks_of(p, x.query, x.queries), keys = blocks_of(p, x.key, x.keys);
    if (queries == 0 || keys == 0) return LS_OK;
    static const kernel_table backward[2] = {TABLE_OF(queries_backward_kernel), TABLE_OF(keys_backward_kernel)};
    if (p->narrow && !x.wide) return refuse_narrow();
    if (has_masks(p) || !ls_softmax_tensor_backward(p, &x, p->work[COPIES])) {
        LS_LAUNCH(p->queue, kernel_for(p, backward[0]), queries, THREADS, 0, x);
        LS_LAUNCH(p->queue, kernel_for(p, backward[1]), keys, THREADS, 0, x);
    }
    return ls_launched(p->queue, "softmax: tiles backward");
}

/* ------------------------------------------------------------------------------------------------ step */

/* One query, and keys [from, to) of a chunk: (m; l, out) relative to m in part (rows, chunks, 2 + d). */
__global__ static void chunk_kernel(softmax_call p, int64_t per_chunk, ls_real *part)
{
    __shared__ ls_real score[STEP_KEYS], scratch[LS_WARP];
    const int lane = threadIdx.x % LS_WARP, warp = threadIdx.x / LS_WARP, warps = blockDim.x / LS_WARP;
    const int64_t chunk = blockIdx.x, row = blockIdx.y + (int64_t)gridDim.y * blockIdx.z, t = row % p.T;
    const int64_t b = row / p.T / p.H, h = row / p.T % p.H;
    if (row >= p.B * p.H * p.T) return;
    const ls_span keys = p.key[0];
    const int64_t to = ls_min(keys.n, (chunk + 1) * per_chunk), i = p.query[0].lo + t;
    ls_real *x = part + (row * gridDim.x + chunk) * (2 + p.d), m = -INFINITY, l = 0;
    const ls_real *q = ls_row(p.q, b, h, t);
    const int empty = ls_is_padded(p.pad_q, b * p.T + t);
    for (int64_t e = threadIdx.x; e < p.d; e += blockDim.x) x[2 + e] = 0;
    for (int64_t j0 = chunk * per_chunk; j0 < to; j0 += STEP_KEYS) {
        const int n = (int)ls_min(STEP_KEYS, to - j0);
        /* scores, a warp for each key */
        for (int j = warp; j < n; j += warps) {
            const int64_t at = keys.row + j0 + j;
            const int visible =
                !empty && !(p.pad_k != NULL && p.pad_k[b * p.n + at]) && !(p.causal && keys.lo + j0 + j > i);
            const ls_real *k = ls_row(p.k, b, h, at);
            ls_real s = 0;
            for (int64_t e = lane; visible && e < p.d; e += LS_WARP) s += p.scale * q[e] * k[e];
            s = ls_warp_sum(s);
            if (lane == 0) score[j] = visible ? s : -INFINITY;
        }
        __syncthreads();
        ls_real here = -INFINITY;
        for (int j = threadIdx.x; j < n; j += blockDim.x) here = score[j] > here ? score[j] : here;
        here = ls_block_max(here, scratch);
        const ls_real top = here > m ? here : m, shrink = ls_statistics_weight(m, top);
        ls_real more = 0;
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            score[j] = ls_exp(score[j] - ls_statistics_top(top));
            more += score[j];
        }
        l = shrink * l + ls_block_sum(more, scratch);
        m = top;
        __syncthreads();
        for (int64_t e = threadIdx.x; e < p.d; e += blockDim.x) { /* a thread for each feature */
            ls_real o = 0;
            const ls_real *v = ls_row(p.v, b, h, keys.row + j0) + e;
            for (int j = 0; j < n; j++) o += score[j] * v[j * p.v.st];
            x[2 + e] = shrink * x[2 + e] + o;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) x[0] = m, x[1] = l;
}

/* The chunks of a row join what is there, in order. */
__global__ static void join_kernel(softmax_call p, int64_t chunks, const ls_real *part)
{
    const int lane = threadIdx.x % LS_WARP;
    const int64_t warps = (int64_t)gridDim.x * (blockDim.x / LS_WARP);
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / LS_WARP) + threadIdx.x / LS_WARP;
    for (; row < p.B * p.H * p.T; row += warps) {
        ls_real *out = ls_row(p.out, row / p.T / p.H, row / p.T % p.H, row % p.T);
        ls_real m = p.m[row], l = p.l[row];
        const ls_real *x = part + row * chunks * (2 + p.d);
        __syncwarp();
        for (int64_t c = 0; c < chunks; c++, x += 2 + p.d) {
            const ls_statistics_joined s = ls_statistics_join(m, l, x[0], x[1]);
            for (int64_t e = lane; e < p.d; e += LS_WARP) out[e] = s.weight[0] * out[e] + s.weight[1] * x[2 + e];
            m = s.m, l = s.l;
        }
        if (lane == 0) p.m[row] = m, p.l[row] = l;
    }
}

static void visit_step(ls_pass *p, const softmax_call &x)
{
    const int64_t rows = p->B * p->H * p->T, keys = x.key[0].n;
    const int64_t pieces = (keys + STEP_KEYS - 1) / STEP_KEYS, each = (pieces + STEP_CHUNKS - 1) / STEP_CHUNKS;
    const int64_t chunks = (pieces + each - 1) / each, y = ls_min(rows, 65535);
    const dim3 blocks((unsigned)chunks, (unsigned)y, (unsigned)((rows + y - 1) / y));
    LS_LAUNCH(p->queue, chunk_kernel, blocks, THREADS, 0, x, each * STEP_KEYS, p->work[CHUNKS]);
    LS_LAUNCH(p->queue, join_kernel, row_blocks(p), LS_THREADS, 0, x, chunks, (const ls_real *)p->work[CHUNKS]);
}

ls_status ls_softmax_visit_cuda(ls_pass *p, int phase)
{
    (void)phase;
    static const kernel_table forward = TABLE_OF(forward_kernel);
    const softmax_call x = call_of(p);
    const int blocks = blocks_of(p, x.query, x.queries);
    if (blocks == 0 || tiles_of(x.key, x.keys) == 0) return LS_OK;
    if (p->step)
        visit_step(p, x);
    else if (p->narrow && !x.wide)
        return refuse_narrow();
    else if (has_masks(p) || !ls_softmax_tensor_forward(p, &x, p->work[COPIES]))
        LS_LAUNCH(p->queue, kernel_for(p, forward), blocks, THREADS, 0, x);
    return ls_launched(p->queue, "softmax: tiles");
}

/* (m; l, out) of each row to or from a summary; a warp has a row. */
__global__ static void send_kernel(softmax_call p, ls_real *sent)
{
    const int lane = threadIdx.x % LS_WARP;
    const int64_t warps = (int64_t)gridDim.x * (blockDim.x / LS_WARP);
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / LS_WARP) + threadIdx.x / LS_WARP;
    for (; row < p.B * p.H * p.T; row += warps) {
        ls_real *x = sent + row * (2 + p.d);
        const ls_real *out = ls_row(p.out, row / p.T / p.H, row / p.T % p.H, row % p.T);
        if (lane == 0) x[0] = p.m[row], x[1] = p.l[row];
        for (int64_t e = lane; e < p.d; e += LS_WARP) x[2 + e] = out[e];
    }
}
__global__ static void take_kernel(softmax_call p, const ls_real *got)
{
    const int lane = threadIdx.x % LS_WARP;
    const int64_t warps = (int64_t)gridDim.x * (blockDim.x / LS_WARP);
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / LS_WARP) + threadIdx.x / LS_WARP;
    for (; row < p.B * p.H * p.T; row += warps) {
        const ls_real *x = got + row * (2 + p.d);
        ls_real *out = ls_row(p.out, row / p.T / p.H, row / p.T % p.H, row % p.T);
        if (lane == 0) p.m[row] = x[0], p.l[row] = x[1];
        for (int64_t e = lane; e < p.d; e += LS_WARP) out[e] = x[2 + e];
    }
}

ls_status ls_softmax_send_cuda(ls_pass *p, int phase)
{
    LS_LAUNCH(p->queue, send_kernel, row_blocks(p), LS_THREADS, 0, call_of(p), p->summary[phase + 1].sent);
    return ls_launched(p->queue, "softmax: send");
}

ls_status ls_softmax_take_cuda(ls_pass *p, int phase)
{
    LS_LAUNCH(p->queue, take_kernel, row_blocks(p), LS_THREADS, 0, call_of(p), (const ls_real *)p->summary[phase].got);
    return ls_softmax_finish_cuda(p, phase);
}

/* ------------------------------------------------------------------------------------------------ table */

/* "finish" of a step takes first what the ranks' parts of the cache gave. */
static ls_status finish_forward(ls_pass *p, int phase)
{
    return p->step ? ls_softmax_take_cuda(p, phase) : ls_softmax_finish_cuda(p, phase);
}

static const ls_cuda_kernel kernels[] = {
    {"begin", ls_softmax_begin_cuda, NULL},
    {"tiles", ls_softmax_visit_cuda, ls_softmax_visit_backward_cuda},
    {"send", ls_softmax_send_cuda, NULL},
    {"finish", finish_forward, ls_softmax_finish_backward_cuda},
    {NULL, NULL, NULL},
};

extern "C" const ls_cuda_mechanism ls_softmax_cuda = {ls_softmax_plan_cuda, kernels, NULL, takes_narrow};
