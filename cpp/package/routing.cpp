#include "package/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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
  const int64_t n_group = composition.size(0), n_types = table.size(0), width = table.size(1);
  Array features = shift.defined() ? shift.clone() : Array::zeros({n_group, width}, Dtype::float64);
  const auto* fraction = composition.data<double>();
  const auto* row = table.data<double>();
  auto* to = features.data<double>();
  for (int64_t g = 0; g < n_group; ++g) {
    for (int64_t t = 0; t < n_types; ++t) {
      const double share = fraction[g * n_types + t];
      if (share == 0.0) continue;
      for (int64_t d = 0; d < width; ++d) to[g * width + d] += share * row[t * width + d];
    }
  }
  return features;
}

Routes route(const RouterSource& router, const Array& features) {
  Routes routes;
  const int64_t n_group = features.size(0), width = features.size(1);
  if (!router.is_gate) {
    const int64_t k = router.ids.size(1);
    const auto* ids = router.ids.data<int64_t>();
    const auto* weights = router.weights.data<double>();
    for (int64_t g = 0; g < n_group; ++g) {
      routes.experts.emplace_back(ids + g * k, ids + (g + 1) * k);
      routes.weights.emplace_back(weights + g * k, weights + (g + 1) * k);
    }
    return routes;
  }
  const auto n_routed = static_cast<size_t>(router.n_routed);
  const auto* input = features.data<double>();
  const auto* gate = router.gate.data<double>();
  for (int64_t g = 0; g < n_group; ++g) {
    std::vector<double> logits(n_routed, 0.0);
    for (int64_t d = 0; d < width; ++d) {
      const double x = input[g * width + d];
      for (size_t e = 0; e < n_routed; ++e) logits[e] += x * gate[static_cast<size_t>(d) * n_routed + e];
    }
    if (router.softmax_first) softmax(logits);
    std::vector<int64_t> order(n_routed);
    std::iota(order.begin(), order.end(), 0);
    // equal ones in the order of their ids
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
    });
    order.resize(static_cast<size_t>(router.top_k));
    std::vector<double> weights;
    for (const int64_t e : order) weights.push_back(logits[static_cast<size_t>(e)]);
    if (!router.softmax_first) softmax(weights);
    for (int64_t shared = 0; shared < router.n_shared; ++shared) {
      order.push_back(router.n_routed + shared);
      weights.push_back(1.0);
    }
    routes.experts.push_back(std::move(order));
    routes.weights.push_back(std::move(weights));
  }
  return routes;
}

}  // namespace moecalc
