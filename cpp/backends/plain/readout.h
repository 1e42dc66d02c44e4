// Node features -> energies of atoms (SPEC section 8), in the precision of the fitting net.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backends/plain/matrix.h"
#include "core/threads.h"
#include "package/architecture.h"
#include "package/conditions.h"

namespace moecalc::plain {

class Readout {
 public:
  virtual ~Readout() = default;
  virtual void set_tables(const TypeTables& tables) = 0;
  /// features (n_atom, n_dim), types (n_atom or more): energies (n_atom) in eV. If `d_features` is given, it
  /// becomes dE/d(features).
  virtual std::vector<double> evaluate(const Matrix<double>& features, const std::vector<int64_t>& types,
                                       Matrix<double>* d_features) = 0;
  virtual int64_t bytes() const = 0;
};

/// `dtype`: what the net computes in. `source` and `threads` must outlive it.
std::unique_ptr<Readout> make_readout(const ReadoutSource& source, Dtype dtype, ThreadPool& threads);

}  // namespace moecalc::plain
