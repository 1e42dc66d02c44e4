#include "moecalc/trainer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <utility>

#include "fused.h"
#include "graph.h"
#include "moecalc/clean_state.h"

namespace moecalc {

class Trainer::Impl {
 public:
  GraphRules rules;
  PreparedGraph graph;
  std::unique_ptr<FusedModel> model;
};

Trainer::Trainer(const std::string& path, const std::string& dtype) : impl_(std::make_unique<Impl>()) {
  if (dtype != "float32" && dtype != "float64") {
    throw Error("expected `dtype` to be 'float32' or 'float64', got '" + dtype + "'");
  }
  const CleanState clean;
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  const at::NoGradGuard no_grad;
  torch::jit::Module package = torch::jit::load(path);
  GraphRules& rules = impl_->rules;
  rules.n_types = static_cast<int64_t>(package.attr("elements").toList().size());
  rules.cutoff = package.attr("cutoff").toDouble();
  rules.angle_cutoff = package.attr("angle_cutoff").toDouble();
  if (package.attr("routing_level").toStringRef() != "element") {
    throw Error("training needs routing by element, got '" + package.attr("routing_level").toStringRef() +
                "'");
  }
  const at::Tensor mask = package.attr("pair_mask").toTensor().to(at::kByte).contiguous();
  rules.pair_mask.assign(mask.const_data_ptr<uint8_t>(), mask.const_data_ptr<uint8_t>() + mask.numel());
  std::vector<torch::jit::Module> layers;
  for (const auto& layer : package.attr("layers").toModule().named_children()) layers.push_back(layer.value);
  std::string reason;
  impl_->model = make_fused_model(package.attr("geometry").toModule(), package.attr("embedding").toModule(),
                                  layers, dtype == "float32" ? at::kFloat : at::kDouble, reason);
  if (impl_->model == nullptr) throw Error(path + ": no kernels to train this model with (" + reason + ")");
}

Trainer::~Trainer() = default;

at::Tensor Trainer::set_graph(const AtomicGraph& graph) {
  const CleanState clean;
  impl_->graph = prepare_graph(graph, impl_->rules, false);
  return impl_->graph.engine_row;
}

std::vector<at::Tensor> Trainer::graph() const {
  return {impl_->graph.types, impl_->graph.edge_index, impl_->graph.edge_vec};
}

void Trainer::set_edge_vec(const at::Tensor& edge_vec) {
  const CleanState clean;
  if (edge_vec.sizes() != impl_->graph.edge_vec.sizes()) {
    throw Error("expected " + std::to_string(impl_->graph.n_edge) + " x 3 edge vectors, got " +
                std::to_string(edge_vec.numel()) + " numbers");
  }
  impl_->graph.edge_vec = edge_vec.to(at::kDouble).contiguous().clone();
}

void Trainer::set_weights(const TrainingWeights& weights) {
  const CleanState clean;
  impl_->model->set_weights(weights);
}

at::Tensor Trainer::forward(bool keep_for_weights) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  return keep_for_weights ? impl_->model->forward_to_train(impl_->graph)
                          : impl_->model->forward(impl_->graph, {}, {}, true);
}

at::Tensor Trainer::backward(const at::Tensor& dv) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  return impl_->model->backward(impl_->graph, dv, {});
}

TrainingWeights Trainer::backward_to_weights(const at::Tensor& dv) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  return impl_->model->backward_to_train(impl_->graph, dv);
}

}  // namespace moecalc
