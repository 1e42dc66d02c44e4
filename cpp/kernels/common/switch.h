// The switch function of the descriptor, for the host and for devices.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"

namespace moecalc::kernels {

/// Switch function s(r) and its derivative (SPEC.md, section 3).
///
/// Exponential: s = exp(-exp(k (r - start))) with k = 20 / start, 0 beyond `stop`. Otherwise a polynomial of
/// u = (r - start) / (stop - start), clamped to 0..1: s = 1 + u^3 (-10 + 15 u - 6 u^2).
struct Switch {
  bool exponential;
  double start;  // A
  double stop;   // A

  MOECALC_BOTH void operator()(double distance, double& value, double& derivative) const {
    if (exponential) {
      of_exponential(distance, value, derivative);
    } else {
      of_polynomial(distance, value, derivative);
    }
  }

 private:
  MOECALC_BOTH void of_exponential(double distance, double& value, double& derivative) const {
    if (distance > stop) {
      value = 0.0;
      derivative = 0.0;
      return;
    }
    const double rate = 20.0 / start;
    const double inner = exp(rate * (distance - start));
    value = exp(-inner);
    derivative = -rate * inner * value;
  }

  MOECALC_BOTH void of_polynomial(double distance, double& value, double& derivative) const {
    const double width = stop - start;
    const double place = (distance - start) / width;
    const double u = place < 0.0 ? 0.0 : place > 1.0 ? 1.0 : place;
    value = 1.0 + u * u * u * (-10.0 + u * (15.0 - 6.0 * u));
    derivative = -30.0 * u * u * (1.0 - u) * (1.0 - u) / width;
  }
};

}  // namespace moecalc::kernels
