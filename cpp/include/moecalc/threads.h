// torch's threads are settings of the whole process, which belong to the program around us.
#pragma once

#include "moecalc/version.h"

namespace moecalc {

/// While it lives, operators of torch on this thread use `n` threads. OpenMP's and MKL's settings of the
/// calling thread come back afterwards, also what torch sets itself when it is used for the first time.
class MOECALC_API TorchThreads {
 public:
  explicit TorchThreads(int n);
  ~TorchThreads();
  TorchThreads(const TorchThreads&) = delete;
  TorchThreads& operator=(const TorchThreads&) = delete;

  /// What torch would use without it.
  int torch() const;

 private:
  int openmp_ = 1, mkl_ = 0;
  bool outermost_ = false;
};

}  // namespace moecalc
