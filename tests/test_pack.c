/* `longspan pack` and `longspan inspect`: what goes in comes out, what is refused is refused in clear words, and
 * whatever happens, a name has a whole file or none. */
#include "trainer.h"

#include "files.h"

#include <jansson.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

static ls_context *alone;

static int start(void **state)
{
    const ls_context_options options = {.comm = MPI_COMM_NULL, .device = LS_CPU};
    return make_folder(state) || ls_context_create(&options, &alone) != LS_OK;
}

static int stop(void **state)
{
    ls_context_free(alone);
    return remove_folder(state);
}

static dataset *opened(const char *path)
{
    dataset *d;
    expect_ok(dataset_open(alone, path, 1, &d), path);
    return d;
}

/* Document i of a split is (name, source, target). */
static void expect_document(dataset *d, const char *split, int64_t i, const char *name, const char *source,
                            const char *target)
{
    batch b = {0};
    int64_t lengths[2];
    assert_string_equal(dataset_name(d, split, i), name);
    dataset_lengths(d, split, i, &lengths[0], &lengths[1]);
    assert_int_equal(lengths[0], strlen(source));
    assert_int_equal(lengths[1], strlen(target));
    expect_ok(dataset_read(d, split, &i, 1, 0, 0, 0, 1, &b), split);
    for (size_t k = 0; k < strlen(source); k++) assert_int_equal(b.source_token[k], (unsigned char)source[k]);
    for (size_t k = 0; k < strlen(target); k++) assert_int_equal(b.label[k], (unsigned char)target[k]);
    batch_free(&b);
}

/* ------------------------------------------------------------------------------------------------ what goes in */

static void lines_come_back(void **state)
{
    (void)state;
    const char *out = in_folder("lines.h5");
    write_text("a.tsv", "one\tA b\tx\n\xc3\xa9\\t2\t\xff\\\\\\n\\t\\r\ty\ta\n");
    expect_refusal(dataset_pack(out, in_folder("a.tsv"), NULL, NULL), LS_ERR_FORMAT,
                   "a.tsv: line 2: has more columns than the first line", "four columns");
    assert_false(exists(out));
    write_text("a.tsv", "one\tA b\tx\n\xc3\xa9\\t2\t\xff\\\\\\n\\t\\r\ty\n");
    write_text("b.tsv", "s\rs\tt1\nlonger source\tt2"); /* no name, no last line end, a carriage return inside */
    expect_ok(dataset_pack(out, in_folder("a.tsv"), in_folder("b.tsv"), NULL), "pack");
    dataset *d = opened(out);
    assert_int_equal(dataset_documents(d, "train"), 2);
    assert_int_equal(dataset_documents(d, "valid"), 2);
    assert_int_equal(dataset_documents(d, "test"), 0);
    assert_int_equal(dataset_documents(d, "other"), 0);
    expect_document(d, "train", 0, "one", "A b", "x");
    expect_document(d, "train", 1, "\xc3\xa9\t2", "\xff\\\n\t\r", "y");
    expect_document(d, "valid", 0, "line-1", "s\rs", "t1");
    expect_document(d, "valid", 1, "line-2", "longer source", "t2");
    assert_int_equal(dataset_longest(d, "valid", 0), 13);
    assert_int_equal(dataset_longest(d, "valid", 1), 2);
    assert_int_equal(dataset_tokens(d, "valid", 0), 16);
    assert_int_equal(dataset_tokens(d, "test", 1), 0);
    assert_string_equal(dataset_source_names(d), "train: a.tsv\nvalid: b.tsv");
    dataset_close(d);
}

/* At the beginning it is no part of the first name or source; anywhere else it is text. */
static void byte_order_mark_is_skipped(void **state)
{
    (void)state;
    const char *out = in_folder("mark.h5");
    write_text("a.tsv", "\xef\xbb\xbfone\t\xef\xbb\xbfs\tt\n\xef\xbb\xbftwo\ts\tt\n");
    write_text("b.tsv", "\xef\xbb\xbfs1\tt1");
    write_text("c.tsv", "\xef\xbb\xbf\xef\xbb\xbfs1\tt1");
    expect_ok(dataset_pack(out, in_folder("a.tsv"), in_folder("b.tsv"), in_folder("c.tsv")), "pack");
    dataset *d = opened(out);
    expect_document(d, "train", 0, "one", "\xef\xbb\xbfs", "t");
    expect_document(d, "train", 1, "\xef\xbb\xbftwo", "s", "t");
    expect_document(d, "valid", 0, "line-1", "s1", "t1");
    expect_document(d, "test", 0, "line-1", "\xef\xbb\xbfs1", "t1");
    dataset_close(d);
}

static void directories_come_back(void **state)
{
    (void)state;
    char pair[256];
    snprintf(pair, sizeof pair, "%s/src/:%s/tgt", folder, folder);
    mkdir(in_folder("src"), 0777);
    mkdir(in_folder("tgt"), 0777);
    write_text("src/b.txt", "\xef\xbb\xbf\x42"); /* a file keeps its byte order mark */
    write_text("src/a.txt", "A\r\n\\n\t");
    write_text("src/.hidden", "h");
    write_text("tgt/a.txt", "aa");
    write_bytes(in_folder("tgt/b.txt"), "b\0b", 3);
    expect_ok(dataset_pack(in_folder("dirs.h5"), NULL, NULL, pair), "pack");
    dataset *d = opened(in_folder("dirs.h5"));
    expect_document(d, "test", 0, "a.txt", "A\r\n\\n\t", "aa");
    assert_int_equal(dataset_tokens(d, "test", 0), 10);
    assert_int_equal(dataset_tokens(d, "test", 1), 5); /* a NUL is a byte like others */
    assert_string_equal(dataset_source_names(d), "test: src:tgt");
    dataset_close(d);

    const char *out = in_folder("never.h5");
    write_text("src/c.txt", "c");
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_FORMAT, "file c.txt has no partner in", "only source");
    write_text("tgt/c.txt", "");
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_FORMAT, "tgt/c.txt: is empty", "empty");
    remove(in_folder("src/c.txt"));
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_FORMAT, "file c.txt has no partner in", "only target");
    mkdir(in_folder("src/c.txt"), 0777);
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_FORMAT, "src/c.txt: is not a plain file", "directory");
    snprintf(pair, sizeof pair, "%s/src:%s/nowhere", folder, folder);
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_IO, "there is no directory", "no directory");
    snprintf(pair, sizeof pair, "%s/src", folder);
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_ARGUMENT, "SOURCE_DIR:TARGET_DIR", "one directory");
    mkdir(in_folder("none"), 0777);
    snprintf(pair, sizeof pair, "%s/none:%s/none", folder, folder);
    expect_refusal(dataset_pack(out, pair, NULL, NULL), LS_ERR_FORMAT, "holds no files", "empty directory");
    assert_false(exists(out));
}

/* More than a block, in one document and over several, with every byte. */
static void blocks_come_back(void **state)
{
    (void)state;
    enum { LONG = 2 * DATA_BLOCK + 12345, DOCUMENTS = 3 };
    unsigned char *text = malloc(LONG);
    char pair[256], name[64];
    assert_non_null(text);
    mkdir(in_folder("big-s"), 0777);
    mkdir(in_folder("big-t"), 0777);
    for (int i = 0; i < DOCUMENTS; i++) {
        for (int64_t k = 0; k < LONG; k++) text[k] = (unsigned char)(k * (2 * i + 1) + (k >> 9));
        snprintf(name, sizeof name, "big-s/%d", i);
        write_bytes(in_folder(name), text, i == 1 ? DATA_BLOCK : LONG);
        snprintf(name, sizeof name, "big-t/%d", i);
        write_bytes(in_folder(name), text, i == 1 ? LONG : 1);
    }
    snprintf(pair, sizeof pair, "%s/big-s:%s/big-t", folder, folder);
    expect_ok(dataset_pack(in_folder("big.h5"), pair, NULL, NULL), "pack");
    dataset *d = opened(in_folder("big.h5"));
    batch b = {0};
    const int64_t all[DOCUMENTS] = {0, 1, 2};
    expect_ok(dataset_read(d, "train", all, DOCUMENTS, 0, 0, 0, 1, &b), "read");
    int64_t wrong = 0;
    for (int64_t i = 0; i < DOCUMENTS; i++)
        for (int64_t k = 0; k < LONG; k++) {
            const int there = i != 1 || k < DATA_BLOCK;
            wrong +=
                b.source_token[i * b.source.n + k] != (there ? (unsigned char)(k * (2 * i + 1) + (k >> 9)) : TOKEN_PAD);
        }
    assert_int_equal(wrong, 0);
    batch_free(&b);
    dataset_close(d);
    free(text);
}

static void same_input_same_bytes(void **state)
{
    (void)state;
    size_t n[2];
    write_text("a.tsv", "n\tsource\ttarget\n");
    expect_ok(dataset_pack(in_folder("1.h5"), in_folder("a.tsv"), NULL, NULL), "pack");
    expect_ok(dataset_pack(in_folder("2.h5"), in_folder("a.tsv"), NULL, NULL), "pack");
    unsigned char *a = read_bytes(in_folder("1.h5"), &n[0]), *b = read_bytes(in_folder("2.h5"), &n[1]);
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(a, b, n[0]);
    free(a);
    free(b);
}

/* ------------------------------------------------------------------------------------------------ what is refused */

static const struct {
    const char *text, *words;
} bad_lines[] = {
    {"", "a.tsv: is empty"},
    {"\xef\xbb\xbf", "a.tsv: is empty"},
    {"\xef\xbb\xbf\tb\n", "line 1: column 1 is empty"},
    {"\xef\xbb", "line 1: has 1 column"},
    {"\n", "line 1: has 1 column"},
    {"only one\n", "line 1: has 1 column"},
    {"a\tb\tc\td\n", "line 1: has 4 columns"},
    {"a\tb\tc\na\tb\n", "line 2: has 2 columns where the first line has 3"},
    {"a\tb\tc\n\na\tb\tc\n", "line 2: has 1 column where"},
    {"a\tb\na\tb\tc\n", "line 2: has more columns than the first line, which has 2"},
    {"a\tb\n\tb\n", "line 2: column 1 is empty"},
    {"a\tb\na\t\n", "line 2: column 2 is empty"},
    {"a\tb\tc\n\tb\tc\n", "line 2: column 1 is empty"},
    {"a\tb\tc\na\t\tc\n", "line 2: column 2 is empty"},
    {"a\tb\tc\na\tb\t", "line 2: column 3 is empty"},
    {"a\tb\na\tb\\x\n", "line 2: unknown escape \\x"},
    {"a\tb\na\tb\\", "line 2: a backslash without its letter"},
    {"a\tb\\\na\tb\n", "line 1: a backslash without its letter"},
    {"a\tb\r\na\tb\r\n", "line 1: ends in a carriage return"},
    {"a\tb\na\tb\r", "line 2: ends in a carriage return"},
    {"a\tb\tc\n\xff\tb\tc\n", "line 2: the name is not UTF-8"},
    {"a\tb\tc\n\xed\xa0\x80\tb\tc\n", "line 2: the name is not UTF-8"},
    {"a\tb\tc\n\xc3\tb\tc\n", "line 2: the name is not UTF-8"},
};

static void bad_lines_are_refused(void **state)
{
    (void)state;
    const char *out = in_folder("bad.h5");
    const char *path = in_folder("a.tsv");
    char long_name[400];
    for (size_t i = 0; i < sizeof bad_lines / sizeof *bad_lines; i++) {
        write_text("a.tsv", bad_lines[i].text);
        expect_refusal(dataset_pack(out, path, NULL, NULL), LS_ERR_FORMAT, bad_lines[i].words, bad_lines[i].text);
        assert_non_null(strstr(ls_last_error(), "a.tsv"));
    }
    write_bytes(path, "a\tb\nc\td\0e\n", 10);
    expect_refusal(dataset_pack(out, path, NULL, NULL), LS_ERR_FORMAT, "line 2: a NUL byte", "NUL");
    memset(long_name, 'x', 300);
    strcpy(long_name + 300, "\ts\tt\n");
    write_text("a.tsv", long_name);
    expect_refusal(dataset_pack(out, path, NULL, NULL), LS_ERR_FORMAT, "line 1: the name has 300 bytes", "long name");
    assert_false(exists(out));
    assert_int_equal(count_files(folder, ".tmp"), 0);
}

static void bad_places_are_refused(void **state)
{
    (void)state;
    const char *a = write_text("a.tsv", "s\tt\n"), *out = in_folder("kept.h5");
    expect_refusal(dataset_pack(in_folder("a.tsv/x.h5"), a, NULL, NULL), LS_ERR_IO, "cannot be written",
                   "below a file");
    expect_refusal(dataset_pack("/proc/x.h5", a, NULL, NULL), LS_ERR_IO, "/proc/x.h5: cannot be written", "/proc");
    expect_refusal(dataset_pack("/nowhere/at/all/x.h5", a, NULL, NULL), LS_ERR_IO, "cannot be written", "no directory");
    expect_refusal(dataset_pack(folder, a, NULL, NULL), LS_ERR_IO, "not a plain file has this name", "a directory");
    expect_refusal(dataset_pack(out, in_folder("nope"), NULL, NULL), LS_ERR_IO, "nope: cannot be read", "no input");
    expect_refusal(dataset_pack(out, "/dev/null", NULL, NULL), LS_ERR_ARGUMENT, "not a plain file", "a device");
    expect_refusal(dataset_pack(out, NULL, NULL, NULL), LS_ERR_ARGUMENT, "nothing to pack", "no input");
    expect_refusal(dataset_pack(out, a, "", NULL), LS_ERR_ARGUMENT, "the name of an input is empty", "empty name");
    assert_false(exists(out));
    expect_ok(dataset_pack(out, a, NULL, NULL), "pack");
    write_text("bad.tsv", "s\n");
    expect_refusal(dataset_pack(out, a, in_folder("bad.tsv"), NULL), LS_ERR_FORMAT, "bad.tsv: line 1", "second split");
    dataset_close(opened(out)); /* the old one is untouched */
    assert_int_equal(count_files(folder, ".tmp"), 0);
}

/* Only a data set is replaced: by another name, too, an input stays what it was. */
static void other_files_are_not_replaced(void **state)
{
    (void)state;
    const char *a = write_text("a.tsv", "s\tt\n"), *link = in_folder("link.h5"), *bare = in_folder("bare.h5");
    assert_int_equal(symlink(a, link), 0);
    expect_refusal(dataset_pack(a, a, NULL, NULL), LS_ERR_ARGUMENT, "a.tsv is an input", "itself");
    expect_refusal(dataset_pack(link, NULL, NULL, a), LS_ERR_ARGUMENT, "link.h5 is an input", "by a link");
    write_text("b.tsv", "s\tt\n");
    expect_refusal(dataset_pack(in_folder("b.tsv"), a, NULL, NULL), LS_ERR_ARGUMENT, "is not a data set", "a text");
    H5Fclose(H5Fcreate(bare, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT));
    expect_refusal(dataset_pack(bare, a, NULL, NULL), LS_ERR_ARGUMENT, "is not a data set", "other HDF5");
    size_t n;
    unsigned char *bytes = read_bytes(a, &n);
    assert_int_equal(n, 4);
    free(bytes);
    expect_ok(dataset_pack(in_folder("twice.h5"), a, NULL, NULL), "pack");
    expect_ok(dataset_pack(in_folder("twice.h5"), NULL, a, NULL), "pack again");
    assert_int_equal(count_files(folder, ".tmp"), 0);
}

/* ------------------------------------------------------------------------------------------------ accidents */

static void write_many_lines(const char *name, int lines)
{
    FILE *f = fopen(in_folder(name), "wb");
    assert_non_null(f);
    for (int i = 0; i < lines; i++) fprintf(f, "document %d\t%0500d\t%0300d\n", i, i, -i);
    fclose(f);
}

static void killed_packing_leaves_whole_or_nothing(void **state)
{
    (void)state;
    write_many_lines("many.tsv", 4000);
    const char *in = in_folder("many.tsv"), *out = in_folder("killed.h5");
    int whole = 0;
    for (uint64_t k = 0; k < 12; k++) {
        remove(out);
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) _exit(dataset_pack(out, in, NULL, NULL) == LS_OK ? 0 : 1);
        const struct timespec pause = {0, (long)draw_below(k, 200) * 1000000};
        nanosleep(&pause, NULL);
        kill(child, SIGKILL);
        assert_int_equal(waitpid(child, NULL, 0), child);
        if (!exists(out)) continue;
        dataset *d = opened(out);
        assert_int_equal(dataset_documents(d, "train"), 4000);
        dataset_close(d);
        whole++;
    }
    print_message("%d of 12 were done before they were killed\n", whole);
    expect_ok(dataset_pack(out, in, NULL, NULL), "after the accidents");
    dataset_close(opened(out));
    assert_int_equal(count_files(folder, ".tmp"), 0);
}

/* A limit on the size of files stands for a full disk; it also hits where HDF5 writes late. */
static void full_disk_is_told(void **state)
{
    (void)state;
    write_many_lines("many.tsv", 4000);
    const char *in = in_folder("many.tsv"), *out = in_folder("full.h5");
    static const rlim_t limits[] = {0, 100, 3000, 1000000, 4000000, 6400000};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            const struct rlimit limit = {limits[i], limits[i]};
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &limit);
            const ls_status status = dataset_pack(out, in, NULL, NULL);
            const int told = status == LS_ERR_IO && strstr(ls_last_error(), "full.h5") != NULL;
            const int ended = H5close() >= 0; /* what HDF5 does at the end of a program */
            _exit(told && ended && !exists(out) ? 0 : 1);
        }
        int how = 0;
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_int_equal(how, 0);
    }
    assert_int_equal(count_files(folder, ".tmp"), 0);
}

/* ------------------------------------------------------------------------------------------------ commands */

static char *said; /* what the last command wrote on standard output */
static size_t said_size;

static int run(int (*command)(int, char **, ranks *), const char *const *words)
{
    char *argv[10] = {0};
    int argc = 0;
    for (; words[argc] != NULL; argc++) argv[argc] = strdup(words[argc]);
    ranks r = {.world = alone, .size = 1, .groups = 1};
    fflush(stdout);
    fflush(stderr);
    const int kept[2] = {dup(1), dup(2)};
    assert_non_null(freopen(in_folder("stdout"), "wb", stdout));
    assert_non_null(freopen(in_folder("stderr"), "wb", stderr));
    const int code = command(argc, argv, &r);
    fflush(stdout);
    fflush(stderr);
    for (int i = 0; i < 2; i++) {
        dup2(kept[i], i + 1);
        close(kept[i]);
    }
    free(said);
    said = (char *)read_bytes(in_folder("stdout"), &said_size);
    said[said_size] = 0;
    for (int i = 0; i < argc; i++) free(argv[i]);
    return code;
}
#define RUN(command, ...) run(command, (const char *const[]){__VA_ARGS__, NULL})

static void commands_pack_and_inspect(void **state)
{
    (void)state;
    const char *in = write_text("in.tsv", "n1\tabc\tde\nn2\tabcdefg\te\nn3\ta\ted\n"), *out = in_folder("cli.h5");
    assert_int_equal(RUN(command_pack, "pack", "--train", in, "--valid", in, "--out", out), EXIT_OK);
    assert_int_equal(RUN(command_inspect, "inspect", out), EXIT_OK);
    assert_non_null(strstr(said, "longspan-pairs, version 1"));
    assert_non_null(strstr(said, "train: in.tsv"));
    assert_int_equal(RUN(command_inspect, "inspect", "--json", out), EXIT_OK);
    json_t *facts = json_loads(said, 0, NULL);
    assert_non_null(facts);
    json_int_t version, documents, tokens, median, longest;
    int verified;
    assert_int_equal(json_unpack(facts, "{s:I, s:b, s:{s:{s:I, s:{s:I, s:I, s:I}}}}", "version", &version, "verified",
                                 &verified, "splits", "valid", "documents", &documents, "source", "tokens", &tokens,
                                 "median", &median, "longest", &longest),
                     0);
    assert_true(version == 1 && verified && documents == 3 && tokens == 11 && median == 3 && longest == 7);
    json_decref(facts);
    assert_int_equal(RUN(command_pack, "pack", "--help"), EXIT_OK);
    assert_non_null(strstr(said, "usage: longspan pack"));
    assert_int_equal(RUN(command_inspect, "inspect", "--help"), EXIT_OK);
    assert_int_equal(RUN(command_pack, "pack", "--train", in), EXIT_USAGE);
    assert_int_equal(RUN(command_pack, "pack", "--out", out), EXIT_USAGE);
    assert_int_equal(RUN(command_pack, "pack", "--train", in, "--train", in, "--out", out), EXIT_USAGE);
    assert_int_equal(RUN(command_pack, "pack", "--train", "", "--out", out), EXIT_USAGE);
    assert_int_equal(RUN(command_pack, "pack", "--frobnicate"), EXIT_USAGE);
    assert_int_equal(RUN(command_pack, "pack", in, "--out", out), EXIT_USAGE);
    assert_int_equal(RUN(command_inspect, "inspect"), EXIT_USAGE);
    assert_int_equal(RUN(command_inspect, "inspect", out, out), EXIT_USAGE);
    assert_int_equal(RUN(command_inspect, "inspect", in), EXIT_FORMAT);
    assert_int_equal(RUN(command_inspect, "inspect", folder), EXIT_IO);
    assert_int_equal(RUN(command_pack, "pack", "--train", "/nowhere", "--out", out), EXIT_IO);
    assert_int_equal(said_size, 0);
    free(said);
    said = NULL;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lines_come_back),
        cmocka_unit_test(byte_order_mark_is_skipped),
        cmocka_unit_test(directories_come_back),
        cmocka_unit_test(blocks_come_back),
        cmocka_unit_test(same_input_same_bytes),
        cmocka_unit_test(bad_lines_are_refused),
        cmocka_unit_test(bad_places_are_refused),
        cmocka_unit_test(other_files_are_not_replaced),
        cmocka_unit_test(killed_packing_leaves_whole_or_nothing),
        cmocka_unit_test(full_disk_is_told),
        cmocka_unit_test(commands_pack_and_inspect),
    };
    return cmocka_run_group_tests_name("pack", tests, start, stop);
}
