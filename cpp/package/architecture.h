// What a package says of its model: architecture.json and tensors.json, read and checked as a whole before
// anything uses them, because the kernels take widths and indices for granted. The only reader of a model.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "graph/graph.h"
#include "moecalc/array.h"
#include "moecalc/package_file.h"
#include "ops/layer.h"
#include "ops/switch.h"

namespace moecalc {

/// An activation of the network. The kernels cover all kinds but `softplus`.
struct ActivationSource {
  std::string kind;  // linear, silu, silut, tanh, sigmoid, relu, relu6, gelu, softplus
  double threshold = 0.0, slope = 0.0, offset = 0.0;  // silut only
  bool operator==(const ActivationSource&) const = default;
};

/// Numbers of the package that stay in the file until they are read.
class StoredArray {
 public:
  StoredArray() = default;
  StoredArray(std::shared_ptr<const PackageFile> file, uint64_t position, Shape shape, Dtype dtype);

  const Shape& shape() const { return shape_; }
  int64_t size(size_t d) const { return shape_[d]; }
  Dtype dtype() const { return dtype_; }
  /// All numbers, or those of the rows `index` of dimension 0, in another type. Throws Error where the file
  /// is unreadable.
  Array read(Dtype dtype) const;
  Array select(const std::vector<int64_t>& index, Dtype dtype) const;
  /// Whether all of its numbers are. They are read for it, a chunk at a time.
  bool is_finite() const;

 private:
  std::shared_ptr<const PackageFile> file_;
  uint64_t position_ = 0;
  Shape shape_;
  Dtype dtype_ = Dtype::float64;
};

/// From element or group features to experts: a gate, or the table of its answers.
struct RouterSource {
  bool is_gate = false;
  int64_t n_routed = 0, n_shared = 0, top_k = 0;
  bool softmax_first = false;
  Array gate;          // (n_dim, n_routed) float64
  Array ids, weights;  // (n_types, K) int64 and float64
};

/// One linear map of a layer: a stack of experts, of which a dense map is the case of one.
struct PositionSource {
  std::string name;    // node_self_mlp, ...
  StoredArray matrix;  // (E, in, out)
  Array bias;          // (E, out) float64
  std::string router;  // "": dense
  bool routed = false;
  bool merge = false;  // MoLE: experts are averaged before the activation
};

struct LayerSource {
  /// Widths; k_* are those of the routing (1 where dense).
  ops::LayerShape shape;
  ActivationSource phi;
  bool sequential = false;  // node, edge and angle updates use each other's new values
  bool average = false, with_residual = false;
  std::vector<PositionSource> positions;
  std::map<std::string, RouterSource> routers;
  int64_t vc_dim = 0, ec_dim = 0;
  bool compress_split = false;   // the first columns stand for the compressed features
  Array compress_n, compress_e;  // float64 (n, vc), (e, ec); undefined where nothing is multiplied
  /// Coefficients of the updates, float64: (2 + heads, n), (2 or 1, e), (1, a); constants of res_avg and
  /// res_incr included; undefined where there is no update.
  Array update_n, update_e, update_a;

  const PositionSource* find(const std::string& name) const {
    for (const PositionSource& position : positions) {
      if (position.name == name) return &position;
    }
    return nullptr;
  }
};

struct GeometryRules {
  ops::Switch edge, angle;
  bool use_dist = false;
  double protection = 0.0;
  std::vector<double> mean, stddev;  // (n_types * 4)
};

struct EmbeddingSource {
  bool use_dist = false;  // edge features are distances, not activated
  ActivationSource phi;
  Array table;                   // (n_types, n_dim) float64, before the activation
  Array router_table;            // the routers' own; undefined: `table`
  Array edge_matrix, edge_bias;  // (e_dim) float64
  Array angle_matrix;            // (a_dim) float64: a = cos / sqrt(pi) * angle_matrix
};

/// Charge, multiplicity and frame parameters (docs/architecture.md); all float64.
struct ConditionSource {
  bool takes_charge_spin = false;
  bool routed = false;  // experts depend on charge and multiplicity
  int64_t n_fparam = 0, n_case = 0;
  int64_t charge_offset = 100;
  Array charge_matrix, spin_matrix, mix_matrix, mix_bias;  // (200, n), (100, n), (2n, n), (n)
  ActivationSource phi;
  Array fparam_avg, fparam_inv_std, case_embedding;  // (n_fparam), (n_fparam), (n_case)

  bool taken() const { return takes_charge_spin || n_fparam > 0; }
};

struct FittingLayerSource {
  Array matrix, bias, idt;  // float64 (in, out), (out), (out); idt undefined: ones
  int64_t residual = 0;     // copies of the input that are added: 0, 1 or 2
  ActivationSource phi;
};

struct ReadoutSource {
  Dtype dtype = Dtype::float64;  // that the net computes in
  bool concat_table = false;     // the net reads the type table `table` beside the features
  Array table;                   // (n_types, n_dim) float64
  Array case_embedding;          // (n_case) float64: constant inputs; undefined: none
  int64_t n_constant = 0;        // inputs that conditions give, after those
  std::vector<FittingLayerSource> layers;
  Array out_matrix;  // (width) float64
  double out_bias = 0.0;
  std::vector<double> shift, weight;  // (n_types)
};

struct Architecture {
  std::vector<std::string> elements;
  GraphRules rules;  // of one condition
  Dtype dtype = Dtype::float64;
  int64_t n_dim = 0, e_dim = 0, a_dim = 0;
  GeometryRules geometry;
  EmbeddingSource embedding;
  ConditionSource conditions;
  std::vector<LayerSource> layers;
  ReadoutSource readout;

  int64_t n_types() const { return static_cast<int64_t>(elements.size()); }
};

/// A package that was read and checked.
struct LoadedPackage {
  std::shared_ptr<const PackageFile> file;
  std::string metadata, reference;  // text of metadata.json and reference.json
  Facts facts;
  Architecture architecture;
};

/// Opens a package and checks everything: the file's integrity, its content (`check_package`), types, shapes,
/// index ranges, that numbers are finite, and that model and metadata say the same. Throws Error that names
/// what is wrong and begins with `path`.
LoadedPackage load_package(const std::string& path);

/// The kernels' activation; none where they have none.
MOECALC_API std::optional<ops::Activation> kernel_activation(const ActivationSource& phi);

/// phi(x), and its derivative, in float64: for constants.
double activate(const ActivationSource& phi, double x);

/// A package that the kernels do not cover.
struct MOECALC_API Unsupported {
  std::string reason;
};

}  // namespace moecalc
