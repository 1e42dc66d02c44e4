#include "backends/plain/geometry.h"

#include <cmath>

#include "backends/plain/matrix.h"

namespace moecalc::plain {

namespace {

constexpr int64_t kCentres = 16;
constexpr double kShorter = 1e-6;  // keeps cosines off 1 and -1, as the models were trained
constexpr double kCosine = 1.0 - 1e-6;

double dot(const double* left, const double* right) {
  return left[0] * right[0] + left[1] * right[1] + left[2] * right[2];
}

}  // namespace

Geometry::Geometry(const PreparedGraph& graph, const GeometryRules& rules, const TypeTables& tables,
                   ThreadPool& threads)
    : graph_(graph), rules_(rules), tables_(tables), threads_(threads) {
  const auto n_edge = static_cast<size_t>(graph.n_edge);
  const auto n_angle = static_cast<size_t>(graph.n_angle);
  for (std::vector<double>* values : {&invariants_.edge_input, &invariants_.switch_edge, &distance_,
                                      &switch_slope_, &close_switch_, &close_slope_}) {
    values->resize(n_edge);
  }
  invariants_.directions.resize(3 * n_edge);
  unit_.resize(3 * n_edge);
  invariants_.cosine.resize(n_angle);
  invariants_.switch_angle.resize(n_angle);
  for_rows(threads, graph.n_local, kCentres, [&](int64_t begin, int64_t end) {
    for (auto centre = static_cast<size_t>(begin); centre < static_cast<size_t>(end); ++centre) {
      const auto first = static_cast<size_t>(graph.edge_offset[centre]);
      const auto last = static_cast<size_t>(graph.edge_offset[centre + 1]);
      for (size_t edge = first; edge < last; ++edge) edge_forward(edge);
      angles_forward(centre);
    }
  });
}

/// input = r, or (s / (r + p) - mu_0) / sigma_0; h = (s x / (r + p)^2 - mu_123) / sigma_123.
void Geometry::edge_forward(size_t edge) {
  const double* vector = vector_of(edge);
  const size_t type = type_of_centre(edge);
  const double* mean = &tables_.mean[4 * type];
  const double* stddev = &tables_.stddev[4 * type];
  const double distance = std::sqrt(dot(vector, vector));
  const double shifted = distance + rules_.protection;
  double& switched = invariants_.switch_edge[edge];
  distance_[edge] = distance;
  rules_.edge(distance, switched, switch_slope_[edge]);
  rules_.angle(distance, close_switch_[edge], close_slope_[edge]);
  invariants_.edge_input[edge] = rules_.use_dist ? distance : (switched / shifted - mean[0]) / stddev[0];
  for (size_t c = 0; c < 3; ++c) {
    const double direction = switched / (shifted * shifted) * vector[c];
    invariants_.directions[3 * edge + c] = (direction - mean[c + 1]) / stddev[c + 1];
    unit_[3 * edge + c] = vector[c] / (distance + kShorter);
  }
}

void Geometry::edge_backward(size_t edge, const Invariants& gradient, double* d_vector) const {
  const double* vector = vector_of(edge);
  const double* stddev = &tables_.stddev[4 * type_of_centre(edge)];
  const double distance = distance_[edge];
  const double shifted = distance + rules_.protection;
  const double switched = invariants_.switch_edge[edge];
  const double slope = switch_slope_[edge];
  double d_distance = gradient.switch_edge[edge] * slope;
  const double d_input = gradient.edge_input[edge];
  d_distance +=
      rules_.use_dist ? d_input : d_input / stddev[0] * (slope / shifted - switched / (shifted * shifted));
  double along = 0.0;
  for (size_t c = 0; c < 3; ++c) {
    const double d_direction = gradient.directions[3 * edge + c] / stddev[c + 1];
    d_vector[c] += d_direction * switched / (shifted * shifted);
    along += d_direction * vector[c];
  }
  d_distance += along * (slope / (shifted * shifted) - 2.0 * switched / (shifted * shifted * shifted));
  for (size_t c = 0; c < 3; ++c) d_vector[c] += d_distance * vector[c] / distance;
}

/// cos = u_ij . u_ik (1 - 1e-6) with u = x / (r + 1e-6).
void Geometry::angles_forward(size_t centre) {
  const auto first = static_cast<size_t>(graph_.edge_offset[centre]);
  const size_t end = first + static_cast<size_t>(graph_.close_count[centre]);
  auto angle = static_cast<size_t>(graph_.angle_offset[centre]);
  for (size_t j = first; j < end; ++j) {
    for (size_t k = first; k < end; ++k) {
      invariants_.cosine[angle] = dot(&unit_[3 * j], &unit_[3 * k]) * kCosine;
      invariants_.switch_angle[angle] = close_switch_[j] * close_switch_[k];
      ++angle;
    }
  }
}

/// Adds to d_vectors (n_edge * 3), rows of the centre's edges.
void Geometry::angles_backward(size_t centre, const Invariants& gradient, double* d_vectors) const {
  const auto n_close = static_cast<size_t>(graph_.close_count[centre]);
  const auto first_edge = static_cast<size_t>(graph_.edge_offset[centre]);
  const auto first_angle = static_cast<size_t>(graph_.angle_offset[centre]);
  for (size_t j = 0; j < n_close; ++j) {
    const size_t edge = first_edge + j;
    double d_unit[3] = {0.0, 0.0, 0.0};
    double d_switch = 0.0;
    for (size_t k = 0; k < n_close; ++k) {
      // edge j is the first of angle (j, k) and the second of (k, j)
      const size_t as_first = first_angle + j * n_close + k;
      const size_t as_second = first_angle + k * n_close + j;
      const double d_cosine = (gradient.cosine[as_first] + gradient.cosine[as_second]) * kCosine;
      for (size_t c = 0; c < 3; ++c) d_unit[c] += d_cosine * unit_[3 * (first_edge + k) + c];
      const double d_product = gradient.switch_angle[as_first] + gradient.switch_angle[as_second];
      d_switch += d_product * close_switch_[first_edge + k];
    }
    const double* vector = vector_of(edge);
    const double distance = distance_[edge];
    const double inverse = 1.0 / (distance + kShorter);
    const double d_distance = d_switch * close_slope_[edge] - dot(d_unit, vector) * inverse * inverse;
    for (size_t c = 0; c < 3; ++c) {
      d_vectors[3 * edge + c] += d_unit[c] * inverse + d_distance * vector[c] / distance;
    }
  }
}

std::vector<double> Geometry::backward(const Invariants& gradient) const {
  std::vector<double> d_vectors(static_cast<size_t>(3 * graph_.n_edge), 0.0);
  for_rows(threads_, graph_.n_local, kCentres, [&](int64_t begin, int64_t end) {
    for (auto centre = static_cast<size_t>(begin); centre < static_cast<size_t>(end); ++centre) {
      const auto first = static_cast<size_t>(graph_.edge_offset[centre]);
      const auto last = static_cast<size_t>(graph_.edge_offset[centre + 1]);
      for (size_t edge = first; edge < last; ++edge) edge_backward(edge, gradient, &d_vectors[3 * edge]);
      angles_backward(centre, gradient, d_vectors.data());
    }
  });
  return d_vectors;
}

}  // namespace moecalc::plain
