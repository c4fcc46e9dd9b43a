/* Checkpoints: one HDF5 file for a run at a step, whatever the rank count and layout.
 *
 * attributes: format = "longspan-checkpoint", version = 1, step, samples (data position: samples consumed), seed,
 * count, data_digest, best_nll, config (YAML text), digest (uint64, XXH3 over the names, shapes and digests of all
 * tensors), state_digest (uint64, XXH3 over all attributes before it) /params/NAME, /adam_m/NAME, /adam_v/NAME:
 * float32, each with attribute digest (uint64, XXH3 of its bytes). Names: step-000123.h5 in the run directory, best.h5.
 * Written as .NAME.tmp.PID, synced (file and directory), renamed, so a name that exists is whole. The run directory
 * belongs to one run: what lies there under a temporary name is a leftover of a save that died, and the next save
 * removes it. */
#ifndef LS_CHECKPOINT_H
#define LS_CHECKPOINT_H

#include "model.h"

enum { CHECKPOINT_VERSION = 1 };
#define CHECKPOINT_FORMAT "longspan-checkpoint"

typedef struct training_state {
    int64_t step, samples;
    uint64_t seed, data_digest;
    double best_nll;                   /* per token, valid; INFINITY before the first evaluation */
    ls_real *params, *adam_m, *adam_v; /* (model_count) each, the caller's */
} training_state;

/* Rank 0 only. Saves as step-NNNNNN.h5, then removes all but the `keep` newest step files (keep < 1: removes none);
 * or, with best = 1, as best.h5. */
ls_status checkpoint_save(const char *directory, int best, int64_t keep, const model *m, const char *config_text,
                          const training_state *s);
/* The newest step file of a directory, or best.h5 where it holds no other: it is as complete. path[0] = 0: none. */
ls_status checkpoint_latest(const char *directory, char path[1200]);
/* The same beside a checkpoint that is damaged, with everything read and held against its digest. */
ls_status checkpoint_other(const char *damaged, char path[1200]);
/* The configuration text that a checkpoint holds, to be freed. */
ls_status checkpoint_config(const char *path, char **text);
/* Rank 0 only (the caller broadcasts): fills s; adam_m and adam_v may be NULL (generate, eval). Every tensor's name,
 * shape and digest is checked before anything is returned: on failure the numbers of s are as they were, and its
 * arrays are zeroed. Of tensors that are not wanted only name and shape are checked. */
ls_status checkpoint_load(const char *path, const model *m, training_state *s);

/* What a checkpoint holds, for people who have no model at hand. Everything is read and held against its digest. */
typedef struct checkpoint_tensor {
    char name[96];
    int ndim;
    int64_t dim[4], count;
    double norm[3]; /* Euclidean, of params, adam_m, adam_v */
} checkpoint_tensor;
typedef struct checkpoint_summary {
    training_state state; /* without arrays */
    int64_t count;        /* of parameters */
    uint64_t digest;
    char *config;
    int64_t tensors;
    checkpoint_tensor *tensor; /* in the order of their names */
} checkpoint_summary;
ls_status checkpoint_summarize(const char *path, checkpoint_summary *summary);
void checkpoint_summary_free(checkpoint_summary *summary);

#endif
