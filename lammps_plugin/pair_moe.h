// pair_style moe: forces and energies of a moecalc package (*.moe.pt) in LAMMPS.
//
// Types of moecalc are only declared and those of torch absent, so that whatever includes this header needs
// LAMMPS only.
#pragma once

#include <memory>
#include <string>

#include "pair.h"

namespace moecalc {
struct Evaluation;
struct Request;
}  // namespace moecalc

namespace LAMMPS_NS {

struct Extremes;

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
  void* extract(const char* name, int& dim) override;

 private:
  class Impl;
  std::unique_ptr<Impl> impl;

  void allocate();
  void check_units();
  void load_model();
  void agree(const std::string& message);
  void set_conditions();
  void give_conditions();
  int choose_threads(int n_cores) const;
  void log_model();
  void log_conditions();
  int hidden_groups() const;
  int kind(int i, int hidden) const;
  void add_node(int i, int kind);
  void start_nodes(int hidden);
  int node_of(int j, int kind);
  void check_positions();
  void build_graph();
  bool list_is_current() const;
  void build_list();
  moecalc::Evaluation evaluate(const moecalc::Request& request);
  double distance2(int i, int j) const;
  void note_pair(int i, int j, double distance2);
  void check_extremes(int hidden);
  static std::string overlap(const Extremes& pair);
  void warn_about_density(int max_neighbors, int max_angle_neighbors);
  [[noreturn]] void fail(const std::string& message, bool out_of_memory, bool not_finite);
};

}  // namespace LAMMPS_NS
