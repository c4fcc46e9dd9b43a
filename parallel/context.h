/* What a context holds: this rank's place, its exchange, and the scratch memory that all its attentions share. */
#ifndef LS_CONTEXT_H
#define LS_CONTEXT_H

#include "exchange.h"
#include "shard.h"

struct ls_context {
    ls_exchange exchange;
    ls_arena work;    /* of the call that is running; contents do not outlive it */
    ls_arena unsaved; /* stands in for `saved` where no backward will follow */
    uint64_t seed;
    ls_device device;
};

#endif
