#include "package/code_check.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "core/json.h"
#include "moecalc/package_file.h"
#include "moecalc/text.h"
#include "package/allowed_code.h"
#include "package/pickle_check.h"

namespace moecalc {

namespace {

[[noreturn]] void refuse(const std::string& shown, const std::string& what) {
  throw Error("unsafe or edited file (" + shown + " has " + what +
              ", which no package of moecalc has): it was not loaded; get the package from its maker");
}

// torch reads code by recursion, so that deep expressions would overflow its stack. Packages have about 80
// words and symbols in a statement, brackets in brackets four times, and 10 kB in a record.
constexpr size_t max_code = 1 << 20;
constexpr size_t max_statement = 1000;
constexpr size_t max_brackets = 30;
constexpr size_t max_indentation = 60;
constexpr size_t max_name = 1000;

struct Token {
  char kind;  // n: name, or names joined by dots; 0: number; s: string; else the character itself
  std::string text;
};

bool starts_name(char c) { return std::isalpha(static_cast<unsigned char>(c)) != 0 || c == '_'; }
bool in_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }
bool is_digit(char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; }

size_t end_of_number(std::string_view code, size_t i) {
  while (i < code.size() &&
         (in_name(code[i]) || code[i] == '.' ||
          ((code[i] == '-' || code[i] == '+') && (code[i - 1] == 'e' || code[i - 1] == 'E')))) {
    ++i;
  }
  return i;
}

/// Strings are in double quotes; a backslash guards what follows.
size_t end_of_string(std::string_view code, size_t i, const std::string& shown) {
  for (++i; i < code.size() && code[i] != '"'; ++i) {
    if (code[i] == '\\') ++i;
    if (i >= code.size() || code[i] == '\n') break;
  }
  if (i >= code.size() || code[i] != '"') refuse(shown, "a string without an end");
  return i + 1;
}

std::vector<Token> tokens_of(std::string_view code, const std::string& shown) {
  std::vector<Token> tokens;
  if (code.size() > max_code) refuse(shown, std::to_string(code.size()) + " bytes of code");
  for (size_t i = 0; i < code.size();) {
    const char c = code[i];
    size_t end = i + 1;
    if (c == ' ') {
      while (end < code.size() && code[end] == ' ') ++end;
      if (end - i > max_indentation) refuse(shown, "blocks of that depth");
    } else if (starts_name(c)) {
      while (end < code.size() && (in_name(code[end]) || (code[end] == '.' && end + 1 < code.size() &&
                                                          starts_name(code[end + 1])))) {
        ++end;
      }
      tokens.push_back({'n', std::string(code.substr(i, end - i))});
    } else if (is_digit(c)) {
      end = end_of_number(code, i);
      tokens.push_back({'0', std::string(code.substr(i, end - i))});
    } else if (c == '"') {
      end = end_of_string(code, i, shown);
      tokens.push_back({'s', std::string(code.substr(i + 1, end - i - 2))});
    } else if (c == '\n' || std::strchr("()[]{},:=.-+*/%<>!|&", c) != nullptr) {
      tokens.push_back({c, std::string(1, c)});
    } else {
      refuse(shown, "the character '" + printable(std::string(1, c)) + "'");
    }
    i = end;
  }
  tokens.push_back({'\n', "\n"});
  return tokens;
}

bool is_keyword(std::string_view word) {
  static const std::set<std::string_view> keywords = {
      "False",  "None",  "True", "and",    "as",       "assert",  "async", "await", "break",  "class",
      "def",    "del",   "elif", "else",   "except",   "finally", "for",   "from",  "global", "if",
      "import", "in",    "is",   "lambda", "nonlocal", "not",     "or",    "pass",  "raise",  "return",
      "try",    "while", "with", "yield",  "print",    "exec",    "eval"};
  return keywords.count(word) != 0;
}

bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

class Scanner {
 public:
  Scanner(std::string_view code, std::string shown)
      : shown_(std::move(shown)), tokens_(tokens_of(code, shown_)) {}

  std::set<std::string> run() {
    check_depth();
    for (at_ = 0; at_ < tokens_.size(); ++at_) {
      const Token& token = tokens_[at_];
      if (token.kind == 'n') {
        read_name(token.text);
      } else if (token.kind == '(' &&
                 (before() == ')' || before() == ']' || before() == 's' || before() == '0')) {
        refuse(shown_, "a call of an expression");
      } else if (token.kind == '.' && (before() != ')' || after() != 'n')) {
        // the tokeniser joins names, so what is left is `(x).name`
        refuse(shown_, "a dot behind no name");
      }
    }
    return words_;
  }

 private:
  char before() const { return at_ == 0 ? '\n' : tokens_[at_ - 1].kind; }
  char after() const { return at_ + 1 < tokens_.size() ? tokens_[at_ + 1].kind : '\n'; }

  void check_depth() const {
    size_t brackets = 0;
    size_t length = 0;
    for (const Token& token : tokens_) {
      if (token.kind == '(' || token.kind == '[' || token.kind == '{') ++brackets;
      if (token.kind == ')' || token.kind == ']' || token.kind == '}') brackets -= brackets > 0 ? 1 : 0;
      length = token.kind == '\n' && brackets == 0 ? 0 : length + 1;
      if (brackets > max_brackets || length > max_statement) refuse(shown_, "a statement of that size");
      if (token.kind == 'n' && token.text.size() > max_name) refuse(shown_, "a name of that length");
    }
  }

  void read_name(const std::string& name) {
    const std::string first = name.substr(0, name.find('.'));
    const std::string last = name.substr(name.rfind('.') + 1);
    // special names are methods that may run by themselves
    for (size_t i = 0, end = 0; i <= name.size() && first != "torch"; i = end + 1) {
      end = std::min(name.find('.', i), name.size());
      const std::string part = name.substr(i, end - i);
      if (starts_with(part, "__") && ends_with(part, "__") && part != "__torch__") words_.insert(part);
    }
    const bool behind_dot = before() == '.';
    if (is_keyword(name)) {
      if (behind_dot) refuse(shown_, "a keyword behind a dot");
      return read_keyword(name);
    }
    if (behind_dot) {
      if (after() == '(') words_.insert(std::string(".").append(last).append("()"));
      return;
    }
    if (first == "torch" || first == "ops") {
      words_.insert(name);
      return;
    }
    if (first == "__torch__") {
      if (!is_known_code(name)) refuse(shown_, quoted(name, 80));
      return;
    }
    if (first == "CONSTANTS") refuse(shown_, quoted(name, 80));
    remember_assignment(name);
    if (after() != '(') return;
    if (first != name) {
      words_.insert(std::string(".").append(last).append("()"));
    } else if (functions_.count(name) == 0) {
      words_.insert(name + "()");
    }
  }

  void read_keyword(const std::string& word) {
    words_.insert(word);
    if (word == "def") {
      if (after() != 'n') refuse(shown_, "a function without a name");
      functions_.clear();
      ++at_;  // its name
      const std::string& name = tokens_[at_].text;
      if (name == "__setstate__" || name == "__getstate__") {
        refuse(shown_, quoted(name) + ", which would run while it is loaded");
      }
      if (name.find('.') != std::string::npos || is_keyword(name)) refuse(shown_, "a function of a bad name");
      words_.insert(std::string("def ").append(name));
    } else if (word == "class") {
      if (at_ + 5 >= tokens_.size() || tokens_[at_ + 1].kind != 'n' || tokens_[at_ + 2].kind != '(' ||
          tokens_[at_ + 3].kind != 'n' || tokens_[at_ + 4].kind != ')') {
        refuse(shown_, "a class of another form");
      }
      words_.insert(std::string("class ").append(tokens_[at_ + 3].text));
      at_ += 4;
    }
  }

  /// `x = __torch__.function` makes x callable until the function ends or x is assigned again. A name on the
  /// left in any other form (`x, y, = ...`, `for x in`) is not callable.
  void remember_assignment(const std::string& name) {
    if (name.find('.') != std::string::npos) return;
    const bool assigned =
        after() == '=' || after() == ',' || after() == ':' || (at_ > 0 && tokens_[at_ - 1].text == "for");
    if (!assigned) return;
    functions_.erase(name);
    if (after() == '=' && at_ + 3 < tokens_.size() && before() == '\n' && tokens_[at_ + 2].kind == 'n' &&
        starts_with(tokens_[at_ + 2].text, "__torch__.") && tokens_[at_ + 3].kind == '\n') {
      functions_.insert(name);
    }
  }

  std::string shown_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::set<std::string> words_;
  std::set<std::string> functions_;  // local names that stand for functions of the package
};

bool is_number(std::string_view text) {
  return !text.empty() && text.size() < 10 && std::all_of(text.begin(), text.end(), is_digit);
}

/// Whether packages have a record of this name.
bool is_known_record(std::string_view name) {
  for (const std::string_view known :
       {"data.pkl", "constants.pkl", "version", ".data/version", "byteorder", "extra/format_version",
        "extra/metadata.json", "extra/architecture.json", "extra/tensors.json", "extra/reference.json",
        "extra/verification.json"}) {
    if (name == known) return true;
  }
  for (const std::string_view folder : {"data/", "constants/"}) {
    if (starts_with(name, folder)) return is_number(name.substr(folder.size()));
  }
  if (!starts_with(name, "code/") || !ends_with(name, ".py")) return false;
  std::string qualified(name.substr(5, name.size() - 8));
  std::replace(qualified.begin(), qualified.end(), '/', '.');
  return is_known_code(qualified + ".x");
}

/// What was changed by hand is seen, unless the digest was changed with it. Older packages have none.
void check_digest(const PackageFile& file) {
  if (file.records().count("extra/metadata.json") == 0) return;
  std::string stored;
  try {
    const Json metadata = Json::parse(file.record("extra/metadata.json"));
    if (metadata.kind() != Json::Kind::object || !metadata.has("digest")) return;
    stored = metadata.at("digest").text();
  } catch (const Error& error) {
    throw Error(std::string("metadata.json: ") + error.what() + ": package the checkpoint again");
  }
  const std::string found = digest_of(file);
  if (stored != found) {
    throw Error("edited file (digest " + found + " of the model's records, expected " +
                quoted(stored, 20, '\'') + " of the metadata): get the package from its maker");
  }
}

}  // namespace

std::set<std::string> code_words(std::string_view code, const std::string& shown) {
  return Scanner(code, shown).run();
}

void check_content(const PackageFile& file) {
  for (const auto& [name, place] : file.records()) {
    if (!is_known_record(name)) {
      refuse("the file", "a record `" + printable(name, 80) + "`");
    }
    if (!starts_with(name, "code/")) continue;
    for (const std::string& word : code_words(file.record(name), quoted(name))) {
      if (!std::binary_search(std::begin(allowed_code), std::end(allowed_code), word)) {
        refuse(quoted(name), quoted(word, 80));
      }
    }
  }
  // torch moves it where an operator of the code (gelu) is of a later version
  const bool moved = file.records().count(".data/version") != 0;
  if (moved && file.records().count("version") != 0) refuse("the file", "two records `version`");
  const std::string version = file.record(moved ? ".data/version" : "version");
  if (version.size() > 4 ||
      !std::all_of(version.begin(), version.end(), [](char c) { return is_digit(c) || c == '\n'; })) {
    refuse("the file", "an unknown `version`");
  }
  if (file.records().count("byteorder") != 0 && file.record("byteorder") != "little") {
    refuse("the file", "an unknown `byteorder`");
  }
  check_pickle(file, "data.pkl", "data");
  check_pickle(file, "constants.pkl", "constants");
  check_digest(file);
}

void check_package(const PackageFile& file) {
  try {
    check_content(file);
  } catch (const Error& error) {
    throw Error(file.path() + ": " + error.what());
  }
}

std::vector<std::string> words_of_code(const PackageFile& file) {
  std::set<std::string> words;
  for (const auto& [name, place] : file.records()) {
    if (starts_with(name, "code/")) words.merge(code_words(file.record(name), quoted(name)));
  }
  return {words.begin(), words.end()};
}

std::vector<std::string> allowed_words() { return {std::begin(allowed_code), std::end(allowed_code)}; }

}  // namespace moecalc
