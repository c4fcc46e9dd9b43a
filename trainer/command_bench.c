/* `longspan bench`: what each mechanism costs, forward and backward, against its own projections and against what the
 * processor's matrix product reaches, all in one run: time of the core and of the layer, memory, bytes that cross
 * ranks.
 *
 * Each case is measured several times, its parts taking turns, and the medians are shown: a machine that is busy for a
 * while slows all parts alike. On several ranks a time is that of the slowest. */
#include "trainer.h"

#include "dense.h"
#include "gemm.h"
#include "rng.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan bench [options]\n"
    "\n"
    "Times forward and backward of attention cores and layers, the layer's projections alone (the same products), "
    "memory\n"
    "and bytes exchanged, and prints a table. Under mpirun the sequence is shared by all ranks.\n"
    "\n"
    "  --mechanism A,B,..   default: all\n"
    "  --pattern NS,CS,..   default: all that the mechanism has\n"
    "  --length N,M,..      tokens, K and M understood; default 1K,4K,16K\n"
    "  --softmax-limit N    the longest length for exact softmax; default 4K\n"
    "  --batch N            default 1\n"
    "  --embed-dim N        default 512\n"
    "  --heads N            default 8\n"
    "  --repeat N           measurements of which the median is shown; default 5\n"
    "  --set M.OPTION=X     an option of mechanism M, e.g. local.window=31; may be given many times\n"
    "  --cases              the cases of the tests' table with their options, instead of defaults\n"
    "  --ranks P            as the middle one of P ranks, without the others (on one process): exact volumes for any "
    "P,\n"
    "                       and the time that this rank computes\n"
    "  --messages           instead: time of messages between neighbours, by size (on at least 2 ranks)\n"
    "  --csv FILE           also write the figures there\n"
    "  --help               this text\n";

enum { MAX_LENGTHS = 32, MAX_REPEAT = 101 };
enum part { CORE_FORWARD, CORE_BACKWARD, LAYER_FORWARD, LAYER_BACKWARD, PROJECTIONS, SGEMM, PARTS };

typedef struct bench {
    ranks *r;
    const char *mechanisms, *patterns;
    int64_t length[MAX_LENGTHS];
    int lengths;
    int64_t softmax_limit, batch, embed_dim, heads, repeat, dry;
    int cases, messages, help;
    text_list set;
    const char *csv_path;
    FILE *csv;
} bench;

/* The rows of tests/cases.def: mechanism, pattern, options. */
typedef struct bench_case {
    const char *mechanism;
    ls_pattern pattern;
    const char *options;
} bench_case;
static const bench_case table[] = {
#define MECHANISM(name, patterns, steps, traits)
#define CASE(mechanism, pattern, options, extras) {#mechanism, LS_##pattern, options},
#define WORD(option, word, value)
#include "cases.def"
#undef MECHANISM
#undef CASE
#undef WORD
    {NULL, LS_NS, NULL}};

static const char *const letters[] = {"NS", "CS", "NC", "CC"};

/* ------------------------------------------------------------------------------------------------ arguments */

/* Is `word` in the comma-separated list? NULL holds everything. */
static int lists(const char *list, const char *word)
{
    const size_t n = strlen(word);
    if (list == NULL) return 1;
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, word, n) == 0 && (at[n] == ',' || at[n] == '\0')) return 1;
    }
    return 0;
}

/* A length with K or M behind it. */
static ls_status read_length(const char *text, char **end, int64_t *value)
{
    errno = 0;
    *value = strtoll(text, end, 10);
    if (**end == 'K' || **end == 'M') *value *= *(*end)++ == 'K' ? 1024 : 1048576;
    if (*end == text || errno != 0 || *value < 1 || *value > INT64_C(1) << 32 || (**end != ',' && **end != '\0'))
        LS_FAIL(LS_ERR_ARGUMENT, "bench: '%s' is no length: use e.g. 1K,4K,16K", text);
    return LS_OK;
}

static ls_status read_lengths(const char *text, bench *b)
{
    char *end;
    for (b->lengths = 0;; text = end + 1) {
        if (b->lengths == MAX_LENGTHS) LS_FAIL(LS_ERR_ARGUMENT, "bench: more than %d lengths", MAX_LENGTHS);
        LS_TRY(read_length(text, &end, &b->length[b->lengths++]));
        if (*end == '\0') return LS_OK;
    }
}

static ls_status check_names(const bench *b)
{
    char list[512];
    snprintf(list, sizeof list, "%s", b->mechanisms == NULL ? "" : b->mechanisms);
    for (char *name = strtok(list, ","); name != NULL; name = strtok(NULL, ",")) {
        ls_attention_options o;
        LS_TRY(ls_attention_defaults(name, &o));
    }
    snprintf(list, sizeof list, "%s", b->patterns == NULL ? "" : b->patterns);
    for (char *name = strtok(list, ","); name != NULL; name = strtok(NULL, ","))
        if (!lists("NS,CS,NC,CC", name))
            LS_FAIL(LS_ERR_ARGUMENT, "bench: there is no pattern %s: NS, CS, NC, CC", name);
    return LS_OK;
}

static ls_status parse(int argc, char **argv, bench *b)
{
    enum {
        MECHANISM_ = 1,
        PATTERN_,
        LENGTH_,
        LIMIT_,
        BATCH_,
        EMBED_,
        HEADS_,
        REPEAT_,
        SET_,
        CASES_,
        RANKS_,
        MESSAGES_,
        CSV_,
        HELP_
    };
    static const struct option options[] = {{"mechanism", required_argument, NULL, MECHANISM_},
                                            {"pattern", required_argument, NULL, PATTERN_},
                                            {"length", required_argument, NULL, LENGTH_},
                                            {"softmax-limit", required_argument, NULL, LIMIT_},
                                            {"batch", required_argument, NULL, BATCH_},
                                            {"embed-dim", required_argument, NULL, EMBED_},
                                            {"heads", required_argument, NULL, HEADS_},
                                            {"repeat", required_argument, NULL, REPEAT_},
                                            {"set", required_argument, NULL, SET_},
                                            {"cases", no_argument, NULL, CASES_},
                                            {"ranks", required_argument, NULL, RANKS_},
                                            {"messages", no_argument, NULL, MESSAGES_},
                                            {"csv", required_argument, NULL, CSV_},
                                            {"help", no_argument, NULL, HELP_},
                                            {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--mechanism", "--pattern",  "--length", "--softmax-limit", "--batch",
                                        "--embed-dim", "--heads",    "--repeat", "--set",           "--cases",
                                        "--ranks",     "--messages", "--csv",    "--help",          NULL};
    char *end;
    int which;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        if (which == MECHANISM_)
            b->mechanisms = optarg;
        else if (which == PATTERN_)
            b->patterns = optarg;
        else if (which == LENGTH_)
            LS_TRY(read_lengths(optarg, b));
        else if (which == LIMIT_)
            LS_TRY(read_length(optarg, &end, &b->softmax_limit));
        else if (which == BATCH_)
            LS_TRY(read_count("bench", "--batch", optarg, 1, &b->batch));
        else if (which == EMBED_)
            LS_TRY(read_count("bench", "--embed-dim", optarg, 1, &b->embed_dim));
        else if (which == HEADS_)
            LS_TRY(read_count("bench", "--heads", optarg, 1, &b->heads));
        else if (which == REPEAT_)
            LS_TRY(read_count("bench", "--repeat", optarg, 1, &b->repeat));
        else if (which == SET_)
            LS_TRY(text_list_add(&b->set, optarg));
        else if (which == CASES_)
            b->cases = 1;
        else if (which == RANKS_)
            LS_TRY(read_count("bench", "--ranks", optarg, 1, &b->dry));
        else if (which == MESSAGES_)
            b->messages = 1;
        else if (which == CSV_)
            b->csv_path = optarg;
        else if (which == HELP_)
            b->help = 1;
        else
            return refuse_option("bench", which, argv, known);
    }
    if (optind < argc) LS_FAIL(LS_ERR_ARGUMENT, "bench: takes no argument '%s'", argv[optind]);
    if (b->dry > INT32_MAX || (b->dry > 0 && b->r->size > 1))
        LS_FAIL(LS_ERR_ARGUMENT, "bench: --ranks is for one process: leave out mpirun");
    if (b->messages && b->r->size < 2) LS_FAIL(LS_ERR_ARGUMENT, "bench: --messages needs at least 2 ranks: use mpirun");
    if (b->repeat > MAX_REPEAT) LS_FAIL(LS_ERR_ARGUMENT, "bench: --repeat: at most %d", MAX_REPEAT);
    return check_names(b);
}

/* ------------------------------------------------------------------------------------------------ one case */

/* One attention with everything a call needs, and what was measured of it. */
typedef struct subject {
    ls_context *ctx;
    ls_attention *attention;
    ls_saved *saved;
    ls_shard shard;
    ls_attention_shape shape;
    ls_attention_io io;
    ls_attention_grads grads;
    int64_t rows, width, out_width, reals, inputs;
    ls_real *memory, *params, *out, *dout;
    ls_traffic before;
} subject;

static void subject_free(subject *s)
{
    ls_saved_free(s->saved);
    ls_attention_free(s->attention);
    ls_shard_free(&s->shard);
    ls_context_free(s->ctx);
    free(s->memory);
    *s = (subject){0};
}

static double option_value(const ls_attention_options *o, const char *name)
{
    int count = 0;
    const ls_option_info *info = ls_mechanism_options(o->mechanism, &count);
    for (int i = 0; i < count; i++)
        if (strcmp(info[i].name, name) == 0) return o->value[i];
    return NAN;
}

/* Inputs of unit variance, and parameters as they are initialised. */
static ls_status fill(subject *s, const ls_attention_options *o)
{
    s->reals = ls_attention_param_count(s->attention);
    const double channels = option_value(o, "channels");
    s->rows = o->embed_dim * s->shape.batch * s->shard.n; /* in reals */
    s->out_width = o->level == LS_LEVEL_CORE && !isnan(channels) ? (int64_t)channels : 1;
    const int64_t n = s->rows, wide = n * s->out_width, all = 6 * n + 2 * wide + 2 * s->reals + 1;
    s->memory = malloc((size_t)all * sizeof *s->memory);
    if (s->memory == NULL) LS_FAIL(LS_ERR_MEMORY, "bench: no memory for %.0f MiB", (double)all * 4 / 1048576);
    for (int64_t i = 0; i < all; i++) s->memory[i] = (ls_real)(3.4 * (ls_uniform(1, 2, 3, (uint64_t)i) - 0.5));
    ls_real *at = s->memory;
    ls_real *x[6];
    for (int i = 0; i < 6; i++, at += n) x[i] = at;
    s->out = at, s->dout = at + wide, s->params = at + 2 * wide;
    for (int64_t i = 0; i < s->reals; i++) s->params[i] *= (ls_real)(1 / sqrt((double)o->embed_dim));
    const int self = o->pattern == LS_NS || o->pattern == LS_CS;
    s->io = (ls_attention_io){.query = x[0], .training = 1};
    s->grads = (ls_attention_grads){.query = x[3], .params = s->params + s->reals};
    s->inputs = self ? 1 : 2;
    if (!self || (o->level == LS_LEVEL_CORE && isnan(channels))) {
        s->io.key = x[1], s->grads.key = x[4];
        if (o->level == LS_LEVEL_CORE) s->io.value = x[2], s->grads.value = x[5], s->inputs = 3;
    }
    return LS_OK;
}

static ls_status subject_make(const bench *b, const ls_attention_options *o, int64_t length, subject *s)
{
    *s = (subject){0};
    const ls_context_options options = {
        .comm = b->r->comm, .device = LS_CPU, .seed = 1, .dry_size = (int)b->dry, .dry_rank = (int)b->dry / 2};
    LS_TRY(ls_context_create(&options, &s->ctx));
    LS_TRY(ls_attention_create(s->ctx, o, &s->attention));
    ls_status status = ls_saved_create(s->attention, &s->saved);
    if (status == LS_OK) status = ls_shard_even(s->ctx, length, &s->shard);
    s->shape = (ls_attention_shape){.batch = b->batch, .queries = &s->shard, .keys = &s->shard};
    if (status == LS_OK) status = fill(s, o);
    LS_TRY(ls_agree(s->ctx, status));
    ls_context_traffic(s->ctx, &s->before);
    return LS_OK;
}

/* The slowest rank's seconds since `begin`. */
static ls_status lap(const bench *b, double begin, double *seconds)
{
    double mine = seconds_now() - begin;
    if (MPI_Allreduce(&mine, seconds, 1, MPI_DOUBLE, MPI_MAX, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: comparing times failed");
    return LS_OK;
}

static ls_status time_subject(const bench *b, subject *s, double *forward, double *backward)
{
    LS_TRY(ls_agree(s->ctx, LS_OK)); /* all begin together */
    double begin = seconds_now();
    LS_TRY(ls_attention_forward(s->attention, &s->shape, &s->io, s->params, s->out, s->saved));
    LS_TRY(lap(b, begin, forward));
    begin = seconds_now();
    LS_TRY(ls_attention_backward(s->attention, &s->shape, &s->io, s->params, s->out, s->dout, s->saved, &s->grads));
    return lap(b, begin, backward);
}

/* The products of a layer's projections, forward and backward, with the same shapes and biases. */
static ls_status time_projections(const bench *b, const subject *s, double *seconds)
{
    const int64_t E = b->embed_dim, rows = s->rows / E;
    int64_t widest = E;
    int count = ls_attention_num_params(s->attention);
    for (int i = 0; i < count; i++)
        if (ls_attention_is_projection(s->attention, i))
            for (int k = 0; k < 2; k++) widest = ls_max(widest, ls_attention_param(s->attention, i)->dim[k]);
    ls_real *x = calloc((size_t)(2 * rows * widest + 1), sizeof *x), *y = x == NULL ? NULL : x + rows * widest;
    LS_TRY(ls_agree(s->ctx, x == NULL ? ls_fail(LS_ERR_MEMORY, "bench: no memory for rows") : LS_OK));
    for (int64_t i = 0; i < 2 * rows * widest; i++) x[i] = (ls_real)(i % 97) * (ls_real)0.01;
    LS_TRY(ls_agree(s->ctx, LS_OK));
    const double begin = seconds_now();
    for (int i = 0; i < count; i++) {
        const ls_param_info *w = ls_attention_param(s->attention, i);
        if (!ls_attention_is_projection(s->attention, i)) continue;
        const int bias = i + 1 < count && ls_attention_param(s->attention, i + 1)->ndim == 1;
        ls_real *weight = s->params + w->offset, *dweight = s->grads.params + w->offset;
        ls_dense_cpu.linear(NULL, rows, w->dim[1], w->dim[0], x, weight, bias ? weight + w->count : NULL, y);
        ls_dense_cpu.linear_backward(NULL, rows, w->dim[1], w->dim[0], x, weight, y, x, 0, dweight,
                                     bias ? dweight + w->count : NULL);
    }
    const ls_status status = lap(b, begin, seconds);
    free(x);
    return status;
}

/* What one core's sgemm reaches, on products of the size that projections have: seconds for each 10^9 operations. */
static ls_status time_sgemm(const bench *b, double *seconds)
{
    enum { M = 2048, N = 512 };
    ls_real *x = calloc(2 * M * N + N * N, sizeof *x);
    if (x == NULL) LS_FAIL(LS_ERR_MEMORY, "bench: no memory for a matrix product");
    for (int i = 0; i < 2 * M * N + N * N; i++) x[i] = (ls_real)(i % 89) * (ls_real)0.01;
    const double begin = seconds_now();
    for (int i = 0; i < 4; i++) ls_gemm(0, 1, M, N, N, 1, x, N, x + 2 * M * N, N, 0, x + M * N, N);
    const ls_status status = lap(b, begin, seconds);
    *seconds /= 4 * 2e-9 * M * N * N;
    free(x);
    return status;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *x, int64_t n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

typedef struct figures {
    double seconds[PARTS];                    /* medians; sgemm: per 10^9 operations; 0: there is no such part */
    double bytes_sent, messages, peak_memory; /* of one forward and backward of the layer, all ranks together */
} figures;

static ls_status measure_traffic(const bench *b, const subject *s, int64_t rounds, figures *f)
{
    ls_traffic now;
    ls_context_traffic(s->ctx, &now);
    double mine[3] = {0, 0, 0}, all[3];
    for (int k = 0; k < LS_CROSSINGS; k++) {
        mine[0] += (double)(now.sent[k] - s->before.sent[k]) / (double)rounds;
        mine[1] += (double)(now.messages[k] - s->before.messages[k]) / (double)rounds;
    }
    /* inputs with their gradients, output with its, parameters with theirs, what is saved, scratch */
    mine[2] = (double)(2 * s->inputs * s->rows + 2 * s->rows * s->out_width + 2 * s->reals) * sizeof(ls_real) +
              (double)ls_saved_bytes(s->saved) + (double)ls_context_bytes(s->ctx);
    if (MPI_Allreduce(mine, all, 3, MPI_DOUBLE, MPI_SUM, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: adding up bytes failed");
    f->bytes_sent = all[0], f->messages = all[1], f->peak_memory = all[2];
    return LS_OK;
}

static ls_status measure_both(const bench *b, subject *core, subject *layer, figures *f)
{
    static double t[PARTS][MAX_REPEAT];
    double *at[PARTS];
    for (int64_t i = -1; i < b->repeat; i++) { /* the first round warms up: memory is taken, pages are touched */
        double dump[PARTS];
        for (int k = 0; k < PARTS; k++) at[k] = i < 0 ? &dump[k] : &t[k][i];
        if (core->ctx != NULL) LS_TRY(time_subject(b, core, at[CORE_FORWARD], at[CORE_BACKWARD]));
        LS_TRY(time_subject(b, layer, at[LAYER_FORWARD], at[LAYER_BACKWARD]));
        LS_TRY(time_projections(b, layer, at[PROJECTIONS]));
        LS_TRY(time_sgemm(b, at[SGEMM]));
    }
    for (int k = 0; k < PARTS; k++) f->seconds[k] = median(t[k], b->repeat);
    if (core->ctx == NULL) f->seconds[CORE_FORWARD] = f->seconds[CORE_BACKWARD] = 0;
    return measure_traffic(b, layer, b->repeat + 1, f);
}

static ls_status measure(const bench *b, ls_attention_options *o, int64_t length, figures *f)
{
    subject core = {0}, layer = {0};
    ls_attention_options as_core = *o;
    as_core.level = LS_LEVEL_CORE;
    o->level = LS_LEVEL_LAYER;
    ls_status status = subject_make(b, o, length, &layer);
    /* a mechanism without a core level is measured as a layer alone */
    if (status == LS_OK && ls_attention_check(&as_core) == LS_OK) status = subject_make(b, &as_core, length, &core);
    if (status == LS_OK) status = measure_both(b, &core, &layer, f);
    subject_free(&core);
    subject_free(&layer);
    return status;
}

/* ------------------------------------------------------------------------------------------------ report */

static int ranks_of(const bench *b)
{
    return b->dry > 0 ? (int)b->dry : b->r->size;
}

static void print_header(const bench *b)
{
    if (b->r->rank != 0) return;
    printf("batch %lld, embed_dim %lld, %lld heads, %d rank%s; medians of %lld, in seconds\n", (long long)b->batch,
           (long long)b->embed_dim, (long long)b->heads, ranks_of(b), ranks_of(b) == 1 ? "" : "s",
           (long long)b->repeat);
    printf("%s\n", b->dry > 0 ? "time, memory and bytes are those of the middle rank alone; nothing was sent\n" : "");
    printf("%-26s %8s | %8s %8s | %8s %8s %8s %6s | %6s | %9s %10s\n", "mechanism", "length", "core fwd", "core bwd",
           "layer", "alone", "core", "ratio", "sgemm", "MiB", "KiB sent");
    printf("%-26s %8s | %8s %8s | %8s %8s %8s %6s | %6s | %9s %10s\n", "", "", "", "", "fwd+bwd", "proj.", "fwd+bwd",
           "l/p", "share", "", "");
    if (b->csv != NULL)
        fputs("mechanism,pattern,options,length,ranks,batch,embed_dim,heads,core_forward,core_backward,layer_forward,"
              "layer_backward,projections,sgemm_seconds_per_gflop,peak_memory_bytes,bytes_sent,messages\n",
              b->csv);
}

/* Operations of exact softmax: 2 products forward, 5 backward; a triangle counts half. */
static double softmax_gflop(const bench *b, ls_pattern pattern, int64_t length)
{
    const double pairs = (double)length * (double)length * (pattern == LS_CS ? 0.5 : 1);
    return 7 * 2 * pairs * (double)(b->embed_dim * b->batch) * 1e-9;
}

static void print_figures(const bench *b, const bench_case *c, int64_t length, const figures *f)
{
    char name[64], share[16] = "";
    const double *s = f->seconds, layer = s[LAYER_FORWARD] + s[LAYER_BACKWARD];
    const double core = s[CORE_FORWARD] + s[CORE_BACKWARD];
    if (b->r->rank != 0) return;
    snprintf(name, sizeof name, "%s %s %s", c->mechanism, letters[c->pattern], c->options);
    if (strcmp(c->mechanism, "softmax") == 0 && core > 0)
        snprintf(share, sizeof share, "%.0f%%",
                 100 * softmax_gflop(b, c->pattern, length) * s[SGEMM] / core / ranks_of(b));
    printf("%-26s %8lld | %8.4f %8.4f | %8.4f %8.4f %8.4f %6.2f | %6s | %9.1f %10.1f\n", name, (long long)length,
           s[CORE_FORWARD], s[CORE_BACKWARD], layer, s[PROJECTIONS], core, layer / s[PROJECTIONS], share,
           f->peak_memory / 1048576, f->bytes_sent / 1024);
    fflush(stdout);
    if (b->csv == NULL) return;
    fprintf(b->csv, "%s,%s,\"%s\",%lld,%d,%lld,%lld,%lld", c->mechanism, letters[c->pattern], c->options,
            (long long)length, ranks_of(b), (long long)b->batch, (long long)b->embed_dim, (long long)b->heads);
    for (int k = 0; k < PARTS; k++) fprintf(b->csv, ",%.6g", s[k]);
    fprintf(b->csv, ",%.0f,%.0f,%.0f\n", f->peak_memory, f->bytes_sent, f->messages);
    fflush(b->csv);
}

/* ------------------------------------------------------------------------------------------------ all cases */

/* "name=value,..." of a case, then --set, then what a length decides. */
static ls_status set_options(const bench *b, const bench_case *c, int64_t length, ls_attention_options *o)
{
    LS_TRY(ls_attention_defaults(c->mechanism, o));
    o->pattern = c->pattern;
    o->level = LS_LEVEL_LAYER;
    o->layout = LS_BTHD;
    o->embed_dim = b->embed_dim;
    o->num_heads = b->heads;
    char text[256];
    snprintf(text, sizeof text, "%s", c->options);
    for (char *at = strtok(text, ",="); at != NULL; at = strtok(NULL, ",=")) {
        const char *value = strtok(NULL, ",=");
        LS_TRY(ls_attention_set(o, at, value == NULL ? NAN : strtod(value, NULL)));
    }
    const size_t n = strlen(c->mechanism);
    for (int i = 0; i < b->set.count; i++) {
        snprintf(text, sizeof text, "%s", b->set.item[i]);
        char *equals = strchr(text, '=');
        if (equals == NULL || strchr(text, '.') == NULL)
            LS_FAIL(LS_ERR_ARGUMENT, "bench: --set %s: use MECHANISM.OPTION=VALUE", text);
        *equals = '\0';
        if (strncmp(text, c->mechanism, n) == 0 && text[n] == '.')
            LS_TRY(ls_attention_set(o, text + n + 1, strtod(equals + 1, NULL)));
    }
    if (option_value(o, "max_len") < (double)length) LS_TRY(ls_attention_set(o, "max_len", (double)length));
    return ls_attention_check(o);
}

static ls_status run_case(const bench *b, const bench_case *c)
{
    if (!lists(b->mechanisms, c->mechanism) || !lists(b->patterns, letters[c->pattern])) return LS_OK;
    if (!ls_mechanism_has(c->mechanism, c->pattern)) return LS_OK;
    for (int i = 0; i < b->lengths; i++) {
        ls_attention_options o;
        figures f = {0};
        if (strcmp(c->mechanism, "softmax") == 0 && b->length[i] > b->softmax_limit) continue;
        LS_TRY(set_options(b, c, b->length[i], &o));
        LS_TRY(measure(b, &o, b->length[i], &f));
        print_figures(b, c, b->length[i], &f);
    }
    return LS_OK;
}

static ls_status run_all(const bench *b)
{
    print_header(b);
    for (int i = 0; b->cases && table[i].mechanism != NULL; i++) LS_TRY(run_case(b, &table[i]));
    for (int m = 0; !b->cases && ls_mechanism_name(m) != NULL; m++)
        for (int pattern = LS_NS; pattern <= LS_CC; pattern++)
            LS_TRY(run_case(b, &(bench_case){ls_mechanism_name(m), (ls_pattern)pattern, ""}));
    return LS_OK;
}

/* Every rank sends to the next and receives from the one before: what an exchange is made of. */
static ls_status run_messages(const bench *b)
{
    enum { MOST = 1 << 24, ROUNDS = 20 };
    double t[MAX_REPEAT];
    char *memory = calloc(2, MOST);
    const int next = (b->r->rank + 1) % b->r->size, before = (b->r->rank + b->r->size - 1) % b->r->size;
    LS_TRY(agree(b->r, memory == NULL ? ls_fail(LS_ERR_MEMORY, "bench: no memory for messages") : LS_OK));
    if (b->r->rank == 0) printf("%12s %14s\n", "bytes", "microseconds");
    if (b->csv != NULL) fputs("bytes,seconds\n", b->csv);
    for (int bytes = 64; bytes <= MOST; bytes *= 4) {
        for (int64_t i = -1; i < b->repeat; i++) {
            MPI_Barrier(b->r->comm);
            const double begin = seconds_now();
            for (int k = 0; k < ROUNDS; k++)
                MPI_Sendrecv(memory, bytes, MPI_BYTE, next, 0, memory + MOST, bytes, MPI_BYTE, before, 0, b->r->comm,
                             MPI_STATUS_IGNORE);
            LS_TRY(lap(b, begin, &t[i < 0 ? 0 : i]));
        }
        const double seconds = median(t, b->repeat) / ROUNDS;
        if (b->r->rank == 0) printf("%12d %14.2f\n", bytes, 1e6 * seconds);
        if (b->csv != NULL) fprintf(b->csv, "%d,%.6g\n", bytes, seconds);
    }
    free(memory);
    return LS_OK;
}

int command_bench(int argc, char **argv, ranks *r)
{
    bench b = {.r = r,
               .length = {1024, 4096, 16384},
               .lengths = 3,
               .softmax_limit = 4096,
               .batch = 1,
               .embed_dim = 512,
               .heads = 8,
               .repeat = 5};
    ls_status status = parse(argc, argv, &b);
    if (status == LS_OK && b.help) {
        if (r->rank == 0) fputs(usage, stdout);
        free(b.set.item);
        return EXIT_OK;
    }
    if (status == LS_OK && b.csv_path != NULL && r->rank == 0 && (b.csv = fopen(b.csv_path, "w")) == NULL)
        status = ls_fail(LS_ERR_IO, "bench: %s cannot be written: %s", b.csv_path, strerror(errno));
    status = agree(r, status);
    if (status == LS_OK) status = b.messages ? run_messages(&b) : run_all(&b);
    if (b.csv != NULL && fclose(b.csv) != 0 && status == LS_OK)
        status = ls_fail(LS_ERR_IO, "bench: %s cannot be written: %s", b.csv_path, strerror(errno));
    free(b.set.item);
    return report_error(r, agree(r, status));
}
