// What a step writes on the target: how much of everything a system needs, and its memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "backends/cuda/memory.h"
#include "kernels/common/layer.h"
#include "kernels/cuda/geometry.cuh"
#include "kernels/cuda/readout.cuh"
#include "moecalc/evaluator.h"

namespace moecalc::cuda {

/// Extent of a system, or capacity for one.
struct Sizes {
  int64_t n_local = 0;
  int64_t n_node = 0;
  int64_t n_list = 0;
  int64_t n_slot = 0;
  int64_t n_systems = 1;
  int64_t n_edge = 0;
  int64_t n_close = 0;
  int64_t n_angle = 0;

  bool operator==(const Sizes&) const = default;
};

/// What of the forward stays for the backward: the inputs of every `every`-th layer. Those in between take
/// turns in one buffer, and the backward computes them again from the kept ones. 1: all stay.
struct Kept {
  int64_t every = 1;
  bool first = true;  // those of the first layer stay, which follow from the edges' lengths

  bool all() const { return every == 1; }
  bool has(size_t layer) const { return layer == 0 ? first : static_cast<int64_t>(layer) % every == 0; }
  /// Whether the angles' messages stay as well. Those of far edges that keep their feature come from the
  /// edges' update, which cannot be repeated in place.
  bool has_messages(const kernels::LayerShape& shape) const { return all() || shape.keep_far; }
  /// The layer whose inputs are there, from which those of `layer` follow.
  size_t before(size_t layer) const { return layer - layer % static_cast<size_t>(every); }
};

/// Where the results of a request lie, in numbers: counts, energies, and what else was asked for. -1: not
/// asked for, and nobody writes it.
struct ResultPlaces {
  int64_t energy = 0;
  int64_t energies = 0;
  int64_t forces = -1;
  int64_t virial = -1;
  int64_t atom_virial = -1;
  int64_t total = 0;

  ResultPlaces(const Sizes& sizes, const Request& request) {
    const auto place = [&](bool wanted, int64_t count) {
      const int64_t first = total;
      if (wanted) total += count;
      return wanted ? first : -1;
    };
    place(true, kCounts);
    energy = place(true, sizes.n_systems);
    energies = place(true, sizes.n_local);
    forces = place(request.forces, 3 * sizes.n_node);
    virial = place(request.virial, 9 * sizes.n_systems);
    atom_virial = place(request.atom_virial, 9 * sizes.n_node);
  }
};

/// Memory of everything that a step writes. Names as in LayerView, Graph and EdgeGeometry, which have the
/// shapes.
template <class Real>
struct Buffers {
  Buffers(size_t n_layer, size_t n_fitting)
      : node(n_layer + 1),
        edge(n_layer + 1),
        angle(n_layer + 1),
        angle_message(n_layer),
        moments(n_layer),
        fitting(n_fitting + 1),
        fitting_slope(n_fitting) {}

  // the graph of the step
  Values<int> n_close;
  Values<int> first_edge;
  Values<int> first_close;
  Values<int> first_angle;
  Values<int> problem;
  Values<int> edge_list;
  Values<int> edge_centre;
  Values<int> edge_of_list;
  Values<int64_t> counts;

  // its geometry
  Values<double> vector;
  Values<double> distance;
  Values<double> unit;
  Values<SwitchValue> angle_switch;
  Values<Real> switch_edge;
  Values<Real> directions;
  Values<Real> input;
  Values<Real> cosine;
  Values<Real> switch_angle;

  // Of every layer, for its backward: inputs (and outputs of the last), angle messages, moments
  std::vector<Values<Real>> node;
  std::vector<Values<Real>> edge;
  std::vector<Values<Real>> angle;
  std::vector<Values<Real>> angle_message;
  std::vector<Values<Real>> moments;
  // Of the layers whose inputs do not stay, by turns; every layer reads and writes it in place
  Values<Real> passing_edge;
  Values<Real> passing_angle;
  Values<Real> passing_message;

  // of the layer at hand
  Values<Real> edge_centre_part;
  Values<Real> edge_neighbor_part;
  Values<Real> angle_centre_part;
  Values<Real> angle_edge_parts;
  Values<Real> message;
  Values<Real> invariants;

  // its backward; gradients of edges and angles turn from those of outputs to those of inputs in place
  Values<Real> d_edge;
  Values<Real> d_angle;
  Values<Real> d_angle_message;
  Values<Real> d_angle_edge_parts;
  Values<Real> d_edge_pre;
  Values<Real> d_node_pre;
  Values<Real> d_edge_centre_part;
  Values<Real> d_angle_centre_part;
  Values<Real> d_moments;
  Values<Real> d_invariants;
  Values<Real> d_message;
  Values<Real> d_neighbor_part;
  Values<Real> d_node_slot;
  Values<Real> d_node_own;
  Values<Real> d_node;

  // gradients of the geometry, sums over all layers
  Values<Real> d_cosine;
  Values<Real> d_switch_angle;
  Values<double> d_switch_edge;
  Values<double> d_directions;
  Values<double> d_vector;
  Values<double> centre_sums;

  // the fitting net: features before every layer and after the last, slopes, gradients in two buffers by
  // turns
  std::vector<Values<Real>> fitting;
  std::vector<Values<Real>> fitting_slope;
  Values<Real> d_fitting[2];

  Values<double> results;
};

/// What the buffers depend on besides the system.
template <class Real>
class ModelWidths {
 public:
  /// `fitting_out`: width of the fitting net's last features, padded. The vectors must outlive this.
  ModelWidths(const std::vector<kernels::LayerShape>& layers, const std::vector<FittingLayer<Real>>& fitting,
              int64_t fitting_out)
      : layers_(layers), fitting_(fitting), fitting_out_(fitting_out) {}

  Buffers<Real> buffers() const { return {layers_.size(), fitting_.size()}; }

  size_t n_layer() const { return layers_.size(); }

  /// visit(Values<V>&, count) for everything that a system of these sizes needs besides the weights and the
  /// list; a count of 0 where `kept` needs none. `buffers`: constant or not.
  template <class AnyBuffers, class Visit>
  void for_each(AnyBuffers& buffers, const Sizes& sizes, Kept kept, const Visit& visit) const {
    visit_graph(buffers, sizes, visit);
    visit_geometry(buffers, sizes, visit);
    visit_features(buffers, sizes, kept, visit);
    visit_layer(buffers, sizes, visit);
    visit_layer_backward(buffers, sizes, visit);
    visit_fitting(buffers, sizes, visit);
    visit(buffers.d_vector, 3 * sizes.n_edge);
    visit(buffers.centre_sums, 12 * sizes.n_local);
    visit(buffers.results, ResultPlaces(sizes, {true, true, true}).total);
  }

 private:
  /// Largest widths of all layers, which share buffers.
  struct Widest {
    int64_t edge_columns = 0;
    int64_t angle_columns = 0;
    int64_t node_columns = 0;  // node and sym map side by side
    int64_t message = 0;
    int64_t sym_width = 0;
    int64_t sym_inputs = 0;
    bool any_angle_gradient = false;
  };
  Widest widest() const;

  template <class AnyBuffers, class Visit>
  void visit_graph(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const;
  template <class AnyBuffers, class Visit>
  void visit_geometry(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const;
  template <class AnyBuffers, class Visit>
  void visit_features(AnyBuffers& buffers, const Sizes& sizes, Kept kept, const Visit& visit) const;
  template <class AnyBuffers, class Visit>
  void visit_layer(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const;
  template <class AnyBuffers, class Visit>
  void visit_layer_backward(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const;
  template <class AnyBuffers, class Visit>
  void visit_fitting(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const;

  const std::vector<kernels::LayerShape>& layers_;
  const std::vector<FittingLayer<Real>>& fitting_;
  int64_t fitting_out_;
};

template <class Real>
auto ModelWidths<Real>::widest() const -> Widest {
  Widest widest;
  for (const kernels::LayerShape& shape : layers_) {
    const bool first_layer = &shape == &layers_.front();
    const auto grow = [](int64_t& most, int64_t width) { most = std::max(most, width); };
    grow(widest.edge_columns, shape.edge_columns());
    if (shape.with_angles) grow(widest.angle_columns, shape.angle_columns());
    grow(widest.node_columns, (shape.experts_node + shape.experts_sym) * shape.n_padded);
    grow(widest.message, shape.heads * shape.n_padded);
    grow(widest.sym_width, shape.sym_width());
    grow(widest.sym_inputs, shape.sym_inputs());
    if (shape.live_angle || (shape.with_angles && !first_layer)) widest.any_angle_gradient = true;
  }
  return widest;
}

template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_graph(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const {
  visit(buffers.n_close, sizes.n_local + 1);
  visit(buffers.first_edge, sizes.n_local + 1);
  visit(buffers.first_close, sizes.n_local + 1);
  visit(buffers.first_angle, sizes.n_local + 1);
  visit(buffers.problem, sizes.n_local + 1);
  visit(buffers.edge_list, sizes.n_edge);
  visit(buffers.edge_centre, sizes.n_edge);
  visit(buffers.edge_of_list, sizes.n_list);
  visit(buffers.counts, kCounts);
}

template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_geometry(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const {
  visit(buffers.vector, 3 * sizes.n_edge);
  visit(buffers.distance, sizes.n_edge);
  visit(buffers.unit, 3 * sizes.n_edge);
  visit(buffers.angle_switch, sizes.n_edge);
  visit(buffers.switch_edge, sizes.n_edge);
  visit(buffers.directions, 4 * sizes.n_edge);
  visit(buffers.input, sizes.n_edge);
  visit(buffers.cosine, sizes.n_angle);
  visit(buffers.switch_angle, sizes.n_angle);
  visit(buffers.d_cosine, sizes.n_angle);
  visit(buffers.d_switch_angle, sizes.n_angle);
  visit(buffers.d_switch_edge, sizes.n_edge);
  visit(buffers.d_directions, 4 * sizes.n_edge);
}

/// Features for the backward. Those of nodes always stay: they are few, and other ranks had a part in them.
template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_features(AnyBuffers& buffers, const Sizes& sizes, Kept kept,
                                       const Visit& visit) const {
  int64_t passing_edge = 0;
  int64_t passing_angle = 0;
  int64_t passing_message = 0;
  // `count` where it stays, else in the buffer that is passed on
  const auto place = [&](auto& values, bool stays, int64_t count, int64_t& passing) {
    visit(values, stays ? count : 0);
    if (!stays) passing = std::max(passing, count);
  };
  visit(buffers.node[0], sizes.n_node * layers_[0].n_padded);
  place(buffers.edge[0], kept.has(0), sizes.n_edge * layers_[0].e_padded, passing_edge);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const kernels::LayerShape& shape = layers_[l];
    const int64_t n_message = shape.keep_far ? sizes.n_edge : sizes.n_close;
    visit(buffers.node[l + 1], sizes.n_node * shape.n_padded);
    const bool stays = kept.has(l + 1);
    place(buffers.edge[l + 1], stays, shape.live_edge ? sizes.n_edge * shape.e_padded : 0, passing_edge);
    place(buffers.angle[l + 1], stays, shape.live_angle ? sizes.n_angle * shape.a_padded : 0, passing_angle);
    place(buffers.angle_message[l], kept.has_messages(shape),
          shape.with_angles ? n_message * shape.e_padded : 0, passing_message);
    visit(buffers.moments[l], sizes.n_local * 3 * shape.sym_width());
  }
  visit(buffers.passing_edge, passing_edge);
  visit(buffers.passing_angle, passing_angle);
  visit(buffers.passing_message, passing_message);
}

template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_layer(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const {
  const Widest most = widest();
  visit(buffers.edge_centre_part, sizes.n_local * most.edge_columns);
  visit(buffers.edge_neighbor_part, sizes.n_slot * most.edge_columns);
  visit(buffers.angle_centre_part, sizes.n_local * most.angle_columns);
  visit(buffers.angle_edge_parts, 2 * sizes.n_close * most.angle_columns);
  visit(buffers.message, sizes.n_local * most.message);
  visit(buffers.invariants, sizes.n_local * most.sym_inputs);
}

template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_layer_backward(AnyBuffers& buffers, const Sizes& sizes,
                                             const Visit& visit) const {
  const Widest most = widest();
  const kernels::LayerShape& shape = layers_[0];
  const int64_t n_message = shape.keep_far ? sizes.n_edge : sizes.n_close;
  visit(buffers.d_edge, sizes.n_edge * shape.e_padded);
  visit(buffers.d_angle, most.any_angle_gradient ? sizes.n_angle * shape.a_padded : 0);
  visit(buffers.d_angle_message, shape.with_angles ? n_message * shape.e_padded : 0);
  visit(buffers.d_angle_edge_parts, 2 * sizes.n_close * most.angle_columns);
  visit(buffers.d_edge_pre, sizes.n_edge * most.edge_columns);
  visit(buffers.d_node_pre, sizes.n_local * most.node_columns);
  visit(buffers.d_edge_centre_part, sizes.n_local * most.edge_columns);
  visit(buffers.d_angle_centre_part, sizes.n_local * most.angle_columns);
  visit(buffers.d_moments, sizes.n_local * 3 * most.sym_width);
  visit(buffers.d_invariants, sizes.n_local * most.sym_inputs);
  visit(buffers.d_message, sizes.n_local * most.message);
  visit(buffers.d_neighbor_part, sizes.n_slot * most.edge_columns);
  visit(buffers.d_node_slot, sizes.n_slot * shape.n_padded);
  visit(buffers.d_node_own, sizes.n_local * shape.n_padded);
  visit(buffers.d_node, sizes.n_node * shape.n_padded);
}

template <class Real>
template <class AnyBuffers, class Visit>
void ModelWidths<Real>::visit_fitting(AnyBuffers& buffers, const Sizes& sizes, const Visit& visit) const {
  int64_t widest = fitting_out_;
  for (size_t l = 0; l < fitting_.size(); ++l) {
    const FittingLayer<Real>& layer = fitting_[l];
    visit(buffers.fitting[l], sizes.n_local * layer.in_padded);
    visit(buffers.fitting_slope[l], sizes.n_local * layer.out_padded);
    widest = std::max<int64_t>({widest, layer.in_padded, layer.out_padded});
  }
  visit(buffers.fitting.back(), sizes.n_local * fitting_out_);
  for (auto& gradients : buffers.d_fitting) visit(gradients, sizes.n_local * widest);
}

/// Bytes that a system of these sizes takes.
template <class Real>
int64_t planned_bytes(const ModelWidths<Real>& widths, const Sizes& sizes, Kept kept) {
  constexpr int64_t unit = 512;  // of the memory's blocks
  const Buffers<Real> unused = widths.buffers();
  int64_t total = 0;
  widths.for_each(unused, sizes, kept, [&](const auto& values, int64_t count) {
    total += (values.bytes_for(count) + unit - 1) / unit * unit;
  });
  return total;
}

/// The choice that takes least memory.
template <class Real>
Kept least_kept(const ModelWidths<Real>& widths) {
  return {static_cast<int64_t>(widths.n_layer()) + 1, false};
}

/// The next choice, which takes less memory and more time; false after the last.
template <class Real>
bool keep_less(const ModelWidths<Real>& widths, Kept& kept) {
  if (kept.every <= static_cast<int64_t>(widths.n_layer())) {
    ++kept.every;
    return true;
  }
  return std::exchange(kept.first, false);
}

template <class Real>
int64_t held_bytes(const ModelWidths<Real>& widths, const Buffers<Real>& buffers) {
  int64_t total = 0;
  widths.for_each(buffers, {}, {}, [&](const auto& values, int64_t) { total += values.memory.bytes(); });
  return total;
}

/// Whether a buffer must go: it is too small, or what it held no longer stays.
template <class AnyValues>
bool must_go(const AnyValues& values, int64_t count) {
  return values.memory.bytes() > 0 && (count == 0 || !values.holds(count));
}

/// Bytes that are missing for a system, and those of the buffers that would go.
struct Missing {
  int64_t more = 0;
  int64_t released = 0;
};
template <class Real>
Missing missing_bytes(const ModelWidths<Real>& widths, const Buffers<Real>& buffers, const Sizes& sizes,
                      Kept kept) {
  Missing missing;
  widths.for_each(buffers, sizes, kept, [&](const auto& values, int64_t count) {
    if (!values.holds(count)) missing.more += values.bytes_for(count);
    if (must_go(values, count)) missing.released += values.memory.bytes();
  });
  return missing;
}

/// Makes every buffer large enough for a system.
template <class Real, class Target>
void allocate(const ModelWidths<Real>& widths, Buffers<Real>& buffers, const Sizes& sizes, Kept kept,
              Target& target) {
  // release first: old and new need not fit together
  widths.for_each(buffers, sizes, kept, [&](auto& values, int64_t count) {
    if (must_go(values, count)) values.memory.reset();
  });
  widths.for_each(buffers, sizes, kept, [&](auto& values, int64_t count) {
    if (!values.holds(count)) values.memory = target.memory(values.bytes_for(count));
  });
  target.trim();  // what the smaller buffers left over is of no use
}

/// Points the graph's values of the step at the buffers.
template <class Real>
void set_step_buffers(Graph& graph, const Buffers<Real>& buffers, const Sizes& capacity) {
  graph.n_close = buffers.n_close;
  graph.first_edge = buffers.first_edge;
  graph.first_close = buffers.first_close;
  graph.first_angle = buffers.first_angle;
  graph.problem = buffers.problem;
  graph.edge_list = buffers.edge_list;
  graph.edge_centre = buffers.edge_centre;
  graph.edge_of_list = buffers.edge_of_list;
  graph.counts = buffers.counts;
  graph.most_edges = capacity.n_edge;
  graph.most_close = capacity.n_close;
  graph.most_angles = capacity.n_angle;
}

template <class Real>
EdgeGeometry<Real> edge_geometry(const Buffers<Real>& buffers) {
  EdgeGeometry<Real> edges;
  edges.vector = buffers.vector;
  edges.distance = buffers.distance;
  edges.unit = buffers.unit;
  edges.angle_switch = buffers.angle_switch;
  edges.switch_edge = buffers.switch_edge;
  edges.directions = buffers.directions;
  edges.input = buffers.input;
  return edges;
}

/// A system of one structure without ghosts, for estimates.
inline Sizes estimated_sizes(int64_t n_node, int64_t n_edge, int64_t n_angle, int64_t n_group) {
  Sizes sizes;
  sizes.n_local = n_node;
  sizes.n_node = n_node;
  sizes.n_edge = n_edge;
  sizes.n_list = n_edge;
  sizes.n_angle = n_angle;
  sizes.n_slot = std::min(n_edge, n_node * n_group);
  if (n_node > 0) {
    // n_close^2 angles of a centre
    const auto nodes = static_cast<double>(n_node);
    const double close_edges = std::sqrt(static_cast<double>(n_angle) / nodes);
    sizes.n_close = static_cast<int64_t>(close_edges * nodes);
  }
  return sizes;
}

}  // namespace moecalc::cuda
