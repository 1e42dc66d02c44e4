// Version of the library and of the package files that it reads.
#pragma once

#include <string>

// Everything is compiled with hidden visibility; this marks what the Python module and the LAMMPS plugin use.
#define MOECALC_API __attribute__((visibility("default")))

namespace moecalc {

/// Newest `format_version` of a package file that this library reads.
inline constexpr int package_format_version = 2;

/// Version of moecalc, for example "0.1.0".
MOECALC_API const char* version();

/// What the library was built with, as a JSON object: "moecalc", "compiler" and "package_format".
MOECALC_API std::string build_info();

}  // namespace moecalc
