#include "backends/plain/tape.h"

#include <cmath>

#include "backends/plain/activation.h"

namespace moecalc::plain {

namespace {

constexpr int64_t kBlock = 64;  // rows that one thread works on at a time

/// f(group, begin, end) for the rows begin..end of a map, cut where groups end.
template <class T, class F>
void for_groups(const LinearMap<T>& map, const std::vector<int64_t>& splits, int64_t begin, int64_t end,
                const F& f) {
  if (!map.routed) {
    f(map.group(0), begin, end);
    return;
  }
  auto split = std::upper_bound(splits.begin(), splits.end(), begin);
  while (begin < end) {
    const int64_t stop = std::min(end, *split);
    if (begin < stop) f(map.group(split - splits.begin() - 1), begin, stop);
    begin = stop;
    ++split;
  }
}

/// The matrix of `x` where nobody else holds it, else a copy of it.
template <class T>
Matrix<T> taken(Variable<T>& x) {
  return x.value.use_count() == 1 ? std::move(*x.value) : x.value->clone();
}

}  // namespace

// --- gradients ---

template <class T>
void Gradient<T>::add(Matrix<T> part) {
  if (!defined_) {
    sum_ = std::move(part);
    defined_ = true;
    return;
  }
  for (int64_t i = 0; i < sum_.size(); ++i) sum_.data()[i] += part.data()[i];
}

template <class T>
Matrix<T>& Gradient<T>::sum(int64_t rows, int64_t columns) {
  if (!defined_) sum_ = Matrix<T>::zeros(rows, columns);
  defined_ = true;
  return sum_;
}

template <class T>
Matrix<T> Gradient<T>::take() {
  defined_ = false;
  return std::move(sum_);
}

template <class T>
auto Tape<T>::constant(Matrix<T> value) const -> Var {
  return {std::make_shared<Matrix<T>>(std::move(value)), nullptr};
}

template <class T>
auto Tape<T>::leaf(Matrix<T> value) const -> Var {
  Var x = constant(std::move(value));
  if (recording_) x.gradient = std::make_shared<Gradient<T>>();
  return x;
}

template <class T>
auto Tape<T>::result(Matrix<T> value, std::initializer_list<const Var*> inputs) const -> Var {
  for (const Var* input : inputs) {
    if (input->gradient != nullptr) return leaf(std::move(value));
  }
  return constant(std::move(value));
}

template <class T>
template <class F>
void Tape<T>::record(const Var& y, F step) {
  if (y.gradient == nullptr) return;
  steps_.push_back([gradient = y.gradient, step = std::move(step)] {
    if (gradient->defined()) step(gradient->take());
  });
}

template <class T>
void Tape<T>::backward(const Var& x, Matrix<T> seed) {
  if (x.gradient != nullptr) x.gradient->add(std::move(seed));
  while (!steps_.empty()) {
    // popped first: what it kept is freed as soon as it is done
    const std::function<void()> step = std::move(steps_.back());
    steps_.pop_back();
    step();
  }
}

// --- maps ---

template <class T>
auto Tape<T>::product(const Var& x, const LinearMap<T>& map, int64_t first, const Splits& splits,
                      bool with_bias) -> Var {
  const int64_t rows = x->rows(), n_in = x->columns(), n_out = map.n_out, width = map.n_active * n_out;
  Matrix<T> y = Matrix<T>::zeros(rows, width);
  for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
    for_groups(map, splits, from, to, [&](const GroupMaps<T>& group, int64_t begin, int64_t end) {
      for (int64_t r = begin; with_bias && r < end; ++r) {
        std::copy(group.bias.begin(), group.bias.end(), y.row(r));
      }
      for (int64_t k = 0; k < map.n_active; ++k) {
        const Matrix<T>& matrix = *group.matrices[static_cast<size_t>(k)];
        add_product(end - begin, n_out, n_in, x->row(begin), n_in, matrix.row(first), n_out,
                    y.row(begin) + k * n_out, width);
      }
    });
  });
  Var out = result(std::move(y), {&x});
  record(out, [this, dx = x.gradient, &map, &splits, first, rows, n_in, n_out, width](Matrix<T> dy) {
    Matrix<T> part = Matrix<T>::zeros(rows, n_in);
    for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
      for_groups(map, splits, from, to, [&](const GroupMaps<T>& group, int64_t begin, int64_t end) {
        for (int64_t k = 0; k < map.n_active; ++k) {
          const Matrix<T>& matrix = *group.matrices[static_cast<size_t>(k)];
          const Matrix<T> back = transposed(matrix.row(first), n_in, n_out);
          add_product(end - begin, n_in, n_out, dy.row(begin) + k * n_out, width, back.data(), n_in,
                      part.row(begin), n_in);
        }
      });
    });
    dx->add(std::move(part));
  });
  return out;
}

template <class T>
auto Tape<T>::activated(Var x, const ActivationSource& phi) -> Var {
  Matrix<T> y = taken(x);
  const int64_t columns = y.columns();
  const bool keeps = x.gradient != nullptr;
  auto slope =
      std::make_shared<Matrix<T>>(keeps ? Matrix<T>::empty(y.rows(), columns) : Matrix<T>::empty(0, 0));
  for_rows(threads_, y.rows(), kBlock, [&](int64_t begin, int64_t end) {
    activate(phi, y.row(begin), keeps ? slope->row(begin) : nullptr, (end - begin) * columns);
  });
  Var out = result(std::move(y), {&x});
  record(out, [this, dx = x.gradient, slope, columns](Matrix<T> dy) {
    for_rows(threads_, dy.rows(), kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; ++i) dy.data()[i] *= slope->data()[i];
    });
    dx->add(std::move(dy));
  });
  return out;
}

template <class T>
auto Tape<T>::summed(Var x, const LinearMap<T>& map, const Splits& splits) -> Var {
  if (!map.summed) return x;
  const int64_t rows = x->rows(), n_out = map.n_out;
  Matrix<T> y = Matrix<T>::zeros(rows, n_out);
  for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
    for_groups(map, splits, from, to, [&](const GroupMaps<T>& group, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t k = 0; k < map.n_active; ++k) {
          const T weight = group.weights[static_cast<size_t>(k)];
          const T* part = x->row(r) + k * n_out;
          for (int64_t c = 0; c < n_out; ++c) y.row(r)[c] += weight * part[c];
        }
      }
    });
  });
  Var out = result(std::move(y), {&x});
  record(out, [this, dx = x.gradient, &map, &splits, rows, n_out](const Matrix<T>& dy) {
    Matrix<T> part = Matrix<T>::empty(rows, map.n_active * n_out);
    for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
      for_groups(map, splits, from, to, [&](const GroupMaps<T>& group, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t k = 0; k < map.n_active; ++k) {
            const T weight = group.weights[static_cast<size_t>(k)];
            for (int64_t c = 0; c < n_out; ++c) part.row(r)[k * n_out + c] = weight * dy.row(r)[c];
          }
        }
      });
    });
    dx->add(std::move(part));
  });
  return out;
}

// --- graph ---

namespace {

/// Sum of the rows of every target.
template <class T>
Matrix<T> sums_by(ThreadPool& threads, const Index& index, const Matrix<T>& x) {
  Matrix<T> y = Matrix<T>::zeros(index.targets(), x.columns());
  for_rows(threads, index.targets(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (const int64_t* r = index.begin(t); r != index.end(t); ++r) {
        for (int64_t c = 0; c < x.columns(); ++c) y.row(t)[c] += x.row(*r)[c];
      }
    }
  });
  return y;
}

}  // namespace

template <class T>
auto Tape<T>::gathered(const Var& x, const Index& index) -> Var {
  Matrix<T> y = Matrix<T>::empty(index.rows(), x->columns());
  for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(x->row(index.of(r)), x->columns(), y.row(r));
  });
  Var out = result(std::move(y), {&x});
  record(out,
         [this, dx = x.gradient, &index](const Matrix<T>& dy) { dx->add(sums_by(threads_, index, dy)); });
  return out;
}

template <class T>
auto Tape<T>::plus_gathered(Var x, const Var& y, const Index& index) -> Var {
  Matrix<T> z = taken(x);
  for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* from = y->row(index.of(r));
      for (int64_t c = 0; c < z.columns(); ++c) z.row(r)[c] += from[c];
    }
  });
  Var out = result(std::move(z), {&x, &y});
  record(out, [this, dx = x.gradient, dy = y.gradient, &index](Matrix<T> dz) {
    if (dy != nullptr) dy->add(sums_by(threads_, index, dz));
    if (dx != nullptr) dx->add(std::move(dz));
  });
  return out;
}

template <class T>
auto Tape<T>::weighted_sums(const Var& x, const Var& w, const Index& index, T factor) -> Var {
  const int64_t columns = x->columns();
  Matrix<T> y = Matrix<T>::zeros(index.targets(), columns);
  for_rows(threads_, index.targets(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      T* sum = y.row(t);
      for (const int64_t* r = index.begin(t); r != index.end(t); ++r) {
        const T weight = w->row(*r)[0];
        for (int64_t c = 0; c < columns; ++c) sum[c] += weight * x->row(*r)[c];
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] *= factor;
    }
  });
  Var out = result(std::move(y), {&x, &w});
  record(out, [this, x, w, &index, factor, columns](const Matrix<T>& dy) {
    Matrix<T> dx = Matrix<T>::empty(index.rows(), columns);
    Matrix<T> dw = Matrix<T>::empty(index.rows(), 1);
    for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = dy.row(index.of(r));
        const T weight = factor * w->row(r)[0];
        T dot = T(0);
        for (int64_t c = 0; c < columns; ++c) {
          dx.row(r)[c] = weight * from[c];
          dot += x->row(r)[c] * from[c];
        }
        dw.row(r)[0] = factor * dot;
      }
    });
    if (x.gradient != nullptr) x.gradient->add(std::move(dx));
    if (w.gradient != nullptr) w.gradient->add(std::move(dw));
  });
  return out;
}

template <class T>
auto Tape<T>::symmetrized(const Var& x, const Var& sw, const Var& h, const Index& centre, int64_t axis,
                          double norm) -> Var {
  const int64_t n = centre.targets(), d = x->columns();
  const T scale = T(1.0 / std::sqrt(norm)), third = T(1.0 / 3.0);
  auto big_h = std::make_shared<Matrix<T>>(Matrix<T>::zeros(n, 3 * d));
  Matrix<T> s = Matrix<T>::zeros(n, axis * d);
  for_rows(threads_, n, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* sums = big_h->row(i);
      for (const int64_t* r = centre.begin(i); r != centre.end(i); ++r) {
        for (int64_t c = 0; c < 3; ++c) {
          const T direction = sw->row(*r)[0] * h->row(*r)[c];
          for (int64_t k = 0; k < d; ++k) sums[c * d + k] += direction * x->row(*r)[k];
        }
      }
      for (int64_t k = 0; k < 3 * d; ++k) sums[k] *= scale;
      for (int64_t m = 0; m < axis; ++m) {
        for (int64_t c = 0; c < 3; ++c) {
          const T left = third * sums[c * d + m];
          for (int64_t k = 0; k < d; ++k) s.row(i)[m * d + k] += left * sums[c * d + k];
        }
      }
    }
  });
  Var out = result(std::move(s), {&x, &sw, &h});
  record(out, [this, x, sw, h, big_h, &centre, axis, scale, third, n, d](const Matrix<T>& ds) {
    Matrix<T> dx = Matrix<T>::empty(centre.rows(), d);
    Matrix<T> dsw = Matrix<T>::empty(centre.rows(), 1), dh = Matrix<T>::empty(centre.rows(), 3);
    for_rows(threads_, n, kBlock, [&](int64_t begin, int64_t end) {
      std::vector<T> gradient(static_cast<size_t>(3 * d));
      for (int64_t i = begin; i < end; ++i) {
        const T* sums = big_h->row(i);
        std::fill(gradient.begin(), gradient.end(), T(0));
        for (int64_t c = 0; c < 3; ++c) {
          const T* row = sums + c * d;
          T* to = gradient.data() + c * d;
          for (int64_t m = 0; m < axis; ++m) {
            const T* from = ds.row(i) + m * d;
            T dot = T(0);
            for (int64_t k = 0; k < d; ++k) {
              to[k] += row[m] * from[k];
              dot += row[k] * from[k];
            }
            to[m] += dot;
          }
        }
        for (T& value : gradient) value *= scale * third;
        for (const int64_t* r = centre.begin(i); r != centre.end(i); ++r) {
          const T weight = sw->row(*r)[0];
          T d_weight = T(0);
          std::fill_n(dx.row(*r), d, T(0));
          for (int64_t c = 0; c < 3; ++c) {
            const T direction = h->row(*r)[c];
            const T* from = gradient.data() + c * d;
            T dot = T(0);
            for (int64_t k = 0; k < d; ++k) {
              dx.row(*r)[k] += weight * direction * from[k];
              dot += x->row(*r)[k] * from[k];
            }
            dh.row(*r)[c] = weight * dot;
            d_weight += direction * dot;
          }
          dsw.row(*r)[0] = d_weight;
        }
      }
    });
    if (x.gradient != nullptr) x.gradient->add(std::move(dx));
    if (sw.gradient != nullptr) sw.gradient->add(std::move(dsw));
    if (h.gradient != nullptr) h.gradient->add(std::move(dh));
  });
  return out;
}

template <class T>
auto Tape<T>::exchanged(const Var& x, const Function& f, Function reverse) -> Var {
  Var out = result(f(*x), {&x});
  if (out.gradient == nullptr) return out;
  const int64_t rows = out->rows(), columns = out->columns();
  steps_.push_back([dx = x.gradient, dy = out.gradient, rows, columns, reverse = std::move(reverse)] {
    dy->sum(rows, columns);
    dx->add(reverse(dy->take()));
  });
  return out;
}

// --- rows and columns ---

template <class T>
auto Tape<T>::first_rows(const Var& x, int64_t n) -> Var {
  if (x->rows() == n) return x;
  const int64_t rows = x->rows(), columns = x->columns();
  Var out = result(Matrix<T>::of(x->data(), n, columns), {&x});
  record(out, [dx = x.gradient, rows, columns](const Matrix<T>& dy) {
    Matrix<T>& sum = dx->sum(rows, columns);
    for (int64_t i = 0; i < dy.size(); ++i) sum.data()[i] += dy.data()[i];
  });
  return out;
}

template <class T>
auto Tape<T>::columns(const Var& x, int64_t first, int64_t n) -> Var {
  const int64_t rows = x->rows(), width = x->columns();
  if (n == width) return x;
  Matrix<T> y = Matrix<T>::empty(rows, n);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(x->row(r) + first, n, y.row(r));
  Var out = result(std::move(y), {&x});
  record(out, [dx = x.gradient, first, n, rows, width](const Matrix<T>& dy) {
    Matrix<T>& sum = dx->sum(rows, width);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < n; ++c) sum.row(r)[first + c] += dy.row(r)[c];
    }
  });
  return out;
}

template <class T>
auto Tape<T>::joined(const std::vector<Var>& parts) -> Var {
  int64_t width = 0;
  bool differentiated = false;
  for (const Var& part : parts) {
    width += part->columns();
    differentiated = differentiated || part.gradient != nullptr;
  }
  const int64_t rows = parts[0]->rows();
  Matrix<T> y = Matrix<T>::empty(rows, width);
  std::vector<std::shared_ptr<Gradient<T>>> gradients;
  std::vector<int64_t> widths;
  int64_t first = 0;
  for (const Var& part : parts) {
    const int64_t n = part->columns();
    for (int64_t r = 0; r < rows; ++r) std::copy_n(part->row(r), n, y.row(r) + first);
    gradients.push_back(part.gradient);
    widths.push_back(n);
    first += n;
  }
  Var out = differentiated ? leaf(std::move(y)) : constant(std::move(y));
  record(out, [gradients, widths, rows](const Matrix<T>& dy) {
    int64_t begin = 0;
    for (size_t k = 0; k < gradients.size(); ++k) {
      const int64_t n = widths[k];
      if (gradients[k] != nullptr) {
        Matrix<T> part = Matrix<T>::empty(rows, n);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(dy.row(r) + begin, n, part.row(r));
        gradients[k]->add(std::move(part));
      }
      begin += n;
    }
  });
  return out;
}

namespace {

/// to (or to +=) from, its columns times `coefficients`, which may be empty.
template <class T>
void add_scaled(ThreadPool& threads, const Matrix<T>& from, const std::vector<T>& coefficients,
                bool accumulate, Matrix<T>& to) {
  for_rows(threads, from.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < from.columns(); ++c) {
        const T scaled =
            coefficients.empty() ? from.row(r)[c] : coefficients[static_cast<size_t>(c)] * from.row(r)[c];
        to.row(r)[c] = accumulate ? to.row(r)[c] + scaled : scaled;
      }
    }
  });
}

}  // namespace

template <class T>
auto Tape<T>::combination(const std::vector<Term<T>>& terms) -> Var {
  const int64_t rows = terms[0].x->rows(), columns = terms[0].x->columns();
  Matrix<T> y = Matrix<T>::empty(rows, columns);
  bool differentiated = false;
  for (size_t k = 0; k < terms.size(); ++k) {
    add_scaled(threads_, *terms[k].x, terms[k].coefficients, k > 0, y);
    differentiated = differentiated || terms[k].x.gradient != nullptr;
  }
  Var out = differentiated ? leaf(std::move(y)) : constant(std::move(y));
  std::vector<std::pair<std::shared_ptr<Gradient<T>>, std::vector<T>>> inputs;
  for (const Term<T>& term : terms) {
    if (term.x.gradient != nullptr) inputs.emplace_back(term.x.gradient, term.coefficients);
  }
  record(out, [this, inputs, rows, columns](const Matrix<T>& dy) {
    for (const auto& [gradient, coefficients] : inputs) {
      const bool accumulate = gradient->defined();
      add_scaled(threads_, dy, coefficients, accumulate, gradient->sum(rows, columns));
    }
  });
  return out;
}

template <class T>
auto Tape<T>::choice(const std::vector<uint8_t>& chosen, const Var& x, const Var& y) -> Var {
  const int64_t rows = x->rows(), columns = x->columns();
  Matrix<T> z = Matrix<T>::empty(rows, columns);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(chosen[static_cast<size_t>(r)] ? x->row(r) : y->row(r), columns, z.row(r));
  }
  Var out = result(std::move(z), {&x, &y});
  record(out, [dx = x.gradient, dy = y.gradient, &chosen, rows, columns](const Matrix<T>& dz) {
    for (const bool first : {true, false}) {
      const auto& gradient = first ? dx : dy;
      if (gradient == nullptr) continue;
      Matrix<T>& sum = gradient->sum(rows, columns);
      for (int64_t r = 0; r < rows; ++r) {
        if ((chosen[static_cast<size_t>(r)] != 0) != first) continue;
        for (int64_t c = 0; c < columns; ++c) sum.row(r)[c] += dz.row(r)[c];
      }
    }
  });
  return out;
}

template class Gradient<float>;
template class Gradient<double>;
template class Tape<float>;
template class Tape<double>;

}  // namespace moecalc::plain
