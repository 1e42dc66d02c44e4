// The kernels of the GPU, emulated on the host.
#pragma once

#include <memory>
#include <string>

#include "backends/backend.h"

namespace moecalc::cuda {

/// Null, with `reason`, where the kernels do not cover the package.
std::unique_ptr<Backend> make_emulated_model(const BackendInputs& inputs, std::string& reason);

}  // namespace moecalc::cuda
