#include "packed_weights.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>
#include <utility>

namespace moecalc {

using torch::jit::IValue;
using torch::jit::Module;
using namespace ops;

namespace {

ActivationKind kind_of(const std::string& name) {
  if (name == "linear") return ActivationKind::linear;
  if (name == "silu") return ActivationKind::silu;
  if (name == "silut") return ActivationKind::silut;
  if (name == "tanh") return ActivationKind::tanh;
  if (name == "sigmoid") return ActivationKind::sigmoid;
  if (name == "relu") return ActivationKind::relu;
  if (name == "relu6") return ActivationKind::relu6;
  if (name == "gelu") return ActivationKind::gelu;
  throw Unsupported{"activation " + name};
}

at::Tensor zeros(int64_t rows, int64_t columns) {
  return at::zeros({rows, columns}, at::TensorOptions().dtype(at::kDouble));
}

constexpr int64_t kOwnKind = 16;  // kinds of blocks from here on: those of a group alone

/// What absent groups may keep, in bytes, from MOECALC_WEIGHTS (MiB); -1 where it is not set.
int64_t kept_weights() {
  const char* text = std::getenv("MOECALC_WEIGHTS");
  if (text == nullptr) return -1;
  char* end = nullptr;
  const double mebibytes = std::strtod(text, &end);
  if (end == text || *end != '\0' || !(mebibytes >= 0.0 && mebibytes <= 1e9)) {
    throw Error("expected MOECALC_WEIGHTS to be a number of MiB, got '" + std::string(text) + "'");
  }
  return static_cast<int64_t>(mebibytes * 1048576.0);
}

}  // namespace

Activation activation_of(const Module& phi) {
  return {kind_of(phi.attr("kind").toStringRef()), phi.attr("threshold").toDouble(),
          phi.attr("slope").toDouble(), phi.attr("offset").toDouble()};
}

// --- reading the package ---

template <class T>
void PackedWeights<T>::read_geometry(const Module& module) {
  const bool exponential = module.attr("exp_switch").toBool();
  rules_.edge = {exponential, module.attr("e_start").toDouble(), module.attr("e_stop").toDouble()};
  rules_.angle = {exponential, module.attr("a_start").toDouble(), module.attr("a_stop").toDouble()};
  rules_.use_dist = module.attr("use_dist").toBool();
  rules_.protection = module.attr("protection").toDouble();
  for (auto [name, to] : {std::pair{"mean", &rules_.mean}, std::pair{"stddev", &rules_.stddev}}) {
    const at::Tensor table = module.attr(name).toTensor().to(at::kCPU, at::kDouble).contiguous();
    to->assign(table.const_data_ptr<double>(), table.const_data_ptr<double>() + table.numel());
  }
}

template <class T>
static std::vector<T> padded_row(const at::Tensor& values, int64_t width) {
  std::vector<T> row(static_cast<size_t>(width), T(0));
  const at::Tensor flat = values.detach().to(at::kCPU, at::kDouble).reshape({-1}).contiguous();
  for (int64_t d = 0; d < flat.numel(); ++d)
    row[static_cast<size_t>(d)] = T(flat.const_data_ptr<double>()[d]);
  return row;
}

template <class T>
void PackedWeights<T>::read_embedding(const Module& module) {
  use_dist_ = module.attr("use_dist").toBool();
  phi_ = activation_of(module.attr("phi").toModule());
  const LayerShape& s = layers_[0].shape;
  edge_matrix_ = padded_row<T>(module.attr("edge_matrix").toTensor(), s.ep);
  edge_bias_ = padded_row<T>(module.attr("edge_bias").toTensor(), s.ep);
  if (s.with_angles) {
    const double root_pi = std::sqrt(3.14159265358979323846);
    angle_direction_ =
        padded_row<T>(module.attr("angle_matrix").toTensor().to(at::kCPU, at::kDouble) / root_pi, s.ap);
  }
  Module table = module.attr("table").toModule();
  set_node_table(table.get_method("forward")({}).toTensor());
}

template <class T>
void PackedWeights<T>::set_node_table(const at::Tensor& rows) {
  const LayerShape& s = layers_[0].shape;
  node_table_.clear();
  for (int64_t t = 0; t < rows.size(0); ++t) {
    std::vector<T> row = padded_row<T>(rows[t], s.np);
    kernels_.activate(phi_, row.data(), s.np);
    node_table_.insert(node_table_.end(), row.begin(), row.end());
  }
}

template <class T>
void PackedWeights<T>::set_types(const TypeTables& tables) {
  set_node_table(tables.nodes);
  const auto of_elements = static_cast<size_t>(4 * tables.nodes.size(0) / tables.n_conditions);
  for (std::vector<double>* statistics : {&rules_.mean, &rules_.stddev}) {
    statistics->resize(of_elements);
    statistics->reserve(of_elements * static_cast<size_t>(tables.n_conditions));
    for (int64_t k = 1; k < tables.n_conditions; ++k) {
      statistics->insert(statistics->end(), statistics->begin(),
                         statistics->begin() + static_cast<std::ptrdiff_t>(of_elements));
    }
  }
}

ExpertMatrices::ExpertMatrices(const at::Tensor& values, const DeferredTensors* deferred)
    : sizes_(values.sizes().vec()), stored_(values.scalar_type()) {
  if (deferred == nullptr || !deferred->holds(values)) {
    values_ = values.detach();
    return;
  }
  file_ = deferred->file();
  position_ = deferred->position(values);
}

at::Tensor ExpertMatrices::select(const std::vector<int64_t>& ids, at::ScalarType dtype) const {
  const auto k = static_cast<int64_t>(ids.size());
  if (values_.defined()) {
    const at::Tensor index = at::tensor(ids, at::TensorOptions().dtype(at::kLong)).to(values_.device());
    return values_.index_select(0, index).to(at::kCPU, dtype).contiguous();
  }
  at::Tensor values = at::empty({k, sizes_[1], sizes_[2]}, at::TensorOptions().dtype(stored_));
  const auto size = static_cast<size_t>(sizes_[1] * sizes_[2] * values.element_size());
  auto* to = static_cast<char*>(values.mutable_data_ptr());
  for (int64_t x = 0; x < k; ++x) {
    const auto id = static_cast<uint64_t>(ids[static_cast<size_t>(x)]);
    file_->read(position_ + id * size, to + static_cast<size_t>(x) * size, size);
  }
  return values.to(dtype);
}

template <class T>
Position PackedWeights<T>::read_position(const Module& module, const DeferredTensors* deferred) {
  Position position;
  position.matrix = ExpertMatrices(module.attr("matrix").toTensor(), deferred);
  position.bias = module.attr("bias").toTensor().detach().to(at::kCPU, at::kDouble);
  position.router = module.attr("router").toStringRef();
  position.routed = module.attr("routed").toBool();
  position.merge = module.attr("merge").toBool();
  return position;
}

template <class T>
LayerSource PackedWeights<T>::read_layer(const Module& module, const DeferredTensors* deferred) {
  LayerSource source;
  source.module = module;
  if (module.attr("sequential").toBool()) throw Unsupported{"sequential_update"};
  LayerShape& s = source.shape;
  for (const char* name : {"node_self_mlp", "node_sym_linear", "node_edge_linear", "edge_self_linear",
                           "edge_angle_linear1", "edge_angle_linear2", "angle_self_linear"}) {
    if (!module.hasattr(name)) continue;
    source.names.emplace_back(name);
    source.positions.push_back(read_position(module.attr(name).toModule(), deferred));
  }
  const Position& message = *source.find("node_edge_linear");
  s.n = module.attr("n_dim").toInt();
  s.heads = module.attr("n_head").toInt();
  s.axis = module.attr("axis").toInt();
  s.e = message.matrix.size(1) - 2 * s.n;
  s.live_edge = module.attr("live_edge").toBool();
  s.live_angle = module.attr("live_angle").toBool();
  s.with_angles = module.attr("with_angles").toBool();
  s.keep_far = module.attr("keep_far_edges").toBool();
  s.edge_norm = module.attr("edge_norm").toDouble();
  s.angle_norm = module.attr("angle_norm").toDouble();
  s.phi = activation_of(module.attr("node_self_mlp").toModule().attr("phi").toModule());
  source.vc_dim = module.attr("vc_dim").toInt();
  source.ec_dim = module.attr("ec_dim").toInt();
  s.a = s.with_angles ? source.find("edge_angle_linear1")->matrix.size(1) - source.vc_dim - 2 * source.ec_dim
                      : 1;
  s.np = padded<T>(s.n), s.ep = padded<T>(s.e), s.ap = padded<T>(s.a);
  s.edge_in = s.e;
  if (s.with_angles && module.attr("compress").toBool()) {
    if (module.attr("compress_split").toBool()) {
      s.edge_in = source.ec_dim;
    } else {
      source.compress_n = module.attr("a_compress_n_linear").toTensor().detach().to(at::kCPU, at::kDouble);
      source.compress_e = module.attr("a_compress_e_linear").toTensor().detach().to(at::kCPU, at::kDouble);
    }
  }
  const auto updates = [&](const char* name, int64_t n, int64_t width, double& keep) {
    keep = 1.0;
    if (module.attr("with_residual").toBool()) {
      return module.attr(name).toTensor().detach().to(at::kCPU, at::kDouble);
    }
    double factor = 1.0 / std::sqrt(static_cast<double>(n));
    if (module.attr("average").toBool()) keep = factor = 1.0 / std::sqrt(static_cast<double>(n + 1));
    return at::full({n, width}, factor, at::TensorOptions().dtype(at::kDouble));
  };
  source.update_n = updates("n_residual", 2 + s.heads, s.n, s.keep_n);
  if (s.live_edge) source.update_e = updates("e_residual", s.with_angles ? 2 : 1, s.e, s.keep_e);
  if (s.live_angle) source.update_a = updates("a_residual", 1, s.a, s.keep_a);
  return source;
}

// --- weights per routing group ---

template <class T>
const T* PackedWeights<T>::keep(const at::Tensor& values) {
  memory_.push_back(values.to(c10::CppTypeToScalarType<T>::value).contiguous().clone());
  return memory_.back().template const_data_ptr<T>();
}

/// Copies (rows, heads * width) into the matrix `to` of `columns` columns at `row` and `column`, each head
/// padded to `stride` columns.
template <class T>
static void put(T* to, int64_t columns, int64_t row, int64_t column, const at::Tensor& from, int64_t heads,
                int64_t width, int64_t stride) {
  const at::Tensor values = from.contiguous();
  const T* source = values.template const_data_ptr<T>();
  for (int64_t r = 0; r < values.size(0); ++r) {
    for (int64_t h = 0; h < heads; ++h) {
      std::copy_n(source + (r * heads + h) * width, width, to + (row + r) * columns + column + h * stride);
    }
  }
}

/// (rows, columns) -> (columns, rows), in tiles that stay in cache.
template <class T>
static void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
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

/// out = start (or zeros) + the sum of row times matrix over `products`, `columns` wide.
/// Written out, because the order of the sums in a library's product depends on where the weights lie in
/// memory, and training that is restarted shall go on to the last bit.
template <class T>
static void sum_products(const T* start,
                         std::initializer_list<std::pair<const std::vector<T>*, const T*>> products,
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

template <class T>
auto PackedWeights<T>::active(size_t layer, const char* name, int64_t group) const -> Active {
  Active x;
  x.position = layers_[layer].find(name);
  if (!x.position->routed) {
    for (int64_t expert = 0; expert < x.position->matrix.size(0); ++expert) x.experts.push_back(expert);
    x.p = at::ones({1}, at::TensorOptions().dtype(at::kDouble));
    return x;
  }
  const Routes& routes = routes_[layer].at(x.position->router);
  x.experts = routes.experts[static_cast<size_t>(group)];
  x.p = routes.p[group];
  if (x.position->merge) x.mixed = x.p, x.p = at::ones_like(x.p.narrow(0, 0, 1));
  return x;
}

template <class T>
at::Tensor PackedWeights<T>::biases_of(const Active& x) {
  const at::Tensor bias =
      x.position->bias.index_select(0, at::tensor(x.experts, at::TensorOptions().dtype(at::kLong)));
  return x.mixed.defined() ? (bias * x.mixed.unsqueeze(1)).sum(0, true) : bias;
}

template <class T>
auto PackedWeights<T>::weights_of(const Active& x) -> Weights {
  const at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
  at::Tensor matrix = x.position->matrix.select(x.experts, dtype);
  if (x.mixed.defined()) {
    matrix = (matrix.to(at::kDouble) * x.mixed.reshape({-1, 1, 1})).sum(0, true).to(dtype);
  }
  return {matrix.contiguous(), biases_of(x)};
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
    if (!x->mixed.defined()) continue;
    const at::Tensor bits = x->mixed.contiguous().view(at::kLong);
    key.insert(key.end(), bits.const_data_ptr<int64_t>(), bits.const_data_ptr<int64_t>() + bits.numel());
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
  const LayerSource& source = layers_[layer];
  const LayerShape& s = source.shape;
  const bool first = layer == 0;
  const auto of = [&](const char* name) { return active(layer, name, group); };
  const auto matrix_of = [](const Weights& x, int64_t k) { return x.matrix[k]; };
  /// Biases of all experts, each head padded.
  const auto put_bias = [](T* to, const at::Tensor& bias, int64_t heads, int64_t width, int64_t stride) {
    for (int64_t k = 0; k < bias.size(0); ++k) {
      put(to, 0, 0, k * heads * stride, bias[k].unsqueeze(0).to(c10::CppTypeToScalarType<T>::value), heads,
          width, stride);
    }
  };
  Layout own;  // what is this group's alone: routing weights
  std::vector<std::pair<const T**, at::Tensor>> rows;
  const auto keep_row = [&](const T*& to, const at::Tensor& values) {
    own.row(values.numel());
    rows.emplace_back(&to, values.to(c10::CppTypeToScalarType<T>::value).contiguous());
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
            const at::Tensor matrix = matrix_of(from, k);
            for (int64_t m = 0; m < s.axis; ++m) {
              put(to.part(0), columns, m * s.ep, k * s.np, matrix.narrow(0, m * s.e, s.e), 1, s.n, s.np);
              put(to.part(0), columns, s.axis * s.ep + m * s.np, k * s.np,
                  matrix.narrow(0, s.axis * s.e + m * s.n, s.n), 1, s.n, s.np);
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
      const auto add = [&](const at::Tensor& matrix, int64_t at, int64_t heads, int64_t out, int64_t outp) {
        put(to.part(0), columns, 0, at, matrix.narrow(0, 0, s.n), heads, out, outp);
        put(to.part(2), columns, 0, at, matrix.narrow(0, s.n, s.n), heads, out, outp);
        put(to.part(4), columns, 0, at, matrix.narrow(0, 2 * s.n, s.e), heads, out, outp);
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
      sum_products<T>(nullptr, {{&edge_matrix_, to.part(4)}}, columns, to.part(7));
      sum_products<T>(to.part(6), {{&edge_bias_, to.part(4)}}, columns, to.part(8));
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
      const auto add = [&](const at::Tensor& matrix, int64_t at, int64_t out, int64_t outp) {
        int64_t row = 0;
        const auto part = [&](int64_t width) {
          row += width;
          return matrix.narrow(0, row - width, width);
        };
        // linear compression is folded into the map: (v W_c) W = v (W_c W)
        const auto folded = [&](const at::Tensor& compress, int64_t width) {
          const at::Tensor plain = part(width);
          return compress.defined() ? compress.matmul(plain.to(at::kDouble)).to(plain.scalar_type()) : plain;
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
      sum_products<T>(nullptr, {{&edge_matrix_, to.part(4)}}, columns, to.part(9));
      sum_products<T>(nullptr, {{&edge_matrix_, to.part(6)}}, columns, to.part(10));
      sum_products<T>(nullptr, {{&angle_direction_, to.part(0)}}, columns, to.part(11));
      sum_products<T>(to.part(8), {{&edge_bias_, to.part(4)}, {&edge_bias_, to.part(6)}}, columns,
                      to.part(12));
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
    at::Tensor far = at::zeros({columns}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
    put_bias(far.template mutable_data_ptr<T>(), biases_of(z), 1, s.e, s.ep);
    kernels_.activate(s.phi, far.template mutable_data_ptr<T>(), columns);
    keep_row(w.angle2_far, (far.reshape({s.k_angle2, s.ep}).to(at::kDouble) * z.p.unsqueeze(1)).sum(0));
  }

  // keyed by the group: p of other groups differ
  const Block& b = block(blocks, layer, kOwnKind + group, {}, own, [&](const Block& to) {
    for (size_t x = 0; x < rows.size(); ++x)
      std::copy_n(rows[x].second.template const_data_ptr<T>(), rows[x].second.numel(), to.part(x));
  });
  for (size_t x = 0; x < rows.size(); ++x) *rows[x].first = b.part(x);
}

template <class T>
void PackedWeights<T>::pack_group(int64_t group) {
  std::vector<std::shared_ptr<Block>> blocks;
  std::vector<GroupWeights<T>> of_layers(layers_.size());
  for (size_t l = 0; l < layers_.size(); ++l) pack_layer(l, group, blocks, of_layers[l]);
  const auto g = static_cast<size_t>(group);
  for (size_t l = 0; l < layers_.size(); ++l) weights_[l][g] = of_layers[l];
  groups_[g].blocks = std::move(blocks);
}

template <class T>
void PackedWeights<T>::pack_updates() {
  for (const LayerSource& source : layers_) {
    UpdateVectors<T> update;
    const auto padded_update = [&](const at::Tensor& rows, int64_t width) {
      at::Tensor out = zeros(rows.size(0), width);
      out.narrow(1, 0, rows.size(1)).copy_(rows);
      return keep(out);
    };
    update.n = padded_update(source.update_n, source.shape.np);
    if (source.shape.live_edge) update.e = padded_update(source.update_e, source.shape.ep);
    if (source.shape.live_angle) update.a = padded_update(source.update_a, source.shape.ap);
    updates_.push_back(update);
  }
}

template <class T>
void PackedWeights<T>::pack_first_layer(const LayerShape& s, GroupWeights<T>& w) {
  const auto sums = [&](const T* start,
                        std::initializer_list<std::pair<const std::vector<T>*, const T*>> products,
                        int64_t columns) {
    at::Tensor out = at::empty({columns}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
    sum_products<T>(start, products, columns, out.template mutable_data_ptr<T>());
    memory_.push_back(out);
    return out.template const_data_ptr<T>();
  };
  const int64_t ce = s.edge_columns(), ca = s.angle_columns();
  w.edge_r = sums(nullptr, {{&edge_matrix_, w.edge_e}}, ce);
  w.edge_r_b = sums(w.edge_b, {{&edge_bias_, w.edge_e}}, ce);
  if (!s.with_angles) return;
  w.angle_j_r = sums(nullptr, {{&edge_matrix_, w.angle_j}}, ca);
  w.angle_k_r = sums(nullptr, {{&edge_matrix_, w.angle_k}}, ca);
  w.angle_cos = sums(nullptr, {{&angle_direction_, w.angle_a}}, ca);
  w.angle_r_b = sums(w.angle_b, {{&edge_bias_, w.angle_j}, {&edge_bias_, w.angle_k}}, ca);
}

/// Routes all groups; what is laid out stays where groups were only added.
template <class T>
void PackedWeights<T>::route(const at::Tensor& features) {
  const bool grown = features_.defined() && features.size(0) > features_.size(0) &&
                     features.scalar_type() == features_.scalar_type() &&
                     features.size(1) == features_.size(1) &&
                     at::equal(features.narrow(0, 0, features_.size(0)), features_);
  if (!grown) release_groups();
  routes_.assign(layers_.size(), {});
  const auto n_group = static_cast<size_t>(features.size(0));
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (const auto& router : layers_[l].module.attr("routers").toModule().named_children()) {
      Module module = router.value;
      const auto found = module.get_method("forward")({features}).toTuple();
      const at::Tensor ids = found->elements()[0].toTensor().to(at::kCPU, at::kLong).contiguous();
      Routes& routes = routes_[l][router.name];
      routes.p = found->elements()[1].toTensor().to(at::kCPU, at::kDouble);
      for (size_t g = 0; g < n_group; ++g) {
        const int64_t* row = ids.const_data_ptr<int64_t>() + static_cast<int64_t>(g) * ids.size(1);
        routes.experts.emplace_back(row, row + ids.size(1));
      }
    }
    // the numbers of active experts are the same in every group
    LayerShape& s = layers_[l].shape;
    const auto k = [&](const char* name) { return active(l, name, 0).k(); };
    s.k_node = k("node_self_mlp"), s.k_sym = k("node_sym_linear"), s.k_message = k("node_edge_linear");
    s.k_edge = s.live_edge ? k("edge_self_linear") : 0;
    if (!s.with_angles) continue;
    s.k_angle1 = k("edge_angle_linear1"), s.k_angle2 = k("edge_angle_linear2");
    s.k_angle = s.live_angle ? k("angle_self_linear") : 0;
  }
  features_ = features.clone();
  groups_.resize(n_group);
  weights_.resize(layers_.size());
  for (auto& of_layer : weights_) of_layer.resize(n_group);
}

template <class T>
bool PackedWeights<T>::set_groups(const at::Tensor& features, const std::vector<int64_t>& used) {
  bool changed = false;
  if (!features_.defined() || features_.sizes() != features.sizes() || !at::equal(features_, features)) {
    route(features);
    changed = true;
  }
  if (updates_.empty()) pack_updates();
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
  const int64_t limit = present + (kept_ >= 0 ? kept_ : memory_left_());
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
  for (auto& of_layer : weights_) of_layer[group] = {};
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

template <class T>
PackedWeights<T>::PackedWeights(const Module& geometry, const Module& embedding,
                                const std::vector<Module>& layers, const Kernels<T>& kernels,
                                const DeferredTensors* deferred)
    : kernels_(kernels), kept_(kept_weights()) {
  read_geometry(geometry);
  for (const Module& layer : layers) layers_.push_back(read_layer(layer, deferred));
  if (layers_.empty()) throw Unsupported{"a model without layers"};
  read_embedding(embedding);
}

template class PackedWeights<float>;
template class PackedWeights<double>;

}  // namespace moecalc
