// Products of row-major matrices: C (rows x columns) = A (rows x inner) B (inner x columns), columns a whole
// number of vectors. Tiles of C stay in registers while `inner` runs.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "kernels/cpu/simd.h"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// What a product is added to: nothing; what is in C; a row (the same for all rows) + the rows of `base`.
enum class Start { zero, result, sum };

/// Rows x Vectors of C. A function with plain arguments: in one piece with the loops around it, the inner
/// loop would lose registers to their addresses.
template <class Real, int Rows, int Vectors, Start start>
[[gnu::noinline]] void tile(int64_t inner, const Real* left, int64_t left_stride, const Real* right,
                            int64_t right_stride, Real* result, int64_t result_stride,
                            [[maybe_unused]] const Real* row, [[maybe_unused]] const Real* base,
                            [[maybe_unused]] int64_t base_stride) {
  constexpr int64_t lanes = kLanes<Real>;
  Vec<Real> total[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if constexpr (start == Start::result) {
        total[r][v] = load(result + r * result_stride + v * lanes);
      } else if constexpr (start == Start::sum) {
        total[r][v] = load(row + v * lanes) + load(base + r * base_stride + v * lanes);
      } else {
        total[r][v] = Vec<Real>{};
      }
    }
  }
  for (int64_t k = 0; k < inner; ++k) {
    Vec<Real> right_row[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) right_row[v] = load(right + k * right_stride + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec<Real> factor = splat(left[r * left_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) total[r][v] += factor * right_row[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store(result + r * result_stride + v * lanes, total[r][v]);
  }
}

/// The tiles of 1 to Most rows.
template <class Real, int Vectors, Start start, int... row>
constexpr auto tiles_of(std::integer_sequence<int, row...>) {
  return std::array{tile<Real, row + 1, Vectors, start>...};
}

/// All rows of Vectors of C, in as few tiles of at most Most rows as there can be, all nearly the same: a
/// tile of few rows takes as long as one of more, because its sums wait for each other.
template <class Real, int Most, int Vectors, Start start>
inline void column_block(int64_t rows, int64_t inner, const Real* left, int64_t left_stride,
                         const Real* right, int64_t right_stride, Real* result, int64_t result_stride,
                         const Real* row, const Real* base, int64_t base_stride) {
  static constexpr auto tiles = tiles_of<Real, Vectors, start>(std::make_integer_sequence<int, Most>());
  for (int64_t n_tile = (rows + Most - 1) / Most; n_tile > 0; --n_tile) {
    const int64_t n_row = (rows + n_tile - 1) / n_tile;
    tiles[static_cast<size_t>(n_row - 1)](inner, left, left_stride, right, right_stride, result,
                                          result_stride, row, base, base_stride);
    rows -= n_row;
    left += n_row * left_stride;
    result += n_row * result_stride;
    if constexpr (start == Start::sum) base += n_row * base_stride;
  }
}

/// Blocks of columns as wide as the registers hold: 6 vectors with 32 registers, 3 with 16.
template <class Real, Start start>
void product_from(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
                  const Real* right, int64_t right_stride, Real* result, int64_t result_stride,
                  const Real* row = nullptr, const Real* base = nullptr, int64_t base_stride = 0) {
  int64_t vectors_left = columns / kLanes<Real>;
  const auto block = [&]<int Most, int Vectors>() {
    column_block<Real, Most, Vectors, start>(rows, inner, left, left_stride, right, right_stride, result,
                                             result_stride, row, base, base_stride);
    vectors_left -= Vectors;
    right += Vectors * kLanes<Real>;
    result += Vectors * kLanes<Real>;
    if constexpr (start == Start::sum) {
      row += Vectors * kLanes<Real>;
      base += Vectors * kLanes<Real>;
    }
  };
#if MOECALC_REGISTERS >= 32
  while (vectors_left >= 6 && vectors_left != 8) block.template operator()<4, 6>();
  while (vectors_left >= 4) block.template operator()<6, 4>();
  while (vectors_left == 3) block.template operator()<8, 3>();
  while (vectors_left == 2) block.template operator()<12, 2>();
#else
  while (vectors_left >= 3 && vectors_left != 4) block.template operator()<4, 3>();
  while (vectors_left >= 2) block.template operator()<6, 2>();
#endif
  if (vectors_left == 1) block.template operator()<12, 1>();
}

/// C = A B.
template <class Real>
void product(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
             const Real* right, int64_t right_stride, Real* result, int64_t result_stride) {
  product_from<Real, Start::zero>(rows, columns, inner, left, left_stride, right, right_stride, result,
                                  result_stride);
}

/// C += A B.
template <class Real>
void add_product(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
                 const Real* right, int64_t right_stride, Real* result, int64_t result_stride) {
  product_from<Real, Start::result>(rows, columns, inner, left, left_stride, right, right_stride, result,
                                    result_stride);
}

/// C = row (to every row) + base + A B.
template <class Real>
void product_onto(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
                  const Real* right, int64_t right_stride, const Real* row, const Real* base,
                  int64_t base_stride, Real* result, int64_t result_stride) {
  product_from<Real, Start::sum>(rows, columns, inner, left, left_stride, right, right_stride, result,
                                 result_stride, row, base, base_stride);
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
