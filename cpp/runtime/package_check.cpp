#include "package_check.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#include "json.h"
#include "moecalc/archive.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

using torch::jit::IValue;
using torch::jit::Module;

constexpr int64_t max_width = 1 << 16;
constexpr int64_t max_experts = 1 << 12;
constexpr double max_cutoff = 100.0;  // Angstrom

constexpr std::array<const char*, 118> symbols = {
    "H",  "He", "Li", "Be", "B",  "C",  "N",  "O",  "F",  "Ne", "Na", "Mg", "Al", "Si", "P",  "S",  "Cl",
    "Ar", "K",  "Ca", "Sc", "Ti", "V",  "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se",
    "Br", "Kr", "Rb", "Sr", "Y",  "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb",
    "Te", "I",  "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er",
    "Tm", "Yb", "Lu", "Hf", "Ta", "W",  "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At",
    "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U",  "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No",
    "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og"};

std::string shown(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

std::string shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

/// A module and its place in the model, for messages.
class Part {
 public:
  Part(Module module, std::string place) : module_(std::move(module)), place_(std::move(place)) {}

  [[noreturn]] void refuse(const std::string& name, const std::string& expectation,
                           const std::string& got) const {
    throw Error("expected `" + place_ + name + "` to be " + expectation + ", got " + got +
                ": damaged or edited file, package the checkpoint again");
  }

  bool has(const std::string& name) const { return module_.hasattr(name); }

  IValue value(const std::string& name) const {
    if (!has(name)) {
      throw Error("expected a model with `" + place_ + name +
                  "`, got one without: package the checkpoint again");
    }
    return module_.attr(name);
  }

  Part part(const std::string& name) const {
    const IValue found = value(name);
    if (!found.isModule()) refuse(name, "a module", "another type");
    return {found.toModule(), place_ + name + "."};
  }

  std::vector<Part> children(const std::string& name) const {
    const Part parent = part(name);
    std::vector<Part> parts;
    for (const auto& child : parent.module_.named_children()) {
      parts.emplace_back(child.value, parent.place_ + child.name + ".");
    }
    return parts;
  }

  bool boolean(const std::string& name) const {
    const IValue found = value(name);
    if (!found.isBool()) refuse(name, "true or false", "another type");
    return found.toBool();
  }

  int64_t integer(const std::string& name, int64_t low, int64_t high) const {
    const IValue found = value(name);
    const std::string expectation =
        "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
    if (!found.isInt()) refuse(name, expectation, "another type");
    const int64_t number = found.toInt();
    if (number < low || number > high) refuse(name, expectation, std::to_string(number));
    return number;
  }

  /// A number in (low, high].
  double number(const std::string& name, double low, double high) const {
    const IValue found = value(name);
    const std::string expectation = "a number in (" + shown(low) + ", " + shown(high) + "]";
    if (!found.isDouble()) refuse(name, expectation, "another type");
    const double number = found.toDouble();
    if (!(number > low && number <= high)) refuse(name, expectation, shown(number));
    return number;
  }

  double finite(const std::string& name) const {
    const IValue found = value(name);
    if (!found.isDouble() || !std::isfinite(found.toDouble())) {
      refuse(name, "a finite number", found.isDouble() ? shown(found.toDouble()) : "another type");
    }
    return found.toDouble();
  }

  std::string text(const std::string& name) const {
    const IValue found = value(name);
    if (!found.isString()) refuse(name, "a text", "another type");
    return found.toStringRef();
  }

  at::Tensor tensor(const std::string& name, at::ScalarType dtype) const {
    const IValue found = value(name);
    if (!found.isTensor() || !found.toTensor().defined()) refuse(name, "a tensor", "another type");
    const at::Tensor tensor = found.toTensor();
    if (tensor.scalar_type() != dtype) {
      refuse(name, std::string("of type ") + c10::toString(dtype), c10::toString(tensor.scalar_type()));
    }
    return tensor;
  }

  at::Tensor tensor(const std::string& name, at::ScalarType dtype, at::IntArrayRef sizes) const {
    const at::Tensor found = tensor(name, dtype);
    if (found.sizes() != sizes) refuse(name, "of shape " + shown(sizes), shown(found.sizes()));
    return found;
  }

  /// Size of dimension `d` of a tensor of `n_dims` dimensions, within what any model has.
  int64_t width(const std::string& name, at::ScalarType dtype, int64_t n_dims, int64_t d) const {
    const at::Tensor found = tensor(name, dtype);
    if (found.dim() != n_dims || found.size(d) < 1 || found.size(d) > max_width) {
      refuse(
          name,
          "of " + std::to_string(n_dims) + " dimensions with 1 to " + std::to_string(max_width) + " columns",
          "shape " + shown(found.sizes()));
    }
    return found.size(d);
  }

  Module& module() { return module_; }
  const std::string& place() const { return place_; }

 private:
  Module module_;
  std::string place_;
};

class Checker {
 public:
  Checker(const Module& model, const DeferredTensors& deferred, const Json& metadata)
      : model_(model, ""), deferred_(deferred), metadata_(metadata) {}

  void run() {
    for (const char* name : {"elements", "cutoff", "angle_cutoff", "routing_level", "pair_mask",
                             "dtype_probe", "geometry", "embedding", "layers", "readout"}) {
      model_.value(name);
    }
    check_finite();
    check_elements();
    const at::ScalarType probe = model_.value("dtype_probe").isTensor()
                                     ? model_.value("dtype_probe").toTensor().scalar_type()
                                     : at::kByte;
    if (probe != at::kFloat && probe != at::kDouble) {
      model_.refuse("dtype_probe", "of type float or double", c10::toString(probe));
    }
    dtype_ = probe;
    level_ = model_.text("routing_level");
    if (level_ != "element" && level_ != "configuration") {
      throw Error("expected routing level 'element' or 'configuration', got '" + printable(level_, 40) +
                  "': upgrade moecalc");
    }
    check_embedding();
    const std::vector<Part> layers = model_.children("layers");
    if (layers.empty()) model_.refuse("layers", "at least one layer", "none");
    for (const Part& layer : layers) check_layer(layer);
    check_geometry();
    if (model_.has("conditions")) check_conditions();
    check_readout();
    try {
      check_metadata(layers.size());
    } catch (const Error& error) {
      throw Error(std::string("metadata.json: ") + error.what());
    }
  }

 private:
  void check_finite() {
    const auto check = [&](const auto& named) {
      for (const auto& entry : named) {
        const at::Tensor& tensor = entry.value;
        if (!tensor.is_floating_point() || tensor.numel() == 0) continue;
        // one pass, no copy; infinities and NaN survive a sum
        if (deferred_.holds(tensor) ? !deferred_.is_finite(tensor)
                                    : !std::isfinite(tensor.sum(at::kDouble).template item<double>())) {
          model_.refuse(entry.name, "finite", "NaN or infinity");
        }
      }
    };
    check(model_.module().named_parameters());
    check(model_.module().named_buffers());
  }

  void check_elements() {
    const IValue value = model_.value("elements");
    if (!value.isList() || value.toListRef().empty()) model_.refuse("elements", "a list of symbols", "none");
    std::set<std::string> seen;
    for (const IValue& element : value.toListRef()) {
      const std::string symbol = element.isString() ? element.toStringRef() : "";
      if (std::find(symbols.begin(), symbols.end(), symbol) == symbols.end()) {
        model_.refuse("elements", "element symbols", quoted(symbol, 20, '\''));
      }
      if (!seen.insert(symbol).second) model_.refuse("elements", "distinct symbols", symbol + " twice");
      elements_.push_back(symbol);
    }
    n_types_ = static_cast<int64_t>(elements_.size());
    const at::Tensor mask = model_.tensor("pair_mask", at::kBool, {n_types_, n_types_});
    if (!at::equal(mask, mask.t()))
      model_.refuse("pair_mask", "symmetric", "another one for i, j than for j, i");
  }

  void check_geometry() {
    const Part geometry = model_.part("geometry");
    cutoff_ = model_.number("cutoff", 0.0, max_cutoff);
    angle_cutoff_ = model_.finite("angle_cutoff");
    const double e_stop = geometry.number("e_stop", 0.0, max_cutoff);
    const double a_stop = geometry.number("a_stop", 0.0, max_cutoff);
    // the switches divide by start and by stop - start
    geometry.number("e_start", 0.0, std::nextafter(e_stop, 0.0));
    geometry.number("a_start", 0.0, std::nextafter(a_stop, 0.0));
    if (cutoff_ != e_stop) model_.refuse("cutoff", "that of the switch, " + shown(e_stop), shown(cutoff_));
    const double expected = with_angles_ ? a_stop : 0.0;
    if (angle_cutoff_ != expected) {
      model_.refuse("angle_cutoff", "that of the switch, " + shown(expected), shown(angle_cutoff_));
    }
    if (a_stop > e_stop) geometry.refuse("a_stop", "at most the cutoff, " + shown(e_stop), shown(a_stop));
    geometry.boolean("exp_switch");
    if (geometry.boolean("use_dist") != model_.part("embedding").boolean("use_dist")) {
      geometry.refuse("use_dist", "that of the embedding", "another");
    }
    geometry.finite("protection");
    geometry.tensor("mean", at::kDouble, {n_types_, 4});
    const at::Tensor stddev = geometry.tensor("stddev", at::kDouble, {n_types_, 4});
    if (stddev.min().item<double>() <= 0.0) geometry.refuse("stddev", "positive", "zero or less");
  }

  /// The type embedding (n_types, width), also as its code returns it.
  void check_table(const Part& owner, int64_t rows, at::ScalarType dtype) {
    Part table = owner.part("table");
    if (table.has("table")) {
      table.tensor("table", dtype, {rows, n_});
    }
    const at::Tensor result = table.module().get_method("forward")({}).toTensor();
    if (result.dim() != 2 || result.size(0) != rows || result.size(1) != n_ ||
        result.scalar_type() != dtype) {
      owner.refuse("table", "of shape " + shown({rows, n_}), shown(result.sizes()));
    }
  }

  void check_embedding() {
    const Part embedding = model_.part("embedding");
    n_ = embedding.part("table").has("table") ? embedding.part("table").width("table", dtype_, 2, 1)
                                              : embedding.part("table").width("matrix", dtype_, 2, 1);
    e_ = embedding.width("edge_matrix", dtype_, 2, 1);
    a_ = embedding.width("angle_matrix", dtype_, 2, 1);
    check_table(embedding, n_types_, dtype_);
    embedding.tensor("edge_matrix", dtype_, {1, e_});
    embedding.tensor("edge_bias", dtype_, {e_});
    embedding.tensor("angle_matrix", dtype_, {1, a_});
    check_activation(embedding.part("phi"));
    if (embedding.has("own_router_table") && embedding.boolean("own_router_table")) {
      embedding.part("router_table").tensor("table", dtype_, {n_types_, n_});
    }
    Part module = embedding;
    const at::Tensor identity = at::eye(
        n_types_, at::TensorOptions().dtype(dtype_).device(embedding.tensor("edge_bias", dtype_).device()));
    const at::Tensor features = module.module().get_method("group_features")({identity}).toTensor();
    if (features.sizes() != at::IntArrayRef({n_types_, n_}) || features.scalar_type() != dtype_) {
      embedding.refuse("group_features", "of shape " + shown({n_types_, n_}), shown(features.sizes()));
    }
  }

  static std::string check_activation(const Part& phi) {
    static const std::set<std::string> kinds = {"linear", "silu",  "silut", "tanh",    "sigmoid",
                                                "relu",   "relu6", "gelu",  "softplus"};
    const std::string kind = phi.text("kind");
    if (kinds.count(kind) == 0) phi.refuse("kind", "a known activation", quoted(kind, 40, '\''));
    return kind + shown(phi.finite("threshold")) + shown(phi.finite("slope")) + shown(phi.finite("offset"));
  }

  /// ids and weights of a table, or a gate, for `n_experts`.
  void check_router(const Part& layer, const std::string& name, int64_t n_experts) {
    const Part router = layer.part("routers").part(name);
    if (router.has("gate")) {
      const int64_t n_routed = router.integer("n_routed", 1, max_experts);
      router.integer("top_k", 1, n_routed);
      const int64_t n_shared = router.integer("n_shared", 0, max_experts);
      router.boolean("softmax_first");
      router.tensor("gate", dtype_, {n_, n_routed});
      if (n_routed + n_shared != n_experts) {
        router.refuse("n_routed", "for " + std::to_string(n_experts) + " experts, the shared ones included",
                      std::to_string(n_routed) + " and " + std::to_string(n_shared) + " shared");
      }
      return;
    }
    const int64_t k = router.width("ids", at::kLong, 2, 1);
    const at::Tensor ids = router.tensor("ids", at::kLong, {n_types_, k});
    router.tensor("weights", dtype_, {n_types_, k});
    if (ids.min().item<int64_t>() < 0 || ids.max().item<int64_t>() >= n_experts) {
      router.refuse(
          "ids", "in [0, " + std::to_string(n_experts) + ")",
          std::to_string(ids.min().item<int64_t>()) + " to " + std::to_string(ids.max().item<int64_t>()));
    }
    if (level_ != "element") model_.refuse("routing_level", "'element' with tables", "'" + level_ + "'");
  }

  void check_position(const Part& layer, const std::string& name, int64_t n_in, int64_t n_out) {
    const Part position = layer.part(name);
    const int64_t n_experts = position.width("bias", dtype_, 2, 0);
    if (n_experts > max_experts) position.refuse("bias", "at most 4096 experts", std::to_string(n_experts));
    position.tensor("matrix", dtype_, {n_experts, n_in, n_out});
    position.tensor("bias", dtype_, {n_experts, n_out});
    position.boolean("merge");
    const std::string phi = check_activation(position.part("phi"));
    if (phi_.empty()) phi_ = phi;
    if (phi != phi_) position.refuse("phi", "the activation of the other maps", "another");
    const std::string router = position.text("router");
    if (position.boolean("routed")) {
      check_router(layer, router, n_experts);
    } else if (n_experts != 1) {
      position.refuse("matrix", "one map where nothing is routed", std::to_string(n_experts));
    }
  }

  void check_layer(const Part& layer) {
    layer.integer("n_dim", n_, n_);
    const int64_t heads = layer.integer("n_head", 1, max_experts);
    const int64_t axis = layer.integer("axis", 1, std::min(n_, e_));
    layer.number("edge_norm", 0.0, 1e9);
    layer.number("angle_norm", 0.0, 1e9);
    const bool live_edge = layer.boolean("live_edge"), live_angle = layer.boolean("live_angle");
    const bool with_angles = layer.boolean("with_angles"), residual = layer.boolean("with_residual");
    if (with_angles && !live_edge) layer.refuse("with_angles", "false where edges have no update", "true");
    if (live_angle && !with_angles) layer.refuse("live_angle", "false where there are no angles", "true");
    for (const char* name : {"average", "sequential", "keep_far_edges"}) layer.boolean(name);
    if (layer.boolean("sequential") && !residual)
      layer.refuse("with_residual", "true for sequential updates", "false");
    with_angles_ = with_angles_ || with_angles;
    const bool compress = layer.boolean("compress"), split = layer.boolean("compress_split");
    const int64_t vc = layer.integer("vc_dim", compress ? 1 : n_, compress && !split ? max_width : n_);
    const int64_t ec = layer.integer("ec_dim", compress ? 1 : e_, compress && !split ? max_width : e_);

    check_position(layer, "node_self_mlp", n_, n_);
    check_position(layer, "node_sym_linear", axis * (e_ + n_), n_);
    check_position(layer, "node_edge_linear", 2 * n_ + e_, heads * n_);
    if (live_edge) check_position(layer, "edge_self_linear", 2 * n_ + e_, e_);
    if (with_angles) {
      check_position(layer, "edge_angle_linear1", a_ + vc + 2 * ec, e_);
      check_position(layer, "edge_angle_linear2", e_, e_);
      if (compress && !split) {
        layer.tensor("a_compress_n_linear", dtype_, {n_, vc});
        layer.tensor("a_compress_e_linear", dtype_, {e_, ec});
      }
    }
    if (live_angle) check_position(layer, "angle_self_linear", a_ + vc + 2 * ec, a_);
    if (!residual) return;
    layer.tensor("n_residual", dtype_, {2 + heads, n_});
    if (live_edge) layer.tensor("e_residual", dtype_, {with_angles ? 2 : 1, e_});
    if (live_angle) layer.tensor("a_residual", dtype_, {1, a_});
  }

  /// Charge, multiplicity and frame parameters (docs/architecture.md): float64 whatever the network's dtype.
  void check_conditions() {
    const Part conditions = model_.part("conditions");
    conditions.integer("n_dim", n_, n_);
    const int64_t n_fparam = conditions.integer("n_fparam", 0, max_width);
    const int64_t n_case = conditions.integer("n_case", 0, max_width);
    const bool charge_spin = conditions.boolean("takes_charge_spin");
    if (conditions.boolean("routed") && !charge_spin) {
      conditions.refuse("routed", "false where charge and spin are not taken", "true");
    }
    if (conditions.boolean("takes_fparam") != (n_fparam > 0)) {
      conditions.refuse("takes_fparam", "that of `n_fparam`", "another");
    }
    if (conditions.boolean("with_case") != (n_case > 0)) {
      conditions.refuse("with_case", "that of `n_case`", "another");
    }
    if (charge_spin) {
      const Part embedding = conditions.part("embedding");
      embedding.integer("charge_offset", 100, 100);
      embedding.tensor("charge_matrix", at::kDouble, {200, n_});
      embedding.tensor("spin_matrix", at::kDouble, {100, n_});
      embedding.tensor("mix_matrix", at::kDouble, {2 * n_, n_});
      embedding.tensor("mix_bias", at::kDouble, {n_});
      check_activation(embedding.part("phi"));
    }
    if (n_fparam > 0) {
      conditions.tensor("fparam_avg", at::kDouble, {n_fparam});
      conditions.tensor("fparam_inv_std", at::kDouble, {n_fparam});
    }
    if (n_case > 0) conditions.tensor("case_embedding", at::kDouble, {n_case});
    if (charge_spin || n_fparam > 0) n_constant_ = n_fparam + n_case;
    routed_ = conditions.boolean("routed");
    if (model_.part("embedding").boolean("routed") != routed_) {
      model_.part("embedding").refuse("routed", "that of the conditions", "another");
    }
    check_said_conditions(charge_spin, n_fparam);
  }

  /// What the metadata say is taken is what engines ask users for.
  void check_said_conditions(bool charge_spin, int64_t n_fparam) const {
    const Json* conditions = said("conditions");
    const auto taken = [&](const char* name) {
      return conditions != nullptr && conditions->kind() == Json::Kind::object && conditions->has(name) &&
             conditions->at(name).kind() != Json::Kind::null;
    };
    if (taken("charge_spin") != charge_spin) {
      refuse_metadata(
          std::string("metadata that say that charge and spin are ") + (charge_spin ? "taken" : "not taken"),
          "others");
    }
    const bool shared = taken("fparam_is_charge_spin") && conditions->at("fparam_is_charge_spin").boolean();
    if (!shared && taken("fparam") != (n_fparam > 0)) {
      refuse_metadata("metadata with the frame parameters of the model, " + std::to_string(n_fparam),
                      "others");
    }
    if (taken("fparam") && conditions->at("fparam").at("size").number() != static_cast<double>(n_fparam)) {
      refuse_metadata(std::to_string(n_fparam) + " frame parameters in the metadata, as in the model",
                      shown(conditions->at("fparam").at("size").number()));
    }
  }

  void check_readout() {
    const Part readout = model_.part("readout"), net = readout.part("net");
    readout.tensor("energy_shift", at::kDouble, {n_types_});
    readout.tensor("energy_weight", at::kDouble, {n_types_});
    const IValue bias = net.value("out_bias");
    const at::ScalarType dtype = bias.isTensor() ? bias.toTensor().scalar_type() : at::kByte;
    if (dtype != at::kFloat && dtype != at::kDouble) {
      net.refuse("out_bias", "of type float or double", c10::toString(dtype));
    }
    int64_t width = n_;
    if (net.boolean("concat_table")) {
      check_table(net, n_types_, dtype);
      width += n_;
    }
    if (net.boolean("with_case")) width += net.width("case_embedding", dtype, 1, 0);
    if (net.has("n_constant")) width += net.integer("n_constant", n_constant_, n_constant_);
    for (const Part& layer : net.children("layers")) {
      const int64_t n_out = layer.width("bias", dtype, 1, 0);
      layer.tensor("matrix", dtype, {width, n_out});
      if (layer.boolean("has_idt")) layer.tensor("idt", dtype, {n_out});
      const int64_t residual = layer.integer("residual", 0, 2);
      if (residual > 0 && n_out != residual * width) {
        layer.refuse("residual", "0 where the width does not allow it", std::to_string(residual));
      }
      check_activation(layer.part("phi"));
      width = n_out;
    }
    net.tensor("out_matrix", dtype, {width, 1});
    net.tensor("out_bias", dtype, {1});
  }

  /// A part of the metadata that is not there says nothing.
  const Json* said(const char* name) const { return metadata_.has(name) ? &metadata_.at(name) : nullptr; }

  static void same(const std::string& name, double module, const Json* said) {
    if (said != nullptr && module != said->number()) {
      refuse_metadata("the same `" + name + "` in model and metadata",
                      shown(module) + " and " + shown(said->number()));
    }
  }

  [[noreturn]] static void refuse_metadata(const std::string& expectation, const std::string& got) {
    throw Error("expected " + expectation + ", got " + got +
                ": damaged or edited file, package the checkpoint again");
  }

  /// Names and notes reach terminals and logs.
  static void check_texts(const std::string& name, const Json& json) {
    if (json.kind() == Json::Kind::text && has_control(json.text())) {
      refuse_metadata("metadata without control characters",
                      "'" + printable(json.text(), 40) + "' at `" + name + "`");
    }
    if (json.kind() == Json::Kind::list) {
      for (const Json& item : json.list()) check_texts(name, item);
    }
    if (json.kind() != Json::Kind::object) return;
    for (const auto& [key, value] : json.object()) check_texts(printable(key, 40), value);
  }

  static std::string joined(const std::vector<std::string>& words) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : ",") + word;
    return printable(text, 80);
  }

  void check_metadata(size_t n_layers) const {
    metadata_.object();
    check_texts("metadata", metadata_);
    for (const char* name : {"name", "note", "license", "citation"}) {
      if (const Json* text = said(name)) text->text();
    }
    if (const Json* limits = said("neighbor_limits")) {
      for (const auto& [name, limit] : limits->object()) {
        if (limit.number() < 0 || limit.number() > 1e9) {
          refuse_metadata("`neighbor_limits` of 0 to 1e9", shown(limit.number()));
        }
      }
    }
    if (const Json* name = said("name"); name != nullptr && name->text().find('\n') != std::string::npos) {
      refuse_metadata("a `name` of one line", quoted(name->text(), 40, '\''));
    }
    same("cutoff", cutoff_, said("cutoff"));
    same("angle_cutoff", angle_cutoff_, said("angle_cutoff"));
    same("n_layers", static_cast<double>(n_layers), said("n_layers"));
    if (const Json* dims = said("dims")) {
      same("dims.node", static_cast<double>(n_), &dims->at("node"));
      same("dims.edge", static_cast<double>(e_), &dims->at("edge"));
      same("dims.angle", static_cast<double>(a_), &dims->at("angle"));
    }
    if (const Json* elements = said("elements")) {
      std::vector<std::string> symbols_said;
      for (const Json& element : elements->list()) symbols_said.push_back(element.text());
      if (symbols_said != elements_) {
        refuse_metadata("the same elements in model and metadata",
                        joined(elements_) + " and " + joined(symbols_said));
      }
    }
    if (const Json* trained = said("trained_elements")) {
      for (const Json& element : trained->list()) {
        if (std::find(elements_.begin(), elements_.end(), element.text()) == elements_.end()) {
          refuse_metadata("`trained_elements` among the elements", quoted(element.text(), 20, '\''));
        }
      }
    }
    const std::string dtype = dtype_ == at::kDouble ? "float64" : "float32";
    if (const Json* name = said("dtype"); name != nullptr && name->text() != dtype) {
      refuse_metadata("dtype " + dtype + " in the metadata, as in the model", quoted(name->text(), 20, '\''));
    }
  }

  Part model_;
  const DeferredTensors& deferred_;
  const Json& metadata_;
  std::vector<std::string> elements_;
  std::string level_, phi_;
  int64_t n_types_ = 0, n_ = 0, e_ = 0, a_ = 0;
  double cutoff_ = 0.0, angle_cutoff_ = 0.0;
  bool with_angles_ = false, routed_ = false;
  int64_t n_constant_ = 0;  // inputs of the fitting net that conditions give
  at::ScalarType dtype_ = at::kDouble;
};

}  // namespace

void check_model(const Module& model, const DeferredTensors& deferred, const std::string& metadata,
                 const std::string& path) {
  try {
    const Json said = [&] {
      try {
        return Json::parse(metadata);
      } catch (const Error& error) {
        throw Error(std::string("metadata.json: ") + error.what() + ": package the checkpoint again");
      }
    }();
    Checker(model, deferred, said).run();
  } catch (const Error& error) {
    throw Error(path + ": " + error.what());
  }
}

}  // namespace moecalc
