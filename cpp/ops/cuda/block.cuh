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

#include "host_device.h"

namespace moecalc::cuda {

/// Bytes of `n` values in shared memory, as the blocks below place them.
template <class T>
MOECALC_BOTH constexpr int64_t shared_size(int64_t n) {
  return (n * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
}

#if defined(__CUDACC__)

template <class T, int N>
struct Registers {
  T values[N];
  __device__ __forceinline__ T* operator[](int) { return values; }
};

class DeviceBlock {
 public:
  __device__ __forceinline__ explicit DeviceBlock(char* memory) : memory_(memory) {}
  __device__ __forceinline__ int64_t index() const { return blockIdx.x; }
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  template <class T>
  __device__ __forceinline__ T* shared(int64_t n) {
    T* place = reinterpret_cast<T*>(memory_);
    memory_ += shared_size<T>(n);
    return place;
  }
  template <class T, int N>
  __device__ __forceinline__ Registers<T, N> registers() {
    return {};
  }

 private:
  char* memory_;
};

#else

template <class T, int N>
struct Registers {
  std::vector<T> values;
  T* operator[](int thread) { return values.data() + static_cast<size_t>(thread) * N; }
};

class HostBlock {
 public:
  /// `reversed`: runs the threads of a phase from the last to the first. Nothing may depend on that.
  HostBlock(int64_t index, int threads, char* memory, int64_t bytes, bool reversed)
      : index_(index), threads_(threads), memory_(memory), end_(memory + bytes), reversed_(reversed) {}
  int64_t index() const { return index_; }
  template <class F>
  void each(const F& f) {
    for (int x = 0; x < threads_; ++x) f(reversed_ ? threads_ - 1 - x : x);
  }
  void sync() {}
  template <class T>
  T* shared(int64_t n) {
    T* place = reinterpret_cast<T*>(memory_);
    memory_ += shared_size<T>(n);
    if (memory_ > end_) throw std::logic_error("a kernel uses more shared memory than it asks for");
    return place;
  }
  template <class T, int N>
  Registers<T, N> registers() {
    return {std::vector<T>(static_cast<size_t>(threads_) * N)};
  }

 private:
  int64_t index_;
  int threads_;
  char *memory_, *end_;
  bool reversed_;
};

#endif

}  // namespace moecalc::cuda
