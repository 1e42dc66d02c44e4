// Vectors of one instruction set, and the exponential that activations need. Included once per set:
// MOECALC_ISA names its namespace, MOECALC_VECTOR_BYTES its width.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace moecalc::kernels::MOECALC_ISA {

template <class Real>
struct VectorOf;

template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(MOECALC_VECTOR_BYTES)));
  typedef float unaligned __attribute__((vector_size(MOECALC_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(MOECALC_VECTOR_BYTES)));
};

template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(MOECALC_VECTOR_BYTES)));
  typedef double unaligned __attribute__((vector_size(MOECALC_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(MOECALC_VECTOR_BYTES)));
};

template <class Real>
using Vec = typename VectorOf<Real>::type;
template <class Real>
constexpr int64_t kLanes = MOECALC_VECTOR_BYTES / static_cast<int64_t>(sizeof(Real));

template <class Real>
inline Vec<Real> load(const Real* from) {
  return *reinterpret_cast<const typename VectorOf<Real>::unaligned*>(from);
}
template <class Real>
inline void store(Real* to, Vec<Real> value) {
  *reinterpret_cast<typename VectorOf<Real>::unaligned*>(to) = value;
}
/// The same number in every lane. Minus zero and not plus zero, which would change -0 and so cannot be left
/// out: an addition and a shuffle for every factor of the products, where this is a load.
template <class Real>
inline Vec<Real> splat(Real value) {
  return value - Vec<Real>{};
}

/// Sum of the lanes, by halves: one after another they would wait for each other.
template <class Real>
inline Real sum(Vec<Real> value) {
#ifdef __AVX512F__
  if constexpr (sizeof(Real) == 4) {
    return _mm512_reduce_add_ps(value);
  } else {
    return _mm512_reduce_add_pd(value);
  }
#else
  Real lanes[kLanes<Real>];
  std::memcpy(lanes, &value, sizeof(value));
  for (int half = kLanes<Real> / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
#endif
}

/// Lanes of sums: of every group of `group` lanes of `left`, then of `right`, its halves added.
template <class Real, int group>
inline Vec<Real> add_halves(Vec<Real> left, Vec<Real> right) {
  constexpr int half = group / 2;
  return []<int... lane>(std::integer_sequence<int, lane...>, Vec<Real> a, Vec<Real> b) {
    return __builtin_shufflevector(a, b, (lane / half * group + lane % half)...) +
           __builtin_shufflevector(a, b, (lane / half * group + lane % half + half)...);
  }(std::make_integer_sequence<int, static_cast<int>(kLanes<Real>)>(), left, right);
}

/// The sums of the lanes of as many rows as a vector has lanes, each to the last bit that of `sum`: a third
/// of the instructions of one `sum` after another.
template <class Real, int rows = static_cast<int>(kLanes<Real>)>
inline Vec<Real> sums(const Vec<Real>* of) {
  if constexpr (rows == 1) {
    return of[0];
  } else {
    constexpr int group = static_cast<int>(kLanes<Real>) / (rows / 2);
    return add_halves<Real, group>(sums<Real, rows / 2>(of), sums<Real, rows / 2>(of + rows / 2));
  }
}

/// Whether any lane is at least `limit`.
#ifdef __AVX512F__
inline bool any_at_least(Vec<float> value, float limit) {
  return _mm512_cmp_ps_mask(value, _mm512_set1_ps(limit), _CMP_GE_OQ) != 0;
}
inline bool any_at_least(Vec<double> value, double limit) {
  return _mm512_cmp_pd_mask(value, _mm512_set1_pd(limit), _CMP_GE_OQ) != 0;
}
#else
template <class Vector, class Real>
inline bool any_at_least(Vector value, Real limit) {
  const auto mask = value >= splat(limit);
  uint64_t words[sizeof(mask) / 8];
  std::memcpy(words, &mask, sizeof(mask));
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
}
#endif

#ifdef __AVX512F__

// Activations take nearly as long as the products, so AVX-512 has its own exp and 1/(1 + exp(-x)), in half
// the instructions: exp(x) = 2^(whole + fraction), with 2^whole by vscalef, 2^fraction on [-1/2, 1/2] by a
// polynomial (Chebyshev interpolation of degree 6 and 11, relative errors 3e-9 and 4e-18), the quotient by an
// approximate reciprocal (14 bits) and Newton steps. About 1 ulp. In _mm512_min and _mm512_max a NaN in the
// second operand stays.

/// A constant that the compiler keeps in a register: as operands in memory, every one costs a load, and the
/// loads took longer than the arithmetic.
template <class Real>
inline Vec<Real> in_register(Real value) {
  Vec<Real> kept = splat(value);
  asm("" : "+v"(kept));
  return kept;
}

/// exp(x), and exp(-x) for x that is not infinite, where it is 0 far below the smallest number; an object
/// because of its constants.
template <class Real>
struct Exponential;

template <>
struct Exponential<float> {
  Vec<float> low = in_register(-87.0f);
  Vec<float> high = in_register(88.0f);
  Vec<float> log2e = in_register(1.44269504f);
  // coefficients of the polynomial, highest power first
  Vec<float> power6 = in_register(1.54614446985691e-4f);
  Vec<float> power5 = in_register(1.34004281776158e-3f);
  Vec<float> power4 = in_register(9.61805667852464e-3f);
  Vec<float> power3 = in_register(5.55032723026670e-2f);
  Vec<float> power2 = in_register(2.40226509222888e-1f);
  Vec<float> power1 = in_register(6.93147206702833e-1f);
  Vec<float> one = in_register(1.0f);

  Vec<float> operator()(Vec<float> x) const {
    return power(_mm512_max_ps(low, _mm512_min_ps(high, x)), log2e);
  }
  Vec<float> of_minus(Vec<float> x) const { return power(_mm512_max_ps(-high, x), -log2e); }

 private:
  Vec<float> power(Vec<float> x, Vec<float> factor) const {
    const __m512 whole = _mm512_roundscale_ps(x * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 fraction = _mm512_fmsub_ps(x, factor, whole);
    const __m512 three = ((power6 * fraction + power5) * fraction + power4) * fraction + power3;
    const __m512 result = ((three * fraction + power2) * fraction + power1) * fraction + one;
    return _mm512_scalef_ps(result, whole);
  }
};

template <>
struct Exponential<double> {
  static constexpr int kTerms = 11;
  Vec<double> low = in_register(-708.0);
  Vec<double> high = in_register(708.0);
  Vec<double> log2e = in_register(1.4426950408889634);
  Vec<double> rest = in_register(2.0355273740931033e-17);  // of log2e
  // coefficients of the polynomial, highest power first
  Vec<double> power11 = in_register(4.45581790833606449e-10);
  Vec<double> powers[kTerms] = {in_register(7.07419429728852101e-9),
                                in_register(1.01780570877339411e-7),
                                in_register(1.32154325359123762e-6),
                                in_register(1.52527338415567726e-5),
                                in_register(1.54035304637243542e-4),
                                in_register(1.33335581464064707e-3),
                                in_register(9.61812910758725667e-3),
                                in_register(5.5504108664821627e-2),
                                in_register(2.40226506959101596e-1),
                                in_register(6.93147180559945309e-1),
                                in_register(1.0)};

  Vec<double> operator()(Vec<double> x) const {
    return power(_mm512_max_pd(low, _mm512_min_pd(high, x)), log2e, rest);
  }
  Vec<double> of_minus(Vec<double> x) const { return power(_mm512_max_pd(-high, x), -log2e, -rest); }

 private:
  Vec<double> power(Vec<double> x, Vec<double> factor, Vec<double> remainder) const {
    const __m512d whole = _mm512_roundscale_pd(x * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512d fraction = _mm512_fmadd_pd(x, remainder, _mm512_fmsub_pd(x, factor, whole));
    __m512d result = power11;
#pragma GCC unroll 16
    for (int term = 0; term < kTerms; ++term) result = result * fraction + powers[term];
    return _mm512_scalef_pd(result, whole);
  }
};

/// 1 / x for 1 <= x.
inline Vec<float> reciprocal(Vec<float> x) {
  const __m512 guess = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(1.0f)), guess);
}
inline Vec<double> reciprocal(Vec<double> x) {
  const __m512d one = _mm512_set1_pd(1.0);
  __m512d guess = _mm512_rcp14_pd(x);
  guess = _mm512_fmadd_pd(guess, _mm512_fnmadd_pd(x, guess, one), guess);
  return _mm512_fmadd_pd(guess, _mm512_fnmadd_pd(x, guess, one), guess);
}

#else

// Activations take as long as the products, so their exponential matters.
//
// exp: reduction by powers of two, polynomial (float: Cephes' minimax; double: Taylor, |rest| < 0.35), about
// 1 ulp. The result is scaled by a product, not by exponent arithmetic: NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
  const Vec<float> low = splat(-87.0f);
  const Vec<float> high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x * 1.44269504088896341f + magic;
  const Vec<float> whole = shifted - magic;
  const Vec<float> rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec<float> result = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  result = result * rest + 8.3334519073e-3f;
  result = result * rest + 4.1665795894e-2f;
  result = result * rest + 1.6666665459e-1f;
  result = result * rest + 5.0000001201e-1f;
  result = result * (rest * rest) + rest + 1.0f;
  typedef VectorOf<float>::integer Int;
  return result * reinterpret_cast<Vec<float> >((reinterpret_cast<Int>(shifted) + 127) << 23);
}

inline Vec<double> exponential(Vec<double> x) {
  const Vec<double> low = splat(-708.0);
  const Vec<double> high = splat(709.0);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<double> magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> shifted = x * 1.4426950408889634074 + magic;
  const Vec<double> whole = shifted - magic;
  const Vec<double> rest = (x - whole * 6.93145751953125e-1) - whole * 1.42860682030941723212e-6;
  constexpr double taylor[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  Vec<double> result = splat(taylor[0]);
  for (int term = 1; term < 14; ++term) result = result * rest + taylor[term];
  typedef VectorOf<double>::integer Int;
  return result * reinterpret_cast<Vec<double> >((reinterpret_cast<Int>(shifted) + 1023) << 52);
}

/// 1 / x for 1 <= x.
template <class Vector>
inline Vector reciprocal(Vector x) {
  return 1 / x;
}

template <class Real>
struct Exponential {
  Vec<Real> operator()(Vec<Real> x) const { return exponential(x); }
  Vec<Real> of_minus(Vec<Real> x) const { return exponential(-x); }
};

#endif

/// 1 / (1 + exp(-x)).
template <class Real>
inline Vec<Real> logistic(const Exponential<Real>& exponential, Vec<Real> x) {
  return reciprocal(Real(1) + exponential.of_minus(x));
}

}  // namespace moecalc::kernels::MOECALC_ISA
