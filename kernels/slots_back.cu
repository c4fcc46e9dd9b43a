/* The backward passes of slots.cu, in which nothing of size rows x slots leaves a block: it makes the logits of a tile
 * again, and the gradients of what they are made of at once, of
 *
 *   reading   p_ir, dλ_ir = p_ir (do_i·V_r - Σ_r p_ir do_i·V_r):   dq_i = Σ_r dλ_ir k_r;   dV_r = Σ_i p_ir do_i,
 *                                                                  dk_r = Σ_i dλ_ir q_i,  dconstant_r = Σ_i dλ_ir
 *   writing   e_jr, dλ_jr = e_jr (constant_r + v_j·dx_r):          dv_j = Σ_r e_jr dx_r,
 *             dk_j = Σ_r dλ_jr s_r - 2 half k_j Σ_r dλ_jr;         ds_r = Σ_j dλ_jr k_j
 *
 * where k_r, s_r are the slots. Both have an operand X of rows that logits are made of, met by slots of_x, and another
 * Y, met by of_y. Where one tile holds all slots a block makes all of these for its rows. Otherwise one kernel goes
 * over the tiles of slots for what rows get (ROWS), another over rows for what a tile of slots gets (SUMS).
 *
 * Sums over rows: KEPT tiles in ls_real, all others in double, in the block's part of `room`. */
#include "slots_tiles.h"

using namespace ls_slot_tiles;

enum {
    PITCH = WIDTH + 4, /* rows that are read by fours lie in different banks */
    KEPT = 4,
    MANY = 32, /* slots of a tile where there are several: three blocks at once, and smaller GPUs have room */
};

/* What a block has in shared memory. */
template <int SLOTS> struct desk {
    static constexpr int PITCH_W = SLOTS + 4, BLOCKS_AT_ONCE = SLOTS == 16 ? 4 : SLOTS == 32 ? 3 : 2;
    ls_real x[TILE * PITCH], y[TILE * PITCH], of_x[SLOTS * PITCH], of_y[SLOTS * PITCH];
    ls_real a[TILE * PITCH_W], b[TILE * PITCH_W]; /* what Y and X are weighed by */
    ls_real norm[TILE];
};

/* Matrices (B*H,R,d), of which a row lies `stride` numbers from the next. */
typedef struct matrices {
    const ls_real *p;
    int64_t stride;
} matrices;

typedef struct operands {
    ls_slot_sizes s;
    ls_slot_rows x, y;
    matrices of_x, of_y;
    int64_t splits, slot_tiles, feature_tiles;
} operands;

/* Tiles of rows [tile, last) and slots [slot, end) that a block goes through. */
struct path {
    place at;
    int64_t tile, last, slot, end;

    __device__ inline path(const operands &o, bool one_tile, int slots)
        : at(place_of(o.s, o.splits, o.slot_tiles, slots, o.feature_tiles))
    {
        const int64_t tiles = parts_of(o.x.n, TILE);
        tile = tiles * at.part / o.splits, last = tiles * (at.part + 1) / o.splits;
        slot = one_tile ? at.slot : 0, end = one_tile ? at.slot + 1 : o.s.R;
    }
};

/* What a block finds done by its last call of `multiply`. */
typedef struct there {
    bool rows, slots;
} there;

/* sx, sy = the products x·of_x, y·of_y of 64 rows from t with a tile of slots. Of the features the block's own come
 * last and stay on the desk, which nobody uses when the block comes here together. norm: of |x|². */
template <int SLOTS>
__device__ static void multiply(const operands &o, const place &at, int64_t t, int64_t slot, there is, bool norm,
                                desk<SLOTS> *my, ls_real (&sx)[4][SLOTS / 8], ls_real (&sy)[4][SLOTS / 8])
{
    const int64_t end = o.x.n, matrix = at.g * o.s.R;
    const bool whole = o.feature_tiles == 1; /* a piece is all there is, and may be kept */
    ls_real square = 0;
    clear(sx);
    clear(sy);
    for (int64_t piece = 1; piece <= o.feature_tiles; piece++) {
        const int64_t e = (at.feature + piece * WIDTH) % (o.feature_tiles * WIDTH);
        const int n = (int)ls_fours(ls_min(WIDTH, o.s.d - e));
        __syncthreads();
        if (!whole || !is.rows) {
#pragma unroll 1
            for (int r = 0; r < TILE; r += TILE / 2) {
                load_rows<TILE / 2, WIDTH>(o.s, o.x, at, t + r, end, e, PITCH, my->x + r * PITCH);
                load_rows<TILE / 2, WIDTH>(o.s, o.y, at, t + r, end, e, PITCH, my->y + r * PITCH);
            }
        }
        if (!whole || !is.slots) {
            load_slots<SLOTS, WIDTH>(o.s, o.of_x.p + matrix * o.of_x.stride, o.of_x.stride, slot, e, PITCH, my->of_x);
            load_slots<SLOTS, WIDTH>(o.s, o.of_y.p + matrix * o.of_y.stride, o.of_y.stride, slot, e, PITCH, my->of_y);
        }
        __syncthreads();
        product_of_rows(n, my->x + ROW * PITCH, 16 * PITCH, my->of_x + SLOT * PITCH, 8 * PITCH, sx);
        product_of_rows(n, my->y + ROW * PITCH, 16 * PITCH, my->of_y + SLOT * PITCH, 8 * PITCH, sy);
        for (int i = 0; norm && threadIdx.x < TILE && i < n; i += 4) {
            const ls_four x = ls_four_at(my->x + threadIdx.x * PITCH + i);
            for (int c = 0; c < 4; c++) square += x.v[c] * x.v[c];
        }
    }
    if (!norm) return;
    if (threadIdx.x < TILE) my->norm[threadIdx.x] = square;
    __syncthreads();
}

/* Sums over the rows that a block goes through, of a tile of slots and 64 features, and the part that gets them, of
 * slots (R,d). */
template <int SLOTS> struct sums_of_rows {
    static constexpr int EACH = SLOTS / 8, PITCH_W = desk<SLOTS>::PITCH_W;
    ls_real x[EACH][4];
    int held;  /* tiles */
    bool none; /* in the part */

    __device__ inline sums_of_rows() : held(0), none(true)
    {
        clear(x);
    }
    __device__ inline void add(ls_slot_sizes s, const place &at, const ls_real *weight, const ls_real *rows, double *to)
    {
        product_of_columns(TILE, weight + MINE * EACH, PITCH_W, rows + COLUMN, PITCH, x);
        if (++held == KEPT) put(s, at, to);
    }
    /* Also of no rows at all: the part is 0 then. */
    __device__ inline void end(ls_slot_sizes s, const place &at, double *to)
    {
        if (held > 0 || none) put(s, at, to);
    }

  private:
    __device__ inline void put(ls_slot_sizes s, const place &at, double *to)
    {
        to += at.g * s.R * s.d;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int64_t slot = at.slot + MINE * EACH + i, e = at.feature + COLUMN;
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (slot < s.R && e + c < s.d) {
                    double *y = to + slot * s.d + e + c;
                    *y = (none ? 0 : *y) + (double)x[i][c];
                }
        }
        clear(x);
        held = 0, none = false;
    }
};

/* Rows from t of a view get what slots give to them: Σ weight · slots - factor · own; own NULL: nothing is taken off.
 * `more`: it is added to what is there. A thread has 8 of the features: four side by side, and four WIDTH / 2 behind.
 */
template <int SLOTS>
__device__ static inline void give(ls_slot_sizes s, const place &at, int64_t t, int64_t n, const ls_real *weight,
                                   const ls_real *slots, const ls_real *own, const ls_real (&factor)[4], bool more,
                                   ls_view to, int fours)
{
    constexpr int PITCH_W = desk<SLOTS>::PITCH_W;
    ls_real x[4][8];
    clear(x);
    product(SLOTS, weight + ROW * PITCH_W, 16 * PITCH_W, slots + 4 * SLOT, PITCH, x);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = half * (WIDTH / 2) + 4 * SLOT;
        const int left = (int)s.d - at.feature - column;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t row = t + ROW + 16 * i;
            if (row >= n || left <= 0) continue;
            ls_real *place = ls_row(to, at.b, at.h, row) + at.feature + column;
            ls_four y = {};
            if (more) y = ls_read_some<4>(place, left, fours);
#pragma unroll
            for (int c = 0; c < 4; c++) y.v[c] += x[i][4 * half + c];
            if (own != NULL) {
                const ls_four mine = ls_four_at(own + (ROW + 16 * i) * PITCH + column);
#pragma unroll
                for (int c = 0; c < 4; c++) y.v[c] -= factor[i] * mine.v[c];
            }
            ls_write_some<4>(y, place, left, fours);
        }
    }
}

/* a, b of the desk = the thread's weights. */
template <int SLOTS> __device__ static inline void put_weight(const ls_real (&w)[4][SLOTS / 8], ls_real *to)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < SLOTS / 8; j++) to[(ROW + 16 * i) * desk<SLOTS>::PITCH_W + SLOT + 8 * j] = w[i][j];
}

/* total = the parts, which hold `first` numbers, then `second`, then the others; a warp's lanes have neighbouring
 * numbers, the warps of a block the parts in turn. */
typedef struct totals {
    double *first, *second, *others;
    int64_t of_first, of_second, of_others;
} totals;

static __global__ void add_parts(int64_t splits, const double *parts, totals to)
{
    __shared__ double share[LS_THREADS];
    const int lane = (int)threadIdx.x % LS_WARP, warp = (int)threadIdx.x / LS_WARP;
    const int64_t begin = to.of_first + to.of_second, n = begin + to.of_others;
    for (int64_t first = (int64_t)blockIdx.x * LS_WARP; first < n; first += (int64_t)gridDim.x * LS_WARP) {
        const int64_t i = first + lane;
        double sum = 0;
#pragma unroll 4
        for (int64_t part = warp; part < splits; part += WARPS) sum += i < n ? parts[part * n + i] : 0;
        share[threadIdx.x] = sum;
        __syncthreads();
        if (warp == 0 && i < n) {
            for (int j = 1; j < WARPS; j++) sum += share[j * LS_WARP + lane];
            *(i < to.of_first ? to.first + i
              : i < begin     ? to.second + (i - to.of_first)
                              : to.others + (i - begin)) = sum;
        }
        __syncthreads();
    }
}

static void sum_parts(ls_queue *q, int64_t splits, const double *parts, totals to)
{
    LS_LAUNCH(q, add_parts, ls_blocks(to.of_first + to.of_second + to.of_others, LS_WARP), LS_THREADS, 0, splits, parts,
              to);
}

/* ------------------------------------------------------------------------------------------------ reading */

/* Of rows whose slots are in several tiles: the maximum of their logits, 1 / Σ_r e^(λ - m), Σ_r p do·V. */
typedef struct row_sums {
    ls_real m[4], inverse[4], delta[4];
} row_sums;

typedef struct reading {
    operands o; /* X: q, Y: do */
    const ls_real *constant;
    ls_view dq;
    int fours;
    ls_real *rows; /* (B*H,n,3): row_sums */
    double *parts; /* (splits): dV, dk (B*H,R,d), dconstant (B*H,R) if wanted */
    int constants;
} reading;

/* A tile's logits and do·V join the sums; before the last has, `inverse` and `delta` are those of which it is made. */
template <int SLOTS>
__device__ static inline void join(const ls_real (&l)[4][SLOTS / 8], const ls_real (&dp)[4][SLOTS / 8], row_sums &sums)
{
    ls_real shrink[4];
    join_maxima<SLOTS>(l, sums.m, shrink);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        ls_real here = 0, product_here = 0;
#pragma unroll
        for (int j = 0; j < SLOTS / 8; j++) {
            const ls_real e = ls_exp(l[i][j] - sums.m[i]);
            here += e;
            product_here += e * dp[i][j];
        }
        sums.inverse[i] = sums.inverse[i] * shrink[i] + row_sum(here);
        sums.delta[i] = sums.delta[i] * shrink[i] + row_sum(product_here);
    }
}

template <int SLOTS, bool SUMS, bool ROWS>
static __global__ void __launch_bounds__(THREADS, desk<SLOTS>::BLOCKS_AT_ONCE) read_back(reading z)
{
    LS_SHARED(desk<SLOTS>, my);
    constexpr int EACH = SLOTS / 8;
    const ls_slot_sizes s = z.o.s;
    const path way(z.o, SUMS, SLOTS);
    const place at = way.at;
    const int64_t n = z.o.x.n, slots = s.B * s.H * s.R;
    double *part_v = z.parts + at.part * (slots * (2 * s.d + z.constants)), *part_k = part_v + slots * s.d;
    sums_of_rows<SLOTS> dv, dk;
    double column = 0;
    for (int64_t tile = way.tile; tile < way.last; tile++) {
        const int64_t t = tile * TILE;
        ls_real l[4][EACH], dp[4][EACH];
        row_sums sums;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t row = t + ROW + 16 * i;
            const bool given = SUMS && !ROWS && row < n;
            const ls_real *from = z.rows + (at.g * n + row) * 3;
            sums.m[i] = given ? from[0] : SUMS && !ROWS ? INFINITY : -INFINITY; /* of no row: p = 0 */
            sums.inverse[i] = given ? from[1] : 0;
            sums.delta[i] = given ? from[2] : 0;
        }
        for (int64_t slot = 0; !SUMS && slot < s.R; slot += SLOTS) {
            multiply<SLOTS>(z.o, at, t, slot, there{slot > 0, false}, false, my, l, dp);
            complete_logits<SLOTS>(s, at, z.constant, slot, l);
            join<SLOTS>(l, dp, sums);
        }
        for (int64_t slot = way.slot; slot < way.end; slot += SLOTS) {
            multiply<SLOTS>(z.o, at, t, slot, there{!SUMS, SUMS && tile > way.tile}, false, my, l, dp);
            complete_logits<SLOTS>(s, at, z.constant, slot, l);
            if (SUMS && ROWS) join<SLOTS>(l, dp, sums);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (ROWS && slot == way.slot) {
                    sums.inverse[i] = 1 / sums.inverse[i];
                    sums.delta[i] *= sums.inverse[i];
                }
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    l[i][j] = ls_exp(l[i][j] - sums.m[i]) * sums.inverse[i];
                    dp[i][j] = l[i][j] * (dp[i][j] - sums.delta[i]);
                }
            }
            if (SUMS) put_weight<SLOTS>(l, my->a);
            put_weight<SLOTS>(dp, my->b);
            __syncthreads();
            if (SUMS) {
                dv.add(s, at, my->a, my->y, part_v);
                dk.add(s, at, my->b, my->x, part_k);
                for (int i = 0; z.constants && threadIdx.x < SLOTS && i < TILE; i++)
                    column += (double)my->b[i * desk<SLOTS>::PITCH_W + threadIdx.x];
            }
            if (ROWS) give<SLOTS>(s, at, t, n, my->b, my->of_x, NULL, sums.m, slot > way.slot, z.dq, z.fours);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t row = t + ROW + 16 * i;
            ls_real *to = z.rows + (at.g * n + row) * 3;
            if (!SUMS && at.feature == 0 && SLOT == 0 && row < n)
                to[0] = sums.m[i], to[1] = sums.inverse[i], to[2] = sums.delta[i];
        }
    }
    if (SUMS) dv.end(s, at, part_v), dk.end(s, at, part_k);
    const int64_t slot = at.slot + threadIdx.x;
    if (SUMS && z.constants && threadIdx.x < SLOTS && slot < s.R && at.feature == 0)
        part_k[slots * s.d + at.g * s.R + slot] = column;
}

/* ------------------------------------------------------------------------------------------------ writing */

typedef struct writing {
    operands o; /* X: k, Y: v */
    ls_real half;
    const ls_real *sent, *got, *dsent, *constant;
    ls_view dk, dv;
    int fours_k, fours_v;
    double *parts; /* (splits): ds (B*H,R,d) */
} writing;

/* `owed`, constant_r of the thread's slots, becomes what ls_slots_constant_of makes of it for the keys of a tile, where
 * any slot's sum is small enough. l: e of the thread's rows and slots, from `slot` on, of which `left` exist; de: v·dx.
 * All threads of a block call, when nobody uses a of the desk. */
template <int SLOTS>
__device__ static inline void owe_exactly(const writing &z, const place &at, int64_t slot, int left,
                                          const ls_real (&l)[4][SLOTS / 8], const ls_real (&de)[4][SLOTS / 8],
                                          desk<SLOTS> *my, ls_real (&owed)[SLOTS / 8])
{
    constexpr int EACH = SLOTS / 8;
    const int warp = (int)threadIdx.x / LS_WARP;
    const int64_t stride = z.o.s.d + 2, first = (at.g * z.o.s.R + slot + SLOT) * stride;
    int few = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) few |= 8 * j < left && z.got[first + 8 * j * stride + 1] <= TILE;
    if (!__syncthreads_or(few)) return;
#pragma unroll 1
    for (int j = 0; j < EACH; j++) {
        ls_real sum[3] = {0, 0, 0}; /* Σ e, Σ e v·dx, Σ |e v·dx| */
#pragma unroll
        for (int k = 0; k < EACH; k++)
#pragma unroll
            for (int i = 0; i < 4 && k == j; i++) {
                const ls_real flow = l[i][k] * de[i][k];
                sum[0] += l[i][k], sum[1] += flow, sum[2] += flow < 0 ? -flow : flow;
            }
#pragma unroll
        for (int k = 0; k < 3; k++) {
            sum[k] = ls_warp_sum(ls_warp_sum(sum[k], 2, 1), 2, LS_WARP / 2); /* over the warp's rows */
            if (grid::row() == 0) my->a[(3 * warp + k) * SLOTS + SLOT + 8 * j] = sum[k];
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        if (8 * j >= left) continue;
        ls_real sum[3] = {0, 0, 0};
        for (int w = 0; w < THREADS / LS_WARP; w++)
            for (int k = 0; k < 3; k++) sum[k] += my->a[(3 * w + k) * SLOTS + SLOT + 8 * j];
        const int64_t e = first + 8 * j * stride;
        owed[j] = ls_slots_constant_of(z.sent + e, z.got + e, z.dsent + e, owed[j], sum[0], sum[1], sum[2]);
    }
    __syncthreads();
}

template <int SLOTS, bool SUMS, bool ROWS>
static __global__ void __launch_bounds__(THREADS, desk<SLOTS>::BLOCKS_AT_ONCE) write_back(writing z)
{
    LS_SHARED(desk<SLOTS>, my);
    constexpr int EACH = SLOTS / 8;
    const ls_slot_sizes s = z.o.s;
    const path way(z.o, SUMS, SLOTS);
    const place at = way.at;
    const int64_t n = z.o.x.n, stride = s.d + 2;
    double *part = z.parts + at.part * (s.B * s.H * s.R * s.d);
    sums_of_rows<SLOTS> ds;
    for (int64_t tile = way.tile; tile < way.last; tile++) {
        const int64_t t = tile * TILE;
        ls_real l[4][EACH], de[4][EACH], total[4];
        for (int64_t slot = way.slot; slot < way.end; slot += SLOTS) {
            multiply<SLOTS>(z.o, at, t, slot, there{!SUMS && slot > 0, SUMS && tile > way.tile}, z.half != 0, my, l,
                            de);
            const int left = (int)(s.R - slot) - SLOT;
            const ls_real *sent = z.sent + (at.g * s.R + slot + SLOT) * stride,
                          *constant = z.constant + at.g * s.R + slot + SLOT;
            ls_real m[EACH], owed[EACH]; /* of the thread's slots; m: -inf only where all keys here are padded */
#pragma unroll
            for (int j = 0; j < EACH; j++) {
                m[j] = 8 * j < left ? sent[8 * j * stride] : 0;
                owed[j] = 8 * j < left ? constant[8 * j] : 0;
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t row = t + ROW + 16 * i;
                const bool hidden = row >= n || ls_is_padded(z.o.x.pad, at.b * n + row);
                const ls_real length = z.half == 0 ? 0 : ls_multiply(z.half, my->norm[ROW + 16 * i]);
#pragma unroll
                for (int j = 0; j < EACH; j++) l[i][j] = hidden || 8 * j >= left ? 0 : ls_exp(l[i][j] - length - m[j]);
            }
            owe_exactly<SLOTS>(z, at, slot, left, l, de, my, owed);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                ls_real here = 0;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    de[i][j] = l[i][j] * (owed[j] + de[i][j]);
                    here += de[i][j];
                }
                total[i] = ROWS && z.half != 0 ? 2 * z.half * row_sum(here) : 0;
            }
            if (ROWS) put_weight<SLOTS>(l, my->a);
            put_weight<SLOTS>(de, my->b);
            __syncthreads();
            if (SUMS) ds.add(s, at, my->b, my->x, part);
            if (ROWS) {
                const bool more = slot > way.slot;
                give<SLOTS>(s, at, t, n, my->a, my->of_y, NULL, total, more, z.dv, z.fours_v);
                give<SLOTS>(s, at, t, n, my->b, my->of_x, z.half == 0 ? NULL : my->x, total, more, z.dk, z.fours_k);
            }
        }
    }
    if (SUMS) ds.end(s, at, part);
}

/* ------------------------------------------------------------------------------------------------ launches */

/* The kernels of a pass: for tiles of 16, 32 and 64 slots that hold all, and for several tiles. */
template <class Z> struct kernels {
    void (*whole[3])(Z), (*rows)(Z), (*sums)(Z);
};

template <int SLOTS, class Z> static void launch(ls_queue *q, void (*slots_backward)(Z), const Z &z)
{
    const int64_t blocks = z.o.s.B * z.o.s.H * z.o.splits * z.o.slot_tiles * z.o.feature_tiles;
    if (blocks > 0) LS_LAUNCH(q, slots_backward, (int)blocks, THREADS, sizeof(desk<SLOTS>), z);
}

template <class Z> static void launch_all(ls_queue *q, const kernels<Z> &k, Z z)
{
    const int64_t R = z.o.s.R, splits = z.o.splits;
    if (R <= 16) {
        launch<16>(q, k.whole[0], z);
    } else if (R <= 32) {
        launch<32>(q, k.whole[1], z);
    } else if (R <= 64 && ls_has_shared(q, sizeof(desk<64>))) {
        launch<64>(q, k.whole[2], z);
    } else {
        z.o.splits = parts_of(z.o.x.n, TILE);
        launch<MANY>(q, k.rows, z);
        z.o.splits = splits, z.o.slot_tiles = parts_of(R, MANY);
        launch<MANY>(q, k.sums, z);
    }
}

static operands operands_of(ls_slot_sizes s, ls_slot_rows x, const ls_real *of_x, ls_slot_rows y, const ls_real *of_y,
                            int64_t stride_y)
{
    return operands{s, x, y, {of_x, s.d}, {of_y, stride_y}, splits_of(s, x.n), 1, parts_of(s.d, WIDTH)};
}

int64_t ls_slots_row_reals(ls_slot_sizes s)
{
    return s.R <= MANY ? 0 : 3 * s.B * s.H;
}

void ls_slots_read_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                                 const ls_real *constant, const ls_real *values, ls_slot_rows dout, ls_real *rows,
                                 double *room, ls_view dq, double *dvalues, double *dslots, double *dconstant)
{
    static const kernels<reading> k = {
        {read_back<16, true, true>, read_back<32, true, true>, read_back<64, true, true>},
        read_back<MANY, false, true>,
        read_back<MANY, true, false>,
    };
    const reading z = {operands_of(s, queries, slots, dout, values, s.d),
                       constant,
                       dq,
                       ls_rows_are_fours(dq, s.d),
                       rows,
                       room,
                       dconstant != NULL};
    const int64_t n = s.B * s.H * s.R;
    if (n == 0) return;
    launch_all(q, k, z);
    sum_parts(q, z.o.splits, room, totals{dvalues, dslots, dconstant, n * s.d, n * s.d, z.constants * n});
}

void ls_slots_write_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                                  ls_slot_rows values, const ls_real *sent, const ls_real *got, const ls_real *dsent,
                                  const ls_real *constant, double *room, ls_view dk, ls_view dv, double *dslots)
{
    static const kernels<writing> k = {
        {write_back<16, true, true>, write_back<32, true, true>, write_back<64, true, true>},
        write_back<MANY, false, true>,
        write_back<MANY, true, false>,
    };
    const writing z = {operands_of(s, keys, slots, values, dsent + 2, s.d + 2),
                       (ls_real)half,
                       sent,
                       got,
                       dsent,
                       constant,
                       dk,
                       dv,
                       ls_rows_are_fours(dk, s.d),
                       ls_rows_are_fours(dv, s.d),
                       room};
    const int64_t n = s.B * s.H * s.R * s.d;
    if (n == 0) return;
    launch_all(q, k, z);
    sum_parts(q, z.o.splits, room, totals{dslots, NULL, NULL, n, 0, 0});
}
