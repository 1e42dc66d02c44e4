#include "moecalc/version.h"

#include "moecalc/error.h"
#include "moecalc/evaluator.h"

namespace moecalc {

Error::~Error() = default;
OutOfMemoryError::~OutOfMemoryError() = default;
NotFiniteError::~NotFiniteError() = default;
OverlapError::~OverlapError() = default;

const char* version() { return MOECALC_VERSION; }

const char* engine_build() {
  static const std::string id = engine_build_id(MOECALC_VERSION);
  return id.c_str();
}

std::string build_info() {
  return std::string("{\"moecalc\": \"") + version() + "\", \"compiler\": \"" +
#if defined(__clang__)
         "clang " __clang_version__
#else
         "gcc " __VERSION__
#endif
         "\", \"package_format\": " +
         std::to_string(package_format_version) + "}";
}

}  // namespace moecalc
