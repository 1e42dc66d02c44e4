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
#include "ops/layer.h"
#include "package/architecture.h"
#include "package/conditions.h"
#include "package/routing.h"

namespace moecalc {

/// Weights laid out once for all groups that use the same experts.
template <class T>
struct WeightBlock {
  struct Part {
    int64_t first, rows, columns;  // in elements of memory
    bool matrix;                   // of a product, as opposed to a row of numbers
  };
  uint64_t id = 0;  // of all blocks that ever were
  Pages memory;
  std::vector<Part> parts;

  T* part(size_t index) const { return reinterpret_cast<T*>(memory.data()) + parts[index].first; }
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
template <class T>
struct ModelWeights {
  ops::Activation phi;
  bool use_dist = true;
  std::vector<T> edge_matrix, edge_bias, angle_direction;
  std::vector<T> node_table;                              // phi(Y), (K n_types x np)
  std::vector<ops::LayerShape> shapes;                    // of the layers
  std::vector<std::vector<ops::GroupWeights<T>>> groups;  // [layer][group]; null: not laid out
  std::vector<ops::UpdateVectors<T>> updates;             // [layer]
};

/// Lays out the weights of routing groups. Throws Unsupported from its constructor where the kernels do not
/// cover the model.
template <class T>
class MOECALC_API PackedWeights {
 public:
  using Block = WeightBlock<T>;

  /// `kernels`: for activations of constants. `kept_bytes`: what groups without atoms may keep; none: what
  /// `memory_left` says. `model` must outlive this.
  PackedWeights(const Architecture& model, const ops::Kernels<T>& kernels, std::optional<int64_t> kept_bytes,
                std::function<int64_t()> memory_left = quarter_of_available_memory);

  const ModelWeights<T>& weights() const { return weights_; }
  ModelWeights<T>& weights() { return weights_; }

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
  const std::vector<std::vector<T>>& update_memory() const { return update_memory_; }

 private:
  /// What a group uses at a position.
  struct Active {
    const PositionSource* position = nullptr;
    std::vector<int64_t> experts;
    std::vector<double> p, mixed;  // where experts are merged: their weights, while `p` is 1
  };
  struct Weights {
    Array matrix;  // (K, in, out) in T
    Array bias;    // (K, out) float64
  };
  struct Layout;

  void read_embedding();
  void pack_updates();
  void route_groups(const Array& features);
  void pack_group(int64_t group);
  void pack_layer(size_t layer, int64_t group, std::vector<std::shared_ptr<Block>>& blocks,
                  ops::GroupWeights<T>& w);
  Active active(size_t layer, const char* name, int64_t group) const;
  static Array biases_of(const Active& active);
  static Weights weights_of(const Active& active);
  /// The block of these experts, laid out if it is not there: `fill` writes its memory.
  const Block& block(std::vector<std::shared_ptr<Block>>& blocks, size_t layer, int64_t kind,
                     std::initializer_list<const Active*> experts, const Layout& layout,
                     const std::function<void(const Block&)>& fill);
  bool evict(const std::vector<int64_t>& used);
  void release(size_t group);
  void drop_unused_blocks();

  const Architecture& model_;
  const ops::Kernels<T>& kernels_;
  const std::optional<int64_t> kept_bytes_;
  std::function<int64_t()> memory_left_;
  ModelWeights<T> weights_;
  std::vector<std::vector<T>> update_memory_;
  std::vector<Group> groups_;
  Array features_;                                     // for which the groups were routed
  std::vector<std::map<std::string, Routes>> routes_;  // [layer][router]
  std::map<std::vector<int64_t>, std::shared_ptr<Block>> blocks_;
  std::vector<int64_t> used_;  // in the last evaluation
  uint64_t n_block_ = 0, clock_ = 0;
};

/// out = start (or zeros) + the sum of row times matrix over `products`, `columns` wide.
/// Written out, because the order of the sums in a library's product depends on where the weights lie in
/// memory, and training that is restarted shall go on to the last bit.
template <class T>
void sum_products(const T* start, std::initializer_list<std::pair<const std::vector<T>*, const T*>> products,
                  int64_t columns, T* out);

}  // namespace moecalc
