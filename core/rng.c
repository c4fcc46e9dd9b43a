#include "rng.h"
#include "rng_inline.h"

void ls_random4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index, uint32_t word[4])
{
    ls_random4_inline(seed, stream, step, index, word);
}

double ls_uniform(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    return ls_uniform_inline(seed, stream, step, index);
}

double ls_normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    return ls_normal_inline(seed, stream, step, index);
}
