/* Pairs of documents as one HDF5 file, and batches of them sharded over ranks.
 *
 * File: attributes format = "longspan-pairs", version = 1 (int64), vocabulary = "bytes", vocabulary_size = 256 (int64),
 * source_names (text: a line "train: A.tsv" for each split, base names only), digest (uint64, see data_seal); and a
 * group for each split that is there (train, valid, test) with
 *   source, target                  uint16 tokens of all documents, one after the other
 *   source_offsets, target_offsets  int64 (documents + 1), from 0, strictly increasing (no empty document)
 *   names                           UTF-8 strings of one width, padded with NUL (documents)
 *   source_digests, target_digests  uint64, XXH3 of each block of DATA_BLOCK tokens (little-endian bytes)
 *   attribute offsets_digest        uint64, XXH3 of both offset arrays: of source, then of target
 *   attribute names_digest          uint64, XXH3 of the bytes of names
 * All arrays are contiguous: a rank reads exactly its part of a document, wherever that lies, and nothing besides.
 * Names have one width because variable-length strings live in HDF5's global heap, which carries no checksum. */
#ifndef LS_DATA_H
#define LS_DATA_H

#include "shard.h"
#include "status.h"

enum { DATA_BLOCK = 1 << 20, DATA_VERSION = 1, DATA_VOCABULARY = 256, DATA_NAME = 255 /* longest name, bytes */ };
/* Tokens that the file does not hold. */
enum { TOKEN_BOS = 256, TOKEN_EOS = 257, MODEL_VOCABULARY = 258, TOKEN_PAD = -1 };

typedef struct dataset dataset;

/* Collective over world: opens, checks format, version, shapes, offsets and names (whole), and that all ranks see the
 * same file; with verify also token range and digests (ranks share the blocks). Nothing is trained on a file that
 * fails. Errors: LS_ERR_IO (missing, unreadable), LS_ERR_FORMAT. */
ls_status dataset_open(ls_context *world, const char *path, int verify, dataset **data);
void dataset_close(dataset *data);
/* Documents of a split ("train", "valid", "test"); 0 where the split is absent. */
int64_t dataset_documents(const dataset *data, const char *split);
int64_t dataset_longest(const dataset *data, const char *split, int target); /* tokens, uncut */
int64_t dataset_tokens(const dataset *data, const char *split, int target);  /* of all documents, uncut */
/* Of document i. The name is valid until dataset_close. */
void dataset_lengths(const dataset *data, const char *split, int64_t i, int64_t *source, int64_t *target);
const char *dataset_name(const dataset *data, const char *split, int64_t i);
const char *dataset_source_names(const dataset *data); /* lines "train: A.tsv" */
uint64_t dataset_digest(const dataset *data);          /* of all digests: a checkpoint remembers it */

/* What is left of `length` tokens, or bytes, where `most` are wanted; 0: all are. */
static inline int64_t data_cut(int64_t length, int64_t most)
{
    return most > 0 && length > most ? most : length;
}

/* One batch as one rank sees it: its rows of every sequence of its group. Padded positions hold TOKEN_PAD. */
typedef struct batch {
    int64_t B;
    ls_shard source, target;      /* positions of the padded batch; target includes BOS / EOS */
    int32_t *source_token;        /* (B, source.n) */
    int32_t *input_token, *label; /* (B, target.n): BOS t0 t1 .. and t0 t1 .. EOS */
    uint8_t *source_pad, *target_pad;
    /* The padded batch has at least so many positions: the caller's to set, before it is read. */
    int64_t least_source, least_target;
    uint64_t sample;  /* global number of row 0, for random streams: the caller's to set, like draw: */
    uint64_t draw;    /* number of the optimizer step, the same on all ranks */
    int64_t tokens;   /* labels of the whole rows, all ranks of the group */
    int64_t capacity; /* private: elements that each array has room for */
} batch;
void batch_free(batch *b);
int64_t batch_labels(const batch *b); /* of this rank's rows */

/* Reads documents `index[0..B)` of a split, this rank's hyperslab only (plain reads, not collective); lengths cut to
 * max_source / max_target (0: uncut; BOS and EOS are not counted, and a cut target ends in EOS too). rank/size: this
 * rank's place among those that share the sequences, which are sharded evenly: all over the longest (cut) row, or as
 * many positions as the batch shall have at least. The batch is zeroed before its first use, and may be read into
 * again. */
ls_status dataset_read(dataset *data, const char *split, const int64_t *index, int64_t B, int64_t max_source,
                       int64_t max_target, int rank, int size, batch *b);

/* The order of training: document index[k] of split train for global sample number first + k. Epoch e is the
 * permutation of a Philox keyed by (seed, e). Batches are samples [n batch, (n + 1) batch); where an epoch does not
 * end with one, its last documents share a batch with the first of the next epoch, and both stay as the permutation
 * has them. The whole batches between are sorted by length (source + target) in windows of 16, so that batches pad
 * little, and then the batches of a window are shuffled. Depends on (seed, documents, lengths, batch) only: never on
 * ranks. Keeps the epoch it used last, so going forward costs nothing. */
ls_status dataset_order(const dataset *data, uint64_t seed, int64_t batch, int64_t first, int64_t count,
                        int64_t *index);

/* `longspan pack`: writes the file (to a temporary name, synced, renamed). Each split is a TSV file
 * (name \t source \t target with \t, \n, \r, \\ escapes; two columns: no name), or a pair of directories with matching
 * file names "SOURCE_DIR:TARGET_DIR". NULL: the split is absent. Documents are streamed: memory holds the names and
 * offsets only. Inputs are read twice, first to count. A data set of that name is replaced, any other file is not. */
ls_status dataset_pack(const char *out, const char *train, const char *valid, const char *test);

/* ------------------------------------------------------------------- between pack.c, which writes, and data.c */

enum { DATA_SPLITS = 3 };
extern const char *const data_split_name[DATA_SPLITS];
#define DATA_FORMAT "longspan-pairs"
#define DATA_VOCABULARY_NAME "bytes"

/* What the attribute digest is taken of. */
typedef struct data_seal {
    int64_t documents, tokens[2], blocks[2]; /* of source and target; documents 0: the split is absent */
    uint64_t offsets_digest, names_digest;
    const uint64_t *digests[2]; /* (blocks) */
} data_seal;
/* XXH3 of format NUL, version, vocabulary NUL, vocabulary_size, source_names NUL, and for each split that is there:
 * name NUL, documents, tokens of source and target, offsets_digest, names_digest, the digests of source and of target;
 * numbers as 8 little-endian bytes. */
ls_status data_seal_digest(const char *source_names, const data_seal split[DATA_SPLITS], uint64_t *digest);

#endif
