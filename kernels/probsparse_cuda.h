/* What probsparse.cu, which finds the selected queries, and probsparse_attend.cu, where they and the others attend,
 * share. */
#ifndef LS_PROBSPARSE_CUDA_H
#define LS_PROBSPARSE_CUDA_H

#include "cuda.h"

extern "C" {
#include "probsparse.h"
}

namespace ls_probsparse /* other files have types of these names, too */
{

enum { ROWS, CHOSEN, SLOT }; /* saved[] */
enum {
    NOTE,
    TALLY,
    TOP,
    SUM,
    KEY_ROWS,
    SCORE,
    PICKED,
    REST,
    CHUNK_SUMS,
    SCALED,
    LOGITS,
    DLOGITS,
    KEYS,
    VALUES,
    PART,
    STATE
};
enum { CHUNK = 128 };    /* rows that are summed together */
enum { TOGETHER = 128 }; /* queries */
enum { WARPS = LS_THREADS / LS_WARP };

/* What most kernels want to know. */
typedef struct shape {
    int64_t B, H, T, S, d;
    int64_t u, lead, R; /* slots for selected queries, rows of a softsum before them, both */
    int64_t query_lo, key_lo;
    int causal;
} shape;

static inline shape shape_of(const ls_pass *p)
{
    shape z;
    z.B = p->B, z.H = p->H, z.T = p->T, z.S = p->S, z.d = p->d;
    z.u = most_top(p), z.lead = lead(p), z.R = z.lead + z.u;
    z.query_lo = p->query_span[0].lo, z.key_lo = p->own.span[0].lo;
    z.causal = is_causal(p);
    return z;
}

LS_BOTH_SIDES int64_t chunks_of(int64_t n)
{
    return (n + CHUNK - 1) / CHUNK;
}

/* Slots that are worked on at a time. */
static inline int64_t together(const shape *z)
{
    return ls_min(z->R, TOGETHER);
}

static inline rows *rows_of(const ls_pass *p)
{
    return (rows *)p->saved[ROWS]; /* (B) */
}
static inline int64_t *chosen_of(const ls_pass *p)
{
    return (int64_t *)p->saved[CHOSEN]; /* (B,H,u): global positions of the selected queries, rising */
}
static inline int32_t *slots_of(const ls_pass *p)
{
    return (int32_t *)p->saved[SLOT]; /* (B,H,T): which of the selected this rank's query is, or -1 */
}

/* The row of a global position among this rank's queries, or -1. */
__device__ static inline int64_t own_row(const shape *z, int64_t position)
{
    const int64_t t = position - z->query_lo;
    return t >= 0 && t < z->T ? t : -1;
}

/* A block for n things to be shared out: up to LS_THREADS, whole warps. */
static inline int threads_for(int64_t n)
{
    return (int)ls_max(1, ls_min(WARPS, (n + LS_WARP - 1) / LS_WARP)) * LS_WARP;
}

ls_status queries(ls_pass *p, int phase);
ls_status queries_backward(ls_pass *p, int phase);
ls_status partial(ls_pass *p, int phase);
ls_status partial_backward(ls_pass *p, int phase);
ls_status apply(ls_pass *p, int phase);
ls_status apply_backward(ls_pass *p, int phase);

} // namespace ls_probsparse

#endif
