/* What a library that gives work to streams sees of the emulator's. */
#ifndef EMULATOR_STREAMS_H
#define EMULATOR_STREAMS_H

#include "cuda_runtime.h"

#include <functional>

namespace emulator
{
/* `may`: whether act would wait for no other process. */
void give_work(cudaStream_t stream, std::function<void()> act, std::function<bool()> may);
/* All that was given to the stream until now is done. */
void run_given(cudaStream_t stream);
/* One step of the stream, or of what it waits for. False: there is none, or it would wait for another process. */
bool step(cudaStream_t stream);

} // namespace emulator

#endif
