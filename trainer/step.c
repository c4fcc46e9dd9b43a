#include "step.h"

#include <math.h>
#include <stdlib.h>

/* What travels behind the gradients in their all-reduce: first what the device knows, then what the host knows. */
enum { TAIL_LOSS, TAIL_NLL, TAIL_TOKENS, TAIL_STOP, TAIL };

/* Pinned: the numbers that a step brings to the host. */
struct step_numbers {
    double squares;
    ls_real tail[TAIL];
};

static ls_status reserve(const ranks *r, stepper *t)
{
    const ls_device_ops *ops = r->sequence->ops;
    void *squares, *sums;
    LS_TRY(device_reals(r, "gradients", t->count + TAIL, &t->grads));
    LS_TRY(device_reals(r, "parameters", t->count, &t->s.params));
    LS_TRY(device_reals(r, "AdamW's first moments", t->count, &t->s.adam_m));
    LS_TRY(device_reals(r, "AdamW's second moments", t->count, &t->s.adam_v));
    LS_TRY(ls_reserve(ops, "sums of a step", LS_SQUARES * sizeof *t->squares, &squares));
    t->squares = squares;
    LS_TRY(ls_reserve(ops, "sums of a step", LS_LOSS_SUMS * sizeof *t->sums, &sums));
    t->sums = sums;
    t->numbers = ops->alloc_host(sizeof *t->numbers);
    if (t->numbers == NULL) LS_FAIL(LS_ERR_MEMORY, "no memory for the numbers that a step brings to the host");
    return LS_OK;
}

ls_status stepper_create(ranks *r, const config *c, stepper *t)
{
    *t = (stepper){.r = r, .c = c};
    LS_TRY(agree(r, model_create(r->sequence, c, &t->m)));
    t->count = model_count(t->m);
    return agree(r, reserve(r, t));
}

void stepper_free(stepper *t)
{
    model_free(t->m);
    if (t->r != NULL) {
        const ls_device_ops *ops = t->r->sequence->ops;
        ops->wait(t->r->sequence->queue); /* a step that failed may still write to numbers */
        if (t->numbers != NULL) ops->release_host(t->numbers);
        ops->unmark(t->mine), ops->unmark(t->summed), ops->unmark(t->read);
        device_free(t->r, t->grads);
        device_free(t->r, t->s.params);
        device_free(t->r, t->s.adam_m);
        device_free(t->r, t->s.adam_v);
        if (t->squares != NULL) ls_device_free(t->r->sequence, t->squares);
        if (t->sums != NULL) ls_device_free(t->r->sequence, t->sums);
    }
    *t = (stepper){0};
}

ls_status stepper_init(stepper *t)
{
    const size_t bytes = (size_t)t->count * sizeof(ls_real);
    ls_real *first = malloc(bytes);
    if (first == NULL) LS_FAIL(LS_ERR_MEMORY, "no memory for the first values of %lld parameters", (long long)t->count);
    model_init(t->m, t->c->train.seed, first);
    const ls_status status = ls_device_write(t->r->sequence, t->s.params, first, bytes);
    free(first);
    return status;
}

void stepper_piece(const stepper *t, int64_t a, int64_t *lo, int64_t *hi)
{
    const int64_t pieces = t->r->groups * t->c->train.accumulation;
    const int64_t piece = t->r->group * t->c->train.accumulation + a;
    *lo = t->c->train.batch * piece / pieces;
    *hi = t->c->train.batch * (piece + 1) / pieces;
}

void stepper_begin(stepper *t)
{
    ls_context *device = t->r->sequence;
    device->dense->zero(device->queue, (size_t)(t->count + TAIL) * sizeof *t->grads, t->grads);
    device->dense->zero(device->queue, LS_LOSS_SUMS * sizeof *t->sums, t->sums);
    t->seen = 0;
}

ls_status stepper_add(stepper *t, const batch *b, int64_t labels)
{
    t->seen += batch_labels(b);
    return model_gradient(t->m, b, t->s.params, 1.0 / (double)labels, t->grads, t->sums);
}

/* What `later` is given from now on waits, on the device, for all that `first` was given. */
static ls_status follow(ls_context *later, ls_context *first, ls_mark **mark)
{
    LS_TRY(first->ops->mark(first->queue, mark));
    return later->ops->follow(later->queue, *mark);
}

static ls_status give_tail(stepper *t, int64_t labels, int stop)
{
    ls_context *device = t->r->sequence;
    ls_real *tail = t->grads + t->count;
    const ls_real known[TAIL - TAIL_TOKENS] = {(ls_real)((double)t->seen / (double)labels), /* all ranks together: 1 */
                                               stop != 0};
    device->dense->divide(device->queue, TAIL_TOKENS, t->sums, (double)labels, tail);
    LS_TRY(ls_device_write(device, tail + TAIL_TOKENS, known, sizeof known));
    return follow(t->r->gradients, device, &t->mine);
}

/* After the sum: what the host wants to know is on its way before the update, which decides by itself whether there is
 * one. So the host, when it has the numbers, can prepare the next step while parameters change. */
static ls_status give_update(stepper *t, double rate)
{
    ls_context *device = t->r->sequence;
    const ls_device_ops *ops = device->ops;
    const ls_adam_ops *adam = ls_adam_of(device->device);
    const ls_real *tail = t->grads + t->count;
    LS_TRY(follow(device, t->r->gradients, &t->summed));
    adam->squares(device->queue, t->count, t->grads, t->squares);
    LS_TRY(ops->begin_to_host(device->queue, &t->numbers->squares, t->squares, sizeof t->numbers->squares));
    LS_TRY(ops->begin_to_host(device->queue, t->numbers->tail, tail, sizeof t->numbers->tail));
    LS_TRY(ops->mark(device->queue, &t->read));
    adamw_step(adam, device->queue, t->c, t->m, t->s.step + 1, rate, t->squares, tail + TAIL_LOSS, t->grads,
               t->s.params, t->s.adam_m, t->s.adam_v);
    return LS_OK;
}

ls_status stepper_end(stepper *t, int64_t labels, int stop, double rate, step_sums *out)
{
    ranks *r = t->r;
    const ls_context *device = r->sequence;
    LS_TRY(agree(r, give_tail(t, labels, stop)));
    ls_status status = ls_all_reduce_sum(r->gradients, t->grads, t->count + TAIL);
    if (status == LS_OK) status = give_update(t, rate);
    if (status == LS_OK) status = device->ops->reach(device->queue, t->read);
    if (status != LS_OK) {
        r->lost = r->size > 1; /* the others may wait for this rank's gradients, on the host or on the device */
        return status;
    }
    const ls_real *tail = t->numbers->tail;
    *out = (step_sums){.loss = (double)tail[TAIL_LOSS],
                       .nll = (double)tail[TAIL_NLL],
                       .tokens = (double)tail[TAIL_TOKENS],
                       .stop = tail[TAIL_STOP] > 0,
                       .squares = t->numbers->squares};
    out->updated = isfinite(out->loss) && isfinite(out->squares);
    t->s.step += out->updated;
    t->s.samples += out->updated * t->c->train.batch;
    return LS_OK;
}
