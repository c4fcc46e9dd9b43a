/* What the attention tests share: the table of cases, deterministic random problems, one run of an attention on any
 * communicator and any shards, and the comparison of two runs.
 *
 * A problem holds whole tensors, the same on every rank, in one canonical order whatever the layout of the call:
 * (B, heads, n, width) with heads = H, width = d at core level and heads = 1, width = E at layer level. `pieces` are
 * one rank's rows of it in the layout of the call; an `answer` is whole again, gathered to every rank. */
#ifndef HARNESS_H
#define HARNESS_H

#include "device_shim.h"
#include "longspan.h"

#include <stddef.h>
#include <stdint.h>

/* ------------------------------------------------------------------------------------------------ cases.def */

enum {                      /* traits of a mechanism */
       PREFIX_NS = 1,       /* law 2: CS at t is NS at the end of the sequence cut after t */
       PREFIX_CS = 2,       /* law 2: CS at t is the last row of CS of the sequence cut after t */
       ROWS_OF_QUERIES = 4, /* cross patterns: a row of the output depends on its own query alone */
       STATE_GROWS = 8,     /* the state of a step grows with the tokens fed */
       TAKES_MASK = 16,     /* attn_mask, dropout and weights exist */
       LOOKS_AHEAD = 32,    /* laws 2 and 5 do not hold */
       ONE_INPUT = 64,      /* reads query alone */
       LAYER_ONLY = 128,    /* has no core level */
       ONE_HEAD = 256,
       FEW_FEATURES = 512 /* normalises rows: over two or four features that amplifies rounding, see answer_equal */
};
enum { /* extras of a case */
       MASK = 1,
       MASK_PER_HEAD = 2,
       DROPOUT = 4,      /* options.dropout, in training */
       DROPOUT_MASK = 8, /* io.dropout_mask */
       WEIGHTS_MEAN = 16,
       WEIGHTS_PER_HEAD = 32,
       OTHER_SCALE = 64,
       STEEP = 128,          /* logits in the hundreds */
       IN_TRAINING = 256,    /* fresh noise */
       NO_DIFFERENCES = 512, /* something is a constant to the gradient: finite differences see another function */
       ROWS_HERE = 1024,     /* ROWS_OF_QUERIES for this case */
       NO_STEP = 2048
};
typedef struct mechanism_row {
    const char *name, *patterns, *steps;
    unsigned traits;
} mechanism_row;
typedef struct case_row {
    const char *mechanism;
    ls_pattern pattern;
    const char *options;
    unsigned extras;
} case_row;
typedef struct word_row {
    const char *option, *word;
    double value;
} word_row;
extern const mechanism_row mechanisms[]; /* these end with a name, mechanism, option NULL */
extern const case_row cases[];
extern const word_row words[];

/* A number below 1000 that follows from the case alone, so that seeds do not change when others join the table. */
int64_t row_number(const case_row *row);
const mechanism_row *mechanism_of(const char *name); /* NULL: not in the table */
int library_has(const char *mechanism, ls_pattern pattern);
const char *pattern_letters(ls_pattern pattern); /* "NS", ... */

/* ------------------------------------------------------------------------------------------------ numbers */

/* SplitMix64: every sequence of draws follows from its seed. */
typedef struct draw {
    uint64_t state;
} draw;
draw draw_from(uint64_t seed, uint64_t salt);
uint64_t draw_bits(draw *r);
double draw_uniform(draw *r); /* [0, 1) */
double draw_normal(draw *r);
int64_t draw_below(draw *r, int64_t n); /* 0 .. n-1 */
/* How many of n rows each of `size` ranks owns. kind 0: as even as possible; 1: random, some none; 2: one rank, all. */
enum { SPLIT_EVEN, SPLIT_RANDOM, SPLIT_ONE, SPLITS };
void draw_split(draw *r, int kind, int size, int64_t n, int64_t *count);
extern const char *const split_name[SPLITS];

typedef enum padding { PAD_NONE, PAD_TAIL, PAD_RANDOM, PAD_WHOLE, PADDINGS } padding; /* WHOLE: all of the last row */
extern const char *const padding_name[PADDINGS];
void draw_padding(draw *r, padding kind, int64_t B, int64_t n, uint8_t *pad); /* (B,n) */

/* max|a-b| / max(max|b|, scale): the error relative to a tensor, or to `scale` where the tensor is a cancelled sum of
 * terms of that size. Not finite where b is finite: INFINITY. Against zeros alone only zeros pass. */
double relative_error(int64_t n, const ls_real *a, const ls_real *b, double scale);
double largest(int64_t n, const ls_real *x); /* max|x|, INFINITY with NaN */

/* Errors of a gradient are relative to its tensor, but never to less than FLOOR times the largest of its siblings: the
 * law's tolerance of that is two or three units of rounding in the terms it sums. A tensor CANCELLED times smaller than
 * its siblings is rounding noise around zero, and is measured against them. */
#ifdef LS_REAL_DOUBLE
#define LAW_TOLERANCE 1e-11
#define FLOOR 1e-4
#define CANCELLED 1e-7
#else
#define LAW_TOLERANCE 1e-5
#define FLOOR 0.03
#define CANCELLED 1e-4
#endif
/* Where operands are rounded, the tolerance is five units of that (2^-8 in bf16), and these are fractions of it. Of the
 * terms that a gradient sums, one rounding on either side of a law is allowed for: gradients of logits are p (dp - δ),
 * which cancel where a query sees few keys, and δ = Σ p dp is made of the output as the layer keeps it, rounded. What
 * is below two units of its siblings is noise, as the gradient of a softmax's keys' bias, exactly zero. */
#define ROUNDED_FLOOR 0.4
#define ROUNDED_CANCELLED 0.4
extern const double rounded_tolerance[]; /* by precision */

int is_rounded(void);       /* operands of products are, by LONGSPAN_TEST_PRECISION */
double law_tolerance(void); /* LAW_TOLERANCE, or that of the precision */

void *get(size_t count, size_t size); /* calloc that never fails and never gives NULL */
#define NEW(type, count) ((type *)get((size_t)(count), sizeof(type)))

/* ------------------------------------------------------------------------------------------------ problem */

typedef enum alias { /* which of query, key, value are one tensor */
                     ALIAS_NONE,
                     ALIAS_VALUE,      /* value = key */
                     ALIAS_ALL,        /* self attention: key = value = query */
                     ALIAS_VALUE_NULL, /* the same, said by NULL (layers) */
                     ALIAS_ALL_NULL
} alias;

typedef struct parameter {
    char name[64];
    ls_param_info info; /* info.name is not to be used: it belongs to the library */
} parameter;

typedef struct problem {
    char text[256]; /* what it is, for messages */
    ls_attention_options options;
    int64_t B, H, T, S, d, heads, width, out_width;
    alias alias;
    ls_real *query, *key, *value;           /* (B,heads,n,width); key, value NULL where they are aliases */
    ls_real *dout;                          /* (B,heads,T,out_width) */
    uint8_t *pad_q, *pad_k;                 /* (B,T), (B,S) or NULL; self attention: both, the same */
    int32_t *query_segments, *key_segments; /* (B,T), (B,S) or NULL; self attention: one of the two */
    int give_pads;                          /* self attention: 1 as queries', 2 as keys', 3 as both */
    ls_real *attn_mask;                     /* (T,S) or (B*H,T,S), or NULL */
    int attn_mask_per_head;
    ls_real *dropout_mask;     /* (B,H,T,S), or NULL */
    int weights;               /* 0: none, 1: mean over heads, 2: per head */
    ls_real *features, *noise; /* (H,m,d), (B,H,landmarks,d), or NULL: drawn by the library */
    int64_t n_features, n_noise;
    int32_t *samples; /* (T,U), or (B,T,U) with samples_per_batch, or NULL */
    int64_t num_samples;
    int samples_per_batch, wants_selected;
    int steep; /* its softmax is nearly one-hot: gradients are small differences of large terms */
    int training;
    uint64_t sample;
    int parameters;
    parameter parameter[LS_MAX_PARAMS];
    int64_t param_count;
    ls_real *params;
} problem;

static inline int is_cross(const problem *p)
{
    return p->options.pattern == LS_NC || p->options.pattern == LS_CC;
}
static inline int64_t key_rows(const problem *p)
{
    return is_cross(p) ? p->S : p->T;
}
/* The whole tensor behind key and value. */
const ls_real *key_of(const problem *p);
const ls_real *value_of(const problem *p);

/* What to draw. T = S for self attention. */
typedef struct setting {
    const case_row *row;
    ls_level level;
    ls_layout layout;
    int64_t B, H, d, T, S;
    padding pad;
    alias alias;
    uint64_t seed;
} setting;

/* Sets heads, width, out_width from the options. */
void problem_shape(problem *p, int64_t B, int64_t T, int64_t S);
/* Asks the library for the parameters of p->options and reserves p->params. */
ls_status problem_parameters(problem *p);
ls_status problem_draw(const setting *s, problem *p);
problem problem_copy(const problem *p);
/* Batch row b alone: its queries [q_lo, q_lo + T) and, in cross attention, keys [k_lo, k_lo + S). */
problem problem_part(const problem *p, int64_t b, int64_t q_lo, int64_t T, int64_t k_lo, int64_t S);
/* The first T queries and S keys of it. */
problem problem_cut(const problem *p, int64_t T, int64_t S);
void problem_free(problem *p);

/* ------------------------------------------------------------------------------------------------ run */

/* The test program: its ranks, one context on all of them and one on this process alone. */
typedef struct world {
    MPI_Comm comm;
    int rank, size;
    ls_context *all, *one;
    int passed, failed;
    int ill_conditioned; /* tensors of this rank, see answer_equal */
    double worst;        /* relative error that was compared on this rank, and whose it is */
    char worst_of[400];
    char error[1024]; /* of the last call that failed */
    char doing[256];  /* what to name when the watchdog barks */
} world;
extern world here;
void world_open(int *argc, char ***argv); /* MPI_Init, contexts; a program that cannot even do that ends here */
int world_close(void);                    /* exit status, the same on every rank; prints "N passed, N failed" */
/* Collective on here.comm: passed if it passed on every rank; ranks where it did not print the message. */
int verdict(int ok, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Keeps the largest, which world_close tells where operands are rounded. */
void note_error(double error, const char *tensor, const char *of);
/* The status all ranks of comm got; -1 and a message where they differ. Keeps the error text in here.error. */
int same_status(MPI_Comm comm, ls_status status);
/* Ends the program, and says what it was doing, unless called again within so many seconds. */
void watchdog(unsigned seconds);

typedef struct pieces {
    ls_shard queries, keys;
    ls_attention_shape shape;
    ls_attention_io io;
    ls_attention_grads grads; /* all given, filled with NaN; params zero */
    ls_real *query, *key, *value, *attn_mask, *dropout_mask, *weights, *out, *dout, *dquery, *dkey, *dvalue, *dparams;
    uint8_t *pad_q, *pad_k, *selected;
    int32_t *samples, *query_segments, *key_segments;
} pieces;
/* queries, keys: rows of each rank, NULL: even. keys is ignored in self attention. Collective. */
int pieces_make(ls_context *ctx, MPI_Comm comm, const problem *p, const int64_t *queries, const int64_t *keys,
                pieces *x);
void pieces_free(pieces *x);

typedef struct answer {
    ls_real *out, *weights, *dquery, *dkey, *dvalue, *dparams; /* whole; dkey, dvalue NULL where aliases */
    int64_t n_out, n_weights, n_query, n_key, n_params;
    uint8_t *selected; /* (B,H,T), or NULL */
    int wrote_alias;   /* a gradient that should not have been written was */
} answer;
/* Collective: whole tensors on every rank from the pieces. */
void answer_gather(MPI_Comm comm, const problem *p, const pieces *x, answer *a);
void answer_free(answer *a);

/* One forward and backward. Returns the status on all ranks; when it is not LS_OK, *a is empty. */
int problem_run(ls_context *ctx, MPI_Comm comm, const problem *p, const int64_t *queries, const int64_t *keys,
                answer *a);
int problem_run_alone(const problem *p, answer *a); /* on this process alone */

/* a against b: 1 if each tensor agrees within tolerance; otherwise 0 and what differs, by how much. In float, and for
 * mechanisms with FEW_FEATURES or heads of two features alone, the tolerance may be 4 times the error that rounding the
 * inputs anew makes on one rank, as in golden files; how often is told at the end. Not where operands are rounded. */
int answer_equal(const problem *p, const answer *a, const answer *b, double tolerance, char *what, size_t size);
/* The same, bit for bit. */
int answer_same_bits(const problem *p, const answer *a, const answer *b, char *what, size_t size);

/* Row t of (b, h) in a canonical tensor of n rows. */
static inline int64_t row_at(int64_t heads, int64_t n, int64_t width, int64_t b, int64_t h, int64_t t)
{
    return ((b * heads + h) * n + t) * width;
}
/* Rows [lo, lo + n) of a canonical tensor with N rows to or from memory of n rows in a layout. */
void rows_take(ls_layout layout, int64_t B, int64_t heads, int64_t N, int64_t width, int64_t lo, int64_t n,
               const ls_real *whole, ls_real *part);
void rows_put(ls_layout layout, int64_t B, int64_t heads, int64_t N, int64_t width, int64_t lo, int64_t n,
              const ls_real *part, ls_real *whole);

#endif
