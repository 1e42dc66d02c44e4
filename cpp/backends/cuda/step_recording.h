// A step whose launches are given to the target all at once, because nothing but positions has changed.
#pragma once

#include <cstdint>
#include <optional>

#include "backends/cuda/buffers.h"
#include "moecalc/evaluator.h"

namespace moecalc::cuda {

/// All that the launches of a step depend on, besides what lies in the memory that they read.
struct StepKey {
  int64_t list = 0;  // version of the list, of the weights, of the buffers
  int64_t weights = 0;
  int64_t buffers = 0;
  Sizes capacity;
  const void* positions = nullptr;
  const void* cells = nullptr;
  const void* results = nullptr;
  Request request;

  bool operator==(const StepKey&) const = default;
};

/// The last step that was recorded. Steps are recorded when they come a second time: a list of which there is
/// one evaluation would pay for nothing.
template <class Target>
class StepRecording {
 public:
  /// Above as many atoms the kernels take so much longer than their launches that nothing is gained.
  static constexpr int64_t kMostAtoms = 8192;

  explicit StepRecording(bool is_on) : is_on_(is_on) {}

  /// Has the target do `work()`, which adds to its stream and does not wait.
  template <class Work>
  void run(Target& target, const StepKey& key, int64_t n_atom, const Work& work) {
    const bool again = last_ == key;
    last_ = key;
    if (!is_on_ || !again || n_atom > kMostAtoms) {
      is_recorded_ = false;
      work();
      return;
    }
    if (!is_recorded_) target.record(recording_, work);
    is_recorded_ = true;
    target.replay(recording_);
  }

 private:
  bool is_on_;
  std::optional<StepKey> last_;
  bool is_recorded_ = false;
  typename Target::Recording recording_;
};

}  // namespace moecalc::cuda
