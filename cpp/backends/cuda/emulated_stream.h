// The order of a GPU's work, on the host: copies and launches wait in a queue until somebody waits for them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace moecalc::cuda {

/// What nobody wrote is not a number.
inline constexpr int kPoison = 0xff;

/// Does nothing before `synchronize()`, as a device may. A buffer of the host that is written too early then
/// reaches the target with the later values, and one that is read too early holds no numbers.
class EmulatedStream {
 public:
  /// Work that can be added again and again.
  struct Recording {
    std::vector<std::function<void()>> work;
    std::vector<std::pair<void*, size_t>> to_host;  // what its copies write on the host
  };

  /// Runs after everything that was added before. `work` owns its arguments, as a launched kernel does.
  template <class Work>
  void add(Work work) {
    (recording_ == nullptr ? queue_ : recording_->work).emplace_back(std::move(work));
  }
  /// What is added until `stop_recording()` goes there, and is not done.
  void start_recording(Recording& recording) {
    recording = {};
    recording_ = &recording;
  }
  void stop_recording() { recording_ = nullptr; }
  void replay(const Recording& recording) {
    for (const auto& [to, bytes] : recording.to_host) poison_host(to, bytes);
    queue_.insert(queue_.end(), recording.work.begin(), recording.work.end());
  }
  void copy_to_device(void* to, const void* from, size_t bytes) {
    const auto* begin = static_cast<const char*>(from);
    host_reads_.push_back({begin, begin + bytes});
    add([=] { std::memcpy(to, from, bytes); });
  }
  /// `to` is no number until the copy is done, unless a copy to the device that waits is yet to read it.
  void copy_to_host(void* to, const void* from, size_t bytes) {
    if (recording_ == nullptr) {
      poison_host(to, bytes);
    } else {
      recording_->to_host.emplace_back(to, bytes);
    }
    add([=] { std::memcpy(to, from, bytes); });
  }
  void poison(void* to, size_t bytes) {
    add([=] { std::memset(to, kPoison, bytes); });
  }
  void synchronize() {
    for (const auto& work : queue_) work();
    queue_.clear();
    host_reads_.clear();
  }
  size_t n_waiting() const { return queue_.size(); }

 private:
  struct Range {
    const char* begin;
    const char* end;
  };

  void poison_host(void* to, size_t bytes) const {
    if (!is_to_be_read(static_cast<const char*>(to), bytes)) std::memset(to, kPoison, bytes);
  }
  bool is_to_be_read(const char* begin, size_t bytes) const {
    return std::any_of(host_reads_.begin(), host_reads_.end(),
                       [=](const Range& range) { return range.begin < begin + bytes && begin < range.end; });
  }

  std::vector<Range> host_reads_;  // of the host's memory, by copies in the queue
  std::vector<std::function<void()>> queue_;
  Recording* recording_ = nullptr;
};

}  // namespace moecalc::cuda
