/* What the files of longshort share: options, memory, and copies of rows with all heads side by side. */
#ifndef LS_LONGSHORT_H
#define LS_LONGSHORT_H

#include "dense.h"
#include "gemm.h"
#include "longshort_form.h"
#include "tile.h"

enum {
    BLOCK = 64, /* rows normalised at a time */
    TILE = 64   /* queries worked on at a time, at most */
};

/* n rows of the halo, N far vectors that the queries of this rank see at most (one in a step: all that is far, see
 * longshort_attend.c), D = min(w, length) distances within the window, C = H·r columns of scores. Arrays of two: keys,
 * values. What starts with d is there in backward only. */
typedef struct longshort_memory {
    int64_t N, D;
    ls_real *near[2];                  /* the halo's rows normalised (B,H,n,d) */
    ls_real *far[2], *dfar[2];         /* far vectors of the batch row under way, (H,N,d) */
    ls_real *far_mask;                 /* (N) 0, or -inf: not there */
    ls_real *merged, *dmerged;         /* CS: keys with the term of their distance, of one head (N,d) */
    ls_real *far_table, *dfar_table;   /* CS: R_chunk(0) .. R_chunk(N-1), (H,N,d) */
    ls_real *near_table, *dnear_table; /* CS: R_win(0) .. R_win(D-1), (H,D,d) */
    ls_real *positions;                /* CS: pe(0), pe(1), .. (max(N, D),E) */
    double *dr, *dnorm;                /* gradients in double: CS of r_w, r_r (2,H,d); of the norms (4,E), see below */

    /* a tile of queries: rows (TILE,d), scores and their gradients (TILE,width): first far, then near keys */
    ls_real *q, *q_w, *q_r, *dout, *dq, *dq_r;                    /* scaled queries, with r_w, with r_r */
    ls_real *scores, *dscores, *relative, *drelative, *near_mask; /* relative (TILE,D): (q + r_r)·R_win(distance) */
    int64_t width;

    ls_real *raw[2], *vectors;                      /* vectors while they are made: before their norm, one more (r,E) */
    ls_real *block[6];                              /* (BLOCK,E) */
    ls_real *logits, *dlogits;                      /* NS (BLOCK,C); CS (C,c) */
    ls_real *top, *next_top, *constant, *centre[2]; /* NS (C), (C), (C), (E) */
    ls_real *product;                               /* NS (C,d) */
    double *sum, *weighted[2], *shrink;             /* NS (C), (C,d), (C) */
    ls_real *u, *distance_term;                     /* step (H,E), (H, visible vectors) */
} longshort_memory;

static inline longshort_memory *memory_of(const ls_pass *p)
{
    return (longshort_memory *)(void *)p->work[0];
}

/* Rows [t, t + n) of all heads to (n,E), and back. */
static inline void gather_rows(ls_view from, int64_t b, int64_t t, int64_t n, int64_t H, int64_t d, ls_real *to)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < H; h++, to += d) memcpy(to, ls_row(from, b, h, t + i), (size_t)d * sizeof *to);
}
static inline void scatter_rows(const ls_real *from, int64_t t, int64_t n, int64_t H, int64_t d, ls_view to, int64_t b)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < H; h++, from += d) memcpy(ls_row(to, b, h, t + i), from, (size_t)d * sizeof *from);
}

/* LayerNorm of rows (rows,E) with parameters `weight` and the next: NEAR_WEIGHT or FAR_WEIGHT. */
void ls_longshort_norm(const ls_pass *p, int weight, int64_t rows, const ls_real *x, ls_real *y);
/* dx, which may be dy; parameter gradients are summed in dnorm from begin_norms to end_norms. */
void ls_longshort_norm_backward(const ls_pass *p, int weight, int64_t rows, const ls_real *x, const ls_real *dy,
                                ls_real *dx);
void ls_longshort_begin_norms(const ls_pass *p);
void ls_longshort_end_norms(const ls_pass *p);

/* longshort_far.c. NS: sums of the landmarks, landmarks of a batch row (1: there are any) and their gradients. */
ls_monoid ls_longshort_landmark_sums(const ls_pass *p);
ls_status ls_longshort_landmarks(ls_pass *p, int phase);
ls_status ls_longshort_landmarks_backward(ls_pass *p, int phase);
int ls_longshort_load_landmarks(ls_pass *p, const ls_summary *s, int64_t b);
void ls_longshort_return_landmarks(ls_pass *p, const ls_summary *s, int64_t b);
/* CS: summaries of chunks. */
int64_t ls_longshort_piece(const ls_pass *p, int64_t lo, int64_t n);
ls_status ls_longshort_summaries(ls_pass *p, int phase);
ls_status ls_longshort_summaries_backward(ls_pass *p, int phase);
void ls_longshort_load_summaries(ls_pass *p, const ls_collection *g, int64_t b);
void ls_longshort_return_summaries(ls_pass *p, const ls_collection *g, int64_t b);
/* A step: what this rank's part of the list gives, for each (b,h) (m; s, Σ e^(logit - m) v). */
ls_monoid ls_longshort_statistics(const ls_pass *p);
ls_status ls_longshort_look_far(ls_pass *p, int phase);
void ls_longshort_load_statistics(ls_pass *p, const ls_summary *s, int64_t b);

/* longshort_attend.c */
ls_status ls_longshort_attend(ls_pass *p, int phase);
ls_status ls_longshort_attend_backward(ls_pass *p, int phase);

#endif
