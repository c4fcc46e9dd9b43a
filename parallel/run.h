/* The driver: walks a mechanism's phases forward, and in reverse for the backward pass, with the crossings between. */
#ifndef LS_RUN_H
#define LS_RUN_H

#include "context.h"

/* Key/value blocks on their way round the ring. A block on the wire is k (B,H,n,d), v, then pad bytes (B,n). */
typedef struct ls_ring_buffers {
    char *block[2];       /* the visiting block, the one that is coming */
    ls_real *gradient[3]; /* dk, dv: being made, arriving, leaving */
} ls_ring_buffers;

/* Causal softmax gives late queries more work than early ones. In a zigzag placement rank r holds chunks r and 2P-1-r
 * of 2P, so all have the same. Inputs are fetched into it, the output goes back by the adjoint of the fetch. */
typedef struct ls_placement {
    int on;
    ls_span *want; /* (2 P), the context's */
    ls_view q, k, v, out, dq, dk, dv, dout;
    uint8_t *pad_q, *pad_k;
} ls_placement;

/* What a fetch needs beside the halo itself. */
typedef struct ls_reach {
    ls_span *want; /* (2 P), the context's: of every rank, see ls_fetch */
    int64_t n;     /* keys of this rank's halo */
    /* One rank has all keys: without padding, for which the halo has zeros, they are seen where they lie, and if it is
     * all of them that are seen, their gradients are made where they belong. */
    int keys_at_home, gradients_at_home;
} ls_reach;

/* One call of a core: the pass as the caller sees it, and what the driver adds. */
typedef struct ls_call {
    ls_context *ctx;
    const ls_mechanism *mechanism;
    const ls_shard *queries, *keys;
    int in_place; /* masks or weights lie by the caller's rows: no zigzag placement */
    ls_pass pass;
    ls_placement placement;
    ls_ring_buffers ring;
    ls_reach reach;
    ls_requests *requests;          /* a fetch of lists: as they were in forward, kept until backward */
    struct ls_documents *documents; /* of packed sequences, see packed.h; NULL: not packed */
    int64_t *piece[LS_MAX_PHASES];  /* (P): what every rank gives to a gather */
    /* What a layer does to the queries' rows alone: forward it makes q, backward it begins with dq. The driver has it
     * done while something crosses, if it can; NULL: nothing. */
    void (*meanwhile)(void *of);
    void *meanwhile_of;
} ls_call;

/* Takes the memory of a call; the same order every time, so a saved arena can be replayed. Sets pass.backward's. */
void ls_run_plan(ls_call *call, ls_arena *saved, ls_arena *work);
/* Collective. */
ls_status ls_run_forward(ls_call *call);
ls_status ls_run_backward(ls_call *call);

/* The kernel of a phase, if it has one, on the device of the pass. */
ls_status ls_run_kernel(const ls_mechanism *m, ls_pass *p, const ls_phase *phases, int i, int backward);
/* The mechanism's own memory on that device. */
void ls_plan_mechanism(const ls_mechanism *m, ls_pass *p, ls_arena *saved, ls_arena *work);

/* Copies a block with zeros at padded rows to contiguous memory, (B,H,n,d). */
void ls_clean_block(ls_context *ctx, ls_view from, int64_t B, int64_t H, int64_t n, int64_t d, const uint8_t *pad,
                    ls_real *to);
/* Zeros in all of a view (B,H,n,d). */
void ls_clear_view(ls_context *ctx, ls_view v, int64_t B, int64_t H, int64_t n, int64_t d);
/* Zeros at the padded rows of the halo. */
void ls_clean_halo(ls_context *ctx, const ls_pass *p, const ls_phase *phase);

#endif
