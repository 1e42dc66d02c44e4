// Geometry of edges and angles: from the vectors of edges to what the network reads of them, and back from
// its gradients to the vectors (SPEC sections 3 to 5). The CPU and the CUDA backend both call these
// functions. All numbers are float64; lengths in Angstrom.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"
#include "kernels/common/switch.h"

namespace moecalc::kernels {

constexpr double kBelowOne = 1.0 - 1e-6;  // keeps cosines within (-1, 1)
constexpr double kLengthShift = 1e-6;     // of the length that an angle's direction is divided by

/// What the geometry of an edge depends on besides its vector.
struct EdgeRules {
  Switch switch_edge;
  Switch switch_angle;
  double protection = 0.0;   // added to distances that are divided by
  double norm = 1.0;         // 1 / sqrt(Ne), Ne: the divisor of sums over edges
  bool use_distance = true;  // the input of the edge embedding is the distance
};

/// Mean and standard deviation, (4) each, of the type of an edge's centre.
struct TypeStatistics {
  const double* mean = nullptr;
  const double* stddev = nullptr;
};

/// What the network reads of an edge.
struct EdgeDescription {
  double switch_edge;
  double input;  // of the edge embedding
  double directions[3];
};

MOECALC_BOTH double length_of(const double* vector) {
  return sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2]);
}

/// With x the vector, r its length, s = s(r), p the protection, mu and sigma the statistics:
///   input = r, or (s / (r + p) - mu_0) / sigma_0
///   directions = Ne^(-1/2) s h,  h = (s x / (r + p)^2 - mu_123) / sigma_123
MOECALC_BOTH EdgeDescription describe_edge(const EdgeRules& rules, const TypeStatistics& type,
                                           const double* vector, double distance) {
  EdgeDescription edge;
  double slope;
  rules.switch_edge(distance, edge.switch_edge, slope);
  const double shifted = distance + rules.protection;
  edge.input = rules.use_distance ? distance : (edge.switch_edge / shifted - type.mean[0]) / type.stddev[0];
  for (int c = 0; c < 3; ++c) {
    edge.directions[c] = rules.norm * edge.switch_edge *
                         (edge.switch_edge * vector[c] / (shifted * shifted) - type.mean[c + 1]) /
                         type.stddev[c + 1];
  }
  return edge;
}

/// u = x / (r + 1e-6), the direction of an edge in cosines.
MOECALC_BOTH void unit_vector(const double* vector, double distance, double* unit) {
  for (int c = 0; c < 3; ++c) unit[c] = vector[c] / (distance + kLengthShift);
}

/// cos = (u_ij . u_ik) (1 - 1e-6).
MOECALC_BOTH double cosine_of(const double* first_unit, const double* second_unit) {
  return (first_unit[0] * second_unit[0] + first_unit[1] * second_unit[1] + first_unit[2] * second_unit[2]) *
         kBelowOne;
}

/// Gradients with respect to the description of an edge.
struct EdgeGradients {
  double d_input = 0.0;
  double d_switch_edge = 0.0;
  const double* d_directions = nullptr;  // (3)
};

/// Gradients with respect to the angle switch and the unit vector of an edge: sums over its angles. Without
/// initial values, because arrays of it stay uninitialised.
struct AngleGradients {
  double d_switch;
  double d_unit[3];
};

/// Adds an angle of the edge with another one, of `other_switch` and `other_unit`. From cos = u . u' (1 -
/// 1e-6) and switch_angle = s s':  ds += d_switch_angle s',  du += d_cosine (1 - 1e-6) u'.
MOECALC_BOTH void add_angle(AngleGradients& sums, double d_cosine, double d_switch_angle, double other_switch,
                            const double* other_unit) {
  sums.d_switch += d_switch_angle * other_switch;
  const double d_product = d_cosine * kBelowOne;
  for (int c = 0; c < 3; ++c) sums.d_unit[c] += d_product * other_unit[c];
}

/// Gradient with respect to the vector of an edge: dx + dr x / r, with the derivatives of `describe_edge` and
/// of the angles' parts. `angles`: null for an edge without angles. `angle_slope`: derivative of its angle
/// switch.
MOECALC_BOTH void vector_gradient(const EdgeRules& rules, const TypeStatistics& type, const double* vector,
                                  double distance, const EdgeGradients& edge, const AngleGradients* angles,
                                  double angle_slope, double* d_vector) {
  const double shifted = distance + rules.protection;
  const double inverse = 1.0 / (shifted * shifted);
  double switch_edge;
  double slope;
  rules.switch_edge(distance, switch_edge, slope);
  double d_distance = 0.0;
  double d_switch = edge.d_switch_edge;
  double d_direct[3] = {0.0, 0.0, 0.0};  // at fixed distance
  if (rules.use_distance) {
    d_distance += edge.d_input;
  } else {
    d_switch += edge.d_input / (shifted * type.stddev[0]);
    d_distance -= edge.d_input * switch_edge / (shifted * shifted * type.stddev[0]);
  }
  for (int c = 0; c < 3; ++c) {
    const double standardized = (switch_edge * vector[c] * inverse - type.mean[c + 1]) / type.stddev[c + 1];
    d_switch += edge.d_directions[c] * rules.norm * standardized;
    const double d_quotient = edge.d_directions[c] * rules.norm * switch_edge / type.stddev[c + 1];
    d_switch += d_quotient * vector[c] * inverse;
    d_direct[c] += d_quotient * switch_edge * inverse;
    d_distance -= 2.0 * d_quotient * switch_edge * vector[c] * inverse / shifted;
  }
  d_distance += d_switch * slope;
  if (angles != nullptr) {
    const double length = distance + kLengthShift;
    d_distance += angles->d_switch * angle_slope;
    for (int c = 0; c < 3; ++c) {
      d_direct[c] += angles->d_unit[c] / length;
      d_distance -= angles->d_unit[c] * vector[c] / (length * length);
    }
  }
  for (int c = 0; c < 3; ++c) d_vector[c] = d_direct[c] + d_distance * vector[c] / distance;
}

}  // namespace moecalc::kernels
