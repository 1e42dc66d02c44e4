#include "packed_weights.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <map>
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

/// Active experts of a group at a position: weights (K, in, out), (K, out), p (K,), all float64.
struct Active {
  at::Tensor matrix, bias, p;
};

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
  const at::Tensor y = table.get_method("forward")({}).toTensor();
  for (int64_t t = 0; t < y.size(0); ++t) {
    std::vector<T> row = padded_row<T>(y[t], s.np);
    kernels_.activate(phi_, row.data(), s.np);
    node_table_.insert(node_table_.end(), row.begin(), row.end());
  }
}

template <class T>
Position PackedWeights<T>::read_position(const Module& module) {
  Position position;
  position.matrix = module.attr("matrix").toTensor().detach().to(at::kCPU, at::kDouble);
  position.bias = module.attr("bias").toTensor().detach().to(at::kCPU, at::kDouble);
  position.router = module.attr("router").toStringRef();
  position.routed = module.attr("routed").toBool();
  position.merge = module.attr("merge").toBool();
  return position;
}

template <class T>
LayerSource PackedWeights<T>::read_layer(const Module& module) {
  LayerSource source;
  source.module = module;
  if (module.attr("sequential").toBool()) throw Unsupported{"sequential_update"};
  LayerShape& s = source.shape;
  for (const char* name : {"node_self_mlp", "node_sym_linear", "node_edge_linear", "edge_self_linear",
                           "edge_angle_linear1", "edge_angle_linear2", "angle_self_linear"}) {
    if (!module.hasattr(name)) continue;
    source.names.emplace_back(name);
    source.positions.push_back(read_position(module.attr(name).toModule()));
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

static Active active_experts(const Position& position, const std::map<std::string, IValue>& routes,
                             int64_t group) {
  if (!position.routed) {
    return {position.matrix, position.bias, at::ones({1}, at::TensorOptions().dtype(at::kDouble))};
  }
  const auto& route = routes.at(position.router).toTupleRef().elements();
  const at::Tensor ids = route[0].toTensor().to(at::kCPU)[group];
  const at::Tensor p = route[1].toTensor().to(at::kCPU, at::kDouble)[group];
  const at::Tensor matrix = position.matrix.index_select(0, ids), bias = position.bias.index_select(0, ids);
  if (!position.merge) return {matrix, bias, p};
  return {(matrix * p.reshape({-1, 1, 1})).sum(0, true), (bias * p.unsqueeze(1)).sum(0, true),
          at::ones_like(p.narrow(0, 0, 1))};
}

/// Copies (rows, heads * width) into `to` at `column`, each head padded to `stride` columns.
static void put(at::Tensor& to, int64_t row, int64_t column, const at::Tensor& from, int64_t heads,
                int64_t width, int64_t stride) {
  for (int64_t h = 0; h < heads; ++h) {
    to.narrow(0, row, from.size(0))
        .narrow(1, column + h * stride, width)
        .copy_(from.narrow(1, h * width, width));
  }
}

template <class T>
void PackedWeights<T>::pack_layer(const LayerSource& source, const at::Tensor& features) {
  const LayerShape& fixed = source.shape;
  std::map<std::string, IValue> routes;
  for (const auto& router : source.module.attr("routers").toModule().named_children()) {
    Module module = router.value;
    routes.emplace(router.name, module.get_method("forward")({features}));
  }
  std::vector<GroupWeights<T>> groups;
  LayerShape shape = fixed;
  for (int64_t g = 0; g < features.size(0); ++g) {
    const auto active = [&](const char* name) { return active_experts(*source.find(name), routes, g); };
    GroupWeights<T> w;
    LayerShape s = fixed;
    const auto plain = [&](const Active& x, int64_t out, int64_t outp, at::Tensor& bias) {
      const int64_t k = x.p.size(0);
      bias = zeros(1, k * outp);
      for (int64_t y = 0; y < k; ++y) put(bias, 0, y * outp, x.bias.narrow(0, y, 1), 1, out, outp);
      return k;
    };
    at::Tensor bias;
    {  // node_self_mlp
      const Active x = active("node_self_mlp");
      s.k_node = plain(x, s.n, s.np, bias);
      at::Tensor matrix = zeros(s.np, s.k_node * s.np);
      for (int64_t y = 0; y < s.k_node; ++y) put(matrix, 0, y * s.np, x.matrix[y], 1, s.n, s.np);
      w.node = keep(matrix), w.node_t = keep_transposed(matrix), w.node_b = keep(bias), w.p_node = keep(x.p);
    }
    {  // node_sym_linear: rows [edge block, neighbour block], each axis * width
      const Active x = active("node_sym_linear");
      s.k_sym = plain(x, s.n, s.np, bias);
      at::Tensor matrix = zeros(s.sym_in(), s.k_sym * s.np);
      for (int64_t y = 0; y < s.k_sym; ++y) {
        for (int64_t m = 0; m < s.axis; ++m) {
          put(matrix, m * s.ep, y * s.np, x.matrix[y].narrow(0, m * s.e, s.e), 1, s.n, s.np);
          put(matrix, s.axis * s.ep + m * s.np, y * s.np, x.matrix[y].narrow(0, s.axis * s.e + m * s.n, s.n),
              1, s.n, s.np);
        }
      }
      w.sym = keep(matrix), w.sym_t = keep_transposed(matrix), w.sym_b = keep(bias), w.p_sym = keep(x.p);
    }
    {  // node_edge_linear and edge_self_linear share their input [v_i, v_j, e_ij]
      const Active x = active("node_edge_linear");
      const Active y = s.live_edge ? active("edge_self_linear") : Active{};
      s.k_message = x.p.size(0);
      s.k_edge = s.live_edge ? y.p.size(0) : 0;
      const int64_t columns = s.edge_columns(), width = s.heads * s.np;
      at::Tensor centre = zeros(s.np, columns), neighbor = zeros(s.np, columns), edge = zeros(s.ep, columns);
      at::Tensor b = zeros(1, columns);
      for (int64_t k = 0; k < s.k_message; ++k) {
        put(centre, 0, k * width, x.matrix[k].narrow(0, 0, s.n), s.heads, s.n, s.np);
        put(neighbor, 0, k * width, x.matrix[k].narrow(0, s.n, s.n), s.heads, s.n, s.np);
        put(edge, 0, k * width, x.matrix[k].narrow(0, 2 * s.n, s.e), s.heads, s.n, s.np);
        put(b, 0, k * width, x.bias.narrow(0, k, 1), s.heads, s.n, s.np);
      }
      for (int64_t k = 0; k < s.k_edge; ++k) {
        const int64_t at = s.message() + k * s.ep;
        put(centre, 0, at, y.matrix[k].narrow(0, 0, s.n), 1, s.e, s.ep);
        put(neighbor, 0, at, y.matrix[k].narrow(0, s.n, s.n), 1, s.e, s.ep);
        put(edge, 0, at, y.matrix[k].narrow(0, 2 * s.n, s.e), 1, s.e, s.ep);
        put(b, 0, at, y.bias.narrow(0, k, 1), 1, s.e, s.ep);
      }
      w.edge_c = keep(centre), w.edge_c_t = keep_transposed(centre), w.edge_b = keep(b);
      w.edge_n = keep(neighbor), w.edge_n_t = keep_transposed(neighbor);
      w.edge_e = keep(edge), w.edge_e_t = keep_transposed(edge);
      w.p_message = keep(x.p);
      if (s.live_edge) w.p_edge = keep(y.p);
    }
    if (s.with_angles) {  // edge_angle_linear1 and angle_self_linear share [a, vc_i, ec_ik, ec_ij]
      const Active x = active("edge_angle_linear1");
      const Active y = s.live_angle ? active("angle_self_linear") : Active{};
      s.k_angle1 = x.p.size(0);
      s.k_angle = s.live_angle ? y.p.size(0) : 0;
      const int64_t columns = s.angle_columns();
      at::Tensor angle = zeros(s.ap, columns), centre = zeros(s.np, columns), ek = zeros(s.ep, columns),
                 ej = zeros(s.ep, columns), b = zeros(1, columns);
      const auto add = [&](const at::Tensor& matrix, const at::Tensor& bias_row, int64_t at, int64_t out,
                           int64_t outp) {
        int64_t row = 0;
        put(angle, 0, at, matrix.narrow(0, row, s.a), 1, out, outp);
        row += s.a;
        // linear compression is folded into the map: (v W_c) W = v (W_c W)
        const auto folded = [&](const at::Tensor& compress, int64_t width) {
          const at::Tensor part = matrix.narrow(0, row, width);
          row += width;
          return compress.defined() ? compress.matmul(part) : part;
        };
        put(centre, 0, at, folded(source.compress_n, source.vc_dim), 1, out, outp);
        put(ek, 0, at, folded(source.compress_e, source.ec_dim), 1, out, outp);
        put(ej, 0, at, folded(source.compress_e, source.ec_dim), 1, out, outp);
        put(b, 0, at, bias_row, 1, out, outp);
      };
      for (int64_t k = 0; k < s.k_angle1; ++k) add(x.matrix[k], x.bias.narrow(0, k, 1), k * s.ep, s.e, s.ep);
      for (int64_t k = 0; k < s.k_angle; ++k) {
        add(y.matrix[k], y.bias.narrow(0, k, 1), s.angle1() + k * s.ap, s.a, s.ap);
      }
      w.angle_a = keep(angle), w.angle_a_t = keep_transposed(angle);
      w.angle_c = keep(centre), w.angle_c_t = keep_transposed(centre), w.angle_b = keep(b);
      w.angle_j = keep(ej), w.angle_j_t = keep_transposed(ej);
      w.angle_k = keep(ek), w.angle_k_t = keep_transposed(ek);
      w.p_angle1 = keep(x.p);
      if (s.live_angle) w.p_angle = keep(y.p);

      const Active z = active("edge_angle_linear2");
      s.k_angle2 = plain(z, s.e, s.ep, bias);
      at::Tensor matrix = zeros(s.ep, s.k_angle2 * s.ep);
      for (int64_t k = 0; k < s.k_angle2; ++k) put(matrix, 0, k * s.ep, z.matrix[k], 1, s.e, s.ep);
      w.angle2 = keep(matrix), w.angle2_t = keep_transposed(matrix), w.angle2_b = keep(bias),
      w.p_angle2 = keep(z.p);
      // what an edge without a message gets: sum_k p_k phi(b_k)
      at::Tensor far = bias.to(c10::CppTypeToScalarType<T>::value).contiguous();
      kernels_.activate(s.phi, far.template mutable_data_ptr<T>(), far.numel());
      w.angle2_far = keep((far.reshape({s.k_angle2, s.ep}).to(at::kDouble) * z.p.unsqueeze(1)).sum(0));
    }
    if (&source == &layers_[0]) pack_first_layer(s, w);
    groups.push_back(w);
    shape = s;
  }
  // the numbers of active experts are the same in every group
  for (LayerSource& layer : layers_) {
    if (&layer == &source) layer.shape = shape;
  }
  weights_.push_back(std::move(groups));

  UpdateVectors<T> update;
  const auto padded_update = [&](const at::Tensor& rows, int64_t width) {
    at::Tensor out = zeros(rows.size(0), width);
    out.narrow(1, 0, rows.size(1)).copy_(rows);
    return keep(out);
  };
  update.n = padded_update(source.update_n, shape.np);
  if (shape.live_edge) update.e = padded_update(source.update_e, shape.ep);
  if (shape.live_angle) update.a = padded_update(source.update_a, shape.ap);
  updates_.push_back(update);
}

template <class T>
void PackedWeights<T>::pack_first_layer(const LayerShape& s, GroupWeights<T>& w) {
  // Written out, because the order of the sums in a library's product depends on where the weights lie in
  // memory, and training that is restarted shall go on to the last bit.
  std::vector<double> sums;
  const auto add = [&sums](const std::vector<T>& row, const T* matrix) {
    for (size_t k = 0; k < row.size(); ++k) {
      for (size_t c = 0; c < sums.size(); ++c)
        sums[c] += double(row[k]) * double(matrix[k * sums.size() + c]);
    }
  };
  const auto product = [&](int64_t columns, const std::vector<T>& row, const T* matrix) {
    sums.assign(static_cast<size_t>(columns), 0.0);
    add(row, matrix);
    return keep(at::tensor(sums));
  };
  const int64_t ce = s.edge_columns(), ca = s.angle_columns();
  w.edge_r = product(ce, edge_matrix_, w.edge_e);
  sums.assign(w.edge_b, w.edge_b + ce);
  add(edge_bias_, w.edge_e);
  w.edge_r_b = keep(at::tensor(sums));
  if (!s.with_angles) return;
  w.angle_j_r = product(ca, edge_matrix_, w.angle_j), w.angle_k_r = product(ca, edge_matrix_, w.angle_k);
  w.angle_cos = product(ca, angle_direction_, w.angle_a);
  sums.assign(w.angle_b, w.angle_b + ca);
  add(edge_bias_, w.angle_j), add(edge_bias_, w.angle_k);
  w.angle_r_b = keep(at::tensor(sums));
}

template <class T>
bool PackedWeights<T>::set_groups(const at::Tensor& features) {
  if (features_.defined() && features_.sizes() == features.sizes() && at::equal(features_, features)) {
    return false;
  }
  features_ = features.clone();
  memory_.clear();
  weights_.clear();
  updates_.clear();
  for (const LayerSource& layer : layers_) pack_layer(layer, features);
  return true;
}

template <class T>
PackedWeights<T>::PackedWeights(const Module& geometry, const Module& embedding,
                                const std::vector<Module>& layers, const Kernels<T>& kernels)
    : kernels_(kernels) {
  read_geometry(geometry);
  for (const Module& layer : layers) layers_.push_back(read_layer(layer));
  if (layers_.empty()) throw Unsupported{"a model without layers"};
  read_embedding(embedding);
}

template class PackedWeights<float>;
template class PackedWeights<double>;

}  // namespace moecalc
