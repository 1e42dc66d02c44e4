// The model as fused kernels on the CPU: same weights and same answers as the package's TorchScript, no
// autograd.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "conditions.h"
#include "graph.h"
#include "moecalc/trainer.h"
#include "package_reader.h"
#include "threads.h"

namespace moecalc {

/// Inputs, outputs or gradients of one layer (RepFlowLayer.forward of moecalc.nn), unpadded, in model order.
struct LayerTensors {
  at::Tensor v, e, a, sw, h, asw;
};

/// Geometry, embedding and layers of a package. One object per thread of the engine; it keeps its buffers.
class FusedModel {
 public:
  /// (n_local, n_dim) features -> (n_node, n_dim) with those of ghosts; and gradients back.
  using Exchange = std::function<at::Tensor(const at::Tensor&)>;

  virtual ~FusedModel() = default;

  /// Node features after the last layer, (n_local, n_dim). `features` (G, n_dim): router input of every
  /// group. `gradients`: whether backward follows.
  virtual at::Tensor forward(const PreparedGraph& graph, const at::Tensor& features,
                             const Exchange& with_ghosts, bool gradients) = 0;
  /// Gradient of the energy with respect to the edge vectors of the last forward, (n_edge, 3) float64.
  virtual at::Tensor backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                              const Exchange& without_ghosts) = 0;
  /// Tables of the types from now on.
  virtual void set_types(const TypeTables& tables) = 0;
  /// Weights for the evaluations from now on. Throws Error where a shape does not fit.
  virtual void set_weights(const TrainingWeights& weights) = 0;
  /// The same as forward, but keeps what backward_to_train needs.
  virtual at::Tensor forward_to_train(const PreparedGraph& graph) = 0;
  /// Gradients of sum(dv_local * v) with respect to the weights that were set.
  virtual TrainingWeights backward_to_train(const PreparedGraph& graph, const at::Tensor& dv_local) = 0;
  /// One layer alone and its gradients (for tests of the kernels): v, e, a out; then all six.
  virtual LayerTensors one_layer(const PreparedGraph& graph, const at::Tensor& features, int64_t layer,
                                 const LayerTensors& in) = 0;
  virtual LayerTensors one_layer_backward(int64_t layer, const LayerTensors& in,
                                          const LayerTensors& gradients) = 0;
  /// Bytes of the buffers and weights kept between calls.
  virtual int64_t bytes() const = 0;
  /// Routing groups whose weights are laid out: those that have had atoms. And gives them all back.
  virtual int64_t n_packed_groups() const = 0;
  /// Bytes of the weights that are laid out.
  virtual int64_t weight_bytes() const = 0;
  virtual void release_weights() = 0;
  /// Adds seconds of thread time since the last call, by part, and starts anew.
  virtual void take_timings(Timings& timings) = 0;
  virtual const char* instruction_set() const = 0;
};

/// Reads the weights of a package in `dtype` (its modules have it, but for weights in `deferred`). Where the
/// fused kernels do not cover an option, returns null and says which in `reason`. `threads` runs the kernels
/// and must outlive them.
std::unique_ptr<FusedModel> make_fused_model(const torch::jit::Module& geometry,
                                             const torch::jit::Module& embedding,
                                             const std::vector<torch::jit::Module>& layers,
                                             at::ScalarType dtype, ThreadPool& threads, std::string& reason,
                                             const DeferredTensors* deferred = nullptr);

}  // namespace moecalc
