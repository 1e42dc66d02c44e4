// Products of a tile of rows with a weight block.
//
// A tile is kRows rows (edges, angles, nodes) by 64 or 32 columns, spread over the 128 threads of a block.
// The rows' features lie in shared memory; weights are read through the first-level cache, where the blocks
// of one routing group find what their neighbors on the multiprocessor have read. Sums are in registers;
// TileOf tells which thread holds which element, so that everything around the product is the same for FMA
// and tensor-core products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/block.cuh"
#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/vector.cuh"

namespace moecalc::cuda {

constexpr int kThreads = 128;     // of a block that multiplies
constexpr int kChunk = 64;        // most columns of a tile
constexpr int kNarrowChunk = 32;  // columns of a tile where no more are left
constexpr int kSlice = 64;        // columns of features that are staged at a time where rows do not fit

/// Chunks that cover `width` columns.
MOECALC_BOTH constexpr int chunk_count(int width) { return (width + kChunk - 1) / kChunk; }

// --- operands ---

/// Rows of a tile in shared memory, one vector of padding apart: they start in different banks.
template <class Format>
struct SharedRows {
  using Real = typename Format::Real;
  Real* data;
  int stride;

  static MOECALC_BOTH constexpr int stride_of(int width) { return width + RowVec<Real>::kSize; }
  static int64_t bytes(int width) { return shared_size<Real>(Format::kRows * stride_of(width)); }

  template <class Block>
  MOECALC_KERNEL SharedRows(Block& block, int width)
      : data(block.template shared<Real>(Format::kRows * stride_of(width))), stride(stride_of(width)) {}

  MOECALC_KERNEL Real* at(int row, int column) const { return data + row * stride + column; }
};

/// Columns of a weight matrix, the first of them at `data`, as a tile reads them.
template <class Real>
struct WeightColumns {
  const Real* data;
  int64_t stride;  // columns of the whole matrix
  int width;       // columns from here on that count
};

/// The columns `first`.. of a matrix of `columns` columns; `width` of them count.
template <class Tile>
MOECALC_KERNEL WeightColumns<typename Tile::Real> weight_columns(const typename Tile::Real* matrix,
                                                                 int64_t columns, int64_t first, int width) {
  return {Tile::from(matrix, first), columns, width};
}

// --- tiles ---

/// Which elements of a kRows x COLUMNS tile a thread holds: kGroups vectors of kVector columns. FMA products.
template <class FORMAT, int COLUMNS>
struct FmaTile {
  using Format = FORMAT;
  using Real = typename Format::Real;
  using Vector = RowVec<Real>;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kVector = Vector::kSize;
  static constexpr int kLanes = COLUMNS / kVector;         // threads side by side
  static constexpr int kStride = kThreads / kLanes;        // rows between two groups of a thread
  static constexpr int kGroups = Format::kRows / kStride;  // = rows of a thread
  static MOECALC_KERNEL int row(int thread, int group) { return group * kStride + thread / kLanes; }
  static MOECALC_KERNEL int column(int thread, int) { return thread % kLanes * kVector; }
  /// Number of a thread among those that share a row.
  static MOECALC_KERNEL int slot(int thread) { return thread % kLanes; }
  /// The weights from a column on.
  static MOECALC_KERNEL const Real* from(const Real* weights, int64_t column) { return weights + column; }

  /// sums += rows W, with `inputs` columns of the rows; columns beyond the weights' width are left alone.
  /// inputs, width: whole vectors.
  static MOECALC_KERNEL void multiply(int thread, Vector* sums, const SharedRows<Format>& rows, int inputs,
                                      const WeightColumns<Real>& weights) {
    const int own_column = column(thread, 0);
    if (own_column >= weights.width) return;
    const Real* own_rows = rows.at(row(thread, 0), 0);
    const Real* own_weights = weights.data + own_column;
    for (int input = 0; input < inputs; input += kVector) {
      Vector weight[kVector];
      MOECALC_UNROLL
      for (int lane = 0; lane < kVector; ++lane) {
        weight[lane] = load_weight<Vector>(own_weights + (input + lane) * weights.stride);
      }
      MOECALC_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        const Vector factor = load<Vector>(own_rows + group * kStride * rows.stride + input);
        MOECALC_UNROLL
        for (int lane = 0; lane < kVector; ++lane) sums[group] += factor[lane] * weight[lane];
      }
    }
  }
};

#if defined(__CUDACC__)
/// Instructions of the tensor cores and the rounding of their factors.
namespace tensor_core {

__device__ __forceinline__ uint32_t tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}
/// Two bf16 in one register: the lower half is the first element.
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
/// Leading and remaining parts of two numbers.
__device__ __forceinline__ void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack(first, second);
  low = pack(first - __uint_as_float(high << 16), second - __uint_as_float(high & 0xffff0000u));
}
__device__ __forceinline__ void mma_tf32(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float* c, const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

}  // namespace tensor_core
#endif

/// The same for mma.sync m16n8: four warps, each half of the rows by half of the columns.
template <class FORMAT, int COLUMNS>
struct MmaTile {
  using Format = FORMAT;
  using Real = float;
  using Vector = Vec<float, 2>;
  static constexpr int kColumns = COLUMNS;
  static constexpr int kVector = Vector::kSize;
  static constexpr int kAcross = COLUMNS / 16;  // products of 8 columns in a warp's half
  static constexpr int kGroups = 4 * kAcross;
  static MOECALC_KERNEL int row(int thread, int group) {
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int eighth = group / kAcross;  // 8 rows of the warp's 32
    return warp / 2 * 32 + eighth / 2 * 16 + eighth % 2 * 8 + lane / 4;
  }
  static MOECALC_KERNEL int column(int thread, int group) {
    return thread / 32 % 2 * (COLUMNS / 2) + group % kAcross * 8 + thread % 4 * 2;
  }
  static MOECALC_KERNEL int slot(int thread) { return thread / 32 % 2 * 4 + thread % 4; }
  static MOECALC_KERNEL const float* from(const float* weights, int64_t column) {
    return weights + 8 * column;
  }

#if defined(__CUDACC__)
  static __device__ __forceinline__ void multiply(int thread, Vector* sums, const SharedRows<Format>& rows,
                                                  int inputs, const WeightColumns<float>& weights) {
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int first_column = warp % 2 * (COLUMNS / 2);
    const float* own_rows = rows.at(warp / 2 * 32 + lane / 4, 0);
    const float* own_weights = weights.data + first_column * 8 + lane * 2;
    for (int input = 0; input < inputs; input += 8) {
      uint2 factors[kAcross];
      MOECALC_UNROLL
      for (int across = 0; across < kAcross; ++across) {
        factors[across] = first_column + across * 8 < weights.width
                              ? load_weight<uint2>(own_weights + input * weights.stride + across * 64)
                              : make_uint2(0u, 0u);
      }
      if constexpr (std::is_same_v<Format, Tf32>) {
        multiply_tf32(sums, own_rows + input + lane % 4, rows.stride, factors);
      } else {
        multiply_bf16x3(sums, own_rows + input + lane % 4 * 2, rows.stride, factors);
      }
    }
  }

 private:
  static __device__ __forceinline__ void multiply_tf32(Vector* sums, const float* rows, int stride,
                                                       const uint2 (&weights)[kAcross]) {
    uint32_t factors[2][4];
    MOECALC_UNROLL
    for (int down = 0; down < 2; ++down) {
      const float* from = rows + down * 16 * stride;
      factors[down][0] = tensor_core::tf32(from[0]);
      factors[down][1] = tensor_core::tf32(from[8 * stride]);
      factors[down][2] = tensor_core::tf32(from[4]);
      factors[down][3] = tensor_core::tf32(from[8 * stride + 4]);
    }
    MOECALC_UNROLL
    for (int across = 0; across < kAcross; ++across) {
      MOECALC_UNROLL
      for (int down = 0; down < 2; ++down) {
        gathered(sums, down, across, [&](float* c) {
          tensor_core::mma_tf32(c, factors[down], weights[across].x, weights[across].y);
        });
      }
    }
  }

  static __device__ __forceinline__ void multiply_bf16x3(Vector* sums, const float* rows, int stride,
                                                         const uint2 (&weights)[kAcross]) {
    uint32_t high[2][2];
    uint32_t low[2][2];
    MOECALC_UNROLL
    for (int down = 0; down < 2; ++down) {
      const float* from = rows + down * 16 * stride;
      tensor_core::split(from[0], from[1], high[down][0], low[down][0]);
      tensor_core::split(from[8 * stride], from[8 * stride + 1], high[down][1], low[down][1]);
    }
    MOECALC_UNROLL
    for (int across = 0; across < kAcross; ++across) {
      MOECALC_UNROLL
      for (int down = 0; down < 2; ++down) {
        gathered(sums, down, across, [&](float* c) {
          tensor_core::mma_bf16(c, high[down], weights[across].y);  // small terms first
          tensor_core::mma_bf16(c, low[down], weights[across].x);
          tensor_core::mma_bf16(c, high[down], weights[across].x);
        });
      }
    }
  }

  /// f on the four sums of a product of 16 rows and 8 columns, gathered from their groups and put back.
  template <class F>
  static __device__ __forceinline__ void gathered(Vector* sums, int down, int across, const F& f) {
    Vector& upper = sums[2 * down * kAcross + across];
    Vector& lower = sums[(2 * down + 1) * kAcross + across];
    float c[4] = {upper[0], upper[1], lower[0], lower[1]};
    f(c);
    upper = {c[0], c[1]};
    lower = {c[2], c[3]};
  }
#else
  /// The emulation: the same elements and the same rounding of factors, sums in float32.
  static void multiply(int thread, Vector* sums, const SharedRows<Format>& rows, int inputs,
                       const WeightColumns<float>& weights) {
    for (int group = 0; group < kGroups; ++group) {
      const int first = column(thread, group);
      if (first >= weights.width) continue;
      const float* own_row = rows.at(row(thread, group), 0);
      for (int input = 0; input < inputs; ++input) {
        for (int lane = 0; lane < kVector; ++lane) {
          sums[group][lane] += product(own_row[input], weights, input, first + lane);
        }
      }
    }
  }

 private:
  /// `factor` times an element of the weights.
  static float product(float factor, const WeightColumns<float>& weights, int64_t row, int64_t column) {
    if constexpr (std::is_same_v<Format, Tf32>) {
      return to_tf32(factor) * weights.data[tf32_word(row, column, weights.stride)];
    } else {
      const auto* words =
          reinterpret_cast<const uint16_t*>(weights.data + bf16x3_word(row, column, weights.stride));
      const float weight_high = float_of(uint32_t(words[row % 2]) << 16);
      const float weight_low = float_of(uint32_t(words[2 + row % 2]) << 16);
      const float high = to_bf16(factor);
      const float low = to_bf16(factor - high);
      return high * weight_low + low * weight_high + high * weight_high;
    }
  }
#endif
};

template <class Format, int COLUMNS>
using TileOf = std::conditional_t<kOnTensorCores<Format>, MmaTile<Format, COLUMNS>, FmaTile<Format, COLUMNS>>;

// --- loops ---

/// f(tile, first column) for chunks that cover `width` columns.
template <class Format, class F>
MOECALC_KERNEL void for_chunks(int width, const F& f) {
  for (int first = 0; first < width; first += kChunk) {
    if (width - first > kNarrowChunk) {
      f(TileOf<Format, kChunk>(), first);
    } else {
      f(TileOf<Format, kNarrowChunk>(), first);
    }
  }
}

template <class Tile>
MOECALC_KERNEL void set_zero(typename Tile::Vector* sums) {
  MOECALC_UNROLL
  for (int group = 0; group < Tile::kGroups; ++group) sums[group] = typename Tile::Vector{};
}

/// f(group, row, column) for the vectors of a tile that lie in its first `rows` rows and `width` columns.
template <class Tile, class F>
MOECALC_KERNEL void for_own(int thread, int rows, int width, const F& f) {
  MOECALC_UNROLL
  for (int group = 0; group < Tile::kGroups; ++group) {
    const int row = Tile::row(thread, group);
    const int column = Tile::column(thread, group);
    if (row < rows && column < width) f(group, row, column);
  }
}

/// Copies `columns` values of rows 0..kRows-1 to shared memory, zeros for rows >= rows. value(row, column):
/// RowVec.
template <class Format, class Block, class F>
MOECALC_KERNEL void stage(Block& block, const SharedRows<Format>& to, int rows, int columns, const F& value) {
  using Vector = RowVec<typename Format::Real>;
  block.each([&](int thread) {
    const int per_row = columns / Vector::kSize;
    for (int place = thread; place < Format::kRows * per_row; place += kThreads) {
      const int row = place / per_row;
      const int column = place % per_row * Vector::kSize;
      Vector staged = {};
      if (row < rows) staged = value(row, column);
      store(to.at(row, column), staged);
    }
  });
}

/// sums += A W for rows A that are staged slice by slice. source(row, column): RowVec of A. `slice`: of
/// kSlice columns. `sums`: registers of the block.
template <class Tile, class Block, class Sums, class F>
MOECALC_KERNEL void multiply_sliced(Block& block, Sums& sums, const SharedRows<typename Tile::Format>& slice,
                                    int rows, int inputs, const WeightColumns<typename Tile::Real>& weights,
                                    const F& source) {
  for (int first = 0; first < inputs; first += kSlice) {
    const int columns = inputs - first < kSlice ? inputs - first : kSlice;
    const WeightColumns<typename Tile::Real> own = {weights.data + first * weights.stride, weights.stride,
                                                    weights.width};
    block.sync();
    stage(block, slice, rows, columns, [&](int row, int column) { return source(row, first + column); });
    block.sync();
    block.each([&](int thread) { Tile::multiply(thread, sums[thread], slice, columns, own); });
  }
}

}  // namespace moecalc::cuda
