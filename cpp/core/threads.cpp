#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace moecalc {
namespace {

const pid_t loaded_in = getpid();

/// Where OpenMP binds threads (OMP_PROC_BIND, OMP_PLACES), it binds the caller to one place when it starts
/// its own team. Threads that we start then must not inherit this single place.
struct Places {
  cpu_set_t mask;
  bool known = false;
  Places() {
    for (const char* name : {"OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"}) {
      known = known || std::getenv(name) != nullptr;
    }
    known = known && sched_getaffinity(0, sizeof(mask), &mask) == 0;
  }
};
const Places places;

/// Processors (hardware threads) that this process may run on.
cpu_set_t usable_processors() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (places.known) return places.mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) CPU_SET(0, &mask);
  return mask;
}

int usable_cores() {
  const cpu_set_t mask = usable_processors();
  return std::max(1, CPU_COUNT(&mask));
}

/// The same, but threads of one core count once. The system says which are of one core.
int physical_cores() {
  const cpu_set_t mask = usable_processors();
  std::set<std::pair<int, int>> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0;
    int core = 0;
    if (!(std::ifstream(folder + "physical_package_id") >> package)) return usable_cores();
    if (!(std::ifstream(folder + "core_id") >> core)) return usable_cores();
    cores.emplace(package, core);
  }
  return std::max<int>(1, static_cast<int>(cores.size()));
}

/// The first number of OMP_NUM_THREADS, which may be a list; 0 where there is none.
int openmp_threads() {
  const char* text = std::getenv("OMP_NUM_THREADS");
  if (text == nullptr) return 0;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  const bool whole = end != text && (*end == '\0' || *end == ',' || *end == ' ');
  return whole && n >= 1 && n <= 4096 ? static_cast<int>(n) : 0;
}

inline void pause() {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Rounding, and what happens to denormals: results must not depend on which thread computes them.
class FloatingPoint {
 public:
  void take() {
#if defined(__SSE__)
    csr_ = _mm_getcsr() & ~status;
#else
    std::fegetenv(&environment_);
#endif
  }
  void give() const {
#if defined(__SSE__)
    if ((_mm_getcsr() & ~status) != csr_) _mm_setcsr(csr_);
#else
    std::fesetenv(&environment_);
#endif
  }

 private:
#if defined(__SSE__)
  static constexpr unsigned status = 0x3f;  // exceptions that occurred
  unsigned csr_ = 0;
#else
  std::fenv_t environment_;
#endif
};

}  // namespace

int default_threads() {
  static const int cores = physical_cores();
  const int wanted = openmp_threads();
  return wanted > 0 ? wanted : cores;
}

bool is_forked() { return getpid() != loaded_in; }

class ThreadPool::Team {
 public:
  explicit Team(int n_threads) : spins_(n_threads <= usable_cores() ? 2000 : 0) {
    // Signals are for the program's own threads. Faults of our own code must not be blocked.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int k = 1; k < n_threads; ++k) workers_.emplace_back([this, k] { work(k); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      stop();
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (!places.known) return;
    for (std::thread& worker : workers_) {
      pthread_setaffinity_np(worker.native_handle(), sizeof(places.mask), &places.mask);
    }
  }
  ~Team() { stop(); }

  pid_t process() const { return process_; }

  void run(int n_thread, const std::function<void(int)>& task) {
    task_ = &task;
    floating_point_.take();
    running_.store(n_thread - 1, std::memory_order_relaxed);
    announce(n_thread);
    attempt(0, task);
    wait([this] { return running_.load() == 0; }, caller_sleeps_, done_);
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int kBits = 16;  // of the number of threads in the word below

  /// A new region of `n_thread` threads; 0: all shall end. Number of the region and threads are one word, so
  /// that a thread which comes late, because it has no part in it, reads both of the same region.
  void announce(int n_thread) {
    region_.store((((region_.load(std::memory_order_relaxed) >> kBits) + 1) << kBits) |
                  static_cast<uint64_t>(n_thread));
    // sequentially consistent: either the sleeper sees the new region, or we see that it sleeps
    if (sleepers_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }

  template <class Condition>
  void wait(const Condition& over, std::atomic<int>& sleepers, std::condition_variable& signal) {
    for (int k = 0; k < spins_; ++k) {
      if (over()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers;
    signal.wait(lock, over);
    --sleepers;
  }

  void attempt(int thread, const std::function<void(int)>& task) {
    try {
      task(thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (failure_ == nullptr) failure_ = std::current_exception();
    }
  }

  void work(int thread) {
    uint64_t seen = 0;
    while (true) {
      wait([this, seen] { return region_.load() != seen; }, sleepers_, wake_);
      seen = region_.load();
      const int n_thread = static_cast<int>(seen & ((1 << kBits) - 1));
      if (n_thread == 0) return;
      if (thread >= n_thread) continue;
      floating_point_.give();
      attempt(thread, *task_);
      if (--running_ == 0 && caller_sleeps_.load() != 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_all();
      }
    }
  }

  void stop() {
    announce(0);
    for (std::thread& worker : workers_) worker.join();
  }

  const pid_t process_ = getpid();
  const int spins_;
  alignas(64) std::atomic<uint64_t> region_{0};
  alignas(64) std::atomic<int> running_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> caller_sleeps_{0};
  const std::function<void(int)>* task_ = nullptr;
  FloatingPoint floating_point_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::exception_ptr failure_;
  std::vector<std::thread> workers_;  // last: they use the others
};

ThreadPool::ThreadPool() = default;

ThreadPool::~ThreadPool() { leave(); }

/// Ends the team. In a forked child its threads do not exist and its locks are in an unknown state: it is
/// left alone.
void ThreadPool::leave() {
  if (team_ != nullptr && team_->process() != getpid()) (void)team_.release();
  team_.reset();
}

void ThreadPool::resize(int n_threads) {
  n_threads = std::clamp(n_threads, 1, 1 << 12);
  if (n_threads == n_threads_) return;
  leave();
  n_threads_ = n_threads;
}

void ThreadPool::run(int n_thread, const std::function<void(int)>& work) {
  if (n_thread <= 1) {
    if (n_thread == 1) work(0);
    return;
  }
  if (team_ != nullptr && team_->process() != getpid()) leave();
  if (team_ == nullptr) team_ = std::make_unique<Team>(n_threads_);
  team_->run(n_thread, work);
}

}  // namespace moecalc
