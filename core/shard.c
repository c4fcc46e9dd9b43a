/* Who owns which positions: contiguous pieces in rank order. Everything else learns positions from here. */
#include "shard.h"

#include <stdlib.h>

ls_status ls_check_length(int64_t length)
{
    if (length < 0) LS_FAIL(LS_ERR_ARGUMENT, "shard: a length of %lld is negative", (long long)length);
    if (length >= LS_MOST_NUMBERS)
        LS_FAIL(LS_ERR_ARGUMENT, "shard: %lld positions are too many: fewer than %lld can be counted",
                (long long)length, (long long)LS_MOST_NUMBERS);
    return LS_OK;
}

ls_status ls_check_size(const char *name, int64_t batch, int64_t positions, int64_t width)
{
    const int64_t counted = ls_max(positions, 1024); /* memory that a batch row takes however short it is */
    if (counted < LS_MOST_NUMBERS / width / ls_max(batch, 1)) return LS_OK;
    LS_FAIL(LS_ERR_ARGUMENT,
            "%s: batch %lld x %lld positions (at least 1024) x embed_dim %lld is too large: fewer than %lld numbers "
            "can be counted",
            name, (long long)batch, (long long)positions, (long long)width, (long long)LS_MOST_NUMBERS);
}

ls_status ls_check_rows(const char *name, int64_t batch, int64_t positions, int64_t apart)
{
    if (positions > INT32_MAX / ls_max(batch, 1))
        LS_FAIL(
            LS_ERR_ARGUMENT,
            "%s: batch %lld x %lld positions on this rank are more rows than BLAS can count (%d): use more ranks, or "
            "a smaller batch",
            name, (long long)batch, (long long)positions, INT32_MAX);
    if (apart > INT32_MAX)
        LS_FAIL(LS_ERR_ARGUMENT,
                "%s: rows that are %lld numbers apart (batch x embed_dim) are further than BLAS can count (%d): use "
                "LS_BHTD or LS_BTHD, or a smaller batch",
                name, (long long)apart, INT32_MAX);
    return LS_OK;
}

ls_status ls_shard_even_of(int64_t length, int rank, int size, ls_shard *shard)
{
    LS_NEED(shard, "shard: shard is NULL");
    *shard = (ls_shard){0};
    LS_TRY(ls_check_length(length));
    int64_t *bounds = malloc(((size_t)size + 1) * sizeof *bounds);
    if (bounds == NULL) LS_FAIL(LS_ERR_MEMORY, "shard: no memory for the bounds of %d ranks", size);
    for (int p = 0; p <= size; p++) bounds[p] = length / size * p + ls_min(p, length % size);
    *shard = (ls_shard){.length = length,
                        .lo = bounds[rank],
                        .n = bounds[rank + 1] - bounds[rank],
                        .rank = rank,
                        .size = size,
                        .bounds = bounds};
    return LS_OK;
}

void ls_shard_free(ls_shard *shard)
{
    if (shard == NULL) return;
    free(shard->bounds);
    *shard = (ls_shard){0};
}
