#include "backends/cuda/device_list.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "moecalc/error.h"
#include "package/packed_weights.h"

namespace moecalc::cuda {

namespace {

/// Items of every key, ascending.
struct Grouped {
  std::vector<int64_t> first, items;  // (n_key + 1), (n_item)
};
Grouped group_by(const std::vector<int64_t>& keys, size_t n_key) {
  Grouped grouped;
  grouped.first.assign(n_key + 1, 0);
  for (const int64_t key : keys) ++grouped.first[static_cast<size_t>(key) + 1];
  for (size_t key = 0; key < n_key; ++key) grouped.first[key + 1] += grouped.first[key];
  std::vector<int64_t> next(grouped.first.begin(), grouped.first.end() - 1);
  grouped.items.resize(keys.size());
  for (size_t item = 0; item < keys.size(); ++item) {
    grouped.items[static_cast<size_t>(next[static_cast<size_t>(keys[item])]++)] = static_cast<int64_t>(item);
  }
  return grouped;
}

/// Rows of every group, `length` at a time.
std::vector<Run> runs_of(const std::vector<int64_t>& splits, int64_t length) {
  std::vector<Run> runs;
  for (size_t group = 0; group + 1 < splits.size(); ++group) {
    const int64_t last = splits[group + 1];
    for (int64_t begin = splits[group]; begin < last; begin += length) {
      runs.push_back({static_cast<int>(group), static_cast<int>(begin),
                      static_cast<int>(std::min<int64_t>(begin + length, last))});
    }
  }
  return runs;
}

/// A run of centres fills a few tiles, as long as there are enough blocks for the target.
void make_runs(ListTables& tables, const BlockRules& blocks) {
  const auto n_local = static_cast<int64_t>(tables.atoms.model_row.size());
  const auto n_list = static_cast<int64_t>(tables.edges.edges.size());
  const int64_t shared_out = std::max<int64_t>(1, n_local / blocks.wanted_blocks);
  const int64_t edges_of_centre = n_local == 0 ? 1 : std::max<int64_t>(1, n_list / n_local);
  const int64_t angles_of_centre = std::max<int64_t>(1, edges_of_centre * edges_of_centre / 12);
  const auto length = [&](int64_t rows, int64_t rows_of_centre) {
    return std::clamp<int64_t>(rows / rows_of_centre, 1, std::min<int64_t>(8, shared_out));
  };
  const std::vector<int64_t>& splits = tables.atoms.node_splits;
  tables.edge_runs = runs_of(splits, length(8 * blocks.tile_rows, edges_of_centre));
  tables.angle_runs = runs_of(splits, length(12 * blocks.tile_rows, angles_of_centre));
  tables.row_runs = runs_of(splits, blocks.tile_rows);
  tables.slot_runs = runs_of(tables.slots.splits, blocks.tile_rows);
}

/// Rows of the model of every structure, in the engine's order.
void group_systems(ListTables& tables, const NeighborList& list) {
  const size_t n_local = tables.atoms.model_row.size();
  const auto* system = list.system_index.data<int64_t>();
  Grouped of_system = group_by({system, system + n_local}, static_cast<size_t>(list.n_systems));
  for (int64_t& row : of_system.items) row = tables.atoms.model_row[static_cast<size_t>(row)];
  tables.system_first = std::move(of_system.first);
  tables.system_row = std::move(of_system.items);
  tables.system.resize(n_local);
  for (size_t row = 0; row < n_local; ++row) tables.system[row] = system[tables.atoms.engine_row[row]];
}

void sort_edges(ListTables& tables, const NeighborList& list) {
  const int64_t n_edge = list.edge_index.size(1);
  const auto n_local = static_cast<int64_t>(tables.atoms.model_row.size());
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const auto* from = list.edge_from.data<int64_t>();
  const auto* to = list.edge_to.data<int64_t>();
  const auto row = [&](int64_t node) {
    return node < n_local ? tables.atoms.model_row[static_cast<size_t>(node)] : node;
  };
  for (std::vector<int64_t>* values : {&tables.from, &tables.to, &tables.centre, &tables.neighbor}) {
    values->reserve(tables.edges.edges.size());
  }
  for (const int64_t edge : tables.edges.edges) {
    tables.from.push_back(from[edge]);
    tables.to.push_back(to[edge]);
    tables.centre.push_back(row(centre[edge]));
    tables.neighbor.push_back(row(neighbor[edge]));
  }
}

}  // namespace

void check_list_size(const NeighborList& list) {
  constexpr int64_t limit = std::numeric_limits<int>::max();
  const int64_t n_node = list.types.size(0), n_edge = list.edge_index.size(1);
  if (n_node > limit || n_edge > limit) {
    throw Error("expected at most " + std::to_string(limit) +
                " atoms and listed neighbours per process, got " + std::to_string(n_node) + " and " +
                std::to_string(n_edge) + ": use more processes");
  }
}

ListTables make_list_tables(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks) {
  ListTables tables;
  tables.atoms = order_atoms(list, rules);
  tables.edges = order_edges(list, rules, tables.atoms);
  sort_edges(tables, list);
  group_systems(tables, list);
  std::vector<int64_t> edge_splits;
  for (const int64_t row : tables.atoms.node_splits) {
    edge_splits.push_back(tables.edges.begin[static_cast<size_t>(row)]);
  }
  make_slots(tables.neighbor, edge_splits, list.types.size(0), tables.slots);
  Grouped of_node = group_by(tables.slots.node, static_cast<size_t>(list.types.size(0)));
  tables.node_first = std::move(of_node.first);
  tables.node_slot = std::move(of_node.items);
  make_runs(tables, blocks);
  return tables;
}

std::vector<int64_t> used_groups(const AtomOrder& atoms) { return groups_in_use(atoms.node_splits); }

std::vector<double> composition_of_list(const NeighborList& list, int64_t n_types) {
  std::vector<double> composition(static_cast<size_t>(list.n_systems * n_types), 0.0);
  const auto* type = list.types.data<int64_t>();
  const auto* system = list.system_index.data<int64_t>();
  for (int64_t i = 0; i < list.system_index.size(0); ++i) {
    composition[static_cast<size_t>(system[i] * n_types + type[i])] += 1.0;
  }
  return composition;
}

void report_edge(const NeighborList& list, int64_t e, const double* positions, const double* cells) {
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t i = centre[e], j = centre[list.edge_index.size(1) + e];
  const int64_t from = list.edge_from.data<int64_t>()[e], to = list.edge_to.data<int64_t>()[e];
  double vec[3];
  for (int c = 0; c < 3; ++c) vec[c] = positions[3 * to + c] - positions[3 * from + c];
  if (list.edge_shift.defined()) {
    const int64_t* shift = list.edge_shift.data<int64_t>() + 3 * e;
    const double* cell = cells + 9 * list.system_index.data<int64_t>()[i];
    for (int c = 0; c < 3; ++c) {
      for (int y = 0; y < 3; ++y) vec[c] += static_cast<double>(shift[y]) * cell[3 * y + c];
    }
  }
  const std::string atoms = " between atoms " + std::to_string(i) + " and " + std::to_string(j) + ": ";
  if (!std::isfinite(vec[0] + vec[1] + vec[2])) {
    throw NotFiniteError("expected finite `edge_vec`, got (" + std::to_string(vec[0]) + ", " +
                             std::to_string(vec[1]) + ", " + std::to_string(vec[2]) + ") Angstrom" + atoms +
                             "check the positions and the cell",
                         i);
  }
  throw OverlapError("expected distinct positions, got distance 0" + atoms + "remove the duplicate atom", i,
                     j);
}

}  // namespace moecalc::cuda
