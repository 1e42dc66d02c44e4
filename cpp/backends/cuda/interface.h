// What libmoecalc.so and libmoecalc_cuda.so know of each other. No CUDA in here.
#pragma once

#include <string>

#include "backends/backend.h"
#include "package/packed_weights.h"

#ifndef MOECALC_BUILD_ID
#define MOECALC_BUILD_ID MOECALC_VERSION
#endif

namespace moecalc::cuda {

inline constexpr const char* library_file = "libmoecalc_cuda.so";

/// Both libraries must have been compiled from the same headers: objects pass between them.
inline std::string build_id() {
  std::string id = MOECALC_BUILD_ID;
  for (const size_t size :
       {sizeof(Array), sizeof(Evaluation), sizeof(NeighborList), sizeof(EvaluatorOptions),
        sizeof(Architecture), sizeof(LoadedPackage), sizeof(TypeTables), sizeof(BackendInputs),
        sizeof(PackedWeights<double>), sizeof(WeightBlock<double>), sizeof(kernels::GroupWeights<double>)}) {
    id += ' ';
    id += std::to_string(size);
  }
  return id;
}

/// libmoecalc_cuda.so. Null, with `reason`, if it is not there, does not load or is of another build.
void* open_cuda_library(std::string& reason);

}  // namespace moecalc::cuda

extern "C" {

/// `build_id()` of the library.
using moecalc_cuda_build_t = const char*();
MOECALC_API moecalc_cuda_build_t moecalc_cuda_build;

/// GPUs that this process can use; 0 where there is no driver.
using moecalc_cuda_device_count_t = int();
MOECALC_API moecalc_cuda_device_count_t moecalc_cuda_device_count;

/// JSON: {"runtime": "13.0", "driver": "13.1" or null, "kernels": "80 90", "error": text or null,
///        "devices": [{"name": ..., "capability": "9.0", "memory": BYTES}, ...]}.
/// Valid until the thread's next call.
using moecalc_cuda_info_t = const char*();
MOECALC_API moecalc_cuda_info_t moecalc_cuda_info;

/// The backend, which the caller owns; null, with `reason`, where the kernels do not cover the package.
/// Throws Error.
using moecalc_make_cuda_backend_t = moecalc::Backend*(const moecalc::BackendInputs* inputs,
                                                      std::string* reason);
MOECALC_API moecalc_make_cuda_backend_t moecalc_make_cuda_backend;
}
