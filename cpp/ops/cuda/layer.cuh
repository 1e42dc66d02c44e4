// Kernels of one RepFlow layer, forward and backward (formulas: SPEC section 6; scheme: docs/cuda.md).
//
// Centres are sorted by routing group, and a block works on a run of centres of one group, so that all its
// rows meet the same weight block, in which the group's active experts lie side by side. Rows (angles, edges)
// of a run are contiguous in memory and are taken kRows at a time; a tile may hold rows of several centres.
// Sums over the rows of an edge or a centre are segmented sums of a tile in shared memory, added to global
// memory by the one block that owns the target: no atomics.
#pragma once

#include "geometry.cuh"
#include "product.cuh"

namespace moecalc::cuda {

/// Everything that the kernels of one layer read and write. Names as in ops::LayerArgs; pq, dpq: (n_close, 2,
/// angle columns), the parts of the angle maps that come from edge ij (with the centre's) and from edge ik.
template <class T>
struct Layer {
  int np = 0, ep = 0, ap = 0, heads = 1, axis = 4;
  int k_node = 1, k_sym = 1, k_message = 1, k_edge = 0, k_angle1 = 0, k_angle2 = 0, k_angle = 0;
  int width = 0;  // heads * np
  int message_columns = 0, edge_columns = 0, angle1 = 0, angle_columns = 0;
  int sym_width = 0, sym_in = 0;
  bool live_edge = false, live_angle = false, with_angles = false, keep_far = false;
  bool first = false;               // angle features are cos * angle_row, not stored
  T edge_norm = 1, angle_norm = 1;  // 1 / edge_norm, 1 / sqrt(angle_norm)
  T keep_n = 1, keep_e = 1, keep_a = 1;
  Phi<T> phi;
  Graph g;
  const ops::GroupWeights<T>* weights = nullptr;
  ops::UpdateVectors<T> update;

  const T *v = nullptr, *e = nullptr, *a = nullptr, *cos = nullptr, *angle_row = nullptr;
  const T *sw = nullptr, *h = nullptr, *asw = nullptr;
  T *zc = nullptr, *zn = nullptr, *zca = nullptr, *pq = nullptr;
  T *m = nullptr, *message = nullptr, *big_h = nullptr, *sym = nullptr;
  T *v_out = nullptr, *e_out = nullptr, *a_out = nullptr;

  // backward
  const T *dv_out = nullptr, *de_out = nullptr;
  T *dmessage = nullptr, *dm = nullptr, *dpq = nullptr, *dz = nullptr, *dz_node = nullptr;
  T *dzc = nullptr, *dzca = nullptr, *dbig_h = nullptr, *dsym = nullptr;
  T *dzn = nullptr, *dv_slot = nullptr, *dv_own = nullptr, *dv = nullptr;
  T *de = nullptr, *da = nullptr, *dcos = nullptr, *dasw = nullptr;
  double *dsw = nullptr, *dh = nullptr;
  bool add_dasw = false, add_edge = false;  // whether dasw; dsw and dh hold the share of later layers

  /// Rows of m: close edges, or all edges where far ones keep their feature as message.
  MOECALC_KERNEL const int* message_first() const { return keep_far ? g.first_edge : g.first_close; }
};

/// Centre of a row, given offsets of the rows of centres begin..end-1.
MOECALC_KERNEL int centre_of(const int* first, int begin, int end, int row) {
  int low = begin, high = end - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// f(row, column, sum) for every run of rows with the same key, from a tile in shared memory.
template <class N, class Block, class F>
MOECALC_KERNEL void segment_sums(Block& block, const typename N::type* tile, int stride, int rows,
                                 int columns, const int* key, const F& f) {
  using T = typename N::type;
  constexpr int V = 16 / sizeof(T), lanes = 64 / V;
  block.each([&](int t) {
    const int c = t % lanes * V;
    if (c >= columns) return;
    for (int r = t / lanes; r < rows; r += kThreads / lanes) {
      if (r > 0 && key[r - 1] == key[r]) continue;
      Vec<T, V> sum = load<T, V>(tile + r * stride + c);
      for (int x = r + 1; x < rows && key[x] == key[r]; ++x) {
        const Vec<T, V> y = load<T, V>(tile + x * stride + c);
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) sum.x[v] += y.x[v];
      }
      f(r, c, sum);
    }
  });
}

/// The same over rows r, r + step[r], r + 2 step[r], ... of one centre.
template <class N, class Block, class F>
MOECALC_KERNEL void strided_sums(Block& block, const typename N::type* tile, int stride, int rows,
                                 int columns, const int* centre, const int* n_close, const F& f) {
  using T = typename N::type;
  constexpr int V = 16 / sizeof(T), lanes = 64 / V;
  block.each([&](int t) {
    const int c = t % lanes * V;
    if (c >= columns) return;
    for (int r = t / lanes; r < rows; r += kThreads / lanes) {
      const int step = n_close[centre[r]];
      if (r >= step && centre[r - step] == centre[r]) continue;
      Vec<T, V> sum = load<T, V>(tile + r * stride + c);
      for (int x = r + step; x < rows && centre[x] == centre[r]; x += step) {
        const Vec<T, V> y = load<T, V>(tile + x * stride + c);
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) sum.x[v] += y.x[v];
      }
      f(r, c, sum);
    }
  });
}

/// to = or += value, one vector.
template <class T, int V>
MOECALC_KERNEL void put(T* to, bool fresh, Vec<T, V> value) {
  if (!fresh) {
    const Vec<T, V> old = load<T, V>(to);
    MOECALC_UNROLL
    for (int v = 0; v < V; ++v) value.x[v] += old.x[v];
  }
  store<T, V>(to, value);
}

/// out (shared) += tile (shared, k columns) W, all columns of `width`.
template <class N, class Block>
MOECALC_KERNEL void add_product(Block& block, typename N::type* out, int out_stride,
                                const typename N::type* tile, int k, const typename N::type* w, int width,
                                int rows) {
  using T = typename N::type;
  chunks(width, [&](auto chunk, int first) {
    using X = Tile<N, decltype(chunk)::value>;
    block.each([&](int t) {
      T acc[X::kSize] = {};
      X::multiply(t, acc, tile, padded_stride<T>(64), k, X::from(w, first), width, width - first);
      for_own<X>(t, rows, width - first, [&](int g, int r, int c) {
        T* to = out + r * out_stride + first + c;
        MOECALC_UNROLL
        for (int v = 0; v < X::kVector; ++v) to[v] += acc[g * X::kVector + v];
      });
    });
  });
}

/// Partial row dots of the threads of a tile, in shared memory.
template <class N>
struct Dots {
  using T = typename N::type;
  static constexpr int kSlots = 64 * static_cast<int>(sizeof(T)) / 16;  // most threads that share a row
  static constexpr int kStride = kSlots + 1;
  static constexpr int64_t bytes() { return shared_size<T>(N::kRows * kStride); }
  T* values;

  template <class Block>
  MOECALC_KERNEL void clear(Block& block) const {
    block.each([&](int t) {
      for (int at = t; at < N::kRows * kStride; at += kThreads) values[at] = T(0);
    });
  }
  template <class X>
  MOECALC_KERNEL void add(int thread, int row, T value) const {
    values[row * kStride + X::slot(thread)] += value;
  }
  MOECALC_KERNEL T sum(int row) const {
    T total = 0;
    for (int x = 0; x < kSlots; ++x) total += values[row * kStride + x];
    return total;
  }
};

// --- products of whole rows: node parts of the maps, and gradients through them ---

/// Which matrix of a routing group.
template <class T>
using Weight = const T* ops::GroupWeights<T>::*;

/// out (+)= A W (+ b) for the rows of every run; one block per run and 64 columns.
template <class N>
struct Linear {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  const ops::GroupWeights<T>* weights = nullptr;
  Weight<T> w = nullptr, b = nullptr;  // b: null for none
  const int* gather = nullptr;         // row of A of every row; null: the same
  const T* a = nullptr;
  int64_t lda = 0;
  int k = 0, columns = 0;
  T* out = nullptr;
  bool add = false;
  int64_t blocks() const { return n_run * ((columns + 63) / 64); }
  int64_t shared_bytes() const { return shared_size<T>(N::kRows * padded_stride<T>(kSlice)); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    using X = Tile<N, 64>;
    constexpr int V = X::kVector;
    const int across = (columns + 63) / 64;
    const Run run = runs[block.index() / across];
    const int first = static_cast<int>(block.index() % across) * 64, rows = run.end - run.begin;
    const ops::GroupWeights<T>& group = weights[run.group];
    T* slice = block.template shared<T>(N::kRows * padded_stride<T>(kSlice));
    auto acc = block.template registers<T, X::kSize>();
    block.each([&](int t) {
      MOECALC_UNROLL
      for (int x = 0; x < X::kSize; ++x) acc[t][x] = T(0);
      if (b == nullptr) return;
      const T* bias = group.*b + first;
      for_own<X>(t, rows, columns - first, [&](int g, int, int c) {
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) acc[t][g * V + v] = bias[c + v];
      });
    });
    multiply_sliced<N, 64>(block, acc, slice, rows, k, X::from(group.*w, first), columns, columns - first,
                           [&](int r, int c) {
                             const int64_t row = gather == nullptr ? run.begin + r : gather[run.begin + r];
                             return load<T, 16 / sizeof(T)>(a + row * lda + c);
                           });
    block.each([&](int t) {
      for_own<X>(t, rows, columns - first, [&](int g, int r, int c) {
        Vec<T, V> value;
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) value.x[v] = acc[t][g * V + v];
        put<T, V>(out + (run.begin + r) * static_cast<int64_t>(columns) + first + c, !add, value);
      });
    });
  }
};

// --- angles ---

/// Shared memory of the angle kernels.
template <class N>
struct AngleRows {
  using T = typename N::type;
  T *a, *y;                 // angle features; results of a chunk of columns
  int *centre, *j, *k, *q;  // of every row: centre, close edges ij and ik, number within the centre

  static int64_t bytes(int ap) {
    return shared_size<T>(N::kRows * padded_stride<T>(ap)) + shared_size<T>(N::kRows * padded_stride<T>(64)) +
           4 * shared_size<int>(N::kRows);
  }
  template <class Block>
  MOECALC_KERNEL AngleRows(Block& block, int ap) {
    a = block.template shared<T>(N::kRows * padded_stride<T>(ap));
    y = block.template shared<T>(N::kRows * padded_stride<T>(64));
    centre = block.template shared<int>(N::kRows);
    j = block.template shared<int>(N::kRows);
    k = block.template shared<int>(N::kRows);
    q = block.template shared<int>(N::kRows);
  }

  /// Rows first..first+rows-1 of the angles of a run.
  template <class Block>
  MOECALC_KERNEL void read(Block& block, const Layer<T>& x, const Run& run, int first, int rows) const {
    constexpr int V = 16 / sizeof(T);
    block.sync();
    block.each([&](int t) {
      if (t >= rows) return;
      const int i = centre_of(x.g.first_angle, run.begin, run.end, first + t);
      const int local = first + t - x.g.first_angle[i], m = x.g.n_close[i];
      centre[t] = i, q[t] = local;
      j[t] = x.g.first_close[i] + local / m, k[t] = x.g.first_close[i] + local % m;
    });
    stage<N>(block, a, padded_stride<T>(x.ap), rows, x.ap, [&](int r, int c) {
      const int64_t row = first + r;
      if (!x.first) return load<T, V>(x.a + row * x.ap + c);
      Vec<T, V> value = load<T, V>(x.angle_row + c);
      MOECALC_UNROLL
      for (int v = 0; v < V; ++v) value.x[v] *= x.cos[row];
      return value;
    });
    block.sync();
  }

  /// acc = P_j + Q_k of the columns from `column` on.
  template <class X>
  MOECALC_KERNEL void start(int t, const Layer<T>& x, T* acc, int column, int rows, int width) const {
    for_own<X>(t, rows, width, [&](int g, int r, int c) {
      const int64_t stride = 2 * x.angle_columns;
      const Vec<T, X::kVector> p = load<T, X::kVector>(x.pq + j[r] * stride + column + c);
      const Vec<T, X::kVector> s = load<T, X::kVector>(x.pq + k[r] * stride + x.angle_columns + column + c);
      MOECALC_UNROLL
      for (int v = 0; v < X::kVector; ++v) acc[g * X::kVector + v] = p.x[v] + s.x[v];
    });
  }
};

/// Close edges of a run: P = e Wj + (v Wc + b)_i and Q = e Wk, for the angles of the same block.
template <class N, class Block>
MOECALC_KERNEL void project_close(Block& block, const Layer<typename N::type>& x, const Run& run,
                                  const AngleRows<N>& s) {
  using T = typename N::type;
  const ops::GroupWeights<T>& w = x.weights[run.group];
  const int end = x.g.first_close[run.end], ca = x.angle_columns;
  for (int first = x.g.first_close[run.begin]; first < end; first += N::kRows) {
    const int rows = end - first < N::kRows ? end - first : N::kRows;
    block.sync();
    block.each([&](int t) {
      if (t >= rows) return;
      const int i = centre_of(x.g.first_close, run.begin, run.end, first + t);
      s.centre[t] = i;
      s.j[t] = x.g.first_edge[i] + first + t - x.g.first_close[i];
    });
    for (int side = 0; side < 2; ++side) {
      chunks(ca, [&](auto chunk, int column) {
        constexpr int C = decltype(chunk)::value;
        using X = Tile<N, C>;
        auto acc = block.template registers<T, X::kSize>();
        block.sync();
        block.each([&](int t) {
          MOECALC_UNROLL
          for (int y = 0; y < X::kSize; ++y) acc[t][y] = T(0);
          if (side == 1) return;
          for_own<X>(t, rows, ca - column, [&](int g, int r, int c) {
            const T* from = x.zca + s.centre[r] * static_cast<int64_t>(ca) + column + c;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) acc[t][g * X::kVector + v] = from[v];
          });
        });
        multiply_sliced<N, C>(block, acc, s.y, rows, x.ep, X::from(side == 0 ? w.angle_j : w.angle_k, column),
                              ca, ca - column, [&](int r, int c) {
                                return load<T, 16 / sizeof(T)>(x.e + s.j[r] * static_cast<int64_t>(x.ep) + c);
                              });
        block.each([&](int t) {
          for_own<X>(t, rows, ca - column, [&](int g, int r, int c) {
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) value.x[v] = acc[t][g * X::kVector + v];
            store<T, X::kVector>(x.pq + (2 * static_cast<int64_t>(first + r) + side) * ca + column + c,
                                 value);
          });
        });
      });
    }
  }
  block.sync();
}

/// Row of m of a close edge.
template <class T>
MOECALC_KERNEL int64_t message_row(const Layer<T>& x, int centre, int close) {
  return x.keep_far ? x.g.first_edge[centre] + close - x.g.first_close[centre] : close;
}

/// Messages of the angles to their first edges, and the angles' own update.
template <class N>
struct AngleForward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const { return AngleRows<N>::bytes(x.ap); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = runs[block.index()];
    const ops::GroupWeights<T>& w = x.weights[run.group];
    const AngleRows<N> s(block, x.ap);
    const int ca = x.angle_columns;
    project_close<N>(block, x, run, s);
    const int end = x.g.first_angle[run.end];
    for (int first = x.g.first_angle[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read(block, x, run, first, rows);
      chunks(x.ep, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ep - column;
        block.each([&](int t) {
          T mix[X::kSize] = {};
          for (int y = 0; y < x.k_angle1; ++y) {
            mixture<X>(t, s, w, w.p_angle1[y], y * x.ep + column, rows, width, mix);
          }
          for_own<X>(t, rows, width, [&](int g, int r, int c) {
            const T factor = x.asw[first + r];
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) value.x[v] = factor * mix[g * X::kVector + v];
            store<T, X::kVector>(s.y + r * padded_stride<T>(64) + c, value);
          });
        });
        block.sync();
        const int columns = width < X::kColumns ? width : X::kColumns;
        segment_sums<N>(block, s.y, padded_stride<T>(64), rows, columns, s.j, [&](int r, int c, auto sum) {
          constexpr int V = 16 / sizeof(T);
          for (int v = 0; v < V; ++v) sum.x[v] *= x.angle_norm;
          put<T, V>(x.m + message_row(x, s.centre[r], s.j[r]) * x.ep + column + c,
                    s.q[r] % x.g.n_close[s.centre[r]] == 0, sum);
        });
        block.sync();
      });
      if (!x.live_angle) continue;
      chunks(x.ap, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ap - column;
        block.each([&](int t) {
          T mix[X::kSize] = {};
          for (int y = 0; y < x.k_angle; ++y) {
            mixture<X>(t, s, w, w.p_angle[y], x.angle1 + y * x.ap + column, rows, width, mix);
          }
          for_own<X>(t, rows, width, [&](int g, int r, int c) {
            const Vec<T, X::kVector> old = load<T, X::kVector>(s.a + r * padded_stride<T>(x.ap) + column + c),
                                     factor = load<T, X::kVector>(x.update.a + column + c);
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) {
              value.x[v] = x.keep_a * old.x[v] + factor.x[v] * mix[g * X::kVector + v];
            }
            store<T, X::kVector>(x.a_out + (first + r) * static_cast<int64_t>(x.ap) + column + c, value);
          });
        });
      });
      (void)ca;
    }
  }

  /// mix += p phi(z) of one expert, whose columns start at `column`.
  template <class X>
  MOECALC_KERNEL void mixture(int t, const AngleRows<N>& s, const ops::GroupWeights<T>& w, T p, int column,
                              int rows, int width, T* mix) const {
    T acc[X::kSize] = {};
    s.template start<X>(t, x, acc, column, rows, width);
    X::multiply(t, acc, s.a, padded_stride<T>(x.ap), x.ap, X::from(w.angle_a, column), x.angle_columns,
                width);
    MOECALC_UNROLL
    for (int v = 0; v < X::kSize; ++v) mix[v] += p * x.phi(acc[v]).y;
  }
};

/// Gradients of the angle maps: da (or dcos in the first layer), dasw, and through P and Q of de and dzca.
template <class N>
struct AngleBackward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const {
    return AngleRows<N>::bytes(x.ap) + shared_size<T>(N::kRows * padded_stride<T>(x.ap)) + Dots<N>::bytes();
  }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    constexpr int stride = padded_stride<T>(64);
    const Run run = runs[block.index()];
    const ops::GroupWeights<T>& w = x.weights[run.group];
    const AngleRows<N> s(block, x.ap);
    const int a_stride = padded_stride<T>(x.ap);
    T* out = block.template shared<T>(N::kRows * a_stride);
    const Dots<N> dots{block.template shared<T>(N::kRows * Dots<N>::kStride)};
    project_close<N>(block, x, run, s);
    const int end = x.g.first_angle[run.end];
    for (int first = x.g.first_angle[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read(block, x, run, first, rows);
      dots.clear(block);
      stage<N>(block, out, a_stride, rows, x.ap, [&](int r, int c) {
        constexpr int V = 16 / sizeof(T);
        Vec<T, V> value = {};
        if (!x.live_angle) return value;
        value = load<T, V>(x.da + (first + r) * static_cast<int64_t>(x.ap) + c);
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) value.x[v] *= x.keep_a;
        return value;
      });
      block.sync();
      chunks(x.ep, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ep - column, columns = width < X::kColumns ? width : X::kColumns;
        for (int y = 0; y < x.k_angle1; ++y) {
          const int at = y * x.ep + column;
          const T p = w.p_angle1[y];
          block.each([&](int t) {
            T acc[X::kSize] = {};
            s.template start<X>(t, x, acc, at, rows, width);
            X::multiply(t, acc, s.a, a_stride, x.ap, X::from(w.angle_a, at), x.angle_columns, width);
            for_own<X>(t, rows, width, [&](int g, int r, int c) {
              const Vec<T, X::kVector> dm =
                  load<T, X::kVector>(x.dm + message_row(x, s.centre[r], s.j[r]) * x.ep + column + c);
              const T factor = x.asw[first + r];
              Vec<T, X::kVector> dz;
              T dot = 0;
              MOECALC_UNROLL
              for (int v = 0; v < X::kVector; ++v) {
                const Slope<T> value = x.phi(acc[g * X::kVector + v]);
                const T gradient = p * x.angle_norm * dm.x[v];
                dot += gradient * value.y;
                dz.x[v] = gradient * factor * value.slope;
              }
              dots.template add<X>(t, r, dot);
              store<T, X::kVector>(s.y + r * stride + c, dz);
            });
          });
          spread(block, w, s, out, at, rows, columns);
        }
      });
      if (x.live_angle) {
        chunks(x.ap, [&](auto chunk, int column) {
          using X = Tile<N, decltype(chunk)::value>;
          const int width = x.ap - column, columns = width < X::kColumns ? width : X::kColumns;
          for (int y = 0; y < x.k_angle; ++y) {
            const int at = x.angle1 + y * x.ap + column;
            const T p = w.p_angle[y];
            block.each([&](int t) {
              T acc[X::kSize] = {};
              s.template start<X>(t, x, acc, at, rows, width);
              X::multiply(t, acc, s.a, a_stride, x.ap, X::from(w.angle_a, at), x.angle_columns, width);
              for_own<X>(t, rows, width, [&](int g, int r, int c) {
                const Vec<T, X::kVector> da = load<T, X::kVector>(
                                             x.da + (first + r) * static_cast<int64_t>(x.ap) + column + c),
                                         factor = load<T, X::kVector>(x.update.a + column + c);
                Vec<T, X::kVector> dz;
                MOECALC_UNROLL
                for (int v = 0; v < X::kVector; ++v) {
                  dz.x[v] = p * factor.x[v] * da.x[v] * x.phi(acc[g * X::kVector + v]).slope;
                }
                store<T, X::kVector>(s.y + r * stride + c, dz);
              });
            });
            spread(block, w, s, out, at, rows, columns);
          }
        });
      }
      block.each([&](int t) {
        if (t >= rows) return;
        const T value = dots.sum(t);
        x.dasw[first + t] = x.add_dasw ? x.dasw[first + t] + value : value;
        if (!x.first) return;
        T total = 0;
        for (int d = 0; d < x.ap; ++d) total += out[t * a_stride + d] * x.angle_row[d];
        x.dcos[first + t] = total;
      });
      if (!x.first) {
        block.each([&](int t) {
          constexpr int V = 16 / sizeof(T);
          const int per_row = x.ap / V;
          for (int at = t; at < rows * per_row; at += kThreads) {
            const int r = at / per_row, c = at % per_row * V;
            store<T, V>(x.da + (first + r) * static_cast<int64_t>(x.ap) + c,
                        load<T, V>(out + r * a_stride + c));
          }
        });
      }
    }
    block.sync();
    close_gradients(block, run, w, s);
  }

  /// dz of a chunk (in s.y, columns `at` of the angle maps) to da, dP and dQ.
  template <class Block>
  MOECALC_KERNEL void spread(Block& block, const ops::GroupWeights<T>& w, const AngleRows<N>& s, T* out,
                             int at, int rows, int columns) const {
    constexpr int V = 16 / sizeof(T), stride = padded_stride<T>(64);
    const int64_t ca = x.angle_columns;
    block.sync();
    add_product<N>(block, out, padded_stride<T>(x.ap), s.y, columns,
                   w.angle_a_t + static_cast<int64_t>(at) * x.ap, x.ap, rows);
    segment_sums<N>(block, s.y, stride, rows, columns, s.j, [&](int r, int c, const Vec<T, V>& sum) {
      put<T, V>(x.dpq + 2 * s.j[r] * ca + at + c, s.q[r] % x.g.n_close[s.centre[r]] == 0, sum);
    });
    strided_sums<N>(
        block, s.y, stride, rows, columns, s.centre, x.g.n_close, [&](int r, int c, const Vec<T, V>& sum) {
          put<T, V>(x.dpq + (2 * s.k[r] + 1) * ca + at + c, s.q[r] < x.g.n_close[s.centre[r]], sum);
        });
    block.sync();
  }

  /// de += dP Wj^T + dQ Wk^T for the close edges of the run; dzca = sum of dP over the edges of a centre.
  template <class Block>
  MOECALC_KERNEL void close_gradients(Block& block, const Run& run, const ops::GroupWeights<T>& w,
                                      const AngleRows<N>& s) const {
    constexpr int V = 16 / sizeof(T);
    const int64_t ca = x.angle_columns;
    block.each([&](int t) {
      const int vectors = x.angle_columns / V;
      for (int at = t; at < (run.end - run.begin) * vectors; at += kThreads) {
        const int64_t i = run.begin + at / vectors, c = at % vectors * V;
        Vec<T, V> total = {};
        for (int64_t j = x.g.first_close[i]; j < x.g.first_close[i + 1]; ++j) {
          const Vec<T, V> y = load<T, V>(x.dpq + 2 * j * ca + c);
          MOECALC_UNROLL
          for (int v = 0; v < V; ++v) total.x[v] += y.x[v];
        }
        store<T, V>(x.dzca + i * ca + c, total);
      }
    });
    const int end = x.g.first_close[run.end];
    for (int first = x.g.first_close[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      block.sync();
      block.each([&](int t) {
        if (t >= rows) return;
        const int i = centre_of(x.g.first_close, run.begin, run.end, first + t);
        s.j[t] = x.g.first_edge[i] + first + t - x.g.first_close[i];
      });
      chunks(x.ep, [&](auto chunk, int column) {
        constexpr int C = decltype(chunk)::value;
        using X = Tile<N, C>;
        auto acc = block.template registers<T, X::kSize>();
        block.each([&](int t) {
          MOECALC_UNROLL
          for (int y = 0; y < X::kSize; ++y) acc[t][y] = T(0);
        });
        for (int side = 0; side < 2; ++side) {
          multiply_sliced<N, C>(
              block, acc, s.y, rows, x.angle_columns, X::from(side == 0 ? w.angle_j_t : w.angle_k_t, column),
              x.ep, x.ep - column, [&](int r, int c) {
                return load<T, V>(x.dpq + (2 * static_cast<int64_t>(first + r) + side) * ca + c);
              });
        }
        block.each([&](int t) {
          for_own<X>(t, rows, x.ep - column, [&](int g, int r, int c) {
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) value.x[v] = acc[t][g * X::kVector + v];
            put<T, X::kVector>(x.de + s.j[r] * static_cast<int64_t>(x.ep) + column + c, false, value);
          });
        });
      });
    }
  }
};

// --- edges ---

/// Shared memory of the edge kernels.
template <class N>
struct EdgeRows {
  using T = typename N::type;
  T *e, *y;           // features of the rows; results of a chunk of columns
  int *centre, *row;  // of every row: centre, slot (or edge)

  static int64_t bytes(int ep) {
    return shared_size<T>(N::kRows * padded_stride<T>(ep)) + shared_size<T>(N::kRows * padded_stride<T>(64)) +
           2 * shared_size<int>(N::kRows);
  }
  template <class Block>
  MOECALC_KERNEL EdgeRows(Block& block, int ep) {
    e = block.template shared<T>(N::kRows * padded_stride<T>(ep));
    y = block.template shared<T>(N::kRows * padded_stride<T>(64));
    centre = block.template shared<int>(N::kRows);
    row = block.template shared<int>(N::kRows);
  }
  template <class Block>
  MOECALC_KERNEL void read(Block& block, const Layer<T>& x, const Run& run, int first, int rows) const {
    block.sync();
    block.each([&](int t) {
      if (t >= rows) return;
      centre[t] = centre_of(x.g.first_edge, run.begin, run.end, first + t);
      row[t] = x.g.slot(first + t);
    });
    stage<N>(block, e, padded_stride<T>(x.ep), rows, x.ep, [&](int r, int c) {
      return load<T, 16 / sizeof(T)>(x.e + (first + r) * static_cast<int64_t>(x.ep) + c);
    });
    block.sync();
  }
  /// Rows of m, and their edges in `row`.
  template <class Block>
  MOECALC_KERNEL void read_messages(Block& block, const Layer<T>& x, const Run& run, int first,
                                    int rows) const {
    block.sync();
    block.each([&](int t) {
      if (t >= rows) return;
      const int i = centre_of(x.message_first(), run.begin, run.end, first + t);
      centre[t] = i;
      row[t] = x.g.first_edge[i] + first + t - x.message_first()[i];
    });
    stage<N>(block, e, padded_stride<T>(x.ep), rows, x.ep, [&](int r, int c) {
      return load<T, 16 / sizeof(T)>(x.m + (first + r) * static_cast<int64_t>(x.ep) + c);
    });
    block.sync();
  }
  /// acc = (v_i Wc + b) + v_j Wn of the columns from `column` on.
  template <class X>
  MOECALC_KERNEL void start(int t, const Layer<T>& x, T* acc, int column, int rows, int width) const {
    for_own<X>(t, rows, width, [&](int g, int r, int c) {
      const int64_t ce = x.edge_columns;
      const Vec<T, X::kVector> p = load<T, X::kVector>(x.zc + centre[r] * ce + column + c);
      const Vec<T, X::kVector> s = load<T, X::kVector>(x.zn + row[r] * ce + column + c);
      MOECALC_UNROLL
      for (int v = 0; v < X::kVector; ++v) acc[g * X::kVector + v] = p.x[v] + s.x[v];
    });
  }
};

/// Zeros in rows begin..end-1.
template <class T, class Block>
MOECALC_KERNEL void clear_rows(Block& block, T* rows, int64_t begin, int64_t end, int64_t width) {
  block.each([&](int t) {
    for (int64_t at = begin * width + t; at < end * width; at += kThreads) rows[at] = T(0);
  });
}

/// Messages of the edges to their centres, and the edges' update, to which the angles' messages add.
template <class N>
struct EdgeForward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const { return EdgeRows<N>::bytes(x.ep); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = runs[block.index()];
    const ops::GroupWeights<T>& w = x.weights[run.group];
    const EdgeRows<N> s(block, x.ep);
    clear_rows(block, x.message, run.begin, run.end, x.width);
    const int end = x.g.first_edge[run.end];
    for (int first = x.g.first_edge[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read(block, x, run, first, rows);
      chunks(x.width, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.width - column, columns = width < X::kColumns ? width : X::kColumns;
        block.each([&](int t) {
          T mix[X::kSize] = {};
          for (int y = 0; y < x.k_message; ++y) {
            mixture<X>(t, s, w, w.p_message[y], y * x.width + column, rows, width, mix);
          }
          for_own<X>(t, rows, width, [&](int g, int r, int c) {
            const T factor = x.sw[first + r];
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) value.x[v] = factor * mix[g * X::kVector + v];
            store<T, X::kVector>(s.y + r * padded_stride<T>(64) + c, value);
          });
        });
        block.sync();
        segment_sums<N>(
            block, s.y, padded_stride<T>(64), rows, columns, s.centre, [&](int r, int c, auto sum) {
              constexpr int V = 16 / sizeof(T);
              for (int v = 0; v < V; ++v) sum.x[v] *= x.edge_norm;
              put<T, V>(x.message + s.centre[r] * static_cast<int64_t>(x.width) + column + c, false, sum);
            });
        block.sync();
      });
      if (!x.live_edge) continue;
      chunks(x.ep, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ep - column;
        block.each([&](int t) {
          T mix[X::kSize] = {};
          for (int y = 0; y < x.k_edge; ++y) {
            mixture<X>(t, s, w, w.p_edge[y], x.message_columns + y * x.ep + column, rows, width, mix);
          }
          for_own<X>(t, rows, width, [&](int g, int r, int c) {
            const int i = s.centre[r];
            const bool far = first + r - x.g.first_edge[i] >= x.g.n_close[i];
            Vec<T, X::kVector> value,
                old = load<T, X::kVector>(s.e + r * padded_stride<T>(x.ep) + column + c);
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) {
              value.x[v] = x.keep_e * old.x[v] + x.update.e[column + c + v] * mix[g * X::kVector + v];
              // an edge without angles gets the constant answer of the second map
              if (x.with_angles && !x.keep_far && far) {
                value.x[v] += x.update.e[x.ep + column + c + v] * w.angle2_far[column + c + v];
              }
            }
            const int64_t at = (first + r) * static_cast<int64_t>(x.ep) + column + c;
            store<T, X::kVector>(x.e_out + at, value);
            if (x.with_angles && x.keep_far && far) store<T, X::kVector>(x.m + at, old);
          });
        });
      });
    }
    if (x.with_angles) add_messages(block, run, w, s);
  }

  template <class X>
  MOECALC_KERNEL void mixture(int t, const EdgeRows<N>& s, const ops::GroupWeights<T>& w, T p, int column,
                              int rows, int width, T* mix) const {
    T acc[X::kSize] = {};
    s.template start<X>(t, x, acc, column, rows, width);
    X::multiply(t, acc, s.e, padded_stride<T>(x.ep), x.ep, X::from(w.edge_e, column), x.edge_columns, width);
    MOECALC_UNROLL
    for (int v = 0; v < X::kSize; ++v) mix[v] += p * x.phi(acc[v]).y;
  }

  /// e_out += residual * mixture of phi(m W2 + b2).
  template <class Block>
  MOECALC_KERNEL void add_messages(Block& block, const Run& run, const ops::GroupWeights<T>& w,
                                   const EdgeRows<N>& s) const {
    const int end = x.message_first()[run.end], columns = x.k_angle2 * x.ep;
    for (int first = x.message_first()[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read_messages(block, x, run, first, rows);
      chunks(x.ep, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ep - column;
        block.each([&](int t) {
          T mix[X::kSize] = {};
          for (int y = 0; y < x.k_angle2; ++y) {
            T acc[X::kSize] = {};
            const int at = y * x.ep + column;
            for_own<X>(t, rows, width, [&](int g, int, int c) {
              MOECALC_UNROLL
              for (int v = 0; v < X::kVector; ++v) acc[g * X::kVector + v] = w.angle2_b[at + c + v];
            });
            X::multiply(t, acc, s.e, padded_stride<T>(x.ep), x.ep, X::from(w.angle2, at), columns, width);
            MOECALC_UNROLL
            for (int v = 0; v < X::kSize; ++v) mix[v] += w.p_angle2[y] * x.phi(acc[v]).y;
          }
          for_own<X>(t, rows, width, [&](int g, int r, int c) {
            Vec<T, X::kVector> value;
            MOECALC_UNROLL
            for (int v = 0; v < X::kVector; ++v) {
              value.x[v] = x.update.e[x.ep + column + c + v] * mix[g * X::kVector + v];
            }
            put<T, X::kVector>(x.e_out + s.row[r] * static_cast<int64_t>(x.ep) + column + c, false, value);
          });
        });
      });
    }
  }
};

/// Gradient of the angles' messages: dm = dz2 W2^T with dz2 = p phi'(z2) residual de_out.
template <class N>
struct MessageBackward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const {
    return EdgeRows<N>::bytes(x.ep) + shared_size<T>(N::kRows * padded_stride<T>(x.ep));
  }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    constexpr int stride = padded_stride<T>(64), V = 16 / sizeof(T);
    const Run run = runs[block.index()];
    const ops::GroupWeights<T>& w = x.weights[run.group];
    const EdgeRows<N> s(block, x.ep);
    const int out_stride = padded_stride<T>(x.ep);
    T* out = block.template shared<T>(N::kRows * out_stride);
    const int end = x.message_first()[run.end];
    for (int first = x.message_first()[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read_messages(block, x, run, first, rows);
      stage<N>(block, out, out_stride, 0, x.ep, [&](int, int) { return Vec<T, V>{}; });
      chunks(x.ep, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.ep - column, columns = width < X::kColumns ? width : X::kColumns;
        for (int y = 0; y < x.k_angle2; ++y) {
          const int at = y * x.ep + column;
          const T p = w.p_angle2[y];
          block.each([&](int t) {
            T acc[X::kSize] = {};
            for_own<X>(t, rows, width, [&](int g, int, int c) {
              MOECALC_UNROLL
              for (int v = 0; v < X::kVector; ++v) acc[g * X::kVector + v] = w.angle2_b[at + c + v];
            });
            X::multiply(t, acc, s.e, padded_stride<T>(x.ep), x.ep, X::from(w.angle2, at), x.k_angle2 * x.ep,
                        width);
            for_own<X>(t, rows, width, [&](int g, int r, int c) {
              const Vec<T, X::kVector> de =
                  load<T, X::kVector>(x.de_out + s.row[r] * static_cast<int64_t>(x.ep) + column + c);
              Vec<T, X::kVector> dz;
              MOECALC_UNROLL
              for (int v = 0; v < X::kVector; ++v) {
                dz.x[v] =
                    p * x.update.e[x.ep + column + c + v] * de.x[v] * x.phi(acc[g * X::kVector + v]).slope;
              }
              store<T, X::kVector>(s.y + r * stride + c, dz);
            });
          });
          block.sync();
          add_product<N>(block, out, out_stride, s.y, columns, w.angle2_t + static_cast<int64_t>(at) * x.ep,
                         x.ep, rows);
          block.sync();
        }
      });
      block.each([&](int t) {
        const int per_row = x.ep / V;
        for (int at = t; at < rows * per_row; at += kThreads) {
          const int r = at / per_row, c = at % per_row * V;
          store<T, V>(x.dm + (first + r) * static_cast<int64_t>(x.ep) + c,
                      load<T, V>(out + r * out_stride + c));
        }
      });
    }
  }
};

/// Gradients of the edge maps and of the symmetrised features: de (without the angles' share), dz, dzc, dsw,
/// dh.
template <class N>
struct EdgeBackward {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;
  int64_t n_run = 0;
  int64_t blocks() const { return n_run; }
  int64_t shared_bytes() const {
    return EdgeRows<N>::bytes(x.ep) + shared_size<T>(N::kRows * padded_stride<T>(x.ep)) + Dots<N>::bytes();
  }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    constexpr int stride = padded_stride<T>(64), V = 16 / sizeof(T);
    const Run run = runs[block.index()];
    const ops::GroupWeights<T>& w = x.weights[run.group];
    const EdgeRows<N> s(block, x.ep);
    const int e_stride = padded_stride<T>(x.ep);
    T* out = block.template shared<T>(N::kRows * e_stride);
    const Dots<N> dots{block.template shared<T>(N::kRows * Dots<N>::kStride)};
    clear_rows(block, x.dzc, run.begin, run.end, x.edge_columns);
    const int end = x.g.first_edge[run.end];
    for (int first = x.g.first_edge[run.begin]; first < end; first += N::kRows) {
      const int rows = end - first < N::kRows ? end - first : N::kRows;
      s.read(block, x, run, first, rows);
      dots.clear(block);
      start_gradient(block, s, out, first, rows);
      symmetric_dots(block, s, first, rows);
      chunks(x.width, [&](auto chunk, int column) {
        using X = Tile<N, decltype(chunk)::value>;
        const int width = x.width - column, columns = width < X::kColumns ? width : X::kColumns;
        for (int y = 0; y < x.k_message; ++y) {
          const int at = y * x.width + column;
          const T p = w.p_message[y];
          block.each([&](int t) {
            T acc[X::kSize] = {};
            s.template start<X>(t, x, acc, at, rows, width);
            X::multiply(t, acc, s.e, e_stride, x.ep, X::from(w.edge_e, at), x.edge_columns, width);
            for_own<X>(t, rows, width, [&](int g, int r, int c) {
              const Vec<T, X::kVector> dm =
                  load<T, X::kVector>(x.dmessage + s.centre[r] * static_cast<int64_t>(x.width) + column + c);
              const T factor = x.sw[first + r];
              Vec<T, X::kVector> dz;
              T dot = 0;
              MOECALC_UNROLL
              for (int v = 0; v < X::kVector; ++v) {
                const Slope<T> value = x.phi(acc[g * X::kVector + v]);
                const T gradient = p * x.edge_norm * dm.x[v];
                dot += gradient * value.y;
                dz.x[v] = gradient * factor * value.slope;
              }
              dots.template add<X>(t, r, dot);
              store<T, X::kVector>(s.y + r * stride + c, dz);
            });
          });
          spread(block, w, s, out, at, first, rows, columns);
        }
      });
      if (x.live_edge) {
        chunks(x.ep, [&](auto chunk, int column) {
          using X = Tile<N, decltype(chunk)::value>;
          const int width = x.ep - column, columns = width < X::kColumns ? width : X::kColumns;
          for (int y = 0; y < x.k_edge; ++y) {
            const int at = x.message_columns + y * x.ep + column;
            const T p = w.p_edge[y];
            block.each([&](int t) {
              T acc[X::kSize] = {};
              s.template start<X>(t, x, acc, at, rows, width);
              X::multiply(t, acc, s.e, e_stride, x.ep, X::from(w.edge_e, at), x.edge_columns, width);
              for_own<X>(t, rows, width, [&](int g, int r, int c) {
                const Vec<T, X::kVector> de =
                    load<T, X::kVector>(x.de_out + (first + r) * static_cast<int64_t>(x.ep) + column + c);
                Vec<T, X::kVector> dz;
                MOECALC_UNROLL
                for (int v = 0; v < X::kVector; ++v) {
                  dz.x[v] = p * x.update.e[column + c + v] * de.x[v] * x.phi(acc[g * X::kVector + v]).slope;
                }
                store<T, X::kVector>(s.y + r * stride + c, dz);
              });
            });
            spread(block, w, s, out, at, first, rows, columns);
          }
        });
      }
      block.each([&](int t) {
        const int per_row = x.ep / V;
        for (int at = t; at < rows * per_row; at += kThreads) {
          const int r = at / per_row, c = at % per_row * V;
          store<T, V>(x.de + (first + r) * static_cast<int64_t>(x.ep) + c,
                      load<T, V>(out + r * e_stride + c));
        }
        if (t < rows) {
          const double value = double(dots.sum(t));
          x.dsw[first + t] = x.add_edge ? x.dsw[first + t] + value : value;
        }
      });
    }
  }

  /// out = keep de_out + sum_c h_c dH_c (edge part) (+ dm of a far edge that keeps its feature).
  template <class Block>
  MOECALC_KERNEL void start_gradient(Block& block, const EdgeRows<N>& s, T* out, int first, int rows) const {
    constexpr int V = 16 / sizeof(T);
    stage<N>(block, out, padded_stride<T>(x.ep), rows, x.ep, [&](int r, int c) {
      const int64_t edge = first + r, i = s.centre[r];
      const T* h = x.h + 4 * edge;
      const T* d = x.dbig_h + i * 3 * x.sym_width + c;
      Vec<T, V> value = {};
      if (x.live_edge) {
        value = load<T, V>(x.de_out + edge * x.ep + c);
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) value.x[v] *= x.keep_e;
      }
      MOECALC_UNROLL
      for (int v = 0; v < V; ++v) {
        value.x[v] += h[0] * d[v] + h[1] * d[x.sym_width + v] + h[2] * d[2 * x.sym_width + v];
      }
      if (x.with_angles && x.keep_far && edge - x.g.first_edge[i] >= x.g.n_close[i]) {
        const Vec<T, V> dm = load<T, V>(x.dm + edge * x.ep + c);
        MOECALC_UNROLL
        for (int v = 0; v < V; ++v) value.x[v] += dm.x[v];
      }
      return value;
    });
  }

  /// dh_c = dH_c . [e_ij, v_j]: 16 threads per row.
  template <class Block>
  MOECALC_KERNEL void symmetric_dots(Block& block, const EdgeRows<N>& s, int first, int rows) const {
    constexpr int stride = padded_stride<T>(64), V = 16 / sizeof(T), lanes = 16;
    block.each([&](int t) {
      const int lane = t % lanes;
      for (int r = t / lanes; r < rows; r += kThreads / lanes) {
        const T* d = x.dbig_h + s.centre[r] * 3 * static_cast<int64_t>(x.sym_width);
        const T* v_row = x.v + x.g.neighbor(first + r) * static_cast<int64_t>(x.np);
        T dot[3] = {};
        const auto add = [&](const Vec<T, V>& row, const T* gradient) {
          MOECALC_UNROLL
          for (int c = 0; c < 3; ++c) {
            const Vec<T, V> y = load<T, V>(gradient + c * x.sym_width);
            MOECALC_UNROLL
            for (int v = 0; v < V; ++v) dot[c] += row.x[v] * y.x[v];
          }
        };
        for (int c = lane * V; c < x.ep; c += lanes * V) {
          add(load<T, V>(s.e + r * padded_stride<T>(x.ep) + c), d + c);
        }
        for (int c = lane * V; c < x.np; c += lanes * V) add(load<T, V>(v_row + c), d + x.ep + c);
        for (int c = 0; c < 3; ++c) s.y[r * stride + 3 * lane + c] = dot[c];
      }
    });
    block.sync();
    block.each([&](int t) {
      for (int at = t; at < 3 * rows; at += kThreads) {
        const int r = at / 3, c = at % 3;
        T total = 0;
        for (int lane = 0; lane < lanes; ++lane) total += s.y[r * stride + 3 * lane + c];
        double* to = x.dh + 4 * static_cast<int64_t>(first + r) + c;
        *to = x.add_edge ? *to + double(total) : double(total);
      }
    });
    block.sync();
  }

  /// dz of a chunk (in s.y, columns `at` of the edge maps) to global memory, de and dzc.
  template <class Block>
  MOECALC_KERNEL void spread(Block& block, const ops::GroupWeights<T>& w, const EdgeRows<N>& s, T* out,
                             int at, int first, int rows, int columns) const {
    constexpr int V = 16 / sizeof(T), stride = padded_stride<T>(64);
    const int64_t ce = x.edge_columns;
    block.sync();
    block.each([&](int t) {
      const int per_row = columns / V;
      for (int y = t; y < rows * per_row; y += kThreads) {
        const int r = y / per_row, c = y % per_row * V;
        store<T, V>(x.dz + (first + r) * ce + at + c, load<T, V>(s.y + r * stride + c));
      }
    });
    add_product<N>(block, out, padded_stride<T>(x.ep), s.y, columns,
                   w.edge_e_t + static_cast<int64_t>(at) * x.ep, x.ep, rows);
    segment_sums<N>(block, s.y, stride, rows, columns, s.centre, [&](int r, int c, const Vec<T, V>& sum) {
      put<T, V>(x.dzc + s.centre[r] * ce + at + c, false, sum);
    });
    block.sync();
  }
};

// --- symmetrisation ---

/// H_i[c] = sum_j h_ij[c] [e_ij, v_j].
template <class T>
struct Symmetrize {
  static constexpr int kThreads = 64;
  static constexpr int kEdges = 64;  // whose neighbours and h are in shared memory at a time
  Layer<T> x;
  int64_t blocks() const { return x.g.n_local; }
  int64_t shared_bytes() const { return shared_size<int>(kEdges) + shared_size<T>(4 * kEdges); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    constexpr int V = 16 / sizeof(T);
    const int64_t i = block.index();
    const int begin = x.g.first_edge[i], end = x.g.first_edge[i + 1];
    int* neighbor = block.template shared<int>(kEdges);
    T* h = block.template shared<T>(4 * kEdges);
    for (int column = 0; column < x.sym_width; column += kThreads * V) {
      auto sums = block.template registers<Vec<T, V>, 3>();
      block.each([&](int t) {
        for (int q = 0; q < 3; ++q) sums[t][q] = Vec<T, V>{};
      });
      for (int first = begin; first < end; first += kEdges) {
        const int n = end - first < kEdges ? end - first : kEdges;
        block.sync();
        block.each([&](int t) {
          for (int y = t; y < n; y += kThreads) neighbor[y] = x.g.neighbor(first + y);
          for (int y = t; y < 4 * n; y += kThreads) h[y] = x.h[4 * static_cast<int64_t>(first) + y];
        });
        block.sync();
        block.each([&](int t) {
          const int c = column + t * V;
          if (c >= x.sym_width) return;
          MOECALC_UNROLL_4
          for (int y = 0; y < n; ++y) {
            const T* row = c < x.ep ? x.e + (first + y) * static_cast<int64_t>(x.ep) + c
                                    : x.v + neighbor[y] * static_cast<int64_t>(x.np) + c - x.ep;
            const Vec<T, V> value = load<T, V>(row);
            MOECALC_UNROLL
            for (int q = 0; q < 3; ++q) {
              MOECALC_UNROLL
              for (int v = 0; v < V; ++v) sums[t][q].x[v] += h[4 * y + q] * value.x[v];
            }
          }
        });
      }
      block.each([&](int t) {
        const int c = column + t * V;
        if (c >= x.sym_width) return;
        for (int q = 0; q < 3; ++q) store<T, V>(x.big_h + (3 * i + q) * x.sym_width + c, sums[t][q]);
      });
    }
  }
};

/// S_i = flatten((1/3) sum_c H[c, m] H[c, d]), edge block and neighbour block.
template <class T>
struct Invariants {
  static constexpr int kThreads = 128;
  Layer<T> x;
  int64_t blocks() const { return x.g.n_local; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index();
    const T* h = x.big_h + i * 3 * x.sym_width;
    block.each([&](int t) {
      for (int at = t; at < x.sym_in; at += kThreads) {
        const bool edge = at < x.axis * x.ep;
        const int columns = edge ? x.ep : x.np, offset = edge ? 0 : x.ep;
        const int local = edge ? at : at - x.axis * x.ep;
        const int m = offset + local / columns, d = offset + local % columns;
        T total = 0;
        for (int c = 0; c < 3; ++c) total += h[c * x.sym_width + m] / T(3) * h[c * x.sym_width + d];
        x.sym[i * x.sym_in + at] = total;
      }
    });
  }
};

template <class T>
struct InvariantsBackward {
  static constexpr int kThreads = 128;
  Layer<T> x;
  int64_t blocks() const { return x.g.n_local; }
  int64_t shared_bytes() const { return shared_size<T>(3 * x.sym_width); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t i = block.index();
    const T *h = x.big_h + i * 3 * x.sym_width, *ds = x.dsym + i * x.sym_in;
    T* dh = block.template shared<T>(3 * x.sym_width);
    block.each([&](int t) {
      for (int at = t; at < 3 * x.sym_width; at += kThreads) {
        const int c = at / x.sym_width, d = at % x.sym_width;
        const bool edge = d < x.ep;
        const int columns = edge ? x.ep : x.np, offset = edge ? 0 : x.ep;
        const T* gradient = ds + (edge ? 0 : x.axis * x.ep) + d - offset;
        T total = 0;
        for (int m = 0; m < x.axis; ++m)
          total += h[c * x.sym_width + offset + m] / T(3) * gradient[m * columns];
        dh[at] = total;
      }
    });
    block.sync();
    block.each([&](int t) {  // H[c, m] is also the left factor
      for (int at = t; at < 6 * x.axis; at += kThreads) {
        const int part = at / (3 * x.axis), c = at / x.axis % 3, m = at % x.axis;
        const int columns = part == 0 ? x.ep : x.np, offset = part == 0 ? 0 : x.ep;
        const T* gradient = ds + (part == 0 ? 0 : x.axis * x.ep) + m * columns;
        T dot = 0;
        for (int d = 0; d < columns; ++d) dot += gradient[d] * h[c * x.sym_width + offset + d];
        dh[c * x.sym_width + offset + m] += dot / T(3);
      }
    });
    block.sync();
    block.each([&](int t) {
      for (int at = t; at < 3 * x.sym_width; at += kThreads) x.dbig_h[i * 3 * x.sym_width + at] = dh[at];
    });
  }
};

// --- nodes ---

/// The two maps of a node, forward (update of v) or backward (dz of both maps); one block per run and 64
/// columns.
template <class N, bool backward>
struct Nodes {
  using T = typename N::type;
  static constexpr int kThreads = cuda::kThreads;
  Layer<T> x;
  const Run* runs = nullptr;  // of at most kRows rows
  int64_t n_run = 0;
  int64_t blocks() const { return n_run * ((x.np + 63) / 64); }
  int64_t shared_bytes() const { return shared_size<T>(N::kRows * padded_stride<T>(kSlice)); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    using X = Tile<N, 64>;
    const int across = (x.np + 63) / 64;
    const Run run = runs[block.index() / across];
    const int column = static_cast<int>(block.index() % across) * 64, rows = run.end - run.begin;
    const ops::GroupWeights<T>& w = x.weights[run.group];
    T* slice = block.template shared<T>(N::kRows * padded_stride<T>(kSlice));
    auto total = block.template registers<T, X::kSize>();
    block.each([&](int t) {
      MOECALC_UNROLL
      for (int y = 0; y < X::kSize; ++y) total[t][y] = T(0);
      for_own<X>(t, rows, x.np - column, [&](int g, int r, int c) {
        const int64_t i = run.begin + r;
        for (int v = 0; v < X::kVector; ++v) {
          const int d = column + c + v;
          if (backward) {
            const T gradient = x.dv_out[i * x.np + d];
            for (int head = 0; head < x.heads; ++head) {
              x.dmessage[i * x.width + head * x.np + d] = x.update.n[(2 + head) * x.np + d] * gradient;
            }
            x.dv_own[i * x.np + d] = x.keep_n * gradient;
          } else {
            T sum = x.keep_n * x.v[i * x.np + d];
            for (int head = 0; head < x.heads; ++head) {
              sum += x.update.n[(2 + head) * x.np + d] * x.message[i * x.width + head * x.np + d];
            }
            total[t][g * X::kVector + v] = sum;
          }
        }
      });
    });
    map(block, run, total, slice, x.v, x.np, w.node, w.node_b, w.p_node, x.k_node, 0, 0, column);
    map(block, run, total, slice, x.sym, x.sym_in, w.sym, w.sym_b, w.p_sym, x.k_sym, 1, x.k_node * x.np,
        column);
    if (backward) return;
    block.each([&](int t) {
      for_own<X>(t, rows, x.np - column, [&](int g, int r, int c) {
        for (int v = 0; v < X::kVector; ++v) {
          x.v_out[(run.begin + r) * static_cast<int64_t>(x.np) + column + c + v] =
              total[t][g * X::kVector + v];
        }
      });
    });
  }

  /// One map: its experts' phi(in W + b), weighted, to `total`; or their dz to dz_node at `place`.
  template <class Block, class R>
  MOECALC_KERNEL void map(Block& block, const Run& run, R& total, T* slice, const T* in, int k, const T* w,
                          const T* b, const T* p, int experts, int update, int place, int column) const {
    using X = Tile<N, 64>;
    const int rows = run.end - run.begin, width = x.np - column;
    const int64_t all = (x.k_node + x.k_sym) * x.np;
    auto acc = block.template registers<T, X::kSize>();
    for (int y = 0; y < experts; ++y) {
      const int at = y * x.np + column;
      block.each([&](int t) {
        MOECALC_UNROLL
        for (int z = 0; z < X::kSize; ++z) acc[t][z] = T(0);
        for_own<X>(t, rows, width, [&](int g, int, int c) {
          MOECALC_UNROLL
          for (int v = 0; v < X::kVector; ++v) acc[t][g * X::kVector + v] = b[at + c + v];
        });
      });
      multiply_sliced<N, 64>(
          block, acc, slice, rows, k, X::from(w, at), experts * x.np, width, [&](int r, int c) {
            return load<T, 16 / sizeof(T)>(in + (run.begin + r) * static_cast<int64_t>(k) + c);
          });
      block.each([&](int t) {
        for_own<X>(t, rows, width, [&](int g, int r, int c) {
          MOECALC_UNROLL
          for (int v = 0; v < X::kVector; ++v) {
            const int64_t i = run.begin + r;
            const int d = column + c + v;
            const T factor = p[y] * x.update.n[update * x.np + d];
            const Slope<T> value = x.phi(acc[t][g * X::kVector + v]);
            if (backward) {
              x.dz_node[i * all + place + at + c + v] = factor * value.slope * x.dv_out[i * x.np + d];
            } else {
              total[t][g * X::kVector + v] += factor * value.y;
            }
          }
        });
      });
    }
  }
};

// --- gradients of node features through the neighbours ---

/// Sums over the edges of a slot: dzn = sum dz, dv_slot = sum_c h_c dH_c (neighbour part).
template <class T>
struct SlotSums {
  static constexpr int kThreads = 128;
  static constexpr int kEdges = 128;  // whose numbers are in shared memory at a time
  Layer<T> x;
  int64_t blocks() const { return x.g.n_slot; }
  int64_t shared_bytes() const { return 2 * shared_size<int>(kEdges) + shared_size<T>(4 * kEdges); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    constexpr int V = 16 / sizeof(T);
    const int64_t slot = block.index(), ce = x.edge_columns;
    const int begin = x.g.slot_first[slot], end = x.g.slot_first[slot + 1];
    int* edge = block.template shared<int>(kEdges);
    int* centre = block.template shared<int>(kEdges);
    T* h = block.template shared<T>(4 * kEdges);
    for (int column = 0; column < x.edge_columns + x.np; column += kThreads * V) {
      auto sums = block.template registers<Vec<T, V>, 1>();
      block.each([&](int t) { sums[t][0] = Vec<T, V>{}; });
      for (int first = begin; first < end; first += kEdges) {
        const int n = end - first < kEdges ? end - first : kEdges;
        block.sync();
        block.each([&](int t) {
          if (t >= n) return;
          const int e = x.g.edge_of_list[x.g.slot_list[first + t]];
          // beyond the cutoff: edge 0 with weight 0, so that the loads below need no branch
          edge[t] = e < 0 ? 0 : e;
          centre[t] = e < 0 ? 0 : x.g.edge_centre[e];
          for (int q = 0; q < 3; ++q) h[4 * t + q] = e < 0 ? T(0) : x.h[4 * static_cast<int64_t>(e) + q];
          h[4 * t + 3] = e < 0 ? T(0) : T(1);
        });
        block.sync();
        if (x.g.first_edge[x.g.n_local] == 0) continue;
        block.each([&](int t) {
          const int c = column + t * V;
          if (c < x.edge_columns) {
            MOECALC_UNROLL_4
            for (int y = 0; y < n; ++y) {
              const Vec<T, V> value = load<T, V>(x.dz + edge[y] * ce + c);
              MOECALC_UNROLL
              for (int v = 0; v < V; ++v) sums[t][0].x[v] += h[4 * y + 3] == T(0) ? T(0) : value.x[v];
            }
          } else if (c < x.edge_columns + x.np) {
            MOECALC_UNROLL_4
            for (int y = 0; y < n; ++y) {
              const T* d = x.dbig_h + centre[y] * 3 * static_cast<int64_t>(x.sym_width) + x.ep + c - ce;
              MOECALC_UNROLL
              for (int q = 0; q < 3; ++q) {
                const Vec<T, V> value = load<T, V>(d + q * x.sym_width);
                MOECALC_UNROLL
                for (int v = 0; v < V; ++v) sums[t][0].x[v] += h[4 * y + q] * value.x[v];
              }
            }
          }
        });
      }
      block.each([&](int t) {
        const int c = column + t * V;
        if (c < x.edge_columns) {
          store<T, V>(x.dzn + slot * ce + c, sums[t][0]);
        } else if (c < x.edge_columns + x.np) {
          store<T, V>(x.dv_slot + slot * x.np + c - ce, sums[t][0]);
        }
      });
    }
  }
};

/// dv = own share (local atoms) + those of the node's slots, in order.
template <class T>
struct GatherSlots {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 4;
  Layer<T> x;
  int64_t blocks() const { return (x.g.n_node + kRows - 1) / kRows; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int t) {
      for (int at = t; at < kRows * x.np; at += kThreads) {
        const int64_t i = block.index() * kRows + at / x.np, d = at % x.np;
        if (i >= x.g.n_node) continue;
        T total = i < x.g.n_local ? x.dv_own[i * x.np + d] : T(0);
        for (int s = x.g.node_first[i]; s < x.g.node_first[i + 1]; ++s) {
          total += x.dv_slot[x.g.node_slot[s] * static_cast<int64_t>(x.np) + d];
        }
        x.dv[i * x.np + d] = total;
      }
    });
  }
};

}  // namespace moecalc::cuda
