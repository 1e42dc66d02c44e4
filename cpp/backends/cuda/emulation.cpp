// The kernels of the GPU on the host, one block at a time: their index logic is tested where there is no GPU.
#include "backends/cuda/emulation.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/cuda/device_model.h"
#include "backends/cuda/number_formats.h"

namespace moecalc::cuda {

namespace {

/// What nobody writes is not a number.
constexpr int kPoison = 0xff;

class HostSource final : public MemorySource {
 public:
  void* allocate(size_t bytes) override { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
  void release(void* block) noexcept override { std::free(block); }
  std::string place() const override { return "cuda emulated"; }
};

/// Runs every block of a kernel in turn, on the calling thread.
class HostTarget {
 public:
  static constexpr bool survives_fork = true;
  struct Scope {
    explicit Scope(const HostTarget&) {}
  };

  explicit HostTarget(const EvaluatorOptions& options) : reversed_(options.emulation_reversed) {}
  std::string name() const { return "cuda emulated"; }
  std::string place() const { return name(); }
  int64_t shared_limit() const { return 227 << 10; }
  int64_t free_bytes() const { return std::numeric_limits<int64_t>::max() / 4; }
  /// Few: blocks of small systems then have several centres, as those of large systems on the device.
  int64_t wanted_blocks() const { return 4; }
  void synchronize() const {}
  void finish() const noexcept {}

  Memory memory(int64_t bytes) {
    Memory memory(cache_, bytes);
    if (bytes > 0) std::memset(memory.as<char>(), kPoison, static_cast<size_t>(bytes));
    return memory;
  }
  Memory pinned(int64_t bytes) { return Memory(cache_, bytes); }
  char* staging(size_t bytes) {
    staging_.resize(bytes);
    return staging_.data();
  }
  void trim() { cache_.trim(); }
  void to_device(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }
  void to_host(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }

  template <class Kernel>
  void launch(const Kernel& kernel) {
    const auto bytes = static_cast<size_t>(kernel.shared_bytes());
    shared_.resize(bytes / sizeof(Line) + 1);
    const int64_t blocks = kernel.blocks();
    for (int64_t turn = 0; turn < blocks; ++turn) {
      const int64_t index = reversed_ ? blocks - 1 - turn : turn;
      std::memset(static_cast<void*>(shared_.data()), kPoison, shared_.size() * sizeof(Line));
      HostBlock block(index, Kernel::kThreads, reinterpret_cast<char*>(shared_.data()),
                      static_cast<int64_t>(bytes), reversed_);
      kernel(block);
    }
  }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  MemoryCache cache_{std::make_unique<HostSource>(), MemoryCache::no_limit};
  std::vector<char> staging_;
  std::vector<Line> shared_;
  bool reversed_;  // order of blocks and threads
};

}  // namespace

std::unique_ptr<Backend> make_emulated_model(const BackendInputs& inputs, std::string& reason) {
  return make_in_format(inputs, reason, [&]<class Format>() -> std::unique_ptr<Backend> {
    return std::make_unique<Model<Format, HostTarget>>(inputs);
  });
}

}  // namespace moecalc::cuda
