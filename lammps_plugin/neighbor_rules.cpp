#include "neighbor_rules.h"

#include <mpi.h>

#include <string>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "group.h"
#include "neigh_list.h"
#include "neighbor.h"

namespace LAMMPS_NS {

namespace {

constexpr int all_atoms = 1;  // bit of the group "all"
const char* const no_sum =
    "the model's energy is no sum over pairs, so a pair that is left out changes the others as well: ";

/// LAMMPS has no question for the group of comm_modify, which is for derived classes to see.
struct BorderGroup : public Comm {
  static int of(const Comm* comm) { return comm->*(&BorderGroup::bordergroup); }
};

bool both(const std::vector<int>& element_of_type, int i, int j) {
  const int n_types = static_cast<int>(element_of_type.size()) - 1;
  return i >= 1 && j >= 1 && i <= n_types && j <= n_types && element_of_type[i] >= 0 &&
         element_of_type[j] >= 0;
}

}  // namespace

void NeighborRules::check(const NeighList* list, const std::vector<int>& element_of_type, int hidden) const {
  check_atoms();
  check_bonds();
  check_types(list, element_of_type);
  check_groups(element_of_type, hidden);
}

/// Settings that take whole groups from the list or from the ghosts.
void NeighborRules::check_atoms() const {
  if (neighbor->includegroup != 0) {
    error->all(FLERR,
               "Pair style moe: expected all atoms in the neighbor list, got neigh_modify include {}: use "
               "`neigh_modify include all`",
               group->names[neighbor->includegroup]);
  }
  if (const int g = BorderGroup::of(comm); g != 0) {
    error->all(
        FLERR,
        "Pair style moe: expected all atoms as ghosts, got comm_modify group {}: use `comm_modify group "
        "all`",
        group->names[g]);
  }
}

/// LAMMPS leaves bonded atoms out of the list where both weights are exactly 0 (and no kspace style needs
/// them). Bonds may come at any time (fix bond/create, fix deposit, ...), so what counts is that they can.
void NeighborRules::check_bonds() const {
  if (atom->molecular == Atom::ATOMIC) return;
  const bool possible = atom->nbondtypes > 0 || atom->nmolecule > 0 || atom->molecular == Atom::TEMPLATE;
  const int* const flag = neighbor->special_flag;  // 1-2, 1-3, 1-4; 0 = not in the list
  if (!possible || (flag[1] != 0 && flag[2] != 0 && flag[3] != 0)) return;
  const double* const lj = force->special_lj;
  const double* const coul = force->special_coul;
  error->all(
      FLERR,
      "Pair style moe: expected bonded atoms in the neighbor list, got special_bonds lj {:g} {:g} {:g} "
      "coul {:g} {:g} {:g} with atom_style {}: where both weights are 0, LAMMPS leaves bonded atoms "
      "out. Use `special_bonds lj/coul 1.0 1.0 1.0`",
      lj[1], lj[2], lj[3], coul[1], coul[2], coul[3], atom->atom_style);
}

/// Pairs of types that are left out: by neigh_modify, or because a later pair_coeff of pair_style hybrid gave
/// them to another style.
void NeighborRules::check_types(const NeighList* list, const std::vector<int>& element_of_type) const {
  for (int m = 0; m < neighbor->nex_type; ++m) {
    const int i = neighbor->ex1_type[m];
    const int j = neighbor->ex2_type[m];
    if (!both(element_of_type, i, j)) continue;
    error->all(
        FLERR,
        "Pair style moe: expected all pairs in the neighbor list, got neigh_modify exclude type {} {}: "
        "{}use `neigh_modify exclude none`",
        i, j, no_sum);
  }
  while (list->ijskip == nullptr && list->listcopy != nullptr) list = list->listcopy;
  if (list->ijskip == nullptr) return;
  for (int i = 1; i <= atom->ntypes; ++i) {
    for (int j = i; j <= atom->ntypes; ++j) {
      if (list->ijskip[i][j] == 0 || !both(element_of_type, i, j)) continue;
      error->all(
          FLERR,
          "Pair style moe: expected all pairs of its atom types, got a pair_coeff that takes types {} {} "
          "from it: {}use NULL for a type that another style describes, or pair_style hybrid/overlay",
          i, j, no_sum);
    }
  }
}

/// Pairs between groups, or within or between molecules. Groups that are hidden from all are absent instead.
void NeighborRules::check_groups(const std::vector<int>& element_of_type, int hidden) const {
  const int n_group = neighbor->nex_group;
  const int n_mol = neighbor->nex_mol;
  if (n_group == 0 && n_mol == 0) return;
  int present = 0;  // bits of the groups that visible atoms belong to
  for (int i = 0; i < atom->nlocal; ++i) {
    if ((atom->mask[i] & hidden) == 0 && element_of_type[atom->type[i]] >= 0) present |= atom->mask[i];
  }
  MPI_Allreduce(MPI_IN_PLACE, &present, 1, MPI_INT, MPI_BOR, world);
  std::string setting;
  for (int m = 0; m < n_group; ++m) {
    const int first = neighbor->ex1_group[m];
    const int second = neighbor->ex2_group[m];
    const int first_bit = group->bitmask[first];
    const int second_bit = group->bitmask[second];
    if (first_bit == all_atoms || second_bit == all_atoms) continue;
    if ((present & first_bit) != 0 && (present & second_bit) != 0) {
      setting = std::string("group ") + group->names[first] + " " + group->names[second];
    }
  }
  for (int m = 0; m < n_mol; ++m) {
    const int g = neighbor->ex_mol_group[m];
    if ((present & group->bitmask[g]) == 0) continue;
    setting =
        std::string(neighbor->ex_mol_intra[m] != 0 ? "molecule/intra " : "molecule/inter ") + group->names[g];
  }
  if (setting.empty()) return;
  error->all(
      FLERR,
      "Pair style moe: expected all pairs in the neighbor list, got neigh_modify exclude {}: {}use "
      "`neigh_modify exclude none` (fix setforce holds atoms; `neigh_modify exclude group ID all` takes "
      "them out of the model)",
      setting, no_sum);
}

}  // namespace LAMMPS_NS
