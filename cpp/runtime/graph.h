// From an engine's AtomicGraph to the order that the model's segments require.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "moecalc/evaluator.h"

namespace moecalc {

/// What a model says about the graphs that it accepts.
struct GraphRules {
  int64_t n_types = 0;
  double cutoff = 0.0;        // edges: r <= cutoff, in Angstrom
  double angle_cutoff = 0.0;  // angles: both r < angle_cutoff; 0 = no angles
  /// (n_types * n_types) row: centre type, column: neighbour type; 0 = that pair makes no edge.
  std::vector<uint8_t> pair_mask;
  /// Atoms are grouped by type, or (if true) by structure.
  bool group_by_system = false;
  /// Or by condition and type, where experts depend on charge and spin.
  bool group_by_condition = false;
  /// Of the structures to come: type = condition * n_types + element in model order. One entry: of all.
  std::vector<int64_t> condition_of_system{0};
  int64_t n_conditions = 1;

  int64_t condition(int64_t system) const {
    return condition_of_system.size() == 1 ? condition_of_system[0]
                                           : condition_of_system[static_cast<size_t>(system)];
  }
  int64_t n_groups(int64_t n_systems) const {
    return group_by_system ? n_systems : group_by_condition ? n_conditions * n_types : n_types;
  }
};

/// A graph in model order. All tensors are on the CPU.
///
/// Local atoms are sorted by group, ghosts keep their engine rows; edges are sorted by centre, angle
/// neighbours first, and angles by edge. All sorts are stable, so equal input gives bitwise equal output.
struct PreparedGraph {
  int64_t n_node = 0, n_local = 0, n_edge = 0, n_angle = 0;
  int64_t max_neighbors = 0, max_angle_neighbors = 0;
  at::Tensor types;        // (n_node,) int64, condition * n_types + element
  at::Tensor edge_index;   // (2, n_edge) int64
  at::Tensor edge_vec;     // (n_edge, 3) float64
  at::Tensor angle_index;  // (2, n_angle) int64; only if asked for
  at::Tensor engine_row;   // (n_node,) int64: engine row of each model row; the identity for ghosts
  at::Tensor model_row;    // (n_local,) int64: model row of each local engine row
  at::Tensor composition;  // (n_systems, n_types) float64 atom counts of this rank; only if grouped by system
  /// Edges of centre i: edge_offset[i]..edge_offset[i + 1], the first close_count[i] of them within the angle
  /// cutoff; its angles (j, k): angle_offset[i] + j * close_count[i] + k.
  std::vector<int64_t> edge_offset, angle_offset, close_count;
  /// Rows splits[g]:splits[g+1] belong to group g.
  std::vector<int64_t> node_splits, edge_splits, angle_splits;
};

/// Filters, sorts and checks `graph`, and lists its angles. Throws Error naming the offending value.
PreparedGraph prepare_graph(const AtomicGraph& graph, const GraphRules& rules, bool with_angle_index = true);

/// Checks types, shapes and indices, and returns the list with contiguous tensors. Throws Error.
NeighborList checked_list(const NeighborList& list, const GraphRules& rules);

/// Rows of positions that the edges of a checked list name.
int64_t position_rows(const NeighborList& list);

/// Checks what changes between two evaluations of a list: throws Error for wrong shapes, fewer than `n_rows`
/// positions or values that are not finite.
void check_positions(const NeighborList& list, int64_t n_rows, const at::Tensor& positions,
                     const at::Tensor& cells);

/// The graph of a checked list at these positions, edges of the skin included.
AtomicGraph graph_of_list(const NeighborList& list, const at::Tensor& positions, const at::Tensor& cells);

/// The reverse: a list and positions with the edges of the graph, which start at one position, the origin,
/// and end at positions of their own. Throws Error if the graph is invalid.
std::pair<NeighborList, at::Tensor> list_of_graph(const AtomicGraph& graph, const GraphRules& rules);

}  // namespace moecalc
