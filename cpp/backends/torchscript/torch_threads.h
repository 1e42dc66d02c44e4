// torch's threads are settings of the whole process, which belong to the program around us.
#pragma once

namespace moecalc {

/// While it lives, operators of torch on this thread use `n` threads. OpenMP's and MKL's settings of the
/// calling thread come back afterwards, also what torch sets itself when it is used for the first time.
class TorchThreads {
 public:
  explicit TorchThreads(int n);
  ~TorchThreads();
  TorchThreads(const TorchThreads&) = delete;
  TorchThreads& operator=(const TorchThreads&) = delete;

 private:
  int openmp_ = 1;
  int mkl_ = 0;
};

}  // namespace moecalc
