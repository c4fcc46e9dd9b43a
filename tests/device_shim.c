#define DEVICE_SHIM_INSIDE
#include "device_shim.h"

#include "attention.h"
#include "where.h"

#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

ls_device test_device(void)
{
    return test_where();
}

ls_precision test_precision(void)
{
    return test_rounding();
}

/* ------------------------------------------------------------------------------------------------ copies */

/* Host tensors of one call and their copies. The same pointer is copied once, so that aliases stay aliases. */
typedef struct tensor {
    const void *host;
    void *device;
    size_t bytes;
    int comes_back;
} tensor;
typedef struct copies {
    ls_context *ctx;
    tensor list[32];
    int count;
    ls_status status;
} copies;

static void *put(copies *c, const void *host, int64_t count, size_t size, int comes_back)
{
    const size_t bytes = (size_t)(count > 0 ? count : 0) * size;
    if (host == NULL) return NULL;
    for (int i = 0; i < c->count; i++)
        if (c->list[i].host == host && c->list[i].bytes >= bytes) {
            c->list[i].comes_back |= comes_back;
            return c->list[i].device;
        }
    tensor *t = &c->list[c->count];
    *t = (tensor){host, NULL, bytes, comes_back};
    if (c->status == LS_OK) c->status = ls_device_alloc(c->ctx, bytes, &t->device);
    if (t->device == NULL) return NULL;
    c->count++;
    c->status = ls_device_write(c->ctx, t->device, host, bytes);
    return t->device;
}

static ls_real *reals(copies *c, const ls_real *host, int64_t count, int comes_back)
{
    return put(c, host, count, sizeof *host, comes_back);
}

/* A tensor that tests always give as they got it from calloc. */
static ls_real *whole(copies *c, const ls_real *host)
{
    return host == NULL ? NULL
                        : reals(c, host, (int64_t)(malloc_usable_size((void *)(uintptr_t)host) / sizeof *host), 0);
}

/* Waits, copies back what came out, gives the memory back. */
static ls_status finish(copies *c, ls_status status)
{
    const ls_status waited = ls_context_wait(c->ctx);
    if (status == LS_OK) status = waited;
    for (int i = 0; i < c->count; i++) {
        const tensor *t = &c->list[i];
        if (t->comes_back && status == LS_OK)
            status = ls_device_read(c->ctx, (void *)(uintptr_t)t->host, t->device, t->bytes);
        ls_device_free(c->ctx, t->device);
    }
    return status;
}

/* ------------------------------------------------------------------------------------------------ calls */

static int on_host(const ls_attention *a)
{
    return a == NULL || a->ctx->device == LS_CPU;
}

/* Not this rank's: its rows need not be there. */
static int is_foreign(const ls_attention *a, const ls_shard *s)
{
    return s->bounds == NULL || s->size != ls_context_size(a->ctx) || s->rank != ls_context_rank(a->ctx) ||
           s->lo != s->bounds[s->rank] || s->lo + s->n != s->bounds[s->rank + 1];
}

/* A shape that the library will refuse before it looks at any tensor. */
static int is_broken(const ls_attention *a, const ls_attention_shape *shape)
{
    return shape->batch <= 0 || shape->queries == NULL || is_foreign(a, shape->queries) ||
           (shape->keys != NULL && is_foreign(a, shape->keys));
}

static int64_t out_width(const ls_attention *a)
{
    return ls_is_layer(a) || !a->mechanism->one_input ? a->options.embed_dim : a->form.core_width;
}

static ls_attention_io to_device(copies *c, const ls_attention *a, const ls_attention_shape *shape,
                                 const ls_attention_io *io)
{
    ls_attention_io d = *io;
    const ls_shard *keys = shape->keys != NULL ? shape->keys : shape->queries;
    const int64_t B = shape->batch, T = shape->queries->n, S = keys->n, all = keys->length, E = a->options.embed_dim;
    const int64_t H = a->options.num_heads, heads = B * H * T * all;
    d.query = reals(c, io->query, B * T * E, 0);
    d.key = reals(c, io->key, B * S * E, 0);
    d.value = reals(c, io->value, B * S * E, 0);
    d.query_padding_mask = put(c, io->query_padding_mask, B * T, 1, 0);
    d.key_padding_mask = put(c, io->key_padding_mask, B * S, 1, 0);
    d.attn_mask = reals(c, io->attn_mask, io->attn_mask_per_head ? heads : T * all, 0);
    d.dropout_mask = reals(c, io->dropout_mask, heads, 0);
    d.weights = reals(c, io->weights, io->need_head_weights ? heads : B * T * all, 1);
    d.features = whole(c, io->features);
    d.noise = whole(c, io->noise);
    d.samples = put(c, io->samples, (io->samples_per_batch ? B : 1) * T * io->num_samples, sizeof *io->samples, 0);
    d.selected = put(c, io->selected, B * H * T, 1, 1);
    return d;
}

ls_status shim_forward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                       const ls_real *params, ls_real *out, ls_saved *saved)
{
    if (on_host(a) || is_broken(a, shape)) return ls_attention_forward(a, shape, io, params, out, saved);
    copies c = {.ctx = a->ctx};
    const ls_attention_io d = to_device(&c, a, shape, io);
    const ls_real *p = reals(&c, params, a->reals, 0);
    ls_real *y = reals(&c, out, shape->batch * shape->queries->n * out_width(a), 1);
    return finish(&c, c.status != LS_OK ? c.status : ls_attention_forward(a, shape, &d, p, y, saved));
}

ls_status shim_backward(ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                        const ls_real *params, const ls_real *out, const ls_real *dout, ls_saved *saved,
                        const ls_attention_grads *grads)
{
    if (on_host(a) || is_broken(a, shape)) return ls_attention_backward(a, shape, io, params, out, dout, saved, grads);
    copies c = {.ctx = a->ctx};
    const ls_attention_io d = to_device(&c, a, shape, io);
    const ls_shard *keys = shape->keys != NULL ? shape->keys : shape->queries;
    const int64_t B = shape->batch, T = B * shape->queries->n, S = B * keys->n, E = a->options.embed_dim;
    const ls_real *p = reals(&c, params, a->reals, 0), *y = reals(&c, out, T * out_width(a), 0);
    const ls_real *dy = reals(&c, dout, T * out_width(a), 0);
    const ls_attention_grads g = {.query = reals(&c, grads->query, T * E, 1),
                                  .key = reals(&c, grads->key, S * E, 1),
                                  .value = reals(&c, grads->value, S * E, 1),
                                  .params = reals(&c, grads->params, a->reals, 1)};
    return finish(&c, c.status != LS_OK ? c.status : ls_attention_backward(a, shape, &d, p, y, dy, saved, &g));
}

/* ------------------------------------------------------------------------------------------------ steps */

enum { MOST_STATES = 64 };
static struct {
    const ls_state *state;
    int64_t batch;
} states[MOST_STATES]; /* the last ones that were made */
static int next_state;

static int64_t batch_of(const ls_state *s)
{
    for (int i = 1; i <= MOST_STATES; i++) {
        const int at = (next_state + MOST_STATES - i) % MOST_STATES;
        if (states[at].state == s) return states[at].batch;
    }
    fprintf(stderr, "device_shim: a state that is not known\n");
    abort();
}

ls_status shim_state_create(ls_attention *a, int64_t batch, int64_t max_length, ls_state **state)
{
    const ls_status status = ls_state_create(a, batch, max_length, state);
    states[next_state].state = *state;
    states[next_state].batch = batch;
    if (status == LS_OK) next_state = (next_state + 1) % MOST_STATES;
    return status;
}

ls_status shim_state_source(ls_attention *a, ls_state *s, const ls_attention_shape *shape, const ls_attention_io *io,
                            const ls_real *params)
{
    if (on_host(a) || shape->batch <= 0 || shape->keys == NULL || shape->keys->bounds == NULL)
        return ls_state_source(a, s, shape, io, params);
    copies c = {.ctx = a->ctx};
    const int64_t B = shape->batch, S = shape->keys->n, E = a->options.embed_dim;
    ls_attention_io d = *io;
    d.query = NULL;
    d.key = reals(&c, io->key, B * S * E, 0);
    d.value = reals(&c, io->value, B * S * E, 0);
    d.key_padding_mask = put(&c, io->key_padding_mask, B * S, 1, 0);
    d.features = whole(&c, io->features);
    d.noise = whole(&c, io->noise);
    const ls_real *p = reals(&c, params, a->reals, 0);
    return finish(&c, c.status != LS_OK ? c.status : ls_state_source(a, s, shape, &d, p));
}

ls_status shim_step(ls_attention *a, ls_state *s, const ls_attention_io *io, const ls_real *params, ls_real *out)
{
    if (on_host(a)) return ls_attention_step(a, s, io, params, out);
    copies c = {.ctx = a->ctx};
    const int64_t B = batch_of(s), E = a->options.embed_dim;
    ls_attention_io d = *io;
    d.query = reals(&c, io->query, B * E, 0);
    d.key = reals(&c, io->key, B * E, 0);
    d.value = reals(&c, io->value, B * E, 0);
    d.query_padding_mask = put(&c, io->query_padding_mask, B, 1, 0);
    d.key_padding_mask = put(&c, io->key_padding_mask, B, 1, 0);
    d.features = whole(&c, io->features);
    d.noise = whole(&c, io->noise);
    const ls_real *p = reals(&c, params, a->reals, 0);
    ls_real *y = reals(&c, out, B * out_width(a), 1);
    return finish(&c, c.status != LS_OK ? c.status : ls_attention_step(a, s, &d, p, y));
}

ls_status shim_all_reduce_sum(ls_context *ctx, ls_real *x, int64_t n)
{
    if (ctx->device == LS_CPU) return ls_all_reduce_sum(ctx, x, n);
    copies c = {.ctx = ctx};
    ls_real *d = reals(&c, x, n, 1);
    return finish(&c, c.status != LS_OK ? c.status : ls_all_reduce_sum(ctx, d, n));
}
