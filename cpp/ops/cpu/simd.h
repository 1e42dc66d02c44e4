// Vectors of one instruction set. Included once per set: MOECALC_ISA names its namespace,
// MOECALC_VECTOR_BYTES its width.
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace moecalc::ops::MOECALC_ISA {

template <class T>
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

template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = MOECALC_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = x;
}
template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
/// Sum of the lanes, by halves: one after another they would wait for each other.
template <class T>
inline T sum(Vec<T> x) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) {
    return _mm512_reduce_add_ps(x);
  } else {
    return _mm512_reduce_add_pd(x);
  }
#else
  T lanes[kLanes<T>];
  std::memcpy(lanes, &x, sizeof(x));
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}
/// Whether any lane is at least `limit`.
#ifdef __AVX512F__
inline bool any_at_least(Vec<float> x, float limit) {
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ) != 0;
}
inline bool any_at_least(Vec<double> x, double limit) {
  return _mm512_cmp_pd_mask(x, _mm512_set1_pd(limit), _CMP_GE_OQ) != 0;
}
#else
template <class V, class T>
inline bool any_at_least(V x, T limit) {
  const auto mask = x >= splat(limit);
  uint64_t words[sizeof(mask) / 8];
  std::memcpy(words, &mask, sizeof(mask));
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
}
#endif

#ifdef __AVX512F__

// Activations take nearly as long as the products, so AVX-512 has its own exp and 1/(1 + exp(-x)), in half
// the instructions: 2^n by vscalef, 2^f on [-1/2, 1/2] by a polynomial (Chebyshev interpolation of degree 6
// and 11, relative errors 3e-9 and 4e-18), the quotient by an approximate reciprocal (14 bits) and Newton
// steps. About 1 ulp. In _mm512_min and _mm512_max a NaN in the second operand stays.

/// A constant that the compiler keeps in a register: as operands in memory, every one costs a load, and the
/// loads took longer than the arithmetic.
template <class T>
inline Vec<T> in_register(T value) {
  Vec<T> x = splat(value);
  asm("" : "+v"(x));
  return x;
}

/// exp(x), and exp(-x) for x that is not infinite, where it is 0 far below the smallest number; an object
/// because of its constants.
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
  Vec<float> low = in_register(-87.0f), high = in_register(88.0f), log2e = in_register(1.44269504f);
  Vec<float> c0 = in_register(1.54614446985691e-4f), c1 = in_register(1.34004281776158e-3f),
             c2 = in_register(9.61805667852464e-3f), c3 = in_register(5.55032723026670e-2f),
             c4 = in_register(2.40226509222888e-1f), c5 = in_register(6.93147206702833e-1f),
             one = in_register(1.0f);

  Vec<float> operator()(Vec<float> x) const {
    return power(_mm512_max_ps(low, _mm512_min_ps(high, x)), log2e);
  }
  Vec<float> of_minus(Vec<float> x) const { return power(_mm512_max_ps(-high, x), -log2e); }

 private:
  Vec<float> power(Vec<float> x, Vec<float> factor) const {
    const __m512 n = _mm512_roundscale_ps(x * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_fmsub_ps(x, factor, n);
    const __m512 z = (((((c0 * f + c1) * f + c2) * f + c3) * f + c4) * f + c5) * f + one;
    return _mm512_scalef_ps(z, n);
  }
};

template <>
struct Exponential<double> {
  static constexpr int kTerms = 11;
  Vec<double> low = in_register(-708.0), high = in_register(708.0), log2e = in_register(1.4426950408889634),
              rest = in_register(2.0355273740931033e-17), first = in_register(4.45581790833606449e-10);
  Vec<double> c[kTerms] = {in_register(7.07419429728852101e-9),
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
    const __m512d n = _mm512_roundscale_pd(x * factor, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512d f = _mm512_fmadd_pd(x, remainder, _mm512_fmsub_pd(x, factor, n));
    __m512d z = first;
#pragma GCC unroll 16
    for (int i = 0; i < kTerms; ++i) z = z * f + c[i];
    return _mm512_scalef_pd(z, n);
  }
};

/// 1 / x for 1 <= x.
inline Vec<float> reciprocal(Vec<float> x) {
  const __m512 y = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y);
}
inline Vec<double> reciprocal(Vec<double> x) {
  const __m512d one = _mm512_set1_pd(1.0);
  __m512d y = _mm512_rcp14_pd(x);
  y = _mm512_fmadd_pd(y, _mm512_fnmadd_pd(x, y, one), y);
  return _mm512_fmadd_pd(y, _mm512_fnmadd_pd(x, y, one), y);
}

#else

// Activations take as long as the products, so their exponential matters.
//
// exp: reduction by powers of two, polynomial (float: Cephes' minimax; double: Taylor, |r| < 0.35), about 1
// ulp. The result is scaled by a product, not by exponent arithmetic, so that NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
  const Vec<float> low = splat(-87.0f), high = splat(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> t = x * 1.44269504088896341f + magic;
  const Vec<float> n = t - magic;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  typedef VectorOf<float>::integer Int;
  return y * reinterpret_cast<Vec<float> >((reinterpret_cast<Int>(t) + 127) << 23);
}

inline Vec<double> exponential(Vec<double> x) {
  const Vec<double> low = splat(-708.0), high = splat(709.0);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<double> magic = splat(6755399441055744.0);  // 1.5 * 2^52
  const Vec<double> t = x * 1.4426950408889634074 + magic;
  const Vec<double> n = t - magic;
  const Vec<double> r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  constexpr double c[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  Vec<double> y = splat(c[0]);
  for (int i = 1; i < 14; ++i) y = y * r + c[i];
  typedef VectorOf<double>::integer Int;
  return y * reinterpret_cast<Vec<double> >((reinterpret_cast<Int>(t) + 1023) << 52);
}

/// 1 / x for 1 <= x.
template <class V>
inline V reciprocal(V x) {
  return 1 / x;
}

template <class T>
struct Exponential {
  Vec<T> operator()(Vec<T> x) const { return exponential(x); }
  Vec<T> of_minus(Vec<T> x) const { return exponential(-x); }
};

#endif

template <class T>
inline Vec<T> logistic(const Exponential<T>& exponential, Vec<T> x) {
  return reciprocal(T(1) + exponential.of_minus(x));
}

}  // namespace moecalc::ops::MOECALC_ISA
