#include "conditions.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "moecalc/archive.h"

namespace moecalc {

using torch::jit::Module;

namespace {

constexpr std::array<int64_t, 2> charges{-100, 99}, multiplicities{0, 99};  // rows of the embeddings

at::TensorOptions doubles() { return at::TensorOptions().dtype(at::kDouble); }

void check_range(const char* name, int64_t value, const std::array<int64_t, 2>& range) {
  if (value >= range[0] && value <= range[1]) return;
  throw Error(std::string(name) + " = " + std::to_string(value) + ", expected a whole number from " +
              std::to_string(range[0]) + " to " + std::to_string(range[1]));
}

at::Device device_of(const Module& module) {
  for (const at::Tensor& tensor : module.buffers()) return tensor.device();
  for (const at::Tensor& tensor : module.parameters()) return tensor.device();
  return {at::kCPU};
}

std::string shape_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return "none";
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(tensor.size(d));
  }
  return text + ")";
}

}  // namespace

Conditions::Conditions(const Module& model) {
  if (!model.hasattr("conditions")) return;
  module_ = model.attr("conditions").toModule();
  takes_charge_spin_ = module_.attr("takes_charge_spin").toBool();
  routed_ = module_.attr("routed").toBool();
  n_fparam_ = module_.attr("n_fparam").toInt();
  n_case_ = module_.attr("n_case").toInt();
}

void Conditions::check_values(const at::Tensor& charge_spin, const at::Tensor& fparam) const {
  if (!taken()) {
    if (!charge_spin.defined() && !fparam.defined()) return;
    throw Error("charge, spin or frame parameters were given, but this model takes none: leave them out");
  }
  const bool pair = charge_spin.defined() && charge_spin.dim() == 2 && charge_spin.size(1) == 2 &&
                    charge_spin.scalar_type() == at::kLong && charge_spin.size(0) > 0;
  if (takes_charge_spin_ != charge_spin.defined() || (takes_charge_spin_ && !pair)) {
    throw Error(std::string("expected `charge_spin` ") +
                (takes_charge_spin_ ? "(n_systems, 2) of integers" : "to be left out") + ", got " +
                shape_of(charge_spin));
  }
  const bool numbers = fparam.defined() && fparam.dim() == 2 && fparam.size(1) == n_fparam_ &&
                       fparam.scalar_type() == at::kDouble && fparam.size(0) > 0;
  if ((n_fparam_ > 0) != fparam.defined() || (n_fparam_ > 0 && !numbers)) {
    throw Error("expected `fparam` " +
                (n_fparam_ > 0 ? "(n_systems, " + std::to_string(n_fparam_) + ") of float64"
                               : std::string("to be left out")) +
                ", got " + shape_of(fparam));
  }
  if (pair && numbers && charge_spin.size(0) != fparam.size(0)) {
    throw Error("expected `charge_spin` and `fparam` of the same structures, got " + shape_of(charge_spin) +
                " and " + shape_of(fparam));
  }
  if (pair) {
    const at::Tensor rows = charge_spin.contiguous();
    const auto* value = rows.const_data_ptr<int64_t>();
    for (int64_t s = 0; s < rows.size(0); ++s) {
      check_range("charge", value[2 * s], charges);
      check_range("spin", value[2 * s + 1], multiplicities);
    }
  }
  if (numbers) {
    const at::Tensor rows = fparam.contiguous();
    const auto* value = rows.const_data_ptr<double>();
    for (int64_t x = 0; x < rows.numel(); ++x) {
      if (!std::isfinite(value[x]))
        throw Error("expected finite frame parameters, got " + std::to_string(value[x]));
    }
  }
}

bool Conditions::set(const at::Tensor& charge_spin, const at::Tensor& fparam) {
  check_values(charge_spin, fparam);
  if (!taken()) return false;
  const int64_t n_systems = charge_spin.defined() ? charge_spin.size(0) : fparam.size(0);
  const int64_t width = 2 + n_fparam_;
  at::Tensor all = at::zeros({n_systems, width}, doubles());
  if (charge_spin.defined()) all.narrow(1, 0, 2).copy_(charge_spin);
  if (fparam.defined()) all.narrow(1, 2, n_fparam_).copy_(fparam);
  const auto* row = all.const_data_ptr<double>();

  // in the order of their first structure
  std::vector<int64_t> first;
  of_system_.assign(static_cast<size_t>(n_systems), 0);
  for (int64_t s = 0; s < n_systems; ++s) {
    const auto same = std::find_if(first.begin(), first.end(), [&](int64_t other) {
      return std::equal(row + width * s, row + width * (s + 1), row + width * other);
    });
    of_system_[static_cast<size_t>(s)] = same - first.begin();
    if (same == first.end()) first.push_back(s);
  }
  const at::Tensor distinct = all.index_select(0, at::tensor(first, at::TensorOptions().dtype(at::kLong)));
  if (given_ && at::equal(distinct, values_)) return false;
  given_ = false;  // until all is there
  values_ = distinct;
  n_ = distinct.size(0);
  const at::NoGradGuard no_grad;
  const at::Device device = device_of(module_);
  const auto on_cpu = [](const torch::jit::IValue& value) {
    return value.toTensor().detach().to(at::kCPU, at::kDouble).contiguous();
  };
  shift_ = at::Tensor();
  if (takes_charge_spin_) {
    const at::Tensor pairs = distinct.narrow(1, 0, 2).to(device, at::kLong);
    shift_ = on_cpu(module_.get_method("shift")({pairs}));
  }
  const at::Tensor parameters = distinct.narrow(1, 2, n_fparam_).contiguous().to(device);
  fitting_inputs_ = on_cpu(module_.get_method("fitting_input")({parameters}));
  given_ = true;
  return true;
}

void Conditions::check(int64_t n_systems, int64_t n_ghost) const {
  if (!taken()) return;
  if (!given_) {
    throw Error(
        "expected charge and spin or frame parameters for this model, got none: call set_conditions before "
        "an "
        "evaluation");
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

TypeTables type_tables(const Conditions& conditions, const Module& embedding, const Module& readout) {
  const at::NoGradGuard no_grad;
  const auto rows_of = [](const Module& module) {
    Module table = module.attr("table").toModule();
    return table.get_method("forward")({}).toTensor().detach().to(at::kCPU);
  };
  /// Y[t] + c_k in the dtype of Y, k slow.
  const auto shifted = [&](const at::Tensor& table) {
    at::Tensor rows = table.unsqueeze(0).expand({conditions.n(), -1, -1});
    if (conditions.shift().defined()) rows = rows + conditions.shift().to(table.scalar_type()).unsqueeze(1);
    return rows.reshape({-1, table.size(1)}).contiguous();
  };
  TypeTables tables;
  tables.n_conditions = conditions.n();
  const at::Tensor table = rows_of(embedding);
  tables.nodes = shifted(table);
  const Module net = readout.attr("net").toModule();
  const at::ScalarType dtype = net.attr("out_bias").toTensor().scalar_type();
  std::vector<at::Tensor> parts;
  if (net.attr("concat_table").toBool()) parts.push_back(shifted(rows_of(net).to(dtype)).to(at::kDouble));
  const auto of_all = [&](const at::Tensor& rows) {
    return rows.unsqueeze(1).expand({conditions.n(), table.size(0), -1}).reshape({-1, rows.size(1)});
  };
  if (net.attr("with_case").toBool()) {
    const at::Tensor row = net.attr("case_embedding").toTensor().detach().to(at::kCPU, at::kDouble);
    parts.push_back(of_all(row.unsqueeze(0).expand({conditions.n(), -1})));
  }
  if (conditions.fitting_inputs().defined() && net.hasattr("n_constant") &&
      net.attr("n_constant").toInt() > 0) {
    parts.push_back(of_all(conditions.fitting_inputs().to(dtype).to(at::kDouble)));
  }
  const at::Tensor none = at::zeros({conditions.n() * table.size(0), 0}, doubles());
  tables.fitting = parts.empty() ? none : at::cat(parts, 1).contiguous();
  return tables;
}

}  // namespace moecalc
