// Angle maps: messages of angles to their first edges, the angles' update, and the gradients of both
// (SPEC.md, section 6, steps 5 to 8).
//
// For an angle of the edges ij and ik of centre i, with W split by inputs:
//   pre_activation_ijk = P_ij + Q_ik + angle_ijk W_angle,   P_ij = node_i W_centre + b + edge_ij W_first,
//                                                           Q_ik = edge_ik W_second.
// P and Q of the close edges of a run are computed by the block that works on its angles.
//
// FIRST: of the first layer, where angle_ijk is cosine_ijk times the same direction for all angles. There
// angle_ijk W_angle = cosine_ijk angle_of_cos, and the gradient of the cosine is that of the pre-activation
// times angle_of_cos: no product.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/layer_view.cuh"
#include "kernels/cuda/rows.cuh"

namespace moecalc::cuda {

/// Arrays in shared memory for a tile of angles.
template <class Format, bool FIRST>
struct AngleRows {
  using Real = typename Format::Real;
  SharedRows<Format> angle;  // features of the rows; none if FIRST
  SharedRows<Format> chunk;  // results in a chunk of columns
  // Of every row:
  int* centre;
  int* first;    // close edge ij
  int* second;   // close edge ik, or of rows of close edges the edge in the graph
  int* place;    // among those with its first edge
  int* number;   // within the centre
  int* message;  // of its first edge: row of the angle message
  int* n_close;  // of the centre: as many rows have the same first edge; step between those of a second

  /// Columns of the rows' features.
  static MOECALC_BOTH int width(const LayerView<Real>& layer) { return FIRST ? 0 : layer.a_padded; }
  static int64_t bytes(const LayerView<Real>& layer) {
    return SharedRows<Format>::bytes(width(layer)) + SharedRows<Format>::bytes(kChunk) +
           7 * shared_size<int>(Format::kRows);
  }
  template <class Block>
  MOECALC_KERNEL AngleRows(Block& block, const LayerView<Real>& layer)
      : angle(block, width(layer)),
        chunk(block, kChunk),
        centre(block.template shared<int>(Format::kRows)),
        first(block.template shared<int>(Format::kRows)),
        second(block.template shared<int>(Format::kRows)),
        place(block.template shared<int>(Format::kRows)),
        number(block.template shared<int>(Format::kRows)),
        message(block.template shared<int>(Format::kRows)),
        n_close(block.template shared<int>(Format::kRows)) {}

  /// The angles of a tile.
  template <class Block>
  MOECALC_KERNEL void read(Block& block, const LayerView<Real>& layer, const Run& run,
                           const Span& span) const {
    const Graph& graph = layer.graph;
    block.sync();  // the tile before is still read
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int row = span.first + thread;
      const int own_centre = centre_of(graph.first_angle, run.begin, run.end, row);
      const int own_number = row - graph.first_angle[own_centre];
      const int own_n_close = graph.n_close[own_centre];
      const int own_first = own_number / own_n_close;
      const int own_place = own_number - own_first * own_n_close;
      centre[thread] = own_centre;
      number[thread] = own_number;
      place[thread] = own_place;
      n_close[thread] = own_n_close;
      first[thread] = graph.first_close[own_centre] + own_first;
      second[thread] = graph.first_close[own_centre] + own_place;
      message[thread] = static_cast<int>(layer.message_row(own_centre, first[thread]));
    });
    if constexpr (!FIRST) {
      stage(block, angle, span.rows, layer.a_padded, [&](int row, int column) {
        const int64_t from = span.first + row;
        return load<RowVec<Real>>(layer.angle + from * layer.a_padded + column);
      });
    }
    block.sync();
  }

  /// The close edges of a tile: their centres, and in `second` their numbers in the graph.
  template <class Block>
  MOECALC_KERNEL void read_close(Block& block, const Graph& graph, const Run& run, const Span& span) const {
    block.sync();
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int row = span.first + thread;
      const int own_centre = centre_of(graph.first_close, run.begin, run.end, row);
      centre[thread] = own_centre;
      second[thread] = graph.first_edge[own_centre] + row - graph.first_close[own_centre];
    });
  }

  /// Whether a row is the first of those with its first edge: what is summed over them starts anew.
  MOECALC_KERNEL bool starts_first(int row) const { return place[row] == 0; }
  /// The same of its second edge.
  MOECALC_KERNEL bool starts_second(int row) const { return number[row] < n_close[row]; }
  /// The rows of a tile with the same first edge.
  MOECALC_KERNEL Segment with_first(int row) const {
    return {row == 0 || starts_first(row), 1, row + n_close[row] - place[row]};
  }
  /// The rows of a tile with the same second edge, as far as the centre's rows go.
  MOECALC_KERNEL Segment with_second(int row) const {
    const int step = n_close[row];
    return {row < step || starts_second(row), step, row + step * step - number[row]};
  }

  /// pre_activation = P_ij + Q_ik + angle W_angle in the columns of the angle maps from `column` on.
  template <class Tile>
  MOECALC_KERNEL void pre_activation(int thread, const LayerView<Real>& layer,
                                     const kernels::GroupWeights<Real>& weights, const Span& span, int column,
                                     int width, typename Tile::Vector* sums) const {
    using Vector = typename Tile::Vector;
    const Real* first_parts = layer.angle_edge_parts + layer.part_offset(0, 0) + column;
    const Real* second_parts = layer.angle_edge_parts + layer.part_offset(0, 1) + column;
    const int stride = 2 * layer.angle_columns;
    for_clamped<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
      sums[group] = load<Vector>(first_parts + static_cast<int64_t>(first[row]) * stride + offset) +
                    load<Vector>(second_parts + static_cast<int64_t>(second[row]) * stride + offset);
      if constexpr (FIRST) {
        const Vector of_cos = load<Vector>(weights.angle_of_cos + column + offset);
        sums[group] += layer.cosine[span.first + row] * of_cos;
      }
    });
    if constexpr (!FIRST) {
      Tile::multiply(thread, sums, angle, layer.a_padded,
                     weight_columns<Tile>(weights.angle_angle, layer.angle_columns, column, width));
    }
  }
};

/// P_ij = edge_ij W_first + (node_i W_centre + b) and Q_ij = edge_ij W_second of one tile of close edges and
/// one chunk of columns; side 0: P, side 1: Q.
template <class Tile, class Block, class Rows>
MOECALC_KERNEL void project_close_chunk(Block& block, const LayerView<typename Tile::Real>& layer,
                                        const typename Tile::Real* weights, const Rows& shared,
                                        const Span& span, int side, int column) {
  using Real = typename Tile::Real;
  using Vector = typename Tile::Vector;
  const int width = layer.angle_columns - column;
  auto sums = block.template registers<Vector, Tile::kGroups>();
  block.sync();
  block.each([&](int thread) {
    set_zero<Tile>(sums[thread]);
    if (side == 1) return;
    for_own<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
      const int64_t from = shared.centre[row] * static_cast<int64_t>(layer.angle_columns) + column + offset;
      sums[thread][group] = load<Vector>(layer.angle_centre_part + from);
    });
  });
  multiply_sliced<Tile>(
      block, sums, shared.chunk, span.rows, layer.e_padded,
      weight_columns<Tile>(weights, layer.angle_columns, column, width), [&](int row, int input) {
        const int64_t from = shared.second[row] * static_cast<int64_t>(layer.e_padded) + input;
        return load<RowVec<Real>>(layer.edge + from);
      });
  block.each([&](int thread) {
    for_own<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
      const int64_t to = layer.part_offset(span.first + row, side) + column + offset;
      store(layer.angle_edge_parts + to, sums[thread][group]);
    });
  });
}

/// P and Q of the close edges of a run, for the angles of the same block.
template <class Format, class Block, class Rows>
MOECALC_KERNEL void project_close(Block& block, const LayerView<typename Format::Real>& layer, const Run& run,
                                  const Rows& shared) {
  const Graph& graph = layer.graph;
  const auto& weights = layer.weights[run.group];
  for_tiles<Format>(graph.first_close[run.begin], graph.first_close[run.end], [&](const Span& span) {
    shared.read_close(block, graph, run, span);
    for (int side = 0; side < 2; ++side) {
      for_chunks<Format>(layer.angle_columns, [&](auto tile, int column) {
        project_close_chunk<decltype(tile)>(
            block, layer, side == 0 ? weights.angle_first : weights.angle_second, shared, span, side, column);
      });
    }
  });
  block.sync();
}

/// Messages of the angles to their first edges, and the angles' own update:
///   angle_message_ij = angle_scale sum_k switch_ijk mix phi(pre_activation_ijk)        (angle message map)
///   angle_out = keep_angle angle + update mix phi(pre_activation)                      (angle map)
template <class Format, bool FIRST>
struct AngleForward : LayerKernel<Format, AngleRows<Format, FIRST>> {
  using Rows = AngleRows<Format, FIRST>;
  using Base = LayerKernel<Format, Rows>;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = this->runs[block.index()];
    const Weights& weights = layer.weights[run.group];
    const Graph& graph = layer.graph;
    const Rows shared(block, layer);
    project_close<Format>(block, layer, run, shared);
    for_tiles<Format>(graph.first_angle[run.begin], graph.first_angle[run.end], [&](const Span& span) {
      shared.read(block, layer, run, span);
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        send_messages<decltype(tile)>(block, weights, shared, span, column);
      });
      if (!layer.live_angle) return;  // nobody reads angle_out
      for_chunks<Format>(layer.a_padded, [&](auto tile, int column) {
        block.each([&](int thread) { update<decltype(tile)>(thread, weights, shared, span, column); });
      });
    });
  }

 private:
  /// The angle message in a chunk of its columns. A first edge whose rows continue in the next tile is added
  /// to there.
  template <class Tile, class Block>
  MOECALC_KERNEL void send_messages(Block& block, const Weights& weights, const Rows& shared,
                                    const Span& span, int column) const {
    const int width = layer.e_padded - column;
    block.each([&](int thread) {
      typename Tile::Vector mix[Tile::kGroups] = {};
      for (int expert = 0; expert < layer.experts_angle_message; ++expert) {
        add_expert<Tile>(thread, shared, weights, weights.routing_angle_message[expert],
                         expert * layer.e_padded + column, span, width, mix);
      }
      for_clamped<Tile>(thread, span.rows, width,
                        [&](int group, int row, int) { mix[group] *= layer.switch_angle[span.first + row]; });
      store_all<Tile>(thread, shared.chunk, mix);
    });
    block.sync();
    const int columns = width < Tile::kColumns ? width : Tile::kColumns;
    segment_sums(
        block, shared.chunk, span.rows, columns, [&](int row) { return shared.with_first(row); },
        [&](int row, int offset, auto sum) {
          sum *= layer.angle_scale;
          const int64_t to = shared.message[row] * static_cast<int64_t>(layer.e_padded);
          put(layer.angle_message + to + column + offset, shared.starts_first(row), sum);
        });
    block.sync();
  }

  /// angle_out in a chunk of its columns.
  template <class Tile>
  MOECALC_KERNEL void update(int thread, const Weights& weights, const Rows& shared, const Span& span,
                             int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.a_padded - column;
    Vector mix[Tile::kGroups] = {};
    for (int expert = 0; expert < layer.experts_angle; ++expert) {
      add_expert<Tile>(thread, shared, weights, weights.routing_angle[expert],
                       layer.angle_message_columns + expert * layer.a_padded + column, span, width, mix);
    }
    for_own<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
      const Vector old = feature<Vector>(shared, span, row, column + offset);
      const Vector factor = load<Vector>(layer.update.angle + column + offset);
      const int64_t to = (span.first + row) * static_cast<int64_t>(layer.a_padded) + column + offset;
      store(layer.angle_out + to, layer.keep_angle * old + factor * mix[group]);
    });
  }

  /// Columns of the features of an angle.
  template <class Vector>
  MOECALC_KERNEL Vector feature(const Rows& shared, const Span& span, int row, int column) const {
    if constexpr (FIRST) {
      return layer.cosine[span.first + row] * load<Vector>(layer.direction + column);
    } else {
      return load<Vector>(shared.angle.at(row, column));
    }
  }

  /// mix += routing phi(pre_activation) of one expert, whose columns start at `column`.
  template <class Tile>
  MOECALC_KERNEL void add_expert(int thread, const Rows& shared, const Weights& weights, Real routing,
                                 int column, const Span& span, int width, typename Tile::Vector* mix) const {
    typename Tile::Vector sums[Tile::kGroups] = {};
    shared.template pre_activation<Tile>(thread, layer, weights, span, column, width, sums);
    layer.activation.template add_values<Tile::kGroups>(routing, sums, mix);
  }
};

/// Arrays in shared memory for the gradients of a tile of angles of the first layer.
template <class Format>
struct CosineGradientRows : AngleRows<Format, true> {
  using Base = AngleRows<Format, true>;
  Dots<Format> d_cosine;  // to which every chunk adds
  Dots<Format> d_switch;  // likewise

  template <class View>
  static int64_t bytes(const View& layer) {
    return Base::bytes(layer) + 2 * Dots<Format>::bytes();
  }
  template <class Block, class View>
  MOECALC_KERNEL CosineGradientRows(Block& block, const View& layer)
      : Base(block, layer), d_cosine(block), d_switch(block) {}
};
template <class Format, bool FIRST>
using AngleGradientRows =
    std::conditional_t<FIRST, CosineGradientRows<Format>, GradientRows<Format, AngleRows<Format, false>>>;

/// Gradients of the angle maps. With d_pre = phi'(pre_activation) times the gradient of an expert's output:
///   d_switch_ijk = d_angle_message_ij . mix phi,   d_angle = keep_angle d_angle_out + d_pre W_angle^T,
///   dP_ij = sum_k d_pre_ijk,   dQ_ik = sum_j d_pre_ijk,   d_edge += dP W_first^T + dQ W_second^T,
///   d_angle_centre_part_i = sum_j dP_ij.
/// In the first layer d_cosine = direction . d_angle in place of d_angle.
template <class Format, bool FIRST>
struct AngleBackward : LayerKernel<Format, AngleGradientRows<Format, FIRST>> {
  using Rows = AngleGradientRows<Format, FIRST>;
  using Base = LayerKernel<Format, Rows>;
  using Base::layer;
  using typename Base::Real;
  using typename Base::Weights;

  template <class Block>
  MOECALC_KERNEL void operator()(Block& block) const {
    const Run run = this->runs[block.index()];
    const Weights& weights = layer.weights[run.group];
    const Graph& graph = layer.graph;
    const Rows shared(block, layer);
    project_close<Format>(block, layer, run, shared);
    for_tiles<Format>(graph.first_angle[run.begin], graph.first_angle[run.end], [&](const Span& span) {
      shared.read(block, layer, run, span);
      shared.d_switch.clear(block);
      if constexpr (FIRST) {
        shared.d_cosine.clear(block);
        block.sync();
      } else {
        start_gradient(block, shared, span);
      }
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        through_messages<decltype(tile)>(block, weights, shared, span, column);
      });
      if (layer.live_angle) {
        for_chunks<Format>(layer.a_padded, [&](auto tile, int column) {
          through_update<decltype(tile)>(block, weights, shared, span, column);
        });
      }
      finish(block, shared, span);
    });
    block.sync();
    sum_over_edges(block, run);
    for_tiles<Format>(graph.first_close[run.begin], graph.first_close[run.end], [&](const Span& span) {
      shared.read_close(block, graph, run, span);
      for_chunks<Format>(layer.e_padded, [&](auto tile, int column) {
        to_edges<decltype(tile)>(block, weights, shared, span, column);
      });
    });
  }

 private:
  /// d_angle = keep_angle d_angle_out.
  template <class Block>
  MOECALC_KERNEL void start_gradient(Block& block, const Rows& shared, const Span& span) const {
    stage(block, shared.gradient, span.rows, layer.a_padded, [&](int row, int column) {
      using Vector = RowVec<Real>;
      if (!layer.live_angle) return Vector{};
      const int64_t from = (span.first + row) * static_cast<int64_t>(layer.a_padded) + column;
      return layer.keep_angle * load<Vector>(layer.d_angle + from);
    });
    block.sync();
  }

  /// d_pre = routing angle_scale switch phi' d_angle_message of every expert of the angle message.
  template <class Tile, class Block>
  MOECALC_KERNEL void through_messages(Block& block, const Weights& weights, const Rows& shared,
                                       const Span& span, int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    for (int expert = 0; expert < layer.experts_angle_message; ++expert) {
      const int place = expert * layer.e_padded + column;
      const Real routing = weights.routing_angle_message[expert];
      block.each([&](int thread) {
        Vector sums[Tile::kGroups] = {};
        shared.template pre_activation<Tile>(thread, layer, weights, span, place, width, sums);
        Vector gradients[Tile::kGroups];
        Real switches[Tile::kGroups];
        Real dots[Tile::kGroups] = {};
        for_clamped<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
          const int64_t from = shared.message[row] * static_cast<int64_t>(layer.e_padded);
          const Vector d_message = load<Vector>(layer.d_angle_message + from + column + offset);
          gradients[group] = (routing * layer.angle_scale) * d_message;
          switches[group] = layer.switch_angle[span.first + row];
        });
        layer.activation.template to_gradients<Tile::kGroups>(gradients, switches, sums, dots);
        shared.d_switch.template add<Tile>(thread, span.rows, width, dots);
        if constexpr (FIRST) {
          Real shares[Tile::kGroups] = {};
          add_to_cosine<Tile>(thread, weights.angle_of_cos + place, width, sums, shares);
          shared.d_cosine.template add<Tile>(thread, span.rows, width, shares);
        }
        store_all<Tile>(thread, shared.chunk, sums);
      });
      spread<Tile>(block, weights, shared, place, span.rows, width);
    }
  }

  /// d_pre = routing update phi' d_angle_out of every expert of the angle map.
  template <class Tile, class Block>
  MOECALC_KERNEL void through_update(Block& block, const Weights& weights, const Rows& shared,
                                     const Span& span, int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.a_padded - column;
    for (int expert = 0; expert < layer.experts_angle; ++expert) {
      const int place = layer.angle_message_columns + expert * layer.a_padded + column;
      const Real routing = weights.routing_angle[expert];
      block.each([&](int thread) {
        Vector sums[Tile::kGroups] = {};
        shared.template pre_activation<Tile>(thread, layer, weights, span, place, width, sums);
        Vector gradients[Tile::kGroups];
        [[maybe_unused]] Real shares[Tile::kGroups] = {};  // of d_cosine
        for_clamped<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
          const int64_t from = (span.first + row) * static_cast<int64_t>(layer.a_padded) + column + offset;
          const Vector factor = load<Vector>(layer.update.angle + column + offset);
          const Vector d_out = load<Vector>(layer.d_angle + from);
          gradients[group] = routing * factor * d_out;
          if constexpr (FIRST) {
            // what the update keeps of a feature, once for all experts
            const Real keep = expert == 0 ? layer.keep_angle : Real(0);
            shares[group] = keep * dot(d_out, load<Vector>(layer.direction + column + offset));
          }
        });
        layer.activation.template to_gradients<Tile::kGroups>(gradients, sums);
        if constexpr (FIRST) {
          add_to_cosine<Tile>(thread, weights.angle_of_cos + place, width, sums, shares);
          shared.d_cosine.template add<Tile>(thread, span.rows, width, shares);
        }
        store_all<Tile>(thread, shared.chunk, sums);
      });
      spread<Tile>(block, weights, shared, place, span.rows, width);
    }
  }

  /// shares += d_pre . angle_of_cos, of a thread's vectors.
  template <class Tile>
  MOECALC_KERNEL void add_to_cosine(int thread, const Real* of_cos, int width,
                                    const typename Tile::Vector* d_pre, Real* shares) const {
    for_clamped<Tile>(thread, Format::kRows, width, [&](int group, int, int offset) {
      shares[group] += dot(d_pre[group], load<typename Tile::Vector>(of_cos + offset));
    });
  }

  /// d_pre of a chunk (columns of the angle maps from `place` on) to d_angle, dP and dQ.
  template <class Tile, class Block>
  MOECALC_KERNEL void spread(Block& block, const Weights& weights, const Rows& shared, int place, int rows,
                             int width) const {
    using Vector = RowVec<Real>;
    const int columns = width < Tile::kColumns ? width : Tile::kColumns;
    block.sync();
    if constexpr (!FIRST) {
      add_product(block, shared.gradient, shared.chunk, rows, columns,
                  weights.angle_angle_transposed + row_offset<Format>(place, layer.a_padded), layer.a_padded);
    }
    segment_sums(
        block, shared.chunk, rows, columns, [&](int row) { return shared.with_first(row); },
        [&](int row, int offset, const Vector& sum) {
          const int64_t to = layer.part_offset(shared.first[row], 0) + place + offset;
          put(layer.d_angle_edge_parts + to, shared.starts_first(row), sum);
        });
    segment_sums(
        block, shared.chunk, rows, columns, [&](int row) { return shared.with_second(row); },
        [&](int row, int offset, const Vector& sum) {
          const int64_t to = layer.part_offset(shared.second[row], 1) + place + offset;
          put(layer.d_angle_edge_parts + to, shared.starts_second(row), sum);
        });
    block.sync();
  }

  /// d_switch_angle, and d_angle or d_cosine, to global memory.
  template <class Block>
  MOECALC_KERNEL void finish(Block& block, const Rows& shared, const Span& span) const {
    block.each([&](int thread) {
      if (thread >= span.rows) return;
      const int row = span.first + thread;
      const Real value = shared.d_switch.sum(thread);
      layer.d_switch_angle[row] = layer.add_switch_angle ? layer.d_switch_angle[row] + value : value;
      if constexpr (FIRST) layer.d_cosine[row] = shared.d_cosine.sum(thread);
    });
    if constexpr (!FIRST) {
      copy_rows(block, shared.gradient, span.rows, layer.a_padded,
                layer.d_angle + span.first * static_cast<int64_t>(layer.a_padded), layer.a_padded);
    }
  }

  /// d_angle_centre_part_i = sum_j dP_ij.
  template <class Block>
  MOECALC_KERNEL void sum_over_edges(Block& block, const Run& run) const {
    using Vector = RowVec<Real>;
    block.each([&](int thread) {
      const int per_row = layer.angle_columns / Vector::kSize;
      for (int place = thread; place < (run.end - run.begin) * per_row; place += kThreads) {
        const int64_t centre = run.begin + place / per_row;
        const int64_t column = place % per_row * Vector::kSize;
        Vector total = {};
        for (int64_t close = layer.graph.first_close[centre]; close < layer.graph.first_close[centre + 1];
             ++close) {
          total += load<Vector>(layer.d_angle_edge_parts + layer.part_offset(close, 0) + column);
        }
        store(layer.d_angle_centre_part + centre * layer.angle_columns + column, total);
      }
    });
  }

  /// d_edge += dP W_first^T + dQ W_second^T for a tile of close edges.
  template <class Tile, class Block>
  MOECALC_KERNEL void to_edges(Block& block, const Weights& weights, const Rows& shared, const Span& span,
                               int column) const {
    using Vector = typename Tile::Vector;
    const int width = layer.e_padded - column;
    auto sums = block.template registers<Vector, Tile::kGroups>();
    block.each([&](int thread) { set_zero<Tile>(sums[thread]); });
    for (int side = 0; side < 2; ++side) {
      const Real* matrix = side == 0 ? weights.angle_first_transposed : weights.angle_second_transposed;
      multiply_sliced<Tile>(block, sums, shared.chunk, span.rows, layer.angle_columns,
                            weight_columns<Tile>(matrix, layer.e_padded, column, width),
                            [&](int row, int input) {
                              const int64_t from = layer.part_offset(span.first + row, side) + input;
                              return load<RowVec<Real>>(layer.d_angle_edge_parts + from);
                            });
    }
    block.each([&](int thread) {
      for_own<Tile>(thread, span.rows, width, [&](int group, int row, int offset) {
        const int64_t to = shared.second[row] * static_cast<int64_t>(layer.e_padded) + column + offset;
        put(layer.d_edge + to, false, sums[thread][group]);
      });
    });
  }
};

}  // namespace moecalc::cuda
