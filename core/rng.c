#include "rng.h"

#include <Random123/philox.h>
#include <math.h>

void ls_random4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index, uint32_t word[4])
{
    const philox4x32_ctr_t counter = {{(uint32_t)index, (uint32_t)(index >> 32), step, stream}};
    const philox4x32_key_t key = {{(uint32_t)seed, (uint32_t)(seed >> 32)}};
    const philox4x32_ctr_t out = philox4x32(counter, key);
    for (int i = 0; i < 4; i++) word[i] = out.v[i];
}

double ls_uniform(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    ls_random4(seed, stream, step, index / 4, word);
    return (double)word[index % 4] * 0x1p-32;
}

double ls_normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    ls_random4(seed, stream, step, index / 4, word);
    const unsigned pair = index / 2 % 2 ? 2 : 0;
    const double u = ((double)word[pair] + 1.0) * 0x1p-32, angle = 6.283185307179586 * (double)word[pair + 1] * 0x1p-32;
    return sqrt(-2.0 * log(u)) * (index % 2 ? sin(angle) : cos(angle));
}
