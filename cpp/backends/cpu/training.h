// Node features, and their gradients with respect to edge vectors and weights, by the fused CPU kernels. For
// training: the weights come from outside at every step, packed as the kernels want them
// (moecalc/training/packing.py).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "moecalc/array.h"
#include "moecalc/version.h"

namespace moecalc {

using NamedArrays = std::map<std::string, Array, std::less<>>;

/// What a training step sets instead of the package's weights, or the gradients with respect to it, in the
/// dtype of the network.
struct MOECALC_API TrainingWeights {
  struct Layer {
    Array update_node;   // (2 + heads, n)
    Array update_edge;   // (2, e)
    Array update_angle;  // (1, a)
    /// Of every routing group: matrices (rows, active experts side by side), biases and vectors of routing
    /// weights by the names of group_weight_names(), zero elements where the layer has no such map. Empty for
    /// a group without atoms.
    std::vector<NamedArrays> groups;
  };
  Array edge_matrix;  // (e)
  Array edge_bias;    // (e)
  Array direction;    // (a)
  Array node_table;   // (n_types, n): phi of the type table
  std::vector<Layer> layers;
};

/// Names of the weights of a group, in the order in which Python lists them.
MOECALC_API const std::vector<std::string>& group_weight_names();

/// Node features after the last layer, as a function of edge vectors and weights. One graph at a time.
class MOECALC_API Trainer {
 public:
  /// `path`: a package, from which the architecture is read; `dtype`: "float32" or "float64". Throws Error
  /// where the fused kernels do not cover it.
  Trainer(const std::string& path, const std::string& dtype);
  ~Trainer();

  /// Threads of the calls to come; 0: the default (core/threads.h). Sums over atoms depend on their number.
  void set_num_threads(int64_t n_threads);
  int64_t num_threads() const;

  /// types (n,), edge_index (2, E) and system_index (n,) int64, edge_vec (E, 3) float64. Sorts the graph; the
  /// rows that follow are in its order. Returns, for every row, the engine's atom.
  Array set_graph(const Array& types, const Array& edge_index, const Array& edge_vec,
                  const Array& system_index, int64_t n_systems);
  /// In that order: types (n,), edge_index (2, E), edge_vec (E, 3).
  std::vector<Array> graph() const;
  /// (E, 3) float64 in that order, of the same edges and angles.
  void set_edge_vec(const Array& edge_vec);
  void set_weights(const TrainingWeights& weights);

  /// (n, n_dim) node features; `keep_for_weights`: so that backward_to_weights can follow instead of
  /// backward.
  Array forward(bool keep_for_weights);
  /// d(sum(d_node * node)) / d(edge_vec), (E, 3) float64.
  Array backward(const Array& d_node);
  TrainingWeights backward_to_weights(const Array& d_node);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moecalc
