// A neighbor list on the target: the one upload per rebuild.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "backends/cuda/memory.h"
#include "graph/graph.h"
#include "graph/list_layout.h"
#include "kernels/cuda/graph.cuh"
#include "moecalc/evaluator.h"

namespace moecalc::cuda {

/// How the work of a list is cut into blocks: rows of a tile, and as many blocks as keep the target busy.
struct BlockRules {
  int64_t tile_rows = 64;
  int64_t wanted_blocks = 1;
};

/// The orders of a list, made on the host. The memory serves every list: fresh pages would take longer than
/// the sorting.
struct ListTables {
  AtomOrder atoms;
  std::vector<int> begin;  // (n_local + 1) edges of a row of the model
  // Of the edges in this order, (n_list): places in the engine's list, rows of positions, rows of the model.
  std::vector<int> edges;
  std::vector<int> from;
  std::vector<int> to;
  std::vector<int> centre;
  std::vector<int> neighbor;
  // (3 n_list) cells; one of the two, if there are any: bytes, unless atoms were never wrapped and have
  // travelled far
  std::vector<int8_t> shift;
  std::vector<double> wide_shift;
  // Slots as in list_layout.h
  std::vector<int> slot_of_edge;  // (n_list)
  std::vector<int> slot_node;     // (n_slot)
  std::vector<int> slot_first;    // (n_slot + 1) into slot_edges
  std::vector<int> slot_edges;    // (n_list)
  std::vector<int64_t> slot_splits;
  std::vector<int64_t> system;        // (n_local) of every row of the model
  std::vector<int64_t> system_first;  // (n_systems + 1) into system_row
  std::vector<int64_t> system_row;    // (n_local) rows of a structure
  std::vector<int64_t> node_first;    // (n_node + 1) into node_slot
  std::vector<int64_t> node_slot;     // (n_slot) slots of a node
  std::vector<Run> edge_runs;
  std::vector<Run> angle_runs;
  std::vector<Run> row_runs;
  std::vector<Run> slot_runs;
};
MOECALC_API void make_list_tables(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks,
                                  ListTables& tables);

/// Runs on the target.
struct Runs {
  const Run* first = nullptr;
  int64_t count = 0;
};

class DeviceList {
 public:
  template <class Target>
  void set(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks, Target& target);
  void clear() { is_set_ = false; }
  bool is_set() const { return is_set_; }

  /// What is uploaded with the list; the rest is of the step.
  const Graph& graph() const { return graph_; }
  const Runs& edge_runs() const { return edge_runs_; }
  const Runs& angle_runs() const { return angle_runs_; }
  const Runs& row_runs() const { return row_runs_; }
  const Runs& slot_runs() const { return slot_runs_; }
  /// Routing groups that have atoms.
  const std::vector<int64_t>& used_groups() const { return used_; }
  /// Engine rows of the nodes in model order.
  const std::vector<int64_t>& engine_rows() const { return tables_.atoms.engine_row; }
  /// Row of the model of an atom of this rank, from its row in the engine's order.
  int64_t model_row(int64_t engine_row) const {
    return tables_.atoms.model_row[static_cast<size_t>(engine_row)];
  }
  /// (n_systems * n_types) atoms of this rank.
  const std::vector<double>& composition() const { return composition_; }
  /// Throws OverlapError or NotFiniteError for an edge in this order.
  [[noreturn]] MOECALC_API void report_problem(int64_t edge, const double* positions,
                                               const double* cells) const;
  int64_t bytes() const { return memory_.bytes(); }

 private:
  /// Sets the numbers of the graph, and its pointers once `upload` is sent.
  MOECALC_API void add_tables(const NeighborList& list, Upload& upload);
  /// What the host keeps besides the tables.
  MOECALC_API void keep(const NeighborList& list, const GraphRules& rules);

  bool is_set_ = false;
  NeighborList list_;
  ListTables tables_;
  std::vector<int64_t> used_;
  std::vector<double> composition_;
  Memory memory_;
  Graph graph_;
  Runs edge_runs_;
  Runs angle_runs_;
  Runs row_runs_;
  Runs slot_runs_;
};

/// Throws Error for a list that is too long.
MOECALC_API void check_list_size(const NeighborList& list);

template <class Target>
void DeviceList::set(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks,
                     Target& target) {
  is_set_ = false;
  check_list_size(list);
  make_list_tables(list, rules, blocks, tables_);
  memory_.reset();  // old and new need not fit together
  Upload upload;
  add_tables(list, upload);
  memory_ = upload.send(target);
  keep(list, rules);
  is_set_ = true;
}

}  // namespace moecalc::cuda
