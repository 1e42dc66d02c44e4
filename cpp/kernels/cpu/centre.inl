// All that one centre does in a layer, forward and backward.
#pragma once

#include <algorithm>
#include <chrono>

#include "kernels/common/layer.h"
#include "kernels/cpu/angles.inl"
#include "kernels/cpu/edges.inl"
#include "kernels/cpu/message_map.inl"
#include "kernels/cpu/moments.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// Adds the time since the last call to a part.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds) {}
  void operator()(Part part) {
    const auto now = std::chrono::steady_clock::now();
    seconds_[static_cast<int>(part)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

template <class Real>
void centre(const LayerArgs<Real>& layer, int64_t centre, Scratch<Real>& scratch) {
  Stopwatch lap(scratch.seconds);
  if (layer.shape->with_angles) centre_angles(layer, centre, scratch);
  lap(Part::angles);
  centre_edges(layer, centre, scratch);
  if (layer.shape->with_angles) update_edges_from_messages(layer, centre, scratch);
  lap(Part::edges);
  centre_moments(layer, centre);
  lap(Part::symmetrisation);
}

/// d_edge holds the gradients of the outputs: a copy of them, while d_edge becomes the share of the layer's
/// input, d e = keep d e_out.
template <class Real>
inline const Real* edges_input_backward(const LayerArgs<Real>& layer, int64_t first_edge, int64_t n_edge,
                                        Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const int64_t count = n_edge * shape.e_padded;
  Real* d_edge_out = scratch.d_edge_out.get(std::max<int64_t>(n_edge, 1) * shape.e_padded);
  Real* d_edge = layer.d_edge + first_edge * shape.e_padded;
  if (layer.d_edge_given) {
    const Real keep = shape.live_edge ? Real(shape.keep_edge) : Real(1);
    for (int64_t at = 0; at < count; at += kLanes<Real>) {
      const Vec<Real> gradient = load(d_edge + at);
      store(d_edge_out + at, gradient);
      store(d_edge + at, keep * gradient);
    }
  } else {
    fill(d_edge_out, Real(0), count);
    fill(d_edge, Real(0), count);
  }
  return d_edge_out;
}

template <class Real, class Sink>
void centre_backward(const LayerArgs<Real>& layer, int64_t centre, Scratch<Real>& scratch,
                     const Sink& gradients) {
  Stopwatch lap(scratch.seconds);
  const LayerShape& shape = *layer.shape;
  const GraphView& graph = *layer.graph;
  const int64_t first_edge = graph.first_edge[centre];
  const int64_t n_edge = graph.first_edge[centre + 1] - first_edge;
  const Real* d_edge_out = edges_input_backward(layer, first_edge, n_edge, scratch);
  if (shape.with_angles) {
    Real* d_message = scratch.d_angle_message().get(std::max<int64_t>(n_edge, 1) * shape.e_padded);
    messages_backward(layer, centre, d_edge_out, d_message, scratch, gradients);
    // far edges whose message is their own feature
    for (int64_t row = graph.n_close[centre]; shape.keep_far && row < n_edge; ++row) {
      add_row(layer.d_edge + (first_edge + row) * shape.e_padded, d_message + row * shape.e_padded,
              shape.e_padded);
    }
    angles_backward(layer, centre, d_message, scratch, gradients);
  }
  lap(Part::angles_backward);
  edges_backward(layer, centre, d_edge_out, scratch, gradients);
  lap(Part::edges_backward);
  moments_backward(layer, centre);
  lap(Part::symmetrisation_backward);
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
