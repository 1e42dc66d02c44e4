#include "neighbor_map.h"

#include <string>

namespace LAMMPS_NS {

bool NeighborMap::is_current(const AtomView& atoms, bigint n_builds, bool just_built) const {
  if (!is_kept_ || just_built || n_builds != n_builds_) return false;
  if (static_cast<int>(kind_of_atom_.size()) != atoms.n_all) return false;
  for (int i = 0; i < atoms.n_all; ++i) {
    if (atoms.kind(i) != kind_of_atom_[i]) return false;
  }
  return true;
}

void NeighborMap::keep(bigint n_builds) {
  n_builds_ = n_builds;
  is_kept_ = true;
}

moecalc::NeighborList NeighborMap::make(const AtomView& atoms, const PairView& pairs, double near,
                                        const AtomOfTag& atom_of_tag) {
  forget();
  start_nodes(atoms);
  int64_t n_edge = 0;
  pairs.for_each(atoms, [&](int, int) { ++n_edge; });

  moecalc::NeighborList list;
  list.edge_index = moecalc::Array::empty({2, n_edge}, moecalc::Dtype::int64);
  list.edge_to = moecalc::Array::empty({n_edge}, moecalc::Dtype::int64);
  auto* const centre_rows = list.edge_index.data<int64_t>();
  auto* const neighbor_rows = centre_rows + n_edge;
  auto* const positions_to = list.edge_to.data<int64_t>();
  // Where all owned atoms are nodes, a node has its atom's number, and the evaluator needs no other.
  const bool has_gaps = n_local_ != atoms.n_local;
  if (has_gaps) list.edge_from = moecalc::Array::empty({n_edge}, moecalc::Dtype::int64);
  int64_t* const positions_from = has_gaps ? list.edge_from.data<int64_t>() : nullptr;

  near_pairs_.clear();
  int64_t edge = 0;
  pairs.for_each(atoms, [&](int i, int j) {
    centre_rows[edge] = row_of_atom_[i];
    neighbor_rows[edge] = node_of(atoms, j, atom_of_tag);
    positions_to[edge] = j;
    if (has_gaps) positions_from[edge] = i;
    ++edge;
    const bool once = atoms.tag[i] <= atoms.tag[j];
    if (once && atoms.distance2(i, j) <= near * near) near_pairs_.emplace_back(i, j);
  });
  list.types = moecalc::Array::of(types_);
  list.system_index = moecalc::Array::zeros({n_local_}, moecalc::Dtype::int64);
  return list;
}

/// The owned atoms become the first nodes.
void NeighborMap::start_nodes(const AtomView& atoms) {
  kind_of_atom_.resize(atoms.n_all);
  for (int i = 0; i < atoms.n_all; ++i) kind_of_atom_[i] = atoms.kind(i);
  row_of_atom_.assign(atoms.n_all, not_mapped);
  canonical_.assign(atoms.n_all, not_mapped);
  atom_of_row_.clear();
  types_.clear();
  for (int i = 0; i < atoms.n_local; ++i) {
    if (kind_of_atom_[i] != not_mapped) add_node(i, kind_of_atom_[i]);
  }
  n_local_ = static_cast<int64_t>(atom_of_row_.size());
}

void NeighborMap::add_node(int i, int kind) {
  row_of_atom_[i] = static_cast<int>(atom_of_row_.size());
  atom_of_row_.push_back(i);
  types_.push_back(kind);
}

/// Node of a neighbor. All images of an atom are one node: an owned atom if this rank owns it, else one
/// ghost. A rank that is alone has no ghosts among its nodes.
int NeighborMap::node_of(const AtomView& atoms, int j, const AtomOfTag& atom_of_tag) {
  int& k = canonical_[j];
  if (k == not_mapped) k = j < atoms.n_local ? j : atom_of_tag(atoms.tag[j]);
  if (k < 0 || k >= atoms.n_all || (atoms.is_alone && k >= atoms.n_local)) {
    throw moecalc::Error("ghost of atom " + std::to_string(atoms.tag[j]) +
                         " without its atom: was an atom lost?");
  }
  if (row_of_atom_[k] == not_mapped) add_node(k, kind_of_atom_[j]);
  return row_of_atom_[k];
}

double NeighborMap::memory() const {
  const size_t n_int =
      kind_of_atom_.capacity() + atom_of_row_.capacity() + row_of_atom_.capacity() + canonical_.capacity();
  return static_cast<double>(n_int * sizeof(int) + types_.capacity() * sizeof(int64_t) +
                             near_pairs_.capacity() * sizeof(near_pairs_[0]));
}

}  // namespace LAMMPS_NS
