#include "core/settings.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

/// Text of an environment variable; an empty one counts as not set.
std::string variable(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? "" : text;
}

/// `'a', 'b' or 'c'`.
std::string one_of(std::initializer_list<const char*> words) {
  std::string text;
  size_t left = words.size();
  for (const char* word : words) {
    text += quoted(word, 80, '\'');
    --left;
    if (left > 0) text += left == 1 ? " or " : ", ";
  }
  return text;
}

std::string choice(const char* name, std::initializer_list<const char*> known) {
  const std::string text = variable(name);
  const bool found = std::any_of(known.begin(), known.end(), [&](const char* word) { return text == word; });
  if (text.empty() || found) return text;
  throw Error(std::string("expected ") + name + " to be " + one_of(known) + ", got " +
              quoted(text, 80, '\''));
}

/// A number of MiB, in bytes.
std::optional<int64_t> mebibytes(const char* name, const char* what, double lowest) {
  const std::string text = variable(name);
  if (text.empty()) return std::nullopt;
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end != '\0' || !(number >= lowest && number <= 1e9)) {
    throw Error(std::string("expected ") + name + " to be a number of MiB" + what + ", got " +
                quoted(text, 80, '\''));
  }
  return static_cast<int64_t>(number * 1048576.0);
}

}  // namespace

Settings read_settings() {
  Settings settings;
  settings.backend = choice("MOECALC_BACKEND", {"fused", "plain", "torchscript", "cuda-emulation"});
  settings.instruction_set = choice("MOECALC_CPU", {"avx512", "avx2", "generic"});
  settings.keep_bytes = mebibytes("MOECALC_KEEP", " per thread", 0.0);
  settings.weight_bytes = mebibytes("MOECALC_WEIGHTS", "", 0.0);
  settings.device_bytes = mebibytes("MOECALC_DEVICE_MEMORY", "", 1e-3);
  settings.cuda_graphs = choice("MOECALC_CUDA_GRAPHS", {"0", "1"}) != "0";
  settings.emulation_reversed = choice("MOECALC_EMULATION_REVERSED", {"0", "1"}) == "1";
  return settings;
}

}  // namespace moecalc
