/* The configuration: what it accepts, what it refuses and in which words, and that it survives being written. */
#include "comm.h"
#include "config.h"
#include "trainer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static ls_status parse(const char *text, config *c)
{
    return config_parse("a.yaml", text, strlen(text), NULL, 0, c);
}

static ls_status set(const char *text, const char *assignment, config *c)
{
    return config_parse("a.yaml", text, strlen(text), &assignment, 1, c);
}

static void assert_contains(const char *message, const char *fragment, const char *of)
{
    if (strstr(message, fragment) == NULL) fail_msg("%s\n  gave:   %s\n  wanted: %s", of, message, fragment);
    if (strchr(message, '\n') != NULL) fail_msg("%s: more than one line: %s", of, message);
}

/* The first mechanism that has an option, and its first option: the tests know no mechanism but softmax by name. */
static const char *with_options(const ls_option_info **option)
{
    for (int i = 0; ls_mechanism_name(i) != NULL; i++) {
        int count;
        *option = ls_mechanism_options(ls_mechanism_name(i), &count);
        if (count > 0 && ls_mechanism_has(ls_mechanism_name(i), LS_NS)) return ls_mechanism_name(i);
    }
    fail_msg("no mechanism has options");
    return NULL;
}

/* ------------------------------------------------------------------------------------------------ what is refused */

static const struct {
    const char *text, *message;
    ls_status status;
} bad[] = {
    {"model:\n  embed_dimm: 3\n", "a.yaml:2: model.embed_dimm: unknown key (did you mean embed_dim?)", LS_ERR_ARGUMENT},
    {"train:\n  embed_dim: 3\n", "a.yaml:2: train.embed_dim: unknown key (did you mean model.embed_dim?)",
     LS_ERR_ARGUMENT},
    {"modle:\n  embed_dim: 3\n", "a.yaml:1: modle: unknown key (did you mean model?)", LS_ERR_ARGUMENT},
    {"zebra: 3\n", "a.yaml:1: zebra: unknown key", LS_ERR_ARGUMENT},
    {"model:\n\n# comment\n  encoder:\n    mechanism: softmax\n    options:\n      frobnicate: 1\n",
     "a.yaml:7: model.encoder.options.frobnicate: unknown key", LS_ERR_ARGUMENT},
    {"model:\n  encoder:\n    mechanism: sotfmax\n",
     "a.yaml:3: model.encoder.mechanism: 'sotfmax' is no mechanism (did you mean softmax?): use ", LS_ERR_ARGUMENT},
    {"model:\n  encoder: softmax\n", "a.yaml:2: model.encoder: expected keys with values", LS_ERR_ARGUMENT},
    {"model: 3\n", "a.yaml:1: model: expected keys with values", LS_ERR_ARGUMENT},
    {"model:\n", "a.yaml:1: model: expected keys with values", LS_ERR_ARGUMENT},
    {"- 1\n- 2\n", "a.yaml:1: expected keys with values", LS_ERR_ARGUMENT},
    {"just words\n", "a.yaml:1: expected keys with values", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: abc\n", "a.yaml:2: model.embed_dim: 'abc' is not a whole number", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: 2.5\n", "a.yaml:2: model.embed_dim: '2.5' is not a whole number", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim:\n", "a.yaml:2: model.embed_dim: '' is not a whole number", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: ~\n", "a.yaml:2: model.embed_dim: '~' is not a whole number", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: [64]\n", "a.yaml:2: model.embed_dim: expected a single value, found a list",
     LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: {a: 1}\n", "a.yaml:2: model.embed_dim: expected a single value, found keys",
     LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: 0\n", "a.yaml:2: model.embed_dim: 0 is out of range: allowed is [1, 1048576]",
     LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: -4\n", "-4 is out of range", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: 99999999999999999999999\n", "out of range", LS_ERR_ARGUMENT},
    {"train:\n  steps: 9000000000000000K\n", "a.yaml:2: train.steps: 9000000000000000K is out of range",
     LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: 64Q\n", "'64Q' is not a whole number", LS_ERR_ARGUMENT},
    {"model:\n  dropout: 1\n", "a.yaml:2: model.dropout: 1 is out of range: allowed is [0, 1)", LS_ERR_ARGUMENT},
    {"model:\n  dropout: -0.1\n", "out of range", LS_ERR_ARGUMENT},
    {"model:\n  dropout: nan\n", "a.yaml:2: model.dropout: 'nan' is not a number", LS_ERR_ARGUMENT},
    {"train:\n  clip_norm: inf\n", "a.yaml:2: train.clip_norm: inf is out of range: allowed is [0, inf)",
     LS_ERR_ARGUMENT},
    {"train:\n  steps: 1e3\n", "a.yaml:2: train.steps: '1e3' is not a whole number", LS_ERR_ARGUMENT},
    {"train:\n  steps: 0\n", "0 is out of range: allowed is [1, 1000000000000]", LS_ERR_ARGUMENT},
    {"train: {steps: 3}\nmodel:\n  decoder: {mechanism: nystrom}\n",
     "a.yaml:3: model.decoder.mechanism: nystrom: ", LS_ERR_UNSUPPORTED},
    {"train:\n  accumulation: 3\n", "a.yaml:2: train.batch: 8 is not a multiple of train.accumulation=3",
     LS_ERR_ARGUMENT},
    {"train:\n  epsilon: 0\n", "a.yaml:2: train.epsilon: 0 is out of range: allowed is [1e-30, 1]", LS_ERR_ARGUMENT},
    {"train:\n  beta2: 1.0\n", "train.beta2: 1.0 is out of range", LS_ERR_ARGUMENT},
    {"train:\n  learning_rate: 1e-3x\n", "'1e-3x' is not a number", LS_ERR_ARGUMENT},
    {"train:\n  seed: -1\n", "a.yaml:2: train.seed: '-1' is not a whole number from 0 to 2^64-1", LS_ERR_ARGUMENT},
    {"train:\n  seed: 18446744073709551616\n", "is not a whole number from 0", LS_ERR_ARGUMENT},
    {"train:\n  schedule: linear\n", "a.yaml:2: train.schedule: 'linear' is not cosine, inverse_sqrt or constant",
     LS_ERR_ARGUMENT},
    {"model:\n  tie_embeddings: yes\n", "a.yaml:2: model.tie_embeddings: 'yes' is not false or true", LS_ERR_ARGUMENT},
    {"train:\n  steps: 5\n  batch: 4\n  steps: 6\n", "a.yaml:4: train.steps: was already given in line 2",
     LS_ERR_ARGUMENT},
    {"train: {steps: 5}\nmodel: {num_heads: 2}\ntrain: {batch: 4}\n", "a.yaml:3: train: was already given in line 1",
     LS_ERR_ARGUMENT},
    {"train:\n  steps: 5\n batch: 4\n", "a.yaml:3: not YAML: ", LS_ERR_ARGUMENT},
    {"train:\n\tsteps: 5\n", "a.yaml:2: not YAML: ", LS_ERR_ARGUMENT},
    {"train: {steps: 5\n", "not YAML: ", LS_ERR_ARGUMENT},
    {"run:\n  directory: \"a\\0b\"\n", "a.yaml:2: run.directory: the value contains a zero byte", LS_ERR_ARGUMENT},
    {"run:\n  directory: \xff\xfe\xff\n", "a.yaml: not a text file", LS_ERR_ARGUMENT},
    {"train: {steps: 5}\n---\ntrain: {steps: 6}\n", "a.yaml:3: a second document begins here", LS_ERR_ARGUMENT},
    {"? [1, 2]\n: 3\n", "a.yaml:1: a key must be a word", LS_ERR_ARGUMENT},
    {"train: &a\n  train: *a\n", "a.yaml:2: train.train: unknown key", LS_ERR_ARGUMENT},
    {"model:\n  embed_dim: 100\n  num_heads: 3\n",
     "a.yaml:2: model.embed_dim: 100 cannot be shared by model.num_heads=3", LS_ERR_ARGUMENT},
    {"train:\n  batch: 8\n  accumulation: 3\n", "a.yaml:2: train.batch: 8 is not a multiple of train.accumulation=3",
     LS_ERR_ARGUMENT},
    {"train:\n  learning_rate: 1e-4\n  min_learning_rate: 1e-3\n", "a.yaml:3: train.min_learning_rate: 0.001 is above",
     LS_ERR_ARGUMENT},
    {"train: {precision: bf16}\n", "a.yaml:1: train.precision: bf16 is for GPUs: it needs device: cuda",
     LS_ERR_ARGUMENT},
    {"device: cpu\ntrain: {precision: tf32}\n", "a.yaml:2: train.precision: tf32 is for GPUs", LS_ERR_ARGUMENT},
    {"train:\n  precision: fp16\n", "a.yaml:2: train.precision: 'fp16' is not float32, tf32 or bf16", LS_ERR_ARGUMENT},
    {"device: tpu\n", "a.yaml:1: device: 'tpu' is not cpu or cuda", LS_ERR_ARGUMENT},
};

static void refuses(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        config c;
        const ls_status status = parse(bad[i].text, &c);
        if (status != bad[i].status) {
            fail_msg("%s\n  gave %s: %s", bad[i].text, ls_status_name(status), status ? ls_last_error() : "");
        }
        assert_contains(ls_last_error(), bad[i].message, bad[i].text);
    }
}

/* A build refuses the backends that it was made without, and takes those that it has. */
static void refuses_what_is_not_built(void **state)
{
    (void)state;
    config c;
    if (ls_device_find(LS_CUDA) == NULL) {
        assert_int_equal(parse("device: cuda\n", &c), LS_ERR_UNSUPPORTED);
        assert_contains(ls_last_error(), "device: cuda: this build has no CUDA backend", "");
    } else {
        assert_int_equal(parse("device: cuda\n", &c), LS_OK);
        assert_int_equal(c.train.precision, LS_FLOAT32);
        assert_int_equal(parse("device: cuda\ntrain: {precision: tf32}\n", &c), LS_OK);
        assert_int_equal(c.train.precision, LS_TF32);
        assert_int_equal(parse("device: cuda\ntrain: {precision: bf16}\n", &c), LS_OK);
        assert_int_equal(c.train.precision, LS_BF16);
    }
    if (!ls_has_nccl()) {
        assert_int_equal(parse("parallel: {transport: nccl}\n", &c), LS_ERR_UNSUPPORTED);
        assert_contains(ls_last_error(), "parallel.transport: nccl: this build has no NCCL transport", "");
    } else {
        assert_int_equal(parse("parallel: {transport: nccl}\n", &c), LS_ERR_ARGUMENT);
        assert_contains(ls_last_error(), "parallel.transport: nccl carries tensors of GPUs", "");
        assert_int_equal(parse("device: cuda\nparallel: {transport: nccl}\n", &c), LS_OK);
    }
}

static const struct {
    const char *set, *message;
} bad_set[] = {
    {"model.embed_dim=abc", "--set model.embed_dim=abc: 'abc' is not a whole number"},
    {"model.embed_dim", "--set model.embed_dim: expected model.embed_dim=VALUE"},
    {"model.embed_dimm=3", "--set model.embed_dimm=3: unknown key (did you mean embed_dim?)"},
    {"model=3", "--set model=3: this is a section, not a key"},
    {"=3", "--set =3: unknown key"},
    {"", "--set : unknown key"},
    {"train.beta1=1", "--set train.beta1=1: 1 is out of range: allowed is [0, 1)"},
    {"model.cross.mechanism=zzz", "--set model.cross.mechanism=zzz: 'zzz' is no mechanism: use "},
    {"train.accumulation=3", "--set train.accumulation=3: train.batch: 8 is not a multiple of train.accumulation=3"},
    {"train.min_learning_rate=1", "--set train.min_learning_rate=1: train.min_learning_rate: 1 is above"},
    {"model.decoder.mechanism=cosformer",
     "--set model.decoder.mechanism=cosformer: model.decoder.mechanism: cosformer"},
    {"train.precision=bf16", "--set train.precision=bf16: train.precision: bf16 is for GPUs"},
    {"run.directory=\xc3", "run.directory=\xc3: is not UTF-8"},
};

static void refuses_set(void **state)
{
    (void)state;
    config c;
    for (size_t i = 0; i < sizeof bad_set / sizeof *bad_set; i++) {
        assert_int_equal(set("", bad_set[i].set, &c), LS_ERR_ARGUMENT);
        assert_contains(ls_last_error(), bad_set[i].message, bad_set[i].set);
    }
    char longest[1100] = "run.directory=";
    memset(longest + 14, 'a', 1024);
    assert_int_equal(set("", longest, &c), LS_ERR_ARGUMENT);
    assert_int_equal(strncmp(ls_last_error(), "--set run.directory=aaa", 23), 0);
    longest[14 + 1023] = 0;
    assert_int_equal(set("", longest, &c), LS_OK);
    assert_int_equal(strlen(c.run.directory), 1023);
}

/* With what some patterns of the mechanism cannot do without, unless that is what is tried; returns how many. */
static int needs(const char *place, const char *mechanism, const char *tried, char text[160], const char **assignments)
{
    int count;
    const ls_option_info *option = ls_mechanism_options(mechanism, &count);
    for (int o = 0; o < count; o++) {
        if (strcmp(option[o].name, "max_len") != 0 || strcmp(tried, "max_len") == 0) continue;
        snprintf(text, 160, "model.%s.options.max_len=64", place);
        assignments[0] = text;
        return 1;
    }
    return 0;
}

static void refuses_patterns(void **state)
{
    (void)state;
    static const struct {
        const char *place;
        ls_pattern pattern;
        const char *message;
    } each[] = {{"encoder", LS_NS, "noncausal self attention is not supported"},
                {"decoder", LS_CS, "causal self attention is not supported"},
                {"cross", LS_CC, "causal cross attention is not supported"}};
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        for (int i = 0; i < 3; i++) {
            char assignment[100], wanted[200], more[160];
            const char *assignments[2] = {assignment};
            config c;
            snprintf(assignment, sizeof assignment, "model.%s.mechanism=%s", each[i].place, ls_mechanism_name(m));
            const int count = 1 + needs(each[i].place, ls_mechanism_name(m), "", more, assignments + 1);
            const ls_status status = config_parse("a.yaml", "", 0, assignments, count, &c);
            assert_int_equal(status,
                             ls_mechanism_has(ls_mechanism_name(m), each[i].pattern) ? LS_OK : LS_ERR_UNSUPPORTED);
            if (status == LS_OK) continue;
            snprintf(wanted, sizeof wanted, "model.%s.mechanism: %s: %s", each[i].place, ls_mechanism_name(m),
                     each[i].message);
            assert_contains(ls_last_error(), wanted, assignment);
        }
    }
    config c; /* options that do not go together are the mechanism's to refuse, and have their place */
    assert_int_equal(set("", "model.decoder.mechanism=cosformer", &c), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), "model.decoder.mechanism: cosformer: ", "cosformer without max_len");
    assert_int_equal(parse("", &c), LS_OK);
    strcpy(c.model.cross.mechanism, "nothing");
    assert_int_equal(config_check(&c), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), "model.cross.mechanism: attention: there is no mechanism \"nothing\"", "nothing");
}

/* Where a refusal has two sides, that which --set changed, else that which is refused; among them are those of the
 * library, ls_attention_check, which knows no keys. */
static void blames_what_was_given(void **state)
{
    (void)state;
    static const struct {
        const char *text, *set, *message; /* set: NULL, or beside the file */
    } each[] = {
        {"model:\n  encoder:\n    mechanism: abc\n    dropout: 0.1\n", NULL,
         "a.yaml:4: model.encoder.dropout: abc: dropout of attention probabilities is not supported"},
        {"model:\n  encoder: {mechanism: abc}\n", "model.encoder.dropout=0.1",
         "--set model.encoder.dropout=0.1: model.encoder.dropout: abc: dropout"},
        {"model:\n  encoder: {dropout: 0.1}\n", "model.encoder.mechanism=abc",
         "--set model.encoder.mechanism=abc: model.encoder.dropout: abc: dropout"},
        {"model:\n  encoder:\n    mechanism: nystrom\n    options:\n      conv_kernel: 4\n", NULL,
         "a.yaml:5: model.encoder.options.conv_kernel: nystrom: conv_kernel 4 is even"},
        {"model:\n  cross:\n    mechanism: nystrom\n    options:\n      conv_kernel: 3\n", NULL,
         "a.yaml:5: model.cross.options.conv_kernel: nystrom: conv_kernel 3: causal cross attention has no"},
        {"model:\n  encoder: {mechanism: s4d}\n", "model.encoder.options.state_size=3",
         "--set model.encoder.options.state_size=3: model.encoder.options.state_size: s4d: state_size 3 is odd"},
        {"model:\n  decoder:\n    mechanism: cosformer\n", NULL,
         "a.yaml:3: model.decoder.mechanism: cosformer: causal self attention needs max_len"},
        {"model:\n  decoder:\n    mechanism: cosformer\n    options: {max_len: 64}\n",
         "model.decoder.options.max_len=0",
         "--set model.decoder.options.max_len=0: model.decoder.mechanism: cosformer: causal self attention needs"},
        {"device: cpu\ntrain: {learning_rate: 1e-2}\nmodel: {embed_dim: 100, num_heads: 4}\n", "model.num_heads=3",
         "--set model.num_heads=3: model.embed_dim: 100 cannot be shared by model.num_heads=3"},
        {"train: {min_learning_rate: 1e-3}\n", "train.learning_rate=1e-4",
         "--set train.learning_rate=1e-4: train.min_learning_rate: 0.001 is above train.learning_rate=0.0001"},
        {"train: {precision: bf16}\n", "device=cpu", "--set device=cpu: train.precision: bf16 is for GPUs"},
    };
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        config c;
        const char *text = each[i].text;
        const ls_status status = config_parse("a.yaml", text, strlen(text), &each[i].set, each[i].set != NULL, &c);
        if (status == LS_OK) fail_msg("%s was taken", text);
        assert_int_equal(strncmp(ls_last_error(), each[i].message, strcspn(each[i].message, " ")), 0);
        assert_contains(ls_last_error(), each[i].message, text);
    }
}

static void refuses_what_has_no_effect(void **state)
{
    (void)state;
    static const char given[] = "data: {path: a.h5}\nrun: {directory: b}\n";
    static const struct {
        const char *set, *message; /* NULL: it has an effect */
    } each[] = {
        {"train.steps=3", NULL},
        {"train.short_length=64", "train.short_length: 64 has no effect without train.short_steps"},
        {"train.short_steps=5", "train.short_steps: 5 has no effect without train.short_length"},
        {"train.lengthen_steps=7", "train.lengthen_steps: 7 has no effect without train.short_length"},
        {"train.min_learning_rate=1e-5", NULL},
        {"data.path=", "data.path: which data set?"},
        {"run.directory=", "run.directory: where do"},
        {"model.encoder.scale=0.5", NULL},
    };
    static const struct {
        const char *set[2], *message;
    } attention[] = {
        {{"model.encoder.mechanism=cosformer", "model.encoder.scale=0.5"},
         "model.encoder.scale: 0.5 has no effect: cosformer has no logits to scale"},
        {{"model.decoder.mechanism=s4d", "model.decoder.scale=2"}, "model.decoder.scale: 2 has no effect"},
        {{"model.encoder.mechanism=lara", "model.encoder.scale=2"}, NULL},
        {{"model.cross.mechanism=local", "model.cross.options.align=1"},
         "model.cross.options.align: 1 has no effect: it is for noncausal cross attention"},
        {{"model.encoder.mechanism=longshort", "model.encoder.options.chunk=16"},
         "model.encoder.options.chunk: 16 has no effect: it is for causal self attention"},
        {{"model.decoder.mechanism=longshort", "model.decoder.options.chunk=16"}, NULL},
    };
    config c;
    for (size_t i = 0; i < sizeof attention / sizeof *attention; i++) {
        const char *message = attention[i].message, *const *both = attention[i].set;
        assert_int_equal(config_parse("a.yaml", given, strlen(given), both, 2, &c), LS_OK);
        assert_int_equal(config_check_training(&c), message == NULL ? LS_OK : LS_ERR_ARGUMENT);
        if (message != NULL) assert_contains(ls_last_error(), message, both[1]);
    }
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        assert_int_equal(set(given, each[i].set, &c), LS_OK);
        assert_int_equal(config_check_training(&c), each[i].message == NULL ? LS_OK : LS_ERR_ARGUMENT);
        if (each[i].message != NULL) assert_contains(ls_last_error(), each[i].message, each[i].set);
    }
    const char *both[] = {"train.short_length=64", "train.lengthen_steps=7"};
    assert_int_equal(config_parse("a.yaml", given, strlen(given), both, 2, &c), LS_OK);
    assert_int_equal(config_check_training(&c), LS_OK);
    const char *flat[] = {"train.schedule=constant", "train.min_learning_rate=1e-5"};
    assert_int_equal(config_parse("a.yaml", given, strlen(given), flat, 2, &c), LS_OK);
    assert_int_equal(config_check_training(&c), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), "train.min_learning_rate: 1e-05 has no effect with train.schedule=constant",
                    "flat");
}

static void knows_whom_padding_matters_to(void **state)
{
    (void)state;
    static const struct {
        const char *set[2];
        int counts;
    } each[] = {
        {{"model.encoder.mechanism=softmax", "model.cross.mechanism=abc"}, 0},
        {{"model.encoder.mechanism=lara", "model.cross.mechanism=abc"}, 1},
        {{"model.encoder.mechanism=local", "model.cross.mechanism=nystrom"}, 1},
        {{"model.encoder.mechanism=local", "model.cross.mechanism=local"}, 0},
        {{"model.encoder.mechanism=cosformer", "model.encoder.options.max_len=0"}, 1},
        {{"model.encoder.mechanism=cosformer", "model.encoder.options.max_len=100"}, 0},
    };
    config c;
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        assert_int_equal(config_parse("a.yaml", "", 0, each[i].set, 2, &c), LS_OK);
        assert_null(config_mixes_rows(&c));
        assert_int_equal(config_counts_padding(&c), each[i].counts);
    }
    const char *mixing[] = {"model.cross.mechanism=nystrom", "model.cross.options.init=1"};
    config all;
    assert_int_equal(config_parse("a.yaml", "", 0, mixing, 2, &all), LS_OK);
    assert_string_equal(config_mixes_rows(&all), "nystrom");
    assert_int_equal(config_fits(&c, 100, 1000), LS_OK); /* the encoder sees no targets */
    assert_int_equal(config_fits(&c, 101, 10), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), "model.encoder.options.max_len: 100 is less than the 101 positions", "max_len");
}

static void knows_another_model(void **state)
{
    (void)state;
    config a, b;
    assert_int_equal(parse("", &a), LS_OK);
    assert_int_equal(set("", "model.dropout=0.5", &b), LS_OK);
    assert_null(config_other_model(&a, &b));
    assert_int_equal(set("", "train.steps=77", &b), LS_OK);
    assert_null(config_other_model(&a, &b));
    assert_int_equal(set("", "model.num_heads=8", &b), LS_OK);
    assert_non_null(config_other_model(&a, &b));
    assert_string_equal(config_other_model(&a, &b)->path, "model.num_heads");
}

static void refuses_files(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size = 0;
    assert_int_equal(read_file("/nowhere/a.yaml", CONFIG_LARGEST, &text, &size), LS_ERR_IO);
    assert_contains(ls_last_error(), "/nowhere/a.yaml: cannot be opened: No such file", "missing file");
    assert_int_equal(read_file("/", CONFIG_LARGEST, &text, &size), LS_ERR_IO);
    assert_contains(ls_last_error(), "/: cannot be ", "directory");
    free(text), text = NULL, size = 0;
    assert_int_equal(read_file("/dev/zero", CONFIG_LARGEST, &text, &size), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), "/dev/zero: has more than 1048576 bytes", "without an end");
    free(text);
}

/* ------------------------------------------------------------------------------------------------ options */

static void options_belong_to_their_mechanism(void **state)
{
    (void)state;
    const ls_option_info *option;
    const char *mechanism = with_options(&option);
    char text[300], wanted[300], assignment[200];
    config c;
    snprintf(text, sizeof text, "model:\n  encoder:\n    mechanism: %s\n    options: {%s: %g}\n", mechanism,
             option[0].name, option[0].max < 7 ? option[0].max : 7);
    assert_int_equal(parse(text, &c), LS_OK);
    assert_string_equal(c.model.encoder.mechanism, mechanism);
    assert_true(c.model.encoder.value[0] == (option[0].max < 7 ? option[0].max : 7));

    /* softmax is the default, and has not this one; the message lists what it has */
    snprintf(text, sizeof text, "model:\n  encoder:\n    options: {%s: 7}\n", option[0].name);
    snprintf(wanted, sizeof wanted, "a.yaml:3: model.encoder.options.%s: softmax has no such option (it has ",
             option[0].name);
    assert_int_equal(parse(text, &c), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), wanted, text);

    /* out of range: the mechanism says so, with its place */
    snprintf(text, sizeof text, "model:\n  encoder:\n    mechanism: %s\n    options: {%s: -12345}\n", mechanism,
             option[0].name);
    snprintf(wanted, sizeof wanted, "a.yaml:4: model.encoder.options.%s: ", option[0].name);
    assert_int_equal(parse(text, &c), LS_ERR_ARGUMENT);
    assert_contains(ls_last_error(), wanted, text);

    /* another mechanism by --set starts from its own options; the same one keeps those of the file */
    snprintf(text, sizeof text, "model:\n  encoder:\n    mechanism: %s\n    options: {%s: %.17g}\n", mechanism,
             option[0].name, option[0].max);
    assert_int_equal(set(text, "model.encoder.mechanism=softmax", &c), LS_OK);
    assert_string_equal(c.model.encoder.mechanism, "softmax");
    snprintf(assignment, sizeof assignment, "model.encoder.mechanism=%s", mechanism);
    assert_int_equal(set(text, assignment, &c), LS_OK);
    assert_true(c.model.encoder.value[0] == option[0].max);
}

/* ------------------------------------------------------------------------------------------------ values */

static void reads_values(void **state)
{
    (void)state;
    config c;
    assert_int_equal(parse("", &c), LS_OK);
    assert_string_equal(c.device, "cpu");
    assert_int_equal(c.data.verify, 1);
    assert_string_equal(c.model.cross.mechanism, "softmax");
    assert_int_equal(c.train.schedule, SCHEDULE_COSINE);
    assert_int_equal(parse("# only a comment\n", &c), LS_OK);
    assert_int_equal(parse("train:\n  seed: 18446744073709551615\n  schedule: inverse_sqrt\n  epsilon: 3e-9\n"
                           "data: {path: a b.h5, max_source: 64K, max_target: 1M, verify: false}\n"
                           "model: {activation: relu, embed_dim: \"12\", num_heads: 3}\n",
                           &c),
                     LS_OK);
    assert_true(c.train.seed == UINT64_MAX);
    assert_int_equal(c.train.schedule, SCHEDULE_INVERSE_SQRT);
    assert_true(c.train.epsilon == 3e-9);
    assert_string_equal(c.data.path, "a b.h5");
    assert_int_equal(c.data.max_source, 65536);
    assert_int_equal(c.data.max_target, 1048576);
    assert_int_equal(c.data.verify, 0);
    assert_int_equal(c.model.activation, ACTIVATION_RELU);
    assert_int_equal(c.model.embed_dim, 12);
    const char *both[] = {"train.steps=7", "train.steps=8"}; /* the last one counts, and both beat the file */
    assert_int_equal(config_parse("a.yaml", "train: {steps: 6}", 17, both, 2, &c), LS_OK);
    assert_int_equal(c.train.steps, 8);
    assert_int_equal(set("", "run.directory=a=b: c #d", &c), LS_OK);
    assert_string_equal(c.run.directory, "a=b: c #d");
}

/* A value of the key that is not its default, and needs no other key to change. */
static void another_value(const config_key *key, char *out, size_t size)
{
    const char *value = key->kind == KEY_TEXT   ? "somewhere"
                        : key->kind == KEY_SEED ? "77"
                        : key->kind == KEY_REAL ? "0.0003"
                                                : "512";
    if (strcmp(key->path, "model.num_heads") == 0) value = "16";
    if (strcmp(key->path, "train.accumulation") == 0) value = "2";
    if (key->words != NULL) value = key->words[strcmp(key->words[0], key->initial) == 0];
    if (key->kind == KEY_MECHANISM) value = "";
    snprintf(out, size, "%s", value);
}

static void every_key_can_be_set(void **state)
{
    (void)state;
    config before, c;
    assert_int_equal(parse("", &before), LS_OK);
    int tried = 0;
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const config_key *key = config_key_at(i);
        char value[64], assignment[160];
        if (key->kind == KEY_OPTION) continue;
        another_value(key, value, sizeof value);
        if (key->kind == KEY_MECHANISM) { /* any that can stand there */
            const ls_pattern pattern = strstr(key->path, "encoder")   ? LS_NS
                                       : strstr(key->path, "decoder") ? LS_CS
                                                                      : LS_CC;
            int m = 0;
            while (strcmp(ls_mechanism_name(m), "softmax") == 0 || !ls_mechanism_has(ls_mechanism_name(m), pattern))
                m++;
            snprintf(value, sizeof value, "%s", ls_mechanism_name(m));
        }
        snprintf(assignment, sizeof assignment, "%s=%s", key->path, value);
        const ls_status status = set("", assignment, &c);
        if (strcmp(key->path, "device") == 0) {
            /* understood, but perhaps not in this build */
            assert_int_equal(status, ls_device_find(LS_CUDA) == NULL ? LS_ERR_UNSUPPORTED : LS_OK);
        } else if (strcmp(key->path, "train.precision") == 0) {
            assert_int_equal(status, LS_ERR_ARGUMENT); /* understood, and not of the device that is the default */
        } else if (status != LS_OK) {
            fail_msg("%s", ls_last_error());
        }
        if (memcmp((char *)&before + key->offset, (char *)&c + key->offset, key->size) == 0) {
            fail_msg("%s changed nothing", assignment);
        }
        memcpy((char *)&c + key->offset, (char *)&before + key->offset, key->size);
        if (key->kind != KEY_MECHANISM) assert_memory_equal(&c, &before, sizeof c); /* and nothing else */
        tried++;
    }
    assert_true(tried > 40);
}

static void every_option_can_be_set(void **state)
{
    (void)state;
    static const char *const where[] = {"encoder", "decoder", "cross"};
    int tried = 0;
    for (int m = 0; ls_mechanism_name(m) != NULL; m++) {
        int count;
        const ls_option_info *option = ls_mechanism_options(ls_mechanism_name(m), &count);
        for (int o = 0; o < count; o++) {
            for (int w = 0; w < 3; w++) {
                const ls_pattern pattern[] = {LS_NS, LS_CS, LS_CC};
                if (!ls_mechanism_has(ls_mechanism_name(m), pattern[w])) continue;
                char mechanism[100], value[160];
                const double x = option[o].initial == option[o].min ? option[o].max : option[o].min;
                snprintf(mechanism, sizeof mechanism, "model.%s.mechanism=%s", where[w], ls_mechanism_name(m));
                snprintf(value, sizeof value, "model.%s.options.%s=%.17g", where[w], option[o].name, x);
                char more[160];
                const char *assignments[3] = {value, mechanism}; /* in either order */
                const int given = 2 + needs(where[w], ls_mechanism_name(m), option[o].name, more, assignments + 2);
                config c;
                const ls_status status = config_parse("a.yaml", "", 0, assignments, given, &c);
                if (w == 2 && strcmp(option[o].name, "conv_kernel") == 0) { /* an option of self attention alone */
                    assert_int_equal(status, LS_ERR_UNSUPPORTED);
                    continue;
                }
                if (status != LS_OK) fail_msg("%s", ls_last_error());
                const config_attention *a = w == 0 ? &c.model.encoder : w == 1 ? &c.model.decoder : &c.model.cross;
                assert_true(a->value[o] == x);
                tried++;
            }
        }
    }
    assert_true(tried > 0);
}

static void survives_writing(void **state)
{
    (void)state;
    const ls_option_info *option;
    const char *mechanism = with_options(&option);
    char first[100], second[160];
    snprintf(first, sizeof first, "model.encoder.mechanism=%s", mechanism);
    snprintf(second, sizeof second, "model.encoder.options.%s=%.17g", option[0].name, option[0].max);
    const char *assignments[] = {
        first, second, "train.learning_rate=0.00012345678901234567", "train.weight_decay=4.9e-324",
        "model.dropout=0.33333333333333331", "train.seed=18446744073709551615",
        "train.clip_norm=1.7976931348623157e308",
        /* every kind of character that a path may hold and a reader of YAML may stumble over */
        "run.directory=a \"b\" \\c: #d 'e' \t\x01\x7f\n \xc2\x85 \xc3\xa9 \xe2\x80\xa8\xe2\x80\xa9\xef\xbb\xbf "
        "\xf0\x9f\x98\x80",
        "data.path= - *x ", "train.recompute=true", "train.schedule=constant"};
    config c, again;
    if (config_parse("a.yaml", "", 0, assignments, sizeof assignments / sizeof *assignments, &c) != LS_OK) {
        fail_msg("%s", ls_last_error());
    }
    char *text = NULL, *twice = NULL;
    assert_int_equal(config_text(&c, &text), LS_OK);
    if (parse(text, &again) != LS_OK) fail_msg("%s\n%s", ls_last_error(), text);
    assert_memory_equal(&c, &again, sizeof c);
    assert_int_equal(config_text(&again, &twice), LS_OK);
    assert_string_equal(text, twice);
    free(text);
    free(twice);
}

static void reference_names_every_key(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size;
    FILE *out = open_memstream(&text, &size);
    config_reference(out);
    fclose(out);
    for (int i = 0; config_key_at(i) != NULL; i++) {
        const char *path = config_key_at(i)->path;
        const char *name = config_key_at(i)->kind == KEY_OPTION ? strrchr(path, '.') + 1 : path;
        assert_contains(strstr(text, name) ? name : "", name, "reference");
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refuses),
        cmocka_unit_test(refuses_what_is_not_built),
        cmocka_unit_test(refuses_set),
        cmocka_unit_test(refuses_patterns),
        cmocka_unit_test(blames_what_was_given),
        cmocka_unit_test(refuses_what_has_no_effect),
        cmocka_unit_test(knows_whom_padding_matters_to),
        cmocka_unit_test(knows_another_model),
        cmocka_unit_test(refuses_files),
        cmocka_unit_test(options_belong_to_their_mechanism),
        cmocka_unit_test(reads_values),
        cmocka_unit_test(every_key_can_be_set),
        cmocka_unit_test(every_option_can_be_set),
        cmocka_unit_test(survives_writing),
        cmocka_unit_test(reference_names_every_key),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
