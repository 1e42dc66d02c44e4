// The directory of a package file, which is a zip archive of stored records: the only reader of it in the C++
// runtime.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "moecalc/package_file.h"

namespace moecalc {

/// Copies `n` bytes from a position of the file on.
using ReadBytes = std::function<void(uint64_t position, void* to, size_t n)>;

/// Reads the directory of a file of `size` bytes that ends at `eocd`, the offset of the end record.
///
/// Every reader of zip files must see the same records: names are plain, distinct (also to readers that
/// ignore case) and under one folder; nothing is compressed or encrypted, so that no record is larger than
/// the file; headers agree with the directory, records do not overlap, and the counts of the end record are
/// right. Throws Error that names the record; the message does not name the file.
Records read_directory(const ReadBytes& read, uint64_t size, uint64_t eocd);

}  // namespace moecalc
