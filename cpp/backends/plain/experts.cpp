#include "backends/plain/experts.h"

namespace moecalc::plain {

template <class Real>
auto Experts<Real>::matrix(size_t layer, size_t position, int64_t expert) -> Pointer {
  Pointer& kept = matrices_[{static_cast<int64_t>(layer), static_cast<int64_t>(position), expert}];
  if (kept == nullptr) {
    const StoredArray& stored = model_.layers[layer].positions[position].matrix;
    const Array values = stored.select({expert}, dtype_of<Real>);
    kept = std::make_shared<const Matrix<Real>>(
        Matrix<Real>::of(values.template data<Real>(), stored.size(1), stored.size(2)));
  }
  return kept;
}

template <class Real>
GroupMaps<Real> Experts<Real>::side_by_side(size_t layer, size_t position,
                                            const std::vector<int64_t>& experts,
                                            const std::vector<double>& weights) {
  const Array& bias = model_.layers[layer].positions[position].bias;
  GroupMaps<Real> group;
  for (const int64_t expert : experts) {
    group.matrices.push_back(matrix(layer, position, expert));
    const double* row = bias.data<double>() + expert * bias.size(1);
    for (int64_t c = 0; c < bias.size(1); ++c) group.bias.push_back(Real(row[c]));
  }
  for (const double weight : weights) group.weights.push_back(Real(weight));
  return group;
}

/// The experts' mean with these weights, as one expert (MoLE).
template <class Real>
GroupMaps<Real> Experts<Real>::merged(size_t layer, size_t position, const std::vector<int64_t>& experts,
                                      const std::vector<double>& weights) {
  const PositionSource& source = model_.layers[layer].positions[position];
  const int64_t n_in = source.matrix.size(1);
  const int64_t n_out = source.matrix.size(2);
  std::vector<double> sum(static_cast<size_t>(n_in * n_out), 0.0);
  std::vector<double> bias(static_cast<size_t>(n_out), 0.0);
  for (size_t k = 0; k < experts.size(); ++k) {
    const Real* values = matrix(layer, position, experts[k])->data();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += weights[k] * static_cast<double>(values[i]);
    const double* row = source.bias.template data<double>() + experts[k] * n_out;
    for (size_t c = 0; c < bias.size(); ++c) bias[c] += weights[k] * row[c];
  }
  GroupMaps<Real> group;
  group.matrices.push_back(std::make_shared<const Matrix<Real>>(Matrix<Real>::of(sum.data(), n_in, n_out)));
  for (const double value : bias) group.bias.push_back(Real(value));
  group.weights = {Real(1)};
  return group;
}

template <class Real>
LinearMap<Real> Experts<Real>::map(size_t layer, size_t position, const Routes* routes,
                                   const std::vector<int64_t>& used, int64_t n_group) {
  const PositionSource& source = model_.layers[layer].positions[position];
  LinearMap<Real> map;
  map.n_in = source.matrix.size(1);
  map.n_out = source.matrix.size(2);
  map.routed = routes != nullptr;
  if (!map.routed) {
    map.groups.push_back(side_by_side(layer, position, {0}, {1.0}));
    return map;
  }
  map.summed = !source.merge;
  map.groups.resize(static_cast<size_t>(n_group));
  for (const int64_t group : used) {
    const auto index = static_cast<size_t>(group);
    const std::vector<int64_t>& experts = routes->experts[index];
    const std::vector<double>& weights = routes->weights[index];
    map.groups[index] = source.merge ? merged(layer, position, experts, weights)
                                     : side_by_side(layer, position, experts, weights);
    map.n_active = static_cast<int64_t>(map.groups[index].matrices.size());
  }
  return map;
}

template <class Real>
int64_t Experts<Real>::bytes() const {
  int64_t sum = 0;
  for (const auto& entry : matrices_) {  // null: could not be read
    if (entry.second != nullptr) sum += entry.second->size() * static_cast<int64_t>(sizeof(Real));
  }
  return sum;
}

template class Experts<float>;
template class Experts<double>;

}  // namespace moecalc::plain
