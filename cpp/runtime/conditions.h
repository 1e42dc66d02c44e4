// Charge, multiplicity and frame parameters of structures, as the evaluator uses them (docs/architecture.md,
// "Conditions").
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"

namespace moecalc {

/// Distinct conditions of the structures of an evaluation, and what they change. A model with K of them runs
/// as one of K n_types types, type = condition * n_types + element, whose tables have K n_types rows: nothing
/// is computed per step.
class Conditions {
 public:
  /// `model`: a package's; packages of format 1 have no submodule `conditions` and take nothing.
  explicit Conditions(const torch::jit::Module& model);

  bool taken() const { return takes_charge_spin_ || n_fparam_ > 0; }
  /// Whether experts depend on charge and multiplicity.
  bool routed() const { return routed_; }

  /// charge_spin (S, 2) int64 and fparam (S, n_fparam) float64, on the CPU, undefined where the model takes
  /// none. Returns whether the distinct conditions are others than before. Throws Error.
  bool set(const at::Tensor& charge_spin, const at::Tensor& fparam);

  /// None are set any more.
  void reset() { given_ = false; }

  /// Throws Error unless conditions for `n_systems` structures were set, where the model takes any.
  void check(int64_t n_systems, int64_t n_ghost) const;
  /// Condition of every structure; one entry: of all.
  const std::vector<int64_t>& of_system() const { return of_system_; }
  int64_t n() const { return n_; }

  /// (K, n_dim) float64: what every row of the type table gains; undefined where the model takes no charge.
  const at::Tensor& shift() const { return shift_; }
  /// (K, n_constant) float64: constant inputs of the fitting net.
  const at::Tensor& fitting_inputs() const { return fitting_inputs_; }

 private:
  void check_values(const at::Tensor& charge_spin, const at::Tensor& fparam) const;

  torch::jit::Module module_;
  bool takes_charge_spin_ = false, routed_ = false;
  int64_t n_fparam_ = 0, n_case_ = 0;
  bool given_ = false;
  at::Tensor values_;  // (K, 2 + n_fparam) float64, distinct
  std::vector<int64_t> of_system_{0};
  int64_t n_ = 1;
  at::Tensor shift_, fitting_inputs_;
};

/// What a user's values come to with the `conditions` of a package's metadata (text of metadata.json), which
/// say what the model takes and its defaults. Mirrors `resolve` in moecalc/conditions.py. Throws Error.
struct ResolvedConditions {
  at::Tensor charge_spin, fparam;  // (1, 2) int64, (1, n) float64; undefined where the model takes none
  AppliedConditions applied;
};
ResolvedConditions resolve_conditions(const std::string& metadata, const GivenConditions& given);

/// One row per (condition, element).
struct TypeTables {
  int64_t n_conditions = 1;
  at::Tensor nodes;    // (K n_types, n_dim), dtype of the network: type embedding, before its activation
  at::Tensor fitting;  // (K n_types, n_constant) float64: constant inputs of the fitting net
};

/// Tables of a package for the conditions that were set.
TypeTables type_tables(const Conditions& conditions, const torch::jit::Module& embedding,
                       const torch::jit::Module& readout);

}  // namespace moecalc
