/* What the subcommands share: ranks, errors, and getting the same bytes to everyone. */
#include "trainer.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int exit_code_of(ls_status status)
{
    switch (status) {
    case LS_OK:
        return EXIT_OK;
    case LS_ERR_ARGUMENT:
    case LS_ERR_UNSUPPORTED:
        return EXIT_USAGE;
    case LS_ERR_FORMAT:
        return EXIT_FORMAT;
    case LS_ERR_IO:
        return EXIT_IO;
    case LS_ERR_NONFINITE:
        return EXIT_NONFINITE;
    case LS_ERR_MEMORY:
        return EXIT_MEMORY;
    case LS_ERR_COMM:
        return EXIT_COMM;
    default:
        return EXIT_INTERNAL;
    }
}

int report_error(const ranks *r, ls_status status)
{
    /* where ranks cannot agree who speaks, each says what it knows */
    const int lost = status == LS_ERR_COMM || r->lost;
    if ((r->rank == 0 || lost) && status != LS_OK) {
        fflush(stdout);
        if (lost) fprintf(stderr, "longspan: rank %d: %s\n", r->rank, ls_last_error());
        if (!lost) fprintf(stderr, "longspan: %s\n", ls_last_error());
        fflush(stderr);
    }
    return exit_code_of(status);
}

ls_status agree(const ranks *r, ls_status mine)
{
    char message[1024];
    if (mine == LS_ERR_COMM || (r->lost && mine != LS_OK)) return mine; /* the others may never come: main ends them */
    snprintf(message, sizeof message, "%s", ls_last_error());
    const ls_status all = ls_agree(r->world, mine);
    if (all != LS_OK && all == mine && r->rank == 0) return ls_fail(mine, "%s", message);
    return all;
}

static ls_status mpi(int code, const char *what)
{
    if (code == MPI_SUCCESS) return LS_OK;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    LS_FAIL(LS_ERR_COMM, "mpi: %s failed: %s", what, text);
}

static ls_transport transport_of(const config *c)
{
    const char *name = c->parallel.transport;
    return strcmp(name, "mpi") == 0    ? LS_TRANSPORT_MPI
           : strcmp(name, "nccl") == 0 ? LS_TRANSPORT_NCCL
                                       : LS_TRANSPORT_AUTO;
}

ls_status ranks_device(const ranks *r, ls_device device, int *number)
{
    int devices = 1, place = 0;
    MPI_Comm here;
    LS_TRY(agree(r, mpi(MPI_Comm_split_type(r->comm, MPI_COMM_TYPE_SHARED, r->rank, MPI_INFO_NULL, &here),
                        "finding the ranks of this machine")));
    MPI_Comm_rank(here, &place);
    MPI_Comm_free(&here);
    const ls_device_ops *ops = ls_device_find(device);
    if (ops != NULL) LS_TRY(agree(r, ops->count(&devices)));
    *number = devices > 0 ? place % devices : 0;
    return LS_OK;
}

ls_status ranks_split(ranks *r, const config *c, int64_t sequence)
{
    if (sequence == 0) sequence = r->size;
    if (r->size % sequence != 0) {
        LS_FAIL(LS_ERR_ARGUMENT,
                "parallel.sequence: %lld ranks for each sequence cannot be had from %d: choose a divisor of it, or 0",
                (long long)sequence, r->size);
    }
    ranks_close(r);
    r->group = (int)(r->rank / sequence); /* neighbours share a sequence: they are likely to be near */
    r->groups = (int)(r->size / sequence);
    ls_context_options o = {.device = strcmp(c->device, "cuda") == 0 ? LS_CUDA : LS_CPU,
                            .transport = transport_of(c),
                            .precision = c->train.precision,
                            .seed = c->train.seed};
    LS_TRY(ranks_device(r, o.device, &o.device_number));
    MPI_Comm comm;
    LS_TRY(agree(r, mpi(MPI_Comm_split(r->comm, r->group, r->rank, &comm), "splitting the ranks")));
    o.comm = comm;
    ls_status status = ls_context_create(&o, &r->sequence);
    MPI_Comm_free(&comm);
    LS_TRY(agree(r, status));
    if (o.device == LS_CPU) return LS_OK;
    o.comm = r->comm;
    o.precision = LS_FLOAT32; /* it only adds up: no memory for operands in bfloat16 */
    return ls_context_create(&o, &r->gradients);
}

void ranks_close(ranks *r)
{
    if (r->gradients != r->world) ls_context_free(r->gradients);
    r->gradients = r->world;
    ls_context_free(r->sequence);
    r->sequence = NULL;
}

ls_status device_reals(const ranks *r, const char *what, int64_t n, ls_real **x)
{
    void *p;
    const size_t bytes = (size_t)n * sizeof(ls_real);
    const ls_status status = ls_reserve(r->sequence->ops, what, bytes, &p);
    *x = p;
    if (status == LS_OK) r->sequence->dense->zero(r->sequence->queue, bytes, p);
    return status;
}

void device_free(const ranks *r, ls_real *x)
{
    if (x != NULL) ls_device_free(r->sequence, x);
}

/* ------------------------------------------------------------------------------------------------ bytes */

ls_status broadcast_bytes(const ranks *r, void *bytes, size_t size)
{
    const size_t piece = (size_t)1 << 30; /* MPI counts are int */
    for (size_t at = 0; at < size; at += piece) {
        const int n = (int)(size - at < piece ? size - at : piece);
        LS_TRY(mpi(MPI_Bcast((char *)bytes + at, n, MPI_BYTE, 0, r->comm), "broadcast"));
    }
    return LS_OK;
}

ls_status read_file(const char *path, size_t most, char **bytes, size_t *size)
{
    const int standard_input = strcmp(path, "-") == 0;
    const char *name = standard_input ? "standard input" : path;
    FILE *f = standard_input ? stdin : fopen(path, "rb");
    if (f == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be opened: %s", path, strerror(errno));
    ls_status status = LS_OK;
    size_t room = 0, got = 1;
    errno = 0;
    while (got > 0) {
        if (*size == room) {
            char *more = realloc(*bytes, room = 2 * room + 65536);
            if (more == NULL) {
                status = ls_fail(LS_ERR_MEMORY, "%s: no memory for %zu bytes", name, room);
                break;
            }
            *bytes = more;
        }
        got = fread(*bytes + *size, 1, room - *size, f);
        *size += got;
        if (*size > most) {
            status =
                ls_fail(LS_ERR_ARGUMENT, "%s: has more than %zu bytes, too many for what it should be", name, most);
            break;
        }
    }
    if (status == LS_OK && ferror(f)) status = ls_fail(LS_ERR_IO, "%s: cannot be read: %s", name, strerror(errno));
    if (!standard_input) fclose(f);
    return status;
}

/* Collective: everyone gets rank 0's bytes, which are of `size` there; the others receive them in new memory. */
static ls_status share(const ranks *r, ls_status status, char **bytes, size_t *size)
{
    LS_TRY(agree(r, status));
    LS_TRY(broadcast_bytes(r, size, sizeof *size));
    if (r->rank != 0 && (*bytes = malloc(*size + 1)) == NULL) {
        status = ls_fail(LS_ERR_MEMORY, "no memory for %zu bytes", *size);
    }
    LS_TRY(agree(r, status));
    return broadcast_bytes(r, *bytes, *size);
}

ls_status read_everywhere(const ranks *r, const char *path, size_t most, char **bytes, size_t *size)
{
    *bytes = NULL;
    *size = 0;
    ls_status status = LS_OK;
    if (r->rank == 0) status = read_file(path, most, bytes, size);
    status = share(r, status, bytes, size);
    if (status != LS_OK) {
        free(*bytes);
        *bytes = NULL;
    }
    return status;
}

ls_status write_file(const char *directory, const char *name, const char *bytes, size_t size)
{
    char path[1200], temporary[1200];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    snprintf(temporary, sizeof temporary, "%s/.%s.tmp", directory, name);
    const int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (fd < 0) LS_FAIL(LS_ERR_IO, "%s: cannot be written: %s", path, strerror(errno));
    int failed = 0;
    for (size_t at = 0; at < size && !failed;) {
        const ssize_t n = write(fd, bytes + at, size - at);
        if (n > 0)
            at += (size_t)n;
        else
            failed = n == 0 || errno != EINTR;
    }
    failed = failed || fsync(fd) != 0;
    int code = errno;
    if (close(fd) != 0 && !failed) {
        failed = 1;
        code = errno;
    }
    if (!failed && rename(temporary, path) != 0) {
        failed = 1;
        code = errno;
    }
    if (failed) {
        unlink(temporary);
        LS_FAIL(LS_ERR_IO, "%s: cannot be written: %s", path, strerror(code));
    }
    const int parent = open(directory, O_RDONLY); /* the rename itself must reach the disk; not all systems can */
    if (parent >= 0) {
        fsync(parent);
        close(parent);
    }
    return LS_OK;
}

ls_status same_arguments(const ranks *r, int argc, char *const *argv)
{
    size_t size = 0, theirs = 0;
    for (int i = 1; i < argc; i++) size += strlen(argv[i]) + 1;
    char *mine = malloc(size + 1), *first = mine, *at = mine;
    ls_status status = LS_OK;
    if (mine == NULL) status = ls_fail(LS_ERR_MEMORY, "no memory for %zu bytes of arguments", size);
    for (int i = 1; i < argc && status == LS_OK; i++) at = stpcpy(at, argv[i]) + 1;
    theirs = size;
    if (r->rank != 0) first = NULL;
    status = share(r, status, &first, &theirs);
    for (size_t i = 0; status == LS_OK && r->rank != 0; i += strlen(first + i) + 1) {
        const int ends = i >= size, they_end = i >= theirs;
        if (ends && they_end) break;
        if (ends || they_end || strcmp(mine + i, first + i) != 0)
            status = ls_fail(LS_ERR_ARGUMENT, "it was started with %s where rank 0 has %s: give all ranks the same",
                             ends ? "no more arguments" : mine + i, they_end ? "no more arguments" : first + i);
        if (status != LS_OK) break;
    }
    status = agree(r, status);
    if (first != mine) free(first);
    free(mine);
    return status;
}

/* ------------------------------------------------------------------------------------------------ checkpoints */

enum { ARRAYS = 3 };

/* The arrays of a state in host memory: on the CPU its own, else room for copies of those that it has. */
static ls_status host_arrays(const ranks *r, const model *m, const training_state *s, training_state *host)
{
    *host = *s;
    if (r->sequence->device == LS_CPU) return LS_OK;
    ls_real **const to[ARRAYS] = {&host->params, &host->adam_m, &host->adam_v};
    int failed = 0;
    for (int i = 0; i < ARRAYS; i++)
        if (*to[i] != NULL) failed |= (*to[i] = malloc((size_t)model_count(m) * sizeof(ls_real))) == NULL;
    if (failed)
        LS_FAIL(LS_ERR_MEMORY, "no memory for %lld parameters beside those of the device", (long long)model_count(m));
    return LS_OK;
}

static void free_host_arrays(const ranks *r, training_state *host)
{
    if (r->sequence->device == LS_CPU) return;
    free(host->params);
    free(host->adam_m);
    free(host->adam_v);
}

ls_status save_state(const ranks *r, const config *c, int best, const model *m, const char *config_text,
                     const training_state *s)
{
    const size_t bytes = (size_t)model_count(m) * sizeof(ls_real);
    training_state host;
    ls_status status = host_arrays(r, m, s, &host);
    const ls_real *const from[ARRAYS] = {s->params, s->adam_m, s->adam_v};
    ls_real *const to[ARRAYS] = {host.params, host.adam_m, host.adam_v};
    for (int i = 0; i < ARRAYS && status == LS_OK; i++)
        if (from[i] != to[i]) status = ls_device_read(r->sequence, to[i], from[i], bytes);
    if (status == LS_OK) status = checkpoint_save(c->run.directory, best, c->train.keep, m, config_text, &host);
    free_host_arrays(r, &host);
    return status;
}

ls_status load_everywhere(const ranks *r, const char *path, const model *m, training_state *s)
{
    training_state host;
    ls_status status = host_arrays(r, m, s, &host);
    if (status == LS_OK && r->rank == 0) status = checkpoint_load(path, m, &host);
    const size_t bytes = (size_t)model_count(m) * sizeof(ls_real);
    ls_real *const tensors[ARRAYS] = {host.params, host.adam_m, host.adam_v};
    ls_real *const to[ARRAYS] = {s->params, s->adam_m, s->adam_v};
    training_state received = host;
    LS_TRY_GOTO(agree(r, status));
    LS_TRY_GOTO(broadcast_bytes(r, &received, sizeof received));
    s->step = received.step;
    s->samples = received.samples;
    s->seed = received.seed;
    s->data_digest = received.data_digest;
    s->best_nll = received.best_nll;
    for (int i = 0; i < ARRAYS; i++) {
        if (tensors[i] == NULL) continue;
        LS_TRY_GOTO(broadcast_bytes(r, tensors[i], bytes));
        if (tensors[i] != to[i]) status = ls_device_write(r->sequence, to[i], tensors[i], bytes);
        if (status != LS_OK) break;
    }
    status = agree(r, status);
done:
    free_host_arrays(r, &host);
    return status;
}

static int has_gpu(void)
{
    const ls_device_ops *ops = ls_device_find(LS_CUDA);
    int devices = 0;
    return ops != NULL && ops->count(&devices) == LS_OK && devices > 0;
}

ls_status same_model(const char *checkpoint, const config *trained, const config *wanted)
{
    const config_key *key = config_other_model(trained, wanted);
    char was[96], is[96];
    if (key == NULL) return LS_OK;
    config_value(key, trained, was, sizeof was);
    config_value(key, wanted, is, sizeof is);
    LS_FAIL(LS_ERR_ARGUMENT, "%s: was trained with %s=%s, the configuration has %s: it cannot change", checkpoint,
            key->path, was, is);
}

ls_status checkpoint_config_everywhere(const ranks *r, const char *path, const char *const *set, int nset, config *c)
{
    char *text = NULL;
    size_t size = 0;
    ls_status status = LS_OK;
    if (r->rank == 0) {
        status = checkpoint_config(path, &text);
        if (status == LS_OK) size = strlen(text);
    }
    status = share(r, status, &text, &size);
    config trained;
    const char **all = malloc(((size_t)nset + 4) * sizeof *all);
    if (status == LS_OK && all == NULL) status = ls_fail(LS_ERR_MEMORY, "%s: no memory", path);
    if (status == LS_OK) {
        /* where a model was trained is not where it has to be used */
        const int gpu = has_gpu();
        int on_cpu = !gpu;
        for (int i = 0; i < nset; i++)
            if (strncmp(set[i], "device=", 7) == 0) on_cpu = !gpu || strcmp(set[i] + 7, "cpu") == 0;
        const int here = on_cpu ? 4 : 1;
        all[0] = "parallel.sequence=0";
        if (on_cpu) all[1] = "device=cpu", all[2] = "parallel.transport=auto", all[3] = "train.precision=float32";
        for (int i = 0; i < nset; i++) all[here + i] = set[i];
        status = config_parse(path, text, size, all, here + nset, c);
        if (status == LS_OK) status = config_parse(path, text, size, all, here, &trained);
        if (status == LS_OK) status = same_model(path, &trained, c);
    }
    if (text != NULL) status = agree(r, status);
    free(all);
    free(text);
    return status;
}

/* ------------------------------------------------------------------------------------------------ arguments */

ls_status text_list_add(text_list *list, const char *item)
{
    const char **more = realloc(list->item, ((size_t)list->count + 1) * sizeof *more);
    if (more == NULL) LS_FAIL(LS_ERR_MEMORY, "command line: no memory");
    more[list->count++] = item;
    list->item = more;
    return LS_OK;
}

ls_status refuse_option(const char *command, int answer, char *const *argv, const char *const *known)
{
    /* getopt_long has moved on past what it refuses, but from the letters after one dash, of which no option has any */
    const char *next = argv[optind], *option = argv[optind - 1];
    if (answer == '?' && next != NULL && next[0] == '-' && optopt != 0 && next[1] == optopt && next[2] != 0)
        option = next;
    if (answer == ':') {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: %s needs a value; see longspan %s --help", command, option, command);
    }
    char word[64];
    snprintf(word, sizeof word, "%.*s", (int)strcspn(option, "="), option);
    const char *near = nearest_word(word, known);
    LS_FAIL(LS_ERR_ARGUMENT, "%s: unknown option %s%s%s%s; see longspan %s --help", command, option,
            near ? " (did you mean " : "", near ? near : "", near ? "?)" : "", command);
}

ls_status read_count(const char *command, const char *option, const char *text, int64_t min, int64_t *value)
{
    char *end;
    errno = 0;
    const long long x = strtoll(text, &end, 10);
    if (end == text || *end != 0 || errno != 0 || x < min) {
        LS_FAIL(LS_ERR_ARGUMENT, "%s: %s: '%s' is not a whole number from %lld on", command, option, text,
                (long long)min);
    }
    *value = x;
    return LS_OK;
}

double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
