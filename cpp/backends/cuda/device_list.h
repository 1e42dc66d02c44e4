// A neighbour list on the target: the one upload per rebuild.
#pragma once

#include <cstdint>
#include <vector>

#include "backends/cuda/memory.h"
#include "graph/graph.h"
#include "graph/list_layout.h"
#include "moecalc/evaluator.h"
#include "ops/cuda/geometry.cuh"

namespace moecalc::cuda {

/// How the work of a list is cut into blocks: rows of a tile, and as many blocks as keep the target busy.
struct BlockRules {
  int64_t tile_rows = 64;
  int64_t wanted_blocks = 1;
};

/// The orders of a list, made on the host.
struct ListTables {
  AtomOrder atoms;
  EdgeOrder edges;
  Slots slots;
  // Of the edges in this order, (n_list): rows of positions, and rows of the model.
  std::vector<int64_t> from, to, centre, neighbor;
  std::vector<int64_t> system;                    // (n_local) of every row of the model
  std::vector<int64_t> system_first, system_row;  // (n_systems + 1), (n_local) rows of a structure
  std::vector<int64_t> node_first, node_slot;     // (n_node + 1), (n_slot) slots of a node
  std::vector<Run> edge_runs, angle_runs, row_runs, slot_runs;
};
MOECALC_API ListTables make_list_tables(const NeighborList& list, const GraphRules& rules,
                                        const BlockRules& blocks);

/// Runs on the target.
struct Runs {
  const Run* runs = nullptr;
  int64_t n = 0;
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
  const std::vector<int64_t>& engine_rows() const { return engine_rows_; }
  /// (n_systems * n_types) atoms of this rank.
  const std::vector<double>& composition() const { return composition_; }
  /// Throws what is wrong with an edge in this order: OverlapError, or NotFiniteError.
  [[noreturn]] void report_problem(int64_t edge, const double* positions, const double* cells) const;
  int64_t bytes() const { return memory_.bytes(); }

 private:
  bool is_set_ = false;
  NeighborList list_;
  std::vector<int64_t> edges_;  // of the engine's list, in this order
  std::vector<int64_t> engine_rows_, used_;
  std::vector<double> composition_;
  Memory memory_;
  Graph graph_;
  Runs edge_runs_, angle_runs_, row_runs_, slot_runs_;
};

/// Throws Error for a list that is too long.
MOECALC_API void check_list_size(const NeighborList& list);
MOECALC_API std::vector<int64_t> used_groups(const AtomOrder& atoms);
MOECALC_API std::vector<double> composition_of_list(const NeighborList& list, int64_t n_types);
/// Of edge `e` of the engine's list.
[[noreturn]] MOECALC_API void report_edge(const NeighborList& list, int64_t e, const double* positions,
                                          const double* cells);

inline void DeviceList::report_problem(int64_t edge, const double* positions, const double* cells) const {
  report_edge(list_, edges_[static_cast<size_t>(edge)], positions, cells);
}

template <class Target>
void DeviceList::set(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks,
                     Target& target) {
  is_set_ = false;
  check_list_size(list);
  ListTables tables = make_list_tables(list, rules, blocks);
  memory_.reset();  // old and new need not fit together
  graph_ = Graph();
  graph_.n_node = static_cast<int>(tables.atoms.engine_row.size());
  graph_.n_local = static_cast<int>(tables.atoms.model_row.size());
  graph_.n_list = static_cast<int>(tables.edges.edges.size());
  graph_.n_slot = static_cast<int>(tables.slots.node.size());
  graph_.n_systems = static_cast<int>(list.n_systems);

  Upload upload;
  upload.add(tables.edges.begin, &graph_.list_first);
  upload.add(tables.from, &graph_.list_from);
  upload.add(tables.to, &graph_.list_to);
  upload.add(tables.centre, &graph_.list_centre);
  upload.add(tables.neighbor, &graph_.list_neighbor);
  upload.add(tables.slots.of_edge, &graph_.list_slot);
  upload.add(tables.slots.node, &graph_.slot_node);
  upload.add(tables.slots.first, &graph_.slot_first);
  upload.add(tables.slots.edges, &graph_.slot_list);
  upload.add(tables.node_first, &graph_.node_first);
  upload.add(tables.node_slot, &graph_.node_slot);
  upload.add(tables.atoms.types, &graph_.type);
  upload.add(tables.atoms.engine_row, &graph_.engine_row);
  upload.add(tables.system, &graph_.system);
  upload.add(tables.system_first, &graph_.system_first);
  upload.add(tables.system_row, &graph_.system_row);
  const auto add_runs = [&](const std::vector<Run>& runs, Runs& to) {
    to = {nullptr, static_cast<int64_t>(runs.size())};
    upload.add(runs, &to.runs);
  };
  add_runs(tables.edge_runs, edge_runs_);
  add_runs(tables.angle_runs, angle_runs_);
  add_runs(tables.row_runs, row_runs_);
  add_runs(tables.slot_runs, slot_runs_);
  if (list.edge_shift.defined()) {
    const auto* shift = list.edge_shift.template data<int64_t>();
    const auto write = [shift, &edges = tables.edges.edges](double* to) {
      for (const int64_t edge : edges) {
        for (int64_t c = 0; c < 3; ++c) *to++ = static_cast<double>(shift[3 * edge + c]);
      }
    };
    upload.add(3 * tables.edges.edges.size(), write, &graph_.list_shift);
  }
  memory_ = upload.send(target);
  used_ = cuda::used_groups(tables.atoms);
  edges_ = std::move(tables.edges.edges);
  engine_rows_ = std::move(tables.atoms.engine_row);
  composition_ = composition_of_list(list, rules.n_types);
  list_ = list;
  is_set_ = true;
}

}  // namespace moecalc::cuda
