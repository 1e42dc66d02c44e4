// Message map (SPEC.md, section 6, steps 6 and 8): update of a centre's edges from their angle messages,
//   e_out += R_1 A_message_map(m_ij).
// Far edges have no message, where the map gives a constant, or their own feature (keep_far).
#pragma once

#include <algorithm>

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/edges.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// A chunk of edges that are all close or all far.
template <class Real>
struct MessageChunk {
  int64_t begin;  // among the centre's edges
  int64_t rows;
  const Real* messages;  // rows x e_padded
};

/// Edges of a centre whose message map is computed: those with a message.
template <class Real>
inline int64_t edges_with_message(const LayerArgs<Real>& layer, const CentreEdges<Real>& edges) {
  return layer.shape->keep_far ? edges.n_edge : layer.graph->n_close[edges.centre];
}

template <class Real>
inline MessageChunk<Real> message_chunk(const LayerArgs<Real>& layer, const CentreEdges<Real>& edges,
                                        int64_t begin) {
  const int64_t n_close = layer.graph->n_close[edges.centre];
  const int64_t stop = begin < n_close ? n_close : edges_with_message(layer, edges);
  const Real* messages = begin < n_close ? layer.angle_message : layer.edge;
  return {begin, std::min(kEdgeChunk, stop - begin),
          messages + (edges.first_edge + begin) * layer.shape->e_padded};
}

/// Pre-activations (rows x experts x e_padded) of a chunk.
template <class Real>
inline void message_map_pre_activations(const LayerArgs<Real>& layer, const GroupWeights<Real>& weights,
                                        const MessageChunk<Real>& chunk, Real* pre) {
  const LayerShape& shape = *layer.shape;
  const int64_t columns = shape.experts_message_map * shape.e_padded;
  for (int64_t row = 0; row < chunk.rows; ++row) {
    copy_row(pre + row * columns, weights.message_map_bias, columns);
  }
  add_product(chunk.rows, columns, shape.e, chunk.messages, shape.e_padded, weights.message_map, columns, pre,
              columns);
}

/// e_out += R_1 mix of the message map, for all edges of a centre.
template <class Real>
void update_edges_from_messages(const LayerArgs<Real>& layer, int64_t centre, Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const CentreEdges<Real> edges(layer, centre);
  const GroupWeights<Real>& weights = edges.weights;
  const int64_t width = shape.e_padded;
  const int64_t columns = shape.experts_message_map * width;
  const int64_t n_computed = edges_with_message(layer, edges);
  const Real* update = layer.update.edge + width;
  Real* out = layer.edge_out + edges.first_edge * width;
  Real* pre = scratch.message_map_pre_activation().get(kEdgeChunk * columns);
  for (int64_t begin = 0; begin < n_computed;) {
    const MessageChunk<Real> chunk = message_chunk(layer, edges, begin);
    message_map_pre_activations(layer, weights, chunk, pre);
    activate(shape.activation, pre, chunk.rows * columns);
    for (int64_t row = 0; row < chunk.rows; ++row) {
      Real* to = out + (begin + row) * width;
      for (int64_t column = 0; column < width; column += kLanes<Real>) {
        const Vec<Real> mixed =
            mix(pre + row * columns, weights.routing_message_map, shape.experts_message_map, width, column);
        store(to + column, load(to + column) + load(update + column) * mixed);
      }
    }
    begin += chunk.rows;
  }
  for (int64_t row = n_computed; row < edges.n_edge; ++row) {
    Real* to = out + row * width;
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      store(to + column, load(to + column) + load(update + column) * load(weights.message_map_far + column));
    }
  }
}

/// dz_k = slope_k p_k R_1 d e_out, in place of the slopes times p_k.
template <class Real>
inline void message_map_mix_backward(const LayerShape& shape, int64_t rows, const Real* update,
                                     const Real* d_edge_out, Real* d_pre) {
  const int64_t width = shape.e_padded;
  const int64_t columns = shape.experts_message_map * width;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      const Vec<Real> d_mix = load(update + column) * load(d_edge_out + row * width + column);
      for (int64_t expert = 0; expert < shape.experts_message_map; ++expert) {
        Real* at = d_pre + row * columns + expert * width + column;
        store(at, load(at) * d_mix);
      }
    }
  }
}

/// Slopes times routing weights; `pre` becomes the outputs.
template <class Real>
inline void message_map_slopes(const LayerShape& shape, const GroupWeights<Real>& weights, int64_t rows,
                               Real* pre, Real* slope) {
  const int64_t width = shape.e_padded;
  const int64_t columns = shape.experts_message_map * width;
  activate_with_slope(shape.activation, pre, slope, rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t expert = 0; expert < shape.experts_message_map; ++expert) {
      Real* at = slope + row * columns + expert * width;
      const Real routing = weights.routing_message_map[expert];
      for (int64_t column = 0; column < width; column += kLanes<Real>) {
        store(at + column, load(at + column) * routing);
      }
    }
  }
}

/// d m_ij = dz W^T of the edges with a message: `d_message` (edges of the centre x e_padded).
template <class Real, class Sink>
void messages_backward(const LayerArgs<Real>& layer, int64_t centre, const Real* d_edge_out, Real* d_message,
                       Scratch<Real>& scratch, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const CentreEdges<Real> edges(layer, centre);
  const GroupWeights<Real>& weights = edges.weights;
  const int64_t width = shape.e_padded;
  const int64_t columns = shape.experts_message_map * width;
  const int64_t n_computed = edges_with_message(layer, edges);
  Real* pre = scratch.message_map_pre_activation().get(kEdgeChunk * columns);
  Real* d_pre = scratch.d_message_map_pre_activation().get(kEdgeChunk * columns);
  for (int64_t begin = 0; begin < n_computed;) {
    const MessageChunk<Real> chunk = message_chunk(layer, edges, begin);
    const Real* d_out = d_edge_out + begin * width;
    message_map_pre_activations(layer, weights, chunk, pre);
    message_map_slopes(shape, weights, chunk.rows, pre, d_pre);
    gradients.message_map_outputs(chunk.rows, pre, d_out);
    message_map_mix_backward(shape, chunk.rows, layer.update.edge + width, d_out, d_pre);
    product(chunk.rows, width, columns, d_pre, columns, weights.message_map_transposed, width,
            d_message + begin * width, width);
    gradients.message_map_weights(chunk.rows, chunk.messages, d_pre);
    begin += chunk.rows;
  }
  gradients.message_map_far(edges.n_edge - n_computed, d_edge_out + n_computed * width);
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
