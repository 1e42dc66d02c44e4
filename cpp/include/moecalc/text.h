// Text from a file, made fit for a terminal or a log.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>

namespace moecalc {

/// `text` with every control character (terminal escapes among them) as `\xHH`, cut to `limit` bytes. UTF-8
/// stays.
inline std::string printable(std::string_view text, size_t limit = 200) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (i >= limit) return out + "...";
    const auto c = static_cast<unsigned char>(text[i]);
    // U+0080 to U+009F, the other control characters, are 0xC2 0x80 to 0xC2 0x9F in UTF-8
    const bool c1 = c == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (c >= 0x20 && c != 0x7F && !c1) {
      out += text[i];
      continue;
    }
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped), "\\x%02x", c1 ? static_cast<unsigned char>(text[++i]) : c);
    out += escaped;
  }
  return out;
}

/// The same between two `mark`s.
inline std::string quoted(std::string_view text, size_t limit = 80, char mark = '`') {
  std::string out(1, mark);
  out += printable(text, limit);
  out += mark;
  return out;
}

/// Whether `text` has control characters besides tabs and ends of lines.
inline bool has_control(std::string_view text) {
  for (size_t i = 0; i < text.size(); ++i) {
    const auto c = static_cast<unsigned char>(text[i]);
    const auto next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0U;
    if (c == '\n' || c == '\t' || (c == '\r' && next == '\n')) continue;
    if (c < 0x20 || c == 0x7F || (c == 0xC2 && next >= 0x80 && next < 0xA0)) return true;
  }
  return false;
}

}  // namespace moecalc
