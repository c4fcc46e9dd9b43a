/* Linear attention on a GPU: tiles, (SIDE,SIDE) numbers in shared memory, their products by a block of LS_THREADS, and
 * how rows and features come to them. Theory: linear_slabs.h.
 *
 * There are two kinds of numbers in tiles. `plain`: floats, multiplied as such. `tensor`, on a queue of precision bf16:
 * bfloat16, multiplied by tensor cores, see cuda_mma.h. Sums are floats; denominators and δ are summed in double, in
 * bf16 as floats. What a kernel does with sums it says for number (u, v) of a thread, which is that of row(u) and
 * column(v), so that it need not know the kind. */
#ifndef LS_LINEAR_TILES_H
#define LS_LINEAR_TILES_H

#include "linear_slabs.h"

#include <cuda_mma.h>

enum { SIDE = 64 };
/* Products of tiles a and b: a bᵀ, a b, aᵀ b. */
enum { ROWS_ROWS, ROWS_COLUMNS, COLUMNS_COLUMNS };

namespace ls_linear
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
 * side. So the threads of a warp read different banks. */
enum { ACROSS = 16 };
static_assert(ACROSS * ACROSS == LS_THREADS && ACROSS * 4 == SIDE, "each thread has 4 x 4 numbers of a product");
template <int FORM> struct sums<plain, FORM> {
    enum { U = 4, V = 4 };
    ls_real x[U][V];

    __device__ static inline int row(int u)
    {
        const int r = threadIdx.x / ACROSS;
        return FORM == COLUMNS_COLUMNS ? 4 * r + u : r + ACROSS * u;
    }
    __device__ static inline int column(int v)
    {
        const int c = threadIdx.x % ACROSS;
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

/* Rows [R, R + count) of the slab, at most SIDE of one chunk P, of which the first `exist` are the shard's. */
typedef struct strip {
    int64_t P, R;
    place at; /* of the first */
    int count, exist;
} strip;

static inline int64_t strips_of(const linear *x)
{
    return chunks_of(x) * ((x->s.C + SIDE - 1) / SIDE);
}

__device__ static inline strip strip_of(const linear &x, int64_t P, int u)
{
    strip y;
    y.P = P;
    y.R = P * x.s.C + u;
    y.at = place_of(x.s, y.R);
    y.count = least(SIDE, (int)x.s.C - u);
    y.exist = (int)ls_max(0, ls_min(y.count, x.s.rows - y.at.t));
    return y;
}

/* Strip number i of all. */
__device__ static inline strip strip_number(const linear &x, int64_t i)
{
    const int64_t each = (x.s.C + SIDE - 1) / SIDE, P = quotient(i, each);
    return strip_of(x, P, (int)(i - P * each) * SIDE);
}

__device__ static inline place place_in(const strip &y, int r)
{
    place at = y.at;
    at.u += r, at.t += r;
    return at;
}

__device__ static inline ls_real *row_in(const strip &y, ls_view v, int r)
{
    return ls_row(v, y.at.b, y.at.h, y.at.t + r);
}

/* N numbers from `from` on, those before the end of a row of n; aligned: they can be read at once. */
template <int N> __device__ static inline ls_few<N> read_some(const ls_real *from, int n, int aligned)
{
    ls_few<N> y = {};
    if (n >= N && aligned) return ls_few_at<N>(from);
    for (int k = 0; k < N && k < n; k++) y.v[k] = from[k];
    return y;
}
template <int N> __device__ static inline void write_some(const ls_few<N> &y, ls_real *to, int n, int aligned)
{
    if (n >= N && aligned) {
        *(ls_few<N> *)to = y;
        return;
    }
    for (int k = 0; k < N && k < n; k++) to[k] = y.v[k];
}

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

/* Row r of the strip, or its last one that exists, or, where none does, the shard's last: its memory may be read. */
__device__ static inline const ls_real *row_to_read(const linear &x, const strip &y, ls_view v, int r)
{
    return ls_row(v, y.at.b, y.at.h, ls_min(y.at.t, x.s.rows - 1)) + most(0, least(r, y.exist - 1)) * v.st;
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
};

/* A tile = numbers [e0, e0 + SIDE) of the strip's rows; 0 where there are none. */
template <class M>
__device__ static void load_rows(const linear &x, const strip &y, int e0, ls_view rows, const uint8_t *pad, int fours,
                                 typename M::number *to)
{
    typedef filling<SIDE> fill;
    const int left = x.d - e0 - fill::column(), e = left > 0 ? e0 + fill::column() : 0;
    const uint8_t *pads = pad == NULL ? NULL : pad + y.at.b * x.s.rows + y.at.t;
    ls_four z[fill::EACH];
    int there[fill::EACH];
#pragma unroll
    for (int n = 0; n < fill::EACH; n++) there[n] = fill::row(n) < y.exist && (pads == NULL || pads[fill::row(n)] == 0);
    read_fours<fill::EACH>(
        fours, [&](int n) { return row_to_read(x, y, rows, fill::row(n)) + e; },
        [&](int n) { return there[n] ? left : 0; }, z);
    fill::template tile<M>(z, whole<M>(x.d - e0), to);
}

/* A tile = features [f0, f0 + SIDE), numbers [e0, e0 + SIDE) of a state S (F,d); 0 where there are none. */
template <class M>
__device__ static void load_state(const linear &x, const ls_real *S, int f0, int e0, typename M::number *to)
{
    typedef filling<SIDE> fill;
    const int left = x.d - e0 - fill::column(), all = least(SIDE, x.F - f0);
    const ls_real *first = S + (int64_t)f0 * x.d + (left > 0 ? e0 + fill::column() : 0);
    ls_four z[fill::EACH];
    read_fours<fill::EACH>(
        x.d % 4 == 0, [&](int n) { return first + least(fill::row(n), all - 1) * x.d; },
        [&](int n) { return fill::row(n) < all ? left : 0; }, z);
    fill::template tile<M>(z, whole<M>(x.d - e0), to);
}

/* ------------------------------------------------------------------------------------------------ features */

/* Features of queries, or of keys, and how those that nobody has made are: by `act` of the rows. */
typedef struct features {
    const ls_real *made; /* (R,r), NULL: not made; those of keys may be exponents */
    ls_view rows, drows;
    ls_real *gradient; /* (R,r), of made ones */
    side at;
    int act, keys;
    int fours, dfours;    /* those of a row can be read, their gradients written by fours */
    level from;           /* keys: c that exponentials are seen from; queries: c of the state that they see */
    const ls_real *scale; /* (R) that features are multiplied by, NULL: 1 */
} features;

static inline int act_of_map(const ls_pass *p)
{
    return map_of(p)->act == NULL ? LS_LINEAR_MADE : map_of(p)->act(p);
}
/* from, scale: see features. */
static inline features queries_as_seen(const ls_pass *p, const linear *x, level from, const ls_real *scale)
{
    features y = {};
    y.act = act_of_map(p);
    y.made = x->a, y.gradient = x->da;
    y.rows = p->q, y.drows = p->dq;
    y.at = queries_of(p);
    y.fours = y.act == LS_LINEAR_MADE ? x->r % 4 == 0 : ls_rows_are_fours(p->q, x->d);
    y.dfours = ls_rows_are_fours(p->dq, x->d);
    y.from = from;
    y.scale = scale;
    return y;
}
static inline features keys_as_seen(const ls_pass *p, const linear *x, level from)
{
    features y = {};
    y.act = act_of_map(p);
    y.keys = 1;
    y.made = x->x, y.gradient = x->db;
    y.rows = p->own.k, y.drows = p->own.dk;
    y.at = keys_of(p);
    y.fours = y.act == LS_LINEAR_MADE ? x->r % 4 == 0 : ls_rows_are_fours(p->own.k, x->d);
    y.dfours = ls_rows_are_fours(p->own.dk, x->d);
    y.from = from;
    return y;
}

/* What each of the strip's rows makes of its features, in shared memory. */
typedef struct facts {
    ls_real by[SIDE];   /* scale; 0: the row is not there */
    ls_real past[SIDE]; /* queries: what exponentials are multiplied by; keys: what is taken from exponents */
    ls_real sine[SIDE], cosine[SIDE];
} facts;

/* To be waited for. What queries see: a state before them, keys of their own chunk from c at its end, or from their own
 * c. */
enum { PAST, NEAR_BY, ALONE };
__device__ static void find_facts(const linear &x, const features &f, const strip &y, int sees, facts *to)
{
    const int r = threadIdx.x;
    if (r >= SIDE) return;
    const place at = place_in(y, r);
    const int there = r < y.count && is_there(x.s, f.at.pad, at);
    angle turn = {0, 1};
    ls_real past = f.keys ? 0 : 1;
    if (there) {
        turn = angle_of(x, f.at, at.t);
        if (x.exponentials > 0 && f.from.p != NULL) {
            const ls_real c = level_of(f.from, x.s, at);
            if (f.keys)
                past = c == -INFINITY ? 0 : c;
            else if (sees == NEAR_BY)
                past = x.c[y.R + r] == -INFINITY ? 1 : ls_exp(c - x.c[y.R + r]);
            else if (sees == PAST)
                past = (ls_real)ls_linear_change(c, x.c[y.R + r]);
        }
    }
    to->by[r] = !there ? 0 : f.scale == NULL ? 1 : f.scale[y.R + r];
    to->past[r] = past;
    to->sine[r] = turn.sine;
    to->cosine[r] = turn.cosine;
}

/* Feature f of row i, as it was made, and before it is turned. */
__device__ static inline ls_real feature_of(const linear &x, const features &y, const facts &of, int i, int f,
                                            ls_real raw)
{
    if (f >= x.exponentials) return of.by[i] * raw;
    /* above 0 are only keys that nobody sees */
    if (y.keys) return ls_exp(raw - of.past[i] > 0 ? 0 : raw - of.past[i]);
    return of.by[i] * of.past[i] * raw;
}

/* N times four features, from f(n) on, of the strip's rows row(n), as they were made; 0 where there are none. */
template <int N, typename R, typename F>
__device__ static inline void read_features(const linear &x, const features &y, const strip &s, const facts &of, R row,
                                            F f, ls_four (&z)[N])
{
    const int made = y.act == LS_LINEAR_MADE;
    const ls_real *first = made ? y.made + s.R * x.r : row_to_read(x, s, y.rows, 0);
    const int64_t step = made ? x.r : y.rows.st;
    const int last = most(0, s.exist - 1);
    read_fours<N>(
        y.fours, [&](int n) { return first + least(row(n), last) * step + (f(n) < x.r ? f(n) : 0); },
        [&](int n) { return of.by[row(n)] != 0 ? x.r - f(n) : 0; }, z);
    const auto activate = [&](int act) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                z[n].v[k] = k < x.r - f(n) && of.by[row(n)] != 0 ? ls_linear_act(act, z[n].v[k]) : 0;
    };
    if (y.act == LS_LINEAR_RELU) activate(LS_LINEAR_RELU);
    if (y.act == LS_LINEAR_ONE_PLUS_ELU) activate(LS_LINEAR_ONE_PLUS_ELU);
}

/* The features of load_features, which has a choice of widths: of what is narrow threads would find nothing. */
template <class M, int W>
__device__ static inline void load_some_features(const linear &x, const features &y, const strip &s, const facts &of,
                                                 int f0, int turned, typename M::number *to)
{
    typedef filling<W> fill;
    const int turns = turned && x.turns, all = turned ? x.F : x.r;
    const int f = f0 + fill::column(), mine = turns && f >= x.r ? f - x.r : f;
    ls_four z[fill::EACH];
    if (!turns || x.r % 4 == 0) { /* no four has sines and cosines */
        read_features<fill::EACH>(
            x, y, s, of, fill::row, [&](int) { return f < all ? mine : x.r; }, z);
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            ls_four one[fill::EACH];
            const int g = f + k >= all ? x.r : f + k < x.r ? f + k : f + k - x.r;
            read_features<fill::EACH>(
                x, y, s, of, fill::row, [&](int) { return g; }, one);
#pragma unroll
            for (int n = 0; n < fill::EACH; n++) z[n].v[k] = one[n].v[0];
        }
    }
    const int exponentials = x.exponentials - f; /* of the four; what turns has none */
#pragma unroll
    for (int n = 0; n < fill::EACH; n++) {
        const int r = fill::row(n);
        const ls_real by = of.by[r], past = of.past[r];
#pragma unroll
        for (int k = 0; k < 4 && x.exponentials > 0; k++) {
            ls_real e = past * z[n].v[k];
            if (y.keys)
                e = ls_exp(z[n].v[k] > past ? 0 : z[n].v[k] - past); /* above c are only keys that nobody sees */
            if (k < exponentials) z[n].v[k] = e;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            z[n].v[k] *= by;
            if (turns) z[n].v[k] *= f + k < x.r ? of.sine[r] : of.cosine[r];
        }
    }
    fill::template tile<M>(z, whole<M>(all - f0), to);
}

/* A tile = features [f0, f0 + SIDE) of the strip's rows; turned: of F, otherwise of r. */
template <class M>
__device__ static void load_features(const linear &x, const features &y, const strip &s, const facts &of, int f0,
                                     int turned, typename M::number *to)
{
    if ((turned ? x.F : x.r) - f0 > SIDE / 2)
        load_some_features<M, SIDE>(x, y, s, of, f0, turned, to);
    else
        load_some_features<M, SIDE / 2>(x, y, s, of, f0, turned, to);
}

/* Gradients of features [f, f + N) of row i, as they were made, 0 where the row is not there: to `gradient`; those that
 * nobody has made go on to the row, and are added to it where `add` is not 0. */
template <int N>
__device__ static inline void put_gradients(const linear &x, const features &y, const strip &s, const facts &of, int i,
                                            int f, int add, ls_few<N> g)
{
    if (f >= x.r || i >= s.count) return;
    const int there = of.by[i] != 0;
    if (y.act == LS_LINEAR_MADE) {
        for (int k = 0; k < N && !there; k++) g.v[k] = 0;
        write_some<N>(g, y.gradient + (s.R + i) * x.r + f, x.r - f, x.r % 4 == 0);
        return;
    }
    if (s.at.t + i >= x.s.rows) return;
    ls_real *to = row_in(s, y.drows, i) + f;
    ls_few<N> z = {};
    if (there) z = read_some<N>(row_in(s, y.rows, i) + f, x.r - f, y.fours);
    for (int k = 0; k < N; k++) g.v[k] = there ? ls_linear_act_backward(y.act, z.v[k], g.v[k]) : 0;
    if (add) z = read_some<N>(to, x.r - f, y.dfours);
    for (int k = 0; k < N && add; k++) g.v[k] += z.v[k];
    write_some<N>(g, to, x.r - f, y.dfours);
}
} // namespace ls_linear

#endif
