// Dense matrices of the plain backend, products of them, and loops over rows on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "core/threads.h"
#include "moecalc/array.h"

namespace moecalc::plain {

/// Row-major (rows, columns), moved rather than copied.
template <class T>
class Matrix {
 public:
  Matrix() = default;

  /// Numbers that are not initialised.
  static Matrix empty(int64_t rows, int64_t columns) {
    Matrix matrix;
    matrix.rows_ = rows;
    matrix.columns_ = columns;
    matrix.data_.reset(new T[static_cast<size_t>(rows * columns)]);
    return matrix;
  }
  static Matrix zeros(int64_t rows, int64_t columns) {
    Matrix matrix = empty(rows, columns);
    std::fill_n(matrix.data(), matrix.size(), T(0));
    return matrix;
  }
  /// `values`: rows * columns numbers of any type.
  template <class U>
  static Matrix of(const U* values, int64_t rows, int64_t columns) {
    Matrix matrix = empty(rows, columns);
    std::transform(values, values + matrix.size(), matrix.data(), [](U value) { return T(value); });
    return matrix;
  }
  /// A copy of an array of two dimensions, or of one: then it is a row.
  static Matrix of(const Array& values) {
    const Array typed = values.to(dtype_of<T>);
    const int64_t columns = typed.size(-1);
    const int64_t rows = typed.dim() == 1 ? 1 : typed.size(0);
    return of(typed.data<T>(), rows, columns);
  }
  Matrix clone() const { return of(data(), rows_, columns_); }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t size() const { return rows_ * columns_; }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T* row(int64_t r) { return data_.get() + r * columns_; }
  const T* row(int64_t r) const { return data_.get() + r * columns_; }

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::unique_ptr<T[]> data_;
};

/// f(begin, end) for blocks of 0..n of `block` rows, on the threads of the pool. The blocks do not depend on
/// the number of threads.
template <class F>
void for_rows(ThreadPool& threads, int64_t n, int64_t block, const F& f) {
  const int64_t n_block = (n + block - 1) / block;
  const auto do_block = [&](int64_t b) { f(b * block, std::min(n, (b + 1) * block)); };
  const int n_thread = static_cast<int>(std::min<int64_t>(threads.size(), n_block));
  if (n_thread <= 1) {
    for (int64_t b = 0; b < n_block; ++b) do_block(b);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run(n_thread, [&](int) {
    for (int64_t b = next++; b < n_block; b = next++) do_block(b);
  });
}

/// As many numbers as every processor adds at once.
template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(16)));
};

/// C (kRows, 2 vectors) += A (kRows, k) B (k, 2 vectors), the sums in registers.
template <class T, int64_t kRows>
void add_tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  using Vector = typename Lanes<T>::type;
  constexpr int64_t lanes = sizeof(Vector) / sizeof(T);
  Vector sums[kRows][2] = {};
  for (int64_t l = 0; l < k; ++l) {
    Vector right[2];
    std::memcpy(right, b + l * ldb, sizeof(right));
    for (int64_t r = 0; r < kRows; ++r) {
      const T left = a[r * lda + l];
      sums[r][0] += left * right[0];
      sums[r][1] += left * right[1];
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t s = 0; s < 2 * lanes; ++s) c[r * ldc + s] += sums[r][s / lanes][s % lanes];
  }
}

/// C (m, n) += A (m, k) B (k, n), each with the distance between its rows. Every number is one sum in the
/// order of k, whatever the shapes.
template <class T>
void add_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                 int64_t ldc) {
  constexpr int64_t kRows = 4;
  constexpr int64_t kColumns = 2 * sizeof(typename Lanes<T>::type) / sizeof(T);
  int64_t j = 0;
  for (; j + kColumns <= n; j += kColumns) {
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows)
      add_tile<T, kRows>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc);
    for (; i < m; ++i) add_tile<T, 1>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc);
  }
  for (; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      T sum = T(0);
      for (int64_t l = 0; l < k; ++l) sum += a[i * lda + l] * b[l * ldb + j];
      c[i * ldc + j] += sum;
    }
  }
}

/// (rows, columns) -> (columns, rows).
template <class T>
Matrix<T> transposed(const T* from, int64_t rows, int64_t columns) {
  constexpr int64_t kTile = 16;
  Matrix<T> to = Matrix<T>::empty(columns, rows);
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
      for (int64_t c = c0; c < std::min(c0 + kTile, columns); ++c) {
        for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r) to.row(c)[r] = from[r * columns + c];
      }
    }
  }
  return to;
}

}  // namespace moecalc::plain
