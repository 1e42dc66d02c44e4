#include "graph/graph.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "graph/list_layout.h"

namespace moecalc {

void check_array(const Array& array, const char* name, Dtype dtype, const Shape& shape) {
  if (!array.defined()) throw Error(std::string("expected `") + name + "`, got none");
  if (array.dtype() != dtype) {
    throw Error(std::string("expected `") + name + "` to be " + name_of(dtype) + ", got " +
                name_of(array.dtype()));
  }
  bool fits = array.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  for (size_t d = 0; d < shape.size(); ++d) {
    fits = fits && (shape[d] < 0 || array.size(static_cast<int64_t>(d)) == shape[d]);
    expected += (d > 0 ? ", " : "") + (shape[d] < 0 ? std::string("any") : std::to_string(shape[d]));
  }
  if (!fits) {
    throw Error(std::string("expected `") + name + "` of shape " + expected + "], got " +
                shown(array.shape()));
  }
}

namespace {

constexpr int64_t max_systems = 1 << 24;

[[noreturn]] void out_of_range(const std::string& what, int64_t value, int64_t end) {
  throw Error("expected " + what + " in [0, " + std::to_string(end) + "), got " + std::to_string(value));
}

/// Checks the values of `types` and `system_index`, whose type and shape are checked already.
void check_atoms(const NeighborList& list, int64_t n_types) {
  const int64_t n_node = list.types.size(0);
  const int64_t n_local = list.system_index.size(0);
  if (n_local > n_node) {
    throw Error("expected `system_index` no longer than `types` (" + std::to_string(n_node) + "), got " +
                std::to_string(n_local));
  }
  const auto* type = list.types.data<int64_t>();
  const auto* system = list.system_index.data<int64_t>();
  for (int64_t i = 0; i < n_node; ++i) {
    if (type[i] < 0 || type[i] >= n_types) out_of_range("types[" + std::to_string(i) + "]", type[i], n_types);
  }
  for (int64_t i = 0; i < n_local; ++i) {
    if (system[i] < 0 || system[i] >= list.n_systems) {
      out_of_range("system_index[" + std::to_string(i) + "]", system[i], list.n_systems);
    }
  }
}

void check_edge(int64_t e, int64_t i, int64_t j, int64_t n_local, int64_t n_node) {
  if (i < 0 || i >= n_local) out_of_range("edge_index[0, " + std::to_string(e) + "] (a centre)", i, n_local);
  if (j < 0 || j >= n_node) out_of_range("edge_index[1, " + std::to_string(e) + "] (a neighbour)", j, n_node);
}

std::string triple(const double* vector) {
  return "(" + std::to_string(vector[0]) + ", " + std::to_string(vector[1]) + ", " +
         std::to_string(vector[2]) + ") Angstrom";
}

std::string pair_of_atoms(int64_t i, int64_t j) {
  return "atoms " + std::to_string(i) + " and " + std::to_string(j);
}

}  // namespace

NeighborList checked_list(const NeighborList& list, const GraphRules& rules) {
  if (list.n_systems < 1) throw Error("expected `n_systems` >= 1, got " + std::to_string(list.n_systems));
  if (list.n_systems > max_systems) {
    throw Error("expected `n_systems` of at most " + std::to_string(max_systems) + ", got " +
                std::to_string(list.n_systems));
  }
  check_array(list.types, "types", Dtype::int64, {-1});
  check_array(list.system_index, "system_index", Dtype::int64, {-1});
  check_array(list.edge_index, "edge_index", Dtype::int64, {2, -1});
  NeighborList out = list;
  const int64_t n_edge = list.edge_index.size(1);
  if (!out.edge_from.defined()) out.edge_from = list.edge_index.rows(0, 1).reshape({n_edge});
  if (!out.edge_to.defined()) out.edge_to = list.edge_index.rows(1, 1).reshape({n_edge});
  check_array(out.edge_from, "edge_from", Dtype::int64, {n_edge});
  check_array(out.edge_to, "edge_to", Dtype::int64, {n_edge});
  if (list.edge_shift.defined()) check_array(list.edge_shift, "edge_shift", Dtype::int64, {n_edge, 3});
  check_atoms(list, rules.n_types);
  const int64_t n_node = list.types.size(0);
  const int64_t n_local = list.system_index.size(0);
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const auto* from = out.edge_from.data<int64_t>();
  const auto* to = out.edge_to.data<int64_t>();
  const auto* system = list.system_index.data<int64_t>();
  for (int64_t e = 0; e < n_edge; ++e) {
    const int64_t i = centre[e];
    const int64_t j = neighbor[e];
    check_edge(e, i, j, n_local, n_node);
    if (j < n_local && system[i] != system[j]) {
      throw Error("expected edges within one structure, got an edge between " + pair_of_atoms(i, j) +
                  " of structures " + std::to_string(system[i]) + " and " + std::to_string(system[j]));
    }
    if (from[e] < 0 || to[e] < 0) {
      throw Error("expected rows of positions >= 0, got " + std::to_string(from[e]) + " and " +
                  std::to_string(to[e]) + " for edge " + std::to_string(e));
    }
  }
  return out;
}

int64_t position_rows(const NeighborList& list) {
  int64_t most = -1;
  for (const Array* rows : {&list.edge_from, &list.edge_to}) {
    const auto* row = rows->data<int64_t>();
    for (int64_t e = 0; e < rows->numel(); ++e) most = std::max(most, row[e]);
  }
  return most + 1;
}

void check_positions(const NeighborList& list, int64_t n_rows, const Array& positions, const Array& cells) {
  check_array(positions, "positions", Dtype::float64, {-1, 3});
  const int64_t n_position = positions.size(0);
  if (n_rows > n_position) {
    throw Error("expected `positions` of " + std::to_string(n_rows) +
                " or more rows, which the list names, got " + std::to_string(n_position) +
                ": set the list anew");
  }
  for (int64_t i = 0; i < n_position; ++i) {
    const double* row = positions.data<double>() + 3 * i;
    if (!std::isfinite(row[0] + row[1] + row[2])) {
      throw Error("expected finite `positions`, got " + triple(row) + " in row " + std::to_string(i));
    }
  }
  if (!list.edge_shift.defined()) return;
  check_array(cells, "cells", Dtype::float64, {list.n_systems, 3, 3});
  const auto* cell = cells.data<double>();
  for (int64_t k = 0; k < cells.numel(); ++k) {
    if (!std::isfinite(cell[k])) {
      throw Error("expected finite `cells`, got " + std::to_string(cell[k]) + " in structure " +
                  std::to_string(k / 9));
    }
  }
}

AngleIndex angle_index(const PreparedGraph& graph) {
  AngleIndex index;
  index.first.reserve(static_cast<size_t>(graph.n_angle));
  index.second.reserve(static_cast<size_t>(graph.n_angle));
  for (size_t i = 0; i < static_cast<size_t>(graph.n_local); ++i) {
    const int64_t begin = graph.edge_offset[i];
    const int64_t end = begin + graph.close_count[i];
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t k = begin; k < end; ++k) {
        index.first.push_back(j);
        index.second.push_back(k);
      }
    }
  }
  return index;
}

void GraphBuilder::set_list(const NeighborList& list, const GraphRules& rules) {
  has_list_ = false;
  cutoff_ = rules.cutoff;
  angle_cutoff_ = rules.angle_cutoff;
  shifted_ = list.edge_shift.defined();
  AtomOrder atoms = order_atoms(list, rules);
  EdgeOrder order = order_edges(list, rules, atoms);

  graph_.n_node = list.types.size(0);
  graph_.n_local = list.system_index.size(0);
  graph_.n_systems = list.n_systems;
  const auto* system = list.system_index.data<int64_t>();
  graph_.system.resize(static_cast<size_t>(graph_.n_local));
  graph_.composition.assign(static_cast<size_t>(list.n_systems * rules.n_types), 0.0);
  const auto* type = list.types.data<int64_t>();
  for (int64_t i = 0; i < graph_.n_local; ++i) {
    graph_.system[static_cast<size_t>(atoms.model_row[static_cast<size_t>(i)])] = system[i];
    graph_.composition[static_cast<size_t>(system[i] * rules.n_types + type[i])] += 1.0;
  }

  const int64_t n_listed = list.edge_index.size(1);
  const int64_t* neighbor = list.edge_index.data<int64_t>() + n_listed;
  const auto* from = list.edge_from.data<int64_t>();
  const auto* to = list.edge_to.data<int64_t>();
  const auto* shift = shifted_ ? list.edge_shift.data<int64_t>() : nullptr;
  edges_.clear();
  edges_.reserve(order.edges.size());
  for (const int64_t e : order.edges) {
    const bool is_local = neighbor[e] < graph_.n_local;
    const int64_t row = is_local ? atoms.model_row[static_cast<size_t>(neighbor[e])] : neighbor[e];
    Edge edge{from[e], to[e], row, e, {0.0, 0.0, 0.0}};
    if (shifted_) std::copy_n(shift + 3 * e, 3, edge.shift);  // whole numbers, as they are multiplied
    edges_.push_back(edge);
  }
  edge_begin_ = std::move(order.begin);
  graph_.types = std::move(atoms.types);
  graph_.engine_row = std::move(atoms.engine_row);
  graph_.model_row = std::move(atoms.model_row);
  graph_.node_splits = std::move(atoms.node_splits);
  has_list_ = true;
}

/// Of positions, and of the cells that lie between them.
void GraphBuilder::measure(const Edge& edge, const double* positions, const double* cell,
                           double* vector) const {
  for (int c = 0; c < 3; ++c) {
    vector[c] = positions[3 * edge.to + c] - positions[3 * edge.from + c];
    if (cell != nullptr) {
      vector[c] += edge.shift[0] * cell[c] + edge.shift[1] * cell[3 + c] + edge.shift[2] * cell[6 + c];
    }
  }
}

void GraphBuilder::put(int64_t centre, const Placed& edge) {
  const auto at = static_cast<size_t>(n_placed_++);
  graph_.centre[at] = centre;
  graph_.neighbor[at] = edge.neighbor;
  graph_.list_edge[at] = edge.id;
  std::copy_n(edge.vector, 3, graph_.edge_vec.data() + 3 * at);
}

void GraphBuilder::refuse_edge(int64_t centre, const Placed& edge, double distance) const {
  const int64_t i = graph_.engine_row[static_cast<size_t>(centre)];
  const int64_t j = graph_.engine_row[static_cast<size_t>(edge.neighbor)];
  if (distance == 0.0) {
    throw OverlapError("expected distinct positions, got distance 0 between " + pair_of_atoms(i, j) +
                           ": remove the duplicate atom",
                       i, j);
  }
  throw NotFiniteError("expected finite edge vectors, got " + triple(edge.vector) + " between " +
                           pair_of_atoms(i, j) + ": check the positions and the cell",
                       i);
}

/// The edges of a centre, close ones first.
void GraphBuilder::place_edges(int64_t centre, const double* positions, const double* cell) {
  const auto row = static_cast<size_t>(centre);
  const int64_t begin = n_placed_;
  far_.clear();
  const auto end = static_cast<size_t>(edge_begin_[row + 1]);
  for (auto k = static_cast<size_t>(edge_begin_[row]); k < end; ++k) {
    Placed edge{edges_[k].neighbor, edges_[k].id, {0.0, 0.0, 0.0}};
    measure(edges_[k], positions, cell, edge.vector);
    const double* vector = edge.vector;
    const double distance = std::sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2]);
    if (distance > cutoff_ && std::isfinite(distance)) continue;
    if (!(distance <= cutoff_ && distance > 0.0)) refuse_edge(centre, edge, distance);
    if (distance < angle_cutoff_) {
      put(centre, edge);
    } else {
      far_.push_back(edge);
    }
  }
  const int64_t n_close = n_placed_ - begin;
  for (const Placed& edge : far_) put(centre, edge);
  graph_.edge_offset.push_back(n_placed_);
  graph_.close_count.push_back(n_close);
  graph_.angle_offset.push_back(graph_.angle_offset.back() + n_close * n_close);
  graph_.max_neighbors = std::max(graph_.max_neighbors, n_placed_ - begin);
  graph_.max_angle_neighbors = std::max(graph_.max_angle_neighbors, n_close);
}

void GraphBuilder::resize_edges(size_t n_edge) {
  graph_.centre.resize(n_edge);
  graph_.neighbor.resize(n_edge);
  graph_.list_edge.resize(n_edge);
  graph_.edge_vec.resize(3 * n_edge);
}

const PreparedGraph& GraphBuilder::prepare(const Array& positions, const Array& cells) {
  const double* cell = shifted_ ? cells.data<double>() : nullptr;
  graph_.max_neighbors = 0;
  graph_.max_angle_neighbors = 0;
  resize_edges(edges_.size());
  graph_.edge_offset.assign(1, 0);
  graph_.angle_offset.assign(1, 0);
  graph_.close_count.clear();
  n_placed_ = 0;
  for (int64_t centre = 0; centre < graph_.n_local; ++centre) {
    const int64_t system = graph_.system[static_cast<size_t>(centre)];
    place_edges(centre, positions.data<double>(), shifted_ ? cell + 9 * system : nullptr);
  }
  graph_.n_edge = n_placed_;
  graph_.n_angle = graph_.angle_offset.back();
  resize_edges(static_cast<size_t>(n_placed_));
  graph_.edge_splits.clear();
  graph_.angle_splits.clear();
  for (const int64_t node : graph_.node_splits) {
    graph_.edge_splits.push_back(graph_.edge_offset[static_cast<size_t>(node)]);
    graph_.angle_splits.push_back(graph_.angle_offset[static_cast<size_t>(node)]);
  }
  return graph_;
}

ListedEdges list_of_edges(const Array& types, const Array& edge_index, const Array& edge_vec,
                          const Array& system_index, int64_t n_systems) {
  check_array(edge_index, "edge_index", Dtype::int64, {2, -1});
  const int64_t n_edge = edge_index.size(1);
  check_array(edge_vec, "edge_vec", Dtype::float64, {n_edge, 3});
  ListedEdges out;
  out.list.types = types;
  out.list.edge_index = edge_index;
  out.list.edge_from = Array::zeros({n_edge}, Dtype::int64);
  out.list.edge_to = Array::empty({n_edge}, Dtype::int64);
  auto* to = out.list.edge_to.data<int64_t>();
  for (int64_t e = 0; e < n_edge; ++e) to[e] = e + 1;
  out.list.system_index = system_index;
  out.list.n_systems = n_systems;
  out.positions = Array::zeros({n_edge + 1, 3}, Dtype::float64);
  std::copy_n(edge_vec.data<double>(), 3 * n_edge, out.positions.data<double>() + 3);
  return out;
}

}  // namespace moecalc
