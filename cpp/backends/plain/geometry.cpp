#include "backends/plain/geometry.h"

#include <cmath>

#include "backends/plain/matrix.h"

namespace moecalc::plain {

namespace {

constexpr int64_t kCentres = 16;
constexpr double kShorter = 1e-6;  // keeps cosines off 1 and -1, as the models were trained
constexpr double kCosine = 1.0 - 1e-6;

double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

}  // namespace

Geometry::Geometry(const PreparedGraph& graph, const GeometryRules& rules, const TypeTables& tables,
                   ThreadPool& threads)
    : graph_(graph), rules_(rules), tables_(tables), threads_(threads) {
  const auto n_edge = static_cast<size_t>(graph.n_edge), n_angle = static_cast<size_t>(graph.n_angle);
  for (std::vector<double>* values :
       {&invariants_.edge_input, &invariants_.sw, &r_, &sw_slope_, &sa_, &sa_slope_}) {
    values->resize(n_edge);
  }
  invariants_.h.resize(3 * n_edge);
  unit_.resize(3 * n_edge);
  invariants_.cos.resize(n_angle);
  invariants_.asw.resize(n_angle);
  for_rows(threads, graph.n_local, kCentres, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto centre = static_cast<size_t>(i);
      for (int64_t e = graph.edge_offset[centre]; e < graph.edge_offset[centre + 1]; ++e) edge_forward(e);
      angles_forward(i);
    }
  });
}

void Geometry::edge_forward(int64_t edge) {
  const auto e = static_cast<size_t>(edge);
  const double* vec = &graph_.edge_vec[3 * e];
  const auto type = static_cast<size_t>(graph_.types[static_cast<size_t>(graph_.centre[e])]);
  const double* mean = &tables_.mean[4 * type];
  const double* stddev = &tables_.stddev[4 * type];
  const double r = std::sqrt(dot(vec, vec)), rp = r + rules_.protection;
  double& sw = invariants_.sw[e];
  r_[e] = r;
  rules_.edge(r, sw, sw_slope_[e]);
  rules_.angle(r, sa_[e], sa_slope_[e]);
  invariants_.edge_input[e] = rules_.use_dist ? r : (sw / rp - mean[0]) / stddev[0];
  for (size_t c = 0; c < 3; ++c) {
    invariants_.h[3 * e + c] = (sw / (rp * rp) * vec[c] - mean[c + 1]) / stddev[c + 1];
    unit_[3 * e + c] = vec[c] / (r + kShorter);
  }
}

void Geometry::edge_backward(int64_t edge, const Invariants& gradient, double* g) const {
  const auto e = static_cast<size_t>(edge);
  const double* vec = &graph_.edge_vec[3 * e];
  const auto type = static_cast<size_t>(graph_.types[static_cast<size_t>(graph_.centre[e])]);
  const double* stddev = &tables_.stddev[4 * type];
  const double r = r_[e], rp = r + rules_.protection, sw = invariants_.sw[e], slope = sw_slope_[e];
  double dr = gradient.sw[e] * slope;
  const double d_input = gradient.edge_input[e];
  dr += rules_.use_dist ? d_input : d_input / stddev[0] * (slope / rp - sw / (rp * rp));
  double along = 0.0;
  for (size_t c = 0; c < 3; ++c) {
    const double dh = gradient.h[3 * e + c] / stddev[c + 1];
    g[c] += dh * sw / (rp * rp);
    along += dh * vec[c];
  }
  dr += along * (slope / (rp * rp) - 2.0 * sw / (rp * rp * rp));
  for (size_t c = 0; c < 3; ++c) g[c] += dr * vec[c] / r;
}

void Geometry::angles_forward(int64_t centre) {
  const auto i = static_cast<size_t>(centre);
  const auto n = static_cast<size_t>(graph_.close_count[i]);
  const auto edge = static_cast<size_t>(graph_.edge_offset[i]);
  auto angle = static_cast<size_t>(graph_.angle_offset[i]);
  for (size_t j = edge; j < edge + n; ++j) {
    for (size_t k = edge; k < edge + n; ++k, ++angle) {
      invariants_.cos[angle] = dot(&unit_[3 * j], &unit_[3 * k]) * kCosine;
      invariants_.asw[angle] = sa_[j] * sa_[k];
    }
  }
}

/// Adds to g (n_edge * 3), rows of the centre's edges.
void Geometry::angles_backward(int64_t centre, const Invariants& gradient, double* g) const {
  const auto i = static_cast<size_t>(centre);
  const auto n = static_cast<size_t>(graph_.close_count[i]);
  const auto edge = static_cast<size_t>(graph_.edge_offset[i]);
  const auto first = static_cast<size_t>(graph_.angle_offset[i]);
  for (size_t j = 0; j < n; ++j) {
    const size_t e = edge + j;
    double d_unit[3] = {0.0, 0.0, 0.0}, d_sa = 0.0;
    for (size_t k = 0; k < n; ++k) {
      // edge j is the first of angle (j, k) and the second of (k, j)
      const size_t one = first + j * n + k, two = first + k * n + j;
      const double d_cos = (gradient.cos[one] + gradient.cos[two]) * kCosine;
      for (size_t c = 0; c < 3; ++c) d_unit[c] += d_cos * unit_[3 * (edge + k) + c];
      d_sa += (gradient.asw[one] + gradient.asw[two]) * sa_[edge + k];
    }
    const double* vec = &graph_.edge_vec[3 * e];
    const double r = r_[e], inverse = 1.0 / (r + kShorter);
    const double dr = d_sa * sa_slope_[e] - dot(d_unit, vec) * inverse * inverse;
    for (size_t c = 0; c < 3; ++c) g[3 * e + c] += d_unit[c] * inverse + dr * vec[c] / r;
  }
}

std::vector<double> Geometry::backward(const Invariants& gradient) const {
  std::vector<double> g(static_cast<size_t>(3 * graph_.n_edge), 0.0);
  for_rows(threads_, graph_.n_local, kCentres, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto centre = static_cast<size_t>(i);
      for (int64_t e = graph_.edge_offset[centre]; e < graph_.edge_offset[centre + 1]; ++e) {
        edge_backward(e, gradient, &g[static_cast<size_t>(3 * e)]);
      }
      angles_backward(i, gradient, g.data());
    }
  });
  return g;
}

}  // namespace moecalc::plain
