// Ghost atoms of ranks: their features and gradients, exchanged through page-locked memory of the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "backends/cuda/device_list.h"
#include "backends/cuda/memory.h"
#include "kernels/common/layer.h"
#include "moecalc/evaluator.h"

namespace moecalc::cuda {

/// Rows of the nodes: padded in the model's order, as they are on the target, and in the engine's order.
struct GhostMemory {
  Memory model;
  Memory engine;
};

/// Of one evaluation. Everything waits for the target, on the calling thread.
template <class Real, class Target>
class Ghosts {
 public:
  /// `shape`: of a layer. `memory` grows as needed.
  Ghosts(Target& target, const DeviceList& list, const kernels::LayerShape& shape, GhostMemory& memory,
         GhostExchange& exchange)
      : target_(target),
        exchange_(exchange),
        rows_(list.engine_rows()),
        n_node_(list.graph().n_node),
        n_local_(list.graph().n_local),
        width_(shape.n),
        padded_(shape.n_padded) {
    grow(memory.model, n_node_ * padded_);
    grow(memory.engine, n_node_ * width_);
    model_ = memory.model.template as<Real>();
    engine_ = memory.engine.template as<Real>();
  }

  /// Fills the ghosts' rows of the features `node` (n_node x n_padded).
  void forward(Real* node) {
    down(node, n_local_);
    to_engine_order(n_local_);
    std::fill(engine_ + n_local_ * width_, engine_ + n_node_ * width_, Real(0));
    exchange_.forward(engine_array());
    // padding meets weights that are zero, and must be finite
    std::fill(model_ + n_local_ * padded_, model_ + n_node_ * padded_, Real(0));
    to_model_order(n_local_, n_node_);
    up(node, n_local_, n_node_);
  }

  /// Adds the gradients `d_node` (n_node x n_padded) of ghosts to those of their owners.
  void reverse(Real* d_node) {
    down(d_node, n_node_);
    to_engine_order(n_node_);
    exchange_.reverse(engine_array());
    to_model_order(0, n_local_);
    up(d_node, 0, n_local_);
  }

 private:
  void grow(Memory& memory, int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Real));
    if (memory.bytes() < bytes) memory = target_.pinned(bytes + bytes / 8);
  }
  Real* engine_row(int64_t row) const { return engine_ + rows_[static_cast<size_t>(row)] * width_; }
  Array engine_array() const { return Array::view(engine_, {n_node_, width_}, dtype_of<Real>); }

  /// The first `count` rows.
  void down(const Real* values, int64_t count) {
    target_.to_host(model_, values, static_cast<size_t>(count * padded_) * sizeof(Real));
    target_.synchronize();
  }
  /// Rows begin..end-1.
  void up(Real* values, int64_t begin, int64_t end) {
    const size_t bytes = static_cast<size_t>((end - begin) * padded_) * sizeof(Real);
    if (bytes > 0) target_.to_device(values + begin * padded_, model_ + begin * padded_, bytes);
  }
  void to_engine_order(int64_t count) {
    for (int64_t row = 0; row < count; ++row) std::copy_n(model_ + row * padded_, width_, engine_row(row));
  }
  void to_model_order(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) std::copy_n(engine_row(row), width_, model_ + row * padded_);
  }

  Target& target_;
  GhostExchange& exchange_;
  const std::vector<int64_t>& rows_;  // engine row of every row of the model
  int64_t n_node_;
  int64_t n_local_;
  int64_t width_;
  int64_t padded_;
  Real* model_ = nullptr;
  Real* engine_ = nullptr;
};

}  // namespace moecalc::cuda
