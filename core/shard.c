/* Who owns which positions: contiguous pieces in rank order. Everything else learns positions from here. */
#include "shard.h"

#include <stdlib.h>

ls_status ls_shard_even_of(int64_t length, int rank, int size, ls_shard *shard)
{
    *shard = (ls_shard){0};
    if (length < 0) LS_FAIL(LS_ERR_ARGUMENT, "shard: length %lld is negative", (long long)length);
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
    free(shard->bounds);
    *shard = (ls_shard){0};
}
