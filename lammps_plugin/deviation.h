// How far the models of a pair style disagree about one step: the numbers of DeePMD-kit's model_devi.out.
#pragma once

#include <array>
#include <vector>

#include "ghost_exchange.h"
#include "moecalc/evaluator.h"
#include "neighbor_map.h"
#include "pair_settings.h"
#include "pointers.h"

namespace LAMMPS_NS {

/// Of all ranks, on every rank.
struct StepDeviation {
  /// Of virials per atom (energy unit), over their nine components: largest, smallest, root mean square; of
  /// forces (force unit), over atoms: largest, smallest, mean.
  std::array<double, 6> summary{};
  std::vector<double> of_atom;  // force deviations of the atoms that this rank owns, by node
};

class Deviation : protected Pointers {
 public:
  explicit Deviation(LAMMPS* lmp) : Pointers(lmp) {}

  /// Collective. results: of all models for one step, virials included. n_local: nodes that this rank owns.
  /// energy_scale: from eV to the energy unit of the simulation.
  StepDeviation measure(const std::vector<moecalc::Evaluation>& results, int64_t n_local,
                        const DeviationSettings& settings, double energy_scale, AtomExchange& exchange) const;

  /// Collective: deviations of all atoms in the order of their IDs, on rank 0. 0 for atoms that the model
  /// does not see.
  std::vector<double> gather(const StepDeviation& found, const std::vector<int>& atom_of_row) const;

 private:
  std::vector<std::vector<double>> owned_forces(const std::vector<moecalc::Evaluation>& results,
                                                int64_t n_local, AtomExchange& exchange) const;
  std::vector<double> of_virials(const std::vector<moecalc::Evaluation>& results, double n_atoms,
                                 const DeviationSettings& settings, double energy_scale) const;
};

}  // namespace LAMMPS_NS
