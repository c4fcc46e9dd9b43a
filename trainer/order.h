/* The order of one epoch of training, as dataset_order describes it: a pure function of its arguments. */
#ifndef LS_ORDER_H
#define LS_ORDER_H

#include "status.h"

enum { ORDER_WINDOW = 16 }; /* batches that are sorted together */

typedef struct order_lengths {
    int64_t documents;
    const int64_t *source_offset, *target_offset; /* (documents + 1) */
} order_lengths;

typedef struct epoch_order {
    uint64_t seed;
    int64_t batch, epoch;
    int64_t *index; /* (documents), to be freed; NULL: none yet */
} epoch_order;

/* Makes the order of an epoch in batches of `rows`, unless it is that already. */
ls_status order_epoch(const order_lengths *s, uint64_t seed, int64_t rows, int64_t epoch, epoch_order *o);

#endif
