// Lets torch read a package.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include "moecalc/package_file.h"

namespace moecalc {

/// The scripted model of a package, on the CPU. torch runs code of a file while it loads it: `file` must have
/// passed `check_package`. Nothing else in moecalc loads TorchScript in C++. Throws what torch throws.
torch::jit::Module load_module(const PackageFile& file);

}  // namespace moecalc
