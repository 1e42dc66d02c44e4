// Where the translation unit compiled by nvcc and the others meet.
#pragma once

#include <memory>
#include <vector>

#include "device.h"

namespace moecalc::cuda {

/// The modules of a package.
struct Package {
  const torch::jit::Module& geometry;
  const torch::jit::Module& embedding;
  const std::vector<torch::jit::Module>& layers;
  const torch::jit::Module& readout;
  const GraphRules& rules;
  const DeferredTensors* deferred;
};

/// N: Float64, Float32, Tf32 or Bf16x3. Throws Unsupported.
template <class N>
std::unique_ptr<DeviceModel> make_cuda_model(const Package& package, const DeviceOptions& options);

}  // namespace moecalc::cuda
