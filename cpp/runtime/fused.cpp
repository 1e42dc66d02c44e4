#include "fused.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "../ops/layer.h"

namespace moecalc {
namespace {

using torch::jit::IValue;
using torch::jit::Module;
using namespace ops;

constexpr int64_t kRows = 32;  // rows of nodes or slots that one task works on
/// Backward: gradients of edges are summed over the edges of a neighbour. Centres are worked on in batches,
/// so that these rows are read again while they are in the last-level cache.
constexpr int64_t kBatchBytes = int64_t{4} << 20;
constexpr int64_t kCentresPerThread = 8;  // at least, in a batch

/// Raised while reading a package: the fused kernels do not cover it.
struct Unsupported {
  std::string reason;
};

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

Activation activation_of(const Module& phi) {
  return {kind_of(phi.attr("kind").toStringRef()), phi.attr("threshold").toDouble(),
          phi.attr("slope").toDouble(), phi.attr("offset").toDouble()};
}

at::Tensor zeros(int64_t rows, int64_t columns) {
  return at::zeros({rows, columns}, at::TensorOptions().dtype(at::kDouble));
}

/// Switch function and its derivative (SPEC section 3).
struct Switch {
  bool exponential;
  double start, stop;

  void operator()(double r, double& s, double& ds) const {
    if (exponential) {
      if (r > stop) {
        s = ds = 0.0;
        return;
      }
      const double k = 20.0 / start, inner = std::exp(k * (r - start));
      s = std::exp(-inner);
      ds = -k * inner * s;
      return;
    }
    const double width = stop - start, u = std::clamp((r - start) / width, 0.0, 1.0);
    s = 1.0 + u * u * u * (-10.0 + u * (15.0 - 6.0 * u));
    ds = -30.0 * u * u * (1.0 - u) * (1.0 - u) / width;
  }
};

struct GeometryRules {
  Switch edge, angle;
  bool use_dist;
  double protection;
  std::vector<double> mean, stddev;  // (n_types * 4)
};

/// One position of a layer as read from the package.
struct Position {
  at::Tensor matrix, bias;  // (E, in, out), (E, out) float64
  std::string router;
  bool routed = false, merge = false;
};

/// Active experts of a group at a position: weights (K, in, out), (K, out), p (K,), all float64.
struct Active {
  at::Tensor matrix, bias, p;
};

struct LayerSource {
  Module module;
  LayerShape shape;
  std::vector<std::string> names;
  std::vector<Position> positions;
  int64_t e_dim = 0, vc_dim = 0, ec_dim = 0;
  at::Tensor compress_n, compress_e;  // float64, undefined where columns are split or nothing is compressed
  at::Tensor update_n, update_e, update_a;  // float64, unpadded: (q, dim)

  const Position* find(const std::string& name) const {
    for (size_t k = 0; k < names.size(); ++k) {
      if (names[k] == name) return &positions[k];
    }
    return nullptr;
  }
};

template <class T>
class Fused final : public FusedModel {
 public:
  Fused(const Module& geometry, const Module& embedding, const std::vector<Module>& layers)
      : kernels_(ops::kernels<T>(std::getenv("MOECALC_CPU"))) {
    read_geometry(geometry);
    for (const Module& layer : layers) layers_.push_back(read_layer(layer));
    if (layers_.empty()) throw Unsupported{"a model without layers"};
    for (auto* buffers : {&v_, &e_, &a_}) buffers->resize(layers_.size() + 1);
    for (auto* buffers : {&m_, &big_h_, &zc_, &zn_, &zca_, &node_slope_}) buffers->resize(layers_.size());
    read_embedding(embedding);
  }

  at::Tensor forward(const PreparedGraph& graph, const at::Tensor& features,
                     const Exchange& with_ghosts) override;
  at::Tensor backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                      const Exchange& without_ghosts) override;
  LayerTensors one_layer(const PreparedGraph& graph, const at::Tensor& features, int64_t layer,
                         const LayerTensors& in) override;
  LayerTensors one_layer_backward(int64_t layer, const LayerTensors& in,
                                  const LayerTensors& gradients) override;
  int64_t bytes() const override;
  const char* instruction_set() const override { return kernels_.name; }
  void take_timings(Timings& timings) override {
    static constexpr const char* names[] = {"angles",          "edges",          "symmetrisation",
                                            "angles backward", "edges backward", "symmetrisation backward"};
    for (size_t part = 0; part < 6; ++part) {
      double total = 0.0;
      for (Scratch<T>& scratch : scratch_) total += std::exchange(scratch.seconds[part], 0.0);
      timings.emplace_back(names[part], total / static_cast<double>(std::max<size_t>(1, scratch_.size())));
    }
  }

 private:
  // --- reading ---
  void read_geometry(const Module& module);
  void read_embedding(const Module& module);
  LayerSource read_layer(const Module& module);
  static Position read_position(const Module& module);

  // --- weights per routing group ---
  void set_groups(const at::Tensor& features);
  void pack_layer(const LayerSource& source, const at::Tensor& features);
  const T* keep(const at::Tensor& values);
  const T* keep_transposed(const at::Tensor& values) { return keep(values.t()); }

  // --- one evaluation ---
  void view(const PreparedGraph& graph);
  void shape_geometry(const PreparedGraph& graph);
  at::Tensor geometry_backward(const PreparedGraph& graph);
  LayerArgs<T> arguments(size_t layer, bool from_cosines);
  void layer_forward(size_t l, bool from_cosines);
  void layer_backward(size_t l, bool nodes, bool from_cosines);
  void layer_backward_centres(LayerArgs<T>& x, bool nodes);
  void start_backward();
  void project(const LayerArgs<T>& x);

  /// f(task, scratch) for all tasks, handed out one by one.
  template <class F>
  void parallel(int64_t n, const F& f) {
    const int64_t n_thread = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), n));
    if (scratch_.size() < static_cast<size_t>(n_thread)) scratch_.resize(static_cast<size_t>(n_thread));
    std::atomic<int64_t> next{0};
    at::parallel_for(0, n_thread, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        Scratch<T>& scratch = scratch_[static_cast<size_t>(thread)];
        for (int64_t task = next++; task < n; task = next++) f(task, scratch);
      }
    });
  }
  /// f(begin, end, scratch) for chunks of local rows that belong to one group.
  template <class F>
  void parallel_rows(const F& f) {
    parallel(static_cast<int64_t>(row_chunks_.size()), [&](int64_t k, Scratch<T>& scratch) {
      f(row_chunks_[static_cast<size_t>(k)].first, row_chunks_[static_cast<size_t>(k)].second, scratch);
    });
  }

  const Kernels<T>& kernels_;
  GeometryRules rules_;
  Activation phi_;
  bool use_dist_ = true;
  std::vector<T> edge_matrix_, edge_bias_, angle_direction_;  // padded; a = cos * angle_direction
  std::vector<LayerSource> layers_;

  at::Tensor features_;                                // for which the weights below were packed
  std::vector<at::Tensor> memory_;                     // of the packed weights
  std::vector<std::vector<GroupWeights<T>>> weights_;  // [layer][group]
  std::vector<UpdateVectors<T>> updates_;
  std::vector<T> node_table_;  // phi(Y), (n_types x np)

  // Of the last graph.
  GraphView g_;
  std::vector<int64_t> group_, slot_, slot_node_, slot_splits_, slot_first_, slot_edges_, slot_next_;
  std::vector<std::pair<int64_t, int64_t>> row_chunks_;
  struct SlotChunk {
    int64_t group, begin, end;
  };
  std::vector<SlotChunk> slot_chunks_;
  std::vector<size_t> slot_chunk_splits_;

  bool de_live_ = false, da_live_ = false;  // whether de_ and da_ hold gradients of the layer's outputs yet

  // Buffers; they grow and stay.
  std::vector<Scratch<T>> scratch_;
  std::vector<Buffer<T>> v_, e_, a_;  // inputs of every layer, and the last outputs
  std::vector<Buffer<T>> m_, big_h_, zc_, zn_, zca_, node_slope_;  // of every layer, for its backward
  Buffer<T> sw_, h_, asw_, cos_, message_, edge_input_;
  Buffer<T> dv_, dv_out_, de_, da_, dz_, dzc_, dzca_, dbig_h_, dmessage_, dasw_, dcos_, dzn_;
  Buffer<double> r_, dsw_, dh_, ds_edge_, angle_sw_, dangle_sw_, unit_;
};

// --- reading the package
// ----------------------------------------------------------------------------------------------

template <class T>
void Fused<T>::read_geometry(const Module& module) {
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
std::vector<T> padded_row(const at::Tensor& values, int64_t width) {
  std::vector<T> row(static_cast<size_t>(width), T(0));
  const at::Tensor flat = values.detach().to(at::kCPU, at::kDouble).reshape({-1}).contiguous();
  for (int64_t d = 0; d < flat.numel(); ++d)
    row[static_cast<size_t>(d)] = T(flat.const_data_ptr<double>()[d]);
  return row;
}

template <class T>
void Fused<T>::read_embedding(const Module& module) {
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
Position Fused<T>::read_position(const Module& module) {
  Position position;
  position.matrix = module.attr("matrix").toTensor().detach().to(at::kCPU, at::kDouble);
  position.bias = module.attr("bias").toTensor().detach().to(at::kCPU, at::kDouble);
  position.router = module.attr("router").toStringRef();
  position.routed = module.attr("routed").toBool();
  position.merge = module.attr("merge").toBool();
  return position;
}

template <class T>
LayerSource Fused<T>::read_layer(const Module& module) {
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

// --- weights
// -----------------------------------------------------------------------------------------------------------

template <class T>
const T* Fused<T>::keep(const at::Tensor& values) {
  memory_.push_back(values.to(c10::CppTypeToScalarType<T>::value).contiguous().clone());
  return memory_.back().template const_data_ptr<T>();
}

Active active_experts(const Position& position, const std::map<std::string, IValue>& routes, int64_t group) {
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
void put(at::Tensor& to, int64_t row, int64_t column, const at::Tensor& from, int64_t heads, int64_t width,
         int64_t stride) {
  for (int64_t h = 0; h < heads; ++h) {
    to.narrow(0, row, from.size(0))
        .narrow(1, column + h * stride, width)
        .copy_(from.narrow(1, h * width, width));
  }
}

template <class T>
void Fused<T>::pack_layer(const LayerSource& source, const at::Tensor& features) {
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
      if (&source == &layers_[0]) {
        at::Tensor direction = zeros(1, s.ap);
        std::copy(angle_direction_.begin(), angle_direction_.end(), direction.mutable_data_ptr<double>());
        w.angle_cos = keep(direction.matmul(angle));
      }
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
void Fused<T>::set_groups(const at::Tensor& features) {
  if (features_.defined() && features_.sizes() == features.sizes() && at::equal(features_, features)) return;
  features_ = features.clone();
  memory_.clear();
  weights_.clear();
  updates_.clear();
  for (const LayerSource& layer : layers_) pack_layer(layer, features);
}

// --- the graph
// ---------------------------------------------------------------------------------------------------------

template <class T>
void Fused<T>::view(const PreparedGraph& graph) {
  g_.n_node = graph.n_node, g_.n_local = graph.n_local, g_.n_edge = graph.n_edge, g_.n_angle = graph.n_angle;
  g_.n_group = static_cast<int64_t>(graph.node_splits.size()) - 1;
  g_.first_edge = graph.edge_offset.data();
  g_.first_angle = graph.angle_offset.data();
  g_.n_close = graph.close_count.data();
  g_.centre = graph.edge_index.const_data_ptr<int64_t>();
  g_.neighbor = g_.centre + graph.n_edge;

  group_.resize(static_cast<size_t>(graph.n_local));
  row_chunks_.clear();
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t begin = graph.node_splits[static_cast<size_t>(group)],
                  end = graph.node_splits[static_cast<size_t>(group) + 1];
    std::fill(group_.begin() + begin, group_.begin() + end, group);
    for (int64_t row = begin; row < end; row += kRows)
      row_chunks_.emplace_back(row, std::min(row + kRows, end));
  }
  g_.group = group_.data();

  // Slots: (group of the centre, neighbour) pairs, group by group.
  slot_.resize(static_cast<size_t>(graph.n_edge));
  slot_node_.clear();
  slot_splits_.assign(1, 0);
  std::vector<int64_t> of_node(static_cast<size_t>(graph.n_node), -1);
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t first = slot_splits_.back();
    for (int64_t edge = graph.edge_splits[static_cast<size_t>(group)];
         edge < graph.edge_splits[static_cast<size_t>(group) + 1]; ++edge) {
      int64_t& place = of_node[static_cast<size_t>(g_.neighbor[edge])];
      if (place < first) {
        place = static_cast<int64_t>(slot_node_.size());
        slot_node_.push_back(g_.neighbor[edge]);
      }
      slot_[static_cast<size_t>(edge)] = place;
    }
    slot_splits_.push_back(static_cast<int64_t>(slot_node_.size()));
  }
  g_.n_slot = static_cast<int64_t>(slot_node_.size());
  slot_first_.assign(static_cast<size_t>(g_.n_slot) + 1, 0);
  for (const int64_t slot : slot_) ++slot_first_[static_cast<size_t>(slot) + 1];
  std::partial_sum(slot_first_.begin(), slot_first_.end(), slot_first_.begin());
  slot_edges_.resize(static_cast<size_t>(graph.n_edge));
  {
    std::vector<int64_t> next(slot_first_.begin(), slot_first_.end() - 1);
    for (int64_t edge = 0; edge < graph.n_edge; ++edge) {
      slot_edges_[static_cast<size_t>(next[static_cast<size_t>(slot_[static_cast<size_t>(edge)])]++)] = edge;
    }
  }
  slot_chunks_.clear();
  slot_chunk_splits_.assign(1, 0);
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t end = slot_splits_[static_cast<size_t>(group) + 1];
    for (int64_t row = slot_splits_[static_cast<size_t>(group)]; row < end; row += kRows) {
      slot_chunks_.push_back({group, row, std::min(row + kRows, end)});
    }
    slot_chunk_splits_.push_back(slot_chunks_.size());
  }
  g_.slot = slot_.data();
  g_.slot_node = slot_node_.data();
  g_.slot_splits = slot_splits_.data();
  g_.slot_first = slot_first_.data();
  g_.slot_edges = slot_edges_.data();
}

/// Distances, switches, directions and cosines, computed in float64 and stored in the network's dtype.
template <class T>
void Fused<T>::shape_geometry(const PreparedGraph& graph) {
  const int64_t n_edge = graph.n_edge;
  const double* vec = graph.edge_vec.const_data_ptr<double>();
  const int64_t* type = graph.types.const_data_ptr<int64_t>();
  const bool angles = layers_[0].shape.with_angles;
  double* r = r_.get(n_edge);
  double* ds = ds_edge_.get(n_edge);
  double* sa = angle_sw_.get(2 * n_edge);
  double* unit = unit_.get(3 * n_edge);
  T *sw = sw_.get(n_edge), *h = h_.get(4 * n_edge), *input = edge_input_.get(n_edge);
  T *cos = cos_.get(graph.n_angle), *asw = asw_.get(graph.n_angle);
  const double norm = 1.0 / std::sqrt(layers_[0].shape.edge_norm);
  parallel(graph.n_local, [&](int64_t i, Scratch<T>&) {
    const double* mean = rules_.mean.data() + 4 * type[i];
    const double* stddev = rules_.stddev.data() + 4 * type[i];
    const int64_t e0 = g_.first_edge[i], m = g_.n_close[i];
    for (int64_t e = e0; e < g_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      r[e] = std::sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
      double s;
      rules_.edge(r[e], s, ds[e]);
      const double rp = r[e] + rules_.protection;
      sw[e] = T(s);
      input[e] = T(rules_.use_dist ? r[e] : (s / rp - mean[0]) / stddev[0]);
      for (int c = 0; c < 3; ++c)
        h[4 * e + c] = T(norm * s * (s * x[c] / (rp * rp) - mean[c + 1]) / stddev[c + 1]);
      h[4 * e + 3] = T(0);
    }
    if (!angles) return;
    for (int64_t e = e0; e < e0 + m; ++e) {
      rules_.angle(r[e], sa[2 * e], sa[2 * e + 1]);
      for (int c = 0; c < 3; ++c) unit[3 * e + c] = vec[3 * e + c] / (r[e] + 1e-6);
    }
    int64_t at = g_.first_angle[i];
    for (int64_t j = e0; j < e0 + m; ++j) {
      for (int64_t k = e0; k < e0 + m; ++k, ++at) {
        cos[at] = T((unit[3 * j] * unit[3 * k] + unit[3 * j + 1] * unit[3 * k + 1] +
                     unit[3 * j + 2] * unit[3 * k + 2]) *
                    (1.0 - 1e-6));
        asw[at] = T(sa[2 * j] * sa[2 * k]);
      }
    }
  });
}

template <class T>
at::Tensor Fused<T>::geometry_backward(const PreparedGraph& graph) {
  const double* vec = graph.edge_vec.const_data_ptr<double>();
  const int64_t* type = graph.types.const_data_ptr<int64_t>();
  const LayerShape& s0 = layers_[0].shape;
  const double norm = 1.0 / std::sqrt(s0.edge_norm);
  at::Tensor gradient = at::empty({graph.n_edge, 3}, at::TensorOptions().dtype(at::kDouble));
  auto* g = gradient.mutable_data_ptr<double>();
  const double *r = r_.get(0), *ds = ds_edge_.get(0), *sa = angle_sw_.get(0), *unit = unit_.get(0);
  const double *dsw_in = dsw_.get(0), *dh = dh_.get(0);
  const T *dasw = dasw_.get(0), *dcos_in = dcos_.get(0), *de = de_.get(0), *input = edge_input_.get(0);
  double* work = dangle_sw_.get(4 * graph.n_edge);  // gradient of the angle switch and of the unit vector
  parallel(graph.n_local, [&](int64_t i, Scratch<T>& scratch) {
    const double* mean = rules_.mean.data() + 4 * type[i];
    const double* stddev = rules_.stddev.data() + 4 * type[i];
    const int64_t e0 = g_.first_edge[i], m = g_.n_close[i];
    std::fill(work + 4 * e0, work + 4 * (e0 + m), 0.0);
    if (s0.with_angles) {
      int64_t at = g_.first_angle[i];
      for (int64_t j = e0; j < e0 + m; ++j) {
        for (int64_t k = e0; k < e0 + m; ++k, ++at) {
          const double dcos = double(dcos_in[at]) * (1.0 - 1e-6);
          const double dswitch = dasw[at];
          work[4 * j] += dswitch * sa[2 * k];
          work[4 * k] += dswitch * sa[2 * j];
          for (int c = 0; c < 3; ++c) {
            work[4 * j + 1 + c] += dcos * unit[3 * k + c];
            work[4 * k + 1 + c] += dcos * unit[3 * j + c];
          }
        }
      }
    }
    T* z = scratch.z.get(s0.ep);
    T* slope = scratch.y.get(s0.ep);
    for (int64_t e = e0; e < g_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      const double rp = r[e] + rules_.protection, q = 1.0 / (rp * rp);
      double switched, unused;
      rules_.edge(r[e], switched, unused);
      double dr = 0.0, dsw = dsw_in[e], dx[3] = {0.0, 0.0, 0.0};
      // e = input W + b, activated unless the input is the distance
      double dinput = 0.0;
      if (!use_dist_) {
        for (int64_t d = 0; d < s0.ep; ++d) {
          z[d] = input[e] * edge_matrix_[static_cast<size_t>(d)] + edge_bias_[static_cast<size_t>(d)];
        }
        kernels_.activate_with_slope(phi_, z, slope, s0.ep);
        for (int64_t d = 0; d < s0.ep; ++d)
          dinput += double(de[e * s0.ep + d] * slope[d] * edge_matrix_[static_cast<size_t>(d)]);
      } else {
        T total = 0;
        for (int64_t d = 0; d < s0.ep; ++d) total += de[e * s0.ep + d] * edge_matrix_[static_cast<size_t>(d)];
        dinput = double(total);
      }
      if (rules_.use_dist) {
        dr += dinput;
      } else {
        dsw += dinput / (rp * stddev[0]);
        dr -= dinput * switched / (rp * rp * stddev[0]);
      }
      // h = norm sw (sw x q - mean) / stddev
      for (int c = 0; c < 3; ++c) {
        const double direction = (switched * x[c] * q - mean[c + 1]) / stddev[c + 1];
        dsw += dh[4 * e + c] * norm * direction;
        const double d = dh[4 * e + c] * norm * switched / stddev[c + 1];
        dsw += d * x[c] * q;
        dx[c] += d * switched * q;
        dr -= 2.0 * d * switched * x[c] * q / rp;
      }
      dr += dsw * ds[e];
      if (s0.with_angles && e < e0 + m) {
        const double length = r[e] + 1e-6;
        dr += work[4 * e] * sa[2 * e + 1];
        for (int c = 0; c < 3; ++c) {
          dx[c] += work[4 * e + 1 + c] / length;
          dr -= work[4 * e + 1 + c] * x[c] / (length * length);
        }
      }
      for (int c = 0; c < 3; ++c) g[3 * e + c] = dx[c] + dr * x[c] / r[e];
    }
  });
  return gradient;
}

// --- forward and backward
// ------------------------------------------------------------------------------------------------

/// (rows, width) tensor of padded rows.
template <class T>
at::Tensor compact(const T* rows, int64_t n, int64_t width, int64_t stride) {
  at::Tensor out = at::empty({n, width}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  T* to = out.template mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) std::copy_n(rows + i * stride, width, to + i * width);
  return out;
}

template <class T>
void expand(const at::Tensor& from, int64_t first, int64_t n, int64_t stride, T* rows) {
  const at::Tensor values = from.contiguous();
  const T* source = values.template const_data_ptr<T>();
  const int64_t width = values.size(1);
  for (int64_t i = first; i < first + n; ++i) {
    std::copy_n(source + i * width, width, rows + i * stride);
    std::fill(rows + i * stride + width, rows + (i + 1) * stride, T(0));
  }
}

/// `from_cosines`: the first layer, whose angle features are multiples of one vector.
template <class T>
LayerArgs<T> Fused<T>::arguments(size_t layer, bool from_cosines) {
  LayerArgs<T> x;
  const LayerShape& s = layers_[layer].shape;
  x.shape = &s;
  x.graph = &g_;
  x.weights = weights_[layer].data();
  x.update = updates_[layer];
  x.v = v_[layer].get(g_.n_node * s.np);
  x.e = e_[layer].get(g_.n_edge * s.ep);
  if (s.with_angles && from_cosines) {
    x.cos = cos_.get(0);
    x.direction = angle_direction_.data();
    x.dcos = dcos_.get(g_.n_angle);
  } else if (s.with_angles) {
    x.a = a_[layer].get(g_.n_angle * s.ap);
  }
  x.sw = sw_.get(0), x.h = h_.get(0), x.asw = asw_.get(0);
  x.zc = zc_[layer].get(g_.n_local * s.edge_columns());
  x.zn = zn_[layer].get(g_.n_slot * s.edge_columns());
  x.zca = zca_[layer].get(g_.n_local * s.angle_columns());
  x.node_slope = node_slope_[layer].get(g_.n_local * (s.k_node + s.k_sym) * s.np);
  x.big_h = big_h_[layer].get(g_.n_local * 3 * s.sym_width());
  x.m = s.with_angles ? m_[layer].get(g_.n_edge * s.ep) : nullptr;
  x.message = message_.get(g_.n_local * s.heads * s.np);
  return x;
}

template <class T>
void Fused<T>::project(const LayerArgs<T>& x) {
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.project_centres(x, begin, end, scratch);
  });
  parallel(static_cast<int64_t>(slot_chunks_.size()), [&](int64_t k, Scratch<T>& scratch) {
    const SlotChunk& chunk = slot_chunks_[static_cast<size_t>(k)];
    kernels_.project_slots(x, chunk.group, chunk.begin, chunk.end, scratch);
  });
}

template <class T>
void Fused<T>::layer_forward(size_t l, bool from_cosines) {
  const LayerShape& s = layers_[l].shape;
  LayerArgs<T> x = arguments(l, from_cosines);
  x.v_out = v_[l + 1].get(g_.n_node * s.np);
  // outputs that no later layer reads do not exist
  if (s.live_edge) x.e_out = e_[l + 1].get(g_.n_edge * s.ep);
  if (s.live_angle) x.a_out = a_[l + 1].get(g_.n_angle * s.ap);
  project(x);
  parallel(g_.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre(x, i, scratch); });
  parallel_rows(
      [&](int64_t begin, int64_t end, Scratch<T>& scratch) { kernels_.nodes(x, begin, end, scratch); });
}

/// centre_backward for all centres, and the sums of dz over the edges of every slot. While a batch of centres
/// is worked on, the rows of the batch before it are summed: two buffers, one barrier per batch. Every sum
/// runs in the order of the edges, whatever the batches and threads.
template <class T>
void Fused<T>::layer_backward_centres(LayerArgs<T>& x, bool nodes) {
  if (!nodes) {
    x.dz = nullptr;
    parallel(g_.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre_backward(x, i, scratch); });
    return;
  }
  const int64_t columns = x.shape->edge_columns();
  const int64_t wanted = std::max<int64_t>(1, kBatchBytes / (columns * static_cast<int64_t>(sizeof(T))));
  std::vector<int64_t> first{0};  // centre that every batch begins with
  int64_t rows = 0, smallest = kCentresPerThread * at::get_num_threads();
  while (first.back() < g_.n_local) {
    int64_t end = std::min(first.back() + smallest, g_.n_local);
    while (end < g_.n_local && g_.first_edge[end + 1] - g_.first_edge[first.back()] <= wanted) ++end;
    rows = std::max(rows, g_.first_edge[end] - g_.first_edge[first.back()]);
    first.push_back(end);
  }
  T* dz = dz_.get(2 * rows * columns);
  x.dzn = dzn_.get(g_.n_slot * columns);
  slot_next_.assign(slot_first_.begin(), slot_first_.end() - 1);
  x.slot_next = slot_next_.data();
  const auto n_batch = static_cast<int64_t>(first.size()) - 1,
             n_sum = static_cast<int64_t>(slot_chunks_.size());
  const auto at_batch = [&](int64_t batch) {
    LayerArgs<T> y = x;
    y.dz = dz + batch % 2 * rows * columns;
    y.dz_first = g_.first_edge[first[static_cast<size_t>(batch)]];
    return y;
  };
  for (int64_t batch = 0; batch <= n_batch; ++batch) {
    const LayerArgs<T> now = batch < n_batch ? at_batch(batch) : x,
                       before = batch > 0 ? at_batch(batch - 1) : x;
    const int64_t begin = first[static_cast<size_t>(batch)];
    const int64_t n_centre = batch < n_batch ? first[static_cast<size_t>(batch) + 1] - begin : 0;
    // small tasks last: they even out the threads
    parallel(n_centre + (batch > 0 ? n_sum : 0), [&](int64_t task, Scratch<T>& scratch) {
      if (task < n_centre) {
        kernels_.centre_backward(now, begin + task, scratch);
      } else {
        const SlotChunk& chunk = slot_chunks_[static_cast<size_t>(task - n_centre)];
        kernels_.sum_slots(before, chunk.begin, chunk.end, g_.first_edge[begin]);
      }
    });
  }
}

/// Gradients of layer l: dv_out_ in, dv_ out (left at the centre's own share where `nodes` is false); de_,
/// da_ in place.
template <class T>
void Fused<T>::layer_backward(size_t l, bool nodes, bool from_cosines) {
  const LayerShape& s = layers_[l].shape;
  LayerArgs<T> x = arguments(l, from_cosines);
  x.dv_out = dv_out_.get(g_.n_local * s.np);
  x.dv = dv_.get(g_.n_node * s.np);
  x.de = de_.get(g_.n_edge * s.ep);
  x.da = da_.get(g_.n_angle * layers_[0].shape.ap);
  x.de_live = de_live_, x.da_live = da_live_;
  x.dzc = dzc_.get(g_.n_local * s.edge_columns());
  x.dzca = dzca_.get(g_.n_local * s.angle_columns());
  x.dbig_h = dbig_h_.get(g_.n_local * 3 * s.sym_width());
  x.dmessage = dmessage_.get(g_.n_local * s.heads * s.np);
  x.dsw = dsw_.get(0), x.dh = dh_.get(0), x.dasw = dasw_.get(0);
  std::fill_n(x.dv, g_.n_node * s.np, T(0));
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.nodes_backward(x, begin, end, scratch);
  });
  layer_backward_centres(x, nodes);
  de_live_ = true;
  da_live_ = da_live_ || s.with_angles;
  if (!nodes) return;
  // group by group: within a group every node has one slot, so no two tasks write the same row
  for (size_t group = 0; group + 1 < slot_chunk_splits_.size(); ++group) {
    const size_t first = slot_chunk_splits_[group], count = slot_chunk_splits_[group + 1] - first;
    parallel(static_cast<int64_t>(count), [&](int64_t k, Scratch<T>& scratch) {
      const SlotChunk& chunk = slot_chunks_[first + static_cast<size_t>(k)];
      kernels_.slots_backward(x, chunk.group, chunk.begin, chunk.end, scratch);
    });
  }
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.centres_backward(x, begin, end, scratch);
  });
}

template <class T>
void Fused<T>::start_backward() {
  const LayerShape& s0 = layers_[0].shape;
  std::fill_n(dsw_.get(g_.n_edge), g_.n_edge, 0.0);
  std::fill_n(dh_.get(4 * g_.n_edge), 4 * g_.n_edge, 0.0);
  std::fill_n(dasw_.get(g_.n_angle), g_.n_angle, T(0));
  de_.get(g_.n_edge * s0.ep);
  da_.get(g_.n_angle * s0.ap);
  de_live_ = da_live_ = false;
}

template <class T>
at::Tensor Fused<T>::forward(const PreparedGraph& graph, const at::Tensor& features,
                             const Exchange& with_ghosts) {
  set_groups(features);
  view(graph);
  shape_geometry(graph);
  const size_t n_layer = layers_.size();

  {  // embedding
    const LayerShape& s = layers_[0].shape;
    T* v = v_[0].get(g_.n_node * s.np);
    const int64_t* type = graph.types.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < g_.n_node; ++i) {
      std::copy_n(node_table_.data() + type[i] * s.np, s.np, v + i * s.np);
    }
    T* e = e_[0].get(g_.n_edge * s.ep);
    const T* input = edge_input_.get(0);
    parallel(g_.n_local, [&](int64_t i, Scratch<T>&) {
      const int64_t e0 = g_.first_edge[i], e1 = g_.first_edge[i + 1];
      for (int64_t k = e0; k < e1; ++k) {
        for (int64_t d = 0; d < s.ep; ++d) {
          e[k * s.ep + d] =
              input[k] * edge_matrix_[static_cast<size_t>(d)] + edge_bias_[static_cast<size_t>(d)];
        }
      }
      if (!use_dist_) kernels_.activate(phi_, e + e0 * s.ep, (e1 - e0) * s.ep);
    });
  }

  for (size_t l = 0; l < n_layer; ++l) {
    const LayerShape& s = layers_[l].shape;
    if (l > 0 && with_ghosts) {
      T* v = v_[l].get(g_.n_node * s.np);
      expand<T>(with_ghosts(compact(v, g_.n_local, s.n, s.np)), g_.n_local, g_.n_node - g_.n_local, s.np, v);
    }
    layer_forward(l, /*from_cosines=*/l == 0);
  }
  const LayerShape& s = layers_.back().shape;
  return compact(v_[n_layer].get(0), g_.n_local, s.n, s.np);
}

template <class T>
at::Tensor Fused<T>::backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                              const Exchange& without_ghosts) {
  start_backward();
  expand<T>(dv_local, 0, g_.n_local, layers_.back().shape.np,
            dv_out_.get(g_.n_local * layers_.back().shape.np));
  for (size_t l = layers_.size(); l-- > 0;) {
    const LayerShape& s = layers_[l].shape;
    // the features of layer 0 come from the types alone
    layer_backward(l, /*nodes=*/l > 0, /*from_cosines=*/l == 0);
    if (l == 0) break;
    T *dv = dv_.get(0), *dv_out = dv_out_.get(0);
    if (without_ghosts) {
      expand<T>(without_ghosts(compact(dv, g_.n_node, s.n, s.np)), 0, g_.n_local, s.np, dv_out);
    } else {
      std::copy_n(dv, g_.n_local * s.np, dv_out);
    }
  }
  return geometry_backward(graph);
}

template <class T>
LayerTensors Fused<T>::one_layer(const PreparedGraph& graph, const at::Tensor& features, int64_t layer,
                                 const LayerTensors& in) {
  const auto l = static_cast<size_t>(layer);
  set_groups(features);
  view(graph);
  const LayerShape& s = layers_[l].shape;
  expand<T>(in.v, 0, g_.n_node, s.np, v_[l].get(g_.n_node * s.np));
  expand<T>(in.e, 0, g_.n_edge, s.ep, e_[l].get(g_.n_edge * s.ep));
  if (s.with_angles) expand<T>(in.a, 0, g_.n_angle, s.ap, a_[l].get(g_.n_angle * s.ap));
  expand<T>(in.sw.unsqueeze(1), 0, g_.n_edge, 1, sw_.get(g_.n_edge));
  expand<T>(in.asw.unsqueeze(1), 0, g_.n_angle, 1, asw_.get(g_.n_angle));
  expand<T>(in.h * in.sw.unsqueeze(1) / std::sqrt(s.edge_norm), 0, g_.n_edge, 4, h_.get(4 * g_.n_edge));
  layer_forward(l, /*from_cosines=*/false);
  LayerTensors out;
  out.v = compact(v_[l + 1].get(0), g_.n_local, s.n, s.np);
  out.e = s.live_edge ? compact(e_[l + 1].get(0), g_.n_edge, s.e, s.ep) : in.e;
  out.a = s.live_angle ? compact(a_[l + 1].get(0), g_.n_angle, s.a, s.ap) : in.a;
  return out;
}

template <class T>
LayerTensors Fused<T>::one_layer_backward(int64_t layer, const LayerTensors& in,
                                          const LayerTensors& gradients) {
  const auto l = static_cast<size_t>(layer);
  const LayerShape& s = layers_[l].shape;
  start_backward();
  expand<T>(gradients.v, 0, g_.n_local, s.np, dv_out_.get(g_.n_local * s.np));
  expand<T>(gradients.e, 0, g_.n_edge, s.ep, de_.get(g_.n_edge * s.ep));
  de_live_ = true;
  if (s.with_angles) {
    expand<T>(gradients.a, 0, g_.n_angle, s.ap, da_.get(g_.n_angle * s.ap));
    da_live_ = true;
  }
  layer_backward(l, /*nodes=*/true, /*from_cosines=*/false);
  LayerTensors out;
  out.v = compact(dv_.get(0), g_.n_node, s.n, s.np);
  out.e = compact(de_.get(0), g_.n_edge, s.e, s.ep);
  out.a = s.with_angles ? compact(da_.get(0), g_.n_angle, s.a, s.ap) : gradients.a;
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor dh =
      at::from_blob(dh_.get(0), {g_.n_edge, 4}, options).narrow(1, 0, 3) / std::sqrt(s.edge_norm);
  const at::Tensor dsw = at::from_blob(dsw_.get(0), {g_.n_edge}, options);
  out.h = (dh * in.sw.unsqueeze(1)).to(in.h.scalar_type());
  out.sw = (dsw + (dh * in.h).sum(1)).to(in.sw.scalar_type());
  out.asw = compact(dasw_.get(0), g_.n_angle, 1, 1).squeeze(1);
  return out;
}

template <class T>
int64_t Fused<T>::bytes() const {
  int64_t total = 0;
  for (const auto* group : {&v_, &e_, &a_, &m_, &big_h_, &zc_, &zn_, &zca_, &node_slope_}) {
    for (const Buffer<T>& buffer : *group) total += buffer.bytes();
  }
  for (const Buffer<T>* buffer : {&sw_, &h_, &asw_, &cos_, &message_, &edge_input_, &dv_, &dv_out_, &de_,
                                  &da_, &dz_, &dzc_, &dzca_, &dbig_h_, &dmessage_, &dasw_, &dcos_, &dzn_}) {
    total += buffer->bytes();
  }
  return total;
}

}  // namespace

std::unique_ptr<FusedModel> make_fused_model(const Module& geometry, const Module& embedding,
                                             const std::vector<Module>& layers, at::ScalarType dtype,
                                             std::string& reason) {
  try {
    if (dtype == at::kFloat) return std::make_unique<Fused<float>>(geometry, embedding, layers);
    return std::make_unique<Fused<double>>(geometry, embedding, layers);
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

}  // namespace moecalc
