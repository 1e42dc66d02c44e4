#include "package/conditions.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "moecalc/error.h"
#include "package/routing.h"

namespace moecalc {

namespace {

// rows of the embeddings
constexpr std::array<int64_t, 2> charges{-100, 99};
constexpr std::array<int64_t, 2> multiplicities{0, 99};

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
  const int64_t n_in = table.size(0);
  const int64_t n_out = table.size(1);
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
    for (int64_t system = 0; system < charge_spin.size(0); ++system) {
      check_range("charge", value[2 * system], charges);
      check_range("spin", value[2 * system + 1], multiplicities);
    }
  }
  if (numbers) {
    const auto* value = fparam.data<double>();
    for (int64_t k = 0; k < fparam.numel(); ++k) {
      if (std::isfinite(value[k])) continue;
      throw Error("expected finite frame parameters, got " + std::to_string(value[k]));
    }
  }
}

bool Conditions::set(const Array& charge_spin, const Array& fparam) {
  check_values(charge_spin, fparam);
  if (!taken()) return false;
  const int64_t n_systems = charge_spin.defined() ? charge_spin.size(0) : fparam.size(0);
  const int64_t n_fparam = model_.conditions.n_fparam;
  const int64_t width = 2 + n_fparam;
  const Array all = Array::zeros({n_systems, width}, Dtype::float64);
  auto* row = all.data<double>();
  for (int64_t system = 0; system < n_systems; ++system) {
    for (int64_t k = 0; k < 2 && charge_spin.defined(); ++k) {
      row[width * system + k] = static_cast<double>(charge_spin.data<int64_t>()[2 * system + k]);
    }
    if (fparam.defined())
      std::copy_n(fparam.data<double>() + n_fparam * system, n_fparam, row + width * system + 2);
  }

  // in the order of their first structure
  std::vector<int64_t> first;
  std::vector<int64_t> of_system(static_cast<size_t>(n_systems), 0);
  for (int64_t system = 0; system < n_systems; ++system) {
    const auto same = std::find_if(first.begin(), first.end(), [&](int64_t other) {
      return std::equal(row + width * system, row + width * (system + 1), row + width * other);
    });
    of_system[static_cast<size_t>(system)] = same - first.begin();
    if (same == first.end()) first.push_back(system);
  }
  const Array distinct = all.select(first);
  if (given_ && of_system == of_system_ && distinct.equals(values_)) return false;
  of_system_ = std::move(of_system);
  values_ = distinct;
  n_conditions_ = distinct.size(0);
  given_ = true;
  return true;
}

/// c = phi([C_q, S_s] W + b), SPEC section 12.
Array Conditions::shift() const {
  const ConditionSource& source = model_.conditions;
  if (!source.takes_charge_spin) return {};
  const int64_t width = model_.n_dim;
  const Array out = Array::zeros({n_conditions_, width}, Dtype::float64);
  const auto* values = values_.data<double>();
  for (int64_t k = 0; k < n_conditions_; ++k) {
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

/// (fparam - average) / std, and the case embedding.
Array Conditions::fitting_inputs() const {
  const ConditionSource& source = model_.conditions;
  const Array out = Array::zeros({n_conditions_, source.n_fparam + source.n_case}, Dtype::float64);
  auto* to = out.data<double>();
  for (int64_t k = 0; k < n_conditions_; ++k) {
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
  const int64_t n_types = table.size(0);
  const int64_t width = table.size(1);
  const Array rows = Array::empty({n_conditions * n_types, width}, Dtype::float64);
  auto* to = rows.data<double>();
  for (int64_t k = 0; k < n_conditions; ++k) {
    for (int64_t d = 0; d < n_types * width; ++d) {
      const double added = shift.defined() ? shift.data<double>()[k * width + d % width] : 0.0;
      *to++ = table.data<double>()[d] + added;
    }
  }
  return rows;
}

std::vector<double> repeated(const std::vector<double>& values, int64_t repeats) {
  std::vector<double> all;
  all.reserve(values.size() * static_cast<size_t>(repeats));
  for (int64_t k = 0; k < repeats; ++k) all.insert(all.end(), values.begin(), values.end());
  return all;
}

/// (repeats * width, width)
Array identity(int64_t width, int64_t repeats) {
  const Array rows = Array::zeros({repeats * width, width}, Dtype::float64);
  for (int64_t row = 0; row < repeats * width; ++row) rows.data<double>()[row * width + row % width] = 1.0;
  return rows;
}

}  // namespace

/// Constant inputs of the fitting net, side by side.
Array Conditions::constant_inputs(const TypeTables& tables) const {
  const ReadoutSource& net = model_.readout;
  const int64_t n_types = model_.n_types();
  const Array rows = net.concat_table ? shifted(net.table, tables.shift, n_conditions_) : Array();
  const int64_t n_table = rows.defined() ? rows.size(1) : 0;
  const int64_t n_case = net.case_embedding.defined() ? net.case_embedding.numel() : 0;
  const int64_t width = n_table + n_case + net.n_constant;
  const Array inputs = Array::zeros({n_conditions_ * n_types, width}, Dtype::float64);
  for (int64_t type = 0; type < n_conditions_ * n_types; ++type) {
    double* to = inputs.data<double>() + type * width;
    if (n_table > 0) to = std::copy_n(rows.data<double>() + type * n_table, n_table, to);
    if (n_case > 0) to = std::copy_n(net.case_embedding.data<double>(), n_case, to);
    if (net.n_constant > 0) {
      const double* given = tables.fitting_inputs.data<double>() + type / n_types * net.n_constant;
      std::copy_n(given, net.n_constant, to);
    }
  }
  return inputs;
}

TypeTables Conditions::tables() const {
  const int64_t n_types = model_.n_types();
  TypeTables tables;
  tables.rules = model_.rules;
  tables.n_conditions = n_conditions_;
  tables.rules.condition_of_system = of_system_;
  tables.rules.n_conditions = n_conditions_;
  tables.shift = shift();
  tables.nodes = shifted(model_.embedding.table, tables.shift, n_conditions_);
  if (taken()) tables.fitting_inputs = fitting_inputs();
  tables.energy_shift = repeated(model_.readout.shift, n_conditions_);
  tables.energy_weight = repeated(model_.readout.weight, n_conditions_);
  tables.mean = repeated(model_.geometry.mean, n_conditions_);
  tables.stddev = repeated(model_.geometry.stddev, n_conditions_);
  if (!tables.rules.group_by_system) {
    const bool by_condition = tables.rules.group_by_condition;
    Array of_group;  // (K n_types, n_dim)
    if (by_condition) {
      std::vector<int64_t> condition;
      for (int64_t type = 0; type < n_conditions_ * n_types; ++type) condition.push_back(type / n_types);
      of_group = tables.shift.select(condition);
    }
    tables.features =
        group_features(model_.embedding, identity(n_types, by_condition ? n_conditions_ : 1), of_group);
  }
  tables.fitting = constant_inputs(tables);
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
  if (n_conditions_ > 1 && n_ghost > 0) {
    throw Error("expected one condition for all atoms where there are ghosts, got " +
                std::to_string(n_conditions_));
  }
}

}  // namespace moecalc
