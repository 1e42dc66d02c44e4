// Charge, multiplicity and frame parameters of structures, as backends use them
// (docs/developer/architecture.md, "Conditions").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moecalc/evaluator.h"
#include "package/architecture.h"

namespace moecalc {

/// What depends on the types and the conditions of the evaluations to come. A model with K distinct
/// conditions runs as one of K n_types types, type = condition * n_types + element: nothing is computed per
/// step. A model that takes none has K = 1.
struct TypeTables {
  GraphRules rules;
  int64_t n_conditions = 1;
  Array nodes;    // (K n_types, n_dim) float64: type embedding, before its activation
  Array fitting;  // (K n_types, n_constant) float64: constant inputs of the fitting net: table, case
                  // embedding, frame parameters
  std::vector<double> energy_shift;   // (K n_types) eV
  std::vector<double> energy_weight;  // (K n_types)
  std::vector<double> mean;           // (K n_types * 4) of the geometry
  std::vector<double> stddev;         // likewise
  /// Router input of every group that depends on the type alone, (n_types or K n_types, n_dim) float64;
  /// undefined where groups are structures.
  Array features;
  Array shift;           // (K, n_dim) float64: what every row of the type table gains; undefined: nothing
  Array fitting_inputs;  // (K, n_constant of the conditions) float64
};

/// Distinct conditions of the structures of an evaluation, and the tables that follow.
class Conditions {
 public:
  explicit Conditions(const Architecture& model) : model_(model) {}

  bool taken() const { return model_.conditions.taken(); }
  /// charge_spin (S, 2) int64 and fparam (S, n_fparam) float64, undefined where the model takes none. Returns
  /// whether the tables are to be made anew. Throws Error.
  bool set(const Array& charge_spin, const Array& fparam);
  /// None are set any more.
  void reset() { given_ = false; }
  /// Throws Error unless conditions for `n_systems` structures were set, where the model takes any.
  void check(int64_t n_systems, int64_t n_ghost) const;
  /// Of what was set; of a model that takes nothing, always there.
  TypeTables tables() const;
  int64_t n_conditions() const { return n_conditions_; }

 private:
  void check_values(const Array& charge_spin, const Array& fparam) const;
  Array shift() const;                                    // (K, n_dim)
  Array constant_inputs(const TypeTables& tables) const;  // (K n_types, n_constant)
  Array fitting_inputs() const;                           // (K, n_fparam + n_case)

  const Architecture& model_;
  bool given_ = false;
  Array values_;  // (K, 2 + n_fparam) float64, distinct
  std::vector<int64_t> of_system_{0};
  int64_t n_conditions_ = 1;
};

/// What a user's values come to with the `conditions` of a package's metadata (text of metadata.json), which
/// say what the model takes and its defaults. Mirrors `resolve` in moecalc/conditions.py. Throws Error.
struct ResolvedConditions {
  Array charge_spin;  // (1, 2) int64; undefined where the model takes none
  Array fparam;       // (1, n_fparam) float64, likewise
  AppliedConditions applied;
};
ResolvedConditions resolve_conditions(const std::string& metadata, const GivenConditions& given);

}  // namespace moecalc
