#include "backends/cpu/fused_layers.h"

#include <cmath>
#include <utility>

#include "backends/backend.h"
#include "core/memory.h"

namespace moecalc {

using namespace ops;

namespace {

constexpr int64_t kRows = 32;  // rows of nodes or slots that one task works on
/// Backward: gradients of edges are summed over the edges of a neighbour. Centres are worked on in batches,
/// so that these rows are read again while they are in the last-level cache.
constexpr int64_t kBatchBytes = int64_t{4} << 20;
constexpr int64_t kCentresPerThread = 8;  // at least, in a batch
constexpr double kBelowOne = 1.0 - 1e-6;  // keeps cosines within (-1, 1)
constexpr double kLengthShift = 1e-6;     // Angstrom, of the length that an angle's direction is divided by

template <class T>
int64_t bytes_of_all(const std::vector<Buffer<T>>& buffers) {
  int64_t total = 0;
  for (const Buffer<T>& buffer : buffers) total += buffer.bytes();
  return total;
}

}  // namespace

template <class T>
LayerBuffers<T>::LayerBuffers(size_t n_layer) {
  for (auto* buffers : {&v, &e, &a}) buffers->resize(n_layer + 1);
  for (auto* buffers : {&m, &big_h, &message, &zc, &zn, &zca, &node_slope, &edge_slope, &edge_mix}) {
    buffers->resize(n_layer);
  }
}

template <class T>
int64_t LayerBuffers<T>::bytes() const {
  int64_t total = 0;
  for (const auto* of_layers :
       {&v, &e, &a, &m, &big_h, &message, &zc, &zn, &zca, &node_slope, &edge_slope, &edge_mix}) {
    total += bytes_of_all(*of_layers);
  }
  for (const auto* buffer : {&sw, &h, &asw, &cos, &edge_input, &dv, &dv_out, &de, &da, &dz, &dzn, &dzc, &dzca,
                             &dbig_h, &dmessage, &dasw, &dcos}) {
    total += buffer->bytes();
  }
  for (const auto* buffer : {&r, &ds, &angle_sw, &unit, &dr, &dsw, &dh, &dangle}) total += buffer->bytes();
  return total;
}

template <class T>
FusedLayers<T>::FusedLayers(const ModelWeights<T>& weights, const GeometryRules& geometry,
                            const Kernels<T>& kernels, ThreadPool& threads, std::optional<int64_t> keep_bytes)
    : weights_(weights),
      geometry_(geometry),
      kernels_(kernels),
      threads_(threads),
      keep_bytes_(keep_bytes),
      buffers_(weights.shapes.size()) {}

template <class T>
void FusedLayers<T>::set_statistics(const std::vector<double>& mean, const std::vector<double>& stddev) {
  geometry_.mean = mean;
  geometry_.stddev = stddev;
}

template <class T>
std::vector<Scratch<T>>& FusedLayers<T>::scratch() {
  const auto n_thread = static_cast<size_t>(threads_.size());
  if (scratch_.size() < n_thread) scratch_.resize(n_thread);
  return scratch_;
}

template <class T>
void FusedLayers<T>::take_timings(Timings& timings) {
  static constexpr const char* names[] = {"angles",          "edges",          "symmetrisation",
                                          "angles backward", "edges backward", "symmetrisation backward"};
  for (size_t part = 0; part < std::size(names); ++part) {
    double total = 0.0;
    for (Scratch<T>& scratch : scratch_) total += std::exchange(scratch.seconds[part], 0.0);
    timings.emplace_back(names[part], total / static_cast<double>(std::max<size_t>(1, scratch_.size())));
  }
}

// --- the graph ---

template <class T>
void FusedLayers<T>::set_graph(const PreparedGraph& graph) {
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

/// Distances, switches, directions and cosines, computed in float64 and stored in the network's dtype.
template <class T>
void FusedLayers<T>::shape_geometry(const PreparedGraph& graph) {
  const int64_t n_edge = graph.n_edge;
  const double* vec = graph.edge_vec.data();
  const bool angles = shape(0).with_angles;
  double* r = buffers_.r.get(n_edge);
  double* ds = buffers_.ds.get(n_edge);
  double* sa = buffers_.angle_sw.get(2 * n_edge);
  double* unit = buffers_.unit.get(3 * n_edge);
  T* sw = buffers_.sw.get(n_edge);
  T* h = buffers_.h.get(4 * n_edge);
  T* input = buffers_.edge_input.get(n_edge);
  T* cos = buffers_.cos.get(graph.n_angle);
  T* asw = buffers_.asw.get(graph.n_angle);
  const double norm = 1.0 / std::sqrt(shape(0).edge_norm);
  parallel(graph.n_local, [&](int64_t i, Scratch<T>&) {
    const int64_t type = graph.types[static_cast<size_t>(i)];
    const double* mean = geometry_.mean.data() + 4 * type;
    const double* stddev = geometry_.stddev.data() + 4 * type;
    const int64_t e0 = graph_.first_edge[i], m = graph_.n_close[i];
    for (int64_t e = e0; e < graph_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      r[e] = std::sqrt(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
      double s;
      geometry_.edge(r[e], s, ds[e]);
      const double rp = r[e] + geometry_.protection;
      sw[e] = T(s);
      input[e] = T(geometry_.use_dist ? r[e] : (s / rp - mean[0]) / stddev[0]);
      for (int c = 0; c < 3; ++c) {
        h[4 * e + c] = T(norm * s * (s * x[c] / (rp * rp) - mean[c + 1]) / stddev[c + 1]);
      }
      h[4 * e + 3] = T(0);
    }
    if (!angles) return;
    for (int64_t e = e0; e < e0 + m; ++e) {
      geometry_.angle(r[e], sa[2 * e], sa[2 * e + 1]);
      for (int c = 0; c < 3; ++c) unit[3 * e + c] = vec[3 * e + c] / (r[e] + kLengthShift);
    }
    int64_t at = graph_.first_angle[i];
    for (int64_t j = e0; j < e0 + m; ++j) {
      for (int64_t k = e0; k < e0 + m; ++k, ++at) {
        cos[at] = T((unit[3 * j] * unit[3 * k] + unit[3 * j + 1] * unit[3 * k + 1] +
                     unit[3 * j + 2] * unit[3 * k + 2]) *
                    kBelowOne);
        asw[at] = T(sa[2 * j] * sa[2 * k]);
      }
    }
  });
}

template <class T>
Array FusedLayers<T>::geometry_backward(const PreparedGraph& graph) {
  const double* vec = graph.edge_vec.data();
  const LayerShape& s0 = shape(0);
  const double norm = 1.0 / std::sqrt(s0.edge_norm);
  Array gradient = Array::empty({graph.n_edge, 3}, Dtype::float64);
  auto* g = gradient.data<double>();
  const double* r = buffers_.r.get(0);
  const double* ds = buffers_.ds.get(0);
  const double* sa = buffers_.angle_sw.get(0);
  const double* unit = buffers_.unit.get(0);
  const double* dsw_in = buffers_.dsw.get(0);
  const double* dh = buffers_.dh.get(0);
  const double* dr_in = buffers_.dr.get(0);
  const T* dasw = buffers_.dasw.get(0);
  const T* dcos_in = buffers_.dcos.get(0);
  const T* de = buffers_.de.get(0);
  const T* input = buffers_.edge_input.get(0);
  const T* edge_matrix = weights_.edge_matrix.data();
  const T* edge_bias = weights_.edge_bias.data();
  double* work = buffers_.dangle.get(4 * graph.n_edge);
  parallel(graph.n_local, [&](int64_t i, Scratch<T>& scratch) {
    const int64_t type = graph.types[static_cast<size_t>(i)];
    const double* mean = geometry_.mean.data() + 4 * type;
    const double* stddev = geometry_.stddev.data() + 4 * type;
    const int64_t e0 = graph_.first_edge[i], m = graph_.n_close[i];
    std::fill(work + 4 * e0, work + 4 * (e0 + m), 0.0);
    if (s0.with_angles) {
      int64_t at = graph_.first_angle[i];
      for (int64_t j = e0; j < e0 + m; ++j) {
        for (int64_t k = e0; k < e0 + m; ++k, ++at) {
          const double dcos = double(dcos_in[at]) * kBelowOne;
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
    for (int64_t e = e0; e < graph_.first_edge[i + 1]; ++e) {
      const double* x = vec + 3 * e;
      const double rp = r[e] + geometry_.protection, q = 1.0 / (rp * rp);
      double switched, unused;
      geometry_.edge(r[e], switched, unused);
      double dr = 0.0, dsw = dsw_in[e], dx[3] = {0.0, 0.0, 0.0};
      // e = input W + b, activated unless the input is the distance
      double dinput = 0.0;
      if (!weights_.use_dist) {
        for (int64_t d = 0; d < s0.ep; ++d) z[d] = input[e] * edge_matrix[d] + edge_bias[d];
        kernels_.activate_with_slope(weights_.phi, z, slope, s0.ep);
        for (int64_t d = 0; d < s0.ep; ++d) {
          dinput += double(de[e * s0.ep + d] * slope[d] * edge_matrix[d]);
        }
      } else {
        T total = 0;
        for (int64_t d = 0; d < s0.ep; ++d) total += de[e * s0.ep + d] * edge_matrix[d];
        dinput = dr_in[e] + double(total);
      }
      if (geometry_.use_dist) {
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
        const double length = r[e] + kLengthShift;
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

// --- one layer ---

template <class T>
LayerArgs<T> FusedLayers<T>::arguments(size_t layer, bool from_geometry) {
  const LayerShape& s = shape(layer);
  const GraphView& g = graph_;
  LayerBuffers<T>& b = buffers_;
  LayerArgs<T> x;
  x.shape = &s;
  x.graph = &g;
  x.weights = weights_.groups[layer].data();
  x.update = weights_.updates[layer];
  x.v = b.v[layer].get(g.n_node * s.np);
  x.e = b.e[layer].get(g.n_edge * s.ep);
  if (from_geometry && weights_.use_dist) {
    x.r = b.edge_input.get(0);
    x.dr = b.dr.get(g.n_edge);
  }
  if (s.with_angles && from_geometry) {
    x.cos = b.cos.get(0);
    x.direction = weights_.angle_direction.data();
    x.dcos = b.dcos.get(g.n_angle);
  } else if (s.with_angles) {
    x.a = b.a[layer].get(g.n_angle * s.ap);
  }
  x.sw = b.sw.get(0);
  x.h = b.h.get(0);
  x.asw = b.asw.get(0);
  x.zc = b.zc[layer].get(g.n_local * s.edge_columns());
  x.zn = b.zn[layer].get(g.n_slot * s.edge_columns());
  x.zca = b.zca[layer].get(g.n_local * s.angle_columns());
  if (keep_edges_ && x.r == nullptr) {  // products with distances are cheaper than memory
    x.edge_slope = b.edge_slope[layer].get(g.n_edge * s.edge_columns());
    x.edge_mix = b.edge_mix[layer].get(g.n_edge * s.heads * s.np);
  }
  x.node_slope = b.node_slope[layer].get(g.n_local * (s.k_node + s.k_sym) * s.np);
  x.big_h = b.big_h[layer].get(g.n_local * 3 * s.sym_width());
  x.m = s.with_angles ? b.m[layer].get(g.n_edge * s.ep) : nullptr;
  x.message = b.message[layer].get(g.n_local * s.heads * s.np);
  return x;
}

template <class T>
void FusedLayers<T>::project(const LayerArgs<T>& x) {
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.project_centres(x, begin, end, scratch);
  });
  parallel(static_cast<int64_t>(slot_chunks_.size()), [&](int64_t k, Scratch<T>& scratch) {
    const Chunk& chunk = slot_chunks_[static_cast<size_t>(k)];
    kernels_.project_slots(x, chunk.group, chunk.begin, chunk.end, scratch);
  });
}

template <class T>
void FusedLayers<T>::layer_forward(size_t l, bool from_geometry) {
  const LayerShape& s = shape(l);
  LayerArgs<T> x = arguments(l, from_geometry);
  x.v_out = buffers_.v[l + 1].get(graph_.n_node * s.np);
  // outputs that no later layer reads do not exist
  if (s.live_edge) x.e_out = buffers_.e[l + 1].get(graph_.n_edge * s.ep);
  if (s.live_angle) x.a_out = buffers_.a[l + 1].get(graph_.n_angle * s.ap);
  project(x);
  parallel(graph_.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre(x, i, scratch); });
  parallel_rows(
      [&](int64_t begin, int64_t end, Scratch<T>& scratch) { kernels_.nodes(x, begin, end, scratch); });
}

/// centre_backward for all centres, and the sums of dz over the edges of every slot. While a batch of centres
/// is worked on, the rows of the batch before it are summed: two buffers, one barrier per batch. Every sum
/// runs in the order of the edges, whatever the batches and threads.
template <class T>
void FusedLayers<T>::layer_backward_centres(LayerArgs<T>& x, bool nodes) {
  const GraphView& g = graph_;
  if (!nodes) {
    x.dz = nullptr;
    parallel(g.n_local, [&](int64_t i, Scratch<T>& scratch) { kernels_.centre_backward(x, i, scratch); });
    return;
  }
  const int64_t columns = x.shape->edge_columns();
  const int64_t wanted = std::max<int64_t>(1, kBatchBytes / (columns * static_cast<int64_t>(sizeof(T))));
  const int64_t smallest = kCentresPerThread * threads_.size();
  std::vector<int64_t> first{0};  // centre that every batch begins with
  int64_t rows = 0;
  while (first.back() < g.n_local) {
    int64_t end = std::min(first.back() + smallest, g.n_local);
    while (end < g.n_local && g.first_edge[end + 1] - g.first_edge[first.back()] <= wanted) ++end;
    rows = std::max(rows, g.first_edge[end] - g.first_edge[first.back()]);
    first.push_back(end);
  }
  T* dz = buffers_.dz.get(2 * rows * columns);
  x.dzn = buffers_.dzn.get(g.n_slot * columns);
  slot_next_.assign(slots_.first.begin(), slots_.first.end() - 1);
  x.slot_next = slot_next_.data();
  const auto n_batch = static_cast<int64_t>(first.size()) - 1;
  const auto n_sum = static_cast<int64_t>(slot_chunks_.size());
  const auto at_batch = [&](int64_t batch) {
    LayerArgs<T> y = x;
    y.dz = dz + batch % 2 * rows * columns;
    y.dz_first = g.first_edge[first[static_cast<size_t>(batch)]];
    return y;
  };
  for (int64_t batch = 0; batch <= n_batch; ++batch) {
    const LayerArgs<T> now = batch < n_batch ? at_batch(batch) : x;
    const LayerArgs<T> before = batch > 0 ? at_batch(batch - 1) : x;
    const int64_t begin = first[static_cast<size_t>(batch)];
    const int64_t n_centre = batch < n_batch ? first[static_cast<size_t>(batch) + 1] - begin : 0;
    // small tasks last: they even out the threads
    parallel(n_centre + (batch > 0 ? n_sum : 0), [&](int64_t task, Scratch<T>& scratch) {
      if (task < n_centre) {
        kernels_.centre_backward(now, begin + task, scratch);
      } else {
        const Chunk& chunk = slot_chunks_[static_cast<size_t>(task - n_centre)];
        kernels_.sum_slots(before, chunk.begin, chunk.end, g.first_edge[begin]);
      }
    });
  }
}

template <class T>
void FusedLayers<T>::layer_backward(size_t l, bool nodes, bool from_geometry) {
  const LayerShape& s = shape(l);
  const GraphView& g = graph_;
  LayerBuffers<T>& b = buffers_;
  LayerArgs<T> x = arguments(l, from_geometry);
  x.dv_out = b.dv_out.get(g.n_local * s.np);
  x.dv = b.dv.get(g.n_node * s.np);
  x.de = b.de.get(g.n_edge * s.ep);
  x.da = b.da.get(g.n_angle * shape(0).ap);
  x.de_live = de_live_;
  x.da_live = da_live_;
  x.dzc = b.dzc.get(g.n_local * s.edge_columns());
  x.dzca = b.dzca.get(g.n_local * s.angle_columns());
  x.dbig_h = b.dbig_h.get(g.n_local * 3 * s.sym_width());
  x.dmessage = b.dmessage.get(g.n_local * s.heads * s.np);
  x.dsw = b.dsw.get(0);
  x.dh = b.dh.get(0);
  x.dasw = b.dasw.get(0);
  std::fill_n(x.dv, g.n_node * s.np, T(0));
  if (x.dr != nullptr) std::fill_n(x.dr, g.n_edge, 0.0);
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
      const Chunk& chunk = slot_chunks_[first + static_cast<size_t>(k)];
      kernels_.slots_backward(x, chunk.group, chunk.begin, chunk.end, scratch);
    });
  }
  parallel_rows([&](int64_t begin, int64_t end, Scratch<T>& scratch) {
    kernels_.centres_backward(x, begin, end, scratch);
  });
}

// --- all layers ---

template <class T>
Array FusedLayers<T>::forward(const PreparedGraph& graph, GhostExchange* exchange, bool gradients) {
  set_graph(graph);
  decide_what_to_keep(gradients, true);
  return run_forward(graph, exchange, true);
}

template <class T>
Array FusedLayers<T>::forward_to_train(const PreparedGraph& graph) {
  set_graph(graph);
  keep_edges_ = false;  // gradients of weights need the activations themselves
  return run_forward(graph, nullptr, false);
}

template <class T>
void FusedLayers<T>::decide_what_to_keep(bool gradients, bool from_geometry) {
  int64_t numbers = 0;
  for (size_t l = from_geometry && weights_.use_dist ? 1 : 0; l < weights_.shapes.size(); ++l) {
    const LayerShape& s = shape(l);
    numbers += graph_.n_edge * (s.edge_columns() + s.heads * s.np);
  }
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(T));
  if (keep_bytes_) {
    keep_edges_ = gradients && bytes <= *keep_bytes_ * threads_.size();
    return;
  }
  const int64_t held = bytes_of_all(buffers_.edge_slope) + bytes_of_all(buffers_.edge_mix);
  keep_edges_ = gradients;
  if (!gradients || bytes <= held) return;
  // A quarter of what is free to these threads: the other buffers of a first step need twice as much.
  keep_edges_ = bytes - held <= quarter_of_available_memory();
}

/// Inputs of the first layer.
template <class T>
void FusedLayers<T>::embed(const PreparedGraph& graph, bool from_geometry) {
  const LayerShape& s = shape(0);
  const T* table = weights_.node_table.data();
  const T* edge_matrix = weights_.edge_matrix.data();
  const T* edge_bias = weights_.edge_bias.data();
  const T* angle_direction = weights_.angle_direction.data();
  T* v = buffers_.v[0].get(graph_.n_node * s.np);
  for (int64_t i = 0; i < graph_.n_node; ++i) {
    std::copy_n(table + graph.types[static_cast<size_t>(i)] * s.np, s.np, v + i * s.np);
  }
  T* e = buffers_.e[0].get(graph_.n_edge * s.ep);
  T* a = s.with_angles && !from_geometry ? buffers_.a[0].get(graph_.n_angle * s.ap) : nullptr;
  const T* input = buffers_.edge_input.get(0);
  const T* cos = buffers_.cos.get(0);
  parallel(graph_.n_local, [&](int64_t i, Scratch<T>&) {
    const int64_t e0 = graph_.first_edge[i], e1 = graph_.first_edge[i + 1];
    for (int64_t k = e0; k < e1; ++k) {
      for (int64_t d = 0; d < s.ep; ++d) e[k * s.ep + d] = input[k] * edge_matrix[d] + edge_bias[d];
    }
    if (!weights_.use_dist) kernels_.activate(weights_.phi, e + e0 * s.ep, (e1 - e0) * s.ep);
    if (a == nullptr) return;
    for (int64_t k = graph_.first_angle[i]; k < graph_.first_angle[i + 1]; ++k) {
      for (int64_t d = 0; d < s.ap; ++d) a[k * s.ap + d] = cos[k] * angle_direction[d];
    }
  });
}

template <class T>
Array FusedLayers<T>::run_forward(const PreparedGraph& graph, GhostExchange* exchange, bool from_geometry) {
  shape_geometry(graph);
  embed(graph, from_geometry);
  const size_t n_layer = weights_.shapes.size();
  for (size_t l = 0; l < n_layer; ++l) {
    const LayerShape& s = shape(l);
    if (l > 0 && exchange != nullptr) {
      T* v = buffers_.v[l].get(graph_.n_node * s.np);
      const Array owned = unpadded(v, graph_.n_local, s.n, s.np);
      put_rows(with_ghosts(graph, owned, exchange), graph_.n_local, graph_.n_node - graph_.n_local, s.np, v);
    }
    layer_forward(l, from_geometry && l == 0);
  }
  const LayerShape& s = shape(n_layer - 1);
  return unpadded(buffers_.v[n_layer].get(0), graph_.n_local, s.n, s.np);
}

template <class T>
void FusedLayers<T>::start_backward(const Array& dv_local, size_t last_layer) {
  const GraphView& g = graph_;
  const LayerShape& s0 = shape(0);
  const int64_t stride = shape(last_layer).np;
  std::fill_n(buffers_.dsw.get(g.n_edge), g.n_edge, 0.0);
  std::fill_n(buffers_.dh.get(4 * g.n_edge), 4 * g.n_edge, 0.0);
  std::fill_n(buffers_.dasw.get(g.n_angle), g.n_angle, T(0));
  buffers_.de.get(g.n_edge * s0.ep);
  buffers_.da.get(g.n_angle * s0.ap);
  de_live_ = da_live_ = false;
  put_rows(dv_local, 0, g.n_local, stride, buffers_.dv_out.get(g.n_local * stride));
}

template <class T>
Array FusedLayers<T>::backward(const PreparedGraph& graph, const Array& dv_local, GhostExchange* exchange) {
  const size_t n_layer = weights_.shapes.size();
  start_backward(dv_local, n_layer - 1);
  for (size_t l = n_layer; l-- > 0;) {
    const LayerShape& s = shape(l);
    // the features of layer 0 come from the types alone
    layer_backward(l, /*nodes=*/l > 0, /*from_geometry=*/l == 0);
    if (l == 0) break;
    const T* dv = buffers_.dv.get(0);
    T* dv_out = buffers_.dv_out.get(0);
    if (exchange != nullptr) {
      const Array all = unpadded(dv, graph_.n_node, s.n, s.np);
      put_rows(without_ghosts(graph, all, exchange), 0, graph_.n_local, s.np, dv_out);
    } else {
      std::copy_n(dv, graph_.n_local * s.np, dv_out);
    }
  }
  return geometry_backward(graph);
}

template struct LayerBuffers<float>;
template struct LayerBuffers<double>;
template class FusedLayers<float>;
template class FusedLayers<double>;

}  // namespace moecalc
