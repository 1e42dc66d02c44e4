// From LAMMPS' full neighbor list, periodic images included, to the list of the evaluator, in which every
// atom is one node. Knows arrays only, no class of LAMMPS.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "lmptype.h"
#include "moecalc/evaluator.h"

namespace LAMMPS_NS {

constexpr int not_mapped = -1;

/// Atoms of one rank, owned ones first, then ghosts. Nothing is copied: valid until LAMMPS moves on.
struct AtomView {
  int n_local = 0;
  int n_all = 0;                         // with ghosts
  const double* const* x = nullptr;      // (n_all, 3) Angstrom
  const tagint* tag = nullptr;           // (n_all,) atom IDs
  const int* type = nullptr;             // (n_all,) from 1
  const int* mask = nullptr;             // (n_all,) bits of the groups that an atom is in
  int hidden = 0;                        // bits of the groups whose atoms are absent
  const int* element_of_type = nullptr;  // index from 1; not_mapped for types that the model does not see
  bool is_alone = false;                 // there are no other ranks: a ghost is an image of an owned atom

  /// What the model sees of an atom: its element, or not_mapped if it is absent.
  int kind(int i) const { return (mask[i] & hidden) != 0 ? not_mapped : element_of_type[type[i]]; }
  double distance2(int i, int j) const {
    const double d[3] = {x[j][0] - x[i][0], x[j][1] - x[i][1], x[j][2] - x[i][2]};
    return d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
  }
};

/// LAMMPS' list of the neighbors of owned atoms, each pair from both sides, skin included.
struct PairView {
  int n_centre = 0;
  const int* centres = nullptr;
  const int* n_neighbor = nullptr;        // by centre
  const int* const* neighbors = nullptr;  // by centre; the upper bits are flags

  /// Calls visit(i, j) for all pairs of atoms that the model sees.
  template <typename Visit>
  void for_each(const AtomView& atoms, const Visit& visit) const {
    for (int k = 0; k < n_centre; ++k) {
      const int i = centres[k];
      if (atoms.kind(i) == not_mapped) continue;
      for (int m = 0; m < n_neighbor[i]; ++m) {
        const int j = neighbors[i][m] & NEIGHMASK;
        if (atoms.kind(j) != not_mapped) visit(i, j);
      }
    }
  }
};

/// Which node each atom is, and whether the list that was made of them still holds.
class NeighborMap {
 public:
  /// Index of the atom that stands for all atoms of an ID; negative if there is none.
  using AtomOfTag = std::function<int(tagint)>;

  /// Whether the kept list still describes the atoms. LAMMPS renumbers them only when it builds its own list
  /// anew (n_builds, or just_built where that count starts again), but fixes change types and groups in
  /// between (fix atom/swap, fix gcmc). A box that changes is no reason: positions of images are LAMMPS' own.
  bool is_current(const AtomView& atoms, bigint n_builds, bool just_built) const;

  /// The evaluator's list, whose positions are those of all atoms in LAMMPS' order. Not current before
  /// keep(). near: pairs closer than this (Angstrom) are remembered. Throws moecalc::Error.
  moecalc::NeighborList make(const AtomView& atoms, const PairView& pairs, double near,
                             const AtomOfTag& atom_of_tag);
  /// The evaluator took the list of LAMMPS' n_builds-th.
  void keep(bigint n_builds);
  void forget() { is_kept_ = false; }

  int64_t n_local() const { return n_local_; }  // nodes that this rank owns: the first
  const std::vector<int>& atom_of_row() const { return atom_of_row_; }  // by node
  /// not_mapped if the atom is no node.
  int row_of_atom(int atom) const { return row_of_atom_[atom]; }
  size_t n_atom() const { return row_of_atom_.size(); }  // of LAMMPS, ghosts included
  const std::vector<std::pair<int, int>>& near_pairs() const { return near_pairs_; }
  double memory() const;  // bytes

 private:
  void add_node(int i, int kind);
  void start_nodes(const AtomView& atoms);
  int node_of(const AtomView& atoms, int j, const AtomOfTag& atom_of_tag);

  bool is_kept_ = false;
  bigint n_builds_ = -1;
  int64_t n_local_ = 0;
  std::vector<int> kind_of_atom_;  // when the list was made
  std::vector<int> atom_of_row_;
  std::vector<int> row_of_atom_;  // the inverse; not_mapped if the atom is no node
  std::vector<int> canonical_;    // atom of the same ID that stands for all of its images
  std::vector<int64_t> types_;    // by node
  std::vector<std::pair<int, int>> near_pairs_;
};

}  // namespace LAMMPS_NS
