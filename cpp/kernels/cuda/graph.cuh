// The graph of a step on a target, and what all kernels on it have in common.
//
// A neighbor list with skin is uploaded once ("list edges", sorted by centre). Each step filters it: edges of
// a centre become contiguous, close edges first.
#pragma once

#include <cstdint>

#include "kernels/cuda/block.cuh"

namespace moecalc::cuda {

/// Values of `Graph::counts`.
enum Count { kEdges, kClose, kAngles, kMostEdges, kMostClose, kOverflow, kProblem, kCounts };

/// Centres begin..end-1 (or rows of nodes, slots) of one routing group: the work of one block.
struct Run {
  int group;
  int begin;
  int end;
};

/// The graph in model order (local atoms sorted by routing group, then ghosts). A slot is a (routing group of
/// the centre, neighbor) pair of the list.
struct Graph {
  int n_node = 0;
  int n_local = 0;
  int n_list = 0;
  int n_slot = 0;
  int n_systems = 1;

  // uploaded with the list
  const int* list_first = nullptr;     // (n_local + 1) list edges of a centre
  const int* list_from = nullptr;      // (n_list) row of positions where the edge starts
  const int* list_to = nullptr;        // (n_list) and where it ends
  const int* list_centre = nullptr;    // (n_list)
  const int* list_neighbor = nullptr;  // (n_list)
  const int* list_slot = nullptr;      // (n_list)
  // Cell shifts (n_list, 3), in bytes, or wide where one of them does not fit; both null without cells.
  const int8_t* list_shift = nullptr;
  const double* list_wide_shift = nullptr;
  const int* slot_node = nullptr;     // (n_slot)
  const int* slot_first = nullptr;    // (n_slot + 1) into slot_list
  const int* slot_list = nullptr;     // (n_list) list edges of every slot
  const int* node_first = nullptr;    // (n_node + 1) into node_slot
  const int* node_slot = nullptr;     // (n_slot) slots of every node
  const int* type = nullptr;          // (n_node)
  const int* engine_row = nullptr;    // (n_node)
  const int* system = nullptr;        // (n_local)
  const int* system_first = nullptr;  // (n_systems + 1) into system_row
  const int* system_row = nullptr;    // (n_local) rows of every system

  // of this step
  int* n_close = nullptr;       // (n_local) close edges of a centre
  int* first_edge = nullptr;    // (n_local + 1)
  int* first_close = nullptr;   // (n_local + 1)
  int* first_angle = nullptr;   // (n_local + 1)
  int* problem = nullptr;       // (n_local) first list edge that cannot be used, n_list: none
  int* edge_list = nullptr;     // (n_edge) list edge of an edge
  int* edge_centre = nullptr;   // (n_edge)
  int* edge_of_list = nullptr;  // (n_list), -1: beyond the cutoff
  int64_t* counts = nullptr;    // (kCounts)

  // capacities of the buffers
  int64_t most_edges = 0;
  int64_t most_close = 0;
  int64_t most_angles = 0;

  MOECALC_KERNEL int neighbor(int edge) const { return list_neighbor[edge_list[edge]]; }
  MOECALC_KERNEL int slot(int edge) const { return list_slot[edge_list[edge]]; }
};

/// Base of kernels on the graph. One block per centre and no shared memory, unless a kernel has its own
/// `blocks` or `shared_bytes`.
template <int THREADS>
struct GraphKernel {
  static constexpr int kThreads = THREADS;
  Graph graph;

  int64_t blocks() const { return graph.n_local; }
  int64_t shared_bytes() const { return 0; }
};

/// Blocks that take `rows` rows, `rows_of_block` each.
constexpr int64_t blocks_for(int64_t rows, int64_t rows_of_block) {
  return (rows + rows_of_block - 1) / rows_of_block;
}

template <class Value>
MOECALC_BOTH Value smaller(Value first, Value second) {
  return first < second ? first : second;
}
template <class Value>
MOECALC_BOTH Value larger(Value first, Value second) {
  return first > second ? first : second;
}

}  // namespace moecalc::cuda
