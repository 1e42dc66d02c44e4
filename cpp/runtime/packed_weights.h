// The weights of a package as the kernels want them: one block per routing group, active experts side by
// side. Shared by the CPU kernels and the device model.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../ops/layer.h"
#include "../ops/switch.h"

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
  std::vector<double> mean, stddev;  // (n_types * 4)
};

/// One position of a layer as read from the package.
struct Position {
  at::Tensor matrix, bias;  // (E, in, out), (E, out) float64
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

/// What a package says, in the dtype of the network, and the weights of its routing groups.
template <class T>
class PackedWeights {
 public:
  /// Throws Unsupported. `kernels`: for activations of constants.
  PackedWeights(const torch::jit::Module& geometry, const torch::jit::Module& embedding,
                const std::vector<torch::jit::Module>& layers, const ops::Kernels<T>& kernels);

  /// `features` (G, n_dim): router input of every group. Returns whether the weights changed.
  bool set_groups(const at::Tensor& features);
  /// Sets what stands for the weights of edge and angle features in the first layer (`GroupWeights`: edge_r
  /// to angle_r_b, angle_cos). Reads the other weights of `w`.
  void pack_first_layer(const ops::LayerShape& shape, ops::GroupWeights<T>& w);

  const ops::Kernels<T>& kernels_;
  GeometryRules rules_;
  ops::Activation phi_;
  bool use_dist_ = true;
  std::vector<T> edge_matrix_, edge_bias_, angle_direction_;  // padded; a = cos * angle_direction
  std::vector<LayerSource> layers_;
  std::vector<T> node_table_;  // phi(Y), (n_types x np)

  at::Tensor features_;                                     // for which the weights below were packed
  std::vector<at::Tensor> memory_;                          // of the packed weights
  std::vector<std::vector<ops::GroupWeights<T>>> weights_;  // [layer][group]
  std::vector<ops::UpdateVectors<T>> updates_;

 private:
  void read_geometry(const torch::jit::Module& module);
  void read_embedding(const torch::jit::Module& module);
  LayerSource read_layer(const torch::jit::Module& module);
  static Position read_position(const torch::jit::Module& module);
  void pack_layer(const LayerSource& source, const at::Tensor& features);
  const T* keep(const at::Tensor& values);
  const T* keep_transposed(const at::Tensor& values) { return keep(values.t()); }
};

}  // namespace moecalc
