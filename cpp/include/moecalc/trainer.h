// Energies, and their gradients with respect to edge vectors and weights, by the fused CPU kernels. For
// training: the weights come from outside at every step, packed as the kernels want them
// (moecalc/training/packing.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"

namespace moecalc {

/// What a training step sets instead of the package's weights, or the gradients with respect to it:
/// contiguous, in the dtype of the network.
struct MOECALC_API TrainingWeights {
  /// Of a routing group: every matrix (rows, active experts side by side), bias and vector of routing
  /// weights; zero elements where the layer has no such map.
  static constexpr const char* kGroupTensors[] = {
      "node",    "node_b",   "p_node",    "sym",    "sym_b",    "p_sym",   "edge_c",  "edge_b",
      "edge_n",  "edge_e",   "p_message", "p_edge", "angle_c",  "angle_b", "angle_j", "angle_k",
      "angle_a", "p_angle1", "p_angle",   "angle2", "angle2_b", "p_angle2"};
  static constexpr size_t kGroupSize = 22;
  struct Layer {
    at::Tensor update_n, update_e, update_a;      // (2 + heads, n), (2, e), (1, a)
    std::vector<std::vector<at::Tensor>> groups;  // empty for a group without atoms
  };
  at::Tensor edge_matrix, edge_bias, direction,
      node_table;  // (e), (e), (a), (n_types, n): phi of the type table
  std::vector<Layer> layers;
};

/// Node features after the last layer, as a function of edge vectors and weights. One graph at a time.
class MOECALC_API Trainer {
 public:
  /// `path`: a package, from which the architecture is read. Throws Error where the fused kernels do not
  /// cover it.
  Trainer(const std::string& path, const std::string& dtype);
  ~Trainer();

  /// Sorts the graph; the rows that follow are in its order. Returns, for every row, the engine's atom.
  at::Tensor set_graph(const AtomicGraph& graph);
  /// Edges in that order: types (n), edge_index (2, E), edge_vec (E, 3).
  std::vector<at::Tensor> graph() const;
  void set_edge_vec(const at::Tensor& edge_vec);
  void set_weights(const TrainingWeights& weights);

  /// (n, n_dim) node features; `keep_for_weights`: so that backward_to_weights can follow instead of
  /// backward.
  at::Tensor forward(bool keep_for_weights);
  /// d(sum(dv * v)) / d(edge_vec), (E, 3) float64.
  at::Tensor backward(const at::Tensor& dv);
  TrainingWeights backward_to_weights(const at::Tensor& dv);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moecalc
