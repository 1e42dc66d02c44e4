#include "backends/torchscript/torch_threads.h"

#include <ATen/Parallel.h>
#include <omp.h>

// Of the MKL inside of torch, where there is one: the number of threads of this thread's calls. Returns the
// one before; 0 stands for none of its own.
extern "C" int MKL_Set_Num_Threads_Local(int n) __attribute__((weak));

namespace moecalc {

TorchThreads::TorchThreads(int n) : openmp_(omp_get_max_threads()) {
  (void)at::get_num_threads();  // when first asked on a thread, torch sets OpenMP's number
  omp_set_num_threads(n);
  if (MKL_Set_Num_Threads_Local != nullptr) mkl_ = MKL_Set_Num_Threads_Local(n);
}

TorchThreads::~TorchThreads() {
  if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_);
  omp_set_num_threads(openmp_);
}

}  // namespace moecalc
