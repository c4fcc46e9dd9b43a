/* Landmarks begin as means over segments of a sequence: m runs of neighbouring positions, as even as possible. Of n
 * positions, g = floor(n / m), the first (g + 1) m - n segments have g tokens, the rest g + 1. Positions are global, so
 * a rank adds what it owns, and the sums are then summed over ranks. */
#ifndef LS_SEGMENTS_H
#define LS_SEGMENTS_H

#include "mechanism.h"

typedef struct ls_segments {
    int64_t length, count; /* positions, segments; length >= count */
} ls_segments;

/* Where segment c begins, also for c = count. */
LS_BOTH_SIDES int64_t ls_segment_start(ls_segments s, int64_t c)
{
    const int64_t g = s.length / s.count, few = (g + 1) * s.count - s.length;
    return c * g + ls_max(0, c - few);
}
LS_BOTH_SIDES int64_t ls_segment_tokens(ls_segments s, int64_t c)
{
    return ls_segment_start(s, c + 1) - ls_segment_start(s, c);
}
/* The segment of a position. */
LS_BOTH_SIDES int64_t ls_segment_of(ls_segments s, int64_t position)
{
    const int64_t g = s.length / s.count, few = (g + 1) * s.count - s.length;
    return position < few * g ? position / g : few + (position - few * g) / (g + 1);
}

/* Rows of a tensor with their positions: n rows of each (b,h), the first at global position lo. */
typedef struct ls_segmented {
    ls_segments segments;
    ls_view x;
    int64_t B, H, n, d, lo;
    const uint8_t *pad; /* (B,n), or NULL: padded rows count as zeros, and have no gradient */
} ls_segmented;

/* ls_mechanism.counts_padding of who has segments: they are of all positions. */
static inline int ls_segments_count_padding(const ls_attention_options *o)
{
    (void)o;
    return 1;
}

/* Rows of segment c that are here. */
LS_BOTH_SIDES ls_span ls_segment_rows(const ls_segmented *s, int64_t c)
{
    const int64_t from = ls_max(ls_segment_start(s->segments, c), s->lo);
    const int64_t to = ls_min(ls_segment_start(s->segments, c + 1), s->lo + s->n);
    const ls_span span = {from - s->lo, from, ls_max(0, to - from)};
    return span;
}

/* This rank's queries (which = 0), keys (1) or values (2), or their gradients, as `count` segments of the sequence. */
ls_segmented ls_segmented_rows(const ls_pass *p, int64_t count, int which, int gradients);

/* sums[(b H + h) stride + c d ..] = Σ rows of segment c that are here. `row` is room for H d doubles. */
void ls_segment_sums(const ls_segmented *s, double *row, ls_real *sums, int64_t stride);
/* The adjoint: every row of x, a gradient, += that of its segment's sum. */
void ls_segment_spread(const ls_segmented *s, const ls_real *dsums, int64_t stride);

#endif
