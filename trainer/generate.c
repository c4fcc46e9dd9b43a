/* `longspan generate`: reads a source, encodes it over all ranks, and writes the target byte by byte. */
#include "beam.h"
#include "trainer.h"

#include "rng.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan generate CHECKPOINT [options]\n"
    "\n"
    "Reads a source text and writes the target that the model makes of it to standard output, byte by byte.\n"
    "\n"
    "  --input FILE        source text, taken as a whole, whatever data.max_source says; - is standard input "
    "(default)\n"
    "  --max-bytes N       stop after N bytes, if the model has not ended the text before (default 1024, or the\n"
    "                      model's max_len where that is less)\n"
    "  --greedy            always the most probable byte (default)\n"
    "  --beams N           the text of the best score that a search with N beams finds, at most 1024; it is written\n"
    "                      when it has been found\n"
    "  --length-penalty A  of the search: a text's score is its log-probability / (its bytes, and its end) ^ A,\n"
    "                      of what follows the prefix (default 1)\n"
    "  --temperature T     draw from probabilities ~ p^(1/T), T > 0 (default 1 with --top-k)\n"
    "  --top-k K           draw from the K most probable bytes only (default: from all)\n"
    "  --seed N            of the draws (default 0)\n"
    "  --prefix TEXT       the first bytes of the target, continued by the model; they count as bytes written\n"
    "  --set KEY=VALUE     change a key of the checkpoint's configuration, e.g. device=cpu\n"
    "  --help              this text\n";

enum { USUAL_BYTES = 1024, MOST_BEAMS = 1024 };

typedef struct generate_options {
    const char *checkpoint, *input, *prefix;
    int64_t max_bytes /* 0: as many as usual */, beams, top_k, seed;
    double temperature; /* 0: greedy */
    double length_penalty;
    text_list set;
    int help;
} generate_options;

/* ------------------------------------------------------------------------------------------------ arguments */

static ls_status read_number(const char *option, const char *text, int positive, double *value)
{
    char *end;
    const double v = strtod(text, &end);
    if (end == text || *end != '\0' || !(positive ? v > 0 : v >= 0) || !isfinite(v))
        LS_FAIL(LS_ERR_ARGUMENT, "generate: %s: '%s' is not a number %s", option, text,
                positive ? "greater than 0" : "from 0 on");
    *value = v;
    return LS_OK;
}

static ls_status parse(int argc, char **argv, generate_options *o)
{
    static const struct option options[] = {
        {"input", required_argument, NULL, 'i'},  {"max-bytes", required_argument, NULL, 'n'},
        {"greedy", no_argument, NULL, 'g'},       {"temperature", required_argument, NULL, 't'},
        {"beams", required_argument, NULL, 'b'},  {"length-penalty", required_argument, NULL, 'l'},
        {"top-k", required_argument, NULL, 'k'},  {"seed", required_argument, NULL, 's'},
        {"prefix", required_argument, NULL, 'p'}, {"set", required_argument, NULL, 'c'},
        {"help", no_argument, NULL, 'h'},         {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--input",  "--max-bytes", "--greedy",         "--temperature",
                                        "--top-k",  "--beams",     "--length-penalty", "--seed",
                                        "--prefix", "--set",       "--help",           NULL};
    *o = (generate_options){.input = "-", .prefix = "", .beams = 1, .length_penalty = -1};
    int greedy = 0, seeded = 0, which;
    opterr = 0; /* rank 0 alone says what is wrong */
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        switch (which) {
        case 'i':
            o->input = optarg;
            break;
        case 'n':
            LS_TRY(read_count("generate", "--max-bytes", optarg, 1, &o->max_bytes));
            break;
        case 'g':
            greedy = 1;
            break;
        case 't':
            LS_TRY(read_number("--temperature", optarg, 1, &o->temperature));
            break;
        case 'b':
            LS_TRY(read_count("generate", "--beams", optarg, 1, &o->beams));
            break;
        case 'l':
            LS_TRY(read_number("--length-penalty", optarg, 0, &o->length_penalty));
            break;
        case 'k':
            LS_TRY(read_count("generate", "--top-k", optarg, 1, &o->top_k));
            break;
        case 's':
            LS_TRY(read_count("generate", "--seed", optarg, 0, &o->seed));
            seeded = 1;
            break;
        case 'p':
            o->prefix = optarg;
            break;
        case 'c':
            LS_TRY(text_list_add(&o->set, optarg));
            break;
        case 'h':
            o->help = 1;
            return LS_OK;
        default:
            return refuse_option("generate", which, argv, known);
        }
    }
    if (greedy && (o->temperature > 0 || o->top_k > 0))
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --greedy draws nothing, so it does not go with --temperature or --top-k");
    if (o->top_k > 0 && !(o->temperature > 0)) o->temperature = 1;
    if (o->beams > MOST_BEAMS)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --beams %lld is more than %d", (long long)o->beams, MOST_BEAMS);
    if (o->beams > 1 && (greedy || o->temperature > 0))
        LS_FAIL(LS_ERR_ARGUMENT,
                "generate: --beams searches, so it does not go with --greedy, --temperature or --top-k");
    if (o->length_penalty >= 0 && o->beams == 1)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --length-penalty is of a search: it needs --beams 2 or more");
    if (o->length_penalty < 0) o->length_penalty = 1;
    if (seeded && !(o->temperature > 0))
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --seed is of draws: it needs --temperature or --top-k");
    if (optind != argc - 1)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: %s; see longspan generate --help",
                optind >= argc ? "which checkpoint?" : "one checkpoint is all it takes");
    if (o->max_bytes > INT32_MAX) /* positions end there */
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --max-bytes %lld is more than %d", (long long)o->max_bytes, INT32_MAX);
    o->checkpoint = argv[optind];
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ choosing */

typedef struct candidate {
    double logit;
    int32_t token;
} candidate;

/* The largest logits first, ties by token, so that the order is one and the same everywhere. */
static int by_logit(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->token < y->token ? -1 : 1;
}

/* The next token: a byte or the end. u in [0, 1) is the draw. */
static ls_status choose(const generate_options *o, const ls_real *logits, double u, int32_t *token)
{
    candidate list[MODEL_VOCABULARY];
    int n = 0;
    LS_TRY(decoder_check(logits));
    for (int32_t v = 0; v < MODEL_VOCABULARY; v++) {
        if (v == TOKEN_BOS) continue;
        list[n++] = (candidate){(double)logits[v], v};
    }
    qsort(list, (size_t)n, sizeof *list, by_logit);
    *token = list[0].token;
    if (!(o->temperature > 0)) return LS_OK;
    if (o->top_k > 0 && o->top_k < n) n = (int)o->top_k;
    double weight[MODEL_VOCABULARY], sum = 0;
    for (int i = 0; i < n; i++) sum += weight[i] = exp((list[i].logit - list[0].logit) / o->temperature);
    double left = u * sum;
    int i = 0;
    while (i < n - 1 && left >= weight[i]) left -= weight[i++];
    *token = list[i].token;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ the run */

typedef struct generation {
    config c;
    char *source;
    size_t source_size;
    int64_t bytes; /* to be written, prefix and end counted */
    model *m;
    ls_real *params;
    batch b;
    decoder *d;
    beam_search *search; /* rank 0, with beams: of each row */
    ls_real *logits;     /* (beams, MODEL_VOCABULARY) */
    int64_t *from;       /* (beams), what rank 0 chose; behind it: */
    int32_t *token;      /* (beams) */
    int32_t *done;       /* one */
} generation;

/* This rank's part of the source as a batch of one. Local. */
static ls_status make_batch(const ranks *r, generation *g)
{
    batch *b = &g->b;
    b->B = 1;
    LS_TRY(ls_shard_even(r->sequence, (int64_t)g->source_size, &b->source));
    const size_t n = (size_t)b->source.n;
    b->source_token = malloc((n + 1) * sizeof *b->source_token);
    b->source_pad = calloc(n + 1, 1);
    if (b->source_token == NULL || b->source_pad == NULL)
        LS_FAIL(LS_ERR_MEMORY, "generate: no memory for %zu source tokens", n);
    for (size_t t = 0; t < n; t++) b->source_token[t] = (unsigned char)g->source[(size_t)b->source.lo + t];
    return LS_OK;
}

/* Collective: everything up to the first step. */
static ls_status prepare(const generate_options *o, ranks *r, generation *g)
{
    /* before standard input is waited for */
    LS_TRY(checkpoint_config_everywhere(r, o->checkpoint, o->set.item, o->set.count, &g->c));
    const int64_t most = config_longest_target(&g->c);
    if (o->max_bytes > most)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: --max-bytes %lld is more than the %lld positions of max_len in %s",
                (long long)o->max_bytes, (long long)most, o->checkpoint);
    g->bytes = o->max_bytes > 0 ? o->max_bytes : ls_min(USUAL_BYTES, most);
    if ((int64_t)strlen(o->prefix) > g->bytes)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: the prefix has %zu bytes, more than the %lld to be written (--max-bytes)",
                strlen(o->prefix), (long long)g->bytes);
    LS_TRY(read_everywhere(r, o->input, INT32_MAX, &g->source, &g->source_size));
    if (g->source_size == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "generate: the input %s is empty: give at least one byte",
                strcmp(o->input, "-") == 0 ? "on standard input" : o->input);
    LS_TRY(config_fits(&g->c, (int64_t)g->source_size, 0));
    LS_TRY(ranks_split(r, &g->c, 0));
    LS_TRY(agree(r, model_create(r->sequence, &g->c, &g->m)));
    ls_status status = device_reals(r, "generate: parameters", model_count(g->m), &g->params);
    if (status == LS_OK) status = make_batch(r, g);
    LS_TRY(agree(r, status));
    training_state s = {.params = g->params};
    LS_TRY(load_everywhere(r, o->checkpoint, g->m, &s));
    return decoder_create(g->m, &g->b, o->beams, g->bytes, g->params, &g->d);
}

/* What rank 0 decided: all ranks take the next step, or none. */
typedef struct decision {
    int32_t token, status;
} decision;

/* Collective: byte i. Logits are the same everywhere; that rank 0's choice is sent makes sure that ranks stay together
 * even on machines whose exp differs. */
static ls_status decide(const generate_options *o, const ranks *r, int64_t i, const ls_real *logits, int32_t *token)
{
    enum { STREAM_DRAW = 0x44524157 };
    const int64_t forced = (int64_t)strlen(o->prefix);
    decision next = {0, LS_OK};
    if (r->rank == 0) {
        if (i < forced)
            next.token = (unsigned char)o->prefix[i];
        else
            next.status =
                (int32_t)choose(o, logits, ls_uniform((uint64_t)o->seed, STREAM_DRAW, 0, (uint64_t)i), &next.token);
        if (next.status == LS_OK && next.token < 256 && (putchar(next.token) == EOF || fflush(stdout) != 0))
            next.status =
                (int32_t)ls_fail(LS_ERR_IO, "generate: standard output cannot be written: %s", strerror(errno));
    }
    LS_TRY(broadcast_bytes(r, &next, sizeof next));
    *token = next.token;
    if (next.status == LS_OK) return LS_OK;
    return agree(r, r->rank == 0 ? (ls_status)next.status : LS_OK);
}

/* ------------------------------------------------------------------------------------------------ with beams */

/* Of from, token and done, which travel together. */
static size_t choice_bytes(const generate_options *o)
{
    return (size_t)o->beams * (sizeof(int64_t) + sizeof(int32_t)) + sizeof(int32_t);
}

static ls_status prepare_search(const generate_options *o, const ranks *r, generation *g)
{
    const size_t beams = (size_t)o->beams;
    g->logits = malloc(beams * MODEL_VOCABULARY * sizeof *g->logits);
    g->from = malloc(choice_bytes(o));
    if (g->logits == NULL || g->from == NULL) LS_FAIL(LS_ERR_MEMORY, "generate: no memory for %zu beams", beams);
    g->token = (int32_t *)(g->from + beams);
    g->done = g->token + beams;
    *g->done = 0;
    return r->rank == 0 ? beam_create(o->beams, o->length_penalty, &g->search) : LS_OK;
}

/* Rank 0: what was given, and the best that was found. */
static ls_status write_best(const generate_options *o, const generation *g)
{
    char *text;
    size_t size;
    LS_TRY(beam_best(g->search, &text, &size));
    const size_t given = strlen(o->prefix);
    const int written =
        fwrite(o->prefix, 1, given, stdout) == given && fwrite(text, 1, size, stdout) == size && fflush(stdout) == 0;
    free(text);
    if (!written) LS_FAIL(LS_ERR_IO, "generate: standard output cannot be written: %s", strerror(errno));
    return LS_OK;
}

/* Collective: as in decide, rank 0 chooses. */
static ls_status search(const generate_options *o, const ranks *r, generation *g)
{
    const int64_t forced = (int64_t)strlen(o->prefix);
    LS_TRY(agree(r, prepare_search(o, r, g)));
    for (int64_t b = 0; b < o->beams; b++) g->token[b] = TOKEN_BOS;
    for (int64_t i = 0; i < g->bytes && !*g->done; i++) {
        LS_TRY(decoder_step(g->d, g->token, g->params, g->logits));
        if (i < forced) {
            for (int64_t b = 0; b < o->beams; b++) g->token[b] = (unsigned char)o->prefix[i];
            continue;
        }
        LS_TRY(agree(r, r->rank == 0 ? beam_step(g->search, g->logits, g->token, g->from, g->done) : LS_OK));
        LS_TRY(broadcast_bytes(r, g->from, choice_bytes(o)));
        LS_TRY(decoder_reorder(g->d, g->from));
    }
    return agree(r, r->rank == 0 ? write_best(o, g) : LS_OK);
}

static ls_status generate(const generate_options *o, ranks *r, generation *g)
{
    ls_real logits[MODEL_VOCABULARY];
    LS_TRY(prepare(o, r, g));
    if (o->beams > 1) return search(o, r, g);
    int32_t token = TOKEN_BOS;
    for (int64_t i = 0; i < g->bytes && token != TOKEN_EOS; i++) {
        LS_TRY(decoder_step(g->d, &token, g->params, logits));
        LS_TRY(decide(o, r, i, logits, &token));
    }
    return LS_OK;
}

int command_generate(int argc, char **argv, ranks *r)
{
    generate_options o;
    generation g = {0};
    ls_status status = parse(argc, argv, &o);
    if (status == LS_OK && o.help) {
        if (r->rank == 0) fputs(usage, stdout);
    } else if (status == LS_OK) {
        status = generate(&o, r, &g);
    }
    beam_free(g.search);
    free(g.logits), free(g.from);
    decoder_free(g.d);
    model_free(g.m);
    batch_free(&g.b);
    device_free(r, g.params);
    free(g.source);
    free(o.set.item);
    return status == LS_OK ? EXIT_OK : report_error(r, status);
}
