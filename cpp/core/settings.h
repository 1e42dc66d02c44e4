// The environment variables MOECALC_*, read in one place and strictly: docs/environment.md lists them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "moecalc/options.h"

namespace moecalc {

struct Settings {
  std::string backend;                  // MOECALC_BACKEND
  std::string instruction_set;          // MOECALC_CPU
  std::optional<int64_t> keep_bytes;    // MOECALC_KEEP
  std::optional<int64_t> weight_bytes;  // MOECALC_WEIGHTS
  std::optional<int64_t> device_bytes;  // MOECALC_DEVICE_MEMORY
  bool cuda_graphs = true;              // MOECALC_CUDA_GRAPHS
  bool emulation_reversed = false;      // MOECALC_EMULATION_REVERSED
};

/// Throws Error for a value that is not understood.
Settings read_settings();

}  // namespace moecalc
