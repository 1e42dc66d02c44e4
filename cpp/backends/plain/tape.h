// Reverse-mode differentiation of the operations that a layer is made of. Weights are constants: the
// gradients are those of features and geometry.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "backends/plain/index.h"
#include "backends/plain/linear_map.h"
#include "backends/plain/matrix.h"
#include "core/threads.h"
#include "package/architecture.h"

namespace moecalc::plain {

template <class Real>
class Gradient {
 public:
  bool defined() const { return defined_; }
  void add(Matrix<Real> part);
  /// The sum so far, zeros of this shape at first, to be added to.
  Matrix<Real>& sum(int64_t rows, int64_t columns);
  Matrix<Real> take();

 private:
  bool defined_ = false;
  Matrix<Real> sum_;
};

/// A matrix, and where its gradient gathers. Copies share both.
template <class Real>
struct Variable {
  std::shared_ptr<Matrix<Real>> value;
  std::shared_ptr<Gradient<Real>> gradient;  // null: it has none

  const Matrix<Real>& operator*() const { return *value; }
  const Matrix<Real>* operator->() const { return value.get(); }
};

/// One term of a linear combination: `coefficients` of the columns, or none for 1.
template <class Real>
struct Term {
  Variable<Real> values;
  std::vector<Real> coefficients;
};

/// Runs operations, and keeps what their derivatives need if it is `recording`. Whatever an operation reads
/// besides its variables must live until `backward` is done.
template <class Real>
class Tape {
 public:
  using Var = Variable<Real>;
  using Splits = std::vector<int64_t>;  // (n_group + 1) rows of the routing groups

  Tape(ThreadPool& threads, bool recording) : threads_(threads), recording_(recording) {}

  Var constant(Matrix<Real> value) const;
  /// A constant whose gradient is wanted.
  Var leaf(Matrix<Real> value) const;

  /// in (R, w) times rows first..first+w of the map's matrices: (R, n_active n_out), experts side by side.
  Var product(const Var& in, const LinearMap<Real>& map, int64_t first, const Splits& splits, bool with_bias);
  Var activated(Var in, const ActivationSource& phi);
  /// Sum over the experts side by side, (R, n_active n_out) -> (R, n_out).
  Var summed(Var in, const LinearMap<Real>& map, const Splits& splits);

  /// Row of[r] of `in` for every row r of the index.
  Var gathered(const Var& in, const Index& index);
  /// in (R, D) plus row of[r] of `others`.
  Var plus_gathered(Var in, const Var& others, const Index& index);
  /// factor times the sum of weights[r] in[r] over the rows r of every target; weights (R, 1).
  Var weighted_sums(const Var& in, const Var& weights, const Index& index, Real factor);
  /// Rotation invariants of a feature x (E, D) of edges: with the moments H_c = norm^-1/2 sum_j s h_c x, s
  /// the switch (E, 1) and h the directions (E, 3), the matrix (1/3) sum_c H_c^T H_c of its first `axis`
  /// columns, flattened: (n, axis D).
  Var symmetrized(const Var& in, const Var& switch_edge, const Var& directions, const Index& centre,
                  int64_t axis, double norm);

  Var first_rows(const Var& in, int64_t count);
  Var columns(const Var& in, int64_t first, int64_t count);
  /// Side by side.
  Var joined(const std::vector<Var>& parts);
  Var combination(const std::vector<Term<Real>>& terms);
  /// Rows of `yes` where `chosen`, else those of `no`.
  Var choice(const std::vector<uint8_t>& chosen, const Var& yes, const Var& no);

  /// forward(in), whose gradient is reverse(its own); `reverse` is called even where that is zero, then with
  /// a matrix of zeros, because other ranks may wait for it.
  using Function = std::function<Matrix<Real>(const Matrix<Real>&)>;
  Var exchanged(const Var& in, const Function& forward, Function reverse);

  /// Gradients of all leaves of the sum of seed * out. Ends the tape.
  void backward(const Var& out, Matrix<Real> seed);

 private:
  Var result(Matrix<Real> value, std::initializer_list<const Var*> inputs) const;
  /// Keeps step(gradient of `out`) for the backward. It is left out where there is no gradient.
  template <class Step>
  void record(const Var& out, Step step);

  ThreadPool& threads_;
  bool recording_;
  std::vector<std::function<void()>> steps_;
};

}  // namespace moecalc::plain
