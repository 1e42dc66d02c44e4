// The functions of libmoecalc_cuda.so that libmoecalc.so calls.
#include <cuda_runtime.h>

#include <string>

#include "backends/cuda/interface.h"
#include "backends/cuda/number_formats.h"

#ifndef MOECALC_CUDA_ARCHITECTURES
#define MOECALC_CUDA_ARCHITECTURES ""
#endif

namespace moecalc::cuda {

template <>
std::unique_ptr<Backend> make_cuda_model<Float64>(const BackendInputs& inputs);
template <>
std::unique_ptr<Backend> make_cuda_model<Float32>(const BackendInputs& inputs);
template <>
std::unique_ptr<Backend> make_cuda_model<Tf32x3>(const BackendInputs& inputs);
template <>
std::unique_ptr<Backend> make_cuda_model<Bf16x3>(const BackendInputs& inputs);
template <>
std::unique_ptr<Backend> make_cuda_model<Tf32>(const BackendInputs& inputs);
template <>
std::unique_ptr<Backend> make_cuda_model<Fp16>(const BackendInputs& inputs);

namespace {

/// "13.0" from 13000.
std::string shown_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string in_quotes(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

std::string device_info(int index) {
  cudaDeviceProp properties{};
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return "{\"error\": " + in_quotes(cudaGetErrorString(status)) + "}";
  }
  return "{\"name\": " + in_quotes(properties.name) + ", \"capability\": \"" +
         std::to_string(properties.major) + "." + std::to_string(properties.minor) +
         "\", \"memory\": " + std::to_string(properties.totalGlobalMem) + "}";
}

std::string info() {
  int runtime = 0;
  int driver = 0;
  int n_device = 0;
  (void)cudaRuntimeGetVersion(&runtime);
  (void)cudaDriverGetVersion(&driver);  // 0 where there is none
  const cudaError_t status = cudaGetDeviceCount(&n_device);
  (void)cudaGetLastError();
  if (status != cudaSuccess) n_device = 0;
  std::string devices;
  for (int index = 0; index < n_device; ++index) devices += (index == 0 ? "" : ", ") + device_info(index);
  return "{\"runtime\": " + in_quotes(shown_version(runtime)) +
         ", \"driver\": " + (driver == 0 ? std::string("null") : in_quotes(shown_version(driver))) +
         ", \"kernels\": " + in_quotes(MOECALC_CUDA_ARCHITECTURES) + ", \"error\": " +
         (status == cudaSuccess ? std::string("null") : in_quotes(cudaGetErrorString(status))) +
         ", \"devices\": [" + devices + "]}";
}

}  // namespace
}  // namespace moecalc::cuda

extern "C" {

const char* moecalc_cuda_build() {
  static const std::string id = moecalc::cuda::build_id();
  return id.c_str();
}

int moecalc_cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

const char* moecalc_cuda_info() {
  thread_local std::string text;
  text = moecalc::cuda::info();
  return text.c_str();
}

moecalc::Backend* moecalc_make_cuda_backend(const moecalc::BackendInputs* inputs, std::string* reason) {
  using namespace moecalc;
  return cuda::make_in_format(*inputs, *reason,
                              [&]<class Format>() -> std::unique_ptr<Backend> {
                                return cuda::make_cuda_model<Format>(*inputs);
                              })
      .release();
}
}
