// Widths of a layer as its kernels read them, and the shared memory that they ask for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/common/layer.h"
#include "kernels/cuda/layer.cuh"

namespace moecalc::cuda {

/// A layer without graph, weights and buffers.
template <class Real>
LayerView<Real> layer_widths(const kernels::LayerShape& shape) {
  LayerView<Real> layer;
  const auto narrow = [](int64_t width) { return static_cast<int>(width); };
  layer.n_padded = narrow(shape.n_padded);
  layer.e_padded = narrow(shape.e_padded);
  layer.a_padded = narrow(shape.a_padded);
  layer.heads = narrow(shape.heads);
  layer.axis = narrow(shape.axis);
  layer.experts_node = narrow(shape.experts_node);
  layer.experts_sym = narrow(shape.experts_sym);
  layer.experts_message = narrow(shape.experts_message);
  layer.experts_edge = shape.live_edge ? narrow(shape.experts_edge) : 0;
  layer.experts_angle_message = shape.with_angles ? narrow(shape.experts_angle_message) : 0;
  layer.experts_message_map = shape.with_angles ? narrow(shape.experts_message_map) : 0;
  layer.experts_angle = shape.live_angle ? narrow(shape.experts_angle) : 0;
  layer.message_width = narrow(shape.heads * shape.n_padded);
  layer.message_columns = narrow(shape.message_columns());
  layer.edge_columns = narrow(shape.edge_columns());
  layer.angle_message_columns = narrow(shape.angle_message_columns());
  layer.angle_columns = narrow(shape.angle_columns());
  layer.sym_width = narrow(shape.sym_width());
  layer.sym_inputs = narrow(shape.sym_inputs());
  layer.live_edge = shape.live_edge;
  layer.live_angle = shape.live_angle;
  layer.with_angles = shape.with_angles;
  layer.keep_far = shape.keep_far;
  layer.edge_scale = Real(1.0 / shape.edge_norm);
  layer.angle_scale = Real(1.0 / std::sqrt(shape.angle_norm));
  layer.keep_node = Real(shape.keep_node);
  layer.keep_edge = Real(shape.keep_edge);
  layer.keep_angle = Real(shape.keep_angle);
  layer.activation = ActivationFunction<Real>(shape.activation);
  return layer;
}

/// Bytes of the block that has most, of all kernels of a layer.
template <class Format>
int64_t most_shared_bytes(const LayerView<typename Format::Real>& layer) {
  EdgeBackward<Format> edges;
  edges.layer = layer;
  AngleBackward<Format, false> angles;
  angles.layer = layer;
  AngleBackward<Format, true> first_angles;
  first_angles.layer = layer;
  InvariantsBackward<typename Format::Real> invariants;
  invariants.layer = layer;
  return std::max(
      {edges.shared_bytes(), angles.shared_bytes(), first_angles.shared_bytes(), invariants.shared_bytes()});
}

}  // namespace moecalc::cuda
