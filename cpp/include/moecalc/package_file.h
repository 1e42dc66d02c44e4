// Package files (`*.moe.pt`): integrity check and the records that can be read without loading the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "moecalc/error.h"
#include "moecalc/version.h"

namespace moecalc {

/// Where the bytes of a record are in the file.
struct Record {
  uint64_t position = 0;
  uint64_t size = 0;
  uint32_t checksum = 0;  // CRC-32 of its bytes, the same as in the archive's directory
};
/// By name, without the archive's top folder.
using Records = std::map<std::string, Record, std::less<>>;

/// A package file, checked as a whole and kept open.
///
/// The check comes before anything is parsed, so that a truncated, damaged, foreign or too new file is
/// reported as such instead of as an error of the zip reader or of the TorchScript loader. Nothing of the
/// file stays in memory: parts are read when they are needed.
class MOECALC_API PackageFile {
 public:
  /// Opens and checks `path`. Throws Error, with a message that begins with `path`, if the file is unusable.
  explicit PackageFile(const std::string& path);
  /// Checks the content of a file that was read already; messages begin with `name`. `bytes` must outlive
  /// this.
  PackageFile(const std::string& name, std::string_view bytes);
  ~PackageFile();
  PackageFile(const PackageFile&) = delete;
  PackageFile& operator=(const PackageFile&) = delete;

  /// For messages: without control characters.
  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }

  /// `n` bytes from `position` on. Throws Error if the file was changed since it was checked. A file that was
  /// deleted or replaced by another of its name can still be read.
  void read(uint64_t position, void* to, size_t n) const;

  /// Content of a record, for example "extra/metadata.json". Throws Error if there is none of that name.
  std::string record(const std::string& name) const;
  const Records& records() const { return records_; }

 private:
  std::string read(uint64_t position, size_t n) const;
  void check();
  void check_checksum();
  uint32_t checksum(uint64_t covered);
  void check_records() const;
  void check_format() const;

  std::string path_;
  int file_ = -1;           // none: `bytes_`
  std::string_view bytes_;  // the caller's
  uint64_t size_ = 0;
  int64_t changed_ns_ = 0;  // time of the last change
  Records records_;
  std::map<std::string, uint32_t, std::less<>>
      found_;  // checksums of the records' bytes while they are checked
};

/// Throws Error if `path` is missing, truncated, damaged, not a moecalc package, or of a newer format.
MOECALC_API void check_archive(const std::string& path);

/// Throws Error, which begins with the file's path, if the package holds anything that moecalc does not write
/// into one: other records, TorchScript that could do more than compute, pickles of other things than numbers
/// and tensors; or if its records are not those that the digest in its metadata was made for. The core
/// executes nothing of a file; torch, where it is asked for, runs code while it loads one.
MOECALC_API void check_package(const PackageFile& file);

/// Digest of the records of the model: all but those in `extra/`, and of these architecture.json and
/// tensors.json (docs/developer/package_format.md).
MOECALC_API std::string digest_of(const PackageFile& file);

/// The words of a package's code that `check_package` looks at, sorted: to compare with the allowed ones.
MOECALC_API std::vector<std::string> words_of_code(const PackageFile& file);
MOECALC_API std::vector<std::string> allowed_words();

/// Content of one record of a checked package file.
MOECALC_API std::string read_record(const std::string& path, const std::string& name);

}  // namespace moecalc
