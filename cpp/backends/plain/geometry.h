// From vectors of edges to the invariants that the model reads, and back, in float64 (SPEC sections 3, 4).
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
  std::vector<double> edge_input;  // (n_edge): distance, or the environment's radial entry
  std::vector<double> sw;          // (n_edge) switch
  std::vector<double> h;           // (n_edge * 3) switched directions
  std::vector<double> cos;         // (n_angle)
  std::vector<double> asw;         // (n_angle) product of the angle switches
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
  void edge_forward(int64_t edge);
  void angles_forward(int64_t centre);
  void edge_backward(int64_t edge, const Invariants& gradient, double* g) const;
  void angles_backward(int64_t centre, const Invariants& gradient, double* g) const;

  const PreparedGraph& graph_;
  const GeometryRules& rules_;
  const TypeTables& tables_;
  ThreadPool& threads_;
  Invariants invariants_;
  std::vector<double> r_;         // (n_edge) Angstrom
  std::vector<double> sw_slope_;  // (n_edge)
  std::vector<double> unit_;      // (n_edge * 3), a little shorter than 1
  std::vector<double> sa_;        // (n_edge) angle switch
  std::vector<double> sa_slope_;  // (n_edge)
};

}  // namespace moecalc::plain
