// What an input may leave out of LAMMPS' neighbor list. The energy of the model is no sum over pairs: a pair
// that is missing changes everything around it, so it is either none that the model sees, or an error.
#pragma once

#include <vector>

#include "pointers.h"

namespace LAMMPS_NS {

class NeighborRules : protected Pointers {
 public:
  explicit NeighborRules(LAMMPS* lmp) : Pointers(lmp) {}

  /// Stops if the settings hide atoms or pairs that the model has to see. All ranks call it, at every
  /// evaluation, because most of the settings take effect without an init (`run pre no`, fixes).
  /// element_of_type: index 1..ntypes, negative where the model does not see the type.
  /// hidden: bits of the groups whose atoms are absent.
  void check(const class NeighList* list, const std::vector<int>& element_of_type, int hidden) const;

 private:
  void check_atoms() const;
  void check_bonds() const;
  void check_types(const class NeighList* list, const std::vector<int>& element_of_type) const;
  void check_groups(const std::vector<int>& element_of_type, int hidden) const;
};

}  // namespace LAMMPS_NS
