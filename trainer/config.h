/* The configuration of a run: YAML sections with every default written down once, in the table of config.c. */
#ifndef LS_CONFIG_H
#define LS_CONFIG_H

#include "status.h"

#include <stdio.h>

typedef enum { ACTIVATION_GELU = 0, ACTIVATION_RELU = 1 } config_activation;
typedef enum { SCHEDULE_COSINE = 0, SCHEDULE_INVERSE_SQRT = 1, SCHEDULE_CONSTANT = 2 } config_schedule;

/* One attention of the model: mechanism and options, resolved through ls_attention_defaults / ls_attention_set. */
typedef struct config_attention {
    char mechanism[32];
    double dropout; /* of attention probabilities */
    double scale;   /* 0: the default */
    double value[LS_MAX_OPTIONS];
} config_attention;

typedef struct config {
    struct {
        char path[1024];                /* HDF5 file made by `longspan pack` */
        int64_t max_source, max_target; /* tokens; longer documents are cut; 0: no limit */
        int verify;                     /* check digests when opening */
    } data;
    struct {
        int64_t embed_dim, ffn_dim, num_heads, encoder_layers, decoder_layers;
        double dropout; /* of embeddings and residual branches */
        config_activation activation;
        int tie_embeddings; /* source table = target table = output projection */
        config_attention encoder, decoder, cross;
    } model;
    struct {
        int64_t steps, batch, accumulation; /* batch: sequences per optimizer step, over all ranks and micro-batches */
        uint64_t seed;
        double learning_rate, min_learning_rate;
        int64_t warmup_steps;
        config_schedule schedule;
        int64_t short_length, short_steps, lengthen_steps; /* sequence length warm-up, see schedule_length */
        double weight_decay, beta1, beta2, epsilon;
        double clip_norm; /* 0: none */
        double label_smoothing;
        int64_t evaluate_every, evaluate_documents; /* steps (0: only at the end); documents of valid (0: all) */
        int64_t save_every, keep;                   /* steps (0: only at the end); recent checkpoints kept */
        int recompute;                              /* layers run forward again in backward: less memory */
        ls_precision precision;                     /* of products, on a GPU */
    } train;
    struct {
        int64_t sequence;  /* ranks that share each sequence; 0: all of them */
        char transport[8]; /* auto, mpi, nccl */
    } parallel;
    struct {
        char directory[1024]; /* checkpoints, metrics.jsonl, config.yaml */
    } run;
    char device[8]; /* cpu, cuda */
} config;

enum { CONFIG_LARGEST = 1 << 20 }; /* bytes; more is no configuration */
/* Defaults, then the text of a file, called `name` in messages, then each "section.key=value" of set[0..nset). Unknown
 * keys, wrong types and out-of-range values are LS_ERR_ARGUMENT with file, line and key in the message. A mechanism
 * changed by set starts from its own options: those in the file were meant for the other one. */
ls_status config_parse(const char *name, const char *text, size_t size, const char *const *set, int nset, config *c);
/* The attentions of a model, and what the library is to be asked for: but layout and stream. */
typedef enum { PLACE_ENCODER, PLACE_DECODER, PLACE_CROSS, PLACES } config_place;
ls_status config_attention_options(const config *c, config_place place, ls_attention_options *o);
/* What can be checked without data or ranks: divisibility, patterns, ranges. Called by config_parse. */
ls_status config_check(const config *c);
/* What a new training needs besides, and what would have no effect in it. Of a checkpoint nobody asks that. */
ls_status config_check_training(const config *c);
/* Whether results of the model depend on how far a batch is padded, see ls_mechanism.counts_padding. */
int config_counts_padding(const config *c);
/* A mechanism by which what a row of a batch gives depends on the rows beside it, see ls_mechanism.mixes_rows; NULL:
 * none. */
const char *config_mixes_rows(const config *c);
/* Refuses sequences of so many positions (target: with its end) where a mechanism is told to expect shorter ones. */
ls_status config_fits(const config *c, int64_t source_length, int64_t target_length);
/* The longest target (with its end) that it lets pass. */
int64_t config_longest_target(const config *c);
/* The resolved configuration as YAML text that config_parse reads back to the same values; to be freed. */
ls_status config_text(const config *c, char **text);

/* One row of the table of keys, which drives reading, --set, writing and the reference alike. */
typedef enum config_kind {
    KEY_WHOLE,     /* int64_t; 64K and 1M are understood */
    KEY_SEED,      /* uint64_t */
    KEY_REAL,      /* double */
    KEY_WORD,      /* an enum or a boolean: one of words, stored as its index */
    KEY_TEXT,      /* char[size]; one of words where there are any */
    KEY_MECHANISM, /* char[size]: the name of a mechanism */
    KEY_OPTION     /* an option of whichever mechanism the attention has: range and default are the mechanism's */
} config_kind;
typedef struct config_key {
    char path[80]; /* "model.embed_dim" */
    config_kind kind;
    size_t offset, size;      /* of the field in config; options: of the config_attention */
    const char *range;        /* "[0, 1)": 0 <= x < 1 */
    const char *const *words; /* NULL-terminated, or NULL */
    const char *initial;      /* the default as text */
    const char *help;
} config_key;
/* The value as config_text writes it; "" for an option that the mechanism has not. */
void config_value(const config_key *key, const config *c, char *text, size_t size);
/* NULL past the end. */
const config_key *config_key_at(int index);
/* The first key in which two configurations mean another model; their dropout may differ. NULL: none. */
const config_key *config_other_model(const config *a, const config *b);
/* Every key with its default, range and a line of help, then the options of every mechanism. */
void config_reference(FILE *out);

/* The word of a NULL-terminated list that `word` was probably meant to be; NULL where none is near. */
const char *nearest_word(const char *word, const char *const *list);

#endif
