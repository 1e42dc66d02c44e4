// The weights of a routing group by name: the one list of them, for setting, transposing and differentiating.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/common/layer.h"

namespace moecalc {

/// One of the weights of a group: a matrix, a bias or a vector of routing weights.
template <class Real>
struct WeightEntry {
  using Weights = kernels::GroupWeights<Real>;
  using Gradients = kernels::GroupGradients<Real>;

  const char* name;
  int64_t rows;  // 0 rows or columns where the layer has no such map
  int64_t columns;
  const Real* Weights::* weights;     // where it is
  const Real* Weights::* transposed;  // of a matrix; else null
  Real* Gradients::* gradients;       // null: of routing weights, whose gradient follows from `outputs`
  Real* Gradients::* outputs;         // of routing weights: (columns, width), see GroupGradients
  int64_t width;

  int64_t size() const { return rows * columns; }
};

template <class Real>
WeightEntry<Real> matrix_entry(const char* name, int64_t rows, int64_t columns,
                               const Real* kernels::GroupWeights<Real>::* weights,
                               const Real* kernels::GroupWeights<Real>::* transposed,
                               Real* kernels::GroupGradients<Real>::* gradients) {
  return {name, rows, columns, weights, transposed, gradients, nullptr, 0};
}

template <class Real>
WeightEntry<Real> bias_entry(const char* name, int64_t columns,
                             const Real* kernels::GroupWeights<Real>::* weights,
                             Real* kernels::GroupGradients<Real>::* gradients) {
  return {name, 1, columns, weights, nullptr, gradients, nullptr, 0};
}

template <class Real>
WeightEntry<Real> routing_entry(const char* name, int64_t n_expert,
                                const Real* kernels::GroupWeights<Real>::* weights,
                                Real* kernels::GroupGradients<Real>::* outputs, int64_t width) {
  return {name, 1, n_expert, weights, nullptr, nullptr, outputs, width};
}

constexpr size_t n_weight_entries = 22;

/// All weights of a group in a layer of this shape, unpadded. Their order is that of the training in Python
/// (GROUP_TENSORS of moecalc/training/packing.py), and so are their names.
template <class Real>
std::array<WeightEntry<Real>, n_weight_entries> weight_entries(const kernels::LayerShape& shape) {
  using Weights = kernels::GroupWeights<Real>;
  using Gradients = kernels::GroupGradients<Real>;
  const int64_t n = shape.n;
  const int64_t e = shape.e;
  const int64_t a = shape.a;
  const int64_t edge_columns = shape.edge_columns();
  const int64_t angle_columns = shape.angle_columns();
  const int64_t experts_edge = shape.live_edge ? shape.experts_edge : 0;
  const int64_t experts_angle_message = shape.with_angles ? shape.experts_angle_message : 0;
  const int64_t experts_message_map = shape.with_angles ? shape.experts_message_map : 0;
  const int64_t experts_angle = shape.live_angle ? shape.experts_angle : 0;
  return {
      matrix_entry<Real>("node", n, shape.experts_node * n, &Weights::node, &Weights::node_transposed,
                         &Gradients::node),
      bias_entry<Real>("node_b", shape.experts_node * n, &Weights::node_bias, &Gradients::node_bias),
      routing_entry<Real>("p_node", shape.experts_node, &Weights::routing_node, &Gradients::output_node, n),
      matrix_entry<Real>("sym", shape.sym_inputs(), shape.experts_sym * n, &Weights::sym,
                         &Weights::sym_transposed, &Gradients::sym),
      bias_entry<Real>("sym_b", shape.experts_sym * n, &Weights::sym_bias, &Gradients::sym_bias),
      routing_entry<Real>("p_sym", shape.experts_sym, &Weights::routing_sym, &Gradients::output_sym, n),
      matrix_entry<Real>("edge_c", n, edge_columns, &Weights::edge_centre, &Weights::edge_centre_transposed,
                         &Gradients::edge_centre),
      bias_entry<Real>("edge_b", edge_columns, &Weights::edge_bias, &Gradients::edge_bias),
      matrix_entry<Real>("edge_n", n, edge_columns, &Weights::edge_neighbor,
                         &Weights::edge_neighbor_transposed, &Gradients::edge_neighbor),
      matrix_entry<Real>("edge_e", e, edge_columns, &Weights::edge_edge, &Weights::edge_edge_transposed,
                         &Gradients::edge_edge),
      routing_entry<Real>("p_message", shape.experts_message, &Weights::routing_message,
                          &Gradients::output_message, shape.heads * n),
      routing_entry<Real>("p_edge", experts_edge, &Weights::routing_edge, &Gradients::output_edge, e),
      matrix_entry<Real>("angle_c", n, angle_columns, &Weights::angle_centre,
                         &Weights::angle_centre_transposed, &Gradients::angle_centre),
      bias_entry<Real>("angle_b", angle_columns, &Weights::angle_bias, &Gradients::angle_bias),
      matrix_entry<Real>("angle_j", e, angle_columns, &Weights::angle_first, &Weights::angle_first_transposed,
                         &Gradients::angle_first),
      matrix_entry<Real>("angle_k", e, angle_columns, &Weights::angle_second,
                         &Weights::angle_second_transposed, &Gradients::angle_second),
      matrix_entry<Real>("angle_a", a, angle_columns, &Weights::angle_angle, &Weights::angle_angle_transposed,
                         &Gradients::angle_angle),
      routing_entry<Real>("p_angle1", experts_angle_message, &Weights::routing_angle_message,
                          &Gradients::output_angle_message, e),
      routing_entry<Real>("p_angle", experts_angle, &Weights::routing_angle, &Gradients::output_angle, a),
      matrix_entry<Real>("angle2", e, experts_message_map * e, &Weights::message_map,
                         &Weights::message_map_transposed, &Gradients::message_map),
      bias_entry<Real>("angle2_b", experts_message_map * e, &Weights::message_map_bias,
                       &Gradients::message_map_bias),
      routing_entry<Real>("p_angle2", experts_message_map, &Weights::routing_message_map,
                          &Gradients::output_message_map, e),
  };
}

}  // namespace moecalc
