// What of a node's processors and GPUs belongs to one rank.
#pragma once

#include <mpi.h>

namespace LAMMPS_NS {

/// Ranks that share this node, those of other partitions (-partition) and of other communicators (a `comm` of
/// mpi4py) included, and the processors that are left for each.
///
/// The constructor is collective over `world` only. Nothing here may be collective over more, because it runs
/// when a model is loaded, and the other partitions may load theirs later, or none at all: how many ranks
/// there are on the node in all is what the launcher says in the environment of each.
struct Node {
  int rank = 0;
  int n_ranks = 1;
  int n_cores = 1;

  explicit Node(MPI_Comm world);
};

/// Ranks of a node that have the same one of `n_devices` as `rank`, where these go round.
inline int sharers_of(int rank, int n_ranks, int n_devices) {
  return (n_ranks - rank % n_devices + n_devices - 1) / n_devices;
}

/// The number of tasks on node `node` in SLURM's notation, "4(x2),3": 4, 4, 3. 0 if the text does not say.
int slurm_tasks(const char* text, int node);

}  // namespace LAMMPS_NS
