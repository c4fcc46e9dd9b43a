/* Linear attention by feature maps on a GPU: the phases of linear.c, its formulas and what it sums in double. Here is
 * what its files share, and nobody else: linear.cu has the phases for all keys, linear_causal.cu those that are causal,
 * linear_pairs.cu those for few keys; linear_attend.cu and linear_states.cu their kernels, of tiles as linear_tiles.h
 * has them; linear_slabs.cu the memory.
 *
 * How the work is divided. Rows are cut into chunks of C (256; where queries see keys one by one 64), and some chunks
 * of all heads and batch rows, 65536 to 262144 rows together, make a slab: memory does not grow with the sequence, a
 * slab is work enough for all of the GPU, and what it reads twice is still in the second cache. Slabs go one after the
 * other and hand on the state in double. In a slab features lie as (H,B,K,C,r): the chunks of one (b,h) side by side,
 * all rows of a head side by side; features that are made number by number lie nowhere: who needs them makes them. q,
 * k, v and their gradients are read and written where they lie. Features are turned on their way to a tile.
 *
 *   states of chunks: sums S = Bᵀ v, z = Σ B, a block for each, then a scan over the K chunks, in double, a thread for
 *   each number: a chunk finds the sum of the chunks before it (in backward: after it) where its own sum was
 *   all keys: a strip of 64 rows at a time meets the S of its (b,h) by way of shared memory
 *   causal: likewise the S of its chunk, which is a strip, after its own keys
 *   few keys: products of rows that are copied side by side, by cuBLAS
 *
 * Exponentials, c_i the maximum so far. A chunk's sum is seen from c at its end, and the scan takes it from c to c. A
 * query sees the state before its chunk through e^(c_before - c_i) <= 1. Within a chunk it sees keys from c at the end,
 * and makes up for it by e^(c_end - c_i), as long as c rises by at most RISE. Where it rises more (often the first
 * chunk of a sequence, hardly any later) it sees them pair by pair, with e^(x_j - c_i) as it is.
 */
#ifndef LS_LINEAR_SLABS_H
#define LS_LINEAR_SLABS_H

#include "linear_cuda.h"

enum { ROWS = 256, CAUSAL_ROWS = LS_LINEAR_CAUSAL_ROWS, SHORT = LS_LINEAR_SHORT };
enum { QUERIES, KEYS, BESIDE, STAGE, WEIGHTS, STATES, DOUBLES, TRACE, ALL_KEYS, ALL_WORK }; /* work[] */
static_assert((int)ALL_WORK <= (int)LS_LINEAR_WORK, "work[] of linear attention overlaps that of its mechanism");
static_assert((int)SHORT <= (int)CAUSAL_ROWS, "a short sequence of keys is one chunk");

/* ------------------------------------------------------------------------------------------------ slabs */

namespace ls_linear /* other files have types of these names, too */
{
/* Rows of a shard: N chunks of C rows, K of them in a slab. */
typedef struct cut {
    int64_t C, N, K;
} cut;

/* Queries or keys: pad (B,rows) or NULL; where things turn, sin ωi and cos ωi of global positions i, from that of the
 * first row on, (angles_of(rows),2). */
typedef struct side {
    const uint8_t *pad;
    const double *angle;
} side;

/* c of chunks: that of chunk k of g is p[g each_g + k each_k]; p NULL: none. */
typedef struct level {
    const ls_real *p;
    int64_t each_g, each_k;
} level;

/* All that kernels need, by value. P chunks in the slab, R = P C rows. */
typedef struct linear {
    slab s;
    int r, F, d, exponentials; /* numbers within a tile are ints: of 64 bits each step is two */
    int turns;
    double floor;
    /* M queries of a problem; few keys: the first has its n keys at `relative`, relative - 1, ... from itself */
    int64_t M, n, relative;
    int causal;
    ls_real *v, *dout, *out;  /* (R,d), few keys; in backward out holds dv */
    ls_real *a, *da, *x, *db; /* (R,r), those that are made: features of queries, features or exponents of keys */
    ls_real *b, *a_near; /* few keys, (R,r): e^(x - c), and a as it sees them; x and a where they are no exponents */
    ls_real *dA;         /* (R,pitch), where it does not fit in shared memory; otherwise NULL */
    ls_real *w, *dw;     /* (R,n) of few keys */
    ls_real *S, *z, *all_S, *all_z; /* (P,F,d), (P,F); (G,F,d), (G,F) */
    double *running, *step;         /* (G, F (d+1)); (CAUSAL_ROWS,2) sin jω, cos jω */
    const double *stand;            /* few keys, (M,2): sin, cos of ω(relative + i) */
    ls_real *top, *flows;           /* (R) */
    ls_real *c, *inverse, *delta;   /* (R) of this slab, in backward of all slabs one after the other */
    ls_real *all_c, *all_inverse, *all_delta;
    ls_real *start; /* (G,N+1) c before each chunk, and at the end */
    int64_t each_start;
} linear;

/* Numbers of chunks (G,K,n), the first `scaled` of each seen from c. */
typedef struct numbers {
    ls_real *x;
    int64_t n, scaled;
} numbers;

/* sin, cos of ω times a position. */
typedef struct angle {
    ls_real sine, cosine;
} angle;

/* Hands out a buffer of work[]. */
typedef struct purse {
    ls_real *at;
} purse;
} // namespace ls_linear
using namespace ls_linear;

static const level nowhere = {NULL, 0, 0};
enum { KEEPS = 1, REVERSED = 2 }; /* how ls_linear_scan goes */

static inline const ls_feature_map_cuda *map_of(const ls_pass *p)
{
    return ((const ls_feature_map *)p->kit)->cuda;
}

static inline ls_real *give(purse *from, int64_t reals)
{
    ls_real *x = from->at;
    from->at += reals;
    return x;
}

static inline int64_t chunks_of(const linear *x)
{
    return x->s.H * x->s.B * x->s.K;
}

/* Angles of so many rows, those past the end in the last chunk among them, and of the position after. */
static inline int64_t angles_of(const ls_pass *p, int64_t rows)
{
    return ((const ls_feature_map *)p->kit)->turn != NULL ? rows + ROWS + 1 : 0;
}

/* DOUBLES: step, angles of queries and of keys, running. */
static inline side queries_of(const ls_pass *p)
{
    side q = {p->pad_q, (const double *)(const void *)p->work[DOUBLES] + 2 * CAUSAL_ROWS};
    return q;
}

static inline side keys_of(const ls_pass *p)
{
    side k = {p->own.pad, queries_of(p).angle + 2 * angles_of(p, p->T)};
    return k;
}

/* c before the chunks of the slab, and at their ends. */
static inline level before_chunks(const linear *x)
{
    level c = {x->start + x->s.first / x->s.C, x->each_start, 1};
    return c;
}

static inline level after_chunks(const linear *x)
{
    level c = before_chunks(x);
    c.p++;
    return c;
}

/* ------------------------------------------------------------------------------------------------ rows */

__device__ static inline ls_real level_of(level c, const slab &s, place at)
{
    return c.p[at.g * c.each_g + at.u / s.C * c.each_k];
}

/* sin ω(i+1), cos ω(i+1) of row t, at global position i. */
__device__ static inline angle angle_of(const linear &x, const side &s, int64_t t)
{
    angle y = {0, 1};
    if (!x.turns) return y;
    y.sine = (ls_real)s.angle[2 * (t + 1)];
    y.cosine = (ls_real)s.angle[2 * (t + 1) + 1];
    return y;
}

/* c at the end of problem i. */
__device__ static inline ls_real end_of(const linear &x, int64_t i, level end)
{
    return level_of(end, x.s, place_of(x.s, i * x.M + x.M - 1));
}

/* Does c rise too much in problem number i for its keys to be seen from c at its end? Without exponentials there is no
 * c. */
__device__ static inline int is_steep(const linear &x, int64_t i, level end)
{
    return x.exponentials > 0 &&
           end_of(x, i, end) - x.c[i * x.M] > (ls_real)LS_LINEAR_RISE; /* also from -inf on, not if all is -inf */
}

/* The exponentials of a key row seen from c, or its other features. */
__device__ static inline ls_real seen_from(const linear &x, int64_t row, int64_t f, ls_real c)
{
    const ls_real from = c == -INFINITY ? 0 : c;
    return f < x.exponentials ? ls_exp(x.x[row * x.r + f] - from) : x.x[row * x.r + f];
}

/* A kernel that takes x and goes by rows of the slab. */
#define LAUNCH_ROWS(p, kernel, x, ...)                                                                                 \
    LS_LAUNCH((p)->queue, kernel, ls_row_blocks(chunks_of(&(x)) * (x).s.C), LS_THREADS, 0, x __VA_OPT__(, ) __VA_ARGS__)

/* ------------------------------------------------------------------------------------------------ linear_slabs.cu */

cut ls_linear_cut_rows(const ls_pass *p, int64_t rows, int64_t most);
int64_t ls_linear_most_chunks(const ls_pass *p, int64_t rows); /* of a slab */
linear ls_linear_begin(ls_pass *p);
/* The slab that begins with chunk k. */
void ls_linear_go_to(const ls_pass *p, linear *x, cut c, int64_t rows, int64_t k);
/* Features, where the mechanism makes them, and their way back to rows. add: dk +=. */
void ls_linear_make_queries(ls_pass *p, const linear *x);
void ls_linear_make_keys(ls_pass *p, const linear *x);
void ls_linear_queries_backward(ls_pass *p, const linear *x);
void ls_linear_keys_backward(ls_pass *p, const linear *x, int add);
/* c of each key, the maximum so far, and in start that after each chunk. Without exponentials: nothing. */
void ls_linear_follow_maxima(ls_pass *p, const linear *x);

/* ------------------------------------------------------------------------------------------------ linear_states.cu */

/* S, z of each chunk := Σ B_j v_jᵀ, Σ B_j, seen from c after the chunk. */
void ls_linear_gather_keys(ls_pass *p, const linear *x);
/* The gradient of states: Σ A_i do_iᵀ / D_i, - Σ δ_i A_i / D_i, of those before chunks, or of all keys. */
void ls_linear_gather_gradients(ls_pass *p, const linear *x);
/* running (G,a.n+b.n) grows by all chunks, from the first to the last or REVERSED; KEEPS: chunks get what it was before
 * them. start: c before the first chunk and after each; p NULL: there is no c. What is after a chunk's keys is seen
 * from c after it, and on the other side of it from c before it. */
void ls_linear_scan(ls_pass *p, const linear *x, numbers a, numbers b, level start, int how);
/* The same of S and z. */
void ls_linear_scan_states(ls_pass *p, const linear *x, level start, int how);
/* running: n numbers of each g := 0, and, where c is not NULL, its c (G,each_start) := -inf. */
void ls_linear_clear(ls_pass *p, const linear *x, int64_t n, ls_real *c);
/* running, to elements on their way: c of g is c[g each_start], NULL: 0. */
void ls_linear_pack(ls_pass *p, const linear *x, const ls_real *c, ls_real *elements);
/* Back to all_S, all_z, or where running is not NULL to it; c, which is that of c_of, to start. */
void ls_linear_unpack(ls_pass *p, const linear *x, const ls_real *elements, const ls_real *c_of, double *running);

/* ------------------------------------------------------------------------------------------------ linear_attend.cu */

/* Numbers of a row of dA that shared memory has no room for; 0: it has. */
int64_t ls_linear_beside(const ls_pass *p, int64_t F);
/* out of the slab's queries, from all_S, all_z or, causal, from S, z of their chunks and its keys. */
void ls_linear_attend(ls_pass *p, const linear *x);
/* dq, and inverse and delta; causal: dk, dv of the same chunk, too. */
void ls_linear_attend_backward(ls_pass *p, const linear *x);
/* What keys, seen from `from`, get from gradients all_S, all_z or, causal, S, z: dk, dv; add: +=. */
void ls_linear_pay_keys(ls_pass *p, const linear *x, level from, int add);

/* ------------------------------------------------------------------------------------------------ linear_pairs.cu */

ls_status ls_linear_cuda_share(ls_pass *p, int phase);
ls_status ls_linear_cuda_share_backward(ls_pass *p, int phase);
ls_status ls_linear_cuda_pairs(ls_pass *p, int phase);
ls_status ls_linear_cuda_pairs_backward(ls_pass *p, int phase);

/* ------------------------------------------------------------------------------------------------ linear_causal.cu */

ls_status ls_linear_cuda_causal(ls_pass *p, int phase);
ls_status ls_linear_cuda_causal_backward(ls_pass *p, int phase);

#endif
