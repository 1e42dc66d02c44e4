// Moments H of a centre's edges, and the invariants S that are formed of them (SPEC.md, section 6, step 2).
// Both have a block of the edges' features and one of the neighbors'.
#pragma once

#include "kernels/common/layer.h"
#include "kernels/cpu/rows.inl"

namespace moecalc::kernels::MOECALC_ISA {
namespace {

/// Columns of a block of the moments.
struct MomentBlock {
  int64_t offset;
  int64_t columns;
  int64_t invariants;  // where its invariants begin
};

inline MomentBlock moment_block(const LayerShape& shape, int part) {
  if (part == 0) return {0, shape.e_padded, 0};
  return {shape.e_padded, shape.n_padded, shape.axis * shape.e_padded};
}

/// H_i[c] = sum_j h_ij[c] [e_ij, v_j] (h carries the switch and the normaliser).
template <class Real>
void centre_moments(const LayerArgs<Real>& layer, int64_t centre) {
  const LayerShape& shape = *layer.shape;
  const GraphView& graph = *layer.graph;
  const int64_t first_edge = graph.first_edge[centre];
  const int64_t edge_end = graph.first_edge[centre + 1];
  const int64_t width = shape.sym_width();
  Real* moments = layer.moments + centre * 3 * width;
  constexpr int64_t lanes = kLanes<Real>;
  for (int part = 0; part < 2; ++part) {
    const MomentBlock block = moment_block(shape, part);
    for (int64_t column = 0; column < block.columns; column += 2 * lanes) {
      const bool two = column + lanes < block.columns;
      Vec<Real> total[3][2] = {};
      for (int64_t edge = first_edge; edge < edge_end; ++edge) {
        const Real* row = (part == 0 ? layer.edge + edge * shape.e_padded
                                     : layer.node + graph.neighbor[edge] * shape.n_padded) +
                          column;
        const Real* direction = layer.directions + 4 * edge;
        const Vec<Real> left = load(row);
        const Vec<Real> right = two ? load(row + lanes) : Vec<Real>{};
        for (int c = 0; c < 3; ++c) {
          total[c][0] += direction[c] * left;
          total[c][1] += direction[c] * right;
        }
      }
      for (int c = 0; c < 3; ++c) {
        Real* to = moments + c * width + block.offset + column;
        store(to, total[c][0]);
        if (two) store(to + lanes, total[c][1]);
      }
    }
  }
}

/// d h_ij[c] += dH_i[c] . [e_ij, v_j] and d e_ij += sum_c h_ij[c] dH_i[c]. (The neighbors' share: slots.inl.)
template <class Real>
void moments_backward(const LayerArgs<Real>& layer, int64_t centre) {
  const LayerShape& shape = *layer.shape;
  const GraphView& graph = *layer.graph;
  const int64_t width = shape.sym_width();
  const Real* d_moments = layer.d_moments + centre * 3 * width;
  LaneSums<Real, double> d_directions(layer.d_directions + 4 * graph.first_edge[centre],
                                      layer.d_geometry_given);
  for (int64_t edge = graph.first_edge[centre]; edge < graph.first_edge[centre + 1]; ++edge) {
    const Real* direction = layer.directions + 4 * edge;
    const Real* edge_row = layer.edge + edge * shape.e_padded;
    const Real* node_row = layer.node + graph.neighbor[edge] * shape.n_padded;
    Real* d_edge = layer.d_edge + edge * shape.e_padded;
    Vec<Real> dot_x = Vec<Real>{};
    Vec<Real> dot_y = Vec<Real>{};
    Vec<Real> dot_z = Vec<Real>{};
    for (int64_t column = 0; column < shape.e_padded; column += kLanes<Real>) {
      const Vec<Real> d_x = load(d_moments + column);
      const Vec<Real> d_y = load(d_moments + width + column);
      const Vec<Real> d_z = load(d_moments + 2 * width + column);
      const Vec<Real> feature = load(edge_row + column);
      dot_x += d_x * feature;
      dot_y += d_y * feature;
      dot_z += d_z * feature;
      store(d_edge + column,
            load(d_edge + column) + direction[0] * d_x + direction[1] * d_y + direction[2] * d_z);
    }
    const Real* d_neighbors = d_moments + shape.e_padded;
    for (int64_t column = 0; column < shape.n_padded; column += kLanes<Real>) {
      const Vec<Real> feature = load(node_row + column);
      dot_x += load(d_neighbors + column) * feature;
      dot_y += load(d_neighbors + width + column) * feature;
      dot_z += load(d_neighbors + 2 * width + column) * feature;
    }
    for (const Vec<Real> dot : {dot_x, dot_y, dot_z, Vec<Real>{}}) d_directions.push(dot);
  }
  d_directions.end();
}

/// S_i[m, d] = (1/3) sum_c H_i[c, m] H_i[c, d] for the first `axis` columns m of each block.
template <class Real>
inline void invariants(const LayerShape& shape, const Real* moments, Real* out) {
  const int64_t width = shape.sym_width();
  for (int part = 0; part < 2; ++part) {
    const MomentBlock block = moment_block(shape, part);
    const Real* moment_x = moments + block.offset;
    const Real* moment_y = moments + width + block.offset;
    const Real* moment_z = moments + 2 * width + block.offset;
    Real* block_out = out + block.invariants;
    for (int64_t m = 0; m < shape.axis; ++m) {
      const Real axis_x = moment_x[m] / Real(3);
      const Real axis_y = moment_y[m] / Real(3);
      const Real axis_z = moment_z[m] / Real(3);
      for (int64_t column = 0; column < block.columns; column += kLanes<Real>) {
        store(block_out + m * block.columns + column, axis_x * load(moment_x + column) +
                                                          axis_y * load(moment_y + column) +
                                                          axis_z * load(moment_z + column));
      }
    }
  }
}

/// dH_i[c, d] = (1/3) sum_m H_i[c, m] dS_i[m, d], and dH_i[c, m] += (1/3) sum_d H_i[c, d] dS_i[m, d].
template <class Real>
void invariants_backward(const LayerShape& shape, const Real* moments, const Real* d_invariants,
                         Real* d_moments) {
  const int64_t width = shape.sym_width();
  for (int64_t column = 0; column < 3 * width; column += kLanes<Real>) {
    store(d_moments + column, Vec<Real>{});
  }
  for (int part = 0; part < 2; ++part) {
    const MomentBlock block = moment_block(shape, part);
    const Real* block_in = d_invariants + block.invariants;
    for (int64_t m = 0; m < shape.axis; ++m) {
      for (int c = 0; c < 3; ++c) {
        const Real* moment = moments + c * width + block.offset;
        Real* d_moment = d_moments + c * width + block.offset;
        const Real axis = moment[m] / Real(3);
        Vec<Real> dot = Vec<Real>{};
        for (int64_t column = 0; column < block.columns; column += kLanes<Real>) {
          const Vec<Real> gradient = load(block_in + m * block.columns + column);
          store(d_moment + column, load(d_moment + column) + axis * gradient);
          dot += gradient * load(moment + column);
        }
        d_moment[m] += sum<Real>(dot) / Real(3);
      }
    }
  }
}

}  // namespace
}  // namespace moecalc::kernels::MOECALC_ISA
