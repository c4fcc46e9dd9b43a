/* `longspan bench` from inside: command_bench.c reads the command line, bench_time.c measures what the machine reaches,
 * bench_case.c attentions against it, bench_report.c prints those, bench_train.c measures whole steps of training. */
#ifndef LS_BENCH_H
#define LS_BENCH_H

#include "trainer.h"

enum { BENCH_LENGTHS = 32, BENCH_REPEAT = 101 };

typedef struct bench {
    ranks *r;
    ls_device device;
    ls_precision precision;
    int device_given, precision_given, device_number;
    const char *mechanisms, *patterns;
    int64_t length[BENCH_LENGTHS], target[BENCH_LENGTHS]; /* target: of --train, 0: as length */
    int lengths;                                          /* 0: --train without --length */
    int64_t softmax_limit, batch, embed_dim, heads, repeat, dry;
    int cases, messages, products, help;
    const char *train; /* a configuration, whose training steps are measured instead */
    text_list set;
    const char *csv_path;
    FILE *csv;
} bench;

/* ------------------------------------------------------------------------------------------------ time */

/* Collective: all ranks are here and ctx's queue is empty; a measurement begins. */
ls_status bench_begin(const bench *b, ls_context *ctx, double *begin);
/* Collective: waits for the queue; the slowest rank's seconds since. */
ls_status bench_lap(const bench *b, ls_context *ctx, double begin, double *seconds);
/* Sorts x. */
double bench_median(double *x, int64_t n);
/* How many calls of so many seconds are to be timed at once, so that it takes long enough. */
int64_t bench_calls(double seconds);
/* Numbers to compute with, to memory of ctx's device. */
ls_status bench_fill(ls_context *ctx, ls_real *x, int64_t n);

/* What this rank's part of the machine reaches, through the doors that everything goes by: square matrix products, and
 * copies of memory. On memory of its own. */
typedef struct ceilings {
    ls_context *ctx;
    ls_real *x;
    ls_operand factor[2];   /* of the product, as the device takes them without a copy */
    int64_t side, products; /* of a square matrix; how many products are timed at once */
    int64_t reals, copies;  /* that are copied; how often */
} ceilings;
/* Collective: finds sizes that are large enough for this device. */
ls_status ceilings_open(const bench *b, ls_context *ctx, ceilings *c);
void ceilings_close(ceilings *c);
/* Collective: seconds for each 10^9 operations, and for each 10^9 bytes that are read or written. */
ls_status ceilings_product(const bench *b, const ceilings *c, double *seconds);
ls_status ceilings_copy(const bench *b, const ceilings *c, double *seconds);
/* Local: as ceilings_product, whatever the other ranks do. */
ls_status ceilings_own_product(const ceilings *c, double *seconds);

/* ------------------------------------------------------------------------------------------------ attentions */

/* A row of tests/cases.def: mechanism, pattern, options. */
typedef struct bench_case {
    const char *mechanism;
    ls_pattern pattern;
    const char *options;
} bench_case;

enum bench_part { CORE_FORWARD, CORE_BACKWARD, LAYER_FORWARD, LAYER_BACKWARD, PROJECTIONS, SGEMM, COPY, BENCH_PARTS };
typedef struct bench_figures {
    double seconds[BENCH_PARTS]; /* medians; sgemm, copy: per 10^9 operations, bytes; 0: there is no such part */
    /* Medians of the turns' ratios, since a machine that slows down for a while slows both sides of one. */
    double layer_over_projections, sgemm_over_core, copy_over_core, copy_over_forward, copy_over_backward;
    double bytes_sent, messages, peak_memory; /* of one forward and backward of the layer, all ranks together */
    double bytes_forward, bytes_backward;     /* that the core must read and write, all ranks together */
} bench_figures;

/* The one place where the options of a context are said. */
ls_context_options bench_context(const bench *b);
double bench_option(const ls_attention_options *o, const char *name); /* NAN: there is no such option */
/* Collective. o: its level may change. */
ls_status bench_measure(const bench *b, const ceilings *top, ls_attention_options *o, int64_t length, bench_figures *f);

/* Collective, once everything is checked: what the file held before is gone then. */
ls_status bench_open_csv(bench *b);
/* Also tells of lines that could not be written. Harmless where there is none. */
ls_status bench_close_csv(bench *b);
int bench_ranks(const bench *b); /* also of those that --ranks only imagines */
void bench_print_header(const bench *b, const ceilings *top);
void bench_print_figures(const bench *b, const bench_case *c, int64_t length, const bench_figures *f);

/* ------------------------------------------------------------------------------------------------ training steps */

/* Collective: all of --train. */
ls_status bench_train(bench *b);

#endif
