// Orders that CPU and GPU kernels share: atoms by routing group, edges by centre, and slots. Plain vectors.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/graph.h"

namespace moecalc {

/// Local atoms sorted by group (stable); ghosts keep their rows behind them.
struct AtomOrder {
  std::vector<int64_t> types;        // (n_node) in model order: condition * n_types + element
  std::vector<int64_t> engine_row;   // (n_node) engine row of each model row
  std::vector<int64_t> model_row;    // (n_local) the inverse
  std::vector<int64_t> node_splits;  // (n_group + 1): rows of a group
};
AtomOrder order_atoms(const NeighborList& list, const GraphRules& rules);

/// Edges of the list that the pair mask allows, sorted by the model row of their centre (stable).
struct EdgeOrder {
  std::vector<int64_t> edges;  // ids in the list
  std::vector<int64_t> begin;  // (n_local + 1)
};
EdgeOrder order_edges(const NeighborList& list, const GraphRules& rules, const AtomOrder& atoms);

/// A slot is a (routing group of the centre, neighbor) pair that occurs. Slots of a group are contiguous, in
/// the order in which the edges name them.
struct Slots {
  std::vector<int64_t> of_edge;  // (n_edge)
  std::vector<int64_t> node;     // (n_slot) the neighbor
  std::vector<int64_t> splits;   // (n_group + 1): slots of a group
  std::vector<int64_t> first;    // (n_slot + 1) into `edges`
  std::vector<int64_t> edges;    // (n_edge) edges of every slot, ascending
};
/// neighbor (n_edge) in edge order; edge_splits (n_group + 1): edges of a group. `slots` is overwritten, so
/// that its memory serves every step.
void make_slots(const std::vector<int64_t>& neighbor, const std::vector<int64_t>& edge_splits, int64_t n_node,
                Slots& slots);

}  // namespace moecalc
