// Energies from node features on the CPU: the fitting net of a package and the shifts of its elements.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/threads.h"
#include "moecalc/array.h"
#include "package/architecture.h"
#include "package/conditions.h"

namespace moecalc {

/// One object per thread of the engine.
class Readout {
 public:
  virtual ~Readout() = default;
  /// Tables of the types from now on: before the first evaluation.
  virtual void set_tables(const TypeTables& tables) = 0;
  /// `features` (n_local, n_dim) in the dtype of the layers; `types`: of n_local rows or more. Returns
  /// energies (n_local,) float64 in eV; if `d_features` is given, it becomes the gradient of their sum, as
  /// `features`.
  virtual Array evaluate(const Array& features, const std::vector<int64_t>& types, Array* d_features) = 0;
};

/// The net computes in the dtype of `source`, which may be another than that of the layers. Throws
/// Unsupported where the kernels do not cover it. `threads` runs them and must outlive the readout.
std::unique_ptr<Readout> make_readout(const ReadoutSource& source, const std::string& instruction_set,
                                      ThreadPool& threads);

}  // namespace moecalc
