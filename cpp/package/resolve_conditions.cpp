// Charge, multiplicity and frame parameters that a user gave, against what a package says that its model
// takes.
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "moecalc/error.h"
#include "package/conditions.h"

namespace moecalc {

namespace {

std::string shown(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.15g", value);
  return text;
}

std::string shown(const std::vector<double>& values) {
  std::string text;
  for (const double value : values) {
    if (!text.empty()) text += ' ';
    text += shown(value);
  }
  return text;
}

// of a package whose values are fixed, as CHARGE_RANGE and SPIN_RANGE of moecalc/conditions.py
const std::vector<double> charge_range{-100.0, 99.0};
const std::vector<double> spin_range{0.0, 99.0};

/// `conditions` of the metadata; a package that does not say takes nothing.
class Taken {
 public:
  explicit Taken(const std::string& metadata) {
    const Json record = Json::parse(metadata);
    if (!record.has("conditions") || record.at("conditions").kind() == Json::Kind::null) return;
    record_ = record.at("conditions");
    has_record_ = true;
  }

  const Json* part(const char* name) const {
    if (!has_record_ || !record_.has(name) || record_.at(name).kind() == Json::Kind::null) return nullptr;
    return &record_.at(name);
  }
  bool flag(const char* name) const { return part(name) != nullptr && part(name)->boolean(); }

 private:
  Json record_;
  bool has_record_ = false;
};

const Json* member(const Json* object, const char* name) {
  if (object == nullptr || !object->has(name) || object->at(name).kind() == Json::Kind::null) return nullptr;
  return &object->at(name);
}

int64_t whole(const char* name, double value, const std::vector<double>& limits) {
  const std::string expectation =
      "expected a whole number from " + shown(limits[0]) + " to " + shown(limits[1]);
  if (!std::isfinite(value) || value != std::floor(value)) {
    const std::string why = std::isfinite(value) ? ": fractions have no meaning in this embedding" : "";
    throw Error(std::string(name) + " = " + shown(value) + ", " + expectation + why);
  }
  if (value < limits[0] || value > limits[1]) {
    throw Error(std::string(name) + " = " + shown(value) + ", " + expectation);
  }
  return static_cast<int64_t>(value);
}

void check_fparam(const std::vector<double>& values, size_t size) {
  if (values.size() != size) {
    throw Error("fparam has " + std::to_string(values.size()) + " number" + (values.size() == 1 ? "" : "s") +
                " (" + shown(values) + "), expected " + std::to_string(size) +
                " as this model was trained with");
  }
  for (const double value : values) {
    if (!std::isfinite(value)) throw Error("fparam has entry " + shown(value) + ", expected finite numbers");
  }
}

/// Refuses values for what the model does not take, and others than those that are fixed in the package.
void check_closed(const std::string& name, const std::optional<std::vector<double>>& given, bool taken,
                  const Json* fixed, const std::string& hint) {
  if (!given || taken) return;
  const Json* held = member(fixed, name.c_str());
  if (held == nullptr) {
    throw Error(name + " = " + shown(*given) + " was given, but this model takes no " + name + ": " + hint);
  }
  const bool is_list = held->kind() == Json::Kind::list;
  const std::vector<double> values =
      is_list ? held->numbers(held->list().size()) : std::vector<double>{held->number()};
  if (is_list) {
    check_fparam(*given, values.size());
  } else {
    whole(name.c_str(), given->at(0), name == "charge" ? charge_range : spin_range);
  }
  if (values != *given) {
    throw Error(name + " = " + shown(*given) + " was given, but this package is fixed at " + name + " " +
                shown(values) + ": package the checkpoint again for other values");
  }
}

std::optional<std::vector<double>> list_of(const std::optional<double>& value) {
  if (!value) return std::nullopt;
  return std::vector<double>{*value};
}

class Resolver {
 public:
  Resolver(const Taken& taken, GivenConditions given)
      : taken_(taken),
        given_(std::move(given)),
        charge_spin_(taken.part("charge_spin")),
        fparam_(taken.part("fparam")),
        shared_(taken.flag("fparam_is_charge_spin") && charge_spin_ != nullptr) {}

  ResolvedConditions run() {
    if (shared_) {
      take_charge_spin_from_fparam();
    } else {
      const Json* fixed = taken_.part("fixed");
      const bool may_be_both = fparam_ != nullptr && fparam_->at("size").number() == 2.0;
      const std::string hint = may_be_both
                                   ? "give fparam, if its two frame parameters are charge and multiplicity"
                                   : "leave it out";
      check_closed("charge", list_of(given_.charge), charge_spin_ != nullptr, fixed, hint);
      check_closed("spin", list_of(given_.spin), charge_spin_ != nullptr, fixed, hint);
      check_closed("fparam", given_.fparam, fparam_ != nullptr, fixed, "leave it out");
    }
    if (charge_spin_ != nullptr) resolve_charge_spin();
    if (shared_) {
      use_fparam({static_cast<double>(pair_[0]), static_cast<double>(pair_[1])}, /*is_default=*/false, false);
    } else if (fparam_ != nullptr) {
      resolve_fparam();
    }
    return std::move(out_);
  }

 private:
  /// One input of two numbers is both.
  void take_charge_spin_from_fparam() {
    if (!given_.fparam) return;
    check_fparam(*given_.fparam, 2);
    size_t k = 0;
    for (auto [name, value] : {std::pair{"charge", &given_.charge}, std::pair{"spin", &given_.spin}}) {
      const double number = (*given_.fparam)[k++];
      if (*value && **value != number) {
        throw Error(std::string(name) + " = " + shown(**value) + " but fparam = " + shown(*given_.fparam) +
                    ", which is charge and spin in this model: give one of them, or equal values");
      }
      *value = number;
    }
  }

  void resolve_charge_spin() {
    const Json* fallback = member(charge_spin_, "default");
    size_t k = 0;
    for (auto [name, range, value] : {std::tuple{"charge", "charge_range", given_.charge},
                                      std::tuple{"spin", "spin_range", given_.spin}}) {
      if (!value && fallback == nullptr) {
        const std::string missing = !given_.charge && !given_.spin ? "both" : name;
        throw Error("this model needs charge and spin (multiplicity 2S+1) and has no default: give " +
                    missing);
      }
      pair_[k] = whole(name, value ? *value : fallback->numbers(2)[k], charge_spin_->at(range).numbers(2));
      tell(std::string(name) + " " + std::to_string(pair_[k]), !value);
      ++k;
    }
    out_.charge_spin = Array::of(std::vector<int64_t>{pair_[0], pair_[1]}, {1, 2});
  }

  void resolve_fparam() {
    const double size = fparam_->at("size").number();
    const Json* fallback = member(fparam_, "default");
    if (given_.fparam) {
      check_fparam(*given_.fparam, static_cast<size_t>(size));
      use_fparam(*given_.fparam, false, true);
    } else if (fallback != nullptr) {
      use_fparam(fallback->numbers(static_cast<size_t>(size)), true, true);
    } else {
      throw Error("this model needs " + shown(size) + " frame parameters and has no default: give fparam");
    }
  }

  void use_fparam(const std::vector<double>& values, bool is_default, bool told) {
    out_.fparam = Array::of(values, {1, static_cast<int64_t>(values.size())});
    if (told) tell("fparam " + shown(values), is_default);
  }

  void tell(const std::string& text, bool is_default) {
    const auto append = [&](std::string& to) {
      if (!to.empty()) to += ", ";
      to += text;
    };
    append(out_.applied.values);
    if (is_default) append(out_.applied.defaults);
  }

  const Taken& taken_;
  GivenConditions given_;
  const Json* charge_spin_;
  const Json* fparam_;
  bool shared_;
  int64_t pair_[2] = {0, 0};
  ResolvedConditions out_;
};

}  // namespace

ResolvedConditions resolve_conditions(const std::string& metadata, const GivenConditions& given) {
  const Taken taken(metadata);
  return Resolver(taken, given).run();
}

}  // namespace moecalc
