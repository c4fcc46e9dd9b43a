/* Asynchronous copies under the emulator: see core/cuda_copy.h, which this header stands before. A copy is made when
 * its thread waits for it, so that who does not wait is seen; with LONGSPAN_EMULATOR_ORDER some are made at once, so
 * that who still reads what they overwrite is. */
#ifndef LS_CUDA_COPY_H
#define LS_CUDA_COPY_H

#include <cuda_runtime.h>

#include <deque>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

namespace emulator
{
struct late_copy {
    void *to;
    const void *from;
    size_t bytes;
    bool exists;
};
/* Of one thread of the block that runs; none may be left when it ends, since the next block begins with them. */
struct late_copies {
    unsigned block;
    std::vector<late_copy> open;
    std::deque<std::vector<late_copy>> groups;
};
static inline late_copies &copies_of_thread()
{
    static late_copies all[1024];
    late_copies &mine = all[threadIdx.x];
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    if (mine.block != block) {
        for (const auto &group : mine.groups)
            if (!group.empty()) {
                fprintf(stderr, "emulator: a block has ended with copies under way\n");
                abort();
            }
        mine.groups.clear();
        mine.block = block;
    }
    return mine;
}
static inline void make(const late_copy &copy)
{
    if (copy.exists)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
}
} // namespace emulator

template <int BYTES> static inline void ls_copy(void *to, const void *from, bool exists)
{
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async can copy");
    if ((uintptr_t)to % BYTES != 0 || (uintptr_t)from % BYTES != 0 ||
        !emulator::is_allocated(from, exists ? BYTES : 1)) {
        fprintf(stderr, "emulator: an asynchronous copy is not aligned, or not from device memory\n");
        abort();
    }
    const emulator::late_copy copy = {to, from, BYTES, exists};
    if (emulator::at_once_by_chance())
        emulator::make(copy);
    else
        emulator::copies_of_thread().open.push_back(copy);
}

static inline void ls_copy_close()
{
    emulator::late_copies &mine = emulator::copies_of_thread();
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

template <int N> static inline void ls_copy_wait()
{
    for (auto &groups = emulator::copies_of_thread().groups; groups.size() > N; groups.pop_front())
        for (const emulator::late_copy &copy : groups.front()) emulator::make(copy);
}

#endif
