/* What is refused before anything is allocated or written: options of an attention, and what a call of it was given. */
#include "attention.h"

#include <string.h>

/* ------------------------------------------------------------------------------------------------ options */

enum { MOST_HEADS = 65535, MOST_STREAM = 65535 }; /* 16 bits each in the key of random numbers; blocks of a GPU */
enum { MOST_EMBED_DIM = 1 << 20 };                /* its square, times slots or channels, is still counted in 64 bits */

ls_status ls_check_options(const ls_attention_options *o, const ls_mechanism **mechanism)
{
    if (o == NULL) LS_FAIL(LS_ERR_ARGUMENT, "attention: options is NULL");
    ls_attention_options defaults;
    LS_TRY(ls_attention_defaults(o->mechanism, &defaults)); /* names those that exist */
    const ls_mechanism *m = *mechanism = ls_mechanism_find(o->mechanism);
    if ((unsigned)o->pattern > 3) LS_FAIL(LS_ERR_ARGUMENT, "%s: there is no pattern %d", m->name, (int)o->pattern);
    if (m->phases[o->pattern] == NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: %s attention is not supported", m->name, ls_pattern_name(o->pattern));
    if (o->embed_dim <= 0 || o->num_heads <= 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: embed_dim %lld and num_heads %lld must be positive", m->name,
                (long long)o->embed_dim, (long long)o->num_heads);
    if (o->embed_dim % o->num_heads != 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: embed_dim %lld is not divisible by num_heads %lld", m->name,
                (long long)o->embed_dim, (long long)o->num_heads);
    if (o->num_heads > MOST_HEADS)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: num_heads %lld is more than %d", m->name, (long long)o->num_heads, MOST_HEADS);
    if (o->embed_dim > MOST_EMBED_DIM)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: embed_dim %lld is more than %d", m->name, (long long)o->embed_dim,
                MOST_EMBED_DIM);
    if (!(o->scale >= 0) || o->scale > 1e30)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: scale %g must be a positive number, or 0 for the default", m->name, o->scale);
    if (!(o->dropout >= 0 && o->dropout < 1))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: dropout %g must be in [0, 1)", m->name, o->dropout);
    if (o->stream > MOST_STREAM)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: stream %u is more than %d: it would draw the numbers of another one", m->name,
                (unsigned)o->stream, MOST_STREAM);
    if (o->dropout > 0 && !m->has_weights)
        return ls_fail_of("dropout", NULL, LS_ERR_UNSUPPORTED,
                          "%s: dropout of attention probabilities is not supported, it has none: use 0", m->name);
    if ((unsigned)o->layout > LS_TBHD) LS_FAIL(LS_ERR_ARGUMENT, "%s: there is no layout %d", m->name, (int)o->layout);
    if ((unsigned)o->level > LS_LEVEL_LAYER)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: there is no level %d", m->name, (int)o->level);
    if (o->level == LS_LEVEL_CORE && m->layer_only)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: it has no core level, its projections are part of it: use LS_LEVEL_LAYER",
                m->name);
    for (int i = 0; m->option != NULL && m->option[i].name != NULL; i++) {
        ls_attention_options copy = *o;
        LS_TRY(ls_attention_set(&copy, m->option[i].name, o->value[i]));
    }
    return m->check == NULL ? LS_OK : m->check(o);
}

ls_status ls_attention_check(const ls_attention_options *options)
{
    const ls_mechanism *mechanism;
    return ls_check_options(options, &mechanism);
}

/* ------------------------------------------------------------------------------------------------ a call */

ls_status ls_check_shard(const ls_attention *a, const ls_shard *s, const char *what)
{
    const char *name = a->mechanism->name;
    const ls_comm *comm = &a->ctx->exchange.comm;
    if (s == NULL || s->bounds == NULL)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the shard of the %s is missing: make one with ls_shard_even", name, what);
    if (s->size != comm->size || s->rank != comm->rank)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: the shard of the %s is for rank %d of %d, this is rank %d of %d", name, what,
                s->rank, s->size, comm->rank, comm->size);
    int whole = s->bounds[0] == 0 && s->length == s->bounds[s->size] && s->lo == s->bounds[s->rank] &&
                s->lo + s->n == s->bounds[s->rank + 1];
    for (int r = 0; r < s->size; r++) whole = whole && s->bounds[r] <= s->bounds[r + 1];
    if (!whole) LS_FAIL(LS_ERR_ARGUMENT, "%s: the shard of the %s contradicts itself", name, what);
    return ls_check_length(s->length);
}

static ls_status check_packed(const ls_attention *a, const ls_attention_io *io)
{
    const char *name = a->mechanism->name;
    if (!ls_is_packed(io)) return LS_OK;
    if (ls_comm_is_dry(&a->ctx->exchange.comm))
        LS_FAIL(LS_ERR_UNSUPPORTED,
                "%s: packed documents cannot be planned in a dry context, to which the other ranks cannot tell theirs: "
                "leave the segments out",
                name);
    if (io->attn_mask != NULL || io->dropout_mask != NULL || io->need_weights || io->need_head_weights ||
        io->noise != NULL || io->samples != NULL || io->selected != NULL)
        LS_FAIL(LS_ERR_UNSUPPORTED,
                "%s: packed documents cannot have attn_mask, dropout_mask, weights, noise, samples or selected", name);
    if (!ls_is_self(a->options.pattern) && (io->query_segments == NULL || io->key_segments == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: cross attention of packed documents needs query_segments and key_segments", name);
    return LS_OK;
}

ls_status ls_check_given(const ls_attention *a, const ls_attention_io *io)
{
    const struct {
        const void *given;
        int kind;
        const char *what;
    } random[] = {{io->features, LS_GIVEN_FEATURES, "features"},
                  {io->noise, LS_GIVEN_NOISE, "noise"},
                  {io->samples, LS_GIVEN_SAMPLES, "samples"},
                  {io->selected, LS_GIVEN_SAMPLES, "selected"}};
    for (int i = 0; i < 4; i++)
        if (random[i].given != NULL && a->mechanism->draws != random[i].kind)
            LS_FAIL(LS_ERR_UNSUPPORTED, "%s: %s are not supported", a->mechanism->name, random[i].what);
    return LS_OK;
}

ls_status ls_check_call(const ls_attention *a, const ls_attention_shape *shape, const ls_attention_io *io,
                        const ls_real *params, const ls_real *out)
{
    const char *name = a->mechanism->name;
    LS_NEED(shape, "%s: shape is NULL", name);
    LS_NEED(io, "%s: io is NULL", name);
    LS_TRY(a->ctx->ops->enter(a->ctx->queue));
    if (shape->batch <= 0) LS_FAIL(LS_ERR_ARGUMENT, "%s: batch %lld must be positive", name, (long long)shape->batch);
    LS_TRY(ls_check_shard(a, shape->queries, "queries"));
    const ls_shard *keys = shape->keys == NULL && ls_is_self(a->options.pattern) ? shape->queries : shape->keys;
    LS_TRY(ls_check_shard(a, keys, "keys"));
    if (ls_is_self(a->options.pattern) &&
        memcmp(keys->bounds, shape->queries->bounds, ((size_t)keys->size + 1) * sizeof *keys->bounds) != 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: self attention needs as many keys (%lld) as queries (%lld), sharded alike", name,
                (long long)keys->length, (long long)shape->queries->length);
    LS_TRY(ls_check_size(name, shape->batch, shape->queries->length + keys->length, a->options.embed_dim));
    LS_TRY(ls_check_rows(name, shape->batch, ls_max(shape->queries->n, keys->n), ls_rows_apart(a, shape->batch)));
    const int is_layer = ls_is_layer(a), one_input = a->mechanism->one_input;
    if (one_input && ((io->key != NULL && io->key != io->query) || (io->value != NULL && io->value != io->query)))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: it reads query alone: let key and value be NULL or the same", name);
    if (shape->queries->n > 0 && (io->query == NULL || out == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: query or out is NULL", name);
    if (keys->n > 0 && !is_layer && !one_input && (io->key == NULL || io->value == NULL))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key or value is NULL", name);
    if (keys->n > 0 && is_layer && !ls_is_self(a->options.pattern) && io->key == NULL)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: key is NULL: cross attention needs a source", name);
    if (a->reals > 0 && params == NULL) LS_FAIL(LS_ERR_ARGUMENT, "%s: params is NULL", name);
    const int wants_weights = io->need_weights || io->need_head_weights;
    if ((io->attn_mask != NULL || io->dropout_mask != NULL || wants_weights) && !a->mechanism->has_weights)
        LS_FAIL(LS_ERR_UNSUPPORTED, "%s: attn_mask, dropout_mask and need_weights are not supported", name);
    LS_TRY(ls_check_given(a, io));
    if (io->samples != NULL && io->num_samples < 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: num_samples %lld is negative", name, (long long)io->num_samples);
    if (io->samples != NULL && io->num_samples >= LS_MOST_NUMBERS / shape->batch / ls_max(shape->queries->n, 1))
        LS_FAIL(LS_ERR_ARGUMENT, "%s: num_samples %lld is too large", name, (long long)io->num_samples);
    if ((io->attn_mask != NULL || io->dropout_mask != NULL || wants_weights) &&
        shape->queries->n >= INT64_MAX / 16 / shape->batch / a->H / ls_max(keys->length, 1)) /* a number is 8 bytes */
        LS_FAIL(LS_ERR_ARGUMENT, "%s: a mask or weights of %lld queries x %lld keys are too large", name,
                (long long)shape->queries->n, (long long)keys->length);
    if (wants_weights && io->weights == NULL && shape->queries->n > 0)
        LS_FAIL(LS_ERR_ARGUMENT, "%s: need_weights without a place for them: weights is NULL", name);
    return check_packed(a, io);
}
