#include "bench.h"

#include "real.h"

#include <stdlib.h>

ls_status bench_begin(const bench *b, ls_context *ctx, double *begin)
{
    LS_TRY(agree(b->r, ls_context_wait(ctx)));
    *begin = seconds_now();
    return LS_OK;
}

ls_status bench_lap(const bench *b, ls_context *ctx, double begin, double *seconds)
{
    const ls_status status = ls_context_wait(ctx);
    double mine = seconds_now() - begin;
    LS_TRY(agree(b->r, status));
    if (MPI_Allreduce(&mine, seconds, 1, MPI_DOUBLE, MPI_MAX, b->r->comm) != MPI_SUCCESS)
        LS_FAIL(LS_ERR_COMM, "mpi: comparing times failed");
    return LS_OK;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

double bench_median(double *x, int64_t n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

int64_t bench_calls(double seconds)
{
    const double long_enough = 0.01;
    return seconds < long_enough / 200 ? 200 : (int64_t)(long_enough / seconds) + 1;
}

/* All 0 would be multiplied faster by some processors; these have sums that stay small. */
ls_status bench_fill(ls_context *ctx, ls_real *x, int64_t n)
{
    enum { PIECE = 89 * 64 };
    ls_real some[PIECE];
    for (int i = 0; i < PIECE; i++) some[i] = (ls_real)(i % 89 - 44) * (ls_real)0.01;
    for (int64_t i = 0; i < n; i += PIECE)
        LS_TRY(ls_device_write(ctx, x + i, some, (size_t)ls_min(PIECE, n - i) * sizeof *some));
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ ceilings */

/* A matrix grows until a product takes LONG_PRODUCT or it has LARGEST rows: with the square of the launch it hides what
 * a call costs, with the side what the edges of tiles cost. A copy grows until it takes LONG_COPY or is MOST, which no
 * GPU's caches hold; a processor's hold less than LEAST. What is short is timed several times at once. */
static const double LONG_PRODUCT = 0.02, LONG_COPY = 1.5e-4;
enum { SMALLEST = 512, LARGEST = 8192 };
static const int64_t LEAST[] = {[LS_CPU] = 64 << 20, [LS_CUDA] = 8 << 20}, MOST = 256 << 20; /* bytes */

static ls_status take(const bench *b, ceilings *c, int64_t reals)
{
    void *p = NULL;
    if (c->x != NULL) ls_device_free(c->ctx, c->x);
    ls_status status = ls_device_alloc(c->ctx, (size_t)reals * sizeof *c->x, &p);
    c->x = p;
    if (status == LS_OK) status = bench_fill(c->ctx, c->x, reals);
    return agree(b->r, status);
}

/* Memory for a product, its factors and its result, then for two copies. In bf16 the factors are copied beforehand: the
 * rate is that of products alone. */
static ls_status take_memory(const bench *b, ceilings *c)
{
    const int64_t n = c->side * c->side, size = ls_operand_size(c->ctx);
    LS_TRY(take(b, c, 4 * n + 2 * c->reals));
    for (int i = 0; i < 2; i++) {
        const ls_operand from = ls_reals(c->x + i * n), rounded = {(char *)(c->x + 3 * n) + i * n * size, size};
        c->factor[i] = ls_is_narrow(rounded) ? rounded : from;
        if (ls_is_narrow(rounded)) c->ctx->dense->copy(c->ctx->queue, n, from, rounded);
    }
    return LS_OK;
}

static void multiply(const ceilings *c, int64_t times)
{
    const int64_t n = c->side;
    for (int64_t i = 0; i < times; i++)
        c->ctx->dense->linear(c->ctx->queue, n, n, n, c->factor[0], c->factor[1], NULL, ls_reals(c->x + 2 * n * n));
}

static ls_status product(const bench *b, const ceilings *c, int64_t times, double *seconds)
{
    double begin;
    LS_TRY(bench_begin(b, c->ctx, &begin));
    multiply(c, times);
    LS_TRY(bench_lap(b, c->ctx, begin, seconds));
    *seconds /= (double)times;
    return LS_OK;
}

static ls_status copy(const bench *b, const ceilings *c, int64_t times, double *seconds)
{
    ls_real *one = c->x + 4 * c->side * c->side, *other = one + c->reals;
    double begin;
    LS_TRY(bench_begin(b, c->ctx, &begin));
    for (int64_t i = 0; i < times; i++)
        c->ctx->dense->copy(c->ctx->queue, c->reals, ls_reals(i % 2 ? other : one), ls_reals(i % 2 ? one : other));
    LS_TRY(bench_lap(b, c->ctx, begin, seconds));
    *seconds /= (double)times;
    return LS_OK;
}

/* Ranks decide by the slowest one's times, and so alike. */
static ls_status find_sizes(const bench *b, ceilings *c)
{
    double seconds = 0, first;
    for (c->side = SMALLEST;; c->side *= 2) {
        LS_TRY(take_memory(b, c));
        LS_TRY(product(b, c, 1, &first)); /* warms up */
        LS_TRY(product(b, c, 1, &seconds));
        if (seconds > LONG_PRODUCT || c->side == LARGEST) break;
    }
    c->products = bench_calls(seconds);
    int64_t bytes = LEAST[b->device];
    for (;; bytes *= 2) {
        c->reals = bytes / (int64_t)sizeof *c->x;
        LS_TRY(take_memory(b, c));
        LS_TRY(copy(b, c, 1, &first));
        LS_TRY(copy(b, c, 1, &seconds));
        if (seconds > LONG_COPY || bytes == MOST) break;
    }
    c->copies = bench_calls(seconds);
    return LS_OK;
}

ls_status ceilings_open(const bench *b, ls_context *ctx, ceilings *c)
{
    *c = (ceilings){.ctx = ctx};
    return find_sizes(b, c);
}

void ceilings_close(ceilings *c)
{
    if (c->x != NULL) ls_device_free(c->ctx, c->x);
    *c = (ceilings){0};
}

static double square_gflop(const ceilings *c)
{
    const double n = (double)c->side;
    return 2e-9 * n * n * n;
}

ls_status ceilings_product(const bench *b, const ceilings *c, double *seconds)
{
    LS_TRY(product(b, c, c->products, seconds));
    *seconds /= square_gflop(c);
    return LS_OK;
}

ls_status ceilings_own_product(const ceilings *c, double *seconds)
{
    LS_TRY(ls_context_wait(c->ctx));
    const double begin = seconds_now();
    multiply(c, c->products);
    LS_TRY(ls_context_wait(c->ctx));
    *seconds = (seconds_now() - begin) / (double)c->products / square_gflop(c);
    return LS_OK;
}

ls_status ceilings_copy(const bench *b, const ceilings *c, double *seconds)
{
    LS_TRY(copy(b, c, c->copies, seconds));
    *seconds /= 2e-9 * (double)c->reals * sizeof *c->x;
    return LS_OK;
}
