// Edges of a centre (SPEC.md, section 6, steps 3, 4 and 8): its message and the update of the edges. The
// pre-activation of an edge is z = centre_part_i + neighbor_part_slot + e_ij W_edge. Rows of edges are worked
// on in chunks.
#pragma once

#include <algorithm>

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/passes.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// The edges of a centre.
template <class Real>
struct CentreEdges {
  const GroupWeights<Real>& weights;
  int64_t centre;
  int64_t first_edge;
  int64_t n_edge;

  CentreEdges(const LayerArgs<Real>& layer, int64_t of)
      : weights(layer.weights[layer.graph->group[of]]),
        centre(of),
        first_edge(layer.graph->first_edge[of]),
        n_edge(layer.graph->first_edge[of + 1] - first_edge) {}
};

/// Pre-activations (rows x columns of the pass) of the edges first_edge .. first_edge + rows - 1.
template <class Real>
inline void edge_pre_activations(const LayerArgs<Real>& layer, const GroupWeights<Real>& weights,
                                 const Pass& pass, int64_t centre, int64_t first_edge, int64_t rows,
                                 Real* pre) {
  const LayerShape& shape = *layer.shape;
  const int64_t edge_columns = shape.edge_columns();
  const int64_t stride = pass.columns();
  const auto part = [&](int64_t width, int64_t from, Real* to) {
    if (width == 0) return;
    const Real* centre_part = layer.edge_centre_part + centre * edge_columns + from;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t slot = layer.graph->slot[first_edge + row];
      const Real* neighbor_part = layer.edge_neighbor_part + slot * edge_columns + from;
      Real* to_row = to + row * stride;
      if (layer.distance != nullptr) {
        const Real distance = layer.distance[first_edge + row];
        const Real* of_distance = weights.edge_of_distance + from;
        for (int64_t column = 0; column < width; column += kLanes<Real>) {
          store(to_row + column, (load(centre_part + column) + load(neighbor_part + column)) +
                                     distance * load(of_distance + column));
        }
      } else {
        for (int64_t column = 0; column < width; column += kLanes<Real>) {
          store(to_row + column, load(centre_part + column) + load(neighbor_part + column));
        }
      }
    }
    if (layer.distance != nullptr) return;
    add_product(rows, width, shape.e, layer.edge + first_edge * shape.e_padded, shape.e_padded,
                weights.edge_edge + from, edge_columns, to, stride);
  };
  part(pass.message, pass.message_column, pre);
  part(pass.own, pass.own_column, pre + pass.message);
}

/// Keeps mix_ij (+)= p y_ij of one expert of the message for the backward.
template <class Real>
inline void keep_message_mix(const LayerArgs<Real>& layer, int64_t first_edge, int64_t rows, const Pass& pass,
                             int64_t expert, Real routing, const Real* outputs) {
  const int64_t width = pass.message;
  const int64_t stride = pass.columns();
  for (int64_t row = 0; row < rows; ++row) {
    Real* mixed = layer.edge_mix + (first_edge + row) * width;
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      const Vec<Real> share = routing * load(outputs + row * stride + column);
      store(mixed + column, expert == 0 ? share : load(mixed + column) + share);
    }
  }
}

/// message_i += p sum over rows of switch_ij y_ij, of one expert.
template <class Real>
inline void add_message(const LayerArgs<Real>& layer, int64_t first_edge, int64_t rows, const Pass& pass,
                        Real routing, const Real* outputs, Real* message) {
  const Real* switches = layer.switch_edge + first_edge;
  const int64_t stride = pass.columns();
  for (int64_t column = 0; column < pass.message; column += kLanes<Real>) {
    Vec<Real> total = Vec<Real>{};
    for (int64_t row = 0; row < rows; ++row) {
      total += switches[row] * load(outputs + row * stride + column);
    }
    store(message + column, load(message + column) + routing * total);
  }
}

/// e_out = keep e + R_0 p y of the first expert, then e_out += R_0 p y.
template <class Real>
inline void update_edges(const LayerArgs<Real>& layer, int64_t first_edge, int64_t rows, const Pass& pass,
                         int64_t expert, Real routing, const Real* outputs) {
  const LayerShape& shape = *layer.shape;
  const int64_t width = shape.e_padded;
  const int64_t stride = pass.columns();
  for (int64_t column = 0; column < pass.own; column += kLanes<Real>) {
    const Vec<Real> factor = load(layer.update.edge + column) * routing;
    const Real* own = outputs + pass.message + column;
    const Real* from = layer.edge + first_edge * width + column;
    Real* to = layer.edge_out + first_edge * width + column;
    for (int64_t row = 0; row < rows; ++row) {
      const Vec<Real> before =
          expert == 0 ? Real(shape.keep_edge) * load(from + row * width) : load(to + row * width);
      store(to + row * width, before + factor * load(own + row * stride));
    }
  }
}

/// message_i = (1/Ne) sum_j switch_ij A_message(v_i, v_j, e_ij) and e_out = keep e + R_0 A_edge(the same).
template <class Real>
void centre_edges(const LayerArgs<Real>& layer, int64_t centre, Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const CentreEdges<Real> edges(layer, centre);
  const int64_t width = shape.heads * shape.n_padded;
  Real* pre = scratch.edge_pre_activation().get(kEdgeChunk * (width + shape.e_padded));
  Real* message = layer.message + centre * width;
  fill(message, Real(0), width);
  for (int64_t expert = 0; expert < edge_passes(shape); ++expert) {
    const Pass pass = edge_pass(shape, expert);
    const Real routing = pass.message > 0 ? edges.weights.routing_message[expert] : Real(0);
    const Real own_routing = pass.own > 0 ? edges.weights.routing_edge[expert] : Real(0);
    Real* slope = layer.edge_slope == nullptr ? nullptr
                                              : layer.edge_slope + edges.first_edge * shape.edge_columns() +
                                                    edges.n_edge * pass.columns_before;
    for (int64_t begin = 0; begin < edges.n_edge; begin += kEdgeChunk) {
      const int64_t rows = std::min(kEdgeChunk, edges.n_edge - begin);
      const int64_t first_edge = edges.first_edge + begin;
      edge_pre_activations(layer, edges.weights, pass, centre, first_edge, rows, pre);
      const Real* outputs = pre;
      if (slope == nullptr) {
        activate(shape.activation, pre, rows * pass.columns());
      } else {
        activate_with_slope(shape.activation, pre, slope + begin * pass.columns(), rows * pass.columns());
        keep_message_mix(layer, first_edge, rows, pass, expert, routing, outputs);
      }
      add_message(layer, first_edge, rows, pass, routing, outputs, message);
      update_edges(layer, first_edge, rows, pass, expert, own_routing, outputs);
    }
  }
  const Real norm = Real(1.0 / shape.edge_norm);
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    store(message + column, load(message + column) * norm);
  }
}

// --- backward

/// A chunk of a centre's edges.
template <class Real>
struct EdgeChunk {
  int64_t begin;  // among the centre's edges
  int64_t rows;
  const Real* outputs;  // rows x edge_columns; only where the forward kept no slopes
  Real* d_pre;          // rows x edge_columns: slopes computed again, which become gradients
};

/// Slopes of an expert in a row of the chunk: those that the forward kept, else `computed`. `column`: within
/// the columns of the expert's pass.
template <class Real>
inline const Real* edge_slopes(const LayerArgs<Real>& layer, const CentreEdges<Real>& edges, int64_t expert,
                               int64_t row, const Real* computed, int64_t column) {
  if (layer.edge_slope == nullptr) return computed;
  const Pass pass = edge_pass(*layer.shape, expert);
  const Real* kept = layer.edge_slope + edges.first_edge * layer.shape->edge_columns();
  return kept + edges.n_edge * pass.columns_before + row * pass.columns() + column;
}

/// d switch_ij += d message . mix_ij and dz_k = slope_k p_k switch_ij d message, for one edge. `d_message`:
/// of the sum over edges.
template <class Real>
inline void message_backward(const LayerArgs<Real>& layer, const CentreEdges<Real>& edges,
                             const EdgeChunk<Real>& chunk, int64_t row, const Real* d_message,
                             Real* d_centre_part, LaneSums<Real, double>& d_switches) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = edges.weights;
  const int64_t width = shape.heads * shape.n_padded;
  const int64_t edge = edges.first_edge + chunk.begin + row;
  const Real switch_edge = layer.switch_edge[edge];
  Real* d_pre = chunk.d_pre + row * shape.edge_columns();
  if (layer.edge_slope != nullptr) {
    d_switches.push(dot_lanes(d_message, layer.edge_mix + edge * width, width));
  } else {
    const Real* outputs = chunk.outputs + row * shape.edge_columns();
    Vec<Real> dot = Vec<Real>{};
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      dot += load(d_message + column) *
             mix(outputs, weights.routing_message, shape.experts_message, width, column);
    }
    d_switches.push(dot);
  }
  for (int64_t expert = 0; expert < shape.experts_message; ++expert) {
    Real* to = d_pre + expert * width;
    Real* total = d_centre_part + expert * width;
    const Real* slope = edge_slopes(layer, edges, expert, chunk.begin + row, to, 0);
    const Real factor = weights.routing_message[expert] * switch_edge;
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      const Vec<Real> value = load(slope + column) * (factor * load(d_message + column));
      store(to + column, value);
      store(total + column, load(total + column) + value);
    }
  }
}

/// dz_k = slope_k p_k R_0 d e_out of the edge map, for one edge.
template <class Real>
inline void edge_map_backward(const LayerArgs<Real>& layer, const CentreEdges<Real>& edges,
                              const EdgeChunk<Real>& chunk, int64_t row, const Real* d_edge_out,
                              Real* d_centre_part) {
  const LayerShape& shape = *layer.shape;
  if (!shape.live_edge) return;
  const int64_t width = shape.e_padded;
  const Real* d_out = d_edge_out + (chunk.begin + row) * width;
  Real* d_pre = chunk.d_pre + row * shape.edge_columns() + shape.message_columns();
  for (int64_t expert = 0; expert < shape.experts_edge; ++expert) {
    Real* to = d_pre + expert * width;
    Real* total = d_centre_part + shape.message_columns() + expert * width;
    const Real* slope =
        edge_slopes(layer, edges, expert, chunk.begin + row, to, edge_pass(shape, expert).message);
    const Real routing = edges.weights.routing_edge[expert];
    for (int64_t column = 0; column < width; column += kLanes<Real>) {
      const Vec<Real> factor = routing * load(layer.update.edge + column);
      const Vec<Real> value = load(slope + column) * (factor * load(d_out + column));
      store(to + column, value);
      store(total + column, load(total + column) + value);
    }
  }
}

/// d e_ij += dz W_edge^T; or d distance in the first layer.
template <class Real, class Sink>
inline void edge_part_backward(const LayerArgs<Real>& layer, const GroupWeights<Real>& weights,
                               int64_t first_edge, int64_t rows, const Real* d_pre, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const int64_t columns = shape.edge_columns();
  if (layer.distance != nullptr) {
    LaneSums<Real, double> d_distance(layer.d_distance + first_edge, true);
    for (int64_t row = 0; row < rows; ++row) {
      d_distance.push(dot_lanes(d_pre + row * columns, weights.edge_of_distance, columns));
    }
    d_distance.end();
    return;
  }
  add_product(rows, shape.e_padded, columns, d_pre, columns, weights.edge_edge_transposed, shape.e_padded,
              layer.d_edge + first_edge * shape.e_padded, shape.e_padded);
  gradients.edge_weights(first_edge, rows, d_pre);
}

/// Backward of `centre_edges`: adds to d_edge and d_switch_edge; leaves d_edge_pre and d_edge_centre_part.
/// All experts at once: the rows of d_edge_pre, which leave the cache, are then written in one go.
template <class Real, class Sink>
void edges_backward(const LayerArgs<Real>& layer, int64_t centre, const Real* d_edge_out,
                    Scratch<Real>& scratch, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const CentreEdges<Real> edges(layer, centre);
  const int64_t columns = shape.edge_columns();
  const int64_t width = shape.heads * shape.n_padded;
  Real* pre = scratch.edge_pre_activation().get(kEdgeChunk * columns);
  Real* unread =
      layer.d_edge_pre == nullptr ? scratch.d_edge_pre_activation().get(kEdgeChunk * columns) : nullptr;
  Real* d_centre_part = layer.d_edge_centre_part + centre * columns;
  fill(d_centre_part, Real(0), columns);
  Real* d_message = scratch.d_message_row().get(width);
  const Real norm = Real(1.0 / shape.edge_norm);
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    store(d_message + column, norm * load(layer.d_message + centre * width + column));
  }
  LaneSums<Real, double> d_switches(layer.d_switch_edge + edges.first_edge, layer.d_geometry_given);
  for (int64_t begin = 0; begin < edges.n_edge; begin += kEdgeChunk) {
    const int64_t first_edge = edges.first_edge + begin;
    Real* d_pre = layer.d_edge_pre == nullptr
                      ? unread
                      : layer.d_edge_pre + (first_edge - layer.d_edge_pre_first) * columns;
    const EdgeChunk<Real> chunk{
        .begin = begin, .rows = std::min(kEdgeChunk, edges.n_edge - begin), .outputs = pre, .d_pre = d_pre};
    if (layer.edge_slope == nullptr) {
      edge_pre_activations(layer, edges.weights, {.message = columns}, centre, first_edge, chunk.rows, pre);
      activate_with_slope(shape.activation, pre, d_pre, chunk.rows * columns);
    }
    gradients.edge_outputs(chunk.rows, chunk.outputs, layer.switch_edge + first_edge, d_message,
                           d_edge_out + begin * shape.e_padded);
    for (int64_t row = 0; row < chunk.rows; ++row) {
      message_backward(layer, edges, chunk, row, d_message, d_centre_part, d_switches);
      edge_map_backward(layer, edges, chunk, row, d_edge_out, d_centre_part);
    }
    edge_part_backward(layer, edges.weights, first_edge, chunk.rows, d_pre, gradients);
  }
  d_switches.end();
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
