#include "harness.h"

#include "where.h"

#include <float.h>
#include <math.h>
#include <mpi.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef LS_REAL_DOUBLE
#define MPI_LS_REAL MPI_DOUBLE
#else
#define MPI_LS_REAL MPI_FLOAT
#endif

world here;

/* ------------------------------------------------------------------------------------------------ cases.def */

const mechanism_row mechanisms[] = {
#define MECHANISM(name, patterns, steps, traits) {#name, patterns, steps, traits},
#define CASE(mechanism, pattern, options, extras)
#define WORD(option, word, value)
#include "cases.def"
#undef MECHANISM
#undef CASE
#undef WORD
    {NULL, NULL, NULL, 0}};

const case_row cases[] = {
#define MECHANISM(name, patterns, steps, traits)
#define CASE(mechanism, pattern, options, extras) {#mechanism, LS_##pattern, options, extras},
#define WORD(option, word, value)
#include "cases.def"
#undef MECHANISM
#undef CASE
#undef WORD
    {NULL, LS_NS, NULL, 0}};

const word_row words[] = {
#define MECHANISM(name, patterns, steps, traits)
#define CASE(mechanism, pattern, options, extras)
#define WORD(option, word, value) {#option, word, value},
#include "cases.def"
#undef MECHANISM
#undef CASE
#undef WORD
    {NULL, NULL, 0}};

const char *const padding_name[PADDINGS] = {"none", "tail", "random", "whole"};
const char *const split_name[SPLITS] = {"even", "uneven", "one"};

int64_t row_number(const case_row *row)
{
    char text[256];
    uint64_t hash = UINT64_C(14695981039346656037);
    snprintf(text, sizeof text, "%s %d %s %u", row->mechanism, (int)row->pattern, row->options, row->extras);
    for (const char *c = text; *c != '\0'; c++) hash = (hash ^ (unsigned char)*c) * UINT64_C(1099511628211);
    return (int64_t)((hash >> 20) % 1000);
}

const mechanism_row *mechanism_of(const char *name)
{
    for (const mechanism_row *m = mechanisms; m->name != NULL; m++)
        if (strcmp(m->name, name) == 0) return m;
    return NULL;
}

int library_has(const char *mechanism, ls_pattern pattern)
{
    for (int i = 0; ls_mechanism_name(i) != NULL; i++)
        if (strcmp(ls_mechanism_name(i), mechanism) == 0) return ls_mechanism_has(mechanism, pattern);
    return 0;
}

const char *pattern_letters(ls_pattern pattern)
{
    static const char *const letters[] = {"NS", "CS", "NC", "CC"};
    return letters[pattern];
}

/* ------------------------------------------------------------------------------------------------ numbers */

draw draw_from(uint64_t seed, uint64_t salt)
{
    draw r = {seed};
    r.state = draw_bits(&r) ^ salt;
    return r;
}

uint64_t draw_bits(draw *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double draw_uniform(draw *r)
{
    return (double)(draw_bits(r) >> 11) * 0x1p-53;
}

double draw_normal(draw *r)
{
    const double u = 1.0 - draw_uniform(r), angle = 6.283185307179586 * draw_uniform(r);
    return sqrt(-2.0 * log(u)) * cos(angle);
}

int64_t draw_below(draw *r, int64_t n)
{
    return (int64_t)(draw_uniform(r) * (double)n);
}

void draw_split(draw *r, int kind, int size, int64_t n, int64_t *count)
{
    for (int p = 0; p < size; p++) count[p] = kind == SPLIT_EVEN ? n / size + (p < n % size) : 0;
    if (kind == SPLIT_ONE) count[draw_below(r, size)] = n;
    if (kind != SPLIT_RANDOM) return;
    double weight[64], sum = 0;
    for (int p = 0; p < size; p++) sum += weight[p] = draw_uniform(r) < 0.3 ? 0 : draw_uniform(r);
    if (sum <= 0) weight[0] = sum = 1;
    int64_t given = 0;
    double upto = 0;
    for (int p = 0; p < size; p++) { /* the last rank with weight reaches n exactly: upto / sum is 1 there */
        upto += weight[p];
        int64_t end = (int64_t)floor((double)n * (upto / sum) + 0.5);
        if (end > n || p == size - 1) end = n;
        count[p] = end - given;
        given = end;
    }
}

void draw_padding(draw *r, padding kind, int64_t B, int64_t n, uint8_t *pad)
{
    memset(pad, 0, (size_t)(B * n));
    for (int64_t b = 0; b < B; b++) {
        int64_t keep = n;
        if (kind == PAD_WHOLE && b == B - 1)
            keep = 0;
        else if ((kind == PAD_TAIL || kind == PAD_WHOLE) && (b > 0 || B == 1))
            keep = 1 + draw_below(r, n);
        for (int64_t t = 0; t < n; t++) pad[b * n + t] = kind == PAD_RANDOM ? draw_uniform(r) < 0.3 : t >= keep;
    }
}

double largest(int64_t n, const ls_real *x)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(x[i])) return INFINITY;
        most = fmax(most, fabs((double)x[i]));
    }
    return most;
}

double relative_error(int64_t n, const ls_real *a, const ls_real *b, double scale)
{
    double most = 0, difference = 0;
    for (int64_t i = 0; i < n; i++) {
        const double e = fabs((double)a[i] - (double)b[i]);
        if (!(e <= 1e300)) return INFINITY; /* NaN or infinity, on either side */
        difference = fmax(difference, e);
        most = fmax(most, fabs((double)b[i]));
    }
    most = fmax(most, scale);
    return difference <= 0 ? 0 : most <= 0 ? INFINITY : difference / most;
}

const double rounded_tolerance[] = {[LS_TF32] = 2.5e-3, [LS_BF16] = 2e-2};

int is_rounded(void)
{
    return test_precision() != LS_FLOAT32;
}

double law_tolerance(void)
{
    return is_rounded() ? rounded_tolerance[test_precision()] : LAW_TOLERANCE;
}

void note_error(double error, const char *tensor, const char *of)
{
    if (error <= here.worst) return;
    here.worst = error;
    snprintf(here.worst_of, sizeof here.worst_of, "%s of %s", tensor, of);
}

void *get(size_t count, size_t size)
{
    void *p = calloc(count > 0 ? count : 1, size);
    if (p == NULL) {
        fprintf(stderr, "no memory for %zu x %zu bytes\n", count, size);
        abort();
    }
    return p;
}

/* ------------------------------------------------------------------------------------------------ tensors */

static int64_t row_in(ls_layout layout, int64_t B, int64_t heads, int64_t n, int64_t b, int64_t h, int64_t t)
{
    switch (layout) {
    case LS_BTHD:
        return (b * n + t) * heads + h;
    case LS_TBHD:
        return (t * B + b) * heads + h;
    case LS_BHTD:
        break;
    }
    return (b * heads + h) * n + t;
}

void rows_take(ls_layout layout, int64_t B, int64_t heads, int64_t N, int64_t width, int64_t lo, int64_t n,
               const ls_real *whole, ls_real *part)
{
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < n; t++)
                memcpy(part + row_in(layout, B, heads, n, b, h, t) * width,
                       whole + row_at(heads, N, width, b, h, lo + t), (size_t)width * sizeof *part);
}

void rows_put(ls_layout layout, int64_t B, int64_t heads, int64_t N, int64_t width, int64_t lo, int64_t n,
              const ls_real *part, ls_real *whole)
{
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < n; t++)
                memcpy(whole + row_at(heads, N, width, b, h, lo + t),
                       part + row_in(layout, B, heads, n, b, h, t) * width, (size_t)width * sizeof *part);
}

static ls_real *cut_rows(int64_t groups, int64_t N, int64_t width, int64_t n, const ls_real *whole)
{
    if (whole == NULL) return NULL;
    ls_real *part = NEW(ls_real, groups * n * width);
    rows_take(LS_BHTD, groups, 1, N, width, 0, n, whole, part);
    return part;
}

static uint8_t *take_pad(int64_t B, int64_t N, int64_t lo, int64_t n, const uint8_t *whole)
{
    if (whole == NULL) return NULL;
    uint8_t *part = NEW(uint8_t, B * n);
    for (int64_t b = 0; b < B && n > 0; b++) memcpy(part + b * n, whole + b * N + lo, (size_t)n);
    return part;
}

/* Rows [lo, lo + n) of (B,N) ids. */
static int32_t *take_segments(int64_t B, int64_t N, int64_t lo, int64_t n, const int32_t *whole)
{
    if (whole == NULL) return NULL;
    int32_t *part = NEW(int32_t, B * n);
    for (int64_t b = 0; b < B && n > 0; b++) memcpy(part + b * n, whole + b * N + lo, (size_t)n * sizeof *part);
    return part;
}

/* ------------------------------------------------------------------------------------------------ problem */

const ls_real *key_of(const problem *p)
{
    return p->key != NULL ? p->key : p->query;
}

const ls_real *value_of(const problem *p)
{
    return p->value != NULL ? p->value : key_of(p);
}

static int64_t mask_groups(const problem *p)
{
    return p->attn_mask_per_head ? p->B * p->options.num_heads : 1;
}

void problem_shape(problem *p, int64_t B, int64_t T, int64_t S)
{
    const int layer = p->options.level == LS_LEVEL_LAYER;
    p->B = B;
    p->T = T;
    p->S = S;
    p->H = p->options.num_heads;
    p->d = p->options.embed_dim / p->H;
    p->heads = layer ? 1 : p->H;
    p->width = layer ? p->options.embed_dim : p->d;
    p->out_width = p->width;
    int count = 0;
    const ls_option_info *option = ls_mechanism_options(p->options.mechanism, &count);
    for (int i = 0; !layer && i < count; i++) /* s4d's core gives all channels side by side */
        if (strcmp(option[i].name, "channels") == 0) p->out_width *= (int64_t)p->options.value[i];
}

static int64_t sample_groups(const problem *p)
{
    return p->samples_per_batch ? p->B : 1;
}

/* Rows [lo, lo + n) of the samples of T queries. */
static int32_t *take_samples(const problem *p, int64_t lo, int64_t n)
{
    if (p->samples == NULL) return NULL;
    int32_t *part = NEW(int32_t, sample_groups(p) * n * p->num_samples);
    for (int64_t g = 0; g < sample_groups(p); g++)
        if (n * p->num_samples > 0)
            memcpy(part + g * n * p->num_samples, p->samples + (g * p->T + lo) * p->num_samples,
                   (size_t)(n * p->num_samples) * sizeof *part);
    return part;
}

ls_status problem_parameters(problem *p)
{
    ls_attention *attention;
    const ls_status status = ls_attention_create(here.one, &p->options, &attention);
    if (status != LS_OK) {
        snprintf(here.error, sizeof here.error, "%s", ls_last_error());
        return status;
    }
    p->parameters = ls_attention_num_params(attention);
    p->param_count = ls_attention_param_count(attention);
    for (int i = 0; i < p->parameters; i++) {
        p->parameter[i].info = *ls_attention_param(attention, i);
        snprintf(p->parameter[i].name, sizeof p->parameter[i].name, "%s", p->parameter[i].info.name);
        p->parameter[i].info.name = NULL;
    }
    p->params = NEW(ls_real, p->param_count);
    ls_attention_free(attention);
    return LS_OK;
}

static ls_real *draw_tensor(draw *r, int64_t n, double scale)
{
    ls_real *x = NEW(ls_real, n);
    for (int64_t i = 0; i < n; i++) x[i] = (ls_real)(scale * draw_normal(r));
    return x;
}

/* Values of the size that training would meet, so that no parameter is without effect. */
static void draw_parameter(draw *r, const parameter *q, ls_real *x)
{
    const ls_param_info *info = &q->info;
    const int64_t last = info->dim[info->ndim - 1];
    for (int64_t i = 0; i < info->count; i++) {
        const double n = draw_normal(r), u = draw_uniform(r);
        double v;
        if (strcmp(q->name, "log_dt") == 0)
            v = log(0.001) + u * log(100.0);
        else if (strcmp(q->name, "log_w_re") == 0)
            v = log(0.5) + 0.1 * n;
        else if (strcmp(q->name, "w_im") == 0)
            v = (double)(2 * last) / 3.141592653589793 * ((double)(2 * last) / (1.0 + 2.0 * (double)(i % last)) - 1.0) +
                0.1 * n;
        else if (info->init == LS_INIT_ONE)
            v = 1.0 + 0.2 * n;
        else if (info->ndim == 1)
            v = 0.3 * n;
        else if (strncmp(q->name, "phi_", 4) == 0)
            v = n / sqrt((double)info->dim[0]);
        else
            v = n / sqrt((double)last);
        x[i] = (ls_real)v;
    }
}

static ls_status set_options(const char *text, ls_attention_options *options)
{
    char copy[256];
    snprintf(copy, sizeof copy, "%s", text);
    for (char *item = copy; item != NULL && *item != '\0';) {
        char *next = strchr(item, ',');
        if (next != NULL) *next++ = '\0';
        char *equals = strchr(item, '=');
        if (equals == NULL) return LS_ERR_ARGUMENT;
        *equals = '\0';
        const ls_status status = ls_attention_set(options, item, strtod(equals + 1, NULL));
        if (status != LS_OK) return status;
        item = next;
    }
    return LS_OK;
}

static ls_real *draw_mask(draw *r, int64_t groups, int64_t T, int64_t S)
{
    ls_real *mask = draw_tensor(r, groups * T * S, 1.0);
    for (int64_t i = 0; i < groups * T * S; i++)
        if (draw_uniform(r) < 0.2) mask[i] = (ls_real)-INFINITY;
    for (int64_t g = 0; g < groups; g++) { /* one row sees nothing */
        const int64_t t = draw_below(r, T);
        for (int64_t j = 0; T > 2 && j < S; j++) mask[(g * T + t) * S + j] = (ls_real)-INFINITY;
    }
    return mask;
}

static double option_of(const ls_attention_options *o, const char *name)
{
    int count = 0;
    const ls_option_info *info = ls_mechanism_options(o->mechanism, &count);
    for (int i = 0; i < count; i++)
        if (strcmp(info[i].name, name) == 0) return o->value[i];
    return 0;
}

ls_status problem_draw(const setting *s, problem *p)
{
    static const char *const alias_name[] = {"none", "value", "all", "value NULL", "all NULL"};
    static const char *const layout_name[] = {"bhtd", "bthd", "tbhd"};
    *p = (problem){0};
    snprintf(p->text, sizeof p->text,
             "%s %s %s{%s} extras=%u B=%lld H=%lld d=%lld T=%lld S=%lld pad=%s %s alias=%s seed=%llu",
             s->row->mechanism, pattern_letters(s->row->pattern), s->level == LS_LEVEL_CORE ? "core" : "layer",
             s->row->options, s->row->extras, (long long)s->B, (long long)s->H, (long long)s->d, (long long)s->T,
             (long long)s->S, padding_name[s->pad], layout_name[s->layout], alias_name[s->alias],
             (unsigned long long)s->seed);
    memcpy(here.doing, p->text, sizeof here.doing);
    ls_status status = ls_attention_defaults(s->row->mechanism, &p->options);
    if (status == LS_OK) {
        p->options.pattern = s->row->pattern;
        p->options.level = s->level;
        p->options.layout = s->layout;
        p->options.embed_dim = s->H * s->d;
        p->options.num_heads = s->H;
        p->options.stream = 3;
        status = set_options(s->row->options, &p->options);
    }
    if (status != LS_OK) {
        snprintf(here.error, sizeof here.error, "%s", ls_last_error());
        return status;
    }
    const unsigned extras = s->row->extras;
    if (extras & OTHER_SCALE) p->options.scale = 0.7;
    if (extras & DROPOUT) p->options.dropout = 0.3;
    p->training = (extras & (DROPOUT | DROPOUT_MASK | IN_TRAINING)) != 0;
    p->sample = 11;
    p->weights = extras & WEIGHTS_PER_HEAD ? 2 : extras & WEIGHTS_MEAN ? 1 : 0;
    p->alias = s->alias;
    problem_shape(p, s->B, s->T, s->S);
    status = problem_parameters(p);
    if (status != LS_OK) return status;

    draw r = draw_from(s->seed, 0);
    const double steep = extras & STEEP ? 8.0 : 1.0;
    p->steep = (extras & STEEP) != 0;
    const int64_t rows_q = p->B * p->heads * p->T, rows_k = p->B * p->heads * p->S;
    const int all = s->alias == ALIAS_ALL || s->alias == ALIAS_ALL_NULL;
    p->query = draw_tensor(&r, rows_q * p->width, steep);
    if (!all) p->key = draw_tensor(&r, rows_k * p->width, steep);
    if (s->alias == ALIAS_NONE) p->value = draw_tensor(&r, rows_k * p->width, 1.0);
    p->dout = draw_tensor(&r, rows_q * p->out_width, 1.0);
    for (int i = 0; i < p->parameters; i++)
        draw_parameter(&r, &p->parameter[i], p->params + p->parameter[i].info.offset);
    if (s->pad != PAD_NONE) {
        p->pad_k = NEW(uint8_t, p->B * p->S);
        p->pad_q = NEW(uint8_t, p->B * p->T);
        draw_padding(&r, s->pad, p->B, p->S, p->pad_k);
        if (is_cross(p)) /* a row without keys keeps its queries */
            draw_padding(&r, s->pad == PAD_WHOLE ? PAD_RANDOM : s->pad, p->B, p->T, p->pad_q);
        else
            memcpy(p->pad_q, p->pad_k, (size_t)(p->B * p->T));
        p->give_pads = 1 + (int)draw_below(&r, 3);
    }
    if (extras & (MASK | MASK_PER_HEAD)) {
        p->attn_mask_per_head = (extras & MASK_PER_HEAD) != 0;
        p->attn_mask = draw_mask(&r, mask_groups(p), p->T, p->S);
    }
    if (extras & DROPOUT_MASK) {
        p->dropout_mask = NEW(ls_real, p->B * p->H * p->T * p->S);
        for (int64_t i = 0; i < p->B * p->H * p->T * p->S; i++)
            p->dropout_mask[i] = draw_uniform(&r) < 0.25 ? 0 : (ls_real)(1 / 0.75);
    }
    if (strcmp(s->row->mechanism, "performer") == 0 && s->seed % 3 == 0) {
        p->n_features = p->H * (int64_t)option_of(&p->options, "num_features") * p->d;
        p->features = draw_tensor(&r, p->n_features, 1.0);
    }
    return LS_OK;
}

static void *copy_of(const void *p, int64_t count, size_t size)
{
    if (p == NULL) return NULL;
    void *q = get((size_t)count, size);
    memcpy(q, p, (size_t)count * size);
    return q;
}

problem problem_copy(const problem *p)
{
    problem c = problem_cut(p, p->T, p->S);
    return c;
}

problem problem_cut(const problem *p, int64_t T, int64_t S)
{
    problem c = *p;
    const int64_t groups = p->B * p->heads, masks = mask_groups(p);
    c.T = T;
    c.S = S;
    c.query = cut_rows(groups, p->T, p->width, T, p->query);
    c.key = cut_rows(groups, p->S, p->width, S, p->key);
    c.value = cut_rows(groups, p->S, p->width, S, p->value);
    c.dout = cut_rows(groups, p->T, p->out_width, T, p->dout);
    c.pad_q = take_pad(p->B, p->T, 0, T, p->pad_q);
    c.pad_k = take_pad(p->B, p->S, 0, S, p->pad_k);
    c.params = copy_of(p->params, p->param_count, sizeof *p->params);
    c.features = copy_of(p->features, p->n_features, sizeof *p->features);
    c.noise = copy_of(p->noise, p->n_noise, sizeof *p->noise);
    c.samples = take_samples(p, 0, T);
    c.query_segments = take_segments(p->B, p->T, 0, T, p->query_segments);
    c.key_segments = take_segments(p->B, p->S, 0, S, p->key_segments);
    ls_real *rows = cut_rows(masks, p->T, p->S, T, p->attn_mask);
    c.attn_mask = cut_rows(masks * T, p->S, 1, S, rows);
    free(rows);
    rows = cut_rows(p->B * p->H, p->T, p->S, T, p->dropout_mask);
    c.dropout_mask = cut_rows(p->B * p->H * T, p->S, 1, S, rows);
    free(rows);
    return c;
}

static ls_real *part_of(const problem *p, int64_t b, int64_t N, int64_t width, int64_t lo, int64_t n, const ls_real *x)
{
    if (x == NULL) return NULL;
    ls_real *part = NEW(ls_real, p->heads * n * width);
    rows_take(LS_BHTD, 1, p->heads, N, width, lo, n, x + b * p->heads * N * width, part);
    return part;
}

problem problem_part(const problem *p, int64_t b, int64_t q_lo, int64_t T, int64_t k_lo, int64_t S)
{
    problem c = *p;
    c.B = 1, c.T = T, c.S = S;
    c.query = part_of(p, b, p->T, p->width, q_lo, T, p->query);
    c.key = part_of(p, b, p->S, p->width, k_lo, S, p->key);
    c.value = part_of(p, b, p->S, p->width, k_lo, S, p->value);
    c.dout = part_of(p, b, p->T, p->out_width, q_lo, T, p->dout);
    c.pad_q = p->pad_q == NULL ? NULL : take_pad(1, p->T, q_lo, T, p->pad_q + b * p->T);
    c.pad_k = p->pad_k == NULL ? NULL : take_pad(1, p->S, k_lo, S, p->pad_k + b * p->S);
    c.params = copy_of(p->params, p->param_count, sizeof *p->params);
    c.query_segments = c.key_segments = c.samples = NULL;
    c.attn_mask = c.dropout_mask = c.noise = NULL;
    c.features = copy_of(p->features, p->n_features, sizeof *p->features);
    return c;
}

void problem_free(problem *p)
{
    free(p->query_segments), free(p->key_segments);
    free(p->query), free(p->key), free(p->value), free(p->dout);
    free(p->pad_q), free(p->pad_k), free(p->attn_mask), free(p->dropout_mask), free(p->params);
    free(p->features), free(p->noise), free(p->samples);
    *p = (problem){0};
}

/* ------------------------------------------------------------------------------------------------ world */

void world_open(int *argc, char ***argv)
{
    watchdog(120);
    MPI_Init(argc, argv);
    here.comm = MPI_COMM_WORLD;
    MPI_Comm_rank(here.comm, &here.rank);
    MPI_Comm_size(here.comm, &here.size);
    if (!test_has_device(here.size)) {
        MPI_Finalize();
        exit(TEST_SKIPPED);
    }
    const ls_context_options all = {.comm = here.comm,
                                    .device = test_device(),
                                    .device_number = test_number(here.rank),
                                    .transport = test_transport(),
                                    .precision = test_precision(),
                                    .seed = 2024};
    ls_context_options one = all;
    one.comm = MPI_COMM_SELF;
    if (ls_context_create(&all, &here.all) != LS_OK || ls_context_create(&one, &here.one) != LS_OK) {
        printf("rank %d: no context: %s\n", here.rank, ls_last_error());
        MPI_Abort(here.comm, 1);
    }
}

int world_close(void)
{
    ls_context_free(here.all);
    ls_context_free(here.one);
    MPI_Allreduce(MPI_IN_PLACE, &here.ill_conditioned, 1, MPI_INT, MPI_SUM, here.comm);
    if (here.rank == 0 && here.ill_conditioned > 0)
        printf("%d tensors of ill-conditioned problems were within 4 times the error of rounding their inputs\n",
               here.ill_conditioned);
    for (int rank = 0; rank < here.size && is_rounded(); rank++) { /* one after the other */
        if (here.rank == rank && here.worst > 0)
            printf("rank %d: largest error in %s %.2e: %s\n", rank, ls_precision_name(test_precision()), here.worst,
                   here.worst_of);
        fflush(stdout);
        MPI_Barrier(here.comm);
    }
    if (here.rank == 0) printf("%d passed, %d failed\n", here.passed, here.failed);
    const int status = here.failed > 0 || here.passed == 0;
    MPI_Finalize();
    return status;
}

int verdict(int ok, const char *format, ...)
{
    int first = ok ? here.size : here.rank; /* the lowest rank where it failed speaks */
    MPI_Allreduce(MPI_IN_PLACE, &first, 1, MPI_INT, MPI_MIN, here.comm);
    if (first == here.rank) {
        char text[4096];
        va_list list;
        va_start(list, format);
        vsnprintf(text, sizeof text, format, list);
        va_end(list);
        printf("FAILED (rank %d of %d): %s\n", here.rank, here.size, text);
        fflush(stdout);
    }
    if (first == here.size)
        here.passed++;
    else
        here.failed++;
    return first == here.size;
}

int same_status(MPI_Comm comm, ls_status status)
{
    if (status != LS_OK) snprintf(here.error, sizeof here.error, "%s", ls_last_error());
    int range[2] = {(int)status, -(int)status};
    MPI_Allreduce(MPI_IN_PLACE, range, 2, MPI_INT, MPI_MAX, comm);
    if (range[0] == -range[1]) return (int)status;
    snprintf(here.error, sizeof here.error, "ranks got different statuses, from %d to %d; here %d: %.700s", -range[1],
             range[0], (int)status, status == LS_OK ? "" : ls_last_error());
    return -1;
}

static void bark(int signal)
{
    static const char text[] = "\nFAILED: no end of: ";
    (void)signal;
    if (write(STDOUT_FILENO, text, sizeof text - 1) < 0 || write(STDOUT_FILENO, here.doing, strlen(here.doing)) < 0 ||
        write(STDOUT_FILENO, "\n", 1) < 0)
        _exit(2);
    _exit(1); /* and mpirun ends the others */
}

void watchdog(unsigned seconds)
{
    struct sigaction action = {.sa_handler = bark};
    sigaction(SIGALRM, &action, NULL);
    alarm(seconds);
}

/* ------------------------------------------------------------------------------------------------ run */

static ls_real *undefined(int64_t n)
{
    ls_real *x = NEW(ls_real, n);
    for (int64_t i = 0; i < n; i++) x[i] = (ls_real)NAN;
    return x;
}

static ls_status make_shard(ls_context *ctx, const int64_t *count, int64_t length, ls_shard *shard)
{
    return count != NULL ? ls_shard_local(ctx, count[ls_context_rank(ctx)], shard) : ls_shard_even(ctx, length, shard);
}

int pieces_make(ls_context *ctx, MPI_Comm comm, const problem *p, const int64_t *queries, const int64_t *keys,
                pieces *x)
{
    *x = (pieces){0};
    int status = same_status(comm, make_shard(ctx, queries, p->T, &x->queries));
    if (status != LS_OK) return status;
    if (is_cross(p)) status = same_status(comm, make_shard(ctx, keys, p->S, &x->keys));
    if (status != LS_OK) return status;

    const ls_shard *q = &x->queries, *k = is_cross(p) ? &x->keys : q;
    const ls_layout layout = p->options.layout;
    const int64_t B = p->B, groups = B * p->heads, BH = B * p->H;
    const int by_null = p->alias == ALIAS_VALUE_NULL || p->alias == ALIAS_ALL_NULL;
    x->shape = (ls_attention_shape){.batch = B, .queries = q, .keys = is_cross(p) || p->give_pads != 2 ? k : NULL};

    x->query = NEW(ls_real, groups * q->n * p->width);
    rows_take(layout, B, p->heads, p->T, p->width, q->lo, q->n, p->query, x->query);
    if (p->key != NULL) {
        x->key = NEW(ls_real, groups * k->n * p->width);
        rows_take(layout, B, p->heads, p->S, p->width, k->lo, k->n, p->key, x->key);
    }
    if (p->value != NULL) {
        x->value = NEW(ls_real, groups * k->n * p->width);
        rows_take(layout, B, p->heads, p->S, p->width, k->lo, k->n, p->value, x->value);
    }
    x->dout = NEW(ls_real, groups * q->n * p->out_width);
    rows_take(layout, B, p->heads, p->T, p->out_width, q->lo, q->n, p->dout, x->dout);
    x->pad_q = take_pad(B, p->T, q->lo, q->n, p->pad_q);
    x->pad_k = take_pad(B, p->S, k->lo, k->n, p->pad_k);
    if (p->attn_mask != NULL) {
        x->attn_mask = NEW(ls_real, mask_groups(p) * q->n * p->S);
        rows_take(LS_BHTD, mask_groups(p), 1, p->T, p->S, q->lo, q->n, p->attn_mask, x->attn_mask);
    }
    if (p->dropout_mask != NULL) {
        x->dropout_mask = NEW(ls_real, BH * q->n * p->S);
        rows_take(LS_BHTD, BH, 1, p->T, p->S, q->lo, q->n, p->dropout_mask, x->dropout_mask);
    }
    if (p->weights) x->weights = undefined((p->weights == 2 ? BH : B) * q->n * p->S);
    x->samples = take_samples(p, q->lo, q->n);
    x->query_segments = take_segments(B, p->T, q->lo, q->n, p->query_segments);
    x->key_segments = take_segments(B, p->S, k->lo, k->n, p->key_segments);
    if (p->wants_selected) x->selected = NEW(uint8_t, BH * q->n);
    x->out = undefined(groups * q->n * p->out_width);
    x->dquery = undefined(groups * q->n * p->width);
    x->dkey = undefined(groups * k->n * p->width);
    x->dvalue = undefined(groups * k->n * p->width);
    x->dparams = NEW(ls_real, p->param_count);

    x->io = (ls_attention_io){.query = x->query,
                              .key = x->key != NULL ? x->key
                                     : by_null      ? NULL
                                                    : x->query,
                              .attn_mask = x->attn_mask,
                              .attn_mask_per_head = p->attn_mask_per_head,
                              .dropout_mask = x->dropout_mask,
                              .weights = x->weights,
                              .need_weights = p->weights == 1,
                              .need_head_weights = p->weights == 2,
                              .training = p->training,
                              .sample = p->sample,
                              .features = p->features,
                              .noise = p->noise,
                              .samples = x->samples,
                              .num_samples = p->num_samples,
                              .samples_per_batch = p->samples_per_batch,
                              .selected = x->selected,
                              .query_segments = x->query_segments,
                              .key_segments = x->key_segments};
    x->io.value = x->value != NULL ? x->value : by_null ? NULL : x->io.key;
    x->io.query_padding_mask = is_cross(p) || p->give_pads != 2 ? x->pad_q : NULL;
    x->io.key_padding_mask = is_cross(p) || p->give_pads != 1 ? x->pad_k : NULL;
    x->grads = (ls_attention_grads){.query = x->dquery, .key = x->dkey, .value = x->dvalue, .params = x->dparams};
    return LS_OK;
}

void pieces_free(pieces *x)
{
    if (x->queries.bounds != NULL) ls_shard_free(&x->queries);
    if (x->keys.bounds != NULL) ls_shard_free(&x->keys);
    free(x->query), free(x->key), free(x->value), free(x->attn_mask), free(x->dropout_mask), free(x->weights);
    free(x->out), free(x->dout), free(x->dquery), free(x->dkey), free(x->dvalue), free(x->dparams);
    free(x->pad_q), free(x->pad_k), free(x->selected), free(x->samples);
    free(x->query_segments), free(x->key_segments);
    *x = (pieces){0};
}

/* The pieces of all ranks as one tensor on each: the others contribute exact zeros. */
static ls_real *gather(MPI_Comm comm, ls_layout layout, int64_t B, int64_t heads, int64_t N, int64_t width,
                       const ls_shard *shard, const ls_real *part)
{
    const int64_t n = B * heads * N * width;
    ls_real *whole = NEW(ls_real, n);
    rows_put(layout, B, heads, N, width, shard->lo, shard->n, part, whole);
    MPI_Allreduce(MPI_IN_PLACE, whole, (int)n, MPI_LS_REAL, MPI_SUM, comm);
    return whole;
}

static int all_undefined(int64_t n, const ls_real *x)
{
    for (int64_t i = 0; i < n; i++)
        if (!isnan(x[i])) return 0;
    return 1;
}

void answer_gather(MPI_Comm comm, const problem *p, const pieces *x, answer *a)
{
    const ls_layout layout = p->options.layout;
    const ls_shard *q = &x->queries, *k = is_cross(p) ? &x->keys : q;
    const int64_t B = p->B, G = B * p->heads;
    *a = (answer){.n_out = G * p->T * p->out_width,
                  .n_weights = p->weights == 0 ? 0 : (p->weights == 2 ? B * p->H : B) * p->T * p->S,
                  .n_query = G * p->T * p->width,
                  .n_key = G * p->S * p->width,
                  .n_params = p->param_count};
    a->out = gather(comm, layout, B, p->heads, p->T, p->out_width, q, x->out);
    if (p->weights) a->weights = gather(comm, LS_BHTD, p->weights == 2 ? B * p->H : B, 1, p->T, p->S, q, x->weights);
    a->dquery = gather(comm, layout, B, p->heads, p->T, p->width, q, x->dquery);
    const int64_t own = G * k->n * p->width;
    if (p->key != NULL)
        a->dkey = gather(comm, layout, B, p->heads, p->S, p->width, k, x->dkey);
    else
        a->wrote_alias |= !all_undefined(own, x->dkey);
    if (p->value != NULL)
        a->dvalue = gather(comm, layout, B, p->heads, p->S, p->width, k, x->dvalue);
    else
        a->wrote_alias |= !all_undefined(own, x->dvalue);
    MPI_Allreduce(MPI_IN_PLACE, &a->wrote_alias, 1, MPI_INT, MPI_MAX, comm);
    a->dparams = copy_of(x->dparams, p->param_count, sizeof *a->dparams);
    if (x->selected != NULL) {
        const int64_t n = B * p->H;
        a->selected = NEW(uint8_t, n * p->T);
        for (int64_t g = 0; g < n && q->n > 0; g++)
            memcpy(a->selected + g * p->T + q->lo, x->selected + g * q->n, (size_t)q->n);
        MPI_Allreduce(MPI_IN_PLACE, a->selected, (int)(n * p->T), MPI_UINT8_T, MPI_MAX, comm);
    }
}

void answer_free(answer *a)
{
    free(a->out), free(a->weights), free(a->dquery), free(a->dkey), free(a->dvalue), free(a->dparams);
    free(a->selected);
    *a = (answer){0};
}

int problem_run(ls_context *ctx, MPI_Comm comm, const problem *p, const int64_t *queries, const int64_t *keys,
                answer *a)
{
    *a = (answer){0};
    ls_attention *attention = NULL;
    ls_saved *saved = NULL;
    pieces x = {0};
    int status = same_status(comm, ls_attention_create(ctx, &p->options, &attention));
    if (status == LS_OK) status = same_status(comm, ls_saved_create(attention, &saved));
    if (status == LS_OK) status = pieces_make(ctx, comm, p, queries, keys, &x);
    if (status == LS_OK)
        status = same_status(comm, ls_attention_forward(attention, &x.shape, &x.io, p->params, x.out, saved));
    if (status == LS_OK)
        status = same_status(
            comm, ls_attention_backward(attention, &x.shape, &x.io, p->params, x.out, x.dout, saved, &x.grads));
    if (status == LS_OK) status = same_status(comm, ls_all_reduce_sum(ctx, x.dparams, p->param_count));
    if (status == LS_OK) answer_gather(comm, p, &x, a);
    pieces_free(&x);
    if (saved != NULL) ls_saved_free(saved);
    if (attention != NULL) ls_attention_free(attention);
    return status;
}

int problem_run_alone(const problem *p, answer *a)
{
    return problem_run(here.one, MPI_COMM_SELF, p, NULL, NULL, a);
}

/* ------------------------------------------------------------------------------------------------ comparison */

typedef struct part {
    const char *name;
    int64_t n;
    const ls_real *a, *b;
    double siblings; /* the largest of the tensors of the same kind */
} part;

enum { MAX_PARTS = 5 + LS_MAX_PARAMS, ROUNDINGS = 8 };

static int parts_of(const problem *p, const answer *a, const answer *b, part *list)
{
    int n = 0;
    const double activations =
        fmax(largest(b->n_query, b->dquery), fmax(b->dkey != NULL ? largest(b->n_key, b->dkey) : 0,
                                                  b->dvalue != NULL ? largest(b->n_key, b->dvalue) : 0));
    const double params = fmax(activations, largest(b->n_params, b->dparams));
    list[n++] = (part){"out", b->n_out, a->out, b->out, 0};
    if (b->weights != NULL) list[n++] = (part){"weights", b->n_weights, a->weights, b->weights, 0};
    list[n++] = (part){"d query", b->n_query, a->dquery, b->dquery, activations};
    if (b->dkey != NULL) list[n++] = (part){"d key", b->n_key, a->dkey, b->dkey, activations};
    if (b->dvalue != NULL) list[n++] = (part){"d value", b->n_key, a->dvalue, b->dvalue, activations};
    for (int i = 0; i < p->parameters; i++) {
        const ls_param_info *info = &p->parameter[i].info;
        list[n++] =
            (part){p->parameter[i].name, info->count, a->dparams + info->offset, b->dparams + info->offset, params};
    }
    return n;
}

static double part_error(const problem *p, const part *x)
{
    const double noise = is_rounded() ? ROUNDED_CANCELLED * law_tolerance() : CANCELLED;
    const double least = is_rounded() ? ROUNDED_FLOOR : FLOOR;
    const int cancelled = p->steep || largest(x->n, x->b) < noise * x->siblings;
    return relative_error(x->n, x->a, x->b, (cancelled ? 1 : least) * x->siblings);
}

/* x *= 1 + r, |r| a little over half a unit in the last place, which any input may already have lost. */
static void round_anew(draw *r, int64_t n, ls_real *x)
{
    const ls_real half = (ls_real)(0.504 * (sizeof(ls_real) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON));
    for (int64_t i = 0; x != NULL && i < n; i++) x[i] *= draw_uniform(r) < 0.5 ? 1 - half : 1 + half;
}

/* How much each part of the answer moves when the inputs are rounded anew, on this process alone: the most of a few
 * times, since a rounding may happen to cancel; 0 where it fails. */
static void own_errors(const problem *p, int parts, double *error)
{
    answer a, b;
    part list[MAX_PARTS];
    if (problem_run_alone(p, &a) != LS_OK) return;
    for (uint64_t time = 0; time < ROUNDINGS; time++) {
        problem q = problem_copy(p);
        draw r = draw_from(7, 7 + time);
        round_anew(&r, p->B * p->heads * p->T * p->width, q.query);
        round_anew(&r, p->B * p->heads * p->S * p->width, q.key);
        round_anew(&r, p->B * p->heads * p->S * p->width, q.value);
        round_anew(&r, p->param_count, q.params);
        if (problem_run_alone(&q, &b) == LS_OK) {
            if (parts_of(p, &b, &a, list) != parts) abort();
            for (int i = 0; i < parts; i++) error[i] = fmax(error[i], part_error(p, &list[i]));
            answer_free(&b);
        }
        problem_free(&q);
    }
    answer_free(&a);
}

/* Softmaxes and norms over so little amplify rounding by themselves, now and then. */
static int few_features(const problem *p)
{
    return mechanism_of(p->options.mechanism)->traits & FEW_FEATURES || p->d <= 2;
}

int answer_equal(const problem *p, const answer *a, const answer *b, double tolerance, char *what, size_t size)
{
    part list[MAX_PARTS];
    double own[MAX_PARTS] = {0};
    const int n = parts_of(p, a, b, list);
    int ok = 1, asked = 0;
    what[0] = '\0';
    for (int i = 0; i < n; i++) {
        const double error = part_error(p, &list[i]);
        note_error(error, list[i].name, p->text);
        if (error <= tolerance) continue;
        if (few_features(p) && !is_rounded() && !asked++) own_errors(p, n, own);
        if (error <= 4 * own[i]) {
            here.ill_conditioned++;
            continue;
        }
        ok = 0;
        snprintf(what + strlen(what), size - strlen(what), "; %s: error %.2e > %.0e (own %.1e)", list[i].name, error,
                 tolerance, own[i]);
    }
    if (a->wrote_alias || b->wrote_alias) {
        ok = 0;
        snprintf(what + strlen(what), size - strlen(what), "; the gradient of an alias was written");
    }
    return ok;
}

int answer_same_bits(const problem *p, const answer *a, const answer *b, char *what, size_t size)
{
    part list[MAX_PARTS];
    const int n = parts_of(p, a, b, list);
    int ok = 1;
    what[0] = '\0';
    for (int i = 0; i < n; i++) {
        if (list[i].n == 0 || memcmp(list[i].a, list[i].b, (size_t)list[i].n * sizeof *list[i].a) == 0) continue;
        ok = 0;
        snprintf(what + strlen(what), size - strlen(what), "; %s: bits differ (error %.2e)", list[i].name,
                 relative_error(list[i].n, list[i].a, list[i].b, 0));
    }
    return ok;
}
