#include "extremes.h"

#include <algorithm>
#include <cmath>

namespace LAMMPS_NS {

namespace {

constexpr int n_doubles = sizeof(Extremes) / sizeof(double);

extern "C" void merge_extremes(void* from, void* into, int* n, MPI_Datatype* /*type*/) {
  const auto* const one = static_cast<const Extremes*>(from);
  auto* const other = static_cast<Extremes*>(into);
  for (int k = 0; k < *n; ++k) {
    const double moved2 = std::max(one[k].moved2, other[k].moved2);
    const double new_list = std::max(one[k].new_list, other[k].new_list);
    if (one[k].closer_than(other[k])) other[k] = one[k];
    other[k].moved2 = moved2;
    other[k].new_list = new_list;
  }
}

}  // namespace

double Extremes::distance() const { return std::sqrt(distance2); }

std::string Extremes::pair() const {
  const auto a = std::to_string(static_cast<long long>(std::min(first, second)));
  const auto b = std::to_string(static_cast<long long>(std::max(first, second)));
  return first == second ? "atom " + a + " and its periodic image" : "atoms " + a + " and " + b;
}

/// Equal distances are ordered by the atom IDs, so that the answer does not depend on the ranks.
bool Extremes::closer_than(const Extremes& other) const {
  if (distance2 != other.distance2) return distance2 < other.distance2;
  return first != other.first ? first < other.first : second < other.second;
}

void Extremes::reduce(MPI_Comm world) {
  // Made anew each time, in a microsecond: what is kept would have to be freed before MPI ends.
  MPI_Datatype type;
  MPI_Op merge;
  MPI_Type_contiguous(n_doubles, MPI_DOUBLE, &type);
  MPI_Type_commit(&type);
  MPI_Op_create(&merge_extremes, 1, &merge);
  MPI_Allreduce(MPI_IN_PLACE, this, 1, type, merge, world);
  MPI_Op_free(&merge);
  MPI_Type_free(&type);
}

}  // namespace LAMMPS_NS
