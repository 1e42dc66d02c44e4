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
  if (n_local > n_node) {
    throw Error("expected `system_index` no longer than `types` (" + std::to_string(n_node) + "), got " +
                std::to_string(n_local));
  }
  const int64_t n_types = rules.n_types;
  const int64_t* type = types_in.const_data_ptr<int64_t>();
  const int64_t* system = system_in.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n_node; ++i) {
    if (type[i] < 0 || type[i] >= n_types) out_of_range("types[" + std::to_string(i) + "]", type[i], n_types);
  }
  for (int64_t i = 0; i < n_local; ++i) {
    if (system[i] < 0 || system[i] >= graph.n_systems) {
      out_of_range("system_index[" + std::to_string(i) + "]", system[i], graph.n_systems);
    }
  }

  PreparedGraph out;
  out.n_node = n_node;
  out.n_local = n_local;

  // Nodes: stable counting sort of the local atoms by group.
  const int64_t n_group = rules.group_by_system ? graph.n_systems : n_types;
  const int64_t* group = rules.group_by_system ? system : type;
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
  for (int64_t i = 0; i < n_node; ++i) new_type[i] = type[engine_row[i]];

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
    if (i < 0 || i >= n_local)
      out_of_range("edge_index[0, " + std::to_string(e) + "] (a centre)", i, n_local);
    if (j < 0 || j >= n_node)
      out_of_range("edge_index[1, " + std::to_string(e) + "] (a neighbour)", j, n_node);
    const double x = vec[3 * e], y = vec[3 * e + 1], z = vec[3 * e + 2];
    const double r = std::sqrt(x * x + y * y + z * z);
    if (!std::isfinite(r)) {
      throw Error("expected finite `edge_vec`, got (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                  std::to_string(z) + ") Angstrom between atoms " + std::to_string(i) + " and " +
                  std::to_string(j) + ": check the positions and the cell");
    }
    if (r > rules.cutoff || pair_mask[type[i] * n_types + type[j]] == 0) continue;
    if (r == 0.0) {
      throw Error("expected distinct positions, got distance 0 between atoms " + std::to_string(i) + " and " +
                  std::to_string(j) + ": remove the duplicate atom");
    }
    if (j < n_local && system[i] != system[j]) {
      throw Error("expected edges within one structure, got an edge between atoms " + std::to_string(i) +
                  " and " + std::to_string(j) + " of structures " + std::to_string(system[i]) + " and " +
                  std::to_string(system[j]));
    }
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

}  // namespace moecalc
