// From vectors of edges to the invariants that the model reads, and back, in float64 (SPEC sections 3, 4).
// Written on its own, not with kernels/common/edge_geometry.h: the plain backend checks the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "core/threads.h"
#include "graph/graph.h"
#include "package/architecture.h"
#include "package/conditions.h"

namespace moecalc::plain {

/// What layers and embedding read of a geometry, or the gradients of these.
struct Invariants {
  std::vector<double> edge_input;    // (n_edge): distance, or the environment's radial entry
  std::vector<double> switch_edge;   // (n_edge)
  std::vector<double> directions;    // (n_edge * 3), switched
  std::vector<double> cosine;        // (n_angle)
  std::vector<double> switch_angle;  // (n_angle) product of the switches of both edges
};

class Geometry {
 public:
  /// All arguments must outlive this.
  Geometry(const PreparedGraph& graph, const GeometryRules& rules, const TypeTables& tables,
           ThreadPool& threads);

  const Invariants& invariants() const { return invariants_; }
  /// dE/d(edge_vec), (n_edge * 3), from the gradients of the invariants.
  std::vector<double> backward(const Invariants& gradient) const;

 private:
  void edge_forward(size_t edge);
  void angles_forward(size_t centre);
  void edge_backward(size_t edge, const Invariants& gradient, double* d_vector) const;
  void angles_backward(size_t centre, const Invariants& gradient, double* d_vectors) const;
  const double* vector_of(size_t edge) const { return &graph_.edge_vec[3 * edge]; }
  size_t type_of_centre(size_t edge) const {
    return static_cast<size_t>(graph_.types[static_cast<size_t>(graph_.centre[edge])]);
  }

  const PreparedGraph& graph_;
  const GeometryRules& rules_;
  const TypeTables& tables_;
  ThreadPool& threads_;
  Invariants invariants_;
  std::vector<double> distance_;      // (n_edge) Angstrom
  std::vector<double> switch_slope_;  // (n_edge)
  std::vector<double> unit_;          // (n_edge * 3), a little shorter than 1
  std::vector<double> close_switch_;  // (n_edge) of the angles
  std::vector<double> close_slope_;   // (n_edge)
};

}  // namespace moecalc::plain
