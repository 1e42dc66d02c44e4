// Rows of a run in tiles: which they are, sums over them, and products that stay in shared memory.
//
// Rows (angles, edges) of a run are contiguous in memory and are taken kRows at a time; a tile may hold rows
// of several centres. Sums over the rows of an edge or a centre are sums of a tile in shared memory, added to
// global memory by the one block that owns the target: no atomics.
#pragma once

#include <cstdint>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/block.cuh"
#include "kernels/cuda/graph.cuh"
#include "kernels/cuda/product.cuh"
#include "kernels/cuda/vector.cuh"

namespace moecalc::cuda {

/// Rows first..first+rows-1: those of a tile.
struct Span {
  int first;
  int rows;
};

/// f(span) for the rows begin..end-1, a tile at a time.
template <class Format, class F>
MOECALC_KERNEL void for_tiles(int begin, int end, const F& f) {
  for (int first = begin; first < end; first += Format::kRows) {
    f(Span{first, end - first < Format::kRows ? end - first : Format::kRows});
  }
}

/// Centre of a row, given offsets of the rows of centres begin..end-1.
MOECALC_KERNEL int centre_of(const int* first, int begin, int end, int row) {
  int low = begin;
  int high = end - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// Rows of a tile that are summed: the first of them, `step` apart, before `end`.
struct Segment {
  bool is_first;
  int step;
  int end;
};

/// f(row, column, sum) for every segment; row: the first of it. segment_of(row): Segment of a row. `tile`:
/// rows of at most kChunk columns.
template <class Format, class Block, class SegmentOf, class F>
MOECALC_KERNEL void segment_sums(Block& block, const SharedRows<Format>& tile, int rows, int columns,
                                 const SegmentOf& segment_of, const F& f) {
  using Vector = RowVec<typename Format::Real>;
  constexpr int lanes = kChunk / Vector::kSize;
  block.each([&](int thread) {
    const int column = thread % lanes * Vector::kSize;
    if (column >= columns) return;
    for (int row = thread / lanes; row < rows; row += kThreads / lanes) {
      const Segment segment = segment_of(row);
      if (!segment.is_first) continue;
      const int end = segment.end < rows ? segment.end : rows;
      Vector sum = load<Vector>(tile.at(row, column));
      MOECALC_UNROLL_4
      for (int next = row + segment.step; next < end; next += segment.step) {
        sum += load<Vector>(tile.at(next, column));
      }
      f(row, column, sum);
    }
  });
}

/// A thread's vectors to a tile, also those beyond the rows and columns that count.
template <class Tile>
MOECALC_KERNEL void store_all(int thread, const SharedRows<typename Tile::Format>& to,
                              const typename Tile::Vector* values) {
  MOECALC_UNROLL
  for (int group = 0; group < Tile::kGroups; ++group) {
    store(to.at(Tile::row(thread, group), Tile::column(thread, group)), values[group]);
  }
}

/// out += chunk W: `chunk` has `inputs` columns, W and `out` have `width`.
template <class Format, class Block>
MOECALC_KERNEL void add_product(Block& block, const SharedRows<Format>& out, const SharedRows<Format>& chunk,
                                int rows, int inputs, const typename Format::Real* weights, int width) {
  for_chunks<Format>(width, [&](auto tile, int first) {
    using Tile = decltype(tile);
    block.each([&](int thread) {
      typename Tile::Vector sums[Tile::kGroups] = {};
      Tile::multiply(thread, sums, chunk, inputs, weight_columns<Tile>(weights, width, first, width - first));
      for_own<Tile>(thread, rows, width - first, [&](int group, int row, int column) {
        put(out.at(row, first + column), false, sums[group]);
      });
    });
  });
}

/// Rows of a tile to rows of `columns` of `to_stride` values in global memory.
template <class Format, class Block>
MOECALC_KERNEL void copy_rows(Block& block, const SharedRows<Format>& tile, int rows, int columns,
                              typename Format::Real* to, int64_t to_stride) {
  using Vector = RowVec<typename Format::Real>;
  block.each([&](int thread) {
    for_vectors<Vector>(thread, rows, columns, [&](int row, int column) {
      store(to + row * to_stride + column, load<Vector>(tile.at(row, column)));
    });
  });
}

/// Zeros in rows begin..end-1 of global memory.
template <class Real, class Block>
MOECALC_KERNEL void clear_rows(Block& block, Real* rows, int64_t begin, int64_t end, int64_t width) {
  block.each([&](int thread) {
    for (int64_t place = begin * width + thread; place < end * width; place += kThreads) {
      rows[place] = Real(0);
    }
  });
}

/// Dot products of the rows of a tile in shared memory, each in the parts of the threads that share the row.
template <class Format>
struct Dots {
  using Real = typename Format::Real;
  static constexpr int kSlots = kChunk / RowVec<Real>::kSize;  // most threads that share a row
  static constexpr int kStride = kSlots + 1;
  Real* values;

  static int64_t bytes() { return shared_size<Real>(Format::kRows * kStride); }
  template <class Block>
  MOECALC_KERNEL explicit Dots(Block& block) : values(block.template shared<Real>(Format::kRows * kStride)) {}

  template <class Block>
  MOECALC_KERNEL void clear(Block& block) const {
    block.each([&](int thread) {
      for (int place = thread; place < Format::kRows * kStride; place += kThreads) values[place] = Real(0);
    });
  }
  /// Adds what a thread has for each of its vectors of a tile, as far as they lie in `rows` rows and `width`
  /// columns.
  template <class Tile>
  MOECALC_KERNEL void add(int thread, int rows, int width, const Real* shares) const {
    for_own<Tile>(thread, rows, width, [&](int group, int row, int) {
      values[row * kStride + Tile::slot(thread)] += shares[group];
    });
  }
  MOECALC_KERNEL Real sum(int row) const {
    Real total = 0;
    for (int slot = 0; slot < kSlots; ++slot) total += values[row * kStride + slot];
    return total;
  }
};

/// Arrays in shared memory for a tile of rows and for their gradients. `Rows`: AngleRows or EdgeRows.
template <class Format, class Rows>
struct GradientRows : Rows {
  SharedRows<Format> gradient;  // of the rows' features, to which every chunk adds
  Dots<Format> d_switch;        // likewise

  template <class View>
  static int64_t bytes(const View& layer) {
    return Rows::bytes(layer) + SharedRows<Format>::bytes(Rows::width(layer)) + Dots<Format>::bytes();
  }
  template <class Block, class View>
  MOECALC_KERNEL GradientRows(Block& block, const View& layer)
      : Rows(block, layer), gradient(block, Rows::width(layer)), d_switch(block) {}
};

}  // namespace moecalc::cuda
