#include "backends/cuda/device_list.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "moecalc/error.h"
#include "package/packed_weights.h"

namespace moecalc::cuda {

namespace {

/// Items of every key, ascending.
struct Grouped {
  std::vector<int64_t> first;  // (n_key + 1) into items
  std::vector<int64_t> items;  // (n_item)
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
  const auto n_list = static_cast<int64_t>(tables.edges.size());
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
  tables.slot_runs = runs_of(tables.slot_splits, blocks.tile_rows);
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

/// False where atoms were never wrapped and have travelled far, or where a cell is tiny.
bool shifts_fit_bytes(const NeighborList& list) {
  const auto* shifts = list.edge_shift.data<int64_t>();
  // outside of -128..127 a bit above the lowest eight is set; no early end, or it would not be vectorised
  uint64_t outside = 0;
  const int64_t n_number = list.edge_shift.numel();
  for (int64_t index = 0; index < n_number; ++index) {
    outside |= (static_cast<uint64_t>(shifts[index]) + 128) & ~uint64_t{255};
  }
  return outside == 0;
}

/// Row of the model of every node.
std::vector<int> model_rows(const AtomOrder& atoms) {
  std::vector<int> rows(atoms.engine_row.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::copy(atoms.model_row.begin(), atoms.model_row.end(), rows.begin());
  return rows;
}

/// Turns counts[0..n-1] (with counts[n] unused) into offsets[0..n].
void counts_to_offsets(std::vector<int>& counts) {
  std::exclusive_scan(counts.begin(), counts.end(), counts.begin(), 0);
}

/// visit(edge) for the edges that the pair mask allows.
template <class Visit>
void for_allowed(const NeighborList& list, const GraphRules& rules, const Visit& visit) {
  const int64_t n_edge = list.edge_index.size(1);
  const bool all = std::find(rules.pair_mask.begin(), rules.pair_mask.end(), 0) == rules.pair_mask.end();
  if (all) {
    for (int64_t edge = 0; edge < n_edge; ++edge) visit(edge);
    return;
  }
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const auto* type = list.types.data<int64_t>();
  for (int64_t edge = 0; edge < n_edge; ++edge) {
    const int64_t pair = type[centre[edge]] * rules.n_types + type[neighbor[edge]];
    if (rules.pair_mask[static_cast<size_t>(pair)] != 0) visit(edge);
  }
}

/// Cell shifts of the edges in this order.
template <class Shift>
void sort_shifts(const NeighborList& list, const std::vector<int>& edges, std::vector<Shift>& sorted) {
  const auto* shifts = list.edge_shift.data<int64_t>();
  sorted.resize(3 * edges.size());
  Shift* to = sorted.data();
  for (const int edge : edges) {
    for (int64_t c = 0; c < 3; ++c) *to++ = static_cast<Shift>(shifts[3 * int64_t{edge} + c]);
  }
}

/// By the model row of their centre, otherwise as listed.
void sort_edges(ListTables& tables, const NeighborList& list, const GraphRules& rules) {
  const int64_t n_edge = list.edge_index.size(1);
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const auto* from = list.edge_from.data<int64_t>();
  const auto* to = list.edge_to.data<int64_t>();
  const std::vector<int> row = model_rows(tables.atoms);
  tables.begin.assign(tables.atoms.model_row.size() + 1, 0);
  for_allowed(list, rules, [&](int64_t edge) { ++tables.begin[static_cast<size_t>(row[centre[edge]])]; });
  counts_to_offsets(tables.begin);
  const auto n_list = static_cast<size_t>(tables.begin.back());
  for (auto* values : {&tables.edges, &tables.from, &tables.to, &tables.centre, &tables.neighbor}) {
    values->resize(n_list);
  }
  std::vector<int> next = tables.begin;
  for_allowed(list, rules, [&](int64_t edge) {
    const int own_row = row[centre[edge]];
    const auto place = static_cast<size_t>(next[static_cast<size_t>(own_row)]++);
    tables.edges[place] = static_cast<int>(edge);
    tables.from[place] = static_cast<int>(from[edge]);
    tables.to[place] = static_cast<int>(to[edge]);
    tables.centre[place] = own_row;
    tables.neighbor[place] = row[neighbor[edge]];
  });
  tables.shift.clear();
  tables.wide_shift.clear();
  if (!list.edge_shift.defined()) return;
  if (shifts_fit_bytes(list)) {
    sort_shifts(list, tables.edges, tables.shift);
  } else {
    sort_shifts(list, tables.edges, tables.wide_shift);
  }
}

/// As make_slots() of list_layout.h does.
void sort_slots(ListTables& tables) {
  const std::vector<int64_t>& splits = tables.atoms.node_splits;
  std::vector<int> slot_of_node(tables.atoms.engine_row.size(), -1);
  tables.slot_node.clear();
  tables.slot_first.clear();
  tables.slot_splits.assign(1, 0);
  tables.slot_of_edge.resize(tables.neighbor.size());
  for (size_t group = 0; group + 1 < splits.size(); ++group) {
    const auto first_slot = static_cast<int>(tables.slot_node.size());
    const auto end = static_cast<size_t>(tables.begin[static_cast<size_t>(splits[group + 1])]);
    for (auto edge = static_cast<size_t>(tables.begin[static_cast<size_t>(splits[group])]); edge < end;
         ++edge) {
      int& slot = slot_of_node[static_cast<size_t>(tables.neighbor[edge])];
      if (slot < first_slot) {
        slot = static_cast<int>(tables.slot_node.size());
        tables.slot_node.push_back(tables.neighbor[edge]);
        tables.slot_first.push_back(0);
      }
      tables.slot_of_edge[edge] = slot;
      ++tables.slot_first[static_cast<size_t>(slot)];
    }
    tables.slot_splits.push_back(static_cast<int64_t>(tables.slot_node.size()));
  }
  tables.slot_first.push_back(0);
  counts_to_offsets(tables.slot_first);
  tables.slot_edges.resize(tables.neighbor.size());
  std::vector<int> next = tables.slot_first;
  for (size_t edge = 0; edge < tables.slot_of_edge.size(); ++edge) {
    const auto slot = static_cast<size_t>(tables.slot_of_edge[edge]);
    tables.slot_edges[static_cast<size_t>(next[slot]++)] = static_cast<int>(edge);
  }
}

/// Atoms of every type in every structure, (n_systems * n_types).
std::vector<double> composition_of_list(const NeighborList& list, int64_t n_types) {
  std::vector<double> composition(static_cast<size_t>(list.n_systems * n_types), 0.0);
  const auto* type = list.types.data<int64_t>();
  const auto* system = list.system_index.data<int64_t>();
  for (int64_t atom = 0; atom < list.system_index.size(0); ++atom) {
    composition[static_cast<size_t>(system[atom] * n_types + type[atom])] += 1.0;
  }
  return composition;
}

void add_runs(const std::vector<Run>& runs, Runs& to, Upload& upload) {
  to = {nullptr, static_cast<int64_t>(runs.size())};
  upload.add(runs, &to.first);
}

/// Of an edge of the engine's list.
void edge_vector(const NeighborList& list, int64_t edge, const double* positions, const double* cells,
                 double (&vector)[3]) {
  const int64_t from = list.edge_from.data<int64_t>()[edge];
  const int64_t to = list.edge_to.data<int64_t>()[edge];
  for (int c = 0; c < 3; ++c) vector[c] = positions[3 * to + c] - positions[3 * from + c];
  if (!list.edge_shift.defined()) return;
  const int64_t centre = list.edge_index.data<int64_t>()[edge];
  const int64_t* shift = list.edge_shift.data<int64_t>() + 3 * edge;
  const double* cell = cells + 9 * list.system_index.data<int64_t>()[centre];
  for (int c = 0; c < 3; ++c) {
    for (int row = 0; row < 3; ++row) vector[c] += static_cast<double>(shift[row]) * cell[3 * row + c];
  }
}

}  // namespace

void check_list_size(const NeighborList& list) {
  constexpr int64_t limit = std::numeric_limits<int>::max();
  const int64_t n_node = list.types.size(0);
  const int64_t n_edge = list.edge_index.size(1);
  if (n_node > limit || n_edge > limit) {
    throw Error("expected at most " + std::to_string(limit) +
                " atoms and listed neighbors per process, got " + std::to_string(n_node) + " and " +
                std::to_string(n_edge) + ": use more processes");
  }
}

void make_list_tables(const NeighborList& list, const GraphRules& rules, const BlockRules& blocks,
                      ListTables& tables) {
  tables.atoms = order_atoms(list, rules);
  sort_edges(tables, list, rules);
  sort_slots(tables);
  group_systems(tables, list);
  const std::vector<int64_t> slot_node(tables.slot_node.begin(), tables.slot_node.end());
  Grouped of_node = group_by(slot_node, static_cast<size_t>(list.types.size(0)));
  tables.node_first = std::move(of_node.first);
  tables.node_slot = std::move(of_node.items);
  make_runs(tables, blocks);
}

void DeviceList::add_tables(const NeighborList& list, Upload& upload) {
  graph_ = Graph();
  graph_.n_node = static_cast<int>(tables_.atoms.engine_row.size());
  graph_.n_local = static_cast<int>(tables_.atoms.model_row.size());
  graph_.n_list = static_cast<int>(tables_.edges.size());
  graph_.n_slot = static_cast<int>(tables_.slot_node.size());
  graph_.n_systems = static_cast<int>(list.n_systems);
  upload.add(tables_.begin, &graph_.list_first);
  upload.add(tables_.from, &graph_.list_from);
  upload.add(tables_.to, &graph_.list_to);
  upload.add(tables_.centre, &graph_.list_centre);
  upload.add(tables_.neighbor, &graph_.list_neighbor);
  upload.add(tables_.slot_of_edge, &graph_.list_slot);
  upload.add(tables_.slot_node, &graph_.slot_node);
  upload.add(tables_.slot_first, &graph_.slot_first);
  upload.add(tables_.slot_edges, &graph_.slot_list);
  upload.add(tables_.node_first, &graph_.node_first);
  upload.add(tables_.node_slot, &graph_.node_slot);
  upload.add(tables_.atoms.types, &graph_.type);
  upload.add(tables_.atoms.engine_row, &graph_.engine_row);
  upload.add(tables_.system, &graph_.system);
  upload.add(tables_.system_first, &graph_.system_first);
  upload.add(tables_.system_row, &graph_.system_row);
  add_runs(tables_.edge_runs, edge_runs_, upload);
  add_runs(tables_.angle_runs, angle_runs_, upload);
  add_runs(tables_.row_runs, row_runs_, upload);
  add_runs(tables_.slot_runs, slot_runs_, upload);
  if (!tables_.shift.empty()) upload.add(tables_.shift, &graph_.list_shift);
  if (!tables_.wide_shift.empty()) upload.add(tables_.wide_shift, &graph_.list_wide_shift);
}

void DeviceList::keep(const NeighborList& list, const GraphRules& rules) {
  used_ = groups_in_use(tables_.atoms.node_splits);
  composition_ = composition_of_list(list, rules.n_types);
  list_ = list;
}

void DeviceList::report_problem(int64_t edge, const double* positions, const double* cells) const {
  const int64_t e = tables_.edges[static_cast<size_t>(edge)];
  const auto* centres = list_.edge_index.data<int64_t>();
  const int64_t centre = centres[e];
  const int64_t neighbor = centres[list_.edge_index.size(1) + e];
  double vector[3];
  edge_vector(list_, e, positions, cells, vector);
  const std::string atoms =
      " between atoms " + std::to_string(centre) + " and " + std::to_string(neighbor) + ": ";
  if (!std::isfinite(vector[0] + vector[1] + vector[2])) {
    throw NotFiniteError("expected finite `edge_vec`, got (" + std::to_string(vector[0]) + ", " +
                             std::to_string(vector[1]) + ", " + std::to_string(vector[2]) + ") Angstrom" +
                             atoms + "check the positions and the cell",
                         centre);
  }
  throw OverlapError("expected distinct positions, got distance 0" + atoms + "remove the duplicate atom",
                     centre, neighbor);
}

}  // namespace moecalc::cuda
