// Linear maps of whole rows: what nodes give to the maps of their edges and angles, and gradients through
// that.
#pragma once

#include <cstdint>

#include "kernels/cuda/layer_view.cuh"

namespace moecalc::cuda {

/// Which matrix of a routing group.
template <class Real>
using Weight = const Real* kernels::GroupWeights<Real>::*;

/// out (+)= A W (+ b)
///
/// for the rows of every run, with the weights of its group. One block per run and chunk of columns.
template <class Format>
struct Linear {
  using Real = typename Format::Real;
  using Tile = TileOf<Format, kChunk>;
  using Vector = typename Tile::Vector;
  static constexpr int kThreads = cuda::kThreads;
  const Run* runs = nullptr;  // of at most kRows rows
  int64_t n_run = 0;
  const kernels::GroupWeights<Real>* weights = nullptr;
  Weight<Real> matrix = nullptr;
  Weight<Real> bias = nullptr;  // null for none
  const int* gather = nullptr;  // row of `input` of every row; null: the same
  const Real* input = nullptr;  // A
  int64_t input_stride = 0;
  int inputs = 0;
  int columns = 0;
  Real* out = nullptr;
  bool add = false;

  int64_t blocks() const { return n_run * chunk_count(columns); }
  int64_t shared_bytes() const { return SharedRows<Format>::bytes(kSlice); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int across = chunk_count(columns);
    const Run run = runs[block.index() / across];
    const int first = static_cast<int>(block.index() % across) * kChunk;
    const int width = columns - first;
    const int rows = run.end - run.begin;
    const kernels::GroupWeights<Real>& group_weights = weights[run.group];
    const SharedRows<Format> slice(block, kSlice);
    auto sums = block.template registers<Vector, Tile::kGroups>();
    block.each([&](int thread) {
      set_zero<Tile>(sums[thread]);
      if (bias == nullptr) return;
      const Real* from = group_weights.*bias + first;
      for_own<Tile>(thread, rows, width,
                    [&](int group, int, int column) { sums[thread][group] = load<Vector>(from + column); });
    });
    multiply_sliced<Tile>(block, sums, slice, rows, inputs,
                          weight_columns<Tile>(group_weights.*matrix, columns, first, width),
                          [&](int row, int column) { return input_vector(run.begin + row, column); });
    block.each([&](int thread) {
      for_own<Tile>(thread, rows, width, [&](int group, int row, int column) {
        Real* to = out + (run.begin + row) * static_cast<int64_t>(columns) + first + column;
        put(to, !add, sums[thread][group]);
      });
    });
  }

 private:
  MOECALC_KERNEL RowVec<Real> input_vector(int row, int column) const {
    const int64_t from = gather == nullptr ? row : gather[row];
    return load<RowVec<Real>>(input + from * input_stride + column);
  }
};

}  // namespace moecalc::cuda
