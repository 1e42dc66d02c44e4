#include "graph/list_layout.h"

#include <algorithm>
#include <numeric>

namespace moecalc {

namespace {

/// Turns counts[0..n-1] (with counts[n] unused) into offsets[0..n].
void counts_to_offsets(std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (int64_t& count : counts) {
    const int64_t offset = total;
    total += count;
    count = offset;
  }
}

}  // namespace

AtomOrder order_atoms(const NeighborList& list, const GraphRules& rules) {
  const int64_t n_node = list.types.size(0);
  const int64_t n_local = list.system_index.size(0);
  const auto* type = list.types.data<int64_t>();
  const auto* system = list.system_index.data<int64_t>();
  // ghosts have the one condition that there is then
  std::vector<int64_t> full_type(type, type + n_node);
  for (int64_t i = 0; i < n_node; ++i) {
    full_type[static_cast<size_t>(i)] += rules.n_types * rules.condition(i < n_local ? system[i] : 0);
  }
  const int64_t* group = rules.group_by_system ? system : rules.group_by_condition ? full_type.data() : type;
  AtomOrder order;
  order.node_splits.assign(static_cast<size_t>(rules.n_groups(list.n_systems)) + 1, 0);
  for (int64_t i = 0; i < n_local; ++i) ++order.node_splits[static_cast<size_t>(group[i])];
  counts_to_offsets(order.node_splits);
  order.model_row.resize(static_cast<size_t>(n_local));
  order.engine_row.resize(static_cast<size_t>(n_node));
  std::vector<int64_t> next = order.node_splits;
  for (int64_t i = 0; i < n_local; ++i) {
    const int64_t row = next[static_cast<size_t>(group[i])]++;
    order.model_row[static_cast<size_t>(i)] = row;
    order.engine_row[static_cast<size_t>(row)] = i;
  }
  std::iota(order.engine_row.begin() + n_local, order.engine_row.end(), n_local);
  order.types.reserve(static_cast<size_t>(n_node));
  for (const int64_t row : order.engine_row) order.types.push_back(full_type[static_cast<size_t>(row)]);
  return order;
}

EdgeOrder order_edges(const NeighborList& list, const GraphRules& rules, const AtomOrder& atoms) {
  const int64_t n_edge = list.edge_index.size(1);
  const auto* centre = list.edge_index.data<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  const auto* type = list.types.data<int64_t>();
  const auto allowed = [&](int64_t e) {
    return rules.pair_mask[static_cast<size_t>(type[centre[e]] * rules.n_types + type[neighbor[e]])] != 0;
  };
  const auto row_of = [&](int64_t e) {
    return static_cast<size_t>(atoms.model_row[static_cast<size_t>(centre[e])]);
  };
  EdgeOrder order;
  order.begin.assign(atoms.model_row.size() + 1, 0);
  for (int64_t e = 0; e < n_edge; ++e) {
    if (allowed(e)) ++order.begin[row_of(e)];
  }
  counts_to_offsets(order.begin);
  order.edges.resize(static_cast<size_t>(order.begin.back()));
  std::vector<int64_t> next = order.begin;
  for (int64_t e = 0; e < n_edge; ++e) {
    if (allowed(e)) order.edges[static_cast<size_t>(next[row_of(e)]++)] = e;
  }
  return order;
}

void make_slots(const std::vector<int64_t>& neighbor, const std::vector<int64_t>& edge_splits, int64_t n_node,
                Slots& slots) {
  const size_t n_edge = neighbor.size();
  slots.of_edge.resize(n_edge);
  slots.node.clear();
  slots.splits.assign(1, 0);
  std::vector<int64_t> of_node(static_cast<size_t>(n_node), -1);
  for (size_t group = 0; group + 1 < edge_splits.size(); ++group) {
    const int64_t first = slots.splits.back();
    for (auto edge = static_cast<size_t>(edge_splits[group]);
         edge < static_cast<size_t>(edge_splits[group + 1]); ++edge) {
      int64_t& place = of_node[static_cast<size_t>(neighbor[edge])];
      if (place < first) {
        place = static_cast<int64_t>(slots.node.size());
        slots.node.push_back(neighbor[edge]);
      }
      slots.of_edge[edge] = place;
    }
    slots.splits.push_back(static_cast<int64_t>(slots.node.size()));
  }
  slots.first.assign(slots.node.size() + 1, 0);
  for (const int64_t slot : slots.of_edge) ++slots.first[static_cast<size_t>(slot) + 1];
  std::partial_sum(slots.first.begin(), slots.first.end(), slots.first.begin());
  slots.edges.resize(n_edge);
  std::vector<int64_t> next(slots.first.begin(), slots.first.end() - 1);
  for (size_t edge = 0; edge < n_edge; ++edge) {
    slots.edges[static_cast<size_t>(next[static_cast<size_t>(slots.of_edge[edge])]++)] =
        static_cast<int64_t>(edge);
  }
}

}  // namespace moecalc
