// Ghost atoms of ranks: their features and gradients, exchanged from the memory of the target where MPI takes
// it, else through page-locked memory of the host. Only rows that travel are copied.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "backends/cuda/device_list.h"
#include "backends/cuda/memory.h"
#include "kernels/common/layer.h"
#include "kernels/cuda/exchange.cuh"
#include "moecalc/evaluator.h"

namespace moecalc::cuda {

/// The rows of a plan on the target, and buffers of them.
struct GhostMemory {
  int64_t version = -1;  // of the plan
  Memory tables;
  const int* sent = nullptr;          // rows of the model
  const int* received = nullptr;      // likewise
  const int* owned = nullptr;         // those of `sent`, each once
  const int* owned_first = nullptr;   // into owned_places
  const int* owned_places = nullptr;  // in `sent`
  int64_t n_owned = 0;

  // Of the target, and of the host: a copy to the target may still be under way when the next comes back
  Memory sent_rows;
  Memory received_rows;
  Memory sent_down;
  Memory received_up;
  Memory received_down;
  Memory sent_up;
  Memory engine;  // of the host: all rows, in the engine's order, where there is no plan

  void forget() { version = -1; }
};

/// Of one evaluation. Everything waits for the target, on the calling thread.
template <class Real, class Target>
class Ghosts {
 public:
  /// `shape`: of a layer. `memory` grows as needed; its rows are of `list` unless it forgot them.
  Ghosts(Target& target, const DeviceList& list, const kernels::LayerShape& shape, GhostMemory& memory,
         GhostExchange& exchange)
      : target_(target),
        exchange_(exchange),
        list_(list),
        memory_(memory),
        plan_(exchange.plan()),
        n_node_(list.graph().n_node),
        n_local_(list.graph().n_local),
        width_(shape.n),
        padded_(shape.n_padded) {
    if (plan_ == nullptr) set_own_plan();
    if (memory_.version != plan_->version) upload_plan();
    grow(memory_.sent_rows, n_sent());
    grow(memory_.received_rows, n_received());
    if (!plan_->of_device) {
      for (Memory* rows : {&memory_.sent_down, &memory_.sent_up}) grow_pinned(*rows, n_sent());
      for (Memory* rows : {&memory_.received_down, &memory_.received_up}) grow_pinned(*rows, n_received());
    }
  }

  /// Fills the ghosts' rows of the features `node` (n_node x n_padded).
  void forward(Real* node) {
    copy(node, memory_.sent, sent(), n_sent(), /*gather=*/true);
    swap(sent(), memory_.sent_down, n_sent(), received(), memory_.received_up, n_received(), /*back=*/false);
    copy(node, memory_.received, received(), n_received(), /*gather=*/false);
  }

  /// Adds the gradients `d_node` (n_node x n_padded) of ghosts to those of their owners.
  void reverse(Real* d_node) {
    copy(d_node, memory_.received, received(), n_received(), /*gather=*/true);
    swap(received(), memory_.received_down, n_received(), sent(), memory_.sent_up, n_sent(), /*back=*/true);
    if (memory_.n_owned == 0) return;
    AddRows<Real> add;
    add.rows = memory_.owned;
    add.first = memory_.owned_first;
    add.places = memory_.owned_places;
    add.n_row = memory_.n_owned;
    add.width = width_;
    add.padded = padded_;
    add.packed = sent();
    add.values = d_node;
    target_.launch(add);
  }

 private:
  int64_t n_sent() const { return static_cast<int64_t>(plan_->sent.size()); }
  int64_t n_received() const { return static_cast<int64_t>(plan_->received.size()); }
  int64_t row_bytes() const { return width_ * static_cast<int64_t>(sizeof(Real)); }
  Real* sent() const { return memory_.sent_rows.template as<Real>(); }
  Real* received() const { return memory_.received_rows.template as<Real>(); }

  void grow(Memory& memory, int64_t n_row) {
    const int64_t bytes = n_row * row_bytes();
    if (memory.bytes() < bytes) memory = target_.memory(bytes + bytes / 8);
  }
  void grow_pinned(Memory& memory, int64_t n_row) {
    const int64_t bytes = n_row * row_bytes();
    if (memory.bytes() >= bytes) return;
    target_.synchronize();  // an evaluation that failed may have left a copy
    memory = target_.pinned(bytes + bytes / 8);
  }

  /// For an exchange that has none: all atoms of this rank are sent, by way of the engine's order.
  void set_own_plan() {
    own_plan_.sent.resize(static_cast<size_t>(n_local_));
    std::iota(own_plan_.sent.begin(), own_plan_.sent.end(), 0);
    own_plan_.received.resize(static_cast<size_t>(n_node_ - n_local_));
    std::iota(own_plan_.received.begin(), own_plan_.received.end(), n_local_);
    plan_ = &own_plan_;
    const int64_t bytes = n_node_ * row_bytes();
    if (memory_.engine.bytes() < bytes) memory_.engine = target_.pinned(bytes + bytes / 8);
  }

  void upload_plan() {
    memory_.forget();
    std::vector<int64_t> rows;
    for (const int64_t row : plan_->sent) rows.push_back(list_.model_row(row));
    // places by row, which stay in their order: sums are the same in every run
    std::vector<int64_t> places(rows.size());
    std::iota(places.begin(), places.end(), 0);
    const auto row_of = [&](int64_t place) { return rows[static_cast<size_t>(place)]; };
    std::stable_sort(places.begin(), places.end(),
                     [&](int64_t a, int64_t b) { return row_of(a) < row_of(b); });
    std::vector<int64_t> owned;
    std::vector<int64_t> first;
    for (size_t k = 0; k < places.size(); ++k) {
      if (k > 0 && row_of(places[k]) == owned.back()) continue;
      owned.push_back(row_of(places[k]));
      first.push_back(static_cast<int64_t>(k));
    }
    memory_.n_owned = static_cast<int64_t>(owned.size());
    first.push_back(static_cast<int64_t>(places.size()));
    Upload upload;
    upload.add(rows, &memory_.sent);
    upload.add(plan_->received, &memory_.received);
    upload.add(owned, &memory_.owned);
    upload.add(first, &memory_.owned_first);
    upload.add(places, &memory_.owned_places);
    memory_.tables = upload.send(target_);
    memory_.version = plan_->version;
  }

  void copy(Real* values, const int* rows, Real* packed, int64_t n_row, bool gather) {
    if (n_row == 0) return;
    CopyRows<Real> kernel;
    kernel.rows = rows;
    kernel.n_row = n_row;
    kernel.width = width_;
    kernel.padded = padded_;
    kernel.gather = gather;
    kernel.packed = packed;
    kernel.values = values;
    target_.launch(kernel);
  }

  /// `from` on the target goes to other ranks, and what comes from there to `to`.
  void swap(Real* from, Memory& from_host, int64_t n_from, Real* to, Memory& to_host, int64_t n_to,
            bool back) {
    if (plan_->of_device) {
      target_.synchronize();
      exchange_.exchange(back ? to : from, back ? from : to, row_bytes(), back);
      return;
    }
    const auto bytes = [&](int64_t n_row) { return static_cast<size_t>(n_row * row_bytes()); };
    auto* out = from_host.template as<Real>();
    auto* in = to_host.template as<Real>();
    if (n_from > 0) target_.to_host(out, from, bytes(n_from));
    target_.synchronize();
    if (plan_ != &own_plan_) {
      exchange_.exchange(back ? in : out, back ? out : in, row_bytes(), back);
    } else if (back) {
      reverse_in_engine_order(out, in);
    } else {
      forward_in_engine_order(out, in);
    }
    if (n_to > 0) target_.to_device(to, in, bytes(n_to));
  }

  Real* engine() const { return memory_.engine.template as<Real>(); }
  Array engine_array() const { return Array::view(engine(), {n_node_, width_}, dtype_of<Real>); }
  void forward_in_engine_order(const Real* own, Real* ghosts) {
    std::copy_n(own, n_local_ * width_, engine());
    std::fill_n(engine() + n_local_ * width_, (n_node_ - n_local_) * width_, Real(0));
    exchange_.forward(engine_array());
    std::copy_n(engine() + n_local_ * width_, (n_node_ - n_local_) * width_, ghosts);
  }
  void reverse_in_engine_order(const Real* ghosts, Real* own) {
    std::fill_n(engine(), n_local_ * width_, Real(0));  // what comes is added on the target
    std::copy_n(ghosts, (n_node_ - n_local_) * width_, engine() + n_local_ * width_);
    exchange_.reverse(engine_array());
    std::copy_n(engine(), n_local_ * width_, own);
  }

  Target& target_;
  GhostExchange& exchange_;
  const DeviceList& list_;
  GhostMemory& memory_;
  const GhostExchange::Plan* plan_;
  GhostExchange::Plan own_plan_;
  int64_t n_node_;
  int64_t n_local_;
  int64_t width_;
  int64_t padded_;
};

}  // namespace moecalc::cuda
