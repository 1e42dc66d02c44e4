#include "package/packed_weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <set>
#include <utility>

#include "core/transpose.h"
#include "moecalc/error.h"

namespace moecalc {

using namespace kernels;

namespace {

Activation activation_of(const ActivationSource& phi) {
  const std::optional<Activation> known = kernel_activation(phi);
  if (!known) throw Unsupported{"activation " + phi.kind};
  return *known;
}

template <class Real>
std::vector<Real> padded_row(const double* values, int64_t count, int64_t width) {
  std::vector<Real> row(static_cast<size_t>(width), Real(0));
  for (int64_t d = 0; d < count; ++d) row[static_cast<size_t>(d)] = static_cast<Real>(values[d]);
  return row;
}

/// (rows, inner) times (inner, columns), float64.
Array product(const Array& left, const Array& right) {
  const int64_t rows = left.size(0);
  const int64_t inner = left.size(1);
  const int64_t columns = right.size(1);
  const Array out = Array::zeros({rows, columns}, Dtype::float64);
  const auto* factors = left.data<double>();
  const auto* summands = right.data<double>();
  auto* to = out.data<double>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < inner; ++k) {
      const double factor = factors[r * inner + k];
      for (int64_t c = 0; c < columns; ++c) to[r * columns + c] += factor * summands[k * columns + c];
    }
  }
  return out;
}

}  // namespace

template <class Real>
void sum_products(const Real* start,
                  std::initializer_list<std::pair<const std::vector<Real>*, const Real*>> products,
                  int64_t columns, Real* out) {
  std::vector<double> sums(static_cast<size_t>(columns), 0.0);
  if (start != nullptr) sums.assign(start, start + columns);
  for (const auto& [row, matrix] : products) {
    for (size_t k = 0; k < row->size(); ++k) {
      for (size_t c = 0; c < sums.size(); ++c) {
        sums[c] += double((*row)[k]) * double(matrix[k * sums.size() + c]);
      }
    }
  }
  std::transform(sums.begin(), sums.end(), out, [](double sum) { return Real(sum); });
}

// --- reading the package ---

template <class Real>
PackedWeights<Real>::PackedWeights(const Architecture& model, const Kernels<Real>& kernels,
                                   std::optional<int64_t> kept_bytes, std::function<int64_t()> memory_left)
    : model_(model), kernels_(kernels), kept_bytes_(kept_bytes), memory_left_(std::move(memory_left)) {
  for (const LayerSource& layer : model.layers) {
    if (layer.sequential) throw Unsupported{"sequential_update"};
    LayerShape shape = layer.shape;
    shape.n_padded = padded<Real>(shape.n);
    shape.e_padded = padded<Real>(shape.e);
    shape.a_padded = padded<Real>(shape.a);
    shape.activation = activation_of(layer.phi);
    weights_.shapes.push_back(shape);
  }
  read_embedding();
  pack_updates();
}

/// Edges: x W_e + b_e. Angles: a = cos W_a / sqrt(pi).
template <class Real>
void PackedWeights<Real>::read_embedding() {
  const EmbeddingSource& source = model_.embedding;
  const LayerShape& shape = weights_.shapes[0];
  weights_.use_dist = source.use_dist;
  weights_.phi = activation_of(source.phi);
  weights_.edge_matrix = padded_row<Real>(source.edge_matrix.data<double>(), shape.e, shape.e_padded);
  weights_.edge_bias = padded_row<Real>(source.edge_bias.data<double>(), shape.e, shape.e_padded);
  if (!shape.with_angles) return;
  const double root_pi = std::sqrt(3.14159265358979323846);
  std::vector<double> direction;
  for (int64_t d = 0; d < shape.a; ++d) direction.push_back(source.angle_matrix.data<double>()[d] / root_pi);
  weights_.angle_direction = padded_row<Real>(direction.data(), shape.a, shape.a_padded);
}

template <class Real>
void PackedWeights<Real>::set_tables(const TypeTables& tables) {
  const LayerShape& shape = weights_.shapes[0];
  weights_.node_table.clear();
  for (int64_t t = 0; t < tables.nodes.size(0); ++t) {
    std::vector<Real> row =
        padded_row<Real>(tables.nodes.data<double>() + t * shape.n, shape.n, shape.n_padded);
    kernels_.activate(weights_.phi, row.data(), shape.n_padded);
    weights_.node_table.insert(weights_.node_table.end(), row.begin(), row.end());
  }
}

template <class Real>
void PackedWeights<Real>::pack_updates() {
  const auto padded_rows = [&](const Array& rows, int64_t width) -> const Real* {
    const int64_t n_row = rows.size(0);
    const int64_t columns = rows.size(1);
    std::vector<Real> values(static_cast<size_t>(n_row * width), Real(0));
    for (int64_t r = 0; r < n_row; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        values[static_cast<size_t>(r * width + c)] = static_cast<Real>(rows.data<double>()[r * columns + c]);
      }
    }
    update_memory_.push_back(std::move(values));
    return update_memory_.back().data();
  };
  for (size_t layer = 0; layer < model_.layers.size(); ++layer) {
    const LayerSource& source = model_.layers[layer];
    const LayerShape& shape = weights_.shapes[layer];
    UpdateVectors<Real> update;
    update.node = padded_rows(source.update_node, shape.n_padded);
    if (shape.live_edge) update.edge = padded_rows(source.update_edge, shape.e_padded);
    if (shape.live_angle) update.angle = padded_rows(source.update_angle, shape.a_padded);
    weights_.updates.push_back(update);
  }
}

// --- weights per routing group ---

namespace {

/// sum_k weights[k] values[k] of (K, ...) float64, as (1, ...).
Array mixed_rows(const Array& values, const std::vector<double>& weights) {
  Shape shape = values.shape();
  shape[0] = 1;
  const Array out = Array::zeros(shape, Dtype::float64);
  const int64_t size = out.numel();
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto* from = values.data<double>() + static_cast<int64_t>(k) * size;
    auto* to = out.data<double>();
    for (int64_t d = 0; d < size; ++d) to[d] += from[d] * weights[k];
  }
  return out;
}

}  // namespace

template <class Real>
Array PackedWeights<Real>::biases_of(const Active& active) {
  const Array bias = active.position->bias.select(active.experts);
  return active.merged.empty() ? bias : mixed_rows(bias, active.merged);
}

template <class Real>
auto PackedWeights<Real>::weights_of(const Active& active) -> Weights {
  const StoredArray& matrix = active.position->matrix;
  if (active.merged.empty()) return {matrix.select(active.experts, dtype_of<Real>), biases_of(active)};
  const Array all = matrix.select(active.experts, Dtype::float64);
  return {mixed_rows(all, active.merged).to(dtype_of<Real>), biases_of(active)};
}

// --- blocks of weights ---

/// Blocks of a layer; those from `own` on are of one group alone.
enum class BlockKind : int64_t { node = 0, sym = 1, edge = 2, angle = 3, message_map = 4, own = 16 };

/// Shapes of the parts of a block.
template <class Real>
struct PackedWeights<Real>::Layout {
  std::vector<typename Block::Part> parts;

  /// Index of a matrix; its transpose is the part behind it.
  size_t matrix(int64_t rows, int64_t columns) {
    parts.push_back({0, rows, columns, true});
    parts.push_back({0, columns, rows, true});
    return parts.size() - 2;
  }
  size_t row(int64_t columns) {
    parts.push_back({0, 1, columns, false});
    return parts.size() - 1;
  }
};

/// A map of a block: every expert has heads of `width` outputs, padded to `stride` columns.
template <class Real>
struct PackedWeights<Real>::MapColumns {
  Active active;
  int64_t first;  // column of the block
  int64_t heads;
  int64_t width;
  int64_t stride;
};

/// The weights of one group in one layer, while they are laid out.
template <class Real>
struct PackedWeights<Real>::Target {
  size_t layer;
  int64_t group;
  std::vector<std::shared_ptr<Block>>& blocks;
  GroupWeights<Real>& weights;
  // What is this group's alone: routing weights, and what follows from them.
  Layout own;
  std::vector<std::pair<const Real**, std::vector<Real>>> own_rows;

  void keep_row(const Real*& to, const std::vector<double>& values) {
    own.row(static_cast<int64_t>(values.size()));
    own_rows.emplace_back(&to, std::vector<Real>(values.begin(), values.end()));
  }
};

template <class Real>
auto PackedWeights<Real>::active(const Target& target, const char* name) const -> Active {
  Active active;
  active.position = model_.layers[target.layer].find(name);
  if (!active.position->routed) {
    active.experts = {0};
    active.routing = {1.0};
    return active;
  }
  const Routes& routes = routes_[target.layer].at(active.position->router);
  active.experts = routes.experts[static_cast<size_t>(target.group)];
  // as the network has them
  for (const double weight : routes.weights[static_cast<size_t>(target.group)]) {
    active.routing.push_back(static_cast<Real>(weight));
  }
  if (active.position->merge) active.merged = std::exchange(active.routing, {1.0});
  return active;
}

/// The block of these maps' experts, laid out if it is not there: `fill` writes its memory.
template <class Real>
auto PackedWeights<Real>::block(Target& target, BlockKind kind, const Maps& maps, const Layout& layout,
                                const std::function<void(const Block&)>& fill) -> const Block& {
  std::vector<int64_t> key{static_cast<int64_t>(target.layer), static_cast<int64_t>(kind)};
  if (kind == BlockKind::own) key.back() += target.group;  // routing weights of other groups differ
  for (const MapColumns& map : maps) {
    key.push_back(-1);
    key.insert(key.end(), map.active.experts.begin(), map.active.experts.end());
    for (const double weight : map.active.merged) key.push_back(std::bit_cast<int64_t>(weight));
  }
  const auto found = blocks_.find(key);
  if (found != blocks_.end()) {
    target.blocks.push_back(found->second);
    return *found->second;
  }
  auto made = std::make_shared<Block>();
  made->id = ++n_block_;
  int64_t size = 0;
  for (typename Block::Part part : layout.parts) {
    part.first = size;
    size += padded<Real>(part.rows * part.columns);
    made->parts.push_back(part);
  }
  made->memory = Pages(static_cast<size_t>(size) * sizeof(Real));
  fill(*made);
  for (size_t index = 0; index + 1 < made->parts.size(); ++index) {
    const typename Block::Part& part = made->parts[index];
    if (!part.matrix) continue;
    transpose(made->part(index), part.rows, part.columns, made->part(index + 1));
    ++index;
  }
  blocks_.emplace(std::move(key), made);
  target.blocks.push_back(std::move(made));
  return *target.blocks.back();
}

/// Copies (rows, heads * width) into the matrix `to` of `columns` columns at `row` and `column`.
template <class Real>
void PackedWeights<Real>::put(Real* to, int64_t columns, int64_t row, int64_t column, const Array& from,
                              const MapColumns& map) {
  const Real* source = from.data<Real>();
  for (int64_t r = 0; r < from.size(0); ++r) {
    for (int64_t head = 0; head < map.heads; ++head) {
      std::copy_n(source + (r * map.heads + head) * map.width, map.width,
                  to + (row + r) * columns + column + head * map.stride);
    }
  }
}

/// Biases of all experts of a map.
template <class Real>
void PackedWeights<Real>::put_bias(Real* to, const Array& bias, const MapColumns& map) {
  for (int64_t k = 0; k < bias.size(0); ++k) {
    put(to, 0, 0, map.first + k * map.heads * map.stride, bias.rows(k, 1).to(dtype_of<Real>), map);
  }
}

/// The maps side by side: `put_inputs(matrix, map, column)` spreads the matrix of one expert over the parts
/// of its inputs.
template <class Real>
template <class Function>
void PackedWeights<Real>::put_maps(const Maps& maps, Real* bias, const Function& put_inputs) {
  for (const MapColumns& map : maps) {
    if (map.active.position == nullptr) continue;
    const Weights from = weights_of(map.active);
    const int64_t n_in = from.matrix.size(1);
    const int64_t n_out = from.matrix.size(2);
    for (int64_t k = 0; k < from.matrix.size(0); ++k) {
      const Array matrix = from.matrix.rows(k, 1).reshape({n_in, n_out});
      put_inputs(matrix, map, map.first + k * map.heads * map.stride);
    }
    put_bias(bias, from.bias, map);
  }
}

/// node_self_mlp or edge_angle_linear2, of one input and an output as wide.
template <class Real>
void PackedWeights<Real>::pack_square_map(Target& target, BlockKind kind, const MapColumns& map,
                                          const SquareMap& to) {
  const int64_t columns = static_cast<int64_t>(map.active.routing.size()) * map.stride;
  Layout layout;
  const size_t matrix = layout.matrix(map.stride, columns);
  const size_t bias = layout.row(columns);
  const Block& packed = block(target, kind, {map}, layout, [&](const Block& block) {
    put_maps({map}, block.part(bias), [&](const Array& from, const MapColumns& of_map, int64_t column) {
      put(block.part(matrix), columns, 0, column, from, of_map);
    });
  });
  to.matrix = packed.part(matrix);
  to.transposed = packed.part(matrix + 1);
  to.bias = packed.part(bias);
  target.keep_row(to.routing, map.active.routing);
}

/// node_sym_linear: rows [edge block, neighbor block], each axis * width.
template <class Real>
void PackedWeights<Real>::pack_sym(Target& target) {
  const LayerShape& shape = weights_.shapes[target.layer];
  const int64_t columns = shape.experts_sym * shape.n_padded;
  const Active sym = active(target, "node_sym_linear");
  const MapColumns map{sym, 0, 1, shape.n, shape.n_padded};
  Layout layout;
  const size_t matrix = layout.matrix(shape.sym_inputs(), columns);
  const size_t bias = layout.row(columns);
  const auto put_inputs = [&](const Block& block, const Array& from, int64_t column) {
    for (int64_t m = 0; m < shape.axis; ++m) {
      const int64_t neighbor_row = shape.axis * shape.e_padded + m * shape.n_padded;
      const Array of_edge = from.rows(m * shape.e, shape.e);
      const Array of_neighbor = from.rows(shape.axis * shape.e + m * shape.n, shape.n);
      put(block.part(matrix), columns, m * shape.e_padded, column, of_edge, map);
      put(block.part(matrix), columns, neighbor_row, column, of_neighbor, map);
    }
  };
  const Block& packed = block(target, BlockKind::sym, {map}, layout, [&](const Block& block) {
    put_maps({map}, block.part(bias),
             [&](const Array& from, const MapColumns&, int64_t column) { put_inputs(block, from, column); });
  });
  GroupWeights<Real>& weights = target.weights;
  weights.sym = packed.part(matrix);
  weights.sym_transposed = packed.part(matrix + 1);
  weights.sym_bias = packed.part(bias);
  target.keep_row(weights.routing_sym, sym.routing);
}

/// node_edge_linear and edge_self_linear, which share their input [v_i, v_j, e_ij].
template <class Real>
void PackedWeights<Real>::pack_edge(Target& target) {
  const LayerShape& shape = weights_.shapes[target.layer];
  const bool first_layer = target.layer == 0;
  const int64_t columns = shape.edge_columns();
  const Active message = active(target, "node_edge_linear");
  const Active edge_map = shape.live_edge ? active(target, "edge_self_linear") : Active{};
  const Maps maps{{message, 0, shape.heads, shape.n, shape.n_padded},
                  {edge_map, shape.message_columns(), 1, shape.e, shape.e_padded}};
  Layout layout;
  const size_t centre = layout.matrix(shape.n_padded, columns);
  const size_t neighbor = layout.matrix(shape.n_padded, columns);
  const size_t edge = layout.matrix(shape.e_padded, columns);
  const size_t bias = layout.row(columns);
  const size_t of_distance = first_layer ? layout.row(columns) : 0;
  const size_t distance_bias = first_layer ? layout.row(columns) : 0;
  const Block& packed = block(target, BlockKind::edge, maps, layout, [&](const Block& block) {
    put_maps(maps, block.part(bias), [&](const Array& from, const MapColumns& map, int64_t column) {
      put(block.part(centre), columns, 0, column, from.rows(0, shape.n), map);
      put(block.part(neighbor), columns, 0, column, from.rows(shape.n, shape.n), map);
      put(block.part(edge), columns, 0, column, from.rows(2 * shape.n, shape.e), map);
    });
    if (!first_layer) return;
    const std::vector<Real>* slope = &weights_.edge_matrix;
    const std::vector<Real>* offset = &weights_.edge_bias;
    const Real* matrix = block.part(edge);
    sum_products<Real>(nullptr, {{slope, matrix}}, columns, block.part(of_distance));
    sum_products<Real>(block.part(bias), {{offset, matrix}}, columns, block.part(distance_bias));
  });
  GroupWeights<Real>& weights = target.weights;
  weights.edge_centre = packed.part(centre);
  weights.edge_centre_transposed = packed.part(centre + 1);
  weights.edge_neighbor = packed.part(neighbor);
  weights.edge_neighbor_transposed = packed.part(neighbor + 1);
  weights.edge_edge = packed.part(edge);
  weights.edge_edge_transposed = packed.part(edge + 1);
  weights.edge_bias = packed.part(bias);
  if (first_layer) {
    weights.edge_of_distance = packed.part(of_distance);
    weights.edge_distance_bias = packed.part(distance_bias);
  }
  target.keep_row(weights.routing_message, message.routing);
  if (shape.live_edge) target.keep_row(weights.routing_edge, edge_map.routing);
}

/// Parts of the angle block.
struct AngleParts {
  size_t angle = 0;
  size_t centre = 0;
  size_t first = 0;
  size_t second = 0;
  size_t bias = 0;
  // of the first layer
  size_t first_of_distance = 0;
  size_t second_of_distance = 0;
  size_t of_cos = 0;
  size_t distance_bias = 0;
};

/// edge_angle_linear1 and angle_self_linear, which share their input [a_ijk, vc_i, ec_ik, ec_ij]: k before j.
template <class Real>
void PackedWeights<Real>::pack_angle(Target& target) {
  const LayerShape& shape = weights_.shapes[target.layer];
  const bool first_layer = target.layer == 0;
  const int64_t columns = shape.angle_columns();
  const Active message = active(target, "edge_angle_linear1");
  const Active angle_map = shape.live_angle ? active(target, "angle_self_linear") : Active{};
  const Maps maps{{message, 0, 1, shape.e, shape.e_padded},
                  {angle_map, shape.angle_message_columns(), 1, shape.a, shape.a_padded}};
  Layout layout;
  AngleParts parts;
  parts.angle = layout.matrix(shape.a_padded, columns);
  parts.centre = layout.matrix(shape.n_padded, columns);
  parts.first = layout.matrix(shape.e_padded, columns);
  parts.second = layout.matrix(shape.e_padded, columns);
  parts.bias = layout.row(columns);
  if (first_layer) {
    parts.first_of_distance = layout.row(columns);
    parts.second_of_distance = layout.row(columns);
    parts.of_cos = layout.row(columns);
    parts.distance_bias = layout.row(columns);
  }
  const Block& packed = block(target, BlockKind::angle, maps, layout, [&](const Block& block) {
    fill_angle_block(target.layer, maps, parts, block);
  });
  GroupWeights<Real>& weights = target.weights;
  weights.angle_angle = packed.part(parts.angle);
  weights.angle_angle_transposed = packed.part(parts.angle + 1);
  weights.angle_centre = packed.part(parts.centre);
  weights.angle_centre_transposed = packed.part(parts.centre + 1);
  weights.angle_first = packed.part(parts.first);
  weights.angle_first_transposed = packed.part(parts.first + 1);
  weights.angle_second = packed.part(parts.second);
  weights.angle_second_transposed = packed.part(parts.second + 1);
  weights.angle_bias = packed.part(parts.bias);
  if (first_layer) {
    weights.angle_first_of_distance = packed.part(parts.first_of_distance);
    weights.angle_second_of_distance = packed.part(parts.second_of_distance);
    weights.angle_of_cos = packed.part(parts.of_cos);
    weights.angle_distance_bias = packed.part(parts.distance_bias);
  }
  target.keep_row(weights.routing_angle_message, message.routing);
  if (shape.live_angle) target.keep_row(weights.routing_angle, angle_map.routing);
}

template <class Real>
void PackedWeights<Real>::fill_angle_block(size_t layer, const Maps& maps, const AngleParts& parts,
                                           const Block& block) {
  const LayerSource& source = model_.layers[layer];
  const LayerShape& shape = weights_.shapes[layer];
  const int64_t columns = shape.angle_columns();
  // linear compression is folded into the map: (v W_c) W = v (W_c W)
  const auto folded = [](const Array& compress, const Array& rows) {
    return compress.defined() ? product(compress, rows.to(Dtype::float64)).to(dtype_of<Real>) : rows;
  };
  const int64_t centre_row = shape.a;
  const int64_t second_row = centre_row + source.vc_dim;
  const int64_t first_row = second_row + source.ec_dim;
  put_maps(maps, block.part(parts.bias), [&](const Array& from, const MapColumns& map, int64_t column) {
    const Array of_centre = folded(source.compress_n, from.rows(centre_row, source.vc_dim));
    const Array of_second = folded(source.compress_e, from.rows(second_row, source.ec_dim));
    const Array of_first = folded(source.compress_e, from.rows(first_row, source.ec_dim));
    put(block.part(parts.angle), columns, 0, column, from.rows(0, shape.a), map);
    put(block.part(parts.centre), columns, 0, column, of_centre, map);
    put(block.part(parts.second), columns, 0, column, of_second, map);
    put(block.part(parts.first), columns, 0, column, of_first, map);
  });
  if (layer > 0) return;
  const std::vector<Real>* slope = &weights_.edge_matrix;
  const std::vector<Real>* offset = &weights_.edge_bias;
  const std::vector<Real>* direction = &weights_.angle_direction;
  const Real* first = block.part(parts.first);
  const Real* second = block.part(parts.second);
  sum_products<Real>(nullptr, {{slope, first}}, columns, block.part(parts.first_of_distance));
  sum_products<Real>(nullptr, {{slope, second}}, columns, block.part(parts.second_of_distance));
  sum_products<Real>(nullptr, {{direction, block.part(parts.angle)}}, columns, block.part(parts.of_cos));
  sum_products<Real>(block.part(parts.bias), {{offset, first}, {offset, second}}, columns,
                     block.part(parts.distance_bias));
}

/// What the message map gives an edge without a message: sum_k p_k phi(b_k).
template <class Real>
std::vector<double> PackedWeights<Real>::far_edges(const LayerShape& shape, const MapColumns& map) const {
  const Active& active = map.active;
  std::vector<Real> outputs(static_cast<size_t>(shape.experts_message_map * shape.e_padded), Real(0));
  put_bias(outputs.data(), biases_of(active), map);
  kernels_.activate(shape.activation, outputs.data(), static_cast<int64_t>(outputs.size()));
  std::vector<double> sum(static_cast<size_t>(shape.e_padded), 0.0);
  for (size_t k = 0; k < active.routing.size(); ++k) {
    for (size_t d = 0; d < sum.size(); ++d) {
      sum[d] += static_cast<double>(outputs[k * sum.size() + d]) * active.routing[k];
    }
  }
  return sum;
}

template <class Real>
void PackedWeights<Real>::pack_layer(Target& target) {
  const LayerShape& shape = weights_.shapes[target.layer];
  GroupWeights<Real>& weights = target.weights;
  const MapColumns node{active(target, "node_self_mlp"), 0, 1, shape.n, shape.n_padded};
  pack_square_map(target, BlockKind::node, node,
                  {weights.node, weights.node_transposed, weights.node_bias, weights.routing_node});
  pack_sym(target);
  pack_edge(target);
  if (shape.with_angles) {
    pack_angle(target);
    const MapColumns message{active(target, "edge_angle_linear2"), 0, 1, shape.e, shape.e_padded};
    pack_square_map(target, BlockKind::message_map, message,
                    {weights.message_map, weights.message_map_transposed, weights.message_map_bias,
                     weights.routing_message_map});
    target.keep_row(weights.message_map_far, far_edges(shape, message));
  }
  const Block& own = block(target, BlockKind::own, {}, target.own, [&](const Block& block) {
    for (size_t k = 0; k < target.own_rows.size(); ++k) {
      const std::vector<Real>& row = target.own_rows[k].second;
      std::copy(row.begin(), row.end(), block.part(k));
    }
  });
  for (size_t k = 0; k < target.own_rows.size(); ++k) *target.own_rows[k].first = own.part(k);
}

template <class Real>
void PackedWeights<Real>::pack_group(int64_t group) {
  std::vector<std::shared_ptr<Block>> blocks;
  const size_t n_layer = model_.layers.size();
  std::vector<GroupWeights<Real>> of_layers(n_layer);
  for (size_t layer = 0; layer < n_layer; ++layer) {
    Target target{layer, group, blocks, of_layers[layer], {}, {}};
    pack_layer(target);
  }
  const auto index = static_cast<size_t>(group);
  for (size_t layer = 0; layer < n_layer; ++layer) weights_.groups[layer][index] = of_layers[layer];
  groups_[index].blocks = std::move(blocks);
}

/// Routes all groups; what is laid out stays where groups were only added.
template <class Real>
void PackedWeights<Real>::route_groups(const Array& features) {
  const bool grown = features_.defined() && features.size(0) > features_.size(0) &&
                     features.rows(0, features_.size(0)).equals(features_);
  if (!grown) release_groups();
  const size_t n_layer = model_.layers.size();
  routes_.assign(n_layer, {});
  for (size_t layer = 0; layer < n_layer; ++layer) {
    for (const auto& [name, router] : model_.layers[layer].routers) {
      routes_[layer][name] = route(router, features);
    }
  }
  features_ = features.clone();
  const auto n_group = static_cast<size_t>(features.size(0));
  groups_.resize(n_group);
  weights_.groups.resize(n_layer);
  for (auto& of_layer : weights_.groups) of_layer.resize(n_group);
}

template <class Real>
bool PackedWeights<Real>::set_groups(const Array& features, const std::vector<int64_t>& used) {
  bool changed = false;
  if (!features_.equals(features)) {
    route_groups(features);
    changed = true;
  }
  ++clock_;
  for (const int64_t index : used) {
    Group& group = groups_[static_cast<size_t>(index)];
    if (group.blocks.empty()) {
      pack_group(index);
      changed = true;
    }
    group.last_use = clock_;
  }
  if (changed || used != used_) changed = evict(used) || changed;
  used_ = used;
  return changed;
}

/// Releases groups without atoms, those first that had none for longest, until what the others keep is small
/// against the memory that is left. Returns whether there were such.
template <class Real>
bool PackedWeights<Real>::evict(const std::vector<int64_t>& used) {
  std::vector<size_t> absent;
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (!groups_[g].blocks.empty() && groups_[g].last_use != clock_) absent.push_back(g);
  }
  if (absent.empty()) return false;
  int64_t present = 0;
  std::set<uint64_t> counted;
  for (const int64_t g : used) {
    for (const auto& held : groups_[static_cast<size_t>(g)].blocks) {
      if (counted.insert(held->id).second) present += static_cast<int64_t>(held->memory.size());
    }
  }
  const int64_t limit = present + (kept_bytes_ ? *kept_bytes_ : memory_left_());
  std::sort(absent.begin(), absent.end(),
            [&](size_t a, size_t b) { return groups_[a].last_use < groups_[b].last_use; });
  bool dropped = false;
  for (const size_t g : absent) {
    if (packed_bytes() <= limit) break;
    release(g);
    drop_unused_blocks();
    dropped = true;
  }
  return dropped;
}

template <class Real>
void PackedWeights<Real>::release(size_t group) {
  groups_[group].blocks.clear();
  for (auto& of_layer : weights_.groups) of_layer[group] = {};
}

template <class Real>
void PackedWeights<Real>::release_groups(const std::vector<int64_t>& in_use) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (std::find(in_use.begin(), in_use.end(), static_cast<int64_t>(g)) == in_use.end()) release(g);
  }
  drop_unused_blocks();
}

template <class Real>
void PackedWeights<Real>::drop_unused_blocks() {
  std::erase_if(blocks_, [](const auto& entry) { return entry.second.use_count() <= 1; });
}

template <class Real>
int64_t PackedWeights<Real>::n_packed_groups() const {
  return std::count_if(groups_.begin(), groups_.end(),
                       [](const Group& group) { return !group.blocks.empty(); });
}

template <class Real>
int64_t PackedWeights<Real>::packed_bytes() const {
  int64_t total = 0;
  for (const auto& [key, held] : blocks_) total += static_cast<int64_t>(held->memory.size());
  return total;
}

template class PackedWeights<float>;
template class PackedWeights<double>;
template void sum_products<float>(const float*,
                                  std::initializer_list<std::pair<const std::vector<float>*, const float*>>,
                                  int64_t, float*);
template void sum_products<double>(
    const double*, std::initializer_list<std::pair<const std::vector<double>*, const double*>>, int64_t,
    double*);

}  // namespace moecalc
