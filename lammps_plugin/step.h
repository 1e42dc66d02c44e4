// One evaluation of pair_style moe: the list where it changed, positions, and what can go wrong with them.
#pragma once

#include <string>
#include <vector>

#include "extremes.h"
#include "ghost_exchange.h"
#include "loaded_model.h"
#include "neighbor_map.h"
#include "pointers.h"

namespace LAMMPS_NS {

class Step : protected Pointers {
 public:
  Step(LAMMPS* lmp, class Pair* pair, LoadedModel& model)
      : Pointers(lmp), pair_(pair), model_(model), exchange_(lmp, pair, map_) {}

  /// init() of LAMMPS: atoms may have changed in any way.
  void start_run();
  void forget_list() { map_.forget(); }

  /// Energies and forces of LAMMPS' atoms, which are those of atom_of_row(). Any failure ends the run on all
  /// ranks.
  moecalc::Evaluation evaluate(const moecalc::Request& request);

  const std::vector<int>& atom_of_row() const { return map_.atom_of_row(); }
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
  LoadedModel& model_;
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
