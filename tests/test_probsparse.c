/* What the laws cannot see of probsparse: which queries are selected, and from which keys.
 *
 *   ties     queries that are all alike, each with the same keys in another order: every M is the same number only if
 *            its sum does not depend on the order, and then the first u queries are the top
 *   draws    samples computed here, by the rule, and given: the same output, bit for bit, as when the library draws
 *   ranks    the same top on all ranks as on one, u of each batch row, no padded query among them
 *   wide     in tf32 and bf16 the same top as in float32, of a layer too: what is compared is not rounded
 *   refusals samples that are no keys, or too few */
#include "harness.h"
#include "rng.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const case_row *const row_of_pattern[] = {
    &(case_row){"probsparse", LS_NS, "f=2", 0},
    &(case_row){"probsparse", LS_CS, "f=2", 0},
    &(case_row){"probsparse", LS_NC, "f=2", 0},
};

static int64_t wanted(int64_t n)
{
    const int64_t u = n < 1 ? 0 : 2 * (int64_t)ceil(log((double)n));
    return u < n ? u : n;
}

static int64_t unpadded(const uint8_t *pad, int64_t n)
{
    int64_t count = n;
    for (int64_t i = 0; pad != NULL && i < n; i++) count -= pad[i];
    return count;
}

static int draw_problem(int pattern, ls_level level, padding pad, int64_t T, int64_t S, uint64_t seed, problem *p)
{
    const setting s = {.row = row_of_pattern[pattern],
                       .level = level,
                       .layout = (ls_layout)(seed % 3),
                       .B = 2,
                       .H = 2,
                       .d = 6,
                       .T = T,
                       .S = pattern == LS_NC ? S : T,
                       .pad = pad,
                       .alias = ALIAS_NONE,
                       .seed = seed};
    watchdog(120);
    const int ok = problem_draw(&s, p) == LS_OK;
    p->wants_selected = 1;
    return verdict(ok, "%s: %s", p->text, here.error);
}

/* On all ranks, the n-th way of sharding. */
static int run(const problem *p, int kind, answer *a)
{
    int64_t queries[64], keys[64];
    draw r = draw_from(9, (uint64_t)p->T);
    draw_split(&r, kind, here.size, p->T, queries);
    draw_split(&r, kind, here.size, p->S, keys);
    return problem_run(here.all, here.comm, p, queries, keys, a);
}

/* The samples that the library would draw, as global keys: (B,T,U). */
static void draw_samples(problem *p)
{
    int64_t most = 0;
    for (int64_t b = 0; b < p->B; b++) {
        const int64_t U = wanted(unpadded(p->pad_k == NULL ? NULL : p->pad_k + b * p->S, p->S));
        most = U > most ? U : most;
    }
    p->samples_per_batch = 1;
    p->num_samples = most;
    p->samples = NEW(int32_t, p->B * p->T * most);
    for (int64_t b = 0; b < p->B; b++) {
        const uint8_t *pad = p->pad_k == NULL ? NULL : p->pad_k + b * p->S;
        const int64_t n = unpadded(pad, p->S), U = wanted(n);
        int32_t *key = NEW(int32_t, p->S);
        for (int64_t j = 0, at = 0; j < p->S; j++)
            if (pad == NULL || !pad[j]) key[at++] = (int32_t)j;
        for (int64_t t = 0; t < p->T; t++)
            for (int64_t s = 0; s < most; s++) {
                const double u = ls_uniform(2024, p->options.stream * 65536u, 0, (uint64_t)t << 34 | (uint64_t)s);
                p->samples[(b * p->T + t) * most + s] = s < U ? key[(int64_t)(u * (double)n)] : -1;
            }
        free(key);
    }
}

static void ties(int pattern)
{
    problem p;
    answer a;
    /* few keys, so that the mean of the samples has all the digits of M */
    if (!draw_problem(pattern, LS_LEVEL_CORE, PAD_NONE, 150, 8, 70, &p)) return;
    for (int64_t g = 0; g < p.B * p.H; g++)
        for (int64_t t = 1; t < p.T; t++)
            memcpy(p.query + (g * p.T + t) * p.d, p.query + g * p.T * p.d, (size_t)p.d * sizeof *p.query);
    const int64_t U = wanted(p.S), u = wanted(p.T);
    draw r = draw_from(3, 4);
    p.num_samples = U;
    p.samples = NEW(int32_t, p.T * U);
    for (int64_t t = 0; t < p.T; t++)
        for (int64_t s = 0; s < U; s++) { /* shuffled: the s-th key goes where another was, that one to the end */
            const int64_t other = draw_below(&r, s + 1);
            p.samples[t * U + s] = p.samples[t * U + other];
            p.samples[t * U + other] = (int32_t)(7 * s % p.S);
        }
    for (int kind = 0; kind < SPLITS; kind++) {
        const int ok = run(&p, kind, &a) == LS_OK;
        int64_t others = 0;
        for (int64_t i = 0; ok && i < p.B * p.H * p.T; i++) others += a.selected[i] != (i % p.T < u);
        verdict(ok && others == 0, "ties: %s shards=%s: %lld queries are not those with the smallest positions %s",
                p.text, split_name[kind], (long long)others, ok ? "" : here.error);
        answer_free(&a);
    }
    problem_free(&p);
}

/* Drawn by the library and given by us; on all ranks and on this one. */
static void draws(int pattern, padding pad, uint64_t seed)
{
    problem p, given;
    answer a, b, alone = {0};
    if (!draw_problem(pattern, LS_LEVEL_CORE, pad, 130, 210, seed, &p)) return;
    given = problem_copy(&p);
    given.wants_selected = 1;
    draw_samples(&given);
    const int ok_alone = problem_run_alone(&p, &alone) == LS_OK;
    for (int kind = 0; kind < SPLITS && ok_alone; kind++) {
        char what[512] = "";
        int ok = run(&p, kind, &a) == LS_OK;
        int ok_given = run(&given, kind, &b) == LS_OK;
        const size_t bytes = (size_t)(p.B * p.H * p.T);
        if (ok && ok_given) ok_given = answer_same_bits(&p, &a, &b, what, sizeof what);
        verdict(ok && ok_given, "draws: %s shards=%s: given samples differ%s", p.text, split_name[kind], what);
        ok = ok && memcmp(a.selected, alone.selected, bytes) == 0;
        verdict(ok, "ranks: %s shards=%s: another top than on one rank", p.text, split_name[kind]);
        answer_free(&a), answer_free(&b);
    }
    for (int64_t g = 0; ok_alone && g < p.B * p.H; g++) {
        const uint8_t *dead = p.pad_q == NULL ? NULL : p.pad_q + g / p.H * p.T;
        int64_t n = 0, padded = 0;
        for (int64_t t = 0; t < p.T; t++) {
            n += alone.selected[g * p.T + t];
            padded += alone.selected[g * p.T + t] && dead != NULL && dead[t];
        }
        verdict(n == wanted(unpadded(dead, p.T)) && padded == 0, "count: %s: %lld selected, %lld of them padded",
                p.text, (long long)n, (long long)padded);
    }
    verdict(ok_alone, "draws: %s: %s", p.text, here.error);
    answer_free(&alone);
    problem_free(&p), problem_free(&given);
}

static void wide(ls_context *float32, int pattern, ls_level level, uint64_t seed)
{
    problem p;
    answer a = {0}, b = {0};
    if (!draw_problem(pattern, level, PAD_TAIL, 230, 170, seed, &p)) return;
    const int ok = run(&p, SPLIT_EVEN, &a) == LS_OK && problem_run(float32, MPI_COMM_SELF, &p, NULL, NULL, &b) == LS_OK;
    int64_t others = 0;
    for (int64_t i = 0; ok && i < p.B * p.H * p.T; i++) others += a.selected[i] != b.selected[i];
    verdict(ok && others == 0, "wide: %s: %lld queries are not those of float32 %s", p.text, (long long)others,
            ok ? "" : here.error);
    answer_free(&a), answer_free(&b);
    problem_free(&p);
}

static void refused(problem *p, const char *what, const char *word)
{
    answer a;
    const int status = run(p, SPLIT_EVEN, &a);
    verdict(status == LS_ERR_ARGUMENT && strstr(here.error, "probsparse") != NULL && strstr(here.error, word) != NULL,
            "refusals: %s gives status %d: %s", what, status, here.error);
    answer_free(&a);
}

static void refusals(void)
{
    problem p;
    if (!draw_problem(LS_NC, LS_LEVEL_CORE, PAD_NONE, 20, 30, 1, &p)) return;
    draw_samples(&p);
    int32_t *last = &p.samples[p.B * p.T * p.num_samples - 1]; /* one rank alone sees it */
    const int32_t good = *last;
    *last = 30;
    refused(&p, "a sample beyond the keys", "0 to 29");
    *last = -2;
    refused(&p, "a sample below -1", "0 to 29");
    *last = good;
    p.samples_per_batch = 0;
    p.num_samples = 3;
    refused(&p, "three samples of eight", "num_samples");
    problem_free(&p);
}

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    ls_context *float32 = NULL; /* of each rank alone, whatever the precision of here */
    const ls_context_options options = {.comm = MPI_COMM_SELF, .device = test_device(), .seed = 2024};
    const int opened = ls_context_create(&options, &float32) == LS_OK;
    verdict(opened, "wide: no context: %s", opened ? "" : ls_last_error());
    for (int pattern = LS_NS; pattern <= LS_NC; pattern++) {
        ties(pattern);
        wide(float32, pattern, LS_LEVEL_CORE, 500);
        for (uint64_t seed = 501; seed < 507; seed++) wide(float32, pattern, LS_LEVEL_LAYER, seed);
        for (int pad = 0; pad < PADDINGS; pad++) draws(pattern, (padding)pad, (uint64_t)(10 * pattern + pad));
    }
    refusals();
    ls_context_free(float32);
    return world_close();
}
