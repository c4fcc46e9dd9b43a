/* Beam search over a language of three letters whose probabilities depend on the last two, so that the most probable
 * target is not what the most probable letters lead to: against all targets there are. */
#include "beam.h"
#include "data.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { SURE = -1 /* a language of one text, any other has a small chance to end early */ };
enum { LETTERS = 3, LONGEST = 4, WIDE = 162 /* twice LETTERS ^ LONGEST */, CASES = 20 };

/* Log-probabilities of a, b, c and the end behind a text; all else is impossible, as logits can say it. */
static void logits_behind(const char *text, size_t n, int number, ls_real *logits)
{
    const unsigned last = n > 0 ? (unsigned)text[n - 1] - 'a' + 1 : 0,
                   other = n > 1 ? (unsigned)text[n - 2] - 'a' + 1 : 0;
    for (int v = 0; v < MODEL_VOCABULARY; v++) logits[v] = -200;
    for (unsigned v = 0; v < LETTERS; v++)
        logits['a' + v] = (ls_real)(2 * sin(1 + number + 5.0 * v + 3.0 * last + 7.0 * other * (v + 1)));
    logits[TOKEN_EOS] = (ls_real)(sin(2.0 + number + 4.0 * last) - 0.5);
    logits[TOKEN_BOS] = 100; /* which no target has */
    if (number != SURE) return;
    for (int v = 'a'; v < 'a' + LETTERS; v++) logits[v] = 0;
    logits[n < LONGEST - 1 ? 'a' : TOKEN_EOS] = 8;
    if (n < LONGEST - 1) logits[TOKEN_EOS] = 2;
}

static double log_probability(const ls_real *logits, int token)
{
    double sum = 0;
    for (int v = 0; v < MODEL_VOCABULARY; v++)
        if (v != TOKEN_BOS) sum += exp((double)logits[v]);
    return (double)logits[token] - log(sum);
}

/* What a text is worth: with its end, or of LONGEST letters and cut there. */
static double worth(const char *text, size_t n, int ends, int number, double penalty)
{
    ls_real logits[MODEL_VOCABULARY];
    double sum = 0;
    for (size_t i = 0; i < n + (size_t)ends; i++) {
        logits_behind(text, i, number, logits);
        sum += log_probability(logits, i < n ? text[i] : TOKEN_EOS);
    }
    return sum / pow((double)(n + (size_t)ends), penalty);
}

/* The best of all texts that begin so. */
static void best_of_all(char *text, size_t n, int number, double penalty, double *best, char *of_best)
{
    const double whole = n < LONGEST ? worth(text, n, 1, number, penalty) : worth(text, n, 0, number, penalty);
    if (whole > *best) {
        *best = whole;
        memcpy(of_best, text, n);
        of_best[n] = 0;
    }
    for (char c = 'a'; n < LONGEST && c < 'a' + LETTERS; c++) {
        text[n] = c;
        best_of_all(text, n + 1, number, penalty, best, of_best);
    }
}

/* Texts of at most LONGEST tokens. */
static char *searched(int64_t beams, int number, double penalty)
{
    static char row[2][WIDE][LONGEST + 1];
    ls_real *logits = calloc((size_t)beams * MODEL_VOCABULARY, sizeof *logits);
    int32_t *token = calloc((size_t)beams, sizeof *token);
    int64_t *from = calloc((size_t)beams, sizeof *from);
    beam_search *b;
    int done = 0;
    assert_true(logits != NULL && token != NULL && from != NULL);
    assert_int_equal(beam_create(beams, penalty, &b), LS_OK);
    for (size_t i = 0; i < LONGEST && !done; i++) {
        for (int64_t r = 0; r < beams; r++) logits_behind(row[i % 2][r], i, number, logits + r * MODEL_VOCABULARY);
        assert_int_equal(beam_step(b, logits, token, from, &done), LS_OK);
        for (int64_t r = 0; r < beams; r++) {
            assert_in_range(from[r], 0, beams - 1);
            memcpy(row[(i + 1) % 2][r], row[i % 2][from[r]], i);
            row[(i + 1) % 2][r][i] = (char)token[r];
        }
    }
    char *text;
    size_t size;
    assert_int_equal(beam_best(b, &text, &size), LS_OK);
    assert_int_equal(strlen(text), size);
    beam_free(b);
    free(logits), free(token), free(from);
    return text;
}

/* As wide as there are texts, it finds the best. */
static void test_wide(void **unused)
{
    (void)unused;
    int shorter = 0, longer = 0;
    for (int number = 0; number < CASES; number++) {
        size_t length[2];
        for (int k = 0; k < 2; k++) {
            const double penalty = k == 0 ? 0 : 1.3;
            char text[LONGEST + 1], expected[LONGEST + 1] = "";
            double best = -INFINITY;
            best_of_all(text, 0, number, penalty, &best, expected);
            char *found = searched(WIDE, number, penalty);
            assert_string_equal(found, expected);
            length[k] = strlen(found);
            free(found);
        }
        shorter += length[0]<length[1], longer += length[0]> length[1];
    }
    assert_true(shorter > 0); /* the penalty has an effect, */
    assert_int_equal(longer, 0);
}

/* One beam takes the most probable token each time; a few find what is worth more, or the same. */
static void test_narrow(void **unused)
{
    (void)unused;
    int better = 0;
    for (int number = 0; number < CASES; number++) {
        char greedy[LONGEST + 1] = "";
        size_t n = 0;
        int ends = 0;
        while (n < LONGEST && !ends) {
            ls_real logits[MODEL_VOCABULARY];
            logits_behind(greedy, n, number, logits);
            int most = TOKEN_EOS;
            for (int v = 'a'; v < 'a' + LETTERS; v++)
                if (logits[v] > logits[most]) most = v;
            if (most == TOKEN_EOS)
                ends = 1;
            else
                greedy[n++] = (char)most, greedy[n] = 0;
        }
        char *one = searched(1, number, 0), *few = searched(6, number, 0);
        assert_string_equal(one, greedy);
        const size_t m = strlen(few);
        better += worth(few, m, m < LONGEST, number, 0) > worth(greedy, n, ends, number, 0) + 1e-9;
        free(one), free(few);
    }
    assert_true(better > CASES / 10);
}

/* Where one text is far more probable than all others, ends that are not are the next best ways from the beginning on:
 * they do not end the search. */
static void test_sure(void **unused)
{
    (void)unused;
    for (int64_t beams = 1; beams <= 4; beams++)
        for (int k = 0; k < 2; k++) {
            char *found = searched(beams, SURE, k);
            assert_string_equal(found, "aaa");
            free(found);
        }
}

static void test_not_finite(void **unused)
{
    (void)unused;
    ls_real logits[MODEL_VOCABULARY] = {0};
    int32_t token;
    int64_t from;
    int done;
    beam_search *b;
    assert_int_equal(beam_create(1, 1, &b), LS_OK);
    logits[70] = (ls_real)NAN;
    assert_int_equal(beam_step(b, logits, &token, &from, &done), LS_ERR_NONFINITE);
    assert_non_null(strstr(ls_last_error(), "token 70"));
    beam_free(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_wide), cmocka_unit_test(test_narrow),
                                       cmocka_unit_test(test_sure), cmocka_unit_test(test_not_finite)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
