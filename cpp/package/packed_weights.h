// The weights of a package as the kernels want them: per routing group, active experts side by side. Groups
// are laid out when they first have atoms. Shared by the CPU kernels and the device model.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/memory.h"
#include "kernels/common/layer.h"
#include "package/architecture.h"
#include "package/conditions.h"
#include "package/routing.h"

namespace moecalc {

enum class BlockKind : int64_t;
struct AngleParts;

/// Weights laid out once for all groups that use the same experts.
template <class Real>
struct WeightBlock {
  struct Part {
    int64_t first;  // in elements of memory
    int64_t rows;
    int64_t columns;
    bool matrix;  // of a product, as opposed to a row of numbers
  };
  uint64_t id = 0;  // of all blocks that ever were
  Pages memory;
  std::vector<Part> parts;

  Real* part(size_t index) const { return reinterpret_cast<Real*>(memory.data()) + parts[index].first; }
};

/// Indices of the groups that have atoms. `splits` (n_group + 1): first row of every group.
template <class Integer>
std::vector<int64_t> groups_in_use(const std::vector<Integer>& splits) {
  std::vector<int64_t> used;
  for (size_t group = 0; group + 1 < splits.size(); ++group) {
    if (splits[group] < splits[group + 1]) used.push_back(static_cast<int64_t>(group));
  }
  return used;
}

/// Weights that do not belong to a group, in the dtype of the network. The embedding: e = input * edge_matrix
/// + edge_bias, a = cos * angle_direction; padded.
template <class Real>
struct ModelWeights {
  kernels::Activation phi;
  bool use_dist = true;
  std::vector<Real> edge_matrix;
  std::vector<Real> edge_bias;
  std::vector<Real> angle_direction;
  std::vector<Real> node_table;                                  // phi(Y), (K n_types x n_padded)
  std::vector<kernels::LayerShape> shapes;                       // of the layers
  std::vector<std::vector<kernels::GroupWeights<Real>>> groups;  // [layer][group]; null: not laid out
  std::vector<kernels::UpdateVectors<Real>> updates;             // [layer]
};

/// Lays out the weights of routing groups. Throws Unsupported from its constructor where the kernels do not
/// cover the model.
template <class Real>
class MOECALC_API PackedWeights {
 public:
  using Block = WeightBlock<Real>;

  /// `kernels`: for activations of constants. `kept_bytes`: what groups without atoms may keep; none: what
  /// `memory_left` says. `model` must outlive this.
  PackedWeights(const Architecture& model, const kernels::Kernels<Real>& kernels,
                std::optional<int64_t> kept_bytes,
                std::function<int64_t()> memory_left = quarter_of_available_memory);

  const ModelWeights<Real>& weights() const { return weights_; }
  ModelWeights<Real>& weights() { return weights_; }

  /// `features` (G, n_dim) float64: router input of every group; `used`: groups whose weights the evaluation
  /// to come reads. Lays out those that are not yet, and keeps the others as long as memory allows. Groups
  /// are told by their index: their number may grow, but other features of the same groups replace all that
  /// there was. Returns whether any weights changed.
  bool set_groups(const Array& features, const std::vector<int64_t>& used);
  /// Gives back the weights of all groups but those `in_use`.
  void release_groups(const std::vector<int64_t>& in_use = {});
  /// Tables of the types from now on.
  void set_tables(const TypeTables& tables);
  int64_t n_packed_groups() const;
  int64_t packed_bytes() const;  // of host memory

  struct Group {
    std::vector<std::shared_ptr<Block>> blocks;  // none: not laid out
    uint64_t last_use = 0;
  };
  const std::vector<Group>& groups() const { return groups_; }
  /// Memory of the updates: (pointer, number of elements).
  const std::vector<std::vector<Real>>& update_memory() const { return update_memory_; }

 private:
  /// What a group uses at a position.
  struct Active {
    const PositionSource* position = nullptr;
    std::vector<int64_t> experts;
    std::vector<double> routing;  // weights of the experts; 1 where they are merged
    std::vector<double> merged;   // where experts are merged: their weights
  };
  struct Weights {
    Array matrix;  // (K, in, out) in Real
    Array bias;    // (K, out) float64
  };
  /// Where the weights of a map of one input are.
  struct SquareMap {
    const Real*& matrix;
    const Real*& transposed;
    const Real*& bias;
    const Real*& routing;
  };
  struct MapColumns;
  using Maps = std::vector<MapColumns>;
  struct Target;
  struct Layout;

  void read_embedding();
  void pack_updates();
  void route_groups(const Array& features);
  void pack_group(int64_t group);
  void pack_layer(Target& target);
  void pack_square_map(Target& target, BlockKind kind, const MapColumns& map, const SquareMap& to);
  void pack_sym(Target& target);
  void pack_edge(Target& target);
  void pack_angle(Target& target);
  void fill_angle_block(size_t layer, const Maps& maps, const AngleParts& parts, const Block& block);
  std::vector<double> far_edges(const kernels::LayerShape& shape, const MapColumns& map) const;
  Active active(const Target& target, const char* name) const;
  static Array biases_of(const Active& active);
  static Weights weights_of(const Active& active);
  static void put(Real* to, int64_t columns, int64_t row, int64_t column, const Array& from,
                  const MapColumns& map);
  static void put_bias(Real* to, const Array& bias, const MapColumns& map);
  template <class Function>
  static void put_maps(const Maps& maps, Real* bias, const Function& put_inputs);
  const Block& block(Target& target, BlockKind kind, const Maps& maps, const Layout& layout,
                     const std::function<void(const Block&)>& fill);
  bool evict(const std::vector<int64_t>& used);
  void release(size_t group);
  void drop_unused_blocks();

  const Architecture& model_;
  const kernels::Kernels<Real>& kernels_;
  const std::optional<int64_t> kept_bytes_;
  std::function<int64_t()> memory_left_;
  ModelWeights<Real> weights_;
  std::vector<std::vector<Real>> update_memory_;
  std::vector<Group> groups_;
  Array features_;                                     // for which the groups were routed
  std::vector<std::map<std::string, Routes>> routes_;  // [layer][router]
  std::map<std::vector<int64_t>, std::shared_ptr<Block>> blocks_;
  std::vector<int64_t> used_;  // in the last evaluation
  uint64_t n_block_ = 0;
  uint64_t clock_ = 0;
};

/// out = start (or zeros) + the sum of row times matrix over `products`, `columns` wide.
/// Written out, because the order of the sums in a library's product depends on where the weights lie in
/// memory, and training that is restarted shall go on to the last bit.
template <class Real>
void sum_products(const Real* start,
                  std::initializer_list<std::pair<const std::vector<Real>*, const Real*>> products,
                  int64_t columns, Real* out);

}  // namespace moecalc
