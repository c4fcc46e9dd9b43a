/* Beam search: of all ways in which the `beams` most probable beginnings of a target can go on by a token, the most
 * probable ones are gone on with, and those that end are put aside. A target's score is its log-probability divided by
 * its tokens' number (with the end) ^ penalty: 0 prefers short ones, 1 is the mean of a token. The search is over when
 * as many have ended as there are beams, and no beginning has a better score, as it stands, than the best of them; to
 * end with the number alone would be to end with poor ones, where one beginning is far more probable than all else.
 * Knows nothing of ranks: logits come, tokens go. */
#ifndef LS_TRAINER_BEAM_H
#define LS_TRAINER_BEAM_H

#include "longspan.h"

#include <stddef.h>
#include <stdint.h>

typedef struct beam_search beam_search;
ls_status beam_create(int64_t beams, double penalty, beam_search **b);
void beam_free(beam_search *b);
/* logits (beams, MODEL_VOCABULARY) of what follows; of the first row alone in the first call, when all have begun
 * alike. token (beams), from (beams): row r goes on with token[r] from what row from[r] was, or nothing does: *done is
 * 1 when the search is over. Ties go to the lower row, then the lower token. Not finite:
 * LS_ERR_NONFINITE. */
ls_status beam_step(beam_search *b, const ls_real *logits, int32_t *token, int64_t *from, int *done);
/* The bytes of the best target, of those that go on, too, as no more may be written; to be freed. */
ls_status beam_best(const beam_search *b, char **text, size_t *size);

#endif
