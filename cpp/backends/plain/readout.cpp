#include "backends/plain/readout.h"

#include <utility>

#include "backends/plain/tape.h"

namespace moecalc::plain {

namespace {

template <class Real>
std::vector<Real> row_of(const Array& values) {
  const Array typed = values.to(dtype_of<Real>);
  return {typed.data<Real>(), typed.data<Real>() + typed.numel()};
}

/// `Real`: what the net computes in.
template <class Real>
class FittingNet final : public Readout {
 public:
  FittingNet(const ReadoutSource& source, ThreadPool& threads) : source_(source), threads_(threads) {
    for (const FittingLayerSource& layer : source.layers) {
      maps_.push_back(dense_map(Matrix<Real>::of(layer.matrix), row_of<Real>(layer.bias)));
    }
    const std::vector<Real> out = row_of<Real>(source.out_matrix);
    const auto width = static_cast<int64_t>(out.size());
    maps_.push_back(dense_map(Matrix<Real>::of(out.data(), width, 1), {Real(source.out_bias)}));
  }

  void set_tables(const TypeTables& tables) override {
    constants_ = Matrix<Real>::of(tables.fitting);
    shift_ = tables.energy_shift;
    weight_ = tables.energy_weight;
  }

  /// E_i = (net(v_i, constants of its type) + shift) * weight.
  std::vector<double> evaluate(const Matrix<double>& features, const std::vector<int64_t>& types,
                               Matrix<double>* d_features) override {
    const int64_t n_atom = features.rows();
    const int64_t width = features.columns();
    Tape<Real> tape(threads_, d_features != nullptr);
    const Variable<Real> given = tape.leaf(Matrix<Real>::of(features.data(), n_atom, width));
    const Variable<Real> constants = tape.constant(constants_of(types, n_atom));
    const Variable<Real> net = run(tape, tape.joined({given, constants}));
    std::vector<double> energies(static_cast<size_t>(n_atom));
    Matrix<Real> seed = Matrix<Real>::empty(n_atom, 1);
    for (int64_t i = 0; i < n_atom; ++i) {
      const auto type = static_cast<size_t>(types[static_cast<size_t>(i)]);
      energies[static_cast<size_t>(i)] = (static_cast<double>(net->row(i)[0]) + shift_[type]) * weight_[type];
      seed.row(i)[0] = Real(weight_[type]);
    }
    if (d_features == nullptr) return energies;
    tape.backward(net, std::move(seed));
    *d_features = Matrix<double>::of(given.gradient->take().data(), n_atom, width);
    return energies;
  }

  int64_t bytes() const override {
    int64_t count = constants_.size();
    for (const LinearMap<Real>& map : maps_) count += (map.n_in + 1) * map.n_out;
    return count * static_cast<int64_t>(sizeof(Real));
  }

 private:
  /// Hidden layers: phi(x W + b) * idt, plus copies of x; then the last map.
  Variable<Real> run(Tape<Real>& tape, Variable<Real> values) const {
    for (size_t k = 0; k < source_.layers.size(); ++k) {
      const FittingLayerSource& layer = source_.layers[k];
      std::vector<Term<Real>> terms;
      terms.push_back({tape.activated(tape.product(values, maps_[k], 0, no_groups_, true), layer.phi), {}});
      if (layer.idt.defined()) terms[0].coefficients = row_of<Real>(layer.idt);
      if (layer.residual == 1) terms.push_back({values, {}});
      if (layer.residual == 2) terms.push_back({tape.joined({values, values}), {}});
      values = tape.combination(terms);
    }
    return tape.product(values, maps_.back(), 0, no_groups_, true);
  }

  Matrix<Real> constants_of(const std::vector<int64_t>& types, int64_t n_atom) const {
    Matrix<Real> rows = Matrix<Real>::empty(n_atom, constants_.columns());
    for (int64_t i = 0; i < n_atom; ++i) {
      std::copy_n(constants_.row(types[static_cast<size_t>(i)]), rows.columns(), rows.row(i));
    }
    return rows;
  }

  const ReadoutSource& source_;
  ThreadPool& threads_;
  const std::vector<int64_t> no_groups_;
  std::vector<LinearMap<Real>> maps_;  // of the layers, and the last one
  Matrix<Real> constants_;             // (K n_types, n_constant)
  std::vector<double> shift_;
  std::vector<double> weight_;
};

}  // namespace

std::unique_ptr<Readout> make_readout(const ReadoutSource& source, Dtype dtype, ThreadPool& threads) {
  if (dtype == Dtype::float32) return std::make_unique<FittingNet<float>>(source, threads);
  return std::make_unique<FittingNet<double>>(source, threads);
}

}  // namespace moecalc::plain
