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
#include "kernels/common/layer.h"
#include "kernels/common/switch.h"
#include "moecalc/array.h"
#include "moecalc/package_file.h"
#include "package/stored_array.h"

namespace moecalc {

/// An activation of the network. The kernels cover all kinds but `softplus`.
struct ActivationSource {
  std::string kind;        // linear, silu, silut, tanh, sigmoid, relu, relu6, gelu, softplus
  double threshold = 0.0;  // silut only, as are the two below
  double slope = 0.0;
  double offset = 0.0;

  bool operator==(const ActivationSource&) const = default;
};

/// From element or group features to experts: a gate, or the table of its answers.
struct RouterSource {
  bool is_gate = false;
  int64_t n_routed = 0;
  int64_t n_shared = 0;
  int64_t top_k = 0;
  bool softmax_first = false;
  Array gate;     // (n_dim, n_routed) float64
  Array ids;      // (n_types, K) int64
  Array weights;  // (n_types, K) float64
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
  /// Widths; experts_* are those of the routing (1 where dense).
  kernels::LayerShape shape;
  ActivationSource phi;
  bool sequential = false;  // node, edge and angle updates use each other's new values
  bool average = false;
  bool with_residual = false;
  std::vector<PositionSource> positions;
  std::map<std::string, RouterSource> routers;
  int64_t vc_dim = 0;
  int64_t ec_dim = 0;
  bool compress_split = false;  // the first columns stand for the compressed features
  Array compress_n;             // (n, vc) float64; undefined where nothing is multiplied
  Array compress_e;             // (e, ec) likewise
  /// Coefficients of the updates, float64; constants of res_avg and res_incr included; undefined where there
  /// is no update.
  Array update_node;   // (2 + heads, n)
  Array update_edge;   // (2 or 1, e)
  Array update_angle;  // (1, a)

  const PositionSource* find(const std::string& name) const {
    for (const PositionSource& position : positions) {
      if (position.name == name) return &position;
    }
    return nullptr;
  }
};

struct GeometryRules {
  kernels::Switch edge;
  kernels::Switch angle;
  bool use_dist = false;
  double protection = 0.0;
  std::vector<double> mean;    // (n_types * 4)
  std::vector<double> stddev;  // (n_types * 4)
};

struct EmbeddingSource {
  bool use_dist = false;  // edge features are distances, not activated
  ActivationSource phi;
  Array table;         // (n_types, n_dim) float64, before the activation
  Array router_table;  // the routers' own; undefined: `table`
  Array edge_matrix;   // (e_dim) float64
  Array edge_bias;     // (e_dim) float64
  Array angle_matrix;  // (a_dim) float64: a = cos / sqrt(pi) * angle_matrix
};

/// Charge, multiplicity and frame parameters (docs/developer/architecture.md); all float64.
struct ConditionSource {
  bool takes_charge_spin = false;
  bool routed = false;  // experts depend on charge and multiplicity
  int64_t n_fparam = 0;
  int64_t n_case = 0;
  int64_t charge_offset = 100;
  Array charge_matrix;  // (200, n)
  Array spin_matrix;    // (100, n)
  Array mix_matrix;     // (2n, n)
  Array mix_bias;       // (n)
  ActivationSource phi;
  Array fparam_avg;      // (n_fparam)
  Array fparam_inv_std;  // (n_fparam)
  Array case_embedding;  // (n_case)

  bool taken() const { return takes_charge_spin || n_fparam > 0; }
};

struct FittingLayerSource {
  Array matrix;          // (in, out) float64
  Array bias;            // (out) float64
  Array idt;             // (out) float64; undefined: ones
  int64_t residual = 0;  // copies of the input that are added: 0, 1 or 2
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
  std::vector<double> shift;   // (n_types)
  std::vector<double> weight;  // (n_types)
};

struct Architecture {
  std::vector<std::string> elements;
  GraphRules rules;  // of one condition
  Dtype dtype = Dtype::float64;
  int64_t n_dim = 0;
  int64_t e_dim = 0;
  int64_t a_dim = 0;
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
  std::string metadata;   // text of metadata.json
  std::string reference;  // text of reference.json
  Facts facts;
  Architecture architecture;
};

/// Opens a package and checks everything: the file's integrity, its content (`check_package`), types, shapes,
/// index ranges, that numbers are finite, and that model and metadata say the same. Throws Error that names
/// what is wrong and begins with `path`.
LoadedPackage load_package(const std::string& path);

/// The kernels' activation; none where they have none.
MOECALC_API std::optional<kernels::Activation> kernel_activation(const ActivationSource& phi);

/// phi(x), and its derivative, in float64: for constants.
double activate(const ActivationSource& phi, double x);

/// A package that the kernels do not cover.
struct MOECALC_API Unsupported {
  std::string reason;
};

}  // namespace moecalc
