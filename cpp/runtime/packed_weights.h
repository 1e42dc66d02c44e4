// The weights of a package as the kernels want them: per routing group, active experts side by side. Groups
// are laid out when they first have atoms. Shared by the CPU kernels and the device model.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../ops/layer.h"
#include "../ops/switch.h"
#include "conditions.h"
#include "memory.h"
#include "package_reader.h"

namespace moecalc {

/// Raised while reading a package: the kernels do not cover it.
struct Unsupported {
  std::string reason;
};

ops::Activation activation_of(const torch::jit::Module& phi);

struct GeometryRules {
  ops::Switch edge, angle;
  bool use_dist;
  double protection;
  std::vector<double> mean, stddev;  // (K n_types * 4), the same for all K conditions
};

/// Matrices of the experts of a position, (E, in, out), in memory or still in the package file.
class ExpertMatrices {
 public:
  ExpertMatrices() = default;
  ExpertMatrices(const at::Tensor& values, const DeferredTensors* deferred);

  int64_t size(size_t dimension) const { return sizes_[dimension]; }
  /// Those of the experts `ids`: (K, in, out) on the CPU, in `dtype`. Throws Error where the file is
  /// unreadable.
  at::Tensor select(const std::vector<int64_t>& ids, at::ScalarType dtype) const;

 private:
  std::vector<int64_t> sizes_;
  at::Tensor values_;  // undefined: in the file
  std::shared_ptr<const PackageFile> file_;
  uint64_t position_ = 0;
  at::ScalarType stored_ = at::kDouble;
};

/// One position of a layer as read from the package.
struct Position {
  ExpertMatrices matrix;
  at::Tensor bias;  // (E, out) float64
  std::string router;
  bool routed = false, merge = false;
};

struct LayerSource {
  torch::jit::Module module;
  ops::LayerShape shape;
  std::vector<std::string> names;
  std::vector<Position> positions;
  int64_t e_dim = 0, vc_dim = 0, ec_dim = 0;
  at::Tensor compress_n, compress_e;  // float64, undefined where columns are split or nothing is compressed
  at::Tensor update_n, update_e, update_a;  // float64, unpadded: (q, dim)

  const Position* find(const std::string& name) const {
    for (size_t k = 0; k < names.size(); ++k) {
      if (names[k] == name) return &positions[k];
    }
    return nullptr;
  }
};

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

/// What a package says, in the dtype of the network, and the weights of its routing groups.
template <class T>
class PackedWeights {
 public:
  using Block = WeightBlock<T>;

  /// Throws Unsupported. `kernels`: for activations of constants. `deferred`: weights that are still in the
  /// file.
  PackedWeights(const torch::jit::Module& geometry, const torch::jit::Module& embedding,
                const std::vector<torch::jit::Module>& layers, const ops::Kernels<T>& kernels,
                const DeferredTensors* deferred);

  /// `features` (G, n_dim): router input of every group; `used`: groups whose weights the evaluation to come
  /// reads. Lays out those that are not yet, and keeps the others as long as memory allows. Groups are told
  /// by their index: their number may grow, but other features of the same groups replace all that there was.
  /// Returns whether any weights changed.
  bool set_groups(const at::Tensor& features, const std::vector<int64_t>& used);
  /// Gives back the weights of all groups but those `in_use`.
  void release_groups(const std::vector<int64_t>& in_use = {});
  /// Tables of the types from now on.
  void set_types(const TypeTables& tables);
  int64_t n_packed_groups() const;
  int64_t packed_bytes() const;  // of host memory
  /// Sets what stands for the weights of edge and angle features in the first layer (`GroupWeights`: edge_r
  /// to angle_r_b, angle_cos). Reads the other weights of `w`.
  void pack_first_layer(const ops::LayerShape& shape, ops::GroupWeights<T>& w);

  const ops::Kernels<T>& kernels_;
  GeometryRules rules_;
  ops::Activation phi_;
  bool use_dist_ = true;
  std::vector<T> edge_matrix_, edge_bias_, angle_direction_;  // padded; a = cos * angle_direction
  std::vector<LayerSource> layers_;
  std::vector<T> node_table_;  // phi(Y), (K n_types x np)

  std::vector<at::Tensor> memory_;                          // of the updates, and of weights set in training
  std::vector<std::vector<ops::GroupWeights<T>>> weights_;  // [layer][group]; null: not laid out
  std::vector<ops::UpdateVectors<T>> updates_;

  struct Group {
    std::vector<std::shared_ptr<Block>> blocks;  // none: not laid out
    uint64_t last_use = 0;
  };
  std::vector<Group> groups_;
  /// What groups without atoms may keep, in bytes.
  std::function<int64_t()> memory_left_ = quarter_of_available_memory;

 private:
  /// Routes of all groups by one router.
  struct Routes {
    std::vector<std::vector<int64_t>> experts;  // per group
    at::Tensor p;                               // (G, K) float64
  };
  /// What a group uses at a position.
  struct Active {
    const Position* position = nullptr;
    std::vector<int64_t> experts;
    at::Tensor p, mixed;  // (K,) float64; where experts are merged: their weights, while `p` is 1

    int64_t k() const { return p.size(0); }
  };
  struct Weights {
    at::Tensor matrix, bias;  // (K, in, out) in T, (K, out) float64
  };
  struct Layout;

  void read_geometry(const torch::jit::Module& module);
  void read_embedding(const torch::jit::Module& module);
  void set_node_table(const at::Tensor& rows);
  LayerSource read_layer(const torch::jit::Module& module, const DeferredTensors* deferred);
  static Position read_position(const torch::jit::Module& module, const DeferredTensors* deferred);
  void route(const at::Tensor& features);
  void pack_updates();
  void pack_group(int64_t group);
  void pack_layer(size_t layer, int64_t group, std::vector<std::shared_ptr<Block>>& blocks,
                  ops::GroupWeights<T>& w);
  Active active(size_t layer, const char* name, int64_t group) const;
  static at::Tensor biases_of(const Active& active);  // (K, out) float64
  static Weights weights_of(const Active& active);
  /// The block of these experts, laid out if it is not there: `fill` writes its memory.
  const Block& block(std::vector<std::shared_ptr<Block>>& blocks, size_t layer, int64_t kind,
                     std::initializer_list<const Active*> experts, const Layout& layout,
                     const std::function<void(const Block&)>& fill);
  bool evict(const std::vector<int64_t>& used);
  void release(size_t group);
  void drop_unused_blocks();
  const T* keep(const at::Tensor& values);

  const int64_t kept_;                                 // of MOECALC_WEIGHTS
  at::Tensor features_;                                // for which the groups were routed
  std::vector<std::map<std::string, Routes>> routes_;  // [layer][router]
  std::map<std::vector<int64_t>, std::shared_ptr<Block>> blocks_;
  std::vector<int64_t> used_;  // in the last evaluation
  uint64_t n_block_ = 0, clock_ = 0;
};

}  // namespace moecalc
