#include "backends/cpu/fused_layers.h"

#include <atomic>
#include <utility>

#include "backends/backend.h"
#include "core/memory.h"
#include "package/edge_rules.h"

namespace moecalc {

using namespace kernels;

namespace {

constexpr int64_t kRows = 32;  // rows of nodes or slots that one task works on
/// Backward: gradients of edges are summed over the edges of a neighbor. Centres are worked on in batches,
/// so that these rows are read again while they are in the last-level cache.
constexpr int64_t kBatchBytes = int64_t{4} << 20;
constexpr int64_t kCentresPerThread = 8;  // at least, in a batch
/// Edge features up to this width: a product with them takes less time than memory takes to hand back its
/// result, so that the backward computes the edge maps again.
constexpr int64_t kNarrowEdge = 32;

template <class Real>
int64_t bytes_of_all(const std::vector<Buffer<Real>>& buffers) {
  int64_t total = 0;
  for (const Buffer<Real>& buffer : buffers) total += buffer.bytes();
  return total;
}

/// The backward of an evaluation: gradients of features and geometry alone.
template <class Real>
struct FeatureSink {
  static constexpr bool in_turn = false;
  const Kernels<Real>& kernels;

  void nodes(const LayerArgs<Real>& args, int64_t begin, int64_t end, Scratch<Real>& scratch, int) const {
    kernels.nodes_backward(args, begin, end, scratch);
  }
  void centre(const LayerArgs<Real>& args, int64_t centre, Scratch<Real>& scratch, int) const {
    kernels.centre_backward(args, centre, scratch);
  }
  void slots(const LayerArgs<Real>& args, int64_t group, int64_t begin, int64_t end, Scratch<Real>& scratch,
             int) const {
    kernels.slots_backward(args, group, begin, end, scratch);
  }
  void centres(const LayerArgs<Real>& args, int64_t begin, int64_t end, Scratch<Real>& scratch, int) const {
    kernels.centres_backward(args, begin, end, scratch);
  }
};

/// The backward of training: every thread also adds to its gradients of the weights. Tasks go to the threads
/// in turn: the sums must not depend on which thread is faster.
template <class Real>
struct WeightSink {
  static constexpr bool in_turn = true;
  const Kernels<Real>& kernels;
  const ThreadGradients<Real>& gradients;

  const GroupGradients<Real>* of(int thread) const { return gradients[static_cast<size_t>(thread)].data(); }
  void nodes(const LayerArgs<Real>& args, int64_t begin, int64_t end, Scratch<Real>& scratch,
             int thread) const {
    kernels.nodes_backward_training(args, begin, end, scratch, of(thread));
  }
  void centre(const LayerArgs<Real>& args, int64_t centre, Scratch<Real>& scratch, int thread) const {
    kernels.centre_backward_training(args, centre, scratch, of(thread));
  }
  void slots(const LayerArgs<Real>& args, int64_t group, int64_t begin, int64_t end, Scratch<Real>& scratch,
             int thread) const {
    kernels.slots_backward_training(args, group, begin, end, scratch, of(thread));
  }
  void centres(const LayerArgs<Real>& args, int64_t begin, int64_t end, Scratch<Real>& scratch,
               int thread) const {
    kernels.centres_backward_training(args, begin, end, scratch, of(thread));
  }
};

}  // namespace

template <class Real>
LayerBuffers<Real>::LayerBuffers(size_t n_layer) {
  for (auto* buffers : {&node, &edge, &angle}) buffers->resize(n_layer + 1);
  for (auto* buffers : {&edge_centre_part, &edge_neighbor_part, &angle_centre_part, &edge_slope, &edge_mix,
                        &node_slope, &moments, &message, &angle_message}) {
    buffers->resize(n_layer);
  }
}

template <class Real>
int64_t LayerBuffers<Real>::bytes() const {
  int64_t total = d_close.bytes();
  for (const auto* of_layers :
       {&node, &edge, &angle, &edge_centre_part, &edge_neighbor_part, &angle_centre_part, &edge_slope,
        &edge_mix, &node_slope, &moments, &message, &angle_message}) {
    total += bytes_of_all(*of_layers);
  }
  for (const auto* buffer : {&switch_edge, &directions, &switch_angle, &cosine, &edge_input, &d_node_out,
                             &d_node, &d_edge, &d_angle, &d_edge_pre, &d_neighbor_part, &d_edge_centre_part,
                             &d_angle_centre_part, &d_moments, &d_message, &d_switch_angle, &d_cosine}) {
    total += buffer->bytes();
  }
  for (const auto* buffer :
       {&distance, &switch_and_slope, &unit, &d_distance, &d_switch_edge, &d_directions}) {
    total += buffer->bytes();
  }
  return total;
}

template <class Real>
FusedLayers<Real>::FusedLayers(const ModelWeights<Real>& weights, const GeometryRules& geometry,
                               const Kernels<Real>& kernels, ThreadPool& threads,
                               std::optional<int64_t> keep_bytes)
    : weights_(weights),
      geometry_(geometry),
      kernels_(kernels),
      threads_(threads),
      keep_bytes_(keep_bytes),
      buffers_(weights.shapes.size()) {}

template <class Real>
void FusedLayers<Real>::set_statistics(const std::vector<double>& mean, const std::vector<double>& stddev) {
  geometry_.mean = mean;
  geometry_.stddev = stddev;
}

template <class Real>
size_t FusedLayers<Real>::n_threads() {
  const auto n_thread = static_cast<size_t>(threads_.size());
  if (scratch_.size() < n_thread) scratch_.resize(n_thread);
  return scratch_.size();
}

template <class Real>
void FusedLayers<Real>::take_timings(Timings& timings) {
  static constexpr const char* names[] = {"angles",          "edges",          "symmetrisation",
                                          "angles backward", "edges backward", "symmetrisation backward"};
  static_assert(std::size(names) == kParts);
  for (size_t part = 0; part < std::size(names); ++part) {
    double total = 0.0;
    for (Scratch& scratch : scratch_) total += std::exchange(scratch.seconds[part], 0.0);
    timings.emplace_back(names[part], total / static_cast<double>(std::max<size_t>(1, scratch_.size())));
  }
}

// --- tasks of the threads ---

template <class Real>
template <class Function>
void FusedLayers<Real>::parallel(int64_t n_task, const Function& work, bool in_turn) {
  const int64_t n_thread = std::max<int64_t>(1, std::min<int64_t>(threads_.size(), n_task));
  if (scratch_.size() < static_cast<size_t>(n_thread)) scratch_.resize(static_cast<size_t>(n_thread));
  std::atomic<int64_t> next{0};
  threads_.run(static_cast<int>(n_thread), [&](int thread) {
    if (in_turn) {
      for (int64_t task = thread; task < n_task; task += n_thread) work(task, thread);
    } else {
      for (int64_t task = next++; task < n_task; task = next++) work(task, thread);
    }
  });
}

template <class Real>
template <class Function>
void FusedLayers<Real>::parallel_rows(const Function& work, bool in_turn) {
  parallel(
      static_cast<int64_t>(row_chunks_.size()),
      [&](int64_t task, int thread) {
        const Chunk& chunk = row_chunks_[static_cast<size_t>(task)];
        work(chunk.begin, chunk.end, thread);
      },
      in_turn);
}

// --- the graph ---

template <class Real>
void FusedLayers<Real>::set_graph(const PreparedGraph& graph) {
  make_slots(graph.neighbor, graph.edge_splits, graph.n_node, slots_);
  group_.resize(static_cast<size_t>(graph.n_local));
  row_chunks_.clear();
  slot_chunks_.clear();
  slot_chunk_splits_.assign(1, 0);
  const auto cut = [](std::vector<Chunk>& chunks, const std::vector<int64_t>& splits, int64_t group) {
    const int64_t end = splits[static_cast<size_t>(group) + 1];
    for (int64_t row = splits[static_cast<size_t>(group)]; row < end; row += kRows) {
      chunks.push_back({group, row, std::min(row + kRows, end)});
    }
  };
  for (int64_t group = 0; group < graph.n_group(); ++group) {
    std::fill(group_.begin() + graph.node_splits[static_cast<size_t>(group)],
              group_.begin() + graph.node_splits[static_cast<size_t>(group) + 1], group);
    cut(row_chunks_, graph.node_splits, group);
    cut(slot_chunks_, slots_.splits, group);
    slot_chunk_splits_.push_back(slot_chunks_.size());
  }

  graph_.n_node = graph.n_node;
  graph_.n_local = graph.n_local;
  graph_.n_edge = graph.n_edge;
  graph_.n_angle = graph.n_angle;
  graph_.n_group = graph.n_group();
  graph_.first_edge = graph.edge_offset.data();
  graph_.first_angle = graph.angle_offset.data();
  graph_.n_close = graph.close_count.data();
  graph_.centre = graph.centre.data();
  graph_.neighbor = graph.neighbor.data();
  graph_.group = group_.data();
  graph_.n_slot = static_cast<int64_t>(slots_.node.size());
  graph_.slot = slots_.of_edge.data();
  graph_.slot_node = slots_.node.data();
  graph_.slot_splits = slots_.splits.data();
  graph_.slot_first = slots_.first.data();
  graph_.slot_edges = slots_.edges.data();
}

// --- geometry ---

template <class Real>
TypeStatistics FusedLayers<Real>::statistics(int64_t type) const {
  return {geometry_.mean.data() + 4 * type, geometry_.stddev.data() + 4 * type};
}

/// Distances, switches, directions and cosines, computed in float64 and stored in the network's dtype.
template <class Real>
void FusedLayers<Real>::describe_edges(const PreparedGraph& graph) {
  const int64_t n_edge = graph.n_edge;
  const EdgeRules rules = edge_rules(geometry_, shape_of(0).edge_norm);
  const double* vectors = graph.edge_vec.data();
  double* distance = buffers_.distance.get(n_edge);
  buffers_.switch_and_slope.get(2 * n_edge);
  buffers_.unit.get(3 * n_edge);
  Real* switch_edge = buffers_.switch_edge.get(n_edge);
  Real* directions = buffers_.directions.get(4 * n_edge);
  Real* input = buffers_.edge_input.get(n_edge);
  buffers_.cosine.get(graph.n_angle);
  buffers_.switch_angle.get(graph.n_angle);
  parallel(graph.n_local, [&](int64_t centre, int) {
    const TypeStatistics type = statistics(graph.types[static_cast<size_t>(centre)]);
    for (int64_t edge = graph_.first_edge[centre]; edge < graph_.first_edge[centre + 1]; ++edge) {
      const double* vector = vectors + 3 * edge;
      distance[edge] = length_of(vector);
      const EdgeDescription description = describe_edge(rules, type, vector, distance[edge]);
      switch_edge[edge] = Real(description.switch_edge);
      input[edge] = Real(description.input);
      for (int c = 0; c < 3; ++c) directions[4 * edge + c] = Real(description.directions[c]);
      directions[4 * edge + 3] = Real(0);
    }
    if (shape_of(0).with_angles) describe_angles(centre, graph);
  });
}

template <class Real>
void FusedLayers<Real>::describe_angles(int64_t centre, const PreparedGraph& graph) {
  const double* vectors = graph.edge_vec.data();
  const double* distance = buffers_.distance.get(0);
  double* close_switch = buffers_.switch_and_slope.get(0);
  double* unit = buffers_.unit.get(0);
  const int64_t first_edge = graph_.first_edge[centre];
  const int64_t end = first_edge + graph_.n_close[centre];
  for (int64_t edge = first_edge; edge < end; ++edge) {
    geometry_.angle(distance[edge], close_switch[2 * edge], close_switch[2 * edge + 1]);
    unit_vector(vectors + 3 * edge, distance[edge], unit + 3 * edge);
  }
  Real* cosine = buffers_.cosine.get(0) + graph_.first_angle[centre];
  Real* switch_angle = buffers_.switch_angle.get(0) + graph_.first_angle[centre];
  for (int64_t first = first_edge; first < end; ++first) {
    for (int64_t second = first_edge; second < end; ++second) {
      *cosine++ = Real(cosine_of(unit + 3 * first, unit + 3 * second));
      *switch_angle++ = Real(close_switch[2 * first] * close_switch[2 * second]);
    }
  }
}

/// Gradients of cosines and angle switches, summed over the angles of every close edge of a centre.
template <class Real>
void FusedLayers<Real>::add_angle_gradients(int64_t centre) {
  const int64_t first_edge = graph_.first_edge[centre];
  const int64_t end = first_edge + graph_.n_close[centre];
  const double* close_switch = buffers_.switch_and_slope.get(0);
  const double* unit = buffers_.unit.get(0);
  const Real* d_cosine = buffers_.d_cosine.get(0);
  const Real* d_switch_angle = buffers_.d_switch_angle.get(0);
  AngleGradients* sums = buffers_.d_close.get(0);
  const int64_t first_angle = graph_.first_angle[centre];
  const int64_t n_close = end - first_edge;
  for (int64_t first = 0; first < n_close; ++first) {
    AngleGradients sum{};
    for (int64_t second = 0; second < n_close; ++second) {  // both angles of the pair: (ij, ik) and (ik, ij)
      const int64_t angle = first_angle + first * n_close + second;
      const int64_t turned = first_angle + second * n_close + first;
      const double of_cosine = double(d_cosine[angle]) + double(d_cosine[turned]);
      const double of_switch = double(d_switch_angle[angle]) + double(d_switch_angle[turned]);
      const int64_t other = first_edge + second;
      add_angle(sum, of_cosine, of_switch, close_switch[2 * other], unit + 3 * other);
    }
    sums[first_edge + first] = sum;
  }
}

/// Gradient of the input x of the edge embedding, e = x W + b, activated unless x is the distance.
template <class Real>
double FusedLayers<Real>::edge_input_gradient(int64_t edge, Scratch& scratch) {
  const int64_t width = shape_of(0).e_padded;
  const Real* matrix = weights_.edge_matrix.data();
  const Real* d_edge = buffers_.d_edge.get(0) + edge * width;
  if (weights_.use_dist) {
    Real total = 0;
    for (int64_t d = 0; d < width; ++d) total += d_edge[d] * matrix[d];
    return buffers_.d_distance.get(0)[edge] + double(total);
  }
  const Real input = buffers_.edge_input.get(0)[edge];
  const Real* bias = weights_.edge_bias.data();
  Real* pre_activation = scratch.embedding_pre_activation().get(width);
  Real* slope = scratch.embedding_slope().get(width);
  for (int64_t d = 0; d < width; ++d) pre_activation[d] = input * matrix[d] + bias[d];
  kernels_.activate_with_slope(weights_.phi, pre_activation, slope, width);
  double total = 0.0;
  for (int64_t d = 0; d < width; ++d) total += double(d_edge[d] * slope[d] * matrix[d]);
  return total;
}

template <class Real>
Array FusedLayers<Real>::geometry_backward(const PreparedGraph& graph) {
  const EdgeRules rules = edge_rules(geometry_, shape_of(0).edge_norm);
  const bool with_angles = shape_of(0).with_angles;
  Array gradient = Array::empty({graph.n_edge, 3}, Dtype::float64);
  auto* d_vectors = gradient.data<double>();
  const double* vectors = graph.edge_vec.data();
  const double* distance = buffers_.distance.get(0);
  const double* close_switch = buffers_.switch_and_slope.get(0);
  const double* d_switch_edge = buffers_.d_switch_edge.get(0);
  const double* d_directions = buffers_.d_directions.get(0);
  const AngleGradients* d_close = buffers_.d_close.get(graph.n_edge);
  parallel(graph.n_local, [&](int64_t centre, int thread) {
    const TypeStatistics type = statistics(graph.types[static_cast<size_t>(centre)]);
    if (with_angles) add_angle_gradients(centre);
    const int64_t first_edge = graph_.first_edge[centre];
    const int64_t first_far = first_edge + (with_angles ? graph_.n_close[centre] : 0);
    for (int64_t edge = first_edge; edge < graph_.first_edge[centre + 1]; ++edge) {
      EdgeGradients gradients;
      gradients.d_input = edge_input_gradient(edge, scratch(thread));
      gradients.d_switch_edge = d_switch_edge[edge];
      gradients.d_directions = d_directions + 4 * edge;
      const bool is_close = edge < first_far;
      vector_gradient(rules, type, vectors + 3 * edge, distance[edge], gradients,
                      is_close ? d_close + edge : nullptr, is_close ? close_switch[2 * edge + 1] : 0.0,
                      d_vectors + 3 * edge);
    }
  });
  return gradient;
}

// --- one layer ---

template <class Real>
LayerArgs<Real> FusedLayers<Real>::arguments(size_t layer, bool from_geometry) {
  const LayerShape& shape = shape_of(layer);
  const GraphView& graph = graph_;
  LayerBuffers<Real>& buffers = buffers_;
  Args args;
  args.shape = &shape;
  args.graph = &graph;
  args.weights = weights_.groups[layer].data();
  args.update = weights_.updates[layer];
  args.node = buffers.node[layer].get(graph.n_node * shape.n_padded);
  args.edge = buffers.edge[layer].get(graph.n_edge * shape.e_padded);
  if (from_geometry && weights_.use_dist) {
    args.distance = buffers.edge_input.get(0);
    args.d_distance = buffers.d_distance.get(graph.n_edge);
  }
  if (shape.with_angles && from_geometry) {
    args.cosine = buffers.cosine.get(0);
    args.direction = weights_.angle_direction.data();
    args.d_cosine = buffers.d_cosine.get(graph.n_angle);
  } else if (shape.with_angles) {
    args.angle = buffers.angle[layer].get(graph.n_angle * shape.a_padded);
  }
  args.switch_edge = buffers.switch_edge.get(0);
  args.directions = buffers.directions.get(0);
  args.switch_angle = buffers.switch_angle.get(0);
  args.edge_centre_part = buffers.edge_centre_part[layer].get(graph.n_local * shape.edge_columns());
  args.edge_neighbor_part = buffers.edge_neighbor_part[layer].get(graph.n_slot * shape.edge_columns());
  args.angle_centre_part = buffers.angle_centre_part[layer].get(graph.n_local * shape.angle_columns());
  if (keep_edges_ && args.distance == nullptr) {  // products with distances are cheaper than memory
    args.edge_slope = buffers.edge_slope[layer].get(graph.n_edge * shape.edge_columns());
    args.edge_mix = buffers.edge_mix[layer].get(graph.n_edge * shape.heads * shape.n_padded);
  }
  args.node_slope = buffers.node_slope[layer].get(graph.n_local * (shape.experts_node + shape.experts_sym) *
                                                  shape.n_padded);
  args.moments = buffers.moments[layer].get(graph.n_local * 3 * shape.sym_width());
  args.angle_message =
      shape.with_angles ? buffers.angle_message[layer].get(graph.n_edge * shape.e_padded) : nullptr;
  args.message = buffers.message[layer].get(graph.n_local * shape.heads * shape.n_padded);
  return args;
}

template <class Real>
LayerArgs<Real> FusedLayers<Real>::backward_arguments(size_t layer, bool from_geometry) {
  const LayerShape& shape = shape_of(layer);
  const GraphView& graph = graph_;
  LayerBuffers<Real>& buffers = buffers_;
  Args args = arguments(layer, from_geometry);
  args.d_node_out = buffers.d_node_out.get(graph.n_local * shape.n_padded);
  args.d_node = buffers.d_node.get(graph.n_node * shape.n_padded);
  args.d_edge = buffers.d_edge.get(graph.n_edge * shape.e_padded);
  args.d_angle = buffers.d_angle.get(graph.n_angle * shape_of(0).a_padded);
  args.d_edge_given = d_edge_given_;
  args.d_angle_given = d_angle_given_;
  args.d_geometry_given = d_geometry_given_;
  args.d_edge_centre_part = buffers.d_edge_centre_part.get(graph.n_local * shape.edge_columns());
  args.d_angle_centre_part = buffers.d_angle_centre_part.get(graph.n_local * shape.angle_columns());
  args.d_moments = buffers.d_moments.get(graph.n_local * 3 * shape.sym_width());
  args.d_message = buffers.d_message.get(graph.n_local * shape.heads * shape.n_padded);
  args.d_switch_edge = buffers.d_switch_edge.get(0);
  args.d_directions = buffers.d_directions.get(0);
  args.d_switch_angle = buffers.d_switch_angle.get(0);
  return args;
}

template <class Real>
void FusedLayers<Real>::project(const Args& args) {
  parallel_rows([&](int64_t begin, int64_t end, int thread) {
    kernels_.project_centres(args, begin, end, scratch(thread));
  });
  parallel(static_cast<int64_t>(slot_chunks_.size()), [&](int64_t task, int thread) {
    const Chunk& chunk = slot_chunks_[static_cast<size_t>(task)];
    kernels_.project_slots(args, chunk.group, chunk.begin, chunk.end, scratch(thread));
  });
}

template <class Real>
void FusedLayers<Real>::layer_forward(size_t layer, bool from_geometry) {
  const LayerShape& shape = shape_of(layer);
  Args args = arguments(layer, from_geometry);
  args.node_out = buffers_.node[layer + 1].get(graph_.n_node * shape.n_padded);
  // outputs that no later layer reads do not exist
  if (shape.live_edge) args.edge_out = buffers_.edge[layer + 1].get(graph_.n_edge * shape.e_padded);
  if (shape.live_angle) args.angle_out = buffers_.angle[layer + 1].get(graph_.n_angle * shape.a_padded);
  project(args);
  parallel(graph_.n_local,
           [&](int64_t centre, int thread) { kernels_.centre(args, centre, scratch(thread)); });
  parallel_rows(
      [&](int64_t begin, int64_t end, int thread) { kernels_.nodes(args, begin, end, scratch(thread)); });
}

/// Centres that the batches begin with, and n_local. `n_row`: edges of the largest batch.
template <class Real>
std::vector<int64_t> FusedLayers<Real>::batches_of_centres(int64_t columns, int64_t& n_row) const {
  const int64_t wanted = std::max<int64_t>(1, kBatchBytes / (columns * static_cast<int64_t>(sizeof(Real))));
  const int64_t smallest = kCentresPerThread * threads_.size();
  const int64_t* first_edge = graph_.first_edge;
  std::vector<int64_t> first{0};
  n_row = 0;
  while (first.back() < graph_.n_local) {
    int64_t end = std::min(first.back() + smallest, graph_.n_local);
    while (end < graph_.n_local && first_edge[end + 1] - first_edge[first.back()] <= wanted) ++end;
    n_row = std::max(n_row, first_edge[end] - first_edge[first.back()]);
    first.push_back(end);
  }
  return first;
}

/// The backward of all centres, and the sums of d_edge_pre over the edges of every slot. While a batch of
/// centres is worked on, the rows of the batch before it are summed: two buffers, one barrier per batch.
/// Every sum runs in the order of the edges, whatever the batches and threads.
template <class Real>
template <class Sink>
void FusedLayers<Real>::centres_backward_into(const Sink& sink, Args& args) {
  const int64_t columns = args.shape->edge_columns();
  int64_t n_row = 0;
  const std::vector<int64_t> first = batches_of_centres(columns, n_row);
  Real* d_edge_pre = buffers_.d_edge_pre.get(2 * n_row * columns);
  args.d_neighbor_part = buffers_.d_neighbor_part.get(graph_.n_slot * columns);
  slot_next_.assign(slots_.first.begin(), slots_.first.end() - 1);
  args.slot_next = slot_next_.data();
  const auto n_batch = static_cast<int64_t>(first.size()) - 1;
  const auto n_sum = static_cast<int64_t>(slot_chunks_.size());
  const auto at_batch = [&](int64_t batch) {
    Args of_batch = args;
    of_batch.d_edge_pre = d_edge_pre + batch % 2 * n_row * columns;
    of_batch.d_edge_pre_first = graph_.first_edge[first[static_cast<size_t>(batch)]];
    return of_batch;
  };
  for (int64_t batch = 0; batch <= n_batch; ++batch) {
    const Args now = batch < n_batch ? at_batch(batch) : args;
    const Args before = batch > 0 ? at_batch(batch - 1) : args;
    const int64_t begin = first[static_cast<size_t>(batch)];
    const int64_t n_centre = batch < n_batch ? first[static_cast<size_t>(batch) + 1] - begin : 0;
    const auto work = [&](int64_t task, int thread) {
      if (task < n_centre) {
        sink.centre(now, begin + task, scratch(thread), thread);
      } else {
        const Chunk& chunk = slot_chunks_[static_cast<size_t>(task - n_centre)];
        kernels_.sum_slots(before, chunk.begin, chunk.end, graph_.first_edge[begin]);
      }
    };
    // small tasks last: they even out the threads
    parallel(n_centre + (batch > 0 ? n_sum : 0), work, Sink::in_turn);
  }
}

template <class Real>
template <class Sink>
void FusedLayers<Real>::layer_backward_into(const Sink& sink, size_t layer, bool nodes, bool from_geometry) {
  Args args = backward_arguments(layer, from_geometry);
  std::fill_n(args.d_node, graph_.n_node * args.shape->n_padded, Real(0));
  if (args.d_distance != nullptr) std::fill_n(args.d_distance, graph_.n_edge, 0.0);
  parallel_rows(
      [&](int64_t begin, int64_t end, int thread) { sink.nodes(args, begin, end, scratch(thread), thread); },
      Sink::in_turn);
  if (nodes) {
    centres_backward_into(sink, args);
  } else {
    args.d_edge_pre = nullptr;
    parallel(
        graph_.n_local,
        [&](int64_t centre, int thread) { sink.centre(args, centre, scratch(thread), thread); },
        Sink::in_turn);
  }
  d_edge_given_ = true;
  d_geometry_given_ = true;
  d_angle_given_ = d_angle_given_ || args.shape->with_angles;
  if (!nodes) return;
  // group by group: within a group every node has one slot, so no two tasks write the same row
  for (size_t group = 0; group + 1 < slot_chunk_splits_.size(); ++group) {
    const size_t first = slot_chunk_splits_[group];
    const size_t count = slot_chunk_splits_[group + 1] - first;
    const auto work = [&](int64_t task, int thread) {
      const Chunk& chunk = slot_chunks_[first + static_cast<size_t>(task)];
      sink.slots(args, chunk.group, chunk.begin, chunk.end, scratch(thread), thread);
    };
    parallel(static_cast<int64_t>(count), work, Sink::in_turn);
  }
  parallel_rows([&](int64_t begin, int64_t end,
                    int thread) { sink.centres(args, begin, end, scratch(thread), thread); },
                Sink::in_turn);
}

template <class Real>
void FusedLayers<Real>::layer_backward(size_t layer, bool nodes, bool from_geometry) {
  layer_backward_into(FeatureSink<Real>{kernels_}, layer, nodes, from_geometry);
}

template <class Real>
void FusedLayers<Real>::layer_backward_to_train(size_t layer, const ThreadGradients<Real>& gradients) {
  layer_backward_into(WeightSink<Real>{kernels_, gradients}, layer, /*nodes=*/true, /*from_geometry=*/false);
}

// --- all layers ---

template <class Real>
Array FusedLayers<Real>::forward(const PreparedGraph& graph, GhostExchange* exchange, bool gradients) {
  set_graph(graph);
  decide_what_to_keep(gradients, true);
  return run_forward(graph, exchange, true);
}

template <class Real>
Array FusedLayers<Real>::forward_to_train(const PreparedGraph& graph) {
  set_graph(graph);
  keep_edges_ = false;  // gradients of weights need the activations themselves
  return run_forward(graph, nullptr, false);
}

template <class Real>
void FusedLayers<Real>::decide_what_to_keep(bool gradients, bool from_geometry) {
  int64_t numbers = 0;
  const size_t first = from_geometry && weights_.use_dist ? 1 : 0;
  for (size_t layer = first; layer < weights_.shapes.size(); ++layer) {
    const LayerShape& shape = shape_of(layer);
    numbers += graph_.n_edge * (shape.edge_columns() + shape.heads * shape.n_padded);
  }
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(Real));
  if (keep_bytes_) {
    keep_edges_ = gradients && bytes <= *keep_bytes_ * threads_.size();
    return;
  }
  const int64_t held = bytes_of_all(buffers_.edge_slope) + bytes_of_all(buffers_.edge_mix);
  keep_edges_ = gradients && shape_of(0).e_padded > kNarrowEdge;
  if (!keep_edges_ || bytes <= held) return;
  // A quarter of what is free to these threads: the other buffers of a first step need twice as much.
  keep_edges_ = bytes - held <= quarter_of_available_memory();
}

/// Inputs of the first layer: rows of the type table, e = x W + b (activated unless x is the distance), and
/// a = cos W_a / sqrt(pi).
template <class Real>
void FusedLayers<Real>::embed(const PreparedGraph& graph, bool from_geometry) {
  const LayerShape& shape = shape_of(0);
  const Real* table = weights_.node_table.data();
  const Real* edge_matrix = weights_.edge_matrix.data();
  const Real* edge_bias = weights_.edge_bias.data();
  const Real* angle_direction = weights_.angle_direction.data();
  Real* node = buffers_.node[0].get(graph_.n_node * shape.n_padded);
  for (int64_t i = 0; i < graph_.n_node; ++i) {
    std::copy_n(table + graph.types[static_cast<size_t>(i)] * shape.n_padded, shape.n_padded,
                node + i * shape.n_padded);
  }
  Real* edge = buffers_.edge[0].get(graph_.n_edge * shape.e_padded);
  const bool writes_angles = shape.with_angles && !from_geometry;
  Real* angle = writes_angles ? buffers_.angle[0].get(graph_.n_angle * shape.a_padded) : nullptr;
  const Real* input = buffers_.edge_input.get(0);
  const Real* cosine = buffers_.cosine.get(0);
  parallel(graph_.n_local, [&](int64_t centre, int) {
    const int64_t begin = graph_.first_edge[centre];
    const int64_t end = graph_.first_edge[centre + 1];
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t d = 0; d < shape.e_padded; ++d) {
        edge[k * shape.e_padded + d] = input[k] * edge_matrix[d] + edge_bias[d];
      }
    }
    if (!weights_.use_dist) {
      kernels_.activate(weights_.phi, edge + begin * shape.e_padded, (end - begin) * shape.e_padded);
    }
    if (angle == nullptr) return;
    for (int64_t k = graph_.first_angle[centre]; k < graph_.first_angle[centre + 1]; ++k) {
      for (int64_t d = 0; d < shape.a_padded; ++d)
        angle[k * shape.a_padded + d] = cosine[k] * angle_direction[d];
    }
  });
}

template <class Real>
Array FusedLayers<Real>::run_forward(const PreparedGraph& graph, GhostExchange* exchange,
                                     bool from_geometry) {
  describe_edges(graph);
  embed(graph, from_geometry);
  const size_t n_layer = weights_.shapes.size();
  for (size_t layer = 0; layer < n_layer; ++layer) {
    const LayerShape& shape = shape_of(layer);
    if (layer > 0 && exchange != nullptr) {
      Real* node = buffers_.node[layer].get(graph_.n_node * shape.n_padded);
      const Array owned = unpadded(node, graph_.n_local, shape.n, shape.n_padded);
      const int64_t n_ghost = graph_.n_node - graph_.n_local;
      put_rows(with_ghosts(graph, owned, exchange), graph_.n_local, n_ghost, shape.n_padded, node);
    }
    layer_forward(layer, from_geometry && layer == 0);
  }
  const LayerShape& shape = shape_of(n_layer - 1);
  return unpadded(buffers_.node[n_layer].get(0), graph_.n_local, shape.n, shape.n_padded);
}

template <class Real>
void FusedLayers<Real>::start_backward(const Array& d_node, size_t last_layer) {
  const GraphView& graph = graph_;
  const LayerShape& first = shape_of(0);
  const int64_t stride = shape_of(last_layer).n_padded;
  buffers_.d_switch_edge.get(graph.n_edge);
  buffers_.d_directions.get(4 * graph.n_edge);
  std::fill_n(buffers_.d_switch_angle.get(graph.n_angle), graph.n_angle, Real(0));
  buffers_.d_edge.get(graph.n_edge * first.e_padded);
  buffers_.d_angle.get(graph.n_angle * first.a_padded);
  d_edge_given_ = false;
  d_angle_given_ = false;
  d_geometry_given_ = false;
  put_rows(d_node, 0, graph.n_local, stride, buffers_.d_node_out.get(graph.n_local * stride));
}

template <class Real>
Array FusedLayers<Real>::backward(const PreparedGraph& graph, const Array& d_node, GhostExchange* exchange) {
  const size_t n_layer = weights_.shapes.size();
  start_backward(d_node, n_layer - 1);
  for (size_t layer = n_layer; layer-- > 0;) {
    const LayerShape& shape = shape_of(layer);
    // the features of layer 0 come from the types alone
    layer_backward(layer, /*nodes=*/layer > 0, /*from_geometry=*/layer == 0);
    if (layer == 0) break;
    const Real* of_inputs = buffers_.d_node.get(0);
    Real* of_outputs = buffers_.d_node_out.get(0);
    if (exchange != nullptr) {
      const Array all = unpadded(of_inputs, graph_.n_node, shape.n, shape.n_padded);
      put_rows(without_ghosts(graph, all, exchange), 0, graph_.n_local, shape.n_padded, of_outputs);
    } else {
      std::copy_n(of_inputs, graph_.n_local * shape.n_padded, of_outputs);
    }
  }
  return geometry_backward(graph);
}

template struct LayerBuffers<float>;
template struct LayerBuffers<double>;
template class FusedLayers<float>;
template class FusedLayers<double>;

}  // namespace moecalc
