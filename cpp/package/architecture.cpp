#include "package/architecture.h"

#include <algorithm>
#include <cmath>

#include "core/json.h"
#include "moecalc/error.h"
#include "package/architecture_reader.h"
#include "package/metadata_check.h"
#include "package/tensor_table.h"

namespace moecalc {

namespace {

Json parsed(const std::string& text, const char* name) {
  try {
    return Json::parse(text);
  } catch (const Error& error) {
    throw Error(std::string(name) + ": " + error.what() + ": package the checkpoint again");
  }
}

}  // namespace

LoadedPackage load_package(const std::string& path) {
  LoadedPackage package;
  package.file = std::make_shared<const PackageFile>(path);
  const PackageFile& file = *package.file;
  check_package(file);
  for (const char* record : {"extra/architecture.json", "extra/tensors.json"}) {
    if (file.records().count(record) != 0) continue;
    throw Error(file.path() + ": made by an older moecalc, without the record `" + record +
                "`: run `moecalc upgrade " + file.path() +
                " -o NEW.moe.pt`, or package the checkpoint again");
  }
  package.metadata = file.record("extra/metadata.json");
  package.reference = "[]";
  if (file.records().count("extra/reference.json") != 0)
    package.reference = file.record("extra/reference.json");
  try {
    const Json metadata = parsed(package.metadata, "metadata.json");
    const Json architecture = parsed(file.record("extra/architecture.json"), "architecture.json");
    const Json tensors = parsed(file.record("extra/tensors.json"), "tensors.json");
    TensorTable table(package.file, tensors);
    package.architecture = read_architecture(architecture, table, metadata);
    package.facts = facts_of(metadata, package.architecture);
  } catch (const Error& error) {
    throw Error(file.path() + ": " + error.what());
  }
  return package;
}

std::optional<kernels::Activation> kernel_activation(const ActivationSource& phi) {
  static const std::map<std::string, kernels::ActivationKind> kinds = {
      {"linear", kernels::ActivationKind::linear},   {"silu", kernels::ActivationKind::silu},
      {"silut", kernels::ActivationKind::silut},     {"tanh", kernels::ActivationKind::tanh},
      {"sigmoid", kernels::ActivationKind::sigmoid}, {"relu", kernels::ActivationKind::relu},
      {"relu6", kernels::ActivationKind::relu6},     {"gelu", kernels::ActivationKind::gelu}};
  const auto found = kinds.find(phi.kind);
  if (found == kinds.end()) return std::nullopt;
  return kernels::Activation{found->second, phi.threshold, phi.slope, phi.offset};
}

double activate(const ActivationSource& phi, double x) {
  const auto sigmoid = [](double y) { return 1.0 / (1.0 + std::exp(-y)); };
  if (phi.kind == "silu") return x * sigmoid(x);
  if (phi.kind == "silut") {
    return x < phi.threshold ? x * sigmoid(x) : std::tanh(phi.slope * (x - phi.threshold)) + phi.offset;
  }
  if (phi.kind == "tanh") return std::tanh(x);
  if (phi.kind == "sigmoid") return sigmoid(x);
  if (phi.kind == "relu") return std::max(0.0, x);
  if (phi.kind == "relu6") return std::clamp(x, 0.0, 6.0);
  if (phi.kind == "softplus") return x > 20.0 ? x : std::log1p(std::exp(x));
  if (phi.kind == "gelu") {
    constexpr double root = 0.79788456080286535588;  // sqrt(2 / pi)
    return 0.5 * x * (1.0 + std::tanh(root * (x + 0.044715 * x * x * x)));
  }
  return x;
}

}  // namespace moecalc
