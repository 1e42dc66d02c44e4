// Several models on one list: what active learning asks is how far they agree. The list is made once, by the
// engine; the models compute one after the other.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "moecalc/evaluator.h"

namespace moecalc {

/// Models that an engine has loaded, and keeps. The first one is the one that drives the dynamics, and whose
/// elements the types of a list count. Cutoffs may differ: the list is that of the largest.
class MOECALC_API Committee {
 public:
  Committee() = default;
  /// At least one, which must outlive the committee. Throws Error for none, or a null among them.
  explicit Committee(std::vector<Evaluator*> members);

  int64_t size() const { return static_cast<int64_t>(members_.size()); }
  double cutoff() const;  // Angstrom, the largest

  /// Hands the list to every member, its arrays shared. Throws Error if it is invalid, or has an element that
  /// a member does not know.
  void set_list(const NeighborList& list);
  /// What the first `n_members` say, as Evaluator::evaluate does. Members that are left out cost nothing.
  std::vector<Evaluation> evaluate(int64_t n_members, const Array& positions, const Array& cells,
                                   const Request& request = {}, GhostExchange* exchange = nullptr);

 private:
  std::vector<Evaluator*> members_;
  std::vector<std::vector<int64_t>> type_of_;  // by member: type of each element of the first, or -1
};

/// Deviation of each row of `width` numbers, DeePMD-kit's: sqrt(mean over members of |x - mean|^2).
/// values: of each member, n_rows * width numbers.
/// level: divided by |mean| + level where it is given.
MOECALC_API std::vector<double> deviations(const std::vector<const double*>& values, int64_t n_rows,
                                           int64_t width, std::optional<double> level = std::nullopt);

}  // namespace moecalc
