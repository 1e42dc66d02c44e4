// From positions to the numbers of edges and angles of every centre, and to their places. Distances are
// float64. All sums have a fixed order; there are no atomics.
#pragma once

#include "kernels/common/edge_geometry.h"
#include "kernels/cuda/graph.cuh"

namespace moecalc::cuda {

/// Where positions and cells are, and the cutoffs in Angstrom.
struct Positions {
  const double* atoms = nullptr;  // (n, 3)
  const double* cells = nullptr;  // (n_systems, 3, 3), rows are vectors
  double cutoff = 0.0;
  double angle_cutoff = 0.0;

  /// Vector x_to - x_from + shift . cell of a list edge; returns its length.
  MOECALC_KERNEL double vector(const Graph& graph, int item, double (&vector)[3]) const {
    const double* from = atoms + 3 * static_cast<int64_t>(graph.list_from[item]);
    const double* to = atoms + 3 * static_cast<int64_t>(graph.list_to[item]);
    for (int c = 0; c < 3; ++c) vector[c] = to[c] - from[c];
    const int64_t first = 3 * static_cast<int64_t>(item);
    if (graph.list_shift != nullptr) {
      add_shift(graph, item, graph.list_shift + first, vector);
    } else if (graph.list_wide_shift != nullptr) {
      add_shift(graph, item, graph.list_wide_shift + first, vector);
    }
    return kernels::length_of(vector);
  }
  template <class Shift>
  MOECALC_KERNEL void add_shift(const Graph& graph, int item, const Shift* shift, double (&vector)[3]) const {
    const double* cell = cells + 9 * graph.system[graph.list_centre[item]];
    for (int c = 0; c < 3; ++c) {
      vector[c] += shift[0] * cell[c] + shift[1] * cell[3 + c] + shift[2] * cell[6 + c];
    }
  }
  MOECALC_KERNEL bool is_edge(double distance) const { return distance <= cutoff; }
  MOECALC_KERNEL bool is_close(double distance) const {
    return distance <= cutoff && distance < angle_cutoff;
  }
};

constexpr int kListThreads = 32;  // of a block that filters the list edges of one centre

struct Range {
  int begin;
  int end;
};

/// Part of 0..n-1 that a thread of `n_thread` takes.
MOECALC_KERNEL Range part_of(int n, int thread, int n_thread) {
  const int length = (n + n_thread - 1) / n_thread;
  return {smaller(thread * length, n), smaller((thread + 1) * length, n)};
}

/// Part of a centre's list edges that a thread walks, in order.
MOECALC_KERNEL Range list_part(const Graph& graph, int64_t centre, int thread) {
  const int first = graph.list_first[centre];
  const Range part = part_of(graph.list_first[centre + 1] - first, thread, kListThreads);
  return {first + part.begin, first + part.end};
}

/// Numbers of edges and close edges of every centre: r <= cutoff, and r < angle cutoff.
struct CountEdges : GraphKernel<kListThreads> {
  Positions positions;
  int64_t shared_bytes() const { return 3 * shared_size<int>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    int* close = block.template shared<int>(kThreads);
    int* all = block.template shared<int>(kThreads);
    int* problem = block.template shared<int>(kThreads);
    block.each([&](int thread) {
      const Range part = list_part(graph, centre, thread);
      int n_close = 0;
      int n_all = 0;
      int first_problem = graph.n_list;
      for (int item = part.begin; item < part.end; ++item) {
        double vector[3];
        const double distance = positions.vector(graph, item, vector);
        const bool usable = distance > 0.0 && distance < 1e300;
        if (!usable) first_problem = smaller(first_problem, item);
        n_all += positions.is_edge(distance) ? 1 : 0;
        n_close += positions.is_close(distance) ? 1 : 0;
      }
      close[thread] = n_close;
      all[thread] = n_all;
      problem[thread] = first_problem;
    });
    block.sync();
    block.each([&](int thread) {
      if (thread != 0) return;
      int n_close = 0;
      int n_all = 0;
      int first_problem = graph.n_list;
      for (int other = 0; other < kThreads; ++other) {
        n_close += close[other];
        n_all += all[other];
        first_problem = smaller(first_problem, problem[other]);
      }
      graph.n_close[centre] = n_close;
      graph.first_edge[centre] = n_all;  // a count until the scan
      graph.problem[centre] = first_problem;
    });
  }
};

/// Offsets of edges, close edges and angles of all centres, by one block; the counts; an empty graph where
/// the capacities do not suffice, which keeps the kernels that follow within their buffers.
struct ScanCentres : GraphKernel<1024> {
  static constexpr int kSums = 3;  // kEdges, kClose, kAngles

  /// Sums over some centres, whose close edges make n_close^2 angles.
  struct Sums {
    int64_t values[kSums] = {0, 0, 0};

    MOECALC_KERNEL void add(int64_t n_edge, int64_t n_close) {
      values[kEdges] += n_edge;
      values[kClose] += n_close;
      values[kAngles] += n_close * n_close;
    }
  };

  /// What every thread found, in shared memory.
  struct Found {
    int64_t* sums[kSums];  // then, in the same place, sums over the threads before
    int64_t* most_edges;
    int64_t* most_close;
    int64_t* problem;
  };

  int64_t blocks() const { return 1; }
  int64_t shared_bytes() const { return (kSums + 3) * shared_size<int64_t>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    Found found;
    for (int64_t*& sums : found.sums) sums = block.template shared<int64_t>(kThreads);
    found.most_edges = block.template shared<int64_t>(kThreads);
    found.most_close = block.template shared<int64_t>(kThreads);
    found.problem = block.template shared<int64_t>(kThreads);
    block.each([&](int thread) { sum_part(found, thread); });
    block.sync();
    block.each([&](int thread) { combine(found, thread); });
    block.sync();
    block.each([&](int thread) { write_offsets(found, thread); });
  }

 private:
  MOECALC_KERNEL void sum_part(const Found& found, int thread) const {
    const Range part = part_of(graph.n_local, thread, kThreads);
    Sums sums;
    int64_t most_edges = 0;
    int64_t most_close = 0;
    int64_t problem = graph.n_list;
    for (int centre = part.begin; centre < part.end; ++centre) {
      const int64_t n_edge = graph.first_edge[centre];  // a count until now
      const int64_t n_close = graph.n_close[centre];
      sums.add(n_edge, n_close);
      most_edges = larger(most_edges, n_edge);
      most_close = larger(most_close, n_close);
      problem = smaller<int64_t>(problem, graph.problem[centre]);
    }
    for (int which = 0; which < kSums; ++which) found.sums[which][thread] = sums.values[which];
    found.most_edges[thread] = most_edges;
    found.most_close[thread] = most_close;
    found.problem[thread] = problem;
  }

  /// One thread for every count: exclusive sums over the threads, largest numbers, the first problem.
  MOECALC_KERNEL void combine(const Found& found, int thread) const {
    if (thread < kSums) {
      int64_t* sums = found.sums[thread];
      int64_t total = 0;
      for (int other = 0; other < kThreads; ++other) {
        const int64_t value = sums[other];
        sums[other] = total;
        total += value;
      }
      graph.counts[thread] = total;
    } else if (thread == kMostEdges) {
      graph.counts[kMostEdges] = largest(found.most_edges);
    } else if (thread == kMostClose) {
      graph.counts[kMostClose] = largest(found.most_close);
    } else if (thread == kProblem) {
      int64_t first = graph.n_list;
      for (int other = 0; other < kThreads; ++other) first = smaller(first, found.problem[other]);
      graph.counts[kProblem] = first;
    }
  }

  static MOECALC_KERNEL int64_t largest(const int64_t* values) {
    int64_t most = 0;
    for (int other = 0; other < kThreads; ++other) most = larger(most, values[other]);
    return most;
  }

  MOECALC_KERNEL void write_offsets(const Found& found, int thread) const {
    const bool overflow = graph.counts[kEdges] > graph.most_edges ||
                          graph.counts[kClose] > graph.most_close ||
                          graph.counts[kAngles] > graph.most_angles || graph.counts[kProblem] < graph.n_list;
    const Range part = part_of(graph.n_local, thread, kThreads);
    Sums sums;
    for (int which = 0; which < kSums; ++which) sums.values[which] = found.sums[which][thread];
    for (int centre = part.begin; centre < part.end; ++centre) {
      const int64_t n_edge = graph.first_edge[centre];
      const int64_t n_close = graph.n_close[centre];
      write_offsets_of(centre, sums.values, overflow);
      if (overflow) graph.n_close[centre] = 0;
      sums.add(n_edge, n_close);
    }
    if (thread == 0) {
      write_offsets_of(graph.n_local, graph.counts, overflow);
      graph.counts[kOverflow] = overflow ? 1 : 0;
    }
  }

  MOECALC_KERNEL void write_offsets_of(int centre, const int64_t* sums, bool overflow) const {
    graph.first_edge[centre] = overflow ? 0 : static_cast<int>(sums[kEdges]);
    graph.first_close[centre] = overflow ? 0 : static_cast<int>(sums[kClose]);
    graph.first_angle[centre] = overflow ? 0 : static_cast<int>(sums[kAngles]);
  }
};

}  // namespace moecalc::cuda
