#include "core/json.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <string>
#include <utility>

#include "moecalc/package_file.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {
constexpr int max_depth = 32;
constexpr size_t max_values = 1 << 22;
}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json run() {
    Json value = read(0);
    skip();
    if (at_ != text_.size()) refuse("text behind the value");
    value.name_places("");
    return value;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error("not JSON (" + what + " at byte " + std::to_string(at_) + ")");
  }

  void skip() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos)
      ++at_;
  }

  char peek() {
    if (at_ >= text_.size()) refuse("cut short");
    return text_[at_];
  }

  bool accept(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json read(int depth) {
    if (depth > max_depth) refuse("nested too deeply");
    if (++n_values_ > max_values) refuse("too many values");
    skip();
    Json value;
    switch (peek()) {
      case '{':
        read_object(value, depth);
        break;
      case '[':
        read_list(value, depth);
        break;
      case '"':
        value.kind_ = Json::Kind::text;
        value.text_ = read_text();
        break;
      default:
        read_word(value);
    }
    return value;
  }

  void read_word(Json& value) {
    if (accept("null")) return;
    value.boolean_ = accept("true");
    if (value.boolean_ || accept("false")) {
      value.kind_ = Json::Kind::boolean;
      return;
    }
    value.kind_ = Json::Kind::number;
    value.number_ = read_number();
  }

  double read_number() {
    const size_t start = at_;
    accept("-");
    const size_t digits = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == digits || (text_[digits] == '0' && at_ - digits > 1)) refuse("an unexpected character");
    if (accept(".")) read_digits();
    if (accept("e") || accept("E")) {
      if (!accept("-")) accept("+");
      read_digits();
    }
    double number = 0.0;
    const auto [end, error] = std::from_chars(text_.data() + start, text_.data() + at_, number);
    // what is too small for a double is zero
    if (error == std::errc::result_out_of_range) {
      number = std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr);
    }
    if (!std::isfinite(number) || (error != std::errc() && error != std::errc::result_out_of_range) ||
        end != text_.data() + at_) {
      refuse("a number that is not finite");
    }
    return number;
  }

  void read_digits() {
    const size_t start = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    if (at_ == start) refuse("an unexpected character");
  }

  unsigned read_hex() {
    unsigned code = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() != 4 || error != std::errc() || end != digits.data() + 4) refuse("a bad escape");
    at_ += 4;
    return code;
  }

  void append_utf8(std::string& out, unsigned code) {
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xC0 | code >> 6);
      out += static_cast<char>(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      out += static_cast<char>(0xE0 | code >> 12);
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (code & 0x3F));
    } else {
      out += static_cast<char>(0xF0 | code >> 18);
      out += static_cast<char>(0x80 | (code >> 12 & 0x3F));
      out += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      out += static_cast<char>(0x80 | (code & 0x3F));
    }
  }

  void read_escape(std::string& out) {
    const char c = peek();
    ++at_;
    const size_t plain = std::string_view("\"\\/bfnrt").find(c);
    if (plain != std::string_view::npos) {
      out += "\"\\/\b\f\n\r\t"[plain];
      return;
    }
    if (c != 'u') refuse("a bad escape");
    unsigned code = read_hex();
    if (code >= 0xDC00 && code < 0xE000) refuse("a bad escape");
    if (code >= 0xD800 && code < 0xDC00) {
      if (!accept("\\u")) refuse("a bad escape");
      const unsigned low = read_hex();
      if (low < 0xDC00 || low >= 0xE000) refuse("a bad escape");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append_utf8(out, code);
  }

  std::string read_text() {
    std::string out;
    for (++at_; peek() != '"';) {
      const char c = text_[at_++];
      if (static_cast<unsigned char>(c) < 0x20) refuse("a control character");
      if (c == '\\') {
        read_escape(out);
      } else {
        out += c;
      }
    }
    ++at_;
    return out;
  }

  void read_list(Json& value, int depth) {
    value.kind_ = Json::Kind::list;
    ++at_;
    skip();
    if (accept("]")) return;
    do {
      value.list_.push_back(read(depth + 1));
      skip();
    } while (accept(","));
    if (!accept("]")) refuse("expected ',' or ']'");
  }

  void read_object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    ++at_;
    skip();
    if (accept("}")) return;
    do {
      skip();
      if (peek() != '"') refuse("expected a key");
      std::string key = read_text();
      skip();
      if (!accept(":")) refuse("expected ':'");
      if (value.object_.count(key) != 0) refuse("the key '" + printable(key, 40) + "' twice");
      value.object_.emplace(std::move(key), read(depth + 1));
      skip();
    } while (accept(","));
    if (!accept("}")) refuse("expected ',' or '}'");
  }

  std::string_view text_;
  size_t at_ = 0;
  size_t n_values_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).run(); }

/// Places are for messages, and messages name lists and members, not single numbers.
void Json::name_places(const std::string& place) {
  place_ = place;
  if (kind_ == Kind::list && (list_.empty() || list_[0].kind_ != Kind::number)) {
    for (size_t i = 0; i < list_.size(); ++i) list_[i].name_places(place + "[" + std::to_string(i) + "]");
  }
  for (auto& [key, value] : object_) value.name_places(place + "." + printable(key, 40));
}

void Json::expected(const char* what) const {
  static constexpr const char* names[] = {"null",   "true or false", "a number",
                                          "a text", "a list",        "an object"};
  throw Error(std::string("expected ") + what + (place_.empty() ? "" : " at `" + place_ + "`") + ", got " +
              names[static_cast<size_t>(kind_)]);
}

bool Json::boolean() const {
  if (kind_ != Kind::boolean) expected("true or false");
  return boolean_;
}

double Json::number() const {
  if (kind_ != Kind::number) expected("a number");
  return number_;
}

const std::string& Json::text() const {
  if (kind_ != Kind::text) expected("a text");
  return text_;
}

const std::vector<Json>& Json::list() const {
  if (kind_ != Kind::list) expected("a list");
  return list_;
}

std::vector<double> Json::numbers(size_t n) const {
  if (list().size() != n) expected(("a list of " + std::to_string(n) + " numbers").c_str());
  std::vector<double> values;
  values.reserve(n);
  for (const Json& item : list_) values.push_back(item.number());
  return values;
}

const std::map<std::string, Json>& Json::object() const {
  if (kind_ != Kind::object) expected("an object");
  return object_;
}

bool Json::has(const std::string& key) const { return kind_ == Kind::object && object_.count(key) != 0; }

const Json& Json::at(const std::string& key) const {
  if (!has(key)) expected(("an object with `" + key + "`").c_str());
  return object_.at(key);
}

}  // namespace moecalc
