// One RepFlow layer on a tape (SPEC section 6).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "backends/plain/index.h"
#include "backends/plain/linear_map.h"
#include "backends/plain/tape.h"
#include "graph/graph.h"
#include "graph/list_layout.h"
#include "package/architecture.h"

namespace moecalc::plain {

/// A graph as the operations of the tape read it.
struct Connections {
  explicit Connections(const PreparedGraph& graph);

  const PreparedGraph& graph;
  Index centre;                      // edges -> local nodes
  Index neighbor;                    // edges -> nodes
  Index first, second;               // angles -> edges
  Index slot;                        // edges -> (routing group, neighbour) pairs that occur
  Index slot_node;                   // these -> nodes
  std::vector<int64_t> slot_splits;  // (n_group + 1)
  std::vector<uint8_t> close;        // (n_edge) whether an edge has angles
};

/// Features of nodes, edges and angles.
template <class T>
struct Features {
  Variable<T> v, e, a;
};

/// What all layers read of the geometry: switches (E, 1), directions (E, 3), angle switches (A, 1).
template <class T>
struct Directions {
  Variable<T> sw, h, asw;
};

/// A layer's maps by position, and those that compress the angle input ("" where nothing is multiplied).
template <class T>
struct LayerMaps {
  std::map<std::string, LinearMap<T>> positions;
  LinearMap<T> compress_n, compress_e;
};

template <class T>
class Layer {
 public:
  using Var = Variable<T>;

  /// All arguments must outlive the tape's backward.
  Layer(const LayerSource& source, const LayerMaps<T>& maps, const Connections& connections,
        const Directions<T>& directions, Tape<T>& tape)
      : source_(source),
        maps_(maps),
        graph_(connections.graph),
        at_(connections),
        directions_(directions),
        tape_(tape) {}

  /// v (n_node, n_dim) -> (n_local, n_dim); e (E, e_dim), a (A, a_dim).
  Features<T> run(const Features<T>& in) const;

 private:
  Features<T> at_once(const Features<T>& in, const Var& v_local) const;
  Features<T> in_sequence(const Features<T>& in, const Var& v_local) const;
  Var updated_nodes(const Var& v, const Var& v_local, const Var& e) const;
  Var angle_to_edge(const Var& e, const Var& a, const Var& vc, const Var& ec) const;
  Var compressed_nodes(const Var& v_local) const;
  Var compressed_edges(const Var& e) const;

  /// Outputs of a position on rows that carry their whole input, on edges, on angles.
  Var on_rows(const char* position, const Var& x, const std::vector<int64_t>& splits) const;
  Var on_edges(const char* position, const Var& v, const Var& v_local, const Var& e) const;
  Var on_angles(const char* position, const Var& a, const Var& vc, const Var& ec) const;
  Var finished(Var z, const LinearMap<T>& map, const std::vector<int64_t>& splits) const;

  /// keep * x plus the updates times the rows first.. of `coefficients`.
  Var update(const Var& x, double keep, const std::vector<Var>& updates, const Array& coefficients,
             int64_t first = 0) const;

  const LayerSource& source_;
  const LayerMaps<T>& maps_;
  const PreparedGraph& graph_;
  const Connections& at_;
  const Directions<T>& directions_;
  Tape<T>& tape_;
};

}  // namespace moecalc::plain
