/* Longspan: attention mechanisms with hand-written gradients on sequences that are sharded over ranks.
 *
 * The story, in the order a caller meets it:
 *
 *   1. a context   owns a communicator (this rank's place among those that share each sequence) and scratch memory;
 *   2. a shard     says which positions of a sequence each rank owns: contiguous, of any lengths, none included;
 *   3. an attention is one mechanism with its options: it lists its parameters by name, and it never owns their values;
 *   4. forward     needs inputs, parameters and a `saved` that keeps what backward will want;
 *   5. backward    overwrites the gradients of activations (=) and accumulates those of parameters (+=);
 *   6. a state     feeds tokens one at a time (incremental decoding), the source of cross attention summarised once.
 *
 * Two levels. LS_LEVEL_CORE takes query, key, value after the input projections, for trainers that have their own;
 * LS_LEVEL_LAYER takes model-wide rows and has q_proj, k_proj, v_proj and out_proj.
 *
 * Conventions. Every function that can fail returns ls_status, and ls_last_error() tells what, where and what to do.
 * "Collective" means: every rank of the context's communicator calls it, in the same order, with the same options; a
 * collective function returns the same status everywhere, so no rank waits for one that failed; but for LS_ERR_COMM,
 * which one rank alone may get, in the middle of a call: others may wait for it, and the job is to be ended. What is
 * not called collective concerns this rank alone. These functions also refuse NULL where something is needed; but a
 * collective call whose first argument is NULL has nobody to tell, and the other ranks wait for it. The library never
 * prints, exits, installs signal handlers, or touches MPI_COMM_WORLD. Pointers are borrowed unless a comment says
 * otherwise. A context and everything made from it belong to one thread at a time; contexts with communicators in
 * several threads need MPI_THREAD_MULTIPLE.
 *
 * Sizes. batch x the positions of queries and keys (at least 1024) x embed_dim is less than 2^44, over all ranks;
 * embed_dim is at most 2^20, and a state is for at most 2^31 - 1 tokens. As BLAS counts with int, batch x positions on
 * one rank is less than 2^31, and so is batch x embed_dim in the layout LS_TBHD. What is larger is refused.
 *
 * What is not finite, in a row that is not padded, may reach every row of its batch row and document: in causal
 * patterns rows before it, too; and of nystrom with init = 1 every row of the batch.
 */
#ifndef LONGSPAN_H
#define LONGSPAN_H

/* MPI's C interface is all that is used: its old one of C++ would have to be linked. */
#ifdef __cplusplus
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif
#endif
#include <mpi.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__
#pragma GCC visibility push(default) /* all else in the library is hidden */
#endif

#define LS_VERSION_MAJOR 0
#define LS_VERSION_MINOR 1
#define LS_VERSION_PATCH 0
#define LS_VERSION_STRING "0.1.0"

/* The number type of every tensor: float, or double in the test build (LS_REAL_DOUBLE). */
#ifdef LS_REAL_DOUBLE
typedef double ls_real;
#else
typedef float ls_real;
#endif

/* ------------------------------------------------------------------------------------------------ status */

typedef enum ls_status {
    LS_OK = 0,
    LS_ERR_ARGUMENT,    /* an argument, option or shape is impossible */
    LS_ERR_UNSUPPORTED, /* the mechanism has no such pattern, or this build lacks the backend */
    LS_ERR_MEMORY,      /* memory could not be had */
    LS_ERR_COMM,        /* the transport failed, or this rank did while others wait for it: end the job */
    LS_ERR_IO,          /* a file or directory cannot be read or written */
    LS_ERR_FORMAT,      /* a file is not what it should be: wrong kind, version, digest or content */
    LS_ERR_NONFINITE,   /* a loss or gradient is not finite */
    LS_ERR_INTERNAL     /* a broken promise inside Longspan */
} ls_status;

const char *ls_status_name(ls_status status);

/* The message of the last failure on this thread: one sentence. Valid until the next failing call on this thread. */
const char *ls_last_error(void);
/* For failures of the caller's own: the sentence (copied; NULL: the status's name) becomes ls_last_error(), and the
 * status is returned: ls_agree(ctx, ls_set_error(LS_ERR_IO, "corpus.txt: cannot be read")). LS_OK changes nothing. */
ls_status ls_set_error(ls_status status, const char *sentence);

/* ------------------------------------------------------------------------------------------------ BLAS */

/* Which kernels OpenBLAS chose for this processor when it was loaded, e.g. "SkylakeX". */
const char *ls_blas_kernels(void);
/* OpenBLAS takes a processor newer than itself for one of 2004, and its products are then several times slower than
 * they could be. Returns the kernels that it should have chosen, or NULL when its choice is fine. It reads its choice
 * from the environment when it is loaded, so a program has to set OPENBLAS_CORETYPE to this and start itself anew,
 * before MPI_Init, as `longspan` does; or its user sets it once for all. */
const char *ls_blas_better_kernels(void);

/* ------------------------------------------------------------------------------------------------ context */

typedef struct ls_context ls_context;

typedef enum ls_device { LS_CPU = 0, LS_CUDA = 1 } ls_device;

/* What carries messages between GPUs: NCCL needs one GPU for each rank; MPI works everywhere, by way of host memory. */
typedef enum ls_transport {
    LS_TRANSPORT_AUTO = 0, /* NCCL where it can be had */
    LS_TRANSPORT_MPI,
    LS_TRANSPORT_NCCL
} ls_transport;

/* What the operands of matrix products are rounded to, on a GPU of compute capability 8.0 or more:
 *
 *   LS_FLOAT32  nothing is rounded.
 *   LS_TF32     to 10 bits behind the point (a relative error of 2^-11), inside the tensor cores. Not in kernels that
 *               multiply by themselves: exact softmax, longshort, performer and cosformer.
 *   LS_BF16     to bfloat16: 7 bits (2^-8), and float32's range, so that the loss needs no scaling. Dense layers,
 *               projections and the mechanisms' products; in exact softmax q, k, v, probabilities and gradients of
 *               logits, which run on tensor cores where the head dimension is 8, 16, ... or 128 and neither attn_mask,
 *               dropout_mask nor weights are given (beyond 64 where a block may have 106 KiB of shared memory, beyond
 *               96 139, as on an A100 or H100); in performer and cosformer features, values, weights and states, on
 *               tensor cores, too, but for performer's sums over keys and their gradients (gradients of queries and
 *               keys take states and gradients of weights as two numbers of bfloat16 each: where values have a mean
 *               they are small differences); likewise in longshort queries, normalised keys and values, vectors,
 *               tables of distances, probabilities and gradients of logits, and in local queries, keys, values,
 *               weights, gradients of logits and of the output. Takes 64 MiB of the GPU for copies of operands; exact
 *               softmax there 2 bytes for each number of q, k and v, and of the output's gradient, while it runs (none
 *               in a layer where one rank has all positions).
 *
 * In LS_BF16 a layer also rounds rows that it keeps for backward, and keeps them so: the core's output and, of exact
 * softmax, projected queries, keys and values, which its core then sees. All other mechanisms' cores read floats,
 * which are projected in TF32, but for those named below, and kept so: some would amplify what bfloat16 does. That
 * takes more memory from forward to backward (4 bytes a number instead of 2), and less traffic, as rows need not be
 * widened.
 *
 * Sums are float32 at least in each of them, and so is all else that is kept in memory or crosses ranks: the rows that
 * flow between layers, the statistics of softmax, states, summaries, parameters, their gradients, the optimizer. Not
 * rounded at all:
 *
 *   - products where the rounding of an operand would be amplified: exponents of performer, nystrom's pseudo-inverse,
 *     projections whose rows are compared or rounded (queries and keys of probsparse, predicted positions of local),
 *     queries and keys of cosformer with relu, whose gradient jumps at 0; all that the cores of performer and
 *     cosformer multiply where denominators may meet their floor (performer's m denom_min, cosformer's eps, above
 *     1e-4: gradients jump there, and a layer does not round its projections of queries and keys either) or, but for
 *     decoding steps, where there are 64 keys or fewer;
 *   - what kernels multiply as it is: abc's slots (in double), the sums that make longshort's vectors, the modes of
 *     s4d, the slots of lara and nystrom, features of performer and their gradients, the cores of decoding steps but
 *     those of performer, cosformer, longshort and local, norms, the loss. */
typedef enum ls_precision { LS_FLOAT32 = 0, LS_TF32, LS_BF16 } ls_precision;
const char *ls_precision_name(ls_precision precision); /* "float32", "tf32", "bf16" */

typedef struct ls_context_options {
    MPI_Comm comm;    /* the ranks that share each sequence; 0 or MPI_COMM_NULL: this process alone, MPI not needed.
                       * Duplicated, so the caller may free or use its own at any time. */
    ls_device device; /* where tensors live */
    ls_transport transport;
    ls_precision precision; /* of products on a GPU; the CPU, and the double build, have LS_FLOAT32 alone */
    int device_number;      /* CUDA: which of this machine's devices; ranks may share one. A process uses one at a
                             * time, and all its contexts there belong to one thread at a time */
    uint64_t seed;          /* of every random number drawn through this context; the same on all ranks, as are device,
                             * transport and precision */
    int dry_size, dry_rank; /* dry_size > 0: as rank dry_rank of so many, of whom the others do not exist: comm is not
                             * used, everything sent is counted and gone, everything received is zeros. For planning:
                             * exact volumes, memory and the work of one rank. Estimates where local predicts its
                             * centres (causal cross attention, or align = 1): data decide which keys are asked for,
                             * and the others are taken to be like this rank. Results mean nothing */
} ls_context_options;

/* Collective. Between MPI_Init and MPI_Finalize, unless this process is alone. On success *ctx is the caller's, to be
 * freed with ls_context_free (collective too), after all that was made from it; else it is NULL. OpenBLAS has one
 * thread in this process from then on, as each rank has a core: openblas_set_num_threads, after this, gives it others.
 */
ls_status ls_context_create(const ls_context_options *options, ls_context **ctx);
void ls_context_free(ls_context *ctx);
int ls_context_rank(const ls_context *ctx);
int ls_context_size(const ls_context *ctx);
/* Scratch memory that all its attentions share, as it has grown: on the device, and lists in host memory. */
size_t ls_context_bytes(const ls_context *ctx);

/* On a GPU calls give work to the context's queue and return: outputs are there after ls_context_wait, which also tells
 * what failed meanwhile. query, key, value, out, their gradients, params, masks, features, noise, samples and weights
 * are device memory then; shards, options, query_segments and key_segments are not. On the CPU nothing has to be waited
 * for. */
ls_status ls_context_wait(ls_context *ctx);
/* Memory on the context's device, for callers that have no other way to it, to be given back before the context is
 * freed; copies from and to host memory, in order with the work before. ls_device_read waits; what ls_device_write has
 * been given may be used again at once. On the CPU these are malloc and memcpy. None of them is
 * collective, nor is ls_context_wait. */
ls_status ls_device_alloc(ls_context *ctx, size_t bytes, void **p);
void ls_device_free(ls_context *ctx, void *p);
ls_status ls_device_write(ls_context *ctx, void *to, const void *from, size_t bytes);
ls_status ls_device_read(ls_context *ctx, void *to, const void *from, size_t bytes);

/* Collective: every rank passes its own status and gets the same one back: LS_OK if all were LS_OK, otherwise that of
 * the lowest failing rank, whose message becomes ls_last_error() everywhere: with "rank N: " before it, unless it came
 * from all ranks already; the status's name, if the last failure on that rank was another one. */
ls_status ls_agree(ls_context *ctx, ls_status mine);

/* Collective: x (n) := the sum over ranks of x, bit for bit the same on each; n is the same on all. For parameter
 * gradients. */
ls_status ls_all_reduce_sum(ls_context *ctx, ls_real *x, int64_t n);

/* Bytes this rank has sent since the context was created, and what the formulas of the exchanges predicted, per kind of
 * crossing (names from ls_crossing_name, count LS_CROSSINGS). */
typedef enum ls_crossing {
    LS_NONE = 0,     /* purely local */
    LS_FETCH,        /* see intervals of global positions owned by others; adjoint: add back to the owners */
    LS_GATHER,       /* every rank's piece, in rank order; adjoint: reduce-scatter */
    LS_REDUCE,       /* all ranks' summaries combined by a monoid */
    LS_SCAN,         /* the monoid over the ranks before this one */
    LS_REVERSE_SCAN, /* the monoid over the ranks after this one */
    LS_RING,         /* key/value blocks visit every rank */
    LS_CROSSINGS
} ls_crossing;
typedef struct ls_traffic {
    uint64_t sent[LS_CROSSINGS], predicted[LS_CROSSINGS], messages[LS_CROSSINGS];
} ls_traffic;
const char *ls_crossing_name(ls_crossing crossing);
void ls_context_traffic(const ls_context *ctx, ls_traffic *traffic);

/* ------------------------------------------------------------------------------------------------ shard */

/* Which global positions each rank owns: rank p has [bounds[p], bounds[p+1]), bounds[0] = 0, bounds[size] = length. */
typedef struct ls_shard {
    int64_t length; /* of the whole sequence, padding included */
    int64_t lo, n;  /* this rank owns [lo, lo + n); n may be 0 */
    int rank, size;
    int64_t *bounds; /* (size + 1) */
} ls_shard;

/* As even as possible: the first length % size ranks own one more. Not collective. Free with ls_shard_free. */
ls_status ls_shard_even(const ls_context *ctx, int64_t length, ls_shard *shard);
/* Collective: every rank says how many positions it owns. */
ls_status ls_shard_local(ls_context *ctx, int64_t n, ls_shard *shard);
void ls_shard_free(ls_shard *shard);

/* ------------------------------------------------------------------------------------------------ attention */

typedef enum ls_pattern {
    LS_NS = 0, /* noncausal self */
    LS_CS = 1, /* causal self */
    LS_NC = 2, /* noncausal cross: queries and keys are different sequences */
    LS_CC = 3  /* causal cross: output t depends on queries 0..t and on every key */
} ls_pattern;
const char *ls_pattern_name(ls_pattern pattern); /* "noncausal self", ... */

typedef enum ls_level { LS_LEVEL_CORE = 0, LS_LEVEL_LAYER = 1 } ls_level;

/* How rows lie in memory. Core tensors are (B,H,T,d), (B,T,H,d) or (T,B,H,d); layer tensors are (B,T,E) for the first
 * two (batch first) and (T,B,E) for the last. Padding masks are (B,T) always. s4d has no heads: its core, too, takes
 * rows (B,T,E) or (T,B,E), and gives rows (channels E) wide. */
typedef enum ls_layout { LS_BHTD = 0, LS_BTHD = 1, LS_TBHD = 2 } ls_layout;

#define LS_MAX_OPTIONS 16
typedef struct ls_attention_options {
    const char *mechanism; /* "softmax", "abc", ... : a name from ls_mechanism_name, which is not kept */
    ls_pattern pattern;
    ls_level level;
    ls_layout layout;
    int64_t embed_dim, num_heads; /* embed_dim = num_heads * head dimension; at most 65535 heads */
    double scale;                 /* of the logits; 0: head dimension ^ (-1/2) */
    double dropout;               /* of attention probabilities, in training (softmax) */
    uint32_t stream;              /* random stream, at most 65535: give each attention of a model its own */
    double value[LS_MAX_OPTIONS]; /* the mechanism's own options in the order of its table: use ls_attention_set */
} ls_attention_options;

/* A mechanism's own option, e.g. abc's num_slots. */
typedef struct ls_option_info {
    const char *name, *symbol; /* the field's name; the letter of the papers and of the golden files */
    double initial, min, max;
    int is_integer;
    const char *help;
} ls_option_info;

/* The table of mechanisms, for programs that list or choose them. name is NULL past the end.
 *
 *   softmax     Vaswani et al., 2017          lara        Zheng et al., 2022
 *   local       Luong et al., 2015            cosformer   Qin et al., 2022
 *   abc         Peng et al., 2022             probsparse  Zhou et al., 2021
 *   nystrom     Xiong et al., 2021            s4d         Gu et al., 2022
 *   performer   Choromanski et al., 2021      longshort   Zhu et al., 2021: at layer level alone */
const char *ls_mechanism_name(int index);
/* Its own options, *count of them (count may be NULL); NULL where it has none, or there is no such mechanism. */
const ls_option_info *ls_mechanism_options(const char *mechanism, int *count);
int ls_mechanism_has(const char *mechanism, ls_pattern pattern);      /* 1 if forward and backward exist */
int ls_mechanism_has_step(const char *mechanism, ls_pattern pattern); /* 1 if step exists */
int ls_mechanism_has_level(const char *mechanism, ls_level level);    /* 0: projections are part of it (longshort) */
/* The phases of the forward pass in order, with default options on a long sequence: name, and what crosses ranks before
 * each. NULL past the end. */
const char *ls_mechanism_phase(const char *mechanism, ls_pattern pattern, int index, ls_crossing *crossing);

/* Everything at its default, for a known mechanism. */
ls_status ls_attention_defaults(const char *mechanism, ls_attention_options *options);
/* Sets the mechanism's own option by its name or symbol; refuses unknown names and values out of range. */
ls_status ls_attention_set(ls_attention_options *options, const char *name, double value);

/* Not collective: what ls_attention_create would refuse, before there are any ranks. */
ls_status ls_attention_check(const ls_attention_options *options);

typedef struct ls_attention ls_attention;
/* Collective. Refuses an unsupported pattern ("probsparse: causal cross attention is not supported") and impossible
 * shapes before anything is allocated. Free with ls_attention_free, which is not collective, nor are ls_saved_free and
 * ls_state_free; before the context. */
ls_status ls_attention_create(ls_context *ctx, const ls_attention_options *options, ls_attention **attention);
void ls_attention_free(ls_attention *attention);

/* Parameters: one flat vector, the tensors one after the other in the order of this list. Linear weights are (out,in),
 * y = x Wᵀ + b. */
#define LS_MAX_PARAMS 40
typedef struct ls_param_info {
    const char *name; /* "q_proj.weight", "phi_k", ... */
    int ndim;
    int64_t dim[4];
    int64_t offset, count; /* in ls_real, within the flat vector */
    enum {
        LS_INIT_ZERO,
        LS_INIT_ONE,
        LS_INIT_NORMAL,
        LS_INIT_UNIFORM,
        LS_INIT_IDENTITY, /* normal noise around the unit matrix, dim[0] = dim[1] */
        LS_INIT_CONSTANT, /* init_scale */
        LS_INIT_LOG_STEP, /* logarithms of step sizes: uniform in [ln 0.001, ln 0.1] (Gu et al., 2022) */
        LS_INIT_INVERSE   /* n along the last axis, of N/2: N/π (N/(2n + 1) - 1), S4D-Inv of the same paper */
    } init;
    double init_scale; /* standard deviation, half the width, or the constant */
} ls_param_info;
int ls_attention_num_params(const ls_attention *attention);
/* Valid as long as the attention; NULL past the end. */
const ls_param_info *ls_attention_param(const ls_attention *attention, int index);
/* 1 for a matrix that all rows of the layer pass through. */
int ls_attention_is_projection(const ls_attention *attention, int index);
int64_t ls_attention_param_count(const ls_attention *attention); /* reals in the flat vector */

/* The sequences of a call. For self attention keys == queries (or NULL). Same batch on every rank. */
typedef struct ls_attention_shape {
    int64_t batch;
    const ls_shard *queries, *keys;
} ls_attention_shape;

/* What goes in; all of it this rank's rows. Which optional pointers are given must be the same on all ranks (an empty
 * rank passes any non-NULL pointer). Layer level: value may be NULL, then value = key; and key in self attention, then
 * key = query. */
typedef struct ls_attention_io {
    const ls_real *query, *key, *value;
    const uint8_t *query_padding_mask; /* (B,T) 1 = ignore: output and gradient 0; self attention: one of the two may be
                                        * NULL, then the other serves for both */
    const uint8_t *key_padding_mask; /* (B,S); s4d, whose queries are its keys, takes the other where both are given */
    /* Documents packed into one sequence: ids (B,T) and (B,S), a document is a run of equal ids >= 0, and attention
     * stays within it: its rows are those of the document alone, positions from 0. Rows with ids < 0 belong to none:
     * their core output is 0. Self attention: one of the two may be NULL; cross attention: queries see the keys of the
     * same id. Not together with attn_mask, dropout_mask, weights, noise, samples or selected; not in a step,
     * nor with dry_size > 1, where nobody could tell which documents lie on the other ranks or go on there. */
    const int32_t *query_segments, *key_segments;
    const ls_real *attn_mask; /* softmax: additive, this rank's queries x all keys: (T, S_all), or with
                               * attn_mask_per_head (B*H, T, S_all) */
    int attn_mask_per_head;
    const ls_real *dropout_mask; /* softmax: multiplies the probabilities, (B,H,T,S_all): 0 or 1/keep; instead of
                                  * options.dropout */
    ls_real *weights;            /* out, softmax: (B,T,S_all) with need_weights, (B,H,T,S_all) with
                                  * need_head_weights; before dropout */
    int need_weights, need_head_weights;
    int training;    /* 0: no dropout, no fresh noise, the features of draw 0 */
    uint64_t sample; /* random streams: global number of batch row 0, same on all ranks; row b is sample + b. Of it,
                      * and of draw, the low 32 bits count */
    uint64_t draw;   /* performer, probsparse, in training: which set of random features or samples, e.g. the optimizer
                      * step; same on all ranks */

    /* Random numbers given instead of drawn. Each belongs to one mechanism, the others refuse it. */
    const ls_real *features; /* performer: (H,m,d), the same on every rank, in every step and for its source */
    const ls_real *noise;    /* lara: (B,H,landmarks,d), the same on every rank; taken as training noise */
    const int32_t *samples;  /* probsparse: for this rank's queries the global keys to sample, (T,U) or, with
                              * samples_per_batch, (B,T,U), of which row b uses its first U_b = min(f ceil(ln n), n)
                              * columns, n its unpadded keys; -1 in the others */
    int64_t num_samples;     /* U */
    int samples_per_batch;
    uint8_t *selected; /* out, probsparse: (B,H,T), 1 where the query was one of the top; may be NULL */
} ls_attention_io;

/* What forward keeps for backward. Reusable, also by another attention of the context: it belongs to the last forward
 * call that was given it. Memory grows to the largest use, in forward: making one is not collective. Free with
 * ls_saved_free. */
typedef struct ls_saved ls_saved;
ls_status ls_saved_create(ls_attention *attention, ls_saved **saved);
void ls_saved_free(ls_saved *saved);
size_t ls_saved_bytes(const ls_saved *saved); /* on the device, and lists in host memory */

/* Collective. out: like query (s4d's core: channels times as wide), in memory that no input has. saved NULL: no
 * backward will follow. The inputs, params and out must stay unchanged until backward. Where the call fails, saved
 * holds no call, and out, unless the call was refused (LS_ERR_ARGUMENT, LS_ERR_MEMORY), may hold anything. */
ls_status ls_attention_forward(ls_attention *attention, const ls_attention_shape *shape, const ls_attention_io *io,
                               const ls_real *params, ls_real *out, ls_saved *saved);

/* Gradients. Of activations: overwritten; where inputs were the same rows in forward (one pointer, and as many of each)
 * the sum arrives in the first of query, key, value that names it, and the others are not written. params: this rank's
 * share is added; sum over ranks with ls_all_reduce_sum. Any pointer may be NULL: not wanted (layer level only). None
 * shares memory with another, or with an input, out or dout. */
typedef struct ls_attention_grads {
    ls_real *query, *key, *value, *params;
} ls_attention_grads;
/* Collective. The shape, io, params and out of the forward call, and its saved, which stays valid; another shape, and
 * another training, sample, draw, need_weights or choice of optional inputs in io, are refused (LS_ERR_ARGUMENT). */
ls_status ls_attention_backward(ls_attention *attention, const ls_attention_shape *shape, const ls_attention_io *io,
                                const ls_real *params, const ls_real *out, const ls_real *dout, ls_saved *saved,
                                const ls_attention_grads *grads);

/* ------------------------------------------------------------------------------------------------ step */

/* Incremental state of one attention for a batch of sequences. */
typedef struct ls_state ls_state;
/* Collective; batch and max_length are the same on all ranks. max_length: the most tokens that will be fed to a causal
 * self state (rows of caches are reserved). */
ls_status ls_state_create(ls_attention *attention, int64_t batch, int64_t max_length, ls_state **state);
void ls_state_free(ls_state *state);
size_t ls_state_bytes(const ls_state *state);
/* Collective. Cross attention: takes key, value and key_padding_mask of io, sharded as shape->keys, and summarises them
 * once (static_kv). The inputs are not needed afterwards. A call that is refused leaves the source that the state had
 * before, on all ranks; but where memory for the new one is lacking, or the transport fails, there is none, and steps
 * are refused until ls_state_source succeeds. Tokens that were fed stay counted: positions go on. */
ls_status ls_state_source(ls_attention *attention, ls_state *state, const ls_attention_shape *shape,
                          const ls_attention_io *io, const ls_real *params);
/* Collective. One token for each batch row: every rank passes the same rows (B,1,E), or (B,H,1,d) at core level, and
 * gets the same output. Masks of io are (B,1). Dropout is off. */
ls_status ls_attention_step(ls_attention *attention, ls_state *state, const ls_attention_io *io, const ls_real *params,
                            ls_real *out);
/* New batch row b continues old row index[b] (beam search). Not collective, but every rank does it with the same index:
 * where one did not, or was refused, the next step is refused on all ranks, until all have been reordered alike. */
ls_status ls_state_reorder(ls_state *state, const int64_t *index);

#ifdef __GNUC__
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
#endif
