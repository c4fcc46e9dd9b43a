#include "arena.h"

#include <stdlib.h>
#include <string.h>

enum { ALIGN = 256 }; /* what GPUs read at once, and four cache lines */

static const ls_device_ops *device_of(const ls_arena *arena)
{
    return arena->device != NULL ? arena->device : &ls_cpu_device;
}

/* LONGSPAN_POISON=1: what is taken is NaN in every number, so that whoever reads what nobody wrote is found. Debug
 * builds do so unless it is 0. */
static int poisons(void)
{
    static _Atomic int answer = -1; /* of all threads: they find the same */
#ifdef NDEBUG
    const char *usual = "0";
#else
    const char *usual = "1";
#endif
    if (answer < 0) {
        const char *text = getenv("LONGSPAN_POISON");
        answer = strcmp(text != NULL ? text : usual, "0") != 0;
    }
    return answer;
}

void ls_arena_measure(ls_arena *arena)
{
    arena->used = arena->most = arena->lacking = 0;
    arena->measuring = 1;
    arena->replaying = 0;
}

void ls_arena_replay(ls_arena *arena)
{
    arena->used = 0;
    arena->measuring = arena->overrun = 0;
    arena->replaying = 1;
}

ls_status ls_reserve(const ls_device_ops *device, const char *what, size_t bytes, void **p)
{
    *p = device->alloc(bytes);
    if (*p != NULL) return LS_OK;
    const double size = (double)bytes / 1048576.0;
    if (device->broken() != NULL)
        LS_FAIL(LS_ERR_INTERNAL, "%s: the device refuses %.1f MiB, not for want of memory: %s", what, size,
                device->broken());
    LS_FAIL(LS_ERR_MEMORY,
            "%s: cannot reserve %.1f MiB: use more ranks, a smaller batch, or a machine with more memory", what, size);
}

ls_status ls_arena_reserve(ls_arena *arena, const char *what)
{
    arena->overrun = 0;
    const size_t need = (arena->used > arena->most ? arena->used : arena->most) +
                        ALIGN; /* one more, so that a take of 0 bytes is a pointer and not NULL */
    arena->used = 0;
    arena->measuring = 0;
    if (arena->lacking > 0)
        LS_FAIL(LS_ERR_MEMORY, "%s: no %.1f MiB of host memory for lists: use more ranks or a smaller batch", what,
                (double)arena->lacking / 1048576.0);
    if (need > arena->peak) arena->peak = need;
    if (need <= arena->capacity) return LS_OK;
    device_of(arena)->release(arena->base);
    arena->capacity = 0;
    void *base;
    const ls_status status = ls_reserve(device_of(arena), what, need, &base);
    arena->base = base;
    LS_TRY(status);
    arena->capacity = need;
    return LS_OK;
}

ls_status ls_arena_check(const ls_arena *arena, const char *what)
{
    if (!arena->overrun) return LS_OK;
    LS_FAIL(LS_ERR_INTERNAL, "%s: a plan took %zu bytes of %zu that it had measured: please report this", what,
            arena->used, arena->capacity);
}

void *ls_arena_take(ls_arena *arena, size_t bytes)
{
    const size_t at = arena->used, size = (bytes + ALIGN - 1) / ALIGN * ALIGN;
    arena->used += size;
    if (arena->measuring) return NULL;
    if (arena->used > arena->capacity) {
        arena->overrun = 1;
        return NULL;
    }
    if (!arena->replaying && poisons()) device_of(arena)->poison(arena->base + at, size);
    return arena->base + at;
}

void ls_arena_release(ls_arena *arena, size_t mark)
{
    if (arena->used > arena->most) arena->most = arena->used;
    arena->used = mark;
}

void ls_arena_free(ls_arena *arena)
{
    const ls_device_ops *device = arena->device;
    device_of(arena)->release(arena->base);
    *arena = (ls_arena){.device = device};
}
