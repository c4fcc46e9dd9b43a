/* `longspan train`: refuses what it can before anything is created, then takes steps until the last one or a signal.
 *
 * Every rank knows the whole global batch of a step, see step.h, and how many labels it has. Nothing outlives a step
 * but training_state, which is what a checkpoint holds: so a run that was resumed is the run that was not interrupted.
 */
#include "metrics.h"
#include "step.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

static const char usage[] =
    "usage: longspan train CONFIG.yaml [options]\n"
    "\n"
    "Trains a model; run it under mpirun or srun for more than one rank. Checkpoints, metrics.jsonl and the resolved\n"
    "config.yaml go to run.directory, which only one training uses at a time. SIGTERM, SIGUSR1 and Ctrl-C end the run\n"
    "after the current step, or the current batch of an evaluation, with a checkpoint; an evaluation that is due\n"
    "then, or was cut short, is made as a whole when the run goes on. mpirun passes SIGUSR1 on to the ranks, but\n"
    "after SIGTERM or Ctrl-C it kills them within about 2 seconds: where a step takes longer, send SIGUSR1 to mpirun,\n"
    "or SIGTERM to a rank.\n"
    "\n"
    "  --set KEY=VALUE    change a key of the configuration, e.g. train.steps=100; may be given many times\n"
    "  --resume WHAT      none: start anew (default; refuses a directory that holds checkpoints)\n"
    "                     auto: go on from the newest checkpoint in run.directory, if there is one (the last step,\n"
    "                     or best.h5 where it is alone)\n"
    "                     PATH: go on from this checkpoint, or from the newest one in this directory\n"
    "  --dry-run          check everything, show who would own what, write nothing\n"
    "  --help-config      the keys of a configuration with defaults and ranges\n"
    "  --help             this text\n";

enum { PATH_SIZE = 1200 };

typedef struct train_options {
    const char *file, *resume;
    text_list set;
    int dry_run, help, help_config;
} train_options;

/* LONGSPAN_TEST_FAIL=RANK:STEP:HOW, for tests: at this step the rank
 *   memory     has none (the default)     nan   gets a loss that is not a number
 *   kill       dies at once               torn  dies in the middle of the next file it writes that is not small
 *   full       finds the disk full there  lost  fails where the others do not hear of it
 *   stop1, stop2, ...  is sent SIGTERM in the evaluation after this step, when that asks for it so many times */
typedef struct rehearsal {
    int rank;
    int64_t step;
    char how[8];
    int asked;
} rehearsal;

typedef struct run {
    ranks *r;
    config c;
    char *config_text;
    char resume[PATH_SIZE]; /* the checkpoint to go on from, or "" */
    dataset *data;
    stepper w;
    int64_t *index;                 /* (batch): documents of the step */
    int64_t max_source, max_target; /* what they are cut to at the step */
    batch b;
    metrics *log;             /* rank 0 */
    int lock;                 /* rank 0: descriptor of the directory's lock, or -1 */
    ls_status late;           /* what rank 0 could not write; told at the next agreement */
    int64_t evaluated, saved; /* the last steps of which that is done */
    evaluation last;
    double seconds; /* of all steps of this process */
    int64_t tokens;
    uint64_t peak_memory, peak_device_memory;
    rehearsal test;
} run;

static volatile sig_atomic_t stop_wanted;

static void want_stop(int signal_number)
{
    (void)signal_number;
    stop_wanted = 1;
}

/* ------------------------------------------------------------------------------------------------ arguments */

static ls_status parse(int argc, char **argv, train_options *o)
{
    static const struct option options[] = {
        {"set", required_argument, NULL, 's'}, {"resume", required_argument, NULL, 'r'},
        {"dry-run", no_argument, NULL, 'd'},   {"help-config", no_argument, NULL, 'c'},
        {"help", no_argument, NULL, 'h'},      {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--set", "--resume", "--dry-run", "--help-config", "--help", NULL};
    *o = (train_options){.resume = "none"};
    int which;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        switch (which) {
        case 's':
            LS_TRY(text_list_add(&o->set, optarg));
            break;
        case 'r':
            o->resume = optarg;
            break;
        case 'd':
            o->dry_run = 1;
            break;
        case 'c':
            o->help_config = 1;
            return LS_OK;
        case 'h':
            o->help = 1;
            return LS_OK;
        default:
            return refuse_option("train", which, argv, known);
        }
    }
    if (optind != argc - 1) {
        LS_FAIL(LS_ERR_ARGUMENT, "train: %s; see longspan train --help",
                optind >= argc ? "which configuration?" : "one configuration is all it takes");
    }
    o->file = argv[optind];
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ prepare */

static ls_status read_config(const train_options *o, run *t)
{
    char *text;
    size_t size;
    LS_TRY(read_everywhere(t->r, o->file, CONFIG_LARGEST, &text, &size));
    ls_status status = config_parse(o->file, text, size, o->set.item, o->set.count, &t->c);
    free(text);
    if (status == LS_OK) status = config_text(&t->c, &t->config_text);
    if (status == LS_OK && (status = config_check_training(&t->c)) != LS_OK)
        status = ls_fail(status, "%s: %s", o->file, ls_last_error());
    return agree(t->r, status);
}

static ls_status open_data(run *t)
{
    const config *c = &t->c;
    LS_TRY(ranks_split(t->r, c, c->parallel.sequence));
    if (c->train.batch < t->r->groups) {
        LS_FAIL(LS_ERR_ARGUMENT,
                "train.batch: %lld sequences are not enough for %d groups of ranks: let more ranks share each sequence "
                "(parallel.sequence), or raise it",
                (long long)c->train.batch, t->r->groups);
    }
    LS_TRY(dataset_open(t->r->world, c->data.path, c->data.verify, &t->data));
    if (dataset_documents(t->data, "train") == 0) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: has no split train to learn from", c->data.path);
    }
    static const char *const splits[] = {"train", "valid"};
    for (int i = 0; i < 2; i++)
        LS_TRY(config_fits(c, data_cut(dataset_longest(t->data, splits[i], 0), c->data.max_source),
                           data_cut(dataset_longest(t->data, splits[i], 1), c->data.max_target) + 1));
    return LS_OK;
}

static ls_status allocate(run *t)
{
    LS_TRY(stepper_create(t->r, &t->c, &t->w));
    t->index = malloc((size_t)t->c.train.batch * sizeof *t->index);
    ls_status status = LS_OK;
    if (t->index == NULL)
        status = ls_fail(LS_ERR_MEMORY, "no memory for a list of %lld documents", (long long)t->c.train.batch);
    return agree(t->r, status);
}

/* Rank 0: which checkpoint to go on from, by what was asked and what is there. */
static ls_status choose_resume(const char *directory, const char *asked, char resume[PATH_SIZE])
{
    char newest[PATH_SIZE] = "";
    struct stat there, other;
    resume[0] = 0;
    if (stat(directory, &there) == 0) {
        if (!S_ISDIR(there.st_mode)) LS_FAIL(LS_ERR_IO, "run.directory: %s is not a directory", directory);
        LS_TRY(checkpoint_latest(directory, newest));
    }
    if (strcmp(asked, "none") == 0) {
        if (newest[0] == 0) return LS_OK;
        LS_FAIL(LS_ERR_ARGUMENT,
                "run.directory: %s is there already: go on with --resume auto, or choose another "
                "directory",
                newest);
    }
    if (strcmp(asked, "auto") == 0) {
        strcpy(resume, newest);
        return LS_OK;
    }
    if (strlen(asked) >= PATH_SIZE) LS_FAIL(LS_ERR_ARGUMENT, "--resume: the path is too long");
    if (stat(asked, &there) != 0) LS_FAIL(LS_ERR_IO, "--resume: %s: %s", asked, strerror(errno));
    if (S_ISDIR(there.st_mode)) {
        LS_TRY(checkpoint_latest(asked, resume));
        if (resume[0] == 0) LS_FAIL(LS_ERR_IO, "--resume: %s holds no checkpoint", asked);
        if (stat(resume, &there) != 0) LS_FAIL(LS_ERR_IO, "--resume: %s: %s", resume, strerror(errno));
    } else {
        strcpy(resume, asked);
    }
    /* beside other checkpoints than the one to go on from, newest would soon mean two things */
    if (newest[0] != 0 && (stat(newest, &other) != 0 || other.st_ino != there.st_ino || other.st_dev != there.st_dev)) {
        LS_FAIL(LS_ERR_ARGUMENT,
                "run.directory: %s is there, but the run is to go on from %s: choose another directory", newest,
                resume);
    }
    return LS_OK;
}

/* What must not change when a run goes on: the model except its dropout, and what decides the order of the data. */
static ls_status check_same_run(const run *t, const config *before)
{
    LS_TRY(same_model(t->resume, before, &t->c));
    if (before->train.seed != t->c.train.seed)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: was trained with train.seed=%llu, the configuration has %llu: it cannot change",
                t->resume, (unsigned long long)before->train.seed, (unsigned long long)t->c.train.seed);
    if (before->train.batch != t->c.train.batch)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: was trained with train.batch=%lld, the configuration has %lld: it cannot change",
                t->resume, (long long)before->train.batch, (long long)t->c.train.batch);
    return LS_OK;
}

/* Whether evaluations are of the same tokens as those before. */
static int same_measure(const run *t, const config *a, const config *b)
{
    const int64_t all = dataset_documents(t->data, "valid");
    const int64_t source = dataset_longest(t->data, "valid", 0), target = dataset_longest(t->data, "valid", 1);
    return data_cut(all, a->train.evaluate_documents) == data_cut(all, b->train.evaluate_documents) &&
           data_cut(source, a->data.max_source) == data_cut(source, b->data.max_source) &&
           data_cut(target, a->data.max_target) == data_cut(target, b->data.max_target);
}

/* Collective. The best before is no bar to what this run finds where it was measured otherwise, or where best.h5 stayed
 * in another directory: this one might never get one. */
static ls_status keep_best(run *t, const config *before)
{
    char path[PATH_SIZE];
    snprintf(path, sizeof path, "%s/best.h5", t->c.run.directory);
    if (t->r->rank == 0 && (access(path, F_OK) != 0 || !same_measure(t, before, &t->c))) t->w.s.best_nll = INFINITY;
    return broadcast_bytes(t->r, &t->w.s.best_nll, sizeof t->w.s.best_nll);
}

static ls_status load(run *t)
{
    config before;
    LS_TRY(checkpoint_config_everywhere(t->r, t->resume, NULL, 0, &before));
    LS_TRY(agree(t->r, check_same_run(t, &before)));
    LS_TRY(load_everywhere(t->r, t->resume, t->w.m, &t->w.s));
    if (t->w.s.data_digest != dataset_digest(t->data)) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: was trained on another data set than %s (digest %016llx, here %016llx)",
                t->resume, t->c.data.path, (unsigned long long)t->w.s.data_digest,
                (unsigned long long)dataset_digest(t->data));
    }
    if (t->w.s.samples != t->w.s.step * t->c.train.batch || t->w.s.seed != t->c.train.seed) {
        LS_FAIL(LS_ERR_FORMAT, "%s: step, samples and seed contradict its configuration: not written by Longspan",
                t->resume);
    }
    return keep_best(t, &before);
}

/* Rank 0: adds to the message about a damaged checkpoint what could be used instead. */
static ls_status name_another(const run *t, ls_status status)
{
    char message[512], other[PATH_SIZE];
    snprintf(message, sizeof message, "%s", ls_last_error());
    if (checkpoint_other(t->resume, other) != LS_OK || other[0] == 0 || strcmp(other, t->resume) == 0)
        return ls_fail(status, "%s", message);
    return ls_fail(status, "%s; %s is whole: remove what is newer, and go on with --resume auto", message, other);
}

static ls_status resume(run *t)
{
    const ls_status status = load(t);
    return status == LS_ERR_FORMAT && t->r->rank == 0 ? name_another(t, status) : status;
}

static ls_status start(run *t)
{
    t->w.s.seed = t->c.train.seed;
    t->w.s.data_digest = dataset_digest(t->data);
    t->w.s.best_nll = INFINITY;
    return stepper_init(&t->w);
}

static ls_status make_directories(const char *path)
{
    char part[PATH_SIZE];
    snprintf(part, sizeof part, "%s", path);
    for (char *at = part + 1;; at++) {
        const char end = *at;
        if (end != '/' && end != 0) continue;
        *at = 0;
        if (mkdir(part, 0777) != 0 && errno != EEXIST) {
            LS_FAIL(LS_ERR_IO, "run.directory: %s cannot be made: %s", part, strerror(errno));
        }
        *at = end;
        if (end == 0) return LS_OK;
    }
}

/* Without making any: whether the first of them that is missing could be made where it belongs. */
static ls_status check_directories(const char *path)
{
    char part[PATH_SIZE];
    struct stat found;
    snprintf(part, sizeof part, "%s", path);
    while (stat(part, &found) != 0) {
        if (errno != ENOENT) LS_FAIL(LS_ERR_IO, "run.directory: %s cannot be made: %s", part, strerror(errno));
        char *slash = strrchr(part, '/');
        if (slash == NULL)
            strcpy(part, ".");
        else
            slash[slash == part ? 1 : 0] = 0;
    }
    if (!S_ISDIR(found.st_mode)) LS_FAIL(LS_ERR_IO, "run.directory: %s is no directory", part);
    if (access(part, W_OK | X_OK) != 0)
        LS_FAIL(LS_ERR_IO, "run.directory: %s cannot be written to: %s", part, strerror(errno));
    return LS_OK;
}

static void lock_path(const char *directory, char path[PATH_SIZE])
{
    snprintf(path, PATH_SIZE, "%s/.lock", directory);
}

/* Two runs in one directory would remove each other's files. The lock goes with the process, however that ends: only
 * the file stays. Where a file system knows no locks, the user has to know. */
static ls_status lock_directory(const char *directory, int *lock)
{
    char path[PATH_SIZE];
    lock_path(directory, path);
    *lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (*lock < 0) LS_FAIL(LS_ERR_IO, "%s: cannot be written: %s", path, strerror(errno));
    if (flock(*lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        LS_FAIL(LS_ERR_ARGUMENT,
                "run.directory: another training is running in %s: wait for its end, or choose another directory",
                directory);
    return LS_OK;
}

/* A directory that was moved takes its lock along: where its name has another lock now, another run is, whose
 * checkpoints would be removed as old. */
static ls_status still_at_home(const run *t)
{
    char path[PATH_SIZE];
    struct stat here, mine;
    lock_path(t->c.run.directory, path);
    if (stat(path, &here) != 0 || fstat(t->lock, &mine) != 0) return LS_OK;
    if (here.st_dev == mine.st_dev && here.st_ino == mine.st_ino) return LS_OK;
    LS_FAIL(LS_ERR_IO,
            "run.directory: %s was moved since the training began, and is another run's now, which is left alone: "
            "stopped at step %lld; go on where it has been moved to, with --resume auto",
            t->c.run.directory, (long long)t->w.s.step);
}

/* Whether a checkpoint is one of this directory's own. */
static int goes_on_in(const char *directory, const char *checkpoint)
{
    char parent[PATH_SIZE];
    struct stat here, there;
    if (checkpoint[0] == 0) return 0;
    snprintf(parent, sizeof parent, "%s", checkpoint);
    char *slash = strrchr(parent, '/');
    if (slash != NULL) slash[slash == parent] = 0;
    return stat(directory, &here) == 0 && stat(slash != NULL ? parent : ".", &there) == 0 &&
           here.st_dev == there.st_dev && here.st_ino == there.st_ino;
}

/* Rank 0: the first thing that is created. That config.yaml could be written shows that checkpoints can. */
static ls_status create_run(run *t, const char *asked)
{
    const char *directory = t->c.run.directory;
    char now[PATH_SIZE];
    LS_TRY(make_directories(directory));
    LS_TRY(lock_directory(directory, &t->lock));
    LS_TRY(choose_resume(directory, asked, now)); /* another run may have come and gone since */
    if (strcmp(now, t->resume) != 0)
        LS_FAIL(LS_ERR_ARGUMENT, "run.directory: another training has just left %s: start again", now);
    LS_TRY(write_file(directory, "config.yaml", t->config_text, strlen(t->config_text)));
    return metrics_open(directory, goes_on_in(directory, t->resume) ? t->w.s.step : 0, &t->evaluated, &t->log);
}

/* ------------------------------------------------------------------------------------------------ plan */

static void print_shards(const char *title, int64_t tokens, int ranks_of_sequence)
{
    printf("  %-16s%lld tokens: %lld to %lld positions on each rank\n", title, (long long)tokens,
           (long long)(tokens / ranks_of_sequence), (long long)((tokens + ranks_of_sequence - 1) / ranks_of_sequence));
}

static void print_plan(const run *t)
{
    const config *c = &t->c;
    const int share = ls_context_size(t->r->sequence), groups = t->r->groups;
    const int64_t pieces = groups * c->train.accumulation;
    const double mib = (double)t->w.count * sizeof(ls_real) / 1048576;
    printf("plan of %s\n", c->run.directory);
    printf("  %-16s%d in %d group%s of %d: each group has its own sequences, its ranks share each of them\n", "ranks",
           t->r->size, groups, groups == 1 ? "" : "s", share);
    printf("  %-16s%lld sequences a step, up to %lld at once in a group\n", "batch", (long long)c->train.batch,
           (long long)((c->train.batch + pieces - 1) / pieces));
    print_shards("longest source", data_cut(dataset_longest(t->data, "train", 0), c->data.max_source), share);
    print_shards("longest target", data_cut(dataset_longest(t->data, "train", 1), c->data.max_target) + 1, share);
    printf("  %-16s%lld train, %lld valid\n", "documents", (long long)dataset_documents(t->data, "train"),
           (long long)dataset_documents(t->data, "valid"));
    printf("  %-16s%lld parameters in %d tensors\n", "model", (long long)t->w.count, model_num_tensors(t->w.m));
    printf("  %-16sparameters %.1f MiB, gradients %.1f MiB, optimizer %.1f MiB on each rank; activations come on top\n",
           "memory", mib, mib, 2 * mib);
    if (t->resume[0] != 0) printf("  %-16sfrom %s\n", "goes on", t->resume);
}

/* Said before weeks of training, not after: what `longspan generate` would refuse, and what other ranks would change.
 */
static void print_warnings(const run *t)
{
    const config *c = &t->c;
    const struct {
        const char *mechanism, *where;
        ls_pattern pattern;
    } used[] = {{c->model.decoder.mechanism, "decoder", LS_CS}, {c->model.cross.mechanism, "cross", LS_CC}};
    for (int i = 0; i < 2; i++)
        if (!ls_mechanism_has_step(used[i].mechanism, used[i].pattern))
            printf(
                "warning: model.%s.mechanism: %s cannot decode token by token, so longspan generate will refuse this "
                "model\n",
                used[i].where, used[i].mechanism);
    const char *mixes = config_mixes_rows(c);
    if (mixes != NULL && c->train.batch > 1)
        printf("warning: with these options of %s a sequence depends on those worked through with it, so losses depend "
               "on train.accumulation and on the groups of ranks (now %lld pieces of a batch)\n",
               mixes, (long long)(t->r->groups * c->train.accumulation));
}

/* ------------------------------------------------------------------------------------------------ a step */

static uint64_t bytes_sent(const ranks *r)
{
    uint64_t sum = 0;
    ls_traffic traffic;
    const ls_context *each[] = {r->world, r->sequence};
    for (int i = 0; i < 2; i++) {
        ls_context_traffic(each[i], &traffic);
        for (int k = 0; k < LS_CROSSINGS; k++) sum += traffic.sent[k];
    }
    return sum;
}

/* Labels of the whole global batch, by the lengths that every rank knows. Where padding counts, its longest rows say
 * how long every piece of it is: what a row gives does not depend on the ranks and pieces then. */
static int64_t labels_of(run *t)
{
    const int counts_padding = config_counts_padding(&t->c);
    int64_t sum = 0;
    t->b.least_source = t->b.least_target = 0;
    for (int64_t i = 0; i < t->c.train.batch; i++) {
        int64_t source, target;
        dataset_lengths(t->data, "train", t->index[i], &source, &target);
        const int64_t labels = data_cut(target, t->max_target) + 1;
        sum += labels;
        if (!counts_padding) continue;
        t->b.least_source = ls_max(t->b.least_source, data_cut(source, t->max_source));
        t->b.least_target = ls_max(t->b.least_target, labels);
    }
    return sum;
}

/* Collective over the sequence: this group's part of the gradient. */
static ls_status gradient(run *t, int64_t labels)
{
    const config *c = &t->c;
    const ranks *r = t->r;
    for (int64_t a = 0; a < c->train.accumulation; a++) {
        int64_t lo, hi;
        stepper_piece(&t->w, a, &lo, &hi);
        if (lo == hi) continue;
        LS_TRY(
            ls_agree(r->sequence, dataset_read(t->data, "train", t->index + lo, hi - lo, t->max_source, t->max_target,
                                               ls_context_rank(r->sequence), ls_context_size(r->sequence), &t->b)));
        t->b.sample = (uint64_t)(t->w.s.samples + lo);
        t->b.draw = (uint64_t)t->w.s.step + 1;
        LS_TRY(stepper_add(&t->w, &t->b, labels));
    }
    return LS_OK;
}

static ls_status rehearse(const run *t, int64_t step)
{
    const char *how = t->test.how;
    const double nan = NAN;
    if (t->test.rank != t->r->rank || t->test.step != step) return LS_OK;
    if (strcmp(how, "kill") == 0) raise(SIGKILL);
    if (strcmp(how, "nan") == 0) return ls_device_write(t->r->sequence, t->w.sums, &nan, sizeof nan);
    if (strcmp(how, "torn") == 0 || strcmp(how, "full") == 0) {
        /* beyond the limit a write fails, as main.c ignores the signal, or ends the process */
        const struct rlimit small = {.rlim_cur = 65536, .rlim_max = RLIM_INFINITY};
        if (strcmp(how, "torn") == 0) signal(SIGXFSZ, SIG_DFL);
        setrlimit(RLIMIT_FSIZE, &small);
    }
    if (strcmp(how, "lost") == 0) {
        t->r->lost = 1;
        LS_FAIL(LS_ERR_INTERNAL, "step %lld: no device (only a test: LONGSPAN_TEST_FAIL)", (long long)step);
    }
    if (strcmp(how, "memory") != 0) return LS_OK;
    LS_FAIL(LS_ERR_MEMORY, "step %lld: no memory (only a test: LONGSPAN_TEST_FAIL)", (long long)step);
}

/* The most bytes that this process has had at a time. Linux tells of the program alone; getrusage counts what started
 * it, too. */
static uint64_t peak_memory(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (file != NULL && kib == 0 && fgets(line, sizeof line, file) != NULL) sscanf(line, "VmHWM: %llu", &kib);
    if (file != NULL) fclose(file);
    if (kib > 0) return kib * 1024;
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return (uint64_t)use.ru_maxrss * 1024;
}

/* Collective. *stop: some rank was asked to end the run. */
static ls_status take_step(run *t, int *stop)
{
    const config *c = &t->c;
    const double begin = seconds_now();
    const uint64_t sent = bytes_sent(t->r);
    const int64_t step = t->w.s.step + 1;
    ls_status status = t->late;
    if (status == LS_OK) {
        status = dataset_order(t->data, c->train.seed, c->train.batch, t->w.s.samples, c->train.batch, t->index);
    }
    LS_TRY(agree(t->r, status));
    t->max_source = c->data.max_source, t->max_target = c->data.max_target;
    if (c->train.short_length > 0) {
        t->max_source = schedule_length(c, step, data_cut(dataset_longest(t->data, "train", 0), t->max_source));
        t->max_target = schedule_length(c, step, data_cut(dataset_longest(t->data, "train", 1), t->max_target));
    }
    const int64_t labels = labels_of(t);
    stepper_begin(&t->w);
    status = gradient(t, labels);
    if (status == LS_OK) status = rehearse(t, step);
    LS_TRY(agree(t->r, status));

    step_sums sums;
    const double rate = schedule_rate(c, step);
    LS_TRY(stepper_end(&t->w, labels, stop_wanted != 0, rate, &sums));
    const double norm = sqrt(sums.squares);
    if (!sums.updated) {
        char last[64] = "there is no checkpoint yet";
        if (t->saved > 0) snprintf(last, sizeof last, "the last checkpoint is of step %lld", (long long)t->saved);
        LS_FAIL(LS_ERR_NONFINITE,
                "step %lld: the loss is %g and the norm of the gradient %g: stopped before the weights changed; %s (a "
                "lower train.learning_rate or train.clip_norm may help)",
                (long long)step, fabs(sums.loss), fabs(norm), last); /* a NaN without its sign */
    }
    if (!(fabs(sums.tokens - 1) < 1e-3)) {
        LS_FAIL(LS_ERR_INTERNAL, "step %lld: the ranks together saw %g of the %lld labels", (long long)step,
                sums.tokens, (long long)labels);
    }
    *stop = sums.stop;

    uint64_t counts[3] = {bytes_sent(t->r) - sent, peak_memory(), t->r->sequence->ops->most()}, all[3] = {0};
    if (MPI_Reduce(counts, all, 3, MPI_UINT64_T, MPI_SUM, 0, t->r->comm) != MPI_SUCCESS) {
        LS_FAIL(LS_ERR_COMM, "mpi: adding up the bytes of step %lld failed", (long long)step);
    }
    const double seconds = seconds_now() - begin;
    t->seconds += seconds;
    t->tokens += labels;
    t->peak_memory = all[1];
    t->peak_device_memory = all[2];
    const step_metrics line = {.step = step,
                               .steps = c->train.steps,
                               .samples = t->w.s.samples,
                               .tokens = labels,
                               .loss = sums.loss,
                               .nll = sums.nll,
                               .grad_norm = norm,
                               .rate = rate,
                               .seconds = seconds,
                               .bytes_exchanged = all[0],
                               .peak_memory = all[1],
                               .peak_device_memory = all[2],
                               .order = XXH3_64bits(t->index, (size_t)c->train.batch * sizeof *t->index)};
    if (t->r->rank == 0) t->late = metrics_step(t->log, &line);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ the run */

static ls_status save(run *t, int best)
{
    ls_status status = t->late;
    if (status == LS_OK && t->r->rank == 0) status = still_at_home(t);
    if (status == LS_OK && t->r->rank == 0) {
        status = save_state(t->r, &t->c, best, t->w.m, t->config_text, &t->w.s);
    }
    LS_TRY(agree(t->r, status));
    if (!best) t->saved = t->w.s.step;
    return LS_OK;
}

static int asked_to_stop(void *of)
{
    run *t = of;
    int when = 0;
    if (t->test.rank == t->r->rank && t->test.step == t->w.s.step && sscanf(t->test.how, "stop%d", &when) == 1 &&
        ++t->test.asked == when)
        raise(SIGTERM);
    return stop_wanted != 0;
}

static int due(int64_t step, int64_t every)
{
    return every > 0 && step % every == 0;
}

/* Of the step that the run is at, not made yet. */
static int evaluation_due(const run *t)
{
    const int64_t step = t->w.s.step;
    return step > t->evaluated && dataset_documents(t->data, "valid") > 0 &&
           (due(step, t->c.train.evaluate_every) || step == t->c.train.steps);
}

/* Collective. *stop: some rank was asked to end the run, and this is as if it had not begun. */
static ls_status evaluate(run *t, int *stop)
{
    const double begin = seconds_now();
    const evaluation_choice choice = {
        .split = "valid", .documents = t->c.train.evaluate_documents, .stop = asked_to_stop, .of = t};
    evaluation now;
    LS_TRY(evaluate_split(t->r, &t->c, t->data, t->w.m, t->w.s.params, &choice, &now));
    *stop = now.stopped;
    if (*stop) return LS_OK;
    t->evaluated = t->w.s.step;
    t->last = now;
    const evaluation_metrics line = {.step = t->w.s.step,
                                     .tokens = t->last.tokens,
                                     .documents = t->last.documents,
                                     .nll = t->last.nll,
                                     .bits_per_byte = bits_per_byte(t->last.nll),
                                     .seconds = seconds_now() - begin,
                                     .best = t->last.nll < t->w.s.best_nll};
    if (line.best) {
        t->w.s.best_nll = t->last.nll;
        LS_TRY(save(t, 1));
        if (t->saved == t->w.s.step) LS_TRY(save(t, 0)); /* without this evaluation, before: the best goes with it */
    }
    /* last: where there is a line of it, it is not made again */
    if (t->r->rank == 0 && t->late == LS_OK) t->late = metrics_evaluation(t->log, &line);
    return LS_OK;
}

static ls_status loop(run *t)
{
    const config *c = &t->c;
    int stop = 0;
    t->saved = t->w.s.step;
    if (t->saved > 0 && evaluation_due(t)) { /* a signal ended the run before */
        LS_TRY(evaluate(t, &stop));
        if (stop) LS_TRY(save(t, 0)); /* it may have come from another directory */
    }
    while (t->w.s.step < c->train.steps && !stop) {
        LS_TRY(take_step(t, &stop));
        /* whoever sent a signal may not wait for an evaluation */
        if (!stop && evaluation_due(t)) LS_TRY(evaluate(t, &stop));
        if (stop || t->w.s.step == c->train.steps || due(t->w.s.step, c->train.save_every)) LS_TRY(save(t, 0));
    }
    LS_TRY(agree(t->r, t->late));
    if (t->r->rank != 0) return LS_OK;
    metrics_close(t->log);
    t->log = NULL;
    if (t->w.s.step < c->train.steps || evaluation_due(t)) {
        printf("stopped by a signal after step %lld of %lld%s; the checkpoint is in %s: go on with --resume auto\n",
               (long long)t->w.s.step, (long long)c->train.steps, evaluation_due(t) ? ", before it was evaluated" : "",
               c->run.directory);
    } else {
        printf("done: step %lld", (long long)t->w.s.step);
        if (t->last.tokens > 0) {
            printf(", valid %.4f nats per token, %.4f bits per byte", t->last.nll, bits_per_byte(t->last.nll));
        }
        if (t->tokens > 0) /* not only the last evaluation */
            printf(", %.0f tokens/s, peak memory %.0f MiB on %d rank%s", (double)t->tokens / t->seconds,
                   (double)t->peak_memory / 1048576, t->r->size, t->r->size == 1 ? "" : "s");
        if (t->peak_device_memory > 0) printf(" and %.0f MiB of GPUs", (double)t->peak_device_memory / 1048576);
        printf("; the results are in %s\n", c->run.directory);
    }
    return LS_OK;
}

static ls_status train(const train_options *o, run *t)
{
    const char *test = getenv("LONGSPAN_TEST_FAIL");
    long long test_step = -1;
    t->test.rank = -1;
    strcpy(t->test.how, "memory");
    if (test != NULL && sscanf(test, "%d:%lld:%7s", &t->test.rank, &test_step, t->test.how) < 2) t->test.rank = -1;
    t->test.step = test_step;

    LS_TRY(read_config(o, t));
    LS_TRY(open_data(t));
    LS_TRY(allocate(t));
    ls_status status = LS_OK;
    if (t->r->rank == 0) status = choose_resume(t->c.run.directory, o->resume, t->resume);
    LS_TRY(agree(t->r, status));
    LS_TRY(broadcast_bytes(t->r, t->resume, sizeof t->resume));
    if (t->resume[0] != 0)
        LS_TRY(resume(t));
    else
        LS_TRY(agree(t->r, start(t)));
    if (t->r->rank == 0) print_warnings(t);
    if (o->dry_run) {
        if (t->r->rank == 0) status = check_directories(t->c.run.directory);
        LS_TRY(agree(t->r, status));
        if (t->r->rank == 0) print_plan(t);
        return LS_OK;
    }
    int owed = 0;
    if (t->r->rank == 0 && t->w.s.step == t->c.train.steps && dataset_documents(t->data, "valid") > 0 &&
        goes_on_in(t->c.run.directory, t->resume))
        status = metrics_owe(t->c.run.directory, t->w.s.step, &owed);
    LS_TRY(agree(t->r, status));
    LS_TRY(broadcast_bytes(t->r, &owed, sizeof owed));
    if (t->w.s.step >= t->c.train.steps && !owed) {
        if (t->r->rank == 0) {
            printf("nothing to do: %s is at step %lld of %lld\n", t->resume, (long long)t->w.s.step,
                   (long long)t->c.train.steps);
        }
        return LS_OK;
    }
    if (t->r->rank == 0) status = create_run(t, o->resume);
    LS_TRY(agree(t->r, status));
    LS_TRY(broadcast_bytes(t->r, &t->evaluated, sizeof t->evaluated));
    if (t->r->rank == 0 && t->resume[0] != 0) printf("goes on from %s\n", t->resume);
    return loop(t);
}

int command_train(int argc, char **argv, ranks *r)
{
    train_options o;
    run t = {.r = r, .lock = -1};
    ls_status status = parse(argc, argv, &o);
    if (status == LS_OK && (o.help || o.help_config)) {
        if (r->rank == 0 && o.help_config)
            config_reference(stdout);
        else if (r->rank == 0)
            fputs(usage, stdout);
        free(o.set.item);
        return EXIT_OK;
    }
    static const int signals[] = {SIGTERM, SIGUSR1, SIGINT};
    struct sigaction before[3];
    for (int i = 0; i < 3; i++) {
        /* a second Ctrl-C is meant as it always is */
        const int flags = signals[i] == SIGINT ? (int)(SA_RESTART | SA_RESETHAND) : SA_RESTART;
        struct sigaction action = {.sa_handler = want_stop, .sa_flags = flags};
        sigemptyset(&action.sa_mask);
        sigaction(signals[i], &action, &before[i]);
    }
    signal(SIGPIPE, SIG_IGN); /* whoever read the progress may leave; that it was not all told is main's to say */
    if (status == LS_OK) status = train(&o, &t);
    for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], NULL);
    metrics_close(t.log); /* ends a progress line before the error */
    if (t.lock >= 0) close(t.lock);
    const int code = report_error(r, status);
    batch_free(&t.b);
    stepper_free(&t.w);
    dataset_close(t.data);
    free(t.index);
    free(t.config_text);
    free(o.set.item);
    return code;
}
