// The geometry of edges, as a package describes it and as kernels take it.
#pragma once

#include <cmath>

#include "kernels/common/edge_geometry.h"
#include "package/architecture.h"

namespace moecalc {

/// `edge_norm`: Ne, the divisor of sums over edges.
inline kernels::EdgeRules edge_rules(const GeometryRules& geometry, double edge_norm) {
  kernels::EdgeRules rules;
  rules.switch_edge = geometry.edge;
  rules.switch_angle = geometry.angle;
  rules.protection = geometry.protection;
  rules.norm = 1.0 / std::sqrt(edge_norm);
  rules.use_distance = geometry.use_dist;
  return rules;
}

}  // namespace moecalc
