/* The generator itself, for rng.c and for CUDA kernels. See rng.h. */
#ifndef LS_RNG_INLINE_H
#define LS_RNG_INLINE_H

#include "real.h"

#include <Random123/philox.h>

LS_BOTH_SIDES void ls_random4_inline(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index, uint32_t word[4])
{
    philox4x32_ctr_t counter;
    philox4x32_key_t key;
    counter.v[0] = (uint32_t)index, counter.v[1] = (uint32_t)(index >> 32), counter.v[2] = step, counter.v[3] = stream;
    key.v[0] = (uint32_t)seed, key.v[1] = (uint32_t)(seed >> 32);
    const philox4x32_ctr_t out = philox4x32(counter, key);
    for (int i = 0; i < 4; i++) word[i] = out.v[i];
}

LS_BOTH_SIDES double ls_uniform_inline(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    ls_random4_inline(seed, stream, step, index / 4, word);
    return (double)word[index % 4] / 4294967296.0;
}

LS_BOTH_SIDES double ls_normal_inline(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    ls_random4_inline(seed, stream, step, index / 4, word);
    const unsigned pair = index / 2 % 2 ? 2 : 0;
    const double u = ((double)word[pair] + 1.0) / 4294967296.0;
    const double angle = 6.283185307179586 * (double)word[pair + 1] / 4294967296.0;
    return sqrt(-2.0 * log(u)) * (index % 2 ? sin(angle) : cos(angle));
}

#endif
