/* What the files of the driver share: plan.c, ring.c, run.c. */
#ifndef LS_RUN_PARTS_H
#define LS_RUN_PARTS_H

#include "run.h"

/* The block of keys that `rank` owns: its rows, and their global positions. */
void ls_describe_block(const ls_call *c, int rank, ls_block *block);
/* A block of n keys on the wire: k, v (unless only keys visit) and notes, which are reals; and pads. */
int64_t ls_block_reals(const ls_pass *p, const ls_phase *ring, int64_t n);
size_t ls_block_bytes(const ls_pass *p, const ls_phase *ring, int64_t n);
/* The pass as the kernels see it: in its zigzag place, where that is on. */
ls_pass ls_placed(const ls_call *c);
/* The rows that lists brought, in memory of their own: how many is not known before the phases before have run. */
void ls_plan_brought(const ls_pass *p, ls_requests *r, ls_block *halo);

/* Collective. The ring of phase i, and its kernel at each step. */
ls_status ls_ring_forward(ls_call *c, ls_pass *p, const ls_phase *phase, int i);
ls_status ls_ring_backward(ls_call *c, ls_pass *p, const ls_phase *phase, int i);
/* Collective. Tensors into their zigzag place, with the masks where wanted, and what was made there home again. */
ls_status ls_place(ls_call *c, int tensors, const ls_view *from, const ls_view *to, int with_pads);
ls_status ls_put_back(ls_call *c, int tensors, const ls_view *home, const ls_view *away);

#endif
