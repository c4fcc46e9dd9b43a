/* A mechanism is a short list of phases. A phase names what must cross ranks before it, and the kernel that runs once
 * that has arrived. Kernels know nothing of MPI, NCCL or rank counts; parallel/run.c walks the list forward, and in
 * reverse for the backward pass: the kernel first, then the adjoint of the crossing.
 *
 * Rules for kernels.
 *   - No allocation: plan() takes what is needed from two arenas, `saved` (lives until backward) and `work`.
 *   - Parameter gradients accumulate (+=). Activation gradients: the first backward kernel that runs (the last phase)
 *     overwrites dq, dk, dv; the ones after it add. Where keys visit (ring) or are fetched, those of keys are sums over
 *     what several ranks make: the driver zeroes them, and kernels add. Nothing else is zeroed.
 *   - Rows whose pad is 1 may hold anything, NaN included: they are never read into arithmetic. The last forward kernel
 *     writes 0 to padded rows of out; backward writes 0 to padded rows of dq, dk, dv, and ignores padded rows of dout.
 *   - What is positional or random uses global positions (spans), never local row numbers.
 */
#ifndef LS_MECHANISM_H
#define LS_MECHANISM_H

#include "arena.h"
#include "device.h"
#include "real.h"

/* A monoid on summaries: `groups` independent elements, each [max if has_max][scaled][plain] reals.
 *   softsum: (m, s) ⊕ (m', s') = (M, s e^(m-M) + s' e^(m'-M)), M = max(m, m'); identity m = -inf, s = 0
 *   sum:     has_max = 0, only plain.
 *   decay:   plain = 2: each element is a complex number s that shrinks by e^λ for every position it is carried over;
 *            one more real at the end of the summary counts the positions n:
 *            (s, n) ⊕ (s', n') = (s e^(λ n') + s', n + n'), and in a reverse scan (s + s' e^(λ n), n + n').
 * m is a constant to the gradient: only s e^m means anything. λ is one too: who owns a position answers for the step of
 * the state over it, also the first of its shard. */
typedef struct ls_monoid {
    int64_t groups;
    int has_max;
    int64_t scaled, plain;
    const double *decay; /* (decays, 2) λ: re, im; element g has λ number g % decays. NULL: no decay */
    int64_t decays;
    int counts;              /* 1 with decay: the count at the end */
    int conjugate, reversed; /* set by the exchange: the adjoint's λ, the direction of the scan */
} ls_monoid;
LS_BOTH_SIDES int64_t ls_monoid_stride(ls_monoid m)
{
    return m.has_max + m.scaled + m.plain;
}
LS_BOTH_SIDES int64_t ls_monoid_size(ls_monoid m)
{
    return m.groups * ls_monoid_stride(m) + m.counts;
}

/* Rows [row, row + n) of a block hold the global positions [lo, lo + n). */
typedef struct ls_span {
    int64_t row, lo, n;
} ls_span;

/* Keys and values with their positions: this rank's own, a block that visits in a ring, or what a fetch brought. */
typedef struct ls_block {
    ls_view k, v, dk, dv;            /* (B,H,n,d) */
    const void *narrow_k, *narrow_v; /* see ls_pass.narrow */
    ls_view extra, dextra;           /* (B,1,n,extra_width): the layer's fourth projection, where there is one */
    const uint8_t *pad;              /* (B,n), or NULL */
    int64_t n;
    int spans;
    ls_span span[2]; /* two where causal work is balanced by a zigzag placement */
    /* Of a halo that was wanted as lists, see ls_phase.wanted: (b,h) has rows [first[b*H+h], first[b*H+h+1]) of its
     * own, in k, v (1,1,n,d) and pad (n), its list's keys in order; spans = 0. NULL in all other blocks */
    const int64_t *first;
    ls_real *note; /* a few reals of the owner that travel with its block, see ls_phase.notes */
} ls_block;

/* What arrives over the crossing before a phase, and its gradients. dsent, dgot live only in backward. */
typedef struct ls_summary {
    ls_monoid monoid;
    ls_real *sent, *got, *dsent, *dgot;
} ls_summary;

/* What a gather brings: every rank's piece, in rank order, and its gradients (the ranks' dall are summed into dmine).
 * In a step the ranks share the list: all holds its items first, first + every, ... (otherwise 0, 1, ...). */
typedef struct ls_collection {
    int64_t count, before, total; /* reals of this rank's piece, of the pieces before it, of all */
    int64_t first, every;
    ls_real *mine, *all, *dmine, *dall;
} ls_collection;

enum { LS_MAX_PHASES = 12, LS_MAX_BUFFERS = 16 };

/* One call on one rank, as its kernels see it. */
typedef struct ls_pass {
    /* the problem */
    ls_pattern pattern;
    int64_t B, H, T, S, d;         /* T, S: this rank's rows */
    int64_t all_queries, all_keys; /* global lengths */
    double scale;
    const double *option; /* the mechanism's own, in the order of its table */
    const void *kit;      /* ls_mechanism.kit */
    struct ls_queue
        *queue; /* CUDA: where kernels are put; all pointers below are to device memory, but option and kit */
    void *host; /* CUDA: ls_cuda_mechanism.host_bytes of host memory that lives as long as saved */
    const ls_real *params;
    ls_real *dparams;
    const ls_param_info *param; /* the mechanism's own parameters (without projections): name, dims, offset */

    /* queries: q and out are (B,H,T,d), their rows at query_span. Mechanisms of one input read q alone, as (B,1,T,E),
     * and have out (B,1,T,out_width) */
    ls_view q, out, dq, dout;
    int64_t out_width, extra_width;
    const uint8_t *pad_q; /* (B,T) or NULL */
    /* narrow: the mechanism takes it so, see ls_cuda_mechanism. Then the rows of q, own.k, own.v and dout lie in
     * bfloat16 at narrow_*, with the strides of these, and 0 where padded; those of floats are not there. The output
     * goes to narrow_out, and is read from there in backward; in forward out is scratch */
    int narrow;
    const void *narrow_q, *narrow_dout;
    void *narrow_out;
    int query_spans;
    ls_span query_span[2];
    ls_block own;   /* this rank's keys */
    ls_block visit; /* ring phases: the block to work on; dk, dv accumulate. In plan() n is the largest to come */
    ls_block halo;  /* from a fetch phase on: the keys within reach, 0 where padded; the kernels overwrite its dk, dv */

    /* softmax extras, rows of this rank's queries x all keys */
    const ls_real *attn_mask, *dropout_mask;
    int attn_mask_per_head;
    ls_real *weights; /* (B,H,T,all_keys) per head, or NULL */
    int training;
    double dropout;
    uint64_t seed, sample, draw;
    uint32_t stream;

    /* random numbers given from outside instead of drawn, see ls_attention_io; NULL: draw */
    const ls_real *given_features, *given_noise;
    const int32_t *given_samples;
    int64_t samples; /* columns of given_samples */
    int samples_per_batch;
    uint8_t *selected; /* out, (B,H,T), or NULL */

    int step;                          /* 1: a decoding step, see ls_mechanism.step */
    int backward;                      /* 1: work[] is planned for the backward pass (saved[] is the same for both) */
    ls_summary summary[LS_MAX_PHASES]; /* by phase number */
    ls_collection gathered[LS_MAX_PHASES];
    ls_real *saved[LS_MAX_BUFFERS], *work[LS_MAX_BUFFERS]; /* the mechanism's own memory, from plan() */
} ls_pass;

LS_BOTH_SIDES int ls_is_padded(const uint8_t *pad, int64_t row)
{
    return pad != NULL && pad[row];
}

enum { LS_KEYS = 1, LS_VALUES = 2, LS_EXTRA = 4 };

typedef struct ls_phase {
    const char *name;
    ls_crossing crossing;                 /* what must have arrived before the kernel runs */
    int (*needed)(const ls_pass *);       /* 0: this phase is left out in this call, on all ranks alike. NULL: always */
    ls_monoid (*monoid)(const ls_pass *); /* reduce and scan: the shape of what crosses */
    /* fetch: the global keys that queries [lo, lo + n), n > 0, look at; may reach beyond the ends. LS_KEYS | ... says
     * which tensors come (pads always do). In backward their gradients overwrite own.dk, ... or, with `adds`, add. */
    ls_span (*reach)(const ls_pass *, int64_t lo, int64_t n);
    int fetches, adds;
    /* ... or, where that depends on the data, instead of reach: the list of (b,h), called when the phases before have
     * run. Intervals of keys that exist (lo, n > 0; row is ignored), in order, not overlapping; returns how many. list
     * NULL: only counts. Brings keys and values; a step has no such fetch. Memory grows with what the lists want. */
    int64_t (*wanted)(const ls_pass *, int64_t b, int64_t h, ls_span *list);
    /* gather: reals that a rank with positions [lo, lo + n) of the keys gives */
    int64_t (*piece)(const ls_pass *, int64_t lo, int64_t n);
    /* ... and, where a step gathers: a piece is [items][B][item reals], so that the pieces of tokens add up to a list.
     * Its items lie on the ranks in turn: what each sees in its part is for a reduce to bring together. */
    int64_t (*item)(const ls_pass *);
    /* ring: only keys visit, no values; notes reals of the owner (own.note) come along */
    int keys_only;
    int64_t (*notes)(const ls_pass *);
    ls_status (*forward)(ls_pass *, int phase); /* NULL: there is just the crossing */
    ls_status (*backward)(ls_pass *, int phase);
    int constant;   /* nothing that crosses has a gradient: no kernel and no adjoint in backward */
    int of_source;  /* in a step: depends on keys and values alone, so a state does it once */
    int keys_alone; /* in a whole pass: neither kernel reads or writes what is the queries'. A layer then makes q, and
                       goes on from dq, while messages travel */
    int feeds_scan; /* > 0: fills only what the scan so many phases on sends: left out where nobody is after this rank
                     */
} ls_phase;

static inline int ls_is_needed(const ls_pass *p, const ls_phase *phase)
{
    return phase->needed == NULL || phase->needed(p);
}

/* The layer around a core: projections of the rows that come in and of those that go out. */
typedef struct ls_layer_form {
    int inputs; /* how many of input[]; 0: the core reads the rows as they are */
    struct {
        const char *weight, *bias; /* bias NULL: none */
        int64_t width;
        enum {
            LS_FINER,    /* unless said: in TF32 where the precision is bfloat16. The core reads floats, which bfloat16
                            would have to be widened to, and may amplify what rounding does */
            LS_AS_ASKED, /* in the context's precision */
            LS_EXACT,    /* never rounded: gradients jump where these rows, or denominators, are nearly 0 */
            LS_ALIKE     /* nor in bits that depend on ranks, as they are rounded or compared: see linear_alike */
        } made;
    } input[4];         /* query, key, value, and extra, which is projected from the query's rows */
    int64_t core_width; /* of the core's rows of output */
    int gelu;           /* of the core's output, before out_proj */
    const char *out_weight, *out_bias;
} ls_layer_form;

/* A mechanism on a GPU: its own memory, and its kernels for the phases that have one on the CPU, by their names. Where
 * the same name has other work in another pattern, p->pattern tells. Everything else of a phase (what crosses, its
 * monoid, its reach) is said once, and must not read tensors. ls_monoid.decay is then device memory. */
typedef struct ls_cuda_kernel {
    const char *phase; /* NULL: the end of the list */
    ls_status (*forward)(ls_pass *, int phase);
    ls_status (*backward)(ls_pass *, int phase);
} ls_cuda_kernel;
typedef struct ls_cuda_mechanism {
    void (*plan)(ls_pass *, ls_arena *saved,
                 ls_arena *work); /* as ls_mechanism.plan; gives pointers that no host reads */
    const ls_cuda_kernel *kernel;
    size_t (*host_bytes)(const ls_pass *); /* NULL: none. For lists that the host must know, see ls_phase.wanted */
    /* LS_BF16, where one rank has all positions: whether the kernels of this call read queries, keys and values in
     * bfloat16, as a layer keeps them. Those of a ring overwrite own.dk and own.dv then, which nobody has cleared.
     * Views have their strides, but not yet their rows. NULL: never */
    int (*takes_narrow)(const ls_pass *);
} ls_cuda_mechanism;

typedef struct ls_mechanism {
    const char *name;
    const ls_option_info *option; /* ends with name NULL */
    /* The mechanism's own parameters, projections aside: fills list (name, dims, init), returns how many. */
    int (*params)(const ls_attention_options *, ls_param_info *list);
    /* Refuses options that do not go together; for a state, those that have no step. Either may be NULL. */
    ls_status (*check)(const ls_attention_options *);
    ls_status (*check_step)(const ls_attention_options *);
    /* Whether positions that are padded count, as of a segment or of the length, so that results depend on how far a
     * batch is padded. NULL: never. */
    int (*counts_padding)(const ls_attention_options *);
    /* Whether what a row of a batch gives depends on the rows beside it. NULL: never. */
    int (*mixes_rows)(const ls_attention_options *);
    /* Why an option changes nothing in this pattern; NULL: it does something. NULL: all do. */
    const char *(*idle)(const ls_attention_options *, const char *option);
    /* The option that tells how long sequences may be, 0: as long as they like. NULL: none does. */
    const char *longest;
    /* Where the layer is not q_proj, k_proj, v_proj, out_proj with biases. May be NULL. */
    void (*layer)(const ls_attention_options *, ls_layer_form *);
    /* Takes memory: pass->saved[i] from the one arena, pass->work[i] from the other. May be NULL. */
    void (*plan)(ls_pass *, ls_arena *saved, ls_arena *work);
    /* By pattern; NULL: the pattern is not supported. Lists end with name NULL. */
    const ls_phase *phases[4];
    /* By pattern: phases of one decoding step. NULL: no step. A scan's `got` is the state and grows by `sent`; a
     * reduce after an of_source phase was done by the source; a ring visits this rank's cache; a fetch sees the last
     * keys that were fed; what was gathered grows by what each token gives, one part of it on each rank. */
    const ls_phase *step[4];
    const ls_cuda_mechanism *cuda; /* LS_IF_CUDA(&..), or NULL: it has no kernels for a GPU */
    const void *kit;    /* what kernels that several mechanisms share need to know of this one, see linear.h */
    int balance_causal; /* CS over a ring: share the triangle evenly by a zigzag placement */
    int unscaled;       /* there are no logits: options.scale does nothing */
    int has_weights;    /* there are probabilities: attn_mask, dropout and need_weights make sense */
    int one_input;      /* reads query alone, all heads at once: pass.H = 1, pass.d = E */
    int layer_only;     /* has no core level */
    int draws;          /* random numbers that may be given: one of ls_given, or 0 */
} ls_mechanism;
enum ls_given { LS_GIVEN_FEATURES = 1, LS_GIVEN_NOISE = 2, LS_GIVEN_SAMPLES = 3 };

/* From mechanisms.def. NULL for an unknown name. */
const ls_mechanism *ls_mechanism_find(const char *name);

#endif
