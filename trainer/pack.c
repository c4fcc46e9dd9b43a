/* `longspan pack`: text to tokens. Every input is walked twice by the same code, first into a sink that only counts, so
 * that the arrays can be made at their final size, in one piece. */
#include "data.h"

#include "h5.h"
#include "real.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <xxhash.h>

/* ------------------------------------------------------------------------------------------------ sink */

typedef struct tally {
    int64_t documents, tokens[2];
    size_t longest_name;
} tally;

/* The tokens of one side on their way to the file. */
typedef struct stream {
    h5_array array;
    uint16_t *block;  /* (DATA_BLOCK) */
    int64_t fill;     /* of the block */
    int64_t *offset;  /* (documents + 1) */
    uint64_t *digest; /* (blocks) */
} stream;

typedef struct sink {
    const char *input; /* for messages */
    tally sum;         /* of the documents so far; tokens: of the one under way too */
    int64_t begin[2];  /* of the document under way */
    char name[DATA_NAME + 1];
    size_t name_length; /* may be more than there is room for */
    int writing;        /* 0: only count */
    tally all;          /* when writing: what the first pass counted */
    stream side[2];
    char *names; /* (all.documents, all.longest_name) */
} sink;

static ls_status flush_block(sink *k, int side)
{
    stream *s = &k->side[side];
    if (s->fill == 0) return LS_OK;
    const int64_t lo = (k->sum.tokens[side] - 1) / DATA_BLOCK * DATA_BLOCK;
    LS_TRY(h5_array_write(&s->array, lo, s->fill, s->block));
    s->digest[lo / DATA_BLOCK] = XXH3_64bits(s->block, (size_t)s->fill * sizeof *s->block);
    s->fill = 0;
    return LS_OK;
}

static ls_status fail_changed(const sink *k)
{
    LS_FAIL(LS_ERR_IO, "%s: changed while it was read: pack it again when it is complete", k->input);
}

static ls_status put_token(sink *k, int side, unsigned char byte)
{
    k->sum.tokens[side]++;
    if (!k->writing) return LS_OK;
    stream *s = &k->side[side];
    if (k->sum.tokens[side] > k->all.tokens[side]) return fail_changed(k);
    s->block[s->fill++] = byte;
    return s->fill == DATA_BLOCK ? flush_block(k, side) : LS_OK;
}

static void put_name(sink *k, char byte)
{
    if (k->name_length < DATA_NAME) k->name[k->name_length] = byte;
    k->name_length++;
}

/* Well-formed as RFC 3629 wants it: no surrogates, no overlong forms, nothing above U+10FFFF. */
static int is_utf8(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text;
    for (size_t i = 0; i < n;) {
        const unsigned c = p[i++];
        if (c < 0x80) continue;
        const int more = c >= 0xc2 && c < 0xe0 ? 1 : c >= 0xe0 && c < 0xf0 ? 2 : c >= 0xf0 && c < 0xf5 ? 3 : 0;
        if (more == 0 || n - i < (size_t)more) return 0;
        const unsigned lowest = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
        const unsigned highest = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        if (p[i] < lowest || p[i] > highest) return 0;
        for (int k = 1; k < more; k++)
            if ((p[i + (size_t)k] & 0xc0) != 0x80) return 0;
        i += (size_t)more;
    }
    return 1;
}

/* Ends the document under way; `where` tells which, for messages. */
static ls_status end_document(sink *k, const char *where)
{
    if (k->name_length > DATA_NAME)
        LS_FAIL(LS_ERR_FORMAT, "%s: the name has %zu bytes (at most %d)", where, k->name_length, (int)DATA_NAME);
    if (!is_utf8(k->name, k->name_length)) LS_FAIL(LS_ERR_FORMAT, "%s: the name is not UTF-8", where);
    for (int side = 0; side < 2; side++)
        if (k->sum.tokens[side] == k->begin[side])
            LS_FAIL(LS_ERR_FORMAT, "%s: the %s is empty", where, side == 0 ? "source" : "target");
    const int64_t i = k->sum.documents++;
    if (k->writing) {
        if (i >= k->all.documents || k->name_length > k->all.longest_name) return fail_changed(k);
        memcpy(k->names + (size_t)i * k->all.longest_name, k->name, k->name_length);
        for (int side = 0; side < 2; side++) k->side[side].offset[i + 1] = k->sum.tokens[side];
    }
    if (k->name_length > k->sum.longest_name) k->sum.longest_name = k->name_length;
    for (int side = 0; side < 2; side++) k->begin[side] = k->sum.tokens[side];
    k->name_length = 0;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ TSV */

typedef struct tsv {
    FILE *file;
    const char *path;
    int64_t line;
    int columns, column; /* of the file: 2 or 3; the one under way */
    int64_t length;      /* of its field */
} tsv;

static const char *at_line(const tsv *t, char where[H5_PATH + 32])
{
    snprintf(where, H5_PATH + 32, "%.*s: line %lld", (int)H5_PATH, t->path, (long long)t->line);
    return where;
}

static ls_status put_field(tsv *t, sink *k, int byte)
{
    t->length++;
    const int side = t->column - (t->columns - 2);
    if (side >= 0) return put_token(k, side, (unsigned char)byte);
    put_name(k, (char)byte);
    return LS_OK;
}

static ls_status end_field(tsv *t, const char *where)
{
    if (t->length == 0) LS_FAIL(LS_ERR_FORMAT, "%s: column %d is empty", where, t->column + 1);
    t->length = 0;
    t->column++;
    return LS_OK;
}

static ls_status end_line(tsv *t, sink *k)
{
    char where[H5_PATH + 32];
    at_line(t, where);
    if (t->column + 1 != t->columns)
        LS_FAIL(LS_ERR_FORMAT, "%s: has %d column%s where the first line has %d (escape tabs as \\t, line ends as \\n)",
                where, t->column + 1, t->column == 0 ? "" : "s", t->columns);
    LS_TRY(end_field(t, where));
    if (t->columns == 2) k->name_length = (size_t)snprintf(k->name, sizeof k->name, "line-%lld", (long long)t->line);
    LS_TRY(end_document(k, where));
    t->column = 0;
    t->line++;
    return LS_OK;
}

static ls_status take_escape(tsv *t, sink *k)
{
    char where[H5_PATH + 32];
    const int c = getc_unlocked(t->file);
    switch (c) {
    case 't':
        return put_field(t, k, '\t');
    case 'n':
        return put_field(t, k, '\n');
    case 'r':
        return put_field(t, k, '\r');
    case '\\':
        return put_field(t, k, '\\');
    default:
        if (c > ' ' && c < 127)
            LS_FAIL(LS_ERR_FORMAT, "%s: unknown escape \\%c (known are \\t \\n \\r \\\\)", at_line(t, where), c);
        LS_FAIL(LS_ERR_FORMAT, "%s: a backslash without its letter (write \\\\ for one backslash)", at_line(t, where));
    }
}

/* One character that is not part of a plain run of text. */
static ls_status take_special(tsv *t, sink *k, int c)
{
    char where[H5_PATH + 32];
    if (c == '\n') return end_line(t, k);
    if (c == '\\') return take_escape(t, k);
    if (c == '\t') {
        at_line(t, where);
        if (t->column + 1 == t->columns)
            LS_FAIL(LS_ERR_FORMAT, "%s: has more columns than the first line, which has %d (escape tabs as \\t)", where,
                    t->columns);
        return end_field(t, where);
    }
    if (c == 0) LS_FAIL(LS_ERR_FORMAT, "%s: a NUL byte: this is not text", at_line(t, where));
    const int next = getc_unlocked(t->file);
    if (next == '\n' || next == EOF)
        LS_FAIL(LS_ERR_FORMAT,
                "%s: ends in a carriage return (lines end in \\n alone; escape one that is meant as \\r)",
                at_line(t, where));
    ungetc(next, t->file);
    return put_field(t, k, c);
}

/* To where the text begins: behind the byte order mark that some editors put there, which is no part of it. */
static void to_text(FILE *file)
{
    static const char mark[] = "\xef\xbb\xbf";
    char begin[sizeof mark - 1];
    rewind(file);
    if (fread(begin, 1, sizeof begin, file) != sizeof begin || memcmp(begin, mark, sizeof begin) != 0) rewind(file);
}

static ls_status count_columns(tsv *t)
{
    t->columns = 1;
    to_text(t->file);
    const long text = ftell(t->file);
    int c;
    while ((c = getc_unlocked(t->file)) != EOF && c != '\n') t->columns += c == '\t';
    if (c == EOF && t->columns == 1 && ftell(t->file) == text)
        LS_FAIL(LS_ERR_FORMAT, "%s: is empty, at least one document is needed", t->path);
    if (t->columns != 2 && t->columns != 3)
        LS_FAIL(LS_ERR_FORMAT,
                "%s: line 1: has %d column%s, where 2 (source, target) or 3 (name, source, target) are needed, "
                "with tabs between them",
                t->path, t->columns, t->columns == 1 ? "" : "s");
    to_text(t->file);
    return LS_OK;
}

static ls_status walk_lines(tsv *t, sink *k)
{
    LS_TRY(count_columns(t));
    int c;
    while ((c = getc_unlocked(t->file)) != EOF) {
        if (c > '\r' && c != '\\')
            LS_TRY(put_field(t, k, c)); /* most of the text */
        else if (c == '\n' || c == '\t' || c == '\\' || c == 0 || c == '\r')
            LS_TRY(take_special(t, k, c));
        else
            LS_TRY(put_field(t, k, c));
    }
    if (ferror(t->file)) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", t->path, strerror(errno));
    return t->column > 0 || t->length > 0 ? end_line(t, k) : LS_OK; /* a last line without its end */
}

static ls_status walk_tsv(const char *path, sink *k)
{
    tsv t = {.path = path, .line = 1, .file = fopen(path, "rb")};
    if (t.file == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", path, strerror(errno));
    const ls_status status = walk_lines(&t, k);
    fclose(t.file);
    return status;
}

/* ------------------------------------------------------------------------------------------------ directories */

typedef struct listing {
    int64_t n, room;
    char **name;
} listing;

static void listing_free(listing *l)
{
    for (int64_t i = 0; i < l->n; i++) free(l->name[i]);
    free(l->name);
    *l = (listing){0};
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static ls_status add_name(listing *l, const char *name, const char *directory)
{
    if (l->n == l->room) {
        const int64_t room = l->room == 0 ? 256 : 2 * l->room;
        char **more = realloc(l->name, (size_t)room * sizeof *more);
        if (more == NULL)
            LS_FAIL(LS_ERR_MEMORY, "%s: no memory for the names of %lld files", directory, (long long)room);
        l->name = more;
        l->room = room;
    }
    l->name[l->n] = strdup(name);
    if (l->name[l->n] == NULL) LS_FAIL(LS_ERR_MEMORY, "%s: no memory for file names", directory);
    l->n++;
    return LS_OK;
}

/* In the order of their bytes, so that the file does not depend on the file system. */
static ls_status list_files(const char *directory, listing *l)
{
    *l = (listing){0};
    DIR *dir = opendir(directory);
    if (dir == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be listed (%s)", directory, strerror(errno));
    ls_status status = LS_OK;
    errno = 0;
    for (const struct dirent *entry; status == LS_OK && (entry = readdir(dir)) != NULL; errno = 0)
        if (entry->d_name[0] != '.') status = add_name(l, entry->d_name, directory);
    if (status == LS_OK && errno != 0)
        status = ls_fail(LS_ERR_IO, "%s: cannot be listed (%s)", directory, strerror(errno));
    closedir(dir);
    if (status == LS_OK && l->n == 0)
        status = ls_fail(LS_ERR_FORMAT, "%s: holds no files, at least one document is needed", directory);
    if (status == LS_OK) qsort(l->name, (size_t)l->n, sizeof *l->name, by_bytes);
    if (status != LS_OK) listing_free(l);
    return status;
}

static ls_status check_pairs(char *const directory[2], const listing list[2])
{
    for (int64_t i = 0; i < ls_max(list[0].n, list[1].n); i++) {
        const char *a = i < list[0].n ? list[0].name[i] : NULL, *b = i < list[1].n ? list[1].name[i] : NULL;
        const int order = a == NULL ? 1 : b == NULL ? -1 : strcmp(a, b);
        if (order != 0)
            LS_FAIL(LS_ERR_FORMAT, "%s: file %s has no partner in %s", directory[order > 0], order < 0 ? a : b,
                    directory[order < 0]);
    }
    return LS_OK;
}

/* Bytes are tokens as they are: unlike a line of a TSV, a file may hold anything. */
static ls_status walk_file(const char *path, sink *k, int side)
{
    struct stat about;
    if (stat(path, &about) != 0) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", path, strerror(errno));
    if (!S_ISREG(about.st_mode)) LS_FAIL(LS_ERR_FORMAT, "%s: is not a plain file", path);
    FILE *file = fopen(path, "rb");
    if (file == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", path, strerror(errno));
    ls_status status = LS_OK;
    for (int c; status == LS_OK && (c = getc_unlocked(file)) != EOF;) status = put_token(k, side, (unsigned char)c);
    if (status == LS_OK && ferror(file)) status = ls_fail(LS_ERR_IO, "%s: cannot be read (%s)", path, strerror(errno));
    fclose(file);
    return status;
}

static ls_status walk_pair(char *const directory[2], const char *name, sink *k)
{
    char path[H5_PATH + 300];
    for (int side = 0; side < 2; side++) {
        snprintf(path, sizeof path, "%s/%s", directory[side], name);
        LS_TRY(walk_file(path, k, side));
        if (k->sum.tokens[side] == k->begin[side]) LS_FAIL(LS_ERR_FORMAT, "%s: is empty", path);
    }
    for (const char *c = name; *c != 0; c++) put_name(k, *c);
    return end_document(k, path);
}

static ls_status walk_directories(char *const directory[2], sink *k)
{
    listing list[2] = {{0}};
    ls_status status = list_files(directory[0], &list[0]);
    if (status == LS_OK) status = list_files(directory[1], &list[1]);
    if (status == LS_OK) status = check_pairs(directory, list);
    for (int64_t i = 0; status == LS_OK && i < list[0].n; i++) status = walk_pair(directory, list[0].name[i], k);
    listing_free(&list[0]);
    listing_free(&list[1]);
    return status;
}

/* ------------------------------------------------------------------------------------------------ inputs */

/* What a command line gives for a split. */
typedef struct input {
    const char *given;
    char *directory[2];     /* NULL: a TSV file */
    char text[2 * H5_PATH]; /* holds the directories */
    char label[640];        /* base names only: where data lay is nobody's business later */
} input;

static int is_directory(const char *path)
{
    struct stat about;
    return stat(path, &about) == 0 && S_ISDIR(about.st_mode);
}

static void add_base_name(input *in, const char *path)
{
    size_t n = strlen(path), used = strlen(in->label), from = n;
    while (from > 0 && path[from - 1] != '/') from--;
    if (n - from > 255) n = from + 255;
    for (size_t i = from; i < n && used + 1 < sizeof in->label; i++)
        in->label[used++] = (unsigned char)path[i] < 32 ? '?' : path[i];
    in->label[used] = 0;
    if (!is_utf8(in->label, used))
        for (size_t i = 0; i < used; i++)
            if ((unsigned char)in->label[i] >= 0x80) in->label[i] = '?';
}

static ls_status understand(const char *given, input *in)
{
    *in = (input){.given = given};
    if (given[0] == 0) LS_FAIL(LS_ERR_ARGUMENT, "pack: the name of an input is empty");
    if (strlen(given) >= sizeof in->text) LS_FAIL(LS_ERR_ARGUMENT, "pack: %.60s...: the name is too long", given);
    snprintf(in->text, sizeof in->text, "%s", given);
    struct stat about;
    char *colon = strchr(in->text, ':');
    if (stat(given, &about) == 0) {
        if (S_ISDIR(about.st_mode))
            LS_FAIL(LS_ERR_ARGUMENT, "%s: is one directory; give two as SOURCE_DIR:TARGET_DIR, or a TSV file", given);
        if (!S_ISREG(about.st_mode))
            LS_FAIL(LS_ERR_ARGUMENT, "%s: is not a plain file, which is needed as it is read twice", given);
        add_base_name(in, given);
        return LS_OK;
    }
    if (colon == NULL) LS_FAIL(LS_ERR_IO, "%s: cannot be read (%s)", given, strerror(errno));
    *colon = 0;
    in->directory[0] = in->text;
    in->directory[1] = colon + 1;
    for (int side = 0; side < 2; side++) {
        char *end = strchr(in->directory[side], 0);
        while (end > in->directory[side] + 1 && end[-1] == '/') *--end = 0;
        if (!is_directory(in->directory[side]))
            LS_FAIL(LS_ERR_IO, "%s: there is no directory \"%s\"", given, in->directory[side]);
    }
    add_base_name(in, in->directory[0]);
    strcat(in->label, ":"); /* there is room: a base name takes 255 bytes at most */
    add_base_name(in, in->directory[1]);
    return LS_OK;
}

static ls_status walk(input *in, sink *k)
{
    k->input = in->given;
    return in->directory[0] == NULL ? walk_tsv(in->given, k) : walk_directories(in->directory, k);
}

/* ------------------------------------------------------------------------------------------------ output */

static int64_t blocks_of(int64_t tokens)
{
    return (tokens - 1) / DATA_BLOCK + 1;
}

static void sink_free(sink *k)
{
    for (int side = 0; side < 2; side++) {
        h5_array_close(&k->side[side].array);
        free(k->side[side].block);
        free(k->side[side].offset);
        free(k->side[side].digest);
        k->side[side] = (stream){0};
    }
    free(k->names);
    k->names = NULL;
}

static ls_status sink_create(sink *k, const tally *all, h5_file *f, const char *name)
{
    *k = (sink){.writing = 1, .all = *all};
    const size_t documents = (size_t)all->documents;
    k->names = calloc(documents, all->longest_name);
    for (int side = 0; side < 2; side++) {
        stream *s = &k->side[side];
        s->block = malloc(DATA_BLOCK * sizeof *s->block);
        s->offset = calloc(documents + 1, sizeof *s->offset);
        s->digest = calloc((size_t)blocks_of(all->tokens[side]), sizeof *s->digest);
        if (k->names == NULL || s->block == NULL || s->offset == NULL || s->digest == NULL)
            LS_FAIL(LS_ERR_MEMORY, "pack: no memory for the offsets and names of %zu documents", documents);
        char where[H5_NAME];
        snprintf(where, sizeof where, "%s/%s", name, side == 0 ? "source" : "target");
        LS_TRY(h5_array_create(f, where, H5T_STD_U16LE, 1, &all->tokens[side], &s->array));
    }
    return LS_OK;
}

static ls_status put_array(h5_file *f, const char *group, const char *name, hid_t type, int64_t n, const void *x)
{
    char where[H5_NAME];
    snprintf(where, sizeof where, "%s/%s", group, name);
    return h5_array_put(f, where, type, 1, &n, x);
}

static ls_status put_names(h5_file *f, const char *group, const sink *k, uint64_t *digest)
{
    const hid_t type = h5_text_type(k->all.longest_name);
    const ls_status status = put_array(f, group, "names", type, k->all.documents, k->names);
    H5Tclose(type);
    *digest = XXH3_64bits(k->names, (size_t)k->all.documents * k->all.longest_name);
    LS_TRY(status);
    return h5_put(f, group, "names_digest", H5T_STD_U64LE, digest);
}

static ls_status put_offsets(h5_file *f, const char *group, const sink *k, uint64_t *digest)
{
    const int64_t n = k->all.documents + 1;
    XXH3_state_t *h = XXH3_createState();
    if (h == NULL) LS_FAIL(LS_ERR_MEMORY, "pack: no memory for a digest");
    XXH3_64bits_reset(h);
    for (int side = 0; side < 2; side++) XXH3_64bits_update(h, k->side[side].offset, (size_t)n * sizeof(int64_t));
    *digest = XXH3_64bits_digest(h);
    XXH3_freeState(h);
    LS_TRY(put_array(f, group, "source_offsets", H5T_STD_I64LE, n, k->side[0].offset));
    LS_TRY(put_array(f, group, "target_offsets", H5T_STD_I64LE, n, k->side[1].offset));
    return h5_put(f, group, "offsets_digest", H5T_STD_U64LE, digest);
}

static ls_status write_split(h5_file *f, const char *name, input *in, sink *k, data_seal *seal)
{
    sink counter = {.writing = 0};
    LS_TRY(walk(in, &counter));
    LS_TRY(h5_group_create(f, name));
    LS_TRY(sink_create(k, &counter.sum, f, name));
    LS_TRY(walk(in, k));
    if (k->sum.documents != k->all.documents || k->sum.tokens[0] != k->all.tokens[0] ||
        k->sum.tokens[1] != k->all.tokens[1])
        return fail_changed(k);
    *seal = (data_seal){.documents = k->all.documents};
    for (int side = 0; side < 2; side++) {
        LS_TRY(flush_block(k, side));
        seal->tokens[side] = k->all.tokens[side];
        seal->blocks[side] = blocks_of(k->all.tokens[side]);
        seal->digests[side] = k->side[side].digest;
        LS_TRY(put_array(f, name, side == 0 ? "source_digests" : "target_digests", H5T_STD_U64LE, seal->blocks[side],
                         seal->digests[side]));
    }
    LS_TRY(put_offsets(f, name, k, &seal->offsets_digest));
    return put_names(f, name, k, &seal->names_digest);
}

static ls_status write_header(h5_file *f, const char *source_names, const data_seal seal[DATA_SPLITS])
{
    const int64_t version = DATA_VERSION, vocabulary_size = DATA_VOCABULARY;
    uint64_t digest;
    LS_TRY(data_seal_digest(source_names, seal, &digest));
    LS_TRY(h5_put_text(f, "/", "format", DATA_FORMAT));
    LS_TRY(h5_put(f, "/", "version", H5T_STD_I64LE, &version));
    LS_TRY(h5_put_text(f, "/", "vocabulary", DATA_VOCABULARY_NAME));
    LS_TRY(h5_put(f, "/", "vocabulary_size", H5T_STD_I64LE, &vocabulary_size));
    LS_TRY(h5_put_text(f, "/", "source_names", source_names));
    return h5_put(f, "/", "digest", H5T_STD_U64LE, &digest);
}

/* A data set may be packed anew, but nothing else is overwritten: a slip on the command line shall cost nobody a text.
 */
static ls_status check_out(const char *out, const char *const given[DATA_SPLITS])
{
    struct stat there, other;
    if (stat(out, &there) != 0 || !S_ISREG(there.st_mode)) return LS_OK; /* h5_create says what is wrong, if anything */
    for (int i = 0; i < DATA_SPLITS; i++)
        if (given[i] != NULL && stat(given[i], &other) == 0 && other.st_dev == there.st_dev &&
            other.st_ino == there.st_ino)
            LS_FAIL(LS_ERR_ARGUMENT, "pack: %s is an input: the data set needs another name", out);
    h5_file f;
    char *format = NULL;
    ls_status status = h5_open(out, &f);
    if (status == LS_OK) status = h5_get_text(&f, "/", "format", &format);
    const int ours = status == LS_OK && strcmp(format, DATA_FORMAT) == 0;
    free(format);
    h5_close(&f);
    if (ours) return LS_OK;
    LS_FAIL(LS_ERR_ARGUMENT, "pack: %s is there and is not a data set of Longspan: remove it, or choose another name",
            out);
}

ls_status dataset_pack(const char *out, const char *train, const char *valid, const char *test)
{
    const char *given[DATA_SPLITS] = {train, valid, test};
    char source_names[DATA_SPLITS * sizeof((input *)0)->label + 64] = "";
    input in[DATA_SPLITS];
    data_seal seal[DATA_SPLITS] = {{0}};
    sink k[DATA_SPLITS] = {{0}}; /* kept to the end: the digest is taken of their digests */
    h5_file f = {0};
    ls_status status = LS_OK;
    if (train == NULL && valid == NULL && test == NULL)
        LS_FAIL(LS_ERR_ARGUMENT, "pack: nothing to pack: give at least one of train, valid, test");
    for (int i = 0; i < DATA_SPLITS; i++)
        if (given[i] != NULL) LS_TRY(understand(given[i], &in[i]));
    LS_TRY(check_out(out, given));
    LS_TRY(h5_create(out, &f));
    for (int i = 0; i < DATA_SPLITS; i++) {
        if (given[i] == NULL) continue;
        const size_t used = strlen(source_names);
        snprintf(source_names + used, sizeof source_names - used, "%s%s: %s", used > 0 ? "\n" : "", data_split_name[i],
                 in[i].label);
        LS_TRY_GOTO(write_split(&f, data_split_name[i], &in[i], &k[i], &seal[i]));
    }
    LS_TRY_GOTO(write_header(&f, source_names, seal));
    for (int i = 0; i < DATA_SPLITS; i++)
        for (int side = 0; side < 2; side++) h5_array_close(&k[i].side[side].array);
    LS_TRY_GOTO(h5_commit(&f));
done:
    for (int i = 0; i < DATA_SPLITS; i++) sink_free(&k[i]);
    h5_close(&f);
    return status;
}
