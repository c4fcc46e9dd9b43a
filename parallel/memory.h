/* What the driver does to memory between kernels, on the device where the tensors live: one table for each. */
#ifndef LS_MEMORY_H
#define LS_MEMORY_H

#include "monoid.h"

/* A tensor as rows by position: row t of (b,h) is at p + b*sb + h*sh + t*st, all in bytes. */
typedef struct ls_rows {
    char *p;
    int64_t row_bytes, nb, nh, sb, sh, st;
} ls_rows;
ls_rows ls_rows_of_view(ls_view v, int64_t B, int64_t H, int64_t d);
ls_rows ls_rows_of_pad(const uint8_t *pad, int64_t B, int64_t n);
/* The same from row t of (0,0) on. */
static inline ls_rows ls_rows_from(ls_rows r, int64_t t)
{
    r.p += t * r.st;
    return r;
}
/* Rows of the same size, n for each (b,h), side by side in packed memory. */
static inline ls_rows ls_rows_packed(const ls_rows *like, int64_t n, char *p)
{
    const int64_t head = n * like->row_bytes;
    const ls_rows packed = {p, like->row_bytes, like->nb, like->nh, like->nh * head, head, like->row_bytes};
    return packed;
}

typedef struct ls_memory {
    void (*copy)(ls_queue *, void *to, const void *from, size_t bytes); /* may be the same, not overlap */
    void (*zero)(ls_queue *, void *p, size_t bytes);
    /* n rows of each (b,h): to = from, or (rows of ls_real) to += from */
    void (*copy_rows)(ls_queue *, ls_rows to, ls_rows from, int64_t n);
    void (*add_rows)(ls_queue *, ls_rows to, ls_rows from, int64_t n);
    /* 0 in the rows of x whose pad (nb,n) is 1; pad NULL: in all rows */
    void (*clear_rows)(ls_queue *, ls_rows x, int64_t n, const uint8_t *pad);
    /* mean (B,n) of heads (B,H,n), summed in double */
    void (*mean_heads)(ls_queue *, int64_t B, int64_t H, int64_t n, const ls_real *heads, ls_real *mean);
    /* see monoid.h */
    void (*identity)(ls_queue *, ls_monoid m, ls_real *x);
    void (*combine)(ls_queue *, ls_monoid m, const ls_real *left, const ls_real *right, ls_real *out);
    void (*vjp_begin)(ls_queue *, ls_monoid m, const ls_real *got, const ls_real *dgot, ls_real *back);
    void (*vjp_end)(ls_queue *, ls_monoid m, const ls_real *sent, const ls_real *arrived, ls_real *dsent);
} ls_memory;
extern const ls_memory ls_cpu_memory, ls_cuda_memory;

#endif
