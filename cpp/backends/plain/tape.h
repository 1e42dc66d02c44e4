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

template <class T>
class Gradient {
 public:
  bool defined() const { return defined_; }
  void add(Matrix<T> part);
  /// The sum so far, zeros of this shape at first, to be added to.
  Matrix<T>& sum(int64_t rows, int64_t columns);
  Matrix<T> take();

 private:
  bool defined_ = false;
  Matrix<T> sum_;
};

/// A matrix, and where its gradient gathers. Copies share both.
template <class T>
struct Variable {
  std::shared_ptr<Matrix<T>> value;
  std::shared_ptr<Gradient<T>> gradient;  // null: it has none

  const Matrix<T>& operator*() const { return *value; }
  const Matrix<T>* operator->() const { return value.get(); }
};

/// One term of a linear combination: `coefficients` of the columns, or none for 1.
template <class T>
struct Term {
  Variable<T> x;
  std::vector<T> coefficients;
};

/// Runs operations, and keeps what their derivatives need if it is `recording`. Whatever an operation reads
/// besides its variables must live until `backward` is done.
template <class T>
class Tape {
 public:
  using Var = Variable<T>;
  using Splits = std::vector<int64_t>;  // (n_group + 1) rows of the routing groups

  Tape(ThreadPool& threads, bool recording) : threads_(threads), recording_(recording) {}

  Var constant(Matrix<T> value) const;
  /// A constant whose gradient is wanted.
  Var leaf(Matrix<T> value) const;

  /// x (R, w) times rows first..first+w of the map's matrices: (R, n_active n_out), experts side by side.
  Var product(const Var& x, const LinearMap<T>& map, int64_t first, const Splits& splits, bool with_bias);
  Var activated(Var x, const ActivationSource& phi);
  /// Sum over the experts side by side, (R, n_active n_out) -> (R, n_out).
  Var summed(Var x, const LinearMap<T>& map, const Splits& splits);

  /// Row of[r] of x for every row r of the index.
  Var gathered(const Var& x, const Index& index);
  /// x (R, D) plus row of[r] of y.
  Var plus_gathered(Var x, const Var& y, const Index& index);
  /// factor times the sum of w[r] x[r] over the rows r of every target; w (R, 1).
  Var weighted_sums(const Var& x, const Var& w, const Index& index, T factor);
  /// Rotation invariants of a feature x (E, D) of edges: with H_c = norm^-1/2 sum_j sw h_c x, the matrix
  /// (1/3) sum_c H_c^T H_c of its first `axis` columns, flattened: (n, axis D). sw (E, 1), h (E, 3).
  Var symmetrized(const Var& x, const Var& sw, const Var& h, const Index& centre, int64_t axis, double norm);

  Var first_rows(const Var& x, int64_t n);
  Var columns(const Var& x, int64_t first, int64_t n);
  /// Side by side.
  Var joined(const std::vector<Var>& parts);
  Var combination(const std::vector<Term<T>>& terms);
  /// Rows of x where `chosen`, else those of y.
  Var choice(const std::vector<uint8_t>& chosen, const Var& x, const Var& y);

  /// f(x), whose gradient is reverse(its own); `reverse` is called even where that is zero, then with a
  /// matrix of zeros, because other ranks may wait for it.
  using Function = std::function<Matrix<T>(const Matrix<T>&)>;
  Var exchanged(const Var& x, const Function& f, Function reverse);

  /// Gradients of all leaves of the sum of seed * x. Ends the tape.
  void backward(const Var& x, Matrix<T> seed);

 private:
  Var result(Matrix<T> value, std::initializer_list<const Var*> inputs) const;
  /// Keeps step(gradient of y) for the backward. It is left out where there is no gradient.
  template <class F>
  void record(const Var& y, F step);

  ThreadPool& threads_;
  bool recording_;
  std::vector<std::function<void()>> steps_;
};

}  // namespace moecalc::plain
