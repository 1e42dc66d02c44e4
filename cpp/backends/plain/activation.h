// Activations of a network with their slopes, in the precision of the network.
#pragma once

#include <cmath>
#include <cstdint>

#include "moecalc/error.h"
#include "package/architecture.h"

namespace moecalc::plain {

template <class T>
struct ValueAndSlope {
  T value, slope;
};

template <class T>
T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <class T>
ValueAndSlope<T> silu(T x) {
  const T s = sigmoid(x);
  return {x * s, s * (T(1) + x * (T(1) - s))};
}

template <class T>
ValueAndSlope<T> gelu(T x) {
  const T scale = T(0.79788456080286535588);  // sqrt(2 / pi)
  const T cubic = T(0.044715);
  const T t = std::tanh(scale * (x + cubic * x * x * x));
  const T inner_slope = scale * (T(1) + T(3) * cubic * x * x);
  return {T(0.5) * x * (T(1) + t), T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * inner_slope};
}

template <class T>
ValueAndSlope<T> softplus(T x) {
  // the same threshold as PyTorch's, where the models come from
  if (x > T(20)) return {x, T(1)};
  return {std::log1p(std::exp(x)), sigmoid(x)};
}

/// Calls `use` with the function x -> (phi(x), phi'(x)).
template <class T, class F>
void with_activation(const ActivationSource& phi, const F& use) {
  using Both = ValueAndSlope<T>;
  if (phi.kind == "linear") return use([](T x) { return Both{x, T(1)}; });
  if (phi.kind == "silu") return use([](T x) { return silu(x); });
  if (phi.kind == "silut") {
    const T threshold = T(phi.threshold), slope = T(phi.slope), offset = T(phi.offset);
    return use([=](T x) {
      if (x < threshold) return silu(x);
      const T t = std::tanh(slope * (x - threshold));
      return Both{t + offset, slope * (T(1) - t * t)};
    });
  }
  if (phi.kind == "tanh") {
    return use([](T x) {
      const T t = std::tanh(x);
      return Both{t, T(1) - t * t};
    });
  }
  if (phi.kind == "sigmoid") {
    return use([](T x) {
      const T s = sigmoid(x);
      return Both{s, s * (T(1) - s)};
    });
  }
  // NaN passes, so that it is seen in the energies
  if (phi.kind == "relu") return use([](T x) { return x <= T(0) ? Both{T(0), T(0)} : Both{x, T(1)}; });
  if (phi.kind == "relu6") {
    return use([](T x) {
      if (x <= T(0)) return Both{T(0), T(0)};
      return x >= T(6) ? Both{T(6), T(0)} : Both{x, T(1)};
    });
  }
  if (phi.kind == "gelu") return use([](T x) { return gelu(x); });
  if (phi.kind == "softplus") return use([](T x) { return softplus(x); });
  throw Error("expected an activation that the plain backend knows, got '" + phi.kind + "': update moecalc");
}

/// x -> phi(x) in place; its slopes as well unless that is null.
template <class T>
void activate(const ActivationSource& phi, T* x, T* slope, int64_t n) {
  with_activation<T>(phi, [&](const auto& function) {
    for (int64_t i = 0; i < n; ++i) {
      const ValueAndSlope<T> both = function(x[i]);
      x[i] = both.value;
      if (slope != nullptr) slope[i] = both.slope;
    }
  });
}

}  // namespace moecalc::plain
