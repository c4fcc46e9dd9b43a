#ifndef LS_SHARD_H
#define LS_SHARD_H

#include "real.h"
#include "status.h"

/* Sizes are counted in 64 bits. A tensor of all ranks together may have so many numbers, 64 TiB in float; what a plan
 * takes beside it (doubles, a few buffers of thousands of slots or features for each row, matrices of landmarks for
 * each head) is then still less than 2^63 bytes. */
#define LS_MOST_NUMBERS ((int64_t)1 << 44)
ls_status ls_check_length(int64_t length);
/* Of a call, or a state: before anything is multiplied. */
ls_status ls_check_size(const char *name, int64_t batch, int64_t positions, int64_t width);
/* BLAS counts with int: rows that a product has on this rank, and how far apart they are. */
ls_status ls_check_rows(const char *name, int64_t batch, int64_t positions, int64_t apart);

/* The even partition as `rank` of `size` sees it; ls_shard_even is this for a context. */
ls_status ls_shard_even_of(int64_t length, int rank, int size, ls_shard *shard);

#endif
