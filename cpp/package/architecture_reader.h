// architecture.json and tensors.json: read and checked as a whole.
#pragma once

#include "core/json.h"
#include "package/architecture.h"
#include "package/tensor_table.h"

namespace moecalc {

/// Checks types, shapes and ranges of everything, that numbers are finite, and that `metadata` says the same.
/// Throws Error that names what is wrong.
Architecture read_architecture(const Json& architecture, TensorTable& tensors, const Json& metadata);

}  // namespace moecalc
