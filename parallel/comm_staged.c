/* Messages of device memory over a transport that only sees host memory: what is sent is copied to host memory before,
 * what is received is copied back after. The copies lie in one pinned buffer that only grows; messages of host memory
 * go through as they are. This is what a user without NCCL gets, and several ranks on one GPU. */
#include "comm.h"

#include <stdlib.h>

typedef struct staged {
    ls_comm host; /* the transport below */
    const ls_device_ops *ops;
    ls_queue *queue;
} staged;

/* What is under way, in ls_pending.requests: the requests below, and what must be copied back. */
typedef struct flight {
    ls_pending below;
    ls_message *back; /* to the device: data, and where it lies on the host */
    char **from;
    int count, capacity;
    char *buffer;
    size_t bytes, used;
} flight;

static flight *flight_of(ls_pending *p)
{
    if (p->requests == NULL) p->requests = calloc(1, sizeof(flight));
    return p->requests;
}

static size_t padded(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* Room for the list's copies. A buffer that is in use stays where it is: one more post before the wait needs its own.
 */
static ls_status make_room(const staged *s, flight *f, const ls_message *m, int count)
{
    size_t need = 0;
    int back = 0;
    for (int i = 0; i < count; i++) {
        need += m[i].host ? 0 : padded(m[i].bytes);
        back += !m[i].host && m[i].receive;
    }
    if (f->used == 0 && need > f->bytes) {
        s->ops->release_host(f->buffer);
        f->buffer = s->ops->alloc_host(need);
        f->bytes = f->buffer == NULL ? 0 : need;
    }
    if (f->used + need > f->bytes)
        LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for %.1f MiB of messages of a device", (double)need / 1048576.0);
    if (f->count + back > f->capacity) {
        const int capacity = f->count + back;
        ls_message *list = realloc(f->back, (size_t)capacity * sizeof *list);
        if (list != NULL) f->back = list;
        char **from = realloc(f->from, (size_t)capacity * sizeof *from);
        if (from != NULL) f->from = from;
        if (list == NULL || from == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for %d messages", capacity);
        f->capacity = capacity;
    }
    return LS_OK;
}

static ls_status post(ls_comm *c, const ls_message *m, int count, ls_pending *p)
{
    staged *s = c->own;
    flight *f = flight_of(p);
    if (f == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for messages");
    LS_TRY(make_room(s, f, m, count));
    for (int i = 0; i < count; i++) {
        ls_message copy = m[i];
        if (!m[i].host) {
            copy.data = f->buffer + f->used;
            f->used += padded(m[i].bytes);
            if (m[i].receive)
                f->back[f->count] = m[i], f->from[f->count++] = copy.data;
            else
                LS_TRY(s->ops->to_host(s->queue, copy.data, m[i].data, m[i].bytes));
        }
        LS_TRY(s->host.ops->post(&s->host, &copy, 1, &f->below));
    }
    return LS_OK;
}

static ls_status wait_all(ls_comm *c, ls_pending *p)
{
    staged *s = c->own;
    flight *f = p->requests;
    if (f == NULL) return LS_OK;
    const int count = f->count;
    f->count = 0;
    f->used = 0;
    LS_TRY(s->host.ops->wait(&s->host, &f->below));
    for (int i = 0; i < count; i++) LS_TRY(s->ops->to_device(s->queue, f->back[i].data, f->from[i], f->back[i].bytes));
    return LS_OK;
}

/* The device's name is not at hand here: there is one kind that needs staging. */
static void forget(ls_pending *p)
{
    flight *f = p->requests;
    if (f == NULL) return;
    free(f->below.requests);
    free(f->back);
    free(f->from);
    if (f->buffer != NULL) ls_device_find(LS_CUDA)->release_host(f->buffer);
    free(f);
    *p = (ls_pending){0};
}

/* In place, by chunks through one buffer. */
static ls_status sum(ls_comm *c, ls_real *x, int64_t n)
{
    staged *s = c->own;
    const int64_t chunk = (int64_t)1 << 22;
    ls_real *buffer = s->ops->alloc_host((size_t)(n < chunk ? n : chunk) * sizeof *buffer + 1);
    ls_status status = LS_OK;
    if (buffer == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory to sum %lld numbers", (long long)n);
    for (int64_t at = 0; at < n; at += chunk) {
        const int64_t part = n - at < chunk ? n - at : chunk;
        const size_t bytes = (size_t)part * sizeof *x;
        LS_TRY_GOTO(s->ops->to_host(s->queue, buffer, x + at, bytes));
        LS_TRY_GOTO(s->host.ops->sum(&s->host, buffer, part));
        LS_TRY_GOTO(s->ops->to_device(s->queue, x + at, buffer, bytes));
    }
done:
    s->ops->release_host(buffer);
    return status;
}

static ls_status min(ls_comm *c, int64_t *x, int n)
{
    staged *s = c->own;
    return s->host.ops->min(&s->host, x, n);
}

static ls_status broadcast(ls_comm *c, void *data, int bytes, int root)
{
    staged *s = c->own;
    return s->host.ops->broadcast(&s->host, data, bytes, root);
}

static ls_status gather(ls_comm *c, int64_t mine, int64_t *all)
{
    staged *s = c->own;
    return s->host.ops->gather(&s->host, mine, all);
}

static void close_staged(ls_comm *c)
{
    staged *s = c->own;
    s->host.ops->close(&s->host);
    free(s);
    c->own = NULL;
}

ls_status ls_comm_staged(const ls_device_ops *ops, ls_queue *queue, ls_comm *comm)
{
    static const ls_comm_ops table = {"mpi", post, wait_all, forget, sum, min, broadcast, gather, close_staged};
    staged *s = malloc(sizeof *s);
    if (s == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for a communicator");
    *s = (staged){.host = *comm, .ops = ops, .queue = queue};
    comm->ops = &table;
    comm->own = s;
    return LS_OK;
}
