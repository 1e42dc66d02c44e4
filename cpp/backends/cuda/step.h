// The launches of one evaluation, in their order.
#pragma once

#include <cstdint>

#include "backends/cuda/buffers.h"
#include "backends/cuda/device_list.h"
#include "backends/cuda/device_weights.h"
#include "backends/cuda/ghosts.h"
#include "backends/cuda/layer_widths.h"
#include "kernels/cuda/layer.cuh"
#include "kernels/cuda/results.cuh"

namespace moecalc::cuda {

/// Of one evaluation: everything that it points to outlives it.
template <class Format, class Target>
class Step {
 public:
  using Real = typename Format::Real;

  Step(Target& target, const DeviceWeights<Format, Target>& weights, const DeviceList& list,
       const Buffers<Real>& buffers, const Sizes& capacity, Kept kept, const Positions& positions)
      : target_(target),
        weights_(weights),
        list_(list),
        buffers_(buffers),
        kept_(kept),
        graph_(list.graph()),
        positions_(positions),
        edges_(edge_geometry(buffers)) {
    set_step_buffers(graph_, buffers, capacity);
  }

  /// Numbers of edges and angles, to the buffer of counts.
  void count();
  /// The whole step; results to their places. Nothing in here waits for the target, unless ranks exchange
  /// ghosts.
  void run(const Request& request, const ResultPlaces& places, Ghosts<Real, Target>* ghosts);

 private:
  using Weights = kernels::GroupWeights<Real>;

  const kernels::LayerShape& shape(size_t l) const { return weights_.shapes()[l]; }
  LayerView<Real> layer(size_t l) const;
  /// Inputs of layer l, or outputs of the one before.
  Real* edge_features(size_t l) const { return kept_.has(l) ? buffers_.edge[l] : buffers_.passing_edge; }
  Real* angle_features(size_t l) const { return kept_.has(l) ? buffers_.angle[l] : buffers_.passing_angle; }
  void set_forward_buffers(LayerView<Real>& layer, size_t l) const;
  void set_backward_buffers(LayerView<Real>& layer) const;
  Linear<Format> linear(const LayerView<Real>& layer, const Runs& runs) const;
  template <class Kernel>
  void launch(const LayerView<Real>& layer);
  template <class Kernel>
  void launch(const LayerView<Real>& layer, const Runs& runs);

  void place_edges();
  void embed();
  void project(const LayerView<Real>& layer);
  void forward(size_t l);
  void angle_forward(const LayerView<Real>& layer);
  void features_of_edges(const LayerView<Real>& layer);
  void repeat_before(size_t l);
  void backward(size_t l, bool gradients_to_nodes);
  void gradients_of_nodes(const LayerView<Real>& layer);
  void fitting_net();
  void energies(double* energy, double* energies);
  void readout_backward();
  void geometry_backward();
  void gather(const Request& request, double* forces, double* virial, double* atom_virial);

  Target& target_;
  const DeviceWeights<Format, Target>& weights_;
  const DeviceList& list_;
  const Buffers<Real>& buffers_;
  Kept kept_;
  Graph graph_;
  Positions positions_;
  EdgeGeometry<Real> edges_;
};

template <class Format, class Target>
void Step<Format, Target>::count() {
  CountEdges count;
  count.graph = graph_;
  count.positions = positions_;
  target_.launch(count);
  ScanCentres scan;
  scan.graph = graph_;
  target_.launch(scan);
}

template <class Format, class Target>
void Step<Format, Target>::run(const Request& request, const ResultPlaces& places,
                               Ghosts<Real, Target>* ghosts) {
  double* results = buffers_.results;
  const auto at = [&](int64_t place) { return place < 0 ? nullptr : results + place; };
  count();
  place_edges();
  embed();
  for (size_t l = 0; l < weights_.n_layer(); ++l) {
    if (l > 0 && ghosts != nullptr) ghosts->forward(buffers_.node[l]);
    forward(l);
  }
  fitting_net();
  energies(at(places.energy), at(places.energies));
  CopyCounts counts;
  counts.graph = graph_;
  counts.out = results;
  target_.launch(counts);
  if (!request.gradients()) return;

  readout_backward();
  for (size_t l = weights_.n_layer(); l-- > 0;) {
    if (!kept_.all()) repeat_before(l);
    // the features of the first layer's nodes follow from the types alone
    backward(l, /*gradients_to_nodes=*/l > 0);
    if (l > 0 && ghosts != nullptr) ghosts->reverse(buffers_.d_node);
  }
  geometry_backward();
  gather(request, at(places.forces), at(places.virial), at(places.atom_virial));
}

// --- views of a layer ---

template <class Format, class Target>
void Step<Format, Target>::set_forward_buffers(LayerView<Real>& layer, size_t l) const {
  layer.node = buffers_.node[l];
  layer.edge = edge_features(l);
  layer.angle = angle_features(l);
  layer.cosine = buffers_.cosine;
  layer.switch_edge = buffers_.switch_edge;
  layer.directions = buffers_.directions;
  layer.switch_angle = buffers_.switch_angle;
  layer.edge_centre_part = buffers_.edge_centre_part;
  layer.edge_neighbor_part = buffers_.edge_neighbor_part;
  layer.angle_centre_part = buffers_.angle_centre_part;
  layer.angle_edge_parts = buffers_.angle_edge_parts;
  layer.angle_message = kept_.has_messages(shape(l)) ? buffers_.angle_message[l] : buffers_.passing_message;
  layer.message = buffers_.message;
  layer.moments = buffers_.moments[l];
  layer.invariants = buffers_.invariants;
  layer.node_out = buffers_.node[l + 1];
  layer.edge_out = edge_features(l + 1);
  layer.angle_out = angle_features(l + 1);
}

template <class Format, class Target>
void Step<Format, Target>::set_backward_buffers(LayerView<Real>& layer) const {
  layer.d_node_out = buffers_.d_node;
  layer.d_edge_out = buffers_.d_edge;
  layer.d_edge = buffers_.d_edge;
  layer.d_angle = buffers_.d_angle;
  layer.d_message = buffers_.d_message;
  layer.d_angle_message = buffers_.d_angle_message;
  layer.d_angle_edge_parts = buffers_.d_angle_edge_parts;
  layer.d_edge_pre = buffers_.d_edge_pre;
  layer.d_node_pre = buffers_.d_node_pre;
  layer.d_edge_centre_part = buffers_.d_edge_centre_part;
  layer.d_angle_centre_part = buffers_.d_angle_centre_part;
  layer.d_moments = buffers_.d_moments;
  layer.d_invariants = buffers_.d_invariants;
  layer.d_neighbor_part = buffers_.d_neighbor_part;
  layer.d_node_slot = buffers_.d_node_slot;
  layer.d_node_own = buffers_.d_node_own;
  layer.d_node = buffers_.d_node;
  layer.d_cosine = buffers_.d_cosine;
  layer.d_switch_angle = buffers_.d_switch_angle;
  layer.d_switch_edge = buffers_.d_switch_edge;
  layer.d_directions = buffers_.d_directions;
}

template <class Format, class Target>
auto Step<Format, Target>::layer(size_t l) const -> LayerView<Real> {
  const bool last = l + 1 == weights_.n_layer();
  LayerView<Real> layer = layer_widths<Real>(shape(l));
  set_forward_buffers(layer, l);
  set_backward_buffers(layer);
  layer.graph = graph_;
  layer.weights = weights_.groups(l);
  layer.update = weights_.update(l);
  layer.direction = weights_.constants().angle_direction;
  layer.first_layer = l == 0;
  layer.add_edge_geometry = !last;
  layer.add_switch_angle = !last && shape(l + 1).with_angles;
  return layer;
}

// --- launches ---

template <class Format, class Target>
template <class Kernel>
void Step<Format, Target>::launch(const LayerView<Real>& layer) {
  Kernel kernel;
  kernel.layer = layer;
  target_.launch(kernel);
}

template <class Format, class Target>
template <class Kernel>
void Step<Format, Target>::launch(const LayerView<Real>& layer, const Runs& runs) {
  Kernel kernel;
  kernel.layer = layer;
  kernel.runs = runs.first;
  kernel.n_run = runs.count;
  target_.launch(kernel);
}

/// A product with weights of a layer, for the rows of `runs`.
template <class Format, class Target>
Linear<Format> Step<Format, Target>::linear(const LayerView<Real>& layer, const Runs& runs) const {
  Linear<Format> product;
  product.runs = runs.first;
  product.n_run = runs.count;
  product.weights = layer.weights;
  return product;
}

/// Edges, angles and their geometry.
template <class Format, class Target>
void Step<Format, Target>::place_edges() {
  PlaceEdges<Real> place;
  place.graph = graph_;
  place.positions = positions_;
  place.tables = weights_.constants().geometry;
  place.edges = edges_;
  target_.launch(place);
  if (!shape(0).with_angles) return;
  PlaceAngles<Real> angles;
  angles.graph = graph_;
  angles.edges = edges_;
  angles.cosine = buffers_.cosine;
  angles.switch_angle = buffers_.switch_angle;
  target_.launch(angles);
}

/// The features of the first layer.
template <class Format, class Target>
void Step<Format, Target>::embed() {
  const Constants<Real>& constants = weights_.constants();
  Embed<Real> embed;
  embed.graph = graph_;
  embed.n_padded = static_cast<int>(shape(0).n_padded);
  embed.e_padded = static_cast<int>(shape(0).e_padded);
  embed.use_distance = weights_.model().use_dist;
  embed.activation = ActivationFunction<Real>(weights_.model().phi);
  embed.table = constants.node_table;
  embed.matrix = constants.edge_matrix;
  embed.bias = constants.edge_bias;
  embed.input = edges_.input;
  embed.node = buffers_.node[0];
  embed.edge = edge_features(0);
  target_.launch(embed);
}

/// Node parts of the edge and angle maps.
template <class Format, class Target>
void Step<Format, Target>::project(const LayerView<Real>& layer) {
  Linear<Format> centres = linear(layer, list_.row_runs());
  centres.input = layer.node;
  centres.input_stride = layer.n_padded;
  centres.inputs = layer.n_padded;
  centres.matrix = &Weights::edge_centre;
  centres.bias = &Weights::edge_bias;
  centres.out = layer.edge_centre_part;
  centres.columns = layer.edge_columns;
  target_.launch(centres);
  if (layer.with_angles) {
    centres.matrix = &Weights::angle_centre;
    centres.bias = &Weights::angle_bias;
    centres.out = layer.angle_centre_part;
    centres.columns = layer.angle_columns;
    target_.launch(centres);
  }

  Linear<Format> neighbors = linear(layer, list_.slot_runs());
  neighbors.input = layer.node;
  neighbors.input_stride = layer.n_padded;
  neighbors.inputs = layer.n_padded;
  neighbors.gather = graph_.slot_node;
  neighbors.matrix = &Weights::edge_neighbor;
  neighbors.out = layer.edge_neighbor_part;
  neighbors.columns = layer.edge_columns;
  target_.launch(neighbors);
}

template <class Format, class Target>
void Step<Format, Target>::forward(size_t l) {
  const LayerView<Real> layer = this->layer(l);
  project(layer);
  launch<Symmetrize<Real>>(layer);  // reads the edges' features, which may be gone after the next
  features_of_edges(layer);
  launch<Invariants<Real>>(layer);
  launch<Nodes<Format, false>>(layer, list_.row_runs());
}

/// Messages of angles and their features after the layer.
template <class Format, class Target>
void Step<Format, Target>::angle_forward(const LayerView<Real>& layer) {
  if (!layer.with_angles) return;
  if (layer.first_layer) {
    launch<AngleForward<Format, true>>(layer, list_.angle_runs());
  } else {
    launch<AngleForward<Format, false>>(layer, list_.angle_runs());
  }
}

/// What a layer makes of edges and angles: features, and messages to nodes. In place where these features do
/// not stay.
template <class Format, class Target>
void Step<Format, Target>::features_of_edges(const LayerView<Real>& layer) {
  angle_forward(layer);
  launch<EdgeForward<Format>>(layer, list_.edge_runs());
}

/// Has the inputs of layer l, and its angles' messages, where only those of an earlier layer stayed. Nodes
/// are all there, so that no rank waits for another.
template <class Format, class Target>
void Step<Format, Target>::repeat_before(size_t l) {
  if (kept_.before(l) == 0 && !kept_.first) embed();
  for (size_t earlier = kept_.before(l); earlier < l; ++earlier) {
    const LayerView<Real> layer = this->layer(earlier);
    project(layer);
    features_of_edges(layer);
  }
  LayerView<Real> messages = layer(l);
  if (!messages.with_angles || kept_.has_messages(shape(l))) return;
  project(messages);
  messages.live_angle = false;  // its outputs are of no use now
  angle_forward(messages);
}

template <class Format, class Target>
void Step<Format, Target>::backward(size_t l, bool gradients_to_nodes) {
  const LayerView<Real> layer = this->layer(l);
  const int node_columns = layer.experts_node * layer.n_padded;
  const int sym_columns = layer.experts_sym * layer.n_padded;
  project(layer);
  launch<Invariants<Real>>(layer);
  launch<Nodes<Format, true>>(layer, list_.row_runs());

  Linear<Format> to_invariants = linear(layer, list_.row_runs());
  to_invariants.input = layer.d_node_pre + node_columns;
  to_invariants.input_stride = node_columns + sym_columns;
  to_invariants.inputs = sym_columns;
  to_invariants.matrix = &Weights::sym_transposed;
  to_invariants.out = layer.d_invariants;
  to_invariants.columns = layer.sym_inputs;
  target_.launch(to_invariants);

  launch<InvariantsBackward<Real>>(layer);
  if (layer.with_angles) launch<MessageBackward<Format>>(layer, list_.edge_runs());
  launch<EdgeBackward<Format>>(layer, list_.edge_runs());
  if (layer.with_angles) {
    if (layer.first_layer) {
      launch<AngleBackward<Format, true>>(layer, list_.angle_runs());
    } else {
      launch<AngleBackward<Format, false>>(layer, list_.angle_runs());
    }
  }
  if (gradients_to_nodes) gradients_of_nodes(layer);
}

/// Adds what the pre-activations give to the gradients of the nodes.
template <class Format, class Target>
void Step<Format, Target>::gradients_of_nodes(const LayerView<Real>& layer) {
  const int node_columns = layer.experts_node * layer.n_padded;
  const int sym_columns = layer.experts_sym * layer.n_padded;
  Linear<Format> to_own = linear(layer, list_.row_runs());
  to_own.out = layer.d_node_own;
  to_own.columns = layer.n_padded;
  to_own.add = true;
  to_own.input = layer.d_node_pre;
  to_own.input_stride = node_columns + sym_columns;
  to_own.inputs = node_columns;
  to_own.matrix = &Weights::node_transposed;
  target_.launch(to_own);
  to_own.input = layer.d_edge_centre_part;
  to_own.input_stride = layer.edge_columns;
  to_own.inputs = layer.edge_columns;
  to_own.matrix = &Weights::edge_centre_transposed;
  target_.launch(to_own);
  if (layer.with_angles) {
    to_own.input = layer.d_angle_centre_part;
    to_own.input_stride = layer.angle_columns;
    to_own.inputs = layer.angle_columns;
    to_own.matrix = &Weights::angle_centre_transposed;
    target_.launch(to_own);
  }

  launch<SlotSums<Real>>(layer);
  Linear<Format> to_slots = linear(layer, list_.slot_runs());
  to_slots.input = layer.d_neighbor_part;
  to_slots.input_stride = layer.edge_columns;
  to_slots.inputs = layer.edge_columns;
  to_slots.matrix = &Weights::edge_neighbor_transposed;
  to_slots.out = layer.d_node_slot;
  to_slots.columns = layer.n_padded;
  to_slots.add = true;
  target_.launch(to_slots);
  launch<GatherSlots<Real>>(layer);
}

/// From the features of the last layer to those of the fitting net's last one.
template <class Format, class Target>
void Step<Format, Target>::fitting_net() {
  const kernels::LayerShape& widths = shape(0);
  const Constants<Real>& constants = weights_.constants();
  FittingInput<Real> input;
  input.graph = graph_;
  input.n = static_cast<int>(widths.n);
  input.n_padded = static_cast<int>(widths.n_padded);
  input.n_constant = static_cast<int>(constants.n_constant);
  input.out_padded = static_cast<int>(kernels::padded<Real>(widths.n + constants.n_constant));
  input.node = buffers_.node[weights_.n_layer()];
  input.constant = constants.fitting_constant;
  input.out = buffers_.fitting[0];
  target_.launch(input);
  for (size_t l = 0; l < constants.fitting.size(); ++l) {
    FittingForward<Format> kernel;
    kernel.map = constants.fitting[l];
    kernel.n_row = graph_.n_local;
    kernel.inputs = buffers_.fitting[l];
    kernel.out = buffers_.fitting[l + 1];
    kernel.slope = buffers_.fitting_slope[l];
    target_.launch(kernel);
  }
}

template <class Format, class Target>
void Step<Format, Target>::energies(double* energy, double* energies) {
  const Constants<Real>& constants = weights_.constants();
  Energies<Real> of_atoms;
  of_atoms.graph = graph_;
  of_atoms.in_padded = static_cast<int>(kernels::padded<Real>(constants.out_width));
  of_atoms.inputs = buffers_.fitting.back();
  of_atoms.matrix = constants.out_matrix;
  of_atoms.bias = constants.out_bias;
  of_atoms.shift = constants.shift;
  of_atoms.weight = constants.energy_weight;
  of_atoms.energies = energies;
  of_atoms.d_inputs = buffers_.d_fitting[0];
  target_.launch(of_atoms);
  SumSystems of_systems;
  of_systems.graph = graph_;
  of_systems.by_engine_row = true;
  of_systems.values = energies;
  of_systems.out = energy;
  target_.launch(of_systems);
}

/// From the energies to the features of the last layer.
template <class Format, class Target>
void Step<Format, Target>::readout_backward() {
  const kernels::LayerShape& widths = shape(0);
  const Constants<Real>& constants = weights_.constants();
  size_t current = 0;
  for (size_t l = constants.fitting.size(); l-- > 0;) {
    FittingBackward<Format> kernel;
    kernel.map = constants.fitting[l];
    kernel.n_row = graph_.n_local;
    kernel.slope = buffers_.fitting_slope[l];
    kernel.d_out = buffers_.d_fitting[current];
    kernel.d_inputs = buffers_.d_fitting[1 - current];
    target_.launch(kernel);
    current = 1 - current;
  }
  TakeColumns<Real> take;
  take.n_row = graph_.n_local;
  take.width = static_cast<int>(widths.n);
  take.out_padded = static_cast<int>(widths.n_padded);
  take.in_padded = static_cast<int>(kernels::padded<Real>(widths.n + constants.n_constant));
  take.inputs = buffers_.d_fitting[current];
  take.out = buffers_.d_node;
  target_.launch(take);
}

/// From the features and the geometry of the edges to their vectors.
template <class Format, class Target>
void Step<Format, Target>::geometry_backward() {
  const Constants<Real>& constants = weights_.constants();
  GeometryBackward<Real> kernel;
  kernel.graph = graph_;
  kernel.tables = constants.geometry;
  kernel.edges = edges_;
  kernel.e_padded = static_cast<int>(shape(0).e_padded);
  kernel.use_distance = weights_.model().use_dist;
  kernel.activation = ActivationFunction<Real>(weights_.model().phi);
  kernel.matrix = constants.edge_matrix;
  kernel.bias = constants.edge_bias;
  kernel.d_cosine = buffers_.d_cosine;
  kernel.d_switch_angle = buffers_.d_switch_angle;
  kernel.d_edge = buffers_.d_edge;
  kernel.d_switch_edge = buffers_.d_switch_edge;
  kernel.d_directions = buffers_.d_directions;
  kernel.d_vector = buffers_.d_vector;
  kernel.centre_sums = buffers_.centre_sums;
  target_.launch(kernel);
}

template <class Format, class Target>
void Step<Format, Target>::gather(const Request& request, double* forces, double* virial,
                                  double* atom_virial) {
  if (request.forces || request.atom_virial) {
    Forces kernel;
    kernel.graph = graph_;
    kernel.d_vector = buffers_.d_vector;
    kernel.vector = edges_.vector;
    kernel.centre_sums = buffers_.centre_sums;
    kernel.forces = forces;
    kernel.atom_virial = atom_virial;
    target_.launch(kernel);
  }
  if (request.virial) {
    SumSystems kernel;
    kernel.graph = graph_;
    kernel.width = 9;
    kernel.stride = Forces::kSums;
    kernel.scale = -1.0;
    kernel.values = buffers_.centre_sums + 3;  // after the sum of the gradients
    kernel.out = virial;
    target_.launch(kernel);
  }
}

}  // namespace moecalc::cuda
