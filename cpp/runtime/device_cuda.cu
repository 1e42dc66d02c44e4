// The device target: the same kernels, launched on a stream of their own.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "device_cuda.h"
#include "device_model.h"

namespace moecalc::cuda {
namespace {

/// Three blocks of the kernels that multiply fit on a multiprocessor: 168 registers per thread suffice.
template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kThreads == 128 ? 3 : 1)
    run_kernel(const __grid_constant__ K kernel) {
  extern __shared__ __align__(16) char memory[];
  DeviceBlock block(memory);
  kernel(block);
}

class CudaTarget {
 public:
  /// Makes the model's device and stream the current ones.
  struct Scope {
    explicit Scope(const CudaTarget& target) : guard(target.stream_) {}
    c10::cuda::CUDAStreamGuard guard;
  };

  explicit CudaTarget(const DeviceOptions& options)
      : device_(options.device.type(), options.device.has_index() ? options.device.index() : 0),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device_.index())) {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_.index()));
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&n_multiprocessor_, cudaDevAttrMultiProcessorCount, device_.index()));
  }
  at::Device device() const { return device_; }
  at::TensorOptions options() const { return at::TensorOptions().device(device_); }
  at::TensorOptions pinned_options() const {
    return at::TensorOptions().device(at::kCPU).pinned_memory(true);
  }
  std::string name() const { return "cuda"; }
  int64_t shared_limit() const { return shared_limit_; }
  /// Enough blocks for eight on every multiprocessor.
  int64_t wanted_blocks() const { return 8 * static_cast<int64_t>(n_multiprocessor_); }
  void synchronize() const { stream_.synchronize(); }

  /// What the driver has left, and what torch's allocator holds without using it.
  int64_t free_bytes() const {
    const c10::cuda::CUDAGuard guard(device_);
    size_t free = 0, total = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device_.index());
    const auto& reserved = stats.reserved_bytes[0];
    const auto& allocated = stats.allocated_bytes[0];
    return static_cast<int64_t>(free) + reserved.current - allocated.current;
  }

  template <class K>
  void launch(const K& kernel) {
    const int64_t blocks = kernel.blocks();
    if (blocks == 0) return;
    const auto bytes = static_cast<size_t>(kernel.shared_bytes());
    if (bytes > (48u << 10)) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(run_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(bytes)));
    }
    run_kernel<K><<<static_cast<unsigned>(blocks), K::kThreads, bytes, stream_.stream()>>>(kernel);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  at::Device device_;
  c10::cuda::CUDAStream stream_;
  int shared_limit_ = 0, n_multiprocessor_ = 0;
};

}  // namespace

template <class N>
std::unique_ptr<DeviceModel> make_cuda_model(const Package& package, const DeviceOptions& options) {
  return std::make_unique<Model<N, CudaTarget>>(package.geometry, package.embedding, package.layers,
                                                package.readout, package.rules, options, package.deferred);
}

template std::unique_ptr<DeviceModel> make_cuda_model<Float64>(const Package&, const DeviceOptions&);
template std::unique_ptr<DeviceModel> make_cuda_model<Float32>(const Package&, const DeviceOptions&);
template std::unique_ptr<DeviceModel> make_cuda_model<Tf32>(const Package&, const DeviceOptions&);
template std::unique_ptr<DeviceModel> make_cuda_model<Bf16x3>(const Package&, const DeviceOptions&);

}  // namespace moecalc::cuda
