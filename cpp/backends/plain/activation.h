// Activations of a network with their slopes, in the precision of the network.
#pragma once

#include <cmath>
#include <cstdint>

#include "moecalc/error.h"
#include "package/architecture.h"

namespace moecalc::plain {

template <class Real>
struct ValueAndSlope {
  Real value;
  Real slope;
};

template <class Real>
Real sigmoid(Real x) {
  return Real(1) / (Real(1) + std::exp(-x));
}

template <class Real>
ValueAndSlope<Real> silu(Real x) {
  const Real gate = sigmoid(x);
  return {x * gate, gate * (Real(1) + x * (Real(1) - gate))};
}

/// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class Real>
ValueAndSlope<Real> gelu(Real x) {
  const Real scale = Real(0.79788456080286535588);  // sqrt(2 / pi)
  const Real cubic = Real(0.044715);
  const Real bent = std::tanh(scale * (x + cubic * x * x * x));
  const Real inner_slope = scale * (Real(1) + Real(3) * cubic * x * x);
  const Real slope = Real(0.5) * (Real(1) + bent) + Real(0.5) * x * (Real(1) - bent * bent) * inner_slope;
  return {Real(0.5) * x * (Real(1) + bent), slope};
}

template <class Real>
ValueAndSlope<Real> softplus(Real x) {
  // the same threshold as PyTorch's, where the models come from
  if (x > Real(20)) return {x, Real(1)};
  return {std::log1p(std::exp(x)), sigmoid(x)};
}

/// silu below the threshold, tanh(slope (x - threshold)) + offset above.
template <class Real>
auto silut(const ActivationSource& phi) {
  const Real threshold = Real(phi.threshold);
  const Real slope = Real(phi.slope);
  const Real offset = Real(phi.offset);
  return [=](Real x) {
    if (x < threshold) return silu(x);
    const Real bent = std::tanh(slope * (x - threshold));
    return ValueAndSlope<Real>{bent + offset, slope * (Real(1) - bent * bent)};
  };
}

/// Calls `use` with the function x -> (phi(x), phi'(x)).
template <class Real, class Function>
void with_activation(const ActivationSource& phi, const Function& use) {
  using Both = ValueAndSlope<Real>;
  if (phi.kind == "linear") return use([](Real x) { return Both{x, Real(1)}; });
  if (phi.kind == "silu") return use([](Real x) { return silu(x); });
  if (phi.kind == "silut") return use(silut<Real>(phi));
  if (phi.kind == "tanh") {
    return use([](Real x) {
      const Real bent = std::tanh(x);
      return Both{bent, Real(1) - bent * bent};
    });
  }
  if (phi.kind == "sigmoid") {
    return use([](Real x) {
      const Real gate = sigmoid(x);
      return Both{gate, gate * (Real(1) - gate)};
    });
  }
  // NaN passes, so that it is seen in the energies
  if (phi.kind == "relu") {
    return use([](Real x) { return x <= Real(0) ? Both{Real(0), Real(0)} : Both{x, Real(1)}; });
  }
  if (phi.kind == "relu6") {
    return use([](Real x) {
      if (x <= Real(0)) return Both{Real(0), Real(0)};
      return x >= Real(6) ? Both{Real(6), Real(0)} : Both{x, Real(1)};
    });
  }
  if (phi.kind == "gelu") return use([](Real x) { return gelu(x); });
  if (phi.kind == "softplus") return use([](Real x) { return softplus(x); });
  throw Error("expected an activation that the plain backend knows, got '" + phi.kind + "': update moecalc");
}

/// values -> phi(values) in place; their slopes as well unless that is null.
template <class Real>
void activate(const ActivationSource& phi, Real* values, Real* slope, int64_t count) {
  with_activation<Real>(phi, [&](const auto& function) {
    for (int64_t i = 0; i < count; ++i) {
      const ValueAndSlope<Real> both = function(values[i]);
      values[i] = both.value;
      if (slope != nullptr) slope[i] = both.slope;
    }
  });
}

}  // namespace moecalc::plain
