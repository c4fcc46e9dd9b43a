/* `longspan info`: what this build can do, from the same tables that the program itself works by. */
#include "trainer.h"

#include "mechanism.h"

#include <getopt.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan info [options]\n"
    "\n"
    "Shows version, number type, devices, precisions, transports, the MPI and BLAS libraries, and the mechanisms with "
    "their options.\n"
    "\n"
    "  --config   the keys of a configuration instead, each with default, range and a line of help\n"
    "  --markdown the tables of README.md: mechanisms, their options, the keys of a configuration\n"
    "  --json     as one JSON object (with the keys of a configuration in it)\n"
    "  --help     this text\n";

enum { PATTERNS = 4 };
static const char *const short_name[PATTERNS] = {"NS", "CS", "NC", "CC"};
static const char *const number_type = sizeof(ls_real) == sizeof(float) ? "float32" : "float64";
/* What this build was made with; whether a GPU is there is another question, see print_devices. */
static const char *const *device_names(void)
{
    static const char *const cpu[] = {"cpu", NULL}, *const both[] = {"cpu", "cuda", NULL};
    return ls_device_find(LS_CUDA) == NULL ? cpu : both;
}

static const char *const *precision_names(void)
{
    static const char *const cpu[] = {"float32", NULL}, *const both[] = {"float32", "tf32", "bf16", NULL};
    return ls_device_find(LS_CUDA) == NULL ? cpu : both;
}

static const char *const *transport_names(void)
{
    static const char *const mpi[] = {"self", "mpi", NULL}, *const both[] = {"self", "mpi", "nccl", NULL};
    return ls_has_nccl() ? both : mpi;
}

/* The GPUs of this machine, one to a line. */
static void print_devices(void)
{
    const ls_device_ops *ops = ls_device_find(LS_CUDA);
    int count = 0;
    if (ops == NULL) return;
    if (ops->count(&count) != LS_OK || count == 0) printf("%-12sno GPU is visible\n", "");
    for (int i = 0; i < count; i++) {
        char text[300];
        ops->describe(i, text, sizeof text);
        printf("%-12scuda %d: %s\n", "", i, text);
    }
}

static void mpi_library(char name[MPI_MAX_LIBRARY_VERSION_STRING])
{
    int length = 0;
    MPI_Get_library_version(name, &length);
    name[strcspn(name, "\n,")] = 0; /* the first part is the name and version */
}

static void print_list(const char *title, const char *const *list)
{
    printf("%-12s", title);
    for (int i = 0; list[i] != NULL; i++) printf("%s%s", i ? ", " : "", list[i]);
    printf("\n");
}

/* The mechanism's parameters in a layer of this pattern, "a, b": those that are there whatever the options, with the
 * names that an attention of the smallest width gives them. */
static void parameters(const char *name, ls_pattern pattern, ls_context *ctx, char *text, size_t size)
{
    ls_attention_options o;
    ls_attention *attention;
    text[0] = 0;
    if (ls_attention_defaults(name, &o) != LS_OK) return;
    o.pattern = pattern, o.level = LS_LEVEL_LAYER, o.embed_dim = 2, o.num_heads = 1;
    const char *longest = ls_mechanism_find(name)->longest;
    if (longest != NULL) ls_attention_set(&o, longest, 1); /* causal patterns ask for it */
    if (ls_attention_create(ctx, &o, &attention) != LS_OK) return;
    for (int i = 0; i < ls_attention_num_params(attention); i++) {
        const size_t used = strlen(text);
        snprintf(text + used, size - used, "%s%s", i ? ", " : "", ls_attention_param(attention, i)->name);
    }
    ls_attention_free(attention);
}

/* What crosses ranks in a forward pass, in order: "reduce, scan". */
static void crossings(const char *name, ls_pattern pattern, char *text, size_t size)
{
    ls_crossing crossing = LS_NONE;
    text[0] = 0;
    for (int i = 0; ls_mechanism_phase(name, pattern, i, &crossing) != NULL; i++) {
        const size_t used = strlen(text);
        if (crossing != LS_NONE)
            snprintf(text + used, size - used, "%s%s", used ? ", " : "", ls_crossing_name(crossing));
    }
}

/* Patterns of which the same is told are told of together: their names in `text` ("NS CC") for the first of them, 0 for
 * the others. told: PATTERNS texts, each of `size` bytes. */
static int alike(const char *name, const char *told, size_t size, int pattern, char text[64])
{
    const char *mine = told + (size_t)pattern * size;
    text[0] = 0;
    for (int p = 0; p < PATTERNS; p++) {
        if (!ls_mechanism_has(name, (ls_pattern)p) || strcmp(told + (size_t)p * size, mine) != 0) continue;
        if (p < pattern) return 0;
        if (p > pattern && text[0] == 0) return 0; /* this pattern does not exist */
        strcat(strcat(text, text[0] ? " " : ""), short_name[p]);
    }
    return text[0] != 0;
}

static void print_patterns(const char *name, const char *separator)
{
    for (int p = 0; p < PATTERNS; p++) {
        const int has = ls_mechanism_has(name, (ls_pattern)p), step = ls_mechanism_has_step(name, (ls_pattern)p);
        printf("%s%s%s", separator, has ? short_name[p] : "-", step ? "*" : "");
    }
}

static void print_text(ls_context *ctx)
{
    char library[MPI_MAX_LIBRARY_VERSION_STRING], text[1024];
    int version, subversion;
    mpi_library(library);
    MPI_Get_version(&version, &subversion);
    printf("%-12s%s\n%-12s%s\n", "version", LS_VERSION_STRING, "numbers", number_type);
    print_list("devices", device_names());
    print_devices();
    print_list("precisions", precision_names());
    print_list("transports", transport_names());
    printf("%-12s%s (MPI %d.%d)\n", "MPI", library, version, subversion);
    printf("%-12sOpenBLAS, its kernels for %s\n", "BLAS", ls_blas_kernels());
    if (ls_blas_better_kernels() != NULL)
        printf("%-12sslow: this processor can do more, set OPENBLAS_CORETYPE=%s\n", "", ls_blas_better_kernels());
    printf("\n");
    printf("Mechanisms. Patterns: NS, CS noncausal and causal self attention, NC, CC noncausal and causal cross "
           "attention;\n"
           "* can also decode token by token. Then what crosses ranks in a forward pass, and a layer's parameters.\n");
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        const char *name = ls_mechanism_name(m);
        int count = 0;
        const ls_option_info *option = ls_mechanism_options(name, &count);
        printf("\n%-12s", name);
        print_patterns(name, "  ");
        printf("\n");
        for (int o = 0; o < count; o++) printf("  %-14s %-8g %s\n", option[o].name, option[o].initial, option[o].help);
        char crosses[PATTERNS][512], has[PATTERNS][1024];
        for (int p = 0; p < PATTERNS; p++) {
            crossings(name, (ls_pattern)p, crosses[p], sizeof crosses[p]);
            parameters(name, (ls_pattern)p, ctx, has[p], sizeof has[p]);
        }
        for (int p = 0; p < PATTERNS; p++)
            if (alike(name, crosses[0], sizeof crosses[0], p, text)) printf("  %-14s crosses: %s\n", text, crosses[p]);
        for (int p = 0; p < PATTERNS; p++)
            if (alike(name, has[0], sizeof has[0], p, text)) printf("  %-14s parameters: %s\n", text, has[p]);
    }
}

/* ------------------------------------------------------------------------------------------------ Markdown */

static void markdown_mechanisms(void)
{
    char text[64];
    printf("| mechanism | NS | CS | NC | CC | crosses ranks |\n|---|---|---|---|---|---|\n");
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        const char *name = ls_mechanism_name(m);
        char crosses[PATTERNS][512];
        int told = 0;
        printf("| %s |", name);
        for (int p = 0; p < PATTERNS; p++) {
            const int has = ls_mechanism_has(name, (ls_pattern)p), step = ls_mechanism_has_step(name, (ls_pattern)p);
            printf(" %s |", !has ? "" : step ? "x*" : "x");
            crossings(name, (ls_pattern)p, crosses[p], sizeof crosses[p]);
        }
        for (int p = 0; p < PATTERNS; p++)
            if (alike(name, crosses[0], sizeof crosses[0], p, text))
                printf("%s %s: %s", told++ ? ";" : "", text, crosses[p]);
        printf(" |\n");
    }
}

/* A pipe ends a cell. */
static void print_cell(const char *text)
{
    printf("| ");
    for (; *text != 0; text++) printf(*text == '|' ? "\\|" : "%c", *text);
    printf(" ");
}

static void print_markdown(void)
{
    markdown_mechanisms();
    printf("\n| option | default | meaning |\n|---|---|---|\n");
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        int count = 0;
        const ls_option_info *option = ls_mechanism_options(ls_mechanism_name(m), &count);
        for (int o = 0; o < count; o++) {
            printf("| %s: `%s` | %g ", ls_mechanism_name(m), option[o].name, option[o].initial);
            print_cell(option[o].help);
            printf("|\n");
        }
    }
    printf("\n| key | default | range | meaning |\n|---|---|---|---|\n");
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        char range[256] = "";
        if (key->kind == KEY_OPTION) continue;
        for (int w = 0; key->words != NULL && key->words[w] != NULL; w++) {
            const size_t used = strlen(range);
            snprintf(range + used, sizeof range - used, "%s%s", w ? "|" : "", key->words[w]);
        }
        if (range[0] == 0)
            snprintf(range, sizeof range, "%s",
                     key->range != NULL           ? key->range
                     : key->kind == KEY_SEED      ? "[0, 2^64)"
                     : key->kind == KEY_MECHANISM ? "a mechanism"
                                                  : "text");
        printf("| `%s` ", key->path);
        print_cell(key->initial[0] != 0 ? key->initial : "\"\"");
        print_cell(range);
        print_cell(key->help);
        printf("|\n");
    }
}

/* ------------------------------------------------------------------------------------------------ JSON */

static json_t *json_list(const char *const *list)
{
    json_t *array = json_array();
    for (int i = 0; list != NULL && list[i] != NULL; i++) json_array_append_new(array, json_string(list[i]));
    return array;
}

/* JSON has no infinity: null means that there is no bound. */
static json_t *json_bound(double x)
{
    json_t *number = json_real(x);
    return number == NULL ? json_null() : number;
}

static json_t *json_mechanism(const char *name)
{
    json_t *patterns = json_array(), *steps = json_array(), *options = json_array();
    for (int p = 0; p < PATTERNS; p++) {
        const char *pattern = ls_pattern_name((ls_pattern)p);
        if (ls_mechanism_has(name, (ls_pattern)p)) json_array_append_new(patterns, json_string(pattern));
        if (ls_mechanism_has_step(name, (ls_pattern)p)) json_array_append_new(steps, json_string(pattern));
    }
    int count = 0;
    const ls_option_info *o = ls_mechanism_options(name, &count);
    for (; count > 0; count--, o++) {
        json_array_append_new(options,
                              json_pack("{s:s, s:s, s:f, s:o, s:o, s:b, s:s}", "name", o->name, "symbol", o->symbol,
                                        "default", o->initial, "min", json_bound(o->min), "max", json_bound(o->max),
                                        "whole", o->is_integer, "help", o->help ? o->help : ""));
    }
    return json_pack("{s:s, s:o, s:o, s:o}", "name", name, "patterns", patterns, "steps", steps, "options", options);
}

static ls_status print_json(void)
{
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    mpi_library(library);
    json_t *mechanisms = json_array(), *keys = json_array();
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        json_array_append_new(mechanisms, json_mechanism(ls_mechanism_name(m)));
    }
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        json_t *object = json_pack("{s:s, s:s?, s:s?, s:s?}", "key", key->path, "default", key->initial, "range",
                                   key->range, "help", key->help);
        if (key->words != NULL) json_object_set_new(object, "words", json_list(key->words));
        json_array_append_new(keys, object);
    }
    json_t *all = json_pack("{s:s, s:s, s:o, s:o, s:o, s:s, s:s, s:o, s:o}", "version", LS_VERSION_STRING, "numbers",
                            number_type, "devices", json_list(device_names()), "precisions",
                            json_list(precision_names()), "transports", json_list(transport_names()), "mpi", library,
                            "blas", ls_blas_kernels(), "mechanisms", mechanisms, "config", keys);
    const int failed = all == NULL || json_dumpf(all, stdout, JSON_INDENT(2)) != 0;
    json_decref(all);
    if (failed) LS_FAIL(LS_ERR_IO, "info: the JSON cannot be written");
    printf("\n");
    return LS_OK;
}

int command_info(int argc, char **argv, ranks *r)
{
    static const struct option options[] = {{"config", no_argument, NULL, 'c'},
                                            {"markdown", no_argument, NULL, 'm'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--config", "--markdown", "--json", "--help", NULL};
    int reference = 0, json = 0, markdown = 0, which;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        if (which == 'c')
            reference = 1;
        else if (which == 'm')
            markdown = 1;
        else if (which == 'j')
            json = 1;
        else if (which == 'h') {
            if (r->rank == 0) fputs(usage, stdout);
            return EXIT_OK;
        } else
            return report_error(r, refuse_option("info", which, argv, known));
    }
    if (optind < argc) {
        return report_error(r, ls_fail(LS_ERR_ARGUMENT, "info: takes no argument '%s'", argv[optind]));
    }
    if (reference + json + markdown > 1) {
        return report_error(r, ls_fail(LS_ERR_ARGUMENT, "info: --config, --markdown and --json: one at a time"));
    }
    ls_context *alone = NULL; /* in which rank 0 can ask attentions for their parameters */
    ls_status status = LS_OK;
    if (r->rank == 0) {
        if (!json && !reference && !markdown) status = ls_context_create(&(ls_context_options){.seed = 0}, &alone);
        if (status != LS_OK)
            ;
        else if (markdown)
            print_markdown();
        else if (json)
            status = print_json();
        else if (reference)
            config_reference(stdout);
        else
            print_text(alone);
    }
    ls_context_free(alone);
    return report_error(r, agree(r, status));
}
