// The device as a target: kernels and copies on a stream of their own. For nvcc; included by kernels_*.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <string>

#include "backends/cuda/device_model.h"
#include "moecalc/error.h"

#ifndef MOECALC_CUDA_ARCHITECTURES
#define MOECALC_CUDA_ARCHITECTURES ""
#endif

namespace moecalc::cuda {

// Of one translation unit each: those of the formats share nothing but these lines.
namespace {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call reports it again
  throw Error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

/// Three blocks of the kernels that multiply fit on a multiprocessor: 168 registers per thread suffice.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kThreads == 128 ? 3 : 1)
    run_kernel(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block(memory);
  kernel(block);
}

class DeviceSource final : public MemorySource {
 public:
  explicit DeviceSource(int device) : device_(device) {}
  void* allocate(size_t bytes) override {
    void* block = nullptr;
    const cudaError_t status = cudaMalloc(&block, bytes);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      return nullptr;
    }
    check(status, "allocating memory of the device");
    return block;
  }
  void release(void* block) noexcept override { (void)cudaFree(block); }
  std::string place() const override { return "cuda:" + std::to_string(device_); }

 private:
  int device_;
};

/// Page-locked memory of the host: copies from it need not wait.
class PinnedSource final : public MemorySource {
 public:
  void* allocate(size_t bytes) override {
    void* block = nullptr;
    const cudaError_t status = cudaHostAlloc(&block, bytes, cudaHostAllocDefault);
    if (status == cudaErrorMemoryAllocation) {
      (void)cudaGetLastError();
      return nullptr;
    }
    check(status, "allocating page-locked memory");
    return block;
  }
  void release(void* block) noexcept override { (void)cudaFreeHost(block); }
  std::string place() const override { return "the host (page-locked)"; }
};

/// Whether this process uses the device already; true if that cannot be told.
inline bool is_in_use(int device) {
  using GetState = int(int device, unsigned* flags, int* active);
  static GetState* const get_state = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &function,
                                                                12000, cudaEnableDefault, &found);
    (void)cudaGetLastError();
    const bool good = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<GetState*>(function) : nullptr;
  }();
  unsigned flags = 0;
  int active = 0;
  return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
}

/// Makes a device the current one, and then the one before again, unless nothing was ever done on that:
/// choosing it would take some hundred MiB of its memory, and every rank of a node would do so on device 0.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == device) return;
    restore_ = is_in_use(before_);
    check(cudaSetDevice(device), "choosing the device");
  }
  ~DeviceGuard() {
    if (restore_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool restore_ = false;
};

class Stream {
 public:
  explicit Stream(int device) {
    const DeviceGuard guard(device);
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~Stream() { (void)cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Launches and copies that the driver starts at once (a CUDA graph).
class GraphRecording {
 public:
  GraphRecording() = default;
  ~GraphRecording() { reset(); }
  GraphRecording(const GraphRecording&) = delete;
  GraphRecording& operator=(const GraphRecording&) = delete;

  /// Takes what `work` adds to the stream. Where nothing but arguments and numbers of blocks has changed
  /// since the last time, what the driver has of it is updated, which takes less time.
  template <class Work>
  void record(cudaStream_t stream, const Work& work) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a step");
    try {
      work();
    } catch (...) {
      if (cudaStreamEndCapture(stream, &graph) == cudaSuccess) (void)cudaGraphDestroy(graph);
      (void)cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream, &graph), "recording a step");
    cudaError_t status = cudaSuccess;
    if (!is_updated(graph)) {
      reset();
      status = cudaGraphInstantiate(&executable_, graph, 0);
    }
    (void)cudaGraphDestroy(graph);
    check(status, "recording a step");
  }
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(executable_, stream), "starting a step"); }

 private:
  bool is_updated(cudaGraph_t graph) {
    if (executable_ == nullptr) return false;
    cudaGraphExecUpdateResultInfo info{};
    if (cudaGraphExecUpdate(executable_, graph, &info) == cudaSuccess) return true;
    (void)cudaGetLastError();
    return false;
  }
  void reset() {
    if (executable_ != nullptr) (void)cudaGraphExecDestroy(executable_);
    executable_ = nullptr;
  }

  cudaGraphExec_t executable_ = nullptr;
};

class CudaTarget {
 public:
  static constexpr bool survives_fork = false;
  struct Scope {
    explicit Scope(const CudaTarget& target) : guard(target.device_) {}
    DeviceGuard guard;
  };

  explicit CudaTarget(const EvaluatorOptions& options)
      : device_(options.device.index), n_sharers_(options.device_sharers) {
    const Scope scope(*this);
    check(cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
          "asking for shared memory");
    check(cudaDeviceGetAttribute(&n_multiprocessor_, cudaDevAttrMultiProcessorCount, device_),
          "asking for multiprocessors");
    check_kernels();
  }
  std::string name() const { return "cuda"; }
  std::string place() const { return "cuda:" + std::to_string(device_); }
  int64_t shared_limit() const { return shared_limit_; }
  /// Enough blocks for eight on every multiprocessor.
  int64_t wanted_blocks() const { return 8 * static_cast<int64_t>(n_multiprocessor_); }
  void synchronize() const { check(cudaStreamSynchronize(stream_), "running the kernels"); }
  /// Waits, before memory goes.
  void finish() const noexcept { (void)cudaStreamSynchronize(stream_); }

  /// What the driver has left for this process, and what is held without being used.
  int64_t free_bytes() const {
    const Scope scope(*this);
    size_t free = 0;
    size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "asking for free memory");
    return free_of_part(static_cast<int64_t>(free), static_cast<int64_t>(total), cache_.held_bytes(),
                        n_sharers_) +
           cache_.idle_bytes();
  }
  Memory memory(int64_t bytes) { return Memory(cache_, bytes); }
  Memory pinned(int64_t bytes) { return Memory(pinned_cache_, bytes); }
  char* staging(size_t bytes) {
    const auto need = static_cast<int64_t>(bytes);
    if (staging_.bytes() < need) {
      staging_.reset();
      staging_ = pinned(need + need / 8);
    }
    return staging_.as<char>();
  }
  void trim() { cache_.trim(); }

  void to_device(void* to, const void* from, size_t bytes) const {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copying to the device");
  }
  void to_host(void* to, const void* from, size_t bytes) const {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copying from the device");
  }

  template <class Kernel>
  void launch(const Kernel& kernel) {
    const int64_t blocks = kernel.blocks();
    if (blocks == 0) return;
    const auto bytes = static_cast<size_t>(kernel.shared_bytes());
    if (bytes > (48u << 10)) {
      check(cudaFuncSetAttribute(run_kernel<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)),
            "asking for shared memory");
    }
    run_kernel<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, bytes, stream_>>>(kernel);
    check(cudaGetLastError(), "launching a kernel");
  }

  using Recording = GraphRecording;
  template <class Work>
  void record(Recording& recording, const Work& work) const {
    recording.record(stream_, work);
  }
  void replay(const Recording& recording) const { recording.launch(stream_); }

 private:
  /// There must be machine code for this device.
  void check_kernels() const {
    cudaFuncAttributes attributes{};
    const cudaError_t status = cudaFuncGetAttributes(&attributes, run_kernel<ScanCentres>);
    if (status == cudaSuccess) return;
    (void)cudaGetLastError();
    int major = 0;
    int minor = 0;
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_);
    throw Error("device '" + place() + "': expected a GPU that the kernels were compiled for (" +
                MOECALC_CUDA_ARCHITECTURES + "), got one of compute capability " + std::to_string(major) +
                "." + std::to_string(minor) + " (" + cudaGetErrorString(status) +
                "): use device 'cpu', or install moecalc on this machine");
  }

  int device_;
  int64_t n_sharers_;
  Stream stream_{device_};
  MemoryCache cache_{std::make_unique<DeviceSource>(device_), MemoryCache::no_limit};
  MemoryCache pinned_cache_{std::make_unique<PinnedSource>(), 0};
  Memory staging_;
  int shared_limit_ = 0;
  int n_multiprocessor_ = 0;
};

}  // namespace
}  // namespace moecalc::cuda
