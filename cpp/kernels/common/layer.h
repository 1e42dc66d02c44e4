// Interface of the fused RepFlow layer: data layout, and the table of kernels of every instruction set.
//
// Formulas: SPEC.md, section 6. Scheme: docs/developer/architecture.md. One centre atom is one unit of work:
// its angle tensors stay in cache, its sums belong to one thread, nothing is concatenated or scattered with
// atomics.
//
// Glossary, for Python, C++ and documents:
//   node, edge, angle    features of an atom i, of a pair ij, of a pair of edges (ij, ik); widths n, e, a
//   centre, neighbor     the atoms i and j of an edge
//   close, far edge      within the cutoff of the angles or beyond it; close edges come first
//   first, second edge   of an angle: ij and ik
//   group                routing group: atoms whose maps use the same experts
//   slot                 pair of a centre's group and a neighbor: edges of a slot share the neighbor's part
//   run                  centres of a group that one block of a GPU works on
//   map                  linear map with activation: one map, or the mixture of a routed map's experts
//   expert               one of a map's active experts, side by side in memory; 1 for maps without routing
//   node map, sym map    node_self_mlp and node_sym_linear: the node from itself and from its invariants
//   moments              H = sum of directions (x) features, whose products are the invariants of the sym map
//   message              node_edge_linear: what edges send to their centre, in heads
//   edge, angle map      edge_self_linear and angle_self_linear: update of a feature from itself
//   angle message        edge_angle_linear1: what angles send to their first edge
//   message map          edge_angle_linear2: update of an edge from its angle message
//   centre, neighbor, edge, first, second, angle part   share of one input in a pre-activation
//   pre_activation       of a map, before its activation
//   slope                derivative of the activation there
//   mix                  sum of the experts' outputs weighted with the routing weights
//   routing              weights of a group's active experts
//   switch_edge, switch_angle   switch function of an edge, product of the switches of an angle
//   d_...                gradient of the energy with respect to ...
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/common/activation.h"
#include "moecalc/version.h"

namespace moecalc::kernels {

/// Rows of features are padded to this many bytes: every row is whole vectors of every instruction set.
constexpr int64_t kRowBytes = 64;

/// `width`, rounded up to whole rows of kRowBytes.
template <class Real>
constexpr int64_t padded(int64_t width) {
  constexpr int64_t lanes = kRowBytes / static_cast<int64_t>(sizeof(Real));
  return (width + lanes - 1) / lanes * lanes;
}

/// Aligned, growing memory of one thread.
template <class Real>
class Buffer {
 public:
  /// At least `count` elements; contents are lost when it grows.
  Real* get(int64_t count) {
    const size_t need = static_cast<size_t>(count) + kRowBytes / sizeof(Real);
    // Some slack: edge counts change from step to step, and not every record count shall reallocate.
    if (size_ < need) {
      release();
      // not initialised: memory that is never written takes no space
      memory_.reset(new Real[need + need / 8]);
      size_ = need + need / 8;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<Real*>((address + kRowBytes - 1) / kRowBytes * kRowBytes);
  }
  void release() {
    memory_.reset();
    size_ = 0;
  }
  int64_t bytes() const { return static_cast<int64_t>(size_ * sizeof(Real)); }

 private:
  std::unique_ptr<Real[]> memory_;
  size_t size_ = 0;
};

/// Widths of a layer. `*_padded`: as in memory. `experts_*`: active experts of a map.
struct LayerShape {
  int64_t n = 0;  // n_dim
  int64_t e = 0;  // e_dim
  int64_t a = 0;  // a_dim
  int64_t n_padded = 0;
  int64_t e_padded = 0;
  int64_t a_padded = 0;
  int64_t heads = 1;  // of the message
  int64_t axis = 4;   // columns of the moments that invariants are formed with
  int64_t experts_node = 1;
  int64_t experts_sym = 1;
  int64_t experts_message = 1;
  int64_t experts_edge = 1;
  int64_t experts_angle_message = 1;
  int64_t experts_message_map = 1;
  int64_t experts_angle = 1;
  int64_t edge_inputs = 0;  // rows of the edge parts of the angle maps: e_dim, or the split-compressed width
  bool live_edge = true;    // whether the edge map reaches the energy
  bool live_angle = true;   // whether the angle map does
  bool with_angles = true;  // update_angle of the model
  bool keep_far = false;    // far edges have their feature as angle message (smooth_edge_update = false)
  double edge_norm = 1.0;   // sums over edges are divided by it
  double angle_norm = 1.0;  // sums over angles, by its square root
  double keep_node = 1.0;   // factor of the layer's input in the update
  double keep_edge = 1.0;   // likewise
  double keep_angle = 1.0;  // likewise
  Activation activation;    // of every map

  int64_t message_columns() const { return experts_message * heads * n_padded; }
  /// Message and edge map side by side.
  int64_t edge_columns() const { return message_columns() + (live_edge ? experts_edge * e_padded : 0); }
  int64_t angle_message_columns() const { return with_angles ? experts_angle_message * e_padded : 0; }
  /// Angle message and angle map side by side.
  int64_t angle_columns() const {
    return angle_message_columns() + (live_angle ? experts_angle * a_padded : 0);
  }
  /// Columns of the moments: edge block, neighbor block.
  int64_t sym_width() const { return e_padded + n_padded; }
  /// Invariants: the inputs of the sym map.
  int64_t sym_inputs() const { return axis * sym_width(); }
};

/// Weights of one routing group, laid out for it: active experts side by side, inputs split into parts,
/// every matrix also transposed for the backward. Row-major (inputs x columns); rows and columns padded.
template <class Real>
struct GroupWeights {
  // n_padded x experts_node n_padded
  const Real* node = nullptr;
  const Real* node_transposed = nullptr;
  const Real* node_bias = nullptr;
  // sym_inputs x experts_sym n_padded
  const Real* sym = nullptr;
  const Real* sym_transposed = nullptr;
  const Real* sym_bias = nullptr;
  // Message and edge map: inputs x edge_columns
  const Real* edge_centre = nullptr;
  const Real* edge_centre_transposed = nullptr;
  const Real* edge_bias = nullptr;
  const Real* edge_neighbor = nullptr;
  const Real* edge_neighbor_transposed = nullptr;
  const Real* edge_edge = nullptr;
  const Real* edge_edge_transposed = nullptr;
  // Angle message and angle map: inputs x angle_columns
  const Real* angle_centre = nullptr;
  const Real* angle_centre_transposed = nullptr;
  const Real* angle_bias = nullptr;
  const Real* angle_first = nullptr;  // of edge ij
  const Real* angle_first_transposed = nullptr;
  const Real* angle_second = nullptr;  // of edge ik
  const Real* angle_second_transposed = nullptr;
  const Real* angle_angle = nullptr;
  const Real* angle_angle_transposed = nullptr;
  const Real* angle_of_cos = nullptr;  // (angle_columns) first layer: what a cosine of 1 gives there
  // First layer, where the edge features are distance x slope + offset: what a distance of 1 gives, and the
  // biases with what the offset gives.
  const Real* edge_of_distance = nullptr;  // (edge_columns)
  const Real* edge_distance_bias = nullptr;
  const Real* angle_first_of_distance = nullptr;  // (angle_columns)
  const Real* angle_second_of_distance = nullptr;
  const Real* angle_distance_bias = nullptr;
  // e_padded x experts_message_map e_padded
  const Real* message_map = nullptr;
  const Real* message_map_transposed = nullptr;
  const Real* message_map_bias = nullptr;
  const Real* message_map_far = nullptr;  // (e_padded) mix of the message map for an edge without message
  // Routing weights, one for every active expert of a map
  const Real* routing_node = nullptr;
  const Real* routing_sym = nullptr;
  const Real* routing_message = nullptr;
  const Real* routing_edge = nullptr;
  const Real* routing_angle_message = nullptr;
  const Real* routing_message_map = nullptr;
  const Real* routing_angle = nullptr;
};

/// Gradients of a group's weights, laid out as these (`GroupWeights`). The `output_*` are sums over rows of
/// an expert's activation times the gradient of the mix: from them follow the gradients of the routing
/// weights and of the coefficients of the update.
template <class Real>
struct GroupGradients {
  Real* node = nullptr;
  Real* node_bias = nullptr;
  Real* output_node = nullptr;  // (experts_node, n_padded)
  Real* sym = nullptr;
  Real* sym_bias = nullptr;
  Real* output_sym = nullptr;  // (experts_sym, n_padded)
  Real* edge_centre = nullptr;
  Real* edge_bias = nullptr;
  Real* edge_neighbor = nullptr;
  Real* edge_edge = nullptr;
  Real* output_message = nullptr;  // (experts_message, heads, n_padded)
  Real* output_edge = nullptr;     // (experts_edge, e_padded)
  Real* angle_centre = nullptr;
  Real* angle_bias = nullptr;
  Real* angle_first = nullptr;
  Real* angle_second = nullptr;
  Real* angle_angle = nullptr;
  Real* output_angle_message = nullptr;  // (experts_angle_message, e_padded)
  Real* output_angle = nullptr;          // (experts_angle, a_padded)
  Real* message_map = nullptr;
  Real* message_map_bias = nullptr;
  Real* output_message_map = nullptr;  // (experts_message_map, e_padded)
  Real* d_message_map_far = nullptr;   // (e_padded) of message_map_far's share in the edge update
  Real* update_node = nullptr;         // (heads, n_padded) of the message's coefficients
};

/// Coefficients of the updates (residual vectors, or the constants of res_avg and res_incr), padded with
/// zeros.
template <class Real>
struct UpdateVectors {
  const Real* node = nullptr;   // (2 + heads) x n_padded: node map, sym map, heads of the message
  const Real* edge = nullptr;   // 2 x e_padded: edge map, message map
  const Real* angle = nullptr;  // a_padded
};

/// The graph in model order, edges of a centre with its close ones first.
struct GraphView {
  int64_t n_node = 0;
  int64_t n_local = 0;
  int64_t n_edge = 0;
  int64_t n_angle = 0;
  int64_t n_group = 0;
  const int64_t* first_edge = nullptr;  // (n_local + 1)
  const int64_t* n_close = nullptr;     // (n_local) close edges
  // (n_local + 1); the angle of edges (j, k) of a centre is first_angle + j * n_close + k
  const int64_t* first_angle = nullptr;
  const int64_t* neighbor = nullptr;  // (n_edge)
  const int64_t* group = nullptr;     // (n_local)
  // A slot is a (group of the centre, neighbor) pair that occurs; slots of a group are contiguous.
  int64_t n_slot = 0;
  const int64_t* slot = nullptr;         // (n_edge) slot of every edge
  const int64_t* slot_node = nullptr;    // (n_slot)
  const int64_t* slot_splits = nullptr;  // (n_group + 1)
  const int64_t* slot_first = nullptr;   // (n_slot + 1) into slot_edges
  const int64_t* slot_edges = nullptr;   // (n_edge) edges of every slot
  const int64_t* centre = nullptr;       // (n_edge)
};

/// Everything that a kernel of one layer reads and writes. Gradients are with respect to features and
/// geometry only.
template <class Real>
struct LayerArgs {
  const LayerShape* shape = nullptr;
  const GraphView* graph = nullptr;
  const GroupWeights<Real>* weights = nullptr;  // (n_group)
  UpdateVectors<Real> update;

  // --- inputs
  const Real* node = nullptr;   // n_node x n_padded
  const Real* edge = nullptr;   // n_edge x e_padded
  const Real* angle = nullptr;  // n_angle x a_padded
  // In the first layer angle = cosine (x) direction, and its products with weights are outer products: there
  // `cosine` and `direction` stand for `angle`, and `d_cosine` is an output in place of `d_angle`.
  const Real* cosine = nullptr;     // (n_angle), or null
  const Real* direction = nullptr;  // (a_padded)
  Real* d_cosine = nullptr;         // (n_angle)
  // The same of edge features in distances: `distance` stands for `edge` where it meets weights, and
  // `d_distance` takes what these would add to `d_edge`.
  const Real* distance = nullptr;      // (n_edge), or null
  double* d_distance = nullptr;        // (n_edge)
  const Real* switch_edge = nullptr;   // (n_edge)
  const Real* directions = nullptr;    // n_edge x 4: switch_edge times the environment row / sqrt(edge_norm)
  const Real* switch_angle = nullptr;  // (n_angle)

  // --- what the forward leaves for the backward
  Real* edge_centre_part = nullptr;    // n_local x edge_columns
  Real* edge_neighbor_part = nullptr;  // n_slot x edge_columns
  Real* angle_centre_part = nullptr;   // n_local x angle_columns
  // Slopes of message and edge map (n_edge x edge_columns in all, for every centre expert by expert) and the
  // mixes of the message (n_edge x heads n_padded). Null: the backward computes them again.
  Real* edge_slope = nullptr;
  Real* edge_mix = nullptr;
  Real* node_slope = nullptr;     // n_local x (experts_node + experts_sym) n_padded: of node and sym map
  Real* moments = nullptr;        // n_local x 3 x sym_width
  Real* message = nullptr;        // n_local x heads n_padded: sum over edges / edge_norm
  Real* angle_message = nullptr;  // n_edge x e_padded, of close edges

  // --- outputs, laid out as the inputs
  Real* node_out = nullptr;
  Real* edge_out = nullptr;
  Real* angle_out = nullptr;

  // --- backward: gradients of outputs in, of inputs out (edge and angle in place, node added to d_node)
  const Real* d_node_out = nullptr;  // n_local x n_padded
  Real* d_node = nullptr;            // n_node x n_padded
  Real* d_edge = nullptr;            // n_edge x e_padded
  Real* d_angle = nullptr;           // n_angle x a_padded
  bool d_edge_given = false;         // whether d_edge holds a gradient of the output; else it counts as zero
  bool d_angle_given = false;        // likewise
  bool d_geometry_given = false;     // whether d_switch_edge and d_directions hold those of later layers
  // Of the pre-activations of message and edge map, rows of the edges from `d_edge_pre_first` on; null where
  // nobody reads them.
  Real* d_edge_pre = nullptr;
  int64_t d_edge_pre_first = 0;
  Real* d_neighbor_part = nullptr;      // n_slot x edge_columns: sums of d_edge_pre over the edges of a slot
  int64_t* slot_next = nullptr;         // (n_slot) next edge of a slot that is to be added, into slot_edges
  Real* d_edge_centre_part = nullptr;   // n_local x edge_columns
  Real* d_angle_centre_part = nullptr;  // n_local x angle_columns
  Real* d_moments = nullptr;            // n_local x 3 x sym_width
  Real* d_message = nullptr;            // n_local x heads n_padded
  double* d_switch_edge = nullptr;      // (n_edge)
  double* d_directions = nullptr;       // n_edge x 4
  Real* d_switch_angle = nullptr;       // (n_angle)
};

/// Parts of a centre's work that are timed; order of `Scratch::seconds`.
enum class Part { angles, edges, symmetrisation, angles_backward, edges_backward, symmetrisation_backward };
constexpr int kParts = 6;

/// Scratch memory of one thread, a buffer for every use. Stages that run one after another share memory
/// through the functions below: a small working set stays in the first-level cache.
template <class Real>
struct Scratch {
  Buffer<Real> angle_first_part;     // n_close x angle_columns, with the centre's part
  Buffer<Real> angle_second_part;    // n_close x angle_columns
  Buffer<Real> d_angle_first_part;   // likewise
  Buffer<Real> d_angle_second_part;  // likewise
  Buffer<Real> d_edge_out;           // edges of a centre x e_padded: gradients of outputs
  double seconds[kParts] = {};       // that this thread spent in every part

  /// Rows at hand of a map before, then after its activation.
  Buffer<Real>& angle_pre_activation() { return pre_activation_; }
  Buffer<Real>& edge_pre_activation() { return pre_activation_; }
  Buffer<Real>& message_map_pre_activation() { return pre_activation_; }
  Buffer<Real>& node_pre_activation() { return pre_activation_; }
  Buffer<Real>& embedding_pre_activation() { return pre_activation_; }
  /// Slopes of these, which become gradients in place; the nodes need two maps at once.
  Buffer<Real>& d_angle_pre_activation() { return slope_; }
  Buffer<Real>& d_edge_pre_activation() { return slope_; }
  Buffer<Real>& d_message_map_pre_activation() { return slope_; }
  Buffer<Real>& sym_pre_activation() { return slope_; }
  Buffer<Real>& embedding_slope() { return slope_; }
  /// Inputs of a map, gathered or computed.
  Buffer<Real>& slot_nodes() { return inputs_; }
  Buffer<Real>& invariants() { return inputs_; }
  Buffer<Real>& d_angle_out() { return inputs_; }
  /// Gradients that one stage hands to the next.
  Buffer<Real>& d_slot_nodes() { return d_inputs_; }
  Buffer<Real>& d_angle_message() { return d_inputs_; }
  /// Gradient of one row's mix.
  Buffer<Real>& d_angle_message_row() { return d_mix_; }
  Buffer<Real>& d_message_row() { return d_mix_; }

 private:
  Buffer<Real> pre_activation_;
  Buffer<Real> slope_;
  Buffer<Real> inputs_;
  Buffer<Real> d_inputs_;
  Buffer<Real> d_mix_;
};

/// Kernels of one instruction set. The `*_training` ones are the same and also add to the gradients of the
/// weights, (n_group) of the calling thread.
template <class Real>
struct Kernels {
  const char* name;
  /// C (rows x columns) = or += A (rows x inner) B (inner x columns), row-major; `columns` whole vectors.
  void (*product)(int64_t rows, int64_t columns, int64_t inner, const Real* a, int64_t a_stride,
                  const Real* b, int64_t b_stride, Real* c, int64_t c_stride, bool accumulate);
  /// x -> activation(x) in place, `count` elements; and with the slopes.
  void (*activate)(const Activation&, Real* values, int64_t count);
  void (*activate_with_slope)(const Activation&, Real* values, Real* slope, int64_t count);
  /// Node parts of the edge and angle maps, rows begin..end of one group / of the slots of one group.
  void (*project_centres)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&);
  void (*project_slots)(const LayerArgs<Real>&, int64_t group, int64_t begin, int64_t end, Scratch<Real>&);
  /// Edges and angles of one centre.
  void (*centre)(const LayerArgs<Real>&, int64_t centre, Scratch<Real>&);
  void (*centre_backward)(const LayerArgs<Real>&, int64_t centre, Scratch<Real>&);
  void (*centre_backward_training)(const LayerArgs<Real>&, int64_t centre, Scratch<Real>&,
                                   const GroupGradients<Real>*);
  /// Node updates, rows begin..end of one group.
  void (*nodes)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&);
  void (*nodes_backward)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&);
  void (*nodes_backward_training)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&,
                                  const GroupGradients<Real>*);
  /// Adds the rows of d_edge_pre of edges below `edge_end` that are not yet in d_neighbor_part.
  void (*sum_slots)(const LayerArgs<Real>&, int64_t begin, int64_t end, int64_t edge_end);
  /// Gradients of the node parts: slots of one group, then centres.
  void (*slots_backward)(const LayerArgs<Real>&, int64_t group, int64_t begin, int64_t end, Scratch<Real>&);
  void (*slots_backward_training)(const LayerArgs<Real>&, int64_t group, int64_t begin, int64_t end,
                                  Scratch<Real>&, const GroupGradients<Real>*);
  void (*centres_backward)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&);
  void (*centres_backward_training)(const LayerArgs<Real>&, int64_t begin, int64_t end, Scratch<Real>&,
                                    const GroupGradients<Real>*);
};

/// The best kernels that this processor runs; `wanted` ("avx512", "avx2", "generic") forces a slower set.
/// (Not `kernels`: that is the namespace.)
template <class Real>
MOECALC_API const Kernels<Real>& select_kernels(const char* wanted = nullptr);

}  // namespace moecalc::kernels
