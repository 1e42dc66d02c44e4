// The fitting net and per-atom energies (SPEC section 8), and their gradient.
#pragma once

#include "geometry.cuh"
#include "product.cuh"

namespace moecalc::cuda {

/// One layer: y = phi(x W + b) [* idt] [+ x, or + [x, x]]. Widths padded, padding of idt zero.
template <class T>
struct FittingLayer {
  int n_in = 0, n_out = 0;  // unpadded
  int in = 0, out = 0;      // padded
  int residual = 0;         // 0, 1 or 2
  const T *w = nullptr, *w_t = nullptr, *b = nullptr, *idt = nullptr;
  Phi<T> phi;
};

/// x (n_local, in) = [v, table[type], case], padded with zeros.
template <class T>
struct FittingInput {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8;
  Graph g;
  int n = 0, np = 0, n_constant = 0, in = 0;
  const T* v = nullptr;
  const T* constant = nullptr;  // (n_types, n_constant)
  T* x = nullptr;
  int64_t blocks() const { return (g.n_local + kRows - 1) / kRows; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int t) {
      for (int at = t; at < kRows * in; at += kThreads) {
        const int64_t i = block.index() * kRows + at / in;
        const int d = at % in;
        if (i >= g.n_local) continue;
        T value = 0;
        if (d < n) {
          value = v[i * np + d];
        } else if (d < n + n_constant) {
          value = constant[static_cast<int64_t>(g.type[i]) * n_constant + d - n];
        }
        x[i * in + d] = value;
      }
    });
  }
};

/// Forward: y, and slope = phi' idt. One block per tile of rows and 64 columns.
template <class N>
struct FittingForward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  FittingLayer<T> layer;
  int64_t n_row = 0;
  const T* x = nullptr;
  T *y = nullptr, *slope = nullptr;
  int64_t blocks() const { return (n_row + N::kRows - 1) / N::kRows * ((layer.out + 63) / 64); }
  int64_t shared_bytes() const { return shared_size<T>(N::kRows * padded_stride<T>(kSlice)); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    using X = Tile<N, 64>;
    const int across = (layer.out + 63) / 64, column = static_cast<int>(block.index() % across) * 64;
    const int64_t first = block.index() / across * N::kRows;
    const int rows = static_cast<int>(n_row - first < N::kRows ? n_row - first : N::kRows);
    T* slice = block.template shared<T>(N::kRows * padded_stride<T>(kSlice));
    auto acc = block.template registers<T, X::kSize>();
    block.each([&](int t) {
      MOECALC_UNROLL
      for (int z = 0; z < X::kSize; ++z) acc[t][z] = T(0);
      for_own<X>(t, rows, layer.out - column, [&](int g, int, int c) {
        MOECALC_UNROLL
        for (int v = 0; v < X::kVector; ++v) acc[t][g * X::kVector + v] = layer.b[column + c + v];
      });
    });
    multiply_sliced<N, 64>(
        block, acc, slice, rows, layer.in, X::from(layer.w, column), layer.out, layer.out - column,
        [&](int r, int c) { return load<T, 16 / sizeof(T)>(x + (first + r) * layer.in + c); });
    block.each([&](int t) {
      for_own<X>(t, rows, layer.out - column, [&](int g, int r, int c) {
        MOECALC_UNROLL
        for (int v = 0; v < X::kVector; ++v) {
          const int d = column + c + v;
          const int64_t row = first + r;
          const Slope<T> value = layer.phi(acc[t][g * X::kVector + v]);
          T sum = value.y * layer.idt[d];
          if (layer.residual > 0 && d < layer.n_out) sum += x[row * layer.in + d % layer.n_in];
          y[row * layer.out + d] = sum;
          slope[row * layer.out + d] = value.slope * layer.idt[d];
        }
      });
    });
  }
};

/// Backward: dx = (dy slope) W^T [+ dy, or + both halves of dy].
template <class N>
struct FittingBackward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  FittingLayer<T> layer;
  int64_t n_row = 0;
  const T *dy = nullptr, *slope = nullptr;
  T* dx = nullptr;
  int64_t blocks() const { return (n_row + N::kRows - 1) / N::kRows * ((layer.in + 63) / 64); }
  int64_t shared_bytes() const { return shared_size<T>(N::kRows * padded_stride<T>(kSlice)); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    using X = Tile<N, 64>;
    const int across = (layer.in + 63) / 64, column = static_cast<int>(block.index() % across) * 64;
    const int64_t first = block.index() / across * N::kRows;
    const int rows = static_cast<int>(n_row - first < N::kRows ? n_row - first : N::kRows);
    T* slice = block.template shared<T>(N::kRows * padded_stride<T>(kSlice));
    auto acc = block.template registers<T, X::kSize>();
    block.each([&](int t) {
      MOECALC_UNROLL
      for (int z = 0; z < X::kSize; ++z) acc[t][z] = T(0);
    });
    multiply_sliced<N, 64>(block, acc, slice, rows, layer.out, X::from(layer.w_t, column), layer.in,
                           layer.in - column, [&](int r, int c) {
                             constexpr int V = 16 / sizeof(T);
                             const int64_t at = (first + r) * layer.out + c;
                             Vec<T, V> value = load<T, V>(dy + at);
                             const Vec<T, V> factor = load<T, V>(slope + at);
                             MOECALC_UNROLL
                             for (int v = 0; v < V; ++v) value.x[v] *= factor.x[v];
                             return value;
                           });
    block.each([&](int t) {
      for_own<X>(t, rows, layer.in - column, [&](int g, int r, int c) {
        MOECALC_UNROLL
        for (int v = 0; v < X::kVector; ++v) {
          const int d = column + c + v;
          const int64_t row = first + r;
          T sum = acc[t][g * X::kVector + v];
          if (layer.residual > 0 && d < layer.n_in) {
            sum += dy[row * layer.out + d];
            if (layer.residual == 2) sum += dy[row * layer.out + layer.n_in + d];
          }
          dx[row * layer.in + d] = sum;
        }
      });
    });
  }
};

/// Energies in engine order, (x . w + b + shift) * weight, and the gradient with respect to x.
template <class T>
struct Energies {
  static constexpr int kThreads = 128;
  static constexpr int kLanes = 16;
  Graph g;
  int in = 0;
  const T *x = nullptr, *w = nullptr;
  double bias = 0.0;
  const double *shift = nullptr, *weight = nullptr;  // (n_types)
  double* energies = nullptr;
  T* dx = nullptr;
  int64_t blocks() const { return (g.n_local + kThreads / kLanes - 1) / (kThreads / kLanes); }
  int64_t shared_bytes() const { return shared_size<T>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    T* partial = block.template shared<T>(kThreads);
    const int64_t first = block.index() * (kThreads / kLanes);
    block.each([&](int t) {
      const int64_t i = first + t / kLanes;
      T total = 0;
      if (i < g.n_local) {
        const T factor = T(weight[g.type[i]]);
        for (int d = t % kLanes; d < in; d += kLanes) {
          total += x[i * in + d] * w[d];
          dx[i * in + d] = factor * w[d];
        }
      }
      partial[t] = total;
    });
    block.sync();
    block.each([&](int t) {
      const int64_t i = first + t;
      if (t >= kThreads / kLanes || i >= g.n_local) return;
      T total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += partial[t * kLanes + lane];
      const int type = g.type[i];
      energies[g.engine_row[i]] = (double(total + T(bias)) + shift[type]) * weight[type];
    });
  }
};

/// First `n` columns of rows of width `from`, to rows of width `np`, padded with zeros.
template <class T>
struct TakeColumns {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8;
  int64_t n_row = 0;
  int n = 0, np = 0, from = 0;
  const T* in = nullptr;
  T* out = nullptr;
  int64_t blocks() const { return (n_row + kRows - 1) / kRows; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int t) {
      for (int at = t; at < kRows * np; at += kThreads) {
        const int64_t i = block.index() * kRows + at / np;
        const int d = at % np;
        if (i < n_row) out[i * np + d] = d < n ? in[i * from + d] : T(0);
      }
    });
  }
};

}  // namespace moecalc::cuda
