// Whether a loaded module is a potential of moecalc whose parts fit together: asked once, before anything is
// read from it, because the kernels take widths and indices for granted.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>

#include "package_reader.h"

namespace moecalc {

/// Checks types, shapes, index ranges and that numbers are finite, and that module and `metadata` (text of
/// metadata.json) say the same; numbers in `deferred` are read for it. Throws Error that names the attribute
/// and begins with `path`.
void check_model(const torch::jit::Module& model, const DeferredTensors& deferred,
                 const std::string& metadata, const std::string& path);

}  // namespace moecalc
