#include "package/records.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "moecalc/package_file.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

constexpr size_t central_size = 46;  // entry of the directory without name, extra field and comment
constexpr size_t local_size = 30;
constexpr size_t max_name = 200;
constexpr uint64_t in_zip64 = 0xFFFFFFFF;

[[noreturn]] void refuse(const std::string& what) {
  throw Error("damaged or edited file (" + what + "): copy it again or package the checkpoint again");
}

/// The file, of which the directory is read at once.
class Bytes {
 public:
  Bytes(const ReadBytes& read, uint64_t size) : read_(read), size_(size) {}

  uint64_t number(uint64_t position, int n_bytes) const {
    if (!within(position, static_cast<uint64_t>(n_bytes))) refuse("a header beyond its end");
    unsigned char bytes[8];
    copy(position, bytes, static_cast<size_t>(n_bytes));
    uint64_t value = 0;
    for (int i = n_bytes - 1; i >= 0; --i) value = value << 8 | bytes[i];
    return value;
  }

  bool has(uint64_t position, const char (&signature)[5]) const {
    if (!within(position, 4)) return false;
    char bytes[4];
    copy(position, bytes, 4);
    return std::memcmp(bytes, signature, 4) == 0;
  }

  void check_part(uint64_t position, uint64_t size) const {
    if (!within(position, size)) refuse("a record beyond its end");
  }

  std::string part(uint64_t position, uint64_t size) const {
    check_part(position, size);
    std::string bytes(static_cast<size_t>(size), '\0');
    copy(position, bytes.data(), bytes.size());
    return bytes;
  }

  /// What is read often from now on.
  void keep(uint64_t begin, uint64_t end) {
    kept_ = part(begin, end - begin);
    kept_begin_ = begin;
  }

 private:
  bool within(uint64_t position, uint64_t size) const {
    return position <= size_ && size <= size_ - position;
  }

  void copy(uint64_t position, void* to, size_t n) const {
    if (position >= kept_begin_ && position - kept_begin_ <= kept_.size() &&
        n <= kept_.size() - (position - kept_begin_)) {
      std::memcpy(to, kept_.data() + (position - kept_begin_), n);
    } else {
      read_(position, to, n);
    }
  }

  const ReadBytes& read_;
  uint64_t size_;
  std::string kept_;
  uint64_t kept_begin_ = 0;
};

/// Letters, digits and `_-.` in parts between single slashes, none of them `.` or `..`.
bool is_plain(std::string_view name) {
  if (name.empty() || name.size() > max_name || name.back() == '/') return false;
  size_t start = 0;
  for (size_t i = 0; i <= name.size(); ++i) {
    if (i < name.size() && name[i] != '/') {
      if (std::isalnum(static_cast<unsigned char>(name[i])) == 0 && std::strchr("_-.", name[i]) == nullptr) {
        return false;
      }
      continue;
    }
    const std::string_view part = name.substr(start, i - start);
    if (part.empty() || part == "." || part == "..") return false;
    start = i + 1;
  }
  return true;
}

std::string folded(std::string_view name) {
  std::string lower(name);
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower;
}

struct Entry {
  std::string name;
  uint64_t size = 0;
  uint64_t compressed = 0;
  uint64_t offset = 0;
  uint64_t flags = 0;
  uint64_t method = 0;
  uint64_t checksum = 0;
  uint64_t next = 0;  // position of the entry that follows
};

/// Values of more than 32 bits are in an extra field, in the order size, compressed size, offset.
void read_zip64(const Bytes& bytes, uint64_t position, uint64_t end, Entry& entry) {
  for (; position + 4 <= end; position += 4 + bytes.number(position + 2, 2)) {
    if (bytes.number(position, 2) != 1) continue;
    uint64_t field = position + 4;
    const uint64_t field_end = field + bytes.number(position + 2, 2);
    for (uint64_t* value : {&entry.size, &entry.compressed, &entry.offset}) {
      if (*value != in_zip64) continue;
      if (field + 8 > field_end || field_end > end) refuse("a bad zip64 field");
      *value = bytes.number(field, 8);
      field += 8;
    }
    return;
  }
}

Entry read_entry(const Bytes& bytes, uint64_t position) {
  if (!bytes.has(position, "PK\1\2")) refuse("a bad directory");
  Entry entry;
  entry.flags = bytes.number(position + 8, 2);
  entry.method = bytes.number(position + 10, 2);
  entry.checksum = bytes.number(position + 16, 4);
  entry.compressed = bytes.number(position + 20, 4);
  entry.size = bytes.number(position + 24, 4);
  entry.offset = bytes.number(position + 42, 4);
  const size_t name_size = bytes.number(position + 28, 2);
  const size_t extra_size = bytes.number(position + 30, 2);
  const uint64_t extra = position + central_size + name_size;
  entry.name = bytes.part(position + central_size, name_size);
  entry.next = extra + extra_size + bytes.number(position + 32, 2);
  bytes.check_part(position, entry.next - position);
  read_zip64(bytes, extra, extra + extra_size, entry);
  return entry;
}

}  // namespace

Records read_directory(const ReadBytes& read, uint64_t file_size, uint64_t eocd) {
  Bytes bytes(read, file_size);
  const bool zip64 = eocd >= 76 && bytes.has(eocd - 76, "PK\6\6") && bytes.has(eocd - 20, "PK\6\7");
  const uint64_t end = zip64 ? eocd - 76 : eocd;
  const uint64_t size = zip64 ? bytes.number(end + 40, 8) : bytes.number(eocd + 12, 4);
  const uint64_t begin = zip64 ? bytes.number(end + 48, 8) : bytes.number(eocd + 16, 4);
  const uint64_t count = zip64 ? bytes.number(end + 32, 8) : bytes.number(eocd + 10, 2);
  if (begin > end || size != end - begin) refuse("a directory of another size than the end record says");
  bytes.keep(begin, end);

  Records records;
  std::set<std::string> seen;
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  std::string folder;
  uint64_t position = begin;
  while (position < end) {
    const Entry entry = read_entry(bytes, position);
    position = entry.next;
    const std::string shown = "record '" + printable(entry.name) + "'";
    if (!is_plain(entry.name)) refuse(shown + ", expected letters, digits and `_-.` between single slashes");
    if (!seen.insert(folded(entry.name)).second) refuse(shown + " is there twice");
    if (entry.method != 0 || entry.compressed != entry.size) refuse(shown + " is compressed");
    if ((entry.flags & 1U) != 0) refuse(shown + " is encrypted");
    if (!bytes.has(entry.offset, "PK\3\4")) refuse(shown + " has no header");
    const size_t name_size = bytes.number(entry.offset + 26, 2);
    const uint64_t data = entry.offset + local_size + name_size + bytes.number(entry.offset + 28, 2);
    if (bytes.part(entry.offset + local_size, name_size) != entry.name ||
        bytes.number(entry.offset + 8, 2) != 0) {
      refuse(shown + " differs from its header");
    }
    bytes.check_part(data, entry.size);
    spans.emplace_back(entry.offset, data + entry.size);
    const size_t slash = entry.name.find('/');
    if (slash == std::string::npos) refuse(shown + " is in no folder");
    if (records.empty()) folder = entry.name.substr(0, slash);
    if (entry.name.substr(0, slash) != folder) refuse(shown + " is outside of the folder of the others");
    records.emplace(entry.name.substr(slash + 1),
                    Record{data, entry.size, static_cast<uint32_t>(entry.checksum)});
  }
  if (position != end) refuse("a bad directory");
  if (records.size() != count || (zip64 && bytes.number(end + 24, 8) != count) ||
      bytes.number(eocd + 8, 2) != std::min<uint64_t>(count, 0xFFFF) ||
      bytes.number(eocd + 10, 2) != std::min<uint64_t>(count, 0xFFFF)) {
    refuse("another number of records than the end record says");
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].second > (i + 1 < spans.size() ? spans[i + 1].first : begin)) {
      refuse("records that overlap");
    }
  }
  return records;
}

}  // namespace moecalc
