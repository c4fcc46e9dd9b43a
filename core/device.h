/* The door to a device: its memory and its queue of work. Tensors, parameters, masks and everything in an arena live in
 * device memory; shapes, shards, options and lists of intervals live on the host. On the CPU the two are one.
 *
 * Work that is given to a queue runs in order, later; host memory handed to to_device may be reused at once. */
#ifndef LS_DEVICE_H
#define LS_DEVICE_H

#include "status.h"

typedef struct ls_queue ls_queue; /* NULL on the CPU, where work is done when it is given */
typedef struct ls_mark ls_mark;   /* a place in a queue's work; NULL on the CPU, where it is past at once */

/* Somebody who can tell that what a queue waits for will never come, and ends it. Belongs to who watches. */
typedef struct ls_watch {
    ls_status (*look)(void *of);
    void *of;
    struct ls_watch *next;
} ls_watch;

typedef struct ls_device_ops {
    const char *name;
    ls_status (*count)(int *devices);                      /* of this machine */
    void (*describe)(int number, char *text, size_t size); /* name and memory of one of them */
    /* A process has queues of one device at a time. A queue takes all its memory of the device now: on a GPU 1 MiB for
     * parts of sums, and with LS_BF16 64 MiB for copies of operands. */
    ls_status (*open)(int number, ls_precision precision, ls_queue **queue);
    ls_status (*open_beside)(ls_queue *of,
                             ls_queue **queue); /* one more on its device, for copies and messages alone */
    ls_status (*enter)(ls_queue *); /* this thread gives work to it: its device becomes the thread's current one */
    void (*close)(ls_queue *);
    void *(*alloc)(size_t bytes); /* on a 256-byte boundary; NULL: there is not so much, or see `broken` */
    const char *(*broken)(void);  /* what made the device refuse memory of which it may have enough; NULL: nothing */
    void (*release)(void *);
    size_t (*most)(void);              /* bytes that this process had from alloc at a time, at most; the CPU: 0 */
    void *(*alloc_host)(size_t bytes); /* host memory from which copies to and from the device are fast (pinned) */
    void (*release_host)(void *);
    void (*poison)(void *, size_t bytes); /* NaN in every number, once nobody uses it: to find errors, slow */
    /* `from` may be used again at once. Waits for no work, unless 128 MiB of such copies are still to come. */
    ls_status (*to_device)(ls_queue *, void *to, const void *from, size_t bytes);
    ls_status (*to_host)(ls_queue *, void *to, const void *from, size_t bytes); /* waits */
    /* The same for memory from alloc_host, begun and not waited for: it stays as it is until a mark after is reached */
    ls_status (*begin_to_device)(ls_queue *, void *to, const void *from, size_t bytes);
    ls_status (*begin_to_host)(ls_queue *, void *to, const void *from, size_t bytes);
    /* mark: *mark stands for where the queue is now (NULL: it is made, to be given to unmark). follow: what the queue
     * is given from now on waits for the mark, of another queue. reach: the host waits for it; also tells what failed,
     * like wait. */
    ls_status (*mark)(ls_queue *, ls_mark **mark);
    ls_status (*follow)(ls_queue *, ls_mark *mark);
    ls_status (*reach)(ls_queue *, ls_mark *mark);
    void (*unmark)(ls_mark *mark);
    /* From watch to unwatch, who waits for any queue of this process looks every few milliseconds, and fails with what
     * it is told. */
    void (*watch)(ls_watch *);
    void (*unwatch)(ls_watch *);
    ls_status (*wait)(ls_queue *); /* for all that was given; also tells what failed since it was last asked */
} ls_device_ops;

extern const ls_device_ops ls_cpu_device, ls_cuda_device;

/* A CUDA queue's cudaStream_t, and its device: for a transport that works on streams. */
void *ls_cuda_stream(ls_queue *queue, int *device);

/* What exists only with the CUDA backend: its files are compiled in where LS_CUDA_BACKEND is defined. */
#ifdef LS_CUDA_BACKEND
#define LS_IF_CUDA(x) (x)
#else
#define LS_IF_CUDA(x) NULL
#endif

/* NULL: this build has no such backend. */
static inline const ls_device_ops *ls_device_find(ls_device device)
{
    return device == LS_CPU    ? &ls_cpu_device
           : device == LS_CUDA ? LS_IF_CUDA(&ls_cuda_device)
                               : (const ls_device_ops *)NULL;
}

#endif
