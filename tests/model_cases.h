/* The models and batches that test_model.c looks at: small enough to be quick, odd enough to be telling. */
#ifndef MODEL_CASES_H
#define MODEL_CASES_H

#include "model_internal.h"

#include "rng.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

/* Float results of this size agree to a few hundred roundings; sums go in other orders on other rank counts. */
#ifdef LS_REAL_DOUBLE
static const double close_enough = 1e-10;
#else
static const double close_enough = 2e-4;
#endif

static ls_context *world, *self;

#define assert_ok(call)                                                                                                \
    do {                                                                                                               \
        if ((call) != LS_OK) fail_msg("%s: %s", #call, ls_last_error());                                               \
    } while (0)

/* ------------------------------------------------------------------------------------------------ cases */

typedef struct example {
    const char *name, *encoder, *decoder, *cross;
    int tie, recompute;
    config_activation activation;
    double dropout;
} example;

static const example examples[] = {
    {"softmax, untied, gelu, dropout", "softmax", "softmax", "softmax", 0, 0, ACTIVATION_GELU, 0.2},
    {"abc, tied, gelu, dropout", "abc", "abc", "abc", 1, 0, ACTIVATION_GELU, 0.1},
    {"abc and softmax, tied, relu, recompute", "softmax", "abc", "softmax", 1, 1, ACTIVATION_RELU, 0.2},
};
enum { EXAMPLES = sizeof examples / sizeof *examples };

static void set_attention(config_attention *a, const char *mechanism, double dropout)
{
    ls_attention_options o;
    assert_ok(ls_attention_defaults(mechanism, &o));
    snprintf(a->mechanism, sizeof a->mechanism, "%s", mechanism);
    memcpy(a->value, o.value, sizeof a->value);
    if (strcmp(mechanism, "softmax") == 0) a->dropout = dropout;
    if (strcmp(mechanism, "abc") == 0) {
        assert_ok(ls_attention_set(&o, "num_slots", 3));
        memcpy(a->value, o.value, sizeof a->value);
    }
}

static config make_config(const example *e)
{
    config c = {0};
    c.model.embed_dim = 8;
    c.model.ffn_dim = 12;
    c.model.num_heads = 2;
    c.model.encoder_layers = 2;
    c.model.decoder_layers = 2;
    c.model.dropout = e->dropout;
    c.model.activation = e->activation;
    c.model.tie_embeddings = e->tie;
    set_attention(&c.model.encoder, e->encoder, e->dropout);
    set_attention(&c.model.decoder, e->decoder, e->dropout);
    set_attention(&c.model.cross, e->cross, e->dropout);
    c.train.seed = 7;
    c.train.label_smoothing = 0.1;
    c.train.recompute = e->recompute;
    return c;
}

static model *make_model(ls_context *ctx, const example *e)
{
    const config c = make_config(e);
    model *m;
    assert_ok(model_create(ctx, &c, &m));
    return m;
}

/* This rank's share of the gradient, added to dparams, and of the loss. */
static ls_status gradient_of(model *m, const batch *b, const ls_real *params, double scale, ls_real *dparams,
                             model_loss *out)
{
    double sums[LS_LOSS_SUMS] = {0};
    LS_TRY(model_gradient(m, b, params, scale, dparams, sums));
    *out = (model_loss){.loss = sums[0], .nll = sums[1], .tokens = batch_labels(b)};
    return LS_OK;
}

/* Initial values moved off the special ones, zeros of biases and ones of norms. */
static ls_real *make_params(const model *m)
{
    ls_real *params = malloc((size_t)model_count(m) * sizeof *params);
    assert_non_null(params);
    model_init(m, 3, params);
    for (int64_t i = 0; i < model_count(m); i++) params[i] += (ls_real)(0.1 * ls_normal(5, 1, 0, (uint64_t)i));
    return params;
}

static ls_real *make_zeros(int64_t n)
{
    ls_real *x = calloc((size_t)n, sizeof *x);
    assert_non_null(x);
    return x;
}

/* ------------------------------------------------------------------------------------------------ batches */

/* What sequences a batch has, and what changes of them a test wants to see. */
typedef struct plan_of_batch {
    int64_t B, S, T;  /* row b has S - b source tokens and T - b labels, at least one each */
    int64_t first;    /* row 0 is what would be row `first` of a larger batch */
    int skewed;       /* every second rank, starting with the first, owns nothing (if it is not alone) */
    int garbage;      /* tokens, not TOKEN_PAD, in the padding */
    int64_t change;   /* target tokens from here on are others (-1: none) */
    int other_source; /* the last source token of every row is another */
    int no_target_padding;
} plan_of_batch;

static int32_t token_at(uint32_t stream, int64_t b, int64_t t)
{
    return (int32_t)(ls_uniform(11, stream, (uint32_t)b, (uint64_t)t) * 256);
}

static void make_shard(ls_context *ctx, int64_t length, int skewed, ls_shard *shard)
{
    const int rank = ls_context_rank(ctx), size = ls_context_size(ctx);
    if (!skewed || size == 1) {
        assert_ok(ls_shard_even(ctx, length, shard));
        return;
    }
    const int owners = size / 2, index = rank / 2;
    const int64_t lo = length * index / owners, hi = length * (index + 1) / owners;
    assert_ok(ls_shard_local(ctx, rank % 2 ? hi - lo : 0, shard));
}

static void *grab(int64_t n, size_t size)
{
    void *p = n > 0 ? calloc((size_t)n, size) : NULL; /* a rank without rows has no memory either */
    assert_true(n == 0 || p != NULL);
    return p;
}

static batch make_batch(ls_context *ctx, plan_of_batch o)
{
    batch b = {.B = o.B, .sample = (uint64_t)(40 + o.first)};
    make_shard(ctx, o.S, o.skewed, &b.source);
    make_shard(ctx, o.T, o.skewed, &b.target);
    const int64_t S = b.source.n, T = b.target.n;
    b.source_token = grab(o.B * S, sizeof *b.source_token);
    b.source_pad = grab(o.B * S, 1);
    b.input_token = grab(o.B * T, sizeof *b.input_token);
    b.label = grab(o.B * T, sizeof *b.label);
    b.target_pad = grab(o.B * T, 1);
    for (int64_t row = 0; row < o.B; row++) {
        const int64_t which = o.first + row; /* of the larger batch */
        const int64_t source = ls_max(1, o.S - which), target = o.no_target_padding ? o.T : ls_max(1, o.T - which);
        b.tokens += target;
        for (int64_t i = 0; i < S; i++) {
            const int64_t t = b.source.lo + i, pad = t >= source;
            b.source_pad[row * S + i] = (uint8_t)pad;
            b.source_token[row * S + i] = pad ? (o.garbage ? 99 : TOKEN_PAD) : token_at(0, which, t);
            if (o.other_source && t == source - 1) b.source_token[row * S + i] ^= 1;
        }
        for (int64_t i = 0; i < T; i++) {
            const int64_t t = b.target.lo + i, pad = t >= target, at = row * T + i;
            const uint32_t now = o.change >= 0 && t >= o.change ? 2 : 1;
            const uint32_t before = o.change >= 0 && t - 1 >= o.change ? 2 : 1;
            b.target_pad[at] = (uint8_t)pad;
            b.label[at] = pad ? TOKEN_PAD : t == target - 1 ? TOKEN_EOS : token_at(now, which, t);
            b.input_token[at] = t == 0 ? TOKEN_BOS : token_at(before, which, t - 1);
            if (pad) b.input_token[at] = o.garbage ? 77 : TOKEN_PAD;
        }
    }
    return b;
}

static void free_batch(batch *b)
{
    ls_shard_free(&b->source);
    ls_shard_free(&b->target);
    free(b->source_token);
    free(b->source_pad);
    free(b->input_token);
    free(b->label);
    free(b->target_pad);
}

static const plan_of_batch plain = {.B = 2, .S = 11, .T = 9, .change = -1};

#endif
