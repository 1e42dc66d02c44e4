#include "moecalc/package_file.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "moecalc/text.h"
#include "package/records.h"

namespace moecalc {

namespace {

constexpr const char* incomplete =
    "incomplete file (truncated copy?): copy it again or package the checkpoint again";
constexpr const char* foreign =
    "not a moecalc package; make one with `moecalc package CHECKPOINT -o MODEL.moe.pt`";

// --- CRC-32 (polynomial of zlib), sixteen bytes per step ------------------------------------------

constexpr size_t crc_step = 16;
using CrcTables = std::array<std::array<uint32_t, 256>, crc_step>;

constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
    tables[0][byte] = crc;
  }
  for (uint32_t byte = 0; byte < 256; ++byte) {
    for (size_t step = 1; step < crc_step; ++step) {
      const uint32_t previous = tables[step - 1][byte];
      tables[step][byte] = (previous >> 8) ^ tables[0][previous & 0xFFU];
    }
  }
  return tables;
}

uint32_t crc32_by_tables(uint32_t crc, const unsigned char* data, size_t size) {
  static constexpr CrcTables tables = make_crc_tables();
  const auto word = [](const unsigned char* at) {
    return static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8 |
           static_cast<uint32_t>(at[2]) << 16 | static_cast<uint32_t>(at[3]) << 24;
  };
  const auto part = [](uint32_t four, size_t last) {
    return tables[last][four & 0xFFU] ^ tables[last - 1][(four >> 8) & 0xFFU] ^
           tables[last - 2][(four >> 16) & 0xFFU] ^ tables[last - 3][four >> 24];
  };
  for (; size >= crc_step; data += crc_step, size -= crc_step) {
    crc = part(crc ^ word(data), 15) ^ part(word(data + 4), 11) ^ part(word(data + 8), 7) ^
          part(word(data + 12), 3);
  }
  for (; size > 0; --size, ++data) crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 0xFFU];
  return crc;
}

#if defined(__x86_64__)
/// x^n modulo the polynomial, in the order of bits that a product without carries takes.
constexpr int64_t power_of_x(int n) {
  uint32_t power = 0x80000000U;
  for (int k = 0; k < n; ++k) power = (power >> 1) ^ ((power & 1U) != 0 ? 0xEDB88320U : 0U);
  return int64_t{power} << 1;
}

/// What `bytes` stand for, moved on by `n_bit` bits of the message.
template <int n_bit>
[[gnu::target("pclmul")]] inline __m128i moved(__m128i bytes) {
  const __m128i powers = _mm_set_epi64x(power_of_x(n_bit - 32), power_of_x(n_bit + 32));
  return _mm_xor_si128(_mm_clmulepi64_si128(bytes, powers, 0x00), _mm_clmulepi64_si128(bytes, powers, 0x11));
}

/// The same from products without carries: four sums of 16 bytes at a distance of 64, which are then added to
/// one; what is left of them is a message of 16 bytes with the same checksum (the folding of Gopal et al.,
/// "Fast CRC computation for generic polynomials using PCLMULQDQ instruction", Intel 2009).
[[gnu::target("pclmul")]] uint32_t crc32_by_products(uint32_t crc, const unsigned char* data, size_t size) {
  constexpr size_t step = 64;
  if (size < step) return crc32_by_tables(crc, data, size);
  const auto load = [](const unsigned char* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  };
  __m128i sums[4] = {load(data), load(data + 16), load(data + 32), load(data + 48)};
  sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (data += step, size -= step; size >= step; data += step, size -= step) {
    for (size_t k = 0; k < 4; ++k) sums[k] = _mm_xor_si128(moved<512>(sums[k]), load(data + 16 * k));
  }
  for (size_t k = 1; k < 4; ++k) sums[k] = _mm_xor_si128(moved<128>(sums[k - 1]), sums[k]);
  std::array<unsigned char, 16> rest{};
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest.data()), sums[3]);
  return crc32_by_tables(crc32_by_tables(0, rest.data(), rest.size()), data, size);
}
#endif

/// Goes on from the state `crc`, which begins with all bits set; the checksum is the complement of the last.
uint32_t crc32(uint32_t crc, const unsigned char* data, size_t size) {
#if defined(__x86_64__)
  static const bool has_products = __builtin_cpu_supports("pclmul") != 0;
  if (has_products) return crc32_by_products(crc, data, size);
#endif
  return crc32_by_tables(crc, data, size);
}

/// Product of polynomials over GF(2) modulo that of the checksum; the highest bit is the coefficient of 1.
constexpr uint32_t crc_product(uint32_t left, uint32_t right) {
  uint32_t product = 0;
  for (uint32_t bit = 1U << 31; bit != 0; bit >>= 1) {
    if ((left & bit) != 0) product ^= right;
    right = (right >> 1) ^ ((right & 1U) != 0 ? 0xEDB88320U : 0U);
  }
  return product;
}

/// Checksum of two parts in turn; `size`: bytes of the second.
uint32_t crc_of_both(uint32_t first, uint32_t second, uint64_t size) {
  uint32_t power = 1U << 23;  // x^8, for one byte more
  uint32_t shift = 1U << 31;  // 1
  for (; size != 0; size >>= 1) {
    if ((size & 1U) != 0) shift = crc_product(power, shift);
    power = crc_product(power, power);
  }
  return crc_product(shift, first) ^ second;
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
/// `bytes`: end of the file, which begins at `base`; `eocd`: place in it.
bool eocd_fields_agree(const std::string& bytes, uint64_t base, size_t eocd) {
  const char* field = bytes.data() + eocd;
  const bool zip64 = eocd >= zip64_size && has_signature(bytes, eocd - zip64_size, "PK\6\6");
  const uint64_t directory_end = base + (zip64 ? eocd - zip64_size : eocd);
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

/// The error for a file that is no package, which says what it is where that is a frequent mishap.
Error foreign_file(const std::string& path, const std::string& bytes) {
  const auto begins = [&](const char* start) { return bytes.rfind(start, 0) == 0; };
  std::string head = bytes.substr(0, 512);
  std::transform(head.begin(), head.end(), head.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
  const size_t text = head.find_first_not_of(" \t\r\n");
  const auto tag = [&](const char* name) {
    return text != std::string::npos && head.compare(text, std::strlen(name), name) == 0;
  };
  std::string what;
  if (bytes.empty()) {
    what = "an empty file: the copy or download failed, or the disk was full";
  } else if (begins("version https://git-lfs.github.com/spec/")) {
    what = "a Git LFS pointer, not the file itself: run `git lfs pull`";
  } else if (tag("<!doctype html") || tag("<html")) {
    what = "an HTML page, not the file itself: a download link was for a web page; download the raw file";
  } else if (begins("\x1f\x8b")) {
    what = "compressed with gzip: unpack it first";
  } else if (begins("\3757zXZ")) {
    what = "compressed with xz: unpack it first";
  }
  if (what.empty()) return Error(path + ": " + foreign);
  return Error(path + ": not a moecalc package but " + what + "; expected a file *.moe.pt");
}

}  // namespace

// --- the file ------------------------------------------------------------------------------------

PackageFile::PackageFile(const std::string& path) : path_(printable(path, 4096)) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    throw Error(path_ + ": " + (errno == ENOENT || errno == ENOTDIR ? "no such file" : std::strerror(errno)));
  }
  if (S_ISDIR(status.st_mode)) {
    throw Error(path_ + ": not a moecalc package but a folder; expected a file *.moe.pt");
  }
  if (!S_ISREG(status.st_mode)) throw Error(path_ + ": " + foreign);
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw Error(path_ + ": cannot be opened: " + std::strerror(errno));
  try {
    if (::fstat(file_, &status) != 0) throw Error(path_ + ": cannot be read: " + std::strerror(errno));
    size_ = static_cast<uint64_t>(status.st_size);
    changed_ns_ = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
    check();
  } catch (...) {
    ::close(file_);
    throw;
  }
}

PackageFile::PackageFile(const std::string& name, std::string_view bytes)
    : path_(printable(name, 4096)), bytes_(bytes), size_(bytes.size()) {
  check();
}

PackageFile::~PackageFile() {
  if (file_ >= 0) ::close(file_);
}

void PackageFile::check() {
  check_checksum();
  check_records();
  check_format();
}

void PackageFile::read(uint64_t position, void* to, size_t n) const {
  if (file_ < 0) {
    if (position > size_ || n > size_ - position) throw Error(path_ + ": cannot be read: it ends too early");
    std::copy_n(bytes_.data() + position, n, static_cast<char*>(to));
    return;
  }
  struct stat status{};
  if (::fstat(file_, &status) != 0) throw Error(path_ + ": cannot be read: " + std::strerror(errno));
  const int64_t changed = int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
  if (static_cast<uint64_t>(status.st_size) != size_ || changed != changed_ns_) {
    throw Error(
        path_ +
        ": the file was changed since it was loaded, and weights of elements are read when an element "
        "first occurs: start again, and replace a package in use with `mv`, not `cp`");
  }
  auto* at = static_cast<char*>(to);
  while (n > 0) {
    const ssize_t got = ::pread(file_, at, n, static_cast<off_t>(position));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      throw Error(path_ + ": cannot be read: " + (got < 0 ? std::strerror(errno) : "it ends too early"));
    }
    at += got;
    position += static_cast<uint64_t>(got);
    n -= static_cast<size_t>(got);
  }
}

std::string PackageFile::read(uint64_t position, size_t n) const {
  std::string bytes(n, '\0');
  read(position, bytes.data(), n);
  return bytes;
}

/// Checksum of the first `covered` bytes, and in passing those of the records.
uint32_t PackageFile::checksum(uint64_t covered) {
  struct Piece {
    uint64_t end;
    uint32_t* checksum;
  };
  std::vector<std::pair<const std::string*, Record>> order;
  order.reserve(records_.size());
  for (const auto& [name, place] : records_) order.emplace_back(&name, place);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second.position, a.second.size) < std::pair(b.second.position, b.second.size);
  });
  std::vector<Piece> pieces;
  for (const auto& [name, place] : order) {
    pieces.push_back({place.position, nullptr});
    pieces.push_back({place.position + place.size, &found_[*name]});
  }
  pieces.push_back({covered, nullptr});

  uint32_t total = 0;
  uint32_t state = 0xFFFFFFFFU;
  uint64_t begin = 0;
  auto piece = pieces.begin();
  const auto finish = [&](uint64_t position) {
    for (; piece != pieces.end() && piece->end == position; ++piece) {
      if (piece->checksum != nullptr) *piece->checksum = ~state;
      total = crc_of_both(total, ~state, position - begin);
      state = 0xFFFFFFFFU;
      begin = position;
    }
  };
  std::vector<unsigned char> chunk(static_cast<size_t>(std::min<uint64_t>(covered, 256 << 10)));  // in cache
  for (uint64_t at = 0; at < covered;) {
    const auto n = static_cast<size_t>(std::min<uint64_t>(chunk.size(), covered - at));
    read(at, chunk.data(), n);
    for (size_t done = 0; done < n;) {
      const auto part = static_cast<size_t>(std::min<uint64_t>(n - done, piece->end - (at + done)));
      state = crc32(state, chunk.data() + done, part);
      done += part;
      finish(at + done);
    }
    at += n;
  }
  return total;
}

/// An edit that left the directory as it was.
void PackageFile::check_records() const {
  for (const auto& [name, place] : records_) {
    const auto found = found_.find(name);
    if (found == found_.end() || found->second == place.checksum) continue;
    throw Error(
        path_ + ": damaged or edited file (record '" + printable(name) +
        "' has another checksum than the directory says): copy it again or package the checkpoint again");
  }
}

/// Reads the directory as well, so that one pass over the file is enough.
void PackageFile::check_checksum() {
  constexpr uint64_t longest_tail = max_comment + eocd_size + zip64_size;
  const uint64_t base = size_ - std::min(size_, longest_tail);
  const std::string tail = read(base, static_cast<size_t>(size_ - base));
  const size_t eocd = find_eocd(tail);
  if (eocd == std::string::npos) {
    // A zip file begins with PK\3\4: without an end it was cut short, anything else never was one.
    const std::string head = read(0, static_cast<size_t>(std::min<uint64_t>(size_, 512)));
    if (!has_signature(head, 0, "PK\3\4")) throw foreign_file(path_, head);
    throw Error(path_ + ": " + incomplete);
  }
  const size_t comment_size = little_endian(tail.data() + eocd + 20, 2);
  const std::string comment = tail.substr(eocd + eocd_size);
  if (comment.size() < comment_size) throw Error(path_ + ": " + incomplete);

  const uint64_t covered = base + eocd;
  std::string bad_directory;  // of less interest than damage, which explains it
  try {
    records_ = read_directory([this](uint64_t at, void* to, size_t n) { read(at, to, n); }, size_, covered);
  } catch (const Error& error) {
    bad_directory = error.what();
  }
  const uint32_t actual = checksum(covered);
  uint32_t expected = 0;
  size_t expected_size = 0;
  if (std::sscanf(comment.c_str(), "moecalc crc32=%8x size=%zu", &expected, &expected_size) != 2) {
    // Our records under an unreadable comment: the flipped bit is in the comment itself.
    const bool has_records =
        !comment.empty() &&
        read(0, static_cast<size_t>(size_)).find("/extra/format_version") != std::string::npos;
    throw Error(path_ + ": " + (has_records ? damaged(actual, expected) : foreign + path_ + "`"));
  }
  if (expected_size != covered) throw Error(path_ + ": " + incomplete);
  if (actual != expected || comment != stamp(expected, expected_size) || comment_size != comment.size() ||
      !eocd_fields_agree(tail, base, eocd)) {
    throw Error(path_ + ": " + damaged(actual, expected));
  }
  if (!bad_directory.empty()) throw Error(path_ + ": " + bad_directory);
}

void PackageFile::check_format() const {
  const std::string text = record("extra/format_version");
  int format = 0;
  int used = 0;
  // a line end is forgiven
  if (text.size() > 6 || std::sscanf(text.c_str(), "%d %n", &format, &used) != 1 || format < 1 ||
      used != static_cast<int>(text.size())) {
    throw Error(path_ + ": expected a positive integer in `extra/format_version`, got '" +
                printable(text, 40) + "': package the checkpoint again");
  }
  if (format > package_format_version) {
    throw Error(path_ + ": package format " + std::to_string(format) + " is newer than this moecalc (" +
                version() + ") reads (" + std::to_string(package_format_version) + "): upgrade moecalc");
  }
}

std::string PackageFile::record(const std::string& name) const {
  const auto found = records_.find(name);
  if (found == records_.end()) {
    throw Error(path_ + ": not a moecalc package: it has no record `" + name + "`");
  }
  return read(found->second.position, static_cast<size_t>(found->second.size));
}

std::string digest_of(const PackageFile& file) {
  std::string lines;  // of sorted names
  char numbers[40];
  for (const auto& [name, place] : file.records()) {
    const bool read_by_core = name == "extra/architecture.json" || name == "extra/tensors.json";
    if (name.rfind("extra/", 0) == 0 && !read_by_core) continue;
    std::snprintf(numbers, sizeof(numbers), " %llu %08x\n", static_cast<unsigned long long>(place.size),
                  place.checksum);
    lines += name + numbers;
  }
  std::snprintf(numbers, sizeof(numbers), "%08x",
                ~crc32(0xFFFFFFFFU, reinterpret_cast<const unsigned char*>(lines.data()), lines.size()));
  return numbers;
}

void check_archive(const std::string& path) { const PackageFile checked(path); }

std::string read_record(const std::string& path, const std::string& name) {
  return PackageFile(path).record(name);
}

}  // namespace moecalc
