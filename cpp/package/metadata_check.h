// metadata.json, held against the architecture: engines and users read it.
#pragma once

#include <cstdint>

#include "core/json.h"
#include "moecalc/evaluator.h"
#include "package/architecture.h"

namespace moecalc {

/// What the metadata say is taken is what engines ask users for. Throws Error where the model takes something
/// else.
void check_said_conditions(const Json& metadata, bool charge_spin, int64_t n_fparam);

/// Throws Error for metadata that do not fit the model, or that no package has.
void check_metadata(const Json& metadata, const Architecture& model);

/// What engines tell their users, of checked metadata.
Facts facts_of(const Json& metadata, const Architecture& model);

}  // namespace moecalc
