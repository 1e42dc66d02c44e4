// The launches of one evaluation, in their order.
#pragma once

#include <cmath>
#include <cstdint>

#include "backends/cuda/buffers.h"
#include "backends/cuda/device_list.h"
#include "backends/cuda/device_weights.h"
#include "backends/cuda/ghosts.h"

namespace moecalc::cuda {

/// Of one evaluation: everything that it points to outlives it.
template <class N, class Target>
class Step {
 public:
  using T = typename N::type;

  Step(Target& target, const DeviceWeights<N, Target>& weights, const DeviceList& list,
       const Buffers& buffers, const Sizes& capacity, const Positions& positions)
      : target_(target),
        weights_(weights),
        list_(list),
        b_(buffers),
        g_(list.graph()),
        positions_(positions),
        edges_(edge_geometry<T>(buffers)) {
    view(buffers, capacity, g_);
  }

  /// Numbers of edges and angles, to the buffer of counts.
  void count() {
    target_.launch(CountEdges{g_, positions_});
    target_.launch(ScanCentres{g_});
  }
  /// The whole step; results to their places. Nothing in here waits for the target, unless ranks exchange
  /// ghosts.
  void run(const Request& request, const ResultPlaces& places, Ghosts<T, Target>* ghosts);

 private:
  const ops::LayerShape& shape(size_t l) const { return weights_.shapes()[l]; }
  Layer<T> layer(size_t l) const;
  void set_widths(Layer<T>& x, const ops::LayerShape& s) const;
  void set_forward_buffers(Layer<T>& x, size_t l) const;
  void set_backward_buffers(Layer<T>& x) const;
  Linear<N> linear(const Layer<T>& x, Weight<T> w, Weight<T> b, const T* a, int64_t lda, int64_t k, T* out,
                   int64_t columns, bool add) const;
  void embed();
  void project(const Layer<T>& x);
  void forward(size_t l);
  void backward(size_t l, bool gradients_to_nodes);
  void gradients_of_nodes(const Layer<T>& x);
  void readout(double* energy, double* energies);
  void readout_backward();
  void geometry_backward();
  void gather(const Request& request, double* forces, double* virial, double* atom_virial);

  Target& target_;
  const DeviceWeights<N, Target>& weights_;
  const DeviceList& list_;
  const Buffers& b_;
  Graph g_;
  Positions positions_;
  EdgeGeometry<T> edges_;
  size_t de_current_ = 0;  // which of the two buffers holds the gradients of a layer's outputs
};

template <class N, class Target>
void Step<N, Target>::run(const Request& request, const ResultPlaces& places, Ghosts<T, Target>* ghosts) {
  auto* results = b_.results.template as<double>();
  const auto at = [&](int64_t place) { return place < 0 ? nullptr : results + place; };
  count();
  embed();
  for (size_t l = 0; l < weights_.n_layer(); ++l) {
    if (l > 0 && ghosts != nullptr) ghosts->forward(b_.v[l].template as<T>());
    forward(l);
  }
  readout(at(places.energy), at(places.energies));
  target_.launch(CopyCounts{g_, results});
  if (!request.gradients()) return;

  readout_backward();
  de_current_ = 0;
  for (size_t l = weights_.n_layer(); l-- > 0;) {
    // the features of the first layer's nodes follow from the types alone
    backward(l, /*gradients_to_nodes=*/l > 0);
    if (l > 0 && ghosts != nullptr) ghosts->reverse(b_.dv.template as<T>());
  }
  geometry_backward();
  gather(request, at(places.forces), at(places.virial), at(places.atom_virial));
}

template <class N, class Target>
void Step<N, Target>::set_widths(Layer<T>& x, const ops::LayerShape& s) const {
  const auto narrow = [](int64_t width) { return static_cast<int>(width); };
  x.np = narrow(s.np);
  x.ep = narrow(s.ep);
  x.ap = narrow(s.ap);
  x.heads = narrow(s.heads);
  x.axis = narrow(s.axis);
  x.k_node = narrow(s.k_node);
  x.k_sym = narrow(s.k_sym);
  x.k_message = narrow(s.k_message);
  x.k_edge = s.live_edge ? narrow(s.k_edge) : 0;
  x.k_angle1 = s.with_angles ? narrow(s.k_angle1) : 0;
  x.k_angle2 = s.with_angles ? narrow(s.k_angle2) : 0;
  x.k_angle = s.live_angle ? narrow(s.k_angle) : 0;
  x.width = narrow(s.heads * s.np);
  x.message_columns = narrow(s.message());
  x.edge_columns = narrow(s.edge_columns());
  x.angle1 = narrow(s.angle1());
  x.angle_columns = narrow(s.angle_columns());
  x.sym_width = narrow(s.sym_width());
  x.sym_in = narrow(s.sym_in());
  x.live_edge = s.live_edge;
  x.live_angle = s.live_angle;
  x.with_angles = s.with_angles;
  x.keep_far = s.keep_far;
  x.edge_norm = T(1.0 / s.edge_norm);
  x.angle_norm = T(1.0 / std::sqrt(s.angle_norm));
  x.keep_n = T(s.keep_n);
  x.keep_e = T(s.keep_e);
  x.keep_a = T(s.keep_a);
  x.phi = Phi<T>(s.phi);
}

template <class N, class Target>
void Step<N, Target>::set_forward_buffers(Layer<T>& x, size_t l) const {
  x.v = b_.v[l].template as<T>();
  x.e = b_.e[l].template as<T>();
  x.a = b_.a[l].template as<T>();
  x.cos = b_.cos.template as<T>();
  x.sw = edges_.sw;
  x.h = edges_.h;
  x.asw = b_.asw.template as<T>();
  x.zc = b_.zc.template as<T>();
  x.zn = b_.zn.template as<T>();
  x.zca = b_.zca.template as<T>();
  x.pq = b_.pq.template as<T>();
  x.m = b_.m[l].template as<T>();
  x.message = b_.message.template as<T>();
  x.big_h = b_.big_h[l].template as<T>();
  x.sym = b_.sym.template as<T>();
  x.v_out = b_.v[l + 1].template as<T>();
  x.e_out = b_.e[l + 1].template as<T>();
  x.a_out = b_.a[l + 1].template as<T>();
}

template <class N, class Target>
void Step<N, Target>::set_backward_buffers(Layer<T>& x) const {
  x.dv_out = b_.dv.template as<T>();
  x.de_out = b_.de[de_current_].template as<T>();
  x.de = b_.de[1 - de_current_].template as<T>();
  x.dmessage = b_.dmessage.template as<T>();
  x.dm = b_.dm.template as<T>();
  x.dpq = b_.dpq.template as<T>();
  x.dz = b_.dz.template as<T>();
  x.dz_node = b_.dz_node.template as<T>();
  x.dzc = b_.dzc.template as<T>();
  x.dzca = b_.dzca.template as<T>();
  x.dbig_h = b_.dbig_h.template as<T>();
  x.dsym = b_.dsym.template as<T>();
  x.dzn = b_.dzn.template as<T>();
  x.dv_slot = b_.dv_slot.template as<T>();
  x.dv_own = b_.dv_own.template as<T>();
  x.dv = b_.dv.template as<T>();
  x.da = b_.da.template as<T>();
  x.dcos = b_.dcos.template as<T>();
  x.dasw = b_.dasw.template as<T>();
  x.dsw = b_.dsw.template as<double>();
  x.dh = b_.dh.template as<double>();
}

template <class N, class Target>
auto Step<N, Target>::layer(size_t l) const -> Layer<T> {
  Layer<T> x;
  set_widths(x, shape(l));
  set_forward_buffers(x, l);
  set_backward_buffers(x);
  x.g = g_;
  x.weights = weights_.groups(l);
  x.update = weights_.update(l);
  x.angle_row = weights_.constants().angle_row;
  x.first = l == 0;
  x.add_edge = l + 1 < weights_.n_layer();
  x.add_dasw = x.add_edge && shape(l + 1).with_angles;
  return x;
}

template <class N, class Target>
Linear<N> Step<N, Target>::linear(const Layer<T>& x, Weight<T> w, Weight<T> b, const T* a, int64_t lda,
                                  int64_t k, T* out, int64_t columns, bool add) const {
  Linear<N> kernel;
  kernel.runs = list_.row_runs().runs;
  kernel.n_run = list_.row_runs().n;
  kernel.weights = x.weights;
  kernel.w = w;
  kernel.b = b;
  kernel.a = a;
  kernel.lda = lda;
  kernel.k = static_cast<int>(k);
  kernel.out = out;
  kernel.columns = static_cast<int>(columns);
  kernel.add = add;
  return kernel;
}

/// Edges, angles, and the features of the first layer.
template <class N, class Target>
void Step<N, Target>::embed() {
  const ops::LayerShape& s = shape(0);
  const Constants<T>& constants = weights_.constants();
  target_.launch(PlaceEdges<T>{g_, positions_, constants.geometry, edges_});
  if (s.with_angles) {
    target_.launch(PlaceAngles<T>{g_, edges_, b_.cos.template as<T>(), b_.asw.template as<T>()});
  }
  Embed<T> embed;
  embed.g = g_;
  embed.np = static_cast<int>(s.np);
  embed.ep = static_cast<int>(s.ep);
  embed.use_dist = weights_.model().use_dist;
  embed.phi = Phi<T>(weights_.model().phi);
  embed.table = constants.node_table;
  embed.matrix = constants.edge_matrix;
  embed.bias = constants.edge_bias;
  embed.input = edges_.input;
  embed.v = b_.v[0].template as<T>();
  embed.e = b_.e[0].template as<T>();
  target_.launch(embed);
}

/// Node parts of the edge and angle maps.
template <class N, class Target>
void Step<N, Target>::project(const Layer<T>& x) {
  using W = ops::GroupWeights<T>;
  target_.launch(linear(x, &W::edge_c, &W::edge_b, x.v, x.np, x.np, x.zc, x.edge_columns, false));
  if (x.with_angles) {
    target_.launch(linear(x, &W::angle_c, &W::angle_b, x.v, x.np, x.np, x.zca, x.angle_columns, false));
  }
  Linear<N> slots = linear(x, &W::edge_n, nullptr, x.v, x.np, x.np, x.zn, x.edge_columns, false);
  slots.runs = list_.slot_runs().runs;
  slots.n_run = list_.slot_runs().n;
  slots.gather = g_.slot_node;
  target_.launch(slots);
}

template <class N, class Target>
void Step<N, Target>::forward(size_t l) {
  const Layer<T> x = layer(l);
  project(x);
  if (x.with_angles) target_.launch(AngleForward<N>{x, list_.angle_runs().runs, list_.angle_runs().n});
  target_.launch(EdgeForward<N>{x, list_.edge_runs().runs, list_.edge_runs().n});
  target_.launch(Symmetrize<T>{x});
  target_.launch(Invariants<T>{x});
  target_.launch(Nodes<N, false>{x, list_.row_runs().runs, list_.row_runs().n});
}

template <class N, class Target>
void Step<N, Target>::backward(size_t l, bool gradients_to_nodes) {
  using W = ops::GroupWeights<T>;
  const Layer<T> x = layer(l);
  const Runs &edges = list_.edge_runs(), &angles = list_.angle_runs();
  project(x);
  target_.launch(Invariants<T>{x});
  target_.launch(Nodes<N, true>{x, list_.row_runs().runs, list_.row_runs().n});
  const int64_t c1 = x.k_node * x.np, c2 = x.k_sym * x.np;
  target_.launch(linear(x, &W::sym_t, nullptr, x.dz_node + c1, c1 + c2, c2, x.dsym, x.sym_in, false));
  target_.launch(InvariantsBackward<T>{x});
  if (x.with_angles) target_.launch(MessageBackward<N>{x, edges.runs, edges.n});
  target_.launch(EdgeBackward<N>{x, edges.runs, edges.n});
  if (x.with_angles) target_.launch(AngleBackward<N>{x, angles.runs, angles.n});
  de_current_ = 1 - de_current_;
  if (gradients_to_nodes) gradients_of_nodes(x);
}

template <class N, class Target>
void Step<N, Target>::gradients_of_nodes(const Layer<T>& x) {
  using W = ops::GroupWeights<T>;
  const int64_t c1 = x.k_node * x.np, c2 = x.k_sym * x.np;
  target_.launch(linear(x, &W::node_t, nullptr, x.dz_node, c1 + c2, c1, x.dv_own, x.np, true));
  target_.launch(
      linear(x, &W::edge_c_t, nullptr, x.dzc, x.edge_columns, x.edge_columns, x.dv_own, x.np, true));
  if (x.with_angles) {
    target_.launch(
        linear(x, &W::angle_c_t, nullptr, x.dzca, x.angle_columns, x.angle_columns, x.dv_own, x.np, true));
  }
  target_.launch(SlotSums<T>{x});
  Linear<N> slots =
      linear(x, &W::edge_n_t, nullptr, x.dzn, x.edge_columns, x.edge_columns, x.dv_slot, x.np, true);
  slots.runs = list_.slot_runs().runs;
  slots.n_run = list_.slot_runs().n;
  target_.launch(slots);
  target_.launch(GatherSlots<T>{x});
}

template <class N, class Target>
void Step<N, Target>::readout(double* energy, double* energies) {
  const ops::LayerShape& s = shape(0);
  const Constants<T>& constants = weights_.constants();
  FittingInput<T> input;
  input.g = g_;
  input.n = static_cast<int>(s.n);
  input.np = static_cast<int>(s.np);
  input.n_constant = static_cast<int>(constants.n_constant);
  input.constant = constants.fitting_constant;
  input.in = static_cast<int>(ops::padded<T>(s.n + constants.n_constant));
  input.v = b_.v[weights_.n_layer()].template as<T>();
  input.x = b_.x[0].template as<T>();
  target_.launch(input);
  for (size_t l = 0; l < constants.fitting.size(); ++l) {
    FittingForward<N> kernel;
    kernel.layer = constants.fitting[l];
    kernel.n_row = g_.n_local;
    kernel.x = b_.x[l].template as<T>();
    kernel.y = b_.x[l + 1].template as<T>();
    kernel.slope = b_.slope[l].template as<T>();
    target_.launch(kernel);
  }
  Energies<T> sum;
  sum.g = g_;
  sum.in = static_cast<int>(ops::padded<T>(constants.out_width));
  sum.x = b_.x.back().template as<T>();
  sum.w = constants.out_matrix;
  sum.bias = constants.out_bias;
  sum.shift = constants.shift;
  sum.weight = constants.energy_weight;
  sum.energies = energies;
  sum.dx = b_.dx[0].template as<T>();
  target_.launch(sum);
  SumSystems total;
  total.g = g_;
  total.by_engine_row = true;
  total.values = energies;
  total.out = energy;
  target_.launch(total);
}

/// From the energies to the features of the last layer.
template <class N, class Target>
void Step<N, Target>::readout_backward() {
  const ops::LayerShape& s = shape(0);
  const Constants<T>& constants = weights_.constants();
  size_t current = 0;
  for (size_t l = constants.fitting.size(); l-- > 0;) {
    FittingBackward<N> kernel;
    kernel.layer = constants.fitting[l];
    kernel.n_row = g_.n_local;
    kernel.slope = b_.slope[l].template as<T>();
    kernel.dy = b_.dx[current].template as<T>();
    kernel.dx = b_.dx[1 - current].template as<T>();
    target_.launch(kernel);
    current = 1 - current;
  }
  TakeColumns<T> take;
  take.n_row = g_.n_local;
  take.n = static_cast<int>(s.n);
  take.np = static_cast<int>(s.np);
  take.from = static_cast<int>(ops::padded<T>(s.n + constants.n_constant));
  take.in = b_.dx[current].template as<T>();
  take.out = b_.dv.template as<T>();
  target_.launch(take);
}

/// From the features and the geometry of the edges to their vectors.
template <class N, class Target>
void Step<N, Target>::geometry_backward() {
  const Constants<T>& constants = weights_.constants();
  GeometryBackward<T> kernel;
  kernel.g = g_;
  kernel.rules = constants.geometry;
  kernel.edges = edges_;
  kernel.ep = static_cast<int>(shape(0).ep);
  kernel.use_dist = weights_.model().use_dist;
  kernel.phi = Phi<T>(weights_.model().phi);
  kernel.matrix = constants.edge_matrix;
  kernel.bias = constants.edge_bias;
  kernel.dcos = b_.dcos.template as<T>();
  kernel.dasw = b_.dasw.template as<T>();
  kernel.de = b_.de[de_current_].template as<T>();
  kernel.dsw = b_.dsw.template as<double>();
  kernel.dh = b_.dh.template as<double>();
  kernel.gradient = b_.gradient.template as<double>();
  kernel.centre = b_.centre.template as<double>();
  target_.launch(kernel);
}

template <class N, class Target>
void Step<N, Target>::gather(const Request& request, double* forces, double* virial, double* atom_virial) {
  if (request.forces || request.atom_virial) {
    Forces kernel;
    kernel.g = g_;
    kernel.gradient = b_.gradient.template as<double>();
    kernel.vec = edges_.vec;
    kernel.centre = b_.centre.template as<double>();
    kernel.forces = forces;
    kernel.atom_virial = atom_virial;
    target_.launch(kernel);
  }
  if (request.virial) {
    SumSystems kernel;
    kernel.g = g_;
    kernel.width = 9;
    kernel.stride = 12;
    kernel.scale = -1.0;
    kernel.values = b_.centre.template as<double>() + 3;
    kernel.out = virial;
    target_.launch(kernel);
  }
}

}  // namespace moecalc::cuda
