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
  /// `reversed`: runs the threads of a phase from the last to the first. Nothing may depend on that.
  HostBlock(int64_t index, int threads, char* memory, int64_t bytes, bool reversed)
      : index_(index), threads_(threads), memory_(memory), end_(memory + bytes), reversed_(reversed) {}
  int64_t index() const { return index_; }
  template <class F>
  void each(const F& f) {
    for (int thread = 0; thread < threads_; ++thread) f(reversed_ ? threads_ - 1 - thread : thread);
  }
  void sync() {}
  template <class Value>
  Value* shared(int64_t count) {
    Value* place = reinterpret_cast<Value*>(memory_);
    memory_ += shared_size<Value>(count);
    if (memory_ > end_) throw std::logic_error("a kernel uses more shared memory than it asks for");
    return place;
  }
  template <class Value, int COUNT>
  Registers<Value, COUNT> registers() {
    return {std::vector<Value>(static_cast<size_t>(threads_) * COUNT)};
  }

 private:
  int64_t index_;
  int threads_;
  char* memory_;
  char* end_;
  bool reversed_;
};

#endif

}  // namespace moecalc::cuda
