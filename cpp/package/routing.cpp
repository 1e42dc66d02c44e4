#include "package/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace moecalc {

namespace {

/// exp(x - max) / sum, in place.
void softmax(std::vector<double>& values) {
  if (values.empty()) return;  // shared experts alone
  const double most = *std::max_element(values.begin(), values.end());
  double sum = 0.0;
  for (double& value : values) {
    value = std::exp(value - most);
    sum += value;
  }
  for (double& value : values) value /= sum;
}

}  // namespace

Array group_features(const EmbeddingSource& embedding, const Array& composition, const Array& shift) {
  const Array& table = embedding.router_table.defined() ? embedding.router_table : embedding.table;
  const int64_t n_group = composition.size(0);
  const int64_t n_types = table.size(0);
  const int64_t width = table.size(1);
  Array features = shift.defined() ? shift.clone() : Array::zeros({n_group, width}, Dtype::float64);
  const auto* fraction = composition.data<double>();
  const auto* row = table.data<double>();
  auto* to = features.data<double>();
  for (int64_t group = 0; group < n_group; ++group) {
    for (int64_t t = 0; t < n_types; ++t) {
      const double share = fraction[group * n_types + t];
      if (share == 0.0) continue;
      for (int64_t d = 0; d < width; ++d) to[group * width + d] += share * row[t * width + d];
    }
  }
  return features;
}

namespace {

/// Ids of the `top_k` largest logits; equal ones in the order of their ids.
std::vector<int64_t> largest(const std::vector<double>& logits, int64_t top_k) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t left, int64_t right) {
    return logits[static_cast<size_t>(left)] > logits[static_cast<size_t>(right)];
  });
  order.resize(static_cast<size_t>(top_k));
  return order;
}

/// SPEC sections 7 and 10: logits = input G; the softmax is over the chosen ones, or over all before. Shared
/// experts have weight 1.
void add_gated(const RouterSource& router, const double* input, int64_t width, Routes& routes) {
  const auto n_routed = static_cast<size_t>(router.n_routed);
  const auto* gate = router.gate.data<double>();
  std::vector<double> logits(n_routed, 0.0);
  for (int64_t d = 0; d < width; ++d) {
    for (size_t e = 0; e < n_routed; ++e) logits[e] += input[d] * gate[static_cast<size_t>(d) * n_routed + e];
  }
  if (router.softmax_first) softmax(logits);
  std::vector<int64_t> order = largest(logits, router.top_k);
  std::vector<double> weights;
  for (const int64_t expert : order) weights.push_back(logits[static_cast<size_t>(expert)]);
  if (!router.softmax_first) softmax(weights);
  for (int64_t shared = 0; shared < router.n_shared; ++shared) {
    order.push_back(router.n_routed + shared);
    weights.push_back(1.0);
  }
  routes.experts.push_back(std::move(order));
  routes.weights.push_back(std::move(weights));
}

}  // namespace

Routes route(const RouterSource& router, const Array& features) {
  Routes routes;
  const int64_t n_group = features.size(0);
  const int64_t width = features.size(1);
  for (int64_t group = 0; group < n_group; ++group) {
    if (router.is_gate) {
      add_gated(router, features.data<double>() + group * width, width, routes);
      continue;
    }
    const int64_t n_expert = router.ids.size(1);
    const auto* ids = router.ids.data<int64_t>() + group * n_expert;
    const auto* weights = router.weights.data<double>() + group * n_expert;
    routes.experts.emplace_back(ids, ids + n_expert);
    routes.weights.emplace_back(weights, weights + n_expert);
  }
  return routes;
}

}  // namespace moecalc
