/* Sizes and places of Nyström attention, for nystrom.c and nystrom.cu. */
#ifndef LS_NYSTROM_H
#define LS_NYSTROM_H

#include "segments.h"

enum { LANDMARKS, PINV_ITERS, CONV_KERNEL, INIT }; /* option[] */
enum { CONV_WEIGHT };                              /* param[], with a convolution */

static inline int64_t landmarks(const ls_pass *p)
{
    return (int64_t)p->option[LANDMARKS];
}

static inline int64_t kernel(const ls_pass *p)
{
    return (int64_t)p->option[CONV_KERNEL];
}

static inline int is_short(const ls_pass *p)
{
    return p->all_keys <= landmarks(p) || (p->pattern != LS_CC && p->all_queries <= landmarks(p));
}

static inline int is_long(const ls_pass *p)
{
    return !is_short(p);
}

static inline int has_conv(const ls_pass *p)
{
    return kernel(p) > 0;
}

/* Sequences that make landmarks: queries and keys, or keys alone. */
static inline int sequences(const ls_pass *p)
{
    return p->pattern == LS_CC ? 1 : 2;
}

/* Reals of a (b,h) that are summed first: segments of each sequence, then the values' reference. */
static inline int64_t sums(const ls_pass *p)
{
    return (sequences(p) * landmarks(p) + 1) * p->d + 1;
}

/* Where the sums of a sequence stand in those of a (b,h): queries, if any, then keys; 2: the values' reference. */
static inline int64_t place(const ls_pass *p, int which)
{
    return (which + sequences(p) - 2) * landmarks(p) * p->d;
}

/* The segments of the queries (which = 0) or of the keys. */
static inline ls_segments segments_of(const ls_pass *p, int which)
{
    const ls_segments s = {which ? p->all_keys : p->all_queries, landmarks(p)};
    return s;
}

#endif
