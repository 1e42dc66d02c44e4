// Memory of the host: how much there is, and pieces that go back to the system when they are released.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moecalc/version.h"

namespace moecalc {

/// Memory that this process could still get, in bytes: what the system calls available, within the limits of
/// its control groups. 0 where the system does not say.
int64_t available_memory();

/// What this process may add to what it holds, in bytes, where others do the same: the share of its threads
/// in a quarter of what is available.
int64_t quarter_of_available_memory();

/// Zeros, aligned for every instruction set. Released, large pieces are the system's again: the heap would
/// keep them.
class MOECALC_API Pages {
 public:
  Pages() = default;
  /// Throws OutOfMemoryError.
  explicit Pages(size_t n_byte);
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  char* data() const { return data_; }
  size_t size() const { return size_; }
  /// Gives the memory of a large piece back, but keeps its addresses taken. The content is lost.
  void discard();

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace moecalc
