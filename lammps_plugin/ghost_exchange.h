// Features of ghost atoms and their gradients, exchanged between the ranks that own and that see them.
#pragma once

#include <mpi.h>

#include <vector>

#include "moecalc/evaluator.h"
#include "neighbor_map.h"
#include "pointers.h"

namespace LAMMPS_NS {

/// Rows of the evaluator's nodes, straight from the owner of an atom to every rank that has it as a node,
/// however far that is. LAMMPS tells once per list who owns what; its own communication, which goes through
/// the six sides of a box one after another and sends every periodic image, is used for nothing else.
class AtomExchange : public moecalc::GhostExchange, protected Pointers {
 public:
  AtomExchange(LAMMPS* lmp, class Pair* pair, const NeighborMap& map)
      : Pointers(lmp), pair_(pair), map_(map) {}
  ~AtomExchange() noexcept override;

  /// Collective, for a new list on any rank: who sends what to whom. Throws moecalc::Error.
  void make_plan();
  /// Whether MPI is to take memory of GPUs: what MOECALC_DEVICE_MPI says, else what the MPI says of itself.
  static bool mpi_takes_device_memory();

  void forward(moecalc::Array features) override;
  void reverse(moecalc::Array gradients) override;
  void sum(moecalc::Array values) override;
  const Plan* plan() const override { return &plan_; }
  void exchange(void* sent, void* received, int64_t row_bytes, bool back) override;

  /// What this rank has sent to others since the start, in rows of features and gradients.
  struct Traffic {
    double exchanges = 0;
    double messages = 0;
    double rows = 0;
    double bytes = 0;
  };
  Traffic& traffic() { return traffic_; }

  // Hooks of the pair style: who owns an atom, one double.
  int pack_owners(int n, const int* atoms, double* buf) const;
  void unpack_owners(int n, int first, const double* buf);

  double memory() const;  // bytes

 private:
  /// Rows of the plan that go to a rank or come from there: places first[k]..first[k + 1] - 1 for ranks[k].
  struct Partners {
    std::vector<int> ranks;
    std::vector<int> first{0};
    void add(int rank, int n) {
      if (n == 0) return;
      ranks.push_back(rank);
      first.push_back(first.back() + n);
    }
    int count(size_t k) const { return first[k + 1] - first[k]; }
  };

  void find_sources();
  void find_destinations();
  void start_messages(const Partners& partners, char* rows, int64_t row_bytes, bool sends);
  size_t check(const moecalc::Array& rows) const;

  class Pair* pair_;
  const NeighborMap& map_;
  MPI_Comm ranks_ = MPI_COMM_NULL;  // of our own, so that no message is taken for one of LAMMPS'
  Plan plan_;
  Partners destinations_;
  Partners sources_;
  std::vector<double> owners_;  // of every atom: rank and number there, while a plan is made
  std::vector<int> wanted_;     // of every received row: number of the atom where it is owned
  std::vector<MPI_Request> requests_;
  std::vector<char> sent_;
  std::vector<char> received_;
  Traffic traffic_;
};

}  // namespace LAMMPS_NS
