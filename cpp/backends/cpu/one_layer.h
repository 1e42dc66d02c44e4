// One layer of the fused kernels alone, for tests of the kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moecalc/array.h"
#include "moecalc/options.h"
#include "moecalc/version.h"

namespace moecalc {

/// The edges of a structure whose atoms are all owned, in model order: atoms by routing group, edges by
/// centre, angle neighbors first. Rows of the layer's inputs are then those of these arrays.
struct LayerGraph {
  Array types;       // (n,) int64
  Array edge_index;  // (2, E) int64
  Array edge_vec;    // (E, 3) float64, Angstrom
};

class MOECALC_API LayerRunner {
 public:
  /// Opens a package that takes no conditions. Throws Error where the fused kernels do not cover it.
  LayerRunner(const std::string& path, const EvaluatorOptions& options);
  ~LayerRunner();

  /// inputs: v (n, n_dim), e (E, e_dim), a (A, a_dim), sw (E,), h (E, 3) and asw (A,) as of
  /// RepFlowLayer.forward in moecalc.nn, float64. Returns v, e and a of the layer, float64, computed in the
  /// dtype of the network; with `gradients` of these three, the gradients with respect to the six inputs.
  std::vector<Array> run(const LayerGraph& graph, int64_t layer, const std::vector<Array>& inputs,
                         const std::vector<Array>& gradients);

  class Model;

 private:
  std::unique_ptr<Model> model_;
};

}  // namespace moecalc
