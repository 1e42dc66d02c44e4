// Kernels of one RepFlow layer, forward and backward (formulas: SPEC.md, section 6; scheme:
// docs/developer/cuda.md).
//
// Centres are sorted by routing group, and a block works on a run of centres of one group: all its rows meet
// the same weight block, in which the group's active experts lie side by side.
#pragma once

#include "kernels/cuda/angles.cuh"
#include "kernels/cuda/edges.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/nodes.cuh"
