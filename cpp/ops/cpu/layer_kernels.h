// Kernels of the fused RepFlow layer, written once and compiled for every instruction set (layer_avx512.cpp,
// ...).
#include <algorithm>
#include <chrono>
#include <cmath>

#include "../layer.h"
#include "simd.h"

namespace moecalc::ops::MOECALC_ISA {
namespace {

// --- matrix products
// --------------------------------------------------------------------------------------------

/// What a product is added to.
enum class Start { zero, c, sum };

/// MR rows by NV vectors of C, kept in registers. Start::sum: they begin as `row` + the rows of `q`.
template <class T, int MR, int NV, Start start>
inline void tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                 [[maybe_unused]] const T* row_start, [[maybe_unused]] const T* q,
                 [[maybe_unused]] int64_t ldq) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) {
      if constexpr (start == Start::c) {
        acc[r][s] = load(c + r * ldc + s * L);
      } else if constexpr (start == Start::sum) {
        acc[r][s] = load(row_start + s * L) + load(q + r * ldq + s * L);
      } else {
        acc[r][s] = Vec<T>{};
      }
    }
  }
  for (int64_t x = 0; x < k; ++x) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) row[s] = load(b + x * ldb + s * L);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec<T> factor = splat(a[r * lda + x]);
#pragma GCC unroll 8
      for (int s = 0; s < NV; ++s) acc[r][s] += factor * row[s];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) store(c + r * ldc + s * L, acc[r][s]);
  }
}

template <class T, int MR, int NV, Start start>
inline void block(int64_t m, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                  const T* row, const T* q, int64_t ldq) {
  int64_t r = 0;
  for (; r + MR <= m; r += MR)
    tile<T, MR, NV, start>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, row, q + r * ldq, ldq);
  if constexpr (MR > 4) {
    for (; r + 4 <= m; r += 4)
      tile<T, 4, NV, start>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, row, q + r * ldq, ldq);
  }
  if constexpr (MR > 2) {
    for (; r + 2 <= m; r += 2)
      tile<T, 2, NV, start>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, row, q + r * ldq, ldq);
  }
  for (; r < m; ++r)
    tile<T, 1, NV, start>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, row, q + r * ldq, ldq);
}

template <class T, Start start>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
             int64_t ldc, const T* row = nullptr, const T* q = nullptr, int64_t ldq = 0) {
  constexpr int64_t L = kLanes<T>;
  int64_t left = n / L;
  const auto advance = [&](int64_t vectors) {
    left -= vectors, b += vectors * L, c += vectors * L;
    if constexpr (start == Start::sum) row += vectors * L, q += vectors * L;
  };
#if MOECALC_REGISTERS >= 32
  while (left >= 6 && left != 8) {
    block<T, 4, 6, start>(m, k, a, lda, b, ldb, c, ldc, row, q, ldq);
    advance(6);
  }
  while (left >= 4) {
    block<T, 6, 4, start>(m, k, a, lda, b, ldb, c, ldc, row, q, ldq);
    advance(4);
  }
#endif
  while (left >= 3 && left != 4) {
    block<T, 4, 3, start>(m, k, a, lda, b, ldb, c, ldc, row, q, ldq);
    advance(3);
  }
  while (left >= 2) {
    block<T, 6, 2, start>(m, k, a, lda, b, ldb, c, ldc, row, q, ldq);
    advance(2);
  }
  if (left == 1) block<T, 8, 1, start>(m, k, a, lda, b, ldb, c, ldc, row, q, ldq);
}

/// C (M x N) = or += A (M x K) B (K x N), all row-major, N a whole number of vectors.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
          int64_t ldc, bool accumulate) {
  if (accumulate) {
    product<T, Start::c>(m, n, k, a, lda, b, ldb, c, ldc);
  } else {
    product<T, Start::zero>(m, n, k, a, lda, b, ldb, c, ldc);
  }
}

/// MR rows by NV vectors of C += A^T B, A (K x M), B (K x N).
template <class T, int MR, int NV>
inline void outer_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> acc[MR][NV];
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) acc[r][s] = load(c + r * ldc + s * L);
  }
  for (int64_t x = 0; x < k; ++x) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) row[s] = load(b + x * ldb + s * L);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const Vec<T> factor = splat(a[x * lda + r]);
#pragma GCC unroll 8
      for (int s = 0; s < NV; ++s) acc[r][s] += factor * row[s];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < NV; ++s) store(c + r * ldc + s * L, acc[r][s]);
  }
}

/// Gradient of a matrix: C (M x N) += A^T B over K rows, M a multiple of 8, N of whole vectors.
template <class T>
void add_outer(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
               int64_t ldc) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t row = 0; row < m; row += 4) {
    int64_t at = 0;
    for (; at + 3 * L <= n; at += 3 * L)
      outer_tile<T, 4, 3>(k, a + row, lda, b + at, ldb, c + row * ldc + at, ldc);
    for (; at < n; at += L) outer_tile<T, 4, 1>(k, a + row, lda, b + at, ldb, c + row * ldc + at, ldc);
  }
}

/// C (n) += sum over rows of B (rows x n).
template <class T>
void add_rows(int64_t rows, int64_t n, const T* b, int64_t ldb, T* c) {
  for (int64_t d = 0; d < n; d += kLanes<T>) {
    Vec<T> total = load(c + d);
    for (int64_t r = 0; r < rows; ++r) total += load(b + r * ldb + d);
    store(c + d, total);
  }
}

/// C (n) += sum over rows of X * Y (rows x n).
template <class T>
void add_products(int64_t rows, int64_t n, const T* x, int64_t ldx, const T* y, int64_t ldy, T* c) {
  for (int64_t d = 0; d < n; d += kLanes<T>) {
    Vec<T> total = load(c + d);
    for (int64_t r = 0; r < rows; ++r) total += load(x + r * ldx + d) * load(y + r * ldy + d);
    store(c + d, total);
  }
}

/// C = row (to every row) + Q + A B.
template <class T>
void gemm_onto(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
               const T* row, const T* q, int64_t ldq, T* c, int64_t ldc) {
  product<T, Start::sum>(m, n, k, a, lda, b, ldb, c, ldc, row, q, ldq);
}

// --- activations
// ------------------------------------------------------------------------------------------------

template <class T>
struct Value {
  Vec<T> y, slope;
};

template <class T, ActivationKind kind, bool with_slope>
inline Value<T> apply(const Exponential<T>& exponential, Vec<T> x, T threshold, T tail_slope, T offset) {
  Value<T> out;
  out.slope = Vec<T>{};
  if constexpr (kind == ActivationKind::silu || kind == ActivationKind::silut) {
    const Vec<T> s = logistic(exponential, x);
    out.y = x * s;
    if constexpr (with_slope) out.slope = s + out.y * (T(1) - s);
    if constexpr (kind == ActivationKind::silut) {
      if (__builtin_expect(any_at_least(x, threshold), 0)) {
        const auto above = x >= splat(threshold);
        const Vec<T> w = T(1) - T(2) * reciprocal(exponential(T(2) * tail_slope * (x - threshold)) + T(1));
        out.y = above ? w + offset : out.y;
        if constexpr (with_slope) out.slope = above ? tail_slope * (T(1) - w * w) : out.slope;
      }
    }
  } else if constexpr (kind == ActivationKind::tanh) {
    out.y = T(1) - T(2) * reciprocal(exponential(T(2) * x) + T(1));
    if constexpr (with_slope) out.slope = T(1) - out.y * out.y;
  } else if constexpr (kind == ActivationKind::sigmoid) {
    out.y = logistic(exponential, x);
    if constexpr (with_slope) out.slope = out.y * (T(1) - out.y);
  } else if constexpr (kind == ActivationKind::relu || kind == ActivationKind::relu6) {
    const Vec<T> zero = Vec<T>{}, one = splat(T(1)), six = splat(T(6));
    out.y = x > zero ? x : zero;
    if constexpr (with_slope) out.slope = x > zero ? one : zero;
    if constexpr (kind == ActivationKind::relu6) {
      if constexpr (with_slope) out.slope = x < six ? out.slope : zero;
      out.y = out.y < six ? out.y : six;
    }
  } else if constexpr (kind == ActivationKind::gelu) {
    constexpr T c = T(0.79788456080286535588), d = T(0.044715);
    const Vec<T> w = T(1) - T(2) * reciprocal(exponential(T(2) * c * (x + d * x * x * x)) + T(1));
    out.y = T(0.5) * x * (T(1) + w);
    if constexpr (with_slope) {
      out.slope = T(0.5) * (T(1) + w) + T(0.5) * x * (T(1) - w * w) * c * (T(1) + T(3) * d * x * x);
    }
  } else {
    out.y = x;
    if constexpr (with_slope) out.slope = splat(T(1));
  }
  return out;
}

// Not inlined: the caller's loops would take registers from the constants.
template <class T, ActivationKind kind, bool with_slope>
[[gnu::noinline]] void map(const Activation& phi, T* x, T* slope, int64_t n) {
  const T threshold = T(phi.threshold), tail = T(phi.slope), offset = T(phi.offset);
  const Exponential<T> exponential;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Value<T> out = apply<T, kind, with_slope>(exponential, load(x + i), threshold, tail, offset);
    store(x + i, out.y);
    if constexpr (with_slope) store(slope + i, out.slope);
  }
}

template <class T, bool with_slope>
void dispatch(const Activation& phi, T* x, T* slope, int64_t n) {
  using K = ActivationKind;
  switch (phi.kind) {
    case K::linear:
      return map<T, K::linear, with_slope>(phi, x, slope, n);
    case K::silu:
      return map<T, K::silu, with_slope>(phi, x, slope, n);
    case K::silut:
      return map<T, K::silut, with_slope>(phi, x, slope, n);
    case K::tanh:
      return map<T, K::tanh, with_slope>(phi, x, slope, n);
    case K::sigmoid:
      return map<T, K::sigmoid, with_slope>(phi, x, slope, n);
    case K::relu:
      return map<T, K::relu, with_slope>(phi, x, slope, n);
    case K::relu6:
      return map<T, K::relu6, with_slope>(phi, x, slope, n);
    case K::gelu:
      return map<T, K::gelu, with_slope>(phi, x, slope, n);
  }
}

template <class T>
void activate(const Activation& phi, T* x, int64_t n) {
  dispatch<T, false>(phi, x, nullptr, n);
}

template <class T>
void activate_with_slope(const Activation& phi, T* x, T* slope, int64_t n) {
  dispatch<T, true>(phi, x, slope, n);
}

// --- rows
// -------------------------------------------------------------------------------------------------------

/// out (n) = sum_k p_k y[k * n ..]: the mixture of the experts of one row, vector by vector.
template <class T>
inline Vec<T> mixed(const T* y, const T* p, int64_t k, int64_t stride, int64_t at) {
  Vec<T> s = p[0] * load(y + at);
  for (int64_t x = 1; x < k; ++x) s += p[x] * load(y + x * stride + at);
  return s;
}

template <class T>
inline void add_row(T* to, const T* from, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<T>) store(to + d, load(to + d) + load(from + d));
}

template <class T>
inline void fill(T* to, T value, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<T>) store(to + d, splat(value));
}

template <class T>
inline void copy_row(T* to, const T* from, int64_t n) {
  for (int64_t d = 0; d < n; d += kLanes<T>) store(to + d, load(from + d));
}

/// The dot product of two rows, not yet summed over the lanes, so that several are summed at once.
template <class T>
inline Vec<T> dot_lanes(const T* x, const T* y, int64_t n) {
  Vec<T> total = Vec<T>{};
  for (int64_t d = 0; d < n; d += kLanes<T>) total += load(x + d) * load(y + d);
  return total;
}

/// Rows of edges are worked on in chunks whose activations stay in the first-level cache.
constexpr int64_t kEdgeChunk = 16;
/// Rows of nodes likewise.
constexpr int64_t kNodeChunk = 16;

// --- node parts of the edge and angle maps
// ----------------------------------------------------------------------

template <class T>
void project_centres(const LayerArgs<T>& x, int64_t begin, int64_t end, Scratch<T>&) {
  const LayerShape& s = *x.shape;
  const GroupWeights<T>& w = x.weights[x.graph->group[begin]];
  const int64_t ce = s.edge_columns(), ca = s.angle_columns();
  const T* edge_b = x.r == nullptr ? w.edge_b : w.edge_r_b;
  for (int64_t i = begin; i < end; ++i) copy_row(x.zc + i * ce, edge_b, ce);
  gemm(end - begin, ce, s.n, x.v + begin * s.np, s.np, w.edge_c, ce, x.zc + begin * ce, ce, true);
  if (ca == 0) return;
  const T* angle_b = x.r == nullptr ? w.angle_b : w.angle_r_b;
  for (int64_t i = begin; i < end; ++i) copy_row(x.zca + i * ca, angle_b, ca);
  gemm(end - begin, ca, s.n, x.v + begin * s.np, s.np, w.angle_c, ca, x.zca + begin * ca, ca, true);
}

template <class T>
void project_slots(const LayerArgs<T>& x, int64_t group, int64_t begin, int64_t end, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const int64_t ce = s.edge_columns();
  T* rows = scratch.s.get((end - begin) * s.np);
  for (int64_t k = begin; k < end; ++k) {
    copy_row(rows + (k - begin) * s.np, x.v + x.graph->slot_node[k] * s.np, s.np);
  }
  gemm(end - begin, ce, s.n, rows, s.np, x.weights[group].edge_n, ce, x.zn + begin * ce, ce, false);
}

template <class T>
void sum_slots(const LayerArgs<T>& x, int64_t begin, int64_t end, int64_t edge_end) {
  const GraphView& g = *x.graph;
  const int64_t ce = x.shape->edge_columns();
  for (int64_t k = begin; k < end; ++k) {
    T* sum_row = x.dzn + k * ce;
    int64_t at = x.slot_next[k];
    for (; at < g.slot_first[k + 1] && g.slot_edges[at] < edge_end; ++at) {
      const T* row = x.dz + (g.slot_edges[at] - x.dz_first) * ce;
      if (at == g.slot_first[k]) {
        copy_row(sum_row, row, ce);
      } else {
        add_row(sum_row, row, ce);
      }
    }
    x.slot_next[k] = at;
  }
}

template <class T>
void slots_backward(const LayerArgs<T>& x, int64_t group, int64_t begin, int64_t end, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const int64_t ce = s.edge_columns(), d3 = s.sym_width();
  T* dv = scratch.t.get((end - begin) * s.np);
  for (int64_t k = begin; k < end; ++k) {
    T* dv_row = dv + (k - begin) * s.np;
    fill(dv_row, T(0), s.np);
    for (int64_t at = g.slot_first[k]; at < g.slot_first[k + 1]; ++at) {
      const int64_t edge = g.slot_edges[at];
      // neighbour part of the symmetrised features
      const T* h = x.h + 4 * edge;
      const T* dh = x.dbig_h + g.centre[edge] * 3 * d3 + s.ep;
      for (int64_t d = 0; d < s.np; d += kLanes<T>) {
        store(dv_row + d, load(dv_row + d) + h[0] * load(dh + d) + h[1] * load(dh + d3 + d) +
                              h[2] * load(dh + 2 * d3 + d));
      }
    }
  }
  gemm(end - begin, s.np, ce, x.dzn + begin * ce, ce, x.weights[group].edge_n_t, s.np, dv, s.np, true);
  if (scratch.gradients != nullptr) {
    T* rows = scratch.s.get((end - begin) * s.np);
    for (int64_t k = begin; k < end; ++k)
      copy_row(rows + (k - begin) * s.np, x.v + g.slot_node[k] * s.np, s.np);
    add_outer(s.n, ce, end - begin, rows, s.np, x.dzn + begin * ce, ce, scratch.gradients[group].edge_n, ce);
  }
  for (int64_t k = begin; k < end; ++k) add_row(x.dv + g.slot_node[k] * s.np, dv + (k - begin) * s.np, s.np);
}

template <class T>
void centres_backward(const LayerArgs<T>& x, int64_t begin, int64_t end, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GroupWeights<T>& w = x.weights[x.graph->group[begin]];
  const int64_t ce = s.edge_columns(), ca = s.angle_columns();
  if (scratch.gradients != nullptr) {
    const GroupGradients<T>& g = scratch.gradients[x.graph->group[begin]];
    const int64_t rows = end - begin;
    const T* v = x.v + begin * s.np;
    add_outer(s.n, ce, rows, v, s.np, x.dzc + begin * ce, ce, g.edge_c, ce);
    add_rows(rows, ce, x.dzc + begin * ce, ce, g.edge_b);
    if (ca > 0) {
      add_outer(s.n, ca, rows, v, s.np, x.dzca + begin * ca, ca, g.angle_c, ca);
      add_rows(rows, ca, x.dzca + begin * ca, ca, g.angle_b);
    }
  }
  gemm(end - begin, s.np, ce, x.dzc + begin * ce, ce, w.edge_c_t, s.np, x.dv + begin * s.np, s.np, true);
  if (ca > 0) {
    gemm(end - begin, s.np, ca, x.dzca + begin * ca, ca, w.angle_c_t, s.np, x.dv + begin * s.np, s.np, true);
  }
}

// --- one centre, forward
// ----------------------------------------------------------------------------------------

/// P (j part with the centre's) and Q (k part) of the angle maps of the m close edges of a centre.
template <class T>
inline void angle_projections(const LayerArgs<T>& x, const GroupWeights<T>& w, int64_t i, int64_t e0,
                              int64_t m, T* p, T* q) {
  const LayerShape& s = *x.shape;
  const int64_t ca = s.angle_columns();
  if (x.r != nullptr) {
    const T* centre = x.zca + i * ca;
    for (int64_t j = 0; j < m; ++j) {
      const T r = x.r[e0 + j];
      for (int64_t d = 0; d < ca; d += kLanes<T>) {
        store(p + j * ca + d, load(centre + d) + r * load(w.angle_j_r + d));
        store(q + j * ca + d, r * load(w.angle_k_r + d));
      }
    }
    return;
  }
  for (int64_t j = 0; j < m; ++j) copy_row(p + j * ca, x.zca + i * ca, ca);
  gemm(m, ca, s.edge_in, x.e + e0 * s.ep, s.ep, w.angle_j, ca, p, ca, true);
  gemm(m, ca, s.edge_in, x.e + e0 * s.ep, s.ep, w.angle_k, ca, q, ca, false);
}

/// Active experts are worked on one after another, so that the working set in the first-level cache is that
/// of a dense map. A pass is one expert of the messages and one of the features' own update (where either has
/// fewer, its width is 0), side by side in a buffer.
struct Pass {
  int64_t message = 0, own = 0;        // widths
  int64_t message_at = 0, own_at = 0;  // columns in the weights
  int64_t before = 0;                  // columns of the passes before it
  int64_t columns() const { return message + own; }
};

inline int64_t edge_passes(const LayerShape& s) { return std::max(s.k_message, s.live_edge ? s.k_edge : 0); }
inline Pass edge_pass(const LayerShape& s, int64_t y) {
  const int64_t width = s.heads * s.np;
  const int64_t k_edge = s.live_edge ? s.k_edge : 0;
  const int64_t before = std::min(y, s.k_message) * width + std::min(y, k_edge) * s.ep;
  return {y < s.k_message ? width : 0, y < k_edge ? s.ep : 0, y * width, s.message() + y * s.ep, before};
}
inline int64_t angle_passes(const LayerShape& s) {
  return std::max(s.k_angle1, s.live_angle ? s.k_angle : 0);
}
inline Pass angle_pass(const LayerShape& s, int64_t y) {
  return {y < s.k_angle1 ? s.ep : 0, s.live_angle && y < s.k_angle ? s.ap : 0, y * s.ep,
          s.angle1() + y * s.ap};
}

/// Z (m x columns of the pass) of the angles (j, 0..m-1).
template <class T>
inline void angle_row(const LayerArgs<T>& x, const GroupWeights<T>& w, const Pass& pass, int64_t first,
                      int64_t m, int64_t j, const T* p, const T* q, T* z) {
  const LayerShape& s = *x.shape;
  const int64_t ca = s.angle_columns(), cz = pass.columns();
  const auto part = [&](int64_t width, int64_t at, T* to) {
    if (x.cos != nullptr) {
      const T* cos = x.cos + first + j * m;
      for (int64_t d = 0; d < width; d += kLanes<T>) {
        const Vec<T> start = load(p + j * ca + at + d), slope = load(w.angle_cos + at + d);
        for (int64_t k = 0; k < m; ++k)
          store(to + k * cz + d, (start + load(q + k * ca + at + d)) + cos[k] * slope);
      }
    } else if (width > 0) {
      const T* a = x.a + (first + j * m) * s.ap;
      gemm_onto(m, width, s.a, a, s.ap, w.angle_a + at, ca, p + j * ca + at, q + at, ca, to, cz);
    }
  };
  part(pass.message, pass.message_at, z);
  part(pass.own, pass.own_at, z + pass.message);
}

template <class T>
void centre_angles(const LayerArgs<T>& x, int64_t i, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const GroupWeights<T>& w = x.weights[g.group[i]];
  const int64_t e0 = g.first_edge[i], m = g.n_close[i], first = g.first_angle[i], ca = s.angle_columns();
  constexpr int64_t L = kLanes<T>;
  if (m == 0) return;
  T* p = scratch.p.get(m * ca);
  T* q = scratch.q.get(m * ca);
  T* z = scratch.z.get(m * (s.ep + s.ap));
  angle_projections(x, w, i, e0, m, p, q);
  const T norm = T(1.0 / std::sqrt(s.angle_norm)), keep = T(s.keep_a);
  for (int64_t y = 0; y < angle_passes(s); ++y) {
    const Pass pass = angle_pass(s, y);
    const int64_t cz = pass.columns();
    const T p_message = pass.message > 0 ? w.p_angle1[y] * norm : T(0);
    const T p_own = pass.own > 0 ? w.p_angle[y] : T(0);
    for (int64_t j = 0; j < m; ++j) {
      angle_row(x, w, pass, first, m, j, p, q, z);
      activate(s.phi, z, m * cz);
      const T* asw = x.asw + first + j * m;
      T* message = x.m + (e0 + j) * s.ep;
      for (int64_t d = 0; d < pass.message; d += L) {
        Vec<T> total = Vec<T>{};
        for (int64_t k = 0; k < m; ++k) total += asw[k] * load(z + k * cz + d);
        store(message + d, y == 0 ? total * p_message : load(message + d) + total * p_message);
      }
      for (int64_t d = 0; d < pass.own; d += L) {
        const Vec<T> factor = load(x.update.a + d) * p_own;
        const T* own = z + pass.message + d;
        T* to = x.a_out + (first + j * m) * s.ap + d;
        if (y == 0 && x.cos != nullptr) {
          const T* cos = x.cos + first + j * m;
          const Vec<T> direction = keep * load(x.direction + d);
          for (int64_t k = 0; k < m; ++k)
            store(to + k * s.ap, cos[k] * direction + factor * load(own + k * cz));
        } else if (y == 0) {
          const T* from = x.a + (first + j * m) * s.ap + d;
          for (int64_t k = 0; k < m; ++k)
            store(to + k * s.ap, keep * load(from + k * s.ap) + factor * load(own + k * cz));
        } else {
          for (int64_t k = 0; k < m; ++k)
            store(to + k * s.ap, load(to + k * s.ap) + factor * load(own + k * cz));
        }
      }
    }
  }
}

/// Message rows of edge_angle_linear2 for the edges of a centre: close ones have theirs, far ones zero or
/// their feature.
template <class T>
inline const T* message_rows(const LayerArgs<T>& x, int64_t e0, int64_t from, int64_t m) {
  return (from < m ? x.m : x.e) + (e0 + from) * x.shape->ep;
}

/// Z (rows x columns of the pass) of the edges first .. first + rows - 1 of centre i.
template <class T>
inline void edge_rows(const LayerArgs<T>& x, const GroupWeights<T>& w, const Pass& pass, int64_t i,
                      int64_t first, int64_t rows, T* z) {
  const LayerShape& s = *x.shape;
  const int64_t ce = s.edge_columns(), cz = pass.columns();
  const auto part = [&](int64_t width, int64_t at, T* to) {
    if (width == 0) return;
    const T* zc = x.zc + i * ce + at;
    for (int64_t r = 0; r < rows; ++r) {
      const T* zn = x.zn + x.graph->slot[first + r] * ce + at;
      if (x.r != nullptr) {
        const T distance = x.r[first + r];
        const T* slope = w.edge_r + at;
        for (int64_t d = 0; d < width; d += kLanes<T>)
          store(to + r * cz + d, (load(zc + d) + load(zn + d)) + distance * load(slope + d));
      } else {
        for (int64_t d = 0; d < width; d += kLanes<T>) store(to + r * cz + d, load(zc + d) + load(zn + d));
      }
    }
    if (x.r != nullptr) return;
    gemm(rows, width, s.e, x.e + first * s.ep, s.ep, w.edge_e + at, ce, to, cz, true);
  };
  part(pass.message, pass.message_at, z);
  part(pass.own, pass.own_at, z + pass.message);
}

template <class T>
void centre_edges(const LayerArgs<T>& x, int64_t i, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const GroupWeights<T>& w = x.weights[g.group[i]];
  const int64_t e0 = g.first_edge[i], n = g.first_edge[i + 1] - e0, width = s.heads * s.np;
  constexpr int64_t L = kLanes<T>;
  T* z = scratch.z.get(kEdgeChunk * std::max(width + s.ep, s.k_angle2 * s.ep));
  T* message = x.message + i * width;
  fill(message, T(0), width);
  for (int64_t y = 0; y < edge_passes(s); ++y) {
    const Pass pass = edge_pass(s, y);
    const int64_t cz = pass.columns();
    const T p_message = pass.message > 0 ? w.p_message[y] : T(0);
    const T p_own = pass.own > 0 ? w.p_edge[y] : T(0);
    T* slope = x.edge_slope == nullptr ? nullptr : x.edge_slope + e0 * s.edge_columns() + n * pass.before;
    for (int64_t begin = 0; begin < n; begin += kEdgeChunk) {
      const int64_t rows = std::min(kEdgeChunk, n - begin);
      edge_rows(x, w, pass, i, e0 + begin, rows, z);
      if (x.edge_slope == nullptr) {
        activate(s.phi, z, rows * cz);
      } else {
        activate_with_slope(s.phi, z, slope + begin * cz, rows * cz);
        for (int64_t r = 0; pass.message > 0 && r < rows; ++r) {
          T* mix = x.edge_mix + (e0 + begin + r) * width;
          for (int64_t d = 0; d < width; d += L) {
            const Vec<T> share = p_message * load(z + r * cz + d);
            store(mix + d, y == 0 ? share : load(mix + d) + share);
          }
        }
      }
      const T* sw = x.sw + e0 + begin;
      for (int64_t d = 0; d < pass.message; d += L) {
        Vec<T> total = Vec<T>{};
        for (int64_t r = 0; r < rows; ++r) total += sw[r] * load(z + r * cz + d);
        store(message + d, load(message + d) + p_message * total);
      }
      for (int64_t d = 0; d < pass.own; d += L) {
        const Vec<T> factor = load(x.update.e + d) * p_own;
        const T* own = z + pass.message + d;
        const T* from = x.e + (e0 + begin) * s.ep + d;
        T* to = x.e_out + (e0 + begin) * s.ep + d;
        for (int64_t r = 0; r < rows; ++r) {
          const Vec<T> before = y == 0 ? T(s.keep_e) * load(from + r * s.ep) : load(to + r * s.ep);
          store(to + r * s.ep, before + factor * load(own + r * cz));
        }
      }
    }
  }
  const T norm = T(1.0 / s.edge_norm);
  for (int64_t d = 0; d < width; d += kLanes<T>) store(message + d, load(message + d) * norm);

  if (!s.with_angles) return;
  // edge_angle_linear2
  const int64_t m = g.n_close[i], c2 = s.k_angle2 * s.ep;
  const T* residual = x.update.e + s.ep;
  const int64_t computed = s.keep_far ? n : m;
  for (int64_t begin = 0; begin < computed;) {
    const int64_t stop = begin < m ? m : computed;  // a chunk is all close or all far
    const int64_t rows = std::min(kEdgeChunk, stop - begin);
    for (int64_t r = 0; r < rows; ++r) copy_row(z + r * c2, w.angle2_b, c2);
    gemm(rows, c2, s.e, message_rows(x, e0, begin, m), s.ep, w.angle2, c2, z, c2, true);
    activate(s.phi, z, rows * c2);
    for (int64_t r = 0; r < rows; ++r) {
      T* to = x.e_out + (e0 + begin + r) * s.ep;
      for (int64_t d = 0; d < s.ep; d += kLanes<T>) {
        const Vec<T> u = mixed(z + r * c2, w.p_angle2, s.k_angle2, s.ep, d);
        store(to + d, load(to + d) + load(residual + d) * u);
      }
    }
    begin += rows;
  }
  for (int64_t r = computed; r < n; ++r) {
    T* to = x.e_out + (e0 + r) * s.ep;
    for (int64_t d = 0; d < s.ep; d += kLanes<T>) {
      store(to + d, load(to + d) + load(residual + d) * load(w.angle2_far + d));
    }
  }
}

/// H_i[c] = sum_j h_ij[c] [e_ij, v_j] (h carries the switch and the normaliser).
template <class T>
void centre_symmetric(const LayerArgs<T>& x, int64_t i) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const int64_t e0 = g.first_edge[i], e1 = g.first_edge[i + 1], width = s.sym_width();
  T* big_h = x.big_h + i * 3 * width;
  constexpr int64_t L = kLanes<T>;
  for (int part = 0; part < 2; ++part) {
    const int64_t offset = part == 0 ? 0 : s.ep, columns = part == 0 ? s.ep : s.np;
    for (int64_t d = 0; d < columns; d += 2 * L) {
      const bool two = d + L < columns;
      Vec<T> acc[3][2] = {};
      for (int64_t edge = e0; edge < e1; ++edge) {
        const T* row = (part == 0 ? x.e + edge * s.ep : x.v + g.neighbor[edge] * s.np) + d;
        const T* h = x.h + 4 * edge;
        const Vec<T> x0 = load(row), x1 = two ? load(row + L) : Vec<T>{};
        for (int c = 0; c < 3; ++c) {
          acc[c][0] += h[c] * x0;
          acc[c][1] += h[c] * x1;
        }
      }
      for (int c = 0; c < 3; ++c) {
        store(big_h + c * width + offset + d, acc[c][0]);
        if (two) store(big_h + c * width + offset + d + L, acc[c][1]);
      }
    }
  }
}

/// Adds the time since the last call to a counter.
struct Stopwatch {
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  void operator()(double& counter) {
    const auto now = std::chrono::steady_clock::now();
    counter += std::chrono::duration<double>(now - last).count();
    last = now;
  }
};

template <class T>
void centre(const LayerArgs<T>& x, int64_t i, Scratch<T>& scratch) {
  Stopwatch lap;
  if (x.shape->with_angles) centre_angles(x, i, scratch);
  lap(scratch.seconds[0]);
  centre_edges(x, i, scratch);
  lap(scratch.seconds[1]);
  centre_symmetric(x, i);
  lap(scratch.seconds[2]);
}

// --- one centre, backward
// ---------------------------------------------------------------------------------------

/// z (rows x k n) -> y in z, and its slope times p in `slope`.
template <class T>
inline void mixture_slopes(const Activation& phi, T* z, T* slope, const T* p, int64_t rows, int64_t k,
                           int64_t n, int64_t columns) {
  activate_with_slope(phi, z, slope, rows * columns);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t x = 0; x < k; ++x) {
      T* row = slope + r * columns + x * n;
      for (int64_t d = 0; d < n; d += kLanes<T>) store(row + d, load(row + d) * p[x]);
    }
  }
}

/// Gradient of the symmetrised features: adds to de and dh.
template <class T>
void symmetric_backward(const LayerArgs<T>& x, int64_t i) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const int64_t width = s.sym_width();
  const T* dbig = x.dbig_h + i * 3 * width;
  for (int64_t edge = g.first_edge[i]; edge < g.first_edge[i + 1]; ++edge) {
    const T* h = x.h + 4 * edge;
    const T* e = x.e + edge * s.ep;
    const T* v = x.v + g.neighbor[edge] * s.np;
    T* de = x.de + edge * s.ep;
    Vec<T> dot0 = Vec<T>{}, dot1 = Vec<T>{}, dot2 = Vec<T>{};
    for (int64_t d = 0; d < s.ep; d += kLanes<T>) {
      const Vec<T> g0 = load(dbig + d), g1 = load(dbig + width + d), g2 = load(dbig + 2 * width + d),
                   row = load(e + d);
      dot0 += g0 * row;
      dot1 += g1 * row;
      dot2 += g2 * row;
      store(de + d, load(de + d) + h[0] * g0 + h[1] * g1 + h[2] * g2);
    }
    const T* dv = dbig + s.ep;
    for (int64_t d = 0; d < s.np; d += kLanes<T>) {
      const Vec<T> row = load(v + d);
      dot0 += load(dv + d) * row;
      dot1 += load(dv + width + d) * row;
      dot2 += load(dv + 2 * width + d) * row;
    }
    x.dh[4 * edge] += sum<T>(dot0);
    x.dh[4 * edge + 1] += sum<T>(dot1);
    x.dh[4 * edge + 2] += sum<T>(dot2);
  }
}

/// Backward of edge_angle_linear2 for the edges of a centre: dm (m x ep) out, far edges add to `de_far` (n x
/// ep).
template <class T>
void messages_backward(const LayerArgs<T>& x, int64_t i, const T* de_out, T* dm, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const GroupWeights<T>& w = x.weights[g.group[i]];
  const int64_t e0 = g.first_edge[i], n = g.first_edge[i + 1] - e0, m = g.n_close[i], c2 = s.k_angle2 * s.ep;
  T* z = scratch.z.get(kEdgeChunk * c2);
  T* dz = scratch.y.get(kEdgeChunk * c2);
  const T* residual = x.update.e + s.ep;
  const int64_t computed = s.keep_far ? n : m;
  for (int64_t begin = 0; begin < computed;) {
    const int64_t stop = begin < m ? m : computed;
    const int64_t rows = std::min(kEdgeChunk, stop - begin);
    for (int64_t r = 0; r < rows; ++r) copy_row(z + r * c2, w.angle2_b, c2);
    gemm(rows, c2, s.e, message_rows(x, e0, begin, m), s.ep, w.angle2, c2, z, c2, true);
    mixture_slopes(s.phi, z, dz, w.p_angle2, rows, s.k_angle2, s.ep, c2);
    if (scratch.gradients != nullptr) {
      for (int64_t k = 0; k < s.k_angle2; ++k)
        add_products(rows, s.ep, z + k * s.ep, c2, de_out + begin * s.ep, s.ep,
                     scratch.gradients[g.group[i]].y_angle2 + k * s.ep);
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < s.ep; d += kLanes<T>) {
        const Vec<T> du = load(residual + d) * load(de_out + (begin + r) * s.ep + d);
        for (int64_t k = 0; k < s.k_angle2; ++k) {
          T* row = dz + r * c2 + k * s.ep + d;
          store(row, load(row) * du);
        }
      }
    }
    gemm(rows, s.ep, c2, dz, c2, w.angle2_t, s.ep, dm + begin * s.ep, s.ep, false);
    if (scratch.gradients != nullptr) {
      const GroupGradients<T>& into = scratch.gradients[g.group[i]];
      add_outer(s.e, c2, rows, message_rows(x, e0, begin, m), s.ep, dz, c2, into.angle2, c2);
      add_rows(rows, c2, dz, c2, into.angle2_b);
    }
    begin += rows;
  }
  if (scratch.gradients != nullptr && computed < n) {
    add_rows(n - computed, s.ep, de_out + computed * s.ep, s.ep, scratch.gradients[g.group[i]].far);
  }
}

/// Backward of the angle maps of a centre. dm: gradient of the messages of its close edges (m x ep). Adds to
/// de, da, dasw.
template <class T>
void angles_backward(const LayerArgs<T>& x, int64_t i, const T* dm, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const GroupWeights<T>& w = x.weights[g.group[i]];
  const int64_t e0 = g.first_edge[i], m = g.n_close[i], first = g.first_angle[i], ca = s.angle_columns();
  constexpr int64_t L = kLanes<T>;
  T* dzca = x.dzca + i * ca;
  fill(dzca, T(0), ca);
  if (m == 0) return;
  T* p = scratch.p.get(m * ca);
  T* q = scratch.q.get(m * ca);
  T* dp = scratch.dp.get(m * ca);
  T* dq = scratch.dq.get(m * ca);
  T* z = scratch.z.get(m * (s.ep + s.ap));
  T* dz = scratch.y.get(m * (s.ep + s.ap));
  T* dm_row = scratch.w.get(s.ep);
  angle_projections(x, w, i, e0, m, p, q);
  fill(dq, T(0), m * ca);
  const T norm = T(1.0 / std::sqrt(s.angle_norm)), keep = T(s.keep_a);
  T* da = x.da + first * s.ap;
  const int64_t n_pass = angle_passes(s);
  const bool own_gradient = s.live_angle && x.da_live;
  const T* da_out = da;
  if (x.cos != nullptr) {
    // the share of the layer's input in its output
    for (int64_t k = 0; k < m * m; ++k) {
      Vec<T> dot = Vec<T>{};
      if (x.da_live) {
        for (int64_t d = 0; d < s.ap; d += L) dot += load(da + k * s.ap + d) * load(x.direction + d);
      }
      x.dcos[first + k] = keep * sum<T>(dot);
    }
  } else {
    // da is overwritten as the passes go on, and all of them need the gradient of the output
    if (own_gradient && n_pass > 1) {
      T* copy = scratch.s.get(m * m * s.ap);
      copy_row(copy, da, m * m * s.ap);
      da_out = copy;
    }
    if (!x.da_live) fill(da, T(0), m * m * s.ap);
  }
  for (int64_t y = 0; y < n_pass; ++y) {
    const Pass pass = angle_pass(s, y);
    const int64_t cz = pass.columns();
    const T p_message = pass.message > 0 ? w.p_angle1[y] * norm : T(0);
    const T p_own = pass.own > 0 ? w.p_angle[y] : T(0);
    for (int64_t j = 0; j < m; ++j) {
      angle_row(x, w, pass, first, m, j, p, q, z);
      activate_with_slope(s.phi, z, dz, m * cz);
      const T* asw = x.asw + first + j * m;
      T* dasw = x.dasw + first + j * m;
      T* da_row = da + j * m * s.ap;
      if (scratch.gradients != nullptr) {
        const GroupGradients<T>& into = scratch.gradients[g.group[i]];
        for (int64_t d = 0; d < pass.message; d += L) {
          Vec<T> total = Vec<T>{};
          for (int64_t k = 0; k < m; ++k) total += asw[k] * load(z + k * cz + d);
          T* sums = into.y_angle1 + y * s.ep + d;
          store(sums, load(sums) + (norm * total) * load(dm + j * s.ep + d));
        }
        if (own_gradient && pass.own > 0) {
          add_products(m, s.ap, z + pass.message, cz, da_out + j * m * s.ap, s.ap, into.y_angle + y * s.ap);
        }
      }
      for (int64_t d = 0; d < pass.message; d += L) store(dm_row + d, p_message * load(dm + j * s.ep + d));
      for (int64_t k = 0; k < m; ++k) {
        const T* zk = z + k * cz;
        T* dzk = dz + k * cz;
        Vec<T> dot = Vec<T>{};
        for (int64_t d = 0; d < pass.message; d += L) {
          const Vec<T> gradient = load(dm_row + d);
          dot += gradient * load(zk + d);
          store(dzk + d, load(dzk + d) * (asw[k] * gradient));
        }
        if (pass.message > 0) dasw[k] += sum<T>(dot);
      }
      for (int64_t d = 0; d < pass.own; d += L) {
        const Vec<T> factor = load(x.update.a + d) * p_own;
        T* own = dz + pass.message + d;
        if (!own_gradient) {
          for (int64_t k = 0; k < m; ++k) store(own + k * cz, Vec<T>{});
          continue;
        }
        const T* gradient = da_out + j * m * s.ap + d;
        for (int64_t k = 0; k < m; ++k)
          store(own + k * cz, load(own + k * cz) * (factor * load(gradient + k * s.ap)));
      }
      if (own_gradient && y == 0 && keep != T(1) && x.cos == nullptr) {
        for (int64_t d = 0; d < m * s.ap; d += L) store(da_row + d, keep * load(da_row + d));
      }
      const auto back = [&](int64_t width, int64_t at, const T* from) {
        if (width == 0) return;
        if (x.cos == nullptr) {
          gemm(m, s.ap, width, from, cz, w.angle_a_t + at * s.ap, s.ap, da_row, s.ap, true);
        }
        if (scratch.gradients != nullptr) {
          add_outer(s.a, width, m, x.a + (first + j * m) * s.ap, s.ap, from, cz,
                    scratch.gradients[g.group[i]].angle_a + at, ca);
        }
        T *dpj = dp + j * ca + at, *dqk = dq + at, *dc = dzca + at;
        for (int64_t d = 0; d < width; d += L) {
          Vec<T> total = Vec<T>{};
          for (int64_t k = 0; k < m; ++k) {
            const Vec<T> value = load(from + k * cz + d);
            total += value;
            store(dqk + k * ca + d, load(dqk + k * ca + d) + value);
          }
          store(dpj + d, total);
          store(dc + d, load(dc + d) + total);
        }
      };
      back(pass.message, pass.message_at, dz);
      back(pass.own, pass.own_at, dz + pass.message);
      if (x.cos != nullptr) {
        const T *slope = w.angle_cos + pass.message_at, *own_slope = w.angle_cos + pass.own_at;
        for (int64_t k = 0; k < m; ++k) {
          const T* row = dz + k * cz;
          x.dcos[first + j * m + k] += sum<T>(dot_lanes(row, slope, pass.message) +
                                              dot_lanes(row + pass.message, own_slope, pass.own));
        }
      }
    }
  }
  if (x.r != nullptr) {
    for (int64_t j = 0; j < m; ++j)
      x.dr[e0 + j] +=
          sum<T>(dot_lanes(dp + j * ca, w.angle_j_r, ca) + dot_lanes(dq + j * ca, w.angle_k_r, ca));
    return;
  }
  gemm(m, s.ep, ca, dp, ca, w.angle_j_t, s.ep, x.de + e0 * s.ep, s.ep, true);
  gemm(m, s.ep, ca, dq, ca, w.angle_k_t, s.ep, x.de + e0 * s.ep, s.ep, true);
  if (scratch.gradients != nullptr) {
    const GroupGradients<T>& into = scratch.gradients[g.group[i]];
    add_outer(s.edge_in, ca, m, x.e + e0 * s.ep, s.ep, dp, ca, into.angle_j, ca);
    add_outer(s.edge_in, ca, m, x.e + e0 * s.ep, s.ep, dq, ca, into.angle_k, ca);
  }
}

// All experts at once: the rows of dz, which leave the cache, are then written in one go.
template <class T>
void edges_backward(const LayerArgs<T>& x, int64_t i, const T* de_out, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const GroupWeights<T>& w = x.weights[g.group[i]];
  const int64_t e0 = g.first_edge[i], n = g.first_edge[i + 1] - e0, ce = s.edge_columns(),
                width = s.heads * s.np;
  constexpr int64_t L = kLanes<T>;
  T* z = scratch.z.get(kEdgeChunk * ce);
  T* spare = x.dz == nullptr ? scratch.y.get(kEdgeChunk * ce) : nullptr;
  const T* kept = x.edge_slope == nullptr ? nullptr : x.edge_slope + e0 * ce;
  // of an expert's columns in a row: kept ones, or those just computed
  const auto slopes = [&](int64_t expert, int64_t row, const T* computed, int64_t column) {
    const Pass pass = edge_pass(s, expert);
    return kept == nullptr ? computed : kept + n * pass.before + row * pass.columns() + column;
  };
  T* dzc = x.dzc + i * ce;
  fill(dzc, T(0), ce);
  T* dmessage = scratch.w.get(width);
  const T norm = T(1.0 / s.edge_norm);
  for (int64_t d = 0; d < width; d += L) store(dmessage + d, norm * load(x.dmessage + i * width + d));
  for (int64_t begin = 0; begin < n; begin += kEdgeChunk) {
    const int64_t rows = std::min(kEdgeChunk, n - begin);
    T* dz = x.dz == nullptr ? spare : x.dz + (e0 + begin - x.dz_first) * ce;
    if (kept == nullptr) {
      edge_rows(x, w, {ce, 0, 0, 0, 0}, i, e0 + begin, rows, z);
      activate_with_slope(s.phi, z, dz, rows * ce);
    }
    if (scratch.gradients != nullptr) {
      const GroupGradients<T>& into = scratch.gradients[g.group[i]];
      const T* sw = x.sw + e0 + begin;
      for (int64_t d = 0; d < s.message(); d += L) {
        Vec<T> total = Vec<T>{};
        for (int64_t r = 0; r < rows; ++r) total += sw[r] * load(z + r * ce + d);
        store(into.y_message + d, load(into.y_message + d) + total * load(dmessage + d % width));
      }
      for (int64_t k = 0; s.live_edge && k < s.k_edge; ++k)
        add_products(rows, s.ep, z + s.message() + k * s.ep, ce, de_out + begin * s.ep, s.ep,
                     into.y_edge + k * s.ep);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t edge = e0 + begin + r;
      const T sw = x.sw[edge];
      T* dzr = dz + r * ce;
      if (kept != nullptr) {
        x.dsw[edge] += sum<T>(dot_lanes(dmessage, x.edge_mix + edge * width, width));
      } else {
        Vec<T> dot = Vec<T>{};
        for (int64_t d = 0; d < width; d += L)
          dot += load(dmessage + d) * mixed(z + r * ce, w.p_message, s.k_message, width, d);
        x.dsw[edge] += sum<T>(dot);
      }
      for (int64_t k = 0; k < s.k_message; ++k) {
        T *row = dzr + k * width, *sums = dzc + k * width;
        const T* slope = slopes(k, begin + r, row, 0);
        const T p_sw = w.p_message[k] * sw;
        for (int64_t d = 0; d < width; d += L) {
          const Vec<T> value = load(slope + d) * (p_sw * load(dmessage + d));
          store(row + d, value);
          store(sums + d, load(sums + d) + value);
        }
      }
      for (int64_t k = 0; s.live_edge && k < s.k_edge; ++k) {
        T *row = dzr + s.message() + k * s.ep, *sums = dzc + s.message() + k * s.ep;
        const T* slope = slopes(k, begin + r, row, edge_pass(s, k).message);
        const T p = w.p_edge[k];
        for (int64_t d = 0; d < s.ep; d += L) {
          const Vec<T> factor = p * load(x.update.e + d);
          const Vec<T> value = load(slope + d) * (factor * load(de_out + (begin + r) * s.ep + d));
          store(row + d, value);
          store(sums + d, load(sums + d) + value);
        }
      }
    }
    if (x.r != nullptr) {
      for (int64_t r = 0; r < rows; ++r) x.dr[e0 + begin + r] += sum<T>(dot_lanes(dz + r * ce, w.edge_r, ce));
      continue;
    }
    gemm(rows, s.ep, ce, dz, ce, w.edge_e_t, s.ep, x.de + (e0 + begin) * s.ep, s.ep, true);
    if (scratch.gradients != nullptr) {
      add_outer(s.e, ce, rows, x.e + (e0 + begin) * s.ep, s.ep, dz, ce, scratch.gradients[g.group[i]].edge_e,
                ce);
    }
  }
}

template <class T>
void centre_backward(const LayerArgs<T>& x, int64_t i, Scratch<T>& scratch) {
  Stopwatch lap;
  const LayerShape& s = *x.shape;
  const GraphView& g = *x.graph;
  const int64_t e0 = g.first_edge[i], n = g.first_edge[i + 1] - e0, m = g.n_close[i];
  // de holds the gradient of the output: keep a copy, and continue with the share of the layer's input
  T* de_out = scratch.u.get(std::max<int64_t>(n, 1) * s.ep);
  T* de = x.de + e0 * s.ep;
  if (x.de_live) {
    const T keep = s.live_edge ? T(s.keep_e) : T(1);
    for (int64_t d = 0; d < n * s.ep; d += kLanes<T>) {
      const Vec<T> gradient = load(de + d);
      store(de_out + d, gradient);
      store(de + d, keep * gradient);
    }
  } else {
    fill(de_out, T(0), n * s.ep);
    fill(de, T(0), n * s.ep);
  }
  if (s.with_angles) {
    T* dm = scratch.t.get(std::max<int64_t>(n, 1) * s.ep);
    messages_backward(x, i, de_out, dm, scratch);
    if (s.keep_far) {
      for (int64_t r = m; r < n; ++r) add_row(de + r * s.ep, dm + r * s.ep, s.ep);
    }
    angles_backward(x, i, dm, scratch);
  }
  lap(scratch.seconds[3]);
  edges_backward(x, i, de_out, scratch);
  lap(scratch.seconds[4]);
  symmetric_backward(x, i);
  lap(scratch.seconds[5]);
}

// --- nodes
// ------------------------------------------------------------------------------------------------------

/// S_i = flatten((1/3) sum_c H[c, m] H[c, d]) for the edge and the neighbour block.
template <class T>
inline void invariants(const LayerShape& s, const T* big_h, T* out) {
  const int64_t width = s.sym_width();
  for (int part = 0; part < 2; ++part) {
    const int64_t offset = part == 0 ? 0 : s.ep, columns = part == 0 ? s.ep : s.np;
    T* block_out = out + (part == 0 ? 0 : s.axis * s.ep);
    for (int64_t m = 0; m < s.axis; ++m) {
      const T h0 = big_h[offset + m] / T(3), h1 = big_h[width + offset + m] / T(3),
              h2 = big_h[2 * width + offset + m] / T(3);
      for (int64_t d = 0; d < columns; d += kLanes<T>) {
        store(block_out + m * columns + d, h0 * load(big_h + offset + d) +
                                               h1 * load(big_h + width + offset + d) +
                                               h2 * load(big_h + 2 * width + offset + d));
      }
    }
  }
}

template <class T>
void invariants_backward(const LayerShape& s, const T* big_h, const T* ds, T* dbig_h) {
  const int64_t width = s.sym_width();
  for (int64_t d = 0; d < 3 * width; d += kLanes<T>) store(dbig_h + d, Vec<T>{});
  for (int part = 0; part < 2; ++part) {
    const int64_t offset = part == 0 ? 0 : s.ep, columns = part == 0 ? s.ep : s.np;
    const T* block_in = ds + (part == 0 ? 0 : s.axis * s.ep);
    for (int64_t m = 0; m < s.axis; ++m) {
      for (int c = 0; c < 3; ++c) {
        const T* h = big_h + c * width + offset;
        T* dh = dbig_h + c * width + offset;
        const T hm = h[m] / T(3);
        Vec<T> dot = Vec<T>{};
        for (int64_t d = 0; d < columns; d += kLanes<T>) {
          const Vec<T> gradient = load(block_in + m * columns + d);
          store(dh + d, load(dh + d) + hm * gradient);
          dot += gradient * load(h + d);
        }
        dh[m] += sum<T>(dot) / T(3);
      }
    }
  }
}

template <class T>
void nodes(const LayerArgs<T>& x, int64_t begin, int64_t end, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GroupWeights<T>& w = x.weights[x.graph->group[begin]];
  const int64_t rows = end - begin, c1 = s.k_node * s.np, c2 = s.k_sym * s.np, width = s.heads * s.np;
  T* z1 = scratch.z.get(rows * c1);
  T* z2 = scratch.y.get(rows * c2);
  T* sym = scratch.s.get(rows * s.sym_in());
  for (int64_t r = 0; r < rows; ++r) {
    copy_row(z1 + r * c1, w.node_b, c1);
    copy_row(z2 + r * c2, w.sym_b, c2);
    invariants(s, x.big_h + (begin + r) * 3 * s.sym_width(), sym + r * s.sym_in());
  }
  gemm(rows, c1, s.n, x.v + begin * s.np, s.np, w.node, c1, z1, c1, true);
  gemm(rows, c2, s.sym_in(), sym, s.sym_in(), w.sym, c2, z2, c2, true);
  // one row after another in memory: those of node_self_mlp, then those of node_sym_linear
  T* slope = x.node_slope + begin * (c1 + c2);
  activate_with_slope(s.phi, z1, slope, rows * c1);
  activate_with_slope(s.phi, z2, slope + rows * c1, rows * c2);
  for (int64_t r = 0; r < rows; ++r) {
    const T* v = x.v + (begin + r) * s.np;
    T* out = x.v_out + (begin + r) * s.np;
    for (int64_t d = 0; d < s.np; d += kLanes<T>) {
      Vec<T> total = T(s.keep_n) * load(v + d);
      total += load(x.update.n + d) * mixed(z1 + r * c1, w.p_node, s.k_node, s.np, d);
      total += load(x.update.n + s.np + d) * mixed(z2 + r * c2, w.p_sym, s.k_sym, s.np, d);
      for (int64_t head = 0; head < s.heads; ++head) {
        total += load(x.update.n + (2 + head) * s.np + d) *
                 load(x.message + (begin + r) * width + head * s.np + d);
      }
      store(out + d, total);
    }
  }
}

template <class T>
void nodes_backward(const LayerArgs<T>& x, int64_t begin, int64_t end, Scratch<T>& scratch) {
  const LayerShape& s = *x.shape;
  const GroupWeights<T>& w = x.weights[x.graph->group[begin]];
  const int64_t rows = end - begin, c1 = s.k_node * s.np, c2 = s.k_sym * s.np, width = s.heads * s.np;
  constexpr int64_t L = kLanes<T>;
  const T* gradient = x.dv_out + begin * s.np;
  T* dv = x.dv + begin * s.np;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < s.np; d += L) {
      const Vec<T> g = load(gradient + r * s.np + d);
      store(dv + r * s.np + d, load(dv + r * s.np + d) + T(s.keep_n) * g);
      for (int64_t head = 0; head < s.heads; ++head) {
        store(x.dmessage + (begin + r) * width + head * s.np + d,
              load(x.update.n + (2 + head) * s.np + d) * g);
      }
    }
  }
  T* sym = scratch.s.get(rows * s.sym_in());
  if (scratch.gradients != nullptr) {
    const GroupGradients<T>& into = scratch.gradients[x.graph->group[begin]];
    for (int64_t head = 0; head < s.heads; ++head)
      add_products(rows, s.np, gradient, s.np, x.message + begin * width + head * s.np, width,
                   into.update_n + head * s.np);
    for (int64_t r = 0; r < rows; ++r)
      invariants(s, x.big_h + (begin + r) * 3 * s.sym_width(), sym + r * s.sym_in());
    const auto values = [&](int64_t k, int64_t in, const T* a, const T* b, const T* bias, T* sums) {
      const int64_t c = k * s.np;
      T* z = scratch.z.get(rows * c);
      for (int64_t r = 0; r < rows; ++r) copy_row(z + r * c, bias, c);
      gemm(rows, c, in, a, in, b, c, z, c, true);
      activate(s.phi, z, rows * c);
      for (int64_t y = 0; y < k; ++y)
        add_products(rows, s.np, z + y * s.np, c, gradient, s.np, sums + y * s.np);
    };
    values(s.k_node, s.np, x.v + begin * s.np, w.node, w.node_b, into.y_node);
    values(s.k_sym, s.sym_in(), sym, w.sym, w.sym_b, into.y_sym);
  }
  // slopes become gradients in place
  const auto scale = [&](T* slope, int64_t k, const T* p, const T* update) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t y = 0; y < k; ++y) {
        T* row = slope + (r * k + y) * s.np;
        for (int64_t d = 0; d < s.np; d += L)
          store(row + d, load(row + d) * (p[y] * (load(update + d) * load(gradient + r * s.np + d))));
      }
    }
  };
  T *dz1 = x.node_slope + begin * (c1 + c2), *dz2 = dz1 + rows * c1;
  scale(dz1, s.k_node, w.p_node, x.update.n);
  scale(dz2, s.k_sym, w.p_sym, x.update.n + s.np);
  gemm(rows, s.np, c1, dz1, c1, w.node_t, s.np, dv, s.np, true);
  if (scratch.gradients != nullptr) {
    const GroupGradients<T>& into = scratch.gradients[x.graph->group[begin]];
    add_outer(s.n, c1, rows, x.v + begin * s.np, s.np, dz1, c1, into.node, c1);
    add_rows(rows, c1, dz1, c1, into.node_b);
    add_outer(s.sym_in(), c2, rows, sym, s.sym_in(), dz2, c2, into.sym, c2);
    add_rows(rows, c2, dz2, c2, into.sym_b);
  }
  gemm(rows, s.sym_in(), c2, dz2, c2, w.sym_t, s.sym_in(), sym, s.sym_in(), false);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (begin + r) * 3 * s.sym_width();
    invariants_backward(s, x.big_h + at, sym + r * s.sym_in(), x.dbig_h + at);
  }
}

template <class T>
constexpr Kernels<T> kTable = {MOECALC_ISA_NAME,   gemm<T>,           activate<T>,  activate_with_slope<T>,
                               project_centres<T>, project_slots<T>,  centre<T>,    centre_backward<T>,
                               nodes<T>,           nodes_backward<T>, sum_slots<T>, slots_backward<T>,
                               centres_backward<T>};

}  // namespace

const Kernels<float>& table_float() { return kTable<float>; }
const Kernels<double>& table_double() { return kTable<double>; }

}  // namespace moecalc::ops::MOECALC_ISA
