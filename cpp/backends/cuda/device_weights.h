// The weights of a package on the target.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "backends/backend.h"
#include "backends/cuda/memory.h"
#include "kernels/common/layer.h"
#include "kernels/cuda/formats.cuh"
#include "kernels/cuda/geometry.cuh"
#include "kernels/cuda/readout.cuh"
#include "package/edge_rules.h"
#include "package/packed_weights.h"
#include "package/routing.h"

namespace moecalc::cuda {

/// Weights that do not belong to a group, and tables of the types; pointers of the target.
template <class Real>
struct Constants {
  const Real* node_table = nullptr;        // (K n_types, n_padded)
  const Real* edge_matrix = nullptr;       // (e_padded)
  const Real* edge_bias = nullptr;         // (e_padded)
  const Real* angle_direction = nullptr;   // (a_padded)
  const Real* fitting_constant = nullptr;  // (K n_types, n_constant)
  const Real* out_matrix = nullptr;        // (out_width, padded)
  const double* shift = nullptr;           // (K n_types)
  const double* energy_weight = nullptr;   // (K n_types)
  int64_t n_constant = 0;
  int64_t out_width = 0;
  double out_bias = 0.0;
  std::vector<FittingLayer<Real>> fitting;
  GeometryTables geometry;
};

template <class Format, class Target>
class DeviceWeights {
 public:
  using Real = typename Format::Real;

  /// Throws Unsupported.
  DeviceWeights(const BackendInputs& inputs, Target& target)
      : target_(target),
        model_(inputs.package.architecture),
        packed_(model_, kernels::select_kernels<Real>(), inputs.options.weight_bytes,
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

  /// Another one whenever pointers or numbers of what is on the target may be others.
  int64_t version() const { return version_; }

  size_t n_layer() const { return shapes().size(); }
  const std::vector<kernels::LayerShape>& shapes() const { return packed_.weights().shapes; }
  const ModelWeights<Real>& model() const { return packed_.weights(); }
  const Constants<Real>& constants() const { return constants_; }
  /// Of all groups, on the target.
  const kernels::GroupWeights<Real>* groups(size_t layer) const { return groups_[layer]; }
  const kernels::UpdateVectors<Real>& update(size_t layer) const { return updates_[layer]; }

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
  using Block = WeightBlock<Real>;
  struct Held {
    Memory memory;
    std::vector<const Real*> parts;
  };
  /// Pointer of the host, and where it went.
  using Places = std::vector<std::pair<const Real*, const Real*>>;

  void set_fitting_widths();
  Held upload_block(const Block& block);
  void upload_blocks();
  void upload_updates();
  void upload_groups();
  Places block_places() const;
  void upload_constants(const TypeTables& tables);
  void add_fitting(Upload& upload);
  void add_padded(Upload& upload, const Array& matrix, bool transposed, int64_t rows, int64_t columns,
                  const Real** place) const;
  void add_row(Upload& upload, const Array& row, int64_t columns, const Real** place) const;
  static Places sorted(Places places) {
    std::sort(places.begin(), places.end());
    return places;
  }
  template <class Pointers>
  static Pointers translated(Pointers pointers, const Places& places);

  Target& target_;
  const Architecture& model_;
  PackedWeights<Real> packed_;
  bool are_up_ = false;
  int64_t version_ = 0;
  std::map<uint64_t, Held> blocks_;  // by id
  Memory update_memory_;
  Memory pointer_memory_;
  Memory constant_memory_;
  std::vector<const kernels::GroupWeights<Real>*> groups_;
  std::vector<kernels::UpdateVectors<Real>> updates_;
  Constants<Real> constants_;
};

/// A block as the products read it. The host's copy of it is given back.
template <class Format, class Target>
auto DeviceWeights<Format, Target>::upload_block(const Block& block) -> Held {
  Held held;
  held.parts.resize(block.parts.size());
  Upload upload;
  for (size_t index = 0; index < block.parts.size(); ++index) {
    const auto& part = block.parts[index];
    const Real* values = block.part(index);
    const auto write = [&part, values](Real* to) {
      if (part.matrix) {
        const std::vector<Real> laid_out = fragments<Format>(values, part.rows, part.columns);
        std::copy(laid_out.begin(), laid_out.end(), to);
      } else {
        std::copy_n(values, part.rows * part.columns, to);
      }
    };
    const int64_t size =
        part.matrix ? fragments_size<Format>(part.rows, part.columns) : part.rows * part.columns;
    upload.add(static_cast<size_t>(size), write, &held.parts[index]);
  }
  held.memory = upload.send(target_);
  return held;
}

/// Has those blocks on the target that are packed.
template <class Format, class Target>
void DeviceWeights<Format, Target>::upload_blocks() {
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
template <class Format, class Target>
template <class Pointers>
Pointers DeviceWeights<Format, Target>::translated(Pointers pointers, const Places& places) {
  static_assert(sizeof(Pointers) % sizeof(const Real*) == 0);
  auto* first = reinterpret_cast<const Real**>(&pointers);
  for (const Real*& pointer : std::span(first, sizeof(Pointers) / sizeof(const Real*))) {
    if (pointer == nullptr) continue;
    const std::pair<const Real*, const Real*> host(pointer, nullptr);
    pointer = std::lower_bound(places.begin(), places.end(), host)->second;
  }
  return pointers;
}

template <class Format, class Target>
void DeviceWeights<Format, Target>::upload_updates() {
  if (!updates_.empty()) return;
  const std::vector<std::vector<Real>>& memory = packed_.update_memory();
  Places places;
  for (const std::vector<Real>& values : memory) places.emplace_back(values.data(), nullptr);
  Upload upload;
  for (size_t index = 0; index < memory.size(); ++index) upload.add(memory[index], &places[index].second);
  update_memory_ = upload.send(target_);
  const Places by_host = sorted(places);
  for (const kernels::UpdateVectors<Real>& update : packed_.weights().updates) {
    updates_.push_back(translated(update, by_host));
  }
}

/// Of the parts of all blocks that are packed.
template <class Format, class Target>
auto DeviceWeights<Format, Target>::block_places() const -> Places {
  Places places;
  std::set<uint64_t> placed;
  for (const auto& group : packed_.groups()) {
    for (const auto& block : group.blocks) {
      if (!placed.insert(block->id).second) continue;
      const Held& held = blocks_.at(block->id);
      for (size_t index = 0; index < held.parts.size(); ++index) {
        places.emplace_back(block->part(index), held.parts[index]);
      }
    }
  }
  return sorted(std::move(places));
}

/// Uploads what the target does not hold of the packed weights, and drops what is no longer packed.
template <class Format, class Target>
void DeviceWeights<Format, Target>::upload_groups() {
  ++version_;
  const typename Target::Scope scope(target_);
  upload_blocks();
  upload_updates();
  const Places by_host = block_places();
  std::vector<std::vector<kernels::GroupWeights<Real>>> pointers;
  for (const auto& of_layer : packed_.weights().groups) {
    pointers.emplace_back();
    for (const kernels::GroupWeights<Real>& group : of_layer) {
      pointers.back().push_back(translated(group, by_host));
    }
  }
  groups_.assign(pointers.size(), nullptr);
  Upload upload;
  for (size_t l = 0; l < pointers.size(); ++l) upload.add(pointers[l], &groups_[l]);
  pointer_memory_.reset();
  pointer_memory_ = upload.send(target_);
}

template <class Format, class Target>
void DeviceWeights<Format, Target>::set_fitting_widths() {
  const ReadoutSource& readout = model_.readout;
  constants_.out_width = readout.out_matrix.numel();
  constants_.out_bias = readout.out_bias;
  for (const FittingLayerSource& source : readout.layers) {
    FittingLayer<Real> layer;
    layer.in = static_cast<int>(source.matrix.size(0));
    layer.out = static_cast<int>(source.matrix.size(1));
    layer.in_padded = static_cast<int>(kernels::padded<Real>(layer.in));
    layer.out_padded = static_cast<int>(kernels::padded<Real>(layer.out));
    layer.residual = static_cast<int>(source.residual);
    layer.activation = ActivationFunction<Real>(*kernel_activation(source.phi));
    constants_.fitting.push_back(layer);
  }
}

/// `matrix` float64, or its transpose, padded with zeros, as the products read it.
template <class Format, class Target>
void DeviceWeights<Format, Target>::add_padded(Upload& upload, const Array& matrix, bool transposed,
                                               int64_t rows, int64_t columns, const Real** place) const {
  const auto write = [matrix, transposed, rows, columns](Real* to) {
    std::vector<Real> padded(static_cast<size_t>(rows * columns), Real(0));
    const double* from = matrix.data<double>();
    for (int64_t i = 0; i < matrix.size(0); ++i) {
      for (int64_t k = 0; k < matrix.size(1); ++k) {
        const int64_t at = transposed ? k * columns + i : i * columns + k;
        padded[static_cast<size_t>(at)] = static_cast<Real>(*from++);
      }
    }
    const std::vector<Real> laid_out = fragments<Format>(padded.data(), rows, columns);
    std::copy(laid_out.begin(), laid_out.end(), to);
  };
  upload.add(static_cast<size_t>(fragments_size<Format>(rows, columns)), write, place);
}

/// `row` float64, padded with zeros.
template <class Format, class Target>
void DeviceWeights<Format, Target>::add_row(Upload& upload, const Array& row, int64_t columns,
                                            const Real** place) const {
  const auto write = [row, columns](Real* to) {
    std::fill_n(to, columns, Real(0));
    const double* from = row.data<double>();
    for (int64_t k = 0; k < row.numel(); ++k) to[k] = static_cast<Real>(from[k]);
  };
  upload.add(static_cast<size_t>(columns), write, place);
}

/// The fitting net's layers, whose widths are set, and its last map.
template <class Format, class Target>
void DeviceWeights<Format, Target>::add_fitting(Upload& upload) {
  const ReadoutSource& readout = model_.readout;
  for (size_t l = 0; l < constants_.fitting.size(); ++l) {
    const FittingLayerSource& source = readout.layers[l];
    FittingLayer<Real>& layer = constants_.fitting[l];
    add_padded(upload, source.matrix, false, layer.in_padded, layer.out_padded, &layer.matrix);
    add_padded(upload, source.matrix, true, layer.out_padded, layer.in_padded, &layer.matrix_transposed);
    add_row(upload, source.bias, layer.out_padded, &layer.bias);
    const std::vector<double> ones(static_cast<size_t>(layer.out), 1.0);
    const Array timestep = source.idt.defined() ? source.idt : Array::of(ones);
    add_row(upload, timestep, layer.out_padded, &layer.timestep);
  }
  const int64_t out_padded = kernels::padded<Real>(constants_.out_width);
  add_row(upload, readout.out_matrix, out_padded, &constants_.out_matrix);
}

template <class Format, class Target>
void DeviceWeights<Format, Target>::upload_constants(const TypeTables& tables) {
  ++version_;
  const typename Target::Scope scope(target_);
  const ModelWeights<Real>& weights = packed_.weights();
  const kernels::LayerShape& shape = weights.shapes[0];
  Upload upload;
  upload.add(weights.node_table, &constants_.node_table);
  upload.add(weights.edge_matrix, &constants_.edge_matrix);
  upload.add(weights.edge_bias, &constants_.edge_bias);
  std::vector<Real> angle_direction(static_cast<size_t>(shape.a_padded), Real(0));
  std::copy(weights.angle_direction.begin(), weights.angle_direction.end(), angle_direction.begin());
  upload.add(angle_direction, &constants_.angle_direction);
  upload.add(tables.mean, &constants_.geometry.mean);
  upload.add(tables.stddev, &constants_.geometry.stddev);
  upload.add(tables.energy_shift, &constants_.shift);
  upload.add(tables.energy_weight, &constants_.energy_weight);
  add_fitting(upload);
  constants_.n_constant = tables.fitting.defined() ? tables.fitting.size(1) : 0;
  if (constants_.n_constant > 0) {
    add_row(upload, tables.fitting, tables.fitting.numel(), &constants_.fitting_constant);
  }
  constant_memory_.reset();
  constant_memory_ = upload.send(target_);
  constants_.geometry.edge = edge_rules(model_.geometry, shape.edge_norm);
  constants_.geometry.with_angles = shape.with_angles;
}

}  // namespace moecalc::cuda
