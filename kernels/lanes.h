/* Small matrices whose entries are vectors: the same product for LS_LANES neighbouring features at once.
 *
 * A mechanism that treats every feature alone has no large product to give to BLAS; but features lie next to each other
 * in memory, so one vector register holds the same entry of as many products as it has lanes. The vector type is the
 * compiler's (GCC and clang); arithmetic on it is written as on numbers. */
#ifndef LS_LANES_H
#define LS_LANES_H

#include "real.h"

#ifdef __AVX512F__
#define LS_LANE_BYTES 64
#elif defined __AVX__
#define LS_LANE_BYTES 32
#else
#define LS_LANE_BYTES 16
#endif
enum { LS_LANES = LS_LANE_BYTES / sizeof(ls_real) };

typedef ls_real ls_lanes __attribute__((vector_size(LS_LANE_BYTES), may_alias));

/* Entry (i,j) of a matrix is p[i*row + j*col]. */
typedef struct ls_entries {
    ls_lanes *p;
    int64_t row, col;
} ls_entries;
static inline ls_entries ls_transposed(ls_entries x)
{
    return (ls_entries){x.p, x.col, x.row};
}

/* C (m,n) = A (m,k) B (k,n), or C += with `add`. C overlaps neither A nor B. */
void ls_lanes_product(int64_t m, int64_t n, int64_t k, ls_entries a, ls_entries b, int add, ls_entries c);

#endif
