#include "order.h"

#include "real.h"
#include "rng.h"

#include <stdlib.h>

enum { STREAM_ORDER = 0x4f524452, STREAM_WINDOW = 0x57494e44 };

/* A number below n: the high half of n times 64 random bits; 128 bits in two parts. */
static int64_t below(uint64_t seed, uint32_t stream, int64_t epoch, int64_t draw, int64_t n)
{
    uint32_t word[4];
    ls_random4(seed, stream, (uint32_t)epoch, (uint64_t)draw, word);
    const uint64_t N = (uint64_t)n, low = word[0] * (N & 0xffffffff);
    const uint64_t cross = word[1] * (N & 0xffffffff) + (low >> 32);
    const uint64_t other = word[0] * (N >> 32) + (cross & 0xffffffff);
    return (int64_t)(word[1] * (N >> 32) + (cross >> 32) + (other >> 32));
}

typedef struct entry {
    int64_t length, source, document;
} entry;

static int by_length(const void *x, const void *y)
{
    const entry *a = x, *b = y;
    if (a->length != b->length) return a->length < b->length ? -1 : 1;
    if (a->source != b->source) return a->source < b->source ? -1 : 1;
    return (a->document > b->document) - (a->document < b->document);
}

/* Sorts n = whole batches of documents by length, and shuffles the batches. */
static void arrange(const order_lengths *s, const epoch_order *o, int64_t from, int64_t n, entry *list)
{
    int64_t place[ORDER_WINDOW];
    const int64_t batches = n / o->batch;
    for (int64_t k = 0; k < n; k++) {
        const int64_t i = o->index[from + k], source = s->source_offset[i + 1] - s->source_offset[i];
        list[k] = (entry){source + s->target_offset[i + 1] - s->target_offset[i], source, i};
    }
    qsort(list, (size_t)n, sizeof *list, by_length);
    for (int64_t b = 0; b < batches; b++) place[b] = b;
    for (int64_t b = batches - 1; b > 0; b--) {
        const int64_t other = below(o->seed, STREAM_WINDOW, o->epoch, from + b, b + 1), kept = place[b];
        place[b] = place[other];
        place[other] = kept;
    }
    for (int64_t k = 0; k < n; k++) o->index[from + k] = list[place[k / o->batch] * o->batch + k % o->batch].document;
}

ls_status order_epoch(const order_lengths *s, uint64_t seed, int64_t rows, int64_t epoch, epoch_order *o)
{
    if (o->index != NULL && o->seed == seed && o->batch == rows && o->epoch == epoch) return LS_OK;
    const int64_t n = s->documents, window = ls_min(n, ls_min(rows, n) * ORDER_WINDOW);
    entry *list = malloc((size_t)window * sizeof *list);
    if (o->index == NULL) o->index = malloc((size_t)n * sizeof *o->index);
    if (list == NULL || o->index == NULL) {
        free(list);
        LS_FAIL(LS_ERR_MEMORY, "data: no memory for the order of %lld documents", (long long)n);
    }
    o->seed = seed;
    o->batch = rows;
    o->epoch = epoch;
    for (int64_t i = 0; i < n; i++) o->index[i] = i;
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t other = below(seed, STREAM_ORDER, epoch, i, i + 1), kept = o->index[i];
        o->index[i] = o->index[other];
        o->index[other] = kept;
    }
    const int64_t before = epoch * n % rows;                         /* of the batch that the epoch begins in */
    const int64_t head = before == 0 ? 0 : ls_min(n, rows - before); /* what is missing to fill it */
    const int64_t end = head + (n - head) / rows * rows;
    for (int64_t from = head; from < end; from += rows * ORDER_WINDOW)
        arrange(s, o, from, ls_min(end - from, rows * ORDER_WINDOW), list);
    free(list);
    return LS_OK;
}
