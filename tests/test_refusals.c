/* What the public interface refuses, on every rank and in one sentence: what is missing, what differs between ranks,
 * what cannot be counted. Nothing but the public header: as another program sees the library. test_laws.c has what
 * single mechanisms refuse.
 *
 * In each case either all ranks are wrong or the last one alone is; all verdicts are made from sums over all ranks. */
#include "longspan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { E = 8, H = 2, B = 2, L = 9, MOST_PARAMS = 1 << 14 };

static ls_context *ctx;
static int rank, size, last; /* last: this is the last rank, which errs */
static ls_real *x, *y, *params, *grads;

static int any(int wrong)
{
    int answer = 0;
    MPI_Allreduce(&wrong, &answer, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    return answer;
}

static void must(ls_status status)
{
    if (status != LS_OK) print_message("rank %d: %s\n", rank, ls_last_error());
    assert_false(any(status != LS_OK));
}

/* On each rank, with `part` in its sentence. */
static void refused(ls_status status, ls_status want, const char *part)
{
    const int wrong = status != want || strstr(ls_last_error(), part) == NULL;
    if (wrong)
        print_message("rank %d: %s, \"%s\": wanted %s with \"%s\"\n", rank, ls_status_name(status), ls_last_error(),
                      ls_status_name(want), part);
    assert_false(any(wrong));
}

/* How a sentence about the last rank begins, which alone was wrong. */
static const char *blamed(const char *sentence)
{
    static char text[256];
    if (size == 1) snprintf(text, sizeof text, "%s", sentence);
    if (size > 1) snprintf(text, sizeof text, "rank %d: %s", size - 1, sentence);
    return text;
}
static const char *differs(void)
{
    static char text[64];
    snprintf(text, sizeof text, "rank %d differs from rank 0", size - 1);
    return text;
}

static ls_attention *make(const char *mechanism, ls_pattern pattern)
{
    ls_attention_options o;
    ls_attention *a;
    must(ls_attention_defaults(mechanism, &o));
    (void)ls_attention_set(&o, "max_len", 64); /* cosformer's steps ask for it */
    o.pattern = pattern, o.level = LS_LEVEL_LAYER, o.embed_dim = E, o.num_heads = H;
    must(ls_attention_create(ctx, &o, &a));
    assert_true(ls_attention_param_count(a) <= MOST_PARAMS);
    return a;
}

/* ------------------------------------------------------------------------------------------------ what is missing */

static void test_nothing(void **unused)
{
    (void)unused;
    ls_attention *a = make("softmax", LS_CS);
    ls_attention_options o;
    ls_shard s;
    ls_saved *saved;
    ls_state *state;
    must(ls_shard_even(ctx, L, &s));
    must(ls_saved_create(a, &saved));
    const ls_attention_shape shape = {.batch = B, .queries = &s};
    const ls_attention_io io = {.query = x};
    const ls_attention_grads g = {.query = grads};

    refused(ls_context_create(NULL, &(ls_context *){NULL}), LS_ERR_ARGUMENT, "context: options is NULL");
    const ls_context_options same = {.comm = MPI_COMM_WORLD};
    ls_context *other = NULL;
    refused(ls_context_create(&same, last ? NULL : &other), LS_ERR_ARGUMENT, blamed("context: ctx is NULL"));
    assert_null(other);

    refused(ls_attention_defaults("abc", NULL), LS_ERR_ARGUMENT, "options is NULL");
    refused(ls_attention_set(NULL, "num_slots", 3), LS_ERR_ARGUMENT, "mechanism");
    must(ls_attention_defaults("abc", &o));
    refused(ls_attention_set(&o, NULL, 3), LS_ERR_ARGUMENT, "NULL");
    refused(ls_attention_check(NULL), LS_ERR_ARGUMENT, "options is NULL");
    o.embed_dim = E, o.num_heads = H;
    ls_attention *b = NULL;
    refused(ls_attention_create(NULL, &o, &b), LS_ERR_ARGUMENT, "context is NULL");
    refused(ls_attention_create(ctx, last ? NULL : &o, &b), LS_ERR_ARGUMENT, blamed("attention: options is NULL"));
    refused(ls_attention_create(ctx, &o, last ? NULL : &b), LS_ERR_ARGUMENT, blamed("attention: "));
    assert_null(b);

    refused(ls_shard_even(ctx, L, NULL), LS_ERR_ARGUMENT, "shard is NULL");
    refused(ls_shard_even(NULL, L, &(ls_shard){0}), LS_ERR_ARGUMENT, "context is NULL");
    refused(ls_shard_local(ctx, 3, last ? NULL : &(ls_shard){0}), LS_ERR_ARGUMENT, blamed("shard: "));
    ls_saved *none = saved;
    refused(ls_saved_create(NULL, &none), LS_ERR_ARGUMENT, "attention is NULL");
    assert_null(none);

    refused(ls_attention_forward(NULL, &shape, &io, params, y, saved), LS_ERR_ARGUMENT, "attention is NULL");
    refused(ls_attention_forward(a, last ? NULL : &shape, &io, params, y, saved), LS_ERR_ARGUMENT,
            blamed("softmax: shape is NULL"));
    refused(ls_attention_forward(a, &shape, last ? NULL : &io, params, y, saved), LS_ERR_ARGUMENT,
            blamed("softmax: io is NULL"));
    must(ls_attention_forward(a, &shape, &io, params, y, saved));
    refused(ls_attention_backward(NULL, &shape, &io, params, y, y, saved, &g), LS_ERR_ARGUMENT, "attention is NULL");
    refused(ls_attention_backward(a, last ? NULL : &shape, &io, params, y, y, saved, &g), LS_ERR_ARGUMENT,
            blamed("softmax: shape is NULL"));
    refused(ls_attention_backward(a, &shape, last ? NULL : &io, params, y, y, saved, &g), LS_ERR_ARGUMENT,
            blamed("softmax: io is NULL"));
    refused(ls_attention_backward(a, &shape, &io, params, y, y, saved, last ? NULL : &g), LS_ERR_ARGUMENT,
            blamed("softmax: grads is NULL"));
    must(ls_attention_backward(a, &shape, &io, params, y, y, saved, &g));

    refused(ls_state_create(NULL, B, L, &state), LS_ERR_ARGUMENT, "attention is NULL");
    state = NULL;
    refused(ls_state_create(a, B, L, last ? NULL : &state), LS_ERR_ARGUMENT, blamed("state: "));
    assert_null(state);
    must(ls_state_create(a, B, L, &state));
    refused(ls_attention_step(a, last ? NULL : state, &io, params, y), LS_ERR_ARGUMENT, blamed("softmax: "));
    refused(ls_attention_step(a, state, last ? NULL : &io, params, y), LS_ERR_ARGUMENT, blamed("softmax: io is NULL"));
    refused(ls_state_reorder(state, NULL), LS_ERR_ARGUMENT, "index is NULL");
    refused(ls_state_reorder(NULL, (int64_t[]){0, 0}), LS_ERR_ARGUMENT, "state is NULL");
    ls_state_free(state);
    ls_saved_free(saved);
    ls_shard_free(&s);
    ls_attention_free(a);
}

static void test_all_reduce(void **unused)
{
    (void)unused;
    refused(ls_all_reduce_sum(ctx, last ? NULL : y, 3), LS_ERR_ARGUMENT, blamed("all-reduce: x is NULL"));
    refused(ls_all_reduce_sum(ctx, y, last ? -1 : 3), LS_ERR_ARGUMENT, blamed("all-reduce: n -1 is negative"));
    if (size > 1) refused(ls_all_reduce_sum(ctx, y, last ? 3 : 4), LS_ERR_ARGUMENT, differs());
    must(ls_all_reduce_sum(ctx, NULL, 0));
}

/* ------------------------------------------------------------------------------------------------ sentences */

static void test_sentences(void **unused)
{
    (void)unused;
    ls_attention *a = make("softmax", LS_CS);
    ls_shard s;
    must(ls_shard_even(ctx, L, &s));
    const ls_attention_shape shape = {.batch = last ? -1 : B, .queries = &s};
    const ls_attention_io io = {.query = x};
    char want[256];
    memcpy(want, blamed("softmax: batch -1 must be positive"), sizeof want);
    ls_status status = ls_attention_forward(a, &shape, &io, params, y, NULL);
    for (int i = 0; i < 3; i++, status = ls_agree(ctx, status)) {
        refused(status, LS_ERR_ARGUMENT, want);
        assert_false(any(strcmp(ls_last_error(), want) != 0));
    }
    /* nobody said why: not what was said of another failure */
    refused(ls_agree(ctx, last ? LS_ERR_IO : LS_OK), LS_ERR_IO, blamed(ls_status_name(LS_ERR_IO)));
    refused(ls_agree(ctx, last ? (ls_status)99 : LS_OK), LS_ERR_ARGUMENT, blamed("there is no status 99"));
    refused(ls_agree(ctx, last ? ls_set_error(LS_ERR_FORMAT, "corpus.txt: 5% is read") : LS_OK), LS_ERR_FORMAT,
            blamed("corpus.txt: 5% is read"));
    must(ls_set_error(LS_OK, "all is well"));
    refused(ls_agree(NULL, LS_OK), LS_ERR_ARGUMENT, "context is NULL");
    ls_shard_free(&s);
    ls_attention_free(a);
}

/* ------------------------------------------------------------------------------------------------ what differs */

static void test_differences(void **unused)
{
    (void)unused;
    if (size == 1) return;
    ls_context *other = NULL;
    const ls_context_options seeds = {.comm = MPI_COMM_WORLD, .seed = (uint64_t)last};
    refused(ls_context_create(&seeds, &other), LS_ERR_ARGUMENT, "seed");
    refused(LS_ERR_ARGUMENT, LS_ERR_ARGUMENT, differs());
    assert_null(other);
    ls_attention_options o;
    ls_attention *a = NULL;
    must(ls_attention_defaults("softmax", &o));
    o.embed_dim = last ? 2 * E : E, o.num_heads = H;
    refused(ls_attention_create(ctx, &o, &a), LS_ERR_ARGUMENT, "options");
    refused(LS_ERR_ARGUMENT, LS_ERR_ARGUMENT, differs());
    assert_null(strstr(ls_last_error(), "batch")); /* there is none */
    assert_null(a);
    /* calls of other kinds */
    a = make("softmax", LS_CS);
    ls_state *state = NULL;
    refused(last ? ls_all_reduce_sum(ctx, y, 3) : ls_state_create(a, B, L, &state), LS_ERR_ARGUMENT, differs());
    ls_attention_free(a);
}

static void test_states(void **unused)
{
    (void)unused;
    for (int i = 0; ls_mechanism_name(i) != NULL; i++) {
        const char *name = ls_mechanism_name(i);
        if (!ls_mechanism_has_step(name, LS_CS)) continue;
        ls_attention *a = make(name, LS_CS), *b = make(name, LS_CS);
        ls_state *state = NULL;
        const ls_attention_io io = {.query = x};
        if (size > 1) {
            refused(ls_state_create(a, last ? B + 1 : B, L, &state), LS_ERR_ARGUMENT, differs());
            assert_null(state);
            refused(ls_state_create(a, B, last ? 1 : L, &state), LS_ERR_ARGUMENT, differs());
            assert_null(state);
        }
        must(ls_state_create(a, B, L, &state));
        must(ls_attention_step(a, state, &io, params, y));
        refused(ls_attention_step(last ? b : a, state, &io, params, y), LS_ERR_ARGUMENT, "another attention");
        /* rows that one rank did not reorder: the others hear of it in a step, and it can still be done */
        const int64_t there[] = {1, 0}, nowhere[] = {1, B};
        const ls_status status = ls_state_reorder(state, last ? nowhere : there);
        assert_false(any(status != (last ? LS_ERR_ARGUMENT : LS_OK)));
        if (size > 1) refused(ls_attention_step(a, state, &io, params, y), LS_ERR_ARGUMENT, differs());
        if (last) assert_int_equal(ls_state_reorder(state, there), LS_OK);
        must(ls_attention_step(a, state, &io, params, y));
        ls_state_free(state);
        ls_attention_free(a), ls_attention_free(b);
    }
}

/* Two states with the same source, of which one has then refused others: they go on alike. */
static void keeps_its_source(ls_attention *a, const ls_shard *keys, const ls_shard *longer)
{
    enum { MORE = 12 * L };
    ls_state *state[2];
    ls_real out[2][B * E];
    const uint8_t pad[MORE * B] = {0};
    const ls_attention_shape shape = {.batch = B, .keys = keys}, other = {.batch = B, .keys = longer};
    const ls_attention_shape odd = {.batch = last ? B + 1 : B, .keys = longer};
    const ls_attention_io source = {.key = x}, token = {.query = x + 3};
    ls_attention_io bad = {.key = x + 1, .key_padding_mask = last ? pad : NULL};
    for (int i = 0; i < 2; i++) {
        must(ls_state_create(a, B, L, &state[i]));
        must(ls_state_source(a, state[i], &shape, &source, params));
    }
    if (size > 1) refused(ls_state_source(a, state[1], &other, &bad, params), LS_ERR_ARGUMENT, differs());
    bad = (ls_attention_io){.key = last ? NULL : x + 1};
    refused(ls_state_source(a, state[1], &other, &bad, params), LS_ERR_ARGUMENT, blamed(""));
    refused(ls_state_source(a, state[1], &odd, &source, params), LS_ERR_ARGUMENT, "batch");
    for (int i = 0; i < 2; i++) must(ls_attention_step(a, state[i], &token, params, out[i]));
    assert_false(any(memcmp(out[0], out[1], sizeof out[0]) != 0 || out[0][0] == 0));
    for (int i = 0; i < 2; i++) ls_state_free(state[i]);
}

static void test_sources(void **unused)
{
    (void)unused;
    ls_shard many;
    must(ls_shard_even(ctx, 12 * L, &many));
    for (int i = 0; ls_mechanism_name(i) != NULL; i++) {
        const char *name = ls_mechanism_name(i);
        if (!ls_mechanism_has_step(name, LS_NC)) continue;
        ls_attention *a = make(name, LS_NC);
        ls_state *state;
        ls_shard keys, longer;
        const ls_attention_io io = {.key = x, .query = x};
        must(ls_state_create(a, B, L, &state));
        must(ls_shard_even(ctx, L, &keys));
        must(ls_shard_even(ctx, L + 1, &longer));
        const ls_attention_shape shape = {.batch = B, .keys = &keys}, other = {.batch = B, .keys = &longer};
        if (size > 1)
            refused(ls_state_source(a, state, last ? &other : &shape, &io, params), LS_ERR_ARGUMENT, differs());
        refused(ls_state_source(a, last ? NULL : state, &shape, &io, params), LS_ERR_ARGUMENT, "state is NULL");
        refused(ls_state_source(a, state, last ? NULL : &shape, &io, params), LS_ERR_ARGUMENT, "shape is NULL");
        refused(ls_state_source(a, state, &shape, last ? NULL : &io, params), LS_ERR_ARGUMENT, "io is NULL");
        must(ls_state_source(a, state, &shape, &io, params));
        const uint8_t pad[B] = {0};
        ls_attention_io token = {.query = x};
        if (last) token.query_padding_mask = pad;
        if (size > 1) refused(ls_attention_step(a, state, &token, params, y), LS_ERR_ARGUMENT, differs());
        token.query_padding_mask = pad;
        must(ls_attention_step(a, state, &token, params, y));
        ls_state_free(state);
        keeps_its_source(a, &keys, &many);
        ls_shard_free(&keys), ls_shard_free(&longer);
        ls_attention_free(a);
    }
    ls_shard_free(&many);
}

/* ------------------------------------------------------------------------------------------------ what is too large */

/* Memory for backward is of one context, and its device. */
static void test_saved(void **unused)
{
    (void)unused;
    const ls_context_options options = {.comm = MPI_COMM_WORLD};
    ls_context *other;
    ls_shard shard;
    ls_saved *saved, *theirs;
    must(ls_context_create(&options, &other));
    ls_attention *a = make("softmax", LS_NS), *b;
    ls_attention_options o;
    must(ls_attention_defaults("softmax", &o));
    o.level = LS_LEVEL_LAYER, o.embed_dim = E, o.num_heads = H;
    must(ls_attention_create(other, &o, &b));
    must(ls_saved_create(a, &saved));
    must(ls_saved_create(b, &theirs));
    must(ls_shard_even(ctx, L, &shard));
    const ls_attention_shape shape = {.batch = B, .queries = &shard};
    const ls_attention_io io = {.query = x};
    const ls_attention_grads g = {.query = grads};
    must(ls_attention_forward(b, &shape, &io, params, y, theirs));
    refused(ls_attention_forward(a, &shape, &io, params, y, last ? theirs : saved), LS_ERR_ARGUMENT,
            "saved belongs to another context");
    must(ls_attention_backward(b, &shape, &io, params, y, y, theirs, &g));
    /* backward with anything that forward had not; what forward saved is good for another try */
    static const uint8_t none[B * L];
    static const int32_t one[B * L];
    static ls_real weights[B * L * L];
    const ls_attention_io others[] = {{.query = x, .key_padding_mask = none},
                                      {.query = x, .query_segments = one},
                                      {.query = x, .attn_mask = weights},
                                      {.query = x, .dropout_mask = weights},
                                      {.query = x, .weights = weights, .need_weights = 1},
                                      {.query = x, .training = 1},
                                      {.query = x, .sample = 1}};
    must(ls_attention_forward(a, &shape, &io, params, y, saved));
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        refused(ls_attention_backward(a, &shape, last ? &others[i] : &io, params, y, y, saved, &g), LS_ERR_ARGUMENT,
                blamed("softmax: backward needs the shape and io of the forward call"));
    const ls_attention_shape smaller = {.batch = B - 1, .queries = &shard};
    refused(ls_attention_backward(a, last ? &smaller : &shape, &io, params, y, y, saved, &g), LS_ERR_ARGUMENT,
            blamed("softmax: backward needs the shape and io of the forward call"));
    must(ls_attention_backward(a, &shape, &io, params, y, y, saved, &g));
    /* and the other way round: weights are looked at where they lie, so that rows of a causal call lie elsewhere */
    must(ls_attention_forward(a, &shape, &others[4], params, y, saved));
    refused(ls_attention_backward(a, &shape, &io, params, y, y, saved, &g), LS_ERR_ARGUMENT,
            "softmax: backward needs the shape and io of the forward call");
    must(ls_attention_backward(a, &shape, &others[4], params, y, y, saved, &g));
    ls_shard_free(&shard);
    ls_saved_free(saved), ls_saved_free(theirs);
    ls_attention_free(a), ls_attention_free(b);
    ls_context_free(other);
}

/* Keys that begin where queries begin are not the same rows where they are not as many: they have their own gradient,
 * which is that of keys in other memory. */
static void test_same_pointer(void **unused)
{
    (void)unused;
    for (int level = LS_LEVEL_CORE; level <= LS_LEVEL_LAYER; level++)
        for (int queries = 0; queries < 2; queries++) { /* on rank 0 alone there are none, or half as many as keys */
            const int64_t T = rank > 0 || queries ? 2 : 0, S = 4, rows = B * S * E;
            ls_attention_options o;
            ls_attention *a;
            ls_saved *saved;
            ls_shard q, k;
            must(ls_attention_defaults("softmax", &o));
            o.pattern = LS_NC, o.level = (ls_level)level, o.layout = LS_BTHD, o.embed_dim = E, o.num_heads = H;
            must(ls_attention_create(ctx, &o, &a));
            must(ls_saved_create(a, &saved));
            if (any(rank > 0 || queries)) {
                ls_real *copy = calloc((size_t)rows, sizeof *copy), *dk[2], *dv = calloc((size_t)rows, sizeof *dv);
                for (int i = 0; i < 2; i++) dk[i] = calloc((size_t)rows, sizeof **dk);
                assert_false(copy == NULL || dv == NULL || dk[0] == NULL || dk[1] == NULL);
                memcpy(copy, x, (size_t)rows * sizeof *copy);
                must(ls_shard_local(ctx, T, &q));
                must(ls_shard_local(ctx, S, &k));
                const ls_attention_shape shape = {.batch = B, .queries = &q, .keys = &k};
                for (int i = 0; i < 2; i++) {
                    const ls_attention_io io = {.query = x, .key = i ? copy : x, .value = x + rows};
                    const ls_attention_grads g = {.query = grads, .key = dk[i], .value = dv, .params = grads + 512};
                    must(ls_attention_forward(a, &shape, &io, params, y, saved));
                    must(ls_attention_backward(a, &shape, &io, params, y, y, saved, &g));
                }
                assert_false(any(memcmp(dk[0], dk[1], (size_t)rows * sizeof *copy) != 0));
                int some = 0;
                for (int64_t i = 0; i < rows; i++) some |= dk[0][i] != 0;
                assert_true(any(some));
                ls_shard_free(&q), ls_shard_free(&k);
                free(copy), free(dv), free(dk[0]), free(dk[1]);
            }
            ls_saved_free(saved);
            ls_attention_free(a);
        }
}

/* BLAS counts with int, and random numbers leave 16 bits for the stream and for the head. */
static void test_counts(void **unused)
{
    (void)unused;
    ls_attention_options o;
    ls_attention *a = NULL;
    ls_shard one, many;
    const ls_attention_io io = {.query = x, .key = x, .value = x};
    must(ls_attention_defaults("softmax", &o));
    o.embed_dim = 1 << 16, o.num_heads = 1 << 16;
    refused(ls_attention_create(ctx, &o, &a), LS_ERR_ARGUMENT, "num_heads 65536 is more than 65535");
    o.layout = LS_TBHD, o.embed_dim = E, o.num_heads = H, o.stream = last ? 1 << 16 : 7;
    refused(ls_attention_create(ctx, &o, &a), LS_ERR_ARGUMENT, "stream 65536 is more than 65535");
    assert_null(a);
    o.stream = 65535;
    must(ls_attention_create(ctx, &o, &a));
    must(ls_shard_even(ctx, 1, &one));
    must(ls_shard_even(ctx, 1000 * (int64_t)size, &many));
    ls_attention_shape shape = {.batch = (int64_t)1 << 28, .queries = &one};
    refused(ls_attention_forward(a, &shape, &io, params, y, NULL), LS_ERR_ARGUMENT, "numbers apart");
    shape.batch = 1 << 24, shape.queries = &many;
    refused(ls_attention_forward(a, &shape, &io, params, y, NULL), LS_ERR_ARGUMENT, "more rows");
    int64_t *bounds = (int64_t *)one.bounds, before = bounds[0];
    bounds[0] = -3;
    shape = (ls_attention_shape){.batch = B, .queries = &one};
    refused(ls_attention_forward(a, &shape, &io, params, y, NULL), LS_ERR_ARGUMENT, "contradicts itself");
    bounds[0] = before;
    ls_shard_free(&one), ls_shard_free(&many);
    ls_attention_free(a);
}

/* What 64 bits could not count is refused before memory is asked for: no product has overflowed until then. */
static void test_sizes(void **unused)
{
    (void)unused;
    ls_shard s = {0}, long_one, even;
    const int64_t most = (int64_t)1 << 44;
    refused(ls_shard_even(ctx, INT64_MAX, &s), LS_ERR_ARGUMENT, "too many");
    refused(ls_shard_local(ctx, INT64_MAX / 2, &s), LS_ERR_ARGUMENT, "too many");
    if (size > 1) refused(ls_shard_local(ctx, most - 1, &s), LS_ERR_ARGUMENT, "too many"); /* together */
    assert_null(s.bounds);
    must(ls_shard_even(ctx, L, &even));
    must(ls_shard_even(ctx, most / E / B / 2, &long_one));
    const ls_attention_io io = {.query = x, .key = x};
    for (int i = 0; ls_mechanism_name(i) != NULL; i++)
        for (int pattern = LS_NS; pattern <= LS_CC; pattern++) {
            const char *name = ls_mechanism_name(i);
            if (!ls_mechanism_has(name, (ls_pattern)pattern)) continue;
            ls_attention *a = make(name, (ls_pattern)pattern);
            ls_attention_shape shape = {.batch = B, .queries = &long_one, .keys = &long_one};
            refused(ls_attention_forward(a, &shape, &io, params, y, NULL), LS_ERR_ARGUMENT, "too large");
            shape.queries = shape.keys = &even;
            ls_state *state = NULL;
            for (int k = 31; k < 63; k += 6) {
                shape.batch = last ? (int64_t)1 << k : B;
                refused(ls_attention_forward(a, &shape, &io, params, y, NULL), LS_ERR_ARGUMENT, blamed(name));
                if (ls_mechanism_has_step(name, (ls_pattern)pattern))
                    refused(ls_state_create(a, shape.batch, L, &state), LS_ERR_ARGUMENT, blamed(name));
            }
            if (ls_mechanism_has_step(name, (ls_pattern)pattern))
                refused(ls_state_create(a, 1, last ? INT64_MAX : 8, &state), LS_ERR_ARGUMENT, blamed(name));
            assert_null(state);
            ls_attention_free(a);
        }
    ls_shard_free(&even), ls_shard_free(&long_one);
}

/* Where positions are beyond 2^32 rank 65536 of 131072 does what it does in self attention: query i of as many looks
 * around key i. */
static void test_far(void **unused)
{
    (void)unused;
    enum { N = 65536, RANKS = 131072 };
    const ls_context_options options = {.dry_size = RANKS, .dry_rank = RANKS / 2};
    ls_context *whole = ctx, *dry = NULL;
    ls_shard s;
    ls_real *rows = calloc((size_t)N * E, sizeof *rows), *out[2];
    assert_non_null(rows);
    for (int64_t i = 0; i < N * E; i++) rows[i] = (ls_real)(i * i % 17 - 8) / 8;
    must(ls_context_create(&options, &dry));
    ctx = dry;
    must(ls_shard_even(ctx, (int64_t)N * RANKS, &s));
    assert_true(s.n == N && s.lo > INT64_C(1) << 31);
    for (int cross = 0; cross < 2; cross++) {
        ls_attention *a = make("local", cross ? LS_NC : LS_NS);
        const ls_attention_shape shape = {.batch = 1, .queries = &s, .keys = cross ? &s : NULL};
        const ls_attention_io io = {.query = rows, .key = cross ? rows : NULL};
        assert_non_null(out[cross] = calloc((size_t)N * E, sizeof *out[cross]));
        must(ls_attention_forward(a, &shape, &io, params, out[cross], NULL));
        ls_attention_free(a);
    }
    assert_true(out[0][0] != 0 && memcmp(out[0], out[1], (size_t)N * E * sizeof *rows) == 0);
    free(rows), free(out[0]), free(out[1]);
    ls_shard_free(&s);
    ls_context_free(dry);
    ctx = whole;
}

/* Bytes that rounding up would make few are not to be had; an inter-communicator has no order of ranks. */
static void test_memory_and_groups(void **unused)
{
    (void)unused;
    void *p = x;
    refused(ls_device_alloc(ctx, SIZE_MAX, &p), LS_ERR_MEMORY, "cannot reserve");
    assert_null(p);
    if (size == 1) return;
    MPI_Comm half, between;
    MPI_Comm_split(MPI_COMM_WORLD, rank % 2, rank, &half);
    MPI_Intercomm_create(half, 0, MPI_COMM_WORLD, rank % 2 == 0, 7, &between);
    ls_context *other = ctx;
    const ls_context_options options = {.comm = between};
    refused(ls_context_create(&options, &other), LS_ERR_ARGUMENT, "an inter-communicator is given");
    assert_null(other);
    MPI_Comm_free(&between), MPI_Comm_free(&half);
}

/* ------------------------------------------------------------------------------------------------ what is not there */

/* A rank without the others plans whole sequences, and packed ones only where it is the only rank. */
static void test_dry(void **unused)
{
    (void)unused;
    const int32_t id[B * L] = {0};
    for (int ranks = 1; ranks < 4; ranks += 2) {
        const ls_context_options options = {.dry_size = ranks, .dry_rank = ranks / 2};
        ls_context *whole = ctx, *dry = NULL;
        ls_shard s;
        must(ls_context_create(&options, &dry));
        ctx = dry;
        ls_attention *a = make("softmax", LS_CS);
        must(ls_shard_even(ctx, L, &s));
        const ls_attention_shape shape = {.batch = B, .queries = &s};
        ls_attention_io io = {.query = x};
        must(ls_attention_forward(a, &shape, &io, params, y, NULL));
        io.query_segments = id;
        const ls_status status = ls_attention_forward(a, &shape, &io, params, y, NULL);
        if (ranks == 1) must(status);
        if (ranks > 1) refused(status, LS_ERR_UNSUPPORTED, "packed documents cannot be planned in a dry context");
        ls_shard_free(&s);
        ls_attention_free(a);
        ls_context_free(dry);
        ctx = whole;
    }
}

/* ------------------------------------------------------------------------------------------------ main */

static void test_levels(void **unused)
{
    (void)unused;
    for (int i = 0; ls_mechanism_name(i) != NULL; i++) {
        ls_attention_options o;
        must(ls_attention_defaults(ls_mechanism_name(i), &o));
        o.embed_dim = E, o.num_heads = H;
        for (int level = LS_LEVEL_CORE; level <= LS_LEVEL_LAYER; level++) {
            o.level = (ls_level)level;
            assert_int_equal(ls_mechanism_has_level(o.mechanism, o.level), ls_attention_check(&o) == LS_OK);
        }
    }
    assert_false(ls_mechanism_has_level("attention9", LS_LEVEL_LAYER) || ls_mechanism_has_level("abc", (ls_level)7));
}

int main(int argc, char **argv)
{
    const ls_context_options options = {.comm = MPI_COMM_WORLD};
    ls_context *none = NULL;
    int early = ls_context_create(&options, &none) != LS_ERR_ARGUMENT;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    last = rank == size - 1;
    x = calloc(2048, sizeof *x), y = calloc(1024, sizeof *y), grads = calloc(1024, sizeof *grads);
    params = calloc(MOST_PARAMS, sizeof *params);
    if (x == NULL || y == NULL || grads == NULL || params == NULL || ls_context_create(&options, &ctx) != LS_OK)
        MPI_Abort(MPI_COMM_WORLD, 1);
    for (int i = 0; i < MOST_PARAMS; i++) params[i] = (ls_real)(i * 37 % 101) / 101 - (ls_real)0.5;
    for (int i = 0; i < 2048; i++) x[i] = params[i + 1];
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_nothing),   cmocka_unit_test(test_all_reduce),
                                       cmocka_unit_test(test_sentences), cmocka_unit_test(test_differences),
                                       cmocka_unit_test(test_states),    cmocka_unit_test(test_sources),
                                       cmocka_unit_test(test_counts),    cmocka_unit_test(test_sizes),
                                       cmocka_unit_test(test_levels),    cmocka_unit_test(test_dry),
                                       cmocka_unit_test(test_far),       cmocka_unit_test(test_memory_and_groups),
                                       cmocka_unit_test(test_saved),     cmocka_unit_test(test_same_pointer)};
    const int failed = cmocka_run_group_tests(tests, NULL, NULL);
    ls_context_free(ctx);
    free(x), free(y), free(grads), free(params);
    MPI_Finalize();
    const int late = ls_context_create(&options, &none) != LS_ERR_ARGUMENT;
    if (early || late)
        printf("a context was not refused before MPI_Init (%d) or after MPI_Finalize (%d)\n", early, late);
    return failed != 0 || early || late || none != NULL;
}
