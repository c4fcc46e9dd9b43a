/* A mechanism is a short list of phases. A phase names what must cross ranks before it, and the kernel that runs once
 * that has arrived. Kernels know nothing of MPI, NCCL or rank counts; parallel/run.c walks the list forward, and in
 * reverse for the backward pass: the kernel first, then the adjoint of the crossing.
 *
 * Rules for kernels.
 *   - No allocation: plan() takes what is needed from two arenas, `saved` (lives until backward) and `work`.
 *   - Parameter gradients accumulate (+=). Activation gradients: the first backward kernel that runs (the last phase)
 *     overwrites dq, dk, dv; the ones after it add. The driver zeroes nothing.
 *   - Rows whose pad is 1 may hold anything, NaN included: they are never read into arithmetic. The last forward kernel
 *     writes 0 to padded rows of out; backward writes 0 to padded rows of dq, dk, dv, and ignores padded rows of dout.
 *   - What is positional or random uses global positions (spans), never local row numbers.
 */
#ifndef LS_MECHANISM_H
#define LS_MECHANISM_H

#include "arena.h"
#include "real.h"

/* A monoid on summaries: `groups` independent elements, each [max if has_max][scaled][plain] reals.
 *   softsum: (m, s) ⊕ (m', s') = (M, s e^(m-M) + s' e^(m'-M)), M = max(m, m'); identity m = -inf, s = 0
 *   sum:     has_max = 0, only plain.
 * m is a constant to the gradient: only s e^m means anything. */
typedef struct ls_monoid {
    int64_t groups;
    int has_max;
    int64_t scaled, plain;
} ls_monoid;
static inline int64_t ls_monoid_stride(ls_monoid m)
{
    return m.has_max + m.scaled + m.plain;
}
static inline int64_t ls_monoid_size(ls_monoid m)
{
    return m.groups * ls_monoid_stride(m);
}

/* Rows [row, row + n) of a block hold the global positions [lo, lo + n). */
typedef struct ls_span {
    int64_t row, lo, n;
} ls_span;

/* Keys and values with their positions: this rank's own, or a block that visits in a ring. */
typedef struct ls_block {
    ls_view k, v, dk, dv; /* (B,H,n,d) */
    const uint8_t *pad;   /* (B,n), or NULL */
    int64_t n;
    int spans;
    ls_span span[2]; /* two where causal work is balanced by a zigzag placement */
} ls_block;

/* What arrives over the crossing before a phase, and its gradients. dsent, dgot live only in backward. */
typedef struct ls_summary {
    ls_monoid monoid;
    ls_real *sent, *got, *dsent, *dgot;
} ls_summary;

enum { LS_MAX_PHASES = 8 };

/* One call on one rank, as its kernels see it. */
typedef struct ls_pass {
    /* the problem */
    ls_pattern pattern;
    int64_t B, H, T, S, d;         /* T, S: this rank's rows */
    int64_t all_queries, all_keys; /* global lengths */
    double scale;
    const double *option; /* the mechanism's own, in the order of its table */
    const ls_real *params;
    ls_real *dparams;
    const ls_param_info *param; /* the mechanism's own parameters (without projections): name, dims, offset */

    /* queries: q and out are (B,H,T,d), their rows at query_span */
    ls_view q, out, dq, dout;
    const uint8_t *pad_q; /* (B,T) or NULL */
    int query_spans;
    ls_span query_span[2];
    ls_block own;   /* this rank's keys */
    ls_block visit; /* ring phases: the block to work on; dk, dv accumulate */

    /* softmax extras, rows of this rank's queries x all keys */
    const ls_real *attn_mask, *dropout_mask;
    int attn_mask_per_head;
    ls_real *weights; /* (B,H,T,all_keys) per head, or NULL */
    int training;
    double dropout;
    uint64_t seed, sample;
    uint32_t stream;

    int step;                          /* 1: a decoding step, see ls_mechanism.step */
    int backward;                      /* 1: work[] is planned for the backward pass (saved[] is the same for both) */
    ls_summary summary[LS_MAX_PHASES]; /* by phase number */
    ls_real *saved[8], *work[8];       /* the mechanism's own memory, from plan() */
} ls_pass;

typedef struct ls_phase {
    const char *name;
    ls_crossing crossing;                 /* what must have arrived before the kernel runs */
    ls_monoid (*monoid)(const ls_pass *); /* reduce and scan: the shape of what crosses */
    ls_status (*forward)(ls_pass *, int phase);
    ls_status (*backward)(ls_pass *, int phase);
    int of_source;  /* cross attention: depends on keys and values alone, so a state does it once */
    int feeds_scan; /* fills only what the next scan sends on: left out where nobody is after this rank */
} ls_phase;

typedef struct ls_mechanism {
    const char *name;
    const ls_option_info *option; /* ends with name NULL */
    /* The mechanism's own parameters, projections aside: fills list (name, dims, init), returns how many. */
    int (*params)(const ls_attention_options *, ls_param_info *list);
    /* Refuses options that do not go together. May be NULL. */
    ls_status (*check)(const ls_attention_options *);
    /* Takes memory: pass->saved[i] from the one arena, pass->work[i] from the other. May be NULL. */
    void (*plan)(ls_pass *, ls_arena *saved, ls_arena *work);
    /* By pattern; NULL: the pattern is not supported. Lists end with name NULL. */
    const ls_phase *phases[4];
    /* By pattern: phases of one decoding step. NULL: no step. A scan's `got` is the state and grows by `sent`; a
     * reduce after an of_source phase was done by the source; a ring visits this rank's cache; other crossings as
     * usual. */
    const ls_phase *step[4];
    int balance_causal; /* CS over a ring: share the triangle evenly by a zigzag placement */
    int has_weights;    /* there are probabilities: attn_mask, dropout and need_weights make sense */
} ls_mechanism;

/* From mechanisms.def. NULL for an unknown name. */
const ls_mechanism *ls_mechanism_find(const char *name);

#endif
