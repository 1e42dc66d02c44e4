// Vectors of one instruction set. Included once per set: MOECALC_ISA names its namespace,
// MOECALC_VECTOR_BYTES its width.
#include <cstdint>
#include <cstring>

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
template <class T>
inline T sum(Vec<T> x) {
  T s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += x[i];
  return s;
}
template <class I>
inline bool any(I mask) {
  uint64_t words[sizeof(I) / 8];
  std::memcpy(words, &mask, sizeof(I));
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
}

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
  return y * reinterpret_cast<Vec<float>>((reinterpret_cast<Int>(t) + 127) << 23);
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
  return y * reinterpret_cast<Vec<double>>((reinterpret_cast<Int>(t) + 1023) << 52);
}

template <class T>
inline Vec<T> logistic(Vec<T> x) {
  return T(1) / (T(1) + exponential(-x));
}

}  // namespace moecalc::ops::MOECALC_ISA
