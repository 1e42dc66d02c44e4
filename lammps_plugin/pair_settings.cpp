#include "pair_settings.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <optional>

#include "moecalc/error.h"

namespace LAMMPS_NS {

namespace {

const std::vector<std::string> keywords = {"device",   "dtype",    "precision",  "untrained",
                                           "charge",   "spin",     "fparam",     "out_file",
                                           "out_freq", "relative", "relative_v", "atomic"};

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

bool is_deviation_keyword(const std::string& word) {
  return contains({"out_file", "out_freq", "relative", "relative_v", "atomic"}, word);
}

int64_t steps_of(const std::string& word) {
  int64_t steps = 0;
  const char* const last = word.data() + word.size();
  const auto [end, failure] = std::from_chars(word.data(), last, steps);
  if (failure != std::errc() || end != last || steps < 0) {
    throw moecalc::Error("expected a number of steps after keyword out_freq, 0 for never, got " + word);
  }
  return steps;
}

double level_of(const std::string& keyword, const std::string& word) {
  const std::optional<double> level = number_of(word);
  if (!level || !(*level >= 0.0) || !std::isfinite(*level)) {
    throw moecalc::Error("expected a number of 0 or more after keyword " + keyword + ", got " + word);
  }
  return *level;
}

/// Reads the keyword words[at] of the deviations and its value, which atomic has none of. Returns the index
/// of the word that follows.
size_t read_deviation(const std::vector<std::string>& words, size_t at, DeviationSettings& deviation) {
  const std::string& keyword = words[at++];
  if (keyword == "atomic") {
    deviation.atomic = true;
    return at;
  }
  if (at == words.size() || contains(keywords, words[at])) {
    throw moecalc::Error("expected a value after keyword " + keyword);
  }
  const std::string& value = words[at++];
  if (keyword == "out_freq") {
    deviation.every = steps_of(value);
  } else if (keyword == "out_file") {
    // a restart file keeps all keywords in one text
    if (value.empty() || value.find_first_of(" \t\n\"'") != std::string::npos) {
      throw moecalc::Error("expected a file name without blanks and quotes after keyword out_file, got '" +
                           value + "'");
    }
    deviation.file = value;
  } else {
    (keyword == "relative" ? deviation.relative : deviation.relative_v) = level_of(keyword, value);
  }
  return at;
}

bool is_condition_keyword(const std::string& word) {
  return word == "charge" || word == "spin" || word == "fparam";
}

/// Reads the keyword words[at] and its numbers: one, and for fparam all up to the next keyword or the end.
/// Returns the index of the word that follows.
size_t read_condition(const std::vector<std::string>& words, size_t at, moecalc::GivenConditions& given) {
  const std::string& keyword = words[at++];
  const auto ends = [&] { return at == words.size() || contains(keywords, words[at]); };
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

/// Throws unless the value is one of `known`; `shown`: how the message lists them.
void expect(const std::string& keyword, const std::string& value, const std::vector<std::string>& known,
            const std::string& shown) {
  if (contains(known, value)) return;
  throw moecalc::Error("expected " + keyword + " " + shown + ", got " + value);
}

void set(PairSettings& settings, const std::string& keyword, const std::string& value) {
  if (keyword == "device") {
    const std::string kind = value.rfind("cuda:", 0) == 0 ? "cuda" : value;
    if (!contains({"auto", "cpu", "cuda"}, kind)) {
      throw moecalc::Error("expected device auto, cpu, cuda or cuda:N, got " + value);
    }
    settings.device = value;
  } else if (keyword == "dtype") {
    expect(keyword, value, {"float32", "float64"}, "float32 or float64");
    settings.dtype = value;
  } else if (keyword == "precision") {
    expect(keyword, value, {"fp32", "fp32-ffma", "bf16x3", "tf32", "fp16"},
           "fp32, fp32-ffma, bf16x3, tf32 or fp16");
    settings.precision = value;
  } else {
    expect(keyword, value, {"yes", "no"}, "yes or no");
    settings.allow_untrained = value == "yes";
  }
}

}  // namespace

PairSettings PairSettings::parse(const std::vector<std::string>& words) {
  PairSettings settings;
  std::vector<std::string> seen;
  for (size_t i = 0; i < words.size();) {
    const std::string& keyword = words[i];
    if (!contains(keywords, keyword)) {
      throw moecalc::Error("expected keyword " + joined({keywords.begin(), keywords.end() - 1}, ", ") +
                           " or " + keywords.back() + ", got " + keyword);
    }
    if (contains(seen, keyword)) {
      throw moecalc::Error("expected keyword " + keyword + " once, got it twice");
    }
    seen.push_back(keyword);
    if (is_condition_keyword(keyword)) {
      i = read_condition(words, i, settings.given);
      continue;
    }
    if (is_deviation_keyword(keyword)) {
      i = read_deviation(words, i, settings.deviation);
      continue;
    }
    if (i + 1 == words.size()) throw moecalc::Error("expected a value after keyword " + keyword);
    set(settings, keyword, words[i + 1]);
    i += 2;
  }
  return settings;
}

std::vector<std::string> PairSettings::words_of_rest() const {
  std::vector<std::string> words = {allow_untrained ? "yes" : "no"};
  if (given.charge) words.insert(words.end(), {"charge", word_of(*given.charge)});
  if (given.spin) words.insert(words.end(), {"spin", word_of(*given.spin)});
  if (given.fparam) {
    words.emplace_back("fparam");
    for (const double value : *given.fparam) words.push_back(word_of(value));
  }
  // nothing for a default, so that the files of one package are what they were
  const DeviationSettings usual;
  if (deviation.file != usual.file) words.insert(words.end(), {"out_file", deviation.file});
  if (deviation.every != usual.every) {
    words.insert(words.end(), {"out_freq", std::to_string(deviation.every)});
  }
  if (deviation.relative) words.insert(words.end(), {"relative", word_of(*deviation.relative)});
  if (deviation.relative_v) words.insert(words.end(), {"relative_v", word_of(*deviation.relative_v)});
  if (deviation.atomic) words.emplace_back("atomic");
  return words;
}

void PairSettings::set_rest(const std::vector<std::string>& words) {
  allow_untrained = !words.empty() && words[0] == "yes";
  given = {};
  deviation = {};
  for (size_t i = 1; i < words.size();) {
    if (is_deviation_keyword(words[i])) {
      i = read_deviation(words, i, deviation);
      continue;
    }
    if (!is_condition_keyword(words[i])) throw moecalc::Error("expected a keyword, got " + words[i]);
    i = read_condition(words, i, given);
  }
}

bool same(const moecalc::GivenConditions& one, const moecalc::GivenConditions& other) {
  return one.charge == other.charge && one.spin == other.spin && one.fparam == other.fparam;
}

std::string joined(const std::vector<std::string>& words, const std::string& separator) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : separator) + word;
  return text;
}

bool contains(const std::vector<std::string>& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

}  // namespace LAMMPS_NS
