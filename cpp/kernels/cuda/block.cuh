// How a kernel runs: one source, two targets.
//
// A kernel is a struct of arguments with `template <class Block> void operator()(Block& block) const`. Its
// body is a sequence of phases, block.each([&](int thread) {...}), separated by block.sync(). On the device a
// block is a block of threads and each() runs the phase once per thread; on the host one thread runs the
// phase for all threads in turn, block by block. Values that outlive a phase are in shared memory
// (block.shared) or in registers (block.registers), one set per thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/common/host_device.h"
#if !defined(__CUDACC__)
#include "kernels/cuda/races.h"
#endif

// Under AddressSanitizer arrays in shared memory lie between red zones.
#if defined(__SANITIZE_ADDRESS__) && !defined(__CUDACC__)
#include <sanitizer/asan_interface.h>
#define MOECALC_RED_ZONES 1
#else
#define MOECALC_RED_ZONES 0
#endif

namespace moecalc::cuda {

/// Bytes of `count` values in shared memory, as the blocks below place them.
template <class Value>
MOECALC_BOTH constexpr int64_t shared_size(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(Value)) + 15) / 16 * 16;
}

#if defined(__CUDACC__)

/// COUNT values of every thread.
template <class Value, int COUNT>
struct Registers {
  Value values[COUNT];
  __device__ __forceinline__ Value* operator[](int) { return values; }
};

/// A block of threads of the device.
class DeviceBlock {
 public:
  __device__ __forceinline__ explicit DeviceBlock(char* memory) : memory_(memory) {}
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  template <class Value>
  __device__ __forceinline__ Value* shared(int64_t count) {
    Value* place = reinterpret_cast<Value*>(memory_);
    memory_ += shared_size<Value>(count);
    return place;
  }
  template <class Value, int COUNT>
  __device__ __forceinline__ Registers<Value, COUNT> registers() {
    return {};
  }

 private:
  char* memory_;
};

#else

template <class Value, int COUNT>
struct Registers {
  std::vector<Value> values;
  Value* operator[](int thread) { return values.data() + static_cast<size_t>(thread) * COUNT; }
};

/// A block on the host: one thread of the CPU in the place of all.
class HostBlock {
 public:
  /// Bytes beside those that a kernel asks for, in the memory of a block.
  static constexpr int64_t kRedZones = MOECALC_RED_ZONES ? 8192 : 0;

  /// `memory`: bytes + kRedZones. `reversed`: runs the threads of a phase from the last to the first. Nothing
  /// may depend on that.
  HostBlock(int64_t index, int threads, char* memory, int64_t bytes, bool reversed)
      : index_(index),
        threads_(threads),
        memory_(memory),
        begin_(memory),
        bytes_(bytes),
        reversed_(reversed) {
    races::enter_block();
#if MOECALC_RED_ZONES
    ASAN_POISON_MEMORY_REGION(begin_, static_cast<size_t>(bytes_ + kRedZones));
#endif
  }
  ~HostBlock() {
#if MOECALC_RED_ZONES
    ASAN_UNPOISON_MEMORY_REGION(begin_, static_cast<size_t>(bytes_ + kRedZones));
#endif
  }
  HostBlock(const HostBlock&) = delete;
  HostBlock& operator=(const HostBlock&) = delete;
  int64_t index() const { return index_; }
  template <class F>
  void each(const F& f) {
    for (int turn = 0; turn < threads_; ++turn) {
      const int thread = reversed_ ? threads_ - 1 - turn : turn;
      races::run_as(thread);
      f(thread);
    }
    races::run_as(races::kAllThreads);
  }
  void sync() { races::barrier(); }
  template <class Value>
  Value* shared(int64_t count) {
    used_ += shared_size<Value>(count);
    if (used_ > bytes_) throw std::logic_error("a kernel uses more shared memory than it asks for");
#if MOECALC_RED_ZONES
    memory_ += kRedZone;
    if (memory_ + shared_size<Value>(count) > begin_ + bytes_ + kRedZones) {
      throw std::logic_error("a kernel has more arrays in shared memory than there are red zones");
    }
    ASAN_UNPOISON_MEMORY_REGION(memory_, static_cast<size_t>(count) * sizeof(Value));
#endif
    Value* place = reinterpret_cast<Value*>(memory_);
    memory_ += shared_size<Value>(count);
    return place;
  }
  template <class Value, int COUNT>
  Registers<Value, COUNT> registers() {
    return {std::vector<Value>(static_cast<size_t>(threads_) * COUNT)};
  }

 private:
  static constexpr int64_t kRedZone = 64;

  int64_t index_;
  int threads_;
  char* memory_;
  char* begin_;
  int64_t bytes_;
  int64_t used_ = 0;
  bool reversed_;
};

#endif

}  // namespace moecalc::cuda
