/* Checkpoints: what was saved comes back bit for bit, or is refused in clear words, whatever happened to the file or to
 * the program that wrote it. The model is a made-up list of tensors: that is all checkpoints know of one. */
#include "checkpoint.h"

#include "files.h"

#include <math.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <xxhash.h>

struct model {
    int tensors;
    int64_t count;
    model_tensor tensor[16];
};

int model_num_tensors(const model *m)
{
    return m->tensors;
}

const model_tensor *model_tensor_at(const model *m, int i)
{
    return &m->tensor[i];
}

int64_t model_count(const model *m)
{
    return m->count;
}

static void add_tensor(model *m, const char *name, int ndim, int64_t a, int64_t b)
{
    model_tensor *t = &m->tensor[m->tensors++];
    *t = (model_tensor){.ndim = ndim, .dim = {a, b}, .offset = m->count, .count = a * (ndim > 1 ? b : 1)};
    snprintf(t->name, sizeof t->name, "%s", name);
    m->count += t->count;
}

/* More tensors than fit into the header of a group, not in the order of their names, one large. */
static model usual_model(void)
{
    model m = {0};
    add_tensor(&m, "embedding", 2, 16, 8);
    add_tensor(&m, "encoder.1.ffn.0.weight", 2, 3, 5);
    add_tensor(&m, "encoder.0.ffn.0.weight", 2, 5, 3);
    add_tensor(&m, "encoder.0.attention.q_proj.weight", 2, 4, 4);
    add_tensor(&m, "encoder.10.norm.bias", 1, 7, 0);
    add_tensor(&m, "encoder.0.norm.bias", 1, 7, 0);
    for (int i = 0; i < 6; i++) {
        char name[32];
        snprintf(name, sizeof name, "decoder.%d.scale", i);
        add_tensor(&m, name, 1, 1 + i, 0);
    }
    return m;
}

/* ------------------------------------------------------------------------------------------------ states */

static const char config_words[] = "model:\n  embed_dim: 8 # \xc3\xa9\n";

static training_state room_for(const model *m)
{
    const size_t n = (size_t)m->count;
    training_state s = {.params = calloc(n, sizeof(ls_real)),
                        .adam_m = calloc(n, sizeof(ls_real)),
                        .adam_v = calloc(n, sizeof(ls_real))};
    assert_true(s.params != NULL && s.adam_m != NULL && s.adam_v != NULL);
    return s;
}

static void state_free(training_state *s)
{
    free(s->params);
    free(s->adam_m);
    free(s->adam_v);
}

/* Different for every step, in every value; with the values that are easily lost. */
static training_state state_at(const model *m, int64_t step)
{
    training_state s = room_for(m);
    s.step = step;
    s.samples = step * 12;
    s.seed = UINT64_MAX - 5;
    s.data_digest = 0x123456789abcdef0;
    s.best_nll = step == 0 ? INFINITY : 1.0 / 3;
    for (int64_t i = 0; i < m->count; i++) {
        s.params[i] = (ls_real)(sin((double)i) + (double)step);
        s.adam_m[i] = (ls_real)(1e-30 * (double)(i + step));
        s.adam_v[i] = (ls_real)(1e-42 * (double)(i + step)); /* denormal */
    }
    s.params[1] = -0.0f;
    s.params[2] = INFINITY;
    s.params[3] = NAN;
    return s;
}

static int same_bytes(const model *m, const training_state *a, const training_state *b)
{
    const size_t bytes = (size_t)m->count * sizeof(ls_real);
    return a->step == b->step && a->samples == b->samples && a->seed == b->seed && a->data_digest == b->data_digest &&
           memcmp(&a->best_nll, &b->best_nll, sizeof a->best_nll) == 0 && memcmp(a->params, b->params, bytes) == 0 &&
           memcmp(a->adam_m, b->adam_m, bytes) == 0 && memcmp(a->adam_v, b->adam_v, bytes) == 0;
}

static void expect_step(const char *path, const model *m, int64_t step)
{
    training_state saved = state_at(m, step), loaded = room_for(m);
    expect_ok(checkpoint_load(path, m, &loaded), path);
    assert_true(same_bytes(m, &saved, &loaded));
    state_free(&saved);
    state_free(&loaded);
}

static void save_step(const char *directory, int best, int64_t keep, const model *m, int64_t step)
{
    training_state s = state_at(m, step);
    expect_ok(checkpoint_save(directory, best, keep, m, config_words, &s), directory);
    state_free(&s);
}

/* A fresh directory below the folder. */
static const char *fresh(const char *name)
{
    const char *path = in_folder(name);
    remove_tree(path);
    assert_int_equal(mkdir(path, 0777), 0);
    return path;
}

static const char *below(const char *directory, const char *name)
{
    char both[256];
    snprintf(both, sizeof both, "%s/%s", directory + strlen(folder) + 1, name);
    return in_folder(both);
}

/* The file, opened for changes by hand. */
static hid_t open_to_change(const char *path)
{
    const hid_t f = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    assert_true(f >= 0);
    return f;
}

static void change_number(hid_t f, const char *object, const char *name, uint64_t value)
{
    const hid_t o = H5Oopen(f, object, H5P_DEFAULT), a = H5Aopen(o, name, H5P_DEFAULT);
    assert_true(a >= 0 && H5Awrite(a, H5T_NATIVE_UINT64, &value) >= 0);
    H5Aclose(a);
    H5Oclose(o);
}

/* ------------------------------------------------------------------------------------------------ save and load */

static void comes_back(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("run");
    char latest[1200], *text;
    expect_ok(checkpoint_latest(run, latest), "latest of none");
    assert_string_equal(latest, "");
    expect_ok(checkpoint_latest(in_folder("nowhere"), latest), "latest of nowhere");
    assert_string_equal(latest, "");
    save_step(run, 0, 3, &m, 0);
    expect_ok(checkpoint_latest(run, latest), "latest");
    assert_string_equal(latest, below(run, "step-000000.h5"));
    expect_step(latest, &m, 0);
    save_step(run, 1, 3, &m, 123);
    expect_step(below(run, "best.h5"), &m, 123);
    save_step(run, 1, 3, &m, 124); /* replaces */
    expect_step(below(run, "best.h5"), &m, 124);
    expect_ok(checkpoint_config(latest, &text), "config");
    assert_string_equal(text, config_words);
    free(text);

    /* parameters alone */
    training_state saved = state_at(&m, 0), s = {.params = calloc((size_t)m.count, sizeof(ls_real))};
    expect_ok(checkpoint_load(latest, &m, &s), "params alone");
    assert_memory_equal(s.params, saved.params, (size_t)m.count * sizeof(ls_real));
    assert_null(s.adam_m);
    assert_true(isinf(s.best_nll));
    state_free(&s);
    state_free(&saved);
}

static void keeps_the_newest(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("keep");
    char latest[1200];
    write_bytes(below(run, "step-12.h5"), "", 0); /* not ours: too few digits */
    write_bytes(below(run, "step-0000001.h5.bak"), "", 0);
    for (int64_t step = 10; step <= 50; step += 10) save_step(run, 0, 2, &m, step);
    assert_int_equal(count_files(run, ""), 4);
    expect_step(below(run, "step-000040.h5"), &m, 40);
    expect_step(below(run, "step-000050.h5"), &m, 50);
    save_step(run, 0, 2, &m, 1234567); /* more digits: newer by number, not by name */
    expect_ok(checkpoint_latest(run, latest), "latest");
    assert_string_equal(latest, below(run, "step-1234567.h5"));
    save_step(run, 0, 1, &m, 20); /* going on from an earlier step: what was saved just now stays */
    assert_int_equal(count_files(run, "step-"), 3);
    expect_step(below(run, "step-000020.h5"), &m, 20);
    save_step(run, 0, 0, &m, 30);
    assert_int_equal(count_files(run, "step-"), 4);
}

/* best.h5 alone is a checkpoint like others; beside one that is damaged the newest whole one is found. */
static void finds_what_to_go_on_from(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("found"), *best = below(run, "best.h5"), *newest = below(run, "step-000007.h5");
    char path[1200];
    save_step(run, 1, 1, &m, 4);
    expect_ok(checkpoint_latest(run, path), "latest");
    assert_string_equal(path, best);
    for (int64_t step = 5; step <= 7; step++) save_step(run, 0, 9, &m, step);
    expect_ok(checkpoint_latest(run, path), "latest");
    assert_string_equal(path, newest);
    const int from_the_newest[] = {7, 6, 5};
    static const char *const wanted[] = {"step-000006.h5", "step-000005.h5", "best.h5"};
    for (int i = 0; i < 3; i++) {
        char name[32];
        snprintf(name, sizeof name, "step-%06d.h5", from_the_newest[i]);
        const hid_t f = open_to_change(below(run, name));
        change_number(f, "params/embedding", "digest", 4);
        H5Fclose(f);
        expect_ok(checkpoint_other(newest, path), "other");
        assert_string_equal(path, below(run, wanted[i]));
    }
    remove(best);
    expect_ok(checkpoint_other(newest, path), "none");
    assert_string_equal(path, "");
}

static void removes_leftovers(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("left");
    write_bytes(below(run, ".step-000007.h5.tmp.12345"), "x", 1);
    write_bytes(below(run, ".best.h5.tmp.1"), "x", 1);
    write_bytes(below(run, ".step-notes"), "x", 1);
    write_bytes(below(run, "metrics.jsonl"), "x", 1);
    save_step(run, 0, 1, &m, 8);
    assert_int_equal(count_files(run, ""), 3);
    assert_int_equal(count_files(run, ".tmp"), 0);
}

static void summary_tells(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("summary");
    save_step(run, 0, 1, &m, 9);
    checkpoint_summary s;
    expect_ok(checkpoint_summarize(below(run, "step-000009.h5"), &s), "summary");
    assert_int_equal(s.tensors, m.tensors);
    assert_int_equal(s.count, m.count);
    assert_int_equal(s.state.step, 9);
    assert_string_equal(s.config, config_words);
    assert_string_equal(s.tensor[0].name, "decoder.0.scale");
    assert_string_equal(s.tensor[6].name, "embedding");
    assert_int_equal(s.tensor[6].dim[0], 16);
    assert_true(isnan(s.tensor[6].norm[0]));
    double square = 0;
    const int64_t at = m.tensor[1].offset;
    for (int64_t i = at; i < at + 15; i++) square += pow((double)(ls_real)(sin((double)i) + 9), 2);
    assert_string_equal(s.tensor[s.tensors - 1].name, "encoder.10.norm.bias");
    assert_true(fabs(s.tensor[s.tensors - 2].norm[0]) > 0);
    for (int64_t i = 0; i < s.tensors; i++)
        if (strcmp(s.tensor[i].name, "encoder.1.ffn.0.weight") == 0)
            assert_true(fabs(s.tensor[i].norm[0] - sqrt(square)) < 1e-9);
    checkpoint_summary_free(&s);
}

/* ------------------------------------------------------------------------------------------------ another model */

static void other_models_are_refused(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("other"), *path = below(run, "step-000001.h5");
    save_step(run, 0, 1, &m, 1);
    for (int what = 0; what < 4; what++) {
        static const char *const words[] = {"tensor params/zzz is missing",
                                            "tensor params/encoder.0.norm.bias does not belong to the model",
                                            "params/embedding is 16x8, but the model has 8x16",
                                            "params/encoder.0.norm.bias is 7, but the model has 7x1"};
        model other = m;
        if (what == 0) add_tensor(&other, "zzz", 1, 3, 0);
        if (what == 1) snprintf(other.tensor[5].name, sizeof other.tensor[5].name, "zncoder.0.norm.bias");
        if (what == 2) other.tensor[0].dim[0] = 8, other.tensor[0].dim[1] = 16;
        if (what == 3) other.tensor[5].ndim = 2, other.tensor[5].dim[1] = 1;
        training_state s = room_for(&other);
        s.step = -77;
        s.params[0] = 5;
        expect_refusal(checkpoint_load(path, &other, &s), LS_ERR_FORMAT, words[what], words[what]);
        assert_int_equal(s.step, -77);
        assert_true(s.params[0] == 0);
        state_free(&s);
    }
}

/* ------------------------------------------------------------------------------------------------ wrong files */

static ls_status load_it(const char *path, const model *m)
{
    training_state s = room_for(m);
    const ls_status status = checkpoint_load(path, m, &s);
    state_free(&s);
    return status;
}

static void wrong_files_are_refused(void **state)
{
    (void)state;
    const model m = usual_model();
    char *text;
    expect_refusal(load_it(in_folder("nope.h5"), &m), LS_ERR_IO, "nope.h5: cannot be opened (No such file", "missing");
    expect_refusal(load_it(folder, &m), LS_ERR_IO, "is a directory", "directory");
    expect_refusal(load_it("/dev/null", &m), LS_ERR_IO, "is not a plain file", "device");
    expect_refusal(load_it(write_text("text.h5", "hello"), &m), LS_ERR_FORMAT, "is not an HDF5 file", "text");
    expect_refusal(load_it(write_text("empty.h5", ""), &m), LS_ERR_FORMAT, "is not an HDF5 file", "empty");
    expect_refusal(checkpoint_config(in_folder("text.h5"), &text), LS_ERR_FORMAT, "is not an HDF5 file", "config");
    const char *a = write_text("a.tsv", "s\tt\n"), *data = in_folder("data.h5");
    expect_ok(dataset_pack(data, a, NULL, NULL), "pack");
    expect_refusal(load_it(data, &m), LS_ERR_FORMAT, "this is a data set", "data set");
    const hid_t bare = H5Fcreate(in_folder("bare.h5"), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    H5Fclose(bare);
    expect_refusal(load_it(in_folder("bare.h5"), &m), LS_ERR_FORMAT, "is not a checkpoint of Longspan", "bare");
}

static void bad_places_are_refused(void **state)
{
    (void)state;
    const model m = usual_model();
    training_state s = state_at(&m, 1), empty = {0};
    const char *file = write_text("file", "x");
    expect_refusal(checkpoint_save(file, 0, 1, &m, "", &s), LS_ERR_IO, "step-000001.h5: cannot be written", "file");
    expect_refusal(checkpoint_save("/proc", 1, 1, &m, "", &s), LS_ERR_IO, "/proc/best.h5: cannot be written", "/proc");
    expect_refusal(checkpoint_save(in_folder("nope"), 0, 1, &m, "", &s), LS_ERR_IO, "cannot be written", "nowhere");
    expect_refusal(checkpoint_save(folder, 0, 1, &m, "", &empty), LS_ERR_ARGUMENT, "nothing to save", "no arrays");
    state_free(&s);
}

/* ------------------------------------------------------------------------------------------------ damage */

/* Changes that HDF5's own checksums cannot see, each in a fresh file. */
static void changes_are_noticed(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("changed"), *path = below(run, "step-000003.h5");
    static const struct {
        const char *object, *attribute, *words;
        uint64_t value;
    } changes[] = {
        {"/", "version", "format version 7, this program reads 1", 7},
        {"/", "step", "do not match state_digest", 4},
        {"/", "samples", "do not match state_digest", 4},
        {"/", "seed", "do not match state_digest", 4},
        {"/", "data_digest", "do not match state_digest", 4},
        {"/", "best_nll", "do not match state_digest", 4},
        {"/", "count", "do not match state_digest", 4},
        {"/", "digest", "do not match state_digest", 4},
        {"adam_v/embedding", "digest", "adam_v/embedding does not match its digest", 4},
        {"params/decoder.5.scale", "digest", "params/decoder.5.scale does not match its digest", 4},
    };
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        save_step(run, 0, 1, &m, 3);
        const hid_t f = open_to_change(path);
        change_number(f, changes[i].object, changes[i].attribute, changes[i].value);
        H5Fclose(f);
        expect_refusal(load_it(path, &m), LS_ERR_FORMAT, changes[i].words, changes[i].attribute);
    }

    /* a tensor and its digest, both changed: only the digest of all can tell */
    save_step(run, 0, 1, &m, 3);
    hid_t f = open_to_change(path);
    const float zeros[7] = {0};
    hid_t d = H5Dopen2(f, "adam_m/encoder.0.norm.bias", H5P_DEFAULT);
    assert_true(d >= 0 && H5Dwrite(d, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, zeros) >= 0);
    H5Dclose(d);
    change_number(f, "adam_m/encoder.0.norm.bias", "digest", XXH3_64bits(zeros, sizeof zeros));
    H5Fclose(f);
    expect_refusal(load_it(path, &m), LS_ERR_FORMAT, "do not match the attribute digest", "consistent change");

    /* one tensor too many, one too few, a link to another file */
    save_step(run, 0, 1, &m, 3);
    f = open_to_change(path);
    assert_true(H5Lcopy(f, "params/embedding", f, "params/more", H5P_DEFAULT, H5P_DEFAULT) >= 0 ||
                H5Lcreate_hard(f, "params/embedding", f, "params/more", H5P_DEFAULT, H5P_DEFAULT) >= 0);
    H5Fclose(f);
    expect_refusal(load_it(path, &m), LS_ERR_FORMAT, "params/more does not belong to the model", "too many");
    save_step(run, 0, 1, &m, 3);
    f = open_to_change(path);
    assert_true(H5Ldelete(f, "adam_v/embedding", H5P_DEFAULT) >= 0);
    H5Fclose(f);
    expect_refusal(load_it(path, &m), LS_ERR_FORMAT, "adam_v/embedding is missing", "too few");
    save_step(run, 1, 1, &m, 3);
    save_step(run, 0, 1, &m, 3);
    f = open_to_change(path);
    assert_true(H5Ldelete(f, "params/embedding", H5P_DEFAULT) >= 0);
    assert_true(H5Lcreate_external("best.h5", "params/embedding", f, "params/embedding", H5P_DEFAULT, H5P_DEFAULT) >=
                0);
    H5Fclose(f);
    expect_refusal(load_it(path, &m), LS_ERR_FORMAT, "params cannot be listed (a link to elsewhere)", "external link");
}

static void truncated_is_refused(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("short"), *path = below(run, "step-000003.h5"), *cut = in_folder("cut.h5");
    size_t n;
    save_step(run, 0, 1, &m, 3);
    unsigned char *bytes = read_bytes(path, &n);
    for (size_t length = 0; length < n; length += 1 + n / 97) {
        write_bytes(cut, bytes, length);
        expect_refusal(load_it(cut, &m), LS_ERR_FORMAT, length < 8 ? "is not an HDF5 file" : "cut.h5", "truncated");
    }
    write_bytes(cut, bytes, n - 1);
    expect_refusal(load_it(cut, &m), LS_ERR_FORMAT, "is truncated or damaged (HDF5: truncated file", "one byte less");
    free(bytes);
}

/* Either the same state comes back or there is a sentence. */
static void expect_same_or_refused(const char *path, const model *m, const training_state *saved, int64_t bit,
                                   int *refused)
{
    training_state s = room_for(m);
    const ls_status status = checkpoint_load(path, m, &s);
    if (status == LS_OK && !same_bytes(m, &s, saved)) fail_msg("bit %lld changed the state", (long long)bit);
    if (status == LS_OK) {
        char *text;
        expect_ok(checkpoint_config(path, &text), "config");
        if (strcmp(text, config_words) != 0) fail_msg("bit %lld changed the configuration", (long long)bit);
        free(text);
    } else {
        if (status != LS_ERR_FORMAT && status != LS_ERR_IO)
            fail_msg("bit %lld: %s: %s", (long long)bit, ls_status_name(status), ls_last_error());
        assert_non_null(strstr(ls_last_error(), path));
        ++*refused;
    }
    state_free(&s);
}

static void flipped_bits_are_noticed(void **state)
{
    (void)state;
    enum { FLIPS = 600 };
    const model m = usual_model();
    const char *run = fresh("flips"), *path = below(run, "step-000003.h5"), *copy = in_folder("flipped.h5");
    size_t n;
    int refused = 0;
    save_step(run, 0, 1, &m, 3);
    training_state saved = state_at(&m, 3);
    unsigned char *bytes = read_bytes(path, &n);
    for (uint64_t k = 0; k < FLIPS; k++) {
        /* the first bytes are the superblock, which every reading begins with */
        const int64_t bit = k < 48 * 8 && k % 2 == 0 ? (int64_t)k : draw_below(k, (int64_t)n * 8);
        bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
        write_bytes(copy, bytes, n);
        bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
        expect_same_or_refused(copy, &m, &saved, bit, &refused);
    }
    print_message("%d of %d flips in %zu bytes were refused, the others changed nothing\n", refused, (int)FLIPS, n);
    assert_true(refused > FLIPS / 2);
    free(bytes);
    state_free(&saved);
}

/* ------------------------------------------------------------------------------------------------ accidents */

static void save_for_ever(const char *run, const model *m)
{
    for (int64_t step = 1;; step++) {
        training_state s = state_at(m, step);
        if (checkpoint_save(run, 0, 2, m, config_words, &s) != LS_OK) _exit(1);
        if (checkpoint_save(run, 1, 2, m, config_words, &s) != LS_OK) _exit(2);
        state_free(&s);
    }
}

static void killed_saving_leaves_whole_files(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("killed");
    int64_t steps = 0, latest_step = 0;
    int temporaries = 0;
    for (uint64_t k = 0; k < 25; k++) {
        fflush(stdout);
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) save_for_ever(run, &m);
        const struct timespec pause = {0, 2000000 + (long)draw_below(k, 60000000)};
        nanosleep(&pause, NULL);
        kill(child, SIGKILL);
        int how = 0;
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_true(WIFSIGNALED(how));
        temporaries += count_files(run, ".tmp");
        char latest[1200];
        expect_ok(checkpoint_latest(run, latest), "latest");
        if (latest[0] == 0) continue;
        assert_int_equal(sscanf(strrchr(latest, '/'), "/step-%lld.h5", (long long *)&latest_step), 1);
        expect_step(latest, &m, latest_step);
        steps += latest_step;
        if (!exists(below(run, "best.h5"))) continue;
        checkpoint_summary s;
        expect_ok(checkpoint_summarize(below(run, "best.h5"), &s), "best");
        expect_step(below(run, "best.h5"), &m, s.state.step);
        checkpoint_summary_free(&s);
    }
    print_message("killed 25 times after %lld saves, %d times within one\n", (long long)steps, temporaries);
    save_step(run, 0, 2, &m, 1);
    assert_int_equal(count_files(run, ".tmp"), 0);
}

/* A limit on the size of files stands for a full disk. */
static void full_disk_keeps_the_old(void **state)
{
    (void)state;
    const model m = usual_model();
    const char *run = fresh("full");
    save_step(run, 0, 1, &m, 1);
    size_t n;
    free(read_bytes(below(run, "step-000001.h5"), &n));
    for (size_t limit = 0; limit < n; limit += 1 + n / 23) {
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            const struct rlimit bytes = {limit, limit};
            training_state s = state_at(&m, 2);
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &bytes);
            const ls_status status = checkpoint_save(run, 0, 1, &m, config_words, &s);
            const int told = status == LS_ERR_IO && strstr(ls_last_error(), "step-000002.h5") != NULL;
            _exit(told && H5close() >= 0 ? 0 : 1);
        }
        int how = 0;
        assert_int_equal(waitpid(child, &how, 0), child);
        assert_int_equal(how, 0);
        assert_int_equal(count_files(run, ""), 1);
    }
    expect_step(below(run, "step-000001.h5"), &m, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(comes_back),
        cmocka_unit_test(keeps_the_newest),
        cmocka_unit_test(finds_what_to_go_on_from),
        cmocka_unit_test(removes_leftovers),
        cmocka_unit_test(summary_tells),
        cmocka_unit_test(other_models_are_refused),
        cmocka_unit_test(wrong_files_are_refused),
        cmocka_unit_test(bad_places_are_refused),
        cmocka_unit_test(changes_are_noticed),
        cmocka_unit_test(truncated_is_refused),
        cmocka_unit_test(flipped_bits_are_noticed),
        cmocka_unit_test(killed_saving_leaves_whole_files),
        cmocka_unit_test(full_disk_keeps_the_old),
    };
    return cmocka_run_group_tests_name("checkpoint", tests, make_folder, remove_folder);
}
