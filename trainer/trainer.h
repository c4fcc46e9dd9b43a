/* The subcommands, each with the arguments after its name: they return the exit code of the program.
 * Only main.c exits; everything here reports through report_error. */
#ifndef LS_TRAINER_H
#define LS_TRAINER_H

#include "checkpoint.h"
#include "optim.h"

/* Exit codes (documented in README). */
enum {
    EXIT_OK = 0,
    EXIT_INTERNAL = 1,  /* a bug in Longspan */
    EXIT_USAGE = 2,     /* command line, configuration, impossible shape, unsupported pattern */
    EXIT_FORMAT = 3,    /* a data set or checkpoint is damaged or not what it should be */
    EXIT_IO = 4,        /* a file or directory cannot be read or written */
    EXIT_NONFINITE = 5, /* loss or gradient is not finite: the weights were not changed */
    EXIT_MEMORY = 6,
    EXIT_COMM = 7       /* the transport failed */
};
int exit_code_of(ls_status status);

/* The ranks of a run: all of them (world), and those that share each sequence. */
typedef struct ranks {
    MPI_Comm comm;                 /* of world */
    ls_context *world, *sequence;  /* sequence: NULL before ranks_split */
    int rank, size;   /* in world */
    int group, groups; /* which sequences: data-parallel group */
} ranks;

int command_pack(int argc, char **argv, ranks *r);
int command_train(int argc, char **argv, ranks *r);
int command_eval(int argc, char **argv, ranks *r);
int command_generate(int argc, char **argv, ranks *r);
int command_inspect(int argc, char **argv, ranks *r);
int command_info(int argc, char **argv, ranks *r);

/* Collective: splits world into groups of `sequence` ranks (0: all) and makes r->sequence. */
ls_status ranks_split(ranks *r, int64_t sequence, uint64_t seed);
/* "longspan: SENTENCE" on standard error, by rank 0 alone, followed by nothing. Returns exit_code_of(status). */
int report_error(const ranks *r, ls_status status);

/* Collective over world: rank 0 reads a file (or standard input for "-"), everyone gets the bytes; to be freed. */
ls_status read_everywhere(const ranks *r, const char *path, char **bytes, size_t *size);
/* Collective over world: rank 0's bytes to everyone. */
ls_status broadcast_bytes(const ranks *r, void *bytes, size_t size);
/* Collective: rank 0 loads a checkpoint, everyone gets it. */
ls_status load_everywhere(const ranks *r, const char *path, const model *m, training_state *s);

#endif
