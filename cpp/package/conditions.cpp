#include "package/conditions.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "moecalc/error.h"
#include "package/routing.h"

namespace moecalc {

namespace {

constexpr std::array<int64_t, 2> charges{-100, 99}, multiplicities{0, 99};  // rows of the embeddings

void check_range(const char* name, int64_t value, const std::array<int64_t, 2>& range) {
  if (value >= range[0] && value <= range[1]) return;
  throw Error(std::string(name) + " = " + std::to_string(value) + ", expected a whole number from " +
              std::to_string(range[0]) + " to " + std::to_string(range[1]));
}

std::string shape_of(const Array& array) {
  if (!array.defined()) return "none";
  std::string text = shown(array.shape());
  text.front() = '(';
  text.back() = ')';
  return text;
}

/// out (columns) += row (rows) times matrix (rows, columns).
void add_product(const double* row, int64_t rows, const double* matrix, int64_t columns, double* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[c] += row[r] * matrix[r * columns + c];
  }
}

/// Row `index` of a table whose input is one-hot, with the residual of an embedding layer: the input itself
/// where its width is that of the output, or half of it (SPEC section 4).
void add_embedded(const Array& table, int64_t index, double* to) {
  const int64_t n_in = table.size(0), n_out = table.size(1);
  const auto* row = table.data<double>() + index * n_out;
  for (int64_t d = 0; d < n_out; ++d) to[d] += row[d];
  if (n_out == n_in) to[index] += 1.0;
  if (n_out == 2 * n_in) {
    to[index] += 1.0;
    to[n_in + index] += 1.0;
  }
}

}  // namespace

void Conditions::check_values(const Array& charge_spin, const Array& fparam) const {
  const bool takes_charge_spin = model_.conditions.takes_charge_spin;
  const int64_t n_fparam = model_.conditions.n_fparam;
  if (!taken()) {
    if (!charge_spin.defined() && !fparam.defined()) return;
    throw Error("charge, spin or frame parameters were given, but this model takes none: leave them out");
  }
  const bool pair = charge_spin.defined() && charge_spin.dim() == 2 && charge_spin.size(1) == 2 &&
                    charge_spin.dtype() == Dtype::int64 && charge_spin.size(0) > 0;
  if (takes_charge_spin != charge_spin.defined() || (takes_charge_spin && !pair)) {
    throw Error(std::string("expected `charge_spin` ") +
                (takes_charge_spin ? "(n_systems, 2) of integers" : "to be left out") + ", got " +
                shape_of(charge_spin));
  }
  const bool numbers = fparam.defined() && fparam.dim() == 2 && fparam.size(1) == n_fparam &&
                       fparam.dtype() == Dtype::float64 && fparam.size(0) > 0;
  if ((n_fparam > 0) != fparam.defined() || (n_fparam > 0 && !numbers)) {
    throw Error("expected `fparam` " +
                (n_fparam > 0 ? "(n_systems, " + std::to_string(n_fparam) + ") of float64"
                              : std::string("to be left out")) +
                ", got " + shape_of(fparam));
  }
  if (pair && numbers && charge_spin.size(0) != fparam.size(0)) {
    throw Error("expected `charge_spin` and `fparam` of the same structures, got " + shape_of(charge_spin) +
                " and " + shape_of(fparam));
  }
  if (pair) {
    const auto* value = charge_spin.data<int64_t>();
    for (int64_t s = 0; s < charge_spin.size(0); ++s) {
      check_range("charge", value[2 * s], charges);
      check_range("spin", value[2 * s + 1], multiplicities);
    }
  }
  if (numbers) {
    const auto* value = fparam.data<double>();
    for (int64_t x = 0; x < fparam.numel(); ++x) {
      if (!std::isfinite(value[x]))
        throw Error("expected finite frame parameters, got " + std::to_string(value[x]));
    }
  }
}

bool Conditions::set(const Array& charge_spin, const Array& fparam) {
  check_values(charge_spin, fparam);
  if (!taken()) return false;
  const int64_t n_systems = charge_spin.defined() ? charge_spin.size(0) : fparam.size(0);
  const int64_t n_fparam = model_.conditions.n_fparam, width = 2 + n_fparam;
  const Array all = Array::zeros({n_systems, width}, Dtype::float64);
  auto* row = all.data<double>();
  for (int64_t s = 0; s < n_systems; ++s) {
    for (int64_t k = 0; k < 2 && charge_spin.defined(); ++k) {
      row[width * s + k] = static_cast<double>(charge_spin.data<int64_t>()[2 * s + k]);
    }
    if (fparam.defined()) std::copy_n(fparam.data<double>() + n_fparam * s, n_fparam, row + width * s + 2);
  }

  // in the order of their first structure
  std::vector<int64_t> first, of_system(static_cast<size_t>(n_systems), 0);
  for (int64_t s = 0; s < n_systems; ++s) {
    const auto same = std::find_if(first.begin(), first.end(), [&](int64_t other) {
      return std::equal(row + width * s, row + width * (s + 1), row + width * other);
    });
    of_system[static_cast<size_t>(s)] = same - first.begin();
    if (same == first.end()) first.push_back(s);
  }
  const Array distinct = all.select(first);
  if (given_ && of_system == of_system_ && distinct.equals(values_)) return false;
  of_system_ = std::move(of_system);
  values_ = distinct;
  n_ = distinct.size(0);
  given_ = true;
  return true;
}

Array Conditions::shift() const {
  const ConditionSource& source = model_.conditions;
  if (!source.takes_charge_spin) return {};
  const int64_t width = model_.n_dim;
  const Array out = Array::zeros({n_, width}, Dtype::float64);
  const auto* values = values_.data<double>();
  for (int64_t k = 0; k < n_; ++k) {
    const double* given = values + k * values_.size(1);
    std::vector<double> pair(static_cast<size_t>(2 * width), 0.0);
    add_embedded(source.charge_matrix, static_cast<int64_t>(given[0]) + source.charge_offset, pair.data());
    add_embedded(source.spin_matrix, static_cast<int64_t>(given[1]), pair.data() + width);
    double* to = out.data<double>() + k * width;
    std::copy_n(source.mix_bias.data<double>(), width, to);
    add_product(pair.data(), 2 * width, source.mix_matrix.data<double>(), width, to);
    for (int64_t d = 0; d < width; ++d) to[d] = activate(source.phi, to[d]);
  }
  return out;
}

Array Conditions::fitting_inputs() const {
  const ConditionSource& source = model_.conditions;
  const Array out = Array::zeros({n_, source.n_fparam + source.n_case}, Dtype::float64);
  auto* to = out.data<double>();
  for (int64_t k = 0; k < n_; ++k) {
    for (int64_t d = 0; d < source.n_fparam; ++d) {
      const double given = values_.data<double>()[k * values_.size(1) + 2 + d];
      *to++ = (given - source.fparam_avg.data<double>()[d]) * source.fparam_inv_std.data<double>()[d];
    }
    for (int64_t d = 0; d < source.n_case; ++d) *to++ = source.case_embedding.data<double>()[d];
  }
  return out;
}

namespace {

/// Y[t] + c_k, k slow: (K n_types, width).
Array shifted(const Array& table, const Array& shift, int64_t n_conditions) {
  const int64_t n_types = table.size(0), width = table.size(1);
  const Array rows = Array::empty({n_conditions * n_types, width}, Dtype::float64);
  auto* to = rows.data<double>();
  for (int64_t k = 0; k < n_conditions; ++k) {
    for (int64_t x = 0; x < n_types * width; ++x) {
      const double added = shift.defined() ? shift.data<double>()[k * width + x % width] : 0.0;
      *to++ = table.data<double>()[x] + added;
    }
  }
  return rows;
}

template <class V>
std::vector<V> repeated(const std::vector<V>& values, int64_t n) {
  std::vector<V> all;
  all.reserve(values.size() * static_cast<size_t>(n));
  for (int64_t k = 0; k < n; ++k) all.insert(all.end(), values.begin(), values.end());
  return all;
}

Array identity(int64_t n, int64_t repeats) {
  const Array rows = Array::zeros({repeats * n, n}, Dtype::float64);
  for (int64_t x = 0; x < repeats * n; ++x) rows.data<double>()[x * n + x % n] = 1.0;
  return rows;
}

}  // namespace

TypeTables Conditions::tables() const {
  const int64_t n_types = model_.n_types();
  TypeTables tables;
  tables.rules = model_.rules;
  tables.n_conditions = n_;
  tables.rules.condition_of_system = of_system_;
  tables.rules.n_conditions = n_;
  tables.shift = shift();
  tables.nodes = shifted(model_.embedding.table, tables.shift, n_);
  if (taken()) tables.fitting_inputs = fitting_inputs();
  tables.energy_shift = repeated(model_.readout.shift, n_);
  tables.energy_weight = repeated(model_.readout.weight, n_);
  tables.mean = repeated(model_.geometry.mean, n_);
  tables.stddev = repeated(model_.geometry.stddev, n_);
  if (!tables.rules.group_by_system) {
    const bool by_condition = tables.rules.group_by_condition;
    Array of_group;  // (K n_types, n_dim)
    if (by_condition) {
      std::vector<int64_t> condition;
      for (int64_t x = 0; x < n_ * n_types; ++x) condition.push_back(x / n_types);
      of_group = tables.shift.select(condition);
    }
    tables.features = group_features(model_.embedding, identity(n_types, by_condition ? n_ : 1), of_group);
  }

  // constant inputs of the fitting net, side by side
  const ReadoutSource& net = model_.readout;
  const Array rows = net.concat_table ? shifted(net.table, tables.shift, n_) : Array();
  const int64_t n_table = rows.defined() ? rows.size(1) : 0;
  const int64_t n_case = net.case_embedding.defined() ? net.case_embedding.numel() : 0;
  const int64_t width = n_table + n_case + net.n_constant;
  tables.fitting = Array::zeros({n_ * n_types, width}, Dtype::float64);
  for (int64_t x = 0; x < n_ * n_types; ++x) {
    double* to = tables.fitting.data<double>() + x * width;
    if (n_table > 0) to = std::copy_n(rows.data<double>() + x * n_table, n_table, to);
    if (n_case > 0) to = std::copy_n(net.case_embedding.data<double>(), n_case, to);
    if (net.n_constant > 0) {
      std::copy_n(tables.fitting_inputs.data<double>() + x / n_types * net.n_constant, net.n_constant, to);
    }
  }
  return tables;
}

void Conditions::check(int64_t n_systems, int64_t n_ghost) const {
  if (!taken()) return;
  if (!given_) {
    throw Error(
        "expected charge and spin or frame parameters for this model, got none: call set_conditions before "
        "an evaluation");
  }
  if (of_system_.size() > 1 && static_cast<int64_t>(of_system_.size()) != n_systems) {
    throw Error("expected conditions of " + std::to_string(n_systems) + " structures, got " +
                std::to_string(of_system_.size()) +
                ": call set_conditions with one row for each, or one for all");
  }
  if (n_ > 1 && n_ghost > 0) {
    throw Error("expected one condition for all atoms where there are ghosts, got " + std::to_string(n_));
  }
}

}  // namespace moecalc
