// The whole model on an accelerator: positions go in, energies, forces and virials come out, and everything
// between stays on the target. For one number format and one target (the device, or the host that emulates
// it); included by the translation units that compile it: emulation.cpp and kernels_*.cu.
//
// A target has
//   Scope(target)                    makes its device the current one
//   memory(bytes), pinned(bytes)     Memory of the target, and of the host for copies
//   staging(bytes)                   host memory for one copy at a time
//   trim()                           gives back what is not in use
//   to_device, to_host               copies; they do not wait
//   launch(kernel), synchronize(), finish()   the last does not throw
//   record(recording, work), replay(recording)   Recording of what work() adds; it can be replayed often
//   free_bytes(), shared_limit(), wanted_blocks(), name(), place(), survives_fork
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backends/backend.h"
#include "backends/cuda/buffers.h"
#include "backends/cuda/device_list.h"
#include "backends/cuda/device_weights.h"
#include "backends/cuda/ghosts.h"
#include "backends/cuda/step.h"
#include "backends/cuda/step_recording.h"

namespace moecalc::cuda {

using Instant = std::chrono::steady_clock::time_point;
inline double seconds_since(Instant start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class Format, class Target>
class Model final : public Backend {
 public:
  using Real = typename Format::Real;

  /// Throws Unsupported.
  explicit Model(const BackendInputs& inputs)
      : target_(inputs.options),
        memory_limit_(inputs.options.device_bytes),
        recording_(inputs.options.cuda_graphs),
        model_(inputs.package.architecture),
        weights_(inputs, target_),
        buffers_(widths().buffers()) {
    tables_.rules = model_.rules;
    check_shared_memory();
  }
  ~Model() override { target_.finish(); }

  void set_tables(const TypeTables& tables) override {
    tables_ = tables;
    list_.clear();
    weights_.set_tables(tables_);
  }
  void set_list(const NeighborList& list) override;
  Evaluation evaluate(const Array& positions, const Array& cells, const Request& request,
                      GhostExchange* exchange) override;
  std::string name() const override { return target_.name() + " " + Format::name; }
  bool survives_fork() const override { return Target::survives_fork; }
  int64_t bytes() const override { return fixed_bytes() + held_bytes(widths(), buffers_); }
  int64_t estimate_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const override {
    const int64_t n_group = tables_.rules.n_groups(/*n_systems=*/1);
    return planned_bytes(widths(), estimated_sizes(n_node, n_edge, n_angle, n_group), {});
  }
  int64_t least_bytes(int64_t n_node, int64_t n_edge, int64_t n_angle) const override {
    const int64_t n_group = tables_.rules.n_groups(/*n_systems=*/1);
    const Sizes sizes = estimated_sizes(n_node, n_edge, n_angle, n_group);
    return planned_bytes(widths(), sizes, least_kept(widths()));
  }
  int64_t n_packed_groups() const override { return weights_.n_packed_groups(); }
  int64_t weight_bytes() const override { return weights_.group_bytes(); }
  /// The list is lost as well: it may be of atoms whose weights are gone.
  void release_weights() override {
    weights_.release();
    list_.clear();
  }

 private:
  struct Staged {
    Memory host;
    Memory device;
  };

  void check_shared_memory() const;
  void route_systems(GhostExchange* exchange);
  ModelWidths<Real> widths() const {
    const Constants<Real>& constants = weights_.constants();
    return {weights_.shapes(), constants.fitting, kernels::padded<Real>(constants.out_width)};
  }
  /// Bytes of weights and the list.
  int64_t fixed_bytes() const { return weights_.bytes() + list_.bytes(); }
  Sizes sizes() const;
  void reserve(const Sizes& capacity);
  std::optional<Kept> most_kept(const Sizes& capacity, int64_t free) const;
  [[noreturn]] void refuse(const Sizes& capacity, int64_t free) const;
  void reserve_for_list();
  void reserve_for_counts(const int64_t* counts);
  const double* send(const Array& values, Staged& staged);
  Positions send_positions(const Array& positions, const Array& cells);
  Step<Format, Target> step(const Positions& positions) {
    return {target_, weights_, list_, buffers_, capacity_, kept_, positions};
  }
  StepKey key(const Positions& positions, const Request& request) const;
  void count_first(const Positions& positions);
  void check_counts(int64_t problem) const;
  const double* run(const Positions& positions, const Request& request, const ResultPlaces& places,
                    Ghosts<Real, Target>* ghosts);
  Evaluation collect(const double* results, const ResultPlaces& places) const;

  Target target_;  // before everything that has memory of it
  std::optional<int64_t> memory_limit_;
  StepRecording<Target> recording_;
  const Architecture& model_;
  DeviceWeights<Format, Target> weights_;
  TypeTables tables_;
  DeviceList list_;
  Sizes capacity_;
  Kept kept_;
  Buffers<Real> buffers_;
  int64_t list_version_ = 0;
  int64_t buffer_version_ = 0;
  Staged positions_;
  Staged cells_;
  Memory results_;  // of the host
  Memory counts_;   // of the host
  GhostMemory ghost_memory_;
  double list_seconds_ = 0.0;  // of the host, for the list that was set since the last evaluation
};

/// Package widths decide how much shared memory the kernels want; a device has only so much.
template <class Format, class Target>
void Model<Format, Target>::check_shared_memory() const {
  int64_t most = 0;
  for (const kernels::LayerShape& shape : weights_.shapes()) {
    most = std::max(most, most_shared_bytes<Format>(layer_widths<Real>(shape)));
  }
  if (most > target_.shared_limit()) {
    throw Unsupported{"features this wide (the kernels need " + std::to_string(most) +
                      " bytes of shared memory, the device has " + std::to_string(target_.shared_limit()) +
                      ")"};
  }
}

template <class Format, class Target>
void Model<Format, Target>::set_list(const NeighborList& list) {
  const auto start = std::chrono::steady_clock::now();
  const typename Target::Scope scope(target_);
  list_.set(list, tables_.rules, {Format::kRows, target_.wanted_blocks()}, target_);
  ++list_version_;
  ghost_memory_.forget();
  list_seconds_ = seconds_since(start);
  // where groups are structures, weights follow from compositions, which other ranks know of as well
  if (tables_.rules.group_by_system) return;
  try {
    weights_.set_groups(tables_.features, list_.used_groups());
  } catch (...) {
    list_.clear();
    throw;
  }
}

/// Has the weights of the structures' compositions on the target.
template <class Format, class Target>
void Model<Format, Target>::route_systems(GhostExchange* exchange) {
  PreparedGraph counted;
  counted.n_systems = list_.graph().n_systems;
  counted.composition = list_.composition();
  weights_.set_groups(features_of(counted, model_, tables_, exchange), list_.used_groups());
}

template <class Format, class Target>
Sizes Model<Format, Target>::sizes() const {
  const Graph& graph = list_.graph();
  Sizes sizes;
  sizes.n_local = graph.n_local;
  sizes.n_node = graph.n_node;
  sizes.n_list = graph.n_list;
  sizes.n_slot = graph.n_slot;
  sizes.n_systems = graph.n_systems;
  return sizes;
}

/// Makes the buffers large enough for `capacity`, with as many layers kept as there is memory for; throws
/// OutOfMemoryError before anything is allocated.
template <class Format, class Target>
void Model<Format, Target>::reserve(const Sizes& capacity) {
  if (missing_bytes(widths(), buffers_, capacity, kept_).more > 0) {
    const auto free_bytes = [&] { return memory_limit_ ? *memory_limit_ - bytes() : target_.free_bytes(); };
    const auto n_used = static_cast<int64_t>(list_.used_groups().size());
    int64_t free = free_bytes();
    std::optional<Kept> kept = most_kept(capacity, free);
    const bool loses = !kept || kept->every != kept_.every || kept->first != kept_.first;
    if (loses && weights_.n_packed_groups() > n_used) {
      weights_.release(list_.used_groups());
      free = free_bytes();
      kept = most_kept(capacity, free);
    }
    if (!kept) refuse(capacity, free);
    kept_ = *kept;
    ++buffer_version_;
    allocate(widths(), buffers_, capacity, kept_, target_);
  }
  capacity_ = capacity;
}

/// What stays of the forward with that much memory left; nothing where the system does not fit at all.
/// Capacities only grow, so that what went once does not come back.
template <class Format, class Target>
std::optional<Kept> Model<Format, Target>::most_kept(const Sizes& capacity, int64_t free) const {
  Kept kept = kept_;
  do {
    const Missing missing = missing_bytes(widths(), buffers_, capacity, kept);
    if (missing.more <= free + missing.released) return kept;
  } while (keep_less(widths(), kept));
  return std::nullopt;
}

template <class Format, class Target>
void Model<Format, Target>::refuse(const Sizes& capacity, int64_t free) const {
  const int64_t need = planned_bytes(widths(), capacity, least_kept(widths()));
  const int64_t fixed = fixed_bytes();
  const int64_t most = std::max<int64_t>(0, bytes() - fixed + free);
  const double share = static_cast<double>(most) / static_cast<double>(std::max<int64_t>(1, need));
  const int64_t n_local = list_.graph().n_local;
  throw OutOfMemoryError("expected a system that fits on " + target_.place() + ", got " +
                         std::to_string(n_local) + " atoms with " + std::to_string(capacity.n_edge) +
                         " edges and " + std::to_string(capacity.n_angle) + " angles, which need " +
                         std::to_string(need >> 20) + " MiB of " + std::to_string((most + fixed) >> 20) +
                         " MiB for weights (" + std::to_string(fixed >> 20) +
                         " MiB) and system: at this density at most about " +
                         std::to_string(static_cast<int64_t>(0.97 * share * static_cast<double>(n_local))) +
                         " atoms fit; use fewer atoms per device, more devices or dtype float32");
}

/// With some slack, because lists differ a little from rebuild to rebuild.
template <class Format, class Target>
void Model<Format, Target>::reserve_for_list() {
  const Sizes need = sizes();
  Sizes capacity = capacity_;
  const auto grow = [](int64_t& held, int64_t count) {
    if (count > held) held = count + count / 32;
  };
  grow(capacity.n_local, need.n_local);
  grow(capacity.n_node, need.n_node);
  grow(capacity.n_list, need.n_list);
  grow(capacity.n_slot, need.n_slot);
  capacity.n_systems = std::max(capacity.n_systems, need.n_systems);
  reserve(capacity);
}

/// Capacities with some slack: edges come and go from step to step.
template <class Format, class Target>
void Model<Format, Target>::reserve_for_counts(const int64_t* counts) {
  constexpr int64_t limit = std::numeric_limits<int>::max();
  if (counts[kAngles] > limit) {
    throw Error("expected at most " + std::to_string(limit) + " angles per process, got " +
                std::to_string(counts[kAngles]) + ": use more processes");
  }
  const auto grown = [](int64_t held, int64_t count, int64_t most) {
    if (count <= held) return held;
    return std::max(held, std::min(count + count * 3 / 20 + 64, most));
  };
  Sizes capacity = capacity_;
  const int64_t n_list = list_.graph().n_list;
  capacity.n_edge = grown(capacity.n_edge, counts[kEdges], n_list);
  capacity.n_close = grown(capacity.n_close, counts[kClose], n_list);
  capacity.n_angle = grown(capacity.n_angle, counts[kAngles], limit);
  reserve(capacity);
}

/// Starts the copy of `values` to the target.
template <class Format, class Target>
const double* Model<Format, Target>::send(const Array& values, Staged& staged) {
  if (!values.defined() || values.numel() == 0) return nullptr;
  const auto bytes = static_cast<int64_t>(values.bytes());
  if (staged.host.bytes() < bytes) {
    target_.synchronize();  // an evaluation that failed may have left a copy
    staged.host = target_.pinned(bytes + bytes / 8);
    staged.device = target_.memory(bytes + bytes / 8);
  }
  auto* host = staged.host.template as<double>();
  std::memcpy(host, values.bytes_data(), values.bytes());
  target_.to_device(staged.device.template as<char>(), host, values.bytes());
  return staged.device.template as<double>();
}

template <class Format, class Target>
Positions Model<Format, Target>::send_positions(const Array& positions, const Array& cells) {
  Positions sent;
  sent.atoms = send(positions, positions_);
  sent.cells = send(cells, cells_);
  sent.cutoff = tables_.rules.cutoff;
  sent.angle_cutoff = tables_.rules.angle_cutoff;
  return sent;
}

template <class Format, class Target>
void Model<Format, Target>::check_counts(int64_t problem) const {
  if (problem >= list_.graph().n_list) return;
  list_.report_problem(problem, positions_.host.template as<double>(), cells_.host.template as<double>());
}

/// Counts edges and angles before anything is computed, and makes room for them.
template <class Format, class Target>
void Model<Format, Target>::count_first(const Positions& positions) {
  step(positions).count();
  constexpr size_t bytes = kCounts * sizeof(int64_t);
  if (counts_.bytes() == 0) counts_ = target_.pinned(bytes);
  const auto* counts = counts_.template as<int64_t>();
  target_.to_host(counts_.template as<char>(), buffers_.counts.memory.template as<char>(), bytes);
  target_.synchronize();
  check_counts(counts[kProblem]);
  reserve_for_counts(counts);
}

template <class Format, class Target>
StepKey Model<Format, Target>::key(const Positions& positions, const Request& request) const {
  StepKey key;
  key.list = list_version_;
  key.weights = weights_.version();
  key.buffers = buffer_version_;
  key.capacity = capacity_;
  key.positions = positions.atoms;
  key.cells = positions.cells;
  key.results = results_.template as<void>();
  key.request = request;
  return key;
}

/// Runs the step until the capacities suffice, and returns its results on the host.
template <class Format, class Target>
const double* Model<Format, Target>::run(const Positions& positions, const Request& request,
                                         const ResultPlaces& places, Ghosts<Real, Target>* ghosts) {
  const int64_t bytes = places.total * static_cast<int64_t>(sizeof(double));
  if (results_.bytes() < bytes) results_ = target_.pinned(bytes + bytes / 8);
  const auto* results = results_.template as<double>();
  for (;;) {
    const auto work = [&] {
      step(positions).run(request, places, ghosts);
      target_.to_host(results_.template as<char>(), buffers_.results.memory.template as<char>(),
                      static_cast<size_t>(bytes));
    };
    if (ghosts == nullptr) {
      recording_.run(target_, key(positions, request), list_.graph().n_local, work);
    } else {
      work();  // which waits for other ranks
    }
    target_.synchronize();
    check_counts(static_cast<int64_t>(results[kProblem]));
    if (results[kOverflow] == 0.0) return results;
    int64_t counts[kCounts];
    std::transform(results, results + kCounts, counts,
                   [](double count) { return static_cast<int64_t>(count); });
    reserve_for_counts(counts);
  }
}

template <class Format, class Target>
Evaluation Model<Format, Target>::collect(const double* results, const ResultPlaces& places) const {
  Evaluation result;
  result.n_edge = static_cast<int64_t>(results[kEdges]);
  result.n_angle = static_cast<int64_t>(results[kAngles]);
  result.max_neighbors = static_cast<int64_t>(results[kMostEdges]);
  result.max_angle_neighbors = static_cast<int64_t>(results[kMostClose]);
  const Sizes size = sizes();
  const auto take = [&](int64_t place, Shape shape) {
    return place < 0 ? Array() : Array::of(results + place, std::move(shape));
  };
  result.energy = take(places.energy, {size.n_systems});
  result.energies = take(places.energies, {size.n_local});
  result.forces = take(places.forces, {size.n_node, 3});
  result.virial = take(places.virial, {size.n_systems, 3, 3});
  result.atom_virial = take(places.atom_virial, {size.n_node, 3, 3});
  return result;
}

/// Waits for the target only for the final copy, unless ranks exchange ghosts.
template <class Format, class Target>
Evaluation Model<Format, Target>::evaluate(const Array& positions, const Array& cells, const Request& request,
                                           GhostExchange* exchange) {
  if (!list_.is_set()) {
    throw Error("expected a neighbor list before `evaluate`, got none: call `set_list` first");
  }
  const auto start = std::chrono::steady_clock::now();
  const typename Target::Scope scope(target_);
  if (tables_.rules.group_by_system) route_systems(exchange);
  const Positions sent = send_positions(positions, cells);
  reserve_for_list();
  // the first evaluation counts before it allocates; ranks must not repeat a step, because others would not
  if (capacity_.n_edge == 0 || exchange != nullptr) count_first(sent);
  std::optional<Ghosts<Real, Target>> ghosts;
  if (exchange != nullptr) ghosts.emplace(target_, list_, weights_.shapes()[0], ghost_memory_, *exchange);
  const ResultPlaces places(sizes(), request);
  Evaluation result = collect(run(sent, request, places, ghosts ? &*ghosts : nullptr), places);
  result.timings.emplace_back("device", seconds_since(start));
  if (list_seconds_ > 0.0) result.timings.emplace_back("list", std::exchange(list_seconds_, 0.0));
  return result;
}

}  // namespace moecalc::cuda
