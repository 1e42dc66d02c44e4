// Objects of architecture.json and tensors.json, read without trusting them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"

namespace moecalc {

/// Ends the messages of what no package of moecalc has.
inline constexpr const char* edited_file = ": damaged or edited file, package the checkpoint again";

/// As a stream shows it.
std::string shown(double value);

/// An object and its place in it, for messages.
class JsonPart {
 public:
  JsonPart(const Json& json, std::string place) : json_(json), place_(std::move(place)) { json_.object(); }

  [[noreturn]] void refuse(const std::string& name, const std::string& expectation,
                           const std::string& got) const;

  /// Refuses members that are not in `names`: what they were to say would be lost.
  void only(std::initializer_list<const char*> names) const;

  const Json& value(const std::string& name) const;

  JsonPart part(const std::string& name) const;

  /// Members of an object, by name.
  std::vector<std::pair<std::string, JsonPart>> members(const std::string& name) const;

  /// Objects of a list.
  std::vector<JsonPart> children(const std::string& name) const;

  bool boolean(const std::string& name) const;

  int64_t integer(const std::string& name, int64_t low, int64_t high) const;

  /// A number in (low, high].
  double number(const std::string& name, double low, double high) const;

  double finite(const std::string& name) const;

  std::string text(const std::string& name) const;

  const std::string& place() const { return place_; }

 private:
  const Json& json_;
  std::string place_;
};

}  // namespace moecalc
