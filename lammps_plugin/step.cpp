#include "step.h"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <new>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "exceptions.h"
#include "group.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "neighbor_rules.h"
#include "pair.h"
#include "update.h"

namespace LAMMPS_NS {

using moecalc::min_distance;

namespace {

std::string overlap(const Extremes& pair) {
  return fmt::format(
      "Pair style moe: expected distinct positions, got {} both at {:.8g} {:.8g} {:.8g}: remove the "
      "duplicate, for example with delete_atoms overlap",
      pair.pair(), pair.x[0], pair.x[1], pair.x[2]);
}

}  // namespace

void Step::start_run() {
  map_.forget();
  displacements_.reset();
  density_checked_ = false;
  run_starts_ = true;
  warned_of_pair_ = warned_of_list_ = false;
}

std::vector<moecalc::Evaluation> Step::evaluate(const moecalc::Request& request, bool by_all) {
  // All ranks take part in every exchange, also those without atoms; one rank alone has none to make.
  moecalc::GhostExchange* const exchange = comm->nprocs > 1 ? &exchange_ : nullptr;
  std::vector<moecalc::Evaluation> results;
  try {
    const AtomView view = atoms();
    NeighborRules(lmp).check(pair_->list, models_.first().element_of_type(), view.hidden);
    check_positions();
    extremes_ = Extremes();
    if (!map_.is_current(view, neighbor->ncalls, neighbor->ago == 0)) {
      update_list(view);
      extremes_.new_list = 1.0;
    }
    for (const auto& [i, j] : map_.near_pairs()) note_pair(view, i, j);
    check_extremes(view);
    // a list may be new on some ranks only, and a plan is made by all
    if (exchange != nullptr && extremes_.new_list != 0.0) exchange_.make_plan();
    const auto positions = view.n_all == 0 ? moecalc::Array::empty({0, 3}, moecalc::Dtype::float64)
                                           : moecalc::Array::view<double>(atom->x[0], {view.n_all, 3});
    const int64_t n_models = by_all ? models_.size() : 1;
    results = models_.committee().evaluate(n_models, positions, moecalc::Array(), request, exchange);
  } catch (const LAMMPSException&) {
    throw;
  } catch (const moecalc::OutOfMemoryError& exception) {
    fail_for_memory(exception.what());
  } catch (const std::bad_alloc&) {
    fail_for_memory("out of memory");
  } catch (const moecalc::NotFiniteError& exception) {
    fail_at_closest_pair(exception.what());
  } catch (const moecalc::OverlapError& exception) {
    fail_at_closest_pair(exception.what());
  } catch (const std::exception& exception) {
    fail(exception.what());
  } catch (...) {
    fail("unknown error");
  }
  if (!density_checked_) warn_about_density(results[0]);
  return results;
}

// --- atoms and pairs -----------------------------------------------------------------------------

/// Groups whose atoms are excluded from all interactions, as a bit mask. Such atoms are absent: fix gcmc
/// hides an atom that it tries to delete in this way, and the energy of an isolated atom, which is not zero,
/// must not stay behind.
int Step::hidden_groups() const {
  int hidden = 0;
  for (int m = 0; m < neighbor->nex_group; ++m) {
    // not ex1_bit and ex2_bit, which are made at the next init
    const int first = group->bitmask[neighbor->ex1_group[m]];
    const int second = group->bitmask[neighbor->ex2_group[m]];
    if (second == 1) hidden |= first;
    if (first == 1) hidden |= second;
  }
  return hidden;
}

AtomView Step::atoms() const {
  AtomView view;
  view.n_local = atom->nlocal;
  view.n_all = atom->nlocal + atom->nghost;
  view.x = atom->x;
  view.tag = atom->tag;
  view.type = atom->type;
  view.mask = atom->mask;
  view.hidden = hidden_groups();
  view.element_of_type = models_.first().element_of_type().data();
  view.is_alone = comm->nprocs == 1;
  return view;
}

PairView Step::pairs() const {
  const NeighList* const list = pair_->list;
  return {list->inum, list->ilist, list->numneigh, list->firstneigh};
}

void Step::check_positions() const {
  double** const x = atom->x;
  for (int i = 0; i < atom->nlocal; ++i) {
    if (!std::isfinite(x[i][0] + x[i][1] + x[i][2])) {
      error->one(FLERR, "Pair style moe: position of atom {} is not finite: {} {} {}", atom->tag[i], x[i][0],
                 x[i][1], x[i][2]);
    }
  }
}

/// The evaluator's list, anew.
void Step::update_list(const AtomView& view) {
  // While LAMMPS keeps its list, no atom is further than half of the skin from where it was at the start;
  // twice that if our list comes later than LAMMPS' own.
  const double near = min_distance + (neighbor->ago == 0 ? 1.1 : 2.1) * neighbor->skin;
  const auto atom_of_tag = [this](tagint tag) { return atom->map(tag); };
  models_.committee().set_list(map_.make(view, pairs(), near, atom_of_tag));
  map_.keep(neighbor->ncalls);
  ++n_lists_;
}

double Step::memory() const { return map_.memory() + exchange_.memory() + displacements_.memory(); }

// --- what is worth a warning, or an error --------------------------------------------------------

/// Keeps the pair if it is the closest so far.
void Step::note_pair(const AtomView& view, int i, int j) {
  const double distance2 = view.distance2(i, j);
  const auto first = static_cast<double>(view.tag[i]);
  const bool is_closer =
      distance2 < extremes_.distance2 || (distance2 == extremes_.distance2 && first < extremes_.first);
  if (!is_closer) return;
  extremes_.distance2 = distance2;
  extremes_.first = first;
  extremes_.second = static_cast<double>(view.tag[j]);
  std::copy_n(view.x[i], 3, extremes_.x);
}

/// What all ranks know before they evaluate. Where a run starts, atoms that are too close are an error; later
/// they may be meant (a collision, a trial of fix gcmc), and one warning per run does.
void Step::check_extremes(const AtomView& view) {
  extremes_.moved2 = displacements_.largest2(view.x, view.n_local, neighbor->ncalls,
                                             [&](int i) { return view.kind(i) != not_mapped; });
  if (comm->nprocs > 1) extremes_.reduce(world);
  const bool too_close = extremes_.distance2 < min_distance * min_distance;
  if (too_close && run_starts_) {
    if (extremes_.distance2 == 0.0) error->all(FLERR, overlap(extremes_));
    error->all(FLERR,
               "Pair style moe: {} are {:.3f} A apart, expected at least {:g} A where a run starts: move or "
               "remove one of them (for example with delete_atoms overlap), and check the box and the units",
               extremes_.pair(), extremes_.distance(), min_distance);
  }
  run_starts_ = false;
  if (too_close && !warned_of_pair_) {
    warned_of_pair_ = true;
    warn_about_close_pair();
  }
  if (!warned_of_list_ && 4.0 * extremes_.moved2 > neighbor->skin * neighbor->skin * (1.0 + 1e-9)) {
    warned_of_list_ = true;
    warn_about_old_list();
  }
}

void Step::warn_about_close_pair() const {
  if (comm->me != 0) return;
  error->warning(FLERR,
                 "Pair style moe: {} are {:.3f} A apart at step {}: below {:g} A there is no training data "
                 "and the energies mean nothing, unless a short-range guard such as zbl is added (said "
                 "once per run)",
                 extremes_.pair(), extremes_.distance(), update->ntimestep, min_distance);
}

void Step::warn_about_old_list() const {
  if (comm->me != 0) return;
  error->warning(FLERR,
                 "Pair style moe: at step {} an atom is {:.3g} A from where it was when the neighbor list "
                 "was built, more than half of the skin of {:g} A: neighbors may be missing. Use "
                 "`neigh_modify every 1 delay 0 check yes once no` or a larger skin (said once per run)",
                 update->ntimestep, std::sqrt(extremes_.moved2), neighbor->skin);
}

/// Once per run, of all ranks.
void Step::warn_about_density(const moecalc::Evaluation& result) {
  density_checked_ = true;
  std::array<int, 2> most = {static_cast<int>(result.max_neighbors),
                             static_cast<int>(result.max_angle_neighbors)};
  MPI_Allreduce(MPI_IN_PLACE, most.data(), 2, MPI_INT, MPI_MAX, world);
  if (comm->me != 0) return;
  for (const std::string& sentence : models_.first().evaluator().structure_warnings(most[0], most[1])) {
    error->warning(FLERR, "Pair style moe: " + sentence);
  }
}

// --- failures: the other ranks may be waiting in an exchange, which error->one() ends ------------

void Step::fail(const std::string& message) {
  map_.forget();
  error->one(FLERR, "Pair style moe (rank " + std::to_string(comm->me) + "): " + message);
}

void Step::fail_for_memory(const std::string& message) {
  map_.forget();
  error->one(FLERR, "Pair style moe: {} atoms on rank {} ({} in all on {} ranks): {}", map_.n_local(),
             comm->me, atom->natoms, comm->nprocs, message);
}

/// What the user can look at is the atom in the most extreme environment, which is where the closest
/// neighbor is, of whichever rank. Only the near pairs have been looked at before.
void Step::fail_at_closest_pair(const std::string& message) {
  const AtomView view = atoms();
  pairs().for_each(view, [&](int i, int j) { note_pair(view, i, j); });
  if (!std::isfinite(extremes_.distance2)) fail(message);
  map_.forget();
  if (extremes_.distance2 == 0.0) error->one(FLERR, overlap(extremes_));
  error->one(FLERR,
             "Pair style moe: energies or forces are not finite on rank {}: the closest atoms are {} at "
             "{:.6g} {:.6g} {:.6g} and {}, {:.4g} A apart ({})",
             comm->me, static_cast<tagint>(extremes_.first), extremes_.x[0], extremes_.x[1], extremes_.x[2],
             static_cast<tagint>(extremes_.second), extremes_.distance(), message);
}

}  // namespace LAMMPS_NS
