// The experts of a package that were needed so far, and the maps that routing groups make of them.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "backends/plain/linear_map.h"
#include "package/architecture.h"
#include "package/routing.h"

namespace moecalc::plain {

template <class Real>
class Experts {
 public:
  /// `model` must outlive this.
  explicit Experts(const Architecture& model) : model_(model) {}

  /// The map of a position for the groups `used` out of n_group. `routes`: null where it is not routed.
  LinearMap<Real> map(size_t layer, size_t position, const Routes* routes, const std::vector<int64_t>& used,
                      int64_t n_group);

  int64_t bytes() const;
  void release() { matrices_.clear(); }

 private:
  using Pointer = std::shared_ptr<const Matrix<Real>>;

  Pointer matrix(size_t layer, size_t position, int64_t expert);
  GroupMaps<Real> side_by_side(size_t layer, size_t position, const std::vector<int64_t>& experts,
                               const std::vector<double>& weights);
  GroupMaps<Real> merged(size_t layer, size_t position, const std::vector<int64_t>& experts,
                         const std::vector<double>& weights);

  const Architecture& model_;
  std::map<std::array<int64_t, 3>, Pointer> matrices_;  // by layer, position and expert
};

}  // namespace moecalc::plain
