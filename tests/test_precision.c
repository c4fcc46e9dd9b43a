/* What precision does, and where it is refused. Golden files in each precision: test_golden.
 *
 *   refusals  the CPU, and the double build, compute in their own numbers alone; before anything is allocated
 *   memory    what a layer keeps for backward
 *   twins     exact softmax in bf16, as it comes (by the tensor cores) and with a mask of zeros, which only the plain
 *             kernels know: the same numbers up to the order of sums, and both near those of float32 */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

/* The last: of a few probabilities that one order of sums rounds up, and the other down. */
static const double most_of_rounding = 2e-2, least_of_rounding = 1e-4, most_of_order = 2e-3;

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

/* Bytes that a layer of exact softmax keeps: q, k, v and the output, and a number a row for the statistics. */
static size_t kept_bytes(ls_context *ctx)
{
    const case_row row = {"softmax", LS_CS, "", 0};
    const setting s = {.row = &row,
                       .level = LS_LEVEL_LAYER,
                       .layout = LS_BTHD,
                       .B = 1,
                       .H = 2,
                       .d = 32,
                       .T = 300,
                       .S = 300,
                       .alias = ALIAS_ALL,
                       .seed = 5};
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
    return (errors){relative_error(a->n_out, a->out, b->out, 0), relative_error(a->n_query, a->dquery, b->dquery, 0),
                    relative_error(a->n_key, a->dkey, b->dkey, 0), relative_error(a->n_key, a->dvalue, b->dvalue, 0)};
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
};

static void twins(ls_context *narrow, shape of)
{
    const case_row row = {"softmax", of.pattern, "", 0};
    const setting s = {.row = &row,
                       .level = LS_LEVEL_CORE,
                       .layout = (ls_layout)(of.d / 32 % 3),
                       .B = of.B,
                       .H = 2,
                       .d = of.d,
                       .T = of.T,
                       .S = of.S,
                       .pad = of.pad,
                       .alias = ALIAS_NONE,
                       .seed = (uint64_t)(10 * of.d + of.pattern + (of.T != 150 ? 10000 * of.T : 0))};
    problem p;
    answer float32 = {0}, free_form = {0}, masked = {0};
    char what[512] = "";
    watchdog(120);
    if (problem_draw(&s, &p) != LS_OK) {
        verdict(0, "twins: %s", here.error);
        return;
    }
    int ok = problem_run(here.all, here.comm, &p, NULL, NULL, &float32) == LS_OK &&
             problem_run(narrow, here.comm, &p, NULL, NULL, &free_form) == LS_OK;
    p.attn_mask = NEW(ls_real, p.T * p.S);
    ok = ok && problem_run(narrow, here.comm, &p, NULL, NULL, &masked) == LS_OK;
    if (ok) {
        const errors order = between(&free_form, &masked), rounding = between(&free_form, &float32);
        verdict(largest_of(order) <= most_of_order, "twins: %s: they differ by %.1e", p.text, largest_of(order));
        verdict(largest_of(rounding) <= most_of_rounding && least_of(rounding) >= least_of_rounding,
                "twins: %s: bf16 differs from float32 by %.1e to %.1e", p.text, least_of(rounding),
                largest_of(rounding));
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

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    refusals();
    if (test_device() == LS_CUDA && sizeof(ls_real) == sizeof(float)) {
        const ls_context_options options = {.comm = here.comm, .device = LS_CUDA, .precision = LS_BF16, .seed = 2024};
        ls_context *narrow = NULL;
        differing();
        const ls_status status = ls_context_create(&options, &narrow);
        verdict(status == LS_OK, "bf16: %s", ls_last_error());
        if (status == LS_OK) memory(narrow);
        for (int pattern = LS_NS; status == LS_OK && pattern <= LS_NC; pattern++)
            for (int64_t d = 32; d <= 128; d += 32)
                twins(narrow, (shape){.pattern = (ls_pattern)pattern,
                                      .B = 1,
                                      .d = d,
                                      .T = 150, /* several tiles, the last one not full */
                                      .S = pattern == LS_NC ? 90 : 150,
                                      .pad = d == 64 ? PAD_RANDOM : PAD_NONE});
        for (size_t i = 0; status == LS_OK && i < sizeof shapes / sizeof *shapes; i++) twins(narrow, shapes[i]);
        ls_context_free(narrow);
    }
    return world_close();
}
