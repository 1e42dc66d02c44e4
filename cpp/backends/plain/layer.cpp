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

template <class T>
auto Layer<T>::finished(Var z, const LinearMap<T>& map, const std::vector<int64_t>& splits) const -> Var {
  return tape_.summed(tape_.activated(std::move(z), source_.phi), map, splits);
}

template <class T>
auto Layer<T>::on_rows(const char* position, const Var& x, const std::vector<int64_t>& splits) const -> Var {
  const LinearMap<T>& map = maps_.positions.at(position);
  return finished(tape_.product(x, map, 0, splits, true), map, splits);
}

/// Of [v_i, v_j, e_ij], which is never joined: the node parts are products per node.
template <class T>
auto Layer<T>::on_edges(const char* position, const Var& v, const Var& v_local, const Var& e) const -> Var {
  const LinearMap<T>& map = maps_.positions.at(position);
  const int64_t n = source_.shape.n;
  Var z = tape_.product(e, map, 2 * n, graph_.edge_splits, false);
  z = tape_.plus_gathered(std::move(z), tape_.product(v_local, map, 0, graph_.node_splits, true), at_.centre);
  if (map.routed) {
    const Var at_slots = tape_.product(tape_.gathered(v, at_.slot_node), map, n, at_.slot_splits, false);
    z = tape_.plus_gathered(std::move(z), at_slots, at_.slot);
  } else {
    z = tape_.plus_gathered(std::move(z), tape_.product(v, map, n, graph_.node_splits, false), at_.neighbor);
  }
  return finished(std::move(z), map, graph_.edge_splits);
}

/// Of [a_ijk, vc_i, ec_ik, ec_ij]: k before j.
template <class T>
auto Layer<T>::on_angles(const char* position, const Var& a, const Var& vc, const Var& ec) const -> Var {
  const LinearMap<T>& map = maps_.positions.at(position);
  const int64_t centre = a->columns(), second = centre + vc->columns(), first = second + ec->columns();
  const Var at_centre = tape_.product(vc, map, centre, graph_.node_splits, true);
  const Var at_first =
      tape_.plus_gathered(tape_.product(ec, map, first, graph_.edge_splits, false), at_centre, at_.centre);
  const Var at_second = tape_.product(ec, map, second, graph_.edge_splits, false);
  Var z = tape_.product(a, map, 0, graph_.angle_splits, false);
  z = tape_.plus_gathered(std::move(z), at_first, at_.first);
  z = tape_.plus_gathered(std::move(z), at_second, at_.second);
  return finished(std::move(z), map, graph_.angle_splits);
}

// --- updates ---

template <class T>
auto Layer<T>::update(const Var& x, double keep, const std::vector<Var>& updates, const Array& coefficients,
                      int64_t first) const -> Var {
  const auto width = static_cast<size_t>(x->columns());
  std::vector<Term<T>> terms;
  terms.push_back({x, keep == 1.0 ? std::vector<T>() : std::vector<T>(width, T(keep))});
  const double* row = coefficients.data<double>() + static_cast<size_t>(first) * width;
  for (const Var& u : updates) {
    terms.push_back({u, std::vector<T>(row, row + width)});
    row += width;
  }
  return tape_.combination(terms);
}

template <class T>
auto Layer<T>::compressed_nodes(const Var& v_local) const -> Var {
  if (source_.compress_n.defined()) {
    return tape_.product(v_local, maps_.compress_n, 0, graph_.node_splits, false);
  }
  return tape_.columns(v_local, 0, source_.vc_dim);
}

template <class T>
auto Layer<T>::compressed_edges(const Var& e) const -> Var {
  if (source_.compress_e.defined()) {
    return tape_.product(e, maps_.compress_e, 0, graph_.edge_splits, false);
  }
  return tape_.columns(e, 0, source_.ec_dim);
}

/// Message of the angles to their first edge, (E, e_dim).
template <class T>
auto Layer<T>::angle_to_edge(const Var& e, const Var& a, const Var& vc, const Var& ec) const -> Var {
  const T factor = T(1.0 / std::sqrt(source_.shape.angle_norm));
  const Var message = on_angles("edge_angle_linear1", a, vc, ec);
  Var m = tape_.weighted_sums(message, directions_.asw, at_.first, factor);
  if (source_.shape.keep_far) m = tape_.choice(at_.close, m, e);
  return on_rows("edge_angle_linear2", m, graph_.edge_splits);
}

template <class T>
auto Layer<T>::updated_nodes(const Var& v, const Var& v_local, const Var& e) const -> Var {
  const ops::LayerShape& s = source_.shape;
  const Directions<T>& to = directions_;
  const Var v_j = tape_.gathered(v, at_.neighbor);
  const Var invariants = tape_.joined({tape_.symmetrized(e, to.sw, to.h, at_.centre, s.axis, s.edge_norm),
                                       tape_.symmetrized(v_j, to.sw, to.h, at_.centre, s.axis, s.edge_norm)});
  std::vector<Var> updates{on_rows("node_self_mlp", v_local, graph_.node_splits),
                           on_rows("node_sym_linear", invariants, graph_.node_splits)};
  const Var message = tape_.weighted_sums(on_edges("node_edge_linear", v, v_local, e), to.sw, at_.centre,
                                          T(1.0 / s.edge_norm));
  for (int64_t head = 0; head < s.heads; ++head) updates.push_back(tape_.columns(message, head * s.n, s.n));
  return update(v_local, s.keep_n, updates, source_.update_n);
}

// --- the two orders of updates ---

/// All updates from the layer's input.
template <class T>
Features<T> Layer<T>::at_once(const Features<T>& in, const Var& v_local) const {
  const ops::LayerShape& s = source_.shape;
  Features<T> out = in;
  Var vc, ec;
  if (s.with_angles) {
    vc = compressed_nodes(v_local);
    ec = compressed_edges(in.e);
  }
  if (s.live_angle) {
    out.a = update(in.a, s.keep_a, {on_angles("angle_self_linear", in.a, vc, ec)}, source_.update_a);
  }
  if (s.live_edge) {
    std::vector<Var> updates{on_edges("edge_self_linear", in.v, v_local, in.e)};
    if (s.with_angles) updates.push_back(angle_to_edge(in.e, in.a, vc, ec));
    out.e = update(in.e, s.keep_e, updates, source_.update_e);
  }
  out.v = updated_nodes(in.v, v_local, in.e);
  return out;
}

/// Edges, angles and nodes read each other's new values.
template <class T>
Features<T> Layer<T>::in_sequence(const Features<T>& in, const Var& v_local) const {
  const ops::LayerShape& s = source_.shape;
  Features<T> out = in;
  if (s.live_edge) {
    const Var u = on_edges("edge_self_linear", in.v, v_local, in.e);
    out.e = update(in.e, s.keep_e, {u}, source_.update_e);
  }
  if (s.with_angles) {
    const Var vc = compressed_nodes(v_local);
    const Var ec = compressed_edges(out.e);
    if (s.live_angle) {
      out.a = update(in.a, s.keep_a, {on_angles("angle_self_linear", in.a, vc, ec)}, source_.update_a);
    }
    const Var u = angle_to_edge(out.e, out.a, vc, ec);
    out.e = update(out.e, s.keep_e, {u}, source_.update_e, 1);
  }
  out.v = updated_nodes(in.v, v_local, out.e);
  return out;
}

template <class T>
Features<T> Layer<T>::run(const Features<T>& in) const {
  const Var v_local = tape_.first_rows(in.v, graph_.n_local);
  return source_.sequential ? in_sequence(in, v_local) : at_once(in, v_local);
}

template class Layer<float>;
template class Layer<double>;

}  // namespace moecalc::plain
