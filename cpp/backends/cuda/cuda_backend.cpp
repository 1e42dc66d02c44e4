// The CUDA backend as libmoecalc.so sees it: the emulation, or a library of its own.
#include <dlfcn.h>

#include <string>

#include "backends/backend.h"
#include "backends/cuda/emulation.h"
#include "backends/cuda/interface.h"
#include "moecalc/error.h"

namespace moecalc {

namespace cuda {

namespace {

template <class Function>
Function* function_of(void* library, const char* name) {
  return reinterpret_cast<Function*>(::dlsym(library, name));
}

/// "of another build ..." unless the library is of this one; "" if it is.
std::string mismatch(void* library) {
  auto* build = function_of<moecalc_cuda_build_t>(library, "moecalc_cuda_build");
  const std::string theirs = build == nullptr ? "unknown" : build();
  if (theirs == build_id()) return "";
  return std::string(library_file) + " is of build '" + theirs + "', libmoecalc.so of '" + build_id() +
         "': install moecalc again";
}

}  // namespace

void* open_cuda_library(std::string& reason) {
  void* library = open_library(library_file, reason);
  if (library == nullptr) return nullptr;
  const std::string wrong = mismatch(library);
  if (wrong.empty()) return library;
  reason = wrong;
  return nullptr;
}

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const BackendInputs& inputs, std::string& reason) {
  if (inputs.options.backend == BackendKind::cuda_emulation) {
    return cuda::make_emulated_model(inputs, reason);
  }
  const std::string device = "device '" + inputs.options.device.name() + "': ";
  std::string missing;
  void* library = cuda::open_cuda_library(missing);
  if (library == nullptr) {
    throw Error(device + "no CUDA kernels (" + missing +
                "): use device 'cpu', or install moecalc where nvcc is");
  }
  auto* count = cuda::function_of<moecalc_cuda_device_count_t>(library, "moecalc_cuda_device_count");
  auto* make = cuda::function_of<moecalc_make_cuda_backend_t>(library, "moecalc_make_cuda_backend");
  const int n_devices = count == nullptr ? 0 : count();
  if (make == nullptr || n_devices == 0) {
    throw Error(device + "no CUDA device was found: use device 'cpu', or look at nvidia-smi");
  }
  if (inputs.options.device.index >= n_devices) {
    throw Error("expected `device` 'cuda:N' with N in [0, " + std::to_string(n_devices) + "), got '" +
                inputs.options.device.name() + "'");
  }
  return std::unique_ptr<Backend>(make(&inputs, &reason));
}

}  // namespace moecalc
