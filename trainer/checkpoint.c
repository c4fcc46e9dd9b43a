/* Saving and loading runs. Tensors go by name: the order in the file, and of the digests, is that of the names' bytes,
 * so that a file can be checked without knowing its model. */
#include "checkpoint.h"

#include "h5.h"
#include "real.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

#ifdef LS_REAL_DOUBLE
#error "checkpoints hold float32: the trainer is built with float only"
#endif

enum { GROUPS = 3 };
static const char *const group_name[GROUPS] = {"params", "adam_m", "adam_v"};

/* ------------------------------------------------------------------------------------------------ digests */

typedef struct digest {
    XXH3_state_t *state;
} digest;

static ls_status digest_begin(digest *d)
{
    d->state = XXH3_createState();
    if (d->state == NULL) LS_FAIL(LS_ERR_MEMORY, "checkpoint: no memory for a digest");
    XXH3_64bits_reset(d->state);
    return LS_OK;
}

static uint64_t digest_end(digest *d)
{
    const uint64_t value = XXH3_64bits_digest(d->state);
    XXH3_freeState(d->state);
    d->state = NULL;
    return value;
}

static void digest_add(digest *d, const void *x, size_t bytes)
{
    XXH3_64bits_update(d->state, x, bytes);
}

static void digest_tensor(digest *d, const char *name, int ndim, const int64_t *dim, uint64_t of_bytes)
{
    digest_add(d, name, strlen(name) + 1);
    digest_add(d, dim, (size_t)ndim * sizeof *dim);
    digest_add(d, &of_bytes, sizeof of_bytes);
}

/* The attributes of the file, in the order in which state_digest takes them. */
typedef struct header {
    int64_t version, count;
    training_state state;
    uint64_t digest;
    char *config;
} header;

static ls_status digest_header(const header *h, uint64_t *value)
{
    digest d;
    LS_TRY(digest_begin(&d));
    digest_add(&d, CHECKPOINT_FORMAT, sizeof CHECKPOINT_FORMAT);
    digest_add(&d, &h->version, sizeof h->version);
    digest_add(&d, &h->state.step, sizeof h->state.step);
    digest_add(&d, &h->state.samples, sizeof h->state.samples);
    digest_add(&d, &h->state.seed, sizeof h->state.seed);
    digest_add(&d, &h->count, sizeof h->count);
    digest_add(&d, &h->state.data_digest, sizeof h->state.data_digest);
    digest_add(&d, &h->state.best_nll, sizeof h->state.best_nll);
    digest_add(&d, h->config, strlen(h->config) + 1);
    digest_add(&d, &h->digest, sizeof h->digest);
    *value = digest_end(&d);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ the model's list */

static int by_name(const void *a, const void *b)
{
    return strcmp((*(const model_tensor *const *)a)->name, (*(const model_tensor *const *)b)->name);
}

/* The tensors of a model in the order of their names, and the digest of those of all groups that were seen so far. */
typedef struct listing {
    const model_tensor **tensor;
    digest all;
} listing;

static ls_status listing_begin(const model *m, listing *l)
{
    const int n = model_num_tensors(m);
    *l = (listing){NULL, {NULL}};
    LS_TRY(digest_begin(&l->all));
    l->tensor = malloc((size_t)ls_max(n, 1) * sizeof *l->tensor);
    if (l->tensor == NULL) LS_FAIL(LS_ERR_MEMORY, "checkpoint: no memory for a list of %d tensors", n);
    for (int i = 0; i < n; i++) l->tensor[i] = model_tensor_at(m, i);
    qsort(l->tensor, (size_t)n, sizeof *l->tensor, by_name);
    return LS_OK;
}

/* Also after a failure. */
static uint64_t listing_end(listing *l)
{
    free(l->tensor);
    return l->all.state == NULL ? 0 : digest_end(&l->all);
}

/* ------------------------------------------------------------------------------------------------ save */

static ls_status write_tensor(h5_file *f, const char *group, const model_tensor *t, const ls_real *x, digest *all)
{
    char name[H5_NAME];
    snprintf(name, sizeof name, "%s/%s", group, t->name);
    const uint64_t of_bytes = XXH3_64bits(x, (size_t)t->count * sizeof *x);
    LS_TRY(h5_array_put(f, name, H5T_IEEE_F32LE, t->ndim, t->dim, x));
    LS_TRY(h5_put(f, name, "digest", H5T_STD_U64LE, &of_bytes));
    digest_tensor(all, t->name, t->ndim, t->dim, of_bytes);
    return LS_OK;
}

static ls_status write_tensors(h5_file *f, const model *m, const training_state *s, uint64_t *value)
{
    const ls_real *const values[GROUPS] = {s->params, s->adam_m, s->adam_v};
    listing l;
    ls_status status = LS_OK;
    LS_TRY_GOTO(listing_begin(m, &l));
    for (int g = 0; g < GROUPS; g++) {
        LS_TRY_GOTO(h5_group_create(f, group_name[g]));
        for (int i = 0; i < model_num_tensors(m); i++)
            LS_TRY_GOTO(write_tensor(f, group_name[g], l.tensor[i], values[g] + l.tensor[i]->offset, &l.all));
    }
done:
    *value = listing_end(&l);
    return status;
}

static ls_status write_header(h5_file *f, const header *h)
{
    uint64_t state_digest;
    LS_TRY(digest_header(h, &state_digest));
    LS_TRY(h5_put_text(f, "/", "format", CHECKPOINT_FORMAT));
    LS_TRY(h5_put(f, "/", "version", H5T_STD_I64LE, &h->version));
    LS_TRY(h5_put(f, "/", "step", H5T_STD_I64LE, &h->state.step));
    LS_TRY(h5_put(f, "/", "samples", H5T_STD_I64LE, &h->state.samples));
    LS_TRY(h5_put(f, "/", "seed", H5T_STD_U64LE, &h->state.seed));
    LS_TRY(h5_put(f, "/", "count", H5T_STD_I64LE, &h->count));
    LS_TRY(h5_put(f, "/", "data_digest", H5T_STD_U64LE, &h->state.data_digest));
    LS_TRY(h5_put(f, "/", "best_nll", H5T_IEEE_F64LE, &h->state.best_nll));
    LS_TRY(h5_put_text(f, "/", "config", h->config));
    LS_TRY(h5_put(f, "/", "digest", H5T_STD_U64LE, &h->digest));
    return h5_put(f, "/", "state_digest", H5T_STD_U64LE, &state_digest);
}

static ls_status write_checkpoint(const char *path, const model *m, const char *config_text, const training_state *s)
{
    h5_file f;
    char *text = strdup(config_text);
    if (text == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for the configuration", path);
    header h = {.version = CHECKPOINT_VERSION, .count = model_count(m), .state = *s, .config = text};
    ls_status status = h5_create(path, &f);
    if (status == LS_OK) status = write_tensors(&f, m, s, &h.digest);
    if (status == LS_OK) status = write_header(&f, &h);
    if (status == LS_OK) status = h5_commit(&f);
    h5_close(&f);
    free(text);
    return status;
}

/* The step of a name like step-000123.h5, or -1. */
static int64_t step_of(const char *name)
{
    int64_t step = 0;
    int digits = 0;
    if (strncmp(name, "step-", 5) != 0) return -1;
    for (name += 5; *name >= '0' && *name <= '9'; name++, digits++) {
        if (step > (INT64_MAX - 9) / 10) return -1;
        step = 10 * step + (*name - '0');
    }
    return digits >= 6 && strcmp(name, ".h5") == 0 ? step : -1;
}

static int newest_first(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* The steps of a directory's step files, the newest first; to be freed. A directory that is not there has none. */
static ls_status list_steps(const char *directory, int64_t **steps, int64_t *n)
{
    int64_t room = 0;
    *steps = NULL;
    *n = 0;
    DIR *dir = opendir(directory);
    if (dir == NULL && errno == ENOENT) return LS_OK;
    if (dir == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be listed (%s)", directory, strerror(errno));
    for (const struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        const int64_t step = step_of(entry->d_name);
        if (step < 0) continue;
        if (*n == room) {
            room = room == 0 ? 16 : 2 * room;
            int64_t *more = realloc(*steps, (size_t)room * sizeof *more);
            if (more == NULL) {
                free(*steps);
                *steps = NULL;
                closedir(dir);
                LS_FAIL(LS_ERR_MEMORY, "%s: no memory for its list", directory);
            }
            *steps = more;
        }
        (*steps)[(*n)++] = step;
    }
    closedir(dir);
    if (*n > 0) qsort(*steps, (size_t)*n, sizeof **steps, newest_first);
    return LS_OK;
}

static ls_status step_path(const char *directory, int64_t step, char path[H5_PATH])
{
    if (snprintf(path, H5_PATH, "%s/step-%06lld.h5", directory, (long long)step) >= H5_PATH)
        LS_FAIL(LS_ERR_ARGUMENT, "%.60s...: the name of the run directory is too long", directory);
    return LS_OK;
}

static void best_path(const char *directory, char path[H5_PATH])
{
    snprintf(path, H5_PATH, "%.*s/best.h5", (int)(H5_PATH - 16), directory);
}

/* `saved` stays even when older runs have left files of later steps. */
static ls_status remove_old(const char *directory, int64_t keep, int64_t saved)
{
    char path[H5_PATH];
    int64_t *steps, n, others = 0;
    LS_TRY(list_steps(directory, &steps, &n));
    ls_status status = LS_OK;
    for (int64_t i = 0; i < n; i++) {
        if (steps[i] == saved || ++others < keep) continue;
        LS_TRY_GOTO(step_path(directory, steps[i], path));
        if (unlink(path) != 0 && errno != ENOENT)
            LS_TRY_GOTO(ls_fail(LS_ERR_IO, "%s: the old checkpoint cannot be removed (%s)", path, strerror(errno)));
    }
done:
    free(steps);
    return status;
}

ls_status checkpoint_save(const char *directory, int best, int64_t keep, const model *m, const char *config_text,
                          const training_state *s)
{
    char path[H5_PATH];
    if (s->params == NULL || s->adam_m == NULL || s->adam_v == NULL || s->step < 0)
        LS_FAIL(LS_ERR_ARGUMENT, "checkpoint: there is nothing to save at step %lld", (long long)s->step);
    LS_TRY(step_path(directory, s->step, path));
    if (best) best_path(directory, path);
    h5_remove_leftovers(directory, ".step-");
    h5_remove_leftovers(directory, ".best.h5");
    LS_TRY(write_checkpoint(path, m, config_text, s));
    return best || keep < 1 ? LS_OK : remove_old(directory, keep, s->step);
}

ls_status checkpoint_latest(const char *directory, char path[1200])
{
    int64_t *steps, n;
    path[0] = 0;
    LS_TRY(list_steps(directory, &steps, &n));
    const ls_status status = n > 0 ? step_path(directory, steps[0], path) : LS_OK;
    free(steps);
    if (n > 0) return status;
    best_path(directory, path);
    if (access(path, F_OK) != 0) path[0] = 0;
    return LS_OK;
}

static int is_whole(const char *path)
{
    checkpoint_summary s;
    if (checkpoint_summarize(path, &s) != LS_OK) return 0;
    checkpoint_summary_free(&s);
    return 1;
}

ls_status checkpoint_other(const char *damaged, char path[1200])
{
    char directory[H5_PATH];
    const char *slash = strrchr(damaged, '/');
    int64_t *steps, n;
    snprintf(directory, sizeof directory, "%.*s", slash == NULL ? 1 : (int)(slash - damaged) + 1,
             slash == NULL ? "." : damaged);
    directory[strlen(directory) - (slash != NULL && slash > damaged)] = 0;
    path[0] = 0;
    LS_TRY(list_steps(directory, &steps, &n));
    ls_status status = LS_OK;
    for (int64_t i = 0; i <= n && status == LS_OK; i++) {
        if (i < n)
            status = step_path(directory, steps[i], path);
        else
            best_path(directory, path);
        if (status == LS_OK && is_whole(path)) break;
        path[0] = 0;
    }
    free(steps);
    return status;
}

/* ------------------------------------------------------------------------------------------------ open */

static ls_status check_kind(const h5_file *f, int64_t *version)
{
    char *format;
    if (h5_get_text(f, "/", "format", &format) != LS_OK)
        LS_FAIL(LS_ERR_FORMAT, "%s: is not a checkpoint of Longspan: %.300s", f->path, ls_last_error());
    const int ours = strcmp(format, CHECKPOINT_FORMAT) == 0, data = strcmp(format, DATA_FORMAT) == 0;
    char seen[48];
    snprintf(seen, sizeof seen, "%s", format);
    free(format);
    if (!ours)
        LS_FAIL(LS_ERR_FORMAT, "%s: the format is \"%s\", not \"%s\"%s", f->path, seen, CHECKPOINT_FORMAT,
                data ? ": this is a data set" : "");
    LS_TRY(h5_get(f, "/", "version", H5T_STD_I64LE, version));
    if (*version != CHECKPOINT_VERSION)
        LS_FAIL(LS_ERR_FORMAT, "%s: format version %lld, this program reads %d", f->path, (long long)*version,
                (int)CHECKPOINT_VERSION);
    return LS_OK;
}

static ls_status read_header(const h5_file *f, header *h)
{
    uint64_t stored, computed;
    LS_TRY(check_kind(f, &h->version));
    LS_TRY(h5_get(f, "/", "step", H5T_STD_I64LE, &h->state.step));
    LS_TRY(h5_get(f, "/", "samples", H5T_STD_I64LE, &h->state.samples));
    LS_TRY(h5_get(f, "/", "seed", H5T_STD_U64LE, &h->state.seed));
    LS_TRY(h5_get(f, "/", "count", H5T_STD_I64LE, &h->count));
    LS_TRY(h5_get(f, "/", "data_digest", H5T_STD_U64LE, &h->state.data_digest));
    LS_TRY(h5_get(f, "/", "best_nll", H5T_IEEE_F64LE, &h->state.best_nll));
    LS_TRY(h5_get_text(f, "/", "config", &h->config));
    LS_TRY(h5_get(f, "/", "digest", H5T_STD_U64LE, &h->digest));
    LS_TRY(h5_get(f, "/", "state_digest", H5T_STD_U64LE, &stored));
    LS_TRY(digest_header(h, &computed));
    if (stored != computed || h->state.step < 0 || h->state.samples < 0)
        LS_FAIL(LS_ERR_FORMAT, "%s: the attributes do not match state_digest: the checkpoint is damaged, use another",
                f->path);
    return LS_OK;
}

static ls_status open_checkpoint(const char *path, h5_file *f, header *h)
{
    *h = (header){0};
    LS_TRY(h5_open(path, f));
    const ls_status status = read_header(f, h);
    if (status == LS_OK) return LS_OK;
    h5_close(f);
    free(h->config);
    h->config = NULL;
    return status;
}

static void close_checkpoint(h5_file *f, header *h)
{
    h5_close(f);
    free(h->config);
    h->config = NULL;
}

ls_status checkpoint_config(const char *path, char **text)
{
    h5_file f;
    header h;
    *text = NULL;
    LS_TRY(open_checkpoint(path, &f, &h));
    *text = h.config;
    h.config = NULL;
    close_checkpoint(&f, &h);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ load */

typedef struct shape_text {
    char text[96];
} shape_text;

static shape_text shape_of(int ndim, const int64_t *dim)
{
    shape_text s = {""};
    for (int i = 0; i < ndim; i++) {
        const size_t used = strlen(s.text);
        snprintf(s.text + used, sizeof s.text - used, "%s%lld", i > 0 ? "x" : "", (long long)dim[i]);
    }
    return s;
}

/* Both lists are sorted: where they part, a tensor is missing in the one or in the other. */
static ls_status compare_names(const h5_file *f, const char *group, const h5_names *names, const model *m,
                               const model_tensor *const *list)
{
    const int64_t n = model_num_tensors(m);
    for (int64_t i = 0; i < ls_max(names->n, n); i++) {
        const char *in_file = i < names->n ? names->name[i] : NULL, *wanted = i < n ? list[i]->name : NULL;
        const int order = in_file == NULL ? 1 : wanted == NULL ? -1 : strcmp(in_file, wanted);
        if (order > 0)
            LS_FAIL(LS_ERR_FORMAT, "%s: tensor %s/%s is missing: the checkpoint is of another model configuration",
                    f->path, group, wanted);
        if (order < 0)
            LS_FAIL(LS_ERR_FORMAT,
                    "%s: tensor %s/%s does not belong to the model: the checkpoint is of another model configuration",
                    f->path, group, in_file);
    }
    return LS_OK;
}

static ls_status check_shape(const h5_array *a, const model_tensor *t)
{
    if (a->ndim == t->ndim && memcmp(a->dim, t->dim, (size_t)t->ndim * sizeof *t->dim) == 0) return LS_OK;
    LS_FAIL(LS_ERR_FORMAT, "%s is %s, but the model has %s: the checkpoint is of another model configuration", a->where,
            shape_of(a->ndim, a->dim).text, shape_of(t->ndim, t->dim).text);
}

/* x NULL: the values are not wanted. */
static ls_status read_values(const h5_array *a, uint64_t of_bytes, ls_real *x)
{
    if (x == NULL) return LS_OK;
    LS_TRY(h5_array_read(a, 0, a->count, x));
    if (XXH3_64bits(x, (size_t)a->count * sizeof *x) != of_bytes)
        LS_FAIL(LS_ERR_FORMAT, "%s does not match its digest: the checkpoint is damaged, use another", a->where);
    return LS_OK;
}

static ls_status read_tensor(const h5_file *f, const char *group, const model_tensor *t, ls_real *x, digest *all)
{
    char name[H5_NAME];
    h5_array a;
    uint64_t of_bytes = 0;
    snprintf(name, sizeof name, "%s/%s", group, t->name);
    LS_TRY(h5_array_open(f, name, H5T_IEEE_F32LE, 0, &a));
    ls_status status = check_shape(&a, t);
    if (status == LS_OK) status = h5_get(f, name, "digest", H5T_STD_U64LE, &of_bytes);
    if (status == LS_OK) status = read_values(&a, of_bytes, x);
    h5_array_close(&a);
    digest_tensor(all, t->name, t->ndim, t->dim, of_bytes);
    return status;
}

static ls_status check_total(const h5_file *f, const header *h, uint64_t computed)
{
    if (computed != h->digest)
        LS_FAIL(LS_ERR_FORMAT,
                "%s: the tensors do not match the attribute digest: the checkpoint is damaged, "
                "use another",
                f->path);
    return LS_OK;
}

static ls_status load_tensors(const h5_file *f, const model *m, const training_state *s, uint64_t *computed)
{
    ls_real *const values[GROUPS] = {s->params, s->adam_m, s->adam_v};
    listing l;
    ls_status status = LS_OK;
    LS_TRY_GOTO(listing_begin(m, &l));
    for (int g = 0; g < GROUPS; g++) {
        h5_names names;
        LS_TRY_GOTO(h5_group_names(f, group_name[g], &names));
        status = compare_names(f, group_name[g], &names, m, l.tensor);
        free(names.name);
        if (status != LS_OK) goto done;
        for (int i = 0; i < model_num_tensors(m); i++) {
            const model_tensor *t = l.tensor[i];
            LS_TRY_GOTO(read_tensor(f, group_name[g], t, values[g] == NULL ? NULL : values[g] + t->offset, &l.all));
        }
    }
done:
    *computed = listing_end(&l);
    return status;
}

ls_status checkpoint_load(const char *path, const model *m, training_state *s)
{
    h5_file f;
    header h;
    uint64_t computed;
    if (s->params == NULL) LS_FAIL(LS_ERR_ARGUMENT, "checkpoint: no room for the parameters of %s", path);
    LS_TRY(open_checkpoint(path, &f, &h));
    ls_status status = load_tensors(&f, m, s, &computed);
    if (status == LS_OK && h.count != model_count(m))
        status = ls_fail(LS_ERR_FORMAT, "%s: has %lld parameters, but the model has %lld", path, (long long)h.count,
                         (long long)model_count(m));
    if (status == LS_OK) status = check_total(&f, &h, computed);
    ls_real *const values[GROUPS] = {s->params, s->adam_m, s->adam_v};
    if (status == LS_OK) {
        *s = h.state;
        s->params = values[0];
        s->adam_m = values[1];
        s->adam_v = values[2];
    } else {
        for (int g = 0; g < GROUPS; g++)
            if (values[g] != NULL) ls_zero(values[g], model_count(m)); /* nobody shall go on with a part */
    }
    close_checkpoint(&f, &h);
    return status;
}

/* ------------------------------------------------------------------------------------------------ summary */

static double norm_of(const ls_real *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* Group 0 tells the shapes, the others must have the same. */
static ls_status summarize_tensor(const h5_file *f, int g, const char *called, checkpoint_tensor *t, digest *all)
{
    char name[H5_NAME + 8];
    h5_array a;
    uint64_t of_bytes = 0;
    if (strlen(called) >= sizeof t->name) LS_FAIL(LS_ERR_FORMAT, "%s: the name %s is too long", f->path, called);
    if (g > 0 && strcmp(t->name, called) != 0)
        LS_FAIL(LS_ERR_FORMAT, "%s: group %s has a tensor %s where params has %s", f->path, group_name[g], called,
                t->name);
    snprintf(name, sizeof name, "%s/%s", group_name[g], called);
    LS_TRY(h5_array_open(f, name, H5T_IEEE_F32LE, 0, &a));
    if (g == 0) {
        *t = (checkpoint_tensor){.ndim = a.ndim, .count = a.count};
        snprintf(t->name, sizeof t->name, "%.95s", called);
        memcpy(t->dim, a.dim, sizeof t->dim);
    }
    ls_real *x = malloc((size_t)a.count * sizeof *x); /* no more than the file */
    ls_status status = x == NULL ? ls_fail(LS_ERR_MEMORY, "%s: no memory for its values", a.where) : LS_OK;
    if (status == LS_OK && (a.ndim != t->ndim || memcmp(a.dim, t->dim, sizeof t->dim) != 0))
        status = ls_fail(LS_ERR_FORMAT, "%s is %s, but params/%s is %s", a.where, shape_of(a.ndim, a.dim).text, t->name,
                         shape_of(t->ndim, t->dim).text);
    if (status == LS_OK) status = h5_get(f, name, "digest", H5T_STD_U64LE, &of_bytes);
    if (status == LS_OK) status = read_values(&a, of_bytes, x);
    if (status == LS_OK) t->norm[g] = norm_of(x, a.count);
    free(x);
    h5_array_close(&a);
    digest_tensor(all, called, t->ndim, t->dim, of_bytes);
    return status;
}

static ls_status summarize_group(const h5_file *f, int g, checkpoint_summary *s, digest *all)
{
    h5_names names;
    LS_TRY(h5_group_names(f, group_name[g], &names));
    ls_status status = LS_OK;
    if (g == 0) {
        s->tensors = names.n;
        s->tensor = calloc((size_t)ls_max(names.n, 1), sizeof *s->tensor);
        if (s->tensor == NULL) status = ls_fail(LS_ERR_MEMORY, "%s: no memory for a list of its tensors", f->path);
    } else if (names.n != s->tensors) {
        status = ls_fail(LS_ERR_FORMAT, "%s: group %s has %lld tensors, but params has %lld", f->path, group_name[g],
                         (long long)names.n, (long long)s->tensors);
    }
    for (int64_t i = 0; status == LS_OK && i < names.n; i++)
        status = summarize_tensor(f, g, names.name[i], &s->tensor[i], all);
    free(names.name);
    return status;
}

ls_status checkpoint_summarize(const char *path, checkpoint_summary *s)
{
    h5_file f;
    header h;
    digest all = {NULL};
    *s = (checkpoint_summary){0};
    LS_TRY(open_checkpoint(path, &f, &h));
    ls_status status = digest_begin(&all);
    for (int g = 0; status == LS_OK && g < GROUPS; g++) status = summarize_group(&f, g, s, &all);
    const uint64_t computed = all.state == NULL ? 0 : digest_end(&all);
    if (status == LS_OK) status = check_total(&f, &h, computed);
    s->state = h.state;
    s->count = h.count;
    s->digest = h.digest;
    s->config = h.config;
    h.config = NULL;
    close_checkpoint(&f, &h);
    if (status != LS_OK) checkpoint_summary_free(s);
    return status;
}

void checkpoint_summary_free(checkpoint_summary *s)
{
    free(s->config);
    free(s->tensor);
    *s = (checkpoint_summary){0};
}
