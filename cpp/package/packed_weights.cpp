#include "package/packed_weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <set>
#include <utility>

#include "moecalc/error.h"

namespace moecalc {

using namespace ops;

namespace {

constexpr int64_t kOwnKind = 16;  // kinds of blocks from here on: those of a group alone

Activation activation_of(const ActivationSource& phi) {
  const std::optional<Activation> known = kernel_activation(phi);
  if (!known) throw Unsupported{"activation " + phi.kind};
  return *known;
}

template <class T>
std::vector<T> padded_row(const double* values, int64_t n, int64_t width) {
  std::vector<T> row(static_cast<size_t>(width), T(0));
  for (int64_t d = 0; d < n; ++d) row[static_cast<size_t>(d)] = static_cast<T>(values[d]);
  return row;
}

/// (rows, inner) times (inner, columns), float64.
Array product(const Array& a, const Array& b) {
  const int64_t rows = a.size(0), inner = a.size(1), columns = b.size(1);
  const Array out = Array::zeros({rows, columns}, Dtype::float64);
  const auto* x = a.data<double>();
  const auto* y = b.data<double>();
  auto* to = out.data<double>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < inner; ++k) {
      const double factor = x[r * inner + k];
      for (int64_t c = 0; c < columns; ++c) to[r * columns + c] += factor * y[k * columns + c];
    }
  }
  return out;
}

/// Copies (rows, heads * width) into the matrix `to` of `columns` columns at `row` and `column`, each head
/// padded to `stride` columns.
template <class T>
void put(T* to, int64_t columns, int64_t row, int64_t column, const Array& from, int64_t heads, int64_t width,
         int64_t stride) {
  const T* source = from.data<T>();
  for (int64_t r = 0; r < from.size(0); ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      std::copy_n(source + (r * heads + h) * width, width, to + (row + r) * columns + column + h * stride);
    }
  }
}

/// (rows, columns) -> (columns, rows), in tiles that stay in cache.
template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t tile = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += tile) {
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      const int64_t r1 = std::min(r0 + tile, rows), c1 = std::min(c0 + tile, columns);
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) to[c * rows + r] = from[r * columns + c];
      }
    }
  }
}

}  // namespace

template <class T>
void sum_products(const T* start, std::initializer_list<std::pair<const std::vector<T>*, const T*>> products,
                  int64_t columns, T* out) {
  std::vector<double> sums(static_cast<size_t>(columns), 0.0);
  if (start != nullptr) sums.assign(start, start + columns);
  for (const auto& [row, matrix] : products) {
    for (size_t k = 0; k < row->size(); ++k) {
      for (size_t c = 0; c < sums.size(); ++c)
        sums[c] += double((*row)[k]) * double(matrix[k * sums.size() + c]);
    }
  }
  std::transform(sums.begin(), sums.end(), out, [](double sum) { return T(sum); });
}

// --- reading the package ---

template <class T>
PackedWeights<T>::PackedWeights(const Architecture& model, const Kernels<T>& kernels,
                                std::optional<int64_t> kept_bytes, std::function<int64_t()> memory_left)
    : model_(model), kernels_(kernels), kept_bytes_(kept_bytes), memory_left_(std::move(memory_left)) {
  for (const LayerSource& layer : model.layers) {
    if (layer.sequential) throw Unsupported{"sequential_update"};
    LayerShape shape = layer.shape;
    shape.np = padded<T>(shape.n);
    shape.ep = padded<T>(shape.e);
    shape.ap = padded<T>(shape.a);
    shape.phi = activation_of(layer.phi);
    weights_.shapes.push_back(shape);
  }
  read_embedding();
  pack_updates();
}

template <class T>
void PackedWeights<T>::read_embedding() {
  const EmbeddingSource& source = model_.embedding;
  const LayerShape& s = weights_.shapes[0];
  weights_.use_dist = source.use_dist;
  weights_.phi = activation_of(source.phi);
  weights_.edge_matrix = padded_row<T>(source.edge_matrix.data<double>(), s.e, s.ep);
  weights_.edge_bias = padded_row<T>(source.edge_bias.data<double>(), s.e, s.ep);
  if (!s.with_angles) return;
  const double root_pi = std::sqrt(3.14159265358979323846);
  std::vector<double> direction;
  for (int64_t d = 0; d < s.a; ++d) direction.push_back(source.angle_matrix.data<double>()[d] / root_pi);
  weights_.angle_direction = padded_row<T>(direction.data(), s.a, s.ap);
}

template <class T>
void PackedWeights<T>::set_tables(const TypeTables& tables) {
  const LayerShape& s = weights_.shapes[0];
  weights_.node_table.clear();
  for (int64_t t = 0; t < tables.nodes.size(0); ++t) {
    std::vector<T> row = padded_row<T>(tables.nodes.data<double>() + t * s.n, s.n, s.np);
    kernels_.activate(weights_.phi, row.data(), s.np);
    weights_.node_table.insert(weights_.node_table.end(), row.begin(), row.end());
  }
}

template <class T>
void PackedWeights<T>::pack_updates() {
  const auto padded_rows = [&](const Array& rows, int64_t width) -> const T* {
    const int64_t n = rows.size(0), columns = rows.size(1);
    std::vector<T> values(static_cast<size_t>(n * width), T(0));
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        values[static_cast<size_t>(r * width + c)] = static_cast<T>(rows.data<double>()[r * columns + c]);
      }
    }
    update_memory_.push_back(std::move(values));
    return update_memory_.back().data();
  };
  for (size_t l = 0; l < model_.layers.size(); ++l) {
    const LayerSource& source = model_.layers[l];
    const LayerShape& s = weights_.shapes[l];
    UpdateVectors<T> update;
    update.n = padded_rows(source.update_n, s.np);
    if (s.live_edge) update.e = padded_rows(source.update_e, s.ep);
    if (s.live_angle) update.a = padded_rows(source.update_a, s.ap);
    weights_.updates.push_back(update);
  }
}

// --- weights per routing group ---

template <class T>
auto PackedWeights<T>::active(size_t layer, const char* name, int64_t group) const -> Active {
  Active x;
  x.position = model_.layers[layer].find(name);
  if (!x.position->routed) {
    x.experts = {0};
    x.p = {1.0};
    return x;
  }
  const Routes& routes = routes_[layer].at(x.position->router);
  x.experts = routes.experts[static_cast<size_t>(group)];
  // as the network has them
  for (const double p : routes.weights[static_cast<size_t>(group)]) x.p.push_back(static_cast<T>(p));
  if (x.position->merge) {
    x.mixed = std::exchange(x.p, {1.0});
  }
  return x;
}

namespace {

/// sum_k weights[k] values[k] of (K, ...) float64, as (1, ...).
Array mixed_rows(const Array& values, const std::vector<double>& weights) {
  Shape shape = values.shape();
  shape[0] = 1;
  const Array out = Array::zeros(shape, Dtype::float64);
  const int64_t n = out.numel();
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto* from = values.data<double>() + static_cast<int64_t>(k) * n;
    auto* to = out.data<double>();
    for (int64_t d = 0; d < n; ++d) to[d] += from[d] * weights[k];
  }
  return out;
}

}  // namespace

template <class T>
Array PackedWeights<T>::biases_of(const Active& x) {
  const Array bias = x.position->bias.select(x.experts);
  return x.mixed.empty() ? bias : mixed_rows(bias, x.mixed);
}

template <class T>
auto PackedWeights<T>::weights_of(const Active& x) -> Weights {
  if (x.mixed.empty()) return {x.position->matrix.select(x.experts, dtype_of<T>), biases_of(x)};
  const Array all = x.position->matrix.select(x.experts, Dtype::float64);
  return {mixed_rows(all, x.mixed).to(dtype_of<T>), biases_of(x)};
}

/// Shapes of the parts of a block.
template <class T>
struct PackedWeights<T>::Layout {
  std::vector<typename Block::Part> parts;

  Layout& matrix(int64_t rows, int64_t columns) {  // and its transpose
    parts.push_back({0, rows, columns, true});
    parts.push_back({0, columns, rows, true});
    return *this;
  }
  Layout& row(int64_t columns) {
    parts.push_back({0, 1, columns, false});
    return *this;
  }
};

template <class T>
auto PackedWeights<T>::block(std::vector<std::shared_ptr<Block>>& blocks, size_t layer, int64_t kind,
                             std::initializer_list<const Active*> experts, const Layout& layout,
                             const std::function<void(const Block&)>& fill) -> const Block& {
  std::vector<int64_t> key{static_cast<int64_t>(layer), kind};
  for (const Active* x : experts) {
    key.push_back(-1);
    key.insert(key.end(), x->experts.begin(), x->experts.end());
    for (const double weight : x->mixed) key.push_back(std::bit_cast<int64_t>(weight));
  }
  const auto found = blocks_.find(key);
  if (found != blocks_.end()) {
    blocks.push_back(found->second);
    return *found->second;
  }
  auto made = std::make_shared<Block>();
  made->id = ++n_block_;
  int64_t size = 0;
  for (typename Block::Part part : layout.parts) {
    part.first = size;
    size += padded<T>(part.rows * part.columns);
    made->parts.push_back(part);
  }
  made->memory = Pages(static_cast<size_t>(size) * sizeof(T));
  fill(*made);
  for (size_t x = 0; x + 1 < made->parts.size(); ++x) {
    if (!made->parts[x].matrix) continue;
    transpose(made->part(x), made->parts[x].rows, made->parts[x].columns, made->part(x + 1));
    ++x;
  }
  blocks_.emplace(std::move(key), made);
  blocks.push_back(std::move(made));
  return *blocks.back();
}

template <class T>
void PackedWeights<T>::pack_layer(size_t layer, int64_t group, std::vector<std::shared_ptr<Block>>& blocks,
                                  GroupWeights<T>& w) {
  const LayerSource& source = model_.layers[layer];
  const LayerShape& s = weights_.shapes[layer];
  const bool first = layer == 0;
  const auto of = [&](const char* name) { return active(layer, name, group); };
  const auto matrix_of = [](const Weights& x, int64_t k) {
    return x.matrix.rows(k, 1).reshape({x.matrix.size(1), x.matrix.size(2)});
  };
  /// Biases of all experts, each head padded.
  const auto put_bias = [](T* to, const Array& bias, int64_t heads, int64_t width, int64_t stride) {
    for (int64_t k = 0; k < bias.size(0); ++k) {
      put(to, 0, 0, k * heads * stride, bias.rows(k, 1).to(dtype_of<T>), heads, width, stride);
    }
  };
  Layout own;  // what is this group's alone: routing weights
  std::vector<std::pair<const T**, std::vector<T>>> rows;
  const auto keep_row = [&](const T*& to, const std::vector<double>& values) {
    own.row(static_cast<int64_t>(values.size()));
    rows.emplace_back(&to, std::vector<T>(values.begin(), values.end()));
  };

  {  // node_self_mlp
    const Active x = of("node_self_mlp");
    const int64_t columns = s.k_node * s.np;
    const Block& b =
        block(blocks, layer, 0, {&x}, Layout().matrix(s.np, columns).row(columns), [&](const Block& to) {
          const Weights from = weights_of(x);
          for (int64_t k = 0; k < s.k_node; ++k)
            put(to.part(0), columns, 0, k * s.np, matrix_of(from, k), 1, s.n, s.np);
          put_bias(to.part(2), from.bias, 1, s.n, s.np);
        });
    w.node = b.part(0), w.node_t = b.part(1), w.node_b = b.part(2);
    keep_row(w.p_node, x.p);
  }
  {  // node_sym_linear: rows [edge block, neighbour block], each axis * width
    const Active x = of("node_sym_linear");
    const int64_t columns = s.k_sym * s.np;
    const Block& b = block(
        blocks, layer, 1, {&x}, Layout().matrix(s.sym_in(), columns).row(columns), [&](const Block& to) {
          const Weights from = weights_of(x);
          for (int64_t k = 0; k < s.k_sym; ++k) {
            const Array matrix = matrix_of(from, k);
            for (int64_t m = 0; m < s.axis; ++m) {
              put(to.part(0), columns, m * s.ep, k * s.np, matrix.rows(m * s.e, s.e), 1, s.n, s.np);
              put(to.part(0), columns, s.axis * s.ep + m * s.np, k * s.np,
                  matrix.rows(s.axis * s.e + m * s.n, s.n), 1, s.n, s.np);
            }
          }
          put_bias(to.part(2), from.bias, 1, s.n, s.np);
        });
    w.sym = b.part(0), w.sym_t = b.part(1), w.sym_b = b.part(2);
    keep_row(w.p_sym, x.p);
  }
  {  // node_edge_linear and edge_self_linear share their input [v_i, v_j, e_ij]
    const Active x = of("node_edge_linear");
    const Active y = s.live_edge ? of("edge_self_linear") : Active{};
    const int64_t columns = s.edge_columns(), width = s.heads * s.np;
    Layout layout;
    layout.matrix(s.np, columns).matrix(s.np, columns).matrix(s.ep, columns).row(columns);
    if (first) layout.row(columns).row(columns);
    const Block& b = block(blocks, layer, 2, {&x, &y}, layout, [&](const Block& to) {
      const auto add = [&](const Array& matrix, int64_t at, int64_t heads, int64_t out, int64_t outp) {
        put(to.part(0), columns, 0, at, matrix.rows(0, s.n), heads, out, outp);
        put(to.part(2), columns, 0, at, matrix.rows(s.n, s.n), heads, out, outp);
        put(to.part(4), columns, 0, at, matrix.rows(2 * s.n, s.e), heads, out, outp);
      };
      const Weights message = weights_of(x);
      for (int64_t k = 0; k < s.k_message; ++k) add(matrix_of(message, k), k * width, s.heads, s.n, s.np);
      put_bias(to.part(6), message.bias, s.heads, s.n, s.np);
      if (s.live_edge) {
        const Weights self = weights_of(y);
        for (int64_t k = 0; k < s.k_edge; ++k) add(matrix_of(self, k), s.message() + k * s.ep, 1, s.e, s.ep);
        put_bias(to.part(6) + s.message(), self.bias, 1, s.e, s.ep);
      }
      if (!first) return;
      sum_products<T>(nullptr, {{&weights_.edge_matrix, to.part(4)}}, columns, to.part(7));
      sum_products<T>(to.part(6), {{&weights_.edge_bias, to.part(4)}}, columns, to.part(8));
    });
    w.edge_c = b.part(0), w.edge_c_t = b.part(1), w.edge_n = b.part(2), w.edge_n_t = b.part(3);
    w.edge_e = b.part(4), w.edge_e_t = b.part(5), w.edge_b = b.part(6);
    if (first) w.edge_r = b.part(7), w.edge_r_b = b.part(8);
    keep_row(w.p_message, x.p);
    if (s.live_edge) keep_row(w.p_edge, y.p);
  }
  if (s.with_angles) {  // edge_angle_linear1 and angle_self_linear share [a, vc_i, ec_ik, ec_ij]
    const Active x = of("edge_angle_linear1");
    const Active y = s.live_angle ? of("angle_self_linear") : Active{};
    const int64_t columns = s.angle_columns();
    Layout layout;
    layout.matrix(s.ap, columns)
        .matrix(s.np, columns)
        .matrix(s.ep, columns)
        .matrix(s.ep, columns)
        .row(columns);
    if (first) layout.row(columns).row(columns).row(columns).row(columns);
    const Block& b = block(blocks, layer, 3, {&x, &y}, layout, [&](const Block& to) {
      const auto add = [&](const Array& matrix, int64_t at, int64_t out, int64_t outp) {
        int64_t row = 0;
        const auto part = [&](int64_t width) {
          row += width;
          return matrix.rows(row - width, width);
        };
        // linear compression is folded into the map: (v W_c) W = v (W_c W)
        const auto folded = [&](const Array& compress, int64_t width) {
          const Array plain = part(width);
          return compress.defined() ? product(compress, plain.to(Dtype::float64)).to(dtype_of<T>) : plain;
        };
        put(to.part(0), columns, 0, at, part(s.a), 1, out, outp);
        put(to.part(2), columns, 0, at, folded(source.compress_n, source.vc_dim), 1, out, outp);
        put(to.part(6), columns, 0, at, folded(source.compress_e, source.ec_dim), 1, out, outp);
        put(to.part(4), columns, 0, at, folded(source.compress_e, source.ec_dim), 1, out, outp);
      };
      const Weights message = weights_of(x);
      for (int64_t k = 0; k < s.k_angle1; ++k) add(matrix_of(message, k), k * s.ep, s.e, s.ep);
      put_bias(to.part(8), message.bias, 1, s.e, s.ep);
      if (s.live_angle) {
        const Weights self = weights_of(y);
        for (int64_t k = 0; k < s.k_angle; ++k) add(matrix_of(self, k), s.angle1() + k * s.ap, s.a, s.ap);
        put_bias(to.part(8) + s.angle1(), self.bias, 1, s.a, s.ap);
      }
      if (!first) return;
      sum_products<T>(nullptr, {{&weights_.edge_matrix, to.part(4)}}, columns, to.part(9));
      sum_products<T>(nullptr, {{&weights_.edge_matrix, to.part(6)}}, columns, to.part(10));
      sum_products<T>(nullptr, {{&weights_.angle_direction, to.part(0)}}, columns, to.part(11));
      sum_products<T>(to.part(8), {{&weights_.edge_bias, to.part(4)}, {&weights_.edge_bias, to.part(6)}},
                      columns, to.part(12));
    });
    w.angle_a = b.part(0), w.angle_a_t = b.part(1), w.angle_c = b.part(2), w.angle_c_t = b.part(3);
    w.angle_j = b.part(4), w.angle_j_t = b.part(5), w.angle_k = b.part(6), w.angle_k_t = b.part(7);
    w.angle_b = b.part(8);
    if (first) {
      w.angle_j_r = b.part(9), w.angle_k_r = b.part(10), w.angle_cos = b.part(11), w.angle_r_b = b.part(12);
    }
    keep_row(w.p_angle1, x.p);
    if (s.live_angle) keep_row(w.p_angle, y.p);
  }
  if (s.with_angles) {
    const Active z = of("edge_angle_linear2");
    const int64_t columns = s.k_angle2 * s.ep;
    const Block& b =
        block(blocks, layer, 4, {&z}, Layout().matrix(s.ep, columns).row(columns), [&](const Block& to) {
          const Weights from = weights_of(z);
          for (int64_t k = 0; k < s.k_angle2; ++k)
            put(to.part(0), columns, 0, k * s.ep, matrix_of(from, k), 1, s.e, s.ep);
          put_bias(to.part(2), from.bias, 1, s.e, s.ep);
        });
    w.angle2 = b.part(0), w.angle2_t = b.part(1), w.angle2_b = b.part(2);
    keep_row(w.p_angle2, z.p);
    // what an edge without a message gets: sum_k p_k phi(b_k)
    std::vector<T> far(static_cast<size_t>(columns), T(0));
    put_bias(far.data(), biases_of(z), 1, s.e, s.ep);
    kernels_.activate(s.phi, far.data(), columns);
    std::vector<double> sum(static_cast<size_t>(s.ep), 0.0);
    for (size_t k = 0; k < z.p.size(); ++k) {
      for (size_t d = 0; d < sum.size(); ++d) {
        sum[d] += static_cast<double>(far[k * sum.size() + d]) * z.p[k];
      }
    }
    keep_row(w.angle2_far, sum);
  }

  // keyed by the group: p of other groups differ
  const Block& b = block(blocks, layer, kOwnKind + group, {}, own, [&](const Block& to) {
    for (size_t x = 0; x < rows.size(); ++x)
      std::copy(rows[x].second.begin(), rows[x].second.end(), to.part(x));
  });
  for (size_t x = 0; x < rows.size(); ++x) *rows[x].first = b.part(x);
}

template <class T>
void PackedWeights<T>::pack_group(int64_t group) {
  std::vector<std::shared_ptr<Block>> blocks;
  const size_t n_layer = model_.layers.size();
  std::vector<GroupWeights<T>> of_layers(n_layer);
  for (size_t l = 0; l < n_layer; ++l) pack_layer(l, group, blocks, of_layers[l]);
  const auto g = static_cast<size_t>(group);
  for (size_t l = 0; l < n_layer; ++l) weights_.groups[l][g] = of_layers[l];
  groups_[g].blocks = std::move(blocks);
}

/// Routes all groups; what is laid out stays where groups were only added.
template <class T>
void PackedWeights<T>::route_groups(const Array& features) {
  const bool grown = features_.defined() && features.size(0) > features_.size(0) &&
                     features.rows(0, features_.size(0)).equals(features_);
  if (!grown) release_groups();
  const size_t n_layer = model_.layers.size();
  routes_.assign(n_layer, {});
  for (size_t l = 0; l < n_layer; ++l) {
    for (const auto& [name, router] : model_.layers[l].routers) routes_[l][name] = route(router, features);
  }
  features_ = features.clone();
  const auto n_group = static_cast<size_t>(features.size(0));
  groups_.resize(n_group);
  weights_.groups.resize(n_layer);
  for (auto& of_layer : weights_.groups) of_layer.resize(n_group);
}

template <class T>
bool PackedWeights<T>::set_groups(const Array& features, const std::vector<int64_t>& used) {
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
template <class T>
bool PackedWeights<T>::evict(const std::vector<int64_t>& used) {
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

template <class T>
void PackedWeights<T>::release(size_t group) {
  groups_[group].blocks.clear();
  for (auto& of_layer : weights_.groups) of_layer[group] = {};
}

template <class T>
void PackedWeights<T>::release_groups(const std::vector<int64_t>& in_use) {
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (std::find(in_use.begin(), in_use.end(), static_cast<int64_t>(g)) == in_use.end()) release(g);
  }
  drop_unused_blocks();
}

template <class T>
void PackedWeights<T>::drop_unused_blocks() {
  std::erase_if(blocks_, [](const auto& entry) { return entry.second.use_count() <= 1; });
}

template <class T>
int64_t PackedWeights<T>::n_packed_groups() const {
  return std::count_if(groups_.begin(), groups_.end(),
                       [](const Group& group) { return !group.blocks.empty(); });
}

template <class T>
int64_t PackedWeights<T>::packed_bytes() const {
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
