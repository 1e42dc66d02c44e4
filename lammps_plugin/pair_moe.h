// pair_style moe: forces and energies of a moecalc package (*.moe.pt) in LAMMPS.
//
// Types of moecalc are only declared, so that whatever includes this header needs LAMMPS only.
#pragma once

#include <memory>
#include <vector>

#include "pair.h"

namespace moecalc {
struct Evaluation;
}  // namespace moecalc

namespace LAMMPS_NS {

/// What LAMMPS calls. The packages are LoadedModels, the list a NeighborMap, the data of ghosts an
/// AtomExchange.
class PairMoE : public Pair {
 public:
  explicit PairMoE(class LAMMPS* lmp);
  ~PairMoE() override;

  void compute(int eflag, int vflag) override;
  void settings(int narg, char** arg) override;
  void coeff(int narg, char** arg) override;
  void init_style() override;
  double init_one(int i, int j) override;

  void write_restart(FILE* fp) override;
  void read_restart(FILE* fp) override;
  void write_restart_settings(FILE* fp) override;
  void read_restart_settings(FILE* fp) override;

  int pack_forward_comm(int n, int* list, double* buf, int pbc_flag, int* pbc) override;
  void unpack_forward_comm(int n, int first, double* buf) override;

  double memory_usage() override;
  void* extract(const char* name, int& dim) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl;

  void allocate();
  void check_units();
  void load_models();
  void open_deviation_file();
  bool deviates_now() const;
  void tell_deviation(const std::vector<moecalc::Evaluation>& results);
  void add_forces(const moecalc::Evaluation& result);
  void add_energies(const moecalc::Evaluation& result);
  void add_virials(const moecalc::Evaluation& result);
};

}  // namespace LAMMPS_NS
