// Interface of the fused RepFlow layer: data layout and the table of kernels that each instruction set
// provides.
//
// Formulas: SPEC section 6; scheme: docs/performance.md. One centre atom is one unit of work: its angle
// tensors stay in cache, its sums belong to one thread, and nothing is ever concatenated or scattered with
// atomics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "moecalc/version.h"

namespace moecalc::ops {

/// Rows of features are padded to this many bytes, so that every row is whole vectors of every instruction
/// set.
constexpr int64_t kRowBytes = 64;

template <class T>
constexpr int64_t padded(int64_t width) {
  constexpr int64_t lanes = kRowBytes / static_cast<int64_t>(sizeof(T));
  return (width + lanes - 1) / lanes * lanes;
}

enum class ActivationKind { linear, silu, silut, tanh, sigmoid, relu, relu6, gelu };

struct Activation {
  ActivationKind kind = ActivationKind::linear;
  double threshold = 0.0, slope = 0.0, offset = 0.0;  // silut only
};

/// Aligned, growing memory of one thread.
template <class T>
class Buffer {
 public:
  /// At least `n` elements; contents are lost when it grows.
  T* get(int64_t n) {
    const size_t need = static_cast<size_t>(n) + kRowBytes / sizeof(T);
    // edge counts change from step to step: some slack, so that not every record count reallocates
    if (size_ < need) {
      release();
      // not initialised: memory that is never written takes no space
      memory_.reset(new T[need + need / 8]);
      size_ = need + need / 8;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return reinterpret_cast<T*>((address + kRowBytes - 1) / kRowBytes * kRowBytes);
  }
  void release() {
    memory_.reset();
    size_ = 0;
  }
  int64_t bytes() const { return static_cast<int64_t>(size_ * sizeof(T)); }

 private:
  std::unique_ptr<T[]> memory_;
  size_t size_ = 0;
};

/// Gradients of a routing group's weights, laid out as these (`GroupWeights`). The `y_*` are sums over rows
/// of an expert's activation times the gradient of its output: from them follow the gradients of the routing
/// weights and of the coefficients of the update.
template <class T>
struct GroupGradients {
  T *node = nullptr, *node_b = nullptr, *y_node = nullptr;  // y: k np
  T *sym = nullptr, *sym_b = nullptr, *y_sym = nullptr;     // y: k np
  T *edge_c = nullptr, *edge_b = nullptr, *edge_n = nullptr, *edge_e = nullptr;
  T *y_message = nullptr, *y_edge = nullptr;  // k heads np, k ep
  T *angle_c = nullptr, *angle_b = nullptr, *angle_j = nullptr, *angle_k = nullptr, *angle_a = nullptr;
  T *y_angle1 = nullptr, *y_angle = nullptr;                      // k ep, k ap
  T *angle2 = nullptr, *angle2_b = nullptr, *y_angle2 = nullptr;  // y: k ep
  T* far = nullptr;       // (ep) gradient of angle2_far's share of the edge update
  T* update_n = nullptr;  // (heads np) of the message's coefficients
};

/// Scratch memory of one thread.
template <class T>
struct Scratch {
  Buffer<T> z, y, p, q, dp, dq, s, t, u, w;
  GroupGradients<T>* gradients = nullptr;  // (n_group) while training: the backward adds to them
  /// Seconds that this thread spent in the parts of a centre: forward angles, edges, symmetrisation; the same
  /// backward.
  double seconds[6] = {};
};

/// Widths of a layer. Suffix p: padded. `k_*`: active experts side by side (1 for dense maps).
struct LayerShape {
  int64_t n = 0, e = 0, a = 0;     // n_dim, e_dim, a_dim
  int64_t np = 0, ep = 0, ap = 0;  // padded
  int64_t heads = 1, axis = 4;
  int64_t k_node = 1, k_sym = 1, k_message = 1, k_edge = 1, k_angle1 = 1, k_angle2 = 1, k_angle = 1;
  int64_t edge_in = 0;  // rows of the edge part of the angle maps (e_dim, or the split-compressed width)
  bool live_edge = true, live_angle = true, with_angles = true, keep_far = false;
  double edge_norm = 1.0, angle_norm = 1.0;
  double keep_n = 1.0, keep_e = 1.0, keep_a = 1.0;  // factor of the layer's input in the update
  Activation phi;

  int64_t message() const { return k_message * heads * np; }
  int64_t edge_columns() const { return message() + (live_edge ? k_edge * ep : 0); }
  int64_t angle1() const { return with_angles ? k_angle1 * ep : 0; }
  int64_t angle_columns() const { return angle1() + (live_angle ? k_angle * ap : 0); }
  int64_t sym_width() const { return ep + np; }
  int64_t sym_in() const { return axis * sym_width(); }
};

/// Weights of one routing group, laid out for it: active experts side by side, inputs split into blocks,
/// every matrix also transposed for the backward. Row-major; rows and columns padded.
template <class T>
struct GroupWeights {
  const T *node = nullptr, *node_t = nullptr, *node_b = nullptr;         // np x k np
  const T *sym = nullptr, *sym_t = nullptr, *sym_b = nullptr;            // sym_in x k np
  const T *edge_c = nullptr, *edge_c_t = nullptr, *edge_b = nullptr;     // np x columns: centre part and bias
  const T *edge_n = nullptr, *edge_n_t = nullptr;                        // np x columns: neighbour part
  const T *edge_e = nullptr, *edge_e_t = nullptr;                        // ep x columns: edge part
  const T *angle_c = nullptr, *angle_c_t = nullptr, *angle_b = nullptr;  // np x columns: centre part and bias
  const T *angle_j = nullptr, *angle_j_t = nullptr;                      // ep x columns: edge ij
  const T *angle_k = nullptr, *angle_k_t = nullptr;                      // ep x columns: edge ik
  const T *angle_a = nullptr, *angle_a_t = nullptr;                      // ap x columns: angle part
  const T* angle_cos = nullptr;  // (columns) first layer: what a cosine of 1 gives there
  // First layer, where the edge features are distance x slope + offset: what a distance of 1 gives, and the
  // biases with what the offset gives.
  const T *edge_r = nullptr, *edge_r_b = nullptr;                            // (edge columns)
  const T *angle_j_r = nullptr, *angle_k_r = nullptr, *angle_r_b = nullptr;  // (angle columns)
  const T *angle2 = nullptr, *angle2_t = nullptr, *angle2_b = nullptr;       // ep x k ep
  const T* angle2_far = nullptr;  // (ep,) answer for an edge without message
  const T *p_node = nullptr, *p_sym = nullptr, *p_message = nullptr, *p_edge = nullptr;  // routing weights
  const T *p_angle1 = nullptr, *p_angle2 = nullptr, *p_angle = nullptr;
};

/// Coefficients of the updates (residual vectors, or the constants of res_avg and res_incr), padded with
/// zeros.
template <class T>
struct UpdateVectors {
  const T *n = nullptr, *e = nullptr, *a = nullptr;  // (2 + heads) x np, 2 x ep, ap
};

/// The graph in model order, edges of a centre with its angle neighbours first.
struct GraphView {
  int64_t n_node = 0, n_local = 0, n_edge = 0, n_angle = 0, n_group = 0;
  const int64_t* first_edge = nullptr;  // (n_local + 1)
  const int64_t* n_close = nullptr;     // (n_local) angle neighbours
  const int64_t* first_angle =
      nullptr;  // (n_local + 1); angle (j, k) of a centre is first_angle + j * n_close + k
  const int64_t* neighbor = nullptr;  // (n_edge)
  const int64_t* group = nullptr;     // (n_local)
  // A slot is a (routing group of the centre, neighbour) pair that occurs; slots of a group are contiguous.
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
template <class T>
struct LayerArgs {
  const LayerShape* shape = nullptr;
  const GraphView* graph = nullptr;
  const GroupWeights<T>* weights = nullptr;  // per routing group
  UpdateVectors<T> update;

  const T *v = nullptr, *e = nullptr, *a = nullptr;  // inputs (n_node x np, n_edge x ep, n_angle x ap)
  // In the first layer a = cos (x) direction, so there its products with weights are outer products: then
  // `cos` (n_angle) and `direction` (ap) stand for `a`, and `dcos` for `da` as an output.
  const T *cos = nullptr, *direction = nullptr;
  T* dcos = nullptr;
  // The same of e in distances: `r` (n_edge) stands for it where it meets weights, and `dr` takes what they
  // would add to `de`.
  const T* r = nullptr;
  double* dr = nullptr;
  const T *sw = nullptr, *h = nullptr,
          *asw = nullptr;  // (n_edge), (n_edge x 4: sw h_c / sqrt(edge_norm)), (n_angle)
  T *zc = nullptr, *zn = nullptr,
    *zca = nullptr;  // n_local x columns, n_slot x columns, n_local x angle columns
  // Kept for the backward of the edge maps, or null: then it computes them again. Slopes of the activations,
  // (n_edge x columns) in all, for every centre expert by expert; the mixed outputs of the message's experts
  // (n_edge x heads np).
  T *edge_slope = nullptr, *edge_mix = nullptr;
  T* node_slope = nullptr;  // n_local x (k_node + k_sym) np: slopes of the node maps' activations
  T* big_h = nullptr;       // n_local x 3 x sym_width
  T* message = nullptr;     // n_local x heads np: sum over edges / edge_norm
  T* m = nullptr;           // (n_edge x ep) angle messages of close edges
  T *v_out = nullptr, *e_out = nullptr, *a_out = nullptr;

  // Backward: gradients of outputs in, of inputs out (e and a in place, v added to dv).
  const T* dv_out = nullptr;  // n_local x np
  T* dv = nullptr;            // n_node x np
  T *de = nullptr, *da = nullptr;
  bool de_live = false,
       da_live = false;  // whether de, da hold gradients of the outputs (else they count as zero)
  // Gradient of the edge maps' outputs, rows of the edges from `dz_first` on; null where nobody reads it.
  T* dz = nullptr;
  int64_t dz_first = 0;
  T* dzn = nullptr;                   // n_slot x columns: sums of dz over the edges of a slot
  int64_t* slot_next = nullptr;       // (n_slot) next edge of every slot that is to be added, into slot_edges
  T *dzc = nullptr, *dzca = nullptr;  // n_local x columns
  T* dbig_h = nullptr;                // n_local x 3 x sym_width
  T* dmessage = nullptr;              // n_local x heads np
  double* dsw = nullptr;              // (n_edge)
  double* dh = nullptr;               // (n_edge x 4), of h above
  T* dasw = nullptr;                  // (n_angle)
};

/// Kernels of one instruction set.
template <class T>
struct Kernels {
  const char* name;
  /// C (M x N) = or += A (M x K) B (K x N); N whole vectors.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
               int64_t ldc, bool accumulate);
  /// x -> phi(x) in place; and with its derivative.
  void (*activate)(const Activation& phi, T* x, int64_t n);
  void (*activate_with_slope)(const Activation& phi, T* x, T* slope, int64_t n);
  /// Node parts of the edge and angle maps, rows begin..end of one group / of the slots of one group.
  void (*project_centres)(const LayerArgs<T>&, int64_t begin, int64_t end, Scratch<T>&);
  void (*project_slots)(const LayerArgs<T>&, int64_t group, int64_t begin, int64_t end, Scratch<T>&);
  /// Edges and angles of one centre.
  void (*centre)(const LayerArgs<T>&, int64_t i, Scratch<T>&);
  void (*centre_backward)(const LayerArgs<T>&, int64_t i, Scratch<T>&);
  /// Node updates, rows begin..end of one group.
  void (*nodes)(const LayerArgs<T>&, int64_t begin, int64_t end, Scratch<T>&);
  void (*nodes_backward)(const LayerArgs<T>&, int64_t begin, int64_t end, Scratch<T>&);
  /// Adds the rows of dz of edges below `edge_end` that are not yet in dzn.
  void (*sum_slots)(const LayerArgs<T>&, int64_t begin, int64_t end, int64_t edge_end);
  /// Gradients of the node parts: slots of one group, then centres.
  void (*slots_backward)(const LayerArgs<T>&, int64_t group, int64_t begin, int64_t end, Scratch<T>&);
  void (*centres_backward)(const LayerArgs<T>&, int64_t begin, int64_t end, Scratch<T>&);
};

/// The best kernels that this processor runs; `wanted` ("avx512", "avx2", "generic") forces a slower set.
template <class T>
MOECALC_API const Kernels<T>& kernels(const char* wanted = nullptr);

}  // namespace moecalc::ops
