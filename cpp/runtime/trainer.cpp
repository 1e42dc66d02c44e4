#include "moecalc/trainer.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <utility>

#include "fused.h"
#include "graph.h"
#include "moecalc/clean_state.h"
#include "package_check.h"
#include "threads.h"

namespace moecalc {

class Trainer::Impl {
 public:
  GraphRules rules;
  PreparedGraph graph;
  ThreadPool threads;
  std::unique_ptr<FusedModel> model;

  /// Of every call: as many threads as torch would use, whose operators compute the rest of a training step.
  FusedModel& ready() {
    threads.resize(default_threads());
    return *model;
  }
};

Trainer::Trainer(const std::string& path, const std::string& dtype) : impl_(std::make_unique<Impl>()) {
  if (dtype != "float32" && dtype != "float64") {
    throw Error("expected `dtype` to be 'float32' or 'float64', got '" + dtype + "'");
  }
  const CleanState clean;
  const TorchThreads one_thread(1);
  const torch::jit::GraphOptimizerEnabledGuard no_optimizer(false);
  const at::NoGradGuard no_grad;
  const auto file = std::make_shared<const PackageFile>(path);
  auto [package, deferred] = load_module(file);
  for (const at::Tensor& tensor : package.parameters()) deferred.fill(tensor);
  for (const at::Tensor& tensor : package.buffers()) deferred.fill(tensor);
  check_model(package, deferred, file->record("extra/metadata.json"), path);
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
  impl_->model =
      make_fused_model(package.attr("geometry").toModule(), package.attr("embedding").toModule(), layers,
                       dtype == "float32" ? at::kFloat : at::kDouble, impl_->threads, reason);
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
  const TorchThreads one_thread(1);
  impl_->model->set_weights(weights);
}

at::Tensor Trainer::forward(bool keep_for_weights) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  FusedModel& model = impl_->ready();
  const TorchThreads one_thread(1);
  return keep_for_weights ? model.forward_to_train(impl_->graph) : model.forward(impl_->graph, {}, {}, true);
}

at::Tensor Trainer::backward(const at::Tensor& dv) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  FusedModel& model = impl_->ready();
  const TorchThreads one_thread(1);
  return model.backward(impl_->graph, dv, {});
}

TrainingWeights Trainer::backward_to_weights(const at::Tensor& dv) {
  const CleanState clean;
  const at::NoGradGuard no_grad;
  FusedModel& model = impl_->ready();
  const TorchThreads one_thread(1);
  return model.backward_to_train(impl_->graph, dv);
}

}  // namespace moecalc
