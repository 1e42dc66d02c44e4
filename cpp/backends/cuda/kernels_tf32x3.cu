#include "backends/cuda/cuda_target.h"
#include "backends/cuda/number_formats.h"

namespace moecalc::cuda {

template <>
std::unique_ptr<Backend> make_cuda_model<Tf32x3>(const BackendInputs& inputs) {
  return std::make_unique<Model<Tf32x3, CudaTarget>>(inputs);
}

}  // namespace moecalc::cuda
