// Gradients of weights: what the backward kernels do beyond inference. A kernel hands its intermediate values
// to a sink, a template parameter: inference has `NoGradients`, whose calls vanish.
//
// A map  y = sum_k p_k activation(x W_k + b_k)  has the gradients (g: those of y, z: the pre-activations)
//   dW_k += x^T dz_k,   db_k += sum over rows of dz_k,   output_k += sum over rows of activation(z_k) g.
#pragma once

#include <cmath>

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/moments.inl"
#include "kernels/cpu/node_parts.inl"
#include "kernels/cpu/passes.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// Rows x Vectors of C += A^T B, A (inner x rows), B (inner x columns).
template <class Real, int Rows, int Vectors>
inline void outer_tile(int64_t inner, const Real* left, int64_t left_stride, const Real* right,
                       int64_t right_stride, Real* result, int64_t result_stride) {
  constexpr int64_t lanes = kLanes<Real>;
  Vec<Real> total[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) total[r][v] = load(result + r * result_stride + v * lanes);
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vec<Real> row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) row[v] = load(right + k * right_stride + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<Real> factor = splat(left[k * left_stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) total[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(result + r * result_stride + v * lanes, total[r][v]);
  }
}

/// C (rows x columns) += A^T B over `inner` rows; `rows` padded to a multiple of 4.
template <class Real>
void add_outer(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
               const Real* right, int64_t right_stride, Real* result, int64_t result_stride) {
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t row = 0; row < rows; row += 4) {
    Real* to = result + row * result_stride;
    int64_t column = 0;
    for (; column + 3 * lanes <= columns; column += 3 * lanes) {
      outer_tile<Real, 4, 3>(inner, left + row, left_stride, right + column, right_stride, to + column,
                             result_stride);
    }
    for (; column < columns; column += lanes) {
      outer_tile<Real, 4, 1>(inner, left + row, left_stride, right + column, right_stride, to + column,
                             result_stride);
    }
  }
}

/// result (columns) += sum over rows of `values`.
template <class Real>
void add_rows(int64_t rows, int64_t columns, const Real* values, int64_t stride, Real* result) {
  for (int64_t column = 0; column < columns; column += kLanes<Real>) {
    Vec<Real> total = load(result + column);
    for (int64_t row = 0; row < rows; ++row) total += load(values + row * stride + column);
    store(result + column, total);
  }
}

/// result (columns) += sum over rows of left * right.
template <class Real>
void add_products(int64_t rows, int64_t columns, const Real* left, int64_t left_stride, const Real* right,
                  int64_t right_stride, Real* result) {
  for (int64_t column = 0; column < columns; column += kLanes<Real>) {
    Vec<Real> total = load(result + column);
    for (int64_t row = 0; row < rows; ++row) {
      total += load(left + row * left_stride + column) * load(right + row * right_stride + column);
    }
    store(result + column, total);
  }
}

/// Inference: the functions of `WeightGradients`, doing nothing.
struct NoGradients {
  template <class... Values>
  void slots(const Values&...) const {}
  template <class... Values>
  void centres(const Values&...) const {}
  template <class... Values>
  void message_map_outputs(const Values&...) const {}
  template <class... Values>
  void message_map_weights(const Values&...) const {}
  template <class... Values>
  void message_map_far(const Values&...) const {}
  template <class... Values>
  void angle_outputs(const Values&...) const {}
  template <class... Values>
  void angle_weights(const Values&...) const {}
  template <class... Values>
  void angle_edge_weights(const Values&...) const {}
  template <class... Values>
  void edge_outputs(const Values&...) const {}
  template <class... Values>
  void edge_weights(const Values&...) const {}
  template <class... Values>
  void node_outputs(const Values&...) const {}
  template <class... Values>
  void node_weights(const Values&...) const {}
};

/// Training: adds to the gradients of one group.
template <class Real>
class WeightGradients {
 public:
  WeightGradients(const LayerArgs<Real>& layer, const GroupGradients<Real>* groups, int64_t group)
      : layer_(layer), shape_(*layer.shape), weights_(layer.weights[group]), into_(groups[group]) {}

  /// Neighbor part of message and edge map, slots begin..end.
  void slots(int64_t begin, int64_t end, Scratch<Real>& scratch) const {
    const int64_t columns = shape_.edge_columns();
    const Real* rows = gather_slot_nodes(layer_, begin, end, scratch);
    add_outer(shape_.n, columns, end - begin, rows, shape_.n_padded, layer_.d_neighbor_part + begin * columns,
              columns, into_.edge_neighbor, columns);
  }

  /// Centre parts and biases of the edge and angle maps, centres begin..end.
  void centres(int64_t begin, int64_t end) const {
    const int64_t rows = end - begin;
    const int64_t edge_columns = shape_.edge_columns();
    const int64_t angle_columns = shape_.angle_columns();
    const Real* node = layer_.node + begin * shape_.n_padded;
    const Real* d_edge = layer_.d_edge_centre_part + begin * edge_columns;
    add_outer(shape_.n, edge_columns, rows, node, shape_.n_padded, d_edge, edge_columns, into_.edge_centre,
              edge_columns);
    add_rows(rows, edge_columns, d_edge, edge_columns, into_.edge_bias);
    if (angle_columns == 0) return;
    const Real* d_angle = layer_.d_angle_centre_part + begin * angle_columns;
    add_outer(shape_.n, angle_columns, rows, node, shape_.n_padded, d_angle, angle_columns,
              into_.angle_centre, angle_columns);
    add_rows(rows, angle_columns, d_angle, angle_columns, into_.angle_bias);
  }

  /// Outputs of the message map's experts (rows x columns), with the gradients of these edges.
  void message_map_outputs(int64_t rows, const Real* outputs, const Real* d_edge_out) const {
    const int64_t width = shape_.e_padded;
    const int64_t columns = shape_.experts_message_map * width;
    for (int64_t expert = 0; expert < shape_.experts_message_map; ++expert) {
      add_products(rows, width, outputs + expert * width, columns, d_edge_out, width,
                   into_.output_message_map + expert * width);
    }
  }

  /// Weights of the message map: its inputs, and the gradients of its pre-activations.
  void message_map_weights(int64_t rows, const Real* messages, const Real* d_pre) const {
    const int64_t columns = shape_.experts_message_map * shape_.e_padded;
    add_outer(shape_.e, columns, rows, messages, shape_.e_padded, d_pre, columns, into_.message_map, columns);
    add_rows(rows, columns, d_pre, columns, into_.message_map_bias);
  }

  /// Edges without message, whose message map is a constant.
  void message_map_far(int64_t rows, const Real* d_edge_out) const {
    if (rows > 0) add_rows(rows, shape_.e_padded, d_edge_out, shape_.e_padded, into_.d_message_map_far);
  }

  /// Outputs of one expert of the angle maps for a row of angles: `outputs` (n_close x pass.columns()), the
  /// angles' switches, the gradient of the message of their first edge, and of the angles' own features (null
  /// where it is zero).
  void angle_outputs(const Pass& pass, int64_t expert, int64_t n_close, const Real* outputs,
                     const Real* switches, const Real* d_message, const Real* d_angle_out) const {
    const Real norm = Real(1.0 / std::sqrt(shape_.angle_norm));
    const int64_t columns = pass.columns();
    for (int64_t column = 0; column < pass.message; column += kLanes<Real>) {
      Vec<Real> total = Vec<Real>{};
      for (int64_t second = 0; second < n_close; ++second) {
        total += switches[second] * load(outputs + second * columns + column);
      }
      Real* sums = into_.output_angle_message + expert * shape_.e_padded + column;
      store(sums, load(sums) + (norm * total) * load(d_message + column));
    }
    if (d_angle_out != nullptr && pass.own > 0) {
      add_products(n_close, shape_.a_padded, outputs + pass.message, columns, d_angle_out, shape_.a_padded,
                   into_.output_angle + expert * shape_.a_padded);
    }
  }

  /// Angle part of `width` columns from `column` on, for the angles from `first_angle` on.
  void angle_weights(int64_t first_angle, int64_t n_close, int64_t column, int64_t width, const Real* d_pre,
                     int64_t d_stride) const {
    add_outer(shape_.a, width, n_close, layer_.angle + first_angle * shape_.a_padded, shape_.a_padded, d_pre,
              d_stride, into_.angle_angle + column, shape_.angle_columns());
  }

  /// First and second parts of the angle maps, for the close edges of a centre.
  void angle_edge_weights(int64_t first_edge, int64_t n_close, const Real* d_first_part,
                          const Real* d_second_part) const {
    const Real* edges = layer_.edge + first_edge * shape_.e_padded;
    const int64_t columns = shape_.angle_columns();
    add_outer(shape_.edge_inputs, columns, n_close, edges, shape_.e_padded, d_first_part, columns,
              into_.angle_first, columns);
    add_outer(shape_.edge_inputs, columns, n_close, edges, shape_.e_padded, d_second_part, columns,
              into_.angle_second, columns);
  }

  /// Outputs of message and edge map (rows x edge_columns), the gradient of the centre's message divided by
  /// the normaliser, and those of these edges.
  void edge_outputs(int64_t rows, const Real* outputs, const Real* switches, const Real* d_message,
                    const Real* d_edge_out) const {
    const int64_t columns = shape_.edge_columns();
    const int64_t width = shape_.heads * shape_.n_padded;
    for (int64_t column = 0; column < shape_.message_columns(); column += kLanes<Real>) {
      Vec<Real> total = Vec<Real>{};
      for (int64_t row = 0; row < rows; ++row)
        total += switches[row] * load(outputs + row * columns + column);
      Real* sums = into_.output_message + column;
      store(sums, load(sums) + total * load(d_message + column % width));
    }
    if (!shape_.live_edge) return;
    for (int64_t expert = 0; expert < shape_.experts_edge; ++expert) {
      add_products(rows, shape_.e_padded, outputs + shape_.message_columns() + expert * shape_.e_padded,
                   columns, d_edge_out, shape_.e_padded, into_.output_edge + expert * shape_.e_padded);
    }
  }

  /// Edge part of message and edge map, for edges from `first_edge` on.
  void edge_weights(int64_t first_edge, int64_t rows, const Real* d_pre) const {
    const int64_t columns = shape_.edge_columns();
    add_outer(shape_.e, columns, rows, layer_.edge + first_edge * shape_.e_padded, shape_.e_padded, d_pre,
              columns, into_.edge_edge, columns);
  }

  /// Outputs of node map, sym map and message; leaves the invariants, the inputs of the sym map.
  void node_outputs(int64_t begin, int64_t end, Real* symmetric, Scratch<Real>& scratch) const {
    const int64_t rows = end - begin;
    const int64_t message_width = shape_.heads * shape_.n_padded;
    const Real* d_out = layer_.d_node_out + begin * shape_.n_padded;
    for (int64_t head = 0; head < shape_.heads; ++head) {
      add_products(rows, shape_.n_padded, d_out, shape_.n_padded,
                   layer_.message + begin * message_width + head * shape_.n_padded, message_width,
                   into_.update_node + head * shape_.n_padded);
    }
    for (int64_t row = 0; row < rows; ++row) {
      invariants(shape_, layer_.moments + (begin + row) * 3 * shape_.sym_width(),
                 symmetric + row * shape_.sym_inputs());
    }
    node_map_outputs(rows, shape_.experts_node, shape_.n_padded, layer_.node + begin * shape_.n_padded,
                     weights_.node, weights_.node_bias, d_out, into_.output_node, scratch);
    node_map_outputs(rows, shape_.experts_sym, shape_.sym_inputs(), symmetric, weights_.sym,
                     weights_.sym_bias, d_out, into_.output_sym, scratch);
  }

  /// Weights of node and sym map.
  void node_weights(int64_t begin, int64_t end, const Real* symmetric, const Real* d_node_pre,
                    const Real* d_sym_pre) const {
    const int64_t rows = end - begin;
    const int64_t node_columns = shape_.experts_node * shape_.n_padded;
    const int64_t sym_columns = shape_.experts_sym * shape_.n_padded;
    add_outer(shape_.n, node_columns, rows, layer_.node + begin * shape_.n_padded, shape_.n_padded,
              d_node_pre, node_columns, into_.node, node_columns);
    add_rows(rows, node_columns, d_node_pre, node_columns, into_.node_bias);
    add_outer(shape_.sym_inputs(), sym_columns, rows, symmetric, shape_.sym_inputs(), d_sym_pre, sym_columns,
              into_.sym, sym_columns);
    add_rows(rows, sym_columns, d_sym_pre, sym_columns, into_.sym_bias);
  }

 private:
  /// The forward keeps no outputs of the node maps, only their slopes: they are computed again.
  void node_map_outputs(int64_t rows, int64_t experts, int64_t inputs, const Real* features,
                        const Real* weights, const Real* bias, const Real* d_out, Real* sums,
                        Scratch<Real>& scratch) const {
    const int64_t columns = experts * shape_.n_padded;
    Real* outputs = scratch.node_pre_activation().get(rows * columns);
    for (int64_t row = 0; row < rows; ++row) copy_row(outputs + row * columns, bias, columns);
    add_product(rows, columns, inputs, features, inputs, weights, columns, outputs, columns);
    activate(shape_.activation, outputs, rows * columns);
    for (int64_t expert = 0; expert < experts; ++expert) {
      add_products(rows, shape_.n_padded, outputs + expert * shape_.n_padded, columns, d_out, shape_.n_padded,
                   sums + expert * shape_.n_padded);
    }
  }

  const LayerArgs<Real>& layer_;
  const LayerShape& shape_;
  const GroupWeights<Real>& weights_;
  const GroupGradients<Real>& into_;
};

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
