// Activations and their slopes (formulas: SPEC.md, section 6), with the fast exponential of the device.
#pragma once

#include <cmath>

#include "kernels/common/activation.h"
#include "kernels/common/host_device.h"
#include "kernels/cuda/special_functions.cuh"

#if defined(__CUDACC__)
#define MOECALC_KERNEL_CALL __device__ __noinline__
#else
#define MOECALC_KERNEL_CALL inline
#endif

namespace moecalc::cuda {

/// 1 / (1 + exp(-x))
template <class Real>
MOECALC_KERNEL Real logistic(Real x) {
  return reciprocal(Real(1) + exponential_of_negative(x));
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
    const Real one[1] = {x};
    ValueAndSlope<Real> result[1];
    evaluate(one, result);
    return result[0];
  }

  /// sums += factor phi(x) of COUNT vectors.
  template <int COUNT, class Vector>
  MOECALC_KERNEL void add_values(Real factor, const Vector* x, Vector* sums) const {
    for_numbers<COUNT>(x, [&](int item, int lane, const ValueAndSlope<Real>& phi) {
      sums[item][lane] += factor * phi.value;
    });
  }
  /// sum += factor phi(x) with a factor for every element.
  template <class Vector>
  MOECALC_KERNEL void add_values(const Vector& factor, const Vector& x, Vector& sum) const {
    for_numbers<1>(
        &x, [&](int, int lane, const ValueAndSlope<Real>& phi) { sum[lane] += factor[lane] * phi.value; });
  }
  /// gradient phi'(x), element by element.
  template <class Vector>
  MOECALC_KERNEL Vector times_slopes(const Vector& gradient, const Vector& x) const {
    Vector result;
    for_numbers<1>(&x, [&](int, int lane, const ValueAndSlope<Real>& phi) {
      result[lane] = gradient[lane] * phi.slope;
    });
    return result;
  }
  /// x = gradient phi'(x) of COUNT vectors.
  template <int COUNT, class Vector>
  MOECALC_KERNEL void to_gradients(const Vector* gradient, Vector* x) const {
    for_numbers<COUNT>(x, [&](int item, int lane, const ValueAndSlope<Real>& phi) {
      x[item][lane] = gradient[item][lane] * phi.slope;
    });
  }
  /// Gradients of factor phi(x) with respect to x in the place of x, given those of the results, for COUNT
  /// vectors with a factor each; dots += gradient . phi(x).
  template <int COUNT, class Vector>
  MOECALC_KERNEL void to_gradients(const Vector* gradient, const Real* factor, Vector* x, Real* dots) const {
    for_numbers<COUNT>(x, [&](int item, int lane, const ValueAndSlope<Real>& phi) {
      dots[item] += gradient[item][lane] * phi.value;
      x[item][lane] = gradient[item][lane] * factor[item] * phi.slope;
    });
  }

 private:
  /// f(item, lane, phi) for every number x[item][lane] of COUNT vectors. The kind is asked for once; silut
  /// has no branches, and four numbers are under way at the same time.
  template <int COUNT, class Vector, class F>
  MOECALC_KERNEL void for_numbers(const Vector* x, const F& f) const {
    if (kind == kernels::ActivationKind::silut) {
      in_batches<COUNT>(x, f, [this](const auto& some, auto& results) { silut(some, results); });
    } else {
      in_batches<COUNT>(x, f, [this](const auto& some, auto& results) { others(some, results); });
    }
  }
  template <int COUNT, class Vector, class F, class Evaluate>
  MOECALC_KERNEL void in_batches(const Vector* x, const F& f, const Evaluate& evaluate_some) const {
    constexpr int numbers = COUNT * Vector::kSize;
    constexpr int batch = numbers < 4 ? numbers : 4;
    static_assert(numbers % batch == 0);
    MOECALC_UNROLL
    for (int first = 0; first < numbers; first += batch) {
      Real some[batch];
      ValueAndSlope<Real> results[batch];
      MOECALC_UNROLL
      for (int k = 0; k < batch; ++k) some[k] = x[(first + k) / Vector::kSize][(first + k) % Vector::kSize];
      evaluate_some(some, results);
      MOECALC_UNROLL
      for (int k = 0; k < batch; ++k) f((first + k) / Vector::kSize, (first + k) % Vector::kSize, results[k]);
    }
  }

  template <int COUNT>
  MOECALC_KERNEL void evaluate(const Real (&x)[COUNT], ValueAndSlope<Real> (&results)[COUNT]) const {
    if (kind == kernels::ActivationKind::silut) {
      silut(x, results);
    } else {
      others(x, results);
    }
  }
  template <int COUNT>
  MOECALC_KERNEL void others(const Real (&x)[COUNT], ValueAndSlope<Real> (&results)[COUNT]) const {
    MOECALC_UNROLL
    for (int k = 0; k < COUNT; ++k) results[k] = other_activation(kind, x[k]);
  }
  /// One logistic s for both sides of the threshold, since tanh(z) = 2 s(2 z) - 1 and tanh'(z) = 4 s (1 - s):
  ///   phi = a s + b,   phi' = s (c + d (1 - s)),
  /// where the sides choose a, b, c, d and the argument of s, and nothing else: a choice between longer terms
  /// would be compiled to branches.
  template <int COUNT>
  MOECALC_KERNEL void silut(const Real (&x)[COUNT], ValueAndSlope<Real> (&results)[COUNT]) const {
    Real sigmoid[COUNT];
    MOECALC_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      const Real beyond = Real(2) * slope * (x[k] - threshold);
      sigmoid[k] = exponential_of_negative(x[k] < threshold ? x[k] : beyond);
    }
    MOECALC_UNROLL
    for (int k = 0; k < COUNT; ++k) sigmoid[k] = reciprocal(Real(1) + sigmoid[k]);
    const Real offset_beyond = offset - Real(1);
    const Real slope_beyond = Real(4) * slope;
    MOECALC_UNROLL
    for (int k = 0; k < COUNT; ++k) {
      const bool below = x[k] < threshold;
      const Real a = below ? x[k] : Real(2);
      const Real b = below ? Real(0) : offset_beyond;
      const Real c = below ? Real(1) : Real(0);
      const Real d = below ? x[k] : slope_beyond;
      results[k] = {a * sigmoid[k] + b, sigmoid[k] * (c + d * (Real(1) - sigmoid[k]))};
    }
  }
};

}  // namespace moecalc::cuda
