// From positions to edges, angles and first features, and back from gradients to the vectors of edges
// (SPEC.md, sections 3 to 5). Geometry is float64; the formulas are those of kernels/common/edge_geometry.h.
#pragma once

#include "kernels/common/edge_geometry.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/filter.cuh"
#include "kernels/cuda/graph.cuh"

namespace moecalc::cuda {

struct SwitchValue {
  double value;
  double slope;  // with respect to the distance
};

/// Edges of this step, their vectors and what the network reads of them.
template <class Real>
struct EdgeGeometry {
  double* vector = nullptr;             // (n_edge, 3)
  double* distance = nullptr;           // (n_edge)
  double* unit = nullptr;               // (n_edge, 3)
  SwitchValue* angle_switch = nullptr;  // (n_edge)
  Real* switch_edge = nullptr;          // (n_edge)
  Real* directions = nullptr;           // (n_edge, 4), the last is zero
  Real* input = nullptr;                // (n_edge) of the edge embedding
};

/// Rules of the descriptor's geometry.
struct GeometryTables {
  kernels::EdgeRules edge;
  bool with_angles = true;
  const double* mean = nullptr;    // (n_types, 4)
  const double* stddev = nullptr;  // (n_types, 4)

  MOECALC_KERNEL kernels::TypeStatistics of(int type) const { return {mean + 4 * type, stddev + 4 * type}; }
};

/// Places of the edges of a centre in the order of the list, close ones first, and their geometry.
template <class Real>
struct PlaceEdges : GraphKernel<kListThreads> {
  Positions positions;
  GeometryTables tables;
  EdgeGeometry<Real> edges;
  int64_t shared_bytes() const { return 2 * shared_size<int>(kListThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    int* close = block.template shared<int>(kListThreads);
    int* far = block.template shared<int>(kListThreads);
    block.each([&](int thread) {
      const Range part = list_part(graph, centre, thread);
      int n_close = 0;
      int n_far = 0;
      for (int item = part.begin; item < part.end; ++item) {
        double vector[3];
        const double distance = positions.vector(graph, item, vector);
        if (!positions.is_edge(distance)) continue;
        (positions.is_close(distance) ? n_close : n_far) += 1;
      }
      close[thread] = n_close;
      far[thread] = n_far;
    });
    block.sync();
    block.each([&](int thread) {
      int next_close = graph.first_edge[centre];
      int next_far = graph.first_edge[centre] + graph.n_close[centre];
      for (int before = 0; before < thread; ++before) {
        next_close += close[before];
        next_far += far[before];
      }
      place(static_cast<int>(centre), list_part(graph, centre, thread), next_close, next_far);
    });
  }

 private:
  MOECALC_KERNEL void place(int centre, const Range& part, int next_close, int next_far) const {
    const bool overflow = graph.counts[kOverflow] != 0;
    for (int item = part.begin; item < part.end; ++item) {
      double vector[3];
      const double distance = positions.vector(graph, item, vector);
      if (overflow || !positions.is_edge(distance)) {
        graph.edge_of_list[item] = -1;
        continue;
      }
      const int edge = positions.is_close(distance) ? next_close++ : next_far++;
      graph.edge_of_list[item] = edge;
      graph.edge_list[edge] = item;
      graph.edge_centre[edge] = centre;
      describe(edge, graph.type[centre], vector, distance);
    }
  }

  MOECALC_KERNEL void describe(int64_t edge, int type, const double* vector, double distance) const {
    const kernels::EdgeDescription found =
        kernels::describe_edge(tables.edge, tables.of(type), vector, distance);
    edges.distance[edge] = distance;
    edges.switch_edge[edge] = Real(found.switch_edge);
    edges.input[edge] = Real(found.input);
    for (int c = 0; c < 3; ++c) {
      edges.vector[3 * edge + c] = vector[c];
      edges.directions[4 * edge + c] = Real(found.directions[c]);
    }
    edges.directions[4 * edge + 3] = Real(0);
    kernels::unit_vector(vector, distance, edges.unit + 3 * edge);
    SwitchValue& angle_switch = edges.angle_switch[edge];
    tables.edge.switch_angle(distance, angle_switch.value, angle_switch.slope);
  }
};

/// Angles of a centre, all pairs of its close edges ij and ik: cos = u_ij . u_ik (1 - 1e-6) and
/// switch_angle = s_a(r_ij) s_a(r_ik).
template <class Real>
struct PlaceAngles : GraphKernel<128> {
  EdgeGeometry<Real> edges;
  Real* cosine = nullptr;        // (n_angle)
  Real* switch_angle = nullptr;  // (n_angle)

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    const int64_t first_edge = graph.first_edge[centre];
    const int64_t first_angle = graph.first_angle[centre];
    const int n_close = graph.n_close[centre];
    block.each([&](int thread) {
      for (int own = thread; own < n_close * n_close; own += kThreads) {
        const int64_t first = first_edge + own / n_close;
        const int64_t second = first_edge + own % n_close;
        const int64_t angle = first_angle + own;
        cosine[angle] = Real(kernels::cosine_of(edges.unit + 3 * first, edges.unit + 3 * second));
        switch_angle[angle] = Real(edges.angle_switch[first].value * edges.angle_switch[second].value);
      }
    });
  }
};

/// First features: node = table[type]; edge = activation(input W + b), without activation where the input is
/// the distance.
template <class Real>
struct Embed : GraphKernel<128> {
  static constexpr int kRows = 16;
  int n_padded = 0;
  int e_padded = 0;
  bool use_distance = true;
  ActivationFunction<Real> activation;
  const Real* table = nullptr;   // (n_types, n_padded)
  const Real* matrix = nullptr;  // (e_padded)
  const Real* bias = nullptr;    // (e_padded)
  const Real* input = nullptr;   // (n_edge)
  Real* node = nullptr;          // (n_node, n_padded)
  Real* edge = nullptr;          // (n_edge, e_padded)
  int64_t blocks() const { return blocks_for(larger<int64_t>(graph.n_node, graph.most_edges), kRows); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t first = block.index() * kRows;
    const int64_t n_edge = graph.first_edge[graph.n_local];
    block.each([&](int thread) {
      for (int at = thread; at < kRows * n_padded; at += kThreads) {
        const int64_t row = first + at / n_padded;
        const int64_t column = at % n_padded;
        if (row >= graph.n_node) continue;
        node[row * n_padded + column] = table[static_cast<int64_t>(graph.type[row]) * n_padded + column];
      }
      for (int at = thread; at < kRows * e_padded; at += kThreads) {
        const int64_t row = first + at / e_padded;
        const int64_t column = at % e_padded;
        if (row >= n_edge) continue;
        const Real pre_activation = input[row] * matrix[column] + bias[column];
        edge[row * e_padded + column] = use_distance ? pre_activation : activation(pre_activation).value;
      }
    });
  }
};

/// Gradients with respect to the edge vectors of a centre, their sum, and the centre's share of the virial:
/// sum over j of dx_ij, and of x_ij (x) dx_ij.
template <class Real>
struct GeometryBackward : GraphKernel<128> {
  static constexpr int kParts = 8;  // threads that share a sum
  static constexpr int kSums = 12;
  GeometryTables tables;
  EdgeGeometry<Real> edges;
  int e_padded = 0;
  bool use_distance = true;
  ActivationFunction<Real> activation;
  const Real* matrix = nullptr;           // of the embedding of edges
  const Real* bias = nullptr;             // likewise
  const Real* d_cosine = nullptr;         // (n_angle)
  const Real* d_switch_angle = nullptr;   // (n_angle)
  const Real* d_edge = nullptr;           // (n_edge, e_padded)
  const double* d_switch_edge = nullptr;  // (n_edge)
  const double* d_directions = nullptr;   // (n_edge, 4)
  double* d_vector = nullptr;             // (n_edge, 3)
  double* centre_sums = nullptr;          // (n_local, 12)
  int64_t shared_bytes() const { return shared_size<double>(kSums * kParts); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    const int64_t begin = graph.first_edge[centre];
    const int64_t end = graph.first_edge[centre + 1];
    double* partial = block.template shared<double>(kSums * kParts);
    block.each([&](int thread) {
      for (int64_t edge = begin + thread; edge < end; edge += kThreads) one_edge(centre, edge);
    });
    block.sync();
    block.each([&](int thread) {
      if (thread >= kSums * kParts) return;
      double total = 0.0;
      for (int64_t edge = begin + thread % kParts; edge < end; edge += kParts) {
        total += summand(edge, thread / kParts);
      }
      partial[thread] = total;
    });
    block.sync();
    block.each([&](int thread) {
      if (thread >= kSums) return;
      double total = 0.0;
      for (int part = 0; part < kParts; ++part) total += partial[thread * kParts + part];
      centre_sums[kSums * centre + thread] = total;
    });
  }

 private:
  /// Of an edge to sum number `which`: components of dx, then of x (x) dx.
  MOECALC_KERNEL double summand(int64_t edge, int which) const {
    const double* gradient = d_vector + 3 * edge;
    if (which < 3) return gradient[which];
    return edges.vector[3 * edge + (which - 3) / 3] * gradient[(which - 3) % 3];
  }

  MOECALC_KERNEL void one_edge(int64_t centre, int64_t edge) const {
    const int64_t first_edge = graph.first_edge[centre];
    const bool has_angles = tables.with_angles && edge < first_edge + graph.n_close[centre];
    kernels::EdgeGradients gradients;
    gradients.d_input = d_input(edge);
    gradients.d_switch_edge = d_switch_edge[edge];
    gradients.d_directions = d_directions + 4 * edge;
    // a far edge has zeros: a pointer that may be null would put the sums into local memory
    kernels::AngleGradients angles = {};
    if (has_angles) angles = angle_sums(centre, edge - first_edge);
    kernels::vector_gradient(tables.edge, tables.of(graph.type[centre]), edges.vector + 3 * edge,
                             edges.distance[edge], gradients, &angles, edges.angle_switch[edge].slope,
                             d_vector + 3 * edge);
  }

  /// Through the embedding: sum over columns of d_edge slope W.
  MOECALC_KERNEL double d_input(int64_t edge) const {
    double total = 0.0;
    for (int column = 0; column < e_padded; ++column) {
      const double slope =
          use_distance ? 1.0 : double(activation(edges.input[edge] * matrix[column] + bias[column]).slope);
      total += double(d_edge[edge * e_padded + column]) * slope * double(matrix[column]);
    }
    return total;
  }

  /// Over the angles in which close edge number `own` of the centre is first, and second.
  MOECALC_KERNEL kernels::AngleGradients angle_sums(int64_t centre, int64_t own) const {
    const int64_t first_edge = graph.first_edge[centre];
    const int64_t first_angle = graph.first_angle[centre];
    const int n_close = graph.n_close[centre];
    kernels::AngleGradients sums = {};
    for (int64_t other = 0; other < n_close; ++other) {
      const int64_t as_first = first_angle + own * n_close + other;
      const int64_t as_second = first_angle + other * n_close + own;
      const int64_t edge = first_edge + other;
      kernels::add_angle(sums, double(d_cosine[as_first]) + double(d_cosine[as_second]),
                         double(d_switch_angle[as_first]) + double(d_switch_angle[as_second]),
                         edges.angle_switch[edge].value, edges.unit + 3 * edge);
    }
    return sums;
  }
};

}  // namespace moecalc::cuda
