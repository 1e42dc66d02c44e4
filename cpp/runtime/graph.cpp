#include "graph.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <string>

namespace moecalc {
namespace {

std::string shape_of(const at::Tensor& tensor) {
  std::ostringstream text;
  text << tensor.sizes();
  return text.str();
}

const char* name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kLong:
      return "int64";
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    default:
      return at::toString(dtype);
  }
}

/// Checks type, place and shape (-1 = any length), and returns the tensor contiguous.
at::Tensor checked(const at::Tensor& tensor, const char* name, at::ScalarType dtype,
                   const std::vector<int64_t>& shape) {
  if (!tensor.defined()) throw Error(std::string("expected `") + name + "`, got an undefined tensor");
  if (tensor.scalar_type() != dtype || !tensor.is_cpu()) {
    throw Error(std::string("expected `") + name + "` to be " + name_of(dtype) + " on the CPU, got " +
                name_of(tensor.scalar_type()) + " on " + tensor.device().str());
  }
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  for (size_t d = 0; d < shape.size(); ++d) {
    fits = fits && (shape[d] < 0 || tensor.size(static_cast<int64_t>(d)) == shape[d]);
    expected += (d > 0 ? ", " : "") + (shape[d] < 0 ? std::string("any") : std::to_string(shape[d]));
  }
  if (!fits) {
    throw Error(std::string("expected `") + name + "` of shape " + expected + "], got " + shape_of(tensor));
  }
  return tensor.contiguous();
}

[[noreturn]] void out_of_range(const std::string& what, int64_t value, int64_t end) {
  throw Error("expected " + what + " in [0, " + std::to_string(end) + "), got " + std::to_string(value));
}

at::Tensor empty(std::initializer_list<int64_t> shape, at::ScalarType dtype) {
  return at::empty(at::IntArrayRef(shape.begin(), shape.size()), at::TensorOptions().dtype(dtype));
}

/// Turns counts[0..n-1] (with counts[n] unused) into offsets[0..n].
void counts_to_offsets(std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (int64_t& count : counts) {
    const int64_t offset = total;
    total += count;
    count = offset;
  }
}

/// Checks the values of `types` and `system_index`, whose type and shape are checked already.
void check_atoms(const at::Tensor& types, const at::Tensor& system_index, int64_t n_systems,
                 int64_t n_types) {
  const int64_t n_node = types.size(0), n_local = system_index.size(0);
  if (n_local > n_node) {
    throw Error("expected `system_index` no longer than `types` (" + std::to_string(n_node) + "), got " +
                std::to_string(n_local));
  }
  const int64_t* type = types.const_data_ptr<int64_t>();
  const int64_t* system = system_index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n_node; ++i) {
    if (type[i] < 0 || type[i] >= n_types) out_of_range("types[" + std::to_string(i) + "]", type[i], n_types);
  }
  for (int64_t i = 0; i < n_local; ++i) {
    if (system[i] < 0 || system[i] >= n_systems) {
      out_of_range("system_index[" + std::to_string(i) + "]", system[i], n_systems);
    }
  }
}

void check_edge(int64_t e, int64_t i, int64_t j, int64_t n_local, int64_t n_node) {
  if (i < 0 || i >= n_local) out_of_range("edge_index[0, " + std::to_string(e) + "] (a centre)", i, n_local);
  if (j < 0 || j >= n_node) out_of_range("edge_index[1, " + std::to_string(e) + "] (a neighbour)", j, n_node);
}

void check_vector(const double* vec, int64_t i, int64_t j) {
  if (std::isfinite(vec[0] * vec[0] + vec[1] * vec[1] + vec[2] * vec[2])) return;
  throw Error("expected finite `edge_vec`, got (" + std::to_string(vec[0]) + ", " + std::to_string(vec[1]) +
              ", " + std::to_string(vec[2]) + ") Angstrom between atoms " + std::to_string(i) + " and " +
              std::to_string(j) + ": check the positions and the cell");
}

[[noreturn]] void between_structures(int64_t i, int64_t j, const int64_t* system) {
  throw Error("expected edges within one structure, got an edge between atoms " + std::to_string(i) +
              " and " + std::to_string(j) + " of structures " + std::to_string(system[i]) + " and " +
              std::to_string(system[j]));
}

/// An edge within the cutoff.
struct KeptEdge {
  int64_t edge;  // position in the engine's list
  bool close;    // within the angle cutoff
};

}  // namespace

PreparedGraph prepare_graph(const AtomicGraph& graph, const GraphRules& rules, bool with_angle_index) {
  if (graph.n_systems < 1) throw Error("expected `n_systems` >= 1, got " + std::to_string(graph.n_systems));
  const at::Tensor types_in = checked(graph.types, "types", at::kLong, {-1});
  const at::Tensor system_in = checked(graph.system_index, "system_index", at::kLong, {-1});
  const at::Tensor index_in = checked(graph.edge_index, "edge_index", at::kLong, {2, -1});
  const at::Tensor vec_in = checked(graph.edge_vec, "edge_vec", at::kDouble, {index_in.size(1), 3});
  const int64_t n_node = types_in.size(0), n_local = system_in.size(0), n_edge_in = index_in.size(1);
  const int64_t n_types = rules.n_types;
  check_atoms(types_in, system_in, graph.n_systems, n_types);
  const int64_t* type = types_in.const_data_ptr<int64_t>();
  const int64_t* system = system_in.const_data_ptr<int64_t>();

  PreparedGraph out;
  out.n_node = n_node;
  out.n_local = n_local;

  // Nodes: stable counting sort of the local atoms by group. Ghosts have the one condition that there is
  // then.
  std::vector<int64_t> full_type(type, type + n_node);
  for (int64_t i = 0; i < n_node; ++i) {
    full_type[static_cast<size_t>(i)] += n_types * rules.condition(i < n_local ? system[i] : 0);
  }
  const int64_t n_group = rules.n_groups(graph.n_systems);
  const int64_t* group = rules.group_by_system ? system : rules.group_by_condition ? full_type.data() : type;
  out.node_splits.assign(static_cast<size_t>(n_group) + 1, 0);
  for (int64_t i = 0; i < n_local; ++i) ++out.node_splits[static_cast<size_t>(group[i])];
  counts_to_offsets(out.node_splits);
  out.types = empty({n_node}, at::kLong);
  out.engine_row = empty({n_node}, at::kLong);
  out.model_row = empty({n_local}, at::kLong);
  auto* new_type = out.types.mutable_data_ptr<int64_t>();
  auto* engine_row = out.engine_row.mutable_data_ptr<int64_t>();
  auto* model_row = out.model_row.mutable_data_ptr<int64_t>();
  {
    std::vector<int64_t> next = out.node_splits;
    for (int64_t i = 0; i < n_local; ++i) model_row[i] = next[static_cast<size_t>(group[i])]++;
  }
  for (int64_t i = 0; i < n_local; ++i) engine_row[model_row[i]] = i;
  std::iota(engine_row + n_local, engine_row + n_node, n_local);
  for (int64_t i = 0; i < n_node; ++i) new_type[i] = full_type[static_cast<size_t>(engine_row[i])];

  // Edges: keep those within the cutoff, count them per centre.
  const int64_t* centre = index_in.const_data_ptr<int64_t>();
  const int64_t* neighbor = centre + n_edge_in;
  const double* vec = vec_in.const_data_ptr<double>();
  const uint8_t* pair_mask = rules.pair_mask.data();
  std::vector<KeptEdge> kept;
  kept.reserve(static_cast<size_t>(n_edge_in));
  std::vector<int64_t> edge_offset(static_cast<size_t>(n_local) + 1, 0);
  std::vector<int64_t> close_count(static_cast<size_t>(n_local), 0);
  for (int64_t e = 0; e < n_edge_in; ++e) {
    const int64_t i = centre[e], j = neighbor[e];
    check_edge(e, i, j, n_local, n_node);
    const double x = vec[3 * e], y = vec[3 * e + 1], z = vec[3 * e + 2];
    const double r = std::sqrt(x * x + y * y + z * z);
    check_vector(vec + 3 * e, i, j);
    if (r > rules.cutoff || pair_mask[type[i] * n_types + type[j]] == 0) continue;
    if (r == 0.0) {
      throw Error("expected distinct positions, got distance 0 between atoms " + std::to_string(i) + " and " +
                  std::to_string(j) + ": remove the duplicate atom");
    }
    if (j < n_local && system[i] != system[j]) between_structures(i, j, system);
    const bool close = r < rules.angle_cutoff;
    kept.push_back({e, close});
    const auto row = static_cast<size_t>(model_row[i]);
    ++edge_offset[row];
    close_count[row] += close ? 1 : 0;
  }
  for (int64_t row = 0; row < n_local; ++row) {
    out.max_neighbors = std::max(out.max_neighbors, edge_offset[static_cast<size_t>(row)]);
    out.max_angle_neighbors = std::max(out.max_angle_neighbors, close_count[static_cast<size_t>(row)]);
  }
  counts_to_offsets(edge_offset);

  // Stable counting sort of the kept edges by centre.
  const auto n_edge = static_cast<int64_t>(kept.size());
  out.n_edge = n_edge;
  out.edge_index = empty({2, n_edge}, at::kLong);
  out.edge_vec = empty({n_edge, 3}, at::kDouble);
  auto* new_centre = out.edge_index.mutable_data_ptr<int64_t>();
  int64_t* new_neighbor = new_centre + n_edge;
  auto* new_vec = out.edge_vec.mutable_data_ptr<double>();
  {
    // Angle neighbours first: their rows are then one block.
    std::vector<int64_t> next_close = edge_offset, next_far = edge_offset;
    for (size_t row = 0; row < close_count.size(); ++row) next_far[row] += close_count[row];
    for (const KeptEdge& item : kept) {
      const int64_t row = model_row[centre[item.edge]], j = neighbor[item.edge];
      const int64_t place = (item.close ? next_close : next_far)[static_cast<size_t>(row)]++;
      new_centre[place] = row;
      new_neighbor[place] = j < n_local ? model_row[j] : j;
      std::copy_n(vec + 3 * item.edge, 3, new_vec + 3 * place);
    }
  }

  // Angles: all ordered pairs of close edges of one centre, j = k included.
  std::vector<int64_t> angle_offset(static_cast<size_t>(n_local) + 1, 0);
  for (size_t row = 0; row < close_count.size(); ++row)
    angle_offset[row] = close_count[row] * close_count[row];
  counts_to_offsets(angle_offset);
  out.n_angle = angle_offset.back();
  if (with_angle_index) {
    out.angle_index = empty({2, out.n_angle}, at::kLong);
    auto* first = out.angle_index.mutable_data_ptr<int64_t>();
    int64_t* second = first + out.n_angle;
    for (size_t row = 0; row < close_count.size(); ++row) {
      const int64_t m = close_count[row], begin = edge_offset[row];
      for (int64_t j = 0; j < m; ++j) {
        const int64_t place = angle_offset[row] + j * m;
        std::fill_n(first + place, m, begin + j);
        std::iota(second + place, second + place + m, begin);
      }
    }
  }

  // Groups are contiguous blocks of nodes, hence of their edges and angles.
  for (const int64_t node : out.node_splits) {
    out.edge_splits.push_back(edge_offset[static_cast<size_t>(node)]);
    out.angle_splits.push_back(angle_offset[static_cast<size_t>(node)]);
  }

  out.edge_offset = std::move(edge_offset);
  out.angle_offset = std::move(angle_offset);
  out.close_count = std::move(close_count);
  if (rules.group_by_system) {
    out.composition = at::zeros({graph.n_systems, n_types}, at::TensorOptions().dtype(at::kDouble));
    auto* count = out.composition.mutable_data_ptr<double>();
    for (int64_t i = 0; i < n_local; ++i) count[system[i] * n_types + type[i]] += 1.0;
  }
  return out;
}

NeighborList checked_list(const NeighborList& list, const GraphRules& rules) {
  if (list.n_systems < 1) throw Error("expected `n_systems` >= 1, got " + std::to_string(list.n_systems));
  NeighborList out;
  out.n_systems = list.n_systems;
  out.types = checked(list.types, "types", at::kLong, {-1});
  out.system_index = checked(list.system_index, "system_index", at::kLong, {-1});
  out.edge_index = checked(list.edge_index, "edge_index", at::kLong, {2, -1});
  const int64_t n_edge = out.edge_index.size(1);
  out.edge_from = checked(list.edge_from, "edge_from", at::kLong, {n_edge});
  out.edge_to = checked(list.edge_to, "edge_to", at::kLong, {n_edge});
  if (list.edge_shift.defined()) {
    out.edge_shift = checked(list.edge_shift, "edge_shift", at::kLong, {n_edge, 3});
  }
  check_atoms(out.types, out.system_index, list.n_systems, rules.n_types);
  const int64_t n_node = out.types.size(0), n_local = out.system_index.size(0);
  const int64_t* centre = out.edge_index.const_data_ptr<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const int64_t* from = out.edge_from.const_data_ptr<int64_t>();
  const int64_t* to = out.edge_to.const_data_ptr<int64_t>();
  const int64_t* system = out.system_index.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < n_edge; ++e) {
    const int64_t i = centre[e], j = neighbor[e];
    check_edge(e, i, j, n_local, n_node);
    if (j < n_local && system[i] != system[j]) between_structures(i, j, system);
    if (from[e] < 0 || to[e] < 0) {
      throw Error("expected rows of positions >= 0, got " + std::to_string(from[e]) + " and " +
                  std::to_string(to[e]) + " for edge " + std::to_string(e));
    }
  }
  return out;
}

int64_t position_rows(const NeighborList& list) {
  if (list.edge_index.size(1) == 0) return 0;
  return 1 + std::max(list.edge_from.max().item<int64_t>(), list.edge_to.max().item<int64_t>());
}

void check_positions(const NeighborList& list, int64_t n_rows, const at::Tensor& positions,
                     const at::Tensor& cells) {
  const at::Tensor x_in = checked(positions, "positions", at::kDouble, {-1, 3});
  const int64_t n_position = x_in.size(0);
  if (n_rows > n_position) {
    throw Error("expected `positions` of " + std::to_string(n_rows) +
                " or more rows, which the list names, got " + std::to_string(n_position) +
                ": set the list anew");
  }
  const auto* x = x_in.const_data_ptr<double>();
  for (int64_t i = 0; i < n_position; ++i) {
    if (!std::isfinite(x[3 * i] + x[3 * i + 1] + x[3 * i + 2])) {
      throw Error("expected finite `positions`, got (" + std::to_string(x[3 * i]) + ", " +
                  std::to_string(x[3 * i + 1]) + ", " + std::to_string(x[3 * i + 2]) + ") Angstrom in row " +
                  std::to_string(i));
    }
  }
  if (!list.edge_shift.defined()) return;
  const at::Tensor cells_in = checked(cells, "cells", at::kDouble, {list.n_systems, 3, 3});
  const auto* cell = cells_in.const_data_ptr<double>();
  for (int64_t k = 0; k < cells_in.numel(); ++k) {
    if (!std::isfinite(cell[k])) {
      throw Error("expected finite `cells`, got " + std::to_string(cell[k]) + " in structure " +
                  std::to_string(k / 9));
    }
  }
}

AtomicGraph graph_of_list(const NeighborList& list, const at::Tensor& positions, const at::Tensor& cells) {
  const int64_t n_edge = list.edge_index.size(1);
  const at::Tensor x_in = positions.contiguous();
  const auto* x = x_in.const_data_ptr<double>();
  const int64_t* centre = list.edge_index.const_data_ptr<int64_t>();
  const int64_t* from = list.edge_from.const_data_ptr<int64_t>();
  const int64_t* to = list.edge_to.const_data_ptr<int64_t>();
  const int64_t* system = list.system_index.const_data_ptr<int64_t>();
  const bool shifted = list.edge_shift.defined();
  const at::Tensor cells_in = shifted ? cells.contiguous() : at::Tensor();
  const double* cell = shifted ? cells_in.const_data_ptr<double>() : nullptr;
  const int64_t* shift = shifted ? list.edge_shift.const_data_ptr<int64_t>() : nullptr;

  AtomicGraph graph{list.types, list.edge_index, empty({n_edge, 3}, at::kDouble), list.system_index,
                    list.n_systems};
  auto* vec = graph.edge_vec.mutable_data_ptr<double>();
  for (int64_t e = 0; e < n_edge; ++e) {
    for (int a = 0; a < 3; ++a) {
      double d = x[3 * to[e] + a] - x[3 * from[e] + a];
      if (shifted) {
        const double* h = cell + 9 * system[centre[e]];
        const int64_t* s = shift + 3 * e;
        d += static_cast<double>(s[0]) * h[a] + static_cast<double>(s[1]) * h[3 + a] +
             static_cast<double>(s[2]) * h[6 + a];
      }
      vec[3 * e + a] = d;
    }
  }
  return graph;
}

std::pair<NeighborList, at::Tensor> list_of_graph(const AtomicGraph& graph, const GraphRules& rules) {
  const int64_t n_edge = checked(graph.edge_index, "edge_index", at::kLong, {2, -1}).size(1);
  const at::Tensor vec = checked(graph.edge_vec, "edge_vec", at::kDouble, {n_edge, 3});
  const auto integers = at::TensorOptions().dtype(at::kLong);
  NeighborList list{graph.types,
                    graph.edge_index,
                    at::zeros({n_edge}, integers),
                    at::arange(1, n_edge + 1, integers),
                    at::Tensor(),
                    graph.system_index,
                    graph.n_systems};
  list = checked_list(list, rules);
  const auto* d = vec.const_data_ptr<double>();
  const int64_t* centre = list.edge_index.const_data_ptr<int64_t>();
  for (int64_t e = 0; e < n_edge; ++e) check_vector(d + 3 * e, centre[e], centre[n_edge + e]);
  return {list, at::cat({at::zeros({1, 3}, vec.options()), vec})};
}

}  // namespace moecalc
