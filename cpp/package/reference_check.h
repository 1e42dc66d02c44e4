// The reference frames of a package against what an evaluator gives for them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "graph/graph.h"
#include "moecalc/evaluator.h"

namespace moecalc {

/// A stored structure and the answer that the package must give (eV, Angstrom).
struct ReferenceFrame {
  std::vector<int64_t> types;
  std::vector<double> positions;  // n_atom x 3
  std::vector<double> cell;       // 3 x 3, rows are vectors
  std::vector<double> forces;     // n_atom x 3
  std::vector<double> virial;     // 3 x 3
  bool pbc[3] = {false, false, false};
  double energy = 0.0;
  std::vector<int64_t> charge_spin;  // charge and multiplicity; empty: the model was given none
  std::vector<double> fparam;
};

/// (n_frames, 2) int64 and (n_frames, n_fparam) float64, undefined where the model was given none. Throws
/// Error for frames that differ in what they were given.
std::pair<Array, Array> conditions_of_frames(const std::vector<const ReferenceFrame*>& frames);

/// Frames of `text` (reference.json). Throws Error for what is not a list of whole frames of finite numbers.
std::vector<ReferenceFrame> read_reference(const std::string& text, const std::vector<std::string>& elements);

/// Few frames, periodic and large ones first, that hold every element of `wanted` (types) that any frame
/// holds.
std::vector<size_t> covering_frames(const std::vector<ReferenceFrame>& frames, std::vector<bool> wanted);

/// The frame of fewest elements among those that have neighbors, or any frame.
size_t cheapest_frame(const std::vector<ReferenceFrame>& frames);

/// All frames as the systems of one list; the edges come from all images. Throws Error for
/// frames that would take long, or much memory.
ListedEdges reference_list(const std::vector<const ReferenceFrame*>& frames, const GraphRules& rules);

/// Throws Error that names the quantity unless the results deviate by at most `tolerance`, relative to
/// max(1, largest magnitude of the frame). NaN deviates.
void compare_with_reference(const std::vector<const ReferenceFrame*>& frames, const Evaluation& result,
                            double tolerance, const std::string& where);

}  // namespace moecalc
