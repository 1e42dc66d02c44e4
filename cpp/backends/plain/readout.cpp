#include "backends/plain/readout.h"

#include <utility>

#include "backends/plain/tape.h"

namespace moecalc::plain {

namespace {

template <class T>
std::vector<T> row_of(const Array& values) {
  const Array typed = values.to(dtype_of<T>);
  return {typed.data<T>(), typed.data<T>() + typed.numel()};
}

/// T: what the net computes in.
template <class T>
class FittingNet final : public Readout {
 public:
  FittingNet(const ReadoutSource& source, ThreadPool& threads) : source_(source), threads_(threads) {
    for (const FittingLayerSource& layer : source.layers) {
      maps_.push_back(dense_map(Matrix<T>::of(layer.matrix), row_of<T>(layer.bias)));
    }
    const std::vector<T> out = row_of<T>(source.out_matrix);
    const auto width = static_cast<int64_t>(out.size());
    maps_.push_back(dense_map(Matrix<T>::of(out.data(), width, 1), {T(source.out_bias)}));
  }

  void set_tables(const TypeTables& tables) override {
    constants_ = Matrix<T>::of(tables.fitting);
    shift_ = tables.energy_shift;
    weight_ = tables.energy_weight;
  }

  std::vector<double> evaluate(const Matrix<double>& v, const std::vector<int64_t>& types,
                               Matrix<double>* dv) override {
    const int64_t n = v.rows();
    Tape<T> tape(threads_, dv != nullptr);
    const Variable<T> features = tape.leaf(Matrix<T>::of(v.data(), n, v.columns()));
    const Variable<T> net = run(tape, tape.joined({features, tape.constant(constants_of(types, n))}));
    std::vector<double> energies(static_cast<size_t>(n));
    Matrix<T> seed = Matrix<T>::empty(n, 1);
    for (int64_t i = 0; i < n; ++i) {
      const auto type = static_cast<size_t>(types[static_cast<size_t>(i)]);
      energies[static_cast<size_t>(i)] = (static_cast<double>(net->row(i)[0]) + shift_[type]) * weight_[type];
      seed.row(i)[0] = T(weight_[type]);
    }
    if (dv == nullptr) return energies;
    tape.backward(net, std::move(seed));
    *dv = Matrix<double>::of(features.gradient->take().data(), n, v.columns());
    return energies;
  }

  int64_t bytes() const override {
    int64_t n = constants_.size();
    for (const LinearMap<T>& map : maps_) n += (map.n_in + 1) * map.n_out;
    return n * static_cast<int64_t>(sizeof(T));
  }

 private:
  Variable<T> run(Tape<T>& tape, Variable<T> x) const {
    for (size_t k = 0; k < source_.layers.size(); ++k) {
      const FittingLayerSource& layer = source_.layers[k];
      std::vector<Term<T>> terms;
      terms.push_back({tape.activated(tape.product(x, maps_[k], 0, no_groups_, true), layer.phi), {}});
      if (layer.idt.defined()) terms[0].coefficients = row_of<T>(layer.idt);
      if (layer.residual == 1) terms.push_back({x, {}});
      if (layer.residual == 2) terms.push_back({tape.joined({x, x}), {}});
      x = tape.combination(terms);
    }
    return tape.product(x, maps_.back(), 0, no_groups_, true);
  }

  Matrix<T> constants_of(const std::vector<int64_t>& types, int64_t n) const {
    Matrix<T> rows = Matrix<T>::empty(n, constants_.columns());
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(constants_.row(types[static_cast<size_t>(i)]), rows.columns(), rows.row(i));
    }
    return rows;
  }

  const ReadoutSource& source_;
  ThreadPool& threads_;
  const std::vector<int64_t> no_groups_;
  std::vector<LinearMap<T>> maps_;  // of the layers, and the last one
  Matrix<T> constants_;             // (K n_types, n_constant)
  std::vector<double> shift_, weight_;
};

}  // namespace

std::unique_ptr<Readout> make_readout(const ReadoutSource& source, Dtype dtype, ThreadPool& threads) {
  if (dtype == Dtype::float32) return std::make_unique<FittingNet<float>>(source, threads);
  return std::make_unique<FittingNet<double>>(source, threads);
}

}  // namespace moecalc::plain
