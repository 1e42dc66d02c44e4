// What the emulation tells the race detector (backends/cuda/races.cpp). In other builds: nothing.
#pragma once

#include <cstdint>

namespace moecalc::cuda::races {

/// Code outside of phases, which every thread of a block runs.
inline constexpr int kAllThreads = -1;

#if defined(MOECALC_FIND_RACES)
/// The block that runs from now on.
void enter_block();
/// The thread that runs from now on.
void run_as(int thread);
/// All threads of the block wait for each other.
void barrier();
#else
inline void enter_block() {}
inline void run_as(int) {}
inline void barrier() {}
#endif

}  // namespace moecalc::cuda::races
