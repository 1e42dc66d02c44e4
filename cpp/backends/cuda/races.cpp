// The compiler calls __tsan_read4 and the like at every access to memory (-fsanitize=thread, of the emulation
// alone); these are ours, not those of ThreadSanitizer, for which the emulation has one thread. Of every four
// bytes that kernels share they keep who wrote and who read last, and in which interval between barriers.
#include "backends/cuda/races.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>

#include "kernels/cuda/races.h"

namespace moecalc::cuda::races {

namespace {

constexpr size_t kRegion = size_t{1} << 30;  // of addresses; pages that nobody touches take no memory
constexpr size_t kWord = 4;
constexpr int kSeveral = -2;
constexpr size_t kMostFindings = 50;

/// Who used a word last. Intervals between barriers are numbered through all blocks and launches.
struct Use {
  uint32_t interval = 0;
  int thread = 0;
  const void* code = nullptr;
};
struct Word {
  Use write;
  Use read;
  uint32_t earlier_read = 0;  // last interval of a block before the one that read last
};

char* reserve(size_t bytes) {
  void* place =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return place == MAP_FAILED ? nullptr : static_cast<char*>(place);
}

struct Detector {
  char* region = reserve(kRegion);
  Word* words = reinterpret_cast<Word*>(reserve(kRegion / kWord * sizeof(Word)));
  size_t used = 0;
  int64_t n_held = 0;
  bool watching = false;
  const char* kernel = "";
  const char* shared_begin = nullptr;
  const char* shared_end = nullptr;
  int thread = kAllThreads;
  uint32_t interval = 1;
  uint32_t first_of_block = 1;
  uint32_t first_of_launch = 1;
  int64_t n_barrier = 0;  // of this block
  int64_t left_out = -1;  // barrier that is left out of every block
  std::set<std::string> found;
  std::string report;
};

// Never destroyed: code that is watched may run at the end of the process.
Detector& detector() {
  static Detector* const one = new Detector;
  return *one;
}
Detector* const the = &detector();

/// For addr2line -Cife libmoecalc.so.
std::string place_of(const void* code) {
  Dl_info info{};
  const bool known = dladdr(code, &info) != 0;
  char text[32];
  std::snprintf(text, sizeof text, "%#zx",
                static_cast<size_t>(static_cast<const char*>(code) -
                                    (known ? static_cast<const char*>(info.dli_fbase) : nullptr)));
  return text;
}

void report(const char* what, const char* word, const Use& before, const void* code) {
  if (the->found.size() >= kMostFindings) return;
  const bool shared = word >= the->shared_begin && word < the->shared_end;
  the->found.insert(std::string(the->kernel) + ": " + what + " in " + (shared ? "shared" : "global") +
                    " memory, at " + place_of(before.code) + " and " + place_of(code));
}

void read(const char* address, Word& word, bool global, const void* code) {
  const Use& write = word.write;
  if (write.interval == the->interval && write.thread != the->thread) {
    report("a thread reads what another writes without a barrier between", address, write, code);
  }
  if (global && write.interval >= the->first_of_launch && write.interval < the->first_of_block) {
    report("a block reads what another writes in the same launch", address, write, code);
  }
  if (word.read.interval < the->first_of_block) word.earlier_read = word.read.interval;
  const bool again = word.read.interval == the->interval && word.read.thread != the->thread;
  word.read = {the->interval, again ? kSeveral : the->thread, code};
}

void write(const char* address, Word& word, bool global, const void* code) {
  const Use now = {the->interval, the->thread, code};
  if (the->thread == kAllThreads) report("all threads write the same word", address, now, code);
  if (word.write.interval == the->interval && word.write.thread != the->thread) {
    report("two threads write without a barrier between", address, word.write, code);
  }
  if (word.read.interval == the->interval && word.read.thread != the->thread) {
    report("a thread writes what another reads without a barrier between", address, word.read, code);
  }
  const auto of_other_block = [](uint32_t interval) {
    return interval >= the->first_of_launch && interval < the->first_of_block;
  };
  if (global && of_other_block(word.write.interval)) {
    report("two blocks write in the same launch", address, word.write, code);
  }
  if (global && (of_other_block(word.read.interval) || of_other_block(word.earlier_read))) {
    report("a block writes what another reads in the same launch", address, word.read, code);
  }
  word.write = now;
}

void access(const void* from, size_t bytes, bool writes, const void* code) {
  if (!the->watching) return;
  const auto* begin = static_cast<const char*>(from);
  if (begin < the->region || begin >= the->region + kRegion) return;  // of one thread alone
  const bool global = begin < the->shared_begin || begin >= the->shared_end;
  const auto first = static_cast<size_t>(begin - the->region) / kWord;
  const auto last = (static_cast<size_t>(begin - the->region) + bytes - 1) / kWord;
  for (size_t index = first; index <= last; ++index) {
    const char* address = the->region + index * kWord;
    if (writes) {
      write(address, the->words[index], global, code);
    } else {
      read(address, the->words[index], global, code);
    }
  }
}

}  // namespace

void* allocate(size_t bytes) {
  if (the->region == nullptr || the->words == nullptr) return nullptr;
  const size_t first = (the->used + 255) / 256 * 256;
  if (bytes > kRegion || first > kRegion - bytes) return nullptr;
  the->used = first + bytes;
  ++the->n_held;
  return the->region + first;
}
void release(void* block) noexcept {
  if (block != nullptr && --the->n_held == 0) the->used = 0;
}

void enter_block() {
  the->first_of_block = ++the->interval;
  the->n_barrier = 0;
}
void run_as(int thread) { the->thread = thread; }
void barrier() {
  if (the->n_barrier++ != the->left_out) ++the->interval;
}

Watch::Watch(const char* kernel, const void* shared, size_t shared_bytes) {
  the->kernel = kernel;
  the->shared_begin = static_cast<const char*>(shared);
  the->shared_end = the->shared_begin + shared_bytes;
  the->first_of_launch = ++the->interval;
  the->thread = kAllThreads;
  the->watching = true;
}
Watch::~Watch() { the->watching = false; }

}  // namespace moecalc::cuda::races

#define MOECALC_EXPORT extern "C" __attribute__((visibility("default")))
using moecalc::cuda::races::access;
using moecalc::cuda::races::the;

/// What was found since the last call, a line each; valid until the next call.
MOECALC_EXPORT const char* moecalc_races() {
  the->report.clear();
  for (const std::string& line : the->found) the->report += line + "\n";
  the->found.clear();
  return the->report.c_str();
}
/// Leaves one barrier out of every block, counted from 0; negative: none. For the test of the detector.
MOECALC_EXPORT void moecalc_leave_out_barrier(int64_t which) { the->left_out = which; }

// --- what the compiler calls ---

#define MOECALC_CODE __builtin_return_address(0)
#define MOECALC_ACCESS(SIZE)                                                                \
  void __tsan_read##SIZE(void* from) { access(from, SIZE, false, MOECALC_CODE); }           \
  void __tsan_write##SIZE(void* to) { access(to, SIZE, true, MOECALC_CODE); }               \
  void __tsan_unaligned_read##SIZE(void* from) { access(from, SIZE, false, MOECALC_CODE); } \
  void __tsan_unaligned_write##SIZE(void* to) { access(to, SIZE, true, MOECALC_CODE); }     \
  void __tsan_volatile_read##SIZE(void* from) { access(from, SIZE, false, MOECALC_CODE); }  \
  void __tsan_volatile_write##SIZE(void* to) { access(to, SIZE, true, MOECALC_CODE); }
// Of counters of the standard library, which no kernel has.
#define MOECALC_ATOMIC(BITS, TYPE)                                                                      \
  TYPE __tsan_atomic##BITS##_load(const volatile TYPE* from, int) {                                     \
    return __atomic_load_n(from, __ATOMIC_SEQ_CST);                                                     \
  }                                                                                                     \
  void __tsan_atomic##BITS##_store(volatile TYPE* to, TYPE value, int) {                                \
    __atomic_store_n(to, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                     \
  TYPE __tsan_atomic##BITS##_fetch_add(volatile TYPE* to, TYPE value, int) {                            \
    return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                     \
  TYPE __tsan_atomic##BITS##_fetch_sub(volatile TYPE* to, TYPE value, int) {                            \
    return __atomic_fetch_sub(to, value, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                     \
  TYPE __tsan_atomic##BITS##_exchange(volatile TYPE* to, TYPE value, int) {                             \
    return __atomic_exchange_n(to, value, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                     \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile TYPE* to, TYPE* expected, TYPE value, int, \
                                                    int) {                                              \
    return __atomic_compare_exchange_n(to, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_read_range(void* from, size_t bytes) { access(from, bytes, false, MOECALC_CODE); }
void __tsan_write_range(void* to, size_t bytes) { access(to, bytes, true, MOECALC_CODE); }
MOECALC_ACCESS(1)
MOECALC_ACCESS(2)
MOECALC_ACCESS(4)
MOECALC_ACCESS(8)
MOECALC_ACCESS(16)
MOECALC_ATOMIC(8, unsigned char)
MOECALC_ATOMIC(32, unsigned)
MOECALC_ATOMIC(64, unsigned long)
}
