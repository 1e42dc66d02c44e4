#include "package/json_part.h"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

std::string shown(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

void JsonPart::refuse(const std::string& name, const std::string& expectation, const std::string& got) const {
  throw Error("expected `" + place_ + printable(name, 80) + "` to be " + expectation + ", got " + got +
              edited_file);
}

void JsonPart::only(std::initializer_list<const char*> names) const {
  for (const auto& [key, value] : json_.object()) {
    const bool known =
        std::any_of(names.begin(), names.end(), [&, &key = key](const char* name) { return key == name; });
    if (!known) refuse(printable(key, 40), "left out", "a value");
  }
}

const Json& JsonPart::value(const std::string& name) const {
  if (!json_.has(name)) {
    throw Error("expected an architecture with `" + place_ + printable(name, 80) + "`, got one without" +
                edited_file);
  }
  return json_.at(name);
}

JsonPart JsonPart::part(const std::string& name) const {
  if (value(name).kind() != Json::Kind::object) refuse(name, "an object", "another type");
  return {value(name), place_ + printable(name, 80) + "."};
}

std::vector<std::pair<std::string, JsonPart>> JsonPart::members(const std::string& name) const {
  const JsonPart parent = part(name);
  std::vector<std::pair<std::string, JsonPart>> parts;
  for (const auto& [key, member] : parent.json_.object()) {
    if (member.kind() != Json::Kind::object) parent.refuse(printable(key, 40), "an object", "another type");
    parts.emplace_back(key, JsonPart(member, parent.place_ + printable(key, 40) + "."));
  }
  return parts;
}

std::vector<JsonPart> JsonPart::children(const std::string& name) const {
  if (value(name).kind() != Json::Kind::list) refuse(name, "a list", "another type");
  std::vector<JsonPart> parts;
  for (const Json& item : value(name).list()) {
    const std::string index = std::to_string(parts.size());
    if (item.kind() != Json::Kind::object) refuse(name + "." + index, "an object", "another type");
    parts.emplace_back(item, place_ + name + "." + index + ".");
  }
  return parts;
}

bool JsonPart::boolean(const std::string& name) const {
  if (value(name).kind() != Json::Kind::boolean) refuse(name, "true or false", "another type");
  return value(name).boolean();
}

int64_t JsonPart::integer(const std::string& name, int64_t low, int64_t high) const {
  const std::string expectation = "an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]";
  if (value(name).kind() != Json::Kind::number) refuse(name, expectation, "another type");
  const double number = value(name).number();
  // written so that a NaN would be refused
  if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high) &&
        number == std::floor(number))) {
    refuse(name, expectation, shown(number));
  }
  return static_cast<int64_t>(number);
}

double JsonPart::number(const std::string& name, double low, double high) const {
  const std::string expectation = "a number in (" + shown(low) + ", " + shown(high) + "]";
  if (value(name).kind() != Json::Kind::number) refuse(name, expectation, "another type");
  const double number = value(name).number();
  if (!(number > low && number <= high)) refuse(name, expectation, shown(number));
  return number;
}

double JsonPart::finite(const std::string& name) const {
  if (value(name).kind() != Json::Kind::number || !std::isfinite(value(name).number())) {
    refuse(name, "a finite number", "another type");
  }
  return value(name).number();
}

std::string JsonPart::text(const std::string& name) const {
  if (value(name).kind() != Json::Kind::text) refuse(name, "a text", "another type");
  return value(name).text();
}

}  // namespace moecalc
