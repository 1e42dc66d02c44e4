// What an evaluation looks at besides its result: the two atoms that are closest, and how far atoms moved
// since LAMMPS built its list.
#pragma once

#include <mpi.h>

#include <limits>
#include <string>
#include <vector>

namespace LAMMPS_NS {

/// Of one rank, or of all of them. Doubles alone, so that one reduction does.
struct Extremes {
  double distance2 = std::numeric_limits<double>::infinity();  // of the closest pair
  double first = 0.0;                                          // atom ID of the one
  double second = 0.0;                                         // and of the other
  double x[3] = {0.0, 0.0, 0.0};                               // where the first one is
  double moved2 = 0.0;    // largest squared displacement since the list was built
  double new_list = 0.0;  // 1: the evaluator has another list than in the step before

  double distance() const;
  /// "atoms 3 and 7", or "atom 3 and its periodic image".
  std::string pair() const;
  bool closer_than(const Extremes& other) const;
  /// The extremes of all ranks, on every rank.
  void reduce(MPI_Comm world);
};

/// Positions of a rank's atoms when LAMMPS built its list.
class Displacements {
 public:
  /// A run starts: what was kept is of no list of this run.
  void reset() { n_builds_ = -1; }
  /// x: (n, 3) positions; n_builds: how many lists LAMMPS has built in this run.
  /// Returns the largest squared displacement of the atoms for which `counts` says true.
  template <typename Counts>
  double largest2(const double* const* x, int n, long long n_builds, const Counts& counts) {
    if (n_builds != n_builds_ || static_cast<size_t>(n) * 3 != kept_.size()) {
      n_builds_ = n_builds;
      kept_.clear();
      for (int i = 0; i < n; ++i) kept_.insert(kept_.end(), x[i], x[i] + 3);
      return 0.0;
    }
    double most = 0.0;
    for (int i = 0; i < n; ++i) {
      const double* const from = kept_.data() + 3 * static_cast<size_t>(i);
      const double d[3] = {x[i][0] - from[0], x[i][1] - from[1], x[i][2] - from[2]};
      const double moved2 = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
      if (moved2 > most && counts(i)) most = moved2;
    }
    return most;
  }
  double memory() const { return static_cast<double>(kept_.capacity() * sizeof(double)); }

 private:
  long long n_builds_ = -1;
  std::vector<double> kept_;
};

}  // namespace LAMMPS_NS
