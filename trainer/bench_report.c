/* The table of `longspan bench`, and the same as CSV. */
#include "bench.h"

#include <errno.h>
#include <string.h>

static const char *const letters[] = {"NS", "CS", "NC", "CC"};

static ls_status open_csv(bench *b)
{
    if (b->csv_path == NULL || b->r->rank != 0) return LS_OK;
    if ((b->csv = fopen(b->csv_path, "w")) != NULL) return LS_OK;
    LS_FAIL(LS_ERR_IO, "bench: %s cannot be written: %s", b->csv_path, strerror(errno));
}

ls_status bench_open_csv(bench *b)
{
    return agree(b->r, open_csv(b));
}

ls_status bench_close_csv(bench *b)
{
    if (b->csv == NULL) return LS_OK;
    int failed = ferror(b->csv); /* an earlier line, which nobody asked about: figures were still to be printed */
    errno = 0;
    failed |= fclose(b->csv) != 0;
    b->csv = NULL;
    if (!failed) return LS_OK;
    LS_FAIL(LS_ERR_IO, "bench: %s cannot be written: %s", b->csv_path,
            errno != 0 ? strerror(errno) : "is the disk full?");
}

int bench_ranks(const bench *b)
{
    return b->dry > 0 ? (int)b->dry : b->r->size;
}

void bench_print_header(const bench *b, const ceilings *top)
{
    static const char form[] = "%-26s %8s | %8s %8s | %8s %8s %8s %6s | %6s %6s | %9s %10s | %8s %8s\n";
    const int ranks_here = bench_ranks(b);
    if (b->r->rank != 0) return;
    printf("batch %lld, embed_dim %lld, %lld heads, %d rank%s, %s; medians of %lld turns, in seconds\n",
           (long long)b->batch, (long long)b->embed_dim, (long long)b->heads, ranks_here, ranks_here == 1 ? "" : "s",
           top->ctx->ops->name, (long long)b->repeat);
    printf("square products of side %lld, copies of %lld MiB", (long long)top->side,
           (long long)(top->reals * (int64_t)sizeof *top->x >> 20));
    if (b->device == LS_CPU) printf(", OpenBLAS kernels for %s", ls_blas_kernels());
    printf("\n");
    printf("%s\n", b->dry > 0 ? "time, memory and bytes are those of the middle rank alone; nothing was sent\n" : "");
    printf(form, "mechanism", "length", "core fwd", "core bwd", "layer", "alone", "core", "ratio", "sgemm", "copy",
           "MiB", "KiB sent", "sgemm", "copy");
    printf(form, "", "", "", "", "fwd+bwd", "proj.", "fwd+bwd", "l/p", "share", "share", "", "", "Gflop/s", "GB/s");
    if (b->csv != NULL)
        fputs("mechanism,pattern,options,length,ranks,batch,embed_dim,heads,core_forward,core_backward,layer_forward,"
              "layer_backward,projections,sgemm_seconds_per_gflop,peak_memory_bytes,bytes_sent,messages,device,"
              "copy_seconds_per_gbyte,share_of_product_rate,share_of_bandwidth,share_of_bandwidth_forward,"
              "share_of_bandwidth_backward,precision,layer_over_projections\n",
              b->csv);
}

/* Operations of exact softmax: 2 products forward, 5 backward; a triangle counts half. */
static double softmax_gflop(const bench *b, ls_pattern pattern, int64_t length)
{
    const double pairs = (double)length * (double)length * (pattern == LS_CS ? 0.5 : 1);
    return 7 * 2 * pairs * (double)(b->embed_dim * b->batch) * 1e-9;
}

/* longshort is timed as a layer alone. */
static int has_core(const bench_figures *f)
{
    return f->seconds[CORE_FORWARD] + f->seconds[CORE_BACKWARD] > 0;
}

/* Those of the case, and what --set has added or changed: "m=40,eps=0.1". */
static void options_of(const bench *b, const bench_case *c, char *text, size_t size)
{
    const size_t name = strlen(c->mechanism);
    snprintf(text, size, "%s", c->options);
    for (int i = 0; i < b->set.count; i++) {
        const char *set = b->set.item[i];
        const size_t used = strlen(text);
        if (strncmp(set, c->mechanism, name) == 0 && set[name] == '.')
            snprintf(text + used, size - used, "%s%s", used > 0 ? "," : "", set + name + 1);
    }
}

static void write_share(FILE *file, double share)
{
    if (share > 0)
        fprintf(file, ",%.6g", share);
    else
        fputs(",", file);
}

static void write_line(const bench *b, const bench_case *c, int64_t length, const bench_figures *f,
                       const double share[4])
{
    char options[256];
    options_of(b, c, options, sizeof options);
    fprintf(b->csv, "%s,%s,\"%s\",%lld,%d,%lld,%lld,%lld", c->mechanism, letters[c->pattern], options,
            (long long)length, bench_ranks(b), (long long)b->batch, (long long)b->embed_dim, (long long)b->heads);
    for (int k = 0; k <= SGEMM; k++)
        if (k > CORE_BACKWARD || has_core(f))
            fprintf(b->csv, ",%.6g", f->seconds[k]);
        else
            fputs(",", b->csv);
    fprintf(b->csv, ",%.0f,%.0f,%.0f", f->peak_memory, f->bytes_sent, f->messages);
    fprintf(b->csv, ",%s,%.6g", b->device == LS_CUDA ? "cuda" : "cpu", f->seconds[COPY]);
    for (int k = 0; k < 4; k++) write_share(b->csv, share[k]);
    fprintf(b->csv, ",%s,%.6g\n", ls_precision_name(b->precision), f->layer_over_projections);
    fflush(b->csv);
}

/* 0: there is no such share. */
static void percent(char text[16], double share)
{
    text[0] = 0;
    if (share > 0) snprintf(text, 16, share < 0.1 ? "%.1f%%" : "%.0f%%", 100 * share);
}

void bench_print_figures(const bench *b, const bench_case *c, int64_t length, const bench_figures *f)
{
    const double *s = f->seconds, layer = s[LAYER_FORWARD] + s[LAYER_BACKWARD];
    const double core = s[CORE_FORWARD] + s[CORE_BACKWARD];
    /* a dry rank measures its own bytes, ranks together all of theirs; the ceilings are those of one rank */
    const double bytes = 1e-9 / (b->dry > 0 ? 1 : b->r->size);
    double share[4] = {0}; /* of products; of copies: both ways, forward, backward */
    char name[320], options[256], products[16], copies[16], cores[3][24];
    if (b->r->rank != 0) return;
    if (core > 0) {
        if (strcmp(c->mechanism, "softmax") == 0)
            share[0] = softmax_gflop(b, c->pattern, length) * f->sgemm_over_core / bench_ranks(b);
        share[1] = (f->bytes_forward + f->bytes_backward) * bytes * f->copy_over_core;
        share[2] = f->bytes_forward * bytes * f->copy_over_forward;
        share[3] = f->bytes_backward * bytes * f->copy_over_backward;
    }
    options_of(b, c, options, sizeof options);
    snprintf(name, sizeof name, "%s %s %s", c->mechanism, letters[c->pattern], options);
    percent(products, share[0]);
    percent(copies, share[1]);
    const int digits = b->device == LS_CPU ? 4 : 6; /* a GPU's times are short */
    const double of_core[] = {s[CORE_FORWARD], s[CORE_BACKWARD], core};
    for (int i = 0; i < 3; i++) snprintf(cores[i], sizeof cores[i], has_core(f) ? "%.*f" : "-", digits, of_core[i]);
    printf("%-26s %8lld | %8s %8s | %8.*f %8.*f %8s %6.2f | %6s %6s | %9.1f %10.1f | %8.1f %8.1f\n", name,
           (long long)length, cores[0], cores[1], digits, layer, digits, s[PROJECTIONS], cores[2],
           f->layer_over_projections, products, copies, f->peak_memory / 1048576, f->bytes_sent / 1024, 1 / s[SGEMM],
           1 / s[COPY]);
    fflush(stdout);
    if (b->csv != NULL) write_line(b, c, length, f, share);
}
