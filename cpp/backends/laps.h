// What the backends on the CPU time their parts with.
#pragma once

#include <chrono>

namespace moecalc {

/// Seconds since the last call.
class Laps {
 public:
  double next() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace moecalc
