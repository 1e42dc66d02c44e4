#include "deviation.h"

#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "atom.h"
#include "comm.h"
#include "moecalc/committee.h"

namespace LAMMPS_NS {

namespace {

std::vector<const double*> addresses(const std::vector<std::vector<double>>& arrays) {
  std::vector<const double*> found;
  for (const std::vector<double>& array : arrays) found.push_back(array.data());
  return found;
}

/// From the unit of the simulation to that of the models.
std::optional<double> unscaled(std::optional<double> level, double scale) {
  if (!level) return std::nullopt;
  return *level / scale;
}

}  // namespace

StepDeviation Deviation::measure(const std::vector<moecalc::Evaluation>& results, int64_t n_local,
                                 const DeviationSettings& settings, double energy_scale,
                                 AtomExchange& exchange) const {
  StepDeviation found;
  const std::vector<std::vector<double>> forces = owned_forces(results, n_local, exchange);
  found.of_atom =
      moecalc::deviations(addresses(forces), n_local, 3, unscaled(settings.relative, energy_scale));
  if (!settings.relative) {
    for (double& value : found.of_atom) value *= energy_scale;
  }
  double largest = 0.0;
  double smallest = std::numeric_limits<double>::max();
  std::array<double, 2> sums = {0.0, static_cast<double>(n_local)};  // of deviations, and of atoms
  for (const double value : found.of_atom) {
    largest = std::max(largest, value);
    smallest = std::min(smallest, value);
    sums[0] += value;
  }
  MPI_Allreduce(MPI_IN_PLACE, &largest, 1, MPI_DOUBLE, MPI_MAX, world);
  MPI_Allreduce(MPI_IN_PLACE, &smallest, 1, MPI_DOUBLE, MPI_MIN, world);
  MPI_Allreduce(MPI_IN_PLACE, sums.data(), 2, MPI_DOUBLE, MPI_SUM, world);
  const double n_atoms = std::max(1.0, sums[1]);
  if (sums[1] == 0.0) smallest = 0.0;

  const std::vector<double> of_virial = of_virials(results, n_atoms, settings, energy_scale);
  const auto [least, most] = std::minmax_element(of_virial.begin(), of_virial.end());
  const double squares = std::inner_product(of_virial.begin(), of_virial.end(), of_virial.begin(), 0.0);
  found.summary = {*most, *least, std::sqrt(squares / 9.0), largest, smallest, sums[0] / n_atoms};
  return found;
}

/// Forces (n_local, 3) of each model, with what other ranks contribute to them.
std::vector<std::vector<double>> Deviation::owned_forces(const std::vector<moecalc::Evaluation>& results,
                                                         int64_t n_local, AtomExchange& exchange) const {
  const auto n_models = static_cast<int64_t>(results.size());
  const int64_t n_node = results[0].forces.size(0);
  std::vector<std::vector<double>> forces;
  if (comm->nprocs == 1) {
    for (const moecalc::Evaluation& result : results) {
      const auto* const force = result.forces.data<double>();
      forces.emplace_back(force, force + 3 * n_local);
    }
    return forces;
  }
  // one message for all models
  const auto rows = moecalc::Array::zeros({n_node, 3 * n_models}, moecalc::Dtype::float64);
  auto* const all = rows.data<double>();
  for (int64_t m = 0; m < n_models; ++m) {
    const auto* const force = results[m].forces.data<double>();
    for (int64_t i = 0; i < n_node; ++i) std::copy_n(force + 3 * i, 3, all + 3 * (i * n_models + m));
  }
  exchange.reverse(rows);
  for (int64_t m = 0; m < n_models; ++m) {
    std::vector<double> of_model(3 * n_local);
    for (int64_t i = 0; i < n_local; ++i) std::copy_n(all + 3 * (i * n_models + m), 3, &of_model[3 * i]);
    forces.push_back(std::move(of_model));
  }
  return forces;
}

/// Of the nine components of the virial per atom.
std::vector<double> Deviation::of_virials(const std::vector<moecalc::Evaluation>& results, double n_atoms,
                                          const DeviationSettings& settings, double energy_scale) const {
  std::vector<double> sums;
  for (const moecalc::Evaluation& result : results) {
    const auto* const virial = result.virial.data<double>();
    sums.insert(sums.end(), virial, virial + 9);
  }
  MPI_Allreduce(MPI_IN_PLACE, sums.data(), static_cast<int>(sums.size()), MPI_DOUBLE, MPI_SUM, world);
  for (double& value : sums) value /= n_atoms;
  std::vector<const double*> by_model;
  for (size_t k = 0; k < results.size(); ++k) by_model.push_back(sums.data() + 9 * k);
  std::vector<double> found =
      moecalc::deviations(by_model, 9, 1, unscaled(settings.relative_v, energy_scale));
  if (!settings.relative_v) {
    for (double& value : found) value *= energy_scale;
  }
  return found;
}

std::vector<double> Deviation::gather(const StepDeviation& found, const std::vector<int>& atom_of_row) const {
  const int n_local = atom->nlocal;
  std::vector<double> rows(2 * static_cast<size_t>(n_local), 0.0);  // ID and deviation
  for (int i = 0; i < n_local; ++i) rows[2 * i] = static_cast<double>(atom->tag[i]);
  for (size_t k = 0; k < found.of_atom.size(); ++k) rows[2 * atom_of_row[k] + 1] = found.of_atom[k];

  const int n_sent = 2 * n_local;
  std::vector<int> counts(comm->nprocs);
  MPI_Gather(&n_sent, 1, MPI_INT, counts.data(), 1, MPI_INT, 0, world);
  std::vector<int> starts(comm->nprocs, 0);
  std::partial_sum(counts.begin(), counts.end() - 1, starts.begin() + 1);
  std::vector<double> all(comm->me == 0 ? starts.back() + counts.back() : 0);
  MPI_Gatherv(rows.data(), n_sent, MPI_DOUBLE, all.data(), counts.data(), starts.data(), MPI_DOUBLE, 0,
              world);
  std::vector<std::pair<double, double>> by_id;
  for (size_t k = 0; k + 1 < all.size(); k += 2) by_id.emplace_back(all[k], all[k + 1]);
  std::sort(by_id.begin(), by_id.end());
  std::vector<double> values;
  for (const auto& [id, value] : by_id) values.push_back(value);
  return values;
}

}  // namespace LAMMPS_NS
