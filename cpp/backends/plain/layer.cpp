#include "backends/plain/layer.h"

#include <cmath>
#include <utility>

namespace moecalc::plain {

Connections::Connections(const PreparedGraph& from) : graph(from) {
  centre = Index(graph.centre, graph.n_local);
  neighbor = Index(graph.neighbor, graph.n_node);
  AngleIndex angles = angle_index(graph);
  first = Index(std::move(angles.first), graph.n_edge);
  second = Index(std::move(angles.second), graph.n_edge);
  Slots slots;
  make_slots(graph.neighbor, graph.edge_splits, graph.n_node, slots);
  slot = Index(slots.of_edge, static_cast<int64_t>(slots.node.size()));
  slot_node = Index(slots.node, graph.n_node);
  slot_splits = std::move(slots.splits);
  close.assign(static_cast<size_t>(graph.n_edge), 0);
  for (size_t i = 0; i < static_cast<size_t>(graph.n_local); ++i) {
    const auto begin = close.begin() + static_cast<std::ptrdiff_t>(graph.edge_offset[i]);
    std::fill_n(begin, graph.close_count[i], uint8_t(1));
  }
}

// --- positions ---

template <class Real>
auto Layer<Real>::finished(Var pre_activation, const LinearMap<Real>& map,
                           const std::vector<int64_t>& splits) const -> Var {
  return tape_.summed(tape_.activated(std::move(pre_activation), source_.phi), map, splits);
}

template <class Real>
auto Layer<Real>::on_rows(const char* position, const Var& rows, const std::vector<int64_t>& splits) const
    -> Var {
  const LinearMap<Real>& map = maps_.positions.at(position);
  return finished(tape_.product(rows, map, 0, splits, true), map, splits);
}

/// Of [v_i, v_j, e_ij], which is never joined: the node parts are products per node.
template <class Real>
auto Layer<Real>::on_edges(const char* position, const Var& node, const Var& local, const Var& edge) const
    -> Var {
  const LinearMap<Real>& map = maps_.positions.at(position);
  const int64_t n = source_.shape.n;
  Var sum = tape_.product(edge, map, 2 * n, graph_.edge_splits, false);
  const Var centre_part = tape_.product(local, map, 0, graph_.node_splits, true);
  sum = tape_.plus_gathered(std::move(sum), centre_part, at_.centre);
  if (map.routed) {
    const Var at_slots = tape_.product(tape_.gathered(node, at_.slot_node), map, n, at_.slot_splits, false);
    sum = tape_.plus_gathered(std::move(sum), at_slots, at_.slot);
  } else {
    const Var neighbor_part = tape_.product(node, map, n, graph_.node_splits, false);
    sum = tape_.plus_gathered(std::move(sum), neighbor_part, at_.neighbor);
  }
  return finished(std::move(sum), map, graph_.edge_splits);
}

/// Of [a_ijk, vc_i, ec_ik, ec_ij]: k before j.
template <class Real>
auto Layer<Real>::on_angles(const char* position, const AngleInputs& in) const -> Var {
  const LinearMap<Real>& map = maps_.positions.at(position);
  const int64_t centre = in.angle->columns();
  const int64_t second = centre + in.node->columns();
  const int64_t first = second + in.edge->columns();
  const Var at_centre = tape_.product(in.node, map, centre, graph_.node_splits, true);
  Var at_first = tape_.product(in.edge, map, first, graph_.edge_splits, false);
  at_first = tape_.plus_gathered(std::move(at_first), at_centre, at_.centre);
  const Var at_second = tape_.product(in.edge, map, second, graph_.edge_splits, false);
  Var sum = tape_.product(in.angle, map, 0, graph_.angle_splits, false);
  sum = tape_.plus_gathered(std::move(sum), at_first, at_.first);
  sum = tape_.plus_gathered(std::move(sum), at_second, at_.second);
  return finished(std::move(sum), map, graph_.angle_splits);
}

// --- updates ---

template <class Real>
auto Layer<Real>::update(const Var& in, double keep, const std::vector<Var>& updates,
                         const Array& coefficients, int64_t first) const -> Var {
  const auto width = static_cast<size_t>(in->columns());
  std::vector<Term<Real>> terms;
  terms.push_back({in, keep == 1.0 ? std::vector<Real>() : std::vector<Real>(width, Real(keep))});
  const double* row = coefficients.data<double>() + static_cast<size_t>(first) * width;
  for (const Var& each : updates) {
    terms.push_back({each, std::vector<Real>(row, row + width)});
    row += width;
  }
  return tape_.combination(terms);
}

template <class Real>
auto Layer<Real>::compressed_nodes(const Var& local) const -> Var {
  if (source_.compress_n.defined()) {
    return tape_.product(local, maps_.compress_n, 0, graph_.node_splits, false);
  }
  return tape_.columns(local, 0, source_.vc_dim);
}

template <class Real>
auto Layer<Real>::compressed_edges(const Var& edge) const -> Var {
  if (source_.compress_e.defined()) {
    return tape_.product(edge, maps_.compress_e, 0, graph_.edge_splits, false);
  }
  return tape_.columns(edge, 0, source_.ec_dim);
}

/// m_ij = Na^(-1/2) sum_k s_ijk A(a_ijk, ...), the message of the angles to their first edge, and its map,
/// (E, e_dim).
template <class Real>
auto Layer<Real>::angle_to_edge(const Var& edge, const AngleInputs& in) const -> Var {
  const Real factor = Real(1.0 / std::sqrt(source_.shape.angle_norm));
  const Var of_angles = on_angles("edge_angle_linear1", in);
  Var message = tape_.weighted_sums(of_angles, directions_.switch_angle, at_.first, factor);
  if (source_.shape.keep_far) message = tape_.choice(at_.close, message, edge);
  return on_rows("edge_angle_linear2", message, graph_.edge_splits);
}

/// From itself, from the invariants of edges and neighbors, and from the messages (1 / Ne) sum_j s_ij A_ij.
template <class Real>
auto Layer<Real>::updated_nodes(const Var& node, const Var& local, const Var& edge) const -> Var {
  const kernels::LayerShape& shape = source_.shape;
  const Var neighbor = tape_.gathered(node, at_.neighbor);
  const auto invariants_of = [&](const Var& features) {
    return tape_.symmetrized(features, directions_.switch_edge, directions_.directions, at_.centre,
                             shape.axis, shape.edge_norm);
  };
  const Var of_edge = invariants_of(edge);
  const Var of_neighbor = invariants_of(neighbor);
  const Var invariants = tape_.joined({of_edge, of_neighbor});
  std::vector<Var> updates;
  updates.push_back(on_rows("node_self_mlp", local, graph_.node_splits));
  updates.push_back(on_rows("node_sym_linear", invariants, graph_.node_splits));
  const Var messages = on_edges("node_edge_linear", node, local, edge);
  const Var message =
      tape_.weighted_sums(messages, directions_.switch_edge, at_.centre, Real(1.0 / shape.edge_norm));
  for (int64_t head = 0; head < shape.heads; ++head) {
    updates.push_back(tape_.columns(message, head * shape.n, shape.n));
  }
  return update(local, shape.keep_node, updates, source_.update_node);
}

// --- the two orders of updates ---

/// All updates from the layer's input.
template <class Real>
Features<Real> Layer<Real>::at_once(const Features<Real>& in, const Var& local) const {
  const kernels::LayerShape& shape = source_.shape;
  Features<Real> out = in;
  AngleInputs angles;
  if (shape.with_angles) angles = {in.angle, compressed_nodes(local), compressed_edges(in.edge)};
  if (shape.live_angle) {
    const Var self = on_angles("angle_self_linear", angles);
    out.angle = update(in.angle, shape.keep_angle, {self}, source_.update_angle);
  }
  if (shape.live_edge) {
    std::vector<Var> updates{on_edges("edge_self_linear", in.node, local, in.edge)};
    if (shape.with_angles) updates.push_back(angle_to_edge(in.edge, angles));
    out.edge = update(in.edge, shape.keep_edge, updates, source_.update_edge);
  }
  out.node = updated_nodes(in.node, local, in.edge);
  return out;
}

/// Edges, angles and nodes read each other's new values.
template <class Real>
Features<Real> Layer<Real>::in_sequence(const Features<Real>& in, const Var& local) const {
  const kernels::LayerShape& shape = source_.shape;
  Features<Real> out = in;
  if (shape.live_edge) {
    const Var self = on_edges("edge_self_linear", in.node, local, in.edge);
    out.edge = update(in.edge, shape.keep_edge, {self}, source_.update_edge);
  }
  if (shape.with_angles) {
    AngleInputs angles{in.angle, compressed_nodes(local), compressed_edges(out.edge)};
    if (shape.live_angle) {
      const Var self = on_angles("angle_self_linear", angles);
      out.angle = update(in.angle, shape.keep_angle, {self}, source_.update_angle);
      angles.angle = out.angle;
    }
    const Var message = angle_to_edge(out.edge, angles);
    out.edge = update(out.edge, shape.keep_edge, {message}, source_.update_edge, 1);
  }
  out.node = updated_nodes(in.node, local, out.edge);
  return out;
}

template <class Real>
Features<Real> Layer<Real>::run(const Features<Real>& in) const {
  const Var local = tape_.first_rows(in.node, graph_.n_local);
  return source_.sequential ? in_sequence(in, local) : at_once(in, local);
}

template class Layer<float>;
template class Layer<double>;

}  // namespace moecalc::plain
