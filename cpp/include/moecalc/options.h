// How a package is to be run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "moecalc/array.h"
#include "moecalc/version.h"

namespace moecalc {

/// How products are computed on a GPU where the network is float32 (docs/cuda.md has the error of each).
/// float64 networks always use float64.
enum class Precision {
  fp32,       // as accurate as float32: split into three products of tensor cores
  fp32_ffma,  // float32 on the other cores; for comparisons
  bf16x3,
  tf32,
  fp16,
};
MOECALC_API const char* name_of(Precision precision);

/// What computes. `automatic`: the kernels of the device, or the plain backend where they do not cover the
/// model.
enum class BackendKind {
  automatic,
  fused,           // the kernels of the CPU, or an error
  plain,           // any model, in float64 or float32, many times slower; on the CPU
  torchscript,     // the package's own code, by libmoecalc_torch.so; for comparisons
  cuda_emulation,  // the kernels of the GPU, one block at a time on the CPU; for tests
};
MOECALC_API const char* name_of(BackendKind backend);

struct MOECALC_API Device {
  bool is_cuda = false;
  int index = 0;             // of GPUs
  std::string name() const;  // "cpu", "cuda:0"
};

struct MOECALC_API EvaluatorOptions {
  Device device;
  std::optional<Dtype> dtype;  // of the network; none: the package's own. Geometry and sums are float64
  Precision precision = Precision::fp32;
  BackendKind backend = BackendKind::automatic;
  /// Bytes per thread that a forward pass may keep for its backward; none: what memory allows.
  std::optional<int64_t> keep_bytes;
  /// Bytes of weights that elements without atoms may keep; none: what memory allows.
  std::optional<int64_t> weight_bytes;
  /// Bytes that a model may hold on a GPU; none: what is free.
  std::optional<int64_t> device_bytes;
  /// Processes that share the GPU: each takes its part of the memory at most.
  int device_sharers = 1;
  /// Whether steps of small systems on a GPU are recorded and replayed.
  bool cuda_graphs = true;
  std::string instruction_set;      // "avx512", "avx2", "generic"; "": the best of this processor
  bool emulation_reversed = false;  // the emulation runs blocks and threads backwards; for tests

  /// From what a user writes. device: "cpu", "cuda", "cuda:N" or "auto" (cuda if there is one); dtype:
  /// "float32", "float64" or ""; precision: "fp32", "fp32-ffma", "bf16x3", "tf32" or "fp16"; backend: "",
  /// "fused", "plain", "torchscript" or "cuda-emulation". Whatever else there is has the value of its
  /// environment variable (docs/environment.md), backend as well if it is "". Throws Error that names the
  /// value and what was expected.
  static EvaluatorOptions parse(const std::string& device = "cpu", const std::string& dtype = "",
                                const std::string& precision = "fp32", const std::string& backend = "");
};

/// GPUs that this process can use; 0 where there is no CUDA library or no driver.
MOECALC_API int cuda_device_count();

}  // namespace moecalc
