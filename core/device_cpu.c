#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ls_status count(int *devices)
{
    *devices = 1;
    return LS_OK;
}

static void describe(int number, char *text, size_t size)
{
    (void)number;
    snprintf(text, size, "cpu");
}

static ls_status open_queue(int number, ls_precision precision, ls_queue **queue)
{
    (void)number, (void)precision; /* the context has refused any but float32 */
    *queue = NULL;
    return LS_OK;
}

static ls_status open_beside(ls_queue *of, ls_queue **queue)
{
    *queue = of;
    return LS_OK;
}

static void close_queue(ls_queue *queue)
{
    (void)queue;
}

static void *alloc(size_t bytes)
{
    return bytes <= SIZE_MAX - 255 ? aligned_alloc(256, (bytes + 255) / 256 * 256) : NULL;
}

static size_t most(void)
{
    return 0;
}

static void poison(void *p, size_t bytes)
{
    memset(p, 0xff, bytes); /* all ones is a NaN in both precisions */
}

static ls_status copy(ls_queue *queue, void *to, const void *from, size_t bytes)
{
    (void)queue;
    if (bytes > 0) memcpy(to, from, bytes);
    return LS_OK;
}

static ls_status done(ls_queue *queue)
{
    (void)queue;
    return LS_OK;
}

static ls_status make_mark(ls_queue *queue, ls_mark **mark)
{
    (void)queue, (void)mark;
    return LS_OK;
}

static ls_status pass_mark(ls_queue *queue, ls_mark *mark)
{
    (void)queue, (void)mark;
    return LS_OK;
}

static const char *broken(void)
{
    return NULL;
}

static void unmark(ls_mark *mark)
{
    (void)mark;
}

static void watch(ls_watch *w) /* nobody waits */
{
    (void)w;
}

const ls_device_ops ls_cpu_device = {.name = "cpu",
                                     .count = count,
                                     .describe = describe,
                                     .open = open_queue,
                                     .open_beside = open_beside,
                                     .enter = done,
                                     .close = close_queue,
                                     .alloc = alloc,
                                     .broken = broken,
                                     .release = free,
                                     .most = most,
                                     .alloc_host = alloc,
                                     .release_host = free,
                                     .poison = poison,
                                     .to_device = copy,
                                     .to_host = copy,
                                     .begin_to_device = copy,
                                     .begin_to_host = copy,
                                     .mark = make_mark,
                                     .follow = pass_mark,
                                     .reach = pass_mark,
                                     .unmark = unmark,
                                     .watch = watch,
                                     .unwatch = watch,
                                     .wait = done};
