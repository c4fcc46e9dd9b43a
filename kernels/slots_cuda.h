/* The two halves of attention through few slots (slots.h) on a GPU, for all (b,h) at once: keys write, queries read.
 *
 * Forward nothing of size rows x slots is kept. Backward it is, for as many rows at a time as ls_slots_rows_at_once
 * says: the probabilities and the gradients of the logits are made once, and every product then takes them from there.
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

/* Rows whose probabilities are held at a time; 0 only of 0 rows. */
int64_t ls_slots_rows_at_once(ls_slot_sizes s, int64_t rows);
/* Doubles of room for writing, and for sums, over so many rows. */
int64_t ls_slots_room(ls_slot_sizes s, int64_t rows);

/* sent (B*H,R,d+2): (m; s, x) of all keys. l_jr = k_j·slots_r - half |k_j|², slots (B*H,R,d); values: v - reference. */
void ls_slots_write_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                         ls_slot_rows values, double *room, ls_real *sent);
/* For keys [t, t + n): e, dlogits (B*H,n,R). values: v - c; constant (B*H,R), both as ls_slots_constants says. */
void ls_slots_write_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows keys, const ls_real *slots, double half,
                                  ls_slot_rows values, const ls_real *sent, const ls_real *dsent,
                                  const ls_real *constant, int64_t t, int64_t n, ls_real *e, ls_real *dlogits);
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
/* For queries [t, t + n): p, dlogits (B*H,n,R). */
void ls_slots_read_backward_cuda(ls_queue *q, ls_slot_sizes s, ls_slot_rows queries, const ls_real *slots,
                                 const ls_real *constant, const ls_real *values, ls_slot_rows dout, int64_t t,
                                 int64_t n, ls_real *p, ls_real *dlogits);

/* total (B*H,R,d) = Σ_j a_jr x_j over rows [t, t + n), a (B*H,n,R); columns (B*H,R) = Σ_j a_jr, NULL: not wanted.
 * add: += both. */
void ls_slots_sum_cuda(ls_queue *q, ls_slot_sizes s, const ls_real *a, ls_slot_rows x, int64_t t, int64_t n,
                       double *room, double *total, double *columns, int add);

/* Rows [t, ..) of a view; matrices (B*H,n,width) as a view. */
static inline ls_view ls_rows_from(ls_view x, int64_t t)
{
    x.p += t * x.st;
    return x;
}
static inline ls_view ls_matrices(ls_slot_sizes s, const ls_real *x, int64_t n, int64_t width)
{
    const ls_view view = {const_cast<ls_real *>(x), s.H * n * width, n * width, width};
    return view;
}

#endif
