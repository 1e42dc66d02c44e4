#include "backends/cpu/training.h"

#include <algorithm>
#include <utility>

#include "backends/cpu/fused_layers.h"
#include "backends/cpu/weight_blocks.h"
#include "core/settings.h"
#include "core/threads.h"
#include "core/transpose.h"
#include "graph/graph.h"
#include "moecalc/error.h"
#include "package/architecture.h"
#include "package/packed_weights.h"

namespace moecalc {

const std::vector<std::string>& group_weight_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const auto& entry : weight_entries<double>({})) all.emplace_back(entry.name);
    return all;
  }();
  return names;
}

namespace {

using namespace kernels;

/// The layers of either dtype.
class TrainableModel {
 public:
  virtual ~TrainableModel() = default;
  /// Throws Error where a shape does not fit.
  virtual void set_weights(const TrainingWeights& weights) = 0;
  virtual Array forward(const PreparedGraph& graph, bool keep_for_weights) = 0;
  virtual Array backward(const PreparedGraph& graph, const Array& d_node) = 0;
  virtual TrainingWeights backward_to_weights(const PreparedGraph& graph, const Array& d_node) = 0;
};

template <class Real>
class TrainableLayers final : public TrainableModel {
 public:
  /// Throws Unsupported.
  TrainableLayers(const Architecture& model, const Kernels<Real>& kernels, ThreadPool& threads,
                  std::optional<int64_t> keep_bytes)
      : kernels_(kernels),
        weights_(PackedWeights<Real>(model, kernels, std::nullopt).weights()),
        layers_(weights_, model.geometry, kernels, threads, keep_bytes) {
    // those of the package's groups are not read
    weights_.groups.clear();
    weights_.updates.clear();
  }

  void set_weights(const TrainingWeights& weights) override;

  Array forward(const PreparedGraph& graph, bool keep_for_weights) override {
    check_weights(graph);
    return keep_for_weights ? layers_.forward_to_train(graph) : layers_.forward(graph, nullptr, true);
  }
  Array backward(const PreparedGraph& graph, const Array& d_node) override {
    check_gradient(graph, d_node);
    return layers_.backward(graph, d_node, nullptr);
  }
  TrainingWeights backward_to_weights(const PreparedGraph& graph, const Array& d_node) override;

 private:
  size_t n_layer() const { return weights_.shapes.size(); }
  /// Throws Error unless there are weights for all atoms of the graph.
  void check_weights(const PreparedGraph& graph) const {
    if (weights_.groups.size() != n_layer()) {
      throw Error("expected weights before an evaluation, got none: call set_weights first");
    }
    for (const int64_t group : groups_in_use(graph.node_splits)) {
      for (const auto& of_layer : weights_.groups) {
        const auto index = static_cast<size_t>(group);
        if (index < of_layer.size() && of_layer[index].node != nullptr) continue;
        throw Error("expected weights of group " + std::to_string(group) + ", which has atoms, got none");
      }
    }
  }
  void check_gradient(const PreparedGraph& graph, const Array& d_node) const {
    check_weights(graph);
    check_array(d_node, "dv", dtype_of<Real>, {graph.n_local, weights_.shapes.back().n});
  }
  const Real* hold(const Array& values) {
    memory_.push_back(values);
    return values.data<Real>();
  }
  void set_layer(size_t index, const TrainingWeights::Layer& layer);
  void count_experts(size_t layer, const NamedArrays& from);
  GroupWeights<Real> group_weights(size_t layer, const NamedArrays& from);
  void fold_first_layer(const LayerShape& shape, GroupWeights<Real>& weights);
  void fold_far_edges(const LayerShape& shape, GroupWeights<Real>& weights);

  TrainingWeights::Layer layer_gradients(size_t layer);
  void collect_group(size_t layer, size_t group, const GroupGradients<Real>& from,
                     TrainingWeights::Layer& into);
  void add_far_edges(size_t layer, size_t group, const GroupGradients<Real>& from, Array& bias_gradient);
  void embedding_gradients(const PreparedGraph& graph, TrainingWeights& out);
  void add_edge_embedding(int64_t n_edge, TrainingWeights& out);

  const Kernels<Real>& kernels_;
  ModelWeights<Real> weights_;
  FusedLayers<Real> layers_;
  std::vector<Array> memory_;                  // what weights_ points to
  std::vector<Buffer<Real>> gradient_memory_;  // per thread
};

// --- setting weights ---

template <class Real>
std::vector<Real> values_of(const Array& values) {
  const Real* data = values.data<Real>();
  return std::vector<Real>(data, data + values.numel());
}

template <class Real>
void TrainableLayers<Real>::set_weights(const TrainingWeights& weights) {
  if (weights.layers.size() != n_layer()) {
    throw Error("expected weights of " + std::to_string(n_layer()) + " layers, got " +
                std::to_string(weights.layers.size()));
  }
  memory_.clear();
  weights_.groups.clear();
  weights_.updates.clear();
  weights_.edge_matrix = values_of<Real>(weights.edge_matrix);
  weights_.edge_bias = values_of<Real>(weights.edge_bias);
  if (weights_.shapes[0].with_angles) weights_.angle_direction = values_of<Real>(weights.direction);
  weights_.node_table = values_of<Real>(weights.node_table);
  for (size_t layer = 0; layer < n_layer(); ++layer) set_layer(layer, weights.layers[layer]);
}

template <class Real>
void TrainableLayers<Real>::set_layer(size_t index, const TrainingWeights::Layer& layer) {
  const LayerShape& shape = weights_.shapes[index];
  const bool angles_fit = shape.a_padded == shape.a && shape.edge_inputs == shape.e;
  if (shape.n_padded != shape.n || shape.e_padded != shape.e || (shape.with_angles && !angles_fit)) {
    throw Error("training needs widths that are multiples of " + std::to_string(kRowBytes / sizeof(Real)) +
                " and uncompressed angles, got n_dim " + std::to_string(shape.n) + ", e_dim " +
                std::to_string(shape.e) + ", a_dim " + std::to_string(shape.a));
  }
  UpdateVectors<Real> update;
  update.node = hold(layer.update_node);
  if (shape.live_edge) update.edge = hold(layer.update_edge);
  if (shape.live_angle) update.angle = hold(layer.update_angle);
  weights_.updates.push_back(update);
  std::vector<GroupWeights<Real>> groups(layer.groups.size());
  for (size_t group = 0; group < groups.size(); ++group) {
    if (!layer.groups[group].empty()) groups[group] = group_weights(index, layer.groups[group]);
  }
  weights_.groups.push_back(std::move(groups));
}

const Array& named(const NamedArrays& arrays, const char* name) {
  const auto found = arrays.find(name);
  if (found == arrays.end()) throw Error(std::string("expected weights `") + name + "` of a group, got none");
  return found->second;
}

/// The numbers of experts that are active, which are the same in every group.
template <class Real>
void TrainableLayers<Real>::count_experts(size_t layer, const NamedArrays& from) {
  LayerShape& shape = weights_.shapes[layer];
  shape.experts_node = named(from, "p_node").numel();
  shape.experts_sym = named(from, "p_sym").numel();
  shape.experts_message = named(from, "p_message").numel();
  shape.experts_edge = named(from, "p_edge").numel();
  shape.experts_angle = named(from, "p_angle").numel();
  if (!shape.with_angles) return;
  shape.experts_angle_message = named(from, "p_angle1").numel();
  shape.experts_message_map = named(from, "p_angle2").numel();
}

template <class Real>
GroupWeights<Real> TrainableLayers<Real>::group_weights(size_t layer, const NamedArrays& from) {
  count_experts(layer, from);
  const LayerShape& shape = weights_.shapes[layer];
  GroupWeights<Real> weights;
  for (const WeightEntry<Real>& entry : weight_entries<Real>(shape)) {
    const Array& values = named(from, entry.name);
    if (values.numel() != entry.size()) {
      throw Error(std::string("expected ") + entry.name + " of layer " + std::to_string(layer) + " with " +
                  std::to_string(entry.rows) + " x " + std::to_string(entry.columns) + " elements, got " +
                  std::to_string(values.numel()));
    }
    if (entry.size() == 0) continue;
    weights.*entry.weights = hold(values);
    if (entry.transposed != nullptr) {
      const Array transposed = Array::empty({entry.columns, entry.rows}, dtype_of<Real>);
      transpose(values.data<Real>(), entry.rows, entry.columns, transposed.data<Real>());
      weights.*entry.transposed = hold(transposed);
    }
  }
  if (layer == 0) fold_first_layer(shape, weights);
  if (shape.with_angles) fold_far_edges(shape, weights);
  return weights;
}

/// What stands for the weights of edge and angle features in the first layer: see GroupWeights.
template <class Real>
void TrainableLayers<Real>::fold_first_layer(const LayerShape& shape, GroupWeights<Real>& weights) {
  using Products = std::initializer_list<std::pair<const std::vector<Real>*, const Real*>>;
  const auto sums = [&](const Real* start, Products products, int64_t columns) {
    Array out = Array::empty({columns}, dtype_of<Real>);
    sum_products<Real>(start, products, columns, out.data<Real>());
    return hold(out);
  };
  const std::vector<Real>* matrix = &weights_.edge_matrix;
  const std::vector<Real>* bias = &weights_.edge_bias;
  const int64_t edge_columns = shape.edge_columns();
  const int64_t angle_columns = shape.angle_columns();
  weights.edge_of_distance = sums(nullptr, {{matrix, weights.edge_edge}}, edge_columns);
  weights.edge_distance_bias = sums(weights.edge_bias, {{bias, weights.edge_edge}}, edge_columns);
  if (!shape.with_angles) return;
  weights.angle_first_of_distance = sums(nullptr, {{matrix, weights.angle_first}}, angle_columns);
  weights.angle_second_of_distance = sums(nullptr, {{matrix, weights.angle_second}}, angle_columns);
  weights.angle_of_cos = sums(nullptr, {{&weights_.angle_direction, weights.angle_angle}}, angle_columns);
  weights.angle_distance_bias =
      sums(weights.angle_bias, {{bias, weights.angle_first}, {bias, weights.angle_second}}, angle_columns);
}

/// The answer for an edge without message: sum_k p_k phi(b_k).
template <class Real>
void TrainableLayers<Real>::fold_far_edges(const LayerShape& shape, GroupWeights<Real>& weights) {
  const int64_t columns = shape.experts_message_map * shape.e;
  std::vector<Real> output(weights.message_map_bias, weights.message_map_bias + columns);
  kernels_.activate(shape.activation, output.data(), columns);
  Array far = Array::empty({shape.e}, dtype_of<Real>);
  for (int64_t d = 0; d < shape.e; ++d) {
    double sum = 0.0;
    for (int64_t k = 0; k < shape.experts_message_map; ++k) {
      sum += double(weights.routing_message_map[k]) * double(output[static_cast<size_t>(k * shape.e + d)]);
    }
    far.data<Real>()[d] = Real(sum);
  }
  weights.message_map_far = hold(far);
}

// --- gradients ---

/// Points the gradients of a group into `memory`, one behind the other. Returns how many numbers they are.
template <class Real>
int64_t place_gradients(const LayerShape& shape, Real* memory, GroupGradients<Real>& gradients) {
  int64_t size = 0;
  const auto place = [&](Real*& to, int64_t count) {
    to = memory + size;
    size += count;
  };
  for (const WeightEntry<Real>& entry : weight_entries<Real>(shape)) {
    if (entry.gradients != nullptr) place(gradients.*entry.gradients, entry.size());
    if (entry.outputs != nullptr) place(gradients.*entry.outputs, entry.size() * entry.width);
  }
  place(gradients.d_message_map_far, shape.with_angles ? shape.e : 0);
  place(gradients.update_node, shape.heads * shape.n);
  return size;
}

/// What a map's routing weights and its coefficients in the update are, and where their gradients go.
template <class Real>
struct MixGradients {
  const Real* routing = nullptr;       // (n_expert)
  const Real* coefficients = nullptr;  // (width); null: 1
  Real* d_routing = nullptr;
  Real* d_coefficients = nullptr;  // null: not wanted
};

/// Of an update c * sum_k p_k y_k, with `outputs` (n_expert, width) the sums over rows of y_k times the
/// gradient of the update: dp_k = sum_d c_d outputs_kd and dc_d += sum_k p_k outputs_kd.
template <class Real>
void split_outputs(const Real* outputs, int64_t n_expert, int64_t width, const MixGradients<Real>& mix) {
  for (int64_t k = 0; k < n_expert; ++k) {
    double total = 0.0;
    for (int64_t d = 0; d < width; ++d) {
      const Real value = outputs[k * width + d];
      const bool plain = mix.coefficients == nullptr;
      total += plain ? double(value) : double(mix.coefficients[d]) * double(value);
      if (mix.d_coefficients != nullptr) mix.d_coefficients[d] += mix.routing[k] * value;
    }
    mix.d_routing[k] = Real(total);
  }
}

template <class Real>
TrainingWeights TrainableLayers<Real>::backward_to_weights(const PreparedGraph& graph, const Array& d_node) {
  check_gradient(graph, d_node);
  TrainingWeights out;
  out.layers.resize(n_layer());
  layers_.start_backward(d_node, n_layer() - 1);
  for (size_t layer = n_layer(); layer-- > 0;) {
    out.layers[layer] = layer_gradients(layer);
    if (layer == 0) break;
    LayerBuffers<Real>& buffers = layers_.buffers();
    const int64_t size = graph.n_local * weights_.shapes[layer].n_padded;
    std::copy_n(buffers.d_node.get(0), size, buffers.d_node_out.get(0));
  }
  embedding_gradients(graph, out);
  return out;
}

/// Backward of a layer. Every thread sums into memory of its own, which is added up at the end.
template <class Real>
TrainingWeights::Layer TrainableLayers<Real>::layer_gradients(size_t layer) {
  const LayerShape& shape = weights_.shapes[layer];
  const size_t n_group = weights_.groups[layer].size();
  const size_t n_thread = layers_.n_threads();
  gradient_memory_.resize(n_thread);
  GroupGradients<Real> unused;
  Real none[1];
  const int64_t per_group = place_gradients(shape, none, unused);
  std::vector<size_t> present;
  for (size_t group = 0; group < n_group; ++group) {
    if (weights_.groups[layer][group].node != nullptr) present.push_back(group);
  }
  const int64_t size = per_group * static_cast<int64_t>(present.size());
  ThreadGradients<Real> gradients(n_thread);
  for (size_t thread = 0; thread < n_thread; ++thread) {
    Real* memory = gradient_memory_[thread].get(size);
    std::fill_n(memory, size, Real(0));
    gradients[thread].resize(n_group);
    for (const size_t group : present) {
      place_gradients(shape, memory, gradients[thread][group]);
      memory += per_group;
    }
  }
  layers_.layer_backward_to_train(layer, gradients);
  Real* sum = gradient_memory_[0].get(size);
  for (size_t thread = 1; thread < n_thread; ++thread) {
    const Real* part = gradient_memory_[thread].get(size);
    for (int64_t k = 0; k < size; ++k) sum[k] += part[k];
  }
  TrainingWeights::Layer out;
  const int64_t n_edge_update = shape.live_edge ? (shape.with_angles ? 2 : 1) : 0;
  out.update_node = Array::zeros({2 + shape.heads, shape.n}, dtype_of<Real>);
  out.update_edge = Array::zeros({n_edge_update, shape.e}, dtype_of<Real>);
  out.update_angle = Array::zeros({shape.live_angle ? 1 : 0, shape.a}, dtype_of<Real>);
  out.groups.resize(n_group);
  for (const size_t group : present) collect_group(layer, group, gradients[0][group], out);
  return out;
}

template <class Real>
void TrainableLayers<Real>::collect_group(size_t layer, size_t group, const GroupGradients<Real>& from,
                                          TrainingWeights::Layer& into) {
  const LayerShape& shape = weights_.shapes[layer];
  const UpdateVectors<Real>& update = weights_.updates[layer];
  NamedArrays& arrays = into.groups[group];
  for (const WeightEntry<Real>& entry : weight_entries<Real>(shape)) {
    Array values = Array::zeros({entry.rows, entry.columns}, dtype_of<Real>);
    if (entry.gradients != nullptr) {
      std::copy_n(from.*entry.gradients, entry.size(), values.data<Real>());
    }
    arrays.emplace(entry.name, values);
  }
  if (shape.with_angles) add_far_edges(layer, group, from, arrays.at("angle2_b"));
  Real* d_node = into.update_node.data<Real>();
  Real* d_edge = into.update_edge.data<Real>();
  Real* d_angle = into.update_angle.data<Real>();
  // the message has its coefficients within, and the angle message none
  for (int64_t d = 0; d < shape.heads * shape.n; ++d) d_node[2 * shape.n + d] += from.update_node[d];
  struct Coefficients {
    const Real* values = nullptr;
    Real* gradient = nullptr;
  };
  std::map<std::string, Coefficients, std::less<>> of_map;
  of_map["p_node"] = {update.node, d_node};
  of_map["p_sym"] = {update.node + shape.n, d_node + shape.n};
  if (shape.live_edge) of_map["p_edge"] = {update.edge, d_edge};
  if (shape.with_angles) of_map["p_angle2"] = {update.edge + shape.e, d_edge + shape.e};
  if (shape.live_angle) of_map["p_angle"] = {update.angle, d_angle};
  for (const WeightEntry<Real>& entry : weight_entries<Real>(shape)) {
    if (entry.outputs == nullptr || entry.columns == 0) continue;
    const Coefficients coefficients = of_map[entry.name];
    MixGradients<Real> mix;
    mix.routing = weights_.groups[layer][group].*entry.weights;
    mix.coefficients = coefficients.values;
    mix.d_routing = arrays.at(entry.name).template data<Real>();
    mix.d_coefficients = coefficients.gradient;
    split_outputs<Real>(from.*entry.outputs, entry.columns, entry.width, mix);
  }
}

/// Edges without a message: their update is a constant, c * sum_k p_k phi(b_k).
template <class Real>
void TrainableLayers<Real>::add_far_edges(size_t layer, size_t group, const GroupGradients<Real>& from,
                                          Array& bias_gradient) {
  const LayerShape& shape = weights_.shapes[layer];
  const GroupWeights<Real>& weights = weights_.groups[layer][group];
  const Real* coefficients = weights_.updates[layer].edge + shape.e;
  const int64_t columns = shape.experts_message_map * shape.e;
  std::vector<Real> output(weights.message_map_bias, weights.message_map_bias + columns);
  std::vector<Real> slope(output.size());
  kernels_.activate_with_slope(shape.activation, output.data(), slope.data(), columns);
  Real* d_bias = bias_gradient.data<Real>();
  const Real* d_far = from.d_message_map_far;
  for (int64_t k = 0; k < shape.experts_message_map; ++k) {
    for (int64_t d = 0; d < shape.e; ++d) {
      const int64_t at = k * shape.e + d;
      from.output_message_map[at] += output[static_cast<size_t>(at)] * d_far[d];
      d_bias[at] +=
          weights.routing_message_map[k] * slope[static_cast<size_t>(at)] * coefficients[d] * d_far[d];
    }
  }
}

/// Of e = phi(x W + b), a = cos W_a / sqrt(pi) and the rows of the type table.
template <class Real>
void TrainableLayers<Real>::embedding_gradients(const PreparedGraph& graph, TrainingWeights& out) {
  const LayerShape& shape = weights_.shapes[0];
  LayerBuffers<Real>& buffers = layers_.buffers();
  add_edge_embedding(graph.n_edge, out);
  out.direction = Array::zeros({shape.with_angles ? shape.a : 0}, dtype_of<Real>);
  if (shape.with_angles) {
    Real* d_direction = out.direction.data<Real>();
    const Real* cosine = buffers.cosine.get(0);
    const Real* d_angle = buffers.d_angle.get(0);
    for (int64_t k = 0; k < graph.n_angle; ++k) {
      for (int64_t d = 0; d < shape.a; ++d) d_direction[d] += cosine[k] * d_angle[k * shape.a + d];
    }
  }
  const int64_t n_types = static_cast<int64_t>(weights_.node_table.size()) / shape.n;
  out.node_table = Array::zeros({n_types, shape.n}, dtype_of<Real>);
  Real* d_table = out.node_table.data<Real>();
  const Real* d_node = buffers.d_node.get(0);
  for (int64_t i = 0; i < graph.n_local; ++i) {
    Real* row = d_table + graph.types[static_cast<size_t>(i)] * shape.n;
    for (int64_t d = 0; d < shape.n; ++d) row[d] += d_node[i * shape.n + d];
  }
}

template <class Real>
void TrainableLayers<Real>::add_edge_embedding(int64_t n_edge, TrainingWeights& out) {
  const int64_t width = weights_.shapes[0].e;
  LayerBuffers<Real>& buffers = layers_.buffers();
  out.edge_matrix = Array::zeros({width}, dtype_of<Real>);
  out.edge_bias = Array::zeros({width}, dtype_of<Real>);
  Real* d_matrix = out.edge_matrix.data<Real>();
  Real* d_bias = out.edge_bias.data<Real>();
  const Real* input = buffers.edge_input.get(0);
  const Real* d_edge = buffers.d_edge.get(0);
  std::vector<Real> pre_activation(static_cast<size_t>(width));
  std::vector<Real> slope(static_cast<size_t>(width), Real(1));
  for (int64_t edge = 0; edge < n_edge; ++edge) {
    if (!weights_.use_dist) {
      for (size_t d = 0; d < pre_activation.size(); ++d) {
        pre_activation[d] = input[edge] * weights_.edge_matrix[d] + weights_.edge_bias[d];
      }
      kernels_.activate_with_slope(weights_.phi, pre_activation.data(), slope.data(), width);
    }
    for (int64_t d = 0; d < width; ++d) {
      const Real d_pre = d_edge[edge * width + d] * slope[static_cast<size_t>(d)];
      d_matrix[d] += input[edge] * d_pre;
      d_bias[d] += d_pre;
    }
  }
}

template <class Real>
std::unique_ptr<TrainableModel> make_model(const Architecture& model, const Settings& settings,
                                           ThreadPool& threads) {
  return std::make_unique<TrainableLayers<Real>>(
      model, select_kernels<Real>(settings.instruction_set.c_str()), threads, settings.keep_bytes);
}

}  // namespace

// --- Trainer ---

class Trainer::Impl {
 public:
  Impl(const std::string& path, const std::string& dtype) {
    if (dtype != "float32" && dtype != "float64") {
      throw Error("expected `dtype` to be 'float32' or 'float64', got '" + dtype + "'");
    }
    package = load_package(path);
    if (package.architecture.rules.group_by_system) {
      throw Error("training needs routing by element, got 'configuration'");
    }
    const Settings settings = read_settings();
    try {
      model = dtype == "float32" ? make_model<float>(package.architecture, settings, threads)
                                 : make_model<double>(package.architecture, settings, threads);
    } catch (const Unsupported& option) {
      throw Error(path + ": no kernels to train this model with (" + option.reason + ")");
    }
  }

  TrainableModel& ready() {
    threads.resize(static_cast<int>(num_threads()));
    return *model;
  }
  int64_t num_threads() const { return n_threads > 0 ? n_threads : default_threads(); }

  LoadedPackage package;
  ThreadPool threads;  // before what uses it
  std::unique_ptr<TrainableModel> model;
  PreparedGraph graph;
  int64_t n_threads = 0;  // 0: the default
};

Trainer::Trainer(const std::string& path, const std::string& dtype)
    : impl_(std::make_unique<Impl>(path, dtype)) {}

Trainer::~Trainer() = default;

void Trainer::set_num_threads(int64_t n_threads) {
  if (n_threads < 0 || n_threads > 4096) {
    throw Error("expected a number of threads from 1 to 4096, or 0 for the default, got " +
                std::to_string(n_threads));
  }
  impl_->n_threads = n_threads;
}

int64_t Trainer::num_threads() const { return impl_->num_threads(); }

Array Trainer::set_graph(const Array& types, const Array& edge_index, const Array& edge_vec,
                         const Array& system_index, int64_t n_systems) {
  const GraphRules& rules = impl_->package.architecture.rules;
  const ListedEdges edges = list_of_edges(types, edge_index, edge_vec, system_index, n_systems);
  GraphBuilder builder;
  builder.set_list(checked_list(edges.list, rules), rules);
  impl_->graph = builder.prepare(edges.positions, Array());
  return Array::of(impl_->graph.engine_row);
}

std::vector<Array> Trainer::graph() const {
  const PreparedGraph& graph = impl_->graph;
  Array edge_index = Array::empty({2, graph.n_edge}, Dtype::int64);
  std::copy_n(graph.centre.data(), graph.n_edge, edge_index.data<int64_t>());
  std::copy_n(graph.neighbor.data(), graph.n_edge, edge_index.data<int64_t>() + graph.n_edge);
  return {Array::of(graph.types), edge_index, Array::of(graph.edge_vec, {graph.n_edge, 3})};
}

void Trainer::set_edge_vec(const Array& edge_vec) {
  PreparedGraph& graph = impl_->graph;
  if (edge_vec.shape() != Shape{graph.n_edge, 3}) {
    throw Error("expected " + std::to_string(graph.n_edge) + " x 3 edge vectors, got " +
                std::to_string(edge_vec.numel()) + " numbers");
  }
  const Array vectors = edge_vec.to(Dtype::float64);
  graph.edge_vec.assign(vectors.data<double>(), vectors.data<double>() + vectors.numel());
}

void Trainer::set_weights(const TrainingWeights& weights) { impl_->model->set_weights(weights); }

Array Trainer::forward(bool keep_for_weights) {
  return impl_->ready().forward(impl_->graph, keep_for_weights);
}

Array Trainer::backward(const Array& d_node) { return impl_->ready().backward(impl_->graph, d_node); }

TrainingWeights Trainer::backward_to_weights(const Array& d_node) {
  return impl_->ready().backward_to_weights(impl_->graph, d_node);
}

}  // namespace moecalc
