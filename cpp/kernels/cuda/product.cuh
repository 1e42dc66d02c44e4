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
#include "kernels/cuda/tensor_cores.cuh"
#include "kernels/cuda/vector.cuh"

namespace moecalc::cuda {

constexpr int kThreads = 128;     // of a block that multiplies
constexpr int kChunk = 64;        // most columns of a tile
constexpr int kNarrowChunk = 32;  // columns of a tile where no more are left
constexpr int kSlice = 64;        // columns of features that are staged at a time where rows do not fit

/// Chunks that cover `width` columns.
MOECALC_BOTH constexpr int chunk_count(int width) { return (width + kChunk - 1) / kChunk; }

// --- operands ---

/// Rows of a tile in shared memory. The padding between them is what the lanes of a warp read of one, so that
/// rows of a multiple of 32 columns meet no bank twice.
template <class Format>
struct SharedRows {
  using Real = typename Format::Real;
  Real* data;
  int stride;

  static constexpr int kPadding = kOnTensorCores<Format> ? 8 : RowVec<Real>::kSize;
  static MOECALC_BOTH constexpr int stride_of(int width) { return width + kPadding; }
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
    return weights + column_offset<Format>(column);
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
      offsets[across] =
          static_cast<int>(column_offset<Format>(own_column < last_column ? own_column : last_column));
    }
    for (int input = 0; input < inputs; input += Format::kBlockRows) {
      Weights factors[kAcross];
      MOECALC_UNROLL
      for (int across = 0; across < kAcross; ++across) {
        const float* from = own_weights + offsets[across];
        factors[across] = tensor_core::of_weights<Format>(lane, [&](int of_lane) {
          return load_weight<tensor_core::WeightWords<Format>>(from + of_lane * Format::kLaneWords);
        });
      }
      multiply_block(lane, sums, own_rows, rows.stride, factors);
      own_rows += Format::kBlockRows;
      own_weights += row_offset<Format>(Format::kBlockRows, weights.stride);
    }
  }

 private:
  using Weights = tensor_core::WeightFragments<Format>;

  /// sums += 32 rows times a row of blocks of weights.
  static MOECALC_KERNEL void multiply_block(int lane, Vector* sums, const float* rows, int stride,
                                            const Weights (&weights)[kAcross]) {
    tensor_core::RowFragments<Format> factors[2];
    MOECALC_UNROLL
    for (int down = 0; down < 2; ++down) {
      factors[down] = tensor_core::of_rows<Format>(lane, [&](int of_lane) {
        return tensor_core::load_rows<Format>(rows + down * 16 * stride, stride, of_lane);
      });
    }
    MOECALC_UNROLL
    for (int across = 0; across < kAcross; across += 2) multiply_columns(sums, factors, weights, across);
  }

  /// The same for 16 columns: four products that do not wait for each other.
  static MOECALC_KERNEL void multiply_columns(Vector* sums,
                                              const tensor_core::RowFragments<Format> (&rows)[2],
                                              const Weights (&weights)[kAcross], int first) {
    float c[4][4] = {};
    if constexpr (!tensor_core::kSumsBlocks<Format>) {
      MOECALC_UNROLL
      for (int place = 0; place < 4; ++place) {
        const Vector& upper = sums[place % 2 * 2 * kAcross + first + place / 2];
        const Vector& lower = sums[(place % 2 * 2 + 1) * kAcross + first + place / 2];
        for (int sum = 0; sum < 4; ++sum) c[place][sum] = sum < 2 ? upper[sum % 2] : lower[sum % 2];
      }
    }
    MOECALC_UNROLL
    for (int number = 0; number < tensor_core::kProducts<Format>; ++number) {
      const tensor_core::Product product = tensor_core::product_of<Format>(number);
      MOECALC_UNROLL
      for (int place = 0; place < 4; ++place) {
        tensor_core::add_part<Format>(c[place], rows[place % 2], weights[first + place / 2], product.of_rows,
                                      product.of_weights);
      }
    }
    MOECALC_UNROLL
    for (int place = 0; place < 4; ++place) {
      Vector& upper = sums[place % 2 * 2 * kAcross + first + place / 2];
      Vector& lower = sums[(place % 2 * 2 + 1) * kAcross + first + place / 2];
      const Vector of_upper = {c[place][0], c[place][1]};
      const Vector of_lower = {c[place][2], c[place][3]};
      upper = tensor_core::kSumsBlocks<Format> ? upper + of_upper : of_upper;
      lower = tensor_core::kSumsBlocks<Format> ? lower + of_lower : of_lower;
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
    const WeightColumns<typename Tile::Real> own = {
        weights.data + row_offset<typename Tile::Format>(first, weights.stride), weights.stride,
        weights.width};
    block.sync();
    stage(block, slice, rows, columns, [&](int row, int column) { return source(row, first + column); });
    block.sync();
    block.each([&](int thread) { Tile::multiply(thread, sums[thread], slice, columns, own); });
  }
}

}  // namespace moecalc::cuda
