// What a host program has set for its own use of torch must not reach a model.
#pragma once

#include <memory>

#include "moecalc/version.h"

namespace moecalc {

/// While it lives, torch is on this thread as a new thread finds it: gradients on, no inference mode, no
/// autocast, no function or dispatch modes (default device, fake tensors), no functorch transforms; float32
/// products are not shortened to TF32 or bfloat16; the floating-point environment is the default one. The
/// destructor puts back what was there. To be destroyed on the thread that made it.
class MOECALC_API CleanState {
 public:
  CleanState();
  ~CleanState();
  CleanState(const CleanState&) = delete;
  CleanState& operator=(const CleanState&) = delete;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moecalc
