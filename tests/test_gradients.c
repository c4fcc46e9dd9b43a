/* Hand-written gradients against central differences of the forward pass alone, on tiny shapes, for every case of
 * cases.def, both levels, every input and every parameter, each element of them:
 *
 *   L(x) = Σ dout · out(x),   dL/dx_i ≈ (8 (L(x+h) - L(x-h)) - (L(x+2h) - L(x-2h))) / 12h,   error O(h⁴)
 *
 * With LONGSPAN_TEST_EVERY, since the emulated GPU is slow, all elements of an input move at once, each by h or by -h,
 * and all parameters.
 *
 * In double, h = 2e-4, they must agree to 1e-6 of the largest element of the tensor; in float the rounding of L leaves
 * two digits, enough to see a wrong formula. On several ranks (mpirun) L is summed over the shards. */
#include "harness.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef LS_REAL_DOUBLE
#define STEP 2e-4
#define TOLERANCE 1e-6
#else
#define STEP 2e-2
#define TOLERANCE 1e-2
#endif

/* One attention that evaluates L of a problem again and again: its pieces are cut anew each time. */
typedef struct loss {
    ls_attention *attention;
    const int64_t *queries, *keys;
    int status;
    uint8_t *selected; /* of probsparse: what forward selected; (B,H,T) of this rank */
    int moved;         /* another evaluation has selected others */
} loss;

static double evaluate(loss *l, const problem *p)
{
    pieces x;
    double sum = 0;
    if (l->status == LS_OK) l->status = pieces_make(here.all, here.comm, p, l->queries, l->keys, &x);
    if (l->status != LS_OK) return NAN;
    l->status = same_status(here.comm, ls_attention_forward(l->attention, &x.shape, &x.io, p->params, x.out, NULL));
    const int64_t n = p->B * p->heads * x.queries.n * p->out_width;
    for (int64_t i = 0; l->status == LS_OK && i < n; i++) sum += (double)x.dout[i] * (double)x.out[i];
    const size_t bytes = (size_t)(p->B * p->H * x.queries.n);
    if (x.selected != NULL && l->selected == NULL) {
        l->selected = NEW(uint8_t, bytes);
        memcpy(l->selected, x.selected, bytes);
    }
    int moved = x.selected != NULL && memcmp(l->selected, x.selected, bytes) != 0;
    MPI_Allreduce(MPI_IN_PLACE, &moved, 1, MPI_INT, MPI_MAX, here.comm);
    l->moved |= moved;
    pieces_free(&x);
    MPI_Allreduce(MPI_IN_PLACE, &sum, 1, MPI_DOUBLE, MPI_SUM, here.comm);
    return sum;
}

static int together; /* all elements move */

/* Along `way` (n) from x. */
static double difference(loss *l, const problem *p, ls_real *x, const ls_real *way, int64_t n, double step)
{
    ls_real *at = NEW(ls_real, n);
    double sum = 0;
    memcpy(at, x, (size_t)n * sizeof *at);
    for (int k = -2; k <= 2; k++) {
        static const double weight[] = {1, -8, 0, 8, -1};
        if (k == 0) continue;
        for (int64_t i = 0; i < n; i++) x[i] = (ls_real)((double)at[i] + k * step * (double)way[i]);
        sum += weight[k + 2] * evaluate(l, p);
    }
    memcpy(x, at, (size_t)n * sizeof *at);
    free(at);
    return sum / (12 * step);
}

/* How far the gradient is off along `way`, INFINITY if that cannot be seen. Where the function bends within the step (a
 * kink of relu), or curves too much for it, shorter steps see what is true at x: a wrong formula disagrees with all of
 * them. */
static double error_along(loss *l, const problem *p, ls_real *x, const ls_real *gradient, const ls_real *way, int64_t n,
                          double enough)
{
    double least = INFINITY, step = STEP, want = 0;
    for (int64_t i = 0; i < n; i++) want += (double)gradient[i] * (double)way[i];
    for (int k = 0; k < 3 && !(least <= enough); k++, step /= 12) {
        l->moved = 0;
        const double e = fabs(difference(l, p, x, way, n, step) - want);
        if (!l->moved && e <= 1e300) least = fmin(least, e); /* moved: the step crosses a jump of the function */
    }
    return least;
}

/* The worst disagreement over a tensor, relative to its largest element or to a hundredth of its siblings'. */
static double compare(loss *l, const problem *p, ls_real *x, const ls_real *gradient, int64_t n, double siblings)
{
    double worst = 0, most = siblings / 100;
    int64_t compared = 0, tried = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, fabs((double)gradient[i]));
    if (together && n > 0) {
        static uint64_t seed;
        draw signs = draw_from(seed++, 2);
        ls_real *way = NEW(ls_real, n);
        for (int64_t i = 0; i < n; i++) way[i] = draw_below(&signs, 2) ? 1 : -1;
        worst = error_along(l, p, x, gradient, way, n, TOLERANCE * most);
        free(way);
    }
    for (int64_t i = 0; i < n && l->status == LS_OK && !together; i++) {
        static const ls_real one = 1;
        const double e = error_along(l, p, x + i, gradient + i, &one, 1, TOLERANCE * most);
        tried++;
        if (l->moved && e > 1e300) continue;
        compared++;
        worst = fmax(worst, e);
    }
    if (2 * compared < tried) return INFINITY; /* a few jumps are no excuse for comparing nothing */
    return worst <= 0 ? 0 : most > 0 ? worst / most : INFINITY;
}

static void check(const char *text, const char *tensor, double error, const loss *l)
{
    verdict(error <= TOLERANCE && l->status == LS_OK, "%s: gradient of %s differs by %.2e %s", text, tensor, error,
            l->status == LS_OK ? "" : here.error);
}

static void gradients_of(const setting *s)
{
    problem p;
    answer a;
    loss l = {0};
    int64_t queries[64], keys[64];
    draw r = draw_from(s->seed, 1);
    draw_split(&r, SPLIT_RANDOM, here.size, s->T, queries);
    draw_split(&r, SPLIT_RANDOM, here.size, s->S, keys);
    l.queries = queries;
    l.keys = keys;
    l.status = (int)problem_draw(s, &p);
    p.wants_selected = strcmp(p.options.mechanism, "probsparse") == 0;
    a = (answer){0};
    if (l.status == LS_OK) l.status = problem_run(here.all, here.comm, &p, queries, keys, &a);
    if (l.status == LS_OK) l.status = same_status(here.comm, ls_attention_create(here.all, &p.options, &l.attention));
    if (l.status != LS_OK) {
        verdict(0, "%s: %s", p.text, here.error);
    } else {
        evaluate(&l, &p);
        double all = fmax(largest(a.n_query, a.dquery), largest(a.n_params, a.dparams));
        if (a.dkey != NULL) all = fmax(all, largest(a.n_key, a.dkey));
        if (a.dvalue != NULL) all = fmax(all, largest(a.n_key, a.dvalue));
        check(p.text, "query", compare(&l, &p, p.query, a.dquery, a.n_query, all), &l);
        if (p.key != NULL) check(p.text, "key", compare(&l, &p, p.key, a.dkey, a.n_key, all), &l);
        if (p.value != NULL) check(p.text, "value", compare(&l, &p, p.value, a.dvalue, a.n_key, all), &l);
        if (together && a.n_params > 0)
            check(p.text, "all parameters", compare(&l, &p, p.params, a.dparams, a.n_params, all), &l);
        for (int i = 0; i < p.parameters && !together; i++) {
            const ls_param_info *info = &p.parameter[i].info;
            check(p.text, p.parameter[i].name,
                  compare(&l, &p, p.params + info->offset, a.dparams + info->offset, info->count, all), &l);
        }
    }
    if (l.attention != NULL) ls_attention_free(l.attention);
    free(l.selected);
    answer_free(&a);
    problem_free(&p);
}

int main(int argc, char **argv)
{
    world_open(&argc, &argv);
    together = getenv("LONGSPAN_TEST_EVERY") != NULL;
    for (const case_row *row = cases; row->mechanism != NULL; row++) {
        const unsigned traits = mechanism_of(row->mechanism)->traits;
        const int cross = row->pattern == LS_NC || row->pattern == LS_CC;
        if (!library_has(row->mechanism, row->pattern) || row->extras & (NO_DIFFERENCES | STEEP)) continue;
        if (argc == 2 && strcmp(argv[1], row->mechanism) != 0) continue;
        for (int variant = 0; variant < 4; variant++) { /* two levels, then again with padding */
            watchdog(240);
            const ls_level level = variant % 2 ? LS_LEVEL_LAYER : LS_LEVEL_CORE;
            if (level == LS_LEVEL_CORE && traits & LAYER_ONLY) continue;
            const int64_t H = traits & ONE_HEAD ? 1 : 2, index = row_number(row);
            static const alias self[] = {ALIAS_NONE, ALIAS_ALL_NULL, ALIAS_ALL, ALIAS_NONE};
            static const alias crossing[] = {ALIAS_NONE, ALIAS_VALUE_NULL, ALIAS_VALUE, ALIAS_NONE};
            const alias one_input = level == LS_LEVEL_CORE ? ALIAS_ALL : ALIAS_ALL_NULL;
            const padding pads[] = {PAD_TAIL, PAD_RANDOM, PAD_WHOLE};
            const setting s = {.row = row,
                               .level = level,
                               .layout = (ls_layout)((index + variant) % 3),
                               .B = 2,
                               .H = H,
                               .d = 4 / H,
                               .T = cross ? 5 : 7,
                               .S = 7,
                               .pad = variant < 2 ? PAD_NONE : pads[(index + variant) % 3],
                               .alias = traits & ONE_INPUT ? one_input
                                        : cross            ? crossing[variant]
                                                           : self[variant],
                               .seed = (uint64_t)(10 * index + variant + 1)};
            gradients_of(&s);
        }
    }
    return world_close();
}
