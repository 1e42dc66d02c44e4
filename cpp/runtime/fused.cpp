#include "fused.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "../ops/layer.h"
#include "memory.h"
#include "packed_weights.h"
#include "threads.h"

namespace moecalc {
namespace {

using torch::jit::IValue;
using torch::jit::Module;
using namespace ops;

constexpr int64_t kRows = 32;  // rows of nodes or slots that one task works on
/// Backward: gradients of edges are summed over the edges of a neighbour. Centres are worked on in batches,
/// so that these rows are read again while they are in the last-level cache.
constexpr int64_t kBatchBytes = int64_t{4} << 20;
constexpr int64_t kCentresPerThread = 8;  // at least, in a batch
/// What the forward may keep of the edge maps for the backward, in bytes per thread, from MOECALC_KEEP (MiB);
/// -1 where it is not set. Throws Error where it is no number.
int64_t kept_bytes() {
  const char* text = std::getenv("MOECALC_KEEP");
  if (text == nullptr) return -1;
  char* end = nullptr;
  const double mebibytes = std::strtod(text, &end);
  if (end == text || *end != '\0' || !(mebibytes >= 0.0 && mebibytes <= 1e9)) {
    throw Error("expected MOECALC_KEEP to be a number of MiB per thread, got '" + std::string(text) + "'");
  }
  return static_cast<int64_t>(mebibytes * 1048576.0);
}

template <class T>
class Fused final : public FusedModel, private PackedWeights<T> {
 public:
  Fused(const Module& geometry, const Module& embedding, const std::vector<Module>& layers,
        ThreadPool& threads, const DeferredTensors* deferred)
      : PackedWeights<T>(geometry, embedding, layers, ops::kernels<T>(std::getenv("MOECALC_CPU")), deferred),
        threads_(threads) {
    for (auto* buffers : {&v_, &e_, &a_}) buffers->resize(layers_.size() + 1);
    for (auto* buffers : {&m_, &big_h_, &message_, &zc_, &zn_, &zca_, &node_slope_, &edge_slope_, &edge_mix_})
      buffers->resize(layers_.size());
  }

  at::Tensor forward(const PreparedGraph& graph, const at::Tensor& features, const Exchange& with_ghosts,
                     bool gradients) override;
  at::Tensor backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                      const Exchange& without_ghosts) override;
  void set_weights(const TrainingWeights& weights) override;
  at::Tensor forward_to_train(const PreparedGraph& graph) override {
    keep_edges_ = false;  // gradients of weights need the activations themselves
    return run_forward(graph, {}, false);
  }
  TrainingWeights backward_to_train(const PreparedGraph& graph, const at::Tensor& dv_local) override;
  LayerTensors one_layer(const PreparedGraph& graph, const at::Tensor& features, int64_t layer,
                         const LayerTensors& in) override;
  LayerTensors one_layer_backward(int64_t layer, const LayerTensors& in,
                                  const LayerTensors& gradients) override;
  void set_types(const TypeTables& tables) override { Packed::set_types(tables); }
  int64_t bytes() const override;
  int64_t n_packed_groups() const override { return Packed::n_packed_groups(); }
  int64_t weight_bytes() const override { return Packed::packed_bytes(); }
  void release_weights() override { Packed::release_groups(); }
  const char* instruction_set() const override { return kernels_.name; }
  void take_timings(Timings& timings) override {
    static constexpr const char* names[] = {"angles",          "edges",          "symmetrisation",
                                            "angles backward", "edges backward", "symmetrisation backward"};
    for (size_t part = 0; part < 6; ++part) {
      double total = 0.0;
      for (Scratch<T>& scratch : scratch_) total += std::exchange(scratch.seconds[part], 0.0);
      timings.emplace_back(names[part], total / static_cast<double>(std::max<size_t>(1, scratch_.size())));
    }
  }

 private:
  using Packed = PackedWeights<T>;
  using Packed::angle_direction_, Packed::edge_bias_, Packed::edge_matrix_, Packed::kernels_, Packed::layers_,
      Packed::memory_, Packed::node_table_, Packed::phi_, Packed::rules_, Packed::set_groups,
      Packed::updates_, Packed::use_dist_, Packed::weights_;

  // --- one evaluation ---
  at::Tensor run_forward(const PreparedGraph& graph, const Exchange& with_ghosts, bool from_geometry);
  void view(const PreparedGraph& graph);
  void shape_geometry(const PreparedGraph& graph);
  at::Tensor geometry_backward(const PreparedGraph& graph);
  LayerArgs<T> arguments(size_t layer, bool from_geometry);
  void layer_forward(size_t l, bool from_geometry);
  void layer_backward(size_t l, bool nodes, bool from_geometry);
  void layer_backward_centres(LayerArgs<T>& x, bool nodes);
  void start_backward();
  void project(const LayerArgs<T>& x);
  void decide_what_to_keep(bool gradients, int64_t n_edge, bool from_geometry);

  /// f(task, scratch) for all tasks, handed out one by one; where threads sum gradients of weights, in turn,
  /// so that the sums do not depend on which thread is faster.
  template <class F>
  void parallel(int64_t n, const F& f) {
    const int64_t n_thread = std::max<int64_t>(1, std::min<int64_t>(threads_.size(), n));
    if (scratch_.size() < static_cast<size_t>(n_thread)) scratch_.resize(static_cast<size_t>(n_thread));
    std::atomic<int64_t> next{0};
    threads_.run(static_cast<int>(n_thread), [&](int thread) {
      Scratch<T>& scratch = scratch_[static_cast<size_t>(thread)];
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
    parallel(static_cast<int64_t>(row_chunks_.size()), [&](int64_t k, Scratch<T>& scratch) {
      f(row_chunks_[static_cast<size_t>(k)].first, row_chunks_[static_cast<size_t>(k)].second, scratch);
    });
  }

  // Of the last graph.
  GraphView g_;
  std::vector<int64_t> group_, slot_, slot_node_, slot_splits_, slot_first_, slot_edges_, slot_next_;
  std::vector<std::pair<int64_t, int64_t>> row_chunks_;
  struct SlotChunk {
    int64_t group, begin, end;
  };
  std::vector<SlotChunk> slot_chunks_;
  std::vector<size_t> slot_chunk_splits_;

  const int64_t keep_bytes_ = kept_bytes();
  bool keep_edges_ = false;                 // whether the backward finds slopes of the edge maps
  bool de_live_ = false, da_live_ = false;  // whether de_ and da_ hold gradients of the layer's outputs yet

  ThreadPool& threads_;

  // Buffers; they grow and stay.
  std::vector<Scratch<T>> scratch_;
  std::vector<Buffer<T>> v_, e_, a_;  // inputs of every layer, and the last outputs
  std::vector<Buffer<T>> m_, big_h_, message_, zc_, zn_, zca_, node_slope_, edge_slope_,
      edge_mix_;  // of every layer, for its backward
  Buffer<T> sw_, h_, asw_, cos_, edge_input_;
  Buffer<T> dv_, dv_out_, de_, da_, dz_, dzc_, dzca_, dbig_h_, dmessage_, dasw_, dcos_, dzn_;
  bool training_ = false;                   // weights are set from outside
  std::vector<Buffer<T>> gradient_memory_;  // per thread
  Buffer<double> r_, dr_, dsw_, dh_, ds_edge_, angle_sw_, dangle_sw_, unit_;
};

// --- the graph
// ---------------------------------------------------------------------------------------------------------

template <class T>
void Fused<T>::view(const PreparedGraph& graph) {
  g_.n_node = graph.n_node, g_.n_local = graph.n_local, g_.n_edge = graph.n_edge, g_.n_angle = graph.n_angle;
  g_.n_group = static_cast<int64_t>(graph.node_splits.size()) - 1;
  g_.first_edge = graph.edge_offset.data();
  g_.first_angle = graph.angle_offset.data();
  g_.n_close = graph.close_count.data();
  g_.centre = graph.edge_index.const_data_ptr<int64_t>();
  g_.neighbor = g_.centre + graph.n_edge;

  group_.resize(static_cast<size_t>(graph.n_local));
  row_chunks_.clear();
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t begin = graph.node_splits[static_cast<size_t>(group)],
                  end = graph.node_splits[static_cast<size_t>(group) + 1];
    std::fill(group_.begin() + begin, group_.begin() + end, group);
    for (int64_t row = begin; row < end; row += kRows)
      row_chunks_.emplace_back(row, std::min(row + kRows, end));
  }
  g_.group = group_.data();

  // Slots: (group of the centre, neighbour) pairs, group by group.
  slot_.resize(static_cast<size_t>(graph.n_edge));
  slot_node_.clear();
  slot_splits_.assign(1, 0);
  std::vector<int64_t> of_node(static_cast<size_t>(graph.n_node), -1);
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t first = slot_splits_.back();
    for (int64_t edge = graph.edge_splits[static_cast<size_t>(group)];
         edge < graph.edge_splits[static_cast<size_t>(group) + 1]; ++edge) {
      int64_t& place = of_node[static_cast<size_t>(g_.neighbor[edge])];
      if (place < first) {
        place = static_cast<int64_t>(slot_node_.size());
        slot_node_.push_back(g_.neighbor[edge]);
      }
      slot_[static_cast<size_t>(edge)] = place;
    }
    slot_splits_.push_back(static_cast<int64_t>(slot_node_.size()));
  }
  g_.n_slot = static_cast<int64_t>(slot_node_.size());
  slot_first_.assign(static_cast<size_t>(g_.n_slot) + 1, 0);
  for (const int64_t slot : slot_) ++slot_first_[static_cast<size_t>(slot) + 1];
  std::partial_sum(slot_first_.begin(), slot_first_.end(), slot_first_.begin());
  slot_edges_.resize(static_cast<size_t>(graph.n_edge));
  {
    std::vector<int64_t> next(slot_first_.begin(), slot_first_.end() - 1);
    for (int64_t edge = 0; edge < graph.n_edge; ++edge) {
      slot_edges_[static_cast<size_t>(next[static_cast<size_t>(slot_[static_cast<size_t>(edge)])]++)] = edge;
    }
  }
  slot_chunks_.clear();
  slot_chunk_splits_.assign(1, 0);
  for (int64_t group = 0; group < g_.n_group; ++group) {
    const int64_t end = slot_splits_[static_cast<size_t>(group) + 1];
    for (int64_t row = slot_splits_[static_cast<size_t>(group)]; row < end; row += kRows) {
      slot_chunks_.push_back({group, row, std::min(row + kRows, end)});
    }
    slot_chunk_splits_.push_back(slot_chunks_.size());
  }
  g_.slot = slot_.data();
  g_.slot_node = slot_node_.data();
  g_.slot_splits = slot_splits_.data();
  g_.slot_first = slot_first_.data();
  g_.slot_edges = slot_edges_.data();
}

/// Distances, switches, directions and cosines, computed in float64 and stored in the network's dtype.
template <class T>
void Fused<T>::shape_geometry(const PreparedGraph& graph) {
  const int64_t n_edge = graph.n_edge;
  const double* vec = graph.edge_vec.const_data_ptr<double>();
  const int64_t* type = graph.types.const_data_ptr<int64_t>();
  const bool angles = layers_[0].shape.with_angles;
  double* r = r_.get(n_edge);
  double* ds = ds_edge_.get(n_edge);
  double* sa = angle_sw_.get(2 * n_edge);
  double* unit = unit_.get(3 * n_edge);
  T *sw = sw_.get(n_edge), *h = h_.get(4 * n_edge), *input = edge_input_.get(n_edge);
  T *cos = cos_.get(graph.n_angle), *asw = asw_.get(graph.n_angle);
  const double norm = 1.0 / std::sqrt(layers_[0].shape.edge_norm);
  parallel(graph.n_local, [&](int64_t i, Scratch<T>&) {
    const double* mean = rules_.mean.data() + 4 * type[i];
    const double* stddev = rules_.stddev.data() + 4 * type[i];
    const int64_t e0 = g_.first_edge[i], m = g_.n_close[i];
    for (int64_t e = e0; e < g_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      r[e] = std::sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
      double s;
      rules_.edge(r[e], s, ds[e]);
      const double rp = r[e] + rules_.protection;
      sw[e] = T(s);
      input[e] = T(rules_.use_dist ? r[e] : (s / rp - mean[0]) / stddev[0]);
      for (int c = 0; c < 3; ++c)
        h[4 * e + c] = T(norm * s * (s * x[c] / (rp * rp) - mean[c + 1]) / stddev[c + 1]);
      h[4 * e + 3] = T(0);
    }
    if (!angles) return;
    for (int64_t e = e0; e < e0 + m; ++e) {
      rules_.angle(r[e], sa[2 * e], sa[2 * e + 1]);
      for (int c = 0; c < 3; ++c) unit[3 * e + c] = vec[3 * e + c] / (r[e] + 1e-6);
    }
    int64_t at = g_.first_angle[i];
    for (int64_t j = e0; j < e0 + m; ++j) {
      for (int64_t k = e0; k < e0 + m; ++k, ++at) {
        cos[at] = T((unit[3 * j] * unit[3 * k] + unit[3 * j + 1] * unit[3 * k + 1] +
                     unit[3 * j + 2] * unit[3 * k + 2]) *
                    (1.0 - 1e-6));
        asw[at] = T(sa[2 * j] * sa[2 * k]);
      }
    }
  });
}

template <class T>
at::Tensor Fused<T>::geometry_backward(const PreparedGraph& graph) {
  const double* vec = graph.edge_vec.const_data_ptr<double>();
  const int64_t* type = graph.types.const_data_ptr<int64_t>();
  const LayerShape& s0 = layers_[0].shape;
  const double norm = 1.0 / std::sqrt(s0.edge_norm);
  at::Tensor gradient = at::empty({graph.n_edge, 3}, at::TensorOptions().dtype(at::kDouble));
  auto* g = gradient.mutable_data_ptr<double>();
  const double *r = r_.get(0), *ds = ds_edge_.get(0), *sa = angle_sw_.get(0), *unit = unit_.get(0);
  const double *dsw_in = dsw_.get(0), *dh = dh_.get(0), *dr_in = dr_.get(0);
  const T *dasw = dasw_.get(0), *dcos_in = dcos_.get(0), *de = de_.get(0), *input = edge_input_.get(0);
  double* work = dangle_sw_.get(4 * graph.n_edge);  // gradient of the angle switch and of the unit vector
  parallel(graph.n_local, [&](int64_t i, Scratch<T>& scratch) {
    const double* mean = rules_.mean.data() + 4 * type[i];
    const double* stddev = rules_.stddev.data() + 4 * type[i];
    const int64_t e0 = g_.first_edge[i], m = g_.n_close[i];
    std::fill(work + 4 * e0, work + 4 * (e0 + m), 0.0);
    if (s0.with_angles) {
      int64_t at = g_.first_angle[i];
      for (int64_t j = e0; j < e0 + m; ++j) {
        for (int64_t k = e0; k < e0 + m; ++k, ++at) {
          const double dcos = double(dcos_in[at]) * (1.0 - 1e-6);
          const double dswitch = dasw[at];
          work[4 * j] += dswitch * sa[2 * k];
          work[4 * k] += dswitch * sa[2 * j];
          for (int c = 0; c < 3; ++c) {
            work[4 * j + 1 + c] += dcos * unit[3 * k + c];
            work[4 * k + 1 + c] += dcos * unit[3 * j + c];
          }
        }
      }
    }
    T* z = scratch.z.get(s0.ep);
    T* slope = scratch.y.get(s0.ep);
    for (int64_t e = e0; e < g_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      const double rp = r[e] + rules_.protection, q = 1.0 / (rp * rp);
      double switched, unused;
      rules_.edge(r[e], switched, unused);
      double dr = 0.0, dsw = dsw_in[e], dx[3] = {0.0, 0.0, 0.0};
      // e = input W + b, activated unless the input is the distance
      double dinput = 0.0;
      if (!use_dist_) {
        for (int64_t d = 0; d < s0.ep; ++d) {
          z[d] = input[e] * edge_matrix_[static_cast<size_t>(d)] + edge_bias_[static_cast<size_t>(d)];
        }
        kernels_.activate_with_slope(phi_, z, slope, s0.ep);
        for (int64_t d = 0; d < s0.ep; ++d)
          dinput += double(de[e * s0.ep + d] * slope[d] * edge_matrix_[static_cast<size_t>(d)]);
      } else {
        T total = 0;
        for (int64_t d = 0; d < s0.ep; ++d) total += de[e * s0.ep + d] * edge_matrix_[static_cast<size_t>(d)];
        dinput = dr_in[e] + double(total);
      }
      if (rules_.use_dist) {
        dr += dinput;
      } else {
        dsw += dinput / (rp * stddev[0]);
        dr -= dinput * switched / (rp * rp * stddev[0]);
      }
      // h = norm sw (sw x q - mean) / stddev
      for (int c = 0; c < 3; ++c) {
        const double direction = (switched * x[c] * q - mean[c + 1]) / stddev[c + 1];
        dsw += dh[4 * e + c] * norm * direction;
        const double d = dh[4 * e + c] * norm * switched / stddev[c + 1];
        dsw += d * x[c] * q;
        dx[c] += d * switched * q;
        dr -= 2.0 * d * switched * x[c] * q / rp;
      }
      dr += dsw * ds[e];
      if (s0.with_angles && e < e0 + m) {
        const double length = r[e] + 1e-6;
        dr += work[4 * e] * sa[2 * e + 1];
        for (int c = 0; c < 3; ++c) {
          dx[c] += work[4 * e + 1 + c] / length;
          dr -= work[4 * e + 1 + c] * x[c] / (length * length);
        }
      }
      for (int c = 0; c < 3; ++c) g[3 * e + c] = dx[c] + dr * x[c] / r[e];
    }
  });
  return gradient;
}

// --- forward and backward
// ------------------------------------------------------------------------------------------------

/// (rows, width) tensor of padded rows.
template <class T>
at::Tensor compact(const T* rows, int64_t n, int64_t width, int64_t stride) {
  at::Tensor out = at::empty({n, width}, at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value));
  T* to = out.template mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) std::copy_n(rows + i * stride, width, to + i * width);
  return out;
}

template <class T>
void expand(const at::Tensor& from, int64_t first, int64_t n, int64_t stride, T* rows) {
  const at::Tensor values = from.contiguous();
  const T* source = values.template const_data_ptr<T>();
  const int64_t width = values.size(1);
  for (int64_t i = first; i < first + n; ++i) {
    std::copy_n(source + i * width, width, rows + i * stride);
    std::fill(rows + i * stride + width, rows + (i + 1) * stride, T(0));
  }
}

/// `from_geometry`: the first layer, whose edge and angle features are linear in distances and cosines.
template <class T>
LayerArgs<T> Fused<T>::arguments(size_t layer, bool from_geometry) {
  LayerArgs<T> x;
  const LayerShape& s = layers_[layer].shape;
  x.shape = &s;
  x.graph = &g_;
  x.weights = weights_[layer].data();
  x.update = updates_[layer];
  x.v = v_[layer].get(g_.n_node * s.np);
  x.e = e_[layer].get(g_.n_edge * s.ep);
  if (from_geometry && use_dist_) {
    x.r = edge_input_.get(0);
    x.dr = dr_.get(g_.n_edge);
  }
  if (s.with_angles && from_geometry) {
    x.cos = cos_.get(0);
    x.direction = angle_direction_.data();
    x.dcos = dcos_.get(g_.n_angle);
  } else if (s.with_angles) {
    x.a = a_[layer].get(g_.n_angle * s.ap);
  }
  x.sw = sw_.get(0), x.h = h_.get(0), x.asw = asw_.get(0);
  x.zc = zc_[layer].get(g_.n_local * s.edge_columns());
  x.zn = zn_[layer].get(g_.n_slot * s.edge_columns());
  x.zca = zca_[layer].get(g_.n_local * s.angle_columns());
  if (keep_edges_ && x.r == nullptr) {  // products with distances are cheaper than memory
    x.edge_slope = edge_slope_[layer].get(g_.n_edge * s.edge_columns());
    x.edge_mix = edge_mix_[layer].get(g_.n_edge * s.heads * s.np);
  }
  x.node_slope = node_slope_[layer].get(g_.n_local * (s.k_node + s.k_sym) * s.np);
  x.big_h = big_h_[layer].get(g_.n_local * 3 * s.sym_width());
  x.m = s.with_angles ? m_[layer].get(g_.n_edge * s.ep) : nullptr;
  x.message = message_[layer].get(g_.n_local * s.heads * s.np);
  return x;
}

template <class T>
void Fused<T>::project(const LayerArgs<T>& x) {
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.project_centres(x, begin, end, scratch);
  });
  parallel(static_cast<int64_t>(slot_chunks_.size()), [&](int64_t k, Scratch<T>& scratch) {
    const SlotChunk& chunk = slot_chunks_[static_cast<size_t>(k)];
    kernels_.project_slots(x, chunk.group, chunk.begin, chunk.end, scratch);
  });
}

template <class T>
void Fused<T>::layer_forward(size_t l, bool from_geometry) {
  const LayerShape& s = layers_[l].shape;
  LayerArgs<T> x = arguments(l, from_geometry);
  x.v_out = v_[l + 1].get(g_.n_node * s.np);
  // outputs that no later layer reads do not exist
  if (s.live_edge) x.e_out = e_[l + 1].get(g_.n_edge * s.ep);
  if (s.live_angle) x.a_out = a_[l + 1].get(g_.n_angle * s.ap);
  project(x);
  parallel(g_.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre(x, i, scratch); });
  parallel_rows(
      [&](int64_t begin, int64_t end, Scratch<T>& scratch) { kernels_.nodes(x, begin, end, scratch); });
}

/// centre_backward for all centres, and the sums of dz over the edges of every slot. While a batch of centres
/// is worked on, the rows of the batch before it are summed: two buffers, one barrier per batch. Every sum
/// runs in the order of the edges, whatever the batches and threads.
template <class T>
void Fused<T>::layer_backward_centres(LayerArgs<T>& x, bool nodes) {
  if (!nodes) {
    x.dz = nullptr;
    parallel(g_.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre_backward(x, i, scratch); });
    return;
  }
  const int64_t columns = x.shape->edge_columns();
  const int64_t wanted = std::max<int64_t>(1, kBatchBytes / (columns * static_cast<int64_t>(sizeof(T))));
  std::vector<int64_t> first{0};  // centre that every batch begins with
  int64_t rows = 0, smallest = kCentresPerThread * threads_.size();
  while (first.back() < g_.n_local) {
    int64_t end = std::min(first.back() + smallest, g_.n_local);
    while (end < g_.n_local && g_.first_edge[end + 1] - g_.first_edge[first.back()] <= wanted) ++end;
    rows = std::max(rows, g_.first_edge[end] - g_.first_edge[first.back()]);
    first.push_back(end);
  }
  T* dz = dz_.get(2 * rows * columns);
  x.dzn = dzn_.get(g_.n_slot * columns);
  slot_next_.assign(slot_first_.begin(), slot_first_.end() - 1);
  x.slot_next = slot_next_.data();
  const auto n_batch = static_cast<int64_t>(first.size()) - 1,
             n_sum = static_cast<int64_t>(slot_chunks_.size());
  const auto at_batch = [&](int64_t batch) {
    LayerArgs<T> y = x;
    y.dz = dz + batch % 2 * rows * columns;
    y.dz_first = g_.first_edge[first[static_cast<size_t>(batch)]];
    return y;
  };
  for (int64_t batch = 0; batch <= n_batch; ++batch) {
    const LayerArgs<T> now = batch < n_batch ? at_batch(batch) : x,
                       before = batch > 0 ? at_batch(batch - 1) : x;
    const int64_t begin = first[static_cast<size_t>(batch)];
    const int64_t n_centre = batch < n_batch ? first[static_cast<size_t>(batch) + 1] - begin : 0;
    // small tasks last: they even out the threads
    parallel(n_centre + (batch > 0 ? n_sum : 0), [&](int64_t task, Scratch<T>& scratch) {
      if (task < n_centre) {
        kernels_.centre_backward(now, begin + task, scratch);
      } else {
        const SlotChunk& chunk = slot_chunks_[static_cast<size_t>(task - n_centre)];
        kernels_.sum_slots(before, chunk.begin, chunk.end, g_.first_edge[begin]);
      }
    });
  }
}

/// Gradients of layer l: dv_out_ in, dv_ out (left at the centre's own share where `nodes` is false); de_,
/// da_ in place.
template <class T>
void Fused<T>::layer_backward(size_t l, bool nodes, bool from_geometry) {
  const LayerShape& s = layers_[l].shape;
  LayerArgs<T> x = arguments(l, from_geometry);
  x.dv_out = dv_out_.get(g_.n_local * s.np);
  x.dv = dv_.get(g_.n_node * s.np);
  x.de = de_.get(g_.n_edge * s.ep);
  x.da = da_.get(g_.n_angle * layers_[0].shape.ap);
  x.de_live = de_live_, x.da_live = da_live_;
  x.dzc = dzc_.get(g_.n_local * s.edge_columns());
  x.dzca = dzca_.get(g_.n_local * s.angle_columns());
  x.dbig_h = dbig_h_.get(g_.n_local * 3 * s.sym_width());
  x.dmessage = dmessage_.get(g_.n_local * s.heads * s.np);
  x.dsw = dsw_.get(0), x.dh = dh_.get(0), x.dasw = dasw_.get(0);
  std::fill_n(x.dv, g_.n_node * s.np, T(0));
  if (x.dr != nullptr) std::fill_n(x.dr, g_.n_edge, 0.0);
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.nodes_backward(x, begin, end, scratch);
  });
  layer_backward_centres(x, nodes);
  de_live_ = true;
  da_live_ = da_live_ || s.with_angles;
  if (!nodes) return;
  // group by group: within a group every node has one slot, so no two tasks write the same row
  for (size_t group = 0; group + 1 < slot_chunk_splits_.size(); ++group) {
    const size_t first = slot_chunk_splits_[group], count = slot_chunk_splits_[group + 1] - first;
    parallel(static_cast<int64_t>(count), [&](int64_t k, Scratch<T>& scratch) {
      const SlotChunk& chunk = slot_chunks_[first + static_cast<size_t>(k)];
      kernels_.slots_backward(x, chunk.group, chunk.begin, chunk.end, scratch);
    });
  }
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.centres_backward(x, begin, end, scratch);
  });
}

template <class T>
void Fused<T>::start_backward() {
  const LayerShape& s0 = layers_[0].shape;
  std::fill_n(dsw_.get(g_.n_edge), g_.n_edge, 0.0);
  std::fill_n(dh_.get(4 * g_.n_edge), 4 * g_.n_edge, 0.0);
  std::fill_n(dasw_.get(g_.n_angle), g_.n_angle, T(0));
  de_.get(g_.n_edge * s0.ep);
  da_.get(g_.n_angle * s0.ap);
  de_live_ = da_live_ = false;
}

template <class T>
at::Tensor Fused<T>::forward(const PreparedGraph& graph, const at::Tensor& features,
                             const Exchange& with_ghosts, bool gradients) {
  if (!training_) set_groups(features, groups_in_use(graph.node_splits));
  decide_what_to_keep(gradients, graph.n_edge, true);
  return run_forward(graph, with_ghosts, true);
}

template <class T>
void Fused<T>::decide_what_to_keep(bool gradients, int64_t n_edge, bool from_geometry) {
  int64_t numbers = 0;
  for (size_t l = from_geometry && use_dist_ ? 1 : 0; l < layers_.size(); ++l) {
    const LayerShape& s = layers_[l].shape;
    numbers += n_edge * (s.edge_columns() + s.heads * s.np);
  }
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(T)), threads = threads_.size();
  if (keep_bytes_ >= 0) {
    keep_edges_ = gradients && bytes <= keep_bytes_ * threads;
    return;
  }
  int64_t held = 0;
  for (const auto* buffers : {&edge_slope_, &edge_mix_}) {
    for (const Buffer<T>& buffer : *buffers) held += buffer.bytes();
  }
  keep_edges_ = gradients;
  if (!gradients || bytes <= held) return;
  // A quarter of what is free to these threads: the other buffers of a first step need twice as much.
  keep_edges_ = bytes - held <= quarter_of_available_memory();
}

/// `from_geometry`: products with the first layer's edge and angle features are outer products (see
/// LayerArgs::cos).
template <class T>
at::Tensor Fused<T>::run_forward(const PreparedGraph& graph, const Exchange& with_ghosts,
                                 bool from_geometry) {
  view(graph);
  shape_geometry(graph);
  const size_t n_layer = layers_.size();

  {  // embedding
    const LayerShape& s = layers_[0].shape;
    T* v = v_[0].get(g_.n_node * s.np);
    const int64_t* type = graph.types.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < g_.n_node; ++i) {
      std::copy_n(node_table_.data() + type[i] * s.np, s.np, v + i * s.np);
    }
    T* e = e_[0].get(g_.n_edge * s.ep);
    const T *input = edge_input_.get(0), *cos = cos_.get(0);
    T* a = s.with_angles && !from_geometry ? a_[0].get(g_.n_angle * s.ap) : nullptr;
    parallel(g_.n_local, [&](int64_t i, Scratch<T>&) {
      const int64_t e0 = g_.first_edge[i], e1 = g_.first_edge[i + 1];
      for (int64_t k = e0; k < e1; ++k) {
        for (int64_t d = 0; d < s.ep; ++d) {
          e[k * s.ep + d] =
              input[k] * edge_matrix_[static_cast<size_t>(d)] + edge_bias_[static_cast<size_t>(d)];
        }
      }
      if (!use_dist_) kernels_.activate(phi_, e + e0 * s.ep, (e1 - e0) * s.ep);
      if (a == nullptr) return;
      for (int64_t k = g_.first_angle[i]; k < g_.first_angle[i + 1]; ++k) {
        for (int64_t d = 0; d < s.ap; ++d)
          a[k * s.ap + d] = cos[k] * angle_direction_[static_cast<size_t>(d)];
      }
    });
  }

  for (size_t l = 0; l < n_layer; ++l) {
    const LayerShape& s = layers_[l].shape;
    if (l > 0 && with_ghosts) {
      T* v = v_[l].get(g_.n_node * s.np);
      expand<T>(with_ghosts(compact(v, g_.n_local, s.n, s.np)), g_.n_local, g_.n_node - g_.n_local, s.np, v);
    }
    layer_forward(l, from_geometry && l == 0);
  }
  const LayerShape& s = layers_.back().shape;
  return compact(v_[n_layer].get(0), g_.n_local, s.n, s.np);
}

template <class T>
at::Tensor Fused<T>::backward(const PreparedGraph& graph, const at::Tensor& dv_local,
                              const Exchange& without_ghosts) {
  start_backward();
  expand<T>(dv_local, 0, g_.n_local, layers_.back().shape.np,
            dv_out_.get(g_.n_local * layers_.back().shape.np));
  for (size_t l = layers_.size(); l-- > 0;) {
    const LayerShape& s = layers_[l].shape;
    // the features of layer 0 come from the types alone
    layer_backward(l, /*nodes=*/l > 0, /*from_geometry=*/l == 0);
    if (l == 0) break;
    T *dv = dv_.get(0), *dv_out = dv_out_.get(0);
    if (without_ghosts) {
      expand<T>(without_ghosts(compact(dv, g_.n_node, s.n, s.np)), 0, g_.n_local, s.np, dv_out);
    } else {
      std::copy_n(dv, g_.n_local * s.np, dv_out);
    }
  }
  return geometry_backward(graph);
}

template <class T>
LayerTensors Fused<T>::one_layer(const PreparedGraph& graph, const at::Tensor& features, int64_t layer,
                                 const LayerTensors& in) {
  const auto l = static_cast<size_t>(layer);
  set_groups(features, groups_in_use(graph.node_splits));
  view(graph);
  decide_what_to_keep(true, graph.n_edge, false);
  const LayerShape& s = layers_[l].shape;
  expand<T>(in.v, 0, g_.n_node, s.np, v_[l].get(g_.n_node * s.np));
  expand<T>(in.e, 0, g_.n_edge, s.ep, e_[l].get(g_.n_edge * s.ep));
  if (s.with_angles) expand<T>(in.a, 0, g_.n_angle, s.ap, a_[l].get(g_.n_angle * s.ap));
  expand<T>(in.sw.unsqueeze(1), 0, g_.n_edge, 1, sw_.get(g_.n_edge));
  expand<T>(in.asw.unsqueeze(1), 0, g_.n_angle, 1, asw_.get(g_.n_angle));
  expand<T>(in.h * in.sw.unsqueeze(1) / std::sqrt(s.edge_norm), 0, g_.n_edge, 4, h_.get(4 * g_.n_edge));
  layer_forward(l, /*from_geometry=*/false);
  LayerTensors out;
  out.v = compact(v_[l + 1].get(0), g_.n_local, s.n, s.np);
  out.e = s.live_edge ? compact(e_[l + 1].get(0), g_.n_edge, s.e, s.ep) : in.e;
  out.a = s.live_angle ? compact(a_[l + 1].get(0), g_.n_angle, s.a, s.ap) : in.a;
  return out;
}

template <class T>
LayerTensors Fused<T>::one_layer_backward(int64_t layer, const LayerTensors& in,
                                          const LayerTensors& gradients) {
  const auto l = static_cast<size_t>(layer);
  const LayerShape& s = layers_[l].shape;
  start_backward();
  expand<T>(gradients.v, 0, g_.n_local, s.np, dv_out_.get(g_.n_local * s.np));
  expand<T>(gradients.e, 0, g_.n_edge, s.ep, de_.get(g_.n_edge * s.ep));
  de_live_ = true;
  if (s.with_angles) {
    expand<T>(gradients.a, 0, g_.n_angle, s.ap, da_.get(g_.n_angle * s.ap));
    da_live_ = true;
  }
  layer_backward(l, /*nodes=*/true, /*from_geometry=*/false);
  LayerTensors out;
  out.v = compact(dv_.get(0), g_.n_node, s.n, s.np);
  out.e = compact(de_.get(0), g_.n_edge, s.e, s.ep);
  out.a = s.with_angles ? compact(da_.get(0), g_.n_angle, s.a, s.ap) : gradients.a;
  const auto options = at::TensorOptions().dtype(at::kDouble);
  const at::Tensor dh =
      at::from_blob(dh_.get(0), {g_.n_edge, 4}, options).narrow(1, 0, 3) / std::sqrt(s.edge_norm);
  const at::Tensor dsw = at::from_blob(dsw_.get(0), {g_.n_edge}, options);
  out.h = (dh * in.sw.unsqueeze(1)).to(in.h.scalar_type());
  out.sw = (dsw + (dh * in.h).sum(1)).to(in.sw.scalar_type());
  out.asw = compact(dasw_.get(0), g_.n_angle, 1, 1).squeeze(1);
  return out;
}

// --- training ---

/// Tensors of a group in the order of TrainingWeights::kGroupTensors, their shapes, and where they go.
template <class T, class Pointer>
std::vector<std::pair<Pointer*, std::array<int64_t, 2>>> group_layout(
    const LayerShape& s, std::array<Pointer*, TrainingWeights::kGroupSize> to) {
  const int64_t ce = s.edge_columns(), ca = s.angle_columns(), k_edge = s.live_edge ? s.k_edge : 0,
                k_angle1 = s.with_angles ? s.k_angle1 : 0, k_angle2 = s.with_angles ? s.k_angle2 : 0,
                k_angle = s.live_angle ? s.k_angle : 0;
  const std::array<std::array<int64_t, 2>, TrainingWeights::kGroupSize> shapes{{{s.n, s.k_node * s.n},
                                                                                {1, s.k_node * s.n},
                                                                                {1, s.k_node},
                                                                                {s.sym_in(), s.k_sym * s.n},
                                                                                {1, s.k_sym * s.n},
                                                                                {1, s.k_sym},
                                                                                {s.n, ce},
                                                                                {1, ce},
                                                                                {s.n, ce},
                                                                                {s.e, ce},
                                                                                {1, s.k_message},
                                                                                {1, k_edge},
                                                                                {s.n, ca},
                                                                                {1, ca},
                                                                                {s.e, ca},
                                                                                {s.e, ca},
                                                                                {s.a, ca},
                                                                                {1, k_angle1},
                                                                                {1, k_angle},
                                                                                {s.e, k_angle2 * s.e},
                                                                                {1, k_angle2 * s.e},
                                                                                {1, k_angle2}}};
  std::vector<std::pair<Pointer*, std::array<int64_t, 2>>> layout;
  for (size_t k = 0; k < TrainingWeights::kGroupSize; ++k) layout.emplace_back(to[k], shapes[k]);
  return layout;
}

template <class T>
void Fused<T>::set_weights(const TrainingWeights& weights) {
  if (weights.layers.size() != layers_.size()) {
    throw Error("expected weights of " + std::to_string(layers_.size()) + " layers, got " +
                std::to_string(weights.layers.size()));
  }
  training_ = true;
  memory_.clear();
  weights_.clear();
  updates_.clear();
  const auto row = [](const at::Tensor& values) {
    const auto* data = values.const_data_ptr<T>();
    return std::vector<T>(data, data + values.numel());
  };
  edge_matrix_ = row(weights.edge_matrix), edge_bias_ = row(weights.edge_bias);
  if (layers_[0].shape.with_angles) angle_direction_ = row(weights.direction);
  node_table_ = row(weights.node_table);
  const auto hold = [&](const at::Tensor& values) {
    memory_.push_back(values);
    return values.const_data_ptr<T>();
  };
  for (size_t l = 0; l < layers_.size(); ++l) {
    LayerShape& s = layers_[l].shape;
    if (s.np != s.n || s.ep != s.e || (s.with_angles && (s.ap != s.a || s.edge_in != s.e))) {
      throw Error("training needs widths that are multiples of " + std::to_string(kRowBytes / sizeof(T)) +
                  " and uncompressed angles, got n_dim " + std::to_string(s.n) + ", e_dim " +
                  std::to_string(s.e) + ", a_dim " + std::to_string(s.a));
    }
    const TrainingWeights::Layer& layer = weights.layers[l];
    UpdateVectors<T> update;
    update.n = hold(layer.update_n);
    if (s.live_edge) update.e = hold(layer.update_e);
    if (s.live_angle) update.a = hold(layer.update_a);
    updates_.push_back(update);
    std::vector<GroupWeights<T>> groups(layer.groups.size());
    for (size_t g = 0; g < groups.size(); ++g) {
      const std::vector<at::Tensor>& from = layer.groups[g];
      if (from.empty()) continue;
      GroupWeights<T>& w = groups[g];
      s.k_node = from[2].numel(), s.k_sym = from[5].numel(), s.k_message = from[10].numel();
      s.k_edge = from[11].numel();
      if (s.with_angles) s.k_angle1 = from[17].numel(), s.k_angle2 = from[21].numel();
      s.k_angle = from[18].numel();
      const auto layout = group_layout<T, const T*>(
          s,
          {&w.node,    &w.node_b,   &w.p_node,    &w.sym,    &w.sym_b,    &w.p_sym,   &w.edge_c,  &w.edge_b,
           &w.edge_n,  &w.edge_e,   &w.p_message, &w.p_edge, &w.angle_c,  &w.angle_b, &w.angle_j, &w.angle_k,
           &w.angle_a, &w.p_angle1, &w.p_angle,   &w.angle2, &w.angle2_b, &w.p_angle2});
      for (size_t k = 0; k < layout.size(); ++k) {
        const auto& [to, shape] = layout[k];
        if (from[k].numel() != shape[0] * shape[1]) {
          throw Error(std::string("expected ") + TrainingWeights::kGroupTensors[k] + " of layer " +
                      std::to_string(l) + " with " + std::to_string(shape[0]) + " x " +
                      std::to_string(shape[1]) + " elements, got " + std::to_string(from[k].numel()));
        }
        *to = hold(from[k]);
      }
      const auto transposed = [&](size_t k) {
        const auto& shape = layout[k].second;
        return hold(from[k].reshape({shape[0], shape[1]}).t().contiguous());
      };
      w.node_t = transposed(0), w.sym_t = transposed(3), w.edge_c_t = transposed(6),
      w.edge_n_t = transposed(8), w.edge_e_t = transposed(9);
      if (l == 0) this->pack_first_layer(s, w);
      if (!s.with_angles) continue;
      w.angle_c_t = transposed(12), w.angle_j_t = transposed(14), w.angle_k_t = transposed(15),
      w.angle_a_t = transposed(16), w.angle2_t = transposed(19);
      at::Tensor far = from[20].clone();
      kernels_.activate(s.phi, far.template mutable_data_ptr<T>(), far.numel());
      w.angle2_far = hold(from[21].reshape({1, -1}).matmul(far.reshape({s.k_angle2, s.e})));
    }
    weights_.push_back(std::move(groups));
  }
}

template <class T>
TrainingWeights Fused<T>::backward_to_train(const PreparedGraph& graph, const at::Tensor& dv_local) {
  const auto n_thread = static_cast<size_t>(threads_.size());
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  if (scratch_.size() < n_thread) scratch_.resize(n_thread);
  gradient_memory_.resize(scratch_.size());
  TrainingWeights out;
  out.layers.resize(layers_.size());
  start_backward();
  expand<T>(dv_local, 0, g_.n_local, layers_.back().shape.np,
            dv_out_.get(g_.n_local * layers_.back().shape.np));
  for (size_t l = layers_.size(); l-- > 0;) {
    const LayerShape& s = layers_[l].shape;
    TrainingWeights::Layer& layer = out.layers[l];
    const size_t n_group = weights_[l].size();
    layer.groups.resize(n_group);
    // one array of gradients per thread: first the tensors of TrainingWeights, then the sums that only serve
    // here
    std::vector<std::vector<GroupGradients<T>>> gradients(scratch_.size(),
                                                          std::vector<GroupGradients<T>>(n_group));
    T* unused = nullptr;
    int64_t size = 0;
    std::vector<int64_t> begin(n_group, -1);
    const int64_t ye = s.live_edge ? s.k_edge * s.e : 0, yh = s.k_message * s.heads * s.n,
                  y1 = s.with_angles ? s.k_angle1 * s.e : 0, y2 = s.with_angles ? s.k_angle2 * s.e : 0,
                  ya = s.live_angle ? s.k_angle * s.a : 0;
    const auto place = [&](T* memory, GroupGradients<T>& g) {
      T* at = memory;
      for (const auto& [to, shape] : group_layout<T, T*>(
               s, {&g.node,    &g.node_b, &unused, &g.sym,    &g.sym_b,    &unused,    &g.edge_c,  &g.edge_b,
                   &g.edge_n,  &g.edge_e, &unused, &unused,   &g.angle_c,  &g.angle_b, &g.angle_j, &g.angle_k,
                   &g.angle_a, &unused,   &unused, &g.angle2, &g.angle2_b, &unused})) {
        if (to == &unused) continue;
        *to = at;
        at += shape[0] * shape[1];
      }
      for (auto [to, n] :
           {std::pair{&g.y_node, s.k_node * s.n}, std::pair{&g.y_sym, s.k_sym * s.n},
            std::pair{&g.y_message, yh}, std::pair{&g.y_edge, ye}, std::pair{&g.y_angle1, y1},
            std::pair{&g.y_angle, ya}, std::pair{&g.y_angle2, y2}, std::pair{&g.far, s.with_angles ? s.e : 0},
            std::pair{&g.update_n, s.heads * s.n}}) {
        *to = at;
        at += n;
      }
      return at - memory;
    };
    GroupGradients<T> probe;
    T none[1];
    const int64_t per_group = place(none, probe);
    for (size_t g = 0; g < n_group; ++g) {
      if (weights_[l][g].node == nullptr) continue;
      begin[g] = size;
      size += per_group;
    }
    for (size_t thread = 0; thread < scratch_.size(); ++thread) {
      T* memory = gradient_memory_[thread].get(size);
      std::fill_n(memory, size, T(0));
      for (size_t g = 0; g < n_group; ++g) {
        if (begin[g] >= 0) place(memory + begin[g], gradients[thread][g]);
      }
      scratch_[thread].gradients = gradients[thread].data();
    }
    layer_backward(l, /*nodes=*/true, /*from_geometry=*/false);
    for (Scratch<T>& scratch : scratch_) scratch.gradients = nullptr;
    for (size_t thread = 1; thread < scratch_.size(); ++thread) {
      T* sum = gradient_memory_[0].get(size);
      const T* part = gradient_memory_[thread].get(size);
      for (int64_t k = 0; k < size; ++k) sum[k] += part[k];
    }
    layer.update_n = at::zeros({2 + s.heads, s.n}, options);
    layer.update_e = at::zeros({s.live_edge ? 2 : 0, s.e}, options);
    layer.update_a = at::zeros({s.live_angle ? 1 : 0, s.a}, options);
    for (size_t g = 0; g < n_group; ++g) {
      if (begin[g] < 0) continue;
      const GroupGradients<T>& from = gradients[0][g];
      const GroupWeights<T>& w = weights_[l][g];
      const UpdateVectors<T>& u = updates_[l];
      std::vector<at::Tensor>& group = layer.groups[g];
      const std::array<T*, TrainingWeights::kGroupSize> pointers{
          from.node,    from.node_b,  nullptr,       from.sym,     from.sym_b,   nullptr,
          from.edge_c,  from.edge_b,  from.edge_n,   from.edge_e,  nullptr,      nullptr,
          from.angle_c, from.angle_b, from.angle_j,  from.angle_k, from.angle_a, nullptr,
          nullptr,      from.angle2,  from.angle2_b, nullptr};
      std::array<const T*, TrainingWeights::kGroupSize> dummy{};
      std::array<const T**, TrainingWeights::kGroupSize> slots{};
      for (size_t k = 0; k < slots.size(); ++k) slots[k] = &dummy[k];
      const auto layout = group_layout<T, const T*>(s, slots);
      for (size_t k = 0; k < layout.size(); ++k) {
        const auto& shape = layout[k].second;
        at::Tensor values = at::zeros({shape[0], shape[1]}, options);
        if (pointers[k] != nullptr) {
          std::copy_n(pointers[k], values.numel(), values.template mutable_data_ptr<T>());
        }
        group.push_back(values);
      }
      // y: sums over rows of activation times gradient of the output, per expert and column
      const auto split = [&](const T* y, int64_t k, int64_t width, const T* p, const T* coefficients,
                             at::Tensor& dp, T* d_coefficients) {
        T* to = dp.mutable_data_ptr<T>();
        for (int64_t e = 0; e < k; ++e) {
          double total = 0.0;
          for (int64_t d = 0; d < width; ++d) {
            const T value = y[e * width + d];
            total += coefficients == nullptr ? double(value) : double(coefficients[d]) * double(value);
            if (d_coefficients != nullptr) d_coefficients[d] += p[e] * value;
          }
          to[e] = T(total);
        }
      };
      T *dn = layer.update_n.mutable_data_ptr<T>(), *de = layer.update_e.mutable_data_ptr<T>(),
        *da = layer.update_a.mutable_data_ptr<T>();
      split(from.y_node, s.k_node, s.n, w.p_node, u.n, group[2], dn);
      split(from.y_sym, s.k_sym, s.n, w.p_sym, u.n + s.n, group[5], dn + s.n);
      split(from.y_message, s.k_message, s.heads * s.n, w.p_message, nullptr, group[10], nullptr);
      for (int64_t d = 0; d < s.heads * s.n; ++d) dn[2 * s.n + d] += from.update_n[d];
      if (s.live_edge) split(from.y_edge, s.k_edge, s.e, w.p_edge, u.e, group[11], de);
      if (s.with_angles) {
        split(from.y_angle1, s.k_angle1, s.e, w.p_angle1, nullptr, group[17], nullptr);
        // an edge without message: the update is a constant, sum_k p_k phi(b_k)
        std::vector<T> y(static_cast<size_t>(y2)), slope(static_cast<size_t>(y2));
        std::copy_n(w.angle2_b, y2, y.data());
        kernels_.activate_with_slope(s.phi, y.data(), slope.data(), y2);
        T* db = group[20].mutable_data_ptr<T>();
        for (int64_t k = 0; k < s.k_angle2; ++k) {
          for (int64_t d = 0; d < s.e; ++d) {
            const int64_t at = k * s.e + d;
            from.y_angle2[at] += y[static_cast<size_t>(at)] * from.far[d];
            db[at] += w.p_angle2[k] * slope[static_cast<size_t>(at)] * u.e[s.e + d] * from.far[d];
          }
        }
        split(from.y_angle2, s.k_angle2, s.e, w.p_angle2, u.e + s.e, group[21], de + s.e);
      }
      if (s.live_angle) split(from.y_angle, s.k_angle, s.a, w.p_angle, u.a, group[18], da);
    }
    if (l > 0) std::copy_n(dv_.get(0), g_.n_local * s.np, dv_out_.get(0));
  }
  // embedding
  const LayerShape& s = layers_[0].shape;
  out.edge_matrix = at::zeros({s.e}, options), out.edge_bias = at::zeros({s.e}, options);
  out.direction = at::zeros({s.with_angles ? s.a : 0}, options);
  out.node_table = at::zeros({static_cast<int64_t>(node_table_.size()) / s.n, s.n}, options);
  T *dw = out.edge_matrix.template mutable_data_ptr<T>(), *db = out.edge_bias.template mutable_data_ptr<T>();
  const T *input = edge_input_.get(0), *de = de_.get(0), *dv = dv_.get(0);
  std::vector<T> z(static_cast<size_t>(s.e)), slope(static_cast<size_t>(s.e), T(1));
  for (int64_t edge = 0; edge < g_.n_edge; ++edge) {
    if (!use_dist_) {
      for (int64_t d = 0; d < s.e; ++d) {
        const auto at = static_cast<size_t>(d);
        z[at] = input[edge] * edge_matrix_[at] + edge_bias_[at];
      }
      kernels_.activate_with_slope(phi_, z.data(), slope.data(), s.e);
    }
    for (int64_t d = 0; d < s.e; ++d) {
      const T dz = de[edge * s.e + d] * slope[static_cast<size_t>(d)];
      dw[d] += input[edge] * dz;
      db[d] += dz;
    }
  }
  if (s.with_angles) {
    T* to = out.direction.template mutable_data_ptr<T>();
    const T *cos = cos_.get(0), *da = da_.get(0);
    for (int64_t k = 0; k < g_.n_angle; ++k) {
      for (int64_t d = 0; d < s.a; ++d) to[d] += cos[k] * da[k * s.a + d];
    }
  }
  T* table = out.node_table.template mutable_data_ptr<T>();
  const int64_t* type = graph.types.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < g_.n_local; ++i) {
    for (int64_t d = 0; d < s.n; ++d) table[type[i] * s.n + d] += dv[i * s.n + d];
  }
  return out;
}

template <class T>
int64_t Fused<T>::bytes() const {
  int64_t total = Packed::packed_bytes();
  for (const auto* group :
       {&v_, &e_, &a_, &m_, &big_h_, &message_, &zc_, &zn_, &zca_, &node_slope_, &edge_slope_, &edge_mix_}) {
    for (const Buffer<T>& buffer : *group) total += buffer.bytes();
  }
  for (const Buffer<T>* buffer : {&sw_, &h_, &asw_, &cos_, &edge_input_, &dv_, &dv_out_, &de_, &da_, &dz_,
                                  &dzc_, &dzca_, &dbig_h_, &dmessage_, &dasw_, &dcos_, &dzn_}) {
    total += buffer->bytes();
  }
  return total;
}

}  // namespace

std::unique_ptr<FusedModel> make_fused_model(const Module& geometry, const Module& embedding,
                                             const std::vector<Module>& layers, at::ScalarType dtype,
                                             ThreadPool& threads, std::string& reason,
                                             const DeferredTensors* deferred) {
  try {
    if (dtype == at::kFloat)
      return std::make_unique<Fused<float>>(geometry, embedding, layers, threads, deferred);
    return std::make_unique<Fused<double>>(geometry, embedding, layers, threads, deferred);
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

}  // namespace moecalc
