#include "beam.h"
#include "model.h"
#include "status.h"

#include <math.h>
#include <stdlib.h>

/* A byte and what stands before it: targets share their beginnings. */
typedef struct node {
    int64_t before; /* -1: nothing */
    char byte;
} node;

typedef struct way {
    double score;
    int64_t before; /* node */
    int32_t row, token;
} way;

struct beam_search {
    int64_t beams, steps;
    double penalty;
    double *score; /* (beams) log-probabilities; -inf: nothing goes on there */
    int64_t *end;  /* (beams) their last nodes */
    way *ways;     /* (beams, MODEL_VOCABULARY) */
    node *nodes;
    int64_t used, room;
    double best; /* of those that have ended */
    int64_t best_end, ended;
};

ls_status beam_create(int64_t beams, double penalty, beam_search **out)
{
    beam_search *b = *out = calloc(1, sizeof *b);
    if (b == NULL) LS_FAIL(LS_ERR_MEMORY, "beam search: no memory");
    *b = (beam_search){.beams = beams, .penalty = penalty, .best = -INFINITY, .best_end = -1};
    b->score = malloc((size_t)beams * sizeof *b->score);
    b->end = malloc((size_t)beams * sizeof *b->end);
    b->ways = malloc((size_t)beams * MODEL_VOCABULARY * sizeof *b->ways);
    if (b->score == NULL || b->end == NULL || b->ways == NULL)
        LS_FAIL(LS_ERR_MEMORY, "beam search: no memory for %lld beams", (long long)beams);
    for (int64_t r = 0; r < beams; r++) b->score[r] = r == 0 ? 0 : -INFINITY, b->end[r] = -1;
    return LS_OK;
}

void beam_free(beam_search *b)
{
    if (b == NULL) return;
    free(b->score), free(b->end), free(b->ways), free(b->nodes);
    free(b);
}

static int by_score(const void *a, const void *b)
{
    const way *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    if (x->row != y->row) return x->row < y->row ? -1 : 1;
    return x->token < y->token ? -1 : 1;
}

/* Adds the ways in which a row goes on: log softmax of its logits, of which the beginning is none. */
static ls_status list_ways(const beam_search *b, int64_t row, const ls_real *logits, int64_t *n)
{
    double top = -INFINITY, sum = 0;
    LS_TRY(decoder_check(logits));
    for (int32_t v = 0; v < MODEL_VOCABULARY; v++)
        if (v != TOKEN_BOS && logits[v] > top) top = (double)logits[v];
    for (int32_t v = 0; v < MODEL_VOCABULARY; v++) sum += v == TOKEN_BOS ? 0 : exp((double)logits[v] - top);
    for (int32_t v = 0; v < MODEL_VOCABULARY; v++)
        if (v != TOKEN_BOS)
            b->ways[(*n)++] = (way){b->score[row] + (double)logits[v] - top - log(sum), b->end[row], (int32_t)row, v};
    return LS_OK;
}

static double scored(const beam_search *b, double score, int64_t tokens)
{
    return score / pow((double)tokens, b->penalty);
}

/* What has `tokens` tokens ends behind a node. */
static void put_aside(beam_search *b, double score, int64_t tokens, int64_t end)
{
    const double x = scored(b, score, tokens);
    if (x > b->best) b->best = x, b->best_end = end;
}

static ls_status make_room(beam_search *b)
{
    if (b->used + b->beams <= b->room) return LS_OK;
    const int64_t room = 2 * b->room + b->beams + 1024;
    node *more = realloc(b->nodes, (size_t)room * sizeof *more);
    if (more == NULL) LS_FAIL(LS_ERR_MEMORY, "beam search: no memory for %lld bytes", (long long)room);
    b->nodes = more, b->room = room;
    return LS_OK;
}

ls_status beam_step(beam_search *b, const ls_real *logits, int32_t *token, int64_t *from, int *done)
{
    int64_t n = 0, live = 0;
    LS_TRY(make_room(b));
    for (int64_t r = 0; r < b->beams; r++)
        if (b->score[r] > -INFINITY) LS_TRY(list_ways(b, r, logits + r * MODEL_VOCABULARY, &n));
    qsort(b->ways, (size_t)n, sizeof *b->ways, by_score);
    b->steps++;
    for (int64_t i = 0; i < n && live < b->beams; i++) {
        const way *w = &b->ways[i];
        if (w->token == TOKEN_EOS) {
            if (i >= b->beams) continue; /* others are better begun */
            put_aside(b, w->score, b->steps, w->before);
            b->ended++;
            continue;
        }
        b->nodes[b->used] = (node){w->before, (char)w->token};
        b->end[live] = b->used++, b->score[live] = w->score; /* ways have theirs already */
        token[live] = w->token, from[live] = w->row;
        live++;
    }
    for (int64_t r = live; r < b->beams; r++) b->score[r] = -INFINITY, token[r] = 0, from[r] = r;
    *done = live == 0 || (b->ended >= b->beams && b->best >= scored(b, b->score[0], b->steps));
    return LS_OK;
}

ls_status beam_best(const beam_search *b, char **text, size_t *size)
{
    beam_search all = *b;
    for (int64_t r = 0; r < b->beams; r++)
        if (b->score[r] > -INFINITY) put_aside(&all, b->score[r], ls_max(1, b->steps), b->end[r]);
    size_t n = 0;
    for (int64_t i = all.best_end; i >= 0; i = b->nodes[i].before) n++;
    *text = malloc(n + 1);
    if (*text == NULL) LS_FAIL(LS_ERR_MEMORY, "beam search: no memory for %zu bytes", n);
    *size = n;
    (*text)[n] = 0;
    for (int64_t i = all.best_end; i >= 0; i = b->nodes[i].before) (*text)[--n] = b->nodes[i].byte;
    return LS_OK;
}
