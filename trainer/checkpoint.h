/* Checkpoints: one HDF5 file for a run at a step, whatever the rank count and layout.
 *
 * attributes: format = "longspan-checkpoint", version = 1, step, samples (data position: samples consumed), seed, count,
 *   data_digest, best_nll, config (YAML text), digest (uint64, XXH3 over all tensors' digests)
 * /params/NAME, /adam_m/NAME, /adam_v/NAME: float32, each with attribute digest (uint64, XXH3 of its bytes).
 * Names: step-000123.h5 in the run directory, best.h5. Written as .NAME.tmp, synced (file and directory), renamed, so a
 * name that exists is whole. */
#ifndef LS_CHECKPOINT_H
#define LS_CHECKPOINT_H

#include "model.h"

enum { CHECKPOINT_VERSION = 1 };

typedef struct training_state {
    int64_t step, samples;
    uint64_t seed, data_digest;
    double best_nll;              /* per token, valid; INFINITY before the first evaluation */
    ls_real *params, *adam_m, *adam_v; /* (model_count) each, the caller's */
} training_state;

/* Rank 0 only. Saves as step-NNNNNN.h5 (or best.h5 with best = 1), then removes all but the `keep` newest step files. */
ls_status checkpoint_save(const char *directory, int best, int64_t keep, const model *m, const char *config_text,
                          const training_state *s);
/* The newest step file of a directory; path[0] = 0 where there is none. */
ls_status checkpoint_latest(const char *directory, char path[1200]);
/* The configuration text that a checkpoint holds, to be freed. */
ls_status checkpoint_config(const char *path, char **text);
/* Rank 0 only (the caller broadcasts): fills s; adam_m and adam_v may be NULL (generate, eval). Every tensor's name,
 * shape and digest is checked before anything is returned. */
ls_status checkpoint_load(const char *path, const model *m, training_state *s);

#endif
