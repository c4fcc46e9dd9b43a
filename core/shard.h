#ifndef LS_SHARD_H
#define LS_SHARD_H

#include "real.h"
#include "status.h"

/* The even partition as `rank` of `size` sees it; ls_shard_even is this for a context. */
ls_status ls_shard_even_of(int64_t length, int rank, int size, ls_shard *shard);

#endif
