/* Sizes of LARA, for lara.c and lara.cu. */
#ifndef LS_LARA_H
#define LS_LARA_H

#include "slots.h"

enum { LANDMARKS, ANTITHETIC, ADAPTIVE };    /* option[] */
enum { Q_WEIGHT, Q_BIAS, K_WEIGHT, K_BIAS }; /* param[], if adaptive */

static inline int is_noisy(const ls_pass *p)
{
    return p->training || p->given_noise != NULL;
}

static inline int64_t landmarks(const ls_pass *p)
{
    return ls_min((int64_t)p->option[LANDMARKS], ls_min(p->all_queries, p->all_keys));
}

static inline int64_t count(const ls_pass *p)
{
    return landmarks(p) * (is_noisy(p) && p->option[ANTITHETIC] != 0 ? 2 : 1);
}

static inline ls_landmarks landmarks_of(const ls_pass *p)
{
    const ls_landmarks l = {landmarks(p), 0};
    return l;
}

/* Reals of a (b,h) that are summed first. */
static inline int64_t sums(const ls_pass *p)
{
    return ls_landmark_reals(p, landmarks_of(p));
}

#endif
