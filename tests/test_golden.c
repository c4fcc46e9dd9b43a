/* test_golden DIR [N]: every group (or one in N) of every *.h5 in DIR (layout: golden/README.md) against the library,
 * in every layout of memory, on one rank or on many. A case of a mechanism that the library does not have is skipped.
 *
 * Tolerance: relative error max|a-b| / max|b| per tensor, 1e-5 in float (or 4 times the error that the file itself
 * states for a naive float32 evaluation, where that is more), 1e-10 in double. A gradient that is zero but for rounding
 * in the file (below 1e-9 of the largest gradient) is measured against the largest gradient.
 *
 * With LONGSPAN_TEST_PRECISION, on a GPU: 2e-2 for bf16, and an eighth of it for tf32, which has three bits more; and
 * the largest error of each file must be one that float32 does not make, or nothing was rounded. */
#include "harness.h"

#include <dirent.h>
#include <hdf5.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef LS_REAL_DOUBLE
#define TOLERANCE 1e-10
#define FLOAT_ERRORS 0.0
#else
#define TOLERANCE 1e-5
#define FLOAT_ERRORS 4.0
#endif

static const double least_rounded[] = {[LS_TF32] = 2e-5, [LS_BF16] = 1e-4};
static double worst; /* relative error of this file so far, and whose it is */
static char worst_name[400];

enum { MAX_NAMES = 4096 };

/* ------------------------------------------------------------------------------------------------ reading */

typedef struct names {
    int count;
    char *name[MAX_NAMES];
} names;

static void names_add(names *list, const char *name)
{
    if (list->count == MAX_NAMES) {
        printf("more than %d names in one group or folder\n", MAX_NAMES);
        MPI_Abort(here.comm, 1);
    }
    char *copy = NEW(char, strlen(name) + 1);
    strcpy(copy, name);
    list->name[list->count++] = copy;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void names_sort(names *list)
{
    qsort(list->name, (size_t)list->count, sizeof *list->name, by_text);
}

static void names_free(names *list)
{
    for (int i = 0; i < list->count; i++) free(list->name[i]);
    list->count = 0;
}

static herr_t visit_link(hid_t group, const char *name, const H5L_info_t *info, void *data)
{
    (void)group, (void)info;
    names_add(data, name);
    return 0;
}

static herr_t visit_attribute(hid_t object, const char *name, const H5A_info_t *info, void *data)
{
    (void)object, (void)info;
    names_add(data, name);
    return 0;
}

static names members(hid_t group, const char *path)
{
    names list = {0};
    if (path[0] != '.' && H5Lexists(group, path, H5P_DEFAULT) <= 0) return list;
    const hid_t id = H5Gopen2(group, path, H5P_DEFAULT);
    if (id < 0) return list;
    hsize_t from = 0;
    H5Literate(id, H5_INDEX_NAME, H5_ITER_INC, &from, visit_link, &list);
    H5Gclose(id);
    return list;
}

/* One dataset as numbers; x NULL: absent. */
typedef struct tensor {
    int ndim;
    hsize_t dim[8];
    int64_t count;
    double *x;
} tensor;

static tensor read_tensor(hid_t group, const char *folder, const char *name)
{
    tensor t = {0};
    char path[256];
    snprintf(path, sizeof path, "%s%s%s", folder, folder[0] != '\0' ? "/" : "", name);
    if (folder[0] != '\0' && H5Lexists(group, folder, H5P_DEFAULT) <= 0) return t;
    if (H5Lexists(group, path, H5P_DEFAULT) <= 0) return t;
    const hid_t set = H5Dopen2(group, path, H5P_DEFAULT);
    if (set < 0) return t;
    const hid_t space = H5Dget_space(set);
    t.ndim = H5Sget_simple_extent_ndims(space);
    t.count = (int64_t)H5Sget_simple_extent_npoints(space);
    if (t.ndim <= 8) {
        H5Sget_simple_extent_dims(space, t.dim, NULL);
        t.x = NEW(double, t.count);
        if (t.count > 0 && H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, t.x) < 0) {
            free(t.x);
            t.x = NULL;
        }
    }
    H5Sclose(space);
    H5Dclose(set);
    return t;
}

static ls_real *as_reals(const tensor *t)
{
    ls_real *x = NEW(ls_real, t->count);
    for (int64_t i = 0; i < t->count; i++) x[i] = (ls_real)t->x[i];
    return x;
}

static uint8_t *as_bytes(const tensor *t)
{
    uint8_t *x = NEW(uint8_t, t->count);
    for (int64_t i = 0; i < t->count; i++) x[i] = t->x[i] > 0.5;
    return x;
}

/* An attribute as a number or as text: 0 absent, 1 number, 2 text. */
static int read_attribute(hid_t group, const char *name, double *number, char *text, size_t size)
{
    if (H5Aexists(group, name) <= 0) return 0;
    const hid_t id = H5Aopen(group, name, H5P_DEFAULT), type = H5Aget_type(id);
    int kind = 0;
    if (H5Tget_class(type) == H5T_STRING) {
        if (H5Tis_variable_str(type) > 0) {
            const hid_t memory = H5Tcopy(H5T_C_S1);
            H5Tset_size(memory, H5T_VARIABLE);
            H5Tset_cset(memory, H5Tget_cset(type));
            char *read = NULL;
            if (H5Aread(id, memory, &read) >= 0 && read != NULL) {
                snprintf(text, size, "%s", read);
                H5free_memory(read);
                kind = 2;
            }
            H5Tclose(memory);
        } else {
            const size_t length = H5Tget_size(type);
            char *read = NEW(char, length + 1);
            if (H5Aread(id, type, read) >= 0) {
                snprintf(text, size, "%s", read);
                kind = 2;
            }
            free(read);
        }
    } else if (H5Aread(id, H5T_NATIVE_DOUBLE, number) >= 0) {
        kind = 1;
    }
    H5Tclose(type);
    H5Aclose(id);
    return kind;
}

static int64_t integer(hid_t group, const char *name)
{
    double x = 0;
    char text[64];
    return read_attribute(group, name, &x, text, sizeof text) == 1 ? (int64_t)x : -1;
}

/* ------------------------------------------------------------------------------------------------ one case */

static char trouble[2048]; /* what is wrong with the case under way, one complaint after the other */

static void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void complain(const char *format, ...)
{
    const size_t used = strlen(trouble);
    va_list list;
    va_start(list, format);
    snprintf(trouble + used, sizeof trouble - used, "; ");
    const size_t start = strlen(trouble);
    vsnprintf(trouble + start, sizeof trouble - start, format, list);
    va_end(list);
}

static int is_one_of(const char *name, const char *const *list)
{
    for (; *list != NULL; list++)
        if (strcmp(name, *list) == 0) return 1;
    return 0;
}

/* The mechanism's own options from the attributes that bear an option's name or symbol. */
static void take_options(hid_t group, problem *p)
{
    static const char *const not_options[] = {"mechanism",   "pattern",
                                              "level",       "B",
                                              "H",           "T",
                                              "S",           "d",
                                              "E",           "seed",
                                              "scale",       "dropout",
                                              "training",    "need_weights",
                                              "f32_err_out", "f32_err_grad",
                                              NULL};
    int count = 0;
    const ls_option_info *info = ls_mechanism_options(p->options.mechanism, &count);
    names list = {0};
    hsize_t from = 0;
    H5Aiterate2(group, H5_INDEX_NAME, H5_ITER_INC, &from, visit_attribute, &list);
    for (int i = 0; i < list.count; i++) {
        const char *name = list.name[i];
        if (is_one_of(name, not_options)) continue;
        int known = 0;
        for (int o = 0; o < count; o++)
            known |= strcmp(info[o].name, name) == 0 || (info[o].symbol != NULL && strcmp(info[o].symbol, name) == 0);
        if (!known) continue; /* a fact of the file that is no option here; if it mattered, the numbers will say so */
        double value = 0;
        char text[64] = "";
        const int kind = read_attribute(group, name, &value, text, sizeof text);
        if (kind == 2 && text[0] == '\0') continue;
        if (kind == 2) {
            const word_row *w = words;
            while (w->option != NULL && (strcmp(w->option, name) != 0 || strcmp(w->word, text) != 0)) w++;
            if (w->option == NULL) {
                complain("attribute %s: cases.def has no number for the word '%s'", name, text);
                continue;
            }
            value = w->value;
        }
        if (ls_attention_set(&p->options, name, value) != LS_OK) complain("attribute %s: %s", name, ls_last_error());
    }
    names_free(&list);
}

static void take_params(hid_t group, problem *p)
{
    names list = members(group, "params");
    for (int i = 0; i < p->parameters; i++) {
        const ls_param_info *info = &p->parameter[i].info;
        const char *name = p->parameter[i].name;
        tensor t = read_tensor(group, "params", name);
        int same = t.x != NULL && t.ndim == info->ndim && t.count == info->count;
        for (int k = 0; same && k < t.ndim; k++) same = (int64_t)t.dim[k] == info->dim[k];
        if (t.x == NULL)
            complain("the file has no parameter %s", name);
        else if (!same)
            complain("parameter %s has another shape in the file", name);
        for (int64_t k = 0; same && k < t.count; k++) p->params[info->offset + k] = (ls_real)t.x[k];
        free(t.x);
        for (int k = 0; k < list.count; k++)
            if (list.name[k][0] != '\0' && strcmp(list.name[k], name) == 0) list.name[k][0] = '\0';
    }
    for (int k = 0; k < list.count; k++)
        if (list.name[k][0] != '\0') complain("the library has no parameter %s", list.name[k]);
    names_free(&list);
}

static ls_real *take_input(hid_t group, const char *name, int64_t count)
{
    tensor t = read_tensor(group, "inputs", name);
    if (t.x == NULL) return NULL;
    ls_real *x = as_reals(&t);
    if (t.count != count) {
        complain("inputs/%s has %lld numbers, not %lld", name, (long long)t.count, (long long)count);
        free(x);
        x = NULL;
    }
    free(t.x);
    return x;
}

static uint8_t *take_padding(hid_t group, const char *name, int64_t count)
{
    tensor t = read_tensor(group, "inputs", name);
    if (t.x == NULL) return NULL;
    uint8_t *x = as_bytes(&t);
    if (t.count != count) {
        complain("inputs/%s has the wrong size", name);
        free(x);
        x = NULL;
    }
    free(t.x);
    return x;
}

static void take_inputs(hid_t group, problem *p)
{
    static const char *const known[] = {"q",     "k",         "v",       "u", "x",     "x_q", "x_kv", "pad_q",
                                        "pad_k", "attn_mask", "dropout", "W", "noise", "idx", NULL};
    names list = members(group, "inputs");
    for (int i = 0; i < list.count; i++)
        if (!is_one_of(list.name[i], known)) complain("this test has no place for inputs/%s", list.name[i]);
    names_free(&list);

    const int64_t rows_q = p->B * p->heads * p->T * p->width, rows_k = p->B * p->heads * p->S * p->width;
    if (p->options.level == LS_LEVEL_CORE) {
        p->query = take_input(group, "q", rows_q);
        p->key = take_input(group, "k", rows_k);
        p->value = take_input(group, "v", rows_k);
        p->alias = ALIAS_NONE;
        if (p->query == NULL) { /* a mechanism of one input */
            p->query = take_input(group, "u", rows_q);
            p->alias = ALIAS_ALL;
        }
    } else if (is_cross(p)) {
        p->query = take_input(group, "x_q", rows_q);
        p->key = take_input(group, "x_kv", rows_k);
        p->alias = ALIAS_VALUE_NULL;
    } else {
        p->query = take_input(group, "x", rows_q);
        p->alias = ALIAS_ALL_NULL;
    }
    const int whole = p->query != NULL && (p->alias == ALIAS_NONE         ? p->key != NULL && p->value != NULL
                                           : p->alias == ALIAS_VALUE_NULL ? p->key != NULL
                                                                          : 1);
    if (!whole) complain("inputs are missing");

    p->pad_q = take_padding(group, "pad_q", p->B * p->T);
    p->pad_k = take_padding(group, "pad_k", p->B * p->S);
    p->give_pads = (p->pad_q != NULL ? 1 : 0) + (p->pad_k != NULL ? 2 : 0);
    tensor mask = read_tensor(group, "inputs", "attn_mask");
    if (mask.x != NULL) {
        p->attn_mask_per_head = mask.ndim == 3;
        p->attn_mask = take_input(group, "attn_mask", (mask.ndim == 3 ? p->B * p->H : 1) * p->T * p->S);
        free(mask.x);
    }
    p->dropout_mask = take_input(group, "dropout", p->B * p->H * p->T * p->S);
    if (p->dropout_mask != NULL) p->training = 1;
    tensor random = read_tensor(group, "inputs", "W");
    if (random.x != NULL) p->features = as_reals(&random), p->n_features = random.count;
    free(random.x);
    random = read_tensor(group, "inputs", "noise");
    if (random.x != NULL) p->noise = as_reals(&random), p->n_noise = random.count;
    free(random.x);
    random = read_tensor(group, "inputs", "idx");
    if (random.x != NULL) {
        p->samples_per_batch = random.ndim == 3;
        p->num_samples = (int64_t)random.dim[random.ndim - 1];
        p->samples = NEW(int32_t, random.count);
        for (int64_t i = 0; i < random.count; i++) p->samples[i] = (int32_t)random.x[i];
    }
    free(random.x);
    tensor top = read_tensor(group, "outputs", "top");
    p->wants_selected = top.x != NULL;
    free(top.x);

    tensor dout = read_tensor(group, "", "dout");
    if (dout.x == NULL || dout.count % (p->B * p->heads * p->T) != 0) {
        complain("dout is missing or has the wrong size");
    } else {
        p->out_width = dout.count / (p->B * p->heads * p->T);
        p->dout = as_reals(&dout);
    }
    free(dout.x);
}

/* The case as a problem. 0: the library has no such mechanism. */
static int take_case(hid_t group, const char *name, problem *p)
{
    double number = 0;
    char mechanism[64] = "", pattern[16] = "", level[16] = "", weights[16] = "";
    *p = (problem){0};
    snprintf(p->text, sizeof p->text, "%s", name);
    if (read_attribute(group, "mechanism", &number, mechanism, sizeof mechanism) != 2) {
        complain("no attribute mechanism");
        return 1;
    }
    int listed = 0;
    for (int i = 0; ls_mechanism_name(i) != NULL; i++) listed |= strcmp(ls_mechanism_name(i), mechanism) == 0;
    if (!listed) return mechanism_of(mechanism) == NULL ? (complain("unknown mechanism %s", mechanism), 1) : 0;

    if (ls_attention_defaults(mechanism, &p->options) != LS_OK) {
        complain("defaults: %s", ls_last_error());
        return 1;
    }
    read_attribute(group, "pattern", &number, pattern, sizeof pattern);
    read_attribute(group, "level", &number, level, sizeof level);
    read_attribute(group, "need_weights", &number, weights, sizeof weights);
    int known = 0;
    for (int i = LS_NS; i <= LS_CC; i++)
        if (strcmp(pattern_letters((ls_pattern)i), pattern) == 0) {
            p->options.pattern = (ls_pattern)i;
            known = 1;
        }
    if (!known) complain("unknown pattern '%s'", pattern);
    if (strcmp(level, "kernel") == 0)
        p->options.level = LS_LEVEL_CORE;
    else if (strcmp(level, "layer") == 0)
        p->options.level = LS_LEVEL_LAYER;
    else
        complain("unknown level '%s'", level);
    p->weights = strcmp(weights, "head") == 0 ? 2 : strcmp(weights, "mean") == 0 ? 1 : 0;
    p->options.embed_dim = integer(group, "E");
    p->options.num_heads = integer(group, "H");
    p->options.scale = 0;
    char text[64];
    if (read_attribute(group, "scale", &number, text, sizeof text) == 1) p->options.scale = number;
    p->options.dropout = 0;
    p->training = integer(group, "training") > 0;
    const int64_t B = integer(group, "B"), T = integer(group, "T"), S = integer(group, "S");
    if (B < 1 || T < 1 || S < 1 || p->options.embed_dim < 1 || p->options.num_heads < 1 ||
        p->options.embed_dim % p->options.num_heads != 0) {
        complain("impossible sizes");
        return 1;
    }
    take_options(group, p);
    problem_shape(p, B, T, S);
    take_inputs(group, p);
    if (trouble[0] == '\0' && problem_parameters(p) != LS_OK) complain("create: %s", here.error);
    if (trouble[0] == '\0') take_params(group, p);
    return 1;
}

static double attribute_or_zero(hid_t group, const char *name)
{
    double x = 0;
    char text[64];
    return read_attribute(group, name, &x, text, sizeof text) == 1 ? x : 0;
}

/* fmax, but for what it does with the sign of 0; of many numbers, and the compiler would call a function for each */
static double larger(double a, double b)
{
    return b > a ? b : a;
}

static void compare(const char *name, const tensor *want, int64_t count, const ls_real *have, double scale,
                    double tolerance)
{
    if (have == NULL || want->count != count) {
        complain("%s: %s", name, have == NULL ? "the library gives none" : "another size");
        return;
    }
    double difference = 0, most = scale;
    for (int64_t i = 0; i < count; i++) {
        const double e = fabs((double)have[i] - want->x[i]);
        difference = e <= 1e300 ? larger(difference, e) : INFINITY;
        most = larger(most, fabs(want->x[i]));
        if (!(difference <= 1e300)) break;
    }
    const double error = difference <= 0 ? 0 : most > 0 ? difference / most : INFINITY;
    if (error > worst) {
        worst = error;
        snprintf(worst_name, sizeof worst_name, "%s, %s", here.doing, name);
    }
    if (!(error <= tolerance)) complain("%s: error %.2e > %.1e", name, error, tolerance);
}

static void compare_case(hid_t group, const problem *p, const answer *a)
{
    /* other hardware rounds other sums: a GPU may be as far again */
    const double room = getenv("LONGSPAN_TEST_GPU") != NULL ? 2 : 1;
    double for_out = room * fmax(TOLERANCE, FLOAT_ERRORS * attribute_or_zero(group, "f32_err_out"));
    double for_grad = room * fmax(TOLERANCE, FLOAT_ERRORS * attribute_or_zero(group, "f32_err_grad"));
    if (test_precision() != LS_FLOAT32) for_out = for_grad = rounded_tolerance[test_precision()];
    tensor t = read_tensor(group, "outputs", "out");
    if (t.x == NULL)
        complain("the file has no outputs/out");
    else
        compare("out", &t, a->n_out, a->out, 0, for_out);
    free(t.x);
    t = read_tensor(group, "outputs", "weights");
    if (t.x != NULL) compare("weights", &t, a->n_weights, a->weights, 0, for_out);
    if (t.x == NULL && p->weights) complain("the file has no outputs/weights");
    free(t.x);

    t = read_tensor(group, "outputs", "top");
    int64_t others = 0;
    for (int64_t i = 0; t.x != NULL && i < t.count; i++) others += (t.x[i] > 0.5) != (a->selected[i] != 0);
    if (others > 0) complain("top: %lld queries are not the ones selected", (long long)others);
    free(t.x);

    names list = members(group, "grads");
    tensor *grad = NEW(tensor, list.count);
    double all = 0;
    for (int i = 0; i < list.count; i++) {
        grad[i] = read_tensor(group, "grads", list.name[i]);
        for (int64_t k = 0; k < grad[i].count; k++) all = larger(all, fabs(grad[i].x[k]));
    }
    for (int i = 0; i < list.count; i++) {
        const char *name = list.name[i];
        double most = 0;
        for (int64_t k = 0; k < grad[i].count; k++) most = larger(most, fabs(grad[i].x[k]));
        const double scale = most <= 1e-9 * all ? all : 0;
        static const char *const of_query[] = {"q", "u", "x", "x_q", NULL}, *const of_key[] = {"k", "x_kv", NULL};
        int index = -1;
        for (int k = 0; k < p->parameters; k++)
            if (strcmp(p->parameter[k].name, name) == 0) index = k;
        char label[128];
        snprintf(label, sizeof label, "grads/%s", name);
        if (index >= 0) { /* before the inputs: u is local's parameter and s4d's input */
            const ls_param_info *info = &p->parameter[index].info;
            compare(label, &grad[i], info->count, a->dparams + info->offset, scale, for_grad);
        } else if (is_one_of(name, of_query)) {
            compare(label, &grad[i], a->n_query, a->dquery, scale, for_grad);
        } else if (is_one_of(name, of_key)) {
            compare(label, &grad[i], a->n_key, a->dkey, scale, for_grad);
        } else if (strcmp(name, "v") == 0) {
            compare(label, &grad[i], a->n_key, a->dvalue, scale, for_grad);
        } else {
            complain("%s: the library has no such gradient", label);
        }
        free(grad[i].x);
    }
    if (list.count == 0) complain("the file has no grads");
    if (a->wrote_alias) complain("the gradient of an alias was written");
    free(grad);
    names_free(&list);
}

enum { SKIPPED, DONE };

/* The case in each layout; on several ranks evenly sharded first, then anyhow. Collective, same result everywhere. */
static int run_case(hid_t file, const char *path, const char *name)
{
    static const ls_layout layouts[] = {LS_BHTD, LS_BTHD, LS_TBHD};
    static const char *const layout_names[] = {"(B,H,T,d)", "(B,T,H,d)", "(T,B,H,d)"};
    problem p;
    trouble[0] = '\0';
    snprintf(here.doing, sizeof here.doing, "%.100s %.100s", path, name);
    const hid_t group = H5Gopen2(file, name, H5P_DEFAULT);
    if (group < 0) {
        complain("no group");
        verdict(0, "%s %s%s", path, name, trouble);
        return DONE;
    }
    if (!take_case(group, name, &p)) {
        problem_free(&p);
        H5Gclose(group);
        return SKIPPED;
    }
    int ok = trouble[0] == '\0'; /* the same on every rank: all read the same file */
    char all[4096] = "";
    if (!ok) snprintf(all, sizeof all, "%s", trouble);
    const int first = p.options.level == LS_LEVEL_LAYER ? 1 : 0; /* layers: batch first is one layout */
    for (int i = first; ok && i < 3; i++) {
        draw r = draw_from(5, (uint64_t)i);
        int64_t queries[64], keys[64];
        const int kind = i == first ? SPLIT_EVEN : i == 1 ? SPLIT_ONE : SPLIT_RANDOM;
        draw_split(&r, kind, here.size, p.T, queries);
        draw_split(&r, kind, here.size, p.S, keys);
        trouble[0] = '\0';
        p.options.layout = layouts[i];
        answer a;
        const int status = problem_run(here.all, here.comm, &p, queries, keys, &a);
        if (status != LS_OK)
            complain("%s", here.error);
        else
            compare_case(group, &p, &a);
        if (trouble[0] != '\0') {
            const size_t used = strlen(all);
            snprintf(all + used, sizeof all - used, " [%s, %s shards]%s", layout_names[i], split_name[kind], trouble);
        }
        answer_free(&a);
    }
    verdict(all[0] == '\0', "%s %s%s", path, name, all[0] == ';' ? all + 1 : all);
    problem_free(&p);
    H5Gclose(group);
    return DONE;
}

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    int skipped = 0, broken = 0;
    names files = {0};
    DIR *folder = argc == 2 || argc == 3 ? opendir(argv[1]) : NULL;
    const int wanted = argc == 3 ? atoi(argv[2]) : 1, every = wanted < 1 ? 1 : wanted;
    if (folder == NULL) {
        if (here.rank == 0) printf("usage: test_golden DIR [N]: a folder of *.h5 files, one case in N of each\n");
    } else {
        for (const struct dirent *entry; (entry = readdir(folder)) != NULL;) {
            const size_t length = strlen(entry->d_name);
            if (length > 3 && strcmp(entry->d_name + length - 3, ".h5") == 0) names_add(&files, entry->d_name);
        }
        closedir(folder);
        names_sort(&files);
    }
    for (int i = 0; i < files.count; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", argv[1], files.name[i]);
        const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
        if (file < 0) {
            if (here.rank == 0) printf("FAILED: %s is no HDF5 file\n", path);
            broken++;
            continue;
        }
        worst = 0;
        names groups = members(file, ".");
        for (int g = 0; g < groups.count; g += every) {
            watchdog(240);
            if (run_case(file, files.name[i], groups.name[g]) == SKIPPED) skipped++;
        }
        if (here.rank == 0 && worst > 0) printf("largest relative error %.2e: %s\n", worst, worst_name);
        if (test_precision() != LS_FLOAT32 && !(worst > least_rounded[test_precision()])) {
            if (here.rank == 0)
                printf("FAILED: %s: %s rounds nothing\n", files.name[i], ls_precision_name(test_precision()));
            broken++;
        }
        names_free(&groups);
        H5Fclose(file);
    }
    names_free(&files);
    here.failed += broken;
    const int nothing = here.passed + here.failed == 0;
    const int status = here.failed > 0 || nothing;
    if (here.rank == 0) {
        if (nothing) printf("nothing ran\n");
        printf("%d passed, %d failed", here.passed, here.failed);
        if (skipped > 0) printf(", %d skipped", skipped);
        printf("\n");
    }
    ls_context_free(here.all);
    ls_context_free(here.one);
    MPI_Finalize();
    return status;
}
