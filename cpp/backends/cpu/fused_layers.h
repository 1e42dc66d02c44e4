// Geometry, embedding and layers of a model by the fused kernels of the CPU, forward and backward: what
// evaluations, training and the tests of single layers share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/threads.h"
#include "graph/graph.h"
#include "graph/list_layout.h"
#include "kernels/common/edge_geometry.h"
#include "kernels/common/layer.h"
#include "moecalc/array.h"
#include "moecalc/evaluator.h"
#include "package/architecture.h"
#include "package/packed_weights.h"

namespace moecalc {

/// Memory of evaluations: it grows and stays. The names are those of LayerArgs, which has the shapes.
template <class Real>
struct LayerBuffers {
  explicit LayerBuffers(size_t n_layer);
  int64_t bytes() const;

  // Inputs of every layer, and outputs of the last.
  std::vector<kernels::Buffer<Real>> node;
  std::vector<kernels::Buffer<Real>> edge;
  std::vector<kernels::Buffer<Real>> angle;
  // Of every layer, for its backward.
  std::vector<kernels::Buffer<Real>> edge_centre_part;
  std::vector<kernels::Buffer<Real>> edge_neighbor_part;
  std::vector<kernels::Buffer<Real>> angle_centre_part;
  std::vector<kernels::Buffer<Real>> edge_slope;
  std::vector<kernels::Buffer<Real>> edge_mix;
  std::vector<kernels::Buffer<Real>> node_slope;
  std::vector<kernels::Buffer<Real>> moments;
  std::vector<kernels::Buffer<Real>> message;
  std::vector<kernels::Buffer<Real>> angle_message;
  // Geometry as the layers read it.
  kernels::Buffer<Real> switch_edge;
  kernels::Buffer<Real> directions;
  kernels::Buffer<Real> switch_angle;
  kernels::Buffer<Real> cosine;
  kernels::Buffer<Real> edge_input;  // (n_edge) of the edge embedding
  // Geometry that its backward reads.
  kernels::Buffer<double> distance;          // (n_edge)
  kernels::Buffer<double> switch_and_slope;  // (n_edge x 2) angle switch and its derivative, of close edges
  kernels::Buffer<double> unit;              // (n_edge x 3) direction of close edges
  // Gradients.
  kernels::Buffer<Real> d_node_out;
  kernels::Buffer<Real> d_node;
  kernels::Buffer<Real> d_edge;
  kernels::Buffer<Real> d_angle;
  kernels::Buffer<Real> d_edge_pre;
  kernels::Buffer<Real> d_neighbor_part;
  kernels::Buffer<Real> d_edge_centre_part;
  kernels::Buffer<Real> d_angle_centre_part;
  kernels::Buffer<Real> d_moments;
  kernels::Buffer<Real> d_message;
  kernels::Buffer<Real> d_switch_angle;
  kernels::Buffer<Real> d_cosine;
  kernels::Buffer<double> d_distance;
  kernels::Buffer<double> d_switch_edge;
  kernels::Buffer<double> d_directions;
  kernels::Buffer<kernels::AngleGradients> d_close;  // (n_edge) sums over the angles of an edge
};

/// Where the threads of a backward add gradients of weights: [thread][group].
template <class Real>
using ThreadGradients = std::vector<std::vector<kernels::GroupGradients<Real>>>;

/// One object per thread of the engine.
template <class Real>
class FusedLayers {
 public:
  /// `weights` may change between calls, but not their number of layers. `keep_bytes`: what the forward may
  /// keep for the backward, per thread; none: what memory allows. All references must outlive this.
  FusedLayers(const ModelWeights<Real>& weights, const GeometryRules& geometry,
              const kernels::Kernels<Real>& kernels, ThreadPool& threads, std::optional<int64_t> keep_bytes);

  /// (K n_types * 4) each, for the types of the graphs to come.
  void set_statistics(const std::vector<double>& mean, const std::vector<double>& stddev);

  /// Node features after the last layer, (n_local, n_dim). The weights of all groups with atoms must be laid
  /// out. `gradients`: whether backward follows.
  Array forward(const PreparedGraph& graph, GhostExchange* exchange, bool gradients);
  /// Gradient of sum(d_node * node) with respect to the edge vectors of the last forward, (n_edge, 3)
  /// float64. `d_node`: (n_local, n_dim).
  Array backward(const PreparedGraph& graph, const Array& d_node, GhostExchange* exchange);
  /// The same as forward, but keeps the features that gradients of weights need.
  Array forward_to_train(const PreparedGraph& graph);

  // --- single steps, for training and tests ---

  void set_graph(const PreparedGraph& graph);
  const kernels::GraphView& graph() const { return graph_; }
  /// Whether the forward that follows keeps the slopes of the edge maps. `from_geometry`: as below.
  void decide_what_to_keep(bool gradients, bool from_geometry);
  /// Layer `layer`, from its inputs in the buffers. `from_geometry`: of the first layer, whose edge and angle
  /// features are linear in distances and cosines, so that products with them are outer products.
  void layer_forward(size_t layer, bool from_geometry);
  /// Zeros for all gradients but those of the last outputs, which are `d_node` (n_local, n_dim).
  void start_backward(const Array& d_node, size_t last_layer);
  /// What d_edge and d_angle hold counts as the gradients of the outputs from now on.
  void use_edge_gradients() { d_edge_given_ = true; }
  void use_angle_gradients() { d_angle_given_ = true; }
  /// Gradients of layer `layer`: d_node_out in, d_node out (left at the centre's own share where `nodes` is
  /// false); d_edge and d_angle in place.
  void layer_backward(size_t layer, bool nodes, bool from_geometry);
  /// The same for all inputs, and adds to `gradients`, which must have an entry for each of `n_threads()`.
  void layer_backward_to_train(size_t layer, const ThreadGradients<Real>& gradients);

  LayerBuffers<Real>& buffers() { return buffers_; }
  /// Those of the pool now, or more.
  size_t n_threads();

  /// Bytes of the buffers; without the scratch memory of the threads, which does not grow with the structure.
  int64_t bytes() const { return buffers_.bytes(); }
  /// Adds seconds of thread time since the last call, by part, and starts anew.
  void take_timings(Timings& timings);

 private:
  using Args = kernels::LayerArgs<Real>;
  using Scratch = kernels::Scratch<Real>;

  struct Chunk {  // of the rows of a group
    int64_t group;
    int64_t begin;
    int64_t end;
  };

  Array run_forward(const PreparedGraph& graph, GhostExchange* exchange, bool from_geometry);
  void embed(const PreparedGraph& graph, bool from_geometry);
  kernels::TypeStatistics statistics(int64_t type) const;
  void describe_edges(const PreparedGraph& graph);
  void describe_angles(int64_t centre, const PreparedGraph& graph);
  Array geometry_backward(const PreparedGraph& graph);
  void add_angle_gradients(int64_t centre);
  double edge_input_gradient(int64_t edge, Scratch& scratch);
  Args arguments(size_t layer, bool from_geometry);
  Args backward_arguments(size_t layer, bool from_geometry);
  void project(const Args& args);
  template <class Sink>
  void layer_backward_into(const Sink& sink, size_t layer, bool nodes, bool from_geometry);
  template <class Sink>
  void centres_backward_into(const Sink& sink, Args& args);
  std::vector<int64_t> batches_of_centres(int64_t columns, int64_t& n_row) const;
  const kernels::LayerShape& shape_of(size_t layer) const { return weights_.shapes[layer]; }

  /// work(task, thread) for all tasks, handed out one by one, or `in_turn`.
  template <class Function>
  void parallel(int64_t n_task, const Function& work, bool in_turn = false);
  /// work(begin, end, thread) for chunks of local rows that belong to one group.
  template <class Function>
  void parallel_rows(const Function& work, bool in_turn = false);
  Scratch& scratch(int thread) { return scratch_[static_cast<size_t>(thread)]; }

  const ModelWeights<Real>& weights_;
  GeometryRules geometry_;
  const kernels::Kernels<Real>& kernels_;
  ThreadPool& threads_;
  const std::optional<int64_t> keep_bytes_;

  // Of the last graph.
  kernels::GraphView graph_;
  Slots slots_;
  std::vector<int64_t> group_;  // (n_local)
  std::vector<Chunk> row_chunks_;
  std::vector<Chunk> slot_chunks_;
  std::vector<size_t> slot_chunk_splits_;  // (n_group + 1) into slot_chunks_
  std::vector<int64_t> slot_next_;         // LayerArgs::slot_next

  bool keep_edges_ = false;        // whether the backward finds slopes of the edge maps
  bool d_edge_given_ = false;      // whether d_edge holds gradients of the layer's outputs yet
  bool d_angle_given_ = false;     // whether d_angle does
  bool d_geometry_given_ = false;  // whether d_switch_edge and d_directions hold sums of later layers
  LayerBuffers<Real> buffers_;
  std::vector<Scratch> scratch_;  // per thread
};

/// (n_row, width) array of padded rows, which are `stride` apart.
template <class Real>
Array unpadded(const Real* rows, int64_t n_row, int64_t width, int64_t stride) {
  Array out = Array::empty({n_row, width}, dtype_of<Real>);
  Real* to = out.data<Real>();
  for (int64_t i = 0; i < n_row; ++i) std::copy_n(rows + i * stride, width, to + i * width);
  return out;
}

/// Rows first..first+count of `from` (.., width) to the same rows of padded ones.
template <class Real>
void put_rows(const Array& from, int64_t first, int64_t count, int64_t stride, Real* rows) {
  const Real* source = from.data<Real>();
  const int64_t width = from.size(1);
  for (int64_t i = first; i < first + count; ++i) {
    std::copy_n(source + i * width, width, rows + i * stride);
    std::fill(rows + i * stride + width, rows + (i + 1) * stride, Real(0));
  }
}

}  // namespace moecalc
