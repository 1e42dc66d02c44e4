#include "package/architecture_reader.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <utility>

#include "moecalc/error.h"
#include "moecalc/text.h"
#include "package/json_part.h"
#include "package/metadata_check.h"

namespace moecalc {

namespace {

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
    n_dim_ = root_.integer("n_dim", 1, max_width);
    e_dim_ = root_.integer("e_dim", 1, max_width);
    a_dim_ = root_.integer("a_dim", 1, max_width);
    model_.n_dim = n_dim_;
    model_.e_dim = e_dim_;
    model_.a_dim = a_dim_;
    read_embedding();
    read_conditions();
    const std::vector<JsonPart> layers = root_.children("layers");
    if (layers.empty()) root_.refuse("layers", "at least one layer", "none");
    if (layers.size() > static_cast<size_t>(max_experts)) root_.refuse("layers", "fewer layers", "thousands");
    for (const JsonPart& layer : layers) read_layer(layer);
    read_geometry();
    read_readout();
    tensors_.check_all_taken();
    model_.rules.n_types = n_types_;
    model_.rules.cutoff = cutoff_;
    model_.rules.angle_cutoff = angle_cutoff_;
    model_.rules.group_by_system = level_ == "configuration";
    model_.rules.group_by_condition = routed_ && !model_.rules.group_by_system;
    check_metadata(metadata_, model_);
    return std::move(model_);
  }

 private:
  static Dtype network_dtype(const JsonPart& part, const std::string& name) {
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
    const JsonPart geometry = root_.part("geometry");
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
    const JsonPart part = root_.part("embedding");
    part.only({"use_dist", "routed", "own_router_table", "phi"});
    EmbeddingSource& embedding = model_.embedding;
    embedding.use_dist = part.boolean("use_dist");
    embedding.phi = read_activation(part);
    embedding.table = tensors_.read("embedding.table.table", model_.dtype, {n_types_, n_dim_});
    if (part.boolean("own_router_table")) {
      embedding.router_table =
          tensors_.read("embedding.router_table.table", model_.dtype, {n_types_, n_dim_});
    }
    embedding.edge_matrix =
        tensors_.read("embedding.edge_matrix", model_.dtype, {1, e_dim_}).reshape({e_dim_});
    embedding.edge_bias = tensors_.read("embedding.edge_bias", model_.dtype, {e_dim_});
    embedding.angle_matrix =
        tensors_.read("embedding.angle_matrix", model_.dtype, {1, a_dim_}).reshape({a_dim_});
  }

  static ActivationSource read_activation(const JsonPart& owner) {
    static const std::set<std::string> kinds = {"linear", "silu",  "silut", "tanh",    "sigmoid",
                                                "relu",   "relu6", "gelu",  "softplus"};
    const JsonPart phi = owner.part("phi");
    phi.only({"kind", "threshold", "slope", "offset"});
    ActivationSource source;
    source.kind = phi.text("kind");
    if (kinds.count(source.kind) == 0) {
      phi.refuse("kind", "a known activation", quoted(source.kind, 40, '\''));
    }
    source.threshold = phi.finite("threshold");
    source.slope = phi.finite("slope");
    source.offset = phi.finite("offset");
    return source;
  }

  /// ids and weights of a table, or a gate, for `n_experts`.
  RouterSource read_router(const JsonPart& part, const std::string& name, int64_t n_experts) {
    RouterSource router;
    const std::string kind = part.text("kind");
    const std::string path = part.place();
    if (kind == "gate") {
      part.only({"kind", "n_routed", "n_shared", "top_k", "softmax_first"});
      router.is_gate = true;
      router.n_routed = part.integer("n_routed", 1, max_experts);
      router.top_k = part.integer("top_k", 1, router.n_routed);
      router.n_shared = part.integer("n_shared", 0, max_experts);
      router.softmax_first = part.boolean("softmax_first");
      router.gate = tensors_.read(path + "gate", model_.dtype, {n_dim_, router.n_routed});
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

  void read_position(const JsonPart& layer, LayerSource& to, const std::string& name, int64_t n_in,
                     int64_t n_out) {
    const JsonPart part = layer.part("positions").part(name);
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
      const JsonPart routers = layer.part("routers");
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
  static void check_router_fits(const JsonPart& part, const RouterSource& router, int64_t n_experts) {
    const auto* ids = router.is_gate ? nullptr : router.ids.data<int64_t>();
    const int64_t needed = router.is_gate ? router.n_routed + router.n_shared
                                          : std::max(router.top_k,  // a row names an expert once
                                                     1 + *std::max_element(ids, ids + router.ids.numel()));
    if (router.is_gate ? needed != n_experts : needed > n_experts) {
      part.refuse("experts", std::to_string(needed) + " as its router has", std::to_string(n_experts));
    }
  }

  void read_layer(const JsonPart& part) {
    part.only({"n_head", "axis", "edge_norm", "angle_norm", "average", "with_residual", "sequential",
               "live_edge", "live_angle", "with_angles", "keep_far_edges", "compress", "compress_split",
               "vc_dim", "ec_dim", "phi", "routers", "positions"});
    LayerSource layer;
    kernels::LayerShape& shape = layer.shape;
    shape.n = n_dim_;
    shape.e = e_dim_;
    shape.heads = part.integer("n_head", 1, max_experts);
    shape.axis = part.integer("axis", 1, std::min(n_dim_, e_dim_));
    shape.edge_norm = part.number("edge_norm", 0.0, 1e9);
    shape.angle_norm = part.number("angle_norm", 0.0, 1e9);
    shape.live_edge = part.boolean("live_edge");
    shape.live_angle = part.boolean("live_angle");
    shape.with_angles = part.boolean("with_angles");
    shape.keep_far = part.boolean("keep_far_edges");
    shape.a = shape.with_angles ? a_dim_ : 1;
    layer.with_residual = part.boolean("with_residual");
    layer.average = part.boolean("average");
    layer.sequential = part.boolean("sequential");
    layer.phi = read_activation(part);
    if (shape.with_angles && !shape.live_edge) {
      part.refuse("with_angles", "false where edges have no update", "true");
    }
    if (shape.live_angle && !shape.with_angles) {
      part.refuse("live_angle", "false where there are no angles", "true");
    }
    if (layer.sequential && !layer.with_residual) {
      part.refuse("with_residual", "true for sequential updates", "false");
    }
    with_angles_ = with_angles_ || shape.with_angles;
    const bool compress = part.boolean("compress");
    layer.compress_split = part.boolean("compress_split");
    const bool products = compress && !layer.compress_split;
    layer.vc_dim = part.integer("vc_dim", compress ? 1 : n_dim_, products ? max_width : n_dim_);
    layer.ec_dim = part.integer("ec_dim", compress ? 1 : e_dim_, products ? max_width : e_dim_);
    shape.edge_inputs = shape.with_angles && compress && layer.compress_split ? layer.ec_dim : shape.e;
    read_positions(part, layer);
    check_follows(part, layer.shape);
    read_updates(part, layer);
    set_active_experts(layer);
    model_.layers.push_back(std::move(layer));
  }

  void read_positions(const JsonPart& part, LayerSource& layer) {
    const kernels::LayerShape& shape = layer.shape;
    std::set<std::string> expected{"node_self_mlp", "node_sym_linear", "node_edge_linear"};
    read_position(part, layer, "node_self_mlp", n_dim_, n_dim_);
    read_position(part, layer, "node_sym_linear", shape.axis * (e_dim_ + n_dim_), n_dim_);
    read_position(part, layer, "node_edge_linear", 2 * n_dim_ + e_dim_, shape.heads * n_dim_);
    const int64_t angle_in = a_dim_ + layer.vc_dim + 2 * layer.ec_dim;
    if (shape.live_edge) {
      read_position(part, layer, "edge_self_linear", 2 * n_dim_ + e_dim_, e_dim_);
      expected.insert("edge_self_linear");
    }
    if (shape.with_angles) {
      read_position(part, layer, "edge_angle_linear1", angle_in, e_dim_);
      read_position(part, layer, "edge_angle_linear2", e_dim_, e_dim_);
      expected.insert({"edge_angle_linear1", "edge_angle_linear2"});
      if (part.boolean("compress") && !layer.compress_split) {
        layer.compress_n =
            tensors_.read(part.place() + "a_compress_n_linear", model_.dtype, {n_dim_, layer.vc_dim});
        layer.compress_e =
            tensors_.read(part.place() + "a_compress_e_linear", model_.dtype, {e_dim_, layer.ec_dim});
      }
    }
    if (shape.live_angle) {
      read_position(part, layer, "angle_self_linear", angle_in, a_dim_);
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
  }

  /// What a layer reads, the one before it writes; geometry and buffers are those of the first.
  void check_follows(const JsonPart& part, const kernels::LayerShape& shape) const {
    if (model_.layers.empty()) return;
    const kernels::LayerShape& first = model_.layers.front().shape;
    const kernels::LayerShape& before = model_.layers.back().shape;
    if (!before.live_edge) part.refuse("live_edge", "true in the layer before", "false");
    if (shape.with_angles && !before.live_angle) {
      part.refuse("with_angles", "false where the layer before has no angle update", "true");
    }
    if (shape.keep_far != first.keep_far) part.refuse("keep_far_edges", "that of the first layer", "another");
    if (shape.edge_norm != first.edge_norm) {
      part.refuse("edge_norm", "that of the first layer, " + shown(first.edge_norm), shown(shape.edge_norm));
    }
  }

  void read_updates(const JsonPart& part, LayerSource& layer) {
    kernels::LayerShape& shape = layer.shape;
    const auto updates = [&](const char* name, int64_t count, int64_t width, double& keep) {
      keep = 1.0;
      if (layer.with_residual) return tensors_.read(part.place() + name, model_.dtype, {count, width});
      double factor = 1.0 / std::sqrt(static_cast<double>(count));
      if (layer.average) {
        factor = 1.0 / std::sqrt(static_cast<double>(count + 1));
        keep = factor;
      }
      Array rows = Array::empty({count, width}, Dtype::float64);
      std::fill_n(rows.data<double>(), rows.numel(), factor);
      return rows;
    };
    layer.update_node = updates("n_residual", 2 + shape.heads, shape.n, shape.keep_node);
    const int64_t n_edge_update = shape.with_angles ? 2 : 1;
    if (shape.live_edge) layer.update_edge = updates("e_residual", n_edge_update, shape.e, shape.keep_edge);
    if (shape.live_angle) layer.update_angle = updates("a_residual", 1, shape.a, shape.keep_angle);
  }

  /// The numbers of experts side by side, which are the same in every group.
  static void set_active_experts(LayerSource& layer) {
    const auto active = [&](const char* name) -> int64_t {
      const PositionSource* position = layer.find(name);
      if (position == nullptr) return 0;
      if (!position->routed || position->merge) return 1;
      const RouterSource& router = layer.routers.at(position->router);
      return router.is_gate ? router.top_k + router.n_shared : router.top_k;
    };
    kernels::LayerShape& shape = layer.shape;
    shape.experts_node = active("node_self_mlp");
    shape.experts_sym = active("node_sym_linear");
    shape.experts_message = active("node_edge_linear");
    shape.experts_edge = shape.live_edge ? active("edge_self_linear") : 0;
    if (!shape.with_angles) return;
    shape.experts_angle_message = active("edge_angle_linear1");
    shape.experts_message_map = active("edge_angle_linear2");
    shape.experts_angle = shape.live_angle ? active("angle_self_linear") : 0;
  }

  /// Charge, multiplicity and frame parameters (docs/developer/architecture.md): float64 in any
  /// dtype of the network.
  void read_conditions() {
    const JsonPart part = root_.part("conditions");
    part.only({"takes_charge_spin", "routed", "n_fparam", "n_case", "charge_offset", "phi"});
    ConditionSource& to = model_.conditions;
    to.takes_charge_spin = part.boolean("takes_charge_spin");
    to.routed = part.boolean("routed");
    routed_ = to.routed;
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
      to.charge_matrix = tensors_.read(path + "charge_matrix", Dtype::float64, {200, n_dim_});
      to.spin_matrix = tensors_.read(path + "spin_matrix", Dtype::float64, {100, n_dim_});
      to.mix_matrix = tensors_.read(path + "mix_matrix", Dtype::float64, {2 * n_dim_, n_dim_});
      to.mix_bias = tensors_.read(path + "mix_bias", Dtype::float64, {n_dim_});
      to.phi = read_activation(part);
    }
    if (to.n_fparam > 0) {
      to.fparam_avg = tensors_.read("conditions.fparam_avg", Dtype::float64, {to.n_fparam});
      to.fparam_inv_std = tensors_.read("conditions.fparam_inv_std", Dtype::float64, {to.n_fparam});
    }
    if (to.n_case > 0)
      to.case_embedding = tensors_.read("conditions.case_embedding", Dtype::float64, {to.n_case});
    if (to.taken()) n_constant_ = to.n_fparam + to.n_case;
    check_said_conditions(metadata_, to.takes_charge_spin, to.n_fparam);
  }

  void read_readout() {
    const JsonPart part = root_.part("readout");
    part.only({"concat_table", "with_case", "n_constant", "dtype", "layers"});
    ReadoutSource& to = model_.readout;
    to.shift = numbers_of(tensors_.read("readout.energy_shift", Dtype::float64, {n_types_}));
    to.weight = numbers_of(tensors_.read("readout.energy_weight", Dtype::float64, {n_types_}));
    const Dtype dtype = to.dtype = network_dtype(part, "dtype");
    const std::string net = "readout.net.";
    int64_t width = n_dim_;
    to.concat_table = part.boolean("concat_table");
    const std::string table =
        net + "table.table";  // may be that of the embedding, in the precision of the layers
    if (to.concat_table) {
      to.table = tensors_.read(table, tensors_.precision(table), {n_types_, n_dim_});
      width += n_dim_;
    } else if (tensors_.has(table)) {  // of no rows
      tensors_.take(table, tensors_.precision(table), {0, n_dim_});
    }
    if (part.boolean("with_case")) {
      const int64_t n_case = tensors_.width(net + "case_embedding", 1, 0);
      to.case_embedding = tensors_.read(net + "case_embedding", dtype, {n_case});
      width += n_case;
    }
    to.n_constant = part.integer("n_constant", n_constant_, n_constant_);
    width += to.n_constant;
    size_t index = 0;
    for (const JsonPart& child : part.children("layers")) {
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

  JsonPart root_;
  TensorTable& tensors_;
  const Json& metadata_;
  Architecture model_;
  std::string level_;
  int64_t n_types_ = 0;
  int64_t n_dim_ = 0;
  int64_t e_dim_ = 0;
  int64_t a_dim_ = 0;
  double cutoff_ = 0.0;
  double angle_cutoff_ = 0.0;
  bool with_angles_ = false;
  bool routed_ = false;
  int64_t n_constant_ = 0;  // inputs of the fitting net that conditions give
};

}  // namespace

Architecture read_architecture(const Json& architecture, TensorTable& tensors, const Json& metadata) {
  return Reader(architecture, tensors, metadata).run();
}

}  // namespace moecalc
