// The weights of a routing group by name: the one list of them, for setting, transposing and differentiating.
#pragma once

#include <array>
#include <cstdint>

#include "ops/layer.h"

namespace moecalc {

/// One of the weights of a group: a matrix, a bias or a vector of routing weights.
template <class T>
struct WeightEntry {
  using Weights = ops::GroupWeights<T>;
  using Gradients = ops::GroupGradients<T>;

  const char* name;
  int64_t rows, columns;           // 0 where the layer has no such map
  const T* Weights::* weights;     // where it is
  const T* Weights::* transposed;  // of a matrix; else null
  T* Gradients::* gradients;       // null: of routing weights, whose gradient follows from `sums`
  T* Gradients::* sums;            // of routing weights: (columns, width), see GroupGradients
  int64_t width;

  int64_t size() const { return rows * columns; }
};

constexpr size_t n_weight_entries = 22;

/// All weights of a group in a layer of this shape, unpadded. Their order is that of the training in Python
/// (GROUP_TENSORS of moecalc/training/packing.py).
template <class T>
std::array<WeightEntry<T>, n_weight_entries> weight_entries(const ops::LayerShape& s) {
  using W = ops::GroupWeights<T>;
  using G = ops::GroupGradients<T>;
  const int64_t edge_columns = s.edge_columns(), angle_columns = s.angle_columns();
  const int64_t k_edge = s.live_edge ? s.k_edge : 0;
  const int64_t k_angle1 = s.with_angles ? s.k_angle1 : 0;
  const int64_t k_angle2 = s.with_angles ? s.k_angle2 : 0;
  const int64_t k_angle = s.live_angle ? s.k_angle : 0;
  const auto matrix = [](const char* name, int64_t rows, int64_t columns, const T* W::* weights,
                         const T* W::* transposed, T* G::* gradients) {
    return WeightEntry<T>{name, rows, columns, weights, transposed, gradients, nullptr, 0};
  };
  const auto bias = [](const char* name, int64_t columns, const T* W::* weights, T* G::* gradients) {
    return WeightEntry<T>{name, 1, columns, weights, nullptr, gradients, nullptr, 0};
  };
  const auto routing = [](const char* name, int64_t k, const T* W::* weights, T* G::* sums, int64_t width) {
    return WeightEntry<T>{name, 1, k, weights, nullptr, nullptr, sums, width};
  };
  return {
      matrix("node", s.n, s.k_node * s.n, &W::node, &W::node_t, &G::node),
      bias("node_b", s.k_node * s.n, &W::node_b, &G::node_b),
      routing("p_node", s.k_node, &W::p_node, &G::y_node, s.n),
      matrix("sym", s.sym_in(), s.k_sym * s.n, &W::sym, &W::sym_t, &G::sym),
      bias("sym_b", s.k_sym * s.n, &W::sym_b, &G::sym_b),
      routing("p_sym", s.k_sym, &W::p_sym, &G::y_sym, s.n),
      matrix("edge_c", s.n, edge_columns, &W::edge_c, &W::edge_c_t, &G::edge_c),
      bias("edge_b", edge_columns, &W::edge_b, &G::edge_b),
      matrix("edge_n", s.n, edge_columns, &W::edge_n, &W::edge_n_t, &G::edge_n),
      matrix("edge_e", s.e, edge_columns, &W::edge_e, &W::edge_e_t, &G::edge_e),
      routing("p_message", s.k_message, &W::p_message, &G::y_message, s.heads * s.n),
      routing("p_edge", k_edge, &W::p_edge, &G::y_edge, s.e),
      matrix("angle_c", s.n, angle_columns, &W::angle_c, &W::angle_c_t, &G::angle_c),
      bias("angle_b", angle_columns, &W::angle_b, &G::angle_b),
      matrix("angle_j", s.e, angle_columns, &W::angle_j, &W::angle_j_t, &G::angle_j),
      matrix("angle_k", s.e, angle_columns, &W::angle_k, &W::angle_k_t, &G::angle_k),
      matrix("angle_a", s.a, angle_columns, &W::angle_a, &W::angle_a_t, &G::angle_a),
      routing("p_angle1", k_angle1, &W::p_angle1, &G::y_angle1, s.e),
      routing("p_angle", k_angle, &W::p_angle, &G::y_angle, s.a),
      matrix("angle2", s.e, k_angle2 * s.e, &W::angle2, &W::angle2_t, &G::angle2),
      bias("angle2_b", k_angle2 * s.e, &W::angle2_b, &G::angle2_b),
      routing("p_angle2", k_angle2, &W::p_angle2, &G::y_angle2, s.e),
  };
}

}  // namespace moecalc
