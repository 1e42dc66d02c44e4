// The weights of a package on the target.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "backends/backend.h"
#include "backends/cuda/memory.h"
#include "ops/cuda/layer.cuh"
#include "ops/cuda/readout.cuh"
#include "package/packed_weights.h"
#include "package/routing.h"

namespace moecalc::cuda {

/// Weights that do not belong to a group, and tables of the types; pointers of the target.
template <class T>
struct Constants {
  const T *node_table = nullptr, *edge_matrix = nullptr, *edge_bias = nullptr, *angle_row = nullptr;
  const T *fitting_constant = nullptr, *out_matrix = nullptr;
  const double *shift = nullptr, *energy_weight = nullptr;  // (K n_types)
  int64_t n_constant = 0, out_width = 0;                    // out_width: unpadded
  double out_bias = 0.0;
  std::vector<FittingLayer<T>> fitting;
  Rules geometry;
};

template <class N, class Target>
class DeviceWeights {
 public:
  using T = typename N::type;

  /// Throws Unsupported.
  DeviceWeights(const BackendInputs& inputs, Target& target)
      : target_(target),
        model_(inputs.package.architecture),
        packed_(model_, ops::kernels<T>(), inputs.options.weight_bytes,
                [&target] { return target.free_bytes() / 4; }) {
    const Dtype fitting = inputs.options.dtype.value_or(model_.readout.dtype);
    if (fitting != inputs.dtype) throw Unsupported{"a fitting net of another precision than the layers"};
    for (const FittingLayerSource& source : model_.readout.layers) {
      if (!kernel_activation(source.phi)) throw Unsupported{"activation " + source.phi.kind};
    }
    set_fitting_widths();
  }

  void set_tables(const TypeTables& tables) {
    packed_.set_tables(tables);
    upload_constants(tables);
  }
  /// `features` (G, n_dim): router input of every group. Has the weights of the groups `used` on the target.
  void set_groups(const Array& features, const std::vector<int64_t>& used) {
    const bool were_up = std::exchange(are_up_, false);  // also if one of these throws
    if (packed_.set_groups(features, used) || !were_up) upload_groups();
    are_up_ = true;
  }
  /// Gives back all weights but those of the groups `in_use`.
  void release(const std::vector<int64_t>& in_use = {}) {
    packed_.release_groups(in_use);
    upload_groups();
  }

  size_t n_layer() const { return shapes().size(); }
  const std::vector<ops::LayerShape>& shapes() const { return packed_.weights().shapes; }
  const ModelWeights<T>& model() const { return packed_.weights(); }
  const Constants<T>& constants() const { return constants_; }
  /// Of all groups, on the target.
  const ops::GroupWeights<T>* groups(size_t layer) const { return groups_[layer]; }
  const ops::UpdateVectors<T>& update(size_t layer) const { return updates_[layer]; }

  int64_t n_packed_groups() const { return packed_.n_packed_groups(); }
  int64_t group_bytes() const {
    int64_t total = 0;
    for (const auto& [id, block] : blocks_) total += block.memory.bytes();
    return total;
  }
  int64_t bytes() const {
    return group_bytes() + pointer_memory_.bytes() + update_memory_.bytes() + constant_memory_.bytes();
  }

 private:
  using Block = WeightBlock<T>;
  struct Held {
    Memory memory;
    std::vector<const T*> parts;
  };
  /// Pointer of the host, and where it went.
  using Places = std::vector<std::pair<const T*, const T*>>;

  void set_fitting_widths();
  Held upload_block(const Block& block);
  void upload_blocks();
  void upload_updates();
  void upload_groups();
  void upload_constants(const TypeTables& tables);
  void add_padded(Upload& upload, const Array& matrix, bool transposed, int64_t rows, int64_t columns,
                  const T** place) const;
  void add_row(Upload& upload, const Array& row, int64_t columns, const T** place) const;
  static Places sorted(Places places) {
    std::sort(places.begin(), places.end());
    return places;
  }
  template <class Pointers>
  static Pointers translated(Pointers pointers, const Places& places);

  Target& target_;
  const Architecture& model_;
  PackedWeights<T> packed_;
  bool are_up_ = false;
  std::map<uint64_t, Held> blocks_;  // by id
  Memory update_memory_, pointer_memory_, constant_memory_;
  std::vector<const ops::GroupWeights<T>*> groups_;
  std::vector<ops::UpdateVectors<T>> updates_;
  Constants<T> constants_;
};

/// A block as the products read it. The host's copy of it is given back.
template <class N, class Target>
auto DeviceWeights<N, Target>::upload_block(const Block& block) -> Held {
  Held held;
  held.parts.resize(block.parts.size());
  Upload upload;
  for (size_t x = 0; x < block.parts.size(); ++x) {
    const auto& part = block.parts[x];
    const T* values = block.part(x);
    const auto write = [&part, values](T* to) {
      if (part.matrix) {
        const std::vector<T> laid_out = fragments<N>(values, part.rows, part.columns);
        std::copy(laid_out.begin(), laid_out.end(), to);
      } else {
        std::copy_n(values, part.rows * part.columns, to);
      }
    };
    upload.add(static_cast<size_t>(part.rows * part.columns), write, &held.parts[x]);
  }
  held.memory = upload.send(target_);
  return held;
}

/// Has those blocks on the target that are packed.
template <class N, class Target>
void DeviceWeights<N, Target>::upload_blocks() {
  std::set<uint64_t> packed;
  for (const auto& group : packed_.groups()) {
    for (const auto& block : group.blocks) packed.insert(block->id);
  }
  std::erase_if(blocks_, [&](const auto& held) { return packed.count(held.first) == 0; });
  for (const auto& group : packed_.groups()) {
    for (const auto& block : group.blocks) {
      if (blocks_.count(block->id) > 0) continue;
      blocks_.emplace(block->id, upload_block(*block));
      block->memory.discard();
    }
  }
}

/// `pointers`: a struct of nothing but pointers to packed values.
template <class N, class Target>
template <class Pointers>
Pointers DeviceWeights<N, Target>::translated(Pointers pointers, const Places& places) {
  static_assert(sizeof(Pointers) % sizeof(const T*) == 0);
  auto* p = reinterpret_cast<const T**>(&pointers);
  for (size_t x = 0; x < sizeof(Pointers) / sizeof(const T*); ++x) {
    if (p[x] == nullptr) continue;
    const std::pair<const T*, const T*> host(p[x], nullptr);
    p[x] = std::lower_bound(places.begin(), places.end(), host)->second;
  }
  return pointers;
}

template <class N, class Target>
void DeviceWeights<N, Target>::upload_updates() {
  if (!updates_.empty()) return;
  const std::vector<std::vector<T>>& memory = packed_.update_memory();
  Places places;
  for (const std::vector<T>& values : memory) places.emplace_back(values.data(), nullptr);
  Upload upload;
  for (size_t x = 0; x < memory.size(); ++x) upload.add(memory[x], &places[x].second);
  update_memory_ = upload.send(target_);
  const Places by_host = sorted(places);
  for (const ops::UpdateVectors<T>& update : packed_.weights().updates) {
    updates_.push_back(translated(update, by_host));
  }
}

/// Uploads what the target does not hold of the packed weights, and drops what is no longer packed.
template <class N, class Target>
void DeviceWeights<N, Target>::upload_groups() {
  const typename Target::Scope scope(target_);
  upload_blocks();
  upload_updates();
  Places places;
  std::set<uint64_t> placed;
  for (const auto& group : packed_.groups()) {
    for (const auto& block : group.blocks) {
      if (!placed.insert(block->id).second) continue;
      const Held& held = blocks_.at(block->id);
      for (size_t x = 0; x < held.parts.size(); ++x) places.emplace_back(block->part(x), held.parts[x]);
    }
  }
  const Places by_host = sorted(places);
  std::vector<std::vector<ops::GroupWeights<T>>> pointers;
  for (const auto& of_layer : packed_.weights().groups) {
    pointers.emplace_back();
    for (const ops::GroupWeights<T>& group : of_layer) pointers.back().push_back(translated(group, by_host));
  }
  groups_.assign(pointers.size(), nullptr);
  Upload upload;
  for (size_t l = 0; l < pointers.size(); ++l) upload.add(pointers[l], &groups_[l]);
  pointer_memory_.reset();
  pointer_memory_ = upload.send(target_);
}

template <class N, class Target>
void DeviceWeights<N, Target>::set_fitting_widths() {
  const ReadoutSource& readout = model_.readout;
  constants_.out_width = readout.out_matrix.numel();
  constants_.out_bias = readout.out_bias;
  for (const FittingLayerSource& source : readout.layers) {
    FittingLayer<T> layer;
    layer.n_in = static_cast<int>(source.matrix.size(0));
    layer.n_out = static_cast<int>(source.matrix.size(1));
    layer.in = static_cast<int>(ops::padded<T>(layer.n_in));
    layer.out = static_cast<int>(ops::padded<T>(layer.n_out));
    layer.residual = static_cast<int>(source.residual);
    layer.phi = Phi<T>(*kernel_activation(source.phi));
    constants_.fitting.push_back(layer);
  }
}

/// `matrix` float64, or its transpose, padded with zeros, as the products read it.
template <class N, class Target>
void DeviceWeights<N, Target>::add_padded(Upload& upload, const Array& matrix, bool transposed, int64_t rows,
                                          int64_t columns, const T** place) const {
  const auto write = [matrix, transposed, rows, columns](T* to) {
    std::vector<T> padded(static_cast<size_t>(rows * columns), T(0));
    const double* from = matrix.data<double>();
    for (int64_t i = 0; i < matrix.size(0); ++i) {
      for (int64_t k = 0; k < matrix.size(1); ++k) {
        padded[static_cast<size_t>(transposed ? k * columns + i : i * columns + k)] = static_cast<T>(*from++);
      }
    }
    const std::vector<T> laid_out = fragments<N>(padded.data(), rows, columns);
    std::copy(laid_out.begin(), laid_out.end(), to);
  };
  upload.add(static_cast<size_t>(rows * columns), write, place);
}

/// `row` float64, padded with zeros.
template <class N, class Target>
void DeviceWeights<N, Target>::add_row(Upload& upload, const Array& row, int64_t columns,
                                       const T** place) const {
  const auto write = [row, columns](T* to) {
    std::fill_n(to, columns, T(0));
    const double* from = row.data<double>();
    for (int64_t k = 0; k < row.numel(); ++k) to[k] = static_cast<T>(from[k]);
  };
  upload.add(static_cast<size_t>(columns), write, place);
}

template <class N, class Target>
void DeviceWeights<N, Target>::upload_constants(const TypeTables& tables) {
  const typename Target::Scope scope(target_);
  const ModelWeights<T>& weights = packed_.weights();
  const ops::LayerShape& shape = weights.shapes[0];
  const ReadoutSource& readout = model_.readout;
  Constants<T>& c = constants_;
  Upload upload;
  upload.add(weights.node_table, &c.node_table);
  upload.add(weights.edge_matrix, &c.edge_matrix);
  upload.add(weights.edge_bias, &c.edge_bias);
  std::vector<T> angle_row(static_cast<size_t>(shape.ap), T(0));
  std::copy(weights.angle_direction.begin(), weights.angle_direction.end(), angle_row.begin());
  upload.add(angle_row, &c.angle_row);
  upload.add(tables.mean, &c.geometry.mean);
  upload.add(tables.stddev, &c.geometry.stddev);
  upload.add(tables.energy_shift, &c.shift);
  upload.add(tables.energy_weight, &c.energy_weight);
  for (size_t l = 0; l < c.fitting.size(); ++l) {
    const FittingLayerSource& source = readout.layers[l];
    FittingLayer<T>& layer = c.fitting[l];
    add_padded(upload, source.matrix, false, layer.in, layer.out, &layer.w);
    add_padded(upload, source.matrix, true, layer.out, layer.in, &layer.w_t);
    add_row(upload, source.bias, layer.out, &layer.b);
    const std::vector<double> ones(static_cast<size_t>(layer.n_out), 1.0);
    add_row(upload, source.idt.defined() ? source.idt : Array::of(ones), layer.out, &layer.idt);
  }
  add_row(upload, readout.out_matrix, ops::padded<T>(c.out_width), &c.out_matrix);
  c.n_constant = tables.fitting.defined() ? tables.fitting.size(1) : 0;
  if (c.n_constant > 0) add_row(upload, tables.fitting, tables.fitting.numel(), &c.fitting_constant);
  constant_memory_.reset();
  constant_memory_ = upload.send(target_);

  const GeometryRules& rules = model_.geometry;
  c.geometry.edge = rules.edge;
  c.geometry.angle = rules.angle;
  c.geometry.use_dist = rules.use_dist;
  c.geometry.protection = rules.protection;
  c.geometry.with_angles = shape.with_angles;
  c.geometry.norm = 1.0 / std::sqrt(shape.edge_norm);
}

}  // namespace moecalc::cuda
