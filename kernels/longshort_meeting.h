/* Longshort on a GPU: how a tile of 64 queries of one head meets guests, 64 at a time or fewer. Formulas are in
 * longshort_attend.c.
 *
 *   FAR    vectors; in CS those of the chunks before a query's own
 *   NEARBY rows of the halo; each query sees those of its window
 * In CS a logit has a term for the distance of the pair besides, that of the query with a row of a table: R_chunk for
 * vectors, R_win for keys. Guest g of query r is at distance shift_r - g from the first row of a window of the table.
 * So queries are multiplied by 64 rows of the table at a time, and each pair fetches its number from the product; and
 * gradients of logits, written to where those numbers came from, are weights of the table's rows. Queries of a tile are
 * of several chunks: there are as many fewer vectors in a tile of guests as the newest that they see lie apart, so that
 * one product has all distances.
 *
 * What r_w and r_r add to a logit, r_w·k_j and r_r·R_win(δ), is a number of the key and one of the distance, in floats:
 * in bf16, q + r_w would be rounded otherwise than q, with which the vectors of the same softmax are weighed. Backward,
 * with s the sum of dscore over the queries of a key, or of a distance, dk += s r_w, dr_w += s k; dR += s r_r,
 * dr_r += s R. */
#ifndef LS_LONGSHORT_MEETING_H
#define LS_LONGSHORT_MEETING_H

#include "longshort_cuda.h"
#include "tiles_cuda.h"

using namespace ls_tiles;

enum { FAR, NEARBY };
/* Tiles of operands, and what may be in them. */
enum { QUERY, OUT, GUEST, TILES };
enum { Q, DOUT, KEY, VALUE, TABLE };
/* What queries bring besides: nothing, what makes their probabilities, and δ, too. */
enum { PLAIN, WITH_STATISTICS, WITH_DELTA };
/* So many threads side by side share a row of a tile: see row_shared, part_shared. */
enum { SHARERS = (int)LS_THREADS / SIDE };

/* What kernels know of a call. Queries: T rows of each (b,h), from position first. Near keys: n rows from position lo.
 * N: far vectors that the last query sees; 0 where there are none, as in a step, which has `start`: the softmax over
 * all that is far. Of them `vectors` are in a tile. */
namespace
{
typedef struct scene {
    int causal, d, vectors;
    int64_t B, H, T, first, w, c, r, N, D, n, lo, item;
    ls_real scale;
    ls_view q, dout;
    const uint8_t *pad_q, *pad;                        /* (B,T), (B,n) */
    const ls_real *near_k, *near_v;                    /* (B,n,H,d) */
    const ls_real *items, *start;                      /* (N / r,B,item); (B,H,2+d) */
    const ls_real *far_table, *near_table, *r_w, *r_r; /* (H,N,d), (H,D,d), (H,d); NULL: none */
    const ls_real *near_terms;                         /* (H,D) r_r·R_win */
    ls_real *top, *inverse, *delta;                    /* by query */
} scene;
} // namespace

LS_BOTH_SIDES int64_t tiles_in(int64_t n, int64_t rows)
{
    return (n + rows - 1) / rows;
}

static __device__ inline int64_t far_seen(const scene &x, int64_t i)
{
    return x.causal && x.N > 0 ? i / x.c * x.r : x.N;
}

namespace
{
/* In shared memory, what rows and columns of a tile of pairs are. Query r sees guests [from, to) but those that are not
 * there; rows that are not are NULL. term: of each guest, r_w·k. sum: of each guest, or row of the table, of dscore. */
typedef struct seats {
    int from[SIDE], to[SIDE], shift[SIDE];
    const ls_real *q[SIDE], *dout[SIDE], *key[SIDE];
    ls_real top[SIDE], inverse[SIDE], delta[SIDE], term[SIDE], sum[SIDE];
} seats;

/* A tile of queries of one (b,h) and a tile of guests: what all threads of a block know. */
template <class M> struct meeting {
    typedef typename M::number number;
    typedef typename M::sum sum;
    typedef sums<M, ROWS_ROWS> pairs;
    enum { PITCH = SIDE + 4 }; /* of numbers, as sums, that threads hand over to one another */

    const scene &x;
    seats &s;
    void *memory; /* TILES tiles of operands; then one of weights, or numbers that are handed over */
    int64_t b, h, t;
    int n; /* queries [t, t + n) */
    int kind, count;
    int64_t first, window; /* guests [first, first + count): vectors, or rows of the halo; rows of the table */
    int reach;             /* the last row of the window that a pair needs */
    int64_t to_value;      /* from a guest's key to its value */
    int held[TILES];

    __device__ inline meeting(const scene &of, seats &shared, void *tiles) : x(of), s(shared), memory(tiles) {}
    __device__ inline number *tile(int slot)
    {
        return tile_number<M>(memory, slot);
    }
    __device__ inline sum *handed()
    {
        return (sum *)tile(TILES);
    }

    /* Queries [t, t + n) of (b,h) g. May be called once all have read who was there before. */
    __device__ inline void seat_queries(int64_t g, int64_t from, int queries, int with)
    {
        const int r = threadIdx.x;
        b = g / x.H, h = g % x.H, t = from, n = queries;
        held[QUERY] = held[OUT] = -1;
        if (r >= SIDE) return;
        const int there = r < n && !ls_is_padded(x.pad_q, b * x.T + t + r);
        const int64_t row = g * x.T + t + r;
        s.q[r] = there ? ls_row(x.q, b, h, t + r) : NULL;
        if (with == PLAIN) return;
        s.dout[r] = there ? ls_row(x.dout, b, h, t + r) : NULL;
        s.top[r] = there ? x.top[row] : 0;
        s.inverse[r] = there ? x.inverse[row] : 0;
        if (with == WITH_DELTA) s.delta[r] = there ? x.delta[row] : 0;
    }

    /* The guests of a kind that some query sees, and those of a tile. */
    __device__ inline ls_span guests_of(int which) const
    {
        const int64_t last = x.first + t + n - 1;
        if (which == FAR) return ls_span{0, 0, far_seen(x, last)};
        const int64_t lo = ls_max(0, ls_longshort_window(x.causal, x.w, x.first + t).lo - x.lo);
        const ls_span z = ls_longshort_window(x.causal, x.w, last);
        return ls_span{0, lo, ls_max(0, ls_min(z.lo + z.n - x.lo, x.n) - lo)};
    }
    /* Each tile of guests of a kind in turn. */
    template <typename F> __device__ inline void meet(int which, F act)
    {
        const ls_span guests = guests_of(which);
        for (int64_t i = 0; i < guests.n; i += step_of(which)) {
            seat_guests(which, guests.lo + i, (int)ls_min(step_of(which), guests.n - i));
            act();
        }
    }
    __device__ inline int step_of(int which) const
    {
        return which == FAR ? x.vectors : SIDE;
    }

    /* The table's row for row r of the queries with guest 0 of a kind, and those before for guests after it. */
    __device__ inline int64_t row_of_table(int which, int r) const
    {
        const int64_t i = x.first + t + r;
        return which == FAR ? far_seen(x, i) - 1 : i - x.lo;
    }
    /* Of the guests of a kind those for which some query has one of rows [row, row + rows) of the table. */
    __device__ inline ls_span guests_at(int which, int64_t row, int rows) const
    {
        const ls_span all = guests_of(which);
        const int64_t lo = ls_max(all.lo, row_of_table(which, 0) - (row + rows - 1));
        return ls_span{0, lo, ls_max(0, ls_min(all.lo + all.n, row_of_table(which, n - 1) - row + 1) - lo)};
    }

    /* Guests [from, from + number); the window is that of all pairs' rows of the table. */
    __device__ inline void seat_guests(int which, int64_t from, int number_of)
    {
        kind = which, first = from, count = number_of;
        window = row_of_table(kind, 0) - first - (count - 1);
        reach = (int)(row_of_table(kind, n - 1) - first - window);
        seat();
    }
    /* The window is [row, row + rows) of the table. */
    __device__ inline void seat_guests_at(int which, int64_t from, int number_of, int64_t row, int rows)
    {
        kind = which, first = from, count = number_of, window = row, reach = rows - 1;
        seat();
    }

    /* Scores of all pairs; those that do not see each other have any. */
    __device__ inline void score(pairs &z)
    {
        const int near = x.causal && kind == NEARBY;
        z.clear();
        for (int e = 0; e < x.d; e += SIDE) multiply(z, QUERY, Q, KEY, 0, e);
        for (int v = 0; near && v < pairs::V; v++)
            for (int u = 0; u < pairs::U; u++) z.at(u, v) += (sum)s.term[pairs::column(v)];
        for (int half = 0; x.causal && half <= reach; half += SIDE) {
            if (!has_rows(half)) continue;
            pairs terms;
            terms.clear();
            for (int e = 0; e < x.d; e += SIDE) multiply(terms, QUERY, Q, TABLE, half, e);
            for (int v = 0; near && v < pairs::V; v++) {
                const int64_t row = window + half + pairs::column(v);
                const sum term = row >= 0 && row < x.D ? (sum)x.near_terms[h * x.D + row] : 0;
                for (int u = 0; u < pairs::U; u++) terms.at(u, v) += term;
            }
            hand_over(terms);
            for (int u = 0; u < pairs::U; u++) {
                const int r = pairs::row(u), shift = s.shift[r] - half;
                for (int v = 0; v < pairs::V; v++) {
                    const int row = shift - pairs::column(v);
                    if (row >= 0 && row < SIDE) z.at(u, v) += handed()[r * PITCH + row];
                }
            }
        }
    }

    /* P from scores, and dP. */
    __device__ inline void weigh(pairs &z, pairs &gain)
    {
        gain.clear();
        for (int e = 0; e < x.d; e += SIDE) multiply(gain, OUT, DOUT, VALUE, 0, e);
        for (int u = 0; u < pairs::U; u++) {
            const int r = pairs::row(u);
            for (int v = 0; v < pairs::V; v++)
                z.at(u, v) = sees(r, pairs::column(v)) ? (sum)(ls_exp(z.at(u, v) - s.top[r]) * s.inverse[r]) : 0;
        }
    }
    /* P becomes dscore = P (dP - δ). */
    __device__ inline void differentiate(pairs &z, pairs &gain)
    {
        for (int u = 0; u < pairs::U; u++)
            for (int v = 0; v < pairs::V; v++) z.at(u, v) *= (sum)(gain.at(u, v) - s.delta[pairs::row(u)]);
    }

    __device__ inline int sees(int r, int guest) const
    {
        return guest >= s.from[r] && guest < s.to[r] && s.key[guest] != NULL;
    }

    /* Whether the table has any of rows [half, half + SIDE) of the window that pairs need. */
    __device__ inline int has_rows(int half) const
    {
        const int64_t row = window + half, rows = kind == FAR ? x.N : x.D;
        return row < rows && row + ls_min(SIDE, reach + 1 - half) > 0;
    }

    /* Numbers of pairs, or sums, become known to all, as (SIDE,PITCH). */
    template <class S> __device__ inline void hand_over(S &z)
    {
        __syncthreads();
        for (int u = 0; u < S::U; u++)
            for (int v = 0; v < S::V; v++) handed()[S::row(u) * PITCH + S::column(v)] = z.at(u, v);
        __syncthreads();
    }

    /* This thread's part of Σ over queries, of pairs with its guest, or with its row of the window. */
    __device__ inline sum guest_sum(pairs &z)
    {
        sum y = 0;
        hand_over(z);
        for (int r = part_shared(); r < n; r += SHARERS) y += handed()[r * PITCH + row_shared()];
        return y;
    }
    __device__ inline sum distance_sum(pairs &z)
    {
        sum y = 0;
        hand_over(z);
        for (int r = part_shared(); r < n; r += SHARERS) {
            const int guest = s.shift[r] - row_shared();
            if (guest >= 0 && guest < count) y += handed()[r * PITCH + guest];
        }
        return y;
    }
    /* From all parts, which become known to all: z, columns [e, e + SIDE), += sum · more; and share (d), too,
     * = Σ sum · row(i) of so many rows. */
    template <typename P>
    __device__ inline void add_shared(sums<M, COLUMNS_COLUMNS> &z, sum part, const ls_real *more, int rows, P row,
                                      int e, ls_real *share)
    {
        typedef sums<M, COLUMNS_COLUMNS> all;
        const int column = e + (int)threadIdx.x;
        part = ls_warp_sum(part, SHARERS);
        if (part_shared() == 0) s.sum[row_shared()] = (ls_real)part;
        __syncthreads();
        for (int v = 0; v < all::V; v++) {
            const int at = e + all::column(v);
            for (int u = 0; u < all::U && at < x.d; u++) z.at(u, v) += (sum)(s.sum[all::row(u)] * more[at]);
        }
        if (threadIdx.x >= SIDE || column >= x.d) return;
        double y = 0;
        for (int i = 0; i < rows; i++)
            if (s.sum[i] != 0) y += (double)(s.sum[i] * row(i)[column]); /* what is padded may be anything */
        share[column] = (ls_real)y;
    }

    /* Weights of pairs, rounded as operands are; the product that follows waits for them. */
    __device__ inline void set_weights(pairs &z)
    {
        __syncthreads();
        for (int u = 0; u < pairs::U; u++)
            for (int v = 0; v < pairs::V; v++)
                write_number(z.at(u, v), tile(TILES) + pairs::row(u) * M::PITCH + pairs::column(v));
    }
    /* The same numbers as weights of rows [half, half + SIDE) of the window. */
    __device__ inline void set_table_weights(pairs &z, int half)
    {
        const int rows = least(SIDE, reach + 1 - half);
        __syncthreads();
        for (int i = threadIdx.x; i < SIDE * M::PITCH; i += LS_THREADS) write_number((ls_real)0, tile(TILES) + i);
        __syncthreads();
        for (int u = 0; u < pairs::U; u++) {
            const int r = pairs::row(u), shift = s.shift[r] - half;
            for (int v = 0; v < pairs::V; v++) {
                const int row = shift - pairs::column(v);
                if (row >= 0 && row < rows) write_number(z.at(u, v), tile(TILES) + r * M::PITCH + row);
            }
        }
    }

    /* z += weights · columns [e, e + SIDE) of guests, or of the table's rows. */
    __device__ inline void gather(sums<M, ROWS_COLUMNS> &z, int source, int half, int e)
    {
        __syncthreads();
        bring(GUEST, source, half, e);
        __syncthreads();
        z.add(whole<M>(source == TABLE ? SIDE : count), tile(TILES), tile(GUEST));
    }
    /* z += weightsᵀ · columns [e, e + SIDE) of queries. */
    __device__ inline void give(sums<M, COLUMNS_COLUMNS> &z, int slot, int source, int e)
    {
        __syncthreads();
        bring(slot, source, 0, e);
        __syncthreads();
        z.add(whole<M>(n), tile(TILES), tile(slot));
    }

    static __device__ inline int row_shared()
    {
        return (int)threadIdx.x / SHARERS;
    }
    static __device__ inline int part_shared()
    {
        return (int)threadIdx.x % SHARERS;
    }

  private:
    /* Guest i of a tile, NULL if it is not there. */
    __device__ inline const ls_real *key_of(int i) const
    {
        const int64_t g = first + i;
        if (i >= count) return NULL;
        if (kind == NEARBY) return ls_is_padded(x.pad, b * x.n + g) ? NULL : x.near_k + ((b * x.n + g) * x.H + h) * x.d;
        const ls_real *item = x.items + (g / x.r * x.B + b) * x.item;
        return item[x.item - 1] != 0 ? item + (g % x.r * x.H + h) * x.d : NULL; /* its tokens are not all padded */
    }

    __device__ inline void seat()
    {
        const int i = threadIdx.x, guest = row_shared();
        held[GUEST] = -1;
        to_value = kind == FAR ? x.r * x.H * x.d : x.near_v - x.near_k;
        const ls_real *key = key_of(guest), *more = kind == NEARBY && key != NULL ? x.r_w : NULL;
        ls_real term = 0;
        for (int e = part_shared(); more != NULL && e < x.d; e += SHARERS) term += more[h * x.d + e] * key[e];
        term = ls_warp_sum(term, SHARERS);
        __syncthreads(); /* of the guests before nobody reads any more */
        if (part_shared() == 0) s.key[guest] = key, s.term[guest] = term;
        if (i >= SIDE) return;
        const ls_span far = {0, 0, far_seen(x, x.first + t + i)};
        ls_span z = kind == FAR ? far : ls_longshort_window(x.causal, x.w, x.first + t + i);
        if (kind == NEARBY) z.lo -= x.lo;
        s.shift[i] = (int)ls_max(INT32_MIN / 2, ls_min(INT32_MAX / 2, row_of_table(kind, i) - first - window));
        s.from[i] = (int)ls_max(0, ls_min(count, z.lo - first));
        s.to[i] = s.q[i] == NULL ? 0 : (int)ls_max(0, ls_min(count, z.lo + z.n - first));
    }

    /* A tile = what the source has, unless it is there; between two barriers. half: of a table. */
    __device__ inline void bring(int slot, int source, int half, int e)
    {
        const int id = (source * 4096 + half / SIDE) * 4096 + e / SIDE;
        int is_there = 0;
#pragma unroll
        for (int k = 0; k < TILES; k++) /* an array of registers has no index */
            if (k == slot) is_there = held[k] == id, held[k] = id;
        if (is_there) return;
        const ls_real *const *rows = source == Q ? s.q : source == DOUT ? s.dout : s.key;
        const ls_real *table = kind == FAR ? x.far_table : x.near_table;
        const int64_t size = kind == FAR ? x.N : x.D, row = window + half, beside = source == VALUE ? to_value : 0;
        if (source == TABLE) table += (h * size + row) * x.d;
        load_tile<M>(
            [&](int i) -> const ls_real * {
                if (source == TABLE) return row + i >= 0 && row + i < size ? table + i * x.d : NULL;
                return rows[i] != NULL ? rows[i] + beside : NULL;
            },
            x.d, e, source == Q ? x.scale : 1, tile(slot));
    }

    /* z += columns [e, e + SIDE) of queries · those of guests, or of the table's rows. */
    __device__ inline void multiply(pairs &z, int slot, int queries, int guests, int half, int e)
    {
        __syncthreads();
        bring(slot, queries, 0, e);
        bring(GUEST, guests, half, e);
        __syncthreads();
        z.add(whole<M>(x.d - e), tile(slot), tile(GUEST));
    }
};
} // namespace

/* What a meeting has of shared memory. */
template <class M> static size_t bytes_of()
{
    const size_t weights = tiles_bytes<M>(1), handed = SIDE * (size_t)meeting<M>::PITCH * sizeof(typename M::sum);
    return tiles_bytes<M>(TILES) + (weights > handed ? weights : handed);
}

/* A sum's numbers to rows [0, rows), columns [e, d), of to(row). */
template <class S, typename P> __device__ static inline void write_sums(S &z, int rows, int e, int d, P to)
{
    for (int u = 0; u < S::U; u++)
        for (int v = 0; v < S::V; v++)
            if (S::row(u) < rows && e + S::column(v) < d) to(S::row(u))[e + S::column(v)] = z.at(u, v);
}

#endif
