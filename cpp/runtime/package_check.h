// Whether a loaded module is a potential of moecalc whose parts fit together: asked once, before anything is
// read from it, because the kernels take widths and indices for granted.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>

#include "moecalc/archive.h"

namespace moecalc {

/// The module of a package, loaded only after its code was found harmless. Nothing else in moecalc loads
/// TorchScript in C++. Throws Error that begins with the file's path.
torch::jit::Module load_module(const PackageFile& file, at::Device device);

/// Checks types, shapes, index ranges and that numbers are finite, and that module and `metadata` (text of
/// metadata.json) say the same. Throws Error that names the attribute and begins with `path`.
void check_model(const torch::jit::Module& model, const std::string& metadata, const std::string& path);

}  // namespace moecalc
