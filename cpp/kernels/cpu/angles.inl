// Angles of a centre (SPEC.md, section 6, steps 5 to 8): the angle messages of its close edges, and the
// update of the angles. The pre-activation of the angle of edges (ij, ik) is
//   z = first_part_ij + second_part_ik + a_ijk W_angle,   first_part_ij = e_ij W_first + centre_part_i,
//   second_part_ik = e_ik W_second.
// One first edge after another: the rows of its angles are one matrix.
#pragma once

#include <cmath>

#include "kernels/common/layer.h"
#include "kernels/cpu/activation.inl"
#include "kernels/cpu/passes.inl"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// The close edges of a centre and their angles.
template <class Real>
struct CentreAngles {
  const GroupWeights<Real>& weights;
  int64_t centre;
  int64_t first_edge;
  int64_t n_close;
  int64_t first_angle;
  Real norm;                         // 1 / sqrt(angle_norm)
  const Real* first_part = nullptr;  // n_close x angle_columns, as is the one below
  const Real* second_part = nullptr;

  CentreAngles(const LayerArgs<Real>& layer, int64_t of)
      : weights(layer.weights[layer.graph->group[of]]),
        centre(of),
        first_edge(layer.graph->first_edge[of]),
        n_close(layer.graph->n_close[of]),
        first_angle(layer.graph->first_angle[of]),
        norm(Real(1.0 / std::sqrt(layer.shape->angle_norm))) {}

  /// The first angle of a first edge.
  int64_t row(int64_t first) const { return first_angle + first * n_close; }
};

/// First and second parts of the angle maps.
template <class Real>
inline void project_close_edges(const LayerArgs<Real>& layer, CentreAngles<Real>& angles,
                                Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = angles.weights;
  const int64_t columns = shape.angle_columns();
  const int64_t n_close = angles.n_close;
  Real* first_part = scratch.angle_first_part.get(n_close * columns);
  Real* second_part = scratch.angle_second_part.get(n_close * columns);
  angles.first_part = first_part;
  angles.second_part = second_part;
  const Real* centre_part = layer.angle_centre_part + angles.centre * columns;
  if (layer.distance != nullptr) {
    for (int64_t row = 0; row < n_close; ++row) {
      const Real distance = layer.distance[angles.first_edge + row];
      for (int64_t column = 0; column < columns; column += kLanes<Real>) {
        store(first_part + row * columns + column,
              load(centre_part + column) + distance * load(weights.angle_first_of_distance + column));
        store(second_part + row * columns + column,
              distance * load(weights.angle_second_of_distance + column));
      }
    }
    return;
  }
  const Real* edges = layer.edge + angles.first_edge * shape.e_padded;
  for (int64_t row = 0; row < n_close; ++row) copy_row(first_part + row * columns, centre_part, columns);
  add_product(n_close, columns, shape.edge_inputs, edges, shape.e_padded, weights.angle_first, columns,
              first_part, columns);
  product(n_close, columns, shape.edge_inputs, edges, shape.e_padded, weights.angle_second, columns,
          second_part, columns);
}

/// Pre-activations (n_close x columns of the pass) of the angles of a first edge.
template <class Real>
inline void angle_pre_activations(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                  const Pass& pass, int64_t first, Real* pre) {
  const LayerShape& shape = *layer.shape;
  const int64_t angle_columns = shape.angle_columns();
  const int64_t stride = pass.columns();
  const int64_t n_close = angles.n_close;
  const auto part = [&](int64_t width, int64_t from, Real* to) {
    const Real* first_part = angles.first_part + first * angle_columns + from;
    const Real* second_part = angles.second_part + from;
    if (layer.cosine != nullptr) {
      const Real* cosine = layer.cosine + angles.row(first);
      for (int64_t column = 0; column < width; column += kLanes<Real>) {
        const Vec<Real> start = load(first_part + column);
        const Vec<Real> of_cos = load(angles.weights.angle_of_cos + from + column);
        for (int64_t second = 0; second < n_close; ++second) {
          store(to + second * stride + column,
                (start + load(second_part + second * angle_columns + column)) + cosine[second] * of_cos);
        }
      }
    } else if (width > 0) {
      product_onto(n_close, width, shape.a, layer.angle + angles.row(first) * shape.a_padded, shape.a_padded,
                   angles.weights.angle_angle + from, angle_columns, first_part, second_part, angle_columns,
                   to, stride);
    }
  };
  part(pass.message, pass.message_column, pre);
  part(pass.own, pass.own_column, pre + pass.message);
}

/// m_ij (+)= p / sqrt(Na) sum_k switch_ijk y_ijk of one expert, for a first edge ij.
template <class Real>
inline void sum_angle_message(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                              const Pass& pass, int64_t expert, int64_t first, const Real* outputs) {
  if (pass.message == 0) return;
  const Real factor = angles.weights.routing_angle_message[expert] * angles.norm;
  const Real* switches = layer.switch_angle + angles.row(first);
  const int64_t stride = pass.columns();
  const int64_t n_close = angles.n_close;
  Real* message = layer.angle_message + (angles.first_edge + first) * layer.shape->e_padded;
  for (int64_t column = 0; column < pass.message; column += kLanes<Real>) {
    Vec<Real> total = Vec<Real>{};
    for (int64_t second = 0; second < n_close; ++second) {
      total += switches[second] * load(outputs + second * stride + column);
    }
    store(message + column, expert == 0 ? total * factor : load(message + column) + total * factor);
  }
}

/// a_out = keep a + R p y of the first expert, then a_out += R p y, for the angles of a first edge.
template <class Real>
inline void update_angles(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles, const Pass& pass,
                          int64_t expert, int64_t first, const Real* outputs) {
  if (pass.own == 0) return;
  const int64_t width = layer.shape->a_padded;
  const int64_t stride = pass.columns();
  const int64_t n_close = angles.n_close;
  const Real routing = angles.weights.routing_angle[expert];
  const Real keep = Real(layer.shape->keep_angle);
  for (int64_t column = 0; column < pass.own; column += kLanes<Real>) {
    const Vec<Real> factor = load(layer.update.angle + column) * routing;
    const Real* own = outputs + pass.message + column;
    Real* to = layer.angle_out + angles.row(first) * width + column;
    if (expert == 0 && layer.cosine != nullptr) {
      const Real* cosine = layer.cosine + angles.row(first);
      const Vec<Real> direction = keep * load(layer.direction + column);
      for (int64_t second = 0; second < n_close; ++second) {
        store(to + second * width, cosine[second] * direction + factor * load(own + second * stride));
      }
    } else if (expert == 0) {
      const Real* from = layer.angle + angles.row(first) * width + column;
      for (int64_t second = 0; second < n_close; ++second) {
        store(to + second * width, keep * load(from + second * width) + factor * load(own + second * stride));
      }
    } else {
      for (int64_t second = 0; second < n_close; ++second) {
        store(to + second * width, load(to + second * width) + factor * load(own + second * stride));
      }
    }
  }
}

/// Angle messages of the close edges of a centre, and update of its angles.
template <class Real>
void centre_angles(const LayerArgs<Real>& layer, int64_t centre, Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  CentreAngles<Real> angles(layer, centre);
  const int64_t n_close = angles.n_close;
  if (n_close == 0) return;
  Real* pre = scratch.angle_pre_activation().get(n_close * (shape.e_padded + shape.a_padded));
  project_close_edges(layer, angles, scratch);
  for (int64_t expert = 0; expert < angle_passes(shape); ++expert) {
    const Pass pass = angle_pass(shape, expert);
    for (int64_t first = 0; first < n_close; ++first) {
      angle_pre_activations(layer, angles, pass, first, pre);
      activate(shape.activation, pre, n_close * pass.columns());
      const Real* outputs = pre;
      sum_angle_message(layer, angles, pass, expert, first, outputs);
      update_angles(layer, angles, pass, expert, first, outputs);
    }
  }
}

// --- backward

/// Where the gradients of a centre's angle maps go.
template <class Real>
struct AngleGradients {
  const Real* d_angle_out;  // n_close^2 x a_padded, or null where the angle map has none
  Real* d_first_part;       // n_close x angle_columns
  Real* d_second_part;      // likewise, added to
  Real* d_centre_part;      // (angle_columns), added to
};

/// The share of the layer's input in its output: d a = keep d a_out where that is given (the rows are scaled
/// later). Returns d a_out, or null where the angle map has no part in it.
template <class Real>
inline const Real* angles_input_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                         Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const int64_t width = shape.a_padded;
  const int64_t n_angle = angles.n_close * angles.n_close;
  const bool own_gradient = shape.live_angle && layer.d_angle_given;
  Real* d_angle = layer.d_angle + angles.first_angle * width;
  if (layer.cosine != nullptr) return own_gradient ? d_angle : nullptr;
  if (!layer.d_angle_given) fill(d_angle, Real(0), n_angle * width);
  if (!own_gradient) return nullptr;
  if (angle_passes(shape) == 1) return d_angle;
  // d_angle is overwritten as the passes go on, and all of them need the gradient of the output
  Real* copy = scratch.d_angle_out().get(n_angle * width);
  copy_row(copy, d_angle, n_angle * width);
  return copy;
}

/// The same share in the first layer, d cos = keep d a_out . direction, of the angles of a first edge.
template <class Real>
inline void cosines_input_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                   int64_t first) {
  const int64_t width = layer.shape->a_padded;
  const Real keep = Real(layer.shape->keep_angle);
  for (int64_t angle = angles.row(first); angle < angles.row(first + 1); ++angle) {
    layer.d_cosine[angle] =
        layer.d_angle_given
            ? keep * sum<Real>(dot_lanes(layer.d_angle + angle * width, layer.direction, width))
            : Real(0);
  }
}

/// d switch_ijk += p d m_ij . y_ijk, and dz = slope p switch d m_ij (slopes become gradients in place).
template <class Real>
inline void angle_message_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                   const Pass& pass, int64_t expert, int64_t first, const Real* outputs,
                                   const Real* d_message, Real* d_row, Real* d_pre) {
  if (pass.message == 0) return;
  const Real factor = angles.weights.routing_angle_message[expert] * angles.norm;
  const Real* switches = layer.switch_angle + angles.row(first);
  Real* d_switches = layer.d_switch_angle + angles.row(first);
  const int64_t stride = pass.columns();
  for (int64_t column = 0; column < pass.message; column += kLanes<Real>) {
    store(d_row + column, factor * load(d_message + column));
  }
  for (int64_t second = 0; second < angles.n_close; ++second) {
    const Real* output = outputs + second * stride;
    Real* to = d_pre + second * stride;
    Vec<Real> dot = Vec<Real>{};
    for (int64_t column = 0; column < pass.message; column += kLanes<Real>) {
      const Vec<Real> gradient = load(d_row + column);
      dot += gradient * load(output + column);
      store(to + column, load(to + column) * (switches[second] * gradient));
    }
    d_switches[second] += sum<Real>(dot);
  }
}

/// dz = slope R p d a_out of the angle map (slopes become gradients in place).
template <class Real>
inline void angle_map_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                               const Pass& pass, int64_t expert, int64_t first, const Real* d_angle_out,
                               Real* d_pre) {
  if (pass.own == 0) return;
  const int64_t width = layer.shape->a_padded;
  const int64_t stride = pass.columns();
  const int64_t n_close = angles.n_close;
  const Real routing = angles.weights.routing_angle[expert];
  for (int64_t column = 0; column < pass.own; column += kLanes<Real>) {
    const Vec<Real> factor = load(layer.update.angle + column) * routing;
    Real* own = d_pre + pass.message + column;
    if (d_angle_out == nullptr) {
      for (int64_t second = 0; second < n_close; ++second) store(own + second * stride, Vec<Real>{});
      continue;
    }
    const Real* gradient = d_angle_out + first * n_close * width + column;
    for (int64_t second = 0; second < n_close; ++second) {
      store(own + second * stride, load(own + second * stride) * (factor * load(gradient + second * width)));
    }
  }
}

/// d a += dz W_angle^T of a first edge's angles.
template <class Real, class Sink>
inline void angle_products_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                    int64_t first, const Pass& pass, const Real* d_pre,
                                    const Sink& gradients) {
  const int64_t a_padded = layer.shape->a_padded;
  const int64_t stride = pass.columns();
  const auto part = [&](int64_t width, int64_t from, const Real* d_part) {
    if (width == 0) return;
    if (layer.cosine == nullptr) {
      add_product(angles.n_close, a_padded, width, d_part, stride,
                  angles.weights.angle_angle_transposed + from * a_padded, a_padded,
                  layer.d_angle + angles.row(first) * a_padded, a_padded);
    }
    gradients.angle_weights(angles.row(first), angles.n_close, from, width, d_part, stride);
  };
  part(pass.message, pass.message_column, d_pre);
  part(pass.own, pass.own_column, d_pre + pass.message);
}

/// Sums of dz over angles: for the first edge, for every second edge, for the centre. `width` columns of the
/// maps from `from` on.
template <class Real>
inline void angle_columns_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                   const AngleGradients<Real>& into, int64_t first, int64_t width,
                                   int64_t from, const Real* d_pre, int64_t stride) {
  const int64_t angle_columns = layer.shape->angle_columns();
  const int64_t n_close = angles.n_close;
  Real* d_first = into.d_first_part + first * angle_columns + from;
  Real* d_second = into.d_second_part + from;
  Real* d_centre = into.d_centre_part + from;
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    Vec<Real> total = Vec<Real>{};
    for (int64_t second = 0; second < n_close; ++second) {
      const Vec<Real> value = load(d_pre + second * stride + column);
      Real* to = d_second + second * angle_columns + column;
      total += value;
      store(to, load(to) + value);
    }
    store(d_first + column, total);
    store(d_centre + column, load(d_centre + column) + total);
  }
}

/// d cos_ijk += dz . W_cos, in the first layer.
template <class Real>
inline void cosine_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles, const Pass& pass,
                            int64_t first, const Real* d_pre) {
  const Real* of_cos = angles.weights.angle_of_cos + pass.message_column;
  const Real* own_of_cos = angles.weights.angle_of_cos + pass.own_column;
  for (int64_t second = 0; second < angles.n_close; ++second) {
    const Real* row = d_pre + second * pass.columns();
    layer.d_cosine[angles.row(first) + second] +=
        sum<Real>(dot_lanes(row, of_cos, pass.message) + dot_lanes(row + pass.message, own_of_cos, pass.own));
  }
}

/// What the rows of a first edge's angles are worked on with, of one pass.
template <class Real>
struct FirstEdge {
  int64_t first;
  const Real* outputs;    // n_close x columns of the pass
  const Real* d_message;  // e_padded
  const Real* d_own;      // n_close x a_padded: d a_out, or null
  Real* d_pre;            // n_close x columns of the pass: slopes, which become gradients
};

/// Gradients of the pre-activations of a first edge's angles, and what is summed over them; any widths.
template <class Real>
inline void rows_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles, const Pass& pass,
                          int64_t expert, const FirstEdge<Real>& edge, const AngleGradients<Real>& into,
                          Real* d_row) {
  const int64_t first = edge.first;
  const int64_t stride = pass.columns();
  angle_message_backward(layer, angles, pass, expert, first, edge.outputs, edge.d_message, d_row, edge.d_pre);
  angle_map_backward(layer, angles, pass, expert, first, into.d_angle_out, edge.d_pre);
  angle_columns_backward(layer, angles, into, first, pass.message, pass.message_column, edge.d_pre, stride);
  angle_columns_backward(layer, angles, into, first, pass.own, pass.own_column, edge.d_pre + pass.message,
                         stride);
  if (layer.cosine == nullptr) return;
  if (expert == 0) cosines_input_backward(layer, angles, first);
  cosine_backward(layer, angles, pass, first, edge.d_pre);
}

/// The same as `angle_message_backward`, `angle_map_backward`, `angle_columns_backward` without its product,
/// and in the first layer `cosines_input_backward` (of the first pass: `d_direction` is keep times the
/// direction, later null) and `cosine_backward`, in one pass over the rows, which stay in registers:
///   d switch_ijk += p d m_ij . y_ijk,  dz = slope p switch d m_ij,  or dz = slope R p d a_out,
///   d first_part_ij = sum_k dz_ijk,  d second_part_ik += dz_ijk,  d cos = keep d a_out . direction + dz .
///   W_cos.
/// `Message` and `Own` vectors make a row.
template <class Real, int Message, int Own, bool with_cosine>
void narrow_rows_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles, const Pass& pass,
                          int64_t expert, const FirstEdge<Real>& edge, const AngleGradients<Real>& into,
                          LaneSums<Real>& d_switches, LaneSums<Real>& d_cosines) {
  constexpr int64_t lanes = kLanes<Real>;
  constexpr int vectors = Message + Own;
  const int64_t angle_columns = layer.shape->angle_columns();
  const Real* switches = layer.switch_angle + angles.row(edge.first);
  const bool takes_share = with_cosine && expert == 0 && layer.d_angle_given;
  Vec<Real> gradient[Message + 1];
  Vec<Real> own_factor[Own + 1];
  Vec<Real> direction[Own + 1];
  Vec<Real> of_cos[vectors];
  Vec<Real> total[vectors] = {};
  int64_t from[vectors];  // columns in the weights
  for (int v = 0; v < vectors; ++v) {
    from[v] = v < Message ? pass.message_column + v * lanes : pass.own_column + (v - Message) * lanes;
    if constexpr (with_cosine) of_cos[v] = load(angles.weights.angle_of_cos + from[v]);
  }
  for (int v = 0; v < Message; ++v) {
    const Real factor = angles.weights.routing_angle_message[expert] * angles.norm;
    gradient[v] = factor * load(edge.d_message + v * lanes);
  }
  for (int v = 0; v < Own; ++v) {
    own_factor[v] = load(layer.update.angle + v * lanes) * angles.weights.routing_angle[expert];
    direction[v] = Vec<Real>{};
    if (takes_share) direction[v] = Real(layer.shape->keep_angle) * load(layer.direction + v * lanes);
  }
  for (int64_t second = 0; second < angles.n_close; ++second) {
    const Real* output = edge.outputs + second * vectors * lanes;
    Real* d_pre = edge.d_pre + second * vectors * lanes;
    Real* d_second = into.d_second_part + second * angle_columns;
    const Vec<Real> switch_angle = splat(switches[second]);
    Vec<Real> to_switch = Vec<Real>{};
    Vec<Real> to_cosine = Vec<Real>{};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Vec<Real> value = load(d_pre + v * lanes);
      if (v < Message) {
        to_switch += gradient[v] * load(output + v * lanes);
        value *= switch_angle * gradient[v];
      } else {
        const Vec<Real> d_own = load(edge.d_own + (second * Own + v - Message) * lanes);
        value *= own_factor[v - Message] * d_own;
        if constexpr (with_cosine) to_cosine += direction[v - Message] * d_own;
      }
      if constexpr (with_cosine) to_cosine += value * of_cos[v];
      total[v] += value;
      store(d_pre + v * lanes, value);
      store(d_second + from[v], load(d_second + from[v]) + value);
    }
    d_switches.push(to_switch);
    if constexpr (with_cosine) d_cosines.push(to_cosine);
  }
  Real* d_first = into.d_first_part + edge.first * angle_columns;
  for (int v = 0; v < vectors; ++v) {
    store(d_first + from[v], total[v]);
    store(into.d_centre_part + from[v], load(into.d_centre_part + from[v]) + total[v]);
  }
}

template <class Real>
using NarrowRowsBackward = void (*)(const LayerArgs<Real>&, const CentreAngles<Real>&, const Pass&, int64_t,
                                    const FirstEdge<Real>&, const AngleGradients<Real>&, LaneSums<Real>&,
                                    LaneSums<Real>&);

/// `narrow_rows_backward` for the widths of a pass, or null: those are worked on column by column.
template <class Real>
inline NarrowRowsBackward<Real> narrow_form(const LayerArgs<Real>& layer, const Pass& pass, int64_t expert,
                                            const Real* d_angle_out) {
  const bool shares = layer.cosine != nullptr && expert == 0 && layer.d_angle_given;
  if (pass.own > 0 ? d_angle_out == nullptr : shares) return nullptr;
  const int64_t message = pass.message / kLanes<Real>;
  const int64_t own = pass.own / kLanes<Real>;
  const auto form = [&]<int Message, int Own>() -> NarrowRowsBackward<Real> {
    if (message != Message || own != Own) return nullptr;
    return layer.cosine == nullptr ? narrow_rows_backward<Real, Message, Own, false>
                                   : narrow_rows_backward<Real, Message, Own, true>;
  };
  for (const auto found : {form.template operator()<1, 0>(), form.template operator()<1, 1>(),
                           form.template operator()<2, 0>(), form.template operator()<2, 1>(),
                           form.template operator()<4, 0>(), form.template operator()<4, 2>()}) {
    if (found != nullptr) return found;
  }
  return nullptr;
}

/// d e_ij += d first_part_ij W_first^T + d second_part_ij W_second^T; or d distance in the first layer.
template <class Real, class Sink>
inline void close_edges_backward(const LayerArgs<Real>& layer, const CentreAngles<Real>& angles,
                                 const AngleGradients<Real>& into, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = angles.weights;
  const int64_t columns = shape.angle_columns();
  const int64_t n_close = angles.n_close;
  if (layer.distance != nullptr) {
    LaneSums<Real, double> d_distance(layer.d_distance + angles.first_edge, true);
    for (int64_t row = 0; row < n_close; ++row) {
      d_distance.push(
          dot_lanes(into.d_first_part + row * columns, weights.angle_first_of_distance, columns) +
          dot_lanes(into.d_second_part + row * columns, weights.angle_second_of_distance, columns));
    }
    d_distance.end();
    return;
  }
  Real* d_edge = layer.d_edge + angles.first_edge * shape.e_padded;
  add_product(n_close, shape.e_padded, columns, into.d_first_part, columns, weights.angle_first_transposed,
              shape.e_padded, d_edge, shape.e_padded);
  add_product(n_close, shape.e_padded, columns, into.d_second_part, columns, weights.angle_second_transposed,
              shape.e_padded, d_edge, shape.e_padded);
  gradients.angle_edge_weights(angles.first_edge, n_close, into.d_first_part, into.d_second_part);
}

/// Backward of the angle maps of a centre. `d_message`: gradient of the angle messages of its close edges
/// (n_close x e_padded). Adds to d_edge, d_angle, d_switch_angle; the angles are computed again.
template <class Real, class Sink>
void angles_backward(const LayerArgs<Real>& layer, int64_t centre, const Real* d_message,
                     Scratch<Real>& scratch, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const int64_t angle_columns = shape.angle_columns();
  const int64_t width = shape.a_padded;
  CentreAngles<Real> angles(layer, centre);
  const int64_t n_close = angles.n_close;
  Real* d_centre_part = layer.d_angle_centre_part + centre * angle_columns;
  fill(d_centre_part, Real(0), angle_columns);
  if (n_close == 0) return;
  Real* pre = scratch.angle_pre_activation().get(n_close * (shape.e_padded + width));
  Real* d_pre = scratch.d_angle_pre_activation().get(n_close * (shape.e_padded + width));
  Real* d_row = scratch.d_angle_message_row().get(shape.e_padded);
  project_close_edges(layer, angles, scratch);
  const AngleGradients<Real> into{.d_angle_out = angles_input_backward(layer, angles, scratch),
                                  .d_first_part = scratch.d_angle_first_part.get(n_close * angle_columns),
                                  .d_second_part = scratch.d_angle_second_part.get(n_close * angle_columns),
                                  .d_centre_part = d_centre_part};
  fill(into.d_second_part, Real(0), n_close * angle_columns);
  const Real keep = Real(shape.keep_angle);
  const bool scaled = into.d_angle_out != nullptr && keep != Real(1) && layer.cosine == nullptr;
  for (int64_t expert = 0; expert < angle_passes(shape); ++expert) {
    const Pass pass = angle_pass(shape, expert);
    const int64_t stride = pass.columns();
    const NarrowRowsBackward<Real> narrow = narrow_form(layer, pass, expert, into.d_angle_out);
    LaneSums<Real> d_switches(layer.d_switch_angle + angles.first_angle, true);
    LaneSums<Real> d_cosines(layer.d_cosine + angles.first_angle, expert > 0);
    for (int64_t first = 0; first < n_close; ++first) {
      const Real* d_own = into.d_angle_out == nullptr ? nullptr : into.d_angle_out + first * n_close * width;
      const FirstEdge<Real> edge{first, pre, d_message + first * shape.e_padded, d_own, d_pre};
      angle_pre_activations(layer, angles, pass, first, pre);
      activate_with_slope(shape.activation, pre, d_pre, n_close * stride);
      gradients.angle_outputs(pass, expert, n_close, edge.outputs, layer.switch_angle + angles.row(first),
                              edge.d_message, d_own);
      if (narrow != nullptr) {
        narrow(layer, angles, pass, expert, edge, into, d_switches, d_cosines);
      } else {
        rows_backward(layer, angles, pass, expert, edge, into, d_row);
      }
      if (scaled && expert == 0) {
        Real* d_angle = layer.d_angle + angles.row(first) * width;
        for (int64_t column = 0; column < n_close * width; column += kLanes<Real>) {
          store(d_angle + column, keep * load(d_angle + column));
        }
      }
      angle_products_backward(layer, angles, first, pass, d_pre, gradients);
    }
    d_switches.end();
    if (layer.cosine != nullptr) d_cosines.end();
  }
  close_edges_backward(layer, angles, into, gradients);
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
