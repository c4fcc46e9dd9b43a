/* Documents packed into one sequence. Attention never crosses from one to another, so each is a call of its own: batch
 * 1, its positions counted from 0, its shard what every rank owns of it, most of them nothing. Whatever a mechanism
 * does across ranks, it does for a document as for a sequence, and the result is that of the document alone.
 *
 * A document that lies wholly on one rank crosses nothing: its rank works on it alone, first. At most P - 1 documents
 * of a batch row span ranks; those are walked by all ranks together, in one order. */
#ifndef LS_PACKED_H
#define LS_PACKED_H

#include "run.h"

typedef struct ls_document {
    int64_t row, id;              /* batch row, segment id */
    int64_t q_lo, q_n, k_lo, k_n; /* its queries and keys, global positions; self attention: the same */
    int owner;                    /* the rank that owns all of them; -1: several */
} ls_document;

/* Reusable; lives from forward to backward. */
typedef struct ls_documents {
    ls_document *list;
    int64_t count, capacity;
    ls_requests *requests;        /* (capacity): those of each document's call */
    ls_shard queries, keys;       /* of the document under way */
    size_t saved_mark, work_mark; /* where the memory of documents begins */
} ls_documents;
void ls_documents_free(ls_documents *docs);
size_t ls_documents_bytes(const ls_documents *docs); /* that they hold, here and on the device */

/* Collective: from the segment ids of this rank's rows, (B,T) and (B,S), the documents of the whole batch, the same
 * list on every rank. A document is a run of equal ids >= 0; rows with negative ids belong to none. Queries and keys
 * with the same id are one document; keys NULL: self attention. The same id in two places of a row is LS_ERR_ARGUMENT.
 */
ls_status ls_documents_find(ls_context *ctx, const char *name, int64_t B, const ls_shard *queries, const ls_shard *keys,
                            const int32_t *query_id, const int32_t *key_id, ls_documents *docs);

/* As ls_run_plan, _forward and _backward, of all documents of the call. Measures when the arenas do; otherwise
 * remembers where they stand: each document is planned again just before it runs. */
void ls_packed_plan(ls_call *call, ls_arena *saved, ls_arena *work);
/* Collective. */
ls_status ls_packed_forward(ls_call *call, ls_arena *saved, ls_arena *work);
ls_status ls_packed_backward(ls_call *call, ls_arena *saved, ls_arena *work);

#endif
