/* Reading pairs of documents. Whatever the file says is checked before it is used: see open_alone. */
#include "data.h"

#include "h5.h"
#include "order.h"
#include "real.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

const char *const data_split_name[DATA_SPLITS] = {"train", "valid", "test"};
static const char *const side_name[2] = {"source", "target"};

/* The sources or the targets of a split. */
typedef struct column {
    h5_array tokens;
    int64_t *offset; /* (documents + 1) */
    int64_t longest, blocks;
    uint64_t *digest; /* (blocks) */
} column;

typedef struct split {
    const char *name;
    int64_t documents;
    column side[2];
    char *names; /* (documents, stride), each ended by NUL */
    size_t stride;
} split;

struct dataset {
    h5_file file;
    split split[DATA_SPLITS];
    char *source_names;
    uint64_t digest;
    epoch_order *order;
};

/* ------------------------------------------------------------------------------------------------ checks */

static void hash_text(XXH3_state_t *h, const char *text)
{
    XXH3_64bits_update(h, text, strlen(text) + 1);
}

static void hash_number(XXH3_state_t *h, int64_t x)
{
    XXH3_64bits_update(h, &x, sizeof x);
}

ls_status data_seal_digest(const char *source_names, const data_seal seal[DATA_SPLITS], uint64_t *digest)
{
    XXH3_state_t *h = XXH3_createState();
    if (h == NULL) LS_FAIL(LS_ERR_MEMORY, "data: no memory for a digest");
    XXH3_64bits_reset(h);
    hash_text(h, DATA_FORMAT);
    hash_number(h, DATA_VERSION);
    hash_text(h, DATA_VOCABULARY_NAME);
    hash_number(h, DATA_VOCABULARY);
    hash_text(h, source_names);
    for (int i = 0; i < DATA_SPLITS; i++) {
        const data_seal *s = &seal[i];
        if (s->documents == 0) continue;
        hash_text(h, data_split_name[i]);
        hash_number(h, s->documents);
        for (int k = 0; k < 2; k++) hash_number(h, s->tokens[k]);
        XXH3_64bits_update(h, &s->offsets_digest, sizeof s->offsets_digest);
        XXH3_64bits_update(h, &s->names_digest, sizeof s->names_digest);
        for (int k = 0; k < 2; k++) XXH3_64bits_update(h, s->digests[k], (size_t)s->blocks[k] * sizeof(uint64_t));
    }
    *digest = XXH3_64bits_digest(h);
    XXH3_freeState(h);
    return LS_OK;
}

/* Kind and version first: what follows means nothing in another file. */
static ls_status check_kind(dataset *d)
{
    const char *path = d->file.path;
    char *text;
    int64_t number;
    if (h5_get_text(&d->file, "/", "format", &text) != LS_OK)
        LS_FAIL(LS_ERR_FORMAT, "%s: is not a data set of Longspan (make one with longspan pack): %.300s", path,
                ls_last_error());
    const int ours = strcmp(text, DATA_FORMAT) == 0, checkpoint = strcmp(text, "longspan-checkpoint") == 0;
    char seen[48];
    snprintf(seen, sizeof seen, "%s", text);
    free(text);
    if (!ours)
        LS_FAIL(LS_ERR_FORMAT, "%s: the format is \"%s\", not \"%s\": %s", path, seen, DATA_FORMAT,
                checkpoint ? "this is a checkpoint" : "make the data set with longspan pack");
    LS_TRY(h5_get(&d->file, "/", "version", H5T_STD_I64LE, &number));
    if (number != DATA_VERSION)
        LS_FAIL(LS_ERR_FORMAT, "%s: format version %lld, this program reads %d", path, (long long)number,
                (int)DATA_VERSION);
    LS_TRY(h5_get_text(&d->file, "/", "vocabulary", &text));
    const int bytes = strcmp(text, DATA_VOCABULARY_NAME) == 0;
    free(text);
    LS_TRY(h5_get(&d->file, "/", "vocabulary_size", H5T_STD_I64LE, &number));
    if (!bytes || number != DATA_VOCABULARY)
        LS_FAIL(LS_ERR_FORMAT, "%s: the vocabulary is not \"%s\" of %d tokens", path, DATA_VOCABULARY_NAME,
                (int)DATA_VOCABULARY);
    return h5_get_text(&d->file, "/", "source_names", &d->source_names);
}

/* Reads a whole one-dimensional array; the file is at least as large, so the memory is no more than the file. */
static ls_status read_all(const h5_array *a, size_t extra, void **x)
{
    *x = malloc((size_t)a->count * a->size + extra);
    if (*x == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for %lld elements", a->where, (long long)a->count);
    return h5_array_read(a, 0, a->count, *x);
}

static ls_status load_array(const dataset *d, const char *name, hid_t type, int64_t count, void **x)
{
    h5_array a;
    LS_TRY(h5_array_open(&d->file, name, type, 1, &a));
    ls_status status = LS_OK;
    if (a.count != count)
        status =
            ls_fail(LS_ERR_FORMAT, "%s has %lld elements, not %lld", a.where, (long long)a.count, (long long)count);
    else
        status = read_all(&a, 0, x);
    h5_array_close(&a);
    return status;
}

static ls_status check_offsets(const split *s, column *c, const char *where)
{
    const int64_t *o = c->offset;
    if (o[0] != 0) LS_FAIL(LS_ERR_FORMAT, "%s begin with %lld, not 0", where, (long long)o[0]);
    for (int64_t i = 0; i < s->documents; i++) {
        if (o[i + 1] == o[i]) LS_FAIL(LS_ERR_FORMAT, "%s: document %lld is empty", where, (long long)i);
        if (o[i + 1] < o[i] || o[i + 1] > c->tokens.count)
            LS_FAIL(LS_ERR_FORMAT, "%s: document %lld would end at %lld, where %lld to %lld is possible", where,
                    (long long)i, (long long)o[i + 1], (long long)o[i] + 1, (long long)c->tokens.count);
        c->longest = ls_max(c->longest, o[i + 1] - o[i]);
    }
    if (o[s->documents] != c->tokens.count)
        LS_FAIL(LS_ERR_FORMAT, "%s end with %lld, but there are %lld tokens", where, (long long)o[s->documents],
                (long long)c->tokens.count);
    return LS_OK;
}

static ls_status load_offsets(const dataset *d, split *s, int side)
{
    char name[H5_NAME];
    h5_array a;
    column *c = &s->side[side];
    snprintf(name, sizeof name, "%s/%s_offsets", s->name, side_name[side]);
    LS_TRY(h5_array_open(&d->file, name, H5T_STD_I64LE, 1, &a));
    ls_status status = LS_OK;
    if (side == 0) s->documents = a.count - 1;
    if (s->documents < 1)
        status = ls_fail(LS_ERR_FORMAT, "%s hold no document", a.where);
    else if (a.count != s->documents + 1)
        status = ls_fail(LS_ERR_FORMAT, "%s are of %lld documents, those of the sources of %lld", a.where,
                         (long long)a.count - 1, (long long)s->documents);
    if (status == LS_OK) status = read_all(&a, 0, (void **)&c->offset);
    if (status == LS_OK) status = check_offsets(s, c, a.where);
    h5_array_close(&a);
    return status;
}

static ls_status load_column(const dataset *d, split *s, int side)
{
    char name[H5_NAME];
    column *c = &s->side[side];
    snprintf(name, sizeof name, "%s/%s", s->name, side_name[side]);
    LS_TRY(h5_array_open(&d->file, name, H5T_STD_U16LE, 1, &c->tokens));
    LS_TRY(load_offsets(d, s, side));
    c->blocks = (c->tokens.count - 1) / DATA_BLOCK + 1;
    snprintf(name, sizeof name, "%s/%s_digests", s->name, side_name[side]);
    return load_array(d, name, H5T_STD_U64LE, c->blocks, (void **)&c->digest);
}

static ls_status load_names(const dataset *d, split *s, uint64_t *digest)
{
    char name[H5_NAME];
    h5_array a;
    snprintf(name, sizeof name, "%s/names", s->name);
    LS_TRY(h5_array_open(&d->file, name, H5_TEXT, 1, &a));
    ls_status status = LS_OK;
    if (a.count != s->documents || a.size > DATA_NAME)
        status = ls_fail(LS_ERR_FORMAT, "%s are %lld of up to %zu bytes, not %lld of up to %d", a.where,
                         (long long)a.count, a.size, (long long)s->documents, (int)DATA_NAME);
    if (status == LS_OK) status = read_all(&a, (size_t)a.count, (void **)&s->names);
    h5_array_close(&a);
    if (status != LS_OK) return status;
    *digest = XXH3_64bits(s->names, (size_t)a.count * a.size);
    /* make room for the closing NULs, from the last name to the first */
    s->stride = a.size + 1;
    for (size_t i = (size_t)s->documents; i-- > 0;) {
        memmove(s->names + i * s->stride, s->names + i * a.size, a.size);
        s->names[i * s->stride + a.size] = 0;
    }
    return LS_OK;
}

static ls_status load_split(const dataset *d, split *s, data_seal *seal)
{
    uint64_t offsets_stored, names_stored;
    LS_TRY(load_column(d, s, 0));
    LS_TRY(load_column(d, s, 1));
    LS_TRY(load_names(d, s, &seal->names_digest));
    LS_TRY(h5_get(&d->file, s->name, "offsets_digest", H5T_STD_U64LE, &offsets_stored));
    LS_TRY(h5_get(&d->file, s->name, "names_digest", H5T_STD_U64LE, &names_stored));
    XXH3_state_t *h = XXH3_createState();
    if (h == NULL) LS_FAIL(LS_ERR_MEMORY, "data: no memory for a digest");
    XXH3_64bits_reset(h);
    for (int k = 0; k < 2; k++) XXH3_64bits_update(h, s->side[k].offset, (size_t)(s->documents + 1) * sizeof(int64_t));
    seal->offsets_digest = XXH3_64bits_digest(h);
    XXH3_freeState(h);
    if (seal->offsets_digest != offsets_stored || seal->names_digest != names_stored)
        LS_FAIL(LS_ERR_FORMAT, "%s: %s: the %s do not match their digest: the file is damaged, pack it again",
                d->file.path, s->name, seal->names_digest != names_stored ? "names" : "offsets");
    seal->documents = s->documents;
    for (int k = 0; k < 2; k++) {
        seal->tokens[k] = s->side[k].tokens.count;
        seal->blocks[k] = s->side[k].blocks;
        seal->digests[k] = s->side[k].digest;
    }
    return LS_OK;
}

static ls_status load_structure(dataset *d)
{
    data_seal seal[DATA_SPLITS] = {{0}};
    uint64_t computed;
    LS_TRY(check_kind(d));
    int splits = 0;
    for (int i = 0; i < DATA_SPLITS; i++) {
        d->split[i].name = data_split_name[i];
        if (!h5_has(&d->file, data_split_name[i])) continue;
        LS_TRY(load_split(d, &d->split[i], &seal[i]));
        splits++;
    }
    if (splits == 0) LS_FAIL(LS_ERR_FORMAT, "%s: has none of the splits train, valid, test", d->file.path);
    LS_TRY(h5_get(&d->file, "/", "digest", H5T_STD_U64LE, &d->digest));
    LS_TRY(data_seal_digest(d->source_names, seal, &computed));
    if (computed != d->digest)
        LS_FAIL(LS_ERR_FORMAT,
                "%s: attributes, splits and digests do not match the attribute digest: "
                "the file is damaged, pack it again",
                d->file.path);
    return LS_OK;
}

/* The document that a token belongs to. */
static int64_t document_of(const split *s, int side, int64_t token)
{
    int64_t lo = 0, hi = s->documents; /* offset[lo] <= token < offset[hi] */
    while (hi - lo > 1) {
        const int64_t middle = lo + (hi - lo) / 2;
        if (s->side[side].offset[middle] <= token)
            lo = middle;
        else
            hi = middle;
    }
    return lo;
}

static ls_status fail_token(const split *s, int side, int64_t at, unsigned token)
{
    LS_FAIL(LS_ERR_FORMAT, "%s: token %u in document %lld (%.100s) is not below the vocabulary's %d",
            s->side[side].tokens.where, token, (long long)document_of(s, side, at),
            s->names + (size_t)document_of(s, side, at) * s->stride, (int)DATA_VOCABULARY);
}

static ls_status verify_block(const split *s, int side, int64_t block, uint16_t *token)
{
    const column *c = &s->side[side];
    const int64_t lo = block * DATA_BLOCK, n = ls_min(DATA_BLOCK, c->tokens.count - lo);
    LS_TRY(h5_array_read(&c->tokens, lo, n, token));
    if (XXH3_64bits(token, (size_t)n * sizeof *token) != c->digest[block])
        LS_FAIL(LS_ERR_FORMAT,
                "%s: tokens %lld to %lld (from document %lld) do not match their digest: the file is damaged, pack it "
                "again",
                c->tokens.where, (long long)lo, (long long)(lo + n - 1), (long long)document_of(s, side, lo));
    for (int64_t i = 0; i < n; i++)
        if (token[i] >= DATA_VOCABULARY) return fail_token(s, side, lo + i, token[i]);
    return LS_OK;
}

/* Blocks of all splits are numbered through; each rank takes every size-th. */
static ls_status verify_share(const dataset *d, int rank, int size)
{
    uint16_t *token = malloc(DATA_BLOCK * sizeof *token);
    if (token == NULL) LS_FAIL(LS_ERR_MEMORY, "data: no memory for a block of %d tokens", (int)DATA_BLOCK);
    ls_status status = LS_OK;
    int64_t number = 0;
    for (int i = 0; i < DATA_SPLITS; i++)
        for (int k = 0; k < 2; k++)
            for (int64_t b = 0; b < d->split[i].side[k].blocks; b++)
                if (number++ % size == rank) LS_TRY_GOTO(verify_block(&d->split[i], k, b, token));
done:
    free(token);
    return status;
}

/* ------------------------------------------------------------------------------------------------ open */

static ls_status open_alone(dataset *d, const char *path, int verify, int rank, int size)
{
    d->order = calloc(1, sizeof *d->order);
    if (d->order == NULL) LS_FAIL(LS_ERR_MEMORY, "data: no memory to open %s", path);
    LS_TRY(h5_open(path, &d->file));
    LS_TRY(load_structure(d));
    return verify ? verify_share(d, rank, size) : LS_OK;
}

/* Collective. On clusters the same path can be another file on another node. The digest is summed byte by byte, which
 * is exact in float; if every rank finds its own byte to be the mean, all have the same. */
static ls_status same_everywhere(ls_context *world, const dataset *d)
{
    enum { BYTES = 8 };
    ls_real sum[BYTES];
    ls_status status = LS_OK;
    for (int i = 0; i < BYTES; i++) sum[i] = (ls_real)(d->digest >> 8 * i & 255);
    LS_TRY(ls_all_reduce_sum(world, sum, BYTES));
    for (int i = 0; i < BYTES; i++)
        if ((int64_t)sum[i] != (int64_t)(d->digest >> 8 * i & 255) * ls_context_size(world))
            status =
                ls_fail(LS_ERR_FORMAT, "%s: is not the same file on every rank: copy one to all nodes", d->file.path);
    return ls_agree(world, status);
}

ls_status dataset_open(ls_context *world, const char *path, int verify, dataset **data)
{
    *data = NULL;
    dataset *d = calloc(1, sizeof *d);
    ls_status status = LS_OK;
    if (d == NULL)
        status = ls_fail(LS_ERR_MEMORY, "data: no memory to open %s", path);
    else
        status = open_alone(d, path, verify, ls_context_rank(world), ls_context_size(world));
    LS_TRY_GOTO(ls_agree(world, status));
    LS_TRY_GOTO(same_everywhere(world, d));
    *data = d;
    return LS_OK;
done:
    dataset_close(d);
    return status;
}

void dataset_close(dataset *d)
{
    if (d == NULL) return;
    for (int i = 0; i < DATA_SPLITS; i++) {
        for (int k = 0; k < 2; k++) {
            h5_array_close(&d->split[i].side[k].tokens);
            free(d->split[i].side[k].offset);
            free(d->split[i].side[k].digest);
        }
        free(d->split[i].names);
    }
    h5_close(&d->file);
    if (d->order != NULL) free(d->order->index);
    free(d->order);
    free(d->source_names);
    free(d);
}

/* ------------------------------------------------------------------------------------------------ questions */

static const split *find_split(const dataset *d, const char *name)
{
    for (int i = 0; i < DATA_SPLITS; i++)
        if (strcmp(data_split_name[i], name) == 0) return &d->split[i];
    return NULL;
}

int64_t dataset_documents(const dataset *d, const char *name)
{
    const split *s = find_split(d, name);
    return s == NULL ? 0 : s->documents;
}

int64_t dataset_longest(const dataset *d, const char *name, int target)
{
    const split *s = find_split(d, name);
    return s == NULL ? 0 : s->side[target != 0].longest;
}

int64_t dataset_tokens(const dataset *d, const char *name, int target)
{
    const split *s = find_split(d, name);
    return s == NULL || s->documents == 0 ? 0 : s->side[target != 0].tokens.count;
}

static int64_t length_of(const split *s, int side, int64_t i)
{
    return s->side[side].offset[i + 1] - s->side[side].offset[i];
}

void dataset_lengths(const dataset *d, const char *name, int64_t i, int64_t *source, int64_t *target)
{
    const split *s = find_split(d, name);
    const int there = s != NULL && i >= 0 && i < s->documents;
    *source = there ? length_of(s, 0, i) : 0;
    *target = there ? length_of(s, 1, i) : 0;
}

const char *dataset_name(const dataset *d, const char *name, int64_t i)
{
    const split *s = find_split(d, name);
    return s != NULL && i >= 0 && i < s->documents ? s->names + (size_t)i * s->stride : "";
}

const char *dataset_source_names(const dataset *d)
{
    return d->source_names;
}

uint64_t dataset_digest(const dataset *d)
{
    return d->digest;
}

/* ------------------------------------------------------------------------------------------------ batches */

void batch_free(batch *b)
{
    free(b->source_token);
    free(b->input_token);
    free(b->label);
    free(b->source_pad);
    free(b->target_pad);
    ls_shard_free(&b->source);
    ls_shard_free(&b->target);
    *b = (batch){0};
}

int64_t batch_labels(const batch *b)
{
    int64_t labels = 0;
    for (int64_t i = 0; i < b->B * b->target.n; i++) labels += b->label[i] >= 0;
    return labels;
}

/* Room for n elements in each array, and for one where there are none, so that no pointer is NULL. */
static ls_status make_room(batch *b, int64_t n)
{
    if (n <= b->capacity && b->label != NULL) return LS_OK;
    const batch set = *b; /* by the caller */
    batch_free(b);
    const size_t room = (size_t)ls_max(n, 1);
    *b = (batch){.source_token = malloc(room * sizeof(int32_t)),
                 .input_token = malloc(room * sizeof(int32_t)),
                 .label = malloc(room * sizeof(int32_t)),
                 .source_pad = malloc(room),
                 .target_pad = malloc(room),
                 .least_source = set.least_source,
                 .least_target = set.least_target,
                 .sample = set.sample,
                 .draw = set.draw,
                 .capacity = (int64_t)room};
    if (b->source_token == NULL || b->input_token == NULL || b->label == NULL || b->source_pad == NULL ||
        b->target_pad == NULL) {
        batch_free(b);
        LS_FAIL(LS_ERR_MEMORY, "data: no memory for a batch of %lld tokens on this rank", (long long)n);
    }
    return LS_OK;
}

/* Tokens [lo, hi) of document i as integers. The 16-bit tokens are read into the upper half of their place. */
static ls_status read_tokens(const split *s, int side, int64_t i, int64_t lo, int64_t hi, int32_t *x)
{
    const int64_t n = hi - lo, from = s->side[side].offset[i] + lo;
    if (n <= 0) return LS_OK;
    char *packed = (char *)x + n * (int64_t)sizeof(uint16_t);
    LS_TRY(h5_array_read(&s->side[side].tokens, from, n, packed));
    for (int64_t k = 0; k < n; k++) {
        uint16_t token;
        memcpy(&token, packed + k * (int64_t)sizeof token, sizeof token);
        /* also of a file whose digests nobody wanted to check: the model looks embeddings up by it */
        if (token >= DATA_VOCABULARY) return fail_token(s, side, from + k, token);
        x[k] = token;
    }
    return LS_OK;
}

static ls_status read_source(const split *s, batch *b, int64_t row, int64_t i, int64_t length)
{
    const int64_t lo = b->source.lo, n = b->source.n, in = ls_max(0, ls_min(length, lo + n) - lo);
    int32_t *token = b->source_token + row * n;
    uint8_t *pad = b->source_pad + row * n;
    LS_TRY(read_tokens(s, 0, i, lo, lo + in, token));
    for (int64_t k = in; k < n; k++) token[k] = TOKEN_PAD;
    for (int64_t k = 0; k < n; k++) pad[k] = k >= in;
    return LS_OK;
}

/* Labels are t0 .. EOS, inputs the same one later: the first comes from the rank before, or is BOS. */
static ls_status read_target(const split *s, batch *b, int64_t row, int64_t i, int64_t length)
{
    const int64_t lo = b->target.lo, n = b->target.n, in = ls_max(0, ls_min(length + 1, lo + n) - lo);
    int32_t *label = b->label + row * n, *input = b->input_token + row * n;
    uint8_t *pad = b->target_pad + row * n;
    if (n == 0) return LS_OK;
    LS_TRY(read_tokens(s, 1, i, lo, ls_min(length, lo + in), label));
    if (in > 0 && lo + in == length + 1) label[in - 1] = TOKEN_EOS;
    for (int64_t k = in; k < n; k++) label[k] = TOKEN_PAD;
    if (in > 0) {
        input[0] = TOKEN_BOS;
        if (lo > 0) LS_TRY(read_tokens(s, 1, i, lo - 1, lo, input));
        memcpy(input + 1, label, (size_t)(in - 1) * sizeof *input);
    }
    for (int64_t k = in; k < n; k++) input[k] = TOKEN_PAD;
    for (int64_t k = 0; k < n; k++) pad[k] = k >= in;
    return LS_OK;
}

ls_status dataset_read(dataset *d, const char *name, const int64_t *index, int64_t B, int64_t max_source,
                       int64_t max_target, int rank, int size, batch *b)
{
    const split *s = find_split(d, name);
    if (s == NULL || s->documents == 0) LS_FAIL(LS_ERR_ARGUMENT, "%s: has no split %s", d->file.path, name);
    if (B < 1 || max_source < 0 || max_target < 0 || size < 1 || rank < 0 || rank >= size)
        LS_FAIL(LS_ERR_ARGUMENT, "data: a batch of %lld rows cut to %lld and %lld on rank %d of %d is impossible",
                (long long)B, (long long)max_source, (long long)max_target, rank, size);
    int64_t S = b->least_source, T = b->least_target, tokens = 0;
    for (int64_t r = 0; r < B; r++) {
        if (index[r] < 0 || index[r] >= s->documents)
            LS_FAIL(LS_ERR_ARGUMENT, "%s: %s has no document %lld (there are %lld)", d->file.path, name,
                    (long long)index[r], (long long)s->documents);
        const int64_t labels = data_cut(length_of(s, 1, index[r]), max_target) + 1;
        S = ls_max(S, data_cut(length_of(s, 0, index[r]), max_source));
        T = ls_max(T, labels);
        tokens += labels;
    }
    ls_shard source, target = {0};
    LS_TRY(ls_shard_even_of(S, rank, size, &source));
    ls_status status = ls_shard_even_of(T, rank, size, &target);
    if (status == LS_OK) status = make_room(b, B * ls_max(source.n, target.n));
    if (status != LS_OK) {
        ls_shard_free(&source);
        ls_shard_free(&target);
        return status;
    }
    ls_shard_free(&b->source);
    ls_shard_free(&b->target);
    b->B = B;
    b->source = source;
    b->target = target;
    b->tokens = tokens;
    for (int64_t r = 0; r < B; r++) {
        const int64_t i = index[r];
        LS_TRY(read_source(s, b, r, i, data_cut(length_of(s, 0, i), max_source)));
        LS_TRY(read_target(s, b, r, i, data_cut(length_of(s, 1, i), max_target)));
    }
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ order */

ls_status dataset_order(const dataset *d, uint64_t seed, int64_t batch_size, int64_t first, int64_t count,
                        int64_t *index)
{
    const split *s = &d->split[0];
    if (s->documents == 0) LS_FAIL(LS_ERR_ARGUMENT, "%s: has no split train to train on", d->file.path);
    if (batch_size < 1 || first < 0 || count < 0 || batch_size > INT64_MAX / 2 / ORDER_WINDOW ||
        first > INT64_MAX / 2 - count)
        LS_FAIL(LS_ERR_ARGUMENT, "data: samples %lld to %lld in batches of %lld are impossible", (long long)first,
                (long long)first + count - 1, (long long)batch_size);
    const order_lengths lengths = {s->documents, s->side[0].offset, s->side[1].offset};
    for (int64_t k = 0; k < count; k++) {
        const int64_t sample = first + k;
        LS_TRY(order_epoch(&lengths, seed, batch_size, sample / s->documents, d->order));
        index[k] = d->order->index[sample % s->documents];
    }
    return LS_OK;
}
