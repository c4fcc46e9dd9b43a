/* The laws of the encoder-decoder: its gradient is the derivative of its loss, neither depends on how many ranks share
 * a sequence nor on what stands in the padding, and a token at a time gives the logits of all tokens at once. */
#include "model_cases.h"

/* ------------------------------------------------------------------------------------------------ results */

/* Loss and gradient of a batch, summed over the ranks of ctx. */
typedef struct result {
    model_loss loss;
    ls_real *gradient;
    int64_t n;
} result;

static void sum_loss(ls_context *ctx, model_loss *l)
{
    if (ctx != world) return;
    double d[3] = {l->loss, l->nll, (double)l->tokens};
    MPI_Allreduce(MPI_IN_PLACE, d, 3, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
    *l = (model_loss){d[0], d[1], (int64_t)d[2]};
}

static result run(ls_context *ctx, model *m, const ls_real *params, plan_of_batch o)
{
    result r = {.gradient = make_zeros(model_count(m)), .n = model_count(m)};
    batch b = make_batch(ctx, o);
    assert_ok(gradient_of(m, &b, params, 0.5, r.gradient, &r.loss));
    assert_ok(ls_all_reduce_sum(ctx, r.gradient, r.n));
    sum_loss(ctx, &r.loss);
    assert_int_equal(r.loss.tokens, b.tokens);
    free_batch(&b);
    return r;
}

static double largest(const ls_real *x, int64_t n)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs((double)x[i]));
    return most;
}

/* Everything finite, and apart by at most tolerance times the largest. */
static void assert_near(const char *what, const ls_real *a, const ls_real *b, int64_t n, double tolerance)
{
    const double scale = fmax(largest(b, n), 1e-30);
    for (int64_t i = 0; i < n; i++) {
        const double gap = fabs((double)a[i] - (double)b[i]);
        if (!(gap <= tolerance * scale))
            fail_msg("%s: element %lld is %.10g and %.10g (largest %.3g)", what, (long long)i, (double)a[i],
                     (double)b[i], scale);
    }
}

static void assert_same_result(const char *what, const result *a, const result *b, double tolerance)
{
    if (!(fabs(a->loss.loss - b->loss.loss) <= tolerance * fabs(b->loss.loss)) ||
        !(fabs(a->loss.nll - b->loss.nll) <= tolerance * fabs(b->loss.nll)))
        fail_msg("%s: losses %.12g and %.12g, nll %.12g and %.12g", what, a->loss.loss, b->loss.loss, a->loss.nll,
                 b->loss.nll);
    assert_near(what, a->gradient, b->gradient, a->n, tolerance);
}

/* ------------------------------------------------------------------------------------------------ tensors */

static const model_tensor *find(const model *m, const char *name)
{
    for (int i = 0; i < model_num_tensors(m); i++)
        if (strcmp(model_tensor_at(m, i)->name, name) == 0) return model_tensor_at(m, i);
    return NULL;
}

static void test_tensors(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(self, &examples[e]);
        int64_t offset = 0;
        for (int i = 0; i < model_num_tensors(m); i++) {
            const model_tensor *t = model_tensor_at(m, i);
            int64_t count = 1;
            for (int d = 0; d < t->ndim; d++) count *= t->dim[d];
            assert_int_equal(t->count, count);
            assert_int_equal(t->offset, offset);
            offset += count;
            assert_ptr_equal(find(m, t->name), t); /* the first of its name */
            if (t->ndim == 1) assert_false(t->decay);
        }
        assert_int_equal(offset, model_count(m));
        assert_null(model_tensor_at(m, model_num_tensors(m)));
        static const char *const always[] = {
            "encoder.0.attention.q_proj.weight",
            "encoder.1.attention_norm.weight",
            "encoder.0.ffn_norm.bias",
            "encoder.0.ffn.0.weight",
            "encoder.1.ffn.1.bias",
            "encoder.norm.weight",
            "decoder.0.self_attention.out_proj.bias",
            "decoder.1.self_attention_norm.weight",
            "decoder.0.cross_attention.k_proj.weight",
            "decoder.1.cross_attention_norm.bias",
            "decoder.1.ffn.1.weight",
            "decoder.norm.bias",
        };
        for (size_t i = 0; i < sizeof always / sizeof *always; i++)
            if (find(m, always[i]) == NULL) fail_msg("%s: no tensor %s", examples[e].name, always[i]);
        const int tied = examples[e].tie;
        assert_int_equal(find(m, "embedding") != NULL, tied);
        assert_int_equal(find(m, "output") != NULL, !tied);
        assert_int_equal(find(m, "source_embedding") != NULL, !tied);
        assert_int_equal(find(m, "target_embedding") != NULL, !tied);
        const model_tensor *w = find(m, "decoder.0.ffn.0.weight");
        assert_true(w->ndim == 2 && w->dim[0] == 12 && w->dim[1] == 8 && w->decay);
        model_free(m);
    }
}

static void test_init(void **state)
{
    (void)state;
    model *m = make_model(self, &examples[0]);
    const int64_t n = model_count(m);
    ls_real *a = make_zeros(n), *b = make_zeros(n);
    model_init(m, 1, a);
    model_init(m, 1, b);
    assert_memory_equal(a, b, (size_t)n * sizeof *a);
    model_init(m, 2, b);
    for (int i = 0; i < model_num_tensors(m); i++) {
        const model_tensor *t = model_tensor_at(m, i);
        const int norm = strstr(t->name, "norm.weight") != NULL, bias = strstr(t->name, ".bias") != NULL;
        const int same = memcmp(a + t->offset, b + t->offset, (size_t)t->count * sizeof *a) == 0;
        if (norm || bias) {
            assert_true(same);
            /* one value; the last norm of the decoder is the one that may start at another than 1 */
            const int last = strcmp(t->name, "decoder.norm.weight") == 0;
            for (int64_t j = 0; norm && j < t->count; j++) {
                assert_true(a[t->offset + j] == (last ? a[t->offset] : 1));
                assert_true(a[t->offset + j] > 0);
            }
        } else if (t->ndim == 2) {
            assert_false(same); /* another seed, another matrix */
        }
    }
    const model_tensor *t = find(m, "target_embedding");
    double sum = 0;
    for (int64_t j = 0; j < t->count; j++) sum += (double)a[t->offset + j] * (double)a[t->offset + j];
    assert_true(fabs(sum / (double)t->count * 8 - 1) < 0.1); /* variance 1 / embed_dim, 2064 draws */
    free(a);
    free(b);
    model_free(m);
}

/* ------------------------------------------------------------------------------------------------ gradient */

static double loss_at(model *m, const batch *b, const ls_real *params, ls_real *scratch)
{
    model_loss l;
    assert_ok(gradient_of(m, b, params, 0.5, scratch, &l)); /* for its dropout: evaluate has none */
    return 0.5 * l.loss;
}

/* (f(p + h v) - f(p - h v)) / 2h */
static double slope(model *m, const batch *b, const ls_real *params, const ls_real *v, double h)
{
    const int64_t n = model_count(m);
    ls_real *moved = make_zeros(n), *scratch = make_zeros(n);
    for (int64_t i = 0; i < n; i++) moved[i] = params[i] + (ls_real)h * v[i];
    const double up = loss_at(m, b, moved, scratch);
    for (int64_t i = 0; i < n; i++) moved[i] = params[i] - (ls_real)h * v[i];
    const double down = loss_at(m, b, moved, scratch);
    free(moved);
    free(scratch);
    return (up - down) / (2 * h);
}

static double dot(const ls_real *a, const ls_real *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* In double: each tensor by itself along a random direction; with h = 1e-5 the truncation, ~ h² f''' / 6, and the
 * rounding, ~ eps f / h, are both near 1e-9 of the values met here. In float, rounding (1e-7 f / h, f ~ 60) would drown
 * most tensors, so the direction is the whole gradient's own, where the slope is its length and as large as can be. */
static void test_gradient(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(self, &examples[e]);
        const int64_t n = model_count(m);
        ls_real *params = make_params(m), *v = make_zeros(n);
        batch b = make_batch(self, plain);
        result r = run(self, m, params, plain);
#ifdef LS_REAL_DOUBLE
        for (int i = 0; i < model_num_tensors(m); i++) {
            const model_tensor *t = model_tensor_at(m, i);
            ls_zero(v, n);
            for (int64_t j = 0; j < t->count; j++) v[t->offset + j] = ls_normal(9, (uint32_t)i, 0, (uint64_t)j);
            const double expected = slope(m, &b, params, v, 1e-5), got = dot(r.gradient, v, n);
            if (!(fabs(got - expected) <= 1e-6 * fmax(fabs(expected), 0.01)))
                fail_msg("%s: %s: gradient %.12g, difference %.12g", examples[e].name, t->name, got, expected);
        }
#else
        const double length = sqrt(dot(r.gradient, r.gradient, n));
        for (int64_t i = 0; i < n; i++) v[i] = (ls_real)((double)r.gradient[i] / length);
        const double expected = slope(m, &b, params, v, 2e-3);
        if (!(fabs(length - expected) <= 5e-3 * expected))
            fail_msg("%s: gradient %.8g, difference %.8g", examples[e].name, length, expected);
#endif
        free(r.gradient);
        free_batch(&b);
        free(params);
        free(v);
        model_free(m);
    }
}

/* Gradients are added, and grad_scale scales them. */
static void test_accumulation(void **state)
{
    (void)state;
    model *m = make_model(self, &examples[1]);
    const int64_t n = model_count(m);
    ls_real *params = make_params(m), *twice = make_zeros(n);
    result once = run(self, m, params, plain);
    batch b = make_batch(self, plain);
    model_loss l;
    for (int i = 0; i < 2; i++) assert_ok(gradient_of(m, &b, params, 0.25, twice, &l));
    assert_near("0.25 + 0.25 = 0.5", twice, once.gradient, n, close_enough);
    assert_true(model_bytes(m) > 0);
    free(once.gradient);
    free(twice);
    free(params);
    free_batch(&b);
    model_free(m);
}

static void test_recompute(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        example keep = examples[e], again = examples[e];
        keep.recompute = 0;
        again.recompute = 1;
        model *a = make_model(world, &keep), *b = make_model(world, &again);
        ls_real *params = make_params(a);
        result x = run(world, a, params, plain), y = run(world, b, params, plain);
        assert_true(x.loss.loss == y.loss.loss);
        assert_near(examples[e].name, y.gradient, x.gradient, x.n, 0); /* the same bits */
        free(x.gradient);
        free(y.gradient);
        free(params);
        model_free(a);
        model_free(b);
    }
}

/* ------------------------------------------------------------------------------------------------ ranks */

static void test_ranks(void **state)
{
    (void)state;
    static const plan_of_batch plans[] = {
        {.B = 2, .S = 11, .T = 9, .change = -1},
        {.B = 2, .S = 11, .T = 9, .change = -1, .skewed = 1},
        {.B = 3, .S = 3, .T = 2, .change = -1}, /* fewer positions than ranks, and padding that fills ranks */
        {.B = 1, .S = 1, .T = 1, .change = -1},
        {.B = 2, .S = 23, .T = 4, .change = -1}, /* memory grows and is used again for less */
        {.B = 1, .S = 5, .T = 17, .change = -1},
        {.B = 2, .S = 20, .T = 300, .change = -1}, /* more rows than go through a chunk at a time */
    };
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(world, &examples[e]), *alone = make_model(self, &examples[e]);
        ls_real *params = make_params(m);
        for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
            result a = run(world, m, params, plans[i]), b = run(self, alone, params, plans[i]);
            char what[128];
            snprintf(what, sizeof what, "%s: batch %zu", examples[e].name, i);
            assert_same_result(what, &a, &b, close_enough);
            free(a.gradient);
            free(b.gradient);
        }
        free(params);
        model_free(m);
        model_free(alone);
    }
}

/* A batch is the sum of its sequences, each with the random numbers of its own sample: how samples are dealt to
 * batches, and so to data-parallel groups, does not matter. */
static void test_rows(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(world, &examples[e]);
        ls_real *params = make_params(m);
        plan_of_batch one = {.B = 1, .S = 11, .T = 9, .change = -1};
        result both = run(world, m, params, plain), sum = run(world, m, params, one);
        one.first = 1;
        const result second = run(world, m, params, one);
        sum.loss.loss += second.loss.loss;
        sum.loss.nll += second.loss.nll;
        for (int64_t i = 0; i < sum.n; i++) sum.gradient[i] += second.gradient[i];
        assert_same_result(examples[e].name, &both, &sum, close_enough);
        free(both.gradient);
        free(sum.gradient);
        free(second.gradient);
        free(params);
        model_free(m);
    }
}

/* Without dropout, evaluation is the forward pass of training; with it, evaluation has none. */
static void test_evaluate(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        example dry = examples[e];
        dry.dropout = 0;
        model *m = make_model(world, &dry), *wet = make_model(world, &examples[e]);
        ls_real *params = make_params(m);
        result r = run(world, m, params, plain), other = run(world, wet, params, plain);
        batch b = make_batch(world, plain);
        model_loss l, k;
        assert_ok(model_evaluate(m, &b, params, &l));
        assert_ok(model_evaluate(wet, &b, params, &k));
        sum_loss(world, &l);
        sum_loss(world, &k);
        assert_int_equal(l.tokens, r.loss.tokens);
        assert_true(fabs(l.loss - r.loss.loss) <= close_enough * l.loss);
        assert_true(fabs(l.nll - r.loss.nll) <= close_enough * l.nll);
        assert_true(fabs(l.loss - k.loss) <= close_enough * l.loss);
        assert_true(fabs(l.loss - other.loss.loss) > 1e-3 * l.loss);
        assert_true(fabs(l.loss - l.nll) > 1e-6); /* smoothing is in the one only */
        free(r.gradient);
        free(other.gradient);
        free(params);
        free_batch(&b);
        model_free(m);
        model_free(wet);
    }
}

static void test_padding(void **state)
{
    (void)state;
    plan_of_batch clean = {.B = 3, .S = 8, .T = 7, .change = -1}, dirty = clean;
    dirty.garbage = 1;
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(world, &examples[e]);
        ls_real *params = make_params(m);
        result a = run(world, m, params, clean), b = run(world, m, params, dirty);
        assert_same_result(examples[e].name, &b, &a, close_enough);
        free(a.gradient);
        free(b.gradient);
        free(params);
        model_free(m);
    }
}

/* ------------------------------------------------------------------------------------------------ logits */

/* The logits of all positions at once, (B,T,V) on every rank. */
static ls_real *logits_of(ls_context *ctx, model *m, const ls_real *params, plan_of_batch o)
{
    batch b = make_batch(ctx, o);
    pass p = {.b = &b, .params = params, .keep = KEEP_NOTHING};
    assert_ok(pass_begin(m, &p, 1));
    assert_ok(encoder_forward(m, &p));
    assert_ok(decoder_forward(m, &p));
    ls_real *all = make_zeros(o.B * o.T * m->V);
    for (int64_t row = 0; row < o.B; row++)
        output_logits(m, &m->w, params, b.target.n, m->decoder.x[m->decoder.blocks] + row * b.target.n * m->E,
                      output_weights(m, &m->w, params), all + (row * o.T + b.target.lo) * m->V);
    assert_ok(ls_all_reduce_sum(ctx, all, o.B * o.T * m->V));
    free_batch(&b);
    return all;
}

static void test_decoder(void **state)
{
    (void)state;
    static const plan_of_batch plans[] = {{.B = 2, .S = 7, .T = 6, .change = -1, .no_target_padding = 1},
                                          {.B = 2, .S = 7, .T = 6, .change = -1, .no_target_padding = 1, .skewed = 1},
                                          {.B = 3, .S = 2, .T = 3, .change = -1, .no_target_padding = 1}};
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(world, &examples[e]);
        ls_real *params = make_params(m);
        for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
            const plan_of_batch o = plans[i];
            ls_real *expected = logits_of(world, m, params, o), *step = make_zeros(o.B * m->V);
            batch b = make_batch(world, o), whole = make_batch(self, o);
            decoder *d;
            assert_ok(decoder_create(m, &b, 1, o.T, params, &d));
            int32_t token[3] = {0};
            for (int64_t t = 0; t < o.T; t++) {
                for (int64_t row = 0; row < o.B; row++) token[row] = whole.input_token[row * o.T + t];
                assert_ok(decoder_step(d, token, params, step));
                for (int64_t row = 0; row < o.B; row++)
                    assert_near("step", step + row * m->V, expected + (row * o.T + t) * m->V, m->V, close_enough);
            }
            assert_int_equal(decoder_step(d, token, params, step), LS_ERR_ARGUMENT); /* all positions are used */
            decoder_free(d);
            /* two beams of each source: the second one's first half is another, then both go on from the first */
            enum { BEAMS = 2 };
            int32_t tokens[3 * BEAMS];
            int64_t from[3 * BEAMS];
            ls_real *steps = make_zeros(BEAMS * o.B * m->V);
            assert_ok(decoder_create(m, &b, BEAMS, o.T, params, &d));
            for (int64_t t = 0; t < o.T; t++) {
                for (int64_t r = 0; r < BEAMS * o.B; r++) {
                    const int apart = t < o.T / 2 && r % BEAMS == 1;
                    const int32_t of_source = whole.input_token[r / BEAMS * o.T + t];
                    tokens[r] = apart ? (of_source + 40) % 256 : of_source;
                    from[r] = r / BEAMS * BEAMS;
                }
                if (t == o.T / 2) assert_ok(decoder_reorder(d, from));
                assert_ok(decoder_step(d, tokens, params, steps));
                for (int64_t r = 0; r < BEAMS * o.B; r++)
                    if (t >= o.T / 2 || r % BEAMS == 0)
                        assert_near("step of a beam", steps + r * m->V, expected + (r / BEAMS * o.T + t) * m->V, m->V,
                                    close_enough);
            }
            from[0] = o.B > 1 ? BEAMS : -1; /* of another source */
            assert_int_equal(decoder_reorder(d, from), LS_ERR_ARGUMENT);
            free(steps);
            decoder_free(d);
            assert_ok(decoder_create(m, &b, 1, o.T, params, &d));
            token[0] = MODEL_VOCABULARY;
            assert_int_equal(decoder_step(d, token, params, step), LS_ERR_ARGUMENT);
            decoder_free(d);
            free_batch(&b);
            free_batch(&whole);
            free(expected);
            free(step);
        }
        free(params);
        model_free(m);
    }
}

/* Other target tokens from position `change` on: inputs change from change + 1 on, logits not before. */
static void test_no_look_ahead(void **state)
{
    (void)state;
    for (int e = 0; e < EXAMPLES; e++) {
        model *m = make_model(world, &examples[e]);
        ls_real *params = make_params(m);
        plan_of_batch o = {.B = 2, .S = 7, .T = 9, .change = -1, .no_target_padding = 1};
        ls_real *a = logits_of(world, m, params, o);
        o.other_source = 1;
        ls_real *s = logits_of(world, m, params, o);
        o.other_source = 0;
        o.change = 4;
        ls_real *b = logits_of(world, m, params, o);
        for (int64_t row = 0; row < o.B; row++) {
            const ls_real *x = a + row * o.T * m->V, *y = b + row * o.T * m->V, *z = s + row * o.T * m->V;
            assert_near("the past", y, x, (o.change + 1) * m->V, close_enough);
            for (int64_t t = 0; t < o.T; t++) {
                double gap = 0, gap_of_source = 0;
                for (int64_t v = t * m->V; v < (t + 1) * m->V; v++) {
                    gap = fmax(gap, fabs((double)(x[v] - y[v])));
                    gap_of_source = fmax(gap_of_source, fabs((double)(x[v] - z[v])));
                }
                if (t > o.change) assert_true(gap > 1e-3);
                assert_true(gap_of_source > 1e-4); /* every position sees the whole source */
            }
        }
        free(a);
        free(b);
        free(s);
        free(params);
        model_free(m);
    }
}

/* ------------------------------------------------------------------------------------------------ refusals */

static void test_refusals(void **state)
{
    (void)state;
    model *m = make_model(world, &examples[1]);
    ls_real *params = make_params(m);
    model_loss l;
    batch b = make_batch(world, plain);
    b.target.rank = ls_context_rank(world) == ls_context_size(world) - 1 ? 99 : b.target.rank; /* wrong on one rank */
    assert_int_equal(model_evaluate(m, &b, params, &l), LS_ERR_ARGUMENT);
    assert_non_null(strstr(ls_last_error(), "target"));
    free_batch(&b);
    b = make_batch(world, (plan_of_batch){.B = 1, .S = 0, .T = 1, .change = -1});
    assert_int_equal(model_evaluate(m, &b, params, &l), LS_ERR_ARGUMENT);
    decoder *d;
    assert_int_equal(decoder_create(m, &b, 1, 4, params, &d), LS_ERR_ARGUMENT);
    assert_null(d);
    b.B = 0;
    assert_int_equal(decoder_create(m, &b, 1, 4, params, &d), LS_ERR_ARGUMENT);
    free_batch(&b);
    free(params);
    model_free(m);
    config c = make_config(&examples[1]);
    c.model.decoder_layers = 0;
    assert_int_equal(model_create(world, &c, &m), LS_ERR_ARGUMENT);
    assert_null(m);
    c = make_config(&examples[1]);
    c.model.num_heads = 3; /* does not divide 8 */
    assert_int_equal(model_create(world, &c, &m), LS_ERR_ARGUMENT);
    assert_null(m);
    c = make_config(&examples[1]);
    snprintf(c.model.cross.mechanism, sizeof c.model.cross.mechanism, "nothing");
    assert_int_not_equal(model_create(world, &c, &m), LS_OK);
    assert_null(m);
}

int main(int argc, char **argv)
{
    MPI_Init(&argc, &argv);
    assert_ok(ls_context_create(&(ls_context_options){.comm = MPI_COMM_WORLD, .seed = 7}, &world));
    assert_ok(ls_context_create(&(ls_context_options){.comm = MPI_COMM_SELF, .seed = 7}, &self));
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tensors),      cmocka_unit_test(test_init),          cmocka_unit_test(test_gradient),
        cmocka_unit_test(test_accumulation), cmocka_unit_test(test_recompute),     cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_rows),         cmocka_unit_test(test_evaluate),      cmocka_unit_test(test_padding),
        cmocka_unit_test(test_decoder),      cmocka_unit_test(test_no_look_ahead), cmocka_unit_test(test_refusals),
    };
    const int failed = cmocka_run_group_tests_name("model", tests, NULL, NULL);
    ls_context_free(self);
    ls_context_free(world);
    MPI_Finalize();
    return failed;
}
