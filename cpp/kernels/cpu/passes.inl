// The order in which the experts of the edge and angle maps are worked on.
#pragma once

#include <algorithm>

#include "kernels/common/layer.h"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// Active experts are worked on one after another: the working set in the first-level cache is then that of a
/// map without routing. A pass is one expert of the message and one of the features' own map, side by side in
/// a buffer; where either has fewer experts, its width is 0.
struct Pass {
  int64_t message = 0;         // width
  int64_t own = 0;             // width
  int64_t message_column = 0;  // in the weights
  int64_t own_column = 0;      // in the weights
  int64_t columns_before = 0;  // of the passes before it
  int64_t columns() const { return message + own; }
};

inline int64_t edge_passes(const LayerShape& shape) {
  return std::max(shape.experts_message, shape.live_edge ? shape.experts_edge : 0);
}

inline Pass edge_pass(const LayerShape& shape, int64_t expert) {
  const int64_t width = shape.heads * shape.n_padded;
  const int64_t experts_edge = shape.live_edge ? shape.experts_edge : 0;
  const int64_t before =
      std::min(expert, shape.experts_message) * width + std::min(expert, experts_edge) * shape.e_padded;
  return {.message = expert < shape.experts_message ? width : 0,
          .own = expert < experts_edge ? shape.e_padded : 0,
          .message_column = expert * width,
          .own_column = shape.message_columns() + expert * shape.e_padded,
          .columns_before = before};
}

inline int64_t angle_passes(const LayerShape& shape) {
  return std::max(shape.experts_angle_message, shape.live_angle ? shape.experts_angle : 0);
}

inline Pass angle_pass(const LayerShape& shape, int64_t expert) {
  return {.message = expert < shape.experts_angle_message ? shape.e_padded : 0,
          .own = shape.live_angle && expert < shape.experts_angle ? shape.a_padded : 0,
          .message_column = expert * shape.e_padded,
          .own_column = shape.angle_message_columns() + expert * shape.a_padded};
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
