/* Sizes and places of Nyström attention, for nystrom.c and nystrom.cu. */
#ifndef LS_NYSTROM_H
#define LS_NYSTROM_H

#include "slots.h"

enum { LANDMARKS, PINV_ITERS, CONV_KERNEL, INIT }; /* option[] */
enum { CONV_WEIGHT };                              /* param[], with a convolution */
/* saved[], after softmax's: the output (B,H,T,d) of a short sequence before the convolution is added. δ_i = do_i·o_i is
 * softmax's own o_i: of a sum in which the convolution is much the larger, little of it would be left. */
enum { ALONE = 1 };

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

static inline int64_t alone_reals(const ls_pass *p)
{
    return has_conv(p) ? p->B * p->H * p->T * p->d : 0;
}

/* The output of softmax in a short sequence, when it is finished. */
static inline ls_view output_alone(const ls_pass *p)
{
    const ls_view alone = {p->saved[ALONE], p->H * p->T * p->d, p->T * p->d, p->d};
    return has_conv(p) ? alone : p->out;
}

/* CC: keys alone make landmarks. */
static inline ls_landmarks landmarks_of(const ls_pass *p)
{
    const ls_landmarks l = {landmarks(p), p->pattern == LS_CC};
    return l;
}

/* Reals of a (b,h) that are summed first. */
static inline int64_t sums(const ls_pass *p)
{
    return ls_landmark_reals(p, landmarks_of(p));
}

#endif
