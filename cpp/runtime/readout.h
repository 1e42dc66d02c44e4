// Energies from node features: the fitting net of a package and the shifts of its elements.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../ops/layer.h"
#include "conditions.h"
#include "threads.h"

namespace moecalc {

/// The readout of a package, on the CPU.
struct ReadoutSource {
  struct Layer {
    at::Tensor matrix, bias, idt;  // float64
    int64_t residual = 0;
    ops::Activation phi;
  };
  std::vector<Layer> layers;
  at::Tensor out_matrix;  // (width,) float64
  /// (K n_types, n_constant) float64: table, case embedding, frame parameters.
  at::Tensor constant;
  double out_bias = 0.0;
  at::Tensor shift, weight;  // (K n_types) float64

  void set_types(const TypeTables& tables);
};

/// Reads it; throws Unsupported. `dtype`: of the fitting net.
ReadoutSource read_readout(const torch::jit::Module& readout, int64_t n_types, at::ScalarType dtype);

/// The dtype that the fitting net of a package computes in, which may be another than that of the layers.
at::ScalarType readout_dtype(const torch::jit::Module& readout);

/// The readout on the CPU. One object per thread of the engine.
class Readout {
 public:
  virtual ~Readout() = default;
  /// `v` (n_local, n_dim) in the dtype of the layers, `types` (n_local,) int64. Returns energies (n_local,)
  /// float64 in eV; if `dv` is given, it becomes the gradient of their sum, as `v`.
  virtual at::Tensor evaluate(const at::Tensor& v, const at::Tensor& types, at::Tensor* dv) = 0;
  /// Tables of the types from now on.
  virtual void set_types(const TypeTables& tables) = 0;
};

/// Where the kernels do not cover an option of the package, returns null and says which in `reason`.
/// `threads` runs them and must outlive the readout.
std::unique_ptr<Readout> make_readout(const torch::jit::Module& readout, int64_t n_types, ThreadPool& threads,
                                      std::string& reason);

}  // namespace moecalc
