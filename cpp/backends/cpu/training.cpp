#include "backends/cpu/training.h"

#include <algorithm>
#include <utility>

#include "backends/cpu/fused_layers.h"
#include "backends/cpu/weight_blocks.h"
#include "core/settings.h"
#include "core/threads.h"
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

using namespace ops;

/// The layers of either dtype.
class TrainableModel {
 public:
  virtual ~TrainableModel() = default;
  /// Throws Error where a shape does not fit.
  virtual void set_weights(const TrainingWeights& weights) = 0;
  virtual Array forward(const PreparedGraph& graph, bool keep_for_weights) = 0;
  virtual Array backward(const PreparedGraph& graph, const Array& dv) = 0;
  virtual TrainingWeights backward_to_weights(const PreparedGraph& graph, const Array& dv) = 0;
};

/// (rows, columns) -> (columns, rows), in tiles that stay in cache.
template <class T>
Array transposed(const Array& from, int64_t rows, int64_t columns) {
  constexpr int64_t tile = 16;
  Array out = Array::empty({columns, rows}, dtype_of<T>);
  const T* source = from.data<T>();
  T* to = out.data<T>();
  for (int64_t r0 = 0; r0 < rows; r0 += tile) {
    for (int64_t c0 = 0; c0 < columns; c0 += tile) {
      const int64_t r1 = std::min(r0 + tile, rows), c1 = std::min(c0 + tile, columns);
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t r = r0; r < r1; ++r) to[c * rows + r] = source[r * columns + c];
      }
    }
  }
  return out;
}

template <class T>
class TrainableLayers final : public TrainableModel {
 public:
  /// Throws Unsupported.
  TrainableLayers(const Architecture& model, const Kernels<T>& kernels, ThreadPool& threads,
                  std::optional<int64_t> keep_bytes)
      : kernels_(kernels),
        weights_(PackedWeights<T>(model, kernels, std::nullopt).weights()),
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
  Array backward(const PreparedGraph& graph, const Array& dv) override {
    check_gradient(graph, dv);
    return layers_.backward(graph, dv, nullptr);
  }
  TrainingWeights backward_to_weights(const PreparedGraph& graph, const Array& dv) override;

 private:
  size_t n_layer() const { return weights_.shapes.size(); }
  /// Throws Error unless there are weights for all atoms of the graph.
  void check_weights(const PreparedGraph& graph) const {
    if (weights_.groups.size() != n_layer()) {
      throw Error("expected weights before an evaluation, got none: call set_weights first");
    }
    for (const int64_t group : groups_in_use(graph.node_splits)) {
      for (const auto& of_layer : weights_.groups) {
        const auto g = static_cast<size_t>(group);
        if (g < of_layer.size() && of_layer[g].node != nullptr) continue;
        throw Error("expected weights of group " + std::to_string(group) + ", which has atoms, got none");
      }
    }
  }
  void check_gradient(const PreparedGraph& graph, const Array& dv) const {
    check_weights(graph);
    check_array(dv, "dv", dtype_of<T>, {graph.n_local, weights_.shapes.back().n});
  }
  const T* hold(const Array& values) {
    memory_.push_back(values);
    return values.data<T>();
  }
  void set_layer(size_t l, const TrainingWeights::Layer& layer);
  void count_experts(size_t l, const NamedArrays& from);
  GroupWeights<T> group_weights(size_t l, const NamedArrays& from);
  void fold_first_layer(const LayerShape& s, GroupWeights<T>& w);
  void fold_far_edges(const LayerShape& s, GroupWeights<T>& w);

  TrainingWeights::Layer layer_gradients(size_t l);
  void collect_group(size_t l, size_t g, const GroupGradients<T>& from, TrainingWeights::Layer& into);
  void add_far_edges(size_t l, size_t g, const GroupGradients<T>& from, Array& bias_gradient);
  void embedding_gradients(const PreparedGraph& graph, TrainingWeights& out);

  const Kernels<T>& kernels_;
  ModelWeights<T> weights_;
  FusedLayers<T> layers_;
  std::vector<Array> memory_;               // what weights_ points to
  std::vector<Buffer<T>> gradient_memory_;  // per thread
};

// --- setting weights ---

template <class T>
std::vector<T> values_of(const Array& values) {
  const T* data = values.data<T>();
  return std::vector<T>(data, data + values.numel());
}

template <class T>
void TrainableLayers<T>::set_weights(const TrainingWeights& weights) {
  if (weights.layers.size() != n_layer()) {
    throw Error("expected weights of " + std::to_string(n_layer()) + " layers, got " +
                std::to_string(weights.layers.size()));
  }
  memory_.clear();
  weights_.groups.clear();
  weights_.updates.clear();
  weights_.edge_matrix = values_of<T>(weights.edge_matrix);
  weights_.edge_bias = values_of<T>(weights.edge_bias);
  if (weights_.shapes[0].with_angles) weights_.angle_direction = values_of<T>(weights.direction);
  weights_.node_table = values_of<T>(weights.node_table);
  for (size_t l = 0; l < n_layer(); ++l) set_layer(l, weights.layers[l]);
}

template <class T>
void TrainableLayers<T>::set_layer(size_t l, const TrainingWeights::Layer& layer) {
  const LayerShape& s = weights_.shapes[l];
  if (s.np != s.n || s.ep != s.e || (s.with_angles && (s.ap != s.a || s.edge_in != s.e))) {
    throw Error("training needs widths that are multiples of " + std::to_string(kRowBytes / sizeof(T)) +
                " and uncompressed angles, got n_dim " + std::to_string(s.n) + ", e_dim " +
                std::to_string(s.e) + ", a_dim " + std::to_string(s.a));
  }
  UpdateVectors<T> update;
  update.n = hold(layer.update_n);
  if (s.live_edge) update.e = hold(layer.update_e);
  if (s.live_angle) update.a = hold(layer.update_a);
  weights_.updates.push_back(update);
  std::vector<GroupWeights<T>> groups(layer.groups.size());
  for (size_t g = 0; g < groups.size(); ++g) {
    if (!layer.groups[g].empty()) groups[g] = group_weights(l, layer.groups[g]);
  }
  weights_.groups.push_back(std::move(groups));
}

const Array& named(const NamedArrays& arrays, const char* name) {
  const auto found = arrays.find(name);
  if (found == arrays.end()) throw Error(std::string("expected weights `") + name + "` of a group, got none");
  return found->second;
}

/// The numbers of experts that are active, which are the same in every group.
template <class T>
void TrainableLayers<T>::count_experts(size_t l, const NamedArrays& from) {
  LayerShape& s = weights_.shapes[l];
  s.k_node = named(from, "p_node").numel();
  s.k_sym = named(from, "p_sym").numel();
  s.k_message = named(from, "p_message").numel();
  s.k_edge = named(from, "p_edge").numel();
  s.k_angle = named(from, "p_angle").numel();
  if (!s.with_angles) return;
  s.k_angle1 = named(from, "p_angle1").numel();
  s.k_angle2 = named(from, "p_angle2").numel();
}

template <class T>
GroupWeights<T> TrainableLayers<T>::group_weights(size_t l, const NamedArrays& from) {
  count_experts(l, from);
  const LayerShape& s = weights_.shapes[l];
  GroupWeights<T> w;
  for (const WeightEntry<T>& entry : weight_entries<T>(s)) {
    const Array& values = named(from, entry.name);
    if (values.numel() != entry.size()) {
      throw Error(std::string("expected ") + entry.name + " of layer " + std::to_string(l) + " with " +
                  std::to_string(entry.rows) + " x " + std::to_string(entry.columns) + " elements, got " +
                  std::to_string(values.numel()));
    }
    if (entry.size() == 0) continue;
    w.*entry.weights = hold(values);
    if (entry.transposed != nullptr) {
      w.*entry.transposed = hold(transposed<T>(values, entry.rows, entry.columns));
    }
  }
  if (l == 0) fold_first_layer(s, w);
  if (s.with_angles) fold_far_edges(s, w);
  return w;
}

/// What stands for the weights of edge and angle features in the first layer: see GroupWeights.
template <class T>
void TrainableLayers<T>::fold_first_layer(const LayerShape& s, GroupWeights<T>& w) {
  using Products = std::initializer_list<std::pair<const std::vector<T>*, const T*>>;
  const auto sums = [&](const T* start, Products products, int64_t columns) {
    Array out = Array::empty({columns}, dtype_of<T>);
    sum_products<T>(start, products, columns, out.data<T>());
    return hold(out);
  };
  const std::vector<T>*matrix = &weights_.edge_matrix, *bias = &weights_.edge_bias;
  const int64_t edge_columns = s.edge_columns(), angle_columns = s.angle_columns();
  w.edge_r = sums(nullptr, {{matrix, w.edge_e}}, edge_columns);
  w.edge_r_b = sums(w.edge_b, {{bias, w.edge_e}}, edge_columns);
  if (!s.with_angles) return;
  w.angle_j_r = sums(nullptr, {{matrix, w.angle_j}}, angle_columns);
  w.angle_k_r = sums(nullptr, {{matrix, w.angle_k}}, angle_columns);
  w.angle_cos = sums(nullptr, {{&weights_.angle_direction, w.angle_a}}, angle_columns);
  w.angle_r_b = sums(w.angle_b, {{bias, w.angle_j}, {bias, w.angle_k}}, angle_columns);
}

/// The answer for an edge without message: sum_k p_k phi(b_k).
template <class T>
void TrainableLayers<T>::fold_far_edges(const LayerShape& s, GroupWeights<T>& w) {
  const int64_t columns = s.k_angle2 * s.e;
  std::vector<T> y(w.angle2_b, w.angle2_b + columns);
  kernels_.activate(s.phi, y.data(), columns);
  Array far = Array::empty({s.e}, dtype_of<T>);
  for (int64_t d = 0; d < s.e; ++d) {
    double sum = 0.0;
    for (int64_t k = 0; k < s.k_angle2; ++k) {
      sum += double(w.p_angle2[k]) * double(y[static_cast<size_t>(k * s.e + d)]);
    }
    far.data<T>()[d] = T(sum);
  }
  w.angle2_far = hold(far);
}

// --- gradients ---

/// Points the gradients of a group into `memory`, one behind the other. Returns how many numbers they are.
template <class T>
int64_t place_gradients(const LayerShape& s, T* memory, GroupGradients<T>& g) {
  int64_t size = 0;
  const auto place = [&](T*& to, int64_t n) {
    to = memory + size;
    size += n;
  };
  for (const WeightEntry<T>& entry : weight_entries<T>(s)) {
    if (entry.gradients != nullptr) place(g.*entry.gradients, entry.size());
    if (entry.sums != nullptr) place(g.*entry.sums, entry.size() * entry.width);
  }
  place(g.far, s.with_angles ? s.e : 0);
  place(g.update_n, s.heads * s.n);
  return size;
}

/// Gradients of routing weights p (k) and of the coefficients of an update (width), from y (k, width): the
/// sums over rows of an expert's activation times the gradient of its output. `coefficients` null: 1.
template <class T>
void split_sums(const T* y, int64_t k, int64_t width, const T* p, const T* coefficients, T* dp,
                T* d_coefficients) {
  for (int64_t e = 0; e < k; ++e) {
    double total = 0.0;
    for (int64_t d = 0; d < width; ++d) {
      const T value = y[e * width + d];
      total += coefficients == nullptr ? double(value) : double(coefficients[d]) * double(value);
      if (d_coefficients != nullptr) d_coefficients[d] += p[e] * value;
    }
    dp[e] = T(total);
  }
}

template <class T>
TrainingWeights TrainableLayers<T>::backward_to_weights(const PreparedGraph& graph, const Array& dv) {
  check_gradient(graph, dv);
  TrainingWeights out;
  out.layers.resize(n_layer());
  layers_.start_backward(dv, n_layer() - 1);
  for (size_t l = n_layer(); l-- > 0;) {
    out.layers[l] = layer_gradients(l);
    if (l == 0) break;
    LayerBuffers<T>& b = layers_.buffers();
    std::copy_n(b.dv.get(0), graph.n_local * weights_.shapes[l].np, b.dv_out.get(0));
  }
  embedding_gradients(graph, out);
  return out;
}

/// Backward of a layer. Every thread sums into memory of its own, which is added up at the end.
template <class T>
TrainingWeights::Layer TrainableLayers<T>::layer_gradients(size_t l) {
  const LayerShape& s = weights_.shapes[l];
  const size_t n_group = weights_.groups[l].size();
  std::vector<Scratch<T>>& scratch = layers_.scratch();
  gradient_memory_.resize(scratch.size());
  GroupGradients<T> unused;
  T none[1];
  const int64_t per_group = place_gradients(s, none, unused);
  std::vector<size_t> present;
  for (size_t g = 0; g < n_group; ++g) {
    if (weights_.groups[l][g].node != nullptr) present.push_back(g);
  }
  const int64_t size = per_group * static_cast<int64_t>(present.size());
  std::vector<std::vector<GroupGradients<T>>> gradients(scratch.size());
  for (size_t thread = 0; thread < scratch.size(); ++thread) {
    T* memory = gradient_memory_[thread].get(size);
    std::fill_n(memory, size, T(0));
    gradients[thread].resize(n_group);
    for (const size_t g : present) {
      place_gradients(s, memory, gradients[thread][g]);
      memory += per_group;
    }
    scratch[thread].gradients = gradients[thread].data();
  }
  layers_.layer_backward(l, /*nodes=*/true, /*from_geometry=*/false);
  for (Scratch<T>& of_thread : scratch) of_thread.gradients = nullptr;
  T* sum = gradient_memory_[0].get(size);
  for (size_t thread = 1; thread < scratch.size(); ++thread) {
    const T* part = gradient_memory_[thread].get(size);
    for (int64_t k = 0; k < size; ++k) sum[k] += part[k];
  }
  TrainingWeights::Layer layer;
  layer.update_n = Array::zeros({2 + s.heads, s.n}, dtype_of<T>);
  layer.update_e = Array::zeros({s.live_edge ? (s.with_angles ? 2 : 1) : 0, s.e}, dtype_of<T>);
  layer.update_a = Array::zeros({s.live_angle ? 1 : 0, s.a}, dtype_of<T>);
  layer.groups.resize(n_group);
  for (const size_t g : present) collect_group(l, g, gradients[0][g], layer);
  return layer;
}

template <class T>
void TrainableLayers<T>::collect_group(size_t l, size_t g, const GroupGradients<T>& from,
                                       TrainingWeights::Layer& into) {
  const LayerShape& s = weights_.shapes[l];
  const UpdateVectors<T>& u = weights_.updates[l];
  NamedArrays& group = into.groups[g];
  for (const WeightEntry<T>& entry : weight_entries<T>(s)) {
    Array values = Array::zeros({entry.rows, entry.columns}, dtype_of<T>);
    if (entry.gradients != nullptr) std::copy_n(from.*entry.gradients, entry.size(), values.data<T>());
    group.emplace(entry.name, values);
  }
  if (s.with_angles) add_far_edges(l, g, from, group.at("angle2_b"));
  T* dn = into.update_n.data<T>();
  T* de = into.update_e.data<T>();
  T* da = into.update_a.data<T>();
  // the message has its coefficients within, and the first map of angles none
  for (int64_t d = 0; d < s.heads * s.n; ++d) dn[2 * s.n + d] += from.update_n[d];
  struct Coefficients {
    const T* values = nullptr;
    T* gradient = nullptr;
  };
  std::map<std::string, Coefficients, std::less<>> update{{"p_node", {u.n, dn}},
                                                          {"p_sym", {u.n + s.n, dn + s.n}}};
  if (s.live_edge) update["p_edge"] = {u.e, de};
  if (s.with_angles) update["p_angle2"] = {u.e + s.e, de + s.e};
  if (s.live_angle) update["p_angle"] = {u.a, da};
  for (const WeightEntry<T>& entry : weight_entries<T>(s)) {
    if (entry.sums == nullptr || entry.columns == 0) continue;
    const Coefficients c = update[entry.name];
    const T* p = weights_.groups[l][g].*entry.weights;
    split_sums<T>(from.*entry.sums, entry.columns, entry.width, p, c.values,
                  group.at(entry.name).template data<T>(), c.gradient);
  }
}

/// Edges without a message: their update is a constant, sum_k p_k phi(b_k).
template <class T>
void TrainableLayers<T>::add_far_edges(size_t l, size_t g, const GroupGradients<T>& from,
                                       Array& bias_gradient) {
  const LayerShape& s = weights_.shapes[l];
  const GroupWeights<T>& w = weights_.groups[l][g];
  const T* coefficients = weights_.updates[l].e + s.e;
  const int64_t columns = s.k_angle2 * s.e;
  std::vector<T> y(w.angle2_b, w.angle2_b + columns), slope(y.size());
  kernels_.activate_with_slope(s.phi, y.data(), slope.data(), columns);
  T* db = bias_gradient.data<T>();
  for (int64_t k = 0; k < s.k_angle2; ++k) {
    for (int64_t d = 0; d < s.e; ++d) {
      const int64_t at = k * s.e + d;
      from.y_angle2[at] += y[static_cast<size_t>(at)] * from.far[d];
      db[at] += w.p_angle2[k] * slope[static_cast<size_t>(at)] * coefficients[d] * from.far[d];
    }
  }
}

template <class T>
void TrainableLayers<T>::embedding_gradients(const PreparedGraph& graph, TrainingWeights& out) {
  const LayerShape& s = weights_.shapes[0];
  LayerBuffers<T>& b = layers_.buffers();
  out.edge_matrix = Array::zeros({s.e}, dtype_of<T>);
  out.edge_bias = Array::zeros({s.e}, dtype_of<T>);
  out.direction = Array::zeros({s.with_angles ? s.a : 0}, dtype_of<T>);
  out.node_table = Array::zeros({static_cast<int64_t>(weights_.node_table.size()) / s.n, s.n}, dtype_of<T>);
  T* d_matrix = out.edge_matrix.data<T>();
  T* d_bias = out.edge_bias.data<T>();
  const T* input = b.edge_input.get(0);
  const T* de = b.de.get(0);
  std::vector<T> z(static_cast<size_t>(s.e)), slope(static_cast<size_t>(s.e), T(1));
  for (int64_t edge = 0; edge < graph.n_edge; ++edge) {
    if (!weights_.use_dist) {
      for (size_t d = 0; d < z.size(); ++d) {
        z[d] = input[edge] * weights_.edge_matrix[d] + weights_.edge_bias[d];
      }
      kernels_.activate_with_slope(weights_.phi, z.data(), slope.data(), s.e);
    }
    for (int64_t d = 0; d < s.e; ++d) {
      const T dz = de[edge * s.e + d] * slope[static_cast<size_t>(d)];
      d_matrix[d] += input[edge] * dz;
      d_bias[d] += dz;
    }
  }
  if (s.with_angles) {
    T* d_direction = out.direction.data<T>();
    const T* cos = b.cos.get(0);
    const T* da = b.da.get(0);
    for (int64_t k = 0; k < graph.n_angle; ++k) {
      for (int64_t d = 0; d < s.a; ++d) d_direction[d] += cos[k] * da[k * s.a + d];
    }
  }
  T* d_table = out.node_table.data<T>();
  const T* dv = b.dv.get(0);
  for (int64_t i = 0; i < graph.n_local; ++i) {
    T* row = d_table + graph.types[static_cast<size_t>(i)] * s.n;
    for (int64_t d = 0; d < s.n; ++d) row[d] += dv[i * s.n + d];
  }
}

template <class T>
std::unique_ptr<TrainableModel> make_model(const Architecture& model, const Settings& settings,
                                           ThreadPool& threads) {
  return std::make_unique<TrainableLayers<T>>(model, kernels<T>(settings.instruction_set.c_str()), threads,
                                              settings.keep_bytes);
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

void Trainer::set_num_threads(int64_t n) {
  if (n < 0 || n > 4096) {
    throw Error("expected a number of threads from 1 to 4096, or 0 for the default, got " +
                std::to_string(n));
  }
  impl_->n_threads = n;
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

Array Trainer::backward(const Array& dv) { return impl_->ready().backward(impl_->graph, dv); }

TrainingWeights Trainer::backward_to_weights(const Array& dv) {
  return impl_->ready().backward_to_weights(impl_->graph, dv);
}

}  // namespace moecalc
