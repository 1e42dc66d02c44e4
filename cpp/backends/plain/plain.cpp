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

template <class T>
Matrix<T> column(const std::vector<double>& values, int64_t columns = 1) {
  return Matrix<T>::of(values.data(), static_cast<int64_t>(values.size()) / columns, columns);
}

/// Gradient of a leaf, zeros where nothing depends on it.
template <class T>
std::vector<double> gradient_of(const Variable<T>& leaf) {
  const Matrix<T>& sum = leaf.gradient->sum(leaf->rows(), leaf->columns());
  return {sum.data(), sum.data() + sum.size()};
}

template <class T>
Matrix<T> matrix_of(const Array& rows) {
  return Matrix<T>::of(rows.data<T>(), rows.size(0), rows.size(1));
}

/// A view, which the matrix must outlive.
template <class T>
Array array_of(const Matrix<T>& matrix) {
  return Array::view(matrix.data(), {matrix.rows(), matrix.columns()});
}

template <class T>
class PlainBackend final : public Backend {
 public:
  explicit PlainBackend(const BackendInputs& inputs)
      : model_(inputs.package.architecture), threads_(inputs.threads), experts_(model_) {
    const EmbeddingSource& embedding = model_.embedding;
    const Array bias = embedding.edge_bias.to(dtype_of<T>);
    edge_map_ = dense_map(Matrix<T>::of(embedding.edge_matrix),
                          std::vector<T>(bias.data<T>(), bias.data<T>() + bias.numel()));
    Matrix<double> direction = Matrix<double>::of(embedding.angle_matrix);
    const double root_pi = std::sqrt(3.14159265358979323846);
    for (int64_t c = 0; c < direction.size(); ++c) direction.data()[c] /= root_pi;
    angle_map_ = dense_map(Matrix<T>::of(direction.data(), 1, direction.size()));
    // with a dtype of the user's choice, the fitting net has that one as well
    const Dtype of_net = inputs.options.dtype.has_value() ? inputs.dtype : model_.readout.dtype;
    readout_ = make_readout(model_.readout, of_net, threads_);
  }

  void set_tables(const TypeTables& tables) override {
    tables_ = tables;
    node_rows_ = Matrix<T>::of(tables.nodes);
    activate<T>(model_.embedding.phi, node_rows_.data(), nullptr, node_rows_.size());
    readout_->set_tables(tables);
  }

  void set_list(const NeighborList& list) override { builder_.set_list(list, tables_.rules); }

  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange) override {
    Laps laps;
    const PreparedGraph& graph = builder_.prepare(positions, cells);
    Evaluation result = empty_result(graph.n_node, graph.n_local, graph.n_systems, request);
    result.n_edge = graph.n_edge;
    result.n_angle = graph.n_angle;
    result.max_neighbors = graph.max_neighbors;
    result.max_angle_neighbors = graph.max_angle_neighbors;
    result.timings.emplace_back("graph", laps.next());

    route_groups(features_of(graph, model_, tables_, exchange));
    Run run(*this, graph, request.gradients(), exchange);
    const Variable<T> v = run.forward();
    result.timings.emplace_back("forward", laps.next());
    Matrix<double> dv;
    const Matrix<double> features = Matrix<double>::of(v->data(), v->rows(), v->columns());
    const std::vector<double> energies =
        readout_->evaluate(features, graph.types, request.gradients() ? &dv : nullptr);
    sum_energies(graph, energies, result);
    result.timings.emplace_back("readout", laps.next());
    if (!request.gradients()) return result;
    const std::vector<double> g = run.backward(v, Matrix<T>::of(dv.data(), dv.rows(), dv.columns()));
    scatter_gradients(graph, g.data(), request, result);
    result.timings.emplace_back("backward", laps.next());
    return result;
  }

  std::string name() const override { return "plain"; }
  bool is_fast() const override { return false; }
  int64_t bytes() const override {
    return weight_bytes() + readout_->bytes() + node_rows_.size() * static_cast<int64_t>(sizeof(T));
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
      const Invariants& x = geometry_.invariants();
      edge_input_ = tape_.leaf(column<T>(x.edge_input));
      cos_ = tape_.leaf(column<T>(x.cos));
      directions_.sw = tape_.leaf(column<T>(x.sw));
      directions_.h = tape_.leaf(column<T>(x.h, 3));
      directions_.asw = tape_.leaf(column<T>(x.asw));
    }

    /// Node features after the last layer, (n_local, n_dim).
    Variable<T> forward() {
      Features<T> x = embedded();
      const std::vector<LayerSource>& layers = backend_.model_.layers;
      for (size_t l = 0; l < layers.size(); ++l) {
        if (l > 0) x.v = extended(x.v);
        x = Layer<T>(layers[l], maps_[l], connections_, directions_, tape_).run(x);
      }
      return x.v;
    }

    /// dE/d(edge_vec) from dE/dv of the node features.
    std::vector<double> backward(const Variable<T>& v, Matrix<T> dv) {
      tape_.backward(v, std::move(dv));
      Invariants gradient;
      gradient.edge_input = gradient_of(edge_input_);
      gradient.sw = gradient_of(directions_.sw);
      gradient.h = gradient_of(directions_.h);
      gradient.cos = gradient_of(cos_);
      gradient.asw = gradient_of(directions_.asw);
      return geometry_.backward(gradient);
    }

   private:
    Features<T> embedded() {
      const Matrix<T>& rows = backend_.node_rows_;
      Matrix<T> v = Matrix<T>::empty(graph_.n_node, rows.columns());
      for (int64_t i = 0; i < graph_.n_node; ++i) {
        std::copy_n(rows.row(graph_.types[static_cast<size_t>(i)]), rows.columns(), v.row(i));
      }
      Features<T> x;
      x.v = tape_.constant(std::move(v));
      x.e = tape_.product(edge_input_, backend_.edge_map_, 0, graph_.edge_splits, true);
      const EmbeddingSource& embedding = backend_.model_.embedding;
      if (!embedding.use_dist) x.e = tape_.activated(std::move(x.e), embedding.phi);
      x.a = tape_.product(cos_, backend_.angle_map_, 0, graph_.angle_splits, false);
      return x;
    }

    /// v with the rows of ghosts, whose gradients go back to their owners.
    Variable<T> extended(const Variable<T>& v) {
      if (exchange_ == nullptr) return v;
      return tape_.exchanged(
          v, [this](const Matrix<T>& x) { return matrix_of<T>(with_ghosts(graph_, array_of(x), exchange_)); },
          [this](const Matrix<T>& dx) {
            return matrix_of<T>(without_ghosts(graph_, array_of(dx), exchange_));
          });
    }

    PlainBackend& backend_;
    const PreparedGraph& graph_;
    GhostExchange* exchange_;
    const Geometry geometry_;
    const Connections connections_;
    const std::vector<LayerMaps<T>> maps_;
    Tape<T> tape_;
    Variable<T> edge_input_, cos_;
    Directions<T> directions_;
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

  std::vector<LayerMaps<T>> maps_of(const PreparedGraph& graph) {
    const std::vector<int64_t> used = groups_in_use(graph.node_splits);
    std::vector<LayerMaps<T>> maps(model_.layers.size());
    for (size_t l = 0; l < maps.size(); ++l) {
      const LayerSource& layer = model_.layers[l];
      for (size_t p = 0; p < layer.positions.size(); ++p) {
        const PositionSource& position = layer.positions[p];
        const Routes* routes = position.routed ? &routes_[l].at(position.router) : nullptr;
        maps[l].positions[position.name] = experts_.map(l, p, routes, used, graph.n_group());
      }
      if (layer.compress_n.defined()) maps[l].compress_n = dense_map(Matrix<T>::of(layer.compress_n));
      if (layer.compress_e.defined()) maps[l].compress_e = dense_map(Matrix<T>::of(layer.compress_e));
    }
    return maps;
  }

  /// `energies` in model order.
  static void sum_energies(const PreparedGraph& graph, const std::vector<double>& energies,
                           Evaluation& result) {
    auto* of_atom = result.energies.template data<double>();
    auto* of_system = result.energy.template data<double>();
    for (size_t i = 0; i < static_cast<size_t>(graph.n_local); ++i) {
      const auto row = static_cast<size_t>(graph.model_row[i]);
      of_atom[i] = energies[row];
      of_system[graph.system[row]] += energies[row];
    }
  }

  const Architecture& model_;
  ThreadPool& threads_;
  Experts<T> experts_;
  LinearMap<T> edge_map_, angle_map_;
  std::unique_ptr<Readout> readout_;
  TypeTables tables_;
  Matrix<T> node_rows_;  // (K n_types, n_dim) initial node features
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
