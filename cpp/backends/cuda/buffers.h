// What a step writes on the target: how much of everything a system needs, and its memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "backends/cuda/memory.h"
#include "moecalc/evaluator.h"
#include "ops/cuda/layer.cuh"
#include "ops/cuda/readout.cuh"
#include "ops/layer.h"

namespace moecalc::cuda {

/// Extent of a system, or capacity for one.
struct Sizes {
  int64_t n_local = 0, n_node = 0, n_list = 0, n_slot = 0, n_systems = 1, edges = 0, close = 0, angles = 0;
};

/// Where the results of a request lie, in numbers: counts, energies, and what else was asked for. What was
/// not is not there: nobody writes it.
struct ResultPlaces {
  int64_t energy = 0, energies = 0, forces = -1, virial = -1, atom_virial = -1, total = 0;

  ResultPlaces(const Sizes& sizes, const Request& request) {
    const auto place = [&](bool wanted, int64_t n) {
      const int64_t first = total;
      if (wanted) total += n;
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

struct Buffers {
  // Per layer: features of nodes, edges and angles, angle messages, sums over edges.
  std::vector<Memory> v, e, a, m, big_h;
  std::vector<Memory> x, slope;  // of the fitting net
  Memory n_close, first_edge, first_close, first_angle, problem, edge_list, edge_centre, edge_of_list, counts;
  Memory vec, r, ds, angle_switch, unit, sw, h, input, cos, asw;
  Memory zc, zn, zca, pq, message, sym;
  Memory de[2], da, dcos, dasw, dsw, dh, dm, dpq, dz, dz_node, dzc, dzca, dbig_h, dsym, dmessage;
  Memory dzn, dv_slot, dv_own, dv, dx[2], gradient, centre;
  Memory results;
};

/// What the buffers depend on besides the system.
template <class T>
struct ModelWidths {
  const std::vector<ops::LayerShape>& layers;
  const std::vector<FittingLayer<T>>& fitting;
  int64_t fitting_out;  // width of the fitting net's last features, padded

  /// f(buffer, bytes) for everything that a system of these sizes needs besides the weights and the list.
  template <class F>
  void plan(Buffers& b, const Sizes& s, const F& f) const;
};

template <class T>
template <class F>
void ModelWidths<T>::plan(Buffers& b, const Sizes& s, const F& f) const {
  const auto values = [&](Memory& to, int64_t n) { f(to, n * static_cast<int64_t>(sizeof(T))); };
  const auto doubles = [&](Memory& to, int64_t n) { f(to, n * 8); };
  const auto ints = [&](Memory& to, int64_t n) { f(to, n * 4); };
  const size_t n_layer = layers.size();
  const ops::LayerShape& s0 = layers[0];
  for (std::vector<Memory>* features : {&b.v, &b.e, &b.a}) features->resize(n_layer + 1);
  for (std::vector<Memory>* sums : {&b.m, &b.big_h}) sums->resize(n_layer);
  b.x.resize(fitting.size() + 1);
  b.slope.resize(fitting.size());

  // the graph of the step
  for (Memory* offsets : {&b.n_close, &b.first_edge, &b.first_close, &b.first_angle, &b.problem}) {
    ints(*offsets, s.n_local + 1);
  }
  ints(b.edge_list, s.edges);
  ints(b.edge_centre, s.edges);
  ints(b.edge_of_list, s.n_list);
  doubles(b.counts, kCounts);
  doubles(b.vec, 3 * s.edges);
  doubles(b.r, s.edges);
  doubles(b.ds, s.edges);
  doubles(b.angle_switch, 2 * s.edges);
  doubles(b.unit, 3 * s.edges);
  values(b.sw, s.edges);
  values(b.h, 4 * s.edges);
  values(b.input, s.edges);
  for (Memory* angles : {&b.cos, &b.asw, &b.dcos, &b.dasw}) values(*angles, s.angles);
  doubles(b.dsw, s.edges);
  doubles(b.dh, 4 * s.edges);

  // features, kept for the backward
  int64_t ce = 0, ca = 0, nodes = 0, width = 0, sym = 0, sym_in = 0;
  values(b.v[0], s.n_node * s0.np);
  values(b.e[0], s.edges * s0.ep);
  bool da = false;
  for (size_t l = 0; l < n_layer; ++l) {
    const ops::LayerShape& shape = layers[l];
    ce = std::max(ce, shape.edge_columns());
    if (shape.with_angles) ca = std::max(ca, shape.angle_columns());
    nodes = std::max(nodes, (shape.k_node + shape.k_sym) * shape.np);
    width = std::max(width, shape.heads * shape.np);
    sym = std::max(sym, shape.sym_width());
    sym_in = std::max(sym_in, shape.sym_in());
    values(b.v[l + 1], s.n_node * shape.np);
    if (shape.live_edge) values(b.e[l + 1], s.edges * shape.ep);
    if (shape.live_angle) values(b.a[l + 1], s.angles * shape.ap);
    if (shape.with_angles) values(b.m[l], (shape.keep_far ? s.edges : s.close) * shape.ep);
    values(b.big_h[l], s.n_local * 3 * shape.sym_width());
    da = da || (shape.with_angles && l > 0) || shape.live_angle;
  }

  // intermediate values and gradients, which all layers share
  const int64_t message_rows = s0.keep_far && s0.with_angles ? s.edges : s.close;
  values(b.zc, s.n_local * ce);
  values(b.zn, s.n_slot * ce);
  values(b.zca, s.n_local * ca);
  values(b.pq, 2 * s.close * ca);
  values(b.message, s.n_local * width);
  values(b.sym, s.n_local * sym_in);
  for (Memory& gradients : b.de) values(gradients, s.edges * s0.ep);
  values(b.da, da ? s.angles * s0.ap : 0);
  values(b.dm, s0.with_angles ? message_rows * s0.ep : 0);
  values(b.dpq, 2 * s.close * ca);
  values(b.dz, s.edges * ce);
  values(b.dz_node, s.n_local * nodes);
  values(b.dzc, s.n_local * ce);
  values(b.dzca, s.n_local * ca);
  values(b.dbig_h, s.n_local * 3 * sym);
  values(b.dsym, s.n_local * sym_in);
  values(b.dmessage, s.n_local * width);
  values(b.dzn, s.n_slot * ce);
  values(b.dv_slot, s.n_slot * s0.np);
  values(b.dv_own, s.n_local * s0.np);
  values(b.dv, s.n_node * s0.np);

  // the fitting net
  int64_t widest = fitting_out;
  for (size_t l = 0; l < fitting.size(); ++l) {
    values(b.x[l], s.n_local * fitting[l].in);
    values(b.slope[l], s.n_local * fitting[l].out);
    widest = std::max<int64_t>({widest, fitting[l].in, fitting[l].out});
  }
  values(b.x.back(), s.n_local * fitting_out);
  for (Memory& gradients : b.dx) values(gradients, s.n_local * widest);

  doubles(b.gradient, 3 * s.edges);
  doubles(b.centre, 12 * s.n_local);
  doubles(b.results, ResultPlaces(s, {true, true, true}).total);
}

template <class T>
int64_t planned_bytes(const ModelWidths<T>& widths, const Sizes& sizes) {
  Buffers unused;
  int64_t total = 0;
  widths.plan(unused, sizes, [&](Memory&, int64_t bytes) { total += (bytes + 511) / 512 * 512; });
  return total;
}

template <class T>
int64_t held_bytes(const ModelWidths<T>& widths, const Buffers& buffers) {
  int64_t total = 0;
  // the buffers are only looked at
  widths.plan(const_cast<Buffers&>(buffers), {}, [&](Memory& to, int64_t) { total += to.bytes(); });
  return total;
}

/// Bytes that are missing for `sizes`, and those of the buffers that would be replaced.
struct Missing {
  int64_t more = 0, released = 0;
};
template <class T>
Missing missing_bytes(const ModelWidths<T>& widths, Buffers& buffers, const Sizes& sizes) {
  Missing missing;
  widths.plan(buffers, sizes, [&](Memory& to, int64_t bytes) {
    if (to.bytes() >= bytes) return;
    missing.more += bytes;
    missing.released += to.bytes();
  });
  return missing;
}

/// Makes every buffer large enough for `sizes`.
template <class T, class Target>
void allocate(const ModelWidths<T>& widths, Buffers& buffers, const Sizes& sizes, Target& target) {
  // release first: old and new need not fit together
  widths.plan(buffers, sizes, [&](Memory& to, int64_t bytes) {
    if (to.bytes() < bytes) to.reset();
  });
  widths.plan(buffers, sizes, [&](Memory& to, int64_t bytes) {
    if (to.bytes() < bytes) to = target.memory(bytes);
  });
  target.trim();  // what the smaller buffers left over is of no use
}

/// Points the kernels' structs at the buffers.
inline void view(const Buffers& b, const Sizes& capacity, Graph& g) {
  g.n_close = b.n_close.as<int>();
  g.first_edge = b.first_edge.as<int>();
  g.first_close = b.first_close.as<int>();
  g.first_angle = b.first_angle.as<int>();
  g.problem = b.problem.as<int>();
  g.edge_list = b.edge_list.as<int>();
  g.edge_centre = b.edge_centre.as<int>();
  g.edge_of_list = b.edge_of_list.as<int>();
  g.counts = b.counts.as<int64_t>();
  g.most_edges = capacity.edges;
  g.most_close = capacity.close;
  g.most_angles = capacity.angles;
}
template <class T>
EdgeGeometry<T> edge_geometry(const Buffers& b) {
  EdgeGeometry<T> edges;
  edges.vec = b.vec.as<double>();
  edges.r = b.r.as<double>();
  edges.slope = b.ds.as<double>();
  edges.angle_switch = b.angle_switch.as<double>();
  edges.unit = b.unit.as<double>();
  edges.sw = b.sw.as<T>();
  edges.h = b.h.as<T>();
  edges.input = b.input.as<T>();
  return edges;
}

/// A system of one structure without ghosts, for estimates.
inline Sizes estimated_sizes(int64_t n_node, int64_t n_edge, int64_t n_angle, int64_t n_group) {
  Sizes s;
  s.n_local = s.n_node = n_node;
  s.edges = s.n_list = n_edge;
  s.angles = n_angle;
  // of the angles m^2 of a centre, m close edges
  const auto nodes = static_cast<double>(n_node);
  if (n_node > 0) s.close = static_cast<int64_t>(std::sqrt(static_cast<double>(n_angle) / nodes) * nodes);
  s.n_slot = std::min(n_edge, n_node * n_group);
  return s;
}

}  // namespace moecalc::cuda
