#include "step.h"

#include <stdlib.h>

/* What travels behind the gradients in their all-reduce. */
enum { TAIL_LOSS, TAIL_NLL, TAIL_TOKENS, TAIL_STOP, TAIL };

ls_status stepper_create(ranks *r, const config *c, stepper *t)
{
    *t = (stepper){.r = r, .c = c};
    LS_TRY(agree(r, model_create(r->sequence, c, &t->m)));
    t->count = model_count(t->m);
    void *squares = NULL;
    t->grads = device_reals(r, t->count + TAIL);
    t->s.params = device_reals(r, t->count);
    t->s.adam_m = device_reals(r, t->count);
    t->s.adam_v = device_reals(r, t->count);
    ls_status status = ls_device_alloc(r->sequence, LS_SQUARES * sizeof *t->squares, &squares);
    t->squares = squares;
    if (status != LS_OK || t->grads == NULL || t->s.params == NULL || t->s.adam_m == NULL || t->s.adam_v == NULL) {
        status = ls_fail(LS_ERR_MEMORY, "no memory for %lld parameters with gradients and optimizer, %.0f MiB",
                         (long long)t->count, 4.0 * (double)t->count * sizeof(ls_real) / 1048576);
    }
    return agree(r, status);
}

void stepper_free(stepper *t)
{
    model_free(t->m);
    if (t->r != NULL) {
        device_free(t->r, t->grads);
        device_free(t->r, t->s.params);
        device_free(t->r, t->s.adam_m);
        device_free(t->r, t->s.adam_v);
        if (t->squares != NULL) ls_device_free(t->r->sequence, t->squares);
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
}

ls_status stepper_add(stepper *t, const batch *b, int64_t labels, model_loss *mine)
{
    model_loss loss;
    LS_TRY(model_gradient(t->m, b, t->s.params, 1.0 / (double)labels, t->grads, &loss));
    mine->loss += loss.loss;
    mine->nll += loss.nll;
    mine->tokens += loss.tokens;
    return LS_OK;
}

ls_status stepper_sum(stepper *t, int64_t labels, const model_loss *mine, int stop, step_sums *out)
{
    const ranks *r = t->r;
    ls_context *device = r->sequence;
    ls_real tail[TAIL];
    tail[TAIL_LOSS] = (ls_real)(mine->loss / (double)labels);
    tail[TAIL_NLL] = (ls_real)(mine->nll / (double)labels);
    tail[TAIL_TOKENS] = (ls_real)((double)mine->tokens / (double)labels); /* all ranks together: 1 */
    tail[TAIL_STOP] = stop != 0;
    /* the queues of both contexts wait for each other: model_gradient has waited for its own */
    LS_TRY(agree(r, ls_device_write(r->gradients, t->grads + t->count, tail, sizeof tail)));
    LS_TRY(ls_all_reduce_sum(r->gradients, t->grads, t->count + TAIL));
    LS_TRY(agree(r, ls_device_read(r->gradients, tail, t->grads + t->count, sizeof tail)));
    ls_adam_of(device->device)->squares(device->queue, t->count, t->grads, t->squares);
    LS_TRY(agree(r, ls_device_read(device, &out->squares, t->squares, sizeof out->squares)));
    out->loss = (double)tail[TAIL_LOSS];
    out->nll = (double)tail[TAIL_NLL];
    out->tokens = (double)tail[TAIL_TOKENS];
    out->stop = tail[TAIL_STOP] > 0;
    return LS_OK;
}

void stepper_update(stepper *t, double rate)
{
    const ls_context *device = t->r->sequence;
    t->s.step++;
    t->s.samples += t->c->train.batch;
    adamw_step(ls_adam_of(device->device), device->queue, t->c, t->m, t->s.step, rate, t->squares, t->grads,
               t->s.params, t->s.adam_m, t->s.adam_v);
}
