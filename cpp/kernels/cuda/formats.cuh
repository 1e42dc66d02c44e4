// Number formats: dtype of the network, how its products are rounded, and how weights are laid out for them.
#pragma once

#include <cmath>
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
/// Products by FFMA.
struct Float32 {
  using Real = float;
  static constexpr int kRows = 64;
  static constexpr const char* name = "fp32-ffma";
};

/// Products on tensor cores, sums in float32. Of a block of weights that one step of a warp multiplies with:
/// BLOCK_ROWS rows by 8 columns, LANE_WORDS words of every lane.
template <int BLOCK_ROWS, int LANE_WORDS>
struct OnTensorCores {
  using Real = float;
  static constexpr int kRows = 64;
  static constexpr int kBlockRows = BLOCK_ROWS;
  static constexpr int kLaneWords = LANE_WORDS;
  static constexpr int kParts = LANE_WORDS / 2;  // of a factor
};
/// Factors split into two tf32, three of the four products: as accurate as float32.
struct Tf32x3 : OnTensorCores<8, 4> {
  static constexpr const char* name = "fp32";
};
/// Factors split into two bf16, three of the four products.
struct Bf16x3 : OnTensorCores<16, 4> {
  static constexpr const char* name = "bf16x3";
};
/// Factors rounded to tf32.
struct Tf32 : OnTensorCores<8, 2> {
  static constexpr const char* name = "tf32";
};
/// Factors rounded to fp16; those beyond 65504 are infinite.
struct Fp16 : OnTensorCores<16, 2> {
  static constexpr const char* name = "fp16";
};

/// Whether products of the format are those of tensor cores (mma.sync).
template <class Format>
constexpr bool kOnTensorCores = !std::is_same_v<Format, Float64> && !std::is_same_v<Format, Float32>;

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

/// Nearest tf32 (10 bits of mantissa), ties away from zero: cvt.rna.tf32.f32. Infinity and NaN stay.
MOECALC_BOTH float to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return float_of((bits + 0x1000u) & 0xffffe000u);
}

/// Nearest bf16, ties to even: cvt.rn.bf16.f32. NaN stays NaN.
MOECALC_BOTH float to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return float_of(0x7fc00000u);
  return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

/// Bits of the nearest fp16, ties to even, infinite beyond the range: cvt.rn.f16.f32.
inline uint16_t fp16_bits(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  // fewer bits below 2^-14: multiples of 2^-24
  if (size < 0x38800000u) return static_cast<uint16_t>(sign | std::lrint(float_of(size) * 0x1p24f));
  return static_cast<uint16_t>(sign | (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13);
}
/// The number of those bits.
inline float fp16_value(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31u;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return float_of(bits_of(static_cast<float>(mantissa) * 0x1p-24f) | sign);
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

/// Where row `row`, the first of a block, starts in a weight matrix of `columns` columns.
template <class Format>
MOECALC_BOTH int64_t row_offset(int64_t row, int64_t columns) {
  if constexpr (kOnTensorCores<Format>) {
    return row * columns * Format::kLaneWords * 4 / Format::kBlockRows;
  } else {
    return row * columns;
  }
}
/// Where column `column`, the first of a block, starts in a row of blocks.
template <class Format>
MOECALC_BOTH int64_t column_offset(int64_t column) {
  if constexpr (kOnTensorCores<Format>) {
    return column * Format::kLaneWords * 4;
  } else {
    return column;
  }
}

/// Where the words start of the lane that holds element (row, column). Lane 4 c + q has column c of a block,
/// rows 2 q and 2 q + 1 of every 8.
template <class Format>
int64_t lane_word(int64_t row, int64_t column, int64_t columns) {
  const int64_t lane = column % 8 * 4 + row % 8 / 2;
  return row_offset<Format>(row / Format::kBlockRows * Format::kBlockRows, columns) +
         column_offset<Format>(column / 8 * 8) + lane * Format::kLaneWords;
}

/// Puts a weight where the product of its format reads it: words of rows 2 q and 2 q + 1, or pairs of 16 bits
/// in one word, those of the second 8 rows thereafter; then the same of the remaining parts.
template <class Format>
void place_weight(float* words, int64_t row, float value) {
  if constexpr (Format::kBlockRows == 8) {
    const float high = to_tf32(value);
    words[row % 2] = high;
    if constexpr (std::is_same_v<Format, Tf32x3>) words[2 + row % 2] = to_tf32(value - high);
  } else {
    const auto put = [words, row](int64_t part, uint32_t bits) {
      const auto half = static_cast<uint16_t>(bits);
      const int64_t place = part * 4 + row % 16 / 8 * 2 + row % 2;
      memcpy(reinterpret_cast<char*>(words) + place * 2, &half, 2);
    };
    if constexpr (std::is_same_v<Format, Fp16>) {
      put(0, fp16_bits(value));
    } else {
      const float high = to_bf16(value);
      put(0, bits_of(high) >> 16);
      put(1, bits_of(to_bf16(value - high)) >> 16);
    }
  }
}

/// Numbers of the size of Real in which a weight matrix lies as the products of the format read it. rows,
/// columns: whole blocks.
template <class Format>
int64_t fragments_size(int64_t rows, int64_t columns) {
  return row_offset<Format>(rows, columns);
}

/// A weight matrix (rows, columns) as the products of the format read it.
template <class Format>
std::vector<typename Format::Real> fragments(const typename Format::Real* weights, int64_t rows,
                                             int64_t columns) {
  using Real = typename Format::Real;
  if constexpr (!kOnTensorCores<Format>) {
    return std::vector<Real>(weights, weights + rows * columns);
  } else {
    std::vector<float> laid_out(static_cast<size_t>(fragments_size<Format>(rows, columns)));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        float* words = laid_out.data() + lane_word<Format>(row, column, columns);
        place_weight<Format>(words, row, weights[row * columns + column]);
      }
    }
    return laid_out;
  }
}

}  // namespace moecalc::cuda
