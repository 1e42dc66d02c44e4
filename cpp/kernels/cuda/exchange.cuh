// Rows of features between their places and packed buffers, for the exchange of ghosts.
#pragma once

#include <cstdint>

#include "kernels/cuda/block.cuh"

namespace moecalc::cuda {

/// packed[i] = values[rows[i]] without the padding, or the other way, with zeros for the padding.
template <class Real>
struct CopyRows {
  static constexpr int kThreads = 256;
  const int* rows = nullptr;  // (n_row), each once where rows are written
  int64_t n_row = 0;
  int64_t width = 0;
  int64_t padded = 0;      // of a row of values
  bool gather = false;     // from `values` to `packed`
  Real* packed = nullptr;  // n_row x width
  Real* values = nullptr;

  int64_t blocks() const { return (n_row * padded + kThreads - 1) / kThreads; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int thread) {
      const int64_t place = block.index() * int64_t(kThreads) + thread;
      const int64_t row = place / padded;
      const int64_t column = place % padded;
      if (row >= n_row) return;
      Real& value = values[rows[row] * padded + column];
      if (!gather) {
        value = column < width ? packed[row * width + column] : Real(0);
      } else if (column < width) {
        packed[row * width + column] = value;
      }
    });
  }
};

/// values[rows[i]] += sum of packed[places[k]] for k of first[i]..first[i + 1] - 1, in this order.
template <class Real>
struct AddRows {
  static constexpr int kThreads = 256;
  const int* rows = nullptr;    // (n_row), each once
  const int* first = nullptr;   // (n_row + 1) into places
  const int* places = nullptr;  // rows of packed
  int64_t n_row = 0;
  int64_t width = 0;
  int64_t padded = 0;
  const Real* packed = nullptr;
  Real* values = nullptr;

  int64_t blocks() const { return (n_row * width + kThreads - 1) / kThreads; }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int thread) {
      const int64_t place = block.index() * int64_t(kThreads) + thread;
      const int64_t row = place / width;
      const int64_t column = place % width;
      if (row >= n_row) return;
      Real sum = 0;
      for (int k = first[row]; k < first[row + 1]; ++k) sum += packed[places[k] * width + column];
      values[rows[row] * padded + column] += sum;
    });
  }
};

}  // namespace moecalc::cuda
