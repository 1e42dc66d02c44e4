#include "condition_keywords.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

#include "moecalc/archive.h"

namespace LAMMPS_NS {

namespace {

/// Not with strtod, whose decimal point is that of the locale.
std::optional<double> number_of(const std::string& word) {
  const char* first = word.data();
  const char* const last = first + word.size();
  if (word.size() > 1 && word[0] == '+' && word[1] != '-') ++first;
  double value = 0.0;
  const auto [end, failure] = std::from_chars(first, last, value);
  if (failure != std::errc() || end != last) return std::nullopt;
  return value;
}

std::string word_of(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

}  // namespace

bool is_condition_keyword(const std::string& word) {
  return word == "charge" || word == "spin" || word == "fparam";
}

size_t read_condition(const std::vector<std::string>& words, size_t at,
                      const std::vector<std::string>& keywords, moecalc::GivenConditions& given) {
  const std::string& keyword = words[at++];
  const auto ends = [&] {
    return at == words.size() || std::find(keywords.begin(), keywords.end(), words[at]) != keywords.end();
  };
  const auto next = [&] {
    const std::optional<double> value = number_of(words[at]);
    if (!value) {
      const std::string expected =
          keyword == "fparam" ? "numbers separated by blanks" : std::string("a whole number");
      throw moecalc::Error("expected " + expected + " after keyword " + keyword + ", got " + words[at]);
    }
    ++at;
    return *value;
  };
  if (ends()) throw moecalc::Error("expected a value after keyword " + keyword);
  if (keyword == "fparam") {
    std::vector<double> values;
    while (!ends()) values.push_back(next());
    given.fparam = values;
  } else {
    (keyword == "charge" ? given.charge : given.spin) = next();
  }
  return at;
}

std::vector<std::string> condition_words(const moecalc::GivenConditions& given) {
  std::vector<std::string> words;
  if (given.charge) words.insert(words.end(), {"charge", word_of(*given.charge)});
  if (given.spin) words.insert(words.end(), {"spin", word_of(*given.spin)});
  if (given.fparam) {
    words.emplace_back("fparam");
    for (const double value : *given.fparam) words.push_back(word_of(value));
  }
  return words;
}

bool same(const moecalc::GivenConditions& one, const moecalc::GivenConditions& other) {
  return one.charge == other.charge && one.spin == other.spin && one.fparam == other.fparam;
}

}  // namespace LAMMPS_NS
