// Exponential and reciprocal as the device's special-function unit has them, on both targets.
//
// On the host they have errors as large as those that the PTX ISA allows ex2.approx.ftz and rcp.approx.ftz,
// and no denormal numbers either: what is too inaccurate for the device, or leaves its range, shows in the
// emulation.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/host_device.h"
#include "kernels/cuda/formats.cuh"

namespace moecalc::cuda {

#if !defined(__CUDACC__)
/// `exact` with an error of up to `largest`, relative, that depends on its bits alone.
inline float with_device_error(double exact, double largest) {
  const auto rounded = static_cast<float>(exact);
  // numbers that need no rounding are exact on the device too
  const bool needs_none = static_cast<double>(rounded) == exact || !std::isfinite(rounded);
  const uint32_t hash = bits_of(rounded) * 2654435761u;
  const double error = largest * (static_cast<double>(hash >> 8) * 0x1p-23 - 1.0);
  const float value = needs_none ? rounded : static_cast<float>(exact * (1.0 + error));
  return std::abs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}
#endif

// In the order of the source (volatile): the compiler would finish one number before it begins the next, and
// wait for the unit every time, where callers have several under way.

/// 2^x
MOECALC_KERNEL float power_of_two(float x) {
#if defined(__CUDACC__)
  float power;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return with_device_error(std::exp2(static_cast<double>(x)), 0x1p-22);
#endif
}

/// 1 / x
MOECALC_KERNEL float reciprocal(float x) {
#if defined(__CUDACC__)
  float inverse;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
#else
  return with_device_error(1.0 / static_cast<double>(x), 0x1p-23);
#endif
}
MOECALC_KERNEL double reciprocal(double x) { return 1.0 / x; }

/// The smaller of two numbers, but NaN where x is.
MOECALC_KERNEL float at_most(float x, float limit) {
#if defined(__CUDACC__)
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(limit));
  return smaller;
#else
  return x > limit ? limit : x;
#endif
}
MOECALC_KERNEL double at_most(double x, double limit) { return x > limit ? limit : x; }

/// exp(-x), or a large number in its place that has a reciprocal.
MOECALC_KERNEL float exponential_of_negative(float x) {
  return power_of_two(at_most(-1.44269504088896f * x, 115.0f));
}
MOECALC_KERNEL double exponential_of_negative(double x) { return exp(at_most(-x, 700.0)); }

}  // namespace moecalc::cuda
