// Features of ghost atoms and their gradients, exchanged by LAMMPS, which knows whose ghosts they are.
#pragma once

#include <vector>

#include "moecalc/evaluator.h"
#include "neighbor_map.h"
#include "pointers.h"

namespace LAMMPS_NS {

/// Rows of the evaluator's nodes in a buffer with a row per atom of LAMMPS, which the hooks of a pair style
/// pack and unpack. A row has the type of the network, whichever LAMMPS takes its doubles for.
class AtomExchange : public moecalc::GhostExchange, protected Pointers {
 public:
  AtomExchange(LAMMPS* lmp, class Pair* pair, const NeighborMap& map)
      : Pointers(lmp), pair_(pair), map_(map) {}
  ~AtomExchange() noexcept override {}  // that of Pointers may throw, as far as the compiler knows

  void forward(moecalc::Array features) override;
  void reverse(moecalc::Array gradients) override;
  void sum(moecalc::Array values) override;

  /// Doubles of LAMMPS' communication buffers that hold one row: comm_forward and comm_reverse of a pair
  /// style.
  static int doubles_per_row(int64_t width, bool is_float) {
    return static_cast<int>(is_float ? (width + 1) / 2 : width);
  }

  // Hooks of the pair style. Each returns or takes n rows of `stride` doubles.
  void pack_forward(int n, const int* atoms, double* buf, int stride) const;
  void unpack_forward(int n, int first, const double* buf, int stride);
  void pack_reverse(int n, int first, double* buf, int stride) const;
  void unpack_reverse(int n, const int* atoms, const double* buf, int stride);

  double memory() const { return static_cast<double>(buffer_.capacity()); }  // bytes

 private:
  void start(const moecalc::Array& rows);
  void copy_to_atoms(size_t n_row);
  void copy_from_atoms(size_t first, size_t end);
  char* of_atom(int atom) { return buffer_.data() + static_cast<size_t>(atom) * row_bytes_; }
  const char* of_atom(int atom) const { return buffer_.data() + static_cast<size_t>(atom) * row_bytes_; }
  char* of_row(size_t row) const { return data_ + row * row_bytes_; }
  template <typename T>
  void add(char* sum, const double* summand) const;

  class Pair* pair_;
  const NeighborMap& map_;
  char* data_ = nullptr;  // of the evaluator, in the order of its nodes
  size_t row_bytes_ = 0;
  bool is_float_ = false;
  std::vector<char> buffer_;
};

}  // namespace LAMMPS_NS
