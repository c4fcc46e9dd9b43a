/* The two halves of attention through few slots (slots.h) on a GPU, for all (b,h) at once: keys write, queries read.
 *
 * Nothing of size rows x slots is kept, neither forward nor backward; and no product is rounded, whatever the queue's
 * precision: what gradients of slots become are differences.
 *
 * Everything is in device memory; sizes and rows are passed to kernels by value. */
#ifndef LS_SLOTS_CUDA_H
#define LS_SLOTS_CUDA_H

#include "cuda.h"

extern "C" {
#include "slots.h"
}

typedef struct ls_slot_sizes {
    int64_t B, H, R, d;
} ls_slot_sizes;

/* Rows as the slots see them: x - centre (B*H,d), or x where centre is NULL; 0 where pad is 1. */
typedef struct ls_slot_rows {
    ls_view x;
    const uint8_t *pad; /* (B,n) or NULL */
    int64_t n;          /* of each (b,h) */
    const ls_real *centre;
} ls_slot_rows;

/* Doubles of room for the sums of a pass over so many rows. */
int64_t ls_slots_room(ls_slot_sizes s, int64_t rows, int backward);
/* Reals of each row that reading backward keeps. */
int64_t ls_slots_row_reals(ls_slot_sizes s);

/* sent (B*H,R,d+2): (m; s, x) of all keys. l_jr = k_j·slots_r - half |k_j|², slots (B*H,R,d); values: v - reference. */
void ls_slots_write_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                         ls_slot_rows values, double *room, ls_real *sent);
/* Rows of dk and dv, and dslots (B*H,R,d). values: v - c; constant (B*H,R), both as ls_slots_constants says; sent, got,
 * dsent: elements. With half != 0 keys have no centre. */
void ls_slots_write_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                                  ls_slot_rows values, const ls_real *sent, const ls_real *got, const ls_real *dsent,
                                  const ls_real *constant, double *room, ls_view dk, ls_view dv, double *dslots);
/* values (B*H,R,d) = V - reference, or V if the reference (B*H,d) is given; 0, or it, where no key was. */
void ls_slots_values_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *element, const ls_real *reference,
                          double *values);
/* mean (B*H,d) of the rows of x (B*H,R,d). */
void ls_slots_mean_cuda(ls_queue *q, ls_slot_sizes s, const double *x, double *mean);
/* centred = scale (x - mean), of the same shape, rounded; rounded (B*H,d) = the mean, or += with `add`; NULL: not
 * wanted. */
void ls_slots_centre_cuda(ls_queue *q, ls_slot_sizes s, double scale, const double *x, ls_real *centred,
                          ls_real *rounded, int add);
/* y (n) = scale x, rounded. */
void ls_slots_round_cuda(ls_queue *q, int64_t n, double scale, const double *x, ls_real *y);
/* c and constant as ls_slots_constants. values (B*H,R,d), mean (B*H,d): room. */
void ls_slots_constants_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *got, const ls_real *dsent, double *values,
                             double *mean, ls_real *c, ls_real *constant);

/* out_i = centre + Σ_r p_ir values_r, 0 in padded rows; l_ir = q_i·slots_r + constant_r, constant NULL: 0. centre
 * (B*H,d), values (B*H,R,d): V - centre. */
void ls_slots_read_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                        const ls_real *constant, const ls_real *values, const ls_real *centre, ls_view out);
/* Rows of dq, and dvalues, dslots (B*H,R,d), dconstant (B*H,R) or NULL: not wanted. rows: ls_slots_row_reals for each
 * query. */
void ls_slots_read_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                                 const ls_real *constant, const ls_real *values, ls_slot_rows dout, ls_real *rows,
                                 double *room, ls_view dq, double *dvalues, double *dslots, double *dconstant);

#endif
