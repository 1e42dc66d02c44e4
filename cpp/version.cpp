#include "moecalc/version.h"

#include "moecalc/error.h"

namespace moecalc {

Error::~Error() = default;
OutOfMemoryError::~OutOfMemoryError() = default;
NotFiniteError::~NotFiniteError() = default;
OverlapError::~OverlapError() = default;

const char* version() { return MOECALC_VERSION; }

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
