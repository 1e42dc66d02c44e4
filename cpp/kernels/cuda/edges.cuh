// Edge maps: messages of edges to their centres, the edges' update, and the gradients of both (SPEC.md,
// section 6, steps 3, 4, 6 and 8).
//
// For an edge ij of centre i, with W split by inputs, and with the parts of centre and neighbor precomputed:
//   pre_activation_ij = (node_i W_centre + b) + node_j W_neighbor + edge_ij W_edge.
#pragma once

#include <cstdint>

#include "kernels/cuda/layer_view.cuh"
#include "kernels/cuda/rows.cuh"

namespace moecalc::cuda {

/// Arrays in shared memory for a tile of edges, or of rows of the angle message.
template <class Format>
struct EdgeRows {
  using Real = typename Format::Real;
  SharedRows<Format> edge;   // features of the rows, or angle messages
  SharedRows<Format> chunk;  // results in a chunk of columns
  // Of every row:
  int* centre;
  int* slot;  // or, of angle messages, the edge in the graph

  /// Columns of the rows' features.
  static MOECALC_BOTH int width(const LayerView<Real>& layer) { return layer.e_padded; }
  static int64_t bytes(const LayerView<Real>& layer) {
    return SharedRows<Format>::bytes(layer.e_padded) + SharedRows<Format>::bytes(kChunk) +
           2 * shared_size<int>(Format::kRows);
  }
  template <class Block>
  MOECALC_KERNEL EdgeRows(Block& block, const LayerView<Real>& layer)
      : edge(block, layer.e_padded),
        chunk(block, kChunk),
        centre(block.template shared<int>(Format::kRows)),
        slot(block.template shared<int>(Format::kRows)) {}

  /// The edges of a tile.
  template <class Block>
  MOECALC_KERNEL void read(Block& block, const LayerView<Real>& layer, const Run& run,
                           const Span& span) const {
    block.sync();  // the tile before is still read
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int row = span.first + thread;
      centre[thread] = centre_of(layer.graph.first_edge, run.begin, run.end, row);
      slot[thread] = layer.graph.slot(row);
    });
    read_features(block, layer.edge, layer.e_padded, span);
  }
  /// The angle messages of a tile, and their edges in `slot`.
  template <class Block>
  MOECALC_KERNEL void read_messages(Block& block, const LayerView<Real>& layer, const Run& run,
                                    const Span& span) const {
    const int* message_first = layer.message_first();
    block.sync();  // the tile before is still read
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int row = span.first + thread;
      const int own_centre = centre_of(message_first, run.begin, run.end, row);
      centre[thread] = own_centre;
      slot[thread] = layer.graph.first_edge[own_centre] + row - message_first[own_centre];
    });
    read_features(block, layer.angle_message, layer.e_padded, span);
  }

  /// The edges of a tile with the same centre.
  MOECALC_KERNEL Segment with_centre(const Graph& graph, const Span& span, int row) const {
    const bool is_first = row == 0 || centre[row - 1] != centre[row];
    return {is_first, 1, graph.first_edge[centre[row] + 1] - span.first};
  }

  /// pre_activation of edges in the columns of the edge maps from `column` on.
  template <class Tile>
  MOECALC_KERNEL void pre_activation(int thread, const LayerView<Real>& layer,
                                     const kernels::GroupWeights<Real>& weights, int rows, int column,
                                     int width, typename Tile::Vector* sums) const {
    using Vector = typename Tile::Vector;
    const int columns = layer.edge_columns;
    const Real* centre_parts = layer.edge_centre_part + column;
    const Real* neighbor_parts = layer.edge_neighbor_part + column;
    for_clamped<Tile>(thread, rows, width, [&](int group, int row, int offset) {
      sums[group] = load<Vector>(centre_parts + static_cast<int64_t>(centre[row]) * columns + offset) +
                    load<Vector>(neighbor_parts + static_cast<int64_t>(slot[row]) * columns + offset);
    });
    Tile::multiply(thread, sums, edge, layer.e_padded,
                   weight_columns<Tile>(weights.edge_edge, columns, column, width));
  }

  /// angle_message W + b of the message map in its columns from `column` on.
  template <class Tile>
  MOECALC_KERNEL void message_map_pre_activation(int thread, const LayerView<Real>& layer,
                                                 const kernels::GroupWeights<Real>& weights, int rows,
                                                 int column, int width, typename Tile::Vector* sums) const {
    using Vector = typename Tile::Vector;
    for_clamped<Tile>(thread, rows, width, [&](int group, int, int offset) {
      sums[group] = load<Vector>(weights.message_map_bias + column + offset);
    });
    Tile::multiply(
        thread, sums, edge, layer.e_padded,
        weight_columns<Tile>(weights.message_map, layer.experts_message_map * layer.e_padded, column, width));
  }

 private:
  /// Rows of `width` features to `edge`.
  template <class Block>
  MOECALC_KERNEL void read_features(Block& block, const Real* features, int width, const Span& span) const {
    stage(block, edge, span.rows, width, [&](int row, int column) {
      return load<RowVec<Real>>(features + (span.first + row) * static_cast<int64_t>(width) + column);
    });
    block.sync();
  }
};

/// Messages of the edges to their centres, and the edges' update, to which the angles' messages add:
///   message_i = edge_scale sum_j switch_ij mix phi(pre_activation_ij)                   (message map, heads)
///   edge_out = keep_edge edge + update_0 mix phi(pre_activation) + update_1 mix phi(angle_message W + b).
template <class Format>
struct EdgeForward : LayerKernel<Format, EdgeRows<Format>> {
  using Base = LayerKernel<Format, EdgeRows<Format>>;
  using Rows = EdgeRows<Format>;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = this->runs[block.index()];
    const Weights& weights = layer.weights[run.group];
    const int* first_edge = layer.graph.first_edge;
    const Rows shared(block, layer);
    clear_rows(block, layer.message, run.begin, run.end, layer.message_width);
    for_tiles<Format>(first_edge[run.begin], first_edge[run.end], [&](const Span& span) {
      shared.read(block, layer, run, span);
      for_chunks<Format>(layer.message_width, [&](auto tile, int column) {
        send_messages<decltype(tile)>(block, weights, shared, span, column);
      });
      if (!layer.live_edge) return;  // nobody reads edge_out
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        block.each([&](int thread) { update<decltype(tile)>(thread, weights, shared, span, column); });
      });
    });
    if (!layer.with_angles) return;
    const int* message_first = layer.message_first();
    for_tiles<Format>(message_first[run.begin], message_first[run.end], [&](const Span& span) {
      shared.read_messages(block, layer, run, span);
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        block.each([&](int thread) {
          add_angle_messages<decltype(tile)>(thread, weights, shared, span.rows, column);
        });
      });
    });
  }

 private:
  /// The message in a chunk of its columns, added to what the tiles before left.
  template <class Tile, class Block>
  MOECALC_KERNEL void send_messages(Block& block, const Weights& weights, const Rows& shared,
                                    const Span& span, int column) const {
    const int width = layer.message_width - column;
    block.each([&](int thread) {
      typename Tile::Vector mix[Tile::kGroups] = {};
      for (int expert = 0; expert < layer.experts_message; ++expert) {
        add_expert<Tile>(thread, shared, weights, weights.routing_message[expert],
                         expert * layer.message_width + column, span.rows, width, mix);
      }
      for_clamped<Tile>(thread, span.rows, width,
                        [&](int group, int row, int) { mix[group] *= layer.switch_edge[span.first + row]; });
      store_all<Tile>(thread, shared.chunk, mix);
    });
    block.sync();
    const int columns = width < Tile::kColumns ? width : Tile::kColumns;
    segment_sums(
        block, shared.chunk, span.rows, columns,
        [&](int row) { return shared.with_centre(layer.graph, span, row); },
        [&](int row, int offset, auto sum) {
          sum *= layer.edge_scale;
          const int64_t to = shared.centre[row] * static_cast<int64_t>(layer.message_width) + column + offset;
          put(layer.message + to, false, sum);
        });
    block.sync();
  }

  /// The edges' update, without the angles' messages.
  template <class Tile>
  MOECALC_KERNEL void update(int thread, const Weights& weights, const Rows& shared, const Span& span,
                             int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    Vector mix[Tile::kGroups] = {};
    for (int expert = 0; expert < layer.experts_edge; ++expert) {
      add_expert<Tile>(thread, shared, weights, weights.routing_edge[expert],
                       layer.message_columns + expert * layer.e_padded + column, span.rows, width, mix);
    }
    for_own<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
      const int centre = shared.centre[row];
      const int edge = span.first + row;
      const bool far = edge - layer.graph.first_edge[centre] >= layer.graph.n_close[centre];
      const Vector old = load<Vector>(shared.edge.at(row, column + offset));
      const Real* factors = layer.update.edge + column + offset;
      Vector value = layer.keep_edge * old + load<Vector>(factors) * mix[group];
      // an edge without angles gets the constant answer of the message map
      if (layer.with_angles && !layer.keep_far && far) {
        value +=
            load<Vector>(factors + layer.e_padded) * load<Vector>(weights.message_map_far + column + offset);
      }
      const int64_t to = edge * static_cast<int64_t>(layer.e_padded) + column + offset;
      store(layer.edge_out + to, value);
      if (layer.with_angles && layer.keep_far && far) store(layer.angle_message + to, old);
    });
  }

  /// edge_out += update_1 mix phi(angle_message W + b).
  template <class Tile>
  MOECALC_KERNEL void add_angle_messages(int thread, const Weights& weights, const Rows& shared, int rows,
                                         int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    Vector mix[Tile::kGroups] = {};
    for (int expert = 0; expert < layer.experts_message_map; ++expert) {
      Vector sums[Tile::kGroups] = {};
      shared.template message_map_pre_activation<Tile>(thread, layer, weights, rows,
                                                       expert * layer.e_padded + column, width, sums);
      add_activated<Tile>(weights.routing_message_map[expert], sums, mix);
    }
    for_own<Tile>(thread, rows, width, [&](int group, int row, int offset) {
      const Vector factor = load<Vector>(layer.update.edge + layer.e_padded + column + offset);
      const int64_t to = shared.slot[row] * static_cast<int64_t>(layer.e_padded) + column + offset;
      put(layer.edge_out + to, false, factor * mix[group]);
    });
  }

  /// mix += routing phi(pre_activation) of one expert, whose columns start at `column`.
  template <class Tile>
  MOECALC_KERNEL void add_expert(int thread, const Rows& shared, const Weights& weights, Real routing,
                                 int column, int rows, int width, typename Tile::Vector* mix) const {
    typename Tile::Vector sums[Tile::kGroups] = {};
    shared.template pre_activation<Tile>(thread, layer, weights, rows, column, width, sums);
    add_activated<Tile>(routing, sums, mix);
  }
  /// mix += routing phi(sums).
  template <class Tile>
  MOECALC_KERNEL void add_activated(Real routing, const typename Tile::Vector* sums,
                                    typename Tile::Vector* mix) const {
    layer.activation.template add_values<Tile::kGroups>(routing, sums, mix);
  }
};

/// Arrays in shared memory for the gradients of a tile of angle messages.
template <class Format>
struct MessageGradientRows : EdgeRows<Format> {
  using Real = typename Format::Real;
  SharedRows<Format> d_message;  // to which every chunk adds

  static int64_t bytes(const LayerView<Real>& layer) {
    return EdgeRows<Format>::bytes(layer) + SharedRows<Format>::bytes(layer.e_padded);
  }
  template <class Block>
  MOECALC_KERNEL MessageGradientRows(Block& block, const LayerView<Real>& layer)
      : EdgeRows<Format>(block, layer), d_message(block, layer.e_padded) {}
};

/// Gradient of the angles' messages through the message map:
///   d_angle_message = d_pre W^T,   d_pre = routing update_1 d_edge_out phi'(angle_message W + b).
template <class Format>
struct MessageBackward : LayerKernel<Format, MessageGradientRows<Format>> {
  using Base = LayerKernel<Format, MessageGradientRows<Format>>;
  using Rows = MessageGradientRows<Format>;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = this->runs[block.index()];
    const Weights& weights = layer.weights[run.group];
    const int* message_first = layer.message_first();
    const Rows shared(block, layer);
    for_tiles<Format>(message_first[run.begin], message_first[run.end], [&](const Span& span) {
      shared.read_messages(block, layer, run, span);
      // no rows: zeros
      stage(block, shared.d_message, 0, layer.e_padded, [&](int, int) { return RowVec<Real>{}; });
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        through_map<decltype(tile)>(block, weights, shared, span.rows, column);
      });
      copy_rows(block, shared.d_message, span.rows, layer.e_padded,
                layer.d_angle_message + span.first * static_cast<int64_t>(layer.e_padded), layer.e_padded);
    });
  }

 private:
  /// d_pre of a chunk of the message map's columns, and what it adds to d_message.
  template <class Tile, class Block>
  MOECALC_KERNEL void through_map(Block& block, const Weights& weights, const Rows& shared, int rows,
                                  int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    const int columns = width < Tile::kColumns ? width : Tile::kColumns;
    for (int expert = 0; expert < layer.experts_message_map; ++expert) {
      const int place = expert * layer.e_padded + column;
      const Real routing = weights.routing_message_map[expert];
      block.each([&](int thread) {
        Vector sums[Tile::kGroups] = {};
        shared.template message_map_pre_activation<Tile>(thread, layer, weights, rows, place, width, sums);
        Vector gradients[Tile::kGroups];
        for_clamped<Tile>(thread, rows, width, [&](int group, int row, int offset) {
          const int64_t from = shared.slot[row] * static_cast<int64_t>(layer.e_padded) + column + offset;
          const Vector factor = load<Vector>(layer.update.edge + layer.e_padded + column + offset);
          gradients[group] = routing * factor * load<Vector>(layer.d_edge_out + from);
        });
        layer.activation.template to_gradients<Tile::kGroups>(gradients, sums);
        store_all<Tile>(thread, shared.chunk, sums);
      });
      block.sync();
      add_product(block, shared.d_message, shared.chunk, rows, columns,
                  weights.message_map_transposed + row_offset<Format>(place, layer.e_padded), layer.e_padded);
      block.sync();
    }
  }
};

/// Gradients of the edge maps and of the moments, without what comes through the angle maps. With d_pre =
/// phi'(pre_activation) times the gradient of an expert's output:
///   d_edge_ij = keep_edge d_edge_out + d_pre W_edge^T + sum_c directions_c d_moments_c   (edge block),
///   d_edge_centre_part_i = sum_j d_pre_ij,   d_switch_ij = d_message_i . mix phi,
///   d_directions_c = d_moments_c . [edge_ij, node_j].
template <class Format>
struct EdgeBackward : LayerKernel<Format, GradientRows<Format, EdgeRows<Format>>> {
  using Rows = GradientRows<Format, EdgeRows<Format>>;
  using Base = LayerKernel<Format, Rows>;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = this->runs[block.index()];
    const Weights& weights = layer.weights[run.group];
    const int* first_edge = layer.graph.first_edge;
    const Rows shared(block, layer);
    clear_rows(block, layer.d_edge_centre_part, run.begin, run.end, layer.edge_columns);
    for_tiles<Format>(first_edge[run.begin], first_edge[run.end], [&](const Span& span) {
      shared.read(block, layer, run, span);
      shared.d_switch.clear(block);
      start_gradient(block, shared, span);
      to_directions(block, shared, span);
      for_chunks<Format>(layer.message_width, [&](auto tile, int column) {
        through_messages<decltype(tile)>(block, weights, shared, span, column);
      });
      if (layer.live_edge) {
        for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
          through_update<decltype(tile)>(block, weights, shared, span, column);
        });
      }
      finish(block, shared, span);
    });
  }

 private:
  /// d_edge = keep_edge d_edge_out + sum_c directions_c d_moments_c (+ d_angle_message of a far edge that
  /// keeps its feature).
  template <class Block>
  MOECALC_KERNEL void start_gradient(Block& block, const Rows& shared, const Span& span) const {
    stage(block, shared.gradient, span.rows, layer.e_padded, [&](int row, int column) {
      using Vector = RowVec<Real>;
      const int64_t edge = span.first + row;
      const int64_t centre = shared.centre[row];
      const Real* direction = layer.directions + 4 * edge;
      const Real* d_moments = layer.d_moments + centre * 3 * layer.sym_width + column;
      Vector value = {};
      if (layer.live_edge) {
        value = layer.keep_edge * load<Vector>(layer.d_edge_out + edge * layer.e_padded + column);
      }
      value += direction[0] * load<Vector>(d_moments) +
               direction[1] * load<Vector>(d_moments + layer.sym_width) +
               direction[2] * load<Vector>(d_moments + 2 * layer.sym_width);
      const Graph& graph = layer.graph;
      if (layer.with_angles && layer.keep_far && edge - graph.first_edge[centre] >= graph.n_close[centre]) {
        value += load<Vector>(layer.d_angle_message + edge * layer.e_padded + column);
      }
      return value;
    });
  }

  /// d_directions_c = d_moments_c . [edge_ij, node_j]: kLanes threads per row.
  template <class Block>
  MOECALC_KERNEL void to_directions(Block& block, const Rows& shared, const Span& span) const {
    block.each([&](int thread) {
      const int lane = thread % kLanes;
      for (int row = thread / kLanes; row < span.rows; row += kThreads / kLanes) {
        const Real* node =
            layer.node + layer.graph.neighbor(span.first + row) * static_cast<int64_t>(layer.n_padded);
        const Real* d_moments =
            layer.d_moments + shared.centre[row] * 3 * static_cast<int64_t>(layer.sym_width);
        Real dots[3] = {};
        add_dots(lane, shared.edge.at(row, 0), layer.e_padded, d_moments, dots);
        add_dots(lane, node, layer.n_padded, d_moments + layer.e_padded, dots);
        for (int component = 0; component < 3; ++component)
          *shared.chunk.at(row, 3 * lane + component) = dots[component];
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int place = thread; place < 3 * span.rows; place += kThreads) {
        const int row = place / 3;
        const int component = place % 3;
        Real total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += *shared.chunk.at(row, 3 * lane + component);
        double* to = layer.d_directions + 4 * static_cast<int64_t>(span.first + row) + component;
        *to = layer.add_edge_geometry ? *to + double(total) : double(total);
      }
    });
    block.sync();
  }

  /// dots_c += features . d_moments_c, the share of one of the lanes of a row.
  MOECALC_KERNEL void add_dots(int lane, const Real* features, int width, const Real* d_moments,
                               Real (&dots)[3]) const {
    using Vector = RowVec<Real>;
    for (int column = lane * Vector::kSize; column < width; column += kLanes * Vector::kSize) {
      const Vector feature = load<Vector>(features + column);
      MOECALC_UNROLL
      for (int component = 0; component < 3; ++component) {
        const Vector gradient = load<Vector>(d_moments + column + component * layer.sym_width);
        MOECALC_UNROLL
        for (int part = 0; part < Vector::kSize; ++part) dots[component] += feature[part] * gradient[part];
      }
    }
  }

  /// d_pre = routing edge_scale switch phi' d_message of every expert of the message.
  template <class Tile, class Block>
  MOECALC_KERNEL void through_messages(Block& block, const Weights& weights, const Rows& shared,
                                       const Span& span, int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.message_width - column;
    for (int expert = 0; expert < layer.experts_message; ++expert) {
      const int place = expert * layer.message_width + column;
      const Real routing = weights.routing_message[expert];
      block.each([&](int thread) {
        Vector sums[Tile::kGroups] = {};
        shared.template pre_activation<Tile>(thread, layer, weights, span.rows, place, width, sums);
        Vector gradients[Tile::kGroups];
        Real switches[Tile::kGroups];
        Real dots[Tile::kGroups] = {};
        for_clamped<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
          const int64_t from = shared.centre[row] * static_cast<int64_t>(layer.message_width);
          const Vector d_message = load<Vector>(layer.d_message + from + column + offset);
          gradients[group] = (routing * layer.edge_scale) * d_message;
          switches[group] = layer.switch_edge[span.first + row];
        });
        layer.activation.template to_gradients<Tile::kGroups>(gradients, switches, sums, dots);
        shared.d_switch.template add<Tile>(thread, span.rows, width, dots);
        store_all<Tile>(thread, shared.chunk, sums);
      });
      spread<Tile>(block, weights, shared, place, span, width);
    }
  }

  /// d_pre = routing update_0 phi' d_edge_out of every expert of the edge map.
  template <class Tile, class Block>
  MOECALC_KERNEL void through_update(Block& block, const Weights& weights, const Rows& shared,
                                     const Span& span, int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    for (int expert = 0; expert < layer.experts_edge; ++expert) {
      const int place = layer.message_columns + expert * layer.e_padded + column;
      const Real routing = weights.routing_edge[expert];
      block.each([&](int thread) {
        Vector sums[Tile::kGroups] = {};
        shared.template pre_activation<Tile>(thread, layer, weights, span.rows, place, width, sums);
        Vector gradients[Tile::kGroups];
        for_clamped<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
          const int64_t from = (span.first + row) * static_cast<int64_t>(layer.e_padded) + column + offset;
          const Vector factor = load<Vector>(layer.update.edge + column + offset);
          gradients[group] = routing * factor * load<Vector>(layer.d_edge_out + from);
        });
        layer.activation.template to_gradients<Tile::kGroups>(gradients, sums);
        store_all<Tile>(thread, shared.chunk, sums);
      });
      spread<Tile>(block, weights, shared, place, span, width);
    }
  }

  /// d_pre of a chunk (columns of the edge maps from `place` on) to global memory, d_edge and
  /// d_edge_centre_part.
  template <class Tile, class Block>
  MOECALC_KERNEL void spread(Block& block, const Weights& weights, const Rows& shared, int place,
                             const Span& span, int width) const {
    const int64_t stride = layer.edge_columns;
    const int columns = width < Tile::kColumns ? width : Tile::kColumns;
    block.sync();
    copy_rows(block, shared.chunk, span.rows, columns, layer.d_edge_pre + span.first * stride + place,
              stride);
    add_product(block, shared.gradient, shared.chunk, span.rows, columns,
                weights.edge_edge_transposed + row_offset<Format>(place, layer.e_padded), layer.e_padded);
    segment_sums(
        block, shared.chunk, span.rows, columns,
        [&](int row) { return shared.with_centre(layer.graph, span, row); },
        [&](int row, int offset, const RowVec<Real>& sum) {
          const int64_t to = shared.centre[row] * stride + place + offset;
          put(layer.d_edge_centre_part + to, false, sum);
        });
    block.sync();
  }

  /// d_edge and d_switch_edge to global memory.
  template <class Block>
  MOECALC_KERNEL void finish(Block& block, const Rows& shared, const Span& span) const {
    copy_rows(block, shared.gradient, span.rows, layer.e_padded,
              layer.d_edge + span.first * static_cast<int64_t>(layer.e_padded), layer.e_padded);
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int edge = span.first + thread;
      const double value = double(shared.d_switch.sum(thread));
      layer.d_switch_edge[edge] = layer.add_edge_geometry ? layer.d_switch_edge[edge] + value : value;
    });
  }

  static constexpr int kLanes = 16;  // threads that share a row in to_directions
};

}  // namespace moecalc::cuda
