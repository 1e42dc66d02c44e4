// The directory of a package file, which is a zip archive of stored records: the only reader of it in the C++
// runtime.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <string_view>

namespace moecalc {

/// Record name without the archive's top folder -> bytes within the file.
using Records = std::map<std::string, std::string_view, std::less<>>;

/// Reads the directory that ends at `eocd`, the offset of the end record.
///
/// Every reader of zip files must see the same records: names are plain, distinct (also to readers that
/// ignore case) and under one folder; nothing is compressed or encrypted, so that no record is larger than
/// the file; headers agree with the directory, records do not overlap, and the counts of the end record are
/// right. Throws Error that names the record; the message does not name the file.
Records read_directory(const std::string& bytes, size_t eocd);

}  // namespace moecalc
