// Whether the masses and labels of atom types agree with the elements that pair_coeff gives them.
#pragma once

#include <string>
#include <vector>

#include "pointers.h"

namespace LAMMPS_NS {

class TypeCheck : protected Pointers {
 public:
  explicit TypeCheck(LAMMPS* lmp) : Pointers(lmp) {}

  /// Warns, on rank 0, of each type that contradicts its element. All ranks call it.
  /// elements: one symbol or NULL per atom type.
  void warn(const std::vector<std::string>& elements) const;

 private:
  void warn_about_masses(const std::vector<std::string>& elements) const;
  void warn_about_labels(const std::vector<std::string>& elements) const;
};

/// Whether an atom of this mass (g/mol) may be of this element: within a tenth of the standard atomic weight,
/// or nearer to it than to that of any other element (isotopes), or an isotope of hydrogen. True for what is
/// no element.
bool mass_fits(double mass, const std::string& element);

/// The element whose standard atomic weight is within a hundredth of this mass; "" if there is none.
std::string element_of_mass(double mass);

}  // namespace LAMMPS_NS
