// From the gradients of the edge vectors to forces and virials, and sums over the atoms of a system.
// Everything is float64, all sums have a fixed order, and there are no atomics.
#pragma once

#include "kernels/cuda/graph.cuh"

namespace moecalc::cuda {

/// Forces and virials of nodes, with dx = dE/dx_ij of the edges ij:
///   F_a = sum over edges that start at a of dx - sum over edges that end at a of dx
///   W_a = - sum over edges that end at a of x (x) dx
/// A gather over the edges that end at a node, in the order of the list.
struct Forces : GraphKernel<128> {
  static constexpr int kLanes = 32;  // threads of a node
  static constexpr int kNodes = kThreads / kLanes;
  static constexpr int kSums = 12;
  const double* d_vector = nullptr;     // (n_edge, 3)
  const double* vector = nullptr;       // (n_edge, 3)
  const double* centre_sums = nullptr;  // (n_local, 12), the first three of dx
  double* forces = nullptr;             // (n_node, 3), engine order; null: not wanted
  double* atom_virial = nullptr;        // (n_node, 9), likewise
  int64_t blocks() const { return blocks_for(graph.n_node, kNodes); }
  int64_t shared_bytes() const { return shared_size<double>(kSums * kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t first = block.index() * kNodes;
    double* partial = block.template shared<double>(kSums * kThreads);
    block.each([&](int thread) {
      const int64_t node = first + thread / kLanes;
      double sums[kSums] = {};
      if (node < graph.n_node) add_slots(node, thread % kLanes, sums);
      for (int c = 0; c < kSums; ++c) partial[kSums * thread + c] = sums[c];
    });
    block.sync();
    block.each([&](int thread) {
      if (thread >= kSums * kNodes) return;
      const int own = thread / kSums;
      const int component = thread % kSums;
      if (first + own >= graph.n_node) return;
      double total = 0.0;
      for (int lane = 0; lane < kLanes; ++lane) total += partial[kSums * (own * kLanes + lane) + component];
      write(first + own, component, total);
    });
  }

 private:
  /// The share of one lane: every kLanes-th edge of every slot of the node.
  MOECALC_KERNEL void add_slots(int64_t node, int lane, double (&sums)[kSums]) const {
    for (int own = graph.node_first[node]; own < graph.node_first[node + 1]; ++own) {
      const int slot = graph.node_slot[own];
      for (int at = graph.slot_first[slot] + lane; at < graph.slot_first[slot + 1]; at += kLanes) {
        const int64_t edge = graph.edge_of_list[graph.slot_list[at]];
        if (edge >= 0) add_edge(edge, sums);
      }
    }
  }

  MOECALC_KERNEL void add_edge(int64_t edge, double (&sums)[kSums]) const {
    const double* gradient = d_vector + 3 * edge;
    for (int c = 0; c < 3; ++c) sums[c] += gradient[c];
    if (atom_virial == nullptr) return;
    for (int c = 0; c < 9; ++c) sums[3 + c] += vector[3 * edge + c / 3] * gradient[c % 3];
  }

  MOECALC_KERNEL void write(int64_t node, int component, double total) const {
    const int64_t row = graph.engine_row[node];
    if (component >= 3) {
      if (atom_virial != nullptr) atom_virial[9 * row + component - 3] = -total;
    } else if (forces != nullptr) {
      const double own = node < graph.n_local ? centre_sums[kSums * node + component] : 0.0;
      forces[3 * row + component] = own - total;
    }
  }
};

/// out[s, q] = scale * sum over the atoms of system s of values[row * stride + q], q < width, in engine
/// order.
struct SumSystems : GraphKernel<256> {
  int width = 1;
  int stride = 1;
  double scale = 1.0;
  bool by_engine_row = false;  // rows of `values`
  const double* values = nullptr;
  double* out = nullptr;  // (n_systems, width)
  int64_t blocks() const { return static_cast<int64_t>(graph.n_systems) * width; }
  int64_t shared_bytes() const { return shared_size<double>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t system = block.index() / width;
    const int64_t column = block.index() % width;
    double* partial = block.template shared<double>(kThreads);
    block.each([&](int thread) {
      double total = 0.0;
      for (int at = graph.system_first[system] + thread; at < graph.system_first[system + 1];
           at += kThreads) {
        const int64_t row = graph.system_row[at];
        total += values[(by_engine_row ? graph.engine_row[row] : row) * stride + column];
      }
      partial[thread] = total;
    });
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block.sync();
      block.each([&](int thread) {
        if (thread < half) partial[thread] += partial[thread + half];
      });
    }
    block.sync();
    block.each([&](int thread) {
      if (thread == 0) out[system * width + column] = scale * partial[0];
    });
  }
};

/// The counts, as numbers among the results.
struct CopyCounts : GraphKernel<32> {
  double* out = nullptr;  // (kCounts)
  int64_t blocks() const { return 1; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int thread) {
      if (thread < kCounts) out[thread] = static_cast<double>(graph.counts[thread]);
    });
  }
};

}  // namespace moecalc::cuda
