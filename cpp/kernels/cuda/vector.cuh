// Vectors of numbers that one access to memory moves.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/common/host_device.h"

// The emulation is compiled with few optimisations, but its inner loops consist of these.
#if defined(__CUDACC__)
#define MOECALC_VECTOR __device__ __forceinline__
#else
#define MOECALC_VECTOR __attribute__((always_inline)) inline
#endif

namespace moecalc::cuda {

/// SIZE numbers; arithmetic is element by element.
template <class Number, int SIZE>
struct alignas(SIZE * sizeof(Number)) Vec {
  using Element = Number;
  static constexpr int kSize = SIZE;
  Number values[SIZE];

  MOECALC_VECTOR Number& operator[](int lane) { return values[lane]; }
  MOECALC_VECTOR const Number& operator[](int lane) const { return values[lane]; }

  MOECALC_VECTOR Vec& operator+=(const Vec& other) {
    MOECALC_UNROLL
    for (int lane = 0; lane < SIZE; ++lane) values[lane] += other.values[lane];
    return *this;
  }
  MOECALC_VECTOR Vec& operator*=(Number factor) {
    MOECALC_UNROLL
    for (int lane = 0; lane < SIZE; ++lane) values[lane] *= factor;
    return *this;
  }

  friend MOECALC_VECTOR Vec operator+(const Vec& left, const Vec& right) {
    Vec sum;
    MOECALC_UNROLL
    for (int lane = 0; lane < SIZE; ++lane) sum.values[lane] = left.values[lane] + right.values[lane];
    return sum;
  }
  friend MOECALC_VECTOR Vec operator*(const Vec& left, const Vec& right) {
    Vec product;
    MOECALC_UNROLL
    for (int lane = 0; lane < SIZE; ++lane) product.values[lane] = left.values[lane] * right.values[lane];
    return product;
  }
  friend MOECALC_VECTOR Vec operator*(Number factor, const Vec& right) {
    Vec product;
    MOECALC_UNROLL
    for (int lane = 0; lane < SIZE; ++lane) product.values[lane] = factor * right.values[lane];
    return product;
  }
};

/// Sum of the products of their elements.
template <class Number, int SIZE>
MOECALC_VECTOR Number dot(const Vec<Number, SIZE>& left, const Vec<Number, SIZE>& right) {
  Number sum = left.values[0] * right.values[0];
  MOECALC_UNROLL
  for (int lane = 1; lane < SIZE; ++lane) sum += left.values[lane] * right.values[lane];
  return sum;
}

/// The widest: 16 bytes. Rows of features are whole ones.
template <class Real>
using RowVec = Vec<Real, 16 / static_cast<int>(sizeof(Real))>;

/// The vector that starts at an address, a multiple of its size.
template <class Vector>
MOECALC_VECTOR Vector load(const typename Vector::Element* from) {
  return *reinterpret_cast<const Vector*>(from);
}
template <class Vector>
MOECALC_VECTOR void store(typename Vector::Element* to, const Vector& value) {
  *reinterpret_cast<Vector*>(to) = value;
}

/// to = value where `fresh`, else to += value.
template <class Vector>
MOECALC_VECTOR void put(typename Vector::Element* to, bool fresh, Vector value) {
  if (!fresh) value += load<Vector>(to);
  store(to, value);
}

/// Reads of weights, which no kernel writes: they may stay in the read-only cache and overtake stores.
template <class Vector, class Number>
MOECALC_VECTOR Vector load_weight(const Number* from) {
#if defined(__CUDACC__)
  using Word = std::conditional_t<sizeof(Vector) == 16, uint4, uint2>;
  const Word word = __ldg(reinterpret_cast<const Word*>(from));
  return *reinterpret_cast<const Vector*>(&word);
#else
  return *reinterpret_cast<const Vector*>(from);
#endif
}

}  // namespace moecalc::cuda
