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
  Index first;                       // angles -> edges ij
  Index second;                      // angles -> edges ik
  Index slot;                        // edges -> (routing group, neighbor) pairs that occur
  Index slot_node;                   // these -> nodes
  std::vector<int64_t> slot_splits;  // (n_group + 1)
  std::vector<uint8_t> close;        // (n_edge) whether an edge has angles
};

/// Features of nodes, edges and angles.
template <class Real>
struct Features {
  Variable<Real> node;
  Variable<Real> edge;
  Variable<Real> angle;
};

/// What all layers read of the geometry.
template <class Real>
struct Directions {
  Variable<Real> switch_edge;   // (E, 1)
  Variable<Real> directions;    // (E, 3)
  Variable<Real> switch_angle;  // (A, 1)
};

/// A layer's maps by position, and those that compress the angle input ("" where nothing is multiplied).
template <class Real>
struct LayerMaps {
  std::map<std::string, LinearMap<Real>> positions;
  LinearMap<Real> compress_n;
  LinearMap<Real> compress_e;
};

template <class Real>
class Layer {
 public:
  using Var = Variable<Real>;

  /// All arguments must outlive the tape's backward.
  Layer(const LayerSource& source, const LayerMaps<Real>& maps, const Connections& connections,
        const Directions<Real>& directions, Tape<Real>& tape)
      : source_(source),
        maps_(maps),
        graph_(connections.graph),
        at_(connections),
        directions_(directions),
        tape_(tape) {}

  /// Nodes (n_node, n_dim) -> (n_local, n_dim); edges (E, e_dim), angles (A, a_dim).
  Features<Real> run(const Features<Real>& in) const;

 private:
  /// What angles read: their features, and the compressed ones of centre and edges.
  struct AngleInputs {
    Var angle;
    Var node;
    Var edge;
  };

  Features<Real> at_once(const Features<Real>& in, const Var& local) const;
  Features<Real> in_sequence(const Features<Real>& in, const Var& local) const;
  Var updated_nodes(const Var& node, const Var& local, const Var& edge) const;
  Var angle_to_edge(const Var& edge, const AngleInputs& in) const;
  Var compressed_nodes(const Var& local) const;
  Var compressed_edges(const Var& edge) const;

  /// Outputs of a position on rows that carry their whole input, on edges, on angles.
  Var on_rows(const char* position, const Var& rows, const std::vector<int64_t>& splits) const;
  Var on_edges(const char* position, const Var& node, const Var& local, const Var& edge) const;
  Var on_angles(const char* position, const AngleInputs& in) const;
  Var finished(Var pre_activation, const LinearMap<Real>& map, const std::vector<int64_t>& splits) const;

  /// keep * in plus the updates times the rows first.. of `coefficients`.
  Var update(const Var& in, double keep, const std::vector<Var>& updates, const Array& coefficients,
             int64_t first = 0) const;

  const LayerSource& source_;
  const LayerMaps<Real>& maps_;
  const PreparedGraph& graph_;
  const Connections& at_;
  const Directions<Real>& directions_;
  Tape<Real>& tape_;
};

}  // namespace moecalc::plain
