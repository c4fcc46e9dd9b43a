/* The phases of exact softmax attention, for mechanisms that fall back on it where a sequence is short:
 *
 *   begin → visit (ring) → finish;  in a step of cross attention: begin → visit (ring) → send → take (reduce)
 *
 * They use saved[0] and work[] as ls_softmax_plan filled them: a call is wholly softmax, or not at all. out is
 * overwritten by finish; backward, dq by finish and dk, dv by the ring. There finish reads p->out, for δ_i = do_i·o_i:
 * a mechanism that has added to o has kept softmax's own output, and puts it there. */
#ifndef LS_SOFTMAX_H
#define LS_SOFTMAX_H

#include "mechanism.h"

void ls_softmax_plan(ls_pass *p, ls_arena *saved, ls_arena *work);
ls_status ls_softmax_begin(ls_pass *p, int phase);
ls_status ls_softmax_visit(ls_pass *p, int phase);
ls_status ls_softmax_visit_backward(ls_pass *p, int phase);
ls_status ls_softmax_finish(ls_pass *p, int phase);
ls_status ls_softmax_finish_backward(ls_pass *p, int phase);

ls_monoid ls_softmax_statistics(const ls_pass *p);
ls_status ls_softmax_send(ls_pass *p, int phase);
ls_status ls_softmax_take(ls_pass *p, int phase);

#endif
