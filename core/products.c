#include "products.h"

#include "gemm.h"
#include "real.h"

#include <stdlib.h>

static _Thread_local struct {
    double operations;
    ls_products *list;
} tally;

double ls_products_operations(void)
{
    return tally.operations;
}

void ls_products_keep(ls_products *list)
{
    tally.list = list;
}

void ls_products_free(ls_products *list)
{
    if (tally.list == list) tally.list = NULL;
    free(list->kind);
    *list = (ls_products){0};
}

int ls_products_count(int64_t m, int64_t n, int64_t k, int64_t batch)
{
    tally.operations += 2 * (double)m * (double)n * (double)k * (double)batch;
    return tally.list != NULL;
}

/* Kinds are few (tens), and come in the same turns again and again: the search goes on from where the last one ended.
 */
void ls_product_list(const ls_product *p)
{
    ls_products *list = tally.list;
    for (int64_t i = 0; i < list->kinds; i++) {
        const int64_t at = (list->last + i) % list->kinds;
        if (memcmp(&list->kind[at].product, p, sizeof *p) != 0) continue;
        list->kind[at].times++;
        list->last = at;
        return;
    }
    if (list->kinds == list->room) {
        const int64_t room = 2 * list->room + 64;
        void *more = realloc(list->kind, (size_t)room * sizeof *list->kind);
        if (more == NULL) {
            list->short_of_memory = 1;
            return;
        }
        list->kind = more;
        list->room = room;
    }
    list->last = list->kinds++;
    list->kind[list->last].product = *p;
    list->kind[list->last].times = 1;
}

static int64_t span(int64_t rows, int64_t columns, int64_t ld, int64_t stride, int64_t batch)
{
    return (batch - 1) * stride + (rows - 1) * ld + columns;
}

void ls_product_spans(const ls_product *p, int64_t *a, int64_t *b, int64_t *c)
{
    *a = span(p->transpose_a ? p->k : p->m, p->transpose_a ? p->m : p->k, p->lda, p->stride_a, p->batch);
    *b = span(p->transpose_b ? p->n : p->k, p->transpose_b ? p->k : p->n, p->ldb, p->stride_b, p->batch);
    *c = span(p->m, p->n, p->ldc, p->stride_c, p->batch);
}

static void repeat_on_cpu(const ls_product *p, const void *a, const void *b, void *c)
{
    const int ta = (int)p->transpose_a, tb = (int)p->transpose_b;
    const double beta = p->adds ? 1 : 0;
    if (p->in_double)
        ls_gemm_double(ta, tb, p->m, p->n, p->k, 1, a, p->lda, b, p->ldb, beta, c, p->ldc);
    else
        ls_gemm(ta, tb, p->m, p->n, p->k, 1, a, p->lda, b, p->ldb, beta, c, p->ldc);
}

void ls_product_repeat(ls_queue *queue, const ls_product *p, const void *a, const void *b, void *c)
{
    void (*const on_gpu)(ls_queue *, const ls_product *, const void *, const void *, void *) =
        LS_IF_CUDA(ls_product_repeat_cuda);
    ls_products *list = tally.list;
    const double operations = tally.operations;
    tally.list = NULL;
    if (queue == NULL)
        repeat_on_cpu(p, a, b, c);
    else
        on_gpu(queue, p, a, b, c);
    tally.list = list;
    tally.operations = operations;
}
