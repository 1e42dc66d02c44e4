// Package files (`*.moe.pt`): integrity check and the records that can be read without loading the model.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moecalc/version.h"

namespace moecalc {

/// Every error that moecalc raises on purpose. The message is one line: value, expectation, remedy.
class MOECALC_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  ~Error() override;
};

/// The model did not fit into the memory of the host or of the device.
class MOECALC_API OutOfMemoryError : public Error {
 public:
  using Error::Error;
  ~OutOfMemoryError() override;
};

/// A package file, read into memory and checked as a whole.
///
/// The check comes before anything is parsed, so that a truncated, damaged, foreign or too new file is
/// reported as such instead of as an error of the zip reader or of the TorchScript loader.
class MOECALC_API PackageFile {
 public:
  /// Reads `path`. Throws Error, with a message that begins with `path`, if the file is unusable.
  explicit PackageFile(const std::string& path);

  /// For messages: without control characters.
  const std::string& path() const { return path_; }
  const std::string& bytes() const { return bytes_; }

  /// Content of a record, for example "extra/metadata.json". Throws Error if there is none of that name.
  std::string record(const std::string& name) const;
  /// All records, in place: name -> bytes within bytes().
  const std::map<std::string, std::string_view, std::less<>>& records() const { return records_; }

  PackageFile(const PackageFile&) = delete;
  PackageFile& operator=(const PackageFile&) = delete;

 private:
  void check_checksum() const;
  void check_format() const;

  std::string path_;
  std::string bytes_;
  std::map<std::string, std::string_view, std::less<>> records_;
};

/// Throws Error if `path` is missing, truncated, damaged, not a moecalc package, or of a newer format.
MOECALC_API void check_archive(const std::string& path);

/// Throws Error, which begins with the file's path, if the package holds anything that moecalc does not write
/// into one: other records, TorchScript that could do more than compute, pickles of other things than numbers
/// and tensors. To be called before torch sees the file, because torch runs code of a file while it loads it.
MOECALC_API void check_package(const PackageFile& file);

/// The words of a package's code that `check_package` looks at, sorted: to compare with the allowed ones.
MOECALC_API std::vector<std::string> words_of_code(const PackageFile& file);
MOECALC_API std::vector<std::string> allowed_words();

/// Content of one record of a checked package file.
MOECALC_API std::string read_record(const std::string& path, const std::string& name);

}  // namespace moecalc
