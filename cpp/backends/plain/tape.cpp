#include "backends/plain/tape.h"

#include <cmath>

#include "backends/plain/activation.h"

namespace moecalc::plain {

namespace {

constexpr int64_t kBlock = 64;  // rows that one thread works on at a time

/// work(group, begin, end) for the rows begin..end of a map, cut where groups end.
template <class Real, class Function>
void for_groups(const LinearMap<Real>& map, const std::vector<int64_t>& splits, int64_t begin, int64_t end,
                const Function& work) {
  if (!map.routed) {
    work(map.group(0), begin, end);
    return;
  }
  auto split = std::upper_bound(splits.begin(), splits.end(), begin);
  while (begin < end) {
    const int64_t stop = std::min(end, *split);
    if (begin < stop) work(map.group(split - splits.begin() - 1), begin, stop);
    begin = stop;
    ++split;
  }
}

/// The matrix of a variable where nobody else holds it, else a copy of it.
template <class Real>
Matrix<Real> taken(Variable<Real>& variable) {
  return variable.value.use_count() == 1 ? std::move(*variable.value) : variable.value->clone();
}

}  // namespace

// --- gradients ---

template <class Real>
void Gradient<Real>::add(Matrix<Real> part) {
  if (!defined_) {
    sum_ = std::move(part);
    defined_ = true;
    return;
  }
  for (int64_t i = 0; i < sum_.size(); ++i) sum_.data()[i] += part.data()[i];
}

template <class Real>
Matrix<Real>& Gradient<Real>::sum(int64_t rows, int64_t columns) {
  if (!defined_) sum_ = Matrix<Real>::zeros(rows, columns);
  defined_ = true;
  return sum_;
}

template <class Real>
Matrix<Real> Gradient<Real>::take() {
  defined_ = false;
  return std::move(sum_);
}

template <class Real>
auto Tape<Real>::constant(Matrix<Real> value) const -> Var {
  return {std::make_shared<Matrix<Real>>(std::move(value)), nullptr};
}

template <class Real>
auto Tape<Real>::leaf(Matrix<Real> value) const -> Var {
  Var variable = constant(std::move(value));
  if (recording_) variable.gradient = std::make_shared<Gradient<Real>>();
  return variable;
}

template <class Real>
auto Tape<Real>::result(Matrix<Real> value, std::initializer_list<const Var*> inputs) const -> Var {
  for (const Var* input : inputs) {
    if (input->gradient != nullptr) return leaf(std::move(value));
  }
  return constant(std::move(value));
}

template <class Real>
template <class Step>
void Tape<Real>::record(const Var& out, Step step) {
  if (out.gradient == nullptr) return;
  steps_.push_back([gradient = out.gradient, step = std::move(step)] {
    if (gradient->defined()) step(gradient->take());
  });
}

template <class Real>
void Tape<Real>::backward(const Var& out, Matrix<Real> seed) {
  if (out.gradient != nullptr) out.gradient->add(std::move(seed));
  while (!steps_.empty()) {
    // popped first: what it kept is freed as soon as it is done
    const std::function<void()> step = std::move(steps_.back());
    steps_.pop_back();
    step();
  }
}

// --- maps ---

template <class Real>
auto Tape<Real>::product(const Var& in, const LinearMap<Real>& map, int64_t first, const Splits& splits,
                         bool with_bias) -> Var {
  const int64_t rows = in->rows();
  const int64_t n_in = in->columns();
  const int64_t n_out = map.n_out;
  const int64_t width = map.n_active * n_out;
  Matrix<Real> product = Matrix<Real>::zeros(rows, width);
  for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
    for_groups(map, splits, from, to, [&](const GroupMaps<Real>& group, int64_t begin, int64_t end) {
      for (int64_t r = begin; with_bias && r < end; ++r) {
        std::copy(group.bias.begin(), group.bias.end(), product.row(r));
      }
      for (int64_t k = 0; k < map.n_active; ++k) {
        const Matrix<Real>& matrix = *group.matrices[static_cast<size_t>(k)];
        add_product(end - begin, n_out, n_in, in->row(begin), n_in, matrix.row(first), n_out,
                    product.row(begin) + k * n_out, width);
      }
    });
  });
  Var out = result(std::move(product), {&in});
  record(out, [this, d_in = in.gradient, &map, &splits, first, rows, n_in, n_out, width](Matrix<Real> d_out) {
    Matrix<Real> part = Matrix<Real>::zeros(rows, n_in);
    for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
      for_groups(map, splits, from, to, [&](const GroupMaps<Real>& group, int64_t begin, int64_t end) {
        for (int64_t k = 0; k < map.n_active; ++k) {
          const Matrix<Real>& matrix = *group.matrices[static_cast<size_t>(k)];
          const Matrix<Real> back = transposed(matrix.row(first), n_in, n_out);
          add_product(end - begin, n_in, n_out, d_out.row(begin) + k * n_out, width, back.data(), n_in,
                      part.row(begin), n_in);
        }
      });
    });
    d_in->add(std::move(part));
  });
  return out;
}

template <class Real>
auto Tape<Real>::activated(Var in, const ActivationSource& phi) -> Var {
  Matrix<Real> values = taken(in);
  const int64_t columns = values.columns();
  const bool keeps = in.gradient != nullptr;
  auto slope = std::make_shared<Matrix<Real>>(keeps ? Matrix<Real>::empty(values.rows(), columns)
                                                    : Matrix<Real>::empty(0, 0));
  for_rows(threads_, values.rows(), kBlock, [&](int64_t begin, int64_t end) {
    activate(phi, values.row(begin), keeps ? slope->row(begin) : nullptr, (end - begin) * columns);
  });
  Var out = result(std::move(values), {&in});
  record(out, [this, d_in = in.gradient, slope, columns](Matrix<Real> d_out) {
    for_rows(threads_, d_out.rows(), kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * columns; i < end * columns; ++i) d_out.data()[i] *= slope->data()[i];
    });
    d_in->add(std::move(d_out));
  });
  return out;
}

template <class Real>
auto Tape<Real>::summed(Var in, const LinearMap<Real>& map, const Splits& splits) -> Var {
  if (!map.summed) return in;
  const int64_t rows = in->rows();
  const int64_t n_out = map.n_out;
  Matrix<Real> sum = Matrix<Real>::zeros(rows, n_out);
  for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
    for_groups(map, splits, from, to, [&](const GroupMaps<Real>& group, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t k = 0; k < map.n_active; ++k) {
          const Real weight = group.weights[static_cast<size_t>(k)];
          const Real* part = in->row(r) + k * n_out;
          for (int64_t c = 0; c < n_out; ++c) sum.row(r)[c] += weight * part[c];
        }
      }
    });
  });
  Var out = result(std::move(sum), {&in});
  record(out, [this, d_in = in.gradient, &map, &splits, rows, n_out](const Matrix<Real>& d_out) {
    Matrix<Real> part = Matrix<Real>::empty(rows, map.n_active * n_out);
    for_rows(threads_, rows, kBlock, [&](int64_t from, int64_t to) {
      for_groups(map, splits, from, to, [&](const GroupMaps<Real>& group, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          for (int64_t k = 0; k < map.n_active; ++k) {
            const Real weight = group.weights[static_cast<size_t>(k)];
            for (int64_t c = 0; c < n_out; ++c) part.row(r)[k * n_out + c] = weight * d_out.row(r)[c];
          }
        }
      });
    });
    d_in->add(std::move(part));
  });
  return out;
}

// --- graph ---

namespace {

/// Sum of the rows of every target.
template <class Real>
Matrix<Real> sums_by(ThreadPool& threads, const Index& index, const Matrix<Real>& rows) {
  Matrix<Real> sums = Matrix<Real>::zeros(index.targets(), rows.columns());
  for_rows(threads, index.targets(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t target = begin; target < end; ++target) {
      for (const int64_t* row = index.begin(target); row != index.end(target); ++row) {
        for (int64_t c = 0; c < rows.columns(); ++c) sums.row(target)[c] += rows.row(*row)[c];
      }
    }
  });
  return sums;
}

}  // namespace

template <class Real>
auto Tape<Real>::gathered(const Var& in, const Index& index) -> Var {
  Matrix<Real> rows = Matrix<Real>::empty(index.rows(), in->columns());
  for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) std::copy_n(in->row(index.of(r)), in->columns(), rows.row(r));
  });
  Var out = result(std::move(rows), {&in});
  record(out, [this, d_in = in.gradient, &index](const Matrix<Real>& d_out) {
    d_in->add(sums_by(threads_, index, d_out));
  });
  return out;
}

template <class Real>
auto Tape<Real>::plus_gathered(Var in, const Var& others, const Index& index) -> Var {
  Matrix<Real> sum = taken(in);
  for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Real* from = others->row(index.of(r));
      for (int64_t c = 0; c < sum.columns(); ++c) sum.row(r)[c] += from[c];
    }
  });
  Var out = result(std::move(sum), {&in, &others});
  record(out, [this, d_in = in.gradient, d_others = others.gradient, &index](Matrix<Real> d_out) {
    if (d_others != nullptr) d_others->add(sums_by(threads_, index, d_out));
    if (d_in != nullptr) d_in->add(std::move(d_out));
  });
  return out;
}

template <class Real>
auto Tape<Real>::weighted_sums(const Var& in, const Var& weights, const Index& index, Real factor) -> Var {
  const int64_t columns = in->columns();
  Matrix<Real> sums = Matrix<Real>::zeros(index.targets(), columns);
  for_rows(threads_, index.targets(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t target = begin; target < end; ++target) {
      Real* sum = sums.row(target);
      for (const int64_t* r = index.begin(target); r != index.end(target); ++r) {
        const Real weight = weights->row(*r)[0];
        for (int64_t c = 0; c < columns; ++c) sum[c] += weight * in->row(*r)[c];
      }
      for (int64_t c = 0; c < columns; ++c) sum[c] *= factor;
    }
  });
  Var out = result(std::move(sums), {&in, &weights});
  record(out, [this, in, weights, &index, factor, columns](const Matrix<Real>& d_out) {
    Matrix<Real> d_in = Matrix<Real>::empty(index.rows(), columns);
    Matrix<Real> d_weights = Matrix<Real>::empty(index.rows(), 1);
    for_rows(threads_, index.rows(), kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Real* from = d_out.row(index.of(r));
        const Real weight = factor * weights->row(r)[0];
        Real dot = Real(0);
        for (int64_t c = 0; c < columns; ++c) {
          d_in.row(r)[c] = weight * from[c];
          dot += in->row(r)[c] * from[c];
        }
        d_weights.row(r)[0] = factor * dot;
      }
    });
    if (in.gradient != nullptr) in.gradient->add(std::move(d_in));
    if (weights.gradient != nullptr) weights.gradient->add(std::move(d_weights));
  });
  return out;
}

namespace {

/// Of S_md = sum_c H_cm H_cd, m < axis: dH_cd = sum_m H_cm dS_md, and dH_cm += sum_d H_cd dS_md.
template <class Real>
void moments_backward(const Real* moments, const Real* d_invariants, int64_t axis,
                      std::vector<Real>& d_moments) {
  const auto width = static_cast<int64_t>(d_moments.size()) / 3;
  std::fill(d_moments.begin(), d_moments.end(), Real(0));
  for (int64_t c = 0; c < 3; ++c) {
    const Real* row = moments + c * width;
    Real* to = d_moments.data() + c * width;
    for (int64_t m = 0; m < axis; ++m) {
      const Real* from = d_invariants + m * width;
      Real dot = Real(0);
      for (int64_t k = 0; k < width; ++k) {
        to[k] += row[m] * from[k];
        dot += row[k] * from[k];
      }
      to[m] += dot;
    }
  }
}

}  // namespace

template <class Real>
auto Tape<Real>::symmetrized(const Var& in, const Var& switch_edge, const Var& directions,
                             const Index& centre, int64_t axis, double norm) -> Var {
  const int64_t width = in->columns();
  const Real scale = Real(1.0 / std::sqrt(norm));
  const Real third = Real(1.0 / 3.0);
  auto moments = std::make_shared<Matrix<Real>>(Matrix<Real>::zeros(centre.targets(), 3 * width));
  Matrix<Real> invariants = Matrix<Real>::zeros(centre.targets(), axis * width);
  for_rows(threads_, centre.targets(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Real* sums = moments->row(i);
      for (const int64_t* edge = centre.begin(i); edge != centre.end(i); ++edge) {
        for (int64_t c = 0; c < 3; ++c) {
          const Real direction = switch_edge->row(*edge)[0] * directions->row(*edge)[c];
          for (int64_t k = 0; k < width; ++k) sums[c * width + k] += direction * in->row(*edge)[k];
        }
      }
      for (int64_t k = 0; k < 3 * width; ++k) sums[k] *= scale;
      for (int64_t m = 0; m < axis; ++m) {
        for (int64_t c = 0; c < 3; ++c) {
          const Real factor = third * sums[c * width + m];
          for (int64_t k = 0; k < width; ++k) {
            invariants.row(i)[m * width + k] += factor * sums[c * width + k];
          }
        }
      }
    }
  });
  Var out = result(std::move(invariants), {&in, &switch_edge, &directions});
  record(out, [this, in, switch_edge, directions, moments, &centre, axis, scale, third,
               width](const Matrix<Real>& d_out) {
    Matrix<Real> d_in = Matrix<Real>::empty(centre.rows(), width);
    Matrix<Real> d_switch = Matrix<Real>::empty(centre.rows(), 1);
    Matrix<Real> d_directions = Matrix<Real>::empty(centre.rows(), 3);
    for_rows(threads_, centre.targets(), kBlock, [&](int64_t begin, int64_t end) {
      std::vector<Real> d_moments(static_cast<size_t>(3 * width));
      for (int64_t i = begin; i < end; ++i) {
        moments_backward(moments->row(i), d_out.row(i), axis, d_moments);
        for (Real& value : d_moments) value *= scale * third;
        for (const int64_t* edge = centre.begin(i); edge != centre.end(i); ++edge) {
          const Real weight = switch_edge->row(*edge)[0];
          Real d_weight = Real(0);
          std::fill_n(d_in.row(*edge), width, Real(0));
          for (int64_t c = 0; c < 3; ++c) {
            const Real direction = directions->row(*edge)[c];
            const Real* from = d_moments.data() + c * width;
            Real dot = Real(0);
            for (int64_t k = 0; k < width; ++k) {
              d_in.row(*edge)[k] += weight * direction * from[k];
              dot += in->row(*edge)[k] * from[k];
            }
            d_directions.row(*edge)[c] = weight * dot;
            d_weight += direction * dot;
          }
          d_switch.row(*edge)[0] = d_weight;
        }
      }
    });
    if (in.gradient != nullptr) in.gradient->add(std::move(d_in));
    if (switch_edge.gradient != nullptr) switch_edge.gradient->add(std::move(d_switch));
    if (directions.gradient != nullptr) directions.gradient->add(std::move(d_directions));
  });
  return out;
}

template <class Real>
auto Tape<Real>::exchanged(const Var& in, const Function& forward, Function reverse) -> Var {
  Var out = result(forward(*in), {&in});
  if (out.gradient == nullptr) return out;
  const int64_t rows = out->rows();
  const int64_t columns = out->columns();
  steps_.push_back([d_in = in.gradient, d_out = out.gradient, rows, columns, reverse = std::move(reverse)] {
    d_out->sum(rows, columns);
    d_in->add(reverse(d_out->take()));
  });
  return out;
}

// --- rows and columns ---

template <class Real>
auto Tape<Real>::first_rows(const Var& in, int64_t count) -> Var {
  if (in->rows() == count) return in;
  const int64_t rows = in->rows();
  const int64_t columns = in->columns();
  Var out = result(Matrix<Real>::of(in->data(), count, columns), {&in});
  record(out, [d_in = in.gradient, rows, columns](const Matrix<Real>& d_out) {
    Matrix<Real>& sum = d_in->sum(rows, columns);
    for (int64_t i = 0; i < d_out.size(); ++i) sum.data()[i] += d_out.data()[i];
  });
  return out;
}

template <class Real>
auto Tape<Real>::columns(const Var& in, int64_t first, int64_t count) -> Var {
  const int64_t rows = in->rows();
  const int64_t width = in->columns();
  if (count == width) return in;
  Matrix<Real> part = Matrix<Real>::empty(rows, count);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(in->row(r) + first, count, part.row(r));
  Var out = result(std::move(part), {&in});
  record(out, [d_in = in.gradient, first, count, rows, width](const Matrix<Real>& d_out) {
    Matrix<Real>& sum = d_in->sum(rows, width);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < count; ++c) sum.row(r)[first + c] += d_out.row(r)[c];
    }
  });
  return out;
}

template <class Real>
auto Tape<Real>::joined(const std::vector<Var>& parts) -> Var {
  int64_t width = 0;
  bool differentiated = false;
  for (const Var& part : parts) {
    width += part->columns();
    differentiated = differentiated || part.gradient != nullptr;
  }
  const int64_t rows = parts[0]->rows();
  Matrix<Real> joint = Matrix<Real>::empty(rows, width);
  std::vector<std::shared_ptr<Gradient<Real>>> gradients;
  std::vector<int64_t> widths;
  int64_t first = 0;
  for (const Var& part : parts) {
    const int64_t n_column = part->columns();
    for (int64_t r = 0; r < rows; ++r) std::copy_n(part->row(r), n_column, joint.row(r) + first);
    gradients.push_back(part.gradient);
    widths.push_back(n_column);
    first += n_column;
  }
  Var out = differentiated ? leaf(std::move(joint)) : constant(std::move(joint));
  record(out, [gradients, widths, rows](const Matrix<Real>& d_out) {
    int64_t begin = 0;
    for (size_t k = 0; k < gradients.size(); ++k) {
      const int64_t n_column = widths[k];
      if (gradients[k] != nullptr) {
        Matrix<Real> part = Matrix<Real>::empty(rows, n_column);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(d_out.row(r) + begin, n_column, part.row(r));
        gradients[k]->add(std::move(part));
      }
      begin += n_column;
    }
  });
  return out;
}

namespace {

/// to (or to +=) from, its columns times `coefficients`, which may be empty.
template <class Real>
void add_scaled(ThreadPool& threads, const Matrix<Real>& from, const std::vector<Real>& coefficients,
                bool accumulate, Matrix<Real>& to) {
  for_rows(threads, from.rows(), kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < from.columns(); ++c) {
        const Real scaled =
            coefficients.empty() ? from.row(r)[c] : coefficients[static_cast<size_t>(c)] * from.row(r)[c];
        to.row(r)[c] = accumulate ? to.row(r)[c] + scaled : scaled;
      }
    }
  });
}

}  // namespace

template <class Real>
auto Tape<Real>::combination(const std::vector<Term<Real>>& terms) -> Var {
  const int64_t rows = terms[0].values->rows();
  const int64_t columns = terms[0].values->columns();
  Matrix<Real> sum = Matrix<Real>::empty(rows, columns);
  bool differentiated = false;
  for (size_t k = 0; k < terms.size(); ++k) {
    add_scaled(threads_, *terms[k].values, terms[k].coefficients, k > 0, sum);
    differentiated = differentiated || terms[k].values.gradient != nullptr;
  }
  Var out = differentiated ? leaf(std::move(sum)) : constant(std::move(sum));
  std::vector<std::pair<std::shared_ptr<Gradient<Real>>, std::vector<Real>>> inputs;
  for (const Term<Real>& term : terms) {
    if (term.values.gradient != nullptr) inputs.emplace_back(term.values.gradient, term.coefficients);
  }
  record(out, [this, inputs, rows, columns](const Matrix<Real>& d_out) {
    for (const auto& [gradient, coefficients] : inputs) {
      const bool accumulate = gradient->defined();
      add_scaled(threads_, d_out, coefficients, accumulate, gradient->sum(rows, columns));
    }
  });
  return out;
}

template <class Real>
auto Tape<Real>::choice(const std::vector<uint8_t>& chosen, const Var& yes, const Var& no) -> Var {
  const int64_t rows = yes->rows();
  const int64_t columns = yes->columns();
  Matrix<Real> chosen_rows = Matrix<Real>::empty(rows, columns);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(chosen[static_cast<size_t>(r)] ? yes->row(r) : no->row(r), columns, chosen_rows.row(r));
  }
  Var out = result(std::move(chosen_rows), {&yes, &no});
  record(out, [d_yes = yes.gradient, d_no = no.gradient, &chosen, rows, columns](const Matrix<Real>& d_out) {
    for (const bool first : {true, false}) {
      const auto& gradient = first ? d_yes : d_no;
      if (gradient == nullptr) continue;
      Matrix<Real>& sum = gradient->sum(rows, columns);
      for (int64_t r = 0; r < rows; ++r) {
        if ((chosen[static_cast<size_t>(r)] != 0) != first) continue;
        for (int64_t c = 0; c < columns; ++c) sum.row(r)[c] += d_out.row(r)[c];
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
