/* Attention through few slots, in the two halves that mechanisms share. Keys write R slots, each a softmax over keys,
 *
 *   m_r = max_j l_jr,  s_r = Σ_j e^(l_jr - m_r),  x_r = Σ_j e^(l_jr - m_r) v_j;   V_r = x_r / s_r
 *
 * and queries read them: p_i = softmax_r(l_ir), o_i = Σ_r p_ir V_r. The caller makes the logits, a chunk of rows at a
 * time; (m; s, x) is an element of a softsum, R (d+2) reals for each (b,h).
 *
 * Slots may be nearly alike, and what is then left of gradients are small differences. So values are taken from a
 * centre c, the mean of the slots: Σ_r p_ir = 1 gives o_i = c + Σ_r p_ir (V_r - c), and for a key, with e = e^(l - m),
 *   de_jr = dx_r·v_j + ds_r = dx_r·(v_j - c) + constant_r,  constant_r = ds'_r + dx_r·(c - V_r)
 * where ds = -dx·V + ds': what s owes V is paid here, and only ds' travels. Sums over rows are kept in double. What
 * travels is rounded, so x is made of v - reference, their mean: V = reference + x / s. No gradient flows through it.
 */
#ifndef LS_SLOTS_H
#define LS_SLOTS_H

#include "segments.h"
#include "statistics.h"

/* saved[] and work[] that hold doubles. */
static inline ls_real *ls_take_doubles(ls_arena *arena, int64_t n)
{
    return (ls_real *)ls_arena_take(arena, (size_t)n * sizeof(double));
}
static inline double *ls_doubles(ls_real *x)
{
    return (double *)(void *)x;
}

/* Rows [t, t + n) of (b,h); g = b H + h. */
typedef struct ls_chunk {
    int64_t b, h, g, t, n;
} ls_chunk;
enum { LS_CHUNK = 64 };

/* Calls work for chunks of `rows` rows of every (b,h), heads innermost: in a model-wide row they are neighbours. */
void ls_each_chunk(ls_pass *p, int phase, int64_t rows, void (*work)(ls_pass *, int phase, const ls_chunk *));

/* The rows of a chunk as they lie, or clean in `copy` (n,d) where there are pads; *ld is the distance between rows. */
const ls_real *ls_chunk_rows(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows, ls_real *copy,
                             int64_t *ld);
/* copy (n,d) = rows - centre, a padded row is -centre. */
void ls_chunk_centred(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows, const ls_real *centre,
                      ls_real *copy);
/* logits (n,R) = -inf in padded rows. */
void ls_chunk_hide(const ls_chunk *c, int64_t R, const uint8_t *pad, int64_t rows, ls_real *logits);
/* Zeros in padded rows of v. */
void ls_chunk_blank(const ls_chunk *c, ls_view v, int64_t d, const uint8_t *pad, int64_t rows);

/* What slots are made of is summed before: for each (b,h) the segments of the queries, unless keys alone make
 * landmarks, those of the keys, and the values' reference, as d + 1 reals: the sum of the values that are not padded,
 * and how many these are. */
typedef struct ls_landmarks {
    int64_t count; /* segments of a sequence */
    int first;     /* sequence that makes landmarks: 0 the queries, and the keys, 1 these alone */
} ls_landmarks;

/* Reals of a (b,h); where in them stand the queries (which = 0), the keys (1), the reference (2). */
static inline int64_t ls_landmark_reals(const ls_pass *p, ls_landmarks l)
{
    return ((2 - l.first) * l.count + 1) * p->d + 1;
}
static inline int64_t ls_landmark_place(const ls_pass *p, ls_landmarks l, int which)
{
    return (which - l.first) * l.count * p->d;
}
static inline ls_segments ls_landmark_segments(const ls_pass *p, ls_landmarks l, int which)
{
    const ls_segments s = {which ? p->all_keys : p->all_queries, l.count};
    return s;
}
static inline double ls_landmark_tokens(const ls_pass *p, ls_landmarks l, int which, int64_t c)
{
    return (double)ls_segment_tokens(ls_landmark_segments(p, l, which), c);
}

/* The sums of this rank's rows. `row`: room for H d doubles. */
void ls_landmark_sums(const ls_pass *p, ls_landmarks l, double *row, ls_real *sums);
/* The adjoint: rows of dq and dk += the gradient of their segment's sum. */
void ls_landmark_spread(const ls_pass *p, ls_landmarks l, const ls_real *dsums);
/* reference (B*H,d) from what was reduced. */
void ls_landmark_reference(const ls_pass *p, ls_landmarks l, const ls_real *sums, ls_real *reference);

typedef struct ls_slots {
    int64_t R, d;
    ls_real *scratch; /* R (d+2) */
} ls_slots;

/* total (R,d) += aᵀ b, a (n,R), b (n,d). */
void ls_slots_sum(ls_slots s, int64_t n, const ls_real *a, const ls_real *b, int64_t ldb, double *total);

/* state (G,R,d+2) of G (b,h): nothing written yet; and rounded, as it travels. */
void ls_slots_begin(ls_slots s, int64_t G, double *state);
void ls_slots_send(ls_slots s, int64_t G, const double *state, ls_real *sent);
/* n rows join a state (R,d+2): logits become e. values (n,d): v - reference. */
void ls_slots_write(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, double *state);
/* values (R,d) = V - reference, 0 where no key was; centre (d) their mean. */
void ls_slots_values(ls_slots s, const ls_real *element, double *values, double *centre);
/* c (G,d), which comes as the reference, and constant (G,R), from what was got of the crossing and this rank's
 * gradients of what it sent. `room`: for (R+1) d doubles. */
void ls_slots_constants(ls_slots s, int64_t G, const ls_real *got, const ls_real *dsent, double *room, ls_real *c,
                        ls_real *constant);
/* constant_r as some keys take it: where they have all that slot r was written from, what they give themselves stands
 * in place of dx·(V - c): the same but for rounding, of which nothing else is left where one key wrote the slot alone.
 * sent, got, dsent: the slot's elements; with f = e dx·(v - c) the keys' Σ e, Σ f and Σ |f|. n keys that have all of a
 * slot's sum make it n at most: where it is more, constant_r stays. */
LS_BOTH_SIDES ls_real ls_slots_constant_of(const ls_real *sent, const ls_real *got, const ls_real *dsent,
                                           ls_real constant, ls_real mass, ls_real flow, ls_real size)
{
    const ls_real part = got[1] > 0 ? ls_statistics_weight(sent[0], got[0]) / got[1] : 0, delta = dsent[1] - constant;
    const ls_real here = ls_statistics_delta(part * mass, part * flow, part * size, delta);
    return here == delta ? constant : dsent[1] - here;
}
/* logits (n,R) become e; dlogits (n,R), dv (n,d) are overwritten. values (n,d): v - c. sent, got, dsent: elements. */
void ls_slots_write_backward(ls_slots s, int64_t n, const ls_real *sent, const ls_real *got, const ls_real *dsent,
                             const ls_real *constant, const ls_real *values, ls_real *logits, ls_real *dlogits,
                             ls_real *dv, int64_t ld);

/* logits (n,R) become p; out (n,d) is overwritten. values (R,d): V - c. */
void ls_slots_read(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, const ls_real *centre, ls_real *out,
                   int64_t ld);
/* logits (n,R) become p; dlogits (n,R) is overwritten, dvalues (R,d) += those of V. */
void ls_slots_read_backward(ls_slots s, int64_t n, ls_real *logits, const ls_real *values, const ls_real *dout,
                            int64_t ld, ls_real *dlogits, double *dvalues);

#endif
