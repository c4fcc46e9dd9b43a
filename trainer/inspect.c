/* `longspan inspect`: what a data set or a checkpoint holds, after every digest in it was checked. Facts are gathered
 * into JSON first; the text for people is written from that. */
#include "trainer.h"

#include "h5.h"

#include <getopt.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] = "usage: longspan inspect [--json] FILE\n"
                            "\n"
                            "Checks all digests of a data set or checkpoint and shows what it holds.\n"
                            "\n"
                            "  --json   as one JSON object\n"
                            "  --help   this text\n";

typedef struct inspect_options {
    const char *path;
    int json, help;
} inspect_options;

static ls_status parse(int argc, char **argv, inspect_options *o)
{
    enum { JSON = 256, HELP };
    static const struct option options[] = {
        {"json", no_argument, NULL, JSON}, {"help", no_argument, NULL, HELP}, {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--json", "--help", NULL};
    *o = (inspect_options){0};
    opterr = 0; /* rank 0 alone says what is wrong */
    optind = 1;
    for (int which; (which = getopt_long(argc, argv, ":", options, NULL)) != -1;) {
        if (which == JSON)
            o->json = 1;
        else if (which == HELP)
            o->help = 1;
        else
            return refuse_option("inspect", which, argv, known);
    }
    if (o->help) return LS_OK;
    if (optind >= argc) LS_FAIL(LS_ERR_ARGUMENT, "inspect: which file? See longspan inspect --help");
    if (optind + 1 < argc)
        LS_FAIL(LS_ERR_ARGUMENT, "inspect: one file at a time, %s is one too many", argv[optind + 1]);
    o->path = argv[optind];
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ facts */

/* Text of a file need not be UTF-8, JSON must. */
static json_t *text_of(const char *text)
{
    json_t *value = json_string(text);
    if (value != NULL) return value;
    char *copy = strdup(text);
    if (copy == NULL) return NULL;
    for (char *c = copy; *c != 0; c++)
        if ((unsigned char)*c >= 0x80) *c = '?';
    value = json_string(copy);
    free(copy);
    return value;
}

/* 64 bits do not fit into a JSON number. */
static json_t *digest_text(uint64_t digest)
{
    return json_sprintf("%016" PRIx64, digest);
}

static int by_value(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static json_t *side_facts(const dataset *d, const char *split, int target, int64_t *length /* (documents) */)
{
    const int64_t n = dataset_documents(d, split);
    for (int64_t i = 0; i < n; i++) {
        int64_t lengths[2];
        dataset_lengths(d, split, i, &lengths[0], &lengths[1]);
        length[i] = lengths[target];
    }
    qsort(length, (size_t)n, sizeof *length, by_value);
    return json_pack("{s:I, s:I, s:I, s:I}", "tokens", (json_int_t)dataset_tokens(d, split, target), "shortest",
                     (json_int_t)length[0], "median", (json_int_t)length[(n - 1) / 2], "longest",
                     (json_int_t)length[n - 1]);
}

static ls_status split_facts(const dataset *d, const char *split, json_t *splits)
{
    const int64_t n = dataset_documents(d, split);
    if (n == 0) return LS_OK;
    int64_t *length = malloc((size_t)n * sizeof *length);
    if (length == NULL) LS_FAIL(LS_ERR_MEMORY, "inspect: no memory for the lengths of %lld documents", (long long)n);
    json_t *source = side_facts(d, split, 0, length), *target = side_facts(d, split, 1, length);
    free(length);
    json_object_set_new(splits, split,
                        json_pack("{s:I, s:o, s:o}", "documents", (json_int_t)n, "source", source, "target", target));
    return LS_OK;
}

static ls_status dataset_facts(const char *path, json_t *facts)
{
    const ls_context_options alone = {.comm = MPI_COMM_NULL, .device = LS_CPU};
    ls_context *ctx = NULL;
    dataset *d = NULL;
    json_t *splits = json_object();
    ls_status status = ls_context_create(&alone, &ctx);
    if (status == LS_OK) status = dataset_open(ctx, path, 1, &d);
    for (int i = 0; status == LS_OK && i < DATA_SPLITS; i++) status = split_facts(d, data_split_name[i], splits);
    if (status == LS_OK) {
        json_object_set_new(facts, "version", json_integer(DATA_VERSION));
        json_object_set_new(facts, "vocabulary", json_string(DATA_VOCABULARY_NAME));
        json_object_set_new(facts, "vocabulary_size", json_integer(DATA_VOCABULARY));
        json_object_set_new(facts, "source_names", text_of(dataset_source_names(d)));
        json_object_set_new(facts, "digest", digest_text(dataset_digest(d)));
        json_object_set(facts, "splits", splits);
    }
    json_decref(splits);
    dataset_close(d);
    ls_context_free(ctx);
    return status;
}

/* JSON has no infinity: before the first evaluation, and where weights went wrong, there is null. */
static json_t *real_of(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *tensor_facts(const checkpoint_tensor *t)
{
    json_t *shape = json_array();
    for (int i = 0; i < t->ndim; i++) json_array_append_new(shape, json_integer((json_int_t)t->dim[i]));
    return json_pack("{s:o, s:o, s:o, s:o, s:o}", "name", text_of(t->name), "shape", shape, "norm", real_of(t->norm[0]),
                     "adam_m_norm", real_of(t->norm[1]), "adam_v_norm", real_of(t->norm[2]));
}

static ls_status checkpoint_facts(const char *path, json_t *facts)
{
    checkpoint_summary s;
    LS_TRY(checkpoint_summarize(path, &s));
    json_t *tensors = json_array();
    for (int64_t i = 0; i < s.tensors; i++) json_array_append_new(tensors, tensor_facts(&s.tensor[i]));
    json_object_set_new(facts, "version", json_integer(CHECKPOINT_VERSION));
    json_object_set_new(facts, "step", json_integer((json_int_t)s.state.step));
    json_object_set_new(facts, "samples", json_integer((json_int_t)s.state.samples));
    json_object_set_new(facts, "seed", json_sprintf("%" PRIu64, s.state.seed));
    json_object_set_new(facts, "best_nll", real_of(s.state.best_nll));
    json_object_set_new(facts, "count", json_integer((json_int_t)s.count));
    json_object_set_new(facts, "digest", digest_text(s.digest));
    json_object_set_new(facts, "data_digest", digest_text(s.state.data_digest));
    json_object_set_new(facts, "tensors", tensors);
    json_object_set_new(facts, "config", text_of(s.config));
    checkpoint_summary_free(&s);
    return LS_OK;
}

static ls_status gather_facts(const char *path, json_t *facts)
{
    h5_file f;
    char *format = NULL;
    LS_TRY(h5_open(path, &f));
    const ls_status status = h5_get_text(&f, "/", "format", &format);
    h5_close(&f);
    if (status != LS_OK)
        LS_FAIL(LS_ERR_FORMAT, "%s: is neither a data set nor a checkpoint of Longspan: %.300s", path, ls_last_error());
    const int data = strcmp(format, DATA_FORMAT) == 0, checkpoint = strcmp(format, CHECKPOINT_FORMAT) == 0;
    free(format);
    if (!data && !checkpoint)
        LS_FAIL(LS_ERR_FORMAT, "%s: is neither a data set nor a checkpoint of Longspan: its format is another", path);
    json_object_set_new(facts, "file", text_of(path));
    json_object_set_new(facts, "format", json_string(data ? DATA_FORMAT : CHECKPOINT_FORMAT));
    LS_TRY(data ? dataset_facts(path, facts) : checkpoint_facts(path, facts));
    json_object_set_new(facts, "verified", json_true());
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ text */

static const char *text(const json_t *facts, const char *key)
{
    const char *value = json_string_value(json_object_get(facts, key));
    return value == NULL ? "" : value;
}

static long long number(const json_t *facts, const char *key)
{
    return (long long)json_integer_value(json_object_get(facts, key));
}

/* Each line of a text, indented. */
static void print_lines(const char *lines)
{
    for (size_t n; *lines != 0; lines += n + (lines[n] == '\n')) {
        n = strcspn(lines, "\n");
        printf("  %.*s\n", (int)n, lines);
    }
}

static void print_dataset(const json_t *facts)
{
    const json_t *splits = json_object_get(facts, "splits");
    printf("vocabulary   %s, %lld tokens\ndigest       %s\n", text(facts, "vocabulary"),
           number(facts, "vocabulary_size"), text(facts, "digest"));
    printf("\n%-14s %12s %16s %12s %12s %12s\n", "split", "documents", "tokens", "shortest", "median", "longest");
    for (int i = 0; i < DATA_SPLITS; i++) {
        const json_t *split = json_object_get(splits, data_split_name[i]);
        if (split == NULL) continue;
        for (int target = 0; target < 2; target++) {
            const char *side = target ? "target" : "source";
            const json_t *s = json_object_get(split, side);
            char name[32];
            snprintf(name, sizeof name, "%s %s", data_split_name[i], side);
            printf("%-14s %12lld %16lld %12lld %12lld %12lld\n", name, number(split, "documents"), number(s, "tokens"),
                   number(s, "shortest"), number(s, "median"), number(s, "longest"));
        }
    }
    printf("\nmade from\n");
    print_lines(text(facts, "source_names"));
}

/* "0.123", or "-" where there is no number. */
static const char *real_text(const json_t *facts, const char *key, char buffer[32])
{
    const json_t *value = json_object_get(facts, key);
    if (!json_is_number(value)) return "-";
    snprintf(buffer, 32, "%.6g", json_number_value(value));
    return buffer;
}

static void print_tensor(const json_t *t)
{
    char shape[96] = "", norm[3][32];
    size_t i;
    const json_t *extent;
    json_array_foreach(json_object_get(t, "shape"), i, extent)
    {
        const size_t used = strlen(shape);
        snprintf(shape + used, sizeof shape - used, "%s%lld", i > 0 ? "x" : "", (long long)json_integer_value(extent));
    }
    printf("%-48s %14s %12s %12s %12s\n", text(t, "name"), shape, real_text(t, "norm", norm[0]),
           real_text(t, "adam_m_norm", norm[1]), real_text(t, "adam_v_norm", norm[2]));
}

static void print_checkpoint(const json_t *facts)
{
    char buffer[32];
    size_t i;
    const json_t *tensor;
    printf("step         %lld\nsamples      %lld\nseed         %s\nbest nll     %s\nparameters   %lld\n",
           number(facts, "step"), number(facts, "samples"), text(facts, "seed"), real_text(facts, "best_nll", buffer),
           number(facts, "count"));
    printf("digest       %s\ndata digest  %s\n", text(facts, "digest"), text(facts, "data_digest"));
    printf("\n%-48s %14s %12s %12s %12s\n", "tensor", "shape", "norm", "adam m", "adam v");
    json_array_foreach(json_object_get(facts, "tensors"), i, tensor) print_tensor(tensor);
    printf("\nconfiguration\n");
    print_lines(text(facts, "config"));
}

static ls_status print_facts(const json_t *facts, int json)
{
    if (json) {
        char *dump = json_dumps(facts, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
        if (dump == NULL) LS_FAIL(LS_ERR_MEMORY, "inspect: no memory for the JSON text");
        puts(dump);
        free(dump);
        return LS_OK;
    }
    const int data = strcmp(text(facts, "format"), DATA_FORMAT) == 0;
    printf("%s\nformat       %s, version %lld\nchecked      all digests match\n", text(facts, "file"),
           text(facts, "format"), number(facts, "version"));
    if (data)
        print_dataset(facts);
    else
        print_checkpoint(facts);
    return LS_OK;
}

static ls_status inspect(const inspect_options *o)
{
    json_t *facts = json_object();
    if (facts == NULL) LS_FAIL(LS_ERR_MEMORY, "inspect: no memory");
    ls_status status = gather_facts(o->path, facts);
    if (status == LS_OK) status = print_facts(facts, o->json);
    json_decref(facts);
    return status;
}

int command_inspect(int argc, char **argv, ranks *r)
{
    inspect_options o;
    ls_status status = parse(argc, argv, &o);
    if (status != LS_OK) return report_error(r, status);
    if (o.help) {
        if (r->rank == 0) fputs(usage, stdout);
        return EXIT_OK;
    }
    if (r->rank == 0) status = inspect(&o);
    status = agree(r, status);
    return status == LS_OK ? EXIT_OK : report_error(r, status);
}
