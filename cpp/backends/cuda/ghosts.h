// Ghost atoms of ranks: their features and gradients, exchanged through page-locked memory of the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backends/cuda/device_list.h"
#include "backends/cuda/memory.h"
#include "moecalc/evaluator.h"
#include "ops/layer.h"

namespace moecalc::cuda {

/// Rows of the nodes: padded in the model's order, as they are on the target, and in the engine's order.
struct GhostMemory {
  Memory model, engine;
};

/// Of one evaluation. Everything waits for the target, on the calling thread.
template <class T, class Target>
class Ghosts {
 public:
  /// `shape`: of a layer. `memory` grows as needed.
  Ghosts(Target& target, const DeviceList& list, const ops::LayerShape& shape, GhostMemory& memory,
         GhostExchange& exchange)
      : target_(target),
        exchange_(exchange),
        rows_(list.engine_rows()),
        n_node_(list.graph().n_node),
        n_local_(list.graph().n_local),
        n_(shape.n),
        np_(shape.np) {
    grow(memory.model, n_node_ * np_);
    grow(memory.engine, n_node_ * n_);
    model_ = memory.model.template as<T>();
    engine_ = memory.engine.template as<T>();
  }

  /// Fills the ghosts' rows of the features `v` (n_node x np).
  void forward(T* v) {
    down(v, n_local_);
    to_engine_order(n_local_);
    std::fill(engine_ + n_local_ * n_, engine_ + n_node_ * n_, T(0));
    exchange_.forward(engine_array());
    // padding meets weights that are zero, and must be finite
    std::fill(model_ + n_local_ * np_, model_ + n_node_ * np_, T(0));
    to_model_order(n_local_, n_node_);
    up(v, n_local_, n_node_);
  }

  /// Adds the gradients `dv` (n_node x np) of ghosts to those of their owners.
  void reverse(T* dv) {
    down(dv, n_node_);
    to_engine_order(n_node_);
    exchange_.reverse(engine_array());
    to_model_order(0, n_local_);
    up(dv, 0, n_local_);
  }

 private:
  void grow(Memory& memory, int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    if (memory.bytes() < bytes) memory = target_.pinned(bytes + bytes / 8);
  }
  T* engine_row(int64_t row) const { return engine_ + rows_[static_cast<size_t>(row)] * n_; }
  Array engine_array() const { return Array::view(engine_, {n_node_, n_}, dtype_of<T>); }

  /// The first `n` rows.
  void down(const T* values, int64_t n) {
    target_.to_host(model_, values, static_cast<size_t>(n * np_) * sizeof(T));
    target_.synchronize();
  }
  /// Rows begin..end-1.
  void up(T* values, int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>((end - begin) * np_) * sizeof(T);
    if (bytes > 0) target_.to_device(values + begin * np_, model_ + begin * np_, bytes);
  }
  void to_engine_order(int64_t n) {
    for (int64_t row = 0; row < n; ++row) std::copy_n(model_ + row * np_, n_, engine_row(row));
  }
  void to_model_order(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::copy_n(engine_row(row), n_, model_ + row * np_);
  }

  Target& target_;
  GhostExchange& exchange_;
  const std::vector<int64_t>& rows_;  // engine row of every row of the model
  int64_t n_node_, n_local_, n_, np_;
  T *model_ = nullptr, *engine_ = nullptr;
};

}  // namespace moecalc::cuda
