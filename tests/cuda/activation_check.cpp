// Largest errors of phi and phi' in float32, with the special functions of the device, beside float64:
// relative to the largest of 1 and the value. A line per activation; then 0 if NaN stays NaN and large
// numbers stay numbers.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "kernels/cuda/activation.cuh"

using namespace moecalc;
using Kind = kernels::ActivationKind;

namespace {

kernels::Activation activation_of(Kind kind) {
  kernels::Activation activation;
  activation.kind = kind;
  activation.threshold = 3.0;
  const double sigmoid = 1.0 / (1.0 + std::exp(-3.0));
  activation.slope = sigmoid * (1.0 + 3.0 * (1.0 - sigmoid));
  activation.offset = 3.0 * sigmoid;
  return activation;
}

double error(double got, double want) { return std::abs(got - want) / std::max(1.0, std::abs(want)); }

double largest_error(Kind kind) {
  const cuda::ActivationFunction<float> phi(activation_of(kind));
  const cuda::ActivationFunction<double> exact(activation_of(kind));
  double largest = 0;
  for (int step = -20000; step <= 20000; ++step) {
    const float x = static_cast<float>(step) * 2e-3f;
    const auto got = phi(x);
    const auto want = exact(x);
    largest = std::max({largest, error(got.value, want.value), error(got.slope, want.slope)});
  }
  return largest;
}

bool is_good_at_the_ends(Kind kind) {
  const cuda::ActivationFunction<float> phi(activation_of(kind));
  const float nan = std::nanf("");
  const bool finite = std::isfinite(phi(1e4f).value) && std::isfinite(phi(-1e4f).value) &&
                      std::isfinite(phi(1e4f).slope) && std::isfinite(phi(-1e4f).slope);
  return finite && std::isnan(phi(nan).value);
}

}  // namespace

int main() {
  bool good = true;
  for (const Kind kind : {Kind::silu, Kind::silut, Kind::tanh, Kind::sigmoid, Kind::gelu}) {
    std::printf("%.3e\n", largest_error(kind));
    good = good && is_good_at_the_ends(kind);
  }
  std::printf("%d\n", good ? 0 : 1);
}
