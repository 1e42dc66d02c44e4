// From positions to edges, angles and their invariants, and back from gradients to forces: everything
// float64.
//
// A neighbour list with skin is uploaded once ("list edges", sorted by centre). Each step filters it: edges
// of a centre become contiguous, angle neighbours first. All sums have a fixed order; there are no atomics.
#pragma once

#include "../switch.h"
#include "product.cuh"

namespace moecalc::cuda {

/// Values of `Graph::counts`.
enum Count { kEdges, kClose, kAngles, kMostEdges, kMostClose, kOverflow, kProblem, kCounts };

/// Centres begin..end-1 (or rows of nodes, slots) of one routing group: the work of one block.
struct Run {
  int group, begin, end;
};

/// The graph in model order (local atoms sorted by routing group, then ghosts). A slot is a (routing group of
/// the centre, neighbour) pair of the list.
struct Graph {
  int n_node = 0, n_local = 0, n_list = 0, n_slot = 0, n_systems = 1;
  // uploaded with the list
  const int* list_first = nullptr;  // (n_local + 1) list edges of a centre
  const int *list_from = nullptr, *list_to = nullptr, *list_centre = nullptr, *list_neighbor = nullptr,
            *list_slot = nullptr;                    // (n_list)
  const double* list_shift = nullptr;                // (n_list, 3) or null
  const int* slot_node = nullptr;                    // (n_slot)
  const int* slot_first = nullptr;                   // (n_slot + 1) into slot_list
  const int* slot_list = nullptr;                    // (n_list) list edges of every slot
  const int* node_first = nullptr;                   // (n_node + 1) into node_slot
  const int* node_slot = nullptr;                    // (n_slot) slots of every node
  const int *type = nullptr, *engine_row = nullptr;  // (n_node)
  const int* system = nullptr;                       // (n_local)
  const int *system_first = nullptr,
            *system_row = nullptr;  // (n_systems + 1), (n_local) rows of every system
  // of this step
  int* n_close = nullptr;                                                     // (n_local) angle neighbours
  int *first_edge = nullptr, *first_close = nullptr, *first_angle = nullptr;  // (n_local + 1)
  int* problem = nullptr;                                                     // (n_local)
  int *edge_list = nullptr, *edge_centre = nullptr;                           // (n_edge)
  int* edge_of_list = nullptr;  // (n_list), -1: beyond the cutoff
  int64_t* counts = nullptr;
  int64_t most_edges = 0, most_close = 0, most_angles = 0;  // capacities

  MOECALC_KERNEL int neighbor(int edge) const { return list_neighbor[edge_list[edge]]; }
  MOECALC_KERNEL int slot(int edge) const { return list_slot[edge_list[edge]]; }
};

/// Where positions and cells are, and the cutoffs.
struct Positions {
  const double *x = nullptr, *cells = nullptr;
  double cutoff = 0.0, angle_cutoff = 0.0;

  MOECALC_KERNEL double vector(const Graph& g, int item, double (&vec)[3]) const {
    const int from = g.list_from[item], to = g.list_to[item];
    for (int c = 0; c < 3; ++c)
      vec[c] = x[3 * static_cast<int64_t>(to) + c] - x[3 * static_cast<int64_t>(from) + c];
    if (g.list_shift != nullptr) {
      const double* cell = cells + 9 * g.system[g.list_centre[item]];
      const double* s = g.list_shift + 3 * static_cast<int64_t>(item);
      for (int c = 0; c < 3; ++c) vec[c] += s[0] * cell[c] + s[1] * cell[3 + c] + s[2] * cell[6 + c];
    }
    return sqrt(vec[0] * vec[0] + vec[1] * vec[1] + vec[2] * vec[2]);
  }
};

constexpr int kListThreads = 32;  // of a block that filters the list edges of one centre

/// Part of a centre's list edges that a thread walks, in order.
MOECALC_KERNEL void list_part(const Graph& g, int64_t centre, int thread, int& begin, int& end) {
  const int first = g.list_first[centre], n = g.list_first[centre + 1] - first;
  const int part = (n + kListThreads - 1) / kListThreads;
  begin = first + (thread * part < n ? thread * part : n);
  end = first + ((thread + 1) * part < n ? (thread + 1) * part : n);
}

/// Numbers of edges and angle neighbours of every centre.
struct CountEdges {
  static constexpr int kThreads = kListThreads;
  Graph g;
  Positions positions;
  int64_t blocks() const { return g.n_local; }
  int64_t shared_bytes() const { return 3 * shared_size<int>(kListThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index();
    int* close = block.template shared<int>(kListThreads);
    int* all = block.template shared<int>(kListThreads);
    int* problem = block.template shared<int>(kListThreads);
    block.each([&](int t) {
      int begin, end, n_close = 0, n_all = 0, bad = g.n_list;
      list_part(g, i, t, begin, end);
      for (int item = begin; item < end; ++item) {
        double vec[3];
        const double r = positions.vector(g, item, vec);
        if (!(r > 0.0) || !(r < 1e300)) bad = bad < item ? bad : item;
        n_all += r <= positions.cutoff ? 1 : 0;
        n_close += r <= positions.cutoff && r < positions.angle_cutoff ? 1 : 0;
      }
      close[t] = n_close, all[t] = n_all, problem[t] = bad;
    });
    block.sync();
    block.each([&](int t) {
      if (t != 0) return;
      int n_close = 0, n_all = 0, bad = g.n_list;
      for (int x = 0; x < kListThreads; ++x) {
        n_close += close[x], n_all += all[x];
        bad = bad < problem[x] ? bad : problem[x];
      }
      g.n_close[i] = n_close;
      g.first_edge[i] = n_all;  // a count until the scan
      g.problem[i] = bad;
    });
  }
};

/// Offsets of edges, close edges and angles of all centres, by one block; the counts; an empty graph where
/// the capacities do not suffice, so that the kernels that follow stay within their buffers.
struct ScanCentres {
  static constexpr int kThreads = 1024;
  Graph g;
  int64_t blocks() const { return 1; }
  int64_t shared_bytes() const { return 6 * shared_size<int64_t>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    int64_t* sums[3];
    for (int q = 0; q < 3; ++q) sums[q] = block.template shared<int64_t>(kThreads);
    int64_t* most_edges = block.template shared<int64_t>(kThreads);
    int64_t* most_close = block.template shared<int64_t>(kThreads);
    int64_t* problem = block.template shared<int64_t>(kThreads);
    const int part = (g.n_local + kThreads - 1) / kThreads;
    const auto range = [&](int t, int& begin, int& end) {
      begin = t * part < g.n_local ? t * part : g.n_local;
      end = (t + 1) * part < g.n_local ? (t + 1) * part : g.n_local;
    };
    block.each([&](int t) {
      int begin, end;
      range(t, begin, end);
      int64_t s[3] = {0, 0, 0}, edges = 0, close = 0, bad = g.n_list;
      for (int i = begin; i < end; ++i) {
        const int64_t n = g.first_edge[i], m = g.n_close[i];
        s[0] += n, s[1] += m, s[2] += m * m;
        edges = edges > n ? edges : n, close = close > m ? close : m;
        bad = bad < g.problem[i] ? bad : g.problem[i];
      }
      for (int q = 0; q < 3; ++q) sums[q][t] = s[q];
      most_edges[t] = edges, most_close[t] = close, problem[t] = bad;
    });
    block.sync();
    block.each([&](int t) {
      if (t >= 6) return;
      if (t < 3) {  // exclusive sums
        int64_t total = 0;
        for (int x = 0; x < kThreads; ++x) {
          const int64_t value = sums[t][x];
          sums[t][x] = total;
          total += value;
        }
        g.counts[kEdges + t] = total;
      } else if (t < 5) {
        const int64_t* values = t == 3 ? most_edges : most_close;
        int64_t most = 0;
        for (int x = 0; x < kThreads; ++x) most = most > values[x] ? most : values[x];
        g.counts[t == 3 ? kMostEdges : kMostClose] = most;
      } else {
        int64_t bad = g.n_list;
        for (int x = 0; x < kThreads; ++x) bad = bad < problem[x] ? bad : problem[x];
        g.counts[kProblem] = bad;
      }
    });
    block.sync();
    block.each([&](int t) {
      const bool overflow = g.counts[kEdges] > g.most_edges || g.counts[kClose] > g.most_close ||
                            g.counts[kAngles] > g.most_angles || g.counts[kProblem] < g.n_list;
      int begin, end;
      range(t, begin, end);
      int64_t s[3] = {sums[0][t], sums[1][t], sums[2][t]};
      for (int i = begin; i < end; ++i) {
        const int64_t n = g.first_edge[i], m = g.n_close[i];
        g.first_edge[i] = overflow ? 0 : static_cast<int>(s[0]);
        g.first_close[i] = overflow ? 0 : static_cast<int>(s[1]);
        g.first_angle[i] = overflow ? 0 : static_cast<int>(s[2]);
        if (overflow) g.n_close[i] = 0;
        s[0] += n, s[1] += m, s[2] += m * m;
      }
      if (t == 0) {
        g.first_edge[g.n_local] = overflow ? 0 : static_cast<int>(g.counts[kEdges]);
        g.first_close[g.n_local] = overflow ? 0 : static_cast<int>(g.counts[kClose]);
        g.first_angle[g.n_local] = overflow ? 0 : static_cast<int>(g.counts[kAngles]);
        g.counts[kOverflow] = overflow ? 1 : 0;
      }
    });
  }
};

/// Edges of this step, their vectors and what the network reads of them.
template <class T>
struct EdgeGeometry {
  double *vec = nullptr, *r = nullptr, *slope = nullptr;  // (n_edge, 3), (n_edge), (n_edge): ds/dr
  double *angle_switch = nullptr, *unit = nullptr;  // (n_edge, 2): s_a, ds_a/dr; (n_edge, 3): vec/(r + 1e-6)
  T *sw = nullptr, *h = nullptr, *input = nullptr;  // (n_edge), (n_edge, 4), (n_edge)
};

/// Rules of the descriptor's geometry; mean and stddev (n_types, 4).
struct Rules {
  ops::Switch edge, angle;
  bool use_dist = true, with_angles = true;
  double protection = 0.0, norm = 1.0;  // norm: 1 / sqrt(edge normaliser)
  const double *mean = nullptr, *stddev = nullptr;
};

template <class T>
struct PlaceEdges {
  static constexpr int kThreads = kListThreads;
  Graph g;
  Positions positions;
  Rules rules;
  EdgeGeometry<T> edges;
  int64_t blocks() const { return g.n_local; }
  int64_t shared_bytes() const { return 2 * shared_size<int>(kListThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index();
    int* close = block.template shared<int>(kListThreads);
    int* far = block.template shared<int>(kListThreads);
    const bool overflow = g.counts[kOverflow] != 0;
    block.each([&](int t) {
      int begin, end, n_close = 0, n_far = 0;
      list_part(g, i, t, begin, end);
      for (int item = begin; item < end; ++item) {
        double vec[3];
        const double r = positions.vector(g, item, vec);
        if (!(r <= positions.cutoff)) continue;
        (r < positions.angle_cutoff ? n_close : n_far) += 1;
      }
      close[t] = n_close, far[t] = n_far;
    });
    block.sync();
    block.each([&](int t) {
      int begin, end, next_close = g.first_edge[i], next_far = g.first_edge[i] + g.n_close[i];
      for (int x = 0; x < t; ++x) next_close += close[x], next_far += far[x];
      list_part(g, i, t, begin, end);
      for (int item = begin; item < end; ++item) {
        double vec[3];
        const double r = positions.vector(g, item, vec);
        if (overflow || !(r <= positions.cutoff)) {
          g.edge_of_list[item] = -1;
          continue;
        }
        const int e = r < positions.angle_cutoff ? next_close++ : next_far++;
        g.edge_of_list[item] = e;
        g.edge_list[e] = item;
        g.edge_centre[e] = static_cast<int>(i);
        describe(e, g.type[i], r, vec);
      }
    });
  }

  MOECALC_KERNEL void describe(int64_t e, int type, double r, const double (&vec)[3]) const {
    const double* mean = rules.mean + 4 * type;
    const double* stddev = rules.stddev + 4 * type;
    double s, ds;
    rules.edge(r, s, ds);
    const double rp = r + rules.protection;
    edges.r[e] = r, edges.slope[e] = ds;
    edges.sw[e] = T(s);
    edges.input[e] = T(rules.use_dist ? r : (s / rp - mean[0]) / stddev[0]);
    for (int c = 0; c < 3; ++c) {
      edges.vec[3 * e + c] = vec[c];
      edges.h[4 * e + c] = T(rules.norm * s * (s * vec[c] / (rp * rp) - mean[c + 1]) / stddev[c + 1]);
      edges.unit[3 * e + c] = vec[c] / (r + 1e-6);
    }
    edges.h[4 * e + 3] = T(0);
    rules.angle(r, edges.angle_switch[2 * e], edges.angle_switch[2 * e + 1]);
  }
};

/// Cosines and switches of the angles (j, k) of a centre.
template <class T>
struct PlaceAngles {
  static constexpr int kThreads = 128;
  Graph g;
  EdgeGeometry<T> edges;
  T *cos = nullptr, *asw = nullptr;
  int64_t blocks() const { return g.n_local; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index(), first = g.first_angle[i], e0 = g.first_edge[i];
    const int m = g.n_close[i];
    block.each([&](int t) {
      for (int q = t; q < m * m; q += kThreads) {
        const int64_t j = e0 + q / m, k = e0 + q % m;
        const double *x = edges.unit + 3 * j, *y = edges.unit + 3 * k;
        cos[first + q] = T((x[0] * y[0] + x[1] * y[1] + x[2] * y[2]) * (1.0 - 1e-6));
        asw[first + q] = T(edges.angle_switch[2 * j] * edges.angle_switch[2 * k]);
      }
    });
  }
};

/// First features: v = table[type], e = phi(input W + b) (no phi where the input is the distance).
template <class T>
struct Embed {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 16;
  Graph g;
  int np = 0, ep = 0;
  bool use_dist = true;
  Phi<T> phi;
  const T *table = nullptr, *matrix = nullptr, *bias = nullptr, *input = nullptr;
  T *v = nullptr, *e = nullptr;
  int64_t blocks() const {
    const int64_t most = g.n_node > g.most_edges ? g.n_node : g.most_edges;
    return (most + kRows - 1) / kRows;
  }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t first = block.index() * kRows, n_edge = g.first_edge[g.n_local];
    block.each([&](int t) {
      for (int at = t; at < kRows * np; at += kThreads) {
        const int64_t i = first + at / np, d = at % np;
        if (i < g.n_node) v[i * np + d] = table[static_cast<int64_t>(g.type[i]) * np + d];
      }
      for (int at = t; at < kRows * ep; at += kThreads) {
        const int64_t i = first + at / ep, d = at % ep;
        if (i >= n_edge) continue;
        const T z = input[i] * matrix[d] + bias[d];
        e[i * ep + d] = use_dist ? z : phi(z).y;
      }
    });
  }
};

/// Gradients with respect to the edge vectors of a centre, their sum, and the centre's share of the virial.
template <class T>
struct GeometryBackward {
  static constexpr int kThreads = 128;
  static constexpr int kParts = 8;
  Graph g;
  Rules rules;
  EdgeGeometry<T> edges;
  int ep = 0;
  bool use_dist = true;
  Phi<T> phi;
  const T *matrix = nullptr, *bias = nullptr;  // of the embedding of edges
  const T *dcos = nullptr, *dasw = nullptr, *de = nullptr;
  const double *dsw = nullptr, *dh = nullptr;     // (n_edge), (n_edge, 4)
  double *gradient = nullptr, *centre = nullptr;  // (n_edge, 3), (n_local, 12): sum of g, then of vec (x) g
  int64_t blocks() const { return g.n_local; }
  int64_t shared_bytes() const { return shared_size<double>(12 * kParts); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index();
    const int64_t e0 = g.first_edge[i], e1 = g.first_edge[i + 1], first = g.first_angle[i];
    const int m = g.n_close[i];
    double* partial = block.template shared<double>(12 * kParts);
    block.each([&](int t) {
      for (int64_t e = e0 + t; e < e1; e += kThreads) one_edge(i, e, e0, m, first);
    });
    block.sync();
    block.each([&](int t) {
      if (t >= 12 * kParts) return;
      const int q = t / kParts;
      double total = 0.0;
      for (int64_t e = e0 + t % kParts; e < e1; e += kParts) {
        total += q < 3 ? gradient[3 * e + q] : edges.vec[3 * e + (q - 3) / 3] * gradient[3 * e + (q - 3) % 3];
      }
      partial[t] = total;
    });
    block.sync();
    block.each([&](int t) {
      if (t >= 12) return;
      double total = 0.0;
      for (int x = 0; x < kParts; ++x) total += partial[t * kParts + x];
      centre[12 * i + t] = total;
    });
  }

  MOECALC_KERNEL void one_edge(int64_t i, int64_t e, int64_t e0, int m, int64_t first) const {
    const double* mean = rules.mean + 4 * g.type[i];
    const double* stddev = rules.stddev + 4 * g.type[i];
    const double* x = edges.vec + 3 * e;
    const double r = edges.r[e], rp = r + rules.protection, q = 1.0 / (rp * rp);
    double switched, unused;
    rules.edge(r, switched, unused);
    double dr = 0.0, ds = dsw[e], dx[3] = {0.0, 0.0, 0.0};
    double dinput = 0.0;
    for (int d = 0; d < ep; ++d) {
      const double scale = use_dist ? 1.0 : double(phi(edges.input[e] * matrix[d] + bias[d]).slope);
      dinput += double(de[e * ep + d]) * scale * double(matrix[d]);
    }
    if (rules.use_dist) {
      dr += dinput;
    } else {
      ds += dinput / (rp * stddev[0]);
      dr -= dinput * switched / (rp * rp * stddev[0]);
    }
    // h = norm sw (sw x q - mean) / stddev
    for (int c = 0; c < 3; ++c) {
      const double direction = (switched * x[c] * q - mean[c + 1]) / stddev[c + 1];
      ds += dh[4 * e + c] * rules.norm * direction;
      const double d = dh[4 * e + c] * rules.norm * switched / stddev[c + 1];
      ds += d * x[c] * q;
      dx[c] += d * switched * q;
      dr -= 2.0 * d * switched * x[c] * q / rp;
    }
    dr += ds * edges.slope[e];
    if (rules.with_angles && e < e0 + m) {
      // angles with this edge first, and second
      const int64_t own = e - e0;
      double dswitch = 0.0, dunit[3] = {0.0, 0.0, 0.0};
      for (int64_t k = 0; k < m; ++k) {
        const int64_t jk = first + own * m + k, kj = first + k * m + own;
        dswitch += (double(dasw[jk]) + double(dasw[kj])) * edges.angle_switch[2 * (e0 + k)];
        const double d = (double(dcos[jk]) + double(dcos[kj])) * (1.0 - 1e-6);
        for (int c = 0; c < 3; ++c) dunit[c] += d * edges.unit[3 * (e0 + k) + c];
      }
      const double length = r + 1e-6;
      dr += dswitch * edges.angle_switch[2 * e + 1];
      for (int c = 0; c < 3; ++c) {
        dx[c] += dunit[c] / length;
        dr -= dunit[c] * x[c] / (length * length);
      }
    }
    for (int c = 0; c < 3; ++c) gradient[3 * e + c] = dx[c] + dr * x[c] / r;
  }
};

/// Forces and virials of nodes: a gather over the edges that start and end at a node, in the order of the
/// list.
struct Forces {
  static constexpr int kThreads = 128;
  static constexpr int kLanes = 32;  // threads of a node
  static constexpr int kNodes = kThreads / kLanes;
  Graph g;
  const double *gradient = nullptr, *vec = nullptr, *centre = nullptr;
  double *forces = nullptr, *atom_virial = nullptr;  // engine order; null: not wanted
  int64_t blocks() const { return (g.n_node + kNodes - 1) / kNodes; }
  int64_t shared_bytes() const { return shared_size<double>(12 * kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t first = block.index() * kNodes;
    double* partial = block.template shared<double>(12 * kThreads);
    block.each([&](int t) {
      const int64_t node = first + t / kLanes;
      double sums[12] = {};
      if (node < g.n_node) {
        for (int s = g.node_first[node]; s < g.node_first[node + 1]; ++s) {
          const int slot = g.node_slot[s];
          for (int at = g.slot_first[slot] + t % kLanes; at < g.slot_first[slot + 1]; at += kLanes) {
            const int64_t e = g.edge_of_list[g.slot_list[at]];
            if (e < 0) continue;
            const double *d = gradient + 3 * e, *x = vec + 3 * e;
            for (int c = 0; c < 3; ++c) sums[c] += d[c];
            if (atom_virial == nullptr) continue;
            for (int c = 0; c < 9; ++c) sums[3 + c] += x[c / 3] * d[c % 3];
          }
        }
      }
      for (int c = 0; c < 12; ++c) partial[12 * t + c] = sums[c];
    });
    block.sync();
    block.each([&](int t) {
      if (t >= 12 * kNodes) return;
      const int64_t node = first + t / 12;
      const int c = t % 12;
      if (node >= g.n_node) return;
      double total = 0.0;
      for (int x = 0; x < kLanes; ++x) total += partial[12 * (t / 12 * kLanes + x) + c];
      const int64_t row = g.engine_row[node];
      if (c < 3) {
        if (forces != nullptr) forces[3 * row + c] = (node < g.n_local ? centre[12 * node + c] : 0.0) - total;
      } else if (atom_virial != nullptr) {
        atom_virial[9 * row + c - 3] = -total;
      }
    });
  }
};

/// out[s * width + q] = scale * sum over the atoms of system s of values[row * stride + q], in engine order.
struct SumSystems {
  static constexpr int kThreads = 256;
  Graph g;
  int width = 1, stride = 1;
  double scale = 1.0;
  bool by_engine_row = false;  // rows of `values`
  const double* values = nullptr;
  double* out = nullptr;
  int64_t blocks() const { return static_cast<int64_t>(g.n_systems) * width; }
  int64_t shared_bytes() const { return shared_size<double>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t s = block.index() / width, q = block.index() % width;
    const int begin = g.system_first[s], end = g.system_first[s + 1];
    double* partial = block.template shared<double>(kThreads);
    block.each([&](int t) {
      double total = 0.0;
      for (int at = begin + t; at < end; at += kThreads) {
        const int64_t row = g.system_row[at];
        total += values[(by_engine_row ? g.engine_row[row] : row) * stride + q];
      }
      partial[t] = total;
    });
    for (int half = kThreads / 2; half > 0; half /= 2) {
      block.sync();
      block.each([&](int t) {
        if (t < half) partial[t] += partial[t + half];
      });
    }
    block.sync();
    block.each([&](int t) {
      if (t == 0) out[s * width + q] = scale * partial[0];
    });
  }
};

/// Results of the counting, as numbers among the results.
struct CopyCounts {
  static constexpr int kThreads = 32;
  Graph g;
  double* out = nullptr;
  int64_t blocks() const { return 1; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int t) {
      if (t < kCounts) out[t] = static_cast<double>(g.counts[t]);
    });
  }
};

}  // namespace moecalc::cuda
