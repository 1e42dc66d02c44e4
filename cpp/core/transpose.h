// Transposition of row-major matrices.
#pragma once

#include <algorithm>
#include <cstdint>

namespace moecalc {

/// (rows, columns) -> (columns, rows), in tiles that stay in cache.
template <class Real>
void transpose(const Real* from, int64_t rows, int64_t columns, Real* to) {
  constexpr int64_t tile = 16;
  for (int64_t row = 0; row < rows; row += tile) {
    const int64_t row_end = std::min(row + tile, rows);
    for (int64_t column = 0; column < columns; column += tile) {
      const int64_t column_end = std::min(column + tile, columns);
      for (int64_t c = column; c < column_end; ++c) {
        for (int64_t r = row; r < row_end; ++r) to[c * rows + r] = from[r * columns + c];
      }
    }
  }
}

}  // namespace moecalc
