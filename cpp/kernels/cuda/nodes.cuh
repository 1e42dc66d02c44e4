// Node maps: moments and invariants of a node's edges, the node's update, and their gradients, those through
// the neighbors included (SPEC.md, section 6, steps 1, 2 and 8).
#pragma once

#include <cstdint>

#include "kernels/cuda/layer_view.cuh"
#include "kernels/cuda/rows.cuh"

namespace moecalc::cuda {

// --- moments and invariants ---

/// Columns of one block of the moments (of the edges' features, or of the neighbors'), and its invariants.
struct MomentsBlock {
  int first;            // column of the moments
  int columns;          // of the moments
  int first_invariant;  // axis * columns of them

  template <class Real>
  static MOECALC_KERNEL MomentsBlock of(const LayerView<Real>& layer, bool of_edges) {
    if (of_edges) return {0, layer.e_padded, 0};
    return {layer.e_padded, layer.n_padded, layer.axis * layer.e_padded};
  }
};

/// Moments of a centre's edges:
///   H_i[c] = sum_j directions_ij[c] [edge_ij, node_j],   c = x, y, z.
template <class Real>
struct Symmetrize : CentreKernel<Real, 64> {
  using Base = CentreKernel<Real, 64>;
  using Vector = RowVec<Real>;
  using Base::kThreads;
  using Base::layer;
  static constexpr int kEdges = 64;  // whose neighbors and directions are in shared memory at a time

  int64_t shared_bytes() const { return shared_size<int>(kEdges) + shared_size<Real>(4 * kEdges); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    const int begin = layer.graph.first_edge[centre];
    const int end = layer.graph.first_edge[centre + 1];
    int* neighbor = block.template shared<int>(kEdges);
    Real* directions = block.template shared<Real>(4 * kEdges);
    for (int column = 0; column < layer.sym_width; column += kThreads * Vector::kSize) {
      auto sums = block.template registers<Vector, 3>();
      block.each([&](int thread) {
        for (int component = 0; component < 3; ++component) sums[thread][component] = Vector{};
      });
      for (int first = begin; first < end; first += kEdges) {
        const int n_edge = end - first < kEdges ? end - first : kEdges;
        block.sync();
        block.each([&](int thread) { read(thread, first, n_edge, neighbor, directions); });
        block.sync();
        block.each([&](int thread) {
          const int own_column = column + thread * Vector::kSize;
          if (own_column < layer.sym_width) {
            add(first, n_edge, own_column, neighbor, directions, sums[thread]);
          }
        });
      }
      block.each([&](int thread) {
        const int own_column = column + thread * Vector::kSize;
        if (own_column >= layer.sym_width) return;
        for (int component = 0; component < 3; ++component) {
          const int64_t to = (3 * centre + component) * layer.sym_width + own_column;
          store(layer.moments + to, sums[thread][component]);
        }
      });
    }
  }

 private:
  /// Neighbors and directions of edges first..first+n_edge-1.
  MOECALC_KERNEL void read(int thread, int first, int n_edge, int* neighbor, Real* directions) const {
    for (int edge = thread; edge < n_edge; edge += kThreads) {
      neighbor[edge] = layer.graph.neighbor(first + edge);
    }
    for (int place = thread; place < 4 * n_edge; place += kThreads) {
      directions[place] = layer.directions[4 * static_cast<int64_t>(first) + place];
    }
  }

  /// What these edges add to a vector of columns of the moments.
  MOECALC_KERNEL void add(int first, int n_edge, int column, const int* neighbor, const Real* directions,
                          Vector* sums) const {
    MOECALC_UNROLL_4
    for (int edge = 0; edge < n_edge; ++edge) {
      const Real* feature =
          column < layer.e_padded
              ? layer.edge + (first + edge) * static_cast<int64_t>(layer.e_padded) + column
              : layer.node + neighbor[edge] * static_cast<int64_t>(layer.n_padded) + column - layer.e_padded;
      const Vector value = load<Vector>(feature);
      MOECALC_UNROLL
      for (int component = 0; component < 3; ++component) {
        sums[component] += directions[4 * edge + component] * value;
      }
    }
  }
};

/// Invariants, for the edge block and the neighbor block of the moments:
///   S_i[m, d] = (1/3) sum_c H_i[c, m] H_i[c, d],   m < axis.
template <class Real>
struct Invariants : CentreKernel<Real, 128> {
  using Base = CentreKernel<Real, 128>;
  using Base::kThreads;
  using Base::layer;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    const Real* moments = layer.moments + centre * 3 * layer.sym_width;
    block.each([&](int thread) {
      for (int place = thread; place < layer.sym_inputs; place += kThreads) {
        const auto part = MomentsBlock::of(layer, place < layer.axis * layer.e_padded);
        const int number = place - part.first_invariant;
        const Real* left = moments + part.first + number / part.columns;
        const Real* right = moments + part.first + number % part.columns;
        Real total = 0;
        for (int component = 0; component < 3; ++component) {
          total += left[component * layer.sym_width] / Real(3) * right[component * layer.sym_width];
        }
        layer.invariants[centre * layer.sym_inputs + place] = total;
      }
    });
  }
};

/// Gradient of the moments through the invariants:
///   dH[c, d] = (1/3) sum_m H[c, m] dS[m, d],   and where d = m < axis besides (1/3) sum_d H[c, d] dS[m, d].
template <class Real>
struct InvariantsBackward : CentreKernel<Real, 128> {
  using Base = CentreKernel<Real, 128>;
  using Base::kThreads;
  using Base::layer;

  int64_t shared_bytes() const { return shared_size<Real>(3 * layer.sym_width); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t centre = block.index();
    const int size = 3 * layer.sym_width;
    const Real* moments = layer.moments + centre * 3 * layer.sym_width;
    const Real* d_invariants = layer.d_invariants + centre * layer.sym_inputs;
    Real* d_moments = block.template shared<Real>(size);
    block.each([&](int thread) {
      for (int place = thread; place < size; place += kThreads) {
        d_moments[place] = as_right_factor(moments, d_invariants, place);
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int place = thread; place < 6 * layer.axis; place += kThreads) {
        add_as_left_factor(moments, d_invariants, place, d_moments);
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int place = thread; place < size; place += kThreads) {
        layer.d_moments[centre * 3 * layer.sym_width + place] = d_moments[place];
      }
    });
  }

 private:
  /// (1/3) sum_m H[c, m] dS[m, d] of moment (c, d).
  MOECALC_KERNEL Real as_right_factor(const Real* moments, const Real* d_invariants, int place) const {
    const int component = place / layer.sym_width;
    const int column = place % layer.sym_width;
    const auto part = MomentsBlock::of(layer, column < layer.e_padded);
    const Real* left = moments + component * layer.sym_width + part.first;
    const Real* gradient = d_invariants + part.first_invariant + column - part.first;
    Real total = 0;
    for (int row = 0; row < layer.axis; ++row) total += left[row] / Real(3) * gradient[row * part.columns];
    return total;
  }

  /// d_moments[c, m] += (1/3) sum_d H[c, d] dS[m, d]; `place` counts blocks, components and m.
  MOECALC_KERNEL void add_as_left_factor(const Real* moments, const Real* d_invariants, int place,
                                         Real* d_moments) const {
    const auto part = MomentsBlock::of(layer, place / (3 * layer.axis) == 0);
    const int component = place / layer.axis % 3;
    const int row = place % layer.axis;
    const int first = component * layer.sym_width + part.first;
    const Real* gradient = d_invariants + part.first_invariant + row * part.columns;
    Real dot = 0;
    for (int column = 0; column < part.columns; ++column) dot += gradient[column] * moments[first + column];
    d_moments[first + row] += dot / Real(3);
  }
};

// --- the node's update ---

/// Shared memory of the node maps: a slice of their inputs.
template <class Format>
struct NodeRows : SharedRows<Format> {
  using Real = typename Format::Real;
  static int64_t bytes(const LayerView<Real>&) { return SharedRows<Format>::bytes(kSlice); }
  template <class Block>
  MOECALC_KERNEL NodeRows(Block& block, const LayerView<Real>&) : SharedRows<Format>(block, kSlice) {}
};

/// The node map or the sym map of a routing group.
template <class Real>
struct NodeMap {
  const Real* input;  // rows of `inputs` values
  int inputs;
  const Real* matrix;   // inputs x experts n_padded
  const Real* bias;     // (experts n_padded)
  const Real* routing;  // (experts)
  int experts;
  const Real* update;  // (n_padded) factors of its result
  int place;           // column of its gradients in d_node_pre
};

/// The node's update, with messages of the edges and with two maps, or (`backward`) its gradient:
///   node_out = keep_node node + sum_heads update message + sum_maps update mix phi(input W + b)
///   d_pre = routing update d_node_out phi',   d_message = update d_node_out,   d_node_own = keep_node
///   d_node_out.
/// One block per run and chunk of columns.
template <class Format, bool backward>
struct Nodes : LayerKernel<Format, NodeRows<Format>> {
  using Base = LayerKernel<Format, NodeRows<Format>>;
  using Tile = TileOf<Format, kChunk>;
  using Vector = typename Tile::Vector;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  int64_t blocks() const { return this->n_run * chunk_count(layer.n_padded); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int across = chunk_count(layer.n_padded);
    const Run run = this->runs[block.index() / across];  // of at most kRows rows
    const int column = static_cast<int>(block.index() % across) * kChunk;
    const int rows = run.end - run.begin;
    const Weights& weights = layer.weights[run.group];
    const NodeRows<Format> slice(block, layer);
    auto total = block.template registers<Vector, Tile::kGroups>();
    block.each([&](int thread) {
      set_zero<Tile>(total[thread]);
      for_own<Tile>(thread, rows, layer.n_padded - column, [&](int group, int row, int offset) {
        if constexpr (backward) {
          start_gradients(run.begin + row, column + offset);
        } else {
          total[thread][group] = without_maps(run.begin + row, column + offset);
        }
      });
    });
    const NodeMap<Real> of_node = {
        .input = layer.node,
        .inputs = layer.n_padded,
        .matrix = weights.node,
        .bias = weights.node_bias,
        .routing = weights.routing_node,
        .experts = layer.experts_node,
        .update = layer.update.node,
        .place = 0,
    };
    const NodeMap<Real> of_invariants = {
        .input = layer.invariants,
        .inputs = layer.sym_inputs,
        .matrix = weights.sym,
        .bias = weights.sym_bias,
        .routing = weights.routing_sym,
        .experts = layer.experts_sym,
        .update = layer.update.node + layer.n_padded,
        .place = layer.experts_node * layer.n_padded,
    };
    apply(block, run, of_node, slice, column, total);
    apply(block, run, of_invariants, slice, column, total);
    if (backward) return;
    block.each([&](int thread) {
      for_own<Tile>(thread, rows, layer.n_padded - column, [&](int group, int row, int offset) {
        store(layer.node_out + place_of(run.begin + row, column + offset), total[thread][group]);
      });
    });
  }

 private:
  MOECALC_KERNEL int64_t place_of(int64_t node, int column) const { return node * layer.n_padded + column; }
  MOECALC_KERNEL int64_t message_place(int64_t node, int head, int column) const {
    return node * layer.message_width + head * layer.n_padded + column;
  }
  /// Factors of a head of the message in the update.
  MOECALC_KERNEL Vector message_update(int head, int column) const {
    return load<Vector>(layer.update.node + (2 + head) * layer.n_padded + column);
  }

  /// keep_node node + sum_heads update message.
  MOECALC_KERNEL Vector without_maps(int64_t node, int column) const {
    Vector sum = layer.keep_node * load<Vector>(layer.node + place_of(node, column));
    for (int head = 0; head < layer.heads; ++head) {
      sum += message_update(head, column) * load<Vector>(layer.message + message_place(node, head, column));
    }
    return sum;
  }

  /// d_message and d_node_own.
  MOECALC_KERNEL void start_gradients(int64_t node, int column) const {
    const Vector gradient = load<Vector>(layer.d_node_out + place_of(node, column));
    for (int head = 0; head < layer.heads; ++head) {
      store(layer.d_message + message_place(node, head, column), message_update(head, column) * gradient);
    }
    store(layer.d_node_own + place_of(node, column), layer.keep_node * gradient);
  }

  /// One map: its experts' phi(input W + b), weighted, to `total`; or their d_pre to d_node_pre.
  template <class Block, class Sums>
  MOECALC_KERNEL void apply(Block& block, const Run& run, const NodeMap<Real>& map,
                            const SharedRows<Format>& slice, int column, Sums& total) const {
    const int rows = run.end - run.begin;
    const int width = layer.n_padded - column;
    auto sums = block.template registers<Vector, Tile::kGroups>();
    for (int expert = 0; expert < map.experts; ++expert) {
      const int place = expert * layer.n_padded + column;
      block.each([&](int thread) {
        set_zero<Tile>(sums[thread]);
        for_own<Tile>(thread, rows, width, [&](int group, int, int offset) {
          sums[thread][group] = load<Vector>(map.bias + place + offset);
        });
      });
      multiply_sliced<Tile>(block, sums, slice, rows, map.inputs,
                            weight_columns<Tile>(map.matrix, map.experts * layer.n_padded, place, width),
                            [&](int row, int input) {
                              const int64_t node = run.begin + row;
                              return load<RowVec<Real>>(map.input + node * map.inputs + input);
                            });
      block.each([&](int thread) {
        for_own<Tile>(thread, rows, width, [&](int group, int row, int offset) {
          const Vector factor = map.routing[expert] * load<Vector>(map.update + column + offset);
          const Vector& pre_activation = sums[thread][group];
          if constexpr (backward) {
            const int64_t node = run.begin + row;
            const Vector gradient = load<Vector>(layer.d_node_out + place_of(node, column + offset));
            const int64_t stride = (layer.experts_node + layer.experts_sym) * layer.n_padded;
            store(layer.d_node_pre + node * stride + map.place + place + offset,
                  layer.activation.times_slopes(factor, pre_activation) * gradient);
          } else {
            layer.activation.add_values(factor, pre_activation, total[thread][group]);
          }
        });
      });
    }
  }
};

// --- gradients of node features through the neighbors ---

/// Sums over the edges of a slot, where node j is the neighbor:
///   d_neighbor_part = sum_ij d_pre_ij,   d_node_slot = sum_ij sum_c directions_ij[c] d_moments_i[c].
template <class Real>
struct SlotSums : CentreKernel<Real, 128> {
  using Base = CentreKernel<Real, 128>;
  using Vector = RowVec<Real>;
  using Base::kThreads;
  using Base::layer;
  static constexpr int kEdges = 128;  // whose numbers are in shared memory at a time

  int64_t blocks() const { return layer.graph.n_slot; }
  int64_t shared_bytes() const { return 2 * shared_size<int>(kEdges) + shared_size<Real>(4 * kEdges); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int64_t slot = block.index();
    const int begin = layer.graph.slot_first[slot];
    const int end = layer.graph.slot_first[slot + 1];
    const int width = layer.edge_columns + layer.n_padded;
    const Edges edges = {block.template shared<int>(kEdges), block.template shared<int>(kEdges),
                         block.template shared<Real>(4 * kEdges)};
    for (int column = 0; column < width; column += kThreads * Vector::kSize) {
      auto sums = block.template registers<Vector, 1>();
      block.each([&](int thread) { sums[thread][0] = Vector{}; });
      for (int first = begin; first < end; first += kEdges) {
        const int n_edge = end - first < kEdges ? end - first : kEdges;
        block.sync();
        block.each([&](int thread) {
          if (thread < n_edge) read(thread, first, edges);
        });
        block.sync();
        if (layer.graph.first_edge[layer.graph.n_local] == 0) continue;
        block.each([&](int thread) {
          const int own_column = column + thread * Vector::kSize;
          if (own_column < layer.edge_columns) {
            add_d_pre(edges, n_edge, own_column, sums[thread][0]);
          } else if (own_column < width) {
            add_d_moments(edges, n_edge, own_column - layer.edge_columns, sums[thread][0]);
          }
        });
      }
      block.each([&](int thread) {
        const int own_column = column + thread * Vector::kSize;
        if (own_column < layer.edge_columns) {
          store(layer.d_neighbor_part + slot * layer.edge_columns + own_column, sums[thread][0]);
        } else if (own_column < width) {
          const int64_t to = slot * layer.n_padded + own_column - layer.edge_columns;
          store(layer.d_node_slot + to, sums[thread][0]);
        }
      });
    }
  }

 private:
  /// Edges of a slot, in shared memory.
  struct Edges {
    int* number;
    int* centre;
    Real* factors;  // four of every edge: its directions, and 1, or all 0 for one beyond the cutoff
  };

  MOECALC_KERNEL void read(int thread, int first, const Edges& edges) const {
    const int edge = layer.graph.edge_of_list[layer.graph.slot_list[first + thread]];
    // beyond the cutoff: edge 0 with factors 0, so that the loads that follow need no branch
    const bool absent = edge < 0;
    edges.number[thread] = absent ? 0 : edge;
    edges.centre[thread] = absent ? 0 : layer.graph.edge_centre[edge];
    for (int component = 0; component < 3; ++component) {
      edges.factors[4 * thread + component] =
          absent ? Real(0) : layer.directions[4 * static_cast<int64_t>(edge) + component];
    }
    edges.factors[4 * thread + 3] = absent ? Real(0) : Real(1);
  }

  /// The sum of d_pre in a vector of columns.
  MOECALC_KERNEL void add_d_pre(const Edges& edges, int n_edge, int column, Vector& sum) const {
    const int64_t stride = layer.edge_columns;
    MOECALC_UNROLL_4
    for (int edge = 0; edge < n_edge; ++edge) {
      const Vector value = load<Vector>(layer.d_edge_pre + edges.number[edge] * stride + column);
      // not a product with the factor: edge 0 may be NaN
      MOECALC_UNROLL
      for (int lane = 0; lane < Vector::kSize; ++lane) {
        sum[lane] += edges.factors[4 * edge + 3] == Real(0) ? Real(0) : value[lane];
      }
    }
  }

  /// The sum of directions times d_moments in a vector of columns of the neighbor block.
  MOECALC_KERNEL void add_d_moments(const Edges& edges, int n_edge, int column, Vector& sum) const {
    const int64_t stride = layer.sym_width;
    MOECALC_UNROLL_4
    for (int edge = 0; edge < n_edge; ++edge) {
      const Real* d_moments = layer.d_moments + edges.centre[edge] * 3 * stride + layer.e_padded + column;
      MOECALC_UNROLL
      for (int component = 0; component < 3; ++component) {
        sum += edges.factors[4 * edge + component] * load<Vector>(d_moments + component * stride);
      }
    }
  }
};

/// d_node = d_node_own (of local atoms) + sum of d_node_slot over the node's slots, in order.
template <class Real>
struct GatherSlots : CentreKernel<Real, 128> {
  using Base = CentreKernel<Real, 128>;
  using Base::kThreads;
  using Base::layer;
  static constexpr int kRows = 4;  // nodes of a block

  int64_t blocks() const { return blocks_for(layer.graph.n_node, kRows); }

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const int width = layer.n_padded;
    block.each([&](int thread) {
      for (int place = thread; place < kRows * width; place += kThreads) {
        const int64_t node = block.index() * kRows + place / width;
        const int64_t column = place % width;
        if (node >= layer.graph.n_node) continue;
        layer.d_node[node * width + column] = gradient(node, column);
      }
    });
  }

 private:
  MOECALC_KERNEL Real gradient(int64_t node, int64_t column) const {
    const Graph& graph = layer.graph;
    Real total = node < graph.n_local ? layer.d_node_own[node * layer.n_padded + column] : Real(0);
    for (int place = graph.node_first[node]; place < graph.node_first[node + 1]; ++place) {
      total += layer.d_node_slot[graph.node_slot[place] * static_cast<int64_t>(layer.n_padded) + column];
    }
    return total;
  }
};

}  // namespace moecalc::cuda
