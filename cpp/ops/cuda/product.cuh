// Products of a tile of rows with a weight block, and what the kernels do with their results.
//
// A tile is kRows rows (edges, angles, nodes) by 64 or 32 columns, spread over the 128 threads of a block.
// The rows' features lie in shared memory; weights are read through the first-level cache, where the blocks
// of one routing group find what their neighbours on the multiprocessor have read. Accumulators are
// registers; Tile says which thread holds which element, so that everything around the product is the same
// for FMA and tensor-core products.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../layer.h"
#include "block.cuh"

namespace moecalc::cuda {

constexpr int kThreads = 128;  // of a block that multiplies

/// `N` of vector width for one 16-byte access.
template <class T, int V>
struct alignas(V * sizeof(T)) Vec {
  T x[V];
};

template <class T, int V>
MOECALC_KERNEL Vec<T, V> load(const T* p) {
  return *reinterpret_cast<const Vec<T, V>*>(p);
}
template <class T, int V>
MOECALC_KERNEL void store(T* p, const Vec<T, V>& v) {
  *reinterpret_cast<Vec<T, V>*>(p) = v;
}

/// Reads of weights, which no kernel writes: they may stay in the read-only cache and overtake stores.
template <class V, class T>
MOECALC_KERNEL V load_weight(const T* p) {
#if defined(__CUDACC__)
  using Word = std::conditional_t<sizeof(V) == 16, uint4, uint2>;
  const Word word = __ldg(reinterpret_cast<const Word*>(p));
  return *reinterpret_cast<const V*>(&word);
#else
  return *reinterpret_cast<const V*>(p);
#endif
}

// --- numbers: dtype of the network and how its products are rounded ---

struct Float64 {
  using type = double;
  static constexpr int kRows = 32;
  static constexpr const char* name = "float64";
};
struct Float32 {
  using type = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "fp32";
};
struct Tf32 {
  using type = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "tf32";
};
struct Bf16x3 {
  using type = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "bf16x3";
};

MOECALC_BOTH uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
MOECALC_BOTH float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

/// Nearest tf32 (10 bits of mantissa), ties away from zero: cvt.rna.tf32.f32.
MOECALC_BOTH float to_tf32(float x) { return float_of((bits_of(x) + 0x1000u) & 0xffffe000u); }

/// Nearest bf16, ties to even: cvt.rn.bf16.f32. Not for NaN, which stays what it is in the exact remainder.
MOECALC_BOTH float to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

/// Where element (k, n) of a matrix of `columns` columns starts in the layout of the tensor-core products:
/// blocks of 8 x 8, in which the two words that a thread of a warp reads lie side by side. tf32: words k and
/// k + 4; bf16x3: the leading and the remaining bf16 of a pair of rows. Offsets by whole rows of blocks are
/// those of a plain matrix.
MOECALC_BOTH int64_t fragment_word(int64_t k, int64_t n, int64_t columns, int64_t lane_row) {
  return k / 8 * 8 * columns + n / 8 * 64 + (n % 8 * 4 + lane_row) * 2;
}

/// A weight matrix (rows, columns) as the products of N read it.
template <class N>
std::vector<typename N::type> fragments(const typename N::type* w, int64_t rows, int64_t columns) {
  using T = typename N::type;
  if constexpr (!std::is_same_v<N, Tf32> && !std::is_same_v<N, Bf16x3>) {
    return std::vector<T>(w, w + rows * columns);
  } else {
    std::vector<float> out(static_cast<size_t>(rows * columns));
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t n = 0; n < columns; ++n) {
        const float x = w[k * columns + n];
        if constexpr (std::is_same_v<N, Tf32>) {
          out[static_cast<size_t>(fragment_word(k, n, columns, k % 4) + k % 8 / 4)] = to_tf32(x);
        } else {
          const float high = to_bf16(x), low = to_bf16(x - high);
          auto* words = reinterpret_cast<uint16_t*>(out.data() + fragment_word(k, n, columns, k % 8 / 2));
          words[k % 2] = static_cast<uint16_t>(bits_of(high) >> 16);
          words[2 + k % 2] = static_cast<uint16_t>(bits_of(low) >> 16);
        }
      }
    }
    return out;
  }
}

// --- tiles ---

/// Which elements of a kRows x COLUMNS tile a thread holds: kGroups vectors of kVector columns. FMA products.
template <class N, int COLUMNS>
struct FmaTile {
  using T = typename N::type;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kLanes = COLUMNS / kVector;           // threads side by side
  static constexpr int kStride = kThreads / kLanes;          // rows between two groups of a thread
  static constexpr int kGroups = N::kRows / kStride;         // = rows of a thread
  static constexpr int kSize = kGroups * kVector;            // accumulators of a thread
  static constexpr int kOwnRows = kGroups, kSlots = kLanes;  // rows of a thread, threads that share a row
  static MOECALC_KERNEL int row(int thread, int group) { return group * kStride + thread / kLanes; }
  static MOECALC_KERNEL int column(int thread, int) { return thread % kLanes * kVector; }
  static MOECALC_KERNEL int own_row(int group) { return group; }
  static MOECALC_KERNEL int slot(int thread) { return thread % kLanes; }
  /// The weights from column c on.
  static MOECALC_KERNEL const T* from(const T* w, int64_t c) { return w + c; }

  /// acc += A W: `a` (kRows x k) in shared memory with row stride lda, `w` (k x ...) with row stride ldw,
  /// first of the tile's columns; columns >= width are left alone. k, width: whole vectors.
  static MOECALC_KERNEL void multiply(int thread, T* acc, const T* a, int lda, int k, const T* w, int64_t ldw,
                                      int width) {
    const int c = column(thread, 0);
    if (c >= width) return;
    a += row(thread, 0) * lda;
    w += c;
    for (int x = 0; x < k; x += kVector) {
      Vec<T, kVector> weight[kVector];
      MOECALC_UNROLL
      for (int y = 0; y < kVector; ++y) weight[y] = load_weight<Vec<T, kVector>>(w + (x + y) * ldw);
      MOECALC_UNROLL
      for (int g = 0; g < kGroups; ++g) {
        const Vec<T, kVector> factor = load<T, kVector>(a + g * kStride * lda + x);
        MOECALC_UNROLL
        for (int y = 0; y < kVector; ++y) {
          MOECALC_UNROLL
          for (int v = 0; v < kVector; ++v) acc[g * kVector + v] += factor.x[y] * weight[y].x[v];
        }
      }
    }
  }
};

/// The same for mma.sync m16n8: four warps, each half of the rows by half of the columns.
template <class N, int COLUMNS>
struct MmaTile {
  using T = float;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kVector = 2;
  static constexpr int kAcross = COLUMNS / 16;  // products of 8 columns in a warp's half
  static constexpr int kGroups = 4 * kAcross;
  static constexpr int kSize = kGroups * kVector;
  static constexpr int kOwnRows = 4, kSlots = 8;
  static MOECALC_KERNEL int row(int thread, int group) {
    const int warp = thread / 32, lane = thread % 32, r = group / kAcross;
    return warp / 2 * 32 + r / 2 * 16 + r % 2 * 8 + lane / 4;
  }
  static MOECALC_KERNEL int column(int thread, int group) {
    return thread / 32 % 2 * (COLUMNS / 2) + group % kAcross * 8 + thread % 4 * 2;
  }
  static MOECALC_KERNEL int own_row(int group) { return group / kAcross; }
  static MOECALC_KERNEL int slot(int thread) { return thread / 32 % 2 * 4 + thread % 4; }
  static MOECALC_KERNEL const T* from(const T* w, int64_t c) { return w + 8 * c; }

#if defined(__CUDACC__)
  static __device__ __forceinline__ uint32_t tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
  }
  /// Two bf16 in one register: the lower half is the first element.
  static __device__ __forceinline__ uint32_t pack(float first, float second) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
    return y;
  }
  static __device__ __forceinline__ void split(float first, float second, uint32_t& high, uint32_t& low) {
    high = pack(first, second);
    low = pack(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u));
  }
  static __device__ __forceinline__ void mma_tf32(float* c, const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ void mma_bf16(float* c, const uint32_t (&a)[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }

  static __device__ __forceinline__ void multiply(int thread, float* acc, const float* a, int lda, int k,
                                                  const float* w, int64_t ldw, int width) {
    const int warp = thread / 32, lane = thread % 32, quad = lane % 4;
    const float* a_row = a + (warp / 2 * 32 + lane / 4) * lda;
    const int column0 = warp % 2 * (COLUMNS / 2);
    w += column0 * 8 + lane * 2;
    for (int x = 0; x < k; x += 8) {
      uint2 b[kAcross];
      MOECALC_UNROLL
      for (int n = 0; n < kAcross; ++n) {
        b[n] = column0 + n * 8 < width ? load_weight<uint2>(w + x * ldw + n * 64) : make_uint2(0u, 0u);
      }
      // accumulators: group (2 * m + half) * kAcross + n, elements c0 c1 (half 0), c2 c3 (half 1)
      if constexpr (std::is_same_v<N, Tf32>) {
        uint32_t fa[2][4];
        MOECALC_UNROLL
        for (int m = 0; m < 2; ++m) {
          const float* p = a_row + m * 16 * lda + x + quad;
          fa[m][0] = tf32(p[0]), fa[m][1] = tf32(p[8 * lda]);
          fa[m][2] = tf32(p[4]), fa[m][3] = tf32(p[8 * lda + 4]);
        }
        MOECALC_UNROLL
        for (int n = 0; n < kAcross; ++n) {
          MOECALC_UNROLL
          for (int m = 0; m < 2; ++m)
            product(acc, m, n, [&](float* t) { mma_tf32(t, fa[m], b[n].x, b[n].y); });
        }
      } else {
        uint32_t high[2][2], low[2][2];
        MOECALC_UNROLL
        for (int m = 0; m < 2; ++m) {
          const float* p = a_row + m * 16 * lda + x + 2 * quad;
          split(p[0], p[1], high[m][0], low[m][0]);
          split(p[8 * lda], p[8 * lda + 1], high[m][1], low[m][1]);
        }
        MOECALC_UNROLL
        for (int n = 0; n < kAcross; ++n) {
          MOECALC_UNROLL
          for (int m = 0; m < 2; ++m) {
            product(acc, m, n, [&](float* t) {
              mma_bf16(t, high[m], b[n].y);  // small terms first
              mma_bf16(t, low[m], b[n].x);
              mma_bf16(t, high[m], b[n].x);
            });
          }
        }
      }
    }
  }

 private:
  /// The four accumulators of product (m, n), gathered from their groups and put back.
  template <class F>
  static __device__ __forceinline__ void product(float* acc, int m, int n, const F& f) {
    float* upper = acc + (2 * m * kAcross + n) * 2;
    float* lower = acc + ((2 * m + 1) * kAcross + n) * 2;
    float t[4] = {upper[0], upper[1], lower[0], lower[1]};
    f(t);
    upper[0] = t[0], upper[1] = t[1], lower[0] = t[2], lower[1] = t[3];
  }
#else
  /// The emulation: the same elements and the same rounding of factors, sums in float32.
  static void multiply(int thread, float* acc, const float* a, int lda, int k, const float* w, int64_t ldw,
                       int width) {
    for (int g = 0; g < kGroups; ++g) {
      const int c = column(thread, g);
      if (c >= width) continue;
      const float* a_row = a + row(thread, g) * lda;
      for (int x = 0; x < k; ++x) {
        for (int v = 0; v < kVector; ++v) {
          acc[g * kVector + v] += product(a_row[x], w, x, c + v, ldw);
        }
      }
    }
  }

 private:
  /// a times element (k, n) of the weights.
  static float product(float a, const float* w, int64_t k, int64_t n, int64_t columns) {
    if constexpr (std::is_same_v<N, Tf32>) {
      return to_tf32(a) * w[fragment_word(k, n, columns, k % 4) + k % 8 / 4];
    } else {
      const auto* words = reinterpret_cast<const uint16_t*>(w + fragment_word(k, n, columns, k % 8 / 2));
      const float bh = float_of(uint32_t(words[k % 2]) << 16),
                  bl = float_of(uint32_t(words[2 + k % 2]) << 16);
      const float ah = to_bf16(a), al = to_bf16(a - ah);
      return ah * bl + al * bh + ah * bh;
    }
  }
#endif
};

template <class N, int COLUMNS>
struct TileOf {
  using type = FmaTile<N, COLUMNS>;
};
template <int COLUMNS>
struct TileOf<Tf32, COLUMNS> {
  using type = MmaTile<Tf32, COLUMNS>;
};
template <int COLUMNS>
struct TileOf<Bf16x3, COLUMNS> {
  using type = MmaTile<Bf16x3, COLUMNS>;
};
template <class N, int COLUMNS>
using Tile = typename TileOf<N, COLUMNS>::type;

template <int C>
struct Columns {
  static constexpr int value = C;
};

/// f(Columns<64 or 32>, first) for chunks that cover `width` columns.
template <class F>
MOECALC_KERNEL void chunks(int width, const F& f) {
  for (int first = 0; first < width; first += 64) {
    if (width - first > 32) {
      f(Columns<64>(), first);
    } else {
      f(Columns<32>(), first);
    }
  }
}

/// Row stride of a tile in shared memory: one vector of padding, so that rows start in different banks.
template <class T>
MOECALC_BOTH constexpr int padded_stride(int width) {
  return width + static_cast<int>(16 / sizeof(T));
}

/// Columns of features that are staged at a time where rows do not fit as a whole.
constexpr int kSlice = 64;

/// Copies `columns` values of rows 0..kRows-1 to shared memory, zeros for rows >= rows. value(row, column):
/// vector.
template <class N, class Block, class F>
MOECALC_KERNEL void stage(Block& block, typename N::type* to, int stride, int rows, int columns,
                          const F& value) {
  using T = typename N::type;
  constexpr int V = 16 / sizeof(T);
  block.each([&](int thread) {
    const int per_row = columns / V;
    for (int at = thread; at < N::kRows * per_row; at += kThreads) {
      const int r = at / per_row, c = at % per_row * V;
      Vec<T, V> x = {};
      if (r < rows) x = value(r, c);
      store<T, V>(to + r * stride + c, x);
    }
  });
}

/// acc += A W for rows that are staged slice by slice. source(row, column): vector of A. `slice`: shared,
/// kRows x padded_stride(kSlice).
template <class N, int C, class Block, class R, class F>
MOECALC_KERNEL void multiply_sliced(Block& block, R& acc, typename N::type* slice, int rows, int k,
                                    const typename N::type* w, int64_t ldw, int width, const F& source) {
  using T = typename N::type;
  constexpr int stride = padded_stride<T>(kSlice);
  for (int x = 0; x < k; x += kSlice) {
    const int columns = k - x < kSlice ? k - x : kSlice;
    block.sync();
    stage<N>(block, slice, stride, rows, columns, [&](int r, int c) { return source(r, x + c); });
    block.sync();
    block.each(
        [&](int t) { Tile<N, C>::multiply(t, acc[t], slice, stride, columns, w + x * ldw, ldw, width); });
  }
}

/// f(group, row, column) for the vectors of a tile that lie in its first `rows` rows and `width` columns.
template <class X, class F>
MOECALC_KERNEL void for_own(int thread, int rows, int width, const F& f) {
  MOECALC_UNROLL
  for (int g = 0; g < X::kGroups; ++g) {
    const int r = X::row(thread, g), c = X::column(thread, g);
    if (r < rows && c < width) f(g, r, c);
  }
}

// --- activations ---

MOECALC_KERNEL float exponential(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}
MOECALC_KERNEL double exponential(double x) { return exp(x); }
MOECALC_KERNEL float reciprocal(float x) {
#if defined(__CUDACC__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}
MOECALC_KERNEL double reciprocal(double x) { return 1.0 / x; }
template <class T>
MOECALC_KERNEL T logistic(T x) {
  // beyond the limits the exponential overflows, and with it the fast reciprocal
  const T limit = sizeof(T) == 4 ? T(80) : T(700);
  return reciprocal(T(1) + exponential(x < -limit ? limit : -x));
}
/// tanh by the exponential, which is bounded.
template <class T>
MOECALC_KERNEL T bounded_tanh(T x) {
  return T(2) * logistic(T(2) * x) - T(1);
}

template <class T>
struct Slope {
  T y, slope;
};

/// All kinds but silu and silut.
template <class T>
#if defined(__CUDACC__)
__device__ __noinline__
#else
inline
#endif
    Slope<T> other_activation(ops::ActivationKind kind, T x) {
  using K = ops::ActivationKind;
  switch (kind) {
    case K::tanh: {
      const T y = bounded_tanh(x);
      return {y, T(1) - y * y};
    }
    case K::sigmoid: {
      const T y = logistic(x);
      return {y, y * (T(1) - y)};
    }
    case K::relu:
      return {x > T(0) ? x : (x == x ? T(0) : x), x > T(0) ? T(1) : T(0)};
    case K::relu6: {
      const T y = x > T(0) ? x : (x == x ? T(0) : x);
      return {y < T(6) ? y : (y == y ? T(6) : y), x > T(0) && x < T(6) ? T(1) : T(0)};
    }
    case K::gelu: {
      const T c = T(0.79788456080286535588), d = T(0.044715);
      const T w = bounded_tanh(c * (x + d * x * x * x));
      return {T(0.5) * x * (T(1) + w),
              T(0.5) * (T(1) + w) + T(0.5) * x * (T(1) - w * w) * c * (T(1) + T(3) * d * x * x)};
    }
    default:
      return {x, T(1)};
  }
}

/// phi(x) and phi'(x). silu is silut with an infinite threshold.
template <class T>
struct Phi {
  ops::ActivationKind kind;
  T threshold, slope, offset;

  explicit Phi(const ops::Activation& phi = {})
      : kind(phi.kind), threshold(T(phi.threshold)), slope(T(phi.slope)), offset(T(phi.offset)) {
    if (kind == ops::ActivationKind::silu) {
      kind = ops::ActivationKind::silut;
      threshold = T(INFINITY);
    }
  }

  MOECALC_KERNEL Slope<T> operator()(T x) const {
    if (kind != ops::ActivationKind::silut) return other_activation(kind, x);
    if (x >= threshold) {
      const T w = bounded_tanh(slope * (x - threshold));
      return {w + offset, slope * (T(1) - w * w)};
    }
    const T s = logistic(x), y = x * s;
    return {y, s + y * (T(1) - s)};
  }
};

}  // namespace moecalc::cuda
