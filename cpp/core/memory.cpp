#include "core/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <string>
#include <thread>
#include <utility>

#include "core/threads.h"
#include "moecalc/error.h"

namespace moecalc {

namespace {
constexpr size_t kAlignment = 64;
constexpr size_t kSmallest = 256 << 10;  // bytes; smaller pieces are the heap's
}  // namespace

int64_t available_memory() {
  int64_t available = 0;
  std::ifstream system("/proc/meminfo");
  for (std::string line; std::getline(system, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) available = std::strtoll(line.c_str() + 13, nullptr, 10) << 10;
  }
  // "0::/path" in version 2, "4:memory:/path" in version 1; a limit of a parent counts as well
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const bool first = line.find(":memory:/") != std::string::npos;
    if (!first && line.rfind("0::/", 0) != 0) continue;
    const std::string root = first ? "/sys/fs/cgroup/memory" : "/sys/fs/cgroup";
    for (std::string group = line.substr(line.find('/'));; group.resize(group.rfind('/'))) {
      std::ifstream limits(root + group + (first ? "/memory.limit_in_bytes" : "/memory.max"));
      std::ifstream use(root + group + (first ? "/memory.usage_in_bytes" : "/memory.current"));
      int64_t limit = 0;
      int64_t used = 0;
      if (limits >> limit && use >> used) {  // no number where there is no limit
        available = std::min(available, std::max<int64_t>(0, limit - used));
      }
      if (group.empty()) break;
    }
  }
  return available;
}

int64_t quarter_of_available_memory() {
  const int64_t threads = default_threads();
  const int64_t cores = std::max<int64_t>(threads, std::thread::hardware_concurrency());
  return available_memory() / 4 * threads / cores;
}

Pages::Pages(size_t n_byte) : size_(n_byte) {
  if (n_byte == 0) return;
  if (n_byte < kSmallest) {
    size_ = (n_byte + kAlignment - 1) / kAlignment * kAlignment;
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, size_));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, size_);
    return;
  }
  void* memory = ::mmap(nullptr, n_byte, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw OutOfMemoryError("out of memory for " + std::to_string(n_byte >> 20) +
                           " MiB of weights: use fewer processes, dtype float32 or more memory");
  }
  data_ = static_cast<char*>(memory);
  // Filled at once, and 2 MiB at a time is faster; only whole ones inside, so no memory is lost. A hint.
  (void)::madvise(memory, n_byte, MADV_HUGEPAGE);
}

Pages::~Pages() {
  if (size_ < kSmallest) {
    std::free(data_);
  } else {
    ::munmap(data_, size_);
  }
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void Pages::discard() {
  if (size_ >= kSmallest) ::madvise(data_, size_, MADV_DONTNEED);
}

}  // namespace moecalc
