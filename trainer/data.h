/* Pairs of documents as one HDF5 file, and batches of them sharded over ranks.
 *
 * File: attributes format = "longspan-pairs", version = 1, vocabulary = "bytes", vocabulary_size = 256, source_names;
 * a group for each split (train, valid, test) with
 *   source, target                  uint16 tokens of all documents, one after the other
 *   source_offsets, target_offsets  int64 (documents + 1), from 0, strictly increasing (no empty document)
 *   names                           variable-length UTF-8 strings (documents)
 *   source_digests, target_digests  uint64, XXH3 of each block of DATA_BLOCK tokens (little-endian bytes)
 *   attribute offsets_digest        uint64, XXH3 of both offset arrays
 */
#ifndef LS_DATA_H
#define LS_DATA_H

#include "shard.h"
#include "status.h"

enum { DATA_BLOCK = 1 << 20, DATA_VERSION = 1, DATA_VOCABULARY = 256 };
/* Tokens that the file does not hold. */
enum { TOKEN_BOS = 256, TOKEN_EOS = 257, MODEL_VOCABULARY = 258, TOKEN_PAD = -1 };

typedef struct dataset dataset;

/* Collective over world: opens, checks format, version, shapes, offsets (whole), token range and digests (ranks share
 * the blocks). Nothing is trained on a file that fails. Errors: LS_ERR_IO (missing, unreadable), LS_ERR_FORMAT. */
ls_status dataset_open(ls_context *world, const char *path, int verify, dataset **data);
void dataset_close(dataset *data);
/* Documents of a split ("train", "valid", "test"); 0 where the split is absent. */
int64_t dataset_documents(const dataset *data, const char *split);
int64_t dataset_longest(const dataset *data, const char *split, int target); /* tokens, uncut */
/* Lengths of document i; name is valid until dataset_close. */
void dataset_lengths(const dataset *data, const char *split, int64_t i, int64_t *source, int64_t *target);
const char *dataset_name(const dataset *data, const char *split, int64_t i);
uint64_t dataset_digest(const dataset *data); /* of all digests: a checkpoint remembers it */

/* One batch as one rank sees it: its rows of every sequence of its group. Padded positions hold TOKEN_PAD. */
typedef struct batch {
    int64_t B;
    ls_shard source, target;      /* positions of the padded batch; target includes BOS / EOS */
    int32_t *source_token;        /* (B, source.n) */
    int32_t *input_token, *label; /* (B, target.n): BOS t0 t1 .. and t0 t1 .. EOS */
    uint8_t *source_pad, *target_pad;
    uint64_t sample;              /* global number of row 0, for random streams */
    int64_t tokens;               /* labels of the whole rows, all ranks of the group */
    int64_t capacity;             /* private */
} batch;
void batch_free(batch *b);

/* Reads documents `index[0..B)` of a split, this rank's hyperslab only (plain reads, not collective); lengths cut to
 * max_source / max_target (0: uncut). rank/size: this rank's place among those that share the sequences. */
ls_status dataset_read(dataset *data, const char *split, const int64_t *index, int64_t B, int64_t max_source,
                       int64_t max_target, int rank, int size, batch *b);

/* The order of training: document index[k] of global sample number first + k. Epoch e is the permutation of a Philox
 * keyed by (seed, epoch); within it, windows of 16 batches are sorted by length so that batches pad little, and the
 * batches of a window are shuffled. Depends on (seed, documents, lengths, batch) only: never on ranks. */
ls_status dataset_order(const dataset *data, uint64_t seed, int64_t batch, int64_t first, int64_t count,
                        int64_t *index);

/* `longspan pack`: writes the file (to a temporary name, synced, renamed). Each split is a TSV file
 * (name \t source \t target with \t, \n, \\ escapes; two columns: no name), or a pair of directories with matching file
 * names "SOURCE_DIR:TARGET_DIR". NULL: the split is absent. */
ls_status dataset_pack(const char *out, const char *train, const char *valid, const char *test);

#endif
