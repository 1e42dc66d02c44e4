// What the kernels of one RepFlow layer read and write, and what those kernels have in common.
#pragma once

#include <cstdint>

#include "kernels/common/layer.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/graph.cuh"
#include "kernels/cuda/product.cuh"

namespace moecalc::cuda {

/// A layer on the device: widths, weights and buffers. Names as in kernels::LayerShape and
/// kernels::LayerArgs. Rows are padded as there; every pointer is to memory of the device.
template <class Real>
struct LayerView {
  // --- widths
  int n_padded = 0;
  int e_padded = 0;
  int a_padded = 0;
  int heads = 1;
  int axis = 4;
  // Active experts; 0 for a map that does not reach the energy
  int experts_node = 1;
  int experts_sym = 1;
  int experts_message = 1;
  int experts_edge = 0;
  int experts_angle_message = 0;
  int experts_message_map = 0;
  int experts_angle = 0;
  int message_width = 0;          // heads * n_padded: the message of a node
  int message_columns = 0;        // experts_message * message_width
  int edge_columns = 0;           // message and edge map side by side
  int angle_message_columns = 0;  // experts_angle_message * e_padded
  int angle_columns = 0;          // angle message and angle map side by side
  int sym_width = 0;              // columns of the moments: edge block, neighbor block
  int sym_inputs = 0;             // axis * sym_width
  bool live_edge = false;
  bool live_angle = false;
  bool with_angles = false;
  bool keep_far = false;
  bool first_layer = false;  // angle features are cosine (x) direction, not stored
  Real edge_scale = 1;       // 1 / edge_norm
  Real angle_scale = 1;      // 1 / sqrt(angle_norm)
  Real keep_node = 1;
  Real keep_edge = 1;
  Real keep_angle = 1;
  ActivationFunction<Real> activation;
  Graph graph;
  const kernels::GroupWeights<Real>* weights = nullptr;  // of every routing group
  kernels::UpdateVectors<Real> update;

  // --- inputs
  const Real* node = nullptr;          // n_node x n_padded
  const Real* edge = nullptr;          // n_edge x e_padded
  const Real* angle = nullptr;         // n_angle x a_padded
  const Real* cosine = nullptr;        // (n_angle)
  const Real* direction = nullptr;     // (a_padded)
  const Real* switch_edge = nullptr;   // (n_edge)
  const Real* directions = nullptr;    // n_edge x 4
  const Real* switch_angle = nullptr;  // (n_angle)

  // --- of the forward, some of it for the backward
  Real* edge_centre_part = nullptr;    // n_local x edge_columns
  Real* edge_neighbor_part = nullptr;  // n_slot x edge_columns
  Real* angle_centre_part = nullptr;   // n_local x angle_columns
  // n_close x 2 x angle_columns: an edge's part in angles whose first edge it is (with the centre's part),
  // and in angles whose second edge it is
  Real* angle_edge_parts = nullptr;
  Real* angle_message = nullptr;  // n_close (or n_edge, if keep_far) x e_padded
  Real* message = nullptr;        // n_local x message_width
  Real* moments = nullptr;        // n_local x 3 x sym_width
  Real* invariants = nullptr;     // n_local x sym_inputs

  // --- outputs, laid out as the inputs. edge_out may be `edge`, angle_out `angle`, and below d_edge
  // d_edge_out: a kernel reads all of a row before it writes any of it, and no other block reads that row
  Real* node_out = nullptr;
  Real* edge_out = nullptr;
  Real* angle_out = nullptr;

  // --- backward: gradients of outputs in, of inputs out (of angles in place)
  const Real* d_node_out = nullptr;     // n_local x n_padded
  const Real* d_edge_out = nullptr;     // n_edge x e_padded
  Real* d_message = nullptr;            // as message
  Real* d_angle_message = nullptr;      // as angle_message
  Real* d_angle_edge_parts = nullptr;   // as angle_edge_parts
  Real* d_edge_pre = nullptr;           // n_edge x edge_columns: of pre-activations
  Real* d_node_pre = nullptr;           // n_local x (experts_node + experts_sym) n_padded: likewise
  Real* d_edge_centre_part = nullptr;   // as edge_centre_part
  Real* d_angle_centre_part = nullptr;  // as angle_centre_part
  Real* d_moments = nullptr;            // as moments
  Real* d_invariants = nullptr;         // as invariants
  Real* d_neighbor_part = nullptr;      // as edge_neighbor_part
  Real* d_node_slot = nullptr;          // n_slot x n_padded: share of the edges of a slot in d_node
  Real* d_node_own = nullptr;           // n_local x n_padded: share of the node's own maps in d_node
  Real* d_node = nullptr;               // n_node x n_padded
  Real* d_edge = nullptr;               // n_edge x e_padded
  Real* d_angle = nullptr;              // n_angle x a_padded
  Real* d_cosine = nullptr;             // (n_angle), of the first layer
  Real* d_switch_angle = nullptr;       // (n_angle)
  double* d_switch_edge = nullptr;      // (n_edge)
  double* d_directions = nullptr;       // n_edge x 4
  bool add_switch_angle = false;        // d_switch_angle holds the share of later layers
  bool add_edge_geometry = false;       // d_switch_edge and d_directions do

  /// Offset of a close edge's part in angle_edge_parts; `side`: 0 as the first edge of angles, 1 as their
  /// second.
  MOECALC_KERNEL int64_t part_offset(int64_t close, int side) const {
    return (2 * close + side) * angle_columns;
  }
  /// First row of a centre in angle_message: of its close edges, or of all where far ones keep their feature.
  MOECALC_KERNEL const int* message_first() const { return keep_far ? graph.first_edge : graph.first_close; }
  /// Row of angle_message of a close edge.
  MOECALC_KERNEL int64_t message_row(int centre, int close) const {
    return keep_far ? graph.first_edge[centre] + close - graph.first_close[centre] : close;
  }
};

/// Base of kernels with one block per run of centres. `Shared`: the arrays of a block in shared memory.
template <class Format, class Shared>
struct LayerKernel {
  using Real = typename Format::Real;
  using Weights = kernels::GroupWeights<Real>;
  static constexpr int kThreads = cuda::kThreads;
  LayerView<Real> layer;
  const Run* runs = nullptr;
  int64_t n_run = 0;

  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const { return Shared::bytes(layer); }
};

/// Base of kernels with one block per centre and no shared memory, unless a kernel has its own `blocks` or
/// `shared_bytes`.
template <class Real, int THREADS>
struct CentreKernel {
  static constexpr int kThreads = THREADS;
  LayerView<Real> layer;

  int64_t blocks() const { return layer.graph.n_local; }
  int64_t shared_bytes() const { return 0; }
};

}  // namespace moecalc::cuda
