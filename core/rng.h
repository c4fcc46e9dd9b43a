/* Random numbers as a pure function of (seed, stream, step, global position): Philox4x32-10 (Salmon et al., 2011).
 * So they do not depend on ranks, on order, or on what was drawn before. */
#ifndef LS_RNG_H
#define LS_RNG_H

#include <stdint.h>

/* Four 32-bit words for counter (index, step, stream) under key seed. */
void ls_random4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index, uint32_t word[4]);

/* Uniform in [0, 1): word `index % 4` of counter index / 4. */
double ls_uniform(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index);

/* Standard normal (Box-Muller on the two words of pair index / 2). */
double ls_normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index);

#endif
