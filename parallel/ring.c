/* The ring, forward and backward: blocks of keys and values visit every rank while kernels work on the one before; and
 * the zigzag placement, in which causal work is the same on all ranks. */
#include "run_parts.h"

/* ------------------------------------------------------------------------------------------------ ring */

/* The block of `rank` as it lies in a buffer. */
static void see_block(const ls_call *c, const ls_pass *p, const ls_phase *ring, int rank, char *buffer, ls_block *block)
{
    ls_describe_block(c, rank, block);
    const int64_t reals = p->B * p->H * block->n * p->d;
    ls_real *k = (ls_real *)(void *)buffer, *v = k + reals;
    block->k = ls_heads_apart(k, p->H, block->n, p->d);
    block->v = ls_heads_apart(ring->keys_only ? NULL : v, p->H, block->n, p->d);
    block->note = ring->keys_only ? v : v + reals;
    block->pad = p->own.pad == NULL ? NULL : (const uint8_t *)(k + ls_block_reals(p, ring, block->n));
}

/* This rank's block, with zeros where it is padded, in block[0]; where nobody else is and nothing is padded, or
 * rows are 0 there already, as it is. */
static void start_ring(const ls_call *c, ls_pass *p, const ls_phase *ring)
{
    p->visit = p->own;
    if (c->keys->size == 1 && (p->own.pad == NULL || p->narrow)) return;
    see_block(c, p, ring, c->keys->rank, c->ring.block[0], &p->visit);
    if (p->own.n == 0) return;
    const ls_memory *memory = ls_memory_of(&c->ctx->exchange);
    ls_clean_block(c->ctx, p->own.k, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.k.p);
    if (!ring->keys_only) ls_clean_block(c->ctx, p->own.v, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.v.p);
    if (ring->notes != NULL)
        memory->copy(c->ctx->queue, p->visit.note, p->own.note, (size_t)ring->notes(p) * sizeof *p->own.note);
    if (p->own.pad != NULL)
        memory->copy(c->ctx->queue, (void *)(uintptr_t)p->visit.pad, p->own.pad, (size_t)(p->B * p->own.n));
}

/* Sends the visiting block on and asks for the one before it. */
static ls_status pass_block(ls_call *c, const ls_pass *p, const ls_phase *ring, int owner, char *here, char *next,
                            ls_pending *pending)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, before = (owner + size - 1) % size;
    ls_block mine, coming;
    ls_describe_block(c, owner, &mine);
    ls_describe_block(c, before, &coming);
    x->traffic.predicted[LS_RING] += ls_block_bytes(p, ring, mine.n);
    LS_TRY(ls_exchange_add(x, next, ls_block_bytes(p, ring, coming.n), (rank + size - 1) % size, 1));
    LS_TRY(ls_exchange_add(x, here, ls_block_bytes(p, ring, mine.n), (rank + 1) % size, 0));
    return ls_exchange_begin(x, LS_RING, pending);
}

ls_status ls_ring_forward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    start_ring(c, p, phase);
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, phase, owner, here, &p->visit);
        if (more) LS_TRY(pass_block(c, p, phase, owner, here, next, &x->pending));
        const ls_status status = ls_run_kernel(c->mechanism, p, phase - i, i, 0); /* while the next block travels */
        if (more) LS_TRY(ls_exchange_end(x, &x->pending));
        LS_TRY(status);
        char *swap = here;
        here = next, next = swap;
    }
    return LS_OK;
}

/* dk and dv travel one step behind their block: what this rank adds is made while the sum so far is on its way here. */
ls_status ls_ring_backward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, right = (rank + 1) % size, left = (rank + size - 1) % size;
    const int64_t per_row = 2 * p->B * p->H * p->d;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    ls_real *making = c->ring.gradient[0], *arriving = c->ring.gradient[1], *leaving = c->ring.gradient[2];
    const ls_memory *memory = ls_memory_of(x);
    start_ring(c, p, phase);
    if (size == 1) {
        p->visit.dk = p->own.dk, p->visit.dv = p->own.dv;
        if (!p->narrow) ls_clear_view(c->ctx, p->own.dk, p->B, p->H, p->own.n, p->d);
        if (!p->narrow) ls_clear_view(c->ctx, p->own.dv, p->B, p->H, p->own.n, p->d);
        return ls_run_kernel(c->mechanism, p, phase - i, i, 1);
    }
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, phase, owner, here, &p->visit);
        if (more) LS_TRY(pass_block(c, p, phase, owner, here, next, &x->pending));
        const int64_t n = p->visit.n, reals = per_row * n;
        p->visit.dk = ls_heads_apart(making, p->H, n, p->d);
        p->visit.dv = ls_heads_apart(making + reals / 2, p->H, n, p->d);
        memory->zero(c->ctx->queue, making, (size_t)reals * sizeof *making);
        const ls_status status = ls_run_kernel(c->mechanism, p, phase - i, i, 1);
        if (step > 0) { /* the sum so far, from the rank that had this block before */
            LS_TRY(ls_exchange_end(x, &x->sums));
            const ls_rows sum = {(char *)making, reals * (int64_t)sizeof *making, 1, 1, 0, 0, 0};
            ls_rows other = sum;
            other.p = (char *)arriving;
            memory->add_rows(c->ctx->queue, sum, other, 1);
        }
        if (more) LS_TRY(ls_exchange_end(x, &x->pending));
        LS_TRY(status);  /* with no message left open */
        ls_block coming; /* the gradient that the left rank has just made: of the block that comes here next */
        ls_describe_block(c, (owner + size - 1) % size, &coming);
        ls_real *swap = leaving;
        leaving = making, making = swap;
        x->traffic.predicted[LS_RING] += (uint64_t)reals * sizeof *leaving;
        LS_TRY(ls_exchange_add(x, arriving, (size_t)(per_row * coming.n) * sizeof *arriving, left, 1));
        LS_TRY(ls_exchange_add(x, leaving, (size_t)reals * sizeof *leaving, right, 0));
        LS_TRY(ls_exchange_begin(x, LS_RING, &x->sums));
        char *swap_block = here;
        here = next, next = swap_block;
    }
    LS_TRY(ls_exchange_end(x, &x->sums)); /* home again: this rank's own block has been everywhere */
    const ls_real *const home[] = {arriving, arriving + per_row / 2 * p->own.n};
    const ls_view to[] = {p->own.dk, p->own.dv};
    for (int t = 0; t < 2; t++)
        memory->copy_rows(
            c->ctx->queue, ls_rows_of_view(to[t], p->B, p->H, p->d),
            ls_rows_of_view(ls_heads_apart((ls_real *)(uintptr_t)home[t], p->H, p->own.n, p->d), p->B, p->H, p->d),
            p->own.n);
    return LS_OK;
}

/* ------------------------------------------------------------------------------------------------ placement */

ls_status ls_place(ls_call *c, int tensors, const ls_view *from, const ls_view *to, int with_pads)
{
    const ls_pass *p = &c->pass;
    const ls_placement *z = &c->placement;
    const int64_t n = c->placement.want[2 * c->keys->rank].n + c->placement.want[2 * c->keys->rank + 1].n;
    ls_rows a[6], b[6];
    int count = 0;
    for (int i = 0; i < tensors; i++, count++) {
        a[count] = ls_rows_of_view(from[i], p->B, p->H, p->d);
        b[count] = ls_rows_of_view(to[i], p->B, p->H, p->d);
    }
    if (with_pads && p->pad_q != NULL) {
        a[count] = ls_rows_of_pad(p->pad_q, p->B, p->T);
        b[count++] = ls_rows_of_pad(z->pad_q, p->B, n);
    }
    if (with_pads && p->own.pad != NULL) {
        a[count] = ls_rows_of_pad(p->own.pad, p->B, p->S);
        b[count++] = ls_rows_of_pad(z->pad_k, p->B, n);
    }
    return ls_fetch(&c->ctx->exchange, c->keys, z->want, a, b, count);
}

ls_status ls_put_back(ls_call *c, int tensors, const ls_view *home, const ls_view *away)
{
    const ls_pass *p = &c->pass;
    ls_rows a[4], b[4];
    for (int i = 0; i < tensors; i++) {
        ls_clear_view(c->ctx, home[i], p->B, p->H, p->T, p->d); /* each row comes back once: adding to 0 is moving */
        a[i] = ls_rows_of_view(home[i], p->B, p->H, p->d);
        b[i] = ls_rows_of_view(away[i], p->B, p->H, p->d);
    }
    return ls_fetch_adjoint(&c->ctx->exchange, c->keys, c->placement.want, a, b, tensors);
}
