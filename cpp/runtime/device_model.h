// The device model for one number format and one target (the device, or the host that emulates it). Included
// by the two translation units that compile it: device_model.cpp and device_cuda.cu.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <utility>

#include "../ops/cuda/layer.cuh"
#include "../ops/cuda/readout.cuh"
#include "device.h"
#include "packed_weights.h"
#include "readout.h"

namespace moecalc::cuda {

/// Host arrays that go to the device in one copy.
class Upload {
 public:
  /// Appends values; returns where they start, in bytes.
  template <class V>
  int64_t add(const std::vector<V>& values) {
    const auto place = static_cast<int64_t>((data_.size() + 63) / 64 * 64);
    data_.resize(static_cast<size_t>(place) + values.size() * sizeof(V));
    if (!values.empty()) std::memcpy(data_.data() + place, values.data(), values.size() * sizeof(V));
    return place;
  }
  const std::vector<char>& data() const { return data_; }

 private:
  std::vector<char> data_;
};

template <class N, class Target>
class Model final : public DeviceModel {
 public:
  using T = typename N::type;

  Model(const torch::jit::Module& geometry, const torch::jit::Module& embedding,
        const std::vector<torch::jit::Module>& layers, const torch::jit::Module& readout,
        const GraphRules& rules, const DeviceOptions& options, const DeferredTensors* deferred)
      : target_(options),
        options_(options),
        rules_(rules),
        embedding_(embedding),
        packed_(geometry, embedding, layers, ops::kernels<T>(), deferred),
        readout_(read_readout(readout, rules.n_types, kType)) {
    check_shared_memory();
    packed_.memory_left_ = [this] { return target_.free_bytes() / 4; };
    if (!rules_.group_by_system) {
      set_features(at::eye(rules_.n_types, at::TensorOptions().dtype(at::kDouble)), {});
    }
    const typename Target::Scope scope(target_);
    upload_constants();
  }

  void set_conditions(const TypeTables& tables, const GraphRules& rules, const at::Tensor& features,
                      const at::Tensor& shift) override;
  void set_list(const NeighborList& list) override;
  Evaluation evaluate(const at::Tensor& positions, const at::Tensor& cells, const Request& request,
                      GhostExchange* exchange) override;
  int64_t bytes() const override;
  int64_t n_packed_groups() const override { return packed_.n_packed_groups(); }
  int64_t weight_bytes() const override {
    int64_t total = 0;
    for (const auto& [id, memory] : weight_blocks_) total += memory.numel();
    return total;
  }
  void release_weights() override;
  int64_t estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const override;
  std::string name() const override { return target_.name() + " " + N::name; }

 private:
  static constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

  /// Extent of everything that is allocated.
  struct Sizes {
    int64_t n_local = 0, n_node = 0, n_list = 0, n_slot = 0, n_systems = 1, edges = 0, close = 0, angles = 0;
  };
  struct Buffers {
    std::vector<at::Tensor> v, e, a, m, big_h, x, slope;
    at::Tensor n_close, first_edge, first_close, first_angle, problem, edge_list, edge_centre, edge_of_list,
        counts;
    at::Tensor vec, r, ds, angle_switch, unit, sw, h, input, cos, asw;
    at::Tensor zc, zn, zca, pq, message, sym;
    at::Tensor de[2], da, dcos, dasw, dsw, dh, dm, dpq, dz, dz_node, dzc, dzca, dbig_h, dsym, dmessage;
    at::Tensor dzn, dv_slot, dv_own, dv, dx[2], gradient, centre;
    at::Tensor results;
  };

  // --- weights ---
  void check_shared_memory() const;
  void set_features(const at::Tensor& composition, const std::vector<int64_t>& used);
  void upload_weights();
  at::Tensor upload_block(const WeightBlock<T>& block) const;
  void upload_constants();
  at::Tensor to_device(const Upload& upload) const;

  // --- memory ---
  template <class F>
  void plan(Buffers& b, const Sizes& s, const F& f) const;
  static int64_t result_count(const Sizes& s) {
    return kCounts + s.n_systems + s.n_local + 3 * s.n_node + 9 * s.n_systems + 9 * s.n_node;
  }
  int64_t planned_bytes(const Sizes& sizes) const;
  int64_t fixed_bytes() const;
  void allocate(const Sizes& sizes);
  template <class V>
  static V* at_(const at::Tensor& bytes) {
    return bytes.defined() && bytes.numel() > 0 ? reinterpret_cast<V*>(bytes.mutable_data_ptr()) : nullptr;
  }

  // --- a step ---
  void upload_positions(const at::Tensor& positions, const at::Tensor& cells);
  void count();
  void grow(const int64_t* counts);
  std::vector<int64_t> read_counts();
  [[noreturn]] void report_problem(int64_t item) const;
  void view();
  Layer<T> layer(size_t l);
  void run(const Request& request, GhostExchange* exchange);
  void forward(size_t l);
  void backward(size_t l, bool gradients_to_nodes);
  void project(const Layer<T>& x);
  void exchange_forward(size_t l, GhostExchange* exchange);
  void exchange_reverse(GhostExchange* exchange);
  Evaluation collect(const Request& request);
  Evaluation without_atoms(const Request& request, GhostExchange* exchange);
  at::Tensor composition(GhostExchange* exchange);
  Linear<N> linear(const Layer<T>& x, Weight<T> w, Weight<T> b, const T* a, int64_t lda, int64_t k, T* out,
                   int64_t columns, bool add) const;

  Target target_;
  DeviceOptions options_;
  GraphRules rules_;
  torch::jit::Module embedding_;
  PackedWeights<T> packed_;
  ReadoutSource readout_;
  at::Tensor shift_of_condition_;  // (K, n_dim), if routers read it at configuration level
  at::Tensor composition_;         // for which the weights are routed, on the CPU
  at::Tensor features_;            // of it
  std::vector<int64_t> used_;      // groups of the list that have atoms
  bool weights_are_up_ = false;

  // On the device: blocks of weights, pointers to them per layer and group, constants.
  std::map<uint64_t, at::Tensor> weight_blocks_;  // by id
  at::Tensor update_memory_, group_memory_, constant_memory_;
  std::vector<const ops::GroupWeights<T>*> weights_;
  std::vector<ops::UpdateVectors<T>> updates_;
  const T *node_table_ = nullptr, *edge_matrix_ = nullptr, *edge_bias_ = nullptr, *angle_row_ = nullptr;
  const T *out_matrix_ = nullptr, *fitting_constant_ = nullptr;
  const double *mean_ = nullptr, *stddev_ = nullptr, *shift_ = nullptr, *energy_weight_ = nullptr;
  std::vector<FittingLayer<T>> fitting_;

  // Of the list.
  bool listed_ = false;
  NeighborList list_;
  std::vector<int> item_of_;  // engine's edge of every list edge
  at::Tensor engine_rows_;    // (n_local,) int64
  at::Tensor counts_of_types_;
  at::Tensor list_memory_;
  Graph g_;
  struct Runs {
    const Run* runs = nullptr;
    int64_t n = 0;
  } edge_runs_, angle_runs_, row_runs_, slot_runs_;

  // Of a step.
  Sizes sizes_;
  Buffers b_;
  at::Tensor staged_positions_, staged_cells_, device_positions_, device_cells_, staged_results_;
  Positions positions_;
  Rules geometry_;
  EdgeGeometry<T> edges_;
  size_t de_current_ = 0;
  const T* dv_out_ = nullptr;
};

// --- weights
// -----------------------------------------------------------------------------------------------------

/// Package widths decide how much shared memory the kernels want; a device has only so much.
template <class N, class Target>
void Model<N, Target>::check_shared_memory() const {
  int64_t most = 0;
  for (const LayerSource& source : packed_.layers_) {
    Layer<T> x;
    x.ep = static_cast<int>(source.shape.ep), x.ap = static_cast<int>(source.shape.ap);
    x.np = static_cast<int>(source.shape.np), x.sym_width = static_cast<int>(source.shape.sym_width());
    most = std::max({most, EdgeBackward<N>{x}.shared_bytes(), AngleBackward<N>{x}.shared_bytes(),
                     InvariantsBackward<T>{x}.shared_bytes()});
  }
  if (most > target_.shared_limit()) {
    throw Unsupported{"features this wide (the kernels need " + std::to_string(most) +
                      " bytes of shared memory, the device has " + std::to_string(target_.shared_limit()) +
                      ")"};
  }
}

/// Routes the groups of the compositions (G, n_types), and has the weights of the groups `used` on the
/// device.
template <class N, class Target>
void Model<N, Target>::set_features(const at::Tensor& composition, const std::vector<int64_t>& used) {
  if (!composition_.defined() || composition_.sizes() != composition.sizes() ||
      !at::equal(composition_, composition)) {
    const at::NoGradGuard no_grad;
    std::vector<torch::jit::IValue> arguments{composition.to(target_.device(), kType)};
    if (shift_of_condition_.defined()) {
      const at::Tensor of_system =
          at::tensor(rules_.condition_of_system, at::TensorOptions().dtype(at::kLong));
      const at::Tensor rows = shift_of_condition_.index_select(0, of_system);
      arguments.emplace_back(rows.expand({composition.size(0), -1}).to(target_.device(), kType));
    }
    features_ = embedding_.get_method("group_features")(arguments).toTensor();
    composition_ = composition;
  }
  const at::NoGradGuard no_grad;
  const bool were_up = std::exchange(weights_are_up_, false);  // also if one of these throws
  if (packed_.set_groups(features_, used) || !were_up) upload_weights();
  weights_are_up_ = true;
}

template <class N, class Target>
void Model<N, Target>::set_conditions(const TypeTables& tables, const GraphRules& rules,
                                      const at::Tensor& features, const at::Tensor& shift) {
  const typename Target::Scope scope(target_);
  rules_ = rules;
  listed_ = false;
  packed_.set_types(tables);
  readout_.set_types(tables);
  upload_constants();
  if (rules_.group_by_system) {
    shift_of_condition_ = shift;
    composition_ = at::Tensor();
  } else {
    features_ = features;
  }
}

/// The list is lost as well: it may be of atoms whose weights are gone.
template <class N, class Target>
void Model<N, Target>::release_weights() {
  packed_.release_groups();
  upload_weights();
  listed_ = false;
}

template <class N, class Target>
at::Tensor Model<N, Target>::to_device(const Upload& upload) const {
  const auto n = static_cast<int64_t>(upload.data().size());
  const at::Tensor host = at::empty({n}, target_.pinned_options().dtype(at::kByte));
  if (n > 0) std::memcpy(host.mutable_data_ptr(), upload.data().data(), upload.data().size());
  // waits: the staging memory is released at once
  return host.to(target_.device(), /*non_blocking=*/false, /*copy=*/true);
}

/// A block as the products read it. The host's copy of it is given back.
template <class N, class Target>
at::Tensor Model<N, Target>::upload_block(const WeightBlock<T>& block) const {
  Upload values;
  for (size_t x = 0; x < block.parts.size(); ++x) {
    const auto& part = block.parts[x];
    const T* data = block.part(x);
    values.add(part.matrix ? fragments<N>(data, part.rows, part.columns)
                           : std::vector<T>(data, data + part.rows * part.columns));
  }
  return to_device(values);
}

/// Uploads what the device does not hold of the packed weights, and drops what is no longer packed.
template <class N, class Target>
void Model<N, Target>::upload_weights() {
  const typename Target::Scope scope(target_);
  std::set<uint64_t> packed;
  for (const auto& group : packed_.groups_) {
    for (const auto& block : group.blocks) packed.insert(block->id);
  }
  std::erase_if(weight_blocks_, [&](const auto& held) { return packed.count(held.first) == 0; });
  for (const auto& group : packed_.groups_) {
    for (const auto& block : group.blocks) {
      if (weight_blocks_.count(block->id) > 0) continue;
      weight_blocks_.emplace(block->id, upload_block(*block));
      block->memory.discard();
    }
  }

  // where every part of every block went: host pointer, device pointer
  std::vector<std::pair<const T*, const T*>> places;
  const auto translate = [&](const T* host) -> const T* {
    if (host == nullptr) return nullptr;
    return std::lower_bound(places.begin(), places.end(), std::pair<const T*, const T*>(host, nullptr))
        ->second;
  };
  // both structs are nothing but pointers to packed values
  const auto translated = [&](auto pointers) {
    static_assert(sizeof(pointers) % sizeof(const T*) == 0);
    auto* p = reinterpret_cast<const T**>(&pointers);
    for (size_t x = 0; x < sizeof(pointers) / sizeof(const T*); ++x) p[x] = translate(p[x]);
    return pointers;
  };
  if (updates_.empty()) {
    Upload values;
    std::vector<std::pair<const T*, int64_t>> offsets;
    for (const at::Tensor& tensor : packed_.memory_) {
      const T* data = tensor.template const_data_ptr<T>();
      offsets.emplace_back(data, values.add(std::vector<T>(data, data + tensor.numel())));
    }
    update_memory_ = to_device(values);
    for (const auto& [host, offset] : offsets) {
      places.emplace_back(host, reinterpret_cast<const T*>(at_<char>(update_memory_) + offset));
    }
    std::sort(places.begin(), places.end());
    for (const ops::UpdateVectors<T>& update : packed_.updates_) updates_.push_back(translated(update));
  }
  places.clear();
  std::set<uint64_t> placed;
  for (const auto& group : packed_.groups_) {
    for (const auto& block : group.blocks) {
      if (!placed.insert(block->id).second) continue;
      const T* base = at_<T>(weight_blocks_.at(block->id));
      for (size_t x = 0; x < block->parts.size(); ++x)
        places.emplace_back(block->part(x), base + block->parts[x].first);
    }
  }
  std::sort(places.begin(), places.end());
  Upload groups;
  std::vector<int64_t> offsets;
  for (const auto& of_layer : packed_.weights_) {
    std::vector<ops::GroupWeights<T>> device;
    for (const ops::GroupWeights<T>& group : of_layer) device.push_back(translated(group));
    offsets.push_back(groups.add(device));
  }
  group_memory_ = to_device(groups);
  weights_.clear();
  for (const int64_t offset : offsets) {
    weights_.push_back(reinterpret_cast<const ops::GroupWeights<T>*>(at_<char>(group_memory_) + offset));
  }
}

template <class N, class Target>
void Model<N, Target>::upload_constants() {
  const ops::LayerShape& s = packed_.layers_[0].shape;
  fitting_.clear();
  Upload upload;
  const auto padded = [&](const at::Tensor& values, int64_t rows, int64_t columns,
                          bool matrix_product = false) {
    at::Tensor out = at::zeros({rows, columns}, at::TensorOptions().dtype(kType));
    const at::Tensor matrix = values.reshape({values.dim() > 1 ? values.size(0) : 1, -1});
    out.narrow(0, 0, matrix.size(0)).narrow(1, 0, matrix.size(1)).copy_(matrix);
    const T* data = out.template const_data_ptr<T>();
    return upload.add(matrix_product ? fragments<N>(data, rows, columns)
                                     : std::vector<T>(data, data + out.numel()));
  };
  const auto doubles = [&](const at::Tensor& values) {
    const at::Tensor flat = values.to(at::kDouble).contiguous();
    return upload.add(
        std::vector<double>(flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()));
  };
  const int64_t table = upload.add(packed_.node_table_), matrix = upload.add(packed_.edge_matrix_),
                bias = upload.add(packed_.edge_bias_);
  std::vector<T> row(static_cast<size_t>(s.ap), T(0));
  std::copy(packed_.angle_direction_.begin(), packed_.angle_direction_.end(), row.begin());
  const int64_t angle = upload.add(row), mean = upload.add(packed_.rules_.mean),
                stddev = upload.add(packed_.rules_.stddev);
  const int64_t shift = doubles(readout_.shift), weight = doubles(readout_.weight);
  struct Place {
    int64_t w, w_t, b, idt;
  };
  std::vector<Place> places;
  for (const ReadoutSource::Layer& source : readout_.layers) {
    FittingLayer<T> layer;
    layer.n_in = static_cast<int>(source.matrix.size(0)),
    layer.n_out = static_cast<int>(source.matrix.size(1));
    layer.in = static_cast<int>(ops::padded<T>(layer.n_in)),
    layer.out = static_cast<int>(ops::padded<T>(layer.n_out));
    layer.residual = static_cast<int>(source.residual);
    layer.phi = Phi<T>(source.phi);
    places.push_back({padded(source.matrix, layer.in, layer.out, true),
                      padded(source.matrix.t(), layer.out, layer.in, true), padded(source.bias, 1, layer.out),
                      padded(source.idt, 1, layer.out)});
    fitting_.push_back(layer);
  }
  const int64_t out = padded(readout_.out_matrix, 1, ops::padded<T>(readout_.out_matrix.numel()));
  const int64_t constant = padded(readout_.constant, readout_.constant.size(0), readout_.constant.size(1));
  constant_memory_ = to_device(upload);
  char* base = at_<char>(constant_memory_);
  const auto values = [&](int64_t place) { return reinterpret_cast<const T*>(base + place); };
  const auto numbers = [&](int64_t place) { return reinterpret_cast<const double*>(base + place); };
  node_table_ = values(table), edge_matrix_ = values(matrix), edge_bias_ = values(bias),
  angle_row_ = values(angle);
  mean_ = numbers(mean), stddev_ = numbers(stddev), shift_ = numbers(shift), energy_weight_ = numbers(weight);
  out_matrix_ = values(out), fitting_constant_ = values(constant);
  for (size_t l = 0; l < places.size(); ++l) {
    fitting_[l].w = values(places[l].w), fitting_[l].w_t = values(places[l].w_t);
    fitting_[l].b = values(places[l].b), fitting_[l].idt = values(places[l].idt);
  }
  geometry_.edge = packed_.rules_.edge, geometry_.angle = packed_.rules_.angle;
  geometry_.use_dist = packed_.rules_.use_dist, geometry_.protection = packed_.rules_.protection;
  geometry_.with_angles = s.with_angles;
  geometry_.norm = 1.0 / std::sqrt(s.edge_norm);
  geometry_.mean = mean_, geometry_.stddev = stddev_;
}

// --- the list
// ----------------------------------------------------------------------------------------------------

template <class N, class Target>
void Model<N, Target>::set_list(const NeighborList& list) {
  const typename Target::Scope scope(target_);
  const at::Tensor types = list.types.contiguous(), index = list.edge_index.contiguous(),
                   from_rows = list.edge_from.contiguous(), to_rows = list.edge_to.contiguous(),
                   systems = list.system_index.contiguous();
  const int64_t n_node = types.size(0), n_local = systems.size(0), n_edge = index.size(1);
  const int64_t n_types = rules_.n_types;
  constexpr int64_t limit = std::numeric_limits<int>::max();
  if (n_node > limit || n_edge > limit) {
    throw Error("expected at most " + std::to_string(limit) +
                " atoms and listed neighbours per process, got " + std::to_string(n_node) + " and " +
                std::to_string(n_edge) + ": use more processes");
  }
  const auto *type = types.const_data_ptr<int64_t>(), *system = systems.const_data_ptr<int64_t>(),
             *centre = index.const_data_ptr<int64_t>(), *from = from_rows.const_data_ptr<int64_t>(),
             *to = to_rows.const_data_ptr<int64_t>();
  const int64_t* neighbor = centre + n_edge;
  listed_ = false;
  list_ = list;

  // nodes: stable sort of the local atoms by routing group; ghosts have the one condition that there is then
  std::vector<int64_t> full_type(type, type + n_node);
  for (int64_t i = 0; i < n_node; ++i) {
    full_type[static_cast<size_t>(i)] += n_types * rules_.condition(i < n_local ? system[i] : 0);
  }
  const int64_t n_group = rules_.n_groups(list.n_systems);
  const int64_t* group = rules_.group_by_system      ? system
                         : rules_.group_by_condition ? full_type.data()
                                                     : type;
  std::vector<int> splits(static_cast<size_t>(n_group) + 1, 0), model_row(static_cast<size_t>(n_node)),
      engine_row(static_cast<size_t>(n_node)), new_type(static_cast<size_t>(n_node)),
      new_system(static_cast<size_t>(n_local)), new_group(static_cast<size_t>(n_local));
  for (int64_t i = 0; i < n_local; ++i) ++splits[static_cast<size_t>(group[i]) + 1];
  for (size_t x = 0; x + 1 < splits.size(); ++x) splits[x + 1] += splits[x];
  {
    std::vector<int> next(splits.begin(), splits.end() - 1);
    for (int64_t i = 0; i < n_node; ++i) {
      const int64_t row = i < n_local ? next[static_cast<size_t>(group[i])]++ : i;
      model_row[static_cast<size_t>(i)] = static_cast<int>(row);
      engine_row[static_cast<size_t>(row)] = static_cast<int>(i);
      new_type[static_cast<size_t>(row)] = static_cast<int>(full_type[static_cast<size_t>(i)]);
      if (i >= n_local) continue;
      new_system[static_cast<size_t>(row)] = static_cast<int>(system[i]);
      new_group[static_cast<size_t>(row)] = static_cast<int>(group[i]);
    }
  }
  std::vector<int> system_first(static_cast<size_t>(list.n_systems) + 1, 0),
      system_row(static_cast<size_t>(n_local));
  for (int64_t i = 0; i < n_local; ++i) ++system_first[static_cast<size_t>(system[i]) + 1];
  for (size_t x = 0; x + 1 < system_first.size(); ++x) system_first[x + 1] += system_first[x];
  {
    std::vector<int> next(system_first.begin(), system_first.end() - 1);
    for (int64_t i = 0; i < n_local; ++i) {
      system_row[static_cast<size_t>(next[static_cast<size_t>(system[i])]++)] =
          model_row[static_cast<size_t>(i)];
    }
  }

  // list edges: without excluded pairs, stable sort by centre
  std::vector<int> first(static_cast<size_t>(n_local) + 1, 0);
  const auto listed = [&](int64_t e) {
    return rules_.pair_mask[static_cast<size_t>(type[centre[e]] * n_types + type[neighbor[e]])] != 0;
  };
  for (int64_t e = 0; e < n_edge; ++e) {
    if (listed(e)) ++first[static_cast<size_t>(model_row[static_cast<size_t>(centre[e])]) + 1];
  }
  for (size_t x = 0; x + 1 < first.size(); ++x) first[x + 1] += first[x];
  const auto n_list = static_cast<size_t>(first.back());
  std::vector<int> list_from(n_list), list_to(n_list), list_centre(n_list), list_neighbor(n_list),
      list_slot(n_list);
  item_of_.assign(n_list, 0);
  {
    std::vector<int> next(first.begin(), first.end() - 1);
    for (int64_t e = 0; e < n_edge; ++e) {
      if (!listed(e)) continue;
      const int row = model_row[static_cast<size_t>(centre[e])];
      const auto place = static_cast<size_t>(next[static_cast<size_t>(row)]++);
      list_from[place] = static_cast<int>(from[e]), list_to[place] = static_cast<int>(to[e]);
      list_centre[place] = row;
      list_neighbor[place] = model_row[static_cast<size_t>(neighbor[e])];
      item_of_[place] = static_cast<int>(e);
    }
  }

  // slots: (group of the centre, neighbour) pairs, group by group; their list edges; the slots of every node
  std::vector<int> slot_node, slot_splits(1, 0), of_node(static_cast<size_t>(n_node), -1);
  for (int64_t x = 0; x < n_group; ++x) {
    const int begin = slot_splits.back();
    const int last = first[static_cast<size_t>(splits[static_cast<size_t>(x) + 1])];
    for (int e = first[static_cast<size_t>(splits[static_cast<size_t>(x)])]; e < last; ++e) {
      int& place = of_node[static_cast<size_t>(list_neighbor[static_cast<size_t>(e)])];
      if (place < begin) {
        place = static_cast<int>(slot_node.size());
        slot_node.push_back(list_neighbor[static_cast<size_t>(e)]);
      }
      list_slot[static_cast<size_t>(e)] = place;
    }
    slot_splits.push_back(static_cast<int>(slot_node.size()));
  }
  const size_t n_slot = slot_node.size();
  // stable counting sort of keys: offsets, and positions of each key in order
  const auto transpose = [](const std::vector<int>& keys, size_t n_key, std::vector<int>& offsets,
                            std::vector<int>& items) {
    offsets.assign(n_key + 1, 0);
    for (const int key : keys) ++offsets[static_cast<size_t>(key) + 1];
    for (size_t x = 0; x < n_key; ++x) offsets[x + 1] += offsets[x];
    std::vector<int> next(offsets.begin(), offsets.end() - 1);
    items.resize(keys.size());
    for (size_t x = 0; x < keys.size(); ++x)
      items[static_cast<size_t>(next[static_cast<size_t>(keys[x])]++)] = static_cast<int>(x);
  };
  std::vector<int> slot_first, slot_list, node_first, node_slot;
  transpose(list_slot, n_slot, slot_first, slot_list);
  transpose(slot_node, static_cast<size_t>(n_node), node_first, node_slot);

  // runs of a group: as many centres as fill a few tiles, while there are enough blocks for the device
  const auto runs_of = [](const std::vector<int>& offsets, int64_t length) {
    std::vector<Run> runs;
    for (size_t x = 0; x + 1 < offsets.size(); ++x) {
      for (int64_t begin = offsets[x]; begin < offsets[x + 1]; begin += length) {
        runs.push_back({static_cast<int>(x), static_cast<int>(begin),
                        static_cast<int>(std::min<int64_t>(begin + length, offsets[x + 1]))});
      }
    }
    return runs;
  };
  const int64_t shared_out = std::max<int64_t>(1, n_local / target_.wanted_blocks());
  const int64_t edges_of_centre =
      n_local == 0 ? 1 : std::max<int64_t>(1, static_cast<int64_t>(n_list) / n_local);
  const int64_t angles_of_centre = std::max<int64_t>(1, edges_of_centre * edges_of_centre / 12);
  const std::vector<Run> edge_runs = runs_of(
      splits, std::clamp<int64_t>(8 * N::kRows / edges_of_centre, 1, std::min<int64_t>(8, shared_out)));
  const std::vector<Run> angle_runs = runs_of(
      splits, std::clamp<int64_t>(12 * N::kRows / angles_of_centre, 1, std::min<int64_t>(8, shared_out)));
  const std::vector<Run> row_runs = runs_of(splits, N::kRows), slot_runs = runs_of(slot_splits, N::kRows);

  Upload upload;
  const int64_t places[] = {
      upload.add(first),         upload.add(list_from),  upload.add(list_to),      upload.add(list_centre),
      upload.add(list_neighbor), upload.add(list_slot),  upload.add(slot_node),    upload.add(slot_first),
      upload.add(slot_list),     upload.add(node_first), upload.add(node_slot),    upload.add(new_type),
      upload.add(engine_row),    upload.add(new_system), upload.add(system_first), upload.add(system_row)};
  const int64_t run_places[] = {upload.add(edge_runs), upload.add(angle_runs), upload.add(row_runs),
                                upload.add(slot_runs)};
  int64_t shift_place = -1;
  if (list.edge_shift.defined()) {
    const at::Tensor shifts = list.edge_shift.contiguous();
    const auto* s = shifts.const_data_ptr<int64_t>();
    std::vector<double> shift(3 * n_list);
    for (size_t x = 0; x < n_list; ++x) {
      for (size_t c = 0; c < 3; ++c)
        shift[3 * x + c] = static_cast<double>(s[3 * static_cast<size_t>(item_of_[x]) + c]);
    }
    shift_place = upload.add(shift);
  }
  list_memory_ = to_device(upload);
  const char* base = at_<char>(list_memory_);
  const auto ints = [&](int64_t place) { return reinterpret_cast<const int*>(base + place); };
  g_ = Graph();
  g_.n_node = static_cast<int>(n_node), g_.n_local = static_cast<int>(n_local),
  g_.n_list = static_cast<int>(n_list), g_.n_slot = static_cast<int>(n_slot),
  g_.n_systems = static_cast<int>(list.n_systems);
  g_.list_first = ints(places[0]), g_.list_from = ints(places[1]), g_.list_to = ints(places[2]),
  g_.list_centre = ints(places[3]), g_.list_neighbor = ints(places[4]), g_.list_slot = ints(places[5]);
  g_.slot_node = ints(places[6]), g_.slot_first = ints(places[7]), g_.slot_list = ints(places[8]),
  g_.node_first = ints(places[9]), g_.node_slot = ints(places[10]);
  g_.type = ints(places[11]), g_.engine_row = ints(places[12]), g_.system = ints(places[13]),
  g_.system_first = ints(places[14]), g_.system_row = ints(places[15]);
  g_.list_shift = shift_place < 0 ? nullptr : reinterpret_cast<const double*>(base + shift_place);
  const auto runs_at = [&](int64_t place, const std::vector<Run>& runs) {
    return Runs{reinterpret_cast<const Run*>(base + place), static_cast<int64_t>(runs.size())};
  };
  edge_runs_ = runs_at(run_places[0], edge_runs), angle_runs_ = runs_at(run_places[1], angle_runs);
  row_runs_ = runs_at(run_places[2], row_runs), slot_runs_ = runs_at(run_places[3], slot_runs);

  engine_rows_ = at::empty({n_local}, at::TensorOptions().dtype(at::kLong));
  std::copy_n(engine_row.begin(), n_local, engine_rows_.mutable_data_ptr<int64_t>());
  if (rules_.group_by_system) {
    // weights follow from the composition, which other ranks know of as well: see evaluate
    counts_of_types_ = at::zeros({list.n_systems, n_types}, at::TensorOptions().dtype(at::kDouble));
    auto* number = counts_of_types_.mutable_data_ptr<double>();
    for (int64_t i = 0; i < n_local; ++i) number[system[i] * n_types + type[i]] += 1.0;
  }
  used_ = groups_in_use(splits);
  if (!rules_.group_by_system) set_features(composition_, used_);
  listed_ = true;
}

// --- memory
// ------------------------------------------------------------------------------------------------------

/// f(buffer, bytes) for everything that a system of these sizes needs besides the weights and the list.
template <class N, class Target>
template <class F>
void Model<N, Target>::plan(Buffers& b, const Sizes& s, const F& f) const {
  const auto values = [&](at::Tensor& to, int64_t n) { f(to, n * static_cast<int64_t>(sizeof(T))); };
  const auto doubles = [&](at::Tensor& to, int64_t n) { f(to, n * 8); };
  const auto ints = [&](at::Tensor& to, int64_t n) { f(to, n * 4); };
  const size_t n_layer = packed_.layers_.size();
  const ops::LayerShape& s0 = packed_.layers_[0].shape;
  b.v.resize(n_layer + 1), b.e.resize(n_layer + 1), b.a.resize(n_layer + 1), b.m.resize(n_layer),
      b.big_h.resize(n_layer), b.x.resize(fitting_.size() + 1), b.slope.resize(fitting_.size());
  for (at::Tensor* offsets : {&b.n_close, &b.first_edge, &b.first_close, &b.first_angle, &b.problem}) {
    ints(*offsets, s.n_local + 1);
  }
  ints(b.edge_list, s.edges), ints(b.edge_centre, s.edges), ints(b.edge_of_list, s.n_list);
  doubles(b.counts, kCounts);
  doubles(b.vec, 3 * s.edges), doubles(b.r, s.edges), doubles(b.ds, s.edges);
  doubles(b.angle_switch, 2 * s.edges), doubles(b.unit, 3 * s.edges);
  values(b.sw, s.edges), values(b.h, 4 * s.edges), values(b.input, s.edges);
  values(b.cos, s.angles), values(b.asw, s.angles), values(b.dcos, s.angles), values(b.dasw, s.angles);
  doubles(b.dsw, s.edges), doubles(b.dh, 4 * s.edges);
  int64_t ce = 0, ca = 0, nodes = 0, width = 0, sym = 0, sym_in = 0;
  values(b.v[0], s.n_node * s0.np), values(b.e[0], s.edges * s0.ep);
  bool da = false;
  for (size_t l = 0; l < n_layer; ++l) {
    const ops::LayerShape& shape = packed_.layers_[l].shape;
    ce = std::max(ce, shape.edge_columns());
    if (shape.with_angles) ca = std::max(ca, shape.angle_columns());
    nodes = std::max(nodes, (shape.k_node + shape.k_sym) * shape.np);
    width = std::max(width, shape.heads * shape.np);
    sym = std::max(sym, shape.sym_width()), sym_in = std::max(sym_in, shape.sym_in());
    values(b.v[l + 1], s.n_node * shape.np);
    if (shape.live_edge) values(b.e[l + 1], s.edges * shape.ep);
    if (shape.live_angle) values(b.a[l + 1], s.angles * shape.ap);
    if (shape.with_angles) values(b.m[l], (shape.keep_far ? s.edges : s.close) * shape.ep);
    values(b.big_h[l], s.n_local * 3 * shape.sym_width());
    da = da || (shape.with_angles && l > 0) || shape.live_angle;
  }
  const bool keep_far = s0.keep_far && s0.with_angles;
  values(b.zc, s.n_local * ce), values(b.zn, s.n_slot * ce), values(b.zca, s.n_local * ca);
  values(b.pq, 2 * s.close * ca), values(b.message, s.n_local * width), values(b.sym, s.n_local * sym_in);
  values(b.de[0], s.edges * s0.ep), values(b.de[1], s.edges * s0.ep);
  values(b.da, da ? s.angles * s0.ap : 0);
  values(b.dm, s0.with_angles ? (keep_far ? s.edges : s.close) * s0.ep : 0), values(b.dpq, 2 * s.close * ca);
  values(b.dz, s.edges * ce), values(b.dz_node, s.n_local * nodes);
  values(b.dzc, s.n_local * ce), values(b.dzca, s.n_local * ca), values(b.dbig_h, s.n_local * 3 * sym);
  values(b.dsym, s.n_local * sym_in), values(b.dmessage, s.n_local * width);
  values(b.dzn, s.n_slot * ce), values(b.dv_slot, s.n_slot * s0.np), values(b.dv_own, s.n_local * s0.np);
  values(b.dv, s.n_node * s0.np);
  int64_t widest = ops::padded<T>(readout_.out_matrix.numel());
  for (size_t l = 0; l < fitting_.size(); ++l) {
    values(b.x[l], s.n_local * fitting_[l].in), values(b.slope[l], s.n_local * fitting_[l].out);
    widest = std::max<int64_t>({widest, fitting_[l].in, fitting_[l].out});
  }
  values(b.x.back(), s.n_local * ops::padded<T>(readout_.out_matrix.numel()));
  values(b.dx[0], s.n_local * widest), values(b.dx[1], s.n_local * widest);
  doubles(b.gradient, 3 * s.edges), doubles(b.centre, 12 * s.n_local);
  doubles(b.results, result_count(s));
}

template <class N, class Target>
int64_t Model<N, Target>::planned_bytes(const Sizes& sizes) const {
  Buffers unused;
  int64_t total = 0;
  plan(unused, sizes, [&](at::Tensor&, int64_t bytes) { total += (bytes + 511) / 512 * 512; });
  return total;
}

/// Weights and the list.
template <class N, class Target>
int64_t Model<N, Target>::fixed_bytes() const {
  int64_t total = 0;
  for (const at::Tensor* memory : {&update_memory_, &group_memory_, &constant_memory_, &list_memory_}) {
    total += memory->defined() ? memory->numel() : 0;
  }
  return total + weight_bytes();
}

template <class N, class Target>
int64_t Model<N, Target>::bytes() const {
  int64_t total = fixed_bytes();
  plan(const_cast<Buffers&>(b_), sizes_,
       [&](at::Tensor& to, int64_t) { total += to.defined() ? to.numel() : 0; });
  return total;
}

template <class N, class Target>
int64_t Model<N, Target>::estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const {
  Sizes s;
  s.n_local = s.n_node = n_node;
  s.edges = s.n_list = n_edge;
  s.angles = n_angle;
  // of the angles m^2 of a centre, m close edges
  s.close = n_node == 0
                ? 0
                : static_cast<int64_t>(std::sqrt(static_cast<double>(n_angle) / static_cast<double>(n_node)) *
                                       static_cast<double>(n_node));
  const int64_t n_group = rules_.n_groups(/*n_systems=*/1);
  s.n_slot = std::min(n_edge, n_node * n_group);
  return planned_bytes(s);
}

/// Makes every buffer large enough for `sizes`; throws OutOfMemoryError before anything is allocated.
template <class N, class Target>
void Model<N, Target>::allocate(const Sizes& sizes) {
  int64_t more = 0, released = 0;
  plan(b_, sizes, [&](at::Tensor& to, int64_t bytes) {
    const int64_t held = to.defined() ? to.numel() : 0;
    if (held < bytes) more += bytes, released += held;
  });
  if (more > 0) {
    const auto left = [&] {
      return options_.memory_limit > 0 ? options_.memory_limit - bytes() : target_.free_bytes();
    };
    int64_t free = left();
    if (more > free + released && packed_.n_packed_groups() > static_cast<int64_t>(used_.size())) {
      packed_.release_groups(used_);
      upload_weights();
      free = left();
    }
    if (more > free + released) {
      const int64_t need = planned_bytes(sizes), fixed = fixed_bytes();
      const int64_t most = std::max<int64_t>(0, bytes() - fixed + free);
      const double share = static_cast<double>(most) / static_cast<double>(std::max<int64_t>(1, need));
      throw OutOfMemoryError(
          "expected a system that fits on " + target_.name() + ", got " + std::to_string(sizes.n_local) +
          " atoms with " + std::to_string(sizes.edges) + " edges and " + std::to_string(sizes.angles) +
          " angles, which need " + std::to_string(need >> 20) + " MiB of " +
          std::to_string((most + fixed) >> 20) + " MiB for weights (" + std::to_string(fixed >> 20) +
          " MiB) and system: at this density at most about " +
          std::to_string(static_cast<int64_t>(0.97 * share * static_cast<double>(sizes.n_local))) +
          " atoms fit; use fewer atoms per device, more devices or dtype float32");
    }
    // release first: old and new need not fit together
    plan(b_, sizes, [&](at::Tensor& to, int64_t bytes) {
      if (to.defined() && to.numel() < bytes) to.reset();
    });
    plan(b_, sizes, [&](at::Tensor& to, int64_t bytes) {
      if (!to.defined() && bytes > 0) to = at::empty({bytes}, target_.options().dtype(at::kByte));
    });
  }
  sizes_ = sizes;
  view();
}

/// Points the kernels' structs at the buffers.
template <class N, class Target>
void Model<N, Target>::view() {
  g_.n_close = at_<int>(b_.n_close), g_.first_edge = at_<int>(b_.first_edge),
  g_.first_close = at_<int>(b_.first_close), g_.first_angle = at_<int>(b_.first_angle),
  g_.problem = at_<int>(b_.problem);
  g_.edge_list = at_<int>(b_.edge_list), g_.edge_centre = at_<int>(b_.edge_centre),
  g_.edge_of_list = at_<int>(b_.edge_of_list), g_.counts = at_<int64_t>(b_.counts);
  g_.most_edges = sizes_.edges, g_.most_close = sizes_.close, g_.most_angles = sizes_.angles;
  edges_.vec = at_<double>(b_.vec), edges_.r = at_<double>(b_.r), edges_.slope = at_<double>(b_.ds);
  edges_.angle_switch = at_<double>(b_.angle_switch), edges_.unit = at_<double>(b_.unit);
  edges_.sw = at_<T>(b_.sw), edges_.h = at_<T>(b_.h), edges_.input = at_<T>(b_.input);
}

// --- a step
// ------------------------------------------------------------------------------------------------------

template <class N, class Target>
void Model<N, Target>::upload_positions(const at::Tensor& positions, const at::Tensor& cells) {
  const auto send = [&](const at::Tensor& from, at::Tensor& staged, at::Tensor& device) -> const double* {
    if (!from.defined() || from.numel() == 0) return nullptr;
    if (!staged.defined() || staged.numel() < from.numel()) {
      staged = at::empty({from.numel() + from.numel() / 8}, target_.pinned_options().dtype(at::kDouble));
      device = at::empty({staged.numel()}, target_.options().dtype(at::kDouble));
    }
    const at::Tensor values = from.contiguous();
    std::memcpy(staged.mutable_data_ptr(), values.const_data_ptr(), values.nbytes());
    device.narrow(0, 0, values.numel()).copy_(staged.narrow(0, 0, values.numel()), /*non_blocking=*/true);
    return device.const_data_ptr<double>();
  };
  positions_.x = send(positions, staged_positions_, device_positions_);
  positions_.cells = send(cells, staged_cells_, device_cells_);
  positions_.cutoff = rules_.cutoff, positions_.angle_cutoff = rules_.angle_cutoff;
}

template <class N, class Target>
void Model<N, Target>::count() {
  target_.launch(CountEdges{g_, positions_});
  target_.launch(ScanCentres{g_});
}

template <class N, class Target>
std::vector<int64_t> Model<N, Target>::read_counts() {
  std::vector<int64_t> counts(kCounts);
  const at::Tensor host = b_.counts.cpu();  // waits
  std::memcpy(counts.data(), host.const_data_ptr(), kCounts * sizeof(int64_t));
  return counts;
}

/// Capacities with some slack: edges come and go from step to step.
template <class N, class Target>
void Model<N, Target>::grow(const int64_t* counts) {
  const auto slack = [](int64_t held, int64_t n) { return n <= held ? held : n + n * 3 / 20 + 64; };
  Sizes s = sizes_;
  s.edges = std::max(sizes_.edges, std::min<int64_t>(slack(sizes_.edges, counts[kEdges]), s.n_list));
  s.close = std::max(sizes_.close, std::min<int64_t>(slack(sizes_.close, counts[kClose]), s.n_list));
  s.angles = slack(sizes_.angles, counts[kAngles]);
  if (counts[kAngles] > std::numeric_limits<int>::max()) {
    throw Error("expected at most " + std::to_string(std::numeric_limits<int>::max()) +
                " angles per process, got " + std::to_string(counts[kAngles]) + ": use more processes");
  }
  s.angles = std::min<int64_t>(s.angles, std::numeric_limits<int>::max());
  allocate(s);
}

template <class N, class Target>
void Model<N, Target>::report_problem(int64_t item) const {
  const auto e = static_cast<size_t>(item_of_[static_cast<size_t>(item)]);
  const auto at = [&](const at::Tensor& values) { return values.contiguous().const_data_ptr<int64_t>()[e]; };
  const int64_t i = list_.edge_index[0][static_cast<int64_t>(e)].item<int64_t>(),
                j = list_.edge_index[1][static_cast<int64_t>(e)].item<int64_t>();
  const auto* x = staged_positions_.const_data_ptr<double>();
  double vec[3];
  for (int c = 0; c < 3; ++c) vec[c] = x[3 * at(list_.edge_to) + c] - x[3 * at(list_.edge_from) + c];
  if (list_.edge_shift.defined()) {
    const at::Tensor shift = list_.edge_shift[static_cast<int64_t>(e)].to(at::kDouble).contiguous();
    const int64_t system = list_.system_index[i].item<int64_t>();
    const double* cell = staged_cells_.const_data_ptr<double>() + 9 * system;
    for (int c = 0; c < 3; ++c) {
      for (int y = 0; y < 3; ++y) vec[c] += shift.const_data_ptr<double>()[y] * cell[3 * y + c];
    }
  }
  const std::string atoms = " between atoms " + std::to_string(i) + " and " + std::to_string(j) + ": ";
  if (!std::isfinite(vec[0] + vec[1] + vec[2])) {
    throw Error("expected finite `edge_vec`, got (" + std::to_string(vec[0]) + ", " + std::to_string(vec[1]) +
                ", " + std::to_string(vec[2]) + ") Angstrom" + atoms + "check the positions and the cell");
  }
  throw Error("expected distinct positions, got distance 0" + atoms + "remove the duplicate atom");
}

/// Atom fractions of the routing groups, summed over ranks.
template <class N, class Target>
at::Tensor Model<N, Target>::composition(GhostExchange* exchange) {
  at::Tensor number = counts_of_types_.clone();
  if (exchange != nullptr) exchange->sum(number);
  // a structure without atoms has no composition; its rows are never used
  return number / number.sum(1, /*keepdim=*/true).clamp_min(1.0);
}

template <class N, class Target>
Evaluation Model<N, Target>::evaluate(const at::Tensor& positions, const at::Tensor& cells,
                                      const Request& request, GhostExchange* exchange) {
  if (!listed_) throw Error("expected a neighbour list before `evaluate`, got none: call `set_list` first");
  if (g_.list_shift != nullptr && !cells.defined()) {
    throw Error("expected `cells` for a neighbour list with shifts, got none: pass (n_systems, 3, 3)");
  }
  if (exchange == nullptr && g_.n_node > g_.n_local && packed_.layers_.size() > 1) {
    throw Error("expected a GhostExchange for " + std::to_string(g_.n_node - g_.n_local) +
                " ghost atoms and a model of " + std::to_string(packed_.layers_.size()) +
                " layers, got none: map periodic images to owned atoms or pass one");
  }
  const auto start = std::chrono::steady_clock::now();
  if (rules_.group_by_system) set_features(composition(exchange), used_);
  if (g_.n_local == 0) return without_atoms(request, exchange);
  const typename Target::Scope scope(target_);
  const at::NoGradGuard no_grad;
  upload_positions(positions, cells);
  Sizes s = sizes_;
  s.n_local = g_.n_local, s.n_node = g_.n_node, s.n_list = g_.n_list, s.n_slot = g_.n_slot,
  s.n_systems = g_.n_systems;
  allocate(s);
  // the first evaluation counts before it allocates; ranks must not repeat a step, because others would not
  if (sizes_.edges == 0 || exchange != nullptr) {
    count();
    const std::vector<int64_t> counts = read_counts();
    if (counts[kProblem] < g_.n_list) report_problem(counts[kProblem]);
    grow(counts.data());
  }
  const int64_t n = result_count(sizes_);
  if (!staged_results_.defined() || staged_results_.numel() < n) {
    staged_results_ = at::empty({n}, target_.pinned_options().dtype(at::kDouble));
  }
  for (;;) {
    run(request, exchange);
    staged_results_.narrow(0, 0, n).copy_(b_.results.view(at::kDouble).narrow(0, 0, n),
                                          /*non_blocking=*/true);
    target_.synchronize();
    const auto* results = staged_results_.const_data_ptr<double>();
    if (static_cast<int64_t>(results[kProblem]) < g_.n_list)
      report_problem(static_cast<int64_t>(results[kProblem]));
    if (results[kOverflow] == 0.0) break;
    int64_t counts[kCounts];
    for (int x = 0; x < kCounts; ++x) counts[x] = static_cast<int64_t>(results[x]);
    grow(counts);
  }
  Evaluation result = collect(request);
  result.timings.emplace_back(
      "device", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return result;
}

template <class N, class Target>
Evaluation Model<N, Target>::without_atoms(const Request& request, GhostExchange* exchange) {
  const auto options = at::TensorOptions().dtype(at::kDouble);
  if (exchange != nullptr) {
    const auto empty = [&] {
      return at::zeros({g_.n_node, packed_.layers_[0].shape.n}, at::TensorOptions().dtype(kType));
    };
    const bool gradients = request.forces || request.virial || request.atom_virial;
    for (size_t l = 1; l < packed_.layers_.size(); ++l) exchange->forward(empty());
    for (size_t l = 1; gradients && l < packed_.layers_.size(); ++l) exchange->reverse(empty());
  }
  Evaluation result;
  result.energy = at::zeros({g_.n_systems}, options);
  result.energies = at::zeros({0}, options);
  if (request.forces) result.forces = at::zeros({g_.n_node, 3}, options);
  if (request.virial) result.virial = at::zeros({g_.n_systems, 3, 3}, options);
  if (request.atom_virial) result.atom_virial = at::zeros({g_.n_node, 3, 3}, options);
  return result;
}

/// Takes the results out of the final copy.
template <class N, class Target>
Evaluation Model<N, Target>::collect(const Request& request) {
  const auto* from = staged_results_.const_data_ptr<double>();
  Evaluation result;
  result.n_edge = static_cast<int64_t>(from[kEdges]), result.n_angle = static_cast<int64_t>(from[kAngles]);
  result.max_neighbors = static_cast<int64_t>(from[kMostEdges]);
  result.max_angle_neighbors = static_cast<int64_t>(from[kMostClose]);
  from += kCounts;
  const auto take = [&](bool wanted, std::initializer_list<int64_t> shape) {
    at::Tensor out;
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    if (wanted) {
      out = at::empty(at::IntArrayRef(shape.begin(), shape.size()), at::TensorOptions().dtype(at::kDouble));
      std::memcpy(out.mutable_data_ptr(), from, static_cast<size_t>(n) * sizeof(double));
    }
    from += n;
    return out;
  };
  result.energy = take(true, {g_.n_systems});
  result.energies = take(true, {g_.n_local});
  result.forces = take(request.forces, {g_.n_node, 3});
  result.virial = take(request.virial, {g_.n_systems, 3, 3});
  result.atom_virial = take(request.atom_virial, {g_.n_node, 3, 3});
  const auto* energies = result.energies.const_data_ptr<double>();
  for (int64_t i = 0; i < g_.n_local; ++i) {
    if (!std::isfinite(energies[i])) {
      throw Error("expected finite energies, got " + std::to_string(energies[i]) + " eV for atom " +
                  std::to_string(i) + ": its neighbourhood is far outside of the training data");
    }
  }
  if (request.forces && !std::isfinite(result.forces.sum().template item<double>())) {
    throw Error(
        "expected finite forces, got NaN or infinity: the structure is far outside of the training data");
  }
  return result;
}

template <class N, class Target>
auto Model<N, Target>::layer(size_t l) -> Layer<T> {
  const ops::LayerShape& s = packed_.layers_[l].shape;
  const auto narrow = [](int64_t x) { return static_cast<int>(x); };
  Layer<T> x;
  x.np = narrow(s.np), x.ep = narrow(s.ep), x.ap = narrow(s.ap), x.heads = narrow(s.heads),
  x.axis = narrow(s.axis);
  x.k_node = narrow(s.k_node), x.k_sym = narrow(s.k_sym), x.k_message = narrow(s.k_message);
  x.k_edge = s.live_edge ? narrow(s.k_edge) : 0;
  x.k_angle1 = s.with_angles ? narrow(s.k_angle1) : 0, x.k_angle2 = s.with_angles ? narrow(s.k_angle2) : 0;
  x.k_angle = s.live_angle ? narrow(s.k_angle) : 0;
  x.width = narrow(s.heads * s.np);
  x.message_columns = narrow(s.message()), x.edge_columns = narrow(s.edge_columns());
  x.angle1 = narrow(s.angle1()), x.angle_columns = narrow(s.angle_columns());
  x.sym_width = narrow(s.sym_width()), x.sym_in = narrow(s.sym_in());
  x.live_edge = s.live_edge, x.live_angle = s.live_angle, x.with_angles = s.with_angles,
  x.keep_far = s.keep_far;
  x.first = l == 0;
  x.edge_norm = T(1.0 / s.edge_norm), x.angle_norm = T(1.0 / std::sqrt(s.angle_norm));
  x.keep_n = T(s.keep_n), x.keep_e = T(s.keep_e), x.keep_a = T(s.keep_a);
  x.phi = Phi<T>(s.phi);
  x.g = g_;
  x.weights = weights_[l];
  x.update = updates_[l];
  x.v = at_<T>(b_.v[l]), x.e = at_<T>(b_.e[l]), x.a = at_<T>(b_.a[l]);
  x.cos = at_<T>(b_.cos), x.angle_row = angle_row_;
  x.sw = edges_.sw, x.h = edges_.h, x.asw = at_<T>(b_.asw);
  x.zc = at_<T>(b_.zc), x.zn = at_<T>(b_.zn), x.zca = at_<T>(b_.zca), x.pq = at_<T>(b_.pq);
  x.m = at_<T>(b_.m[l]), x.message = at_<T>(b_.message), x.big_h = at_<T>(b_.big_h[l]),
  x.sym = at_<T>(b_.sym);
  x.v_out = at_<T>(b_.v[l + 1]), x.e_out = at_<T>(b_.e[l + 1]), x.a_out = at_<T>(b_.a[l + 1]);
  x.dv_out = dv_out_, x.de_out = at_<T>(b_.de[de_current_]), x.de = at_<T>(b_.de[1 - de_current_]);
  x.dmessage = at_<T>(b_.dmessage), x.dm = at_<T>(b_.dm), x.dpq = at_<T>(b_.dpq), x.dz = at_<T>(b_.dz);
  x.dz_node = at_<T>(b_.dz_node), x.dzc = at_<T>(b_.dzc), x.dzca = at_<T>(b_.dzca);
  x.dbig_h = at_<T>(b_.dbig_h), x.dsym = at_<T>(b_.dsym);
  x.dzn = at_<T>(b_.dzn), x.dv_slot = at_<T>(b_.dv_slot), x.dv_own = at_<T>(b_.dv_own), x.dv = at_<T>(b_.dv);
  x.da = at_<T>(b_.da), x.dcos = at_<T>(b_.dcos), x.dasw = at_<T>(b_.dasw);
  x.dsw = at_<double>(b_.dsw), x.dh = at_<double>(b_.dh);
  x.add_edge = l + 1 < packed_.layers_.size();
  x.add_dasw = x.add_edge && packed_.layers_[l + 1].shape.with_angles;
  return x;
}

template <class N, class Target>
Linear<N> Model<N, Target>::linear(const Layer<T>& x, Weight<T> w, Weight<T> b, const T* a, int64_t lda,
                                   int64_t k, T* out, int64_t columns, bool add) const {
  Linear<N> kernel;
  kernel.runs = row_runs_.runs, kernel.n_run = row_runs_.n;
  kernel.weights = x.weights, kernel.w = w, kernel.b = b;
  kernel.a = a, kernel.lda = lda, kernel.k = static_cast<int>(k);
  kernel.out = out, kernel.columns = static_cast<int>(columns), kernel.add = add;
  return kernel;
}

/// Node parts of the edge and angle maps.
template <class N, class Target>
void Model<N, Target>::project(const Layer<T>& x) {
  using W = ops::GroupWeights<T>;
  target_.launch(linear(x, &W::edge_c, &W::edge_b, x.v, x.np, x.np, x.zc, x.edge_columns, false));
  if (x.with_angles) {
    target_.launch(linear(x, &W::angle_c, &W::angle_b, x.v, x.np, x.np, x.zca, x.angle_columns, false));
  }
  Linear<N> slots = linear(x, &W::edge_n, nullptr, x.v, x.np, x.np, x.zn, x.edge_columns, false);
  slots.runs = slot_runs_.runs, slots.n_run = slot_runs_.n, slots.gather = g_.slot_node;
  target_.launch(slots);
}

template <class N, class Target>
void Model<N, Target>::forward(size_t l) {
  const Layer<T> x = layer(l);
  project(x);
  if (x.with_angles) target_.launch(AngleForward<N>{x, angle_runs_.runs, angle_runs_.n});
  target_.launch(EdgeForward<N>{x, edge_runs_.runs, edge_runs_.n});
  target_.launch(Symmetrize<T>{x});
  target_.launch(Invariants<T>{x});
  target_.launch(Nodes<N, false>{x, row_runs_.runs, row_runs_.n});
}

template <class N, class Target>
void Model<N, Target>::backward(size_t l, bool gradients_to_nodes) {
  using W = ops::GroupWeights<T>;
  const Layer<T> x = layer(l);
  project(x);
  target_.launch(Invariants<T>{x});
  target_.launch(Nodes<N, true>{x, row_runs_.runs, row_runs_.n});
  const int64_t c1 = x.k_node * x.np, c2 = x.k_sym * x.np;
  target_.launch(linear(x, &W::sym_t, nullptr, x.dz_node + c1, c1 + c2, c2, x.dsym, x.sym_in, false));
  target_.launch(InvariantsBackward<T>{x});
  if (x.with_angles) target_.launch(MessageBackward<N>{x, edge_runs_.runs, edge_runs_.n});
  target_.launch(EdgeBackward<N>{x, edge_runs_.runs, edge_runs_.n});
  if (x.with_angles) target_.launch(AngleBackward<N>{x, angle_runs_.runs, angle_runs_.n});
  de_current_ = 1 - de_current_;
  if (!gradients_to_nodes) return;
  target_.launch(linear(x, &W::node_t, nullptr, x.dz_node, c1 + c2, c1, x.dv_own, x.np, true));
  target_.launch(
      linear(x, &W::edge_c_t, nullptr, x.dzc, x.edge_columns, x.edge_columns, x.dv_own, x.np, true));
  if (x.with_angles) {
    target_.launch(
        linear(x, &W::angle_c_t, nullptr, x.dzca, x.angle_columns, x.angle_columns, x.dv_own, x.np, true));
  }
  target_.launch(SlotSums<T>{x});
  Linear<N> slots =
      linear(x, &W::edge_n_t, nullptr, x.dzn, x.edge_columns, x.edge_columns, x.dv_slot, x.np, true);
  slots.runs = slot_runs_.runs, slots.n_run = slot_runs_.n;
  target_.launch(slots);
  target_.launch(GatherSlots<T>{x});
}

/// Fills the ghosts' rows of the features that layer l reads. Through host memory, on the calling thread.
template <class N, class Target>
void Model<N, Target>::exchange_forward(size_t l, GhostExchange* exchange) {
  const ops::LayerShape& s = packed_.layers_[l].shape;
  const int64_t n_node = g_.n_node, n_local = g_.n_local;
  const at::Tensor rows =
      b_.v[l].view(kType).narrow(0, 0, n_node * s.np).view({n_node, s.np}).narrow(1, 0, s.n);
  const at::Tensor buffer = at::zeros({n_node, s.n}, target_.pinned_options().dtype(kType));
  buffer.index_copy_(0, engine_rows_, rows.narrow(0, 0, n_local).cpu());
  exchange->forward(buffer);
  if (n_node > n_local) {
    rows.narrow(0, n_local, n_node - n_local).copy_(buffer.narrow(0, n_local, n_node - n_local));
  }
}

/// Adds the gradients of ghosts to those of their owners.
template <class N, class Target>
void Model<N, Target>::exchange_reverse(GhostExchange* exchange) {
  const ops::LayerShape& s = packed_.layers_[0].shape;
  const int64_t n_node = g_.n_node, n_local = g_.n_local;
  const at::Tensor rows =
      b_.dv.view(kType).narrow(0, 0, n_node * s.np).view({n_node, s.np}).narrow(1, 0, s.n);
  const at::Tensor host = rows.cpu();
  const at::Tensor buffer = at::zeros({n_node, s.n}, target_.pinned_options().dtype(kType));
  buffer.index_copy_(0, engine_rows_, host.narrow(0, 0, n_local));
  buffer.narrow(0, n_local, n_node - n_local).copy_(host.narrow(0, n_local, n_node - n_local));
  exchange->reverse(buffer);
  rows.narrow(0, 0, n_local).copy_(buffer.index_select(0, engine_rows_));
}

/// Launches a step. Nothing in here waits for the device, unless ranks exchange ghosts.
template <class N, class Target>
void Model<N, Target>::run(const Request& request, GhostExchange* exchange) {
  const size_t n_layer = packed_.layers_.size();
  const ops::LayerShape& s = packed_.layers_[0].shape;
  double* results = at_<double>(b_.results);
  double* energy = results + kCounts;
  double* energies = energy + g_.n_systems;
  double* forces = energies + g_.n_local;
  double* virial = forces + 3 * static_cast<int64_t>(g_.n_node);
  double* atom_virial = virial + 9 * static_cast<int64_t>(g_.n_systems);

  count();
  target_.launch(PlaceEdges<T>{g_, positions_, geometry_, edges_});
  if (s.with_angles) target_.launch(PlaceAngles<T>{g_, edges_, at_<T>(b_.cos), at_<T>(b_.asw)});
  Embed<T> embed;
  embed.g = g_, embed.np = static_cast<int>(s.np), embed.ep = static_cast<int>(s.ep);
  embed.use_dist = packed_.use_dist_, embed.phi = Phi<T>(packed_.phi_);
  embed.table = node_table_, embed.matrix = edge_matrix_, embed.bias = edge_bias_, embed.input = edges_.input;
  embed.v = at_<T>(b_.v[0]), embed.e = at_<T>(b_.e[0]);
  target_.launch(embed);
  for (size_t l = 0; l < n_layer; ++l) {
    if (l > 0 && exchange != nullptr) exchange_forward(l, exchange);
    forward(l);
  }

  // readout
  FittingInput<T> input;
  input.g = g_, input.n = static_cast<int>(s.n), input.np = static_cast<int>(s.np);
  input.n_constant = static_cast<int>(readout_.constant.size(1)), input.constant = fitting_constant_;
  input.in = static_cast<int>(ops::padded<T>(s.n + readout_.constant.size(1)));
  input.v = at_<T>(b_.v[n_layer]), input.x = at_<T>(b_.x[0]);
  target_.launch(input);
  for (size_t l = 0; l < fitting_.size(); ++l) {
    FittingForward<N> kernel;
    kernel.layer = fitting_[l], kernel.n_row = g_.n_local;
    kernel.x = at_<T>(b_.x[l]), kernel.y = at_<T>(b_.x[l + 1]), kernel.slope = at_<T>(b_.slope[l]);
    target_.launch(kernel);
  }
  Energies<T> sum;
  sum.g = g_, sum.in = static_cast<int>(ops::padded<T>(readout_.out_matrix.numel()));
  sum.x = at_<T>(b_.x.back()), sum.w = out_matrix_, sum.bias = readout_.out_bias;
  sum.shift = shift_, sum.weight = energy_weight_, sum.energies = energies, sum.dx = at_<T>(b_.dx[0]);
  target_.launch(sum);
  SumSystems total;
  total.g = g_, total.by_engine_row = true, total.values = energies, total.out = energy;
  target_.launch(total);
  target_.launch(CopyCounts{g_, results});
  if (!request.forces && !request.virial && !request.atom_virial) return;

  size_t current = 0;
  for (size_t l = fitting_.size(); l-- > 0;) {
    FittingBackward<N> kernel;
    kernel.layer = fitting_[l], kernel.n_row = g_.n_local, kernel.slope = at_<T>(b_.slope[l]);
    kernel.dy = at_<T>(b_.dx[current]), kernel.dx = at_<T>(b_.dx[1 - current]);
    target_.launch(kernel);
    current = 1 - current;
  }
  TakeColumns<T> take;
  take.n_row = g_.n_local, take.n = static_cast<int>(s.n), take.np = static_cast<int>(s.np),
  take.from = input.in;
  take.in = at_<T>(b_.dx[current]), take.out = at_<T>(b_.dv);
  target_.launch(take);
  dv_out_ = at_<T>(b_.dv);
  de_current_ = 0;
  for (size_t l = n_layer; l-- > 0;) {
    // the features of the first layer's nodes follow from the types alone
    backward(l, /*gradients_to_nodes=*/l > 0);
    if (l > 0 && exchange != nullptr) exchange_reverse(exchange);
  }

  GeometryBackward<T> geometry;
  geometry.g = g_, geometry.rules = geometry_, geometry.edges = edges_, geometry.ep = static_cast<int>(s.ep);
  geometry.use_dist = packed_.use_dist_, geometry.phi = Phi<T>(packed_.phi_);
  geometry.matrix = edge_matrix_, geometry.bias = edge_bias_;
  geometry.dcos = at_<T>(b_.dcos), geometry.dasw = at_<T>(b_.dasw), geometry.de = at_<T>(b_.de[de_current_]);
  geometry.dsw = at_<double>(b_.dsw), geometry.dh = at_<double>(b_.dh);
  geometry.gradient = at_<double>(b_.gradient), geometry.centre = at_<double>(b_.centre);
  target_.launch(geometry);
  if (request.forces || request.atom_virial) {
    Forces gather;
    gather.g = g_, gather.gradient = geometry.gradient, gather.vec = edges_.vec,
    gather.centre = geometry.centre;
    gather.forces = request.forces ? forces : nullptr;
    gather.atom_virial = request.atom_virial ? atom_virial : nullptr;
    target_.launch(gather);
  }
  if (request.virial) {
    SumSystems virials;
    virials.g = g_, virials.width = 9, virials.stride = 12, virials.scale = -1.0;
    virials.values = geometry.centre + 3, virials.out = virial;
    target_.launch(virials);
  }
}

}  // namespace moecalc::cuda
