/* `longspan SUBCOMMAND ...`: starts MPI, makes the context of all ranks, calls the subcommand, and is the only part of
 * Longspan that ends the program. Runs under mpirun, srun, or alone. */
#include "trainer.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name, *summary;
    int (*run)(int argc, char **argv, ranks *r);
} commands[] = {
    {"pack", "make a data set from text", command_pack},
    {"train", "train a model, or go on training it", command_train},
    {"eval", "measure how well a checkpoint predicts a split", command_eval},
    {"generate", "write the target of a source, byte by byte", command_generate},
    {"inspect", "show what a data set or checkpoint holds", command_inspect},
    {"bench", "time the mechanisms, with memory and bytes exchanged", command_bench},
    {"info", "show what this build can do", command_info},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void help(void)
{
    printf("usage: longspan SUBCOMMAND ...      longspan SUBCOMMAND --help      longspan --version\n"
           "\n"
           "Trains encoder-decoder models on sequences that are sharded over MPI ranks:\n"
           "mpirun -n 4 longspan train run.yaml\n"
           "\n");
    for (int i = 0; i < COMMANDS; i++) printf("  %-10s %s\n", commands[i].name, commands[i].summary);
    printf("\n"
           "Exit status: 0 done, 1 a bug or a failed GPU, 2 wrong usage or configuration, 3 a damaged or wrong\n"
           "file, 4 a file cannot be read or written, 5 loss or gradient not finite, 6 out of memory, 7 the transport\n"
           "failed.\n");
}

static int dispatch(int argc, char **argv, ranks *r)
{
    const char *names[COMMANDS + 1] = {0};
    for (int i = 0; i < COMMANDS; i++) {
        names[i] = commands[i].name;
        if (argc > 1 && strcmp(argv[1], names[i]) == 0) return commands[i].run(argc - 1, argv + 1, r);
    }
    if (argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)) {
        if (r->rank == 0) help();
        return EXIT_OK;
    }
    if (argc > 1 && strcmp(argv[1], "--version") == 0) {
        if (r->rank == 0) printf("longspan %s\n", LS_VERSION_STRING);
        return EXIT_OK;
    }
    if (argc < 2) return report_error(r, ls_fail(LS_ERR_ARGUMENT, "which subcommand? See longspan --help"));
    const char *near = nearest_word(argv[1], names);
    return report_error(r, ls_fail(LS_ERR_ARGUMENT, "unknown subcommand '%s'%s%s%s; see longspan --help", argv[1],
                                   near ? " (did you mean " : "", near ? near : "", near ? "?)" : ""));
}

/* OpenBLAS reads its environment when it is loaded, so a better choice of its kernels takes a new start. Where that
 * fails, or the user has chosen, this one goes on. */
static void choose_blas_kernels(char **argv)
{
    const char *better = ls_blas_better_kernels();
    if (better == NULL || getenv("OPENBLAS_CORETYPE") != NULL) return;
    if (setenv("OPENBLAS_CORETYPE", better, 1) == 0) execv("/proc/self/exe", argv);
}

/* What was started with a standard stream closed (`<&-`, some batch systems) must not give its number to the next thing
 * that is opened: results would go into a pipe of MPI or a file, and reading would wait for ever. Opened the wrong way
 * round, so that using it still fails. */
static void hold_standard_streams(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0) (void)open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

int main(int argc, char **argv)
{
    int provided;
    choose_blas_kernels(argv);
    hold_standard_streams();
    signal(SIGXFSZ, SIG_IGN); /* a file that may not grow (ulimit -f) is told like a full disk */
    if (MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS) return EXIT_COMM;
    ranks r = {.groups = 1};
    MPI_Comm_dup(MPI_COMM_WORLD, &r.comm);
    MPI_Comm_set_errhandler(r.comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(r.comm, &r.rank);
    MPI_Comm_size(r.comm, &r.size);
    const ls_context_options options = {.comm = r.comm, .device = LS_CPU};
    ls_status status = ls_context_create(&options, &r.world);
    r.gradients = r.world;
    if (status == LS_OK) status = same_arguments(&r, argc, argv);
    int code = status == LS_OK ? dispatch(argc, argv, &r) : report_error(&r, status);
    /* standard output is a result: when it could not be written, that is a failure */
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == EXIT_OK) {
        code = report_error(&r, ls_fail(LS_ERR_IO, "standard output cannot be written"));
    }
    if (code == EXIT_COMM || r.lost) MPI_Abort(r.comm, code);        /* the others may wait for this rank for ever */
    MPI_Allreduce(MPI_IN_PLACE, &code, 1, MPI_INT, MPI_MAX, r.comm); /* a launcher may look at any rank's */
    ranks_close(&r);
    ls_context_free(r.world);
    MPI_Comm_free(&r.comm);
    MPI_Finalize();
    return code;
}
