// Number formats: dtype of the network, how its products are rounded, and how weights are laid out for them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/common/host_device.h"

namespace moecalc::cuda {

// Real: dtype of the network. kRows: rows of a tile, with 128 threads and their registers in mind.
struct Float64 {
  using Real = double;
  static constexpr int kRows = 32;
  static constexpr const char* name = "float64";
};
struct Float32 {
  using Real = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "fp32";
};
/// Factors rounded to tf32, products on tensor cores, sums in float32.
struct Tf32 {
  using Real = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "tf32";
};
/// Factors split into two bf16, three of the four products on tensor cores, sums in float32.
struct Bf16x3 {
  using Real = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "bf16x3";
};

/// Whether products of the format are those of tensor cores (mma.sync).
template <class Format>
constexpr bool kOnTensorCores = std::is_same_v<Format, Tf32> || std::is_same_v<Format, Bf16x3>;

MOECALC_BOTH uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
MOECALC_BOTH float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/// Nearest tf32 (10 bits of mantissa), ties away from zero: cvt.rna.tf32.f32.
MOECALC_BOTH float to_tf32(float value) { return float_of((bits_of(value) + 0x1000u) & 0xffffe000u); }

/// Nearest bf16, ties to even: cvt.rn.bf16.f32. Not for NaN, which stays what it is in the exact remainder.
MOECALC_BOTH float to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

/// Where an element of a matrix of `columns` columns starts in the layout of the tensor-core products: blocks
/// of 8 x 8, in which the two words that a thread of a warp reads lie side by side. tf32: words of rows r and
/// r + 4; bf16x3: the leading and the remaining bf16 of a pair of rows. Offsets by whole rows of blocks are
/// those of a plain matrix.
MOECALC_BOTH int64_t fragment_word(int64_t row, int64_t column, int64_t columns, int64_t lane_row) {
  return row / 8 * 8 * columns + column / 8 * 64 + (column % 8 * 4 + lane_row) * 2;
}

/// Where element (row, column) of a tf32 matrix is.
MOECALC_BOTH int64_t tf32_word(int64_t row, int64_t column, int64_t columns) {
  return fragment_word(row, column, columns, row % 4) + row % 8 / 4;
}
/// Where the four bf16 start that hold element (row, column) of a bf16x3 matrix: leading parts of two rows,
/// then the remaining parts.
MOECALC_BOTH int64_t bf16x3_word(int64_t row, int64_t column, int64_t columns) {
  return fragment_word(row, column, columns, row % 8 / 2);
}

/// A weight matrix (rows, columns) as the products of the format read it.
template <class Format>
std::vector<typename Format::Real> fragments(const typename Format::Real* weights, int64_t rows,
                                             int64_t columns) {
  using Real = typename Format::Real;
  if constexpr (!kOnTensorCores<Format>) {
    return std::vector<Real>(weights, weights + rows * columns);
  } else {
    std::vector<float> laid_out(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const float value = weights[row * columns + column];
        if constexpr (std::is_same_v<Format, Tf32>) {
          laid_out[static_cast<size_t>(tf32_word(row, column, columns))] = to_tf32(value);
        } else {
          const float high = to_bf16(value);
          const float low = to_bf16(value - high);
          auto* words = reinterpret_cast<uint16_t*>(laid_out.data() + bf16x3_word(row, column, columns));
          words[row % 2] = static_cast<uint16_t>(bits_of(high) >> 16);
          words[2 + row % 2] = static_cast<uint16_t>(bits_of(low) >> 16);
        }
      }
    }
    return laid_out;
  }
}

}  // namespace moecalc::cuda
