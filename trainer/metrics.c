#include "metrics.h"
#include "trainer.h"

#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char file_name[] = "metrics.jsonl";
enum { SHOW_EVERY = 5 /* seconds, where there is no terminal */ };

struct metrics {
    FILE *file;
    char path[1100];
    int terminal, drawn; /* drawn: the cursor stands behind a progress line */
    double shown;        /* when a plain line was printed last */
};

/* The step of a line; -1 where it is no line of ours, such as one cut short when the run was killed. */
static int64_t step_of(const char *line, size_t size, int *of_valid)
{
    json_t *object = json_loadb(line, size, 0, NULL);
    const json_t *step = json_object_get(object, "step");
    const int64_t value = json_is_integer(step) ? (int64_t)json_integer_value(step) : -1;
    *of_valid = json_object_get(object, "valid_nll") != NULL;
    json_decref(object);
    return value;
}

/* A missing file is empty. */
static ls_status read_lines(const char *path, char **bytes, size_t *size)
{
    *bytes = NULL;
    *size = 0;
    if (access(path, F_OK) != 0 && errno == ENOENT) return LS_OK;
    return read_file(path, SIZE_MAX, bytes, size);
}

/* What another run has left becomes metrics-1.jsonl, or the first number that is free. */
static ls_status put_aside(const char *directory, const char *path)
{
    char to[1200];
    struct stat there;
    if (stat(path, &there) != 0 || there.st_size == 0) return LS_OK;
    int number = 0;
    do snprintf(to, sizeof to, "%s/metrics-%d.jsonl", directory, ++number);
    while (stat(to, &there) == 0);
    if (rename(path, to) != 0) LS_FAIL(LS_ERR_IO, "%s: cannot become %s: %s", path, to, strerror(errno));
    printf("%s is of another run, and is %s now\n", path, to);
    return LS_OK;
}

ls_status metrics_open(const char *directory, int64_t resumed, int64_t *evaluated, metrics **out)
{
    *evaluated = -1;
    metrics *m = *out = calloc(1, sizeof *m);
    if (m == NULL) LS_FAIL(LS_ERR_MEMORY, "metrics: no memory");
    snprintf(m->path, sizeof m->path, "%s/%s", directory, file_name);
    /* under mpirun standard output is a terminal of mpirun's own making, but standard error is not */
    m->terminal = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
    m->shown = -SHOW_EVERY;

    char *bytes = NULL;
    size_t size = 0, kept = 0;
    ls_status status = resumed > 0 ? read_lines(m->path, &bytes, &size) : put_aside(directory, m->path);
    for (size_t at = 0; status == LS_OK && at < size;) {
        const char *end = memchr(bytes + at, '\n', size - at);
        if (end == NULL) break;
        const size_t length = (size_t)(end - bytes) + 1 - at;
        int of_valid;
        const int64_t step = step_of(bytes + at, length, &of_valid);
        if (step >= 0 && step <= resumed) {
            if (of_valid) *evaluated = step;
            memmove(bytes + kept, bytes + at, length);
            kept += length;
        }
        at += length;
    }
    if (status == LS_OK) status = write_file(directory, file_name, bytes == NULL ? "" : bytes, kept);
    free(bytes);
    if (status == LS_OK && (m->file = fopen(m->path, "ab")) == NULL) {
        status = ls_fail(LS_ERR_IO, "%s: cannot be written: %s", m->path, strerror(errno));
    }
    if (status != LS_OK) {
        metrics_close(m);
        *out = NULL;
    }
    return status;
}

ls_status metrics_owe(const char *directory, int64_t step, int *owed)
{
    char path[1100], *bytes;
    size_t size;
    int told[2] = {0}; /* of the step, of its evaluation */
    snprintf(path, sizeof path, "%s/%s", directory, file_name);
    const ls_status status = read_lines(path, &bytes, &size);
    for (const char *at = bytes, *end; status == LS_OK && at != NULL && at < bytes + size; at = end + 1) {
        int of_valid;
        end = memchr(at, '\n', (size_t)(bytes + size - at));
        if (end == NULL) break;
        if (step_of(at, (size_t)(end - at), &of_valid) == step) told[of_valid] = 1;
    }
    free(bytes);
    *owed = told[0] && !told[1];
    return status;
}

void metrics_close(metrics *m)
{
    if (m == NULL) return;
    if (m->drawn) putchar('\n');
    fflush(stdout);
    if (m->file != NULL) fclose(m->file);
    free(m);
}

static ls_status append(metrics *m, json_t *line)
{
    if (line == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for a line", m->path);
    errno = 0;
    const int failed = json_dumpf(line, m->file, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(10)) != 0 ||
                       fputc('\n', m->file) == EOF || fflush(m->file) != 0;
    json_decref(line);
    if (failed) LS_FAIL(LS_ERR_IO, "%s: cannot be written: %s", m->path, strerror(errno));
    return LS_OK;
}

ls_status metrics_step(metrics *m, const step_metrics *s)
{
    char order[20];
    snprintf(order, sizeof order, "%016llx", (unsigned long long)s->order);
    const double speed = s->seconds > 0 ? (double)s->tokens / s->seconds : 0;
    LS_TRY(append(m, json_pack("{s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:I, s:s}", "step",
                               (json_int_t)s->step, "samples", (json_int_t)s->samples, "tokens", (json_int_t)s->tokens,
                               "loss", s->loss, "nll", s->nll, "grad_norm", s->grad_norm, "lr", s->rate, "seconds",
                               s->seconds, "tokens_per_second", speed, "bytes_exchanged",
                               (json_int_t)s->bytes_exchanged, "peak_memory_bytes", (json_int_t)s->peak_memory,
                               "peak_device_memory_bytes", (json_int_t)s->peak_device_memory, "order", order)));
    const double left = (double)(s->steps - s->step) * s->seconds;
    const int last = s->step == s->steps;
    if (!m->terminal && !last && seconds_now() - m->shown < SHOW_EVERY) return LS_OK;
    m->shown = seconds_now();
    printf("%sstep %lld/%lld  loss %.4f  norm %.3g  lr %.3g  %.0f tokens/s  %.0f s left%s", m->terminal ? "\r" : "",
           (long long)s->step, (long long)s->steps, s->loss, s->grad_norm, s->rate, speed, left,
           m->terminal ? "\033[K" : "\n");
    m->drawn = m->terminal;
    fflush(stdout);
    return LS_OK;
}

ls_status metrics_evaluation(metrics *m, const evaluation_metrics *e)
{
    LS_TRY(append(m, json_pack("{s:I, s:f, s:f, s:I, s:I, s:f, s:b}", "step", (json_int_t)e->step, "valid_nll", e->nll,
                               "valid_bits_per_byte", e->bits_per_byte, "valid_tokens", (json_int_t)e->tokens,
                               "valid_documents", (json_int_t)e->documents, "valid_seconds", e->seconds, "best",
                               e->best)));
    printf("%sstep %lld  valid %.4f nats per token, %.4f bits per byte%s\n", m->drawn ? "\n" : "", (long long)e->step,
           e->nll, e->bits_per_byte, e->best ? " (best so far)" : "");
    m->drawn = 0;
    fflush(stdout);
    return LS_OK;
}
