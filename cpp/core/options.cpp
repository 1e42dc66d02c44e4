#include "moecalc/options.h"

#include <dlfcn.h>

#include <cstdlib>

#include "backends/backend.h"
#include "core/settings.h"
#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

const char* name_of(Precision precision) {
  switch (precision) {
    case Precision::fp32:
      return "fp32";
    case Precision::fp32_ffma:
      return "fp32-ffma";
    case Precision::tf32:
      return "tf32";
    case Precision::bf16x3:
      return "bf16x3";
    case Precision::fp16:
      return "fp16";
  }
  return "";
}

const char* name_of(BackendKind backend) {
  switch (backend) {
    case BackendKind::automatic:
      return "";
    case BackendKind::fused:
      return "fused";
    case BackendKind::plain:
      return "plain";
    case BackendKind::torchscript:
      return "torchscript";
    case BackendKind::cuda_emulation:
      return "cuda-emulation";
  }
  return "";
}

std::string Device::name() const { return is_cuda ? "cuda:" + std::to_string(index) : "cpu"; }

int cuda_device_count() {
  std::string reason;
  void* library = open_library("libmoecalc_cuda.so", reason);
  if (library == nullptr) return 0;
  auto* count = reinterpret_cast<int (*)()>(::dlsym(library, "moecalc_cuda_device_count"));
  return count == nullptr ? 0 : count();
}

namespace {

Device parse_device(const std::string& name) {
  if (name == "cpu") return {};
  const bool wants_cuda = name == "cuda" || name.rfind("cuda:", 0) == 0;
  if (!wants_cuda && name != "auto") {
    throw Error("expected `device` to be 'cpu', 'cuda', 'cuda:N' or 'auto', got " + quoted(name, 40, '\''));
  }
  const int n_devices = cuda_device_count();
  if (name == "auto" && n_devices == 0) return {};
  if (n_devices == 0) {
    std::string reason;
    const bool has_library = open_library("libmoecalc_cuda.so", reason) != nullptr;
    throw Error("device '" + name + "': " +
                (has_library ? "no CUDA device was found: use device 'cpu', or look at nvidia-smi"
                             : "this installation has no CUDA kernels (" + reason +
                                   "): use device 'cpu', or install moecalc where nvcc is"));
  }
  int index = 0;
  if (name.size() > 5) {
    char* end = nullptr;
    const long parsed = std::strtol(name.c_str() + 5, &end, 10);
    const bool digit = name[5] >= '0' && name[5] <= '9';
    if (!digit || *end != '\0' || parsed >= n_devices) {
      throw Error("expected `device` 'cuda:N' with N in [0, " + std::to_string(n_devices) + "), got " +
                  quoted(name, 40, '\''));
    }
    index = static_cast<int>(parsed);
  }
  return {true, index};
}

std::optional<Dtype> parse_dtype(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "float64") return Dtype::float64;
  if (name == "float32") return Dtype::float32;
  throw Error("expected `dtype` to be 'float64', 'float32' or '' (the package's own), got " +
              quoted(name, 40, '\''));
}

Precision parse_precision(const std::string& name) {
  for (const Precision precision :
       {Precision::fp32, Precision::fp32_ffma, Precision::bf16x3, Precision::tf32, Precision::fp16}) {
    if (name == name_of(precision)) return precision;
  }
  throw Error("expected `precision` to be 'fp32', 'fp32-ffma', 'bf16x3', 'tf32' or 'fp16', got " +
              quoted(name, 40, '\''));
}

BackendKind parse_backend(const std::string& name) {
  for (const BackendKind kind : {BackendKind::automatic, BackendKind::fused, BackendKind::plain,
                                 BackendKind::torchscript, BackendKind::cuda_emulation}) {
    if (name == name_of(kind)) return kind;
  }
  throw Error("expected `backend` to be 'fused', 'plain', 'torchscript' or 'cuda-emulation', got " +
              quoted(name, 40, '\''));
}

}  // namespace

EvaluatorOptions EvaluatorOptions::parse(const std::string& device, const std::string& dtype,
                                         const std::string& precision, const std::string& backend) {
  const Settings settings = read_settings();
  EvaluatorOptions options;
  options.device = parse_device(device);
  options.dtype = parse_dtype(dtype);
  options.precision = parse_precision(precision);
  options.backend = parse_backend(backend.empty() ? settings.backend : backend);
  options.keep_bytes = settings.keep_bytes;
  options.weight_bytes = settings.weight_bytes;
  options.device_bytes = settings.device_bytes;
  options.instruction_set = settings.instruction_set;
  options.cuda_graphs = settings.cuda_graphs;
  options.emulation_reversed = settings.emulation_reversed;
  return options;
}

}  // namespace moecalc
