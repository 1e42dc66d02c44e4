// pair_style moe: forces and energies of a moecalc package (*.moe.pt) in LAMMPS.
//
// No type of torch or of moecalc appears here, so that whatever includes this header needs LAMMPS only.
#pragma once

#include <memory>
#include <string>

#include "pair.h"

namespace LAMMPS_NS {

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
  int pack_reverse_comm(int n, int first, double* buf) override;
  void unpack_reverse_comm(int n, int* list, double* buf) override;

  double memory_usage() override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl;

  void allocate();
  void check_units();
  void check_special_bonds();
  void load_model();
  void log_model();
  void build_graph();
  void warn_about_density(int max_neighbors, int max_angle_neighbors);
  [[noreturn]] void fail(const std::string& message, bool out_of_memory, bool not_finite);
};

}  // namespace LAMMPS_NS
