/* `longspan bench`: what each mechanism costs, forward and backward, against its own projections and against what the
 * machine reaches in matrix products and in copying memory, all in one run; or what a training step costs.
 *
 * Everything is measured several times, its parts taking turns, and the medians are shown: a machine that is busy for a
 * while slows all parts alike. On several ranks a time is that of the slowest. */
#include "bench.h"

#include "mechanism.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan bench [options]\n"
    "       longspan bench --train CONFIG.yaml [options]\n"
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
    "  --device cpu|cuda    where; default cpu\n"
    "  --precision float32|tf32|bf16   of products on a GPU; default float32\n"
    "  --ranks P            as the middle one of P ranks, without the others (on one process): exact volumes for any "
    "P,\n"
    "                       and the time that this rank computes; but an estimate for local as causal cross attention "
    "(or\n"
    "                       local.align=1), where the data decide which keys are asked for\n"
    "  --messages           instead: time of messages between neighbours, by size (on at least 2 ranks); takes\n"
    "                       --repeat and --csv alone\n"
    "  --csv FILE           also write the figures there\n"
    "  --help               this text\n"
    "\n"
    "sgemm share: of exact softmax's products, 7 x 2 x length^2 x width operations, a triangle's half of it, in the\n"
    "core's time, against the rate of a large square product. Copy share: of the bytes that no core can do without,\n"
    "against the rate of a large copy (read and written bytes both count): forward it reads q, k, v and writes its\n"
    "output, backward it reads q, k, v and the output's gradient and writes those of q, k, v. Both rates are measured\n"
    "in the same turns. ratio l/p: layer over its projections. Ratios and shares are medians of those of the turns.\n"
    "\n"
    "With --train whole training steps of a configuration on made-up bytes are timed instead: forward, backward, sum "
    "over\n"
    "ranks, clipping and AdamW. Its matrix products are counted while it runs, and then done again by themselves.\n"
    "share of it: operations of the step's products / rate of a large square product / seconds of the step;\n"
    "alone/step: seconds of the same products by themselves / seconds of the step. Products are what BLAS or cuBLAS "
    "is\n"
    "asked for: what a kernel multiplies on its own, for example a fused attention of a GPU, is not among them.\n"
    "\n"
    "  --length N/M,..      tokens of source and target; N alone: of each. Default: data.max_source, data.max_target\n"
    "  --set KEY=VALUE      a key of the configuration\n"
    "  --products           also the kinds of products, those that take longest first\n"
    "  --device, --precision, --repeat, --csv as above, and no other\n";

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

/* A length with K or M behind it, and then the end, or one of the characters of `after`. */
static ls_status read_length(const char *text, const char *after, char **end, int64_t *value)
{
    const int64_t most = INT64_C(1) << 32;
    errno = 0;
    *value = strtoll(text, end, 10);
    const int wrong = *end == text || errno != 0 || *value < 1 || *value > most;
    if (!wrong && (**end == 'K' || **end == 'M')) *value *= *(*end)++ == 'K' ? 1024 : 1048576;
    if (wrong || *value > most || (**end != '\0' && strchr(after, **end) == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "bench: '%s' is no length: use e.g. 1K,4K,16K", text);
    return LS_OK;
}

static ls_status read_lengths(const char *text, bench *b)
{
    char *end;
    for (b->lengths = 0;; text = end + 1) {
        const int i = b->lengths++;
        if (i == BENCH_LENGTHS) LS_FAIL(LS_ERR_ARGUMENT, "bench: more than %d lengths", BENCH_LENGTHS);
        LS_TRY(read_length(text, ",/", &end, &b->length[i]));
        b->target[i] = 0;
        if (*end == '/') LS_TRY(read_length(end + 1, ",", &end, &b->target[i]));
        if (*end == '\0') return LS_OK;
    }
}

static ls_status read_device(const char *text, bench *b)
{
    if (strcmp(text, "cpu") != 0 && strcmp(text, "cuda") != 0)
        LS_FAIL(LS_ERR_ARGUMENT, "bench: there is no device %s: cpu, cuda", text);
    b->device = strcmp(text, "cuda") == 0 ? LS_CUDA : LS_CPU;
    b->device_given = 1;
    return LS_OK;
}

static ls_status read_precision(const char *text, bench *b)
{
    for (int i = LS_FLOAT32; i <= LS_BF16; i++) {
        if (strcmp(text, ls_precision_name((ls_precision)i)) != 0) continue;
        b->precision = (ls_precision)i;
        b->precision_given = 1;
        return LS_OK;
    }
    LS_FAIL(LS_ERR_ARGUMENT, "bench: there is no precision %s: float32, tf32, bf16", text);
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
    DEVICE_,
    PRECISION_,
    RANKS_,
    MESSAGES_,
    TRAIN_,
    PRODUCTS_,
    CSV_,
    HELP_
};
/* In the order of their numbers, from 1. */
static const char *const known[] = {
    "--mechanism", "--pattern",  "--length", "--softmax-limit", "--batch",     "--embed-dim", "--heads",
    "--repeat",    "--set",      "--cases",  "--device",        "--precision", "--ranks",     "--messages",
    "--train",     "--products", "--csv",    "--help",          NULL};

/* given: bit i is option i. One that `mode` would ignore is refused. */
static ls_status refuse_ignored(uint32_t given, uint32_t taken, const char *mode)
{
    for (int i = MECHANISM_; i <= HELP_; i++)
        if (given & ~taken & UINT32_C(1) << i) LS_FAIL(LS_ERR_ARGUMENT, "bench: %s: leave out %s", mode, known[i - 1]);
    return LS_OK;
}

static ls_status check_together(const bench *b, uint32_t given)
{
    const uint32_t always = 1u << REPEAT_ | 1u << CSV_ | 1u << HELP_;
    const uint32_t messages = always | 1u << MESSAGES_;
    const uint32_t train =
        always | 1u << TRAIN_ | 1u << LENGTH_ | 1u << SET_ | 1u << PRODUCTS_ | 1u << DEVICE_ | 1u << PRECISION_;
    if (b->dry > INT32_MAX) LS_FAIL(LS_ERR_ARGUMENT, "bench: --ranks %lld: at most %d", (long long)b->dry, INT32_MAX);
    if (b->dry > 0 && b->r->size > 1) LS_FAIL(LS_ERR_ARGUMENT, "bench: --ranks is for one process: leave out mpirun");
    if (b->train != NULL)
        LS_TRY(refuse_ignored(given, train, "--train takes its model from the configuration, which --set changes"));
    if (b->messages) LS_TRY(refuse_ignored(given, messages, "--messages times no attention"));
    if (b->messages && b->r->size < 2) LS_FAIL(LS_ERR_ARGUMENT, "bench: --messages needs at least 2 ranks: use mpirun");
    if (b->products && b->train == NULL) LS_FAIL(LS_ERR_ARGUMENT, "bench: --products is for --train");
    return LS_OK;
}

static ls_status parse(int argc, char **argv, bench *b)
{
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
                                            {"device", required_argument, NULL, DEVICE_},
                                            {"precision", required_argument, NULL, PRECISION_},
                                            {"ranks", required_argument, NULL, RANKS_},
                                            {"messages", no_argument, NULL, MESSAGES_},
                                            {"train", required_argument, NULL, TRAIN_},
                                            {"products", no_argument, NULL, PRODUCTS_},
                                            {"csv", required_argument, NULL, CSV_},
                                            {"help", no_argument, NULL, HELP_},
                                            {NULL, 0, NULL, 0}};
    char *end;
    int which;
    uint32_t given = 0;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        if (which >= MECHANISM_ && which <= HELP_) given |= UINT32_C(1) << which;
        if (which == MECHANISM_)
            b->mechanisms = optarg;
        else if (which == PATTERN_)
            b->patterns = optarg;
        else if (which == LENGTH_)
            LS_TRY(read_lengths(optarg, b));
        else if (which == LIMIT_)
            LS_TRY(read_length(optarg, "", &end, &b->softmax_limit));
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
        else if (which == DEVICE_)
            LS_TRY(read_device(optarg, b));
        else if (which == PRECISION_)
            LS_TRY(read_precision(optarg, b));
        else if (which == RANKS_)
            LS_TRY(read_count("bench", "--ranks", optarg, 1, &b->dry));
        else if (which == MESSAGES_)
            b->messages = 1;
        else if (which == TRAIN_)
            b->train = optarg;
        else if (which == PRODUCTS_)
            b->products = 1;
        else if (which == CSV_)
            b->csv_path = optarg;
        else if (which == HELP_)
            b->help = 1;
        else
            return refuse_option("bench", which, argv, known);
    }
    if (optind < argc) LS_FAIL(LS_ERR_ARGUMENT, "bench: takes no argument '%s'", argv[optind]);
    LS_TRY(check_together(b, given));
    if (b->repeat > BENCH_REPEAT) LS_FAIL(LS_ERR_ARGUMENT, "bench: --repeat: at most %d", BENCH_REPEAT);
    for (int i = 0; i < b->lengths && b->train == NULL; i++)
        if (b->target[i] > 0)
            LS_FAIL(LS_ERR_ARGUMENT, "bench: --length SOURCE/TARGET is for --train: an attention has one length");
    return check_names(b);
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
    const char *longest = ls_mechanism_find(c->mechanism)->longest;
    int set_longest = 0;
    for (int i = 0; i < b->set.count; i++) { /* see check_set */
        snprintf(text, sizeof text, "%s", b->set.item[i]);
        char *equals = strchr(text, '=');
        *equals = '\0';
        if (strncmp(text, c->mechanism, n) != 0 || text[n] != '.') continue;
        LS_TRY(ls_attention_set(o, text + n + 1, strtod(equals + 1, NULL)));
        set_longest |= longest != NULL && strcmp(text + n + 1, longest) == 0;
    }
    if (longest != NULL && bench_option(o, longest) < (double)length) {
        if (set_longest)
            LS_FAIL(LS_ERR_ARGUMENT, "bench: --set %s.%s=%g is shorter than --length %lld: make it as long",
                    c->mechanism, longest, bench_option(o, longest), (long long)length);
        LS_TRY(ls_attention_set(o, longest, (double)length));
    }
    return ls_attention_check(o);
}

/* --set as it stands, whichever cases there are. */
static ls_status check_set(const char *set)
{
    char text[256], *end;
    snprintf(text, sizeof text, "%s", set);
    char *equals = strchr(text, '='), *dot = strchr(text, '.');
    if (equals == NULL || dot == NULL || dot > equals)
        LS_FAIL(LS_ERR_ARGUMENT, "bench: --set %s: use MECHANISM.OPTION=VALUE", set);
    *equals = *dot = '\0';
    const double value = strtod(equals + 1, &end);
    if (end == equals + 1 || *end != '\0')
        LS_FAIL(LS_ERR_ARGUMENT, "bench: --set %s: '%s' is not a number", set, equals + 1);
    ls_attention_options o;
    ls_status status = ls_attention_defaults(text, &o);
    if (status == LS_OK) status = ls_attention_set(&o, dot + 1, value);
    return status == LS_OK ? LS_OK : ls_fail(status, "bench: --set %s: %s", set, ls_last_error());
}

static int measures(const bench *b, const char *mechanism, ls_pattern pattern)
{
    return lists(b->mechanisms, mechanism) && lists(b->patterns, letters[pattern]) &&
           ls_mechanism_has(mechanism, pattern);
}

/* An option of a mechanism that is not there to be timed changes nothing: that was not meant. */
static ls_status check_use(const bench *b, const char *set)
{
    char name[256];
    snprintf(name, sizeof name, "%.*s", (int)strcspn(set, "."), set);
    for (int pattern = LS_NS; pattern <= LS_CC; pattern++)
        if (measures(b, name, (ls_pattern)pattern)) return LS_OK;
    LS_FAIL(LS_ERR_ARGUMENT,
            "bench: --set %s: %s is not timed: leave out this --set, or have --mechanism and --pattern "
            "time it",
            set, name);
}

/* top NULL: only checks, before anything is timed. *cases grows by how many there are. */
static ls_status run_case(const bench *b, const ceilings *top, const bench_case *c, int64_t *cases)
{
    if (!measures(b, c->mechanism, c->pattern)) return LS_OK;
    for (int i = 0; i < b->lengths; i++) {
        ls_attention_options o;
        bench_figures f = {0};
        if (strcmp(c->mechanism, "softmax") == 0 && b->length[i] > b->softmax_limit) continue;
        LS_TRY(set_options(b, c, b->length[i], &o));
        ++*cases;
        if (top == NULL) continue;
        LS_TRY(bench_measure(b, top, &o, b->length[i], &f));
        bench_print_figures(b, c, b->length[i], &f);
    }
    return LS_OK;
}

static ls_status run_cases(const bench *b, const ceilings *top, int64_t *cases)
{
    *cases = 0;
    for (int i = 0; b->cases && table[i].mechanism != NULL; i++) LS_TRY(run_case(b, top, &table[i], cases));
    for (int m = 0; !b->cases && ls_mechanism_name(m) != NULL; m++)
        for (int pattern = LS_NS; pattern <= LS_CC; pattern++)
            LS_TRY(run_case(b, top, &(bench_case){ls_mechanism_name(m), (ls_pattern)pattern, ""}, cases));
    return LS_OK;
}

static ls_status check_cases(const bench *b)
{
    int64_t cases;
    for (int i = 0; i < b->set.count; i++) LS_TRY(check_set(b->set.item[i]));
    LS_TRY(run_cases(b, NULL, &cases));
    if (cases == 0)
        LS_FAIL(LS_ERR_ARGUMENT,
                "bench: nothing to time: the mechanism has none of these patterns, or no length is within "
                "--softmax-limit %lld",
                (long long)b->softmax_limit);
    for (int i = 0; i < b->set.count; i++) LS_TRY(check_use(b, b->set.item[i]));
    return LS_OK;
}

static ls_status run_all(bench *b)
{
    static const int64_t lengths[] = {1024, 4096, 16384};
    if (b->lengths == 0) {
        memcpy(b->length, lengths, sizeof lengths);
        b->lengths = 3;
    }
    int64_t cases;
    LS_TRY(check_cases(b));
    LS_TRY(ranks_device(b->r, b->device, &b->device_number));
    const ls_context_options options = bench_context(b);
    ls_context *ctx;
    LS_TRY(ls_context_create(&options, &ctx));
    ceilings top;
    ls_status status = bench_open_csv(b);
    if (status == LS_OK) {
        status = ceilings_open(b, ctx, &top);
        if (status == LS_OK) bench_print_header(b, &top);
        if (status == LS_OK) status = run_cases(b, &top, &cases);
        ceilings_close(&top);
    }
    ls_context_free(ctx);
    return status;
}

/* Every rank sends to the next and receives from the one before: what an exchange is made of. */
static ls_status run_messages(bench *b)
{
    enum { MOST = 1 << 24, ROUNDS = 20 };
    double t[BENCH_REPEAT];
    const int next = (b->r->rank + 1) % b->r->size, before = (b->r->rank + b->r->size - 1) % b->r->size;
    LS_TRY(bench_open_csv(b));
    char *memory = calloc(2, MOST);
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
            LS_TRY(bench_lap(b, b->r->world, begin, &t[i < 0 ? 0 : i]));
        }
        const double seconds = bench_median(t, b->repeat) / ROUNDS;
        if (b->r->rank == 0) printf("%12d %14.2f\n", bytes, 1e6 * seconds);
        if (b->csv != NULL) fprintf(b->csv, "%d,%.6g\n", bytes, seconds);
    }
    free(memory);
    return LS_OK;
}

int command_bench(int argc, char **argv, ranks *r)
{
    bench b = {.r = r, .softmax_limit = 4096, .batch = 1, .embed_dim = 512, .heads = 8, .repeat = 5};
    ls_status status = parse(argc, argv, &b);
    if (status == LS_OK && b.help) {
        if (r->rank == 0) fputs(usage, stdout);
        free(b.set.item);
        return EXIT_OK;
    }
    status = agree(r, status);
    if (status == LS_OK) status = b.train ? bench_train(&b) : b.messages ? run_messages(&b) : run_all(&b);
    const ls_status written = bench_close_csv(&b);
    if (status == LS_OK) status = written;
    free(b.set.item);
    return report_error(r, agree(r, status));
}
