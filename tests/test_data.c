/* Data sets on this many ranks: what is refused when opening, batches against their definition, the order of training.
 * The files are written here by hand, from the description in data.h alone: so they can be wrong in every way. */
#include "data.h"

#include "files.h"

#include <mpi.h>
#include <xxhash.h>

static ls_context *world;
static int rank, size;

static int start(void **state)
{
    const ls_context_options options = {.comm = MPI_COMM_WORLD, .device = LS_CPU};
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    int failed = rank == 0 ? make_folder(state) : 0;
    MPI_Bcast(folder, sizeof folder, MPI_CHAR, 0, MPI_COMM_WORLD);
    return failed || ls_context_create(&options, &world) != LS_OK;
}

static int stop(void **state)
{
    ls_context_free(world);
    MPI_Barrier(MPI_COMM_WORLD);
    return rank == 0 ? remove_folder(state) : 0;
}

/* ------------------------------------------------------------------------------------------------ files by hand */

enum { DOCUMENTS = 23 };

/* Between 1 and 40, not the same for source and target. */
static int64_t length_of(int side, int64_t i)
{
    return 1 + draw_below((uint64_t)(2 * i + side), 40);
}

static int32_t token_of(int side, int64_t i, int64_t k)
{
    return (int32_t)((i * 31 + side * 7 + k * k) % 256);
}

typedef enum spoil {
    NOTHING,
    FORMAT,
    NO_FORMAT,
    VERSION,
    VOCABULARY,
    NO_SPLIT,
    TOKEN_RANGE,
    TOKEN_TYPE,
    TOKEN_CHUNKS,
    TOKEN_DIGEST,
    NO_TARGET,
    OFFSETS_BEGIN,
    OFFSETS_DOWN,
    OFFSETS_EMPTY,
    OFFSETS_END,
    OFFSETS_BEYOND,
    OFFSETS_COUNT,
    OFFSETS_HUGE,
    OFFSETS_ONE,
    OFFSETS_DIGEST,
    DIGESTS_COUNT,
    NAMES_COUNT,
    NAMES_VARIABLE,
    NAMES_DIGEST,
    DIGEST,
    SPOILS
} spoil;

typedef struct sealing {
    unsigned char bytes[65536];
    size_t n;
} sealing;

static void seal(sealing *s, const void *x, size_t n)
{
    assert_true(s->n + n <= sizeof s->bytes);
    memcpy(s->bytes + s->n, x, n);
    s->n += n;
}

static void put_array(hid_t f, const char *name, hid_t type, int64_t n, const void *x, int chunked)
{
    const hsize_t extent = (hsize_t)n;
    const hid_t space = H5Screate_simple(1, &extent, NULL), p = H5Pcreate(H5P_DATASET_CREATE);
    if (chunked) H5Pset_chunk(p, 1, &extent);
    const hid_t d = H5Dcreate2(f, name, type, space, H5P_DEFAULT, p, H5P_DEFAULT);
    assert_true(d >= 0);
    if (x != NULL) assert_true(H5Dwrite(d, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, x) >= 0);
    H5Dclose(d);
    H5Pclose(p);
    H5Sclose(space);
}

static void put_attribute(hid_t object, const char *name, hid_t type, const void *x)
{
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t a = H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    assert_true(a >= 0 && H5Awrite(a, type, x) >= 0);
    H5Aclose(a);
    H5Sclose(space);
}

static hid_t text_type(size_t width)
{
    const hid_t type = H5Tcopy(H5T_C_S1);
    H5Tset_size(type, width);
    return type;
}

static void put_text(hid_t object, const char *name, const char *text)
{
    const hid_t type = text_type(strlen(text));
    put_attribute(object, name, type, text);
    H5Tclose(type);
}

static void write_side(hid_t group, int side, spoil what, const int64_t *offset, sealing *digests)
{
    static const char *const names[2][3] = {{"source", "source_offsets", "source_digests"},
                                            {"target", "target_offsets", "target_digests"}};
    const int64_t n = offset[DOCUMENTS];
    uint16_t *token = malloc((size_t)n * sizeof *token);
    assert_non_null(token);
    for (int64_t i = 0; i < DOCUMENTS; i++)
        for (int64_t k = 0; k < length_of(side, i); k++) token[offset[i] + k] = (uint16_t)token_of(side, i, k);
    if (what == TOKEN_RANGE && side == 1) token[offset[7] + 1] = 300;
    const uint64_t digest[2] = {XXH3_64bits(token, (size_t)n * sizeof *token)};
    seal(digests, digest, sizeof *digest);
    if (what == TOKEN_DIGEST && side == 1) token[n - 1] ^= 1;
    const hid_t wide = what == TOKEN_TYPE ? H5T_STD_I16LE : H5T_STD_U16LE;
    if (what != NO_TARGET || side == 0) put_array(group, names[side][0], wide, n, token, what == TOKEN_CHUNKS);
    put_array(group, names[side][2], H5T_STD_U64LE, 1 + (what == DIGESTS_COUNT), digest, 0);
    free(token);

    int64_t spoiled[DOCUMENTS + 2];
    memcpy(spoiled, offset, (DOCUMENTS + 1) * sizeof *spoiled);
    spoiled[DOCUMENTS + 1] = n + 1;
    if (side == 1 && what == OFFSETS_BEGIN) spoiled[0] = 1;
    if (side == 1 && what == OFFSETS_DOWN) spoiled[5] = spoiled[3];
    if (side == 1 && what == OFFSETS_EMPTY) spoiled[5] = spoiled[4];
    if (side == 1 && what == OFFSETS_END) spoiled[DOCUMENTS] -= 1;
    if (side == 1 && what == OFFSETS_BEYOND) spoiled[9] = INT64_MAX;
    const int64_t huge = (int64_t)1 << 60, count = DOCUMENTS + 1 + (side == 1 && what == OFFSETS_COUNT);
    if (what == OFFSETS_HUGE)
        put_array(group, names[side][1], H5T_STD_I64LE, huge, NULL, 0);
    else
        put_array(group, names[side][1], H5T_STD_I64LE, what == OFFSETS_ONE ? 1 : count, spoiled, 0);
}

static void write_names(hid_t group, spoil what, uint64_t *digest)
{
    enum { WIDTH = 20 };
    char names[DOCUMENTS + 1][WIDTH] = {{0}};
    const char *pointers[DOCUMENTS];
    for (int i = 0; i < DOCUMENTS; i++) snprintf(names[i], WIDTH, "name %d", i);
    for (int i = 0; i < DOCUMENTS; i++) pointers[i] = names[i];
    const hid_t type = text_type(what == NAMES_VARIABLE ? H5T_VARIABLE : WIDTH);
    const void *x = what == NAMES_VARIABLE ? (const void *)pointers : (const void *)names;
    put_array(group, "names", type, DOCUMENTS + (what == NAMES_COUNT), x, 0);
    H5Tclose(type);
    *digest = XXH3_64bits(names, DOCUMENTS * WIDTH) + (what == NAMES_DIGEST);
    put_attribute(group, "names_digest", H5T_STD_U64LE, digest);
}

static void write_split(hid_t f, const char *name, spoil what, sealing *all)
{
    int64_t offset[2][DOCUMENTS + 1] = {{0}};
    const int64_t documents = DOCUMENTS;
    sealing digests = {.n = 0};
    uint64_t names_digest;
    for (int side = 0; side < 2; side++)
        for (int64_t i = 0; i < DOCUMENTS; i++) offset[side][i + 1] = offset[side][i] + length_of(side, i);
    const hid_t group = H5Gcreate2(f, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    for (int side = 0; side < 2; side++) write_side(group, side, what, offset[side], &digests);
    write_names(group, what, &names_digest);
    const uint64_t offsets_digest = XXH3_64bits(offset, sizeof offset) + (what == OFFSETS_DIGEST);
    put_attribute(group, "offsets_digest", H5T_STD_U64LE, &offsets_digest);
    H5Gclose(group);
    seal(all, name, strlen(name) + 1);
    seal(all, &documents, 8);
    seal(all, &offset[0][DOCUMENTS], 8);
    seal(all, &offset[1][DOCUMENTS], 8);
    seal(all, &offsets_digest, 8);
    seal(all, &names_digest, 8);
    seal(all, digests.bytes, digests.n);
}

static void write_file(const char *path, spoil what, const char *source_names)
{
    const hid_t f = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    assert_true(f >= 0);
    const int64_t version = what == VERSION ? 7 : 1, vocabulary = what == VOCABULARY ? 512 : 256, one = 1, bytes = 256;
    sealing all = {.n = 0};
    seal(&all, "longspan-pairs", 15);
    seal(&all, &one, 8);
    seal(&all, "bytes", 6);
    seal(&all, &bytes, 8);
    seal(&all, source_names, strlen(source_names) + 1);
    if (what != NO_FORMAT) put_text(f, "format", what == FORMAT ? "longspan-pears" : "longspan-pairs");
    put_attribute(f, "version", H5T_STD_I64LE, &version);
    put_text(f, "vocabulary", "bytes");
    put_attribute(f, "vocabulary_size", H5T_STD_I64LE, &vocabulary);
    put_text(f, "source_names", source_names);
    write_split(f, what == NO_SPLIT ? "elsewhere" : "train", what, &all);
    const uint64_t digest = XXH3_64bits(all.bytes, all.n) + (what == DIGEST);
    put_attribute(f, "digest", H5T_STD_U64LE, &digest);
    H5Fclose(f);
}

/* By rank 0; everyone goes on when it is there. */
static const char *made(const char *name, spoil what)
{
    const char *path = in_folder(name);
    if (rank == 0) write_file(path, what, "train: hand");
    MPI_Barrier(MPI_COMM_WORLD);
    return path;
}

static dataset *opened(const char *path, int verify)
{
    dataset *d;
    expect_ok(dataset_open(world, path, verify, &d), path);
    return d;
}

/* ------------------------------------------------------------------------------------------------ open */

/* Collective: every rank must say the same. */
static void expect_refused(const char *path, ls_status wanted, const char *words)
{
    dataset *d = (dataset *)&d;
    const ls_status status = dataset_open(world, path, 1, &d);
    if (status == LS_OK)
        dataset_close(d);
    else
        assert_null(d);
    uint64_t mine = status == LS_OK ? 0 : XXH3_64bits(ls_last_error(), strlen(ls_last_error())), first = mine;
    if (size > 1) {
        MPI_Bcast(&first, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
        assert_true(first == mine);
    }
    expect_refusal(status, wanted, words, path);
}

static void what_is_right_opens(void **state)
{
    (void)state;
    dataset *d = opened(made("right.h5", NOTHING), 1);
    assert_int_equal(dataset_documents(d, "train"), DOCUMENTS);
    assert_int_equal(dataset_documents(d, "valid"), 0);
    assert_string_equal(dataset_name(d, "train", 0), "name 0");
    assert_string_equal(dataset_name(d, "train", DOCUMENTS - 1), "name 22");
    assert_string_equal(dataset_name(d, "train", DOCUMENTS), "");
    assert_string_equal(dataset_name(d, "test", 0), "");
    assert_string_equal(dataset_source_names(d), "train: hand");
    assert_true(dataset_digest(d) != 0);
    int64_t longest[2] = {0};
    for (int64_t i = 0; i < DOCUMENTS; i++) {
        int64_t lengths[2];
        dataset_lengths(d, "train", i, &lengths[0], &lengths[1]);
        for (int side = 0; side < 2; side++) {
            assert_int_equal(lengths[side], length_of(side, i));
            if (lengths[side] > longest[side]) longest[side] = lengths[side];
        }
    }
    assert_int_equal(dataset_longest(d, "train", 0), longest[0]);
    assert_int_equal(dataset_longest(d, "train", 1), longest[1]);
    assert_int_equal(dataset_longest(d, "valid", 1), 0);
    dataset_close(d);
    dataset_close(NULL);
}

static void what_is_wrong_is_refused(void **state)
{
    (void)state;
    static const char *const words[SPOILS] = {
        [FORMAT] = "the format is \"longspan-pears\", not \"longspan-pairs\"",
        [NO_FORMAT] = "is not a data set of Longspan",
        [VERSION] = "format version 7, this program reads 1",
        [VOCABULARY] = "the vocabulary is not \"bytes\" of 256 tokens",
        [NO_SPLIT] = "has none of the splits train, valid, test",
        [TOKEN_RANGE] = "train/target: token 300 in document 7 (name 7) is not below",
        [TOKEN_TYPE] = "train/source has another type",
        [TOKEN_CHUNKS] = "train/source is not stored in one piece",
        [TOKEN_DIGEST] = "(from document 0) do not match their digest",
        [NO_TARGET] = "train/target is missing",
        [OFFSETS_BEGIN] = "train/target_offsets begin with 1, not 0",
        [OFFSETS_DOWN] = "train/target_offsets: document 4 would end at",
        [OFFSETS_EMPTY] = "train/target_offsets: document 4 is empty",
        [OFFSETS_END] = "train/target_offsets end with",
        [OFFSETS_BEYOND] = "train/target_offsets: document 8 would end at 9223372036854775807",
        [OFFSETS_COUNT] = "train/target_offsets are of 24 documents, those of the sources of 23",
        [OFFSETS_HUGE] = "train/source_offsets claims to be larger than its file",
        [OFFSETS_ONE] = "train/source_offsets hold no document",
        [OFFSETS_DIGEST] = "train: the offsets do not match their digest",
        [DIGESTS_COUNT] = "train/source_digests has 2 elements, not 1",
        [NAMES_COUNT] = "train/names are 24 of up to 20 bytes, not 23",
        [NAMES_VARIABLE] = "train/names has another type",
        [NAMES_DIGEST] = "train: the names do not match their digest",
        [DIGEST] = "do not match the attribute digest",
    };
    for (int what = 1; what < SPOILS; what++) expect_refused(made("wrong.h5", (spoil)what), LS_ERR_FORMAT, words[what]);
}

static void what_is_no_data_set_is_refused(void **state)
{
    (void)state;
    if (rank == 0) write_text("text", "format = longspan-pairs");
    MPI_Barrier(MPI_COMM_WORLD);
    expect_refused(in_folder("missing.h5"), LS_ERR_IO, "missing.h5: cannot be opened (No such file or directory)");
    expect_refused(folder, LS_ERR_IO, "is a directory");
    expect_refused("/dev/null", LS_ERR_IO, "is not a plain file");
    expect_refused("", LS_ERR_ARGUMENT, "a file name is empty");
    expect_refused(in_folder("text"), LS_ERR_FORMAT, "text: is not an HDF5 file");
    expect_refused(in_folder("text/below"), LS_ERR_IO, "cannot be opened (Not a directory)");
}

/* Another file on one node, or none. */
static void ranks_agree(void **state)
{
    (void)state;
    made("same.h5", NOTHING);
    if (rank == 0) write_file(in_folder("another.h5"), NOTHING, "train: foot");
    MPI_Barrier(MPI_COMM_WORLD);
    if (size == 1) return;
    expect_refused(in_folder(rank == size - 1 ? "nothing.h5" : "same.h5"), LS_ERR_IO, "nothing.h5: cannot be opened");
    dataset *d;
    expect_refusal(dataset_open(world, in_folder(rank == size - 1 ? "another.h5" : "same.h5"), 1, &d), LS_ERR_FORMAT,
                   "is not the same file on every rank", "two files");
}

/* ------------------------------------------------------------------------------------------------ damage */

/* A file as `longspan pack` makes it, and its bytes. */
static unsigned char *packed(const char *name, size_t *n)
{
    int status = LS_OK;
    if (rank == 0) {
        char lines[4096] = "";
        for (int i = 0; i < 9; i++)
            snprintf(lines + strlen(lines), sizeof lines - strlen(lines), "n%d\tsource %0*d\ttarget %d\n", i, 30 * i, i,
                     i);
        const char *a = write_text("a.tsv", lines);
        status = dataset_pack(in_folder(name), a, a, NULL);
    }
    MPI_Bcast(&status, 1, MPI_INT, 0, MPI_COMM_WORLD);
    assert_int_equal(status, LS_OK);
    return read_bytes(in_folder(name), n);
}

static void truncated_is_refused(void **state)
{
    (void)state;
    size_t n;
    unsigned char *bytes = packed("whole.h5", &n);
    const size_t pieces = size == 1 ? 200 : 20;
    for (size_t length = 0; length < n; length += 1 + n / pieces) {
        if (rank == 0) write_bytes(in_folder("cut.h5"), bytes, length);
        MPI_Barrier(MPI_COMM_WORLD);
        expect_refused(in_folder("cut.h5"), LS_ERR_FORMAT, length < 8 ? "is not an HDF5 file" : "truncated or damaged");
        MPI_Barrier(MPI_COMM_WORLD);
    }
    if (rank == 0) write_bytes(in_folder("cut.h5"), bytes, n - 1);
    MPI_Barrier(MPI_COMM_WORLD);
    expect_refused(in_folder("cut.h5"), LS_ERR_FORMAT, "truncated or damaged");
    free(bytes);
}

/* HDF5 by itself reads zeros beyond the end of a file that was longer when it was opened. */
static void cut_in_use_is_told(void **state)
{
    (void)state;
    dataset *d = opened(made("in-use.h5", NOTHING), 0); /* when verifying HDF5 may keep so small an array in memory */
    batch b = {0};
    const int64_t first = 0;
    MPI_Barrier(MPI_COMM_WORLD);
    if (rank == 0) assert_int_equal(truncate(in_folder("in-use.h5"), 100), 0);
    MPI_Barrier(MPI_COMM_WORLD);
    for (int again = 0; again < 2; again++)
        expect_refusal(dataset_read(d, "train", &first, 1, 0, 0, 0, 1, &b), LS_ERR_IO,
                       "cannot be read: the file became shorter", "cut");
    batch_free(&b);
    dataset_close(d);
}

/* All that a data set tells. Local. */
static uint64_t content(dataset *d)
{
    XXH3_state_t *h = XXH3_createState();
    batch b = {0};
    XXH3_64bits_reset(h);
    XXH3_64bits_update(h, dataset_source_names(d), strlen(dataset_source_names(d)));
    for (int s = 0; s < DATA_SPLITS; s++)
        for (int64_t i = 0; i < dataset_documents(d, data_split_name[s]); i++) {
            const char *name = dataset_name(d, data_split_name[s], i);
            expect_ok(dataset_read(d, data_split_name[s], &i, 1, 0, 0, 0, 1, &b), name);
            XXH3_64bits_update(h, name, strlen(name) + 1);
            XXH3_64bits_update(h, b.source_token, (size_t)b.source.n * sizeof *b.source_token);
            XXH3_64bits_update(h, b.label, (size_t)b.target.n * sizeof *b.label);
        }
    const uint64_t value = XXH3_64bits_digest(h);
    XXH3_freeState(h);
    batch_free(&b);
    return value;
}

static void flipped_bits_are_noticed(void **state)
{
    (void)state;
    const int flips = size == 1 ? 500 : 50;
    size_t n;
    int refused = 0;
    unsigned char *bytes = packed("whole.h5", &n);
    dataset *d = opened(in_folder("whole.h5"), 1);
    const uint64_t right = content(d);
    dataset_close(d);
    for (uint64_t k = 0; k < (uint64_t)flips; k++) {
        const int64_t bit = k < 48 * 8 && k % 2 == 0 ? (int64_t)k : draw_below(k, (int64_t)n * 8);
        bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
        if (rank == 0) write_bytes(in_folder("flipped.h5"), bytes, n);
        bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
        MPI_Barrier(MPI_COMM_WORLD);
        const ls_status status = dataset_open(world, in_folder("flipped.h5"), 1, &d);
        if (status == LS_OK) {
            if (content(d) != right) fail_msg("bit %lld changed the data", (long long)bit);
            dataset_close(d);
        } else {
            expect_refusal(status, LS_ERR_FORMAT, "flipped.h5", "a flipped bit");
            refused++;
        }
        MPI_Barrier(MPI_COMM_WORLD);
    }
    if (rank == 0)
        print_message("%d of %d flips in %zu bytes were refused, the others changed nothing\n", refused, flips, n);
    assert_true(refused > flips / 2);
    free(bytes);
}

/* ------------------------------------------------------------------------------------------------ read */

static int64_t cut(int64_t n, int64_t max)
{
    return max > 0 && n > max ? max : n;
}

/* One batch as rank p of P sees it, value by value from the definition. */
static void expect_batch(dataset *d, const int64_t *index, int64_t B, const int64_t max[2], int p, int P, batch *b)
{
    int64_t S = 0, T = 0, labels = 0, wrong = 0;
    for (int64_t r = 0; r < B; r++) {
        const int64_t s = cut(length_of(0, index[r]), max[0]), t = cut(length_of(1, index[r]), max[1]) + 1;
        S = s > S ? s : S;
        T = t > T ? t : T;
        labels += t;
    }
    expect_ok(dataset_read(d, "train", index, B, max[0], max[1], p, P, b), "read");
    assert_int_equal(b->B, B);
    assert_int_equal(b->tokens, labels);
    assert_int_equal(b->source.length, S);
    assert_int_equal(b->target.length, T);
    assert_true(b->source.rank == p && b->source.size == P && b->target.rank == p && b->target.size == P);
    assert_true(b->source_token && b->input_token && b->label && b->source_pad && b->target_pad);
    for (int64_t r = 0; r < B; r++) {
        const int64_t i = index[r], s = cut(length_of(0, i), max[0]), t = cut(length_of(1, i), max[1]);
        for (int64_t k = 0; k < b->source.n; k++) {
            const int64_t at = b->source.lo + k, here = r * b->source.n + k;
            wrong += b->source_token[here] != (at < s ? token_of(0, i, at) : TOKEN_PAD);
            wrong += b->source_pad[here] != (at >= s);
        }
        for (int64_t k = 0; k < b->target.n; k++) {
            const int64_t at = b->target.lo + k, here = r * b->target.n + k;
            wrong += b->label[here] != (at < t ? token_of(1, i, at) : at == t ? TOKEN_EOS : TOKEN_PAD);
            wrong += b->input_token[here] != (at == 0 ? TOKEN_BOS : at <= t ? token_of(1, i, at - 1) : TOKEN_PAD);
            wrong += b->target_pad[here] != (at > t);
        }
    }
    assert_int_equal(wrong, 0);
}

static void batches_are_as_defined(void **state)
{
    (void)state;
    static const int64_t cuts[][2] = {{0, 0}, {7, 0}, {0, 5}, {1, 1}, {1000, 1000}};
    dataset *d = opened(made("read.h5", NOTHING), 0);
    batch b = {.sample = 99}; /* one for all: it grows and shrinks */
    uint64_t draws = 0;
    for (int P = 1; P <= 9; P += P < 5 ? 1 : 4)
        for (int p = 0; p < P; p++)
            for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++)
                for (int64_t B = 1; B <= 4; B += 3) {
                    int64_t index[4];
                    for (int64_t r = 0; r < B; r++) index[r] = draw_below(draws++, DOCUMENTS);
                    expect_batch(d, index, B, cuts[c], p, P, &b);
                }
    assert_int_equal(b.sample, 99);
    const int64_t shortest[2] = {1, 1}, first = 0;
    expect_batch(d, &first, 1, shortest, 63, 64, &b); /* far more ranks than tokens */
    assert_int_equal(b.source.n + b.target.n, 0);
    batch_free(&b);
    batch_free(&b);
    dataset_close(d);
}

static void impossible_reads_are_refused(void **state)
{
    (void)state;
    dataset *d = opened(made("token.h5", TOKEN_RANGE), 0); /* nobody checked: reading does */
    const int64_t good = 0, bad = DOCUMENTS, spoiled = 7;
    batch b = {0};
    expect_refusal(dataset_read(d, "train", &bad, 1, 0, 0, 0, 1, &b), LS_ERR_ARGUMENT, "no document 23", "document");
    expect_refusal(dataset_read(d, "valid", &good, 1, 0, 0, 0, 1, &b), LS_ERR_ARGUMENT, "no split valid", "split");
    expect_refusal(dataset_read(d, "train", &good, 0, 0, 0, 0, 1, &b), LS_ERR_ARGUMENT, "a batch of 0 rows", "rows");
    expect_refusal(dataset_read(d, "train", &good, 1, 0, 0, 2, 2, &b), LS_ERR_ARGUMENT, "on rank 2 of 2", "rank");
    expect_refusal(dataset_read(d, "train", &spoiled, 1, 0, 0, 0, 1, &b), LS_ERR_FORMAT, "token 300", "token");
    expect_ok(dataset_read(d, "train", &good, 1, 0, 0, 0, 1, &b), "read");
    batch_free(&b);
    dataset_close(d);
}

/* ------------------------------------------------------------------------------------------------ order */

enum { WINDOW = 16 };

static int64_t weight(int64_t i)
{
    return length_of(0, i) + length_of(1, i);
}

/* Whole batches [from, to) of one window: each holds neighbours in the order of lengths. Returns those whose successor
 * is shorter. */
static int check_window(const int64_t *index, int64_t batch_size, int64_t from, int64_t to)
{
    int64_t low[WINDOW], high[WINDOW];
    const int64_t n = (to - from) / batch_size;
    int falls = 0;
    for (int64_t b = 0; b < n; b++) {
        const int64_t *rows = index + from + b * batch_size;
        low[b] = weight(rows[0]);
        high[b] = weight(rows[batch_size - 1]);
        for (int64_t r = 1; r < batch_size; r++) assert_true(weight(rows[r - 1]) <= weight(rows[r]));
        falls += b > 0 && low[b] < low[b - 1];
    }
    for (int64_t a = 0; a < n; a++)
        for (int64_t b = 0; b < n; b++) assert_true(a == b || high[a] <= low[b] || high[b] <= low[a]);
    return falls;
}

static void order_is_as_described(void **state)
{
    (void)state;
    enum { EPOCHS = 40, ALL = EPOCHS * DOCUMENTS };
    static int64_t index[ALL];
    dataset *d = opened(made("order.h5", NOTHING), 0);
    for (int64_t batch_size = 1; batch_size <= 30; batch_size += batch_size < 8 ? 1 : 11) {
        int falls = 0;
        expect_ok(dataset_order(d, 5, batch_size, 0, ALL, index), "order");
        for (int64_t e = 0; e < EPOCHS; e++) {
            const int64_t begin = e * DOCUMENTS, end = begin + DOCUMENTS;
            int seen[DOCUMENTS] = {0};
            for (int64_t k = begin; k < end; k++) seen[index[k]]++;
            for (int i = 0; i < DOCUMENTS; i++) assert_int_equal(seen[i], 1);
            const int64_t whole = (begin + batch_size - 1) / batch_size * batch_size;
            for (int64_t k = whole; k + batch_size <= end; k += WINDOW * batch_size) {
                const int64_t stop_at = k + WINDOW * batch_size;
                falls += check_window(index, batch_size, k, stop_at < end ? stop_at : end / batch_size * batch_size);
            }
        }
        if (batch_size <= 5) assert_true(falls > EPOCHS / 2); /* the batches of a window are shuffled */
    }
    dataset_close(d);
}

static void order_does_not_depend_on_calls(void **state)
{
    (void)state;
    enum { ALL = 5 * DOCUMENTS + 4 };
    int64_t whole[ALL], piece[ALL], other[ALL];
    dataset *d = opened(made("order.h5", NOTHING), 0);
    expect_ok(dataset_order(d, 11, 4, 0, ALL, whole), "order");
    for (int64_t first = 0; first < ALL; first += 7) { /* as groups of ranks would ask, backwards too */
        const int64_t count = first + 7 < ALL ? 7 : ALL - first;
        expect_ok(dataset_order(d, 11, 4, first, count, piece), "order");
        assert_memory_equal(piece, whole + first, (size_t)count * sizeof *piece);
        expect_ok(dataset_order(d, 11, 4, 3, 2, piece), "order");
        assert_memory_equal(piece, whole + 3, 2 * sizeof *piece);
    }
    expect_ok(dataset_order(d, 12, 4, 0, ALL, other), "order");
    assert_memory_not_equal(other, whole, sizeof whole);
    assert_memory_not_equal(whole + DOCUMENTS, whole, DOCUMENTS * sizeof *whole);
    expect_ok(dataset_order(d, 12, 4, INT64_MAX / 4, 0, other), "none");
    expect_ok(dataset_order(d, 12, 4, INT64_MAX / 4, 5, other), "far away");
    expect_refusal(dataset_order(d, 12, 0, 0, 5, other), LS_ERR_ARGUMENT, "in batches of 0", "batch");
    expect_refusal(dataset_order(d, 12, 1, -1, 5, other), LS_ERR_ARGUMENT, "samples -1 to 3", "first");

    /* a run that is resumed by another version must go on in the same order */
    static const int64_t kept[8] = {5, 10, 9, 17, 13, 1, 6, 21};
    expect_ok(dataset_order(d, 2024, 2, 40, 8, piece), "order");
    assert_memory_equal(piece, kept, sizeof kept);
    dataset_close(d);
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_right_opens),
        cmocka_unit_test(what_is_wrong_is_refused),
        cmocka_unit_test(what_is_no_data_set_is_refused),
        cmocka_unit_test(ranks_agree),
        cmocka_unit_test(truncated_is_refused),
        cmocka_unit_test(cut_in_use_is_told),
        cmocka_unit_test(flipped_bits_are_noticed),
        cmocka_unit_test(batches_are_as_defined),
        cmocka_unit_test(impossible_reads_are_refused),
        cmocka_unit_test(order_is_as_described),
        cmocka_unit_test(order_does_not_depend_on_calls),
    };
    const int failed = cmocka_run_group_tests_name("data", tests, start, stop);
    MPI_Finalize();
    return failed;
}
