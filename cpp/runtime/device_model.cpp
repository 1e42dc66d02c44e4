// The emulation of the device model on the host, and what both targets share.
#include "device_model.h"

#include <cstdlib>

#include "device_cuda.h"

namespace moecalc {
namespace cuda {

namespace {

/// Runs every block of a kernel in turn, on the calling thread.
class HostTarget {
 public:
  struct Scope {
    explicit Scope(const HostTarget&) {}
  };
  explicit HostTarget(const DeviceOptions&)
      : reversed_(std::getenv("MOECALC_EMULATION_REVERSED") != nullptr) {}
  at::Device device() const { return {at::kCPU}; }
  at::TensorOptions options() const { return at::TensorOptions().device(at::kCPU); }
  at::TensorOptions pinned_options() const { return options(); }
  std::string name() const { return "cuda emulated"; }
  int64_t shared_limit() const { return 227 << 10; }
  int64_t free_bytes() const { return std::numeric_limits<int64_t>::max() / 4; }
  /// Few, so that blocks of small systems have several centres, as on the device those of large systems.
  int64_t wanted_blocks() const { return 4; }
  void synchronize() const {}

  template <class K>
  void launch(const K& kernel) {
    const auto bytes = static_cast<size_t>(kernel.shared_bytes());
    shared_.resize(bytes / sizeof(Line) + 1);
    const int64_t blocks = kernel.blocks();
    for (int64_t x = 0; x < blocks; ++x) {
      const int64_t index = reversed_ ? blocks - 1 - x : x;
      // what a kernel does not write is not a number
      std::memset(shared_.data(), 0xff, shared_.size() * sizeof(Line));
      HostBlock block(index, K::kThreads, reinterpret_cast<char*>(shared_.data()),
                      static_cast<int64_t>(bytes), reversed_);
      kernel(block);
    }
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> shared_;
  bool reversed_;  // order of blocks and threads
};

template <class N>
std::unique_ptr<DeviceModel> make(const Package& package, const DeviceOptions& options) {
  if (options.emulate) {
    return std::make_unique<Model<N, HostTarget>>(package.geometry, package.embedding, package.layers,
                                                  package.readout, package.rules, options, package.deferred);
  }
#if defined(MOECALC_CUDA_KERNELS)
  return make_cuda_model<N>(package, options);
#else
  throw Unsupported{"this build, which has no CUDA kernels: build with nvcc and a CUDA torch"};
#endif
}

}  // namespace
}  // namespace cuda

std::unique_ptr<DeviceModel> make_device_model(const torch::jit::Module& geometry,
                                               const torch::jit::Module& embedding,
                                               const std::vector<torch::jit::Module>& layers,
                                               const torch::jit::Module& readout, const GraphRules& rules,
                                               at::ScalarType dtype, const DeviceOptions& options,
                                               std::string& reason, const DeferredTensors* deferred) {
  const cuda::Package package{geometry, embedding, layers, readout, rules, deferred};
  DeviceOptions limited = options;
  if (const char* mebibytes = std::getenv("MOECALC_DEVICE_MEMORY"); mebibytes != nullptr) {
    limited.memory_limit = std::strtoll(mebibytes, nullptr, 10) << 20;
    if (limited.memory_limit <= 0) {
      throw Error("expected MOECALC_DEVICE_MEMORY to be a number of MiB, got '" + std::string(mebibytes) +
                  "'");
    }
  }
  try {
    if (dtype == at::kDouble) return cuda::make<cuda::Float64>(package, limited);
    switch (limited.precision) {
      case ProductPrecision::tf32:
        return cuda::make<cuda::Tf32>(package, limited);
      case ProductPrecision::bf16x3:
        return cuda::make<cuda::Bf16x3>(package, limited);
      default:
        return cuda::make<cuda::Float32>(package, limited);
    }
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

}  // namespace moecalc
