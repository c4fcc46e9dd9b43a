/* Longshort on a GPU: its memory, and which kernels are whose. */
#include "longshort_cuda.h"

extern "C" const ls_cuda_mechanism ls_longshort_cuda;

static ls_real *take_bytes(ls_arena *a, size_t bytes)
{
    return (ls_real *)ls_arena_take(a, bytes);
}

static void plan(ls_pass *p, ls_arena *saved, ls_arena *work)
{
    const int64_t B = p->B, H = p->H, T = p->T, d = p->d, E = H * d, r = vectors(p), C = columns(p);
    const int64_t n = ls_longshort_halo_rows(p), seen = ls_longshort_seen(p), D = ls_longshort_distances(p);
    const int64_t causal = p->pattern == LS_CS, noncausal = !causal, back = p->backward, step = p->step;
    int64_t first;
    const int64_t chunks = ls_longshort_chunks(p, &first), ranges = causal ? chunks : 1;
    const int64_t element = 2 + 2 * d, N = step ? 0 : seen, far = ls_max(seen, D);
    const int64_t elements = noncausal ? SUM_SLICES * B * C * element : chunks * B * C * element;
    const int64_t norm_rows = ls_max(B * ls_max(n, p->S), ranges * B * 2 * r);
    p->saved[TOP] = ls_take(saved, B * H * T);
    p->saved[INVERSE] = ls_take(saved, B * H * T);
    p->work[OWN] = ls_take(work, noncausal * 2 * B * p->S * E);
    p->work[SUMS] = ls_take(work, ls_max(elements, step * SUM_SLICES * B * H * (2 + d)));
    p->work[NEAR] = ls_take(work, 2 * B * n * E);
    p->work[RAW] = ls_take(work, ranges * B * 2 * r * E);
    p->work[ITEMS] = ls_take(work, noncausal * B * ls_longshort_item(p) + step * B * H * (E + seen));
    p->work[TABLES] = ls_take(work, causal * (far * E + (1 + back) * (N + D) * E + D * H));
    p->work[DOWN] = ls_take(work, back * noncausal * 2 * B * p->S * E);
    p->work[DRAW] = ls_take(work, back * ranges * B * 2 * r * E);
    p->work[DSUMS] = ls_take(work, back * causal * elements);
    p->work[CENTRE] = ls_take(work, back * ranges * B * (2 * E + C));
    p->work[DITEMS] = ls_take(work, back * noncausal * B * ls_longshort_item(p));
    p->work[MOMENTS] = take_bytes(work, (size_t)(back * norm_rows * 4) * sizeof(double));
    p->work[NORMS] = take_bytes(work, (size_t)(back * (4 + 2 * NORM_SLICES) * E) * sizeof(double));
    p->work[DELTA] = ls_take(work, back * B * H * T);
    p->work[SLICES] = take_bytes(work, back > 0 ? ls_longshort_cuda_slices(p) : 0);
}

static const ls_cuda_kernel kernels[] = {
    {"landmarks", ls_longshort_cuda_landmarks, ls_longshort_cuda_landmarks_backward},
    {"summaries", ls_longshort_cuda_summaries, ls_longshort_cuda_summaries_backward},
    {"far", ls_longshort_cuda_look_far, NULL},
    {"attend", ls_longshort_cuda_attend, ls_longshort_cuda_attend_backward},
    {NULL, NULL, NULL},
};

extern "C" const ls_cuda_mechanism ls_longshort_cuda = {plan, kernels, NULL, NULL};
