#include "package/metadata_check.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "moecalc/error.h"
#include "moecalc/text.h"
#include "package/json_part.h"

namespace moecalc {

namespace {

/// A part of the metadata that is not there says nothing.
const Json* said(const Json& metadata, const char* name) {
  return metadata.has(name) ? &metadata.at(name) : nullptr;
}

[[noreturn]] void refuse(const std::string& expectation, const std::string& got) {
  throw Error("expected " + expectation + ", got " + got +
              ": damaged or edited file, package the checkpoint again");
}

void check_same(const std::string& name, double module, const Json* said) {
  if (said != nullptr && module != said->number()) {
    refuse("the same `" + name + "` in model and metadata", shown(module) + " and " + shown(said->number()));
  }
}

/// Names and notes reach terminals and logs.
void check_texts(const std::string& name, const Json& json) {
  if (json.kind() == Json::Kind::text && has_control(json.text())) {
    refuse("metadata without control characters", "'" + printable(json.text(), 40) + "' at `" + name + "`");
  }
  if (json.kind() == Json::Kind::list) {
    for (const Json& item : json.list()) check_texts(name, item);
  }
  if (json.kind() != Json::Kind::object) return;
  for (const auto& [key, value] : json.object()) check_texts(printable(key, 40), value);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ",") + word;
  return printable(text, 80);
}

void check_texts_and_limits(const Json& metadata) {
  check_texts("metadata", metadata);
  for (const char* name : {"name", "note", "license", "citation"}) {
    if (const Json* text = said(metadata, name)) text->text();
  }
  if (const Json* limits = said(metadata, "neighbor_limits")) {
    for (const auto& [name, limit] : limits->object()) {
      if (limit.number() < 0 || limit.number() > 1e9) {
        refuse("`neighbor_limits` of 0 to 1e9", shown(limit.number()));
      }
    }
  }
  if (const Json* name = said(metadata, "name");
      name != nullptr && name->text().find('\n') != std::string::npos) {
    refuse("a `name` of one line", quoted(name->text(), 40, '\''));
  }
}

void check_elements(const Json& metadata, const Architecture& model) {
  if (const Json* elements = said(metadata, "elements")) {
    std::vector<std::string> symbols_said;
    for (const Json& element : elements->list()) symbols_said.push_back(element.text());
    if (symbols_said != model.elements) {
      refuse("the same elements in model and metadata",
             joined(model.elements) + " and " + joined(symbols_said));
    }
  }
  if (const Json* trained = said(metadata, "trained_elements")) {
    for (const Json& element : trained->list()) {
      if (std::find(model.elements.begin(), model.elements.end(), element.text()) == model.elements.end()) {
        refuse("`trained_elements` among the elements", quoted(element.text(), 20, '\''));
      }
    }
  }
}

void check_model(const Json& metadata, const Architecture& model) {
  metadata.object();
  check_texts_and_limits(metadata);
  check_same("cutoff", model.rules.cutoff, said(metadata, "cutoff"));
  check_same("angle_cutoff", model.rules.angle_cutoff, said(metadata, "angle_cutoff"));
  check_same("n_layers", static_cast<double>(model.layers.size()), said(metadata, "n_layers"));
  if (const Json* dims = said(metadata, "dims")) {
    check_same("dims.node", static_cast<double>(model.n_dim), &dims->at("node"));
    check_same("dims.edge", static_cast<double>(model.e_dim), &dims->at("edge"));
    check_same("dims.angle", static_cast<double>(model.a_dim), &dims->at("angle"));
  }
  check_elements(metadata, model);
  const std::string dtype = model.dtype == Dtype::float64 ? "float64" : "float32";
  if (const Json* name = said(metadata, "dtype"); name != nullptr && name->text() != dtype) {
    refuse("dtype " + dtype + " in the metadata, as in the model", quoted(name->text(), 20, '\''));
  }
}

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

}  // namespace

void check_said_conditions(const Json& metadata, bool charge_spin, int64_t n_fparam) {
  const Json* conditions = said(metadata, "conditions");
  const auto taken = [&](const char* name) {
    return conditions != nullptr && conditions->kind() == Json::Kind::object && conditions->has(name) &&
           conditions->at(name).kind() != Json::Kind::null;
  };
  if (taken("charge_spin") != charge_spin) {
    refuse(std::string("metadata that say that charge and spin are ") + (charge_spin ? "taken" : "not taken"),
           "others");
  }
  const bool shared = taken("fparam_is_charge_spin") && conditions->at("fparam_is_charge_spin").boolean();
  if (!shared && taken("fparam") != (n_fparam > 0)) {
    refuse("metadata with the frame parameters of the model, " + std::to_string(n_fparam), "others");
  }
  if (taken("fparam") && conditions->at("fparam").at("size").number() != static_cast<double>(n_fparam)) {
    refuse(std::to_string(n_fparam) + " frame parameters in the metadata, as in the model",
           shown(conditions->at("fparam").at("size").number()));
  }
}

void check_metadata(const Json& metadata, const Architecture& model) {
  try {
    check_model(metadata, model);
  } catch (const Error& error) {
    throw Error(std::string("metadata.json: ") + error.what());
  }
}

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

}  // namespace moecalc
