// The number format that an evaluator's options ask for.
#pragma once

#include <memory>
#include <string>

#include "backends/backend.h"
#include "kernels/cuda/formats.cuh"

namespace moecalc::cuda {

/// make.template operator()<Format>() with a format of formats.cuh. Null, with `reason`,
/// where the kernels do not cover the package.
template <class Make>
std::unique_ptr<Backend> make_in_format(const BackendInputs& inputs, std::string& reason, const Make& make) {
  try {
    if (inputs.dtype == Dtype::float64) return make.template operator()<Float64>();
    switch (inputs.options.precision) {
      case Precision::fp32:
        return make.template operator()<Tf32x3>();
      case Precision::fp32_ffma:
        return make.template operator()<Float32>();
      case Precision::bf16x3:
        return make.template operator()<Bf16x3>();
      case Precision::tf32:
        return make.template operator()<Tf32>();
      case Precision::fp16:
        return make.template operator()<Fp16>();
    }
  } catch (const Unsupported& option) {
    reason = option.reason;
  }
  return nullptr;
}

/// The model of the format on a GPU: compiled in kernels_*.cu. Throws Unsupported.
template <class Format>
std::unique_ptr<Backend> make_cuda_model(const BackendInputs& inputs);

}  // namespace moecalc::cuda
