// The race detector of the emulation: two threads that use the same memory between two barriers, or two
// blocks of one launch, where one of them writes. See races.cpp.
#pragma once

#include <cstddef>

namespace moecalc::cuda::races {

/// Memory that is watched, aligned to 256 bytes; null if there is not that much.
void* allocate(size_t bytes);
void release(void* block) noexcept;

/// Watches what a kernel does. `kernel`: for messages, a function's name with all of its types.
class Watch {
 public:
  Watch(const char* kernel, const void* shared, size_t shared_bytes);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
};

}  // namespace moecalc::cuda::races
