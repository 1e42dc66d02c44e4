// Update of the nodes (SPEC.md, section 6, steps 1, 2 and 8).
#pragma once

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/moments.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// v_out = keep v + R_0 A_node(v) + R_1 A_sym(S) + sum over heads of R_(2 + head) message, for one row.
template <class Real>
inline void update_node(const LayerArgs<Real>& layer, const GroupWeights<Real>& weights, int64_t node,
                        const Real* node_outputs, const Real* sym_outputs) {
  const LayerShape& shape = *layer.shape;
  const int64_t width = shape.n_padded;
  const Real* before = layer.node + node * width;
  const Real* message = layer.message + node * shape.heads * width;
  const Real* update = layer.update.node;
  Real* out = layer.node_out + node * width;
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    Vec<Real> total = Real(shape.keep_node) * load(before + column);
    total +=
        load(update + column) * mix(node_outputs, weights.routing_node, shape.experts_node, width, column);
    total += load(update + width + column) *
             mix(sym_outputs, weights.routing_sym, shape.experts_sym, width, column);
    for (int64_t head = 0; head < shape.heads; ++head) {
      total += load(update + (2 + head) * width + column) * load(message + head * width + column);
    }
    store(out + column, total);
  }
}

/// Updates of nodes begin..end, of one group; leaves the slopes of both maps.
template <class Real>
void nodes(const LayerArgs<Real>& layer, int64_t begin, int64_t end, Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = layer.weights[layer.graph->group[begin]];
  const int64_t rows = end - begin;
  const int64_t node_columns = shape.experts_node * shape.n_padded;
  const int64_t sym_columns = shape.experts_sym * shape.n_padded;
  const int64_t sym_inputs = shape.sym_inputs();
  Real* node_pre = scratch.node_pre_activation().get(rows * node_columns);
  Real* sym_pre = scratch.sym_pre_activation().get(rows * sym_columns);
  Real* symmetric = scratch.invariants().get(rows * sym_inputs);
  for (int64_t row = 0; row < rows; ++row) {
    copy_row(node_pre + row * node_columns, weights.node_bias, node_columns);
    copy_row(sym_pre + row * sym_columns, weights.sym_bias, sym_columns);
    invariants(shape, layer.moments + (begin + row) * 3 * shape.sym_width(), symmetric + row * sym_inputs);
  }
  add_product(rows, node_columns, shape.n, layer.node + begin * shape.n_padded, shape.n_padded, weights.node,
              node_columns, node_pre, node_columns);
  add_product(rows, sym_columns, sym_inputs, symmetric, sym_inputs, weights.sym, sym_columns, sym_pre,
              sym_columns);
  // one row after another in memory: those of the node map, then those of the sym map
  Real* slope = layer.node_slope + begin * (node_columns + sym_columns);
  activate_with_slope(shape.activation, node_pre, slope, rows * node_columns);
  activate_with_slope(shape.activation, sym_pre, slope + rows * node_columns, rows * sym_columns);
  for (int64_t row = 0; row < rows; ++row) {
    update_node(layer, weights, begin + row, node_pre + row * node_columns, sym_pre + row * sym_columns);
  }
}

/// d v += keep d v_out and d message = R_(2 + head) d v_out, of nodes begin..end.
template <class Real>
inline void update_node_backward(const LayerArgs<Real>& layer, int64_t begin, int64_t end) {
  const LayerShape& shape = *layer.shape;
  const int64_t width = shape.n_padded;
  for (int64_t node = begin; node < end; ++node) {
    const Real* d_out = layer.d_node_out + node * width;
    Real* d_node = layer.d_node + node * width;
    Real* d_message = layer.d_message + node * shape.heads * width;
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      const Vec<Real> gradient = load(d_out + column);
      store(d_node + column, load(d_node + column) + Real(shape.keep_node) * gradient);
      for (int64_t head = 0; head < shape.heads; ++head) {
        store(d_message + head * width + column,
              load(layer.update.node + (2 + head) * width + column) * gradient);
      }
    }
  }
}

/// dz_k = activation'(z_k) p_k R d v_out: slopes (rows x experts x width) become gradients in place.
template <class Real>
inline void slopes_to_gradients(Real* slope, int64_t rows, int64_t experts, int64_t width,
                                const Real* routing, const Real* update, const Real* d_out) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t expert = 0; expert < experts; ++expert) {
      Real* at = slope + (row * experts + expert) * width;
      for (int64_t column = 0; column < width; column += kLanes<Real>) {
        store(at + column, load(at + column) * (routing[expert] * (load(update + column) *
                                                                   load(d_out + row * width + column))));
      }
    }
  }
}

/// Backward of `nodes`: adds to d_node; leaves d_message and d_moments.
template <class Real, class Sink>
void nodes_backward(const LayerArgs<Real>& layer, int64_t begin, int64_t end, Scratch<Real>& scratch,
                    const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = layer.weights[layer.graph->group[begin]];
  const int64_t rows = end - begin;
  const int64_t node_columns = shape.experts_node * shape.n_padded;
  const int64_t sym_columns = shape.experts_sym * shape.n_padded;
  const int64_t sym_inputs = shape.sym_inputs();
  const Real* d_out = layer.d_node_out + begin * shape.n_padded;
  Real* d_node = layer.d_node + begin * shape.n_padded;
  update_node_backward(layer, begin, end);
  Real* symmetric = scratch.invariants().get(rows * sym_inputs);
  gradients.node_outputs(begin, end, symmetric, scratch);
  Real* d_node_pre = layer.node_slope + begin * (node_columns + sym_columns);
  Real* d_sym_pre = d_node_pre + rows * node_columns;
  slopes_to_gradients(d_node_pre, rows, shape.experts_node, shape.n_padded, weights.routing_node,
                      layer.update.node, d_out);
  slopes_to_gradients(d_sym_pre, rows, shape.experts_sym, shape.n_padded, weights.routing_sym,
                      layer.update.node + shape.n_padded, d_out);
  add_product(rows, shape.n_padded, node_columns, d_node_pre, node_columns, weights.node_transposed,
              shape.n_padded, d_node, shape.n_padded);
  gradients.node_weights(begin, end, symmetric, d_node_pre, d_sym_pre);
  Real* d_symmetric = symmetric;
  product(rows, sym_inputs, sym_columns, d_sym_pre, sym_columns, weights.sym_transposed, sym_inputs,
          d_symmetric, sym_inputs);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = (begin + row) * 3 * shape.sym_width();
    invariants_backward(shape, layer.moments + at, d_symmetric + row * sym_inputs, layer.d_moments + at);
  }
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
