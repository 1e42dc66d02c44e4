// The switch function of the descriptor, for the host and for devices.
#pragma once

#include <cmath>

#include "cuda/host_device.h"

namespace moecalc::ops {

/// Switch function and its derivative (SPEC section 3).
struct Switch {
  bool exponential;
  double start, stop;

  MOECALC_BOTH void operator()(double r, double& s, double& ds) const {
    if (exponential) {
      if (r > stop) {
        s = ds = 0.0;
        return;
      }
      const double k = 20.0 / start, inner = exp(k * (r - start));
      s = exp(-inner);
      ds = -k * inner * s;
      return;
    }
    const double width = stop - start, x = (r - start) / width, u = x < 0.0 ? 0.0 : x > 1.0 ? 1.0 : x;
    s = 1.0 + u * u * u * (-10.0 + u * (15.0 - 6.0 * u));
    ds = -30.0 * u * u * (1.0 - u) * (1.0 - u) / width;
  }
};

}  // namespace moecalc::ops
