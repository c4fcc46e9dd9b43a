#include "run.h"
#include "tile.h"

/* ------------------------------------------------------------------------------------------------ who holds what */

static ls_view contiguous(ls_real *p, int64_t H, int64_t n, int64_t d)
{
    return (ls_view){p, H * n * d, n * d, d};
}

static ls_span zigzag(int64_t length, int size, int rank, int half)
{
    const int64_t chunks = 2 * (int64_t)size, c = half ? chunks - 1 - rank : rank;
    const int64_t lo = length / chunks * c + ls_min(c, length % chunks);
    return (ls_span){0, lo, length / chunks + (c < length % chunks)};
}

/* The block of keys that `rank` owns: its rows, and their global positions. */
static void describe_block(const ls_call *c, int rank, ls_block *block)
{
    const ls_shard *s = c->keys;
    if (c->placement.on) {
        const ls_span *want = c->placement.want + 2 * rank;
        block->spans = 2;
        block->span[0] = want[0];
        block->span[1] = want[1];
        block->span[0].row = 0;
        block->span[1].row = want[0].n;
        block->n = want[0].n + want[1].n;
    } else {
        block->spans = 1;
        block->n = s->bounds[rank + 1] - s->bounds[rank];
        block->span[0] = (ls_span){0, s->bounds[rank], block->n};
    }
}

static int64_t largest_block(const ls_call *c)
{
    int64_t n = 0;
    for (int p = 0; p < c->keys->size; p++)
        n = ls_max(n, c->placement.on ? zigzag(c->keys->length, c->keys->size, p, 0).n +
                                            zigzag(c->keys->length, c->keys->size, p, 1).n
                                      : c->keys->bounds[p + 1] - c->keys->bounds[p]);
    return n;
}

static size_t block_bytes(const ls_pass *p, int64_t n)
{
    const size_t reals = (size_t)(2 * p->B * p->H * n * p->d) * sizeof(ls_real);
    return reals + (p->own.pad != NULL ? (size_t)(p->B * n) : 0);
}

static int has_crossing(const ls_phase *phases, ls_crossing kind)
{
    for (; phases->name != NULL; phases++)
        if (phases->crossing == kind) return 1;
    return 0;
}

static int is_scan(ls_crossing c)
{
    return c == LS_SCAN || c == LS_REVERSE_SCAN;
}

/* ------------------------------------------------------------------------------------------------ plan */

static void plan_placement(ls_call *c, ls_arena *saved, ls_arena *work)
{
    ls_pass *p = &c->pass;
    ls_placement *z = &c->placement;
    const int size = c->keys->size, rank = c->keys->rank;
    z->on = c->mechanism->balance_causal && p->pattern == LS_CS && size > 1 && !c->in_place;
    if (!z->on) return;
    z->want = ls_arena_take(work, (size_t)(2 * size) * sizeof *z->want);
    for (int r = 0; z->want != NULL && r < 2 * size; r++) z->want[r] = zigzag(c->keys->length, size, r / 2, r % 2);
    const int64_t n = zigzag(c->keys->length, size, rank, 0).n + zigzag(c->keys->length, size, rank, 1).n;
    const int64_t reals = p->B * p->H * n * p->d;
    ls_view *keep[] = {&z->q, &z->k, &z->v, &z->out}, *pass[] = {&z->dq, &z->dk, &z->dv, &z->dout};
    for (int i = 0; i < 4; i++) *keep[i] = contiguous(ls_take(saved, reals), p->H, n, p->d);
    for (int i = 0; i < 4; i++) *pass[i] = contiguous(ls_take(work, p->backward ? reals : 0), p->H, n, p->d);
    z->pad_q = p->pad_q == NULL ? NULL : ls_arena_take(saved, (size_t)(p->B * n));
    z->pad_k = p->own.pad == NULL ? NULL : ls_arena_take(saved, (size_t)(p->B * n));
}

/* The pass as the kernels see it: in its zigzag place, where that is on. */
static ls_pass placed(const ls_call *c)
{
    ls_pass p = c->pass;
    const ls_placement *z = &c->placement;
    describe_block(c, c->keys->rank, &p.own);
    if (!z->on) {
        p.query_spans = 1;
        p.query_span[0] = (ls_span){0, c->queries->lo, p.T};
        return p;
    }
    p.T = p.S = p.own.n;
    p.q = z->q, p.own.k = z->k, p.own.v = z->v, p.out = z->out;
    p.dq = z->dq, p.own.dk = z->dk, p.own.dv = z->dv, p.dout = z->dout;
    p.pad_q = p.pad_q != NULL ? z->pad_q : NULL;
    p.own.pad = p.own.pad != NULL ? z->pad_k : NULL;
    p.query_spans = p.own.spans;
    memcpy(p.query_span, p.own.span, sizeof p.query_span);
    return p;
}

void ls_run_plan(ls_call *c, ls_arena *saved, ls_arena *work)
{
    ls_pass *user = &c->pass;
    const ls_phase *phases = c->mechanism->phases[user->pattern];
    plan_placement(c, saved, work);
    if (has_crossing(phases, LS_RING)) {
        const int64_t n = largest_block(c), reals = 2 * user->B * user->H * n * user->d;
        const int alone = c->keys->size == 1;
        for (int i = 0; i < 2; i++)
            c->ring.block[i] =
                ls_arena_take(work, alone && (i == 1 || user->own.pad == NULL) ? 0 : block_bytes(user, n));
        for (int i = 0; i < 3; i++) c->ring.gradient[i] = ls_take(work, user->backward && !alone ? reals : 0);
    }
    for (int i = 0; phases[i].name != NULL; i++) {
        if (phases[i].monoid == NULL) continue;
        ls_summary *s = &user->summary[i];
        s->monoid = phases[i].monoid(user);
        const int64_t n = ls_monoid_size(s->monoid);
        s->sent = ls_take(saved, n);
        s->got = ls_take(saved, n);
        s->dsent = ls_take(work, user->backward ? n : 0);
        s->dgot = ls_take(work, user->backward ? n : 0);
    }
    if (c->mechanism->plan == NULL) return;
    if (work->measuring &&
        c->placement.on) { /* sizes depend on the placed rows; want is not there yet: any NULL will do */
        ls_pass p = *user;
        p.T = p.S = zigzag(c->keys->length, c->keys->size, c->keys->rank, 0).n +
                    zigzag(c->keys->length, c->keys->size, c->keys->rank, 1).n;
        c->mechanism->plan(&p, saved, work);
        return;
    }
    ls_pass p = placed(c);
    c->mechanism->plan(&p, saved, work);
    memcpy(user->saved, p.saved, sizeof p.saved);
    memcpy(user->work, p.work, sizeof p.work);
}

/* ------------------------------------------------------------------------------------------------ ring */

ls_view ls_clean_block(ls_view from, int64_t B, int64_t H, int64_t n, int64_t d, const uint8_t *pad, ls_real *to)
{
    const ls_view v = contiguous(to, H, n, d);
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) ls_clean_rows(from, b, h, 0, n, d, pad, n, 1, ls_row(v, b, h, 0));
    return v;
}

/* The block of `rank` as it lies in a buffer. */
static void see_block(const ls_call *c, const ls_pass *p, int rank, char *buffer, ls_block *block)
{
    describe_block(c, rank, block);
    ls_real *k = (ls_real *)(void *)buffer, *v = k + p->B * p->H * block->n * p->d;
    block->k = contiguous(k, p->H, block->n, p->d);
    block->v = contiguous(v, p->H, block->n, p->d);
    block->pad = p->own.pad == NULL ? NULL : (const uint8_t *)(v + p->B * p->H * block->n * p->d);
}

/* This rank's block, with zeros where it is padded, in block[0]; where nobody else is and nothing is padded, as it is.
 */
static void start_ring(const ls_call *c, ls_pass *p)
{
    p->visit = p->own;
    if (c->keys->size == 1 && p->own.pad == NULL) return;
    see_block(c, p, c->keys->rank, c->ring.block[0], &p->visit);
    ls_clean_block(p->own.k, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.k.p);
    ls_clean_block(p->own.v, p->B, p->H, p->own.n, p->d, p->own.pad, p->visit.v.p);
    if (p->own.pad != NULL) memcpy((void *)(uintptr_t)p->visit.pad, p->own.pad, (size_t)(p->B * p->own.n));
}

/* Sends the visiting block on and asks for the one before it. `left`: steps after this one. */
static ls_status pass_block(ls_call *c, const ls_pass *p, int owner, char *here, char *next, ls_pending *pending)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, before = (owner + size - 1) % size;
    ls_block mine, coming;
    describe_block(c, owner, &mine);
    describe_block(c, before, &coming);
    x->traffic.predicted[LS_RING] += mine.n > 0 ? block_bytes(p, mine.n) : 0;
    LS_TRY(ls_exchange_add(x, next, coming.n > 0 ? block_bytes(p, coming.n) : 0, (rank + size - 1) % size, 1));
    LS_TRY(ls_exchange_add(x, here, mine.n > 0 ? block_bytes(p, mine.n) : 0, (rank + 1) % size, 0));
    return ls_exchange_begin(x, LS_RING, pending);
}

static ls_status ring_forward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    start_ring(c, p);
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, owner, here, &p->visit);
        if (more) LS_TRY(pass_block(c, p, owner, here, next, &x->pending));
        const ls_status status = phase->forward(p, i); /* while the next block travels */
        if (more) LS_TRY(ls_exchange_end(x, &x->pending));
        LS_TRY(status);
        char *swap = here;
        here = next, next = swap;
    }
    return LS_OK;
}

/* dk and dv travel one step behind their block: what this rank adds is made while the sum so far is on its way here. */
static ls_status ring_backward(ls_call *c, ls_pass *p, const ls_phase *phase, int i)
{
    ls_exchange *x = &c->ctx->exchange;
    const int size = x->comm.size, rank = x->comm.rank, right = (rank + 1) % size, left = (rank + size - 1) % size;
    const int64_t per_row = 2 * p->B * p->H * p->d;
    char *here = c->ring.block[0], *next = c->ring.block[1];
    ls_real *making = c->ring.gradient[0], *arriving = c->ring.gradient[1], *leaving = c->ring.gradient[2];
    ls_pending sums = {0};
    ls_status status = LS_OK;
    start_ring(c, p);
    if (size == 1) {
        p->visit.dk = p->own.dk, p->visit.dv = p->own.dv;
        ls_zero_view(p->own.dk, p->B, p->H, p->own.n, p->d);
        ls_zero_view(p->own.dv, p->B, p->H, p->own.n, p->d);
        return phase->backward(p, i);
    }
    for (int step = 0; step < size; step++) {
        const int owner = (rank + size - step) % size, more = step + 1 < size;
        if (step > 0) see_block(c, p, owner, here, &p->visit);
        if (more) LS_TRY_GOTO(pass_block(c, p, owner, here, next, &x->pending));
        const int64_t n = p->visit.n, reals = per_row * n;
        p->visit.dk = contiguous(making, p->H, n, p->d);
        p->visit.dv = contiguous(making + reals / 2, p->H, n, p->d);
        ls_zero(making, reals);
        LS_TRY_GOTO(phase->backward(p, i));
        if (step > 0) { /* the sum so far, from the rank that had this block before */
            LS_TRY_GOTO(ls_exchange_end(x, &sums));
            for (int64_t e = 0; e < reals; e++) making[e] += arriving[e];
        }
        if (more) LS_TRY_GOTO(ls_exchange_end(x, &x->pending));
        ls_block coming; /* the gradient that the left rank has just made: of the block that comes here next */
        describe_block(c, (owner + size - 1) % size, &coming);
        ls_real *swap = leaving;
        leaving = making, making = swap;
        x->traffic.predicted[LS_RING] += (uint64_t)reals * sizeof *leaving;
        LS_TRY_GOTO(ls_exchange_add(x, arriving, (size_t)(per_row * coming.n) * sizeof *arriving, left, 1));
        LS_TRY_GOTO(ls_exchange_add(x, leaving, (size_t)reals * sizeof *leaving, right, 0));
        LS_TRY_GOTO(ls_exchange_begin(x, LS_RING, &sums));
        char *swap_block = here;
        here = next, next = swap_block;
    }
    LS_TRY_GOTO(ls_exchange_end(x, &sums)); /* home again: this rank's own block has been everywhere */
    for (int64_t b = 0; b < p->B; b++)
        for (int64_t h = 0; h < p->H; h++)
            for (int64_t t = 0; t < p->own.n; t++) {
                const ls_real *from = arriving + ((b * p->H + h) * p->own.n + t) * p->d;
                memcpy(ls_row(p->own.dk, b, h, t), from, (size_t)p->d * sizeof *from);
                memcpy(ls_row(p->own.dv, b, h, t), from + per_row / 2 * p->own.n, (size_t)p->d * sizeof *from);
            }
done:
    x->comm.ops->forget(&sums);
    return status;
}

/* ------------------------------------------------------------------------------------------------ placement */

static ls_status place(ls_call *c, int tensors, const ls_view *from, const ls_view *to, int with_pads)
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

static ls_status put_back(ls_call *c, int tensors, const ls_view *home, const ls_view *away)
{
    const ls_pass *p = &c->pass;
    ls_rows a[4], b[4];
    for (int i = 0; i < tensors; i++) {
        ls_zero_view(home[i], p->B, p->H, p->T, p->d); /* each row comes back once: adding to 0 is moving */
        a[i] = ls_rows_of_view(home[i], p->B, p->H, p->d);
        b[i] = ls_rows_of_view(away[i], p->B, p->H, p->d);
    }
    return ls_fetch_adjoint(&c->ctx->exchange, c->keys, c->placement.want, a, b, tensors);
}

/* ------------------------------------------------------------------------------------------------ walk */

/* What a phase makes for the ranks after this one is not made where there are none. */
static int is_needless(const ls_call *c, const ls_phase *phase)
{
    return phase->feeds_scan &&
           (phase[1].crossing == LS_SCAN ? c->keys->rank == c->keys->size - 1 : c->keys->rank == 0);
}

ls_status ls_run_forward(ls_call *c)
{
    ls_exchange *x = &c->ctx->exchange;
    const ls_phase *phases = c->mechanism->phases[c->pass.pattern];
    const ls_placement *z = &c->placement;
    if (z->on) {
        const ls_view from[] = {c->pass.q, c->pass.own.k, c->pass.own.v}, to[] = {z->q, z->k, z->v};
        LS_TRY(place(c, 3, from, to, 1));
    }
    ls_pass p = placed(c);
    for (int i = 0; phases[i].name != NULL; i++) {
        const ls_phase *phase = &phases[i];
        ls_summary *s = &p.summary[i];
        if (is_needless(c, phase)) {
            ls_monoid_identity(p.summary[i + 1].monoid, p.summary[i + 1].sent);
            continue;
        }
        if (phase->crossing == LS_REDUCE) LS_TRY(ls_reduce(x, s->monoid, s->sent, s->got));
        if (is_scan(phase->crossing))
            LS_TRY(ls_scan(x, s->monoid, phase->crossing == LS_REVERSE_SCAN, s->sent, s->got));
        if (phase->crossing == LS_RING)
            LS_TRY(ring_forward(c, &p, phase, i));
        else
            LS_TRY(phase->forward(&p, i));
    }
    return z->on ? put_back(c, 1, &c->pass.out, &z->out) : LS_OK;
}

ls_status ls_run_backward(ls_call *c)
{
    ls_exchange *x = &c->ctx->exchange;
    const ls_phase *phases = c->mechanism->phases[c->pass.pattern];
    const ls_placement *z = &c->placement;
    if (z->on) LS_TRY(place(c, 1, &c->pass.dout, &z->dout, 0));
    ls_pass p = placed(c);
    int last = 0;
    while (phases[last].name != NULL) last++;
    for (int i = last - 1; i >= 0; i--) {
        const ls_phase *phase = &phases[i];
        ls_summary *s = &p.summary[i];
        if (phase->backward == NULL || is_needless(c, phase)) continue;
        if (phase->crossing == LS_RING)
            LS_TRY(ring_backward(c, &p, phase, i));
        else
            LS_TRY(phase->backward(&p, i));
        if (phase->crossing == LS_REDUCE) LS_TRY(ls_reduce_adjoint(x, s->monoid, s->sent, s->got, s->dgot, s->dsent));
        if (is_scan(phase->crossing))
            LS_TRY(
                ls_scan_adjoint(x, s->monoid, phase->crossing == LS_REVERSE_SCAN, s->sent, s->got, s->dgot, s->dsent));
    }
    if (!z->on) return LS_OK;
    const ls_view home[] = {c->pass.dq, c->pass.own.dk, c->pass.own.dv}, away[] = {z->dq, z->dk, z->dv};
    return put_back(c, 3, home, away);
}
