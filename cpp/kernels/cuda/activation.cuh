// Activations and their slopes (formulas: SPEC.md, section 6), with the fast exponential of the device.
#pragma once

#include <cmath>

#include "kernels/common/activation.h"
#include "kernels/common/host_device.h"

#if defined(__CUDACC__)
#define MOECALC_KERNEL_CALL __device__ __noinline__
#else
#define MOECALC_KERNEL_CALL inline
#endif

namespace moecalc::cuda {

MOECALC_KERNEL float exponential(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return std::exp(x);
#endif
}
MOECALC_KERNEL double exponential(double x) { return exp(x); }
MOECALC_KERNEL float reciprocal(float x) {
#if defined(__CUDACC__)
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}
MOECALC_KERNEL double reciprocal(double x) { return 1.0 / x; }

/// 1 / (1 + exp(-x))
template <class Real>
MOECALC_KERNEL Real logistic(Real x) {
  // beyond the limits the exponential overflows, and with it the fast reciprocal
  const Real limit = sizeof(Real) == 4 ? Real(80) : Real(700);
  return reciprocal(Real(1) + exponential(x < -limit ? limit : -x));
}
/// tanh by the exponential, which is bounded.
template <class Real>
MOECALC_KERNEL Real bounded_tanh(Real x) {
  return Real(2) * logistic(Real(2) * x) - Real(1);
}
/// max(x, 0), but NaN stays NaN.
template <class Real>
MOECALC_KERNEL Real positive_part(Real x) {
  return x > Real(0) ? x : (x == x ? Real(0) : x);
}

/// phi(x) and phi'(x).
template <class Real>
struct ValueAndSlope {
  Real value;
  Real slope;
};

/// gelu in its tanh form: x (1 + tanh(scale (x + cubic x^3))) / 2.
template <class Real>
MOECALC_KERNEL ValueAndSlope<Real> gelu(Real x) {
  const Real scale = Real(0.79788456080286535588);
  const Real cubic = Real(0.044715);
  const Real tanh = bounded_tanh(scale * (x + cubic * x * x * x));
  const Real value = Real(0.5) * x * (Real(1) + tanh);
  const Real slope = Real(0.5) * (Real(1) + tanh) +
                     Real(0.5) * x * (Real(1) - tanh * tanh) * scale * (Real(1) + Real(3) * cubic * x * x);
  return {value, slope};
}

/// All kinds but silu and silut. A call: the common kinds are not to pay for these with registers.
template <class Real>
MOECALC_KERNEL_CALL ValueAndSlope<Real> other_activation(kernels::ActivationKind kind, Real x) {
  using Kind = kernels::ActivationKind;
  switch (kind) {
    case Kind::tanh: {
      const Real value = bounded_tanh(x);
      return {value, Real(1) - value * value};
    }
    case Kind::sigmoid: {
      const Real value = logistic(x);
      return {value, value * (Real(1) - value)};
    }
    case Kind::relu:
      return {positive_part(x), x > Real(0) ? Real(1) : Real(0)};
    case Kind::relu6: {
      const Real value = positive_part(x);
      return {value < Real(6) ? value : (value == value ? Real(6) : value),
              x > Real(0) && x < Real(6) ? Real(1) : Real(0)};
    }
    case Kind::gelu:
      return gelu(x);
    default:
      return {x, Real(1)};
  }
}

/// phi and phi'. silu is silut with an infinite threshold:
/// phi(x) = x logistic(x) below the threshold, then tanh(slope (x - threshold)) + offset.
template <class Real>
struct ActivationFunction {
  kernels::ActivationKind kind;
  Real threshold;
  Real slope;
  Real offset;

  explicit ActivationFunction(const kernels::Activation& activation = {})
      : kind(activation.kind),
        threshold(Real(activation.threshold)),
        slope(Real(activation.slope)),
        offset(Real(activation.offset)) {
    if (kind == kernels::ActivationKind::silu) {
      kind = kernels::ActivationKind::silut;
      threshold = Real(INFINITY);
    }
  }

  MOECALC_KERNEL ValueAndSlope<Real> operator()(Real x) const {
    if (kind != kernels::ActivationKind::silut) return other_activation(kind, x);
    if (x >= threshold) {
      const Real tanh = bounded_tanh(slope * (x - threshold));
      return {tanh + offset, slope * (Real(1) - tanh * tanh)};
    }
    const Real sigmoid = logistic(x);
    const Real value = x * sigmoid;
    return {value, sigmoid + value * (Real(1) - sigmoid)};
  }

  /// sum += factor phi(x), one element after another: that takes fewest registers.
  template <class Vector>
  MOECALC_KERNEL void add_values(Real factor, const Vector& x, Vector& sum) const {
    MOECALC_UNROLL
    for (int lane = 0; lane < Vector::kSize; ++lane) sum[lane] += factor * (*this)(x[lane]).value;
  }
  /// The same with a factor for every element.
  template <class Vector>
  MOECALC_KERNEL void add_values(const Vector& factor, const Vector& x, Vector& sum) const {
    MOECALC_UNROLL
    for (int lane = 0; lane < Vector::kSize; ++lane) sum[lane] += factor[lane] * (*this)(x[lane]).value;
  }
  /// gradient phi'(x), element by element.
  template <class Vector>
  MOECALC_KERNEL Vector times_slopes(const Vector& gradient, const Vector& x) const {
    Vector result;
    MOECALC_UNROLL
    for (int lane = 0; lane < Vector::kSize; ++lane) result[lane] = gradient[lane] * (*this)(x[lane]).slope;
    return result;
  }
};

}  // namespace moecalc::cuda
