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

/// Instructions of the tensor cores and the rounding of their factors.
///
/// What a lane loads is a function of its number, written once for both targets. On the device a lane holds
/// its own fragment. On the host it collects the fragments of all lanes whose factors reach its sums, with
/// the same function: an element that a lane of the device would load from a wrong place is wrong here too.
namespace tensor_core {

/// Two neighboring words of the weights.
struct alignas(8) WordPair {
  uint32_t x;
  uint32_t y;
};
/// Factors of rows: of m16n8k8 tf32, words (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4) of lane 4 g + q.
struct Tf32Rows {
  uint32_t word[4];
};
/// Of m16n8k8 bf16: elements 2 q and 2 q + 1 of row g, then of row g + 8; leading and remaining parts.
struct Bf16Rows {
  uint32_t high[2];
  uint32_t low[2];
};

#if defined(__CUDACC__)

template <class Fragment>
using RowFragments = Fragment;
using WeightFragments = WordPair;

template <class F>
__device__ __forceinline__ auto of_rows(int lane, const F& load) {
  return load(lane);
}
template <class F>
__device__ __forceinline__ WordPair of_weights(int lane, const F& load) {
  return load(lane);
}
__device__ __forceinline__ WordPair words(const float* from) { return load_weight<WordPair>(from); }

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
__device__ __forceinline__ void mma_tf32(float* c, const Tf32Rows& a, const WordPair& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_bf16(float* c, const uint32_t (&a)[2], uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
__device__ __forceinline__ void mma_bf16x3(float* c, const Bf16Rows& a, const WordPair& b) {
  mma_bf16(c, a.high, b.y);  // small terms first
  mma_bf16(c, a.low, b.x);
  mma_bf16(c, a.high, b.x);
}

#else

/// Fragments of the four lanes that share rows.
template <class Fragment>
struct RowFragments {
  Fragment of[4];
};
/// Fragments of the eight lanes that hold the two columns of a lane's sums.
struct WeightFragments {
  WordPair of[2][4];
};

template <class F>
auto of_rows(int lane, const F& load) {
  RowFragments<decltype(load(0))> fragments;
  for (int peer = 0; peer < 4; ++peer) fragments.of[peer] = load(lane / 4 * 4 + peer);
  return fragments;
}
template <class F>
WeightFragments of_weights(int lane, const F& load) {
  WeightFragments fragments;
  for (int column = 0; column < 2; ++column) {
    for (int peer = 0; peer < 4; ++peer) {
      fragments.of[column][peer] = load((lane % 4 * 2 + column) * 4 + peer);
    }
  }
  return fragments;
}
inline WordPair words(const float* from) { return {bits_of(from[0]), bits_of(from[1])}; }

inline uint32_t tf32(float value) { return bits_of(to_tf32(value)); }
inline uint32_t pack(float first, float second) {
  return bits_of(to_bf16(first)) >> 16 | (bits_of(to_bf16(second)) & 0xffff0000u);
}
/// Element 0 or 1 of two bf16 in one register.
inline float unpacked(uint32_t pair, int element) {
  return float_of(element == 1 ? pair & 0xffff0000u : pair << 16);
}

/// c0 c1 are columns 2 q, 2 q + 1 of row g, c2 c3 those of row g + 8 (PTX ISA, mma.m16n8k8).
inline void mma_tf32(float* c, const RowFragments<Tf32Rows>& a, const WeightFragments& b) {
  for (int sum = 0; sum < 4; ++sum) {
    for (int k = 0; k < 8; ++k) {
      const WordPair& weight = b.of[sum % 2][k % 4];
      const uint32_t factor = a.of[k % 4].word[sum / 2 + k / 4 * 2];
      c[sum] += float_of(factor) * float_of(k < 4 ? weight.x : weight.y);
    }
  }
}
/// One product of bf16: `low_rows`, `low_weights`: of the remaining parts.
inline void mma_bf16(float* c, const RowFragments<Bf16Rows>& a, const WeightFragments& b, bool low_rows,
                     bool low_weights) {
  for (int sum = 0; sum < 4; ++sum) {
    for (int k = 0; k < 8; ++k) {
      const Bf16Rows& rows = a.of[k / 2];
      const WordPair& weights = b.of[sum % 2][k / 2];
      const uint32_t factors = low_rows ? rows.low[sum / 2] : rows.high[sum / 2];
      c[sum] += unpacked(factors, k % 2) * unpacked(low_weights ? weights.y : weights.x, k % 2);
    }
  }
}
inline void mma_bf16x3(float* c, const RowFragments<Bf16Rows>& a, const WeightFragments& b) {
  mma_bf16(c, a, b, false, true);  // small terms first
  mma_bf16(c, a, b, true, false);
  mma_bf16(c, a, b, false, false);
}

#endif

/// Leading and remaining parts of two numbers.
MOECALC_KERNEL void split(float first, float second, uint32_t& high, uint32_t& low) {
  high = pack(first, second);
  low = pack(first - float_of(high << 16), second - float_of(high & 0xffff0000u));
}

/// A lane's factors from rows g and g + 8; `rows`: row 0 of 16, column 0 of 8.
MOECALC_KERNEL Tf32Rows load_tf32(const float* rows, int stride, int lane) {
  const float* from = rows + lane / 4 * stride + lane % 4;
  return {{tf32(from[0]), tf32(from[8 * stride]), tf32(from[4]), tf32(from[8 * stride + 4])}};
}
MOECALC_KERNEL Bf16Rows load_bf16(const float* rows, int stride, int lane) {
  const float* from = rows + lane / 4 * stride + lane % 4 * 2;
  Bf16Rows parts;
  split(from[0], from[1], parts.high[0], parts.low[0]);
  split(from[8 * stride], from[8 * stride + 1], parts.high[1], parts.low[1]);
  return parts;
}

}  // namespace tensor_core

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

  static MOECALC_KERNEL void multiply(int thread, Vector* sums, const SharedRows<Format>& rows, int inputs,
                                      const WeightColumns<float>& weights) {
    const int warp = thread / 32;
    const int lane = thread % 32;
    const int first_column = warp % 2 * (COLUMNS / 2);
    const float* own_rows = rows.at(warp / 2 * 32, 0);
    const float* own_weights = weights.data;
    // Beyond the width the last columns are taken once more: loads need no condition, and nobody reads the
    // sums.
    const int last_column = (weights.width - 1) / 8 * 8;
    int offsets[kAcross];
    MOECALC_UNROLL
    for (int across = 0; across < kAcross; ++across) {
      const int own_column = first_column + across * 8;
      offsets[across] = (own_column < last_column ? own_column : last_column) * 8;
    }
    for (int input = 0; input < inputs; input += 8) {
      tensor_core::WeightFragments factors[kAcross];
      MOECALC_UNROLL
      for (int across = 0; across < kAcross; ++across) {
        const float* from = own_weights + offsets[across];
        factors[across] = tensor_core::of_weights(
            lane, [&](int of_lane) { return tensor_core::words(from + of_lane * 2); });
      }
      if constexpr (std::is_same_v<Format, Tf32>) {
        multiply_block<tensor_core::Tf32Rows>(
            lane, sums, factors,
            [&](int down, int of_lane) {
              return tensor_core::load_tf32(own_rows + down * 16 * rows.stride, rows.stride, of_lane);
            },
            [&](float* c, const auto& a, const auto& b) { tensor_core::mma_tf32(c, a, b); });
      } else {
        multiply_block<tensor_core::Bf16Rows>(
            lane, sums, factors,
            [&](int down, int of_lane) {
              return tensor_core::load_bf16(own_rows + down * 16 * rows.stride, rows.stride, of_lane);
            },
            [&](float* c, const auto& a, const auto& b) { tensor_core::mma_bf16x3(c, a, b); });
      }
      own_rows += 8;
      own_weights += 8 * weights.stride;
    }
  }

 private:
  /// sums += 32 rows times 8 rows of weights. load(down, lane): a lane's factors of 16 rows; product(c, a,
  /// b).
  template <class Fragment, class Load, class Product>
  static MOECALC_KERNEL void multiply_block(int lane, Vector* sums,
                                            const tensor_core::WeightFragments (&weights)[kAcross],
                                            const Load& load, const Product& product) {
    tensor_core::RowFragments<Fragment> factors[2];
    MOECALC_UNROLL
    for (int down = 0; down < 2; ++down) {
      factors[down] = tensor_core::of_rows(lane, [&](int of_lane) { return load(down, of_lane); });
    }
    MOECALC_UNROLL
    for (int across = 0; across < kAcross; ++across) {
      MOECALC_UNROLL
      for (int down = 0; down < 2; ++down) {
        Vector& upper = sums[2 * down * kAcross + across];
        Vector& lower = sums[(2 * down + 1) * kAcross + across];
        float c[4] = {upper[0], upper[1], lower[0], lower[1]};
        product(c, factors[down], weights[across]);
        upper = {c[0], c[1]};
        lower = {c[2], c[3]};
      }
    }
  }
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

/// f(group, row, column) for all vectors of a tile, given the last row and column of the first `rows` and
/// `width` in the place of those beyond: what f loads is there, without a branch. What it makes of it may
/// only be kept where for_own() comes to.
template <class Tile, class F>
MOECALC_KERNEL void for_clamped(int thread, int rows, int width, const F& f) {
  MOECALC_UNROLL
  for (int group = 0; group < Tile::kGroups; ++group) {
    const int row = Tile::row(thread, group);
    const int column = Tile::column(thread, group);
    f(group, row < rows ? row : rows - 1, column < width ? column : width - Tile::kVector);
  }
}

/// f(row, column) for the vectors of `rows` rows of `columns` values that a thread has, if a block shares
/// them. One division per thread: from one to the next the place is counted on.
template <class Vector, class F>
MOECALC_KERNEL void for_vectors(int thread, int rows, int columns, const F& f) {
  const int row_step = kThreads * Vector::kSize / columns;
  const int column_step = kThreads * Vector::kSize - row_step * columns;
  int row = thread * Vector::kSize / columns;
  int column = thread * Vector::kSize - row * columns;
  const int count = (rows * (columns / Vector::kSize) - thread + kThreads - 1) / kThreads;
  MOECALC_UNROLL_4
  for (int turn = 0; turn < count; ++turn) {
    f(row, column);
    row += row_step;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

/// Copies `columns` values of rows 0..kRows-1 to shared memory, zeros for rows >= rows. value(row, column):
/// RowVec.
template <class Format, class Block, class F>
MOECALC_KERNEL void stage(Block& block, const SharedRows<Format>& to, int rows, int columns, const F& value) {
  using Vector = RowVec<typename Format::Real>;
  block.each([&](int thread) {
    for_vectors<Vector>(thread, Format::kRows, columns, [&](int row, int column) {
      Vector staged = {};
      if (row < rows) staged = value(row, column);
      store(to.at(row, column), staged);
    });
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
