/* Messages of device memory over a transport that only sees host memory. This is what a user without NCCL gets, and
 * several ranks on one GPU.
 *
 *   compute   ... kernels | ready          | kernels meanwhile                        | waits for done | kernels ...
 *   copies                | waits for ready, to pinned memory   | from pinned memory, done
 *   host       begin: gives the copies | (gives kernels) | end: sends each piece when its copy is through, gives the
 *                                                          copies of what has come
 *
 * Messages go in pieces: one is sent while the next is copied. begin only puts copies on a queue beside the one that
 * computes; what the host must wait for, it waits for in end, when the local work has been given to the device. Sends
 * leave in the order in which they were begun, whichever group is ended first: that is what the receivers count on. */
#include "comm.h"

#include <stdlib.h>

typedef struct staged {
    ls_comm host; /* the transport below */
    const ls_device_ops *ops;
    ls_queue *compute, *copies;
    ls_mark *ready;               /* what is sent is there, and nobody reads what is received into */
    struct flight *first, **last; /* those with sends that have not left, as they were begun */
    ls_real *slot[3];             /* of sum, pinned */
    ls_mark *copied[3], *summed;  /* a slot is filled; all has gone back */
} staged;

static const size_t PIECE = (size_t)1 << 21;  /* bytes: copies of less than 1 MiB or so are not at full speed */
static const int64_t SLOT = (int64_t)1 << 20; /* reals of a sum at a time */

typedef struct piece {
    char *device, *host; /* device NULL: a message of host memory */
    size_t bytes;
    int peer;
    ls_mark *copied; /* of a send: it is there. Kept for the next use */
} piece;
typedef struct pieces {
    piece *list;
    int count, capacity;
} pieces;

/* What is under way, in ls_pending.requests. */
typedef struct flight {
    staged *owner;
    pieces out, in;
    ls_pending leaving, coming; /* of the transport below */
    char *buffer;               /* pinned; it only grows */
    size_t bytes, used;
    ls_mark *done;    /* all has been copied to the device; NULL before the first time */
    int begun, waits; /* waits: its sends have not left */
    struct flight *next;
} flight;

static size_t padded(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

static flight *flight_of(staged *s, ls_pending *p)
{
    flight *f = p->requests;
    if (f == NULL) f = p->requests = calloc(1, sizeof *f);
    if (f != NULL) f->owner = s;
    return f;
}

/* ------------------------------------------------------------------------------------------------ begin */

static ls_status reserve(pieces *x, int count)
{
    if (count <= x->capacity) return LS_OK;
    piece *list = realloc(x->list, (size_t)count * sizeof *list);
    if (list == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for %d messages", count);
    for (int i = x->capacity; i < count; i++) list[i] = (piece){0};
    x->list = list;
    x->capacity = count;
    return LS_OK;
}

/* Room for the group. The buffer may still be read by copies to the device: those of the time before. */
static ls_status make_room(staged *s, flight *f, const ls_message *m, int count)
{
    size_t need = 0;
    int pieces_of[2] = {0};
    for (int i = 0; i < count; i++) {
        if (!m[i].host) need += padded(m[i].bytes);
        pieces_of[m[i].receive] += (int)((m[i].bytes + PIECE - 1) / PIECE);
    }
    LS_TRY(reserve(&f->out, pieces_of[0]));
    LS_TRY(reserve(&f->in, pieces_of[1]));
    if (f->done != NULL) LS_TRY(s->ops->reach(s->copies, f->done));
    if (need <= f->bytes) return LS_OK;
    s->ops->release_host(f->buffer);
    f->buffer = s->ops->alloc_host(need);
    f->bytes = f->buffer == NULL ? 0 : need;
    if (f->buffer == NULL)
        LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for %.1f MiB of messages of a device", (double)need / 1048576.0);
    return LS_OK;
}

static void cut(flight *f, const ls_message *m)
{
    pieces *to = m->receive ? &f->in : &f->out;
    char *host = m->host ? m->data : f->buffer + f->used;
    for (size_t at = 0; at < m->bytes; at += PIECE) {
        piece *p = &to->list[to->count++];
        p->device = m->host ? NULL : (char *)m->data + at;
        p->host = host + at;
        p->bytes = m->bytes - at < PIECE ? m->bytes - at : PIECE;
        p->peer = m->peer;
    }
    if (!m->host) f->used += padded(m->bytes);
}

/* The copies go on where the queue that computes is now. */
static ls_status start_copies(staged *s)
{
    LS_TRY(s->ops->mark(s->compute, &s->ready));
    return s->ops->follow(s->copies, s->ready);
}

static ls_status begin(ls_comm *c, const ls_message *m, int count, ls_pending *p)
{
    staged *s = c->own;
    flight *f = flight_of(s, p);
    if (f == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for messages");
    if (f->begun) LS_FAIL(LS_ERR_INTERNAL, "mpi: messages are begun again before their end: please report this");
    f->out.count = f->in.count = 0;
    f->used = 0;
    if (count == 0) return LS_OK;
    LS_TRY(make_room(s, f, m, count));
    for (int i = 0; i < count; i++) cut(f, &m[i]);
    f->begun = 1;
    LS_TRY(start_copies(s));
    for (int i = 0; i < f->in.count; i++) {
        const piece *x = &f->in.list[i];
        const ls_message one = {x->host, x->bytes, x->peer, 1, 1};
        LS_TRY(s->host.ops->begin(&s->host, &one, 1, &f->coming));
    }
    for (int i = 0; i < f->out.count; i++) {
        piece *x = &f->out.list[i];
        if (x->device == NULL) continue;
        LS_TRY(s->ops->begin_to_host(s->copies, x->host, x->device, x->bytes));
        LS_TRY(s->ops->mark(s->copies, &x->copied));
    }
    if (f->out.count == 0) return LS_OK;
    f->waits = 1;
    f->next = NULL;
    *s->last = f;
    s->last = &f->next;
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ end */

static ls_status send(staged *s, flight *f)
{
    for (int i = 0; i < f->out.count; i++) {
        const piece *x = &f->out.list[i];
        const ls_message one = {x->host, x->bytes, x->peer, 0, 1};
        if (x->device != NULL) LS_TRY(s->ops->reach(s->copies, x->copied));
        LS_TRY(s->host.ops->begin(&s->host, &one, 1, &f->leaving));
    }
    return LS_OK;
}

static void take_out(staged *s, flight *f)
{
    flight **at = &s->first;
    while (*at != NULL && *at != f) at = &(*at)->next;
    if (*at == NULL) return;
    *at = f->next;
    if (*at == NULL) s->last = at;
    f->waits = 0;
}

/* What has come goes to the device, as it comes. */
static ls_status take_in(staged *s, flight *f)
{
    for (int i = 0;;) {
        LS_TRY(s->host.ops->next(&s->host, &f->coming, &i));
        if (i < 0) return s->host.ops->end(&s->host, &f->coming);
        const piece *x = &f->in.list[i];
        if (x->device != NULL) LS_TRY(s->ops->begin_to_device(s->copies, x->device, x->host, x->bytes));
    }
}

static ls_status end(ls_comm *c, ls_pending *p)
{
    staged *s = c->own;
    flight *f = p->requests;
    if (f == NULL || !f->begun) return LS_OK;
    f->begun = 0;
    while (f->waits) { /* those before first */
        flight *one = s->first;
        take_out(s, one);
        LS_TRY(send(s, one));
    }
    LS_TRY(take_in(s, f));
    LS_TRY(s->host.ops->end(&s->host, &f->leaving));
    LS_TRY(s->ops->mark(s->copies, &f->done));
    return s->ops->follow(s->compute, f->done);
}

static void forget_pieces(const ls_device_ops *ops, pieces *x)
{
    for (int i = 0; i < x->capacity; i++) ops->unmark(x->list[i].copied);
    free(x->list);
}

static void forget(ls_pending *p)
{
    flight *f = p->requests;
    if (f == NULL) return;
    staged *s = f->owner;
    take_out(s, f);
    s->ops->wait(s->copies); /* they may use the buffer */
    s->host.ops->forget(&f->leaving);
    s->host.ops->forget(&f->coming);
    forget_pieces(s->ops, &f->out);
    forget_pieces(s->ops, &f->in);
    s->ops->unmark(f->done);
    s->ops->release_host(f->buffer);
    free(f);
    *p = (ls_pending){0};
}

/* ------------------------------------------------------------------------------------------------ sum */

static ls_status fill(staged *s, const ls_real *x, int64_t n, int64_t number)
{
    const int64_t at = number * SLOT, part = n - at < SLOT ? n - at : SLOT;
    if (part <= 0) return LS_OK;
    LS_TRY(s->ops->begin_to_host(s->copies, s->slot[number % 3], x + at, (size_t)part * sizeof *x));
    return s->ops->mark(s->copies, &s->copied[number % 3]);
}

/* In place, part by part through three slots: while the ranks add up one, the next two are on their way from the device
 * and the one before is on its way back. Copies run in order, so a slot is filled anew only after it was emptied. */
static ls_status sum(ls_comm *c, ls_real *x, int64_t n)
{
    staged *s = c->own;
    const int64_t parts = (n + SLOT - 1) / SLOT;
    if (n == 0) return LS_OK;
    for (int i = 0; i < 3 && i < parts; i++)
        if (s->slot[i] == NULL && (s->slot[i] = s->ops->alloc_host((size_t)SLOT * sizeof *x)) == NULL)
            LS_FAIL(LS_ERR_MEMORY, "mpi: no memory to sum %lld numbers", (long long)n);
    LS_TRY(start_copies(s));
    LS_TRY(fill(s, x, n, 0));
    LS_TRY(fill(s, x, n, 1));
    for (int64_t i = 0; i < parts; i++) {
        const int64_t at = i * SLOT, part = n - at < SLOT ? n - at : SLOT;
        LS_TRY(s->ops->reach(s->copies, s->copied[i % 3]));
        LS_TRY(s->host.ops->sum(&s->host, s->slot[i % 3], part));
        LS_TRY(s->ops->begin_to_device(s->copies, x + at, s->slot[i % 3], (size_t)part * sizeof *x));
        LS_TRY(fill(s, x, n, i + 2));
    }
    LS_TRY(s->ops->mark(s->copies, &s->summed));
    return s->ops->follow(s->compute, s->summed);
}

/* ------------------------------------------------------------------------------------------------ set-up */

static void close_staged(ls_comm *c)
{
    staged *s = c->own;
    if (s->copies != NULL) s->ops->wait(s->copies);
    for (int i = 0; i < 3; i++) {
        s->ops->release_host(s->slot[i]);
        s->ops->unmark(s->copied[i]);
    }
    s->ops->unmark(s->summed);
    s->ops->unmark(s->ready);
    if (s->copies != NULL) s->ops->close(s->copies);
    s->host.ops->close(&s->host);
    free(s);
    c->own = NULL;
}

ls_status ls_comm_staged(const ls_device_ops *ops, ls_queue *queue, ls_comm *comm)
{
    static const ls_comm_ops table = {
        .name = "mpi", .begin = begin, .end = end, .forget = forget, .sum = sum, .close = close_staged};
    staged *s = calloc(1, sizeof *s);
    if (s == NULL) LS_FAIL(LS_ERR_MEMORY, "mpi: no memory for a communicator");
    s->host = *comm;
    s->ops = ops;
    s->compute = queue;
    s->last = &s->first;
    const ls_status status = ops->open_beside(queue, &s->copies);
    if (status != LS_OK) {
        free(s);
        return status;
    }
    comm->ops = &table;
    comm->own = s;
    comm->host = &s->host;
    return LS_OK;
}
