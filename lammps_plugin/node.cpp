#include "node.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>

namespace LAMMPS_NS {

namespace {

/// -1 if there is no such variable or it is no number.
int number(const char* variable) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return -1;
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  return end == text || value < 0 || value > 1000000 ? -1 : static_cast<int>(value);
}

struct LocalRank {
  int rank = -1;
  int n_ranks = -1;
  /// Variables of an outer job, which a process inside of it inherits, must not be taken for ours.
  bool fits(int n_all, int n_world_here) const {
    return rank >= 0 && rank < n_ranks && n_ranks <= n_all && n_ranks >= n_world_here;
  }
};

/// The place among the ranks of the node that the launcher gave us.
LocalRank of_launcher(int n_all, int n_world_here) {
  const LocalRank known[] = {
      {number("MPI_LOCALRANKID"), number("MPI_LOCALNRANKS")},  // Hydra: MPICH, Intel MPI, MVAPICH
      {number("OMPI_COMM_WORLD_LOCAL_RANK"), number("OMPI_COMM_WORLD_LOCAL_SIZE")},
      {number("MV2_COMM_WORLD_LOCAL_RANK"), number("MV2_COMM_WORLD_LOCAL_SIZE")},
      {number("PALS_LOCAL_RANKID"), number("PALS_LOCAL_SIZE")},
      {number("SLURM_LOCALID"),
       slurm_tasks(std::getenv("SLURM_STEP_TASKS_PER_NODE"), number("SLURM_NODEID"))},
  };
  for (const LocalRank& place : known) {
    if (place.fits(n_all, n_world_here)) return place;
  }
  return {};
}

}  // namespace

int slurm_tasks(const char* text, int node) {
  while (text != nullptr && *text != '\0' && node >= 0) {
    char* end = nullptr;
    const long tasks = std::strtol(text, &end, 10);
    if (end == text) return 0;
    long repeated = 1;
    if (end[0] == '(' && end[1] == 'x') {
      repeated = std::strtol(end + 2, &end, 10);
      if (*end == ')') ++end;
    }
    if (node < repeated) return static_cast<int>(tasks);
    node -= static_cast<int>(repeated);
    text = *end == ',' ? end + 1 : end;
  }
  return 0;
}

Node::Node(MPI_Comm world) {
  MPI_Comm here;
  MPI_Comm_split_type(world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
  MPI_Comm_rank(here, &rank);
  MPI_Comm_size(here, &n_ranks);
  // mpirun may have bound every rank to processors of its own: what counts is how many there are together.
  cpu_set_t mine;
  cpu_set_t all;
  CPU_ZERO(&mine);
  if (sched_getaffinity(0, sizeof(mine), &mine) != 0) CPU_SET(0, &mine);
  MPI_Allreduce(&mine, &all, sizeof(mine), MPI_BYTE, MPI_BOR, here);
  MPI_Comm_free(&here);

  int n_world = 1;
  int n_all = 1;
  MPI_Comm_size(world, &n_world);
  MPI_Comm_size(MPI_COMM_WORLD, &n_all);  // local: it waits for nobody
  if (n_all > n_world) {
    const LocalRank place = of_launcher(n_all, n_ranks);
    if (place.n_ranks > 0) {
      rank = place.rank;
      n_ranks = place.n_ranks;
    } else {  // too few threads cost less than too many, so all ranks might be here
      MPI_Comm_rank(MPI_COMM_WORLD, &rank);
      n_ranks = n_all;
    }
  }
  n_cores = std::min(CPU_COUNT(&mine), std::max(1, CPU_COUNT(&all) / n_ranks));
}

}  // namespace LAMMPS_NS
