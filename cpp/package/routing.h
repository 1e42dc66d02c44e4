// Which experts a routing group uses, and with what weights.
#pragma once

#include <cstdint>
#include <vector>

#include "moecalc/array.h"
#include "package/architecture.h"

namespace moecalc {

/// Answers of a router for every group, in the order of its experts' ids as the model uses them.
struct Routes {
  std::vector<std::vector<int64_t>> experts;  // per group: top_k, then the shared ones
  std::vector<std::vector<double>> weights;   // the same shape
};

/// `features` (G, n_dim) float64: router input of every group, which tables do not read: group g of a table
/// is its row g.
Routes route(const RouterSource& router, const Array& features);

/// Router input of groups (SPEC sections 7 and 12): composition (G, n_types) float64 times the routers' type
/// table, plus `shift` (G, n_dim) where it is defined.
Array group_features(const EmbeddingSource& embedding, const Array& composition, const Array& shift);

}  // namespace moecalc
