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

#include "graph.h"

namespace moecalc {

/// Geometry, embedding and layers of a package. One object per thread of the engine; it keeps its buffers.
class FusedModel {
 public:
  /// (n_local, n_dim) features -> (n_node, n_dim) with those of ghosts; and gradients back.
  using Exchange = std::function<at::Tensor(const at::Tensor&)>;

  virtual ~FusedModel() = default;

  /// Node features after the last layer, (n_local, n_dim). `features` (G, n_dim): router input of every
  /// group.
  virtual at::Tensor forward(const PreparedGraph& graph, const at::Tensor& features,
                             const Exchange& with_ghosts) = 0;
  /// Gradient of the energy with respect to the edge vectors of the last forward, (n_edge, 3) float64.
  virtual at::Tensor backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                              const Exchange& without_ghosts) = 0;
  virtual int64_t bytes() const = 0;
  virtual const char* instruction_set() const = 0;
};

/// Reads the weights of a package in `dtype` (its modules already have it). Where the fused kernels do not
/// cover an option, returns null and says which in `reason`.
std::unique_ptr<FusedModel> make_fused_model(const torch::jit::Module& geometry,
                                             const torch::jit::Module& embedding,
                                             const std::vector<torch::jit::Module>& layers,
                                             at::ScalarType dtype, std::string& reason);

}  // namespace moecalc
