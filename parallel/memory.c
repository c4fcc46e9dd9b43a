#include "memory.h"

#include <string.h>

ls_rows ls_rows_of_view(ls_view v, int64_t B, int64_t H, int64_t d)
{
    const int64_t e = (int64_t)sizeof(ls_real);
    return (ls_rows){(char *)v.p, d * e, B, H, v.sb * e, v.sh * e, v.st * e};
}

ls_rows ls_rows_of_pad(const uint8_t *pad, int64_t B, int64_t n)
{
    return (ls_rows){(char *)(uintptr_t)pad, 1, B, 1, n, 0, 1};
}

static char *row_of(const ls_rows *x, int64_t b, int64_t h)
{
    return x->p + b * x->sb + h * x->sh;
}

static void copy(ls_queue *queue, void *to, const void *from, size_t bytes)
{
    (void)queue;
    if (bytes > 0 && to != from) memcpy(to, from, bytes);
}

static void zero(ls_queue *queue, void *p, size_t bytes)
{
    (void)queue;
    if (bytes > 0) memset(p, 0, bytes);
}

static void copy_rows(ls_queue *queue, ls_rows to, ls_rows from, int64_t n)
{
    (void)queue;
    for (int64_t b = 0; b < to.nb; b++)
        for (int64_t h = 0; n > 0 && h < to.nh; h++) {
            char *x = row_of(&to, b, h);
            const char *y = row_of(&from, b, h);
            int64_t bytes = to.row_bytes, rows = n;
            if (to.st == bytes && from.st == bytes) bytes *= n, rows = bytes > 0; /* all of it is one row */
            for (int64_t i = 0; i < rows; i++, x += to.st, y += from.st) memcpy(x, y, (size_t)bytes);
        }
}

static void add_rows(ls_queue *queue, ls_rows to, ls_rows from, int64_t n)
{
    (void)queue;
    const int64_t reals = to.row_bytes / (int64_t)sizeof(ls_real);
    for (int64_t b = 0; b < to.nb; b++)
        for (int64_t h = 0; h < to.nh; h++)
            for (int64_t i = 0; i < n; i++) {
                ls_real *restrict x = (ls_real *)(void *)(row_of(&to, b, h) + i * to.st);
                const ls_real *restrict y = (const ls_real *)(const void *)(row_of(&from, b, h) + i * from.st);
                for (int64_t e = 0; e < reals; e++) x[e] += y[e];
            }
}

static void clear_rows(ls_queue *queue, ls_rows x, int64_t n, const uint8_t *pad)
{
    (void)queue;
    for (int64_t b = 0; b < x.nb; b++)
        for (int64_t h = 0; x.row_bytes > 0 && h < x.nh; h++)
            for (int64_t t = 0; t < n; t++)
                if (pad == NULL || pad[b * n + t]) memset(row_of(&x, b, h) + t * x.st, 0, (size_t)x.row_bytes);
}

static void mean_heads(ls_queue *queue, int64_t B, int64_t H, int64_t n, const ls_real *heads, ls_real *mean)
{
    (void)queue;
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = 0; i < n; i++) {
            double s = 0;
            for (int64_t h = 0; h < H; h++) s += (double)heads[(b * H + h) * n + i];
            mean[b * n + i] = (ls_real)(s / (double)H);
        }
}

static void identity(ls_queue *queue, ls_monoid m, ls_real *x)
{
    (void)queue;
    ls_monoid_identity(m, x);
}

static void combine(ls_queue *queue, ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out)
{
    (void)queue;
    ls_monoid_combine(m, left, right, out);
}

static void vjp_begin(ls_queue *queue, ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back)
{
    (void)queue;
    ls_monoid_vjp_begin(m, got, dgot, back);
}

static void vjp_end(ls_queue *queue, ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent)
{
    (void)queue;
    ls_monoid_vjp_end(m, sent, arrived, dsent);
}

const ls_memory ls_cpu_memory = {copy,       zero,     copy_rows, add_rows,  clear_rows,
                                 mean_heads, identity, combine,   vjp_begin, vjp_end};
