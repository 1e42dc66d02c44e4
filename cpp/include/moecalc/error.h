// What moecalc throws. Every message is one line: value, expectation, remedy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "moecalc/version.h"

namespace moecalc {

/// Every error that moecalc raises on purpose.
class MOECALC_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  ~Error() override;
};

/// The model did not fit into the memory of the host or of the device.
class MOECALC_API OutOfMemoryError : public Error {
 public:
  using Error::Error;
  ~OutOfMemoryError() override;
};

/// An energy, a force or a distance that is NaN or infinite: the structure is far outside of any training
/// data, or its positions are wrong.
class MOECALC_API NotFiniteError : public Error {
 public:
  /// `atom`: of the engine's order; -1 where none can be named.
  explicit NotFiniteError(const std::string& message, int64_t atom = -1) : Error(message), atom(atom) {}
  ~NotFiniteError() override;
  int64_t atom;
};

/// Two atoms at the same place.
class MOECALC_API OverlapError : public Error {
 public:
  OverlapError(const std::string& message, int64_t first, int64_t second)
      : Error(message), first(first), second(second) {}
  ~OverlapError() override;
  int64_t first;  // both in the engine's order
  int64_t second;
};

}  // namespace moecalc
