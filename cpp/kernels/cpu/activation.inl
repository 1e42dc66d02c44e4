// Activation functions with their slopes (SPEC.md, section 6).
#pragma once

#include "kernels/common/activation.h"
#include "kernels/cpu/simd.h"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

template <class Real>
struct Activated {
  Vec<Real> value;
  Vec<Real> slope;
};

/// Constants of silut.
template <class Real>
struct Tail {
  Real threshold;
  Real slope;
  Real offset;
};

/// tanh(x / 2) = 1 - 2 / (exp(x) + 1).
template <class Real>
inline Vec<Real> tanh_of_half(const Exponential<Real>& exponential, Vec<Real> x) {
  return Real(1) - Real(2) * reciprocal(exponential(x) + Real(1));
}

/// silu: x s, s = 1 / (1 + exp(-x)), slope s + x s (1 - s). silut: from the threshold on
/// tanh(g (x - threshold)) + offset instead. Few values are there, so it is computed only if one is.
template <class Real, bool with_tail, bool with_slope>
inline Activated<Real> silu(const Exponential<Real>& exponential, Vec<Real> x, const Tail<Real>& tail) {
  Activated<Real> out{};
  const Vec<Real> gate = logistic(exponential, x);
  out.value = x * gate;
  if constexpr (with_slope) out.slope = gate + out.value * (Real(1) - gate);
  if constexpr (with_tail) {
    if (__builtin_expect(any_at_least(x, tail.threshold), 0)) {
      const auto above = x >= splat(tail.threshold);
      const Vec<Real> bent = tanh_of_half(exponential, Real(2) * tail.slope * (x - tail.threshold));
      out.value = above ? bent + tail.offset : out.value;
      if constexpr (with_slope) out.slope = above ? tail.slope * (Real(1) - bent * bent) : out.slope;
    }
  }
  return out;
}

/// relu: max(x, 0); relu6: min(max(x, 0), 6).
template <class Real, bool with_limit, bool with_slope>
inline Activated<Real> relu(Vec<Real> x) {
  Activated<Real> out{};
  const Vec<Real> zero = Vec<Real>{};
  const Vec<Real> one = splat(Real(1));
  const Vec<Real> six = splat(Real(6));
  out.value = x > zero ? x : zero;
  if constexpr (with_slope) out.slope = x > zero ? one : zero;
  if constexpr (with_limit) {
    if constexpr (with_slope) out.slope = x < six ? out.slope : zero;
    out.value = out.value < six ? out.value : six;
  }
  return out;
}

/// gelu in its tanh form: x (1 + w) / 2, w = tanh(scale (x + cubic x^3)), scale = sqrt(2 / pi).
template <class Real, bool with_slope>
inline Activated<Real> gelu(const Exponential<Real>& exponential, Vec<Real> x) {
  constexpr Real scale = Real(0.79788456080286535588);
  constexpr Real cubic = Real(0.044715);
  Activated<Real> out{};
  const Vec<Real> bent = tanh_of_half(exponential, Real(2) * scale * (x + cubic * x * x * x));
  out.value = Real(0.5) * x * (Real(1) + bent);
  if constexpr (with_slope) {
    out.slope = Real(0.5) * (Real(1) + bent) +
                Real(0.5) * x * (Real(1) - bent * bent) * scale * (Real(1) + Real(3) * cubic * x * x);
  }
  return out;
}

template <class Real, ActivationKind kind, bool with_slope>
inline Activated<Real> apply(const Exponential<Real>& exponential, Vec<Real> x, const Tail<Real>& tail) {
  Activated<Real> out{};
  if constexpr (kind == ActivationKind::silu || kind == ActivationKind::silut) {
    out = silu<Real, kind == ActivationKind::silut, with_slope>(exponential, x, tail);
  } else if constexpr (kind == ActivationKind::tanh) {
    out.value = tanh_of_half(exponential, Real(2) * x);
    if constexpr (with_slope) out.slope = Real(1) - out.value * out.value;
  } else if constexpr (kind == ActivationKind::sigmoid) {
    out.value = logistic(exponential, x);
    if constexpr (with_slope) out.slope = out.value * (Real(1) - out.value);
  } else if constexpr (kind == ActivationKind::relu || kind == ActivationKind::relu6) {
    out = relu<Real, kind == ActivationKind::relu6, with_slope>(x);
  } else if constexpr (kind == ActivationKind::gelu) {
    out = gelu<Real, with_slope>(exponential, x);
  } else {
    out.value = x;
    if constexpr (with_slope) out.slope = splat(Real(1));
  }
  return out;
}

// Not inlined: the caller's loops would take registers from the constants.
template <class Real, ActivationKind kind, bool with_slope>
[[gnu::noinline]] void apply_to_all(const Activation& activation, Real* values, Real* slope, int64_t count) {
  const Tail<Real> tail{Real(activation.threshold), Real(activation.slope), Real(activation.offset)};
  const Exponential<Real> exponential;
  for (int64_t i = 0; i < count; i += kLanes<Real>) {
    const Activated<Real> out = apply<Real, kind, with_slope>(exponential, load(values + i), tail);
    store(values + i, out.value);
    if constexpr (with_slope) store(slope + i, out.slope);
  }
}

template <class Real, bool with_slope>
void dispatch(const Activation& activation, Real* values, Real* slope, int64_t count) {
  using Kind = ActivationKind;
  switch (activation.kind) {
    case Kind::linear:
      return apply_to_all<Real, Kind::linear, with_slope>(activation, values, slope, count);
    case Kind::silu:
      return apply_to_all<Real, Kind::silu, with_slope>(activation, values, slope, count);
    case Kind::silut:
      return apply_to_all<Real, Kind::silut, with_slope>(activation, values, slope, count);
    case Kind::tanh:
      return apply_to_all<Real, Kind::tanh, with_slope>(activation, values, slope, count);
    case Kind::sigmoid:
      return apply_to_all<Real, Kind::sigmoid, with_slope>(activation, values, slope, count);
    case Kind::relu:
      return apply_to_all<Real, Kind::relu, with_slope>(activation, values, slope, count);
    case Kind::relu6:
      return apply_to_all<Real, Kind::relu6, with_slope>(activation, values, slope, count);
    case Kind::gelu:
      return apply_to_all<Real, Kind::gelu, with_slope>(activation, values, slope, count);
  }
}

/// x -> activation(x) in place.
template <class Real>
void activate(const Activation& activation, Real* values, int64_t count) {
  dispatch<Real, false>(activation, values, nullptr, count);
}

/// The same, and slope = activation'(x).
template <class Real>
void activate_with_slope(const Activation& activation, Real* values, Real* slope, int64_t count) {
  dispatch<Real, true>(activation, values, slope, count);
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
