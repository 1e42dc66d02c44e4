// The fused kernels of the CPU as a backend.
#include <memory>
#include <string>

#include "backends/backend.h"
#include "backends/cpu/fused_layers.h"
#include "backends/cpu/readout.h"
#include "backends/laps.h"

namespace moecalc {
namespace {

template <class Real>
class FusedBackend final : public Backend {
 public:
  explicit FusedBackend(const BackendInputs& inputs)
      : model_(inputs.package.architecture),
        kernels_(kernels::select_kernels<Real>(inputs.options.instruction_set.c_str())),
        packed_(model_, kernels_, inputs.options.weight_bytes),
        layers_(packed_.weights(), model_.geometry, kernels_, inputs.threads, inputs.options.keep_bytes),
        readout_(make_readout(model_.readout, inputs.options.instruction_set, inputs.threads)) {}

  void set_tables(const TypeTables& tables) override {
    tables_ = tables;
    packed_.set_tables(tables);
    layers_.set_statistics(tables.mean, tables.stddev);
    readout_->set_tables(tables);
  }

  void set_list(const NeighborList& list) override { builder_.set_list(list, tables_.rules); }

  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange) override;

  std::string name() const override { return std::string("fused ") + kernels_.name; }
  int64_t bytes() const override { return packed_.packed_bytes() + layers_.bytes(); }
  int64_t n_packed_groups() const override { return packed_.n_packed_groups(); }
  int64_t weight_bytes() const override { return packed_.packed_bytes(); }
  void release_weights() override { packed_.release_groups(); }

 private:
  const Architecture& model_;
  const kernels::Kernels<Real>& kernels_;
  PackedWeights<Real> packed_;
  FusedLayers<Real> layers_;
  std::unique_ptr<Readout> readout_;
  TypeTables tables_;
  GraphBuilder builder_;
};

template <class Real>
Evaluation FusedBackend<Real>::evaluate(const Array& positions, const Array& cells, const Request& request,
                                        GhostExchange* exchange) {
  Laps laps;
  const PreparedGraph& graph = builder_.prepare(positions, cells);
  Evaluation result = empty_result(graph, request);
  result.timings.emplace_back("graph", laps.next());

  packed_.set_groups(features_of(graph, model_, tables_, exchange), groups_in_use(graph.node_splits));
  const Array node = layers_.forward(graph, exchange, request.gradients());
  result.timings.emplace_back("forward", laps.next());

  Array d_node;
  Array* gradient_of_node = request.gradients() ? &d_node : nullptr;
  put_energies(graph, readout_->evaluate(node, graph.types, gradient_of_node), result);
  result.timings.emplace_back("readout", laps.next());

  if (request.gradients()) {
    const Array gradient = layers_.backward(graph, d_node, exchange);
    result.timings.emplace_back("backward", laps.next());
    scatter_gradients(graph, gradient.data<double>(), request, result);
  }
  layers_.take_timings(result.timings);
  return result;
}

}  // namespace

std::unique_ptr<Backend> make_fused_backend(const BackendInputs& inputs, std::string& reason) {
  try {
    if (inputs.dtype == Dtype::float32) return std::make_unique<FusedBackend<float>>(inputs);
    return std::make_unique<FusedBackend<double>>(inputs);
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

}  // namespace moecalc
