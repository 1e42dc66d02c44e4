// Memory of a target, and copies to it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "moecalc/error.h"

namespace moecalc::cuda {

/// What a process may still take of a GPU that `n_sharers` use: no more than its part, for the others see the
/// same free memory at the same time. `free`: of the driver; `held`: by this process. A twentieth is left for
/// what the driver itself keeps for every process.
inline int64_t free_of_part(int64_t free, int64_t total, int64_t held, int64_t n_sharers) {
  if (n_sharers <= 1) return free;
  const int64_t part = (total - total / 20) / n_sharers;
  return std::clamp<int64_t>(part - held, 0, free);
}

/// Where blocks of memory come from.
class MemorySource {
 public:
  virtual ~MemorySource() = default;
  /// Aligned to 256 bytes; null if there is not that much.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* block) noexcept = 0;
  /// For messages: "cuda:0".
  virtual std::string place() const = 0;
};

/// Blocks that are given back and taken again. All work on a block must be in the order of one stream: then
/// what takes it next comes after what used it before.
class MemoryCache {
 public:
  static constexpr size_t no_limit = std::numeric_limits<size_t>::max();

  /// Keeps up to `most_idle` bytes of blocks that nobody has.
  MemoryCache(std::unique_ptr<MemorySource> source, size_t most_idle)
      : source_(std::move(source)), most_idle_(most_idle) {}
  ~MemoryCache() { trim(); }
  MemoryCache(const MemoryCache&) = delete;
  MemoryCache& operator=(const MemoryCache&) = delete;

  /// At least `bytes`, which become the size of the block. Throws OutOfMemoryError.
  void* take(size_t& bytes) {
    bytes = size_class(bytes);
    const auto fits = idle_.lower_bound(bytes);
    if (fits != idle_.end() && fits->first <= bytes + bytes / 8) {
      bytes = fits->first;
      void* block = fits->second;
      idle_.erase(fits);
      idle_bytes_ -= bytes;
      return block;
    }
    void* block = source_->allocate(bytes);
    if (block == nullptr && !idle_.empty()) {
      trim();
      block = source_->allocate(bytes);
    }
    if (block != nullptr) {
      held_bytes_ += bytes;
      return block;
    }
    throw OutOfMemoryError("out of memory on " + source_->place() + " for " + std::to_string(bytes >> 20) +
                           " MiB: use fewer atoms per device, more devices or dtype float32");
  }

  void give(void* block, size_t bytes) noexcept {
    try {
      if (bytes <= most_idle_ - idle_bytes_) {
        idle_.emplace(bytes, block);
        idle_bytes_ += bytes;
        return;
      }
    } catch (const std::bad_alloc&) {
      // not kept, then
    }
    source_->release(block);
    held_bytes_ -= bytes;
  }

  /// Gives the blocks that nobody has back to where they come from.
  void trim() noexcept {
    for (const auto& [bytes, block] : idle_) source_->release(block);
    held_bytes_ -= idle_bytes_;
    idle_.clear();
    idle_bytes_ = 0;
  }

  int64_t idle_bytes() const { return static_cast<int64_t>(idle_bytes_); }
  /// Of all blocks, idle ones included.
  int64_t held_bytes() const { return static_cast<int64_t>(held_bytes_); }

 private:
  /// Rounded as the driver does: blocks of nearly the same size can replace each other.
  static size_t size_class(size_t bytes) {
    constexpr size_t mebibyte = size_t{1} << 20;
    const size_t unit = bytes <= mebibyte ? 512 : 2 * mebibyte;
    return (bytes + unit - 1) / unit * unit;
  }

  std::unique_ptr<MemorySource> source_;
  size_t most_idle_;
  size_t idle_bytes_ = 0;
  size_t held_bytes_ = 0;
  std::multimap<size_t, void*> idle_;
};

/// Bytes of a target, not initialised, which go back to their cache.
class Memory {
 public:
  Memory() = default;
  Memory(MemoryCache& cache, int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    capacity_ = static_cast<size_t>(bytes);
    data_ = cache.take(capacity_);
    cache_ = &cache;
  }
  ~Memory() { reset(); }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    if (this != &other) {
      reset();
      swap(other);
    }
    return *this;
  }

  void reset() noexcept {
    if (data_ != nullptr) cache_->give(data_, capacity_);
    data_ = nullptr;
    bytes_ = 0;
  }
  int64_t bytes() const { return bytes_; }
  /// Null if there are no bytes.
  template <class Value>
  Value* as() const {
    return static_cast<Value*>(data_);
  }

 private:
  void swap(Memory& other) noexcept {
    std::swap(cache_, other.cache_);
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
    std::swap(bytes_, other.bytes_);
  }

  MemoryCache* cache_ = nullptr;
  void* data_ = nullptr;
  size_t capacity_ = 0;
  int64_t bytes_ = 0;
};

/// Memory of values of one type. Stands for the pointer to them where one is asked for.
template <class Value>
struct Values {
  Memory memory;

  operator Value*() const { return memory.as<Value>(); }
  static int64_t bytes_for(int64_t count) { return count * static_cast<int64_t>(sizeof(Value)); }
  bool holds(int64_t count) const { return memory.bytes() >= bytes_for(count); }
};

/// Values of the host that go to the target in one copy.
class Upload {
 public:
  /// `write(Value*)` writes `count` values, when they are sent; `*place` will point to them on the target.
  template <class Value, class Write>
  void add(size_t count, Write write, const Value** place) {
    constexpr size_t alignment = 64;
    const size_t first = (bytes_ + alignment - 1) / alignment * alignment;
    bytes_ = first + count * sizeof(Value);
    pieces_.push_back([first, write = std::move(write), place](char* host, char* target) {
      if (host != nullptr) {
        write(reinterpret_cast<Value*>(host + first));
      } else {
        *place = reinterpret_cast<const Value*>(target + first);
      }
    });
  }
  /// `values`, which must stay until they are sent, in the type of `place`.
  template <class Value, class From>
  void add(const std::vector<From>& values, const Value** place) {
    const auto write = [&values](Value* to) {
      std::transform(values.begin(), values.end(), to,
                     [](const From& value) { return static_cast<Value>(value); });
    };
    add(values.size(), write, place);
  }

  /// `target`: its staging memory is used. Waits for the copy.
  template <class Target>
  Memory send(Target& target) const {
    Memory memory = target.memory(static_cast<int64_t>(bytes_));
    if (bytes_ == 0) return memory;
    char* staging = target.staging(bytes_);
    for (const auto& piece : pieces_) piece(staging, nullptr);
    target.to_device(memory.template as<char>(), staging, bytes_);
    target.synchronize();
    for (const auto& piece : pieces_) piece(nullptr, memory.template as<char>());
    return memory;
  }

 private:
  size_t bytes_ = 0;
  std::vector<std::function<void(char* host, char* target)>> pieces_;
};

}  // namespace moecalc::cuda
