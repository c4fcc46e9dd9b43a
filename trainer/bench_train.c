/* `longspan bench --train`: whole training steps of a configuration on made-up bytes, and how much of their time the
 * machine needs for their matrix products.
 *
 * The products are counted and listed at the door to BLAS while a step runs. The same list is then worked off alone, on
 * memory that holds no step; and a large square product tells what the machine reaches at best. All three are measured
 * in turns. Of the turns' times and of their ratios the medians are shown:
 *
 *   share = (operations of the products / rate of the square product) / seconds of the step
 *   alone = (seconds of the list alone) / seconds of the step */
#include "bench.h"

#include "products.h"
#include "rng.h"
#include "step.h"

#include <stdlib.h>

typedef struct subject {
    config c;
    stepper step;
    batch *micro; /* (accumulation): of this rank's group; B = 0: none */
    int64_t source, target, labels;
    ls_products list;
    ls_real *scratch; /* for the list's largest A, B, C, one after the other */
    int64_t at[4];    /* bytes */
    ceilings top;
} subject;

typedef struct figures {
    double step, alone, square; /* seconds, seconds, seconds for 10^9 operations on every rank */
    double share, alone_share;
    double gflop, calls; /* of a step's products, all ranks together */
} figures;

enum { STEP_TOKEN = 0x544f4b };

static int32_t token_at(int side, int64_t row, int64_t position)
{
    return (int32_t)(256 * ls_uniform((uint64_t)row, (uint32_t)side, STEP_TOKEN, (uint64_t)position));
}

static ls_status make_batch(subject *s, int64_t lo, int64_t hi, batch *b)
{
    ls_context *ctx = s->step.r->sequence;
    b->B = hi - lo, b->sample = (uint64_t)lo, b->draw = 1;
    LS_TRY(ls_shard_even(ctx, s->source, &b->source));
    LS_TRY(ls_shard_even(ctx, s->target + 1, &b->target)); /* and BOS, EOS */
    const int64_t n = b->source.n, m = b->target.n;
    b->source_token = malloc((size_t)(b->B * n + 1) * sizeof *b->source_token);
    b->input_token = malloc((size_t)(b->B * m + 1) * sizeof *b->input_token);
    b->label = malloc((size_t)(b->B * m + 1) * sizeof *b->label);
    b->source_pad = calloc((size_t)(b->B * n + 1), 1);
    b->target_pad = calloc((size_t)(b->B * m + 1), 1);
    if (b->source_token == NULL || b->input_token == NULL || b->label == NULL || b->source_pad == NULL ||
        b->target_pad == NULL)
        LS_FAIL(LS_ERR_MEMORY, "bench: no memory for a batch of %lld tokens", (long long)(b->B * (n + m)));
    for (int64_t i = 0; i < b->B; i++) {
        for (int64_t t = 0; t < n; t++) b->source_token[i * n + t] = token_at(0, lo + i, b->source.lo + t);
        for (int64_t t = 0; t < m; t++) {
            const int64_t at = b->target.lo + t;
            b->input_token[i * m + t] = at == 0 ? TOKEN_BOS : token_at(1, lo + i, at - 1);
            b->label[i * m + t] = at == s->target ? TOKEN_EOS : token_at(1, lo + i, at);
        }
    }
    return LS_OK;
}

static ls_status make_batches(subject *s)
{
    const int64_t n = s->c.train.accumulation;
    ls_status status = LS_OK;
    s->labels = s->c.train.batch * (s->target + 1);
    s->micro = calloc((size_t)n, sizeof *s->micro);
    if (s->micro == NULL) LS_FAIL(LS_ERR_MEMORY, "bench: no memory for %lld batches", (long long)n);
    for (int64_t a = 0; a < n && status == LS_OK; a++) {
        int64_t lo, hi;
        stepper_piece(&s->step, a, &lo, &hi);
        if (lo < hi) status = make_batch(s, lo, hi, &s->micro[a]);
    }
    return status;
}

static ls_status take_step(subject *s)
{
    stepper *t = &s->step;
    step_sums sums;
    stepper_begin(t);
    for (int64_t a = 0; a < s->c.train.accumulation; a++)
        if (s->micro[a].B > 0) LS_TRY(stepper_add(t, &s->micro[a], s->labels));
    return stepper_end(t, s->labels, 0, schedule_rate(&s->c, t->s.step + 1), &sums);
}

static ls_status time_step(const bench *b, subject *s, double *seconds)
{
    ls_context *ctx = s->step.r->sequence;
    double begin;
    LS_TRY(bench_begin(b, ctx, &begin));
    LS_TRY(take_step(s));
    return bench_lap(b, ctx, begin, seconds);
}

/* ------------------------------------------------------------------------------------------------ its products */

/* One step whose products are listed; then room for the largest operands. */
static ls_status list_products(const bench *b, subject *s)
{
    double seconds;
    ls_context *ctx = s->step.r->sequence;
    ls_products_keep(&s->list);
    ls_status status = time_step(b, s, &seconds);
    ls_products_keep(NULL);
    LS_TRY(agree(b->r, status));
    int64_t most[3] = {1, 1, 1};
    for (int64_t i = 0; i < s->list.kinds; i++) {
        const ls_product *p = &s->list.kind[i].product;
        const int64_t size = p->in_double ? (int64_t)sizeof(double) : (int64_t)sizeof(ls_real);
        int64_t spans[3];
        ls_product_spans(p, &spans[0], &spans[1], &spans[2]);
        for (int k = 0; k < 3; k++) most[k] = ls_max(most[k], (spans[k] * size + 255) / 256 * 256);
    }
    for (int k = 0; k < 3; k++) s->at[k + 1] = s->at[k] + most[k];
    const int64_t reals = s->at[3] / (int64_t)sizeof *s->scratch;
    status = device_reals(s->step.r, "bench: the products of a step", reals, &s->scratch);
    if (s->list.short_of_memory) status = ls_fail(LS_ERR_MEMORY, "bench: no memory for the list of a step's products");
    if (status == LS_OK) status = bench_fill(ctx, s->scratch, reals);
    return agree(b->r, status);
}

static void repeat(const subject *s, int64_t i)
{
    char *x = (char *)s->scratch;
    for (int64_t k = 0; k < s->list.kind[i].times; k++)
        ls_product_repeat(s->step.r->sequence->queue, &s->list.kind[i].product, x + s->at[0], x + s->at[1],
                          x + s->at[2]);
}

static ls_status time_list(const bench *b, const subject *s, double *seconds)
{
    double begin;
    LS_TRY(bench_begin(b, s->step.r->sequence, &begin));
    for (int64_t i = 0; i < s->list.kinds; i++) repeat(s, i);
    return bench_lap(b, s->step.r->sequence, begin, seconds);
}

static double gflop_of(const ls_product *p)
{
    return 2e-9 * (double)p->m * (double)p->n * (double)p->k * (double)p->batch;
}

typedef struct line {
    int64_t kind;
    double gflop, seconds, share; /* share: of the rate of the square product in the same turn */
} line;

static int by_seconds(const void *a, const void *b)
{
    const double x = ((const line *)a)->seconds, y = ((const line *)b)->seconds;
    return x > y ? -1 : x < y;
}

/* Every rank times its own kinds, in as many turns as there are measurements; t and share are (kinds, repeat). */
static ls_status time_turns(const bench *b, const subject *s, double *t, double *share)
{
    ls_context *ctx = s->step.r->sequence;
    for (int64_t k = 0; k < b->repeat; k++) {
        double square;
        LS_TRY(ceilings_own_product(&s->top, &square));
        for (int64_t i = 0; i < s->list.kinds; i++) {
            const int64_t at = i * b->repeat + k;
            const double begin = seconds_now();
            repeat(s, i);
            LS_TRY(ls_context_wait(ctx));
            t[at] = seconds_now() - begin;
            share[at] = (double)s->list.kind[i].times * gflop_of(&s->list.kind[i].product) * square / t[at];
        }
    }
    return LS_OK;
}

static ls_status time_kinds(const bench *b, const subject *s, line *lines)
{
    const int64_t n = s->list.kinds;
    double *t = malloc((size_t)(2 * n * b->repeat + 1) * sizeof *t), *share = t == NULL ? NULL : t + n * b->repeat;
    if (t == NULL) LS_FAIL(LS_ERR_MEMORY, "bench: no memory for the times of %lld kinds of products", (long long)n);
    const ls_status status = time_turns(b, s, t, share);
    for (int64_t i = 0; i < n && status == LS_OK; i++)
        lines[i] = (line){i, (double)s->list.kind[i].times * gflop_of(&s->list.kind[i].product),
                          bench_median(t + i * b->repeat, b->repeat), bench_median(share + i * b->repeat, b->repeat)};
    free(t);
    return status;
}

static void print_line(const ls_product *p, int64_t times, const line *l)
{
    char name[80];
    snprintf(name, sizeof name, "%lldx (%lld,%lld,%lld) %s%s%s%s%s", (long long)p->batch, (long long)p->m,
             (long long)p->n, (long long)p->k, p->transpose_a ? "At " : "", p->transpose_b ? "Bt " : "",
             p->adds ? "+= " : "", p->in_double ? "double" : "", p->narrow_c ? "bf16" : "");
    printf("  %-38s %9lld %10.4f %9.5f %6.1f%%\n", name, (long long)times, l->gflop, l->seconds, 100 * l->share);
}

/* Kinds of products of rank 0, those that take longest first. */
static ls_status print_products(const bench *b, const subject *s)
{
    enum { MOST_LINES = 24 };
    const int64_t n = s->list.kinds;
    line *lines = malloc((size_t)(n + 1) * sizeof *lines), rest = {0};
    ls_status status = lines == NULL ? ls_fail(LS_ERR_MEMORY, "bench: no memory for a list of products") : LS_OK;
    if (status == LS_OK) status = time_kinds(b, s, lines);
    if (status == LS_OK && b->r->rank == 0) {
        qsort(lines, (size_t)n, sizeof *lines, by_seconds);
        printf("  %-38s %9s %10s %9s %7s\n", "batch x (m,n,k): C (m,n) = A B", "times", "Gflop", "seconds", "share");
        for (int64_t i = 0; i < n; i++) {
            if (i < MOST_LINES)
                print_line(&s->list.kind[lines[i].kind].product, s->list.kind[lines[i].kind].times, &lines[i]);
            if (i >= MOST_LINES) rest.gflop += lines[i].gflop, rest.seconds += lines[i].seconds;
        }
        if (n > MOST_LINES)
            printf("  %-38s %9lld %10.4f %9.5f\n", "other kinds", (long long)(n - MOST_LINES), rest.gflop,
                   rest.seconds);
    }
    free(lines);
    return agree(b->r, status);
}

/* ------------------------------------------------------------------------------------------------ one length */

/* Operations and number of a step's products, all ranks together. */
static ls_status add_up(const bench *b, const subject *s, double operations, figures *f)
{
    double mine[2] = {operations, 0}, all[2];
    for (int64_t i = 0; i < s->list.kinds; i++) mine[1] += (double)s->list.kind[i].times;
    if (MPI_Allreduce(mine, all, 2, MPI_DOUBLE, MPI_SUM, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: adding up products failed");
    f->gflop = all[0] * 1e-9, f->calls = all[1];
    return LS_OK;
}

static ls_status measure(const bench *b, subject *s, figures *f)
{
    static double step[BENCH_REPEAT], alone[BENCH_REPEAT], square[BENCH_REPEAT];
    double share[BENCH_REPEAT], alone_share[BENCH_REPEAT], other, operations = 0;
    LS_TRY(list_products(b, s)); /* warms up */
    LS_TRY(time_list(b, s, &other));
    for (int64_t i = 0; i < b->repeat; i++) {
        LS_TRY(ceilings_product(b, &s->top, &square[i]));
        const double before = ls_products_operations();
        LS_TRY(time_step(b, s, &step[i]));
        operations += (ls_products_operations() - before) / (double)b->repeat;
        LS_TRY(ceilings_product(b, &s->top, &other));
        LS_TRY(time_list(b, s, &alone[i]));
        square[i] = 0.5 * (square[i] + other);
    }
    LS_TRY(add_up(b, s, operations, f));
    for (int64_t i = 0; i < b->repeat; i++) {
        share[i] = f->gflop * square[i] / b->r->size / step[i];
        alone_share[i] = alone[i] / step[i];
    }
    f->step = bench_median(step, b->repeat);
    f->alone = bench_median(alone, b->repeat);
    f->square = bench_median(square, b->repeat);
    f->share = bench_median(share, b->repeat);
    f->alone_share = bench_median(alone_share, b->repeat);
    return LS_OK;
}

static void print_header(const bench *b, const config *c)
{
    if (b->r->rank != 0) return;
    printf("%s: %lld+%lld layers, width %lld, batch %lld, %s, %d rank%s; medians of %lld\n\n", b->train,
           (long long)c->model.encoder_layers, (long long)c->model.decoder_layers, (long long)c->model.embed_dim,
           (long long)c->train.batch, c->device, b->r->size, b->r->size == 1 ? "" : "s", (long long)b->repeat);
    printf("%8s %8s | %9s %9s | %10s %9s %9s | %9s %9s | %7s %7s\n", "source", "target", "step", "tokens", "products",
           "products", "products", "products", "square", "share", "alone/");
    printf("%8s %8s | %9s %9s | %10s %9s %9s | %9s %9s | %7s %7s\n", "", "", "seconds", "/second", "Gflop", "number",
           "alone, s", "Gflop/s", "Gflop/s", "of it", "step");
    if (b->csv != NULL)
        fputs("config,device,source,target,batch,ranks,step_seconds,labels_and_sources,product_gflop,products,"
              "products_alone_seconds,square_gflop_per_second,share_of_square,share_alone\n",
              b->csv);
}

static void print_figures(const bench *b, const subject *s, const figures *f)
{
    const double rate = b->r->size / f->square, share = f->share, alone = f->alone_share;
    const double tokens = (double)(s->c.train.batch * (s->source + s->target + 1));
    if (b->r->rank != 0) return;
    printf("%8lld %8lld | %9.4f %9.0f | %10.3f %9.0f %9.4f | %9.2f %9.2f | %6.1f%% %6.1f%%\n", (long long)s->source,
           (long long)s->target, f->step, tokens / f->step, f->gflop, f->calls, f->alone, f->gflop / f->alone, rate,
           100 * share, 100 * alone);
    fflush(stdout);
    if (b->csv == NULL) return;
    fputc('"', b->csv);
    for (const char *at = b->train; *at != 0; at++) fputs(*at == '"' ? "\"\"" : (const char[]){*at, 0}, b->csv);
    fprintf(b->csv, "\",%s,%lld,%lld,%lld,%d,%.6g,%.0f,%.9g,%.0f,%.6g,%.6g,%.6g,%.6g\n", s->c.device,
            (long long)s->source, (long long)s->target, (long long)s->c.train.batch, b->r->size, f->step, tokens,
            f->gflop, f->calls, f->alone, rate, share, alone);
    fflush(b->csv);
}

static void forget(subject *s)
{
    for (int64_t a = 0; s->micro != NULL && a < s->c.train.accumulation; a++) batch_free(&s->micro[a]);
    free(s->micro);
    s->micro = NULL;
    if (s->scratch != NULL) device_free(s->step.r, s->scratch);
    s->scratch = NULL;
    ls_products_free(&s->list);
    stepper_free(&s->step);
}

static ls_status one_length(const bench *b, subject *s, int64_t source, int64_t target)
{
    figures f = {0};
    s->source = source, s->target = target;
    LS_TRY(config_fits(&s->c, source, target + 1));
    ls_status status = stepper_create(b->r, &s->c, &s->step);
    if (status == LS_OK) {
        status = stepper_init(&s->step);
        if (status == LS_OK) status = make_batches(s);
        status = agree(b->r, status);
    }
    if (status == LS_OK) status = measure(b, s, &f);
    if (status == LS_OK) print_figures(b, s, &f);
    if (status == LS_OK && b->products) status = print_products(b, s);
    forget(s);
    return status;
}

static ls_status read_config(bench *b, config *c)
{
    char *text;
    size_t size;
    if (b->device_given) LS_TRY(text_list_add(&b->set, b->device == LS_CUDA ? "device=cuda" : "device=cpu"));
    if (b->precision_given) {
        static const char *const settings[] = {"train.precision=float32", "train.precision=tf32",
                                               "train.precision=bf16"};
        LS_TRY(text_list_add(&b->set, settings[b->precision]));
    }
    LS_TRY(read_everywhere(b->r, b->train, CONFIG_LARGEST, &text, &size));
    const ls_status status = config_parse(b->train, text, size, b->set.item, b->set.count, c);
    free(text);
    LS_TRY(agree(b->r, status));
    b->device = strcmp(c->device, "cuda") == 0 ? LS_CUDA : LS_CPU;
    b->precision = c->train.precision;
    if (b->lengths > 0) return LS_OK;
    if (c->data.max_source == 0 || c->data.max_target == 0)
        LS_FAIL(LS_ERR_ARGUMENT, "bench: %s has no data.max_source or no data.max_target: say --length SOURCE/TARGET",
                b->train);
    b->length[0] = c->data.max_source, b->target[0] = c->data.max_target, b->lengths = 1;
    return LS_OK;
}

ls_status bench_train(bench *b)
{
    static subject s;
    LS_TRY(read_config(b, &s.c));
    LS_TRY(ranks_split(b->r, &s.c, s.c.parallel.sequence));
    if (s.c.train.batch < b->r->groups)
        LS_FAIL(LS_ERR_ARGUMENT, "train.batch: %lld sequences are not enough for %d groups of ranks",
                (long long)s.c.train.batch, b->r->groups);
    LS_TRY(bench_open_csv(b));
    ls_status status = ceilings_open(b, b->r->sequence, &s.top);
    if (status == LS_OK) print_header(b, &s.c);
    for (int i = 0; i < b->lengths && status == LS_OK; i++)
        status = one_length(b, &s, b->length[i], b->target[i] > 0 ? b->target[i] : b->length[i]);
    ceilings_close(&s.top);
    return status;
}
