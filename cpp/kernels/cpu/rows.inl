// Work on rows of features, vector by vector. Widths are whole numbers of vectors.
#pragma once

#include "kernels/cpu/simd.h"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// Rows of edges are worked on in chunks whose activations stay in the first-level cache.
constexpr int64_t kEdgeChunk = 16;

template <class Real>
inline void fill(Real* to, Real value, int64_t width) {
  for (int64_t column = 0; column < width; column += kLanes<Real>) store(to + column, splat(value));
}

template <class Real>
inline void copy_row(Real* to, const Real* from, int64_t width) {
  for (int64_t column = 0; column < width; column += kLanes<Real>) store(to + column, load(from + column));
}

template <class Real>
inline void add_row(Real* to, const Real* from, int64_t width) {
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    store(to + column, load(to + column) + load(from + column));
  }
}

/// One vector of the mix of a row: sum over experts of routing weight x output.
template <class Real>
inline Vec<Real> mix(const Real* outputs, const Real* routing, int64_t experts, int64_t stride,
                     int64_t column) {
  Vec<Real> total = routing[0] * load(outputs + column);
  for (int64_t k = 1; k < experts; ++k) total += routing[k] * load(outputs + k * stride + column);
  return total;
}

/// The dot product of two rows, not yet summed over the lanes: several of them are summed at once.
template <class Real>
inline Vec<Real> dot_lanes(const Real* left, const Real* right, int64_t width) {
  Vec<Real> total = Vec<Real>{};
  for (int64_t column = 0; column < width; column += kLanes<Real>) {
    total += load(left + column) * load(right + column);
  }
  return total;
}

/// Sums over the lanes of vectors that come one after another, put or added from `to` on. Call `end` after
/// the last.
template <class Real, class Number = Real>
class LaneSums {
 public:
  LaneSums(Number* to, bool added) : to_(to), added_(added) {}
  void push(Vec<Real> of_row) {
    rows_[count_] = of_row;
    if (++count_ < kLanes<Real>) return;
    Real values[kLanes<Real>];
    store(values, sums<Real>(rows_));
    put(values, kLanes<Real>);
    to_ += kLanes<Real>;
    count_ = 0;
  }
  void end() {
    Real values[kLanes<Real>];
    for (int64_t k = 0; k < count_; ++k) values[k] = sum<Real>(rows_[k]);
    put(values, count_);
  }

 private:
  void put(const Real* values, int64_t count) const {
    for (int64_t k = 0; k < count; ++k) to_[k] = (added_ ? to_[k] : Number(0)) + Number(values[k]);
  }

  Number* to_;
  bool added_;
  int64_t count_ = 0;
  Vec<Real> rows_[kLanes<Real>];
};

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
