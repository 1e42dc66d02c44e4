// Node parts of the edge and angle maps (SPEC.md, section 6, steps 3 to 7): their weights are split by input,
//   [v_i, v_j, e_ij] W = v_i W_centre + v_j W_neighbor + e_ij W_edge,
// where the first term is the same for all edges of a centre, and the second for all edges of a slot.
#pragma once

#include "kernels/common/layer.h"
#include "kernels/cpu/product.inl"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// edge_centre_part = v_i W_centre + b, and the same of the angle maps, for centres begin..end of one group.
template <class Real>
void project_centres(const LayerArgs<Real>& layer, int64_t begin, int64_t end, Scratch<Real>&) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = layer.weights[layer.graph->group[begin]];
  const Real* node = layer.node + begin * shape.n_padded;
  const int64_t edge_columns = shape.edge_columns();
  Real* edge_part = layer.edge_centre_part + begin * edge_columns;
  const Real* edge_bias = layer.distance == nullptr ? weights.edge_bias : weights.edge_distance_bias;
  for (int64_t row = 0; row < end - begin; ++row) {
    copy_row(edge_part + row * edge_columns, edge_bias, edge_columns);
  }
  add_product(end - begin, edge_columns, shape.n, node, shape.n_padded, weights.edge_centre, edge_columns,
              edge_part, edge_columns);
  const int64_t angle_columns = shape.angle_columns();
  if (angle_columns == 0) return;
  Real* angle_part = layer.angle_centre_part + begin * angle_columns;
  const Real* angle_bias = layer.distance == nullptr ? weights.angle_bias : weights.angle_distance_bias;
  for (int64_t row = 0; row < end - begin; ++row) {
    copy_row(angle_part + row * angle_columns, angle_bias, angle_columns);
  }
  add_product(end - begin, angle_columns, shape.n, node, shape.n_padded, weights.angle_centre, angle_columns,
              angle_part, angle_columns);
}

/// The neighbors of slots begin..end, row by row.
template <class Real>
inline const Real* gather_slot_nodes(const LayerArgs<Real>& layer, int64_t begin, int64_t end,
                                     Scratch<Real>& scratch) {
  const int64_t width = layer.shape->n_padded;
  Real* rows = scratch.slot_nodes().get((end - begin) * width);
  for (int64_t slot = begin; slot < end; ++slot) {
    copy_row(rows + (slot - begin) * width, layer.node + layer.graph->slot_node[slot] * width, width);
  }
  return rows;
}

/// edge_neighbor_part = v_j W_neighbor of slots begin..end of a group.
template <class Real>
void project_slots(const LayerArgs<Real>& layer, int64_t group, int64_t begin, int64_t end,
                   Scratch<Real>& scratch) {
  const LayerShape& shape = *layer.shape;
  const int64_t columns = shape.edge_columns();
  const Real* rows = gather_slot_nodes(layer, begin, end, scratch);
  product(end - begin, columns, shape.n, rows, shape.n_padded, layer.weights[group].edge_neighbor, columns,
          layer.edge_neighbor_part + begin * columns, columns);
}

/// d_neighbor_part = sum of d_edge_pre over the edges of a slot, as far as these rows are there.
template <class Real>
void sum_slots(const LayerArgs<Real>& layer, int64_t begin, int64_t end, int64_t edge_end) {
  const GraphView& graph = *layer.graph;
  const int64_t columns = layer.shape->edge_columns();
  for (int64_t slot = begin; slot < end; ++slot) {
    Real* total = layer.d_neighbor_part + slot * columns;
    int64_t at = layer.slot_next[slot];
    for (; at < graph.slot_first[slot + 1] && graph.slot_edges[at] < edge_end; ++at) {
      const Real* row = layer.d_edge_pre + (graph.slot_edges[at] - layer.d_edge_pre_first) * columns;
      if (at == graph.slot_first[slot]) {
        copy_row(total, row, columns);
      } else {
        add_row(total, row, columns);
      }
    }
    layer.slot_next[slot] = at;
  }
}

/// d v_j += sum over edges of sum_c h_ij[c] dH_i[c] (neighbor block) + d_neighbor_part W_neighbor^T.
template <class Real, class Sink>
void slots_backward(const LayerArgs<Real>& layer, int64_t group, int64_t begin, int64_t end,
                    Scratch<Real>& scratch, const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const GraphView& graph = *layer.graph;
  const int64_t columns = shape.edge_columns();
  const int64_t sym_width = shape.sym_width();
  Real* d_nodes = scratch.d_slot_nodes().get((end - begin) * shape.n_padded);
  for (int64_t slot = begin; slot < end; ++slot) {
    Real* d_row = d_nodes + (slot - begin) * shape.n_padded;
    fill(d_row, Real(0), shape.n_padded);
    for (int64_t at = graph.slot_first[slot]; at < graph.slot_first[slot + 1]; ++at) {
      const int64_t edge = graph.slot_edges[at];
      const Real* direction = layer.directions + 4 * edge;
      const Real* d_moments = layer.d_moments + graph.centre[edge] * 3 * sym_width + shape.e_padded;
      for (int64_t column = 0; column < shape.n_padded; column += kLanes<Real>) {
        store(d_row + column, load(d_row + column) + direction[0] * load(d_moments + column) +
                                  direction[1] * load(d_moments + sym_width + column) +
                                  direction[2] * load(d_moments + 2 * sym_width + column));
      }
    }
  }
  const Real* d_part = layer.d_neighbor_part + begin * columns;
  add_product(end - begin, shape.n_padded, columns, d_part, columns,
              layer.weights[group].edge_neighbor_transposed, shape.n_padded, d_nodes, shape.n_padded);
  gradients.slots(begin, end, scratch);
  for (int64_t slot = begin; slot < end; ++slot) {
    add_row(layer.d_node + graph.slot_node[slot] * shape.n_padded, d_nodes + (slot - begin) * shape.n_padded,
            shape.n_padded);
  }
}

/// d v_i += d_edge_centre_part W_centre^T, and the same of the angle maps.
template <class Real, class Sink>
void centres_backward(const LayerArgs<Real>& layer, int64_t begin, int64_t end, Scratch<Real>&,
                      const Sink& gradients) {
  const LayerShape& shape = *layer.shape;
  const GroupWeights<Real>& weights = layer.weights[layer.graph->group[begin]];
  const int64_t edge_columns = shape.edge_columns();
  const int64_t angle_columns = shape.angle_columns();
  Real* d_node = layer.d_node + begin * shape.n_padded;
  gradients.centres(begin, end);
  add_product(end - begin, shape.n_padded, edge_columns, layer.d_edge_centre_part + begin * edge_columns,
              edge_columns, weights.edge_centre_transposed, shape.n_padded, d_node, shape.n_padded);
  if (angle_columns > 0) {
    add_product(end - begin, shape.n_padded, angle_columns, layer.d_angle_centre_part + begin * angle_columns,
                angle_columns, weights.angle_centre_transposed, shape.n_padded, d_node, shape.n_padded);
  }
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
