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
#include "core/transpose.h"
#include "moecalc/array.h"

namespace moecalc::plain {

/// Row-major (rows, columns), moved rather than copied.
template <class Real>
class Matrix {
 public:
  Matrix() = default;

  /// Numbers that are not initialised.
  static Matrix empty(int64_t rows, int64_t columns) {
    Matrix matrix;
    matrix.rows_ = rows;
    matrix.columns_ = columns;
    matrix.data_.reset(new Real[static_cast<size_t>(rows * columns)]);
    return matrix;
  }
  static Matrix zeros(int64_t rows, int64_t columns) {
    Matrix matrix = empty(rows, columns);
    std::fill_n(matrix.data(), matrix.size(), Real(0));
    return matrix;
  }
  /// `values`: rows * columns numbers of any type.
  template <class Number>
  static Matrix of(const Number* values, int64_t rows, int64_t columns) {
    Matrix matrix = empty(rows, columns);
    std::transform(values, values + matrix.size(), matrix.data(), [](Number value) { return Real(value); });
    return matrix;
  }
  /// A copy of an array of two dimensions, or of one: then it is a row.
  static Matrix of(const Array& values) {
    const Array typed = values.to(dtype_of<Real>);
    const int64_t columns = typed.size(-1);
    const int64_t rows = typed.dim() == 1 ? 1 : typed.size(0);
    return of(typed.data<Real>(), rows, columns);
  }
  Matrix clone() const { return of(data(), rows_, columns_); }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t size() const { return rows_ * columns_; }
  Real* data() { return data_.get(); }
  const Real* data() const { return data_.get(); }
  Real* row(int64_t index) { return data_.get() + index * columns_; }
  const Real* row(int64_t index) const { return data_.get() + index * columns_; }

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::unique_ptr<Real[]> data_;
};

/// work(begin, end) for blocks of 0..n_row of `block` rows, on the threads of the pool. The blocks do not
/// depend on the number of threads.
template <class Function>
void for_rows(ThreadPool& threads, int64_t n_row, int64_t block, const Function& work) {
  const int64_t n_block = (n_row + block - 1) / block;
  const auto do_block = [&](int64_t index) { work(index * block, std::min(n_row, (index + 1) * block)); };
  const int n_thread = static_cast<int>(std::min<int64_t>(threads.size(), n_block));
  if (n_thread <= 1) {
    for (int64_t index = 0; index < n_block; ++index) do_block(index);
    return;
  }
  std::atomic<int64_t> next{0};
  threads.run(n_thread, [&](int) {
    for (int64_t index = next++; index < n_block; index = next++) do_block(index);
  });
}

/// As many numbers as every processor adds at once.
template <class Real>
struct Lanes {
  typedef Real type __attribute__((vector_size(16)));
};

/// C (kRows, 2 vectors) += A (kRows, inner) B (inner, 2 vectors), the sums in registers.
template <class Real, int64_t kRows>
void add_tile(int64_t inner, const Real* left, int64_t left_stride, const Real* right, int64_t right_stride,
              Real* out, int64_t out_stride) {
  using Vector = typename Lanes<Real>::type;
  constexpr int64_t lanes = sizeof(Vector) / sizeof(Real);
  Vector sums[kRows][2] = {};
  for (int64_t l = 0; l < inner; ++l) {
    Vector vectors[2];
    std::memcpy(vectors, right + l * right_stride, sizeof(vectors));
    for (int64_t r = 0; r < kRows; ++r) {
      const Real factor = left[r * left_stride + l];
      sums[r][0] += factor * vectors[0];
      sums[r][1] += factor * vectors[1];
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t c = 0; c < 2 * lanes; ++c) out[r * out_stride + c] += sums[r][c / lanes][c % lanes];
  }
}

/// C (rows, columns) += A (rows, inner) B (inner, columns), each with the distance between its rows. Every
/// number is one sum in the order of `inner`, whatever the shapes.
template <class Real>
void add_product(int64_t rows, int64_t columns, int64_t inner, const Real* left, int64_t left_stride,
                 const Real* right, int64_t right_stride, Real* out, int64_t out_stride) {
  constexpr int64_t kRows = 4;
  constexpr int64_t kColumns = 2 * sizeof(typename Lanes<Real>::type) / sizeof(Real);
  int64_t c = 0;
  for (; c + kColumns <= columns; c += kColumns) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      add_tile<Real, kRows>(inner, left + r * left_stride, left_stride, right + c, right_stride,
                            out + r * out_stride + c, out_stride);
    }
    for (; r < rows; ++r) {
      add_tile<Real, 1>(inner, left + r * left_stride, left_stride, right + c, right_stride,
                        out + r * out_stride + c, out_stride);
    }
  }
  for (; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      Real sum = Real(0);
      for (int64_t l = 0; l < inner; ++l) sum += left[r * left_stride + l] * right[l * right_stride + c];
      out[r * out_stride + c] += sum;
    }
  }
}

/// (rows, columns) -> (columns, rows).
template <class Real>
Matrix<Real> transposed(const Real* from, int64_t rows, int64_t columns) {
  Matrix<Real> to = Matrix<Real>::empty(columns, rows);
  transpose(from, rows, columns, to.data());
  return to;
}

}  // namespace moecalc::plain
