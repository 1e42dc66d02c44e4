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

using namespace kernels;

/// Inputs, outputs or gradients of a layer, unpadded.
struct LayerArrays {
  Array node;
  Array edge;
  Array angle;
  Array switch_edge;
  Array directions;
  Array switch_angle;
};

template <class Real>
class ModelOf final : public LayerRunner::Model {
 public:
  ModelOf(LoadedPackage opened, const EvaluatorOptions& options)
      : Model(std::move(opened)),
        kernels_(select_kernels<Real>(options.instruction_set.c_str())),
        packed_(package.architecture, kernels_, options.weight_bytes),
        layers_(packed_.weights(), package.architecture.geometry, kernels_, threads_, options.keep_bytes) {
    packed_.set_tables(tables);
    layers_.set_statistics(tables.mean, tables.stddev);
  }

  std::vector<Array> run(const PreparedGraph& graph, size_t layer, const std::vector<Array>& inputs,
                         const std::vector<Array>& gradients) override {
    const auto of = [](const Array& values) { return values.to(dtype_of<Real>); };
    const LayerArrays in{of(inputs[0]), of(inputs[1]), of(inputs[2]),
                         of(inputs[3]), of(inputs[4]), of(inputs[5])};
    packed_.set_groups(features_of(graph, package.architecture, tables, nullptr),
                       groups_in_use(graph.node_splits));
    LayerArrays out = forward(graph, layer, in);
    std::vector<Array> results{out.node, out.edge, out.angle};
    if (!gradients.empty()) {
      out = backward(layer, in, {of(gradients[0]), of(gradients[1]), of(gradients[2]), {}, {}, {}});
      results = {out.node, out.edge, out.angle, out.switch_edge, out.directions, out.switch_angle};
    }
    for (Array& values : results) values = values.to(Dtype::float64);
    return results;
  }

 private:
  LayerArrays forward(const PreparedGraph& graph, size_t layer, const LayerArrays& in);
  LayerArrays backward(size_t layer, const LayerArrays& in, const LayerArrays& gradients);

  const Kernels<Real>& kernels_;
  PackedWeights<Real> packed_;
  FusedLayers<Real> layers_;
};

template <class Real>
void put_numbers(const Array& from, Real* to) {
  std::copy_n(from.data<Real>(), from.numel(), to);
}

template <class Real>
LayerArrays ModelOf<Real>::forward(const PreparedGraph& graph, size_t layer, const LayerArrays& in) {
  layers_.set_graph(graph);
  layers_.decide_what_to_keep(true, false);
  const LayerShape& shape = packed_.weights().shapes[layer];
  const int64_t n_node = graph.n_node;
  const int64_t n_edge = graph.n_edge;
  const int64_t n_angle = graph.n_angle;
  LayerBuffers<Real>& buffers = layers_.buffers();
  put_rows(in.node, 0, n_node, shape.n_padded, buffers.node[layer].get(n_node * shape.n_padded));
  put_rows(in.edge, 0, n_edge, shape.e_padded, buffers.edge[layer].get(n_edge * shape.e_padded));
  if (shape.with_angles)
    put_rows(in.angle, 0, n_angle, shape.a_padded, buffers.angle[layer].get(n_angle * shape.a_padded));
  put_numbers(in.switch_edge, buffers.switch_edge.get(n_edge));
  put_numbers(in.switch_angle, buffers.switch_angle.get(n_angle));
  const Real* switch_edge = in.switch_edge.data<Real>();
  const Real* directions = in.directions.data<Real>();
  const auto norm = static_cast<Real>(std::sqrt(shape.edge_norm));
  Real* scaled = buffers.directions.get(4 * n_edge);
  for (int64_t e = 0; e < n_edge; ++e) {
    for (int c = 0; c < 3; ++c) scaled[4 * e + c] = directions[3 * e + c] * switch_edge[e] / norm;
    scaled[4 * e + 3] = Real(0);
  }
  layers_.layer_forward(layer, /*from_geometry=*/false);
  LayerArrays out;
  out.node = unpadded(buffers.node[layer + 1].get(0), graph.n_local, shape.n, shape.n_padded);
  out.edge =
      shape.live_edge ? unpadded(buffers.edge[layer + 1].get(0), n_edge, shape.e, shape.e_padded) : in.edge;
  out.angle = shape.live_angle ? unpadded(buffers.angle[layer + 1].get(0), n_angle, shape.a, shape.a_padded)
                               : in.angle;
  return out;
}

template <class Real>
LayerArrays ModelOf<Real>::backward(size_t layer, const LayerArrays& in, const LayerArrays& gradients) {
  const LayerShape& shape = packed_.weights().shapes[layer];
  const GraphView& graph = layers_.graph();
  LayerBuffers<Real>& buffers = layers_.buffers();
  layers_.start_backward(gradients.node, layer);
  put_rows(gradients.edge, 0, graph.n_edge, shape.e_padded,
           buffers.d_edge.get(graph.n_edge * shape.e_padded));
  layers_.use_edge_gradients();
  if (shape.with_angles) {
    put_rows(gradients.angle, 0, graph.n_angle, shape.a_padded,
             buffers.d_angle.get(graph.n_angle * shape.a_padded));
    layers_.use_angle_gradients();
  }
  layers_.layer_backward(layer, /*nodes=*/true, /*from_geometry=*/false);
  LayerArrays out;
  out.node = unpadded(buffers.d_node.get(0), graph.n_node, shape.n, shape.n_padded);
  out.edge = unpadded(buffers.d_edge.get(0), graph.n_edge, shape.e, shape.e_padded);
  out.angle = shape.with_angles ? unpadded(buffers.d_angle.get(0), graph.n_angle, shape.a, shape.a_padded)
                                : gradients.angle;
  // the kernels' directions are h sw / sqrt(edge_norm)
  out.switch_edge = Array::empty({graph.n_edge}, dtype_of<Real>);
  out.directions = Array::empty({graph.n_edge, 3}, dtype_of<Real>);
  const Real* switch_edge = in.switch_edge.data<Real>();
  const Real* directions = in.directions.data<Real>();
  const double norm = std::sqrt(shape.edge_norm);
  for (int64_t e = 0; e < graph.n_edge; ++e) {
    double to_switch = 0.0;
    for (int c = 0; c < 3; ++c) {
      const double d_row = buffers.d_directions.get(0)[4 * e + c] / norm;
      out.directions.template data<Real>()[3 * e + c] = Real(d_row * switch_edge[e]);
      to_switch += d_row * directions[3 * e + c];
    }
    out.switch_edge.template data<Real>()[e] = Real(buffers.d_switch_edge.get(0)[e] + to_switch);
  }
  out.switch_angle = unpadded(buffers.d_switch_angle.get(0), graph.n_angle, 1, 1).reshape({graph.n_angle});
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
