// The plain backend: any model that a package can describe, operation by operation, as the formulas of
// moecalc/nn are written.
#include <cmath>
#include <utility>

#include "backends/backend.h"
#include "backends/laps.h"
#include "backends/plain/activation.h"
#include "backends/plain/experts.h"
#include "backends/plain/geometry.h"
#include "backends/plain/layer.h"
#include "backends/plain/readout.h"
#include "graph/graph.h"
#include "package/packed_weights.h"
#include "package/routing.h"

namespace moecalc {

namespace plain {
namespace {

template <class Real>
Matrix<Real> column(const std::vector<double>& values, int64_t columns = 1) {
  return Matrix<Real>::of(values.data(), static_cast<int64_t>(values.size()) / columns, columns);
}

/// Gradient of a leaf, zeros where nothing depends on it.
template <class Real>
std::vector<double> gradient_of(const Variable<Real>& leaf) {
  const Matrix<Real>& sum = leaf.gradient->sum(leaf->rows(), leaf->columns());
  return {sum.data(), sum.data() + sum.size()};
}

template <class Real>
Matrix<Real> matrix_of(const Array& rows) {
  return Matrix<Real>::of(rows.data<Real>(), rows.size(0), rows.size(1));
}

/// A view, which the matrix must outlive.
template <class Real>
Array array_of(const Matrix<Real>& matrix) {
  return Array::view(matrix.data(), {matrix.rows(), matrix.columns()});
}

template <class Real>
class PlainBackend final : public Backend {
 public:
  explicit PlainBackend(const BackendInputs& inputs)
      : model_(inputs.package.architecture), threads_(inputs.threads), experts_(model_) {
    const EmbeddingSource& embedding = model_.embedding;
    const Array bias = embedding.edge_bias.to(dtype_of<Real>);
    edge_map_ = dense_map(Matrix<Real>::of(embedding.edge_matrix),
                          std::vector<Real>(bias.data<Real>(), bias.data<Real>() + bias.numel()));
    Matrix<double> direction = Matrix<double>::of(embedding.angle_matrix);
    const double root_pi = std::sqrt(3.14159265358979323846);
    for (int64_t c = 0; c < direction.size(); ++c) direction.data()[c] /= root_pi;
    angle_map_ = dense_map(Matrix<Real>::of(direction.data(), 1, direction.size()));
    // with a dtype of the user's choice, the fitting net has that one as well
    const Dtype of_net = inputs.options.dtype.has_value() ? inputs.dtype : model_.readout.dtype;
    readout_ = make_readout(model_.readout, of_net, threads_);
  }

  void set_tables(const TypeTables& tables) override {
    tables_ = tables;
    node_rows_ = Matrix<Real>::of(tables.nodes);
    activate<Real>(model_.embedding.phi, node_rows_.data(), nullptr, node_rows_.size());
    readout_->set_tables(tables);
  }

  void set_list(const NeighborList& list) override { builder_.set_list(list, tables_.rules); }

  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange) override {
    Laps laps;
    const PreparedGraph& graph = builder_.prepare(positions, cells);
    Evaluation result = empty_result(graph, request);
    result.timings.emplace_back("graph", laps.next());

    route_groups(features_of(graph, model_, tables_, exchange));
    Run run(*this, graph, request.gradients(), exchange);
    const Variable<Real> node = run.forward();
    result.timings.emplace_back("forward", laps.next());
    Matrix<double> d_node;
    const Matrix<double> features = Matrix<double>::of(node->data(), node->rows(), node->columns());
    const std::vector<double> energies =
        readout_->evaluate(features, graph.types, request.gradients() ? &d_node : nullptr);
    put_energies(graph, Array::of(energies), result);
    result.timings.emplace_back("readout", laps.next());
    if (!request.gradients()) return result;
    const std::vector<double> d_vectors =
        run.backward(node, Matrix<Real>::of(d_node.data(), d_node.rows(), d_node.columns()));
    scatter_gradients(graph, d_vectors.data(), request, result);
    result.timings.emplace_back("backward", laps.next());
    return result;
  }

  std::string name() const override { return "plain"; }
  bool is_fast() const override { return false; }
  int64_t bytes() const override {
    return weight_bytes() + readout_->bytes() + node_rows_.size() * static_cast<int64_t>(sizeof(Real));
  }
  int64_t weight_bytes() const override { return experts_.bytes(); }
  void release_weights() override { experts_.release(); }

 private:
  /// One evaluation: everything that the tape refers to.
  class Run {
   public:
    Run(PlainBackend& backend, const PreparedGraph& graph, bool gradients, GhostExchange* exchange)
        : backend_(backend),
          graph_(graph),
          exchange_(exchange),
          geometry_(graph, backend.model_.geometry, backend.tables_, backend.threads_),
          connections_(graph),
          maps_(backend.maps_of(graph)),
          tape_(backend.threads_, gradients) {
      const Invariants& invariants = geometry_.invariants();
      edge_input_ = tape_.leaf(column<Real>(invariants.edge_input));
      cosine_ = tape_.leaf(column<Real>(invariants.cosine));
      directions_.switch_edge = tape_.leaf(column<Real>(invariants.switch_edge));
      directions_.directions = tape_.leaf(column<Real>(invariants.directions, 3));
      directions_.switch_angle = tape_.leaf(column<Real>(invariants.switch_angle));
    }

    /// Node features after the last layer, (n_local, n_dim).
    Variable<Real> forward() {
      Features<Real> features = embedded();
      const std::vector<LayerSource>& layers = backend_.model_.layers;
      for (size_t layer = 0; layer < layers.size(); ++layer) {
        if (layer > 0) features.node = extended(features.node);
        features = Layer<Real>(layers[layer], maps_[layer], connections_, directions_, tape_).run(features);
      }
      return features.node;
    }

    /// dE/d(edge_vec) from dE/d(node), `node` as of `forward`.
    std::vector<double> backward(const Variable<Real>& node, Matrix<Real> d_node) {
      tape_.backward(node, std::move(d_node));
      Invariants gradient;
      gradient.edge_input = gradient_of(edge_input_);
      gradient.switch_edge = gradient_of(directions_.switch_edge);
      gradient.directions = gradient_of(directions_.directions);
      gradient.cosine = gradient_of(cosine_);
      gradient.switch_angle = gradient_of(directions_.switch_angle);
      return geometry_.backward(gradient);
    }

   private:
    /// Rows of the type table, e = phi(x W + b) or x W + b, and a = cos W_a / sqrt(pi).
    Features<Real> embedded() {
      const Matrix<Real>& rows = backend_.node_rows_;
      Matrix<Real> node = Matrix<Real>::empty(graph_.n_node, rows.columns());
      for (int64_t i = 0; i < graph_.n_node; ++i) {
        std::copy_n(rows.row(graph_.types[static_cast<size_t>(i)]), rows.columns(), node.row(i));
      }
      Features<Real> features;
      features.node = tape_.constant(std::move(node));
      features.edge = tape_.product(edge_input_, backend_.edge_map_, 0, graph_.edge_splits, true);
      const EmbeddingSource& embedding = backend_.model_.embedding;
      if (!embedding.use_dist) features.edge = tape_.activated(std::move(features.edge), embedding.phi);
      features.angle = tape_.product(cosine_, backend_.angle_map_, 0, graph_.angle_splits, false);
      return features;
    }

    /// `node` with the rows of ghosts, whose gradients go back to their owners.
    Variable<Real> extended(const Variable<Real>& node) {
      if (exchange_ == nullptr) return node;
      return tape_.exchanged(
          node,
          [this](const Matrix<Real>& rows) {
            return matrix_of<Real>(with_ghosts(graph_, array_of(rows), exchange_));
          },
          [this](const Matrix<Real>& gradient) {
            return matrix_of<Real>(without_ghosts(graph_, array_of(gradient), exchange_));
          });
    }

    PlainBackend& backend_;
    const PreparedGraph& graph_;
    GhostExchange* exchange_;
    const Geometry geometry_;
    const Connections connections_;
    const std::vector<LayerMaps<Real>> maps_;
    Tape<Real> tape_;
    Variable<Real> edge_input_;
    Variable<Real> cosine_;
    Directions<Real> directions_;
  };

  void route_groups(const Array& features) {
    if (features_.defined() && features_.equals(features)) return;
    routes_.clear();
    for (const LayerSource& layer : model_.layers) {
      std::map<std::string, Routes> of_layer;
      for (const auto& [name, router] : layer.routers) of_layer[name] = route(router, features);
      routes_.push_back(std::move(of_layer));
    }
    features_ = features.clone();
  }

  std::vector<LayerMaps<Real>> maps_of(const PreparedGraph& graph) {
    const std::vector<int64_t> used = groups_in_use(graph.node_splits);
    std::vector<LayerMaps<Real>> maps(model_.layers.size());
    for (size_t index = 0; index < maps.size(); ++index) {
      const LayerSource& layer = model_.layers[index];
      LayerMaps<Real>& of_layer = maps[index];
      for (size_t k = 0; k < layer.positions.size(); ++k) {
        const PositionSource& position = layer.positions[k];
        const Routes* routes = position.routed ? &routes_[index].at(position.router) : nullptr;
        of_layer.positions[position.name] = experts_.map(index, k, routes, used, graph.n_group());
      }
      if (layer.compress_n.defined()) of_layer.compress_n = dense_map(Matrix<Real>::of(layer.compress_n));
      if (layer.compress_e.defined()) of_layer.compress_e = dense_map(Matrix<Real>::of(layer.compress_e));
    }
    return maps;
  }

  const Architecture& model_;
  ThreadPool& threads_;
  Experts<Real> experts_;
  LinearMap<Real> edge_map_;
  LinearMap<Real> angle_map_;
  std::unique_ptr<Readout> readout_;
  TypeTables tables_;
  Matrix<Real> node_rows_;  // (K n_types, n_dim) initial node features
  GraphBuilder builder_;
  Array features_;                                     // for which the groups were routed
  std::vector<std::map<std::string, Routes>> routes_;  // [layer][router]
};

}  // namespace
}  // namespace plain

std::unique_ptr<Backend> make_plain_backend(const BackendInputs& inputs) {
  if (inputs.dtype == Dtype::float32) return std::make_unique<plain::PlainBackend<float>>(inputs);
  return std::make_unique<plain::PlainBackend<double>>(inputs);
}

}  // namespace moecalc
