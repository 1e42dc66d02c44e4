// The floating-point environment of a new thread, for a while.
#pragma once

#include <cfenv>

namespace moecalc {

/// While it lives, this thread rounds to nearest, flushes no denormal numbers and has no traps, whatever the
/// program around us has set; threads of a ThreadPool take it over.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t before_{};
};

}  // namespace moecalc
