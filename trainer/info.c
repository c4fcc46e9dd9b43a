/* `longspan info`: what this build can do, from the same tables that the program itself works by. */
#include "trainer.h"

#include <getopt.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "usage: longspan info [options]\n"
    "\n"
    "Shows version, number type, devices, transports, the MPI library, and the mechanisms with their options.\n"
    "\n"
    "  --config   the keys of a configuration instead, each with default, range and a line of help\n"
    "  --json     as one JSON object (with the keys of a configuration in it)\n"
    "  --help     this text\n";

enum { PATTERNS = 4 };
static const char *const short_name[PATTERNS] = {"NS", "CS", "NC", "CC"};
static const char *const number_type = sizeof(ls_real) == sizeof(float) ? "float32" : "float64";
/* A CUDA or NCCL build adds its own here. */
static const char *const devices[] = {"cpu", NULL};
static const char *const transports[] = {"self", "mpi", NULL};

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

static void print_text(void)
{
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int version, subversion;
    mpi_library(library);
    MPI_Get_version(&version, &subversion);
    printf("%-12s%s\n%-12s%s\n", "version", LS_VERSION_STRING, "numbers", number_type);
    print_list("devices", devices);
    print_list("transports", transports);
    printf("%-12s%s (MPI %d.%d)\n\n", "MPI", library, version, subversion);
    printf("mechanisms  patterns: NS, CS noncausal and causal self attention, NC, CC noncausal and causal cross\n"
           "            attention; * can also decode token by token\n\n");
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        const char *name = ls_mechanism_name(m);
        int count = 0;
        const ls_option_info *option = ls_mechanism_options(name, &count);
        printf("  %-12s", name);
        for (int p = 0; p < PATTERNS; p++) {
            const int has = ls_mechanism_has(name, (ls_pattern)p), step = ls_mechanism_has_step(name, (ls_pattern)p);
            printf(" %s%s", has ? short_name[p] : "- ", step ? "*" : " ");
        }
        for (int o = 0; o < count; o++) printf("%s%s=%g", o ? ", " : "  ", option[o].name, option[o].initial);
        printf("\n");
    }
    printf("\nlongspan info --config says what the options mean.\n");
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
    json_t *all = json_pack("{s:s, s:s, s:o, s:o, s:s, s:o, s:o}", "version", LS_VERSION_STRING, "numbers", number_type,
                            "devices", json_list(devices), "transports", json_list(transports), "mpi", library,
                            "mechanisms", mechanisms, "config", keys);
    const int failed = all == NULL || json_dumpf(all, stdout, JSON_INDENT(2)) != 0;
    json_decref(all);
    if (failed) LS_FAIL(LS_ERR_IO, "info: the JSON cannot be written");
    printf("\n");
    return LS_OK;
}

int command_info(int argc, char **argv, ranks *r)
{
    static const struct option options[] = {{"config", no_argument, NULL, 'c'},
                                            {"json", no_argument, NULL, 'j'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    static const char *const known[] = {"--config", "--json", "--help", NULL};
    int reference = 0, json = 0, which;
    opterr = 0;
    optind = 1;
    while ((which = getopt_long(argc, argv, ":", options, NULL)) != -1) {
        if (which == 'c')
            reference = 1;
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
    ls_status status = LS_OK;
    if (r->rank == 0) {
        if (json)
            status = print_json();
        else if (reference)
            config_reference(stdout);
        else
            print_text();
    }
    return report_error(r, agree(r, status));
}
