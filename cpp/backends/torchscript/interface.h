// What libmoecalc.so and libmoecalc_torch.so know of each other. No torch in here.
#pragma once

#include <string>

#include "backends/backend.h"

#ifndef MOECALC_BUILD_ID
#define MOECALC_BUILD_ID MOECALC_VERSION
#endif

namespace moecalc::torchscript {

inline constexpr const char* library_file = "libmoecalc_torch.so";

/// Precedes torch's version in the bytes of the library, where it can be read without loading it.
#define MOECALC_TORCH_MARKER "moecalc: compiled against torch "

/// Both libraries must have been compiled from the same headers: objects pass between them.
inline std::string build_id() {
  std::string id = MOECALC_BUILD_ID;
  for (const size_t size : {sizeof(Array), sizeof(Evaluation), sizeof(NeighborList), sizeof(EvaluatorOptions),
                            sizeof(Architecture), sizeof(LoadedPackage), sizeof(TypeTables),
                            sizeof(PreparedGraph), sizeof(BackendInputs)}) {
    id += " " + std::to_string(size);
  }
  return id;
}

}  // namespace moecalc::torchscript

extern "C" {

/// The backend, which the caller owns. Throws Error.
using moecalc_make_torchscript_backend_t = moecalc::Backend*(const moecalc::BackendInputs* inputs);
MOECALC_API moecalc_make_torchscript_backend_t moecalc_make_torchscript_backend;

/// `build_id()` of the library.
using moecalc_torch_build_t = const char*();
MOECALC_API moecalc_torch_build_t moecalc_torch_build;

/// Version of torch that the library was compiled against: "2.13.0+cpu".
using moecalc_torch_version_t = const char*();
MOECALC_API moecalc_torch_version_t moecalc_torch_version;

/// Version of the torch that is loaded: "2.13"; "" if it does not tell.
using moecalc_running_torch_t = const char*();
MOECALC_API moecalc_running_torch_t moecalc_running_torch;
}
