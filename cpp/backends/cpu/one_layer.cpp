#include "backends/cpu/one_layer.h"

#include <cmath>

#include "backends/backend.h"
#include "backends/cpu/fused_layers.h"
#include "core/threads.h"
#include "graph/graph.h"
#include "moecalc/error.h"
#include "package/architecture.h"
#include "package/conditions.h"
#include "package/packed_weights.h"

namespace moecalc {

/// Opened package of either dtype.
class LayerRunner::Model {
 public:
  virtual ~Model() = default;
  virtual std::vector<Array> run(const PreparedGraph& graph, size_t layer, const std::vector<Array>& inputs,
                                 const std::vector<Array>& gradients) = 0;

  LoadedPackage package;
  TypeTables tables;

 protected:
  explicit Model(LoadedPackage opened)
      : package(std::move(opened)), tables(Conditions(package.architecture).tables()) {
    threads_.resize(default_threads());
  }

  ThreadPool threads_;
};

namespace {

using namespace ops;

/// Inputs, outputs or gradients of a layer, unpadded.
struct LayerArrays {
  Array v, e, a, sw, h, asw;
};

template <class T>
class ModelOf final : public LayerRunner::Model {
 public:
  ModelOf(LoadedPackage opened, const EvaluatorOptions& options)
      : Model(std::move(opened)),
        kernels_(kernels<T>(options.instruction_set.c_str())),
        packed_(package.architecture, kernels_, options.weight_bytes),
        layers_(packed_.weights(), package.architecture.geometry, kernels_, threads_, options.keep_bytes) {
    packed_.set_tables(tables);
    layers_.set_statistics(tables.mean, tables.stddev);
  }

  std::vector<Array> run(const PreparedGraph& graph, size_t layer, const std::vector<Array>& inputs,
                         const std::vector<Array>& gradients) override {
    const auto of = [](const Array& values) { return values.to(dtype_of<T>); };
    const LayerArrays in{of(inputs[0]), of(inputs[1]), of(inputs[2]),
                         of(inputs[3]), of(inputs[4]), of(inputs[5])};
    packed_.set_groups(features_of(graph, package.architecture, tables, nullptr),
                       groups_in_use(graph.node_splits));
    LayerArrays out = forward(graph, layer, in);
    std::vector<Array> results{out.v, out.e, out.a};
    if (!gradients.empty()) {
      out = backward(layer, in, {of(gradients[0]), of(gradients[1]), of(gradients[2]), {}, {}, {}});
      results = {out.v, out.e, out.a, out.sw, out.h, out.asw};
    }
    for (Array& values : results) values = values.to(Dtype::float64);
    return results;
  }

 private:
  LayerArrays forward(const PreparedGraph& graph, size_t l, const LayerArrays& in);
  LayerArrays backward(size_t l, const LayerArrays& in, const LayerArrays& gradients);

  const Kernels<T>& kernels_;
  PackedWeights<T> packed_;
  FusedLayers<T> layers_;
};

template <class T>
void put_numbers(const Array& from, T* to) {
  std::copy_n(from.data<T>(), from.numel(), to);
}

template <class T>
LayerArrays ModelOf<T>::forward(const PreparedGraph& graph, size_t l, const LayerArrays& in) {
  layers_.set_graph(graph);
  layers_.decide_what_to_keep(true, false);
  const LayerShape& s = packed_.weights().shapes[l];
  const int64_t n_node = graph.n_node, n_edge = graph.n_edge, n_angle = graph.n_angle;
  LayerBuffers<T>& b = layers_.buffers();
  put_rows(in.v, 0, n_node, s.np, b.v[l].get(n_node * s.np));
  put_rows(in.e, 0, n_edge, s.ep, b.e[l].get(n_edge * s.ep));
  if (s.with_angles) put_rows(in.a, 0, n_angle, s.ap, b.a[l].get(n_angle * s.ap));
  put_numbers(in.sw, b.sw.get(n_edge));
  put_numbers(in.asw, b.asw.get(n_angle));
  const T* sw = in.sw.data<T>();
  const T* h = in.h.data<T>();
  const auto norm = static_cast<T>(std::sqrt(s.edge_norm));
  T* scaled = b.h.get(4 * n_edge);
  for (int64_t e = 0; e < n_edge; ++e) {
    for (int c = 0; c < 3; ++c) scaled[4 * e + c] = h[3 * e + c] * sw[e] / norm;
    scaled[4 * e + 3] = T(0);
  }
  layers_.layer_forward(l, /*from_geometry=*/false);
  LayerArrays out;
  out.v = unpadded(b.v[l + 1].get(0), graph.n_local, s.n, s.np);
  out.e = s.live_edge ? unpadded(b.e[l + 1].get(0), n_edge, s.e, s.ep) : in.e;
  out.a = s.live_angle ? unpadded(b.a[l + 1].get(0), n_angle, s.a, s.ap) : in.a;
  return out;
}

template <class T>
LayerArrays ModelOf<T>::backward(size_t l, const LayerArrays& in, const LayerArrays& gradients) {
  const LayerShape& s = packed_.weights().shapes[l];
  const GraphView& g = layers_.graph();
  LayerBuffers<T>& b = layers_.buffers();
  layers_.start_backward(gradients.v, l);
  put_rows(gradients.e, 0, g.n_edge, s.ep, b.de.get(g.n_edge * s.ep));
  layers_.use_edge_gradients();
  if (s.with_angles) {
    put_rows(gradients.a, 0, g.n_angle, s.ap, b.da.get(g.n_angle * s.ap));
    layers_.use_angle_gradients();
  }
  layers_.layer_backward(l, /*nodes=*/true, /*from_geometry=*/false);
  LayerArrays out;
  out.v = unpadded(b.dv.get(0), g.n_node, s.n, s.np);
  out.e = unpadded(b.de.get(0), g.n_edge, s.e, s.ep);
  out.a = s.with_angles ? unpadded(b.da.get(0), g.n_angle, s.a, s.ap) : gradients.a;
  // the kernels' h is h sw / sqrt(edge_norm)
  out.sw = Array::empty({g.n_edge}, dtype_of<T>);
  out.h = Array::empty({g.n_edge, 3}, dtype_of<T>);
  const T* sw = in.sw.data<T>();
  const T* h = in.h.data<T>();
  const double norm = std::sqrt(s.edge_norm);
  for (int64_t e = 0; e < g.n_edge; ++e) {
    double to_sw = 0.0;
    for (int c = 0; c < 3; ++c) {
      const double dh = b.dh.get(0)[4 * e + c] / norm;
      out.h.template data<T>()[3 * e + c] = T(dh * sw[e]);
      to_sw += dh * h[3 * e + c];
    }
    out.sw.template data<T>()[e] = T(b.dsw.get(0)[e] + to_sw);
  }
  out.asw = unpadded(b.dasw.get(0), g.n_angle, 1, 1).reshape({g.n_angle});
  return out;
}

/// Throws Error unless these are what a layer reads: (n, ...) rows of nodes, edges and angles.
void check_rows(const std::vector<Array>& arrays, const char* const* names, const PreparedGraph& graph,
                const Architecture& model) {
  const int64_t columns[] = {model.n_dim, model.e_dim, model.a_dim, 1, 3, 1};
  const int64_t rows[] = {graph.n_node, graph.n_edge, graph.n_angle,
                          graph.n_edge, graph.n_edge, graph.n_angle};
  for (size_t k = 0; k < arrays.size(); ++k) {
    const Array& array = arrays[k];
    const bool is_flat = k == 3 || k == 5;
    const Shape wanted = is_flat ? Shape{rows[k]} : Shape{rows[k], columns[k]};
    if (array.shape() != wanted) {
      throw Error(std::string("expected `") + names[k] + "` of shape " + shown(wanted) + ", got " +
                  shown(array.shape()));
    }
  }
}

constexpr const char* kInputs[] = {"v", "e", "a", "sw", "h", "asw"};

}  // namespace

LayerRunner::LayerRunner(const std::string& path, const EvaluatorOptions& options) {
  LoadedPackage package = load_package(path);
  if (package.architecture.conditions.taken()) {
    throw Error(path + ": expected a model without charge, spin and frame parameters");
  }
  try {
    if (options.dtype.value_or(package.architecture.dtype) == Dtype::float32) {
      model_ = std::make_unique<ModelOf<float>>(std::move(package), options);
    } else {
      model_ = std::make_unique<ModelOf<double>>(std::move(package), options);
    }
  } catch (const Unsupported& option) {
    throw Error(path + ": no fused kernels here (" + option.reason + ")");
  }
}

LayerRunner::~LayerRunner() = default;

std::vector<Array> LayerRunner::run(const LayerGraph& graph, int64_t layer, const std::vector<Array>& inputs,
                                    const std::vector<Array>& gradients) {
  const auto n_layer = static_cast<int64_t>(model_->package.architecture.layers.size());
  if (layer < 0 || layer >= n_layer) {
    throw Error("expected a layer in [0, " + std::to_string(n_layer) + "), got " + std::to_string(layer));
  }
  if (inputs.size() != 6 || (!gradients.empty() && gradients.size() != 3)) {
    throw Error("expected 6 inputs and 0 or 3 gradients, got " + std::to_string(inputs.size()) + " and " +
                std::to_string(gradients.size()));
  }
  const GraphRules& rules = model_->tables.rules;
  const Array system_index = Array::zeros(graph.types.shape(), Dtype::int64);
  const ListedEdges edges = list_of_edges(graph.types, graph.edge_index, graph.edge_vec, system_index, 1);
  GraphBuilder builder;
  builder.set_list(checked_list(edges.list, rules), rules);
  const PreparedGraph& prepared = builder.prepare(edges.positions, Array());
  check_rows(inputs, kInputs, prepared, model_->package.architecture);
  check_rows(gradients, kInputs, prepared, model_->package.architecture);
  return model_->run(prepared, static_cast<size_t>(layer), inputs, gradients);
}

}  // namespace moecalc
