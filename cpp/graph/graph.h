// From an engine's list and positions to the order that the model's layers require.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"

namespace moecalc {

/// What a model says about the graphs that it accepts.
struct GraphRules {
  int64_t n_types = 0;
  double cutoff = 0.0;        // edges: r <= cutoff, in Angstrom
  double angle_cutoff = 0.0;  // angles: both r < angle_cutoff; 0 = no angles
  /// (n_types * n_types) row: centre type, column: neighbor type; 0 = that pair makes no edge.
  std::vector<uint8_t> pair_mask;
  /// Atoms are grouped by type, or (if true) by structure.
  bool group_by_system = false;
  /// Or by condition and type, where experts depend on charge and spin.
  bool group_by_condition = false;
  /// Of the structures to come: type = condition * n_types + element in model order. One entry: of all.
  std::vector<int64_t> condition_of_system{0};
  int64_t n_conditions = 1;

  int64_t condition(int64_t system) const {
    return condition_of_system.size() == 1 ? condition_of_system[0]
                                           : condition_of_system[static_cast<size_t>(system)];
  }
  int64_t n_groups(int64_t n_systems) const {
    return group_by_system ? n_systems : group_by_condition ? n_conditions * n_types : n_types;
  }
};

/// A graph in model order.
///
/// Local atoms are sorted by group, ghosts keep their engine rows; edges are sorted by centre, angle
/// neighbors first, and angles by edge. All sorts are stable, so equal input gives bitwise equal output.
struct PreparedGraph {
  int64_t n_node = 0;
  int64_t n_local = 0;
  int64_t n_edge = 0;
  int64_t n_angle = 0;
  int64_t n_systems = 1;
  int64_t max_neighbors = 0;
  int64_t max_angle_neighbors = 0;
  std::vector<int64_t> types;       // (n_node) condition * n_types + element
  std::vector<int64_t> centre;      // (n_edge)
  std::vector<int64_t> neighbor;    // (n_edge)
  std::vector<double> edge_vec;     // (n_edge * 3)
  std::vector<int64_t> list_edge;   // (n_edge) edge of the engine's list
  std::vector<int64_t> engine_row;  // (n_node) engine row of each model row; the identity for ghosts
  std::vector<int64_t> model_row;   // (n_local) model row of each local engine row
  std::vector<int64_t> system;      // (n_local) structure of each model row
  std::vector<double> composition;  // (n_systems * n_types) atom counts of this rank
  /// Edges of centre i: edge_offset[i]..edge_offset[i + 1], the first close_count[i] of them within the angle
  /// cutoff; its angles (j, k): angle_offset[i] + j * close_count[i] + k.
  std::vector<int64_t> edge_offset;
  std::vector<int64_t> angle_offset;
  std::vector<int64_t> close_count;
  /// Rows splits[g]:splits[g+1] belong to group g.
  std::vector<int64_t> node_splits;
  std::vector<int64_t> edge_splits;
  std::vector<int64_t> angle_splits;

  int64_t n_group() const { return static_cast<int64_t>(node_splits.size()) - 1; }
};

/// Edge ids (ij) and (ik) of all angles, each (n_angle).
struct AngleIndex {
  std::vector<int64_t> first;
  std::vector<int64_t> second;
};
MOECALC_API AngleIndex angle_index(const PreparedGraph& graph);

/// Sorts a list once, and makes the graph of it for the positions of every step.
class MOECALC_API GraphBuilder {
 public:
  /// Sorts atoms by group and edges by centre. `list`: checked.
  void set_list(const NeighborList& list, const GraphRules& rules);
  bool has_list() const { return has_list_; }
  void clear() { has_list_ = false; }

  /// The graph at checked positions; it stays valid until the next call. Throws Error that names the atoms
  /// for distances that are zero or not finite.
  const PreparedGraph& prepare(const Array& positions, const Array& cells);

 private:
  /// One of the list's edges.
  struct Edge {
    int64_t from;  // row of positions
    int64_t to;
    int64_t neighbor;  // model row
    int64_t id;        // in the list
    double shift[3];   // cells
  };
  /// An edge within the cutoff.
  struct Placed {
    int64_t neighbor;
    int64_t id;
    double vector[3];
  };

  void measure(const Edge& edge, const double* positions, const double* cell, double* vector) const;
  void place_edges(int64_t centre, const double* positions, const double* cell);
  void put(int64_t centre, const Placed& edge);
  void resize_edges(size_t n_edge);
  [[noreturn]] void refuse_edge(int64_t centre, const Placed& edge, double distance) const;

  bool has_list_ = false;
  bool shifted_ = false;
  double cutoff_ = 0.0;
  double angle_cutoff_ = 0.0;
  PreparedGraph graph_;
  std::vector<Edge> edges_;          // that the pair mask allows, sorted by centre, otherwise as listed
  std::vector<int64_t> edge_begin_;  // (n_local + 1) into them
  std::vector<Placed> far_;          // of one centre
  int64_t n_placed_ = 0;             // edges of the graph so far
};

/// Checks types, shapes and indices, and returns the list, complete (edge_from, edge_to). Throws Error.
NeighborList checked_list(const NeighborList& list, const GraphRules& rules);

/// Rows of positions that the edges of a checked list name.
int64_t position_rows(const NeighborList& list);

/// Checks what changes between two evaluations of a list: throws Error for wrong shapes, fewer than `n_rows`
/// positions or values that are not finite.
void check_positions(const NeighborList& list, int64_t n_rows, const Array& positions, const Array& cells);

/// A list whose edges are these vectors, and positions for it: every edge starts at one position, the origin,
/// and ends at one of its own. For reference structures and training.
struct ListedEdges {
  NeighborList list;
  Array positions;
};
/// types (n,), edge_index (2, E) and system_index (n_local,) int64, edge_vec (E, 3) float64.
ListedEdges list_of_edges(const Array& types, const Array& edge_index, const Array& edge_vec,
                          const Array& system_index, int64_t n_systems);

/// Checks type and shape (-1: any length). Throws Error that names the array.
void check_array(const Array& array, const char* name, Dtype dtype, const Shape& shape);

}  // namespace moecalc
