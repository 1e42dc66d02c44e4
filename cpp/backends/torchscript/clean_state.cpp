#include "backends/torchscript/clean_state.h"

#include <ATen/Context.h>
#include <ATen/ThreadLocalState.h>
#include <pthread.h>

#include <array>
#include <mutex>
#include <thread>

#include "core/default_arithmetic.h"

namespace moecalc {

namespace {

/// The state of a thread that nobody has touched.
const at::ThreadLocalState& untouched() {
  static const at::ThreadLocalState state = [] {
    std::unique_ptr<at::ThreadLocalState> captured;
    std::thread([&captured] { captured = std::make_unique<at::ThreadLocalState>(); }).join();
    return *captured;
  }();
  return state;
}

/// Products of float32 matrices in float32. The setting is torch's, one for the process: it is touched only
/// where the program has lowered it, and put back when the last evaluation that needs it is over.
class FullPrecision {
 public:
  FullPrecision() {
    static const int forks = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, in_child);
    (void)forks;
    const std::lock_guard<std::mutex> lock(mutex);
    ++users;
    for (size_t i = 0; i < backends.size(); ++i) {
      const auto precision = at::globalContext().float32Precision(backends[i], at::Float32Op::MATMUL);
      if (precision != at::Float32Precision::TF32 && precision != at::Float32Precision::BF16) continue;
      before[i] = precision;
      lowered[i] = true;
      set(i, at::Float32Precision::IEEE);
    }
  }

  ~FullPrecision() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--users <= 0) put_back();
  }

  FullPrecision(const FullPrecision&) = delete;
  FullPrecision& operator=(const FullPrecision&) = delete;

 private:
  /// The evaluations of other threads do not go on in a forked process.
  static void in_child() {
    users = 0;
    put_back();
    mutex.unlock();
  }

  static void put_back() {
    for (size_t i = 0; i < backends.size(); ++i) {
      if (lowered[i]) set(i, before[i]);
      lowered[i] = false;
    }
  }

  static void set(size_t i, at::Float32Precision precision) {
    at::globalContext().setFloat32Precision(backends[i], at::Float32Op::MATMUL, precision);
  }

  static constexpr std::array<at::Float32Backend, 2> backends{at::Float32Backend::CUDA,
                                                              at::Float32Backend::MKLDNN};
  static inline std::mutex mutex;
  static inline int users = 0;
  static inline std::array<at::Float32Precision, 2> before{};
  static inline std::array<bool, 2> lowered{};
};

}  // namespace

class CleanState::Impl {
 private:
  at::ThreadLocalStateGuard torch_{untouched()};
  FullPrecision precision_;
  DefaultArithmetic arithmetic_;
};

CleanState::CleanState() : impl_(std::make_unique<Impl>()) {}
CleanState::~CleanState() = default;

}  // namespace moecalc
