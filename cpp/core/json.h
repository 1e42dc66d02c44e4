// A strict reader of JSON text: the records of a package, read without trusting them.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace moecalc {

/// A JSON value. The accessors throw Error, saying what was expected at which place (`[0].positions`).
class Json {
 public:
  enum class Kind { null, boolean, number, text, list, object };

  /// Throws Error for what is not one JSON value (RFC 8259), numbers that are not finite, repeated keys,
  /// nesting beyond 32 levels and more than 4 million values.
  static Json parse(std::string_view text);

  Kind kind() const { return kind_; }
  bool boolean() const;
  double number() const;
  const std::string& text() const;
  const std::vector<Json>& list() const;
  /// The list's numbers. Throws Error unless there are `n`.
  std::vector<double> numbers(size_t n) const;
  /// Member of an object; throws Error if there is none.
  const Json& at(const std::string& key) const;
  bool has(const std::string& key) const;
  const std::map<std::string, Json>& object() const;

 private:
  friend class JsonReader;
  [[noreturn]] void expected(const char* what) const;
  void name_places(const std::string& place);

  Kind kind_ = Kind::null;
  bool boolean_ = false;
  double number_ = 0.0;
  std::string text_;
  std::string place_;
  std::vector<Json> list_;
  std::map<std::string, Json> object_;
};

}  // namespace moecalc
