// A linear map of a layer, as its rows use it: one matrix, or experts by routing group.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "backends/plain/matrix.h"

namespace moecalc::plain {

/// What the rows of one routing group use.
template <class Real>
struct GroupMaps {
  std::vector<std::shared_ptr<const Matrix<Real>>> matrices;  // (n_in, n_out) of every active expert
  std::vector<Real> bias;                                     // (n_active * n_out)
  std::vector<Real> weights;                                  // (n_active) of the sum over experts
};

template <class Real>
struct LinearMap {
  int64_t n_in = 0;
  int64_t n_out = 0;
  int64_t n_active = 1;
  bool routed = false;                  // else group 0 is of all rows
  bool summed = false;                  // outputs of the experts are summed with `weights`
  std::vector<GroupMaps<Real>> groups;  // those without rows are empty

  const GroupMaps<Real>& group(int64_t index) const {
    return groups[static_cast<size_t>(routed ? index : 0)];
  }
};

/// A map without experts; without a bias where `bias` is empty.
template <class Real>
LinearMap<Real> dense_map(Matrix<Real> matrix, std::vector<Real> bias = {}) {
  LinearMap<Real> map;
  map.n_in = matrix.rows();
  map.n_out = matrix.columns();
  map.groups.resize(1);
  map.groups[0].matrices.push_back(std::make_shared<const Matrix<Real>>(std::move(matrix)));
  map.groups[0].bias = std::move(bias);
  map.groups[0].weights = {Real(1)};
  return map;
}

}  // namespace moecalc::plain
