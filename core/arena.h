/* Memory is sized by running a plan twice: once on a measuring arena (every take returns NULL and is counted), then,
 * after one reserve, for real. So the table of sizes and the table of pointers are the same lines of code. */
#ifndef LS_ARENA_H
#define LS_ARENA_H

#include "device.h"

/* bytes > 0 of a device's memory, to be given to its `release`; what could not be had, and why, is told under the name
 * `what`. On failure *p is NULL. */
ls_status ls_reserve(const ls_device_ops *device, const char *what, size_t bytes, void **p);

typedef struct ls_arena {
    const ls_device_ops *device; /* where the memory is; NULL: the CPU */
    char *base;
    size_t capacity, used, most, peak; /* most: what was in use before a release */
    size_t lacking;                    /* host memory that a plan wanted on the way and did not get: reserve refuses */
    int measuring, replaying, overrun;
} ls_arena;

/* Starts a measuring run, after which `used` tells the bytes. */
void ls_arena_measure(ls_arena *arena);
/* Ends it: makes room for what was measured (contents are lost when it grows) and starts the real run. */
ls_status ls_arena_reserve(ls_arena *arena, const char *what);
/* Runs the plan once more over the same memory, contents kept: for the backward pass. */
void ls_arena_replay(ls_arena *arena);
/* After the real run: LS_ERR_INTERNAL if the plan took more than it had measured. To be asked before the memory is
 * used. */
ls_status ls_arena_check(const ls_arena *arena, const char *what);
/* n bytes on a 256-byte boundary, or NULL while measuring (and past what was reserved, see ls_arena_check). In debug
 * builds, and with LONGSPAN_POISON=1, the memory is filled with NaN. */
void *ls_arena_take(ls_arena *arena, size_t bytes);
/* Gives back what was taken since used was `mark`: what is taken next may lie there. */
void ls_arena_release(ls_arena *arena, size_t mark);
static inline ls_real *ls_take(ls_arena *arena, int64_t n)
{
    return (ls_real *)ls_arena_take(arena, (size_t)n * sizeof(ls_real));
}
void ls_arena_free(ls_arena *arena);

#endif
