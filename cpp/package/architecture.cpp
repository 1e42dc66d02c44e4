#include "package/architecture.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <set>
#include <sstream>
#include <utility>

#include "core/json.h"
#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

constexpr int64_t max_width = 1 << 16;
constexpr int64_t max_experts = 1 << 12;
constexpr int64_t max_count = int64_t{1} << 40;
constexpr double max_cutoff = 100.0;  // Angstrom
constexpr const char* edited = ": damaged or edited file, package the checkpoint again";

constexpr std::array<const char*, 118> symbols = {
    "H",  "He", "Li", "Be", "B",  "C",  "N",  "O",  "F",  "Ne", "Na", "Mg", "Al", "Si", "P",  "S",  "Cl",
    "Ar", "K",  "Ca", "Sc", "Ti", "V",  "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se",
    "Br", "Kr", "Rb", "Sr", "Y",  "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb",
    "Te", "I",  "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er",
    "Tm", "Yb", "Lu", "Hf", "Ta", "W",  "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At",
    "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U",  "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No",
    "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og"};

using moecalc::shown;  // of shapes

std::string shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

std::optional<Dtype> dtype_named(const std::string& name) {
  for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::int64, Dtype::boolean}) {
    if (name == name_of(dtype)) return dtype;
  }
  return std::nullopt;
}

/// An object of architecture.json and its place in it, for messages.
class Part {
 public:
  Part(const Json& json, std::string place) : json_(json), place_(std::move(place)) { json_.object(); }

  [[noreturn]] void refuse(const std::string& name, const std::string& expectation,
                           const std::string& got) const {
    throw Error("expected `" + place_ + printable(name, 80) + "` to be " + expectation + ", got " + got +
                edited);
  }

  /// Refuses members that are not in `names`: what they were to say would be lost.
  void only(std::initializer_list<const char*> names) const {
    for (const auto& [key, value] : json_.object()) {
      const bool known =
          std::any_of(names.begin(), names.end(), [&, &key = key](const char* name) { return key == name; });
      if (!known) refuse(printable(key, 40), "left out", "a value");
    }
  }

  const Json& value(const std::string& name) const {
    if (!json_.has(name)) {
      throw Error("expected an architecture with `" + place_ + printable(name, 80) + "`, got one without" +
                  edited);
    }
    return json_.at(name);
  }

  Part part(const std::string& name) const {
    if (value(name).kind() != Json::Kind::object) refuse(name, "an object", "another type");
    return {value(name), place_ + printable(name, 80) + "."};
  }

  /// Members of an object, by name.
  std::vector<std::pair<std::string, Part>> members(const std::string& name) const {
    const Part parent = part(name);
    std::vector<std::pair<std::string, Part>> parts;
    for (const auto& [key, member] : parent.json_.object()) {
      if (member.kind() != Json::Kind::object) parent.refuse(printable(key, 40), "an object", "another type");
      parts.emplace_back(key, Part(member, parent.place_ + printable(key, 40) + "."));
    }
    return parts;
  }

  /// Objects of a list.
  std::vector<Part> children(const std::string& name) const {
    if (value(name).kind() != Json::Kind::list) refuse(name, "a list", "another type");
    std::vector<Part> parts;
    for (const Json& item : value(name).list()) {
      const std::string index = std::to_string(parts.size());
      if (item.kind() != Json::Kind::object) refuse(name + "." + index, "an object", "another type");
      parts.emplace_back(item, place_ + name + "." + index + ".");
    }
    return parts;
  }

  bool boolean(const std::string& name) const {
    if (value(name).kind() != Json::Kind::boolean) refuse(name, "true or false", "another type");
    return value(name).boolean();
  }

  int64_t integer(const std::string& name, int64_t low, int64_t high) const {
    const std::string expectation =
        "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
    if (value(name).kind() != Json::Kind::number) refuse(name, expectation, "another type");
    const double number = value(name).number();
    // written so that a NaN would be refused
    if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high) &&
          number == std::floor(number))) {
      refuse(name, expectation, shown(number));
    }
    return static_cast<int64_t>(number);
  }

  /// A number in (low, high].
  double number(const std::string& name, double low, double high) const {
    const std::string expectation = "a number in (" + shown(low) + ", " + shown(high) + "]";
    if (value(name).kind() != Json::Kind::number) refuse(name, expectation, "another type");
    const double number = value(name).number();
    if (!(number > low && number <= high)) refuse(name, expectation, shown(number));
    return number;
  }

  double finite(const std::string& name) const {
    if (value(name).kind() != Json::Kind::number || !std::isfinite(value(name).number())) {
      refuse(name, "a finite number", "another type");
    }
    return value(name).number();
  }

  std::string text(const std::string& name) const {
    if (value(name).kind() != Json::Kind::text) refuse(name, "a text", "another type");
    return value(name).text();
  }

  const std::string& place() const { return place_; }

 private:
  const Json& json_;
  std::string place_;
};

/// The tensors of a package by name. Every size and place is checked against the file.
class TensorTable {
 public:
  TensorTable(std::shared_ptr<const PackageFile> file, const Json& json) : file_(std::move(file)) {
    double total = 0.0;  // bytes
    for (const auto& [name, entry] : json.object()) {
      const Part part(entry, printable(name, 80) + ".");
      part.only({"record", "dtype", "shape", "offset"});
      StoredArray array = stored(part);
      double bytes = static_cast<double>(bytes_of(array.dtype()));
      for (const int64_t size : array.shape()) bytes *= static_cast<double>(size);
      total += bytes;
      stored_.emplace(name, std::move(array));
    }
    // what a small file says must not fill the memory
    if (total > 4.0 * static_cast<double>(file_->size()) + 1048576.0) {
      throw Error(std::string("expected tensors with records of their own, got records that many share") +
                  edited);
    }
  }

  /// The tensor `name` of exactly this type and shape. Throws Error.
  StoredArray take(const std::string& name, Dtype dtype, const Shape& shape) {
    const StoredArray& found = find(name);
    if (found.dtype() != dtype)
      refuse(name, std::string("of type ") + name_of(dtype), name_of(found.dtype()));
    if (found.shape() != shape) refuse(name, "of shape " + shown(shape), shown(found.shape()));
    taken_.insert(name);
    return found;
  }
  Array read(const std::string& name, Dtype dtype, const Shape& shape) {
    return take(name, dtype, shape).read(dtype == Dtype::float32 ? Dtype::float64 : dtype);
  }

  /// Type of a tensor of a network in either precision. Throws Error for another.
  Dtype precision(const std::string& name) const {
    const Dtype found = find(name).dtype();
    if (found != Dtype::float32 && found != Dtype::float64) {
      refuse(name, "of type float32 or float64", name_of(found));
    }
    return found;
  }

  /// Size of dimension `d` of a tensor of `n_dims` dimensions, within what any model has.
  int64_t width(const std::string& name, size_t n_dims, size_t d) const {
    const StoredArray& found = find(name);
    if (found.shape().size() != n_dims || found.size(d) < 1 || found.size(d) > max_width) {
      refuse(
          name,
          "of " + std::to_string(n_dims) + " dimensions with 1 to " + std::to_string(max_width) + " columns",
          "shape " + shown(found.shape()));
    }
    return found.size(d);
  }

  bool has(const std::string& name) const { return stored_.count(name) > 0; }

  /// Throws Error for numbers that are not finite.
  void check_finite() const {
    for (const auto& [name, array] : stored_) {
      if (!array.is_finite()) refuse(name, "finite", "NaN or infinity");
    }
  }
  /// Throws Error for tensors that no part of the model took.
  void check_all_taken() const {
    for (const auto& [name, array] : stored_) {
      if (taken_.count(name) == 0 && name != "dtype_probe") {
        throw Error("expected no tensor `" + printable(name, 80) + "` in this architecture, got one" +
                    edited);
      }
    }
  }

 private:
  [[noreturn]] static void refuse(const std::string& name, const std::string& expectation,
                                  const std::string& got) {
    throw Error("expected `" + printable(name, 80) + "` to be " + expectation + ", got " + got + edited);
  }

  const StoredArray& find(const std::string& name) const {
    const auto found = stored_.find(name);
    if (found == stored_.end()) {
      throw Error("expected a model with `" + printable(name, 120) +
                  "`, got one without: package the checkpoint again");
    }
    return found->second;
  }

  StoredArray stored(const Part& part) const {
    const std::string record = part.text("record");
    const auto place = file_->records().find(record);
    if (record.rfind("data/", 0) != 0 || place == file_->records().end()) {
      part.refuse("record", "a record of the package's data", quoted(record, 40, '\''));
    }
    const std::optional<Dtype> dtype = dtype_named(part.text("dtype"));
    if (!dtype) {
      part.refuse("dtype", "float32, float64, int64 or bool", quoted(part.text("dtype"), 20, '\''));
    }
    if (part.value("shape").kind() != Json::Kind::list || part.value("shape").list().size() > 4) {
      part.refuse("shape", "a list of at most 4 sizes", "another value");
    }
    Shape shape;
    // compared with the record before they are multiplied any further, so that no product overflows
    auto left = static_cast<double>(place->second.size);
    double count = static_cast<double>(bytes_of(*dtype));
    for (const Json& size : part.value("shape").list()) {
      const bool whole = size.kind() == Json::Kind::number && size.number() >= 0 &&
                         size.number() <= static_cast<double>(max_count) &&
                         size.number() == std::floor(size.number());
      if (!whole) part.refuse("shape", "sizes, whole numbers", "another value");
      shape.push_back(static_cast<int64_t>(size.number()));
      count *= size.number();
    }
    const int64_t offset = part.integer("offset", 0, max_count);
    left -= static_cast<double>(offset);
    if (count > left) {
      part.refuse("shape", "within its record of " + std::to_string(place->second.size) + " bytes",
                  shown(shape) + " from byte " + std::to_string(offset) + " on");
    }
    return {file_, place->second.position + static_cast<uint64_t>(offset), std::move(shape), *dtype};
  }

  std::shared_ptr<const PackageFile> file_;
  std::map<std::string, StoredArray> stored_;
  std::set<std::string> taken_;
};

bool is_symmetric(const std::vector<uint8_t>& mask, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (mask[i * n + j] != mask[j * n + i]) return false;
    }
  }
  return true;
}

std::vector<double> numbers_of(const Array& values) {
  const auto* from = values.data<double>();
  return {from, from + values.numel()};
}

/// Reads and checks an architecture.
class Reader {
 public:
  Reader(const Json& json, TensorTable& tensors, const Json& metadata)
      : root_(json, ""), tensors_(tensors), metadata_(metadata) {}

  Architecture run() {
    root_.only({"elements", "cutoff", "angle_cutoff", "routing_level", "dtype", "n_dim", "e_dim", "a_dim",
                "geometry", "embedding", "conditions", "layers", "readout"});
    tensors_.check_finite();
    read_elements();
    model_.dtype = network_dtype(root_, "dtype");
    level_ = root_.text("routing_level");
    if (level_ != "element" && level_ != "configuration") {
      throw Error("expected routing level 'element' or 'configuration', got " + quoted(level_, 40, '\'') +
                  ": upgrade moecalc");
    }
    n_ = model_.n_dim = root_.integer("n_dim", 1, max_width);
    e_ = model_.e_dim = root_.integer("e_dim", 1, max_width);
    a_ = model_.a_dim = root_.integer("a_dim", 1, max_width);
    read_embedding();
    read_conditions();
    const std::vector<Part> layers = root_.children("layers");
    if (layers.empty()) root_.refuse("layers", "at least one layer", "none");
    if (layers.size() > static_cast<size_t>(max_experts)) root_.refuse("layers", "fewer layers", "thousands");
    for (const Part& layer : layers) read_layer(layer);
    read_geometry();
    read_readout();
    tensors_.check_all_taken();
    model_.rules.n_types = n_types_;
    model_.rules.cutoff = cutoff_;
    model_.rules.angle_cutoff = angle_cutoff_;
    model_.rules.group_by_system = level_ == "configuration";
    model_.rules.group_by_condition = routed_ && !model_.rules.group_by_system;
    try {
      check_metadata(layers.size());
    } catch (const Error& error) {
      throw Error(std::string("metadata.json: ") + error.what());
    }
    return std::move(model_);
  }

 private:
  static Dtype network_dtype(const Part& part, const std::string& name) {
    const std::string text = part.text(name);
    if (text == "float32") return Dtype::float32;
    if (text == "float64") return Dtype::float64;
    part.refuse(name, "float32 or float64", quoted(text, 20, '\''));
  }

  void read_elements() {
    const Json& value = root_.value("elements");
    if (value.kind() != Json::Kind::list || value.list().empty()) {
      root_.refuse("elements", "a list of symbols", "none");
    }
    std::set<std::string> seen;
    for (const Json& element : value.list()) {
      const std::string symbol = element.kind() == Json::Kind::text ? element.text() : "";
      if (std::find(symbols.begin(), symbols.end(), symbol) == symbols.end()) {
        root_.refuse("elements", "element symbols", quoted(symbol, 20, '\''));
      }
      if (!seen.insert(symbol).second) root_.refuse("elements", "distinct symbols", symbol + " twice");
      model_.elements.push_back(symbol);
    }
    n_types_ = model_.n_types();
    const Array mask = tensors_.read("pair_mask", Dtype::boolean, {n_types_, n_types_});
    const auto* allowed = static_cast<const uint8_t*>(mask.bytes_data());
    model_.rules.pair_mask.assign(allowed, allowed + mask.numel());
    if (!is_symmetric(model_.rules.pair_mask, model_.elements.size())) {
      root_.refuse("pair_mask", "symmetric", "another one for i, j than for j, i");
    }
  }

  void read_geometry() {
    const Part geometry = root_.part("geometry");
    geometry.only({"e_start", "e_stop", "a_start", "a_stop", "exp_switch", "use_dist", "protection"});
    cutoff_ = root_.number("cutoff", 0.0, max_cutoff);
    angle_cutoff_ = root_.finite("angle_cutoff");
    const double e_stop = geometry.number("e_stop", 0.0, max_cutoff);
    const double a_stop = geometry.number("a_stop", 0.0, max_cutoff);
    // the switches divide by start and by stop - start
    const double e_start = geometry.number("e_start", 0.0, std::nextafter(e_stop, 0.0));
    const double a_start = geometry.number("a_start", 0.0, std::nextafter(a_stop, 0.0));
    if (cutoff_ != e_stop) root_.refuse("cutoff", "that of the switch, " + shown(e_stop), shown(cutoff_));
    const double expected = with_angles_ ? a_stop : 0.0;
    if (angle_cutoff_ != expected) {
      root_.refuse("angle_cutoff", "that of the switch, " + shown(expected), shown(angle_cutoff_));
    }
    if (a_stop > e_stop) geometry.refuse("a_stop", "at most the cutoff, " + shown(e_stop), shown(a_stop));
    GeometryRules& rules = model_.geometry;
    const bool exponential = geometry.boolean("exp_switch");
    rules.edge = {exponential, e_start, e_stop};
    rules.angle = {exponential, a_start, a_stop};
    rules.use_dist = geometry.boolean("use_dist");
    if (rules.use_dist != model_.embedding.use_dist) {
      geometry.refuse("use_dist", "that of the embedding", "another");
    }
    rules.protection = geometry.finite("protection");
    rules.mean = numbers_of(tensors_.read("geometry.mean", Dtype::float64, {n_types_, 4}));
    rules.stddev = numbers_of(tensors_.read("geometry.stddev", Dtype::float64, {n_types_, 4}));
    if (*std::min_element(rules.stddev.begin(), rules.stddev.end()) <= 0.0) {
      geometry.refuse("stddev", "positive", "zero or less");
    }
  }

  void read_embedding() {
    const Part part = root_.part("embedding");
    part.only({"use_dist", "routed", "own_router_table", "phi"});
    EmbeddingSource& embedding = model_.embedding;
    embedding.use_dist = part.boolean("use_dist");
    embedding.phi = read_activation(part);
    embedding.table = tensors_.read("embedding.table.table", model_.dtype, {n_types_, n_});
    if (part.boolean("own_router_table")) {
      embedding.router_table = tensors_.read("embedding.router_table.table", model_.dtype, {n_types_, n_});
    }
    embedding.edge_matrix = tensors_.read("embedding.edge_matrix", model_.dtype, {1, e_}).reshape({e_});
    embedding.edge_bias = tensors_.read("embedding.edge_bias", model_.dtype, {e_});
    embedding.angle_matrix = tensors_.read("embedding.angle_matrix", model_.dtype, {1, a_}).reshape({a_});
  }

  static ActivationSource read_activation(const Part& owner) {
    static const std::set<std::string> kinds = {"linear", "silu",  "silut", "tanh",    "sigmoid",
                                                "relu",   "relu6", "gelu",  "softplus"};
    const Part phi = owner.part("phi");
    phi.only({"kind", "threshold", "slope", "offset"});
    ActivationSource source;
    source.kind = phi.text("kind");
    if (kinds.count(source.kind) == 0)
      phi.refuse("kind", "a known activation", quoted(source.kind, 40, '\''));
    source.threshold = phi.finite("threshold");
    source.slope = phi.finite("slope");
    source.offset = phi.finite("offset");
    return source;
  }

  /// ids and weights of a table, or a gate, for `n_experts`.
  RouterSource read_router(const Part& part, const std::string& name, int64_t n_experts) {
    RouterSource router;
    const std::string kind = part.text("kind"), path = part.place();
    if (kind == "gate") {
      part.only({"kind", "n_routed", "n_shared", "top_k", "softmax_first"});
      router.is_gate = true;
      router.n_routed = part.integer("n_routed", 1, max_experts);
      router.top_k = part.integer("top_k", 1, router.n_routed);
      router.n_shared = part.integer("n_shared", 0, max_experts);
      router.softmax_first = part.boolean("softmax_first");
      router.gate = tensors_.read(path + "gate", model_.dtype, {n_, router.n_routed});
      if (router.n_routed + router.n_shared != n_experts) {
        part.refuse("n_routed", "for " + std::to_string(n_experts) + " experts, the shared ones included",
                    std::to_string(router.n_routed) + " and " + std::to_string(router.n_shared) + " shared");
      }
      return router;
    }
    if (kind != "table") part.refuse("kind", "'table' or 'gate'", quoted(kind, 20, '\''));
    part.only({"kind"});
    router.top_k = tensors_.width(path + "ids", 2, 1);
    router.ids = tensors_.read(path + "ids", Dtype::int64, {n_types_, router.top_k});
    router.weights = tensors_.read(path + "weights", model_.dtype, {n_types_, router.top_k});
    const auto* ids = router.ids.data<int64_t>();
    const auto [low, high] = std::minmax_element(ids, ids + router.ids.numel());
    if (*low < 0 || *high >= n_experts) {
      part.refuse("ids", "in [0, " + std::to_string(n_experts) + ")",
                  std::to_string(*low) + " to " + std::to_string(*high));
    }
    if (level_ != "element") {
      root_.refuse("routing_level", "'element' with tables", quoted(level_, 20, '\''));
    }
    if (routed_) {
      part.refuse("kind", "'gate' where experts depend on charge and spin", "'table' of " + quoted(name, 40));
    }
    return router;
  }

  void read_position(const Part& layer, LayerSource& to, const std::string& name, int64_t n_in,
                     int64_t n_out) {
    const Part part = layer.part("positions").part(name);
    part.only({"router", "routed", "merge", "experts"});
    const std::string path = layer.place() + name + ".";
    PositionSource position;
    position.name = name;
    const int64_t n_experts = part.integer("experts", 1, max_experts);
    position.matrix = tensors_.take(path + "matrix", model_.dtype, {n_experts, n_in, n_out});
    position.bias = tensors_.read(path + "bias", model_.dtype, {n_experts, n_out});
    position.merge = part.boolean("merge");
    position.router = part.text("router");
    position.routed = part.boolean("routed");
    if (position.routed) {
      const Part routers = layer.part("routers");
      const auto known = to.routers.find(position.router);
      RouterSource router = known != to.routers.end()
                                ? known->second
                                : read_router(routers.part(position.router), position.router, n_experts);
      check_router_fits(part, router, n_experts);
      to.routers.emplace(position.router, std::move(router));
    } else if (n_experts != 1) {
      part.refuse("experts", "1 where nothing is routed", std::to_string(n_experts));
    }
    to.positions.push_back(std::move(position));
  }

  /// A router may serve several positions.
  static void check_router_fits(const Part& part, const RouterSource& router, int64_t n_experts) {
    const auto* ids = router.is_gate ? nullptr : router.ids.data<int64_t>();
    const int64_t needed = router.is_gate ? router.n_routed + router.n_shared
                                          : std::max(router.top_k,  // a row names an expert once
                                                     1 + *std::max_element(ids, ids + router.ids.numel()));
    if (router.is_gate ? needed != n_experts : needed > n_experts) {
      part.refuse("experts", std::to_string(needed) + " as its router has", std::to_string(n_experts));
    }
  }

  void read_layer(const Part& part) {
    part.only({"n_head", "axis", "edge_norm", "angle_norm", "average", "with_residual", "sequential",
               "live_edge", "live_angle", "with_angles", "keep_far_edges", "compress", "compress_split",
               "vc_dim", "ec_dim", "phi", "routers", "positions"});
    LayerSource layer;
    ops::LayerShape& s = layer.shape;
    s.n = n_, s.e = e_;
    s.heads = part.integer("n_head", 1, max_experts);
    s.axis = part.integer("axis", 1, std::min(n_, e_));
    s.edge_norm = part.number("edge_norm", 0.0, 1e9);
    s.angle_norm = part.number("angle_norm", 0.0, 1e9);
    s.live_edge = part.boolean("live_edge");
    s.live_angle = part.boolean("live_angle");
    s.with_angles = part.boolean("with_angles");
    s.keep_far = part.boolean("keep_far_edges");
    s.a = s.with_angles ? a_ : 1;
    layer.with_residual = part.boolean("with_residual");
    layer.average = part.boolean("average");
    layer.sequential = part.boolean("sequential");
    layer.phi = read_activation(part);
    if (s.with_angles && !s.live_edge) {
      part.refuse("with_angles", "false where edges have no update", "true");
    }
    if (s.live_angle && !s.with_angles) {
      part.refuse("live_angle", "false where there are no angles", "true");
    }
    if (layer.sequential && !layer.with_residual) {
      part.refuse("with_residual", "true for sequential updates", "false");
    }
    with_angles_ = with_angles_ || s.with_angles;
    const bool compress = part.boolean("compress");
    layer.compress_split = part.boolean("compress_split");
    const bool products = compress && !layer.compress_split;
    layer.vc_dim = part.integer("vc_dim", compress ? 1 : n_, products ? max_width : n_);
    layer.ec_dim = part.integer("ec_dim", compress ? 1 : e_, products ? max_width : e_);
    s.edge_in = s.with_angles && compress && layer.compress_split ? layer.ec_dim : s.e;

    std::set<std::string> expected{"node_self_mlp", "node_sym_linear", "node_edge_linear"};
    read_position(part, layer, "node_self_mlp", n_, n_);
    read_position(part, layer, "node_sym_linear", s.axis * (e_ + n_), n_);
    read_position(part, layer, "node_edge_linear", 2 * n_ + e_, s.heads * n_);
    const int64_t angle_in = a_ + layer.vc_dim + 2 * layer.ec_dim;
    if (s.live_edge) {
      read_position(part, layer, "edge_self_linear", 2 * n_ + e_, e_);
      expected.insert("edge_self_linear");
    }
    if (s.with_angles) {
      read_position(part, layer, "edge_angle_linear1", angle_in, e_);
      read_position(part, layer, "edge_angle_linear2", e_, e_);
      expected.insert({"edge_angle_linear1", "edge_angle_linear2"});
      if (products) {
        layer.compress_n =
            tensors_.read(part.place() + "a_compress_n_linear", model_.dtype, {n_, layer.vc_dim});
        layer.compress_e =
            tensors_.read(part.place() + "a_compress_e_linear", model_.dtype, {e_, layer.ec_dim});
      }
    }
    if (s.live_angle) {
      read_position(part, layer, "angle_self_linear", angle_in, a_);
      expected.insert("angle_self_linear");
    }
    for (const auto& [name, position] : part.members("positions")) {
      if (expected.count(name) == 0) part.refuse("positions", "those of such a layer", quoted(name, 40));
    }
    for (const auto& [name, router] : part.members("routers")) {
      if (layer.routers.count(name) == 0) {
        part.refuse("routers", "those that its positions name", quoted(name, 40));
      }
    }
    check_follows(part, layer.shape);
    read_updates(part, layer);
    set_active_experts(layer);
    model_.layers.push_back(std::move(layer));
  }

  /// What a layer reads, the one before it writes; geometry and buffers are those of the first.
  void check_follows(const Part& part, const ops::LayerShape& s) const {
    if (model_.layers.empty()) return;
    const ops::LayerShape& first = model_.layers.front().shape;
    const ops::LayerShape& before = model_.layers.back().shape;
    if (!before.live_edge) part.refuse("live_edge", "true in the layer before", "false");
    if (s.with_angles && !before.live_angle) {
      part.refuse("with_angles", "false where the layer before has no angle update", "true");
    }
    if (s.keep_far != first.keep_far) part.refuse("keep_far_edges", "that of the first layer", "another");
    if (s.edge_norm != first.edge_norm) {
      part.refuse("edge_norm", "that of the first layer, " + shown(first.edge_norm), shown(s.edge_norm));
    }
  }

  void read_updates(const Part& part, LayerSource& layer) {
    ops::LayerShape& s = layer.shape;
    const auto updates = [&](const char* name, int64_t n, int64_t width, double& keep) {
      keep = 1.0;
      if (layer.with_residual) return tensors_.read(part.place() + name, model_.dtype, {n, width});
      double factor = 1.0 / std::sqrt(static_cast<double>(n));
      if (layer.average) keep = factor = 1.0 / std::sqrt(static_cast<double>(n + 1));
      Array rows = Array::empty({n, width}, Dtype::float64);
      std::fill_n(rows.data<double>(), rows.numel(), factor);
      return rows;
    };
    layer.update_n = updates("n_residual", 2 + s.heads, s.n, s.keep_n);
    if (s.live_edge) layer.update_e = updates("e_residual", s.with_angles ? 2 : 1, s.e, s.keep_e);
    if (s.live_angle) layer.update_a = updates("a_residual", 1, s.a, s.keep_a);
  }

  /// The numbers of experts side by side, which are the same in every group.
  static void set_active_experts(LayerSource& layer) {
    const auto k = [&](const char* name) -> int64_t {
      const PositionSource* position = layer.find(name);
      if (position == nullptr) return 0;
      if (!position->routed || position->merge) return 1;
      const RouterSource& router = layer.routers.at(position->router);
      return router.is_gate ? router.top_k + router.n_shared : router.top_k;
    };
    ops::LayerShape& s = layer.shape;
    s.k_node = k("node_self_mlp"), s.k_sym = k("node_sym_linear"), s.k_message = k("node_edge_linear");
    s.k_edge = s.live_edge ? k("edge_self_linear") : 0;
    if (!s.with_angles) return;
    s.k_angle1 = k("edge_angle_linear1"), s.k_angle2 = k("edge_angle_linear2");
    s.k_angle = s.live_angle ? k("angle_self_linear") : 0;
  }

  /// Charge, multiplicity and frame parameters (docs/architecture.md): float64 whatever the network's dtype.
  void read_conditions() {
    const Part part = root_.part("conditions");
    part.only({"takes_charge_spin", "routed", "n_fparam", "n_case", "charge_offset", "phi"});
    ConditionSource& to = model_.conditions;
    to.takes_charge_spin = part.boolean("takes_charge_spin");
    to.routed = routed_ = part.boolean("routed");
    to.n_fparam = part.integer("n_fparam", 0, max_width);
    to.n_case = part.integer("n_case", 0, max_width);
    to.charge_offset = part.integer("charge_offset", 100, 100);
    if (to.routed && !to.takes_charge_spin) {
      part.refuse("routed", "false where charge and spin are not taken", "true");
    }
    if (root_.part("embedding").boolean("routed") != to.routed) {
      root_.part("embedding").refuse("routed", "that of the conditions", "another");
    }
    if (to.takes_charge_spin) {
      const std::string path = "conditions.embedding.";
      to.charge_matrix = tensors_.read(path + "charge_matrix", Dtype::float64, {200, n_});
      to.spin_matrix = tensors_.read(path + "spin_matrix", Dtype::float64, {100, n_});
      to.mix_matrix = tensors_.read(path + "mix_matrix", Dtype::float64, {2 * n_, n_});
      to.mix_bias = tensors_.read(path + "mix_bias", Dtype::float64, {n_});
      to.phi = read_activation(part);
    }
    if (to.n_fparam > 0) {
      to.fparam_avg = tensors_.read("conditions.fparam_avg", Dtype::float64, {to.n_fparam});
      to.fparam_inv_std = tensors_.read("conditions.fparam_inv_std", Dtype::float64, {to.n_fparam});
    }
    if (to.n_case > 0)
      to.case_embedding = tensors_.read("conditions.case_embedding", Dtype::float64, {to.n_case});
    if (to.taken()) n_constant_ = to.n_fparam + to.n_case;
    check_said_conditions(to.takes_charge_spin, to.n_fparam);
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

  void read_readout() {
    const Part part = root_.part("readout");
    part.only({"concat_table", "with_case", "n_constant", "dtype", "layers"});
    ReadoutSource& to = model_.readout;
    to.shift = numbers_of(tensors_.read("readout.energy_shift", Dtype::float64, {n_types_}));
    to.weight = numbers_of(tensors_.read("readout.energy_weight", Dtype::float64, {n_types_}));
    const Dtype dtype = to.dtype = network_dtype(part, "dtype");
    const std::string net = "readout.net.";
    int64_t width = n_;
    to.concat_table = part.boolean("concat_table");
    const std::string table =
        net + "table.table";  // may be that of the embedding, in the precision of the layers
    if (to.concat_table) {
      to.table = tensors_.read(table, tensors_.precision(table), {n_types_, n_});
      width += n_;
    } else if (tensors_.has(table)) {  // of no rows
      tensors_.take(table, tensors_.precision(table), {0, n_});
    }
    if (part.boolean("with_case")) {
      const int64_t n_case = tensors_.width(net + "case_embedding", 1, 0);
      to.case_embedding = tensors_.read(net + "case_embedding", dtype, {n_case});
      width += n_case;
    }
    to.n_constant = part.integer("n_constant", n_constant_, n_constant_);
    width += to.n_constant;
    size_t index = 0;
    for (const Part& child : part.children("layers")) {
      child.only({"has_idt", "residual", "phi"});
      const std::string path = net + "layers." + std::to_string(index++) + ".";
      FittingLayerSource layer;
      const int64_t n_out = tensors_.width(path + "bias", 1, 0);
      layer.matrix = tensors_.read(path + "matrix", dtype, {width, n_out});
      layer.bias = tensors_.read(path + "bias", dtype, {n_out});
      if (child.boolean("has_idt")) layer.idt = tensors_.read(path + "idt", dtype, {n_out});
      layer.residual = child.integer("residual", 0, 2);
      if (layer.residual > 0 && n_out != layer.residual * width) {
        child.refuse("residual", "0 where the width does not allow it", std::to_string(layer.residual));
      }
      layer.phi = read_activation(child);
      to.layers.push_back(std::move(layer));
      width = n_out;
    }
    to.out_matrix = tensors_.read(net + "out_matrix", dtype, {width, 1}).reshape({width});
    to.out_bias = tensors_.read(net + "out_bias", dtype, {1}).data<double>()[0];
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
      if (symbols_said != model_.elements) {
        refuse_metadata("the same elements in model and metadata",
                        joined(model_.elements) + " and " + joined(symbols_said));
      }
    }
    if (const Json* trained = said("trained_elements")) {
      for (const Json& element : trained->list()) {
        if (std::find(model_.elements.begin(), model_.elements.end(), element.text()) ==
            model_.elements.end()) {
          refuse_metadata("`trained_elements` among the elements", quoted(element.text(), 20, '\''));
        }
      }
    }
    const std::string dtype = model_.dtype == Dtype::float64 ? "float64" : "float32";
    if (const Json* name = said("dtype"); name != nullptr && name->text() != dtype) {
      refuse_metadata("dtype " + dtype + " in the metadata, as in the model", quoted(name->text(), 20, '\''));
    }
  }

  Part root_;
  TensorTable& tensors_;
  const Json& metadata_;
  Architecture model_;
  std::string level_;
  int64_t n_types_ = 0, n_ = 0, e_ = 0, a_ = 0;
  double cutoff_ = 0.0, angle_cutoff_ = 0.0;
  bool with_angles_ = false, routed_ = false;
  int64_t n_constant_ = 0;  // inputs of the fitting net that conditions give
};

std::string shown(const Json& value) {
  char text[32];
  if (value.kind() == Json::Kind::number) {
    std::snprintf(text, sizeof(text), "%.15g", value.number());
    return text;
  }
  std::string all;
  for (const Json& item : value.list()) all += (all.empty() ? "" : ",") + shown(item);
  return "[" + all + "]";
}

/// What engines tell their users, of checked metadata.
Facts facts_of(const Json& metadata, const Architecture& model) {
  Facts facts;
  const auto text = [&](const char* name) {
    return metadata.has(name) && metadata.at(name).kind() == Json::Kind::text ? metadata.at(name).text() : "";
  };
  facts.name = text("name");
  facts.citation = text("citation");
  facts.trained_elements = model.elements;
  if (metadata.has("trained_elements")) {
    facts.trained_elements.clear();
    for (const Json& element : metadata.at("trained_elements").list()) {
      facts.trained_elements.push_back(element.text());
    }
  }
  facts.node_dim = model.n_dim;
  if (metadata.has("neighbor_limits")) {
    const Json& limits = metadata.at("neighbor_limits");
    if (limits.has("edge")) facts.edge_limit = static_cast<int64_t>(limits.at("edge").number());
    if (limits.has("angle")) facts.angle_limit = static_cast<int64_t>(limits.at("angle").number());
  }
  const auto object = [](const Json& json, const char* name) {
    return json.has(name) && json.at(name).kind() == Json::Kind::object;
  };
  if (!object(metadata, "conditions") || !object(metadata.at("conditions"), "fixed")) return facts;
  for (const auto& [name, value] : metadata.at("conditions").at("fixed").object()) {
    if (value.kind() == Json::Kind::null) continue;
    facts.fixed += (facts.fixed.empty() ? "" : ", ") + printable(name, 40) + " " + shown(value);
  }
  return facts;
}

Json parsed(const std::string& text, const char* name) {
  try {
    return Json::parse(text);
  } catch (const Error& error) {
    throw Error(std::string(name) + ": " + error.what() + ": package the checkpoint again");
  }
}

/// Infinities and NaN have all bits of the exponent set.
template <class Bits>
bool all_finite(const Bits* bits, size_t n, Bits exponent) {
  Bits found = 0;
  for (size_t i = 0; i < n; ++i) found |= static_cast<Bits>((bits[i] & exponent) == exponent);
  return found == 0;
}

}  // namespace

StoredArray::StoredArray(std::shared_ptr<const PackageFile> file, uint64_t position, Shape shape, Dtype dtype)
    : file_(std::move(file)), position_(position), shape_(std::move(shape)), dtype_(dtype) {}

Array StoredArray::read(Dtype dtype) const {
  const Array values = Array::empty(shape_, dtype_);
  if (values.bytes() > 0) file_->read(position_, values.bytes_data(), values.bytes());
  return values.to(dtype);
}

Array StoredArray::select(const std::vector<int64_t>& index, Dtype dtype) const {
  Shape shape = shape_;
  shape[0] = static_cast<int64_t>(index.size());
  const Array values = Array::empty(shape, dtype_);
  if (values.bytes() == 0) return values.to(dtype);
  const size_t row = values.bytes() / index.size();
  auto* to = static_cast<char*>(values.bytes_data());
  for (const int64_t id : index) {
    file_->read(position_ + static_cast<uint64_t>(id) * row, to, row);
    to += row;
  }
  return values.to(dtype);
}

bool StoredArray::is_finite() const {
  if (dtype_ != Dtype::float32 && dtype_ != Dtype::float64) return true;
  size_t left = bytes_of(dtype_);
  for (const int64_t size : shape_) left *= static_cast<size_t>(size);
  std::vector<uint64_t> chunk(std::min<size_t>(32 << 10, left / 8 + 1));  // in cache
  for (uint64_t at = position_; left > 0;) {
    const size_t n = std::min(chunk.size() * sizeof(uint64_t), left);
    file_->read(at, chunk.data(), n);
    const bool finite =
        dtype_ == Dtype::float64
            ? all_finite<uint64_t>(chunk.data(), n / 8, 0x7FF0000000000000U)
            : all_finite<uint32_t>(reinterpret_cast<const uint32_t*>(chunk.data()), n / 4, 0x7F800000U);
    if (!finite) return false;
    at += n;
    left -= n;
  }
  return true;
}

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
    package.architecture = Reader(architecture, table, metadata).run();
    package.facts = facts_of(metadata, package.architecture);
  } catch (const Error& error) {
    throw Error(file.path() + ": " + error.what());
  }
  return package;
}

std::optional<ops::Activation> kernel_activation(const ActivationSource& phi) {
  static const std::map<std::string, ops::ActivationKind> kinds = {
      {"linear", ops::ActivationKind::linear},   {"silu", ops::ActivationKind::silu},
      {"silut", ops::ActivationKind::silut},     {"tanh", ops::ActivationKind::tanh},
      {"sigmoid", ops::ActivationKind::sigmoid}, {"relu", ops::ActivationKind::relu},
      {"relu6", ops::ActivationKind::relu6},     {"gelu", ops::ActivationKind::gelu}};
  const auto found = kinds.find(phi.kind);
  if (found == kinds.end()) return std::nullopt;
  return ops::Activation{found->second, phi.threshold, phi.slope, phi.offset};
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
