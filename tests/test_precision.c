/* What precision does, and where it is refused. Golden files in each precision: test_golden.
 *
 *   refusals  the CPU, and the double build, compute in their own numbers alone; before anything is allocated
 *   memory    what a layer keeps for backward, and scratch where its core sees just that
 *   repeated  sums over 8,192 keys or queries, known from those of 16
 *   twins     what tensor cores make in bf16, near that of the plain kernels in float32; and exact softmax in bf16, as
 *             it comes and with a mask of zeros, which only the plain kernels know: the same numbers up to the order of
 *             sums
 *   means     the same of linear attention to many values with a mean, where gradients are small differences
 *   floors    performer and cosformer with a floor that denominators meet: there nothing is rounded
 *   layers    exact softmax within a layer, in bf16: on one rank its core takes rows as the layer keeps them */
#include "harness.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The last: a unit of rounding, by which a probability moves that one order of sums rounds up, and the other down. */
static const double most_of_rounding = 2e-2, least_of_rounding = 1e-4, most_of_order = 1.0 / 256;

static void refused(ls_device device, int precision, ls_status expected, const char *word)
{
    const ls_context_options options = {
        .comm = MPI_COMM_SELF, .device = device, .precision = (ls_precision)precision, .seed = 1};
    ls_context *ctx = NULL;
    const ls_status status = ls_context_create(&options, &ctx);
    verdict(status == expected && ctx == NULL && strstr(ls_last_error(), word) != NULL,
            "refusals: precision %d on device %d gives %s: %s", precision, (int)device, ls_status_name(status),
            status == LS_OK ? "" : ls_last_error());
    if (status == LS_OK) ls_context_free(ctx);
}

static void refusals(void)
{
    const int is_double = sizeof(ls_real) == sizeof(double);
    const char *why = is_double ? "this build computes in double" : "is for GPUs";
    refused(LS_CPU, LS_TF32, LS_ERR_UNSUPPORTED, why);
    refused(LS_CPU, LS_BF16, LS_ERR_UNSUPPORTED, why);
    refused(LS_CPU, LS_BF16 + 1, LS_ERR_ARGUMENT, "there is no precision 3");
    refused(LS_CPU, -1, LS_ERR_ARGUMENT, "there is no precision -1");
    if (test_device() == LS_CUDA && is_double) refused(LS_CUDA, LS_BF16, LS_ERR_UNSUPPORTED, why);
}

/* Sums of one call are made on all ranks: rounded on all, or on none. */
static void differing(void)
{
    const ls_context_options options = {.comm = here.comm,
                                        .device = LS_CUDA,
                                        .precision = here.rank == here.size - 1 ? LS_BF16 : LS_FLOAT32,
                                        .seed = 1};
    ls_context *ctx = NULL;
    const ls_status status = ls_context_create(&options, &ctx);
    const ls_status expected = here.size > 1 ? LS_ERR_ARGUMENT : LS_OK;
    verdict(status == expected && (ctx == NULL) == (status != LS_OK) &&
                (status == LS_OK || strstr(ls_last_error(), "context: rank ") != NULL),
            "differing: one rank in bf16 gives %s: %s", ls_status_name(status), ls_last_error());
    ls_context_free(ctx);
}

/* What memory is measured on. */
static setting small_layer(const case_row *row, padding pad)
{
    return (setting){.row = row,
                     .level = LS_LEVEL_LAYER,
                     .layout = LS_BTHD,
                     .B = 1,
                     .H = 2,
                     .d = 32,
                     .T = 300,
                     .S = 300,
                     .pad = pad,
                     .alias = ALIAS_ALL,
                     .seed = 5};
}

/* Bytes that a layer of exact softmax keeps: q, k, v and the output, and a number a row for the statistics. */
static size_t kept_bytes(ls_context *ctx)
{
    const case_row row = {"softmax", LS_CS, "", 0};
    const setting s = small_layer(&row, PAD_NONE);
    problem p;
    pieces x = {0};
    ls_attention *attention = NULL;
    ls_saved *saved = NULL;
    size_t bytes = 0;
    if (problem_draw(&s, &p) == LS_OK && ls_attention_create(ctx, &p.options, &attention) == LS_OK &&
        ls_saved_create(attention, &saved) == LS_OK && pieces_make(ctx, here.comm, &p, NULL, NULL, &x) == LS_OK &&
        ls_attention_forward(attention, &x.shape, &x.io, p.params, x.out, saved) == LS_OK)
        bytes = ls_saved_bytes(saved);
    pieces_free(&x);
    ls_saved_free(saved);
    ls_attention_free(attention);
    problem_free(&p);
    return bytes;
}

static void memory(ls_context *narrow)
{
    const size_t wide = kept_bytes(here.all), half = kept_bytes(narrow);
    /* the zigzag of several ranks has copies of its own, in float32 */
    verdict(half > 0 && (double)half < (here.size == 1 ? 0.6 : 0.8) * (double)wide,
            "memory: a layer keeps %zu bytes in bf16, %zu in float32", half, wide);
}

typedef struct errors {
    double out, dquery, dkey, dvalue;
} errors;

static double largest_of(errors e)
{
    const double a = e.out > e.dquery ? e.out : e.dquery, b = e.dkey > e.dvalue ? e.dkey : e.dvalue;
    return a > b ? a : b;
}

static double least_of(errors e)
{
    const double a = e.out < e.dquery ? e.out : e.dquery, b = e.dkey < e.dvalue ? e.dkey : e.dvalue;
    return a < b ? a : b;
}

static errors between(const answer *a, const answer *b)
{
    const double of_key = a->dkey == NULL ? 0 : relative_error(a->n_key, a->dkey, b->dkey, 0);
    return (errors){relative_error(a->n_out, a->out, b->out, 0), relative_error(a->n_query, a->dquery, b->dquery, 0),
                    of_key, a->dvalue == NULL ? 0 : relative_error(a->n_key, a->dvalue, b->dvalue, 0)};
}

/* Shapes of calls that tensor cores make, beside those of 150 rows in every pattern: how many rows of the last tile
 * exist, of queries and of keys; with PAD_WHOLE a batch row whose queries see no key. Several ranks have other tiles,
 * the first ones not full either, and in LS_CS two spans of queries, of two tiles each where there are 270 rows. */
typedef struct shape {
    ls_pattern pattern;
    int64_t B, d, T, S;
    padding pad;
} shape;
static const shape shapes[] = {
    {LS_NS, 1, 32, 64, 64, PAD_TAIL},    {LS_NS, 1, 64, 129, 129, PAD_NONE},  {LS_NS, 2, 96, 70, 70, PAD_WHOLE},
    {LS_NS, 1, 128, 31, 31, PAD_RANDOM}, {LS_CS, 1, 32, 270, 270, PAD_TAIL},  {LS_CS, 1, 64, 270, 270, PAD_NONE},
    {LS_CS, 1, 96, 128, 128, PAD_TAIL},  {LS_CS, 1, 128, 83, 83, PAD_RANDOM}, {LS_NC, 2, 32, 67, 130, PAD_WHOLE},
    {LS_NC, 2, 64, 5, 90, PAD_RANDOM},   {LS_NC, 1, 96, 130, 7, PAD_NONE},    {LS_NC, 2, 128, 65, 64, PAD_WHOLE},
    {LS_NS, 1, 8, 150, 150, PAD_TAIL},   {LS_CS, 1, 40, 140, 140, PAD_NONE},  {LS_NC, 2, 72, 67, 80, PAD_RANDOM},
    {LS_CS, 1, 120, 90, 90, PAD_TAIL},
};
static const shape dropout_shapes[] = {
    {LS_NS, 2, 32, 70, 70, PAD_RANDOM}, {LS_CS, 1, 64, 270, 270, PAD_NONE}, {LS_NC, 2, 96, 67, 130, PAD_WHOLE},
    {LS_CS, 1, 128, 83, 83, PAD_TAIL},  {LS_NC, 1, 40, 130, 70, PAD_NONE},
};

/* Of linear attention: pieces of features and of values (64 of each at a time), chunks of 64 and of 256 rows. Of
 * longshort: several tiles of near keys, of vectors, and of distances. Of local: bands of 48 and of 32 keys, and of
 * windows that take several visits. */
static const struct {
    const char *mechanism, *options;
    shape of;
} tiled_shapes[] = {
    {"cosformer", "max_len=600", {LS_NS, 1, 64, 300, 300, PAD_TAIL}},
    {"cosformer", "max_len=600,act=1", {LS_CS, 1, 64, 150, 150, PAD_RANDOM}},
    {"cosformer", "max_len=600", {LS_NC, 1, 96, 70, 90, PAD_NONE}},
    {"cosformer", "max_len=600,act=1", {LS_CS, 1, 80, 100, 100, PAD_NONE}},
    {"performer", "m=40", {LS_NS, 1, 64, 150, 150, PAD_RANDOM}},
    {"performer", "m=100", {LS_CS, 1, 96, 150, 150, PAD_TAIL}},
    {"performer", "m=24", {LS_NC, 2, 128, 67, 130, PAD_TAIL}},
    {"longshort", "r=70,w=100", {LS_NS, 1, 64, 130, 130, PAD_RANDOM}},
    {"longshort", "r=2,w=9,c=8", {LS_CS, 1, 70, 100, 100, PAD_TAIL}},
    {"longshort", "r=4,w=70,c=4", {LS_CS, 1, 36, 100, 100, PAD_NONE}},
    {"local", "w=15", {LS_NS, 1, 64, 150, 150, PAD_RANDOM}},
    {"local", "w=16", {LS_CS, 1, 80, 150, 150, PAD_TAIL}},
    {"local", "w=40", {LS_NC, 1, 36, 100, 170, PAD_NONE}},
};

/* Linear attention with sums, and chunks that see one. */
static const struct {
    const char *mechanism, *options;
    ls_pattern pattern;
} summing[] = {{"cosformer", "max_len=700", LS_NS},
               {"cosformer", "max_len=700,act=1", LS_CS},
               {"performer", "m=32", LS_NS},
               {"performer", "m=32", LS_CS}};
static const struct {
    const char *mechanism, *options, *without;
    shape of;
} floored[] = {{"performer", "m=16,denom_min=0.5", "m=16", {LS_CS, 1, 16, 150, 150, PAD_TAIL}},
               {"performer", "m=16,denom_min=0.5", "m=16", {LS_NC, 1, 16, 90, 30, PAD_NONE}},
               {"cosformer", "max_len=200,eps=1", "max_len=200", {LS_CS, 4, 4, 150, 150, PAD_NONE}}};

static setting setting_of(const case_row *row, shape of, ls_level level, ls_layout layout, alias inputs, uint64_t seed)
{
    return (setting){.row = row,
                     .level = level,
                     .layout = layout,
                     .B = of.B,
                     .H = 2,
                     .d = of.d,
                     .T = of.T,
                     .S = of.S,
                     .pad = of.pad,
                     .alias = inputs,
                     .seed = seed};
}

/* mean: of the values. */
static void twins(ls_context *narrow, const char *mechanism, const char *options, int extras, shape of, double mean)
{
    const case_row row = {mechanism, of.pattern, options, (unsigned)extras};
    const int is_softmax = strcmp(mechanism, "softmax") == 0;
    const ls_level level = mechanism_of(mechanism)->traits & LAYER_ONLY ? LS_LEVEL_LAYER : LS_LEVEL_CORE;
    const setting s = setting_of(&row, of, level, (ls_layout)(of.d / 32 % 3), ALIAS_NONE,
                                 (uint64_t)(10 * of.d + of.pattern + (of.T != 150 ? 10000 * of.T : 0)));
    problem p;
    answer float32 = {0}, free_form = {0}, masked = {0};
    char what[512] = "";
    watchdog(120);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "twins: %s", here.error);
        return;
    }
    for (int64_t i = 0; mean != 0 && i < p.B * p.S * p.options.embed_dim; i++) p.value[i] += (ls_real)mean;
    int ok = problem_run(here.all, here.comm, &p, NULL, NULL, &float32) == LS_OK &&
             problem_run(narrow, here.comm, &p, NULL, NULL, &free_form) == LS_OK;
    if (is_softmax) p.attn_mask = NEW(ls_real, p.T * p.S);
    ok = ok && (!is_softmax || problem_run(narrow, here.comm, &p, NULL, NULL, &masked) == LS_OK);
    if (ok) {
        const errors rounding = between(&free_form, &float32);
        verdict(largest_of(rounding) <= most_of_rounding && least_of(rounding) >= least_of_rounding,
                "twins: %s, values of mean %g: bf16 differs from float32 by %.1e to %.1e", p.text, mean,
                least_of(rounding), largest_of(rounding));
    }
    if (ok && is_softmax) {
        const errors order = between(&free_form, &masked);
        verdict(largest_of(order) <= most_of_order, "twins: %s: they differ by %.1e", p.text, largest_of(order));
        /* wide heads do not fit where the emulated GPU has less shared memory than an A100 */
        const int plain = of.d > 64 && getenv("LONGSPAN_EMULATOR_SHARED") != NULL;
        verdict(answer_same_bits(&p, &free_form, &masked, what, sizeof what) == plain, "twins: %s: %s", p.text,
                plain ? "it ran on tensor cores, for which a block has too little memory"
                      : "they have the same bits: it did not run on tensor cores");
    }
    verdict(ok, "twins: %s: %s", p.text, ok ? "" : here.error);
    answer_free(&float32), answer_free(&free_form), answer_free(&masked);
    problem_free(&p);
}

/* Gradients jump where a denominator meets its floor, so that bf16 gives what float32 does. */
static void floors(ls_context *narrow, const char *mechanism, const char *options, const char *without, shape of)
{
    const case_row row = {mechanism, of.pattern, options, 0}, no_floor = {mechanism, of.pattern, without, 0};
    const setting s = setting_of(&row, of, LS_LEVEL_CORE, LS_BHTD, ALIAS_NONE, 9),
                  t = setting_of(&no_floor, of, LS_LEVEL_CORE, LS_BHTD, ALIAS_NONE, 9);
    problem p, q;
    answer float32 = {0}, rounded = {0}, free_of_it = {0};
    watchdog(120);
    if (problem_draw(&s, &p) != LS_OK || problem_draw(&t, &q) != LS_OK) {
        verdict(0, "floors: %s", here.error);
        return;
    }
    const int ok = problem_run(here.all, here.comm, &p, NULL, NULL, &float32) == LS_OK &&
                   problem_run(narrow, here.comm, &p, NULL, NULL, &rounded) == LS_OK &&
                   problem_run(here.all, here.comm, &q, NULL, NULL, &free_of_it) == LS_OK;
    const double error = ok ? largest_of(between(&rounded, &float32)) : 0;
    const double met = ok ? relative_error(float32.n_out, float32.out, free_of_it.out, 0) : 0;
    verdict(ok && error <= LAW_TOLERANCE, "floors: %s: bf16 differs from float32 by %.1e %s", p.text, error,
            ok ? "" : here.error);
    verdict(met > most_of_rounding, "floors: %s: no denominator meets it: out differs by %.1e without", p.text, met);
    answer_free(&float32), answer_free(&rounded), answer_free(&free_of_it);
    problem_free(&p), problem_free(&q);
}

/* NaN where rows (B,n,E) are padded: they may hold anything. */
static void spoil(const problem *p, int64_t n, const uint8_t *pad, ls_real *x)
{
    const int64_t E = p->options.embed_dim;
    for (int64_t i = 0; x != NULL && pad != NULL && i < p->B * n; i++)
        for (int64_t e = 0; pad[i] && e < E; e++) x[i * E + e] = (ls_real)NAN;
}

/* The largest of all that a layer gives. */
static double layer_error(const answer *a, const answer *b)
{
    const double of_rows = largest_of(between(a, b)),
                 of_params = relative_error(a->n_params, a->dparams, b->dparams, 0);
    return of_params > of_rows ? of_params : of_rows;
}

/* A layer whose core takes rows in bfloat16 as they are kept, beside one whose core, for the sake of a mask of zeros,
 * has floats: of the same values, but for the gradient of its output, which is rounded where it is a factor alone. One
 * is as good as the other. */
static void layers(ls_context *narrow, int extras, shape of, alias of_inputs)
{
    const case_row row = {"softmax", of.pattern, "", (unsigned)extras};
    const setting s = setting_of(&row, of, LS_LEVEL_LAYER, of.d == 64 ? LS_TBHD : LS_BTHD, of_inputs,
                                 (uint64_t)(20 * of.d + of.pattern));
    problem p;
    answer as_kept = {0}, masked = {0}, float32 = {0};
    char what[512] = "";
    watchdog(120);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "layers: %s", here.error);
        return;
    }
    spoil(&p, p.T, p.pad_q, p.query);
    spoil(&p, p.S, p.pad_k, p.key);
    spoil(&p, p.S, p.pad_k, p.value);
    int ok = problem_run(narrow, here.comm, &p, NULL, NULL, &as_kept) == LS_OK &&
             problem_run(here.all, here.comm, &p, NULL, NULL, &float32) == LS_OK;
    p.attn_mask = NEW(ls_real, p.T * p.S);
    ok = ok && problem_run(narrow, here.comm, &p, NULL, NULL, &masked) == LS_OK;
    verdict(ok, "layers: %s: %s", p.text, ok ? "" : here.error);
    if (ok) {
        const double of_kept = layer_error(&as_kept, &float32), of_masked = layer_error(&masked, &float32);
        verdict(of_kept <= most_of_rounding && of_kept <= 1.5 * of_masked,
                "layers: %s: bf16 differs from float32 by %.1e, and by %.1e where its core has floats", p.text, of_kept,
                of_masked);
        verdict(!answer_same_bits(&p, &as_kept, &masked, what, sizeof what), "layers: %s: %s", p.text,
                "they have the same bits: neither ran on tensor cores");
    }
    answer_free(&as_kept), answer_free(&masked), answer_free(&float32);
    problem_free(&p);
}

/* Scratch of forward and backward, with padding, as rows are kept and, for the sake of a mask, as floats. */
static void scratch(void)
{
    const case_row row = {"softmax", LS_CS, "", 0};
    const setting s = small_layer(&row, PAD_TAIL);
    size_t bytes[2] = {0, 0};
    for (int masked = 0; masked < 2; masked++) {
        const ls_context_options options = {
            .comm = MPI_COMM_SELF, .device = LS_CUDA, .precision = LS_BF16, .seed = 2024};
        ls_context *ctx = NULL;
        problem p;
        answer a = {0};
        if (problem_draw(&s, &p) != LS_OK) break;
        if (masked) p.attn_mask = NEW(ls_real, p.T * p.S);
        if (ls_context_create(&options, &ctx) == LS_OK && problem_run(ctx, MPI_COMM_SELF, &p, NULL, NULL, &a) == LS_OK)
            bytes[masked] = ls_context_bytes(ctx);
        answer_free(&a);
        problem_free(&p);
        ls_context_free(ctx);
    }
    verdict(bytes[0] > 0 && (double)bytes[0] < 0.7 * (double)bytes[1],
            "scratch: a layer that sees what it keeps needs %zu bytes, with floats beside %zu", bytes[0], bytes[1]);
}

/* Of the shapes above, one in three where LONGSPAN_TEST_EVERY asks for fewer than the emulated GPU's share. */
static int is_turn(void)
{
    static int turn;
    const char *every = getenv("LONGSPAN_TEST_EVERY");
    return turn++ % 3 == 0 || every == NULL || atoi(every) < 27;
}

static ls_real *repeat_rows(int64_t n, int64_t width, int64_t times, ls_real *x)
{
    ls_real *y = NEW(ls_real, times * n * width);
    for (int64_t i = 0; i < times * n * width; i++) y[i] = x[i % (n * width)];
    free(x);
    return y;
}

/* How far x (rows n) is from factor times y, whose n_y rows come again and again. */
static double repeated_error(int64_t n, const ls_real *x, int64_t n_y, const ls_real *y, double factor)
{
    ls_real *should = NEW(ls_real, n);
    for (int64_t i = 0; i < n; i++) should[i] = (ls_real)(factor * (double)y[i % n_y]);
    const double error = relative_error(n, x, should, 0);
    free(should);
    return error;
}

/* Where all keys come 512 times, outputs do not change, and a key's gradients are shared by its repetitions; where
 * queries do, the gradients of keys add up. A power of 2, so that little is rounded otherwise. The values' mean is not
 * 0: their sums grow with every key, and so would what is lost of each. Where operands are rounded, p depends on the
 * last bits of l: then keys tell of `out` alone, and on several ranks, where l is summed in another order, nothing. */
static void repeated(ls_context *ctx, int rounds, const char *mechanism, int64_t d, int of_keys)
{
    enum { FEW = 16, TIMES = 512 };
    const case_row row = {mechanism, LS_NC, "", 0};
    const setting s = {
        .row = &row, .level = LS_LEVEL_CORE, .layout = LS_BTHD, .B = 1, .H = 1, .d = d, .T = FEW, .S = FEW, .seed = 77};
    problem p, l;
    answer few = {0}, many = {0};
    watchdog(300);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "repeated: %s", here.error);
        return;
    }
    for (int64_t i = 0; i < FEW * d; i++) p.value[i] += 1, p.dout[i] += 1;
    l = problem_copy(&p);
    if (of_keys)
        l.S *= TIMES, l.key = repeat_rows(FEW, d, TIMES, l.key), l.value = repeat_rows(FEW, d, TIMES, l.value);
    else
        l.T *= TIMES, l.query = repeat_rows(FEW, d, TIMES, l.query), l.dout = repeat_rows(FEW, d, TIMES, l.dout);
    const int64_t together[64] = {FEW}; /* as each rank has them all when they are many: m is the same then */
    const int ok = problem_run(ctx, here.comm, &p, NULL, of_keys ? together : NULL, &few) == LS_OK &&
                   problem_run(ctx, here.comm, &l, NULL, NULL, &many) == LS_OK;
    verdict(ok, "repeated: %s: %s", p.text, ok ? "" : here.error);
    const double share = of_keys ? 1.0 / TIMES : TIMES;
    const struct {
        const char *name;
        double error;
    } part[] = {{"out", ok ? repeated_error(many.n_out, many.out, few.n_out, few.out, 1) : 0},
                {"dq", ok ? repeated_error(many.n_query, many.dquery, few.n_query, few.dquery, 1) : 0},
                {"dk", ok ? repeated_error(many.n_key, many.dkey, few.n_key, few.dkey, share) : 0},
                {"dv", ok ? repeated_error(many.n_key, many.dvalue, few.n_key, few.dvalue, share) : 0}};
    const double room = getenv("LONGSPAN_TEST_GPU") != NULL ? 2 : 1; /* as for golden files: tensor cores truncate */
    for (int i = 0; i < (rounds && of_keys ? 1 : 4); i++)
        verdict(part[i].error <= room * LAW_TOLERANCE, "repeated %s%s: %s: %s: error %.1e",
                of_keys ? "keys" : "queries", rounds ? ", operands rounded" : "", p.text, part[i].name, part[i].error);
    answer_free(&few), answer_free(&many);
    problem_free(&p), problem_free(&l);
}

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    refusals();
    static const char *const summed[] = {"softmax", "abc", "performer"};
    const int some = getenv("LONGSPAN_TEST_EVERY") == NULL ? 6 : 2; /* the emulated GPU takes its time */
    for (int i = 0; i < some; i++) repeated(here.all, 0, summed[i / 2], 8, i % 2);
    if (test_device() == LS_CUDA && sizeof(ls_real) == sizeof(float)) {
        const ls_context_options options = {.comm = here.comm, .device = LS_CUDA, .precision = LS_BF16, .seed = 2024};
        ls_context *narrow = NULL;
        differing();
        const ls_status status = ls_context_create(&options, &narrow);
        verdict(status == LS_OK, "bf16: %s", ls_last_error());
        if (status == LS_OK) memory(narrow);
        scratch();
        for (int i = 0; status == LS_OK && here.size == 1 && i < 4; i++)
            repeated(narrow, 1, "softmax", 64 * (1 + i / 2), i % 2);
        for (int pattern = LS_NS; status == LS_OK && pattern <= LS_NC; pattern++)
            for (int64_t d = 32; d <= 128; d += 32) {
                if (!is_turn()) continue;
                twins(narrow, "softmax", "", 0,
                      (shape){.pattern = (ls_pattern)pattern,
                              .B = 1,
                              .d = d,
                              .T = 150, /* several tiles, the last one not full */
                              .S = pattern == LS_NC ? 90 : 150,
                              .pad = d == 64 ? PAD_RANDOM : PAD_NONE},
                      0);
            }
        for (size_t i = 0; status == LS_OK && i < sizeof shapes / sizeof *shapes; i++)
            if (is_turn()) twins(narrow, "softmax", "", 0, shapes[i], 0);
        for (size_t i = 0; status == LS_OK && i < sizeof dropout_shapes / sizeof *dropout_shapes; i++) {
            if (is_turn()) twins(narrow, "softmax", "", DROPOUT, dropout_shapes[i], 0);
            if (here.size == 1 && dropout_shapes[i].d <= 64 && is_turn()) /* wider ones may not fit */
                layers(narrow, DROPOUT, dropout_shapes[i], ALIAS_NONE);
        }
        for (size_t i = 0; status == LS_OK && i < sizeof tiled_shapes / sizeof *tiled_shapes; i++)
            if (is_turn()) twins(narrow, tiled_shapes[i].mechanism, tiled_shapes[i].options, 0, tiled_shapes[i].of, 0);
        for (size_t i = 0; status == LS_OK && i < sizeof summing / sizeof *summing; i++)
            if (is_turn())
                twins(narrow, summing[i].mechanism, summing[i].options, 0,
                      (shape){summing[i].pattern, 1, 16, 700, 700, PAD_NONE}, 2);
        for (size_t i = 0; status == LS_OK && i < sizeof floored / sizeof *floored; i++)
            if (is_turn()) floors(narrow, floored[i].mechanism, floored[i].options, floored[i].without, floored[i].of);
        /* the last two: more rows than are summed up before they join memory */
        static const shape of_layers[] = {{LS_NS, 2, 32, 70, 70, PAD_TAIL},   {LS_NS, 2, 64, 150, 150, PAD_RANDOM},
                                          {LS_CS, 2, 64, 130, 130, PAD_TAIL}, {LS_CS, 1, 32, 66, 66, PAD_NONE},
                                          {LS_NC, 2, 32, 67, 90, PAD_WHOLE},  {LS_NC, 2, 64, 20, 130, PAD_RANDOM},
                                          {LS_NS, 2, 40, 70, 70, PAD_TAIL},   {LS_CS, 1, 56, 80, 80, PAD_NONE},
                                          {LS_NC, 1, 32, 20, 2100, PAD_TAIL}, {LS_NC, 1, 32, 2100, 20, PAD_TAIL}};
        for (size_t i = 0; status == LS_OK && i < sizeof of_layers / sizeof *of_layers; i++)
            if (is_turn()) layers(narrow, 0, of_layers[i], of_layers[i].pattern == LS_NC ? ALIAS_NONE : ALIAS_ALL);
        ls_context_free(narrow);
    }
    return world_close();
}
