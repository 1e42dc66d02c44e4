// The fitting net and the energies of atoms (SPEC.md, section 8), and their gradients.
#pragma once

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/graph.cuh"
#include "kernels/cuda/product.cuh"

namespace moecalc::cuda {

/// One layer: y = activation(x W + b) [* timestep] [+ x, or + [x, x]]. The padding of `timestep` is zero.
template <class Real>
struct FittingLayer {
  int in = 0;
  int out = 0;
  int in_padded = 0;
  int out_padded = 0;
  int residual = 0;                         // 0, 1 or 2 times x
  const Real* matrix = nullptr;             // in_padded x out_padded
  const Real* matrix_transposed = nullptr;  // out_padded x in_padded
  const Real* bias = nullptr;               // (out_padded)
  const Real* timestep = nullptr;           // (out_padded), 1 where the net has none
  ActivationFunction<Real> activation;
};

/// x = [node, table[type], case], padded with zeros.
template <class Real>
struct FittingInput : GraphKernel<128> {
  static constexpr int kRows = 8;
  int n = 0;
  int n_padded = 0;
  int n_constant = 0;
  int out_padded = 0;
  const Real* node = nullptr;      // (n_node, n_padded)
  const Real* constant = nullptr;  // (n_types, n_constant)
  Real* out = nullptr;             // (n_local, out_padded)
  int64_t blocks() const { return blocks_for(graph.n_local, kRows); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int thread) {
      for (int at = thread; at < kRows * out_padded; at += kThreads) {
        const int64_t row = block.index() * kRows + at / out_padded;
        const int column = at % out_padded;
        if (row < graph.n_local) out[row * out_padded + column] = value(row, column);
      }
    });
  }

 private:
  MOECALC_KERNEL Real value(int64_t row, int column) const {
    if (column < n) return node[row * n_padded + column];
    if (column >= n + n_constant) return Real(0);
    return constant[static_cast<int64_t>(graph.type[row]) * n_constant + column - n];
  }
};

/// Base of the products of a layer of the fitting net: one block per tile of rows and kChunk columns.
template <class Format>
struct FittingKernel {
  using Real = typename Format::Real;
  using Tile = TileOf<Format, kChunk>;
  using Vector = typename Tile::Vector;
  static constexpr int kThreads = cuda::kThreads;
  FittingLayer<Real> map;
  int64_t n_row = 0;

  int64_t shared_bytes() const { return SharedRows<Format>::bytes(kSlice); }

 protected:
  /// Rows and columns of a block, from the first on.
  struct Place {
    int64_t row;
    int column;
    int rows;
    int columns;  // all that are left
  };

  int64_t blocks_of(int columns) const { return blocks_for(n_row, Format::kRows) * chunk_count(columns); }
  MOECALC_KERNEL Place place_of(int64_t block, int columns) const {
    const int across = chunk_count(columns);
    const int64_t row = block / across * Format::kRows;
    const int column = static_cast<int>(block % across) * kChunk;
    return {row, column, static_cast<int>(smaller<int64_t>(n_row - row, Format::kRows)), columns - column};
  }

  /// f(row, column, sum) for every number of a tile that counts.
  template <class Block, class Sums, class F>
  static MOECALC_KERNEL void for_sums(Block& block, const Place& place, Sums& sums, const F& f) {
    block.each([&](int thread) {
      for_own<Tile>(thread, place.rows, place.columns, [&](int group, int row, int column) {
        MOECALC_UNROLL
        for (int lane = 0; lane < Tile::kVector; ++lane) {
          f(place.row + row, place.column + column + lane, sums[thread][group][lane]);
        }
      });
    });
  }
};

/// Forward: y, and slope = activation' * timestep.
template <class Format>
struct FittingForward : FittingKernel<Format> {
  using Base = FittingKernel<Format>;
  using Base::map;
  using typename Base::Real;
  using typename Base::Tile;
  using typename Base::Vector;
  const Real* inputs = nullptr;  // (n_row, in_padded)
  Real* out = nullptr;           // (n_row, out_padded)
  Real* slope = nullptr;         // (n_row, out_padded)
  int64_t blocks() const { return this->blocks_of(map.out_padded); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const auto place = this->place_of(block.index(), map.out_padded);
    const SharedRows<Format> slice(block, kSlice);
    auto sums = block.template registers<Vector, Tile::kGroups>();
    block.each([&](int thread) {
      set_zero<Tile>(sums[thread]);
      for_own<Tile>(thread, place.rows, place.columns, [&](int group, int, int column) {
        sums[thread][group] = load<Vector>(map.bias + place.column + column);
      });
    });
    multiply_sliced<Tile>(block, sums, slice, place.rows, map.in_padded,
                          weight_columns<Tile>(map.matrix, map.out_padded, place.column, place.columns),
                          [&](int row, int column) {
                            return load<RowVec<Real>>(inputs + (place.row + row) * map.in_padded + column);
                          });
    this->for_sums(block, place, sums, [&](int64_t row, int column, Real sum) { write(row, column, sum); });
  }

 private:
  MOECALC_KERNEL void write(int64_t row, int column, Real pre_activation) const {
    const ValueAndSlope<Real> activated = map.activation(pre_activation);
    Real value = activated.value * map.timestep[column];
    if (map.residual > 0 && column < map.out) value += inputs[row * map.in_padded + column % map.in];
    out[row * map.out_padded + column] = value;
    slope[row * map.out_padded + column] = activated.slope * map.timestep[column];
  }
};

/// Backward: dx = (dy * slope) W^T [+ dy, or + both halves of dy].
template <class Format>
struct FittingBackward : FittingKernel<Format> {
  using Base = FittingKernel<Format>;
  using Base::map;
  using typename Base::Real;
  using typename Base::Tile;
  using typename Base::Vector;
  const Real* d_out = nullptr;  // (n_row, out_padded)
  const Real* slope = nullptr;  // (n_row, out_padded)
  Real* d_inputs = nullptr;     // (n_row, in_padded)
  int64_t blocks() const { return this->blocks_of(map.in_padded); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const auto place = this->place_of(block.index(), map.in_padded);
    const SharedRows<Format> slice(block, kSlice);
    auto sums = block.template registers<Vector, Tile::kGroups>();
    block.each([&](int thread) { set_zero<Tile>(sums[thread]); });
    multiply_sliced<Tile>(
        block, sums, slice, place.rows, map.out_padded,
        weight_columns<Tile>(map.matrix_transposed, map.in_padded, place.column, place.columns),
        [&](int row, int column) {
          const int64_t at = (place.row + row) * map.out_padded + column;
          return load<RowVec<Real>>(d_out + at) * load<RowVec<Real>>(slope + at);
        });
    this->for_sums(block, place, sums, [&](int64_t row, int column, Real sum) { write(row, column, sum); });
  }

 private:
  MOECALC_KERNEL void write(int64_t row, int column, Real sum) const {
    if (map.residual > 0 && column < map.in) {
      const Real* gradient = d_out + row * map.out_padded;
      sum += gradient[column];
      if (map.residual == 2) sum += gradient[map.in + column];
    }
    d_inputs[row * map.in_padded + column] = sum;
  }
};

/// Energies in engine order, (x . w + b + shift) * weight, and the gradient of their sum with respect to x.
template <class Real>
struct Energies : GraphKernel<128> {
  static constexpr int kLanes = 16;  // threads of an atom
  static constexpr int kAtoms = kThreads / kLanes;
  int in_padded = 0;
  const Real* inputs = nullptr;  // (n_local, in_padded)
  const Real* matrix = nullptr;  // (in_padded)
  double bias = 0.0;
  const double* shift = nullptr;   // (n_types)
  const double* weight = nullptr;  // (n_types)
  double* energies = nullptr;      // (n_local)
  Real* d_inputs = nullptr;        // (n_local, in_padded)
  int64_t blocks() const { return blocks_for(graph.n_local, kAtoms); }
  int64_t shared_bytes() const { return shared_size<Real>(kThreads); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    Real* partial = block.template shared<Real>(kThreads);
    const int64_t first = block.index() * kAtoms;
    block.each([&](int thread) {
      const int64_t atom = first + thread / kLanes;
      partial[thread] = atom < graph.n_local ? add_columns(atom, thread % kLanes) : Real(0);
    });
    block.sync();
    block.each([&](int thread) {
      const int64_t atom = first + thread;
      if (thread >= kAtoms || atom >= graph.n_local) return;
      Real total = 0;
      for (int lane = 0; lane < kLanes; ++lane) total += partial[thread * kLanes + lane];
      const int type = graph.type[atom];
      energies[graph.engine_row[atom]] = (double(total + Real(bias)) + shift[type]) * weight[type];
    });
  }

 private:
  /// The share of one lane in x . w of an atom; writes the gradient of its columns.
  MOECALC_KERNEL Real add_columns(int64_t atom, int lane) const {
    const Real factor = Real(weight[graph.type[atom]]);
    Real total = 0;
    for (int column = lane; column < in_padded; column += kLanes) {
      total += inputs[atom * in_padded + column] * matrix[column];
      d_inputs[atom * in_padded + column] = factor * matrix[column];
    }
    return total;
  }
};

/// First columns of rows, padded with zeros.
template <class Real>
struct TakeColumns {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 8;
  int64_t n_row = 0;
  int width = 0;  // columns to take
  int in_padded = 0;
  int out_padded = 0;
  const Real* inputs = nullptr;  // (n_row, in_padded)
  Real* out = nullptr;           // (n_row, out_padded)
  int64_t blocks() const { return blocks_for(n_row, kRows); }
  int64_t shared_bytes() const { return 0; }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    block.each([&](int thread) {
      for (int at = thread; at < kRows * out_padded; at += kThreads) {
        const int64_t row = block.index() * kRows + at / out_padded;
        const int column = at % out_padded;
        if (row >= n_row) continue;
        out[row * out_padded + column] = column < width ? inputs[row * in_padded + column] : Real(0);
      }
    });
  }
};

}  // namespace moecalc::cuda
