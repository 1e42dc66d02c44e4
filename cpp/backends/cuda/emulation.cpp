// The kernels of the GPU on the host, one block at a time: their index logic is tested where there is no GPU.
#include "backends/cuda/emulation.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/cuda/device_model.h"
#include "backends/cuda/emulated_stream.h"
#include "backends/cuda/number_formats.h"
#if defined(MOECALC_FIND_RACES)
#include "backends/cuda/races.h"
#endif

namespace moecalc::cuda {

namespace {

class HostSource final : public MemorySource {
 public:
#if defined(MOECALC_FIND_RACES)
  void* allocate(size_t bytes) override { return races::allocate(bytes); }
  void release(void* block) noexcept override { races::release(block); }
#else
  void* allocate(size_t bytes) override { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
  void release(void* block) noexcept override { std::free(block); }
#endif
  std::string place() const override { return "cuda emulated"; }
};

/// Runs every block of a kernel in turn, on the calling thread, when somebody waits for it.
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
  void synchronize() { stream_.synchronize(); }
  void finish() noexcept { stream_.synchronize(); }

  Memory memory(int64_t bytes) {
    Memory memory(cache_, bytes);
    // in the order of the stream: what had the block before may still be in the queue
    if (bytes > 0) stream_.poison(memory.as<char>(), static_cast<size_t>(bytes));
    return memory;
  }
  /// From a cache of its own: work in the queue still poisons blocks of the target.
  Memory pinned(int64_t bytes) { return Memory(pinned_cache_, bytes); }
  char* staging(size_t bytes) {
    const auto need = static_cast<int64_t>(bytes);
    if (staging_.bytes() < need) staging_ = pinned(need + need / 8);
    return staging_.as<char>();
  }
  void trim() {
    stream_.synchronize();  // as the driver does before memory goes
    cache_.trim();
  }
  void to_device(void* to, const void* from, size_t bytes) { stream_.copy_to_device(to, from, bytes); }
  void to_host(void* to, const void* from, size_t bytes) { stream_.copy_to_host(to, from, bytes); }

  template <class Kernel>
  void launch(const Kernel& kernel) {
    stream_.add([this, kernel] { run(kernel); });
  }

  using Recording = EmulatedStream::Recording;
  template <class Work>
  void record(Recording& recording, const Work& work) {
    stream_.start_recording(recording);
    try {
      work();
    } catch (...) {
      stream_.stop_recording();
      throw;
    }
    stream_.stop_recording();
  }
  void replay(const Recording& recording) { stream_.replay(recording); }

 private:
  template <class Kernel>
  void run(const Kernel& kernel) {
    const int64_t bytes = kernel.shared_bytes();
    const int64_t all_bytes = bytes + HostBlock::kRedZones;
    if (shared_.bytes() < all_bytes) shared_ = pinned(all_bytes);
    char* shared = shared_.as<char>();
#if defined(MOECALC_FIND_RACES)
    const races::Watch watch(__PRETTY_FUNCTION__, shared, static_cast<size_t>(all_bytes));
#endif
    const int64_t blocks = kernel.blocks();
    for (int64_t turn = 0; turn < blocks; ++turn) {
      const int64_t index = reversed_ ? blocks - 1 - turn : turn;
      if (all_bytes > 0) std::memset(shared, kPoison, static_cast<size_t>(all_bytes));
      HostBlock block(index, Kernel::kThreads, shared, bytes, reversed_);
      kernel(block);
    }
  }

  MemoryCache cache_{std::make_unique<HostSource>(), MemoryCache::no_limit};
  MemoryCache pinned_cache_{std::make_unique<HostSource>(), MemoryCache::no_limit};
  Memory staging_;
  EmulatedStream stream_;
  Memory shared_;  // of the block that runs
  bool reversed_;  // order of blocks and threads
};

}  // namespace

std::unique_ptr<Backend> make_emulated_model(const BackendInputs& inputs, std::string& reason) {
  return make_in_format(inputs, reason, [&]<class Format>() -> std::unique_ptr<Backend> {
    return std::make_unique<Model<Format, HostTarget>>(inputs);
  });
}

}  // namespace moecalc::cuda
