// Threads of one evaluator. They belong to it alone: no setting of the process (OpenMP's, MKL's or torch's
// number of threads) is changed, because the program around us has threads and settings of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "moecalc/version.h"

namespace moecalc {

/// Number of threads where nobody says one: OMP_NUM_THREADS, or the cores that this process may run on
/// (threads of one core count once). At least 1.
MOECALC_API int default_threads();

/// Whether this process was forked from one that had loaded the library. Threads do not survive a fork: those
/// of a ThreadPool are started anew, those of others (torch) are gone for good, and waiting for them would
/// never end.
MOECALC_API bool is_forked();

/// A fixed team of threads that run one region after the other. They start with the first region that needs
/// them, spin for some microseconds after each, then sleep, and end with the pool. One caller at a time.
///
/// They take over the floating-point environment (rounding, flush to zero) of the caller, and no signals. In
/// a forked child they are started anew.
class MOECALC_API ThreadPool {
 public:
  ThreadPool();
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Threads of the regions to come, at least 1, the caller's included.
  void resize(int n_threads);
  int size() const { return n_threads_; }

  /// work(0), ..., work(n_thread - 1), n_thread <= size(), each on a thread of its own, work(0) on the
  /// caller's. Rethrows what one of them throws, after all have ended.
  void run(int n_thread, const std::function<void(int)>& work);

 private:
  class Team;
  void leave();

  int n_threads_ = 1;
  std::unique_ptr<Team> team_;
};

}  // namespace moecalc
