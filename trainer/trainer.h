/* The subcommands and what they share. argv[0] is the subcommand's name, as getopt_long wants it; every rank has the
 * same arguments. A subcommand returns the exit code of the program, the same on every rank. Only main.c exits;
 * everything here reports through report_error. */
#ifndef LS_TRAINER_H
#define LS_TRAINER_H

#include "checkpoint.h"
#include "context.h"
#include "optim.h"

/* Exit codes (documented in README). */
enum {
    EXIT_OK = 0,
    EXIT_INTERNAL = 1,  /* a bug in Longspan, or a GPU that failed */
    EXIT_USAGE = 2,     /* command line, configuration, impossible shape, unsupported pattern */
    EXIT_FORMAT = 3,    /* a data set or checkpoint is damaged or not what it should be */
    EXIT_IO = 4,        /* a file or directory cannot be read or written */
    EXIT_NONFINITE = 5, /* loss or gradient is not finite: the weights were not changed */
    EXIT_MEMORY = 6,
    EXIT_COMM = 7 /* the transport failed */
};
int exit_code_of(ls_status status);

/* The ranks of a run: all of them (world), and those that share each sequence. */
typedef struct ranks {
    MPI_Comm comm;                /* of world */
    ls_context *world, *sequence; /* sequence: NULL before ranks_split */
    ls_context *gradients;        /* all ranks, where the tensors are: world, or a context of its own on a GPU */
    int rank, size;               /* in world */
    int group, groups;            /* which sequences: data-parallel group */
    int lost; /* this rank has failed, and the others may wait for it where they do not hear of it */
} ranks;

int command_pack(int argc, char **argv, ranks *r);
int command_train(int argc, char **argv, ranks *r);
int command_eval(int argc, char **argv, ranks *r);
int command_generate(int argc, char **argv, ranks *r);
int command_inspect(int argc, char **argv, ranks *r);
int command_bench(int argc, char **argv, ranks *r);
int command_info(int argc, char **argv, ranks *r);

/* Collective: splits world into groups of `sequence` ranks (0: all) and makes r->sequence and r->gradients, on the
 * device that the configuration asks for; on a GPU each rank takes the one of its number on its machine. */
ls_status ranks_split(ranks *r, const config *c, int64_t sequence);
/* Collective: which device of that kind is this rank's. A rank's number on its machine says which GPU is its own; where
 * there are fewer, ranks share. */
ls_status ranks_device(const ranks *r, ls_device device, int *number);
void ranks_close(ranks *r); /* collective: what ranks_split made */
/* Local: n > 0 reals where the tensors are, all 0, called `what` where they cannot be had: then *x is NULL. Given back
 * by device_free. */
ls_status device_reals(const ranks *r, const char *what, int64_t n, ls_real **x);
void device_free(const ranks *r, ls_real *x);
/* "longspan: SENTENCE" on standard error, by rank 0 alone (and by a rank that is lost, which says its number), followed
 * by nothing. Returns exit_code_of(status). */
int report_error(const ranks *r, ls_status status);
/* Collective: ls_agree over world, except that what rank 0 has to say itself is not prefixed with "rank 0": most of it
 * is about files and arguments, which all ranks share. Nobody is asked where the transport fails or this rank is lost:
 * main then ends the others. */
ls_status agree(const ranks *r, ls_status mine);

/* Local: a whole file, or standard input for "-"; *bytes, NULL before, is to be freed, after a failure too. One of more
 * than `most` bytes, perhaps without an end, is refused before it takes more memory than that. */
ls_status read_file(const char *path, size_t most, char **bytes, size_t *size);
/* Collective over world: rank 0 reads it, everyone gets the bytes. */
ls_status read_everywhere(const ranks *r, const char *path, size_t most, char **bytes, size_t *size);
/* Collective over world: refuses arguments that are not those of rank 0, or ranks would wait for one another for ever,
 * or train what none of them was asked to. */
ls_status same_arguments(const ranks *r, int argc, char *const *argv);
/* Collective over world: rank 0's bytes to everyone. */
ls_status broadcast_bytes(const ranks *r, void *bytes, size_t size);
/* Collective: rank 0 loads a checkpoint, everyone gets it; the arrays of s are where the tensors are. */
ls_status load_everywhere(const ranks *r, const char *path, const model *m, training_state *s);
/* Rank 0: saves a state whose arrays are where the tensors are. */
ls_status save_state(const ranks *r, const config *c, int best, const model *m, const char *config_text,
                     const training_state *s);
/* Refuses a configuration that means another model than the checkpoint's. */
ls_status same_model(const char *checkpoint, const config *trained, const config *wanted);
/* Collective: the configuration that a checkpoint holds, with each "section.key=value" of set applied, which may not
 * make it another model. All ranks share each sequence unless set says otherwise. Its device: the CPU where this
 * machine has no GPU for this build, or set says so; then precision and transport are those of the CPU unless set says
 * otherwise. */
ls_status checkpoint_config_everywhere(const ranks *r, const char *path, const char *const *set, int nset, config *c);
/* Alone: DIRECTORY/NAME has these bytes, or what it had before; never a part. */
ls_status write_file(const char *directory, const char *name, const char *bytes, size_t size);
/* Seconds on a clock that only goes forward. */
double seconds_now(void);

/* One value that may be given many times. */
typedef struct text_list {
    const char **item;
    int count;
} text_list;
ls_status text_list_add(text_list *list, const char *item);
/* What getopt_long complained about: an unknown option, or one without its value. */
ls_status refuse_option(const char *command, int answer, char *const *argv, const char *const *known);
/* A whole number from min on. */
ls_status read_count(const char *command, const char *option, const char *text, int64_t min, int64_t *value);

/* How well a model predicts a split. */
typedef struct evaluation {
    double nll;                /* nats per label, the end of each target included */
    int64_t tokens, documents; /* labels */
    int stopped;               /* on some rank `stop` said so: there is no result */
} evaluation;
typedef struct evaluation_choice {
    const char *split;
    int64_t documents;     /* the first so many in file order; 0: all */
    int shuffle;           /* each target gets the source of another document, half of the split further on */
    int (*stop)(void *of); /* asked before each batch and at the end; NULL: never */
    void *of;
} evaluation_choice;
/* Collective over world. The same value, up to rounding, for any number of ranks. */
ls_status evaluate_split(const ranks *r, const config *c, dataset *data, model *m, const ls_real *params,
                         const evaluation_choice *choice, evaluation *out);
double bits_per_byte(double nll);

#endif
