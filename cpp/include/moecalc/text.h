// Text from a file, made fit for a terminal or a log.
#pragma once

#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>

namespace moecalc {

/// Bytes of the UTF-8 character at `at`, 0 where there is none or a control character.
inline size_t printable_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U; };
  const unsigned first = byte(at);
  if (first < 0x80) return first >= 0x20 && first != 0x7F ? 1 : 0;
  const size_t n = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  unsigned code = first & (0xFFU >> (n + 1));
  for (size_t i = 1; i < n; ++i) {
    if ((byte(at + i) & 0xC0U) != 0x80) return 0;
    code = code << 6 | (byte(at + i) & 0x3FU);
  }
  constexpr unsigned smallest[] = {0, 0, 0xA0, 0x800, 0x10000};  // 0x80 to 0x9F are control characters
  const bool good = first >= 0xC2 && first < 0xF5 && code >= smallest[n] && code <= 0x10FFFF &&
                    (code < 0xD800 || code > 0xDFFF);
  return good ? n : 0;
}

/// `text` with control characters (terminal escapes among them) and what is not UTF-8 as `\xHH`, cut to about
/// `limit` bytes.
inline std::string printable(std::string_view text, size_t limit = 200) {
  std::string out;
  for (size_t i = 0; i < text.size();) {
    if (i >= limit) return out + "...";
    const size_t n = printable_bytes(text, i);
    if (n > 0) {
      out += text.substr(i, n);
      i += n;
      continue;
    }
    char escaped[8];
    std::snprintf(escaped, sizeof(escaped), "\\x%02x",
                  static_cast<unsigned>(static_cast<unsigned char>(text[i++])));
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

/// Whether `text` has control characters besides tabs and ends of lines, or is no UTF-8.
inline bool has_control(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const bool line_end = text[i] == '\r' && i + 1 < text.size() && text[i + 1] == '\n';
    const size_t n = text[i] == '\n' || text[i] == '\t' || line_end ? 1 : printable_bytes(text, i);
    if (n == 0) return true;
    i += n;
  }
  return false;
}

}  // namespace moecalc
