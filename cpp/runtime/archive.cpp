#include "moecalc/archive.h"

#include <caffe2/serialize/inline_container.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "memory_reader.h"

namespace moecalc {

Error::~Error() = default;
OutOfMemoryError::~OutOfMemoryError() = default;

namespace {

constexpr const char* incomplete =
    "incomplete file (truncated copy?): copy it again or package the checkpoint again";
constexpr const char* foreign = "not a moecalc package; make one with `moecalc package CHECKPOINT -o ";

// --- CRC-32 (polynomial of zlib), eight bytes per step -------------------------------------------

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (size_t step = 1; step < 8; ++step) {
      const uint32_t previous = tables[step - 1][byte];
      tables[step][byte] = (previous >> 8) ^ tables[0][previous & 0xFFU];
    }
  }
  return tables;
}

uint32_t crc32(const unsigned char* data, size_t size) {
  static constexpr CrcTables tables = make_crc_tables();
  uint32_t crc = 0xFFFFFFFFU;
  while (size >= 8) {
    const uint32_t low = crc ^ (static_cast<uint32_t>(data[0]) | static_cast<uint32_t>(data[1]) << 8 |
                                static_cast<uint32_t>(data[2]) << 16 | static_cast<uint32_t>(data[3]) << 24);
    crc = tables[7][low & 0xFFU] ^ tables[6][(low >> 8) & 0xFFU] ^ tables[5][(low >> 16) & 0xFFU] ^
          tables[4][low >> 24] ^ tables[3][data[4]] ^ tables[2][data[5]] ^ tables[1][data[6]] ^
          tables[0][data[7]];
    data += 8;
    size -= 8;
  }
  for (; size > 0; --size, ++data) crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 0xFFU];
  return ~crc;
}

// --- end of a zip file ---------------------------------------------------------------------------

constexpr size_t eocd_size = 22;        // end-of-central-directory record without its comment
constexpr size_t zip64_size = 56 + 20;  // zip64 record and its locator, which torch always writes before it
constexpr size_t max_comment = 0xFFFF;

uint64_t little_endian(const char* data, int n_bytes) {
  uint64_t value = 0;
  for (int i = n_bytes - 1; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(data[i]);
  return value;
}

bool has_signature(const std::string& bytes, size_t position, const char (&signature)[5]) {
  return position + 4 <= bytes.size() && std::memcmp(bytes.data() + position, signature, 4) == 0;
}

/// Offset of the end-of-central-directory record, or npos.
size_t find_eocd(const std::string& bytes) {
  if (bytes.size() < eocd_size) return std::string::npos;
  const size_t last = bytes.size() - eocd_size;
  const size_t first = last > max_comment ? last - max_comment : 0;
  const size_t found = bytes.rfind("PK\5\6", last);
  return found == std::string::npos || found < first ? std::string::npos : found;
}

/// The checksum does not cover the record that carries it, but its fields are determined by what precedes it.
bool eocd_fields_agree(const std::string& bytes, size_t eocd) {
  const char* field = bytes.data() + eocd;
  const bool zip64 = eocd >= zip64_size && has_signature(bytes, eocd - zip64_size, "PK\6\6");
  const uint64_t directory_end = zip64 ? eocd - zip64_size : eocd;
  const uint64_t directory_size =
      zip64 ? little_endian(field - zip64_size + 40, 8) : little_endian(field + 12, 4);
  const uint64_t offset = directory_end - std::min(directory_end, directory_size);
  constexpr uint64_t limit = 0xFFFFFFFF;
  return little_endian(field + 4, 4) == 0 && little_endian(field + 8, 2) == little_endian(field + 10, 2) &&
         little_endian(field + 12, 4) == std::min(directory_size, limit) &&
         little_endian(field + 16, 4) == std::min(offset, limit);
}

std::string stamp(uint32_t checksum, size_t size) {
  char text[64];
  std::snprintf(text, sizeof(text), "moecalc crc32=%08x size=%zu", checksum, size);
  return text;
}

std::string damaged(uint32_t actual, uint32_t expected) {
  char text[128];
  std::snprintf(text, sizeof(text),
                "damaged file (checksum %08x, expected %08x): copy it again or package again", actual,
                expected);
  return text;
}

std::string read_file(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    throw Error(path + ": " + (errno == ENOENT || errno == ENOTDIR ? "no such file" : std::strerror(errno)));
  }
  if (!S_ISREG(status.st_mode)) throw Error(path + ": " + foreign + path + "`");
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) throw Error(path + ": cannot be opened: " + std::strerror(errno));
  std::string bytes(static_cast<size_t>(status.st_size), '\0');
  const size_t n_read = std::fread(bytes.data(), 1, bytes.size(), file.get());
  if (std::ferror(file.get()) != 0) throw Error(path + ": cannot be read: " + std::strerror(errno));
  bytes.resize(n_read);
  return bytes;
}

}  // namespace

PackageFile::PackageFile(const std::string& path) : path_(path), bytes_(read_file(path)) {
  check_checksum();
  check_format();
}

void PackageFile::check_checksum() const {
  const size_t eocd = find_eocd(bytes_);
  if (eocd == std::string::npos) {
    // A zip file begins with PK\3\4: without an end it was cut short, anything else never was one.
    throw Error(path_ + ": " +
                (has_signature(bytes_, 0, "PK\3\4") ? std::string(incomplete) : foreign + path_ + "`"));
  }
  const size_t comment_size = little_endian(bytes_.data() + eocd + 20, 2);
  const std::string comment = bytes_.substr(eocd + eocd_size);
  if (comment.size() < comment_size) throw Error(path_ + ": " + incomplete);

  const uint32_t actual = crc32(reinterpret_cast<const unsigned char*>(bytes_.data()), eocd);
  uint32_t expected = 0;
  size_t expected_size = 0;
  if (std::sscanf(comment.c_str(), "moecalc crc32=%8x size=%zu", &expected, &expected_size) != 2) {
    // Our records under an unreadable comment: the flipped bit is in the comment itself.
    const bool has_records = !comment.empty() && bytes_.find("/extra/format_version") != std::string::npos;
    throw Error(path_ + ": " + (has_records ? damaged(actual, expected) : foreign + path_ + "`"));
  }
  if (expected_size != eocd) throw Error(path_ + ": " + incomplete);
  if (actual != expected || comment != stamp(expected, expected_size) || comment_size != comment.size() ||
      !eocd_fields_agree(bytes_, eocd)) {
    throw Error(path_ + ": " + damaged(actual, expected));
  }
}

void PackageFile::check_format() const {
  const std::string text = record("extra/format_version");
  int format = 0;
  if (std::sscanf(text.c_str(), "%d", &format) != 1 || format < 1) {
    throw Error(path_ + ": expected a positive integer in `extra/format_version`, got '" + text +
                "': package the checkpoint again");
  }
  if (format > package_format_version) {
    throw Error(path_ + ": package format " + std::to_string(format) + " is newer than this moecalc (" +
                version() + ") reads (" + std::to_string(package_format_version) +
                "): upgrade moecalc");
  }
}

std::string PackageFile::record(const std::string& name) const {
  try {
    caffe2::serialize::PyTorchStreamReader reader(std::make_shared<MemoryReader>(bytes_));
    if (reader.hasRecord(name)) {
      const auto [data, size] = reader.getRecord(name);
      return {static_cast<const char*>(data.get()), size};
    }
  } catch (const c10::Error& error) {
    std::string message = error.what_without_backtrace();
    throw Error(path_ + ": cannot be read: " + message.substr(0, message.find('\n')));
  }
  throw Error(path_ + ": not a moecalc package: it has no record `" + name + "`");
}

void check_archive(const std::string& path) { const PackageFile checked(path); }

std::string read_record(const std::string& path, const std::string& name) {
  return PackageFile(path).record(name);
}

}  // namespace moecalc
