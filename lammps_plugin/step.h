// One evaluation of pair_style moe: the list where it changed, positions, and what can go wrong with them.
#pragma once

#include <string>
#include <vector>

#include "extremes.h"
#include "ghost_exchange.h"
#include "loaded_models.h"
#include "neighbor_map.h"
#include "pointers.h"

namespace LAMMPS_NS {

class Step : protected Pointers {
 public:
  Step(LAMMPS* lmp, class Pair* pair, LoadedModels& models)
      : Pointers(lmp), pair_(pair), models_(models), exchange_(lmp, pair, map_) {}

  /// init() of LAMMPS: atoms may have changed in any way.
  void start_run();
  void forget_list() { map_.forget(); }

  /// Energies and forces of LAMMPS' atoms, which are those of atom_of_row(), by the first model alone or by
  /// all. Any failure ends the run on all ranks.
  std::vector<moecalc::Evaluation> evaluate(const moecalc::Request& request, bool by_all);

  const std::vector<int>& atom_of_row() const { return map_.atom_of_row(); }
  int64_t n_local() const { return map_.n_local(); }  // rows of atoms that this rank owns: the first
  AtomExchange& exchange() { return exchange_; }
  double* n_lists() { return &n_lists_; }  // lists made so far
  double memory() const;                   // bytes

 private:
  int hidden_groups() const;
  AtomView atoms() const;
  PairView pairs() const;
  void check_positions() const;
  void update_list(const AtomView& atoms);
  void note_pair(const AtomView& atoms, int i, int j);
  void check_extremes(const AtomView& atoms);
  void warn_about_close_pair() const;
  void warn_about_old_list() const;
  void warn_about_density(const moecalc::Evaluation& result);
  [[noreturn]] void fail(const std::string& message);
  [[noreturn]] void fail_for_memory(const std::string& message);
  [[noreturn]] void fail_at_closest_pair(const std::string& message);

  class Pair* pair_;
  LoadedModels& models_;
  NeighborMap map_;
  AtomExchange exchange_;
  double n_lists_ = 0;

  // of the run
  bool run_starts_ = true;       // nothing has been evaluated since start_run()
  bool warned_of_pair_ = false;  // two atoms are closer than any training data
  bool warned_of_list_ = false;  // atoms moved too far for LAMMPS' list
  bool density_checked_ = false;
  Displacements displacements_;

  Extremes extremes_;  // of this step; of all ranks from check_extremes() on
};

}  // namespace LAMMPS_NS
