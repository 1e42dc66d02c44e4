// Geometry, embedding and layers of a model by the fused kernels of the CPU, forward and backward: what
// evaluations, training and the tests of single layers share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/threads.h"
#include "graph/graph.h"
#include "graph/list_layout.h"
#include "moecalc/array.h"
#include "moecalc/evaluator.h"
#include "ops/layer.h"
#include "package/architecture.h"
#include "package/packed_weights.h"

namespace moecalc {

/// Memory of evaluations: it grows and stays. The names are those of LayerArgs, which has the shapes.
template <class T>
struct LayerBuffers {
  explicit LayerBuffers(size_t n_layer);
  int64_t bytes() const;

  std::vector<ops::Buffer<T>> v, e, a;  // inputs of every layer, and outputs of the last
  // Of every layer, for its backward.
  std::vector<ops::Buffer<T>> m, big_h, message, zc, zn, zca, node_slope, edge_slope, edge_mix;
  ops::Buffer<T> sw, h, asw, cos, edge_input;
  ops::Buffer<double> r, ds;     // (n_edge) distance, and derivative of the switch
  ops::Buffer<double> angle_sw;  // (n_edge x 2) angle switch and its derivative, of close edges
  ops::Buffer<double> unit;      // (n_edge x 3) direction of close edges
  ops::Buffer<T> dv, dv_out, de, da, dz, dzn, dzc, dzca, dbig_h, dmessage, dasw, dcos;
  ops::Buffer<double> dr, dsw, dh;
  ops::Buffer<double> dangle;  // (n_edge x 4) gradient of the angle switch and of the direction
};

/// One object per thread of the engine.
template <class T>
class FusedLayers {
 public:
  /// `weights` may change between calls, but not their number of layers. `keep_bytes`: what the forward may
  /// keep for the backward, per thread; none: what memory allows. All references must outlive this.
  FusedLayers(const ModelWeights<T>& weights, const GeometryRules& geometry, const ops::Kernels<T>& kernels,
              ThreadPool& threads, std::optional<int64_t> keep_bytes);

  /// (K n_types * 4) each, for the types of the graphs to come.
  void set_statistics(const std::vector<double>& mean, const std::vector<double>& stddev);

  /// Node features after the last layer, (n_local, n_dim). The weights of all groups with atoms must be laid
  /// out. `gradients`: whether backward follows.
  Array forward(const PreparedGraph& graph, GhostExchange* exchange, bool gradients);
  /// Gradient of sum(dv_local * v) with respect to the edge vectors of the last forward, (n_edge, 3) float64.
  Array backward(const PreparedGraph& graph, const Array& dv_local, GhostExchange* exchange);
  /// The same as forward, but keeps the features that gradients of weights need.
  Array forward_to_train(const PreparedGraph& graph);

  // --- single steps, for training and tests ---

  void set_graph(const PreparedGraph& graph);
  const ops::GraphView& graph() const { return graph_; }
  /// Whether the forward that follows keeps the slopes of the edge maps. `from_geometry`: as below.
  void decide_what_to_keep(bool gradients, bool from_geometry);
  /// Layer `l`, from its inputs in the buffers. `from_geometry`: of the first layer, whose edge and angle
  /// features are linear in distances and cosines, so that products with them are outer products.
  void layer_forward(size_t l, bool from_geometry);
  /// Zeros for all gradients but those of the last outputs, which are `dv_local` (n_local, n_dim).
  void start_backward(const Array& dv_local, size_t last_layer);
  /// What de and da hold counts as the gradients of the outputs from now on.
  void use_edge_gradients() { de_live_ = true; }
  void use_angle_gradients() { da_live_ = true; }
  /// Gradients of layer `l`: dv_out in, dv out (left at the centre's own share where `nodes` is false); de
  /// and da in place.
  void layer_backward(size_t l, bool nodes, bool from_geometry);

  LayerBuffers<T>& buffers() { return buffers_; }
  /// One for every thread that the pool has now, or more.
  std::vector<ops::Scratch<T>>& scratch();

  /// Bytes of the buffers; without the scratch memory of the threads, which does not grow with the structure.
  int64_t bytes() const { return buffers_.bytes(); }
  /// Adds seconds of thread time since the last call, by part, and starts anew.
  void take_timings(Timings& timings);

 private:
  struct Chunk {  // of the rows of a group
    int64_t group, begin, end;
  };

  Array run_forward(const PreparedGraph& graph, GhostExchange* exchange, bool from_geometry);
  void embed(const PreparedGraph& graph, bool from_geometry);
  void shape_geometry(const PreparedGraph& graph);
  Array geometry_backward(const PreparedGraph& graph);
  ops::LayerArgs<T> arguments(size_t layer, bool from_geometry);
  void layer_backward_centres(ops::LayerArgs<T>& x, bool nodes);
  void project(const ops::LayerArgs<T>& x);
  const ops::LayerShape& shape(size_t layer) const { return weights_.shapes[layer]; }

  /// f(task, scratch) for all tasks, handed out one by one; where threads sum gradients of weights, in turn,
  /// so that the sums do not depend on which thread is faster.
  template <class F>
  void parallel(int64_t n, const F& f) {
    const int64_t n_thread = std::max<int64_t>(1, std::min<int64_t>(threads_.size(), n));
    if (scratch_.size() < static_cast<size_t>(n_thread)) scratch_.resize(static_cast<size_t>(n_thread));
    std::atomic<int64_t> next{0};
    threads_.run(static_cast<int>(n_thread), [&](int thread) {
      ops::Scratch<T>& scratch = scratch_[static_cast<size_t>(thread)];
      if (scratch.gradients != nullptr) {
        for (int64_t task = thread; task < n; task += n_thread) f(task, scratch);
      } else {
        for (int64_t task = next++; task < n; task = next++) f(task, scratch);
      }
    });
  }
  /// f(begin, end, scratch) for chunks of local rows that belong to one group.
  template <class F>
  void parallel_rows(const F& f) {
    parallel(static_cast<int64_t>(row_chunks_.size()), [&](int64_t k, ops::Scratch<T>& scratch) {
      const Chunk& chunk = row_chunks_[static_cast<size_t>(k)];
      f(chunk.begin, chunk.end, scratch);
    });
  }

  const ModelWeights<T>& weights_;
  GeometryRules geometry_;
  const ops::Kernels<T>& kernels_;
  ThreadPool& threads_;
  const std::optional<int64_t> keep_bytes_;

  // Of the last graph.
  ops::GraphView graph_;
  Slots slots_;
  std::vector<int64_t> group_;  // (n_local)
  std::vector<Chunk> row_chunks_, slot_chunks_;
  std::vector<size_t> slot_chunk_splits_;  // (n_group + 1) into slot_chunks_
  std::vector<int64_t> slot_next_;         // LayerArgs::slot_next

  bool keep_edges_ = false;                 // whether the backward finds slopes of the edge maps
  bool de_live_ = false, da_live_ = false;  // whether de and da hold gradients of the layer's outputs yet
  LayerBuffers<T> buffers_;
  std::vector<ops::Scratch<T>> scratch_;  // per thread
};

/// (n, width) array of padded rows, which are `stride` apart.
template <class T>
Array unpadded(const T* rows, int64_t n, int64_t width, int64_t stride) {
  Array out = Array::empty({n, width}, dtype_of<T>);
  T* to = out.data<T>();
  for (int64_t i = 0; i < n; ++i) std::copy_n(rows + i * stride, width, to + i * width);
  return out;
}

/// Rows first..first+n of `from` (.., width) to the same rows of padded ones.
template <class T>
void put_rows(const Array& from, int64_t first, int64_t n, int64_t stride, T* rows) {
  const T* source = from.data<T>();
  const int64_t width = from.size(1);
  for (int64_t i = first; i < first + n; ++i) {
    std::copy_n(source + i * width, width, rows + i * stride);
    std::fill(rows + i * stride + width, rows + (i + 1) * stride, T(0));
  }
}

}  // namespace moecalc
